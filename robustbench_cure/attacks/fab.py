"""FAB-T: the fast adaptive boundary attack, towards one class after the other, for l2 and linf.

Source: Croce & Hein 2020, arXiv 1907.02044, algorithm 1; targeted form: Croce & Hein 2020, arXiv 2003.01690,
section 4 and appendix. It looks for the nearest boundary between the label y and a target class t: z_t - z_y
is linearised at the iterate x_i, and both x_i and the image x are projected onto the hyperplane where it is
zero, inside the box (`box_projection`), by d_i and d. Then

    alpha = min(||d_i|| / (||d_i|| + ||d||), alpha_max)
    x_{i+1} = clip((1 - alpha) (x_i + eta d_i) + alpha (x + eta d))

and where x_{i+1} has lost its label, the search goes on nearer to the image: x_{i+1} <- x + beta (x_{i+1} - x).
Targets are the classes of the largest logits at x, in that order. The first start is at x, the others are random.

Deviations. (1) ``stop = "first-success"``: a row ends at its first iterate inside the ball that the reference
form misclassifies, since robust accuracy asks for no more. (2) The nearest misclassified point of a row that has
none in the ball is projected onto the ball, and tried. (3) A start ends where the iterate does not move.
(4) A row that is still robust after a search in bfloat16 is searched a second time in float32, see
`_doubtful`: reduced precision must not raise robust accuracy.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.box_projection import box_projection
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import logit_range, margins_differ, to_search_again, within_rounding
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import Norm, ThreatModel, distance

#: Rows whose nearest misclassified point is within this many radii are searched again after bfloat16.
NEAR = 1.25
#: The shortest way to a hyperplane that alpha still tells from none.
SHORTEST = 1e-8


@torch.inference_mode(False)  # where gradients are zero
def fab(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    steps: int,
    restarts: int = 1,
    targets: int,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    stop: Stop = "first-success",
) -> Candidates:
    """FAB-T: for each target class and each start, ``steps`` steps towards the nearest boundary to it.

    Source: Croce & Hein 2020, arXiv 1907.02044 and 2003.01690, with the deviations in the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        steps: iterations of one start, at least 1.
        restarts: starts for each target, at least 1; all but the first are random, at half the distance of
            the nearest misclassified point so far, or half of eps if that is less.
        targets: target classes, at least 1 and fewer than the model has classes.
        alpha_max: largest weight of the step from the image, in [0, 1].
        eta: how far beyond the hyperplane a step goes, at least 1: 1 ends on it.
        beta: share of its perturbation that a misclassified iterate keeps, in (0, 1).
        stop: ``first-success`` or ``never``, see the module.

    Returns:
        Candidates inside the ball and the box. Where an adversarial image was found: the first one
        (``never``: the nearest one). Elsewhere the point of the ball of lowest margin that is known.
        ``searched_again`` is set for bfloat16 only.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: no target, or as many as the model has classes; no step, no start; images or labels that
            `check_inputs` refuses.
    """
    check_inputs(classifier, x, y)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps {steps}, restarts {restarts}: at least 1 each")
    if not 1 <= targets < classifier.num_classes:
        raise ValueError(f"targets {targets}: a model of {classifier.num_classes} classes has "
                         f"1 to {classifier.num_classes - 1} beside the label's own")  # fmt: skip
    found = Candidates.start(x)
    if not len(x):
        return found
    noise = noise or Noise.for_rows(len(x), device=x.device)
    first_success = stop == "first-success"

    # One entry for each row. found.x_adv is the best point of the ball: adversarial, or of lowest margin.
    logits = classifier.logits(x)
    found.forwards += 1
    lowest = margins(logits, y)  # of found.x_adv
    broken = misclassified(logits, y)
    scale = logit_range(logits)
    classes = logits.scatter(1, y[:, None], -torch.inf).topk(targets, dim=1).indices
    nearest, reached = x.clone(), torch.where(broken, 0.0, torch.inf)  # misclassified point, its distance
    pending = ~broken

    for again in (False, True) if classifier.precision == "bf16" else (False,):
        if again:
            doubtful = _doubtful(classifier, x, y, nearest, reached / threat.radius, scale, broken, found)
            found.searched_again = pending = doubtful

        # The trajectory of each row: iterate, steps since its start, starts before this one.
        current = x.clone()
        taken, start = torch.zeros((2, len(x)), dtype=torch.int64, device=x.device)
        active = ActiveSet(len(x), classifier.batch_size, x.device, among=pending)
        with classifier.in_float32() if again else nullcontext():
            for rows in active:
                random = rows[(taken[rows] == 0) & (start[rows] % restarts > 0)]
                if len(random):
                    radius = reached[random].clamp_max(threat.radius) / 2
                    current[random] = _random_point(threat, x[random], radius, noise[random], start[random])

                clean, here, labels = x[rows], current[rows], y[rows]
                target = classes[rows, start[rows] // restarts]
                logits, slope = classifier.value_and_gradient(
                    here, lambda logits, t=target, y=labels: _gap(logits, t, y)
                )
                ahead = step(threat.norm, clean, here, _gap(logits, target, labels), slope, alpha_max, eta)
                taken[rows] += 1

                # Its label: by the search form, and by the reference form where that decides a success.
                logits = classifier.search_logits(ahead)
                found.forwards[rows] += 2
                found.backwards[rows] += 1
                inside = threat.contains(clean, ahead)
                margin, hit = margins(logits, labels), misclassified(logits, labels)
                verify = inside & hit
                if classifier.precision == "bf16":
                    verify |= inside & within_rounding(margin, logits)
                if bool(verify.any()):
                    exact = classifier.logits(ahead[verify])
                    found.forwards[rows[verify]] += 1
                    margin = margin.masked_scatter(verify, margins(exact, labels[verify]))
                    hit = hit.masked_scatter(verify, misclassified(exact, labels[verify]))

                far = threat.distance(clean, ahead)
                nearer = hit & (far < reached[rows])
                nearest[rows[nearer]], reached[rows[nearer]] = ahead[nearer], far[nearer]
                better = inside & torch.where(hit, nearer, ~broken[rows] & (margin < lowest[rows]))
                kept = rows[better]
                found.x_adv[kept], found.steps[kept] = ahead[better], taken[kept]
                lowest[kept] = margin[better]
                broken[rows] |= inside & hit

                moving = (ahead != here).flatten(1).any(1)
                back = clean + beta * (ahead - clean)
                current[rows] = torch.where(hit.view(-1, 1, 1, 1), back, ahead)
                ended = rows[(taken[rows] >= steps) | ~moving]
                taken[ended], current[ended] = 0, x[ended]
                start[ended] += 1
                over = start[rows] >= targets * restarts
                active.drop(rows[over | (broken[rows] & first_success)])

    # A misclassified point outside the ball shows the way to a point in it.
    for rows in torch.split((~broken & reached.isfinite()).nonzero().squeeze(1), classifier.batch_size):
        shown = threat.project(x[rows], nearest[rows])
        margin = margins(classifier.logits(shown), y[rows])
        found.forwards[rows] += 1
        lower = margin < lowest[rows]
        found.x_adv[rows[lower]] = shown[lower]
    return found


def step(
    norm: Norm, x: Tensor, here: Tensor, gap: Tensor, slope: Tensor, alpha_max: float, eta: float
) -> Tensor:
    """One step across the hyperplane where the linearised gap is zero.

    Source: arXiv 1907.02044, algorithm 1, lines 5 to 8.

    Args:
        norm: the norm in which the boundary is to be near.
        x: images, float (B,C,H,W) in [0, 1].
        here: iterates, likewise.
        gap: z_t - z_y at the iterates, float (B,); NaN is taken as zero.
        slope: its gradient there, float (B,C,H,W).
        alpha_max: largest weight of the step from the image, in [0, 1].
        eta: how far beyond the hyperplane a step goes.

    Returns:
        The next iterates, (B,C,H,W) in [0, 1]; ``here`` where the slope is zero and ``here`` is ``x``.
    """
    image, point, normal = x.flatten(1), here.flatten(1), slope.flatten(1)
    from_image = ((point - image) * normal).sum(1) - gap
    d_point, d_image = box_projection(
        norm, torch.cat((point, image)), normal.repeat(2, 1), torch.cat((-gap, from_image))
    ).chunk(2)
    a_point, a_image = (
        distance(norm, d, torch.zeros_like(d)).clamp_min(SHORTEST) for d in (d_point, d_image)
    )
    alpha = (a_point / (a_point + a_image)).clamp_max(alpha_max)[:, None]
    ahead = torch.lerp(point + eta * d_point, image + eta * d_image, alpha)
    return ahead.clamp(0.0, 1.0).view_as(x)


def _gap(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """z_t - z_y, (B,); logits (B, L), targets and labels int64 (B,)."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)


