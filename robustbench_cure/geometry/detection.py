"""Telling perturbed images by the curvature of the boundaries around them.

Source: thesis, section 7.5, algorithm 6. Boundaries near natural images bend away from them on average; a
minimal perturbation carries the image to the other side, from where the same boundary bends towards it. The
score is the mean curvature of the level sets of F_i = f_i - f_k through the image itself, over all directions
and all classes i but the predicted one, k. From a threshold on, 0 in the thesis, the image counts as
perturbed, and the class of the largest curvature as its label before. Classes without a gradient at the
image have no level set there: the mean is over the others.

At a boundary: the score is the mean curvature of the nearest boundary at its nearest point, and the label
before is the one beyond it. This is what the thesis' Table 7.2 counts the signs of.

Deviations. The algorithm as printed says "not perturbed" in both branches; the second is read as "perturbed".
The mean is over the L - 1 classes used. Curvatures come from `mean_curvatures`, without gradients along the
directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.boundary import nearest_boundary
from robustbench_cure.geometry.mean_curvature import mean_curvatures

At: TypeAlias = Literal["image", "boundary"]


@dataclass(frozen=True)
class Detection:
    """What the detector says about every row, on the device of the images.

    Attributes:
        label: predicted, int64 (B,).
        score: mean curvature, float64 (B,), 1/pixel; NaN where no class has a gradient or there is no
            boundary.
        classes: how many the mean is over, int64 (B,): those with a gradient.
        recovered: the label before the perturbation, if there was one, int64 (B,).
    """

    label: Tensor
    score: Tensor
    classes: Tensor
    recovered: Tensor


def detect(
    classifier: Classifier,
    x: Tensor,
    *,
    h: float,
    at: At = "image",
    directions: int = 100,
    candidates: int = 10,
    noise: Noise | None = None,
    advance: Callable[[int], None] | None = None,
) -> Detection:
    """Score images: the higher, the more likely perturbed.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W); perturbed ones may leave [0, 1].
        h: step of the differences, l2 in pixels; the thesis names none. A usual distance of boundaries.
        at: where curvature is taken: at the image, for all classes, or at the nearest boundary.
        directions: random ones, for each image; two forward passes each.
        candidates: classes considered at the image, the highest-ranked including the predicted one.
        noise: of the directions, one stream a row; default: rows known by their place.
        advance: told of images passed forward.
    """
    x = x.to(classifier.device)
    if at == "boundary":
        near = nearest_boundary(classifier, x)
        points, own, others = near.point, near.own, near.other[:, None]
    else:
        ranked = classifier.logits(x).topk(min(candidates, classifier.num_classes), dim=1).indices
        points, own, others = x, ranked[:, 0], ranked[:, 1:]
    curvatures = mean_curvatures(
        classifier,
        points,
        own,
        others,
        h=torch.full((len(x),), h, device=x.device),
        directions=directions,
        noise=noise,
        advance=advance,
    )
    if at == "boundary":
        curvatures[~near.found] = torch.nan
    best = curvatures.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    classes = (~curvatures.isnan()).sum(1)
    return Detection(own, curvatures.nanmean(1), classes, others.gather(1, best).squeeze(1))
