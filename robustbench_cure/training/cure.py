"""CURE: training that penalises the curvature of the loss along a direction of high curvature.

Source: Moosavi-Dezfooli, Fawzi, Uesato & Frossard 2019, arXiv 1811.09716, section 4; thesis Eq. 8.5-8.7.

    z   = sign(g) / ||sign(g)||_2 ,   g = grad l(x)
    L_r = || grad l(x + h z) - grad l(x) ||_2^2
    minimise over the weights    l + gamma L_r

l is the loss of one sample: gradients are taken of the batch's sum, and L_r is averaged over the batch.
h rises linearly from 0 over the first epochs, iteration by iteration; 1/h^2 stays absorbed in gamma.

What the paper leaves open is in the recipe: the units of h (`h_space`: normalised inputs or pixels), the
power of the norm (2 as printed, 1 as in the authors' code), and the batch-norm mode of the regulariser
(evaluation mode keeps rows independent, and it is the deployed function whose curvature counts).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure.adapt import Normalised
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.recipes import CureRecipe
from robustbench_cure.training.step import Step, StepContext, evaluation_mode


@dataclass(frozen=True)
class CurvatureParts:
    """What `curvature_penalty` averaged, row by row.

    Attributes:
        direction: z, unit l2 length or zero, shape of the input.
        difference: grad l(u + h z) - grad l(u), shape of the input.
        norms: l2 norm of the difference, shape (B,).
    """

    direction: Tensor
    difference: Tensor
    norms: Tensor


def curvature_penalty(
    loss_of_input: Callable[[Tensor], Tensor], u: Tensor, h: float, power: int, direction: str = "sign"
) -> tuple[Tensor, CurvatureParts]:
    """The regulariser R = mean_b ||grad l(u_b + h z_b) - grad l(u_b)||_2^power.

    Args:
        loss_of_input: inputs (B, ...) -> loss of each row (B,); rows must not influence each other.
        u: inputs, float32 (B, ...).
        h: step length, in units of ``u``.
        power: 1 or 2.
        direction: z along the ``sign`` of the gradient or along the ``gradient``.

    Returns:
        R, a scalar that can be differentiated by the weights (two backward passes deep), and its parts.
        Rows whose gradient is zero have direction, difference and contribution zero.

    Guarantees: for l(u) = u'Au/2 + b'u and power 2, R = h^2 ||Az||^2.
    """
    with torch.enable_grad():
        here = u.detach().requires_grad_(True)
        gradient = _input_gradient(loss_of_input, here)
        z = _unit(gradient.detach().sign() if direction == "sign" else gradient.detach())
        there = (u.detach() + h * z).requires_grad_(True)
        difference = _input_gradient(loss_of_input, there) - gradient
        squares = difference.flatten(1).square().sum(1)
        zero = squares == 0  # the root's slope is infinite there
        norms = squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
        penalty = (squares if power == 2 else norms).mean()
    return penalty, CurvatureParts(z, difference, norms)


def cure(model: Normalised, x: Tensor, y: Tensor, recipe: CureRecipe, context: StepContext) -> Step:
    """Cross-entropy in training mode plus the weighted curvature penalty.

    Args:
        model: a network behind its normalisation.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        recipe: gamma phases, h and its ramp, power, space and batch-norm mode.
        context: place in the run.

    Returns:
        Loss, and the scalars ``ce`` and ``regulariser`` (R before gamma; absent while h is zero).
    """
    ce = functional.cross_entropy(model(x), y)
    h = step_length(recipe, context.iteration, context.iterations_per_epoch)
    if h == 0:
        return ce, {"ce": ce.detach()}
    network, u = in_space(model, x, recipe.h_space)

    def loss_of_input(inputs: Tensor) -> Tensor:
        return cross_entropy(network(inputs).float(), y)

    mode = evaluation_mode(model) if recipe.batchnorm == "eval" else nullcontext()
    reduced = recipe.regulariser_precision == "bf16"  # differences of gradients need the digits
    with (
        mode,
        torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=reduced, cache_enabled=False),
    ):
        penalty, _ = curvature_penalty(loss_of_input, u, h, recipe.reg_power, recipe.direction)
    loss = ce + gamma_at(recipe, context.epoch) * penalty
    return loss, {"ce": ce.detach(), "regulariser": penalty.detach()}


def step_length(recipe: CureRecipe, iteration: int, iterations_per_epoch: int) -> float:
    """Step h at one iteration: linear from 0 over the ramp, then constant; without a ramp always constant."""
    if recipe.h_ramp_epochs == 0:
        return recipe.h
    return recipe.h * min(1.0, iteration / (recipe.h_ramp_epochs * iterations_per_epoch))


def gamma_at(recipe: CureRecipe, epoch: int) -> float:
    """Weight gamma in an epoch counted from 0; the last phase goes on for ever."""
    for phase in recipe.gamma:
        epoch -= phase.epochs
        if epoch < 0:
            break
    return phase.gamma


def _input_gradient(loss_of_input: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    gradient: Tensor = torch.autograd.grad(loss_of_input(u).sum(), u, create_graph=True)[0]
    return gradient


def _unit(vectors: Tensor) -> Tensor:
    """Rows of unit l2 length; a row of zeros stays."""
    length = vectors.flatten(1).norm(dim=1).view(-1, *[1] * (vectors.dim() - 1))
    unit: Tensor = vectors / length.masked_fill(length == 0, 1.0)
    return unit


def in_space(model: Normalised, x: Tensor, space: str) -> tuple[nn.Module, Tensor]:
    """The network and its inputs in normalised units (``norm``) or in pixels (``px01``)."""
    if space == "px01":
        return model, x
    if not isinstance(model, Normalised):
        raise UsageError('h_space "norm" needs a network behind its own input normalisation')
    return model.net, (x - model.mean) / model.std
