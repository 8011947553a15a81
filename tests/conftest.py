"""Models whose robustness is known exactly, a small trained one, and an independent judge."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Data
from torch import nn
from torch.nn import functional

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import load_dataset

# The models are tiny: a second thread would only wait for the first, and for other processes.
torch.set_num_threads(1)

# A shell that starts pytest in the background has it ignore interrupts, and with it every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whatever ran before; TEST_SEED=k asks whether a test passes by luck of the draw."""
    torch.manual_seed(int(os.environ.get("TEST_SEED", "0")))


@dataclass
class Affine:
    """Logits W x + b, and what geometry says about them, in float64."""

    classifier: Classifier
    weight: np.ndarray  # (L, d)
    bias: np.ndarray

    def logits(self, x: torch.Tensor) -> np.ndarray:
        return x.flatten(1).double().numpy() @ self.weight.T + self.bias

    def radii(self, x: torch.Tensor, y: torch.Tensor, norm: str) -> np.ndarray:
        """Distance to each face of the label's region, (B, L); infinite for the label itself."""
        logits, labels = self.logits(x), y.numpy()
        gaps = logits[np.arange(len(labels)), labels][:, None] - logits
        slopes = self.weight[labels][:, None] - self.weight[None]
        dual = np.abs(slopes).sum(2) if norm == "linf" else np.sqrt((slopes**2).sum(2))
        return np.where(dual > 0, gaps / np.where(dual > 0, dual, 1), np.inf)


@pytest.fixture
def affine():
    """Builder of `Affine` from weights (L, d) and biases (L,)."""

    def make(weight, bias, shape, **options) -> Affine:
        weight, bias = np.asarray(weight, np.float32), np.asarray(bias, np.float32)
        layer = nn.Linear(weight.shape[1], len(weight))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
        net = nn.Sequential(nn.Flatten(), layer)
        options = {"num_classes": len(weight), "input_shape": shape, "batch_size": 8192} | options
        return Affine(Classifier(net, **options), weight.astype(np.float64), bias.astype(np.float64))

    return make


@pytest.fixture(scope="session")
def digits() -> Data:
    """The first 320 training digits."""
    data = load_dataset("digits", "train")
    return Data(data.images[:320].clone(), data.labels[:320].clone())


@pytest.fixture
def judge():
    """Which rows are adversarial: inside ball and box, finite, another label. Shares no code with ours."""

    def broken(module, x, y, x_adv, norm: str, eps: float) -> np.ndarray:
        delta = (x_adv.double() - x.double()).flatten(1).numpy()
        size = np.abs(delta).max(1) if norm == "linf" else np.sqrt((delta**2).sum(1))
        inside = (size <= eps + 1e-6) & (x_adv.flatten(1).numpy() >= 0).all(1)
        inside &= (x_adv.flatten(1).numpy() <= 1).all(1) & np.isfinite(delta).all(1)
        with torch.no_grad():
            logits = module(x_adv).double().numpy()
        own = logits[np.arange(len(y)), y.numpy()].copy()
        logits[np.arange(len(y)), y.numpy()] = -np.inf
        return inside & (logits.max(1) > own)

    return broken


class SmallNet(nn.Module):
    """Convolutions with batch-norm for 8x8 digits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * width, 10)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture(scope="session")
def digits_net():
    """`SmallNet` trained for a second, in evaluation mode. Do not modify: copy."""
    data = load_dataset("digits", "train")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = SmallNet().train()
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(6):
            for rows in torch.split(torch.randperm(len(data)), 64):
                x = data.images[rows] + 0.05 * torch.randn_like(data.images[rows])
                loss = functional.cross_entropy(net(x), data.labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def digits_test():
    """Images and labels of the digits test split that `digits_net` classifies correctly."""
    data = load_dataset("digits", "test")
    return data.images, data.labels


@pytest.fixture(scope="module")
def svg_only():
    """Studies write their figures as SVG alone: the other formats take most of a small run's time."""
    from robustbench_cure.studies import plots  # imports matplotlib, which few tests need

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FORMATS", {"svg": plots.FORMATS["svg"]})
        yield


@pytest.fixture
def quiet():
    """Warnings of third-party attack libraries are theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """Chromium; without it the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """Open a file offline; nothing outside `within` may be requested, and no error raised."""
    contexts, requests, troubles = [], [], []

    def start(path: Path, *, within: Path, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append((request.url, within.as_uri())))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield start
    for context in contexts:
        context.close()
    assert requests
    assert [url for url, inside in requests if not url.startswith(inside)] == []
    assert troubles == []
