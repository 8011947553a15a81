"""RobustBench's ``model_info``: export from records, and import as published rows.

**Export** writes the claim of a model, ``model_info/<dataset>/<threat>/<id>.json``. Keys and their form are
those of RobustBench 1.1 (its README, section "Adding a new model", and the files of its ``model_info``
folder): accuracies are per cent as text with two decimals. What is not known is left out, never guessed:
``autoattack_acc`` is for RobustBench to fill in, which runs AutoAttack itself; ``reported`` is the worst case
of the record, and ``external`` what verified images of others left of it.

**Import** reads the ``model_info`` of a clone. Each data set, norm and exact radius becomes one published
table: an entry at 0.031 does not stand among those at 8/255. The leaderboard shows the lowest of
AutoAttack's, the external and the reported number, and beside it each of them by its name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_text
from robustbench_cure.protocol.cards import ModelCard, PublishedTable
from robustbench_cure.protocol.catalog import FOLDERS, catalog
from robustbench_cure.protocol.schema import Fractional, describe
from robustbench_cure.report.table import clean_text
from robustbench_cure.report.wording import count, threat_words
from robustbench_cure.site.entries import Entry, best_known
from robustbench_cure.site.runs import Runs, card_of, scan
from robustbench_cure.stats import Rate
from robustbench_cure.threat import Norm, ThreatModel, format_eps

DATASETS = ("cifar10", "cifar100", "imagenet")
THREATS: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}
#: RobustBench's name of a threat model -> ours.
NORM_OF: dict[str, Norm] = {theirs: ours for ours, theirs in THREATS.items()}
#: Test images behind RobustBench's own numbers.
IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
#: Column -> head, key of the entry, and whether RobustBench measured it or took it over.
COLUMNS: dict[str, tuple[str, str, Literal["measured", "quoted"]]] = {
    "clean": ("Clean", "clean_acc", "measured"),
    "autoattack": ("AutoAttack", "autoattack_acc", "measured"),
    "external": ("External", "external", "measured"),
    "reported": ("Reported", "reported", "quoted"),
}
#: What a record does not know and a claim has.
BY_HAND = ("link", "name", "authors", "venue")


# --- export -----------------------------------------------------------------------------------------------


def claims(
    runs: Runs, declared: Mapping[str, str], cards: tuple[str, ...] = ()
) -> dict[Path, dict[str, Any]]:
    """The claim of every model, by the path RobustBench keeps it under.

    Args:
        runs: records and other people's images.
        declared: link, name, authors, venue, as far as they are known.
        cards: directories with further cards.

    Raises:
        UsageError: a data set that RobustBench does not have, or two claims for one file.
    """
    known = catalog(ModelCard, cards)
    claimed: dict[Path, dict[str, Any]] = {}
    for threat, rows in best_known(runs.records, runs.external):
        record = rows[0].records[0]
        data, model = record.manifest.data, rows[0].model_id
        if data.name not in DATASETS or data.split != "test":
            place = f"{data.name!r} ({data.split})"
            raise UsageError(f"RobustBench has no data set {place}; it has {', '.join(DATASETS)}")
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in model)
        path = Path("model_info", data.name, THREATS[threat.norm], f"{name}.json")
        if path in claimed:
            raise UsageError(f"{path}: two runs claim it; name one run alone")
        claimed[path] = _claim(threat, rows, declared, card_of(record, known))
    return claimed


def _claim(
    threat: ThreatModel, rows: Sequence[Entry], declared: Mapping[str, str], card: ModelCard | None
) -> dict[str, Any]:
    """The claim of one model, from its row of `best_known` and, before it, that of others' images."""
    row, own = rows[0], rows[-1]
    claim: dict[str, Any] = {key: declared[key] for key in BY_HAND if declared.get(key)}
    if card is not None and card.extra_data:
        claim["additional_data"] = card.extra_data != "none"
    data = row.records[0].manifest.data
    claim |= {
        "number_forward_passes": 1,
        "dataset": data.name,
        "architecture": row.architecture,
        "eps": format_eps(threat.eps),
        "clean_acc": _text(row.clean.rate),
        "reported": _text(own.robust.rate),
    }
    if row.kind == "external":
        claim["external"] = _text(row.robust.rate)
    version = row.records[0].manifest.environment.version
    claim["footnote"] = (
        f"reported: {own.how}, {count(row.n)} of {count(data.total)} test images, "
        f"robustbench-cure {version}; SHA-256 of the weights {row.weights}"
    )
    for audit in (record.audit for record in row.records):
        if audit is not None:
            claim["footnote"] += f"; {audit.words}"
    claim["unreliable"] = row.unreliable
    return claim


