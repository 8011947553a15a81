"""What a command asks for: models, data, battery, device. Imports no torch.

Fields are named as the options of the command line. None and empty stand for "not given": what then holds is
decided where the request is loaded, in `robustbench_cure.loading`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class Request:
    """Models on some images: what `evaluate`, `masking`, `verify-adv` and the studies have in common.

    Attributes:
        models: ids of cards, ``package.module:factory`` or ``robustbench:NAME``; empty: the embedded models.
        dataset: name of the data set; None: the battery's or the first model's.
        data_dir: where the data are.
        split: ``test`` or ``train``.
        n: number of images; None: the command's default.
        weights: weights file instead of the card's; goes with one model.
        mean: channel means of a model without a card, pixels in [0, 1].
        std: channel standard deviations, likewise.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        precision: of searches, ``auto``, ``fp32`` or ``bf16``.
        batch_size: images a pass; None: as many as the device holds well.
        seed: of whatever is random; None: the battery's, or 0.
        out: directory of the results; None: named by command and time, below ``runs``.
        cards: directories with further cards.
        command: the command line, for the provenance.
    """

    models: tuple[str, ...] = ()
    dataset: str | None = None
    data_dir: Path | None = None
    split: Split = "test"
    n: int | None = None
    weights: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    seed: int | None = None
    out: Path | None = None
    cards: tuple[str, ...] = ()
    command: str = ""


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """`cure-bench evaluate`.

    Attributes:
        battery: its id; None: that of the models' cards.
        eps: another radius for the battery, a fraction such as ``4/255``.
        n_at_most: fewer than ``n`` images will do where the data set has not as many.
        resume: go on with the run that ``out`` holds.
        shard: (i, k) does the i-th of k parts.
        shard_size: samples in one shard; None: the default.
        audit: survivors that the battery's audit draws, 0 for all; None: the battery's own number.
        save_adversarials: keep every attack's images.
        allow_unreliable: evaluate a stochastic or batch-dependent model, marked as such.
    """

    battery: str | None = None
    eps: str | None = None
    n_at_most: bool = False
    resume: bool = False
    shard: tuple[int, int] = (1, 1)
    shard_size: int | None = None
    audit: int | None = None
    save_adversarials: bool = False
    allow_unreliable: bool = False


@dataclass(frozen=True)
class VerifyRequest(Request):
    """`cure-bench verify-adv`.

    Attributes:
        battery: whose threat model counts; None: that of the model's card.
        against: runs whose best known numbers are lowered by what is verified.
        source: who made the images, and how.
        tensor: name of the images in a file that holds several arrays.
    """

    battery: str | None = None
    against: tuple[Path, ...] = ()
    source: str = ""
    tensor: str = ""


@dataclass(frozen=True)
class TrainRequest:
    """`cure-bench train`.

    Attributes:
        out: weights file; None: the cache, where `evaluate` looks.
        start: weights to start from instead of the card's.
        dataset: name of the data set; None: the card's.
        data_dir: where the data are.
        n: train on so many random images; None: all.
        epochs: end after so many; None: the recipe's.
        resume: go on from the checkpoint that a stopped run left.
        time_budget: stop after this long, as ``45m``, with a checkpoint.
        smoke: a few steps on few images, nothing kept.
        half: store the weights in half precision.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        cards: directories with further cards.
    """

    out: Path | None = None
    start: Path | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    n: int | None = None
    epochs: int | None = None
    resume: bool = False
    time_budget: str | None = None
    smoke: bool = False
    half: bool = False
    device: str = "auto"
    cards: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvolutionRequest:
    """`cure-bench evolution`.

    Attributes:
        logs: CSV files that `cure-bench train` writes with the weights; the name of a run is its file's.
        out: directory of the results; None: named by time, below ``runs``.
        command: the command line, for the provenance.
    """

    logs: tuple[Path, ...] = ()
    out: Path | None = None
    command: str = ""
