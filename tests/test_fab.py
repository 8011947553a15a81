"""FAB-T: its projection against float64 references, its steps against pyautoattack, and what it returns."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from pyautoattack.fab_projections import projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from scipy.optimize import brentq, linprog
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, fab
from robustbench_cure.attacks.box_projection import box_projection
from robustbench_cure.attacks.fab import boundary_step
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier, has_bf16
from robustbench_cure.threat import ThreatModel

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
SHAPE = (1, 8, 8)
THEIRS = {"linf": "Linf", "l2": "L2"}


# --- the projection ----------------------------------------------------------------------------------


def length(norm, d):
    return np.abs(d).max(-1) if norm == "linf" else np.linalg.norm(d, axis=-1)


def shortest_length(norm, x, w, rise) -> float:
    """Of d with w . d = rise and x + d in [0, 1], in float64; NaN where there is none."""
    if norm == "linf":  # minimise t over (d, t) with |d_i| <= t
        n = len(x)
        sides = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
        bounds = [*zip(-x, 1 - x, strict=True), (0, None)]
        equal = np.append(w, 0.0)[None]
        found = linprog(
            np.eye(n + 1)[-1], A_ub=sides, b_ub=np.zeros(2 * n), A_eq=equal, b_eq=[rise], bounds=bounds
        )
        return found.fun if found.success else np.nan

    def excess(multiplier):
        return w @ (np.clip(x + multiplier * w, 0, 1) - x) - rise

    far = 1e6
    if excess(-far) > 0 or excess(far) < 0:
        return np.nan
    return float(np.linalg.norm(np.clip(x + brentq(excess, -far, far, xtol=1e-14) * w, 0, 1) - x))


def problems(n: int, size: int, *, seed: int = 0):
    """Points with pixels on the border, normals with zeros, hyperplanes near, far and out of reach."""
    generator = np.random.default_rng(seed)
    x = generator.random((n, size))
    x = np.where(generator.random(x.shape) < 0.3, x.round(), x)
    w = generator.standard_normal((n, size)) * np.where(generator.random((n, size)) < 0.2, 0, 1)
    w *= 10 ** generator.uniform(-1, 1, (n, size))
    rise = np.abs(w).sum(1) * generator.uniform(-0.9, 0.9, n) * 10 ** generator.uniform(-1, 0, n)
    return x, w, rise


@both_norms
def test_projection_is_the_shortest_in_the_box(norm):
    x, w, rise = problems(300, 7)
    d = box_projection(norm, *(torch.from_numpy(part) for part in (x, w, rise))).numpy()
    best = np.array([shortest_length(norm, *row) for row in zip(x, w, rise, strict=True)])
    exists = np.isfinite(best)
    assert 30 < (~exists).sum() < 200
    assert ((x + d >= -1e-15) & (x + d <= 1 + 1e-15)).all()
    np.testing.assert_allclose((w * d).sum(1)[exists], rise[exists], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(length(norm, d)[exists], best[exists], rtol=1e-7, atol=1e-8)
    # Out of reach: every pixel with a slope is where the box ends.
    corner = np.where(w * rise[:, None] > 0, 1, 0)
    expected = np.where(w != 0, corner, x)
    np.testing.assert_allclose((x + d)[~exists], expected[~exists], atol=1e-15)


@both_norms
def test_projection_in_float32_is_that_in_float64(norm):
    exact = [torch.from_numpy(part) for part in problems(64, 3072, seed=1)]
    d, expected = box_projection(norm, *(part.float() for part in exact)), box_projection(norm, *exact)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        (d * exact[1]).sum(1), (expected * exact[1]).sum(1), rtol=1e-5, atol=1e-5
    )  # both stay short where the hyperplane is out of reach


@both_norms
def test_projection_is_that_of_pyautoattack(norm):
    x, w, rise = (torch.from_numpy(part).float() for part in problems(128, 3072, seed=2))
    rise *= 0.5  # theirs is wrong by 1e-2 where all but a few pixels have stopped
    theirs = (projection_linf if norm == "linf" else projection_l2)(x, w, (w * x).sum(1) + rise)
    torch.testing.assert_close(box_projection(norm, x, w, rise), theirs, rtol=0, atol=1e-4)


@both_norms
@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_projection_does_not_depend_on_the_length_of_the_normal(norm, factor):
    x, w, rise = (torch.from_numpy(part).float() for part in problems(50, 20, seed=3))
    scaled = box_projection(norm, x, w * factor, rise * factor)
    torch.testing.assert_close(scaled, box_projection(norm, x, w, rise), rtol=1e-4, atol=1e-5)


@both_norms
def test_projection_of_nothing_is_zero(norm):
    x, w = torch.rand(5, 6), torch.randn(5, 6)
    w[0] = 0
    rise = torch.tensor([1.0, 0.0, torch.nan, torch.inf, -torch.inf])
    d = box_projection(norm, x, w, rise)
    assert d.isfinite().all()
    assert (d[:3] == 0).all()
    torch.testing.assert_close((x + d)[3], (w[3] > 0).float())
    torch.testing.assert_close((x + d)[4], (w[4] < 0).float())
    assert box_projection(norm, x[:0], w[:0], rise[:0]).shape == (0, 6)


# --- the steps, against pyautoattack -----------------------------------------------------------------


class Theirs(FABAttack_PT):
    """Keeps the iterates, before they are pulled back."""

    def _get_predicted_label(self, x):
        self.iterates = [*getattr(self, "iterates", []), x.clone()]
        return super()._get_predicted_label(x)


def watched(classifier):
    """Points that are linearised, and points whose label is asked, in order."""
    linearised, labelled = [], []
    gradient, label = classifier.value_and_gradient, classifier.search_logits

    def value_and_gradient(x, loss, **options):
        linearised.append(x.clone())
        return gradient(x, loss, **options)

    def search_logits(x):
        labelled.append(x.clone())
        return label(x)

    classifier.value_and_gradient, classifier.search_logits = value_and_gradient, search_logits
    return linearised, labelled


@pytest.fixture(scope="module")
def data(digits_test, digits_net):
    x, y = digits_test[0][:30].clone(), digits_test[1][:30].clone()
    right = digits_net(x).argmax(1) == y
    return x[right], y[right]


def network(net, **options) -> Classifier:
    return Classifier(net, **({"num_classes": 10, "input_shape": SHAPE} | options))


@both_norms
def test_iterates_are_those_of_pyautoattack(digits_net, data, norm):
    x, y = data
    classifier, steps = network(digits_net), 6
    linearised, labelled = watched(classifier)
    fab(classifier, x, y, threat=ThreatModel.parse(norm, "1/1000"), steps=steps, targets=2)
    peer = Theirs(copy.deepcopy(digits_net), norm=THEIRS[norm], n_iter=steps, targeted=True)
    pulled = kept = 0
    for rank in range(2):
        peer.iterates, peer.target_class = [], rank + 2
        peer.attack_single_run(x, y, is_targeted=True)
        ours = labelled[rank * steps : (rank + 1) * steps]
        for number, (one, other) in enumerate(zip(ours, peer.iterates[1:], strict=True)):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * 2**number)
            lost = digits_net(other).argmax(1) != y
            pulled, kept = pulled + int(lost.sum()), kept + int((~lost).sum())
        torch.testing.assert_close(linearised[rank * steps], x)
    assert pulled > 20
    assert kept > 20


@both_norms
def test_one_step_from_anywhere_is_that_of_pyautoattack(digits_net, data, norm):
    """Each step from where they were, so that nothing adds up; the widest alpha and a longer overshoot."""
    x, y = data
    options = {"alpha_max": 0.4, "eta": 1.3}
    peer = Theirs(copy.deepcopy(digits_net), norm=THEIRS[norm], n_iter=12, beta=0.7, **options)
    peer.targeted, peer.target_class = True, 2
    peer.attack_single_run(x, y, is_targeted=True)
    target = digits_net(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    rows = torch.arange(len(x))
    for before, after in zip(peer.iterates[1:], peer.iterates[2:], strict=False):
        lost = (digits_net(before).argmax(1) != y).view(-1, 1, 1, 1)
        here = torch.where(lost, x + 0.7 * (before - x), before).requires_grad_(True)
        logits = digits_net(here)
        gap = logits[rows, target] - logits[rows, y]
        (slope,) = torch.autograd.grad(gap.sum(), here)
        ahead = boundary_step(norm, x, here.detach(), gap.detach(), slope, **options)
        torch.testing.assert_close(ahead, after, rtol=0, atol=1e-4)
        assert (ahead != x).any()


@pytest.mark.parametrize(("norm", "eps"), [("linf", "51/255"), ("l2", "3/5")])
def test_robust_rows_are_those_of_pyautoattack(norm, eps):
    images = load_dataset("digits", "test")
    x, y = images.images[:150], images.labels[:150]
    classifier, threat = load_model("digits_pgd_at", precision="fp32"), ThreatModel.parse(norm, eps)
    found = fab(classifier, x, y, threat=threat, steps=15, targets=3)
    ours = classifier.logits(found.x_adv).argmax(1) == y
    peer = FABAttack_PT(
        copy.deepcopy(classifier.module), norm=THEIRS[norm], eps=threat.radius, n_iter=15, targeted=True,
        n_target_classes=3,
    )  # fmt: skip
    x_adv = peer.perturb(x, y)
    theirs = (classifier.logits(x_adv).argmax(1) == y) | ~threat.contains(x, x_adv)
    assert 20 < theirs.sum() < 140
    assert (ours & ~theirs).sum() <= 1
    assert (ours ^ theirs).sum() <= 3  # ours also projects the nearest point onto the ball


# --- closed forms where the box is in the way --------------------------------------------------------


@both_norms
@pytest.mark.parametrize("classes", [2, 3])
def test_fab_brackets_the_exact_radius_inside_the_box(affine, judge, norm, classes):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((classes, 16))
    x = torch.from_numpy(generator.random((8, 1, 4, 4)).astype(np.float32))
    x[:, :, :2] = x[:, :, :2].round()  # half of the pixels are 0 or 1
    model = affine(weight, -weight @ np.full(16, 0.5), (1, 4, 4))
    y = torch.from_numpy(model.logits(x).argmax(1))
    detours = []
    for row in range(len(x)):
        one, label = x[row : row + 1], y[row : row + 1]
        flat = one.flatten().double().numpy()
        logits = model.logits(one)[0]
        faces = [
            shortest_length(
                norm, flat, model.weight[k] - model.weight[label.item()], logits[label] - logits[k]
            )
            for k in range(classes)
            if k != label
        ]
        radius = np.nanmin(faces)
        detours.append(radius / model.radii(one, label, norm).min())
        for factor, expected in ((1.01, True), (0.999, False)):
            threat = ThreatModel(norm, Fraction(float(radius * factor)))
            found = fab(model.classifier, one, label, threat=threat, steps=20, targets=classes - 1)
            assert judge(model.classifier.module, one, label, found.x_adv, norm, threat.radius) == [expected]
    assert np.median(detours) > 1.02  # the box does count


# --- what comes back, and what it costs --------------------------------------------------------------


def ramp(affine, **options):
    """Two classes and a third far below; label 0 is lost where the mean pixel exceeds 0.6."""
    weight = np.zeros((3, 64))
    weight[1] = 1 / 64
    weight[2, 0] = 1e-3
    return affine(weight, [0.6, 0.0, -100.0], SHAPE, **options)


GREY = torch.full((2, *SHAPE), 0.5)
LABELS = torch.zeros(2, dtype=torch.int64)


def test_work_is_two_forwards_and_one_backward_a_step(affine):
    """And one forward for the ranks, one for each claim, and one for the nearest point, on the ball."""
    model = ramp(affine).classifier
    for steps, restarts, targets in ((3, 1, 1), (2, 3, 1), (2, 2, 2)):
        starts = restarts * targets
        found = fab(
            model, GREY, LABELS, threat=ThreatModel.parse("linf", "1/20"), steps=steps, restarts=restarts,
            targets=targets,
        )  # fmt: skip
        assert found.backwards.tolist() == [steps * starts] * 2
        assert found.forwards.tolist() == [2 + 2 * steps * starts] * 2
    found = fab(model, GREY, LABELS, threat=ThreatModel.parse("linf", "0.106"), steps=9, targets=2)
    assert (found.forwards.tolist(), found.backwards.tolist()) == ([4, 4], [1, 1])
    assert found.steps.tolist() == [1, 1]
    torch.testing.assert_close(found.x_adv, GREY + 1.05 * 0.1)  # a step ends eta of the way
    wrong = fab(model, GREY, LABELS + 1, threat=ThreatModel.parse("linf", "1/20"), steps=9, targets=2)
    assert (wrong.forwards.tolist(), wrong.backwards.tolist()) == ([1, 1], [0, 0])
    assert torch.equal(wrong.x_adv, GREY)


@both_norms
def test_the_nearest_point_is_tried_on_the_ball(affine, norm):
    """A step that overshoots by half ends outside this ball every time."""
    model, scale = ramp(affine), 1 if norm == "linf" else 8
    threat = ThreatModel(norm, Fraction(0.1005) * scale)
    for stop in ("first-success", "never"):
        options = {"threat": threat, "targets": 1, "eta": 1.5, "stop": stop}
        found = fab(model.classifier, GREY, LABELS, steps=4, **options)
        assert model.logits(found.x_adv).argmax(1).tolist() == [1, 1]
        torch.testing.assert_close(threat.distance(GREY, found.x_adv), torch.full((2,), threat.radius))
        assert (found.steps > 0).all()


@both_norms
def test_never_returns_the_nearest_adversarial_iterate(digits_net, data, norm):
    x, y = data
    threat = ThreatModel.parse(norm, "1/5" if norm == "linf" else "1")
    classifier = network(digits_net)
    _, labelled = watched(classifier)
    options = {"threat": threat, "steps": 8, "targets": 2}
    nearest = fab(classifier, x, y, stop="never", **options)
    assert (nearest.backwards == 16).all()
    points = torch.stack(labelled)
    far = torch.stack([threat.distance(x, each) for each in points])
    lost = torch.stack([digits_net(each).argmax(1) != y for each in points])
    best = far.masked_fill(~lost, torch.inf).amin(0)
    inside = best <= threat.radius
    assert inside.sum() >= 10
    torch.testing.assert_close(threat.distance(x, nearest.x_adv)[inside], best[inside])
    first = fab(network(digits_net), x, y, **options)
    assert (threat.distance(x, first.x_adv) > threat.distance(x, nearest.x_adv) + 1e-3)[inside].any()
    assert (first.backwards < 16)[inside].all()


@both_norms
def test_survivors_get_the_lowest_margin_that_is_known(digits_net, data, norm):
    x, y = data
    threat = ThreatModel.parse(norm, "1/50" if norm == "linf" else "1/10")
    classifier = network(digits_net)
    _, labelled = watched(classifier)
    found = fab(classifier, x, y, threat=threat, steps=5, targets=1)
    reached = margins(classifier.logits(found.x_adv), y)
    survived = reached > 0
    assert survived.sum() > 10
    assert threat.contains(x, found.x_adv).all()
    assert (reached < margins(classifier.logits(x), y) - 1e-3)[survived].float().mean() > 0.9
    for point in labelled:
        if len(point) == len(x):
            inside = survived & threat.contains(x, point)
            assert (reached <= margins(classifier.logits(point), y) + 1e-5)[inside].all()


def test_random_starts_are_half_way_to_what_is_known(affine):
    """Half of eps, or of the distance of the nearest misclassified point where that is less."""
    for norm, scale in (("linf", 1.0), ("l2", 8.0)):
        for eps, stop, expected in (("1/20", "first-success", 1 / 40 / scale), ("1", "never", 0.0525)):
            model = ramp(affine).classifier
            linearised, labelled = watched(model)
            threat = (
                ThreatModel(norm, Fraction(eps)) if norm == "linf" or eps == "1/20" else ThreatModel(norm, 8)
            )
            fab(
                model, GREY, LABELS, threat=threat, steps=1, restarts=3, targets=2, stop=stop,
                noise=Noise.for_rows(2),
            )  # fmt: skip
            assert len(linearised) == 6
            for first in (0, 3):
                assert torch.equal(linearised[first], GREY)
            starts = torch.cat([linearised[k] for k in (1, 2, 4, 5)])
            far = threat.distance(GREY[:1].expand_as(starts), starts)
            torch.testing.assert_close(far, torch.full((8,), expected * scale), rtol=1e-4, atol=0)
            assert len(starts.flatten(1).unique(dim=0)) == 8
            # All starts for one target come before those for the next, which is out of reach.
            lost = [bool((model.logits(each).argmax(1) == 1).all()) for each in labelled]
            assert lost == [True] * 3 + [False] * 3


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16")
@both_norms
def test_the_search_is_in_float32_whatever_the_precision(digits_net, data, norm):
    options = {"threat": ThreatModel.parse(norm, "1/10"), "steps": 6, "targets": 3, "restarts": 2}
    exact, coarse = (fab(network(digits_net, precision=p), *data, **options) for p in ("fp32", "bf16"))
    for field in ("x_adv", "steps", "forwards", "backwards"):
        assert torch.equal(getattr(exact, field), getattr(coarse, field))


# --- networks that give nothing to go by -------------------------------------------------------------


class Given(nn.Module):
    """Logits of the caller's own function of the images."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


