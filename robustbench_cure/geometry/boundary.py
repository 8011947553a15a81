"""The boundary nearest to an image, and its curvatures there.

Source: thesis, section 7.4, Eq. 7.2. At z = x + r(x), the nearest point of the boundary between the image's
own label k and another j, with F = f_j - f_k and the unit normal n = grad F / ||grad F||, the principal
curvatures are the eigenvalues of

    P H_F P / ||grad F(z)||,   P = I - n n',

without the zero of n itself. Signs are those of F, which is negative at x: a positive curvature is a boundary
that bends towards the image, as the inside of a sphere does; a negative one bends away from it.

Differences are central, of a step h that is finite on purpose: boundaries of piecewise linear networks have
no curvature in the limit. h is the distance of the boundary unless a command says otherwise.

The mean curvature (thesis, section 7.5, algorithm 6) needs no gradient but that at the point: it is the mean
of second differences of F along random tangent directions. Exact in expectation for a quadratic F; for
networks it and the mean of the principal curvatures are two estimates at one scale.

At the nearest point r is parallel to grad F. DeepFool's r need not be: it ends on the boundary, near the
nearest point. All curvature here is that of the point where it ends, with the normal of grad F there, and
`cosine_to_normal` is that between r and this normal.

Everything in pixels, not cut to [0, 1]: a clipped path would end elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier, full_precision
from robustbench_cure.geometry.hessian import NO_GRADIENT, on_sphere
from robustbench_cure.geometry.subspaces import L2

#: Bisections of DeepFool's perturbation: 2^-16 of its length is left.
BISECTIONS = 16
#: How mean curvatures are estimated: unfinished work by another estimate is not continued.
ESTIMATE = "tangent directions"
#: Shortest step, l2 in pixels: below it second differences of float32 logits are rounding.
SHORTEST_STEP = 0.02


@dataclass(frozen=True)
class Nearest:
    """The nearest boundary of every row, on the device of the images.

    Attributes:
        own: label at the image, int64 (B,).
        other: label beyond the boundary, int64 (B,); the own one where none was reached.
        point: z, on the boundary or just beyond, float32 (B,C,H,W).
        beyond: where DeepFool stopped, with its overshoot past the boundary; float32 (B,C,H,W).
        distance: ||z - x||, float64 (B,); NaN where no boundary was reached.
    """

    own: Tensor
    other: Tensor
    point: Tensor
    beyond: Tensor
    distance: Tensor

    @property
    def exists(self) -> Tensor:
        """Rows whose boundary was reached, bool (B,)."""
        return ~self.distance.isnan()

    def __getitem__(self, rows: Tensor) -> Nearest:
        """Some rows: their numbers, int64, or a mask."""
        return Nearest(
            self.own[rows], self.other[rows], self.point[rows], self.beyond[rows], self.distance[rows]
        )


def nearest_boundary(classifier: Classifier, x: Tensor) -> Nearest:
    """The nearest boundary by DeepFool (l2), then by bisection along its perturbation.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1], or any other points.
    """
    x = x.to(classifier.device)
    own = classifier.logits(x).argmax(1)
    reached = deepfool(classifier, x, own, threat=L2, mode="minimal", clip=False)
    step = reached.x_adv - x
    below, above = x.new_zeros(len(x)), x.new_ones(len(x))
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        crossed = classifier.logits(x + middle.view(-1, 1, 1, 1) * step).argmax(1) != own
        above, below = torch.where(crossed, middle, above), torch.where(crossed, below, middle)
    point = x + above.view(-1, 1, 1, 1) * step
    other = classifier.logits(point).argmax(1)
    distance = (point - x).flatten(1).double().norm(dim=1)
    return Nearest(own, other, point, reached.x_adv, torch.where(other != own, distance, torch.nan))


def steps_of(near: Nearest, step: float | None) -> Tensor:
    """Step of the differences at every row, float32 (B,), l2 in pixels; NaN where there is no boundary.

    Args:
        near: the boundaries.
        step: the same for all; None: the distance of each boundary, at least `SHORTEST_STEP`.
    """
    own = near.distance.clamp_min(SHORTEST_STEP) if step is None else torch.full_like(near.distance, step)
    return torch.where(near.exists, own, torch.nan).float()


def cosine_to_normal(classifier: Classifier, x: Tensor, near: Nearest) -> Tensor:
    """Cosine of the angle between z - x and grad F(z), float64 (B,): 1 where z is the nearest point.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W).
        near: their boundaries.

    Returns:
        On the device of the points; NaN without a boundary or where F has no gradient.
    """
    r = (near.point - x.to(near.point.device)).flatten(1).double()
    normal = slopes_of(classifier, near.point, near.own, near.other[:, None])[:, 0].flatten(1).double()
    lengths = r.norm(dim=1) * normal.norm(dim=1)
    known = near.exists & (normal.norm(dim=1) > NO_GRADIENT) & (lengths > 0)
    return torch.where(known, (r * normal).sum(1) / lengths, torch.nan)


def principal_curvatures(
    classifier: Classifier,
    point: Tensor,
    own: Tensor,
    other: Tensor,
    *,
    h: float,
    rotation: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """All principal curvatures at one point: eigenvalues of `projected_hessian`; the same arguments.

    Returns:
        float32 (d - 1,), descending, on the CPU; NaN where F has no gradient. 1/pixel.
    """
    _, matrix = projected_hessian(classifier, point, own, other, h=h, rotation=rotation, advance=advance)
    if bool(matrix.isnan().any()):
        return torch.full((len(matrix),), torch.nan)
    curvatures: Tensor = torch.linalg.eigvalsh(matrix).flip(0).cpu()
    return curvatures


@full_precision()
def projected_hessian(
    classifier: Classifier,
    point: Tensor,
    own: Tensor,
    other: Tensor,
    *,
    h: float,
    rotation: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """P H_F P / ||grad F|| at one point of the boundary between two labels, on the tangent space.

    Args:
        classifier: the model.
        point: z, float32 (C,H,W).
        own: the label k on the side of the image, int64 ().
        other: the label j beyond, int64 ().
        h: step, l2 in pixels.
        rotation: of the tangent space, orthonormal rows (d - 1, d - 1): steps are taken along its rows; None:
            along single inputs, reflected onto the tangent space.
        advance: called with the number of gradients computed.

    Returns:
        Orthonormal tangent directions as rows, float32 (d - 1, d), and the matrix in them, symmetric, float32
        (d - 1, d - 1), 1/pixel; NaN where F has no gradient. On the device of the point.
    """
    gradient = _gradients(classifier, point[None], own, other)[0].flatten()
    slope = gradient.norm()
    known = bool(slope > NO_GRADIENT)
    tangent = tangent_frame(gradient / slope if known else torch.eye(len(gradient), device=point.device)[0])
    if rotation is not None:
        tangent = rotation @ tangent
    matrix = tangent.new_full((len(tangent), len(tangent)), torch.nan)
    if not known:
        return tangent, matrix
    for rows in torch.split(torch.arange(len(tangent), device=point.device), classifier.batch_size):
        step = h * tangent[rows].view(-1, *point.shape)
        forward = _gradients(classifier, point + step, own, other)
        backward = _gradients(classifier, point - step, own, other)
        matrix[rows] = ((forward - backward) / (2 * h)).flatten(1) @ tangent.T
        if advance is not None:
            advance(2 * len(rows))
    return tangent, (matrix + matrix.T) / (2 * slope)


def tangent_frame(normal: Tensor) -> Tensor:
    """Orthonormal directions orthogonal to a unit vector (d,), as rows, (d - 1, d).

    Householder's reflection that carries the input of largest share in the normal onto it: the images of
    the other inputs, each as near to its input as can be.
    """
    pivot = int(normal.abs().argmax())
    mirror = normal.clone()
    mirror[pivot] += normal[pivot].sign()
    frame = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    frame -= 2 * torch.outer(mirror, mirror) / mirror.square().sum()
    return torch.cat((frame[:pivot], frame[pivot + 1 :]))


def slopes_of(classifier: Classifier, x: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Gradients of every f_j - f_own at every row, in passes of the batch size; float32 (B, m, C, H, W)."""
    parts = [
        classifier.value_and_jacobian(x[rows], own[rows], others[rows], reference=True)[1]
        for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size)
    ]
    return torch.cat(parts)


