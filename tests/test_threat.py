"""Ball, box, projection and steepest direction, against numpy and by definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robustbench_cure.threat import (
    PIXEL_TOLERANCE,
    RELATIVE_TOLERANCE,
    ThreatModel,
    distance,
    format_eps,
    parse_fraction,
)

NORMS = ("linf", "l2")


def test_more_than_all_grey_levels_is_no_radius():
    """Grey levels given as they are: a ball of 8 holds every image, and accuracy in it is 0."""
    assert ThreatModel.parse("linf", "1").radius == 1
    assert ThreatModel.parse("l2", "8").radius == 8
    with pytest.raises(ValueError, match="8/255"):
        ThreatModel.parse("linf", "8")


def images(n: int, seed: int = 0, shape: tuple[int, int, int] = (3, 4, 4)) -> torch.Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


def shifts(n: int, scale: float, seed: int = 1, shape: tuple[int, int, int] = (3, 4, 4)) -> torch.Tensor:
    return scale * torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))


def numpy_norm(delta: torch.Tensor, norm: str) -> np.ndarray:
    order = {"linf": np.inf, "l2": 2}[norm]
    return np.array([np.linalg.norm(row.double().numpy().ravel(), order) for row in delta])


# --- eps ---------------------------------------------------------------------------------------------


def test_eps_is_an_exact_fraction():
    threat = ThreatModel.parse("linf", "8/255")
    assert threat.eps == Fraction(8, 255)
    assert threat.eps != ThreatModel.parse("linf", "0.031").eps
    assert threat.eps != Fraction(8 / 255)  # a float is not the fraction
    assert threat.radius == 8 / 255
    assert ThreatModel.parse("l2", "0.5").eps == Fraction(1, 2) == parse_fraction(" 1/2 ")
    assert threat == ThreatModel.parse("linf", "16/510")
    assert hash(threat) == hash(ThreatModel.parse("linf", "16/510"))


@pytest.mark.parametrize("text", ["", "eps", "8/0", "1/2/3", "-1/255", "8 / x", "nan", "inf"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match=r"fraction|negative"):
        parse_fraction(text)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        ThreatModel.parse("l1", "1/2")


@given(st.integers(0, 255), st.integers(1, 255))
def test_printed_eps_reads_back_as_itself(numerator, denominator):
    eps = Fraction(numerator, denominator)
    assert parse_fraction(format_eps(eps)) == eps


def test_printed_form():
    assert str(ThreatModel.parse("linf", "8/255")) == "linf 8/255"
    assert str(ThreatModel.parse("linf", "51/255")) == "linf 51/255"
    assert str(ThreatModel.parse("l2", "0.5")) == "l2 1/2"
    assert format_eps(Fraction(0)) == "0"


# --- distance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_numpys_norm(norm):
    x = images(20)
    moved = x + shifts(20, 0.1)
    np.testing.assert_allclose(distance(norm, x, moved).numpy(), numpy_norm(moved - x, norm), rtol=1e-6)
    assert ThreatModel.parse(norm, "1").distance(x, x).tolist() == [0.0] * 20


@pytest.mark.parametrize("norm", NORMS)
def test_distance_of_no_rows_and_of_empty_images(norm):
    assert distance(norm, torch.zeros(0, 1, 2, 2), torch.zeros(0, 1, 2, 2)).shape == (0,)
    assert distance(norm, torch.zeros(3, 1, 0, 0), torch.zeros(3, 1, 0, 0)).tolist() == [0.0, 0.0, 0.0]


# --- projection --------------------------------------------------------------------------------------


@example(norm="l2", eps=Fraction(26, 15), scale=1e6, seed=9563)
@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    eps=st.fractions(min_value=0, max_value=3, max_denominator=255),
    scale=st.sampled_from([0.0, 1e-30, 1e-4, 0.05, 1.0, 1e6]),
    seed=st.integers(0, 10_000),
)
def test_projection_lies_in_ball_and_box_and_is_idempotent(norm, eps, scale, seed):
    threat = ThreatModel(norm, min(eps, Fraction(1)) if norm == "linf" else eps)
    x, moved = images(4, seed), images(4, seed) + shifts(4, scale, seed)
    projected = threat.project(x, moved)
    # Roundings of float32 may lead out by a tenth of what membership allows, and by one of a pixel.
    slack = threat.radius * RELATIVE_TOLERANCE / 10 + PIXEL_TOLERANCE
    assert (numpy_norm(projected - x, norm) <= threat.radius + slack).all()
    assert threat.contains(x, projected).all()
    assert projected.amin() >= 0
    assert projected.amax() <= 1
    torch.testing.assert_close(threat.project(x, projected), projected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["random", "alike"])
@pytest.mark.parametrize("side", [(1, 8), (3, 32), (3, 224), (3, 384)])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_projected_is_never_refused(norm, side, kind):
    """Nor by a slack that means anything. Where pixels are alike, their roundings add up."""
    channels, size = side
    x = (
        images(2, 3, (channels, size, size))
        if kind == "random"
        else torch.full((2, channels, size, size), 0.7)
    )
    direction = shifts(2, 1.0, 4, x.shape[1:]) if kind == "random" else torch.ones_like(x)
    largest = Fraction(1) if norm == "linf" else Fraction(50)
    for eps in (
        Fraction(1, 10_000),
        Fraction(1, 255),
        Fraction(8, 255),
        Fraction(1, 2),
        Fraction(1),
        largest,
    ):
        threat = ThreatModel(norm, eps)
        for length in (1.0, 1e-3, 1e3):
            projected = threat.project(x, x + length * threat.steepest(direction) * threat.radius)
            assert threat.contains(x, projected).all(), (eps, length)
            assert (
                numpy_norm(projected.double() - x.double(), norm) <= threat.radius * (1 + 1e-6) + 6e-8
            ).all()


def test_a_step_of_the_l2_ball_is_as_long_as_the_ball_at_any_size():
    """Shortened by float32 norms, those of large images would leave the ball, or not reach its end."""
    threat = ThreatModel("l2", Fraction(3))
    x = 0.25 + 0.5 * images(4, 5, (3, 224, 224))
    projected = threat.project(x, x + shifts(4, 1.0, 6, (3, 224, 224)))
    np.testing.assert_allclose(numpy_norm(projected.double() - x.double(), "l2"), 3.0, rtol=3e-7)


@pytest.mark.parametrize(
    ("norm", "eps", "error"),
    [
        ("Linf", Fraction(1, 10), ValueError),
        ("L2", Fraction(1, 10), ValueError),
        (2, Fraction(1, 10), ValueError),
        ("linf", Fraction(8), ValueError),
        ("linf", Fraction(-1, 255), ValueError),
        ("linf", "8 grey levels", ValueError),
        ("l2", 0.5, TypeError),
    ],
)
def test_a_ball_is_checked_where_it_is_made(norm, eps, error):
    """``Linf`` was once taken for l2."""
    with pytest.raises(error):
        ThreatModel(norm, eps)
    assert ThreatModel("linf", "8/255") == ThreatModel.parse("linf", "8/255")


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leaves_what_is_inside(norm):
    threat = ThreatModel.parse(norm, "1/2")
    x = 0.3 + 0.4 * images(8)
    inside = x + shifts(8, 0.01)
    torch.testing.assert_close(threat.project(x, inside), inside, rtol=0, atol=1e-7)


def test_linf_projection_is_the_nearest_point_of_ball_and_box():
    threat = ThreatModel.parse("linf", "0.1")
    x, moved = images(50), images(50) + shifts(50, 0.3)
    projected = threat.project(x, moved)
    low, high = (x - 0.1).clamp_min(0), (x + 0.1).clamp_max(1)
    torch.testing.assert_close(projected, torch.minimum(torch.maximum(moved, low), high), rtol=0, atol=1e-7)
    best = distance("l2", moved, projected)
    for seed in range(20):  # no random feasible point is nearer
        other = low + (high - low) * images(50, 100 + seed)
        assert (distance("l2", moved, other) >= best).all()


def test_l2_projection_is_the_nearest_point_of_the_ball():
    threat = ThreatModel.parse("l2", "1/10")
    x = 0.4 + 0.2 * images(50)
    moved = x + shifts(50, 0.3)
    projected = threat.project(x, moved)
    outside = distance("l2", x, moved)
    assert (outside > 0.1).all()
    torch.testing.assert_close(projected - x, (moved - x) * (0.1 / outside).view(-1, 1, 1, 1))
    # Far points come back onto the sphere, not somewhere inside it.
    torch.testing.assert_close(distance("l2", x, projected), torch.full((50,), 0.1))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_budget_projects_onto_the_image(norm):
    x = images(5)
    assert torch.equal(ThreatModel.parse(norm, "0").project(x, x + shifts(5, 1.0)), x)


# --- membership --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_contains_follows_the_radius(norm):
    threat = ThreatModel.parse(norm, "1/4")
    x = torch.full((1, 1, 1, 4), 0.5)
    unit = torch.tensor([0.0, 0.0, -1.0, 0.0]).view(1, 1, 1, 4)
    for length, inside in [
        (0.2, True),
        (0.25, True),
        (0.25 + 5e-7, True),
        (0.25 + 5e-6, False),
        (0.3, False),
    ]:
        assert bool(threat.contains(x, x + length * unit)) is inside, length


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_outside(norm, value):
    x = images(2)
    bad = x.clone()
    bad[1, 0, 0, 0] = value
    assert ThreatModel.parse(norm, "1").contains(x, bad).tolist() == [True, False]


# --- steepest ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_steepest_keeps_the_direction_of_any_gradient(norm, scale):
    base = shifts(6, 1.0)
    step = ThreatModel.parse(norm, "1").steepest(base * scale)
    np.testing.assert_allclose(numpy_norm(step, norm), 1.0, rtol=1e-5)
    expected = (
        base.sign()
        if norm == "linf"
        else base / distance("l2", torch.zeros_like(base), base).view(-1, 1, 1, 1)
    )
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_attains_the_dual_norm(norm):
    gradient = shifts(30, 2.0)
    step = ThreatModel.parse(norm, "1").steepest(gradient)
    gain = (gradient * step).flatten(1).sum(1)
    dual = gradient.abs().flatten(1).sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(gain, dual)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_gives_no_step_and_does_not_touch_its_neighbours(norm):
    gradient = shifts(3, 1.0)
    alone = ThreatModel.parse(norm, "1").steepest(gradient[[0, 2]])
    gradient[1] = 0
    step = ThreatModel.parse(norm, "1").steepest(gradient)
    assert torch.equal(step[1], torch.zeros_like(step[1]))
    torch.testing.assert_close(step[[0, 2]], alone)