HOPELESS = {
    "constant": lambda x: torch.tensor([3.0, 2.0, 1.0]).expand(len(x), 3),
    "flat": lambda x: torch.tensor([3.0, 2.0, 1.0]) + 0 * x[:, :3],
    "steps": lambda x: torch.stack((2 + 0 * x[:, 0], x.round().mean(1), x.mean(1).round()), 1),
}


@both_norms
@pytest.mark.parametrize("name", HOPELESS)
def test_zero_gradients_end_a_start_and_give_no_nan(norm, name):
    classifier = Classifier(Given(HOPELESS[name]), num_classes=3, input_shape=SHAPE)
    options = {"threat": ThreatModel.parse(norm, "1/10"), "steps": 50, "targets": 2}
    found = fab(classifier, GREY, LABELS, **options)
    assert torch.equal(found.x_adv, GREY)
    assert found.backwards.tolist() == [2, 2]  # one for each target: an iterate that stays ends its start
    found = fab(classifier, GREY, LABELS, restarts=2, **options)
    assert found.x_adv.isfinite().all()
    assert options["threat"].contains(GREY, found.x_adv).all()


@both_norms
@pytest.mark.parametrize("trouble", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_give_finite_images(norm, trouble):
    def function(x):
        mean = x.mean(1)
        return torch.stack((0.53 - mean, 0 * mean, torch.where(mean > 0.52, trouble, -9.0)), 1)

    classifier = Classifier(Given(function), num_classes=3, input_shape=SHAPE)
    for eps, lost in (("1/100", False), ("1/2" if norm == "linf" else "4", True)):
        threat = ThreatModel.parse(norm, eps)
        found = fab(classifier, GREY, LABELS, threat=threat, steps=5, targets=2, restarts=2)
        assert found.x_adv.isfinite().all()
        assert threat.contains(GREY, found.x_adv).all()
        assert (~classifier.logits(found.x_adv).isfinite()).any(1).tolist() == [lost] * 2


@pytest.mark.parametrize("targets", [3, 9])
def test_targets_are_all_other_classes_where_more_are_asked_for(affine, targets):
    model, threat = ramp(affine).classifier, ThreatModel.parse("l2", "1/20")
    every, more = (fab(model, GREY, LABELS, threat=threat, steps=3, targets=k) for k in (2, targets))
    assert torch.equal(every.x_adv, more.x_adv)
    assert torch.equal(every.forwards, more.forwards)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"restarts": 0}, {"targets": 0}, {"targets": -1}])
