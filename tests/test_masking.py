"""Checks for masked gradients: deceptive networks raise exactly their letters, honest ones none."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Proposal, uniform_noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import from_arrays
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.masking import checks
from robustbench_cure.masking import planted as planted_module
from robustbench_cure.masking.deceptive import DECEPTIVE
from robustbench_cure.masking.evidence import Evidence, Outcome, Settings
from robustbench_cure.masking.explanations import EXPLANATIONS
from robustbench_cure.masking.finding import Finding
from robustbench_cure.masking.planted import separate
from robustbench_cure.masking.power import Power, controlled, on_broken, powers
from robustbench_cure.masking.verdict import conclude, diagnose, flag_findings
from robustbench_cure.threat import ThreatModel

THREAT = ThreatModel.parse("linf", "51/255")
SMALL = Settings(steps=20, spsa_steps=10, spsa_samples=32, draws=20, restarts=3, queries=200, planted=12)
EXPECTED = {
    "zero gradient": "ABEHJO",
    "quantised input": "BEHJO",
    "saturated logits": "B",
    "softmax output": "L",
    "JPEG-like rounding": "ABEHJO",
    "shattered gradient": "AEHJO",
}


def letters(module, n: int = 60) -> str:
    classifier = Classifier(module, num_classes=10, input_shape=(1, 8, 8), batch_size=256)
    found = diagnose(classifier, load_dataset("digits").subset(n), THREAT, SMALL)
    return "".join(finding.letter for finding in found.findings if finding.status == "raised")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_normal", "digits_pgd_at", "digits_deepfool", "digits_cure"])
def test_honest_networks_raise_nothing(name):
    assert letters(load_model(name, device="cpu").module) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_deceptive_network_raises_exactly_its_letters(name):
    torch.manual_seed(0)
    assert letters(DECEPTIVE[name](load_model("digits_cure", device="cpu").module)) == EXPECTED[name]


@pytest.mark.slow
def test_a_random_network_is_caught_whatever_else_its_noise_raises():
    torch.manual_seed(0)
    found = letters(DECEPTIVE["random"](load_model("digits_cure", device="cpu").module))
    assert "K" in found
    assert "B" not in found


def test_all_deceptive_networks_are_tested():
    assert {*EXPECTED, "random"} == set(DECEPTIVE)


@pytest.mark.parametrize("name", ["zero gradient", "saturated logits", "softmax output"])
def test_deceptive_networks_keep_the_labels_of_the_honest_one(name):
    module = load_model("digits_cure", device="cpu").module
    x = load_dataset("digits").images[:50]
    with torch.no_grad():
        assert torch.equal(DECEPTIVE[name](module)(x).argmax(1), module(x).argmax(1))


def test_a_cosine_transform_without_rounding_is_the_identity():
    """The compressed network's blocks go back where they came from: at most the rounding is lost."""
    wrapper = DECEPTIVE["JPEG-like rounding"](torch.nn.Identity())
    x = torch.rand(2, 3, 16, 24)
    assert (wrapper(x) - x).abs().max() < 0.3
    assert (wrapper(x) - x).abs().mean() < 0.05


# --- single checks on made-up outcomes ---------------------------------------------------------------


class Made:
    """Evidence whose outcomes are given."""

    def __init__(self, m: int, total: int | None = None) -> None:
        self.settings, self.total, self.m = Settings(), total or m, m
        self.ids = tuple(f"s{i}" for i in range(m))
        self.clean_margin = torch.full((m,), 10.0)
        self.x = torch.zeros(m, 1, 2, 2)
        self.white_box_margin = torch.zeros(m)

    def __len__(self) -> int:
        return self.m


def outcome(margin=None, broken=None) -> Outcome:
    margin = torch.zeros(0) if margin is None else margin
    return Outcome(margin, broken, margin)


