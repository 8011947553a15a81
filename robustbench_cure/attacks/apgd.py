"""Auto-PGD: projected gradient descent with momentum that chooses its step size by its own progress.

Source: Croce & Hein 2020, arXiv 2003.01690, algorithm 1; its l2 form and its starts from the authors' code.

    z_{k+1} = project(x_k + eta * steepest(grad f(x_k)))
    x_{k+1} = project(x_k + a (z_{k+1} - x_k) + (1 - a) (x_k - x_{k-1})),    a = 0.75, in the first step 1

The step size eta begins at 2 eps. At the `checkpoints` w_j it is halved, and the search goes on from the
point of highest loss so far, where (1) at most rho of the steps since w_{j-1} increased the loss, or (2) eta
was not halved at w_{j-1} and the highest loss has not grown since. A start lies on the surface of the ball,
cut to the box. Targets, and restarts for each of them, follow one another while a row is robust.

Where the authors' code differs from the paper it is followed, as the numbers of the field come from it:
checkpoints are rounded down; *at most*, not fewer than, rho of the steps in condition 1; and there the first
step counts as an increase where the loss after it is positive, not where it exceeds the start's
(cross-entropy: always; the other losses: where the label is lost).

Deviations. (1) ``stop = "first-success"``: a row ends at its first iterate, of all that are evaluated, that
the reference form misclassifies; ``never``: the iterate of lowest margin is returned, not that of highest
loss. (2) Losses are those of `LOSSES`, which do not saturate. (3) ``give_up``: a start ends early where it is
not on its way to success, see `GIVE_UP`. (4) A row that is still robust after a search in bfloat16 is
searched a second time, from the same starts, with gradients of the reference form, where its margin is
`within_rounding`, or where the two precisions differ at its best point, see `compare_at`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import LOSSES, TARGETED_LOSSES, margins, misclassified, targeted_margin
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import compare_at, within_rounding
from robustbench_cure.attacks.targets import Order, ranked_targets
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

#: Share of the step in an update; the rest is that of the step before.
MOMENTUM = 0.75
#: A start is hopeless where its margin would stay positive even if every remaining step lowered it by this
#: many times as much as a mean step since the last checkpoint did.
GIVE_UP = 2.0


@torch.inference_mode(False)  # where gradients are zero
def apgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    steps: int,
    restarts: int = 1,
    loss: str = "ce",
    targets: int = 0,
    order: Order = "logits",
    rho: float = 0.75,
    give_up: bool = False,
    stop: Stop = "first-success",
) -> Candidates:
    """Auto-PGD, untargeted or against the best targets of each row one after the other.

    Source: Croce & Hein 2020, arXiv 2003.01690, algorithm 1, with the deviations in the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        steps: updates of each start, at least 1; one gradient more is computed, that of the start.
        restarts: starts, at least 1, for each target.
        loss: untargeted one of `LOSSES`: ``ce``, ``margin``, ``dlr`` or ``pm``; targeted one of
            `TARGETED_LOSSES`: ``margin`` or ``dlr``.
        targets: 0: untargeted; else the number of target classes, at most all but the label.
        order: how targets are ranked, ``logits`` or ``distance``, see `ranked_targets`.
        rho: share of steps that must increase the loss for the step size to stay, between 0 and 1.
        give_up: end a start early where it is hopeless, see `GIVE_UP`.
        stop: ``first-success`` or ``never``, see the module.

    Returns:
        Candidates inside the ball and the box. Where no adversarial image was found, the iterate of lowest
        margin of all starts. ``steps`` counts from the start of that iterate. ``searched_again`` is set for
        bfloat16 only.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: ``steps`` or ``restarts`` below 1; ``targets`` below 0; fewer classes than the loss needs;
            images or labels that `check_inputs` refuses.
        KeyError: another loss, or another order.
    """
    check_inputs(classifier, x, y)
    if steps < 1 or restarts < 1 or targets < 0:
        raise ValueError(f"{steps} steps, {restarts} restarts, {targets} targets: at least 1, 1 and 0")
    if loss not in (TARGETED_LOSSES if targets else LOSSES):
        raise KeyError(loss)
    noise, first_success = noise or Noise.for_rows(len(x), device=x.device), stop == "first-success"
    two_searches = classifier.precision == "bf16" and len(x) > 0

    # One entry for each row; the candidates hold the best image so far.
    candidates = Candidates.start(x)
    lowest = torch.full((len(x),), torch.inf, dtype=torch.float32, device=x.device)  # its margin
    uncertain = torch.zeros(
        len(x), dtype=torch.bool, device=x.device
    )  # rounding may decide that margin's sign
    pending = torch.ones_like(uncertain)  # attacked, and not adversarial yet
    targets = min(targets, classifier.num_classes - 1)
    classes = torch.zeros((len(x), 1), dtype=torch.int64, device=x.device)
    if targets:
        classes, forwards, backwards = ranked_targets(classifier, x, y, threat, targets, order)
        candidates.forwards += forwards
        candidates.backwards += backwards

    # By the number of updates made: whether this is a checkpoint, and the updates since the one before.
    is_checkpoint = torch.zeros(steps + 1, dtype=torch.bool, device=x.device)
    window = torch.zeros(steps + 1, dtype=torch.int64, device=x.device)
    last = 0
    for checkpoint in checkpoints(steps):
        is_checkpoint[checkpoint], window[checkpoint], last = True, checkpoint - last, checkpoint

    for reference in (False, True) if two_searches else (False,):  # the form whose gradients are followed
        if reference:
            candidates.forwards += 3 * pending
            candidates.searched_again, exact = compare_at(classifier, x, y, candidates.x_adv, pending)
            lowest = exact.where(pending, lowest)
            pending = pending & (uncertain | candidates.searched_again)

        # The search of each row: starts before this one, updates since the start, iterate and the one before.
        start, taken = torch.zeros((2, len(x)), dtype=torch.int64, device=x.device)
        current, previous = x.clone(), x.clone()
        # The point of highest loss since the start, and its gradient.
        best, best_gradient, best_loss = x.clone(), torch.zeros_like(x), torch.zeros_like(lowest)
        # Step size; whether it was halved at the last checkpoint; updates since then that increased the loss.
        step_size, halved, increases = (
            torch.zeros_like(lowest),
            torch.ones_like(pending),
            torch.zeros_like(start),
        )
        last_loss, checkpoint_loss = torch.zeros_like(lowest), torch.zeros_like(lowest)
        # Lowest margin to the classes aimed at since the start, and as it was at the last checkpoint.
        gap, checkpoint_gap = torch.zeros_like(lowest), torch.zeros_like(lowest)

        active = ActiveSet(len(x), classifier.batch_size, x.device, among=pending)
        for rows in active:
            fresh = rows[taken[rows] == 0]
            if len(fresh):
                stream = (start[fresh] // restarts << 32) + start[fresh] % restarts
                current[fresh] = best[fresh] = previous[fresh] = draw_start(
                    x[fresh], threat, noise[fresh], stream
                )
                best_gradient[fresh], best_loss[fresh], gap[fresh] = 0.0, -torch.inf, torch.inf
                step_size[fresh], halved[fresh], increases[fresh] = 2 * threat.radius, True, 0
                last_loss[fresh] = -torch.inf if loss == "ce" else 0.0

            clean, here, labels, updates = x[rows], current[rows], y[rows], taken[rows]
            first = updates == 0
            objective: Callable[[Tensor], Tensor] = partial(LOSSES[loss], labels=labels)
            if targets:
                aim = classes[rows, start[rows] // restarts]
                objective = partial(TARGETED_LOSSES[loss], labels=labels, targets=aim)
            logits, gradient = classifier.value_and_gradient(here, objective, reference=reference)
            candidates.forwards[rows] += 1
            candidates.backwards[rows] += 1

            # The pass also evaluates the iterate, which is a candidate.
            margin, hit = margins(logits, labels), misclassified(logits, labels)
            if first_success and bool(hit.any()):
                exact = classifier.logits(here[hit])
                candidates.forwards[rows[hit]] += 1
                margin[hit] = margins(exact, labels[hit])
                hit = hit.masked_scatter(hit, misclassified(exact, labels[hit]))
            hit &= first_success
            better = (margin < lowest[rows]) | hit
            found = rows[better]
            candidates.x_adv[found], candidates.steps[found] = here[better], updates[better]
            lowest[found], uncertain[found] = margin[better], (within_rounding(margin, logits) & ~hit)[better]
            pending[rows] &= ~hit

            # Progress of the loss and of the margin.
            value = objective(logits)
            increases[rows] += (value > last_loss[rows]) & ~first
            last_loss[rows] = value.where(~first, last_loss[rows])
            improved = value > best_loss[rows]
            best[rows[improved]], best_gradient[rows[improved]] = here[improved], gradient[improved]
            best_loss[rows] = value.where(improved, best_loss[rows])
            aimed = -targeted_margin(logits, labels, aim) if targets else margin
            gap[rows] = torch.minimum(gap[rows], aimed)
            checkpoint_loss[fresh], checkpoint_gap[fresh] = best_loss[fresh], gap[fresh]

            # At a checkpoint: halve the step size of rows without progress, and go back to their best point.
            hopeless = torch.zeros_like(hit)
            check = is_checkpoint[updates]
            if bool(check.any()):
                at, since = rows[check], window[updates[check]]
                few = increases[at] <= rho * since
                stuck = ~halved[at] & (checkpoint_loss[at] >= best_loss[at])
                halved[at] = few | stuck
                step_size[at] = (step_size[at] / 2).where(halved[at], step_size[at])
                back = check.masked_scatter(check, halved[at])
                here[back], gradient[back] = best[rows[back]], best_gradient[rows[back]]
                if give_up:
                    pace = (checkpoint_gap[at] - gap[at]) / since
                    hopeless[check] = gap[at] > GIVE_UP * pace * (steps - updates[check])
                increases[at], checkpoint_loss[at], checkpoint_gap[at] = 0, best_loss[at], gap[at]

            # The update.
            step = step_size[rows].view(-1, *[1] * (x.dim() - 1))
            share = torch.where(first, 1.0, MOMENTUM).view_as(step)
            ahead = threat.project(clean, here + step * threat.steepest(gradient))
            ahead = here + share * (ahead - here) + (1 - share) * (here - previous[rows])
            previous[rows], current[rows] = here, threat.project(clean, ahead)
            taken[rows] += 1

            # The next start of rows whose start has ended; rows that are broken, or had all starts, leave.
            ended = rows[(updates >= steps) | hopeless | hit]
            taken[ended] = 0
            start[ended] += 1
            active.drop(ended[~pending[ended] | (start[ended] >= max(targets, 1) * restarts)])
    return candidates


def checkpoints(steps: int) -> list[int]:
    """Numbers of updates after which the step size may be halved: w_1, w_2, ... up to ``steps``.

    Source: Croce & Hein 2020, arXiv 2003.01690, section 3.1, as rounded by the authors' code: the first after
    0.22 of the steps, each further interval shorter by 0.03 of them, none shorter than 0.06; at least 1 each.
    """
    found, interval = [], max(int(0.22 * steps), 1)
    last = interval
    while last <= steps:
        found.append(last)
        interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        last += interval
    return found


def draw_start(x: Tensor, threat: ThreatModel, noise: Noise, stream: int | Tensor) -> Tensor:
    """A random point of the ball's surface around each row, cut to the box; shape of ``x``.

    Linf: x + eps t / max |t|, t uniform on [-1, 1] in each pixel; l2: a Gaussian direction of length eps.

    Args:
        x: images (B,C,H,W) in [0, 1].
        threat: norm and eps.
        noise: one stream a row.
        stream: number of the draw, int or int64 (B,).
    """
    shape = tuple(x.shape[1:])
    if threat.norm == "l2":
        return threat.project(x, x + threat.radius * threat.steepest(noise.normal(shape, stream)))
    t = 2.0 * noise.uniform(shape, stream) - 1.0
    largest = t.abs().flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1))
    return threat.project(x, x + threat.radius * (t / largest.clamp_min(1e-12)))
