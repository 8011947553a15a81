"""Verbs of `cure-bench` about boundaries and regions: options here, work in `robustbench_cure.geometry`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import click

from robustbench_cure.cli.geometry import positive_step, study_of, study_options
from robustbench_cure.cli.options import NumberRange
from robustbench_cure.errors import UsageError
from robustbench_cure.threat import parse_fraction

#: Of the smallest perturbation: further than the box is wide.
LARGEST_SCALE = 1000


@click.command()
@study_options
@click.option(
    "--norm",
    type=click.Choice(["both", "l2", "linf"]),
    default="both",
    show_default=True,
    help="In which distances are measured.",
)
def distance(words: list[str] | None, /, **options: Any) -> None:
    """How far the nearest boundaries are: average robustness rho.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.distance_study import distances as run

    norm = options.pop("norm")
    run(study_of("distance", words, options, 1000), norms=("l2", "linf") if norm == "both" else (norm,))


@click.command()
@study_options
@click.option(
    "--subspaces", "kind", type=click.Choice(["random", "dct"]), default="random", show_default=True
)
@click.option("--dimensions", metavar="M,M", help="Of random subspaces; default: d/4 to d/100, and 1.")
@click.option(
    "--width", type=click.IntRange(1), help="Side of a band's block; default: an eighth of the image."
)
def subspace(words: list[str] | None, /, **options: Any) -> None:
    """Smallest perturbations inside random or frequency subspaces.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.subspace_study import subspace as run

    kind, text, width = (options.pop(key) for key in ("kind", "dimensions", "width"))
    if kind == "random" and width is not None:
        raise UsageError("--width belongs to --subspaces dct")
    if kind == "dct" and text is not None:
        raise UsageError("--dimensions belongs to --subspaces random")
    dimensions = None if text is None else _dimensions(text)
    run(study_of("subspace", words, options, 100), kind=kind, dimensions=dimensions, width=width)


@click.command()
@study_options
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
@click.option("--passes", type=click.IntRange(1), default=10, show_default=True, help="Over the images.")
def universal(words: list[str] | None, /, **options: Any) -> None:
    """One perturbation that changes the label of most images.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.universal_study import universal_perturbations as run

    own = {key: options.pop(key) for key in ("norm", "xi", "method", "delta", "passes")}
    xi = _length(own["xi"])
    if xi is not None and own["norm"] == "linf" and xi > 1:
        raise UsageError(f"--xi {own['xi']}: pixels lie between 0 and 1; write grey levels as 10/255")
    run(study_of("universal", words, options | {"precision": "auto"}, 1000), **own)


PIXELS = click.option(
    "--step",
    type=float,
    help="h of the differences, l2 in pixels; default: the distance of the boundary (detect: the median).",
)
DIRECTIONS = click.option(
    "--directions",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Random ones, of the mean curvature.",
)


@click.command()
@study_options
@PIXELS
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
def boundary(words: list[str] | None, /, **options: Any) -> None:
    """How the nearest boundaries bend: principal and mean curvatures.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.boundary_study import boundary as run

    own = {key: options.pop(key) for key in ("directions", "basis", "profile", "step")}
    positive_step(own["step"])
    run(study_of("boundary", words, options, 100), **own)


@click.command()
@study_options
@PIXELS
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
    "--classes", "candidates", type=click.IntRange(2), default=10, show_default=True, help="Considered."
)
def detect(words: list[str] | None, /, **options: Any) -> None:
    """Are perturbed images told from natural ones by curvature?

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.detection_study import detection as run

    own = {key: options.pop(key) for key in ("at", "directions", "candidates", "step")}
    positive_step(own["step"])
    scales = _scales(options.pop("scales"))
    run(study_of("detect", words, options, 100), scales=scales, **own)


@click.command()
@study_options
@PIXELS
@DIRECTIONS
@click.option("--learn", type=click.IntRange(2), help="Images to learn from; default: half of all.")
@click.option(
    "--dimension", type=click.IntRange(1), help="Of the subspaces; default: a sixteenth of the inputs."
)
@click.option("--xi", help="l2 length of the vectors that are to fool; default: a fifth of what noise needs.")
@click.option(
    "--draws", type=click.IntRange(1), default=10, show_default=True, help="Vectors of every subspace."
)
def shared(words: list[str] | None, /, **options: Any) -> None:
    """Directions that boundaries near many images share, on other images.

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.shared_study import shared as run

    own = {key: options.pop(key) for key in ("directions", "learn", "dimension", "xi", "draws", "step")}
    positive_step(own["step"])
    xi = _length(own.pop("xi"))
    run(study_of("shared", words, options, 100), xi=xi, **own)


@click.command()
@study_options
@click.option("--pairs", type=click.IntRange(1), default=100, show_default=True, help="Of each of 3 kinds.")
@click.option(
    "--spacing",
    type=float,
    default=1e-4,
    show_default=True,
    help="Of samples on a path, in distances of its ends.",
)
@click.option(
    "--draws", type=click.IntRange(1), default=1000, show_default=True, help="Of convex combinations."
)
def connectivity(words: list[str] | None, /, **options: Any) -> None:
    """Are the regions of the labels connected, and how far from convex?

    The same command with the same --out goes on where it was stopped.
    """
    from robustbench_cure.geometry.connectivity_study import connectivity as run

    own = {key: options.pop(key) for key in ("pairs", "spacing", "draws")}
    if not 1e-6 <= own["spacing"] <= 0.1:  # a range of click's would let "nan" pass
        raise UsageError(f"--spacing {own['spacing']:g}: must lie between 1e-6 and 0.1")
    run(study_of("connectivity", words, options, 1000), **own)


#: Lengths of perturbations whose squares float32 holds; exact, as the lengths given.
LENGTHS = Fraction(1, 10**18), Fraction(10**18)


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


def _scales(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--scales {text}: numbers, separated by commas") from None
    if found != sorted(set(found)) or not 1 <= found[0] <= found[-1] <= LARGEST_SCALE:
        raise UsageError(f"--scales {text}: must ascend from 1 or more to {LARGEST_SCALE:,} at most")
    return found


def _dimensions(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--dimensions {text}: whole numbers, separated by commas") from None
    if found != sorted(set(found)) or found[0] < 1:
        raise UsageError(f"--dimensions {text}: must ascend from 1 or more")
    return found


VERBS = (distance, boundary, detect, shared, subspace, universal, connectivity)
