"""What one check found."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["raised", "clear", "inconclusive", "not run"]


class Finding(BaseModel):
    """One check's answer.

    Attributes:
        letter: A, B, ...: how verdicts name it.
        check: its name, see `EXPLANATIONS`.
        status: whether it was raised; ``inconclusive``: it is not, and could hardly have been (see `power`);
            ``not run`` says why in the evidence.
        value: what was measured.
        threshold: beyond which it is raised.
        beyond: on which side of it that is.
        p: of the exact test that must hold as well, at `LEVEL`; None: there is none.
        evidence: in words, with numbers.
        ids: samples it rests on, at most `MOST_IDS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    letter: str
    check: str
    status: Status
    value: float | None = None
    threshold: float | None = None
    beyond: Literal[">", "<"] = ">"
    p: float | None = None
    evidence: str
    ids: tuple[str, ...] = ()

    @property
    def value_words(self) -> str:
        """The value in at most seven characters; empty where there is none."""
        if self.value is None:
            return ""
        words = f"{self.value:.3g}"
        return words if len(words) <= 7 else f"{self.value:.2g}"

    @property
    def limit_words(self) -> str:
        """Where it is raised, ``> 0.05``; empty where there is no threshold."""
        return "" if self.threshold is None else f"{self.beyond} {self.threshold:.3g}"

    @property
    def p_words(self) -> str:
        """The p-value in at most six characters; empty where no test decides."""
        if self.p is None:
            return ""
        return f"{self.p:.2g}" if self.p >= 0.001 else f"{self.p:.0e}"


#: Level of the exact tests.
LEVEL = 0.01
#: Ids kept with a finding.
MOST_IDS = 50


def not_run(letter: str, check: str, reason: str) -> Finding:
    """A check that was left out, and why."""
    return Finding(letter=letter, check=check, status="not run", evidence=reason)
