"""The record of one evaluation: a per-sample table and a manifest. Everything printed is derived from it.

On disk a record is a directory:

    manifest.json       which model, under what battery, on which data, with which code; flags; status
    samples.parquet     one row a sample, written once all shards are there
    shards/0000.parquet the same rows as they were finished, and 0000.json with their cost

Columns of the table: ``sample_id, rank, image_sha256, label, clean_pred, clean_margin`` (rank: position
in the seeded order that subsets are prefixes of), and for every attack ``<attack>.<field>`` with the
fields of `ATTACK_FIELDS`. Where the battery has an audit, ``audit.draws`` says how often it drew the sample,
and its attacks have columns, too. Counts are derived from the table, rates from counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.audit import DRAWS, AuditResult, result
from robustbench_cure.evaluation.flags import Flag, derived_flags, stored
from robustbench_cure.files import write_atomically, write_text
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.protocol.identity import DataInfo, ModelInfo, Section
from robustbench_cure.protocol.schema import describe
from robustbench_cure.protocol.specs import AttackSpec
from robustbench_cure.stats import Rate

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1

#: Field -> pandas dtype of the columns ``<attack>.<field>``. Rows not attacked (clean errors, rows
#: beyond the attack's limit) have no evidence: broken False, attacked False, the rest missing.
ATTACK_FIELDS: dict[str, str] = {
    "attacked": "bool",  # was this sample given to the attack?
    "broken": "bool",  # verified: misclassified, inside ball and box, finite
    "step": "Int32",  # updates before the candidate was reached
    "margin": "Float32",  # reference margin z_y - max z_j at the candidate; negative = misclassified
    "pred": "Int32",  # reference prediction at the candidate; -1: its logits are not finite
    "linf": "Float32",  # distance from the image, units of x
    "l2": "Float32",
    "forwards": "Int64",  # images passed forward for this sample
    "backwards": "Int64",  # input gradients computed for this sample
    "converged": "boolean",  # the attack's own stopping criterion; missing where it has none
    "violation": "string",  # why the candidate was not admitted; empty if it was
}


class RunConfig(Section):
    """Settings that decide the numbers, and, under `batch_size`, one that moves only their rounding."""

    seed: int
    subset_seed: int = 0  # of older manifests; no run draws a subset
    device: str
    precision: Literal["fp32", "bf16"]
    shard_size: int
    batch_size: int
    shard: str = ""
    allow_unreliable: bool = False
    #: Survivors that the battery's audit draws; 0: all of them; None: the battery has no audit.
    audit: int | None = None
    #: Whether the survivors that were not drawn were audited, too, afterwards.
    audit_rest: bool = False


class Environment(Section):
    """Code, libraries and machine that a record was made with."""

    version: str
    python: str
    torch: str
    device_name: str
    threads: int
    git_commit: str = ""
    git_dirty: bool = False
    command: str = ""
    #: Input gradients a second of the search form alone, in full batches of these images; 0: not measured.
    gradient_rate: float = 0.0
    #: Libraries whose attacks took part, with their versions.
    peers: list[str] = Field(default_factory=list)


class Cost(Section):
    """Seconds and passes of one attack, or of the clean pass ("clean"), summed over shards."""

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    #: Input gradients with NaN or infinite entries, out of ``backwards``.
    non_finite: int = 0
    #: Rows searched in float32 because bfloat16 sees some of them otherwise.
    searched_again: int = 0


class Manifest(Section):
    """Everything about a run but the samples."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "complete", "partial"] = "running"
    started: str = ""
    finished: str = ""
    model: ModelInfo
    battery: Battery
    battery_digest: str
    data: DataInfo
    config: RunConfig
    environment: Environment
    #: Raised by preflight and by attacks; the record adds what follows from its table.
    flags: list[Flag] = Field(default_factory=list)
    cost: dict[str, Cost] = Field(default_factory=dict)
    wall_seconds: float = 0.0

    @field_validator("flags")
    @classmethod
    def _stored(cls, flags: list[Flag]) -> list[Flag]:
        return stored(flags)

    @property
    def passes(self) -> int:
        """Images passed forward plus input gradients, of the clean pass and all attacks together."""
        return sum(cost.forwards + cost.backwards for cost in self.cost.values())

    @property
    def seconds(self) -> float:
        """Seconds of the clean pass and all attacks together."""
        return sum(cost.seconds for cost in self.cost.values())

    @property
    def gradient_share(self) -> float | None:
        """Passes a second as a share of those of bare gradients, two passes each; None: not measured.

        Passes forward alone take less than half of a gradient, so that it may exceed 1.
        """
        rate = self.environment.gradient_rate
        return self.passes / 2 / rate / self.seconds if rate and self.seconds else None

    @property
    def identity(self) -> dict[str, object]:
        """What must agree for two shards to belong to one run, beside the weights."""
        # An audit may be enlarged when the search is done.
        config = self.config.model_dump(exclude={"batch_size", "device", "shard", "audit", "audit_rest"})
        return {
            "model": self.model.id,
            "battery": self.battery_digest,
            "data": self.data.digest,
            "version": self.environment.version,
            **config,
        }


