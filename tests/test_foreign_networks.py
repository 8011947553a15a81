"""Networks as people have them: each works in plain PyTorch, so each is judged, as the plain one is."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from made import BATTERY_CARD, identity_with_backward
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from robustbench_cure.adapt import Normalised, ordinary
from robustbench_cure.attacks import deepfool, fgsm, pgd, spsa, uniform_noise
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import (
    _CUDA_PRECISIONS,
    Classifier,
    float32_products,
    full_precision,
    has_bf16,
)
from robustbench_cure.cli.main import main
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.evaluation.verify import guarded
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.factory import import_factory
from robustbench_cure.zoo.loading import load_weights

SHAPE, CLASSES = (3, 8, 8), 4
BALL = ThreatModel.parse("linf", "8/255")
BF16 = pytest.param(
    "bf16", marks=pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bfloat16 here")
)


class Plain(nn.Module):
    """Two convolutions with batch-norm; weights fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(128, CLASSES)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator))
            for norm in (self.norm1, self.norm2):
                norm.running_mean.copy_(0.1 * torch.randn(8, generator=generator))
                norm.weight.copy_(0.5 + torch.rand(8, generator=generator))

    def features(self, x):
        return functional.relu(self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x))))))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


def plain() -> nn.Module:
    return Plain().eval()


class Around(nn.Module):
    """The plain network within other code."""

    def __init__(self, forward, net=None) -> None:
        super().__init__()
        self.net, self.code = net or plain(), forward

    def forward(self, x):
        return self.code(self.net, x)


def view_of_features(net, x):
    return net.fc(net.features(x).view(len(x), -1))


def view_of_input(net, x):
    return net(x.view(len(x), -1).view(len(x), *SHAPE))


def needs_contiguous(net, x):
    assert x.is_contiguous()
    return net(x)


def memory_as_it_lies(net, x):
    return net(x.as_strided((len(x), *SHAPE), (192, 64, 8, 1)))


def writes_into_float32(net, x):
    features = net.features(x).flatten(1)
    rows = features.new_zeros(features.shape, dtype=torch.float32)
    rows[torch.arange(len(x))] = features
    return net.fc(rows)


def scatters(net, x):
    features = net.features(x).flatten(1)
    index = torch.arange(128).expand(len(x), 128)
    return net.fc(torch.zeros(len(x), 128).scatter_(1, index, features))


def copies_into_float32(net, x):
    """As the two above, and torch.fx can trace it."""
    features = net.features(x).flatten(1)
    return net.fc(x.flatten(1)[:, :128].clone().index_copy_(1, torch.arange(128), features))


#: The backward pass asks for a contiguous gradient.
backward_views = identity_with_backward(lambda gradient: gradient.view(-1).view(gradient.shape))


def views_slopes(net, x):
    hidden = backward_views(functional.relu(net.norm1(net.conv1(x))))
    return net.fc(functional.relu(net.norm2(net.conv2(hidden))).flatten(1))


def in_place(net, x):
    return net(x.sub_(0.0).mul_(1.0))


class HalfInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain().half()

    def forward(self, x):
        return self.net(x.half())


