"""`cure-bench subspace`: smallest perturbations inside random or frequency subspaces, for any models."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.distance import smallest
from robustbench_cure.geometry.subspaces import frequency_band, random_subspaces, zeta
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

Kind: TypeAlias = Literal["random", "dct"]

#: d/m of the thesis' Table 5.1; 1, a line, is added: random noise.
RATIOS = (4, 16, 36, 64, 100)
#: Blocks along the diagonal of the frequencies, where the width is not given.
BANDS = 8
#: Numbers in the bases of one pass: 256 MB.
BASES = 1 << 26
#: Affine classifiers obey the theorem's interval with this probability.
SURE = 0.9


@dataclass(frozen=True)
class Subspace:
    """One kind of subspace that perturbations are confined to.

    Attributes:
        name: column of the numbers.
        m: dimension.
        place: on the horizontal axis.
        basis: the same for all images; None: drawn for each.
    """

    name: str
    m: int
    place: int
    basis: Tensor | None = None

    def of(self, noise: Noise, shape: tuple[int, int, int]) -> Tensor:
        """Bases for the images with these streams, as `deepfool` takes them."""
        return random_subspaces(shape, self.m, noise) if self.basis is None else self.basis


def subspace(study: Study, *, kind: Kind, dimensions: list[int] | None, width: int | None) -> pd.DataFrame:
    """Distances inside subspaces beside the shortest of all (thesis, Table 5.1, Fig. 3.11); the table.

    Args:
        study: models, images, folder, seed.
        kind: ``random`` subspaces, drawn for every image, or bands of frequencies (``dct``).
        dimensions: of the random subspaces; None: `RATIOS`, and a line.
        width: of a band's block of frequencies; None: an eighth of the image.

    What an interrupted run finished is taken over.

    Raises:
        UsageError: dimensions or a width that the images do not have.
    """
    chosen = _subspaces(study, kind, dimensions, width)
    tables, rows = [], []
    for name, classifier in study.models.items():
        whole, found = _measure(study, name, classifier, chosen)
        for part in chosen:
            tables.append(_images(study, name, part, whole, found[part.name]))
            rows.append(_row(tables[-1], kind, study.images[0].numel(), classifier.num_classes))
    study.table("subspace-images", pd.concat(tables, ignore_index=True))
    table = pd.DataFrame(rows)
    study.table("subspace", table)
    files = figures.save(_figure(kind, table, chosen, study), study.out / "subspace")
    study.files += files
    heads = ("subspace", "m", "m/d", "beta", "median", "std", "found")
    present(
        study,
        title="Perturbations in random subspaces" if kind == "random" else "Perturbations by frequency",
        lead=prose.SUBSPACE if kind == "random" else prose.FREQUENCY,
        columns=("model", *heads, "in interval") if kind == "random" else ("model", *heads),
        rows=[_cells(row, kind) for row in table.to_dict("records")],
        figures=[Shown(files[0], "beta by subspace", _CAPTIONS[kind])],
        settings={
            "subspaces": kind,
            "dimensions": ", ".join(str(part.m) for part in chosen),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box; on lines both ways",
            "lengths": "to the first change of label on the way",
            "beta": _BETAS[kind],
        },
    )
    return table


_BETAS = {"random": "mean of the ratios (thesis, Table 5.1)", "dct": "ratio of the means (thesis, Eq. 3.20)"}
_CAPTIONS = {
    "random": "Mean over the images found. The grey band is where beta of a single image lies with "
    f"probability {100 * SURE:.0f} % if the classifier is affine.",
    "dct": "Of the images found; band 0 holds the lowest frequencies. 1: as sensitive as to noise.",
}


def _subspaces(study: Study, kind: Kind, dimensions: list[int] | None, width: int | None) -> list[Subspace]:
    channels, height, breadth = study.images.shape[1:]
    size, side = channels * height * breadth, min(height, breadth)
    if kind == "random":
        wanted = dimensions or sorted({max(1, round(size / ratio)) for ratio in RATIOS} | {1})
        for m in wanted:
            if not 1 <= m <= size:
                raise UsageError(f"--dimensions {m}: the images have {size} inputs")
        return [Subspace(f"random-{m}", m, m) for m in wanted]
    width = width or max(1, side // BANDS)
    if width > side:
        raise UsageError(f"--width {width}: the images are {height} x {breadth}")
    bases = [frequency_band((channels, height, breadth), band, width) for band in range(side // width)]
    return [Subspace(f"dct-{band}", basis.shape[1], band, basis) for band, basis in enumerate(bases)]


def _measure(
    study: Study, name: str, classifier: Classifier, chosen: list[Subspace]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Distances of all images: in the whole space, and in each subspace by its name."""
    settings = {
        "subspaces": ",".join(f"{part.name}:{part.m}" for part in chosen),
        "seed": study.seed,
        "lengths": "first change",
    }
    kept = Kept(study.out / f"subspace-{name}.npz", study.identity(name, **settings))
    found: dict[str, NDArray[np.float64]] = {key: rows.astype(np.float64) for key, rows in kept.rows.items()}
    x, shape = study.images, tuple(study.images.shape[1:])
    total, done = len(x) * (1 + len(chosen)), len(x) * len(found)
    with ProgressLine(name, "images") as line:
        for part in (None, *chosen):
            key = "whole" if part is None else part.name
            if key in found:
                continue
            lengths = []
            step = max(1, min(classifier.batch_size, BASES // (1 if part is None else part.m * x[0].numel())))
            for start in range(0, len(x), step):
                rows = slice(start, start + step)
                noise = Noise.for_samples(study.seed, "subspace", study.data.ids[rows])
                basis = None if part is None else part.of(noise, shape)  # type: ignore[arg-type]
                lengths.append(smallest(classifier, x[rows], basis=basis, cut=True).length)
                done += len(lengths[-1])
                line(done, total, key)
            found[key] = torch.cat(lengths).numpy()
            kept.write(found)
    study.files.append(kept.path)
    return found["whole"], {part.name: found[part.name] for part in chosen}


def _interval(m: float, classes: int) -> tuple[float, float]:
    """Where sqrt(m/d) ||r_S|| / ||r|| of an affine classifier lies with probability `SURE`."""
    low, high = zeta(m, (1 - SURE) / (2 * (classes + 1)))
    return low**0.5, high**0.5


def _images(
    study: Study, name: str, part: Subspace, whole: NDArray[np.float64], inside: NDArray[np.float64]
) -> pd.DataFrame:
    """One row an image: its own length, the shortest perturbation of all, the shortest in a subspace."""
    return pd.DataFrame(
        {
            "model": name,
            "sample_id": study.data.ids,
            "subspace": part.name,
            "m": part.m,
            "l2": whole,
            "l2_in_subspace": inside,
            "beta": (part.m / study.images[0].numel()) ** 0.5 * inside / whole,
            "image_norm": study.images.flatten(1).double().norm(dim=1).numpy(),
        }
    )


def _row(images: pd.DataFrame, kind: Kind, size: int, classes: int) -> dict[str, Any]:
    """A subspace in numbers. Means are those of the images found; in the median all others are infinite."""
    first = images.iloc[0]
    known = images[images["beta"].notna()]
    with_image = known[known["image_norm"] > 0]
    rho, rho_in_subspace = (
        float((with_image[key] / with_image["image_norm"]).mean()) for key in ("l2", "l2_in_subspace")
    )
    beta = float(known["beta"].mean())
    if kind == "dct":
        beta = (first["m"] / size) ** 0.5 * rho_in_subspace / rho
    ratios = images[images["l2"].notna()]["beta"].fillna(np.inf).to_numpy()
    low, high = _interval(first["m"], classes)
    return {
        "model": first["model"],
        "subspace": first["subspace"],
        "m": first["m"],
        "d": size,
        "n": len(known),
        "beta": beta,
        "median": float(np.median(ratios)) if len(ratios) else float("nan"),
        "std": float(known["beta"].std()),
        "affine_low": low,
        "affine_high": high,
        "inside": float(((ratios >= low) & (ratios <= high)).mean()) if len(ratios) else float("nan"),
        "images": len(images),
        "rho": rho,
        "rho_in_subspace": rho_in_subspace,
    }


def _cells(row: dict[Hashable, Any], kind: Kind) -> list[str]:
    mark = "" if row["n"] == row["images"] else "*"
    cells = [
        row["model"],
        row["subspace"],
        str(row["m"]),
        f"{row['m'] / row['d']:.3g}",
        f"{row['beta']:.3f}{mark}",
        f"{row['median']:.3f}",
        f"{row['std']:.3f}{mark}",
        f"{row['n']}/{row['images']}",
    ]
    return [*cells, f"{100 * row['inside']:.0f} %"] if kind == "random" else cells


def _figure(kind: Kind, table: pd.DataFrame, chosen: list[Subspace], study: Study) -> Figure:
    """Beta over the dimension, with the interval of affine classifiers, or over the band."""
    places = np.array([float(part.place) for part in chosen])
    series = {
        str(name): (places, part["beta"].to_numpy(float)) for name, part in table.groupby("model", sort=False)
    }
    if kind == "dct":
        return figures.lines(series, xlabel="band of frequencies", ylabel="beta", marks=True)
    classes = next(iter(study.models.values())).num_classes
    place = np.geomspace(chosen[0].m, chosen[-1].m, 200)
    low, high = np.array([_interval(float(m), classes) for m in place]).T
    highest = max([2.0, *(1.2 * float(np.nanmax(y)) for _, y in series.values() if np.isfinite(y).any())])
    figure = figures.lines(
        series, xlabel="dimension m of the subspace", ylabel="beta", marks=True, ylim=(0, highest)
    )
    axes = figure.axes[0]
    axes.fill_between(place, low, np.minimum(high, highest), color="#999999", alpha=0.2, linewidth=0)
    axes.axhline(1, color="#999999", linewidth=0.6, zorder=0)
    axes.set_xscale("log")
    return figure
