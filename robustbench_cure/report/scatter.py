"""The scatter of the CURE paper's figure 7 on a page: final margins of SPSA against those of PGD, as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from robustbench_cure.masking.checks import statistics
from robustbench_cure.masking.evidence import PairedMargins

#: Side of the plot in its own units.
SIDE = 360.0


@dataclass(frozen=True)
class ScatterPoint:
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
class MarginScatter:
    """A plot for a page.

    Attributes:
        title: what is on the axes.
        points: those below the diagonal last, so that they lie on top.
        ticks: (place in the plot, label) of both axes; y runs the other way.
        summary: counts, sign test and correlation in words.
        zero: place of margin zero, where images are lost.
    """

    title: str
    points: tuple[ScatterPoint, ...]
    ticks: tuple[tuple[float, str], ...]
    summary: str
    zero: float


def margin_scatter(pairs: PairedMargins, pictures: Sequence[str] | None = None) -> MarginScatter:
    """A plot whose axes share one range, which holds every point.

    Args:
        pairs: margins of each image.
        pictures: data addresses of the images, see `picture`.
    """
    x, y = pairs.pgd.double().tolist(), pairs.spsa.double().tolist()
    low, high = min([*x, *y, 0.0]), max([*x, *y, 0.0])
    room = 0.04 * (high - low or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return float(round(SIDE * (value - low) / (high - low), 2))

    points = [
        ScatterPoint(
            name, (place(a), round(SIDE - place(b), 2)), (a, b), b < a, pictures[k] if pictures else ""
        )
        for k, (name, a, b) in enumerate(zip(pairs.ids, x, y, strict=True))
    ]
    return MarginScatter(
        title=pairs.title,
        points=tuple(sorted(points, key=lambda point: point.below)),
        ticks=tuple((place(value), f"{value:g}") for value in _round_values(low, high)),
        summary=_in_words(pairs),
        zero=place(0.0),
    )


def picture(image: Tensor) -> str:
    """The data address of an image (C,H,W) in [0, 1], as PNG."""
    pixels = (image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _in_words(pairs: PairedMargins) -> str:
    s = statistics(pairs)
    r = "" if s["pearson_r"] is None else f", r = {s['pearson_r']:.2f}"
    return (
        f"{s['points']} images: SPSA ended lower on {s['below']} (red), higher on {s['above']}; "
        f"sign test p = {s['sign_test_p']:.2g}{r}"
    )


def _round_values(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
