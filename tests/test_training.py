"""The curvature penalty against closed forms and Hessians; what the loop promises; the stored digits."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny import Data, card, context, quadratic
from torch import nn
from torch.nn import functional

from robustbench_cure.adapt import Normalised
from robustbench_cure.datasets import load_dataset
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import CardFile, find
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training import METHODS
from robustbench_cure.training.augment import AUGMENTATIONS
from robustbench_cure.training.cure import curvature_penalty, gamma_at, step_length
from robustbench_cure.training.loop import held_out_split
from robustbench_cure.training.pgd_at import last_iterate
from robustbench_cure.training.schedule import learning_rate
from robustbench_cure.training.train import train
from robustbench_cure.zoo import build
from robustbench_cure.zoo.loading import load_card_module, weights_digest

# --- the curvature penalty ---------------------------------------------------------------------------


@pytest.mark.parametrize("h", [1e-3, 0.5, 3.0])
@pytest.mark.parametrize("power", [1, 2])
def test_on_a_quadratic_the_penalty_is_h_times_the_length_of_az(h, power):
    A, b, loss = quadratic(7)
    u = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sign = (u @ A + b).sign()
    z = sign / sign.norm(dim=1, keepdim=True)
    expected = (h * (z @ A).norm(dim=1)) ** power
    penalty, parts = curvature_penalty(loss, u, h, power)
    assert torch.allclose(parts.direction, z)
    assert torch.allclose(parts.difference, h * z @ A)
    assert torch.allclose(penalty, expected.mean(), rtol=1e-9)


def smooth_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)).double()


def test_for_small_h_the_penalty_is_the_hessian_applied_to_z():
    net, h = smooth_net(), 1e-4
    u, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    penalty, parts = curvature_penalty(
        lambda v: functional.cross_entropy(net(v), y, reduction="none"), u, h, 2
    )
    expected = []
    for row, label, z in zip(u, y, parts.direction, strict=True):
        hessian = torch.autograd.functional.hessian(
            lambda v, label=label: functional.cross_entropy(net(v[None]), label[None]), row
        )
        expected.append((h * (hessian @ z).norm()) ** 2)
    assert torch.allclose(penalty, torch.stack(expected).mean(), rtol=1e-3)


@pytest.mark.parametrize("power", [1, 2])
def test_the_weight_gradient_is_that_of_the_penalty(power):
    net, u, y = smooth_net(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 2, 1])

    def penalty() -> torch.Tensor:
        return curvature_penalty(
            lambda v: functional.cross_entropy(net(v), y, reduction="none"), u, 0.7, power
        )[0]

    weight, step = net[0].weight, 1e-5
    (gradient,) = torch.autograd.grad(penalty(), weight)
    for index in [(0, 0), (3, 2), (5, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
            values.append(float(penalty().detach()))
            with torch.no_grad():
                weight[index] -= sign * step
        assert gradient[index].item() == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9
        )


@pytest.mark.parametrize("power", [1, 2])
def test_the_penalty_of_a_batch_is_the_mean_over_its_rows(power):
    net, u, y = smooth_net(), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3

    def of(rows: slice) -> torch.Tensor:
        return curvature_penalty(
            lambda v: functional.cross_entropy(net(v), y[rows], reduction="none"), u[rows], 0.9, power
        )[0]

    alone = torch.stack([of(slice(i, i + 1)) for i in range(6)])
    assert torch.allclose(of(slice(0, 6)), alone.mean())
    assert alone.std() > 0


def test_a_flat_loss_has_penalty_zero_and_a_finite_gradient():
    w = torch.ones(4, requires_grad=True)
    for loss in (lambda u: u @ w, lambda u: (u @ w) * 0):  # no curvature; no gradient at all
        penalty, parts = curvature_penalty(loss, torch.randn(3, 4), 1.5, 1)
        assert penalty.item() == 0
        assert parts.norms.tolist() == [0, 0, 0]
        (gradient,) = torch.autograd.grad(penalty, w, allow_unused=True)
        assert gradient is None or torch.equal(gradient, torch.zeros(4))
    assert torch.equal(parts.direction, torch.zeros(3, 4))


def test_a_partly_flat_gradient_still_gives_a_unit_direction():
    _, parts = curvature_penalty(lambda u: (u[:, :2] ** 2).sum(1), torch.ones(2, 9), 1.0, 2)
    assert torch.allclose(parts.direction.norm(dim=1), torch.ones(2))


def test_nan_is_not_taken_for_zero():
    penalty, _ = curvature_penalty(lambda u: (u * torch.nan).sum(1), torch.ones(2, 3), 1.0, 1)
    assert penalty.isnan()


# --- CURE's step -------------------------------------------------------------------------------------


def test_h_ramps_by_iteration_and_gamma_by_phase():
    recipe = card(
        "cure",
        epochs=20,
        replace=(
            ("h_ramp_epochs = 0", "h_ramp_epochs = 5"),
            ("h = 0.5", "h = 1.5"),
            (
                "[{ epochs = 20, gamma = 0.1 }]",
                "[{ epochs = 10, gamma = 4.0 }, { epochs = 5, gamma = 8.0 }, { epochs = 5, gamma = 12.0 }]",
            ),
        ),
    ).training
    assert [step_length(recipe, i, 10) for i in (0, 1, 25, 50, 51, 199)] == [0, 0.03, 0.75, 1.5, 1.5, 1.5]
    assert [gamma_at(recipe, e) for e in (0, 9, 10, 14, 15, 19, 99)] == [4, 4, 8, 8, 12, 12, 12]
    fixed = card("cure").training
    assert step_length(fixed, 0, 10) == 0.5


def normalised() -> Normalised:
    torch.manual_seed(0)
    return Normalised(build("resnet18", 10, 1, {"width": 4}), (0.3,), (0.4,)).train()


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for k, v in model.named_buffers() if "running" in k]


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_the_regulariser_touches_batch_norm_statistics_only_in_train_mode(digits, batchnorm):
    recipe = card("cure", replace=(('batchnorm = "eval"', f'batchnorm = "{batchnorm}"'),)).training
    x, y = digits.images[:16], digits.labels[:16]
    plain, regularised = normalised(), normalised()
    METHODS["standard"](plain, x, y, recipe, context())
    regularised.net.layer1.eval()  # a mode of one part alone comes back too
    modes = [m.training for m in regularised.modules()]
    regularised.net.layer1.train()
    METHODS["cure"](regularised, x, y, recipe, context())
    equal = all(map(torch.equal, statistics(plain), statistics(regularised)))
    assert equal == (batchnorm == "eval")
    regularised.net.layer1.eval()
    METHODS["cure"](regularised, x, y, recipe, context())
    assert [m.training for m in regularised.modules()] == modes


def test_cures_loss_is_cross_entropy_plus_gamma_times_the_penalty(digits):
    x, y = digits.images[:16], digits.labels[:16]
    recipe = card("cure").training
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 8}), (0.3,), (0.4,))
    loss, scalars = METHODS["cure"](model, x, y, recipe, context())
    u = (x - 0.3) / 0.4
    penalty, _ = curvature_penalty(
        lambda v: functional.cross_entropy(model.net(v), y, reduction="none"), u, 0.5, 1
    )
    assert torch.allclose(loss, functional.cross_entropy(model(x), y) + 0.1 * penalty)
    assert torch.allclose(scalars["regulariser"], penalty)


def test_a_step_in_pixels_is_longer_in_normalised_units(digits):
    # mean_b |D| in pixel space: gradients are 1/std larger and the step is std shorter in u.
    x, y = digits.images[:16], digits.labels[:16]
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 8}), (0.3,), (0.4,))
    pixels = card("cure", replace=(('h_space = "norm"', 'h_space = "px01"'), ("h = 0.5", "h = 0.2"))).training
    units = card("cure").training  # h = 0.5 = 0.2 / 0.4
    in_pixels = METHODS["cure"](model, x, y, pixels, context())[1]["regulariser"]
    in_units = METHODS["cure"](model, x, y, units, context())[1]["regulariser"]
    assert torch.allclose(in_pixels, in_units / 0.4, rtol=1e-4)


def test_without_a_step_there_is_no_regulariser(digits):
    recipe = card("cure", replace=(("h_ramp_epochs = 0", "h_ramp_epochs = 2"),)).training
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 8}), (0.3,), (0.4,))
    x, y = digits.images[:4], digits.labels[:4]
    loss, scalars = METHODS["cure"](model, x, y, recipe, context(0))
    assert torch.equal(loss, functional.cross_entropy(model(x), y))
    assert "regulariser" not in scalars
    assert "regulariser" in METHODS["cure"](model, x, y, recipe, context(1))[1]


# --- the other methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_attacks_stay_in_the_ball_and_leave_no_trace(digits, norm):
    model = normalised()
    x, y = digits.images[:8], digits.labels[:8]
    before, kept = statistics(model), x.clone()
    threat = ThreatModel.parse(norm, "30/255")
    x_adv = last_iterate(model, x, y, threat, threat.radius / 4, 5, torch.rand(x.shape))
    assert threat.contains(x, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert torch.equal(x, kept)
    assert not x_adv.requires_grad
    assert all(map(torch.equal, before, statistics(model)))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_deepfool_training_moves_only_images_classified_correctly(digits):
    torch.manual_seed(0)
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 8}), (0.3,), (0.4,)).train()
    x = digits.images[:8]
    with torch.no_grad():
        predicted = model(x).argmax(1)
    recipe = card("deepfool").training
    _, wrong = METHODS["deepfool"](model, x, (predicted + 1) % 10, recipe, context())
    loss, right = METHODS["deepfool"](model, x, predicted, recipe, context())
    assert wrong["perturbation"] == 0
    assert right["perturbation"] > 0
    assert loss > functional.cross_entropy(model(x), predicted)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- schedules and augmentation ----------------------------------------------------------------------


def test_schedules_meet_their_ends():
    rates = {
        s: [learning_rate(s, 1e-2, 1e-4, i, 101) for i in range(101)]
        for s in ("cosine", "one-cycle", "constant")
    }
    assert rates["constant"] == [1e-2] * 101
    assert rates["cosine"][0] == pytest.approx(1e-2)
    assert rates["cosine"][50] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates["cosine"] == sorted(rates["cosine"], reverse=True)
    assert rates["one-cycle"][0] == pytest.approx(1e-2 / 25)
    assert rates["one-cycle"].index(max(rates["one-cycle"])) == 30
    assert max(rates["one-cycle"]) == pytest.approx(1e-2)
    assert rates["cosine"][-1] == rates["one-cycle"][-1] == pytest.approx(1e-4)
    assert learning_rate("cosine", 1e-2, 1e-4, 0, 1) == pytest.approx(1e-2)


def test_crops_are_windows_of_the_padded_image_and_half_are_mirrored():
    x = torch.rand(400, 2, 6, 5)
    padded = functional.pad(x, [4] * 4)
    out = AUGMENTATIONS["crop-flip"](x, torch.Generator().manual_seed(0))
    mirrored, places = 0, set()
    for row, source in zip(out, padded, strict=True):
        matches = [
            (flip, i, j)
            for flip in (False, True)
            for i in range(9)
            for j in range(9)
            if torch.equal(row.flip(2) if flip else row, source[:, i : i + 6, j : j + 5])
        ]
        assert matches
        if len(matches) == 1:
            mirrored += matches[0][0]
            places.add(matches[0][1:])
    assert 150 < mirrored < 250
    assert len(places) > 60
    assert AUGMENTATIONS["none"](x, torch.Generator()) is x


# --- the loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss_on_digits(digits, method, tmp_path):
    seen = []
    state = torch.random.get_rng_state()
    result = train(
        card(method),
        digits,
        start_module=None,
        out_path=tmp_path / "w.safetensors",
        progress=lambda done, total, row: seen.append((done, total, row)),
    )
    assert result.log[-1].loss < 0.9 * result.log[0].loss
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [row.epoch for row in result.log] == [1, 2, 3]
    assert [done for done, _, _ in seen] == list(range(1, 28))
    assert {total for _, total, _ in seen} == {27}
    assert [row for _, _, row in seen if row] == result.log
    assert {path.name for path in tmp_path.iterdir()} >= {"w.safetensors", "w.csv"}
    assert not (tmp_path / "w.checkpoint.pt").exists()
    assert result.sha256 == weights_digest(tmp_path / "w.safetensors")
    found = CardFile(card(method), tmp_path / "tiny.toml")
    module, digest = load_card_module(found, tmp_path / "w.safetensors")
    assert digest == result.sha256
    assert all(torch.equal(v, module.net.state_dict()[k]) for k, v in result.state_dict.items())
    assert (result.log[-1].regulariser > 0) == (method == "cure")


def test_reduced_precision_trains_the_weights_it_updates(digits):
    """Autocast caches the weights it converts: a cache that outlives the step trains on the first ones."""
    reduced = card("standard", replace=(('precision = "fp32"', 'precision = "bf16"'),))
    log = train(reduced, digits, start_module=None).log
    full = train(card("standard"), digits, start_module=None).log
    assert log[-1].loss < 0.9 * log[0].loss
    assert abs(log[-1].loss - full[-1].loss) < 0.1 * full[0].loss


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_bytes_and_other_seeds_other_weights(digits, method, tmp_path):
    def run(seed: int) -> str:
        path = tmp_path / "w.safetensors"
        return train(card(method, seed=seed, epochs=1), digits, start_module=None, out_path=path).sha256

    assert run(0) == run(0) != run(1)


def test_the_held_out_tenth_is_never_trained_on(digits):
    rows, kept = held_out_split(320, 0)
    assert len(kept) == 32
    assert sorted([*rows.tolist(), *kept.tolist()]) == list(range(320))
    images = digits.images.clone()
    images[kept] = torch.nan  # one touch would make the loss NaN
    result = train(card("standard"), Data(images, digits.labels), start_module=None)
    assert math.isfinite(result.log[-1].loss)
    assert all(v.isfinite().all() for v in result.state_dict.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(digits, tmp_path):
    rows, _ = held_out_split(320, 0)
    images = digits.images.clone()
    images[rows[5]] = torch.nan
    with pytest.raises(RunError, match=r"the loss is nan in epoch 1, iteration \d of 9"):
        train(
            card("standard"),
            Data(images, digits.labels),
            start_module=None,
            out_path=tmp_path / "w.safetensors",
        )
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(RunError, match="in epoch 1, iteration"):
        train(card("standard", optimizer="sgd", lr=1e20), digits, start_module=None)


def test_training_goes_on_from_its_start(digits):
    fresh = train(card("standard"), digits, start_module=None)
    start = Normalised(build("digits_cnn", 10, 1, {"hidden": 16}), (0.3,), (0.4,))
    start.net.load_state_dict(fresh.state_dict)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    further = train(card("standard", start="other", lr=1e-4), digits, start_module=start, limit_epochs=1)
    assert len(further.log) == 1
    assert further.log[0].loss < fresh.log[0].loss
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in before.items())


def test_what_does_not_fit_is_a_usage_error(digits, tmp_path):
    other = Normalised(build("digits_cnn", 10, 1, {"hidden": 5}), (0.3,), (0.4,))
    cases = [
        (card("standard", start="other"), digits, None, None, "trained from the weights of 'other'"),
        (card("standard", start="other"), digits, other, None, "the architectures differ"),
        (
            card("standard"),
            Data(torch.rand(9, 3, 8, 8), digits.labels[:9]),
            None,
            None,
            "takes images of shape",
        ),
        (card("standard"), Data(digits.images, digits.labels + 1), None, None, "labels run from 1 to 10"),
        (card("standard"), digits, None, tmp_path / "w.pt", "written as .safetensors"),
    ]
    for model_card, data, start, out, message in cases:
        with pytest.raises(UsageError, match=message):
            train(model_card, data, start_module=start, out_path=out)


# --- the stored digits networks ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_normal", "digits_pgd_at", "digits_deepfool", "digits_cure"])
def test_the_stored_digits_networks_are_as_robust_as_their_cards_say(name):
    found = find(ModelCard, name)
    assert found.card.weights is not None
    assert Path(found.path.parent / found.card.weights.file).stat().st_size < 1_000_000
    module, _ = load_card_module(found)
    data = load_dataset("digits", "test")
    threat = ThreatModel.parse("linf", "51/255")
    leaf = data.images.double().requires_grad_(True)  # in float32 this gradient is rounding, see `losses`
    loss = functional.cross_entropy(copy.deepcopy(module).double()(leaf), data.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    fgsm = threat.project(data.images, data.images + threat.radius * gradient.sign().float())
    pgd = last_iterate(
        module,
        data.images,
        data.labels,
        threat,
        threat.radius / 4,
        20,
        torch.rand(data.images.shape, generator=torch.Generator().manual_seed(0)),
    )
    measured = {}
    for key, x in {"clean": data.images, "fgsm": fgsm, "pgd20": pgd}.items():
        with torch.no_grad():
            measured[key] = 100 * float((module(x).argmax(1) == data.labels).float().mean())
    assert measured["clean"] >= 95
    for key, value in measured.items():
        assert value == pytest.approx(found.card.figures[key], abs=2), key
    if name == "digits_normal":
        assert measured["pgd20"] <= measured["fgsm"] < 5  # one step suffices on a network without a defence
    if name == "digits_cure":
        assert measured["pgd20"] > 40
        assert abs(measured["fgsm"] - measured["pgd20"]) < 8
