"""Curvature and its bounds against quadratics, linear networks and exact solutions."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustbench_cure.adapt import Normalised
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry import lanczos as lanczos_module
from robustbench_cure.geometry.bounds import bounds, exact_distance
from robustbench_cure.geometry.hessian import (
    DENSE_EIGENVECTORS,
    alignment,
    along_sign,
    columns,
    frobenius,
    random_basis,
    spectrum,
)
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import normalised_space


class Quadratic:
    """l(u) = u'Au/2 + b'u for every row: gradients are Au + b, whatever the step."""

    def __init__(self, d: int, *, batch_size: int = 7, seed: int = 0, rank: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(d, d, generator=generator, dtype=torch.float64)
        values = torch.randn(d, generator=generator, dtype=torch.float64)
        if rank is not None:
            values[rank:] = 0
        q = torch.linalg.qr(root)[0]
        self.A = (q * values) @ q.T
        self.b = torch.randn(d, generator=generator, dtype=torch.float64)
        self.network = SimpleNamespace(batch_size=batch_size)
        self.sizes = []

    def gradients(self, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(u))
        return (u.flatten(1).double() @ self.A + self.b).float().view_as(u)


def points(n: int, d: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, 1, 1, d), generator=generator), torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("h", [0.1, 1.5, 10.0])
@pytest.mark.parametrize("basis", [None, "random"])
def test_the_profile_of_a_quadratic_is_its_spectrum_for_every_step(h, basis):
    space = Quadratic(20)
    u, y = points(2, 20)
    rotation = random_basis(20, 3, torch.device("cpu")) if basis else None
    for row, label in zip(u, y, strict=True):
        found = spectrum(space, row, label, h=h, basis=rotation).values
        assert torch.allclose(found.double(), torch.linalg.eigvalsh(space.A).flip(0), atol=2e-4 / min(h, 1))
    assert max(space.sizes) == 7
    count = []
    spectrum(space, u[0], y[0], h=h, advance=count.append)
    assert sum(count) == 20


def test_a_random_basis_is_a_rotation_fixed_by_its_seed():
    q = random_basis(30, 0, torch.device("cpu"))
    assert torch.allclose(q @ q.T, torch.eye(30), atol=1e-5)
    assert torch.equal(q, random_basis(30, 0, torch.device("cpu")))
    assert not torch.equal(q, random_basis(30, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"must be \(20, 20\)"):
        spectrum(Quadratic(20), *(t[0] for t in points(1, 20)), h=1.0, basis=q)


def test_an_operator_that_is_not_symmetric_is_symmetrised():
    space = Quadratic(12)
    skew = torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    symmetric = space.A.clone()
    space.A = space.A + (skew - skew.T)
    u, y = points(1, 12)
    found = spectrum(space, u[0], y[0], h=1.0).values
    assert torch.allclose(found.double(), torch.linalg.eigvalsh(symmetric).flip(0), atol=1e-4)
    ends = lanczos(space, u, y, h=1.0, iterations=12)
    assert ends.largest[0] == pytest.approx(float(torch.linalg.eigvalsh(symmetric)[-1]), abs=1e-4)


@pytest.mark.parametrize("iterations", [40, 60, 100])
def test_lanczos_finds_both_ends_and_the_top_vector(iterations):
    space = Quadratic(60, seed=2)
    u, y = points(5, 60)
    ends = lanczos(space, u, y, h=1.5, iterations=iterations)
    values, vectors = torch.linalg.eigh(space.A)
    tolerance = 1e-4 if iterations >= 60 else 0.02
    assert torch.allclose(ends.largest, values[-1].expand(5), atol=tolerance)
    assert torch.allclose(ends.smallest, values[0].expand(5), atol=tolerance)
    gradient = u.flatten(1).double() @ space.A + space.b
    expected = (gradient @ vectors[:, -1]).abs() / gradient.norm(dim=1)
    if iterations >= 60:
        cosine = (ends.vector.flatten(1).double() @ vectors[:, -1]).abs()
        assert torch.allclose(cosine, torch.ones(5, dtype=torch.float64), atol=1e-4)
        assert torch.allclose(ends.alignment, expected, atol=1e-3)
    assert torch.allclose(ends.gradient.flatten(1).double(), gradient, atol=1e-4)


def test_lanczos_on_a_matrix_of_low_rank_ends_early_and_is_right():
    space = Quadratic(40, seed=4, rank=3)
    u, y = points(4, 40)
    ends = lanczos(space, u, y, h=1.0, iterations=30)
    values = torch.linalg.eigvalsh(space.A)
    assert torch.allclose(ends.largest, values[-1].expand(4), atol=1e-3)
    assert torch.allclose(ends.smallest, values[0].expand(4), atol=1e-3)


def test_directions_that_were_never_taken_do_not_count_as_eigenvalue_zero():
    space = Quadratic(10)
    space.A = 2 * torch.eye(10, dtype=torch.float64)
    u, y = points(3, 10)
    ends = lanczos(space, u, y, h=1.0, iterations=6)
    assert torch.allclose(ends.smallest, torch.full((3,), 2.0, dtype=torch.float64), atol=1e-4)


def test_the_largest_eigenvalue_is_not_the_one_of_largest_magnitude():
    space = Quadratic(15, seed=6)
    values, vectors = torch.linalg.eigh(space.A)
    values = torch.linspace(-5, 1, 15, dtype=torch.float64)
    space.A = (vectors * values) @ vectors.T
    u, y = points(2, 15)
    ends = lanczos(space, u, y, h=1.0, iterations=15)
    assert torch.allclose(ends.largest, torch.ones(2, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(ends.smallest, torch.full((2,), -5.0, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("basis", [None, "random"])
@pytest.mark.parametrize("d", [20, DENSE_EIGENVECTORS + 10])
def test_the_top_eigenvector_comes_from_the_whole_matrix(d, basis):
    space = Quadratic(d, batch_size=100, seed=3)
    vectors = torch.linalg.eigh(space.A)[1]
    values = torch.linspace(-5, 1, d, dtype=torch.float64)  # the largest is not that of largest magnitude
    values[-1] += 1
    space.A = (vectors * values) @ vectors.T
    u, y = points(1, d)
    rotation = random_basis(d, 3, torch.device("cpu")) if basis else None
    found = spectrum(space, u[0], y[0], h=1.5, basis=rotation)
    values, vectors = torch.linalg.eigh(space.A)
    assert float(found.values[0]) == pytest.approx(float(values[-1]), abs=1e-3)
    assert float((found.vector.flatten().double() @ vectors[:, -1]).abs()) == pytest.approx(1, abs=1e-3)
    gradient = u.flatten(1).double() @ space.A + space.b
    expected = float((gradient @ vectors[:, -1]).abs() / gradient.norm())
    assert float(alignment(gradient, found.vector[None])) == pytest.approx(expected, abs=2e-3)


def test_a_gradient_of_nothing_points_nowhere():
    gradient = torch.tensor([[3.0, 4.0], [1e-20, 0.0], [0.0, 0.0]])
    found = alignment(gradient, torch.tensor([[2.0, 0.0]]).expand(3, 2))
    assert float(found[0]) == pytest.approx(0.6)
    assert found.isnan().tolist() == [False, True, True]
    space = Quadratic(6)
    space.A, space.b = space.A * 0, space.b * 0
    u, y = points(2, 6)
    for start in ("random", "gradient"):
        ends = lanczos(space, u, y, h=1.0, iterations=4, start=start)
        assert ends.largest.tolist() == ends.smallest.tolist() == [0, 0]
        assert ends.alignment.isnan().all()


def test_lanczos_works_on_as_many_images_as_memory_holds(monkeypatch):
    space = Quadratic(30, seed=2)
    u, y = points(5, 30)
    whole = lanczos(space, u, y, h=1.5, iterations=8)
    space.sizes.clear()
    monkeypatch.setattr(lanczos_module, "MEMORY", 2 * (2 * 8 * 8 * 30))
    parts = lanczos(space, u, y, h=1.5, iterations=8)
    assert max(space.sizes) == 2
    for name in ("largest", "smallest", "vector", "alignment", "projected"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-5), name


def test_the_loss_of_a_confident_row_keeps_the_direction_of_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(50, 10) * 3
    logits[:, 4] += torch.linspace(0, 60, 50)  # losses down to 1e-28
    labels = torch.full((50,), 4)
    leaf, exact = logits.clone().requires_grad_(True), logits.double().requires_grad_(True)
    found, wanted = cross_entropy(leaf, labels), nn.functional.cross_entropy(exact, labels, reduction="none")
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    # softmax minus one-hot, the last as minus the sum of the others: 1 - p_y has no digits in float64 either
    expected = logits.double().softmax(1)
    expected[:, 4] = 0
    expected[:, 4] = -expected.sum(1)
    assert torch.allclose(gradient.double() / expected, torch.ones(50, 10, dtype=torch.float64), rtol=1e-4)


def test_the_frobenius_norm_and_the_product_along_the_sign():
    space = Quadratic(40)
    u, y = points(3, 40)
    exact = float(space.A.norm())
    found = frobenius(space, u, y, h=1.5, directions=4000)
    assert torch.allclose(found, torch.full((3,), exact), rtol=0.03)
    assert torch.equal(
        frobenius(space, u, y, h=1.5, directions=5), frobenius(space, u, y, h=1.5, directions=5)
    )
    noise = Noise.for_samples(1, "frobenius", ["a", "b", "c"])
    whole = frobenius(space, u, y, h=1.5, directions=5, noise=noise)
    rows = torch.tensor([2, 0])  # what a row draws does not depend on its neighbours
    assert torch.allclose(
        frobenius(space, u[rows], y[rows], h=1.5, directions=5, noise=noise[rows]), whole[rows], rtol=1e-5
    )
    gradient = u.flatten(1).double() @ space.A + space.b
    z = gradient.sign() / math.sqrt(40)
    assert torch.allclose(along_sign(space, u, y, h=0.7).double(), (z @ space.A).norm(dim=1), rtol=1e-4)


def linear_model(mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7)) -> tuple[Classifier, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    model = Normalised(net, mean, std) if mean else net
    classifier = Classifier(model, num_classes=5, input_shape=(3, 2, 2), precision="fp32", batch_size=6)
    return classifier, net[1].weight.detach().double()


def test_the_hessian_of_linear_logits_in_normalised_units():
    classifier, weight = linear_model()
    space = normalised_space(classifier)
    assert space.name == "norm"
    x = torch.rand((1, 3, 2, 2))
    u = space.inputs(x)
    expected = (x - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.allclose(u, expected)
    p = (weight @ u.flatten().double()).softmax(0)
    hessian = weight.T @ (torch.diag(p) - p[:, None] * p[None]) @ weight
    y = torch.tensor([2])
    found = columns(space, u[0], y[0], torch.eye(12), 0.01)
    assert torch.allclose(found.double(), hessian, atol=2e-3 * float(hessian.norm()))
    values = spectrum(space, u[0], y[0], h=0.01).values
    # Rank L - 1 at most, and none negative: what is below stems from the finite step.
    assert (values[4:].abs() < 1e-2 * values[0]).all()
    assert values[3] > 0
    assert float(space.losses(u, y)) == pytest.approx(float(-p.log()[2]), rel=1e-4)


def test_both_forms_agree_where_a_network_is_smooth_within_the_step():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    classifier = Classifier(net, num_classes=5, input_shape=(3, 2, 2), precision="fp32", batch_size=6)
    space = normalised_space(classifier)
    u, y = torch.rand((6, 3, 2, 2)), torch.arange(6) % 5
    ends = lanczos(space, u, y, h=0.005, iterations=12)
    exact = torch.func.hessian(lambda v, t: nn.functional.cross_entropy(net(v[None]), t[None]))
    for row in range(6):
        found = spectrum(space, u[row], y[row], h=0.005)
        values = torch.linalg.eigvalsh(exact(u[row], y[row]).view(12, 12).detach()).flip(0)
        tolerance = 0.02 * float(values.abs().max())
        assert torch.allclose(found.values, values, atol=tolerance)
        assert float(ends.largest[row]) == pytest.approx(float(values[0]), abs=tolerance)
        assert float(ends.smallest[row]) == pytest.approx(float(values[-1]), abs=tolerance)
        gradient = space.gradients(u[row, None], y[row, None])
        assert float(ends.alignment[row]) == pytest.approx(
            float(alignment(gradient, found.vector[None])), abs=0.03
        )


def test_a_network_that_normalises_inside_is_measured_in_pixels():
    classifier, _ = linear_model(mean=())
    space = normalised_space(classifier)
    x = torch.rand((2, 3, 2, 2))
    assert space.name == "px01"
    assert torch.equal(space.inputs(x), x)


# --- Theorem 1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nu", "lower", "upper"),
    [
        (0, 1, 2),
        (0.5, 0.8284, 1.2361),
        (1, 0.7321, 1.0),
        (2, 0.6180, 0.7808),
        (4, 0.5, 0.5931),
        (8, 0.3904, 0.4414),
        (10, 0.3583, 0.4),
    ],
)
def test_the_bounds_of_figure_4(nu, lower, upper):
    one, half = torch.tensor([1.0]), torch.tensor([0.5])
    found = bounds(one, one, half, torch.tensor([float(nu)]))
    assert float(found.lower) == pytest.approx(lower, abs=5e-5)
    assert float(found.upper) == pytest.approx(upper, abs=5e-5)
    assert float(found.simple_lower) == pytest.approx(1 - 2 * nu)
    assert float(found.simple_upper) == 2


def test_the_bounds_hold_for_the_exact_solution_and_meet_along_the_eigenvector():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        hessian, g = root + root.T, torch.randn(5, generator=generator, dtype=torch.float64)
        c = float(torch.rand(1, generator=generator) * 3 + 0.05)
        values, vectors = torch.linalg.eigh(hessian)
        if values[-1] <= 0:
            continue
        if trial % 4 == 0:
            g = vectors[:, -1] * 1.3
        exact = exact_distance(c, g, hessian)
        r = torch.randn((20000, 5), generator=generator, dtype=torch.float64)
        r = r / r.norm(dim=1, keepdim=True) * exact
        reached = r @ g + ((r @ hessian) * r).sum(1) / 2
        assert reached.max() <= c + 1e-9  # nowhere on the sphere beyond the threshold ...
        assert reached.max() > c - 0.35 * c - 0.1  # ... and close to it somewhere
        found = bounds(
            torch.tensor([c], dtype=torch.float64), g.norm()[None], (g @ vectors[:, -1])[None], values[-1:]
        )
        chain = [
            found.simple_lower,
            found.lower,
            torch.tensor([exact], dtype=torch.float64),
            found.upper,
            found.simple_upper,
        ]
        for a, b in pairwise(chain):
            assert float(a) <= float(b) * (1 + 1e-9) + 1e-12
        if trial % 4 == 0:
            assert float(found.lower) == pytest.approx(float(found.upper))
            assert exact == pytest.approx(float(found.lower), rel=1e-6)


def test_the_exact_solution_where_it_is_known():
    eye = torch.eye(3, dtype=torch.float64)
    g = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    assert exact_distance(1.5, g, 0 * eye) == pytest.approx(0.75)  # a plane
    assert exact_distance(2.5, g, eye) == pytest.approx(1.0)  # 2 s + s^2/2 = 2.5
    bowl = torch.diag(torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64))
    flat = torch.zeros(3, dtype=torch.float64)
    assert exact_distance(2.0, flat, bowl) == pytest.approx(1.0)  # no slope at all: sqrt(2 c / nu)
    assert exact_distance(5.0, flat, -eye) == math.inf  # never reached


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_the_exact_solution_does_not_depend_on_the_unit_of_the_loss(scale):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        g = torch.randn(5, generator=generator, dtype=torch.float64)
        exact = exact_distance(0.7, g, root + root.T)
        assert exact_distance(0.7 * scale, g * scale, (root + root.T) * scale) == pytest.approx(exact)


def test_the_exact_solution_lies_in_the_krylov_space_of_the_gradient():
    space = Quadratic(40, seed=7)
    u, y = points(3, 40)
    gradient = u.flatten(1).double() @ space.A + space.b
    for iterations, tolerance in ((40, 1e-4), (15, 1e-2)):
        ends = lanczos(space, u, y, h=1.5, iterations=iterations, start="gradient")
        for row in range(3):
            slope = torch.zeros(iterations, dtype=torch.float64)
            slope[0] = gradient[row].norm()
            inside = exact_distance(2.0, slope, ends.projected[row])
            exact = exact_distance(2.0, gradient[row], space.A)
            assert inside == pytest.approx(exact, rel=tolerance)
            assert inside > exact * (1 - 1e-4)  # a part of the space: never shorter


def test_bounds_do_not_apply_beyond_the_threshold_or_without_slope_and_curvature():
    one = torch.tensor([1.0, -0.1, 1.0, 1.0])
    found = bounds(one, torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones(4), torch.tensor([1.0, 1, 1, -1]))
    assert found.lower.isnan().tolist() == [False, True, True, True]
    tiny = bounds(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([1e-14]))
    assert float(tiny.lower) == pytest.approx(1 / 3, rel=1e-12)
    steep = bounds(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([4.0]))
    assert float(steep.upper) == pytest.approx(1.0)
    assert float(steep.simple_upper) == math.inf
