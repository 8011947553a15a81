"""`cure-bench curvature`: spectrum of the Hessian of the loss, its norms, and where the gradient points.

Source: CURE paper, section 2, figures 2 and 5 (thesis, figure 8.2). For each image all eigenvalues, sorted
and averaged by rank over the images (the curvature profile), the Frobenius norm, ||Hz|| along the sign of the
gradient, and the cosine between gradient and top eigenvector. A profile near zero is a loss that is locally
linear; one with a few large eigenvalues is a loss that a short step in few directions changes much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.geometry.hessian import (
    Basis,
    alignment,
    along_sign,
    frobenius,
    gradients,
    random_basis,
    spectrum,
)
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import Space, normalised_space
from robustbench_cure.protocol.defaults import defaults_of
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import (
    Columns,
    Counter,
    ModelRow,
    Shown,
    Study,
    counter,
    open_study,
    paragraphs,
    refuse_step,
)
from robustbench_cure.studies.plots import Values

#: Inputs up to which the whole spectrum is taken by default.
DENSE = 4096
#: Columns of the samples whose means are shown.
MEANS = ("largest", "smallest", "frobenius", "hz", "alignment")

LEAD = paragraphs("""
How the loss bends around an image: a strongly curved loss lets a short step change it much. The CURE
paper finds that adversarial training flattens these profiles, and that penalising curvature makes
networks robust.

