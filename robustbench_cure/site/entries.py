"""The leaderboard: entries by images, threat model and protocol. Pure functions of records.

Numbers are compared within one *leaderboard* alone: the same images (by digest), split, threat model and
protocol. Only the reference protocols are ranked, those that end at AutoAttack's number: their records of
one model on the same images are one body of evidence, and its number is the worst case, sample by sample,
over all their attacks and over verified adversarial examples of others. Every other battery has a listing of
its own, without ranks: accuracy under a weaker attack says nothing about the order of models. Published
numbers are entries too, unranked.

A rank is an interval. Two models differ where the exact two-sided McNemar test on their shared samples says
so, with Holm's correction over all pairs of the leaderboard at `LEVEL`; what an audit leaves open is counted
against the row that it may lower. The best rank of a model is 1 + the number of models
significantly more robust, its worst rank the number of models less those significantly less robust: where the
bounds of the audits hold, no two equally robust models of a leaderboard are told apart with probability
1 - `LEVEL`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from math import ceil
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_cure.evaluation.external import Evidence
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.cards import Battery, PublishedCell, PublishedRow, PublishedTable, read_card
from robustbench_cure.protocol.catalog import FOLDERS, ranking_protocol, roots
from robustbench_cure.protocol.identity import ModelInfo, known_tensors
from robustbench_cure.report.tables import SEVERITIES, deciding_attack
from robustbench_cure.report.wording import count, threat_words
from robustbench_cure.stats import DiscordantPairs, Rate, holm
from robustbench_cure.threat import ThreatModel

Kind = Literal["measured", "external", "published", "quoted"]

#: Family-wise error of the tests behind the ranks of one leaderboard.
LEVEL = 0.05
#: Images below which nothing is ranked: there the standard error may exceed 5 points.
FEWEST = 100
#: Raised where a sample of AutoAttack broke what the search of a reference record had left standing.
WEAK_SEARCH = "search_weaker_than_reference"
#: Sizes of models that the page filters by: parameters below each, in words.
SIZES = (
    (10**6, "under 1 million"),
    (10**7, "1 to 10 million"),
    (5 * 10**7, "10 to 50 million"),
)
#: Heads of RobustBench's numbers that are words, not names: written small within a line.
LOWER = ("External", "Reported")
LARGEST, UNKNOWN = "50 million and more", "not stated"


@dataclass(frozen=True)
class ReportedAccuracy:
    """A number of the leaderboard: counted, or printed; neither: `reason` says why there is none.

    Attributes:
        rate: as counted.
        printed: as a share, from a paper.
        reason: why there is no number.
    """

    rate: Rate | None = None
    printed: float | None = None
    reason: str = ""

    @property
    def value(self) -> float | None:
        """The accuracy as a share in [0, 1]; None where there is none."""
        return self.rate.value if self.rate is not None and self.rate.total else self.printed


@dataclass(frozen=True)
class RunCost:
    """What the runs behind a number took, summed over them.

    Attributes:
        passes: forward and backward passes of one image, clean pass included.
        seconds: of all attacks and the clean pass.
        share: of the gradients that the device computes in this time when it does nothing else;
            above 1 where most passes are forward alone. None: their rate was not measured.
    """

    passes: float
    seconds: float
    share: float | None


@dataclass(frozen=True)
class AuditBound:
    """By how much full AutoAttack would lower a number.

    Attributes:
        words: the bound as a sentence; "full AutoAttack" where nothing is left to audit.
        draws: samples that the audit attacked; None: no audit was needed.
        broken: of these, by AutoAttack.
        bound: at most this share of all samples, with 95 % confidence; 0 where all survivors were audited,
            since what AutoAttack broke is in the number.
    """

    words: str
    draws: int | None = None
    broken: int | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Entry:
    """One row of a leaderboard.

    Attributes:
        kind: where the number comes from.
        label: name of the model.
        model_id: id of its card; empty for published rows.
        robust: lowest robust accuracy known.
        how: what that number is, in words.
        clean: accuracy without an attack.
        n: samples; 0: not stated.
        decided: the attack under which alone the accuracy is lowest.
        architecture: as recorded or printed.
        extra_data: training data beyond the data set's own; empty: not declared.
        date: of the measurement, ISO; empty: none.
        flags: of the records, severest first, one of each kind and evidence.
        records: what it was measured from; empty for published rows.
        group: number of the model in `by_model`; -1 for published rows.
        tables: ids of the published tables it was printed in.
        parameters: of the network; 0: not stated.
        cost: of its records; None for published rows.
        audit: what bounds AutoAttack's number; None: nothing does.
        named: published numbers by their names, as shares: "AutoAttack", "External", ...
        stands: samples that nothing broke, bool (n,); None for published rows.
        rank_low: best rank among the models of the leaderboard; 0: not ranked, see `unranked`.
        rank_high: worst rank.
        unranked: why it is not ranked.
    """

    kind: Kind
    label: str
    robust: ReportedAccuracy
    how: str
    clean: ReportedAccuracy
    n: int
    decided: str
    architecture: str
    model_id: str = ""
    extra_data: str = ""
    date: str = ""
    flags: tuple[Flag, ...] = ()
    records: tuple[Record, ...] = ()
    group: int = -1
    tables: tuple[str, ...] = ()
    parameters: int = 0
    cost: RunCost | None = None
    audit: AuditBound | None = None
    named: Mapping[str, float] = field(default_factory=dict, compare=False)
    stands: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)
    rank_low: int = 0
    rank_high: int = 0
    unranked: str = ""

    @property
    def rank(self) -> str:
        """The interval of ranks, ``"1"`` or ``"1–2"``; empty: not ranked."""
        if not self.rank_low:
            return ""
        return f"{self.rank_low}–{self.rank_high}" if self.rank_high > self.rank_low else f"{self.rank_low}"

    @property
    def standard_error(self) -> float | None:
        """Of the robust accuracy, a share; None for printed numbers."""
        rate = self.robust.rate
        return rate.standard_error if rate is not None and rate.total else None

    @property
    def data_class(self) -> str:
        """Training data beyond the data set's own, for the filter: none, some, or not declared."""
        return {"": "not declared", "none": "none"}.get(self.extra_data, "some")

    @property
    def size(self) -> str:
        """The number of parameters, for the filter."""
        if not self.parameters:
            return UNKNOWN
        return next((words for below, words in SIZES if self.parameters < below), LARGEST)

    @property
    def unreliable(self) -> bool:
        """Whether a flag says that these numbers cannot be compared."""
        return any(flag.about.severity == "unreliable" for flag in self.flags)

    @property
    def model(self) -> ModelInfo | None:
        """Who was measured; None for published rows."""
        return self.records[0].manifest.model if self.records else None

    @property
    def weights(self) -> str:
        """SHA-256 of the weights; empty for published rows."""
        return self.model.weights_sha256 if self.model else ""

    def is_of(self, records: Sequence[Record]) -> bool:
        """Whether it was measured from some of these records, which are all that one model has."""
        return any(own is record for own in self.records for record in records)


