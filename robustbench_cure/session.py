"""What the verbs of the command line do: put models, data and battery together, find records, name files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from robustbench_cure import load_battery
from robustbench_cure.cards import Battery, ModelCard
from robustbench_cure.catalog import catalog, find
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet, Split, load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation import evaluate
from robustbench_cure.progress import ProgressLine
from robustbench_cure.record import Record
from robustbench_cure.report.render import write_reports
from robustbench_cure.report.terminal import terminal_table
from robustbench_cure.shards import merge
from robustbench_cure.zoo.models import load_model


@dataclass
class Request:
    """The options of `cure-bench evaluate`; None where an option was not given."""

    models: tuple[str, ...] = ()
    battery: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    split: Split = "test"
    n: int | None = None
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
    if request.weights and len(request.models) != 1:
        raise UsageError("--weights goes with exactly one --model")
    shard = parse_shard(request.shard)
    models = request.models or tuple(
        sorted(m for m in catalog(ModelCard, request.cards) if m.startswith("digits_"))
    )
    doubled = [m for m in models if models.count(m) > 1]
    if doubled:
        raise UsageError(f"--model {doubled[0]} is given twice")
    battery = load_battery(request.battery or _default_battery(models, request.cards), cards=request.cards)
    data = load_dataset(
        request.dataset or _default_dataset(models[0], battery, request.cards),
        request.split,
        request.data_dir,
    )
    classifiers = [_classifier(model, request, data) for model in models]
    out = request.out or Path("runs") / f"{battery.id}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    first = classifiers[0]
    n = request.n or min(battery.n or len(data), len(data))
    click.echo(
        f"{battery.name}\n{data.name} {data.split}, {n} of {len(data)} samples; device {first.device}, "
        f"search in {first.precision}, batch size {first.batch_size}",
        err=True,
    )
    records = []
    for classifier in classifiers:
        info = classifier.model_info()
        with ProgressLine(info.id) as progress:
            record = evaluate(
                classifier,
                battery,
                data,
                n=request.n or 0,
                seed=request.seed,
                out=out / info.id,
                resume=request.resume,
                shard=shard,
                allow_unreliable=request.allow_unreliable,
                save_adversarials=request.save_adversarials,
                command=command,
                progress=progress,
            )
        records.append(record)
    if shard != (1, 1):
        click.echo(f"part {shard[0]} of {shard[1]} is in {out}; join the parts with `cure-bench merge`")
    else:
        write_and_name(records, out)
    return records


def _classifier(model: str, request: Request, data: EvalSet) -> Classifier:
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
    if battery.dataset:
        return battery.dataset
    if ":" in model:
        raise UsageError(f"{model}: a model without a card needs --dataset")
    return find(ModelCard, model, cards).card.dataset


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
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers separated by commas, .49,.48,.45") from None


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
    found = sorted(path.parent for path in run.glob("*/manifest.json"))
    if not found:
        raise UsageError(f"{run}: not a run: neither it nor a folder in it has a manifest.json")
    return found


def find_records(runs: tuple[Path, ...]) -> list[Record]:
    """Every finished record of some run directories.

    Raises:
        UsageError: not a run, damaged, unfinished, or only a part.
    """
    records = [Record.load(path) for run in runs for path in record_dirs(run)]
    for record in records:
        if record.manifest.status == "partial":
            raise UsageError(
                f"{record.path}: only part {record.manifest.config.shard} of a run; join the parts first"
            )
    return records


def merge_runs(parts: tuple[Path, ...], out: Path) -> list[Record]:
    """Join the parts of a run, model by model; see `shards.merge`."""
    by_model: dict[str, list[Path]] = {}
    for part in parts:
        for path in record_dirs(part):
            by_model.setdefault(path.name if path != part else "", []).append(path)
    return [merge(paths, out / name if name else out) for name, paths in by_model.items()]


def write_and_name(records: list[Record], out: Path) -> None:
    """Write the report files and print the table and where they are."""
    files = write_reports(records, out)
    click.echo(terminal_table(records))
    for file in files:
        if file.suffix == ".html":
            click.echo(f"report: {file}")
    click.echo("tables: " + ", ".join(file.name for file in files if file.suffix != ".html") + f" in {out}")


def train_model(
    model: str,
    *,
    out: Path | None,
    dataset: str | None,
    data_dir: Path | None,
    epochs: int | None,
    device: str,
    cards: tuple[str, ...],
) -> None:
    """Run the recipe of a card and say where the weights are."""
    from robustbench_cure.classifier import resolve_device
    from robustbench_cure.training.train import load_start, train
    from robustbench_cure.zoo.loading import trained_weights

    card = find(ModelCard, model, cards).card
    place = resolve_device(device)
    target = out or trained_weights(card.id)
    start = load_start(card, cards)
    data = load_dataset(dataset or card.dataset, "train", data_dir)
    with ProgressLine(card.id, "steps") as progress:
        result = train(
            card,
            data,
            start_module=start,
            device=place,
            out_path=target,
            progress=lambda done, total, _: progress(done, total, card.training.method),
            limit_epochs=epochs,
        )
    figures = ", ".join(f"{name} {value:.1f} %" for name, value in result.figures.items())
    click.echo(f"weights: {target}\n{figures}")
