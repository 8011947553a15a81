"""Attacks on models whose exact robustness is known: success just above the radius, none just below."""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from made import Sphere
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, apgd, deepfool, fab, fgsm, pgd, spsa, square, uniform_noise
from robustbench_cure.attacks.deepfool import nearest_boundary_step, reach
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.pgd import pgd_checkpoints
from robustbench_cure.attacks.spsa import gradient_estimate
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

NORMS = ("linf", "l2")
SHAPE = (1, 4, 4)
DIMENSION = 16


def ball(norm: str, radius: float) -> ThreatModel:
    return ThreatModel(norm, Fraction(float(radius)))


def run_pgd(loss):
    def run(classifier, x, y, threat):
        step = max(threat.radius / 4, 1e-6)
        return pgd(classifier, x, y, threat=threat, steps=20, step_size=step, loss=loss)

    return run


def run_apgd(loss, targets=0):
    def run(classifier, x, y, threat):
        return apgd(classifier, x, y, threat=threat, steps=20, loss=loss, targets=targets)

    return run


def run_fgsm(classifier, x, y, threat):
    return fgsm(classifier, x, y, threat=threat)


def run_deepfool(classifier, x, y, threat):
    return deepfool(classifier, x, y, threat=threat, mode="bounded")


def run_spsa(classifier, x, y, threat):
    steps = 30
    return spsa(
        classifier, x, y, threat=threat, steps=steps, samples=128, step_size=threat.radius / 8, delta=0.01
    )


def run_square(classifier, x, y, threat):
    return square(classifier, x, y, threat=threat, queries=600)


def run_fab(classifier, x, y, threat):
    return fab(classifier, x, y, threat=threat, steps=10, targets=classifier.num_classes - 1)


GRADIENT_ATTACKS = {
    "fgsm": run_fgsm,
    "pgd-ce": run_pgd("ce"),
    "pgd-margin": run_pgd("margin"),
    "apgd-ce": run_apgd("ce"),
    "apgd-pm": run_apgd("pm"),
    "apgd-targets": run_apgd("margin", targets=9),
    "deepfool": run_deepfool,
    "fab": run_fab,
}
ALL_ATTACKS = GRADIENT_ATTACKS | {"spsa": run_spsa, "square": run_square}


