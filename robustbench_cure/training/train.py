"""Run the training recipe of a model card: from its start to a weights file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from robustbench_cure.adapt import Normalised
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.training.loop import Progress, Trainer
from robustbench_cure.training.monitor import SCALES
from robustbench_cure.training.output import (
    LogWriter,
    checkpoint_path,
    in_half_precision,
    load_checkpoint,
    portable_state,
    save_checkpoint,
    save_weights,
)
from robustbench_cure.training.parallel import World
from robustbench_cure.training.result import TrainingResult
from robustbench_cure.zoo.loading import build_from_card, load_card_module


class TrainingSet(Protocol):
    """Images and labels; an `EvalSet` of the split "train" is one."""

    @property
    def images(self) -> Tensor:
        """float32 (N,C,H,W) in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """True labels of the images, int64 (N,)."""

    @property
    def digest(self) -> str:
        """SHA-256 of what it holds, hex: a checkpoint goes on with the same data alone."""


def load_start(
    card: ModelCard, extra: tuple[str, ...] = (), weights: Path | None = None
) -> tuple[Normalised | None, str]:
    """The trained network that a recipe starts from, and the SHA-256 of its weights; None and "" at random.

    Args:
        card: the model to be trained.
        extra: card directories given with ``--cards``.
        weights: a file to use instead of the start's own weights.

    Raises:
        UsageError: the start has no card, or no weights yet.
    """
    if not card.training.start:
        if weights is not None:
            raise UsageError(f"model {card.id!r} starts from random weights: --start has no use")
        return None, ""
    return load_card_module(find(ModelCard, card.training.start, extra), weights)


def train(
    card: ModelCard,
    data: TrainingSet,
    *,
    start_module: Normalised | None,
    device: str | torch.device = "cpu",
    out_path: Path | None = None,
    progress: Progress | None = None,
    limit_epochs: int | None = None,
    resume: bool = False,
    stop: Callable[[], str] = lambda: "",
    world: World | None = None,
    steps_per_epoch: int | None = None,
    half: bool = False,
) -> TrainingResult:
    """Train the network of a card by its recipe.

    At the end weights are written to ``out_path``, and until then a checkpoint beside it, after every epoch
    and every five minutes, under ``<stem>.checkpoint.pt``; ``<stem>.csv`` and, with TensorBoard installed,
    ``<stem>.tensorboard/`` hold the log. A run that goes on from a checkpoint ends with the bytes of one that
    was never stopped, on the same machine and thread count (on a CPU).

    Args:
        card: the model.
        data: training images; the last tenth of a seeded permutation is held out for the log.
        start_module: what `load_start` returned.
        device: where to train.
        out_path: a .safetensors file; None writes nothing.
        progress: called after every step.
        limit_epochs: stop after so many epochs; the learning-rate schedule is shortened with them.
        resume: go on from the checkpoint, if there is one.
        stop: asked before every step; a reason to stop, or nothing.
        world: the processes that train together; the first of them writes.
        steps_per_epoch: fewer steps an epoch than the data give.
        half: hand back and store the weights in half precision; loading them makes them float32 again.

    Returns:
        The network as it is at the end, or where the run was stopped.

    Raises:
        UsageError: data, start or output do not fit the card; a checkpoint is there and ``resume`` is not.
        RunError: the loss became infinite or NaN, or memory ran out; the last checkpoint stays.
    """
    recipe, world = card.training, world or World()
    images = data.pixels if isinstance(data, EvalSet) else data.images
    _check(card, images, data.labels, out_path)
    epochs = min(recipe.epochs, limit_epochs or recipe.epochs)
    if recipe.batch_size % world.size:
        raise UsageError(f"a batch of {recipe.batch_size} cannot be shared by {world.size} processes")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = _initial(card, start_module).to(device)
    world.adapt(model, torch.device(device))
    identity = {
        "recipe": recipe.digest,
        "data": data.digest,
        "number of epochs": str(epochs),
        "steps per epoch": str(steps_per_epoch),
        "architecture": f"{card.architecture} {sorted(card.architecture_args.items())}",
    }
    saved = _checkpoint(out_path, resume, identity)
    trainer = Trainer(
        model,
        recipe,
        images,
        data.labels,
        num_classes=card.num_classes,
        scale=SCALES[card.dataset],
        epochs=epochs,
        world=world,
        steps_per_epoch=steps_per_epoch,
    )
    if saved is not None:
        trainer.restore(saved)
    reason = _run(trainer, out_path, identity, stop, progress)
    state, digest = portable_state(trainer.result.net), ""
    if half and not reason:
        state = in_half_precision(state)
    if out_path is not None and not reason and world.rank == 0:
        digest = save_weights(state, out_path, recipe.model_dump_json(exclude_defaults=True))
        checkpoint_path(out_path).unlink(missing_ok=True)
    last = trainer.log[-1] if trainer.log else None
    figures = {"held_out_clean": 100 * last.clean, "held_out_pgd": 100 * last.pgd} if last else {}
    return TrainingResult(
        state_dict=state,
        log=trainer.log,
        figures=figures,
        seed=recipe.seed,
        recipe_digest=recipe.digest,
        sha256=digest,
        stopped=reason,
        step=trainer.iteration,
        steps=trainer.total,
        batch_parts=trainer.parts,
    )


def _run(
    trainer: Trainer,
    out_path: Path | None,
    identity: dict[str, str],
    stop: Callable[[], str],
    progress: Progress | None,
) -> str:
    """Train, with checkpoints and a log where there is a place for them; why it stopped, or nothing."""
    if out_path is None or trainer.world.rank > 0:
        return trainer.run(stop=stop, checkpoint=lambda: None, progress=progress)
    place = checkpoint_path(out_path)
    writer = LogWriter(out_path, trainer.log)

    def write() -> None:
        for row in trainer.log[len(writer.rows) :]:
            writer.add(row)
        save_checkpoint(place, identity, trainer.state())

    try:
        return trainer.run(stop=stop, checkpoint=write, progress=progress)
    except RunError as error:
        if place.is_file():
            raise RunError(f"{error}; the last good state is kept in {place}") from None
        raise
    finally:
        writer.close()


def _checkpoint(out_path: Path | None, resume: bool, identity: dict[str, str]) -> dict[str, Any] | None:
    """The state to go on from, or nothing."""
    if out_path is None or not checkpoint_path(out_path).is_file():
        return None
    place = checkpoint_path(out_path)
    if not resume:
        raise UsageError(f"{place}: a run was stopped here: go on with --resume, or delete the file")
    return load_checkpoint(place, identity)


def _check(card: ModelCard, images: Tensor, labels: Tensor, out_path: Path | None) -> None:
    shape = tuple(images.shape[1:])
    if shape != card.input_shape:
        raise UsageError(f"model {card.id!r} takes images of shape {card.input_shape}, the data have {shape}")
    if len(images) < 2:
        raise UsageError(f"training needs at least 2 images, there are {len(images)}")
    low, high = int(labels.min()), int(labels.max())
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
