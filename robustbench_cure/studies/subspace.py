"""`cure-bench subspace`: smallest perturbations inside random or frequency subspaces.

Source: thesis, Table 5.1 and Fig. 3.11, see `geometry.subspaces`. beta compares the shortest perturbation in
a subspace of dimension m with the shortest of all: 1 where boundaries are flat and the subspace is like any
other; below 1 where the network is more sensitive in it than to noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.distance import smallest
from robustbench_cure.geometry.subspaces import frequency_band, random_subspaces, zeta
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, ModelRow, Study, counter, open_study, paragraphs
from robustbench_cure.studies.plots import Values

Kind: TypeAlias = Literal["random", "dct"]

#: d/m of the thesis' Table 5.1; 1, a line, is added: random noise.
RATIOS = (4, 16, 36, 64, 100)
#: Blocks along the diagonal of the frequencies, where the width is not given.
BANDS = 8
#: Numbers in the bases of one pass: 256 MB.
BASES = 1 << 26
#: Affine classifiers obey the theorem's interval with this probability.
AFFINE_PROBABILITY = 0.9

TITLES = {"random": "Perturbations in random subspaces", "dct": "Perturbations by frequency"}
LEADS = {
    "random": paragraphs("""
How much longer a perturbation must be when it may use a random subspace of m of the d inputs only: between
noise (m = 1) and the worst case (m = d). A subspace is drawn for every image anew. Lengths end where
the label first changes along DeepFool's perturbation, not where DeepFool ends; on a line (m = 1) both
directions are searched.

beta = sqrt(m/d) x (shortest in the subspace) / (shortest of all), averaged over the images. Flat boundaries
keep it in the interval named below, near 1 for all but few m, and the thesis finds real networks there, down
to m = d/100. Where m is a few, some subspaces run along the nearest boundary and make the mean large, others
meet the boundary of another class first: the median is then the better number, and neither tells curvature.

In the median and the interval, images without a perturbation in the subspace count as infinitely far; a
star marks means without them.
"""),
    "dct": paragraphs("""
The shortest perturbation made of one band of frequencies alone (blocks along the diagonal of the discrete
cosine transform), and the shortest of all. Lengths end where the label first changes along DeepFool's
perturbation; in a band of one frequency both directions are searched.

beta = sqrt(m/d) x rho in the band / rho, where rho is the mean over the images of the perturbation's length
divided by the image's own (thesis, Eq. 3.20): 1 is what a random subspace of the same dimension gives. Below
1 the network reacts to this band more than to noise. Median and std are those of the ratios of single images.

In the median, images without a perturbation in the band count as infinitely far. A star marks numbers
without them: of the images easiest to move, and so too small.
"""),
}
BETAS = {"random": "mean of the ratios (thesis, Table 5.1)", "dct": "ratio of the means (thesis, Eq. 3.20)"}
CAPTIONS = {
    "random": "Mean over the images with such a perturbation. The grey band is where beta of a single image "
    f"lies with probability {100 * AFFINE_PROBABILITY:.0f} % if the classifier is affine.",
    "dct": "Of the images with such a perturbation; band 0 holds the lowest frequencies. 1: as sensitive as "
    "to noise.",
}


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        kind: ``random`` subspaces, drawn for every image, or bands of frequencies (``dct``).
        dimensions: of the random subspaces, ascending; None: `RATIOS`, and a line.
        width: of a band's block of frequencies; None: an eighth of the image.
    """

    kind: Kind = "random"
    dimensions: tuple[int, ...] | None = None
    width: int | None = None


