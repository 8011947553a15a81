"""Flags that only the whole table can raise."""

from __future__ import annotations

from robustbench_cure.flags import Flag
from robustbench_cure.record import Record

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
#: Share of covered samples that a gradient-free attack may break alone before it is flagged.
BLACK_BOX_SHARE = 0.01


def run_flags(record: Record) -> list[Flag]:
    """Everything a finished table and its manifest say about how far the numbers can be trusted."""
    flags = [*_data_flags(record), *_near_chance(record), *_violations(record)]
    stronger = _black_box(record)
    return flags + ([stronger] if stronger else [])


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
