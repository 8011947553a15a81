"""`cure-bench surface`: the loss over a plane through an image.

Source: CURE paper, figures 3 and 8 (thesis, figures 8.3 and 8.8), which draw the negative loss: the image
stands on top, and an attack walks down. The plane is that of `section`. A cliff next to the dot is a small
perturbation that changes the label; a gentle slope is a loss that is nearly linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from robustbench_cure.geometry.plane import Grid
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Study, open_study, paragraphs
from robustbench_cure.studies.section import draw_planes

LEAD = paragraphs("""
Height is the negative cross-entropy of the true label over the plane of the nearest boundary's normal r
and a random direction v; the dot is the image. A cliff close to the dot is what an attack walks over;
the CURE paper finds it gone, and the surface nearly linear, after its training.
""")
CAPTION = "The same scale in all panels; lengths are l2, in pixels."


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        points: along each side of the square; odd numbers have the image itself in the middle.
    """

    points: int = 81


def run(request: Request, settings: Settings) -> dict[str, Grid]:
    """Load what a request names and draw it; see `measure`."""
    return measure(open_study("surface", request, default_n=1, all_correct=True), settings)


def measure(study: Study, settings: Settings) -> dict[str, Grid]:
    """Negative loss around the first image; the grids by model."""
    return draw_planes(study, settings.points, surfaces, "Loss around an image", LEAD, CAPTION)


def surfaces(grids: dict[str, Grid], label: int) -> Figure:  # noqa: ARG001 - as `draw_planes` calls it
    """Negative loss over planes, one panel a model, on one vertical scale; a dot at the image."""
    heights = {name: -grid.loss.numpy().astype(np.float64) for name, grid in grids.items()}
    low = min(float(height.min()) for height in heights.values())
    with plots.style():
        figure = Figure(figsize=(3.3 * len(grids), 3.2))
        for place, (name, height) in enumerate(heights.items()):
            axes = figure.add_subplot(1, len(grids), place + 1, projection="3d")
            along = grids[name].along.numpy().astype(np.float64)
            v, n = np.meshgrid(along, along)
            axes.plot_surface(
                v,
                n,
                height,
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
            axes.plot([0], [0], [height[middle, middle]], "o", color=plots.IMAGE, markersize=4, zorder=9)
            axes.set_zlim(low, 0)
            axes.set_title(name)
            axes.set_xlabel("v")
            axes.set_ylabel("r")
            axes.set_box_aspect((1, 1, 0.8), zoom=0.86)
            if place == len(grids) - 1:
                axes.set_zlabel("negative loss", labelpad=6)
            axes.view_init(elev=28, azim=-58)
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=5)
        return figure
