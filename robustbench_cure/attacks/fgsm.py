"""Fast gradient (sign) method.

Source: Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572; l2 form: the normalised gradient.
One step of length eps from the image itself, on cross-entropy with the true label, cut to the box.
The gradient is that of the reference form: there is no later step to correct an error of reduced precision.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel


@torch.inference_mode(False)  # where gradients are zero
def fgsm(
    classifier: Classifier, x: Tensor, y: Tensor, *, threat: ThreatModel, noise: Noise | None = None
) -> Candidates:
    """Perturb each image by one steepest-ascent step of length eps.

    Source: Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572; see the module for the l2 form.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: unused; every attack takes it.

    Returns:
        Candidates inside the ball and the box, of one step, one forward and one backward pass a row.

    Raises:
        TypeError: ``x`` or ``y`` of another type, see `check_inputs`.
        ValueError: images or labels that `check_inputs` refuses.
    """
    check_inputs(classifier, x, y)
    del noise
    candidates = Candidates.start(x)
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        clean, labels = x[rows], y[rows]
        loss = partial(odds_against, labels=labels)
        _, gradient = classifier.value_and_gradient(clean, loss, reference=True)
        candidates.x_adv[rows] = threat.project(clean, clean + threat.radius * threat.steepest(gradient))
    candidates.steps += 1
    candidates.forwards += 1
    candidates.backwards += 1
    return candidates
