"""Universal perturbations against half-spaces, against the algorithm written plainly, and the command."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import made
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import binomtest

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import universal as module
from robustbench_cure.geometry.universal import ITERATIONS, universal
from robustbench_cure.geometry.universal import fooled as fooled_of
from robustbench_cure.studies import universal as universal_study
from robustbench_cure.studies.engine import Study
from robustbench_cure.threat import ThreatModel

pytestmark = pytest.mark.usefixtures("svg_only")

SHAPE = (1, 4, 4)


def fooled(model, x, v):
    return fooled_of(model, x, model.logits(x).argmax(1), v)


def radius(norm: str, size: float) -> ThreatModel:
    return ThreatModel.parse(norm, str(Fraction(size).limit_denominator(10_000)))


@pytest.fixture
def wall(affine):
    """Two classes, label 1 beyond a wall of unit normal w; images before it at distances 0.1 to 0.3."""
    w = np.full(16, 0.25)
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.1 * (torch.rand((24, *SHAPE), generator=generator) - 0.5)
    position = x.flatten(1).double().numpy() @ w
    distance = np.linspace(0.1, 0.3, 24)
    shift = torch.from_numpy(((2.2 - distance) - position)[:, None] * w[None]).float().view(-1, *SHAPE)
    return affine(np.stack([np.zeros(16), w]), [0.0, -2.2], SHAPE), x + shift, distance


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("method", ["deepfool", "gradient"])
@pytest.mark.parametrize("reach", [0.15, 0.22, 0.33])
def test_before_a_wall_exactly_the_images_within_reach_are_fooled(wall, norm, method, reach):
    """Along w a vector of l2 length L crosses the wall for images nearer than L; in linf, w is a corner."""
    model, x, distance = wall
    threat = radius(norm, reach if norm == "l2" else reach / 4)
    found = universal(model.classifier, x, threat=threat, method=method, delta=0.0, passes=12)
    hit = fooled(model.classifier, x, found.v).numpy()
    assert not hit[distance > reach * 1.001].any()
    assert hit[distance < reach * 0.995].all()
    assert float(threat.distance(torch.zeros(1, *SHAPE), found.v[None])) <= threat.radius * (1 + 1e-5)
    if method == "deepfool":
        direction = found.v.flatten().double().numpy()
        assert direction @ np.full(16, 0.25) == pytest.approx(np.linalg.norm(direction), rel=1e-5)
    assert found.passes == 12 or hit.all()


def test_deepfool_goes_no_farther_than_the_last_image_needs(wall):
    model, x, _ = wall
    found = universal(model.classifier, x, threat=radius("l2", 2), delta=0.0)
    assert found.fooled == (1.0,)
    assert 0.3 <= float(found.v.norm()) <= 1.02 * 0.3 + 1e-5


def test_no_vector_fools_both_sides_of_a_wall(wall):
    """The thesis' theorem is of directions, v or -v: one vector crosses one way only."""
    model, x, distance = wall
    w = torch.full((1, *SHAPE), 0.25)
    beyond = x + w * torch.from_numpy(2 * distance).float().view(-1, 1, 1, 1)
    both = torch.cat([x, beyond[:16]])
    found = universal(model.classifier, both, threat=radius("l2", 1), delta=0.2, passes=5)
    assert found.passes == 5
    hit = fooled(model.classifier, both, found.v)
    assert bool(hit[:24].any()) != bool(hit[24:].any())
    assert max(found.fooled) <= 24 / 40


