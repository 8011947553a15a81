"""Nearest boundaries and their curvature against spheres and quadrics; the detector that looks at it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made import WEIGHTED, MatmulWatch, Quadric, invoke, toy
from sklearn.metrics import roc_auc_score
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.boundary import (
    SHORTEST_STEP,
    Nearest,
    cosine_to_normal,
    mean_curvatures,
    nearest_boundary,
    principal_curvatures,
    projected_hessian,
    tangent_frame,
)
from robustbench_cure.geometry.detection import (
    auc,
    auc_interval,
    best_threshold,
    cross_fitted,
    detect,
    versions_of,
)
from robustbench_cure.geometry.hessian import random_basis
from robustbench_cure.studies import boundary as boundary_study
from robustbench_cure.studies import detection as detection_study

pytestmark = pytest.mark.usefixtures("svg_only")

SHAPE = (1, 4, 5)
SIZE = 20
RADIUS = 0.5


class Sphere(nn.Module):
    """Label 0 inside a sphere around the middle of the box, 1 outside; class 2 is far and flat."""

    def __init__(self, change=lambda f: f) -> None:
        super().__init__()
        self.change = change

    def forward(self, x):
        offset = (x - 0.5).flatten(1)
        inside = torch.zeros(len(x), dtype=x.dtype)
        return torch.stack(
            (inside, self.change(offset.square().sum(1) - RADIUS**2), 0.1 * offset[:, 0] - 5), 1
        )


def classifier(net, classes=2, **options):
    return Classifier(net, num_classes=classes, input_shape=SHAPE, **options)


def sphere(change=lambda f: f, **options):
    return classifier(Sphere(change), 3, **options)


def around(n: int, radius: float, seed: int = 0) -> torch.Tensor:
    """Points at a distance from the middle of the box."""
    offset = torch.randn((n, SIZE), generator=torch.Generator().manual_seed(seed))
    return 0.5 + (radius * offset / offset.norm(dim=1, keepdim=True)).view(n, *SHAPE)


def quadric(seed: int = 0):
    """A random one: matrix, slope, and its principal curvatures at the grey image in float64."""
    generator = np.random.default_rng(seed)
    half = generator.normal(size=(SIZE, SIZE))
    matrix, slope = half + half.T, generator.normal(size=SIZE)
    normal = slope / np.linalg.norm(slope)
    project = np.eye(SIZE) - np.outer(normal, normal)
    values = np.linalg.eigvalsh(project @ matrix @ project / np.linalg.norm(slope))
    values = np.delete(values, np.abs(values).argmin())[::-1]  # without the normal's own zero
    return matrix, slope, values


class Wall(nn.Module):
    """A flat boundary at the grey image, across which F = e^(k u) - 1 bends; class 2 half as far up."""

    def forward(self, x):
        value = (6 * (x - 0.5).flatten(1)[:, 0]).exp() - 1
        return torch.stack((torch.zeros_like(value), value, value / 2), 1)


class Turned(nn.Module):
    """The sphere, behind a rotation that a search form in bfloat16 rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(SIZE, SIZE, bias=False)
        self.turn.weight.data = random_basis(SIZE, 0, torch.device("cpu"))

    def forward(self, x):
        square = self.turn((x - 0.5).flatten(1)).float().square().sum(1)
        return torch.stack((torch.full_like(square, RADIUS**2), square), 1)


GREY = torch.full((1, *SHAPE), 0.5)
ZERO, ONE, TWO = torch.tensor(0), torch.tensor(1), torch.tensor(2)


# --- the nearest boundary ----------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "own", "other"), [(0.3, 0, 1), (0.45, 0, 1), (0.9, 1, 0)])
def test_the_nearest_point_of_a_sphere_is_found(radius, own, other):
    x = around(12, radius)
    near = nearest_boundary(sphere(batch_size=5), x)
    assert near.exists.all()
    assert (near.own == own).all()
    assert (near.other == other).all()
    np.testing.assert_allclose(near.distance.numpy(), abs(RADIUS - radius), atol=1e-4)
    expected = 0.5 + (x - 0.5) * RADIUS / radius
    torch.testing.assert_close(near.point, expected, rtol=0, atol=1e-4)
    assert (sphere().logits(near.beyond).argmax(1) == other).all()


