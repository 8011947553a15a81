"""Theorem 1 on a network: bounds from gradient and curvature, beside the distance that DeepFool finds.

Source: CURE paper, section 3 and figure 4. The theorem speaks of a loss that crosses t where the label
changes. Cross-entropy over more than two classes does not; the log-loss of the label against the best other
class, log(1 + exp(-(z_y - max_j z_j))), does at t = log 2, and is what is used here, for images classified
correctly. All in normalised inputs, DeepFool too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.bounds import Bounds, bounds, exact_distance
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import Space
from robustbench_cure.threat import ThreatModel

#: Where the log-loss of two classes changes its label.
THRESHOLD = math.log(2)
#: Of DeepFool, to cross the boundary; the theorem's bounds are of the way to it.
OVERSHOOT = 0.02


class TwoClass:
    """A `Space` whose loss is the log-loss of the label against the best other class."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.network: Classifier = space.network

    def losses(self, u: Tensor, y: Tensor) -> Tensor:
        """log(1 + exp(-J)) of each row, J the margin."""
        return functional.softplus(-margins(self.network.logits(u), y))

    def gradients(self, u: Tensor, y: Tensor) -> Tensor:
        """Gradients of `losses`, shape of ``u``."""
        return self.network.value_and_gradient(u, lambda z: functional.softplus(-margins(z, y)))[1]


@dataclass(frozen=True)
class TheoremRows:
    """What the theorem says of every row, and what DeepFool found.

    Attributes:
        c: threshold minus loss.
        gradient_norm: of the loss.
        nu: largest eigenvalue of the Hessian.
        along: |gradient . eigenvector|.
        bounds: of the distance.
        quadratic: that distance: the shortest way of the quadratic model itself to the threshold, infinite
            where it never gets there, NaN where the bounds do not apply.
        deepfool: l2 distance DeepFool found, without its overshoot; NaN where it found none.
    """

    c: Tensor
    gradient_norm: Tensor
    nu: Tensor
    along: Tensor
    bounds: Bounds
    quadratic: Tensor
    deepfool: Tensor


def theorem(
    space: Space,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    iterations: int = 30,
    advance: Callable[[int], None] | None = None,
) -> TheoremRows:
    """Evaluate Theorem 1 at inputs that are classified correctly.

    Gradient, curvature and the quadratic model's solution all come from one Krylov space that starts at the
    gradient g: the solution (s I - H)^{-1} g lies in it, and the theorem holds within it row by row.

    Args:
        space: the network and its units.
        u: inputs, float32 (B,C,H,W).
        y: true labels, int64 (B,).
        h: step of the finite differences.
        iterations: of Lanczos.
        advance: told of gradients computed.
    """
    two = TwoClass(space)
    c = THRESHOLD - two.losses(u, y).double().cpu()
    ends = lanczos(two, u, y, h=h, iterations=iterations, start="gradient", advance=advance)
    length = ends.gradient.flatten(1).double().norm(dim=1).cpu()
    along = (ends.gradient.flatten(1).double() * ends.vector.flatten(1)).sum(1).abs().cpu()
    found = deepfool(
        space.network, u, y, threat=ThreatModel.parse("l2", "0"), mode="minimal", clip=False,
        overshoot=OVERSHOOT,
    )  # fmt: skip
    distance = (found.x_adv - u).flatten(1).double().norm(dim=1).cpu() / (1 + OVERSHOOT)
    converged = found.converged.cpu() if found.converged is not None else torch.ones(len(u), dtype=torch.bool)
    limits = bounds(c, length, along, ends.largest)
    return TheoremRows(
        c=c,
        gradient_norm=length,
        nu=ends.largest,
        along=along,
        bounds=limits,
        quadratic=_quadratic(c, length, ends.projected, ~limits.lower.isnan()),
        deepfool=torch.where(converged, distance, torch.nan),
    )


def _quadratic(c: Tensor, length: Tensor, projected: Tensor, applies: Tensor) -> Tensor:
    """Exact distance of each row's quadratic model, whose gradient is the first direction of its space."""
    out = torch.full_like(c, torch.nan)
    for row in applies.nonzero().squeeze(1).tolist():
        slope = torch.zeros(projected.shape[1], dtype=torch.float64)
        slope[0] = length[row]
        out[row] = exact_distance(float(c[row]), slope, projected[row])
    return out
