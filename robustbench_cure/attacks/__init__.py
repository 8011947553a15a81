"""Attacks: pure functions on plain tensors, one algorithm a file.

Each has the form ``attack(classifier, x, y, *, threat, noise, **hyper) -> Proposal``: no state between
calls, no global random numbers, inputs untouched. The evaluator verifies the proposal.
"""

from __future__ import annotations

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.fgsm import fgsm
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import pgd, pgd_checkpoints
from robustbench_cure.attacks.proposal import Proposal
from robustbench_cure.attacks.spsa import spsa
from robustbench_cure.attacks.uniform_noise import uniform_noise

__all__ = [
    "Noise",
    "Proposal",
    "deepfool",
    "fgsm",
    "pgd",
    "pgd_checkpoints",
    "spsa",
    "uniform_noise",
]
