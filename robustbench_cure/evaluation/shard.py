"""One shard under way: clean pass, attacks on the correctly classified samples, verification.

Most attacks take these rows of a shard all at once, so that their batches stay full. Where a row costs much,
an attack is given them in pieces: what a killed run has finished of it is then on disk. Pieces are cut by the
attack's own parameters, never by machine or batch size, so that a resumed run cuts where an uninterrupted one
does, and computes the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustbench_cure.attacks import Candidates, Noise, pgd, pgd_checkpoints
from robustbench_cure.attacks.losses import margins, predictions
from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Cost, Manifest, typed
from robustbench_cure.evaluation.storage import Shard, fill_columns, read_candidates, save_candidates
from robustbench_cure.evaluation.verify import RANDOM_STATE, Verification, guarded, verify
from robustbench_cure.protocol.specs import PGD, SPSA, AttackSpec, DeepFool, Peer

T = TypeVar("T")

#: Seconds between two writings of what is done of a shard.
CHECKPOINT_INTERVAL = 30.0
#: Images that a piece of SPSA passes forward at most: minutes on a processor, and passes that fill a GPU.
PIECE_PASSES = 2**19
#: Rows in a piece of another library's attack, whose cost is not known: enough to fill a batch.
PIECE_ROWS = 128


class ShardWork:
    """One shard of an evaluation.

    Args:
        classifier: the model.
        manifest: of the run.
        data: the shard's samples.
        ranks: theirs, in the order of the subset.
        attacks: implementations by kind.
        announce: told what is being done.
    """

    def __init__(
        self,
        classifier: Classifier,
        manifest: Manifest,
        data: EvalSet,
        ranks: range,
        attacks: dict[str, Callable[..., Candidates]],
        announce: Callable[[str], None],
    ) -> None:
        import pandas as pd

        self.classifier, self.manifest, self.data, self.ranks = classifier, manifest, data, ranks
        self.attacks, self.announce = attacks, announce
        self.battery, self.threat = manifest.battery, manifest.battery.threat
        self.x, self.y = data.images.to(classifier.device), data.labels.to(classifier.device)
        self.columns: dict[str, Any] = {}
        self.shard = Shard(pd.DataFrame())

    def run(
        self,
        before: Shard | None = None,
        *,
        checkpoint: Callable[[Shard], None] = lambda _: None,
        adversarials: Path | None = None,
    ) -> Shard:
        """Do it.

        Args:
            before: what an interrupted run has finished of it.
            checkpoint: writes what is finished, every `CHECKPOINT_INTERVAL` seconds.
            adversarials: stem of the files that candidates go to; None: they are not written.
        """
        self.checkpoint, self.adversarials = checkpoint, adversarials
        self.started = time.perf_counter()
        correct = self._clean_pass()
        if before is not None:
            self._resume(before)
        self.written = time.monotonic()
        rank = torch.arange(self.ranks.start, self.ranks.stop, device=self.x.device)
        for group in groups(self.battery.attacks, shared=self.attacks.get("pgd") is pgd):
            limit = group[0].limit
            attackable = (correct & (rank < limit) if limit else correct).nonzero().squeeze(1)
            self._group(group, attackable)
        return self._partial()

    # --- rows -----------------------------------------------------------------------------------------

    def _clean_pass(self) -> Tensor:
        """Fill the columns of the images themselves; which rows are classified correctly, bool (n,)."""
        started = time.perf_counter()
        self.logits = logits = self._ask("the clean pass", lambda: self.classifier.logits(self.x))
        margin, pred = margins(logits, self.y), predictions(logits)
        self.columns = {
            "sample_id": list(self.data.ids),
            "rank": list(self.ranks),
            "image_sha256": list(self.data.hashes),
            "label": self.y.cpu().numpy(),
            "clean_pred": pred.cpu().numpy(),
            "clean_margin": margin.masked_fill(~margin.isfinite(), torch.nan).cpu().numpy(),
        }
        self.shard.cost["clean"] = Cost(seconds=time.perf_counter() - started, forwards=len(self.x))
        return pred == self.y

    def _resume(self, before: Shard) -> None:
        self.shard = before
        self.started -= before.seconds
        new = [str(name) for name in before.rows if name not in self.columns]
        self.columns |= {name: before.rows[name].to_numpy(dtype=object) for name in new}

    def _partial(self) -> Shard:
        """The shard with the columns of the attacks that have begun: all, once it is finished."""
        import pandas as pd

        begun = tuple(spec for spec in self.battery.attacks if spec.id in self.shard.cost)
        self.shard.seconds = time.perf_counter() - self.started
        self.shard.rows = typed(
            pd.DataFrame(self.columns), self.battery.model_copy(update={"attacks": begun})
        )
        return self.shard

    def _remaining(self, group: list[AttackSpec], attackable: Tensor) -> Tensor:
        """The attackable rows that a group has not been given yet."""
        if group[0].id not in self.shard.cost:
            return attackable
        given = torch.tensor(self.columns[f"{group[0].id}.attacked"].astype(bool), device=attackable.device)
        return attackable[~given[attackable]]

    # --- attacks --------------------------------------------------------------------------------------

    def _group(self, group: list[AttackSpec], attackable: Tensor) -> None:
        """Run attacks that belong together on the remaining rows, piece by piece."""
        remaining = self._remaining(group, attackable)
        if group[0].id in self.shard.cost and not len(remaining):
            return  # done by a run that was interrupted
        done = attackable[: len(attackable) - len(remaining)]
        images: dict[str, list[Tensor]] = {spec.id: [] for spec in group}
        if self.adversarials and len(done):
            found = read_candidates(self.adversarials, group, self._ids(done))
            if found is None:  # not written by the run that was interrupted: all of them are wanted
                done, remaining = attackable[:0], attackable
                for spec in group:
                    del self.shard.cost[spec.id]
            else:
                images = {name: [tensor] for name, tensor in found.items()}
        name = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
        for rows in torch.split(remaining, piece_rows(group[0]) or max(1, len(remaining))):
            far = f", {len(done)} of {len(attackable)} images" if len(rows) < len(attackable) else ""
            self.announce(name + far)
            self._piece(group, rows, images)
            done = torch.cat((done, rows))
            last = len(done) == len(attackable)
            due = time.monotonic() - self.written >= CHECKPOINT_INTERVAL
            if self.adversarials and (last or due):
                save_candidates(self.adversarials, group, images, self._ids(done))
            if due:
                self.written = time.monotonic()
                self.checkpoint(self._partial())

    def _piece(self, group: list[AttackSpec], rows: Tensor, images: dict[str, list[Tensor]]) -> None:
        """Attack some rows, verify the candidates, and fill the columns."""
        x, y = self.x[rows], self.y[rows]
        with self._remembering():
            for spec, candidates in zip(group, self._attack(group, x, y, self._ids(rows)), strict=True):
                verification = self._verify(spec, x, y, candidates)
                fill_columns(self.columns, spec.id, len(self.x), rows.cpu(), candidates, verification)
                if self.adversarials:
                    images[spec.id].append(_images(x, candidates))

    def _remembering(self) -> AbstractContextManager[None]:
        """What the attack has asked of the reference form is not computed again for the check.

        No longer than one piece, so that a resumed run computes what an uninterrupted one does.
        """
        if any(flag.kind in ("stochastic", "batch_dependent") for flag in self.manifest.flags):
            return nullcontext()
        return self.classifier.remembering(self.x, self.logits)

    def _ids(self, rows: Tensor) -> list[str]:
        return [self.data.ids[row] for row in rows.tolist()]

    def _verify(self, spec: AttackSpec, x: Tensor, y: Tensor, candidates: Candidates) -> Verification:
        minimal = isinstance(spec, DeepFool) and spec.mode == "minimal"
        if isinstance(spec, Peer):
            from robustbench_cure.interop import peers

            minimal = peers.minimal(spec.kind)
        clip = not isinstance(spec, DeepFool) or spec.clip
        return self._ask(
            f"the check of attack {spec.id!r}",
            lambda: verify(self.classifier, x, y, candidates, self.threat, minimal=minimal, clip=clip),
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

    def _attack(self, group: list[AttackSpec], x: Tensor, y: Tensor, ids: list[str]) -> list[Candidates]:
        """Run one group on some rows; charge its cost, note its side effects."""
        if not len(x):
            for spec in group:
                self.shard.cost.setdefault(spec.id, Cost())
            return [Candidates.start(x) for _ in group]
        noise = Noise.for_samples(self.manifest.config.seed, group[0].stream, ids, x.device)
        hyper = group[0].hyper

        def work(given: Tensor) -> list[Candidates]:
            if len(group) == 1:
                return [
                    self.attacks[group[0].implementation](
                        self.classifier, given, y, threat=self.threat, noise=noise, **hyper
                    )
                ]
            rest = {key: value for key, value in hyper.items() if key != "steps"}
            rest["checkpoints"] = tuple(spec.hyper["steps"] for spec in group)
            return pgd_checkpoints(self.classifier, given, y, threat=self.threat, noise=noise, **rest)

        started, non_finite = time.perf_counter(), self.classifier.non_finite
        try:
            results, effects = with_memory(self.classifier, lambda: guarded(self.classifier, x, work))
        except (RunError, UsageError):
            raise
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise RunError(f"attack {group[0].id!r} failed: {reason}") from error
        if self.classifier.device.type == "cuda":
            torch.cuda.synchronize(self.classifier.device)
        seconds = time.perf_counter() - started
        passes = [int((p.forwards + p.backwards).sum()) for p in results]
        for spec, candidates, own in zip(group, results, passes, strict=True):
            # A checkpoint is charged the share of the common trajectory that it needs.
            share = own / max(passes) if max(passes) else 1.0
            cost = self.shard.cost.setdefault(spec.id, Cost())
            cost.seconds += seconds * share
            cost.forwards += int(candidates.forwards.sum())
            cost.backwards += int(candidates.backwards.sum())
            cost.searched_again += (
                0 if candidates.searched_again is None else int(candidates.searched_again.sum())
            )
        # Those of a common trajectory are those of its longest part.
        self.shard.cost[group[-1].id].non_finite += self.classifier.non_finite - non_finite
        if any(flag.kind == "stochastic" for flag in self.manifest.flags):
            effects = [effect for effect in effects if effect != RANDOM_STATE]  # the model's own doing
        contained = [effect for candidates in results for effect in candidates.effects]
        for kind, seen in (("side_effects", effects), ("contained", contained)):
            for effect in seen:
                self._note(Flag(kind=kind, evidence=effect, attack=group[0].id))
        return results

    def _note(self, flag: Flag) -> None:
        if flag not in self.shard.flags:
            self.shard.flags.append(flag)


def piece_rows(spec: AttackSpec) -> int | None:
    """Rows that an attack is given at a time; None: all that live.

    Decided by the battery alone: rounding, and the draws of a peer, follow the rows that stand together.
    """
    if isinstance(spec, SPSA):
        return max(1, PIECE_PASSES // (2 * spec.samples * spec.steps))
    return PIECE_ROWS if isinstance(spec, Peer) else None


def _images(x: Tensor, candidates: Candidates) -> Tensor:
    """The candidates on the CPU; NaN where they are no images of the right shape."""
    found = candidates.x_adv
    return (found if _fits(found, x) else torch.full_like(x, torch.nan)).detach().float().cpu()


def _fits(found: object, x: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == x.shape


def groups(specs: Iterable[AttackSpec], *, shared: bool = True) -> Iterator[list[AttackSpec]]:
    """Attacks that run together: PGD entries that differ in ``steps`` alone, in order of steps."""
    pending = list(specs)
    while pending:
        first = pending.pop(0)
        group = [first]
        if shared and isinstance(first, PGD):
            same = [s for s in pending if isinstance(s, PGD) and _trajectory_key(s) == _trajectory_key(first)]
            steps = {first.steps}
            for spec in same:
                if spec.steps not in steps:
                    steps.add(spec.steps)
                    group.append(spec)
                    pending.remove(spec)
            group.sort(key=lambda spec: spec.hyper["steps"])
        yield group


def _trajectory_key(spec: PGD) -> tuple[object, ...]:
    return (spec.limit, *(value for key, value in spec.hyper.items() if key != "steps"))
