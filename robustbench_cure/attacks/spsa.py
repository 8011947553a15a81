"""SPSA: gradient-free search from simultaneous-perturbation estimates.

Source: Uesato et al. 2018, arXiv 1802.05666, algorithm 1; the CURE paper's check for masked gradients,
section 4 and Fig. 7. Minimises the margin J = z_y - max_{j != y} z_j with Adam on

    ghat = mean_i [J(x' + delta v_i) - J(x' - delta v_i)] / (2 delta) * v_i,   v_i in {-1, +1}^d

Every image draws its own directions. Images are batched by the total of forward images, 2 * samples each.

Deviations. (1) Queries stay in the box, where alone a network needs to be defined: x' is the point nearest to
the iterate that is delta away from every side, so that pairs stay symmetric. (2) A query without
finite logits counts as a margin lower by one than its pair's: the search goes there, and ends. (3) What a
short delta changes may drown in bfloat16 where margins and gradients do not: a row whose estimates at x
differ between the two forms is searched in the reference form. (4) So is, once more and with the same
directions, a row that stands after a search in bfloat16 `within_rounding`, or where the two forms'
`margins_differ` at one of its iterates, see `to_search_again`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import Stop
from robustbench_cure.attacks.pool import Pool
from robustbench_cure.attacks.precision import (
    COSINE,
    logit_range,
    margins_differ,
    to_search_again,
    within_rounding,
)
from robustbench_cure.attacks.proposal import Proposal
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
) -> Proposal:
    """Attack with margin differences alone.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        steps: Adam steps.
        samples: directions for each estimate; each costs two forward images.
        step_size: Adam's learning rate, in units of x.
        delta: length of the finite difference in each pixel, in units of x.
        stop: ``first-success`` returns the first iterate that the reference form misclassifies;
            ``never`` goes on and returns the iterate of lowest margin.

    Returns:
        A proposal inside the ball and the box.

    Raises:
        ValueError: ``steps * step_size`` is less than eps: the ball could not be reached; or ``delta`` is
            half of the box or more: no pair of queries would fit.
    """
    check_inputs(classifier, x, y)
    if not 0 < delta < 0.5:
        raise ValueError(f"delta {delta}: must lie between 0 and 0.5, half of the pixels' range")
    if steps * step_size < threat.radius * (1 - 1e-9):
        raise ValueError(f"{steps} Adam steps of {step_size} cannot reach a ball of radius {threat.eps}")
    noise = noise or Noise.for_rows(len(x), device=x.device)
    proposal = Proposal.start(x)
    lowest = x.new_full((len(x),), torch.inf)  # margin of each proposal
    by_rounding, differ = torch.zeros((2, len(x)), dtype=torch.bool, device=x.device)
    rate = classifier.batch_size // (2 * samples)
    reduced = classifier.precision == "bf16" and len(x) > 0
    if reduced:
        scale = logit_range(classifier.logits(x))
        proposal.forwards += 1

    def search(chosen: Tensor, reference: bool) -> None:
        """All steps of the chosen rows."""
        current, first, second = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        taken = torch.zeros_like(proposal.steps)
        pool = Pool(len(x), rate, x.device, among=chosen)
        for rows in pool:
            here, labels = current[rows], y[rows]
            # One reference forward beside 2 * samples others: success is judged exactly.
            logits = classifier.logits(here)
            margin, hit = margins(logits, labels), misclassified(logits, labels)
            proposal.forwards[rows] += 1
            if reduced and not reference:
                differ[rows] |= margins_differ(classifier.search_logits(here), logits, labels, scale[rows])
                proposal.forwards[rows] += 1
            lower = (margin < lowest[rows]) | (hit & (lowest[rows] >= 0))
            kept = lower if stop == "never" or reference else torch.ones_like(hit)
            better = rows[kept]
            lowest[better] = margin[kept]
            by_rounding[better] = (within_rounding(margin, logits) & ~hit)[kept]
            proposal.x_adv[better] = here[kept]
            proposal.steps[better] = taken[better]
            done = taken[rows] >= steps
            if stop == "first-success":
                done |= hit
            pool.retire(rows[done])
            rows = rows[~done]
            if len(rows) == 0:
                continue
            estimate = gradient_estimate(
                classifier,
                current[rows],
                y[rows],
                noise[rows],
                taken[rows],
                samples,
                delta,
                reference=reference,
            )
            proposal.forwards[rows] += 2 * samples
            taken[rows] += 1
            first[rows] = BETA_1 * first[rows] + (1 - BETA_1) * estimate
            second[rows] = BETA_2 * second[rows] + (1 - BETA_2) * estimate.square()
            t = taken[rows].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
            mean, square = first[rows] / (1 - BETA_1**t), second[rows] / (1 - BETA_2**t)
            step = step_size * mean / (square.sqrt() + ADAM_EPS)
            current[rows] = threat.project(x[rows], current[rows] - step)

    if not reduced:
        search(torch.arange(len(x), device=x.device), reference=False)
        return proposal
    compared = min(samples, COMPARED)
    seen = _seen(classifier, x, y, noise, compared, delta)
    proposal.forwards += 4 * compared
    search(seen.nonzero().squeeze(1), reference=False)
    proposal.searched_again = ~seen | to_search_again(differ, seen & (lowest >= 0))
    search((by_rounding | proposal.searched_again).nonzero().squeeze(1), reference=True)
    return proposal


def _seen(classifier: Classifier, x: Tensor, y: Tensor, noise: Noise, samples: int, delta: float) -> Tensor:
    """Whether the estimate of the search form is that of the reference form, bool (B,)."""
    parts = []
    for rows in torch.split(
        torch.arange(len(x), device=x.device), max(1, classifier.batch_size // (2 * samples))
    ):
        searched, exact = (
            gradient_estimate(
                classifier, x[rows], y[rows], noise[rows], 0, samples, delta, reference=reference
            ).flatten(1)
            for reference in (False, True)
        )
        parts.append(torch.cosine_similarity(searched, exact, eps=1e-30) >= COSINE)
    return torch.cat(parts)


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
    """SPSA estimate of the margin's gradient, shape of ``x``; E = gradient for a linear margin.

    Args:
        classifier: gives the margins, ``batch_size`` images at a time.
        x: points, float32 (B,C,H,W).
        y: labels, int64 (B,).
        noise: one stream a row.
        stream: which draw, int or int64 (B,).
        samples: directions a row.
        delta: finite-difference length.
        reference: ask the reference form instead of the search form.
    """
    ask = classifier.logits if reference else classifier.search_logits
    centre = x.clamp(delta, 1.0 - delta)
    shape = tuple(x.shape[1:])
    size = math.prod(shape)
    signs = noise.signs((samples, size), stream)
    total = x.new_zeros((len(x), size))
    passes = min(samples, math.ceil(2 * samples * len(x) / classifier.batch_size))
    for part in torch.split(signs, math.ceil(samples / passes), dim=1):  # of equal size: none runs half empty
        shift = delta * part.view(len(x), -1, *shape)
        queries = torch.cat((centre[:, None] + shift, centre[:, None] - shift), 1).flatten(0, 1).clamp_(0, 1)
        labels = y.repeat_interleave(2 * part.shape[1])
        plus, minus = margins(ask(queries), labels).view(len(x), 2, -1).unbind(1)
        total += torch.einsum("bn,bnd->bd", (plus - minus).nan_to_num(-1.0, 1.0, -1.0), part)
    return (total / (2 * delta * samples)).view_as(x)
