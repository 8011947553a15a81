"""Auto-PGD: its schedule, its path against the authors' code, its targets, and when it gives up."""

from __future__ import annotations

import copy
import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from made import Wrapped
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn
from torch.nn import functional

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, apgd
from robustbench_cure.attacks.apgd import GIVE_UP, checkpoints, draw_start
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.targets import CANDIDATES, ranked_targets
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

SHAPE, FLAT = (1, 4, 4), 16
DIGITS_BALL = ThreatModel("linf", "51/255")
NORMS = {"linf": "Linf", "l2": "L2"}
both_norms = pytest.mark.parametrize("norm", NORMS)


def ball(norm: str, radius: float) -> ThreatModel:
    return ThreatModel(norm, Fraction(float(radius)))


def grey(n: int, seed: int = 0, spread: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + spread * (torch.rand((n, *SHAPE), generator=generator) - 0.5)


class Trace(Classifier):
    """A classifier that keeps what its gradient passes saw: points and logits."""

    def __init__(self, *args, **options) -> None:
        self.points, self.seen = [], []
        super().__init__(*args, **options)
        self.points, self.seen = [], []

    def value_and_gradient(self, x, loss, **options):
        logits, gradient = super().value_and_gradient(x, loss, **options)
        self.points.append(x.clone())
        self.seen.append(logits)
        return logits, gradient


# --- schedule and start ------------------------------------------------------------------------------


def test_checkpoints_of_100_steps_are_the_papers():
    share, before = [0.0, 0.22], 0.0
    while share[-1] < 1:  # p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
        before = share[-2]
        share.append(share[-1] + max(share[-1] - before - 0.03, 0.06))
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(100) == [round(100 * p) for p in share[1:] if p < 1]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [1]),
        (5, [1, 2, 3, 4, 5]),
        (20, [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
        (50, [11, 21, 30, 38, 45]),
        (1000, [220, 410, 570, 700, 800, 870, 930, 990]),
    ],
)
def test_checkpoints_are_rounded_down(steps, expected):
    found = checkpoints(steps)
    assert found[: len(expected)] == expected
    assert found[-1] <= steps


@both_norms
def test_a_start_lies_on_the_surface(norm):
    x, threat = torch.full((200, *SHAPE), 0.5), ball(norm, 0.25)
    start = draw_start(x, threat, Noise.for_rows(200), 3)
    torch.testing.assert_close(threat.distance(x, start), torch.full((200,), 0.25))
    assert (start - x).mean().abs() < 0.01
    if norm == "linf":  # one pixel has the whole of it, the others are uniform
        t = ((start - x).abs().flatten(1) / 0.25).sort(dim=1).values
        assert (t[:, :-1] < 1).all()
        np.testing.assert_allclose(t.mean(0).numpy(), (np.arange(16) + 1) / 16, atol=0.03)
    dark = draw_start(torch.zeros(200, *SHAPE), threat, Noise.for_rows(200), 3)
    assert dark.amin() == 0
    assert threat.contains(torch.zeros(200, *SHAPE), dark).all()


# --- the path of the authors' code -------------------------------------------------------------------


class Smooth(nn.Module):
    """A network without flat regions, computed in float64: hardly a rounding then decides a sign."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        self.net = nn.Sequential(nn.Flatten(), *layers).double()
        for parameter in self.net.parameters():
            parameter.data *= 3

    def forward(self, x):
        return 0.2 * self.net(x.double()).float()


class Listening(Wrapped):
    """Keeps the points at which a network is asked."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.points: list[torch.Tensor] = []

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.net(x)


