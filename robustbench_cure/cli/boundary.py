"""Verbs of `cure-bench` about boundaries and regions: options here, work in `robustbench_cure.studies`."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from robustbench_cure.cli.options import STUDY, NumberRange, taking
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import Request
from robustbench_cure.threat import parse_fraction

if TYPE_CHECKING:
    from robustbench_cure.threat import Norm

N = TypeVar("N", int, float)

#: Of the smallest perturbation: further than the box is wide.
LARGEST_SCALE = 1000
#: Lengths of perturbations whose squares float32 holds; exact, as the lengths given.
LENGTHS = Fraction(1, 10**18), Fraction(10**18)

STEP = click.option(
    "--step",
    type=float,
    help="h of the differences, l2 in pixels; default: the distance of the boundary (detect: the median).",
)
DIRECTIONS = click.option(
    "--directions",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Random directions of the mean curvature.",
)


@click.command()
@STUDY
@click.option(
    "--norm",
    type=click.Choice(["both", "l2", "linf"]),
    default="both",
    show_default=True,
    help="Norm of the distances.",
)
@taking(Request)
def distance(request: Request, norm: Literal["both", "l2", "linf"]) -> None:
    """How far the nearest boundaries are: average robustness rho.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.studies import distance as study

    study.run(request, study.Settings(("l2", "linf") if norm == "both" else (norm,)))


@click.command()
@STUDY
@click.option(
    "--subspaces", "kind", type=click.Choice(["random", "dct"]), default="random", show_default=True
)
@click.option("--dimensions", metavar="M,M", help="Of random subspaces; default: d/4 to d/100, and 1.")
@click.option(
    "--width", type=click.IntRange(1), help="Side of a band's block; default: an eighth of the image."
)
@taking(Request)
def subspace(
    request: Request, kind: Literal["random", "dct"], dimensions: str | None, width: int | None
) -> None:
    """Smallest perturbations inside random or frequency subspaces.

    The same command with the same --out goes on where it was stopped.
    """
    if kind == "random" and width is not None:
        raise UsageError("--width belongs to --subspaces dct")
    if kind == "dct" and dimensions is not None:
        raise UsageError("--dimensions belongs to --subspaces random")
    wanted = None if dimensions is None else _dimensions(dimensions)
    from robustbench_cure.studies import subspace as study

    study.run(request, study.Settings(kind, wanted, width))


