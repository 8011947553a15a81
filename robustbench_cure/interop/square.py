"""The Square attack of AutoAttack: random search with square-shaped changes, no gradients at all.

Source: Andriushchenko et al. 2020, arXiv 1912.00049, in the implementation of ``pyautoattack``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_cure.attacks import Candidates
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

#: Images searched at a time; fixed, since the attack's random numbers follow it.
CHUNK = 128


def square(
    classifier: Classifier, x: Tensor, y: Tensor, *, threat: ThreatModel, queries: int, seed: int = 0
) -> Candidates:
    """Search on the margin, in the reference form; the points it ended with, adversarial or not.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps.
        queries: forward passes for each image, at least 2.
        seed: of the search; the global random state is put back afterwards.
    """
    from pyautoattack.square import SquareAttack

    attack = SquareAttack(
        classifier.logits,
        norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        n_queries=queries,
        eps=threat.radius,
        seed=seed,
        device=x.device,
    )
    candidates = Candidates.start(x)
    attack.init_hyperparam(x)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for rows in torch.split(torch.arange(len(x), device=x.device), CHUNK):
            before = classifier.forwards
            _, found = attack.attack_single_run(x[rows].clone(), y[rows])
            candidates.x_adv[rows] = threat.project(x[rows], found)
            candidates.forwards[rows] = (classifier.forwards - before) // len(rows)
    return candidates
