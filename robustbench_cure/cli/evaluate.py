"""What the verbs of the command line do: put models, data and battery together, find records, name files."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import click

from robustbench_cure import load_battery
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.evaluate import SHARD_SIZE, admit, evaluate
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.files import refuse_files
from robustbench_cure.loading import card_dataset, load_all, named_models
from robustbench_cure.progress import ProgressLine
from robustbench_cure.protocol.cards import Battery, ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.protocol.request import Request
from robustbench_cure.report.render import write_reports
from robustbench_cure.report.terminal import terminal_table


def run(request: Request, command: str = "") -> list[Record]:
    """Evaluate every model of a request and write the report; names the files at the end.

    Raises:
        UsageError: anything wrong with the request, before the first forward pass.
        RunError: a model or the device failed.
    """
    if request.resume and request.out is None:
        raise UsageError("--resume needs --out DIR, the run to go on with")
    shard = parse_shard(request.shard)
    models = named_models(request)
    battery = _battery(request, models)
    dataset = request.dataset or _default_dataset(models[0], battery, request.cards)
    classifiers, data = load_all(models, dataset, request)
    if request.n_at_most and request.n is not None and request.n > len(data):
        click.echo(f"--n auto: {request.n:,} samples are needed, {data.name} has {len(data):,}", err=True)
        request = replace(request, n=len(data))
    out = request.out or Path("runs") / f"{battery.id}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    _check_places(models, classifiers, out, request.resume)
    flags = [_admit(*each, battery, data, request) for each in zip(models, classifiers, strict=True)]
    first = classifiers[0]
    n = request.n or min(battery.n or len(data), len(data))
    head = [
        f"{battery.name}\n{data.name} {data.split}, {n} of {len(data)} samples; device {first.device}, "
        f"search in {first.precision}, batch size {first.batch_size}"
    ]
    records = []
    for classifier, raised in zip(classifiers, flags, strict=True):
        info = classifier.model_info()
        with ProgressLine(info.id) as progress:

            def told(done: float, total: float, doing: str, line: ProgressLine = progress) -> None:
                while head:  # said once the run is under way: before that an error is all there is to say
                    click.echo(head.pop(), err=True)
                line(done, total, doing)

            try:
                record = evaluate(
                    classifier,
                    battery,
                    data,
                    n=request.n or 0,
                    seed=request.seed,
                    out=out / info.id,
                    resume=request.resume,
                    shard=shard,
                    shard_size=request.shard_size or SHARD_SIZE,
                    allow_unreliable=request.allow_unreliable,
                    save_adversarials=request.save_adversarials,
                    command=command,
                    progress=told,
                    flags=raised,
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"finished shards are kept: go on with the same command and --resume --out {out}"
                ) from None
        records.append(record)
    if shard != (1, 1):
        click.echo(f"part {shard[0]} of {shard[1]} is in {out}; join the parts with `cure-bench merge`")
    else:
        # In the order in which `report` finds them, so that it writes the same files again.
        write_and_name(sorted(records, key=lambda record: record.manifest.model.id), out)
    return records


def _battery(request: Request, models: tuple[str, ...]) -> Battery:
    battery = load_battery(request.battery or _default_battery(models, request.cards), cards=request.cards)
    if not request.models and request.dataset is None and battery.dataset not in ("", "digits"):
        raise UsageError(f"--battery {battery.id} is of {battery.dataset}: name a model with --model")
    if request.eps is None:
        return battery
    try:
        return battery.at(request.eps)
    except ValueError as error:
        raise UsageError(f"--eps {request.eps}: {error}") from None


def _check_places(models: tuple[str, ...], classifiers: list[Classifier], out: Path, resume: bool) -> None:
    """Refuse what would only show when the first models are done: a place taken, or one for two models."""
    refuse_files(out)
    places: dict[str, str] = {}
    for model, classifier in zip(models, classifiers, strict=True):
        place = classifier.model_info().id
        if place in places:
            raise UsageError(
                f"--model {places[place]} and --model {model} both write to {out / place}: rename one"
            )
        places[place] = model
        if not resume and (out / place / "manifest.json").exists():
            raise UsageError(
                f"{out / place}: already holds a run; continue it with --resume or choose another --out"
            )


def _admit(
    model: str, classifier: Classifier, battery: Battery, data: EvalSet, request: Request
) -> list[Flag]:
    try:
        return admit(classifier, battery, data, n=request.n or 0, allow_unreliable=request.allow_unreliable)
    except UsageError as error:
        raise UsageError(f"{model}: {error}") from error


def _default_battery(models: tuple[str, ...], cards: tuple[str, ...]) -> str:
    if any(":" in model for model in models):
        return "strong"
    wanted = {find(ModelCard, model, cards).card.battery for model in models}
    if len(wanted) > 1:
        raise UsageError(
            f"these models have different batteries ({', '.join(sorted(wanted))}): choose one with --battery"
        )
    return wanted.pop()


def _default_dataset(model: str, battery: Battery, cards: tuple[str, ...]) -> str:
    return battery.dataset or card_dataset(model, cards)


def parse_shard(text: str | None) -> tuple[int, int]:
    """``2/4`` is the second of four parts."""
    if text is None:
        return (1, 1)
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--shard {text}: write I/K with 1 <= I <= K")
    return (int(part), int(parts))


def write_and_name(records: list[Record], out: Path) -> None:
    """Write the report files and print the table and where they are."""
    files = write_reports(records, out)
    click.echo(terminal_table(records))
    for file in files:
        if file.suffix == ".html":
            click.echo(f"report: {file}")
    click.echo("tables: " + ", ".join(file.name for file in files if file.suffix != ".html") + f" in {out}")
