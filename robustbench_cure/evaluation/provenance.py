"""Where a number comes from: code version, libraries, machine, commit."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.record import Environment
from robustbench_cure.protocol.catalog import is_our_checkout
from robustbench_cure.version import __version__

#: Batches and seconds, at most, that the raw rate of gradients is measured with.
RATE_BATCHES, RATE_SECONDS = 5, 0.5


def environment(device: torch.device, command: str = "", peers: Sequence[str] = ()) -> Environment:
    """Describe this process and the device it works on.

    Args:
        device: where the model lives.
        command: the command line, if there was one.
        peers: other libraries that took part, with their versions.
    """
    commit, dirty = git_state(Path(__file__).parents[2])
    return Environment(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        git_commit=commit,
        git_dirty=dirty,
        command=command,
        peers=list(peers),
    )


def gradient_rate(classifier: Classifier, x: Tensor, y: Tensor) -> float:
    """Input gradients a second of the search form alone: what no attack on this machine can exceed.

    Args:
        classifier: the model; the passes made here are not counted.
        x: images, float32 (B,C,H,W); at most one batch is used.
        y: labels, int64 (B,).

    Returns:
        The best of a few batches; 0 where the model fails, which the evaluation will say.
    """
    x, y = x[: classifier.batch_size], y[: classifier.batch_size]
    loss, before = partial(odds_against, labels=y), (classifier.forwards, classifier.backwards)
    devices = [classifier.device] if classifier.device.type == "cuda" else []
    seconds: list[float] = []
    with torch.random.fork_rng(devices), suppress(Exception):
        while len(seconds) < RATE_BATCHES and sum(seconds) < RATE_SECONDS:
            started = time.perf_counter()
            classifier.value_and_gradient(x, loss)
            if devices:
                torch.cuda.synchronize(classifier.device)
            seconds.append(time.perf_counter() - started)
    classifier.forwards, classifier.backwards = before
    return len(x) / min(seconds) if seconds and len(x) else 0.0


def device_name(device: torch.device) -> str:
    """The processor's or the card's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


def git_state(checkout: Path) -> tuple[str, bool]:
    """Commit and whether there are uncommitted changes; ("", False) outside a checkout of this project."""
    if not is_our_checkout(checkout):
        return "", False
    commit = _git(checkout, "rev-parse", "HEAD")
    return commit, bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
