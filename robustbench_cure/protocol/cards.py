"""Cards: which models, under what protocol, and what the papers printed. TOML, parsed strictly.

An unknown key, a wrong type, an id that is not its file's name is an error that names ``file: field``. What
a battery says of its attacks: `specs`. This module imports neither torch nor numpy, so that listing and
validating answer at once.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.recipes import Recipe
from robustbench_cure.protocol.schema import Fractional, Identifier, Positive, Strict, describe
from robustbench_cure.protocol.specs import AttackSpec
from robustbench_cure.threat import Norm, ThreatModel, format_eps

# --- batteries ---------------------------------------------------------------------------------------


class ThreatSection(Strict):
    """A threat model as cards and manifests write it."""

    norm: Norm
    eps: Fractional


def _written(threat: object) -> object:
    """A threat model as cards write it; what is none is left to validation."""
    return {"norm": threat.norm, "eps": threat.text} if isinstance(threat, ThreatModel) else threat


if TYPE_CHECKING:
    Threat = ThreatModel
else:  # read strictly, key by key, and parsed once
    Threat = Annotated[
        ThreatSection,
        BeforeValidator(_written),
        AfterValidator(lambda written: ThreatModel.parse(written.norm, written.eps)),
        PlainSerializer(_written),
    ]


#: Rows of reports that are no attack.
RESERVED = ("clean", "worst", "audit")
Attacks = Annotated[tuple[AttackSpec, ...], Field(min_length=1, strict=False)]


class Audit(Strict):
    """Stronger attacks on part of what a battery leaves robust, which bound what they would find in all."""

    #: What these attacks are known as.
    name: Annotated[str, Field(min_length=1)]
    #: How many of the samples that are still robust, drawn at random; 0: all of them.
    samples: Annotated[int, Field(ge=0)]
    #: In order; each gets what still stands.
    attacks: Attacks


class Battery(Strict):
    """A frozen protocol: threat model, attacks with every parameter, integer version."""

    id: Identifier
    version: Positive
    name: str
    source: str
    #: Data set the protocol is defined on; empty: any.
    dataset: str
    #: How many samples the protocol asks for; 0: the whole split.
    n: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    #: Id of the published table this battery is laid out as; empty: none.
    published: str
    notes: str
    threat: Threat
    #: Each attack is given only what the ones before left robust; else all of them are given every sample.
    cascade: bool = False
    attacks: Attacks
    audit: Audit | None = None

    @property
    def every_attack(self) -> tuple[AttackSpec, ...]:
        """The attacks, and those of the audit."""
        return self.attacks + (self.audit.attacks if self.audit else ())

    def at(self, eps: str) -> Battery:
        """This protocol in a ball of another radius: a battery of its own, which is no paper's table.

        Args:
            eps: the radius, a fraction such as ``"4/255"``; step sizes change in proportion.

        Raises:
            ValueError: no radius, or an attack whose parameters cannot follow.
        """
        threat = ThreatModel.parse(self.threat.norm, eps)
        if threat.eps <= 0:
            raise ValueError(f"{eps!r} is no radius: must be positive")
        ratio, words = threat.eps / self.threat.eps, format_eps(threat.eps)
        if ratio == 1:
            return self
        audit = self.audit and Audit(
            name=self.audit.name,
            samples=self.audit.samples,
            attacks=tuple(attack.scaled(ratio) for attack in self.audit.attacks),
        )
        return Battery(
            **self.model_dump(exclude={"id", "name", "published", "threat", "attacks", "audit"}),
            id=f"{self.id}_at_{re.sub('[^0-9]+', '_', words)}",
            name=f"{self.id} at {'l∞' if threat.norm == 'linf' else 'l2'} {words}",
            published="",
            threat=ThreatModel.parse(threat.norm, words),
            attacks=tuple(attack.scaled(ratio) for attack in self.attacks),
            audit=audit,
        )

    @model_validator(mode="after")
    def _coherent(self) -> Battery:
        ids = [attack.id for attack in self.every_attack]
        for attack in self.every_attack:
            if ids.count(attack.id) > 1:
                raise ValueError(f"attacks: id {attack.id!r} appears twice")
            if attack.id in RESERVED:
                raise ValueError(f"attacks: id {attack.id!r} is the name of another row of the reports")
            if attack.limit and self.cascade:
                raise ValueError(
                    f"attacks.{attack.id}: limit: must be 0 in a cascade, whose rows count all samples"
                )
            try:
                attack.check(self.threat)
            except ValueError as error:
                raise ValueError(f"attacks.{attack.id}: {error}") from None
        for attack in self.audit.attacks if self.audit else ():
            if attack.limit:
                raise ValueError(f"audit.attacks.{attack.id}: limit: must be 0, the audit draws its samples")
        return self


# --- models ------------------------------------------------------------------------------------------


class Weights(Strict):
    """Where the weights come from: a file beside the card, or a URL; sha256 is mandatory."""

    file: str = ""
    url: str = ""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @model_validator(mode="after")
    def _one_source(self) -> Weights:
        if bool(self.file) == bool(self.url):
            raise ValueError("give either `file` or `url`")
        if "/" in self.file or "\\" in self.file or not (self.file + self.url).endswith(".safetensors"):
            raise ValueError("a .safetensors file beside the card, or a URL of one")
        return self


class Declared(Strict):
    """What only the people behind a model can say of it; printed as declared, never checked."""

    #: Why this radius is the one that matters.
    eps_reason: str = ""
    #: Attacks made for this defence, and what they found.
    adaptive_attack: str = ""
    #: Parts that gradients do not pass, or that act at random, and how they were attacked.
    non_differentiable: str = ""
    #: How the numbers stand to those of earlier work.
    prior_work: str = ""
    #: A provable bound, where there is one.
    certificate: str = ""


class ModelCard(Strict):
    """One model: how it is built, where its weights come from, how it was or can be trained."""

    id: Identifier
    name: str
    dataset: Literal["digits", "cifar10", "svhn"]
    architecture: str
    architecture_args: dict[str, int | float | str | bool]
    num_classes: Annotated[int, Field(ge=2)]
    #: (C, H, W) of one image.
    input_shape: Annotated[tuple[int, int, int], Field(strict=False)]
    mean: Annotated[tuple[float, ...], Field(strict=False)]
    std: Annotated[tuple[float, ...], Field(strict=False)]
    paper: str
    license: str
    notes: str
    #: Battery used when none is named.
    battery: Identifier
    #: Key of this model's row in the published tables ("resnet18/cure"); empty: none.
    published_row: str
    weights: Weights | None = None
    training: Recipe
    #: Figures of the stored weights in per cent, by name; written by the training command's report.
    figures: dict[str, float] = Field(default_factory=dict)
    #: Training data beyond the data set's own, "none" where there are none; empty: not declared.
    extra_data: str = ""
    declared: Declared = Declared()

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not abs(number) < 1e6 for number in value):
            raise ValueError("one finite number for each channel")
        return value

    @model_validator(mode="after")
    def _channels(self) -> ModelCard:
        if {len(self.mean), len(self.std)} != {self.input_shape[0]}:
            raise ValueError(f"mean and std need {self.input_shape[0]} numbers, one for each channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


# --- published numbers -------------------------------------------------------------------------------


class PublishedCell(Strict):
    """One printed number. `column` is an attack id of the battery, or "clean"."""

    row: str
    column: str
    value: float
    kind: Literal["measured", "quoted"]
    locator: str


class PublishedRow(Strict):
    """A row of a printed table: its label and the model (`architecture/training`) it belongs to."""

    id: str
    name: str
    group: str
    #: Training data beyond the data set's own, "none" where there are none; empty: not stated.
    extra_data: str = ""
    #: What to know of the row, as its source says it.
    note: str = ""


class PublishedTable(Strict):
    """A table, or the text-only numbers, as printed; values in `unit`, never recomputed."""

    id: Identifier
    title: str
    paper: str
    unit: str
    dataset: str
    #: Specification the printed numbers were made with, as far as the paper states it.
    specification: str
    #: Number of test images behind the table; 0: not stated.
    n: Annotated[int, Field(ge=0)]
    rows: Annotated[tuple[PublishedRow, ...], Field(strict=False)]
    cells: Annotated[tuple[PublishedCell, ...], Field(strict=False, min_length=1)]
    #: Threat model of every attack in the table, where it states one.
    threat: Threat | None = None
    #: Heads of the columns as printed, by `column`.
    heads: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_rows(self) -> PublishedTable:
        known = {row.id for row in self.rows}
        for cell in self.cells:
            if cell.row not in known:
                raise ValueError(f"cells: row {cell.row!r} is not in rows")
        for column in set(self.heads) - {cell.column for cell in self.cells}:
            raise ValueError(f"heads: no cell has the column {column!r}")
        return self

    def cell(self, row: str, column: str) -> PublishedCell | None:
        """The printed number, or None where the paper has none."""
        return next((c for c in self.cells if (c.row, c.column) == (row, column)), None)


# --- parsing -----------------------------------------------------------------------------------------

CardT = TypeVar("CardT", ModelCard, Battery, PublishedTable)


def parse_card(kind: type[CardT], text: str, source: str, stem: str) -> CardT:
    """Parse one TOML card.

    Args:
        kind: the card class.
        text: the TOML text.
        source: the file as named in error messages.
        stem: file name without suffix; the card's id must equal it.

    Raises:
        UsageError: one line, ``file: field: what is wrong``.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not valid TOML: {error}") from None
    try:
        card = kind.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{source}: {describe(error)}") from None
    if card.id != stem:
        raise UsageError(f"{source}: id: {card.id!r} does not match the file name {stem!r}")
    return card


def read_card(kind: type[CardT], path: Path) -> CardT:
    """Parse the card in a file; see `parse_card`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    return parse_card(kind, text, str(path), path.stem)
