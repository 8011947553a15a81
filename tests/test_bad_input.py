"""Bad input through the command line: one line that says what, where and what to do; nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from made import BATTERY_CARD, Trap
from PIL import Image
from torch import nn

from robustbench_cure.cli.main import main

PREFIX = "cure-bench: error: "
OURS = Path(__file__).parent.parent

PGD = """\
[[attacks]]
id = "pgd"
kind = "pgd"
name = "PGD"
limit = 0
steps = 3
step_size = "1/100"
random_start = true
restarts = 1
loss = "ce"
stop = "first-success"
"""

OWN = """\
import torch
from torch import nn

class Linear(nn.Sequential):
    def __init__(self, pixels=4, classes=3):
        super().__init__(nn.Flatten(), nn.Linear(pixels, classes))
        with torch.no_grad():
            self[1].bias.zero_()
            self[1].weight.copy_(torch.linspace(-1, 1, classes * pixels).view(classes, pixels).sin())

class Changed(Linear):
    def __init__(self, change):
        super().__init__()
        self.change = change
    def forward(self, x):
        return self.change(super().forward(x))

def linear(): return Linear()
def ten(): return Linear(classes=10)
def large(): return Linear(pixels=768)
def nan(): return Changed(lambda z: z * float("nan"))
def noisy(): return Changed(lambda z: z + torch.rand(z.shape))
def volume(): return Changed(lambda z: z[:, :, None])
def pair(): return Changed(lambda z: (z, z))
def text(): return "a network"
def broken(): raise RuntimeError("first line\\nsecond line")
def wants(width): return Linear()
network = Linear()
"""


class Bench:
    """A place of its own for one case: files to be wrong, and a small run that is right."""

    def __init__(self, at: Path, patch: pytest.MonkeyPatch) -> None:
        self.at, self.patch = at, patch
        (at / "cards" / "attacks").mkdir(parents=True)
        (at / "cards" / "models").mkdir()
        (at / "cards" / "attacks" / "tiny.toml").write_text(BATTERY_CARD)
        (at / "own_models.py").write_text(OWN)
        self.arrays()

    @property
    def toy(self) -> str:
        """Options of an evaluation in which nothing is wrong."""
        return f"--model own_models:linear --battery tiny {self.cards} --dataset npz --data-dir toy.npz"

    @property
    def cards(self) -> str:
        # Absolute: cards are read once in a process for each folder as it is named.
        return f"--cards {self.at}/cards"

    def file(self, name: str, content: str | bytes) -> str:
        path = self.at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def own(self):
        """The module of one's own models."""
        module = type(sys)("own.models")
        exec(OWN, module.__dict__)
        return module

    def arrays(self, name: str = "toy.npz", **change: object) -> str:
        generator = np.random.default_rng(0)
        arrays = {"x": generator.uniform(0, 1, (20, 1, 2, 2)).astype(np.float32), "y": np.arange(20) % 3}
        np.savez(self.at / name, **{k: v for k, v in (arrays | change).items() if v is not None})
        return name

    def colour(self) -> str:
        x = np.zeros((20, 32, 32, 3), np.uint8)
        return self.arrays("colour.npz", x=x, y=np.arange(20) % 10)

    def pictures(self, *shapes: tuple[int, ...], mode: str | None = None) -> str:
        """A folder with one image of each shape, in the classes a, b, c and so on."""
        for k, shape in enumerate(shapes):
            path = self.at / "images" / "test" / "abcdef"[k] / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full(shape, 7 * k, np.uint16 if mode == "16" else np.uint8)).save(path)
        return "--dataset folder --data-dir images"

    def card(self, **change: str) -> str:
        """A copy of a digits card with its weights, under another id; ``old="new"`` replaces."""
        source = OURS / "models" / "digits"
        text = (source / "digits_normal.toml").read_text().replace('id = "digits_normal"', 'id = "copy"')
        for old, new in change.items():
            (line,) = [part for part in text.split("\n") if part.startswith(f"{old} = ")]
            text = text.replace(line, f"{old} = {new}")
        shutil.copy(source / "digits_normal.safetensors", self.at / "cards" / "models")
        self.file("cards/models/copy.toml", text)
        return f"--model copy {self.cards}"

    def battery(self, text: str, name: str = "other") -> str:
        self.file(f"cards/attacks/{name}.toml", text.replace('id = "tiny"', f'id = "{name}"'))
        return f"--model digits_cure --battery {name} {self.cards}"

    def run(self, options: str = "", out: str = "run") -> str:
        """A finished run of the toy."""
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(f"evaluate {self.toy} --out {out} {options}"))
        assert stop.value.code == 0
        return f"{out}/own_models_linear"

    def manifest(self, **change: object) -> None:
        file = self.at / self.run() / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.fixture
