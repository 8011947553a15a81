r"""Does the bound of an audit cover the truth? 1,000 audits of every network with a full AutoAttack record.

    python benchmarks/audits.py reports/measured

For each search (that of the battery `reference`, and weaker ones: PGD(20), APGD-CE) the records say which
images it left robust, with which margins, and which of these AutoAttack breaks. An audit of m survivors is
drawn with 1,000 seeds; the bound must be at least the true share in 95 of 100.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from robustbench_cure.evaluation.audit import drawn
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.storage import find_records
from robustbench_cure.protocol.catalog import ranking_protocol
from robustbench_cure.report.table import Table, columns, to_markdown
from robustbench_cure.stats import upper_bound

SEEDS = 1000
#: Draws of an audit.
DRAWS = 50


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    options = parser.parse_args()
    records = find_records(
        tuple(path.parent.parent for path in sorted(options.runs.glob("*/*/samples.parquet")))
    )
    unique = {str(record.path): record for record in records}
    rows = [row for full in unique.values() for row in of(full, list(unique.values()))]
    heads = ("Network", "Search", "Survivors", "AutoAttack breaks", f"Bound holds, m = {DRAWS}", "Mean bound")
    print(to_markdown([Table("Audits", "", columns(*heads), tuple(rows))]))


def of(full: Record, records: list[Record]) -> list[tuple[str, ...]]:
    """Lines of the table for one full AutoAttack record: each search on the same network and images."""
    if ranking_protocol(full.manifest.battery) != "autoattack":
        return []
    m = full.manifest
    same = [
        r for r in records
        if r.manifest.model.same_weights(m.model) and r.manifest.data.digest == m.data.digest
        and r.manifest.battery.threat == m.battery.threat
    ]  # fmt: skip
    searches = [("APGD-CE", full, full.attacks[:1])]
    for record in same:
        if ranking_protocol(record.manifest.battery) == "reference":
            searches.append((record.attacks[0].name, record, record.attacks[:1]))
            searches.append(("reference", record, record.attacks))
    return [line(m.model.id, name, record, full, attacks) for name, record, attacks in searches]


def line(model: str, name: str, record: Record, full: Record, attacks) -> tuple[str, ...]:  # type: ignore[no-untyped-def]
    """One search, audited a thousand times."""
    truth, survivors, covered, bound = coverage(record, full, attacks)
    return (
        model, name, f"{survivors}", f"{round(truth * survivors)}", f"{100 * covered:.1f} %",
        f"{100 * bound * survivors / record.n:.1f} points",
    )  # fmt: skip


def coverage(record: Record, full: Record, attacks, draws: int = DRAWS):  # type: ignore[no-untyped-def]
    """True share, survivors, share of audits whose bound covers it, and the mean bound."""
    robust = record.robust(attacks).to_numpy(dtype=bool)
    margins = np.min([record.samples[f"{s.id}.margin"].to_numpy(float, na_value=np.inf) for s in attacks], 0)
    broken = ~full.worst_case.to_numpy(dtype=bool)[robust]
    if not robust.any():
        return 0.0, 0, 1.0, 0.0
    found = np.array([drawn(margins[robust], draws, seed)[broken].sum() for seed in range(SEEDS)])
    whole = draws >= robust.sum()
    bounds = np.array([k / robust.sum() if whole else upper_bound(int(k), draws) for k in found])
    return broken.mean(), int(robust.sum()), (bounds >= broken.mean() - 1e-12).mean(), bounds.mean()


if __name__ == "__main__":
    main()
