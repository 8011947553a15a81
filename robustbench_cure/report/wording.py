"""Numbers and specifications in words. The only place where a rate becomes per cent."""

from __future__ import annotations

import math

from robustbench_cure.protocol.identity import DataInfo
from robustbench_cure.protocol.specs import AttackSpec
from robustbench_cure.stats import Rate
from robustbench_cure.threat import Norm, ThreatModel, format_eps

NORMS: dict[str, str] = {"linf": "l∞", "l2": "l2"}
MINUS = "−"


def percent(rate: Rate) -> str:
    """``"41.4 %"``, or ``"n/a"`` for a rate out of nothing."""
    return f"{number(rate)} %" if rate.total else "n/a"


def number(rate: Rate) -> str:
    """``"41.4"``: per cent without the sign, for columns whose head says so."""
    return f"{100 * rate.value:.1f}" if rate.total else "n/a"


def interval(rate: Rate) -> str:
    """The 95 % Wilson interval in per cent, ``"[37.2, 45.7]"``; empty for a rate out of nothing."""
    low, high = rate.interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if rate.total else ""


def points(difference: float) -> str:
    """A difference of two rates in percentage points, signed: ``"+1.2"``, ``"−0.4"``, ``"0.0"``."""
    text = f"{abs(100 * difference):.1f}"
    return text if text == "0.0" else f"{'+' if difference > 0 else MINUS}{text}"


def count(value: int) -> str:
    """A whole number with separators of thousands, ``"10,000"``."""
    return f"{value:,}"


def distance(value: float | None, norm: Norm) -> str:
    """A distance in units of x: l∞ in grey levels, ``"7.9/255"``; l2 as a plain number, ``"0.503"``."""
    if value is None or math.isnan(value):
        return ""
    return f"{255 * value:.1f}/255" if norm == "linf" else f"{value:.3f}"


def quantity(value: float | None) -> str:
    """A mean or a time: three significant digits below 100, whole numbers above."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """``"1 h 02 min"``, ``"3 min 20 s"`` or ``"4.2 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def threat_words(threat: ThreatModel) -> str:
    """Norm and radius in words, ``"l∞ 8/255"``."""
    return f"{NORMS[threat.norm]} {format_eps(threat.eps)}"


def data_words(data: DataInfo) -> str:
    """``"cifar10, test: 512 of 10,000 images"``: which images, and how many of them."""
    part = f"{count(data.n)} of {count(data.total)}" if data.n < data.total else f"all {count(data.n)}"
    return f"{data.name}, {data.split}: {part} images"


def spec_words(spec: AttackSpec, threat: ThreatModel) -> str:
    """Every hyper-parameter of an attack in words; nothing is left to the reader's guess."""
    text = spec.words(threat)
    return text + (f"; on the first {count(spec.limit)} samples only" if spec.limit else "")
