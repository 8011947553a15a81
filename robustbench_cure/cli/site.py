"""Verbs that publish: `site`, `export`, `import`."""

from __future__ import annotations

from pathlib import Path

import click

from robustbench_cure.cli.options import CARDS, PATH, out
from robustbench_cure.errors import UsageError


@click.command()
@click.argument("runs", nargs=-1, type=PATH)
@out("Folder of the site.", required=True)
@click.option("--readme", type=PATH, help="Renew the leaderboard in this Markdown file.")
@click.option("--tables-only", is_flag=True, help="No pages: leaderboards and paper tables alone.")
@click.option(
    "--records-url", default="", metavar="URL", help="Where RUNS lies on the web, for links to the records."
)
@CARDS
def site(
    runs: tuple[Path, ...],
    out: Path,
    readme: Path | None,
    tables_only: bool,
    records_url: str,
    cards: tuple[str, ...],
) -> None:
    """Write a static site: leaderboard, models, paper tables.

    RUNS are run directories, or folders of them at any depth; what `masking`, `curvature` and the other
    studies left there is shown with the models it is about. Without RUNS: the published tables alone.
    """
    from robustbench_cure.site.build import build, write
    from robustbench_cure.site.runs import scan
    from robustbench_cure.site.tables import renew

    if records_url and len(runs) != 1:
        raise UsageError("--records-url is the address of one folder of RUNS: name that alone")
    content = scan(runs)
    if runs and not content.records:
        raise UsageError(f"{', '.join(map(str, runs))}: no run in there: no manifest.json of `evaluate`")
    built = build(content, cards, tables_only=tables_only, records_url=records_url)
    write(built, out)
    if readme is not None:
        renew(readme, built.leaderboards)
    size = sum(map(len, built.files.values())) / 1e6
    click.echo(f"{_many(built.models, 'model')} on {_many(len(built.leaderboards), 'leaderboard')}")
    what = f"tables: {out}" if tables_only else f"site: {out / 'index.html'}"
    click.echo(f"{what} ({len(built.files)} files, {size:.1f} MB)")


@click.command()
@click.option(
    "--robustbench",
    "run",
    required=True,
    type=PATH,
    help="Run to write RobustBench's model_info of.",
)
@out("Folder of model_info/; default: here.", default=Path())
@click.option("--link", default="", help="Address of the paper.")
@click.option("--name", default="", help="Title of the paper.")
@click.option("--authors", default="", help="Authors, separated by commas.")
@click.option("--venue", default="", help='Where it appeared, as "CVPR 2019".')
@CARDS
def export(
    run: Path, out: Path, link: str, name: str, authors: str, venue: str, cards: tuple[str, ...]
) -> None:
    """Write the records of a run in the form of other benchmarks."""
    from robustbench_cure.site.robustbench import export_model_info

    declared = {"link": link, "name": name, "authors": authors, "venue": venue}
    for line in export_model_info(run, out, declared, cards):
        click.echo(line)


@click.command("import")
@click.option(
    "--robustbench",
    "folder",
    required=True,
    type=PATH,
    help="model_info folder of a clone of RobustBench.",
)
@out("Folder of cards, for --cards of `site`.", required=True)
def import_numbers(folder: Path, out: Path) -> None:
    """Read the numbers of other benchmarks as published rows."""
    from robustbench_cure.site.robustbench import import_model_info

    for line in import_model_info(folder, out):
        click.echo(line)


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
