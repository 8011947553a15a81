"""The gate's verbs: options here, work in `robustbench_cure.gate`."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from robustbench_cure.cli.options import NumberRange
from robustbench_cure.errors import UsageError


class Percentage(click.ParamType):  # type: ignore[type-arg]
    """A number of per cent or points, kept as an exact share: 1.5 is 3/200."""

    name = "number"

    def __init__(self, most: int) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """The share."""
        if isinstance(value, Fraction):
            return value
        try:
            share = Fraction(Decimal(value)) / 100
        except (ArithmeticError, ValueError, TypeError):
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not 0 <= 100 * share <= self.most:
            self.fail(f"{value} is not between 0 and {self.most}.", param, ctx)
        return share


class Samples(click.ParamType):  # type: ignore[type-arg]
    """A positive number, or ``auto``."""

    name = "samples"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


#: Points of accuracy.
POINTS = Percentage(50)


def sized(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `evaluate` with ``--n auto`` turned into the number that the tolerance needs.

    Raises:
        UsageError: only one of the two was given, or the tolerance is too small or too large.
    """
    tolerance = options.pop("tolerance")
    auto = options["n"] == "auto"
    if auto != (tolerance is not None):
        raise UsageError("--n auto and --tolerance POINTS go together")
    if not auto:
        return options
    from robustbench_cure.gate.verdict import Rules
    from robustbench_cure.stats import sample_size

    if not 0 < tolerance < Fraction(1, 4):
        shown = f"{100 * float(tolerance):g}"
        raise UsageError(f"--tolerance {shown}: --n auto needs a tolerance between 0 and 25 points")
    try:
        n = sample_size(tolerance, Rules().level)
    except ValueError as error:
        raise UsageError(f"--n auto: {error}") from None
    return options | {"n": n, "n_at_most": True}


@click.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("baseline", type=click.Path(path_type=Path))
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
    help="Of each exact one-sided test.",
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
@click.option("--github", is_flag=True, help="Print annotations and add the summary to the job's.")
def compare(
    new: Path,
    baseline: Path,
    tolerance: Fraction,
    min_robust: Fraction | None,
    level: float,
    accept: tuple[str, ...],
    **outputs: Any,
) -> int:
    """Is the run NEW as robust as BASELINE, sample by sample?

    Exit codes: 0 pass, 1 regression, suspicious rise or inconclusive, 2 not comparable.
    """
    from robustbench_cure.gate.command import run
    from robustbench_cure.gate.verdict import Rules

    return run(new, baseline, Rules(tolerance, min_robust, level / 100, accept), **outputs)


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
