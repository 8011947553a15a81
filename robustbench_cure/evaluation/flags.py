"""Diagnostics as data: every flag a record may carry, what it means, what to do next, and what raises it.

Flags of origin ``preflight`` and ``run`` are observed once and stored in the record's manifest. Flags of
origin ``derived`` follow from the table and the manifest alone. They are made anew whenever a record is read,
like every number that is derived from one: a rule that came later speaks about records that were made before,
and two records are always held to the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from robustbench_cure.protocol.identity import NO_ANSWER
from robustbench_cure.protocol.specs import PGD, AttackSpec, DeepFool
from robustbench_cure.stats import DiscordantPairs

if TYPE_CHECKING:  # the record holds flags; the rules below are given records
    from robustbench_cure.evaluation.record import Record

Origin = Literal["preflight", "run", "derived"]
Severity = Literal["note", "warning", "unreliable"]


@dataclass(frozen=True)
class FlagKind:
    """The paragraph a report prints for one kind of flag, and where such flags come from.

    Attributes:
        origin: ``preflight`` (the model before it is attacked), ``run`` (an attack while it runs) or
            ``derived`` (the finished record, see `derived_flags`).
        severity: ``unreliable`` numbers cannot be compared; a ``warning`` may change their meaning; a
            ``note`` is good to know.
        title: heading.
        raised_when: the condition.
        means: what follows for the numbers.
        do_next: advice.
    """

    origin: Origin
    severity: Severity
    title: str
    raised_when: str
    means: str
    do_next: str


FLAG_KINDS: dict[str, FlagKind] = {
    "batch_dependent": FlagKind(
        "preflight",
        "unreliable",
        "Output depends on the batch",
        "an image's logits change when it is evaluated alone instead of in a batch",
        "batch statistics are in use (a layer left in training mode, or normalisation over the batch); "
        "accuracy and attacks depend on which images happen to stand together",
        "make evaluation mode independent of the batch; this run cannot be compared",
    ),
    "stochastic": FlagKind(
        "preflight",
        "unreliable",
        "Output is random",
        "two passes over the same images give different logits",
        "one lucky draw counts as a success, gradients are noisy, and single passes overstate robustness",
        "remove the randomness, or take its expectation; this run cannot be compared",
    ),
    "probabilities": FlagKind(
        "preflight",
        "warning",
        "Output looks like probabilities",
        "every row of the output lies in [0, 1] and sums to 1",
        "a softmax inside the model saturates the losses and hides gradients from every attack",
        "return logits",
    ),
    "zero_gradient": FlagKind(
        "preflight",
        "warning",
        "Input gradients vanish",
        "the gradient of the cross-entropy or of the margin is exactly zero for part of the images",
        "gradient attacks cannot move those images: their survival is no evidence of robustness",
        "look for quantisation, rounding, argmax or saturated logits; trust gradient-free attacks instead",
    ),
    "no_gradient": FlagKind(
        "preflight",
        "warning",
        "The network has no gradient",
        "no gradient of the logits reaches the image: the network fails when asked for one, computes without "
        "recording, or leaves PyTorch",
        "attacks stand still where the form that they search with has no gradient either: what they leave "
        "standing is no evidence",
        "trust the gradient-free attacks alone, with many queries; best evaluate a differentiable form",
    ),
    "non_finite_gradient": FlagKind(
        "derived",
        "warning",
        "Gradients are not finite",
        "the input gradient of an image has NaN or infinite entries (a root or logarithm at black pixels, a "
        "division by zero)",
        "such entries are taken as zero, so that attacks cannot move those pixels by gradient: a sample may "
        "survive for this reason alone",
        "keep roots, logarithms and divisions away from zero; trust gradient-free attacks instead",
    ),
    "non_finite_logits": FlagKind(
        "derived",
        "warning",
        "Logits are not finite",
        "the model returns NaN or an infinite logit for an image, or for an admissible perturbed one",
        "there is no answer, so it is wrong: the sample counts as misclassified, and as broken by the attack "
        "that found the point",
        "look at the named samples; a network must answer everywhere in the ball",
    ),
    "non_finite_nearby": FlagKind(
        "preflight",
        "warning",
        "Logits near the images are not finite",
        "the model returns NaN or infinite logits for images that were moved by noise of 8/255",
        "it has no answer there: such points count as broken where attacks find them; gradients may be lost",
        "look at what the network does with values between grey levels; it must answer in all of the ball",
    ),
    "nothing_broken": FlagKind(
        "derived",
        "warning",
        "No attack broke anything",
        "every correctly classified sample survived every attack, in a ball of positive radius",
        "hardly any network is that robust: more often its images are scaled twice, its gradients hidden, or "
        "the ball is far smaller than meant",
        "check the range of pixels that the network expects, and eps; run `cure-bench masking`",
    ),
    "search_in_fp32": FlagKind(
        "preflight",
        "note",
        "The search was made in float32",
        "the model fails in bfloat16, or its margins or gradients there differ from those in float32 on more "
        "than 5 % of the images",
        "a search in bfloat16 would be weak here and overstate robustness; float32 is right, and slower",
        "nothing",
    ),
    "searched_again": FlagKind(
        "derived",
        "note",
        "Part of the search was made in float32",
        "for some samples bfloat16 gives another margin than float32 where an attack ends, or another "
        "estimate of the gradient",
        "bfloat16 may lead the attack astray; such samples were searched in float32 or, where they are more "
        "than one in a hundred, all that stood",
        "nothing; with `--precision fp32` the whole search is made in float32",
    ),
    "one_output": FlagKind(
        "preflight",
        "note",
        "One output, read as two classes",
        "the network returns one number for each image, and the data has two classes",
        "the number counts as the logit of the second class against the first or, where it stays in [0, 1] "
        "whatever it is shown, as the probability of the second class",
        "check that class 1 of the data is the one that the output speaks for",
    ),
    "extra_outputs": FlagKind(
        "preflight",
        "warning",
        "More outputs than classes",
        "the model has more outputs than the data has labels",
        "it was made for another data set, or its head was not replaced; every output without a class is one "
        "more way to be wrong",
        "check that output k means class k of the data",
    ),
    "near_chance": FlagKind(
        "derived",
        "warning",
        "Clean accuracy is that of guessing",
        "the interval of the clean accuracy reaches down to one over the number of classes",
        "most often the images do not reach the network as it expects them: normalisation left out or done "
        "twice, another order of classes or channels, or weights that were not loaded",
        "check mean, std and class order; robust accuracy says nothing until clean accuracy is right",
    ),
    "black_box_stronger": FlagKind(
        "derived",
        "warning",
        "A gradient-free attack succeeded where gradients failed",
        "a gradient-free attack, or random noise, broke images that no white-box attack of the battery broke",
        "the gradients may be masked, so that white-box numbers overstate robustness",
        "compare final margins sample by sample, add restarts and a margin loss, and attack adaptively",
    ),
    "cross_entropy_weaker": FlagKind(
        "derived",
        "note",
        "The loss of the attack decides",
        "PGD on cross-entropy leaves over 3 points more standing than PGD on another loss with as many steps "
        "or than DeepFool, and an exact paired test (level 1 %) rules chance out",
        "cross-entropy is a poor guide on this network, often because its logits are small: robust accuracy "
        "under PGD on cross-entropy alone is too high; the worst case, which counts every attack, is not",
        "quote the worst case, or PGD on the margin, and never PGD on cross-entropy alone",
    ),
    "search_weaker_than_reference": FlagKind(
        "derived",
        "warning",
        "The audit broke what the search left robust",
        "the stronger protocol of the battery's audit broke samples that its search had not",
        "the search is too weak for this network, whose gradients may be masked. Where every survivor was "
        "audited, the worst case is right all the same; where only some were, it is too high, and the "
        "corrected estimate and its bound say by how much",
        "where only some were audited, go on with `--resume --audit all`; run `cure-bench masking`",
    ),
    "violations": FlagKind(
        "derived",
        "warning",
        "An attack returned inadmissible images",
        "a returned image was outside the ball or the box, not finite, or of the wrong shape",
        "those rows count as not broken; the attack is faulty or the projection was skipped",
        "mend the attack: its robust accuracy is too high",
    ),
    "replaced_attacks": FlagKind(
        "preflight",
        "warning",
        "Attacks were replaced",
        "`evaluate` was called with implementations of its caller for attacks of this package",
        "the numbers are those of other attacks than the battery names; the leaderboard does not rank them",
        "evaluate with the attacks of the package for numbers that are to be compared",
    ),
    "side_effects": FlagKind(
        "run",
        "warning",
        "An attack left traces",
        "an attack modified its input, the model's weights or mode, or the global random state",
        "results may depend on the order of attacks; input and random state were restored",
        "mend the attack",
    ),
    "contained": FlagKind(
        "run",
        "note",
        "An attack of another library was contained",
        "it changed the mode of what it took for the model, edited its input, or used global random states",
        "nothing of it reached the model, the images or other attacks: it works on copies, with random "
        "states that are seeded before and put back after",
        "nothing; where the same attack is run without this package, mind the order of attacks",
    ),
    "fewer_samples": FlagKind(
        "derived",
        "note",
        "Fewer samples than the protocol asks for",
        "the run used a subset of the data set the battery is defined on",
        "the interval is wider, and a comparison with published numbers is indicative only",
        "run again without --n",
    ),
    "other_data": FlagKind(
        "derived",
        "note",
        "Other data than the protocol's",
        "the data set is not the one the battery is defined on",
        "published numbers stand beside these for orientation only",
        "evaluate on the original data set",
    ),
    "lossy_data": FlagKind(
        "derived",
        "note",
        "Images were compressed",
        "the images were read from a lossy format",
        "compression shifts pixels by about as much as the attacks do; clean and robust accuracy both move",
        "use the original pixels for numbers that are to be compared",
    ),
}


class Flag(BaseModel):
    """One raised flag: its kind, the evidence and, where it applies, the attack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    #: What was seen, with numbers: "12 of 64 images".
    evidence: str
    value: float | None = None
    threshold: float | None = None
    attack: str = ""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in FLAG_KINDS:
            raise ValueError(f"unknown flag {kind!r}: the record was written by a newer version")
        return kind

    @property
    def about(self) -> FlagKind:
        """Severity and explanation of this kind."""
        return FLAG_KINDS[self.kind]


