"""Foolbox: ``kind = "foolbox:LinfPGD"``; an optional extra."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from robustbench_cure.interop.peers import Setting, StandIn

DISTRIBUTION = "foolbox"
INSTALL = 'install it: python -m pip install "robustbench-cure[peers]"'


def names() -> list[str]:
    """Names of the attack classes that the library exports."""
    import foolbox
    from foolbox.attacks.base import Attack

    found = ((n, getattr(foolbox.attacks, n)) for n in dir(foolbox.attacks))
    return [n for n, c in found if inspect.isclass(c) and issubclass(c, Attack) and not inspect.isabstract(c)]


def preset() -> frozenset[str]:
    """Parameters that the battery and the model decide: none; the radius is an argument of the call."""
    return frozenset()


def signature(name: str) -> inspect.Signature:
    """Signature of the attack's constructor."""
    import foolbox

    return inspect.signature(getattr(foolbox.attacks, name))


def minimal(name: str) -> bool:
    """False for every attack: with a radius Foolbox clips what it found to the ball."""
    del name
    return False


def build(
    name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack with its parameters set: images (B,C,H,W) and labels (B,) in, images out."""
    import foolbox
    from foolbox.models.pytorch import PyTorchModel

    wrapped = PyTorchModel(model, bounds=(0, 1), device=model.device_of.device)
    attack = getattr(foolbox.attacks, name)(**options)

    def run(x: Tensor, y: Tensor) -> Tensor:
        _, clipped, _ = attack(wrapped, x, y, epsilons=setting.threat.radius)
        x_adv: Tensor = clipped
        return x_adv

    return run
