"""The binarization test: does an attack find an adversarial example that is known to exist?

Source: Zimmermann, Brendel, Tramer & Carlini 2022, arXiv 2206.13991 (decision-boundary binarization).

Around an image, points strictly inside the ball get one class and one point of its border the other. A linear
rule on the network's outputs separates the two, so the ball is known to hold an adversarial example for
the network with that rule behind it. An attack that misses it would miss others too, whatever the reason.

Deviations: the rule reads the logits, not the features before them, so that what is behind the last
layer is tested as well; it is Fisher's discriminant in closed form, its threshold half-way between the
classes; problems that random points solve are left out, instead of being reported beside the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from robustbench_cure.attacks import Candidates, pgd
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.masking.evidence import Measurements
from robustbench_cure.threat import ThreatModel

#: Points inside the ball for each image, as many again to see whether chance solves the problem.
INNER = 200
#: They fill the ball up to this share of its radius.
GAP = 0.95
#: Share of the problems that an attack should solve.
SOLVED = 0.95
#: Fewest problems on which the test is decided.
FEWEST = 10


class Rule(nn.Module):
    """Two classes from logits: inside (0) and on the border (1).

    Args:
        weight: float64 (L,).
        bias: the rule is positive on the border.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = bias

    def forward(self, z: Tensor) -> Tensor:
        """(B, L) -> (B, 2), the second the score of the border."""
        score = (z.double() * self.weight).sum(1) + self.bias
        return torch.stack((torch.zeros_like(score), score), 1).float()


def separate(inner: Tensor, border: Tensor) -> Rule | None:
    """The rule between outputs of inner points (N, L) and of the border point (L,); None: there is none."""
    inner, border = inner.double(), border.double()
    mean = inner.mean(0)
    centred = inner - mean
    covariance = centred.T @ centred / len(inner)
    ridge = 1e-6 * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    weight = torch.linalg.solve(
        covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=inner.device),
        border - mean,
    )
    highest, known = float((inner @ weight).max()), float(border @ weight)
    if not known > highest or not bool(weight.isfinite().all()):
        return None
    # Scaled so that the gap is wide: float32 logits of the rule are then far from rounding.
    scale = 2.0 / (known - highest)
    return Rule(weight * scale, -scale * (known + highest) / 2)


@dataclass(frozen=True)
class Problem:
    """A ball that holds an adversarial example.

    Attributes:
        classifier: the network with a rule behind it: 0 inside the ball, 1 at one point of its border.
        threat: the ball.
        x: the image in its middle, float32 (1,C,H,W).
        y: its label, 0, int64 (1,).
        id: name of the image.
    """

    classifier: Classifier
    threat: ThreatModel
    x: Tensor
    y: Tensor
    id: str

    def solved(self, candidate: Candidates) -> bool:
        """Whether what an attack returned is an adversarial example."""
        return bool(verify(self.classifier, self.x, self.y, candidate, self.threat).broken[0])


def problems(m: Measurements) -> Iterator[Problem]:
    """The fair problems around the first images: solvable, and not by chance; the same every time."""
    generator = torch.Generator().manual_seed(m.settings.seed)
    for row in range(min(m.settings.planted, len(m))):
        x = m.x[row : row + 1]
        border = _border(m.threat, x, generator)
        points = _inside(m.threat, x, 2 * INNER, generator)
        outputs = m.classifier.logits(torch.cat((x, border, points)))
        rule = separate(torch.cat((outputs[:1], outputs[2 : 2 + INNER])), outputs[1])
        if rule is not None and not bool((rule(outputs[2 + INNER :]).argmax(1) == 1).any()):
            inside = torch.zeros(1, dtype=torch.int64, device=x.device)
            yield Problem(m.classifier.followed_by(rule, 2), m.threat, x, inside, m.ids[row])


def solved_by_pgd(m: Measurements, problem: Problem) -> bool:
    """Whether PGD on the margin, with the steps of the settings, solves a problem."""
    radius = problem.threat.radius
    candidate = pgd(
        problem.classifier,
        problem.x,
        problem.y,
        threat=problem.threat,
        steps=m.settings.steps,
        step_size=0.25 * radius,
        loss="margin",
    )
    return problem.solved(candidate)


def p_missed(solved: int, tried: int) -> float:
    """Exact one-sided p-value of solving so few, were `SOLVED` the chance of solving each."""
    return float(binomtest(solved, tried, SOLVED, alternative="less").pvalue) if tried else 1.0


def _border(threat: ThreatModel, x: Tensor, generator: torch.Generator) -> Tensor:
    """A random point of the ball's border (linf: a corner), cut by the box."""
    v = torch.randn(x.shape, generator=generator).to(x)
    v = v.sign() if threat.norm == "linf" else v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return threat.project(x, x + threat.radius * v)


def _inside(threat: ThreatModel, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform points of the ball drawn in towards the image by the gap, cut by the box."""
    shape = (count, *x.shape[1:])
    if threat.norm == "linf":
        v = torch.rand(shape, generator=generator) * 2 - 1
    else:
        v = torch.randn(shape, generator=generator)
        size = v[0].numel()
        length = torch.rand((count, 1, 1, 1), generator=generator) ** (1 / size)
        v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * length
    return (x + GAP * threat.radius * v.to(x)).clamp(0, 1)
