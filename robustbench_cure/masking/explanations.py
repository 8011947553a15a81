"""What every check asks, when it is raised, what that means and what to do: the words of all reports."""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_cure.masking import checks, comparisons, finding, planted


@dataclass(frozen=True)
class Explanation:
    """One check in words.

    Attributes:
        title: a few words.
        raised_when: the rule, with its thresholds.
        means: what is probably the matter.
        do_next: how to find out, or to mend it.
        source: where the check comes from.
    """

    title: str
    raised_when: str
    means: str
    do_next: str
    source: str


def _share(value: float) -> str:
    return f"{100 * value:g} %"


_ATHALYE = "Athalye et al. 2018"
_CARLINI = "Carlini et al. 2019"
_PINTOR = "Pintor et al. 2022"
_LEVEL = f"exact test, level {_share(finding.LEVEL)}"
_CONTROL = (
    "inconclusive where less than a third of the images that gradients broke is broken without them or, if "
    f"gradients broke fewer than {planted.FEWEST}, surely less than {_share(planted.SOLVED)} of the planted "
    "examples of O"
)
_ALONE = f"more than {_share(comparisons.ALONE_SHARE)} of the images are ({_LEVEL})"

#: What to do about a check that is inconclusive.
STRONGER = "give the attacks without gradients more work: --spsa-steps, --spsa-samples, --queries"

EXPLANATIONS: dict[str, Explanation] = {
    "A": Explanation(
        "SPSA ends lower than PGD",
        f"on more than {_share(comparisons.LOWER_SHARE)} of the images SPSA ends with a margin lower "
        "by half a logit (where margins are of order ten), and it is lower more often than higher "
        f"({_LEVEL}); {_CONTROL}",
        "a search without gradients sees a way down that gradients do not show",
        "attack through a smooth stand-in for the part that hides gradients (BPDA), or with SPSA and "
        "Square alone",
        "CURE paper, section 4 and figure 7",
    ),
    "B": Explanation(
        "Gradients cannot be used",
        f"the input gradient is zero (cross-entropy, margin), shorter than {checks.TINY:g} (margin), NaN or "
        f"infinite on more than {_share(checks.UNUSABLE_SHARE)} of the images",
        "something rounds, quantises or saturates; or softmax is so sure that float32 has no digits "
        "left for the loss, which only the margin sees through",
        "use the margin loss; look for rounding, argmax, detach and scaled logits; replace such a "
        "part when attacking",
        f"{_PINTOR}, indicator 1",
    ),
    "C": Explanation(
        "More steps break more",
        f"four times the steps lower robust accuracy by more than {_share(checks.MORE_STEPS)}",
        "PGD had not converged: its robust accuracy is a matter of patience",
        "report the number of steps after which nothing changes",
        _CARLINI,
    ),
    "D": Explanation(
        "Restarts or another step size break more",
        "restarts and two other step sizes together lower robust accuracy by more than "
        f"{_share(checks.MORE_EFFORT)}",
        "the loss has many poor maxima, or the step size does not suit the network",
        "search over step sizes and starts, or use an attack that adapts them (AutoAttack)",
        _CARLINI,
    ),
    "E": Explanation(
        "A ball of all images does not suffice",
        "with a radius of the whole pixel range accuracy stays above guessing, or accuracy rises by "
        f"more than {_share(checks.MORE_STEPS)} as the ball grows",
        "the attack is lost: in that ball every image of every class can be reached",
        "mend the attack before believing any of its numbers",
        f"{_ATHALYE}; {_PINTOR}, indicator 6",
    ),
    "F": Explanation(
        "One step breaks what many do not",
        f"{_ALONE} broken by FGSM and not by PGD",
        "small steps are led astray where a long one is not: the gradient close to the image points "
        "elsewhere",
        "try larger steps and random starts; look at the loss along the gradient (cure-bench surface)",
        _ATHALYE,
    ),
    "G": Explanation(
        "Noise breaks what gradients do not",
        f"{_ALONE} broken by random points of the ball and not by FGSM or PGD",
        "gradients carry less information than chance",
        "as for A",
        f"{_CARLINI}; {_ATHALYE}",
    ),
    "H": Explanation(
        "SPSA or Square break more than gradients",
        f"{_ALONE} broken by SPSA or Square and not by FGSM or PGD; {_CONTROL}",
        "the white-box number is too high, at least by these images",
        "count them as broken, and attack as for A",
        f"{_ATHALYE}; AutoAttack",
    ),
    "I": Explanation(
        "The margin was still falling",
        f"on more than {_share(checks.UNFINISHED_SHARE)} of the survivors the second half of PGD made "
        "over a tenth of the fall of the margin",
        "the search was stopped, it did not end",
        "more steps, or larger ones",
        f"{_PINTOR}, indicator 4",
    ),
    "J": Explanation(
        "Gradients do not predict",
        "changes of the margin along random directions, a quarter of the radius long, and what the "
        f"gradient predicts of them have a cosine below {checks.FAITHFUL:g}",
        "within the ball the gradient is no guide: the surface is shattered, stepped or random",
        "attack a smoothed network (mean over noise), or without gradients",
        _ATHALYE,
    ),
    "K": Explanation(
        "Output is not a function of the image",
        "two passes over the same images, or one alone and one in a batch, differ",
        "single passes overstate robustness, and every verdict is a lucky draw",
        "remove the randomness, or average over it (expectation over transformation)",
        f"{_PINTOR}, indicator 2; RobustBench's rules",
    ),
    "L": Explanation(
        "Output looks like probabilities",
        "every row lies in [0, 1] and sums to 1",
        "a softmax inside the model flattens every loss",
        "return logits",
        "AutoAttack",
    ),
    "M": Explanation(
        "Success was lost on the way",
        f"on more than {_share(checks.LOST_SHARE)} of the images PGD met a verified adversarial "
        "example and ended with something else",
        "the iterate it chooses to return is not the one that breaks the network",
        "stop at the first success, or return the best iterate by the judged form",
        f"{_PINTOR}, indicator 3",
    ),
    "N": Explanation(
        "What is searched is not what is judged",
        f"more than {_share(checks.LOST_SHARE)} of the images are broken in the fast form of the "
        "network and hold in float32",
        "the attack works on another function than the one that counts: reduced precision, or a random one",
        "repeat with --precision fp32",
        f"{_PINTOR}, indicator 5",
    ),
    "O": Explanation(
        "A planted adversarial example is missed",
        "of balls known to hold an adversarial example, PGD finds surely less than "
        f"{_share(planted.SOLVED)} ({_LEVEL})",
        "the attack would not find adversarial examples if they were there: its robust accuracy says nothing",
        "change the attack until it passes this test, then measure again",
        "Zimmermann et al. 2022",
    ),
    "P": Explanation(
        "Another model's adversarial images work",
        f"{_ALONE} broken by PGD on the surrogate and not by gradients of the model itself",
        "gradients of the model are worth less than those of a stranger",
        "attack the undefended twin and transfer; see A",
        _CARLINI,
    ),
}
