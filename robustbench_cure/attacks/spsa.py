"""SPSA: gradient-free search from simultaneous-perturbation estimates.

Source: Uesato et al. 2018, arXiv 1802.05666, algorithm 1; the CURE paper's check for masked gradients,
section 4 and Fig. 7. Minimises the margin J = z_y - max_{j != y} z_j with Adam on

    ghat = mean_i [J(x' + delta v_i) - J(x' - delta v_i)] / (2 delta) * v_i,   v_i in {-1, +1}^d

Every image draws its own directions. A batch holds as many images as have ``batch_size`` queries together,
2 * samples each.

Deviations. (1) Queries stay in the box [0, 1], outside which a network need not be defined: x' is the point
nearest to the iterate that is delta away from every side, so that pairs stay symmetric. (2) A query without
finite logits counts as a margin lower by one than that of its pair: the search goes there, and ends. (3) A
small delta may change a margin by less than bfloat16 resolves, even where margins and gradients are accurate:
a row whose estimates at x differ between the two forms is searched in the reference form. (4) A row that is
still robust after a search in bfloat16 is searched a second time, in the reference form and with the same
directions, where its margin is `within_rounding`, or where the two forms' `margins_differ` at one of its
iterates, see `to_search_again`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import (
    COSINE,
    logit_range,
    margins_differ,
    to_search_again,
    within_rounding,
)
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

#: Adam's constants (Kingma & Ba 2015), as in the source.
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-8
#: Directions, at most, on which estimates in the two precisions are compared.
COMPARED = 16


@torch.inference_mode(False)  # where gradients are zero
def spsa(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    steps: int,
    samples: int,
    step_size: float = 0.01,
    delta: float = 0.01,
    stop: Stop = "first-success",
) -> Candidates:
    """Attack with differences of margins alone, without gradients.

    Source: Uesato et al. 2018, arXiv 1802.05666, algorithm 1, with the deviations in the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        steps: Adam steps.
        samples: directions for each estimate, at least 1; each costs two forward images.
        step_size: Adam's learning rate, in units of x, positive.
        delta: length of the finite difference in each pixel, in units of x, between 0 and 0.5.
        stop: ``first-success`` returns the first iterate that the reference form misclassifies;
            ``never`` goes on and returns the iterate of lowest margin.

    Returns:
        Candidates inside the ball and the box; ``searched_again`` is set for bfloat16 only.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: ``steps * step_size`` is less than eps: the ball could not be reached; or ``delta`` is
            half of the box or more: no pair of queries would fit; or images or labels that `check_inputs`
            refuses.
    """
    check_inputs(classifier, x, y)
    if not 0 < delta < 0.5:
        raise ValueError(f"delta {delta}: must lie between 0 and 0.5, half of the pixels' range")
    if steps * step_size < threat.radius * (1 - 1e-9):
        raise ValueError(f"{steps} Adam steps of {step_size} cannot reach a ball of radius {threat.eps}")
    noise = noise or Noise.for_rows(len(x), device=x.device)
    batch = classifier.batch_size // (2 * samples)  # rows whose queries fill a pass

    # One entry for each row; the candidates hold the best image so far.
    candidates = Candidates.start(x)
    lowest = x.new_full((len(x),), torch.inf)  # its margin
    # A rounding may decide the sign of that margin; margins of the two precisions differed at some iterate.
    uncertain, differ = torch.zeros((2, len(x)), dtype=torch.bool, device=x.device)
    chosen = torch.ones(len(x), dtype=torch.bool, device=x.device)  # rows to search
    two_searches = classifier.precision == "bf16" and len(x) > 0
    if two_searches:
        scale = logit_range(classifier.logits(x))
        compared = min(samples, COMPARED)
        chosen = agree = _estimates_agree(classifier, x, y, noise, compared, delta)
        candidates.forwards += 1 + 4 * compared

    for reference in (False, True) if two_searches else (False,):  # the form that is queried
        if reference:
            candidates.searched_again = ~agree | to_search_again(differ, agree & (lowest >= 0))
            chosen = uncertain | candidates.searched_again

        # The trajectory of each row: iterate, steps, and Adam's moments of the gradient.
        current, taken = x.clone(), torch.zeros_like(candidates.steps)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        active = ActiveSet(len(x), batch, x.device, among=chosen)
        for rows in active:
            # Success is decided in the reference form: one pass more beside 2 * samples others.
            here, labels = current[rows], y[rows]
            logits = classifier.logits(here)
            candidates.forwards[rows] += 1
            margin, hit = margins(logits, labels), misclassified(logits, labels)
            if two_searches and not reference:
                differ[rows] |= margins_differ(classifier.search_logits(here), logits, labels, scale[rows])
                candidates.forwards[rows] += 1

            # Keep the latest iterate; with stop = "never", and in the second search, the best one.
            kept = torch.ones_like(hit)
            if stop == "never" or reference:
                kept = (margin < lowest[rows]) | (hit & (lowest[rows] >= 0))
            better = rows[kept]
            lowest[better] = margin[kept]
            uncertain[better] = (within_rounding(margin, logits) & ~hit)[kept]
            candidates.x_adv[better], candidates.steps[better] = here[kept], taken[better]

            done = taken[rows] >= steps
            if stop == "first-success":
                done |= hit
            active.drop(rows[done])
            rows = rows[~done]
            if len(rows) == 0:
                continue

            # One step of Adam down the estimated gradient of the margin.
            here, labels, stream = current[rows], y[rows], taken[rows]
            gradient = gradient_estimate(
                classifier, here, labels, noise[rows], stream, samples, delta, reference=reference
            )
            candidates.forwards[rows] += 2 * samples
            taken[rows] += 1
            t = taken[rows].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
            first[rows] = BETA_1 * first[rows] + (1 - BETA_1) * gradient
            second[rows] = BETA_2 * second[rows] + (1 - BETA_2) * gradient.square()
            mean, square = first[rows] / (1 - BETA_1**t), second[rows] / (1 - BETA_2**t)
            step = step_size * mean / (square.sqrt() + ADAM_EPS)
            current[rows] = threat.project(x[rows], here - step)
    return candidates


def _estimates_agree(
    classifier: Classifier, x: Tensor, y: Tensor, noise: Noise, samples: int, delta: float
) -> Tensor:
    """Whether estimates at x have nearly the same direction in bfloat16 and float32, bool (B,)."""
    agree = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    batch = max(1, classifier.batch_size // (2 * samples))
    for rows in torch.split(torch.arange(len(x), device=x.device), batch):
        searched, exact = (
            gradient_estimate(
                classifier, x[rows], y[rows], noise[rows], 0, samples, delta, reference=reference
            ).flatten(1)
            for reference in (False, True)
        )
        agree[rows] = torch.cosine_similarity(searched, exact, eps=1e-30) >= COSINE
    return agree


def gradient_estimate(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    noise: Noise,
    stream: int | Tensor,
    samples: int,
    delta: float,
    *,
    reference: bool = False,
) -> Tensor:
    """SPSA estimate of the gradient of the margin; unbiased where the margin is linear.

    Source: Uesato et al. 2018, arXiv 1802.05666, algorithm 1; see the module.

    Args:
        classifier: computes the margins, ``batch_size`` images at a time.
        x: points, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        noise: random streams of the rows.
        stream: number of the draw, one for all rows or int64 (B,).
        samples: directions for each row, at least 1.
        delta: length of the finite difference in each pixel, in units of x, between 0 and 0.5.
        reference: query the reference form instead of the search form.

    Returns:
        The estimate, float32, shape of ``x``.
    """
    query = classifier.logits if reference else classifier.search_logits
    centre = x.clamp(delta, 1.0 - delta)
    shape = tuple(x.shape[1:])
    size = math.prod(shape)
    signs = noise.signs((samples, size), stream)
    total = x.new_zeros((len(x), size))
    passes = min(samples, math.ceil(2 * samples * len(x) / classifier.batch_size))
    for part in torch.split(signs, math.ceil(samples / passes), dim=1):  # parts of equal size
        shift = delta * part.view(len(x), -1, *shape)
        queries = torch.cat((centre[:, None] + shift, centre[:, None] - shift), 1).flatten(0, 1).clamp_(0, 1)
        labels = y.repeat_interleave(2 * part.shape[1])
        plus, minus = margins(query(queries), labels).view(len(x), 2, -1).unbind(1)
        total += torch.einsum("bn,bnd->bd", (plus - minus).nan_to_num(-1.0, 1.0, -1.0), part)
    return (total / (2 * delta * samples)).view_as(x)
