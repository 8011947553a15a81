"""Verbs of the gate: `compare` and `baseline update`."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustbench_cure.cli.options import PATH, POINTS, NumberRange, Percentage
from robustbench_cure.errors import UsageError

if TYPE_CHECKING:
    from robustbench_cure.evaluation.record import Record


@click.command()
@click.argument("new", type=PATH)
@click.argument("baseline", type=PATH)
@click.option(
    "--tolerance",
    type=POINTS,
    default="1",
    show_default=True,
    metavar="POINTS",
    help="Change of an accuracy that does not matter.",
)
@click.option(
    "--min-robust", type=Percentage(100), metavar="%", help="Worst-case robust accuracy to be reached."
)
@click.option(
    "--level",
    type=NumberRange(0, 50, min_open=True),
    default=1.0,
    show_default=True,
    metavar="%",
    help="Level of each exact one-sided test.",
)
@click.option(
    "--accept",
    type=click.Choice(["inconclusive", "suspicious rise"]),
    multiple=True,
    help="Outcomes whose exit code is 0 all the same; repeatable.",
)
@click.option("--markdown", type=PATH, help="Write a summary.")
@click.option("--junit", type=PATH, help="Write JUnit XML.")
@click.option("--json", type=PATH, help="Write everything as JSON.")
@click.option("--github", is_flag=True, help="Print annotations and add the summary to the job's.")
def compare(
    new: Path,
    baseline: Path,
    tolerance: Fraction,
    min_robust: Fraction | None,
    level: float,
    accept: tuple[str, ...],
    markdown: Path | None,
    junit: Path | None,
    json: Path | None,
    github: bool,
) -> int:
    """Is the run NEW as robust as BASELINE, sample by sample?

    Exit codes: 0 pass, 1 regression, suspicious rise or inconclusive, 2 not comparable.
    """
    from robustbench_cure.evaluation.storage import find_records
    from robustbench_cure.files import write_text
    from robustbench_cure.gate import render
    from robustbench_cure.gate.compare import compare_runs
    from robustbench_cure.gate.outcome import Rules

    rules = Rules(tolerance, min_robust, level / 100, accept)
    comparisons = compare_runs(find_records((new,)), find_records((baseline,)), rules)
    click.echo(render.terminal(comparisons, rules))
    for path, form in ((markdown, render.summary), (junit, render.to_junit), (json, render.to_json)):
        if path is not None:
            write_text(path, form(comparisons, rules))
    if github:
        click.echo("\n".join(render.to_annotations(comparisons, rules)))
        _add_to_summary(render.summary(comparisons, rules))
    return render.overall(comparisons, rules).exit_code


@click.group()
def baseline() -> None:
    """Keep the runs that others are held against."""


@baseline.command()
@click.argument("new", type=PATH)
@click.argument("baseline", type=PATH)
def update(new: Path, baseline: Path) -> None:
    """Make the run NEW the BASELINE, and show what changes."""
    from robustbench_cure.evaluation.storage import find_records
    from robustbench_cure.gate.baseline import places, replace

    records = places(find_records((new,)), new, baseline)
    for place, record in records.items():
        click.echo(_change(record, place) + "\n")
    replace(records)
    click.echo(f"baseline: {baseline}")


def _change(record: Record, place: Path) -> str:
    """The table of changes, under the usual rules; of a model without a baseline what it starts from."""
    from robustbench_cure.evaluation.record import Record
    from robustbench_cure.gate import render
    from robustbench_cure.gate.compare import compare as compare_records
    from robustbench_cure.gate.outcome import Rules
    from robustbench_cure.report.wording import interval, percent

    if not (place / "manifest.json").exists():
        worst = record.worst_case_accuracy
        return (
            f"{record.manifest.model.id}: new; worst case {percent(worst)} {interval(worst)} of {worst.total}"
        )
    return render.terminal([compare_records(record, Record.load(place), Rules())], Rules())


def _add_to_summary(text: str) -> None:
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    try:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise UsageError(f"GITHUB_STEP_SUMMARY: {place}: cannot be written: {error.strerror}") from None


VERBS = (compare, baseline)
