"""Where the labels of fooled images go: a graph of labels.

Source: thesis, section 4.3, Fig. 4.7: a vertex for each label, an edge from i to j if most fooled images of
label i become j. The thesis finds few components, and a few dominant labels that many edges lead to.

Deviation. "Most" is the plurality: the label that more of them become than any other, the first of equals.
"""

from __future__ import annotations

from collections import Counter

import pandas as pd
from torch import Tensor


def moves(before: Tensor, after: Tensor, classes: tuple[str, ...]) -> pd.DataFrame:
    """One row for each change of label that occurs: before, after, count; and images with the label before.

    Args:
        before: labels, int64 (B,).
        after: labels, int64 (B,).
        classes: their names.
    """
    had = Counter(before.tolist())
    counted = Counter((i, j) for i, j in zip(before.tolist(), after.tolist(), strict=True) if i != j)
    rows = [(classes[i], classes[j], n, had[i]) for (i, j), n in sorted(counted.items())]
    return pd.DataFrame(rows, columns=["before", "after", "count", "images"])


def edges(found: pd.DataFrame) -> dict[str, str]:
    """For each label that is left, the one that most of its fooled images become; ``found``: of `moves`."""
    first: dict[str, str] = {}
    for row in found.sort_values("count", ascending=False, kind="stable").itertuples():
        first.setdefault(str(row.before), str(row.after))
    return first


def components(graph: dict[str, str]) -> list[set[str]]:
    """Labels that edges connect, whichever way they lead."""
    out: list[set[str]] = []
    for ends in graph.items():
        touching = [part for part in out if part & set(ends)]
        out = [part for part in out if part not in touching] + [set(ends).union(*touching)]
    return out


def sentence(found: pd.DataFrame) -> str:
    """The graph in words: labels with fooled images, those that most edges lead to, and its components."""
    graph = edges(found)
    if not graph:
        return "no image is fooled"
    ways = Counter(graph.values()).most_common(2)
    to = ", ".join(f"{label} (of {count})" for label, count in ways)
    return f"images of {len(graph)} labels are fooled, most become {to}; components: {len(components(graph))}"
