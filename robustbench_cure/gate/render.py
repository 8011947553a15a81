"""A comparison for people, for continuous integration and for machines: tables, sentences, JUnit, JSON."""

from __future__ import annotations

import json
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from robustbench_cure.evaluation.record import Record
from robustbench_cure.gate.compare import Comparison, Difference
from robustbench_cure.gate.outcome import ORDER, OUTCOMES, Outcome, Row, RowResult, Rules, conclude
from robustbench_cure.report.table import WIDTH, Column, Table, clean_text, markdown, to_markdown, to_text
from robustbench_cure.report.wording import count, points
from robustbench_cure.stats import LARGEST, DiscordantPairs, Rate

SCHEMA_VERSION = 1
#: Remark of a row of the table.
MARKS = {"fell": "fell", "rose": "rose", "may have fallen": "fell?", "below the minimum": "low"}
#: Characters of an accuracy's name in plain text.
NAME = 18
#: What a reader may do about each incompatibility, by the first word of what differs.
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


def overall(comparisons: Sequence[Comparison], rules: Rules) -> Outcome:
    """Outcome and exit code of all models together."""
    findings: list[RowResult] = [row.finding for c in comparisons for row in c.rows]
    findings += ["not comparable" for c in comparisons if c.incompatibilities]
    return conclude(findings, rules)


