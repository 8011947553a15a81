"""The tables of `cure-bench connectivity`: what became of each pair, of each scenario, of combinations."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.geometry.connectivity import Path
from robustbench_cure.geometry.region_pairs import SCENARIOS
from robustbench_cure.stats import Rate
from robustbench_cure.studies.engine import Study

Columns = dict[str, NDArray[Any]]

#: What became of a pair.
OUTCOMES = ("no end", "not found", "bent", "straight")
NO_END, NOT_FOUND, BENT, STRAIGHT = range(4)
#: Columns of the page: anchors and D - 1 of all paths, then of the bent ones.
HEADS = (
    *("model", "to", "found", "95 %", "straight"),
    *("anchors", "D - 1", "if bent", "D - 1", "largest", "outside"),
)


def facts(path: Path | None) -> dict[str, float]:
    """A path in numbers; `path` None: an end is not in the region."""
    if path is None or path.points is None:
        outcome, depth = (NO_END, 0) if path is None else (NOT_FOUND, path.depth)
        return {"outcome": outcome, "depth": depth, "anchors": 0, "D": np.nan, "outside": 0, "excess": np.nan}
    anchors = path.points[1:-1]
    excess = torch.maximum(-anchors, anchors - 1).flatten(1).amax(1).clamp_min(0)
    return {
        "outcome": BENT if path.anchors else STRAIGHT,
        "depth": path.depth,
        "anchors": path.anchors,
        "D": path.deviation,
        "outside": int((excess > 0).sum()),
        "excess": float(excess.max()) if len(excess) else np.nan,
    }


def pair_rows(study: Study, name: str, labels: Tensor, found: Columns) -> pd.DataFrame:
    """One row a pair, with names instead of numbers."""
    parts = []
    for scenario in SCENARIOS:
        columns = {
            key.partition(".")[2]: column for key, column in found.items() if key.startswith(f"{scenario}.")
        }
        first, second = columns.pop("first"), columns.pop("second")
        outcome = columns.pop("outcome").astype(int)
        ends = {
            "model": name,
            "scenario": scenario,
            "pair": np.arange(len(first)),
            "first": [study.data.ids[row] for row in first],
            "second": ["random" if row < 0 else study.data.ids[row] for row in second],
            "label": [study.data.classes[label] for label in labels[first].tolist()],
            "outcome": [OUTCOMES[code] for code in outcome],
        }
        parts.append(pd.DataFrame(ends | columns))
    return pd.concat(parts, ignore_index=True)


def scenario_row(name: str, scenario: str, part: pd.DataFrame, spacing: float) -> dict[str, object]:
    """A scenario in numbers; anchors and D are those of the bent paths, and of all that were found."""
    joined = part[part["outcome"] != OUTCOMES[NO_END]]
    straight = int((joined["outcome"] == OUTCOMES[STRAIGHT]).sum())
    bent = joined[joined["outcome"] == OUTCOMES[BENT]]
    found = joined[joined["D"].notna()]
    rate = Rate(straight + len(bent), len(joined))
    low, high = rate.interval
    anchors = int(bent["anchors"].sum())
    return {
        "model": name,
        "scenario": scenario,
        "pairs": len(part),
        "n": len(joined),
        "found": rate.count,
        "ci_low": low,
        "ci_high": high,
        "straight": straight,
        "bent": len(bent),
        "anchors": bent["anchors"].mean(),
        "D": bent["D"].mean(),
        "D_largest": bent["D"].max(),
        "outside": int(bent["outside"].sum()) / anchors if anchors else np.nan,
        "spacing": spacing,
        "anchors_all": found["anchors"].mean(),
        "D_all": found["D"].mean(),
    }


def cells(row: dict[Hashable, Any]) -> list[str]:
    """A scenario on the page, under `HEADS`."""
    every = [f"{row['anchors_all']:.2g}", f"{row['D_all'] - 1:.1e}"]
    bent = [
        f"{row['anchors']:.1f}",
        f"{row['D'] - 1:.1e}",
        f"{row['D_largest'] - 1:.1e}",
        f"{100 * row['outside']:.0f} %",
    ]
    return [
        row["model"],
        row["scenario"],
        f"{row['found']}/{row['n']}",
        f"{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}",
        f"{row['straight']}/{row['n']}",
        *(every if row["found"] else ["-"] * len(every)),
        *(bent if row["bent"] else ["-"] * len(bent)),
    ]


def stay_row(name: str, k: int, stayed: NDArray[Any]) -> dict[str, object]:
    """How many combinations of k images stayed in their region."""
    rate = Rate(int(stayed.sum()), len(stayed))
    low, high = rate.interval if rate.total else (np.nan, np.nan)
    return {
        "model": name,
        "k": k,
        "draws": rate.total,
        "stayed": rate.count,
        "share": rate.value,
        "ci_low": low,
        "ci_high": high,
    }
