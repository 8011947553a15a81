"""How often does the gate raise a false alarm, and how often does it miss? By simulation.

    python benchmarks/gate.py

A network with 60 % worst-case robust accuracy is judged twice on the same n samples. Noise: every sample
that holds, and as many of those that do not, flip with a small chance, because of another seed or another
rounding. Fall: samples that held are lost on top of it. Figures are shares of 20,000 simulated comparisons
in %, at the default tolerance of 1 point and level of 1 %.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import click
import numpy as np

from robustbench_cure.gate.paired import Flips
from robustbench_cure.gate.verdict import Rules, conclude, judge_rows

ROBUST = 0.6
TRIALS = 20_000
KINDS = ("pass", "inconclusive", "regression", "suspicious rise")


@cache
def verdict(n: int, lost: int, gained: int, rules: Rules) -> str:
    """What the gate says about these flips of the worst case, the clean accuracy being as before."""
    held = round(ROBUST * n)
    rows = judge_rows(
        [
            ("clean accuracy", "clean", Flips(n, n, n, 0, 0)),
            ("worst case", "worst", Flips(n, held, held - lost + gained, lost, gained)),
        ],
        rules,
    )
    return conclude(rows, rules).kind


def shares(n: int, noise: float, fall: float, rules: Rules, seed: int = 0) -> dict[str, float]:
    """Per cent of the comparisons that end in each verdict.

    Args:
        n: samples.
        noise: share of all samples that flip each way by chance.
        fall: share of all samples that are lost; negative: gained.
        rules: of the gate.
        seed: of the simulation.
    """
    generator = np.random.default_rng(seed)
    held = round(ROBUST * n)
    lose, gain = max(fall, 0.0) + noise, max(-fall, 0.0) + noise
    lost = generator.binomial(held, min(1.0, lose / ROBUST), TRIALS)
    gained = generator.binomial(n - held, min(1.0, gain / (1 - ROBUST)), TRIALS)
    count = Counter(verdict(n, int(a), int(b), rules) for a, b in zip(lost, gained, strict=True))
    return {kind: 100 * count[kind] / TRIALS for kind in KINDS}


@click.command()
@click.option("--tolerance", type=float, default=1.0, show_default=True, help="Points.")
@click.option("--level", type=float, default=1.0, show_default=True, help="Per cent.")
def main(tolerance: float, level: float) -> None:
    """Print the table of the documentation."""
    rules = Rules(tolerance=tolerance / 100, level=level / 100)
    click.echo("| true change | noise each way | n | " + " | ".join(KINDS) + " |")
    click.echo("|---|--:|--:|" + "--:|" * len(KINDS))
    for fall in (0.0, 0.01, 0.02, 0.03, 0.05, -0.03):
        for noise in (0.005, 0.02):
            for n in (200, 1000, 10_000):
                found = shares(n, noise, fall, rules)
                cells = " | ".join(f"{found[kind]:.1f}" for kind in KINDS)
                name = "none" if fall == 0 else f"{-100 * fall:+g} points"
                click.echo(f"| {name} | {100 * noise:g} % | {n:,} | {cells} |")


if __name__ == "__main__":
    main()
