"""Data sets: pixels as stored, ids and digests that say exactly which images a number is about."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_cure.datasets import CIFAR10_CLASSES, DATASETS, from_arrays, load_dataset
from robustbench_cure.errors import UsageError

DIGITS = {
    "train": (1297, "a0f8395fce2b61d5cb112d54e2822c0fc02d4b4cc4091727b1681ab7d3073826"),
    "test": (500, "06607ce08ba87e05028be3aa67333ebd96da3f62851e717e710fb568ed6c1438"),
}


def grey_levels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def toy(**change):
    """Six images; named arguments of `from_arrays` replace those of the toy."""
    fields = {"images": grey_levels(6, 1, 2, 2), "labels": np.arange(6) % 3}
    fields |= {"ids": [f"t/{i}" for i in range(6)], "classes": "abc"}
    return from_arrays("toy", "test", **(fields | change))


# --- digits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", DIGITS)
def test_the_digits_split_is_fixed(split):
    data = load_dataset("digits", split)
    assert (len(data), data.digest) == DIGITS[split]
    assert data.total == len(data)
    assert data.images.shape[1:] == (1, 8, 8)
    assert len(data.classes) == 10


def test_digits_are_exact_sixteenths_in_two_disjoint_parts():
    from sklearn.datasets import load_digits

    raw = load_digits()
    parts = [load_dataset("digits", split) for split in ("train", "test")]
    for data in parts:
        rows = [int(name.removeprefix("digits/")) for name in data.ids]
        assert torch.equal(data.images[:, 0] * 16, torch.from_numpy(raw.images[rows]).float())
        assert data.labels.tolist() == raw.target[rows].tolist()
    assert sorted(parts[0].ids + parts[1].ids) == [f"digits/{i:04d}" for i in range(1797)]


# --- what every set guarantees ------------------------------------------------------------------------


def test_hashes_are_those_of_the_raw_bytes_and_pixels_are_exact():
    grey = grey_levels(6, 3, 4, 5)
    data = toy(images=grey)
    assert list(data.hashes) == [sha256(image) for image in grey]
    assert torch.equal(data.images, torch.from_numpy(grey).float() / 255)
    assert torch.equal((data.images * 255).round().to(torch.uint8), torch.from_numpy(grey))
    real = np.random.default_rng(1).uniform(0, 1, (6, 3, 4, 5)).astype(np.float32)
    data = toy(images=real)
    assert list(data.hashes) == [sha256(image) for image in real]
    assert np.array_equal(data.images.numpy(), real)


def test_grey_levels_stay_bytes_until_they_are_asked_for():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    data = from_arrays("levels", "test", grey, np.zeros(1, np.int64))
    assert data.pixels.dtype == torch.uint8
    assert data.images.dtype == torch.float32
    assert np.array_equal(data.images.numpy(), grey.astype(np.float32) / np.float32(255))
    assert data.take([0]).pixels.dtype == torch.uint8


def test_arrays_are_copied_so_that_hashes_stay_true():
    for images in (grey_levels(6, 1, 2, 2), np.random.default_rng(0).random((6, 1, 2, 2), np.float32)):
        for given in (images, torch.from_numpy(images)):
            data = toy(images=given)
            given += 1
            assert list(data.hashes) == [sha256(image) for image in data.pixels.numpy()]
            given -= 1


MEASURE = """
import numpy as np
from robustbench_cure.datasets import from_arrays

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

