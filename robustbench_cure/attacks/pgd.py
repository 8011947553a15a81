"""Projected gradient descent, for one or several step counts at once.

Source: Madry et al. 2018, arXiv 1706.06083; PGD(K) of the CURE paper, sections 2 and 4.

    x_0 = x + uniform noise of the ball (or x);  x_k = project(x_{k-1} + step_size * steepest(grad loss))

Deviations. (1) ``stop = "first-success"``: a row ends at its first iterate that the reference form
misclassifies, instead of always returning the last one; that can only be stronger, makes robust accuracy
monotone in steps, and frees its place in the batch. (2) ``stop = "never"``: the iterate of lowest margin is
returned, not the last. (3) PGD(7), PGD(20), ... with equal parameters are prefixes of one trajectory and are
computed together: each step count is a checkpoint of `pgd_checkpoints`. (4) A row that is still robust after
a search in bfloat16 is searched a second time, from the same starts, with gradients of the reference form,
where its margin is `within_rounding`, or where the two forms' `margins_differ`, see `to_search_again`:
reduced precision must not raise robust accuracy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import LOSSES, margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import (
    logit_range,
    margins_differ,
    to_search_again,
    within_rounding,
)
from robustbench_cure.attacks.uniform_noise import draw
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel


@torch.inference_mode(False)  # where gradients are zero
def pgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    steps: int,
    step_size: float,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "ce",
    stop: Stop = "first-success",
) -> Candidates:
    """PGD with ``steps`` iterations: `pgd_checkpoints` with one checkpoint.

    Source, arguments and exceptions are those of `pgd_checkpoints`; ``steps``, at least 1, is its checkpoint.

    Returns:
        Candidates inside the ball and the box.
    """
    (candidates,) = pgd_checkpoints(
        classifier,
        x,
        y,
        threat=threat,
        noise=noise,
        checkpoints=(steps,),
        step_size=step_size,
        random_start=random_start,
        restarts=restarts,
        loss=loss,
        stop=stop,
    )
    return candidates


@torch.inference_mode(False)  # where gradients are zero
def pgd_checkpoints(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    checkpoints: tuple[int, ...],
    step_size: float,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "ce",
    stop: Stop = "first-success",
) -> list[Candidates]:
    """PGD(K) for every step count K of ``checkpoints``, from one trajectory for each restart.

    Source: Madry et al. 2018, arXiv 1706.06083, with the deviations in the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        checkpoints: step counts, at least 1 and strictly increasing.
        step_size: length of one step in the norm of the ball, in units of x, positive.
        random_start: start at a uniform point of the ball instead of at x.
        restarts: independent starts, at least 1; a row is restarted while it is robust at some checkpoint.
            Without ``random_start`` there is only one start.
        loss: ``ce``, ``margin``, ``dlr`` or ``pm``, see `LOSSES`.
        stop: ``first-success`` or ``never``, see the module.

    Returns:
        Candidates for each checkpoint, all inside the ball and the box. Where no adversarial image was
        found within K steps, the iterate of lowest margin among those after K steps of each restart
        (``never``: among all iterates up to K steps). ``searched_again`` is set for bfloat16 only.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: checkpoints that are not positive and strictly increasing; images or labels that
            `check_inputs` refuses.
        KeyError: another loss.
    """
    check_inputs(classifier, x, y)
    if list(checkpoints) != sorted(set(checkpoints)) or not checkpoints or checkpoints[0] < 1:
        raise ValueError(f"checkpoints must be positive and strictly increasing, got {checkpoints}")
    objective, first_success = LOSSES[loss], stop == "first-success"
    noise = noise or Noise.for_rows(len(x), device=x.device)
    restarts = restarts if random_start else 1
    two_searches = classifier.precision == "bf16" and len(x) > 0
    # Nothing follows the last step of the last restart: the evaluator's own check is enough there.
    check_last = not first_success or restarts > 1 or two_searches

    # Trackers for K checkpoints and B rows, (K, B): x_adv is the best image so far.
    size, device = (len(checkpoints), len(x)), x.device
    counts = torch.tensor(checkpoints, device=device)[:, None]
    x_adv = x.expand(len(checkpoints), *x.shape).clone()
    steps, forwards, backwards = torch.zeros((3, *size), dtype=torch.int64, device=device)
    lowest = torch.full(size, torch.inf, dtype=torch.float32, device=device)  # margin of x_adv
    uncertain = torch.zeros(size, dtype=torch.bool, device=device)  # a rounding may decide the margin's sign
    searched_again: Tensor | None = None
    pending = torch.ones(size, dtype=torch.bool, device=device)  # attacked, and not adversarial yet

    for reference in (False, True) if two_searches else (False,):  # the form whose gradients are followed
        if reference:
            robust = pending
            searched_again = _compare_precisions(classifier, x, y, x_adv, robust, lowest, forwards)
            # More steps are never weaker: with a checkpoint all longer ones are searched again.
            pending = robust & (((uncertain | searched_again) & robust).cumsum(0) > 0)

        # The trajectory of each row: iterate, steps since its start, starts before this one.
        current = x.clone()
        taken, restart = torch.zeros((2, len(x)), dtype=torch.int64, device=device)
        active = ActiveSet(len(x), classifier.batch_size, device, among=pending.any(0))
        for rows in active:
            starting = rows[taken[rows] == 0]
            if random_start and len(starting):
                current[starting] = draw(x[starting], threat, noise[starting], restart[starting])

            here, labels = current[rows], y[rows]
            logits, gradient = classifier.value_and_gradient(
                here, partial(objective, labels=labels), reference=reference
            )
            ahead = pending[:, rows] & (taken[rows] < counts)
            forwards[:, rows] += ahead
            backwards[:, rows] += ahead

            # The pass also evaluates the iterate, which is a candidate for all checkpoints not yet passed.
            better = pending[:, rows] & (taken[rows] <= counts)
            if first_success:
                hit = misclassified(logits, labels)
                if bool(hit.any()):
                    forwards[:, rows[hit]] += better[:, hit]
                    exact = classifier.logits(here[hit])
                    hit = hit.masked_scatter(hit, misclassified(exact, labels[hit]))
                better &= hit
                pending[:, rows] &= ~better
            else:
                margin = margins(logits, labels)
                better &= margin < lowest[:, rows]
                lowest[:, rows] = margin.where(better, lowest[:, rows])
                uncertain[:, rows] = within_rounding(margin, logits).where(better, uncertain[:, rows])
            which, b = better.nonzero(as_tuple=True)
            x_adv[which, rows[b]], steps[which, rows[b]] = here[b], taken[rows[b]]

            current[rows] = threat.project(x[rows], here + step_size * threat.steepest(gradient))
            taken[rows] += 1

            # Rows at a checkpoint k: PGD with that many steps ends here. The reference form evaluates the
            # iterate, so that the result is the same as without the other checkpoints.
            for k, count in enumerate(checkpoints):
                arrived = rows[(taken[rows] == count) & pending[k, rows]]
                if len(arrived) == 0:
                    continue
                here = current[arrived]
                if count == checkpoints[-1] and not check_last:
                    x_adv[k, arrived], steps[k, arrived] = here, count
                    continue
                logits, labels = classifier.logits(here), y[arrived]
                considered = pending[:, arrived] & (counts >= count)
                forwards[:, arrived] += considered
                # Adversarial: for k and all longer checkpoints. Otherwise: for k, where the margin is lowest.
                better = considered & misclassified(logits, labels) & first_success
                pending[:, arrived] &= ~better
                margin = margins(logits, labels)
                lower = margin < lowest[k, arrived]
                lowest[k, arrived] = margin.where(lower, lowest[k, arrived])
                uncertain[k, arrived] = within_rounding(margin, logits).where(lower, uncertain[k, arrived])
                better[k] |= lower
                which, b = better.nonzero(as_tuple=True)
                x_adv[which, arrived[b]], steps[which, arrived[b]] = here[b], count

            # A start ends at the longest checkpoint that is pending; the next one follows while any is.
            ended = rows[taken[rows] >= (counts * pending[:, rows]).amax(0)]
            taken[ended] = 0
            restart[ended] += 1
            active.drop(ended[(restart[ended] >= restarts) | ~pending[:, ended].any(0)])

    again = [None] * len(checkpoints) if searched_again is None else list(searched_again)
    return [
        Candidates(x_adv[k], steps[k], forwards[k], backwards[k], searched_again=again[k])
        for k in range(len(checkpoints))
    ]


def _compare_precisions(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    robust: Tensor,
    lowest: Tensor,
    forwards: Tensor,
) -> Tensor:
    """Re-evaluate in float32 what a search in bfloat16 left robust.

    Args:
        classifier: the model, which searches in bfloat16.
        x: images, float32 (B,C,H,W).
        y: labels, int64 (B,).
        x_adv: best image for each checkpoint, float32 (K,B,C,H,W).
        robust: rows that the search left robust, bool (K, B).
        lowest: margin of x_adv, float32 (K, B); that of robust rows is replaced by the one in float32.
        forwards: images passed forward, int64 (K, B); the passes made here are added.

    Returns:
        Rows to search again because the two precisions differ, bool (K, B); see `to_search_again`.
    """
    searched_again, scale = torch.zeros_like(robust), torch.zeros_like(lowest[0])
    compared = robust.any(0).nonzero().squeeze(1)
    scale[compared] = logit_range(classifier.logits(x[compared]))
    forwards += 3 * robust  # here, and twice below
    for k, images in enumerate(x_adv):
        differ, still_robust = torch.zeros_like(robust[k]), robust[k].clone()
        for rows in torch.split(robust[k].nonzero().squeeze(1), classifier.batch_size):
            exact, searched = classifier.logits(images[rows]), classifier.search_logits(images[rows])
            differ[rows] = margins_differ(searched, exact, y[rows], scale[rows])
            still_robust[rows] = ~misclassified(exact, y[rows])
            lowest[k, rows] = margins(exact, y[rows])
        searched_again[k] = to_search_again(differ, still_robust)
    return searched_again
