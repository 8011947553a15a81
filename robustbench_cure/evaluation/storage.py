"""Shards of a run on disk: written one by one, taken over by a resumed run, joined by `merge`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.audit import DRAWS
from robustbench_cure.evaluation.flags import Flag, stored
from robustbench_cure.evaluation.record import (
    ATTACK_FIELDS,
    Cost,
    Manifest,
    Record,
    read_manifest,
    typed,
    write_table,
)
from robustbench_cure.evaluation.verify import Verification
from robustbench_cure.files import write_atomically, write_text
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.protocol.specs import AttackSpec

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


#: Names of the files that hold a run's audit, beside its shards: what was drawn, and the other survivors.
AUDIT, AUDIT_REST = "audit", "audit-rest"


@dataclass
class Shard:
    """Rows of one shard and what they cost."""

    rows: pd.DataFrame
    cost: dict[str, Cost] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    seconds: float = 0.0


def write_shard(out: Path, index: int | str, part: Shard, *, finished: bool = True) -> None:
    """Write one shard; its cost comes last and says that the file is whole.

    Args:
        out: run directory.
        index: number of the shard, or its name: `AUDIT`, `AUDIT_REST`.
        part: its rows; unfinished, they have the columns of those attacks alone that have begun, and the last
            of these may have been given some of its rows only.
        finished: whether all attacks are; what was written of an unfinished one is deleted then.
    """
    stem = _stem(out, index, finished)
    write_table(stem.with_suffix(".parquet"), part.rows)
    text = json.dumps(
        {
            "cost": {key: cost.model_dump() for key, cost in part.cost.items()},
            "flags": [flag.model_dump() for flag in part.flags],
            "seconds": part.seconds,
        },
        indent=2,
    )
    write_text(stem.with_suffix(".json"), text + "\n")
    if finished:
        for kind in (".parquet", ".json"):
            _stem(out, index, finished=False).with_suffix(kind).unlink(missing_ok=True)


def _stem(out: Path, index: int | str, finished: bool) -> Path:
    name = index if isinstance(index, str) else f"{index:04d}"
    return out / "shards" / (name if finished else f"{name}-unfinished")


def read_shards(out: Path, battery: Battery) -> dict[int, Shard]:
    """Finished shards of a run directory by index; damaged or half-written ones are done again."""
    files = [file for file in (out / "shards").glob("*.json") if file.stem.isdecimal()]
    found = {int(file.stem): _read(file, battery) for file in sorted(files)}
    return {index: part for index, part in found.items() if part is not None}


def read_unfinished(out: Path, index: int, battery: Battery) -> Shard | None:
    """What is done of a shard: rows with the columns of the attacks that have begun, which its cost names."""
    return _read(_stem(out, index, finished=False).with_suffix(".json"), battery, finished=False)


def read_audit(
    out: Path, name: str, battery: Battery, ids: Sequence[str], *, finished: bool = True
) -> Shard | None:
    """The audit of a run, or what is done of it; None: there is none of these samples.

    Args:
        out: run directory.
        name: `AUDIT` or `AUDIT_REST`.
        battery: the audit's attacks, see `audit_battery`.
        ids: of the samples that are to be audited.
        finished: whether all attacks must be.
    """
    file = _stem(out, name, finished).with_suffix(".json")
    part = _read(file, battery, finished=finished)
    return part if part is not None and part.rows["sample_id"].tolist() == list(ids) else None


def _read(file: Path, battery: Battery, *, finished: bool = True) -> Shard | None:
    import pandas as pd

    try:
        side = json.loads(file.read_text(encoding="utf-8"))
        cost = {key: Cost.model_validate(value) for key, value in side["cost"].items()}
        if not finished:
            done = tuple(spec for spec in battery.attacks if spec.id in cost)
            battery = battery.model_copy(update={"attacks": done})
        rows = typed(
            pd.read_parquet(file.with_suffix(".parquet")), battery.model_copy(update={"audit": None})
        )
        flags = [Flag.model_validate(value) for value in side["flags"]]
        return Shard(rows, cost, flags, float(side["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def fill_columns(
    columns: dict[str, Any],
    attack: str,
    n: int,
    rows: Tensor,
    candidates: Candidates,
    verification: Verification,
) -> None:
    """Write what an attack did to some rows into its columns ``<attack>.<field>``.

    Args:
        columns: of the shard; those of the attack are made where they are missing, without evidence.
        attack: its id.
        n: rows of the shard.
        rows: those attacked, int64 (B,), on the CPU.
        candidates: of the attack, B rows.
        verification: of the candidates, likewise.
    """
    import numpy as np

    def ints(tensor: Tensor) -> list[int]:
        return [int(v) for v in tensor.cpu().tolist()]

    def reals(tensor: Tensor) -> list[float | None]:
        return [None if v != v else v for v in tensor.cpu().tolist()]

    converged = candidates.converged
    fields: dict[str, tuple[list[Any], Any]] = {
        "attacked": ([True] * len(rows), False),
        "broken": (verification.broken.tolist(), False),
        "step": (ints(candidates.steps), None),
        "margin": (reals(verification.margin), None),
        "pred": (ints(verification.pred), None),
        "linf": (reals(verification.linf), None),
        "l2": (reals(verification.l2), None),
        "forwards": (ints(candidates.forwards), None),
        "backwards": (ints(candidates.backwards), None),
        "converged": ([None] * len(rows) if converged is None else converged.cpu().tolist(), None),
        "violation": (verification.violation, ""),
    }
    for name, (values, empty) in fields.items():
        column = columns.setdefault(f"{attack}.{name}", np.full(n, empty, dtype=object))
        column[rows.numpy()] = values


def save_candidates(
    stem: Path, group: list[AttackSpec], images: dict[str, list[Tensor]], ids: list[str]
) -> None:
    """Write candidates of attacked samples as float32 safetensors, ids in the metadata.

    Args:
        stem: directory and number of the shard.
        group: attacks that ran together.
        images: attack -> its candidates, piece by piece.
        ids: of the samples, in the order of the pieces.
    """
    from safetensors.torch import save

    tensors = {name: torch.cat(pieces).contiguous() for name, pieces in images.items()}
    # Not `save_file`: its errors are no OSErrors, and a full disk is none of its own.
    data = save(tensors, {"sample_ids": json.dumps(ids)})
    write_atomically(_candidates_file(stem, group), lambda file: file.write_bytes(data))


def read_candidates(stem: Path, group: list[AttackSpec], ids: list[str]) -> dict[str, Tensor] | None:
    """Candidates that an interrupted run wrote, of its first samples; None: not those of all of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_candidates_file(stem, group), "pt") as archive:
            written = json.loads(archive.metadata()["sample_ids"])
            if written[: len(ids)] != ids:
                return None
            return {spec.id: archive.get_tensor(spec.id)[: len(ids)] for spec in group}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _candidates_file(stem: Path, group: list[AttackSpec]) -> Path:
    return stem.parent / f"{stem.name}-{group[0].id}.safetensors"


