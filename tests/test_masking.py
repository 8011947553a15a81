"""Checks for masked gradients: obfuscating models raise exactly their checks, honest ones none."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import Roots, Waves, classified, identity_with_backward, images, measurements
from scipy.stats import binomtest
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Candidates, uniform_noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.masking import binarization, checks
from robustbench_cure.masking.binarization import separate
from robustbench_cure.masking.checks import CHECKS, Finding, from_json, to_json
from robustbench_cure.masking.conclusions import Diagnosis, conclude, in_order
from robustbench_cure.masking.evidence import AttackResult, Measurements, Settings
from robustbench_cure.masking.obfuscated import OBFUSCATED
from robustbench_cure.masking.power import Power, controlled, on_broken, powers
from robustbench_cure.studies import selftest
from robustbench_cure.threat import ThreatModel

BALL = ThreatModel.parse("linf", "8/255")
SMALL = Settings(steps=20, spsa_steps=10, spsa_samples=32, draws=20, restarts=3, queries=200, planted=12)
HONEST = ("digits_normal", "digits_pgd_at", "digits_deepfool", "digits_cure")
#: Checks that gradients of no use raise, however they are hidden.
USELESS = {
    "unbounded_attack_fails",
    "gradient_free_beats_white_box",
    "uninformative_gradients",
    "binarization_test_fails",
}
#: Gradient-obfuscating model -> all checks that it raises; the noise of "random" raises others at times.
EXPECTED = {
    "zero gradient": {"spsa_below_pgd", "unavailable_gradients", *USELESS},
    "quantised input": {"unavailable_gradients", *USELESS},
    "saturated logits": {"unavailable_gradients"},
    "softmax output": {"probability_outputs"},
    "JPEG-like rounding": {"spsa_below_pgd", "unavailable_gradients", *USELESS},
    "shattered gradient": {"spsa_below_pgd", *USELESS},
}


#: Of `diagnosed`, before a test replaces it.
DIAGNOSIS = selftest.diagnosis


@cache
def diagnosed(name: str) -> Diagnosis:
    """All checks on 60 digits, of an honest or a gradient-obfuscating model; made once a process."""
    return DIAGNOSIS(name, "cpu")


@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_raise_nothing(name):
    assert diagnosed(name).raised == []


@pytest.mark.parametrize("name", EXPECTED)
def test_a_gradient_obfuscating_model_raises_exactly_its_checks(name):
    assert set(diagnosed(name).raised) == EXPECTED[name]


def test_a_random_network_is_caught_whatever_else_its_noise_raises():
    raised = diagnosed("random").raised
    assert "unstable_predictions" in raised
    assert "unavailable_gradients" not in raised


def test_the_selftest_holds_here(monkeypatch):
    """What it asks of the diagnoses, as they are above; its closed forms: see the tests of the commands."""
    monkeypatch.setattr(selftest, "diagnosis", lambda name, device: diagnosed(name))
    tried = list(selftest._masking("cpu"))
    assert len(tried) == 5
    assert all(one.holds for one in tried), tried


def test_every_check_reports_in_the_order_of_the_table():
    """Without a surrogate the last one is not run; the others are decided one way or the other."""
    findings = diagnosed("digits_cure").findings
    assert [finding.check for finding in findings] == list(CHECKS)
    assert [finding.check for finding in findings if finding.status == "not run"] == [
        "transfer_beats_white_box"
    ]
    assert {finding.status for finding in findings[:-1]} == {"clear"}


def test_all_gradient_obfuscating_models_are_tested():
    assert {*EXPECTED, "random"} == set(OBFUSCATED)


@pytest.mark.parametrize("name", ["zero gradient", "saturated logits", "softmax output"])
def test_obfuscating_models_keep_the_labels_of_the_honest_one(name):
    module = load_model("digits_cure", device="cpu").module
    x = load_dataset("digits").images[:50]
    with torch.no_grad():
        assert torch.equal(OBFUSCATED[name](module)(x).argmax(1), module(x).argmax(1))


def test_a_cosine_transform_without_rounding_is_the_identity():
    """The compressed network's blocks go back where they came from: at most the rounding is lost."""
    wrapper = OBFUSCATED["JPEG-like rounding"](torch.nn.Identity())
    x = torch.rand(2, 3, 16, 24)
    assert (wrapper(x) - x).abs().max() < 0.3
    assert (wrapper(x) - x).abs().mean() < 0.05