def terminal(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Tables and reasons; no line is longer than 80 columns."""
    blocks = []
    for c in comparisons:
        lines = _wrapped(headline(c), "")
        if c.rows:
            lines += ["", to_text(_table(c), indent="  "), ""]
        for text in sentences(c, rules):
            lines += _wrapped(text, "  - ")
        if c.notes:
            lines += _wrapped("; ".join(map(difference, c.notes)), "  other: ")
        blocks.append("\n".join(lines))
    if len(comparisons) > 1:
        blocks.append(f"together: {overall(comparisons, rules).kind.upper()}")
    return "\n\n".join(blocks)


def summary(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Markdown for a job's summary or a comment."""
    parts = [f"## Robustness gate: {overall(comparisons, rules).kind}", "", rules_in_words(rules), ""]
    for c in comparisons:
        parts += [f"### {_md(c.model)}: {c.outcome.kind}", ""]
        parts += [*(f"- {_md(text)}" for text in sentences(c, rules)), ""]
        if c.rows:
            parts += [to_markdown([_table(c)])]
        if c.notes:
            parts += [f"Other differences: {_md('; '.join(map(difference, c.notes)))}.", ""]
    return "\n".join(parts)


def to_junit(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """A suite a model, a case an accuracy. What fails the gate is a failure, an incompatibility an error."""
    root = ET.Element("testsuites", name="cure-bench compare")
    for c in comparisons:
        suite = ET.SubElement(root, "testsuite", name=clean_text(c.model))
        if c.incompatibilities:
            case = ET.SubElement(suite, "testcase", classname=clean_text(c.model), name="comparison")
            message = clean_text("; ".join(sentences(c, rules)))
            ET.SubElement(case, "error", type="not comparable", message=message)
        for row in c.rows:
            case = ET.SubElement(
                suite, "testcase", classname=clean_text(c.model), name=clean_text(row.accuracy.name)
            )
            text = clean_text(reason(row, c, rules))
            if conclude([row.finding], rules).exit_code:
                ET.SubElement(case, "failure", type=OUTCOMES[row.finding], message=text)
            else:
                ET.SubElement(case, "system-out").text = text
    for element in (root, *root):
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            element.set(key, str(len(list(element.iter(tag)))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_annotations(comparisons: Sequence[Comparison], rules: Rules) -> list[str]:
    """Workflow commands, which GitHub shows at a change: one a model."""
    lines = []
    for c in comparisons:
        good = "notice" if c.outcome.kind == "pass" else "warning"
        level = "error" if c.outcome.exit_code else good
        title, text = f"{c.model}: {c.outcome.kind}", "; ".join(sentences(c, rules))
        lines.append(f"::{level} title={_property(title)}::{_data(text)}")
    return lines


def to_json(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Everything, for machines. Rates and tolerances are shares, not per cent."""
    outcome = overall(comparisons, rules)
    content = {
        "schema_version": SCHEMA_VERSION,
        "verdict": outcome.kind,
        "exit_code": outcome.exit_code,
        "rules": {
            "tolerance": float(rules.tolerance),
            "min_robust": None if rules.min_robust is None else float(rules.min_robust),
            "level": rules.level,
            "accept": list(rules.accept),
        },
        "models": [_model(c, rules) for c in comparisons],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _model(c: Comparison, rules: Rules) -> dict[str, Any]:
    return {
        "model": c.model,
        "verdict": c.outcome.kind,
        "exit_code": c.outcome.exit_code,
        "reasons": sentences(c, rules),
        "hindrances": [_difference(d) for d in c.incompatibilities],
        "other_differences": [_difference(d) for d in c.notes],
        "new": _run(c.new),
        "baseline": _run(c.baseline),
        "accuracies": [_accuracy(row, c, rules) for row in c.rows],
    }


def _accuracy(row: Row, c: Comparison, rules: Rules) -> dict[str, Any]:
    p = row.accuracy.pairs
    unclear = row.finding == "may have fallen"
    return {
        "id": row.accuracy.id,
        "name": row.accuracy.name,
        "finding": row.finding,
        "n": p.n,
        "before": p.before,
        "now": p.after,
        "lost": p.lost,
        "gained": p.gained,
        "change": p.change,
        "change_low": p.interval[0],
        "change_high": p.interval[1],
        "p_fall": p.p_fall,
        "p_rise": p.p_rise,
        "level": row.level,
        "decides_at": p.decides_at(rules.tolerance, rules.level) if unclear else None,
        "reason": reason(row, c, rules),
    }


def _difference(this: Difference) -> dict[str, str]:
    return {"what": this.what, "now": this.now, "before": this.before}


def _run(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    m = record.manifest
    return {
        "path": str(record.path) if record.path else None,
        "model": m.model.id,
        "weights_sha256": m.model.weights_sha256,
        "battery": m.battery.id,
        "battery_digest": m.battery_digest,
        "data_digest": m.data.digest,
        "n": record.n,
        "started": m.started,
        "git_commit": m.environment.git_commit,
    }


def _table(c: Comparison) -> Table:
    heads = (
        Column(f"n = {count(c.n)}, in %", "left", "text", most=NAME),
        *(Column("before"), Column("now"), Column("change"), Column("95 % interval", "center")),
        *(Column("lost"), Column("gained"), Column("", "left")),
    )
    rows = []
    for row in c.rows:
        p = row.accuracy.pairs
        cells = [_name(row, c), rate(p, p.before), rate(p, p.after), points(p.change), interval(p)]
        rows.append((*cells, str(p.lost), str(p.gained), MARKS.get(row.finding, "")))
    return Table("", "", heads, tuple(rows))


def _name(row: Row, c: Comparison) -> str:
    n = row.accuracy.pairs.n
    return row.accuracy.name if n == c.n else f"{row.accuracy.name} (n = {count(n)})"


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(clean_text(text), WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _md(text: str) -> str:
    return markdown(clean_text(text))


def _data(text: str) -> str:
    return clean_text(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


# --- sentences --------------------------------------------------------------------------------------------


def sentences(comparison: Comparison, rules: Rules) -> list[str]:
    """Why the outcome is what it is: one sentence a reason, never none."""
    if comparison.incompatibilities:
        return [*map(difference, comparison.incompatibilities), f"{_advice(comparison.incompatibilities)}."]
    texts = [_passed(comparison, rules)] if comparison.outcome.kind == "pass" else []
    for finding in dict.fromkeys(row.finding for row in _by_weight(comparison) if row.finding != "held"):
        alike = [row for row in _by_weight(comparison) if row.finding == finding]
        largest = max(alike, key=lambda row: abs(row.accuracy.pairs.change))
        lead = [row for row in alike if row.accuracy.of != "attack"] or [largest]
        texts += [reason(row, comparison, rules) for row in lead]
        rest = [row.accuracy.name for row in alike if row not in lead]
        texts += [f"likewise {', '.join(rest)}"] if rest else []
    return texts


def reason(row: Row, comparison: Comparison, rules: Rules) -> str:
    """The finding on one accuracy in words, with the counts behind it."""
    name, pairs, same = row.accuracy.name, row.accuracy.pairs, comparison.same_weights
    by = f"{points(abs(pairs.change)).lstrip('+')} points"
    counts = f"{count(pairs.lost)} of {count(pairs.n)} samples lost, {count(pairs.gained)} gained"
    match row.finding:
        case "fell":
            text = f"{name} fell by {by}: {counts}, p = {pairs.p_fall:.2g}"
            return f"{text}. {SAME_WEIGHTS.format('stronger')}" if same else text
        case "below the minimum":
            least = f"below the minimum of {share(rules.min_robust)} %"
            return f"{name} is {rate(pairs, pairs.after)} %, {least}: {counts}"
        case "may have fallen":
            text = f"{name} is lower by {by}, which may be chance: {counts}, p = {pairs.p_fall:.2g}"
            return f"{text}; {_deciding(comparison, pairs, rules)}"
        case "rose":
            text = f"{name} rose by {by} while the clean accuracy stayed: {counts}, p = {pairs.p_rise:.2g}"
            return f"{text}. {SAME_WEIGHTS.format('weaker') if same else OTHER_WEIGHTS}"
        case "rose with the network":
            moved = "and the clean accuracy of these other weights moved too"
            return f"{name} rose by {by}, {moved}: {counts}, p = {pairs.p_rise:.2g}"
        case _:
            return f"{name}: {counts}, within tolerance or chance"


def difference(this: Difference) -> str:
    """``attack pgd20, steps: 2 now, 20 before``."""
    return f"{this.what}: {this.now} now, {this.before} before"


def headline(comparison: Comparison) -> str:
    """Model and outcome in one line, ``digits_cure: REGRESSION``."""
    return f"{comparison.model}: {comparison.outcome.kind.upper()}"


def rules_in_words(rules: Rules) -> str:
    """Tolerance, minimum, level and accepted outcomes in one sentence."""
    floor = "" if rules.min_robust is None else f"; worst case at least {share(rules.min_robust)} %"
    accepted = f"; accepted: {', '.join(rules.accept)}" if rules.accept else ""
    tests = f"exact McNemar tests at {100 * rules.level:g} %"
    return f"Tolerance {_tolerance(rules)}{floor}; {tests}{accepted}."


def rate(pairs: DiscordantPairs, number: int) -> str:
    """Per cent of the samples, one digit."""
    value = Rate(number, pairs.n).value
    return "n/a" if value != value else f"{100 * value:.1f}"


def interval(pairs: DiscordantPairs) -> str:
    """95 % interval of the change in points: ``[−1.2, +0.4]``."""
    low, high = pairs.interval
    return f"[{points(low)}, {points(high)}]"


def share(value: Fraction | None) -> str:
    """A share in per cent, without needless zeros."""
    return f"{100 * float(value or 0):g}"


def _tolerance(rules: Rules) -> str:
    return f"{share(rules.tolerance)} point{'' if rules.tolerance == Fraction(1, 100) else 's'}"


def _passed(comparison: Comparison, rules: Rules) -> str:
    worst = comparison.rows[-1].accuracy.pairs
    low = -worst.interval[0]
    fall = f"a fall of more than {100 * low:.1f} points" if low > 0 else "a fall"
    counts = f"{count(worst.lost)} of {count(worst.n)} samples lost and {count(worst.gained)} gained"
    return (
        f"no fall beyond {_tolerance(rules)} and chance, and no unexplained rise; "
        f"{counts} in the worst case rule out {fall} (95 %)"
    )


def _by_weight(comparison: Comparison) -> list[Row]:
    """Rows in the order of their sentences: alarms first, the worst case before the others."""
    order = ("worst", "clean", "attack")
    return sorted(
        comparison.rows,
        key=lambda row: (-ORDER.index(OUTCOMES[row.finding]), order.index(row.accuracy.of)),
    )


def _deciding(comparison: Comparison, pairs: DiscordantPairs, rules: Rules) -> str:
    n = pairs.decides_at(rules.tolerance, rules.level)
    if n is None:
        return f"not even {count(LARGEST)} samples would decide"
    text = f"about {count(_rounded(n))} samples would decide"
    total = comparison.new.manifest.data.total if comparison.new else 0
    return text if n <= total else f"{text}, and the data set has {count(total)}"


def _rounded(n: int) -> int:
    """Two significant digits, upwards: the rates it rests on are not known better."""
    unit = int(10 ** max(0, len(str(n)) - 2))
    return -(-n // unit) * unit


def _advice(incompatibilities: Sequence[Difference]) -> str:
    text = "; ".join(dict.fromkeys(map(_remedy, incompatibilities)))
    return text[0].upper() + text[1:]


def _remedy(this: Difference) -> str:
    if this.what == "model":
        return MISSING if this.now == "absent" else NO_BASELINE
    return ADVICE.get(this.what.split()[0], OTHERWISE)
