"""`cure-bench selftest`: attacks against closed forms, checks against gradient-obfuscating models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from robustbench_cure.attacks import Candidates, Noise, deepfool, fgsm, pgd, spsa
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier, resolve_device
from robustbench_cure.datasets import load_dataset
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.files import write_text
from robustbench_cure.masking.conclusions import Diagnosis, diagnose
from robustbench_cure.masking.evidence import Settings
from robustbench_cure.masking.obfuscated import OBFUSCATED
from robustbench_cure.protocol.defaults import defaults_of
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.models import load_model

#: Images of the affine network, and their shape.
ROWS, SHAPE = 24, (3, 8, 8)
#: Share of the greatest possible fall of the margin that an attack must reach on every image.
REACHED = 0.95
#: Gradient-obfuscating model -> checks that it must raise.
MUST_RAISE = {
    "zero gradient": (
        "unavailable_gradients",
        "unbounded_attack_fails",
        "gradient_free_beats_white_box",
        "uninformative_gradients",
        "binarization_test_fails",
    ),
    "saturated logits": ("unavailable_gradients",),
    "softmax output": ("probability_outputs",),
    "random": ("unstable_predictions",),
}
#: Model that must raise none, and that the others are made of.
HONEST = "digits_cure"
WORK = Settings(steps=20, spsa_steps=8, spsa_samples=16, draws=10, restarts=2, queries=100, planted=12)
IMAGES, THREAT = 60, ThreatModel("linf", defaults_of("digits").eps)


@dataclass(frozen=True)
class Assertion:
    """One thing that must hold on every machine.

    Attributes:
        what: the claim.
        holds: whether it does here.
        observed: what was measured.
    """

    what: str
    holds: bool
    observed: str


def selftest(device: str, out: Path | None) -> int:
    """Test every assertion, print a line each, and return 0 if all of them hold, else 1.

    Args:
        device: as `--device`.
        out: where the result goes as JSON; None: nowhere.
    """
    place = resolve_device(device)
    started, tested = time.monotonic(), []
    for one in chain(_closed_forms(place), _masking(device)):
        tested.append(one)
        click.echo(f"{'ok    ' if one.holds else 'FAILED'}  {one.what:<50} {one.observed}")
    failed = sum(not one.holds for one in tested)
    info = environment(place)
    click.echo(
        f"{len(tested) - failed} of {len(tested)} hold on {info.device_name}, torch {info.torch}; "
        f"{time.monotonic() - started:.0f} s"
    )
    if out is not None:
        tried = [{"what": one.what, "holds": one.holds, "seen": one.observed} for one in tested]
        content = {"tried": tried, "environment": info.model_dump(mode="json")}
        write_text(out, json.dumps(content, indent=2) + "\n")
    return int(failed > 0)


# --- closed forms -----------------------------------------------------------------------------------------


def _closed_forms(device: torch.device) -> Iterator[Assertion]:
    """Two classes, z = (0, w.x + b): the nearest boundary and the best point of a ball are known."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 8 * 8, generator=generator)
    x = (torch.rand(ROWS, *SHAPE, generator=generator) * 0.4 + 0.3).to(device)  # the box is far away
    linear = nn.Linear(len(weight), 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack((torch.zeros_like(weight), weight)))
        linear.bias.copy_(torch.tensor([0.0, -float(weight.sum()) / 2]))
    net = nn.Sequential(nn.Flatten(), linear)
    classifier = Classifier(net, num_classes=2, input_shape=SHAPE, device=device, batch_size=ROWS)
    y = classifier.logits(x).argmax(1)
    clean = margins(classifier.logits(x), y)
    distance = {"linf": clean / weight.abs().sum(), "l2": clean / weight.norm()}
    for norm in ("linf", "l2"):
        # Half of the images can be broken: a ball as large as their median distance.
        eps = f"{float(distance[norm].median()):.6f}"
        threat = ThreatModel.parse(norm, eps)
        best = clean * (1 - threat.radius / distance[norm])
        attacks = _attacks(classifier, x, y, threat)
        if norm == "l2":
            del attacks["SPSA"]  # Adam moves along signs: no closed form in an l2 ball
        for name, attack in attacks.items():
            rows = verify(classifier, x, y, attack(), threat)
            # Nothing in the ball is lower than the optimum: a share above one would be an error.
            share = (clean - rows.margin.to(device)) / (clean - best)
            least, most = float(share.min()), float(share.max())
            ok = rows.violation == [""] * ROWS and REACHED <= least <= most <= 1.001
            observed = f"{100 * least:.1f} % of the optimum"
            yield Assertion(f"{name} reaches the optimum of an affine net, {norm}", ok, observed)
        nearest = deepfool(classifier, x, y, threat=threat, mode="minimal", overshoot=0.02, clip=False)
        rows = verify(classifier, x, y, nearest, threat, minimal=True, clip=False)
        ratio = (rows.linf if norm == "linf" else rows.l2).to(device) / distance[norm]
        off = float((ratio - 1.02).abs().max())
        yield Assertion(f"DeepFool finds the nearest boundary, {norm}", off < 1e-3, f"ratio off by {off:.1e}")


def _attacks(
    classifier: Classifier, x: Tensor, y: Tensor, threat: ThreatModel
) -> dict[str, Callable[[], Candidates]]:
    noise = Noise.for_rows(len(x), device=x.device)
    return {
        "FGSM": lambda: fgsm(classifier, x, y, threat=threat),
        "PGD(20)": lambda: pgd(
            classifier, x, y, threat=threat, noise=noise, steps=20, step_size=threat.radius / 4, stop="never"
        ),
        "SPSA": lambda: spsa(
            classifier, x, y, threat=threat, noise=noise, steps=40, samples=256,
            step_size=threat.radius / 5, delta=0.01, stop="never",
        ),
    }  # fmt: skip


# --- gradient-obfuscating models --------------------------------------------------------------------------


def _masking(device: str) -> Iterator[Assertion]:
    raised = diagnosis(HONEST, device).raised
    yield Assertion(f"no check is raised by {HONEST}", not raised, _in_words(raised))
    for name, checks in MUST_RAISE.items():
        raised = diagnosis(name, device).raised
        what = f"{name}: raises the checks that it must"
        yield Assertion(what, set(checks) <= set(raised), _in_words(raised))


def diagnosis(name: str, device: str = "auto") -> Diagnosis:
    """All checks on some digits.

    Args:
        name: a key of `OBFUSCATED`, made of the honest model, or the id of a model for digits.
        device: as `--device`.
    """
    honest = load_model(HONEST if name in OBFUSCATED else name, device=device)
    module = OBFUSCATED[name](honest.module) if name in OBFUSCATED else honest.module
    place = honest.device
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(0)
        classifier = Classifier(module, num_classes=10, input_shape=(1, 8, 8), device=place, batch_size=256)
        return diagnose(classifier, load_dataset("digits").subset(IMAGES), THREAT, WORK)


def _in_words(raised: Sequence[str]) -> str:
    return f"raised: {', '.join(raised) or 'none'}"
