"""AutoAttack through ``pyautoattack``: its attacks one by one, or ``standard``, ``plus``, ``rand``.

Source: Croce & Hein 2020, arXiv 2003.01690. As a whole its attacks run one after the other on the images
that still stand, and one row of the report holds them all; one by one each has its own row, and runs on all
images. Its checks of the model are this package's own flags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from robustbench_cure.errors import UsageError

if TYPE_CHECKING:
    from robustbench_cure.interop.peers import Setting, StandIn

DISTRIBUTION = "pyautoattack"
INSTALL = "install it: python -m pip install pyautoattack"
VERSIONS = ("standard", "plus", "rand")
#: Name -> module, class and what AutoAttack fixes.
ATTACKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "apgd-ce": ("autopgd_base", "APGDAttack", {"loss": "ce"}),
    "apgd-dlr": ("autopgd_base", "APGDAttack", {"loss": "dlr"}),
    "apgd-t": ("autopgd_base", "APGDAttack_targeted", {}),
    "fab": ("fab_pt", "FABAttack_PT", {"targeted": False}),
    "fab-t": ("fab_pt", "FABAttack_PT", {"targeted": True}),
    "square": ("square", "SquareAttack", {}),
}


def names() -> list[str]:
    """Its attacks and its versions."""
    import pyautoattack  # noqa: F401

    return [*ATTACKS, *VERSIONS]


def preset() -> frozenset[str]:
    """Parameters that the battery and the model decide."""
    return frozenset(
        ("norm", "eps", "seed", "verbose", "device", "logger", "loss", "targeted", "is_tf_model", "loss_fn")
    )


def signature(name: str) -> inspect.Signature:
    """Signature of the attack's constructor, without the model; a version has no parameters."""
    if name in VERSIONS:
        return inspect.Signature()
    whole = inspect.signature(_class(name))
    return whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "predict"])


def minimal(name: str) -> bool:
    """Whether it is FAB, which returns the nearest point that it found, inside the ball or not."""
    return name.startswith("fab")


def build(
    name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack with its parameters set: images (B,C,H,W) and labels (B,) in, images out."""
    device = str(model.device_of.device)
    norm = {"linf": "Linf", "l2": "L2"}[setting.threat.norm]
    common = {"norm": norm, "eps": setting.threat.radius, "seed": setting.seed, "device": device}
    if name in VERSIONS:
        from pyautoattack import AutoAttack

        whole = AutoAttack(model, version=name, **common)
        targets = setting.classes - 1
        whole.apgd_targeted.n_target_classes = min(whole.apgd_targeted.n_target_classes, targets)
        whole.fab.n_target_classes = min(whole.fab.n_target_classes, targets)

        def run(x: Tensor, y: Tensor) -> Tensor:
            x_adv: Tensor = whole.run_standard_evaluation(x, y, batch_size=len(x))[0]
            return x_adv

        return run
    wanted = options.get("n_target_classes", 0)
    if wanted > setting.classes - 1:
        raise UsageError(
            f"autoattack:{name}: n_target_classes {wanted}, the model has {setting.classes} classes"
        )
    attack = _class(name)(model, **common, **ATTACKS[name][2], **options)

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = attack.perturb(x, y)
        return x_adv

    return perturb


def _class(name: str) -> Any:
    import importlib

    module, class_name, _ = ATTACKS[name]
    return getattr(importlib.import_module(f"pyautoattack.{module}"), class_name)
