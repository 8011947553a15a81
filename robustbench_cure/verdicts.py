"""Flags that follow from the whole table and its manifest, and from nothing else.

They are made anew whenever a record is read, like every number that is derived from one: a rule that came
later speaks about records that were made before, and two records are always held to the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction

from robustbench_cure.flags import Flag
from robustbench_cure.gate.paired import Flips
from robustbench_cure.record import NO_ANSWER, Record
from robustbench_cure.specs import PGD, AttackSpec, DeepFool

#: Kinds of flag that `run_flags` raises.
DERIVED = {
    "other_data",
    "fewer_samples",
    "lossy_data",
    "near_chance",
    "violations",
    "black_box_stronger",
    "cross_entropy_weaker",
    "non_finite_gradient",
    "non_finite_logits",
    "searched_again",
    "nothing_broken",
}

#: Attacks that use no gradient.
GRADIENT_FREE = {
    "spsa",
    "uniform_noise",
    "autoattack:square",
    "torchattacks:Square",
    "torchattacks:SPSA",
    "torchattacks:OnePixel",
    "torchattacks:Pixle",
    "foolbox:BoundaryAttack",
    "foolbox:HopSkipJumpAttack",
    "art:SquareAttack",
    "art:HopSkipJump",
    "art:BoundaryAttack",
}
#: Samples that a flag names, and attacked samples below which nothing is said of a battery that broke none.
NAMED, FEWEST = 5, 10
#: Share of covered samples that a gradient-free attack may break alone before it is flagged.
BLACK_BOX_SHARE = 0.01
#: Robust accuracy that cross-entropy may leave standing beyond another loss, and the level of the exact test.
WEAKER, LEVEL = Fraction(3, 100), 0.01


def run_flags(record: Record) -> list[Flag]:
    """Everything a finished table and its manifest say about how far the numbers can be trusted."""
    flags = [*_data_flags(record), *_near_chance(record), *_violations(record), *_non_finite(record)]
    flags += _searched_again(record)
    found = (_nothing_broken(record), _black_box(record), _cross_entropy(record))
    return flags + [flag for flag in found if flag is not None]


def derive(record: Record) -> None:
    """Replace the flags that follow from the table by those that follow from it now."""
    manifest = record.manifest
    manifest.flags = [flag for flag in manifest.flags if flag.kind not in DERIVED] + run_flags(record)


def failures(records: Sequence[Record], kinds: Collection[str]) -> list[str]:
    """A line for each of some kinds of flag that a record raises."""
    raised = [(r.manifest.model.id, flag.kind) for r in records for flag in r.manifest.flags]
    return [f"failed: {kind} is raised for {model}" for model, kind in dict.fromkeys(raised) if kind in kinds]


def _data_flags(record: Record) -> list[Flag]:
    battery, data = record.manifest.battery, record.manifest.data
    flags = []
    if battery.dataset and battery.dataset != data.name:
        flags.append(
            Flag(
                kind="other_data",
                evidence=f"{battery.id} is defined on {battery.dataset}, this is {data.name}",
            )
        )
    asked = battery.n or data.total
    if data.n < asked:
        flags.append(
            Flag(kind="fewer_samples", evidence=f"{data.n} of {asked} samples", value=data.n, threshold=asked)
        )
    if "lossy" in data.notes:
        flags.append(Flag(kind="lossy_data", evidence=data.notes))
    return flags


def _near_chance(record: Record) -> list[Flag]:
    chance, rate = 1.0 / len(record.manifest.data.classes), record.clean_accuracy
    if rate.interval[0] > chance:
        return []
    evidence = f"{rate.count} of {rate.total} images are right; guessing gives {chance:.0%}"
    return [Flag(kind="near_chance", evidence=evidence, value=rate.value, threshold=chance)]


def _violations(record: Record) -> list[Flag]:
    flags = []
    for spec in record.attacks:
        column = record.samples[f"{spec.id}.violation"]
        count = int((column != "").sum())
        if count:
            commonest = column[column != ""].mode().iloc[0]
            attacked = int(record.samples[f"{spec.id}.attacked"].sum())
            evidence = f"{count} of {attacked} returned images: {commonest}"
            flags.append(Flag(kind="violations", evidence=evidence, value=count, threshold=0, attack=spec.id))
    return flags


def _non_finite(record: Record) -> list[Flag]:
    flags, samples = [], record.samples
    rows = {"": samples["clean_pred"] == NO_ANSWER}
    rows |= {
        spec.id: samples[f"{spec.id}.broken"] & (samples[f"{spec.id}.pred"] == NO_ANSWER).fillna(False)
        for spec in record.attacks
    }
    for attack, bad in rows.items():
        ids = samples["sample_id"][bad.astype(bool)].tolist()
        if ids:
            named = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
            where = "points that the attack found for" if attack else "the images"
            evidence = f"NaN or infinite logits at {where} {named}"
            flags.append(
                Flag(kind="non_finite_logits", evidence=evidence, value=len(ids), threshold=0, attack=attack)
            )
    for attack, cost in record.manifest.cost.items():
        if cost.non_finite:
            evidence = (
                f"{cost.non_finite:,} of {cost.backwards:,} input gradients had NaN or infinite entries"
            )
            flags.append(
                Flag(
                    kind="non_finite_gradient",
                    evidence=evidence,
                    value=cost.non_finite,
                    threshold=0,
                    attack=attack,
                )
            )
    return flags


def _searched_again(record: Record) -> list[Flag]:
    flags = []
    for attack, cost in record.manifest.cost.items():
        if cost.searched_again:
            attacked = int(record.samples[f"{attack}.attacked"].sum())
            evidence = f"{cost.searched_again:,} of {attacked:,} samples"
            flags.append(
                Flag(kind="searched_again", evidence=evidence, value=cost.searched_again, attack=attack)
            )
    return flags


def _nothing_broken(record: Record) -> Flag | None:
    samples, correct = record.samples, record.clean_accuracy.count
    tried = [spec.id for spec in record.attacks]
    attacked = samples[[f"{name}.attacked" for name in tried]].any(axis=1)
    broken = samples[[f"{name}.broken" for name in tried]].any(axis=1)
    if not record.manifest.battery.threat.model.radius or int(attacked.sum()) < FEWEST or bool(broken.any()):
        return None
    evidence = f"all of {int(attacked.sum())} attacked samples survived ({correct} are classified correctly)"
    return Flag(kind="nothing_broken", evidence=evidence, value=0, threshold=0)


def _black_box(record: Record) -> Flag | None:
    samples = record.samples
    blind = [spec.id for spec in record.attacks if spec.kind in GRADIENT_FREE]
    sighted = [spec.id for spec in record.attacks if spec.kind not in GRADIENT_FREE]
    if not blind or not sighted:
        return None
    by_gradient = samples[[f"{name}.broken" for name in sighted]].any(axis=1)
    for name in blind:
        alone = int((samples[f"{name}.broken"] & ~by_gradient).sum())
        covered = int(record.covered(name).sum())
        if covered and alone / covered > BLACK_BOX_SHARE:
            return Flag(
                kind="black_box_stronger",
                evidence=f"{alone} of {covered} samples were broken by {name} alone",
                value=alone / covered,
                threshold=BLACK_BOX_SHARE,
                attack=name,
            )
    return None


def _cross_entropy(record: Record) -> Flag | None:
    """Did another loss break what the longest PGD on cross-entropy left standing?"""
    runs = [spec for spec in record.attacks if isinstance(spec, PGD) and spec.loss == "ce"]
    if not runs:
        return None
    run = max(runs, key=lambda spec: spec.steps * spec.restarts)
    found = [(_flips(record, run, other), other) for other in record.attacks if _other_loss(other, run)]
    sure = [pair for pair in found if pair[0].fell_beyond(WEAKER) and pair[0].p_fall <= LEVEL]
    if not sure:
        return None
    flips, other = min(sure, key=lambda pair: pair[0].change)
    evidence = (
        f"of {flips.n} samples {flips.before} hold under {run.name} and {flips.after} under {other.name}: "
        f"{flips.lost} are broken by the latter alone, {flips.gained} by the former alone "
        f"(exact test, p = {flips.p_fall:.1g})"
    )
    return Flag(
        kind="cross_entropy_weaker",
        evidence=evidence,
        value=-flips.change,
        threshold=float(WEAKER),
        attack=run.id,
    )


def _other_loss(spec: AttackSpec, run: PGD) -> bool:
    """Whether an attack differs from a PGD by its loss, and not by more steps."""
    return isinstance(spec, DeepFool) or (
        isinstance(spec, PGD) and spec.loss != "ce" and spec.steps <= run.steps
    )


def _flips(record: Record, run: AttackSpec, other: AttackSpec) -> Flips:
    """What holds under two attacks, on the samples that both cover."""
    both = (record.covered(run.id) & record.covered(other.id)).to_numpy(bool)
    held = [
        (record.clean_correct & ~record.samples[f"{spec.id}.broken"]).to_numpy(bool)[both]
        for spec in (run, other)
    ]
    return Flips.between(*held)
