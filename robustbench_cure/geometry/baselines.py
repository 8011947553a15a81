"""What a universal perturbation is compared with: other vectors, the same for all images, at every length.

Source: thesis, section 4.4, Fig. 4.9: noise; the adversarial perturbation of one image, by DeepFool and by
the fast gradient sign method; the sum of the adversarial perturbations of all images; the mean image. Each
is stretched to a common length and added to all images.

Images that DeepFool cannot move have no perturbation: they are not drawn, and add nothing to the sum. The
image is drawn by the seed, and noise several times, since a single vector of it may be lucky.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.subspaces import L2
from robustbench_cure.geometry.universal import fooled
from robustbench_cure.threat import Norm, ThreatModel

#: Lengths at which perturbations are compared, in radii of the universal one.
LENGTHS = np.linspace(0, 2, 11)
#: Vectors of noise.
DRAWS = 10


def baselines(classifier: Classifier, x: Tensor, *, norm: Norm, seed: int) -> dict[str, Tensor]:
    """Directions by name, float32 (k,C,H,W) on the CPU: k is `DRAWS` for noise, 1 for all others.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        norm: noise is drawn from the surface of its ball; in linf from the corners.
        seed: of noise, and of the one image.
    """
    images, x = x.cpu(), x.to(classifier.device)
    label = classifier.logits(x).argmax(1)
    found = deepfool(classifier, x, label, threat=L2, mode="minimal", clip=False)
    moved = torch.ones_like(label, dtype=torch.bool) if found.converged is None else found.converged
    r = torch.where(moved.view(-1, 1, 1, 1), found.x_adv - x, torch.zeros_like(x)).cpu()
    order = Noise.for_samples(seed, "universal", ["image"]).uniform((len(x),), 0)[0]
    one = int(torch.where(moved.cpu(), order, -1.0).argmax())
    here = slice(one, one + 1)
    # Steepest where cross-entropy is, also where that is zero in float32.
    loss = partial(odds_against, labels=label[here])
    gradient = classifier.value_and_gradient(x[here], loss, reference=True)[1]
    noise = Noise.for_samples(seed, "universal", [f"random/{draw}" for draw in range(DRAWS)])
    draw = noise.normal if norm == "l2" else noise.signs
    return {
        "random": draw(tuple(x.shape[1:]), 0),
        "one image's": r[here],
        "one image's FGSM": gradient.sign().cpu(),
        "sum of all images'": r.sum(0, keepdim=True),
        "mean image": images.mean(0, keepdim=True),
    }


def by_length(
    classifier: Classifier, x: Tensor, clean: Tensor, threat: ThreatModel, directions: dict[str, Tensor]
) -> pd.DataFrame:
    """Shares of fooled images for every direction at every length of `LENGTHS`; mean and largest of draws.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        clean: labels predicted for them, int64 (B,).
        threat: norm and radius that lengths are given in.
        directions: as those of `baselines`; a zero one is added as it is.
    """
    rows = []
    for name, draws in directions.items():
        sizes = threat.distance(torch.zeros_like(draws), draws).clamp_min(1e-30).view(-1, 1, 1, 1)
        for radii in LENGTHS:
            length = radii * threat.radius
            shares = [float(fooled(classifier, x, clean, v).double().mean()) for v in draws / sizes * length]
            rows.append(
                {
                    "perturbation": name,
                    "radii": radii,
                    "length": length,
                    "fooled": float(np.mean(shares)),
                    "most": max(shares),
                    "draws": len(shares),
                }
            )
    return pd.DataFrame(rows)