def interior_images(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + 0.1 * (torch.rand((n, *SHAPE), generator=generator) - 0.5)


def random_affine(affine, classes: int, seed: int, **options):
    """Random faces, every class near the others at the grey image."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((classes, DIMENSION))
    bias = -weight @ np.full(DIMENSION, 0.5) + 0.3 * generator.standard_normal(classes)
    return affine(weight, bias, SHAPE, **options)


def duel(affine, classes: int, seed: int):
    """Two classes contend, the others are far below everywhere in the box."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((classes, DIMENSION))
    bias = -weight @ np.full(DIMENSION, 0.5)
    bias[0] += 0.7
    bias[2:] -= 60.0
    return affine(weight, bias, SHAPE)


def labelled(model, x):
    return torch.from_numpy(model.logits(x).argmax(1))


def is_broken(judge, model, x, y, candidates, threat) -> np.ndarray:
    return judge(model.classifier.module, x, y, candidates.x_adv, threat.norm, threat.radius)


# --- affine models: both sides of the exact radius ---------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "pgd-dlr"])
def test_gradient_attacks_bracket_the_exact_radius(affine, judge, name, classes, norm):
    attack = run_pgd("dlr") if name == "pgd-dlr" else GRADIENT_ATTACKS[name]
    if name == "pgd-dlr" and classes == 2:
        model, x = duel(affine, 2, 0), interior_images(1, 0)
        with pytest.raises(ValueError, match="at least 3 classes"):
            attack(model.classifier, x, labelled(model, x), ball(norm, 0.1))
        return
    model, x = duel(affine, classes, 1), interior_images(5, 1)
    y = labelled(model, x)
    radii = model.radii(x, y, norm).min(1)
    assert 0 < radii.min() < radii.max() < (0.4 if norm == "l2" else 0.12)  # the box is out of reach
    for row, radius in enumerate(radii):
        one, label = x[row : row + 1], y[row : row + 1]
        above, below = ball(norm, radius * 1.002), ball(norm, radius * 0.998)
        assert is_broken(judge, model, one, label, attack(model.classifier, one, label, above), above).all()
        assert not is_broken(
            judge, model, one, label, attack(model.classifier, one, label, below), below
        ).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_no_attack_succeeds_inside_the_exact_radius_of_many_faces(affine, judge, name, norm):
    model, x = random_affine(affine, 6, 2), interior_images(24, 2)
    y = labelled(model, x)
    radii = model.radii(x, y, norm).min(1)
    threat = ball(norm, np.median(radii))
    broken = is_broken(judge, model, x, y, ALL_ATTACKS[name](model.classifier, x, y, threat), threat)
    assert not broken[radii > threat.radius * 1.0001].any()
    # ... and what it does find lies beyond: these find nearly all of it.
    if name in ("pgd-margin", "apgd-pm", "apgd-targets", "deepfool", "fab"):
        assert broken[radii < threat.radius * 0.999].mean() > 0.9


@pytest.mark.parametrize("classes", [2, 4])
def test_spsa_brackets_the_exact_linf_radius(affine, judge, classes):
    model, x = duel(affine, classes, 3), interior_images(3, 3)
    y = labelled(model, x)
    for row, radius in enumerate(model.radii(x, y, "linf").min(1)):
        one, label = x[row : row + 1], y[row : row + 1]
        above, below = ball("linf", radius * 1.02), ball("linf", radius * 0.998)
        assert is_broken(judge, model, one, label, run_spsa(model.classifier, one, label, above), above).all()
        assert not is_broken(
            judge, model, one, label, run_spsa(model.classifier, one, label, below), below
        ).any()


def test_spsa_reaches_the_l2_radius_up_to_adams_preference_for_the_corner(affine, judge):
    """Adam steps along sign(w), so in l2 it needs up to sqrt(d) ||w||_2 / ||w||_1 of the exact radius."""
    model, x = duel(affine, 2, 4), interior_images(3, 4)
    y = labelled(model, x)
    slope = model.weight[1] - model.weight[0]
    excess = np.sqrt(DIMENSION) * np.linalg.norm(slope) / np.abs(slope).sum()
    assert 1 < excess < 1.5
    for row, radius in enumerate(model.radii(x, y, "l2").min(1)):
        one, label = x[row : row + 1], y[row : row + 1]
        above, below = ball("l2", radius * excess * 1.02), ball("l2", radius * 0.998)
        assert is_broken(judge, model, one, label, run_spsa(model.classifier, one, label, above), above).all()
        assert not is_broken(
            judge, model, one, label, run_spsa(model.classifier, one, label, below), below
        ).any()


@pytest.mark.parametrize("classes", [2, 4])
def test_square_brackets_the_exact_linf_radius(affine, judge, classes):
    """Its last windows are single pixels, and every corner of the ball is reached by flipping pixels."""
    model, x = duel(affine, classes, 3), interior_images(4, 3)
    y = labelled(model, x)
    for row, radius in enumerate(model.radii(x, y, "linf").min(1)):
        one, label = x[row : row + 1], y[row : row + 1]
        above, below = ball("linf", radius * 1.002), ball("linf", radius * 0.998)
        for threat, broken in ((above, True), (below, False)):
            candidates = run_square(model.classifier, one, label, threat)
            assert is_broken(judge, model, one, label, candidates, threat).item() is broken


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_reaches_the_lowest_margin_of_the_ball(affine, norm, loss, random_start):
    """On two classes the least margin is J - eps ||w_y - w_j||_dual, and PGD(20) gets there."""
    model, x = duel(affine, 2, 5), interior_images(8, 5)
    y = labelled(model, x)
    radii = model.radii(x, y, norm).min(1)
    threat = ball(norm, 0.9 * radii.min())
    slope = model.weight[1] - model.weight[0]
    dual = np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope)
    candidates = pgd(
        model.classifier, x, y, threat=threat, steps=20, step_size=threat.radius / 4, loss=loss,
        random_start=random_start,
    )  # fmt: skip
    reached = margins(model.classifier.logits(candidates.x_adv), y).numpy()
    expected = dual * (radii - threat.radius)
    np.testing.assert_allclose(reached, expected, rtol=0, atol=2e-5 if norm == "linf" else 1e-3 * dual)
    assert (candidates.steps == 20).all()


@pytest.mark.parametrize("norm", NORMS)
def test_one_fgsm_step_goes_exactly_to_the_radius(affine, norm):
    model, x = duel(affine, 2, 6), interior_images(8, 6)
    y = labelled(model, x)
    threat = ball(norm, 0.05)
    candidates = fgsm(model.classifier, x, y, threat=threat)
    slope = torch.from_numpy(model.weight[1] - model.weight[0]).float().view(SHAPE)
    step = slope.sign() if norm == "linf" else slope / slope.norm()
    away = torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(candidates.x_adv, x + 0.05 * away * step)
    for counted in (candidates.steps, candidates.forwards, candidates.backwards):
        assert counted.tolist() == [1] * 8


def test_pgd_evaluates_only_where_it_is_needed(affine):
    """One pass a step, and one more at a checkpoint or the end of a restart, unless the evaluator follows."""
    model, x = duel(affine, 2, 6), interior_images(4, 6)
    y = labelled(model, x)
    options = {"threat": ball("linf", 1e-3), "step_size": 1e-3}  # nothing is broken
    for restarts, forwards in ((1, 5), (2, 12)):
        found = pgd(model.classifier, x, y, steps=5, restarts=restarts, **options)
        assert found.backwards.tolist() == [5 * restarts] * 4
        assert found.forwards.tolist() == [forwards] * 4
    short, long = pgd_checkpoints(model.classifier, x, y, checkpoints=(2, 5), **options)
    assert (short.forwards.tolist(), long.forwards.tolist()) == ([3] * 4, [6] * 4)


