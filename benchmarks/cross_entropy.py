"""FGSM and PGD(20) on cross-entropy of confident networks: here, torchattacks, Foolbox, and in float64.

The gradient of cross-entropy in its usual form is rounding where the label's probability is within 1e-7 of 1,
in every library that computes it in float32. The column float64 is FGSM with that form in float64 throughout.

    python benchmarks/cross_entropy.py
"""

from __future__ import annotations

import copy

import foolbox
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import fgsm, pgd
from robustbench_cure.attacks.losses import misclassified
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

BALL, STEPS = ThreatModel("linf", "51/255"), 20
NETWORKS = (
    ("digits_normal", 1),
    ("digits_deepfool", 1),
    ("digits_pgd_at", 1),
    ("digits_cure", 1),
    ("digits_normal", 10),
)


class Times(nn.Module):
    """A network whose logits are multiplied: no label moves, and no attack should notice."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L)."""
        return self.scale * self.net(x)


def in_float64(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FGSM's images by the usual cross-entropy in float64."""
    leaf = x.double().requires_grad_(True)
    loss = functional.cross_entropy(copy.deepcopy(net).double()(leaf), y, reduction="sum")
    gradient = torch.autograd.grad(loss, leaf)[0]
    return (x + BALL.radius * gradient.sign().float()).clamp(0, 1)


def candidates(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Column -> perturbed images."""
    radius, alpha = BALL.radius, BALL.radius / 4
    ours = Classifier(net, num_classes=10, input_shape=(1, 8, 8))
    wrapped = foolbox.PyTorchModel(copy.deepcopy(net), bounds=(0, 1))
    options = {"steps": STEPS, "abs_stepsize": alpha}
    return {
        "FGSM, here": fgsm(ours, x, y, threat=BALL).x_adv,
        "torchattacks": torchattacks.FGSM(copy.deepcopy(net), eps=radius)(x, y),
        "Foolbox": foolbox.attacks.LinfFastGradientAttack()(wrapped, x, y, epsilons=radius)[1],
        "float64": in_float64(net, x, y),
        "PGD(20), here": pgd(ours, x, y, threat=BALL, steps=STEPS, step_size=alpha).x_adv,
        "torchattacks ": torchattacks.PGD(copy.deepcopy(net), eps=radius, alpha=alpha, steps=STEPS)(x, y),
        "Foolbox ": foolbox.attacks.LinfPGD(**options)(wrapped, x, y, epsilons=radius)[1],
    }


def main() -> None:
    """A line of the table for each network."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    for number, (name, scale) in enumerate(NETWORKS):
        net = Times(load_model(name, precision="fp32").module, scale).eval().requires_grad_(False)
        found = candidates(net, data.images, data.labels)
        if number == 0:
            print("| standing, of 500 | " + " | ".join(map(str.strip, found)) + " |")
            print("|:---|" + "---:|" * len(found))
        with torch.no_grad():
            stand = [int((~misclassified(net(x_adv), data.labels)).sum()) for x_adv in found.values()]
        told = name if scale == 1 else f"{name}, logits times {scale}"
        print(f"| {told} | " + " | ".join(map(str, stand)) + " |", flush=True)


if __name__ == "__main__":
    main()
