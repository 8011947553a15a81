"""Images and labels that an attack is given: wrong ones would end as a number that looks right."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import BOX_TOLERANCE

#: When a row's search ends: at its first verified success, or never, and its point of lowest margin counts.
Stop: TypeAlias = Literal["first-success", "never"]


def check_inputs(classifier: Classifier, x: Tensor, y: Tensor, *, box: bool = True) -> None:
    """Refuse what an attack would misread, by one pass over the pixels and none through the model.

    Args:
        classifier: the model under attack: its shape of images and number of classes.
        x: images, float32 (B,C,H,W); no rows are always right.
        y: labels, int64 (B,).
        box: whether x must lie in [0, 1]; off where the attack may leave the box, as in the units of a
            network's normalised inputs.

    Raises:
        TypeError: no tensors, or of another dtype.
        ValueError: another shape, labels outside the classes, NaN, or pixels outside [0, 1].
    """
    if isinstance(x, Tensor) and x.shape[:1] == (0,):
        return
    for what, given, dtype, hint in (
        ("images", x, torch.float32, "x.float(), grey levels divided by 255"),
        ("labels", y, torch.int64, "y.long()"),
    ):
        if not isinstance(given, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(given).__name__}")
        if given.dtype != dtype:
            raise TypeError(f"{what} must be {dtype}, got {given.dtype}: {hint}")
    _check_shapes(classifier, x, y)
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classifier.num_classes:
        raise ValueError(f"labels must be 0..{classifier.num_classes - 1}, got {low}..{high}")
    darkest, brightest = (float(bound) for bound in torch.aminmax(x.detach()))
    if not (abs(darkest) < torch.inf and abs(brightest) < torch.inf):
        raise ValueError("images contain NaN or infinity")
    if box and (darkest < -BOX_TOLERANCE or brightest > 1 + BOX_TOLERANCE):
        raise ValueError(
            f"images must lie in [0, 1], these span [{darkest:g}, {brightest:g}]: divide grey levels by 255, "
            "and leave normalisation to the model"
        )


def _check_shapes(classifier: Classifier, x: Tensor, y: Tensor) -> None:
    shape, wanted = tuple(x.shape), tuple(classifier.input_shape)
    known = any(wanted)  # not for a network in training, see `Classifier.live`
    if len(shape) != 4 or (known and shape[1:] != wanted):
        channels, height, width = wanted
        turned = known and shape[1:] == (height, width, channels)
        raise ValueError(
            f"images must be (B, C, H, W){f', here (B, {channels}, {height}, {width})' if known else ''}; "
            f"got {shape}{': x.permute(0, 3, 1, 2)' if turned else ''}"
        )
    if tuple(y.shape) != (len(x),):
        raise ValueError(f"labels must be one a row, of shape ({len(x)},); got {tuple(y.shape)}")