def check_same_run(before: Manifest, now: Manifest, where: Path) -> None:
    """Refuse to mix two runs.

    Raises:
        UsageError: names the first thing that differs.
    """
    files = before.model.weights_sha256, now.model.weights_sha256
    if not before.model.same_weights(now.model) and files[0] != files[1]:
        _refuse(where, "model weights", *files)
    if not before.model.same_as(now.model):
        raise UsageError(
            f"{where}: holds a run of the same weights in another network (code, mean or std); "
            "choose another --out"
        )
    for name, value in now.identity.items():
        if before.identity[name] != value:
            _refuse(where, name, before.identity[name], value)


def _refuse(where: Path, name: str, before: object, now: object) -> NoReturn:
    was, is_now = str(before)[:12], str(now)[:12]
    raise UsageError(f"{where}: holds another run: {name} was {was}, now {is_now}; choose another --out")


def with_audit(
    samples: pd.DataFrame,
    battery: Battery,
    draws: NDArray[np.int64] | None = None,
    parts: Sequence[Shard] = (),
) -> pd.DataFrame:
    """The table of a battery's attacks with the columns of its audit beside them.

    Args:
        samples: one row a sample.
        battery: theirs; without an audit there is nothing to add.
        draws: how often each was drawn, (n,); None: no audit was made.
        parts: the rows of those that were.
    """
    import numpy as np
    import pandas as pd

    if battery.audit is None:
        return samples
    columns: dict[str, Any] = {DRAWS: np.zeros(len(samples), dtype=np.int64) if draws is None else draws}
    for spec in battery.audit.attacks:
        for field_ in ATTACK_FIELDS:
            empty = {"attacked": False, "broken": False, "violation": ""}.get(field_)
            column = np.full(len(samples), empty, dtype=object)
            for part in parts:
                place = samples["rank"].isin(part.rows["rank"])
                column[place.to_numpy(dtype=bool)] = part.rows[f"{spec.id}.{field_}"].to_numpy(dtype=object)
            columns[f"{spec.id}.{field_}"] = column
    return pd.concat([samples, pd.DataFrame(columns, index=samples.index)], axis=1)


