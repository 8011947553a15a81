"""Making a run the baseline: everything is written to a temporary folder first, then renamed into place."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record

#: Folders of the temporary one: what was there, and what replaces it.
OLD, NEW = "old", "new"


def places(records: list[Record], new: Path, baseline: Path) -> dict[Path, Record]:
    """Where each record goes: a run of several models keeps a folder for each.

    Raises:
        UsageError: a record is unreliable, or its place is something that is no baseline.
    """
    for record in records:
        if record.unreliable:
            raise UsageError(f"{record.path}: is flagged unreliable: it cannot be a baseline; mend the model")
    alone = [record.path for record in records] == [new]
    targets = {baseline if alone else baseline / record.manifest.model.id: record for record in records}
    for place, record in targets.items():
        if record.path is not None and place.resolve() == record.path.resolve():
            raise UsageError(f"{place}: is the new run itself; name another place for the baseline")
        if place.exists() and not (place / "manifest.json").is_file() and not _empty(place):
            raise UsageError(f"{place}: exists and is not a run; choose another place for the baseline")
    return targets


def replace(records: dict[Path, Record]) -> None:
    """Put every record in its place, or none of them.

    Args:
        records: by place. Nothing is moved before all of them are on the disk next to their places; each is
            then renamed into place, and whatever goes wrong, Ctrl-C too, puts the old ones back.

    Raises:
        UsageError: a place cannot be written.
    """
    staged: dict[Path, Path] = {}
    try:
        for place, record in records.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            staged[place] = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
            (staged[place] / NEW).mkdir()
            Record(record.manifest, record.samples).save(staged[place] / NEW)
        for place, staging in staged.items():
            if place.exists():
                place.rename(staging / OLD)
            (staging / NEW).rename(place)
    except BaseException as error:
        for place, staging in staged.items():
            _put_back(place, staging)
        if isinstance(error, OSError):
            where = error.filename or next(iter(records))
            raise UsageError(f"{where}: cannot be written: {error.strerror or error}") from None
        raise
    finally:
        for staging in staged.values():
            shutil.rmtree(staging, ignore_errors=True)


def _put_back(place: Path, staging: Path) -> None:
    if not (staging / NEW).exists() and place.exists():
        shutil.rmtree(place)
    if (staging / OLD).exists():
        (staging / OLD).rename(place)


def _empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())
