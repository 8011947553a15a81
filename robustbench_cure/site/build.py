"""Writing the site: a folder that opens from disk and can be served as it is.

index.html, leaderboard.*      every board
models/<id>/index.html         a page a model, with the twins of its tables and its raw records
tables/<id>.html               a page a paper table
studies/<verb>-<k>/            figures and numbers of geometry and masking
site.json                      every file with its SHA-256
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record
from robustbench_cure.files import write_atomically
from robustbench_cure.protocol.cards import ModelCard, PublishedTable
from robustbench_cure.protocol.catalog import catalog
from robustbench_cure.report.export import attack_data, to_csv, to_latex, to_markdown
from robustbench_cure.report.paper import PaperTable, paper_table
from robustbench_cure.report.sheet import twins
from robustbench_cure.site import pages, sheets
from robustbench_cure.site.beside import FIGURES, TABLES, belonging, card_of, panels, study_files
from robustbench_cure.site.found import SITE, Found, StudyFolder
from robustbench_cure.site.standings import Board, boards, by_model
from robustbench_cure.version import __version__

#: Files of a record that can be downloaded.
RAW = ("manifest.json", "samples.parquet")


@dataclass(frozen=True)
class Site:
    """A finished site.

    Attributes:
        boards: the leaderboard.
        models: number of models with a page.
        files: name -> contents.
    """

    boards: tuple[Board, ...]
    models: int
    files: dict[str, bytes]


def build(found: Found, cards: tuple[str, ...] = ()) -> Site:
    """Every file of the site; equal records give equal bytes.

    Args:
        found: see `found.scan`.
        cards: directories with further cards.
    """
    known = catalog(ModelCard, cards)
    published = [one.card for _, one in sorted(catalog(PublishedTable, cards).items())]

    def extra_data(record: Record) -> str:
        card = card_of(record, known)
        return card.extra_data if card else ""

    rows = boards(found.records, found.external, published, extra_data)
    papers = [paper_table([r for r in found.records if comparable(r, table)], table) for table in published]
    folders = [(f"studies/{study.verb}-{k}", study) for k, study in enumerate(found.studies, 1)]
    models = _models(found, rows, known, folders)
    texts = {"index.html": pages.index(rows, papers, models)}
    texts |= twins("leaderboard", [sheets.leaderboard(board) for board in rows])
    for paper in papers:
        texts |= _paper(paper, models)
    files: dict[str, bytes] = {}
    for model in models:
        files |= _model(model, papers)
    for folder, study in folders:
        files |= {f"{folder}/{p.name}": p.read_bytes() for p in study_files(study, FIGURES + TABLES)}
    files |= {name: text.encode("utf-8", "replace") for name, text in texts.items()}
    return Site(tuple(rows), len(models), files)


def comparable(record: Record, table: PublishedTable) -> bool:
    """Whether a record may stand in a printed table: its battery is laid out as it, or its images are those.

    Copies of a data set in files ("folder:cifar10-jpeg") count as the data set; the table says what they are.
    """
    name = record.manifest.data.name.rpartition(":")[2]
    return record.manifest.battery.published == table.id or name.startswith(table.dataset)


def _models(
    found: Found,
    rows: Sequence[Board],
    known: dict[str, Any],
    folders: Sequence[tuple[str, StudyFolder]],
) -> list[pages.Model]:
    taken: set[str] = set()
    models = []
    for records in by_model(found.records):
        model = records[0].manifest.model
        own = belonging(found.studies, model)
        models.append(
            pages.Model(
                _slug(model.id, model.weights_sha256, taken),
                tuple(records),
                card_of(records[0], known),
                tuple((board, row) for board in rows for row in board.rows if row.is_about(model)),
                tuple(panels(found.studies, model)),
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


def _paper(paper: PaperTable, models: Sequence[pages.Model]) -> dict[str, str]:
    stem = f"tables/{paper.table.id}"
    texts = {f"{stem}.html": pages.paper(paper, models)}
    return texts | twins(stem, [sheets.paper(paper)]) | twins(f"{stem}-sources", [sheets.sources(paper)])


def _model(model: pages.Model, papers: Sequence[PaperTable]) -> dict[str, bytes]:
    folder = f"models/{model.slug}"
    files: dict[str, bytes] = {}
    raw = []
    for r, record in enumerate(model.records, 1):
        manifest = record.manifest
        name = f"{manifest.battery.name}, {manifest.data.name}, n = {manifest.data.n:,}"
        parts = [] if record.path is None else [p for n in RAW if (p := record.path / n).is_file()]
        contents = {f"record-{r}/{path.name}": path.read_bytes() for path in parts}
        files |= {f"{folder}/{place}": data for place, data in contents.items()}
        links = [(place, Path(place).name, _size(len(data))) for place, data in contents.items()]
        raw.append({"name": name, "files": links})
    own = [p for p in papers if any(comparable(r, p.table) for r in model.records)]
    page = pages.model(model, own, raw)
    texts = {"index.html": page.html}
    for stem, tables in page.sheets.items():
        texts |= twins(stem, tables)
    texts |= {
        "attacks.csv": to_csv(model.records),
        "attacks.md": to_markdown(model.records),
        "attacks.tex": to_latex(model.records),
        "attacks.json": json.dumps({"schema_version": 1, "rows": attack_data(model.records)}, indent=1)
        + "\n",
    }
    return files | {f"{folder}/{name}": text.encode("utf-8", "replace") for name, text in texts.items()}


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