def _random_point(threat: ThreatModel, x: Tensor, radius: Tensor, noise: Noise, stream: Tensor) -> Tensor:
    """A random point at distance ``radius`` (B,) of each image, cut to the box; shape of x."""
    shape = tuple(x.shape[1:])
    if threat.norm == "linf":
        direction = 2.0 * noise.uniform(shape, stream) - 1.0
        direction /= direction.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    else:
        direction = threat.steepest(noise.normal(shape, stream))
    return (x + radius.view(-1, 1, 1, 1) * direction).clamp(0.0, 1.0)


def _doubtful(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    nearest: Tensor,
    radii: Tensor,
    scale: Tensor,
    broken: Tensor,
    found: Candidates,
) -> Tensor:
    """Rows to search again in float32, bool (B,): the others are robust beyond what bfloat16 may hide.

    Args:
        classifier: the model, which searches in bfloat16.
        x: images, float32 (B,C,H,W).
        y: labels, int64 (B,).
        nearest: nearest misclassified point of the search, or x, float32 (B,C,H,W).
        radii: its distance, in radii of the ball; infinite where there is none, float (B,).
        scale: `logit_range` of the images, float (B,).
        broken: rows that are not robust, bool (B,).
        found: the work made here is added to ``forwards``.
    """
    differ = torch.zeros_like(broken)
    for rows in torch.split((~broken).nonzero().squeeze(1), classifier.batch_size):
        searched, exact = classifier.search_logits(nearest[rows]), classifier.logits(nearest[rows])
        differ[rows] = margins_differ(searched, exact, y[rows], scale[rows])
        found.forwards[rows] += 2
    return to_search_again(differ, ~broken) | (~broken & (radii <= NEAR))
