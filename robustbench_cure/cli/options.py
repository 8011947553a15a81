"""Options that several verbs share, each declared once, and types of values that click has no own ones for.

A verb takes the options that a dataclass of `robustbench_cure.protocol.request` names as one typed object:

    @click.command()
    @with_options(MODELS, DATA, CARDS)
    @click.option("--points", type=int)
    @taking(Request)
    def verb(request: Request, points: int) -> None: ...
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

R = TypeVar("R")
Command = Callable[..., Any]
Option = Callable[[Command], Command]

# --- types -----------------------------------------------------------------------------------------------


class NumberRange(click.FloatRange):
    """A range of numbers without "not a number", which click lets through: it is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, a float in the range."""
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class Percentage(click.ParamType):  # type: ignore[type-arg]
    """A number of per cent or points, kept as an exact share: 1.5 is 3/200.

    Args:
        most: largest number allowed, in per cent.
    """

    name = "number"

    def __init__(self, most: int) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """The share, a fraction in [0, most / 100]."""
        if isinstance(value, Fraction):
            return value
        try:
            share = Fraction(Decimal(value)) / 100
        except (ArithmeticError, ValueError, TypeError):
            self.fail(f"{value!r} is not a number.", param, ctx)
        if not 0 <= 100 * share <= self.most:
            self.fail(f"{value} is not between 0 and {self.most}.", param, ctx)
        return share


class AutoOr(click.ParamType):  # type: ignore[type-arg]
    """A positive number, or a word, ``auto`` unless another is given, which becomes ``auto_value``."""

    name = "number"

    def __init__(self, auto_value: Any, word: str = "auto") -> None:
        self.auto_value, self.word = auto_value, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, int, or what stands for the word."""
        if value == self.word:
            return self.auto_value
        try:
            return click.IntRange(1).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r}: use {self.word} or a positive number.", param, ctx)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Finite numbers separated by commas, one for each channel."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers, a tuple of floats."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: write numbers separated by commas, .49,.48,.45.", param, ctx)
        if not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r}: the numbers must be finite.", param, ctx)
        return numbers


class PartOf(click.ParamType):  # type: ignore[type-arg]
    """``2/4``, the second of four parts."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The pair (i, k) with 1 <= i <= k."""
        if isinstance(value, tuple):
            return value
        part, _, parts = value.partition("/")
        if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            self.fail(f"{value!r}: write I/K with 1 <= I <= K.", param, ctx)
        return (int(part), int(parts))


#: A path, as `Path`.
PATH = click.Path(path_type=Path)
#: Points of accuracy, an exact share.
POINTS = Percentage(50)

# --- options ---------------------------------------------------------------------------------------------


def with_options(*options: Option) -> Option:
    """Several options as one decorator, in the order of the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def seed(help_text: str) -> Option:
    """The option ``--seed``, whose meaning differs from verb to verb."""
    return click.option("--seed", type=click.IntRange(0, 2**63 - 1), help=help_text)


def out(help_text: str, *, required: bool = False, default: Path | None = None) -> Option:
    """The option ``--out``: where results go."""
    if default is None:  # which click would take for a default, and ask for nothing
        return click.option("--out", type=PATH, required=required, help=help_text)
    return click.option("--out", type=PATH, default=default, help=help_text)


def dataset(help_text: str) -> Option:
    """The option ``--dataset``, whose default differs from verb to verb."""
    return click.option("--dataset", metavar="NAME", help=help_text)


MODEL_HELP = "Card id, package.module:factory, or robustbench:NAME"
MODELS = click.option("--model", "models", multiple=True, metavar="ID", help=MODEL_HELP + "; repeatable.")
DATA_DIR = click.option("--data-dir", type=PATH, help="Where the data are: a folder, or the .npz file.")
DATA = with_options(
    dataset("Data set; default: the battery's or the model's."),
    DATA_DIR,
    click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True),
)
#: What a model without a card, or other weights than the card's, need.
NETWORK = with_options(
    click.option("--weights", type=PATH, help="Weights file, instead of the card's."),
    click.option("--mean", type=Numbers(), metavar="M,M,M", help="Channel means of a model of your own."),
    click.option("--std", type=Numbers(), metavar="S,S,S", help="Channel standard deviations, likewise."),
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:1."
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the search; every success is verified in fp32.",
)
BATCH_SIZE = click.option(
    "--batch-size",
    type=AutoOr(None),
    default="auto",
    show_default=True,
    help="Images in one pass; auto: as many as fit well.",
)
CARDS = click.option(
    "--cards", multiple=True, metavar="DIR", help="Directory with further cards; repeatable."
)


#: What all verbs take that look at models on some images; named as those of `evaluate`.
STUDY = with_options(
    MODELS,
    DATA,
    click.option("--n", type=click.IntRange(1), help="Number of images."),
    NETWORK,
    DEVICE,
    BATCH_SIZE,
    seed("Seed of random draws, and of the image that section and surface show."),
    out("Folder; default: runs/<verb>-<time>."),
    CARDS,
)


def taking(kind: type[R]) -> Option:
    """Give a command the options that a dataclass names as one object of it, before all other options.

    The command line goes into its field ``command``, if it has one.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        @click.pass_context
        def call(context: click.Context, /, **options: Any) -> Any:
            own = {name: options.pop(name) for name in names & options.keys()}
            if "command" in names:
                own["command"] = shlex.join(["cure-bench", *(context.obj or [])])
            return command(kind(**own), **options)

        return call

    return decorate
