"""Learning rates, set before every optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Share of a one-cycle run that warms up, and the factor below the peak it starts from.
WARM_UP, FIRST = 0.3, 25.0


def cosine(lr: float, lr_final: float, done: float) -> float:
    """Half a cosine from ``lr`` to ``lr_final`` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return lr_final + (lr - lr_final) * (1 + math.cos(math.pi * done)) / 2


def one_cycle(lr: float, lr_final: float, done: float) -> float:
    """Linear rise from ``lr / 25`` over the first 30 %, then half a cosine (Smith 2018, arXiv 1803.09820)."""
    if done < WARM_UP:
        return lr / FIRST + (lr - lr / FIRST) * done / WARM_UP
    return cosine(lr, lr_final, (done - WARM_UP) / (1 - WARM_UP))


def constant(lr: float, lr_final: float, done: float) -> float:
    """The learning rate ``lr``, the same in all of the run."""
    del lr_final, done
    return lr


#: Name in a recipe -> (lr, lr_final, share of the run done in [0, 1]) -> learning rate.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": cosine,
    "one-cycle": one_cycle,
    "constant": constant,
}


def learning_rate(schedule: str, lr: float, lr_final: float, iteration: int, total: int) -> float:
    """Learning rate of one iteration; the first and the last get the ends of the schedule exactly.

    Args:
        schedule: key of `SCHEDULES`.
        lr: largest learning rate.
        lr_final: last learning rate.
        iteration: from 0.
        total: iterations of the whole run.
    """
    return SCHEDULES[schedule](lr, lr_final, iteration / max(1, total - 1))
