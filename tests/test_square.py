"""Square Attack: one proposal against plain loops, closed forms, any batch the same, and the library."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from made import Wrapped, images
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, pgd, square
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.square import (
    bump_table,
    bumps_of_opposite_sign,
    propose_l2,
    propose_linf,
    start,
    window_sides,
)
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

NORMS = ("linf", "l2")
both_norms = pytest.mark.parametrize("norm", NORMS)
SHAPES = [(1, 8, 8), (3, 9, 6), (2, 4, 7)]


def ball(norm: str, radius: float) -> ThreatModel:
    return ThreatModel(norm, Fraction(float(radius)))


class Weighted(nn.Module):
    """Logits (margin + <weight, x - 1/2>, 0), summed row by row in float64: no row depends on its batch."""

    def __init__(self, weight: torch.Tensor, margin: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.double())
        self.margin = margin
        self.passes = 0

    def forward(self, x):
        self.passes += len(x)
        rows = [(image * self.weight).sum() for image in (x.double() - 0.5)]
        margin = self.margin + torch.stack(rows)
        return torch.stack((margin, torch.zeros_like(margin)), 1)


def weighted(weight: torch.Tensor, margin: float, **options) -> Classifier:
    options = {"num_classes": 2, "input_shape": tuple(weight.shape), "batch_size": 64} | options
    return Classifier(Weighted(weight, margin), **options)


def grey(n: int, shape) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n, *shape), 0.5), torch.zeros(n, dtype=torch.int64)


def broken(classifier, x, y, candidates) -> torch.Tensor:
    return misclassified(classifier.logits(candidates.x_adv), y)


# --- closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner", [(0, 0, 0), (2, 5, 6), (1, 0, 6), (0, 5, 0)])
def test_one_pixel_decides_wherever_it_is(corner):
    """The start has its sign in half of the rows; the others need a window that reaches it."""
    weight = torch.zeros(3, 6, 7)
    weight[corner] = 2.0
    classifier, (x, y) = weighted(weight, 0.2), grey(16, (3, 6, 7))
    assert broken(classifier, x, y, square(classifier, x, y, threat=ball("linf", 0.1002), queries=400)).all()
    found = square(classifier, x, y, threat=ball("linf", 0.0998), queries=400)
    assert not broken(classifier, x, y, found).any()
    lowest = margins(classifier.logits(found.x_adv), y)  # all got there, and nobody past it
    torch.testing.assert_close(lowest, torch.full((16,), 0.2 - 2 * 0.0998), rtol=0, atol=1e-6)


def test_one_channel_decides():
    weight = torch.zeros(3, 8, 8)
    weight[1] = -1.0
    classifier, (x, y) = weighted(weight, 6.4), grey(4, (3, 8, 8))
    for eps, expected in ((0.101, True), (0.099, False)):
        found = square(classifier, x, y, threat=ball("linf", eps), queries=1000)
        assert (broken(classifier, x, y, found) == expected).all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_l2_brackets_the_radius_where_the_boundary_is_a_sum_of_bumps(turned, channels):
    """Every accepted window adds bumps to what is there and halves the angle to them: the exact radius."""
    bumps = bumps_of_opposite_sign(3)
    signs = torch.tensor([1.0, -1.0, -1.0])[:channels, None, None]
    weight = signs * (bumps.T if turned else bumps)
    classifier, (x, y) = weighted(weight, 0.2), grey(6, weight.shape)
    radius = 0.2 / weight.norm().item()
    above, below = ball("l2", radius * 1.002), ball("l2", radius * 0.998)
    assert broken(classifier, x, y, square(classifier, x, y, threat=above, queries=400)).all()
    assert not broken(classifier, x, y, square(classifier, x, y, threat=below, queries=400)).any()


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([1.0, 0.0]).expand(len(x), -1)


@both_norms
def test_a_constant_network_is_never_broken(norm):
    classifier = Classifier(Constant(), num_classes=2, input_shape=(3, 8, 8))
    x, y = images(5, (3, 8, 8)), torch.zeros(5, dtype=torch.int64)
    found = square(classifier, x, y, threat=ball(norm, 0.3), queries=50, restarts=2)
    assert not broken(classifier, x, y, found).any()
    assert found.steps.tolist() == [0] * 5  # nothing lowers the margin of the start
    assert (found.forwards <= 102).all()
    assert ball(norm, 0.3).contains(x, found.x_adv).all()


class Broken(nn.Module):
    def forward(self, x):
        return torch.stack((x.mean((1, 2, 3)), torch.full((len(x),), torch.nan)), 1)


def test_a_network_without_finite_logits_is_broken_by_the_start():
    classifier = Classifier(Broken(), num_classes=2, input_shape=(1, 8, 8))
    x, y = images(3, (1, 8, 8)), torch.zeros(3, dtype=torch.int64)
    found = square(classifier, x, y, threat=ball("linf", 0.1), queries=5)
    assert (found.steps.tolist(), found.forwards.tolist()) == ([0] * 3, [2] * 3)


class Steps(Wrapped):
    """Rounds its input to six grey levels: no gradient anywhere."""

    def forward(self, x):
        return self.net(torch.round(x * 5) / 5)


def test_no_gradient_is_needed(digits_net, digits_test):
    x, y = digits_test[0][:40], digits_test[1][:40]
    classifier = Classifier(Steps(digits_net), num_classes=10, input_shape=(1, 8, 8))
    threat = ball("linf", 0.15)
    followed = pgd(classifier, x, y, threat=threat, steps=20, step_size=0.03, random_start=False)
    found = square(classifier, x, y, threat=threat, queries=200)
    assert found.backwards.sum() == 0
    assert broken(classifier, x, y, found).sum() > broken(classifier, x, y, followed).sum() + 8


# --- one proposal ------------------------------------------------------------------------------------


def proposal(norm, here, x, threat, noise, stream, side):
    """The vectorised proposal, from a copy, and whether it is another point."""
    there = here.clone()
    if norm == "linf":
        changed = propose_linf(there, x, threat, noise, stream, side)
    else:
        changed = propose_l2(there, x, threat, noise, stream, side, bump_table(side))
    return there, changed


def windows(noise, stream, row, side, shape, count):
    """Corners of the windows and the draws after them, in plain Python."""
    channels, height, width = shape
    u = noise.uniform((2 * count + (count > 1) + channels,), stream)[row].double().tolist()
    room = height - side + 1, width - side + 1
    return [(int(u[2 * k] * room[0]), int(u[2 * k + 1] * room[1])) for k in range(count)], u[2 * count :]


def plain_linf(here, x, eps, side, corner, u):
    out = here.double().clone()
    for c in range(x.shape[0]):
        sign = 1 if u[c] >= 0.5 else -1
        for r, s in itertools.product(range(side), range(side)):
            at = c, corner[0] + r, corner[1] + s
            near, centre = float(here[at]) + 2 * eps * sign, float(x[at])
            out[at] = min(max(min(max(near, centre - eps), centre + eps), 0.0), 1.0)
    return out


def plain_eta(side):
    """Eq. 2 of the paper, with its indices from 1."""

    def bump(h1, h2, r, s):
        n = max(h1, h2) // 2
        rings = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(rings + 1))

    k = side // 2
    eta = np.zeros((side, side))
    for r, s in itertools.product(range(side), range(side)):
        eta[r, s] = bump(k, side, r + 1, s + 1) if r < k else -bump(side - k, side, r - k + 1, s + 1)
    for half in (eta[:k], eta[k:]):
        half /= np.sqrt((half**2).sum())
    return eta / np.sqrt((eta**2).sum())


def plain_l2(here, x, eps, side, corners, u):
    """Algorithm 3 in float64: the perturbation before the box, and the two windows."""
    nu = (here.double() - x.double()).numpy()
    first, second = (np.zeros(nu.shape[1:], bool) for _ in range(2))
    for mask, (top, left) in zip((first, second), corners, strict=True):
        mask[top : top + side, left : left + side] = True
    unused = eps**2 - (nu**2).sum()
    eta = plain_eta(side) if u[0] < 0.5 else plain_eta(side).T
    out = nu.copy()
    for c in range(len(nu)):
        inside = nu[c][first]
        direction = (1 if u[1 + c] >= 0.5 else -1) * eta.ravel() + inside / max(
            np.sqrt((inside**2).sum()), 1e-12
        )
        available = math.sqrt(max((nu[c][first | second] ** 2).sum() + unused / len(nu), 0))
        out[c][second] = 0
        out[c][first] = direction / max(np.sqrt((direction**2).sum()), 1e-12) * available
    return out, first, second


def walk(norm, shape, x, threat, noise, steps, side):
    """A point some proposals away from the start."""
    here = start(x, threat, noise, torch.zeros(len(x), dtype=torch.int64))
    for step in range(1, steps + 1):
        here, _ = proposal(norm, here, x, threat, noise, torch.full((len(x),), step), side)
    return here


@both_norms
@pytest.mark.parametrize("shape", SHAPES)
def test_a_proposal_is_that_of_plain_loops(norm, shape):
    """Rows of different sides and streams, side by side, among them pixels at the box."""
    n, threat = 12, ball(norm, 0.07 if norm == "linf" else 0.6)
    x, noise = images(n, shape, seed=3), Noise.for_rows(n)
    largest = min(shape[1:])
    side = torch.tensor([3, 1, largest, 3, 2, 3] * 2) if norm == "linf" else torch.tensor([3, 1, 3] * 4)
    here = walk(norm, shape, x, threat, noise, 4, side)
    stream = torch.arange(n) * 7 + 11
    there, changed = proposal(norm, here, x, threat, noise, stream, side)
    assert torch.equal(changed, (there != here).flatten(1).any(1))
    for row in range(n):
        size = int(side[row])
        if norm == "linf":
            (corner,), u = windows(noise, stream, row, size, shape, 1)
            expected = plain_linf(here[row], x[row], threat.radius, size, corner, u)
        else:
            corners, u = windows(noise, stream, row, size, shape, 2)
            nu, first, second = plain_l2(here[row], x[row], threat.radius, size, corners, u)
            expected = (x[row].double() + torch.from_numpy(nu)).clamp(0, 1)
            kept = torch.from_numpy(~(first | second))
            assert torch.equal(there[row][:, kept], here[row][:, kept])
            given_up = torch.from_numpy(second & ~first)
            assert torch.equal(there[row][:, given_up], x[row][:, given_up])
        torch.testing.assert_close(there[row].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_l2_proposals_stay_on_the_sphere_and_keep_the_norm_of_every_channel(shape):
    """Away from the box nothing is lost: one window gets exactly what the other gives up."""
    n, threat, side = 10, ball("l2", 0.1), torch.full((10,), 3)
    x, noise = images(n, shape, low=0.4, high=0.6), Noise.for_rows(n)
    here = walk("l2", shape, x, threat, noise, 3, side)
    for step in range(20):
        there, changed = proposal("l2", here, x, threat, noise, torch.full((n,), 100 + step), side)
        assert changed.float().mean() > 0.7  # a window may be all bumps already
        torch.testing.assert_close(threat.distance(x, there), torch.full((n,), 0.1), rtol=1e-5, atol=0)
        before, after = ((point - x).double().square().sum((2, 3)) for point in (here, there))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-7)
        here = there


def test_l2_gives_what_the_box_has_cut_to_the_next_window():
    x = images(8, (3, 8, 8)).round()  # black and white: half of every start is cut off
    threat, noise, side = ball("l2", 0.5), Noise.for_rows(8), torch.full((8,), 5)
    here = walk("l2", (3, 8, 8), x, threat, noise, 0, side)
    assert (threat.distance(x, here) < 0.45).all()
    for step in range(30):
        here, _ = proposal("l2", here, x, threat, noise, torch.full((8,), 1 + step), side)
        assert threat.contains(x, here).all()
    assert threat.distance(x, here).mean() > 0.3


def test_windows_take_every_position_equally_often():
    x, side = torch.full((4000, 1, 6, 5), 0.5), torch.full((4000,), 3)
    there = torch.zeros_like(x)
    propose_linf(there, x, ball("linf", 0.1), Noise.for_rows(4000), torch.ones(4000, dtype=torch.int64), side)
    corners = (there != 0).flatten(1).float().argmax(1)  # of zeros, each proposal raises its window
    counts = torch.bincount(corners, minlength=30).view(6, 5)
    assert (counts > 0).nonzero().tolist() == [[r, c] for r in range(4) for c in range(3)]
    expected = 4000 / 12
    assert ((counts[:4, :3] - expected) ** 2 / expected).sum() < 31.3  # chi-squared, 11 degrees, p = 0.001


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 6), (2, 4, 7), (1, 1, 2)])
def test_starts(shape):
    n = 64
    x, noise, stream = torch.full((n, *shape), 0.5), Noise.for_rows(n), torch.arange(n)
    stripes = start(x, ball("linf", 0.1), noise, stream) - x
    assert (stripes.abs() - 0.1).abs().max() < 1e-6
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    share = (stripes[:, :, 0] > 0).float().mean(0)
    assert 0.2 < share.min() <= share.max() < 0.8  # columns and channels have signs of their own
    tiles = start(x, ball("l2", 0.1), noise, stream) - x
    torch.testing.assert_close(tiles.flatten(1).norm(dim=1), torch.full((n,), 0.1), rtol=0, atol=3e-6)
    size = max(min(shape[1:]) // 5, 1)
    down, across = shape[1] // size, shape[2] // size
    top, left = (shape[1] - down * size) // 2, (shape[2] - across * size) // 2
    eta = plain_eta(size) * 0.1 / math.sqrt(shape[0] * down * across)
    for row, r, s in itertools.product(range(4), range(down), range(across)):
        tile = tiles[row, :, top + r * size :, left + s * size :][:, :size, :size].numpy()
        ways = [all(min(abs(t - e).max(), abs(t + e).max()) < 1e-6 for t in tile) for e in (eta, eta.T)]
        assert any(ways)


# --- schedule and bumps, against the library's code ---------------------------------------------------


def library(norm, **options):
    from pyautoattack.square import SquareAttack

    class AllPositions(SquareAttack):
        """The library never draws the last position, see the module; here it does."""

        def random_int(self, low=0, high=1, shape=(1,)):
            return super().random_int(low, high + 1, list(shape))

    return AllPositions(None, **{"norm": {"linf": "Linf", "l2": "L2"}[norm], "device": "cpu"} | options)


def test_sides_of_the_paper():
    sides = window_sides("linf", 5000, 32, 32, 0.8, rescale=False)
    firsts = [0, 11, 51, 201, 501, 1001, 2001, 4001]
    assert sides[firsts].tolist() == [29, 20, 14, 10, 7, 5, 4, 3]
    assert [i for i in range(5000) if i == 0 or sides[i] != sides[i - 1]] == firsts
    odd = window_sides("l2", 5000, 32, 32, 0.8, rescale=False)
    assert odd[firsts].tolist() == [29, 21, 15, 11, 7, 5, 5, 3]
    assert set(window_sides("l2", 9, 8, 20, 1.0, rescale=False).tolist()) == {7}  # odd, and it fits
    assert window_sides("l2", 9, 2, 9, 1.0, rescale=False).tolist() == [1] * 9


@both_norms
@pytest.mark.parametrize(("queries", "rescale"), [(10_000, False), (5000, True), (777, True), (777, False)])
def test_sides_are_those_of_the_library(norm, queries, rescale):
    peer = library(norm, n_queries=queries, p_init=0.3, resc_schedule=rescale)
    ours = window_sides(norm, queries, 32, 32, 0.3, rescale=rescale).tolist()
    for query in range(queries):
        side = max(round(math.sqrt(peer.p_selection(query) * 1024)), 1 if norm == "linf" else 3)
        assert ours[query] == side + (norm == "l2" and side % 2 == 0)


@pytest.mark.parametrize("side", range(1, 30))
def test_bumps_are_those_of_the_paper_and_of_the_library(side):
    ours = bumps_of_opposite_sign(side)
    np.testing.assert_allclose(ours, plain_eta(side), rtol=0, atol=1e-6)
    peer = library("l2").eta(side)
    assert min((ours - peer).abs().max(), (ours.T - peer).abs().max()) < 1e-6


# --- the search --------------------------------------------------------------------------------------


def scene(n=10, shape=(2, 6, 6)):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator)
    x = images(n, shape, seed=1)
    return weighted(weight, 2.0), x, torch.zeros(n, dtype=torch.int64)


@both_norms
def test_fewer_queries_are_the_beginning_of_more_and_margins_only_fall(norm):
    classifier, x, y = scene()
    threat = ball(norm, 0.1 if norm == "linf" else 0.7)
    before = None
    for queries in (1, 2, 5, 11, 12, 40, 120):
        found = square(classifier, x, y, threat=threat, queries=queries, stop="never")
        value = margins(classifier.logits(found.x_adv), y)
        if before is not None:
            margin, steps, points, last = before
            later = found.steps > last
            assert torch.equal(found.x_adv[~later], points[~later])
            assert torch.equal(found.steps[~later], steps[~later])
            assert (value[later] < margin[later]).all()
        before = value, found.steps, found.x_adv, queries
    assert later.any()


@both_norms
@pytest.mark.parametrize("stop", ["first-success", "never"])
def test_batches_order_and_layout_change_nothing_at_all(norm, stop):
    classifier, x, y = scene()
    options = {
        "threat": ball(norm, 0.1 if norm == "linf" else 0.7),
        "queries": 60,
        "restarts": 2,
        "stop": stop,
    }
    noise = Noise.for_rows(len(x))
    whole = square(classifier, x, y, noise=noise, **options)
    assert stop == "never" or 0 < broken(classifier, x, y, whole).sum() < len(x)
    order = torch.randperm(len(x))
    for batch_size in (1, 3):
        classifier.batch_size = batch_size
        shuffled = x[order].contiguous(memory_format=torch.channels_last)
        other = square(classifier, shuffled, y[order], noise=noise[order], **options)
        for field in ("x_adv", "steps", "forwards"):
            assert torch.equal(getattr(other, field), getattr(whole, field)[order]), field


@both_norms
def test_every_row_has_windows_of_its_own(norm):
    classifier, x, y = scene()
    x = x[:1].expand_as(x)
    found = square(classifier, x, y, threat=ball(norm, 0.01), queries=10)
    for one, two in itertools.combinations(found.x_adv, 2):
        assert not torch.equal(one, two)


@both_norms
def test_proposals_that_change_nothing_are_not_evaluated_and_nothing_is_missed(norm, monkeypatch):
    module = __import__("sys").modules["robustbench_cure.attacks.square"]
    weight = torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(0))
    classifier, (x, y) = weighted(weight, 5.0), grey(8, (1, 4, 4))
    options = {"threat": ball(norm, 0.1), "queries": 600}
    skipped = square(classifier, x, y, **options)
    name = f"propose_{norm}"
    original = getattr(module, name)

    def always(*arguments):
        return torch.ones_like(original(*arguments))

    monkeypatch.setattr(module, name, always)
    evaluated = square(classifier, x, y, **options)
    assert torch.equal(skipped.x_adv, evaluated.x_adv)
    assert torch.equal(skipped.steps, evaluated.steps)
    assert evaluated.forwards.tolist() == [601] * 8
    if norm == "linf":  # single pixels of one channel: half of the proposals are there already
        assert (skipped.forwards < 500).all()


def test_the_best_restart_is_kept_and_none_follows_a_success():
    classifier, x, y = scene()
    options = {"threat": ball("linf", 0.06), "queries": 15}
    runs = [square(classifier, x, y, restarts=k, **options) for k in (1, 2, 6)]
    values = [margins(classifier.logits(run.x_adv), y) for run in runs]
    for (few, more), (low, lower) in zip(itertools.pairwise(runs), itertools.pairwise(values), strict=True):
        assert (lower <= low).all()
        assert (lower < low).any()
        won = low < 0
        assert torch.equal(few.x_adv[won], more.x_adv[won])
        assert torch.equal(few.forwards[won], more.forwards[won])
        assert (more.forwards[~won] > few.forwards[~won]).all()
    assert 0 < (values[-1] < 0).sum() < len(x)


@both_norms
def test_passes_are_counted_for_the_row_they_are_made_for(norm):
    classifier, x, y = scene()
    options = {"threat": ball(norm, 0.1 if norm == "linf" else 0.7), "queries": 40}
    together = square(classifier, x, y, **options)
    noise = Noise.for_rows(len(x))
    for row in range(len(x)):
        one, before = torch.tensor([row]), classifier.module.passes + classifier._search.passes
        if classifier._search is classifier.module:
            before //= 2
        square(classifier, x[one], y[one], noise=noise[one], **options)
        after = classifier.module.passes + classifier._search.passes
        if classifier._search is classifier.module:
            after //= 2
        assert after - before == together.forwards[row]


def test_success_is_what_the_reference_form_says():
    """The search form claims every point; the reference form agrees below the true margin alone."""
    classifier, x, y = scene()
    truth = classifier.module

    class Claims(nn.Module):
        def forward(self, images):
            return truth(images) - torch.tensor([100.0, 0.0])

    classifier._search = Claims()
    found = square(classifier, x, y, threat=ball("linf", 0.1), queries=60)
    lost = broken(classifier, x, y, found)
    assert 0 < lost.sum() < len(x)
    assert (found.steps[lost] > 0).any()


@pytest.mark.parametrize("stop", ["first-success", "never"])
def test_rows_that_bfloat16_cannot_decide_are_searched_again(stop):
    """Slopes that bfloat16 rounds away: the second search finds what a search in float32 finds."""

    class TooFine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.ones(2, 64)
            weight[1] += 2.0**-10
            self.weight = nn.Parameter(weight)  # by hand: a last layer would be left in float32
            self.bias = nn.Parameter(torch.tensor([2.0**-10 * 64 * (0.5 + 0.07), 0.0]))

        def forward(self, images):
            return nn.functional.linear(images.flatten(1), self.weight, self.bias)

    x, y = grey(4, (1, 8, 8))
    x[2:] -= 0.2  # margins that the ball cannot reach
    verdicts = {}
    for precision in ("fp32", "bf16"):
        classifier = Classifier(TooFine(), num_classes=2, input_shape=(1, 8, 8), precision=precision)
        assert classifier.precision == precision
        found = square(classifier, x, y, threat=ball("linf", 0.1), queries=300, stop=stop)
        verdicts[precision] = broken(classifier, x, y, found).tolist()
        assert found.forwards.sum() + 4 == classifier.forwards
        if precision == "fp32":
            assert found.searched_again is None
    assert verdicts["fp32"] == verdicts["bf16"] == [True, True, False, False]


@pytest.mark.parametrize(
    "wrong",
    [{"queries": 0}, {"restarts": 0}, {"p_init": 0.0}, {"p_init": 1.1}, {"p_init": math.nan}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    classifier, x, y = scene()
    with pytest.raises(ValueError, match=r"at least one|p_init"):
        square(classifier, x, y, threat=ball("linf", 0.1), **{"queries": 5} | wrong)


# --- the library as an attack -------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@both_norms
def test_as_many_rows_stand_as_after_the_librarys_attack(norm):
    """Both draw at random: means over seeds agree within four standard errors."""
    data, seeds, queries = load_dataset("digits"), 2, 400
    x, y = data.images[:100], data.labels[:100]
    classifier = load_model("digits_pgd_at", precision="fp32")
    eps = Fraction(51, 255) if norm == "linf" else Fraction(1)
    threat = ThreatModel(norm, eps)
    many, labels = x.repeat(seeds, 1, 1, 1), y.repeat(seeds)
    classifier.batch_size = len(many)
    found = square(classifier, many, labels, threat=threat, queries=queries)
    ours = (~broken(classifier, many, labels, found)).view(seeds, -1).float()
    theirs = []
    for seed in range(seeds):
        peer = library(norm, eps=threat.radius, n_queries=queries, p_init=0.8, seed=seed, resc_schedule=False)
        peer.predict = classifier.module
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            theirs.append(classifier.module(peer.perturb(x, y)).argmax(1) == y)
    peers = torch.stack(theirs).float()
    # Rows that differ between seeds are what is random; the library's rows share their windows.
    spread = 2 * math.sqrt(float((ours[0] != ours[1]).float().mean()) / 2 * len(x) / seeds)
    difference = float(ours.mean() - peers.mean()) * len(x)
    assert 0.1 < ours.mean() < 0.9
    assert abs(difference) < 4 * spread + 1, (ours.mean(1), peers.mean(1))
