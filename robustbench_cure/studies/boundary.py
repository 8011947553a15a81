"""`cure-bench boundary`: distance and curvature of the nearest boundaries.

Source: thesis, section 7.4, Fig. 7.5 and Table 7.2, see `geometry.boundary`. The sign of the mean curvature
is what to read: negative near natural images, whose boundaries bend away, positive near images moved just
past the boundary, towards which it bends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.boundary import (
    ESTIMATE,
    Nearest,
    cosine_to_normal,
    mean_curvatures,
    nearest_boundary,
    principal_curvatures,
    steps_of,
)
from robustbench_cure.geometry.hessian import Basis, random_basis
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
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
from robustbench_cure.studies.plots import Values

#: Inputs up to which all principal curvatures are computed.
DENSE = 4096

LEAD = paragraphs("""
How the nearest boundary of each image bends: principal curvatures, from the most positive, where the
boundary bends towards the image, to the most negative, where it bends away. The thesis finds most of them
near zero, and more bending away than towards.

Finite differences whose step is the distance of the boundary, unless the settings say otherwise: the
boundary of a piecewise linear network is curved at that scale only. "Curvature" is the mean over all
directions, "largest" and "smallest" are the extreme principal curvatures, all of them averaged over the
images. "Away" counts the images whose boundary bends away from them on average; "towards" the minimally
perturbed images whose nearest boundary bends towards them: mostly the same boundary seen from its other side.
Both are out of the boundaries with a known curvature.

