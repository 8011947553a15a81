"""The two forms of a network, and that neither is the caller's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustbench_cure.adapt import Normalised
from robustbench_cure.attacks.losses import cross_entropy, dlr, margin, margins
from robustbench_cure.classifier import PROBES, Classifier, has_bf16, image_keys, resolve_device
from robustbench_cure.errors import UsageError
from robustbench_cure.fold import fold_batchnorm
from robustbench_cure.state import tensors_digest
from robustbench_cure.zoo import build

SHAPE = (3, 8, 8)


def shake(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and scales: at their initial values folding is nearly the identity."""
    generator = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            size = part.num_features
            part.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            with torch.no_grad():
                part.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=generator))
                part.bias.copy_(0.2 * torch.randn(size, generator=generator))
    return net.eval()


class Noisy(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5] + torch.rand(5)


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("never")


class PreActivation(nn.Module):
    """BN-ReLU-conv: the first norm follows no convolution, the second a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        out = self.stem(x)  # used twice: must not be folded into norm1
        inner = self.conv1(functional.relu(self.norm1(out)))
        out = out + self.conv2(functional.relu(self.norm2(inner)))
        return self.head(out.mean((2, 3)))


class Branching(nn.Module):
    """Control flow on data: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x):
        out = self.norm(self.conv(x)).mean((2, 3))
        return out if out.sum() > 1e9 else 2 * out