def test_of_two_boundaries_the_nearer_one_is_walked_to(affine):
    weight = np.zeros((3, SIZE))
    weight[1, 0], weight[2, 1] = 1.0, 1.0
    model = affine(weight, [0.0, -0.9, -0.8], SHAPE).classifier
    near = nearest_boundary(model, GREY)
    assert int(near.other) == 2
    assert float(near.distance) == pytest.approx(0.3, abs=1e-4)


def test_where_there_is_no_boundary_none_is_found(affine):
    model = affine(np.zeros((2, SIZE)), [1.0, 0.0], SHAPE).classifier
    near = nearest_boundary(model, GREY)
    assert not near.exists.any()
    assert near.distance.isnan().all()
    assert (near.other == near.own).all()


def test_where_a_way_ends_on_the_boundary_it_need_not_be_normal_to_it(affine):
    weight = np.zeros((2, SIZE))
    weight[1, :2] = 3.0, 4.0
    model = affine(weight, np.zeros(2), SHAPE).classifier
    way = torch.zeros(2, SIZE)
    way[0, 0], way[1, :2] = 0.2, torch.tensor([0.3, 0.4])
    point = (0.5 + way).view(2, *SHAPE)
    zeros = torch.zeros(2, dtype=torch.int64)
    near = Nearest(zeros, zeros + 1, point, point, way.double().norm(dim=1))
    found = cosine_to_normal(model, GREY.expand(2, -1, -1, -1), near)
    np.testing.assert_allclose(found.numpy(), [0.6, 1], atol=1e-6)
    nowhere = Nearest(zeros, zeros, point, point, torch.full((2,), torch.nan, dtype=torch.float64))
    assert cosine_to_normal(model, GREY.expand(2, -1, -1, -1), nowhere).isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_curvatures_are_those_of_the_reference_form(precision):
    model = classifier(Turned(), precision=precision)
    x = around(5, RADIUS)
    found = principal_curvatures(model, x[0], ZERO, ONE, h=0.3)
    np.testing.assert_allclose(found.numpy(), 1 / RADIUS, rtol=1e-3)
    given = torch.zeros(5, dtype=torch.int64), torch.ones((5, 1), dtype=torch.int64)
    mean = mean_curvatures(model, x, *given, h=torch.full((5,), 0.3), directions=3)
    np.testing.assert_allclose(mean.numpy(), 1 / RADIUS, rtol=1e-4)


def test_products_of_directions_are_not_rounded():
    rotation = random_basis(SIZE - 1, 0, torch.device("cpu"))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with MatmulWatch() as watch:
            projected_hessian(sphere(), around(1, RADIUS)[0], ZERO, ONE, h=0.3, rotation=rotation)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert len(watch.allowed) >= 2
    assert not any(watch.allowed)


# --- principal curvatures ----------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [0, 7, SIZE - 1])
def test_the_tangent_frame_is_orthonormal_and_keeps_to_single_inputs(pivot):
    normal = torch.randn(SIZE, generator=torch.Generator().manual_seed(pivot), dtype=torch.float64)
    normal[pivot] = -9.0
    normal /= normal.norm()
    frame = tangent_frame(normal)
    assert frame.shape == (SIZE - 1, SIZE)
    torch.testing.assert_close(frame @ frame.T, torch.eye(SIZE - 1, dtype=torch.float64))
    assert float((frame @ normal).abs().max()) < 1e-12
    single = torch.eye(SIZE, dtype=torch.float64)[pivot]
    expected = torch.eye(SIZE, dtype=torch.float64)[torch.arange(SIZE) != pivot]
    assert torch.equal(tangent_frame(single), expected)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("own", "other", "sign"), [(ZERO, ONE, 1), (ONE, ZERO, -1)])
def test_a_sphere_bends_towards_its_inside_by_one_over_its_radius(own, other, sign, rotated):
    rotation = random_basis(SIZE - 1, 3, torch.device("cpu")) if rotated else None
    found = principal_curvatures(sphere(), around(1, RADIUS)[0], own, other, h=0.3, rotation=rotation)
    np.testing.assert_allclose(found.numpy(), sign / RADIUS, rtol=2e-4)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_quadric_has_the_eigenvalues_of_its_projected_matrix(seed, rotated):
    matrix, slope, expected = quadric(seed)
    rotation = random_basis(SIZE - 1, seed, torch.device("cpu")) if rotated else None
    told = []
    model = classifier(Quadric(matrix, slope), batch_size=6)
    found = principal_curvatures(model, GREY[0], ZERO, ONE, h=0.4, rotation=rotation, advance=told.append)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert sum(told) == 2 * (SIZE - 1)