class Valley(nn.Module):
    """A margin of 0.2 and the distance of the mean pixel from 1/2: past the bottom it rises again."""

    def forward(self, x):
        margin = 0.2 + (x.mean((1, 2, 3)) - 0.5).abs()
        return torch.stack((margin, torch.zeros_like(margin)), 1)


def test_bounded_deepfool_gives_up_where_the_margin_stays():
    model = Classifier(Valley(), num_classes=2, input_shape=SHAPE)
    x = torch.tensor([0.51, 0.75]).view(2, 1, 1, 1).repeat(1, *SHAPE)  # the second falls once, then no more
    y, threat = torch.zeros(2, dtype=torch.int64), ball("linf", 0.3)
    assert deepfool(model, x, y, threat=threat, mode="bounded").steps.tolist() == [6, 7]
    assert deepfool(model, x, y, threat=threat, mode="minimal", steps=20).steps.tolist() == [20, 20]


def test_bounded_deepfool_goes_on_where_the_margin_falls_again():
    """Six iterations in a row without a lower margin end a search, not six in all."""
    data, rows = load_dataset("digits"), [189, 398, 440, 482]
    x, y = data.images[rows], data.labels[rows]
    model = load_model("digits_pgd_at", precision="fp32")
    found = deepfool(model, x, y, threat=ball("linf", Fraction(51, 255)), mode="bounded")
    assert bool(misclassified(model.logits(found.x_adv), y).all())
    assert int(found.steps.min()) > 12


class Gated(nn.Module):
    """Channel 0 lowers the margin faster than its slope says, and only then does channel 1 count."""

    def forward(self, x):
        a, b = ((x[:, channel].mean((1, 2)) - 0.5) / 0.2 for channel in (0, 1))
        margin = 1 - 0.1 * a - self.bend * a**2 - a * (0.2 * b + self.later * b**2)
        return torch.stack((margin, torch.zeros_like(margin)), 1)

    def __init__(self, bend, later):
        super().__init__()
        self.bend, self.later = bend, later


@pytest.mark.parametrize(
    ("bend", "later", "steps", "broken"),
    [
        (
            0.3,
            0.5,
            2,
            True,
        ),  # 0.6 left, a slope that covers 0.2 of it: but the first step fell by 0.4, not 0.1
        (0.0, 0.8, 1, False),  # 0.9 left, as linearised: given up, although the next step would break it
        (0.0, 0.0, 1, False),
    ],
)
def test_bounded_deepfool_gives_up_what_linear_networks_cannot_reach(bend, later, steps, broken):
    model = Classifier(Gated(bend, later), num_classes=2, input_shape=(3, 4, 4))
    x, y = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    found = deepfool(model, x, y, threat=ball("linf", 0.2), mode="bounded")
    assert (found.steps.tolist(), found.converged.tolist()) == ([steps], [broken])


def test_bounded_deepfool_leaves_a_hill_that_covers_the_ball():
    """The first step does not lower the margin, and the ball covers 0.46 of the gap, 0.6 / 1.3."""
    for height, steps in ((1.0, 1), (0.8, 6)):  # 0.6 / 1.1 = 0.55

        class Hill(nn.Module):
            def forward(self, x, height=height):
                margin = height + (x.mean((1, 2, 3)) - 0.5).abs()
                return torch.stack((margin, torch.zeros_like(margin)), 1)

        model = Classifier(Hill(), num_classes=2, input_shape=SHAPE)
        x, y = torch.full((1, *SHAPE), 0.5001), torch.zeros(1, dtype=torch.int64)
        found = deepfool(model, x, y, threat=ball("linf", 0.3), mode="bounded")
        assert found.steps.tolist() == [steps]


def test_the_reach_of_slopes_in_a_box_of_pixels():
    here, low, high = (torch.full((1, 1, 1, 2), value) for value in (0.5, 0.25, 1.0))
    slopes = torch.tensor([[2.0, -4.0], [0.0, 1.0]]).view(1, 2, 1, 1, 2)
    assert reach(slopes, here, low, high).tolist() == [[2.0, 0.5]]  # 2 * 0.5 + 4 * 0.25, 1 * 0.5


def test_bounded_deepfool_spares_slopes_and_steps_but_breaks_as_much(monkeypatch):
    data = load_dataset("digits").subset(160)
    model = load_model("digits_pgd_at", precision="fp32")
    right = ~misclassified(model.logits(data.images), data.labels)
    x, y = data.images[right], data.labels[right]
    found, near = (
        deepfool(model, x, y, threat=ball("linf", Fraction(51, 255)), mode=mode, steps=20)
        for mode in ("bounded", "minimal")
    )
    for each, contenders in ((found, 6), (near, 9)):
        linearised = each.forwards - 1 - each.steps  # one pass at x, one after each step
        assert torch.equal(each.backwards, 9 + contenders * (linearised - 1))
    module = importlib.import_module("robustbench_cure.attacks.deepfool")
    for name, value in (("CONTENDERS", 9), ("REACH", 0.0), ("REACH_STALLED", 0.0)):
        monkeypatch.setattr(module, name, value)
    whole = deepfool(model, x, y, threat=ball("linf", Fraction(51, 255)), mode="bounded", steps=20)
    assert not (whole.converged & ~found.converged).any()
    assert 2 * int(found.backwards.sum()) < int(whole.backwards.sum())


