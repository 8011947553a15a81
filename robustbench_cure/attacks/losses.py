"""Losses an attack increases, and what counts as misclassified. All per sample, shape (B,).

Cross-entropy is written as log(1 + exp(odds)), odds = log((1 - p_y) / p_y). The usual gradient, softmax minus
one-hot, loses the label's own part in float32 where p_y is within 1e-7 of 1: what is left is rounding, points
elsewhere, and raises robust accuracy of confident networks. The two are equal in exact arithmetic.

`LOSSES` make a row lose its label, to whichever class; `TARGETED_LOSSES` make it take another one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.protocol.identity import NO_ANSWER


class Loss(Protocol):
    """A loss that attacks increase: logits (B, L) and labels (B,) to losses (B,)."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits, float (B, L), and labels, int64 (B,), to losses (B,)."""
        ...


class TargetedLoss(Protocol):
    """A loss that attacks increase to have each row take one other class."""

    def __call__(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Logits, float (B, L), labels and target classes, int64 (B,), to losses (B,)."""
        ...


def predictions(logits: Tensor) -> Tensor:
    """Label of the largest logit, the first of equals, int64 (B,); `NO_ANSWER` where one is not finite."""
    return logits.argmax(1).masked_fill(~logits.isfinite().all(1), NO_ANSWER)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """What counts as success of an attack, for attacks and evaluator alike; bool (B,)."""
    return predictions(logits) != labels


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """J = z_y - max_{j != y} z_j, shape (B,): negative where the label is lost, zero on the boundary.

    Minus infinity where a logit is not finite: such a row has lost its label, see `misclassified`.
    """
    return (-margin(logits, labels)).masked_fill(~logits.isfinite().all(1), -torch.inf)


def odds_against(logits: Tensor, labels: Tensor) -> Tensor:
    """log((1 - p_y) / p_y), p = softmax(z): what attacks on cross-entropy increase.

    Steepest where cross-entropy is, and its gradient does not vanish, however confident the row.

    Args:
        logits: float (B, L), L at least 2.
        labels: int64 (B,).
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - own


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y, where its value matters; arguments as those of `odds_against`."""
    return functional.softplus(odds_against(logits, labels))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini & Wagner 2017): does not saturate."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference-of-logits ratio (Croce & Hein 2020, arXiv 2003.01690, Eq. 4).

    -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)): invariant to shift and scale of the logits.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def log_probability_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + max_{j != y} p_j - p_y), p = softmax(z): the logarithm of one plus the probability margin.

    Source: Xie, Zheng, Huang, Ye & Ma 2025 (CVPR, PMA), arXiv 2411.15210, for the margin p_j - p_y itself.
    The logarithm leaves the order of values and the steepest direction as they are. It is written
    log(1 - p_y) + log(1 + s_j), where s_j is the largest probability among the other classes alone, as
    1 + p_j - p_y = (1 - p_y) (1 + s_j). In float32 the margin itself is -1 for every confident row, and its
    gradient is zero; this form follows the odds as far as they go.

    Args:
        logits: float (B, L), L at least 2.
        labels: int64 (B,).

    Returns:
        Losses (B,), positive where another class is more probable than the label.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    share = (others.amax(1) - others.logsumexp(1)).exp()
    return functional.logsigmoid(odds_against(logits, labels)) + share.log1p()


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """z_t - z_y: positive where the target has the larger logit; arguments as those of `TargetedLoss`."""
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.gather(1, labels[:, None]).squeeze(1)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio (Croce & Hein 2020, arXiv 2003.01690, Eq. 7).

    (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2); arguments as those of `TargetedLoss`.

    Raises:
        ValueError: fewer than four classes.
    """
    if logits.shape[1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, the model has {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    return targeted_margin(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


LOSSES: dict[str, Loss] = {
    "ce": odds_against,
    "margin": margin,
    "dlr": dlr,
    "pm": log_probability_margin,
}
TARGETED_LOSSES: dict[str, TargetedLoss] = {"margin": targeted_margin, "dlr": targeted_dlr}