# --- single checks on made-up results ---------------------------------------------------------------


class Made:
    """Measurements whose results are given."""

    def __init__(self, m: int, total: int | None = None) -> None:
        self.settings, self.total, self.m = Settings(), total or m, m
        self.ids = tuple(f"s{i}" for i in range(m))
        self.clean_margin = torch.full((m,), 10.0)
        self.x = torch.zeros(m, 1, 2, 2)
        self.white_box_margin = torch.zeros(m)

    def __len__(self) -> int:
        return self.m


def result(margin=None, broken=None) -> AttackResult:
    margin = torch.zeros(0) if margin is None else margin
    return AttackResult(margin, broken, margin)


@pytest.mark.parametrize(
    ("lower", "higher", "raised"),
    [(0, 50, False), (50, 0, True), (4, 0, False), (40, 60, False), (80, 20, True)],
)
def test_the_scatter_needs_many_clearly_lower_points_and_a_sure_sign(lower, higher, raised):
    e = Made(100)
    margin = torch.zeros(100)
    margin[:lower], margin[lower : lower + higher] = -1.0, 1.0
    e.spsa = result(margin)
    found = checks.spsa_below_pgd(e)
    p = binomtest(lower, max(1, lower + higher), alternative="greater").pvalue
    assert (found.status == "raised") == raised == (lower > 5 and p < 0.01)
    assert found.value == pytest.approx(lower / 100)
    if raised:
        assert found.ids == tuple(f"s{i}" for i in range(min(lower, 50)))
    e.spsa = result(margin * 0.1)  # lower, but by less than half a logit
    assert checks.spsa_below_pgd(e).status == "clear"


@pytest.mark.parametrize(("alone", "raised"), [(0, False), (1, False), (3, False), (5, True), (20, True)])
def test_what_a_weak_attack_breaks_alone_is_raised_when_it_is_surely_above_one_per_cent(alone, raised):
    e = Made(100)
    e.white_box_broken = torch.zeros(100, dtype=torch.bool)
    e.white_box_broken[50:] = True
    broken = torch.zeros(100, dtype=torch.bool)
    broken[:alone] = True
    broken[50:80] = True  # these the white box broke too
    e.spsa = e.random = result(broken=broken)
    none = torch.zeros(100, dtype=torch.bool)
    e.square = result(broken=none)
    for check in (checks.gradient_free_beats_white_box, checks.noise_beats_white_box):
        found = check(e)
        assert (found.status == "raised") == raised
        assert found.value == alone / 100
    e.spsa, e.square = result(broken=none), result(broken=broken)  # Square alone counts as well
    assert checks.gradient_free_beats_white_box(e).value == alone / 100
    assert (
        binomtest(5, 100, 0.01, alternative="greater").pvalue
        < 0.01
        < binomtest(3, 100, 0.01, alternative="greater").pvalue
    )


def test_fgsm_is_compared_with_both_pgd_runs():
    e = Made(100)
    none, some = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    some[:10] = True
    e.fgsm, e.pgd_broken = result(broken=some), some
    assert checks.fgsm_beats_pgd(e).status == "clear"
    e.pgd_broken = none
    assert checks.fgsm_beats_pgd(e).status == "raised"


