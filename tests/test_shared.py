"""Subspaces that boundaries share: known matrices, a cylinder whose boundaries bend in three directions."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli import cli
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import shared_study
from robustbench_cure.geometry.boundary import Nearest, tangent_frame
from robustbench_cure.geometry.shared import (
    common,
    cosines,
    ends,
    most_curved,
    random_in,
    random_outside,
    relative_curvatures,
    share_inside,
)

SHAPE = (1, 4, 5)
SIZE = 20


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
    rows = ends(tangent, axes.T @ torch.diag(curvatures) @ axes, count=2)
    expected = axes[[-1, -2, 0, 1]] @ tangent
    np.testing.assert_allclose((rows * expected).sum(1).abs().numpy(), 1, atol=1e-4)
    assert float((rows @ normal).abs().max()) < 1e-5
    assert ends(tangent, torch.eye(SIZE - 1)).shape == (SIZE - 1, SIZE)  # fewer than twice ten


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


def test_draws_point_everywhere_in_their_subspace():
    basis = frame(3)
    for unit, share in (
        (random_in(basis, streams(4000), 0) @ basis.T, 1 / 3),
        (random_outside(basis, streams(4000), 0) @ frame(SIZE, seed=5).T, (SIZE - 3) / SIZE / (SIZE - 3)),
    ):
        np.testing.assert_allclose(unit.mean(0).numpy(), 0, atol=5 * (share / 4000) ** 0.5)
        assert float(unit.square().mean(0)[0]) == pytest.approx(share, rel=0.5)


class Quadric(nn.Module):
    def __init__(self, diagonal) -> None:
        super().__init__()
        self.register_buffer("diagonal", torch.tensor(diagonal))

    def forward(self, x):
        u = (x - 0.5).flatten(1)
        value = (self.diagonal * u.square()).sum(1) / 2 + 2 * u[:, 0]
        return torch.stack((torch.zeros_like(value), value), 1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_relative_curvature_is_that_of_the_tangent_part(sign):
    """The normal is the first input: what bends along it, 50, is no curvature of the boundary."""
    diagonal = [50.0] + [sign * 10.0] + [sign * 1.0] * (SIZE - 2)
    model = Classifier(Quadric(diagonal), num_classes=2, input_shape=SHAPE)
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


def invoke(*arguments: str):
    return CliRunner().invoke(cli, ["shared", *arguments, "--device", "cpu"], catch_exceptions=False)


def test_a_cylinder_gives_away_its_directions(tmp_path, monkeypatch):
    """Label 0 inside a cylinder over three directions: they hold all normals and all that is curved."""
    (tmp_path / "cylinder.py").write_text(CYLINDER)
    monkeypatch.syspath_prepend(tmp_path)
    grey = np.random.default_rng(0).integers(115, 141, size=(40, 6, 6, 1), dtype=np.uint8)
    np.savez(tmp_path / "toy.npz", x=grey, y=np.arange(40) % 3)
    model = ("--model", "cylinder:build", "--dataset", "npz", "--data-dir", str(tmp_path / "toy.npz"))
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
    invoke(*model, "--dimension", "3", "--xi", "0.05", "--n", "8", "--out", str(tmp_path / "short"))
    short = pd.read_csv(tmp_path / "short" / "shared-fooling.csv")
    assert (short["fooled"] == 0).all()  # no image is that near
    fooling = pd.read_csv(tmp_path / "a" / "shared-fooling.csv")
    assert set(fooling["m"][fooling["subspace"] == "S_c"]) == {1, 2, 3}
    assert (fooling["best"] >= fooling["fooled"]).all()
    assert set(fooling["n"]) == {25}


PAIR = ("--model", "digits_normal", "--model", "digits_cure", "--n", "12", "--directions", "5")


def test_projections_in_the_table_are_those_of_unseen_images(tmp_path):
    run = invoke(*PAIR, "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "shared.csv").set_index("model")
    from robustbench_cure import load_dataset, load_model
    from robustbench_cure.geometry.boundary import nearest_boundary

    x = load_dataset("digits").subset(12).images[6:]
    for name in table.index:
        with np.load(tmp_path / "a" / f"shared-{name}.npz") as kept:
            basis = kept["shared"]
        assert basis.shape == (4, 64)
        np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-5)
        r = (nearest_boundary(load_model(name), x).point - x).flatten(1).numpy()
        expected = (np.linalg.norm(r @ basis.T, axis=1) / np.linalg.norm(r, axis=1)).mean()
        assert table.loc[name, "adversarial"] == pytest.approx(expected, rel=1e-4)
        shift = np.gradient(x.numpy(), axis=3).reshape(6, 64)
        difference = (x - x[[5, 0, 1, 2, 3, 4]]).flatten(1).numpy()
        for kind, v in {"shift": shift, "difference": difference}.items():
            expected = (np.linalg.norm(v @ basis.T, axis=1) / np.linalg.norm(v, axis=1)).mean()
            assert table.loc[name, kind] == pytest.approx(expected, rel=1e-4)
    noise = pd.read_csv(tmp_path / "a" / "shared-noise.csv")
    assert (noise[noise["length"] == 0]["changed"] == 0).all()
    angles = pd.read_csv(tmp_path / "a" / "shared-angles.csv")
    assert set(angles["subspaces"]) == {"digits_normal, digits_cure", "random"}
    rows = [line for line in run.output.splitlines() if line.startswith(("model ", "digits_"))]
    rows = [row for row in rows if ":" not in row]
    assert max(map(len, rows)) <= 80 - len("resnet18s_deepfool") + len("digits_normal")


def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_cure.geometry.kept.INTERVAL", 0.0)
    invoke(*PAIR, "--out", str(tmp_path / "whole"))
    real, calls = shared_study.bending, []

    def stops(*given, **more):
        calls.append(1)
        if len(calls) == 9:  # three images into the second model
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(shared_study, "bending", stops)
    CliRunner().invoke(cli, ["shared", *PAIR, "--device", "cpu", "--out", str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "manifest.json").exists()
    again = []
    monkeypatch.setattr(shared_study, "bending", lambda *g, **m: again.append(1) or real(*g, **m))
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
        (["--dimension", "64"], "--dimension 64: the images have 64 inputs"),
        (["--xi", "0"], "--xi 0: must be positive"),
        (["--xi", "far"], "--xi far"),
        (["--step", "0"], "--step 0: must be positive"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke("--model", "digits_normal", *arguments, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
