"""What the log says of a network after an epoch, on held-out training images: accuracy and curvature.

Source of the curvatures: CURE paper, figure 10 (||Hz|| and the Frobenius norm ||H||_F of the Hessian of the
loss with respect to the normalised input, here by finite differences of step h):

    ||Hz||     mean over images of ||grad l(u + hz) - grad l(u)|| / h,  z = sign(grad l(u)) of unit length
    ||H||_F    mean over images of sqrt( d mean_v ||Hv||^2 ),  v uniform on the unit sphere of R^d
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.adapt import Normalised
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.classifier import full_precision
from robustbench_cure.protocol.defaults import DEFAULTS
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training.cure import curvature_penalty, in_space
from robustbench_cure.training.pgd_at import last_iterate
from robustbench_cure.training.step import evaluation_mode

#: Images whose accuracy, and whose curvature, is measured; directions of the Frobenius norm.
IMAGES, CURVED, DIRECTIONS = 500, 100, 10
#: Steps of the monitoring PGD; its step size is a quarter of the radius.
STEPS = 10
#: Images in one pass.
BATCH = 128


@dataclass(frozen=True)
class Scale:
    """How far the monitor looks.

    Args:
        threat: ball of the PGD, in pixels.
        h: step of the finite differences, in normalised units.
    """

    threat: ThreatModel
    h: float


#: Data set -> the radius of its published robustness table, and the step of its curvature profiles.
SCALES = {name: Scale(ThreatModel("linf", own.eps), own.difference_step) for name, own in DEFAULTS.items()}


@dataclass(frozen=True)
class Figures:
    """Accuracies in [0, 1]; curvatures in units of loss per squared normalised input."""

    clean: float
    pgd: float
    hz: float
    frobenius: float


def measure(model: Normalised, x: Tensor, y: Tensor, scale: Scale, seed: int) -> Figures:
    """Measure with the same random numbers every time, in evaluation mode and float32.

    Args:
        model: the network.
        x: held-out images, float32 (N,C,H,W) in [0, 1], on the model's device.
        y: labels, int64 (N,).
        scale: radius and step.
        seed: of the PGD's starts and of the directions.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    clean = robust = 0
    hz, squares = [], []
    with evaluation_mode(model), full_precision():
        for part, label in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            start = torch.rand(part.shape, generator=generator, device=x.device)
            x_adv = last_iterate(model, part, label, scale.threat, scale.threat.radius / 4, STEPS, start)
            with torch.no_grad():
                clean += int((model(part).argmax(1) == label).sum())
                robust += int((model(x_adv).argmax(1) == label).sum())
        network, inputs = in_space(model, x[:CURVED], "norm")
        for part, label in zip(torch.split(inputs, BATCH), torch.split(y[:CURVED], BATCH), strict=True):

            def loss(u: Tensor, label: Tensor = label) -> Tensor:
                return cross_entropy(network(u), label)

            _, parts = curvature_penalty(loss, part, scale.h, 1)
            hz.append(parts.norms.detach() / scale.h)
            here = _gradient(loss, part)
            total = torch.zeros(len(part), device=x.device)
            for _ in range(DIRECTIONS):
                v = torch.randn(part.shape, generator=generator, device=x.device)
                v /= v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                difference = (_gradient(loss, part + scale.h * v) - here) / scale.h
                total += difference.flatten(1).square().sum(1)
            squares.append(total / DIRECTIONS)
    d = math.prod(x.shape[1:])
    return Figures(
        clean=clean / len(x),
        pgd=robust / len(x),
        hz=float(torch.cat(hz).mean()),
        frobenius=float((d * torch.cat(squares)).sqrt().mean()),
    )


def _gradient(loss, u: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    with torch.enable_grad():
        leaf = u.detach().requires_grad_(True)
        gradient: Tensor = torch.autograd.grad(loss(leaf).sum(), leaf)[0]
    return gradient
