"""Paths inside regions and convexity, against half-spaces, annuli, islands and gaps of known width."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import made
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from robustbench_cure import files as kept
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli, main
from robustbench_cure.datasets import load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import connectivity
from robustbench_cure.geometry.connectivity import (
    Path,
    coarse_to_fine,
    draw_pairs,
    find_paths,
    inside,
    onto_region,
    other_class_pairs,
)
from robustbench_cure.geometry.convexity import labels_of, mixtures, same_class_images
from robustbench_cure.geometry.plane import normal_plane, path_section
from robustbench_cure.studies import connectivity as connectivity_study
from robustbench_cure.studies.engine import Study
from robustbench_cure.zoo.models import load_model

pytestmark = pytest.mark.usefixtures("svg_only")

SHAPE = (1, 1, 2)


def points(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, *SHAPE)


class Region(nn.Module):
    """Label 1 where f(x, y) > 0."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x):
        inner = self.f(x[:, 0, 0, 0], x[:, 0, 0, 1])
        return torch.stack((torch.zeros_like(inner), inner), 1)


def region(f, **options) -> Classifier:
    return Classifier(Region(f), num_classes=2, input_shape=SHAPE, **({"batch_size": 512} | options))


def annulus(x, y):
    return 0.25 - (torch.hypot(x, y) - 1.5) ** 2


def islands(x, y):
    """Two discs of radius 1 around (-2, 0) and (2, 0)."""
    return 1 - torch.minimum((x + 2) ** 2, (x - 2) ** 2) - y**2


def band(x, y):
    return 0.3 - (y - torch.sin(x)).abs()


def streams(n: int, seed: int = 0) -> Noise:
    return Noise.for_samples(seed, "connectivity", [str(row) for row in range(n)])


def along(path: torch.Tensor, step: float) -> np.ndarray:
    """Points on a polyline in float64, no farther apart than ``step``."""
    flat, out = path.flatten(1).double().numpy(), []
    for a, b in pairwise(flat):
        t = np.linspace(0, 1, max(2, math.ceil(np.linalg.norm(b - a) / step) + 1))[:, None]
        out.append((1 - t) * a + t * b)
    return np.concatenate(out)


