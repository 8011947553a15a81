"""What training hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class EpochRow:
    """One line of the training log; rates lie in [0, 1].

    Attributes:
        epoch: from 1.
        lr: learning rate of the epoch's last step.
        loss: mean of the minimised loss.
        regulariser: mean of the unweighted regulariser over the steps that had one; 0 without.
        seconds: of training alone.
        clean: accuracy on the held-out images.
        pgd: accuracy on them under the monitoring attack.
        hz: length of the Hessian times the sign of the gradient, see `monitor`.
        frobenius: Frobenius norm of the Hessian.
    """

    epoch: int
    lr: float
    loss: float
    regulariser: float
    seconds: float
    clean: float
    pgd: float
    hz: float
    frobenius: float


@dataclass(frozen=True)
class TrainingResult:
    """A trained network and how it came about, or how far it got.

    Attributes:
        state_dict: of the bare network (without the input normalisation), contiguous, on the CPU.
        log: one row an epoch.
        figures: per cent, by name, on the held-out images: ``held_out_clean`` and ``held_out_pgd``.
        seed: of the recipe.
        recipe_digest: of the recipe, hex.
        sha256: of the weights file, hex; empty if none was written.
        stopped: why the run stopped before its end; empty: it did not.
        step: optimiser steps made, since the run's first.
        steps: optimiser steps of the whole run.
        batch_parts: pieces a batch was cut into because memory ran out; 1: it never did.
    """

    state_dict: dict[str, Tensor]
    log: list[EpochRow]
    figures: dict[str, float]
    seed: int
    recipe_digest: str
    sha256: str = field(default="")
    stopped: str = ""
    step: int = 0
    steps: int = 0
    batch_parts: int = 1
