"""`cure-bench curve|bounds`: accuracy against eps, and Theorem 1 beside DeepFool, for any models."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pandas as pd
import torch

from robustbench_cure.attacks.losses import margins
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.bounds import bounds as theorem_bounds
from robustbench_cure.geometry.curve import robust_rows
from robustbench_cure.geometry.space import normalised_space
from robustbench_cure.geometry.theorem import theorem
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present
from robustbench_cure.threat import Norm, format_eps


def curve(study: Study, *, norm: Norm, eps: Sequence[Fraction], steps: int) -> pd.DataFrame:
    """Accuracy against eps (CURE paper, figure 6); returns the table.

    Args:
        study: models, images, folder.
        norm: of the ball.
        eps: radii, ascending.
        steps: of PGD, each a quarter of the radius.

    What an interrupted run found at the radii it finished is taken over.
    """
    rows, series, bands, cells = [], {}, {}, []
    x = np.array([float(radius) * 255 for radius in eps])
    for name, classifier in study.models.items():
        settings = {"norm": norm, "eps": ",".join(map(format_eps, eps)), "steps": steps, "seed": study.seed}
        kept = Kept(study.out / f"curve-{name}.npz", study.identity(name, **settings))
        before = torch.from_numpy(kept.rows["robust"]) if kept.rows else None
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
                known=before,
                keep=lambda known, kept=kept: kept.write({"robust": known.numpy()}),  # type: ignore[misc]
                pulse=lambda done, line=line: line(done, len(eps), f"PGD({steps})"),  # type: ignore[misc]
            )
        study.files.append(kept.path)
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
            "quadratic": found.quadratic,
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
        medians = [f"{known[key].median():.3g}" for key in ("lower", "quadratic", "upper", "deepfool", "nu")]
        share = f"{100 * inside.mean():.0f} %" if len(known) else "-"
        cells.append([name, f"{len(known)}/{len(study.data)}", *medians, share])
    everything = pd.concat(tables, ignore_index=True)
    study.table("bounds", everything)
    files = figures.save(figures.scatter_bounds(panels), study.out / "bounds")
    nu = np.linspace(0, 10, 201)
    one = torch.ones(len(nu))
    closed = theorem_bounds(one, one, 0.5 * one, torch.from_numpy(nu))
    curves = {"upper": (nu, closed.upper.numpy()), "lower": (nu, closed.lower.numpy())}
    drawn = figures.lines(curves, xlabel="curvature nu", ylabel="distance")
    against = figures.save(drawn, study.out / "bounds-curvature")
    study.files += files + against
    present(
        study,
        title="Bounds of Theorem 1 beside DeepFool",
        lead=prose.BOUNDS,
        columns=("model", "n", "lower", "quadratic", "upper", "DeepFool", "nu", "inside"),
        rows=cells,
        figures=[
            Shown(
                files[0],
                "Bounds against DeepFool distances",
                "A vertical line an image: from lower to upper.",
            ),
            Shown(
                against[0],
                "Bounds against curvature",
                "The bounds as functions of the largest curvature, for ||g|| = 1, c = 1 and g.u = 0.5.",
            ),
        ],
        settings={"step_h": study.step, "lanczos_iterations": iterations},
    )
    return everything
