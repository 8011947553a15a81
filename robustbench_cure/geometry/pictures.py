"""`cure-bench section|surface|gallery`: pictures of single images, for any models."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.plane import Grid, Plane, normal_plane, scan
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present
from robustbench_cure.threat import ThreatModel


def section(study: Study, *, points: int) -> dict[str, Grid]:
    """Regions of the labels around the first image (CURE paper, figure 1); returns the grids.

    Args:
        study: models, images (the first is drawn), folder.
        points: along each side of the square.
    """
    planes = _planes(study)
    reach = 2 * max(plane.distance for plane in planes.values())
    grids = _scan(study, planes, reach, points)
    label = int(study.labels[0])
    panels = [(name, grid.along.numpy(), grid.labels.numpy(), label) for name, grid in grids.items()]
    files = figures.save(figures.sections(panels), study.out / "section")
    _present_planes(
        study,
        planes,
        grids,
        files[0],
        title="Sections of the decision regions",
        lead=prose.SECTION,
        caption="The same scale in all panels, and for both axes.",
        points=points,
    )
    study.files += files
    return grids


def surface(study: Study, *, points: int) -> dict[str, Grid]:
    """Negative loss around the first image (CURE paper, figures 3 and 8); returns the grids.

    Args:
        study: models, images (the first is drawn), folder.
        points: along each side of the square.
    """
    planes = _planes(study)
    reach = 2 * max(plane.distance for plane in planes.values())
    grids = _scan(study, planes, reach, points)
    panels = [
        (name, grid.along.numpy().astype(np.float64), grid.loss.numpy().astype(np.float64))
        for name, grid in grids.items()
    ]
    files = figures.save(figures.surfaces(panels), study.out / "surface")
    _present_planes(
        study,
        planes,
        grids,
        files[0],
        title="Loss around an image",
        lead=prose.SURFACE,
        caption="The same scale in all panels; lengths are l2, in pixels.",
        points=points,
    )
    study.files += files
    return grids


def gallery(study: Study) -> pd.DataFrame:
    """Images, their smallest perturbations and the sums (CURE paper, figure 11); returns the distances.

    Args:
        study: models, images, folder.
    """
    data = study.data
    titles = [data.classes[k] for k in study.labels.tolist()]
    rows: list[tuple[str, NDArray[np.float32], list[str]]] = []
    rows.append(("image", study.images.numpy(), [""] * len(data)))
    found, cells, arrays = [], [], {"images": study.images.numpy()}
    for name, classifier in study.models.items():
        x = study.images.to(classifier.device)
        before = classifier.logits(x).argmax(1)
        proposal = deepfool(
            classifier, x, before, threat=ThreatModel.parse("l2", "0"), mode="minimal", clip=True
        )
        r = (proposal.x_adv - x).cpu()
        after = classifier.logits(proposal.x_adv).argmax(1).cpu()
        length = r.flatten(1).norm(dim=1)
        largest = r.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        names = [data.classes[k] for k in after.tolist()]
        was = [data.classes[k] for k in before.tolist()]
        seen = [f"{a} \u2192 {b}" for a, b in zip(was, names, strict=True)]
        rows.append((name, proposal.x_adv.cpu().clamp(0, 1).numpy(), seen))
        rows.append(
            ("perturbation", (0.5 + r / (2 * largest)).numpy(), [f"l2 {v:.2f}" for v in length.tolist()])
        )
        arrays[name] = proposal.x_adv.cpu().numpy()
        changed = after != before.cpu()
        table = pd.DataFrame(
            {
                "model": name,
                "sample_id": data.ids,
                "label": titles,
                "before": was,
                "after": names,
                "l2": length.numpy(),
                "linf": largest.flatten().numpy(),
                "changed": changed.numpy(),
            }
        )
        found.append(table)
        kept = table[table["changed"]]
        cells.append(
            [name, f"{len(kept)}/{len(data)}", f"{kept['l2'].median():.3f}", f"{kept['linf'].median():.3f}"]
        )
    everything = pd.concat(found, ignore_index=True)
    study.table("gallery", everything)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    study.write("gallery.npz", lambda file: file.write_bytes(buffer.getvalue()))
    files = figures.save(figures.gallery(rows, titles), study.out / "gallery")
    study.files += files
    present(
        study,
        title="Smallest perturbations",
        lead=prose.GALLERY,
        columns=("model", "changed", "median l2", "median l∞"),
        rows=cells,
        figures=[Shown(files[0], "Images and perturbations", "Above: true labels. Below: before and after.")],
        settings={"attack": "DeepFool, l2, to the nearest boundary"},
    )
    return everything


def _planes(study: Study) -> dict[str, Plane]:
    planes = {}
    for name, classifier in study.models.items():
        planes[name] = normal_plane(classifier, study.images[0], seed=study.seed)
        if not planes[name].reached:
            raise UsageError(
                f"{name}: DeepFool finds no boundary from {study.data.ids[0]}: choose another --seed"
            )
    return planes


def _scan(study: Study, planes: dict[str, Plane], reach: float, points: int) -> dict[str, Grid]:
    grids = {}
    for name, classifier in study.models.items():
        with ProgressLine(name, "points") as line:
            grids[name] = _scan_one(classifier, planes[name], int(study.labels[0]), reach, points, line)
    return grids


def _scan_one(
    classifier: Classifier, plane: Plane, label: int, reach: float, points: int, line: ProgressLine
) -> Grid:
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        line(done, points * points, "plane")

    return scan(classifier, plane, label, reach=reach, points=points, advance=advance)


def _present_planes(
    study: Study,
    planes: dict[str, Plane],
    grids: dict[str, Grid],
    figure: object,
    *,
    title: str,
    lead: tuple[str, ...],
    caption: str,
    points: int,
) -> None:
    arrays: dict[str, NDArray[np.generic]] = {}
    rows = []
    for name, grid in grids.items():
        arrays |= {
            f"{name}.along": grid.along.numpy(),
            f"{name}.labels": grid.labels.numpy(),
            f"{name}.loss": grid.loss.numpy(),
            f"{name}.n": planes[name].n.cpu().numpy(),
            f"{name}.v": planes[name].v.cpu().numpy(),
        }
        own = float((grid.labels == int(study.labels[0])).float().mean())
        rows.append(
            [name, f"{planes[name].distance:.3f}", f"{100 * own:.0f} %", f"{float(grid.loss.max()):.2f}"]
        )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    study.write(f"{study.verb}.npz", lambda file: file.write_bytes(buffer.getvalue()))
    study.table(study.verb, pd.DataFrame(rows, columns=["model", "distance", "own_region", "largest_loss"]))
    label = study.data.classes[int(study.labels[0])]
    present(
        study,
        title=f"{title}: {study.data.ids[0]} ({label})",
        lead=lead,
        columns=("model", "distance to the boundary (l2)", "own region", "largest loss"),
        rows=rows,
        figures=[Shown(figure, title, caption)],  # type: ignore[arg-type]
        settings={"image": study.data.ids[0], "points": points},
    )
