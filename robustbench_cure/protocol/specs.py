"""What a battery says of one attack: its kind, and every hyper-parameter of it, without a default.

Nothing about a published protocol is a Python default: every hyper-parameter must be written in the battery.
This module imports neither torch nor numpy.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from robustbench_cure.protocol.schema import Fractional, Identifier, Positive, Strict
from robustbench_cure.threat import ThreatModel, format_eps, parse_fraction

#: What an attack uses of the model: its gradients; its outputs alone; neither, it draws points at random or
#: transforms images without asking (a control, which searches must beat); or several attacks of both sorts.
Access = Literal["white-box", "gradient-free", "control", "mixed"]
#: When the search on an image ends: at its first verified success, or never.
Stopping = Literal["first-success", "never"]

#: Attacks of other libraries that are not white-box, by what they use.
PEER_ACCESS: dict[str, dict[Access, tuple[str, ...]]] = {
    "autoattack": {"gradient-free": ("square",), "mixed": ("standard", "plus")},
    "torchattacks": {
        "gradient-free": ("OnePixel", "Pixle", "SPSA", "Square"),
        "control": ("GN", "VANILA"),
        "mixed": ("AutoAttack", "MultiAttack"),
    },
    "foolbox": {
        "gradient-free": (
            "BinarizationRefinementAttack", "BinarySearchContrastReductionAttack", "BoundaryAttack",
            "DatasetAttack", "GaussianBlurAttack", "GenAttack", "HopSkipJumpAttack",
            "LinearSearchContrastReductionAttack", "PointwiseAttack",
            "SpatialAttack",
        ),
        "control": (
            "InversionAttack", "L2ContrastReductionAttack", "L2AdditiveGaussianNoiseAttack",
            "L2AdditiveUniformNoiseAttack",
            "L2ClippingAwareAdditiveGaussianNoiseAttack", "L2ClippingAwareAdditiveUniformNoiseAttack",
            "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack",
            "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack", "L2RepeatedAdditiveGaussianNoiseAttack",
            "L2RepeatedAdditiveUniformNoiseAttack", "LinearSearchBlendedUniformNoiseAttack",
            "LinfAdditiveUniformNoiseAttack", "LinfRepeatedAdditiveUniformNoiseAttack",
            "SaltAndPepperNoiseAttack",
        ),
    },
    "art": {
        "gradient-free": (
            "BoundaryAttack", "GeoDA", "HopSkipJump", "PixelAttack", "SignOPTAttack", "SimBA",
            "SpatialTransformation", "SquareAttack", "ThresholdAttack", "ZooAttack",
        ),
        "mixed": ("AutoAttack",),
    },
}  # fmt: skip


#: Losses and ways to stop, as reports name them.
LOSS_NAMES = {
    "ce": "cross-entropy",
    "margin": "margin loss",
    "dlr": "difference-of-logits-ratio loss",
    "pm": "probability-margin loss",
}
#: How target classes are ranked, as reports name it.
ORDER_WORDS = {"logits": "of the largest logits", "distance": "with the nearest linearised boundaries"}
STOP_WORDS = {
    "first-success": "stop at first success",
    "never": "all steps, point of lowest margin counts",
}


def _many(n: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("ry") else f"{what}{'es' * what.endswith('ss') or 's'}"
    return f"{n:,} {what if n == 1 else plural}"


class _Attack(Strict):
    #: What it uses of the model.
    access: ClassVar[Access] = "white-box"

    id: Identifier
    #: What the report prints, e.g. "PGD(20)".
    name: str
    #: Attack only the first `limit` samples of the (shuffled) set; 0 attacks all of them.
    limit: Annotated[int, Field(ge=0)]

    @property
    def gradients(self) -> bool:
        """Whether it uses gradients of the model, alone or among others."""
        return self.access in ("white-box", "mixed")

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments of the attack function; fractions become floats."""
        fields = set(type(self).model_fields) - {"id", "name", "limit", "kind"}
        return {key: self._plain(key, getattr(self, key)) for key in sorted(fields)}

    def _plain(self, key: str, value: Any) -> Any:
        return float(parse_fraction(value)) if key == "step_size" else value

    @property
    def implementation(self) -> str:
        """Which function of `ATTACKS` runs it."""
        return _family(self)

    @property
    def stream(self) -> str:
        """Name of the random numbers that it draws; equal for attacks that share a trajectory."""
        return str(self.kind)  # type: ignore[attr-defined]  # every attack has a kind

    @property
    def classes(self) -> int:
        """How many classes a network must have for it, at least."""
        return 2

    @property
    def passes(self) -> int:
        """Images that it passes forward for one image at most; 0: not known, or too few to count."""
        return 0

    def check(self, threat: ThreatModel) -> None:
        """Refuse a budget that cannot be right under this threat model (ValueError)."""

    def words(self, threat: ThreatModel) -> str:
        """Every hyper-parameter in words, as reports print it under the attack's name.

        Args:
            threat: the ball that it is used in.
        """
        del threat  # of the attacks that are worded below
        given = self.model_dump(exclude={"id", "name", "limit", "kind"})
        return (
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in given.items()) or "no parameters"
        )

    def scaled(self, ratio: Fraction) -> Self:
        """The same attack for a ball ``ratio`` times as large: steps grow with it."""
        size = getattr(self, "step_size", None)
        if size is None:
            return self
        return self.model_copy(update={"step_size": format_eps(parse_fraction(size) * ratio)})


