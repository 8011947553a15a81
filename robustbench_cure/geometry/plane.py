"""A plane through an image: regions of the labels, and the loss over it.

Source: CURE paper, figures 1, 3 and 8 (thesis figures 5.5, 8.1, 8.3, 8.8). The plane is spanned by the normal
n = r / ||r|| of the nearest boundary, r being DeepFool's l2 perturbation in pixels, and by a random direction
v, made orthogonal to n. Planes leave the pixel box, as those of the paper do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel


@dataclass(frozen=True)
class Plane:
    """An origin and two orthogonal unit directions.

    Attributes:
        x: the image, float32 (C,H,W).
        n: direction of the normal, shape of ``x``.
        v: direction beside it, shape of ``x``.
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
    """What the network says over a plane; rows follow n, columns v.

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
    found = deepfool(
        classifier, image, label, threat=ThreatModel.parse("l2", "0"), mode="minimal", clip=False
    )
    r = (found.x_adv - image)[0]
    length = float(r.norm())
    reached = bool(found.converged is not None and found.converged[0]) and length > 0
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
        advance: told of images passed forward.
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
