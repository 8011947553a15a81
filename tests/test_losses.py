"""Cross-entropy as attacks follow it, against float64, however confident the network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import fgsm, pgd
from robustbench_cure.attacks.losses import (
    LOSSES,
    TARGETED_LOSSES,
    cross_entropy,
    dlr,
    log_probability_margin,
    margins,
    misclassified,
    odds_against,
    predictions,
    targeted_dlr,
    targeted_margin,
)
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training.pgd_at import last_iterate

SCALES = (1.0, 10.0, 1e2, 1e3, 1e4)
BALL = ThreatModel("linf", "51/255")


class Times(nn.Module):
    """A network whose logits are multiplied: the same labels, and the same direction of cross-entropy."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        return self.scale * self.net(x)


def exact_direction(logits: np.ndarray, label: int) -> np.ndarray:
    """Gradient of log((1 - p) / p) by the logits, float64, by the definition of p."""
    others = np.delete(logits, label)
    weights = np.exp(others - others.max())
    return np.insert(weights / weights.sum(), label, -1.0)


@pytest.mark.parametrize("scale", SCALES)
def test_its_gradient_is_that_of_exact_arithmetic(scale):
    z = scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    y = z.argmax(1)
    leaf = z.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(odds_against(leaf, y).sum(), leaf)
    wanted = [exact_direction(row.double().numpy(), int(label)) for row, label in zip(z, y, strict=True)]
    np.testing.assert_allclose(gradient.numpy(), np.stack(wanted), atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_its_direction_is_that_of_cross_entropy_in_float64(scale):
    z = (scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).double()
    for y in (z.argmax(1), z.argmin(1)):
        directions = []
        for loss in (odds_against, lambda a, b: functional.cross_entropy(a, b, reduction="none")):
            leaf = z.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
            directions.append(gradient / gradient.norm(dim=1, keepdim=True))
        torch.testing.assert_close(*directions, atol=1e-6, rtol=0)


def test_its_value_is_that_of_cross_entropy():
    z = torch.randn(64, 10, generator=torch.Generator().manual_seed(2)) * 5
    y = torch.arange(64) % 10
    torch.testing.assert_close(cross_entropy(z, y), functional.cross_entropy(z, y, reduction="none"))
    sure = torch.tensor([[40.0, 0.0, 0.0]])
    assert cross_entropy(sure, torch.tensor([0])).item() == pytest.approx(2 * np.exp(-40.0), rel=1e-5)


def double_gradient(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The usual cross-entropy's gradient, in float64 from end to end."""
    leaf = x.double().requires_grad_(True)
    loss = functional.cross_entropy(copy.deepcopy(module).double()(leaf), y, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", ["digits_normal", "digits_deepfool", "digits_pgd_at", "digits_cure"])
def test_fgsm_breaks_what_it_breaks_in_float64(name):
    """With the usual form in float32, 96 instead of 11 of 500 stand on digits_normal."""
    data = load_dataset("digits")
    model = load_model(name, precision="fp32")
    x, y = data.images, data.labels
    gradient = double_gradient(model.module, x, y)
    exact = (x + BALL.radius * gradient.sign().float()).clamp(0, 1)
    stand = [
        (~misclassified(model.logits(p), y)).sum().item()
        for p in (exact, fgsm(model, x, y, threat=BALL).x_adv)
    ]
    assert abs(stand[0] - stand[1]) <= 1


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "training"])
def test_larger_logits_are_no_defence(attack):
    data = load_dataset("digits").subset(100)
    x, y = data.images, data.labels
    stand = []
    for scale in SCALES:
        net = Times(load_model("digits_normal", precision="fp32").module, scale).eval()
        model = Classifier(net, num_classes=10, input_shape=(1, 8, 8))
        if attack == "fgsm":
            x_adv = fgsm(model, x, y, threat=BALL).x_adv
        elif attack == "pgd":
            x_adv = pgd(model, x, y, threat=BALL, steps=10, step_size=BALL.radius / 4).x_adv
        else:
            start = torch.full_like(x, 0.5)
            x_adv = last_iterate(net, x, y, BALL, BALL.radius / 4, 10, start)
        stand.append(int((~misclassified(model.logits(x_adv), y)).sum()))
    assert max(stand) <= 5, stand


def test_every_loss_that_is_called_ce_is_this_one():
    assert LOSSES["ce"] is odds_against


# --- the probability margin -----------------------------------------------------------------------------


def gradient_of(loss, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    leaf = z.clone().requires_grad_(True)
    return torch.autograd.grad(loss(leaf, y).sum(), leaf)[0]


def plain_probability_margin(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = z.softmax(1)
    own = functional.one_hot(y, z.shape[1]).bool()
    return p.masked_fill(own, 0).amax(1) - p[own]


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_probability_margin_has_its_value_and_direction(classes, scale):
    z = scale * torch.randn(64, classes, generator=torch.Generator().manual_seed(3))
    for y in (z.argmax(1), z.argmin(1), torch.arange(64) % classes):
        exact = plain_probability_margin(z.double(), y)
        torch.testing.assert_close(log_probability_margin(z, y).expm1().double(), exact, atol=1e-6, rtol=0)
        directions = [
            functional.normalize(gradient_of(loss, logits, y).double())
            for loss, logits in ((log_probability_margin, z), (plain_probability_margin, z.double()))
        ]
        held = odds_against(z, y) < 5  # a row that is lost for certain has nothing to gain, and no gradient
        torch.testing.assert_close(*(each[held] for each in directions), atol=2e-5, rtol=0)
        if classes > 2 and scale > 1:  # neither that of cross-entropy nor that of the margin
            other = functional.normalize(gradient_of(odds_against, z.double(), y))
            assert ((directions[0] - other).norm(dim=1) > 0.1).any()


@pytest.mark.parametrize("scale", SCALES[1:])
def test_the_probability_margin_of_confident_rows_does_not_vanish(scale):
    """Where p_y is 1: s_j e_j + s - (1 + s_j) e_y, divided by 1 + s_j; s = softmax over the other classes."""
    z = scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(4))
    y = z.argmax(1)
    z[torch.arange(64), y] += 20
    if scale >= 1000:  # what the plain formula has in float32
        assert gradient_of(plain_probability_margin, z, y).abs().sum(1).eq(0).float().mean() > 0.9
    others = z.double().scatter(1, y[:, None], -torch.inf)
    share = others.softmax(1)
    top, j = share.max(1)
    wanted = share.scatter_add(1, j[:, None], top[:, None]) / (1 + top)[:, None]
    wanted = wanted.scatter(1, y[:, None], -1.0)
    found = gradient_of(log_probability_margin, z, y)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)
    lower = log_probability_margin(z, y)
    z[torch.arange(64), y] -= 1
    assert (log_probability_margin(z, y) > lower).all()


# --- targeted losses ------------------------------------------------------------------------------------


def test_targeted_losses_by_hand():
    z = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 5.0]])
    y, t = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert targeted_margin(z, y, t).tolist() == [-3.0, -1.0]
    torch.testing.assert_close(targeted_dlr(z, y, t), torch.tensor([-3 / 3.5, -1 / 3.5]))
    torch.testing.assert_close(dlr(z, y), torch.tensor([-2 / 3, 4 / 3]))
    torch.testing.assert_close(targeted_dlr(100 * z + 7, y, t), targeted_dlr(z, y, t))
    assert {"margin": targeted_margin, "dlr": targeted_dlr} == TARGETED_LOSSES


def test_the_targeted_dlr_loss_needs_four_classes():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3"):
        targeted_dlr(z, y, 1 - y)


# --- what counts as misclassified -----------------------------------------------------------------------


def test_a_row_without_finite_logits_has_lost_its_label():
    z = torch.tensor([[2.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0], [3.0, -torch.inf]])
    y = torch.zeros(4, dtype=torch.int64)
    assert predictions(z).tolist() == [0, -1, -1, -1]
    assert misclassified(z, y).tolist() == [False, True, True, True]
    assert margins(z, y).tolist() == [1.0, -torch.inf, -torch.inf, -torch.inf]


def test_a_tie_goes_to_the_first_label():
    z = torch.tensor([[1.0, 1.0, 0.0]])
    assert [misclassified(z, torch.tensor([label])).item() for label in (0, 1)] == [False, True]
