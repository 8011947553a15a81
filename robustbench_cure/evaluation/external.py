"""Other people's adversarial examples: what is stored of them once they were checked.

On disk, a directory:

    external.json      who was attacked, on which data, under which threat model; where the file came from
    samples.parquet    one row a given image: what the judge found

Read by the site, which lowers the best known number of a model by them, under the name *external*.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Environment, Record, write_table
from robustbench_cure.files import write_atomically
from robustbench_cure.protocol.cards import Threat
from robustbench_cure.protocol.identity import DataInfo, ModelInfo
from robustbench_cure.protocol.schema import describe

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
MANIFEST = "external.json"
COLUMNS: dict[str, str] = {
    "sample_id": "string",
    "image_sha256": "string",
    "label": "int64",
    "broken": "bool",  # verified: misclassified, inside ball and box, finite
    "pred": "int64",
    "margin": "float32",  # NaN where nothing admissible was given
    "linf": "float32",  # distance from the image, units of x
    "l2": "float32",
    "violation": "string",  # why the image was not admitted; empty if it was
}


class Submission(BaseModel):
    """Everything about a file of adversarial examples but its rows."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    #: Who made them and how, as declared.
    source: str
    file: str
    file_sha256: str
    model: ModelInfo
    battery: str
    battery_version: int
    threat: Threat
    data: DataInfo
    environment: Environment
    checked: str

    def applies_to(self, record: Record) -> bool:
        """Whether it is about the same model, data set and threat model."""
        other = record.manifest
        return (
            self.model.same_as(other.model)
            and (self.data.name, self.data.split) == (other.data.name, other.data.split)
            and self.threat.model == other.battery.threat.model
        )


@dataclass(frozen=True)
class Evidence:
    """A checked file.

    Attributes:
        submission: see `Submission`.
        samples: see `COLUMNS`.
    """

    submission: Submission
    samples: pd.DataFrame

    def save(self, path: Path) -> None:
        """Write table and manifest, each atomically, the manifest last."""
        write_table(path / "samples.parquet", self.samples)
        text = json.dumps(self.submission.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
        write_atomically(path / MANIFEST, lambda file: file.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """Read what `save` wrote.

        Raises:
            UsageError: damaged, or of another schema.
        """
        import pandas as pd

        file, table = path / MANIFEST, path / "samples.parquet"
        try:
            submission = Submission.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise UsageError(f"{file}: {describe(error)}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: cannot be read: {error}") from None
        if submission.schema_version != SCHEMA_VERSION:
            raise UsageError(f"{file}: schema version {submission.schema_version}, not {SCHEMA_VERSION}")
        try:
            samples = pd.read_parquet(table, dtype_backend="numpy_nullable")[list(COLUMNS)].astype(COLUMNS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{table}: cannot be read: {reason}; check the file again") from None
        return cls(submission, samples)

    def applies_to(self, record: Record) -> bool:
        """Whether it is about the same model, data set and threat model."""
        return self.submission.applies_to(record)

    def breaks(self, record: Record) -> pd.Series:
        """Which samples of a record it broke, matched by id and pixels; bool, index as the record's."""
        broken = self.samples[self.samples["broken"]]
        keys = set(zip(broken["sample_id"], broken["image_sha256"], strict=True))
        pairs = zip(record.samples["sample_id"], record.samples["image_sha256"], strict=True)
        found = record.clean_correct.copy()
        found[:] = [pair in keys for pair in pairs]
        return found
