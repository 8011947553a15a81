"""Verbs of `cure-bench` about the loss around images: options here, work in `robustbench_cure.geometry`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from robustbench_cure.cli.options import STUDY
from robustbench_cure.errors import UsageError
from robustbench_cure.threat import parse_fraction


def study_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that all verbs share which look at models on some images."""
    return STUDY(click.pass_obj(command))


STEP = click.option(
    "--step", type=float, help="h of the finite differences; default: CURE's on the data set."
)
ITERATIONS = click.option(
    "--iterations", type=click.IntRange(2), default=30, show_default=True, help="Of Lanczos."
)


def study_of(verb: str, words: list[str] | None, options: dict[str, Any], default_n: int, **more: Any) -> Any:
    """The models, images and folder that `study_options` name.

    Where the options name no precision slopes are taken in float32: distances, normals and differences are
    only as good as they are. ``"auto"`` is for searches whose finds are verified.
    """
    from robustbench_cure.protocol.request import Request
    from robustbench_cure.studies.engine import open_study

    step = more.pop("step", None)
    positive_step(step)
    command = shlex.join(["cure-bench", *(words or [])])
    return open_study(
        verb,
        Request(**({"precision": "fp32"} | options)),
        step=step,
        default_n=default_n,
        command=command,
        first_by_seed=more.pop("first_by_seed", False),
    )


@click.command()
@study_options
@STEP
@click.option(
    "--spectrum",
    type=click.Choice(["auto", "dense", "lanczos"]),
    default="auto",
    show_default=True,
    help="All eigenvalues, or the ends; auto: all up to 4,096 inputs.",
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
    "--directions", type=click.IntRange(1), default=100, show_default=True, help="Of the Frobenius norm."
)
def curvature(words: list[str] | None, /, **options: Any) -> None:
    """Curvature of the loss: profile, norms, alignment of the gradient.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.curvature import curvature as run

    own = {key: options.pop(key) for key in ("basis", "iterations", "directions")}
    method = options.pop("spectrum")
    run(study_of("curvature", words, options, 100, step=options.pop("step")), method=method, **own)


@click.command()
@study_options
@STEP
@ITERATIONS
def bounds(words: list[str] | None, /, **options: Any) -> None:
    """Bounds of the CURE paper's Theorem 1 beside DeepFool's distances."""
    from robustbench_cure.geometry.charts import bounds as run

    iterations = options.pop("iterations")
    run(study_of("bounds", words, options, 100, step=options.pop("step")), iterations=iterations)


@click.command()
@study_options
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--eps", help="Radii, ascending fractions; default: up to that of the data set's table.")
@click.option("--steps", type=click.IntRange(1), help="Of PGD; default: the paper's, 20 (SVHN: 10).")
def curve(words: list[str] | None, /, **options: Any) -> None:
    """Accuracy against the radius of the ball.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.charts import curve as run
    from robustbench_cure.geometry.curve import RADII, STEPS

    eps, norm, steps = (options.pop(key) for key in ("eps", "norm", "steps"))
    if eps is None and norm != "linf":
        raise UsageError(f"--norm {norm} needs --eps: the usual radii are those of linf")
    radii = None if eps is None else _radii(eps)
    if radii and norm == "linf" and radii[-1] > 1:
        raise UsageError(f"--eps {eps}: pixels lie between 0 and 1; write grey levels as 8/255")
    study = study_of("curve", words, options | {"precision": "auto"}, 2000)
    radii = radii or _radii(RADII.get(study.dataset, RADII["cifar10"]))
    run(study, eps=radii, norm=norm, steps=steps or STEPS.get(study.dataset, STEPS["cifar10"]))


@click.command()
@study_options
@click.option("--points", type=click.IntRange(3), default=201, show_default=True, help="Along each side.")
def section(words: list[str] | None, /, **options: Any) -> None:
    """Decision regions around an image; --seed chooses the image."""
    from robustbench_cure.geometry.pictures import section as run

    points = options.pop("points")
    run(study_of("section", words, options, 1, first_by_seed=True), points=points)


@click.command()
@study_options
@click.option("--points", type=click.IntRange(3), default=81, show_default=True, help="Along each side.")
def surface(words: list[str] | None, /, **options: Any) -> None:
    """The loss around an image; --seed chooses the image."""
    from robustbench_cure.geometry.pictures import surface as run

    points = options.pop("points")
    run(study_of("surface", words, options, 1, first_by_seed=True), points=points)


@click.command()
@study_options
def gallery(words: list[str] | None, /, **options: Any) -> None:
    """Images with the smallest perturbations that change their labels."""
    from robustbench_cure.geometry.pictures import gallery as run

    run(study_of("gallery", words, options, 6))


@click.command()
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: runs/evolution-<time>.")
@click.pass_obj
def evolution(words: list[str] | None, /, logs: tuple[Path, ...], out: Path | None) -> None:
    """Curvature and accuracy by epoch, from the logs of training runs."""
    from robustbench_cure.geometry.evolution import evolution as run

    run(logs, out=out, command=shlex.join(["cure-bench", *(words or [])]))


def positive_step(step: float | None) -> None:
    """Refuse a ``--step`` that is no length; none is the default of the command."""
    if step is not None and not 0 < step < float("inf"):
        raise UsageError(f"--step {step:g}: must be positive")


def _radii(text: str) -> list[Fraction]:
    try:
        radii = [parse_fraction(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--eps {text}: {error}") from None
    if radii != sorted(set(radii)):
        raise UsageError(f"--eps {text}: radii must ascend")
    return radii


VERBS = (curvature, bounds, curve, section, surface, gallery, evolution)