@dataclass(frozen=True)
class Pair:
    """Two ranked rows of a leaderboard on their shared samples.

    Attributes:
        first: the row above.
        second: the row below.
        counts: the samples on which they differ, first as "before" and second as "after".
        p: two-sided p-value of the exact test, what audits leave open allowed for.
        adjusted: the same after Holm's correction over all pairs of the leaderboard.
    """

    first: Entry
    second: Entry
    counts: DiscordantPairs
    p: float
    adjusted: float

    @property
    def separable(self) -> bool:
        """Whether one of them is significantly more robust."""
        return self.adjusted <= LEVEL


@dataclass(frozen=True)
class Leaderboard:
    """Rows that may be compared: the same images, threat model and protocol.

    Attributes:
        data: name of the data set.
        split: of the data set.
        digest: of the images; empty: published numbers alone.
        n: number of images; 0: published numbers alone.
        threat: the threat model.
        rows: highest robust accuracy first.
        battery: the protocol of a listing without ranks; None: the reference protocols, or published numbers.
        pairs: every two of its ranked rows.
        twin: whether another leaderboard would have the same name: other images of the same file name.
    """

    data: str
    split: str
    digest: str
    n: int
    threat: ThreatModel
    rows: tuple[Entry, ...]
    battery: Battery | None = None
    pairs: tuple[Pair, ...] = ()
    twin: bool = False

    @property
    def ranks(self) -> bool:
        """Whether its rows were measured by a reference protocol."""
        return bool(self.n) and self.battery is None

    @property
    def name(self) -> str:
        """Images, threat model and protocol in words, ``"cifar10, l∞ 8/255, 512 images"``."""
        part = "" if self.split == "test" else f" ({self.split})"
        images = f", {count(self.n)} image{'s' * (self.n != 1)}" if self.n else ""
        which = f" {self.digest[:8]}" if self.twin else ""
        protocol = f": {protocol_words(self.battery)}" if self.battery else ""
        return f"{self.data}{part}, {threat_words(self.threat)}{images}{which}{protocol}"

    @property
    def protocol(self) -> str:
        """The protocol in words."""
        if self.battery is not None:
            return protocol_words(self.battery)
        return "AutoAttack level" if self.n else "published"

    @property
    def key(self) -> str:
        """The name for addresses: letters, digits and hyphens."""
        text = f"{self.data}-{self.split}-{self.threat}"
        if self.n:
            text += f"-{self.n}-{self.digest[:8]}"
        if self.battery is not None:
            text += f"-{self.battery.id}-{self.battery.digest[:8]}"
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())

    @property
    def note(self) -> str:
        """Why nothing is ranked here; empty where rows may have ranks."""
        if self.battery is not None:
            return f"not ranked: {unranked_protocol(self.battery)}"
        if self.n and self.n < FEWEST:
            return f"not ranked: {TOO_FEW}"
        return "" if self.n else "not ranked: published, not measured here"

    def tied_with(self, row: Entry) -> list[str]:
        """Models that no significant difference tells from that of a row."""
        pairs = [pair for pair in self.pairs if not pair.separable]
        return [p.second.label for p in pairs if p.first is row] + [
            p.first.label for p in pairs if p.second is row
        ]