# --- rules of derived flags ---------------------------------------------------------------------------------
#: Samples that a flag names, and attacked samples below which nothing is said of a battery that broke none.
NAMED, FEWEST = 5, 10
#: Share of covered samples that a gradient-free attack may break alone before it is flagged.
BLACK_BOX_SHARE = 0.01
#: Robust accuracy that cross-entropy may leave standing beyond another loss, and the level of the exact test.
WEAKER, LEVEL = Fraction(3, 100), 0.01


def stored(flags: Iterable[Flag]) -> list[Flag]:
    """Flags that a manifest keeps: all but derived ones, which older versions wrote there, too.

    Equal ones are kept once. So are those of preflight of one kind: each part of a run, and each resumption,
    looks at the same model, and the first time counts.
    """
    kept: dict[tuple[str, ...], Flag] = {}
    for flag in flags:
        if flag.about.origin != "derived":
            once = (
                (flag.kind,) if flag.about.origin == "preflight" else (flag.kind, flag.attack, flag.evidence)
            )
            kept.setdefault(once, flag)
    return list(kept.values())


def derived_flags(record: Record) -> list[Flag]:
    """Everything a finished table and its manifest say about how far the numbers can be trusted."""
    flags = [*_data_flags(record), *_near_chance(record), *_violations(record), *_non_finite(record)]
    flags += [*_searched_again(record), *_audit(record)]
    found = (_nothing_broken(record), _black_box(record), _cross_entropy(record))
    return flags + [flag for flag in found if flag is not None]


