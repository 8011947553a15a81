"""Checks that compare what attacks did, image by image. A finished record suffices for them.

Sources: the CURE paper, section 4 and figure 7 (A); Carlini et al. 2019, arXiv 1902.06705, and Athalye,
Carlini & Wagner 2018, arXiv 1802.00420 (F, G, H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from scipy.stats import binomtest
from torch import Tensor

from robustbench_cure.masking.finding import LEVEL, MOST_IDS, Finding

#: A margin that much lower counts as lower, in logits, and the share of points that may be (spec of Fig. 7).
LOWER, LOWER_SHARE = 0.5, 0.05
#: Share of the images that one weak attack may break alone; more is raised where the exact test is sure.
ALONE_SHARE = 0.01


class Ended(Protocol):
    """Where an attack ended, image by image."""

    @property
    def margin(self) -> Tensor:
        """J there, (m,)."""

    @property
    def broken(self) -> Tensor:
        """Judged, bool (m,)."""


class Compared(Protocol):
    """Outcomes of attacks on the same m images: fresh ones (`Evidence`) or those of a record."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the images."""

    @property
    def clean_margin(self) -> Tensor:
        """J of the images themselves, (m,)."""

    @property
    def white_box_margin(self) -> Tensor:
        """The lowest margin that PGD ended with, (m,)."""

    @property
    def white_box_broken(self) -> Tensor:
        """Images that an attack with gradients broke, bool (m,)."""

    @property
    def iterated_broken(self) -> Tensor:
        """Images that PGD broke, bool (m,)."""

    @property
    def fgsm(self) -> Ended:
        """FGSM."""

    @property
    def random(self) -> Ended:
        """Uniform noise."""

    @property
    def spsa(self) -> Ended:
        """SPSA."""


def scatter(e: Compared) -> Finding:
    """A: SPSA against PGD, sample by sample: does the gradient-free search end lower?"""
    white, black = e.white_box_margin, e.spsa.margin
    count = int((black < white).sum())
    pairs = count + int((black > white).sum())
    p = sign_test(count, pairs)
    # Margins have no natural unit: half a logit, where logits are of order ten, is a share of their spread.
    far = black < white - LOWER * float(e.clean_margin.median().clamp_min(1e-30)) / 10
    share = share_of(far)
    evidence = (
        f"SPSA ended lower than PGD on {count} of {len(e.ids)} images (sign test p = {p:.2g}), "
        f"clearly lower on {int(far.sum())}"
    )
    raised = share > LOWER_SHARE and p < LEVEL
    return finding("A", "scatter", raised, share, LOWER_SHARE, evidence, e.ids, far, p=p)


def single_step(e: Compared) -> Finding:
    """F: did one step break what many did not?"""
    return alone("F", "single step", "FGSM", "PGD", e.fgsm.broken & ~e.iterated_broken, e.ids)


def random_noise(e: Compared) -> Finding:
    """G: did random points of the ball break what gradients did not?"""
    broken = e.random.broken & ~e.white_box_broken
    return alone("G", "random noise", "random noise", "gradients", broken, e.ids)


def share_of(rows: Tensor) -> float:
    """Share of the rows that are true; exact, so that a threshold is met where it is met."""
    return int(rows.sum()) / max(1, len(rows))


def sign_test(lower: int, pairs: int) -> float:
    """Exact one-sided p-value of that many lower ones among pairs that would be even coin tosses."""
    return float(binomtest(lower, pairs, alternative="greater").pvalue) if pairs else 1.0


def alone(letter: str, check: str, weak: str, strong: str, broken: Tensor, ids: Sequence[str]) -> Finding:
    """A finding about images that only the weak attack broke: raised where they are surely too many."""
    count, n = int(broken.sum()), len(ids)
    p = float(binomtest(count, n, ALONE_SHARE, alternative="greater").pvalue) if n else 1.0
    evidence = f"{count} of {n} images were broken by {weak} and not by {strong}"
    share = count / max(1, n)
    return finding(letter, check, p < LEVEL, share, ALONE_SHARE, evidence, ids, broken, p=p)


def finding(
    letter: str,
    check: str,
    raised: bool,
    value: float,
    threshold: float,
    evidence: str,
    ids: Sequence[str],
    rows: Tensor | None = None,
    *,
    beyond: Literal[">", "<"] = ">",
    p: float | None = None,
) -> Finding:
    """A finding, with the ids of its rows where it is raised."""
    chosen = [] if rows is None or not raised else rows.nonzero().squeeze(1).tolist()
    return Finding(
        letter=letter,
        check=check,
        status="raised" if raised else "clear",
        value=value,
        threshold=threshold,
        beyond=beyond,
        p=p,
        evidence=evidence,
        ids=tuple(ids[row] for row in chosen[:MOST_IDS]),
    )
