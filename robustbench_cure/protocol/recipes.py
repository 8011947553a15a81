"""Training recipes: how a model of a card came, or can come, to be. One section a method."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from robustbench_cure.protocol.schema import Fractional, Positive, Strict
from robustbench_cure.threat import Norm


class _Recipe(Strict):
    #: Id of the model whose weights training starts from; empty: random initialisation.
    start: str
    epochs: Positive
    batch_size: Positive
    optimizer: Literal["adam", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    lr_final: Annotated[float, Field(ge=0)]
    schedule: Literal["cosine", "one-cycle", "constant"]
    weight_decay: Annotated[float, Field(ge=0)]
    augmentation: Literal["none", "crop", "crop-flip"]
    #: Of forward and backward passes; weights and optimiser stay in float32.
    precision: Literal["fp32", "bf16"]
    seed: Annotated[int, Field(ge=0)]
    #: Largest l2 norm of the weights' gradient, which is shortened to it; 0: no limit.
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    #: Decay of the exponential moving average of the weights, which is then what is kept; 0: none.
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0


class StandardRecipe(_Recipe):
    """Standard training: cross-entropy on clean images."""

    method: Literal["standard"]


class PGDRecipe(_Recipe):
    """Adversarial training: cross-entropy on PGD examples made on the fly."""

    method: Literal["pgd_at"]
    eps: Fractional
    step_size: Fractional
    steps: Positive


class DeepFoolRecipe(_Recipe):
    """Fine-tuning on DeepFool examples of the current weights (CURE paper, section 2)."""

    method: Literal["deepfool"]
    norm: Norm
    overshoot: Annotated[float, Field(ge=0)]
    steps: Positive
    candidates: Annotated[int, Field(ge=2)]


class StaticDeepFoolRecipe(_Recipe):
    """Fine-tuning on DeepFool images made once, by the network training starts from (thesis, section 3.3)."""

    method: Literal["static_deepfool"]
    norm: Norm
    overshoot: Annotated[float, Field(ge=0)]
    steps: Positive
    candidates: Annotated[int, Field(ge=2)]
    #: Factor on every perturbation (thesis, figure 3.7).
    magnification: Annotated[float, Field(gt=0)]


class StaticFGSMRecipe(_Recipe):
    """Fine-tuning on FGSM images made once: the control of `StaticDeepFoolRecipe`."""

    method: Literal["static_fgsm"]
    eps: Fractional
    magnification: Annotated[float, Field(gt=0)]


class GammaPhase(Strict):
    """Weight `gamma` of the regulariser during `epochs` epochs."""

    epochs: Positive
    gamma: Annotated[float, Field(gt=0)]


class CureRecipe(_Recipe):
    """Curvature regularisation (CURE paper, section 4): CE + gamma * ||grad l(x+hz) - grad l(x)||^power."""

    method: Literal["cure"]
    gamma: Annotated[tuple[GammaPhase, ...], Field(min_length=1, strict=False)]
    h: Annotated[float, Field(gt=0)]
    h_ramp_epochs: Annotated[int, Field(ge=0)]
    h_space: Literal["norm", "px01"]
    reg_power: Literal[1, 2]
    batchnorm: Literal["eval", "train"]
    #: z along the sign of the loss gradient, or along the gradient itself; both of unit l2 length.
    direction: Literal["sign", "gradient"] = "sign"
    #: Of the difference of gradients, which loses digits: float32 unless a card decides otherwise.
    regulariser_precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _phases(self) -> CureRecipe:
        total = sum(phase.epochs for phase in self.gamma)
        if total != self.epochs:
            raise ValueError(f"gamma phases cover {total} epochs, the recipe has {self.epochs}")
        return self


AnyRecipe: TypeAlias = (
    StandardRecipe | PGDRecipe | DeepFoolRecipe | StaticDeepFoolRecipe | StaticFGSMRecipe | CureRecipe
)
Recipe = Annotated[AnyRecipe, Field(discriminator="method")]