def finish(
    manifest: Manifest, parts: list[Shard], samples: pd.DataFrame, complete: bool, out: Path | None
) -> Record:
    """Add up the shards, the audit among them, and their flags, and write the record."""
    for part in parts:
        for key, cost in part.cost.items():
            total = manifest.cost.setdefault(key, Cost())
            total.seconds += cost.seconds
            total.forwards += cost.forwards
            total.backwards += cost.backwards
            total.non_finite += cost.non_finite
            total.searched_again += cost.searched_again
    manifest.wall_seconds = sum(part.seconds for part in parts)
    manifest.status = "complete" if complete else "partial"
    manifest.finished = now()
    manifest.flags = stored([*manifest.flags, *(flag for part in parts for flag in part.flags)])
    record = Record(manifest, typed(samples, manifest.battery), out)
    if out:
        record.save(out)
    return record


def merge(paths: list[Path], out: Path) -> Record:
    """Join the parts of one run that were evaluated with ``shard=(i, k)``.

    Raises:
        UsageError: parts of different runs, missing or doubled shards, or ``out`` already in use.
    """
    import pandas as pd

    first, flags, parts = gather(paths, out)
    samples = pd.concat([part.rows for part in parts], ignore_index=True)
    whole = first.model_copy(
        update={"cost": {}, "flags": flags, "config": first.config.model_copy(update={"shard": ""})}
    )
    for index, part in enumerate(parts):
        write_shard(out, index, part)
    return finish(whole, parts, with_audit(samples, whole.battery), complete=True, out=out)


def gather(paths: list[Path], out: Path) -> tuple[Manifest, list[Flag], list[Shard]]:
    """The manifest of the first part, what preflight raised in any of them, and all shards in order.

    Writes nothing.

    Raises:
        UsageError: as `merge`.
    """
    if not paths:
        raise UsageError("merge needs at least one run directory")
    if (out / "manifest.json").exists():
        raise UsageError(f"{out}: already holds a run; choose another --out")
    manifests = [read_manifest(path) for path in paths]
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        if first.battery.audit and manifest.status == "complete":
            raise UsageError(f"{path}: is a whole run, which has its own audit; there is nothing to join")
        if manifest.config.audit != first.config.audit:
            _refuse(path, "audit", first.config.audit, manifest.config.audit)
    shards: dict[int, Shard] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        check_same_run(first, manifest, path)
        for index, part in read_shards(path, first.battery).items():
            if index in shards:
                raise UsageError(f"{path}: shard {index} is also in another part")
            shards[index] = part
    expected = -(-first.data.n // first.config.shard_size)
    missing = [str(k) for k in range(expected) if k not in shards]
    if missing:
        raise UsageError(
            f"merge: shards {', '.join(missing)} of {expected} are missing in {', '.join(map(str, paths))}; "
            "finish every part with `evaluate --shard I/K` and name them all"
        )
    # What attacks raised comes back with the shards, in their order.
    flags = [flag for part in manifests for flag in part.flags if flag.about.origin == "preflight"]
    return first, flags, [shards[k] for k in range(expected)]


def now() -> str:
    """This moment, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_dirs(run: Path) -> list[Path]:
    """Record directories of a run: itself, or its children.

    Raises:
        UsageError: there are none.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run directory")
    if (run / "manifest.json").is_file():
        return [run]
    found = sorted(path.parent for path in run.glob("*/manifest.json") if not _is_study(path))
    if not found:
        raise UsageError(f"{run}: not a run: neither it nor a folder in it has a manifest.json")
    return found


def _is_study(manifest: Path) -> bool:
    """Whether this is what `curvature`, `masking` and the like left there; anything damaged is not."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "verb" in content


def find_records(runs: tuple[Path, ...]) -> list[Record]:
    """Every finished record of some run directories.

    Raises:
        UsageError: not a run, damaged, unfinished, or only a part.
    """
    records = [Record.load(path) for run in runs for path in record_dirs(run)]
    for record in records:
        if record.manifest.status == "partial":
            raise UsageError(
                f"{record.path}: only part {record.manifest.config.shard} of a run; "
                "join the parts with `cure-bench merge`"
            )
    return records


def merge_runs(parts: tuple[Path, ...], out: Path) -> list[Record]:
    """Join the parts of a run, model by model; see `merge`."""
    by_model: dict[str, list[Path]] = {}
    for part in parts:
        for path in record_dirs(part):
            by_model.setdefault(path.name if path != part else "", []).append(path)
    places = {name: out / name if name else out for name in by_model}
    for name, paths in by_model.items():  # all of them before the first is written
        gather(paths, places[name])
    return [merge(paths, places[name]) for name, paths in by_model.items()]
