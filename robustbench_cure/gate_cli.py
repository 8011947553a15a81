"""The gate's verbs: options here, work in `robustbench_cure.gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from robustbench_cure.errors import UsageError

#: Points of accuracy.
POINTS = click.FloatRange(0, 50)


class Samples(click.ParamType):  # type: ignore[type-arg]
    """A positive number, or ``auto``."""

    name = "samples"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


def sized(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `evaluate` with ``--n auto`` turned into the number that the tolerance needs.

    Raises:
        UsageError: only one of the two was given, or the tolerance is too small.
    """
    tolerance = options.pop("tolerance")
    auto = options["n"] == "auto"
    if auto != (tolerance is not None):
        raise UsageError("--n auto and --tolerance POINTS go together")
    if not auto:
        return options
    from robustbench_cure.gate.paired import sample_size
    from robustbench_cure.gate.verdict import Rules

    if not 0 < tolerance < 25:
        raise UsageError(f"--tolerance {tolerance:g}: --n auto needs a tolerance between 0 and 25 points")
    try:
        n = sample_size(tolerance / 100, Rules().level)
    except ValueError as error:
        raise UsageError(f"--n auto: {error}") from None
    return options | {"n": n, "n_at_most": True}


@click.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("baseline", type=click.Path(path_type=Path))
@click.option("--tolerance", type=POINTS, default=1.0, show_default=True, help="Points of accuracy.")
@click.option("--floor", type=click.FloatRange(0, 100), help="Worst-case robust accuracy to be kept, %.")
@click.option(
    "--level",
    type=click.FloatRange(0, 50, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the tests, %.",
)
@click.option(
    "--accept",
    type=click.Choice(["inconclusive", "suspicious rise"]),
    multiple=True,
    help="Verdicts whose exit code is 0 all the same; repeatable.",
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a summary.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML.")
@click.option("--json", type=click.Path(path_type=Path), help="Write everything as JSON.")
@click.option("--github", is_flag=True, help="Annotations, and the job's summary.")
def compare(
    new: Path,
    baseline: Path,
    tolerance: float,
    floor: float | None,
    level: float,
    accept: tuple[str, ...],
    markdown: Path | None,
    junit: Path | None,
    json: Path | None,
    github: bool,
) -> int:
    """Is the run NEW as good as BASELINE, sample by sample?

    Exit codes: 0 pass, 1 regression, suspicious rise or inconclusive, 2 not comparable.
    """
    from robustbench_cure.gate.command import rules_of, run

    rules = rules_of(tolerance, floor, level, accept)
    return run(new, baseline, rules, markdown=markdown, junit=junit, json=json, github=github)


@click.group()
def baseline() -> None:
    """Keep the runs that others are held against."""


@baseline.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("baseline", type=click.Path(path_type=Path))
def update(new: Path, baseline: Path) -> None:
    """Make the run NEW the BASELINE, and show what changes."""
    from robustbench_cure.gate.command import update as work

    work(new, baseline)


VERBS = (compare, baseline)