def test_every_loss_sees_past_huge_logits(affine, judge):
    """At gaps of hundreds the usual gradient of cross-entropy is exactly zero in float32."""
    model, x = duel(affine, 3, 7), interior_images(4, 7)
    model = affine(model.weight * 3000, model.bias * 3000, SHAPE)
    y = labelled(model, x)
    radii = model.radii(x, y, "linf").min(1)
    threat = ball("linf", radii.max() * 1.05)
    for loss in ("ce", "margin", "dlr"):
        candidates = pgd(
            model.classifier, x, y, threat=threat, steps=20, step_size=threat.radius / 4, loss=loss,
            random_start=False,
        )  # fmt: skip
        assert is_broken(judge, model, x, y, candidates, threat).all(), loss


# --- minimal DeepFool --------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 6])
def test_minimal_deepfool_is_exact_on_affine_models(affine, classes, norm, clip):
    model, x = random_affine(affine, classes, 8), interior_images(32, 8)
    y = labelled(model, x)
    faces = model.radii(x, y, norm)
    candidates = deepfool(model.classifier, x, y, threat=ball(norm, 0.1), clip=clip)
    # Leaving the nearest face by 2 % may enter a third class's region, never stay in the first.
    assert candidates.converged.all()
    assert (candidates.steps == 1).all()
    distance = ThreatModel.parse(norm, "1").distance(x, candidates.x_adv).numpy()
    np.testing.assert_allclose(distance, 1.02 * faces.min(1), rtol=1e-4, atol=3e-7)
    # The step ends beyond the nearest face and, had it not been overshot, on it.
    inner = (x + (candidates.x_adv - x) / 1.02).flatten(1).double().numpy()
    logits = inner @ model.weight.T + model.bias
    rows = np.arange(len(y))
    gap = logits[rows, y.numpy()] - logits[rows, faces.argmin(1)]
    np.testing.assert_allclose(gap, 0, atol=2e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_deepfool_weighs_gaps_by_slopes(affine, norm):
    """The runner-up is far because it is nearly parallel; a lower class is near because it is steep."""
    weight = np.zeros((3, DIMENSION))
    weight[1, 0] = 0.5
    weight[2, 1] = 10.0
    model = affine(weight, [0.0, -0.25 - 0.1, -5.0 - 0.5], SHAPE)
    x = torch.full((1, *SHAPE), 0.5)
    y = torch.zeros(1, dtype=torch.int64)
    assert labelled(model, x).item() == 0
    assert model.logits(x)[0, 1] > model.logits(x)[0, 2]
    candidates = deepfool(model.classifier, x, y, threat=ball(norm, 0.2))
    assert model.logits(candidates.x_adv).argmax(1) == [2]
    assert ThreatModel.parse(norm, "1").distance(x, candidates.x_adv).item() == pytest.approx(
        1.02 * 0.05, rel=1e-4
    )


def test_deepfool_considers_only_the_candidates_ranked_at_x(affine):
    weight = np.zeros((3, DIMENSION))
    weight[1, 0] = 0.5
    weight[2, 1] = 10.0
    model = affine(weight, [0.0, -0.25 - 0.1, -5.0 - 0.5], SHAPE)
    x = torch.full((1, *SHAPE), 0.5)
    y = torch.zeros(1, dtype=torch.int64)
    candidates = deepfool(model.classifier, x, y, threat=ball("l2", 1), candidates=2)  # the label and class 1
    assert model.logits(candidates.x_adv).argmax(1) == [1]
    assert candidates.backwards.item() == candidates.steps.item()  # one other class, and none once across


@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_overshoot_lengthens_the_whole_perturbation_once(affine, overshoot):
    model, x = random_affine(affine, 2, 9), interior_images(6, 9)
    y = labelled(model, x)
    candidates = deepfool(model.classifier, x, y, threat=ball("l2", 1), overshoot=overshoot)
    distance = ThreatModel.parse("l2", "1").distance(x, candidates.x_adv).numpy()
    np.testing.assert_allclose(distance, (1 + overshoot) * model.radii(x, y, "l2").min(1), rtol=1e-4)


@pytest.mark.parametrize("mode", ["minimal", "bounded"])
def test_images_already_past_the_boundary_are_left_alone(affine, mode):
    model, x = random_affine(affine, 3, 10), interior_images(10, 10)
    wrong = (labelled(model, x) + 1) % 3
    candidates = deepfool(model.classifier, x, wrong, threat=ball("linf", 0.1), mode=mode)
    assert torch.equal(candidates.x_adv, x)
    assert candidates.converged.all()
    assert (candidates.steps == 0).all()


def test_deepfool_says_when_it_did_not_get_there(affine):
    model, x = random_affine(affine, 3, 11), interior_images(6, 11)
    y = labelled(model, x)
    radii = model.radii(x, y, "linf").min(1)
    threat = ball("linf", np.median(radii))
    candidates = deepfool(model.classifier, x, y, threat=threat, mode="bounded")
    np.testing.assert_array_equal(candidates.converged.numpy(), radii < threat.radius)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["bounded", "minimal"])
