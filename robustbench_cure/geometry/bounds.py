"""How far the nearest misclassification is when the loss is quadratic: the bounds of the CURE paper.

Source: CURE paper, Theorem 1 and Eq. 2-3 (thesis, Theorem 5, Eq. 8.2-8.4). For the quadratic model
l(x + r) = l(x) + g.r + r'Hr/2, a threshold t, c = t - l(x) >= 0, nu = largest eigenvalue >= 0 with unit
eigenvector v, the shortest r with l >= t obeys

    lower = (||g|| / nu) (sqrt(1 + 2 nu c / ||g||^2) - 1)  >=  c / ||g|| - 2 nu c^2 / ||g||^3
    upper = (|g.v| / nu) (sqrt(1 + 2 nu c / (g.v)^2) - 1)  <=  c / |g.v|

Evaluated as 2c / (a (1 + sqrt(1 + 2 nu c / a^2))), which loses no digits for small nu.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

#: Beyond this radius a threshold counts as never reached.
LARGEST_RADIUS = 1e12


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

    def lacking(radius: float) -> float:
        return _largest(radius, values, coordinates) - c

    high = 1.0
    while lacking(high) < 0:
        high *= 2
        if high > LARGEST_RADIUS:
            return float("inf")
    return float(brentq(lacking, 0.0, high, xtol=1e-14, rtol=1e-13))


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
