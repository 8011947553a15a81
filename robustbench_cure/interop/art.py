"""The Adversarial Robustness Toolbox: ``kind = "art:AutoProjectedGradientDescent"``; an optional extra."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from robustbench_cure.interop.peers import Setting, StandIn

DISTRIBUTION = "adversarial-robustness-toolbox"
INSTALL = 'install it: python -m pip install "robustbench-cure[peers]"'


def names() -> list[str]:
    """Its evasion attacks on images."""
    from art.attacks import evasion
    from art.attacks.attack import EvasionAttack

    found = ((n, getattr(evasion, n)) for n in dir(evasion))
    return [n for n, c in found if inspect.isclass(c) and issubclass(c, EvasionAttack)]


def preset() -> frozenset[str]:
    """Parameters that the battery and the model decide."""
    return frozenset(("norm", "eps", "verbose"))


def signature(name: str) -> inspect.Signature:
    """Signature of the attack's constructor, without the estimator."""
    from art.attacks import evasion

    whole = inspect.signature(getattr(evasion, name))
    kept = [p for p in whole.parameters.values() if p.name not in ("estimator", "classifier")]
    return whole.replace(parameters=kept)


def minimal(name: str) -> bool:
    """Whether the attack has no radius, and so looks for the nearest boundary."""
    return "eps" not in signature(name).parameters


def build(
    name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack with its parameters set: images (B,C,H,W) and labels (B,) in, images out."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    device = model.device_of.device
    estimator = PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=setting.shape,
        nb_classes=setting.classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    known = {
        "norm": {"linf": np.inf, "l2": 2}[setting.threat.norm],
        "eps": setting.threat.radius,
        "verbose": False,
    }
    parameters = signature(name).parameters
    attack = getattr(evasion, name)(
        estimator, **{k: v for k, v in known.items() if k in parameters}, **options
    )

    def run(x: Tensor, y: Tensor) -> Tensor:
        found = attack.generate(
            x=x.cpu().numpy(), y=np.eye(setting.classes, dtype=np.float32)[y.cpu().numpy()]
        )
        model.eval()  # ART switches the mode of its estimator on every call: not the attack's doing
        return torch.from_numpy(found).to(x)

    return run