def test_more_steps_and_late_falls():
    e = Made(100, total=200)
    broken = torch.zeros(100, dtype=torch.bool)
    more = broken.clone()
    more[:5] = True
    half, once, far = (
        result(torch.full((100,), m), b) for m, b in ((0.5, broken), (0.0, broken), (-1.0, more))
    )
    trajectory = {Fraction(1, 2): half, Fraction(1): once, Fraction(2): once, Fraction(4): far}
    e.pgd_margin = lambda multiple=Fraction(1): trajectory[multiple]
    found = checks.more_steps_break_more(e)
    assert found.value == pytest.approx(5 / 200)  # out of all images
    assert found.status == "raised"
    assert found.ids == ("s0", "s1", "s2", "s3", "s4")
    trajectory |= {Fraction(2): result(torch.zeros(100), more), Fraction(4): result(torch.zeros(100), more)}
    assert checks.more_steps_break_more(e).value == pytest.approx(
        5 / 200
    )  # twice as many steps did it, and four times no more
    # From 10 to 0.5 in the first half and to 0 in the second: 5 % of the fall is late.
    assert checks.incomplete_optimization(e).status == "clear"
    trajectory[Fraction(1, 2)] = result(torch.full((100,), 2.0), broken)
    assert checks.incomplete_optimization(e).value == 1.0
    assert checks.incomplete_optimization(e).status == "raised"


@pytest.mark.parametrize(("late", "raised"), [(25, False), (26, True)])
def test_one_survivor_in_four_may_still_fall(late, raised):
    """What is broken has ended, and does not count: 100 of 120 survive."""
    e = Made(120, total=200)
    broken, half = torch.arange(120) >= 100, torch.full((120,), 0.5)
    half[:late] = half[100:] = 2.0  # of a fall from 10 to 0, two tenths come late
    trajectory = {Fraction(1, 2): result(half, broken), Fraction(1): result(torch.zeros(120), broken)}
    e.pgd_margin = lambda multiple=Fraction(1): trajectory[multiple]
    found = checks.incomplete_optimization(e)
    assert found.value == late / 100
    assert found.status == ("raised" if raised else "clear")
    assert found.ids == (tuple(f"s{i}" for i in range(late)) if raised else ())


def test_that_a_weak_attack_breaks_nothing_alone_is_no_finding_however_many_images():
    e = Made(5000)
    none = torch.zeros(5000, dtype=torch.bool)
    e.white_box_broken, e.random = none, result(broken=none)
    found = checks.noise_beats_white_box(e)
    assert (found.status, found.p) == ("clear", 1.0)


@pytest.mark.parametrize(("lost", "raised"), [(0, False), (2, False), (3, True)])
def test_what_was_met_and_not_returned_and_what_only_the_searched_form_loses(lost, raised):
    e = Made(100)
    met = torch.arange(100) < 50
    returned = met & (torch.arange(100) >= lost)
    e.pgd_stopped, e.pgd_ce = result(broken=met), result(broken=returned)
    silent = checks.silent_success(e)
    e.classifier = SimpleNamespace(precision="bf16")
    e.pgd_margin = lambda: AttackResult(torch.zeros(100), returned, torch.where(met, -1.0, 1.0))
    forms = checks.search_reference_mismatch(e)
    for found in (silent, forms):
        assert found.value == lost / 100
        assert (found.status == "raised") == raised
        assert found.ids == (tuple(f"s{i}" for i in range(lost)) if raised else ())


@pytest.mark.parametrize(
    ("left", "raised"),
    [((50, 20, 0, 0), False), ((50, 20, 5, 10), True), ((50, 20, 5, 11), True), ((10, 30, 0, 0), True)],
)
def test_accuracy_must_fall_to_guessing_and_never_rise(left, raised):
    """Ten classes: 10 of 100 is guessing. A rise between two radii is raised as well."""
    e = Made(100)
    e.classifier, e.threat = SimpleNamespace(num_classes=10), ThreatModel.parse("linf", "8/255")
    results = [result(broken=torch.arange(100) >= count) for count in left]
    e.pgd_margin = lambda: results[0]
    e.at_radius = lambda multiple: results[1 + (2, 4, 0).index(multiple)]
    found = checks.unbounded_attack_fails(e)
    assert (found.status == "raised") == raised
    assert found.value == left[-1] / 100


def test_effort_counts_what_any_variant_breaks():
    e = Made(100)
    rows = torch.arange(100)
    e.pgd_margin = lambda: result(broken=rows < 10)
    e.restarted = result(broken=rows < 15)
    e.with_step = lambda step: result(broken=(rows < 5) | (rows >= (94 if step < 1 else 100)))
    found = checks.restarts_break_more(e)
    assert found.value == pytest.approx(0.11)
    assert found.status == "raised"