def test_deepfool_leaves_a_boundary_that_rounding_hides(affine, norm, mode):
    """Images on the boundary up to float32's resolution, where a step to it is shorter than a pixel's."""
    shape = (3, 16, 16)
    weight = np.random.default_rng(0).normal(size=(2, 768))
    model = affine(weight, [0.0, 0.0], shape)
    x = torch.rand((200, *shape), generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    slope = torch.from_numpy(weight[0] - weight[1]).view(shape)
    for _ in range(3):  # onto the boundary, from what rounding left of it
        gap = torch.from_numpy(model.logits(x) @ [1, -1])
        x = (x.double() - gap.view(-1, 1, 1, 1) * slope / slope.square().sum()).float()
    y = model.classifier.logits(x).argmax(1)
    assert model.radii(x, y, norm)[np.arange(200), (1 - y).numpy()].max() < 1e-6
    found = deepfool(model.classifier, x, y, threat=ball(norm, 0.1), mode=mode)
    assert found.converged.all()
    assert (model.classifier.logits(found.x_adv).argmax(1) != y).all()
    size = (found.x_adv - x).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    assert float(size.max()) < 8 * 2**-21 * (1 if norm == "linf" else 768**0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_tie_is_left_by_a_step_of_the_least_length(norm):
    slopes = torch.tensor([3.0, -4.0]).view(1, 1, 1, 1, 2)
    step = nearest_boundary_step(norm, torch.zeros(1, 1), slopes, 0.5)
    expected = [0.5, -0.5] if norm == "linf" else [0.3, -0.4]
    torch.testing.assert_close(step.flatten(), torch.tensor(expected))
    assert not nearest_boundary_step(norm, torch.zeros(1, 1), torch.zeros_like(slopes), 0.5).any()


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_boundary_step_has_the_least_length_that_reaches(norm):
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn((40, 5), generator=generator)
    slopes = torch.randn((40, 5, 2, 3, 3), generator=generator) * torch.logspace(-3, 3, 5).view(1, 5, 1, 1, 1)
    slopes = slopes[:, torch.randperm(5, generator=generator)]
    step = nearest_boundary_step(norm, gaps, slopes)
    assert step.shape == (40, 2, 3, 3)
    flat = slopes.flatten(2).double()
    dual = flat.abs().sum(2) if norm == "linf" else flat.norm(dim=2)
    lengths = gaps.abs().double() / dual
    length, nearest = lengths.min(1)
    order = torch.inf if norm == "linf" else 2
    torch.testing.assert_close(step.flatten(1).double().norm(p=order, dim=1), length, rtol=1e-5, atol=0)
    chosen = flat[torch.arange(40), nearest]
    reach = (chosen * step.flatten(1)).sum(1)
    torch.testing.assert_close(reach, gaps[torch.arange(40), nearest].abs().double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_flat_boundaries_are_out_of_reach(norm):
    gaps = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    slopes = torch.zeros((2, 2, 1, 1, 3))
    slopes[0, 1, 0, 0, 2] = 4.0  # row 0: only the second class can be reached
    step = nearest_boundary_step(norm, gaps, slopes)
    torch.testing.assert_close(step[0].flatten(), torch.tensor([0.0, 0.0, 0.5]))
    assert torch.equal(step[1], torch.zeros(1, 1, 3))
    for slope, length in ((1e-6, 0.5), (1e-14, 0.0)):  # small is not flat: logits may have any scale
        step = nearest_boundary_step(norm, torch.full((1, 1), -slope / 2), torch.full((1, 1, 1, 1, 1), slope))
        torch.testing.assert_close(step, torch.full((1, 1, 1, 1), length))


class Corner(nn.Module):
    """Scores 0.2 and max(u, 2u + v - 0.05) of two pixels u, v around one half."""

    def forward(self, x):
        u, v = (x.flatten(1) - 0.5).unbind(1)
        return torch.stack((torch.full_like(u, 0.2), torch.maximum(u, 2 * u + v - 0.05)), 1)


def test_pixels_at_the_end_of_the_linf_ball_leave_the_way_to_the_others():
    """In a ball of 0.1 the first pixel comes to 0.1, where 2u + v - 0.05 counts and lacks 0.05.

    v has to make it up alone, and does so in one step; shared with u, a third of it would be lost each time.
    """
    classifier = Classifier(Corner(), num_classes=2, input_shape=(1, 1, 2))
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    found = deepfool(classifier, x, y, threat=ball("linf", 0.1), mode="bounded", steps=2, overshoot=0.02)
    assert found.steps.tolist() == [2]
    assert bool(found.converged.all())
    moved = (found.x_adv - x).flatten().tolist()
    assert moved == pytest.approx([0.1, 1.02 * 0.05], abs=1e-6)


# --- SPSA's estimate ---------------------------------------------------------------------------------


def test_spsa_estimate_is_exact_in_one_dimension(affine):
    model = affine([[3.0], [-1.0]], [0.0, 0.0], (1, 1, 1))
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.tensor([0, 1, 0, 1])
    estimate = gradient_estimate(model.classifier, x, y, Noise.for_rows(4), 0, 5, 0.01)
    torch.testing.assert_close(estimate.flatten(), torch.tensor([4.0, -4.0, 4.0, -4.0]), rtol=1e-4, atol=0)


def test_spsa_estimate_is_unbiased_for_a_linear_margin(affine):
    """mean_i (w . v_i) v_i has mean w and variance |w|^2 - w_k^2 over samples in coordinate k."""
    model, x = duel(affine, 2, 12), interior_images(64, 12)
    y = torch.zeros(64, dtype=torch.int64)
    slope = (model.weight[0] - model.weight[1]).astype(np.float64)
    samples = 50
    draws = [
        gradient_estimate(model.classifier, x, y, Noise.for_rows(64), stream, samples, 0.01)
        .flatten(1)
        .numpy()
        for stream in range(10)
    ]
    estimates = np.concatenate(draws).astype(np.float64)
    variance = (slope @ slope - slope**2) / samples
    error = (estimates.mean(0) - slope) / np.sqrt(variance / len(estimates))
    assert np.abs(error).max() < 4.5
    np.testing.assert_allclose(estimates.var(0), variance, rtol=0.35)


def test_spsa_estimate_does_not_depend_on_chunks_or_neighbours(affine):
    model, x = random_affine(affine, 3, 13), interior_images(6, 13)
    y = labelled(model, x)
    whole = gradient_estimate(model.classifier, x, y, Noise.for_rows(6), 3, 40, 0.01)
    small = random_affine(affine, 3, 13, batch_size=7).classifier  # 40 directions in many passes
    torch.testing.assert_close(gradient_estimate(small, x, y, Noise.for_rows(6), 3, 40, 0.01), whole)
    row = torch.tensor([4])
    alone = gradient_estimate(model.classifier, x[row], y[row], Noise.for_rows(6)[row], 3, 40, 0.01)
    torch.testing.assert_close(alone, whole[row])
    streams = torch.tensor([3, 0, 3, 0, 3, 0])
    mixed = gradient_estimate(model.classifier, x, y, Noise.for_rows(6), streams, 40, 0.01)
    torch.testing.assert_close(mixed[::2], whole[::2])
    assert (mixed[1::2] - whole[1::2]).abs().flatten(1).amax(1).min() > 0.01


def test_spsa_asks_around_the_iterate_not_around_the_image(affine, monkeypatch):
    model, x = duel(affine, 2, 16), interior_images(3, 16)
    y = labelled(model, x)
    threat = ball("linf", 1e-3)  # nothing is broken: both steps are made
    options = {"threat": threat, "samples": 8, "step_size": 1e-3, "stop": "never"}
    asked = []
    answer = model.classifier.search_logits
    monkeypatch.setattr(model.classifier, "search_logits", lambda q: asked.append(q) or answer(q))
    spsa(model.classifier, x, y, steps=2, **options)
    first, second = (queries.view(3, 16, *SHAPE).mean(1) for queries in asked)
    torch.testing.assert_close(first, x)
    after_one_step = spsa(model.classifier, x, y, steps=1, **options).x_adv
    assert (after_one_step != x).any()
    torch.testing.assert_close(second, after_one_step, rtol=0, atol=1e-6)


def test_spsa_steps_are_those_of_adam(affine, monkeypatch):
    """Iterate by iterate against Kingma & Ba's algorithm 1 in float64, where the estimate is known."""
    steps, samples, rate = 12, 4, 0.01
    model = random_affine(affine, 2, seed=5)
    x = interior_images(3, seed=6)
    y = model.classifier.logits(x).argmax(1)
    slope = model.weight[y] - model.weight[1 - y]  # of the margin, (3, d)
    noise, seen = Noise.for_rows(3), []
    honest = model.classifier.logits

    def noted(given):
        seen.append(given.clone())
        return honest(given) + 1e3 * torch.nn.functional.one_hot(y, 2)  # nothing is ever broken

    monkeypatch.setattr(model.classifier, "logits", noted)
    threat = ball("linf", 0.1)
    spsa(model.classifier, x, y, threat=threat, noise=noise, steps=steps, samples=samples, step_size=rate)
    assert len(seen) == steps + 1
    start = x.flatten(1).double().numpy()
    here, first, second = start, np.zeros_like(start), np.zeros_like(start)
    for t in range(1, steps + 1):
        signs = noise.signs((samples, DIMENSION), t - 1).double().numpy()
        estimate = (np.einsum("bnd,bd->bn", signs, slope)[:, :, None] * signs).mean(1)
        first = 0.9 * first + 0.1 * estimate
        second = 0.999 * second + 0.001 * estimate**2
        step = rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        here = np.clip(here - step, start - threat.radius, start + threat.radius)
        np.testing.assert_allclose(seen[t].flatten(1).numpy(), here, atol=2e-5)


def test_spsa_that_cannot_reach_the_ball_is_refused(affine):
    model, x = duel(affine, 2, 14), interior_images(1, 14)
    with pytest.raises(ValueError, match="cannot reach"):
        spsa(model.classifier, x, labelled(model, x), threat=ball("linf", 0.3), steps=1, samples=8)


# --- a curved boundary: the sphere -------------------------------------------------------------------

CENTRE, RADIUS = 0.5, Sphere.radius


def sphere() -> Classifier:
    return Classifier(Sphere(), num_classes=2, input_shape=SHAPE)


def at_distance_from_centre(lengths, seed: int) -> torch.Tensor:
    direction = torch.randn((len(lengths), DIMENSION), generator=torch.Generator().manual_seed(seed))
    direction = direction / direction.norm(dim=1, keepdim=True)
    return (CENTRE + direction * torch.tensor(lengths)[:, None]).view(-1, *SHAPE)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("random_start", [True, False])
def test_l2_pgd_brackets_the_distance_to_a_sphere(judge, loss, random_start):
    lengths = [0.2, 0.25, 0.3, 0.35]
    x, y = at_distance_from_centre(lengths, 0), torch.zeros(1, dtype=torch.int64)
    for row, length in enumerate(lengths):
        for factor, expected in [(1.003, True), (0.997, False)]:
            threat = ball("l2", (RADIUS - length) * factor)
            one = x[row : row + 1]
            candidates = pgd(
                sphere(), one, y, threat=threat, steps=40, step_size=threat.radius / 4, loss=loss,
                random_start=random_start,
            )  # fmt: skip
            broken = judge(Sphere(), one, y, candidates.x_adv, "l2", threat.radius)
            assert bool(broken[0]) is expected, (length, factor)


def test_deepfool_from_inside_a_sphere_is_newtons_step():
    """One step of (R^2 - rho^2) / (2 rho) crosses from inside: the tangent's zero lies beyond the sphere."""
    lengths = np.array([0.2, 0.25, 0.3, 0.35, 0.39])
    x, y = at_distance_from_centre(lengths, 1).float(), torch.zeros(5, dtype=torch.int64)
    candidates = deepfool(sphere(), x, y, threat=ball("l2", 1), clip=False)
    distance = ThreatModel.parse("l2", "1").distance(x, candidates.x_adv).numpy()
    np.testing.assert_allclose(distance, 1.02 * (RADIUS**2 - lengths**2) / (2 * lengths), rtol=1e-4)
    assert (candidates.steps == 1).all()
    # The perturbation is normal to the boundary: along the radius.
    cosine = torch.cosine_similarity((candidates.x_adv - x).flatten(1), (x - CENTRE).flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5), rtol=0, atol=1e-5)


def test_deepfool_from_outside_a_sphere_iterates_and_ends_within_the_overshoot():
    lengths = np.array([0.41, 0.5, 0.8, 1.2, 2.0])
    x, y = at_distance_from_centre(lengths, 2).float(), torch.ones(5, dtype=torch.int64)
    candidates = deepfool(sphere(), x, y, threat=ball("l2", 1), clip=False)
    distance = ThreatModel.parse("l2", "1").distance(x, candidates.x_adv).numpy()
    exact = lengths - RADIUS
    assert candidates.converged.all()
    assert (distance >= exact * (1 - 1e-4)).all()
    assert (distance <= 1.02 * exact * (1 + 1e-4)).all()

    def steps(rho: float) -> int:  # the algorithm in one dimension
        total, taken = 0.0, 0
        while (here := rho - 1.02 * total) > RADIUS:
            total, taken = total + (here**2 - RADIUS**2) / (2 * here), taken + 1
        return taken

    assert candidates.steps.tolist() == [steps(rho) for rho in lengths]
    assert candidates.steps.max() > 3
    stopped = deepfool(sphere(), x, y, threat=ball("l2", 1), clip=False, steps=2)
    assert stopped.converged.tolist() == [steps(rho) <= 2 for rho in lengths]


# --- the box -----------------------------------------------------------------------------------------


def blocked_duel(affine):
    """Two classes; at these images the way to the other class leads out of the box at two pixels."""
    generator = np.random.default_rng(15)
    slope = generator.uniform(0.5, 1.5, DIMENSION) * np.where(np.arange(DIMENSION) % 2, 1, -1)
    x = np.full(DIMENSION, 0.5)
    x[0], x[3] = 0.0, 1.0  # slope[0] < 0 wants to go down, slope[3] > 0 up
    x[5], x[6] = 0.98, 0.02  # and these have little room
    weight = np.stack((np.zeros(DIMENSION), slope))
    model = affine(weight, [0.0, -slope @ x - 1.0], SHAPE)
    image = torch.from_numpy(x).float().view(1, *SHAPE)
    room = np.where(slope > 0, 1 - x, x)
    return model, image, torch.zeros(1, dtype=torch.int64), slope, room


def exact_in_box(slope, room, gap, norm) -> float:
    """Least eps at which the best point of ball and box reaches the gap, by bisection."""

    def reach(eps):
        if norm == "linf":
            return np.abs(slope) @ np.minimum(eps, room)
        low, high = 0.0, 1e6  # delta = clip(t |w|, 0, room) with |delta| = eps
        for _ in range(200):
            t = (low + high) / 2
            if np.linalg.norm(np.minimum(t * np.abs(slope), room)) < eps:
                low = t
            else:
                high = t
        return np.abs(slope) @ np.minimum(low * np.abs(slope), room)

    low, high = 0.0, 2.0
    for _ in range(100):
        eps = (low + high) / 2
        low, high = (eps, high) if reach(eps) < gap else (low, eps)
    return high


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fgsm", "pgd-ce", "pgd-margin", "deepfool", "spsa"])
def test_the_box_counts(affine, judge, name, norm):
    model, x, y, slope, room = blocked_duel(affine)
    gap = -float(model.logits(x)[0, 1])
    exact = exact_in_box(slope, room, gap, norm)
    free = model.radii(x, y, norm).min()
    assert exact > 1.05 * free  # ignoring the box would break it here already
    attack = ALL_ATTACKS[name]
    below = ball(norm, exact * 0.998)
    assert not is_broken(judge, model, x, y, attack(model.classifier, x, y, below), below).any()
    # In l2 ball and box are projected onto in turn, and FGSM and Adam do not redistribute the length.
    slack = {"linf": {"spsa": 1.02}, "l2": {"fgsm": 1.15, "spsa": 1.15}}[norm]
    above = ball(norm, exact * slack.get(name, 1.002 if norm == "linf" else 1.02))
    assert is_broken(judge, model, x, y, attack(model.classifier, x, y, above), above).all()


# --- ground truth by exhaustive search ---------------------------------------------------------------


def two_pixel_net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 3))
    with torch.no_grad():
        net[1].weight *= 6
        net[1].bias.copy_(-net[1].weight @ torch.full((2,), 0.5) + net[1].bias)
        net[3].weight *= 4
        net[3].bias.copy_(-net[3](net[2](net[1](torch.full((1, 2), 0.5))))[0] + net[3].bias)
    return net


