"""The figures of `cure-bench shared`, each with its numbers as CSV where the command does not write them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.datasets import EvalSet
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.shared import Learned, common, cosines
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown

Values = NDArray[np.float64]

#: Shared directions on the page.
PICTURES = 6


def draw_bending(study: Study, bending: dict[str, pd.DataFrame]) -> Shown:
    """S(x) by the dimension that the vectors are drawn from (thesis, Fig. 6.9a)."""
    figure = _by_dimension(bending, "mean", ylabel="S(x) (1/pixel)")
    for axes in figure.axes:
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
    files = figures.save(figure, study.out / "shared-bending")
    study.files += files
    return Shown(
        files[0],
        "Curvature of boundaries along vectors of the subspaces",
        "Curvature of the boundaries near unseen images along vectors drawn from the first m dimensions; "
        "above 0 they bend towards the images. Mean over images and draws; the band is one standard "
        "deviation over images. S_c: curved directions; S_f: normals; any: no subspace.",
    )


def draw_fooling(study: Study, fooling: dict[str, pd.DataFrame]) -> Shown:
    """Fooled images by the dimension that the vectors are drawn from (thesis, Fig. 6.9b)."""
    figure = _by_dimension(fooling, "fooled", ylabel="fooled (%)", scale=100)
    figure.axes[0].set_ylim(bottom=0)
    files = figures.save(figure, study.out / "shared-fooling")
    study.files += files
    return Shown(
        files[0],
        "Unseen images fooled by vectors of the subspaces",
        "The same vectors, of the length named below, each for all unseen images; mean over draws, the band "
        "is one standard deviation over draws.",
    )


def _by_dimension(tables: dict[str, pd.DataFrame], column: str, *, ylabel: str, scale: float = 1) -> Figure:
    """A column of every subspace against m, with its standard deviation as a band; one panel a model."""
    panels, bands = {}, {}
    for name, table in tables.items():
        curves, widths = {}, {}
        widest = table[table["subspace"] != "any"]["m"].to_numpy(dtype=np.float64)
        for kind, part in table.groupby("subspace", sort=False):
            m, mean, std = (part[key].to_numpy(dtype=np.float64) for key in ("m", column, "std"))
            if kind == "any":  # all inputs, whatever m: a level line beside the others
                m, mean, std = np.array([widest.min(), widest.max()]), mean.repeat(2), std.repeat(2)
            curves[str(kind)], widths[str(kind)] = (m, scale * mean), scale * std
        panels[name], bands[name] = curves, widths
    figure = figures.panels(panels, xlabel="dimension m", ylabel=ylabel)
    for axes, name in zip(figure.axes, tables, strict=True):
        for line, (kind, (m, mean)) in zip(axes.lines, panels[name].items(), strict=True):
            low, high = mean - bands[name][kind], mean + bands[name][kind]
            axes.fill_between(m, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_autoscaley_on(True)  # again: with the bands
        axes.autoscale_view()
    return figure


def draw_noise(study: Study, noise: dict[str, pd.DataFrame]) -> Shown:
    """Labels changed by noise inside and outside the shared directions (thesis, Fig. 7.7)."""
    panels = {
        name: {
            str(kind): (part["length"].to_numpy(), 100 * part["changed"].to_numpy())
            for kind, part in table.groupby("noise", sort=False)
        }
        for name, table in noise.items()
    }
    figure = figures.panels(panels, xlabel="length of noise / of image", ylabel="labels changed (%)")
    files = figures.save(figure, study.out / "shared-noise")
    study.files += files
    caption = "Noise of each unseen image's own, inside the shared directions u_i, outside, and anywhere."
    return Shown(files[0], "Labels changed by noise inside and outside the shared directions", caption)


def draw_relative(study: Study, relative: dict[str, Values]) -> Shown:
    """Relative curvature along every u_i (thesis, Fig. 7.6)."""
    series = {
        name: (np.arange(1, len(values) + 1, dtype=np.float64), values) for name, values in relative.items()
    }
    tables = [
        pd.DataFrame({"model": name, "index": np.arange(1, len(values) + 1), "rho": values})
        for name, values in relative.items()
    ]
    study.table("shared-relative", pd.concat(tables, ignore_index=True))
    figure = figures.lines(series, xlabel="i", ylabel="rho of u_i")
    figure.axes[0].axhline(1, color="#999999", linewidth=0.6, zorder=0)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    files = figures.save(figure, study.out / "shared-relative")
    study.files += files
    caption = "How much more boundaries near unseen images bend along u_i than along random directions (1)."
    return Shown(files[0], "Relative curvature along the shared directions", caption)


def draw_singular(study: Study, learned: dict[str, Learned], images: EvalSet) -> Shown:
    """Singular values of the normals, beside those of as many random directions (thesis, Fig. 6.3)."""
    noise = Noise.for_samples(study.seed, "shared/singular", images.ids)
    reference, _ = common(on_sphere(noise, (images.pixels[0].numel(),), 0))
    values = {name: known.singular for name, known in learned.items()} | {"random": reference}
    tables = [
        pd.DataFrame({"model": name, "index": np.arange(1, len(v) + 1), "value": v.numpy()})
        for name, v in values.items()
    ]
    study.table("shared-singular", pd.concat(tables, ignore_index=True))
    series = {
        name: (np.arange(1, len(v) + 1, dtype=np.float64), v.double().numpy()) for name, v in values.items()
    }
    figure = figures.lines(series, xlabel="index", ylabel="singular value")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    files = figures.save(figure, study.out / "shared-singular")
    study.files += files
    caption = (
        "Singular values of the matrix of normals: the further from random directions, the more they share."
    )
    return Shown(files[0], "Singular values of the normals", caption)


def draw_cosines(study: Study, learned: dict[str, Learned]) -> list[Shown]:
    """Principal angles between S_c of the first model and of the others, and of two random subspaces."""
    if len(learned) < 2:
        return []
    (first, known), *others = learned.items()
    m, d = known.curved.shape
    noise = Noise.for_samples(study.seed, "shared/angles", ["one", "other"])
    one, other = (torch.linalg.qr(gaussian.T)[0].T for gaussian in noise.normal((m, d), 0))
    found = {f"{first}, {name}": cosines(known.curved, rest.curved) for name, rest in others}
    found["random"] = cosines(one, other)
    tables = [
        pd.DataFrame({"subspaces": name, "index": np.arange(1, m + 1), "cosine": v.numpy()})
        for name, v in found.items()
    ]
    study.table("shared-angles", pd.concat(tables, ignore_index=True))
    series = {name: (np.arange(1, m + 1, dtype=np.float64), v.numpy()) for name, v in found.items()}
    figure = figures.lines(series, xlabel="index", ylabel="cosine of the principal angle")
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    files = figures.save(figure, study.out / "shared-angles")
    study.files += files
    return [
        Shown(
            files[0],
            "Principal angles between the curved subspaces of two models",
            "1: shared; 0: orthogonal.",
        )
    ]


def draw_pictures(study: Study, learned: dict[str, Learned]) -> Shown:
    """The first shared directions, stretched to all grey levels (thesis, Fig. 7.6)."""
    shape = tuple(study.images.shape[1:])
    rows: list[tuple[str, NDArray[np.float32], list[str]]] = []
    count = min(PICTURES, *(len(known.shared) for known in learned.values()))
    for name, known in learned.items():
        u = known.shared[:count].view(count, *shape)
        stretched = 0.5 + u / (2 * u.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1))
        rows.append((name, stretched.numpy(), [""] * count))
    files = figures.save(figures.gallery(rows, [f"u{k + 1}" for k in range(count)]), study.out / "shared")
    study.files += files
    return Shown(files[0], "Shared directions of curvature", "The first shared directions u_i, stretched.")