def test_the_boundary_has_no_curvature_where_it_is_flat_and_none_at_all_without_a_gradient(affine):
    weight = np.random.default_rng(0).normal(size=(3, SIZE))
    model = affine(weight, np.zeros(3), SHAPE).classifier
    assert float(principal_curvatures(model, GREY[0], ZERO, ONE, h=0.3).abs().max()) < 1e-5
    flat = affine(np.zeros((3, SIZE)), [1.0, 0.0, 0.0], SHAPE).classifier
    assert principal_curvatures(flat, GREY[0], ZERO, ONE, h=0.3).isnan().all()
    others, h = torch.tensor([[1, 2]]), torch.tensor([0.3])
    assert mean_curvatures(flat, GREY, torch.tensor([0]), others, h=h, directions=3).isnan().all()


# --- mean curvature ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "own", "other", "sign"), [(0.3, 0, 1, 1), (RADIUS, 0, 1, 1), (0.8, 1, 0, -1)]
)
def test_the_mean_curvature_of_a_spheres_level_sets_is_exact(radius, own, other, sign):
    """Every direction bends alike, so that one suffices; a level set through x is a sphere through x."""
    x = around(6, radius)
    given = torch.full((6,), own), torch.full((6, 1), other)
    found = mean_curvatures(sphere(), x, *given, h=torch.full((6,), 0.2), directions=1)
    np.testing.assert_allclose(found[:, 0].numpy(), sign / radius, rtol=1e-3)


@pytest.mark.parametrize("along", [0.0, 60.0])
def test_the_mean_curvature_of_a_quadric_is_the_mean_of_the_principal_ones(along):
    """Curvature along the normal is no curvature of the boundary, however large it is."""
    matrix, slope, expected = quadric(4)
    normal = slope / np.linalg.norm(slope)
    matrix = matrix + along * np.outer(normal, normal)
    n = 200
    noise, h = Noise.for_rows(n, seed=1), torch.full((n,), 0.4)
    model = classifier(Quadric(matrix, slope))
    given = torch.zeros(n, dtype=torch.int64), torch.ones((n, 1), dtype=torch.int64)
    found = mean_curvatures(model, GREY.expand(n, -1, -1, -1), *given, h=h, directions=50, noise=noise)[:, 0]
    assert float(found.mean()) == pytest.approx(expected.mean(), abs=4 * float(found.std()) / n**0.5)
    assert float(found.std()) > 0  # directions differ from row to row
    assert 4 * float(found.std()) / n**0.5 < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("others", "most"), [([1], 1e-3), ([2], 1e-3), ([1, 2], 0.05)])
def test_a_flat_boundary_has_no_mean_curvature_however_far_the_step(others, most):
    """At this step the wall bends three times as much along its normal as its Hessian says."""
    n, h = 20, 0.5
    given = torch.zeros(n, dtype=torch.int64), torch.tensor(others).expand(n, -1)
    found = mean_curvatures(
        classifier(Wall(), 3), GREY.expand(n, -1, -1, -1), *given, h=torch.full((n,), h), directions=100
    )
    assert float(found.mean(0).abs().max()) < most
    assert float(principal_curvatures(classifier(Wall(), 3), GREY[0], ZERO, ONE, h=h).abs().max()) < 1e-3


def test_a_boundary_is_curved_as_it_is_whatever_function_of_the_logits_draws_it():
    x = around(5, RADIUS)
    given = torch.zeros(5, dtype=torch.int64), torch.ones((5, 1), dtype=torch.int64)
    h = torch.full((5,), 0.1)
    bent = sphere(lambda f: 0.5 * (2 * f).exp() - 0.5)  # same zeros, another Hessian
    plain = mean_curvatures(sphere(), x, *given, h=h, directions=5)
    other = mean_curvatures(bent, x, *given, h=h, directions=5)
    torch.testing.assert_close(other, plain, rtol=0.02, atol=0)
    assert float((plain - 2).abs().max()) < 0.01