@click.command()
@STUDY
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--xi", help="Largest length; default: 10/255, digits 51/255, l2: 4 % of an image's.")
@click.option(
    "--method",
    type=click.Choice(["deepfool", "gradient"]),
    default="deepfool",
    show_default=True,
    help="Image after image as in the thesis, or ascent on batches.",
)
@click.option(
    "--delta",
    type=NumberRange(0, 1, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of images that may keep their label.",
)
@click.option(
    "--passes", type=click.IntRange(1), default=10, show_default=True, help="Passes over the images."
)
@taking(Request)
def universal(
    request: Request,
    norm: Norm,
    xi: str | None,
    method: Literal["deepfool", "gradient"],
    delta: float,
    passes: int,
) -> None:
    """One perturbation that changes the label of most images.

    The same command with the same --out goes on where it was stopped.
    """
    length = _length(xi)
    if length is not None and norm == "linf" and length > 1:
        raise UsageError(f"--xi {xi}: pixels lie between 0 and 1; write grey levels as 10/255")
    from robustbench_cure.studies import universal as study

    study.run(request, study.Settings(norm, length, method, delta, passes))


@click.command()
@STUDY
@STEP
@DIRECTIONS
@click.option(
    "--basis",
    type=click.Choice(["random", "canonical"]),
    default="random",
    show_default=True,
    help="Of the tangent space: a rotation, or single inputs.",
)
@click.option(
    "--profile/--no-profile",
    default=True,
    show_default=True,
    help="All principal curvatures, up to 4,096 inputs.",
)
@taking(Request)
def boundary(
    request: Request,
    step: float | None,
    directions: int,
    basis: Literal["random", "canonical"],
    profile: bool,
) -> None:
    """Principal and mean curvatures of the nearest boundaries.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.studies import boundary as study

    study.run(request, study.Settings(step, directions, basis, profile))


@click.command()
@STUDY
@STEP
@DIRECTIONS
@click.option(
    "--at",
    type=click.Choice(["image", "boundary"]),
    default="image",
    show_default=True,
    help="Where curvature is taken: at the image (thesis, algorithm 6), or at its nearest boundary.",
)
@click.option(
    "--scales", default="1,2,5", show_default=True, help="Of the smallest perturbation; 1 or more, ascending."
)
@click.option(
    "--classes",
    "candidates",
    type=click.IntRange(2),
    default=10,
    show_default=True,
    help="Number of classes that are considered.",
)
@taking(Request)
def detect(
    request: Request,
    step: float | None,
    directions: int,
    at: Literal["image", "boundary"],
    scales: str,
    candidates: int,
) -> None:
    """Are perturbed images detected by the curvature of boundaries?

    The same command with the same --out goes on where it was stopped.
    """
    multiples = _scales(scales)
    from robustbench_cure.studies import detection as study

    study.run(request, study.Settings(step, directions, at, multiples, candidates))


@click.command()
@STUDY
@STEP
@DIRECTIONS
@click.option("--learn", type=click.IntRange(2), help="Images to learn from; default: half of all.")
@click.option(
    "--dimension", type=click.IntRange(1), help="Of the subspaces; default: a sixteenth of the inputs."
)
@click.option("--xi", help="l2 length of the vectors that are to fool; default: a fifth of what noise needs.")
@click.option(
    "--draws", type=click.IntRange(1), default=10, show_default=True, help="Vectors of every subspace."
)
@taking(Request)
def shared(
    request: Request,
    step: float | None,
    directions: int,
    learn: int | None,
    dimension: int | None,
    xi: str | None,
    draws: int,
) -> None:
    """Directions that boundaries near many images share, on other images.

    The same command with the same --out goes on where it was stopped.
    """
    length = _length(xi)
    from robustbench_cure.studies import shared as study

    study.run(request, study.Settings(step, directions, learn, dimension, length, draws))


@click.command()
@STUDY
@click.option(
    "--pairs",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Pairs of each of the three kinds.",
)
@click.option(
    "--spacing",
    type=float,
    default=1e-4,
    show_default=True,
    help="Of samples on a path, in distances of its ends.",
)
@click.option(
    "--draws", type=click.IntRange(1), default=1000, show_default=True, help="Number of convex combinations."
)
@taking(Request)
def connectivity(request: Request, pairs: int, spacing: float, draws: int) -> None:
    """Are the regions of the labels connected, and how far from convex?

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.studies import connectivity as study

    study.run(request, study.Settings(pairs, spacing, draws))


def _length(xi: str | None) -> Fraction | None:
    if xi is None:
        return None
    try:
        length = parse_fraction(xi)
    except ValueError as error:
        raise UsageError(f"--xi {xi}: {error}") from None
    if not LENGTHS[0] <= length <= LENGTHS[1]:
        raise UsageError(f"--xi {xi}: must be positive, from 1e-18 to 1e18")
    return length


def _list(option: str, text: str, kind: Callable[[str], N], words: str) -> tuple[N, ...]:
    """Numbers separated by commas; `words`: what they are."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: {words}, separated by commas") from None


def _scales(text: str) -> tuple[float, ...]:
    scales = _list("--scales", text, float, "numbers")
    if list(scales) != sorted(set(scales)) or not 1 <= scales[0] <= scales[-1] <= LARGEST_SCALE:
        raise UsageError(f"--scales {text}: must ascend from 1 or more to {LARGEST_SCALE:,} at most")
    return scales


def _dimensions(text: str) -> tuple[int, ...]:
    dimensions = _list("--dimensions", text, int, "whole numbers")
    if list(dimensions) != sorted(set(dimensions)) or dimensions[0] < 1:
        raise UsageError(f"--dimensions {text}: must ascend from 1 or more")
    return dimensions


VERBS = (distance, boundary, detect, shared, subspace, universal, connectivity)
