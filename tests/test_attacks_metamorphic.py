"""What must hold of every attack on any model: no oracle needed, only two runs that must agree."""

from __future__ import annotations

import copy
import inspect
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from made import Wrapped
from torch import nn

from robustbench_cure.attacks import Noise, deepfool, fgsm, pgd, pgd_checkpoints, spsa, square, uniform_noise
from robustbench_cure.classifier import Classifier, has_bf16
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.threat import ThreatModel

EPS = {"linf": Fraction(1, 10), "l2": Fraction(1, 2)}
SHAPE = (1, 8, 8)
N = 24


def threat_of(norm: str, factor: Fraction | int = 1) -> ThreatModel:
    return ThreatModel(norm, EPS[norm] * factor)


def with_step(attack, **options):
    """PGD with the step of the nominal budget, so that eps can vary alone."""

    def run(classifier, x, y, threat, noise=None):
        return attack(
            classifier, x, y, threat=threat, noise=noise, step_size=float(EPS[threat.norm]) / 4, **options
        )

    return run


def plain(attack, **options):
    def run(classifier, x, y, threat, noise=None):
        return attack(classifier, x, y, threat=threat, noise=noise, **options)

    return run


ATTACKERS = {
    "fgsm": plain(fgsm),
    "noise": plain(uniform_noise, draws=6),
    "pgd": with_step(pgd, steps=8),
    "pgd-restarts": with_step(pgd, steps=4, restarts=3, loss="margin"),
    "pgd-never": with_step(pgd, steps=5, stop="never", random_start=False),
    "deepfool": plain(deepfool, mode="bounded", steps=12),
    "spsa": plain(spsa, steps=4, samples=16, step_size=0.3),
    "spsa-never": plain(spsa, steps=3, samples=16, step_size=0.3, stop="never"),
    "square": plain(square, queries=80),
    "square-restarts": plain(square, queries=30, restarts=2),
    "square-never": plain(square, queries=40, stop="never"),
}
RANDOM = ("noise", "pgd", "pgd-restarts", "spsa", "spsa-never", "square", "square-restarts", "square-never")

every_attack = pytest.mark.parametrize("name", ATTACKERS)
both_norms = pytest.mark.parametrize("norm", list(EPS))


def test_every_attack_of_the_registry_is_tested_here():
    own = {name: attack for name, attack in ATTACKS.items() if name != "peer"}  # peers: test_peers.py
    assert {name.removeprefix("uniform_") for name in own} == {key.partition("-")[0] for key in ATTACKERS}
    for attack in own.values():
        parameters = inspect.signature(attack).parameters
        assert list(parameters)[:3] == ["classifier", "x", "y"]
        assert all(
            p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("classifier", "x", "y")
        )


@pytest.fixture(scope="module")
def data(digits_test):
    return digits_test[0][:N].clone(), digits_test[1][:N].clone()


@pytest.fixture(scope="module")
def make(digits_net):
    def build(**options) -> Classifier:
        return Classifier(
            digits_net, **({"num_classes": 10, "input_shape": SHAPE, "batch_size": 64} | options)
        )

    return build


# --- what comes back ---------------------------------------------------------------------------------


@every_attack
@both_norms
def test_proposals_are_feasible_images_and_inputs_stay(make, data, name, norm):
    x, y = data
    x_before, y_before, state = x.clone(), y.clone(), torch.get_rng_state()
    threat = threat_of(norm)
    noise = Noise.for_rows(N)
    keys = noise.keys.clone()
    candidates = ATTACKERS[name](make(), x, y, threat, noise)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert torch.equal(noise.keys, keys)
    assert torch.equal(torch.get_rng_state(), state)
    assert candidates.x_adv.shape == x.shape
    assert candidates.x_adv.dtype == torch.float32
    assert not candidates.x_adv.requires_grad
    assert candidates.x_adv.data_ptr() != x.data_ptr()
    assert threat.contains(x, candidates.x_adv).all()
    assert candidates.x_adv.amin() >= 0
    assert candidates.x_adv.amax() <= 1
    for counted in (candidates.steps, candidates.forwards, candidates.backwards):
        assert counted.shape == (N,)
        assert counted.dtype == torch.int64
        assert (counted >= 0).all()
    assert (candidates.x_adv != x).flatten(1).any(1).float().mean() > 0.8  # it does attack


