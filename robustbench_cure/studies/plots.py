"""Figures of the geometry commands: matplotlib, one style, as SVG, PDF and PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from robustbench_cure.files import write_atomically

#: Told apart without colour vision (Okabe and Ito 2008), with a line style each for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
#: Regions of a section, as in the paper: the label's own green, all others between orange and red.
OWN, OTHERS = "#8fc98f", ("#f4a582", "#e0715a", "#d6604d", "#ef9a7a", "#c94c3c", "#f7b799", "#da8a6d")
#: Bytes that would differ between two equal runs are left out of the files.
METADATA = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


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
    """Write ``<stem>.svg``, ``.pdf`` and ``.png``, each whole or not at all; equal figures, equal bytes."""
    FigureCanvasAgg(figure)
    files = []
    for kind, metadata in METADATA.items():
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.1)
        path = stem.with_name(f"{stem.name}.{kind}")
        data = buffer.getvalue()
        write_atomically(path, lambda file, data=data: file.write_bytes(data))  # type: ignore[misc]
        files.append(path)
    return files


def lines(
    series: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    xlabel: str,
    ylabel: str,
    bands: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] | None = None,
    marks: bool = False,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Curves of several models on one pair of axes, with optional bands around them."""
    with style():
        figure = Figure(figsize=(5.4, 3.4))
        axes = figure.subplots()
        for index, (name, (x, y)) in enumerate(series.items()):
            colour = COLOURS[index % len(COLOURS)]
            shape = "osD^v<>"[index % 7] if marks else None
            line = STYLES[index % len(STYLES)]
            axes.plot(x, y, color=colour, linestyle=line, label=name, marker=shape, markersize=3.5)
            if bands and name in bands:
                axes.fill_between(x, *bands[name], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="#999999", linewidth=0.6, zorder=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if ylim:
            axes.set_ylim(*ylim)
        # Above the axes: curves of distributions leave no corner free.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, borderaxespad=0)
        return figure


def evolution(
    panels: Sequence[tuple[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]],
) -> Figure:
    """Curves over epochs, one panel a measure, the runs in the same colours; vertical axes from zero.

    Args:
        panels: label of the vertical axis, and for each run its epochs and values.
    """
    with style():
        figure = Figure(figsize=(3.0 * len(panels), 2.9), layout="constrained")
        for axes, (label, series) in zip(_row(figure, len(panels)), panels, strict=True):
            for index, (name, (x, y)) in enumerate(series.items()):
                colour, line = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
                shape = "osD^v<>"[index % 7]
                axes.plot(x, y, color=colour, linestyle=line, label=name, marker=shape, markersize=3)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
        figure.axes[0].legend()
        return figure


def panels(
    series: dict[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]],
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
        row = list(figure.subplots(1, len(series), squeeze=False, sharey=True)[0])
        for axes, (title, curves) in zip(row, series.items(), strict=True):
            for index, (name, (x, y)) in enumerate(curves.items()):
                colour, line = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
                shape = "osD^v<>"[index % 7] if marks else None
                axes.plot(x, y, color=colour, linestyle=line, label=name, marker=shape, markersize=3)
            axes.set_title(title)
            axes.set_xlabel(xlabel)
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel(ylabel)
        handles, names = row[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names) if len(series) > 2 else 3)
        return figure


def sections(panels: Sequence[tuple[str, NDArray[np.float64], NDArray[np.int64], int]]) -> Figure:
    """Regions of the labels over planes, one panel a model; equal scales, a dot at the image.

    Args:
        panels: title, coordinates (m,), labels (m, m) with rows along the normal, and the true label.
    """
    with style():
        figure = Figure(figsize=(2.9 * len(panels), 3.1), layout="constrained")
        for axes, (title, along, labels, own) in zip(_row(figure, len(panels)), panels, strict=True):
            regions(axes, along, along, labels, own)
            axes.plot(0, 0, "o", color="#14357a", markersize=4)
            axes.set_aspect("equal")
            axes.set_title(title)
            axes.set_xlabel("along v (random), l2 in pixels")
        figure.axes[0].set_ylabel("along r (normal), l2 in pixels")
        return figure


def regions(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], labels: NDArray[np.int64], own: int
) -> None:
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


def surfaces(panels: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]]) -> Figure:
    """Negative loss over planes, one panel a model, on one vertical scale.

    Args:
        panels: title, coordinates (m,), loss (m, m) with rows along the normal.
    """
    low = min(float(-loss.max()) for _, _, loss in panels)
    with style():
        figure = Figure(figsize=(3.3 * len(panels), 3.2))
        for place, (title, along, loss) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1, projection="3d")
            v, n = np.meshgrid(along, along)
            axes.plot_surface(
                v,
                n,
                -loss,
                cmap="RdYlBu",
                vmin=low,
                vmax=0,
                linewidth=0,
                antialiased=True,
                rasterized=True,
                rcount=80,
                ccount=80,
            )
            middle = len(along) // 2
            axes.plot([0], [0], [float(-loss[middle, middle])], "o", color="#14357a", markersize=4, zorder=9)
            axes.set_zlim(low, 0)
            axes.set_title(title)
            axes.set_xlabel("v")
            axes.set_ylabel("r")
            axes.set_box_aspect((1, 1, 0.8), zoom=0.86)
            if place == len(panels) - 1:
                axes.set_zlabel("negative loss", labelpad=6)
            axes.view_init(elev=28, azim=-58)
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=5)
        return figure


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


def matrix(values: NDArray[np.float64], names: Sequence[str], *, xlabel: str, ylabel: str) -> Figure:
    """A square of numbers in [0, 100], each written in its field.

    Args:
        values: (k, k), rows downward.
        names: of rows and columns.
        xlabel: what the columns are.
        ylabel: what the rows are.
    """
    with style():
        side = 1.6 + 0.75 * len(names)
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return figure


def scatter_bounds(
    panels: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]],
) -> Figure:
    """Theorem 1 against DeepFool: each image's interval over the distance found, one panel a model.

    Args:
        panels: title, DeepFool distances, lower bounds, upper bounds, each (n,).
    """
    with style():
        figure = Figure(figsize=(3.1 * len(panels), 3.2), layout="constrained")
        for axes, (title, found, lower, upper) in zip(_row(figure, len(panels)), panels, strict=True):
            top = float(np.nanmax(np.concatenate([found, [1e-9]]))) * 1.1
            axes.plot([0, top], [0, top], color="#999999", linewidth=0.8)
            axes.vlines(found, lower, np.minimum(upper, 3 * top), color=COLOURS[0], alpha=0.35, linewidth=1)
            axes.plot(found, lower, ".", color=COLOURS[0], markersize=3, label="lower")
            axes.plot(found, np.minimum(upper, 3 * top), ".", color=COLOURS[1], markersize=3, label="upper")
            axes.set_xlim(0, top)
            axes.set_ylim(0, 2 * top)
            axes.set_title(title)
            axes.set_xlabel("DeepFool distance")
        figure.axes[0].set_ylabel("bounds of Theorem 1")
        figure.axes[0].legend()
        return figure


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])