class SharedConv(nn.Module):
    """One convolution before two norms, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x):
        return (self.norm1(self.conv(x)) * self.norm2(self.conv(x.flip(3)))).mean((2, 3))


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 12),
        nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


NETS = {
    "conv-bn": conv_bn,
    "resnet18": lambda: Normalised(build("resnet18", 5, 3, {"width": 4}), (0.5,) * 3, (0.25,) * 3),
    "wrn": lambda: build("wrn", 5, 3, {"depth": 10, "widen_factor": 1}),
    "pre-activation": PreActivation,
    "branching": Branching,
    "shared": SharedConv,
}


def norms_in(module: nn.Module) -> int:
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


@pytest.fixture
def images():
    return torch.rand((6, *SHAPE), generator=torch.Generator().manual_seed(0))


def make(name: str, **options) -> tuple[nn.Module, Classifier]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = shake(NETS[name]())
    return net, Classifier(net, num_classes=5, input_shape=SHAPE, **options)


# --- folding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_search_form_computes_the_same_logits_and_gradients(name, images):
    net, classifier = make(name)
    expected = net(images)
    torch.testing.assert_close(classifier.logits(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.search_logits(images), expected, rtol=1e-4, atol=1e-4)
    leaf = images.clone().requires_grad_(True)
    labels = torch.arange(6) % 5
    (gradient,) = torch.autograd.grad(functional.cross_entropy(net(leaf), labels, reduction="sum"), leaf)
    for reference in (True, False):
        logits, ours = classifier.value_and_gradient(
            images, lambda z: cross_entropy(z, labels), reference=reference
        )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "left"),
    [("conv-bn", 0), ("resnet18", 0), ("pre-activation", 1), ("branching", 1), ("shared", 2)],
)
def test_exactly_the_norms_after_a_convolution_of_their_own_are_folded(name, left, images):
    net, classifier = make(name)
    assert norms_in(classifier._search) == left
    assert classifier.folded is (name != "branching")
    assert norms_in(classifier.module) == norms_in(net)


def test_folding_leaves_the_module_alone(images):
    net, _ = make("resnet18")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded = fold_batchnorm(net, images)
    assert norms_in(folded) == 0
    assert norms_in(net) > 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for parameter in folded.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_fold_that_is_not_faithful_is_thrown_away(images, monkeypatch):
    net, _ = make("conv-bn")
    monkeypatch.setattr("robustbench_cure.fold._fold", lambda traced: nn.Sequential(traced, nn.Tanh()))
    same = fold_batchnorm(net, images)
    torch.testing.assert_close(same(images), net(images))
    assert norms_in(same) == norms_in(net)


def test_norms_with_batch_statistics_are_not_folded(images):
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    classifier = Classifier(net, num_classes=5, input_shape=SHAPE)
    assert norms_in(classifier._search) == 1
    torch.testing.assert_close(classifier.search_logits(images), classifier.logits(images))


# --- snapshot ----------------------------------------------------------------------------------------


def test_the_snapshot_does_not_follow_the_callers_module(images):
    net, classifier = make("resnet18")
    labels = torch.zeros(6, dtype=torch.int64)
    reference, search = classifier.logits(images), classifier.search_logits(images)
    fingerprint = classifier.fingerprint()
    net.train()
    for parameter in net.parameters():
        parameter.data.add_(1.0)
    for buffer in net.buffers():
        buffer.zero_()
    assert torch.equal(classifier.logits(images), reference)
    assert torch.equal(classifier.search_logits(images), search)
    assert classifier.fingerprint() == fingerprint
    classifier.value_and_gradient(images, lambda z: margin(z, labels))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_making_a_classifier_leaves_the_module_as_it_was(training):
    net, _ = make("resnet18")
    net.train(training)
    net.requires_grad_(True)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    classifier = Classifier(net, num_classes=5, input_shape=SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training is training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not classifier.module.training
    assert not any(p.requires_grad for p in classifier.module.parameters())


def test_half_precision_weights_are_judged_in_float32(images):
    net, classifier = make("conv-bn")
    halved = Classifier(copy.deepcopy(net).half(), num_classes=5, input_shape=SHAPE)
    logits = halved.logits(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, classifier.logits(images), rtol=0.02, atol=0.02)


def test_fingerprint_notices_edits():
    _, classifier = make("conv-bn")
    before = classifier.fingerprint()
    with torch.no_grad():
        classifier.module[0].weight[0, 0, 0, 0] += 1
    assert classifier.fingerprint() != before
    before = classifier.fingerprint()
    classifier.module.train()
    assert classifier.fingerprint() != before


# --- forms -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell")
@pytest.mark.parametrize(
    "units", [{"avx512_bf16"}, {"amx_bf16"}, {"avx512_bf16", "amx_bf16"}, set(), {"avx2"}]
)
def test_either_unit_for_bfloat16_will_do(units, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    assert has_bf16(torch.device("cpu")) == bool(units & {"avx512_bf16", "amx_bf16"})
    assert not has_bf16(torch.device("meta"))


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16")
@pytest.mark.parametrize("name", NETS)
def test_bf16_search_is_near_and_the_reference_untouched(name, images):
    _, exact = make(name)
    _, coarse = make(name, precision="bf16")
    assert torch.equal(coarse.logits(images), exact.logits(images))
    logits = coarse.search_logits(images)
    assert logits.dtype == torch.float32
    scale = exact.logits(images).abs().amax()
    difference = (logits - exact.logits(images)).abs().amax() / scale
    # A single layer computes the logits: in float32.
    assert difference == 0 if name in ("branching", "shared") else 0 < difference < 0.05
    labels = torch.arange(6) % 5
    _, gradient = coarse.value_and_gradient(images, lambda z: margin(z, labels))
    _, expected = exact.value_and_gradient(images, lambda z: margin(z, labels), reference=True)
    assert gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient.flatten(1), expected.flatten(1)).amin() > 0.95
    # Asked for the reference form, it is exact whatever the search precision.
    _, same = coarse.value_and_gradient(images, lambda z: margin(z, labels), reference=True)
    assert torch.equal(same, expected)


def test_no_autocast_of_the_caller_reaches_the_reference(images):
    _, classifier = make("conv-bn")
    expected = classifier.logits(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.logits(images), expected)
        assert torch.equal(classifier.search_logits(images), Classifier.search_logits(classifier, images))
        torch.testing.assert_close(classifier.search_logits(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_logits_are_the_same_in_chunks(batch_size, images):
    net, classifier = make("conv-bn", batch_size=batch_size)
    sizes = []
    classifier.module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(classifier.logits(images), net(images), rtol=1e-5, atol=1e-5)
    assert sum(sizes) == 6
    assert max(sizes) == min(batch_size, 6)
    assert classifier.logits(images[:0]).shape == (0, 5)


def test_a_live_view_follows_the_network_in_training(images):
    net, _ = make("conv-bn")
    net.train()
    view = Classifier.live(net, num_classes=5)
    assert view.module is net
    labels = torch.arange(6) % 5
    stats = net[1].running_mean.clone()
    _, first = view.value_and_gradient(images, lambda z: margin(z, labels))
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert not torch.equal(net[1].running_mean, stats)  # in training mode, as the caller set it
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[-1].weight.mul_(3)
    _, second = view.value_and_gradient(images, lambda z: margin(z, labels))
    assert (second - first).abs().amax() > 0.1 * first.abs().amax()


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [True, False])
def test_jacobian_rows_are_the_gradients_of_logit_differences(images, reference):
    net, classifier = make("resnet18")
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    classes = torch.tensor([[1, 4], [0, 2], [4, 3], [0, 1], [2, 3], [3, 2]])
    logits, slopes = classifier.value_and_jacobian(images, labels, classes, reference=reference)
    torch.testing.assert_close(logits, net(images), rtol=1e-4, atol=1e-4)
    assert slopes.shape == (6, 2, *SHAPE)
    for row in range(6):
        for column in range(2):
            leaf = images[row : row + 1].clone().requires_grad_(True)
            z = net(leaf)[0]
            (expected,) = torch.autograd.grad(z[classes[row, column]] - z[labels[row]], leaf)
            torch.testing.assert_close(slopes[row, column], expected[0], rtol=1e-3, atol=1e-5)


def test_rows_do_not_leak_into_each_others_gradients(images):
    _, classifier = make("resnet18")
    labels = torch.arange(6) % 5
    _, whole = classifier.value_and_gradient(images, lambda z: cross_entropy(z, labels))
    for row in range(6):
        one = labels[row : row + 1]
        _, alone = classifier.value_and_gradient(
            images[row : row + 1], lambda z, one=one: cross_entropy(z, one)
        )
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cut", ["detach", "ignore"])
def test_a_cut_graph_gives_a_zero_gradient(images, cut):
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
            self.free = nn.Parameter(torch.zeros(5))

        def forward(self, x):
            return self.net(x.detach()) if cut == "detach" else self.free.expand(len(x), -1) + 0 * len(x)

    classifier = Classifier(Cut(), num_classes=5, input_shape=SHAPE)
    labels = torch.zeros(6, dtype=torch.int64)
    logits, gradient = classifier.value_and_gradient(images, lambda z: margin(z, labels))
    assert logits.shape == (6, 5)
    assert torch.equal(gradient, torch.zeros_like(images))
    _, slopes = classifier.value_and_jacobian(images, labels, labels[:, None] + 1)
    assert torch.equal(slopes, torch.zeros(6, 1, *SHAPE))
    # Parameters that still require gradients (a live view) do not bring the input's back.
    _, gradient = Classifier.live(Cut(), num_classes=5).value_and_gradient(
        images, lambda z: margin(z, labels)
    )
    assert torch.equal(gradient, torch.zeros_like(images))


def test_work_is_counted_in_images(images):
    _, classifier = make("conv-bn", batch_size=4)
    labels = torch.zeros(6, dtype=torch.int64)
    assert (classifier.forwards, classifier.backwards) == (0, 0)
    classifier.logits(images)
    assert (classifier.forwards, classifier.backwards) == (6, 0)
    classifier.search_logits(images[:2])
    assert (classifier.forwards, classifier.backwards) == (8, 0)
    classifier.value_and_gradient(images, lambda z: margin(z, labels))
    assert (classifier.forwards, classifier.backwards) == (14, 6)
    classifier.value_and_jacobian(images, labels, torch.tensor([[1, 2, 3]] * 6))
    assert (classifier.forwards, classifier.backwards) == (20, 24)


def test_normalisation_is_per_channel(images):
    net = Normalised(nn.Flatten(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    expected = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2)])], 1
    )
    torch.testing.assert_close(net(images), expected.flatten(1))
    assert net.state_dict() == {}  # mean and std come from the card, never from weights


# --- losses ------------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 4.0, 4.0, 2.0]])
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(margins(logits, labels), torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(margins(logits, torch.tensor([2, 3])), torch.tensor([-3.0, -2.0]))
    torch.testing.assert_close(margin(logits, labels), torch.tensor([-2.0, 0.0]))
    torch.testing.assert_close(dlr(logits, torch.tensor([0, 3])), torch.tensor([-2 / 3, 1.0]))
    torch.testing.assert_close(cross_entropy(logits, labels), -logits.log_softmax(1)[[0, 1], [0, 1]])
    shifted = dlr(7 * logits + 5, torch.tensor([0, 3]))
    torch.testing.assert_close(shifted, dlr(logits, torch.tensor([0, 3])))
    # The gradient of DLR at a wrong label is along z_y - z_max, as of every loss here.
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(logits[:, :2], labels)


# --- devices -----------------------------------------------------------------------------------------


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("meta-morph", "cuda:99"):
        with pytest.raises(UsageError, match=f"--device {name}: not available"):
            resolve_device(name)


# --- who it is -----------------------------------------------------------------------------------------


def info_of(net: nn.Module, classes: int = 5, **options):
    return Classifier(net, num_classes=classes, input_shape=SHAPE, **options).model_info()


def test_answers_tell_apart_what_weights_do_not():
    net = shake(PreActivation())
    plain = info_of(net)
    assert len(plain.answers) == PROBES
    others = [
        Normalised(net, (0.0,) * 3, (0.5,) * 3),
        Normalised(net, (0.1,) * 3, (1.0,) * 3),
        nn.Sequential(net, nn.Softmax(1)),
    ]
    for other in others:
        weights = {"weights_sha256": plain.weights_sha256, "tensors_sha256": plain.tensors_sha256}
        info = info_of(other).model_copy(update=weights)
        assert not info.same_as(plain)
        assert info.model_copy(update={"answers": []}).same_as(plain)  # not known: weights alone tell
    assert not info_of(shake(PreActivation(), seed=1)).same_as(plain)


def test_the_same_tensors_are_the_same_weights_however_wrapped():
    net = shake(PreActivation())
    plain = info_of(net)
    assert len(plain.tensors_sha256) == 64
    for wrapped in (Normalised(net, (0.0,) * 3, (1.0,) * 3), nn.DataParallel(net), torch.compile(net)):
        assert info_of(wrapped).tensors_sha256 == plain.tensors_sha256
        assert info_of(wrapped).same_as(plain)
    stripped = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    old = PreActivation().eval()
    old.load_state_dict(stripped, strict=False)  # as files written before batch-norm counted
    assert info_of(old).tensors_sha256 == plain.tensors_sha256


def test_any_change_of_a_tensor_is_another_digest():
    def digest(**tensors):
        net = nn.Module()
        for name, tensor in tensors.items():
            net.register_buffer(name, tensor)
        return tensors_digest(net)

    one = torch.arange(4.0)
    seen = {
        digest(a=one),
        digest(b=one),  # name
        digest(a=one.view(2, 2)),  # shape
        digest(a=one.view(torch.int32)),  # dtype of the same bytes
        digest(a=one.nextafter(one + 1)),  # value
        digest(a=one, b=one),
        digest(a=one[:2], b=one[2:]),  # the same bytes, cut elsewhere
    }
    assert len(seen) == 7
    assert digest(a=one) == digest(a=one.clone())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_differ_by_their_integers_and_by_their_scales():
    def quantised(scale=0.1, zero=3, row=None, change=0.0):
        values = torch.linspace(-1, 1, 64 * 64).view(64, 64)
        values[32, 32] += change
        whole = (values / 0.1).round().to(torch.int8)
        if row is None:
            tensor = torch._make_per_tensor_quantized_tensor(whole, scale, zero)
        else:
            scales = torch.full((64,), scale, dtype=torch.float64)
            scales[row] *= 2
            tensor = torch._make_per_channel_quantized_tensor(whole, scales, torch.full((64,), zero), 0)
        net = nn.Module()
        net.register_buffer("w", tensor)
        return tensors_digest(net)

    changed = [{}, {"scale": 0.2}, {"zero": 4}, {"change": 1.0}, {"row": 5}, {"row": 6}]
    assert len({quantised(**change) for change in changed}) == len(changed)
    assert quantised(row=5) == quantised(row=5)


def test_a_state_that_cannot_be_read_is_not_known():
    class Silent(nn.Sequential):
        def state_dict(self, *_, **__):
            raise RuntimeError("no state")

    info = info_of(Silent(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)))
    assert (info.weights_sha256, info.tensors_sha256) == ("", "")


def test_records_of_older_versions_still_match_by_their_weights_file():
    info = info_of(shake(PreActivation()))
    old = info.model_copy(update={"tensors_sha256": ""})
    resaved = info.model_copy(update={"weights_sha256": "0" * 64})
    assert old.same_as(info)
    assert resaved.same_as(info)
    assert not old.same_as(resaved)  # neither files nor tensors are known to agree


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"precision": "bf16"}, {"batch_size": 64}])
def test_answers_do_not_depend_on_how_the_network_is_run(options):
    net = shake(PreActivation())
    assert info_of(net, **options).same_as(info_of(net))
    assert info_of(net, **options).answers == pytest.approx(info_of(net).answers, rel=1e-4, abs=1e-5)


def test_answers_are_asked_once_and_leave_no_trace():
    model = Classifier(shake(PreActivation()), num_classes=5, input_shape=SHAPE)
    odd = [Classifier(net, num_classes=5, input_shape=SHAPE) for net in (Noisy(), Failing())]
    before = torch.get_rng_state()
    first = model.model_info()
    assert model.model_info() is first
    assert (model.forwards, model.backwards) == (0, 0)
    assert [known.model_info().answers for known in odd] == [[], []]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("width", [8, 50])
def test_bytes_per_image_are_those_that_wait_for_the_backward_pass(width):
    """Of frozen linear layers around a tanh only its float32 output is kept; nothing else is touched."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3))
    model = Classifier(net, num_classes=3, input_shape=(1, 4, 4), precision="fp32")
    state = torch.get_rng_state()
    assert model.bytes_per_image() == 4 * width
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.forwards, model.backwards) == (0, 0)