TOO_FEW = f"ranks need at least {FEWEST} images"


def unranked_protocol(battery: Battery) -> str:
    """Why numbers of a battery are not ranked, and which one to run."""
    name = "reference" if battery.threat.norm == "linf" else f"reference_{battery.threat.norm}"
    reference = next(known for known in _shipped() if known.id == name)
    radius = "" if reference.threat.eps == battery.threat.eps else f" --eps {battery.threat.text}"
    return f"{battery.name} is not the reference protocol; evaluate with --battery {name}{radius}"


def protocol_words(battery: Battery) -> str:
    """Name, id and version of a battery, and whether it is one that ships with this package."""
    mark = {"shipped": "", "own": ", own battery"}.get(origin(battery))
    if mark is None:
        mark = f", modified: not the {origin(battery)} that ships"
    return f"{battery.name} ({battery.id} v{battery.version}{mark})"


@cache
def _shipped() -> tuple[Battery, ...]:
    folder = roots()[-1][1] / FOLDERS[Battery]  # those that were given come before it
    return tuple(read_card(Battery, path) for path in sorted(folder.rglob("*.toml")))


def origin(battery: Battery) -> str:
    """``"shipped"``, by content; ``"own"``; or the shipped one whose id or name it takes, ``"table1 v1"``."""
    taken = ""
    for original in _shipped():
        forms = [original]
        if original.threat.norm == battery.threat.norm:
            with suppress(ValueError):  # an attack that has no form at this radius
                forms.append(original.at(battery.threat.text))
        for form in forms:
            if form.digest == battery.digest:
                return "shipped"
            same_name = form.name.casefold().split() == battery.name.casefold().split()
            if form.id == battery.id or same_name:
                taken = f"{form.id} v{form.version}"
    return taken or "own"


