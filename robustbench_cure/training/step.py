"""What one training step knows besides its batch, and the modes a network passes through in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: What a method returns: the loss to minimise (a scalar), and scalars for the log.
Step: TypeAlias = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class StepContext:
    """Where in the run a step is, and which rows of its batch are worked on.

    A batch may be cut into parts, over processes or where memory is short. Random numbers are drawn for
    the whole batch in every part, so that the parts together do what the whole would have done.

    Args:
        iteration: optimiser steps made before this one, from 0.
        iterations_per_epoch: optimiser steps in one epoch.
        num_classes: number of logits.
        generator: random numbers of this run.
        batch_size: rows of the whole batch; 0: the part is the whole.
        rows: this part of the batch.
    """

    iteration: int
    iterations_per_epoch: int
    num_classes: int
    generator: torch.Generator
    batch_size: int = 0
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def epoch(self) -> int:
        """Number of epochs finished so far, from 0."""
        return self.iteration // self.iterations_per_epoch

    def uniform(self, x: Tensor) -> Tensor:
        """Numbers in [0, 1), one for each value of this part ``x``; shape, dtype and device of ``x``."""
        whole = (self.batch_size or len(x), *x.shape[1:])
        draw = torch.rand(whole, generator=self.generator, device=self.generator.device, dtype=x.dtype)
        return draw[self.rows].to(x.device)


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