def failures(records: Sequence[Record], kinds: Collection[str]) -> list[str]:
    """A line for each of some kinds of flag that a record raises."""
    raised = [(r.manifest.model.id, flag.kind) for r in records for flag in r.flags]
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
    for spec in record.every_attack:
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
        for spec in record.every_attack
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


def _audit(record: Record) -> list[Flag]:
    audit = record.audit
    if audit is None or not audit.lost:
        return []
    evidence = f"{audit.broken:,} of {audit.draws:,} draws; {audit.words}"
    return [Flag(kind="search_weaker_than_reference", evidence=evidence, value=audit.broken, threshold=0)]


def _nothing_broken(record: Record) -> Flag | None:
    samples, correct = record.samples, record.clean_accuracy.count
    tried = [spec.id for spec in record.every_attack]
    attacked = samples[[f"{name}.attacked" for name in tried]].any(axis=1)
    broken = samples[[f"{name}.broken" for name in tried]].any(axis=1)
    if not record.manifest.battery.threat.radius or int(attacked.sum()) < FEWEST or bool(broken.any()):
        return None
    evidence = f"all of {int(attacked.sum())} attacked samples survived ({correct} are classified correctly)"
    return Flag(kind="nothing_broken", evidence=evidence, value=0, threshold=0)


def _black_box(record: Record) -> Flag | None:
    samples = record.samples
    white_box = [spec.id for spec in record.every_attack if spec.access == "white-box"]
    gradient_free = [spec.id for spec in record.every_attack if spec.access in ("gradient-free", "control")]
    if not white_box or not gradient_free:
        return None
    by_gradient = samples[[f"{name}.broken" for name in white_box]].any(axis=1)
    # In a cascade, what a gradient-free attack broke first was not given to the later ones.
    tried = samples[[f"{name}.attacked" for name in white_box]].any(axis=1)
    for name in gradient_free:
        alone = int((samples[f"{name}.broken"] & ~by_gradient & tried).sum())
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
    if not runs or record.manifest.battery.cascade:  # there no two attacks are given the same samples
        return None
    run = max(runs, key=lambda spec: spec.steps * spec.restarts)
    found = [(_pairs(record, run, other), other) for other in record.attacks if _other_loss(other, run)]
    sure = [pair for pair in found if pair[0].fell_beyond(WEAKER) and pair[0].p_fall <= LEVEL]
    if not sure:
        return None
    pairs, other = min(sure, key=lambda pair: pair[0].change)
    evidence = (
        f"of {pairs.n} samples {pairs.before} hold under {run.name} and {pairs.after} under {other.name}: "
        f"{pairs.lost} are broken by the latter alone, {pairs.gained} by the former alone "
        f"(exact test, p = {pairs.p_fall:.1g})"
    )
    return Flag(
        kind="cross_entropy_weaker",
        evidence=evidence,
        value=-pairs.change,
        threshold=float(WEAKER),
        attack=run.id,
    )


def _other_loss(spec: AttackSpec, run: PGD) -> bool:
    """Whether an attack differs from a PGD by its loss, and not by more steps."""
    return isinstance(spec, DeepFool) or (
        isinstance(spec, PGD) and spec.loss != "ce" and spec.steps <= run.steps
    )


def _pairs(record: Record, run: AttackSpec, other: AttackSpec) -> DiscordantPairs:
    """What holds under two attacks, on the samples that both cover."""
    both = (record.covered(run.id) & record.covered(other.id)).to_numpy(bool)
    held = [
        (record.clean_correct & ~record.samples[f"{spec.id}.broken"]).to_numpy(bool)[both]
        for spec in (run, other)
    ]
    return DiscordantPairs.between(*held)
