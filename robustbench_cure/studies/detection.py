"""`cure-bench detect`: are perturbed images detected by the curvature of the boundaries around them?

Source: thesis, section 7.5, algorithm 6 and Fig. 7.9, see `geometry.detection`. Perturbed images are x + a r,
with DeepFool's r (l2, past the nearest boundary by 2 %) and every scale a; for comparison noise of r's own
length, and an attacker who takes for each image the scale of lowest score. Read the AUC: 0.5 is guessing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.boundary import ESTIMATE, passes
from robustbench_cure.geometry.detection import At, auc, auc_interval, cross_fitted, detect, versions_of
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
from robustbench_cure.studies.boundary import nearest_of
from robustbench_cure.studies.engine import (
    Columns,
    ModelRow,
    Shown,
    Study,
    counter,
    open_study,
    paragraphs,
    refuse_longer,
    refuse_step,
)
from robustbench_cure.studies.plots import Points

#: The attacker who knows the detector, among the kinds of images.
CHOSEN = "chosen r"

LEAD = paragraphs("""
Can perturbed images be detected by the curvature of the boundaries around them? The score of an image is the
mean curvature of the level sets through it, over random directions and all other classes. The thesis finds it
negative for natural images and positive for images moved just past a boundary, which then bends towards them.

AUC is the probability that a perturbed image scores higher than a natural one: 0.5 is guessing, less means
that the sign is the other one. "a r" is DeepFool's smallest perturbation times a; "noise" has its length
and no direction, and should not be detected; "chosen r" is an attacker who knows the detector and takes for
each image the scale of lowest score. "Flagged" is the share with a score of 0 or more: of natural images,
false alarms. "Accuracy" counts natural and perturbed images at the best threshold, which is chosen on one
half of the images and evaluated on the other, and the reverse. "Restored" is the share of flagged images,
among those whose label was changed, that get their label back.

With "--at boundary" the curvature is that of the nearest boundary, and the label beyond it the one that is
restored.

