"""What a command asks for: models, data, battery, device. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "test"]


@dataclass
class Request:
    """The options of `cure-bench evaluate`; None where an option was not given."""

    models: tuple[str, ...] = ()
    battery: str | None = None
    eps: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    split: Split = "test"
    n: int | None = None
    #: Fewer will do where there are not as many.
    n_at_most: bool = False
    weights: Path | None = None
    mean: str | None = None
    std: str | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: str = "auto"
    seed: int | None = None
    out: Path | None = None
    resume: bool = False
    shard: str | None = None
    shard_size: int | None = None
    save_adversarials: bool = False
    allow_unreliable: bool = False
    cards: tuple[str, ...] = ()