def test_classes_and_rows_do_not_touch_each_other(digits_net, digits_test):
    x = digits_test[0][:9]
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8), batch_size=4)
    ranked = model.logits(x).topk(4, dim=1).indices
    own, others = ranked[:, 0], ranked[:, 1:]
    h, noise = torch.linspace(0.2, 1, 9), Noise.for_rows(9)
    whole = mean_curvatures(model, x, own, others, h=h, directions=7, noise=noise)
    for row in range(9):
        one = torch.tensor([row])
        for pair in ([0, 1], [2, 0]):
            alone = mean_curvatures(
                model, x[one], own[one], others[one][:, pair], h=h[one], directions=7, noise=noise[one]
            )
            torch.testing.assert_close(alone[0], whole[row, pair], rtol=1e-3, atol=1e-4)


def test_swapping_the_labels_turns_the_sign(digits_net, digits_test):
    x = digits_test[0][:20]
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    near = nearest_boundary(model, x)
    h = near.distance.float()
    one = mean_curvatures(model, near.point, near.own, near.other[:, None], h=h, directions=20)
    two = mean_curvatures(model, near.point, near.other, near.own[:, None], h=h, directions=20)
    torch.testing.assert_close(two, -one, rtol=1e-3, atol=1e-4)


def test_float32_is_enough_for_networks(digits_net, digits_test):
    """Second differences lose digits: what is lost must be little beside the scatter of the directions."""
    x = digits_test[0][:30]
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    exact = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    exact.module.double()
    near = nearest_boundary(model, x)
    h = near.distance.float().clamp_min(SHORTEST_STEP)
    given = near.own, near.other[:, None]

    def means(classifier, seed):
        noise = Noise.for_rows(30, seed=seed)
        return mean_curvatures(classifier, near.point, *given, h=h, directions=20, noise=noise)

    class Double:
        batch_size = 30
        value_and_jacobian = staticmethod(model.value_and_jacobian)

        @staticmethod
        def logits(points):
            with torch.no_grad():
                return exact.module(points.double())

    rounding = (means(model, 0) - means(Double, 0)).abs().median()
    scatter = (means(model, 0) - means(model, 1)).abs().median()
    assert 0 < rounding < 0.05 * scatter


# --- detection ---------------------------------------------------------------------------------------


def test_inside_a_sphere_an_image_counts_as_perturbed_and_outside_it_does_not():
    inside = detect(sphere(), around(5, 0.4), h=0.1, directions=5)
    outside = detect(sphere(), around(5, 0.7), h=0.1, directions=5)
    assert (inside.label == 0).all()
    assert (outside.label == 1).all()
    # The mean over both other classes, of which one is flat for label 0 and the sphere itself for label 1.
    np.testing.assert_allclose(inside.score.numpy(), (1 / 0.4 + 0) / 2, rtol=0.02)
    assert (outside.score < -1).all()


def test_an_image_carried_across_a_boundary_is_given_its_label_back():
    x = around(20, 0.55)
    model = sphere()
    before = detect(model, x, h=0.05, directions=5)
    near = nearest_boundary(model, x)
    after = detect(model, near.beyond, h=0.05, directions=5)
    assert (before.label == 1).all()
    assert (before.score < 0).all()
    assert (after.label == 0).all()
    assert (after.score > 0).all()
    assert (after.recovered == 1).all()  # not the flat class 2


@pytest.mark.parametrize(("radius", "own", "sign"), [(0.4, 0, 1), (0.7, 1, -1)])
def test_at_the_boundary_of_a_sphere_it_is_the_spheres_own_curvature(radius, own, sign):
    said = detect(sphere(), around(5, radius), h=0.1, at="boundary", directions=3)
    np.testing.assert_allclose(said.score.numpy(), sign / RADIUS, rtol=1e-2)
    assert (said.label == own).all()
    assert (said.recovered == 1 - own).all()


def test_classes_without_a_gradient_are_left_out_of_the_score(affine):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.cat((Sphere()(x)[:, :2], torch.full((len(x), 1), -5.0)), 1)

    x = torch.cat((around(3, 0.4), around(3, 0.7)))
    said = detect(classifier(Constant(), 3), x, h=0.1, directions=5)
    assert said.classes.tolist() == [1] * 3 + [2] * 3
    np.testing.assert_allclose(said.score[:3].numpy(), 1 / 0.4, rtol=1e-3)
    np.testing.assert_allclose(said.score[3:].numpy(), -1 / 0.7, rtol=0.02)
    flat = affine(np.zeros((2, SIZE)), [1.0, 0.0], SHAPE).classifier
    said = detect(flat, GREY, h=0.1, directions=3)
    assert said.score.isnan().all()
    assert said.classes.tolist() == [0]


