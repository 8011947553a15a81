"""Where cards are found: `--cards DIR`, then the installed package, then a checkout. Never the cwd.

`models/` and `attacks/` are the most common folder names in our users' own projects, so the current
directory is not consulted, and the parent of the package counts only if its `pyproject.toml` is ours.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import Battery, ModelCard, PublishedTable, read_card

T = TypeVar("T", ModelCard, Battery, PublishedTable)

#: Card class -> folder below a root.
FOLDERS: dict[type, str] = {ModelCard: "models", Battery: "attacks", PublishedTable: "reports/published"}


@dataclass(frozen=True)
class CardFile(Generic[T]):
    """A card and the file it was read from (weights lie beside it)."""

    card: T
    path: Path


def roots(extra: tuple[str, ...] = ()) -> list[tuple[str, Path]]:
    """The card roots in order of lookup, each with the reason it is one.

    Args:
        extra: directories given with ``--cards``; ``CURE_BENCH_CARDS`` (os.pathsep-separated) follows.

    Raises:
        UsageError: a given directory does not exist or has no folder of cards, or no root was found at all.
    """
    result: list[tuple[str, Path]] = []
    given = [("--cards", text) for text in extra]
    given += [("CURE_BENCH_CARDS", t) for t in os.environ.get("CURE_BENCH_CARDS", "").split(os.pathsep) if t]
    for reason, text in given:
        path = Path(text).expanduser()
        if not path.is_dir():
            raise UsageError(f"{reason}: no such directory: {text}")
        if not any((path / folder).is_dir() for folder in FOLDERS.values()):
            raise UsageError(f"{reason}: no cards in {text}: they lie in its {', '.join(FOLDERS.values())}")
        if not any(path.samefile(other) for _, other in result):
            result.append((reason, path))
    package = Path(__file__).parents[1]
    packaged, checkout = package / "_cards", package.parent
    if packaged.is_dir():
        result.append(("installed package", packaged))
    elif is_our_checkout(checkout):
        result.append(("checkout", checkout))
    if not result:
        raise UsageError(f"no cards found: tried {packaged} and {checkout}; reinstall, or use --cards DIR")
    return result


def is_our_checkout(path: Path) -> bool:
    """Whether this directory is a checkout of this project."""
    try:
        project = tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(project.get("project", {}).get("name") == "robustbench-cure")


@cache
def catalog(kind: type[T], extra: tuple[str, ...] = ()) -> dict[str, CardFile[T]]:
    """Every card of one kind by id.

    Raises:
        UsageError: a card is malformed, or an id exists twice.
    """
    found: dict[str, CardFile[T]] = {}
    for _, root in roots(extra):
        for path in sorted((root / FOLDERS[kind]).rglob("*.toml")):
            card = read_card(kind, path)
            if card.id in found:
                raise UsageError(f"{path}: id: {card.id!r} is already defined in {found[card.id].path}")
            found[card.id] = CardFile(card, path)
    return found


def find(kind: type[T], name: str, extra: tuple[str, ...] = ()) -> CardFile[T]:
    """One card by id.

    Raises:
        UsageError: unknown id, with the nearest known one.
    """
    known = catalog(kind, extra)
    if name in known:
        return known[name]
    what = {ModelCard: "model", Battery: "battery", PublishedTable: "published table"}[kind]
    plural = {"battery": "batteries", "model": "models"}.get(what)
    hint = f"; see `cure-bench list {plural}`" if plural else ""
    raise UsageError(f"unknown {what} {name!r}{did_you_mean(name, known)}{hint}")


def load_battery(name: str, *, cards: tuple[str, ...] = ()) -> Battery:
    """The battery with this id.

    Args:
        name: see ``cure-bench list batteries``.
        cards: directories with further cards.

    Raises:
        UsageError: unknown id.
    """
    return find(Battery, name, cards).card


#: Batteries by whose numbers models are ranked: the reference protocol, and AutoAttack in full.
RANKING = {"reference": "reference", "reference_l2": "reference"}
RANKING |= {"autoattack": "autoattack", "autoattack_l2": "autoattack"}


@cache
def ranking_protocol(battery: Battery) -> str:
    """The protocol of `RANKING` that a battery is by its content, whatever it calls itself.

    Args:
        battery: of a record.

    Returns:
        ``reference`` or ``autoattack``, at any radius; empty: it is neither of them.
    """
    for name, protocol in RANKING.items():
        ours = catalog(Battery)[name].card
        if battery.threat.norm != ours.threat.norm or not battery.threat.eps:
            continue
        if battery.digest in (ours.digest, ours.at(battery.threat.text).digest):
            return protocol
    return ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def cache_dir() -> Path:
    """Where downloaded weights and data go: ``CURE_BENCH_HOME`` or the user's cache directory."""
    home = os.environ.get("CURE_BENCH_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "cure-bench"
