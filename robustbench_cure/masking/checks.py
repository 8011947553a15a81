"""The checks. Each looks at one symptom of masked gradients, or of an attack that does not do its work.

Sources: the CURE paper, section 4 and figure 7 (A); Athalye, Carlini & Wagner 2018, arXiv 1802.00420 (E to
H); Carlini et al. 2019, arXiv 1902.06705 (C, D, G); Pintor et al. 2022, arXiv 2106.09947 (B, E, I, J).
Passing them proves nothing: Popovic et al. 2022, arXiv 2206.01705.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from scipy.stats import binomtest
from torch import Tensor

from robustbench_cure.attacks.losses import Loss, cross_entropy, margin
from robustbench_cure.masking.evidence import Evidence
from robustbench_cure.masking.finding import MOST_IDS, Finding, Status
from robustbench_cure.threat import ThreatModel

#: A margin that much lower counts as lower, in logits, and the share of points that may be (spec of Fig. 7).
LOWER, LOWER_SHARE = 0.5, 0.05
#: Level of the exact sign test.
LEVEL = 0.01
#: Share of the images that one weak attack may break alone; more is raised where the exact test is sure.
ALONE_SHARE = 0.01
#: Robust accuracy that more steps may still cost.
MORE_STEPS = 0.02
#: Robust accuracy that restarts and other step sizes may cost: honest networks lose up to five points.
MORE_EFFORT = 0.10
#: Share of images without a usable gradient.
UNUSABLE_SHARE = 0.05
#: Correlation of predicted and seen changes of the margin along random directions.
FAITHFUL = 0.5
#: Directions for each image, and their length as a share of the radius.
PROBES, PROBE_LENGTH = 16, 0.25
#: Share of images whose margin may still be falling when the attack ends.
UNFINISHED_SHARE = 0.25


def scatter(e: Evidence) -> Finding:
    """A: SPSA against PGD, sample by sample: does the gradient-free search end lower?"""
    white, black = e.white_box_margin, e.spsa.margin
    lower = black < white
    higher = int((black > white).sum())
    count = int(lower.sum())
    pairs = count + higher
    p = float(binomtest(count, pairs, alternative="greater").pvalue) if pairs else 1.0
    # Margins have no natural unit: half a logit, where logits are of order ten, is a share of their spread.
    unit = LOWER * float(e.clean_margin.median().clamp_min(1e-30)) / 10
    far = black < white - max(unit, 0.0)
    share = float(far.float().mean())
    raised = share > LOWER_SHARE and p < LEVEL
    evidence = (
        f"SPSA ended lower than PGD({e.settings.steps}) on {count} of {len(e)} images "
        f"(sign test p = {p:.2g}), clearly lower on {int(far.sum())}"
    )
    return _finding("A", "scatter", raised, share, LOWER_SHARE, evidence, e, far)


def gradients(e: Evidence) -> Finding:
    """B: input gradients that are exactly zero, or not finite, in float32."""
    lengths = {}
    for name, loss in (("cross-entropy", cross_entropy), ("margin", margin)):
        parts = []
        for rows in torch.split(torch.arange(len(e), device=e.x.device), e.classifier.batch_size):
            objective = partial(_with_labels, loss, e.y[rows])
            _, gradient = e.classifier.value_and_gradient(e.x[rows], objective, reference=True)
            parts.append(gradient.flatten(1).norm(dim=1))
        lengths[name] = torch.cat(parts)
    ce, plain = lengths["cross-entropy"], lengths["margin"]
    nan = ~(ce.isfinite() & plain.isfinite())
    bad = nan | (plain == 0) | (ce == 0)
    share = float(bad.float().mean())
    evidence = (
        f"of {len(e)} images: NaN or infinite {int(nan.sum())}, "
        f"margin gradient zero {int((plain == 0).sum())}, cross-entropy gradient zero {int((ce == 0).sum())}"
    )
    return _finding("B", "gradients", share > UNUSABLE_SHARE, share, UNUSABLE_SHARE, evidence, e, bad)


def steps(e: Evidence) -> Finding:
    """C: does PGD break more when it is given two and four times as many steps?"""
    base = e.settings.steps
    robust = [_robust(e, e.pgd_margin.broken)]
    last = e.pgd_margin.broken
    for factor in (2, 4):
        last = e.run_pgd(steps=factor * base, loss="margin").broken
        robust.append(_robust(e, last))
    drop = robust[0] - min(robust)
    evidence = "robust accuracy at x1, x2, x4 steps: " + ", ".join(f"{100 * r:.1f} %" for r in robust)
    return _finding(
        "C", "steps", drop > MORE_STEPS, drop, MORE_STEPS, evidence, e, last & ~e.pgd_margin.broken
    )


def effort(e: Evidence) -> Finding:
    """D: does PGD break more with restarts, or with another step size?"""
    base = e.pgd_margin.broken
    variants = {
        f"{e.settings.restarts} restarts": e.run_pgd(
            steps=e.settings.steps, loss="margin", restarts=e.settings.restarts
        ).broken,
        "steps of eps/20": e.run_pgd(steps=e.settings.steps, loss="margin", step=0.05).broken,
        "steps of eps": e.run_pgd(steps=e.settings.steps, loss="margin", step=1.0).broken,
    }
    together = base.clone()
    for broken in variants.values():
        together |= broken
    drop = _robust(e, base) - _robust(e, together)
    evidence = f"robust accuracy {100 * _robust(e, base):.1f} %; " + ", ".join(
        f"{name} {100 * _robust(e, broken):.1f} %" for name, broken in variants.items()
    )
    return _finding("D", "effort", drop > MORE_EFFORT, drop, MORE_EFFORT, evidence, e, together & ~base)


def radius(e: Evidence) -> Finding:
    """E: is everything broken when the ball is the whole box?"""
    whole = ThreatModel.parse(e.threat.norm, "1" if e.threat.norm == "linf" else "100")
    outcome = e.run_pgd(steps=e.settings.steps, loss="margin", threat=whole, step=0.05)
    left = _robust(e, outcome.broken)
    chance = 1.0 / e.classifier.num_classes
    evidence = (
        f"robust accuracy {100 * left:.1f} % in a ball that holds every image; guessing {100 * chance:.0f} %"
    )
    return _finding("E", "radius", left > chance, left, chance, evidence, e, ~outcome.broken)


def single_step(e: Evidence) -> Finding:
    """F: did one step break what many did not?"""
    alone = e.fgsm.broken & ~(e.pgd_ce.broken | e.pgd_margin.broken)
    return _alone("F", "single_step", "FGSM", f"PGD({e.settings.steps})", alone, e)


def random_noise(e: Evidence) -> Finding:
    """G: did random points of the ball break what gradients did not?"""
    return _alone("G", "random_noise", "random noise", "gradients", e.random.broken & ~e.white_box_broken, e)


def black_box(e: Evidence) -> Finding:
    """H: did a gradient-free attack break what gradients did not?"""
    return _alone("H", "black_box", "SPSA", "gradients", e.spsa.broken & ~e.white_box_broken, e)


def faithful(e: Evidence) -> Finding:
    """J: do gradients predict how the margin changes within the ball?"""
    generator = torch.Generator().manual_seed(e.settings.seed)
    predicted, seen = [], []
    for rows in torch.split(torch.arange(len(e), device=e.x.device), e.classifier.batch_size):
        x, y = e.x[rows], e.y[rows]
        _, gradient = e.classifier.value_and_gradient(x, partial(_with_labels, margin, y), reference=True)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2.0 - 1.0
            v = signs * (PROBE_LENGTH * e.threat.radius)
            if e.threat.norm == "l2":
                v = v / signs[0].numel() ** 0.5
            after = margin(e.classifier.logits(x + v), y)
            before = margin(e.classifier.logits(x - v), y)
            seen.append(after - before)
            predicted.append(2 * (gradient * v).flatten(1).sum(1))
    a, b = torch.cat(predicted).double(), torch.cat(seen).double()
    spread = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / spread if spread > 0 and torch.isfinite(a).all() else 0.0
    evidence = (
        f"changes of the margin that gradients predict and that are seen, over {PROBES} directions "
        f"for each of {len(e)} images: cosine {cosine:.2f}"
    )
    none = torch.zeros(len(e), dtype=torch.bool)
    return _finding("J", "faithful", cosine < FAITHFUL, cosine, FAITHFUL, evidence, e, none)


def unfinished(e: Evidence) -> Finding:
    """I: was the margin of the survivors still falling when PGD ended?"""
    half = e.run_pgd(steps=max(1, e.settings.steps // 2), loss="margin")
    alive = ~e.pgd_margin.broken
    if not bool(alive.any()):
        return _finding("I", "unfinished", False, 0.0, UNFINISHED_SHARE, "no image survived", e, alive)
    # A fall in the second half of more than a tenth of the whole fall is no convergence.
    whole = (e.clean_margin - e.pgd_margin.margin).clamp_min(0)
    late = (half.margin - e.pgd_margin.margin).clamp_min(0)
    falling = alive & (late > 0.1 * whole) & (whole > 0)
    share = float(falling.sum()) / int(alive.sum())
    evidence = (
        f"the second half of PGD({e.settings.steps}) made more than a tenth of the fall of the margin on "
        f"{int(falling.sum())} of {int(alive.sum())} survivors"
    )
    return _finding(
        "I", "unfinished", share > UNFINISHED_SHARE, share, UNFINISHED_SHARE, evidence, e, falling
    )


#: Letter -> check, in the order of the report.
CHECKS: dict[str, Callable[[Evidence], Finding]] = {
    "A": scatter,
    "B": gradients,
    "C": steps,
    "D": effort,
    "E": radius,
    "F": single_step,
    "G": random_noise,
    "H": black_box,
    "I": unfinished,
    "J": faithful,
}


def _alone(letter: str, check: str, weak: str, strong: str, alone: Tensor, e: Evidence) -> Finding:
    count = int(alone.sum())
    sure = len(e) > 0 and binomtest(count, len(e), ALONE_SHARE, alternative="greater").pvalue < LEVEL
    evidence = f"{count} of {len(e)} images were broken by {weak} and not by {strong}"
    share = count / max(1, len(e))
    return _finding(letter, check, bool(sure), share, ALONE_SHARE, evidence, e, alone)


def _robust(e: Evidence, broken: Tensor) -> float:
    """Accuracy out of all images, the misclassified ones included."""
    return int((~broken).sum()) / e.total


def _finding(
    letter: str,
    check: str,
    raised: bool,
    value: float,
    threshold: float,
    evidence: str,
    e: Evidence,
    rows: Tensor,
) -> Finding:
    status: Status = "raised" if raised else "clear"
    ids = tuple(e.ids[row] for row in rows.nonzero().squeeze(1).tolist()[:MOST_IDS]) if raised else ()
    return Finding(
        letter=letter,
        check=check,
        status=status,
        value=value,
        threshold=threshold,
        evidence=evidence,
        ids=ids,
    )


def _with_labels(loss: Loss, labels: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, labels)
