"""Diagnostics as data: every flag a record may carry, with what it means and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

Severity = Literal["note", "warning", "unreliable"]


@dataclass(frozen=True)
class FlagKind:
    """The paragraph a report prints for one kind of flag."""

    severity: Severity
    title: str
    raised_when: str
    means: str
    do_next: str


FLAG_KINDS: dict[str, FlagKind] = {
    "batch_dependent": FlagKind(
        "unreliable",
        "Output depends on the batch",
        "an image's logits change when it is evaluated alone instead of in a batch",
        "batch statistics are in use (a layer left in training mode, or normalisation over the batch); "
        "accuracy and attacks depend on which images happen to stand together",
        "make evaluation mode independent of the batch; this run cannot be compared",
    ),
    "stochastic": FlagKind(
        "unreliable",
        "Output is random",
        "two passes over the same images give different logits",
        "one lucky draw counts as a success, gradients are noisy, and single passes overstate robustness",
        "remove the randomness, or take its expectation; this run cannot be compared",
    ),
    "probabilities": FlagKind(
        "warning",
        "Output looks like probabilities",
        "every row of the output lies in [0, 1] and sums to 1",
        "a softmax inside the model saturates the losses and hides gradients from every attack",
        "return logits",
    ),
    "zero_gradient": FlagKind(
        "warning",
        "Input gradients vanish",
        "the gradient of the cross-entropy or of the margin is exactly zero for part of the images",
        "gradient attacks cannot move those images: their survival is no evidence of robustness",
        "look for quantisation, rounding, argmax or saturated logits; trust gradient-free attacks instead",
    ),
    "no_gradient": FlagKind(
        "warning",
        "The network has no gradient",
        "no gradient of the logits reaches the image: the network fails when asked for one, computes without "
        "recording, or leaves PyTorch",
        "attacks stand still where the form that they search with has no gradient either: what they leave "
        "standing is no evidence",
        "trust the gradient-free attacks alone, with many queries; best evaluate a differentiable form",
    ),
    "non_finite_gradient": FlagKind(
        "warning",
        "Gradients are not finite",
        "the input gradient of an image has NaN or infinite entries (a root or logarithm at black pixels, a "
        "division by zero)",
        "such entries are taken as zero, so that attacks cannot move those pixels by gradient: a sample may "
        "survive for this reason alone",
        "keep roots, logarithms and divisions away from zero; trust gradient-free attacks instead",
    ),
    "non_finite_logits": FlagKind(
        "warning",
        "Logits are not finite",
        "the model returns NaN or an infinite logit for an image, or for an admissible perturbed one",
        "there is no answer, so it is wrong: the sample counts as misclassified, and as broken by the attack "
        "that found the point",
        "look at the named samples; a network must answer everywhere in the ball",
    ),
    "non_finite_nearby": FlagKind(
        "warning",
        "Logits near the images are not finite",
        "the model returns NaN or infinite logits for images that were moved by noise of 8/255",
        "it has no answer there: such points count as broken where attacks find them; gradients may be lost",
        "look at what the network does with values between grey levels; it must answer in all of the ball",
    ),
    "nothing_broken": FlagKind(
        "warning",
        "No attack broke anything",
        "every correctly classified sample survived every attack, in a ball of positive radius",
        "hardly any network is that robust: more often its images are scaled twice, its gradients hidden, or "
        "the ball is far smaller than meant",
        "check the range of pixels that the network expects, and eps; run `cure-bench masking`",
    ),
    "search_in_fp32": FlagKind(
        "note",
        "The search was made in float32",
        "the model fails in bfloat16, or its margins or gradients there differ from those in float32 on more "
        "than 5 % of the images",
        "a search in bfloat16 would be weak here and overstate robustness; float32 is right, and slower",
        "nothing",
    ),
    "searched_again": FlagKind(
        "note",
        "Part of the search was made in float32",
        "for some samples bfloat16 gives another margin than float32 where an attack ends, or another "
        "estimate of the gradient",
        "bfloat16 may lead the attack astray; such samples were searched in float32 or, where they are more "
        "than one in a hundred, all that stood",
        "nothing; with `--precision fp32` the whole search is made in float32",
    ),
    "one_output": FlagKind(
        "note",
        "One output, read as two classes",
        "the network returns one number for each image, and the data has two classes",
        "the number counts as the logit of the second class against the first or, where it stays in [0, 1] "
        "whatever it is shown, as the probability of the second class",
        "check that class 1 of the data is the one that the output speaks for",
    ),
    "extra_outputs": FlagKind(
        "warning",
        "More outputs than classes",
        "the model has more outputs than the data has labels",
        "it was made for another data set, or its head was not replaced; every output without a class is one "
        "more way to be wrong",
        "check that output k means class k of the data",
    ),
    "near_chance": FlagKind(
        "warning",
        "Clean accuracy is that of guessing",
        "the interval of the clean accuracy reaches down to one over the number of classes",
        "most often the images do not reach the network as it expects them: normalisation left out or done "
        "twice, another order of classes or channels, or weights that were not loaded",
        "check mean, std and class order; robust accuracy says nothing until clean accuracy is right",
    ),
    "black_box_stronger": FlagKind(
        "warning",
        "A gradient-free attack succeeded where gradients failed",
        "SPSA or random noise broke images that every gradient attack of the battery left standing",
        "the gradients may be masked, so that white-box numbers overstate robustness",
        "compare final margins sample by sample, add restarts and a margin loss, and attack adaptively",
    ),
    "cross_entropy_weaker": FlagKind(
        "note",
        "The loss of the attack decides",
        "PGD on cross-entropy leaves over 3 points more standing than PGD on another loss with as many steps "
        "or than DeepFool, and an exact paired test (level 1 %) rules chance out",
        "cross-entropy is a poor guide on this network, often because its logits are small: robust accuracy "
        "under PGD on cross-entropy alone is too high; the worst case, which counts every attack, is not",
        "quote the worst case, or PGD on the margin, and never PGD on cross-entropy alone",
    ),
    "violations": FlagKind(
        "warning",
        "An attack returned inadmissible images",
        "a returned image was outside the ball or the box, not finite, or of the wrong shape",
        "those rows count as not broken; the attack is faulty or the projection was skipped",
        "mend the attack: its robust accuracy is too high",
    ),
    "side_effects": FlagKind(
        "warning",
        "An attack left traces",
        "an attack modified its input, the model's weights or mode, or the global random state",
        "results may depend on the order of attacks; input and random state were restored",
        "mend the attack",
    ),
    "contained": FlagKind(
        "note",
        "An attack of another library was contained",
        "it changed the mode of what it took for the model, edited its input, or used global random states",
        "nothing of it reached the model, the images or other attacks: it works on copies, with random "
        "states that are seeded before and put back after",
        "nothing; where the same attack is run without this package, mind the order of attacks",
    ),
    "fewer_samples": FlagKind(
        "note",
        "Fewer samples than the protocol asks for",
        "the run used a subset of the data set the battery is defined on",
        "the interval is wider, and a comparison with published numbers is indicative only",
        "run again without --n",
    ),
    "other_data": FlagKind(
        "note",
        "Other data than the protocol's",
        "the data set is not the one the battery is defined on",
        "published numbers stand beside these for orientation only",
        "evaluate on the original data set",
    ),
    "lossy_data": FlagKind(
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
