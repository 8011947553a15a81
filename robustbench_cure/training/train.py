"""Run the training recipe of a model card: from its start to a weights file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from robustbench_cure.cards import ModelCard
from robustbench_cure.catalog import find
from robustbench_cure.classifier import Normalised
from robustbench_cure.errors import UsageError
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training.loop import Progress, run
from robustbench_cure.training.result import EpochRow, TrainingResult, portable_state, save_weights
from robustbench_cure.zoo.loading import build_from_card, load_card_module

#: Data set -> radius of the linf PGD in the log: the radius of the set's published robustness table.
MONITOR_EPS: dict[str, str] = {"digits": "51/255", "cifar10": "8/255", "svhn": "12/255"}


class TrainingSet(Protocol):
    """Images and labels; an `EvalSet` of the split "train" is one."""

    @property
    def images(self) -> Tensor:
        """float32 (N,C,H,W) in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""


def load_start(card: ModelCard, extra: tuple[str, ...] = ()) -> Normalised | None:
    """The trained network that a recipe starts from, or None where it starts at random.

    Args:
        card: the model to be trained.
        extra: card directories given with ``--cards``.

    Raises:
        UsageError: the start has no card, or no weights yet.
    """
    if not card.training.start:
        return None
    module, _ = load_card_module(find(ModelCard, card.training.start, extra))
    return module


def train(
    card: ModelCard,
    data: TrainingSet,
    *,
    start_module: Normalised | None,
    device: str | torch.device = "cpu",
    out_path: Path | None = None,
    progress: Progress | None = None,
    limit_epochs: int | None = None,
) -> TrainingResult:
    """Train the network of a card by its recipe.

    Weights are written to ``out_path`` at the end; during training the newest lie beside it under
    ``<name>.partial.safetensors``, so that a broken run leaves something and is not mistaken for a whole
    one. Two runs on the same machine and thread count give the same bytes on a CPU.

    Args:
        card: the model.
        data: training images; the last tenth of a seeded permutation is held out for the log.
        start_module: what `load_start` returned.
        device: where to train.
        out_path: a .safetensors file; None writes nothing.
        progress: called after every step.
        limit_epochs: stop after so many epochs; the learning-rate schedule is shortened with them.

    Raises:
        UsageError: data, start or output do not fit the card.
        RunError: the loss became infinite or NaN.
    """
    recipe = card.training
    _check(card, data, out_path)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = _initial(card, start_module).to(device)
    text = recipe.model_dump_json()

    def checkpoint(_: EpochRow) -> None:
        if out_path is not None:
            save_weights(portable_state(model.net), _partial(out_path), text)

    log = run(
        model,
        recipe,
        data.images,
        data.labels,
        num_classes=card.num_classes,
        monitor=ThreatModel.parse("linf", MONITOR_EPS[card.dataset]),
        epochs=min(recipe.epochs, limit_epochs or recipe.epochs),
        on_epoch=checkpoint,
        progress=progress,
    )
    state, digest = portable_state(model.net), ""
    if out_path is not None:
        digest = save_weights(state, out_path, text)
        _partial(out_path).unlink(missing_ok=True)
    figures = {"held_out_clean": 100 * log[-1].clean, "held_out_pgd": 100 * log[-1].pgd}
    return TrainingResult(state, log, figures, recipe.seed, recipe.digest, digest)


def _partial(out_path: Path) -> Path:
    return out_path.with_suffix(".partial.safetensors")


def _check(card: ModelCard, data: TrainingSet, out_path: Path | None) -> None:
    shape = tuple(data.images.shape[1:])
    if shape != card.input_shape:
        raise UsageError(f"model {card.id!r} takes images of shape {card.input_shape}, the data have {shape}")
    if len(data.images) < 2:
        raise UsageError(f"training needs at least 2 images, there are {len(data.images)}")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= card.num_classes:
        raise UsageError(f"labels run from {low} to {high}, model {card.id!r} has {card.num_classes} classes")
    if out_path is not None and out_path.suffix != ".safetensors":
        raise UsageError(f"{out_path}: weights are written as .safetensors")


def _initial(card: ModelCard, start: Normalised | None) -> Normalised:
    if card.training.start and start is None:
        raise UsageError(
            f"model {card.id!r} is trained from the weights of {card.training.start!r}: give them"
        )
    model = build_from_card(card)
    if start is not None:
        try:
            model.net.load_state_dict(start.net.state_dict(), strict=True)
        except RuntimeError:
            raise UsageError(
                f"model {card.id!r} cannot start from {card.training.start!r}: the architectures differ"
            ) from None
    return model
