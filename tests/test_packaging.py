"""What is shipped: the wheel holds code and cards and nothing else, and the packages we name all import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import robustbench_cure

ROOT = Path(__file__).resolve().parents[1]
CARD_FOLDERS = ("models", "attacks", "reports")
#: What may lie in the card folders: cards, small weights, evidence and rendered reports. No code.
DATA_SUFFIXES = {
    ".toml", ".md", ".json", ".jsonl", ".csv", ".parquet", ".safetensors",
    ".html", ".tex", ".svg", ".png", ".txt", ".gz",
}  # fmt: skip


def cards() -> list[str]:
    """Every card of the checkout, relative to it."""
    folders = ("models", "attacks", "reports/published")
    return sorted(p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*.toml"))


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names of the files in a freshly built wheel."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_installs_one_import_package(wheel):
    info = f"robustbench_cure-{project()['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {"robustbench_cure", info}


def test_the_wheel_holds_every_card(wheel):
    packaged = sorted(name for name in wheel if "/_cards/" in name and name.endswith(".toml"))
    assert packaged == [f"robustbench_cure/_cards/{name}" for name in cards()]
    assert len(packaged) >= 20


def test_the_wheel_holds_the_small_weights_and_no_others(wheel):
    weights = sorted(name for name in wheel if name.endswith((".safetensors", ".pt", ".pth", ".npz")))
    folder = ROOT / "models"
    small = [*folder.glob("digits/*.safetensors"), *folder.glob("cifar10/resnet18s_*.safetensors")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in small)
    assert weights == [f"robustbench_cure/_cards/{name}" for name in names]
    assert all(path.stat().st_size < 3_000_000 for path in small)


def test_the_wheel_holds_no_code_among_the_cards(wheel):
    suffixes = {Path(name).suffix for name in wheel if "/_cards/" in name}
    assert suffixes <= {".toml", ".safetensors"}


def test_the_wheel_holds_all_of_the_package(wheel):
    files = [path for path in (ROOT / "robustbench_cure").rglob("*") if path.is_file()]
    wanted = [path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts]
    assert "robustbench_cure/py.typed" in wanted
    assert set(wanted) <= set(wheel)


def test_the_wheel_holds_the_licence(wheel):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


@pytest.mark.parametrize("folder", CARD_FOLDERS)
def test_card_folders_hold_data_only(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    strange = [p for p in files if p.suffix not in DATA_SUFFIXES and p.name not in (".gitignore", ".gitkeep")]
    assert not strange
    assert files


def test_git_ignores_no_card():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    weights = [p.relative_to(ROOT).as_posix() for p in (ROOT / "models").rglob("*.safetensors")]
    command = ["git", "check-ignore", "--no-index", "--", *cards(), *weights]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, f"ignored: {run.stdout}{run.stderr}"


def test_the_version_is_the_same_everywhere():
    version = project()["version"]
    assert robustbench_cure.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_named_alike():
    assert project()["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert "\nlicense: MIT\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# --- the packages we build on, in a fresh interpreter ------------------------------------------------


def run_python(script: str, *, path: Path | None = None) -> str:
    """Standard output of a fresh interpreter; `path` goes first on its import path."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    run = subprocess.run([sys.executable, "-c", prefix + script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_named_package_imports():
    output = run_python(
        "import importlib, sys, warnings\n"
        "for name in ('torch', 'torchvision', 'torchattacks', 'pandas', 'jinja2', 'click', 'pytest'):\n"
        "    importlib.import_module(name)\n"
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    module = import_robustbench()\n"
        "    assert import_robustbench() is module\n"
        "print(module.__name__, callable(module.load_model), callable(module.benchmark))\n"
    )
    assert output == "robustbench True True"


def test_one_copy_of_autoattack_serves_both_names():
    output = run_python(
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "import_robustbench()\n"
        "import autoattack.state, pyautoattack.state\n"
        "print(autoattack.state.EvaluationState.__name__)\n"
        "import importlib.metadata as m\n"
        "own = 'autoattack' in m.packages_distributions()\n"
        "print(own or autoattack.state is pyautoattack.state)\n"
    )
    assert output.split() == ["EvaluationState", "True"]


def test_the_bridge_imports_nothing_before_it_is_asked():
    output = run_python(
        "import sys, robustbench_cure.interop.robustbench\n"
        "print(sorted({'robustbench', 'pyautoattack', 'autoattack', 'torch'} & set(sys.modules)))\n"
    )
    assert output == "[]"


def test_an_overwritten_robustbench_is_named_with_its_repair(tmp_path):
    info = tmp_path / "robustbench-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 9.9\n")
    (info / "RECORD").write_text(
        "robustbench/__init__.py,sha256=AAAA,1\nrobustbench-9.9.dist-info/RECORD,,\n"
    )
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("raise ImportError('a name\\n is gone')\n")
    message = run_python(
        "from robustbench_cure.errors import UsageError\n"
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "try:\n    import_robustbench()\n"
        "except UsageError as error:\n    print(error)\n",
        path=tmp_path,
    )
    assert "\n" not in message
    assert message.startswith("robustbench cannot be imported: a name is gone; 1 of its files")
    assert message.endswith("python -m pip install --force-reinstall --no-deps robustbench==9.9")


def test_an_intact_robustbench_is_not_blamed(tmp_path):
    info = tmp_path / "robustbench-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 9.9\n")
    (info / "RECORD").write_text("robustbench/__init__.py,,\n")
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("import a_package_that_is_not_there\n")
    message = run_python(
        "from robustbench_cure.errors import UsageError\n"
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "try:\n    import_robustbench()\n"
        "except UsageError as error:\n    print(error)\n",
        path=tmp_path,
    )
    assert "a_package_that_is_not_there" in message
    assert "torchattacks" not in message
