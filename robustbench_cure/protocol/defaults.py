"""What measurements on a data set take unless they are told otherwise: radii, steps, lengths. Plain data.

Source: CURE paper, section 4 and figure 6 (CIFAR-10), supplement, figure 4 (SVHN); thesis, chapter 4. Those
of the digits, of 8 x 8 pixels, are larger: up to a fifth of the range of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


def _grey(*levels: int) -> tuple[Fraction, ...]:
    return tuple(Fraction(level, 255) for level in levels)


@dataclass(frozen=True)
class DatasetDefaults:
    """Defaults of one data set. Radii and lengths are l-infinity, in pixels of [0, 1].

    Attributes:
        eps: radius of the published robustness table; what the monitor of training attacks with.
        radii: of a curve of accuracy, ascending.
        pgd_steps: of the PGD at each of these radii.
        difference_step: h of finite differences of the loss, l2 in normalised inputs; CURE trains with it.
        universal_length: largest length of a universal perturbation.
    """

    eps: Fraction
    radii: tuple[Fraction, ...]
    pgd_steps: int
    difference_step: float
    universal_length: Fraction


DEFAULTS = {
    "cifar10": DatasetDefaults(
        eps=Fraction(8, 255),
        radii=_grey(0, 1, 2, 3, 4, 5, 6, 7, 8),
        pgd_steps=20,
        difference_step=1.5,
        universal_length=Fraction(10, 255),
    ),
    "svhn": DatasetDefaults(
        eps=Fraction(12, 255),
        radii=_grey(0, 2, 4, 6, 8, 10, 12),
        pgd_steps=10,
        difference_step=1.25,
        universal_length=Fraction(10, 255),
    ),
    "digits": DatasetDefaults(
        eps=Fraction(51, 255),
        radii=_grey(0, 10, 20, 30, 40, 51),
        pgd_steps=20,
        difference_step=1.2,
        universal_length=Fraction(51, 255),
    ),
}


def defaults_of(dataset: str) -> DatasetDefaults:
    """The defaults of a data set; those of CIFAR-10 where it has none of its own."""
    return DEFAULTS.get(dataset, DEFAULTS["cifar10"])