@every_attack
@both_norms
def test_attacks_find_more_than_nothing_and_the_budget_matters(make, data, judge, digits_net, name, norm):
    x, y = data
    threat = threat_of(norm)
    clean = judge(digits_net, x, y, x, norm, 0)
    broken = judge(digits_net, x, y, ATTACKERS[name](make(), x, y, threat).x_adv, norm, threat.radius)
    assert clean.mean() < 0.15
    if name != "noise":
        assert broken.sum() >= clean.sum() + (2 if "spsa" in name else 4)


@every_attack
def test_zero_budget_is_the_identity(make, data, name):
    x, y = data
    for norm in EPS:
        candidates = ATTACKERS[name](make(), x, y, ThreatModel(norm, Fraction(0)))
        assert torch.equal(candidates.x_adv, x)


@every_attack
@both_norms
def test_no_rows_give_no_rows(make, data, name, norm):
    x, y = data
    candidates = ATTACKERS[name](make(), x[:0], y[:0], threat_of(norm))
    assert candidates.x_adv.shape == (0, *SHAPE)
    assert candidates.steps.shape == (0,)


# --- rows are independent ----------------------------------------------------------------------------


@every_attack
@both_norms
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_batch_size_does_not_matter(make, data, judge, digits_net, name, norm, batch_size):
    x, y = data[0][:12], data[1][:12]
    threat, noise = threat_of(norm), Noise.for_rows(12)
    whole = ATTACKERS[name](make(batch_size=12), x, y, threat, noise)
    other = ATTACKERS[name](make(batch_size=batch_size), x, y, threat, noise)
    same = (whole.x_adv - other.x_adv).abs().flatten(1).amax(1) < 1e-4
    assert same.float().mean() > 0.9  # a sign may flip where a gradient rounds to zero
    eps = threat.radius
    np.testing.assert_array_equal(
        judge(digits_net, x, y, whole.x_adv, norm, eps), judge(digits_net, x, y, other.x_adv, norm, eps)
    )
    assert torch.equal(whole.steps[same], other.steps[same])


@every_attack
@both_norms
def test_order_and_company_of_rows_do_not_matter(make, data, name, norm):
    x, y = data
    threat, noise = threat_of(norm), Noise.for_rows(N)
    whole = ATTACKERS[name](make(), x, y, threat, noise)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = ATTACKERS[name](make(), x[order], y[order], threat, noise[order])
    same = (shuffled.x_adv - whole.x_adv[order]).abs().flatten(1).amax(1) < 1e-4
    assert same.float().mean() > 0.95
    rows = torch.tensor([5, 17, 20])
    few = ATTACKERS[name](make(), x[rows], y[rows], threat, noise[rows])
    torch.testing.assert_close(few.x_adv, whole.x_adv[rows], rtol=0, atol=1e-4)


