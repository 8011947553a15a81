"""Speed and strength beside torchattacks, Foolbox and ART: the same model, images, budget and machine.

    python benchmarks/peers.py --model digits_pgd_at --n 200 --attacks pgd,deepfool,spsa
    python benchmarks/peers.py --model resnet18_cure --weights cure.safetensors --data cifar10.npz --n 512

Runs are interleaved (every contender once, then again), the fastest of the rounds counts. Robust accuracy
is judged here, in float32, on the tensors each library returned. torchattacks, Foolbox and ART have no
DeepFool that is confined to a ball; they run their nearest form (see the notes it prints).
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_cure.attacks import deepfool, pgd, spsa
from robustbench_cure.attacks.losses import cross_entropy, margins
from robustbench_cure.cards import ModelCard
from robustbench_cure.catalog import find
from robustbench_cure.classifier import Classifier, has_bf16, resolve_device
from robustbench_cure.datasets import EvalSet, load_dataset
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.loading import build_from_card, load_card_module
from robustbench_cure.zoo.models import automatic_batch_size

Run = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Contender:
    """One library's run of one attack."""

    library: str
    run: Run
    note: str = ""
    seconds: float = math.inf
    robust: float = float("nan")
    extra: str = ""
    share: Callable[[float], float] | None = None


def main() -> None:
    """Race the contenders of each attack and print one table an attack."""
    options = parse()
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    threat = ThreatModel.parse("linf", options.eps)
    module, data = load(options)
    x, y = data.images.to(device), data.labels.to(device)
    module = module.to(device)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    ours = Classifier(
        module, num_classes=len(data.classes), input_shape=tuple(x.shape[1:]), device=device,
        precision=precision,
    )  # fmt: skip
    ours.batch_size = options.our_batch_size or automatic_batch_size(ours)
    machine(device, ours, options)
    raw = raw_rate(ours, x[: ours.batch_size], options.seconds)
    print(f"raw forward + input gradient: {raw:,.0f} images/s (folded search form, {precision})")
    clean = accuracy(ours, x, y, x, threat)
    print(f"{options.model} on {data.name}, n = {len(x)}, clean accuracy {clean:.1%}, {threat}")
    for name in options.attacks.split(","):
        contenders = ATTACKS[name](options, ours, module, threat, raw, len(data.classes))
        race(contenders, ours, x, y, threat, options)
        table(name, contenders, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits_pgd_at", help="id of a model card")
    parser.add_argument("--weights", type=Path, help=".safetensors, instead of the card's")
    parser.add_argument("--untrained", action="store_true", help="random weights: speed alone, no verdicts")
    parser.add_argument("--data", type=Path, help=".npz file or image folder; default: the card's data set")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128, help="of the peers; try several")
    parser.add_argument("--our-batch-size", type=int, default=0, help="0: automatic, as in an evaluation")
    parser.add_argument("--attacks", default="pgd,deepfool,spsa")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--steps", type=int, default=20, help="PGD steps of eps/4")
    parser.add_argument("--spsa-steps", type=int, default=10)
    parser.add_argument("--spsa-samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for the raw rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--skip", default="", help="libraries to leave out, such as art,torchattacks")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[nn.Module, EvalSet]:
    """The network in evaluation mode, and the images."""
    found = find(ModelCard, options.model)
    if options.untrained:
        torch.manual_seed(0)
        module: nn.Module = build_from_card(found.card).eval()
    else:
        module, _ = load_card_module(found, options.weights)
    if options.data is None:
        data = load_dataset(found.card.dataset)
    else:
        data = load_dataset("npz" if options.data.suffix == ".npz" else "folder", "test", options.data)
    return module, data.subset(min(options.n, len(data)))


