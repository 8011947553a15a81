"""Gradients and logits that are NaN or infinite must not pass for robustness, nor a caller's settings."""

from __future__ import annotations

from functools import partial

import made
import pytest
import torch
from made import FGSM, NOISE
from torch import nn

from robustbench_cure import from_arrays, load_dataset, load_model
from robustbench_cure.attacks import deepfool, fgsm, pgd, spsa, uniform_noise
from robustbench_cure.attacks.losses import misclassified
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.masking.evidence import wider
from robustbench_cure.threat import ThreatModel

SHAPE = (1, 8, 8)
BALLS = {"linf": ThreatModel("linf", "51/255"), "l2": ThreatModel("l2", "1")}
ATTACKS = {
    "fgsm": lambda c, x, y, b: fgsm(c, x, y, threat=b),
    "pgd": lambda c, x, y, b: pgd(c, x, y, threat=b, steps=10, step_size=b.radius / 4),
    "margin": lambda c, x, y, b: pgd(c, x, y, threat=b, steps=10, step_size=b.radius / 4, loss="margin"),
    "deepfool": lambda c, x, y, b: deepfool(c, x, y, threat=b, mode="bounded"),
}


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits").subset(60)


@pytest.fixture(scope="module")
def base():
    return load_model("digits_normal", precision="fp32").module


