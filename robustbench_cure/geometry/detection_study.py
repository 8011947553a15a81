"""`cure-bench detect`: are perturbed images told from natural ones by curvature, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.metrics import roc_curve
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import figures, prose
from robustbench_cure.geometry.boundary import nearest_boundary
from robustbench_cure.geometry.detection import At, detect
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.kept import Kept
from robustbench_cure.geometry.page import Shown, present
from robustbench_cure.geometry.study import Study
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import CONFIDENCE

Values = NDArray[np.float64]

#: Resamples of the images behind an interval.
RESAMPLES = 2000


def detection(
    study: Study, *, at: At, scales: list[float], step: float | None, directions: int, candidates: int
) -> pd.DataFrame:
    """Scores of natural and perturbed images, and how well they are told apart (thesis, Fig. 7.9); the table.

    Perturbed images are x + a r, with DeepFool's r (l2, past the nearest boundary by 2 %) and every scale a;
    beside them noise of r's own length, and an attacker who takes for each image the scale of lowest score.

    Args:
        study: models, images, folder, seed.
        at: where the detector takes curvature, as `detect` names it.
        scales: of the perturbation, ascending, at least 1.
        step: of the curvature, l2 in pixels; None: the median distance of each model's boundaries.
        directions: random ones an image.
        candidates: classes that the detector considers.

    What an interrupted run finished is taken over.

    Raises:
        UsageError: fewer than two images, or a model without a boundary near them.
    """
    if len(study.data) < 2:
        raise UsageError("--n 1: telling images apart needs at least 2")
    samples, rows, steps = [], [], []
    curves: dict[str, dict[str, tuple[Values, Values]]] = {}
    for name, classifier in study.models.items():
        table, h = _scores(study, name, classifier, at, scales, step, directions, candidates)
        samples.append(table)
        steps.append(f"{h:.3g} ({name})")
        natural = table[table["kind"] == "natural"].set_index("sample_id")
        curves[name] = {}
        for kind, part in table.groupby("kind", sort=False):
            if kind == "natural":
                continue
            both = part.set_index("sample_id").join(natural["score"].rename("before"), how="inner")
            rows.append(_row(name, str(kind), both, study.seed))
            curves[name][str(kind)] = _roc(both)
    study.table("detect-images", pd.concat(samples, ignore_index=True))
    result = pd.DataFrame(rows)
    study.table("detect", result)
    figure = figures.panels(
        curves, xlabel="perturbed let through (%)", ylabel="natural kept (%)", marks=False
    )
    for axes in figure.axes:
        axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.6, zorder=0)
    files = figures.save(figure, study.out / "detect")
    study.files += files
    present(
        study,
        title="Detection by curvature",
        lead=prose.DETECTION,
        columns=("model", "added", "n", "AUC", "95 % CI", "flagged", "false", "best", "back"),
        rows=[_cells(row) for row in result.to_dict("records")],
        figures=[Shown(files[0], "Natural images kept against perturbed ones let through", _CAPTION)],
        settings={
            "curvature_at": f"the {at}",
            "step_h": ", ".join(steps),
            "directions": directions,
            "classes": candidates if at == "image" else 2,
            "scales": ", ".join(f"{scale:g}" for scale in scales),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
    )
    return result


_CAPTION = (
    "Every threshold is a point; the diagonal is guessing, above it perturbed images score higher. The axes "
    "are those of the thesis' Fig. 7.9."
)


def _scores(
    study: Study,
    name: str,
    classifier: Classifier,
    at: At,
    scales: list[float],
    step: float | None,
    directions: int,
    candidates: int,
) -> tuple[pd.DataFrame, float]:
    """What the detector says about all versions of all images near a boundary; the step that was used."""
    near = nearest_boundary(classifier, study.images)
    near_rows = near.found.cpu()
    if int(near_rows.sum()) < 2:
        raise UsageError(f"{name}: DeepFool finds no boundary near the images, so there is nothing to detect")
    ids = [sample for sample, found in zip(study.data.ids, near_rows.tolist(), strict=True) if found]
    x = study.images.to(classifier.device)[near.found]
    r, own = (near.beyond[near.found] - x), near.own[near.found]
    h = float(near.distance[near.found].median()) if step is None else step
    noise = Noise.for_samples(study.seed, "detect/added", ids, x.device)
    versions = versions_of(x, r, scales, noise)
    settings = {
        "at": at,
        "h": h,
        "directions": directions,
        "classes": candidates,
        "scales": scales,
        "seed": study.seed,
    }
    kept = Kept(study.out / f"detect-{name}.npz", study.identity(name, **settings))
    found: dict[str, NDArray[np.generic]] = dict(kept.rows)
    classes = min(candidates, classifier.num_classes) - 1 if at == "image" else 1
    passes = len(x) * 2 * (directions + classes)  # before and behind each image: directions, normals
    with ProgressLine(name, "passes") as line:
        for place, (kind, images) in enumerate(versions.items()):
            if f"{kind}/score" in found:
                continue
            counter = _Counter(line, kind, place * passes, len(versions) * passes)
            streams = Noise.for_samples(study.seed, f"detect/{kind}", ids, x.device)
            said = detect(
                classifier,
                images,
                h=h,
                at=at,
                directions=directions,
                candidates=candidates,
                noise=streams,
                advance=counter,
            )
            columns = {"label": said.label, "score": said.score, "recovered": said.recovered}
            found |= {f"{kind}/{key}": value.cpu().numpy() for key, value in columns.items()}
            kept.write(found)
    study.files.append(kept.path)
    tables = [
        pd.DataFrame(
            {
                "model": name,
                "sample_id": ids,
                "kind": kind,
                "natural_label": own.cpu().numpy(),
                **{key: found[f"{kind}/{key}"] for key in ("label", "score", "recovered")},
            }
        )
        for kind in versions
    ]
    tables.append(_chosen(tables[2:]))
    return pd.concat(tables, ignore_index=True), h


def versions_of(x: Tensor, r: Tensor, scales: list[float], noise: Noise) -> dict[str, Tensor]:
    """What the detector is shown: images as they are, with noise of r's length, with every multiple of r.

    Args:
        x: images, float32 (B,C,H,W).
        r: perturbations, shape of x.
        scales: multiples.
        noise: one stream a row.
    """
    length = r.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    added = length * on_sphere(noise, tuple(x.shape[1:]), 0)
    return {"natural": x, "noise": x + added} | {f"{scale:g} r": x + scale * r for scale in scales}


class _Counter:
    """Passes done, for the progress line."""

    def __init__(self, line: ProgressLine, doing: str, done: int, total: int) -> None:
        self.line, self.doing, self.done, self.total = line, doing, done, total

    def __call__(self, n: int) -> None:
        self.done += n
        self.line(self.done, self.total, self.doing)


def _chosen(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """For every image the scale at which its score is lowest: an attacker who knows the detector."""
    every = pd.concat(tables, ignore_index=True)
    lowest = every.groupby("sample_id", sort=False)["score"].idxmin()
    return every.loc[lowest.dropna()].assign(kind="chosen r")


def auc(natural: Values, perturbed: Values) -> float:
    """Share of pairs in which the perturbed image has the higher score, ties counting half."""
    return float(mannwhitneyu(perturbed, natural).statistic) / (len(natural) * len(perturbed))


def _row(name: str, kind: str, both: pd.DataFrame, seed: int) -> dict[str, Any]:
    """How well one kind of perturbed images is told from the natural ones."""
    known = both.dropna(subset=["score", "before"])
    before, after = known["before"].to_numpy(), known["score"].to_numpy()
    low, high = _interval(before, after, seed)
    flagged = after >= 0
    changed = (known["label"] != known["natural_label"]).to_numpy()
    caught = flagged & changed
    right = (known["recovered"] == known["natural_label"]).to_numpy()
    passed, kept = _roc(known)
    return {
        "model": name,
        "perturbed_by": kind,
        "n": len(known),
        "left_out": len(both) - len(known),
        "auc": auc(before, after),
        "ci_low": low,
        "ci_high": high,
        "label_changed": float(changed.mean()),
        "flagged": float(flagged.mean()),
        "false_alarms": float((before >= 0).mean()),
        "best_accuracy": float((kept + 100 - passed).max()) / 200,
        "recovered": float(right[caught].mean()) if caught.any() else float("nan"),
    }


def _interval(before: Values, after: Values, seed: int) -> tuple[float, float]:
    """Of the AUC, by resampling images, each with both of its scores; percentiles."""

    def statistic(a: Values, b: Values, axis: int) -> Values:
        pairs = a.shape[axis] * b.shape[axis]
        share: Values = mannwhitneyu(b, a, axis=axis).statistic / pairs
        return share

    found = bootstrap(
        (before, after),
        statistic,
        paired=True,
        n_resamples=RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(found.low), float(found.high)


def _roc(both: pd.DataFrame) -> tuple[Values, Values]:
    """Perturbed images let through, and natural ones kept, per cent, at every threshold."""
    known = both.dropna(subset=["score", "before"])
    scores = np.concatenate([-known["before"], -known["score"]])
    passed, kept, _ = roc_curve(np.repeat([1, 0], len(known)), scores)
    return 100 * passed, 100 * kept


def _cells(row: dict[Hashable, Any]) -> list[str]:
    return [
        row["model"],
        row["perturbed_by"],
        str(row["n"]),
        f"{row['auc']:.2f}",
        f"{row['ci_low']:.2f}-{row['ci_high']:.2f}",
        f"{100 * row['flagged']:.0f} %",
        f"{100 * row['false_alarms']:.0f} %",
        f"{100 * row['best_accuracy']:.0f} %",
        f"{100 * row['recovered']:.0f} %" if np.isfinite(row["recovered"]) else "-",
    ]