@pytest.mark.parametrize(
    ("lower", "higher", "raised"),
    [(0, 50, False), (50, 0, True), (4, 0, False), (40, 60, False), (80, 20, True)],
)
def test_the_scatter_needs_many_clearly_lower_points_and_a_sure_sign(lower, higher, raised):
    e = Made(100)
    margin = torch.zeros(100)
    margin[:lower], margin[lower : lower + higher] = -1.0, 1.0
    e.spsa = outcome(margin)
    found = checks.scatter(e)
    p = binomtest(lower, max(1, lower + higher), alternative="greater").pvalue
    assert (found.status == "raised") == raised == (lower > 5 and p < 0.01)
    assert found.value == pytest.approx(lower / 100)
    if raised:
        assert found.ids == tuple(f"s{i}" for i in range(min(lower, 50)))
    e.spsa = outcome(margin * 0.1)  # lower, but by less than half a logit
    assert checks.scatter(e).status == "clear"


@pytest.mark.parametrize(("alone", "raised"), [(0, False), (1, False), (3, False), (5, True), (20, True)])
def test_what_a_weak_attack_breaks_alone_is_raised_when_it_is_surely_above_one_per_cent(alone, raised):
    e = Made(100)
    e.white_box_broken = torch.zeros(100, dtype=torch.bool)
    e.white_box_broken[50:] = True
    broken = torch.zeros(100, dtype=torch.bool)
    broken[:alone] = True
    broken[50:80] = True  # these the white box broke too
    e.spsa = e.random = outcome(broken=broken)
    none = torch.zeros(100, dtype=torch.bool)
    e.square = outcome(broken=none)
    for check in (checks.black_box, checks.random_noise):
        found = check(e)
        assert (found.status == "raised") == raised
        assert found.value == alone / 100
    e.spsa, e.square = outcome(broken=none), outcome(broken=broken)  # Square alone counts as well
    assert checks.black_box(e).value == alone / 100
    assert (
        binomtest(5, 100, 0.01, alternative="greater").pvalue
        < 0.01
        < binomtest(3, 100, 0.01, alternative="greater").pvalue
    )


def test_fgsm_is_compared_with_both_pgd_runs():
    e = Made(100)
    none, some = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    some[:10] = True
    e.fgsm, e.iterated_broken = outcome(broken=some), some
    assert checks.single_step(e).status == "clear"
    e.iterated_broken = none
    assert checks.single_step(e).status == "raised"


def test_more_steps_and_late_falls():
    e = Made(100, total=200)
    broken = torch.zeros(100, dtype=torch.bool)
    more = broken.clone()
    more[:5] = True
    half, once, far = (
        outcome(torch.full((100,), m), b) for m, b in ((0.5, broken), (0.0, broken), (-1.0, more))
    )
    trajectory = {Fraction(1, 2): half, Fraction(1): once, Fraction(2): once, Fraction(4): far}
    e.pgd_margin = lambda multiple=Fraction(1): trajectory[multiple]
    found = checks.steps(e)
    assert found.value == pytest.approx(5 / 200)  # out of all images
    assert found.status == "raised"
    assert found.ids == ("s0", "s1", "s2", "s3", "s4")
    trajectory |= {Fraction(2): outcome(torch.zeros(100), more), Fraction(4): outcome(torch.zeros(100), more)}
    assert checks.steps(e).value == pytest.approx(
        5 / 200
    )  # twice as many steps did it, and four times no more
    # From 10 to 0.5 in the first half and to 0 in the second: 5 % of the fall is late.
    assert checks.unfinished(e).status == "clear"
    trajectory[Fraction(1, 2)] = outcome(torch.full((100,), 2.0), broken)
    assert checks.unfinished(e).value == 1.0
    assert checks.unfinished(e).status == "raised"


@pytest.mark.parametrize(("late", "raised"), [(25, False), (26, True)])
def test_one_survivor_in_four_may_still_fall(late, raised):
    """What is broken has ended, and does not count: 100 of 120 survive."""
    e = Made(120, total=200)
    broken, half = torch.arange(120) >= 100, torch.full((120,), 0.5)
    half[:late] = half[100:] = 2.0  # of a fall from 10 to 0, two tenths come late
    trajectory = {Fraction(1, 2): outcome(half, broken), Fraction(1): outcome(torch.zeros(120), broken)}
    e.pgd_margin = lambda multiple=Fraction(1): trajectory[multiple]
    found = checks.unfinished(e)
    assert found.value == late / 100
    assert found.status == ("raised" if raised else "clear")
    assert found.ids == (tuple(f"s{i}" for i in range(late)) if raised else ())


