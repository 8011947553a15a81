"""The scatter of the CURE paper's figure 7: final margins of SPSA against those of PGD, a point an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from robustbench_cure.masking.comparisons import sign_test
from robustbench_cure.studies.plots import style

#: Side of the plot in its own units.
SIDE = 360.0
#: Colours for print: SPSA lower, and not.
RED, BLUE = "#c0392b", "#0072b2"


@dataclass(frozen=True)
class Point:
    """One image in the plot.

    Attributes:
        id: its name.
        at: (x, y) in units of the plot, y downwards.
        margins: PGD's and SPSA's.
        below: SPSA ended lower.
        picture: data address of the image, or "".
    """

    id: str
    at: tuple[float, float]
    margins: tuple[float, float]
    below: bool
    picture: str = ""


@dataclass(frozen=True)
class Panel:
    """A plot for a page.

    Attributes:
        title: what is on the axes.
        points: those below the diagonal last, so that they lie on top.
        ticks: (place in the plot, label) of both axes; y runs the other way.
        summary: counts, sign test and correlation in words.
        zero: place of margin zero, where images are lost.
    """

    title: str
    points: tuple[Point, ...]
    ticks: tuple[tuple[float, str], ...]
    summary: str
    zero: float


def statistics(pgd: Tensor, spsa: Tensor) -> dict[str, float | None]:
    """Counts below and above the diagonal, the exact sign test, Pearson's r (None: a margin does not vary).

    Args:
        pgd: margins PGD ended with, (m,).
        spsa: likewise.
    """
    below, above = int((spsa < pgd).sum()), int((spsa > pgd).sum())
    a, b = pgd.double().cpu(), spsa.double().cpu()
    spread = float(a.std() * b.std()) if len(a) > 1 else 0.0
    r = float(torch.corrcoef(torch.stack((a, b)))[0, 1]) if spread > 0 else None
    return {
        "points": len(pgd),
        "below": below,
        "above": above,
        "sign_test_p": sign_test(below, below + above),
        "pearson_r": r,
    }


def in_words(pgd: Tensor, spsa: Tensor) -> str:
    """One sentence of `statistics`."""
    s = statistics(pgd, spsa)
    r = "" if s["pearson_r"] is None else f", r = {s['pearson_r']:.2f}"
    return (
        f"{s['points']} images: SPSA ended lower on {s['below']} (red), higher on {s['above']}; "
        f"sign test p = {s['sign_test_p']:.2g}{r}"
    )


def panel(
    title: str, ids: Sequence[str], pgd: Tensor, spsa: Tensor, pictures: Sequence[str] | None = None
) -> Panel:
    """A plot whose axes share one range, which holds every point.

    Args:
        title: above the plot.
        ids: names of the images.
        pgd: margins PGD ended with, (m,).
        spsa: likewise.
        pictures: data addresses of the images.
    """
    x, y = pgd.double().tolist(), spsa.double().tolist()
    low, high = min([*x, *y, 0.0]), max([*x, *y, 0.0])
    room = 0.04 * (high - low or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return float(round(SIDE * (value - low) / (high - low), 2))

    points = [
        Point(name, (place(a), round(SIDE - place(b), 2)), (a, b), b < a, pictures[k] if pictures else "")
        for k, (name, a, b) in enumerate(zip(ids, x, y, strict=True))
    ]
    return Panel(
        title=title,
        points=tuple(sorted(points, key=lambda point: point.below)),
        ticks=tuple((place(value), f"{value:g}") for value in _round_values(low, high)),
        summary=in_words(pgd, spsa),
        zero=place(0.0),
    )


def figure(panels: Sequence[tuple[str, Tensor, Tensor]]) -> Figure:
    """The plots side by side for print.

    Args:
        panels: title, PGD's margins and SPSA's.
    """
    with style():
        drawing = Figure(figsize=(3.5 * len(panels), 3.7))
        for axes, (title, pgd, spsa) in zip(
            np.atleast_1d(drawing.subplots(1, len(panels))), panels, strict=True
        ):
            a, b = pgd.double().cpu().numpy(), spsa.double().cpu().numpy()
            low, high = min(a.min(), b.min(), 0.0), max(a.max(), b.max(), 0.0)
            room = 0.04 * (high - low or 1.0)
            span = (low - room, high + room)
            axes.plot(span, span, color="0.6", linewidth=0.8)
            axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
            below = b < a
            axes.scatter(a[~below], b[~below], s=9, color=BLUE, alpha=0.6, linewidths=0)
            axes.scatter(a[below], b[below], s=14, color=RED, marker="D", alpha=0.85, linewidths=0)
            axes.set(xlim=span, ylim=span, title=title, aspect="equal")
            axes.set_xlabel("margin J at the end of PGD")
            axes.set_ylabel("margin J at the end of SPSA")
        drawing.tight_layout()
    return drawing


def picture(image: Tensor) -> str:
    """The data address of an image (C,H,W) in [0, 1], as PNG."""
    pixels = (image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _round_values(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
