"""RobustBench's models from its installed wheel, without a network: names, digests, harmful pickles."""

from __future__ import annotations

import os

import pytest
import torch

from robustbench_cure import load_model
from robustbench_cure.errors import UsageError
from robustbench_cure.interop import robustbench_zoo
from robustbench_cure.interop.robustbench import import_robustbench
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.zoo import build
from robustbench_cure.zoo.loading import build_from_card

NAME = "robustbench:Wong2020Fast"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of its own, and a downloader that fetches what the test put there instead."""
    monkeypatch.setattr(robustbench_zoo, "cache_dir", lambda: tmp_path)
    import_robustbench()
    from robustbench import utils

    files: dict[str, object] = {}

    def download(identifier, path):
        if not files:
            raise OSError("no network")
        torch.save(files["state"], path)

    monkeypatch.setattr(utils, "download_gdrive_new", download)
    return files


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return robustbench_zoo.known("cifar10", "Linf")["Wong2020Fast"]["model"]().state_dict()


def test_a_model_comes_with_its_weights_and_their_digest(offline, state, tmp_path):
    offline["state"] = state
    classifier = load_model(NAME, device="cpu")
    info = classifier.model_info()
    file = tmp_path / "robustbench" / "cifar10" / "Linf" / "Wong2020Fast.pt"
    assert info.weights_sha256 == robustbench_zoo._digest(file)
    assert file.with_name(file.name + ".sha256").read_text().strip() == info.weights_sha256
    assert (info.id, info.source) == ("robustbench_cifar10_linf_wong2020fast", "RobustBench, cifar10 Linf")
    x = torch.rand((2, 3, 32, 32))
    net = robustbench_zoo.known("cifar10", "Linf")["Wong2020Fast"]["model"]().eval()
    net.load_state_dict(state)
    assert info.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert torch.allclose(classifier.logits(x), net(x).detach(), atol=1e-5)
    offline.clear()
    assert load_model(NAME, device="cpu").model_info().weights_sha256 == info.weights_sha256  # from the cache
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UsageError, match="changed since it was downloaded"):
        load_model(NAME, device="cpu")


def test_without_a_network_it_says_so_in_one_line(offline):
    with pytest.raises(UsageError) as caught:
        load_model(NAME, device="cpu")
    assert "could not be downloaded (no network); try again with a network" in str(caught.value)
    assert "\n" not in str(caught.value)


class Harm:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_with_code_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "")
    offline["state"] = {"state_dict": Harm()}
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(NAME, device="cpu")
    assert not (tmp_path / "harmed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("robustbench:Wong2020Fats", "for cifar10 Linf (did you mean 'Wong2020Fast'?)"),
        ("robustbench:svhn/Linf/x", "unknown data set 'svhn'; there are cifar10, cifar100, imagenet"),
        ("robustbench:cifar10/L7/x", "has no threat model 'L7'; it has Linf, L2"),
        ("robustbench:", "write robustbench:NAME"),
        ("robustbench:a/b", "write robustbench:NAME"),
    ],
)
def test_bad_names_are_one_line(name, words):
    with pytest.raises(UsageError) as caught:
        load_model(name, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_its_own_weights_are_enough():
    with pytest.raises(UsageError, match="brings its own weights"):
        load_model(NAME, weights="x.pt", device="cpu")


# --- architectures of cards ------------------------------------------------------------------------------


def test_a_card_may_have_a_network_of_robustbench():
    import_robustbench()
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    card = find(ModelCard, "resnet18s_normal").card.model_copy(
        update={
            "architecture": "robustbench:wide_resnet.WideResNet",
            "architecture_args": {"depth": 10, "widen_factor": 2},
            "num_classes": 7,
        }
    )
    module = build_from_card(card)
    theirs = WideResNet(depth=10, widen_factor=2, num_classes=7)
    assert {k: v.shape for k, v in module.net.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(module.net.state_dict())
    x = torch.rand((2, 3, 32, 32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    assert torch.equal(module.eval()(x), theirs.eval()((x - mean) / std))


def test_an_entry_is_an_architecture_too():
    net = build("robustbench:Wong2020Fast", 10, 3, {})
    assert type(net) is type(robustbench_zoo.known("cifar10", "Linf")["Wong2020Fast"]["model"]())


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("wide_resnet.WideResnet", {}, "wide_resnet has no 'WideResnet' (did you mean 'WideResNet'?)"),
        ("wide_resnet.torch", {}, "wide_resnet has no 'torch'"),
        ("wide_resnet.math.inf", {}, "wide_resnet has no 'math.inf'"),
        ("no_such_file.Net", {}, "cannot be imported"),
        ("wide_resnet.WideResNet", {"width": 2}, "unknown argument 'width'"),
        ("wide_resnet.WideResNet", {"num_classes": 9}, "unknown argument 'num_classes'"),
        ("wide_resnet.WideResNet", {"depth": "28"}, "argument 'depth' must be int, not '28'"),
        ("wide_resnet.WideResNet", {"depth": 11}, "AssertionError for {'depth': 11}"),
        ("Wong2020Fats", {}, "no such model for cifar10 Linf (did you mean 'Wong2020Fast'?)"),
        ("Wong2020Fast", {"depth": 3}, "an entry takes no arguments"),
        ("cifar10/L7/x", {}, "has no threat model 'L7'"),
    ],
)
def test_a_wrong_architecture_is_one_line(name, args, words):
    with pytest.raises(UsageError) as caught:
        build(f"robustbench:{name}", 10, 3, args)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_its_architectures_take_three_channels():
    with pytest.raises(UsageError, match="takes 3 channels, not 1"):
        build("robustbench:wide_resnet.WideResNet", 10, 1, {})