def bench(tmp_path, monkeypatch, request):
    monkeypatch.setenv("CURE_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CURE_BENCH_CARDS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Bench(tmp_path, monkeypatch)
    sys.modules.pop("own_models", None)


def refused(capsys, arguments, code=2) -> str:
    """Run the command and check the form of its refusal; returns the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert_one_line(printed.err)
    assert stop.value.code == code, printed.err
    assert printed.out == ""
    return printed.err


def assert_one_line(text: str) -> None:
    assert "Traceback" not in text
    assert text.startswith(PREFIX), text
    assert len(text.splitlines()) == 1, text
    assert text.strip() != PREFIX.strip()


def files_below(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


CASES = {}


def case(name, *fragments):
    """Register a case: a command line (``evaluate`` unless it names a verb), and what its message says."""

    def register(prepare):
        assert name not in CASES
        CASES[name] = (prepare, fragments)
        return prepare

    return register


def simple(name, command, *fragments):
    case(name, *fragments)(lambda bench: command.replace("TOY", bench.toy))


VERBS = ("evaluate", "curve", "masking", "report", "merge", "train", "list", "validate", "where", "nonsense")

# --- names and cards ----------------------------------------------------------------------------------

simple("unknown verb", "nonsense", "No such command 'nonsense'")
simple("unknown option", "--modle digits_cure", "--modle", "--model")
simple("unknown model", "--model digits_cur", "unknown model 'digits_cur'", "did you mean 'digits_cure'?")
simple("unknown model, nothing like it", "--model zzz", "unknown model 'zzz'", "cure-bench list models")
simple("unknown battery", "--battery tabel1", "unknown battery 'tabel1'", "did you mean 'table1'?")
simple("unknown dataset", "--dataset cifer10", "unknown dataset 'cifer10'", "'cifar10'")
simple("unknown split", "--split val", "--split", "'val'", "test")
simple("models of different batteries", "--model digits_cure --model wrn_cure", "digits, table2", "--battery")
simple("no model for a battery of other data", "--battery table2", "table2 is of cifar10", "--model")
simple("radius in grey levels", "--model digits_cure --eps 8", "--eps 8", "'8' is more", "8/255")
simple("radius that is none", "--model digits_cure --eps 0", "--eps 0", "positive")
simple("radius in words", "--model digits_cure --eps eight", "--eps eight", "not a fraction")
simple("curve in grey levels", "curve --eps 0,2,4,8", "--eps 0,2,4,8", "8/255")
simple("masking in grey levels", "masking --model digits_cure --eps 8", "'8' is more", "8/255")
simple("a shard of nothing", "--model digits_cure --shard-size 0", "--shard-size", "0 is not in the range")
simple("the same model twice", "--model digits_cure --model digits_cure", "digits_cure is given twice")
simple("cards folder missing", "--cards nowhere", "--cards", "no such directory", "nowhere")


@case("cards without their folders", "--cards", "no cards in flat", "models, attacks, reports/published")
def _(bench):
    bench.file("flat/mine.toml", 'id = "mine"\n')
    return "--model digits_cure --cards flat"


simple("train unknown model", "train digits_cur", "unknown model 'digits_cur'", "did you mean")
simple("train for no epochs", "train digits_normal --epochs 0", "--epochs", "0 is not in the range")
simple(
    "train from what is not there",
    "train resnet18_cure --out w.safetensors",
    "cure-bench train resnet18_normal",
)
simple("train to another suffix", "train digits_normal --out w.pt", "w.pt", ".safetensors")
simple("validate what is not there", "validate nowhere.toml", "nowhere.toml", "cannot be read")
simple("list nonsense", "list planets", "'planets' is not one of", "models")


@case("malformed TOML", "cards/attacks/other.toml", "not valid TOML", "line 2")
def _(bench):
    return bench.battery('id = "other"\nversion = = 1\n')


@case("validate malformed TOML", "wrong.toml", "not valid TOML")
def _(bench):
    return "validate " + bench.file("wrong.toml", "id = \n")


@case("validate a model that points at nothing", "copy.toml: battery: no battery 'nothing'")
def _(bench):
    bench.card(battery='"nothing"')
    return f"validate {bench.cards}"


@case("unknown key in a card", "copy.toml", "licence: unknown key")
def _(bench):
    return bench.card(license='"MIT"\nlicence = "MIT"')


@case("wrong type in a battery", "other.toml", "version: Input should be a valid integer")
def _(bench):
    return bench.battery(BATTERY_CARD.replace("version = 1", 'version = "1"'))


@case("unknown attack kind", "other.toml", "attacks.0", "'fgsmm'", "'pgd'")
def _(bench):
    return bench.battery(BATTERY_CARD.replace('kind = "fgsm"', 'kind = "fgsmm"'))


@case("PGD that cannot cross the ball", "other.toml", "attacks.pgd", "3 steps of 1/100", "radius 1/10")
def _(bench):
    return bench.battery(BATTERY_CARD + PGD)


@case("radius that is no number", "other.toml", "threat.eps", "'eight' is not a fraction such as \"8/255\"")
def _(bench):
    return bench.battery(BATTERY_CARD.replace('"1/10"', '"eight"'))


@case(
    "card id twice", "cards/models/digits_cure.toml", "'digits_cure' is already defined in", "models/digits"
)
def _(bench):
    shutil.copy(OURS / "models" / "digits" / "digits_cure.toml", bench.at / "cards" / "models")
    return bench.cards


@case("DLR loss for two classes", "attack 'pgd'", "DLR loss needs at least 3 classes")
def _(bench):
    spec = PGD.replace('"ce"', '"dlr"').replace('"1/100"', '"1/10"')
    bench.battery(BATTERY_CARD + spec)
    bench.file("own_models.py", OWN + "\ndef two(): return Linear(classes=2)\n")
    bench.arrays(y=np.arange(20) % 2)
    return bench.toy.replace(":linear", ":two").replace("--battery tiny", "--battery other")


# --- data ---------------------------------------------------------------------------------------------

simple("npz without a place", "--model digits_cure --dataset npz", "--dataset npz needs --data-dir")
simple("folder without a place", "--model digits_cure --dataset folder", "--dataset folder needs --data-dir")
simple("npz missing", "--dataset npz --data-dir no.npz", "--data-dir no.npz: no such file")
simple("folder missing", "--dataset folder --data-dir no", "--data-dir no: no such file or directory")
simple("npz that is a folder", "--dataset npz --data-dir cards", "--data-dir cards: not a .npz file")
simple("folder that is a file", "--dataset folder --data-dir toy.npz", "--data-dir toy.npz: not a folder")
simple("folder without the split", "--dataset folder --data-dir cards", "no folder 'test'", "<class>")
simple("a place for embedded data", "--dataset digits --data-dir toy.npz", "digits", "--data-dir", "npz")


@case(
    "cifar10 neither there nor to be had", "cifar10: not found in", "empty", "no route to host", "--data-dir"
)
def _(bench):
    def download(*_, **__):
        raise OSError("no route to host\nsecond line")

    bench.patch.setattr("torchvision.datasets.CIFAR10", download)
    return "--model own_models:linear --battery strong --dataset cifar10 --data-dir empty"


@case("svhn neither there nor to be had", "svhn: not found in", "URLError", "--dataset folder or npz")
def _(bench):
    def download(*_, **__):
        raise URLError

    class URLError(OSError):
        pass

    bench.patch.setattr("torchvision.datasets.SVHN", download)
    return "--model own_models:linear --dataset svhn --data-dir empty"


@case("empty class", "images/test/c", "no image files", ".png")
def _(bench):
    options = bench.pictures((8, 8), (8, 8))
    (bench.at / "images" / "test" / "c").mkdir()
    return options


@case("one class only", "images/test", "1 class folder", "at least 2")
def _(bench):
    return bench.pictures((8, 8))


@case("file that is no image", "images/test/a/1.png", "not a readable image")
def _(bench):
    options = bench.pictures((8, 8), (8, 8))
    bench.file("images/test/a/1.png", "I am no image")
    return options


@case("truncated image", "images/test/b/0.png", "not a readable image")
def _(bench):
    options = bench.pictures((64, 64), (64, 64))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(bench.at / "images/test/b/0.png")
    whole = (bench.at / "images/test/b/0.png").read_bytes()
    bench.file("images/test/b/0.png", whole[: len(whole) // 2])
    return options


@case("image with a damaged chunk", "images/test/b/0.png", "not a readable image")
def _(bench):
    options = bench.pictures((64, 64), (64, 64))
    file = bench.at / "images/test/b/0.png"
    file.write_bytes(file.read_bytes().replace(b"IDAT", b"I\0AT"))
    return options


@case("images of different shapes", "images/test/b/0.png", "(1, 8, 9)", "(1, 8, 8)", "one size")
def _(bench):
    return bench.pictures((8, 8), (8, 9))


@case("images of 16 bits", "images/test/a/0.png", "16", "8 bits")
def _(bench):
    return bench.pictures((8, 8), (8, 8), mode="16")


@case("npz that is no archive", "toy.npz", "not a readable .npz file")
def _(bench):
    bench.file("toy.npz", "I am no archive")
    return bench.toy


@case("npz cut short", "toy.npz", "not a readable .npz file")
def _(bench):
    bench.file("toy.npz", (bench.at / "toy.npz").read_bytes()[:300])
    return bench.toy


@case("npz with flipped bytes", "toy.npz", "not a readable .npz file")
def _(bench):
    content = bytearray((bench.at / "toy.npz").read_bytes())
    content[60:260] = bytes(200)
    bench.file("toy.npz", bytes(content))
    return bench.toy


@case("npy instead of npz", "toy.npz", "single array", "numpy.savez")
def _(bench):
    with (bench.at / "toy.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    return bench.toy


@case("a zip of other things", "toy.npz", "x", "not an array")
def _(bench):
    import zipfile

    with zipfile.ZipFile(bench.at / "toy.npz", "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("y", "text")
    return bench.toy


@case("npz with pickled objects", "toy.npz", "not a readable .npz file", "allow_pickle=False")
def _(bench):
    bench.arrays(x=np.array([Trap(bench.at / "ran")] * 20, dtype=object))
    return bench.toy


NPZ = {
    "npz without labels": ({"y": None}, ("needs arrays x and y", "x_test and y_test", "['x']")),
    "npz of complex numbers": ({"x": np.ones((20, 1, 2, 2), complex)}, ("uint8 or float", "complex128")),
    "npz of words": ({"x": np.full((20, 1, 2, 2), "a")}, ("uint8 or float", "<U1")),
    "npz with real labels": ({"y": np.ones(20)}, ("y integer", "float64")),
    "npz in [0, 255]": (
        {"x": np.full((20, 1, 2, 2), 255.0)},
        ("npz:toy", "must lie in [0, 1]", "255", "divide by 255"),
    ),
    "npz below 0": ({"x": np.full((20, 1, 2, 2), -1.0)}, ("must lie in [0, 1]", "-1")),
    "npz with NaN": ({"x": np.full((20, 1, 2, 2), np.nan)}, ("npz:toy", "NaN")),
    "npz with fewer labels": ({"y": np.arange(19) % 3}, ("N images and N labels", "(20, 1, 2, 2)", "(19,)")),
    "npz with one-hot labels": ({"y": np.eye(20, dtype=int)}, ("N images and N labels", "(20, 20)")),
    "npz with flat images": ({"x": np.ones((20, 4))}, ("N images and N labels", "(20, 4)")),
    "npz with one class": ({"y": np.zeros(20, int)}, ("toy.npz", "only one class")),
    "npz with negative labels": ({"y": np.arange(20) - 1}, ("npz:toy", "labels must be 0..", "-1")),
    "npz with enormous labels": ({"y": np.arange(20) + 2**40}, ("toy.npz", "labels", "0..")),
    "npz without images": ({"x": np.ones((0, 1, 2, 2)), "y": np.zeros(0, int)}, ("toy.npz", "no images")),
    "npz of empty images": ({"x": np.ones((20, 1, 0, 2))}, ("toy.npz", "(20, 1, 0, 2)")),
    "npz with an index twice": ({"idx": np.zeros(20, int)}, ("toy.npz", "idx", "unique")),
    "npz with an index of words": ({"idx": np.full(20, "a")}, ("toy.npz", "idx", "integers")),
}
for _name, (_change, _fragments) in NPZ.items():

    @case(_name, *_fragments)
    def _(bench, change=_change):
        bench.arrays(**change)
        return bench.toy


# --- options ------------------------------------------------------------------------------------------

simple("no samples", "TOY --n 0", "--n", "auto or a positive number")
simple("more samples than there are", "TOY --n 21", "--n 21", "npz:toy", "only 20")
simple("batch size of nothing", "TOY --batch-size 0", "--batch-size", "'0'", "auto or a positive number")
simple("batch size in words", "TOY --batch-size many", "--batch-size", "'many'", "auto or a positive number")
simple("negative seed", "TOY --seed -1", "--seed", "-1 is not in the range")
simple("enormous seed", f"TOY --seed {2**64}", "--seed", "is not in the range")
simple("part beyond the parts", "TOY --shard 3/2", "--shard", "3/2", "I/K with 1 <= I <= K")
simple("part in words", "TOY --shard x", "--shard", "'x'", "I/K")
simple("more parts than shards", "TOY --shard 2/2", "--shard 2/2", "only 1 shard")
simple("mean of another count", "TOY --mean .1,.2 --std 1,1", "--mean and --std need 1 number", "npz:toy")
simple("mean in words", "TOY --mean grey", "--mean", "grey", "numbers separated by commas")
simple("mean that is not finite", "TOY --mean nan", "--mean", "nan", "finite")
simple("mean of a card's model", "--model digits_cure --mean .5", "--mean", "digits_cure", "card")
simple("deviation 0", "TOY --std 0", "--std", "positive")
simple("deviation infinite", "TOY --std inf", "--std", "inf", "finite")
simple("precision nobody has", "TOY --precision fp8", "--precision", "'fp8'", "bf16")
simple("device nobody has", "TOY --device nonsense", "--device nonsense", "not available here")
simple("device that computes nothing", "TOY --device meta", "--device meta", "auto, cpu or cuda")
if not torch.cuda.is_available():
    simple("no such card", "TOY --device cuda", "--device cuda", "not available here")
simple("weights for two models", "--model a --model b --weights w.pt", "--weights", "exactly one --model")
simple("weights for no model", "--weights w.pt", "--weights", "exactly one --model")
simple("resume what", "TOY --resume", "--resume needs --out DIR")


# --- weights and models -------------------------------------------------------------------------------

simple(
    "no weights yet",
    "--model wrn_cure",
    "'wrn_cure' has no weights",
    "cure-bench train wrn_cure",
    "--weights FILE",
)
simple("weights missing", "--model digits_cure --weights no.pt", "no.pt", "cannot be read")
simple("own model without data", "--model own_models:linear", "own_models:linear", "needs --dataset")
simple(
    "no such module", "TOY --model nowhere.to.be:found", "nowhere.to.be:found", "No module named 'nowhere'"
)
simple("module without a function", "TOY --model own_models:", "PACKAGE.MODULE:FUNCTION")


@case("two factories of one name", "own.models:linear", "own_models:linear", "rename one")
def _(bench):
    bench.patch.setitem(sys.modules, "own", type(sys)("own"))
    bench.patch.setitem(sys.modules, "own.models", bench.own())
    return f"{bench.toy} --model own.models:linear"


def weights(name, content, *fragments):
    @case(name, *fragments)
    def _(bench):
        file = "w.pt" if content in ("pickle", "module") else "w.safetensors"
        if content == "pickle":
            bench.file(file, pickle.dumps(Trap(bench.at / "ran")))
        elif content == "module":
            torch.save(nn.Linear(3, 3), bench.at / file)
        elif isinstance(content, dict):
            safetensors.torch.save_file(content, bench.at / file)
        else:
            bench.file(file, content)
        return f"--model digits_cure --weights {file}"


weights("corrupt weights", b"\x07" * 100, "w.safetensors", "not a safetensors file", "save it again")
weights("empty weights", b"", "w.safetensors", "the file is empty")
weights(
    "weights of another network", {"fc.weight": torch.ones(2)}, "w.safetensors", "not the weights of this"
)
weights("a web page for weights", "<!DOCTYPE html><title>Sign in</title>", "w.safetensors", "web page")
weights("weights that run code", "pickle", "w.pt", "could run code", "refused", "state_dict()")
weights("a whole module", "module", "w.pt", "could run code", "state_dict()")


@case("weights with another digest", "normal.safetensors", "sha256", "expected 000000000000")
def _(bench):
    return bench.card(sha256=f'"{"0" * 64}"')


OWN_MODELS = {
    "missing": ("no attribute 'missing'",),
    "text": ("returned str, not a torch.nn.Module",),
    "broken": ("RuntimeError: first line second line",),
    "wants": ("without arguments failed", "width"),
    "network": ("is a Linear", "name a function"),
    "nan": ("NaN or infinite logits for 20 of 20 images", "npz:toy"),
    "ten": None,  # fits: an archive knows only the labels that occur in it
    "volume": ("logits of shape (B, classes)", "(20, 3, 1)"),
    "pair": ("(20, 1, 2, 2)", "tuple"),
    "large": ("(20, 1, 2, 2)", "768"),
    "noisy": ("output is random", "--allow-unreliable"),
}
for _name, _fragments in OWN_MODELS.items():
    if _fragments:
        simple(f"own model: {_name}", f"TOY --model own_models:{_name}", *_fragments)


@case("wrong number of classes", "3 outputs", "folder:images", "2 classes")
def _(bench):
    return bench.toy.replace("--dataset npz --data-dir toy.npz", bench.pictures((2, 2), (2, 2)))


@case("too few outputs for the labels", "3 outputs", "npz:toy", "10 classes")
def _(bench):
    bench.arrays(y=np.arange(20) % 10)
    return bench.toy


@case("no model for other data", "--dataset npz", "name a model with --model")
def _(bench):
    return f"--dataset npz --data-dir {bench.colour()}"


@case("wrong input shape", "digits_cure", "(1, 8, 8)", "npz:colour", "(3, 32, 32)")
def _(bench):
    return f"--model digits_cure --dataset npz --data-dir {bench.colour()}"


# --- places -------------------------------------------------------------------------------------------


@case("out is a file", "taken", "a file")
def _(bench):
    bench.file("taken", "mine")
    return f"{bench.toy} --out taken"


@case("out below a file", "taken/below", "a file")
def _(bench):
    bench.file("taken", "mine")
    return f"{bench.toy} --out taken/below/it"


@case("out where nobody may write", "/proc/nowhere", "cannot be written")
def _(bench):
    return f"{bench.toy} --out /proc/nowhere"


@case("out holds a run", "run/own_models_linear", "already holds a run", "--resume", "another --out")
def _(bench):
    bench.run()
    return f"{bench.toy} --out run"


@case("out holds a run of the second model", "run/own_models_linear", "already holds a run")
def _(bench):
    bench.run()
    return f"{bench.toy} --out run".replace("--model", "--model own_models:ten --model")


RESUMED = {
    "another seed": (lambda bench: "--seed 5", "seed was 0, now 5"),
    "fewer samples": (lambda bench: "--n 5", "data was"),
    "other data": (lambda bench: f"--data-dir {bench.arrays('other.npz', y=np.arange(20) % 2)}", "data was"),
    "another battery": (
        lambda bench: bench.battery(BATTERY_CARD.replace("1/10", "1/5")).removeprefix("--model digits_cure "),
        "battery was",
    ),
    "another precision": (lambda bench: "--precision bf16", "precision was fp32, now bf16"),
}
for _name, (_options, _fragment) in RESUMED.items():

    @case(f"resume with {_name}", "run/own_models_linear", "holds another run", _fragment, "another --out")
    def _(bench, options=_options):
        bench.run("--precision fp32")
        return f"{bench.toy} --precision fp32 {options(bench)} --out run --resume"


# --- records ------------------------------------------------------------------------------------------

simple("report of nothing", "report", "Missing argument 'RUNS...'")
simple("report of what is not there", "report nowhere", "nowhere", "no such run directory")
simple("report of no run", "report cards", "cards", "not a run", "manifest.json")
simple("report of two runs to nowhere", "report cards cards", "several runs", "--out")
simple("merge of no run", "merge cards --out joined", "cards", "not a run")
simple("merge to nowhere", "merge cards", "Missing option '--out'")


@case("report of an unfinished run", "own_models_linear", "not finished", "--resume")
def _(bench):
    bench.manifest(status="running")
    return "report run"


@case("report of a part", "own_models_linear", "part 1/2", "cure-bench merge")
def _(bench):
    bench.parts(1)
    return "report part1"


@case("manifest that is no JSON", "run/own_models_linear/manifest.json", "cannot be read")
def _(bench):
    bench.file(bench.run() + "/manifest.json", '{"schema_version": 1, ')
    return "report run"


@case("manifest with a line missing", "manifest.json", "model", "Field required")
def _(bench):
    bench.file(bench.run() + "/manifest.json", '{"schema_version": 1}')
    return "report run"


@case("schema from the future", "manifest.json", "schema version 99", "upgrade robustbench-cure")
def _(bench):
    bench.manifest(schema_version=99)
    return "report run"


@case("resume a manifest that is no JSON", "manifest.json", "cannot be read")
def _(bench):
    bench.file(bench.run() + "/manifest.json", "{")
    return f"{bench.toy} --out run --resume"


@case("table cut short", "samples.parquet", "cannot be read", "--resume")
def _(bench):
    file = bench.at / bench.run() / "samples.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return "report run"


@case("table missing", "samples.parquet", "no such file", "--resume")
def _(bench):
    (bench.at / bench.run() / "samples.parquet").unlink()
    return "report run"


def _table(bench, change):
    import pandas as pd

    file = bench.at / bench.run() / "samples.parquet"
    change(pd.read_parquet(file)).to_parquet(file)
    return "report run"


@case("table without a column", "samples.parquet", "column 'fgsm.broken' is missing")
def _(bench):
    return _table(bench, lambda table: table.drop(columns="fgsm.broken"))


@case("table of another type", "samples.parquet", "cannot be read")
def _(bench):
    return _table(bench, lambda table: table.assign(label="a cat"))


@case("table with fewer rows", "samples.parquet", "19 rows", "20", "--resume")
def _(bench):
    return _table(bench, lambda table: table[:-1])


@case("report into a file", "taken", "cannot be written")
def _(bench):
    bench.run()
    bench.file("taken", "mine")
    return "report run --out taken"


def parts(bench, *wanted, seed=0):
    """Parts of a run of 20 samples in 3 shards."""
    for part in wanted:
        bench.run(f"--shard {part}/2 --shard-size 8 --seed {seed}", f"part{part}")


Bench.parts = parts


@case("merge with a part missing", "shards 1 of 3 are missing", "--shard")
def _(bench):
    bench.parts(1)
    return "merge part1 --out joined"


@case("merge of one part twice", "part1/own_models_linear", "shard 0 is also in another part")
def _(bench):
    bench.parts(1)
    return "merge part1 part1 --out joined"


@case("merge of different runs", "part2/own_models_linear", "holds another run", "seed")
def _(bench):
    bench.parts(1)
    bench.parts(2, seed=1)
    return "merge part1 part2 --out joined"


@case("merge into a run", "run/own_models_linear", "already holds a run", "another --out")
def _(bench):
    bench.parts(1, 2)
    bench.run()
    return "merge part1 part2 --out run"


@pytest.mark.parametrize(
    "line",
    ["compare a b --level nan", "compare a b --level 0", "universal --delta nan", "universal --delta 1"],
)
def test_a_number_outside_its_range_is_named(line, capsys):
    message = refused(capsys, line.split())
    assert line.split()[-1] in message
    assert line.split()[-2] in message


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(bench, capsys, name):
    prepare, fragments = CASES[name]
    command = prepare(bench)
    arguments = shlex.split(command)
    if not arguments or arguments[0] not in VERBS:
        arguments = ["evaluate", *arguments]
    if arguments[0] == "evaluate" and "--out" not in arguments and "--resume" not in arguments:
        arguments += ["--out", "fresh"]
    before = {file: (bench.at / file).read_bytes() for file in files_below(bench.at)}
    message = refused(capsys, arguments)
    for fragment in fragments:
        assert fragment in message
    after = {file: (bench.at / file).read_bytes() for file in files_below(bench.at)}
    assert after == before
    assert not (bench.at / "fresh").exists()
    assert not (bench.at / "joined").exists()
    assert not (bench.at / "ran").exists()


def test_there_are_many_cases():
    assert len(CASES) >= 130


# --- a disk that is full ------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """No file may grow beyond ``size`` bytes: writing fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hidden(path):
    return [file for file in files_below(path) if Path(file).name.startswith(".") or file.endswith(".tmp")]


def test_a_disk_full_at_the_start_leaves_nothing(bench, capsys):
    with largest_file(100):
        message = refused(capsys, shlex.split(f"evaluate {bench.toy} --out run"))
    assert "run/own_models_linear/manifest.json: cannot be written: File too large" in message
    assert files_below(bench.at / "run") == []


def test_a_disk_full_on_the_way_keeps_what_is_whole_and_can_be_resumed(bench, capsys):
    whole = bench.at / bench.run(out="whole") / "samples.parquet"
    limit = (whole.parent / "manifest.json").stat().st_size
    assert limit < whole.stat().st_size
    capsys.readouterr()
    with largest_file(limit), pytest.raises(SystemExit) as stop:
        main(shlex.split(f"evaluate {bench.toy} --out run"))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert last.startswith(PREFIX)
    assert "shards/0000.parquet: cannot be written: " in last
    assert "File too large" in last
    assert files_below(bench.at / "run") == ["own_models_linear/manifest.json"]
    assert json.loads((bench.at / "run/own_models_linear/manifest.json").read_text())["status"] == "running"
    bench.run("--resume")
    assert (bench.at / "run/own_models_linear/samples.parquet").read_bytes() == whole.read_bytes()


def test_a_disk_full_of_adversarials(bench, capsys):
    x = np.random.default_rng(0).uniform(0, 1, (20, 3, 16, 16)).astype(np.float32)
    bench.arrays(x=x)
    command = f"evaluate {bench.toy} --save-adversarials --out run".replace(":linear", ":large")
    with largest_file(12_000), pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "adversarials/0000-fgsm.safetensors: cannot be written: File too large" in last
    assert hidden(bench.at / "run") == []
    assert not (bench.at / "run" / "own_models_large" / "shards").exists()


def test_a_disk_full_during_the_report_keeps_the_old_one(bench, capsys):
    bench.run()
    page = (bench.at / "run" / "report.html").read_bytes()
    files = files_below(bench.at / "run")
    with largest_file(len(page) // 2):
        message = refused(capsys, ["report", "run"])
    assert "run/report.html: cannot be written: File too large" in message
    assert (bench.at / "run" / "report.html").read_bytes() == page
    assert files_below(bench.at / "run") == files


def test_a_disk_without_space_is_said_so(bench, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    message = refused(capsys, shlex.split(f"evaluate {bench.toy} --out run"))
    assert "manifest.json: cannot be written: No space left on device" in message
    assert files_below(bench.at / "run") == []


# --- failures that are nobody's input -----------------------------------------------------------------


def test_what_nobody_foresaw_is_one_line_too_and_can_be_looked_into(bench, capsys, monkeypatch):
    def broken(*_):
        raise KeyError("first\nsecond")

    monkeypatch.setattr("robustbench_cure.cli.main.inventory.places", broken)
    message = refused(capsys, ["where"], code=3)
    assert "unexpected KeyError" in message
    assert "CURE_BENCH_DEBUG=1" in message
    monkeypatch.setenv("CURE_BENCH_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["where"])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (0, "the model failed during the clean pass: tired"),
        (2, "attack 'fgsm' failed: tired"),  # images go forward at most sixteen at a time here
        (3, "the model failed during the check of attack 'fgsm': tired"),
    ],
)
def test_a_model_that_fails_later_is_a_failed_run(bench, capsys, passes, message):
    # Passes are counted from the moment at which the run has a folder: what came before is preflight.
    text = "\nfrom pathlib import Path\nclass Tired(Linear):\n    n = 0\n    def forward(self, x):\n"
    text += "        self.n += Path('run').exists()\n"
    text += f"        if self.n > {passes}:\n            raise RuntimeError('tired\\nvery')\n"
    text += "        return super().forward(x)\ndef tired(): return Tired()\n"
    bench.file("own_models.py", OWN + text)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(f"evaluate {bench.toy} --batch-size 20 --out run".replace(":linear", ":tired")))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 3
    assert last.startswith(PREFIX)
    assert message in last
    assert hidden(bench.at / "run") == []


# --- as a process of its own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "fragment"),
    [
        ("list planets", "'planets' is not one of"),
        ("evaluate --model digits_cure --weights w.pt --out fresh", "could run code"),
    ],
)
def test_a_process_ends_with_the_code_and_the_line(bench, command, fragment):
    bench.file("w.pt", pickle.dumps(Trap(bench.at / "ran")))
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_cure", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr)
    assert fragment in done.stderr
    assert not (bench.at / "fresh").exists()
    assert not (bench.at / "ran").exists()


def test_what_fits_is_accepted(bench):
    """The toy from which every case departs, and outputs beyond the labels of an archive."""
    bench.run()
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(f"evaluate {bench.toy} --out ten".replace(":linear", ":ten")))
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(f"evaluate {bench.toy} --out noisy --allow-unreliable".replace(":linear", ":noisy")))
    assert stop.value.code == 0