def _text(rate: Rate | None) -> str:
    return f"{100 * rate.value:.2f}" if rate is not None and rate.total else ""


def export_model_info(
    run: Path, out: Path, declared: Mapping[str, str], cards: tuple[str, ...] = ()
) -> list[str]:
    """Write the claims of a run; returns a line for each file, with what is missing in it.

    Raises:
        UsageError: no run, or one that RobustBench has no place for.
    """
    runs = scan([run])
    if not runs.records:
        raise UsageError(f"{run}: no run in there: no manifest.json of `evaluate`")
    lines = []
    for path, claim in claims(runs, declared, cards).items():
        write_text(out / path, json.dumps(claim, indent=2) + "\n")
        missing = [key for key in (*BY_HAND, "additional_data") if key not in claim]
        words = f"; not known and left out: {', '.join(missing)}" if missing else ""
        lines.append(clean_text(f"{out / path}{words}"))
    return [*lines, "autoattack_acc is left out: RobustBench runs AutoAttack itself"]


# --- import -----------------------------------------------------------------------------------------------


class ModelInfoEntry(BaseModel):
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


def import_model_info(folder: Path, out: Path) -> list[str]:
    """Write the tables of a ``model_info`` folder as cards below ``out``; returns a line for each of them.

    Args:
        folder: ``model_info`` or any folder of it; entries are those at ``<dataset>/<threat>/<id>.json``.
        out: a folder for ``--cards``.

    Raises:
        UsageError: nothing there, or an entry that cannot be read; nothing is written then.
    """
    lines = []
    for table in tables(folder):
        place = out / FOLDERS[PublishedTable] / f"{table['id']}.toml"
        write_text(place, tomli_w.dumps(table))
        lines.append(clean_text(f"{place}: {count(len(table['rows']))} models"))
    return [*lines, clean_text(f"on the leaderboard with: cure-bench site RUNS --cards {out}")]


def tables(folder: Path) -> list[dict[str, Any]]:
    """Published tables of a folder, as the content of their cards.

    Raises:
        UsageError: see `import_model_info`.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the model_info folder of a clone of RobustBench")
    # The folder itself may be model_info, or cifar10/Linf alone.
    paths = [path for path in sorted(folder.resolve().rglob("*.json")) if path.parent.name in NORM_OF]
    places: dict[tuple[str, ThreatModel], list[tuple[str, ModelInfoEntry]]] = defaultdict(list)
    for path in paths:
        entry = _read(path)
        threat = ThreatModel.parse(NORM_OF[path.parent.name], entry.eps)
        places[entry.dataset, threat].append((path.stem, entry))
    if not places:
        threats = " or ".join(NORM_OF)
        raise UsageError(f"{folder}: no entry of RobustBench in there, <dataset>/<{threats}>/<id>.json")
    built = [_table(*place, entries) for place, entries in sorted(places.items(), key=str)]
    for content in built:
        PublishedTable.model_validate(content)
    return built


def _read(path: Path) -> ModelInfoEntry:
    try:
        return ModelInfoEntry.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else f"not JSON: {error}"
        raise UsageError(f"{path}: {reason}; mend it or leave it out") from None


def _table(dataset: str, threat: ThreatModel, entries: list[tuple[str, ModelInfoEntry]]) -> dict[str, Any]:
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
    norm = next(key for key, value in NORM_OF.items() if value == threat.norm)
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
