"""Directions that the boundaries near many images share: normals, and directions of curvature.

Source: thesis, sections 6.3 to 6.5 and 7.4. With n_i = r(x_i) / ||r(x_i)||, the directions of the nearest
boundaries of some images, and the projected Hessians G_i there (`boundary`):

    S_f   first left singular vectors of [n_1 ... n_n]                          (section 6.3.1)
    S_c   eigenvectors of the mean of G_i of largest positive eigenvalue        (section 6.4.1, Eq. 6.4)
    u_i   left singular vectors of the most and the least curved directions of all G_i   (Eq. 7.3)

A universal perturbation needs no more than such a subspace: random vectors of it change the labels of images
that it was not made from. Readings of the thesis: S_c averages the projected, not the plain Hessians; of
every G_i the ten most positive and the ten most negative directions enter the u_i, unweighted.

The n_i are directions of perturbations, as in the thesis, not gradients: where DeepFool misses the nearest
point, they are not quite the normals that G_i is projected with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier, full_precision
from robustbench_cure.geometry.boundary import Nearest, second_difference, slopes_of
from robustbench_cure.geometry.hessian import NO_GRADIENT, on_sphere

#: Extreme eigenvectors of either end that every image adds to the u_i.
EXTREMES = 10


@dataclass(frozen=True)
class SharedSubspaces:
    """Subspaces that the boundaries near some images share.

    Attributes:
        singular: singular values of the matrix of normals, float64 (k,).
        flat: S_f, orthonormal rows, float32 (k, d).
        curved: S_c, orthonormal rows, float32 (m, d).
        shared: u_i, orthonormal rows, float32 (m, d).
        images: how many images had a boundary with a gradient.
    """

    singular: Tensor
    flat: Tensor
    curved: Tensor
    shared: Tensor
    images: int


def common(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of the matrix with the given columns.

    Args:
        vectors: one column a row of this, float (n, d).

    Returns:
        Singular values, descending, float64 (k,), and the vectors as rows, float32 (k, d), k = min(n, d).
    """
    _, values, rows = torch.linalg.svd(vectors.double(), full_matrices=False)
    return values, rows.float()


@full_precision()
def extreme_eigenvectors(frame: Tensor, matrix: Tensor, count: int = EXTREMES) -> Tensor:
    """Principal directions of largest and of smallest curvature, as rows, float32 (2 count, d).

    Args:
        frame: tangent directions as rows, (d - 1, d), as `projected_hessian` returns them.
        matrix: the curvature in them, (d - 1, d - 1).
        count: of either end; where there are fewer than twice as many directions, all.
    """
    vectors = torch.linalg.eigh(matrix)[1].T
    if 2 * count < len(vectors):
        vectors = torch.cat((vectors[-count:].flip(0), vectors[:count]))
    rows: Tensor = vectors @ frame
    return rows


@full_precision()
def in_inputs(frame: Tensor, matrix: Tensor) -> Tensor:
    """A matrix in tangent directions as one in the inputs, float32 (d, d); as for `extreme_eigenvectors`."""
    whole: Tensor = frame.T @ matrix @ frame
    return whole


def most_curved(mean: Tensor, m: int) -> Tensor:
    """S_c: the m eigenvectors of largest eigenvalue of a symmetric matrix (d, d), as rows, float32 (m, d)."""
    rows: Tensor = torch.linalg.eigh(mean.double())[1].T.flip(0)[:m].float()
    return rows