class Asked(nn.Module):
    """A linear network that notes the images it is shown."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 3), 0

    def forward(self, x):
        self.seen += len(x)
        return self.linear(x.flatten(1))


def test_within_remembering_the_network_is_asked_once_for_an_image():
    model = Classifier(Asked(), num_classes=3, input_shape=(1, 2, 2), batch_size=4)
    x = torch.rand(6, 1, 2, 2)
    want = model.logits(x)
    counter = next(part for part in model.module.modules() if isinstance(part, Asked))
    before, asked = counter.seen, model.forwards
    with model.remembering(x[:2], want[:2]):
        first = model.logits(x[:4])
        assert counter.seen - before == 2  # two are known
        first.zero_()  # the caller's own
        moved = x.clone()
        moved[0, 0, 0, 0] += 2.0**-20
        again = model.logits(torch.cat((x, x[2:3], moved[:1])))
        assert counter.seen - before == 2 + 3
        assert torch.equal(again[:7], torch.cat((want, want[2:3])))
        assert not torch.equal(again[7], want[0])
        new = model.logits(moved[:1])
        model.logits(1 - x).zero_()
        assert torch.equal(model.logits(1 - x), torch.cat([model._reference_logits(1 - x)]))
    assert model.forwards - asked == 4 + 8 + 1 + 6 + 6
    assert torch.equal(new, again[7:])
    before += 6 + 6
    model.logits(x[:1])
    assert counter.seen - before == 2 + 3 + 1


def test_keys_of_images_differ_where_one_bit_does():
    x = torch.rand(1, 3, 4, 4).repeat(97, 1, 1, 1)
    flat = x.view(97, 48).view(torch.int32)
    for row in range(96):
        flat[row, row // 2] ^= 1 if row % 2 else 1 << 31  # the lowest bit, and the sign
    keys = image_keys(x)
    assert len(set(keys)) == 97
    assert image_keys(x.flip(0)) == keys[::-1]
    swapped = x.flip(3)
    assert not set(image_keys(swapped)) & set(keys)


def test_a_network_that_changes_its_own_buffers_is_always_asked():
    model = Classifier(Asked(), num_classes=3, input_shape=(1, 2, 2))
    model._moving = frozenset({"seen"})
    counter = next(part for part in model.module.modules() if isinstance(part, Asked))
    x = torch.rand(2, 1, 2, 2)
    with model.remembering(x, model.logits(x)):
        before = counter.seen
        model.logits(x)
        assert counter.seen - before == 2
