"""The boundary nearest to an image, and how it bends there.

Source: thesis, section 7.4, Eq. 7.2. At z = x + r(x), the nearest point of the boundary between the image's
own label k and another j, with F = f_j - f_k and the unit normal n = grad F / ||grad F||, the principal
curvatures are the eigenvalues of

    P H_F P / ||grad F(z)||,   P = I - n n',

without the zero of n itself. Signs are those of F, which is negative at x: a positive curvature is a boundary
that bends towards the image, as the inside of a sphere does; a negative one bends away from it.

Differences are central, of a step h that is finite on purpose: boundaries of piecewise linear networks have
no curvature in the limit. h is the distance of the boundary unless a command says otherwise.

At the nearest point r is parallel to grad F. DeepFool's r need not be: it ends on the boundary, near the
nearest point. All curvature here is that of the point where it ends, with the normal of grad F there, and
`cosine_to_normal` says how far r is from it.

Everything in pixels, not cut to [0, 1]: a cut way would end elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.classifier import Classifier, full_precision
from robustbench_cure.geometry.hessian import NO_GRADIENT
from robustbench_cure.geometry.subspaces import L2

#: Halvings of DeepFool's way to the boundary: 2^-16 of it is left.
HALVINGS = 16


@dataclass(frozen=True)
class Nearest:
    """The nearest boundary of every row, on the device of the images.

    Attributes:
        own: label at the image, int64 (B,).
        other: label beyond the boundary; the own one where none was found.
        point: z, on the boundary or just beyond, float32 (B,C,H,W).
        beyond: where DeepFool stopped, with its overshoot past the boundary; float32 (B,C,H,W).
        distance: ||z - x||, float64 (B,); NaN where no boundary was found.
    """

    own: Tensor
    other: Tensor
    point: Tensor
    beyond: Tensor
    distance: Tensor

    @property
    def found(self) -> Tensor:
        """Rows with a boundary, bool (B,)."""
        return ~self.distance.isnan()

    def __getitem__(self, rows: Tensor) -> Nearest:
        """Some rows: their numbers, int64, or a mask."""
        return Nearest(
            self.own[rows], self.other[rows], self.point[rows], self.beyond[rows], self.distance[rows]
        )


def nearest_boundary(classifier: Classifier, x: Tensor) -> Nearest:
    """Walk to the nearest boundary by DeepFool (l2), then halve the way until the point lies on it.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1], or any other points.
    """
    x = x.to(classifier.device)
    own = classifier.logits(x).argmax(1)
    reached = deepfool(classifier, x, own, threat=L2, mode="minimal", clip=False)
    step = reached.x_adv - x
    below, above = x.new_zeros(len(x)), x.new_ones(len(x))
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        crossed = classifier.logits(x + middle.view(-1, 1, 1, 1) * step).argmax(1) != own
        above, below = torch.where(crossed, middle, above), torch.where(crossed, below, middle)
    point = x + above.view(-1, 1, 1, 1) * step
    other = classifier.logits(point).argmax(1)
    distance = (point - x).flatten(1).double().norm(dim=1)
    return Nearest(own, other, point, reached.x_adv, torch.where(other != own, distance, torch.nan))


def cosine_to_normal(classifier: Classifier, x: Tensor, near: Nearest) -> Tensor:
    """Cosine of the angle between z - x and grad F(z), float64 (B,): 1 where z is the nearest point.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W).
        near: their boundaries.

    Returns:
        On the device of the points; NaN without a boundary or where F has no gradient.
    """
    way = (near.point - x.to(near.point.device)).flatten(1).double()
    normal = slopes_of(classifier, near.point, near.own, near.other[:, None])[:, 0].flatten(1).double()
    lengths = way.norm(dim=1) * normal.norm(dim=1)
    known = near.found & (normal.norm(dim=1) > NO_GRADIENT) & (lengths > 0)
    return torch.where(known, (way * normal).sum(1) / lengths, torch.nan)


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
    """All principal curvatures at one point: the eigenvalues of `bending`, which takes the same arguments.

    Returns:
        float32 (d - 1,), descending, on the CPU; NaN where F has no gradient. 1/pixel.
    """
    _, inside = bending(classifier, point, own, other, h=h, rotation=rotation, advance=advance)
    if bool(inside.isnan().any()):
        return torch.full((len(inside),), torch.nan)
    curvatures: Tensor = torch.linalg.eigvalsh(inside).flip(0).cpu()
    return curvatures


@full_precision()
def bending(
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
        advance: told of gradients computed.

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
    inside = tangent.new_full((len(tangent), len(tangent)), torch.nan)
    if not known:
        return tangent, inside
    for rows in torch.split(torch.arange(len(tangent), device=point.device), classifier.batch_size):
        step = h * tangent[rows].view(-1, *point.shape)
        ahead = _gradients(classifier, point + step, own, other)
        behind = _gradients(classifier, point - step, own, other)
        inside[rows] = ((ahead - behind) / (2 * h)).flatten(1) @ tangent.T
        if advance is not None:
            advance(2 * len(rows))
    return tangent, (inside + inside.T) / (2 * slope)


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
