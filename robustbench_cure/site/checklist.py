"""The evaluation checklist: what a record shows by itself, and what only the authors can declare.

Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, arXiv 1902.06705, section 5 and its
summary list; item texts are ours. What neither the record nor the card states is not declared or not
in the record: an item is never taken to be met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.specs import APGD, FGSM, PGD, AttackSpec
from robustbench_cure.report.table import Table, columns
from robustbench_cure.report.wording import count, data_words, percent, threat_words
from robustbench_cure.stats import Rate

Status = Literal["met", "not met", "not in the record", "declared", "not declared"]

#: Share of all samples that the second half of the steps may still break.
STILL_FALLING = 0.01


@dataclass(frozen=True)
class Item:
    """One item: decided from the record, or declared by the authors.

    Attributes:
        name: what is asked.
        status: the answer.
        evidence: what the answer rests on, in words.
    """

    name: str
    status: Status
    evidence: str

    @property
    def automatic(self) -> bool:
        """Whether the program decided it."""
        return self.status not in ("declared", "not declared")


def checklist(record: Record, card: ModelCard | None) -> list[Item]:
    """Every item for one record.

    Args:
        record: a finished run.
        card: the model's card, where it is about these weights.
    """
    return [item(record) for item in AUTOMATIC] + _declared(record, card)


def _broken(record: Record, wanted: Callable[[AttackSpec], bool]) -> pd.Series | None:
    """Samples that one of the wanted attacks broke; None: the battery has no such attack."""
    parts = [record.samples[f"{s.id}.broken"] for s in record.every_attack if wanted(s)]
    if not parts:
        return None
    broken = parts[0]
    for part in parts[1:]:
        broken = broken | part
    return broken


def _given(record: Record, wanted: Callable[[AttackSpec], bool]) -> pd.Series:
    """Samples that one of the wanted attacks was given: in a cascade, not what was broken before."""
    names = [f"{spec.id}.attacked" for spec in record.every_attack if wanted(spec)]
    return record.samples[names].any(axis=1)


def _threat(record: Record) -> Item:
    threat = record.manifest.battery.threat
    evidence = (
        f"{threat_words(threat)}, pixels in [0, 1]; untargeted; the attacker knows weights and gradients"
    )
    return Item("Threat model stated: norm, radius, goal, knowledge", "met", evidence)


def _clean(record: Record) -> Item:
    evidence = f"clean {percent(record.clean_accuracy)}, worst case {percent(record.worst_case_accuracy)}"
    return Item("Clean accuracy with robust accuracy", "met", evidence)


def _per_sample(record: Record) -> Item:
    evidence = f"broken by any attack is broken; every one of {count(record.n)} samples is in the raw record"
    return Item("Worst case for each sample; results of each sample given", "met", evidence)


def _parameters(record: Record) -> Item:
    evidence = f"{len(record.every_attack)} attacks, each with every parameter, under Attack specifications"
    return Item("All attack parameters listed", "met", evidence)


def _whole_set(record: Record) -> Item:
    data = record.manifest.data
    name = "The whole test set"
    low, high = record.worst_case_accuracy.interval
    evidence = f"{data_words(data)}; the interval is {100 * (high - low):.1f} points wide"
    whole = data.n == data.total and data.split == "test"
    return Item(name, "met" if whole else "not met", evidence)


def _iterated(record: Record) -> Item:
    name = "Iterated attacks beat single steps, sample by sample"
    single = _broken(record, lambda s: isinstance(s, FGSM))
    iterated = _broken(record, lambda s: isinstance(s, (PGD, APGD)))
    if single is None or iterated is None or record.manifest.battery.cascade:
        return Item(name, "not in the record", "needs FGSM and PGD, both on every sample")
    alone = int((single & ~iterated).sum())
    evidence = f"FGSM broke {count(int(single.sum()))}, {count(alone)} of them not broken by PGD"
    return Item(name, "not met" if alone else "met", evidence)


def _converged(record: Record) -> Item:
    name = "Enough steps: twice as many change nothing"
    able = [s for s in record.attacks if isinstance(s, PGD) and s.stop == "first-success" and s.restarts == 1]
    if not able:
        return Item(name, "not in the record", "needs PGD that stops at its first success, without restarts")
    spec = max(able, key=lambda s: s.steps)
    broken = record.samples[f"{spec.id}.broken"]
    late = int((record.samples[f"{spec.id}.step"][broken] > spec.steps // 2).sum())
    share = Rate(late, int(record.covered(spec.id).sum()))
    evidence = f"the second half of the steps of {spec.name} broke {percent(share)} of all samples"
    return Item(name, "met" if share.value <= STILL_FALLING else "not met", evidence)


def _restarts(record: Record) -> Item:
    most = max((s.restarts for s in record.attacks if isinstance(s, (PGD, APGD))), default=0)
    evidence = f"at most {most} of PGD" if most else "no PGD in the battery"
    return Item("Random restarts", "met" if most > 1 else "not met", evidence)


def _losses(record: Record) -> Item:
    losses = sorted({s.loss for s in record.every_attack if isinstance(s, (PGD, APGD))})
    evidence = ", ".join(losses) or "no PGD in the battery"
    return Item("More than one loss", "met" if len(losses) > 1 else "not met", evidence)


def _gradient_free(record: Record) -> Item:
    name = "Gradient-free attack, no stronger than gradients on any sample"
    white_box = _broken(record, lambda s: s.access == "white-box")
    gradient_free = _broken(record, lambda s: s.access == "gradient-free")
    if gradient_free is None or white_box is None:
        return Item(name, "not in the record", "needs a gradient-free attack and white-box ones")
    alone = int((gradient_free & ~white_box & _given(record, lambda s: s.access == "white-box")).sum())
    names = ", ".join(s.name for s in record.every_attack if s.access == "gradient-free")
    broken = count(int(gradient_free.sum()))
    evidence = f"{names} broke {broken}, {count(alone)} of them not broken by gradients"
    return Item(name, "not met" if alone else "met", evidence)


def _noise(record: Record) -> Item:
    name = "Random noise as a control, weaker than gradients"
    noise = _broken(record, lambda s: s.access == "control")
    white_box = _broken(record, lambda s: s.access == "white-box")
    if noise is None or white_box is None:
        return Item(name, "not in the record", "needs uniform noise and attacks with gradients")
    alone = int((noise & ~white_box & _given(record, lambda s: s.access == "white-box")).sum())
    evidence = f"noise broke {count(int(noise.sum()))}, {count(alone)} of them not broken by gradients"
    return Item(name, "not met" if alone else "met", evidence)


def _deterministic(record: Record) -> Item:
    raised = [f for f in record.flags if f.about.severity == "unreliable"]
    evidence = "; ".join(f"{f.about.title.lower()}: {f.evidence}" for f in raised)
    return Item(
        "The same image gives the same output, alone or in a batch",
        "not met" if raised else "met",
        evidence or "checked before the first attack",
    )


def _identified(record: Record) -> Item:
    m = record.manifest
    known = bool(m.environment.git_commit or m.environment.version) and bool(m.environment.command)
    evidence = f"weights {m.model.weights_sha256[:12]}…, code {m.environment.version}, under Provenance"
    return Item("Weights, code and command identified", "met" if known else "not met", evidence)


def _larger_radii(_: Record) -> Item:
    evidence = "see cure-bench curve, and the check unbounded_attack_fails of cure-bench masking"
    return Item("Accuracy falls to chance as the radius grows", "not in the record", evidence)


def _transfer(_: Record) -> Item:
    evidence = "see cure-bench masking with --surrogate, where it was run"
    return Item("Transfer from another model", "not in the record", evidence)


AUTOMATIC: tuple[Callable[[Record], Item], ...] = (
    _threat,
    _clean,
    _per_sample,
    _parameters,
    _whole_set,
    _iterated,
    _converged,
    _restarts,
    _losses,
    _gradient_free,
    _noise,
    _deterministic,
    _identified,
    _larger_radii,
    _transfer,
)


def _declared(record: Record, card: ModelCard | None) -> list[Item]:
    about = card.declared if card else None
    training = record.manifest.model.training
    items = {
        "Training data beyond the data set's own": card.extra_data if card else "",
        "Training": f"{training}; recipe in the card" if card and training else training,
        "Why this radius": about.eps_reason if about else "",
        "Attacks adapted to this defence": about.adaptive_attack if about else "",
        "Parts without gradients, or random": about.non_differentiable if about else "",
        "Against earlier work": about.prior_work if about else "",
        "Provable bound": about.certificate if about else "",
    }
    where = "the card says nothing of it" if card else "no card is about these weights"
    return [
        Item(name, "declared", evidence) if evidence else Item(name, "not declared", where)
        for name, evidence in items.items()
    ]


def checklist_table(items: list[Item]) -> Table:
    """The checklist as a table."""
    rows = tuple(
        (
            i.name,
            "decided from the record" if i.automatic else "declared by the authors",
            i.status,
            i.evidence,
        )
        for i in items
    )
    data = tuple(
        {"item": i.name, "automatic": i.automatic, "status": i.status, "said": i.evidence} for i in items
    )
    note = "After Carlini et al., On Evaluating Adversarial Robustness, arXiv 1902.06705"
    return Table("Evaluation checklist", note, columns("Item", "By", "Status", "What is known"), rows, data)
