"""The evaluation: clean pass, attacks on the living samples, verification, a record after every shard.

Work is cut into shards of fixed size, in the order of the (seeded) subset. A shard's rows depend on the
shard alone, so a run that was killed and resumed, or split over machines and merged, writes the table
that one uninterrupted run writes, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustbench_cure.attacks import ATTACKS, Noise, Proposal, pgd, pgd_ladder
from robustbench_cure.attacks.losses import margins
from robustbench_cure.cards import PGD, AttackSpec, Battery, DeepFool, Peer
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.flags import Flag
from robustbench_cure.judge import RANDOM_STATE, Verdict, guarded, judge
from robustbench_cure.preflight import preflight
from robustbench_cure.provenance import environment
from robustbench_cure.record import (
    Cost,
    DataInfo,
    Manifest,
    Record,
    RunConfig,
    read_manifest,
    typed,
    write_manifest,
)
from robustbench_cure.shards import (
    Shard,
    attack_columns,
    check_same_run,
    finish,
    now,
    read_shards,
    read_unfinished,
    save_proposals,
    write_shard,
)

T = TypeVar("T")

#: Samples in one shard: the unit of resuming and splitting. Part of a run's identity.
SHARD_SIZE = 512

#: Seconds between two writings of what is done of a shard, attack by attack.
KEEP_INTERVAL = 30.0

#: Called with (samples done, samples in all, what is being done).
Progress = Callable[[float, int, str], None]


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
    attacks: dict[str, Callable[..., Proposal]] | None = None,
    flags: list[Flag] | None = None,
) -> Record:
    """Judge one model by one battery.

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
        save_adversarials: also write every attack's proposals, float32, to ``out/adversarials``.
        command: command line for the provenance.
        progress: told of every attack on every shard.
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
    subset = chosen(battery, data, n)
    config = RunConfig(
        seed=battery.seed if seed is None else seed,
        subset_seed=0,
        device=str(classifier.device),
        precision=classifier.precision,
        shard_size=shard_size,
        batch_size=classifier.batch_size,
        shard="" if shard == (1, 1) else f"{shard[0]}/{shard[1]}",
        allow_unreliable=allow_unreliable,
    )
    manifest = Manifest(
        started=now(),
        model=classifier.model_info(),
        battery=battery,
        battery_digest=battery.digest,
        data=DataInfo(
            name=subset.name,
            split=subset.split,
            n=len(subset),
            total=subset.total,
            digest=subset.digest,
            classes=list(subset.classes),
            notes=subset.notes,
        ),
        config=config,
        environment=environment(classifier.device, command, _peers(battery)),
        flags=flags,
    )
    run = _Run(classifier, manifest, subset, attacks or ATTACKS, progress or (lambda *_: None))
    try:
        return run.execute(Path(out) if out is not None else None, shard, resume, save_adversarials)
    finally:
        classifier.heartbeat = None


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
    kinds = {spec.kind for spec in battery.attacks if isinstance(spec, Peer)}
    if not kinds:
        return []
    from robustbench_cure.interop.peers import version

    return sorted({version(kind) for kind in kinds})


def chosen(battery: Battery, data: EvalSet, n: int = 0) -> EvalSet:
    """The samples of an evaluation: ``n``, or what the battery asks for, or all."""
    return data.subset(n or min(battery.n, len(data)))


