"""The checks. Each looks at one symptom of masked gradients, or of an attack that does not do its work.

Sources: the CURE paper, section 4 and figure 7 (A); Athalye, Carlini & Wagner 2018, arXiv 1802.00420 (E to
H); Carlini et al. 2019, arXiv 1902.06705 (C, D, G, P); Pintor et al. 2022, arXiv 2106.09947 (B, E, I, K, M
and N are its six indicators); Zimmermann et al. 2022, arXiv 2206.13991 (O). Passing them proves nothing:
Popovic et al. 2022, arXiv 2206.01705.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from robustbench_cure.attacks.losses import Loss, margin
from robustbench_cure.masking.comparisons import (
    alone,
    finding,
    random_noise,
    scatter,
    share_of,
    single_step,
)
from robustbench_cure.masking.evidence import MULTIPLES, RADII, STEP_LENGTHS, Evidence, wider
from robustbench_cure.masking.finding import Finding, not_run
from robustbench_cure.masking.planted import planted

#: Robust accuracy that more steps may still cost.
MORE_STEPS = 0.02
#: Robust accuracy that restarts and other step sizes may cost: honest networks lose up to five points.
MORE_EFFORT = 0.10
#: Share of images without a usable gradient, and the length below which one of the margin is not usable.
UNUSABLE_SHARE, TINY = 0.05, 1e-8
#: Images whose gradients are computed in float64 as well.
DOUBLE = 64
#: Correlation of predicted and seen changes of the margin along random directions.
FAITHFUL = 0.5
#: Directions for each image, and their length as a share of the radius.
PROBES, PROBE_LENGTH = 16, 0.25
#: Share of images whose margin may still be falling when the attack ends.
UNFINISHED_SHARE = 0.25
#: Share of images on which the attack may lose what it had, or mistake one form of the network for another.
LOST_SHARE = 0.02


def gradients(e: Evidence) -> Finding:
    """B: input gradients that are zero, too small to be told from it, or not finite.

    Cross-entropy is taken as everybody writes it: attacks of others follow it, those here do not (`losses`).
    """
    ce, plain = (_lengths(e, loss) for loss in (_textbook, margin))
    nan = ~(ce.isfinite() & plain.isfinite())
    bad = nan | (plain <= TINY) | (ce == 0)
    share = share_of(bad)
    evidence = (
        f"of {len(e)} images: NaN or infinite {int(nan.sum())}, margin gradient zero "
        f"{int((plain == 0).sum())} and tiny {int(((plain > 0) & (plain <= TINY)).sum())}, cross-entropy "
        f"gradient zero {int((ce == 0).sum())}; {_in_double(e, ce)}"
    )
    return finding("B", "gradients", share > UNUSABLE_SHARE, share, UNUSABLE_SHARE, evidence, e.ids, bad)


def steps(e: Evidence) -> Finding:
    """C: does PGD break more when it is given two and four times as many steps?"""
    once, *more = (e.pgd_margin(multiple) for multiple in MULTIPLES[1:])
    rates = [_robust(e, outcome.broken) for outcome in (once, *more)]
    drop = rates[0] - min(rates)
    fall = float((once.margin - more[-1].margin).median()) if len(e) else 0.0
    evidence = (
        "robust accuracy at x1, x2, x4 steps: "
        + ", ".join(f"{100 * rate:.1f} %" for rate in rates)
        + f"; median margin lower by {fall:.2g} at x4"
    )
    rows = more[-1].broken & ~once.broken
    return finding("C", "steps", drop > MORE_STEPS, drop, MORE_STEPS, evidence, e.ids, rows)


def effort(e: Evidence) -> Finding:
    """D: does PGD break more with restarts, or with another step size?"""
    base = e.pgd_margin().broken
    variants = {f"{e.settings.restarts} restarts": e.restarted.broken} | {
        "steps of eps" + (f"/{1 / step:g}" if step < 1 else ""): e.stepped(step).broken
        for step in STEP_LENGTHS
    }
    together = torch.stack([base, *variants.values()]).any(0)
    drop = _robust(e, base) - _robust(e, together)
    evidence = f"robust accuracy {100 * _robust(e, base):.1f} %; " + ", ".join(
        f"{name} {100 * _robust(e, broken):.1f} %" for name, broken in variants.items()
    )
    rows = together & ~base
    return finding("D", "effort", drop > MORE_EFFORT, drop, MORE_EFFORT, evidence, e.ids, rows)


def radius(e: Evidence) -> Finding:
    """E: does accuracy fall to that of guessing as the ball grows, and never rise?"""
    rates = [_robust(e, e.pgd_margin().broken)]
    outcomes = [e.at_radius(multiple) for multiple in RADII]
    rates += [_robust(e, outcome.broken) for outcome in outcomes]
    chance = 1.0 / e.classifier.num_classes
    rise = max(after - before for before, after in pairwise(rates))
    radii = [e.threat, *(wider(e.threat, multiple, e.x.shape[1:].numel()) for multiple in RADII)]
    evidence = (
        "robust accuracy at eps "
        + ", ".join(f"{ball.radius:.3g}: {100 * rate:.1f} %" for ball, rate in zip(radii, rates, strict=True))
        + f"; guessing {100 * chance:.0f} %"
    )
    raised = rates[-1] > chance or rise > MORE_STEPS
    return finding("E", "radius", raised, rates[-1], chance, evidence, e.ids, ~outcomes[-1].broken)


def black_box(e: Evidence) -> Finding:
    """H: did a gradient-free attack break what gradients did not?"""
    broken = (e.spsa.broken | e.square.broken) & ~e.white_box_broken
    return alone("H", "black box", "SPSA or Square", "gradients", broken, e.ids)


def unfinished(e: Evidence) -> Finding:
    """I: was the margin of the survivors still falling when PGD ended?"""
    half, whole = e.pgd_margin(MULTIPLES[0]), e.pgd_margin()
    alive = ~whole.broken
    # A fall in the second half of more than a tenth of the whole fall is no convergence.
    fall = (e.clean_margin - whole.margin).clamp_min(0)
    late = (half.margin - whole.margin).clamp_min(0)
    falling = alive & (late > 0.1 * fall) & (fall > 0)
    share = float(falling.sum()) / max(1, int(alive.sum()))
    evidence = (
        f"the second half of PGD({e.settings.steps}) made more than a tenth of the fall of the margin on "
        f"{int(falling.sum())} of {int(alive.sum())} survivors"
    )
    raised = share > UNFINISHED_SHARE
    return finding("I", "unfinished", raised, share, UNFINISHED_SHARE, evidence, e.ids, falling)


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
    return finding("J", "faithful", cosine < FAITHFUL, cosine, FAITHFUL, evidence, e.ids, beyond="<")


def silent(e: Evidence) -> Finding:
    """M: did PGD pass through an adversarial example and return something else?"""
    lost = e.pgd_stopped.broken & ~e.pgd_ce.broken
    share = share_of(lost)
    evidence = (
        f"PGD({e.settings.steps}) met a verified adversarial example on {int(e.pgd_stopped.broken.sum())} "
        f"images; on {int(lost.sum())} of them what it ended with is none"
    )
    return finding("M", "silent success", share > LOST_SHARE, share, LOST_SHARE, evidence, e.ids, lost)


def forms(e: Evidence) -> Finding:
    """N: does what breaks the network in the form that is searched break it in the form that is judged?"""
    o = e.pgd_margin()
    lost = (o.searched < 0) & ~o.broken
    share = share_of(lost)
    evidence = (
        f"of {int((o.searched < 0).sum())} images that PGD broke in {e.classifier.precision}, "
        f"{int(lost.sum())} held in float32"
    )
    return finding("N", "two forms", share > LOST_SHARE, share, LOST_SHARE, evidence, e.ids, lost)


def transfer(e: Evidence) -> Finding:
    """P: did adversarial examples of another model break what gradients of this one did not?"""
    if e.surrogate is None:
        return not_run("P", "transfer", "no other model was given: use --surrogate")
    broken = e.transferred.broken & ~e.white_box_broken
    name = e.surrogate.model_info().id
    return alone("P", "transfer", f"PGD on {name}", "gradients of the model itself", broken, e.ids)


#: Letter -> check of the images, in the order of the report.
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
    "M": silent,
    "N": forms,
    "O": planted,
    "P": transfer,
}


def _textbook(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _lengths(e: Evidence, loss: Loss) -> Tensor:
    """l2 lengths of the input gradients in the reference form, (m,); NaN where one is not finite."""
    parts = []
    for rows in torch.split(torch.arange(len(e), device=e.x.device), e.classifier.batch_size):
        objective = partial(_with_labels, loss, e.y[rows])
        _, gradient = e.classifier.value_and_gradient(e.x[rows], objective, reference=True, raw=True)
        parts.append(gradient.flatten(1).norm(dim=1))
    return torch.cat(parts)


def _in_double(e: Evidence, single: Tensor) -> str:
    """In words: what float64 says about the gradients of cross-entropy that float32 rounded to zero."""
    x, y = e.x[:DOUBLE].double().requires_grad_(True), e.y[:DOUBLE]
    try:
        logits = copy.deepcopy(e.classifier.module).double()(x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    except RuntimeError as error:  # float32 constants inside the network, or a cut graph
        return f"no gradients in float64: {str(error).splitlines()[0][:60]}"
    if gradient is None:
        return "in float64 there is no gradient either"
    lost = (single[:DOUBLE] == 0) & (gradient.flatten(1).norm(dim=1) > 0)
    return f"float64 finds one for {int(lost.sum())} of the first {len(x)} where float32 has none"


def _robust(e: Evidence, broken: Tensor) -> float:
    """Accuracy out of all images, the misclassified ones included."""
    return int((~broken).sum()) / e.total


def _with_labels(loss: Loss, labels: Tensor, logits: Tensor) -> Tensor:
    return loss(logits, labels)