# --- samples of a segment ----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3, 8, 1000])
def test_every_place_of_a_segment_is_looked_at_once_and_the_middle_first(pieces):
    order = coarse_to_fine(pieces)
    assert sorted(order.tolist()) == list(range(1, pieces))
    if pieces == 8:
        assert order.tolist() == [4, 2, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(("width", "seen"), [(1.05e-3, True), (2e-5, False)])
@pytest.mark.parametrize("place", [0.0007, 0.3337, 0.61803, 0.9986])
def test_a_gap_is_caught_if_it_is_wider_than_the_spacing_wherever_it_lies(width, place, seen):
    """Between 0 and 1; the gap lies off all coarse samples, and, where narrow, off the fine ones too."""
    middle = place if seen else round(place, 3) + 0.0005
    model = region(lambda x, y: (x - middle).abs() - width / 2)
    good = inside(model, points([0, 0]), points([1, 0]), torch.tensor([1]), torch.tensor([1e-3]).double())
    assert good.tolist() == [not seen]


def test_segments_are_judged_apart_and_by_their_own_labels_and_spacing():
    model = region(lambda x, y: (x - 0.50055).abs() - 4e-4)
    a, b = (
        points([0, 0], [0, 0], [0.6, 0], [0.5005, 0], [0.5005, 0]),
        points([1, 0], [1, 0], [1, 0], [0.5006, 1], [0.5006, 1]),
    )
    spacing = torch.tensor([5e-4, 1e-1, 1e-4, 1e-3, 1e-3]).double()
    labels = torch.tensor([1, 1, 1, 0, 1])
    assert inside(model, a, b, labels, spacing).tolist() == [False, True, True, True, False]


def test_a_segment_is_given_up_at_its_first_sample_outside():
    model = region(lambda x, y: (x - 0.5).abs() - 0.1)
    before = model.forwards
    assert not inside(model, points([0, 0]), points([1, 0]), torch.tensor([1]), torch.tensor([1e-6]).double())
    assert model.forwards - before <= connectivity.FIRST_SAMPLES


# --- carrying into a region --------------------------------------------------------------------------


def test_carried_onto_a_half_space_by_the_distance_and_a_fiftieth(affine):
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(2, 48)), [0.3, 0.0]
    model = affine(weight, bias, (3, 4, 4))
    x = torch.randn((30, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    logits = model.logits(x)
    target = torch.from_numpy(1 - logits.argmax(1))
    moved, reached = onto_region(model.classifier, x, target)
    normal = model.weight[1] - model.weight[0]
    distance = np.abs(logits[:, 1] - logits[:, 0]) / np.linalg.norm(normal)
    np.testing.assert_allclose((moved - x).flatten(1).norm(dim=1).numpy(), 1.02 * distance, rtol=1e-4)
    assert reached.all()
    assert torch.equal(labels_of(model.classifier, moved), target)


def test_carried_to_the_one_class_asked_for_and_left_alone_where_it_is(affine):
    generator = np.random.default_rng(1)
    model = affine(generator.normal(size=(10, 48)), generator.normal(size=10), (3, 4, 4))
    x = torch.randn((40, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    target = torch.arange(40) % 10
    moved, reached = onto_region(model.classifier, x, target)
    assert reached.all()
    assert torch.equal(labels_of(model.classifier, moved), target)
    there = labels_of(model.classifier, x) == target
    assert there.any()
    assert torch.equal(moved[there], x[there])
    alone = torch.cat([onto_region(model.classifier, x[k : k + 1], target[k : k + 1])[0] for k in range(40)])
    torch.testing.assert_close(moved, alone, rtol=1e-4, atol=1e-5)


def test_a_region_that_is_nowhere_or_flat_is_not_reached(affine):
    nowhere = region(lambda x, y: -1 - x**2 - y**2)
    moved, reached = onto_region(nowhere, points([0.5, 0.5], [0, 0]), torch.tensor([1, 1]))
    assert reached.tolist() == [False, False]
    assert torch.isfinite(moved).all()
    flat = affine(np.zeros((2, 2)), [1.0, 0.0], SHAPE).classifier
    assert onto_region(flat, points([0, 0]), torch.tensor([1]))[1].tolist() == [False]


def test_a_point_on_the_boundary_is_carried_off_it():
    model = region(lambda x, y: x)
    moved, reached = onto_region(model, points([0, 0.25]), torch.tensor([1]))
    assert reached.all()
    assert 0 < float(moved[0, 0, 0, 0]) < 1e-4


def test_a_way_of_many_steps_is_gone_to_its_end():
    """f = 1 - exp(-x): from far below every Newton step leads one farther, and the last ones creep."""
    model = region(lambda x, y: 1 - torch.exp(-x))
    start, target = points([-10, 0]), torch.tensor([1])
    moved, reached = onto_region(model, start, target)
    assert reached.all()
    assert 0 < float(moved[0, 0, 0, 0]) < 1
    assert not onto_region(model, start, target, steps=5)[1].any()
    assert onto_region(model, start, target, steps=30)[1].all()


def test_rounding_does_not_hold_a_point_on_a_far_boundary():
    """At 1,000 the shortest step of all is lost in float32: steps are a share of the way made, too."""
    moved, reached = onto_region(
        region(lambda x, y: x - 1000), points([0, 0]), torch.tensor([1]), overshoot=0
    )
    assert reached.all()
    assert 1000 < float(moved[0, 0, 0, 0]) < 1002


# --- paths -------------------------------------------------------------------------------------------


def shortest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the shortest way outside the unit disc: two tangents and the arc between them."""
    a, b = a.flatten().double().numpy(), b.flatten().double().numpy()
    turn = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    reach = [np.linalg.norm(end) for end in (a, b)]
    return sum(math.sqrt(r * r - 1) for r in reach) + turn - sum(math.acos(1 / r) for r in reach)


ENDS = points([-1.5, 0.1]), points([1.5, 0.1])


@pytest.mark.parametrize("spacing", [1e-2, 1e-3, 1e-4])
def test_around_the_hole_of_an_annulus(spacing):
    path = find_paths(region(annulus), *ENDS, spacing=spacing)[0]
    assert path.points is not None
    radius = np.linalg.norm(along(path.points, 1e-4), axis=1)
    assert ((radius > 1) & (radius < 2)).all()
    np.testing.assert_array_equal(
        path.points[[0, -1]].flatten(1).numpy(), np.float32([[-1.5, 0.1], [1.5, 0.1]])
    )
    assert 1 <= path.anchors <= 20
    flat = path.points.flatten(1).double()
    assert path.deviation == pytest.approx(float((flat[1:] - flat[:-1]).norm(dim=1).sum()) / 3)
    assert shortest(*ENDS) / 3 < path.deviation < 1.6


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_paths_hold_whatever_the_anchors_distance_from_the_boundary(monkeypatch, anchor):
    """With anchors at the boundary itself it takes hundreds of them; what is found is inside all the same."""
    monkeypatch.setattr(connectivity, "AHEAD", anchor)
    path = find_paths(region(annulus), *ENDS, spacing=1e-3)[0]
    assert path.points is not None
    assert (path.anchors > 100) == (anchor == 0)
    assert path.deviation * 3 > shortest(*ENDS) - 1e-6
    if anchor == 0:
        assert path.deviation * 3 == pytest.approx(shortest(*ENDS), rel=5e-3)
    radius = np.linalg.norm(along(path.points, 3e-3), axis=1)
    assert (radius > 1 - 1e-6).all()


@pytest.mark.parametrize("off", [1e-6, 1e-3, 1e-1])
def test_from_an_end_next_to_a_boundary_that_bends_away(off):
    """Outside of a disc: chords from its edge must first lead up."""
    model = region(lambda x, y: torch.hypot(x, y) - 1)
    path = find_paths(model, points([-1.1, 0.2]), points([0.3, math.sqrt(1 - 0.09) + off]), spacing=1e-4)[0]
    assert path.points is not None
    assert 1 <= path.anchors <= 12
    assert (np.linalg.norm(along(path.points, 1e-5), axis=1) > 1).all()


def test_a_half_space_is_straight_and_convex(affine):
    model = affine([[0, 0], [1.0, 2.0]], [0.0, 0.0], SHAPE).classifier
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((200, *SHAPE), generator=generator)
    x = x[labels_of(model, x) == 1]
    half = len(x) // 2
    for path in find_paths(model, x[:half], x[half : 2 * half], spacing=1e-2):
        assert path.deviation == 1.0
        assert (path.anchors, path.depth) == (0, 0)
    for k in (1, 2, 10):
        assert mixtures(model, x, labels_of(model, x), k, streams(300)).all()


def test_no_path_between_islands_and_those_within_one_are_found():
    model = region(islands)
    a, b = (
        points([-2, 0.2], [-2.5, 0], [1.5, 0], [-2, 0]),
        points([2.1, 0.2], [-1.5, 0.1], [2, 0.9], [1.2, -0.3]),
    )
    paths = find_paths(model, a, b, spacing=1e-4)
    assert [path.points is None for path in paths] == [True, False, False, True]
    assert [path.depth for path in paths] == [connectivity.DEPTH, 0, 0, connectivity.DEPTH]
    assert math.isnan(paths[0].deviation)


@pytest.mark.parametrize("width", [0.3, 1e-2, 1.2e-4])
def test_a_gap_right_across_is_never_crossed(width):
    """Two half-planes, and a gap between them that only the fine samples see."""
    model = region(lambda x, y: (x - 0.33337).abs() - width / 2)
    for spacing in (1e-4, 1e-4 / 3):
        assert find_paths(model, points([0, 0]), points([1, 0.0]), spacing=spacing)[0].points is None


def test_the_depth_is_a_limit():
    wavy, ends = region(band), (points([0, 0]), points([9.0, math.sin(9)]))
    found = find_paths(wavy, *ends, spacing=1e-3)[0]
    assert found.depth >= 2
    assert find_paths(wavy, *ends, spacing=1e-3, depth=found.depth)[0].points is not None
    for depth in range(found.depth):
        assert find_paths(wavy, *ends, spacing=1e-3, depth=depth)[0].points is None


def test_a_path_may_bend_often():
    """A wavy band: the path follows it, and only parts that leave it are divided."""
    path = find_paths(region(band), points([0, 0]), points([9.0, math.sin(9)]), spacing=1e-3)[0]
    assert path.points is not None
    assert path.anchors >= 3
    line = along(path.points, 9e-3)
    assert (np.abs(line[:, 1] - np.sin(line[:, 0])) < 0.3).all()
    assert 1 < path.deviation < 2


def test_paths_do_not_depend_on_batches_order_or_direction():
    a = points(*([1.5 * math.cos(t), 1.5 * math.sin(t)] for t in np.linspace(0, 3, 7)))
    b = points(*([1.2 * math.cos(t), 1.2 * math.sin(t)] for t in np.linspace(0.5, 7, 7)))
    whole = find_paths(region(annulus), a, b, spacing=1e-3)
    assert {path.anchors > 0 for path in whole} == {True, False}
    small = region(annulus, batch_size=3)
    order = torch.tensor([3, 0, 6, 5, 1, 4, 2])
    shuffled = dict(zip(order.tolist(), find_paths(small, a[order], b[order], spacing=1e-3), strict=True))
    back = find_paths(region(annulus), b, a, spacing=1e-3)
    for row, path in enumerate(whole):
        for other in (shuffled[row].points, back[row].points.flip(0)):
            torch.testing.assert_close(other, path.points, rtol=0, atol=1e-5)
        assert back[row].deviation == pytest.approx(path.deviation, abs=1e-6)


def test_regions_of_different_labels_are_worked_on_together():
    """One path around the hole inside the ring, one around the ring outside of it."""
    a, b = points([-1.5, 0.1], [-2, 1.7], [-1.5, 0.3]), points([1.5, 0.1], [2, 1.7], [1.5, 0.3])
    both = find_paths(region(annulus), a, b, spacing=1e-3)
    assert labels_of(region(annulus), a).tolist() == [1, 0, 1]
    for row, path in enumerate(both):
        alone = find_paths(region(annulus), a[row : row + 1], b[row : row + 1], spacing=1e-3)[0]
        assert path.anchors == alone.anchors > 0
        torch.testing.assert_close(path.points, alone.points, rtol=0, atol=1e-5)
    assert (np.linalg.norm(along(both[1].points, 1e-3), axis=1) > 2).all()


def test_an_anchor_that_cannot_be_carried_ends_the_search():
    """Outside of its islands this classifier is flat: there is no way back from the middle."""
    model = region(lambda x, y: torch.where(islands(x, y) > 0, 1.0, -1.0) + 0 * x)
    path = find_paths(model, points([-2, 0.2]), points([2, 0.2]))[0]
    assert (path.points, path.depth) == (None, 1)


def test_anchors_outside_the_box_are_counted_on_both_sides():
    def facts(*rows):
        return connectivity_study._path_row(Path(points([0.1, 0.2], *rows, [0.3, 0.9]), 3))

    for rows, outside, excess in (
        ([[0.5, 0.5]], 0, 0),
        ([[0.5, -0.25]], 1, 0.25),
        ([[1.5, -0.25], [0, 1], [0.2, 1.125]], 2, 0.5),
    ):
        found = facts(*rows)
        assert (found["outside"], found["anchors"]) == (outside, len(rows))
        assert found["excess"] == pytest.approx(excess)
        assert connectivity_study.OUTCOMES[found["outcome"]] == "bent"


def test_ends_of_different_labels_are_refused_and_equal_ends_are_joined():
    model = region(annulus)
    with pytest.raises(ValueError, match="same label"):
        find_paths(model, points([-1.5, 0]), points([0, 0]))
    for spacing in (0.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            find_paths(model, points([-1.5, 0]), points([-1.5, 0]), spacing=spacing)
    path = find_paths(model, points([-1.5, 0]), points([-1.5, 0]))[0]
    assert (path.deviation, path.anchors) == (1.0, 0)
    assert find_paths(model, points()[:0], points()[:0]) == []


def test_progress_counts_every_pair_once():
    reported = []
    a, b = points([-2, 0], [-2.5, 0], [-2, 0.2]), points([2, 0], [-1.5, 0], [2, 0.2])
    find_paths(region(islands), a, b, spacing=1e-3, advance=reported.append)
    assert sum(reported) == 3


def test_the_paths_of_a_network_keep_its_label(digits_net, digits_test):
    """Samples three times finer than those asked for, by a forward pass of our own."""
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    x = digits_test[0][:200]
    labels = labels_of(model, x)
    rows = same_class_images(labels, 2, streams(12))
    target = labels[rows[:, 0]]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((12, 1, 8, 8), generator=generator)
    ends, reached = onto_region(model, noise, target)
    assert reached.all()
    paths = find_paths(model, x[rows[:, 0]], ends, spacing=1e-3)
    bent = [path for path in paths if path.anchors]
    assert bent
    for path, label in zip(paths, target.tolist(), strict=True):
        if path.points is not None:
            assert path.deviation >= 1 - 1e-9
            size = float((path.points[-1] - path.points[0]).norm())
            line = torch.from_numpy(along(path.points, size * 1e-3)).float().view(-1, 1, 8, 8)
            with torch.no_grad():
                assert (digits_net(line).argmax(1) == label).float().mean() > 0.999


def test_ends_beside_a_boundary_are_joined_at_the_finest_spacing():
    """Random points carried into a region of a network: with anchors half as far inside these are not."""
    model, data = (
        load_model("digits_cure", device="cpu", precision="fp32"),
        load_dataset("digits").subset(500),
    )
    labels = labels_of(model, data.images)
    noise = Noise.for_samples(0, "connectivity", ["random/30", "random/81"])
    ends = draw_pairs(model, data.images, labels, "random", noise)
    for path in find_paths(model, ends.first, ends.second, spacing=1e-4):
        assert path.points is not None
        assert 1 <= path.anchors <= 20


# --- convexity ---------------------------------------------------------------------------------------


def test_a_ring_is_as_convex_as_an_independent_simulation_says():
    model = region(lambda x, y: torch.hypot(x, y) - 1)
    generator = np.random.default_rng(0)
    turn = generator.uniform(0, 2 * math.pi, 400)
    x = points(*np.stack((1.2 * np.cos(turn), 1.2 * np.sin(turn)), 1).tolist())
    labels = labels_of(model, x)
    for k in (2, 3, 5):
        stayed = mixtures(model, x, labels, k, streams(4000)).double()
        ring = x.flatten(1).double().numpy()[generator.integers(0, 400, (40_000, k))]
        weights = generator.dirichlet(np.ones(k), 40_000)
        expected = (np.linalg.norm((weights[:, :, None] * ring).sum(1), axis=1) > 1).mean()
        assert 0.02 < expected < 0.9
        error = math.sqrt(expected * (1 - expected) / 4000)
        assert float(stayed.mean()) == pytest.approx(expected, abs=4 * error)


def test_combinations_are_of_one_region_only():
    """Two half-planes far apart: a mixture across them would fall between."""
    model = region(lambda x, y: x.abs() - 1)
    x = points([-3, 0], [-3, 1], [3, 0], [3, 2], [0, 0], [0.5, 0], [0, 0.3])
    labels = labels_of(model, x)
    stayed = mixtures(model, x, labels, 2, streams(2000)).double()
    # Label 1 with probability 4/7, a partner on the other side with 2/3, then outside with 1/3.
    assert float(stayed.mean()) == pytest.approx(1 - 4 / 7 * 2 / 3 * 1 / 3, abs=0.03)


def test_same_class_images_are_different_images_of_one_region_drawn_evenly():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 5])
    rows = same_class_images(labels, 2, streams(6000))
    assert (labels[rows[:, 0]] == labels[rows[:, 1]]).all()
    assert (rows[:, 0] != rows[:, 1]).all()
    counts = np.bincount(rows[:, 0].numpy(), minlength=8) / 6000
    np.testing.assert_allclose(counts, [0, *[1 / 6] * 6, 0], atol=0.025)
    among = rows[rows[:, 0] == 3][:, 1]
    np.testing.assert_allclose(
        np.bincount(among.numpy(), minlength=8) / len(among), [0, 0, 0, 0, *[1 / 3] * 3, 0], atol=0.08
    )
    assert sorted(same_class_images(labels, 4, streams(1))[0].tolist()) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="no region holds 5"):
        same_class_images(labels, 5, streams(1))


def test_other_class_pairs_lie_in_different_regions_and_are_drawn_evenly():
    labels = torch.tensor([0, 1, 1, 1])
    rows = other_class_pairs(labels, streams(4000))
    assert (labels[rows[:, 0]] != labels[rows[:, 1]]).all()
    np.testing.assert_allclose(np.bincount(rows[:, 0].numpy()) / 4000, [0.25] * 4, atol=0.03)
    with pytest.raises(ValueError, match="one region"):
        other_class_pairs(torch.zeros(4, dtype=torch.int64), streams(1))


def test_draws_belong_to_their_stream_not_to_the_batch():
    model = region(lambda x, y: torch.hypot(x, y) - 1)
    x = points(*np.random.default_rng(0).normal(size=(60, 2)).tolist())
    labels = labels_of(model, x)
    whole = mixtures(model, x, labels, 3, streams(50))
    small = mixtures(region(lambda x, y: torch.hypot(x, y) - 1, batch_size=7), x, labels, 3, streams(50))
    assert torch.equal(whole, small)
    assert torch.equal(mixtures(model, x, labels, 3, streams(50)[torch.arange(20, 30)]), whole[20:30])
    assert not torch.equal(mixtures(model, x, labels, 3, streams(50, seed=1)), whole)


# --- the picture -------------------------------------------------------------------------------------


def test_the_picture_shows_the_labels_where_it_says():
    model = region(annulus)
    path = find_paths(model, *ENDS, spacing=1e-3)[0]
    section = path_section(model, path.points)
    found = SimpleNamespace(**{key: value.numpy() for key, value in vars(section).items()})
    assert (found.path[len(found.height) // 2] == 1).all()
    assert (found.straight[len(found.height) // 2] == 0).any()
    assert found.height[len(found.height) // 2] == pytest.approx(0, abs=1e-12)
    plane = normal_plane(model, path.points[0])
    assert found.height[[0, -1]].tolist() == pytest.approx([-plane.distance, plane.distance])
    normal = plane.n.flatten().double().numpy()
    way = np.linspace(0, 1, found.straight.shape[1])
    a, b = (end.flatten().double().numpy() for end in ENDS)
    there = a + way[None, :, None] * (b - a) + found.height[:, None, None] * normal
    radius = np.linalg.norm(there, axis=2)
    sure = (np.abs(radius - 1) > 1e-4) & (np.abs(radius - 2) > 1e-4)
    np.testing.assert_array_equal(found.straight[sure], ((radius > 1) & (radius < 2))[sure])
    # Along the path: anchors lie where their share of its length says.
    flat = path.points.flatten(1).double().numpy()
    legs = np.linalg.norm(np.diff(flat, axis=0), axis=1)
    np.testing.assert_allclose(found.anchors, np.cumsum(legs)[:-1] / legs.sum(), rtol=1e-9)
    x, y = (np.interp(way, [0, *found.anchors, 1], flat[:, k]) for k in (0, 1))
    there = np.stack((x, y), 1)[None] + found.height[:, None, None] * normal
    radius = np.linalg.norm(there, axis=2)
    sure = (np.abs(radius - 1) > 1e-4) & (np.abs(radius - 2) > 1e-4)
    np.testing.assert_array_equal(found.path[sure], ((radius > 1) & (radius < 2))[sure])


def test_there_is_no_picture_of_a_segment_or_of_no_path():
    model = region(annulus)
    straight = find_paths(model, points([-1.5, 0.1]), points([-1.5, 0.2]), spacing=1e-2)[0]
    assert straight.deviation == 1
    for path in (straight, Path(None, 12), None):
        assert connectivity_study.section_of(model, path) is None


# --- the command -------------------------------------------------------------------------------------

invoke = partial(made.invoke, "connectivity")

ONE = ("--model", "digits_cure", "--n", "100", "--pairs", "40", "--spacing", "0.02", "--draws", "50")
COLUMNS = ["pairs", "n", "found", "straight", "bent"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "a"
    run = invoke(*ONE, "--out", str(out))
    assert run.exit_code == 0
    return out, run.output


def test_the_table_follows_from_the_pairs(whole):
    out, said = whole
    pairs, table = pd.read_csv(out / "connectivity-pairs.csv"), pd.read_csv(out / "connectivity.csv")
    assert table["scenario"].tolist() == list(connectivity_study.SCENARIOS)
    assert (table["spacing"] == 0.02).all()
    for _, line in table.iterrows():
        part = pairs[pairs["scenario"] == line["scenario"]]
        joined, bent = part[part["outcome"] != "no end"], part[part["outcome"] == "bent"]
        straight = int((part["outcome"] == "straight").sum())
        expected = [40, len(joined), straight + len(bent), straight, len(bent)]
        assert line[COLUMNS].tolist() == expected
        if len(bent):
            assert line["D"] == pytest.approx(bent["D"].mean())
            assert line["D_largest"] == bent["D"].max()
            assert line["anchors"] == pytest.approx(bent["anchors"].mean())
            assert line["outside"] == pytest.approx(bent["outside"].sum() / bent["anchors"].sum())
            assert f"{line['D'] - 1:.1e}" in said
        found = joined[joined["outcome"].isin(["bent", "straight"])]
        assert line["D_all"] == pytest.approx(found["D"].mean())
        assert line["anchors_all"] == pytest.approx(found["anchors"].mean())
        assert f"{line['D_all'] - 1:.1e}" in said
        assert f"{line['found']}/{line['n']}" in said
    assert (table["bent"] > 0).any()
    straight = pairs[pairs["outcome"] == "straight"]
    assert (straight["D"] == 1).all()
    assert (straight["anchors"] == 0).all()


def test_pairs_are_what_their_scenario_says(whole):
    """Ends and distances again, from the images that the rows name."""
    rows = pd.read_csv(whole[0] / "connectivity-pairs.csv")
    model, data = (
        load_model("digits_cure", device="cpu", precision="fp32"),
        load_dataset("digits").subset(100),
    )
    label = {name: int(k) for name, k in zip(data.ids, labels_of(model, data.images), strict=True)}
    image = dict(zip(data.ids, data.images, strict=True))
    own = rows["first"].map(label)
    assert [data.classes[k] for k in own] == rows["label"].astype(str).tolist()
    same, carried, drawn = (rows[rows["scenario"] == name] for name in connectivity_study.SCENARIOS)
    assert (same["second"].map(label) == same["first"].map(label)).all()
    assert (same["first"] != same["second"]).all()
    assert (same["carried"] == 0).all()
    for _, row in same.iterrows():
        length = float((image[row["first"]] - image[row["second"]]).norm())
        assert row["distance"] == pytest.approx(length, rel=1e-5)
    assert (carried["second"].map(label) != carried["first"].map(label)).all()
    assert (carried["carried"] > 0).all()
    for _, row in carried.iterrows():
        length = float((image[row["first"]] - image[row["second"]]).norm())
        assert abs(row["distance"] - length) <= row["carried"] + 1e-5
    assert (drawn["second"] == "random").all()
    # From a point as far from the origin as the mean image, in no particular direction.
    radius = float(data.images.flatten(1).norm(dim=1).mean())
    expected = np.hypot([float(image[name].norm()) for name in drawn["first"]], radius).mean()
    still = drawn[drawn["carried"] == 0]
    moved = drawn[drawn["carried"] > 0]
    assert len(moved) > 20
    assert drawn["distance"].mean() == pytest.approx(expected, rel=0.15)
    assert len(still) < 20
    assert len(set(same["first"])) > 20  # drawn, not repeated


def test_the_curve_of_convexity_has_its_counts_and_intervals(whole):
    out, _ = whole
    table = pd.read_csv(out / "convexity.csv")
    model, data = (
        load_model("digits_cure", device="cpu", precision="fp32"),
        load_dataset("digits").subset(100),
    )
    labels = labels_of(model, data.images)
    sizes = labels.bincount()
    assert table["k"].tolist() == list(range(2, 11))
    for _, row in table.iterrows():
        k = int(row["k"])
        if int(sizes.max()) < k:
            assert row["draws"] == 0
            assert np.isnan(row["share"])
            continue
        noise = Noise.for_samples(0, "connectivity", [f"{k} images/{draw}" for draw in range(50)])
        assert row["draws"] == 50
        assert row["stayed"] == int(mixtures(model, data.images, labels, k, noise).sum())
        assert row["ci_low"] <= row["share"] <= row["ci_high"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "convex" in page
    with np.load(out / "path.npz") as drawn:
        own, flat = labels_of(model, torch.from_numpy(drawn["digits_cure.points"])), drawn["digits_cure.path"]
    assert (own == own[0]).all()
    assert (flat[len(flat) // 2] == int(own[0])).all()
    assert "data:image/svg+xml" in page


@pytest.mark.parametrize("stop", ["carried", "random"])
def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch, whole, stop):
    real, calls = connectivity_study._join_block, []

    def stops(study, classifier, labels, scenario, block, *rest):
        calls.append((scenario, block.start))
        if len(calls) < 10 and scenario == stop and block.start > 0:
            raise KeyboardInterrupt
        return real(study, classifier, labels, scenario, block, *rest)

    monkeypatch.setattr(connectivity_study, "_join_block", stops)
    monkeypatch.setattr(kept, "INTERVAL", 0.0)
    CliRunner().invoke(cli, ["connectivity", *ONE, "--device", "cpu", "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a" / "manifest.json").exists()
    before = calls[:]
    assert before[-1] == (stop, 32)
    calls += [("", 0)] * 10
    assert invoke(*ONE, "--out", str(tmp_path / "a")).exit_code == 0
    resumed = calls[len(before) + 10 :]
    assert resumed[0] == (stop, 32)  # neither finished scenarios nor finished blocks
    assert len(resumed) == 6 - len(before) + 1
    names = ["connectivity.csv", "connectivity-pairs.csv", "convexity.csv", "convexity.svg", "path.svg"]
    for name in (*names, "connectivity-digits_cure.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (whole[0] / name).read_bytes()
    with pytest.raises(UsageError, match="already holds results"):
        invoke(*ONE, "--out", str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("option", "value"), [("--spacing", "0.03"), ("--pairs", "41"), ("--draws", "51"), ("--seed", "1")]
)
def test_unfinished_work_with_other_settings_is_not_taken_over(tmp_path, whole, option, value):
    (tmp_path / "a").mkdir()
    name = "connectivity-digits_cure.npz"
    (tmp_path / "a" / name).write_bytes((whole[0] / name).read_bytes())
    with pytest.raises(UsageError, match="of another measurement"):
        invoke(*ONE, option, value, "--out", str(tmp_path / "a"))


def test_another_seed_draws_other_pairs(tmp_path, whole):
    assert invoke(*ONE, "--seed", "1", "--out", str(tmp_path / "a")).exit_code == 0
    one, other = (pd.read_csv(folder / "connectivity-pairs.csv") for folder in (whole[0], tmp_path / "a"))
    for scenario in connectivity_study.SCENARIOS:
        first, second = (rows[rows["scenario"] == scenario] for rows in (one, other))
        assert (first["first"].to_numpy() != second["first"].to_numpy()).mean() > 0.8
        assert (first["distance"].to_numpy() != second["distance"].to_numpy()).mean() > 0.9


@pytest.mark.parametrize("end", ["first", "second"])
def test_an_end_whose_label_rounding_decides_anew_is_no_end(monkeypatch, tmp_path, whole, end):
    """Labels of one batch size need not be those of another: the pair is counted, the run goes on."""
    real = connectivity_study.draw_pairs

    def flips(classifier, x, labels, scenario, noise):
        ends = real(classifier, x, labels, scenario, noise)
        other = (labels != labels[ends.rows[0, 0]]).nonzero().flatten()[0]
        getattr(ends, end)[0] = x[other]  # as if a tie had fallen the other way since
        return ends

    monkeypatch.setattr(connectivity_study, "draw_pairs", flips)
    assert invoke(*ONE, "--out", str(tmp_path / "a")).exit_code == 0
    rows = pd.read_csv(tmp_path / "a" / "connectivity-pairs.csv").set_index(["scenario", "pair"])["outcome"]
    before = pd.read_csv(whole[0] / "connectivity-pairs.csv").set_index(["scenario", "pair"])["outcome"]
    for (scenario, pair), outcome in rows.items():
        first = pair % connectivity_study.BLOCK == 0
        assert outcome == ("no end" if first else before[scenario, pair])
    table = pd.read_csv(tmp_path / "a" / "connectivity.csv")
    assert (table["n"] <= 38).all()


def test_known_labels_of_ends_on_a_tie_are_taken_as_given():
    """An end on the boundary itself has the other label; by itself it would be refused."""
    model = region(lambda x, y: x)
    a, b = points([0, 0.2]), points([1, 0.3])
    assert labels_of(model, a).tolist() == [0]
    with pytest.raises(ValueError, match="same label"):
        find_paths(model, a, b)
    assert find_paths(model, a, b, labels=torch.tensor([1]))[0].deviation == 1


def test_the_batch_size_does_not_count(tmp_path, whole):
    assert invoke(*ONE, "--batch-size", "7", "--out", str(tmp_path / "a")).exit_code == 0
    for name in ("connectivity-pairs.csv", "convexity.csv"):
        one, other = (pd.read_csv(folder / name) for folder in (whole[0], tmp_path / "a"))
        pd.testing.assert_frame_equal(one, other, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "0"], "'--pairs': 0 is not in the range x>=1"),
        (["--draws", "0"], "'--draws': 0 is not in the range x>=1"),
        (["--spacing", "0"], "--spacing 0: must lie between 1e-6 and 0.1"),
        (["--spacing", "nan"], "--spacing nan: must lie between"),
        (["--spacing", "x"], "'--spacing': 'x' is not a valid float"),
        (["--n", "1"], "no two of the 1 images have the same label: raise --n"),
    ],
)
def test_bad_requests_are_one_line_before_any_work(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["connectivity", "--model", "digits_normal", *arguments, "--out", str(tmp_path / "a")])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_model_with_one_label_only_is_refused(affine, tmp_path):
    constant = affine(np.zeros((10, 64)), [1.0] + [0.0] * 9, (1, 8, 8)).classifier
    data = load_dataset("digits").subset(9)
    study = Study(verb="connectivity", models={"constant": constant}, data=data, out=tmp_path / "a")
    with pytest.raises(UsageError, match="constant: all 9 images have the same label"):
        connectivity_study.measure(study, connectivity_study.Settings(1, 0.1, 1))


def test_a_second_point_that_cannot_be_carried_is_left_out_of_the_count(tmp_path):
    """Label 1 on the bright side only of a step: a flat classifier beyond it shows DeepFool no way."""

    class Step(nn.Module):
        def forward(self, x):
            bright = (x.flatten(1).mean(1) > 0.3).float()
            return torch.stack((1 - bright, bright), 1)

    model = Classifier(Step(), num_classes=2, input_shape=(1, 8, 8))
    data = load_dataset("digits").subset(40)
    study = Study(verb="connectivity", models={"step": model}, data=data, out=tmp_path / "a")
    settings = connectivity_study.Settings(pairs=20, spacing=0.1, draws=10)
    table = connectivity_study.measure(study, settings).set_index("scenario")
    assert table["pairs"].tolist() == [20, 20, 20]
    assert table.loc["image", COLUMNS].tolist() == [20, 20, 20, 20, 0]  # half-spaces are convex
    assert table.loc["carried", COLUMNS].tolist() == [20, 0, 0, 0, 0]
    rows = pd.read_csv(tmp_path / "a" / "connectivity-pairs.csv")
    assert set(rows[rows["scenario"] == "carried"]["outcome"]) == {"no end"}
    assert not (tmp_path / "a" / "path.svg").exists()  # nothing bends
