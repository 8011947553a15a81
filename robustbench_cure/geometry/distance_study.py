"""`cure-bench distance`: how far the nearest boundaries are on average, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import sem
from scipy.stats import t as student

from robustbench_cure.classifier import Classifier
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.distance import GRID, SHARE, OneStep, one_step, smallest
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import CONFIDENCE
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present
from robustbench_cure.threat import Norm, distance

Values = NDArray[np.float64]

NAMES = {"l2": "l2", "linf": "l∞"}


def distances(study: Study, *, norms: tuple[Norm, ...]) -> pd.DataFrame:
    """Average robustness by DeepFool and by one step (thesis, Tables 3.1 and 3.2); the table.

    Args:
        study: models, images, folder.
        norms: in which distances are measured.

    What an interrupted run finished is taken over.
    """
    samples, rows = [], []
    curves: dict[str, dict[str, tuple[Values, Values]]] = {NAMES[norm]: {} for norm in norms}
    for name, classifier in study.models.items():
        found = _distances(study, name, classifier, norms)
        with ProgressLine(name, "radii") as line:
            step = _one_step(classifier, study, line)
        for norm in norms:
            table = _table(study, name, norm, found, step)
            samples.append(table)
            rows.append(_row(table, step))
            curves[NAMES[norm]][name] = _beyond(table["distance"].to_numpy())
    study.table("distance-images", pd.concat(samples, ignore_index=True))
    result = pd.DataFrame(rows)
    study.table("distance", result)
    figure = figures.panels(
        curves, xlabel="distance of the boundary (pixels)", ylabel="images farther (%)", marks=False
    )
    files = figures.save(figure, study.out / "distance")
    study.files += files
    present(
        study,
        title="Distance of the nearest boundary",
        lead=prose.DISTANCE,
        columns=("model", "norm", "n", "rho", "95 % CI", "median", "steps", "FGSM", "eps"),
        rows=[_cells(row, len(study.data)) for row in result.to_dict("records")],
        figures=[Shown(files[0], "Images whose boundary is farther than a distance", _CAPTION)],
        settings={
            "norms": ", ".join(norms),
            "attack": "DeepFool to the nearest boundary, 2 % past it, not cut to the box",
            "FGSM": f"one step for all images, long enough for {100 * SHARE:.0f} % of them",
        },
    )
    return result


_CAPTION = "Share of the images whose nearest boundary, as DeepFool finds it, is farther than that."


def _distances(
    study: Study, name: str, classifier: Classifier, norms: tuple[Norm, ...]
) -> dict[str, NDArray[np.generic]]:
    """Length and steps of every image, by norm."""
    kept = Kept(study.out / f"distance-{name}.npz", study.identity(name, norms=",".join(norms)))
    found = dict(kept.rows)
    n, total = len(study.data), len(study.data) * len(norms)
    with ProgressLine(name, "images") as line:
        for place, norm in enumerate(norms):
            keys = f"{norm}/length", f"{norm}/steps"
            parts = [found.get(key, np.zeros(0)) for key in keys]
            for start in range(len(parts[0]), n, classifier.batch_size):
                new = smallest(classifier, study.images[start : start + classifier.batch_size], norm=norm)
                parts = [
                    np.concatenate([old, values.numpy()])
                    for old, values in zip(parts, (new.length, new.steps), strict=True)
                ]
                found |= zip(keys, parts, strict=True)
                kept.keep(found)
                line(place * n + len(parts[0]), total, f"DeepFool, {norm}")
            kept.write(found)
    study.files.append(kept.path)
    return found


def _one_step(classifier: Classifier, study: Study, line: ProgressLine) -> OneStep:
    tried = 0

    def advance(count: int) -> None:
        nonlocal tried
        tried += count
        line(tried, len(GRID), "FGSM")

    return one_step(classifier, study.images, advance)


def _table(
    study: Study, name: str, norm: Norm, found: dict[str, NDArray[np.generic]], step: OneStep
) -> pd.DataFrame:
    size = distance(norm, torch.zeros_like(study.images).double(), study.images.double()).numpy()
    length = found[f"{norm}/length"].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho, rho_fgsm = (
            np.where(size > 0, values / size, np.nan) for values in (length, step.lengths(norm).numpy())
        )
    return pd.DataFrame(
        {
            "model": name,
            "norm": norm,
            "sample_id": study.data.ids,
            "distance": length,
            "image_norm": size,
            "rho": rho,
            "steps": found[f"{norm}/steps"].astype(np.int64),
            "rho_fgsm": rho_fgsm,
        }
    )


def _row(table: pd.DataFrame, step: OneStep) -> dict[str, Any]:
    known = table[table["rho"].notna()]
    rho = known["rho"].to_numpy()
    mean = float(rho.mean()) if len(rho) else float("nan")
    low, high = student.interval(CONFIDENCE, len(rho) - 1, mean, sem(rho)) if len(rho) > 1 else (np.nan,) * 2
    return {
        "model": table["model"].iloc[0],
        "norm": table["norm"].iloc[0],
        "n": len(known),
        "rho": mean,
        "ci_low": float(low),
        "ci_high": float(high),
        "std": float(rho.std(ddof=1)) if len(rho) > 1 else float("nan"),
        "median_distance": float(known["distance"].median()),
        "steps": float(known["steps"].mean()),
        "rho_fgsm": float(table["rho_fgsm"].mean()) if step.reached else float("nan"),
        "eps_fgsm": step.eps,
        "changed_by_fgsm": step.changed,
    }


def _beyond(length: Values) -> tuple[Values, Values]:
    """Per cent of the images with a boundary farther than each distance; those without one never end."""
    near = np.sort(length[np.isfinite(length)])
    share = 100 * (1 - np.arange(len(near) + 1) / max(len(length), 1))
    return np.repeat(np.concatenate([[0.0], near]), 2)[1:], np.repeat(share, 2)[:-1]


def _cells(row: dict[Hashable, Any], of: int) -> list[str]:
    reached = row["changed_by_fgsm"] >= SHARE
    return [
        row["model"],
        row["norm"],
        f"{row['n']}/{of}",
        f"{row['rho']:.2g}",
        f"{row['ci_low']:.2g}-{row['ci_high']:.2g}",
        f"{row['median_distance']:.3g}",
        f"{row['steps']:.1f}",
        f"{row['rho_fgsm']:.2g}" if reached else f"{100 * row['changed_by_fgsm']:.0f} %",
        f"{255 * row['eps_fgsm']:.3g}" if reached else "-",
    ]
