"""Verification: the returned tensor alone decides whether an attack succeeded.

Ball, box, finiteness, shape and misclassification are recomputed in float32 with the reference form of
the model; an image that the attack has shown it is answered as then, see `Classifier.remembering`. What
fails is recorded as a violation and counts as not broken. No other part of this package claims a
success.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.losses import margins, predictions
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import RunError
from robustbench_cure.threat import BOX_TOLERANCE, ThreatModel, distance

#: Side effect: the global random state moved.
RANDOM_STATE = "global random state used"


@dataclass
class Verification:
    """What verification gave for each row, on the CPU.

    Attributes:
        broken: misclassified, admissible, and within eps; bool (B,).
        pred: predicted label at the candidate, int64 (B,); -1 where its logits are not finite: the row
            has lost its label, and counts as broken.
        margin: z_y - max z_j there, float32 (B,); NaN where no candidate was admitted or
            its logits are not finite.
        linf: distance from the image, float32 (B,), units of x.
        l2: likewise.
        violation: why a row was not admitted, "" where it was.
    """

    broken: Tensor
    pred: Tensor
    margin: Tensor
    linf: Tensor
    l2: Tensor
    violation: list[str]


def verify(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    candidates: Candidates,
    threat: ThreatModel,
    *,
    minimal: bool = False,
    clip: bool = True,
) -> Verification:
    """Verify the candidates of an attack row by row.

    Args:
        classifier: the model; its reference form is asked.
        x: the original images, as the evaluator kept them.
        y: true labels.
        candidates: what the attack returned.
        threat: ball and box.
        minimal: the attack looks for the nearest boundary, wherever that is: leaving the ball is
            no violation, but success still needs a distance of at most eps.
        clip: whether the box is part of the attack's terms (minimal attacks for geometry: no).
    """
    n, x_adv = len(x), candidates.x_adv
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        got = f"{tuple(x_adv.shape)} {x_adv.dtype}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
        return _rejected(n, f"expected {tuple(x.shape)} {x.dtype}, got {got}")
    x_adv = x_adv.detach().to(x.device)
    finite = x_adv.flatten(1).isfinite().all(1)
    inside_box = ((x_adv >= -BOX_TOLERANCE) & (x_adv <= 1 + BOX_TOLERANCE)).flatten(1).all(1)
    in_ball = threat.contains(x, x_adv)
    admitted = finite & (inside_box | (minimal and not clip)) & (in_ball | minimal)
    shown = torch.where(admitted.view(-1, 1, 1, 1), x_adv, x)
    logits = classifier.logits(shown)
    margin, pred = margins(logits, y), predictions(logits)
    verification = Verification(
        broken=(admitted & in_ball & (pred != y)).cpu(),
        pred=pred.cpu(),
        margin=margin.masked_fill(~(admitted & margin.isfinite()), torch.nan).cpu(),
        linf=distance("linf", x, x_adv).float().cpu(),
        l2=distance("l2", x, x_adv).float().cpu(),
        violation=[""] * n,
    )
    for row in (~admitted).nonzero().squeeze(1).tolist():
        if not finite[row]:
            verification.violation[row] = "not finite"
        elif not inside_box[row]:
            verification.violation[row] = "outside the box [0, 1]"
        else:
            verification.violation[row] = f"outside the {threat} ball"
    return verification


def _rejected(n: int, reason: str) -> Verification:
    nan = torch.full((n,), torch.nan, dtype=torch.float32)
    none = torch.full((n,), -1)
    return Verification(torch.zeros(n, dtype=torch.bool), none, nan, nan.clone(), nan.clone(), [reason] * n)


def guarded(
    classifier: Classifier, x: Tensor, attack: Callable[[Tensor], list[Candidates]]
) -> tuple[list[Candidates], list[str]]:
    """Run an attack on a copy of the images and see what else it touched.

    Args:
        classifier: the model; must come back as it was.
        x: images; the attack gets a copy.
        attack: does the work.

    Returns:
        The candidates, and the side effects observed: "input modified", "global random state used".

    Raises:
        RunError: the attack changed weights or mode of the model: nothing measured after it would hold.
    """
    given = x.clone()
    before = classifier.fingerprint()
    random_state = _random_state(classifier.device)
    results = attack(given)
    effects = []
    if classifier.fingerprint() != before:
        raise RunError("an attack changed the model's weights or mode; the evaluation was stopped")
    if not torch.equal(given, x):
        effects.append("input modified")
    if any(
        not torch.equal(*pair) for pair in zip(random_state, _random_state(classifier.device), strict=True)
    ):
        torch.set_rng_state(random_state[0])
        if classifier.device.type == "cuda":
            torch.cuda.set_rng_state(random_state[1], classifier.device)
        effects.append(RANDOM_STATE)
    return results, effects


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