def test_without_a_surrogate_transfer_is_not_run_and_with_one_its_own_breaks_count():
    e = Made(100)
    e.surrogate = None
    assert checks.transfer_beats_white_box(e).status == "not run"
    e.surrogate = SimpleNamespace(model_info=lambda: SimpleNamespace(id="other"))
    e.white_box_broken = torch.arange(100) < 50
    e.transferred = result(broken=torch.arange(100) < 60)
    assert checks.transfer_beats_white_box(e).value == 0.10
    assert checks.transfer_beats_white_box(e).status == "raised"


# --- the binarization test ---------------------------------------------------------------------------


def twelve(affine) -> Measurements:
    """Twelve images of an affine network with eight classes: PGD must solve every problem around them."""
    model = affine(np.random.default_rng(0).normal(size=(8, 12)), list(range(8)), (3, 2, 2))
    return measurements(model.classifier, images(12, low=0.25, high=0.75), BALL, SMALL)


def test_the_rule_separates_what_can_be_separated_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(200, 6, generator=generator)
    border = torch.full((6,), 9.0)
    rule = separate(inner, border)
    scores = rule(torch.cat((inner, border[None])))
    assert scores.argmax(1).tolist() == [0] * 200 + [1]
    # The threshold lies half-way: the border and the nearest inner point are equally far from it.
    assert float(scores[-1, 1]) == pytest.approx(1, abs=1e-4)
    assert float(scores[:-1, 1].max()) == pytest.approx(-1, abs=1e-4)
    assert separate(inner, inner.mean(0)) is None
    assert separate(torch.zeros(10, 6), torch.zeros(6)) is None


def test_an_attack_that_stands_still_fails_the_binarization_test(affine, monkeypatch):
    """On an affine network PGD must solve every problem; without steps, none."""
    m = twelve(affine)
    found = checks.binarization_test_fails(m)
    assert (found.value, found.status) == (1.0, "clear")
    monkeypatch.setattr(binarization, "pgd", stand_still)
    found = checks.binarization_test_fails(m)
    assert (found.value, found.status, found.beyond) == (0.0, "raised", "<")
    m.x, m.ids = m.x[:5], m.ids[:5]
    assert checks.binarization_test_fails(m).status == "not run"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inner_points_fill_nineteen_twentieths_of_the_ball(norm):
    """A twentieth is left between them and the known one on the border."""
    ball, x = ThreatModel.parse(norm, "1/10"), torch.full((1, 1, 4, 4), 0.5)
    points = binarization._inside(ball, x, 2000, torch.Generator().manual_seed(0)) - x
    size = points.flatten(1).norm(dim=1) if norm == "l2" else points.abs().amax((1, 2, 3))
    assert 0.0949 < float(size.max()) <= 0.095 + 1e-6


def test_problems_that_random_points_solve_are_left_out(monkeypatch):
    """195 outputs set any point apart from 200 others, and not from as many new ones."""
    rules = []

    def noted(inner, border):
        rules.append(separate(inner, border))
        return rules[-1]

    monkeypatch.setattr(binarization, "separate", noted)
    classifier = Classifier(Waves(), num_classes=195, input_shape=(3, 2, 2))
    m = measurements(classifier, images(12, low=0.25, high=0.75), BALL, SMALL)
    assert list(binarization.problems(m)) == []
    assert len(rules) == 12
    assert None not in rules
    assert checks.binarization_test_fails(m).status == "not run"


def test_chance_solves_no_problem(affine, monkeypatch):
    def guess(classifier, x, y, *, threat, **_):
        return uniform_noise(classifier, x, y, threat=threat, draws=20)

    monkeypatch.setattr(binarization, "pgd", guess)
    found = checks.binarization_test_fails(twelve(affine))
    assert (found.value, found.status) == (0.0, "raised")


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("black", "raised"), [(0, False), (1, False), (3, True)])
def test_gradients_that_are_not_finite_are_counted(black, raised):
    x = images(40, low=0.25, high=0.75)
    x[:black, 0, 0, 0] = 0.0
    m = measurements(Classifier(Roots(), num_classes=3, input_shape=(3, 2, 2)), x, BALL, SMALL)
    found = checks.unavailable_gradients(m)
    assert found.value == black / 40
    assert (found.status == "raised") == raised
    assert found.ids == (tuple(map(str, range(black))) if raised else ())
    assert f"NaN or infinite {black}" in found.evidence