def test_no_steps_and_no_starts_are_refused(affine, wrong):
    options = {"threat": ThreatModel("l2", 1), "steps": 1, "targets": 1} | wrong
    with pytest.raises(ValueError, match="at least 1 each"):
        fab(ramp(affine).classifier, GREY, LABELS, **options)


@pytest.mark.parametrize(
    ("margin", "reached"),
    [
        (lambda mean: 0.05 + 0.1 * (-10 * (mean - 0.5)).exp(), 0.5 + 1.05 * 0.15),  # falls, and is never lost
        (lambda mean: torch.where(mean < 0.505, 0.8 - mean, torch.where(mean < 0.8, 1.0, -1.0)), 0.5),
    ],
    ids=["an iterate in the ball", "the image, where the margin rises on the way to the boundary"],
)
def test_survivors_get_the_point_of_lowest_margin_of_each_kind(margin, reached):
    def function(x):
        z = margin(x.mean(1))
        return torch.stack((z, 0 * z), 1)

    classifier = Classifier(Given(function), num_classes=2, input_shape=SHAPE)
    found = fab(classifier, GREY, LABELS, threat=ThreatModel.parse("linf", "1/5"), steps=1, targets=1)
    torch.testing.assert_close(found.x_adv, torch.full_like(GREY, reached))
    assert found.steps.tolist() == [int(reached != 0.5)] * 2
