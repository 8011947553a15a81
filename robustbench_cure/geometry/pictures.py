"""`cure-bench curve|bounds|section|surface`: the other figures of the CURE paper, for any models."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import figures, prose
from robustbench_cure.geometry.curve import robust_rows
from robustbench_cure.geometry.page import Shown, present
from robustbench_cure.geometry.plane import Grid, Plane, normal_plane, scan
from robustbench_cure.geometry.space import normalised_space
from robustbench_cure.geometry.study import Study
from robustbench_cure.geometry.theorem import theorem
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate
from robustbench_cure.threat import Norm, ThreatModel, format_eps


def curve(study: Study, *, norm: Norm, eps: Sequence[Fraction], steps: int) -> pd.DataFrame:
    """Accuracy against eps (CURE paper, figure 6); returns the table.

    Args:
        study: models, images, folder.
        norm: of the ball.
        eps: radii, ascending.
        steps: of PGD, each a quarter of the radius.
    """
    rows, series, bands, cells = [], {}, {}, []
    x = np.array([float(radius) * 255 for radius in eps])
    for name, classifier in study.models.items():
        with ProgressLine(name, "radii") as line:
            alive = robust_rows(
                classifier,
                study.images,
                study.labels,
                norm=norm,
                eps=eps,
                steps=steps,
                seed=study.seed,
                ids=study.data.ids,
                advance=lambda done, total, line=line: line(done, total, f"PGD({steps})"),  # type: ignore[misc]
            )
        rates = [Rate(int(row.sum()), len(row)) for row in alive]
        series[name] = (x, np.array([100 * rate.value for rate in rates]))
        edges = np.array([rate.interval for rate in rates])
        bands[name] = (100 * edges[:, 0], 100 * edges[:, 1])
        for radius, rate in zip(eps, rates, strict=True):
            low, high = rate.interval
            rows.append(
                {
                    "model": name,
                    "eps": format_eps(radius),
                    "accuracy": rate.value,
                    "n": rate.total,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
        cells.append([name, str(len(study.data)), *(f"{100 * rate.value:.1f}" for rate in rates)])
    table = pd.DataFrame(rows)
    study.table("curve", table)
    figure = figures.lines(
        series,
        xlabel=f"eps ({'l∞' if norm == 'linf' else 'l2'}, grey levels of 255)",
        ylabel="accuracy (%)",
        bands=bands,
        marks=True,
    )
    files = figures.save(figure, study.out / "curve")
    study.files += files
    present(
        study,
        title="Accuracy against the radius of the ball",
        lead=prose.CURVE,
        columns=("model", "n", *(format_eps(radius) for radius in eps)),
        rows=cells,
        figures=[
            Shown(
                files[0],
                "Accuracy against eps",
                "Per cent of all images; the band is the 95 % Wilson interval.",
            )
        ],
        settings={"norm": norm, "pgd_steps": steps, "step_size": "eps/4", "loss": "cross-entropy"},
    )
    return table


def bounds(study: Study, *, iterations: int) -> pd.DataFrame:
    """Theorem 1 beside DeepFool's distances (CURE paper, section 3); returns the table.

    Args:
        study: models, images, folder, step.
        iterations: of Lanczos.

    Raises:
        UsageError: a model classifies none of the images correctly.
    """
    tables, panels, cells = [], [], []
    for name, classifier in study.models.items():
        space = normalised_space(classifier)
        u, y = space.inputs(study.images), study.labels.to(classifier.device)
        right = margins(space.network.logits(u), y) > 0
        if not bool(right.any()):
            raise UsageError(f"{name}: no image is classified correctly: the theorem has nothing to say")
        with ProgressLine(name, "gradients") as line:
            total, done = int(right.sum()) * iterations, 0

            def advance(n: int, line: ProgressLine = line, total: int = total) -> None:
                nonlocal done
                done += n
                line(done, total, "Lanczos")

            found = theorem(
                space,
                u[right],
                y[right],
                h=study.step,
                iterations=iterations,
                seed=study.seed,
                advance=advance,
            )
        ids = [name_ for name_, kept in zip(study.data.ids, right.tolist(), strict=True) if kept]
        columns = {
            "c": found.c,
            "gradient_norm": found.gradient_norm,
            "nu": found.nu,
            "gradient_along_top": found.along,
            "simple_lower": found.bounds.simple_lower,
            "lower": found.bounds.lower,
            "upper": found.bounds.upper,
            "simple_upper": found.bounds.simple_upper,
            "deepfool": found.deepfool,
        }
        table = pd.DataFrame({key: value.numpy() for key, value in columns.items()})
        table.insert(0, "model", name)
        table.insert(1, "sample_id", ids)
        tables.append(table)
        known = table.dropna(subset=["lower", "upper", "deepfool"])
        inside = (known["lower"] <= known["deepfool"]) & (known["deepfool"] <= known["upper"])
        panels.append(
            (name, known["deepfool"].to_numpy(), known["lower"].to_numpy(), known["upper"].to_numpy())
        )
        medians = [f"{known[key].median():.3g}" for key in ("lower", "deepfool", "upper", "nu")]
        share = f"{100 * inside.mean():.0f} %" if len(known) else "-"
        cells.append([name, f"{len(known)}/{len(study.data)}", *medians, share])
    everything = pd.concat(tables, ignore_index=True)
    study.table("bounds", everything)
    files = figures.save(figures.scatter_bounds(panels), study.out / "bounds")
    study.files += files
    present(
        study,
        title="Bounds of Theorem 1 beside DeepFool",
        lead=prose.BOUNDS,
        columns=("model", "n", "lower", "DeepFool", "upper", "nu", "inside"),
        rows=cells,
        figures=[
            Shown(
                files[0],
                "Bounds against DeepFool distances",
                "A vertical line an image: from lower to upper.",
            )
        ],
        settings={"step_h": study.step, "lanczos_iterations": iterations},
    )
    return everything


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
        rows.append((name, proposal.x_adv.cpu().clamp(0, 1).numpy(), names))
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
                "before": [data.classes[k] for k in before.tolist()],
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
        figures=[Shown(files[0], "Images and perturbations", "Above: true labels. Below: labels after.")],
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