def test_a_gradient_that_cross_entropy_alone_does_not_have_is_counted(affine):
    """It takes in every class; the margin leaves the third one out, whose gradient is infinite."""
    inner = affine(np.eye(3, 12), [3.0, 2.0, -9.0], (3, 2, 2)).classifier.module
    steep = identity_with_backward(lambda gradient: torch.where(gradient == 0, gradient, torch.inf))

    class Net(nn.Module):
        def forward(self, x):
            z = inner(x)
            return torch.cat((z[:, :2], steep(z[:, 2:])), 1)

    m = measurements(Classifier(Net(), num_classes=3, input_shape=(3, 2, 2)), images(40), BALL, SMALL)
    found = checks.unavailable_gradients(m)
    assert (found.status, found.value) == ("raised", 1.0)
    assert "NaN or infinite 40, margin gradient zero 0" in found.evidence


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("stochastic", "unstable_predictions"),
        ("batch_dependent", "unstable_predictions"),
        ("probabilities", "probability_outputs"),
        ("one_output", ""),
    ],
)
def test_flags_of_the_preflight_raise_their_check(kind, raised):
    m = SimpleNamespace(flags={kind: Flag(kind=kind, evidence="seen in 3 of 8")})
    found = [checks.unstable_predictions(m), checks.probability_outputs(m)]
    assert [f.check for f in found if f.status == "raised"] == [raised] * bool(raised)
    assert [f.evidence for f in found if f.check == raised] == ["seen in 3 of 8"] * bool(raised)


@pytest.mark.parametrize(("scale", "raised"), [(1e-6, False), (1e-9, True)])
def test_gradients_that_can_hardly_be_told_from_zero_are_counted(affine, scale, raised):
    """Slopes of length 1 times the scale: attacks of others add constants of 1e-8 and more to such."""
    weight = np.eye(3, 12) / 2**0.5
    model = affine(scale * weight, [0.0, 0.0, 0.0], (3, 2, 2))
    found = checks.unavailable_gradients(measurements(model.classifier, images(40), BALL, SMALL))
    assert found.status == ("raised" if raised else "clear")
    assert f"margin gradient zero 0 and tiny {40 * raised}" in found.evidence


def three_classes(affine):
    return affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2)).classifier


def turned(honest, cosine: float):
    """The gradient turned away by an angle: what it predicts correlates as its cosine says."""

    def value_and_gradient(*arguments, **options):
        z, g = honest(*arguments, **options)
        flat = g.flatten(1)
        other = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
        length = flat.norm(dim=1, keepdim=True)
        other -= flat * (flat * other).sum(1, keepdim=True) / length**2
        other *= length / other.norm(dim=1, keepdim=True)
        return z, (cosine * flat + (1 - cosine**2) ** 0.5 * other).view_as(g)

    return value_and_gradient


def test_gradients_predict_a_linear_model_and_not_its_opposite(affine):
    classifier = three_classes(affine)
    m = measurements(classifier, images(40), ThreatModel.parse("linf", "1/1000"), SMALL)
    assert checks.uninformative_gradients(m).value == pytest.approx(1, abs=0.02)
    honest = classifier.value_and_gradient
    for cosine, status in ((-1.0, "raised"), (0.4, "raised"), (0.6, "clear")):
        classifier.value_and_gradient = turned(honest, cosine)
        found = checks.uninformative_gradients(m)
        assert found.value == pytest.approx(cosine, abs=0.08)
        assert (found.status, found.beyond) == (status, "<")