def leaderboards(
    records: Sequence[Record],
    external: Sequence[Evidence] = (),
    published: Sequence[PublishedTable] = (),
    extra_data: Callable[[Record], str] = lambda _: "",
) -> list[Leaderboard]:
    """The leaderboards: ranked ones, then listings of other protocols, then published numbers alone.

    Args:
        records: finished runs.
        external: verified adversarial examples.
        published: printed tables; those without a threat model or not in per cent are left out. Their rows
            stand in the ranked leaderboard of their data set and threat model that has most images.
        extra_data: what is declared of a record's model.
    """
    complete(records, external)
    rows: dict[_Terms, list[Entry]] = {}
    members: dict[_Terms, list[Record]] = {}
    for number, terms, own in _bodies(records, _terms):
        rows.setdefault(terms, []).extend(_measured(own, number, external, extra_data(own[0])))
        members.setdefault(terms, []).extend(own)
    built = [_board(own, rows[terms]) for terms, own in members.items()]
    for (dataset, threat), entries in _published(published).items():
        able = [b for b in built if b.ranks and (b.data, b.split, b.threat) == (dataset, "test", threat)]
        largest = max(able, key=lambda b: b.n, default=None)
        if largest is None:
            built.append(Leaderboard(dataset, "test", "", 0, threat, tuple(entries)))
        else:
            built[built.index(largest)] = replace(largest, rows=(*largest.rows, *entries))
    names = Counter(board.name for board in built)
    boards = [replace(_ranked(board), twin=names[board.name] > 1) for board in built]
    return sorted(boards, key=_place)


def _place(board: Leaderboard) -> tuple[bool, bool, str, str, tuple[str, object], int, str]:
    return (
        not board.ranks,
        not board.n,
        board.data,
        board.split,
        (board.threat.norm, board.threat.eps),
        -board.n,
        board.key,
    )


def best_known(
    records: Sequence[Record], external: Sequence[Evidence] = ()
) -> list[tuple[ThreatModel, list[Entry]]]:
    """The lowest robust accuracy known of each model, over all batteries, by images and threat model.

    Returns:
        Of each model: the row of its own runs, and before it one of verified images of others where these
        lower it.
    """
    complete(records, external)
    return [
        (terms[3], _measured(own, number, external, ""))
        for number, terms, own in _bodies(records, lambda record: (*_terms(record)[:-1], ""))
    ]


#: Images (digest, number, split), threat model, and protocol: empty for the reference protocols together.
_Terms = tuple[str, int, str, ThreatModel, str]


def _terms(record: Record) -> _Terms:
    data, battery = record.manifest.data, record.manifest.battery
    protocol = "" if ranking_protocol(battery) else battery.digest
    return (data.digest, data.n, data.split, battery.threat, protocol)


def _bodies(
    records: Sequence[Record], terms: Callable[[Record], _Terms]
) -> list[tuple[int, _Terms, list[Record]]]:
    """Records of one model under the same terms, with the model's number in `by_model`."""
    bodies: dict[tuple[int, _Terms], list[Record]] = {}
    for number, group in enumerate(by_model(records)):
        for record in group:
            bodies.setdefault((number, terms(record)), []).append(record)
    return [(number, own_terms, own) for (number, own_terms), own in bodies.items()]


def _board(members: Sequence[Record], rows: Sequence[Entry]) -> Leaderboard:
    data, battery = members[0].manifest.data, members[0].manifest.battery
    # Equal images may have been read from files of several names: a data set's own name comes first.
    name = min((r.manifest.data.name for r in members), key=lambda name: (":" in name, name))
    listed = None if ranking_protocol(battery) else battery
    return Leaderboard(name, data.split, data.digest, data.n, battery.threat, tuple(rows), listed)


