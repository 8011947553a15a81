"""FAB-T: the fast adaptive boundary attack, towards one class after the other, for l2 and linf.

Source: Croce & Hein 2020, arXiv 1907.02044, algorithm 1; the targeted form: Croce & Hein 2020,
arXiv 2003.01690. It looks for the nearest boundary between the label y and a target class t: z_t - z_y is
linearised at the iterate x_i, and both x_i and the image x are projected onto the hyperplane where it is
zero, inside the box (`box_projection`), by d_i and d. Then

    alpha = min(||d_i|| / (||d_i|| + ||d||), alpha_max)
    x_{i+1} = clip((1 - alpha) (x_i + eta d_i) + alpha (x + eta d))

and where x_{i+1} has lost its label, the search goes on nearer to the image, at x + beta (x_{i+1} - x).
Targets are the classes of the largest logits at x, in that order. The first start for each is at x, further
ones are random.

The search is in float32. On adversarially trained and curvature-regularised networks four in five iterates or
more lose their label, closely: with bfloat16 in the linearisation, or only in the labels, paths end
elsewhere, and up to one sample in forty stays robust that float32 finds adversarial images for.

Deviations. (1) ``stop = "first-success"``: a row ends at its first iterate inside the ball that the reference
form misclassifies, since robust accuracy asks for no more. (2) The nearest misclassified point of a row that
has none in the ball is projected onto the ball, and tried. (3) A start ends where the iterate does not move.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.box_projection import box_projection
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import Norm, ThreatModel, distance

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
        targets: target classes, at least 1; at most all but the label count.
        alpha_max: largest weight of the step from the image, in [0, 1].
        eta: how far beyond the hyperplane a step goes, at least 1: 1 ends on it.
        beta: share of its perturbation that a misclassified iterate keeps, in (0, 1).
        stop: ``first-success`` or ``never``, see the module.

    Returns:
        Candidates inside the ball and the box. Where an adversarial image was found: the first one
        (``never``: the nearest one). Elsewhere the point of the ball of lowest margin that is known.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: no target, no step, no start; images or labels that `check_inputs` refuses.
    """
    check_inputs(classifier, x, y)
    if steps < 1 or restarts < 1 or targets < 1:
        raise ValueError(f"steps {steps}, restarts {restarts}, targets {targets}: at least 1 each")
    targets = min(targets, classifier.num_classes - 1)
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
    classes = logits.scatter(1, y[:, None], -torch.inf).topk(targets, dim=1).indices
    nearest, reached = x.clone(), torch.where(broken, 0.0, torch.inf)  # misclassified point, its distance
    updates = torch.zeros_like(found.steps)  # before it

    # The trajectory of each row: iterate, steps since its start, starts before this one.
    current = x.clone()
    taken, start = torch.zeros((2, len(x)), dtype=torch.int64, device=x.device)
    active = ActiveSet(len(x), classifier.batch_size, x.device, among=~broken)
    with classifier.in_float32():
        for rows in active:
            random = rows[(taken[rows] == 0) & (start[rows] % restarts > 0)]
            if len(random):
                radius = reached[random].clamp_max(threat.radius) / 2
                current[random] = _random_point(threat, x[random], radius, noise[random], start[random])

            clean, here, labels = x[rows], current[rows], y[rows]
            gap = partial(_gap, targets=classes[rows, start[rows] // restarts], labels=labels)
            logits, slope = classifier.value_and_gradient(here, gap)
            ahead = boundary_step(threat.norm, clean, here, gap(logits), slope, alpha_max, eta)
            taken[rows] += 1

            # Its label, which the reference form gives where it decides a success.
            logits = classifier.search_logits(ahead)
            found.forwards[rows] += 2
            found.backwards[rows] += 1
            inside = threat.contains(clean, ahead)
            margin, hit = margins(logits, labels), misclassified(logits, labels)
            claimed = inside & hit
            if bool(claimed.any()):
                exact = classifier.logits(ahead[claimed])
                found.forwards[rows[claimed]] += 1
                margin = margin.masked_scatter(claimed, margins(exact, labels[claimed]))
                hit = hit.masked_scatter(claimed, misclassified(exact, labels[claimed]))

            far = threat.distance(clean, ahead)
            nearer = hit & (far < reached[rows])
            kept = rows[nearer]
            nearest[kept], reached[kept], updates[kept] = ahead[nearer], far[nearer], taken[kept]
            better = inside & torch.where(hit, nearer, margin < lowest[rows])
            kept = rows[better]
            found.x_adv[kept], found.steps[kept] = ahead[better], taken[kept]
            lowest[kept] = margin[better]
            broken[rows] |= inside & hit

            following = torch.where(hit.view(-1, 1, 1, 1), clean + beta * (ahead - clean), ahead)
            moving = (following != here).flatten(1).any(1)
            current[rows] = following
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
        kept = rows[lower]
        found.x_adv[kept], found.steps[kept] = shown[lower], updates[kept]
    return found


def boundary_step(
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