@dataclass(frozen=True)
class Subspace:
    """One kind of subspace that perturbations are confined to.

    Attributes:
        name: column of the numbers.
        m: dimension.
        position: on the horizontal axis.
        basis: the same for all images; None: drawn for each.
    """

    name: str
    m: int
    position: int
    basis: Tensor | None = None

    def of(self, noise: Noise, shape: tuple[int, ...]) -> Tensor:
        """Bases for the images with these streams, as `deepfool` takes them."""
        return random_subspaces(shape, self.m, noise) if self.basis is None else self.basis


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    return measure(open_study("subspace", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Distances inside subspaces next to the shortest of all; one row for each model and subspace.

    An interrupted run is continued.

    Raises:
        UsageError: dimensions or a width that the images do not have.
    """
    kind, chosen = settings.kind, _subspaces(study, settings)
    images, rows = [], []
    for name, classifier in study.models.items():
        lengths = _lengths(study, name, chosen)
        for part in chosen:
            images.append(_images(study, name, part, lengths["whole"], lengths[part.name]))
            rows.append(_row(images[-1], kind, study.inputs, classifier.num_classes))
    study.table("subspace-images", pd.concat(images, ignore_index=True))
    table = pd.DataFrame(rows)
    classes = next(iter(study.models.values())).num_classes
    study.present(
        table,
        COLUMNS if kind == "random" else {head: COLUMNS[head] for head in COLUMNS if head != "in interval"},
        title=TITLES[kind],
        lead=LEADS[kind],
        figures=[
            study.figure(
                "subspace", _figure(kind, table, chosen, classes), "beta by subspace", CAPTIONS[kind]
            )
        ],
        settings={
            "subspaces": kind,
            "dimensions": ", ".join(str(part.m) for part in chosen),
            "attack": "DeepFool, l2, to the nearest boundary, not cut to the box; on lines both directions",
            "lengths": "to the first change of label",
            "beta": BETAS[kind],
        },
    )
    return table


def _subspaces(study: Study, settings: Settings) -> list[Subspace]:
    """The subspaces to measure in, ascending."""
    channels, height, breadth = study.images.shape[1:]
    size, side = study.inputs, min(height, breadth)
    if settings.kind == "random":
        wanted = settings.dimensions or sorted({max(1, round(size / ratio)) for ratio in RATIOS} | {1})
        for m in wanted:
            if not 1 <= m <= size:
                raise UsageError(f"--dimensions {m}: the images have {size} inputs")
        return [Subspace(f"random-{m}", m, m) for m in wanted]
    width = settings.width or max(1, side // BANDS)
    if width > side:
        raise UsageError(f"--width {width}: the images are {height} x {breadth}")
    bases = [frequency_band((channels, height, breadth), band, width) for band in range(side // width)]
    return [Subspace(f"dct-{band}", basis.shape[1], band, basis) for band, basis in enumerate(bases)]


def _lengths(study: Study, name: str, chosen: list[Subspace]) -> dict[str, Values]:
    """Distances of all images: in the whole space as ``whole``, and in each subspace by its name."""
    classifier, x = study.models[name], study.images
    cache = study.cache(
        name,
        subspaces=",".join(f"{part.name}:{part.m}" for part in chosen),
        seed=study.seed,
        lengths="first change",
    )
    shape = tuple(x.shape[1:])
    with counter(name, "images", len(x) * (1 + len(chosen))) as advance:
        for part in (None, *chosen):
            advance.doing = "whole" if part is None else part.name
            if advance.doing in cache.rows:
                advance(len(x))
                continue
            lengths = []
            size = max(1, min(classifier.batch_size, BASES // (1 if part is None else part.m * study.inputs)))
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                noise = Noise.for_samples(study.seed, "subspace", study.data.ids[rows])
                basis = None if part is None else part.of(noise, shape)
                lengths.append(smallest(classifier, x[rows], basis=basis, cut=True).length)
                advance(len(lengths[-1]))
            cache.rows[advance.doing] = torch.cat(lengths).numpy()
            cache.write(cache.rows)
    return {key: rows.astype(np.float64) for key, rows in cache.rows.items()}


def _interval(m: float, classes: int) -> tuple[float, float]:
    """Where sqrt(m/d) ||r_S|| / ||r|| of an affine classifier lies with `AFFINE_PROBABILITY`."""
    low, high = zeta(m, (1 - AFFINE_PROBABILITY) / (2 * (classes + 1)))
    return low**0.5, high**0.5


def _images(study: Study, name: str, part: Subspace, whole: Values, inside: Values) -> pd.DataFrame:
    """One row an image: its own length, the shortest perturbation of all, the shortest in a subspace."""
    return study.samples(
        name,
        {
            "subspace": part.name,
            "m": part.m,
            "l2": whole,
            "l2_in_subspace": inside,
            "beta": (part.m / study.inputs) ** 0.5 * inside / whole,
            "image_norm": study.images.flatten(1).double().norm(dim=1).numpy(),
        },
    )


def _row(images: pd.DataFrame, kind: Kind, size: int, classes: int) -> dict[str, Any]:
    """One model in one subspace.

    Means are those of the images with a perturbation there; in the median all others are infinite.
    """
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


def _star(row: ModelRow) -> str:
    """Marks numbers of fewer images than there are."""
    return "" if row["n"] == row["images"] else "*"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "subspace": lambda row: row["subspace"],
    "m": lambda row: str(row["m"]),
    "m/d": lambda row: f"{row['m'] / row['d']:.3g}",
    "beta": lambda row: f"{row['beta']:.3f}{_star(row)}",
    "median": lambda row: f"{row['median']:.3f}",
    "std": lambda row: f"{row['std']:.3f}{_star(row)}",
    "found": lambda row: f"{row['n']}/{row['images']}",
    "in interval": lambda row: f"{100 * row['inside']:.0f} %",
}


def _figure(kind: Kind, table: pd.DataFrame, chosen: list[Subspace], classes: int) -> Figure:
    """Beta over the dimension, with the interval of affine classifiers, or over the band."""
    positions = np.array([float(part.position) for part in chosen])
    series = {
        str(name): (positions, part["beta"].to_numpy(float))
        for name, part in table.groupby("model", sort=False)
    }
    if kind == "dct":
        return plots.lines(series, xlabel="band of frequencies", ylabel="beta", marks=True)
    m = np.geomspace(chosen[0].m, chosen[-1].m, 200)
    low, high = np.array([_interval(float(value), classes) for value in m]).T
    top = max([2.0, *(1.2 * float(np.nanmax(y)) for _, y in series.values() if np.isfinite(y).any())])
    figure = plots.lines(
        series, xlabel="dimension m of the subspace", ylabel="beta", marks=True, ylim=(0, top)
    )
    axes = figure.axes[0]
    axes.fill_between(m, low, np.minimum(high, top), color=plots.GREY, alpha=0.2, linewidth=0)
    plots.reference(axes, 1)
    axes.set_xscale("log")
    return figure