class DirectionalCurvature:
    """Second differences of boundaries at their points, along one direction after the other.

    Args:
        classifier: the model.
        near: the boundary points, all of which exist.
        h: step, l2 in pixels, float (B,).

    Attributes:
        slope: ||grad F||, float32 (B,).
    """

    def __init__(self, classifier: Classifier, near: Nearest, h: Tensor) -> None:
        self.classifier, self.near, self.h = classifier, near, h
        self.others = near.other[:, None]
        self.here = classifier.logits(near.point)
        slopes = slopes_of(classifier, near.point, near.own, self.others)[:, 0].flatten(1)
        self.slope = slopes.norm(dim=1)
        self.normal = slopes / self.slope.clamp_min(NO_GRADIENT)[:, None]

    def along(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """For one u of length 1 a row, float32 (B, d), or for all, (d,).

        Returns:
            t' H_F t for t = P u / ||P u||, float64 (B,), and ||P u||, float64 (B,).
        """
        tangent = u - (u * self.normal).sum(1, keepdim=True) * self.normal
        size = tangent.norm(dim=1, keepdim=True)
        unit = (tangent / size.clamp_min(NO_GRADIENT)).view_as(self.near.point)
        at = self.near.point, self.here, self.near.own, self.others
        second = second_difference(self.classifier, *at, unit, self.h)[:, 0]
        return second, size[:, 0].double()


def curvatures_along(classifier: Classifier, near: Nearest, directions: Tensor, *, h: Tensor) -> Tensor:
    """Curvature of every boundary along the tangent part of every direction (thesis, Eq. 7.2).

    Args:
        classifier: the model.
        near: the boundary points, all of which exist.
        directions: v of length 1 as rows, float32 (k, d).
        h: step, l2 in pixels, float (B,).

    Returns:
        float64 (B, k), on the device of the points, 1/pixel; NaN where the boundary has no gradient.
    """
    curvature = DirectionalCurvature(classifier, near, h)
    values = torch.stack([curvature.along(v)[0] for v in directions.to(near.point.device)], 1)
    slope = curvature.slope.double()[:, None]
    return torch.where(slope > NO_GRADIENT, values / slope.clamp_min(NO_GRADIENT), torch.nan)


def relative_curvatures(
    classifier: Classifier,
    near: Nearest,
    directions: Tensor,
    *,
    h: Tensor,
    references: int = 100,
    noise: Noise,
) -> Tensor:
    """|u' G u| over its mean for random u, for every direction at every boundary point (thesis, Eq. 7.3).

    Args:
        classifier: the model.
        near: the boundary points, all of which exist.
        directions: u of length 1 as rows, float32 (m, d).
        h: step, l2 in pixels, float (B,).
        references: random directions that the mean is taken over.
        noise: of those, one stream a row.

    Returns:
        float64 (B, m), on the device of the points; about 1 for a direction like any other. NaN where the
        boundary has no gradient or is flat along all references.
    """
    curvature = DirectionalCurvature(classifier, near, h)

    def absolute(u: Tensor) -> Tensor:
        """|u' G u| ||grad F||, float64 (B,)."""
        along, size = curvature.along(u)
        return along.abs() * size.square()

    shape = tuple(near.point.shape[1:])
    usual = torch.stack([absolute(on_sphere(noise, shape, k).flatten(1)) for k in range(references)]).mean(0)
    values = torch.stack([absolute(u) for u in directions.to(near.point.device)], 1)
    usable = (curvature.slope > NO_GRADIENT) & (usual > 0)
    return torch.where(usable[:, None], values / usual.clamp_min(1e-300)[:, None], torch.nan)


def share_inside(basis: Tensor, vectors: Tensor) -> Tensor:
    """||P_S v|| / ||v|| of every row; for random v and S of dimension m about sqrt(m/d).

    Args:
        basis: of S, orthonormal rows, float32 (m, d).
        vectors: v, (B, ...), flattened to (B, d).

    Returns:
        float64 (B,) on the CPU; NaN for v = 0.
    """
    flat = vectors.flatten(1).double().cpu()
    share: Tensor = (flat @ basis.double().cpu().T).norm(dim=1) / flat.norm(dim=1)
    return share


@full_precision()
def random_in(basis: Tensor, noise: Noise, stream: int) -> Tensor:
    """For each stream a unit vector, uniform on the sphere of S; float32 (B, d).

    Args:
        basis: of S, orthonormal rows, float32 (m, d).
        noise: a stream for each row.
        stream: which of its draws.
    """
    vectors = noise.normal((len(basis),), stream).to(basis.device) @ basis
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit


@full_precision()
def random_outside(basis: Tensor, noise: Noise, stream: int) -> Tensor:
    """As `random_in`, in the orthogonal complement of S."""
    vectors = noise.normal((basis.shape[1],), stream).to(basis.device)
    vectors = vectors - vectors @ basis.T @ basis
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of the principal angles between two subspaces (thesis, section 6.5), descending, float64.

    Args:
        one: orthonormal rows (m, d).
        other: orthonormal rows (k, d).

    Returns:
        (min(m, k),): 1 for what they share, 0 for what is orthogonal.
    """
    values: Tensor = torch.linalg.svdvals(one.double() @ other.double().T).clamp(0, 1)
    return values
