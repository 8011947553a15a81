"""Square Attack: random search over square windows, without gradients.

Source: Andriushchenko et al. 2020, arXiv 1912.00049: algorithm 1, with the start and the windows of
algorithm 2 (linf, section 3.3) and of algorithm 3 (l2, section 3.4). A proposal replaces the best point where
the margin J = z_y - max_{j != y} z_j falls. All points lie on the surface of the ball, before they are cut to
the box:

    linf:  start: vertical stripes of x +- eps.
           proposal: in a square window, every channel is x + eps or x - eps.
    l2:    start: a grid of tiles, each with two bumps of opposite sign.
           proposal: two bumps are added in one window, with the norm that a second window gives up.

Every row draws its own windows and signs, keyed by restart and query: what it draws depends neither on the
batch nor on ``queries``, so that a search with fewer queries is the beginning of a longer one (not with
``rescale_schedule``).

Deviations. (1) A proposal that is equal to the best point, since the window has these values already, uses up
its query without a forward pass: its margin is known. (2) Margins are those of the search form; a row ends at
its first point that the reference form misclassifies too. (3) A row that is still robust after a search in
bfloat16 is searched a second time, in the reference form and with the same draws, where its margin is
`within_rounding`, where the two forms disagree about its label, or where their `margins_differ`, at x or at
its best point, see `to_search_again`. (4) In l2 the norm that cutting to the box has freed is given to the
next window; the ball's radius is kept by what a window may use, not by scaling the whole perturbation.

What the code of AutoAttack does otherwise. It draws one window for all rows of a batch. Its windows never
reach the last row and the last column of an image; here, as the paper says, all positions are equally likely.
It counts a margin of zero as success whatever the first of the equal labels is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import Stop, check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import (
    logit_range,
    margins_differ,
    to_search_again,
    within_rounding,
)
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

#: The share of the image that a window covers is halved after each of these queries of 10,000 (section 4).
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@torch.inference_mode(False)  # what the callers' tensors need elsewhere
def square(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    queries: int,
    restarts: int = 1,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    stop: Stop = "first-success",
) -> Candidates:
    """Attack by random search with margins alone, without gradients.

    Source: Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3; deviations: see the module.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        queries: proposals for each row and restart, after its start, at least 1.
        restarts: independent searches, at least 1; a row is searched again while it is robust.
        p_init: share of the image that the first windows cover, in (0, 1].
        rescale_schedule: shrink the windows over ``queries`` as the paper does over 10,000; otherwise they
            shrink after the paper's own numbers of queries.
        stop: ``first-success`` returns the first point that the reference form misclassifies; ``never`` goes
            on and returns the point of lowest margin.

    Returns:
        Candidates inside the ball and the box. ``steps`` is the query within its restart that found the
        point, 0 the start; ``forwards`` counts the passes that were made, fewer than the queries.
        ``searched_again`` is set for bfloat16 only.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: ``queries`` or ``restarts`` below 1, ``p_init`` outside (0, 1], or images or labels that
            `check_inputs` refuses.
    """
    check_inputs(classifier, x, y)
    if queries < 1 or restarts < 1:
        raise ValueError(f"at least one query and one restart, got {queries} and {restarts}")
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init {p_init}: the share of the image that a window covers lies in (0, 1]")
    candidates = Candidates.start(x)
    if len(x) == 0:
        return candidates
    noise = noise or Noise.for_rows(len(x), device=x.device)
    height, width = x.shape[2:]
    sides = window_sides(threat.norm, queries, height, width, p_init, rescale=rescale_schedule).to(x.device)
    bumps = bump_table(int(sides.max())).to(x.device) if threat.norm == "l2" else None

    # One entry for each row; the candidates hold the best image of all restarts.
    lowest = x.new_full((len(x),), torch.inf)  # its margin
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    chosen = torch.ones_like(broken)  # rows to search
    two_searches = classifier.precision == "bf16"

    for reference in (False, True) if two_searches else (False,):  # the form that is queried
        if reference:
            chosen = _compare_precisions(classifier, x, y, candidates, broken, lowest)
        ask = classifier.logits if reference else classifier.search_logits

        # The search of each row: best point of this restart, its margin and its query; queries used up.
        current, margin = x.clone(memory_format=torch.contiguous_format), torch.full_like(lowest, torch.inf)
        found, query, restart = torch.zeros((3, len(x)), dtype=torch.int64, device=x.device)
        active = ActiveSet(len(x), classifier.batch_size, x.device, among=chosen)
        for rows in active:
            # Starts and proposals side by side; a proposal that changes nothing is not evaluated.
            here, numbers, streams = current[rows], query[rows], (restart[rows] << 32) + query[rows]
            starts = numbers == 0
            side = sides[(numbers - 1).clamp_min(0)]
            if bumps is None:
                changed = propose_linf(here, x[rows], threat, noise[rows], streams, side)
            else:
                changed = propose_l2(here, x[rows], threat, noise[rows], streams, side, bumps)
            if bool(starts.any()):
                here[starts] = start(x[rows[starts]], threat, noise[rows[starts]], streams[starts])
                margin[rows[starts]] = torch.inf
                changed |= starts
            asked, images = rows, here
            if not bool(changed.all()):
                asked, images, numbers = rows[changed], here[changed], numbers[changed]
            labels = y[asked]
            logits = ask(images)
            candidates.forwards[asked] += 1

            # Keep what lowers the margin, or loses the label on the boundary.
            value, hit = margins(logits, labels), misclassified(logits, labels)
            better = (value < margin[asked]) | (hit & (margin[asked] >= 0))
            kept = asked[better]
            current[kept], margin[kept], found[kept] = images[better], value[better], numbers[better]
            query[rows] += 1

            # Success is decided in the reference form.
            if stop == "first-success":
                hit &= better
                claimed = asked[hit]
                if len(claimed):
                    points = threat.project(x[claimed], images[hit])
                    lost = misclassified(classifier.logits(points), y[claimed])
                    candidates.forwards[claimed] += 1
                    success = claimed[lost]
                    candidates.x_adv[success], candidates.steps[success] = points[lost], found[success]
                    broken[success] = True
                    active.drop(success)

            # A restart ends: its point counts if it is better than those of the restarts before.
            ended = rows[(query[rows] > queries) & ~broken[rows]]
            if len(ended):
                best = ended[margin[ended] < lowest[ended]]
                candidates.x_adv[best] = threat.project(x[best], current[best])
                candidates.steps[best], lowest[best] = found[best], margin[best]
                query[ended] = 0
                restart[ended] += 1
                active.drop(ended[restart[ended] >= restarts])
    return candidates


def _compare_precisions(
    classifier: Classifier, x: Tensor, y: Tensor, candidates: Candidates, broken: Tensor, lowest: Tensor
) -> Tensor:
    """Compare bfloat16 and float32 at the images and at the best points of rows that are not broken yet.

    Args:
        classifier: the model, which searches in bfloat16.
        x: images, float32 (B,C,H,W).
        y: labels, int64 (B,).
        candidates: best points; ``forwards`` and ``searched_again`` are updated.
        broken: rows that are adversarial in float32, bool (B,).
        lowest: margin of the best points, float32 (B,); replaced by that in float32.

    Returns:
        Rows to search again, bool (B,).
    """
    differ, uncertain = torch.zeros_like(broken), torch.zeros_like(broken)
    still_robust = ~broken
    for rows in torch.split(still_robust.nonzero().squeeze(1), classifier.batch_size):
        labels, points = y[rows], candidates.x_adv[rows]
        clean, exact = classifier.logits(x[rows]), classifier.logits(points)
        searched = classifier.search_logits(points)
        scale = logit_range(clean)
        differ[rows] = margins_differ(classifier.search_logits(x[rows]), clean, labels, scale)
        differ[rows] |= margins_differ(searched, exact, labels, scale)
        lowest[rows] = margins(exact, labels)
        robust = ~misclassified(exact, labels)
        uncertain[rows] = robust & (within_rounding(lowest[rows], exact) | misclassified(searched, labels))
        still_robust[rows] = robust
        candidates.forwards[rows] += 4
    candidates.searched_again = to_search_again(differ, still_robust)
    return uncertain | candidates.searched_again


def window_sides(norm: str, queries: int, height: int, width: int, p_init: float, *, rescale: bool) -> Tensor:
    """Side of the window in pixels at each query, int64 (queries,).

    Source: section 4 of the paper: the share p of the image is halved at `HALVED_AFTER`, the side is the
    rounded root of p * height * width; in l2 it is odd and at least 3.

    Args:
        norm: ``linf`` or ``l2``.
        queries: number of queries.
        height: of the images, in pixels.
        width: of the images, in pixels. The window never exceeds the smaller of both.
        p_init: share of the first windows.
        rescale: whether the schedule is stretched or shrunk from 10,000 queries to this number.
    """
    smallest, largest = 1, min(height, width)
    if norm == "l2":
        smallest, largest = 3, largest - (largest + 1) % 2
    sides = []
    for query in range(queries):
        number = query * 10_000 // queries if rescale else query
        share = p_init / 2 ** sum(number > after for after in HALVED_AFTER)
        side = max(round(math.sqrt(share * height * width)), smallest)
        if norm == "l2":
            side += (side + 1) % 2
        sides.append(min(side, max(largest, 1)))
    return torch.tensor(sides, dtype=torch.int64)


def bumps_of_opposite_sign(side: int) -> Tensor:
    """The perturbation eta of l2 windows, two bumps one above the other, of norm 1; float32 (side, side).

    Source: section 3.4 of the paper, Eq. 2. A bump of n = height // 2 rings falls off from its centre:
    at Chebyshev distance d it is the sum of 1 / k^2 for k = d + 1, ..., n + 1, n for the longer side.

    Args:
        side: of the window in pixels, at least 1.
    """

    def bump(height: int) -> Tensor:
        rings = max(height, side) // 2 + 1
        down = (torch.arange(height) - height // 2).abs()[:, None]
        across = (torch.arange(side) - side // 2).abs()[None]
        terms = torch.arange(1, rings + 1, dtype=torch.float64).pow(-2)
        sums = terms.flip(0).cumsum(0).flip(0)
        return sums[torch.maximum(down, across)]

    both = torch.cat((bump(side // 2), -bump(side - side // 2)))
    return (both / both.square().sum().sqrt()).float()


def bump_table(largest: int) -> Tensor:
    """`bumps_of_opposite_sign` of every side up to ``largest``, float32 (largest + 1, largest, largest)."""
    table = torch.zeros((largest + 1, largest, largest))
    for side in range(1, largest + 1):
        table[side, :side, :side] = bumps_of_opposite_sign(side)
    return table


def start(x: Tensor, threat: ThreatModel, noise: Noise, stream: Tensor) -> Tensor:
    """First point of a search, shape of ``x``.

    Source: sections 3.3 (linf: vertical stripes, one sign for each channel and column) and 3.4 (l2: a grid of
    square tiles with bumps, upright or on their side, one sign for each channel).

    Args:
        x: images, float32 (B,C,H,W) in [0, 1].
        threat: norm and eps.
        noise: random streams of the rows.
        stream: number of the draw, int64 (B,).
    """
    channels, height, width = x.shape[1:]
    if threat.norm == "linf":
        return threat.project(x, x + threat.radius * noise.signs((channels, 1, width), stream))
    # Tiles of a fifth of the image; what remains at the edges is left alone.
    tile = max(min(height, width) // 5, 1)
    down, across = height // tile, width // tile
    signs = noise.signs((channels + 1, down, across), stream)[..., None, None]
    upright = bumps_of_opposite_sign(tile).to(x.device)
    tiles = (
        torch.where(signs[:, :1] > 0, upright, upright.T) * signs[:, 1:]
    )  # (B, C, down, across, tile, tile)
    grid = tiles.transpose(3, 4).reshape(len(x), channels, down * tile, across * tile)
    top, left = (height - down * tile) // 2, (width - across * tile) // 2
    delta = functional.pad(grid, (left, width - left - across * tile, top, height - top - down * tile))
    return threat.project(x, x + threat.radius * threat.steepest(delta))


def propose_linf(
    here: Tensor, x: Tensor, threat: ThreatModel, noise: Noise, stream: Tensor, side: Tensor
) -> Tensor:
    """Move a window of each row by 2 eps, one sign for each channel, and cut it to the ball and the box.

    Source: algorithm 2 of the paper. Arguments are those of `propose_l2`.
    """
    draws = noise.uniform((2 + x.shape[1],), stream)
    pixels, _ = _window(draws[:, :2], side, x)
    new = here.view(*x.shape[:2], -1)
    old = new.gather(2, pixels)
    shift = torch.where(draws[:, 2:, None] < 0.5, -2 * threat.radius, 2 * threat.radius)
    moved = threat.project(x.flatten(2).gather(2, pixels), old + shift)
    new.scatter_(2, pixels, moved)
    return (moved != old).flatten(1).any(1)


def propose_l2(
    here: Tensor,
    x: Tensor,
    threat: ThreatModel,
    noise: Noise,
    stream: Tensor,
    side: Tensor,
    bumps: Tensor,
) -> Tensor:
    """Add bumps in one window of each row, with the norm that another window gives up.

    Source: algorithm 3 of the paper. In every channel alone, the first window gets the direction of its
    perturbation plus bumps, each of norm 1; the second window gets no perturbation. The norm of both, and an
    equal share of what is left of eps, goes to the first window.

    Args:
        here: best points, float32 (B,C,H,W), contiguous; overwritten by the proposals.
        x: images, float32 (B,C,H,W) in [0, 1].
        threat: norm and eps.
        noise: random streams of the rows.
        stream: number of the draw, int64 (B,).
        side: of the windows in pixels, int64 (B,).
        bumps: of every side, see `bump_table`.

    Returns:
        Whether the proposal is another point, bool (B,).
    """
    channels = x.shape[1]
    draws = noise.uniform((5 + channels,), stream)
    first, (top, left) = _window(draws[:, :2], side, x)
    second, _ = _window(draws[:, 2:4], side, x)
    new, images = here.view(*x.shape[:2], -1), x.flatten(2)
    unused = threat.radius**2 - functional.mse_loss(new, images, reduction="none").sum((1, 2))[:, None]
    first_x, second_x = images.gather(2, first), images.gather(2, second)
    first_before, second_before = new.gather(2, first), new.gather(2, second)

    # Which entries of the windows count: no pixel twice.
    step = torch.arange(int(side.max()), device=x.device)
    inside = step < side[:, None]
    inside = (inside[:, :, None] & inside[:, None, :]).flatten(1)[:, None]
    row, column = second // x.shape[3], second % x.shape[3]
    top, left, end = top[:, None, None], left[:, None, None], side[:, None, None]
    shared = (row >= top) & (row < top + end) & (column >= left) & (column < left + end)
    old = first_before - first_x
    squares = (old.square() * inside).sum(2)
    given = ((second_before - second_x).square() * (inside & ~shared)).sum(2)

    near = torch.minimum(step, side[:, None] - 1)
    upright = (draws[:, 4] < 0.5)[:, None, None]
    down, across = near[:, :, None], near[:, None, :]
    eta = bumps[side[:, None, None], torch.where(upright, down, across), torch.where(upright, across, down)]
    signs = torch.where(draws[:, 5:, None] < 0.5, -1.0, 1.0)
    direction = eta.flatten(1)[:, None] * signs + old / squares.sqrt().clamp_min(1e-12)[:, :, None]
    length = (direction.square() * inside).sum(2).sqrt().clamp_min(1e-12)
    available = (squares + given + unused / channels).clamp_min(0).sqrt()
    moved = direction * (available / length)[:, :, None]

    after = (first_x + moved).clamp(0, 1)
    new.scatter_(2, second, second_x)
    new.scatter_(2, first, after)
    return (after != first_before).flatten(1).any(1) | ((second_before != second_x) & ~shared).flatten(1).any(
        1
    )


def _window(draws: Tensor, side: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Square windows at uniform positions.

    Args:
        draws: uniform on [0, 1), float32 (B, 2).
        side: in pixels, int64 (B,).
        x: images (B,C,H,W).

    Returns:
        Pixels as indices of flattened images, int64 (B,C,S*S), S the largest side: smaller windows repeat
        their last row and column. And top and left, int64 (B,).
    """
    height, width = x.shape[2:]
    room = torch.stack((height + 1 - side, width + 1 - side), 1)
    top, left = (draws.double() * room).long().unbind(1)
    near = torch.minimum(torch.arange(int(side.max()), device=x.device), side[:, None] - 1)
    pixels = (top[:, None] + near)[:, :, None] * width + (left[:, None] + near)[:, None, :]
    return pixels.flatten(1)[:, None].expand(-1, x.shape[1], -1), (top, left)
