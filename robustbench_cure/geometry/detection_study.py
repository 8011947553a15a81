"""`cure-bench detect`: are perturbed images told from natural ones by curvature, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.boundary_study import nearest_of, refuse_longer
from robustbench_cure.geometry.detection import At, detect
from robustbench_cure.geometry.detection_scores import roc, told_apart
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.mean_curvature import ESTIMATE, passes
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

Values = NDArray[np.float64]
Curves = dict[str, tuple[Values, Values]]


#: The attacker who knows the detector, among the kinds of images.
CHOSEN = "chosen r"


@dataclass(frozen=True)
class Detector:
    """What `detect` is asked for, but the step, which is each model's own."""

    at: At
    directions: int
    candidates: int


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
        UsageError: fewer than two images, a model without a boundary near them, a step longer than the box.
    """
    if len(study.data) < 2:
        raise UsageError("--n 1: telling images apart needs at least 2")
    refuse_longer("--step", step, study.images[0].numel())
    detector = Detector(at, directions, candidates)
    samples, rows, cells, steps = [], [], [], []
    curves: dict[str, Curves] = {}
    for name, classifier in study.models.items():
        table, h = _scores(study, name, classifier, detector, scales, step)
        judged, curves[name] = _judged(table, study.seed)
        rows.append(judged.assign(step=h))
        cells += [_natural_cells(name, table), *(_cells(row) for row in judged.to_dict("records"))]
        samples.append(table)
        steps.append(f"{h:.3g} ({name})")
    study.table("detect-images", pd.concat(samples, ignore_index=True))
    result = pd.concat(rows, ignore_index=True)
    study.table("detect", result)
    present(
        study,
        title="Detection by curvature",
        lead=prose.DETECTION,
        columns=("model", "images", "n", "AUC", "95 % CI", "flagged", "accuracy", "restored"),
        rows=cells,
        figures=[_draw(study, curves)],
        settings={
            "curvature_at": f"the {at}",
            "step_h": ", ".join(steps),
            "directions": directions,
            "classes": candidates if at == "image" else 2,
            "scales": ", ".join(f"{scale:g}" for scale in scales),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
        note=_NOTE,
    )
    return result


_NOTE = """\
a r: the smallest perturbation times a; chosen r: the least suspicious of these.
flagged: called perturbed, natural images by mistake; accuracy: at the threshold
best for other images; restored: changed labels found again, where flagged."""


def _judged(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, Curves]:
    """How well every kind of perturbed images of one model is told from its natural ones; their curves."""
    natural = table[table["kind"] == "natural"].set_index("sample_id")
    rows, curves = [], {}
    for kind in dict.fromkeys([*table["kind"], CHOSEN]):  # which may have no row
        if kind == "natural":
            continue
        part = table[table["kind"] == kind].set_index("sample_id")
        both = part.join(natural["score"].rename("before"), how="inner")
        about = {"model": table["model"].iloc[0], "perturbed_by": kind}
        rows.append(about | told_apart(both, len(natural), seed))
        curves[kind] = roc(both)
    return pd.DataFrame(rows), curves


def _scores(
    study: Study,
    name: str,
    classifier: Classifier,
    detector: Detector,
    scales: list[float],
    step: float | None,
) -> tuple[pd.DataFrame, float]:
    """What the detector says about all versions of all images near a boundary; the step that was used."""
    near = nearest_of(name, classifier, study.images)
    rows = near.found.nonzero().flatten().cpu()
    if len(rows) < 2:
        raise UsageError(f"{name}: DeepFool finds no boundary near the images, so there is nothing to detect")
    near, ids = near[rows], [study.data.ids[row] for row in rows.tolist()]
    x = study.images[rows].to(classifier.device)
    h = float(near.distance.median()) if step is None else step
    noise = Noise.for_samples(study.seed, "detect/added", ids, x.device)
    versions = versions_of(x, near.beyond - x, scales, noise)
    found = _looked_at(study, name, classifier, detector, versions, ids, h)
    about = {"model": name, "sample_id": ids}
    columns = ("label", "score", "classes", "recovered")
    tables = [
        pd.DataFrame(
            about
            | {"kind": kind, "natural_label": near.own.cpu().numpy()}
            | {key: found[f"{kind}/{key}"] for key in columns}
        )
        for kind in versions
    ]
    tables.append(_chosen(tables[2:]))
    return pd.concat(tables, ignore_index=True), h


def _looked_at(
    study: Study,
    name: str,
    classifier: Classifier,
    detector: Detector,
    versions: dict[str, Tensor],
    ids: list[str],
    h: float,
) -> dict[str, NDArray[np.generic]]:
    """What the detector says, ``<kind>/<column>`` (n,); finished kinds are taken over."""
    settings = {"h": h, "kinds": list(versions), "seed": study.seed, "estimate": ESTIMATE}
    identity = study.identity(name, **asdict(detector), **settings)
    kept = Kept(study.out / f"detect-{name}.npz", identity)
    found: dict[str, NDArray[np.generic]] = dict(kept.rows)
    classes = min(detector.candidates, classifier.num_classes) - 1 if detector.at == "image" else 1
    each = len(ids) * passes(classes, detector.directions)
    with ProgressLine(name, "passes") as line:
        for place, (kind, images) in enumerate(versions.items()):
            if f"{kind}/score" in found:
                continue
            counter = _Counter(line, kind, place * each, len(versions) * each)
            noise = Noise.for_samples(study.seed, f"detect/{kind}", ids, images.device)
            said = detect(classifier, images, h=h, noise=noise, advance=counter, **asdict(detector))
            found |= {f"{kind}/{key}": value.cpu().numpy() for key, value in vars(said).items()}
            kept.write(found)
    study.files.append(kept.path)
    return found


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
    """For every image the scale at which its score is lowest: an attacker who knows the detector.

    Images without a score at any scale are left out.
    """
    known = pd.concat(tables, ignore_index=True).dropna(subset=["score"])
    lowest = known.groupby("sample_id", sort=False)["score"].idxmin()
    return known.loc[lowest].assign(kind=CHOSEN)


def _natural_cells(name: str, table: pd.DataFrame) -> list[str]:
    score = table.loc[table["kind"] == "natural", "score"].dropna()
    return [name, "natural", str(len(score)), "-", "-", _percent(float((score >= 0).mean())), "-", "-"]


def _cells(row: dict[Hashable, Any]) -> list[str]:
    known = np.isfinite(row["auc"])
    return [
        row["model"],
        row["perturbed_by"],
        str(row["n"]),
        f"{row['auc']:.2f}" if known else "-",
        f"{row['ci_low']:.2f}-{row['ci_high']:.2f}" if known else "-",
        *(_percent(row[key]) for key in ("flagged", "best_accuracy", "recovered")),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if np.isfinite(share) else "-"


def _draw(study: Study, curves: dict[str, Curves]) -> Shown:
    """Natural images kept against perturbed ones let through (thesis, Fig. 7.9)."""
    figure = figures.panels(
        curves, xlabel="perturbed let through (%)", ylabel="natural kept (%)", marks=False
    )
    for axes in figure.axes:
        axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.6, zorder=0)
    files = figures.save(figure, study.out / "detect")
    study.files += files
    return Shown(
        files[0],
        "Natural images kept against perturbed ones let through",
        "Every threshold is a point; the diagonal is guessing, above it perturbed images score higher. The "
        "axes are those of the thesis' Fig. 7.9.",
    )
