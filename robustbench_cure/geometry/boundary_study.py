"""`cure-bench boundary`: distance and principal curvatures of the nearest boundaries, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry import figures, prose
from robustbench_cure.geometry.boundary import (
    Nearest,
    mean_curvatures,
    nearest_boundary,
    principal_curvatures,
)
from robustbench_cure.geometry.kept import Kept
from robustbench_cure.geometry.page import Shown, present
from robustbench_cure.geometry.profile import Basis, random_basis
from robustbench_cure.geometry.study import Study
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate

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
    """
    d = study.images[0].numel()
    whole = profile and d <= DENSE
    samples, rows, profiles = [], [], {}
    for name, classifier in study.models.items():
        table = _sides(study, name, classifier, step, directions)
        if whole:
            values = _profile(study, name, classifier, step, basis)
            profiles[name] = values[~np.isnan(values).any(1)]
            table["largest"], table["smallest"] = values[:, 0], values[:, -1]
        samples.append(table)
        rows.append(_row(name, table))
    study.table("boundary-images", pd.concat(samples, ignore_index=True))
    result = pd.DataFrame(rows)
    study.table("boundary", result)
    heads = ["dist.", "mean", "away", "towards"]
    present(
        study,
        title="Curvature of the boundary",
        lead=prose.BOUNDARY,
        columns=("model", "n", *heads, *(["largest", "smallest"] if whole else [])),
        rows=[_cells(row, whole) for row in result.to_dict("records")],
        figures=[*_draw_profiles(study, profiles), _draw_means(study, samples)],
        settings={
            "step_h": "the distance of each image's boundary" if step is None else step,
            "directions": directions,
            "principal_curvatures": _how(whole, profile, d, basis),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box",
        },
    )
    return result


def _how(whole: bool, asked: bool, d: int, basis: str) -> str:
    if whole:
        return f"all, {basis} basis"
    return f"none: more than {DENSE} inputs" if asked and d > DENSE else "none asked for"


def _sides(
    study: Study, name: str, classifier: Classifier, step: float | None, directions: int
) -> pd.DataFrame:
    """Distance and mean curvature of the boundary near each image, and near its perturbed version."""
    kept = Kept(
        study.out / f"boundary-{name}.npz",
        study.identity(name, h=step, directions=directions, seed=study.seed),
    )
    found: dict[str, NDArray[np.generic]] = kept.rows
    done, n = len(found["distance"]) if found else 0, len(study.data)
    with ProgressLine(name, "images") as line:
        for rows in torch.split(torch.arange(done, n), classifier.batch_size):
            x = study.images[rows].to(classifier.device)
            near = nearest_boundary(classifier, x)
            across = nearest_boundary(classifier, near.beyond)
            ids = [study.data.ids[row] for row in rows.tolist()]
            h = steps(near, step)
            columns = {"label": near.own, "other": near.other, "distance": near.distance, "step": h}
            for key, side in (("natural", near), ("perturbed", across)):
                noise = Noise.for_samples(study.seed, f"boundary/{key}", ids, x.device)
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
        mean[usable] = mean_curvatures(
            classifier,
            near.point[usable],
            near.own[usable],
            near.other[usable, None],
            h=h[usable],
            directions=directions,
            noise=noise[usable],
        )[:, 0]
    return mean


def _profile(study: Study, name: str, classifier: Classifier, step: float | None, basis: Basis) -> Values:
    """All principal curvatures of every image, (n, d - 1), descending; NaN where there is no boundary."""
    d, n = study.images[0].numel(), len(study.data)
    kept = Kept(
        study.out / f"curvatures-{name}.npz", study.identity(name, h=step, basis=basis, seed=study.seed)
    )
    values = list(kept.rows["curvatures"]) if kept.rows else []
    near = nearest_boundary(classifier, study.images)
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
    row: dict[str, Any] = {"model": name, "n": int(table["distance"].notna().sum()), "of": len(table)}
    row["distance"] = float(table["distance"].median())
    for side, sign in (("natural", -1), ("perturbed", 1)):
        known = table[side].dropna()
        rate = Rate(int((sign * known > 0).sum()), len(known)) if len(known) else None
        row[f"{side}_mean"] = float(known.mean())
        row[f"{side}_expected"] = rate.value if rate else float("nan")
        row[f"{side}_ci_low"], row[f"{side}_ci_high"] = rate.interval if rate else (float("nan"),) * 2
    for end in ("largest", "smallest"):
        if end in table:
            row[end] = float(table[end].mean())
    return row


def _cells(row: dict[Hashable, Any], whole: bool) -> list[str]:
    def share(side: str) -> str:
        value = row[f"{side}_expected"]
        return f"{100 * value:.0f} %" if np.isfinite(value) else "-"

    cells = [
        row["model"],
        f"{row['n']}/{row['of']}",
        f"{row['distance']:.3f}",
        f"{row['natural_mean']:.2g}",
        share("natural"),
        share("perturbed"),
    ]
    return [*cells, f"{row['largest']:.3g}", f"{row['smallest']:.3g}"] if whole else cells


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