Each is the boundary near the point where DeepFool ends, which need not be the nearest one of all: "cosine" in
the files is that between its perturbation and the normal of the boundary, 1 at the nearest point.
""")
NOTE = """\
away: boundaries that bend away from their image (mean curvature below 0);
towards: those that bend towards an image moved just past them."""


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        step: of the differences, l2 in pixels; None: each image's distance of the boundary, also for its
            perturbed version, which lies next to it.
        directions: random ones of the mean curvature, for each image.
        basis: of the tangent space, along which the steps of the principal curvatures are taken.
        profile: whether to take all principal curvatures, up to `DENSE` inputs: 2 (d - 1) gradients an image.
    """

    step: float | None = None
    directions: int = 100
    basis: Basis = "random"
    profile: bool = True


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    refuse_step(settings.step)
    return measure(open_study("boundary", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Principal and mean curvatures of the nearest boundaries; one row a model.

    An interrupted run is continued.

    Raises:
        UsageError: the step is longer than the box.
    """
    refuse_longer("--step", settings.step, study.inputs)
    dense = settings.profile and study.inputs <= DENSE
    samples: dict[str, pd.DataFrame] = {}
    profiles: dict[str, Values] = {}
    for name, classifier in study.models.items():
        near = nearest_of(name, classifier, study.images)
        table = samples[name] = _both_sides(study, name, near, settings)
        if dense:
            values = _principal(study, name, near, settings)
            profiles[name] = values[~np.isnan(values).any(1)]
            table["largest"], table["smallest"] = values[:, 0], values[:, -1]
    study.table("boundary-images", pd.concat(samples.values(), ignore_index=True))
    result = pd.DataFrame([_row(name, table) for name, table in samples.items()])
    none = f"none: more than {DENSE} inputs" if settings.profile else "none asked for"
    study.present(
        result,
        COLUMNS if dense else {head: cell for head, cell in COLUMNS.items() if head not in EXTREMES},
        title="Curvature of the boundary",
        lead=LEAD,
        figures=[*_draw_profiles(study, profiles), _draw_means(study, samples)],
        settings={
            "step_h": "the distance of each image's boundary" if settings.step is None else settings.step,
            "directions": settings.directions,
            "principal_curvatures": f"all, {settings.basis} basis" if dense else none,
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
        note=NOTE,
    )
    return result


def nearest_of(name: str, classifier: Classifier, images: Tensor) -> Nearest:
    """The nearest boundary of every image, in passes of the batch size; progress under the model's name."""
    parts = []
    with counter(name, "images", len(images), "nearest boundary") as advance:
        for batch in torch.split(images, classifier.batch_size):
            parts.append(nearest_boundary(classifier, batch))
            advance(len(batch))
    return Nearest(**{key: torch.cat([getattr(part, key) for part in parts]) for key in vars(parts[0])})


def _both_sides(study: Study, name: str, near: Nearest, settings: Settings) -> pd.DataFrame:
    """Distance and mean curvature of the boundary near each image, and near its perturbed version."""
    classifier, step, directions = study.models[name], settings.step, settings.directions
    cache = study.cache(name, h=step, directions=directions, seed=study.seed, estimate=ESTIMATE)

    def columns(rows: range) -> Mapping[str, Tensor]:
        part = near[torch.tensor(rows)]
        beyond = nearest_boundary(classifier, part.beyond)
        ids = study.data.ids[rows.start : rows.stop]
        h = steps_of(part, step)
        cosine = cosine_to_normal(classifier, study.images[rows.start : rows.stop], part)
        means = {}
        for key, side in (("natural", part), ("perturbed", beyond)):
            noise = Noise.for_samples(study.seed, f"boundary/{key}", ids, classifier.device)
            means[key] = _mean(classifier, side, h, noise, directions)
        return {
            "label": part.own,
            "other": part.other,
            "distance": part.distance,
            "step": h,
            "cosine": cosine,
            **means,
        }

    with counter(name, "images", len(study.data), "mean curvature") as advance:
        return study.samples(
            name, study.by_image(cache, columns, size=classifier.batch_size, advance=advance)
        )


def _mean(classifier: Classifier, near: Nearest, h: Tensor, noise: Noise, directions: int) -> Tensor:
    """Mean curvature of the boundary at its point nearest to each row, float64 (B,); NaN without one."""
    usable = near.exists & ~h.isnan()
    mean = torch.full_like(near.distance, torch.nan)
    if bool(usable.any()):
        at = near[usable]
        mean[usable] = mean_curvatures(
            classifier,
            at.point,
            at.own,
            at.other[:, None],
            h=h[usable],
            directions=directions,
            noise=noise[usable],
        )[:, 0]
    return mean


def _principal(study: Study, name: str, near: Nearest, settings: Settings) -> Values:
    """All principal curvatures of every image, (n, d - 1), descending; NaN where there is no boundary."""
    classifier, d, basis = study.models[name], study.inputs, settings.basis
    cache = study.cache(name, "curvatures", h=settings.step, basis=basis, seed=study.seed)
    h = steps_of(near, settings.step)
    rotation = None if basis == "canonical" else random_basis(d - 1, study.seed, classifier.device)
    cost = 2 * (d - 1)
    with counter(name, "gradients", len(study.data) * cost, "principal curvatures") as advance:

        def columns(rows: range) -> Mapping[str, Tensor]:
            (row,) = rows
            if not bool(near.exists[row]):
                return {"curvatures": torch.full((1, d - 1), torch.nan)}
            at = near.point[row], near.own[row], near.other[row]
            values = principal_curvatures(
                classifier, *at, h=float(h[row]), rotation=rotation, advance=advance
            )
            return {"curvatures": values[None]}

        rows = study.by_image(cache, columns, size=1, advance=advance, cost=cost)
    return rows["curvatures"].astype(np.float64)


def _row(name: str, table: pd.DataFrame) -> dict[str, Any]:
    """Of one model; boundaries without a gradient have no curvature, and are missing from its counts."""
    row: dict[str, Any] = {"model": name, "n": int(table["distance"].notna().sum()), "of": len(table)}
    row["distance"] = float(table["distance"].median())
    row["cosine"] = float(table["cosine"].median())
    for side, sign in (("natural", -1), ("perturbed", 1)):
        known = table[side].dropna()
        rate = Rate(int((sign * known > 0).sum()), len(known))
        row[f"{side}_n"] = rate.total
        row[f"{side}_mean"] = float(known.mean())
        row[f"{side}_expected"] = rate.value
        row[f"{side}_ci_low"], row[f"{side}_ci_high"] = rate.interval if rate.total else (float("nan"),) * 2
    return row | {key: float(table[key].mean()) for key in EXTREMES if key in table}


#: Columns of the extreme principal curvatures.
EXTREMES = ("largest", "smallest")


def _number(key: str, form: str) -> Callable[[ModelRow], str]:
    return lambda row: f"{row[key]:{form}}" if np.isfinite(row[key]) else "-"


def _counted(side: str) -> Callable[[ModelRow], str]:
    """Boundaries of the expected sign, out of those with a known one."""

    def cell(row: ModelRow) -> str:
        n = row[f"{side}_n"]
        return f"{round(row[f'{side}_expected'] * n) if n else 0}/{n}"

    return cell


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "distance": _number("distance", ".3f"),
    "curvature": _number("natural_mean", ".2g"),
    "largest": _number("largest", ".3g"),
    "smallest": _number("smallest", ".3g"),
    "away": _counted("natural"),
    "towards": _counted("perturbed"),
}


def _draw_profiles(study: Study, profiles: dict[str, Values]) -> list[Shown]:
    """Curvatures by rank, averaged over the images."""
    profiles = {name: values for name, values in profiles.items() if len(values)}
    if not profiles:
        return []
    series, bands, tables = {}, {}, []
    for name, values in profiles.items():
        index, mean, std = np.arange(values.shape[1], dtype=np.float64), values.mean(0), values.std(0)
        series[name], bands[name] = (index, mean), (mean - std, mean + std)
        tables.append(pd.DataFrame({"model": name, "index": index.astype(int), "mean": mean, "std": std}))
    study.table("profile", pd.concat(tables, ignore_index=True))
    figure = plots.lines(series, xlabel="index", ylabel="principal curvature (1/pixel)", bands=bands)
    caption = (
        "Principal curvatures of each image's nearest boundary, sorted and averaged by rank; the band is one "
        "standard deviation."
    )
    return [study.figure("profile", figure, "Principal curvatures of the boundary", caption)]


def _draw_means(study: Study, samples: dict[str, pd.DataFrame]) -> Shown:
    """Distribution of the mean curvature, near the images and near their perturbed versions."""
    curves: dict[str, dict[str, plots.Points]] = {}
    for name, table in samples.items():
        curves[name] = {}
        for side in ("natural", "perturbed"):
            known = np.sort(table[side].dropna().to_numpy())
            curves[name][side] = (known, 100 * np.arange(1, len(known) + 1) / max(len(known), 1))
    figure = plots.panels(
        curves, xlabel="mean curvature (1/pixel)", ylabel="images up to here (%)", marks=False
    )
    for axes in figure.axes:
        plots.reference(axes, vertical=True)
    return study.figure(
        "mean",
        figure,
        "Mean curvature of the boundary",
        "Mean curvature of the boundary nearest to the images, and of the one nearest to the images moved "
        "past it. The thesis finds the first left of zero and the second right of it.",
    )
