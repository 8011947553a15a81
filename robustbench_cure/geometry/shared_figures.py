"""The figures of `cure-bench shared`, each with its numbers as CSV where the command does not write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.datasets import EvalSet
from robustbench_cure.geometry import figures
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.page import Shown
from robustbench_cure.geometry.shared import common, cosines
from robustbench_cure.geometry.study import Study

Values = NDArray[np.float64]

#: Shared directions on the page.
PICTURES = 6


@dataclass(frozen=True)
class Learned:
    """What the boundaries near the first half of the images share.

    Attributes:
        singular: singular values of the matrix of normals, float64 (k,).
        flat: S_f, orthonormal rows, (k, d).
        curved: S_c, orthonormal rows, (m, d).
        shared: u_i, orthonormal rows, (m, d).
        images: how many images had a boundary.
    """

    singular: Tensor
    flat: Tensor
    curved: Tensor
    shared: Tensor
    images: int


def draw_fooling(study: Study, fooling: dict[str, pd.DataFrame]) -> Shown:
    """Fooled images by the dimension that the vectors are drawn from (thesis, Fig. 6.9)."""
    panels = {}
    for name, table in fooling.items():
        curves = {}
        widest = table[table["subspace"] != "any"]["m"].to_numpy(dtype=np.float64)
        for kind, part in table.groupby("subspace", sort=False):
            m, share = part["m"].to_numpy(dtype=np.float64), 100 * part["fooled"].to_numpy()
            if kind == "any":
                m, share = np.array([widest.min(), widest.max()]), np.repeat(share, 2)
            curves[str(kind)] = (m, share)
        panels[name] = curves
    figure = figures.panels(panels, xlabel="dimension m", ylabel="fooled (%)")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
    files = figures.save(figure, study.out / "shared-fooling")
    study.files += files
    return Shown(
        files[0],
        "Unseen images fooled by vectors of the subspaces",
        "Vectors of the length named below, drawn from the first m dimensions, each for all unseen images; "
        "mean over draws. S_c: curved directions; S_f: normals; any: no subspace.",
    )


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
    files = figures.save(figure, study.out / "shared-relative")
    study.files += files
    caption = "How much more boundaries near unseen images bend along u_i than along random directions (1)."
    return Shown(files[0], "Relative curvature along the shared directions", caption)


def draw_singular(study: Study, learned: dict[str, Learned], images: EvalSet) -> Shown:
    """Singular values of the normals, beside those of as many random directions (thesis, Fig. 6.3)."""
    noise = Noise.for_samples(study.seed, "shared/singular", images.ids)
    reference, _ = common(on_sphere(noise, (images.images[0].numel(),), 0))
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
