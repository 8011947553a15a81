"""Attacks of other libraries in a battery: ``kind = "torchattacks:CW"``, their parameters as keys.

A peer only returns candidates, like every attack: the evaluation verifies them. It never gets hold of the
model, only of a stand-in that computes the reference form, counts passes and has no weights to change. It
works on copies of the images, with random states that are seeded before and put back after. What it tried to
touch is reported.

Norm, radius, number of classes and seed come from the battery and the model; they are not keys. A parameter
that is not written keeps the library's default, so the library's version is part of the record.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier, full_precision
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.specs import Peer
from robustbench_cure.threat import ThreatModel

#: What a peer did that it should not have; contained all the same.
MODE, RANDOM, INPUT = "model mode changed", "global random state used", "input modified"


@dataclass(frozen=True)
class Setting:
    """What the battery and the model decide for a peer.

    Attributes:
        threat: ball.
        classes: of the model.
        shape: (C, H, W).
        seed: of this call.
    """

    threat: ThreatModel
    classes: int
    shape: tuple[int, int, int]
    seed: int


class Library(Protocol):
    """One package of attacks; a module here has these names."""

    #: What pip installs, and the command that does.
    DISTRIBUTION: str
    INSTALL: str

    def names(self) -> list[str]:
        """Attacks that can be named."""

    def signature(self, name: str) -> inspect.Signature:
        """Signature of the attack's constructor, without the model."""

    def preset(self) -> frozenset[str]:
        """Parameters that come from the battery and the model."""

    def minimal(self, name: str) -> bool:
        """Whether it looks for the nearest boundary, so that leaving the ball is no fault."""

    def build(
        self, name: str, model: StandIn, setting: Setting, options: Mapping[str, Any]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The attack with its parameters set: images (B,C,H,W) and labels (B,) in, images out."""


#: Prefix of a kind -> the module here that speaks to the library.
LIBRARIES = {
    "torchattacks": "robustbench_cure.interop.torchattacks",
    "autoattack": "robustbench_cure.interop.autoattack",
    "foolbox": "robustbench_cure.interop.foolbox",
    "art": "robustbench_cure.interop.art",
}


def library(kind: str) -> tuple[Library, str]:
    """The library and the attack's name of a kind.

    Raises:
        UsageError: the library is unknown or not installed, or it has no such attack.
    """
    prefix, _, name = kind.partition(":")
    if prefix not in LIBRARIES:
        raise UsageError(f"{kind}: unknown library {prefix!r}; there are {', '.join(LIBRARIES)}")
    module: Any = importlib.import_module(LIBRARIES[prefix])
    try:
        with warnings.catch_warnings():  # of what the library itself imports
            warnings.simplefilter("ignore")
            names = module.names()
    except ImportError as error:
        raise UsageError(f"{kind}: {prefix} cannot be imported ({error}); {module.INSTALL}") from None
    if name not in names:
        raise UsageError(f"{kind}: {prefix} has no attack {name!r}{_nearest(name, names)}")
    return module, name


def check(spec: Peer) -> None:
    """Compare a spec with the attack's own signature.

    Raises:
        UsageError: the attack is not there, a parameter is unknown, given from elsewhere, or missing.
    """
    peer, name = library(spec.kind)
    parameters = peer.signature(name).parameters
    for key in spec.options:
        if key in peer.preset():
            raise UsageError(f"attack {spec.id!r}: {key} comes from the battery and the model; leave it out")
        if key not in parameters:
            known = [p for p in parameters if p not in peer.preset()]
            raise UsageError(
                f"attack {spec.id!r}: {spec.kind} has no parameter {key!r}{_nearest(key, known)}"
            )
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind is p.POSITIONAL_OR_KEYWORD
        and p.name not in {*peer.preset(), *spec.options}
    ]
    if needed:
        raise UsageError(f"attack {spec.id!r}: {spec.kind} needs {', '.join(needed)}")


def version(kind: str) -> str:
    """Name and version of the library of a kind, as ``torchattacks 3.5.1``."""
    peer, _ = library(kind)
    return f"{peer.DISTRIBUTION} {metadata.version(peer.DISTRIBUTION)}"


def minimal(kind: str) -> bool:
    """Whether an attack looks for the nearest boundary rather than inside a ball."""
    peer, name = library(kind)
    return peer.minimal(name)


def peer(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise,
    kind: str,
    options: Mapping[str, Any],
) -> Candidates:
    """Run a peer's attack, ``batch_size`` images at a time.

    Args:
        classifier: the model; its reference form is attacked.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: ball.
        noise: streams of the rows, which seed the peer.
        kind: ``library:Attack``.
        options: its parameters.
    """
    candidates = Candidates.start(x)
    effects: set[str] = set()
    module, name = library(kind)
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size) if len(x) else ():
        seed = int(noise.keys[rows].sum()) % (1 << 31)
        setting = Setting(threat, classifier.num_classes, classifier.input_shape, seed)
        model = StandIn(classifier)
        given = x[rows].clone()
        with seeded(seed, x.device) as moved:
            found = module.build(name, model, setting, options)(given, y[rows].clone())
        if not isinstance(found, Tensor) or found.shape != given.shape:
            candidates.x_adv = found
            return candidates
        candidates.x_adv[rows] = found.detach().to(x)
        candidates.forwards[rows], candidates.backwards[rows] = model.share(len(rows))
        effects |= ({MODE} if model.training else set()) | ({RANDOM} if moved() else set())
        if not torch.equal(given, x[rows]):
            effects.add(INPUT)
    candidates.effects = tuple(sorted(effects))
    return candidates


class StandIn(nn.Module):
    """What a peer sees of the model: logits of the reference form, and no weights but a dummy.

    Args:
        classifier: computes; hidden from ``modules()``, ``parameters()`` and ``train()``.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1, device=classifier.device), requires_grad=False)
        self.__dict__["_classifier"] = classifier
        self.forwards = self.backwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L), float32; differentiable."""
        classifier: Classifier = self.__dict__["_classifier"]
        count = len(x)
        self.forwards += count
        classifier._count(count)
        with full_precision():
            logits = classifier._forward(classifier.module, x)
        if logits.requires_grad:

            def seen(_: Tensor) -> None:
                self.backwards += count
                classifier._count(0, count)

            logits.register_hook(seen)  # type: ignore[no-untyped-call]
        return logits

    def share(self, rows: int) -> tuple[int, int]:
        """Passes for each of so many rows, rounded up."""
        return -(-self.forwards // rows), -(-self.backwards // rows)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Seed every global random state, and put it back; yields whether anything was drawn."""
    devices = [device] if device.type == "cuda" else []
    numbers, python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # peers use the global state
        random.seed(seed)
        before = _states()
        moved = [False]
        try:
            yield lambda: moved[0]
        finally:
            moved[0] = _states() != before
            np.random.set_state(numbers)
            random.setstate(python)


def _states() -> tuple[bytes, bytes, object]:
    numbers: Any = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        numbers[1].tobytes() + bytes([numbers[2] % 256]),
        random.getstate(),
    )


def _nearest(word: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(by_lower[c] for c in close)}?" if close else ""