Finite differences of the gradient with the step named below, in normalised inputs: the profile depends
on the step. ||Hz|| is taken along the sign of the gradient; the alignment is the cosine between the
gradient and the top eigenvector, over the images that have a gradient.
""")


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        step: h of the finite differences, l2 in normalised inputs; None: that of the data set.
        spectrum: all eigenvalues, or the extreme ones by Lanczos; ``auto``: all up to `DENSE` inputs.
        basis: of the finite differences of the whole spectrum.
        iterations: of Lanczos.
        directions: random ones of the Frobenius norm, for each image.
    """

    step: float | None = None
    spectrum: Literal["auto", "dense", "lanczos"] = "auto"
    basis: Basis = "canonical"
    iterations: int = 30
    directions: int = 100


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    refuse_step(settings.step)
    return measure(open_study("curvature", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Measure and write everything; returns the table of all images. An interrupted run is continued."""
    d = study.inputs
    h = settings.step or defaults_of(study.dataset).difference_step
    dense = settings.spectrum == "dense" or (settings.spectrum == "auto" and d <= DENSE)
    samples: dict[str, pd.DataFrame] = {}
    profiles: dict[str, Values] = {}
    units = {}
    for name, classifier in study.models.items():
        space = normalised_space(classifier)
        u, y = space.inputs(study.images), study.labels.to(classifier.device)
        work = len(u) * ((d if dense else settings.iterations) + settings.directions)
        with counter(name, "gradients", work, "curvature") as advance:
            columns = _samples(study, name, space, u, y, h, settings, not dense, advance)
            if dense:
                columns |= _spectra(study, name, space, u, y, h, settings.basis, advance)
                profiles[name] = columns.pop("eigenvalues")
        samples[name], units[name] = study.samples(name, columns), space.name
    everything = pd.concat(samples.values(), ignore_index=True)
    study.table("samples", everything)
    study.present(
        [_row(name, table) | {"units": units[name]} for name, table in samples.items()],
        COLUMNS,
        title="Curvature of the loss",
        lead=LEAD,
        figures=[*_draw_profiles(study, profiles), _draw_alignment(study, samples)],
        settings={
            "step_h": h,
            "spectrum": "dense" if dense else "lanczos",
            **({"basis": settings.basis} if dense else {"lanczos_iterations": settings.iterations}),
            "frobenius_directions": settings.directions,
        },
    )
    return everything


def _samples(
    study: Study,
    name: str,
    space: Space,
    u: Tensor,
    y: Tensor,
    h: float,
    settings: Settings,
    by_lanczos: bool,
    advance: Counter,
) -> dict[str, Values]:
    """Loss and norms of every image; with Lanczos also the extreme eigenvalues and the alignment."""
    iterations, directions = settings.iterations if by_lanczos else 0, settings.directions
    cache = study.cache(name, "samples", h=h, iterations=iterations, directions=directions, seed=study.seed)
    starts = Noise.for_samples(study.seed, "lanczos", study.data.ids, u.device)
    noise = Noise.for_samples(study.seed, "frobenius", study.data.ids, u.device)

    def measured(rows: range) -> Mapping[str, Values]:
        part = torch.arange(rows.start, rows.stop, device=u.device)
        at, labels = u[part], y[part]
        columns = {
            "loss": space.losses(at, labels),
            "gradient_norm": gradients(space, at, labels).flatten(1).norm(dim=1),
            "frobenius": frobenius(
                space, at, labels, h=h, directions=directions, noise=noise[part], advance=advance
            ),
            "hz": along_sign(space, at, labels, h=h),
        }
        if by_lanczos:
            extremes = lanczos(
                space, at, labels, h=h, iterations=iterations, noise=starts[part], advance=advance
            )
            columns |= {key: getattr(extremes, key) for key in ("largest", "smallest", "alignment")}
        return {key: value.detach().cpu().double().numpy() for key, value in columns.items()}

    size = space.network.batch_size
    rows = study.by_image(cache, measured, size=size, advance=advance, cost=iterations + directions)
    return {key: column.astype(np.float64) for key, column in rows.items()}


def _spectra(
    study: Study, name: str, space: Space, u: Tensor, y: Tensor, h: float, basis: Basis, advance: Counter
) -> dict[str, Values]:
    """Eigenvalues (n, d), the largest and the smallest, and the alignments (n,), image by image."""
    d = study.inputs
    cache = study.cache(name, "spectra", h=h, basis=basis, seed=study.seed)
    rotation = None if basis == "canonical" else random_basis(d, study.seed, u.device)

    def columns(rows: range) -> Mapping[str, Tensor]:
        (row,) = rows
        whole = spectrum(space, u[row], y[row], h=h, basis=rotation, advance=advance)
        gradient = space.gradients(u[row, None], y[row, None]).cpu()
        return {"eigenvalues": whole.values[None], "alignment": alignment(gradient, whole.vector[None])}

    rows = study.by_image(cache, columns, size=1, advance=advance, cost=d)
    values = rows["eigenvalues"].astype(np.float64)
    return {
        "largest": values[:, 0],
        "smallest": values[:, -1],
        "alignment": rows["alignment"].astype(np.float64),
        "eigenvalues": values,
    }


def _row(name: str, table: pd.DataFrame) -> dict[str, object]:
    means = {key: float(np.nanmean(table[key])) if table[key].notna().any() else np.nan for key in MEANS}
    return {"model": name, "n": len(table), **means}


def _mean(key: str) -> Callable[[ModelRow], str]:
    return lambda row: f"{row[key]:.3g}" if np.isfinite(row[key]) else "-"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "n": lambda row: str(row["n"]),
    "largest": _mean("largest"),
    "smallest": _mean("smallest"),
    "||H||_F": _mean("frobenius"),
    "||Hz||": _mean("hz"),
    "alignment": _mean("alignment"),
    "units": lambda row: row["units"],
}


def _draw_profiles(study: Study, profiles: dict[str, Values]) -> list[Shown]:
    """The profiles, and once more clipped to the range of the flattest model."""
    if not profiles:
        return []
    index = np.arange(study.inputs, dtype=np.float64)
    means = {name: values.mean(0) for name, values in profiles.items()}
    stds = {name: values.std(0) for name, values in profiles.items()}
    series = {name: (index, mean) for name, mean in means.items()}
    bands = {name: (mean - stds[name], mean + stds[name]) for name, mean in means.items()}
    tables = [
        pd.DataFrame({"model": name, "index": index.astype(int), "mean": mean, "std": stds[name]})
        for name, mean in means.items()
    ]
    study.table("profile", pd.concat(tables, ignore_index=True))
    caption = (
        "All eigenvalues of the Hessian of the loss with respect to the normalised input, sorted for "
        f"each image and averaged by rank over {len(study.data)} images; the band is one standard "
        "deviation."
    )
    figure = plots.lines(series, xlabel="eigenvalue index", ylabel="eigenvalue", bands=bands)
    shown = [study.figure("profile", figure, "Curvature profiles of the models", caption)]
    flat = min(means.values(), key=lambda mean: float(np.abs(mean).max()))
    limits = (1.5 * min(float(flat.min()), 0.0), 1.5 * max(float(flat.max()), 0.0))
    if len(profiles) > 1 and limits[0] < limits[1]:
        figure = plots.lines(series, xlabel="eigenvalue index", ylabel="eigenvalue", ylim=limits)
        caption = "The same means, the axis clipped to the range of the flattest profile."
        shown.append(study.figure("profile-clipped", figure, "Curvature profiles, clipped", caption))
    return shown


def _draw_alignment(study: Study, samples: dict[str, pd.DataFrame]) -> Shown:
    """Distribution over the images of the gradient's cosine with the top eigenvector."""
    series = {}
    for name, table in samples.items():
        cosines = np.sort(table["alignment"].dropna().to_numpy())
        share = np.arange(1, len(cosines) + 1) / max(len(cosines), 1)
        series[name] = (np.append(cosines, 1.0), 100 * np.append(share, 1.0))
    figure = plots.lines(series, xlabel="|cos(gradient, top eigenvector)|", ylabel="images up to here (%)")
    chance = math.sqrt(1 / study.inputs)
    caption = (
        "Alignment of the gradient with the top eigenvector, image by image: a curve further to the right is "
        f"a gradient that points more where the loss bends. By chance it would be {chance:.3f}."
    )
    flat = {name: int(table["alignment"].isna().sum()) for name, table in samples.items()}
    if missing := [f"{count} of {name}" for name, count in flat.items() if count]:
        caption += f" Left out, as the loss has no gradient there: {', '.join(missing)}."
    return study.figure("alignment", figure, "Alignment of gradient and top eigenvector", caption)