def test_looking_ahead_changes_nothing():
    """The thesis' algorithm 4, one image after the other, written without windows."""
    model, data = load_model("digits_normal", device="cpu", precision="fp32"), load_dataset("digits")
    x, threat = data.images[:60], ThreatModel.parse("linf", "51/255")
    labels = model.logits(x).argmax(1)
    found = universal(model, x, threat=threat, passes=2, delta=0.0, seed=3)
    v = torch.zeros_like(x[:1])
    shares = []
    for done in range(2):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(30_000 + done))
        for row in order.tolist():
            moved, label = (x[row : row + 1] + v).clamp(0, 1), labels[row : row + 1]
            if int(model.logits(moved).argmax(1)) == int(label):
                step = deepfool(model, moved, label, threat=ThreatModel.unbounded("l2"), steps=ITERATIONS)
                if bool(step.converged):
                    v = (v + step.x_adv - moved).clamp(-51 / 255, 51 / 255)
        shares.append(float((model.logits((x + v).clamp(0, 1)).argmax(1) != labels).double().mean()))
    assert found.fooled == pytest.approx(shares)
    torch.testing.assert_close(found.last, v[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["deepfool", "gradient"])
def test_a_search_that_goes_on_ends_where_a_whole_one_does(method):
    model, data = load_model("digits_cure", device="cpu", precision="fp32"), load_dataset("digits")
    states = []
    arguments = {"threat": ThreatModel.parse("linf", "51/255"), "method": method, "passes": 3}
    whole = universal(model, data.images[:40], checkpoint=states.append, **arguments)
    assert [state.passes for state in states] == [1, 2, 3]
    rest = universal(model, data.images[:40], known=states[0], **arguments)
    assert rest.fooled == whole.fooled
    assert torch.equal(rest.v, whole.v)
    assert torch.equal(rest.last, whole.last)
    best = max(whole.fooled)
    assert float(fooled(model, data.images[:40], whole.v).double().mean()) == best
    other = universal(model, data.images[:40], seed=1, **arguments)
    assert not torch.equal(other.v, whole.v)


def test_it_beats_noise_of_its_length_and_carries_to_other_images():
    model, data = load_model("digits_normal", device="cpu", precision="fp32"), load_dataset("digits")
    found = universal(model, data.images[:150], threat=ThreatModel.parse("linf", "51/255"), method="gradient")
    held_out = data.images[150:400]
    share = float(fooled(model, held_out, found.v).double().mean())
    noise = torch.randn(found.v.shape, generator=torch.Generator().manual_seed(0))
    noise *= found.v.norm() / noise.norm()
    assert share > 0.4
    assert share > 5 * float(fooled(model, held_out, noise).double().mean())


def test_what_is_counted_is_an_image(affine):
    """Beyond the wall only outside the box: cut to it, the image keeps its label."""
    model = affine([[0.0], [1.0]], [0.0, -1.1], (1, 1, 1))
    x, v = torch.tensor([0.9]).view(1, 1, 1, 1), torch.tensor([0.5]).view(1, 1, 1)
    assert model.logits(x + v).argmax(1) == [1]
    assert not fooled(model.classifier, x, v).any()


def black_and_bright(affine):
    """Two black pixels that darkening would count most for, two bright ones; 40 images of label 0."""
    w = np.array([-1, -1, -0.5, -0.5])
    model = affine(np.stack([np.zeros(4), w]), [0.0, 0.7], (1, 2, 2)).classifier
    bright = 0.9 + 0.1 * torch.rand((40, 2), generator=torch.Generator().manual_seed(0))
    return model, torch.cat([torch.zeros(40, 2), bright], 1).view(-1, 1, 2, 2)


@pytest.mark.parametrize("method", ["deepfool", "gradient"])
def test_black_pixels_do_not_hold_the_search(affine, method):
    """Without the box the shortest way darkens black pixels: all images are fooled, and none that is one."""
    model, x = black_and_bright(affine)
    assert not model.logits(x).argmax(1).any()
    found = universal(model, x, threat=radius("l2", 1), method=method, delta=0.0)
    assert found.fooled[-1] == 1.0
    assert len(found.fooled) == 1
    assert fooled(model, x, found.v).all()
    if method == "deepfool":
        assert not found.v[0, 0].any()  # what cannot darken takes no part


def test_no_image_is_visited_again_that_is_fooled_and_all_others_are(affine, monkeypatch):
    """One call of DeepFool for every image that stands, and no more: the box counts for both."""
    model, x = black_and_bright(affine)
    seen = []

    def counted(classifier, moved, label, **options):
        seen.append(moved)
        assert options["clip"]
        return deepfool(classifier, moved, label, **options)

    monkeypatch.setattr(module, "deepfool", counted)
    universal(model, x, threat=radius("l2", 0.1), delta=0.0, passes=1)
    assert len(seen) == 40  # out of reach: each is tried
    assert all((moved >= 0).all() and (moved <= 1).all() for moved in seen)


def test_the_best_pass_is_kept_not_the_last():
    model, data = load_model("digits_cure", device="cpu", precision="fp32"), load_dataset("digits")
    x = data.images[:150]
    found = universal(model, x, threat=ThreatModel.parse("linf", "51/255"), delta=0.0, passes=3)
    best = max(found.fooled)
    assert found.fooled[-1] < best
    assert float(fooled(model, x, found.v).double().mean()) == best
    assert float(fooled(model, x, found.last).double().mean()) == found.fooled[-1]


def test_what_deepfool_could_not_move_adds_nothing(affine, monkeypatch):
    model, x = black_and_bright(affine)

    def gives_up(classifier, moved, label, **options):
        found = deepfool(classifier, moved, label, **options)
        found.converged = torch.zeros_like(found.converged)
        return found

    monkeypatch.setattr(module, "deepfool", gives_up)
    assert not universal(model, x, threat=radius("l2", 1), passes=1).v.any()


def test_deepfool_has_the_iterations_of_the_authors_code(affine, monkeypatch):
    model, x = black_and_bright(affine)
    steps = []

    def counted(classifier, moved, label, **options):
        steps.append(options["steps"])
        return deepfool(classifier, moved, label, **options)

    monkeypatch.setattr(module, "deepfool", counted)
    universal(model, x, threat=radius("l2", 1), passes=1)
    assert set(steps) == {10}


def test_fooled_images_stop_to_count_in_the_gradient_method(affine):
    """Where the loss is above the ceiling there is nothing to gain; below it there is."""
    model = affine([[0.0, 0.0], [4.0, 40.0]], [0.0, -2.0], (1, 1, 2)).classifier
    x, label, zero = (
        torch.tensor([[0.1, 0.9], [0.1, 0.0]]).view(2, 1, 1, 2),
        torch.tensor([0]),
        torch.zeros(1, 1, 2),
    )
    losses = torch.nn.functional.cross_entropy(model.logits(x), label.repeat(2), reduction="none")
    assert losses[0] > module.CEILING > losses[1]
    moved = [module._gradient_pass(model, row[None], label, zero, radius("l2", 1), 0.1, None) for row in x]
    assert [bool(v.any()) for v in moved] == [False, True]


def test_pixels_at_an_end_of_the_box_do_not_turn_the_gradient(affine):
    """A steep black pixel that could only darken, a flat one that can move: the step is along the latter."""
    model = affine([[0.0, 0.0], [-40.0, 4.0]], [0.0, -2.0], (1, 1, 2)).classifier
    x, v = torch.tensor([-0.0, 0.2]).view(1, 1, 1, 2), torch.tensor([-0.1, 0.0]).view(1, 1, 2)
    moved = module._gradient_pass(model, x, torch.tensor([0]), v, radius("l2", 1), 0.1, None)
    torch.testing.assert_close(moved - v, torch.tensor([0.0, 0.1]).view(1, 1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [10**18, 2**63 - 1])
def test_every_seed_is_one(seed):
    model, data = load_model("digits_normal", device="cpu", precision="fp32"), load_dataset("digits")
    arguments = {
        "threat": ThreatModel.parse("linf", "51/255"),
        "method": "gradient",
        "passes": 2,
        "delta": 0.0,
    }
    one, other = (universal(model, data.images[:40], seed=s, **arguments) for s in (seed, seed - 1))
    assert one.passes == 2
    assert not torch.equal(one.last, other.last)


def test_models_that_cannot_be_moved_leave_nothing():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.stack((x.sum((1, 2, 3)) * 0 + 1, x.sum((1, 2, 3)) * 0), 1)

    model = Classifier(Constant(), num_classes=2, input_shape=SHAPE)
    x = torch.rand((5, *SHAPE), generator=torch.Generator().manual_seed(0))
    for method in ("deepfool", "gradient"):
        found = universal(model, x, threat=radius("l2", 1), method=method, passes=2)
        assert found.fooled == (0.0, 0.0)
        assert not found.v.any()


# --- the command -------------------------------------------------------------------------------------

invoke = partial(made.invoke, "universal")

PAIR = ("--model", "digits_normal", "--model", "digits_cure", "--n", "20", "--passes", "2")


def test_the_command_judges_on_other_images_and_on_every_model(tmp_path):
    run = invoke(*PAIR, "--method", "gradient", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "universal.csv").set_index("model")
    transfer = pd.read_csv(tmp_path / "a" / "universal-transfer.csv").set_index("sought_on")
    vectors = np.load(tmp_path / "a" / "universal.npz")
    data = load_dataset("digits").subset(20)
    for of in table.index:
        v = torch.from_numpy(vectors[of])
        assert float(v.abs().max()) <= 51 / 255 + 1e-6
        for on in table.index:
            share = fooled(load_model(on, device="cpu"), data.images[10:], v).double().mean()
            assert transfer.loc[of, on] == pytest.approx(float(share))
        assert table.loc[of, "fooled"] == pytest.approx(transfer.loc[of, of])
        assert table.loc[of, "n"] == table.loc[of, "n_sought"] == 10
        assert f"{100 * table.loc[of, 'fooled']:.1f}" in run.output
    lengths = pd.read_csv(tmp_path / "a" / "universal-lengths.csv")
    at_one = lengths[(lengths["radii"] == 1) & (lengths["perturbation"] == "universal")].set_index("model")
    for name in table.index:
        assert at_one.loc[name, "fooled"] == pytest.approx(table.loc[name, "fooled"])
    assert (lengths[lengths["radii"] == 0]["fooled"] == 0).all()


@pytest.fixture(scope="module", params=[("linf", 0.2, 0), ("l2", 1.25, 3)], ids=["linf", "l2"])
def judged(request, tmp_path_factory):
    """A finished run of one model, what it printed, and all that is needed to compute it again."""
    norm, xi, seed = request.param
    out = tmp_path_factory.mktemp("judged") / "a"
    run = invoke(
        "--model", "digits_normal", "--n", "80", "--norm", norm, "--xi", str(xi), "--delta", "0.5",
        "--passes", "3", "--seed", str(seed), "--out", str(out),
    )  # fmt: skip
    assert run.exit_code == 0
    model, data = load_model("digits_normal", device="cpu"), load_dataset("digits").subset(80)
    return out, run.output, ThreatModel.parse(norm, str(xi)), seed, model, data


def test_every_number_of_the_table_follows_from_the_vector(judged):
    out, said, threat, seed, model, data = judged
    v = torch.from_numpy(np.load(out / "universal.npz")["digits_normal"])
    x, held_out = data.images[:40], data.images[40:]
    before, after = model.logits(held_out).argmax(1), model.logits((held_out + v).clamp(0, 1)).argmax(1)
    hit = before != after
    (row,) = pd.read_csv(out / "universal.csv").to_dict("records")
    again = universal(model, x, threat=threat, delta=0.5, passes=3, seed=seed)
    torch.testing.assert_close(v, again.v, rtol=0, atol=1e-5)
    assert (row["model"], row["passes"]) == ("digits_normal", again.passes)
    assert (row["n_sought"], row["n"]) == (40, 40)
    assert row["l2"] == pytest.approx(float(v.norm()))
    assert row["linf"] == pytest.approx(float(v.abs().max()))
    assert row["fooled_sought"] == pytest.approx(float(fooled(model, x, v).double().mean()))
    assert row["fooled"] == pytest.approx(float(hit.double().mean()))
    interval = binomtest(int(hit.sum()), 40).proportion_ci(method="wilson")
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    most = after[hit].bincount()
    assert 0 < most.max() < most.sum()
    assert str(row["most_frequent_label"]) == data.classes[int(most.argmax())]
    assert row["share_of_it"] == pytest.approx(float(most.max() / most.sum()))
    assert f"{100 * row['fooled_sought']:.1f}" in said
    noise = Noise.for_samples(seed, "universal", [f"random/{draw}" for draw in range(10)])
    drawn = (noise.normal if threat.norm == "l2" else noise.signs)((1, 8, 8), 0)
    unit = drawn / (drawn.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if threat.norm == "l2" else 1)
    shares = [float(fooled(model, held_out, threat.radius * w).double().mean()) for w in unit]
    assert len(set(shares)) > 1
    assert row["random"] == pytest.approx(np.mean(shares))
    assert row["random_most"] == pytest.approx(max(shares))
    assert row["random_draws"] == 10
    assert f"{100 * np.mean(shares):.1f}" in said


def test_labels_are_counted_where_they_go(judged):
    out, _, _, _, model, data = judged
    v = torch.from_numpy(np.load(out / "universal.npz")["digits_normal"])
    held_out = data.images[40:]
    before, after = (model.logits(x).argmax(1).tolist() for x in (held_out, (held_out + v).clamp(0, 1)))
    table = pd.read_csv(out / "universal-labels.csv")
    counted = {(int(row.before), int(row.after)): int(row.count_) for row in table.rename(
        columns={"count": "count_"}).itertuples()}  # fmt: skip
    assert counted == Counter((i, j) for i, j in zip(before, after, strict=True) if i != j)
    assert table["images"].tolist() == [before.count(label) for label in table["before"]]
    graph = universal_study.describe(table.astype({"before": str, "after": str}))
    assert graph in (out / "index.html").read_text(encoding="utf-8")


def test_others_are_added_at_every_length(judged):
    """Directions again from their definitions; a tenth of the radius apart, from nothing to twice of it."""
    out, _, threat, seed, model, data = judged
    x, held_out = data.images[:40], data.images[40:]
    label = model.logits(x).argmax(1)
    r = deepfool(model, x, label, threat=ThreatModel.unbounded("l2"), clip=False).x_adv - x
    one = int(Noise.for_samples(seed, "universal", ["image"]).uniform((40,), 0)[0].argmax())
    # The way of the cross-entropy, whose own gradient is lost in rounding where the model is sure.
    gradient = model.value_and_gradient(x, lambda z: odds_against(z, label), reference=True)[1]
    expected = {
        "one image's": r[one],
        "one image's FGSM": gradient[one].sign(),
        "sum of all images'": r.sum(0),
        "mean image": x.mean(0),
        "universal": torch.from_numpy(np.load(out / "universal.npz")["digits_normal"]),
    }
    table = pd.read_csv(out / "universal-lengths.csv")
    assert set(table["perturbation"]) == {*expected, "random"}
    for name, direction in expected.items():
        part = table[table["perturbation"] == name]
        np.testing.assert_allclose(part["radii"], np.linspace(0, 2, 11))
        np.testing.assert_allclose(part["length"], np.linspace(0, 2, 11) * threat.radius)
        size = direction.norm() if threat.norm == "l2" else direction.abs().max()
        for row in part.itertuples():
            share = float(fooled(model, held_out, direction * (row.length / size)).double().mean())
            assert row.fooled == pytest.approx(share, abs=1 / 40 + 1e-9)
            assert (row.most, row.draws) == (row.fooled, 1)
        assert part["fooled"].max() > 0


def test_images_that_cannot_be_moved_are_no_baseline(monkeypatch):
    """Failed perturbations are not drawn and not summed, whatever DeepFool left of them."""
    model, x = load_model("digits_normal", device="cpu", precision="fp32"), load_dataset("digits").images[:12]
    whole = module.baselines(model, x, norm="l2", seed=0)
    seeds = [module.baselines(model, x, norm="l2", seed=seed)["one image's"] for seed in range(5)]
    assert any(not torch.equal(other, whole["one image's"]) for other in seeds)

    def fails(classifier, x, y, **options):
        found = deepfool(classifier, x, y, **options)
        found.x_adv[:11] += 100
        found.converged[:11] = False
        return found

    monkeypatch.setattr(module, "deepfool", fails)
    few = module.baselines(model, x, norm="l2", seed=0)
    assert float(few["sum of all images'"].norm()) < 10
    torch.testing.assert_close(few["one image's"], few["sum of all images'"])


def test_the_graph_of_labels_by_hand():
    before, after = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 5]), torch.tensor([1, 1, 2, 0, 2, 3, 2, 4, 3, 5])
    found = universal_study.label_changes(before, after, tuple("abcdef"))
    assert found.to_numpy().tolist() == [
        ["a", "b", 2, 4], ["a", "c", 1, 4], ["b", "c", 1, 2], ["b", "d", 1, 2], ["d", "e", 1, 1],
        ["e", "d", 1, 1],
    ]  # fmt: skip
    graph = universal_study.label_graph(found)
    assert graph == {"a": "b", "b": "c", "d": "e", "e": "d"}
    assert sorted(map(sorted, universal_study.components(graph))) == [["a", "b", "c"], ["d", "e"]]
    assert universal_study.components({"a": "b", "c": "d", "d": "a"}) == [{"a", "b", "c", "d"}]
    assert "images of 4 labels" in universal_study.describe(found)
    assert universal_study.describe(found).endswith("components: 2")
    assert universal_study.describe(found[:0]) == "no image is fooled"


