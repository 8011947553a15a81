"""`cure-bench curvature`: spectrum of the Hessian of the loss, its norms, and where the gradient points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.hessian import alignment, along_sign, frobenius, gradients
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.profile import random_basis, spectrum
from robustbench_cure.geometry.space import Space, normalised_space
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

#: Inputs up to which the whole spectrum is taken by default.
DENSE = 4096

Values = NDArray[np.float64]


def curvature(
    study: Study,
    *,
    method: Literal["auto", "dense", "lanczos"],
    basis: Literal["canonical", "random"],
    iterations: int,
    directions: int,
) -> pd.DataFrame:
    """Measure and write everything; returns the table of all samples.

    Args:
        study: models, images, folder, step.
        method: all eigenvalues, or the ends alone; ``auto``: all up to 4,096 inputs.
        basis: of the finite differences of the whole spectrum.
        iterations: of Lanczos.
        directions: of the Frobenius norm.
    """
    d = study.images[0].numel()
    whole = method == "dense" or (method == "auto" and d <= DENSE)
    samples: list[pd.DataFrame] = []
    profiles: dict[str, tuple[Values, Values]] = {}
    rows = []
    for name, classifier in study.models.items():
        space = normalised_space(classifier)
        u, y = space.inputs(study.images), study.labels.to(classifier.device)
        with ProgressLine(name, "gradients") as line:
            counter = _Counter(line, len(u) * ((d if whole else iterations) + directions))
            table = _samples(space, u, y, study, name, 0 if whole else iterations, directions, counter)
            if whole:
                values, alignments = _spectra(space, u, y, study, name, basis, counter)
                table["largest"], table["smallest"] = values[:, 0], values[:, -1]
                table["alignment"] = alignments
                profiles[name] = (values.mean(0), values.std(0))
        table.insert(0, "model", name)
        table.insert(1, "sample_id", study.data.ids)
        samples.append(table)
        rows.append(_row(name, table, space))
    everything = pd.concat(samples, ignore_index=True)
    study.table("samples", everything)
    shown = [*_draw_profiles(study, profiles), _draw_alignment(study, samples, d)]
    settings: dict[str, object] = {
        "step_h": study.step,
        "spectrum": "dense" if whole else "lanczos",
        **({"basis": basis} if whole else {"lanczos_iterations": iterations}),
        "frobenius_directions": directions,
    }
    present(
        study,
        title="Curvature of the loss",
        lead=prose.CURVATURE,
        columns=("model", "n", "largest", "smallest", "||H||_F", "||Hz||", "alignment", "units"),
        rows=rows,
        figures=shown,
        settings=settings,
    )
    return everything


class _Counter:
    """Gradients done, for the progress line."""

    def __init__(self, line: ProgressLine, total: int) -> None:
        self.line, self.total, self.done = line, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        self.line(self.done, self.total, "curvature")


def _samples(
    space: Space,
    u: Tensor,
    y: Tensor,
    study: Study,
    name: str,
    iterations: int,
    directions: int,
    counter: _Counter,
) -> pd.DataFrame:
    """Loss and norms of every image, by Lanczos (0 iterations: not) ends and alignment too.

    A pass' worth of images at a time; what an interrupted run left is taken over.
    """
    settings = {"h": study.step, "iterations": iterations, "directions": directions, "seed": study.seed}
    kept = Kept(study.out / f"samples-{name}.npz", study.identity(name, **settings))
    found: dict[str, NDArray[np.generic]] = kept.rows
    done = len(found["loss"]) if found else 0
    counter(done * (iterations + directions))
    ids = study.data.ids
    starts = Noise.for_samples(study.seed, "lanczos", ids, u.device)
    noise = Noise.for_samples(study.seed, "frobenius", ids, u.device)
    options: dict[str, Any] = {"h": study.step, "advance": counter}
    for rows in torch.split(torch.arange(done, len(u), device=u.device), space.network.batch_size):
        at, labels = u[rows], y[rows]
        columns = {
            "loss": space.losses(at, labels),
            "gradient_norm": gradients(space, at, labels).flatten(1).norm(dim=1),
            "frobenius": frobenius(space, at, labels, directions=directions, noise=noise[rows], **options),
            "hz": along_sign(space, at, labels, h=study.step),
        }
        if iterations:
            ends = lanczos(space, at, labels, iterations=iterations, noise=starts[rows], **options)
            columns |= {"largest": ends.largest, "smallest": ends.smallest, "alignment": ends.alignment}
        new = {key: value.detach().cpu().double().numpy() for key, value in columns.items()}
        found = {key: np.concatenate([found[key], new[key]]) if found else new[key] for key in new}
        kept.keep(found)
    kept.write(found)
    study.files.append(kept.path)
    return pd.DataFrame(found)


def _spectra(
    space: Space, u: Tensor, y: Tensor, study: Study, name: str, basis: str, counter: Callable[[int], None]
) -> tuple[Values, Values]:
    """Eigenvalues (n, d) and alignments (n,), image by image; goes on where an interrupted run was."""
    d = u[0].numel()
    identity = study.identity(name, h=study.step, basis=basis, seed=study.seed)
    kept = Kept(study.out / f"spectra-{name}.npz", identity)
    values = list(kept.rows["eigenvalues"]) if kept.rows else []
    cosines = list(kept.rows["alignment"]) if kept.rows else []
    counter(len(values) * d)
    rotation = None if basis == "canonical" else random_basis(d, study.seed, u.device)
    for row in range(len(values), len(u)):
        found = spectrum(space, u[row], y[row], h=study.step, basis=rotation, advance=counter)
        values.append(found.values.numpy())
        gradient = space.gradients(u[row, None], y[row, None]).cpu()
        cosines.append(alignment(gradient, found.vector[None])[0].numpy())
        kept.keep({"eigenvalues": np.stack(values), "alignment": np.stack(cosines)})
    arrays = {"eigenvalues": np.stack(values), "alignment": np.stack(cosines)}
    kept.write(arrays)
    study.files.append(kept.path)
    return arrays["eigenvalues"].astype(np.float64), arrays["alignment"].astype(np.float64)


def _draw_profiles(study: Study, profiles: dict[str, tuple[Values, Values]]) -> list[Shown]:
    """The profiles, and once more clipped to what is left beside the most curved model."""
    if not profiles:
        return []
    d = len(next(iter(profiles.values()))[0])
    index = np.arange(d, dtype=np.float64)
    series = {name: (index, mean) for name, (mean, _) in profiles.items()}
    bands = {name: (mean - std, mean + std) for name, (mean, std) in profiles.items()}
    table = [
        pd.DataFrame({"model": name, "index": np.arange(d), "mean": mean, "std": std})
        for name, (mean, std) in profiles.items()
    ]
    study.table("profile", pd.concat(table, ignore_index=True))
    figure = figures.lines(series, xlabel="eigenvalue index", ylabel="eigenvalue", bands=bands)
    files = figures.save(figure, study.out / "profile")
    study.files += files
    caption = (
        "All eigenvalues of the Hessian of the loss with respect to the normalised input, sorted for "
        f"each image and averaged by rank over {len(study.data)} images; the band is one standard "
        "deviation."
    )
    shown = [Shown(files[0], "Curvature profiles of the models", caption)]
    if len(profiles) > 1:
        flat = min((mean for mean, _ in profiles.values()), key=lambda mean: float(np.abs(mean).max()))
        limits = (1.5 * min(float(flat.min()), 0.0), 1.5 * max(float(flat.max()), 0.0))
        if limits[0] < limits[1]:
            figure = figures.lines(series, xlabel="eigenvalue index", ylabel="eigenvalue", ylim=limits)
            files = figures.save(figure, study.out / "profile-clipped")
            study.files += files
            caption = "The same means, the axis clipped to the range of the flattest profile."
            shown.append(Shown(files[0], "Curvature profiles, clipped", caption))
    return shown


def _draw_alignment(study: Study, samples: list[pd.DataFrame], d: int) -> Shown:
    """How the gradient's cosine with the top eigenvector is distributed over the images."""
    series = {}
    for table in samples:
        cosines = np.sort(table["alignment"].dropna().to_numpy())
        share = np.arange(1, len(cosines) + 1) / max(len(cosines), 1)
        series[str(table["model"].iloc[0])] = (np.append(cosines, 1.0), 100 * np.append(share, 1.0))
    figure = figures.lines(series, xlabel="|cos(gradient, top eigenvector)|", ylabel="images up to here (%)")
    files = figures.save(figure, study.out / "alignment")
    study.files += files
    caption = (
        "Alignment of the gradient with the top eigenvector, image by image: a curve further to the right is "
        f"a gradient that points more where the loss bends. By chance it would be {math.sqrt(1 / d):.3f}."
    )
    flat = {str(table["model"].iloc[0]): int(table["alignment"].isna().sum()) for table in samples}
    missing = [f"{count} of {name}" for name, count in flat.items() if count]
    if missing:
        caption += f" Left out, as the loss has no gradient there: {', '.join(missing)}."
    return Shown(files[0], "Alignment of gradient and top eigenvector", caption)


def _row(name: str, table: pd.DataFrame, space: Space) -> list[str]:
    columns = ("largest", "smallest", "frobenius", "hz", "alignment")
    means = [f"{float(np.nanmean(table[key])):.3g}" if table[key].notna().any() else "-" for key in columns]
    return [name, str(len(table)), *means, space.name]