def test_that_a_weak_attack_breaks_nothing_alone_is_no_finding_however_many_images():
    e = Made(5000)
    none = torch.zeros(5000, dtype=torch.bool)
    e.white_box_broken, e.random = none, outcome(broken=none)
    found = checks.random_noise(e)
    assert (found.status, found.p) == ("clear", 1.0)


@pytest.mark.parametrize(("lost", "raised"), [(0, False), (2, False), (3, True)])
def test_what_was_met_and_not_returned_and_what_only_the_searched_form_loses(lost, raised):
    e = Made(100)
    met = torch.arange(100) < 50
    returned = met & (torch.arange(100) >= lost)
    e.pgd_stopped, e.pgd_ce = outcome(broken=met), outcome(broken=returned)
    silent = checks.silent(e)
    e.classifier = SimpleNamespace(precision="bf16")
    e.pgd_margin = lambda: Outcome(torch.zeros(100), returned, torch.where(met, -1.0, 1.0))
    forms = checks.forms(e)
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
    outcomes = [outcome(broken=torch.arange(100) >= count) for count in left]
    e.pgd_margin = lambda: outcomes[0]
    e.at_radius = lambda multiple: outcomes[1 + (2, 4, 0).index(multiple)]
    found = checks.radius(e)
    assert (found.status == "raised") == raised
    assert found.value == left[-1] / 100


def test_effort_counts_what_any_variant_breaks():
    e = Made(100)
    rows = torch.arange(100)
    e.pgd_margin = lambda: outcome(broken=rows < 10)
    e.restarted = outcome(broken=rows < 15)
    e.stepped = lambda step: outcome(broken=(rows < 5) | (rows >= (94 if step < 1 else 100)))
    found = checks.effort(e)
    assert found.value == pytest.approx(0.11)
    assert found.status == "raised"


def test_without_a_surrogate_transfer_is_not_run_and_with_one_its_own_breaks_count():
    e = Made(100)
    e.surrogate = None
    assert checks.transfer(e).status == "not run"
    e.surrogate = SimpleNamespace(model_info=lambda: SimpleNamespace(id="other"))
    e.white_box_broken = torch.arange(100) < 50
    e.transferred = outcome(broken=torch.arange(100) < 60)
    assert checks.transfer(e).value == 0.10
    assert checks.transfer(e).status == "raised"


# --- planted adversarial examples --------------------------------------------------------------------


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


