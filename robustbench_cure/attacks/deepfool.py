"""DeepFool for l2 and linf, batched, to the nearest boundary or inside a ball.

Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599; thesis, algorithm 2 and Eq. 3.11-3.14.

At x + (1 + overshoot) r, linearise every logit difference f_k - f_y, take the class whose boundary is
nearest, |f_k| / ||w_k||_q (q dual to the norm), and add the shortest step that reaches it:

    l2:    r += |f_l| / ||w_l||_2^2 * w_l            linf:  r += |f_l| / ||w_l||_1 * sign(w_l)

Gaps and labels are those of the reference form, and slopes are computed in float32: in bfloat16 a path ends
elsewhere, and samples stay robust that float32 finds adversarial images for.
``mode = "minimal"`` runs until the label changes, and measures a distance. ``mode = "bounded"`` cuts the
overshot vector to the ball after every step (the form of the CURE paper's Table 1, whose caption constrains
the perturbations), and decides whether the ball contains an adversarial image. With a ``basis`` the slopes
are projected onto its span, and so is the perturbation (thesis, algorithm 3).

Deviations. (1) The label is tested, and the model linearised, at the overshot point, as the authors' own
code does: on an affine model the algorithm as printed stops exactly on the boundary. (2) No absolute
constant is added to a step. (3) Pixels that cannot move further, because the box or the linf ball ends
there, are left out of the linearisation. Otherwise a step covers only the other pixels' share of the
distance, and iterates approach the boundary without ever crossing it: on digits most pixels are 0. (4)
Inside a ball, a row whose margin has not fallen for `PATIENCE` iterations is given up; in linf also one
that has no boundary within reach: after a step, what is left of the ball covers less than `REACH` of the
linearised gap to every boundary, and no step has lowered the margin much faster than linearised. (5) Inside
a ball, the slopes of all candidates are computed at the image, then those of the `CONTENDERS` that are
nearest by these slopes and the present gaps. (6) No step is shorter than a thousandth of the perturbation
so far, nor than what float32 pixels resolve, so that rounding cannot keep a row on the boundary, even where
logits are equal.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import Norm, ThreatModel, distance

#: Below this dual norm a linearised boundary is out of reach, and a step in that direction unstable.
FLAT = 1e-12
#: Iterations without a lower margin after which a row inside the ball is given up: it alternates between the
#: boundaries of classes that the ball does not reach.
PATIENCE = 6
#: Share of the linearised gap that what is left of the ball must cover, for one boundary: after a step
#: that lowered the margin, and after one that did not. Rows that are broken later cover 0.45 and 0.6 at worst
#: (adversarially trained digits at 51/255), elsewhere 0.54 and 0.8.
REACH, REACH_STALLED = 0.4, 0.5
#: A row whose margin falls by more than this times what the linearised model says is not given up by it: its
#: outputs are saturated, say, and gradients say little of what lies ahead.
FASTER = 2.0
#: Classes that a row inside the ball is still driven to after its first step.
CONTENDERS = 6
#: A step is at least this share of the perturbation so far: on the boundary itself gaps are lost in rounding.
LEAST = 1e-3
#: Nor is it shorter than one that moves every pixel by this, four units in the last place of float32 at 1.
FINEST = 2.0**-21


@torch.inference_mode(False)  # where gradients are zero
def deepfool(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    mode: Literal["bounded", "minimal"] = "minimal",
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    clip: bool = True,
    basis: Tensor | None = None,
) -> Candidates:
    """Perturb each image towards the nearest linearised boundary until its label changes.

    Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599, with the deviations in the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: labels to leave, int64 (B,): the predicted ones for distances, the true ones for accuracy.
        threat: its norm decides the steps; its radius bounds them in mode ``bounded`` only.
        noise: unused; every attack takes it.
        mode: ``minimal`` (nearest boundary) or ``bounded`` (inside the ball).
        steps: iterations at most, at least 1.
        overshoot: share, 0 or more, by which the perturbation is lengthened to cross the boundary.
        candidates: classes considered, at least 2: those of the largest logits at x, with the label's own.
        clip: keep iterates in [0, 1]; off for geometry, where r must stay normal to the boundary.
        basis: orthonormal vectors whose span each perturbation lies in, float32 (B, m, C, H, W), or
            (1, m, C, H, W) for all rows; only ``minimal``, in l2 and without ``clip``: box and ball cut
            a perturbation out of the span.

    Returns:
        Candidates; ``converged`` says whether the reference form changed its label at ``x_adv``
        (``bounded`` ones lie in ball and box, ``minimal`` ones anywhere, in the box if ``clip``).
        Rows already past the boundary are returned as they are, with zero steps.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: fewer than two ``candidates``: none would be another class; a ``basis`` where a
            perturbation would not stay in its span, or of another shape; images or labels that
            `check_inputs` refuses.
    """
    check_inputs(classifier, x, y, box=clip or mode == "bounded")
    del noise
    if candidates < 2:
        raise ValueError(f"candidates {candidates}: the label's own and at least one other")
    if basis is not None:
        if mode != "minimal" or threat.norm != "l2" or clip:
            raise ValueError("a basis needs mode 'minimal', the l2 norm and clip=False")
        if basis.dim() != 5 or len(basis) not in (1, len(x)) or basis.shape[2:] != x.shape[1:]:
            raise ValueError(f"basis of shape {tuple(basis.shape)} for images of shape {tuple(x.shape)}")
    bounded, others = mode == "bounded", min(candidates, classifier.num_classes) - 1
    finest = FINEST * (math.prod(x.shape[1:]) ** 0.5 if threat.norm == "l2" else 1.0)

    # One entry for each row: x_adv is the iterate, logits are those of the reference form at x_adv.
    result = Candidates.start(x)
    x_adv, taken, forwards, backwards = result.x_adv, result.steps, result.forwards, result.backwards
    result.converged = converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    logits = x.new_zeros((len(x), classifier.num_classes))
    classes = torch.zeros((len(x), others), dtype=torch.int64, device=x.device)
    sizes = x.new_zeros((len(x), others))  # dual norms of the slopes at x
    lowest = x.new_full((len(x),), torch.inf)  # margin so far
    stalled = torch.zeros_like(taken)  # iterations since the margin was lowest
    linear = torch.ones_like(converged)  # no step has lowered the margin by much more than linearised

    active = ActiveSet(len(x), classifier.batch_size, x.device)
    with classifier.in_float32():
        for rows in active:
            # Rows at their image, if any, go first: choose the candidate classes, and linearise all of them.
            first = taken[rows] == 0
            if bool(first.any()):
                rows = rows[first]
                logits[rows] = classifier.logits(x[rows])
                forwards[rows] += 1
                ranked = logits[rows].scatter(1, y[rows, None], -torch.inf)
                classes[rows] = ranked.topk(others, dim=1).indices
                lowest[rows] = margins(logits[rows], y[rows])
                converged[rows] = misclassified(logits[rows], y[rows])
                active.drop(rows[converged[rows]])
                rows = rows[~converged[rows]]
                if len(rows) == 0:
                    continue

            # Linearise f_k - f_y for the candidates k: gaps of the reference form, slopes in float32.
            clean, here, labels, chosen = x[rows], x_adv[rows], y[rows], classes[rows]
            gaps = logits[rows].gather(1, chosen) - logits[rows].gather(1, labels[:, None])
            if bounded and not first.any():
                lengths = gaps.abs() / sizes[rows].clamp_min(FLAT)
                nearest = lengths.topk(min(CONTENDERS, others), dim=1, largest=False).indices
                chosen, gaps = chosen.gather(1, nearest), gaps.gather(1, nearest)
            _, slopes = classifier.value_and_jacobian(here, labels, chosen)
            forwards[rows] += 1
            backwards[rows] += chosen.shape[1]
            if basis is not None:  # project onto its span
                span = (basis if len(basis) == 1 else basis[rows]).flatten(2)
                slopes = (slopes.flatten(2) @ span.transpose(1, 2) @ span).view_as(slopes)
            low, high = torch.zeros_like(clean), torch.ones_like(clean)
            if bounded and threat.norm == "linf":
                low, high = threat.project(clean, low), threat.project(clean, high)
            if bounded or clip:  # leave out pixels that cannot move further
                blocked = torch.where(slopes > 0, (here >= high)[:, None], (here <= low)[:, None])
                slopes = slopes.masked_fill(blocked, 0.0)
            if bool(first.any()):
                sizes[rows] = dual_norms(threat.norm, slopes)
            elif bounded and threat.norm == "linf":
                covered = reach(slopes, here, low, high) / gaps.abs()
                needed = torch.where(stalled[rows] > 0, REACH_STALLED, REACH)
                within = ~(linear[rows] & (covered.amax(1) < needed))
                active.drop(rows[~within])
                rows, clean, here, gaps, slopes = (of[within] for of in (rows, clean, here, gaps, slopes))
                if len(rows) == 0:
                    continue

            # Step to the nearest boundary and beyond it: to x + (1 + overshoot) r, cut to ball and box.
            least = (LEAST * distance(threat.norm, clean, here)).clamp_min(finest)
            step = nearest_boundary_step(threat.norm, gaps, slopes, least)
            ahead = here + (1.0 + overshoot) * step
            if bounded:
                ahead = threat.project(clean, ahead)
            elif clip:
                ahead = ahead.clamp(0.0, 1.0)
            moving = (ahead != here).flatten(1).any(1)
            active.drop(rows[~moving])
            rows = rows[moving]
            x_adv[rows] = ahead[moving]
            taken[rows] += 1
            rise = (slopes[moving] * (ahead - here)[moving][:, None]).flatten(2).sum(2)
            before, promised = margins(logits[rows], y[rows]), -(gaps[moving] + rise).amax(1)

            # Evaluate before linearising again: a row across the boundary needs no more backward passes.
            logits[rows] = classifier.logits(x_adv[rows])
            forwards[rows] += 1
            converged[rows] = misclassified(logits[rows], y[rows])
            margin = margins(logits[rows], y[rows])
            stalled[rows] = torch.where(margin < lowest[rows], 0, stalled[rows] + 1)
            lowest[rows] = torch.minimum(margin, lowest[rows])
            linear[rows] &= before - margin <= FASTER * (before - promised).clamp_min(0.0)
            ended = converged[rows] | (taken[rows] >= steps)
            if bounded:
                ended |= stalled[rows] >= PATIENCE
            active.drop(rows[ended])
    return result


def dual_norms(norm: Norm, slopes: Tensor) -> Tensor:
    """Norms dual to that of the ball, (B, m), of slopes (B, m, C, H, W)."""
    flat = slopes.flatten(2)
    return flat.abs().sum(2) if norm == "linf" else flat.norm(dim=2)


def reach(slopes: Tensor, here: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How much each of m linear functions can rise from a point to anywhere in a box of pixels; (B, m).

    Args:
        slopes: gradients, float (B, m, C, H, W).
        here: the points, (B,C,H,W), in the box.
        low: lowest value of each pixel, (B,C,H,W).
        high: highest value, likewise.
    """
    room = torch.where(slopes > 0, (high - here)[:, None], (here - low)[:, None])
    return (slopes.abs() * room).flatten(2).sum(2)


