"""`cure-bench evolution`: curvature and accuracy over the epochs of training runs, from their logs.

Source: CURE paper, figure 10 (supplement, figure 3): ||H||_F, ||Hz|| along the sign of the gradient, and the
accuracy under PGD after every epoch. Training measures them on held-out images, see `training.monitor`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click
import pandas as pd

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically
from robustbench_cure.geometry import prose
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.page import Shown, plain_table, render

#: Columns of a training log, and what the figure calls them.
PANELS = {"frobenius": "||H||_F", "hz": "||Hz||", "pgd": "accuracy under PGD (%)"}


def evolution(logs: Sequence[Path], *, out: Path | None, command: str) -> pd.DataFrame:
    """Draw training logs on shared axes; returns their rows, with the run's name.

    Args:
        logs: CSV files that `cure-bench train` writes beside the weights; the name of a run is its file's.
        out: folder; None: ``runs/evolution-<time>``.
        command: the command line, for the provenance.

    Raises:
        UsageError: not a training log, two of one name, or the folder is taken.
    """
    out = out or Path("runs") / f"evolution-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, not a directory; choose another --out")
    if (out / "manifest.json").exists():
        raise UsageError(f"--out {out}: already holds results; choose another --out")
    runs: dict[str, pd.DataFrame] = {}
    for log in logs:
        if log.stem in runs:
            raise UsageError(f"{log}: two logs are called {log.stem}: rename one")
        runs[log.stem] = _read(log)
    panels, cells = [], []
    for column, label in PANELS.items():
        scale = 100 if column == "pgd" else 1
        lines = {
            name: (rows["epoch"].to_numpy(float), scale * rows[column].to_numpy(float))
            for name, rows in runs.items()
        }
        panels.append((label, lines))
    for name, rows in runs.items():
        last = rows.iloc[-1]
        values = (f"{100 * last['clean']:.1f}", f"{100 * last['pgd']:.1f}")
        cells.append([name, str(len(rows)), f"{last['frobenius']:.3g}", f"{last['hz']:.3g}", *values])
    everything = pd.concat([rows.assign(run=name) for name, rows in runs.items()], ignore_index=True)
    table = out / "evolution.csv"
    write_atomically(table, lambda file: everything.to_csv(file, index=False, lineterminator="\n"))
    files = [*figures.save(figures.evolution(panels), out / "evolution"), table]
    heads = ("run", "epochs", "||H||_F", "||Hz||", "clean %", "PGD %")
    digests = {log.name: hashlib.sha256(log.read_bytes()).hexdigest() for log in logs}
    page = render(
        title="Curvature while training",
        verb="evolution",
        lead=prose.EVOLUTION,
        columns=heads,
        rows=cells,
        figures=[Shown(files[0], "Curvature and accuracy by epoch", "Held-out images, after every epoch.")],
        facts=[*((name, f"sha256 {digest}") for name, digest in digests.items()), ("command", command)],
        files=[path.name for path in files],
    )
    write_atomically(out / "index.html", lambda file: file.write_text(page, encoding="utf-8"))
    content = {
        "verb": "evolution",
        "command": command,
        "logs": digests,
        "files": sorted([*(path.name for path in files), "index.html"]),
    }
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(out / "manifest.json", lambda file: file.write_text(text, encoding="utf-8"))
    click.echo(plain_table(heads, cells))
    click.echo(f"page: {out / 'index.html'}")
    return everything


def _read(log: Path) -> pd.DataFrame:
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