@every_attack
def test_same_noise_same_bytes_and_other_noise_other_start(make, data, name):
    x, y = data
    threat = threat_of("linf", Fraction(1, 4))  # small, so that rows survive and starts differ
    one, two = (ATTACKERS[name](make(), x, y, threat, Noise.for_rows(N, 1)) for _ in range(2))
    for field in ("x_adv", "steps", "forwards", "backwards"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    other = ATTACKERS[name](make(), x, y, threat, Noise.for_rows(N, 2))
    assert torch.equal(other.x_adv, one.x_adv) is (name not in RANDOM)
    default = ATTACKERS[name](make(), x, y, threat)
    assert torch.equal(default.x_adv, ATTACKERS[name](make(), x, y, threat, Noise.for_rows(N, 0)).x_adv)


# --- more of anything is never weaker ----------------------------------------------------------------


@every_attack
def test_broken_set_grows_with_eps_on_an_affine_model(affine, judge, name):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((2, 16))
    model = affine(weight, -weight @ np.full(16, 0.5) + [0.4, 0], (1, 4, 4))
    x = 0.45 + 0.1 * torch.rand((24, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    y = torch.from_numpy(model.logits(x).argmax(1))
    for norm in EPS:
        previous = np.zeros(24, dtype=bool)
        counts = []
        for eps in np.array([0.5, 1.0, 2.0, 4.0]) * (0.01 if norm == "linf" else 0.04):
            threat = ThreatModel(norm, Fraction(float(eps)))
            run = ATTACKERS[name](model.classifier, x, y, threat)
            broken = judge(model.classifier.module, x, y, run.x_adv, norm, threat.radius)
            if name not in ("noise", "spsa", "spsa-never"):
                assert not (previous & ~broken).any()
            previous = broken
            counts.append(broken.sum())
        assert counts == sorted(counts)
        assert counts[-1] > counts[0]


@both_norms
@pytest.mark.parametrize("restarts", [1, 3])
def test_checkpoints_are_monotone_in_steps_and_in_restarts(make, data, judge, digits_net, norm, restarts):
    x, y = data
    threat = threat_of(norm, Fraction(2, 5))
    options = {"threat": threat, "checkpoints": (1, 2, 4, 9), "step_size": threat.radius / 4}
    results = pgd_checkpoints(make(), x, y, restarts=restarts, **options)
    sets = [judge(digits_net, x, y, p.x_adv, norm, threat.radius) for p in results]
    for fewer, more in itertools.pairwise(sets):
        assert not (fewer & ~more).any()
    assert sets[0].sum() < sets[-1].sum() < N


@both_norms
def test_the_best_restart_is_kept(make, data, norm):
    """Surviving rows get the lowest margin of all restarts, the first of which is the single one."""
    x, y = data
    threat, classifier = threat_of(norm, Fraction(2, 5)), make()
    options = {"threat": threat, "checkpoints": (1, 3), "step_size": threat.radius / 8}
    many = pgd_checkpoints(classifier, x, y, restarts=4, **options)
    single = pgd_checkpoints(classifier, x, y, restarts=1, **options)
    for candidates, one in zip(many, single, strict=True):
        best, first = (true_margin(classifier, p.x_adv, y) for p in (candidates, one))
        assert not ((first < 0) & (best >= 0)).any()
        survived = best >= 0
        assert (best <= first + 1e-5)[survived].all()
        assert (best < first - 1e-3)[survived].sum() >= 5


@both_norms
@pytest.mark.parametrize(
    "options", [{}, {"restarts": 2}, {"stop": "never"}, {"random_start": False}], ids=str
)
def test_a_checkpoint_is_what_pgd_alone_would_propose(make, data, norm, options):
    x, y = data[0][:14], data[1][:14]
    threat = threat_of(norm, Fraction(2, 5))
    checkpoints = (2, 3, 7)
    # One row a pass: rounding then cannot depend on which rows have left.
    classifier = make(batch_size=1)
    options = options | {"threat": threat, "step_size": threat.radius / 4, "noise": Noise.for_rows(14)}
    results = pgd_checkpoints(classifier, x, y, checkpoints=checkpoints, **options)
    for steps, shared in zip(checkpoints, results, strict=True):
        alone = pgd(classifier, x, y, steps=steps, **options)
        assert torch.equal(shared.x_adv, alone.x_adv)
        assert torch.equal(shared.steps, alone.steps)
        assert (shared.steps <= steps).all()


@both_norms
def test_the_iterate_of_lowest_margin_is_returned(make, data, norm):
    """`never`: no iterate of the trajectory has a lower margin than the proposal."""
    x, y = data
    threat, classifier = threat_of(norm), make()
    step = 1.7 * threat.radius  # overshoots, so that the last iterate is often not the best
    options = {"threat": threat, "step_size": step, "random_start": False, "loss": "margin"}
    best = pgd(classifier, x, y, steps=6, stop="never", **options)
    lowest = torch.full((N,), torch.inf)
    current = x.clone()
    last = None
    for _ in range(7):
        last = true_margin(classifier, current, y)
        lowest = torch.minimum(lowest, last)
        current = one_step(classifier, x, current, y, threat, step)
    reached = true_margin(classifier, best.x_adv, y)
    torch.testing.assert_close(reached, lowest, rtol=1e-3, atol=1e-3)
    assert (last > lowest + 0.01).any()


def test_spsa_without_stop_keeps_its_best_iterate(make, data):
    """Runs of more steps are continuations of shorter ones, so the best margin can only fall."""
    x, y = data[0][:10], data[1][:10]
    classifier = make(batch_size=1024)
    options = {"threat": threat_of("linf"), "samples": 4, "step_size": 0.1, "stop": "never"}
    reached = [
        true_margin(classifier, spsa(classifier, x, y, steps=k, **options).x_adv, y) for k in range(1, 8)
    ]
    for shorter, longer in itertools.pairwise(reached):
        assert (longer <= shorter + 1e-5).all()
    assert (reached[-1] < reached[0] - 0.1).any()


def true_margin(classifier, x, y):
    logits = classifier.logits(x)
    own = torch.nn.functional.one_hot(y, 10).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def one_step(classifier, x, current, y, threat, step):
    leaf = current.clone().requires_grad_(True)
    logits = classifier.module(leaf)
    own = torch.nn.functional.one_hot(y, 10).bool()
    loss = logits.masked_fill(own, -torch.inf).amax(1) - logits[own]
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    flat = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    direction = gradient.sign() if threat.norm == "linf" else gradient / flat
    return threat.project(x, current + step * direction).detach()


# --- the model is only read --------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("training", [True, False])
def test_the_users_module_is_untouched(data, digits_net, name, training):
    x, y = data
    module = copy.deepcopy(digits_net).train(training).requires_grad_(True)
    module.features[0].weight.requires_grad_(False)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [p.requires_grad for p in module.parameters()]
    classifier = Classifier(module, num_classes=10, input_shape=SHAPE)
    fingerprint = classifier.fingerprint()
    ATTACKERS[name](classifier, x, y, threat_of("linf"))
    assert classifier.fingerprint() == fingerprint
    assert all(part.training is training for part in module.modules())
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all((p.grad == 0.5).all() for p in module.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None for p in classifier.module.parameters())


class InPlace(Wrapped):
    """A network that normalises its argument in place, as some do."""

    def forward(self, x):
        x -= 0.25
        return self.net(x)


@every_attack
def test_a_model_that_writes_into_its_input_cannot_reach_the_images(data, digits_net, name):
    x, y = data
    before = x.clone()
    classifier = Classifier(InPlace(digits_net), num_classes=10, input_shape=SHAPE)
    expected = digits_net(x - 0.25)
    ATTACKERS[name](classifier, x, y, threat_of("linf"))
    torch.testing.assert_close(classifier.logits(x), expected)
    classifier.value_and_gradient(x, lambda z: z[:, 0], reference=True)
    assert torch.equal(x, before)


# --- work is counted ---------------------------------------------------------------------------------


@every_attack
@both_norms
@pytest.mark.parametrize("batch_size", [7, 64])
def test_work_of_the_rows_is_the_work_of_the_model(make, data, name, norm, batch_size):
    x, y = data
    classifier = make(batch_size=batch_size)
    candidates = ATTACKERS[name](classifier, x, y, threat_of(norm))
    assert candidates.forwards.sum().item() == classifier.forwards
    assert candidates.backwards.sum().item() == classifier.backwards


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_checkpoint_is_charged_what_it_needs_alone(make, data, restarts):
    x, y = data[0][:14], data[1][:14]
    threat = threat_of("linf", Fraction(1, 2))
    options = {"threat": threat, "step_size": threat.radius / 4, "restarts": restarts}
    short, long = pgd_checkpoints(make(batch_size=1), x, y, checkpoints=(1, 5), **options)
    for steps, shared in ((1, short), (5, long)):
        alone = pgd(make(batch_size=1), x, y, steps=steps, **options)
        assert torch.equal(shared.backwards, alone.backwards)
        assert ((shared.forwards - alone.forwards) <= restarts).all()  # the pass at the checkpoint itself
    # A row whose long checkpoint is broken goes on for the short one alone.
    assert restarts == 1 or (long.backwards < 5).any()


def test_broken_rows_cost_nothing_more(make, data):
    x, y = data
    wrong = (y + 1) % 10
    classifier = make()
    candidates = pgd(
        classifier, x, wrong, threat=threat_of("linf"), steps=50, step_size=0.01, random_start=False
    )
    lost = classifier.logits(x).argmax(1) != wrong
    assert (candidates.steps[lost] == 0).all()
    assert (candidates.backwards[lost] == 1).all()
    assert torch.equal(candidates.x_adv[lost], x[lost])


# --- reduced precision -------------------------------------------------------------------------------


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16")
@every_attack
@both_norms
def test_bf16_search_changes_few_verdicts_and_no_claim(make, digits_test, judge, digits_net, name, norm):
    x, y = digits_test[0][:60], digits_test[1][:60]
    threat = threat_of(norm, Fraction(1, 2))
    sets = []
    for precision in ("fp32", "bf16"):
        candidates = ATTACKERS[name](make(precision=precision), x, y, threat)
        assert candidates.x_adv.dtype == torch.float32
        assert threat.contains(x, candidates.x_adv).all()
        sets.append(judge(digits_net, x, y, candidates.x_adv, norm, threat.radius))
        if candidates.converged is not None:  # success is claimed in the reference form alone
            np.testing.assert_array_equal(candidates.converged.numpy(), sets[-1])
    assert (sets[0] ^ sets[1]).sum() <= 4
    assert abs(int(sets[0].sum()) - int(sets[1].sum())) <= 3


def test_a_single_step_does_not_depend_on_the_precision(make, data):
    x, y = data
    exact, coarse = (fgsm(make(precision=p), x, y, threat=threat_of("linf")) for p in ("fp32", "bf16"))
    assert torch.equal(exact.x_adv, coarse.x_adv)


class TooFine(nn.Module):
    """Two classes whose weights bfloat16 cannot tell apart, one far below; one pixel speaks for 0."""

    SLOPE, REACH = 2.0**-10, 2.0**-10 * 63 * 0.1  # of z_1 - z_0 in each pixel; what a ball of 0.1 gains

    def __init__(self) -> None:
        super().__init__()
        weight = torch.tensor([1.0, 1.0 + self.SLOPE, 0.0])[:, None].repeat(1, 64)
        weight[:, 0] = torch.tensor([8.0, 0.0, 0.0])
        self.weight = nn.Parameter(weight)  # by hand: a last layer would be left in float32
        self.bias = nn.Parameter(torch.tensor([self.SLOPE * 63 * 0.5 + self.REACH / 2, 0.0, -50.0]))

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.weight, self.bias)


@pytest.mark.parametrize("stop", ["first-success", "never"])
@pytest.mark.parametrize("checkpoints", [(8,), (4, 8)])
def test_rows_that_are_robust_within_rounding_in_bf16_are_searched_again(stop, checkpoints):
    x = torch.full((4, 1, 8, 8), 0.5)
    x[:, 0, 0, 0] = 0
    x[1], x[2] = x[1] - 0.03, x[2] - 0.1  # margins: half, 0.8 and 1.5 times what the ball gains
    x[3, 0, 0, 0] = 1  # and one that is nowhere near
    x, y = x.clamp(0, 1), torch.zeros(4, dtype=torch.int64)
    found = {}
    for precision in ("fp32", "bf16"):
        classifier = Classifier(TooFine(), num_classes=3, input_shape=SHAPE, precision=precision)
        results = pgd_checkpoints(
            classifier, x, y, threat=ThreatModel("linf", Fraction(1, 10)), checkpoints=checkpoints,
            step_size=0.025, random_start=False, loss="margin", stop=stop,
        )  # fmt: skip
        broken = [(classifier.logits(each.x_adv).argmax(1) != y).tolist() for each in results]
        found[precision] = broken, results[-1].backwards.tolist()
    assert found["fp32"][0] == [[True, True, False, False]] * len(checkpoints)
    assert found["bf16"][0] == found["fp32"][0]
    assert found["bf16"][1][2:] == [2 * 8, 8]  # the second search is for doubtful rows alone
    assert found["fp32"][1][2:] == [8, 8]


# --- models without a gradient -----------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(10.0))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Quantised(Wrapped):
    """Rounds its input to five grey levels: the gradient is zero everywhere it exists."""

    def forward(self, x):
        return self.net(torch.round(x * 4) / 4)


class Detached(Wrapped):
    def forward(self, x):
        return self.net(x.detach())


@every_attack
@both_norms
@pytest.mark.parametrize("kind", [Constant, Quantised, Detached])
def test_flat_models_are_survived_without_error(data, digits_net, name, norm, kind):
    x, y = data
    module = kind() if kind is Constant else kind(digits_net)
    threat = threat_of(norm)
    classifier = Classifier(module, num_classes=10, input_shape=SHAPE)
    candidates = ATTACKERS[name](classifier, x, y, threat)
    assert candidates.x_adv.isfinite().all()
    assert threat.contains(x, candidates.x_adv).all()
    if name in ("fgsm", "deepfool", "pgd-never"):  # nothing to follow and no random start
        assert torch.equal(candidates.x_adv, x)
    if name == "deepfool":
        assert torch.equal(candidates.converged, classifier.logits(x).argmax(1) != y)
    if name == "spsa" and kind is Quantised and norm == "linf":  # differences of margins still see it
        coarse = spsa(classifier, x, y, threat=threat, steps=8, samples=64, step_size=0.05, delta=0.15)
        assert (classifier.logits(coarse.x_adv).argmax(1) != y).sum() > (
            classifier.logits(x).argmax(1) != y
        ).sum()
