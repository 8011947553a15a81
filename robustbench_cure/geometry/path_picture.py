"""A segment that leaves its region and the path that does not, each in a section along its whole length.

Source: thesis, section 7.3, figure 7.2. Along every leg of a polyline a section is spanned by the leg and by
the normal r of the boundary nearest to the first end; the sections of its legs stand side by side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.connectivity import Path, labels_of
from robustbench_cure.geometry.plane import normal_plane
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown

#: Places along a polyline and across it; odd, so that the polyline itself is a row.
ALONG, ACROSS = 161, 61


@dataclass(frozen=True)
class Crossing:
    """Labels around a segment and around a path with the same ends.

    Attributes:
        points: of the path, float32 (m,C,H,W).
        height: across, in pixels, float64 (ACROSS,); 0 is the polyline.
        straight: labels around the segment, int64 (ACROSS, ALONG).
        path: likewise around the path.
        anchors: how far along the path its anchors lie, in [0, 1].
    """

    points: Tensor
    height: NDArray[np.float64]
    straight: NDArray[np.int64]
    path: NDArray[np.int64]
    anchors: NDArray[np.float64]


def cross(classifier: Classifier, path: Path) -> Crossing | None:
    """Labels around a path, and around the segment between its ends.

    Args:
        classifier: the model.
        path: between different ends.

    Returns:
        None: there is no path, it is straight, or DeepFool finds no boundary near its first end.
    """
    if path.points is None or not path.anchors:
        return None
    plane = normal_plane(classifier, path.points[0])
    if not plane.reached:
        return None
    height = np.linspace(-plane.distance, plane.distance, ACROSS)
    legs = (path.points[1:] - path.points[:-1]).flatten(1).double().norm(dim=1).numpy()
    way = np.concatenate([[0.0], np.cumsum(legs)]) / legs.sum()
    ends = path.points[[0, -1]]
    return Crossing(
        path.points,
        height,
        _around(classifier, ends, np.array([0.0, 1.0]), plane.n, height),
        _around(classifier, path.points, way, plane.n, height),
        way[1:-1],
    )


def _around(
    classifier: Classifier,
    points: Tensor,
    way: NDArray[np.float64],
    normal: Tensor,
    height: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Labels at every height over places along a polyline, whose points lie at ``way``."""
    points, up = points.to(classifier.device), torch.from_numpy(height).float().to(classifier.device)
    columns = []
    for place in np.linspace(0, 1, ALONG):
        leg = min(int(np.searchsorted(way, place, side="right")) - 1, len(way) - 2)
        share = (place - way[leg]) / (way[leg + 1] - way[leg])
        foot = (1 - share) * points[leg] + share * points[leg + 1]
        columns.append(labels_of(classifier, foot + up.view(-1, 1, 1, 1) * normal).cpu().numpy())
    return np.stack(columns, 1)


def draw_paths(study: Study, found: dict[str, Crossing]) -> Shown:
    """Write ``path.svg`` and ``path.npz``.

    Args:
        study: folder.
        found: by model.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, crossing in found.items():
        for key in ("points", "height", "straight", "path", "anchors"):
            arrays[f"{name}.{key}"] = np.asarray(getattr(crossing, key))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    study.write("path.npz", lambda file: file.write_bytes(buffer.getvalue()))
    files = figures.save(_figure(found), study.out / "path")
    study.files += files
    return Shown(
        files[0],
        "A segment that leaves the region, and the path found instead",
        "Green: the region of both ends. The line in the middle of a panel is the segment (left) or the path "
        "with its anchors (right); across it the normal r of the boundary nearest to the first end.",
    )


def _figure(found: dict[str, Crossing]) -> Figure:
    with figures.style():
        figure = Figure(figsize=(6.4, 1.9 * len(found)), layout="constrained")
        grid = figure.subplots(len(found), 2, squeeze=False, sharex=True, sharey="row")
        place = np.linspace(0, 1, ALONG)
        for row, (name, crossing) in zip(grid, found.items(), strict=True):
            own = int(crossing.path[ACROSS // 2, 0])
            for axes, labels in zip(row, (crossing.straight, crossing.path), strict=True):
                figures.regions(axes, place, crossing.height, labels, own)
                axes.axhline(0, color="#14357a", linewidth=1)
            marks = [0.0, *crossing.anchors, 1.0]
            row[0].plot([0, 1], [0, 0], "o", color="#14357a", markersize=4, clip_on=False)
            row[1].plot(marks, np.zeros(len(marks)), "o", color="#14357a", markersize=3, clip_on=False)
            row[0].set_ylabel(f"{name}\nalong r, pixels")
        grid[0][0].set_title("segment")
        grid[0][1].set_title("path")
        for axes in grid[-1]:
            axes.set_xlabel("share of the way")
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        return figure
