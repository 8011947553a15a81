"""RobustBench, importable beside torchattacks and pyautoattack.

Two traps of RobustBench 1.1.1 are dealt with here. It imports ``autoattack`` while the package it depends
on is called ``pyautoattack``. And the torchattacks 3.5.1 wheel carries an old top-level ``robustbench`` of
its own: whichever of the two is installed last overwrites the other's files.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import sys
import warnings
from importlib import metadata
from types import ModuleType

from robustbench_cure.errors import UsageError


def import_robustbench() -> ModuleType:
    """Import RobustBench and return it.

    Warnings that its dependencies raise while they are imported are suppressed. Where no ``autoattack``
    is installed, that name stands for ``pyautoattack`` afterwards.

    Raises:
        UsageError: it cannot be imported; says so if its files have been overwritten, and what to do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if importlib.util.find_spec("autoattack") is None:
                _alias_autoattack()
            return importlib.import_module("robustbench")
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"robustbench cannot be imported: {reason}; {_advice()}") from error


def _alias_autoattack() -> None:
    """Let ``autoattack`` and its submodules name the modules of ``pyautoattack``, without a second copy."""
    importlib.import_module("pyautoattack.state")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "pyautoattack":
            sys.modules[name.removeprefix("py")] = module


def _advice() -> str:
    try:
        distribution = metadata.distribution("robustbench")
    except metadata.PackageNotFoundError:
        return "install it: python -m pip install robustbench pyautoattack"
    changed = _overwritten(distribution)
    if not changed:
        return f"robustbench {distribution.version} itself is intact; see the packages it depends on"
    release = f"robustbench=={distribution.version}"
    return (
        f"{len(changed)} of its files ({changed[0]}, ...) are not those of {release}, most likely "
        f"overwritten by torchattacks; repair it: python -m pip install --force-reinstall --no-deps {release}"
    )


def _overwritten(distribution: metadata.Distribution) -> list[str]:
    """Files whose contents differ from the SHA-256 the distribution recorded for them, or are missing."""
    changed = []
    for file in distribution.files or ():
        if file.hash is None or file.hash.mode != "sha256":
            continue
        try:
            digest = hashlib.sha256(file.read_binary()).digest()
        except OSError:
            digest = b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            changed.append(str(file))
    return changed