def test_without_a_boundary_there_is_no_score(affine):
    model = affine(np.zeros((2, SIZE)), [1.0, 0.0], SHAPE).classifier
    assert detect(model, GREY, h=0.1, at="boundary", directions=3).score.isnan().all()


def test_only_the_candidates_are_looked_at():
    few = detect(sphere(), around(4, 0.4), h=0.1, directions=5, candidates=2)
    np.testing.assert_allclose(few.score.numpy(), 1 / 0.4, rtol=0.02)


def test_noise_is_as_long_as_the_perturbation_and_points_nowhere():
    x, r = around(4, 0.3), around(4, 0.2, seed=1) - 0.5
    shown = versions_of(x, r * torch.arange(1, 5).view(-1, 1, 1, 1), [1, 2.5], Noise.for_rows(4))
    assert list(shown) == ["natural", "noise", "1 r", "2.5 r"]
    added = {kind: (images - x).flatten(1) for kind, images in shown.items()}
    for kind, scale in {"natural": 0, "noise": 1, "1 r": 1, "2.5 r": 2.5}.items():
        expected = 0.2 * scale * np.arange(1, 5)
        np.testing.assert_allclose(added[kind].norm(dim=1).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(added["2.5 r"], 2.5 * added["1 r"], rtol=1e-4, atol=1e-5)
    along = torch.nn.functional.cosine_similarity(added["noise"], added["1 r"])
    assert float(along.abs().max()) < 0.8


def test_auc_counts_pairs():
    assert auc(np.array([0.0, 1]), np.array([2.0, 3])) == 1
    assert auc(np.array([2.0, 3]), np.array([0.0, 1])) == 0
    assert auc(np.array([1.0, 1]), np.array([1.0, 1])) == 0.5
    assert auc(np.array([0.0, 2, 4]), np.array([1.0, 5])) == pytest.approx(4 / 6)


def test_the_interval_resamples_images_with_both_of_their_scores():
    """Each image scores a little more when perturbed: whichever are drawn, the AUC is hardly above 1/2."""
    before = np.arange(40.0)
    low, high = auc_interval(before, before + 0.5, 0)
    assert 0.5 < low < high < 0.55
    assert high - low < 0.02  # images drawn apart would give 0.25


def test_a_threshold_is_judged_on_images_that_it_was_not_chosen_on():
    """Both halves are told apart by a threshold of their own, which says nothing about the other half."""
    natural = np.array([0.0, 10, 0, 10, 0, 10])
    assert best_threshold(natural[::2], natural[::2] + 1) == 0.5
    rate = cross_fitted(natural, natural + 1)
    assert (rate.count, rate.total) == (6, 12)
    rate = cross_fitted(natural, natural + 40)
    assert (rate.count, rate.total) == (12, 12)
    rate = cross_fitted(natural, natural)
    assert (rate.count, rate.total) == (6, 12)
    assert best_threshold(np.array([1.0, 2]), np.array([-1.0, 0])) == -np.inf


# --- the commands ------------------------------------------------------------------------------------


def grey_but_one(tmp_path, monkeypatch, code, first, classes=3):
    """A model of your own for images of 6 x 6, grey but for the first pixel: its values, of 255."""
    x = np.full((len(first), 6, 6, 1), 128, dtype=np.uint8)
    x[:, 0, 0, 0] = first
    return toy(tmp_path, monkeypatch, f"toy_{abs(hash(code))}", code, x, classes)


def shown(output: str) -> list[str]:
    """The table on the terminal, without progress and paths."""
    return [
        line for line in output.splitlines() if line.startswith(("model ", "digits_normal ", "digits_cure "))
    ]


def scores_of(*parts):
    """Scores of kinds of images, in the order of the first."""
    ids = parts[0]["sample_id"]
    return [part.set_index("sample_id").loc[ids, "score"].to_numpy() for part in parts]


FEW = ("--model", "digits_normal", "--model", "digits_cure", "--n", "12", "--directions", "10")


@pytest.mark.parametrize("at", ["image", "boundary"])
def test_detect_writes_what_the_scores_say(tmp_path, at):
    run = invoke("detect", *FEW, "--at", at, "--scales", "1,3", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    assert f'"curvature_at": "the {at}"' in (tmp_path / "a" / "manifest.json").read_text()
    table = pd.read_csv(tmp_path / "a" / "detect.csv").set_index(["model", "perturbed_by"])
    images = pd.read_csv(tmp_path / "a" / "detect-images.csv").set_index(["model", "kind"])
    for model in ("digits_normal", "digits_cure"):
        natural = images.loc[(model, "natural")]
        one, three = images.loc[(model, "1 r")], images.loc[(model, "3 r")]
        assert (natural["label"] == natural["natural_label"]).all()
        assert (one["label"] != one["natural_label"]).all()  # carried past the boundary
        lowest = np.minimum(one["score"].to_numpy(), three["score"].to_numpy())
        assert sorted(images.loc[(model, "chosen r")]["score"]) == sorted(lowest)
        for kind in ("noise", "1 r", "3 r", "chosen r"):
            row, part = table.loc[(model, kind)], images.loc[(model, kind)]
            truth = np.repeat([0, 1], len(part))
            both = np.concatenate([natural["score"], part["score"]])
            assert row["auc"] == pytest.approx(roc_auc_score(truth, both))
            assert row["ci_low"] <= row["auc"] <= row["ci_high"]
            assert row["ci_low"] < row["ci_high"] or row["auc"] in (0, 1)
            assert row["flagged"] == pytest.approx((part["score"] >= 0).mean())
            assert row["false_alarms"] == pytest.approx((natural["score"] >= 0).mean())
            caught = part[(part["score"] >= 0) & (part["label"] != part["natural_label"])]
            assert row["recovered_n"] == len(caught)
            assert row["flagged_ci_low"] <= row["flagged"] <= row["flagged_ci_high"]
            assert row["n"] + row["left_out"] == 12
            assert row["best_accuracy"] * 2 * row["n"] == pytest.approx(
                cross_fitted(*scores_of(natural, part)).count
            )
            if len(caught):
                right = (caught["recovered"] == caught["natural_label"]).mean()
                assert row["recovered"] == pytest.approx(right)
            assert f"{row['auc']:.2f}" in run.output
    assert max(map(len, shown(run.output))) <= 80 - len("resnet18s_deepfool") + len("digits_normal")
    assert max(len(line) for line in run.output.splitlines() if str(tmp_path) not in line) <= 80


def test_the_step_of_the_detector_is_the_usual_distance_and_noise_is_the_images_own(tmp_path):
    invoke("detect", "--model", "digits_cure", "--n", "12", "--directions", "10", "--scales", "1",
           "--batch-size", "5", "--out", str(tmp_path / "a"))  # fmt: skip
    images = pd.read_csv(tmp_path / "a" / "detect-images.csv")
    data, model = load_dataset("digits").subset(12), load_model("digits_cure", precision="fp32")
    near = nearest_boundary(model, data.images)
    h = float(near.distance.median())
    assert pd.read_csv(tmp_path / "a" / "detect.csv")["step"].to_numpy() == pytest.approx(h, rel=1e-5)
    for kind, x in {"natural": data.images, "1 r": near.beyond}.items():
        noise = Noise.for_samples(0, f"detect/{kind}", data.ids)
        said = detect(model, x, h=h, directions=10, noise=noise)
        part = images[images["kind"] == kind]
        np.testing.assert_allclose(part["score"], said.score.numpy(), rtol=0.01, atol=1e-3)


ISLAND = """
import torch

class Island(torch.nn.Module):
    def forward(self, x):
        square = (x - 128 / 255).flatten(1).square().sum(1)
        sphere = (square - 0.25**2).clamp(max=0.5**2 - 0.25**2)
        return torch.stack((0 * sphere, sphere, 0 * sphere - 9), 1)

def build(): return Island()
"""


@pytest.mark.parametrize(("near", "known"), [([180, 183, 185, 187], 4), ([180], 1), ([], 0)])
def test_images_without_a_score_are_counted_and_left_out(tmp_path, monkeypatch, near, known):
    """Five times as far as the boundary: from near it still on the slope, from afar where all is flat."""
    given = grey_but_one(tmp_path, monkeypatch, ISLAND, [140, 145, 150, *near])
    run = invoke("detect", *given, "--directions", "5", "--scales", "5", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "detect.csv").set_index("perturbed_by")
    for kind in ("5 r", "chosen r"):
        row = table.loc[kind]
        assert (row["n"], row["left_out"]) == (known, 3)
        assert np.isnan(row["auc"]) == np.isnan(row["ci_low"]) == np.isnan(row["best_accuracy"])
        assert np.isnan(row["auc"]) == (known < 2)
    images = pd.read_csv(tmp_path / "a" / "detect-images.csv")
    assert (images.loc[images["kind"] == "natural", "classes"] == 1).all()  # one has no gradient


COAST = """
import torch

class Coast(torch.nn.Module):
    def forward(self, x):
        u = (x - 128 / 255).flatten(1)
        value = u.square().sum(1) - 0.4**2
        value = torch.where(u[:, 0] > 0.1, 0 * value - 1, value)
        return torch.stack((0 * value, value), 1)

def build(): return Coast()
"""


def test_only_known_curvatures_are_counted(tmp_path, monkeypatch):
    """Three images within a sphere, two where nothing is near."""
    given = grey_but_one(tmp_path, monkeypatch, COAST, [60, 80, 100, 200, 220], 2)
    run = invoke("boundary", *given, "--no-profile", "--directions", "3", "--out", str(tmp_path / "a"))
    row = pd.read_csv(tmp_path / "a" / "boundary.csv").iloc[0]
    assert (row["n"], row["of"], row["natural_n"], row["perturbed_n"]) == (3, 5, 3, 3)
    assert row["natural_mean"] == pytest.approx(1 / 0.4, rel=1e-3)
    assert row["perturbed_mean"] == pytest.approx(-1 / 0.4, rel=1e-3)
    assert row["natural_expected"] == row["perturbed_expected"] == 0
    assert row["cosine"] == pytest.approx(1, abs=1e-4)
    assert run.output.count("0/3") == 2


def test_curvatures_are_those_of_each_image_and_of_it_carried_across_whatever_the_batch(tmp_path):
    invoke("boundary", "--model", "digits_normal", "--n", "12", "--directions", "10", "--no-profile",
           "--batch-size", "5", "--out", str(tmp_path / "a"))  # fmt: skip
    images = pd.read_csv(tmp_path / "a" / "boundary-images.csv")
    data, model = load_dataset("digits").subset(12), load_model("digits_normal", precision="fp32")
    near = nearest_boundary(model, data.images)
    for side, place in {"natural": near, "perturbed": nearest_boundary(model, near.beyond)}.items():
        noise = Noise.for_samples(0, f"boundary/{side}", data.ids)
        given, h = (place.own, place.other[:, None]), near.distance.float()
        expected = mean_curvatures(model, place.point, *given, h=h, directions=10, noise=noise)[:, 0]
        np.testing.assert_allclose(images[side], expected.numpy(), rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(images["cosine"], cosine_to_normal(model, data.images, near), atol=1e-4)
    assert images["cosine"].median() < 0.99  # DeepFool is not quite at the nearest point


@pytest.mark.parametrize(
    ("verb", "changes"),
    [
        ("boundary", [["--step", "0.3"], ["--seed", "1"], ["--directions", "3"]]),
        ("detect", [["--step", "0.3"], ["--seed", "1"], ["--scales", "1,2"], ["--at", "boundary"]]),
    ],
)
def test_unfinished_work_of_another_measurement_is_refused(tmp_path, verb, changes):
    given = ["--model", "digits_normal", "--n", "3", "--directions", "2", "--out", str(tmp_path / "a")]
    given += ["--no-profile"] if verb == "boundary" else []
    invoke(verb, *given)
    (tmp_path / "a" / "manifest.json").unlink()
    for change in changes:
        with pytest.raises(UsageError, match="of another measurement"):
            invoke(verb, *given, *change)


def test_unfinished_work_on_other_weights_is_refused(tmp_path, monkeypatch):
    given = (*grey_but_one(tmp_path, monkeypatch, WEIGHTED, [140, 180], 2), "--directions", "2")
    monkeypatch.setenv("TOY", "1")
    invoke("boundary", *given, "--out", str(tmp_path / "a"))
    (tmp_path / "a" / "manifest.json").unlink()
    monkeypatch.setenv("TOY", "2")
    with pytest.raises(UsageError, match="of another measurement"):
        invoke("boundary", *given, "--out", str(tmp_path / "a"))


def test_boundary_writes_distances_and_curvatures(tmp_path):
    run = invoke("boundary", *FEW[:-1], "200", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    images = pd.read_csv(tmp_path / "a" / "boundary-images.csv")
    table = pd.read_csv(tmp_path / "a" / "boundary.csv").set_index("model")
    for model, part in images.groupby("model"):
        with np.load(tmp_path / "a" / f"curvatures-{model}.npz") as kept:
            values = kept["curvatures"]
        assert values.shape == (12, 63)
        assert (np.diff(values, axis=1) <= 0).all()
        np.testing.assert_allclose(part["largest"], values[:, 0], rtol=1e-5)
        np.testing.assert_allclose(part["smallest"], values[:, -1], rtol=1e-5)
        # Two estimates of one thing: all curvatures, and second differences along random directions.
        assert np.corrcoef(values.mean(1), part["natural"])[0, 1] > 0.9
        row = table.loc[model]
        assert row["natural_expected"] == pytest.approx((part["natural"] < 0).mean())
        assert row["perturbed_expected"] == pytest.approx((part["perturbed"] > 0).mean())
        # Seen from the other side the boundary bends the other way.
        assert np.corrcoef(part["natural"], part["perturbed"])[0, 1] < -0.5
        np.testing.assert_allclose(part["step"], part["distance"].clip(lower=SHORTEST_STEP), rtol=1e-6)
    assert max(map(len, shown(run.output))) <= 80 - len("resnet18s_deepfool") + len("digits_normal")
    assert max(len(line) for line in run.output.splitlines() if str(tmp_path) not in line) <= 80


def test_without_a_profile_only_means_are_taken(tmp_path):
    invoke("boundary", *FEW, "--no-profile", "--step", "0.5", "--out", str(tmp_path / "a"))
    images = pd.read_csv(tmp_path / "a" / "boundary-images.csv")
    assert "largest" not in images
    assert (images["step"] == 0.5).all()
    assert not (tmp_path / "a" / "profile.svg").exists()
    assert "none asked for" in (tmp_path / "a" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("verb", "module", "function", "files"),
    [
        ("detect", detection_study, "detect", ("detect.csv", "detect-images.csv", "detect.svg")),
        ("boundary", boundary_study, "principal_curvatures", ("boundary.csv", "profile.csv", "profile.svg")),
    ],
)
def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch, verb, module, function, files):
    monkeypatch.setattr("robustbench_cure.files.INTERVAL", 0.0)
    invoke(verb, *FEW, "--out", str(tmp_path / "whole"))
    real, calls = getattr(module, function), []

    def stops(*given, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(module, function, stops)
    CliRunner().invoke(cli, [verb, *FEW, "--device", "cpu", "--out", str(tmp_path / "parts")])
    assert len(calls) == 4
    assert not (tmp_path / "parts" / "manifest.json").exists()
    again = []
    monkeypatch.setattr(module, function, lambda *g, **m: again.append(1) or real(*g, **m))
    assert invoke(verb, *FEW, "--out", str(tmp_path / "parts")).exit_code == 0
    whole = 10 if verb == "detect" else 24
    assert len(again) == whole - 3  # what was finished was not done again
    for name in files:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("detect", ["--scales", "0.5"], "--scales 0.5: must ascend from 1"),
        ("detect", ["--scales", "5,1"], "--scales 5,1: must ascend from 1"),
        ("detect", ["--scales", "one"], "--scales one: numbers"),
        ("detect", ["--scales", "1,nan"], "--scales 1,nan"),
        ("detect", ["--step", "0"], "--step 0: must be positive"),
        ("detect", ["--n", "1"], "at least 2"),
        ("detect", ["--scales", "1,1e300"], "--scales 1,1e300: must ascend from 1 or more to 1,000"),
        ("detect", ["--step", "1e300"], "--step: longer than the diagonal of the images' box, 8 pixels"),
        ("boundary", ["--step", "-1"], "--step -1: must be positive"),
        ("boundary", ["--step", "8.1"], "--step: longer than the diagonal of the images' box, 8 pixels"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tmp_path, verb, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke(verb, "--model", "digits_normal", *arguments, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_constant_model_has_nothing_to_detect(tmp_path, monkeypatch):
    (tmp_path / "constant.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.one_hot(x.new_zeros(len(x)).long(), 10).float() + 0 * x.sum()\n"
        "def build(): return Net()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = "constant:build"
    with pytest.raises(UsageError, match="finds no boundary"):
        invoke("detect", "--model", model, "--dataset", "digits", "--n", "5", "--out", str(tmp_path / "a"))
    run = invoke(
        "boundary", "--model", model, "--dataset", "digits", "--n", "5", "--out", str(tmp_path / "b")
    )
    assert run.exit_code == 0
    assert "0/0" in run.output
