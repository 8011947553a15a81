"""Where a number comes from: code version, libraries, machine, commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from robustbench_cure.evaluation.record import Environment
from robustbench_cure.protocol.catalog import is_our_checkout
from robustbench_cure.version import __version__


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
