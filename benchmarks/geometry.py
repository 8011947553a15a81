"""Speed of the curvature tools: share of the raw gradient rate, and peers on the same images in the same run.

Dense: the profile's gradients against the raw float32 forward-and-input-gradient rate of the same network,
and against `torch.autograd.functional.hessian`, the Hessian at the point itself. Lanczos: the same
number of products an image, ours for all images together, PyHessian's way one image after the other.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustbench_cure import load_dataset, load_model
from robustbench_cure.geometry.hessian import columns, spectrum
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import Space, normalised_space


def main() -> None:
    """Time everything and print one row each."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    classifier = load_model(options.model, device=options.device, weights=options.weights)
    space = normalised_space(classifier)
    shape, classes = classifier.input_shape, classifier.num_classes
    if options.data is None:
        data = load_dataset("digits").subset(options.images)
        images, labels = data.images, data.labels
    else:
        data = load_dataset("npz", "test", options.data).subset(options.images)
        images, labels = data.images, data.labels
    if tuple(images.shape[1:]) != shape or int(labels.max()) >= classes:
        raise SystemExit(f"{options.model} takes images of shape {shape}")
    u, y = space.inputs(images), labels.to(space.network.device)
    d = u[0].numel()
    print(
        f"{options.model}, d = {d}, batch {space.network.batch_size}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {space.network.device}"
    )
    raw = rate(lambda: raw_gradients(space, u[:1], y[:1]), space.network.batch_size, options.seconds)
    count = min(d, 4 * space.network.batch_size)
    basis = torch.eye(d, device=u.device)[:count]
    ours = rate(lambda: columns(space, u[0], y[0], basis, 1.5), count, options.seconds)
    print(f"raw gradients          {raw:9.0f} /s")
    print(f"columns of the Hessian {ours:9.0f} /s   {100 * ours / raw:.0f} % of raw")
    dense = timed(lambda: spectrum(space, u[0], y[0], h=1.5).values)
    print(f"profile of one image   {dense:9.2f} s    {d / dense:.0f} gradients/s with its eigenvalues")
    if options.hessian:
        exact = timed(lambda: autograd_hessian(space, u[0], y[0]))
        print(f"autograd.functional.hessian {exact:4.1f} s    {exact / dense:.1f}x ours")
    together = timed(lambda: lanczos(space, u, y, h=1.5, iterations=options.iterations))
    single = timed(lambda: [one_by_one(space, a, b, options.iterations) for a, b in zip(u, y, strict=True)])
    print(
        f"Lanczos, {len(u)} images    {together:9.2f} s    "
        f"one by one {single:.2f} s, {single / together:.1f}x ours"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits_cure")
    parser.add_argument("--weights")
    parser.add_argument("--data", help=".npz; default: digits")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--hessian", action="store_true", help="also time autograd's, which may take minutes")
    return parser.parse_args()


def raw_gradients(space: Space, u: Tensor, y: Tensor) -> None:
    """One full batch, forward and backward."""
    n = space.network.batch_size
    space.gradients(u.expand(n, *u.shape[1:]).contiguous(), y.expand(n))


def rate(work: object, amount: int, seconds: float) -> float:
    """Things a second, of the fastest run."""
    best, deadline = float("inf"), time.perf_counter() + seconds
    work()  # type: ignore[operator]
    while time.perf_counter() < deadline:
        best = min(best, timed(work))
    return amount / best


def timed(work: object) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    work()  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def autograd_hessian(space: Space, u: Tensor, y: Tensor) -> Tensor:
    """The Hessian by autograd: one double backward pass an input."""
    module = space.network.module

    def loss(flat: Tensor) -> Tensor:
        return cross_entropy(module(flat.view(1, *u.shape)), y[None])

    hessian: Tensor = torch.autograd.functional.hessian(loss, u.flatten())
    return hessian


def one_by_one(space: Space, u: Tensor, y: Tensor, iterations: int) -> float:
    """Largest Ritz value of one image from exact products, in the manner of PyHessian."""
    module = space.network.module
    leaf = u[None].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(module(leaf), y[None]), leaf, create_graph=True)
    q = torch.randn_like(leaf)
    basis, alphas, betas = [q / q.norm()], [], []
    for _ in range(iterations):
        (product,) = torch.autograd.grad(gradient, leaf, basis[-1], retain_graph=True)
        alphas.append(float((product * basis[-1]).sum()))
        for known in basis:
            product = product - (product * known).sum() * known
        length = float(product.norm())
        if length < 1e-10:
            break
        betas.append(length)
        basis.append(product / length)
    size = len(alphas)
    matrix = torch.diag(torch.tensor(alphas))
    for k in range(size - 1):
        matrix[k, k + 1] = matrix[k + 1, k] = betas[k]
    return float(torch.linalg.eigvalsh(matrix)[-1])


if __name__ == "__main__":
    main()
