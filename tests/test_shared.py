"""Subspaces that boundaries share: known matrices, a cylinder whose boundaries bend in three directions."""

from __future__ import annotations

import math
from functools import partial

import made
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made import WEIGHTED, MatmulWatch, Quadric, toy

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.boundary import Nearest, nearest_boundary, tangent_frame
from robustbench_cure.geometry.shared import (
    SharedSubspaces,
    common,
    cosines,
    curvatures_along,
    extreme_eigenvectors,
    in_inputs,
    most_curved,
    random_in,
    random_outside,
    relative_curvatures,
    share_inside,
)
from robustbench_cure.studies import shared as shared_study
from robustbench_cure.studies.shared import LENGTHS, Unseen, changed_by_noise

pytestmark = pytest.mark.usefixtures("svg_only")

SHAPE = (1, 4, 5)
SIZE = 20
invoke = partial(made.invoke, "shared")


def frame(m: int, d: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Orthonormal rows (m, d)."""
    gaussian = torch.randn((d, m), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].T.float()


def streams(n: int) -> Noise:
    return Noise.for_samples(0, "shared", [str(row) for row in range(n)])


# --- subspaces ---------------------------------------------------------------------------------------


def test_common_directions_are_those_most_vectors_have():
    one, other = frame(2)
    vectors = torch.stack([one] * 9 + [other] * 4)
    values, rows = common(vectors)
    np.testing.assert_allclose(values[:3].numpy(), [3, 2, 0], atol=1e-6)
    assert abs(float(rows[0] @ one)) == pytest.approx(1, abs=1e-6)
    assert abs(float(rows[1] @ other)) == pytest.approx(1, abs=1e-6)
    assert rows.shape == (13, SIZE)


def test_the_ends_are_the_most_and_the_least_curved_directions():
    normal = torch.nn.functional.normalize(torch.arange(1.0, SIZE + 1), dim=0)
    tangent = tangent_frame(normal)
    axes = frame(SIZE - 1, SIZE - 1, seed=1)
    curvatures = torch.linspace(-3, 5, SIZE - 1)
    rows = extreme_eigenvectors(tangent, axes.T @ torch.diag(curvatures) @ axes, count=2)
    expected = axes[[-1, -2, 0, 1]] @ tangent
    np.testing.assert_allclose((rows * expected).sum(1).abs().numpy(), 1, atol=1e-4)
    assert float((rows @ normal).abs().max()) < 1e-5
    assert extreme_eigenvectors(tangent, torch.eye(SIZE - 1)).shape == (
        SIZE - 1,
        SIZE,
    )  # fewer than twice ten


def test_the_curved_subspace_is_that_of_the_largest_not_of_the_strongest_curvature():
    axes = frame(SIZE, seed=2)
    values = torch.tensor([-9.0, 4.0, 3.0] + [0.1] * (SIZE - 3))
    rows = most_curved(axes.T @ torch.diag(values) @ axes, 2)
    np.testing.assert_allclose(cosines(rows, axes[1:3]).numpy(), 1, atol=1e-5)
    assert abs(float(rows[0] @ axes[1])) == pytest.approx(1, abs=1e-5)


def test_cosines_are_those_of_the_principal_angles():
    axes = frame(4)
    np.testing.assert_allclose(cosines(axes[:2], axes[:2].flip(0)).numpy(), 1, atol=1e-6)
    np.testing.assert_allclose(cosines(axes[:2], axes[2:]).numpy(), 0, atol=1e-6)
    turned = torch.stack((axes[0], math.cos(0.4) * axes[1] + math.sin(0.4) * axes[2]))
    np.testing.assert_allclose(cosines(axes[:2], turned).numpy(), [1, math.cos(0.4)], atol=1e-6)


def test_shares_of_a_subspace():
    basis = frame(5)
    inside, outside = random_in(basis, streams(40), 0), random_outside(basis, streams(40), 1)
    np.testing.assert_allclose(share_inside(basis, 3 * inside).numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(share_inside(basis, outside).numpy(), 0, atol=1e-5)
    for unit in (inside, outside):
        np.testing.assert_allclose(unit.norm(dim=1).numpy(), 1, atol=1e-5)
    assert share_inside(basis, torch.zeros(1, *SHAPE)).isnan().all()
    anything = streams(2000).normal(SHAPE, 3)
    square = share_inside(basis, anything).square()
    assert float(square.mean()) == pytest.approx(5 / SIZE, abs=4 * float(square.std()) / 2000**0.5)


def test_products_with_subspaces_are_not_rounded():
    tangent, matrix = tangent_frame(torch.eye(SIZE)[0]), torch.eye(SIZE - 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with MatmulWatch() as watch:
            extreme_eigenvectors(tangent, matrix)
            in_inputs(tangent, matrix)
            random_in(frame(5), streams(3), 0)
            random_outside(frame(5), streams(3), 0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert len(watch.allowed) == 6
    assert not any(watch.allowed)


def test_draws_point_everywhere_in_their_subspace():
    basis = frame(3)
    for unit, share in (
        (random_in(basis, streams(4000), 0) @ basis.T, 1 / 3),
        (random_outside(basis, streams(4000), 0) @ frame(SIZE, seed=5).T, (SIZE - 3) / SIZE / (SIZE - 3)),
    ):
        np.testing.assert_allclose(unit.mean(0).numpy(), 0, atol=5 * (share / 4000) ** 0.5)
        assert float(unit.square().mean(0)[0]) == pytest.approx(share, rel=0.5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_relative_curvature_is_that_of_the_tangent_part(sign):
    """The normal is the first input: what bends along it, 50, is no curvature of the boundary."""
    diagonal = [50.0] + [sign * 10.0] + [sign * 1.0] * (SIZE - 2)
    model = Classifier(
        Quadric(torch.tensor(diagonal).diag(), 2 * torch.eye(SIZE)[0]), num_classes=2, input_shape=SHAPE
    )
    n = 30
    grey, zeros = torch.full((n, *SHAPE), 0.5), torch.zeros(n, dtype=torch.int64)
    near = Nearest(zeros, zeros + 1, grey, grey, torch.ones(n, dtype=torch.float64))
    u = torch.eye(SIZE)[:3]
    u = torch.cat((u, ((u[0] + u[1]) / 2**0.5)[None]))
    found = relative_curvatures(model, near, u, h=torch.full((n,), 0.3), references=200, noise=streams(n))
    usual = (10 + SIZE - 2) / SIZE  # E |v'Gv| of random v is the trace over d, as all signs agree
    expected = np.array([0, 10, 1, 5]) / usual
    np.testing.assert_allclose(found.mean(0).numpy(), expected, rtol=0.05, atol=1e-3)


def test_flat_boundaries_have_no_relative_curvature(affine):
    model = affine(np.zeros((2, SIZE)), [0.0, 0.0], SHAPE).classifier
    grey, zeros = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    near = Nearest(zeros, zeros + 1, grey, grey, torch.ones(2, dtype=torch.float64))
    found = relative_curvatures(model, near, torch.eye(SIZE)[:2], h=torch.ones(2), noise=streams(2))
    assert found.isnan().all()


# --- the command -------------------------------------------------------------------------------------

CYLINDER = """
import torch

AXES = torch.linalg.qr(torch.randn((36, 3), generator=torch.Generator().manual_seed(0)))[0]

class Cylinder(torch.nn.Module):
    def forward(self, x):
        square = ((x - 0.5).flatten(1) @ AXES.to(x)).square().sum(1)
        return torch.stack((torch.full_like(square, 0.25**2), square, square - 9), 1)

def build(): return Cylinder()
"""

BOWL = """
import torch

class Bowl(torch.nn.Module):
    def forward(self, x):
        u = (x - 128 / 255).flatten(1)
        value = u[:, 0] + 2 * u[:, 1:4].square().sum(1) - 0.2
        value = torch.where(u[:, 0] < -0.1, 0 * value - 1, value)
        return torch.stack((0 * value, value), 1)

def build(): return Bowl()
"""


def bowl(tmp_path, monkeypatch, first):
    """Images of one grey but for the first pixel, along which all normals point."""
    grey = np.full((len(first), 6, 6, 1), 128, dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(first))  # in which the command takes them
    grey[order, 0, 0, 0] = first
    return toy(tmp_path, monkeypatch, "bowl", BOWL, grey, 2)


def test_a_cylinder_gives_away_its_directions(tmp_path, monkeypatch):
    """Label 0 inside a cylinder over three directions: they hold all normals and all that is curved."""
    grey = np.random.default_rng(0).integers(115, 141, size=(40, 6, 6, 1), dtype=np.uint8)
    model = toy(tmp_path, monkeypatch, "cylinder", CYLINDER, grey, 3)
    given = (*model, "--learn", "15", "--dimension", "3", "--xi", "0.6", "--out", str(tmp_path / "a"))
    run = invoke(*given)
    assert run.exit_code == 0
    axes = torch.linalg.qr(torch.randn((36, 3), generator=torch.Generator().manual_seed(0)))[0].T
    with np.load(next((tmp_path / "a").glob("shared-*.npz"))) as kept:
        curved, flat = torch.from_numpy(kept["curved"]), torch.from_numpy(kept["flat"][:3])
        assert int(kept["images"]) == 15
    np.testing.assert_allclose(cosines(curved, axes).numpy(), 1, atol=1e-3)
    np.testing.assert_allclose(cosines(flat, axes).numpy(), 1, atol=1e-3)
    table = pd.read_csv(tmp_path / "a" / "shared.csv").iloc[0]
    # A step of 0.6 along the three directions leaves a radius of 0.25 from wherever one stands inside.
    assert table["fooled_S_c"] == table["fooled_S_f"] == 1
    assert table["fooled_any"] < 0.5
    assert table["chance"] == pytest.approx((3 / 36) ** 0.5)
    assert (table["n"], table["n_boundary"], table["m_S_f"]) == (25, 25, 3)
    bending = pd.read_csv(tmp_path / "a" / "shared-bending.csv").set_index("subspace")
    # Along the three directions a circle of radius 0.25; of all 35 along the boundary two are curved.
    assert sorted(bending.loc["S_c", "m"]) == [1, 2, 3]
    np.testing.assert_allclose(bending.loc["S_c", "mean"], 1 / 0.25, rtol=0.01)
    np.testing.assert_allclose(bending.loc["S_c", ["std", "std_draws"]], 0, atol=0.1)
    assert bending.loc["any", "mean"] == pytest.approx(2 / 35 / 0.25, abs=4 * bending.loc["any", "std_draws"])
    assert 0 < bending.loc["any", "std_draws"] < 0.5
    invoke(*model, "--dimension", "3", "--xi", "0.05", "--n", "8", "--out", str(tmp_path / "short"))
    short = pd.read_csv(tmp_path / "short" / "shared-fooling.csv")
    assert (short["fooled"] == 0).all()  # no image is that near
    fooling = pd.read_csv(tmp_path / "a" / "shared-fooling.csv")
    assert set(fooling["m"][fooling["subspace"] == "S_c"]) == {1, 2, 3}
    assert (fooling["best"] >= fooling["fooled"]).all()
    assert ((fooling["ci_low"] <= fooling["fooled"]) & (fooling["fooled"] <= fooling["ci_high"])).all()
    assert set(fooling["n"]) == {25}


def test_normals_and_curved_directions_are_different_subspaces(tmp_path, monkeypatch):
    """All normals along the first pixel, all curvature along the next three."""
    given = bowl(tmp_path, monkeypatch, range(125, 137))
    invoke(*given, "--learn", "5", "--dimension", "3", "--out", str(tmp_path / "a"))
    with np.load(next((tmp_path / "a").glob("shared-*.npz"))) as kept:
        curved, flat, u = kept["curved"], kept["flat"], kept["shared"]
    assert abs(flat[0, 0]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(np.linalg.norm(curved[:, 1:4], axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(u[:, 0], 0, atol=1e-3)
    rho = pd.read_csv(tmp_path / "a" / "shared-relative.csv")["rho"]
    # Curvature 4 along three of 36 inputs: 4 |P u|^2 along u, 4 x 3/36 on average.
    np.testing.assert_allclose(rho, 12 * np.square(u[:, 1:4]).sum(1), rtol=0.1, atol=0.05)
    bending = pd.read_csv(tmp_path / "a" / "shared-bending.csv").set_index("subspace")
    np.testing.assert_allclose(bending.loc["S_c", "mean"], 4, rtol=0.01)


def test_images_without_a_boundary_are_counted_and_too_few_of_them_refused(tmp_path, monkeypatch):
    far, near = [20, 40, 60, 80], [125, 127, 129, 131, 133, 135]
    given = bowl(tmp_path, monkeypatch, [*near, *near, *far])
    run = invoke(*given, "--learn", "6", "--dimension", "3", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "shared.csv").iloc[0]
    assert (table["n"], table["n_boundary"]) == (10, 6)
    assert set(pd.read_csv(tmp_path / "a" / "shared-bending.csv")["n"]) == {6}
    with pytest.raises(UsageError, match=r"no boundary .* 4 images"):
        invoke(*given, "--learn", "12", "--dimension", "3", "--out", str(tmp_path / "b"))
    given = bowl(tmp_path, monkeypatch, [*far, *near])
    with pytest.raises(UsageError, match=r"1 of the 5 images .* 11 "):
        invoke(*given, "--learn", "5", "--dimension", "11", "--out", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


PAIR = ("--model", "digits_normal", "--model", "digits_cure", "--n", "12", "--directions", "5")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One run of both models, in passes of five images: its folder, and what it said."""
    out = tmp_path_factory.mktemp("shared") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustbench_cure.zoo.models.has_bf16", lambda device: False)
        run = invoke(*PAIR, "--batch-size", "5", "--out", str(out))
    assert run.exit_code == 0
    return out, run.output


def unseen(name):
    """The images that were judged, the model, their boundaries."""
    data, model = load_dataset("digits").subset(12).take(range(6, 12)), load_model(name, precision="fp32")
    return data, model, nearest_boundary(model, data.images)


@pytest.mark.parametrize("name", ["digits_normal", "digits_cure"])
def test_projections_in_the_table_are_those_of_unseen_images(pair, name):
    out, _ = pair
    table = pd.read_csv(out / "shared.csv").set_index("model")
    data, _, near = unseen(name)
    x = data.images
    with np.load(out / f"shared-{name}.npz") as kept:
        basis = kept["shared"]
    assert basis.shape == (4, 64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-5)
    r = (near.point - x).flatten(1).numpy()
    shift = np.gradient(x.numpy(), axis=3).reshape(6, 64)
    difference = (x - x[[5, 0, 1, 2, 3, 4]]).flatten(1).numpy()
    for kind, v in {"adversarial": r, "shift": shift, "difference": difference}.items():
        expected = (np.linalg.norm(v @ basis.T, axis=1) / np.linalg.norm(v, axis=1)).mean()
        assert table.loc[name, kind] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["digits_normal", "digits_cure"])
