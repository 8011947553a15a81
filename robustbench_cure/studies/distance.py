"""`cure-bench distance`: how far the nearest boundaries are on average.

Source: thesis, Eq. 3.10, Tables 3.1 and 3.2, see `geometry.distance`. rho is the mean over the images of the
smallest perturbation's length divided by the image's own, both in the same norm: the larger, the more robust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import sem
from scipy.stats import t as student
from torch import Tensor

from robustbench_cure.geometry.distance import GRID, SHARE, OneStep, one_step, smallest
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import CONFIDENCE
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Arrays, Columns, ModelRow, Study, counter, open_study, paragraphs
from robustbench_cure.studies.plots import Points, Values
from robustbench_cure.threat import Norm
from robustbench_cure.threat import distance as distance_between

LEAD = paragraphs("""
How far is each image from a change of its predicted label? rho is the average robustness of the thesis: the
mean length of the smallest perturbation, divided by the image's own. It is found by DeepFool, which may miss
a shorter one: the number is an upper bound. "Steps" are its iterations; the thesis needs fewer than 3.

FGSM is rho by a single step of the gradient's sign, one length (eps, in grey levels) for all images, long
enough to change 90 % of them; where no length is, the largest share that any changes stands in its place.
The thesis finds it four to five times as long on CIFAR-10: one step says little about distances.

Predictions, right or wrong, and no box: robust accuracy is another number.
""")
#: Norms in figures.
SYMBOLS = {"l2": "l2", "linf": "l∞"}
CAPTION = "Share of the images whose nearest boundary, as DeepFool finds it, is farther than that."


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        norms: in which distances are measured.
    """

    norms: tuple[Norm, ...] = ("l2", "linf")


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    return measure(open_study("distance", request, default_n=1000), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Average robustness by DeepFool and by one step, a row for each model and norm.

    An interrupted run is continued.
    """
    norms, images, rows = settings.norms, [], []
    curves: dict[str, dict[str, Points]] = {SYMBOLS[norm]: {} for norm in norms}
    for name, classifier in study.models.items():
        by_norm = _distances(study, name, norms)
        with counter(name, "radii", len(GRID), "FGSM") as advance:
            step = one_step(classifier, study.images, advance)
        for norm in norms:
            table = _images(study, name, norm, by_norm[norm], step)
            images.append(table)
            rows.append(_row(table, step))
            curves[SYMBOLS[norm]][name] = _share_farther(table["distance"].to_numpy())
    study.table("distance-images", pd.concat(images, ignore_index=True))
    result = pd.DataFrame(rows)
    figure = plots.panels(
        curves, xlabel="distance of the boundary (pixels)", ylabel="images farther (%)", marks=False
    )
    study.present(
        result,
        _columns(len(study.data)),
        title="Distance of the nearest boundary",
        lead=LEAD,
        figures=[
            study.figure("distance", figure, "Images whose boundary is farther than a distance", CAPTION)
        ],
        settings={
            "norms": ", ".join(norms),
            "attack": "DeepFool to the nearest boundary, 2 % past it, not cut to the box",
            "FGSM": f"one step for all images, long enough for {100 * SHARE:.0f} % of them",
        },
    )
    return result


def _distances(study: Study, name: str, norms: tuple[Norm, ...]) -> dict[Norm, Arrays]:
    """Length and steps of every image, by norm."""
    classifier = study.models[name]
    cache = study.cache(name, norms=",".join(norms))
    with counter(name, "images", len(study.data) * len(norms)) as advance:

        def measure_in(norm: Norm) -> Arrays:
            def columns(rows: range) -> Mapping[str, Tensor]:
                return vars(smallest(classifier, study.images[rows.start : rows.stop], norm=norm))

            advance.doing = f"DeepFool, {norm}"
            size, prefix = classifier.batch_size, f"{norm}/"
            return study.by_image(cache, columns, size=size, prefix=prefix, advance=advance)

        return {norm: measure_in(norm) for norm in norms}


def _images(study: Study, name: str, norm: Norm, rows: Arrays, step: OneStep) -> pd.DataFrame:
    """One row an image: the distance, the image's own norm, and their ratio."""
    size = distance_between(norm, torch.zeros_like(study.images).double(), study.images.double()).numpy()
    length = rows["length"].astype(np.float64)
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
            "steps": rows["steps"].astype(np.int64),
            "rho_fgsm": rho_fgsm,
        }
    )


def _row(table: pd.DataFrame, step: OneStep) -> dict[str, Any]:
    """The average robustness of one model in one norm, with Student's interval."""
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


def _share_farther(length: Values) -> Points:
    """Per cent of the images with a boundary farther than each distance; those without one never end."""
    near = np.sort(length[np.isfinite(length)])
    share = 100 * (1 - np.arange(len(near) + 1) / max(len(length), 1))
    return np.repeat(np.concatenate([[0.0], near]), 2)[1:], np.repeat(share, 2)[:-1]


def _columns(images: int) -> Columns:
    """Cells of the page; ``images``: of the study."""

    def reached(row: ModelRow) -> bool:
        return bool(row["changed_by_fgsm"] >= SHARE)

    return {
        "model": lambda row: row["model"],
        "norm": lambda row: row["norm"],
        "n": lambda row: f"{row['n']}/{images}",
        "rho": lambda row: f"{row['rho']:.2g}",
        "95 % CI": lambda row: f"{row['ci_low']:.2g}-{row['ci_high']:.2g}",
        "median": lambda row: f"{row['median_distance']:.3g}",
        "steps": lambda row: f"{row['steps']:.1f}",
        "FGSM": lambda row: (
            f"{row['rho_fgsm']:.2g}" if reached(row) else f"{100 * row['changed_by_fgsm']:.0f} %"
        ),
        "eps": lambda row: f"{255 * row['eps_fgsm']:.3g}" if reached(row) else "-",
    }
