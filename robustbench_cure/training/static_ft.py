"""Fine-tuning on a fixed set of perturbed images, made once by the network that training starts from.

Source: thesis, section 3.3: DeepFool l2 on the whole training set, then five epochs at half the learning
rate on those images alone, with their true labels; FGSM images as the control; figure 3.7 for perturbations
magnified by alpha. Deviation: what leaves the pixel box is cut off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.fgsm import fgsm
from robustbench_cure.classifier import Classifier
from robustbench_cure.protocol.recipes import StaticDeepFoolRecipe, StaticFGSMRecipe
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training.step import evaluation_mode


def deepfool_images(
    model: nn.Module, x: Tensor, y: Tensor, recipe: StaticDeepFoolRecipe, num_classes: int
) -> Tensor:
    """DeepFool images of a whole training set; what is misclassified already stays as it is.

    Args:
        model: maps images in [0, 1] to logits.
        x: images, float32 (N,C,H,W) in [0, 1]; not modified.
        y: labels, int64 (N,).
        recipe: norm, overshoot, steps and candidate classes of DeepFool, and the magnification.
        num_classes: number of logits.

    Returns:
        Images in [0, 1], shape of ``x``.
    """
    threat = ThreatModel.unbounded(recipe.norm)

    def attack(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        return deepfool(
            classifier,
            images,
            labels,
            threat=threat,
            mode="minimal",
            steps=recipe.steps,
            overshoot=recipe.overshoot,
            candidates=min(recipe.candidates, num_classes),
            clip=True,
        ).x_adv

    return _perturbed(model, x, y, attack, recipe.magnification, recipe.batch_size, num_classes)


def fgsm_images(model: nn.Module, x: Tensor, y: Tensor, recipe: StaticFGSMRecipe, num_classes: int) -> Tensor:
    """FGSM images (linf) of a whole training set; arguments and result as in `deepfool_images`."""
    threat = ThreatModel.parse("linf", recipe.eps)

    def attack(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        return fgsm(classifier, images, labels, threat=threat).x_adv

    return _perturbed(model, x, y, attack, recipe.magnification, recipe.batch_size, num_classes)


def _perturbed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Callable[[Classifier, Tensor, Tensor], Tensor],
    magnification: float,
    batch_size: int,
    num_classes: int,
) -> Tensor:
    """The set, batch by batch, on the model's device; the rows classified correctly are perturbed."""
    device = next(model.parameters()).device
    classifier = Classifier.live(model, num_classes=num_classes, batch_size=batch_size)
    out = x.clone()
    with evaluation_mode(model, frozen=True):
        for rows in torch.split(torch.arange(len(x), device=x.device), batch_size):
            images, labels = x[rows].to(device), y[rows].to(device)
            with torch.no_grad():
                right = model(images).argmax(1) == labels
            if right.any():
                images, labels = images[right], labels[right]
                moved = images + magnification * (attack(classifier, images, labels) - images)
                out[rows[right.to(rows.device)]] = moved.clamp(0, 1).to(out.device)
    return out
