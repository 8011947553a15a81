"""`cure-bench boundary`: distance and principal curvatures of the nearest boundaries, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.boundary import (
    Nearest,
    cosine_to_normal,
    nearest_boundary,
    principal_curvatures,
)
from robustbench_cure.geometry.mean_curvature import ESTIMATE, mean_curvatures
from robustbench_cure.geometry.profile import Basis, random_basis
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

Values = NDArray[np.float64]

#: Inputs up to which all principal curvatures are computed.
DENSE = 4096
#: Shortest step, l2 in pixels: below it second differences of float32 logits are rounding.
SHORTEST = 0.02


def boundary(
    study: Study, *, step: float | None, directions: int, basis: Basis, profile: bool
) -> pd.DataFrame:
    """Principal and mean curvatures of the nearest boundaries (thesis, Fig. 7.5, Table 7.2); the table.

    Args:
        study: models, images, folder, seed.
        step: of the differences, l2 in pixels; None: each image's distance of the boundary, also for its
            perturbed version, which lies next to it; at least `SHORTEST`.
        directions: of the mean curvature, random ones an image.
        basis: of the tangent space, along which the steps of the principal curvatures are taken.
        profile: whether to take all principal curvatures: 2 (d - 1) gradients an image.

    What an interrupted run finished is taken over.

    Raises:
        UsageError: the step is longer than the box.
    """
    d = study.images[0].numel()
    refuse_longer("--step", step, d)
    whole = profile and d <= DENSE
    samples, rows, profiles = [], [], {}
    for name, classifier in study.models.items():
        near = nearest_of(name, classifier, study.images)
        table = _sides(study, name, classifier, near, step, directions)
        if whole:
            values = _profile(study, name, classifier, near, step, basis)
            profiles[name] = values[~np.isnan(values).any(1)]
            table["largest"], table["smallest"] = values[:, 0], values[:, -1]
        samples.append(table)
        rows.append(_row(name, table))
    study.table("boundary-images", pd.concat(samples, ignore_index=True))
    result = pd.DataFrame(rows)
    study.table("boundary", result)
    present(
        study,
        title="Curvature of the boundary",
        lead=prose.BOUNDARY,
        columns=("model", "distance", "curvature", *_ENDS[: 2 * whole], "away", "towards"),
        rows=[_cells(row, whole) for row in result.to_dict("records")],
        figures=[*_draw_profiles(study, profiles), _draw_means(study, samples)],
        settings={
            "step_h": "the distance of each image's boundary" if step is None else step,
            "directions": directions,
            "principal_curvatures": _how(whole, profile, d, basis),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
        note=_NOTE,
    )
    return result


#: Heads of the two ends of the principal curvatures.
_ENDS = ("largest", "smallest")
_NOTE = """\
away: boundaries that bend away from their image (mean curvature below 0);
towards: those that bend towards an image carried just past them."""


def _how(whole: bool, asked: bool, d: int, basis: str) -> str:
    if whole:
        return f"all, {basis} basis"
    return f"none: more than {DENSE} inputs" if asked and d > DENSE else "none asked for"


def refuse_longer(option: str, length: float | Fraction | None, d: int) -> None:
    """Refuse an l2 length, in pixels, that no two points of the box [0, 1]^d are apart.

    Raises:
        UsageError: naming the option.
    """
    if length is not None and length > d**0.5:
        raise UsageError(f"{option}: longer than the diagonal of the images' box, {d**0.5:.4g} pixels")


def nearest_of(name: str, classifier: Classifier, images: Tensor) -> Nearest:
    """The nearest boundary of every image, in passes of the batch size; progress under the model's name."""
    parts = []
    with ProgressLine(name, "images") as line:
        for start in range(0, len(images), classifier.batch_size):
            line(start, len(images), "nearest boundary")
            parts.append(nearest_boundary(classifier, images[start : start + classifier.batch_size]))
    fields = ("own", "other", "point", "beyond", "distance")
    return Nearest(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


def _sides(
    study: Study, name: str, classifier: Classifier, near: Nearest, step: float | None, directions: int
) -> pd.DataFrame:
    """Distance and mean curvature of the boundary near each image, and near its perturbed version."""
    settings = {"h": step, "directions": directions, "seed": study.seed, "estimate": ESTIMATE}
    kept = Kept(study.out / f"boundary-{name}.npz", study.identity(name, **settings))
    found: dict[str, NDArray[np.generic]] = kept.rows
    done, n = len(found["distance"]) if found else 0, len(study.data)
    with ProgressLine(name, "images") as line:
        for start in range(done, n, classifier.batch_size):
            rows = torch.arange(start, min(start + classifier.batch_size, n))
            part = near[rows]
            across = nearest_boundary(classifier, part.beyond)
            ids = [study.data.ids[row] for row in rows.tolist()]
            h = steps(part, step)
            columns = {"label": part.own, "other": part.other, "distance": part.distance, "step": h}
            columns["cosine"] = cosine_to_normal(classifier, study.images[rows], part)
            for key, side in (("natural", part), ("perturbed", across)):
                noise = Noise.for_samples(study.seed, f"boundary/{key}", ids, classifier.device)
                columns[key] = _mean(classifier, side, h, noise, directions)
            new = {key: value.cpu().numpy() for key, value in columns.items()}
            found = {key: np.concatenate([found[key], new[key]]) if found else new[key] for key in new}
            kept.keep(found)
            line(len(found["distance"]), n, "mean curvature")
    kept.write(found)
    study.files.append(kept.path)
    table = pd.DataFrame(found)
    table.insert(0, "model", name)
    table.insert(1, "sample_id", study.data.ids)
    return table


def steps(near: Nearest, step: float | None) -> Tensor:
    """The step of every image, float32 (B,), l2 in pixels; NaN where it has no boundary to be curved."""
    own = near.distance.clamp_min(SHORTEST) if step is None else torch.full_like(near.distance, step)
    return torch.where(near.found, own, torch.nan).float()


def _mean(classifier: Classifier, near: Nearest, h: Tensor, noise: Noise, directions: int) -> Tensor:
    """Mean curvature of the boundary at its point nearest to each row, float64 (B,); NaN without one."""
    usable = near.found & ~h.isnan()
    mean = torch.full_like(near.distance, torch.nan)
    if bool(usable.any()):
        place = near[usable]
        mean[usable] = mean_curvatures(
            classifier,
            place.point,
            place.own,
            place.other[:, None],
            h=h[usable],
            directions=directions,
            noise=noise[usable],
        )[:, 0]
    return mean


def _profile(
    study: Study, name: str, classifier: Classifier, near: Nearest, step: float | None, basis: Basis
) -> Values:
    """All principal curvatures of every image, (n, d - 1), descending; NaN where there is no boundary."""
    d, n = study.images[0].numel(), len(study.data)
    kept = Kept(
        study.out / f"curvatures-{name}.npz", study.identity(name, h=step, basis=basis, seed=study.seed)
    )
    values = list(kept.rows["curvatures"]) if kept.rows else []
    h = steps(near, step)
    rotation = None if basis == "canonical" else random_basis(d - 1, study.seed, classifier.device)
    each = 2 * (d - 1)
    with ProgressLine(name, "gradients") as line:
        done = len(values) * each

        def advance(count: int) -> None:
            nonlocal done
            done += count
            line(done, n * each, "principal curvatures")

        for row in range(len(values), n):
            if bool(near.found[row]):
                place = near.point[row], near.own[row], near.other[row]
                found = principal_curvatures(
                    classifier, *place, h=float(h[row]), rotation=rotation, advance=advance
                )
                values.append(found.numpy())
            else:
                values.append(np.full(d - 1, np.nan, np.float32))
            kept.keep({"curvatures": np.stack(values)})
    kept.write({"curvatures": np.stack(values)})
    study.files.append(kept.path)
    return np.stack(values).astype(np.float64)


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
    for end in _ENDS:
        if end in table:
            row[end] = float(table[end].mean())
    return row


def _cells(row: dict[Hashable, Any], whole: bool) -> list[str]:
    def counted(side: str) -> str:
        n = row[f"{side}_n"]
        return f"{round(row[f'{side}_expected'] * n) if n else 0}/{n}"

    numbers = {"distance": ".3f", "natural_mean": ".2g"} | dict.fromkeys(_ENDS[: 2 * whole], ".3g")
    cells = [f"{row[key]:{form}}" if np.isfinite(row[key]) else "-" for key, form in numbers.items()]
    return [row["model"], *cells, counted("natural"), counted("perturbed")]


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
    figure = figures.lines(series, xlabel="index", ylabel="principal curvature (1/pixel)", bands=bands)
    files = figures.save(figure, study.out / "profile")
    study.files += files
    caption = (
        "Principal curvatures of each image's nearest boundary, sorted and averaged by rank; the band is one "
        "standard deviation."
    )
    return [Shown(files[0], "Principal curvatures of the boundary", caption)]


def _draw_means(study: Study, samples: list[pd.DataFrame]) -> Shown:
    """How the mean curvature is distributed over the images, near them and near their perturbed versions."""
    panels = {}
    for table in samples:
        curves = {}
        for side in ("natural", "perturbed"):
            known = np.sort(table[side].dropna().to_numpy())
            curves[side] = (known, 100 * np.arange(1, len(known) + 1) / max(len(known), 1))
        panels[str(table["model"].iloc[0])] = curves
    figure = figures.panels(
        panels, xlabel="mean curvature (1/pixel)", ylabel="images up to here (%)", marks=False
    )
    for axes in figure.axes:
        axes.axvline(0, color="#999999", linewidth=0.6, zorder=0)
    files = figures.save(figure, study.out / "mean")
    study.files += files
    return Shown(
        files[0],
        "Mean curvature of the boundary",
        "Mean curvature of the boundary nearest to the images, and of the one nearest to the images carried "
        "past it. The thesis finds the first left of zero and the second right of it.",
    )