class Record:
    """One model, evaluated under one battery on one data set.

    Attributes:
        manifest: see `Manifest`.
        samples: the per-sample table, see the module.
        flags: those of the manifest, and those that follow from the table and it.
        path: directory it lives in, or None.
    """

    def __init__(self, manifest: Manifest, samples: pd.DataFrame, path: Path | None = None) -> None:
        self.manifest = manifest
        self.samples = samples
        self.path = path
        self.flags: list[Flag] = [*stored(manifest.flags), *derived_flags(self)]

    def __repr__(self) -> str:
        worst, clean = self.worst_case_accuracy, self.clean_accuracy
        flags = ", ".join(dict.fromkeys(flag.kind for flag in self.flags)) or "none"
        return (
            f"<Record {self.manifest.model.id} under {self.manifest.battery.id}: worst case "
            f"{100 * worst.value:.1f} %, clean {100 * clean.value:.1f} %, n = {clean.total}, flags: {flags}>"
        )

    # --- derived numbers ------------------------------------------------------------------------------

    @property
    def attacks(self) -> tuple[AttackSpec, ...]:
        """The attacks of the battery, in order, without those of its audit."""
        return self.manifest.battery.attacks

    @property
    def every_attack(self) -> tuple[AttackSpec, ...]:
        """The attacks of the battery and of its audit."""
        return self.manifest.battery.every_attack

    @property
    def audit(self) -> AuditResult | None:
        """What the battery's audit found; None: it has none."""
        return result(self.samples, self.manifest.battery, self.robust(self.attacks))

    @property
    def n(self) -> int:
        """Number of samples: the denominator of every accuracy."""
        return len(self.samples)

    @property
    def clean_correct(self) -> pd.Series:
        """Which samples are classified correctly without an attack; bool."""
        return self.samples["clean_pred"] == self.samples["label"]

    @property
    def clean_accuracy(self) -> Rate:
        """Correct without an attack, out of all samples."""
        return Rate(int(self.clean_correct.sum()), self.n)

    def covered(self, attack: str) -> pd.Series:
        """Samples that the attack covers: all, the first `limit`, or those that the audit drew; bool."""
        limit = next((spec.limit for spec in self.attacks if spec.id == attack), None)
        if limit is None:
            return self.samples[DRAWS] > 0
        rank = self.samples["rank"]
        return rank < limit if limit else rank >= 0

    def robust(self, attacks: Iterable[AttackSpec]) -> pd.Series:
        """Samples classified correctly that none of these attacks broke; bool."""
        robust = self.clean_correct.copy()
        for spec in attacks:
            robust &= ~self.samples[f"{spec.id}.broken"]
        return robust

    def robust_under(self, attack: str) -> pd.Series:
        """Samples classified correctly that the attack did not break; bool.

        In a cascade it was given only what the attacks before it left robust: theirs count, too.

        Raises:
            ValueError: no attack of the battery, those of its audit left out.
        """
        place = [spec.id for spec in self.attacks].index(attack)
        return self.robust(self.attacks[0 if self.manifest.battery.cascade else place : place + 1])

    def robust_accuracy(self, attack: str) -> Rate:
        """Share of all samples the attack covers that are robust under it, see `robust_under`."""
        covered = self.covered(attack)
        return Rate(int((self.robust_under(attack) & covered).sum()), int(covered.sum()))

    def success_rate(self, attack: str) -> Rate:
        """Broken, out of the clean-correct samples the attack was given."""
        attacked = self.samples[f"{attack}.attacked"]
        return Rate(int(self.samples[f"{attack}.broken"].sum()), int(attacked.sum()))

    @property
    def worst_case(self) -> pd.Series:
        """Samples classified correctly that no attack broke, none of the audit either; bool."""
        return self.robust(self.every_attack)

    @property
    def worst_case_accuracy(self) -> Rate:
        """Correct and broken by no attack, out of all samples."""
        return Rate(int(self.worst_case.sum()), self.n)

    @property
    def unreliable(self) -> bool:
        """Whether a flag says that these numbers cannot be compared."""
        return any(flag.about.severity == "unreliable" for flag in self.flags)

    # --- files ------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write table and manifest, each atomically, the manifest last."""
        path.mkdir(parents=True, exist_ok=True)
        write_table(path / "samples.parquet", self.samples)
        write_manifest(path, self.manifest)
        self.path = path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a finished record; flags that follow from its table are made anew, see `derived_flags`.

        Raises:
            UsageError: not a record, unfinished, damaged, or of another schema.
        """
        import pandas as pd

        manifest = read_manifest(path)
        if manifest.status == "running":
            raise UsageError(f"{path}: this run is not finished; continue it with --resume")
        table = path / "samples.parquet"
        try:
            samples = pd.read_parquet(table, dtype_backend="numpy_nullable")
            samples = typed(samples, manifest.battery)
        except FileNotFoundError:
            raise UsageError(f"{table}: no such file; evaluate again with --resume") from None
        except UsageError as error:
            raise UsageError(f"{table}: {error}; evaluate again with --resume") from None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{table}: cannot be read: {error}; evaluate again with --resume") from None
        if manifest.status == "complete" and len(samples) != manifest.data.n:
            raise UsageError(
                f"{table}: has {len(samples)} rows, the manifest says {manifest.data.n}; "
                "evaluate again with --resume"
            )
        return cls(manifest, samples, path)


def typed(samples: pd.DataFrame, battery: Battery) -> pd.DataFrame:
    """The table with every column in its dtype, in canonical order.

    Raises:
        UsageError: a column is missing.
    """
    columns = {
        "sample_id": "string",
        "rank": "int64",
        "image_sha256": "string",
        "label": "int64",
        "clean_pred": "int64",
        "clean_margin": "float32",
    }
    for spec in battery.every_attack:
        columns |= {f"{spec.id}.{field}": dtype for field, dtype in ATTACK_FIELDS.items()}
    if battery.audit:
        columns[DRAWS] = "int64"
    missing = [name for name in columns if name not in samples]
    if missing:
        raise UsageError(f"column {missing[0]!r} is missing")
    return samples[list(columns)].astype(columns).reset_index(drop=True)


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` of a record directory.

    Raises:
        UsageError: missing, damaged, or written by another schema version.
    """
    file = path / "manifest.json"
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: not a run: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade robustbench-cure" if newer else "evaluate again"
        raise UsageError(f"{file}: schema version {version}, this version reads {SCHEMA_VERSION}; {advice}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{file}: {describe(error)}") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` of a record directory, whole or not at all."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    write_text(path / "manifest.json", text)


def write_table(path: Path, samples: pd.DataFrame) -> None:
    """Write Parquet atomically, byte-equal for equal tables."""
    # No pandas metadata: its library versions and index description are not evidence.
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(samples, preserve_index=False).replace_schema_metadata(None)
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))
