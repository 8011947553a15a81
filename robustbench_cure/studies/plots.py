"""Figures of the studies: matplotlib, one style, as SVG, PDF and PNG; the kinds that several studies draw."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.files import write_atomically

Values: TypeAlias = NDArray[np.float64]
#: Horizontal and vertical values of a curve.
Points: TypeAlias = tuple[Values, Values]

#: Distinguishable without colour vision (Okabe and Ito 2008), with a line style each for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#999999"
#: The dot at an image, and paths between images.
IMAGE = "#14357a"
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
#: Regions of a section, as in the paper: the label's own green, all others between orange and red.
OWN, OTHERS = "#8fc98f", ("#f4a582", "#e0715a", "#d6604d", "#ef9a7a", "#c94c3c", "#f7b799", "#da8a6d")
#: Formats of every figure, the first for the page, and metadata that would differ between two equal runs.
FORMATS: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure here."""
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "cure-bench",
        "figure.dpi": 150,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``<stem>.svg`` and so on for `FORMATS`, each whole or not at all; equal figures, equal bytes."""
    FigureCanvasAgg(figure)
    files = []
    for kind, metadata in FORMATS.items():
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.1)
        path = stem.with_name(f"{stem.name}.{kind}")
        data = buffer.getvalue()
        write_atomically(path, lambda file, data=data: file.write_bytes(data))  # type: ignore[misc]
        files.append(path)
    return files


def line_style(index: int, size: float | None = None) -> dict[str, Any]:
    """Colour and dashes of the curve with this number, and markers of a size in points; None: no markers."""
    look: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index % len(STYLES)],
    }
    return look if size is None else look | {"marker": "osD^v<>"[index % 7], "markersize": size}


def stretched(x: Tensor) -> NDArray[np.float32]:
    """Perturbations (B,C,H,W) as images: each stretched to all grey levels, 0 being the middle one."""
    largest = x.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    image: NDArray[np.float32] = (0.5 + x / (2 * largest)).numpy()
    return image


def reference(axes: Axes, level: float = 0, *, vertical: bool = False) -> None:
    """A thin grey line behind the curves, at a level."""
    draw = axes.axvline if vertical else axes.axhline
    draw(level, color=GREY, linewidth=0.6, zorder=0)


def lines(
    series: dict[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    bands: dict[str, Points] | None = None,
    marks: bool = False,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Curves of several models on one pair of axes, with optional bands around them."""
    with style():
        figure = Figure(figsize=(5.4, 3.4))
        axes = figure.subplots()
        for index, (name, (x, y)) in enumerate(series.items()):
            look = line_style(index, 3.5 if marks else None)
            axes.plot(x, y, label=name, **look)
            if bands and name in bands:
                axes.fill_between(x, *bands[name], color=look["color"], alpha=0.15, linewidth=0)
        reference(axes)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if ylim:
            axes.set_ylim(*ylim)
        # Above the axes: curves of distributions leave no corner free.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, borderaxespad=0)
        return figure


def panels(
    series: dict[str, dict[str, Points]],
    *,
    xlabel: str,
    ylabel: str,
    marks: bool = True,
) -> Figure:
    """Curves of several kinds, one panel a model, on one vertical axis.

    Args:
        series: model -> kind -> horizontal and vertical values.
        xlabel: of every panel.
        ylabel: of the first.
        marks: at every point.
    """
    with style():
        figure = Figure(figsize=(max(4.4, 2.6 * len(series)), 3.1), layout="constrained")
        row = row_of_axes(figure, len(series), sharey=True)
        for axes, (title, curves) in zip(row, series.items(), strict=True):
            for index, (name, (x, y)) in enumerate(curves.items()):
                axes.plot(x, y, label=name, **line_style(index, 3 if marks else None))
            axes.set_title(title)
            axes.set_xlabel(xlabel)
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel(ylabel)
        handles, names = row[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names) if len(series) > 2 else 3)
        return figure


def regions(axes: Axes, x: Values, y: Values, labels: NDArray[np.int64], own: int) -> None:
    """Fill axes with the regions of labels (len(y), len(x)): ``own`` green, others between orange and red."""
    classes = [own, *sorted(set(np.unique(labels).tolist()) - {own})]
    rank = np.zeros_like(labels)
    for k, label in enumerate(classes):
        rank[labels == label] = k
    # By label, so that a region has the same colour in every panel.
    colours = ListedColormap([OWN, *(OTHERS[label % len(OTHERS)] for label in classes[1:])])
    norm = BoundaryNorm(np.arange(len(classes) + 1) - 0.5, len(classes))
    axes.pcolormesh(x, y, rank, cmap=colours, norm=norm, shading="nearest", rasterized=True)
    for k in range(1, len(classes)):
        axes.contour(x, y, rank == k, levels=[0.5], colors="black", linewidths=0.7)


def gallery(rows: Sequence[tuple[str, NDArray[np.float32], Sequence[str]]], titles: Sequence[str]) -> Figure:
    """Images in a grid.

    Args:
        rows: name of the row, its images (m, C, H, W) in [0, 1], and what stands under each.
        titles: of the columns.
    """
    with style():
        columns = len(titles)
        figure = Figure(figsize=(1.05 * columns + 1.2, 1.2 * len(rows)))
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for r, (name, images, captions) in enumerate(rows):
            for c in range(columns):
                axes = grid[r][c]
                image = images[c].transpose(1, 2, 0)
                shown = image[..., 0] if image.shape[2] == 1 else image
                axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                axes.set_xlabel(captions[c], fontsize=7, labelpad=2)
                if r == 0:
                    axes.set_title(titles[c], fontsize=8, fontweight="normal")
            grid[r][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        return figure


def row_of_axes(figure: Figure, count: int, *, sharey: bool = False) -> list[Axes]:
    """Axes next to each other in a figure, with or without a common vertical axis."""
    return list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])
