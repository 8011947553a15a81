"""Mean curvature of boundaries, by second differences of the logits.

Source: thesis, section 7.4, Eq. 7.2, and section 7.5, algorithm 6; signs and step as in `boundary`.

The mean curvature needs no gradient but that at the point: it is the mean of second differences of F along
random tangent directions. Exact in expectation for a quadratic F; for networks it and the mean of the
principal curvatures are two estimates at one scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.boundary import slopes_of
from robustbench_cure.geometry.hessian import NO_GRADIENT, on_sphere

#: How the mean is taken: unfinished work of another way is not gone on with.
ESTIMATE = "tangent directions"


def mean_curvatures(
    classifier: Classifier,
    x: Tensor,
    own: Tensor,
    others: Tensor,
    *,
    h: Tensor,
    directions: int = 100,
    noise: Noise | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean of P H_F P / ||grad F|| over the tangent space of F = f_j - f_own, for several j at once.

    At a boundary point: the mean principal curvature. Elsewhere: that of the level set of F through x, which
    is what the thesis' detector looks at.

    For one j the directions are projected onto its tangent space and made of length 1 before the step: what F
    bends along its normal is no curvature of the boundary. Several j have as many tangent spaces, too many to
    walk along each: they share directions of the whole space, and what F bends along its normal is taken off
    afterwards, by a step of h / sqrt(d), the part of h that such directions have along it. The same for a
    quadratic F; else what is left is of higher order.

    Args:
        classifier: the model.
        x: points, float32 (B,C,H,W).
        own: int64 (B,).
        others: the j of every row, int64 (B, m).
        h: step, l2 in pixels, float (B,).
        directions: random ones on the sphere, for each row; two forward passes each.
        noise: of the directions, one stream a row; default: rows known by their place.
        advance: told of images passed forward, `passes` for each row.

    Returns:
        float64 (B, m), on the device of x, 1/pixel; NaN where F has no gradient.
    """
    noise = Noise.for_rows(len(x), device=x.device) if noise is None else noise
    here = classifier.logits(x)
    slopes = slopes_of(classifier, x, own, others).flatten(2)
    length = slopes.norm(dim=2)  # (B, m)
    normals = slopes / length.clamp_min(NO_GRADIENT)[:, :, None]

    def bend(unit: Tensor, step: Tensor) -> Tensor:
        if advance is not None:
            advance(2 * len(x))
        return second_difference(classifier, x, here, own, others, unit.view_as(x), step)

    drawn = (on_sphere(noise, tuple(x.shape[1:]), k).flatten(1) for k in range(directions))
    if others.shape[1] == 1:
        along = [bend(tangent_part(v, normals[:, 0]), h) for v in drawn]
        mean = torch.stack(along).mean(0)
    else:
        d = normals.shape[2]
        total = torch.stack([bend(v, h) for v in drawn]).mean(0)
        share = h / d**0.5
        normal = torch.stack([bend(normals[:, k], share)[:, k] for k in range(others.shape[1])], 1)
        mean = (d * total - normal) / (d - 1)
    return torch.where(length > NO_GRADIENT, mean / length.double().clamp_min(NO_GRADIENT), torch.nan)


def passes(classes: int, directions: int) -> int:
    """Forward passes of `mean_curvatures` for one point and this many j, beside those at the point itself."""
    return 2 * (directions + (classes if classes > 1 else 0))


def tangent_part(v: Tensor, normal: Tensor) -> Tensor:
    """What of each row of v is orthogonal to the unit normal of the row, of length 1; float32 (B, d)."""
    tangent = v - (v * normal).sum(1, keepdim=True) * normal
    unit: Tensor = tangent / tangent.norm(dim=1, keepdim=True).clamp_min(NO_GRADIENT)
    return unit


def second_difference(
    classifier: Classifier,
    x: Tensor,
    here: Tensor,
    own: Tensor,
    others: Tensor,
    unit: Tensor,
    h: Tensor,
) -> Tensor:
    """(F(x + h v) + F(x - h v) - 2 F(x)) / h^2 for every F = f_j - f_own, along one direction v a row.

    Args:
        classifier: the model.
        x: points, float32 (B,C,H,W).
        here: logits at the points, (B, L).
        own: int64 (B,).
        others: the j of every row, int64 (B, m).
        unit: directions of length 1, shape of x.
        h: step, l2 in pixels, float (B,).

    Returns:
        float64 (B, m): v' H_F v where F is quadratic.
    """
    step = h.to(x).view(-1, 1, 1, 1) * unit
    bend = classifier.logits(x + step).double() + classifier.logits(x - step).double() - 2 * here.double()
    differences: Tensor = bend.gather(1, others) - bend.gather(1, own[:, None])
    return differences / h.double().square()[:, None]