def test_the_probes_of_an_l2_ball_are_a_quarter_of_its_radius_long(affine):
    classifier = three_classes(affine)
    m = measurements(classifier, images(5), ThreatModel.parse("l2", "1/2"), SMALL)
    lengths, honest = [], classifier.logits
    classifier.logits = lambda x: lengths.append((x - m.x).flatten(1).norm(dim=1)) or honest(x)
    checks.uninformative_gradients(m)
    torch.testing.assert_close(torch.stack(lengths), torch.full((2 * checks.PROBES, 5), 0.125))


# --- measurements ------------------------------------------------------------------------------------


def test_the_white_box_is_all_that_has_gradients(affine):
    """The lower margin of both PGD runs; what FGSM or one of them broke."""
    m = measurements(three_classes(affine), images(4), BALL, SMALL)
    yes, no = torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.bool)
    m.results = {
        "fgsm": result(torch.zeros(4), yes.roll(2)),
        "pgd_ce": result(torch.tensor([1.0, 2.0, 3.0, 4.0]), yes),
        "pgd_margin_x1": result(torch.tensor([4.0, 3.0, 2.0, 1.0]), yes.roll(1)),
    }
    assert m.white_box_margin.tolist() == [1, 2, 2, 1]
    assert m.pgd_broken.tolist() == [True, True, False, False]
    assert m.white_box_broken.tolist() == [True, True, True, False]
    m.results["pgd_margin_x1"] = result(torch.zeros(4), no)
    assert m.pgd_broken.tolist() == yes.tolist()


def test_restarts_and_step_sizes_are_those_asked_for(monkeypatch, affine):
    """Steps are a share of the radius: of the larger one in a larger ball."""
    given = []
    monkeypatch.setattr(
        "robustbench_cure.masking.evidence.pgd",
        lambda classifier, x, y, **options: given.append(options) or Candidates.start(x),
    )
    m = measurements(three_classes(affine), images(4), BALL, Settings(steps=20, restarts=7))
    for made in (m.restarted, m.with_step(0.05), m.with_step(1.0), m.at_radius(2), m.at_radius(0)):
        assert not bool(made.broken.any())
    assert [options["restarts"] for options in given] == [7, 1, 1, 1, 1]
    assert [options["threat"].radius for options in given] == pytest.approx(
        [*[BALL.radius] * 3, 2 * BALL.radius, 1.0]
    )
    shares = [options["step_size"] / options["threat"].radius for options in given]
    assert shares == pytest.approx([0.25, 0.05, 1.0, 0.25, 0.05])


@pytest.mark.parametrize("steps", [5, 40])
def test_spsa_may_cross_the_ball_twice(monkeypatch, affine, steps):
    """However many steps it is given: with fewer than it takes to get there it could break nothing."""
    given = {}
    monkeypatch.setattr(
        "robustbench_cure.masking.evidence.spsa",
        lambda classifier, x, y, **options: given.update(options) or Candidates.start(x),
    )
    m = measurements(three_classes(affine), images(4), BALL, Settings(spsa_steps=steps))
    assert not bool(m.spsa.broken.any())
    assert (given["steps"], given["stop"]) == (steps, "never")
    assert given["steps"] * given["step_size"] == pytest.approx(4 * BALL.radius)


def test_a_candidate_that_is_not_admitted_counts_as_the_image_itself(affine):
    m = measurements(three_classes(affine), images(5), BALL, SMALL)
    candidate = Candidates.start(m.x)
    candidate.x_adv = candidate.x_adv + 1.0
    found = m.verified(candidate)
    assert torch.equal(found.margin, m.clean_margin)
    assert not found.broken.any()


def test_images_that_are_misclassified_are_left_out_and_counted(affine):
    classifier = three_classes(affine)
    data = classified(classifier, images(6))
    data.labels[:2] = (data.labels[:2] + 1) % 3
    m = Measurements(classifier, data, BALL, SMALL, flags=())
    assert (m.total, len(m), m.ids) == (6, 4, ("2", "3", "4", "5"))
    assert float(m.clean_margin.min()) > 0


