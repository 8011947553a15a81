"""`cure-bench evolution`: curvature and accuracy over the epochs of training runs, from their logs.

Source: CURE paper, figure 10 (supplement, figure 3): ||H||_F, ||Hz|| along the sign of the gradient, and the
accuracy under PGD after every epoch. Training measures them on held-out images, see `training.monitor`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import EvolutionRequest
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, Results, paragraphs, results_folder

LEAD = paragraphs("""
Curvature and robustness after every epoch, as training logged them: the Frobenius norm of the Hessian of
the loss, its product with the sign of the gradient, and the accuracy under PGD. The CURE paper shows both
curvatures falling while robustness rises.
""")
#: Columns of a training log: label of the vertical axis, and what values are multiplied by.
PANELS = {"frobenius": ("||H||_F", 1), "hz": ("||Hz||", 1), "pgd": ("accuracy under PGD (%)", 100)}


def run(request: EvolutionRequest) -> pd.DataFrame:
    """Draw training logs on shared axes; returns their rows, with the run's name.

    Raises:
        UsageError: not a training log, two of one name, or the folder is taken.
    """
    results = Results(verb="evolution", out=results_folder("evolution", request.out), command=request.command)
    runs: dict[str, pd.DataFrame] = {}
    for log in request.logs:
        if log.stem in runs:
            raise UsageError(f"{log}: two logs are called {log.stem}: rename one")
        runs[log.stem] = _read(log)
    everything = pd.concat([rows.assign(run=name) for name, rows in runs.items()], ignore_index=True)
    results.table("evolution", everything)
    figure = results.figure(
        "evolution", _figure(runs), "Curvature and accuracy by epoch", "Held-out images, after every epoch."
    )
    last = [{"run": name, "epochs": len(rows), **rows.iloc[-1].to_dict()} for name, rows in runs.items()]
    heads, cells = list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in last]
    digests = {log.name: hashlib.sha256(log.read_bytes()).hexdigest() for log in request.logs}
    results.page(
        title="Curvature while training",
        lead=LEAD,
        columns=heads,
        rows=cells,
        figures=[figure],
        facts=[
            *((name, f"sha256 {digest}") for name, digest in digests.items()),
            ("command", request.command),
        ],
    )
    results.manifest(logs=digests)
    results.echo(heads, cells)
    return everything


COLUMNS: Columns = {
    "run": lambda row: row["run"],
    "epochs": lambda row: str(row["epochs"]),
    "||H||_F": lambda row: f"{row['frobenius']:.3g}",
    "||Hz||": lambda row: f"{row['hz']:.3g}",
    "clean %": lambda row: f"{100 * row['clean']:.1f}",
    "PGD %": lambda row: f"{100 * row['pgd']:.1f}",
}


def _figure(runs: dict[str, pd.DataFrame]) -> Figure:
    """Curves over epochs, one panel a column, the runs in the same colours; vertical axes from zero."""
    with plots.style():
        figure = Figure(figsize=(3.0 * len(PANELS), 2.9), layout="constrained")
        for axes, (column, (label, scale)) in zip(
            plots.row_of_axes(figure, len(PANELS)), PANELS.items(), strict=True
        ):
            for index, (name, rows) in enumerate(runs.items()):
                epochs, values = rows["epoch"].to_numpy(float), scale * rows[column].to_numpy(float)
                axes.plot(epochs, values, label=name, **plots.line_style(index, 3))
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
        figure.axes[0].legend()
        return figure


def _read(log: Path) -> pd.DataFrame:
    """The rows of a training log."""
    try:
        rows = pd.read_csv(log)
    except FileNotFoundError:
        raise UsageError(f"{log}: no such file") from None
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UsageError(f"{log}: not a training log: {error}") from None
    needed = ["epoch", "clean", *PANELS]
    missing = [name for name in needed if name not in rows]
    if missing:
        raise UsageError(f"{log}: not a training log: it has no column {missing[0]}")
    if rows.empty:
        raise UsageError(f"{log}: no epoch has ended yet")
    numbers = rows[needed].apply(pd.to_numeric, errors="coerce")
    if numbers.isna().to_numpy().any():
        raise UsageError(f"{log}: not a training log: some values are not numbers")
    return rows