def _gradients(classifier: Classifier, x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Gradients of f_other - f_own, one pair for all rows; float32, shape of x; one pass."""
    pair = own.expand(len(x)), other.expand(len(x), 1)
    return classifier.value_and_jacobian(x, *pair, reference=True)[1][:, 0]


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
    is what the thesis' detector takes.

    For one j the directions are projected onto its tangent space and made of length 1 before the step: the
    second derivative of F along its normal is no curvature of the boundary. Several j have as many tangent
    spaces, too many for directions in each: they share directions of the whole space, and the second
    derivative along the normal is subtracted afterwards, by a step of h / sqrt(d), the part of h that such
    directions have along it. The same for a quadratic F; else the difference is of higher order.

    Args:
        classifier: the model.
        x: points, float32 (B,C,H,W).
        own: int64 (B,).
        others: the j of every row, int64 (B, m).
        h: step, l2 in pixels, float (B,).
        directions: random ones on the sphere, for each row; two forward passes each.
        noise: of the directions, one stream a row; default: rows known by their place.
        advance: called with the number of images passed forward, `passes` for each row.

    Returns:
        float64 (B, m), on the device of x, 1/pixel; NaN where F has no gradient.
    """
    noise = Noise.for_rows(len(x), device=x.device) if noise is None else noise
    here = classifier.logits(x)
    slopes = slopes_of(classifier, x, own, others).flatten(2)
    length = slopes.norm(dim=2)  # (B, m)
    normals = slopes / length.clamp_min(NO_GRADIENT)[:, :, None]

    def along(unit: Tensor, step: Tensor) -> Tensor:
        if advance is not None:
            advance(2 * len(x))
        return second_difference(classifier, x, here, own, others, unit.view_as(x), step)

    drawn = (on_sphere(noise, tuple(x.shape[1:]), k).flatten(1) for k in range(directions))
    if others.shape[1] == 1:
        mean = torch.stack([along(tangent_part(v, normals[:, 0]), h) for v in drawn]).mean(0)
    else:
        d = normals.shape[2]
        total = torch.stack([along(v, h) for v in drawn]).mean(0)
        share = h / d**0.5
        normal = torch.stack([along(normals[:, k], share)[:, k] for k in range(others.shape[1])], 1)
        mean = (d * total - normal) / (d - 1)
    return torch.where(length > NO_GRADIENT, mean / length.double().clamp_min(NO_GRADIENT), torch.nan)


def passes(classes: int, directions: int) -> int:
    """Forward passes of `mean_curvatures` for one point and this many j, besides those at the point."""
    return 2 * (directions + (classes if classes > 1 else 0))


def tangent_part(v: Tensor, normal: Tensor) -> Tensor:
    """Part of each row of v orthogonal to the unit normal of the row, scaled to length 1; float32 (B, d)."""
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
    logits = classifier.logits(x + step).double() + classifier.logits(x - step).double() - 2 * here.double()
    differences: Tensor = logits.gather(1, others) - logits.gather(1, own[:, None])
    return differences / h.double().square()[:, None]