# --- the positive control ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "enough"),
    [
        (Power(4, 12), True),
        (Power(3, 12), False),  # less than a third
        (Power(9, 9), False),  # nine are not enough
        (Power(10, 10), True),
        (Power(10, 10, binarized=True), True),
        (Power(0, 0), False),
        (Power(12, 12, binarized=True), True),
        (Power(8, 12, binarized=True), False),  # surely less than 95 %
        (Power(9, 9, binarized=True), False),
        (Power(0, 0, binarized=True), False),
    ],
)
def test_power_is_enough_where_adversarial_examples_are_known(power, enough):
    assert power.enough == enough


def test_power_counts_what_gradients_broke_and_nothing_else():
    known, broken = torch.arange(20) < 12, torch.arange(20) >= 9
    assert on_broken(broken, known) == Power(3, 12)


@pytest.mark.parametrize(
    ("before", "power", "after"),
    [
        ("clear", Power(0, 30), "inconclusive"),
        ("clear", Power(30, 30), "clear"),
        ("raised", Power(0, 30), "raised"),  # what was found was found
        ("not run", Power(0, 30), "not run"),
    ],
)
def test_a_clear_check_without_power_is_inconclusive(before, power, after):
    findings = [made("spsa_below_pgd", before), made("silent_success", "clear")]
    a, b = controlled(findings, {"spsa_below_pgd": power})
    assert (a.status, b.status) == (after, "clear")
    assert ("control: of 30 images broken by gradients" in a.evidence) == (before == "clear")


@pytest.mark.parametrize(("eps", "binarized"), [("51/255", False), ("4/255", True)])
def test_searches_that_stand_still_show_no_power(monkeypatch, eps, binarized):
    """Where PGD breaks images or, in small balls, solves problems, so must SPSA, and Square with it."""
    classifier, data = load_model("digits_normal", device="cpu"), load_dataset("digits").subset(20)
    work = Settings(steps=20, spsa_steps=10, spsa_samples=32, queries=100, planted=12)
    m = Measurements(classifier, data, ThreatModel.parse("linf", eps), work, flags=())

    def measured(*again: str) -> tuple[Power, Power]:
        """Power of SPSA and of both, after these attacks are run again."""
        for name in again:
            m.results.pop(name, None)
        by_check = powers(m)
        return by_check["spsa_below_pgd"], by_check["gradient_free_beats_white_box"]

    for power in measured():
        assert power.binarized == binarized
        assert power.known >= 10
        assert power.enough
    monkeypatch.setattr("robustbench_cure.masking.evidence.spsa", stand_still)
    spsa, either = measured("spsa")
    assert spsa.broken == 0
    assert either.broken > 0  # Square alone
    monkeypatch.setattr("robustbench_cure.masking.evidence.square", stand_still)
    _, either = measured("square")
    assert either.broken == 0
    assert not either.enough


def stand_still(classifier, x, *arguments, **options) -> Candidates:
    return Candidates.start(x)


# --- findings and the conclusion ---------------------------------------------------------------------


def made(check: str, status: str) -> Finding:
    return Finding(check=check, status=status, evidence="")


@pytest.mark.parametrize(
    ("statuses", "n", "words", "kind"),
    [
        ("ccc", 100, "no evidence of masking under 3 of 16 checks (n = 100)", "no evidence"),
        ("cnc", 100, "no evidence of masking under 2 of 16 checks (n = 100)", "no evidence"),
        ("ccc", 49, "not conclusive: too few points (n = 49, 50 are needed)", "not conclusive"),
        ("nnn", 100, "not conclusive: too few points (n = 100, 50 are needed)", "not conclusive"),
        ("rcr", 100, "suspected: spsa_below_pgd, silent_success (n = 100)", "suspected"),
        ("crc", 3, "suspected: fgsm_beats_pgd (n = 3)", "suspected"),
        ("ric", 100, "suspected: spsa_below_pgd (n = 100)", "suspected"),
        (
            "ici",
            100,
            "not conclusive: no power in spsa_below_pgd, silent_success (n = 100)",
            "not conclusive",
        ),
    ],
)
def test_words_and_exit_code_come_from_one_place(statuses, n, words, kind):
    status = {"c": "clear", "r": "raised", "n": "not run", "i": "inconclusive"}
    names = ("spsa_below_pgd", "fgsm_beats_pgd", "silent_success")
    findings = [made(name, status[s]) for name, s in zip(names, statuses, strict=True)]
    for fail in (False, True):
        conclusion = conclude(findings, n, fail_on=("suspected",) if fail else ())
        assert conclusion.words == words
        assert conclusion.kind == kind
        assert conclusion.exit_code == int(fail and kind == "suspected")
        assert "not masked" not in conclusion.words


