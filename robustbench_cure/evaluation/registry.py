"""Which function runs which kind of attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustbench_cure.attacks import Candidates, apgd, deepfool, fab, fgsm, pgd, spsa, square, uniform_noise


def _peer(*arguments: Any, **options: Any) -> Candidates:
    from robustbench_cure.interop.peers import peer  # other libraries: only when one is asked for

    return peer(*arguments, **options)


#: The `kind` of a battery entry ("peer": any of another library) -> the function that runs it.
ATTACKS: dict[str, Callable[..., Candidates]] = {
    "fgsm": fgsm,
    "uniform_noise": uniform_noise,
    "pgd": pgd,
    "apgd": apgd,
    "fab": fab,
    "square": square,
    "deepfool": deepfool,
    "spsa": spsa,
    "peer": _peer,
}
