"""Data sets: images in [0, 1], labels, and for every sample a stable id and a hash of its pixels.

Built in by name (`digits`, `cifar10`, `svhn`, `folder`, `npz`), see `DATASETS`. A subset of n is the
first n of one seeded permutation of the split, so that smaller subsets are prefixes of larger ones; the
ids are stored with every result.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.catalog import cache_dir, did_you_mean
from robustbench_cure.protocol.identity import DataInfo
from robustbench_cure.protocol.request import Split

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]

#: More classes than any labelled image set has; a larger label is a mistake, not a class.
MOST_CLASSES = 100_000
#: Seconds without an answer after which a download is given up.
TIMEOUT = 30.0
#: Pixel formats of Pillow whose values are kept; wider ones would be cut down to 8 bits.
PIXEL_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}
#: File types the folder loader reads. JPEG is lossy, which the record says.
IMAGE_SUFFIXES = {".png", ".bmp", ".ppm", ".jpg", ".jpeg", ".webp"}
LOSSY_SUFFIXES = {".jpg", ".jpeg", ".webp"}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class EvalSet:
    """Labelled images to evaluate on, with a name for each.

    Attributes:
        name: data set as reports print it.
        split: which part.
        pixels: as stored, (N,C,H,W): grey levels in uint8, or float32 in [0, 1].
        labels: int64 (N,).
        ids: stable name of each sample.
        hashes: SHA-256 of each sample's pixels as stored (uint8 or float32, C,H,W), hex.
        classes: class names, in label order.
        notes: what a reader must know of these pixels ("JPEG files: lossy").
        total: size of the split this is a subset of.
    """

    name: str
    split: str
    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    hashes: tuple[str, ...]
    classes: tuple[str, ...]
    notes: str = ""
    total: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def images(self) -> Tensor:
        """The pixels as float32 (N,C,H,W) in [0, 1].

        Grey levels take four times the memory so, and are converted anew each time: `take` the rows first.
        """
        return as_float(self.pixels)

    def info(self) -> DataInfo:
        """What a record says of these images."""
        return DataInfo(
            name=self.name,
            split=self.split,
            n=len(self),
            total=self.total,
            digest=self.digest,
            classes=list(self.classes),
            notes=self.notes,
        )

    @property
    def digest(self) -> str:
        """SHA-256 over ids, pixel hashes and labels, in order; hex."""
        lines = (f"{i} {h} {y}" for i, h, y in zip(self.ids, self.hashes, self.labels.tolist(), strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def take(self, rows: Sequence[int]) -> EvalSet:
        """The rows with these indices, in this order."""
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        return EvalSet(
            self.name,
            self.split,
            self.pixels[index],
            self.labels[index],
            tuple(self.ids[i] for i in rows),
            tuple(self.hashes[i] for i in rows),
            self.classes,
            self.notes,
            self.total,
        )

    def subset(self, n: int, seed: int = 0) -> EvalSet:
        """``n`` random samples (0: all), the first n of one permutation of the split.

        Raises:
            UsageError: more samples asked for than there are.
        """
        if n > len(self):
            raise UsageError(f"--n {n}: {self.name} has only {len(self)} {self.split} samples")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take([int(i) for i in (order[:n] if n else order)])


def as_float(pixels: Tensor) -> Tensor:
    """Pixels as networks take them, float32 in [0, 1]: uint8 divided by 255, the same on any device."""
    if pixels.dtype != torch.uint8:
        return pixels
    # By a tensor: CUDA multiplies by the reciprocal of a number, which is another float32 at some levels.
    return pixels.to(torch.float32).div_(torch.full((), 255.0, device=pixels.device))


def from_arrays(
    name: str,
    split: str,
    images: Pixels | Tensor,
    labels: NDArray[np.int64] | Tensor,
    *,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    notes: str = "",
) -> EvalSet:
    """Build from arrays or tensors, which are copied.

    Args:
        name: of the data, for records and reports.
        split: of it.
        images: (N,C,H,W), uint8 or float32 in [0, 1].
        labels: integers (N,).
        ids: names of the samples, which their random draws depend on; default: ``name/0``, ``name/1``, ...
        classes: names of the labels; default: numbers up to the largest.
        notes: what a reader of the report should know of the data.

    Raises:
        UsageError: empty, wrong shape, dtype or range, NaN, labels outside the classes, or names that are
            missing, too many or not unique.
    """
    raw, target = _array(name, "images", images), _array(name, "labels", labels)
    if raw.ndim != 4 or target.shape != (len(raw),):
        raise UsageError(
            f"{name}: images must be (N, C, H, W) and labels (N,), got {raw.shape} and {target.shape}"
        )
    n = len(raw)
    if n == 0:
        raise UsageError(f"{name}: no images")
    if target.dtype.kind not in "iub":
        raise UsageError(f"{name}: labels must be integers, got {target.dtype}: the numbers of the classes")
    low, high = int(target.min()), int(target.max())
    most = MOST_CLASSES if classes is None else len(classes)
    if low < 0 or high >= most:
        raise UsageError(f"{name}: labels must be 0..{most - 1}, got {low}..{high}")
    classes = _names(name, "classes", range(high + 1) if classes is None else classes)
    ids = _names(name, "ids", [f"{name}/{row}" for row in range(n)] if ids is None else ids)
    if len(ids) != n:
        raise UsageError(f"{name}: {len(ids)} ids for {n} images: each needs one of its own")
    pixels = _stored(name, raw)
    hashes = tuple(hashlib.sha256(image).hexdigest() for image in pixels.numpy())
    return EvalSet(
        name, split, pixels, torch.from_numpy(target.astype(np.int64)), ids, hashes, classes, notes, n
    )


def _array(name: str, what: str, given: object) -> NDArray[Any]:
    """As NumPy has it; of its memory, nothing is copied."""
    try:
        return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, sparse tensors, ragged lists
        raise UsageError(f"{name}: {what} are no array: {error}") from None


def _stored(name: str, images: NDArray[Any]) -> Tensor:
    """A copy of the images, (N,C,H,W) uint8 or float32, each contiguous.

    Raises:
        UsageError: wrong shape, dtype or range.
    """
    if images.size == 0:
        raise UsageError(f"{name}: the images have no pixels: shape {images.shape}")
    if channels_last(images.shape[1:]):
        raise UsageError(
            f"{name}: images of shape {images.shape} look like (N, H, W, C); "
            "they must be (N, C, H, W): transpose(0, 3, 1, 2)"
        )
    if images.dtype == np.uint8:
        return torch.from_numpy(np.array(images, order="C"))
    if images.dtype.kind not in "fiub":
        raise UsageError(f"{name}: images must be uint8 or float32, got {images.dtype}")
    pixels = torch.from_numpy(np.array(images, dtype=np.float32, order="C"))
    low, high = (float(bound) for bound in pixels.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UsageError(f"{name}: images contain NaN or infinity")
    if low < 0 or high > 1:
        raise UsageError(
            f"{name}: float images must lie in [0, 1], these span [{low:g}, {high:g}]; "
            "divide by 255, or store grey levels as uint8"
        )
    return pixels


def _names(name: str, what: str, given: Sequence[object]) -> tuple[str, ...]:
    """Ids or classes, of which no two are called the same."""
    names = tuple(map(str, given))
    if len(set(names)) < len(names):
        twice = next(one for one, times in Counter(names).items() if times > 1)
        raise UsageError(f"{name}: {what} must be unique, {twice!r} is there more than once")
    return names


def channels_last(shape: Sequence[int]) -> bool:
    """Whether (C, H, W) is rather (H, W, C): last comes 3, or less than the sides of a square."""
    first, second, last = shape
    return first > 4 and (last == 3 or last < first == second)


# --- the built-in sets ---------------------------------------------------------------------------------


def _digits(split: Split, data_dir: Path | None) -> EvalSet:
    """Handwritten digits inside scikit-learn: 8x8 grey, 1,297 train and 500 test by one permutation."""
    if data_dir is not None:
        raise UsageError(
            f"digits are embedded and not read from --data-dir {data_dir}; "
            "for images of your own say --dataset folder or npz"
        )
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    rows = order[:1297] if split == "train" else order[1297:]
    # Grey values are 0..16; 1/16 is exact in float32.
    images = (raw.images[rows, None] / 16.0).astype(np.float32)
    ids = [f"digits/{i:04d}" for i in rows]
    return from_arrays("digits", split, images, raw.target[rows], ids=ids, classes="0123456789")


def _cifar10(split: Split, data_dir: Path | None) -> EvalSet:
    """CIFAR-10 (Krizhevsky 2009) through torchvision."""
    from torchvision.datasets import CIFAR10

    data = _torchvision("cifar10", data_dir, lambda root: CIFAR10(root, split == "train", download=True))
    images = np.asarray(data.data).transpose(0, 3, 1, 2)
    ids = [f"cifar10/{split}/{i:05d}" for i in range(len(images))]
    return from_arrays("cifar10", split, images, np.asarray(data.targets), ids=ids, classes=CIFAR10_CLASSES)


def _svhn(split: Split, data_dir: Path | None) -> EvalSet:
    """SVHN format 2 (Netzer et al. 2011; non-commercial research) through torchvision."""
    from torchvision.datasets import SVHN

    data = _torchvision("svhn", data_dir, lambda root: SVHN(root, split, download=True))
    ids = [f"svhn/{split}/{i:05d}" for i in range(len(data.data))]
    return from_arrays("svhn", split, data.data, np.asarray(data.labels), ids=ids, classes="0123456789")


def _torchvision(name: str, data_dir: Path | None, load: Callable[[str], object]):  # type: ignore[no-untyped-def]
    root = data_dir or cache_dir() / "data"
    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        return load(str(root))
    except Exception as error:  # torchvision and urllib raise a dozen kinds
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UsageError(
            f"{name}: not found in {root} and could not be downloaded ({reason}); "
            f"give its folder with --data-dir, or your own images with --dataset folder or npz"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _folder(split: Split, data_dir: Path | None) -> EvalSet:
    """Image files as ``<split>/<class>/*``; classes in sorted order, which the record keeps."""
    from PIL import Image

    root = _existing(data_dir, "folder")
    base = root / split
    if not base.is_dir():
        raise UsageError(f"{root}: no folder '{split}' in it; expected {split}/<class>/<image files>")
    classes = sorted(entry.name for entry in base.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise UsageError(
            f"{base}: {len(classes)} class folder{'s' * (len(classes) != 1)}; a classifier needs at least 2"
        )
    arrays, labels, ids, suffixes, shape = [], [], [], [], None
    for label, name in enumerate(classes):
        files = sorted(f for f in (base / name).iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"{base / name}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for file in files:
            try:
                with Image.open(file) as image:
                    mode = image.mode
                    pixels = np.asarray(image if mode == "L" else image.convert("RGB"))
            except Exception as error:  # Pillow raises OSError, SyntaxError and more on damaged files
                raise UsageError(f"{file}: not a readable image: {error}") from None
            if mode not in PIXEL_MODES:
                raise UsageError(f"{file}: pixels of mode {mode!r}: 16 bits or more; save them with 8 bits")
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise UsageError(
                    f"{file}: shape {pixels.shape} differs from the first image's {shape}; "
                    "bring all to one size and one number of channels"
                )
            arrays.append(pixels)
            labels.append(label)
            ids.append(f"{split}/{name}/{file.name}")
            suffixes.append(file.suffix.lower())
    images = np.stack(arrays)
    arrays.clear()  # or they would be held beside it to the end
    lossy = [suffix for suffix in suffixes if suffix in LOSSY_SUFFIXES]
    share = "" if len(lossy) == len(suffixes) else f"{len(lossy)} of the split's {len(suffixes)} images "
    kinds = ", ".join(sorted(set(lossy)))
    notes = f"{share}read from {kinds} files: lossy compression, not the original pixels" if lossy else ""
    return from_arrays(
        f"folder:{root.resolve().name}",
        split,
        images,
        np.asarray(labels),
        ids=ids,
        classes=classes,
        notes=notes,
    )


def _npz(split: Split, data_dir: Path | None) -> EvalSet:
    """Arrays of a NumPy archive: ``x_<split>``/``y_<split>`` or ``x``/``y``; optional ``idx_<split>``.

    x is uint8 or float32 in [0, 1], (N,H,W,C) or (N,C,H,W) or (N,H,W); y is integer (N,).
    """
    path = _existing(data_dir, "npz")
    try:
        with path.open("rb") as file:  # NumPy leaves the file open where an archive is damaged
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array, as in .npy")
            suffix = f"_{split}" if f"x_{split}" in archive else ""
            if f"x{suffix}" not in archive or f"y{suffix}" not in archive:
                raise UsageError(
                    f"{path}: needs arrays x and y, or x_{split} and y_{split}; has {archive.files}"
                )
            x, y = archive[f"x{suffix}"], archive[f"y{suffix}"]
            index = archive[f"idx{suffix}"] if f"idx{suffix}" in archive else np.arange(len(y))
    except UsageError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each have their own
        raise UsageError(
            f"{path}: not a readable .npz file: {error}; write it with numpy.savez(FILE, x=..., y=...)"
        ) from None
    for name, array in (("x", x), ("y", y), ("idx", index)):
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{path}: {name}{suffix} is not an array; write the file with numpy.savez")
    if x.dtype not in (np.uint8, np.float32, np.float64) or not np.issubdtype(y.dtype, np.integer):
        raise UsageError(
            f"{path}: x must be uint8 or float32 in [0, 1], y integer; got {x.dtype} and {y.dtype}"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and (channels_last(x.shape[1:]) or (x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3))):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or len(x) != len(y) or y.ndim != 1 or len(index) != len(x):
        raise UsageError(f"{path}: expected N images and N labels, got shapes {x.shape} and {y.shape}")
    if len(x) == 0:
        raise UsageError(f"{path}: no images")
    if x.size == 0:
        raise UsageError(f"{path}: the images have no pixels: shape {x.shape}")
    if not np.issubdtype(index.dtype, np.integer) or len(set(index.tolist())) != len(index):
        raise UsageError(f"{path}: idx{suffix} must be integers, each unique: they are the samples' names")
    if int(y.max()) >= MOST_CLASSES:
        raise UsageError(f"{path}: labels must be 0..L-1 for L classes, got {int(y.min())}..{int(y.max())}")
    classes = [str(k) for k in range(int(y.max()) + 1)]
    if len(set(y.tolist())) < 2:
        raise UsageError(f"{path}: only one class in y; robustness of one class says nothing")
    ids = [f"{split if suffix else 'all'}/{int(i):05d}" for i in index]
    return from_arrays(f"npz:{path.stem}", split if suffix else "all", x, y, ids=ids, classes=classes)


def _existing(data_dir: Path | None, name: str) -> Path:
    if data_dir is None:
        raise UsageError(f"--dataset {name} needs --data-dir")
    if not data_dir.exists():
        raise UsageError(f"--data-dir {data_dir}: no such file or directory")
    if name == "folder" and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: not a folder")
    if name == "npz" and not data_dir.is_file():
        raise UsageError(f"--data-dir {data_dir}: not a .npz file")
    return data_dir


DATASETS: dict[str, Callable[[Split, Path | None], EvalSet]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "svhn": _svhn,
    "folder": _folder,
    "npz": _npz,
}


def load_dataset(name: str, split: Split = "test", data_dir: str | os.PathLike[str] | None = None) -> EvalSet:
    """Load a data set by name.

    Args:
        name: a key of `DATASETS`.
        split: ``train`` or ``test``.
        data_dir: where cifar10 and svhn are (or are downloaded to); the folder or .npz file itself
            for ``folder`` and ``npz``.

    Raises:
        UsageError: unknown name, files missing, unreadable or of the wrong shape, dtype or range.
    """
    if name not in DATASETS:
        raise UsageError(
            f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; see `cure-bench list datasets`"
        )
    return DATASETS[name](split, None if data_dir is None else Path(data_dir).expanduser())
