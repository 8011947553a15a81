"""How well scores tell perturbed images from natural ones: AUC, rates at a threshold, and their intervals.

Source: thesis, section 7.5 and Fig. 7.9. Deviation: the best accuracy is cross-fitted, since a threshold
chosen on the images that it is judged on finds more than guessing where there is nothing to find.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.metrics import roc_curve

from robustbench_cure.stats import CONFIDENCE, Rate

Values = NDArray[np.float64]

#: Resamples of the images behind an interval.
RESAMPLES = 2000


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

    found = bootstrap(
        (natural, perturbed),
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(found.low), float(found.high)


def best_threshold(natural: Values, perturbed: Values) -> float:
    """From which score on images should count as perturbed, for most to be told; half way between two scores.

    Infinite where all should count alike. Of equally good ones the lowest.
    """
    scores = np.unique(np.concatenate([natural, perturbed]))
    thresholds = np.concatenate([[-np.inf], (scores[1:] + scores[:-1]) / 2, [np.inf]])
    told = (natural < thresholds[:, None]).sum(1) + (perturbed >= thresholds[:, None]).sum(1)
    return float(thresholds[told.argmax()])


def cross_fitted(natural: Values, perturbed: Values) -> Rate:
    """Judgements that are right, two an image, at the best threshold of the other half of the images.

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


def told_apart(both: pd.DataFrame, total: int, seed: int) -> dict[str, Any]:
    """How well one kind of perturbed images is told from the natural ones.

    Args:
        both: a row an image: its score, `before` that of the image as it is, the labels and what the detector
            gives back; scores may be NaN.
        total: images there are.
        seed: of the resamples.

    Returns:
        Counts, rates in [0, 1] and their 95 % intervals; NaN where fewer than two images have both scores.
    """
    known = both.dropna(subset=["score", "before"])
    n = len(known)
    before, after = known["before"].to_numpy(), known["score"].to_numpy()
    changed = (known["label"] != known["natural_label"]).to_numpy()
    right = (known["recovered"] == known["natural_label"]).to_numpy()
    flagged = after >= 0
    caught = flagged & changed
    low, high = auc_interval(before, after, seed) if n > 1 else (np.nan, np.nan)
    return {
        "n": n,
        "left_out": total - n,
        "auc": auc(before, after) if n > 1 else np.nan,
        "ci_low": low,
        "ci_high": high,
        "label_changed": float(changed.mean()) if n else np.nan,
        **_rated("flagged", Rate(int(flagged.sum()), n)),
        **_rated("false_alarms", Rate(int((before >= 0).sum()), n)),
        **_rated("best_accuracy", cross_fitted(before, after) if n > 1 else Rate(0, 0)),
        **_rated("recovered", Rate(int(right[caught].sum()), int(caught.sum()))),
        "recovered_n": int(caught.sum()),
        "classes": float(known["classes"].mean()),
    }


def _rated(name: str, rate: Rate) -> dict[str, float]:
    low, high = rate.interval if rate.total else (np.nan, np.nan)
    return {name: rate.value, f"{name}_ci_low": low, f"{name}_ci_high": high}


def roc(both: pd.DataFrame) -> tuple[Values, Values]:
    """Perturbed images let through, and natural ones kept, per cent, at every threshold; may be empty."""
    known = both.dropna(subset=["score", "before"])
    if not len(known):
        return np.empty(0), np.empty(0)
    scores = np.concatenate([-known["before"], -known["score"]])
    passed, kept, _ = roc_curve(np.repeat([1, 0], len(known)), scores)
    return 100 * passed, 100 * kept
