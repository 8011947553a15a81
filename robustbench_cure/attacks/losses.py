"""Losses an attack increases, and the margin by which success is judged. All per sample, shape (B,)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

#: (logits (B, L), labels (B,)) -> loss (B,), to be increased.
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """J = z_y - max_{j != y} z_j, shape (B,): negative where the label is lost, zero on the boundary."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return own - others


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini & Wagner 2017): does not saturate."""
    return -margins(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference-of-logits ratio (Croce & Hein 2020, arXiv 2003.01690, Eq. 4).

    -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)): invariant to shift and scale of the logits.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return -margins(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
