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
    """Its attack classes."""
    import torchattacks

    return [n for n in torchattacks.__all__ if inspect.isclass(getattr(torchattacks, n))]


def given() -> frozenset[str]:
    """Parameters that come from elsewhere."""
    return frozenset((*RADIUS, "norm", "n_classes", "seed", "verbose"))


def signature(name: str) -> inspect.Signature:
    """Of the constructor, without the model."""
    import torchattacks

    whole = inspect.signature(getattr(torchattacks, name))
    return whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "model"])


def minimal(name: str) -> bool:
    """Attacks without a radius, and FAB, which ignores it."""
    return name == "FAB" or not any(key in signature(name).parameters for key in RADIUS)


def call(
    name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack, ready."""
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