def complete(records: Sequence[Record], external: Sequence[Evidence] = ()) -> None:
    """Give models without a digest of tensors that of their weights file, in place; see `known_tensors`."""
    holders = [record.manifest for record in records] + [evidence.submission for evidence in external]
    known = known_tensors(holder.model for holder in holders)
    for holder in holders:
        model = holder.model
        if not model.tensors_sha256 and model.weights_sha256 in known:
            update = {"tensors_sha256": known[model.weights_sha256]}
            holder.model = model.model_copy(update=update)


def by_model(records: Sequence[Record]) -> list[list[Record]]:
    """Records put together by the model they are of, in order of the first of each.

    In a group the record that says most of the model comes first. An older record has no answers, and agrees
    with every function of its weights: it joins them where there is only one, and else stands alone.
    """
    complete(records)
    place = {id(record): k for k, record in enumerate(records)}
    groups: list[list[Record]] = []
    for record in sorted(records, key=lambda r: _says_least(r.manifest.model)):
        model = record.manifest.model
        own = [g for g in groups if all(r.manifest.model.same_as(model) for r in g)]
        if own and (model.answers or len(own) == 1):
            own[0].append(record)
        else:
            groups.append([record])
    return sorted(groups, key=lambda group: min(place[id(record)] for record in group))


def _says_least(model: ModelInfo) -> tuple[bool, bool]:
    return not model.answers, model.source != "card"


def joined(records: Sequence[Record]) -> pd.Series:
    """Samples that no attack of any of these records, of one model on the same images, broke; bool."""
    # One digest of the data: the same samples in the same order.
    robust = records[0].worst_case
    for record in records[1:]:
        robust = robust & record.worst_case
    return robust


def _measured(
    records: list[Record], group: int, external: Sequence[Evidence], extra_data: str
) -> list[Entry]:
    robust = joined(records)
    attacks = {s.model_dump_json(exclude={"id", "name"}) for r in records for s in r.attacks}
    batteries = dict.fromkeys(f"{r.manifest.battery.id} v{r.manifest.battery.version}" for r in records)
    strongest = min(records, key=lambda r: r.worst_case_accuracy.value)
    model, data = records[0].manifest.model, records[0].manifest.data
    flags = {(f.kind, f.attack, f.evidence): f for r in records for f in r.flags}
    stands = robust.to_numpy(dtype=bool)
    row = Entry(
        kind="measured",
        label=model.name or model.id,
        model_id=model.id,
        robust=ReportedAccuracy(Rate(int(robust.sum()), len(robust))),
        how=f"worst case of {len(attacks)} attack{'s' * (len(attacks) != 1)}, {' + '.join(batteries)}",
        clean=ReportedAccuracy(records[0].clean_accuracy),
        n=data.n,
        decided=deciding_attack(strongest),
        architecture=model.architecture,
        extra_data=extra_data,
        date=max(r.manifest.finished[:10] for r in records),
        flags=tuple(sorted(flags.values(), key=lambda f: SEVERITIES.index(f.about.severity))),
        records=tuple(records),
        group=group,
        parameters=model.parameters,
        cost=_cost(records),
        audit=_audit(records),
        stands=stands,
    )
    theirs = [e for e in external if any(e.applies_to(record) for record in records)]
    left = stands.copy()
    for evidence in theirs:
        left &= ~evidence.breaks(records[0]).to_numpy(dtype=bool)
    if left.sum() == stands.sum():
        return [row]
    names = dict.fromkeys(e.submission.source or e.submission.file for e in theirs)
    lowered = replace(
        row,
        kind="external",
        robust=ReportedAccuracy(Rate(int(left.sum()), len(left))),
        how=f"with verified images of others; {100 * row.robust.rate.value:.1f} % by our own attacks"
        if row.robust.rate
        else "",
        decided="; ".join(names),
        date=max(e.submission.checked[:10] for e in theirs),
        stands=left,
    )
    return [lowered, replace(row, unranked="other people's images are stronger: see the external row")]


