"""Verbs `list`, `validate` and `where`: what can be named, whether it is well-formed, where it is looked for.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, get_args

import click

from robustbench_cure.cli.options import CARDS, PATH
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import Battery, ModelCard, PublishedTable, read_card
from robustbench_cure.protocol.catalog import CardFile, cache_dir, catalog, roots
from robustbench_cure.protocol.specs import AttackSpec
from robustbench_cure.report.table import Column, Table, to_text
from robustbench_cure.version import __version__

T = TypeVar("T", ModelCard, Battery)

#: Data sets by name; `datasets.DATASETS` loads them.
DATASET_SUMMARIES = {
    "digits": "handwritten digits of scikit-learn, 8x8 grey, 500 test images; embedded",
    "cifar10": "CIFAR-10 through torchvision, 32x32 colour, 10,000 test images",
    "svhn": "SVHN format 2 through torchvision, 32x32 colour, 26,032 test images",
    "folder": "your image files: DIR/test/<class>/*",
    "npz": "your arrays: x, y (or x_test, y_test), uint8 or float32 in [0, 1]",
}


@click.command("list")
@click.argument("what", type=click.Choice(["models", "batteries", "attacks", "datasets"]))
@CARDS
def list_(what: str, cards: tuple[str, ...]) -> None:
    """Show what can be named."""
    click.echo(listing(what, cards))


@click.command()
@click.argument("files", nargs=-1, type=PATH)
@CARDS
def validate(files: tuple[Path, ...], cards: tuple[str, ...]) -> None:
    """Check FILES, or every card that can be found, and what they refer to."""
    click.echo(checked(files, cards))


@click.command()
@CARDS
def where(cards: tuple[str, ...]) -> None:
    """Say where cards, weights and data are looked for."""
    click.echo(places(cards))


def listing(what: str, cards: tuple[str, ...] = ()) -> str:
    """A plain table of models, batteries, attacks or datasets."""
    if what == "models":
        rows = [(c.id, str(c.dataset), c.battery, _weights(c)) for c in _cards(ModelCard, cards)]
        return _table(("model", "dataset", "battery", "weights"), rows)
    if what == "batteries":
        batteries = _cards(Battery, cards)
        protocols = [
            (b.id, str(b.version), f"{b.threat.norm} {b.threat.text}", b.dataset or "any", b.name)
            for b in batteries
        ]
        return _table(("battery", "version", "threat", "dataset", "name"), protocols)
    if what == "attacks":
        kinds = [get_args(member)[0] for member in get_args(get_args(AttackSpec)[0])]
        return _table(
            ("attack", "what it does"), [(_kind(k), (k.__doc__ or "").split("\n")[0]) for k in kinds]
        )
    return _table(("dataset", "what it is"), list(DATASET_SUMMARIES.items()))


def checked(files: tuple[Path, ...] = (), cards: tuple[str, ...] = ()) -> str:
    """Parse cards and check what they refer to.

    Args:
        files: these files alone; empty: every card of every root.
        cards: further roots.

    Raises:
        UsageError: the first thing wrong, as ``file: field: what``.
    """
    if files:
        for file in files:
            _read(file)
        return f"{len(files)} card{'s' if len(files) > 1 else ''} valid"
    models, batteries = catalog(ModelCard, cards), catalog(Battery, cards)
    tables = catalog(PublishedTable, cards)
    for model in models.values():
        _check_model(model, models, batteries, tables)
    for battery in batteries.values():
        if battery.card.published and battery.card.published not in tables:
            raise UsageError(f"{battery.path}: published: no table {battery.card.published!r}")
    return f"{len(models)} models, {len(batteries)} batteries, {len(tables)} published tables: all valid"


def places(cards: tuple[str, ...] = ()) -> str:
    """Card roots in order of lookup, the cache, and the version."""
    lines = [("version", __version__), ("code", str(Path(__file__).parents[1]))]
    lines += [(f"cards ({reason})", str(path)) for reason, path in roots(cards)]
    lines += [("cache", str(cache_dir()))]
    return _table((), lines)


def _check_model(
    model: CardFile[ModelCard],
    models: dict[str, CardFile[ModelCard]],
    batteries: dict[str, CardFile[Battery]],
    tables: dict[str, CardFile[PublishedTable]],
) -> None:
    card, path = model.card, model.path
    if card.battery not in batteries:
        raise UsageError(f"{path}: battery: no battery {card.battery!r}")
    if card.training.start and card.training.start not in models:
        raise UsageError(f"{path}: training.start: no model {card.training.start!r}")
    if card.published_row and not any(
        row.id == card.published_row for table in tables.values() for row in table.card.rows
    ):
        raise UsageError(f"{path}: published_row: no published table has a row {card.published_row!r}")
    if card.weights and card.weights.file:
        file = path.parent / card.weights.file
        if not file.is_file():
            raise UsageError(f"{path}: weights.file: {card.weights.file} is not beside the card")
        if hashlib.sha256(file.read_bytes()).hexdigest() != card.weights.sha256:
            raise UsageError(f"{path}: weights.sha256: does not match {card.weights.file}")


def _read(file: Path) -> None:
    """Parse a card as what its keys say it is."""
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8")).keys()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    if "attacks" in keys:
        read_card(Battery, file)
    elif "cells" in keys:
        read_card(PublishedTable, file)
    else:
        read_card(ModelCard, file)


def _cards(kind: type[T], cards: tuple[str, ...]) -> list[T]:
    return [file.card for _, file in sorted(catalog(kind, cards).items())]


def _weights(card: ModelCard) -> str:
    if card.weights is None:
        return "none yet"
    return "embedded" if card.weights.file else "download"


def _kind(spec: type) -> str:
    named = get_args(spec.model_fields["kind"].annotation)  # type: ignore[attr-defined]
    return str(named[0]) if named else "library:Name"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Aligned text; names and sentences of the last column are wrapped, paths (without a head) are not."""
    rows = tuple(rows)
    names = head or ("",) * len(rows[0])
    heads = (
        *(Column(name, "left", "code") for name in names[:-1]),
        Column(names[-1], "left", "text" if head else "code"),
    )
    return to_text(Table("", "", heads, rows))