@pytest.fixture(scope="module")
def plane():
    """Points of the unit square, and per norm whether an adversarial point exists: True, False or None."""
    net = two_pixel_net(3)
    x = torch.rand((80, 1, 1, 2), generator=torch.Generator().manual_seed(3))
    y = net(x).argmax(1)
    assert len(set(y.tolist())) == 3
    spectral = [torch.linalg.matrix_norm(net[i].weight.detach(), 2).item() for i in (1, 3)]
    lipschitz = np.sqrt(2) * spectral[0] * spectral[1]  # of every logit difference, in l2
    eps, cells = 0.08, 121
    axis = torch.linspace(-eps, eps, cells)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 1, 1, 2)
    slack = lipschitz * float(
        axis[1] - axis[0]
    )  # every point of the ball has a grid point of it within a cell
    truth = {}
    for norm in NORMS:
        part = grid if norm == "linf" else grid[grid.flatten(1).norm(dim=1) <= eps]
        answers = []
        for image, label in zip(x, y, strict=True):
            points = image + part
            points = points[((points >= 0) & (points <= 1)).flatten(1).all(1)]
            with torch.no_grad():
                lowest = margins(net(points), label.expand(len(points))).min().item()
            answers.append(True if lowest < -1e-4 else (False if lowest > slack else None))
        truth[norm] = np.array(answers, dtype=object)
    return net, x, y, eps, truth


