"""Which model was evaluated, on which images: what tells two models, or two sets of images, apart.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

#: By how much of their largest value the answers of one network may differ between machines and libraries.
ROUNDING = 1e-2

#: What stands for the predicted label where logits are not finite.
NO_ANSWER = -1


class Section(BaseModel):
    """A part of a manifest: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class ModelInfo(Section):
    """The model that was evaluated.

    Attributes:
        id: of the card, or made of the name that was given.
        name: what reports print.
        source: where network and weights come from, in words.
        architecture: name of the architecture.
        parameters: their number.
        weights_sha256: SHA-256 of the weights file, hex; without a file, of the state dict's names and bytes.
        tensors_sha256: SHA-256 of names, shapes, dtypes and values of the network's tensors, hex, see
            `state.tensors_digest`: the same for equal weights, however they were saved or wrapped. Empty in
            records of versions that did not know it.
        card_digest: of the card, where there is one.
        published_row: key of the model's row in published tables; empty: none.
        training: method it was trained by; empty: not known.
        answers: what tells apart networks with another normalisation, or other code, around the same
            weights, see `Classifier.answers`; empty: not known.
    """

    id: str
    name: str
    source: str
    architecture: str
    parameters: int
    weights_sha256: str
    tensors_sha256: str = ""
    card_digest: str = ""
    published_row: str = ""
    training: str = ""
    answers: list[float] = []

    def same_as(self, other: ModelInfo) -> bool:
        """Whether both are one function: the same weights, and answers equal but for rounding."""
        return self.same_weights(other) and same_answers(self.answers, other.answers)

    def same_weights(self, other: ModelInfo) -> bool:
        """Whether both have the same weights: equal tensors or, where these are not known, equal files."""
        if self.tensors_sha256 and other.tensors_sha256:
            return self.tensors_sha256 == other.tensors_sha256
        return self.weights_sha256 == other.weights_sha256


def known_tensors(models: Iterable[ModelInfo]) -> dict[str, str]:
    """SHA-256 of a weights file -> that of its tensors, from the models that have both.

    Records of versions that knew no digest of tensors are given it by others of the same file: equality of
    weights, by file or by tensors, is then the same in any order.
    """
    return {m.weights_sha256: m.tensors_sha256 for m in models if m.weights_sha256 and m.tensors_sha256}


def same_answers(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists of answers are one function's, up to `ROUNDING`; unknown ones agree with all."""
    if not one or not other:
        return True
    scale = max(map(abs, [*one, *other]))
    return len(one) == len(other) and all(
        abs(a - b) <= ROUNDING * scale for a, b in zip(one, other, strict=True)
    )


class DataInfo(Section):
    """The images a model was evaluated on: data set, split, number, digest, classes."""

    name: str
    split: str
    n: int
    total: int
    digest: str
    classes: list[str]
    notes: str = ""