def machine(device: torch.device, ours: Classifier, options: argparse.Namespace) -> None:
    """Print what the figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        name = str(capabilities.get("cpu_name") or platform.processor() or platform.machine())
    print(f"{name}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads")
    packages = ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox", "robustbench-cure")
    print(", ".join(f"{package} {installed(package)}" for package in packages))
    folded = "folded" if ours.folded else "not folded"
    print(
        f"ours: search in {ours.precision}, {folded}, batch {ours.batch_size}; "
        f"peers: float32, batch {options.batch_size}"
    )


def installed(package: str) -> str:
    """Version of a package, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def raw_rate(classifier: Classifier, x: Tensor, seconds: float) -> float:
    """Images a second through one forward pass and its input gradient: what no gradient attack exceeds."""
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def once() -> float:
        start = time.perf_counter()
        classifier.value_and_gradient(x, lambda z: cross_entropy(z, labels))
        synchronise(x.device)
        return time.perf_counter() - start

    once()
    deadline, best = time.perf_counter() + seconds, math.inf
    while time.perf_counter() < deadline:
        best = min(best, once())
    return len(x) / best


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def accuracy(classifier: Classifier, x: Tensor, y: Tensor, x_adv: Tensor, threat: ThreatModel) -> float:
    """Share of all images classified correctly, clean and perturbed; infeasible images are no attack."""
    feasible = threat.contains(x, x_adv)
    feasible &= ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    lost = feasible & (margins(classifier.logits(x_adv), y) < 0)
    right = margins(classifier.logits(x), y) >= 0
    return float((right & ~lost).float().mean())


# --- contenders --------------------------------------------------------------------------------------


def batched(run: Run, size: int) -> Run:
    """For libraries that take everything at once."""
    return lambda x, y: torch.cat([run(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)])


def only_correct(classifier: Classifier, run: Run) -> Run:
    """As the evaluation does: images already misclassified are not attacked."""

    def wrapped(x: Tensor, y: Tensor) -> Tensor:
        right = margins(classifier.logits(x), y) >= 0
        x_adv = x.clone()
        x_adv[right] = run(x[right], y[right])
        return x_adv

    return wrapped


def foolbox_attack(module: nn.Module, attack: Callable[..., Any], eps: float | None) -> Run:
    """A Foolbox attack; ``eps`` None: to the boundary."""
    import foolbox

    model = foolbox.PyTorchModel(module, bounds=(0, 1), device=next(module.parameters()).device)
    return lambda x, y: attack(model, x, y, epsilons=eps)[1].detach()


def art_attack(module: nn.Module, classes: int, make: Callable[..., object], size: int) -> Run:
    """An ART attack, made anew for each run: its estimators keep state."""
    from art.estimators.classification import PyTorchClassifier

    device = next(module.parameters()).device

    def run(x: Tensor, y: Tensor) -> Tensor:
        estimator = PyTorchClassifier(
            module, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )  # fmt: skip
        attack = make(estimator, size)
        x_adv = attack.generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(np.asarray(x_adv, dtype=np.float32)).to(x.device)

    return run


def pgd_contenders(options, ours, module, threat, raw, classes) -> list[Contender]:
    """PGD, all four libraries."""
    eps, steps, size = threat.radius, options.steps, options.batch_size
    state: dict[str, float] = {}

    def mine(x: Tensor, y: Tensor) -> Tensor:
        proposal = pgd(ours, x, y, threat=threat, steps=steps, step_size=eps / 4)
        state["visits"] = float(proposal.backwards.sum())
        return proposal.x_adv

    note = "leaves a row at its first success"
    first = Contender("ours", only_correct(ours, mine), note, share=lambda s: state["visits"] / s / raw)
    contenders = [first]
    if wanted("torchattacks", options):
        import torchattacks

        attack = torchattacks.PGD(copy.deepcopy(module), eps=eps, alpha=eps / 4, steps=steps)
        contenders.append(Contender("torchattacks", batched(attack, size)))
    if wanted("foolbox", options):
        from foolbox.attacks import LinfPGD

        attack = LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=True)
        contenders.append(
            Contender("foolbox", batched(foolbox_attack(copy.deepcopy(module), attack, eps), size))
        )
    if wanted("art", options):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch

        def make(estimator: object, size: int) -> object:
            return ProjectedGradientDescentPyTorch(
                estimator, eps=eps, eps_step=eps / 4, max_iter=steps, num_random_init=1, batch_size=size,
                verbose=False,
            )  # fmt: skip

        contenders.append(Contender("art", art_attack(copy.deepcopy(module), classes, make, size)))
    return contenders


