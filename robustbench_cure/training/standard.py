"""Normal training: cross-entropy on clean images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure.protocol.recipes import AnyRecipe
from robustbench_cure.training.step import Step, StepContext


def standard(model: nn.Module, x: Tensor, y: Tensor, recipe: AnyRecipe, context: StepContext) -> Step:
    """Cross-entropy of a batch in training mode.

    Args:
        model: maps images in [0, 1] to logits.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        recipe: unused beyond what the loop reads.
        context: unused.

    Returns:
        Mean loss, and no further scalars.
    """
    del recipe, context
    return functional.cross_entropy(model(x), y), {}