def _cost(records: Sequence[Record]) -> RunCost:
    runs = [record.manifest for record in records]
    passes, seconds = sum(run.passes for run in runs), sum(run.seconds for run in runs)
    rates = [run.environment.gradient_rate for run in runs]
    known = seconds > 0 and all(rates)
    # A gradient is one forward and one backward pass.
    bare = sum(run.passes / 2 / rate for run, rate in zip(runs, rates, strict=True)) if known else 0.0
    return RunCost(passes / records[0].n, seconds, bare / seconds if known else None)


def _audit(records: Sequence[Record]) -> AuditBound | None:
    if any(ranking_protocol(record.manifest.battery) == "autoattack" for record in records):
        return AuditBound("full AutoAttack")
    audits = [audit for record in records if (audit := record.audit) is not None]
    if not audits:
        return None
    # That of the protocol, or the one that drew most: to choose the lowest would be to choose by the outcome.
    asked = [audit for record in records if _as_asked(record) and (audit := record.audit) is not None]
    whole = [audit for audit in audits if audit.whole]
    audit = max(whole or asked or audits, key=lambda audit: audit.draws)
    return AuditBound(audit.words, audit.draws, audit.broken, 0.0 if audit.whole else audit.bound)


def _audit_gap(records: Sequence[Record]) -> str:
    """What the audits of a model's records lack for its number to be ranked; empty: nothing.

    A whole AutoAttack run or a whole audit lacks nothing, whatever it broke: it is in the number.
    """
    audits = [(record.audit, record.manifest.battery.audit) for record in records]
    if any(flag.kind == "replaced_attacks" for record in records for flag in record.flags):
        return "evaluated with other attacks than those of this package"
    if any(found is None or found.whole for found, _ in audits):
        return ""
    if any(flag.kind == WEAK_SEARCH for record in records for flag in record.flags):
        return "its audit found that AutoAttack breaks more: evaluate again with --resume --audit all"
    own = [record for record in records if _as_asked(record)]
    if not own:
        return (
            "its audit has another seed or size than the protocol's: evaluate again without --seed and "
            "--audit, or with --resume --audit all"
        )
    if not any(record.audit and record.audit.draws for record in own):
        return "its audit was not made yet: go on with evaluate --resume"
    return ""


def _as_asked(record: Record) -> bool:
    """Whether an audit has the protocol's seed and size: others could be tried until none of it breaks."""
    config, battery = record.manifest.config, record.manifest.battery
    return config.seed == battery.seed and battery.audit is not None and config.audit == battery.audit.samples


def _published(tables: Sequence[PublishedTable]) -> dict[tuple[str, ThreatModel], list[Entry]]:
    """Printed rows by data set and threat model; a row of several tables counts once: its lowest."""
    places: dict[tuple[str, ThreatModel], dict[str, list[tuple[PublishedTable, PublishedRow]]]] = {}
    for table in tables:
        if table.threat is not None and table.unit == "%":
            rows = places.setdefault((table.dataset, table.threat), {})
            for row in table.rows:
                rows.setdefault(row.id, []).append((table, row))
    return {place: [_printed(printed) for printed in rows.values()] for place, rows in places.items()}


def _printed(printed: list[tuple[PublishedTable, PublishedRow]]) -> Entry:
    row = printed[0][1]
    cells: list[tuple[PublishedTable, PublishedCell]] = [
        (table, cell) for table, _ in printed for cell in table.cells if cell.row == row.id
    ]
    clean = next((cell for _, cell in cells if cell.column == "clean"), None)
    attacked = [(table, cell) for table, cell in cells if cell.column != "clean"]
    table, lowest = min(attacked, key=lambda pair: pair[1].value) if attacked else (printed[0][0], None)
    name = _head(table, lowest) if lowest else ""
    quoted = lowest is not None and lowest.kind == "quoted"
    return Entry(
        kind="quoted" if quoted else "published",
        label=f"{row.group}, {row.name}",
        robust=ReportedAccuracy(printed=lowest.value / 100, reason="")
        if lowest
        else ReportedAccuracy(reason="none is printed"),
        how="; ".join(part for part in (_how(attacked, quoted), row.note) if part),
        clean=ReportedAccuracy(printed=clean.value / 100)
        if clean
        else ReportedAccuracy(reason="none is printed"),
        n=table.n,
        decided=name,
        architecture=row.group,
        extra_data=row.extra_data,
        tables=tuple(dict.fromkeys(t.id for t, _ in printed)),
        named={_head(table, cell): cell.value / 100 for table, cell in attacked},
        unranked="published, not measured here",
    )


