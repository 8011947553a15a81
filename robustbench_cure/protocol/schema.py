"""The strictness every card section shares: unknown keys, silent conversions and NaN are errors."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from robustbench_cure.threat import parse_fraction

ID_PATTERN = r"^[a-z][a-z0-9_]*$"
Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
Positive = Annotated[int, Field(ge=1)]


def _exact(text: str) -> str:
    parse_fraction(text)
    return text


#: An exact fraction as text, "8/255".
Fractional = Annotated[str, AfterValidator(_exact)]


class Strict(BaseModel):
    """Base of every card section: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of this section, hex.

        Keys at their default are left out, so that a key added later changes no digest.
        """
        values = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def describe(error: ValidationError) -> str:
    """All complaints of one validation on one line: ``field: message; field: message``."""
    complaints = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "card"
        what = re.sub(r"^Value error, ", "", item["msg"])
        if item["type"] == "extra_forbidden":
            what = "unknown key"
        complaints.append(f"{where}: {what}")
    return "; ".join(complaints)
