"""How far the nearest misclassification is when the loss is quadratic: the bounds of the CURE paper.

Source: CURE paper, Theorem 1 and Eq. 2-3 (thesis, Theorem 5, Eq. 8.2-8.4). For the quadratic model
l(x + r) = l(x) + g.r + r'Hr/2, a threshold t, c = t - l(x) >= 0, nu = largest eigenvalue >= 0 with unit
eigenvector v, the shortest r with l >= t obeys

    lower = (||g|| / nu) (sqrt(1 + 2 nu c / ||g||^2) - 1)  >=  c / ||g|| - 2 nu c^2 / ||g||^3
    upper = (|g.v| / nu) (sqrt(1 + 2 nu c / (g.v)^2) - 1)  <=  c / |g.v|

Evaluated as 2c / (a (1 + sqrt(1 + 2 nu c / a^2))), which loses no digits for small nu.

On a network (CURE paper, section 3 and figure 4) the bounds stand next to the distance that DeepFool finds.
The theorem speaks of a loss that crosses t where the label changes. Cross-entropy over more than two classes
does not; the log-loss of the label against the best other class, log(1 + exp(-(z_y - max_j z_j))), does at
t = log 2, and is what is used here, for images classified correctly. All in normalised inputs, DeepFool too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import Space
from robustbench_cure.geometry.subspaces import L2

#: Beyond this radius a threshold counts as never reached.
LARGEST_RADIUS = 1e12
#: Log-loss of two classes at which the label changes.
THRESHOLD = math.log(2)
#: Of DeepFool, to cross the boundary; the theorem's bounds are of the distance to it.
OVERSHOOT = 0.02


@dataclass(frozen=True)
class Bounds:
    """Bounds of ||r*||, float64 (B,), in units of the input; NaN where they do not apply."""

    lower: Tensor
    upper: Tensor
    simple_lower: Tensor
    simple_upper: Tensor


def bounds(c: Tensor, gradient_norm: Tensor, along: Tensor, nu: Tensor) -> Bounds:
    """Theorem 1, row by row.

    Args:
        c: threshold minus loss, (B,); the theorem needs c >= 0.
        gradient_norm: ||g||, (B,).
        along: |g.v|, (B,).
        nu: largest eigenvalue, (B,); the theorem needs nu >= 0.
    """
    c, length, along, nu = (value.double() for value in (c, gradient_norm, along.abs(), nu))
    applies = (c >= 0) & (nu >= 0) & (length > 0)

    def where(value: Tensor) -> Tensor:
        return torch.where(applies, value, torch.nan)

    return Bounds(
        lower=where(_distance(c, length, nu)),
        upper=where(_distance(c, along, nu)),
        simple_lower=where(c / length - 2 * nu * c.square() / length**3),
        simple_upper=where(c / along),
    )


def _distance(c: Tensor, slope: Tensor, nu: Tensor) -> Tensor:
    """The positive root of nu s^2 / 2 + slope s = c, without cancellation; sqrt(2 c / nu) for slope 0."""
    root = (slope.square() + 2 * nu * c).clamp_min(0).sqrt()
    return 2 * c / (slope + root)


def exact_distance(c: float, g: Tensor, hessian: Tensor) -> float:
    """||r*|| of the quadratic model itself: the smallest radius whose ball reaches the threshold.

    For a radius the largest value in the ball is that of the trust-region problem (Moré & Sorensen 1983),
    solved in the eigenbasis of H; it grows with the radius, so that it equals c at one of them.

    Args:
        c: threshold minus loss, positive.
        g: gradient, float64 (d,).
        hessian: symmetric, float64 (d, d).

    Returns:
        The radius; infinite where the model never reaches the threshold.
    """
    values, vectors = np.linalg.eigh(hessian.double().cpu().numpy())
    coordinates = vectors.T @ g.double().cpu().numpy()

    def missing(radius: float) -> float:
        return _largest(radius, values, coordinates) - c

    high = 1.0
    while missing(high) < 0:
        high *= 2
        if high > LARGEST_RADIUS:
            return float("inf")
    return float(brentq(missing, 0.0, high, xtol=1e-14, rtol=1e-13))


def _largest(radius: float, values: NDArray[np.float64], g: NDArray[np.float64]) -> float:
    """Largest g.r + r'Hr/2 over ||r|| <= radius, in the eigenbasis (values ascending)."""
    if radius == 0:
        return 0.0
    # In units of the problem: losses of confident networks and their curvatures are tiny.
    scale = max(float(np.abs(values).max()), float(np.linalg.norm(g)) / radius)
    if scale == 0:
        return 0.0
    floor = max(float(values[-1]), 0.0) + 1e-13 * scale

    def length(shift: float) -> float:
        return float(np.linalg.norm(g / (shift - values))) - radius

    if length(floor) <= 0:  # the hard case, or a maximum inside the ball
        r = g / (floor - values)
        if values[-1] > 0:
            missing = max(radius**2 - float(r @ r), 0.0)
            r[-1] += missing**0.5 * (1.0 if g[-1] >= 0 else -1.0)
    else:
        ceiling = floor + float(np.linalg.norm(g)) / radius
        r = g / (brentq(length, floor, ceiling, xtol=1e-15 * scale, rtol=1e-14) - values)
    return float(g @ r + (values * r * r).sum() / 2)


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
    """The theorem's bounds of every row, and the distance by DeepFool; float64 (B,) on the CPU.

    Attributes:
        c: threshold minus loss.
        gradient_norm: of the loss.
        nu: largest eigenvalue of the Hessian.
        along: |gradient . eigenvector|.
        bounds: of the distance.
        quadratic: that distance: the exact distance of the quadratic model to the threshold, infinite
            where it never reaches it, NaN where the bounds do not apply.
        deepfool: l2 distance by DeepFool, without its overshoot; NaN where it reaches no boundary.
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
        advance: called with the number of gradients computed.
    """
    two = TwoClass(space)
    c = THRESHOLD - two.losses(u, y).double().cpu()
    extremes = lanczos(two, u, y, h=h, iterations=iterations, start="gradient", advance=advance)
    length = extremes.gradient.flatten(1).double().norm(dim=1).cpu()
    along = (extremes.gradient.flatten(1).double() * extremes.vector.flatten(1)).sum(1).abs().cpu()
    reached = deepfool(space.network, u, y, threat=L2, mode="minimal", clip=False, overshoot=OVERSHOOT)
    distance = (reached.x_adv - u).flatten(1).double().norm(dim=1).cpu() / (1 + OVERSHOOT)
    converged = (
        reached.converged.cpu() if reached.converged is not None else torch.ones(len(u), dtype=torch.bool)
    )
    limits = bounds(c, length, along, extremes.largest)
    return TheoremRows(
        c=c,
        gradient_norm=length,
        nu=extremes.largest,
        along=along,
        bounds=limits,
        quadratic=_quadratic(c, length, extremes.projected, ~limits.lower.isnan()),
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
