"""What a comparison comes to, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from robustbench_cure.gate.compare import Comparison, Difference
from robustbench_cure.gate.verdict import ORDER, VERDICTS, Row, Rules
from robustbench_cure.report.wording import count, points
from robustbench_cure.stats import LARGEST, Flips, Rate

#: What a reader may do about each hindrance, by the first word of what differs.
ADVICE = {
    "reliability": "mend the model, or do not gate it",
    "attack": "evaluate both with one battery; a change that is meant makes a new baseline",
    "battery": "evaluate both with one battery; a change that is meant makes a new baseline",
    "threat": "evaluate both in one threat model",
}
MISSING = "evaluate it too, or name the folder of one model in both runs"
NO_BASELINE = "make it part of the baseline with `cure-bench baseline update`"
OTHERWISE = "evaluate both on the same data"
SAME_WEIGHTS = "The weights are the same: an attack got {}, or code, libraries or machine changed"
OTHER_WEIGHTS = "A weaker attack, hidden gradients (`cure-bench masking` looks for them), or a better network"


def sentences(comparison: Comparison, rules: Rules) -> list[str]:
    """Why the verdict is what it is: one sentence a reason, never none."""
    if comparison.hindrances:
        return [*map(difference, comparison.hindrances), f"{_advice(comparison.hindrances)}."]
    texts = [_passed(comparison, rules)] if comparison.verdict.kind == "pass" else []
    for finding in dict.fromkeys(row.finding for row in _by_weight(comparison) if row.finding != "held"):
        alike = [row for row in _by_weight(comparison) if row.finding == finding]
        largest = max(alike, key=lambda row: abs(row.accuracy.flips.change))
        lead = [row for row in alike if row.accuracy.of != "attack"] or [largest]
        texts += [reason(row, comparison, rules) for row in lead]
        rest = [row.accuracy.name for row in alike if row not in lead]
        texts += [f"likewise {', '.join(rest)}"] if rest else []
    return texts


def reason(row: Row, comparison: Comparison, rules: Rules) -> str:
    """What was found on one accuracy, with the counts behind it."""
    name, flips, same = row.accuracy.name, row.accuracy.flips, comparison.same_weights
    by = f"{points(abs(flips.change)).lstrip('+')} points"
    counts = f"{count(flips.lost)} of {count(flips.n)} samples lost, {count(flips.gained)} gained"
    match row.finding:
        case "fell":
            text = f"{name} fell by {by}: {counts}, p = {flips.p_fall:.2g}"
            return f"{text}. {SAME_WEIGHTS.format('stronger')}" if same else text
        case "below the minimum":
            least = f"below the minimum of {share(rules.min_robust)} %"
            return f"{name} is {rate(flips, flips.after)} %, {least}: {counts}"
        case "may have fallen":
            text = f"{name} is lower by {by}, which may be chance: {counts}, p = {flips.p_fall:.2g}"
            return f"{text}; {_deciding(comparison, flips, rules)}"
        case "rose":
            text = f"{name} rose by {by} while the clean accuracy stayed: {counts}, p = {flips.p_rise:.2g}"
            return f"{text}. {SAME_WEIGHTS.format('weaker') if same else OTHER_WEIGHTS}"
        case "rose with the network":
            moved = "and the clean accuracy of these other weights moved too"
            return f"{name} rose by {by}, {moved}: {counts}, p = {flips.p_rise:.2g}"
        case _:
            return f"{name}: {counts}, within tolerance or chance"


def difference(found: Difference) -> str:
    """``attack pgd20, steps: 2 now, 20 before``."""
    return f"{found.what}: {found.now} now, {found.before} before"


def headline(comparison: Comparison) -> str:
    """``digits_cure: REGRESSION``."""
    return f"{comparison.model}: {comparison.verdict.kind.upper()}"


def rules_in_words(rules: Rules) -> str:
    """What was asked for."""
    floor = "" if rules.min_robust is None else f"; worst case at least {share(rules.min_robust)} %"
    accepted = f"; accepted: {', '.join(rules.accept)}" if rules.accept else ""
    tests = f"exact McNemar tests at {100 * rules.level:g} %"
    return f"Tolerance {_tolerance(rules)}{floor}; {tests}{accepted}."


def rate(flips: Flips, number: int) -> str:
    """Per cent of the samples, one digit."""
    value = Rate(number, flips.n).value
    return "n/a" if value != value else f"{100 * value:.1f}"


def interval(flips: Flips) -> str:
    """95 % interval of the change in points: ``[−1.2, +0.4]``."""
    low, high = flips.interval
    return f"[{points(low)}, {points(high)}]"


def share(value: Fraction | None) -> str:
    """A share in per cent, without needless zeros."""
    return f"{100 * float(value or 0):g}"


def _tolerance(rules: Rules) -> str:
    return f"{share(rules.tolerance)} point{'' if rules.tolerance == Fraction(1, 100) else 's'}"


def _passed(comparison: Comparison, rules: Rules) -> str:
    worst = comparison.rows[-1].accuracy.flips
    low = -worst.interval[0]
    fall = f"a fall of more than {100 * low:.1f} points" if low > 0 else "a fall"
    counts = f"{count(worst.lost)} of {count(worst.n)} samples lost and {count(worst.gained)} gained"
    return (
        f"no fall beyond {_tolerance(rules)} and chance, and no unexplained rise; "
        f"{counts} in the worst case rule out {fall} (95 %)"
    )


def _by_weight(comparison: Comparison) -> list[Row]:
    """Rows in the order in which they are told: alarms first, the worst case before the others."""
    order = ("worst", "clean", "attack")
    return sorted(
        comparison.rows,
        key=lambda row: (-ORDER.index(VERDICTS[row.finding]), order.index(row.accuracy.of)),
    )


def _deciding(comparison: Comparison, flips: Flips, rules: Rules) -> str:
    n = flips.decides_at(rules.tolerance, rules.level)
    if n is None:
        return f"not even {count(LARGEST)} samples would decide"
    text = f"about {count(_rounded(n))} samples would decide"
    total = comparison.new.manifest.data.total if comparison.new else 0
    return text if n <= total else f"{text}, and the data set has {count(total)}"


def _rounded(n: int) -> int:
    """Two significant digits, upwards: the rates it rests on are not known better."""
    unit = int(10 ** max(0, len(str(n)) - 2))
    return -(-n // unit) * unit


def _advice(hindrances: Sequence[Difference]) -> str:
    text = "; ".join(dict.fromkeys(map(_remedy, hindrances)))
    return text[0].upper() + text[1:]


def _remedy(found: Difference) -> str:
    if found.what == "model":
        return MISSING if found.now == "absent" else NO_BASELINE
    return ADVICE.get(found.what.split()[0], OTHERWISE)
