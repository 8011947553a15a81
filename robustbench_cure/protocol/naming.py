"""What a model is called: resolved once, so that nothing else looks at the form of a name.

A name is the id of a card, ``robustbench:NAME`` or ``robustbench:DATASET/THREAT/NAME``, or
``package.module:factory`` for a network of the user's own. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import CardFile, find

#: What names of RobustBench's models begin with.
ROBUSTBENCH = "robustbench:"
#: RobustBench's data sets -> number of classes and image shape (C, H, W).
ROBUSTBENCH_DATASETS = {
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "imagenet": (1000, (3, 224, 224)),
}
#: Battery of models whose card names none, because they have no card.
DEFAULT_BATTERY = "strong"


@dataclass(frozen=True)
class ModelName:
    """A model as a command names it.

    Attributes:
        name: as given.
        card_file: its card, and the file of the card; None: it has none.
        robustbench: data set, threat model and name in RobustBench's model zoo; None: it is not from there.
    """

    name: str
    card_file: CardFile[ModelCard] | None = None
    robustbench: tuple[str, str, str] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def card(self) -> ModelCard | None:
        """The model's card, where it has one."""
        return self.card_file.card if self.card_file else None

    @property
    def factory(self) -> bool:
        """Whether it is a function of the user's own, which builds the network."""
        return self.card_file is None and self.robustbench is None

    @property
    def battery(self) -> str:
        """Id of the battery used when none is named."""
        return self.card.battery if self.card else DEFAULT_BATTERY

    @property
    def dataset(self) -> str:
        """Data set the model is for.

        Raises:
            UsageError: a model of the user's own, which does not say.
        """
        if self.card:
            return self.card.dataset
        if self.robustbench:
            return self.robustbench[0]
        raise UsageError(f"{self.name}: a model without a card needs --dataset")


def resolve_model(name: str, cards: tuple[str, ...] = ()) -> ModelName:
    """What a name stands for.

    Args:
        name: see the module.
        cards: directories with further cards.

    Raises:
        UsageError: no such card, or not of the form of RobustBench's names.
    """
    if name.startswith(ROBUSTBENCH):
        return ModelName(name, robustbench=robustbench_parts(name))
    return ModelName(name) if ":" in name else ModelName(name, find(ModelCard, name, cards))


def robustbench_parts(name: str) -> tuple[str, str, str]:
    """Data set, threat model and model of ``robustbench:[dataset/threat/]NAME``; default: cifar10, Linf.

    Raises:
        UsageError: not of that form, or an unknown data set.
    """
    words = name.removeprefix(ROBUSTBENCH).split("/")
    if len(words) == 1:
        words = ["cifar10", "Linf", *words]
    if len(words) != 3 or not all(words):
        raise UsageError(f"{name}: write robustbench:NAME or robustbench:cifar100/Linf/NAME")
    if words[0] not in ROBUSTBENCH_DATASETS:
        known = ", ".join(ROBUSTBENCH_DATASETS)
        raise UsageError(f"{name}: unknown data set {words[0]!r}; there are {known}")
    return words[0], words[1], words[2]
