"""The checks. Each looks at one symptom of masked gradients, or of an attack that does not do its work.

Sources: the CURE paper, section 4 and figure 7; Athalye, Carlini & Wagner 2018, arXiv 1802.00420; Carlini et
al. 2019, arXiv 1902.06705; Pintor et al. 2022, arXiv 2106.09947, whose six indicators of failure are all
here; Zimmermann et al. 2022, arXiv 2206.13991. `CHECKS` says which check comes from which. Passing them
proves nothing: Popovic et al. 2022, arXiv 2206.01705.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from torch import Tensor

from robustbench_cure.attacks.losses import Loss, margin
from robustbench_cure.masking import binarization
from robustbench_cure.masking.evidence import (
    MULTIPLES,
    RADII,
    STEP_LENGTHS,
    ComparedAttacks,
    Measurements,
    PairedMargins,
    wider,
)
from robustbench_cure.stats import tail

#: Level of the exact tests.
LEVEL = 0.01
#: Ids stored with a finding.
MOST_IDS = 50
#: A margin that much lower counts as lower, in logits, and the share of points that may be (CURE, Fig. 7).
LOWER, LOWER_SHARE = 0.5, 0.05
#: Share of the images that one weak attack may break alone; more is raised where the exact test is sure.
ALONE_SHARE = 0.01
#: Robust accuracy that more steps may still cost.
MORE_STEPS = 0.02
#: Robust accuracy that restarts and other step sizes may cost: honest networks lose up to five points.
MORE_EFFORT = 0.10
#: Share of images without a usable gradient, and the length below which one of the margin is not usable.
UNUSABLE_SHARE, TINY = 0.05, 1e-8
#: Images whose gradients are computed in float64 as well.
DOUBLE = 64
#: Cosine between predicted and actual changes of the margin along random directions.
FAITHFUL = 0.5
#: Directions for each image, and their length as a share of the radius.
PROBES, PROBE_LENGTH = 16, 0.25
#: Share of images whose margin may still be falling when the attack ends.
UNFINISHED_SHARE = 0.25
#: Share of images on which the attack may lose an adversarial example that it had.
LOST_SHARE = 0.02

Status = Literal["raised", "clear", "inconclusive", "not run"]


class Finding(BaseModel):
    """The result of one check.

    Attributes:
        check: its name, a key of `CHECKS`.
        status: whether it was raised; ``inconclusive``: it was not, and could hardly have been (see `power`);
            ``not run``: the evidence says why.
        value: what was measured.
        threshold: beyond which it is raised.
        beyond: on which side of it that is.
        p: of the exact test that must hold as well, at `LEVEL`; None: there is none.
        evidence: in words, with numbers.
        ids: samples it rests on, at most `MOST_IDS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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


def to_json(finding: Finding) -> dict[str, Any]:
    """A finding as ``masking.json`` has it: with its title, and the letter that older versions used."""
    about = CHECKS[finding.check]
    return {"title": about.title, "letter": about.letter, **finding.model_dump(mode="json")}


def from_json(row: Mapping[str, Any]) -> Finding:
    """A finding of a ``masking.json``, of older versions too, which have a letter and no such name.

    Raises:
        ValueError: no mapping, no such check, or a field of the wrong type.
        KeyError: neither a name nor a letter.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"not a finding: {row!r}")
    name = row.get("check")
    if name not in CHECKS:
        letter = row["letter"]
        name = next((name for name, about in CHECKS.items() if about.letter == letter), None)
        if name is None:
            raise ValueError(f"unknown check {letter}")
    fields = {key: row[key] for key in Finding.model_fields if key in row}
    return Finding.model_validate(fields | {"check": name})


def finding(
    check: str,
    raised: bool,
    value: float,
    threshold: float,
    evidence: str,
    ids: Sequence[str],
    rows: Tensor | None = None,
    *,
    beyond: Literal[">", "<"] = ">",
    p: float | None = None,
) -> Finding:
    """A finding, with the ids of the images that it is about where it is raised.

    Args:
        check: its name.
        raised: whether the check is raised.
        value: what was measured.
        threshold: what it is compared with.
        evidence: a sentence with the numbers.
        ids: names of the m images.
        rows: images that it is about, bool (m,); None: no single ones.
        beyond: side of the threshold on which the check is raised.
        p: p-value of the test that decides with it; None: no test.
    """
    chosen = [] if rows is None or not raised else rows.nonzero().squeeze(1).tolist()
    return Finding(
        check=check,
        status="raised" if raised else "clear",
        value=value,
        threshold=threshold,
        beyond=beyond,
        p=p,
        evidence=evidence,
        ids=tuple(ids[row] for row in chosen[:MOST_IDS]),
    )


def not_run(check: str, reason: str) -> Finding:
    """A check that was left out, and why."""
    return Finding(check=check, status="not run", evidence=reason)


# --- checks of attacks against each other, which a finished record suffices for ---------------------------


def spsa_below_pgd(m: ComparedAttacks) -> Finding:
    """SPSA against PGD, image by image: does the gradient-free search end lower?"""
    white, free = m.white_box_margin, m.spsa.margin
    lower, higher = int((free < white).sum()), int((free > white).sum())
    p = tail(lower, higher)
    # Margins have no natural unit: half a logit, where logits are of order ten, is a share of their spread.
    far = free < white - LOWER * float(m.clean_margin.median().clamp_min(1e-30)) / 10
    share = _share(far)
    evidence = (
        f"SPSA ended lower than PGD on {lower} of {len(m.ids)} images (sign test p = {p:.2g}), "
        f"clearly lower on {int(far.sum())}"
    )
    raised = share > LOWER_SHARE and p < LEVEL
    return finding("spsa_below_pgd", raised, share, LOWER_SHARE, evidence, m.ids, far, p=p)


def statistics(pairs: PairedMargins) -> dict[str, float | None]:
    """Counts below and above the diagonal of the scatter, sign test, Pearson's r (None: no spread)."""
    below, above = int((pairs.spsa < pairs.pgd).sum()), int((pairs.spsa > pairs.pgd).sum())
    a, b = pairs.pgd.double().cpu(), pairs.spsa.double().cpu()
    spread = float(a.std() * b.std()) if len(a) > 1 else 0.0
    r = float(torch.corrcoef(torch.stack((a, b)))[0, 1]) if spread > 0 else None
    return {
        "points": len(a),
        "below": below,
        "above": above,
        "sign_test_p": tail(below, above),
        "pearson_r": r,
    }


def fgsm_beats_pgd(m: ComparedAttacks) -> Finding:
    """Did one step break what many did not?"""
    return broken_alone("fgsm_beats_pgd", "FGSM", "PGD", m.fgsm.broken & ~m.pgd_broken, m.ids)


def noise_beats_white_box(m: ComparedAttacks) -> Finding:
    """Did random points of the ball break what gradients did not?"""
    broken = m.random.broken & ~m.white_box_broken
    return broken_alone("noise_beats_white_box", "random noise", "gradients", broken, m.ids)


def broken_alone(check: str, weak: str, strong: str, broken: Tensor, ids: Sequence[str]) -> Finding:
    """A finding about images that only the weak attack broke: raised where they are surely too many."""
    count, n = int(broken.sum()), len(ids)
    p = float(binomtest(count, n, ALONE_SHARE, alternative="greater").pvalue) if n else 1.0
    evidence = f"{count} of {n} images were broken by {weak} and not by {strong}"
    return finding(check, p < LEVEL, count / max(1, n), ALONE_SHARE, evidence, ids, broken, p=p)


def unstable_predictions(m: ComparedAttacks) -> Finding:
    """Did two passes over the same images differ, or one alone and one in a batch?"""
    return _of_flags("unstable_predictions", m, "stochastic", "batch_dependent")


def probability_outputs(m: ComparedAttacks) -> Finding:
    """Does the model return probabilities where logits are expected?"""
    return _of_flags("probability_outputs", m, "probabilities")


def _of_flags(check: str, m: ComparedAttacks, *kinds: str) -> Finding:
    raised = [m.flags[kind].evidence for kind in kinds if kind in m.flags]
    evidence = "; ".join(raised) or "nothing seen"
    return Finding(check=check, status="raised" if raised else "clear", evidence=evidence)


# --- checks that need the model ---------------------------------------------------------------------------


def unavailable_gradients(m: Measurements) -> Finding:
    """Are input gradients zero, too small to be told from it, or not finite?

    Cross-entropy is taken as everybody writes it: attacks of others follow it, those here do not (`losses`).
    """
    ce, plain = (_gradient_lengths(m, loss) for loss in (_textbook, margin))
    nan = ~(ce.isfinite() & plain.isfinite())
    bad = nan | (plain <= TINY) | (ce == 0)
    share = _share(bad)
    evidence = (
        f"of {len(m)} images: NaN or infinite {int(nan.sum())}, margin gradient zero "
        f"{int((plain == 0).sum())} and tiny {int(((plain > 0) & (plain <= TINY)).sum())}, cross-entropy "
        f"gradient zero {int((ce == 0).sum())}; {_in_double(m, ce)}"
    )
    raised = share > UNUSABLE_SHARE
    return finding("unavailable_gradients", raised, share, UNUSABLE_SHARE, evidence, m.ids, bad)


def more_steps_break_more(m: Measurements) -> Finding:
    """Does PGD break more when it is given two and four times as many steps?"""
    once, *more = (m.pgd_margin(multiple) for multiple in MULTIPLES[1:])
    rates = [_robust(m, result.broken) for result in (once, *more)]
    drop = rates[0] - min(rates)
    fall = float((once.margin - more[-1].margin).median()) if len(m) else 0.0
    evidence = (
        "robust accuracy at x1, x2, x4 steps: "
        + ", ".join(f"{100 * rate:.1f} %" for rate in rates)
        + f"; median margin lower by {fall:.2g} at x4"
    )
    rows = more[-1].broken & ~once.broken
    return finding("more_steps_break_more", drop > MORE_STEPS, drop, MORE_STEPS, evidence, m.ids, rows)


def restarts_break_more(m: Measurements) -> Finding:
    """Does PGD break more with restarts, or with another step size?"""
    base = m.pgd_margin().broken
    variants = {f"{m.settings.restarts} restarts": m.restarted.broken} | {
        "steps of eps" + (f"/{1 / step:g}" if step < 1 else ""): m.with_step(step).broken
        for step in STEP_LENGTHS
    }
    together = torch.stack([base, *variants.values()]).any(0)
    drop = _robust(m, base) - _robust(m, together)
    evidence = f"robust accuracy {100 * _robust(m, base):.1f} %; " + ", ".join(
        f"{name} {100 * _robust(m, broken):.1f} %" for name, broken in variants.items()
    )
    rows = together & ~base
    return finding("restarts_break_more", drop > MORE_EFFORT, drop, MORE_EFFORT, evidence, m.ids, rows)


def unbounded_attack_fails(m: Measurements) -> Finding:
    """Does accuracy fall to that of guessing as the ball grows, and never rise?"""
    rates = [_robust(m, m.pgd_margin().broken)]
    results = [m.at_radius(multiple) for multiple in RADII]
    rates += [_robust(m, result.broken) for result in results]
    chance = 1.0 / m.classifier.num_classes
    rise = max(after - before for before, after in pairwise(rates))
    balls = [m.threat, *(wider(m.threat, multiple, m.x.shape[1:].numel()) for multiple in RADII)]
    evidence = (
        "robust accuracy at eps "
        + ", ".join(f"{ball.radius:.3g}: {100 * rate:.1f} %" for ball, rate in zip(balls, rates, strict=True))
        + f"; guessing {100 * chance:.0f} %"
    )
    raised = rates[-1] > chance or rise > MORE_STEPS
    return finding("unbounded_attack_fails", raised, rates[-1], chance, evidence, m.ids, ~results[-1].broken)


def gradient_free_beats_white_box(m: Measurements) -> Finding:
    """Did a gradient-free attack break what gradients did not?"""
    broken = (m.spsa.broken | m.square.broken) & ~m.white_box_broken
    return broken_alone("gradient_free_beats_white_box", "SPSA or Square", "gradients", broken, m.ids)


def incomplete_optimization(m: Measurements) -> Finding:
    """Was the margin of the survivors still falling when PGD ended?"""
    half, whole = m.pgd_margin(MULTIPLES[0]), m.pgd_margin()
    alive = ~whole.broken
    # A fall in the second half of more than a tenth of the whole fall is no convergence.
    fall = (m.clean_margin - whole.margin).clamp_min(0)
    late = (half.margin - whole.margin).clamp_min(0)
    falling = alive & (late > 0.1 * fall) & (fall > 0)
    share = float(falling.sum()) / max(1, int(alive.sum()))
    evidence = (
        f"the second half of PGD({m.settings.steps}) made more than a tenth of the fall of the margin on "
        f"{int(falling.sum())} of {int(alive.sum())} survivors"
    )
    raised = share > UNFINISHED_SHARE
    return finding("incomplete_optimization", raised, share, UNFINISHED_SHARE, evidence, m.ids, falling)


def uninformative_gradients(m: Measurements) -> Finding:
    """Do gradients predict how the margin changes within the ball?"""
    generator = torch.Generator().manual_seed(m.settings.seed)
    predicted, actual = [], []
    for rows in torch.split(torch.arange(len(m), device=m.x.device), m.classifier.batch_size):
        x, y = m.x[rows], m.y[rows]
        _, gradient = m.classifier.value_and_gradient(x, partial(margin, labels=y), reference=True)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2.0 - 1.0
            v = signs * (PROBE_LENGTH * m.threat.radius)
            if m.threat.norm == "l2":
                v = v / signs[0].numel() ** 0.5
            after = margin(m.classifier.logits(x + v), y)
            before = margin(m.classifier.logits(x - v), y)
            actual.append(after - before)
            predicted.append(2 * (gradient * v).flatten(1).sum(1))
    a, b = torch.cat(predicted).double(), torch.cat(actual).double()
    spread = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / spread if spread > 0 and torch.isfinite(a).all() else 0.0
    evidence = (
        f"changes of the margin that gradients predict and that are seen, over {PROBES} directions "
        f"for each of {len(m)} images: cosine {cosine:.2f}"
    )
    raised = cosine < FAITHFUL
    return finding("uninformative_gradients", raised, cosine, FAITHFUL, evidence, m.ids, beyond="<")


def silent_success(m: Measurements) -> Finding:
    """Did PGD pass through an adversarial example and return something else?"""
    lost = m.pgd_stopped.broken & ~m.pgd_ce.broken
    share = _share(lost)
    evidence = (
        f"PGD({m.settings.steps}) met a verified adversarial example on {int(m.pgd_stopped.broken.sum())} "
        f"images; on {int(lost.sum())} of them what it ended with is none"
    )
    return finding("silent_success", share > LOST_SHARE, share, LOST_SHARE, evidence, m.ids, lost)


def search_reference_mismatch(m: Measurements) -> Finding:
    """Does what breaks the model in the form that is searched break it in the form that is verified?"""
    result = m.pgd_margin()
    if result.searched is None:
        raise ValueError("margins in the form that is searched were not measured")
    lost = (result.searched < 0) & ~result.broken
    share = _share(lost)
    evidence = (
        f"of {int((result.searched < 0).sum())} images that PGD broke in {m.classifier.precision}, "
        f"{int(lost.sum())} held in float32"
    )
    raised = share > LOST_SHARE
    return finding("search_reference_mismatch", raised, share, LOST_SHARE, evidence, m.ids, lost)


def binarization_test_fails(m: Measurements) -> Finding:
    """Does PGD miss adversarial examples that are known to exist?"""
    solved = [binarization.solved_by_pgd(m, problem) for problem in binarization.problems(m)]
    tried, count = len(solved), sum(solved)
    if tried < binarization.FEWEST:
        reason = f"only {tried} problems could be made, {binarization.FEWEST} are needed"
        return not_run("binarization_test_fails", reason)
    evidence = f"PGD({m.settings.steps}) found {count} of {tried} adversarial examples known to exist"
    p, rate = binarization.p_missed(count, tried), count / tried
    limit = binarization.SOLVED
    return finding("binarization_test_fails", p < LEVEL, rate, limit, evidence, m.ids, beyond="<", p=p)


def transfer_beats_white_box(m: Measurements) -> Finding:
    """Did adversarial examples of another model break what gradients of this one did not?"""
    if m.surrogate is None:
        return not_run("transfer_beats_white_box", "no other model was given: use --surrogate")
    broken = m.transferred.broken & ~m.white_box_broken
    weak, strong = f"PGD on {m.surrogate.model_info().id}", "gradients of the model itself"
    return broken_alone("transfer_beats_white_box", weak, strong, broken, m.ids)


def _share(rows: Tensor) -> float:
    """Share of the rows that are true; exact, so that a threshold is met where it is met."""
    return int(rows.sum()) / max(1, len(rows))


def _robust(m: Measurements, broken: Tensor) -> float:
    """Accuracy out of all images, the misclassified ones included."""
    return int((~broken).sum()) / m.total


def _textbook(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _gradient_lengths(m: Measurements, loss: Loss) -> Tensor:
    """l2 lengths of the input gradients in the reference form, (m,); NaN where one is not finite."""
    parts = []
    for rows in torch.split(torch.arange(len(m), device=m.x.device), m.classifier.batch_size):
        objective = partial(loss, labels=m.y[rows])
        _, gradient = m.classifier.value_and_gradient(m.x[rows], objective, reference=True, raw=True)
        parts.append(gradient.flatten(1).norm(dim=1))
    return torch.cat(parts)


def _in_double(m: Measurements, single: Tensor) -> str:
    """In words: what float64 says about the gradients of cross-entropy that float32 rounded to zero."""
    x, y = m.x[:DOUBLE].double().requires_grad_(True), m.y[:DOUBLE]
    try:
        logits = copy.deepcopy(m.classifier.module).double()(x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    except RuntimeError as error:  # float32 constants inside the network, or a cut graph
        return f"no gradients in float64: {str(error).splitlines()[0][:60]}"
    if gradient is None:
        return "in float64 there is no gradient either"
    lost = (single[:DOUBLE] == 0) & (gradient.flatten(1).norm(dim=1) > 0)
    return f"float64 finds one for {int(lost.sum())} of the first {len(x)} where float32 has none"


# --- all checks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One check, and the words about it in all reports.

    Attributes:
        run: measures what it needs, and decides.
        letter: what older versions called it; still written to ``masking.json``.
        title: a few words.
        raised_when: the rule, with its thresholds.
        means: what is probably the matter.
        do_next: how to find out, or to correct it.
        source: where the check comes from.
    """

    run: Callable[[Measurements], Finding]
    letter: str
    title: str
    raised_when: str
    means: str
    do_next: str
    source: str


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


_ATHALYE = "Athalye et al. 2018"
_CARLINI = "Carlini et al. 2019"
_PINTOR = "Pintor et al. 2022"
_EXACT = f"exact test, level {_percent(LEVEL)}"
_CONTROL = (
    "inconclusive where gradient-free attacks break less than a third of the images that gradients broke "
    f"or, if gradients broke fewer than {binarization.FEWEST}, surely less than "
    f"{_percent(binarization.SOLVED)} of the problems of the binarization test"
)
_ALONE = f"more than {_percent(ALONE_SHARE)} of the images are ({_EXACT})"
_BYPASS = (
    "attack through a smooth replacement of the part that hides gradients (BPDA), or with SPSA and Square "
    "alone"
)

#: What to do about a check that is inconclusive.
MORE_POWER = "give the gradient-free attacks more work: --spsa-steps, --spsa-samples, --queries"

#: Name -> check, in the order of the report.
CHECKS: dict[str, Check] = {
    "spsa_below_pgd": Check(
        spsa_below_pgd,
        "A",
        "SPSA ends lower than PGD",
        f"on more than {_percent(LOWER_SHARE)} of the images SPSA ends with a margin lower "
        "by half a logit (where margins are of order ten), and it is lower more often than higher "
        f"({_EXACT}); {_CONTROL}",
        "a gradient-free search finds a descent that gradients do not show",
        _BYPASS,
        "CURE paper, section 4 and figure 7",
    ),
    "unavailable_gradients": Check(
        unavailable_gradients,
        "B",
        "Gradients cannot be used",
        f"the input gradient is zero (cross-entropy, margin), shorter than {TINY:g} (margin), NaN or "
        f"infinite on more than {_percent(UNUSABLE_SHARE)} of the images",
        "something rounds, quantises or saturates; or softmax is so sure that float32 has no digits "
        "left for the loss, which the margin avoids",
        "use the margin loss; look for rounding, argmax, detach and scaled logits; replace such a "
        "part when attacking",
        f"{_PINTOR}, indicator 1",
    ),
    "more_steps_break_more": Check(
        more_steps_break_more,
        "C",
        "More steps break more",
        f"four times the steps lower robust accuracy by more than {_percent(MORE_STEPS)}",
        "PGD had not converged: its robust accuracy depends on the number of steps",
        "report the number of steps after which nothing changes",
        _CARLINI,
    ),
    "restarts_break_more": Check(
        restarts_break_more,
        "D",
        "Restarts or another step size break more",
        "restarts and two other step sizes together lower robust accuracy by more than "
        f"{_percent(MORE_EFFORT)}",
        "the loss has many poor maxima, or the step size does not suit the network",
        "search over step sizes and starts, or use an attack that adapts them (AutoAttack)",
        _CARLINI,
    ),
    "unbounded_attack_fails": Check(
        unbounded_attack_fails,
        "E",
        "A ball of all images does not suffice",
        "with a radius of the whole pixel range accuracy stays above guessing, or accuracy rises by "
        f"more than {_percent(MORE_STEPS)} as the ball grows",
        "the attack fails: in that ball every image of every class can be reached",
        "correct the attack before believing any of its numbers",
        f"{_ATHALYE}; {_PINTOR}, indicator 6",
    ),
    "fgsm_beats_pgd": Check(
        fgsm_beats_pgd,
        "F",
        "One step breaks what many do not",
        f"{_ALONE} broken by FGSM and not by PGD",
        "small steps are misled where a long one is not: the gradient close to the image points elsewhere",
        "try larger steps and random starts; look at the loss along the gradient (cure-bench surface)",
        _ATHALYE,
    ),
    "noise_beats_white_box": Check(
        noise_beats_white_box,
        "G",
        "Noise breaks what gradients do not",
        f"{_ALONE} broken by random points of the ball and not by FGSM or PGD",
        "gradients carry less information than chance",
        _BYPASS,
        f"{_CARLINI}; {_ATHALYE}",
    ),
    "gradient_free_beats_white_box": Check(
        gradient_free_beats_white_box,
        "H",
        "SPSA or Square break more than gradients",
        f"{_ALONE} broken by SPSA or Square and not by FGSM or PGD; {_CONTROL}",
        "the white-box number is too high, at least by these images",
        f"count them as broken; {_BYPASS}",
        f"{_ATHALYE}; AutoAttack",
    ),
    "incomplete_optimization": Check(
        incomplete_optimization,
        "I",
        "The margin was still falling",
        f"on more than {_percent(UNFINISHED_SHARE)} of the survivors the second half of PGD made "
        "over a tenth of the fall of the margin",
        "the search was stopped before it converged",
        "more steps, or larger ones",
        f"{_PINTOR}, indicator 4",
    ),
    "uninformative_gradients": Check(
        uninformative_gradients,
        "J",
        "Gradients do not predict",
        "changes of the margin along random directions, a quarter of the radius long, and what the "
        f"gradient predicts of them have a cosine below {FAITHFUL:g}",
        "within the ball the gradient is no guide: the surface is shattered, stepped or random",
        "attack a smoothed network (mean over noise), or without gradients",
        _ATHALYE,
    ),
    "unstable_predictions": Check(
        unstable_predictions,
        "K",
        "Output is not a function of the image",
        "two passes over the same images, or one alone and one in a batch, differ",
        "single passes overstate robustness, and every verification is a random draw",
        "remove the randomness, or average over it (expectation over transformation)",
        f"{_PINTOR}, indicator 2; RobustBench's rules",
    ),
    "probability_outputs": Check(
        probability_outputs,
        "L",
        "Output looks like probabilities",
        "every row lies in [0, 1] and sums to 1",
        "a softmax inside the model flattens every loss",
        "return logits",
        "AutoAttack",
    ),
    "silent_success": Check(
        silent_success,
        "M",
        "A success was not returned",
        f"on more than {_percent(LOST_SHARE)} of the images PGD met a verified adversarial "
        "example and ended with something else",
        "the iterate it chooses to return is not the one that breaks the network",
        "stop at the first success, or return the best iterate by the form that is verified",
        f"{_PINTOR}, indicator 3",
    ),
    "search_reference_mismatch": Check(
        search_reference_mismatch,
        "N",
        "What is searched is not what is verified",
        f"more than {_percent(LOST_SHARE)} of the images are broken in the fast form of the "
        "network and hold in float32",
        "the attack works on another function than the one that counts: reduced precision, or a random one",
        "repeat with --precision fp32",
        f"{_PINTOR}, indicator 5",
    ),
    "binarization_test_fails": Check(
        binarization_test_fails,
        "O",
        "PGD fails the binarization test",
        "of balls known to hold an adversarial example, PGD finds surely less than "
        f"{_percent(binarization.SOLVED)} ({_EXACT})",
        "the attack would not find adversarial examples if they were there: its robust accuracy says nothing",
        "change the attack until it passes this test, then measure again",
        "Zimmermann et al. 2022",
    ),
    "transfer_beats_white_box": Check(
        transfer_beats_white_box,
        "P",
        "Another model's adversarial images work",
        f"{_ALONE} broken by PGD on the surrogate and not by gradients of the model itself",
        "the model's own gradients are worth less than those of another model",
        f"attack the same model without its defence and transfer; {_BYPASS}",
        _CARLINI,
    ),
}
#: Checks that need no image classified correctly.
OF_FLAGS = ("unstable_predictions", "probability_outputs")
