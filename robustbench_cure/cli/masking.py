"""The verbs that ask whether numbers can be trusted: options here, work in `robustbench_cure.studies`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustbench_cure.cli.options import DEVICE, PRECISION, STUDY, out, taking
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import Request

if TYPE_CHECKING:
    from robustbench_cure.classifier import Classifier
    from robustbench_cure.datasets import EvalSet
    from robustbench_cure.threat import Norm, ThreatModel


class _Even(click.IntRange):
    name = "even integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number % 2:
            self.fail(f"{number} is odd: one of the checks looks at half as many steps.", param, ctx)
        return number


@click.command()
@STUDY
@click.option(
    "--norm",
    type=click.Choice(["linf", "l2"]),
    help="Norm of the ball; default: that of the model's battery.",
)
@click.option("--eps", metavar="8/255", help="Its radius; default: that of the model's battery.")
@PRECISION
@click.option("--steps", type=_Even(2), default=100, show_default=True, help="Steps of PGD.")
@click.option("--spsa-steps", type=click.IntRange(4), default=20, show_default=True, help="Steps of SPSA.")
@click.option(
    "--spsa-samples",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Directions of each estimate of SPSA.",
)
@click.option("--queries", type=click.IntRange(2), default=500, show_default=True, help="Queries of Square.")
@click.option("--draws", type=click.IntRange(1), default=50, show_default=True, help="Draws of random noise.")
@click.option(
    "--restarts",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="Starts of the PGD that has several.",
)
@click.option(
    "--binarization",
    "--planted",
    "planted",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Images of the binarization test.",
)
@click.option("--surrogate", metavar="ID", help="Another model, whose adversarial examples are tried.")
@click.option(
    "--fail-on",
    type=click.Choice(["suspected", "not conclusive"]),
    multiple=True,
    help="Conclusions that make the exit code 1; repeatable.",
)
@taking(Request)
def masking(
    request: Request,
    norm: Norm | None,
    eps: str | None,
    steps: int,
    spsa_steps: int,
    spsa_samples: int,
    queries: int,
    draws: int,
    restarts: int,
    planted: int,
    surrogate: str | None,
    fail_on: tuple[str, ...],
) -> int:
    """Are gradients masked? Sixteen checks and a conclusion.

    SPSA against PGD, more steps and restarts, larger balls, noise, gradient-free attacks, the binarization
    test: what should hold if gradients can be trusted. The same command with the same --out goes on where it
    was stopped.
    """
    from robustbench_cure.masking.evidence import Settings
    from robustbench_cure.studies.engine import open_study
    from robustbench_cure.studies.masking import masking as run

    study = open_study("masking", request, default_n=200, precision=None)
    other = None if surrogate is None else _surrogate(surrogate, request, study.data)
    settings = Settings(
        steps=steps,
        spsa_steps=spsa_steps,
        spsa_samples=spsa_samples,
        draws=draws,
        restarts=restarts,
        queries=queries,
        planted=planted,
        seed=study.seed,
    )
    threat = _threat(request, norm, eps)
    return run(study, threat=threat, settings=settings, fail_on=fail_on, surrogate=other)


@click.command()
@DEVICE
@out("Write the results as JSON, too.")
def selftest(device: str, out: Path | None) -> int:
    """Does all of this work here? Attacks against closed forms, checks against obfuscated gradients.

    About a minute on a processor; exit code 1 if anything is not as it must be.
    """
    from robustbench_cure.studies.selftest import selftest as run

    return run(device, out)


def _surrogate(name: str, request: Request, data: EvalSet) -> Classifier:
    """The model whose adversarial examples are tried; it must take the same images."""
    from robustbench_cure.classifier import with_memory
    from robustbench_cure.evaluation.preflight import first_pass
    from robustbench_cure.zoo.models import load_model

    other = load_model(name, device=request.device, data=data, cards=request.cards)
    try:
        with_memory(other, partial(first_pass, other, data))
    except UsageError as error:
        raise UsageError(f"--surrogate: {error}") from error
    return other


def _threat(request: Request, norm: Norm | None, eps: str | None) -> ThreatModel:
    """The ball: as asked for, else that of the models' batteries, which must agree."""
    from robustbench_cure.loading import named_models
    from robustbench_cure.protocol.catalog import load_battery
    from robustbench_cure.threat import ThreatModel

    batteries = {model.battery for model in named_models(request)}
    threats = {load_battery(battery, cards=request.cards).threat for battery in batteries}
    if len(threats) > 1 and (norm is None or eps is None):
        raise UsageError("these models' batteries have different threat models: give --norm and --eps")
    default = threats.pop()
    if norm is not None and norm != default.norm and eps is None:
        raise UsageError(f"--norm {norm} needs --eps: the usual radius is that of {default.norm}")
    try:
        threat = ThreatModel.parse(norm or default.norm, eps or str(default.eps))
    except ValueError as error:
        raise UsageError(f"--eps {eps}: {error}") from None
    if threat.radius == 0:
        raise UsageError(f"--eps {eps}: must be positive")
    return threat


VERBS = (masking, selftest)