def nearest_boundary_step(norm: Norm, gaps: Tensor, slopes: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Shortest step onto the nearest of m linearised boundaries.

    Source: thesis, Eq. 3.11-3.14.

    Args:
        norm: the norm in which the step is shortest.
        gaps: f_k - f_y at the point, float (B, m).
        slopes: their gradients, float (B, m, C, H, W).
        least: minimum length of a step in that norm, 0 or more, (B,) or one for all; a step that it lengthens
            ends beyond the boundary.

    Returns:
        The step, (B,C,H,W): ||step|| = |gap| / ||slope||_dual and slope . step = |gap| for the class
        of least ||step||; zero where every slope is flat.
    """
    dual = dual_norms(norm, slopes)
    lengths = torch.where(dual > FLAT, gaps.abs() / dual.clamp_min(FLAT), torch.inf)
    length, nearest = lengths.min(1)
    picked = torch.arange(len(gaps), device=gaps.device)
    slope, size = slopes[picked, nearest], dual[picked, nearest].clamp_min(FLAT)
    direction = slope.sign() if norm == "linf" else slope / size.view(-1, 1, 1, 1)
    least = torch.as_tensor(least, dtype=length.dtype, device=length.device)
    length = torch.where(length.isfinite(), torch.maximum(length, least), torch.zeros_like(length))
    return length.view(-1, 1, 1, 1) * direction
