"""`cure-bench compare` and `cure-bench baseline update`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically
from robustbench_cure.gate import render
from robustbench_cure.gate.compare import Comparison, compare
from robustbench_cure.gate.verdict import Rules
from robustbench_cure.record import Record
from robustbench_cure.session import find_records


def run(
    new: Path,
    baseline: Path,
    rules: Rules,
    *,
    markdown: Path | None = None,
    junit: Path | None = None,
    json: Path | None = None,
    github: bool = False,
) -> int:
    """Compare two runs model by model, say what was found, and return the exit code.

    Args:
        new: a run directory.
        baseline: likewise.
        rules: what is tolerated.
        markdown: file for the summary; None: not written.
        junit: file for JUnit XML, likewise.
        json: file for everything, likewise.
        github: print annotations, and add the summary to the job's where GitHub gives a place for it.

    Raises:
        UsageError: not runs, or no model is in both.
    """
    comparisons = [compare(now, before, rules) for now, before in pairs(new, baseline)]
    click.echo(render.terminal(comparisons))
    summary = render.to_markdown(comparisons, rules)
    texts = {markdown: summary, junit: render.to_junit(comparisons), json: render.to_json(comparisons, rules)}
    for path, text in texts.items():
        if path is not None:
            _write(path, text)
    if github:
        for line in render.to_annotations(comparisons):
            click.echo(line)
        place = os.environ.get("GITHUB_STEP_SUMMARY")
        if place:
            with Path(place).open("a", encoding="utf-8") as file:
                file.write(summary + "\n")
    return render.exit_code(comparisons)


def pairs(new: Path, baseline: Path) -> list[tuple[Record, Record]]:
    """Records of the same models; where each run has one record, these two.

    Raises:
        UsageError: a model of the baseline is missing in the new run, or nothing is in both.
    """
    now, before = find_records((new,)), find_records((baseline,))
    if len(now) == len(before) == 1:
        return [(now[0], before[0])]
    known = {record.manifest.model.id: record for record in before}
    missing = sorted(known.keys() - {record.manifest.model.id for record in now})
    if missing:
        raise UsageError(f"{new}: has no run of {', '.join(missing)}, which the baseline {baseline} has")
    found = [(r, known[r.manifest.model.id]) for r in now if r.manifest.model.id in known]
    if not found:
        raise UsageError(f"{new} and {baseline} have no model in common")
    return found


def update(new: Path, baseline: Path) -> None:
    """Make a run the baseline: show what changes, then replace each record as a whole.

    Args:
        new: a run directory.
        baseline: where the baseline is or shall be.

    Raises:
        UsageError: the run is unreliable, not a run, or the place cannot be written.
    """
    records = find_records((new,))
    for record in records:
        if record.unreliable:
            raise UsageError(f"{record.path}: flagged unreliable: cannot be a baseline")
    alone = len(records) == 1 and records[0].path == new
    for record in records:
        place = baseline if alone else baseline / record.manifest.model.id
        click.echo(_change(record, place))
        _replace(record, place)
    click.echo(f"baseline: {baseline}")


def _change(record: Record, place: Path) -> str:
    if not (place / "manifest.json").exists():
        worst = record.worst_case_accuracy
        return f"{record.manifest.model.id}: new, worst case {100 * worst.value:.1f} % of {worst.total}"
    found: Comparison = compare(record, Record.load(place), Rules())
    return render.terminal([found])


def _replace(record: Record, place: Path) -> None:
    """Write the record beside its place, then swap the two; the old one is whole until then."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise UsageError(f"{place}: cannot be written: {error.strerror or error}") from None
    old = fresh / "old"
    try:
        copy = Record(record.manifest, record.samples)
        copy.save(fresh / "new")
        if place.exists():
            place.rename(old)
        (fresh / "new").rename(place)
    except OSError as error:
        if old.exists() and not place.exists():
            old.rename(place)
        raise UsageError(f"{place}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def rules_of(tolerance: float, floor: float | None, level: float, accept: Sequence[str]) -> Rules:
    """Rules from percentages and points, as they are typed."""
    return Rules(tolerance / 100, None if floor is None else floor / 100, level / 100, tuple(accept))
