"""`cure-bench bounds`: the bounds of Theorem 1 next to the distances that DeepFool finds.

Source: CURE paper, Theorem 1 and figure 4, see `geometry.bounds`. For a loss that is quadratic around an
image the distance of the nearest misclassification lies between two bounds that fall as the curvature grows.
Read the last column first: the share of images whose distance lies inside says how far the theorem holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from robustbench_cure.attacks.losses import margins
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.bounds import bounds, theorem
from robustbench_cure.geometry.space import normalised_space
from robustbench_cure.protocol.defaults import defaults_of
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, Study, counter, open_study, paragraphs, refuse_step

LEAD = paragraphs("""
If the loss were quadratic around an image, its distance to the threshold would lie between two bounds
that fall as the curvature nu grows. Here they are computed for the log-loss of the label against the
best other class, whose threshold log 2 is exactly the change of label, and compared with the distance
that DeepFool finds in the same normalised inputs, without its 2 % overshoot. "Quadratic" is the exact
distance of the quadratic model.

Networks are not quadratic: the last column says how often DeepFool's distance lies inside. The model
depends on the step: where it is longer than the distance it sees past the boundary. Images that
are misclassified, or along which the loss does not curve upwards, are left out.
""")


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        step: h of the finite differences, l2 in normalised inputs; None: that of the data set.
        iterations: of Lanczos.
    """

    step: float | None = None
    iterations: int = 30


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    refuse_step(settings.step)
    return measure(open_study("bounds", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Bounds and distances of all images classified correctly; the table.

    Raises:
        UsageError: a model classifies none of the images correctly.
    """
    h = settings.step or defaults_of(study.dataset).difference_step
    tables = {name: _table(study, name, h, settings.iterations) for name in study.models}
    everything = pd.concat(tables.values(), ignore_index=True)
    study.table("bounds", everything)
    known = {name: table.dropna(subset=["lower", "upper", "deepfool"]) for name, table in tables.items()}
    study.present(
        [
            {"model": name, "table": table, "n": len(table), "of": len(study.data)}
            for name, table in known.items()
        ],
        COLUMNS,
        title="Bounds of Theorem 1 and distances by DeepFool",
        lead=LEAD,
        figures=[
            study.figure(
                "bounds",
                _scatter(known),
                "Bounds against DeepFool distances",
                "A vertical line an image: from lower to upper.",
            ),
            study.figure(
                "bounds-curvature",
                closed_form(),
                "Bounds against curvature",
                "The bounds as functions of the largest curvature, for ||g|| = 1, c = 1 and g.u = 0.5.",
            ),
        ],
        settings={"step_h": h, "lanczos_iterations": settings.iterations},
    )
    return everything


def _table(study: Study, name: str, h: float, iterations: int) -> pd.DataFrame:
    """One row for each image that a model classifies correctly."""
    classifier = study.models[name]
    space = normalised_space(classifier)
    u, y = space.inputs(study.images), study.labels.to(classifier.device)
    right = margins(space.network.logits(u), y) > 0
    if not bool(right.any()):
        raise UsageError(f"{name}: no image is classified correctly: the theorem has nothing to say")
    with counter(name, "gradients", int(right.sum()) * iterations, "Lanczos") as advance:
        rows = theorem(space, u[right], y[right], h=h, iterations=iterations, advance=advance)
    columns = {
        "c": rows.c,
        "gradient_norm": rows.gradient_norm,
        "nu": rows.nu,
        "gradient_along_top": rows.along,
        "simple_lower": rows.bounds.simple_lower,
        "lower": rows.bounds.lower,
        "quadratic": rows.quadratic,
        "upper": rows.bounds.upper,
        "simple_upper": rows.bounds.simple_upper,
        "deepfool": rows.deepfool,
    }
    ids = [image for image, correct in zip(study.data.ids, right.tolist(), strict=True) if correct]
    return pd.DataFrame(
        {"model": name, "sample_id": ids, **{key: value.numpy() for key, value in columns.items()}}
    )


def _inside(table: pd.DataFrame) -> str:
    """Per cent of the images whose distance lies between the bounds."""
    inside = (table["lower"] <= table["deepfool"]) & (table["deepfool"] <= table["upper"])
    return f"{100 * inside.mean():.0f} %" if len(table) else "-"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "n": lambda row: f"{row['n']}/{row['of']}",
    "lower": lambda row: f"{row['table']['lower'].median():.3g}",
    "quadratic": lambda row: f"{row['table']['quadratic'].median():.3g}",
    "upper": lambda row: f"{row['table']['upper'].median():.3g}",
    "DeepFool": lambda row: f"{row['table']['deepfool'].median():.3g}",
    "nu": lambda row: f"{row['table']['nu'].median():.3g}",
    "inside": lambda row: _inside(row["table"]),
}


def _scatter(tables: dict[str, pd.DataFrame]) -> Figure:
    """Each image's interval over DeepFool's distance, one panel a model."""
    with plots.style():
        figure = Figure(figsize=(3.1 * len(tables), 3.2), layout="constrained")
        for axes, (name, table) in zip(plots.row_of_axes(figure, len(tables)), tables.items(), strict=True):
            deepfool, lower, upper = (table[key].to_numpy() for key in ("deepfool", "lower", "upper"))
            top = float(np.nanmax(np.concatenate([deepfool, [1e-9]]))) * 1.1
            upper = np.minimum(upper, 3 * top)
            axes.plot([0, top], [0, top], color=plots.GREY, linewidth=0.8)
            axes.vlines(deepfool, lower, upper, color=plots.COLOURS[0], alpha=0.35, linewidth=1)
            axes.plot(deepfool, lower, ".", color=plots.COLOURS[0], markersize=3, label="lower")
            axes.plot(deepfool, upper, ".", color=plots.COLOURS[1], markersize=3, label="upper")
            axes.set_xlim(0, top)
            axes.set_ylim(0, 2 * top)
            axes.set_title(name)
            axes.set_xlabel("DeepFool distance")
        figure.axes[0].set_ylabel("bounds of Theorem 1")
        figure.axes[0].legend()
        return figure


def closed_form() -> Figure:
    """The bounds over the curvature (CURE paper, figure 4)."""
    nu = np.linspace(0, 10, 201)
    one = torch.ones(len(nu))
    closed = bounds(one, one, 0.5 * one, torch.from_numpy(nu))
    curves = {"upper": (nu, closed.upper.numpy()), "lower": (nu, closed.lower.numpy())}
    return plots.lines(curves, xlabel="curvature nu", ylabel="distance")