def test_curvature_in_the_table_is_that_of_unseen_images(pair, name):
    out, _ = pair
    row = pd.read_csv(out / "shared.csv").set_index("model").loc[name]
    data, model, near = unseen(name)
    with np.load(out / f"shared-{name}.npz") as kept:
        u, curved, flat = (torch.from_numpy(kept[key]) for key in ("shared", "curved", "flat"))
    noise, h = Noise.for_samples(0, "shared/relative", data.ids), near.distance.float()
    rho = relative_curvatures(model, near, u, h=h, references=5, noise=noise).mean(0)
    relative = pd.read_csv(out / "shared-relative.csv").set_index("model").loc[name, "rho"]
    np.testing.assert_allclose(relative, rho.numpy(), rtol=0.01)
    assert row["rho_1"] == pytest.approx(float(rho[0]), rel=0.01)
    for kind, basis in {"S_c": curved, "S_f": flat[:4]}.items():
        v = random_in(basis, Noise.for_samples(0, f"shared/{kind}", [str(k) for k in range(10)]), 0)
        along = curvatures_along(model, near, v, h=h)
        assert row[f"curvature_{kind}"] == pytest.approx(float(along.mean()), rel=0.01, abs=1e-3)
        assert row[f"curvature_{kind}_std"] == pytest.approx(float(along.mean(1).numpy().std()), rel=0.01)


