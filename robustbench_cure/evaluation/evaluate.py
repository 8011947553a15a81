"""The evaluation: which samples, in which shards, and a record at the end.

Work is cut into shards of fixed size, in the order of the (seeded) subset. A shard's rows depend on the
shard alone, so a run that was killed and resumed, or split over machines and merged, writes the table
that one uninterrupted run writes, byte for byte. `ShardWork` does one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from robustbench_cure.attacks import Candidates
from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.audit import audit_battery, draw
from robustbench_cure.evaluation.flags import Flag, stored
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.evaluation.provenance import environment, gradient_rate
from robustbench_cure.evaluation.record import Manifest, Record, RunConfig, read_manifest, write_manifest
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.evaluation.shard import ShardWork
from robustbench_cure.evaluation.storage import (
    AUDIT,
    AUDIT_REST,
    Shard,
    check_same_run,
    finish,
    now,
    read_audit,
    read_shards,
    read_unfinished,
    with_audit,
    write_shard,
)
from robustbench_cure.protocol.cards import Audit, Battery
from robustbench_cure.protocol.specs import Peer

if TYPE_CHECKING:
    import pandas as pd

#: Samples in one shard: the unit of resuming and splitting. Part of a run's identity.
SHARD_SIZE = 512

#: Called with (samples done, samples in all, what is being done).
Progress = Callable[[float, int, str], None]


@torch.inference_mode(False)  # where gradients are zero
def evaluate(
    classifier: Classifier,
    battery: Battery,
    data: EvalSet,
    *,
    n: int = 0,
    seed: int | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    shard: tuple[int, int] = (1, 1),
    shard_size: int = SHARD_SIZE,
    allow_unreliable: bool = False,
    save_adversarials: bool = False,
    command: str = "",
    progress: Progress | None = None,
    audit: int | None = None,
    attacks: dict[str, Callable[..., Candidates]] | None = None,
    flags: list[Flag] | None = None,
) -> Record:
    """Evaluate one model under one battery.

    Args:
        classifier: the model, see `load_model`.
        battery: the protocol, see `load_battery`.
        data: the images, see `load_dataset`.
        n: how many samples (0: what the battery asks for, or all).
        seed: of the attacks' random draws; default: the battery's.
        out: directory of the record; None keeps it in memory.
        resume: go on with the run that ``out`` holds.
        shard: (i, k) does the i-th of k parts, for `merge`.
        shard_size: samples in one shard.
        allow_unreliable: evaluate a stochastic or batch-dependent model all the same, marked as such.
        save_adversarials: also write every attack's candidates, float32, to ``out/adversarials``.
        command: command line for the provenance.
        progress: called for every attack on every shard.
        audit: how many survivors the battery's audit draws, 0 for all; default: the battery's own number, or
            that of the run that is resumed, which 0 alone may change.
        attacks: implementations by kind; default: `ATTACKS`.
        flags: what `admit` returned, where it was asked already.

    Returns:
        The record; complete, or partial when ``shard`` asks for one part.

    Raises:
        UsageError: the model does not fit, or ``out`` holds another run.
        RunError: the model failed, or the device ran out of memory at batch size 1.
        TypeError: a network, a name or a bare array where one of the classes above belongs.
    """
    _check_types(classifier, battery, data)
    if flags is None:
        flags = admit(classifier, battery, data, n=n, allow_unreliable=allow_unreliable)
    if audit is not None and battery.audit is None:
        raise UsageError(f"audit: battery {battery.id!r} has no audit; `reference` has one")
    subset = selected(battery, data, n)
    config = RunConfig(
        seed=battery.seed if seed is None else seed,
        device=str(classifier.device),
        precision=classifier.precision,
        shard_size=shard_size,
        batch_size=classifier.batch_size,
        shard="" if shard == (1, 1) else f"{shard[0]}/{shard[1]}",
        allow_unreliable=allow_unreliable,
        audit=battery.audit.samples if battery.audit and audit is None else audit,
    )
    manifest = Manifest(
        started=now(),
        model=classifier.model_info(),
        battery=battery,
        battery_digest=battery.digest,
        data=subset.info(),
        config=config,
        environment=environment(classifier.device, command, _peers(battery)),
        flags=flags,
    )
    names = {spec.implementation for spec in battery.every_attack}
    replaced = sorted(name for name in names if attacks and attacks.get(name) is not ATTACKS.get(name))
    if replaced:
        manifest.flags.append(Flag(kind="replaced_attacks", evidence=", ".join(replaced)))
    run = _Run(classifier, manifest, subset, attacks or ATTACKS, progress or (lambda *_: None), audit)
    try:
        return run.execute(Path(out) if out is not None else None, shard, resume, save_adversarials)
    finally:
        classifier.callback = None


def _check_types(classifier: object, battery: object, data: object) -> None:
    """Say what belongs there: networks and names are what people give first."""
    wanted = (
        (
            classifier,
            Classifier,
            "Classifier(net, num_classes=10, input_shape=(3, 32, 32)) or load_model(id)",
        ),
        (battery, Battery, "load_battery(id)"),
        (data, EvalSet, "load_dataset(name) or from_arrays(name, split, x, y)"),
    )
    for given, kind, how in wanted:
        if not isinstance(given, kind):
            raise TypeError(f"evaluate needs a {kind.__name__}, got a {type(given).__name__}: use {how}")


def _peers(battery: Battery) -> list[str]:
    """Versions of the libraries whose attacks a battery has."""
    kinds = {spec.kind for spec in battery.every_attack if isinstance(spec, Peer)}
    if not kinds:
        return []
    from robustbench_cure.interop.peers import version

    return sorted({version(kind) for kind in kinds})


def selected(battery: Battery, data: EvalSet, n: int = 0) -> EvalSet:
    """The samples of an evaluation: ``n``, or what the battery asks for, or all."""
    return data.subset(n or min(battery.n, len(data)))


def admit(
    classifier: Classifier, battery: Battery, data: EvalSet, *, n: int = 0, allow_unreliable: bool = False
) -> list[Flag]:
    """Check whether a model can be evaluated at all, before anything is written.

    Args:
        classifier: the model.
        battery: the protocol, whose attacks must fit the model.
        data: the images; the first of those selected are shown to the model.
        n: how many samples (0: what the battery asks for, or all).
        allow_unreliable: accept a stochastic or batch-dependent model.

    Returns:
        The flags of `preflight`.

    Raises:
        UsageError: the model fits neither data nor battery, or is unreliable and that is not allowed.
    """
    subset = selected(battery, data, n)
    flags = with_memory(classifier, lambda: preflight(classifier, subset))
    unreliable = [flag for flag in flags if flag.about.severity == "unreliable"]
    if unreliable and not allow_unreliable:
        raise UsageError(
            f"{unreliable[0].about.title.lower()}: {unreliable[0].evidence}; "
            "mend the model, or pass --allow-unreliable to mark every row"
        )
    for spec in battery.every_attack:
        if classifier.num_classes < spec.classes:
            raise UsageError(
                f"attack {spec.id!r}: the DLR loss needs at least {spec.classes} classes, "
                f"the model has {classifier.num_classes}"
            )
        if isinstance(spec, Peer):
            from robustbench_cure.interop.peers import check

            check(spec)
    return flags


class _Run:
    """One evaluation under way."""

    def __init__(
        self,
        classifier: Classifier,
        manifest: Manifest,
        data: EvalSet,
        attacks: dict[str, Callable[..., Candidates]],
        progress: Progress,
        asked: int | None,
    ) -> None:
        self.asked = asked  # number of audited survivors that this call names
        self.classifier, self.manifest, self.data = classifier, manifest, data
        self.attacks, self.progress, self.battery = attacks, progress, manifest.battery
        self.search = self.battery.model_copy(update={"audit": None})  # what every shard is given
        self.done = 0

    def execute(
        self, out: Path | None, shard: tuple[int, int], resume: bool, save_adversarials: bool
    ) -> Record:
        import pandas as pd

        starts = list(range(0, len(self.data), self.manifest.config.shard_size))
        mine = [k for k in range(len(starts)) if k % shard[1] == shard[0] - 1]
        if not mine:
            raise UsageError(
                f"--shard {shard[0]}/{shard[1]}: there {'is' if len(starts) == 1 else 'are'} only "
                f"{len(starts)} shard{'s' * (len(starts) > 1)} of {self.manifest.config.shard_size} samples; "
                "ask for fewer parts"
            )
        self.total = sum(len(self._ranks(starts[k])) for k in mine)
        finished = self._open(out, resume) if out else {}
        if not self.manifest.environment.gradient_rate:
            self.manifest.environment.gradient_rate = with_memory(self.classifier, self._gradient_rate)
        self.progress(0, self.total, "clean pass")
        parts: list[Shard] = []
        for k in mine:
            ranks = self._ranks(starts[k])
            part = finished[k] if k in finished else self._shard(k, ranks, out, save_adversarials)
            self.done += len(ranks)
            self.progress(self.done, self.total, "shard written" if out else "shard done")
            parts.append(part)
        samples = pd.concat([part.rows for part in parts], ignore_index=True)
        complete = len(mine) == len(starts)
        if complete and self.battery.audit is not None:
            samples = self._audit(self.battery.audit, samples, parts, out, save_adversarials)
        else:
            samples = with_audit(samples, self.battery)
        return finish(self.manifest, parts, samples, complete, out)

    def _audit(
        self,
        audit: Audit,
        samples: pd.DataFrame,
        parts: list[Shard],
        out: Path | None,
        save_adversarials: bool,
    ) -> pd.DataFrame:
        """Attack survivors with the battery's audit, add its parts, and return the table with its columns.

        Where an audit is enlarged to all survivors, those that it had not drawn are a part of their own: what
        was found stays.
        """
        config, battery = self.manifest.config, audit_battery(self.battery, audit)
        survivors = draw(samples, self.battery, 0, config.seed)
        draws = draw(samples, self.battery, config.audit or 0, config.seed)
        work = [(AUDIT, draws > 0)]
        if config.audit_rest:
            work.append((AUDIT_REST, (survivors > 0) & (draws == 0)))
            draws = survivors
        audited = []
        for name, rows in work:
            ranks = [int(rank) for rank in rows.nonzero()[0]]
            data = self.data.take(ranks)
            part = read_audit(out, name, battery, data.ids) if out else None
            if part is None:
                self.total += len(ranks)
                shard = ShardWork(
                    self.classifier,
                    self.manifest,
                    data,
                    ranks,
                    battery,
                    self.attacks,
                    lambda doing: self._announce(f"audit, {doing}"),
                )
                before = read_audit(out, name, battery, data.ids, finished=False) if out else None
                part = _written(shard, name, before, out, save_adversarials)
                self.done += len(ranks)
                self.progress(self.done, self.total, "audit written" if out else "audit done")
            part.cost["audit"] = part.cost.pop("clean")  # its pass over the images as they are
            audited.append(part)
        parts += audited
        return with_audit(samples, self.battery, draws, audited)

    def _gradient_rate(self) -> float:
        device, rows = self.classifier.device, self.classifier.batch_size
        first = (of[:rows].to(device) for of in (self.data.images, self.data.labels))
        return gradient_rate(self.classifier, *first)

    def _ranks(self, start: int) -> range:
        return range(start, min(start + self.manifest.config.shard_size, len(self.data)))

    def _open(self, out: Path, resume: bool) -> dict[int, Shard]:
        """Start a run directory, or take over the finished shards of the one that is there."""
        if (out / "manifest.json").exists():
            if not resume:
                raise UsageError(
                    f"{out}: already holds a run; continue it with --resume or choose another --out"
                )
            before = read_manifest(out)
            check_same_run(before, self.manifest, out)
            self.manifest.started = before.started
            self.manifest.environment.gradient_rate = before.environment.gradient_rate
            self._enlarge(before, out)
            earlier = [flag for flag in before.flags if flag.about.origin == "preflight"]
            self.manifest.flags = stored([*earlier, *self.manifest.flags])
            if before.status != "complete":  # one that is stays readable while its audit is enlarged
                write_manifest(out, self.manifest)
            return read_shards(out, self.search)
        write_manifest(out, self.manifest)
        return {}

    def _enlarge(self, before: Manifest, out: Path) -> None:
        """Go on with the audit that the run has, or enlarge it to all survivors.

        Another number would be another draw: to try numbers until one suits would make the bound false.
        """
        config, earlier, asked = self.manifest.config, before.config, self.asked
        if earlier.audit is None:
            return
        if asked not in (None, 0, earlier.audit):
            raise UsageError(
                f"{out}: its audit draws {earlier.audit or 'all'} survivors, not {asked}; "
                "go on with it, or enlarge it with --audit all"
            )
        config.audit = earlier.audit
        config.audit_rest = earlier.audit_rest or (asked == 0 and earlier.audit != 0)

    def _shard(self, index: int, ranks: range, out: Path | None, save_adversarials: bool) -> Shard:
        data = self.data.take(list(ranks))
        work = ShardWork(
            self.classifier, self.manifest, data, ranks, self.search, self.attacks, self._announce
        )
        before = read_unfinished(out, index, self.search) if out else None
        return _written(work, f"{index:04d}", before, out, save_adversarials)

    def _announce(self, doing: str) -> None:
        """Say what is being done now, and every second that it is still being done."""
        self.progress(self.done, self.total, doing)
        started, last = self.classifier.forwards, time.monotonic()

        def report_passes() -> None:
            nonlocal last
            if time.monotonic() - last >= 1.0:
                last = time.monotonic()
                passes = self.classifier.forwards - started
                self.progress(self.done, self.total, f"{doing}: {passes:,} passes")

        self.classifier.callback = report_passes


def _written(
    work: ShardWork, name: str, before: Shard | None, out: Path | None, save_adversarials: bool
) -> Shard:
    """Do a shard, or what is left of it, and write it."""
    if out is None:
        return work.run()
    part = work.run(
        before,
        checkpoint=lambda unfinished: write_shard(out, name, unfinished, finished=False),
        adversarials=out / "adversarials" / name if save_adversarials else None,
    )
    write_shard(out, name, part)
    return part
