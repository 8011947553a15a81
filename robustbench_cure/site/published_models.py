"""RobustBench's ``model_info`` as published rows: numbers of others, ready to stand beside measured ones.

A clone of RobustBench holds ``model_info/<dataset>/<threat>/<id>.json``. Each data set, norm and exact radius
becomes one published table: an entry at 0.031 does not stand among those at 8/255. The lowest of AutoAttack,
external and reported number is what the leaderboard shows, with its kind.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import click
import tomli_w
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import PublishedTable
from robustbench_cure.protocol.catalog import FOLDERS
from robustbench_cure.protocol.schema import Fractional, describe
from robustbench_cure.report.sheet import write_text
from robustbench_cure.report.terminal import clean_text
from robustbench_cure.report.wording import count, threat_words
from robustbench_cure.site.model_info import THREATS
from robustbench_cure.threat import Norm, ThreatModel, format_eps

#: RobustBench's name of a threat model -> ours.
NORMS: dict[str, Norm] = {theirs: ours for ours, theirs in THREATS.items()}
#: Test images behind RobustBench's own numbers.
IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
#: Column -> head, key of the entry, and whether RobustBench measured it or took it over.
COLUMNS: dict[str, tuple[str, str, Literal["measured", "quoted"]]] = {
    "clean": ("Clean", "clean_acc", "measured"),
    "autoattack": ("AutoAttack", "autoattack_acc", "measured"),
    "external": ("External", "external", "measured"),
    "reported": ("Reported", "reported", "quoted"),
}


class Entry(BaseModel):
    """What is read of one entry; it has further keys, and older ones call AutoAttack ``AA``."""

    model_config = ConfigDict(extra="ignore")

    dataset: Literal["cifar10", "cifar100", "imagenet"]
    architecture: str
    eps: Fractional
    venue: str = ""
    additional_data: bool | None = None
    unreliable: bool = False
    clean_acc: float = Field(ge=0, le=100)
    autoattack_acc: float | None = Field(
        default=None, ge=0, le=100, validation_alias=AliasChoices("autoattack_acc", "AA")
    )
    external: float | None = Field(default=None, ge=0, le=100)
    reported: float | None = Field(default=None, ge=0, le=100)


def import_model_info(folder: Path, out: Path) -> None:
    """Write the tables of a ``model_info`` folder as cards below ``out``, and name them.

    Args:
        folder: ``model_info`` or any folder of it; found by their places, ``<dataset>/<threat>/<id>.json``.
        out: a folder for ``--cards``.

    Raises:
        UsageError: nothing there, or an entry that cannot be read; nothing is written then.
    """
    found = tables(folder)
    for table in found:
        place = out / FOLDERS[PublishedTable] / f"{table['id']}.toml"
        write_text(place, tomli_w.dumps(table))
        click.echo(clean_text(f"{place}: {count(len(table['rows']))} models"))
    click.echo(clean_text(f"on the leaderboard with: cure-bench site RUNS --cards {out}"))


def tables(folder: Path) -> list[dict[str, Any]]:
    """Published tables of a folder, as the content of their cards.

    Raises:
        UsageError: see `import_model_info`.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the model_info folder of a clone of RobustBench")
    # The folder itself may be model_info, or cifar10/Linf alone.
    paths = [path for path in sorted(folder.resolve().rglob("*.json")) if path.parent.name in NORMS]
    places: dict[tuple[str, ThreatModel], list[tuple[str, Entry]]] = defaultdict(list)
    for path in paths:
        entry = _read(path)
        threat = ThreatModel.parse(NORMS[path.parent.name], entry.eps)
        places[entry.dataset, threat].append((path.stem, entry))
    if not places:
        threats = " or ".join(NORMS)
        raise UsageError(f"{folder}: no entry of RobustBench in there, <dataset>/<{threats}>/<id>.json")
    built = [_table(*place, entries) for place, entries in sorted(places.items(), key=str)]
    for content in built:
        PublishedTable.model_validate(content)
    return built


def _read(path: Path) -> Entry:
    try:
        return Entry.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else f"not JSON: {error}"
        raise UsageError(f"{path}: {reason}; mend it or leave it out") from None


def _table(dataset: str, threat: ThreatModel, entries: list[tuple[str, Entry]]) -> dict[str, Any]:
    rows, cells = [], []
    for name, entry in entries:
        row = f"robustbench/{name.lower()}"
        year = f" ({plain(entry.venue)})" if entry.venue not in ("", "N/A") else ""
        extra = {True: "yes", False: "none", None: ""}[entry.additional_data]
        note = "RobustBench flags it as unreliable" if entry.unreliable else ""
        rows.append(
            {"id": row, "name": name + year, "group": plain(entry.architecture), "extra_data": extra,
             "note": note}
        )  # fmt: skip
        for column, (_, key, kind) in COLUMNS.items():
            value = getattr(entry, key)
            if value is not None:
                locator = f"RobustBench, model_info, {name}, {key}"
                cells.append({"row": row, "column": column, "value": value, "kind": kind, "locator": locator})
    used = {cell["column"] for cell in cells}
    words = threat_words(threat)
    norm = next(key for key, value in NORMS.items() if value == threat.norm)
    return {
        "id": re.sub(r"\W+", "_", f"robustbench_{dataset}_{norm}_{format_eps(threat.eps)}".lower()),
        "title": f"RobustBench: {dataset}, {words}",
        "paper": f"RobustBench (Croce et al., arXiv 2010.09670), model_info/{dataset}/{norm}",
        "unit": "%",
        "dataset": dataset,
        "specification": f"AutoAttack (standard), {words}. External: a stronger attack that RobustBench "
        "accepted. Reported: the number of the model's own paper, by an attack of its own choice.",
        "n": IMAGES[dataset],
        "heads": {column: head for column, (head, _, _) in COLUMNS.items() if column in used},
        "threat": {"norm": threat.norm, "eps": format_eps(threat.eps)},
        "rows": rows,
        "cells": cells,
    }


def plain(text: str) -> str:
    """Text of a field that RobustBench writes for its web page: no tags, single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())