class PlainTensors(nn.Module):
    """Mean and deviation are tensors of the module, in float64, but no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.both = plain().double(), [torch.zeros(3, 1, 1), torch.ones(3, 1, 1)]
        self.both = [tensor.double() for tensor in self.both]
        self.shift = torch.zeros(3, 1, 1, dtype=torch.float64)

    def forward(self, x):
        return self.net((x - self.both[0]) / self.both[1] + self.shift)


class Keeps(nn.Module):
    """Keeps its activations, with their history, in attributes, by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last, self.kept = plain(), None, {}
        self.net.conv1.register_forward_hook(self.note)

    def note(self, _, __, out):
        self.last, self.kept["conv1"] = out, [out]

    def forward(self, x):
        return self.net(x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Hooked(nn.Module):
    """Reads features that a hook kept, as networks are extended without a change of their code."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = plain(), {}
        self.net.norm2.register_forward_hook(self.keep)

    def keep(self, layer, shown, features):
        self.kept["features"] = features

    def forward(self, x):
        self.net(x)
        return self.net.fc(functional.relu(self.kept["features"]).flatten(1))


class Complex(nn.Module):
    """Turns the phases of the images and of its features, and turns them back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        phase = 6 * torch.rand((8, 5), generator=torch.Generator().manual_seed(2))
        self.turn = nn.Parameter(torch.polar(torch.ones_like(phase), phase))
        self.register_buffer("back", self.turn.detach().conj().resolve_conj())
        self.mix = nn.Linear(128, 128, bias=False, dtype=torch.cfloat)
        self.mix.weight.data = 1j * torch.eye(128)

    def forward(self, x):
        x = torch.fft.irfft2(torch.fft.rfft2(x) * self.turn * self.back, s=SHAPE[1:])
        features = self.net.features(x).flatten(1).float()
        return self.net.fc(self.mix(features.to(torch.cfloat)).imag)


class Holds(nn.Module):
    """Has what no copy can be made of, and a function that refers to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock, self.log = plain(), threading.Lock(), sys.__stderr__
        self.code, self.names = self.run, {"of the classes": (str(k) for k in range(CLASSES))}

    def run(self, x):
        return self.net(x)

    def forward(self, x):
        with self.lock:
            self.log.flush()
            return self.code(x)


class ReturnsNothing(nn.Module):
    """Its own `train` keeps a batch-norm as it is, its own `to` knows devices alone; neither returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def train(self, mode=True):
        super().train(mode)
        self.net.norm1.eval()

    def to(self, device):
        super().to(device)

    def forward(self, x):
        return self.net(x)


class Bounded(nn.Module):
    """Buffers that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.register_buffer("bounds", torch.tensor([-torch.inf, torch.inf]))
        self.register_buffer("best", torch.tensor(torch.nan))

    def forward(self, x):
        return self.net(x).clamp(*self.bounds)


def with_weight_norm() -> nn.Module:
    net = plain()
    nn.utils.weight_norm(net.conv2)
    net(torch.rand(2, *SHAPE))  # its weight is now the result of a computation
    return net


def pruned() -> nn.Module:
    net = plain()
    prune.l1_unstructured(net.conv2, "weight", 0.0)
    return net


def compiled_part() -> nn.Module:
    net = plain()
    net.conv1 = torch.compile(net.conv1)
    return net


def inference_weights() -> nn.Module:
    with torch.inference_mode():
        return plain()


def frozen_script() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(plain()))


#: Networks that compute what the plain one does.
SAME = {
    "view of features": lambda: Around(view_of_features),
    "view of the input": lambda: Around(view_of_input),
    "asserts contiguous images": lambda: Around(needs_contiguous),
    "reads memory as it lies": lambda: Around(memory_as_it_lies),
    "writes into float32": lambda: Around(writes_into_float32),
    "scatters into float32": lambda: Around(scatters),
    "copies into float32": lambda: Around(copies_into_float32),
    "views slopes": lambda: Around(views_slopes),
    "normalises in place": lambda: Around(in_place),
    "scripted": lambda: torch.jit.script(plain()),
    "traced": lambda: torch.jit.trace(plain(), torch.rand(2, *SHAPE)),
    "frozen script": frozen_script,
    "script inside": lambda: Around(lambda net, x: net(x), torch.jit.script(plain())),
    "compiled": lambda: torch.compile(plain()),
    "compiled part": compiled_part,
    "parallel": lambda: nn.DataParallel(plain()),
    "parallel inside": lambda: Around(lambda net, x: net(x), nn.DataParallel(plain())),
    "parallel inside, opened": lambda: Around(lambda net, x: net.module(x), nn.DataParallel(plain())),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(plain()),
    "weight norm": with_weight_norm,
    "pruned": pruned,
    "keeps activations": Keeps,
    "counts calls": Counts,
    "buffers not finite": Bounded,
    "reads what a hook kept": Hooked,
    "complex numbers": Complex,
    "lock and open file": Holds,
    "train and to return nothing": ReturnsNothing,
    "mean as plain tensors": PlainTensors,
    "double": lambda: plain().double(),
    "made in inference mode": inference_weights,
    "in training mode": lambda: plain().train(),
}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand((24, *SHAPE), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels(images) -> torch.Tensor:
    return plain()(images).argmax(1)


def made(factory) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about what it calls old
        return factory()


def judged(net: nn.Module, precision: str = "fp32", classes: int = CLASSES) -> Classifier:
    return Classifier(net, num_classes=classes, input_shape=SHAPE, precision=precision)


def left(classifier: Classifier, x: torch.Tensor, y: torch.Tensor) -> list[int]:
    """Samples that FGSM and PGD leave."""
    noise = Noise.for_samples(0, "pgd", [str(k) for k in range(len(x))], x.device)
    found = (
        fgsm(classifier, x, y, threat=BALL),
        pgd(classifier, x, y, threat=BALL, steps=5, step_size=2 / 255, noise=noise),
    )
    return [int((classifier.logits(candidates.x_adv).argmax(1) == y).sum()) for candidates in found]


def data_of(x, y, classes=CLASSES):
    return from_arrays("own", "test", x, y, classes=tuple(f"c{k}" for k in range(classes)))


@pytest.mark.parametrize("precision", ["fp32", BF16])
@pytest.mark.parametrize("name", SAME)
def test_a_network_that_computes_the_same_is_judged_the_same(name, precision, images, labels, capfd):
    net = made(SAME[name])
    modes = [part.training for part in net.modules() if hasattr(part, "training")]
    state = copy.deepcopy({key: value.detach() for key, value in net.state_dict().items()})
    classifier, usual = judged(net, precision), judged(plain(), precision)
    torch.testing.assert_close(classifier.logits(images), usual.logits(images), rtol=1e-4, atol=1e-4)
    for reference in (True, False):
        loss = lambda z: z.logsumexp(1) - z[:, 0]  # noqa: E731
        _, slope = classifier.value_and_gradient(images, loss, reference=reference)
        _, expected = usual.value_and_gradient(images, loss, reference=True)
        cosine = torch.cosine_similarity(slope.flatten(1), expected.flatten(1))
        assert float(cosine.min()) > (0.9 if precision == "bf16" and not reference else 0.9999)
    apart = [
        abs(a - b) for a, b in zip(left(classifier, images, labels), left(usual, images, labels), strict=True)
    ]
    assert max(apart) <= (1 if precision == "bf16" else 0)
    assert 0 < left(usual, images, labels)[1] < len(images)
    results, effects = guarded(classifier, images, lambda x: [fgsm(classifier, x, labels, threat=BALL)])
    assert (len(results), effects) == (1, [])
    assert capfd.readouterr().err == ""
    assert modes == [part.training for part in net.modules() if hasattr(part, "training")]
    assert all(
        torch.equal(value, state[key]) or bool(value.isnan()) for key, value in net.state_dict().items()
    )


@pytest.mark.parametrize("name", ["compiled", "compiled part", "parallel", "parallel inside", "averaged"])
def test_wrappers_of_training_do_not_keep_batch_norm_from_being_folded(name):
    classifier = judged(made(SAME[name]))
    assert classifier.folded
    assert judged(made(SAME["normalises in place"])).folded
    parts = [*classifier.module.modules(), *classifier._search.modules()]
    assert not any("_orig_mod" in part._modules for part in parts)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in classifier._search.modules())


@pytest.mark.parametrize(
    ("code", "layout"),
    [(lambda net, x: net(x), torch.channels_last), (view_of_features, torch.contiguous_format)],
)
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_channels_last_is_used_where_it_works(code, layout, precision):
    seen = []

    def watched(net, x):
        if not isinstance(x, torch.fx.Proxy):
            seen.append(x.is_contiguous(memory_format=layout))
        return code(net, x)

    classifier = judged(Around(watched), precision)
    assert classifier._layout is layout
    assert (classifier.precision, classifier.fallback) == (precision, "")
    seen.clear()
    x = torch.rand(4, *SHAPE)
    classifier.logits(x)
    assert seen == [True]


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bfloat16 here")
def test_a_layout_that_only_bfloat16_cannot_use_is_left(images):
    def fussy(net, x):
        if float(x.detach().sum()) > 0 and torch.is_autocast_enabled("cpu"):  # torch.fx cannot trace this
            return needs_contiguous(net, x)
        return net(x)

    classifier = judged(Around(fussy), "bf16")
    assert (classifier.precision, classifier._layout) == ("bf16", torch.contiguous_format)
    torch.testing.assert_close(classifier.logits(images), plain()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bfloat16 here")
@pytest.mark.parametrize("name", ["writes into float32", "scatters into float32", "copies into float32"])
def test_a_network_that_fails_in_bfloat16_is_searched_in_float32_and_flagged(name, images, labels):
    classifier = judged(made(SAME[name]), "bf16")
    assert classifier.precision == "fp32"
    (flag,) = [f for f in preflight(classifier, data_of(images, labels)) if f.kind == "search_in_fp32"]
    assert flag.evidence.startswith("the model fails in bfloat16: ")


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bfloat16 here")
def test_what_only_fails_in_bfloat16_on_the_data_is_found_before_the_run(images, labels):
    def late(net, x):
        if float(x.detach().sum()) > 0 and torch.is_autocast_enabled("cpu") and len(x) > 8:
            raise RuntimeError("no such\nkernel")
        return net(x)

    classifier = judged(Around(late), "bf16")
    assert classifier.precision == "bf16"
    (flag,) = [f for f in preflight(classifier, data_of(images, labels)) if f.kind == "search_in_fp32"]
    assert flag.evidence.endswith(": no such kernel")  # the model's own words, on one line
    assert classifier.precision == "fp32"


# --- precision -------------------------------------------------------------------------------------------


def test_a_cast_in_the_code_keeps_a_network_in_its_own_precision(images):
    expected = HalfInside()(images).float()
    classifier = judged(HalfInside())
    assert classifier.logits(images).dtype == torch.float32
    torch.testing.assert_close(classifier.logits(images), expected, rtol=1e-2, atol=1e-2)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = plain(), plain().fc.half()

        def forward(self, x):
            return self.last(self.net.features(x).flatten(1).half())

    for net in (Mixed(), Normalised(HalfInside(), (0.0,) * 3, (1.0,) * 3)):
        classifier = judged(net)
        torch.testing.assert_close(classifier.logits(images), plain()(images), rtol=2e-2, atol=2e-2)

    class Throughout(nn.Module):
        """Writes into a tensor of its own precision, and takes nothing else."""

        def __init__(self, dtype) -> None:
            super().__init__()
            self.net, self.dtype = plain().to(dtype), dtype

        def forward(self, x):
            assert x.dtype == self.dtype
            out = torch.zeros(len(x), CLASSES, dtype=self.dtype)
            out[torch.arange(len(x))] = self.net(x)
            return out

    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float16, 2e-2)):
        for net in (Throughout(dtype), Normalised(Throughout(dtype), (0.0,) * 3, (1.0,) * 3)):
            classifier = judged(net)
            torch.testing.assert_close(
                classifier.logits(images), plain()(images), rtol=tolerance, atol=tolerance
            )
            _, slope = classifier.value_and_gradient(images, lambda z: z[:, 0])
            assert slope.dtype == torch.float32
            assert bool(slope.any())


@contextmanager
def precision_kept():
    backends = torch.backends
    places = [backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn]
    places += [backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [place.fp32_precision for place in places]
    torch.set_float32_matmul_precision("highest")
    try:
        yield lambda: [place.fp32_precision for place in places]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
        torch.set_float32_matmul_precision("highest")


def words_asked() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the other interface was used
        return ""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.parametrize(
    "ask",
    [
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
    ids=["all", "matmul", "conv", "processor", "flag", "words"],
)
def test_float32_is_float32_whichever_interface_asked_for_less(ask):
    a = torch.rand((256, 256), generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    with precision_kept() as now:
        ask()
        asked, words = now(), words_asked()
        with full_precision():
            assert set(now()) == {"ieee"}
            assert not torch.backends.cuda.matmul.allow_tf32  # the other interface can be read as well
            with full_precision():
                assert float((a @ a - exact).abs().max()) < 1e-4
        assert (now(), words_asked()) == (asked, words)
        with float32_products(tf32=True):  # for training
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cudnn.allow_tf32
            assert {part.fp32_precision for part in _CUDA_PRECISIONS} == {"tf32"}
            assert float((a @ a - exact).abs().max()) < 1e-4  # a processor has none
        assert (now(), words_asked()) == (asked, words)


def test_a_default_of_float64_changes_nothing(images, labels):
    net, usual = plain(), left(judged(plain()), images, labels)
    torch.set_default_dtype(torch.float64)
    try:
        classifier = judged(Normalised(net.double(), (0.0,) * 3, (1.0,) * 3))
        assert classifier.logits(images).dtype == torch.float32
        assert left(classifier, images, labels) == usual
        assert preflight(classifier, data_of(images, labels)) == []
        noise = Noise.for_samples(0, "any", [str(k) for k in range(24)], images.device)
        queries = {"steps": 2, "samples": 2, "step_size": 0.02, "delta": 0.01}
        for found in (
            uniform_noise(classifier, images, labels, threat=BALL, noise=noise, draws=2),
            spsa(classifier, images, labels, threat=BALL, noise=noise, **queries),
            deepfool(classifier, images, labels, threat=BALL, mode="bounded", steps=2),
        ):
            assert found.x_adv.dtype == torch.float32
        assert len(classifier.answers()) == 8
    finally:
        torch.set_default_dtype(torch.float32)


# --- memory of the caller's settings ---------------------------------------------------------------------


def test_tensors_that_are_no_buffers_follow_the_network_to_its_device():
    net = PlainTensors()
    moved = ordinary(net, torch.device("meta"), torch.float32)
    held = [moved.shift, *moved.both]
    assert {(t.device.type, t.dtype) for t in held} == {("meta", torch.float32)}
    assert {t.device.type for t in (net.shift, *net.both)} == {"cpu"}


def test_a_classifier_made_in_inference_mode_has_gradients(images):
    with torch.inference_mode():
        classifier = judged(plain())
    for reference in (True, False):
        _, slope = classifier.value_and_gradient(images, lambda z: z[:, 0], reference=reference)
        assert bool(slope.any())
    assert not any(tensor.is_inference() for tensor in classifier.module.state_dict().values())


# --- without a gradient ----------------------------------------------------------------------------------


def refuses(net, x):
    if x.requires_grad:
        raise RuntimeError("no gradients here")
    return net(x)


def through_numpy(net, x):
    return net(torch.from_numpy(x.detach().numpy().copy()))


def fails_on_numpy(net, x):
    return net(torch.from_numpy(x.numpy().copy()))


def in_inference_mode(net, x):
    with torch.inference_mode(float(x.detach().sum()) > 0):  # torch.fx cannot trace this
        return net(x)


def without_recording(net, x):
    with torch.no_grad():
        return net(x)


class BackwardExits(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, slope):
        raise NotImplementedError


WITHOUT = {
    "refuses": (refuses, "no gradients here"),
    "NumPy": (through_numpy, "cuts the graph"),
    "NumPy without detaching": (fails_on_numpy, "numpy"),
    "inference mode": (in_inference_mode, "cuts the graph"),
    "no recording": (without_recording, "cuts the graph"),
    "no backward pass": (lambda net, x: net(BackwardExits.apply(x)), "NotImplementedError"),
}


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_networks_without_a_gradient_are_judged_by_attacks_without_one(name, precision, images, labels):
    code, words = WITHOUT[name]
    classifier = judged(Around(code), precision)
    flags = {flag.kind: flag.evidence for flag in preflight(classifier, data_of(images, labels))}
    assert words in flags["no_gradient"]
    assert flags["zero_gradient"].startswith("gradient exactly zero for 24 of 24")
    torch.testing.assert_close(classifier.logits(images), plain()(images), rtol=1e-4, atol=1e-4)
    assert not classifier.search_logits(images).is_inference()
    x = images.clone().requires_grad_(True)  # as attacks of other libraries ask
    classifier._forward(classifier.module, x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert (
        int(
            (classifier.logits(fgsm(classifier, images, labels, threat=BALL).x_adv).argmax(1) == labels).sum()
        )
        == 24
    )
    noise = Noise.for_samples(0, "spsa", [str(k) for k in range(24)], images.device)
    found = spsa(
        classifier, images, labels, threat=BALL, noise=noise, steps=5, samples=32, step_size=0.01, delta=0.01
    )
    assert int((classifier.logits(found.x_adv).argmax(1) == labels).sum()) < 24


def test_a_network_with_a_gradient_is_not_said_to_have_none(images, labels):
    assert judged(plain()).no_gradient == ""
    assert [f.kind for f in preflight(judged(plain()), data_of(images, labels))] == []


# --- outputs ---------------------------------------------------------------------------------------------


def single(net, x):
    z = net(x)
    return 3 * (z[:, 2] - z[:, 1] - 1.2)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_one_output_is_two_classes_and_said_so(column, precision, images):
    def code(net, x):
        return single(net, x).unsqueeze(1) if column else single(net, x)

    two = judged(Around(lambda net, x: functional.pad(single(net, x)[:, None], (1, 0))), precision, 2)
    one = judged(Around(code), precision, 2)
    assert (one.num_classes, one.folded) == (2, True)
    assert torch.equal(one.logits(images), two.logits(images))
    y = one.logits(images).argmax(1)
    assert 0 < int(y.sum()) < len(y)
    assert left(one, images, y) == left(two, images, y)
    flags = {flag.kind: flag.evidence for flag in preflight(one, data_of(images, y, 2))}
    flags.pop("search_in_fp32", None)
    assert flags == {"one_output": "one output, read as the logit of class 1 against class 0"}


def test_an_output_that_cannot_leave_0_to_1_is_a_probability(images):
    classifier = judged(Around(lambda net, x: single(net, x).sigmoid()), classes=2)
    logits = classifier.logits(images)
    torch.testing.assert_close(logits.sum(1), torch.ones(len(images)))
    y = logits.argmax(1)
    assert torch.equal(y, (single(plain(), images) > 0).long())
    flags = {flag.kind: flag.evidence for flag in preflight(classifier, data_of(images, y, 2))}
    assert "probability of class 1" in flags["one_output"]
    assert "probabilities" in flags


@pytest.mark.parametrize("column", [False, True])
def test_one_output_is_no_more_than_two_classes(column, images, labels):
    net = Around(lambda net, x: single(net, x).unsqueeze(1) if column else single(net, x))
    with pytest.raises(
        UsageError, match="one number for each image, which can tell two classes apart; own has 4"
    ):
        preflight(judged(net), data_of(images, labels))


def test_the_number_of_classes_is_that_of_the_network(images, labels):
    assert judged(plain(), classes=3).num_classes == 4
    assert judged(Around(lambda net, x: net(x)[:, :, None]), classes=3).num_classes == 3  # not known: as told


# --- buffers and weights ---------------------------------------------------------------------------------


def edited(classifier: Classifier, edit) -> bool:
    """Whether an edit of the model by an attack is noticed."""

    def attack(x):
        with torch.no_grad():
            edit(classifier.module)
        return []

    try:
        guarded(classifier, torch.rand(2, *SHAPE), attack)
    except RunError as error:
        return "changed the model's weights or mode" in str(error)
    return False


@pytest.mark.parametrize(
    ("edit", "noticed"),
    [
        (lambda net: net.net.fc.weight.copy_(net.net.fc.weight.roll(1, 0)), True),  # the sum stays
        (lambda net: net.net.fc.weight[0, 0].mul_(1 + 1e-6), True),
        (lambda net: net.best.fill_(0.0), True),
        (lambda net: net.bounds.neg_(), True),
        (lambda net: net.net.norm1.running_mean.add_(1e-6), True),
        (lambda net: net.net.norm1.train(), True),
        (lambda net: net.net.fc.weight.requires_grad_(True), True),
        (lambda net: net(torch.rand(2, *SHAPE)), False),
        (lambda net: net.best.fill_(torch.nan), False),
    ],
)
def test_every_bit_of_weights_and_buffers_is_watched(edit, noticed):
    assert edited(judged(Bounded()), edit) == noticed


def test_only_what_a_clean_pass_changes_may_change():
    assert not edited(judged(Counts()), lambda net: net.calls.add_(7))
    assert edited(judged(Counts()), lambda net: net.net.norm1.num_batches_tracked.add_(7))
    followed = judged(Counts()).followed_by(nn.Identity(), CLASSES)
    assert not edited(followed, lambda net: net(torch.rand(2, *SHAPE)))


def test_lazy_layers_get_their_size_before_they_are_counted(tmp_path, monkeypatch, capsys):
    place(tmp_path, monkeypatch)
    text = "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))\n"
    Path("lazy_networks.py").write_text(text)
    assert run("evaluate --model lazy_networks:make --battery tiny --out run", capsys)[0] == 0
    manifest = Path("run/lazy_networks_make/manifest.json").read_text()
    assert '"parameters": 772' in manifest
    assert isinstance(judged(nn.Sequential(nn.Flatten(), nn.LazyLinear(4))).module[1], nn.Linear)


@pytest.mark.parametrize(
    ("rename", "suffix"),
    [
        (lambda key: f"_orig_mod.{key}", "pt"),
        (lambda key: f"module._orig_mod.{key}", "pth"),
        (lambda key: f"model.{key}", "ckpt"),
        (lambda key: f"module.model.{key}", "PT"),
        (lambda key: f"net.{key}", "bin"),
        (lambda key: key.replace("conv1.", "conv1._orig_mod."), "pth.tar"),
    ],
)
def test_weights_under_the_names_of_wrappers_fit(rename, suffix, tmp_path):
    source = {rename(key): value for key, value in plain().state_dict().items()}
    torch.save({"state_dict": source}, tmp_path / f"w.{suffix}")
    for target in (Plain(), Around(None, Plain())):
        with torch.no_grad():
            for tensor in target.parameters():
                tensor.zero_()
        load_weights(target, tmp_path / f"w.{suffix}")
        state = getattr(target, "net", target).state_dict()
        assert all(torch.equal(state[key], value) for key, value in plain().state_dict().items())


def test_an_average_of_networks_may_say_how_many_it_is_of(tmp_path):
    torch.save(torch.optim.swa_utils.AveragedModel(plain()).state_dict(), tmp_path / "w.pt")
    load_weights(Plain(), tmp_path / "w.pt")
    other = {f"other.{key}": value for key, value in plain().state_dict().items()}
    torch.save(other, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"missing 'conv1.weight' \(and 13 more\); unexpected 'other"):
        load_weights(Plain(), tmp_path / "w.pt")


# --- the command line ------------------------------------------------------------------------------------

BATTERY = (
    BATTERY_CARD.replace('eps = "1/10"', 'eps = "8/255"')
    + """\
[[attacks]]
id = "deepfool"
kind = "deepfool"
name = "DeepFool"
limit = 0
mode = "bounded"
steps = 3
overshoot = 0.02
candidates = 4
clip = true
"""
)
NETWORKS = """\
import sys
import torch
from torch import nn

class Linear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 4))
        with torch.no_grad():
            self[1].bias.zero_()
            self[1].weight.copy_(torch.linspace(-1, 1, 768).view(4, 192).mul(50).sin())