def _head(table: PublishedTable, cell: PublishedCell) -> str:
    return table.heads.get(cell.column, cell.column)


def _how(attacked: Sequence[tuple[PublishedTable, PublishedCell]], quoted: bool) -> str:
    """Every number with its name, where there are several: ``"AutoAttack 75.28; external 73.10"``."""
    if len(attacked) < 2:
        return "as printed, from another paper" if quoted else "as printed"
    digits = max(len(str(cell.value).partition(".")[2]) for _, cell in attacked)
    heads = [_head(table, cell) for table, cell in attacked]
    words = [
        f"{h.lower() if h in LOWER else h} {c.value:.{digits}f}"
        for h, (_, c) in zip(heads, attacked, strict=True)
    ]
    return "; ".join(words) + ("; the lowest from another paper" if quoted else "")


def _ranked(board: Leaderboard) -> Leaderboard:
    """The board with its rows in order, and with ranks where there are any; what is flagged comes last."""

    def reason(row: Entry) -> str:
        if row.unranked:
            return row.unranked
        if row.unreliable:
            return "flagged unreliable: these numbers cannot be compared"
        if board.battery is not None:
            return unranked_protocol(board.battery)
        return _audit_gap(row.records) or (TOO_FEW if board.n < FEWEST else "")

    # What an external row lowered stands right below it, not where its own number would put it.
    lowered = [row for row in board.rows if row.kind == "external"]

    def height(row: Entry) -> float:
        own = [other for other in lowered if other.group == row.group]
        return (own[0] if own else row).robust.value or 0.0

    noted = [replace(row, unranked=reason(row)) for row in board.rows]
    rows = sorted(noted, key=lambda r: (r.unreliable, -height(r), r.label, r.n, r.kind))
    pairs = _compared([row for row in rows if not row.unranked])
    placed = {id(row): row if row.unranked else _placed(row, pairs) for row in rows}
    return replace(
        board,
        rows=tuple(placed.values()),
        pairs=tuple(replace(p, first=placed[id(p.first)], second=placed[id(p.second)]) for p in pairs),
    )


def _compared(rows: Sequence[Entry]) -> list[Pair]:
    """Every two rows, with the p-values that a significant difference has at most `LEVEL`."""
    found = [
        (one, other, DiscordantPairs.between(one.stands, other.stands))
        for one, other in combinations(rows, 2)
        if one.stands is not None and other.stands is not None
    ]
    single = [counts.p_change(_open(one), _open(other)) for one, other, counts in found]
    return [Pair(*each, p, q) for each, p, q in zip(found, single, holm(single), strict=True)]


def _open(row: Entry) -> int:
    """Samples of a row that AutoAttack may still break, by its audit's bound."""
    return ceil((row.audit.bound or 0.0) * row.n - 1e-9) if row.audit is not None else 0


def _placed(row: Entry, pairs: Sequence[Pair]) -> Entry:
    """A row with its interval of ranks, from all pairs of the leaderboard."""
    own = [pair for pair in pairs if row is pair.first or row is pair.second]
    better = worse = 0
    for pair in own:
        if pair.separable:
            robust = pair.counts.change < 0  # the first is more robust than the second
            better += robust == (row is pair.second)
            worse += robust == (row is pair.first)
    return replace(row, rank_low=1 + better, rank_high=len(own) + 1 - worse)
