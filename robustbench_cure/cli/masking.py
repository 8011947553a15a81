"""The verbs that ask whether numbers can be trusted: options here, work in `robustbench_cure.masking`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from robustbench_cure.cli.options import STUDY, taking
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import Request


class _Even(click.IntRange):
    name = "even integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number % 2:
            self.fail(f"{number} is odd: one of the checks looks at half as many steps.", param, ctx)
        return number


@click.command()
@STUDY
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Default: that of the model's battery.")
@click.option("--eps", metavar="8/255", help="Default: that of the model's battery.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the search.",
)
@click.option("--steps", type=_Even(2), default=100, show_default=True, help="Of PGD.")
@click.option("--spsa-steps", type=click.IntRange(4), default=20, show_default=True)
@click.option("--spsa-samples", type=click.IntRange(1), default=64, show_default=True)
@click.option("--queries", type=click.IntRange(2), default=500, show_default=True, help="Of Square.")
@click.option("--draws", type=click.IntRange(1), default=50, show_default=True, help="Of random noise.")
@click.option("--restarts", type=click.IntRange(2), default=5, show_default=True)
@click.option(
    "--planted", type=click.IntRange(0), default=32, show_default=True, help="Planted adversarial examples."
)
@click.option("--surrogate", metavar="ID", help="Another model, whose adversarial examples are tried.")
@click.option(
    "--fail-on",
    type=click.Choice(["suspected", "not conclusive"]),
    multiple=True,
    help="Verdicts that make the exit code 1; repeatable.",
)
@taking(Request)
def masking(request: Request, /, **options: Any) -> int:
    """Are gradients masked? Sixteen checks and a verdict.

    SPSA against PGD, more effort, larger balls, noise, gradient-free attacks, planted adversarial
    examples: what should hold if gradients can be trusted. The same command with the same --out goes on
    where it was stopped.
    """
    from robustbench_cure.classifier import with_memory
    from robustbench_cure.evaluation.preflight import first_pass
    from robustbench_cure.masking.evidence import Settings
    from robustbench_cure.studies.engine import open_study
    from robustbench_cure.studies.masking import masking as run
    from robustbench_cure.zoo.models import load_model

    own = ("steps", "spsa_steps", "spsa_samples", "queries", "draws", "restarts", "planted")
    work = {key: options.pop(key) for key in own}
    norm, eps, fail_on = options.pop("norm"), options.pop("eps"), options.pop("fail_on")
    surrogate = options.pop("surrogate")
    study = open_study("masking", request, default_n=200, precision=None)
    if surrogate is not None:
        surrogate = load_model(surrogate, device=request.device, data=study.data, cards=request.cards)
        try:
            with_memory(surrogate, partial(first_pass, surrogate, study.data))
        except UsageError as error:
            raise UsageError(f"--surrogate: {error}") from error
    return run(
        study,
        threat=_threat(study.models, norm, eps, request.cards),
        settings=Settings(**work, seed=study.seed),
        fail_on=fail_on,
        surrogate=surrogate,
    )


@click.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--out", type=click.Path(path_type=Path), help="Write what was found as JSON, too.")
def selftest(device: str, out: Path | None) -> int:
    """Does all of this work here? Attacks against closed forms, checks against deceptive networks.

    About a minute on a processor; exit code 1 if anything is not as it must be.
    """
    from robustbench_cure.studies.selftest import selftest as run

    return run(device, out)


def _threat(models: dict[str, Any], norm: Any, eps: str | None, cards: tuple[str, ...]) -> Any:
    """The ball: as asked for, else that of the models' batteries, which must agree."""
    from robustbench_cure import load_battery
    from robustbench_cure.protocol.cards import ModelCard
    from robustbench_cure.protocol.catalog import catalog
    from robustbench_cure.protocol.naming import DEFAULT_BATTERY
    from robustbench_cure.threat import ThreatModel

    known = catalog(ModelCard, cards)
    batteries = {known[name].card.battery if name in known else DEFAULT_BATTERY for name in models}
    threats = {load_battery(battery, cards=cards).threat.model for battery in batteries}
    if len(threats) > 1 and (norm is None or eps is None):
        raise UsageError("these models' batteries have different threat models: give --norm and --eps")
    usual = threats.pop()
    if norm is not None and norm != usual.norm and eps is None:
        raise UsageError(f"--norm {norm} needs --eps: the usual radius is that of {usual.norm}")
    try:
        threat = ThreatModel.parse(norm or usual.norm, eps or str(usual.eps))
    except ValueError as error:
        raise UsageError(f"--eps {eps}: {error}") from None
    if threat.radius == 0:
        raise UsageError(f"--eps {eps}: must be positive")
    return threat


VERBS = (masking, selftest)