def deepfool_contenders(options, ours, module, threat, raw, classes) -> list[Contender]:
    """DeepFool in each library's nearest form."""
    del raw
    size = options.batch_size

    def mine(x: Tensor, y: Tensor) -> Tensor:
        return deepfool(ours, x, y, threat=threat, mode="bounded").x_adv

    def to_boundary(x: Tensor, y: Tensor) -> Tensor:
        return deepfool(ours, x, y, threat=threat, mode="minimal").x_adv

    contenders = [
        Contender("ours", only_correct(ours, to_boundary), "linf, to the boundary; counts if within eps"),
        Contender("ours", only_correct(ours, mine), f"inside the ball, {threat}: does more, finds more"),
    ]
    if wanted("foolbox", options):
        from foolbox.attacks import LinfDeepFoolAttack

        run = foolbox_attack(copy.deepcopy(module), LinfDeepFoolAttack(steps=50, candidates=10), None)
        contenders.append(
            Contender("foolbox", batched(run, size), "linf, to the boundary; counts if within eps")
        )
    if wanted("torchattacks", options):
        import torchattacks

        attack = torchattacks.DeepFool(copy.deepcopy(module), steps=50, overshoot=0.02)
        note = "l2 alone, to the boundary: its linf size decides; image by image"
        contenders.append(Contender("torchattacks", batched(attack, size), note))
    if wanted("art", options):
        from art.attacks.evasion import DeepFool

        def make(estimator: object, size: int) -> object:
            return DeepFool(estimator, max_iter=50, epsilon=0.02, nb_grads=10, batch_size=size, verbose=False)

        note = "l2 alone, to the boundary: its linf size decides"
        contenders.append(Contender("art", art_attack(copy.deepcopy(module), classes, make, size), note))
    return contenders


def spsa_contenders(options, ours, module, threat, raw, classes) -> list[Contender]:
    """SPSA, which Foolbox and ART do not have."""
    del raw, classes
    steps, samples, eps = options.spsa_steps, options.spsa_samples, threat.radius

    def mine(x: Tensor, y: Tensor) -> Tensor:
        return spsa(ours, x, y, threat=threat, steps=steps, samples=samples).x_adv

    contenders = [Contender("ours", only_correct(ours, mine), "leaves a row at its first success")]
    if wanted("torchattacks", options):
        import torchattacks

        attack = torchattacks.SPSA(
            copy.deepcopy(module), eps=eps, delta=0.01, lr=0.01, nb_iter=steps, nb_sample=samples,
            max_batch_size=max(1, options.batch_size // 8),
        )  # fmt: skip
        note = "8 images at a time; they share their random directions"
        contenders.append(Contender("torchattacks", batched(attack, 8), note))
    return contenders


ATTACKS = {"pgd": pgd_contenders, "deepfool": deepfool_contenders, "spsa": spsa_contenders}


def wanted(library: str, options: argparse.Namespace) -> bool:
    """Whether a library is installed and not left out."""
    package = {"art": "adversarial-robustness-toolbox"}.get(library, library)
    return library not in options.skip.split(",") and installed(package) != "(not installed)"


# --- the race ----------------------------------------------------------------------------------------


def race(contenders, ours, x, y, threat, options) -> None:
    """Run everyone once a round; keep the fastest time of each and the last verdict."""
    for number in range(options.rounds):
        for contender in contenders:
            torch.manual_seed(number)
            np.random.seed(number)  # ART draws from the global generator
            synchronise(x.device)
            start = time.perf_counter()
            x_adv = contender.run(x, y)
            synchronise(x.device)
            seconds = time.perf_counter() - start
            contender.robust = accuracy(ours, x, y, x_adv.detach().float(), threat)
            if seconds < contender.seconds:
                contender.seconds = seconds
                if contender.share is not None:
                    contender.extra = f"{contender.share(seconds):.0%} of the raw rate"


def table(name: str, contenders: list[Contender], options: argparse.Namespace) -> None:
    """Print one attack's result."""
    peers = [c.seconds for c in contenders if c.library != "ours"]
    title = {
        "pgd": f"PGD({options.steps}), random start, step eps/4",
        "deepfool": "DeepFool, at most 50 iterations, 10 candidates, overshoot 0.02",
        "spsa": f"SPSA, {options.spsa_steps} steps of {options.spsa_samples} samples",
    }[name]
    print(f"\n{title}\n{'library':14}{'seconds':>9}{'speed-up':>10}{'robust':>9}   notes")
    fastest = min(peers, default=float("nan"))
    for c in contenders:
        note = "; ".join(part for part in (c.extra, c.note) if part)
        print(f"{c.library:14}{c.seconds:9.2f}{fastest / c.seconds:9.2f}x{c.robust:9.1%}   {note}")
    print("speed-up: over the fastest peer")


if __name__ == "__main__":
    main()
