"""Detecting perturbed images by the curvature of the boundaries around them, and rating such detectors.

Source: thesis, section 7.5, algorithm 6. Boundaries near natural images bend away from them on average; a
minimal perturbation moves the image to the other side, from where the same boundary bends towards it. The
score is the mean curvature of the level sets of F_i = f_i - f_k through the image itself, over all directions
and all classes i but the predicted one, k. From a threshold on, 0 in the thesis, the image counts as
perturbed, and the class of the largest curvature as its label before. Classes without a gradient at the
image have no level set there: the mean is over the others.

At a boundary: the score is the mean curvature of the nearest boundary at its nearest point, and the label
before is the one beyond it. This is what the thesis' Table 7.2 counts the signs of.

Scores are rated by AUC and by the rates at a threshold (thesis, Fig. 7.9).

Deviations. The algorithm as printed says "not perturbed" in both branches; the second is read as "perturbed".
The mean is over the L - 1 classes used. Curvatures come from `mean_curvatures`, without gradients along the
directions. The best accuracy is cross-fitted, since a threshold chosen on the images that it is rated on
beats guessing where there is nothing to detect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap, mannwhitneyu
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.boundary import mean_curvatures, nearest_boundary
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.stats import CONFIDENCE, Rate

At: TypeAlias = Literal["image", "boundary"]
Values: TypeAlias = NDArray[np.float64]

#: Resamples of the images behind an interval.
RESAMPLES = 2000


@dataclass(frozen=True)
class Detection:
    """Scores and labels of every row, on the device of the images.

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
        advance: called with the number of images passed forward.
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
        curvatures[~near.exists] = torch.nan
    best = curvatures.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    classes = (~curvatures.isnan()).sum(1)
    return Detection(own, curvatures.nanmean(1), classes, others.gather(1, best).squeeze(1))


def auc(natural: Values, perturbed: Values) -> float:
    """Share of pairs in which the perturbed image has the higher score, ties counting half."""
    return float(mannwhitneyu(perturbed, natural).statistic) / (len(natural) * len(perturbed))


def auc_interval(natural: Values, perturbed: Values, seed: int) -> tuple[float, float]:
    """Of the AUC, by resampling images, each with both of its scores; percentiles.

    Args:
        natural: scores, (n,), n at least 2.
        perturbed: scores of the same images perturbed, (n,).
        seed: of the resamples.
    """

    def statistic(a: Values, b: Values, axis: int) -> Values:
        pairs = a.shape[axis] * b.shape[axis]
        share: Values = mannwhitneyu(b, a, axis=axis).statistic / pairs
        return share

    interval = bootstrap(
        (natural, perturbed),
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def best_threshold(natural: Values, perturbed: Values) -> float:
    """From which score on images should count as perturbed, for the best accuracy; midway between two scores.

    Infinite where all should count alike. Of equally good ones the lowest.
    """
    scores = np.unique(np.concatenate([natural, perturbed]))
    thresholds = np.concatenate([[-np.inf], (scores[1:] + scores[:-1]) / 2, [np.inf]])
    right = (natural < thresholds[:, None]).sum(1) + (perturbed >= thresholds[:, None]).sum(1)
    return float(thresholds[right.argmax()])


def cross_fitted(natural: Values, perturbed: Values) -> Rate:
    """Correct decisions, two an image, at the best threshold of the other half of the images.

    Args:
        natural: scores, (n,).
        perturbed: scores of the same images perturbed, (n,). Halves are every other image.
    """
    even = np.arange(len(natural)) % 2 == 0
    right = 0
    for half in (even, ~even):
        threshold = best_threshold(natural[~half], perturbed[~half])
        right += int((natural[half] < threshold).sum() + (perturbed[half] >= threshold).sum())
    return Rate(right, 2 * len(natural))


def versions_of(x: Tensor, r: Tensor, scales: list[float], noise: Noise) -> dict[str, Tensor]:
    """What detectors are rated on: natural images, with noise of r's length, with every multiple of r.

    Args:
        x: images, float32 (B,C,H,W).
        r: perturbations, shape of x.
        scales: multiples.
        noise: one stream a row.
    """
    length = r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    added = length * on_sphere(noise, tuple(x.shape[1:]), 0)
    return {"natural": x, "noise": x + added} | {f"{scale:g} r": x + scale * r for scale in scales}
