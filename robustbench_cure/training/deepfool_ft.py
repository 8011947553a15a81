"""Fine-tuning on DeepFool examples of the current weights.

Source: CURE paper (Moosavi-Dezfooli, Fawzi, Uesato & Frossard 2019, arXiv 1811.09716), section 2, which fixes
the number of epochs only. Here the examples are made anew for every batch, by the network in evaluation
mode, kept in the pixel box, and trained on alone, with their true labels; images already misclassified
enter unperturbed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.classifier import Classifier
from robustbench_cure.protocol.recipes import DeepFoolRecipe
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training.step import Step, StepContext, evaluation_mode


def deepfool_ft(model: nn.Module, x: Tensor, y: Tensor, recipe: DeepFoolRecipe, context: StepContext) -> Step:
    """Cross-entropy, in training mode, of the DeepFool examples of a batch.

    Args:
        model: maps images in [0, 1] to logits.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: labels, int64 (B,).
        recipe: norm, overshoot, steps and candidate classes of DeepFool.
        context: number of classes.

    Returns:
        Mean loss on the perturbed images, and the mean l2 length of the perturbations.
    """
    threat = ThreatModel.unbounded(recipe.norm)
    x_adv = x.clone()
    with evaluation_mode(model, frozen=True):
        with torch.no_grad():
            right = model(x).argmax(1) == y
        if right.any():
            x_adv[right] = deepfool(
                Classifier.live(model, num_classes=context.num_classes),
                x[right],
                y[right],
                threat=threat,
                mode="minimal",
                steps=recipe.steps,
                overshoot=recipe.overshoot,
                candidates=min(recipe.candidates, context.num_classes),
                clip=True,
            ).x_adv
    length = (x_adv - x).flatten(1).norm(dim=1).mean()
    return functional.cross_entropy(model(x_adv), y), {"perturbation": length}