class FGSM(_Attack):
    """One gradient-sign step (l2: one normalised-gradient step) of length eps."""

    kind: Literal["fgsm"]

    def words(self, threat: ThreatModel) -> str:  # noqa: D102 - as in the base
        kind = "gradient-sign" if threat.norm == "linf" else "normalised-gradient"
        return f"one {kind} step of length {format_eps(threat.eps)}, no random start, cross-entropy"


class UniformNoise(_Attack):
    """Control: random points of the ball, the worst of `draws` counts."""

    access = "control"

    kind: Literal["uniform_noise"]
    draws: Positive

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        return f"{_many(self.draws, 'uniform random point')} of the ball, the worst one counts"


class PGD(_Attack):
    """Projected gradient descent; entries that differ in `steps` alone share one trajectory."""

    kind: Literal["pgd"]
    steps: Positive
    step_size: Fractional
    random_start: bool
    restarts: Positive
    loss: Literal["ce", "margin", "dlr", "pm"]
    stop: Stopping

    @property
    def stream(self) -> str:  # noqa: D102 - as in the base
        # Another loss from other starts finds more than from the same.
        return "pgd" if self.loss == "ce" else f"pgd/{self.loss}"

    @property
    def classes(self) -> int:  # noqa: D102 - as in the base
        return 3 if self.loss == "dlr" else 2

    def check(self, threat: ThreatModel) -> None:  # noqa: D102 - as in the base
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without a random start repeat the same trajectory")
        if self.steps * parse_fraction(self.step_size) < threat.eps:
            raise ValueError(
                f"{self.steps} steps of {self.step_size} cannot cross the ball of radius {threat.eps}"
            )

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        parts = [
            f"{_many(self.steps, 'step')} of {self.step_size}",
            "random start" if self.random_start else "no random start",
            _many(self.restarts, "restart"),
            LOSS_NAMES[self.loss],
            STOP_WORDS[self.stop],
        ]
        return ", ".join(parts)