def test_the_usual_radius_is_the_thesis_share_of_an_image():
    data = load_dataset("digits").subset(50)
    study = Study(verb="universal", models={}, data=data, out=Path("nowhere"), dataset="digits")
    mean = float(data.images.flatten(1).norm(dim=1).mean())
    # 2,000 of 50,000
    assert universal_study.default_length(study, "l2") == Fraction(f"{0.04 * mean:.2f}")
    assert universal_study.default_length(study, "linf") == Fraction(51, 255)
    study.dataset = "cifar10"
    assert universal_study.default_length(study, "linf") == Fraction(10, 255)


@pytest.mark.parametrize(
    "other",
    [["--seed", "1"], ["--delta", "0.9"], ["--xi", "0.1"], ["--method", "gradient"], ["--passes", "3"]],
)
def test_unfinished_work_with_other_settings_is_not_taken_over(tmp_path, other):
    arguments = ["--model", "digits_normal", "--n", "6", "--passes", "1", "--out", str(tmp_path / "a")]
    assert invoke(*arguments).exit_code == 0
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="of another measurement"):
        invoke(*arguments, *other)


@pytest.mark.parametrize(("norm", "xi"), [("l2", "1e18"), ("l2", "1e-18"), ("linf", "1"), ("linf", "1e-18")])
def test_radii_at_the_ends_of_the_range_and_the_largest_seed_are_taken(tmp_path, norm, xi):
    arguments = ["--n", "8", "--passes", "1", "--norm", norm, "--xi", xi, "--seed", str(2**63 - 1)]
    assert invoke("--model", "digits_normal", *arguments, "--out", str(tmp_path / "a")).exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "universal.csv")
    assert table["l2"].notna().all()
    assert (table["fooled"] == 0).all() == (xi == "1e-18")


