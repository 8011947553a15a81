"""Writing the site: a folder that opens from disk and can be served as it is.

index.html, leaderboard.*      every leaderboard
leaderboard-pairs.*            which ranked models are told apart, two by two
models/<id>/index.html         a page a model, with its tables as files
tables/<id>.html               a page a paper table
studies/<verb>-<k>/            figures and numbers of geometry and masking
site.json                      every file with its SHA-256

Of these, the leaderboards and the paper tables can be written alone: they are small, and a diff of them can
be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record
from robustbench_cure.files import write_atomically
from robustbench_cure.protocol.cards import ModelCard, PublishedTable
from robustbench_cure.protocol.catalog import CardFile, catalog
from robustbench_cure.report.paper import PaperTable, paper_table
from robustbench_cure.report.results import attack_table, protocol_tables
from robustbench_cure.report.table import SUFFIXES, exports, to_csv, to_latex, to_markdown
from robustbench_cure.site import pages, tables
from robustbench_cure.site.entries import Leaderboard, by_model, leaderboards
from robustbench_cure.site.runs import (
    FIGURES,
    SITE,
    TABLES,
    Runs,
    StudyFolder,
    card_of,
    masking_sections,
    studies_of,
    study_files,
)
from robustbench_cure.version import __version__

#: Files that a record consists of.
RAW = ("manifest.json", "samples.parquet")
#: Forms of what nobody prints in a paper.
PLAIN = ("csv", "json", "md")


@dataclass(frozen=True)
class Site:
    """A finished site.

    Attributes:
        leaderboards: what it ranks.
        models: number of models.
        files: name -> contents.
    """

    leaderboards: tuple[Leaderboard, ...]
    models: int
    files: dict[str, bytes]


def build(
    runs: Runs, cards: tuple[str, ...] = (), *, tables_only: bool = False, records_url: str = ""
) -> Site:
    """Every file of the site; equal records give equal bytes.

    Args:
        runs: see `runs.scan`.
        cards: directories with further cards.
        tables_only: leave out every page, and keep ``leaderboard.{csv,json,md}``,
            ``leaderboard-pairs.{csv,json,md}`` and the paper tables as ``tables/<id>.{csv,md,tex}``.
        records_url: address of the scanned run directory on the web; pages link to the records there.
            Empty: they say where the records lie, without a link.
    """
    known = catalog(ModelCard, cards)
    published = [one.card for _, one in sorted(catalog(PublishedTable, cards).items())]

    def extra_data(record: Record) -> str:
        card = card_of(record, known)
        return card.extra_data if card else ""

    ranked = leaderboards(runs.records, runs.external, published, extra_data)
    papers = [paper_table([r for r in runs.records if comparable(r, table)], table) for table in published]
    content = [tables.leaderboard_table(leaderboard) for leaderboard in ranked]
    pairs = exports(
        "leaderboard-pairs", [tables.pairs_table(board) for board in ranked if board.pairs], PLAIN
    )
    if tables_only:
        texts = exports("leaderboard", content, PLAIN) | pairs
        for paper in papers:
            texts |= exports(_stem(paper), [tables.paper_comparison(paper)], ("csv", "md", "tex"))
        return Site(tuple(ranked), len(by_model(runs.records)), _encoded(texts))
    folders = [(f"studies/{study.verb}-{k}", study) for k, study in enumerate(runs.studies, 1)]
    models = _models(runs, ranked, known, folders)
    texts = {"index.html": pages.index(ranked, papers, models)} | exports("leaderboard", content) | pairs
    for paper in papers:
        texts |= _paper(paper, models)
    for model in models:
        texts |= _model(model, papers, runs, records_url)
    files = _encoded(texts)
    for folder, study in folders:
        files |= {f"{folder}/{p.name}": p.read_bytes() for p in study_files(study, FIGURES)}
        files |= {f"{folder}/{p.name}": p.read_bytes() for p in study_files(study, TABLES)}
    return Site(tuple(ranked), len(models), files)


def _encoded(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode("utf-8", "replace") for name, text in texts.items()}


def comparable(record: Record, table: PublishedTable) -> bool:
    """Whether a record may stand in a printed table: its battery is laid out as it, or its images are those.

    Copies of a data set in files ("folder:cifar10-jpeg") count as the data set; the table says what they are.
    """
    name = record.manifest.data.name.rpartition(":")[2]
    same = name == table.dataset or name.startswith(f"{table.dataset}-")
    return record.manifest.battery.published == table.id or same


def _models(
    runs: Runs,
    ranked: Sequence[Leaderboard],
    known: Mapping[str, CardFile[ModelCard]],
    folders: Sequence[tuple[str, StudyFolder]],
) -> list[pages.Model]:
    taken: set[str] = set()
    models = []
    for records in by_model(runs.records):
        model = records[0].manifest.model
        own = studies_of(runs.studies, model)
        models.append(
            pages.Model(
                _slug(model.id, model.weights_sha256, taken),
                tuple(records),
                card_of(records[0], known),
                tuple(
                    (leaderboard, row)
                    for leaderboard in ranked
                    for row in leaderboard.rows
                    if row.is_of(records)
                ),
                tuple(masking_sections(runs.studies, model)),
                tuple((folder, study) for folder, study in folders if study in own),
            )
        )
    return models


def _slug(name: str, weights: str, taken: set[str]) -> str:
    """A folder name of letters, digits, ``-`` and ``_``, that no other model has."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)[:60] or "model"
    slug = plain if plain not in taken else f"{plain}-{weights[:8]}"
    while slug in taken:
        slug += "_"
    taken.add(slug)
    return slug