def test_an_attack_that_stands_still_misses_every_planted_example(affine, monkeypatch):
    """On an affine network PGD must solve every problem; without steps, none."""
    model = affine(np.random.default_rng(0).normal(size=(8, 12)), list(range(8)), (3, 2, 2))
    e = Evidence.__new__(Evidence)
    e.classifier, e.threat, e.settings = model.classifier, ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((12, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    e.ids = tuple(map(str, range(12)))
    found = planted_module.planted(e)
    assert (found.value, found.status) == (1.0, "clear")
    monkeypatch.setattr(planted_module, "pgd", lambda classifier, x, *a, **k: Proposal.start(x))
    found = planted_module.planted(e)
    assert (found.value, found.status, found.beyond) == (0.0, "raised", "<")
    e.x, e.ids = e.x[:5], e.ids[:5]
    assert planted_module.planted(e).status == "not run"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inner_points_fill_nineteen_twentieths_of_the_ball(norm):
    """A twentieth is left between them and the planted one on the border."""
    ball, x = ThreatModel.parse(norm, "1/10"), torch.full((1, 1, 4, 4), 0.5)
    points = planted_module._inside(ball, x, 2000, torch.Generator().manual_seed(0)) - x
    size = points.flatten(1).norm(dim=1) if norm == "l2" else points.abs().amax((1, 2, 3))
    assert 0.0949 < float(size.max()) <= 0.095 + 1e-6


class Waves(nn.Module):
    """Outputs without order: the phases of 195 fast waves across the image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", 1e3 * torch.randn(12, 195, generator=generator))

    def forward(self, x):
        return torch.cos(x.flatten(1) @ self.weight)


def test_problems_that_random_points_solve_are_left_out(monkeypatch):
    """195 outputs set any point apart from 200 others, and not from as many new ones."""
    rules = []

    def noted(inner, border):
        rules.append(separate(inner, border))
        return rules[-1]

    monkeypatch.setattr(planted_module, "separate", noted)
    e = Evidence.__new__(Evidence)
    e.classifier = Classifier(Waves(), num_classes=195, input_shape=(3, 2, 2))
    e.threat, e.settings = ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((12, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    e.ids = tuple(map(str, range(12)))
    assert list(planted_module.problems(e)) == []
    assert len(rules) == 12
    assert None not in rules
    assert planted_module.planted(e).status == "not run"


def test_chance_solves_no_planted_problem(affine, monkeypatch):
    model = affine(np.random.default_rng(0).normal(size=(8, 12)), list(range(8)), (3, 2, 2))
    e = Evidence.__new__(Evidence)
    e.classifier, e.threat, e.settings = model.classifier, ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((12, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    e.ids = tuple(map(str, range(12)))

    def guess(classifier, x, y, *, threat, **_):
        return uniform_noise(classifier, x, y, threat=threat, draws=20)

    monkeypatch.setattr(planted_module, "pgd", guess)
    found = planted_module.planted(e)
    assert (found.value, found.status) == (0.0, "raised")


class Roots(nn.Module):
    """Finite outputs everywhere, infinite slopes at black pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(12, 3, generator=generator))

    def forward(self, x):
        return x.flatten(1).sqrt() @ self.weight


@pytest.mark.parametrize(("black", "raised"), [(0, False), (1, False), (3, True)])
def test_gradients_that_are_not_finite_are_counted(black, raised):
    e = Evidence.__new__(Evidence)
    e.classifier = Classifier(Roots(), num_classes=3, input_shape=(3, 2, 2))
    e.threat, e.settings = ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    e.x[:black, 0, 0, 0] = 0.0
    e.y = e.classifier.logits(e.x).argmax(1)
    e.ids = tuple(map(str, range(40)))
    found = checks.gradients(e)
    assert found.value == black / 40
    assert (found.status == "raised") == raised
    assert found.ids == (tuple(map(str, range(black))) if raised else ())
    assert f"NaN or infinite {black}" in found.evidence


class Steep(torch.autograd.Function):
    """The identity; where a slope is asked for, it is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return torch.where(slope == 0, slope, torch.inf)


def test_a_gradient_that_cross_entropy_alone_does_not_have_is_counted(affine):
    """It takes in every class; the margin leaves the third one out."""
    model = affine(np.eye(3, 12), [3.0, 2.0, -9.0], (3, 2, 2))
    inner = model.classifier.module

    class Net(nn.Module):
        def forward(self, x):
            z = inner(x)
            return torch.cat((z[:, :2], Steep.apply(z[:, 2:])), 1)

    e = Evidence.__new__(Evidence)
    e.classifier = Classifier(Net(), num_classes=3, input_shape=(3, 2, 2))
    e.threat, e.settings = ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    e.y, e.ids = e.classifier.logits(e.x).argmax(1), tuple(map(str, range(40)))
    found = checks.gradients(e)
    assert (found.status, found.value) == ("raised", 1.0)
    assert "NaN or infinite 40, margin gradient zero 0" in found.evidence


@pytest.mark.parametrize(
    ("kind", "letter"),
    [("stochastic", "K"), ("batch_dependent", "K"), ("probabilities", "L"), ("one_output", "")],
)
def test_what_preflight_sees_raises_k_or_l(kind, letter):
    found = flag_findings({kind: Flag(kind=kind, evidence="seen in 3 of 8")})
    assert "".join(f.letter for f in found if f.status == "raised") == letter
    assert [f.evidence for f in found if f.letter == letter] == ["seen in 3 of 8"] * bool(letter)


@pytest.mark.parametrize(("scale", "raised"), [(1e-6, False), (1e-9, True)])
def test_gradients_that_can_hardly_be_told_from_zero_are_counted(affine, scale, raised):
    """Slopes of length 1 times the scale: attacks of others add constants of 1e-8 and more to such."""
    weight = np.eye(3, 12) / 2**0.5
    model = affine(scale * weight, [0.0, 0.0, 0.0], (3, 2, 2))
    e = Evidence.__new__(Evidence)
    e.classifier, e.threat, e.settings = model.classifier, ThreatModel.parse("linf", "8/255"), SMALL
    e.x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    e.y = e.classifier.logits(e.x).argmax(1)
    e.ids = tuple(map(str, range(40)))
    found = checks.gradients(e)
    assert found.status == ("raised" if raised else "clear")
    assert f"margin gradient zero 0 and tiny {40 * raised}" in found.evidence


def test_gradients_predict_a_linear_model_and_not_its_opposite(affine):
    model = affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2))
    x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    y = torch.from_numpy(model.logits(x).argmax(1))

    class Images:
        images, labels, ids = x, y, tuple(map(str, range(40)))

        def __len__(self) -> int:
            return 40

    small = ThreatModel.parse("linf", "1/1000")
    e = Evidence(model.classifier, Images(), small, SMALL)
    assert checks.faithful(e).value == pytest.approx(1, abs=0.02)
    honest = model.classifier.value_and_gradient
    model.classifier.value_and_gradient = lambda *a, **k: (honest(*a, **k)[0], -honest(*a, **k)[1])
    assert checks.faithful(e).value == pytest.approx(-1, abs=0.02)
    assert (checks.faithful(e).status, checks.faithful(e).beyond) == ("raised", "<")

    def turned(cosine: float):
        """The gradient turned away by an angle: what it predicts correlates as its cosine says."""

        def lie(*arguments, **options):
            z, g = honest(*arguments, **options)
            flat, other = (
                g.flatten(1),
                torch.randn(g.flatten(1).shape, generator=torch.Generator().manual_seed(1)),
            )
            length = flat.norm(dim=1, keepdim=True)
            other -= flat * (flat * other).sum(1, keepdim=True) / length**2
            other *= length / other.norm(dim=1, keepdim=True)
            return z, (cosine * flat + (1 - cosine**2) ** 0.5 * other).view_as(g)

        return lie

    for cosine, status in ((0.4, "raised"), (0.6, "clear")):
        model.classifier.value_and_gradient = turned(cosine)
        assert checks.faithful(e).value == pytest.approx(cosine, abs=0.08)
        assert checks.faithful(e).status == status


def test_the_probes_of_an_l2_ball_are_a_quarter_of_its_radius_long(affine):
    model = affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2))
    e = Evidence.__new__(Evidence)
    e.classifier, e.threat, e.settings = model.classifier, ThreatModel.parse("l2", "1/2"), SMALL
    e.x = torch.rand((5, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    e.y, e.ids = e.classifier.logits(e.x).argmax(1), tuple("abcde")
    seen, honest = [], e.classifier.logits
    e.classifier.logits = lambda x: seen.append((x - e.x).flatten(1).norm(dim=1)) or honest(x)
    checks.faithful(e)
    torch.testing.assert_close(torch.stack(seen), torch.full((2 * checks.PROBES, 5), 0.125))


def test_the_white_box_is_all_that_has_gradients():
    """The lower margin of both PGD runs; what FGSM or one of them broke."""
    e = Evidence.__new__(Evidence)
    yes, no = torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.bool)
    e.outcomes = {
        "fgsm": outcome(torch.zeros(4), yes.roll(2)),
        "pgd_ce": outcome(torch.tensor([1.0, 2.0, 3.0, 4.0]), yes),
        "pgd_margin_x1": outcome(torch.tensor([4.0, 3.0, 2.0, 1.0]), yes.roll(1)),
    }
    assert e.white_box_margin.tolist() == [1, 2, 2, 1]
    assert e.iterated_broken.tolist() == [True, True, False, False]
    assert e.white_box_broken.tolist() == [True, True, True, False]
    e.outcomes["pgd_margin_x1"] = outcome(torch.zeros(4), no)
    assert e.iterated_broken.tolist() == yes.tolist()


def test_more_effort_is_what_it_is_called(monkeypatch, affine):
    """Restarts, and steps that are a share of the radius: of the larger one in a larger ball."""
    model = affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2))
    x = torch.rand((4, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    data = from_arrays("toy", "test", x, model.classifier.logits(x).argmax(1), classes="abc")
    given = []
    monkeypatch.setattr(
        "robustbench_cure.masking.evidence.pgd",
        lambda classifier, x, y, **options: given.append(options) or Proposal.start(x),
    )
    ball = ThreatModel.parse("linf", "8/255")
    e = Evidence(model.classifier, data, ball, Settings(steps=20, restarts=7))
    for made in (e.restarted, e.stepped(0.05), e.stepped(1.0), e.at_radius(2), e.at_radius(0)):
        assert not bool(made.broken.any())
    assert [options["restarts"] for options in given] == [7, 1, 1, 1, 1]
    assert [options["threat"].radius for options in given] == pytest.approx(
        [*[ball.radius] * 3, 2 * ball.radius, 1.0]
    )
    shares = [options["step_size"] / options["threat"].radius for options in given]
    assert shares == pytest.approx([0.25, 0.05, 1.0, 0.25, 0.05])


@pytest.mark.parametrize("steps", [5, 40])
def test_spsa_may_cross_the_ball_twice(monkeypatch, affine, steps):
    """However many steps it is given: with fewer than it takes to get there its silence would say nothing."""
    model = affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2))
    x = torch.rand((4, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    data = from_arrays("toy", "test", x, model.classifier.logits(x).argmax(1), classes="abc")
    given = {}
    monkeypatch.setattr(
        "robustbench_cure.masking.evidence.spsa",
        lambda classifier, x, y, **options: given.update(options) or Proposal.start(x),
    )
    ball = ThreatModel.parse("linf", "8/255")
    assert not bool(Evidence(model.classifier, data, ball, Settings(spsa_steps=steps)).spsa.broken.any())
    assert (given["steps"], given["stop"]) == (steps, "never")
    assert given["steps"] * given["step_size"] == pytest.approx(4 * ball.radius)


def test_a_refused_proposal_counts_as_the_image_itself(affine):
    model = affine(np.random.default_rng(0).normal(size=(3, 12)), [0.0, 0.1, 0.2], (3, 2, 2))
    e = Evidence.__new__(Evidence)
    e.classifier, e.threat = model.classifier, ThreatModel.parse("linf", "8/255")
    e.x = torch.rand((5, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    e.y = torch.from_numpy(model.logits(e.x).argmax(1))
    e.clean_margin = torch.arange(5).float() + 1
    e.ids = tuple("abcde")
    proposal = Proposal.start(e.x)
    proposal.x_adv = proposal.x_adv + 1.0
    found = e.outcome(proposal)
    assert torch.equal(found.margin, e.clean_margin)
    assert not found.broken.any()


# --- the positive control ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "shown"),
    [
        (Power(4, 12), True),
        (Power(3, 12), False),  # less than a third
        (Power(9, 9), False),  # nine are not enough
        (Power(10, 10), True),
        (Power(10, 10, planted=True), True),
        (Power(0, 0), False),
        (Power(12, 12, planted=True), True),
        (Power(8, 12, planted=True), False),  # surely less than 95 %
        (Power(9, 9, planted=True), False),
        (Power(0, 0, planted=True), False),
    ],
)
def test_power_is_shown_where_adversarial_examples_are_known(power, shown):
    assert power.shown == shown


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
def test_silence_without_power_is_inconclusive(before, power, after):
    a, b = controlled([found("A", before), found("B", "clear")], {"A": power})
    assert (a.status, b.status) == (after, "clear")
    assert ("control: of 30 images broken by gradients" in a.evidence) == (before == "clear")


@pytest.mark.parametrize(("eps", "is_planted"), [("51/255", False), ("4/255", True)])
def test_searches_that_stand_still_show_no_power(monkeypatch, eps, is_planted):
    """Where PGD breaks images or, in small balls, solves problems, so must SPSA (A) and Square (H)."""
    classifier, data = load_model("digits_normal", device="cpu"), load_dataset("digits").subset(20)
    work = Settings(steps=20, spsa_steps=10, spsa_samples=32, queries=100, planted=12)

    def seen() -> dict[str, Power]:
        return powers(Evidence(classifier, data, ThreatModel.parse("linf", eps), work))

    for power in seen().values():
        assert power.planted == is_planted
        assert power.known >= 10
        assert power.shown
    for module in ("power", "evidence"):
        monkeypatch.setattr(f"robustbench_cure.masking.{module}.spsa", stand_still)
    assert seen()["A"].found == 0
    assert seen()["H"].found > 0  # Square alone
    for module in ("power", "evidence"):
        monkeypatch.setattr(f"robustbench_cure.masking.{module}.square", stand_still)
    assert seen()["H"].found == 0
    assert not seen()["H"].shown


def stand_still(classifier, x, *arguments, **options) -> Proposal:
    return Proposal.start(x)


# --- the verdict -------------------------------------------------------------------------------------


def found(letter: str, status: str) -> Finding:
    return Finding(letter=letter, check="x", status=status, evidence="")


@pytest.mark.parametrize(
    ("statuses", "n", "words", "kind"),
    [
        ("ccc", 100, "no evidence of masking under checks A..C (n = 100)", "no evidence"),
        ("cnc", 100, "no evidence of masking under checks A, C (n = 100)", "no evidence"),
        ("ccc", 49, "not conclusive: too few points (n = 49, 50 are needed)", "not conclusive"),
        ("nnn", 100, "not conclusive: too few points (n = 100, 50 are needed)", "not conclusive"),
        ("rcr", 100, "suspected: A, C (n = 100)", "suspected"),
        ("crc", 3, "suspected: B (n = 3)", "suspected"),
        ("ric", 100, "suspected: A (n = 100)", "suspected"),
        ("ici", 100, "not conclusive: no power in A, C (n = 100)", "not conclusive"),
    ],
)
def test_words_and_exit_code_come_from_one_place(statuses, n, words, kind):
    names = {"c": "clear", "r": "raised", "n": "not run", "i": "inconclusive"}
    findings = [found(letter, names[s]) for letter, s in zip("ABC", statuses, strict=True)]
    for fail in (False, True):
        verdict = conclude(findings, n, fail_on=("suspected",) if fail else ())
        assert verdict.words == words
        assert verdict.kind == kind
        assert verdict.exit_code == int(fail and kind == "suspected")
        assert "not masked" not in verdict.words


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
    f = Finding(
        letter="A",
        check="x",
        status="clear",
        evidence="",
        value=value,
        threshold=threshold,
        beyond=beyond,
        p=p,
    )
    assert (f.value_words, f.limit_words, f.p_words) == words


def test_the_p_of_a_finding_is_that_of_its_exact_test():
    e = Made(100)
    margin = torch.zeros(100)
    margin[:6] = -1.0
    e.spsa = outcome(margin)
    found = checks.scatter(e)  # 6 %, more than 5, and not sure: clear is right
    assert (found.status, found.value) == ("clear", 0.06)
    assert found.p == binomtest(6, 6, alternative="greater").pvalue > 0.01
    few = torch.arange(100) < 3
    e.random, e.white_box_broken = outcome(broken=few), torch.zeros(100, dtype=torch.bool)
    assert checks.random_noise(e).p == binomtest(3, 100, 0.01, alternative="greater").pvalue
    assert planted_module.p_missed(20, 32) == binomtest(20, 32, 0.95, alternative="less").pvalue


def test_every_letter_is_explained():
    assert set(EXPLANATIONS) == {*checks.CHECKS, "K", "L"}
    assert all(len(about.title) <= 40 for about in EXPLANATIONS.values())  # its column in a terminal