@pytest.mark.parametrize("name", ["digits_normal", "digits_cure"])
def test_labels_changed_are_those_of_unseen_images(pair, name):
    out, _ = pair
    row = pd.read_csv(out / "shared.csv").set_index("model").loc[name]
    data, model, near = unseen(name)
    x, labels = data.images, near.own
    length = float(near.distance.median()) * 8 / 5  # a fifth of sqrt(d) times the distance
    assert row["length"] == pytest.approx(length, rel=1e-4)
    with np.load(out / f"shared-{name}.npz") as kept:
        curved, flat = (torch.from_numpy(kept[key]) for key in ("curved", "flat"))
    for kind, basis in {"S_c": curved, "S_f": flat[:4]}.items():
        v = random_in(basis, Noise.for_samples(0, f"shared/{kind}", [str(k) for k in range(10)]), 0)
        moved = (x[:, None] + length * v.view(1, 10, *x.shape[1:])).clamp(0, 1)
        changed = model.logits(moved.flatten(0, 1)).argmax(1).view(6, 10) != labels[:, None]
        by_draw = changed.double().mean(0)
        assert row[f"fooled_{kind}"] == pytest.approx(float(by_draw.mean()))
        assert row[f"fooled_{kind}_std"] == pytest.approx(float(by_draw.numpy().std()))