class Around(nn.Module):
    """A network with a function of the images before it and one of images and logits behind it."""

    def __init__(self, net: nn.Module, before=lambda x: x, after=lambda x, z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(x, self.net(self.before(x)))


def classifier(net: nn.Module, precision: str = "fp32") -> Classifier:
    return Classifier(net.eval(), num_classes=10, input_shape=SHAPE, precision=precision)


def stand(model: Classifier, x, y, x_adv) -> int:
    return int((~misclassified(model.logits(x_adv), y)).sum())


# --- gradients ----------------------------------------------------------------------------------------


def root(x):
    """The same images, with a slope that is infinite, and then NaN, at black pixels."""
    return x.sqrt().square()


def steep_pixel(x):
    """The same images, but for one black pixel whose slope is infinite."""
    corner = x[:, :, :1, :1]
    return x + nn.functional.pad(1e-3 * corner.sqrt() - corner, (0, 7, 0, 7))


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("before", [root, steep_pixel])
def test_pixels_without_a_finite_slope_disarm_no_attack(base, data, before, name, norm):
    x, y, ball = data.images, data.labels, BALLS[norm]
    odd, plain = classifier(Around(base, before)), classifier(Around(base))
    left = [stand(plain, x, y, ATTACKS[name](model, x, y, ball).x_adv) for model in (odd, plain)]
    # Where half of the pixels have no slope, one step is weak, and says so; it is no reason to stand still.
    assert left[0] <= left[1] + (2 if before is steep_pixel else 12 if name in ("pgd", "margin") else 40), (
        left
    )
    assert odd.non_finite > 0
    assert plain.non_finite == 0


def test_a_gradient_has_zeros_where_it_is_not_finite(base, data):
    model = classifier(Around(base, root))
    raw = model.value_and_gradient(data.images, lambda z: z[:, 0], raw=True)[1]
    gradient = model.value_and_gradient(data.images, lambda z: z[:, 0])[1]
    assert not raw.isfinite().all()
    assert torch.equal(gradient, torch.where(raw.isfinite(), raw, 0))
    jacobian = model.value_and_jacobian(data.images, data.labels, (data.labels[:, None] + 1) % 10)[1]
    assert jacobian.isfinite().all()
    assert model.non_finite == 2 * int((~raw.isfinite()).flatten(1).any(1).sum())


def test_spsa_asks_inside_the_box_alone(base, data):
    x, y = data.images[:20], data.labels[:20]
    seen = []

    def watched(images):
        seen.append((float(images.amin()), float(images.amax())))
        return images.sqrt().square()

    model = classifier(Around(base, watched))
    left = {}
    for name, net in (("root", model), ("plain", classifier(Around(base)))):
        found = spsa(net, x, y, threat=BALLS["linf"], steps=15, samples=32, step_size=0.03)
        left[name] = stand(model, x, y, found.x_adv)
    assert min(low for low, _ in seen) >= 0
    assert max(high for _, high in seen) <= 1
    assert left["root"] <= left["plain"] + 1 < 10


def test_spsa_refuses_pairs_that_no_box_holds(base, data):
    with pytest.raises(ValueError, match="delta"):
        spsa(
            classifier(Around(base)), data.images, data.labels, threat=BALLS["linf"], steps=10, samples=2,
            step_size=0.1, delta=0.5,
        )  # fmt: skip


# --- logits -------------------------------------------------------------------------------------------


def off_grid(x):
    return ((x * 16 - (x * 16).round()).abs() > 1e-3).flatten(1).any(1)[:, None]


HOLES = {
    "NaN": lambda x, z: torch.where(off_grid(x), z * torch.nan, z),
    "infinite": lambda x, z: torch.where(off_grid(x), z + torch.inf, z),
    "one class": lambda x, z: torch.cat((z[:, :9], torch.where(off_grid(x), -torch.inf, z[:, 9:])), 1),
}


PGD = made.PGD | {"id": "pgd", "name": "PGD", "steps": 10, "step_size": "51/1020"}
DEEPFOOL = made.DEEPFOOL | {"mode": "bounded", "steps": 20}
SPSA = made.SPSA | {"limit": 0, "steps": 12, "samples": 8, "step_size": "1/20", "stop": "first-success"}
battery = partial(made.battery, eps="51/255", dataset="digits")


@pytest.mark.parametrize("hole", HOLES)
def test_a_network_without_an_answer_in_the_ball_is_broken_there_for_every_attack(base, data, hole):
    record = evaluate(
        classifier(Around(base, after=HOLES[hole])), battery(NOISE, FGSM, PGD, DEEPFOOL, SPSA), data,
    )  # fmt: skip
    samples = record.samples
    assert record.worst_case_accuracy.count == 0
    for spec in record.attacks:
        proposed = samples[f"{spec.id}.linf"] > 0  # what has no gradient there proposes the image itself
        assert samples.loc[proposed, f"{spec.id}.broken"].all(), spec.id
    flags = [flag for flag in record.flags if flag.kind == "non_finite_logits"]
    assert {flag.attack for flag in flags} >= {"noise", "pgd", "spsa"}
    assert record.robust_accuracy("spsa").count == 0
    assert "non_finite_nearby" in {flag.kind for flag in record.flags}
    assert str(samples["sample_id"].iloc[0]) in flags[0].evidence
    assert flags[0].value == record.clean_accuracy.count


def test_an_image_without_an_answer_is_no_correct_one(base):
    """Beyond the images that preflight looks at; its largest logit might be the label's."""
    data = load_dataset("digits").subset(100)
    order = data.subset(0)
    special = order.images[70]

    def hole(x, z):
        return torch.where((x == special).flatten(1).all(1)[:, None], z * torch.nan, z)

    record = evaluate(classifier(Around(base, after=hole)), battery(FGSM), data)
    row = record.samples.iloc[70]
    assert row["clean_pred"] == -1
    assert not record.clean_correct[70]
    flags = [flag for flag in record.flags if flag.kind == "non_finite_logits"]
    assert any(flag.attack == "" and order.ids[70] in flag.evidence for flag in flags)


def test_gradients_that_are_not_finite_are_counted_in_the_record(base, data, tmp_path):
    record = evaluate(classifier(Around(base, root)), battery(PGD), data, shard_size=20, out=tmp_path / "run")
    cost = record.manifest.cost["pgd"]
    assert 0 < cost.non_finite <= cost.backwards
    (flag,) = [flag for flag in record.flags if flag.kind == "non_finite_gradient"]
    assert (flag.attack, flag.value) == ("pgd", cost.non_finite)
    assert f"{cost.non_finite:,} of {cost.backwards:,}" in flag.evidence


# --- what a battery that breaks nothing says --------------------------------------------------------------


def test_a_battery_that_breaks_nothing_says_so(base, data):
    scaled = classifier(Around(base, lambda x: x / 255))
    labels = scaled.logits(data.images).argmax(1)  # all correct, so that there is something to break
    mine = from_arrays("digits", "test", data.images, labels, ids=data.ids, classes="0123456789")
    kinds = [flag.kind for flag in evaluate(scaled, battery(FGSM, PGD), mine).flags]
    assert "nothing_broken" in kinds
    for n in (9, 10):  # a few that stand say nothing
        kinds = [flag.kind for flag in evaluate(scaled, battery(FGSM), mine.subset(n)).flags]
        assert ("nothing_broken" in kinds) == (n == 10)
    kinds = [flag.kind for flag in evaluate(scaled, battery(FGSM, eps="0"), mine).flags]
    assert "nothing_broken" not in kinds
    kinds = [flag.kind for flag in evaluate(classifier(Around(base)), battery(FGSM, PGD), data).flags]
    assert "nothing_broken" not in kinds


# --- the caller's modes ---------------------------------------------------------------------------------


def test_inference_mode_of_the_caller_does_not_still_the_gradients(base, data):
    x, y, ball = data.images, data.labels, BALLS["linf"]
    wanted = [ATTACKS[name](classifier(Around(base)), x, y, ball).x_adv for name in ATTACKS]
    with torch.inference_mode():
        model = classifier(Around(base))
        images = x.clone()  # an inference tensor
        found = [ATTACKS[name](model, images, y, ball).x_adv.clone() for name in ATTACKS]
        record = evaluate(model, battery(PGD), data)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.clone(), theirs)
    assert (
        record.worst_case_accuracy.count
        == evaluate(classifier(Around(base)), battery(PGD), data).worst_case_accuracy.count
    )
    with torch.no_grad():
        assert torch.equal(ATTACKS["pgd"](model, x, y, ball).x_adv, wanted[1])


