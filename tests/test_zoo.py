"""Architectures have their published sizes; weights load strictly or not at all, and never run code."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from made import Trap
from torch import nn

from robustbench_cure.adapt import Normalised
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import ModelCard, parse_card
from robustbench_cure.protocol.catalog import CardFile, find
from robustbench_cure.zoo import ARCHITECTURES, build
from robustbench_cure.zoo.factory import import_factory
from robustbench_cure.zoo.loading import (
    build_from_card,
    fetch,
    load_card_module,
    load_weights,
    trained_weights,
    weights_digest,
)
from robustbench_cure.zoo.models import load_model

CARD = """
id = "tiny"
name = "Tiny"
dataset = "digits"
architecture = "digits_cnn"
architecture_args = { hidden = 4 }
num_classes = 10
input_shape = [1, 8, 8]
mean = [0.5]
std = [0.25]
paper = ""
license = "MIT"
notes = ""
battery = "digits"
published_row = ""
[training]
method = "standard"
start = ""
epochs = 1
batch_size = 32
optimizer = "adam"
lr = 1e-3
lr_final = 1e-5
schedule = "cosine"
weight_decay = 0.0
augmentation = "none"
precision = "fp32"
seed = 0
"""


def tiny(extra: str = "") -> ModelCard:
    return parse_card(ModelCard, CARD + extra, "tiny.toml", "tiny")


def net() -> nn.Module:
    return build("digits_cnn", 10, 1, {"hidden": 4})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURE_BENCH_HOME", str(tmp_path / "home"))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "channels", "args", "expected"),
    [
        ("resnet18", 3, {}, 11_173_962),
        ("wrn", 3, {}, 36_479_194),  # Zagoruyko & Komodakis: 36.5 M
        ("wrn", 3, {"depth": 16, "widen_factor": 4}, 2_748_890),  # there: 2.7 M
        ("lenet", 3, {}, 62_006),
        ("digits_cnn", 1, {}, 188_234),
    ],
)
def test_parameter_counts_are_those_of_the_literature(architecture, channels, args, expected):
    with torch.device("meta"):
        assert parameters(build(architecture, 10, channels, args)) == expected


def test_digits_cnn_weighs_less_than_a_megabyte():
    assert 4 * parameters(build("digits_cnn", 10, 1, {})) < 1_000_000


@pytest.mark.parametrize(
    ("architecture", "args", "unfolded"),
    [
        ("resnet18", {"width": 8}, 0),
        ("wrn", {"depth": 10, "widen_factor": 1}, 4),  # pre-activation: four follow a sum, not a convolution
    ],
)
def test_folding_applies_and_reproduces_the_logits(architecture, args, unfolded):
    torch.manual_seed(0)
    network = build(architecture, 10, 3, args).eval()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # statistics as training leaves them, not the identity
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
    module = Normalised(network, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    classifier = Classifier(module, num_classes=10, input_shape=(3, 16, 16))
    x = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        logits = module(x)
    parts = dict(classifier._search.named_modules())
    used = [parts[n.target] for n in classifier._search.graph.nodes if n.op == "call_module"]
    left = sum(isinstance(part, nn.BatchNorm2d) for part in used)
    assert classifier.folded
    assert left == unfolded
    assert torch.allclose(classifier.search_logits(x), logits, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_batch_are_independent_in_evaluation_mode(architecture):
    channels, size = (1, 8) if architecture == "digits_cnn" else (3, 32)
    args = {"resnet18": {"width": 4}, "wrn": {"depth": 10, "widen_factor": 1}}.get(architecture, {})
    network = build(architecture, 7, channels, args).eval()
    x = torch.rand(3, channels, size, size)
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(row[None]) for row in x])
    assert together.shape == (3, 7)
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "args", "message"),
    [
        ("resnet19", {}, "did you mean 'resnet18'"),
        ("zzzz", {}, "known: digits_cnn"),
        ("resnet18", {"widht": 3}, "did you mean 'width'"),
        ("resnet18", {"width": 3.0}, "must be int, not 3.0"),
        ("resnet18", {"width": True}, "must be int, not True"),
        ("resnet18", {"num_classes": 3}, "unknown argument 'num_classes'"),
        ("wrn", {"depth": 27}, "6n [+] 4"),
        ("lenet", {"image_size": 8}, "too small"),
        ("digits_cnn", {"image_size": 7}, "even"),
    ],
)
def test_wrong_architectures_and_arguments_are_named(architecture, args, message):
    with pytest.raises(UsageError, match=message):
        build(architecture, 10, 3, args)


# --- weights -----------------------------------------------------------------------------------------


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_safetensors_and_pickled_tensors_load_bit_for_bit(tmp_path):
    source = net()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pt", "w.pth"):
        target = net()
        digest = load_weights(target, tmp_path / name)
        assert same(source, target)
        assert digest == weights_digest(tmp_path / name)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_the_prefix_of_data_parallel_is_removed_once_and_only_as_a_prefix(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.submodule = nn.Linear(2, 2)

    source, target = Holder(), Holder()
    torch.save(nn.DataParallel(source).state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)
    torch.save(source.state_dict(), tmp_path / "plain.pt")  # here "module." belongs to some keys alone
    target = Holder()
    load_weights(target, tmp_path / "plain.pt")
    assert same(source, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_widths_become_float32(tmp_path, dtype):
    source, target = net(), net()
    torch.save({k: v.to(dtype) for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert torch.equal(target[0].weight, source[0].weight.to(dtype).float())


def test_batch_norm_counters_may_be_missing(tmp_path):
    source = build("resnet18", 10, 3, {"width": 4})
    state = {k: v for k, v in source.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "w.pt")
    target = build("resnet18", 10, 3, {"width": 4})
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())


def edited(**changes) -> dict[str, torch.Tensor]:
    state = net().state_dict()
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (edited(**{"0__weight": None, "0__bias": None}), r"missing '0.weight' \(and 1 more\)"),
        (edited(extra=torch.zeros(1)), "unexpected 'extra'"),
        (edited(**{"10__weight": torch.zeros(9, 4)}), r"'10.weight' is \(9, 4\), not \(10, 4\)"),
        (edited(**{"10__bias": torch.zeros(10, dtype=torch.int64)}), "is torch.int64, not torch.float32"),
        ({}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
    ],
)
def test_weights_of_another_network_are_refused_and_leave_it_untouched(tmp_path, state, message):
    torch.save(state, tmp_path / "w.pt")
    target = net()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(UsageError, match=message) as caught:
        load_weights(target, tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_without_running_it(tmp_path, zipped):
    trap = tmp_path / "trap"
    state = net().state_dict() | {"evil": Trap(trap)}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(trap)))
    for name in ("w.pt", "raw.pt"):
        with pytest.raises(UsageError, match="could run code") as caught:
            load_weights(net(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\x00garbage" * 20, "truncated, or not|damaged"),
    ],
)
def test_files_that_are_no_weights_are_said_to_be_what_they_are(tmp_path, suffix, content, message):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_weights(net(), path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files_are_refused_at_any_length(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(net().state_dict(), path)
    else:
        safetensors.torch.save_file(net().state_dict(), path)
    whole = path.read_bytes()
    for length in (1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"truncated|damaged"):
            load_weights(net(), path)


def test_missing_files_and_unknown_suffixes(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_weights(net(), tmp_path / "none.pt")
    (tmp_path / "w.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"read from \.safetensors"):
        load_weights(net(), tmp_path / "w.npz")


def test_the_digest_is_checked(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(net().state_dict(), path)
    load_weights(net(), path, weights_digest(path))
    with pytest.raises(UsageError, match="expected 000000000000"):
        load_weights(net(), path, "0" * 64)


# --- cards -------------------------------------------------------------------------------------------


def test_a_card_builds_its_network_behind_its_normalisation():
    module = build_from_card(tiny())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(module(x), module.net((x - 0.5) / 0.25))


def test_a_card_without_weights_says_how_to_make_them(tmp_path):
    with pytest.raises(UsageError, match=r"has no weights yet.*cure-bench train tiny.*--weights FILE"):
        load_card_module(CardFile(tiny(), tmp_path / "tiny.toml"))


def test_weights_are_found_in_order(tmp_path):
    files = {}
    for name in ("card", "given", "trained"):
        files[name] = tmp_path / f"{name}.safetensors"
        torch.manual_seed(len(files))
        safetensors.torch.save_file(net().state_dict(), files[name])
    plain = CardFile(tiny(), tmp_path / "tiny.toml")
    stored = tiny(f'[weights]\nfile = "card.safetensors"\nsha256 = "{weights_digest(files["card"])}"\n')
    trained_weights("tiny").parent.mkdir(parents=True)
    trained_weights("tiny").write_bytes(files["trained"].read_bytes())
    module, digest = load_card_module(plain)
    assert not module.training
    assert digest == weights_digest(files["trained"])
    assert load_card_module(plain, files["given"])[1] == weights_digest(files["given"])
    beside = CardFile(stored, tmp_path / "tiny.toml")
    assert load_card_module(beside)[1] == weights_digest(files["card"])
    assert load_card_module(beside, files["given"])[1] == weights_digest(files["given"])


# --- URLs --------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}", running
        running.shutdown()
        thread.join()


def test_downloads_are_checked_kept_and_not_repeated(server):
    folder, address, _ = server
    data = safetensors.torch.save(net().state_dict())
    (folder / "w.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    path = fetch(f"{address}/w.safetensors", digest)
    assert path.read_bytes() == data
    (folder / "w.safetensors").unlink()
    assert fetch(f"{address}/w.safetensors", digest) == path
    assert [p.name for p in path.parent.iterdir()] == [f"{digest}.safetensors"]


def test_downloads_that_are_something_else_are_thrown_away(server, tmp_path):
    folder, address, _ = server
    (folder / "w.safetensors").write_bytes(b"<html>log in</html>")
    with pytest.raises(UsageError, match="web page"):
        fetch(f"{address}/w.safetensors", "0" * 64)
    with pytest.raises(UsageError, match=r"404.*--weights FILE"):
        fetch(f"{address}/none.safetensors", "0" * 64)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_offline_is_one_line_that_says_what_to_do():
    with pytest.raises(UsageError, match=r"cannot be fetched.*put it at .*--weights FILE") as caught:
        fetch("http://127.0.0.1:9/w.safetensors", "0" * 64)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="over https or http"):
        fetch("file:///etc/passwd", "0" * 64)


# --- factories ---------------------------------------------------------------------------------------

FACTORIES = """
from torch import nn
def make_net(): return nn.Flatten()
def needs(x): return nn.Flatten()
def number(): return 3
ready = nn.Flatten()
class Net(nn.Flatten): pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    (tmp_path / "broken_networks.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_networks", None)