def test_noise_is_inside_or_outside_of_the_shared_directions_and_not_cut(pair):
    out, _ = pair
    with np.load(out / "shared-digits_normal.npz") as kept:
        known = SharedSubspaces(
            **{key: torch.from_numpy(kept[key]) for key in kept.files if key != "identity"}
        )
    data, model = load_dataset("digits").subset(500), load_model("digits_normal", precision="fp32")
    x, labels = data.images, model.logits(data.images).argmax(1)
    noise = Noise.for_samples(0, "shared/noise", data.ids)
    inside, outside = random_in(known.shared, noise, 0), random_outside(known.shared, noise, 1)
    usual = x.flatten(1).norm(dim=1).mean()

    def changed(unit, low=-torch.inf, high=torch.inf):
        moved = [(x + share * usual * unit.view_as(x)).clamp(low, high) for share in LENGTHS]
        return [float((model.logits(there).argmax(1) != labels).double().mean()) for there in moved]

    table = changed_by_noise(Unseen(model, data, nearest_boundary(model, x), 0), known)
    found = table.set_index("noise")["changed"]
    for kind, unit in {"inside": inside, "outside": outside}.items():
        assert found[kind].tolist() == pytest.approx(changed(unit))
        assert found[kind].iloc[0] == 0
        assert changed(unit) != changed(unit, 0, 1)
    assert changed(inside) != changed(outside)
    assert ((table["ci_low"] <= table["changed"]) & (table["changed"] <= table["ci_high"])).all()


