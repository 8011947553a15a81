"""The evaluator: what it counts, what it refuses to count, and that runs can be cut and joined."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from functools import partial

import made
import numpy as np
import pytest
import torch
from made import FGSM, NOISE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from robustbench_cure import load_battery
from robustbench_cure.attacks import Candidates, pgd
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.evaluation import shard as shard_work
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.evaluation.shard import groups, piece_rows
from robustbench_cure.evaluation.storage import merge
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.protocol.specs import Peer
from robustbench_cure.threat import ThreatModel

SHAPE = (1, 4, 4)


def pgd_spec(steps=10, name=None, **fields):
    return made.PGD | {"id": name or f"pgd{steps}", "steps": steps, "step_size": "1/40"} | fields


DEEPFOOL = made.DEEPFOOL | {"steps": 20}
SPSA = made.SPSA | {"limit": 7, "steps": 12, "samples": 8, "step_size": "1/100", "stop": "first-success"}
battery = partial(made.battery, eps="1/10")


def linear(classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, 16, generator=generator))
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)  # boundaries pass through the grey image
    return net


def images(n, classes=3, net=None, seed=1):
    """Images in [0.3, 0.7], so that no box interferes; labelled by the net, one in five wrongly."""
    x = np.random.default_rng(seed).uniform(0.3, 0.7, (n, *SHAPE)).astype(np.float32)
    y = (net or linear(classes))(torch.from_numpy(x)).argmax(1).numpy()
    y[::5] = (y[::5] + 1) % classes
    return from_arrays(
        "toy", "test", x, y.astype(np.int64), ids=[f"t/{i}" for i in range(n)], classes="abc"[:classes]
    )


def classifier(net, classes=3, **options):
    return Classifier(net, num_classes=classes, input_shape=SHAPE, **options)


def radius(net, x, y):
    """Exact linf distance to the nearest boundary of a linear model."""
    weight, logits = net[1].weight, net(x)
    gaps = logits.gather(1, y[:, None]) - logits
    slopes = (weight[None] - weight[y][:, None]).abs().sum(2)
    return torch.where(slopes > 0, gaps / slopes.clamp_min(1e-9), torch.inf).amin(1)


@pytest.mark.parametrize("eps", ["1/50", "1/20", "1/10"])
def test_every_count_equals_the_closed_form_of_a_linear_model(eps):
    net = linear(classes=2)
    data = images(60, classes=2, net=net)
    record = evaluate(classifier(net, classes=2), battery(FGSM, pgd_spec(), DEEPFOOL, eps=eps), data)
    order = [int(name[2:]) for name in record.samples["sample_id"]]
    x, y = data.images[order], data.labels[order]
    correct = net(x).argmax(1) == y
    robust = correct & (radius(net, x, y) > float(Fraction(eps)))
    assert record.n == 60
    assert record.clean_accuracy.count == int(correct.sum()) == 48
    assert record.robust_accuracy("pgd10").count == int(robust.sum())
    # Minimal DeepFool overshoots by 2 %: exact for radii up to eps / 1.02.
    reach = correct & (radius(net, x, y) > float(Fraction(eps)) / 1.02)
    assert record.robust_accuracy("deepfool").count == int(reach.sum())
    assert record.worst_case_accuracy.count == int(robust.sum())
    assert record.success_rate("pgd10").total == 48
    assert record.success_rate("pgd10").count == 48 - int(robust.sum())
    assert record.robust_accuracy("fgsm").count >= int(robust.sum())
    distances = record.samples["deepfool.linf"][record.clean_correct].astype(float).to_numpy()
    assert np.allclose(distances, 1.02 * radius(net, x, y)[correct].detach().numpy(), rtol=1e-3)


def test_wrong_samples_are_never_attacked_and_stay_in_the_denominator():
    record = evaluate(classifier(linear()), battery(FGSM, pgd_spec()), images(50))
    wrong = ~record.clean_correct
    assert wrong.sum() == 10
    assert not record.samples.loc[wrong, "pgd10.attacked"].any()
    assert record.samples.loc[wrong, "pgd10.margin"].isna().all()
    assert record.robust_accuracy("pgd10").total == 50


def test_limit_has_its_own_denominator_and_leaves_the_worst_case_alone():
    record = evaluate(classifier(linear()), battery(FGSM, SPSA), images(30))
    assert record.robust_accuracy("spsa").total == 7
    assert not record.samples["spsa.attacked"][7:].any()
    assert record.worst_case_accuracy.total == 30


# --- lying attacks ------------------------------------------------------------------------------------


def lying(change):
    """An attack that starts from real PGD successes and then returns something inadmissible."""

    def attack(model, x, y, *, threat, noise, **hyper):
        candidates = pgd(model, x, y, threat=threat, noise=noise, **hyper)
        return change(candidates, x)

    return ATTACKS | {"pgd": attack}


def _replace(candidates, x_adv):
    candidates.x_adv = x_adv
    return candidates


LIES = {
    "out of ball": (lambda p, x: _replace(p, (x + 3 * (p.x_adv - x)).clamp(0, 1)), "outside the linf"),
    "just out of ball": (
        lambda p, x: _replace(p, x + (0.1 + 1e-4) * (p.x_adv - x).sign()),
        "outside the linf",
    ),
    "out of box": (lambda p, x: _replace(p, p.x_adv + 2.0), "outside the box"),
    "NaN": (lambda p, x: _replace(p, p.x_adv * torch.nan), "not finite"),
    "infinite": (lambda p, x: _replace(p, p.x_adv + torch.inf), "not finite"),
    "wrong shape": (lambda p, x: _replace(p, p.x_adv[:, :, :2]), "expected"),
    "too few rows": (lambda p, x: _replace(p, p.x_adv[:-1]), "expected"),
    "wrong dtype": (lambda p, x: _replace(p, p.x_adv.double()), "expected"),
    "no tensor": (lambda p, x: _replace(p, None), "expected"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_attack_breaks_nothing(lie):
    change, reason = LIES[lie]
    honest = evaluate(classifier(linear()), battery(pgd_spec()), images(40))
    assert honest.success_rate("pgd10").count > 10
    record = evaluate(classifier(linear()), battery(pgd_spec()), images(40), attacks=lying(change))
    assert record.success_rate("pgd10").count == 0
    assert (
        record.samples["pgd10.violation"].str.contains(reason, regex=False).sum()
        == record.clean_correct.sum()
    )
    assert [flag.kind for flag in record.flags] == ["replaced_attacks", "violations", "nothing_broken"]


def test_the_box_has_the_slack_of_rounding_and_no_more():
    net = linear()
    x = torch.stack((torch.zeros(1, 4, 4), torch.ones(1, 4, 4))).repeat_interleave(2, 0)
    y = net(x).argmax(1)
    beyond = torch.tensor([-5e-7, -2e-6, 5e-7, 2e-6]).view(4, 1, 1, 1)
    told = verify(classifier(net), x, y, Candidates.start(x + beyond), ThreatModel("linf", "1/10")).violation
    assert told == ["", "outside the box [0, 1]"] * 2


def test_claiming_success_on_the_clean_image_counts_for_nothing():
    record = evaluate(
        classifier(linear()), battery(pgd_spec()), images(40), attacks=lying(lambda p, x: Candidates.start(x))
    )
    assert record.success_rate("pgd10").count == 0
    assert [flag.kind for flag in record.flags] == ["replaced_attacks", "nothing_broken"]


def test_side_effects_of_an_attack_are_contained_and_flagged():
    def rude(model, x, y, *, threat, noise, **hyper):
        candidates = pgd(model, x.clone(), y, threat=threat, noise=noise, **hyper)
        x += 0.5
        torch.rand(1)
        return candidates

    model, data = classifier(linear()), images(40)
    state = torch.get_rng_state()
    honest = evaluate(model, battery(pgd_spec()), data)
    record = evaluate(model, battery(pgd_spec()), data, attacks=ATTACKS | {"pgd": rude})
    assert torch.equal(torch.get_rng_state(), state)
    found = {flag.evidence for flag in record.flags if flag.kind == "side_effects"}
    assert found == {"input modified", "global random state used"}
    assert record.robust_accuracy("pgd10") == honest.robust_accuracy("pgd10")


@pytest.mark.parametrize("random", [False, True])
def test_only_random_numbers_are_put_down_to_a_network_that_draws_them(random):
    def rude(model, x, y, *, threat, noise, **hyper):
        candidates = pgd(model, x.clone(), y, threat=threat, noise=noise, **hyper)
        x += 0.5
        torch.rand(1)
        return candidates

    net = Wrapped(lambda x: x + 0.1 * torch.randn(x.shape)) if random else linear()
    attacks = ATTACKS | {"pgd": rude}
    record = evaluate(
        classifier(net), battery(pgd_spec()), images(40), attacks=attacks, allow_unreliable=True
    )
    seen = {flag.evidence for flag in record.flags if flag.kind == "side_effects"}
    assert seen == ({"input modified"} if random else {"input modified", "global random state used"})


@pytest.mark.parametrize("clip", [True, False])
def test_a_minimal_attack_may_leave_the_ball_but_the_box_only_where_its_entry_says_so(clip):
    def outward(model, x, y, **_):
        candidates = Candidates.start(x)
        candidates.x_adv = x + 2.0
        return candidates

    attacks = ATTACKS | {"deepfool": outward}
    record = evaluate(classifier(linear()), battery(DEEPFOOL | {"clip": clip}), images(40), attacks=attacks)
    attacked = record.samples["deepfool.attacked"]
    assert set(record.samples["deepfool.violation"][attacked]) == {"outside the box [0, 1]" if clip else ""}
    assert record.samples["deepfool.margin"][attacked].isna().all() == clip
    assert record.success_rate("deepfool").count == 0


@pytest.mark.parametrize("how", ["weights", "mode"])
def test_an_attack_that_changes_the_model_stops_the_run(how):
    def vandal(model, x, y, **_):
        if how == "weights":
            model.module[1].weight.data.add_(1.0)
        else:
            model.module.train()
        return Candidates.start(x)

    with pytest.raises(RunError, match="weights or mode"):
        evaluate(classifier(linear()), battery(pgd_spec()), images(20), attacks=ATTACKS | {"pgd": vandal})


def test_an_attack_that_raises_is_named_in_one_line():
    def broken(*_, **__):
        raise IndexError("list index\nout of range")

    with pytest.raises(RunError, match=r"attack .pgd10. failed: list index$"):
        evaluate(classifier(linear()), battery(pgd_spec()), images(20), attacks=ATTACKS | {"pgd": broken})


# --- deceptive models ---------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, change_input=None, change_output=None):
        super().__init__()
        self.net = linear()
        self.change_input = change_input or (lambda x: x)
        self.change_output = change_output or (lambda z: z)

    def forward(self, x):
        return self.change_output(self.net(self.change_input(x)))


class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x):
        return self.net(x - x.mean(0) + 0.5)


class Padded(nn.Module):
    """Three classes, and 30 outputs that no image of theirs ever wins."""

    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x):
        z = self.net(x)
        return torch.cat((z, z.new_full((len(z), 30), -50.0)), 1)


def test_outputs_without_a_class_are_flagged_where_labels_do_not_tell_how_many_there_are():
    data = dataclasses.replace(images(40), name="npz:toy")
    record = evaluate(classifier(Padded(), classes=33), battery(FGSM), data)
    (flag,) = record.flags
    assert flag.kind == "extra_outputs"
    assert flag.evidence == "33 outputs, 3 classes in npz:toy"
    with pytest.raises(UsageError, match="33 outputs, toy has 3 classes"):
        evaluate(classifier(Padded(), classes=33), battery(FGSM), images(40))


def test_records_and_classifiers_say_what_they_hold():
    model = classifier(linear())
    record = evaluate(model, battery(FGSM), images(40))
    worst = 100 * record.worst_case_accuracy.value
    said = (record.manifest.battery.id, f" {worst:.1f} %", " 80.0 %", "n = 40", "flags: none")
    assert [word for word in said if word not in repr(record)] == []
    assert [word for word in ("3 classes", str(SHAPE), "cpu", "fp32") if word not in repr(model)] == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"classifier": linear()}, r"needs a Classifier, got a Sequential: use Classifier\(net"),
        ({"classifier": "digits_cure"}, "needs a Classifier, got a str"),
        ({"battery": "strong"}, r"needs a Battery, got a str: use load_battery\(id\)"),
        ({"data": torch.zeros(2, 1, 4, 4)}, "needs a EvalSet, got a Tensor: use load_dataset"),
    ],
)
def test_networks_and_names_are_told_what_belongs_there(wrong, said):
    given = {"classifier": classifier(linear()), "battery": battery(FGSM), "data": images(8)}
    with pytest.raises(TypeError, match=said):
        evaluate(**(given | wrong))


DECEPTIVE = {
    "quantised": (lambda: Wrapped(lambda x: (x * 16).round() / 16), {"zero_gradient"}),
    "argmax": (
        lambda: Wrapped(None, lambda z: nn.functional.one_hot(z.argmax(1), 3).float() * 9),
        {"no_gradient", "zero_gradient"},
    ),
    "softmax": (lambda: Wrapped(None, lambda z: z.softmax(1)), {"probabilities"}),
    "saturated": (lambda: Wrapped(None, lambda z: z * 1e4), set()),  # cross-entropy here sees through it
    "random": (lambda: Wrapped(lambda x: x + 0.1 * torch.randn(x.shape)), {"stochastic"}),
    "batch statistics": (BatchStatistics, {"batch_dependent"}),
    "honest": (linear, set()),
}


@pytest.mark.parametrize("name", DECEPTIVE)
def test_a_deceptive_model_raises_exactly_its_flags(name):
    make, expected = DECEPTIVE[name]
    # The random model is right on 58 %: of 40 images that is near chance for one draw of noise in 25.
    record = evaluate(classifier(make()), battery(pgd_spec()), images(400), allow_unreliable=True)
    assert {flag.kind for flag in record.flags} == expected
    for flag in record.flags:
        assert flag.evidence
        assert flag.about.raised_when
        assert flag.about.do_next


def test_guessing_is_flagged_and_knowing_is_not():
    data = images(60)
    other = classifier(linear(seed=5))
    (flag,) = evaluate(other, battery(FGSM), data).flags
    assert flag.kind == "near_chance"
    assert flag.value <= 0.5
    assert evaluate(classifier(linear()), battery(FGSM), data).flags == []


@pytest.mark.parametrize("name", ["random", "batch statistics"])
def test_an_unreliable_model_is_refused_unless_asked_for(name):
    make, _ = DECEPTIVE[name]
    with pytest.raises(UsageError, match="--allow-unreliable"):
        evaluate(classifier(make()), battery(pgd_spec()), images(40))
    assert evaluate(classifier(make()), battery(pgd_spec()), images(40), allow_unreliable=True).unreliable


def test_dropout_left_in_training_mode_is_put_right():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear()[1]).train()
    record = evaluate(classifier(net), battery(pgd_spec()), images(30))
    assert record.flags == []
    assert net.training


def test_a_black_box_attack_that_beats_gradients_is_flagged():
    masked = Wrapped(lambda x: (x * 64).round() / 64)
    spec = SPSA | {"limit": 0, "samples": 32, "steps": 30, "delta": 0.05}
    record = evaluate(classifier(masked), battery(pgd_spec(random_start=False), spec), images(40))
    raised = {flag.kind: flag for flag in record.flags}
    assert set(raised) == {"zero_gradient", "black_box_stronger"}
    assert raised["black_box_stronger"].attack == "spsa"
    assert record.robust_accuracy("spsa").count < record.robust_accuracy("pgd10").count


# --- shards, resuming, merging, batch size ------------------------------------------------------------


FULL = (NOISE, FGSM, pgd_spec(5), pgd_spec(10), DEEPFOOL, SPSA)


class KilledError(Exception):
    pass


def killer(after):
    """A progress callback that dies at the given call."""
    calls = 0

    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KilledError

    return progress


@pytest.mark.parametrize("after", [1, 3, 6, 7, 12, 17])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, after):
    options = {"shard_size": 8, "seed": 3}
    evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "whole", **options)
    with pytest.raises(KilledError):
        evaluate(
            classifier(linear()),
            battery(*FULL),
            images(21),
            out=tmp_path / "cut",
            progress=killer(after),
            **options,
        )
    assert not (tmp_path / "cut" / "samples.parquet").exists()
    with pytest.raises(UsageError, match="not finished"):
        Record.load(tmp_path / "cut")
    evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "cut", resume=True, **options)
    whole, cut = ((tmp_path / name / "samples.parquet").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert Record.load(tmp_path / "cut").manifest.cost.keys() == {
        "clean",
        "noise",
        "fgsm",
        "pgd5",
        "pgd10",
        "deepfool",
        "spsa",
    }


@pytest.mark.parametrize("after", [3, 4, 5, 6])
def test_a_killed_shard_goes_on_with_the_attack_it_was_killed_in(tmp_path, after, monkeypatch):
    monkeypatch.setattr(shard_work, "CHECKPOINT_INTERVAL", 0.0)
    ran = []

    def noted(name):
        def attack(*arguments, **options):
            ran.append(name)
            return ATTACKS[name](*arguments, **options)

        return attack

    given = {name: noted(name) for name in ATTACKS}  # step counts do not share a trajectory here
    options = {"seed": 3, "attacks": given}
    evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "whole", **options)
    order = list(ran)
    ran.clear()
    cut = {**options, "progress": killer(after)}
    with pytest.raises(KilledError):
        evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "cut", **cut)
    assert (tmp_path / "cut" / "shards" / "0000-unfinished.json").exists()
    evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "cut", resume=True, **options)
    assert ran == order  # nothing twice
    whole, cut = (Record.load(tmp_path / name) for name in ("whole", "cut"))
    assert whole.samples.equals(cut.samples)
    assert (tmp_path / "whole" / "samples.parquet").read_bytes() == (
        tmp_path / "cut" / "samples.parquet"
    ).read_bytes()
    assert {k: c.forwards for k, c in whole.manifest.cost.items()} == {
        k: c.forwards for k, c in cut.manifest.cost.items()
    }
    assert not list((tmp_path / "cut" / "shards").glob("*unfinished*"))


LONG = {
    "spsa": SPSA | {"limit": 17},
    "peer": {"id": "peer", "name": "Peer", "kind": "torchattacks:PGD", "limit": 17, "steps": 5},
}


def counted(name: str, die_at: int = 0):
    """An attack that notes how many rows it is given each time, and may die."""
    given: list[int] = []

    def attack(classifier, x, y, **options):
        if len(given) + 1 == die_at:
            raise KeyboardInterrupt
        given.append(len(x))
        return ATTACKS[name](classifier, x, y, **options)

    return given, {**ATTACKS, name: attack}


@pytest.fixture
def pieces_of_three(monkeypatch):
    monkeypatch.setattr(shard_work, "CHECKPOINT_INTERVAL", 0.0)
    monkeypatch.setattr(shard_work, "PIECE_PASSES", 2 * SPSA["samples"] * SPSA["steps"] * 3 + 1)
    monkeypatch.setattr(shard_work, "PIECE_ROWS", 3)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("die_at", [2, 4])
def test_a_long_attack_goes_on_with_the_rows_that_are_left(tmp_path, pieces_of_three, name, die_at, save):
    options = {"seed": 3, "save_adversarials": save}
    protocol, data = battery(FGSM, LONG[name]), images(21)
    whole, attacks = counted(name)
    evaluate(classifier(linear()), protocol, data, out=tmp_path / "whole", attacks=attacks, **options)
    assert whole == [3, 3, 3, 3, 1]  # 13 of the first 17 are classified correctly
    first, attacks = counted(name, die_at)
    with pytest.raises(KeyboardInterrupt):
        evaluate(classifier(linear()), protocol, data, out=tmp_path / "cut", attacks=attacks, **options)
    second, attacks = counted(name)
    evaluate(
        classifier(linear()), protocol, data, out=tmp_path / "cut", attacks=attacks, resume=True, **options
    )
    assert first + second == whole
    assert len(first) == die_at - 1
    for file in ("samples.parquet", *([f"adversarials/0000-{name}.safetensors"] if save else [])):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    costs = [Record.load(tmp_path / run).manifest.cost[name] for run in ("whole", "cut")]
    assert costs[0].forwards == costs[1].forwards > 0
    assert costs[0].backwards == costs[1].backwards


def test_rows_whose_images_were_not_kept_are_attacked_again_where_they_are_wanted(tmp_path, pieces_of_three):
    protocol, data = battery(LONG["spsa"]), images(21)
    _, attacks = counted("spsa", die_at=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(classifier(linear()), protocol, data, out=tmp_path / "run", attacks=attacks)
    again, attacks = counted("spsa")
    options = {"attacks": attacks, "resume": True, "save_adversarials": True}
    record = evaluate(classifier(linear()), protocol, data, out=tmp_path / "run", **options)
    assert again == [3, 3, 3, 3, 1]
    assert record.manifest.cost["spsa"].forwards == record.samples["spsa.forwards"].sum()


@pytest.mark.parametrize("whose", ["in another order", "of other samples", "of too few samples"])
def test_kept_images_that_are_not_those_of_the_rows_are_made_again(tmp_path, pieces_of_three, whose):
    options = {"seed": 3, "save_adversarials": True}
    protocol, data = battery(LONG["spsa"]), images(21)
    _, attacks = counted("spsa", die_at=3)
    evaluate(classifier(linear()), protocol, data, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(classifier(linear()), protocol, data, out=tmp_path / "cut", attacks=attacks, **options)
    file = tmp_path / "cut" / "adversarials" / "0000-spsa.safetensors"
    kept, ids = stored(file)
    assert len(ids) == 6
    change = {
        "in another order": (kept.flip(0), ids[::-1]),
        "of other samples": (kept, [f"u/{i}" for i in range(6)]),
        "of too few samples": (kept[:5], ids[:5]),
    }
    images_then, ids_then = change[whose]
    save_file({"spsa": images_then.contiguous()}, file, {"sample_ids": json.dumps(ids_then)})
    again, attacks = counted("spsa")
    options |= {"attacks": attacks, "resume": True}
    evaluate(classifier(linear()), protocol, data, out=tmp_path / "cut", **options)
    assert again == [3, 3, 3, 3, 1]
    whole = tmp_path / "whole" / "adversarials" / "0000-spsa.safetensors"
    assert file.read_bytes() == whole.read_bytes()


def stored(file):
    with safe_open(file, "pt") as archive:
        return archive.get_tensor("spsa"), json.loads(archive.metadata()["sample_ids"])


def test_pieces_follow_the_battery_and_nothing_else(pieces_of_three):
    """Whatever the batch size: where a run is cut must not depend on the machine it goes on."""
    for size in (1, 2, 1000):
        given, attacks = counted("spsa")
        evaluate(classifier(linear(), batch_size=size), battery(LONG["spsa"]), images(21), attacks=attacks)
        assert given == [3, 3, 3, 3, 1]


def test_progress_says_how_far_a_long_attack_is(pieces_of_three):
    said, protocol = [], battery(FGSM, LONG["spsa"])
    evaluate(classifier(linear()), protocol, images(21), progress=lambda *given: said.append(given[2]))
    name = battery(LONG["spsa"]).attacks[0].name
    assert [text for text in said if text.startswith(name)] == [
        f"{name}, {done} of 13 images" for done in (0, 3, 6, 9, 12)
    ]


def test_only_attacks_that_cost_much_a_row_are_cut():
    sizes = {spec.id: piece_rows(spec) for spec in load_battery("strong").attacks}
    assert sizes.pop("spsa") == 20  # 2**19 images, 2 * 128 * 100 a row
    assert set(sizes.values()) == {None}
    sizes = {spec.id: piece_rows(spec) for spec in load_battery("autoattack").attacks}
    assert sizes == {"apgd_ce": 5190, "apgd_t": 576, "fab_t": 291, "square": 104}
    assert piece_rows(Peer(id="cw", name="CW", limit=0, kind="torchattacks:CW")) == 128


def test_resuming_does_not_repeat_finished_shards(tmp_path):
    options = {"shard_size": 8}
    model = classifier(linear())
    evaluate(model, battery(FGSM), images(16), out=tmp_path / "run", **options)
    before = model.forwards
    evaluate(model, battery(FGSM), images(16), out=tmp_path / "run", resume=True, **options)
    preflight = 2 * (2 * 16 + 8 + 16)  # on images and near them: two passes, eight alone, one with gradients
    assert model.forwards - before == preflight


def test_a_damaged_shard_is_done_again(tmp_path):
    evaluate(classifier(linear()), battery(FGSM), images(16), out=tmp_path / "run", shard_size=8)
    want = (tmp_path / "run" / "samples.parquet").read_bytes()
    (tmp_path / "run" / "shards" / "0001.parquet").write_bytes(b"half a file")
    evaluate(classifier(linear()), battery(FGSM), images(16), out=tmp_path / "run", shard_size=8, resume=True)
    assert (tmp_path / "run" / "samples.parquet").read_bytes() == want


@pytest.mark.parametrize("parts", [2, 3])
def test_shards_merge_to_the_bytes_of_a_whole_run(tmp_path, parts):
    evaluate(classifier(linear()), battery(*FULL), images(21), out=tmp_path / "whole", shard_size=8)
    paths = [tmp_path / f"part{i}" for i in range(1, parts + 1)]
    for i, path in enumerate(paths, 1):  # each part on a machine of another size
        record = evaluate(
            classifier(linear(), batch_size=64 * i),
            battery(*FULL),
            images(21),
            out=path,
            shard=(i, parts),
            shard_size=8,
        )
        assert record.manifest.status == "partial"
    joined = merge(paths[::-1], tmp_path / "joined")
    assert joined.manifest.status == "complete"
    assert (tmp_path / "joined" / "samples.parquet").read_bytes() == (
        tmp_path / "whole" / "samples.parquet"
    ).read_bytes()
    whole = Record.load(tmp_path / "whole")
    assert joined.flags == whole.flags
    for key, cost in whole.manifest.cost.items():
        assert (joined.manifest.cost[key].forwards, joined.manifest.cost[key].backwards) == (
            cost.forwards,
            cost.backwards,
        )
        if key in (spec["id"] for spec in FULL):  # of all shards, not of the last
            assert cost.forwards == whole.samples[f"{key}.forwards"].sum()
            assert cost.backwards == whole.samples[f"{key}.backwards"].sum()


def preflight_flag(kind, attack=""):
    return Flag(kind=kind, evidence="made", attack=attack)


def test_what_preflight_raised_in_any_part_survives_the_merge(tmp_path):
    """Each part looks at the model on its own machine: what one of them saw holds for the whole."""
    raised = [["extra_outputs", "zero_gradient"], ["extra_outputs", "stochastic"]]
    for i, kinds in enumerate(raised, 1):
        options = {"shard": (i, 2), "shard_size": 8, "flags": [preflight_flag(kind) for kind in kinds]}
        evaluate(classifier(linear()), battery(FGSM), images(16), out=tmp_path / f"p{i}", **options)
    joined = merge([tmp_path / "p1", tmp_path / "p2"], tmp_path / "joined")
    preflight = [f.kind for f in joined.flags if f.about.origin == "preflight"]
    assert preflight == ["extra_outputs", "zero_gradient", "stochastic"]
    assert joined.unreliable
    assert Record.load(tmp_path / "joined").flags == joined.flags


def test_what_attacks_did_in_any_part_survives_the_merge(tmp_path):
    def touches(model, x, y, *, threat, noise, **_):
        x.add_(0)  # nothing is changed, but in the first shard a row is
        if noise is not None and bool((x[0] != 0).all()) and touches.first:
            x[0] += 0.001
            touches.first = False
        return Candidates.start(x)

    touches.first = True
    for i in (1, 2):
        options = {"shard": (i, 2), "shard_size": 8, "attacks": {"fgsm": touches}}
        evaluate(classifier(linear()), battery(FGSM), images(16), out=tmp_path / f"p{i}", **options)
    joined = merge([tmp_path / "p2", tmp_path / "p1"], tmp_path / "joined")
    assert [(f.kind, f.attack) for f in joined.flags if f.about.origin == "run"] == [("side_effects", "fgsm")]


def test_what_preflight_raised_before_an_interruption_survives_the_resumption(tmp_path):
    out, options = tmp_path / "run", {"shard_size": 8}
    evaluate(
        classifier(linear()),
        battery(FGSM),
        images(16),
        out=out,
        flags=[preflight_flag("stochastic")],
        **options,
    )
    (out / "shards" / "0001.json").unlink()
    record = evaluate(
        classifier(linear()),
        battery(FGSM),
        images(16),
        out=out,
        resume=True,
        flags=[preflight_flag("probabilities")],
        **options,
    )
    kinds = [f.kind for f in Record.load(out).flags if f.about.origin == "preflight"]
    assert kinds == ["stochastic", "probabilities"]
    assert [f.kind for f in record.manifest.flags] == kinds  # and nothing that follows from the table


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    for i in (1, 2):
        evaluate(
            classifier(linear()),
            battery(FGSM),
            images(16),
            out=tmp_path / f"p{i}",
            shard=(i, 2),
            shard_size=8,
        )
    evaluate(
        classifier(linear(seed=9)),
        battery(FGSM),
        images(16),
        out=tmp_path / "other",
        shard=(2, 2),
        shard_size=8,
    )
    with pytest.raises(UsageError, match="model weights"):
        merge([tmp_path / "p1", tmp_path / "other"], tmp_path / "out")
    with pytest.raises(UsageError, match="shards 1 of 2 are missing"):
        merge([tmp_path / "p1"], tmp_path / "out")
    with pytest.raises(UsageError, match="also in another part"):
        merge([tmp_path / "p1", tmp_path / "p1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"battery": battery(FGSM, eps="1/20")}, "battery"),
        ({"data": images(16, seed=5)}, "data"),
        ({"classifier": "other"}, "model weights"),
        ({"seed": 5}, "seed"),
        ({"shard_size": 4}, "shard_size"),
        ({"n": 12}, "data"),
    ],
)
def test_resume_refuses_another_run_and_says_what_differs(tmp_path, change, named):
    base = {"classifier": classifier(linear()), "battery": battery(FGSM), "data": images(16), "shard_size": 8}
    evaluate(out=tmp_path / "run", **base)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    if change.get("classifier"):
        change = {"classifier": classifier(linear(seed=4))}
    with pytest.raises(UsageError, match=f"holds another run: {named} was"):
        evaluate(out=tmp_path / "run", resume=True, **(base | change))
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    with pytest.raises(UsageError, match="already holds a run"):
        evaluate(out=tmp_path / "run", **base)


def test_resume_refuses_the_same_weights_in_another_network(tmp_path):
    """A softmax has no weights: their digest alone would let it go on with what the logits left."""
    base = {"battery": battery(FGSM), "data": images(16), "shard_size": 8}
    net = linear()
    evaluate(classifier(net), out=tmp_path / "run", **base)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    wrapped = Classifier(
        nn.Sequential(net, nn.Softmax(1)),
        num_classes=3,
        input_shape=SHAPE,
        info=classifier(net).model_info().model_copy(update={"answers": []}),
    )
    with pytest.raises(UsageError, match="the same weights in another network"):
        evaluate(wrapped, out=tmp_path / "run", resume=True, **base)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_batch_size_draws_the_same_noise_and_moves_only_rounding():
    records = [
        evaluate(classifier(linear(), batch_size=size), battery(*FULL), images(40), seed=1)
        for size in (1, 7, 64)
    ]
    for record in records[1:]:
        for spec in record.attacks:
            one, other = (r.samples for r in (records[0], record))
            differ = one[f"{spec.id}.broken"] != other[f"{spec.id}.broken"]
            margins = other.loc[differ, f"{spec.id}.margin"].astype(float).abs()
            assert (margins < 1e-5).all()
            near = one[f"{spec.id}.linf"].astype(float) - other[f"{spec.id}.linf"].astype(float)
            assert near[~differ].abs().max() < 1e-5


def test_seed_moves_random_attacks_and_nothing_else():
    one, same, other = (
        evaluate(classifier(linear()), battery(FGSM, pgd_spec(4)), images(40), seed=s).samples
        for s in (1, 1, 2)
    )
    assert one.equals(same)
    assert one.filter(like="fgsm").equals(other.filter(like="fgsm"))
    assert not one["pgd4.margin"].equals(other["pgd4.margin"])


def test_subsets_are_prefixes_and_samples_keep_their_noise():
    small = evaluate(classifier(linear()), battery(pgd_spec()), images(40), n=10).samples
    large = evaluate(classifier(linear()), battery(pgd_spec()), images(40), n=25).samples
    shared = small.columns.difference(["pgd10.margin", "pgd10.l2", "pgd10.linf", "clean_margin"])
    assert small[shared].equals(large.head(10)[shared])
    assert np.allclose(
        small["pgd10.margin"].astype(float),
        large["pgd10.margin"].head(10).astype(float),
        atol=1e-5,
        equal_nan=True,
    )


def test_entries_of_one_trajectory_run_together_and_equal_entries_alone():
    specs = battery(FGSM, pgd_spec(10), pgd_spec(3, step_size="1/20"), pgd_spec(5), pgd_spec(20)).attacks
    assert [[s.id for s in g] for g in groups(specs)] == [["fgsm"], ["pgd5", "pgd10", "pgd20"], ["pgd3"]]
    together = evaluate(classifier(linear()), battery(pgd_spec(5), pgd_spec(20)), images(40))
    for steps in (5, 20):
        alone = evaluate(classifier(linear()), battery(pgd_spec(steps)), images(40))
        pattern = f"pgd{steps}."
        columns = [c for c in alone.samples if c.startswith(pattern) and not c.endswith("forwards")]
        assert together.samples[columns].equals(alone.samples[columns])
    assert together.robust_accuracy("pgd20").count <= together.robust_accuracy("pgd5").count


def test_saved_adversarials_are_the_images_that_were_judged(tmp_path):
    from safetensors import safe_open

    net = linear()
    record = evaluate(
        classifier(net),
        battery(pgd_spec(5), pgd_spec(10)),
        images(12),
        out=tmp_path / "r",
        save_adversarials=True,
    )
    (file,) = (tmp_path / "r" / "adversarials").glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        ids = json.loads(saved.metadata()["sample_ids"])
        x_adv = saved.get_tensor("pgd10")
    rows = record.samples.set_index("sample_id").loc[ids]
    wrong = net(x_adv).argmax(1).numpy() != rows["label"].to_numpy()
    assert (wrong == rows["pgd10.broken"].to_numpy()).all()
    assert x_adv.dtype == torch.float32


def test_the_record_survives_the_disk(tmp_path):
    record = evaluate(classifier(linear()), battery(*FULL), images(20), out=tmp_path / "r")
    loaded = Record.load(tmp_path / "r")
    assert loaded.samples.equals(record.samples)
    assert loaded.manifest == record.manifest
    assert loaded.worst_case_accuracy == record.worst_case_accuracy


@pytest.mark.parametrize(
    ("version", "advice"), [(99, "upgrade"), (0, "evaluate again"), (None, "evaluate again")]
)
def test_another_schema_version_is_refused_in_words(tmp_path, version, advice):
    evaluate(classifier(linear()), battery(FGSM), images(10), out=tmp_path / "r")
    file = tmp_path / "r" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))
    with pytest.raises(UsageError, match=advice):
        Record.load(tmp_path / "r")


def test_out_of_memory_halves_the_batch_and_goes_on():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, x):
            if len(x) > 5:
                raise torch.OutOfMemoryError("too many")
            return self.net(x)

    model = Classifier(linear(), num_classes=3, input_shape=SHAPE, batch_size=32)
    small = Classifier(linear(), num_classes=3, input_shape=SHAPE, batch_size=32)
    small.module = small._search = Small().eval()
    want = evaluate(model, battery(pgd_spec()), images(40))
    got = evaluate(small, battery(pgd_spec()), images(40))
    assert small.batch_size == 4
    assert got.robust_accuracy("pgd10") == want.robust_accuracy("pgd10")


def test_a_long_attack_shows_that_it_is_alive(monkeypatch):
    clock = iter(range(0, 100_000, 2))
    monkeypatch.setattr("robustbench_cure.evaluation.evaluate.time.monotonic", lambda: float(next(clock)))
    said = []
    model = classifier(linear())
    evaluate(model, battery(pgd_spec()), images(40), progress=lambda *told: said.append(told[2]))
    passes = [int(text.split()[1].replace(",", "")) for text in said if text.endswith("passes")]
    assert len(passes) > 3
    assert passes == sorted(set(passes))
    assert model.callback is None


def test_the_check_of_an_attack_asks_the_network_anew():
    """Whatever the attack was told of the same image: a lucky answer is not taken for granted."""
    model, shown = classifier(linear()), []
    model.model_info()  # asks too
    passes = model.logits
    model.logits = lambda x: shown.append(len(x)) or passes(x)
    record = evaluate(model, battery(NOISE), images(16), flags=[])
    tried = int(record.samples["noise.forwards"].sum())
    assert sum(shown) == 16 + tried + int(record.samples["noise.attacked"].sum())


def test_gradients_that_vanish_beside_the_images_are_flagged():
    def known(x):
        inside = ((x >= 0.3) & (x <= 0.7)).flatten(1).all(1).view(-1, 1, 1, 1)  # as all images are
        return x.where(inside, x.detach())

    (flag,) = preflight(classifier(Wrapped(known)), images(32))
    assert flag.kind == "zero_gradient"
    assert flag.evidence.endswith("moved by noise of 8/255")