def _stem(paper: PaperTable) -> str:
    return f"tables/{paper.table.id}"


def _paper(paper: PaperTable, models: Sequence[pages.Model]) -> dict[str, str]:
    texts = {f"{_stem(paper)}.html": pages.paper(paper, models)}
    texts |= exports(_stem(paper), [tables.paper_comparison(paper)])
    return texts | exports(f"{_stem(paper)}-sources", [tables.sources(paper)], PLAIN)


def _model(model: pages.Model, papers: Sequence[PaperTable], runs: Runs, records_url: str) -> dict[str, str]:
    own = [p for p in papers if any(comparable(r, p.table) for r in model.records)]
    page = pages.model(model, own, [_raw(record, runs, records_url) for record in model.records])
    attacks, protocols = attack_table(model.records), protocol_tables(model.records)
    texts = {"index.html": page.html}
    for stem, content in page.tables.items():
        texts |= exports(stem, content, PLAIN if stem == "provenance" else SUFFIXES)
    texts |= {
        "attacks.csv": to_csv([attacks]),
        "attacks.md": to_markdown(protocols),
        "attacks.tex": to_latex(protocols),
        "attacks.json": json.dumps({"schema_version": 1, "rows": attacks.data}, indent=1) + "\n",
    }
    return {f"models/{model.slug}/{name}": text for name, text in texts.items()}


def _raw(record: Record, runs: Runs, url: str) -> pages.RawRecord:
    manifest, place = record.manifest, runs.place(record)
    name = f"{manifest.battery.name}, {manifest.data.name}, n = {manifest.data.n:,}"
    parts = [] if record.path is None else [p for n in RAW if (p := record.path / n).is_file()]
    address = f"{url.rstrip('/')}/{quote(place)}".rstrip("/") if url and place is not None else ""
    files = [
        (f"{address}/{path.name}" if address else "", path.name, _size(path.stat().st_size)) for path in parts
    ]
    return pages.RawRecord(name, place or "", tuple(files))


def _size(n: int) -> str:
    return f"{n / 1000:,.0f} kB" if n >= 1000 else f"{n} bytes"


def write(site: Site, out: Path) -> None:
    """Write the site, and take away what an earlier one left there and this one has not.

    Raises:
        UsageError: ``out`` holds other things than a site, or cannot be written.
    """
    before = _before(out)
    for name, data in site.files.items():
        _write(out / name, data)
    for name in before - set(site.files):
        (out / name).unlink(missing_ok=True)
        for folder in (out / name).parents:
            if folder == out or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(site.files.items())}
    text = json.dumps({"version": __version__, "files": digests}, indent=1) + "\n"
    _write(out / SITE, text.encode())


def _before(out: Path) -> set[str]:
    """Files of the site that is there already."""
    file = out / SITE
    if not file.is_file():
        if out.is_dir() and any(path.name not in (".gitkeep", ".gitignore") for path in out.iterdir()):
            raise UsageError(f"{out}: holds other files; choose another --out, or empty the folder")
        return set()
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["files"]
        inside = [name for name in names if (out / name).resolve().is_relative_to(out.resolve())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}; empty the folder") from None
    return set(inside)


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda file: file.write_bytes(data))