def test_a_table_for_the_terminal_and_angles_of_two_models(pair):
    out, said = pair
    noise = pd.read_csv(out / "shared-noise.csv")
    assert (noise[noise["length"] == 0]["changed"] == 0).all()
    angles = pd.read_csv(out / "shared-angles.csv")
    assert set(angles["subspaces"]) == {"digits_normal, digits_cure", "random"}
    rows = [line for line in said.splitlines() if line.startswith(("model ", "digits_"))]
    rows = [row for row in rows if ":" not in row]
    assert max(map(len, rows)) <= 80 - len("resnet18s_deepfool") + len("digits_normal")
    assert max(len(line) for line in said.splitlines() if str(out) not in line) <= 80
    assert (out / "shared-bending.svg").exists()


@pytest.mark.parametrize("step", [None, 0.7])
def test_the_step_of_learning_is_the_distance_of_each_images_boundary(tmp_path, monkeypatch, step):
    real, seen = shared_study.projected_hessian, []

    def looks(*given, h, **more):
        seen.append(h)
        return real(*given, h=h, **more)

    monkeypatch.setattr(shared_study, "projected_hessian", looks)
    given = ("--model", "digits_cure", "--n", "8", "--directions", "2", "--out", str(tmp_path / "a"))
    invoke(*given, *([] if step is None else ["--step", str(step)]))
    x = load_dataset("digits").subset(8).images[:4]
    near = nearest_boundary(load_model("digits_cure", precision="fp32"), x)
    expected = near.distance.numpy() if step is None else [step] * 4
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_unfinished_work_of_another_measurement_is_refused(tmp_path):
    given = ("--model", "digits_normal", "--n", "8", "--directions", "2", "--out", str(tmp_path / "a"))
    invoke(*given)
    (tmp_path / "a" / "manifest.json").unlink()
    for change in (["--step", "0.3"], ["--seed", "1"], ["--dimension", "3"], ["--learn", "3"]):
        with pytest.raises(UsageError, match="of another measurement"):
            invoke(*given, *change)