class APGD(_Attack):
    """Auto-PGD: step sizes follow from progress alone; untargeted, or towards one class after the other."""

    kind: Literal["apgd"]
    steps: Positive
    restarts: Positive
    loss: Literal["ce", "dlr", "margin", "pm"]
    #: Target classes at most, the best first; 0: untargeted.
    targets: Annotated[int, Field(ge=0)]
    order: Literal["logits", "distance"]
    rho: Annotated[float, Field(gt=0, lt=1)]
    give_up: bool
    stop: Stopping

    @property
    def stream(self) -> str:  # noqa: D102 - as in the base
        return f"apgd/{self.loss}{'/targeted' * bool(self.targets)}"

    @property
    def classes(self) -> int:  # noqa: D102 - as in the base
        return 2 if self.loss != "dlr" else 4 if self.targets else 3

    @property
    def passes(self) -> int:  # noqa: D102 - as in the base
        return self.restarts * max(1, self.targets) * (self.steps + 1)

    def check(self, threat: ThreatModel) -> None:  # noqa: ARG002, D102 - as in the base
        if self.targets and self.loss not in ("dlr", "margin"):
            raise ValueError(f"loss {self.loss!r} has no targeted form: use dlr or margin, or targets = 0")
        if self.order == "distance" and not self.targets:
            raise ValueError('order "distance" is of targets, and there are none')

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        towards = f"{_many(self.targets, 'target class')} at most, those {ORDER_WORDS[self.order]}"
        parts = [
            f"{_many(self.steps, 'step')} of adaptive size",
            _many(self.restarts, "random start"),
            LOSS_NAMES[self.loss],
            towards if self.targets else "untargeted",
            f"rho {self.rho:g}",
            *(["hopeless searches given up"] if self.give_up else []),
            STOP_WORDS[self.stop],
        ]
        return ", ".join(parts)


class FAB(_Attack):
    """Targeted fast adaptive boundary attack: the nearest boundary of one class after the other."""

    kind: Literal["fab"]
    steps: Positive
    restarts: Positive
    #: Target classes at most, those of the largest logits first.
    targets: Positive
    alpha_max: Annotated[float, Field(ge=0, le=1)]
    eta: Annotated[float, Field(ge=1)]
    beta: Annotated[float, Field(gt=0, lt=1)]
    stop: Stopping

    @property
    def passes(self) -> int:  # noqa: D102 - as in the base
        return self.restarts * self.targets * 2 * self.steps

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        parts = [
            _many(self.steps, "step"),
            _many(self.restarts, "start"),
            f"{_many(self.targets, 'target class')} at most, those {ORDER_WORDS['logits']}",
            f"alpha at most {self.alpha_max:g}, eta {self.eta:g}, beta {self.beta:g}",
            STOP_WORDS[self.stop],
        ]
        return ", ".join(parts)


class Square(_Attack):
    """Gradient-free random search with square-shaped changes."""

    access = "gradient-free"

    kind: Literal["square"]
    queries: Positive
    restarts: Positive
    p_init: Annotated[float, Field(gt=0, le=1)]
    rescale_schedule: bool
    stop: Stopping

    @property
    def passes(self) -> int:  # noqa: D102 - as in the base
        return self.restarts * self.queries

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        parts = [
            _many(self.queries, "query"),
            _many(self.restarts, "random start"),
            f"first squares of {self.p_init:g} of the pixels",
            f"schedule {'rescaled to the' if self.rescale_schedule else 'of 10,000'} queries",
            LOSS_NAMES["margin"],
            STOP_WORDS[self.stop],
        ]
        return ", ".join(parts)


class DeepFool(_Attack):
    """DeepFool in the norm of the threat model, inside the ball or to the nearest boundary."""

    kind: Literal["deepfool"]
    mode: Literal["bounded", "minimal"]
    steps: Positive
    overshoot: Annotated[float, Field(ge=0)]
    candidates: Annotated[int, Field(ge=2)]
    clip: bool

    def words(self, threat: ThreatModel) -> str:  # noqa: D102 - as in the base
        bounded = f"cut to the ball of radius {format_eps(threat.eps)} at every step"
        parts = [
            f"at most {_many(self.steps, 'step')}",
            f"overshoot {self.overshoot:g}",
            f"{self.candidates} candidate classes",
            bounded if self.mode == "bounded" else "to the nearest decision boundary, no radius",
            "kept in [0, 1]" if self.clip else "not kept in [0, 1]",
        ]
        return ", ".join(parts)


