"""A tiny network on digits, a card for every training method, and a quadratic loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustbench_cure.protocol.cards import ModelCard, parse_card
from robustbench_cure.training.step import StepContext

HEAD = """
id = "tiny"
name = "Tiny"
dataset = "digits"
architecture = "{architecture}"
num_classes = 10
input_shape = [1, 8, 8]
mean = [0.3]
std = [0.4]
paper = ""
license = "MIT"
notes = ""
battery = "digits"
published_row = ""
[architecture_args]
{args}
[training]
start = "{start}"
epochs = {epochs}
batch_size = 32
optimizer = "{optimizer}"
lr = {lr}
lr_final = 1e-5
schedule = "cosine"
weight_decay = 0.0
augmentation = "none"
precision = "fp32"
seed = {seed}
"""
METHOD = {
    "standard": 'method = "standard"\n',
    "pgd_at": 'method = "pgd_at"\neps = "20/255"\nstep_size = "10/255"\nsteps = 3\n',
    "deepfool": 'method = "deepfool"\nnorm = "l2"\novershoot = 0.02\nsteps = 2\ncandidates = 3\n',
    "static_deepfool": 'method = "static_deepfool"\nnorm = "l2"\novershoot = 0.02\nsteps = 2\n'
    "candidates = 3\nmagnification = 1.0\n",
    "static_fgsm": 'method = "static_fgsm"\neps = "10/255"\nmagnification = 1.0\n',
    "cure": 'method = "cure"\ngamma = [{ epochs = EPOCHS, gamma = 0.1 }]\nh = 0.5\nh_ramp_epochs = 0\n'
    'h_space = "norm"\nreg_power = 1\nbatchnorm = "eval"\n',
}


def card(method: str, *, replace: tuple[tuple[str, str], ...] = (), **options) -> ModelCard:
    defaults = {
        "architecture": "digits_cnn",
        "args": "hidden = 16",
        "start": "",
        "epochs": 3,
        "optimizer": "adam",
        "lr": 3e-3,
        "seed": 0,
    } | options
    text = HEAD.format(**defaults) + METHOD[method].replace("EPOCHS", str(defaults["epochs"]))
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    return parse_card(ModelCard, text, "tiny.toml", "tiny")


@dataclass
class Data:
    images: torch.Tensor
    labels: torch.Tensor
    digest: str = "some"


def context(iteration: int = 0, per_epoch: int = 10) -> StepContext:
    return StepContext(iteration, per_epoch, 10, torch.Generator().manual_seed(0))


def quadratic(n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A, b = root + root.T, torch.randn(n, generator=generator, dtype=torch.float64)
    return A, b, lambda u: 0.5 * (u @ A * u).sum(1) + u @ b
