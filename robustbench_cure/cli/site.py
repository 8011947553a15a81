"""Verbs that publish: `site`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path

import click

from robustbench_cure.cli.options import CARDS, PATH
from robustbench_cure.errors import UsageError


@click.command()
@click.argument("runs", nargs=-1, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder of the site.")
@click.option("--readme", type=PATH, help="Renew the leaderboard in this Markdown file.")
@CARDS
def site(runs: tuple[Path, ...], out: Path, readme: Path | None, cards: tuple[str, ...]) -> None:
    """Write a static site: leaderboard, models, paper tables.

    RUNS are run directories, or folders of them at any depth; what `masking`, `curvature` and the other
    studies left there is shown with the models it is about. Without RUNS: the published tables alone.
    """
    from robustbench_cure.site.build import build, write
    from robustbench_cure.site.found import scan
    from robustbench_cure.site.readme import renew

    found = scan(runs)
    if runs and not found.records:
        raise UsageError(f"{', '.join(map(str, runs))}: no run in there: no manifest.json of `evaluate`")
    content = build(found, cards)
    write(content, out)
    if readme is not None:
        renew(readme, content.boards)
    size = sum(map(len, content.files.values())) / 1e6
    click.echo(f"{_many(content.models, 'model')} on {_many(len(content.boards), 'board')}")
    click.echo(f"site: {out / 'index.html'} ({len(content.files)} files, {size:.1f} MB)")


@click.command()
@click.option(
    "--robustbench",
    "run",
    required=True,
    type=PATH,
    help="Run to write RobustBench's model_info of.",
)
@click.option("--out", type=PATH, default=Path(), help="Folder of model_info/; default: here.")
@click.option("--link", default="", help="Of the paper.")
@click.option("--name", default="", help="Title of the paper.")
@click.option("--authors", default="", help="Separated by commas.")
@click.option("--venue", default="", help='As "CVPR 2019".')
@CARDS
def export(run: Path, out: Path, cards: tuple[str, ...], **said: str) -> None:
    """Write the records of a run in the form of other benchmarks."""
    from robustbench_cure.site.model_info import export as write

    write(run, out, said, cards)


@click.command("import")
@click.option(
    "--robustbench",
    "folder",
    required=True,
    type=PATH,
    help="model_info folder of a clone of RobustBench.",
)
@click.option("--out", required=True, type=PATH, help="Folder of cards, for --cards of `site`.")
def import_numbers(folder: Path, out: Path) -> None:
    """Read the numbers of other benchmarks as published rows."""
    from robustbench_cure.site.published_models import import_model_info

    import_model_info(folder, out)


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