class SPSA(_Attack):
    """Gradient-free search from finite differences along random sign vectors."""

    access = "gradient-free"

    kind: Literal["spsa"]
    steps: Positive
    samples: Positive
    step_size: Fractional
    delta: Annotated[float, Field(gt=0, lt=0.5)]
    stop: Stopping

    @property
    def passes(self) -> int:  # noqa: D102 - as in the base
        return 2 * self.samples * self.steps

    def check(self, threat: ThreatModel) -> None:  # noqa: D102 - as in the base
        if self.steps * parse_fraction(self.step_size) < threat.eps:
            raise ValueError(
                f"{self.steps} Adam steps of {self.step_size} cannot reach the ball of radius {threat.eps}"
            )

    def words(self, threat: ThreatModel) -> str:  # noqa: ARG002, D102 - as in the base
        parts = [
            f"{_many(self.steps, 'Adam step')} of {self.step_size}",
            f"{_many(self.samples, 'random direction')} a step",
            f"finite difference {self.delta:g}",
            LOSS_NAMES["margin"],
            STOP_WORDS[self.stop],
        ]
        return ", ".join(parts)


class Peer(_Attack):
    """An attack of another library, "torchattacks:CW"; further keys are its parameters."""

    model_config = ConfigDict(extra="allow")

    kind: Annotated[str, Field(pattern=r"^[a-z]+:[A-Za-z][\w-]*$")]

    @model_validator(mode="after")
    def _plain_options(self) -> Peer:
        for key, value in (self.model_extra or {}).items():
            if not isinstance(value, (bool, int, float, str)):
                raise ValueError(f"{key}: must be a number, a word or true or false")
        return self

    @property
    def access(self) -> Access:  # type: ignore[override]  # decided by the kind, not by the class
        """What it uses of the model, as far as is known; white-box where nothing else is."""
        library, _, name = self.kind.partition(":")
        known = PEER_ACCESS.get(library, {})
        return next((access for access, names in known.items() if name in names), "white-box")

    @property
    def options(self) -> dict[str, Any]:
        """Parameters of the attack; fractions such as "2/255" become floats."""
        return {key: _number(value) for key, value in sorted((self.model_extra or {}).items())}

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments of the function that runs peers."""
        return {"kind": self.kind, "options": self.options}

    def words(self, threat: ThreatModel) -> str:  # noqa: D102 - as in the base
        library, _, name = self.kind.partition(":")
        values = ", ".join(f"{key} {value}" for key, value in sorted((self.model_extra or {}).items()))
        radius = format_eps(threat.eps)
        return f"{name} of {library}, radius {radius}; {values or 'no parameter set'}; the rest its defaults"

    def scaled(self, ratio: Fraction) -> Self:  # noqa: ARG002, D102 - as in the base
        given = [key for key, value in (self.model_extra or {}).items() if "/" in str(value)]
        if given:
            raise ValueError(f"attack {self.id!r}: its {given[0]} belongs to the battery's own radius")
        return self


def _number(value: Any) -> Any:
    return float(parse_fraction(value)) if isinstance(value, str) and "/" in value else value


def _family(value: Any) -> str:
    """Which of the classes below an entry is for: its kind, or ``peer`` for "library:Name"."""
    kind = value.get("kind", "") if isinstance(value, dict) else getattr(value, "kind", "")
    return "peer" if ":" in str(kind) else str(kind)


AttackSpec = Annotated[
    Annotated[FGSM, Tag("fgsm")]
    | Annotated[UniformNoise, Tag("uniform_noise")]
    | Annotated[PGD, Tag("pgd")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")]
    | Annotated[DeepFool, Tag("deepfool")]
    | Annotated[SPSA, Tag("spsa")]
    | Annotated[Peer, Tag("peer")],
    Discriminator(_family),
]