class Changed(Linear):
    def __init__(self, change):
        super().__init__()
        self.change = change
    def forward(self, x):
        return self.change(super().forward(x))

class Output(dict):
    @property
    def logits(self): return self["scores"]

class Ends(BaseException): pass
def ends(_): raise Ends("enough")

def linear(): return Linear()
def entry(): return Changed(lambda z: {"logits": z})
def attribute(): return Changed(lambda z: Output(scores=z))
def pair(): return Changed(lambda z: (z, z))
def nothing(): return Changed(lambda z: None)
def complex_(): return Changed(lambda z: torch.complex(z, z))
def exits(): return Changed(lambda z: sys.exit(0))
def end(): return Changed(ends)
def factory_exits(): sys.exit()
def double():
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return Linear().double()
class Late(Linear):
    def forward(self, x):
        from late_helper_of_networks import same
        return same(super().forward(x))
"""


def place(at, monkeypatch):
    (at / "cards" / "attacks").mkdir(parents=True)
    (at / "cards" / "attacks" / "tiny.toml").write_text(BATTERY)
    (at / "foreign_networks.py").write_text(NETWORKS)
    (at / "late_helper_of_networks.py").write_text("def same(z): return z\n")
    (at / "exits.py").write_text("import sys\ndef make(): ...\nsys.exit(0)\n")
    generator = np.random.default_rng(0)
    np.savez(at / "own.npz", x=generator.uniform(0, 1, (24, *SHAPE)).astype(np.float32), y=np.arange(24) % 4)
    monkeypatch.chdir(at)
    monkeypatch.setenv("CURE_BENCH_HOME", str(at / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def here(tmp_path, monkeypatch):
    place(tmp_path, monkeypatch)
    yield tmp_path
    for name in ("foreign_networks", "late_helper_of_networks", "exits"):
        sys.modules.pop(name, None)


def run(command, capsys, data="own.npz"):
    where = f"--cards {Path.cwd()}/cards --dataset npz --data-dir {data}"
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), *where.split()])
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


VERBS = ("evaluate --battery tiny", "curvature", "distance", "masking --eps 8/255 --norm linf", "section")
REFUSED = {
    "entry": "not a dict: return its entry 'logits'",
    "attribute": "not a Output: return its attribute .logits",
    "pair": "not a tuple: return the one of its 2 parts that is the logits",
    "nothing": "not a NoneType",
    "complex_": "it must return real logits, not torch.complex64",
    "exits": "it called sys.exit(0), which only a script may",
    "end": "it raised Ends: enough",
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", REFUSED)
def test_every_verb_refuses_what_is_no_logits_in_the_same_words(here, capsys, verb, name):
    code, lines = run(f"{verb} --model foreign_networks:{name} --out run", capsys)
    assert code == 2
    words = f"foreign_networks:{name}: the model failed on images of shape ("
    assert len(lines) == 1
    assert lines[0].startswith(f"cure-bench: error: {words}")
    assert lines[0].endswith(REFUSED[name])
    assert not Path("run").exists()


@pytest.mark.parametrize("spec", ["exits:make", "foreign_networks:factory_exits"])
def test_code_that_ends_the_program_is_bad_input(here, capsys, spec):
    code, lines = run(f"evaluate --model {spec} --battery tiny --out run", capsys)
    assert code == 2
    assert lines[-1].endswith("which only a script may")


def test_whatever_ends_the_program_is_no_success(monkeypatch, capsys):
    def ended(*_):
        raise SystemExit(0)

    monkeypatch.setattr("robustbench_cure.cli.main.inventory.places", ended)
    with pytest.raises(SystemExit) as stop:
        main(["where"])
    assert stop.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cure-bench: error: ")
    assert "SystemExit: 0" in line


def test_what_a_factory_sets_for_all_of_pytorch_is_put_back(here):
    assert import_factory("foreign_networks:double")[1].weight.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["double", "Late"])
def test_networks_with_habits_have_the_numbers_of_the_plain_one(here, capsys, name):
    import pandas as pd

    tables = []
    for each in ("linear", name):
        code, lines = run(f"evaluate --battery tiny --model foreign_networks:{each} --out {each}", capsys)
        assert code == 0, lines
        (table,) = Path(each).glob("*/samples.*")
        tables.append(pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table))
    columns = ["clean_pred", "fgsm.broken", "deepfool.broken"]
    assert tables[0][columns].equals(tables[1][columns])


def test_fewer_labels_than_outputs_are_attacked_by_all(here, capsys):
    x = np.random.default_rng(0).uniform(0, 1, (24, *SHAPE)).astype(np.float32)
    np.savez("three.npz", x=x, y=np.arange(24) % 3)
    code, lines = run(
        "evaluate --battery tiny --model foreign_networks:linear --out run", capsys, "three.npz"
    )
    assert code == 0, lines
    text = Path("run/foreign_networks_linear/manifest.json").read_text()
    assert "4 outputs, 3 classes in npz:three" in text
