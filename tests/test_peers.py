"""Attacks of other libraries: judged like every other, contained, checked against their own signatures."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchattacks

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks import Noise
from robustbench_cure.cli.inventory import listing
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.interop import peers
from robustbench_cure.protocol.cards import Battery, parse_card
from robustbench_cure.protocol.specs import PEER_ACCESS
from robustbench_cure.report.wording import spec_words
from robustbench_cure.threat import ThreatModel

HEAD = """\
id = "b"
version = 1
name = "B"
source = "s"
dataset = ""
n = 0
seed = 0
published = ""
notes = ""
[threat]
norm = "{norm}"
eps = "{eps}"
[[attacks]]
id = "a"
name = "A"
limit = 0
kind = "{kind}"
"""


def battery(kind: str, *keys: str, norm: str = "linf", eps: str = "1/5") -> Battery:
    return parse_card(Battery, HEAD.format(kind=kind, norm=norm, eps=eps) + "\n".join(keys), "b.toml", "b")


def judged(kind: str, *keys: str, n: int = 30, model: str = "digits_pgd_at", **threat):
    return evaluate(
        load_model(model, device="cpu", precision="fp32"),
        battery(kind, *keys, **threat),
        load_dataset("digits"),
        n=n,
    )


# --- the same numbers as a direct call -----------------------------------------------------------------


def test_a_record_is_that_of_a_direct_call():
    keys = ('alpha = "1/20"', "steps = 10", "random_start = false")
    record = judged("torchattacks:PGD", *keys)
    data = load_dataset("digits").subset(30)
    module = load_model("digits_pgd_at", device="cpu").module
    right = module(data.images).argmax(1) == data.labels
    direct = torchattacks.PGD(module, eps=0.2, alpha=0.05, steps=10, random_start=False)
    broken = module(direct(data.images, data.labels)).argmax(1) != data.labels
    assert record.samples["a.broken"].tolist() == (broken & right).tolist()
    attacked = record.samples["a.attacked"]
    assert (record.samples["a.forwards"][attacked] == 10).all()
    assert (record.samples["a.backwards"][attacked] == 10).all()
    assert record.manifest.environment.peers == [f"torchattacks {torchattacks.__version__}"] or (
        record.manifest.environment.peers[0].startswith("torchattacks ")
    )


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("torchattacks:PGD", ('alpha = "1/40"', "steps = 40", "random_start = false")),
        ("autoattack:apgd-ce", ("n_iter = 40",)),
        ("autoattack:fab", ("n_iter = 20", "n_restarts = 1")),
        ("foolbox:LinfPGD", ("steps = 100",)),  # of a thirtieth of the radius each
        ("art:ProjectedGradientDescent", ("max_iter = 40", 'eps_step = "1/40"')),
    ],
)
def test_an_affine_model_is_broken_where_its_radius_says(affine, kind, keys):
    if kind.startswith("art"):
        pytest.importorskip("art")
    weights = np.random.default_rng(0).normal(size=(2, 12))
    model = affine(weights, [0.0, 0.0], (3, 2, 2))
    x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    y = torch.from_numpy(model.logits(x).argmax(1))
    radii = model.radii(x, y, "linf").min(1)
    eps = float(np.median(radii))
    data = from_arrays(
        "npz:x", "test", x.numpy(), y.numpy(), classes=("0", "1"), ids=tuple(f"x/{i}" for i in range(40))
    )
    record = evaluate(model.classifier, battery(kind, *keys, eps=f"{eps:.6f}"), data)
    order = [int(name.rpartition("/")[2]) for name in record.samples["sample_id"]]
    sure = np.abs(radii[order] - eps) > 0.05 * eps
    assert (record.samples["a.broken"].to_numpy(bool) == (radii[order] < eps))[sure].all()


# --- containment ---------------------------------------------------------------------------------------


class Fake:
    """A library with one attack, given as a function of (model, setting)."""

    DISTRIBUTION, INSTALL = "numpy", ""

    def __init__(self, work, minimal: bool = False) -> None:
        self.work, self.is_minimal = work, minimal

    def names(self):
        return ["Lie"]

    def signature(self, name):
        return inspect.Signature([inspect.Parameter("strength", inspect.Parameter.POSITIONAL_OR_KEYWORD)])

    def preset(self):
        return frozenset()

    def minimal(self, name):
        return self.is_minimal

    def build(self, name, model, setting, options):
        return lambda x, y: self.work(model, x, y)


@pytest.fixture
def lie(monkeypatch):
    def run(work, **options):
        monkeypatch.setitem(peers.LIBRARIES, "fake", "fake_of_the_tests")
        monkeypatch.setitem(sys.modules, "fake_of_the_tests", Fake(work, **options))
        return judged("fake:Lie", "strength = 1")

    return run


def kinds(record) -> set[tuple[str, str]]:
    return {(f.kind, f.evidence) for f in record.flags if f.kind in ("contained", "side_effects")}


def test_leaving_the_ball_is_no_success_but_a_violation(lie):
    record = lie(lambda model, x, y: 1 - x)
    attacked = record.samples["a.attacked"]
    assert not record.samples["a.broken"].any()
    assert (record.samples["a.violation"][attacked] == "outside the linf 51/255 ball").all()
    assert any(f.kind == "violations" for f in record.flags)


def test_an_attack_for_the_nearest_boundary_may_leave_the_ball_and_only_near_points_count(lie):
    record = lie(lambda model, x, y: 1 - x, minimal=True)
    assert not record.samples["a.broken"].any()
    assert (record.samples["a.violation"].fillna("") == "").all()


def test_edits_stay_with_the_copy_and_are_reported(lie):
    def edit(model, x, y):
        model.train()
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        x.fill_(0.5)
        return x

    before = load_dataset("digits").images.clone()
    record = lie(edit)
    assert kinds(record) == {("contained", peers.MODE), ("contained", peers.INPUT)}
    assert torch.equal(before, load_dataset("digits").images)


def test_random_states_are_seeded_reported_and_put_back(lie):
    drawn = []

    def draw(model, x, y):
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return x

    def after(run) -> tuple[float, float, float]:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        run()
        return float(torch.rand(())), float(np.random.rand()), random.random()

    expected = after(lambda: judged("fgsm"))  # loading a network draws its first weights
    found = []
    assert after(lambda: found.append(lie(draw))) == expected
    assert kinds(found[0]) == {("contained", peers.RANDOM)}
    lie(draw)
    assert drawn[0] == drawn[1] != expected


@pytest.mark.parametrize("what", [lambda x: x[:, :, :4], lambda x: x.double().numpy(), lambda x: None])
def test_what_is_no_image_breaks_nothing(lie, what):
    record = lie(lambda model, x, y: what(x))
    assert not record.samples["a.broken"].any()
    assert record.samples["a.violation"][record.samples["a.attacked"]].str.startswith("expected").all()


def test_the_model_cannot_be_reached_through_the_stand_in():
    classifier = load_model("digits_cure", device="cpu")
    model = peers.StandIn(classifier)
    assert [p.numel() for p in model.parameters()] == [1]
    assert len(list(model.modules())) == 1
    model.train()
    assert not classifier.module.training
    x = load_dataset("digits").images[:4].clone().requires_grad_(True)
    model(x).sum().backward()
    assert (model.forwards, model.backwards) == (4, 4)
    assert all(p.grad is None for p in classifier.module.parameters())
    with torch.no_grad():
        model(x)
    assert (model.forwards, model.backwards) == (8, 4)


def test_a_peer_that_fails_is_one_line(lie):
    def fail(model, x, y):
        raise ValueError("bad luck\nand more")

    with pytest.raises(RunError, match=r"attack 'a' failed: bad luck$"):
        lie(fail)


# --- checked against the signature -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        ("torchattacks:PDG", (), "torchattacks has no attack 'PDG'; did you mean PGD"),
        ("torchattacks:CW", ("step = 3",), "has no parameter 'step'; did you mean steps"),
        ("torchattacks:PGD", ('eps = "1/255"',), "eps comes from the battery and the model"),
        ("torchattacks:MultiAttack", (), "needs attacks"),
        ("torchattacks:LGV", (), "needs trainloader"),
        ("autoattack:standard", ("n_iter = 3",), "has no parameter 'n_iter'"),
        ("autoattack:apgd", (), "did you mean"),
        (
            "cleverhans:PGD",
            (),
            "unknown library 'cleverhans'; there are torchattacks, autoattack, foolbox, art",
        ),
    ],
)
def test_what_does_not_fit_the_signature_is_refused_before_the_first_pass(kind, keys, words):
    with pytest.raises(UsageError) as caught:
        judged(kind, *keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(UsageError, match=r'python -m pip install "robustbench-cure\[peers\]"'):
        judged("foolbox:LinfPGD")


def test_cards_refuse_what_is_no_parameter():
    for text in ("steps = [1]", "steps = {a = 1}", "name2 = 2024-01-01"):
        with pytest.raises(UsageError, match="must be a number, a word or true or false"):
            battery("torchattacks:PGD", text)
    with pytest.raises(UsageError, match="kind"):
        battery("torchattacks:__import__")
    with pytest.raises(UsageError, match="unknown key"):
        battery("fgsm", "steps = 3")


def test_too_many_target_classes_are_refused(affine):
    model = affine(np.eye(3, 12), [0, 0, 0], (3, 2, 2))
    x = torch.rand((4, 3, 2, 2))
    with pytest.raises(UsageError, match="n_target_classes 9, the model has 3 classes"):
        peers.peer(
            model.classifier,
            x,
            torch.zeros(4, dtype=torch.int64),
            threat=ThreatModel.parse("linf", "1/10"),
            noise=Noise.for_rows(4),
            kind="autoattack:apgd-t",
            options={"n_target_classes": 9},
        )


# --- AutoAttack ------------------------------------------------------------------------------------------


def test_the_battery_is_autoattack_standard():
    """Its parameters against those that pyautoattack sets for itself."""
    from pyautoattack import AutoAttack

    own = AutoAttack(torch.nn.Identity(), norm="Linf", eps=8 / 255, version="standard", seed=0)
    specs = {spec.name.lower(): spec.hyper for spec in load_battery("autoattack").attacks}
    assert list(specs) == own.attacks_to_run
    assert load_battery("autoattack").cascade
    pairs = {"apgd-ce": own.apgd, "apgd-t": own.apgd_targeted, "fab-t": own.fab, "square": own.square}
    names = {"rho": "thr_decr", "targets": "n_target_classes", "queries": "n_queries"}
    names |= {"steps": "n_iter", "restarts": "n_restarts"}
    ours = {"order": "logits", "give_up": False, "stop": "first-success"}
    for attack, options in specs.items():
        theirs = {key: value for key, value in options.items() if key not in (*ours, "loss")}
        theirs.pop("targets", 0) if not options.get("targets", 1) else None
        for key, value in theirs.items():
            assert getattr(pairs[attack], names.get(key, key)) == value, (attack, key)
        assert {key: options[key] for key in ours if key in options}.items() <= ours.items()
    assert (specs["apgd-ce"]["loss"], specs["apgd-t"]["loss"]) == ("ce", "dlr")


def test_autoattack_as_a_whole_is_the_worst_case_of_its_parts():
    # A ball in which one image stands: AutoAttack spends its whole budget on it.
    whole = judged("autoattack:standard", n=24, eps="1/4")
    parts = load_battery("autoattack")
    threat = battery("autoattack:standard", eps="1/4").threat
    parts = parts.model_copy(update={"threat": threat})
    record = evaluate(
        load_model("digits_pgd_at", device="cpu", precision="fp32"), parts, load_dataset("digits"), n=24
    )
    assert whole.worst_case_accuracy.count == pytest.approx(record.worst_case_accuracy.count, abs=1)
    assert 0 < record.worst_case_accuracy.count < record.clean_accuracy.count


# --- words -------------------------------------------------------------------------------------------------


def test_reports_name_library_and_parameters():
    spec = battery("torchattacks:PGD", 'alpha = "2/255"', "steps = 7").attacks[0]
    words = spec_words(spec, SimpleNamespace(norm="linf", eps=ThreatModel.parse("linf", "8/255").eps))
    facts = ("PGD", "torchattacks", "8/255", "alpha 2/255", "steps 7", "defaults")
    assert [fact for fact in facts if fact not in words] == []
    assert "library:Name" in listing("attacks", ())


# --- what they use of the model -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PEER_ACCESS)
def test_attacks_that_are_not_white_box_are_named_as_their_library_names_them(name):
    """A name that no library has would leave the attack it is meant for among the white-box ones."""
    module = importlib.import_module(peers.LIBRARIES[name])
    try:
        known = set(module.names())
    except ImportError:
        pytest.skip(f"no {name}")
    listed = [attack for attacks in PEER_ACCESS[name].values() for attack in attacks]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= known
    noisy = {attack for attack in known if "Noise" in attack}
    assert noisy <= set(PEER_ACCESS[name].get("control", ()))
