"""`cure-bench compare` and `cure-bench baseline update`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.storage import find_records
from robustbench_cure.files import write_atomically
from robustbench_cure.gate import baseline as keeping
from robustbench_cure.gate import render
from robustbench_cure.gate.compare import compare, compare_runs
from robustbench_cure.gate.verdict import Rules
from robustbench_cure.report.wording import interval, percent


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
        UsageError: one of them is not a finished run, or a file cannot be written.
    """
    comparisons = compare_runs(find_records((new,)), find_records((baseline,)), rules)
    click.echo(render.terminal(comparisons, rules))
    for path, form in ((markdown, render.to_markdown), (junit, render.to_junit), (json, render.to_json)):
        if path is not None:
            _write(path, form(comparisons, rules))
    if github:
        click.echo("\n".join(render.to_annotations(comparisons, rules)))
        _add_to_summary(render.to_markdown(comparisons, rules))
    return render.overall(comparisons, rules).exit_code


def update(new: Path, baseline: Path) -> None:
    """Make a run the baseline: show what changes, then replace all of it at once.

    Args:
        new: a run directory.
        baseline: where the baseline is or shall be. Its other models stay.

    Raises:
        UsageError: the run is unreliable or not finished, or the place cannot be written.
    """
    records = keeping.places(find_records((new,)), new, baseline)
    for place, record in records.items():
        click.echo(_change(record, place) + "\n")
    keeping.replace(records)
    click.echo(f"baseline: {baseline}")


def _change(record: Record, place: Path) -> str:
    """The table of changes, under the usual rules; of a model without a baseline what it starts from."""
    if not (place / "manifest.json").exists():
        worst = record.worst_case_accuracy
        return (
            f"{record.manifest.model.id}: new; worst case {percent(worst)} {interval(worst)} of {worst.total}"
        )
    return render.terminal([compare(record, Record.load(place), Rules())], Rules())


def _add_to_summary(text: str) -> None:
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    try:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise UsageError(f"GITHUB_STEP_SUMMARY: {place}: cannot be written: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
