"""Training: one loop, and one file a method. `train` runs the recipe of a model card."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from robustbench_cure.training.cure import cure
from robustbench_cure.training.deepfool_ft import deepfool_ft
from robustbench_cure.training.pgd_at import pgd_at
from robustbench_cure.training.standard import standard
from robustbench_cure.training.static_ft import deepfool_images, fgsm_images
from robustbench_cure.training.step import Step

#: `method` of a recipe -> (model, x, y, recipe, context) -> (loss, scalars for the log).
METHODS: dict[str, Callable[..., Step]] = {
    "standard": standard,
    "pgd_at": pgd_at,
    "deepfool": deepfool_ft,
    "static_deepfool": standard,
    "static_fgsm": standard,
    "cure": cure,
}

#: Methods that replace the training images before the first step:
#: (model, images, labels, recipe, num_classes) -> images.
PREPARATIONS: dict[str, Callable[..., Tensor]] = {
    "static_deepfool": deepfool_images,
    "static_fgsm": fgsm_images,
}
