"""`cure-bench site`: look, build, write, say where."""

from __future__ import annotations

from pathlib import Path

import click

from robustbench_cure.errors import UsageError
from robustbench_cure.site.build import build, write
from robustbench_cure.site.found import scan
from robustbench_cure.site.readme import renew


def write_site(runs: tuple[Path, ...], out: Path, readme: Path | None, cards: tuple[str, ...]) -> None:
    """Write the site of some runs, and the leaderboard of a Markdown file.

    Raises:
        UsageError: a run is damaged, there is none in what was named, or a place cannot be written.
    """
    found = scan(runs)
    if runs and not found.records:
        raise UsageError(f"{', '.join(map(str, runs))}: no run in there: no manifest.json of `evaluate`")
    site = build(found, cards)
    write(site, out)
    if readme is not None:
        renew(readme, site.boards)
    size = sum(map(len, site.files.values())) / 1e6
    click.echo(f"{_many(site.models, 'model')} on {_many(len(site.boards), 'board')}")
    click.echo(f"site: {out / 'index.html'} ({len(site.files)} files, {size:.1f} MB)")


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
