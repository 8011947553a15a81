"""How torchattacks, Foolbox, ART and AutoAttack run the attacks of the battery, as their documentation does.

None has a DeepFool that is confined to a ball: Foolbox's goes to the nearest boundary in linf, those of
torchattacks and ART in l2, and what they return counts where it lies in the ball. Only torchattacks has SPSA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_cure.protocol.specs import FGSM, PGD, SPSA, DeepFool

Run = Callable[[Tensor, Tensor], Tensor]
DISTRIBUTIONS = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "art": "adversarial-robustness-toolbox",
    "pyautoattack": "pyautoattack",
    "robustbench": "robustbench",
}


@dataclass(frozen=True)
class Setup:
    """What a library gets: its own copy of the network, the radius in linf, and a batch size."""

    module: nn.Module
    eps: float
    classes: int
    batch_size: int


def installed(library: str) -> str:
    """Version of a library; empty where it is not there."""
    try:
        return version(DISTRIBUTIONS.get(library, library))
    except PackageNotFoundError:
        return ""


def runner(library: str, spec: FGSM | PGD | DeepFool | SPSA, setup: Setup) -> Run | None:
    """One attack of one library, or None where it has no such attack."""
    setup = Setup(copy.deepcopy(setup.module), setup.eps, setup.classes, setup.batch_size)
    return {"torchattacks": of_torchattacks, "foolbox": of_foolbox, "art": of_art}[library](spec, setup)


def note(library: str, spec: FGSM | PGD | DeepFool | SPSA) -> str:
    """What differs from the battery's attack of that name."""
    if isinstance(spec, DeepFool):
        return "linf, to the boundary" if library == "foolbox" else "l2, to the boundary"
    if isinstance(spec, SPSA):
        return "8 images at a time, which share their directions"
    return ""


def of_torchattacks(spec: FGSM | PGD | DeepFool | SPSA, setup: Setup) -> Run | None:
    """Torchattacks."""
    import torchattacks

    size = setup.batch_size
    if isinstance(spec, FGSM):
        return batched(torchattacks.FGSM(setup.module, eps=setup.eps), size)
    if isinstance(spec, PGD):
        alpha = spec.hyper["step_size"]
        return batched(torchattacks.PGD(setup.module, eps=setup.eps, alpha=alpha, steps=spec.steps), size)
    if isinstance(spec, DeepFool):
        return batched(torchattacks.DeepFool(setup.module, steps=spec.steps, overshoot=spec.overshoot), size)
    attack = torchattacks.SPSA(
        setup.module, eps=setup.eps, delta=spec.delta, lr=spec.hyper["step_size"], nb_iter=spec.steps,
        nb_sample=spec.samples, max_batch_size=max(1, size // 8),
    )  # fmt: skip
    return batched(attack, 8)  # all images at once would be a batch of size * images


def of_foolbox(spec: FGSM | PGD | DeepFool | SPSA, setup: Setup) -> Run | None:
    """Foolbox."""
    import foolbox
    from foolbox import attacks

    attack: Any
    eps: float | None = setup.eps
    if isinstance(spec, FGSM):
        attack = attacks.LinfFastGradientAttack()
    elif isinstance(spec, PGD):
        attack = attacks.LinfPGD(abs_stepsize=spec.hyper["step_size"], steps=spec.steps, random_start=True)
    elif isinstance(spec, DeepFool):
        attack, eps = attacks.LinfDeepFoolAttack(steps=spec.steps, candidates=spec.candidates), None
    else:
        return None
    model = foolbox.PyTorchModel(setup.module, bounds=(0, 1), device=_device(setup))
    return batched(lambda x, y: attack(model, x, y, epsilons=eps)[1].detach(), setup.batch_size)


def of_art(spec: FGSM | PGD | DeepFool | SPSA, setup: Setup) -> Run | None:
    """ART; its estimators keep state, so that each run makes its own."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    if isinstance(spec, SPSA):
        return None
    common = {"batch_size": setup.batch_size}

    def run(x: Tensor, y: Tensor) -> Tensor:
        estimator = PyTorchClassifier(
            setup.module, nn.CrossEntropyLoss(), tuple(x.shape[1:]), setup.classes, clip_values=(0.0, 1.0),
            device_type="gpu" if "cuda" in _device(setup) else "cpu",
        )  # fmt: skip
        if isinstance(spec, FGSM):
            attack = evasion.FastGradientMethod(estimator, eps=setup.eps, **common)
        elif isinstance(spec, PGD):
            attack = evasion.ProjectedGradientDescentPyTorch(
                estimator, eps=setup.eps, eps_step=spec.hyper["step_size"], max_iter=spec.steps,
                num_random_init=1, verbose=False, **common,
            )  # fmt: skip
        else:
            attack = evasion.DeepFool(
                estimator, max_iter=spec.steps, epsilon=spec.overshoot, nb_grads=spec.candidates,
                verbose=False, **common,
            )  # fmt: skip
        found = attack.generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(np.asarray(found, dtype=np.float32)).to(x.device)

    return run


def batched(run: Run, size: int) -> Run:
    """For libraries that take everything at once."""
    return lambda x, y: torch.cat([run(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)])


# --- AutoAttack -----------------------------------------------------------------------------------------


def plain_autoattack(setup: Setup) -> Run:
    """AutoAttack standard, called as its documentation does."""
    from pyautoattack import AutoAttack

    whole = AutoAttack(setup.module, norm="Linf", eps=setup.eps, version="standard", device=_device(setup))
    return lambda x, y: whole.run_standard_evaluation(x, y, batch_size=setup.batch_size)[0]


def robustbench_run(setup: Setup) -> Run:
    """RobustBench's ``benchmark()``; returns the images that its AutoAttack found.

    Two things are put in its way. Its images are ours instead of CIFAR-10's downloaded ones. And RobustBench
    1.1.1 calls ``AutoAttack(log_path=)`` and ``run_standard_evaluation(bs=)``, which the package its wheel
    depends on, pyautoattack 0.2, does not take: as installed it fails, so the two calls are translated.
    """
    from pyautoattack import AutoAttack

    from robustbench_cure.interop.robustbench import import_robustbench

    import_robustbench()
    from robustbench import eval as module

    found: list[Tensor] = []

    class Translated(AutoAttack):
        def __init__(self, model: nn.Module, *, log_path: object = None, **rest: Any) -> None:
            del log_path
            super().__init__(model, **rest)

        def run_standard_evaluation(self, x: Tensor, y: Tensor, /, *, bs: int, state_path: Any) -> Tensor:
            found[:] = [super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]]
            return found[0]

    def run(x: Tensor, y: Tensor) -> Tensor:
        before = module.load_clean_dataset, module.AutoAttack
        module.load_clean_dataset, module.AutoAttack = (lambda *_: (x, y)), Translated
        try:
            module.benchmark(
                setup.module, n_examples=len(x), dataset="cifar10", threat_model="Linf", eps=setup.eps,
                batch_size=setup.batch_size, device=torch.device(_device(setup)),
            )  # fmt: skip
        finally:
            module.load_clean_dataset, module.AutoAttack = before
        return found[0]

    return run


def _device(setup: Setup) -> str:
    return str(next(setup.module.parameters()).device)