images = np.random.default_rng(0).integers(0, 256, (20_000, 3, 32, 32), np.uint8)
if {channels_last}:
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = memory("VmRSS")
part = from_arrays("big", "test", images, np.arange(20_000) % 10).subset(0)
print((memory("VmHWM") - before) / images.nbytes)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc"
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_data_set_takes_its_bytes_twice_and_no_more(channels_last):
    code = MEASURE.format(channels_last=channels_last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Beside the caller's own array: the copy, its permutation, and names and hashes of the samples.
    assert float(done.stdout) < 2.5


def test_hashes_do_not_depend_on_how_the_memory_lies():
    grey = grey_levels(6, 3, 4, 5)
    assert toy(images=np.asfortranarray(grey)).hashes == toy(images=grey).hashes
    assert toy(images=grey[::-1][::-1]).digest == toy(images=grey).digest


def test_the_digest_changes_with_any_pixel_label_id_or_order():
    base = toy()
    digests = {base.digest, base.take([1, 0, 2, 3, 4, 5]).digest, base.take(range(5)).digest}
    for row in range(6):
        images = grey_levels(6, 1, 2, 2)
        images[row, 0, 1, 1] ^= 1
        labels = np.arange(6) % 3
        labels[row] = (labels[row] + 1) % 3
        ids = [f"t/{i}" for i in range(6)]
        ids[row] = "other"
        digests |= {toy(images=images).digest, toy(labels=labels).digest, toy(ids=ids).digest}
    assert len(digests) == 3 + 6 * 3
    assert toy().digest == base.digest


def test_subsets_are_prefixes_of_one_seeded_permutation():
    data = load_dataset("digits")
    whole = data.subset(0)
    assert sorted(whole.ids) == sorted(data.ids)
    assert whole.ids != data.ids
    for n in (1, 20, 500):
        part = data.subset(n)
        assert part.ids == whole.ids[:n]
        assert torch.equal(part.images, whole.images[:n])
        assert part.labels.tolist() == whole.labels[:n].tolist()
        assert part.hashes == whole.hashes[:n]
        assert (len(part), part.total) == (n, 500)
    assert data.subset(20, seed=1).ids != data.subset(20).ids
    with pytest.raises(UsageError, match="--n 501: digits has only 500 test samples"):
        data.subset(501)


def test_taking_rows_keeps_image_label_id_and_hash_together():
    data = toy()
    part = data.take([4, 1])
    assert part.ids == ("t/4", "t/1")
    assert part.labels.tolist() == [1, 1]
    assert part.hashes == (data.hashes[4], data.hashes[1])
    assert torch.equal(part.images, data.images[[4, 1]])


# --- npz ----------------------------------------------------------------------------------------------

COLOUR = grey_levels(6, 5, 4, 3)
SQUARE = grey_levels(6, 7, 7, 4)
LAYOUTS = {
    "NHWC": (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
    "NCHW": (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
    "NHWC grey": (COLOUR[..., :1], COLOUR[..., :1].transpose(0, 3, 1, 2)),
    "NHWC of 4 channels": (SQUARE, SQUARE.transpose(0, 3, 1, 2)),
    "NHW": (COLOUR[..., 0], COLOUR[..., 0][:, None]),
    "float32": (COLOUR.astype(np.float32) / 255, COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / 255),
    "float64": (COLOUR / 255.0, (COLOUR.transpose(0, 3, 1, 2) / 255.0).astype(np.float32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["x", "x_test"])
def test_archives_in_every_layout_give_the_same_pixels(tmp_path, layout, names):
    stored, expected = LAYOUTS[layout]
    labels = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    np.savez(tmp_path / "mine.npz", **{names: stored, names.replace("x", "y"): labels})
    data = load_dataset("npz", "test", tmp_path / "mine.npz")
    assert data.images.shape == expected.shape
    assert list(data.hashes) == [sha256(image) for image in expected]
    scale = 255 if expected.dtype == np.uint8 else 1
    assert torch.equal(data.images, torch.from_numpy(np.ascontiguousarray(expected)).float() / scale)
    assert data.labels.tolist() == labels.tolist()
    assert data.name == "npz:mine"
    part = "test" if names == "x_test" else "all"
    assert data.split == part
    assert data.ids == tuple(f"{part}/{i:05d}" for i in range(6))
    assert data.classes == ("0", "1", "2")


def test_the_archives_own_index_names_the_samples_and_splits_stay_apart(tmp_path):
    arrays = {"x_test": COLOUR, "y_test": np.arange(6) % 3, "idx_test": np.array([9, 7, 5, 3, 1, 12345])}
    arrays |= {"x_train": COLOUR[:4], "y_train": np.arange(4) % 2}
    np.savez(tmp_path / "mine.npz", **arrays)
    assert load_dataset("npz", "test", tmp_path / "mine.npz").ids[::5] == ("test/00009", "test/12345")
    train = load_dataset("npz", "train", str(tmp_path / "mine.npz"))
    assert (train.split, train.ids) == ("train", tuple(f"train/{i:05d}" for i in range(4)))


# --- folder -------------------------------------------------------------------------------------------


def pictures(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, pixels in images.items():
        path = root / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm"])
def test_lossless_image_files_are_read_pixel_by_pixel(tmp_path, suffix):
    names = [f"{kind}/{i}{suffix}" for kind in ("zebra", "ant", "cat") for i in (2, 0, 1)]
    images = {name: grey_levels(5, 4, 3, seed=k) for k, name in enumerate(names)}
    (tmp_path / "mine" / "test" / "ant").mkdir(parents=True)
    (tmp_path / "mine" / "test" / "ant" / "notes.txt").write_text("no image, and not read as one")
    data = load_dataset("folder", "test", pictures(tmp_path / "mine", images))
    assert data.classes == ("ant", "cat", "zebra")
    assert data.ids == tuple(f"test/{name}" for name in sorted(names))
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for row, name in enumerate(sorted(names)):
        expected = images[name].transpose(2, 0, 1)
        assert data.hashes[row] == sha256(expected)
        assert torch.equal(data.images[row], torch.from_numpy(expected.copy()).float() / 255)
    assert data.name == "folder:mine"
    assert data.notes == ""


def test_grey_image_files_have_one_channel(tmp_path):
    images = {name: grey_levels(5, 4, seed=k) for k, name in enumerate(("a/0.png", "b/0.png"))}
    data = load_dataset("folder", "test", pictures(tmp_path, images))
    assert data.images.shape == (2, 1, 5, 4)
    assert [data.hashes[0], data.hashes[1]] == [sha256(images["a/0.png"]), sha256(images["b/0.png"])]


def test_palettes_are_resolved(tmp_path):
    pixels = np.zeros((5, 4, 3), np.uint8)
    pixels[:2] = (255, 0, 128)
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(pixels).quantize(2).save(tmp_path / "test" / name / "0.png")
    data = load_dataset("folder", "test", tmp_path)
    assert data.hashes[0] == sha256(pixels.transpose(2, 0, 1))


def test_lossy_image_files_are_noted_and_flagged(tmp_path):
    images = {name: grey_levels(16, 16, 3, seed=k) for k, name in enumerate(("a/0.jpg", "b/0.png"))}
    data = load_dataset("folder", "test", pictures(tmp_path, images))
    assert data.notes.startswith("1 of the split's 2 images read from .jpg files: lossy")
    assert data.subset(1).notes == data.notes
    assert data.hashes[0] != sha256(images["a/0.jpg"].transpose(2, 0, 1))
    assert data.hashes[1] == sha256(images["b/0.png"].transpose(2, 0, 1))
    lossy = {"a/0.jpg": images["a/0.jpg"], "b/0.webp": images["b/0.png"]}
    notes = load_dataset("folder", "test", pictures(tmp_path / "all", lossy)).notes
    assert notes.startswith("read from .jpg, .webp files: lossy")


def test_a_folder_named_by_its_place_has_its_real_name(tmp_path, monkeypatch):
    images = {name: grey_levels(5, 4, 3) for name in ("a/0.png", "b/0.png")}
    monkeypatch.chdir(pictures(tmp_path / "mine", images))
    assert load_dataset("folder", "test", ".").name == "folder:mine"


# --- torchvision's sets -------------------------------------------------------------------------------


def test_cifar10_comes_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    pixels, labels = {}, {}

    def store(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name, n):
        pixels[name] = grey_levels(n, 3, 32, 32, seed=len(pixels))
        labels[name] = [int(i) for i in (np.arange(n) + len(pixels)) % 10]
        return store(name, {"data": pixels[name].reshape(n, -1), "labels": labels[name]})

    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1", 4), batch("data_batch_2", 3)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 5)])
    names = store("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    meta = {"filename": names[0], "key": "label_names", "md5": names[1]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    test, train = (load_dataset("cifar10", split, tmp_path) for split in ("test", "train"))
    assert list(test.hashes) == [sha256(image) for image in pixels["test_batch"]]
    assert test.labels.tolist() == labels["test_batch"]
    assert test.ids[0] == "cifar10/test/00000"
    assert (test.name, test.split, test.classes) == ("cifar10", "test", CIFAR10_CLASSES)
    expected = np.concatenate([pixels["data_batch_1"], pixels["data_batch_2"]])
    assert list(train.hashes) == [sha256(image) for image in expected]
    assert train.labels.tolist() == labels["data_batch_1"] + labels["data_batch_2"]
    assert test.images.shape == (5, 3, 32, 32)


def test_svhn_comes_as_torchvision_stores_it(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels, labels = grey_levels(5, 3, 32, 32), np.array([10, 1, 2, 10, 9])
    # MATLAB's order, and its digit 10, which is a nought.
    savemat(tmp_path / "test_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": labels[:, None]})
    digest = hashlib.md5((tmp_path / "test_32x32.mat").read_bytes()).hexdigest()
    entry = [SVHN.split_list["test"][0], "test_32x32.mat", digest]
    monkeypatch.setattr(SVHN, "split_list", {"test": entry})
    data = load_dataset("svhn", "test", tmp_path)
    assert list(data.hashes) == [sha256(image) for image in pixels]
    assert data.labels.tolist() == [0, 1, 2, 0, 9]
    assert (data.name, data.classes, data.ids[4]) == ("svhn", tuple("0123456789"), "svhn/test/00004")


def test_the_digests_of_a_set_do_not_depend_on_how_it_was_stored(tmp_path):
    grey = grey_levels(4, 6, 6, 3)
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(2)]
    folder = load_dataset("folder", "test", pictures(tmp_path, dict(zip(names, grey, strict=True))))
    np.savez(tmp_path / "same.npz", x=grey, y=[0, 0, 1, 1])
    assert load_dataset("npz", "test", tmp_path / "same.npz").hashes == folder.hashes


def test_the_time_limit_of_downloads_is_put_back(tmp_path, monkeypatch):
    import socket

    seen = []

    def download(*_, **__):
        seen.append(socket.getdefaulttimeout())
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
    with pytest.raises(UsageError, match="could not be downloaded"):
        load_dataset("cifar10", "test", tmp_path)
    assert seen == [30.0]
    assert socket.getdefaulttimeout() is None


def test_every_name_loads_something_and_unknown_names_suggest_one():
    assert set(DATASETS) == {"digits", "cifar10", "svhn", "folder", "npz"}
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")


# --- real pixels, where they are at hand ----------------------------------------------------------------

REAL = Path(os.environ.get("CURE_BENCH_DATA", ""))
needs_data = pytest.mark.skipif("CURE_BENCH_DATA" not in os.environ, reason="CURE_BENCH_DATA is not set")


@needs_data
def test_real_svhn_images():
    data = load_dataset("npz", "test", REAL / "svhn-sample.npz")
    assert (data.name, data.split, data.images.shape) == ("npz:svhn-sample", "all", (1083, 3, 32, 32))
    assert len(data.classes) == 10
    assert len(set(data.ids)) == 1083
    assert data.digest == "7259f2ee00327ae501205936b18e47114c9aff6851dd25550bb17a3d6417d70e"


@needs_data
def test_real_cifar10_images():
    data = load_dataset("npz", "test", REAL / "cifar10-lossless.npz")
    assert (data.split, data.images.shape, len(data.classes)) == ("test", (512, 3, 32, 32), 10)
    assert data.ids == tuple(f"test/{i:05d}" for i in range(512))
    # The first four test images of CIFAR-10: a cat, two ships, an aeroplane.
    assert data.labels[:4].tolist() == [3, 8, 8, 0]
    assert data.digest == "055e1b96bf5bcc41068be057c07da279b965a6f1719eb92d26cce103882581a7"


# --- data of one's own ---------------------------------------------------------------------------------


def test_tensors_are_data_too_with_ids_and_classes_of_their_own():
    x, y = torch.rand((5, 1, 4, 4), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2, 0])
    data = from_arrays("mine", "test", x, y)
    same = from_arrays(
        "mine", "test", x.numpy(), y.numpy(), ids=[f"mine/{k}" for k in range(5)], classes=["0", "1", "2"]
    )
    assert data.digest == same.digest
    assert torch.equal(data.images, x)
    assert torch.equal(data.labels, y)
    assert (data.ids, data.classes) == (same.ids, same.classes)


@pytest.mark.parametrize(("shape", "count"), [((5, 4, 4), 5), ((5, 1, 4, 4), 4)])
def test_arrays_of_other_shapes_are_refused(shape, count):
    with pytest.raises(UsageError, match=r"images must be \(N, C, H, W\) and labels \(N,\)"):
        from_arrays("mine", "test", torch.zeros(shape), torch.zeros(count, dtype=torch.int64))


WRONG = {
    "too few ids": ({"ids": ["a", "b"]}, "2 ids for 6 images"),
    "too many ids": ({"ids": list("abcdefg")}, "7 ids for 6 images"),
    "an id twice": ({"ids": list("abcdea")}, "ids must be unique, 'a' is there more than once"),
    "a class twice": ({"classes": "aba"}, "classes must be unique, 'a' is there more than once"),
    "fewer classes than labels": ({"classes": "ab"}, r"labels must be 0\.\.1, got 0\.\.2"),
    "halves for labels": ({"labels": np.arange(6) / 2}, "labels must be integers, got float64"),
    "words for labels": ({"labels": np.array(list("abcabc"))}, "labels must be integers, got <U1"),
    "a label of the wrong size": ({"labels": np.array([0, 1, 2, 0, 1, 10**9]), "classes": None}, "0..99999"),
    "nothing but the label -1": ({"labels": np.full(6, -1), "classes": None}, "got -1..-1"),
    "colours last": (
        {"images": grey_levels(6, 8, 8, 3)},
        r"look like \(N, H, W, C\).*transpose\(0, 3, 1, 2\)",
    ),
    "two channels last": ({"images": grey_levels(6, 8, 8, 2)}, r"look like \(N, H, W, C\)"),
    "grey last": ({"images": torch.zeros(6, 28, 28, 1)}, r"look like \(N, H, W, C\)"),
    "0 to 255": ({"images": grey_levels(6, 1, 2, 2).astype(np.float32)}, "must lie in .*divide by 255"),
    "normalised": ({"images": torch.linspace(-2, 2, 24).view(6, 1, 2, 2)}, "must lie in"),
    "one NaN": ({"images": torch.tensor([0.5] * 23 + [torch.nan]).view(6, 1, 2, 2)}, "NaN or infinity"),
    "an infinity": ({"images": torch.tensor([0.5] * 23 + [torch.inf]).view(6, 1, 2, 2)}, "NaN or infinity"),
    "complex numbers": ({"images": np.zeros((6, 1, 2, 2), np.complex64)}, "uint8 or float32, got complex64"),
    "bfloat16": ({"images": torch.zeros(6, 1, 2, 2).bfloat16()}, "images are no array"),
    "no pixels": ({"images": np.zeros((6, 1, 0, 2), np.uint8)}, "no pixels"),
    "no images": ({"images": np.zeros((0, 1, 2, 2), np.uint8), "labels": np.zeros(0, int)}, "no images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused_in_words(case):
    change, words = WRONG[case]
    with pytest.raises(UsageError, match=f"toy: .*{words}"):
        toy(**change)


@pytest.mark.parametrize(
    "shape",
    [(3, 20, 4), (3, 4, 20), (4, 8, 8), (2, 8, 8), (12, 6, 6), (3, 1, 64), (1, 1, 1), (1, 5, 7), (64, 4, 4)],
)
def test_images_of_odd_shapes_are_images(shape):
    assert toy(images=grey_levels(6, *shape)).images.shape == (6, *shape)


def test_whole_numbers_of_any_kind_are_labels_and_ids_become_words():
    for kind in (np.uint8, np.int32, np.bool_):
        assert toy(labels=(np.arange(6) % 2).astype(kind)).labels.tolist() == [0, 1] * 3
    assert toy(ids=range(6)).ids == tuple("012345")


def test_numbers_of_another_width_are_hashed_as_they_are_kept():
    real = np.random.default_rng(0).random((6, 1, 2, 2))
    assert toy(images=real).hashes == toy(images=real.astype(np.float32)).hashes
