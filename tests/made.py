"""What several test modules use, made by hand: images, networks, records, batteries, and code of a user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from click.testing import CliRunner
from torch import nn
from torch.overrides import TorchFunctionMode

from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.datasets import EvalSet, from_arrays
from robustbench_cure.evaluation.external import COLUMNS, Evidence, Submission
from robustbench_cure.evaluation.flags import FLAG_KINDS, Flag
from robustbench_cure.evaluation.record import Cost, Environment, Manifest, Record, RunConfig, typed
from robustbench_cure.masking.evidence import Measurements, Settings
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.protocol.identity import DataInfo, ModelInfo
from robustbench_cure.threat import ThreatModel


def images(n: int, shape=(3, 2, 2), *, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Uniform images (n,C,H,W) with pixels in [low, high], the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, *shape), generator=generator) * (high - low) + low


def classified(classifier: Classifier, x: torch.Tensor) -> EvalSet:
    """The images with the labels that the classifier gives them, named 0, 1, ..."""
    labels = classifier.logits(x).argmax(1)
    names = [str(row) for row in range(len(x))]
    return from_arrays(
        "made", "test", x, labels, ids=names, classes=list(map(str, range(classifier.num_classes)))
    )


def measurements(
    classifier: Classifier, x: torch.Tensor, threat: ThreatModel, settings: Settings
) -> Measurements:
    """Measurements on images that are all classified correctly; no attack is run yet."""
    return Measurements(classifier, classified(classifier, x), threat, settings, flags=())


def identity_with_backward(change):
    """The identity as a function of tensors, whose backward pass returns ``change(gradient)``."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return change(gradient)

    return Identity.apply


class Roots(nn.Module):
    """Finite outputs everywhere, infinite gradients at black pixels; images of 12 numbers, three classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(12, 3, generator=generator))

    def forward(self, x):
        return x.flatten(1).sqrt() @ self.weight


class Waves(nn.Module):
    """Outputs without order: the phases of 195 fast waves across an image of 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", 1e3 * torch.randn(12, 195, generator=generator))

    def forward(self, x):
        return torch.cos(x.flatten(1) @ self.weight)


class Wrapped(nn.Module):
    """A network inside another: the subclass says what is done to its images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Sphere(nn.Module):
    """Logits (R^2, |x - 0.5|^2): label 0 inside the sphere of radius R = 0.4, all curvatures 1/R."""

    radius = 0.4

    def forward(self, x):
        square = (x - 0.5).flatten(1).square().sum(1)
        return torch.stack((torch.full_like(square, self.radius**2), square), 1)


class Quadric(nn.Module):
    """Logits (0, F), F = u'Au/2 + b'u with u = x - 0.5: the boundary passes through the grey image."""

    def __init__(self, matrix, slope) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.as_tensor(matrix, dtype=torch.float32))
        self.register_buffer("slope", torch.as_tensor(slope, dtype=torch.float32))

    def forward(self, x):
        u = (x - 0.5).flatten(1)
        value = ((u @ self.matrix) * u).sum(1) / 2 + u @ self.slope
        return torch.stack((torch.zeros_like(value), value), 1)


class MatmulWatch(TorchFunctionMode):
    """Notes at every matrix product whether TF32, which rounds to 10 bits, is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "matmul" in function.__name__:
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return function(*args, **(kwargs or {}))


# --- records and batteries -------------------------------------------------------------------------------

