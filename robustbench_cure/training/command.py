"""`cure-bench train`: a card's recipe, its data, its start and its output put together."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.classifier import resolve_device
from robustbench_cure.datasets import EvalSet, load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.files import write_atomically
from robustbench_cure.progress import ProgressLine
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import catalog, find
from robustbench_cure.training.parallel import world
from robustbench_cure.training.result import TrainingResult
from robustbench_cure.training.stopping import Stopper, seconds
from robustbench_cure.training.train import load_start, train
from robustbench_cure.zoo.loading import build_from_card, trained_weights

#: What a smoke run does: enough that a ramp has begun and an epoch ends.
SMOKE_IMAGES, SMOKE_BATCH, SMOKE_STEPS = 64, 8, 3


def train_model(
    model: str | None,
    *,
    out: Path | None,
    start: Path | None,
    dataset: str | None,
    data_dir: Path | None,
    n: int | None,
    epochs: int | None,
    resume: bool,
    time_budget: str | None,
    smoke: bool,
    half: bool,
    device: str,
    cards: tuple[str, ...],
) -> None:
    """Run the recipe of a card and say where the weights are and how they are used.

    Raises:
        UsageError: anything wrong with the request, before the first step.
        RunError: the loss became NaN, or memory ran out.
    """
    budget = seconds(time_budget) if time_budget else None
    if smoke:
        _smoke([model] if model else sorted(catalog(ModelCard, cards)), device, cards)
        return
    if model is None:
        raise UsageError("name a model to train; `cure-bench list models` shows them")
    card = find(ModelCard, model, cards).card
    target = out or trained_weights(card.id)
    start_module, start_digest = load_start(card, cards, start)
    data = load_dataset(dataset or card.dataset, "train", data_dir)
    if n is not None:
        data = data.subset(n)
    with (
        world(resolve_device(device)) as (processes, place),
        Stopper(budget) as stopper,
        ProgressLine(card.id, "steps", silent=processes.rank > 0) as progress,
    ):
        result = train(
            card,
            data,
            start_module=start_module,
            device=place,
            out_path=target,
            progress=lambda done, total, _: progress(done, total, card.training.method),
            limit_epochs=epochs,
            resume=resume,
            stop=stopper,
            world=processes,
            half=half,
        )
    if processes.rank > 0:
        return
    if result.batch_parts > 1:
        click.echo(f"memory was short: every batch went through in {result.batch_parts} parts", err=True)
    if result.stopped:
        click.echo(
            f"stopped by {result.stopped} after {result.step} of {result.steps} steps; "
            "the same command with --resume goes on"
        )
        return
    _provenance(card, data, result, start_digest, target, place)
    figures = ", ".join(f"{name} {value:.1f} %" for name, value in result.figures.items())
    click.echo(f"weights: {target}\n{figures}")
    extra = "".join(f" --cards {shlex.quote(folder)}" for folder in cards)
    if out is None and card.weights is None:
        click.echo(f"`cure-bench evaluate --model {card.id}{extra}` finds them there")
    else:
        given = f"--weights {shlex.quote(str(target))}"
        click.echo(f"to judge them: cure-bench evaluate --model {card.id} {given}{extra}")


def _provenance(
    card: ModelCard,
    data: EvalSet,
    result: TrainingResult,
    start_digest: str,
    target: Path,
    device: torch.device,
) -> None:
    """Write ``<stem>.json``: how the weights came about."""
    recipe = card.training
    content = {
        "model": card.id,
        "architecture": card.architecture,
        "architecture_args": dict(card.architecture_args),
        "weights": {"file": target.name, "sha256": result.sha256},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "start": {"model": recipe.start, "sha256": start_digest},
        "data": {"name": data.name, "notes": data.notes, "n": len(data), "digest": data.digest},
        "epochs": len(result.log),
        "steps": result.steps,
        "seconds": round(sum(row.seconds for row in result.log), 1),
        "seed": result.seed,
        "figures": {name: round(value, 2) for name, value in result.figures.items()},
        "environment": environment(device).model_dump(mode="json"),
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(target.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))


# --- smoke runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmokeSet:
    """Digits, enlarged to a network's input: real images that every machine has."""

    images: Tensor
    labels: Tensor
    digest: str = "smoke"


def smoke_set(card: ModelCard) -> SmokeSet:
    """The first images of the digits, in the shape and with labels that a card's network takes."""
    digits = load_dataset("digits", "train").take(range(SMOKE_IMAGES))
    channels, height, width = card.input_shape
    images = functional.interpolate(digits.images, (height, width)).expand(-1, channels, -1, -1)
    return SmokeSet(images.contiguous(), digits.labels % card.num_classes)


def _smoke(models: list[str], device: str, cards: tuple[str, ...]) -> None:
    place = resolve_device(device)
    for model in models:
        card = find(ModelCard, model, cards).card
        small = card.training.model_copy(update={"batch_size": min(card.training.batch_size, SMOKE_BATCH)})
        card = card.model_copy(update={"training": small})
        start = build_from_card(card) if small.start else None  # what is tried is the recipe, not the result
        result = train(
            card,
            smoke_set(card),
            start_module=start,
            device=place,
            limit_epochs=1,
            steps_per_epoch=SMOKE_STEPS,
        )
        row = result.log[-1]
        click.echo(
            f"{card.id}: {small.method}, {result.step} steps of {small.batch_size}, "
            f"loss {row.loss:.3f}, {row.seconds:.1f} s"
        )
