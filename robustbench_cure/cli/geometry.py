"""Verbs of `cure-bench` about the loss around images: options here, work in `robustbench_cure.studies`."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import click

from robustbench_cure.cli.options import PATH, STUDY, out, taking
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import EvolutionRequest, Request
from robustbench_cure.threat import parse_fraction

if TYPE_CHECKING:
    from robustbench_cure.threat import Norm

STEP = click.option(
    "--step", type=float, help="h of the finite differences; default: CURE's on the data set."
)
ITERATIONS = click.option(
    "--iterations",
    type=click.IntRange(2),
    default=30,
    show_default=True,
    help="Iterations of the Lanczos method.",
)


@click.command()
@STUDY
@STEP
@click.option(
    "--spectrum",
    type=click.Choice(["auto", "dense", "lanczos"]),
    default="auto",
    show_default=True,
    help="All eigenvalues, or the extreme ones; auto: all up to 4,096 inputs.",
)
@click.option(
    "--basis",
    type=click.Choice(["canonical", "random"]),
    default="canonical",
    show_default=True,
    help="Of the finite differences: single inputs, or a rotation.",
)
@ITERATIONS
@click.option(
    "--directions",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Random directions of the Frobenius norm.",
)
@taking(Request)
def curvature(
    request: Request,
    step: float | None,
    spectrum: Literal["auto", "dense", "lanczos"],
    basis: Literal["canonical", "random"],
    iterations: int,
    directions: int,
) -> None:
    """Curvature of the loss: profile, norms, alignment of the gradient.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.studies import curvature as study

    study.run(request, study.Settings(step, spectrum, basis, iterations, directions))


@click.command()
@STUDY
@STEP
@ITERATIONS
@taking(Request)
def bounds(request: Request, step: float | None, iterations: int) -> None:
    """Bounds of the CURE paper's Theorem 1, and DeepFool's distances."""
    from robustbench_cure.studies import bounds as study

    study.run(request, study.Settings(step, iterations))


@click.command()
@STUDY
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--eps", help="Radii, ascending fractions; default: up to that of the data set's table.")
@click.option("--steps", type=click.IntRange(1), help="Of PGD; default: the paper's, 20 (SVHN: 10).")
@taking(Request)
def curve(request: Request, norm: Norm, eps: str | None, steps: int | None) -> None:
    """Accuracy against the radius of the ball.

    The same command with the same --out goes on where it was stopped.
    """
    if eps is None and norm != "linf":
        raise UsageError(f"--norm {norm} needs --eps: the usual radii are those of linf")
    radii = None if eps is None else _radii(eps)
    if radii and norm == "linf" and radii[-1] > 1:
        raise UsageError(f"--eps {eps}: pixels lie between 0 and 1; write grey levels as 8/255")
    from robustbench_cure.studies import curve as study

    study.run(request, study.Settings(norm, radii, steps))


@click.command()
@STUDY
@click.option(
    "--points",
    type=click.IntRange(3),
    default=201,
    show_default=True,
    help="Points along each side of the plane.",
)
@taking(Request)
def section(request: Request, points: int) -> None:
    """Decision regions around an image; --seed chooses the image."""
    from robustbench_cure.studies import section as study

    study.run(request, study.Settings(points))


@click.command()
@STUDY
@click.option(
    "--points",
    type=click.IntRange(3),
    default=81,
    show_default=True,
    help="Points along each side of the plane.",
)
@taking(Request)
def surface(request: Request, points: int) -> None:
    """The loss around an image; --seed chooses the image."""
    from robustbench_cure.studies import surface as study

    study.run(request, study.Settings(points))


@click.command()
@STUDY
@taking(Request)
def gallery(request: Request) -> None:
    """Images with the smallest perturbations that change their labels."""
    from robustbench_cure.studies import gallery as study

    study.run(request, study.Settings())


@click.command()
@click.argument("logs", nargs=-1, required=True, type=PATH)
@out("Folder; default: runs/evolution-<time>.")
@taking(EvolutionRequest)
def evolution(request: EvolutionRequest) -> None:
    """Curvature and accuracy by epoch, from the logs of training runs."""
    from robustbench_cure.studies import evolution as study

    study.run(request)


def _radii(text: str) -> tuple[Fraction, ...]:
    try:
        radii = tuple(parse_fraction(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--eps {text}: {error}") from None
    if list(radii) != sorted(set(radii)):
        raise UsageError(f"--eps {text}: radii must ascend")
    return radii


VERBS = (curvature, bounds, curve, section, surface, gallery, evolution)
