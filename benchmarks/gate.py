"""How often does the gate raise a false alarm, and how often does it miss? By simulation, through the gate.

    python benchmarks/gate.py

Every sample keeps its verdict, loses it or gains it by a chance of its own. *Noise* is the share of the
samples that another seed or rounding flips each way; the true change comes on top. The first table judges
the worst case alone, beside a clean accuracy that stays; the second one a whole battery of eight attacks
with noise of their own and no change at all, so that every alarm is false.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache

import click
import numpy as np

from robustbench_cure.gate.outcome import AccuracyChange, Rules, conclude, find_changes
from robustbench_cure.stats import DiscordantPairs

ROBUST = 0.6
SIZES = (200, 1_000, 10_000)
NOISE = (0.005, 0.02)
#: Points; negative ones are falls.
CHANGES = (0.0, -0.5, -1, -2, -3, -5, 3)
ATTACKS = 8
ALARMS = ("regression", "suspicious rise")


def flips(n: int, lost: int, gained: int) -> DiscordantPairs:
    """Of a network with 60 % robust accuracy."""
    before = round(ROBUST * n)
    return DiscordantPairs(n, before, before - lost + gained, lost, gained)


@cache
def worst_case(n: int, lost: int, gained: int, rules: Rules) -> str:
    """The verdict on these flips of the worst case, the clean accuracy being as before."""
    clean = AccuracyChange("clean", "clean", "clean", DiscordantPairs(n, n, n, 0, 0))
    worst = AccuracyChange("worst_case", "worst case", "worst", flips(n, lost, gained))
    rows = find_changes([clean, worst], rules, same_weights=True)
    return conclude([row.finding for row in rows], rules).kind


def battery(n: int, counts: list[tuple[int, int]], rules: Rules) -> str:
    """The verdict on a battery: lost and gained of the clean accuracy, the worst case and each attack."""
    held = [
        AccuracyChange(of, of, of, flips(n, *pair))
        for of, pair in zip(("clean", "worst", *["attack"] * ATTACKS), counts, strict=True)
    ]
    return conclude([row.finding for row in find_changes(held, rules, same_weights=True)], rules).kind


def draws(n: int, change: float, noise: float, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Lost and gained, (*shape, 2), of n samples when so many points change and noise flips both ways."""
    lose, gain = noise + max(0.0, -change) / 100, noise + max(0.0, change) / 100
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, [lose, gain, 1 - lose - gain], size=shape)[..., :2]


def rows(trials: int, rules: Rules) -> Iterator[str]:
    """Both tables, line by line: shares of pass, inconclusive and alarm in per cent."""
    sizes = " | ".join(f"n = {n:,}" for n in SIZES)
    yield f"| true change | noise each way | {sizes} |"
    yield "|:--|--:|" + "--:|" * len(SIZES)
    for change in CHANGES:
        for noise in NOISE:
            cells = []
            for n in SIZES:
                counts = draws(n, change, noise, (trials,), seed=0)
                cells.append(told(worst_case(n, int(a), int(b), rules) for a, b in counts))
            name = "none" if change == 0 else f"{'+' if change > 0 else '−'}{abs(change):g}"
            yield f"| {name} | {100 * noise:g} % | {' | '.join(cells)} |"
    yield ""
    yield f"| noise each way | {sizes} |"
    yield "|--:|" + "--:|" * len(SIZES)
    for noise in NOISE:
        cells = []
        for n in SIZES:
            counts = draws(n, 0, noise, (trials, 2 + ATTACKS), seed=1)
            counts[:, 0] = 0  # the clean pass has no random numbers
            cells.append(told(battery(n, [(int(a), int(b)) for a, b in one], rules) for one in counts))
        yield f"| {100 * noise:g} % | {' | '.join(cells)} |"


def told(kinds: Iterable[str]) -> str:
    """``96.2 / 3.8 / 0.0``: pass, inconclusive, alarm."""
    count = Counter(kinds)
    parts = (count["pass"], count["inconclusive"], sum(count[kind] for kind in ALARMS))
    return " / ".join(f"{100 * part / count.total():.1f}" for part in parts)


@click.command()
@click.option("--tolerance", type=float, default=1.0, show_default=True, help="Points.")
@click.option("--level", type=float, default=1.0, show_default=True, help="Per cent.")
@click.option("--trials", type=click.IntRange(1), default=20_000, show_default=True, help="A row.")
def main(tolerance: float, level: float, trials: int) -> None:
    """Print the tables of docs/gate.md: verdicts in per cent of the simulated comparisons."""
    rules = Rules(tolerance=Fraction(str(tolerance)) / 100, level=level / 100)
    for line in rows(trials, rules):
        click.echo(line)


if __name__ == "__main__":
    main()
