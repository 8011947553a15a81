"""`cure-bench section`: decision regions in a plane through an image.

Source: CURE paper, figure 1 (thesis, figures 5.5 and 8.1). The plane is spanned by the normal r of the
nearest boundary, upward, and a random direction v orthogonal to it, the same for all models. A robust network
keeps the boundary far from the dot in the middle, and nearly straight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.plane import Grid, Plane, normal_plane, scan
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, Study, counter, open_study, paragraphs

LEAD = paragraphs("""
Green is the region of the image's own label, other colours are other labels; the dot is the image. The
vertical axis is the normal of the nearest boundary, the horizontal one a random direction. The CURE
paper finds that regions widen and boundaries flatten in adversarially trained networks.
""")
CAPTION = "The same scale in all panels, and for both axes."


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        points: along each side of the square; odd numbers have the image itself in the middle.
    """

    points: int = 201


def run(request: Request, settings: Settings) -> dict[str, Grid]:
    """Load what a request names and draw it; see `measure`."""
    return measure(open_study("section", request, default_n=1, all_correct=True), settings)


def measure(study: Study, settings: Settings) -> dict[str, Grid]:
    """Regions of the labels around the first image; the grids by model."""
    return draw_planes(study, settings.points, _figure, "Sections of the decision regions", LEAD, CAPTION)


def draw_planes(
    study: Study,
    points: int,
    draw: Callable[[dict[str, Grid], int], Figure],
    title: str,
    lead: Sequence[str],
    caption: str,
) -> dict[str, Grid]:
    """Scan the plane of each model around the first image, and write figure, numbers and page.

    Args:
        study: models, images (the first is drawn), folder, seed of the random direction.
        points: along each side of the square, whose half side is twice the largest distance of a boundary.
        draw: the figure, of the grids and the image's label.
        title: of page and figure.
        lead: paragraphs of the page.
        caption: of the figure.

    Raises:
        UsageError: DeepFool reaches no boundary from the image.
    """
    image, label = study.data.ids[0], int(study.labels[0])
    planes = {name: _plane(study, name) for name in study.models}
    reach = 2 * max(plane.distance for plane in planes.values())
    grids = {}
    for name, classifier in study.models.items():
        with counter(name, "points", points * points, "plane") as advance:
            grids[name] = scan(classifier, planes[name], label, reach=reach, points=points, advance=advance)
    study.archive(
        study.verb,
        {
            f"{name}.{key}": values.cpu().numpy()
            for name, grid in grids.items()
            for key, values in {**vars(grid), "n": planes[name].n, "v": planes[name].v}.items()
        },
    )
    rows = pd.DataFrame(
        {
            "model": name,
            "distance": f"{planes[name].distance:.3f}",
            "own_region": f"{100 * float((grid.labels == label).float().mean()):.0f} %",
            "largest_loss": f"{float(grid.loss.max()):.2f}",
        }
        for name, grid in grids.items()
    )
    study.present(
        rows,
        COLUMNS,
        title=f"{title}: {image} ({study.data.classes[label]})",
        lead=lead,
        figures=[study.figure(study.verb, draw(grids, label), title, caption)],
        settings={"image": image, "points": points},
    )
    return grids


def _plane(study: Study, name: str) -> Plane:
    plane = normal_plane(study.models[name], study.images[0], seed=study.seed)
    if not plane.reached:
        raise UsageError(
            f"{name}: DeepFool finds no boundary from {study.data.ids[0]}: choose another --seed"
        )
    return plane


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "distance to the boundary (l2)": lambda row: row["distance"],
    "own region": lambda row: row["own_region"],
    "largest loss": lambda row: row["largest_loss"],
}


def _figure(grids: dict[str, Grid], label: int) -> Figure:
    """Regions of the labels, one panel a model; equal scales, a dot at the image."""
    with plots.style():
        figure = Figure(figsize=(2.9 * len(grids), 3.1), layout="constrained")
        for axes, (name, grid) in zip(plots.row_of_axes(figure, len(grids)), grids.items(), strict=True):
            along = grid.along.numpy()
            plots.regions(axes, along, along, grid.labels.numpy(), label)
            axes.plot(0, 0, "o", color=plots.IMAGE, markersize=4)
            axes.set_aspect("equal")
            axes.set_title(name)
            axes.set_xlabel("along v (random), l2 in pixels")
        figure.axes[0].set_ylabel("along r (normal), l2 in pixels")
        return figure