# --- no rows --------------------------------------------------------------------------------------------


class Flattens(nn.Module):
    """``x.view(len(x), -1)`` cannot guess the size of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        assert len(x), "an empty batch"
        return self.layer(x.reshape(x.size(0), -1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_attack_gives_a_network_an_empty_batch(data, precision):
    torch.manual_seed(0)
    model = classifier(Flattens(), precision)
    none, labels, ball = data.images[:0], data.labels[:0], BALLS["linf"]
    for attack in ATTACKS.values():
        assert attack(model, none, labels, ball).x_adv.shape == none.shape
    uniform_noise(model, none, labels, threat=ball, draws=2)
    spsa(model, none, labels, threat=ball, steps=3, samples=2, step_size=0.1)
    assert model.logits(none).shape == model.search_logits(none).shape == (0, 10)
    assert model.value_and_gradient(none, lambda z: z.sum(1))[1].shape == none.shape
    assert model.value_and_jacobian(none, labels, labels[:, None])[1].shape == (0, 1, *SHAPE)


@pytest.mark.parametrize("peer", ["torchattacks:FGSM", "foolbox:LinfPGD"])
def test_a_shard_without_rows_for_an_attack_is_no_error(data, peer):
    other = {"id": "peer", "name": "peer", "kind": peer, "limit": 5}
    torch.manual_seed(0)
    limited = battery(PGD | {"limit": 5}, DEEPFOOL | {"limit": 5}, SPSA | {"limit": 5}, other)
    record = evaluate(classifier(Flattens()), limited, data, shard_size=20)
    assert int(record.samples["peer.attacked"].sum()) <= 5
    labels = classifier(Flattens()).logits(data.images).argmin(1)
    wrong = from_arrays("digits", "test", data.images, labels, classes="0123456789")
    evaluate(classifier(Flattens()), battery(FGSM, PGD, other), wrong.subset(20))


# --- balls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 224, 224)])
@pytest.mark.parametrize("norm", BALLS)
def test_the_widest_ball_holds_every_image(norm, shape):
    ball = wider(BALLS[norm], 0, torch.Size(shape).numel())
    black, white = torch.zeros((1, *shape)), torch.ones((1, *shape))
    assert ball.contains(black, white).all()
    assert wider(BALLS["linf"], 40, 64).radius == 1
