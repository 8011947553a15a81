"""`cure-bench selftest`: attacks against closed forms, checks against deceptive networks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, Proposal, deepfool, fgsm, pgd, spsa
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier, resolve_device
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.evaluation.verify import judge
from robustbench_cure.files import write_atomically
from robustbench_cure.masking.deceptive import DECEPTIVE
from robustbench_cure.masking.evidence import Settings
from robustbench_cure.masking.verdict import diagnose
from robustbench_cure.threat import ThreatModel

#: Images of the affine network, and their shape.
ROWS, SHAPE = 24, (3, 8, 8)
#: Share of the way to the optimum that an attack must go on every image.
REACHED = 0.95
#: Letters that must be raised by a network that hides its gradients, and by an honest one.
MUST_RAISE = {"zero gradient": "BEHJO", "saturated logits": "B", "softmax output": "L", "random": "K"}
HONEST = "digits_cure"
WORK = Settings(steps=20, spsa_steps=8, spsa_samples=16, draws=10, restarts=2, queries=100, planted=12)
IMAGES, THREAT = 60, ThreatModel.parse("linf", "51/255")


@dataclass(frozen=True)
class Tried:
    """One thing that must hold, and whether it does."""

    what: str
    holds: bool
    seen: str


def selftest(device: str, out: Path | None) -> int:
    """Try everything, print a line each, and return 0 if all of it holds, else 1.

    Args:
        device: as `--device`.
        out: where the result goes as JSON; None: nowhere.
    """
    place = resolve_device(device)
    started, tried = time.monotonic(), []
    for one in (t for part in (_closed_forms(place), _masking(device)) for t in part):
        tried.append(one)
        click.echo(f"{'ok    ' if one.holds else 'FAILED'}  {one.what:<50} {one.seen}")
    failed = sum(not one.holds for one in tried)
    info = environment(place)
    click.echo(
        f"{len(tried) - failed} of {len(tried)} hold on {info.device_name}, torch {info.torch}; "
        f"{time.monotonic() - started:.0f} s"
    )
    if out is not None:
        content = {"tried": [asdict(one) for one in tried], "environment": info.model_dump(mode="json")}
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(out, lambda file: file.write_text(text, encoding="utf-8"))
    return int(failed > 0)


# --- closed forms -----------------------------------------------------------------------------------------


def _closed_forms(device: torch.device) -> Iterator[Tried]:
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
            verdict = judge(classifier, x, y, attack(), threat)
            # Nothing in the ball is lower than the optimum: more than the whole way would be a lie.
            way = (clean - verdict.margin.to(device)) / (clean - best)
            ok = verdict.violation == [""] * ROWS and REACHED <= float(way.min()) <= float(way.max()) <= 1.001
            seen = f"{100 * float(way.min()):.1f} % of the way"
            yield Tried(f"{name} reaches the optimum of an affine net, {norm}", ok, seen)
        found = deepfool(classifier, x, y, threat=threat, mode="minimal", overshoot=0.02, clip=False)
        wide = judge(classifier, x, y, found, threat, minimal=True, clip=False)
        measured = (wide.linf if norm == "linf" else wide.l2).to(device) / distance[norm]
        off = float((measured - 1.02).abs().max())
        yield Tried(f"DeepFool finds the nearest boundary, {norm}", off < 1e-3, f"ratio off by {off:.1e}")


def _attacks(
    classifier: Classifier, x: Tensor, y: Tensor, threat: ThreatModel
) -> dict[str, Callable[[], Proposal]]:
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


# --- deceptive networks --------------------------------------------------------------------------------


def _masking(device: str) -> Iterator[Tried]:
    honest = load_model(HONEST, device=device)
    raised = _letters(honest.module, honest.device)
    yield Tried(f"no check is raised by {HONEST}", raised == "", f"raised: {raised or 'none'}")
    for name, letters in MUST_RAISE.items():
        found = _letters(DECEPTIVE[name](honest.module), honest.device)
        ok = set(letters) <= set(found)
        yield Tried(f"a network with {name} raises {letters}", ok, f"raised: {found or 'none'}")


def _letters(module: nn.Module, device: torch.device) -> str:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        classifier = Classifier(module, num_classes=10, input_shape=(1, 8, 8), device=device, batch_size=256)
        found = diagnose(classifier, load_dataset("digits").subset(IMAGES), THREAT, WORK)
    return "".join(f.letter for f in found.findings if f.status == "raised")