def test_a_factory_in_the_current_directory_is_found_and_shadows_nothing_afterwards(own_module, monkeypatch):
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    assert isinstance(import_factory("own_networks:make_net"), nn.Flatten)
    assert isinstance(import_factory("own_networks:Net"), nn.Flatten)
    assert sys.path == [*before, str(Path.cwd())]  # networks import as late as in their first pass


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_networks", "write PACKAGE.MODULE:FUNCTION"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("own_networks:nothing", "has no attribute 'nothing'"),
        ("own_networks:needs", "calling it without arguments failed: TypeError"),
        ("own_networks:number", "returned int, not a torch.nn.Module"),
        ("own_networks:ready", "name a function that returns the network"),
        ("broken_networks:f", "RuntimeError: two lines"),
    ],
)
def test_factories_that_fail_are_one_line(own_module, spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        import_factory(spec)
    assert "\n" not in str(caught.value)


# --- who it is -----------------------------------------------------------------------------------------


def test_weights_saved_again_are_the_same_model(tmp_path):
    """Another header is another file, and the same tensors."""
    shipped = load_model("digits_cure", device="cpu").model_info()
    card = find(ModelCard, "digits_cure")
    tensors = safetensors.torch.load_file(card.path.parent / card.card.weights.file)
    again = tmp_path / "again.safetensors"
    safetensors.torch.save_file(tensors, again, metadata={"saved": "again"})
    info = load_model("digits_cure", weights=again, device="cpu").model_info()
    assert info.weights_sha256 == weights_digest(again) != shipped.weights_sha256
    assert info.tensors_sha256 == shipped.tensors_sha256
    assert info.same_as(shipped)
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] *= 1.001
    safetensors.torch.save_file(tensors, again)
    assert not load_model("digits_cure", weights=again, device="cpu").model_info().same_as(shipped)


def test_a_network_has_one_identity_whoever_normalises_it(tmp_path, monkeypatch):
    """From the command line with --mean and --std, and in memory behind `Normalised`."""
    (tmp_path / "own_identity.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def make():\n    torch.manual_seed(3)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        named = load_model(
            "own_identity:make", mean=(0.5,), std=(0.25,), data=load_dataset("digits"), device="cpu"
        ).model_info()
        with torch.random.fork_rng():
            net = import_factory("own_identity:make")
    finally:
        sys.modules.pop("own_identity", None)
    for module in (Normalised(net, (0.5,), (0.25,)), Normalised(nn.DataParallel(net), (0.5,), (0.25,))):
        info = Classifier(module, num_classes=10, input_shape=(1, 8, 8)).model_info()
        assert info.tensors_sha256 == named.tensors_sha256
        assert info.same_as(named)
    bare = Classifier(net, num_classes=10, input_shape=(1, 8, 8)).model_info()
    assert bare.same_weights(named)
    assert not bare.same_as(named)  # it answers otherwise
