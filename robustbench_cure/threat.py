"""The threat model: which perturbations an adversary may use.

One value object owns the geometry (distance, projection, membership), so that no attack and no
report measures a ball in its own way. ``eps`` is kept as an exact fraction: ``8/255`` is eight grey
levels and ``0.031`` is another budget. This module does not import torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["linf", "l2"]

#: Slack of the ball when membership is checked, as a share of eps: others take norms in float32, which at
#: 3x384x384 are wrong by some 1e-6 of their size.
RELATIVE_TOLERANCE = 1e-5
#: And beside it, in units of x: what one float32 pixel of [0, 1] rounds to, twice.
PIXEL_TOLERANCE = 2.0**-23
#: Slack of the box [0, 1], in units of x: pixels that were normalised and brought back.
BOX_TOLERANCE = 1e-6


def parse_fraction(text: str) -> Fraction:
    """Read ``"8/255"`` or ``"0.5"`` exactly.

    Raises:
        ValueError: not a fraction or a decimal number, or negative.
    """
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(f'{text!r} is not a fraction such as "8/255"') from None
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    return value


@dataclass(frozen=True)
class ThreatModel:
    """An lp ball of radius ``eps`` around each image, cut by the pixel box [0, 1].

    Args:
        norm: ``"linf"`` or ``"l2"``, over the whole image.
        eps: radius in units of x (pixels in [0, 1]), exact: a `Fraction`, or text such as ``"8/255"``.

    Attributes:
        text: the radius as it was written, which cards and their digests keep.

    Raises:
        TypeError: eps is a float: which fraction it stands for is not known.
        ValueError: another norm, no fraction, negative, or an l∞ radius that is more than all grey levels.
    """

    norm: Norm
    eps: Fraction
    text: str = field(default="", init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"unknown norm {self.norm!r}; use linf or l2")
        given: object = self.eps
        if isinstance(given, float):
            raise TypeError(f'eps {given!r} is a float; write a fraction, "8/255" or Fraction(8, 255)')
        radius = parse_fraction(given) if isinstance(given, str) else Fraction(self.eps)
        if radius < 0:
            raise ValueError(f"eps {radius} is negative")
        if self.norm == "linf" and radius > 1:
            raise ValueError(
                f"{str(given)!r} is more than all of the pixels' range, 1; in grey levels: {given}/255"
            )
        object.__setattr__(self, "eps", radius)
        object.__setattr__(self, "text", given if isinstance(given, str) else format_eps(radius))

    @classmethod
    def parse(cls, norm: Norm, eps: str) -> ThreatModel:
        """Build from card text: ``ThreatModel.parse("linf", "8/255")``.

        Raises:
            ValueError: another norm, no fraction, or an l∞ radius that is more than all grey levels.
        """
        return cls(norm, eps)  # type: ignore[arg-type]  # text is read on construction

    @classmethod
    def unbounded(cls, norm: Norm) -> ThreatModel:
        """The norm alone, for searches of the nearest boundary, wherever that is: they read no radius."""
        return cls(norm, Fraction(0))

    @property
    def radius(self) -> float:
        """The radius as a float, in units of x."""
        return float(self.eps)

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Distance of each row, shape (B,), in units of x."""
        return distance(self.norm, x, x_adv)

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Nearest point of the ball, then of the box, for each row; same shape as ``x_adv``.

        For linf this is the exact projection on the intersection. For l2 the box is applied after
        the ball, as every PGD implementation does; the result lies in both, because clipping to a
        box that contains x never moves a point away from x.

        Guarantees: `contains` holds for the result, whatever the size of the image and the radius.
        """
        if self.norm == "linf":
            return x_adv.clamp(x - self.radius, x + self.radius).clamp(0.0, 1.0)
        delta = self.shorten(x_adv - x)
        moved = x + delta
        # Roundings of pixels that are alike add up. Where they lead out, none may go further than delta.
        out = _row_norm(moved - x, "l2") > self.radius * (1 + RELATIVE_TOLERANCE / 10)
        further = ((moved - x).abs() > delta.abs()) & out.view(-1, *[1] * (x.dim() - 1))
        return moved.nextafter(x).where(further, moved).clamp(0.0, 1.0)

    def shorten(self, delta: Tensor) -> Tensor:
        """Nearest perturbation of length eps or less for each row, whatever the box; same shape."""
        if self.norm == "linf":
            return delta.clamp(-self.radius, self.radius)
        scale = (self.radius / _row_norm(delta, "l2").clamp_min(1e-300)).clamp_max(1.0).to(delta.dtype)
        return delta * scale.view(-1, *[1] * (delta.dim() - 1))

    def contains(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Whether each row lies in the ball, up to rounding; bool, shape (B,). NaN is outside."""
        return _row_norm(x_adv - x, self.norm) <= self.radius * (1 + RELATIVE_TOLERANCE) + PIXEL_TOLERANCE

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step that increases a linear function most: sign for linf, g/||g||_2 for l2.

        A zero gradient gives a zero step. The l2 norm is taken after scaling by the largest entry,
        so that tiny gradients (what curvature regularisation aims for) keep their direction.
        """
        if self.norm == "linf":
            return gradient.sign()
        largest = gradient.abs().flatten(1).amax(1).view(-1, *[1] * (gradient.dim() - 1))
        scaled = gradient / largest.where(largest > 0, largest.new_ones(()))
        length = _row_norm(scaled, "l2").to(gradient.dtype).view_as(largest)
        return scaled / length.where(length > 0, length.new_ones(()))


def distance(norm: Norm, x: Tensor, x_adv: Tensor) -> Tensor:
    """Row-wise lp distance between two image batches, shape (B,), in units of x."""
    return _row_norm(x_adv - x, norm).to(x_adv.dtype)


def format_eps(eps: Fraction) -> str:
    """Print n/255 where that is exact, else a short decimal or a fraction: ``8/255``, ``0.031``, ``1/2``."""
    if eps != 0 and (eps * 255).denominator == 1 and eps < 1:
        return f"{(eps * 255).numerator}/255"
    if eps.denominator > 10 and 10_000 % eps.denominator == 0:
        return str(Decimal(eps.numerator) / eps.denominator)
    return str(eps)


def _row_norm(delta: Tensor, norm: Norm) -> Tensor:
    # Summed in float64: in float32 the l2 norm of 150,000 pixels is wrong by 1.4e-6 of its size.
    flat = delta.flatten(1)
    if not flat.shape[1]:
        return flat.double().sum(1)
    return flat.double().norm(dim=1) if norm == "l2" else flat.abs().amax(1).double()