def test_unfinished_work_on_other_weights_is_refused(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, size=(8, 6, 6, 1), dtype=np.uint8)
    given = (*toy(tmp_path, monkeypatch, "weighted", WEIGHTED, x, 2), "--out", str(tmp_path / "a"))
    monkeypatch.setenv("TOY", "1")
    invoke(*given)
    (tmp_path / "a" / "manifest.json").unlink()
    monkeypatch.setenv("TOY", "2")
    with pytest.raises(UsageError, match="of another measurement"):
        invoke(*given)


def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_cure.files.INTERVAL", 0.0)
    invoke(*PAIR, "--out", str(tmp_path / "whole"))
    real, calls = shared_study.projected_hessian, []

    def stops(*given, **more):
        calls.append(1)
        if len(calls) == 9:  # three images into the second model
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(shared_study, "projected_hessian", stops)
    CliRunner().invoke(cli, ["shared", *PAIR, "--device", "cpu", "--out", str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "manifest.json").exists()
    again = []
    monkeypatch.setattr(shared_study, "projected_hessian", lambda *g, **m: again.append(1) or real(*g, **m))
    assert invoke(*PAIR, "--out", str(tmp_path / "parts")).exit_code == 0
    assert len(again) == 4
    for name in (
        "shared.csv",
        "shared-fooling.csv",
        "shared-relative.csv",
        "shared.svg",
        "shared-digits_cure.npz",
    ):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "3"], "at least 4 images"),
        (["--n", "10", "--learn", "9"], "--learn 9: of 10 images, 2 must be left"),
        (["--n", "8", "--learn", "2", "--dimension", "48"], "--learn 2: 48 shared dimensions need 5 images"),
        (["--dimension", "64"], "--dimension 64: the images have 64 inputs"),
        (["--xi", "0"], "--xi 0: must be positive"),
        (["--xi", "far"], "--xi far"),
        (["--xi", "9"], "--xi: longer than the diagonal of the images' box, 8 pixels"),
        (["--xi", "1e400"], "--xi 1e400: must be positive, from 1e-18 to 1e18"),
        (["--step", "0"], "--step 0: must be positive"),
        (["--step", "1e300"], "--step: longer than the diagonal of the images' box, 8 pixels"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke("--model", "digits_normal", *arguments, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