@both_norms
@pytest.mark.parametrize(("steps", "rho"), [(7, 0.75), (100, 0.75), (100, 0.5)])
@pytest.mark.parametrize(("loss", "targets"), [("ce", 0), ("dlr", 0), ("dlr", 1)])
def test_it_walks_the_path_of_the_authors_code(norm, steps, rho, loss, targets):
    torch.manual_seed(0)
    net, threat = Smooth(), ThreatModel(norm, "8/255" if norm == "linf" else "1/4")
    x = torch.rand(60, 1, 8, 8)
    y = net(x).argmax(1)
    ours = Trace(net, num_classes=10, input_shape=(1, 8, 8), batch_size=60)
    apgd(ours, x, y, threat=threat, steps=steps, rho=rho, loss=loss, targets=targets, stop="never")

    listening = Listening(net)
    options = {"n_iter": steps, "norm": NORMS[norm], "eps": threat.radius, "rho": rho, "device": "cpu"}
    theirs = (
        APGDAttack_targeted(listening, **options) if targets else APGDAttack(listening, loss=loss, **options)
    )
    theirs.init_hyperparam(x)
    theirs.y_target = net(x).argsort(dim=1)[:, -2]
    listening.points.clear()
    _, robust, highest, _ = theirs.attack_single_run(x, y, x_init=ours.points[0])

    stand = robust.bool()  # in the others one logit overtakes another, and the gradient of dlr may vanish
    assert stand.sum() >= 9
    mine, peers = torch.stack(ours.points), torch.stack(listening.points)
    assert mine.shape == peers.shape == (steps + 1, 60, 1, 8, 8)
    same = ((mine - peers).abs().flatten(2).amax(2) < 1e-5)[:, stand]
    if norm == "linf" or steps == 7:
        assert same.all()
    else:  # at its maximum in l2 the loss rises or falls by rounding, and with it the step is halved or not
        assert same[: checkpoints(steps)[0] + 1].all()
        assert same.all(0).float().mean() > 0.3
    assert torch.equal(torch.stack(ours.seen).argmax(2).eq(y).all(0), stand)
    if loss == "ce":
        reached = torch.stack([functional.cross_entropy(z, y, reduction="none") for z in ours.seen]).amax(0)
        torch.testing.assert_close(reached[stand], highest[stand], atol=1e-4, rtol=1e-4)


