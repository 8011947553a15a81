"""A plane through an image, or along a path: regions of the labels, and the loss over it.

Source: CURE paper, figures 1, 3 and 8 (thesis figures 5.5, 8.1, 8.3, 8.8). The plane is spanned by the normal
n = r / ||r|| of the nearest boundary, r being DeepFool's l2 perturbation in pixels, and by a random direction
v, made orthogonal to n. Planes leave the pixel box, as those of the paper do.

Along a polyline (thesis, section 7.3, figure 7.2) every leg and the normal r of the boundary nearest to the
first end span a section; the sections of its legs stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.convexity import labels_of
from robustbench_cure.geometry.subspaces import L2

#: Positions along a polyline and across it; odd, so that the polyline itself is a row.
ALONG, ACROSS = 161, 61


@dataclass(frozen=True)
class Plane:
    """An origin and two orthogonal unit directions.

    Attributes:
        x: the image, float32 (C,H,W).
        n: direction of the normal, shape of ``x``.
        v: random direction orthogonal to it, shape of ``x``.
        distance: ||r||, in pixels; the boundary along n lies there.
        reached: whether DeepFool changed the label.
    """

    x: Tensor
    n: Tensor
    v: Tensor
    distance: float
    reached: bool


@dataclass(frozen=True)
class Grid:
    """Labels and losses over a plane; rows follow n, columns v.

    Attributes:
        along: coordinates of both axes, float32 (m,), in pixels.
        labels: predicted, int64 (m, m).
        loss: cross-entropy with the image's true label, float32 (m, m).
    """

    along: Tensor
    labels: Tensor
    loss: Tensor


def normal_plane(classifier: Classifier, x: Tensor, *, seed: int = 0) -> Plane:
    """The plane of the nearest boundary's normal and a random direction.

    Args:
        classifier: the model.
        x: one image, float32 (C,H,W) in [0, 1].
        seed: of the random direction: the same for every model.
    """
    image = x[None].to(classifier.device)
    label = classifier.logits(image).argmax(1)
    result = deepfool(classifier, image, label, threat=L2, mode="minimal", clip=False)
    r = (result.x_adv - image)[0]
    length = float(r.norm())
    reached = bool(result.converged is not None and result.converged[0]) and length > 0
    generator = torch.Generator().manual_seed(seed)
    n = r / length if length else torch.randn(x.shape, generator=generator).to(r.device)
    n = n / n.norm()
    v = torch.randn(x.shape, generator=generator).to(r.device)
    v = v - (v * n).sum() * n
    return Plane(image[0], n, v / v.norm(), length, reached)


def scan(
    classifier: Classifier,
    plane: Plane,
    label: int,
    *,
    reach: float,
    points: int,
    advance: Callable[[int], None] | None = None,
) -> Grid:
    """Labels and losses over a square of a plane, in the reference form.

    Args:
        classifier: the model.
        plane: where.
        label: true label of the image.
        reach: half the side of the square, in pixels.
        points: along each side; an odd number has the image itself in the middle.
        advance: called with the number of images passed forward.
    """
    along = torch.linspace(-reach, reach, points, device=plane.x.device)
    a, b = torch.meshgrid(along, along, indexing="ij")
    coordinates = torch.stack([a.flatten(), b.flatten()], 1)
    labels, losses = [], []
    for part in torch.split(coordinates, classifier.batch_size):
        images = plane.x + part[:, 0].view(-1, 1, 1, 1) * plane.n + part[:, 1].view(-1, 1, 1, 1) * plane.v
        logits = classifier.logits(images)
        labels.append(logits.argmax(1).cpu())
        target = torch.full((len(part),), label, device=logits.device)
        losses.append(cross_entropy(logits, target).cpu())
        if advance is not None:
            advance(len(part))
    shape = (points, points)
    return Grid(along.cpu(), torch.cat(labels).view(shape), torch.cat(losses).view(shape))


@dataclass(frozen=True)
class PathSection:
    """Labels around a path, and around the segment between its ends; all on the CPU.

    Attributes:
        points: of the path, float32 (m,C,H,W).
        height: distance from the path along the normal, in pixels, float64 (ACROSS,); 0 is the path.
        straight: labels around the segment, int64 (ACROSS, ALONG).
        path: labels around the path, int64 (ACROSS, ALONG).
        anchors: positions of the anchors as shares of the path's length, float64 (m - 2,).
    """

    points: Tensor
    height: Tensor
    straight: Tensor
    path: Tensor
    anchors: Tensor


def path_section(classifier: Classifier, points: Tensor) -> PathSection | None:
    """Labels around a polyline, and around the segment between its ends.

    Args:
        classifier: the model.
        points: of the polyline, float32 (m,C,H,W) on the CPU; its ends differ.

    Returns:
        None where DeepFool reaches no boundary from the first end.
    """
    plane = normal_plane(classifier, points[0])
    if not plane.reached:
        return None
    height = torch.from_numpy(np.linspace(-plane.distance, plane.distance, ACROSS))
    lengths = (points[1:] - points[:-1]).flatten(1).double().norm(dim=1)
    positions = torch.cat((torch.zeros(1).double(), lengths.cumsum(0))) / lengths.sum()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return PathSection(
        points,
        height,
        _labels_along(classifier, points[[0, -1]], ends, plane.n, height),
        _labels_along(classifier, points, positions, plane.n, height),
        positions[1:-1],
    )


def _labels_along(
    classifier: Classifier, points: Tensor, positions: Tensor, normal: Tensor, height: Tensor
) -> Tensor:
    """Labels at every height over `ALONG` positions of a polyline, int64 (ACROSS, ALONG)."""
    points, up = points.to(classifier.device), height.float().to(classifier.device)
    columns = []
    for position in torch.from_numpy(np.linspace(0, 1, ALONG)):
        leg = min(int(torch.searchsorted(positions, position, side="right")) - 1, len(positions) - 2)
        share = float((position - positions[leg]) / (positions[leg + 1] - positions[leg]))
        foot = (1 - share) * points[leg] + share * points[leg + 1]
        columns.append(labels_of(classifier, foot + up.view(-1, 1, 1, 1) * normal).cpu())
    return torch.stack(columns, 1)
