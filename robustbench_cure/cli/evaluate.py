"""Verbs that make and join records: `evaluate`, `merge`, `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustbench_cure.cli.options import (
    BATCH_SIZE,
    CARDS,
    DATA,
    DEVICE,
    MODELS,
    NETWORK,
    PATH,
    POINTS,
    PRECISION,
    AutoOr,
    PartOf,
    out,
    seed,
    taking,
    with_options,
)
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import FLAG_KINDS
from robustbench_cure.files import refuse_files
from robustbench_cure.progress import ProgressLine
from robustbench_cure.protocol.request import EvaluateRequest

if TYPE_CHECKING:
    from robustbench_cure.classifier import Classifier
    from robustbench_cure.datasets import EvalSet
    from robustbench_cure.evaluation.flags import Flag
    from robustbench_cure.evaluation.record import Record
    from robustbench_cure.protocol.cards import Battery
    from robustbench_cure.protocol.naming import ModelName

#: Number of samples that stands for ``--n auto`` until the tolerance is known.
AUTO = 0


@click.command()
@with_options(
    MODELS,
    click.option("--battery", metavar="ID", help="Protocol; default: the model card's own."),
    click.option("--eps", metavar="EPS", help='Another radius for the battery, as "4/255"; steps follow it.'),
    DATA,
    click.option(
        "--n",
        type=AutoOr(AUTO),
        metavar="N",
        help="Number of samples, or auto: as --tolerance needs; default: what the battery asks for.",
    ),
    click.option("--tolerance", type=POINTS, help="With --n auto: that of `compare`, in points."),
    NETWORK,
    DEVICE,
    PRECISION,
    BATCH_SIZE,
    seed("Seed of the attacks; default: the battery's."),
    out("Run directory; default: runs/<battery>-<time>."),
    click.option("--resume", is_flag=True, help="Go on with the run that --out holds."),
    click.option(
        "--shard",
        type=PartOf(),
        default="1/1",
        metavar="I/K",
        help="Do the I-th of K parts; join them with `cure-bench merge`.",
    ),
    click.option(
        "--shard-size",
        type=click.IntRange(1),
        metavar="N",
        help="Samples that are written, resumed and split together; the same for all parts; default: 512.",
    ),
    click.option(
        "--audit",
        type=AutoOr(0, "all"),
        metavar="M",
        help="Survivors that the audit of the battery attacks, or all; default: what the battery asks for.",
    ),
    click.option("--save-adversarials", is_flag=True, help="Keep every attack's images, float32."),
    click.option(
        "--allow-unreliable", is_flag=True, help="Evaluate a random or batch-dependent model, marked as such."
    ),
    click.option(
        "--fail-on",
        multiple=True,
        type=click.Choice(list(FLAG_KINDS)),
        metavar="FLAG",
        help="Flag that makes the exit code 1 if it is raised; repeatable.",
    ),
    CARDS,
)
@taking(EvaluateRequest)
def evaluate(request: EvaluateRequest, tolerance: Fraction | None, fail_on: tuple[str, ...]) -> int:
    """Evaluate models under a battery of attacks and write a report."""
    from robustbench_cure.evaluation.flags import failures

    failed = failures(run(_sized(request, tolerance)), fail_on)
    for line in failed:
        click.echo(line)
    return int(bool(failed))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@out("Where to write; default: into the run, if it is one.")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write the report of finished runs again, from their records alone."""
    from robustbench_cure.evaluation.storage import find_records

    if out is None and len(runs) > 1:
        raise UsageError("several runs: say where the report goes with --out")
    write_and_name(find_records(runs), out or runs[0])


@click.command()
@click.argument("parts", nargs=-1, required=True, type=PATH)
@out("Run directory to make.", required=True)
def merge(parts: tuple[Path, ...], out: Path) -> None:
    """Join the parts that `evaluate --shard I/K` wrote, and write the report."""
    from robustbench_cure.evaluation.storage import merge_runs

    write_and_name(merge_runs(parts, out), out)


