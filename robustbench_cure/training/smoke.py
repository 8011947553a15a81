"""Smoke runs: a few steps of a recipe on images that every machine has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.datasets import load_dataset
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.training.train import train
from robustbench_cure.zoo.loading import build_from_card

#: What a smoke run does: enough that a ramp has begun and an epoch ends.
SMOKE_IMAGES, SMOKE_BATCH, SMOKE_STEPS = 64, 8, 3


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


def smoke_run(card: ModelCard, device: torch.device) -> str:
    """Try a card's recipe from random weights, keep nothing, and say in a line how it went."""
    small = card.training.model_copy(update={"batch_size": min(card.training.batch_size, SMOKE_BATCH)})
    card = card.model_copy(update={"training": small})
    start = build_from_card(card) if small.start else None  # what is tried is the recipe, not the result
    result = train(
        card,
        smoke_set(card),
        start_module=start,
        device=device,
        limit_epochs=1,
        steps_per_epoch=SMOKE_STEPS,
    )
    row = result.log[-1]
    return (
        f"{card.id}: {small.method}, {result.step} steps of {small.batch_size}, loss {row.loss:.3f}, "
        f"{row.seconds:.1f} s"
    )
