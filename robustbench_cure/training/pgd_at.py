"""Adversarial training: cross-entropy on linf PGD examples made on the fly.

Source: Madry, Makelov, Schmidt, Tsipras & Vladu 2018, arXiv 1706.06083, section 2.1: the saddle point
problem. The attack sees the network in evaluation mode, so that it neither moves batch-norm statistics
nor depends on the other rows; it returns the last iterate, as training verifies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.protocol.recipes import PGDRecipe
from robustbench_cure.threat import ThreatModel, parse_fraction
from robustbench_cure.training.step import Step, StepContext, evaluation_mode


def pgd_at(model: nn.Module, x: Tensor, y: Tensor, recipe: PGDRecipe, context: StepContext) -> Step:
    """Cross-entropy, in training mode, of the PGD examples of a batch.

    Args:
        model: maps images in [0, 1] to logits.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        recipe: radius, step size and steps of the attack.
        context: random numbers of the start.

    Returns:
        Mean loss on the perturbed images, and no further scalars.
    """
    threat = ThreatModel.parse("linf", recipe.eps)
    step_size = float(parse_fraction(recipe.step_size))
    x_adv = last_iterate(model, x, y, threat, step_size, recipe.steps, context.uniform(x))
    return functional.cross_entropy(model(x_adv), y), {}


def last_iterate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    step_size: float,
    steps: int,
    start: Tensor,
) -> Tensor:
    """Plain PGD to its last iterate.

    Args:
        model: maps images in [0, 1] to logits; attacked in evaluation mode.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        threat: the ball.
        step_size: in units of x.
        steps: iterations.
        start: numbers in [0, 1), shape of ``x``: the place in the linf ball to start from.

    Returns:
        Images of the ball and the box, shape of ``x``.
    """
    x_adv = threat.project(x, x + (2 * start - 1) * threat.radius)
    with evaluation_mode(model, frozen=True), torch.enable_grad():
        for _ in range(steps):
            leaf = x_adv.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(odds_against(model(leaf).float(), y).sum(), leaf)
            x_adv = threat.project(x, x_adv + step_size * threat.steepest(gradient))
    return x_adv.detach()
