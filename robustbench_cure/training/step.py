"""What one training step knows besides its batch, and the modes a network passes through in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: What a method returns: the loss to minimise (a scalar), and scalars for the log.
Step: TypeAlias = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class StepContext:
    """Where in the run a step is.

    Args:
        iteration: optimiser steps made before this one, from 0.
        iterations_per_epoch: optimiser steps in one epoch.
        num_classes: number of logits.
        generator: random numbers of this run, on the batch's device.
    """

    iteration: int
    iterations_per_epoch: int
    num_classes: int
    generator: torch.Generator

    @property
    def epoch(self) -> int:
        """Epochs finished, from 0."""
        return self.iteration // self.iterations_per_epoch


@contextmanager
def evaluation_mode(model: nn.Module, frozen: bool = False) -> Iterator[None]:
    """Evaluation mode, every submodule's own mode restored on leaving.

    Args:
        model: the network being trained.
        frozen: also withhold gradients from the parameters, for attacks: their backward passes are cheaper.
    """
    modes = [(part, part.training) for part in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    if frozen:
        model.requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