def test_the_search_ends_at_the_share_asked_for(tmp_path):
    """With delta near 1 one pass is enough, with 0 all are made."""
    for delta, passes in (("0.99", 1), ("0", 3)):
        arguments = ["--n", "40", "--passes", "3", "--delta", delta, "--out", str(tmp_path / delta)]
        assert invoke("--model", "digits_normal", *arguments).exit_code == 0
        assert pd.read_csv(tmp_path / delta / "universal.csv")["passes"].tolist() == [passes]


def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    invoke(*PAIR, "--out", str(tmp_path / "whole"))
    real = universal_study.universal

    def stops(*given, checkpoint, **more):
        def once(state):
            checkpoint(state)
            raise KeyboardInterrupt

        return real(*given, checkpoint=once, **more)

    monkeypatch.setattr(universal_study, "universal", stops)
    CliRunner().invoke(cli, ["universal", *PAIR, "--device", "cpu", "--out", str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "manifest.json").exists()
    assert np.load(tmp_path / "parts" / "universal-digits_normal.npz")["fooled"].shape == (1,)
    monkeypatch.setattr(universal_study, "universal", real)
    assert invoke(*PAIR, "--out", str(tmp_path / "parts")).exit_code == 0
    for name in ("universal.csv", "universal-transfer.csv", "universal.npz", "universal.svg"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UsageError, match="already holds results"):
        invoke(*PAIR, "--out", str(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--xi", "0"], "must be positive"),
        (["--xi", "2", "--norm", "linf"], "--xi 2: pixels lie between 0 and 1; write grey levels as 10/255"),
        (["--xi", "eight"], "--xi eight"),
        (["--xi", "1e400"], "--xi 1e400: must be positive, from 1e-18 to 1e18"),
        (["--xi", "1e39"], "--xi 1e39: must be positive"),
        (["--xi", "1e-400"], "--xi 1e-400: must be positive"),
        (["--xi", "1e-19"], "--xi 1e-19: must be positive"),
        (["--n", "3"], "at least 4 images"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke("--model", "digits_normal", *arguments, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
