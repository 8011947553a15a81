"""`cure-bench curve`: accuracy against the radius of the ball.

Source: CURE paper, figure 6. One PGD at every radius, on the images that the smaller radii left: a curve that
cannot rise and begins at the clean accuracy. It should come down to zero for large radii; one that does not
says that the attack fails, not that the model is robust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.geometry.curve import robust_rows
from robustbench_cure.progress import ProgressLine
from robustbench_cure.protocol.defaults import defaults_of
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Study, open_study, paragraphs
from robustbench_cure.threat import Norm, format_eps

LEAD = paragraphs("""
PGD at every radius, on what the smaller radii left: the curve cannot rise, and begins at the clean
accuracy. A curve that does not come down for large radii is a sign of masked gradients.
""")


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        norm: of the ball.
        eps: radii, ascending, pixels in [0, 1]; None: those of the data set, which are l-infinity.
        steps: of PGD, each a quarter of the radius; None: those of the data set.
    """

    norm: Norm = "linf"
    eps: tuple[Fraction, ...] | None = None
    steps: int | None = None


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    return measure(open_study("curve", request, default_n=2000, precision=None), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Accuracy at every radius, by model; the table. An interrupted run is continued."""
    defaults = defaults_of(study.dataset)
    eps, steps, norm = settings.eps or defaults.radii, settings.steps or defaults.pgd_steps, settings.norm
    tables = {name: _table(name, eps, _robust(study, name, norm, eps, steps)) for name in study.models}
    table = pd.concat(tables.values(), ignore_index=True)
    study.table("curve", table)
    x = np.array([float(radius) * 255 for radius in eps])
    figure = plots.lines(
        {name: (x, 100 * part["accuracy"].to_numpy()) for name, part in tables.items()},
        xlabel=f"eps ({'l∞' if norm == 'linf' else 'l2'}, grey levels of 255)",
        ylabel="accuracy (%)",
        bands={
            name: (100 * part["ci_low"].to_numpy(), 100 * part["ci_high"].to_numpy())
            for name, part in tables.items()
        },
        marks=True,
    )
    caption = "Per cent of all images; the band is the 95 % Wilson interval."
    study.present(
        [
            {"model": name, "n": len(study.data), **dict(zip(part["eps"], part["accuracy"], strict=True))}
            for name, part in tables.items()
        ],
        {
            "model": lambda row: row["model"],
            "n": lambda row: str(row["n"]),
            **{
                radius: lambda row, radius=radius: f"{100 * row[radius]:.1f}"  # type: ignore[misc]
                for radius in map(format_eps, eps)
            },
        },
        title="Accuracy against the radius of the ball",
        lead=LEAD,
        figures=[study.figure("curve", figure, "Accuracy against eps", caption)],
        settings={"norm": norm, "pgd_steps": steps, "step_size": "eps/4", "loss": "cross-entropy"},
    )
    return table


def _robust(study: Study, name: str, norm: Norm, eps: Sequence[Fraction], steps: int) -> Tensor:
    """Which images are robust at which radius, bool (len(eps), n)."""
    radii = ",".join(map(format_eps, eps))
    cache = study.cache(name, norm=norm, eps=radii, steps=steps, seed=study.seed)
    with ProgressLine(name, "radii") as line:
        return robust_rows(
            study.models[name],
            study.images,
            study.labels,
            norm=norm,
            eps=eps,
            steps=steps,
            seed=study.seed,
            ids=study.data.ids,
            known=torch.from_numpy(cache.rows["robust"]) if cache.rows else None,
            checkpoint=lambda robust: cache.write({"robust": robust.numpy()}),
            advance=lambda done: line(done, len(eps), f"PGD({steps})"),
        )


def _table(name: str, eps: Sequence[Fraction], robust: Tensor) -> pd.DataFrame:
    """One row a radius."""
    rows = []
    for radius, alive in zip(eps, robust, strict=True):
        rate = Rate(int(alive.sum()), len(alive))
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
    return pd.DataFrame(rows)
