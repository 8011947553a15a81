"""Attacks: pure functions on plain tensors, one algorithm a file.

Each has the form ``attack(classifier, x, y, *, threat, noise, **hyper) -> Proposal``: no state between
calls, no global random numbers, inputs untouched. The evaluator verifies the proposal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.fgsm import fgsm
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import pgd, pgd_checkpoints
from robustbench_cure.attacks.proposal import Proposal
from robustbench_cure.attacks.spsa import spsa
from robustbench_cure.attacks.uniform_noise import uniform_noise


def _peer(*arguments: Any, **options: Any) -> Proposal:
    from robustbench_cure.interop.peers import peer  # other libraries: only when one is asked for

    return peer(*arguments, **options)


#: The `kind` of a battery entry ("peer": any of another library) -> the function that runs it.
ATTACKS: dict[str, Callable[..., Proposal]] = {
    "fgsm": fgsm,
    "uniform_noise": uniform_noise,
    "pgd": pgd,
    "deepfool": deepfool,
    "spsa": spsa,
    "peer": _peer,
}

__all__ = [
    "ATTACKS",
    "Noise",
    "Proposal",
    "deepfool",
    "fgsm",
    "pgd",
    "pgd_checkpoints",
    "spsa",
    "uniform_noise",
]