def library(module, x, y, norm, threat, steps, targets=0, **more):
    """Rows that the authors' attack breaks."""
    options = {"n_iter": steps, "norm": NORMS[norm], "eps": threat.radius, "device": "cpu", **more}
    if targets:
        attack = APGDAttack_targeted(module, n_target_classes=targets, **options)
    else:
        attack = APGDAttack(module, loss="ce", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module(attack.perturb(x, y)).argmax(1) != y


@pytest.mark.parametrize("targets", [0, 2])
@pytest.mark.parametrize("name", ["digits_pgd_at", "digits_cure"])
def test_it_breaks_what_the_authors_code_breaks(name, targets):
    data, model = load_dataset("digits").subset(100), load_model(name, precision="fp32")
    x, y = data.images, data.labels
    theirs = library(copy.deepcopy(model.module), x, y, "linf", DIGITS_BALL, 20, targets)
    loss = "dlr" if targets else "ce"
    found = apgd(model, x, y, threat=DIGITS_BALL, steps=20, loss=loss, targets=targets)
    ours = misclassified(model.logits(found.x_adv), y)
    assert 20 < int(ours.sum()) < 80
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 2  # other starts break other rows
    assert int((ours ^ theirs).sum()) <= 6


# --- known optima ------------------------------------------------------------------------------------


class Hill(nn.Module):
    """Two classes; z_1 - z_0 = -1 - |s (x - c)|^2, concave, with its summit -1 at c.

    Args:
        offset: c - 1/2 in every pixel.
        tilt: by how much the curvature s^2 grows from the first pixel to the last.
    """

    def __init__(self, offset: torch.Tensor, tilt: float = 0.0) -> None:
        super().__init__()
        self.centre = 0.5 + offset
        self.scale = 1 + tilt * torch.linspace(0, 1, FLAT).view(SHAPE)

    def forward(self, x):
        loss = -1 - (self.scale * (x - self.centre)).square().sum((1, 2, 3))
        return torch.stack((torch.zeros_like(loss), loss), 1)


def climb(net: nn.Module, threat: ThreatModel, steps: int = 100, **options):
    model = Classifier(net, num_classes=2, input_shape=SHAPE)
    x, y = torch.full((8, *SHAPE), 0.5), torch.zeros(8, dtype=torch.int64)
    found = apgd(model, x, y, threat=threat, steps=steps, loss="margin", stop="never", **options)
    return found, -margins(model.logits(found.x_adv), y)


@both_norms
@pytest.mark.parametrize("tilt", [0.0, 2.0])
def test_it_converges_to_a_summit_inside_the_ball(norm, tilt):
    """A constant step of 2 eps would jump about it: only halving gets there."""
    offset = 0.05 * torch.linspace(-1, 1, FLAT).view(SHAPE)
    threat = ball(norm, 0.1 if norm == "linf" else 0.3)
    found, reached = climb(Hill(offset, tilt), threat)
    apart = threat.distance(found.x_adv, (0.5 + offset).expand(8, *SHAPE))
    assert (apart < threat.radius / 10).all()
    assert (reached > -1 - 0.02 * (offset.square().sum())).all()


@both_norms
def test_it_reaches_the_highest_point_of_the_ball(norm):
    """Without tilt that is the projection of the summit outside."""
    offset = torch.linspace(-1, 1, FLAT).view(SHAPE)
    threat = ball(norm, 0.1 if norm == "linf" else 0.3)
    nearest = threat.project(torch.full((1, *SHAPE), 0.5), (0.5 + offset)[None])
    best = float(Hill(offset)(nearest)[0, 1])
    _, reached = climb(Hill(offset), threat)
    np.testing.assert_allclose(reached.numpy(), best, rtol=1e-4)


@pytest.mark.parametrize("stop", ["never", "first-success"])
def test_the_iterate_of_lowest_margin_is_returned(stop):
    """Steps of 2 eps overshoot the summit; what is returned is the best point of all that were seen."""
    model = Trace(Hill(0.01 * torch.ones(SHAPE)), num_classes=2, input_shape=SHAPE)  # it is never broken
    x, y = grey(20), torch.zeros(20, dtype=torch.int64)
    found = apgd(model, x, y, threat=ball("linf", 0.1), steps=6, restarts=2, loss="ce", stop=stop)
    losses = torch.stack([-margins(z, y) for z in model.seen])
    assert len(losses) == 14
    best = losses.argmax(0)
    assert torch.equal(found.x_adv, torch.stack(model.points)[best, torch.arange(20)])
    assert torch.equal(found.steps, best % 7)
    assert 5 <= int((best % 7 < 6).sum()) < 20  # not the last of a start alone


# --- work --------------------------------------------------------------------------------------------


def plain_model(affine, classes: int = 5, **options):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((classes, FLAT))
    return affine(weight, -weight @ np.full(FLAT, 0.5) + generator.standard_normal(classes), SHAPE, **options)


@both_norms
@pytest.mark.parametrize("stop", ["first-success", "never"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_start_costs_one_gradient_more_than_its_steps(affine, norm, stop, batch_size):
    model, x = plain_model(affine, batch_size=batch_size), grey(5)
    y = torch.from_numpy(model.logits(x).argmax(1))
    options = {"threat": ball(norm, 1e-4), "steps": 6, "stop": stop}  # nothing is broken
    for extra, passes, ranking in (
        ({}, 7, (0, 0)),
        ({"restarts": 3}, 21, (0, 0)),
        ({"targets": 2, "loss": "margin"}, 14, (1, 0)),
        ({"targets": 9, "restarts": 2, "loss": "dlr"}, 56, (1, 0)),  # four classes other than the label
        ({"targets": 2, "loss": "dlr", "order": "distance"}, 14, (2, 4)),
    ):
        before = model.classifier.forwards, model.classifier.backwards
        found = apgd(model.classifier, x, y, **options, **extra)
        assert found.forwards.tolist() == [passes + ranking[0]] * 5
        assert found.backwards.tolist() == [passes + ranking[1]] * 5
        done = model.classifier.forwards - before[0], model.classifier.backwards - before[1]
        assert done == (int(found.forwards.sum()), int(found.backwards.sum()))


def test_a_row_ends_at_its_first_verified_success(affine):
    model, x = plain_model(affine, 2), grey(6)
    y = torch.from_numpy(model.logits(x).argmax(1))
    found = apgd(model.classifier, x, y, threat=ball("linf", 0.4), steps=50, restarts=5)
    assert misclassified(model.classifier.logits(found.x_adv), y).all()
    assert (found.backwards == found.steps + 1).all()
    assert (found.forwards == found.steps + 2).all()  # one more verifies it
    assert (found.steps <= 1).all()
    lost = apgd(model.classifier, x, 1 - y, threat=ball("linf", 1e-4), steps=50)
    assert lost.steps.tolist() == [0] * 6
    assert lost.backwards.tolist() == [1] * 6


@both_norms
def test_restarts_go_on_from_fewer_ones(norm):
    data, model = load_dataset("digits").subset(60), load_model("digits_pgd_at", precision="fp32")
    x, y = data.images, data.labels
    threat = DIGITS_BALL if norm == "linf" else ball("l2", 0.9)
    runs = [apgd(model, x, y, threat=threat, steps=5, restarts=r, loss="dlr") for r in (1, 2, 4)]
    reached = [margins(model.logits(found.x_adv), y) for found in runs]
    for fewer, more in itertools.pairwise(reached):
        assert ((more < 0) | (more <= fewer + 1e-4)).all()
    again = (reached[0] >= 0) & (reached[2] < reached[0] - 1e-3)
    assert again.sum() >= 10
    broken = reached[0] < 0
    torch.testing.assert_close(runs[2].x_adv[broken], runs[0].x_adv[broken], atol=1e-5, rtol=0)


# --- targets -----------------------------------------------------------------------------------------


def decoys(affine):
    """Classes 1 and 2 follow the label closely and are never reached; class 3 is far by logit, and near."""
    weight = np.zeros((4, FLAT))
    weight[3] = 1.0
    return affine(weight, np.array([1.0, 0.9, 0.8, 0.5 - 8.0]), SHAPE)


@both_norms
@pytest.mark.parametrize("loss", ["dlr", "margin"])
@pytest.mark.parametrize(
    ("targets", "order", "breaks"),
    [(1, "logits", False), (2, "logits", False), (3, "logits", True), (1, "distance", True)],
)
def test_success_is_by_any_target(affine, norm, loss, targets, order, breaks):
    model, x, y = decoys(affine), torch.full((3, *SHAPE), 0.5), torch.zeros(3, dtype=torch.int64)
    radius = 0.5 / 16 if norm == "linf" else 0.5 / 4  # what class 3 takes
    for factor, broken in ((1.01, breaks), (0.99, False)):
        found = apgd(
            model.classifier, x, y, threat=ball(norm, factor * radius), steps=12, loss=loss, targets=targets,
            order=order,
        )  # fmt: skip
        assert misclassified(model.classifier.logits(found.x_adv), y).tolist() == [broken] * 3


@both_norms
def test_targets_are_ranked_by_logit_or_by_exact_distance(affine, norm):
    model, x = plain_model(affine, 7, batch_size=4), grey(10, spread=0.9)
    y = torch.from_numpy(model.logits(x).argmax(1))
    threat = ball(norm, 0.1)
    gaps = model.logits(x)
    gaps[np.arange(10), y] = -np.inf
    by_logit, by_distance = np.argsort(-gaps, 1)[:, :6], np.argsort(model.radii(x, y, norm), 1)[:, :6]
    assert (by_logit != by_distance).any(1).sum() >= 4
    for order, expected, cost in (("logits", by_logit, (1, 0)), ("distance", by_distance, (2, 6))):
        for count in (1, 3, 6):
            before = model.classifier.forwards, model.classifier.backwards
            ranked, forwards, backwards = ranked_targets(model.classifier, x, y, threat, count, order)
            assert ranked.dtype == torch.int64
            np.testing.assert_array_equal(ranked.numpy(), expected[:, :count])
            assert (forwards, backwards) == cost
            done = model.classifier.forwards - before[0], model.classifier.backwards - before[1]
            assert done == (10 * forwards, 10 * backwards)
    with pytest.raises(KeyError, match="random"):
        ranked_targets(model.classifier, x, y, threat, 1, "random")


def test_distances_are_those_of_the_largest_logits_where_classes_are_many(affine):
    weight, bias = np.zeros((60, FLAT)), -np.arange(60.0)
    weight[CANDIDATES] = 100.0  # the last that is looked at
    weight[CANDIDATES + 1] = 1e4
    bias -= weight @ np.full(FLAT, 0.5)
    model, x, y = affine(weight, bias, SHAPE), torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.int64)
    ranked, _, backwards = ranked_targets(model.classifier, x, y, ball("linf", 0.1), 2, "distance")
    assert ranked.tolist() == [[CANDIDATES, 1]]
    assert backwards == CANDIDATES
    ranked, _, backwards = ranked_targets(model.classifier, x, y, ball("linf", 0.1), 30, "distance")
    assert ranked[0, :3].tolist() == [CANDIDATES + 1, CANDIDATES, 1]
    assert backwards == 30


@both_norms
def test_rows_do_not_see_each_other(norm):
    """Not through the batch, whose rows are at different steps and targets, and not through their order."""
    data, threat = load_dataset("digits").subset(40), DIGITS_BALL if norm == "linf" else ball("l2", 0.9)
    net, x, y = load_model("digits_pgd_at", precision="fp32").module, data.images, data.labels
    options = {"threat": threat, "steps": 8, "restarts": 2, "loss": "dlr", "targets": 2, "give_up": True}
    runs = []
    for size in (1, 3, 40):
        model = Classifier(net, num_classes=10, input_shape=(1, 8, 8), batch_size=size)
        runs.append(apgd(model, x, y, noise=Noise.for_rows(40, 5), **options))
    turned = torch.arange(39, -1, -1)
    backwards = apgd(model, x[turned], y[turned], noise=Noise.for_rows(40, 5)[turned], **options)
    reached = [margins(model.logits(found.x_adv), y) for found in runs]
    reached.append(margins(model.logits(backwards.x_adv), y[turned])[turned])
    for other in reached[1:]:
        assert (other - reached[0]).abs().lt(1e-3).float().mean() > 0.9  # a sign may turn by rounding
        assert int(((other < 0) ^ (reached[0] < 0)).sum()) <= 1
    assert reached[0].unique().numel() == 40
    assert 5 < int((reached[0] >= 0).sum()) < 35


# --- networks that hide their gradient ---------------------------------------------------------------


class Times(Wrapped):
    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__(net)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.net(x)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize(
    ("loss", "targets"), [("ce", 0), ("pm", 0), ("dlr", 0), ("margin", 0), ("dlr", 3), ("margin", 3)]
)
def test_the_size_of_the_logits_is_no_defence(loss, targets, scale):
    data = load_dataset("digits").subset(60)
    net = Times(load_model("digits_normal", precision="fp32").module, scale).eval()
    model = Classifier(net, num_classes=10, input_shape=(1, 8, 8))
    found = apgd(model, data.images, data.labels, threat=DIGITS_BALL, steps=20, loss=loss, targets=targets)
    assert int((~misclassified(model.logits(found.x_adv), data.labels)).sum()) <= 2
    if loss == "ce" and scale == 1e3:  # where the usual cross-entropy has no gradient left
        stand = ~library(net, data.images, data.labels, "linf", DIGITS_BALL, 20)
        assert int(stand.sum()) > 20


# --- giving up ---------------------------------------------------------------------------------------


def test_a_start_is_given_up_exactly_where_its_pace_does_not_suffice():
    """Replayed from the margins of the full run."""
    data, model = load_dataset("digits").subset(80), load_model("digits_pgd_at", precision="fp32")
    x, y, steps = data.images, data.labels, 50
    traced = Trace(model.module, num_classes=10, input_shape=(1, 8, 8), batch_size=80)
    options = {"threat": DIGITS_BALL, "steps": steps, "loss": "pm"}
    apgd(traced, x, y, stop="never", **options)
    best = torch.stack([margins(z, y) for z in traced.seen]).cummin(0).values.double().numpy()
    expected, variety = [], set()
    for row in best.T:
        end, last = steps, 0
        for w in (11, 21, 30, 38, 45):
            pace = (row[last] - row[w]) / (w - last)
            if row[w] > GIVE_UP * pace * (steps - w):
                end = w
                break
            last = w
        if (row[: end + 1] < 0).any():
            end = int((row < 0).argmax())
        expected.append(end + 1)
        variety.add(end)
    found = apgd(model, x, y, give_up=True, **options)
    assert np.mean(found.backwards.numpy() == expected) > 0.95  # a rounding may decide
    assert len(variety & {21, 30, 38, 45}) >= 3, variety


@pytest.mark.parametrize(("name", "loss", "targets"), [("digits_pgd_at", "pm", 0), ("digits_cure", "dlr", 2)])
def test_what_is_given_up_would_not_have_been_broken(name, loss, targets):
    data, model = load_dataset("digits").subset(100), load_model(name, precision="fp32")
    x, y = data.images, data.labels
    options = {"threat": DIGITS_BALL, "steps": 50, "loss": loss, "targets": targets}
    full, early = (apgd(model, x, y, give_up=give_up, **options) for give_up in (False, True))
    stand = [~misclassified(model.logits(found.x_adv), y) for found in (full, early)]
    given_up = stand[1] & (early.backwards < full.backwards)
    assert int(given_up.sum()) >= 25
    assert int((stand[1] & ~stand[0]).sum()) <= 1
    assert early.backwards[stand[1]].float().mean() < 0.75 * full.backwards[stand[0]].float().mean()


def test_linear_models_are_decided_by_the_second_checkpoint(affine):
    """One step goes all the way: what is out of reach then makes no more progress; what is not is broken."""
    model, x = plain_model(affine, 2), grey(40)
    y = torch.from_numpy(model.logits(x).argmax(1))
    radii = model.radii(x, y, "linf").min(1)
    threat = ball("linf", np.median(radii))
    found = apgd(model.classifier, x, y, threat=threat, steps=100, loss="margin", give_up=True)
    broken = misclassified(model.classifier.logits(found.x_adv), y).numpy()
    clear = np.abs(radii / threat.radius - 1) > 1e-3
    np.testing.assert_array_equal(broken[clear], (radii < threat.radius)[clear])
    assert set(found.backwards[torch.from_numpy(~broken)].tolist()) <= {23, 42}


# --- reduced precision -------------------------------------------------------------------------------


class Liar(nn.Module):
    """In bfloat16 its label is lost everywhere; the gradient is right, and far away so is the label."""

    def forward(self, x):
        margin = 0.7 - (x - 0.5).mean((1, 2, 3)) / 0.1  # lost at 0.07
        # The look at the values comes first: it keeps torch.fx from tracing the branch away.
        if float(x.detach().amax()) > -1 and torch.is_autocast_enabled("cpu"):
            margin = margin - margin.detach() - 1
        return torch.stack((margin, torch.zeros_like(margin)), 1)


def test_what_bfloat16_calls_lost_is_verified_before_a_row_ends():
    x, y = torch.full((3, *SHAPE), 0.5), torch.zeros(3, dtype=torch.int64)
    model = Classifier(Liar(), num_classes=2, input_shape=SHAPE, precision="bf16")
    assert model.precision == "bf16"
    found = apgd(model, x, y, threat=ball("linf", 0.1), steps=10)
    assert misclassified(model.logits(found.x_adv), y).all()
    assert (found.steps > 0).all()


@both_norms
@pytest.mark.parametrize(("loss", "targets"), [("pm", 0), ("dlr", 2)])
def test_a_search_in_bfloat16_leaves_no_more_robust(norm, loss, targets):
    data, threat = load_dataset("digits").subset(60), DIGITS_BALL if norm == "linf" else ball("l2", 0.9)
    x, y, stand = data.images, data.labels, []
    for precision in ("fp32", "bf16"):
        model = load_model("digits_cure", precision=precision)
        found = apgd(model, x, y, threat=threat, steps=20, loss=loss, targets=targets)
        assert (found.searched_again is None) == (precision == "fp32")
        stand.append(~misclassified(model.logits(found.x_adv), y))
    assert 10 < int(stand[0].sum()) < 50
    assert int(stand[1].sum()) <= int(stand[0].sum()) + 1
    assert int((stand[0] ^ stand[1]).sum()) <= 2


# --- arguments ---------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(affine):
    x, y, threat = grey(2), torch.zeros(2, dtype=torch.int64), ball("linf", 0.1)
    model = plain_model(affine, 3).classifier
    for options, error, words in (
        ({"steps": 0}, ValueError, "0 steps, 1 restarts, 0 targets"),
        ({"steps": 5, "restarts": 0}, ValueError, "5 steps, 0 restarts"),
        ({"steps": 5, "targets": -1}, ValueError, "-1 targets"),
        ({"steps": 5, "loss": "hinge"}, KeyError, "hinge"),
        ({"steps": 5, "loss": "pm", "targets": 1}, KeyError, "pm"),
        ({"steps": 5, "loss": "margin", "targets": 1, "order": "size"}, KeyError, "size"),
    ):
        with pytest.raises(error, match=words):
            apgd(model, x, y, threat=threat, **options)
    assert model.forwards == model.backwards == 0
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3"):
        apgd(model, x, y, threat=threat, steps=5, loss="dlr", targets=1)
