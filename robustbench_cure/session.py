"""What the verbs of the command line do: put models, data and battery together, find records, name files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import click

from robustbench_cure import load_battery
from robustbench_cure.cards import Battery, ModelCard
from robustbench_cure.catalog import catalog, find
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet, Split, load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation import SHARD_SIZE, admit, evaluate
from robustbench_cure.flags import Flag
from robustbench_cure.progress import ProgressLine
from robustbench_cure.record import Record
from robustbench_cure.report.render import write_reports
from robustbench_cure.report.terminal import terminal_table
from robustbench_cure.shards import gather, merge
from robustbench_cure.zoo.models import ROBUSTBENCH, load_model


@dataclass
class Request:
    """The options of `cure-bench evaluate`; None where an option was not given."""

    models: tuple[str, ...] = ()
    battery: str | None = None
    eps: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    split: Split = "test"
    n: int | None = None
    #: Fewer will do where there are not as many.
    n_at_most: bool = False
    weights: Path | None = None
    mean: str | None = None
    std: str | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: str = "auto"
    seed: int | None = None
    out: Path | None = None
    resume: bool = False
    shard: str | None = None
    shard_size: int | None = None
    save_adversarials: bool = False
    allow_unreliable: bool = False
    cards: tuple[str, ...] = ()


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


def named_models(request: Request) -> tuple[str, ...]:
    """The models of a request; without any, the embedded ones.

    Raises:
        UsageError: one is named twice, or weights are given for several.
    """
    if request.weights is not None and len(request.models) != 1:
        raise UsageError("--weights goes with exactly one --model")
    models = request.models or tuple(
        sorted(m for m in catalog(ModelCard, request.cards) if m.startswith("digits_"))
    )
    doubled = [m for m in models if models.count(m) > 1]
    if doubled:
        raise UsageError(f"--model {doubled[0]} is given twice")
    return models


def load_all(models: tuple[str, ...], dataset: str, request: Request) -> tuple[list[Classifier], EvalSet]:
    """The models and the data of a request.

    Raises:
        UsageError: one of them cannot be loaded.
    """
    # Cards do without the data: a model that cannot be loaded is refused before anything is downloaded.
    loaded = {model: _classifier(model, request, None) for model in models if ":" not in model}
    data = load_dataset(dataset, request.split, request.data_dir)
    if not request.models and dataset != "digits":
        raise UsageError(f"--dataset {dataset}: name a model with --model; those built in know digits alone")
    return [loaded.get(model) or _classifier(model, request, data) for model in models], data


def card_dataset(model: str, cards: tuple[str, ...]) -> str:
    """The data set of a model's card.

    Raises:
        UsageError: a model without a card.
    """
    if model.startswith(ROBUSTBENCH):
        from robustbench_cure.interop.robustbench_zoo import parts

        return parts(model)[0]
    if ":" in model:
        raise UsageError(f"{model}: a model without a card needs --dataset")
    return find(ModelCard, model, cards).card.dataset


def refuse_files(out: Path) -> None:
    """Refuse a folder for results that is a file, or lies below one (UsageError)."""
    for part in (out, *out.parents):
        if part.exists() and not part.is_dir():
            raise UsageError(f"--out {out}: {part} is a file, not a directory; choose another --out")


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


def _classifier(model: str, request: Request, data: EvalSet | None) -> Classifier:
    return load_model(
        model,
        weights=request.weights,
        device=request.device,
        precision=request.precision,
        batch_size=parse_batch_size(request.batch_size),
        mean=parse_numbers("--mean", request.mean),
        std=parse_numbers("--std", request.std),
        data=data,
        cards=request.cards,
    )


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


def parse_batch_size(text: str) -> int | None:
    """``auto`` or a positive number."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: use auto or a positive number")
    return int(text)


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """``.49,.48,.45`` as numbers."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers separated by commas, .49,.48,.45") from None
    if not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"{option} {text}: the numbers must be finite")
    return numbers


def parse_shard(text: str | None) -> tuple[int, int]:
    """``2/4`` is the second of four parts."""
    if text is None:
        return (1, 1)
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--shard {text}: write I/K with 1 <= I <= K")
    return (int(part), int(parts))


# --- records --------------------------------------------------------------------------------------------


def record_dirs(run: Path) -> list[Path]:
    """Record directories of a run: itself, or its children.

    Raises:
        UsageError: there are none.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run directory")
    if (run / "manifest.json").is_file():
        return [run]
    found = sorted(path.parent for path in run.glob("*/manifest.json") if not _is_study(path))
    if not found:
        raise UsageError(f"{run}: not a run: neither it nor a folder in it has a manifest.json")
    return found


def _is_study(manifest: Path) -> bool:
    """Whether this is what `curvature`, `masking` and the like left there; anything damaged is not."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "verb" in content


def find_records(runs: tuple[Path, ...]) -> list[Record]:
    """Every finished record of some run directories.

    Raises:
        UsageError: not a run, damaged, unfinished, or only a part.
    """
    records = [Record.load(path) for run in runs for path in record_dirs(run)]
    for record in records:
        if record.manifest.status == "partial":
            raise UsageError(
                f"{record.path}: only part {record.manifest.config.shard} of a run; "
                "join the parts with `cure-bench merge`"
            )
    return records


def merge_runs(parts: tuple[Path, ...], out: Path) -> list[Record]:
    """Join the parts of a run, model by model; see `shards.merge`."""
    by_model: dict[str, list[Path]] = {}
    for part in parts:
        for path in record_dirs(part):
            by_model.setdefault(path.name if path != part else "", []).append(path)
    places = {name: out / name if name else out for name in by_model}
    for name, paths in by_model.items():  # all of them before the first is written
        gather(paths, places[name])
    return [merge(paths, places[name]) for name, paths in by_model.items()]


def write_and_name(records: list[Record], out: Path) -> None:
    """Write the report files and print the table and where they are."""
    files = write_reports(records, out)
    click.echo(terminal_table(records))
    for file in files:
        if file.suffix == ".html":
            click.echo(f"report: {file}")
    click.echo("tables: " + ", ".join(file.name for file in files if file.suffix != ".html") + f" in {out}")
