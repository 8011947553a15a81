"""Attacks: pure functions on plain tensors, one algorithm a file.

Each has the form ``attack(classifier, x, y, *, threat, noise, **hyper) -> Candidates``: no state
between calls, no global random numbers, inputs untouched. The evaluation verifies the candidates.
"""

from __future__ import annotations

from robustbench_cure.attacks.apgd import apgd
from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.fab import fab
from robustbench_cure.attacks.fgsm import fgsm
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import pgd, pgd_checkpoints
from robustbench_cure.attacks.spsa import spsa
from robustbench_cure.attacks.square import square
from robustbench_cure.attacks.uniform_noise import uniform_noise

__all__ = [
    "Candidates",
    "Noise",
    "apgd",
    "deepfool",
    "fab",
    "fgsm",
    "pgd",
    "pgd_checkpoints",
    "spsa",
    "square",
    "uniform_noise",
]