A detector is a defence only against attackers who do not know it: this page shows what curvature reveals, not
that a model is robust.
""")
NOTE = """\
a r: the smallest perturbation times a; chosen r: the least suspicious of these.
flagged: called perturbed, natural images by mistake; accuracy: at the threshold
best for other images; restored: labels before the change, where flagged."""


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        step: of the differences, l2 in pixels; None: the median distance of each model's boundaries.
        directions: random ones of the mean curvature, for each image.
        at: where the detector takes curvature, as `detect` names it.
        scales: of the perturbation, ascending, at least 1.
        candidates: classes that the detector considers.
    """

    step: float | None = None
    directions: int = 100
    at: At = "image"
    scales: tuple[float, ...] = (1.0, 2.0, 5.0)
    candidates: int = 10


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    refuse_step(settings.step)
    return measure(open_study("detect", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Scores of natural and perturbed images, and their rates; one row for each model and kind of images.

    An interrupted run is continued.

    Raises:
        UsageError: fewer than two images, a model without a boundary near them, a step longer than the box.
    """
    if len(study.data) < 2:
        raise UsageError("--n 1: telling images apart needs at least 2")
    refuse_longer("--step", settings.step, study.inputs)
    images, tables, steps = [], [], []
    shown: list[ModelRow] = []
    curves: dict[str, dict[str, Points]] = {}
    for name in study.models:
        scores, h = _scores(study, name, settings)
        rates, curves[name] = _rates(scores, study.seed)
        images.append(scores)
        tables.append(rates.assign(step=h))
        shown += [_natural_row(name, scores), *rates.to_dict("records")]
        steps.append(f"{h:.3g} ({name})")
    result = pd.concat(tables, ignore_index=True)
    study.table("detect-images", pd.concat(images, ignore_index=True))
    study.table("detect", result)
    study.present(
        shown,
        COLUMNS,
        title="Detection by curvature",
        lead=LEAD,
        figures=[_draw(study, curves)],
        settings={
            "curvature_at": f"the {settings.at}",
            "step_h": ", ".join(steps),
            "directions": settings.directions,
            "classes": settings.candidates if settings.at == "image" else 2,
            "scales": ", ".join(f"{scale:g}" for scale in settings.scales),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
        note=NOTE,
    )
    return result


def _scores(study: Study, name: str, settings: Settings) -> tuple[pd.DataFrame, float]:
    """Scores of all versions of all images near a boundary, and the step that was used."""
    classifier = study.models[name]
    near = nearest_of(name, classifier, study.images)
    rows = near.exists.nonzero().flatten().cpu()
    if len(rows) < 2:
        raise UsageError(f"{name}: DeepFool finds no boundary near the images, so there is nothing to detect")
    near, ids = near[rows], [study.data.ids[row] for row in rows.tolist()]
    x = study.images[rows].to(classifier.device)
    h = float(near.distance.median()) if settings.step is None else settings.step
    noise = Noise.for_samples(study.seed, "detect/added", ids, x.device)
    versions = versions_of(x, near.beyond - x, list(settings.scales), noise)
    cache = study.cache(
        name,
        at=settings.at,
        directions=settings.directions,
        candidates=settings.candidates,
        h=h,
        kinds=list(versions),
        seed=study.seed,
        estimate=ESTIMATE,
    )
    classes = min(settings.candidates, classifier.num_classes) - 1 if settings.at == "image" else 1
    cost = len(ids) * passes(classes, settings.directions)
    with counter(name, "passes", len(versions) * cost) as advance:
        for kind, images in versions.items():
            advance.doing = kind
            if f"{kind}/score" in cache.rows:
                advance(cost)
                continue
            noise = Noise.for_samples(study.seed, f"detect/{kind}", ids, images.device)
            detection = detect(
                classifier,
                images,
                h=h,
                at=settings.at,
                directions=settings.directions,
                candidates=settings.candidates,
                noise=noise,
                advance=advance,
            )
            cache.rows |= {f"{kind}/{key}": value.cpu().numpy() for key, value in vars(detection).items()}
            cache.write(cache.rows)
    tables = [
        pd.DataFrame(
            {
                "model": name,
                "sample_id": ids,
                "kind": kind,
                "natural_label": near.own.cpu().numpy(),
                **{key: cache.rows[f"{kind}/{key}"] for key in ("label", "score", "classes", "recovered")},
            }
        )
        for kind in versions
    ]
    return pd.concat([*tables, _chosen(tables[2:])], ignore_index=True), h


def _chosen(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """For every image the scale at which its score is lowest: an attacker who knows the detector.

    Images without a score at any scale are left out.
    """
    known = pd.concat(tables, ignore_index=True).dropna(subset=["score"])
    lowest = known.groupby("sample_id", sort=False)["score"].idxmin()
    return known.loc[lowest].assign(kind=CHOSEN)


def _rates(scores: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, dict[str, Points]]:
    """How well every kind of perturbed images of one model is detected, and its ROC curve."""
    natural = scores[scores["kind"] == "natural"].set_index("sample_id")
    rows, curves = [], {}
    for kind in dict.fromkeys([*scores["kind"], CHOSEN]):  # which may have no row
        if kind == "natural":
            continue
        part = scores[scores["kind"] == kind].set_index("sample_id")
        both = part.join(natural["score"].rename("before"), how="inner")
        names = {"model": scores["model"].iloc[0], "perturbed_by": kind}
        rows.append(names | detection_rates(both, len(natural), seed))
        curves[kind] = roc(both)
    return pd.DataFrame(rows), curves


def detection_rates(both: pd.DataFrame, total: int, seed: int) -> dict[str, Any]:
    """How well one kind of perturbed images is detected among the natural ones.

    Args:
        both: a row an image: its score, `before` that of the natural image, the labels and the label that the
            detector restores; scores may be NaN.
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


def roc(both: pd.DataFrame) -> Points:
    """Perturbed images let through, and natural ones kept, per cent, at every threshold; may be empty."""
    known = both.dropna(subset=["score", "before"])
    if not len(known):
        return np.empty(0), np.empty(0)
    scores = np.concatenate([-known["before"], -known["score"]])
    passed, kept, _ = roc_curve(np.repeat([1, 0], len(known)), scores)
    return 100 * passed, 100 * kept


def _natural_row(name: str, scores: pd.DataFrame) -> dict[str, Any]:
    score = scores.loc[scores["kind"] == "natural", "score"].dropna()
    flagged = float((score >= 0).mean())
    unknown = dict.fromkeys(("auc", "best_accuracy", "recovered"), np.nan)
    return {"model": name, "perturbed_by": "natural", "n": len(score), "flagged": flagged, **unknown}


def _percent(key: str) -> Callable[[ModelRow], str]:
    return lambda row: f"{100 * row[key]:.0f} %" if np.isfinite(row[key]) else "-"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "images": lambda row: row["perturbed_by"],
    "n": lambda row: str(row["n"]),
    "AUC": lambda row: f"{row['auc']:.2f}" if np.isfinite(row["auc"]) else "-",
    "95 % CI": lambda row: f"{row['ci_low']:.2f}-{row['ci_high']:.2f}" if np.isfinite(row["auc"]) else "-",
    "flagged": _percent("flagged"),
    "accuracy": _percent("best_accuracy"),
    "restored": _percent("recovered"),
}


def _draw(study: Study, curves: dict[str, dict[str, Points]]) -> Shown:
    """Natural images kept against perturbed ones let through (thesis, Fig. 7.9)."""
    figure = plots.panels(curves, xlabel="perturbed let through (%)", ylabel="natural kept (%)", marks=False)
    for axes in figure.axes:
        axes.plot([0, 100], [0, 100], color=plots.GREY, linewidth=0.6, zorder=0)
    return study.figure(
        "detect",
        figure,
        "Natural images kept against perturbed ones let through",
        "Every threshold is a point; the diagonal is guessing, above it perturbed images score higher. The "
        "axes are those of the thesis' Fig. 7.9.",
    )