def run(request: EvaluateRequest) -> list[Record]:
    """Evaluate every model of a request and write the report; names the files at the end.

    Raises:
        UsageError: anything wrong with the request, before the first forward pass.
        RunError: a model or the device failed.
    """
    from robustbench_cure.evaluation.evaluate import SHARD_SIZE
    from robustbench_cure.evaluation.evaluate import evaluate as evaluate_model
    from robustbench_cure.loading import load_all, named_models

    if request.resume and request.out is None:
        raise UsageError("--resume needs --out DIR, the run to go on with")
    models = named_models(request)
    battery = _battery(request, models)
    if request.audit is not None and battery.audit is None:
        raise UsageError(f"--audit: battery {battery.id!r} has no audit; --battery reference has one")
    classifiers, data = load_all(models, request, battery)
    if request.n_at_most and request.n is not None and request.n > len(data):
        click.echo(f"--n auto: {request.n:,} samples are needed, {data.name} has {len(data):,}", err=True)
        request = replace(request, n=len(data))
    out = request.out or Path("runs") / f"{battery.id}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    _check_places(models, classifiers, out, request.resume)
    flags = [_admit(*each, battery, data, request) for each in zip(models, classifiers, strict=True)]
    heading = [_head(classifiers[0], battery, data, request)]
    records = []
    for classifier, raised in zip(classifiers, flags, strict=True):
        info = classifier.model_info()
        with ProgressLine(info.id) as line:
            try:
                record = evaluate_model(
                    classifier,
                    battery,
                    data,
                    n=request.n or 0,
                    seed=request.seed,
                    out=out / info.id,
                    resume=request.resume,
                    shard=request.shard,
                    shard_size=request.shard_size or SHARD_SIZE,
                    allow_unreliable=request.allow_unreliable,
                    audit=request.audit,
                    save_adversarials=request.save_adversarials,
                    command=request.command,
                    progress=_after(heading, line),
                    flags=raised,
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"finished shards are kept: go on with the same command and --resume --out {out}"
                ) from None
        records.append(record)
    if request.shard != (1, 1):
        part, parts = request.shard
        click.echo(f"part {part} of {parts} is in {out}; join the parts with `cure-bench merge`")
        if battery.audit is not None:
            click.echo("the audit follows when they are joined: evaluate again with --resume --out JOINED")
    else:
        # In the order in which `report` finds them, so that it writes the same files again.
        write_and_name(sorted(records, key=lambda record: record.manifest.model.id), out)
    return records


def _sized(request: EvaluateRequest, tolerance: Fraction | None) -> EvaluateRequest:
    """The request with ``--n auto`` turned into the number that the tolerance needs.

    Raises:
        UsageError: only one of the two was given, or the tolerance is too small or too large.
    """
    if (request.n == AUTO) != (tolerance is not None):
        raise UsageError("--n auto and --tolerance POINTS go together")
    if tolerance is None:
        return request
    from robustbench_cure.gate.outcome import Rules
    from robustbench_cure.stats import sample_size

    if not 0 < tolerance < Fraction(1, 4):
        shown = f"{100 * float(tolerance):g}"
        raise UsageError(f"--tolerance {shown}: --n auto needs a tolerance between 0 and 25 points")
    try:
        n = sample_size(tolerance, Rules().level)
    except ValueError as error:
        raise UsageError(f"--n auto: {error}") from None
    return replace(request, n=n, n_at_most=True)


def _head(classifier: Classifier, battery: Battery, data: EvalSet, request: EvaluateRequest) -> str:
    """What is evaluated, and how: said once the run is under way."""
    n = request.n or min(battery.n or len(data), len(data))
    return (
        f"{battery.name}\n{data.name} {data.split}, {n} of {len(data)} samples; device {classifier.device}, "
        f"search in {classifier.precision}, batch size {classifier.batch_size}"
    )


def _after(heading: list[str], line: ProgressLine) -> Callable[[float, float, str], None]:
    """Progress that prints a heading first, once; before that an error is all there is to say."""

    def progress(done: float, total: float, doing: str) -> None:
        while heading:
            click.echo(heading.pop(), err=True)
        line(done, total, doing)

    return progress


def _battery(request: EvaluateRequest, models: Sequence[ModelName]) -> Battery:
    from robustbench_cure.loading import EMBEDDED, named_battery

    battery = named_battery(request.battery, models, request.cards)
    if not request.models and request.dataset is None and battery.dataset not in ("", EMBEDDED):
        raise UsageError(f"--battery {battery.id} is of {battery.dataset}: name a model with --model")
    if request.eps is None:
        return battery
    try:
        return battery.at(request.eps)
    except ValueError as error:
        raise UsageError(f"--eps {request.eps}: {error}") from None


def _check_places(
    models: Sequence[ModelName], classifiers: list[Classifier], out: Path, resume: bool
) -> None:
    """Refuse what would only show when the first models are done: a place taken, or one for two models."""
    refuse_files(out)
    places: dict[str, str] = {}
    for model, classifier in zip(models, classifiers, strict=True):
        place = classifier.model_info().id
        if place in places:
            raise UsageError(
                f"--model {places[place]} and --model {model} both write to {out / place}: rename one"
            )
        places[place] = model.name
        if not resume and (out / place / "manifest.json").exists():
            raise UsageError(
                f"{out / place}: already holds a run; continue it with --resume or choose another --out"
            )


def _admit(
    model: ModelName, classifier: Classifier, battery: Battery, data: EvalSet, request: EvaluateRequest
) -> list[Flag]:
    from robustbench_cure.evaluation.evaluate import admit

    try:
        return admit(classifier, battery, data, n=request.n or 0, allow_unreliable=request.allow_unreliable)
    except UsageError as error:
        raise UsageError(f"{model}: {error}") from error


def write_and_name(records: list[Record], out: Path) -> None:
    """Write the report files and print the table and where they are."""
    from robustbench_cure.report.render import write_reports
    from robustbench_cure.report.terminal import terminal_table

    files = write_reports(records, out)
    click.echo(terminal_table(records))
    for file in files:
        if file.suffix == ".html":
            click.echo(f"report: {file}")
    click.echo("tables: " + ", ".join(file.name for file in files if file.suffix != ".html") + f" in {out}")