FGSM = {"id": "fgsm", "kind": "fgsm", "name": "FGSM", "limit": 0}
PGD = {
    "id": "pgd20",
    "kind": "pgd",
    "name": "PGD(20)",
    "limit": 0,
    "steps": 20,
    "step_size": "2/255",
    "random_start": True,
    "restarts": 1,
    "loss": "ce",
    "stop": "first-success",
}
NOISE = {"id": "noise", "name": "noise", "kind": "uniform_noise", "limit": 0, "draws": 2}
SPSA = {
    "id": "spsa",
    "kind": "spsa",
    "name": "SPSA",
    "limit": 6,
    "steps": 100,
    "samples": 128,
    "step_size": "0.01",
    "delta": 0.01,
    "stop": "never",
}
DEEPFOOL = {
    "id": "deepfool",
    "kind": "deepfool",
    "name": "DeepFool",
    "limit": 0,
    "mode": "minimal",
    "steps": 50,
    "overshoot": 0.02,
    "candidates": 10,
    "clip": True,
}
HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(1)>&_%$#{}~^\\ | `x` *b* {{ 7*7 }}"""
#: Marks of ten samples, eight of them correct, as `record` reads them.
CLEAN = "1111111100"
EVIDENCE = {"fgsm": "xx......--", "pgd20": "xxxx....--", "spsa": "....xv----"}


def battery(*attacks: dict, norm: str = "linf", eps: str = "8/255", **more) -> Battery:
    """A battery of these attacks."""
    fields = {"id": "mini", "version": 1, "name": "Mini", "source": "here", "dataset": "", "n": 0, "seed": 0}
    fields |= {"published": "", "notes": "", "threat": {"norm": norm, "eps": eps}, "attacks": attacks}
    return Battery.model_validate(fields | more)


def record(protocol: Battery, clean: str, evidence: dict[str, str], flags=(), **more) -> Record:
    """A record from pictures, one character a sample in order of rank.

    clean: 1 correct, 0 not. evidence, by attack: ``-`` not attacked, ``.`` survived, ``x`` broken,
    ``v`` proposal not admitted, ``o`` converged outside the ball. Sample i is moved by (i + 1)/255 in
    every pixel, and takes 3 forward and 2 backward passes.
    """
    n = len(clean)
    table: dict[str, object] = {
        "sample_id": [f"s{i}" for i in range(n)],
        "rank": range(n),
        "image_sha256": [f"{i:064x}" for i in range(n)],
        "label": [0] * n,
        "clean_pred": [int(c == "0") for c in clean],
        "clean_margin": [1.0 if c == "1" else -1.0 for c in clean],
    }
    for name, marks in evidence.items():
        assert len(marks) == n
        given = [m != "-" for m in marks]

        def known(values, given=given):
            return [value if there else None for value, there in zip(values, given, strict=True)]

        table |= {
            f"{name}.attacked": given,
            f"{name}.broken": [m == "x" for m in marks],
            f"{name}.step": pd.array(known([2] * n), "Int32"),
            f"{name}.margin": pd.array(known([-0.5] * n), "Float32"),
            f"{name}.pred": pd.array(known([1] * n), "Int32"),
            f"{name}.linf": pd.array(known([(i + 1) / 255 for i in range(n)]), "Float32"),
            f"{name}.l2": pd.array(known([(i + 1) / 10 for i in range(n)]), "Float32"),
            f"{name}.forwards": pd.array(known([3] * n), "Int64"),
            f"{name}.backwards": pd.array(known([2] * n), "Int64"),
            f"{name}.converged": pd.array(known([m in "xo" for m in marks]), "boolean"),
            f"{name}.violation": pd.array(
                known(["outside the ball" if m == "v" else "" for m in marks]), "string"
            ),
        }
    cost = {"clean": Cost(seconds=0.5, forwards=n)}
    cost |= {name: Cost(seconds=7.0, forwards=3, backwards=2) for name in evidence}
    model = {"id": "tiny", "name": "Tiny net", "source": "here", "architecture": "lenet", "parameters": 10}
    model |= {"weights_sha256": "ab" * 32, **more.pop("model", {})}
    data = {"name": "digits", "split": "test", "n": n, "total": n, "digest": "da" * 32}
    data |= {"classes": ["0", "1"], **more.pop("data", {})}
    manifest = Manifest(
        status=more.pop("status", "complete"),
        started="2026-01-02T03:04:05Z",
        finished="2026-01-02T03:05:05Z",
        model=ModelInfo(**model),
        battery=protocol,
        battery_digest=protocol.digest,
        data=DataInfo(**data),
        config=RunConfig(seed=0, device="cpu", precision="fp32", shard_size=8, batch_size=8),
        environment=Environment(
            version="0.1.0",
            python="3.12",
            torch="2.8",
            device_name="CPU",
            threads=2,
            git_commit="abc123",
            git_dirty=True,
            command="cure-bench evaluate --model tiny",
        ),
        flags=list(flags),
        cost=cost,
        wall_seconds=60.0,
    )
    assert not more
    return Record(manifest, typed(pd.DataFrame(table), protocol))