def admit(
    classifier: Classifier, battery: Battery, data: EvalSet, *, n: int = 0, allow_unreliable: bool = False
) -> list[Flag]:
    """Look whether a model can be judged at all, before anything is written.

    Returns:
        The flags of `preflight`.

    Raises:
        UsageError: the model fits neither data nor battery, or is unreliable and that is not allowed.
    """
    subset = chosen(battery, data, n)
    flags = with_memory(classifier, lambda: preflight(classifier, subset))
    unreliable = [flag for flag in flags if flag.about.severity == "unreliable"]
    if unreliable and not allow_unreliable:
        raise UsageError(
            f"{unreliable[0].about.title.lower()}: {unreliable[0].evidence}; "
            "mend the model, or pass --allow-unreliable to mark every row"
        )
    for spec in battery.attacks:
        if isinstance(spec, PGD) and spec.loss == "dlr" and classifier.num_classes < 3:
            raise UsageError(f"attack {spec.id!r}: the DLR loss needs at least 3 classes")
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
        attacks: dict[str, Callable[..., Proposal]],
        progress: Progress,
    ) -> None:
        self.classifier, self.manifest, self.data = classifier, manifest, data
        self.attacks, self.progress = attacks, progress
        self.battery = manifest.battery
        self.threat = self.battery.threat.model
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
        self.progress(0, self.total, "clean pass")
        parts: list[Shard] = []
        for k in mine:
            ranks = self._ranks(starts[k])
            if k in finished:
                part = finished[k]
            else:
                part = self._shard(k, ranks, out, save_adversarials)
                if out:
                    write_shard(out, k, part)
            self.done += len(ranks)
            self.progress(self.done, self.total, "shard written" if out else "shard done")
            parts.append(part)
        samples = pd.concat([part.rows for part in parts], ignore_index=True)
        complete = len(mine) == len(starts)
        return finish(self.manifest, parts, samples, complete, out)

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
            write_manifest(out, self.manifest)
            return read_shards(out, self.battery)
        write_manifest(out, self.manifest)
        return {}

    # --- one shard ------------------------------------------------------------------------------------

    def _shard(self, index: int, ranks: range, out: Path | None, save_adversarials: bool) -> Shard:
        import pandas as pd

        adversarials = out / "adversarials" / f"{index:04d}" if out and save_adversarials else None
        part_data = self.data.take(list(ranks))
        device = self.classifier.device
        x, y = part_data.images.to(device), part_data.labels.to(device)
        started = time.perf_counter()
        logits = self._ask("the clean pass", lambda: self.classifier.logits(x))
        clean_margin, pred = margins(logits, y), logits.argmax(1)
        columns: dict[str, Any] = {
            "sample_id": list(part_data.ids),
            "rank": list(ranks),
            "image_sha256": list(part_data.hashes),
            "label": y.cpu().numpy(),
            "clean_pred": pred.cpu().numpy(),
            "clean_margin": clean_margin.cpu().numpy(),
        }
        shard = Shard(pd.DataFrame())
        shard.cost["clean"] = Cost(seconds=time.perf_counter() - started, forwards=len(x))
        before = read_unfinished(out, index, self.battery) if out else None
        if before is not None:
            shard = before
            started -= before.seconds
            columns |= {str(name): before.rows[name] for name in before.rows if name not in columns}
        kept = time.monotonic()
        correct = pred == y
        rank = torch.arange(ranks.start, ranks.stop, device=device)
        for group in groups(self.battery.attacks, shared=self.attacks.get("pgd") is pgd):
            if all(spec.id in shard.cost for spec in group):
                continue  # done by a run that was interrupted
            limit = group[0].limit
            living = (correct & (rank < limit) if limit else correct).nonzero().squeeze(1)
            self._announce(group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}")
            proposals = self._attack(
                group, x[living], y[living], [part_data.ids[i] for i in living.tolist()], shard
            )
            for spec, proposal in zip(group, proposals, strict=True):
                verdict = self._judge(spec, x[living], y[living], proposal)
                columns |= attack_columns(spec.id, len(x), living.cpu(), proposal, verdict)
            if adversarials:
                save_proposals(adversarials, group, proposals, [part_data.ids[i] for i in living.tolist()])
            if out and time.monotonic() - kept >= KEEP_INTERVAL:
                kept = time.monotonic()
                done = tuple(spec for spec in self.battery.attacks if spec.id in shard.cost)
                shard.seconds = time.perf_counter() - started
                shard.rows = typed(pd.DataFrame(columns), self.battery.model_copy(update={"attacks": done}))
                write_shard(out, index, shard, finished=False)
        shard.seconds = time.perf_counter() - started
        shard.rows = typed(pd.DataFrame(columns), self.battery)
        return shard

    def _announce(self, doing: str) -> None:
        """Say what is being done now, and every second that it is still being done."""
        self.progress(self.done, self.total, doing)
        started, last = self.classifier.forwards, time.monotonic()

        def beat() -> None:
            nonlocal last
            if time.monotonic() - last >= 1.0:
                last = time.monotonic()
                passes = self.classifier.forwards - started
                self.progress(self.done, self.total, f"{doing}: {passes:,} passes")

        self.classifier.heartbeat = beat

    def _judge(self, spec: AttackSpec, x: Tensor, y: Tensor, proposal: Proposal) -> Verdict:
        minimal = isinstance(spec, DeepFool) and spec.mode == "minimal"
        if isinstance(spec, Peer):
            from robustbench_cure.interop import peers

            minimal = peers.minimal(spec.kind)
        clip = not isinstance(spec, DeepFool) or spec.clip
        return self._ask(
            f"the check of attack {spec.id!r}",
            lambda: judge(self.classifier, x, y, proposal, self.threat, minimal=minimal, clip=clip),
        )

    def _ask(self, what: str, work: Callable[[], T]) -> T:
        """Passes through the user's model, which may raise what it likes."""
        try:
            return with_memory(self.classifier, work)
        except (RunError, UsageError):
            raise
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise RunError(f"the model failed during {what}: {reason}") from error

    def _attack(
        self, group: list[AttackSpec], x: Tensor, y: Tensor, ids: list[str], shard: Shard
    ) -> list[Proposal]:
        """Run one group on its living samples; charge its cost, note its side effects."""
        kind = group[0].kind
        noise = Noise.for_samples(self.manifest.config.seed, kind, ids, x.device)
        hyper = group[0].hyper

        def work(given: Tensor) -> list[Proposal]:
            if len(group) == 1:
                return [
                    self.attacks[group[0].implementation](
                        self.classifier, given, y, threat=self.threat, noise=noise, **hyper
                    )
                ]
            rungs = tuple(spec.hyper["steps"] for spec in group)
            rest = {key: value for key, value in hyper.items() if key != "steps"}
            return pgd_ladder(self.classifier, given, y, threat=self.threat, noise=noise, rungs=rungs, **rest)

        started = time.perf_counter()
        try:
            proposals, effects = with_memory(self.classifier, lambda: guarded(self.classifier, x, work))
        except (RunError, UsageError):
            raise
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise RunError(f"attack {group[0].id!r} failed: {reason}") from error
        if self.classifier.device.type == "cuda":
            torch.cuda.synchronize(self.classifier.device)
        seconds = time.perf_counter() - started
        passes = [int((p.forwards + p.backwards).sum()) for p in proposals]
        for spec, proposal, own in zip(group, proposals, passes, strict=True):
            # A rung is charged the share of the common trajectory that it needs.
            share = own / max(passes) if max(passes) else 1.0
            shard.cost[spec.id] = Cost(
                seconds=seconds * share,
                forwards=int(proposal.forwards.sum()),
                backwards=int(proposal.backwards.sum()),
            )
        if any(flag.kind == "stochastic" for flag in self.manifest.flags):
            effects = [effect for effect in effects if effect != RANDOM_STATE]  # the model's own doing
        contained = [effect for proposal in proposals for effect in proposal.effects]
        for kind, seen in (("side_effects", effects), ("contained", contained)):
            shard.flags += [Flag(kind=kind, evidence=effect, attack=group[0].id) for effect in seen]
        return proposals


def with_memory(classifier: Classifier, work: Callable[[], T]) -> T:
    """Run; where the device's memory does not suffice, halve the batch and run again.

    Raises:
        RunError: not even one image fits.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if classifier.batch_size == 1:
                raise RunError("out of device memory even at batch size 1") from None
            classifier.batch_size //= 2
            if classifier.device.type == "cuda":
                torch.cuda.empty_cache()


def groups(specs: Iterable[AttackSpec], *, shared: bool = True) -> Iterator[list[AttackSpec]]:
    """Attacks that run together: PGD entries that differ in ``steps`` alone, in order of steps."""
    pending = list(specs)
    while pending:
        first = pending.pop(0)
        group = [first]
        if shared and isinstance(first, PGD):
            same = [s for s in pending if isinstance(s, PGD) and _ladder_key(s) == _ladder_key(first)]
            steps = {first.steps}
            for spec in same:
                if spec.steps not in steps:
                    steps.add(spec.steps)
                    group.append(spec)
                    pending.remove(spec)
            group.sort(key=lambda spec: spec.hyper["steps"])
        yield group


def _ladder_key(spec: PGD) -> tuple[object, ...]:
    return (spec.limit, *(value for key, value in spec.hyper.items() if key != "steps"))