@pytest.mark.parametrize("norm", NORMS)
def test_exhaustive_search_agrees_with_the_attacks(plane, judge, norm):
    net, x, y, eps, truth = plane
    exists, none = truth[norm] == True, truth[norm] == False  # noqa: E712 - three values
    assert exists.sum() >= 10
    assert none.sum() >= 10
    classifier = Classifier(net, num_classes=3, input_shape=(1, 1, 2), batch_size=8192)
    threat = ball(norm, eps)
    results = {
        "pgd": pgd(classifier, x, y, threat=threat, steps=30, step_size=eps / 4, restarts=8, loss="margin"),
        "pgd-ce": pgd(classifier, x, y, threat=threat, steps=20, step_size=eps / 4),
        "fgsm": run_fgsm(classifier, x, y, threat),
        "deepfool": run_deepfool(classifier, x, y, threat),
        "fab": run_fab(classifier, x, y, threat),
        "spsa": run_spsa(classifier, x, y, threat),
        "noise": uniform_noise(classifier, x, y, threat=threat, draws=30),
    }
    for name, candidates in results.items():
        broken = judge(net, x, y, candidates.x_adv, norm, eps)
        assert not (broken & none).any(), name
        assert broken.any(), name
        if name == "pgd":
            assert (broken & exists).sum() >= 0.95 * exists.sum()


@pytest.mark.parametrize("candidates", [1, 0, -1])
def test_deepfool_without_another_class_is_refused_in_words(affine, candidates):
    model = affine(np.eye(3, 12), [0.0] * 3, (3, 2, 2))
    x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"candidates {candidates}: the label's own and at least one other"):
        deepfool(model.classifier, x, y, threat=ball("l2", 1), candidates=candidates)