def hostile() -> Record:
    """A record that has markup of every page and table where a name can stand."""
    protocol = battery({**FGSM, "name": HOSTILE}, PGD, SPSA, name=HOSTILE, notes=HOSTILE, source=HOSTILE)
    return record(
        protocol,
        CLEAN,
        EVIDENCE,
        flags=[Flag(kind=kind, evidence=HOSTILE, attack=HOSTILE) for kind in FLAG_KINDS],
        model={"name": HOSTILE, "source": HOSTILE, "training": HOSTILE, "architecture": HOSTILE},
        data={"name": HOSTILE, "notes": HOSTILE, "classes": [HOSTILE, "</title><script>"]},
    )


def evidence(run, broken: list[int], **more) -> Evidence:
    """Verified images of somebody for some samples of a record."""
    table, m = run.samples.iloc[broken], run.manifest
    rows = pd.DataFrame(
        {
            "sample_id": table["sample_id"],
            "image_sha256": table["image_sha256"],
            "label": table["label"],
            "broken": [True] * len(table),
            "pred": [1] * len(table),
            "margin": [-1.0] * len(table),
            "linf": [0.01] * len(table),
            "l2": [0.1] * len(table),
            "violation": [""] * len(table),
        }
    ).astype(COLUMNS)
    fields = {
        "source": "Somebody",
        "file": "x.npz",
        "file_sha256": "0" * 64,
        "model": m.model,
        "battery": m.battery.id,
        "battery_version": 1,
        "threat": m.battery.threat,
        "data": m.data,
        "environment": m.environment,
        "checked": "2026-03-01T00:00:00+00:00",
    }
    return Evidence(Submission(**(fields | more)), rows)


def with_columns(record: Record, **columns) -> Record:
    """The record with other values in some columns of its table."""
    return Record(record.manifest, record.samples.assign(**columns))


# --- the command, and files of a user --------------------------------------------------------------------

#: A battery card: FGSM alone.
BATTERY_CARD = """\
id = "tiny"
version = 1
name = "tiny"
source = ""
dataset = ""
n = 0
seed = 0
published = ""
notes = ""
[threat]
norm = "linf"
eps = "1/10"
[[attacks]]
id = "fgsm"
kind = "fgsm"
name = "FGSM"
limit = 0
"""
#: A module of a user, whose network has other weights for each value of TOY in the environment.
WEIGHTED = """
import os, torch

def build():
    torch.manual_seed(int(os.environ["TOY"]))
    hidden = torch.nn.Linear(36, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)
    return torch.nn.Sequential(torch.nn.Flatten(), *hidden)
"""


def invoke(*arguments: str):
    """Run `cure-bench` on the CPU; what is no refusal of the command line is raised."""
    return CliRunner().invoke(cli, [*arguments, "--device", "cpu"], catch_exceptions=False)


def toy(tmp_path, monkeypatch, name, code, x, classes):
    """Options that name a model of a user, and images for it, uint8 (N,6,6,1)."""
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "toy.npz", x=x, y=np.arange(len(x)) % classes)
    return ("--model", f"{name}:build", "--dataset", "npz", "--data-dir", str(tmp_path / "toy.npz"))


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
