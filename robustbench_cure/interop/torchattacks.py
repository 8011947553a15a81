"""torchattacks: ``kind = "torchattacks:CW"``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from robustbench_cure.interop.peers import Setting, StandIn

DISTRIBUTION = "torchattacks"
INSTALL = "install it: python -m pip install torchattacks"
#: Names of the radius in its constructors.
RADIUS = ("eps", "max_epsilon")


def names() -> list[str]:
    """Names of the attack classes that the library exports."""
    import torchattacks

    return [n for n in torchattacks.__all__ if inspect.isclass(getattr(torchattacks, n))]


def preset() -> frozenset[str]:
    """Parameters that the battery and the model decide."""
    return frozenset((*RADIUS, "norm", "n_classes", "seed", "verbose"))


def signature(name: str) -> inspect.Signature:
    """Signature of the attack's constructor, without the model."""
    import torchattacks

    whole = inspect.signature(getattr(torchattacks, name))
    return whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "model"])


def minimal(name: str) -> bool:
    """Whether the attack has no radius, or ignores it as FAB does, and so looks for the nearest boundary."""
    return name == "FAB" or not any(key in signature(name).parameters for key in RADIUS)


def build(
    name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack with its parameters set: images (B,C,H,W) and labels (B,) in, images out."""
    import torchattacks

    known: dict[str, Any] = {
        **dict.fromkeys(RADIUS, setting.threat.radius),
        "norm": {"linf": "Linf", "l2": "L2"}[setting.threat.norm],
        "n_classes": setting.classes,
        "seed": setting.seed,
        "verbose": False,
    }
    parameters = signature(name).parameters
    attack: Callable[[Tensor, Tensor], Tensor] = getattr(torchattacks, name)(
        model, **{k: v for k, v in known.items() if k in parameters}, **options
    )
    return attack
