"""RobustBench's claim of a model: ``model_info/<dataset>/<threat>/<id>.json``, from records alone.

Keys and their form are those of RobustBench 1.1 (its README, section "Adding a new model", and the files of
its ``model_info`` folder): accuracies are per cent as text with two decimals. What is not known is left out,
never guessed: ``autoattack_acc`` is for RobustBench to fill in, which runs AutoAttack itself; ``reported`` is
the worst case of the record, and ``external`` what verified images of others left of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import catalog
from robustbench_cure.report.sheet import write_text
from robustbench_cure.report.terminal import clean_text
from robustbench_cure.report.wording import count
from robustbench_cure.site.beside import card_of
from robustbench_cure.site.found import Found, scan
from robustbench_cure.site.standings import Board, Standing, boards
from robustbench_cure.stats import Rate
from robustbench_cure.threat import Norm, format_eps

DATASETS = ("cifar10", "cifar100", "imagenet")
THREATS: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}
#: What a record does not know and a claim has.
BY_HAND = ("link", "name", "authors", "venue")


def claims(found: Found, said: Mapping[str, str], cards: tuple[str, ...] = ()) -> dict[Path, dict[str, Any]]:
    """The claim of every model, by the path RobustBench keeps it under.

    Args:
        found: records and other people's images.
        said: link, name, authors, venue, as far as they are known.
        cards: directories with further cards.

    Raises:
        UsageError: a data set that RobustBench does not have, or two claims for one file.
    """
    known = catalog(ModelCard, cards)
    claimed: dict[Path, dict[str, Any]] = {}
    for board in boards(found.records, found.external):
        if board.data not in DATASETS or board.split != "test":
            raise UsageError(
                f"RobustBench has no data set {board.data!r} ({board.split}); it has {', '.join(DATASETS)}"
            )
        for row in board.rows:
            if row.kind == "external" or not _lowered(board, row):
                name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in row.model_id)
                path = Path("model_info", board.data, THREATS[board.threat.norm], f"{name}.json")
                if path in claimed:
                    raise UsageError(f"{path}: two runs claim it; name one run alone")
                claimed[path] = _claim(board, row, said, card_of(row.records[0], known))
    return claimed


def _lowered(board: Board, row: Standing) -> Standing | None:
    same = (r for r in board.rows if r.kind == "external" and (r.weights, r.n) == (row.weights, row.n))
    return next(same, None)


def _claim(board: Board, row: Standing, said: Mapping[str, str], card: ModelCard | None) -> dict[str, Any]:
    own = next(r for r in board.rows if r.kind == "measured" and (r.weights, r.n) == (row.weights, row.n))
    claim: dict[str, Any] = {key: said[key] for key in BY_HAND if said.get(key)}
    if card is not None and card.extra_data:
        claim["additional_data"] = card.extra_data != "none"
    total = row.records[0].manifest.data.total
    claim |= {
        "number_forward_passes": 1,
        "dataset": board.data,
        "architecture": row.architecture,
        "eps": format_eps(board.threat.eps),
        "clean_acc": _text(row.clean.rate),
        "reported": _text(own.robust.rate),
    }
    if row.kind == "external":
        claim["external"] = _text(row.robust.rate)
    version = row.records[0].manifest.environment.version
    claim["footnote"] = (
        f"reported: {own.how}, {count(row.n)} of {count(total)} test images, robustbench-cure {version}; "
        f"SHA-256 of the weights {row.weights}"
    )
    claim["unreliable"] = row.unreliable
    return claim


def _text(rate: Rate | None) -> str:
    return f"{100 * rate.value:.2f}" if rate is not None and rate.total else ""


def export(run: Path, out: Path, said: Mapping[str, str], cards: tuple[str, ...] = ()) -> None:
    """Write the claims of a run, and say what is missing in them.

    Raises:
        UsageError: no run, or one that RobustBench has no place for.
    """
    found = scan([run])
    if not found.records:
        raise UsageError(f"{run}: no run in there: no manifest.json of `evaluate`")
    for path, claim in claims(found, said, cards).items():
        write_text(out / path, json.dumps(claim, indent=2) + "\n")
        missing = [key for key in (*BY_HAND, "additional_data") if key not in claim]
        words = f"; not known and left out: {', '.join(missing)}" if missing else ""
        click.echo(clean_text(f"{out / path}{words}"))
    click.echo("autoattack_acc is left out: RobustBench runs AutoAttack itself")
