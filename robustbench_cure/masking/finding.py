"""What one check found."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["raised", "clear", "not run"]


class Finding(BaseModel):
    """One check's answer.

    Attributes:
        letter: A, B, ...: how verdicts name it.
        check: its name, see `EXPLANATIONS`.
        status: whether it was raised; ``not run`` says why in the evidence.
        value: what was measured.
        threshold: beyond which it is raised.
        evidence: in words, with numbers.
        ids: samples it rests on, at most `MOST_IDS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    letter: str
    check: str
    status: Status
    value: float | None = None
    threshold: float | None = None
    evidence: str
    ids: tuple[str, ...] = ()


#: Ids kept with a finding.
MOST_IDS = 50


def not_run(letter: str, check: str, reason: str) -> Finding:
    """A check that was left out, and why."""
    return Finding(letter=letter, check=check, status="not run", evidence=reason)
