"""Attacks called directly: wrong images and labels are refused in words, before the model is asked."""

from __future__ import annotations

import inspect
from functools import partial

import made
import pytest
import torch
from torch import nn

from robustbench_cure.attacks import deepfool, fgsm, pgd, pgd_checkpoints, spsa, square, uniform_noise
from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.threat import BOX_TOLERANCE, ThreatModel

THREAT = ThreatModel.parse("linf", "8/255")
WORK = {
    fgsm: {},
    pgd: {"steps": 2, "step_size": 0.02},
    pgd_checkpoints: {"checkpoints": (1, 2), "step_size": 0.02},
    deepfool: {},
    spsa: {"steps": 4, "samples": 4},
    square: {"queries": 4},
    uniform_noise: {"draws": 2},
}
SHAPE = (3, 6, 5)
images = partial(made.images, 6, SHAPE, seed=1)


def network() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(90, 4))
    return Classifier(net, num_classes=4, input_shape=SHAPE)


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def with_nan() -> torch.Tensor:
    x = images()
    x[3, 1, 2, 2] = torch.nan
    return x


WRONG = {
    "float labels": (images(), LABELS.float(), TypeError, "labels must be torch.int64, got torch.float32"),
    "a list of labels": (images(), LABELS.tolist(), TypeError, "labels must be a tensor, got list"),
    "labels in a column": (images(), LABELS[:, None], ValueError, r"of shape \(6,\); got \(6, 1\)"),
    "one label too few": (images(), LABELS[:5], ValueError, r"of shape \(6,\); got \(5,\)"),
    "a label beyond the outputs": (images(), LABELS + 1, ValueError, r"labels must be 0\.\.3, got 1\.\.4"),
    "a negative label": (images(), LABELS - 1, ValueError, r"labels must be 0\.\.3, got -1\.\.2"),
    "channels last": (
        images().permute(0, 2, 3, 1),
        LABELS,
        ValueError,
        r"here \(B, 3, 6, 5\); got \(6, 6, 5, 3\): x.permute\(0, 3, 1, 2\)",
    ),
    "another size": (images()[..., :4], LABELS, ValueError, r"here \(B, 3, 6, 5\); got \(6, 3, 6, 4\)$"),
    "flat images": (images().flatten(1), LABELS, ValueError, r"must be \(B, C, H, W\).*got \(6, 90\)"),
    "0 to 255": (images() * 255, LABELS, ValueError, r"must lie in \[0, 1\].*divide grey levels by 255"),
    "normalised": ((images() - 0.5) / 0.25, LABELS, ValueError, "leave normalisation to the model"),
    "bytes": (
        (images() * 255).to(torch.uint8),
        LABELS,
        TypeError,
        "images must be torch.float32, got torch.uint8",
    ),
    "float64": (images().double(), LABELS, TypeError, "got torch.float64"),
    "an array": (images().numpy(), LABELS, TypeError, "images must be a tensor, got ndarray"),
    "NaN": (with_nan(), LABELS, ValueError, "images contain NaN or infinity"),
    "infinity": (with_nan().nan_to_num(torch.inf), LABELS, ValueError, "images contain NaN or infinity"),
}


@pytest.mark.parametrize("attack", WORK, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_before_the_model_is_asked(attack, case):
    x, y, kind, words = WRONG[case]
    classifier = network()
    with pytest.raises(kind, match=words):
        attack(classifier, x, y, threat=THREAT, **WORK[attack])
    assert classifier.forwards == classifier.backwards == 0


@pytest.mark.parametrize("attack", WORK, ids=lambda attack: attack.__name__)
def test_right_inputs_pass_and_so_do_none(attack):
    rounded = images().clamp(0.1, 1) + 1e-7  # as they come back from normalisation
    for x, y in (
        (images(), LABELS),
        (rounded, LABELS),
        (images()[:0], LABELS[:0]),
        (images()[:0], torch.tensor([])),
    ):
        found = attack(network(), x, y, threat=THREAT, **WORK[attack])
        for candidates in found if isinstance(found, list) else [found]:
            assert candidates.x_adv.shape == x.shape
            assert bool(((candidates.x_adv >= 0) & (candidates.x_adv <= 1 + BOX_TOLERANCE)).all())


def test_every_attack_of_the_package_is_tested():
    own = {attack for name, attack in ATTACKS.items() if name != "peer"}
    assert own | {pgd_checkpoints} == set(WORK)
    assert all(inspect.isfunction(attack) for attack in own)


def test_minimal_deepfool_without_the_box_takes_normalised_inputs_but_no_nan():
    x = (images() - 0.5) / 0.25
    found = deepfool(network(), x, LABELS, threat=THREAT, mode="minimal", clip=False)
    assert bool(found.converged.all())
    with pytest.raises(ValueError, match="must lie in"):
        deepfool(network(), x, LABELS, threat=THREAT, mode="bounded", clip=False)
    with pytest.raises(ValueError, match="NaN"):
        deepfool(network(), with_nan(), LABELS, threat=THREAT, mode="minimal", clip=False)


def test_a_network_in_training_knows_no_shape_and_is_asked_for_none():
    net = nn.Sequential(nn.Flatten(), nn.Linear(90, 4))
    live = Classifier.live(net, num_classes=4)
    check_inputs(live, images(), LABELS)
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\); got \(6, 90\)"):
        check_inputs(live, images().flatten(1), LABELS)


def test_images_that_carry_gradients_are_only_looked_at(recwarn):
    check_inputs(network(), images().requires_grad_(True), LABELS)
    assert len(recwarn) == 0