def test_findings_stand_in_the_order_of_the_table():
    findings = [made(name, "clear") for name in ("silent_success", "spsa_below_pgd", "fgsm_beats_pgd")]
    assert [f.check for f in in_order(findings)] == ["spsa_below_pgd", "fgsm_beats_pgd", "silent_success"]


@pytest.mark.parametrize(
    ("value", "threshold", "beyond", "p", "words"),
    [
        (0.0517, 0.05, ">", 0.32, ("0.0517", "> 0.05", "0.32")),
        (0.969, 0.95, "<", 0.8063, ("0.969", "< 0.95", "0.81")),
        (-0.001234, 0.5, "<", None, ("-0.0012", "< 0.5", "")),
        (0.0000518, 0.01, ">", 0.00123, ("5.2e-05", "> 0.01", "0.0012")),
        (1.0, 1 / 3, ">", 3e-30, ("1", "> 0.333", "3e-30")),
        (None, None, ">", None, ("", "", "")),
    ],
)
def test_a_finding_says_on_which_side_it_is_raised_and_how_sure(value, threshold, beyond, p, words):
    numbers = {"value": value, "threshold": threshold, "beyond": beyond, "p": p}
    f = Finding(check="spsa_below_pgd", status="clear", evidence="", **numbers)
    assert (f.value_words, f.limit_words, f.p_words) == words


def test_the_p_of_a_finding_is_that_of_its_exact_test():
    e = Made(100)
    margin = torch.zeros(100)
    margin[:6] = -1.0
    e.spsa = result(margin)
    found = checks.spsa_below_pgd(e)  # 6 %, more than 5, and not sure: clear is right
    assert (found.status, found.value) == ("clear", 0.06)
    assert found.p == binomtest(6, 6, alternative="greater").pvalue > 0.01
    few = torch.arange(100) < 3
    e.random, e.white_box_broken = result(broken=few), torch.zeros(100, dtype=torch.bool)
    assert checks.noise_beats_white_box(e).p == binomtest(3, 100, 0.01, alternative="greater").pvalue
    assert binarization.p_missed(20, 32) == binomtest(20, 32, 0.95, alternative="less").pvalue


@pytest.mark.parametrize(("letter", "check"), [*zip("ABCDEFGHIJKLMNOP", CHECKS, strict=True)])
def test_a_finding_is_read_by_its_name_and_by_the_letter_of_older_files(letter, check):
    """Older files have another word under "check", or none; both have the letter."""
    f = Finding(check=check, status="raised", value=0.5, threshold=0.05, beyond="<", evidence="", ids=("a",))
    row = to_json(f)
    assert (row["letter"], row["check"]) == (letter, check)
    assert from_json(row) == f
    assert from_json(row | {"check": "scatter"}) == f
    assert from_json({key: row[key] for key in row if key != "check"}) == f


def test_a_finding_of_no_check_is_refused():
    row = {"status": "clear", "evidence": ""}
    with pytest.raises(ValueError, match="unknown check Q"):
        from_json(row | {"letter": "Q"})
    with pytest.raises(KeyError):
        from_json(row)
    with pytest.raises(ValueError, match="not a finding"):
        from_json("a file of somebody else's")


def test_every_check_is_explained_under_a_short_name():
    assert len(CHECKS) == 16
    assert max(map(len, CHECKS)) <= 30  # its column in a terminal
    assert all(about.run.__name__ == name for name, about in CHECKS.items())
    for about in CHECKS.values():
        assert all((about.title, about.raised_when, about.means, about.do_next, about.source))
