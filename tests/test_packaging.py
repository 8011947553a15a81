"""What is shipped: the wheel holds code and cards and nothing else, and the packages we name all import."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import robustbench_cure
from robustbench_cure.cli.site import site

ROOT = Path(__file__).resolve().parents[1]
CARD_FOLDERS = ("models", "attacks", "reports")
#: What may lie in the card folders: cards, small weights, evidence and rendered reports. No code.
DATA_SUFFIXES = {
    ".toml", ".md", ".json", ".jsonl", ".csv", ".parquet", ".safetensors",
    ".tex", ".svg", ".png",
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


def test_the_tree_that_travels_is_small():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in run.stdout.split("\0") if name and not name.startswith("models/")]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 14_000_000


def test_links_of_the_documentation_lead_to_files():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    links = [
        (p, link) for p in pages for link in re.findall(r"\]\(([^)#\s]+)", p.read_text(encoding="utf-8"))
    ]
    local = [(p, link) for p, link in links if not re.match(r"[a-z]+:", link)]
    assert len(local) >= 20
    assert not [(p.name, link) for p, link in local if not (p.parent / link).exists()]


def test_the_pages_workflow_builds_the_stored_runs_and_publishes_that_folder():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8"))
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    (command,) = (step["run"] for step in steps if "cure-bench site" in step.get("run", ""))
    options = site.make_context("site", shlex.split(command)[2:]).params
    assert options["runs"] == (Path("reports/measured"),)
    assert not options["tables_only"]
    assert options["records_url"].endswith("/reports/measured")
    actions = {step["uses"].split("@")[0]: step for step in steps if "uses" in step}
    assert Path(actions["actions/upload-pages-artifact"]["with"]["path"]) == options["out"]
    assert {"actions/configure-pages", "actions/deploy-pages"} <= set(actions)
    assert flow["jobs"]["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}


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


def run_python(script: str) -> dict[str, Any]:
    """What a fresh interpreter prints as JSON."""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What one interpreter sees that imports the bridge, then RobustBench by it, then all we name."""
    return run_python(
        "import importlib, importlib.metadata, json, sys, warnings\n"
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "heavy = {'robustbench', 'pyautoattack', 'autoattack', 'torch'}\n"
        "seen = {'early': sorted(heavy & set(sys.modules))}\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    module = import_robustbench()\n"
        "    seen['once'] = import_robustbench() is module\n"
        "seen['name'] = module.__name__\n"
        "seen['callable'] = [callable(module.load_model), callable(module.benchmark)]\n"
        "import autoattack.state, pyautoattack.state\n"
        "seen['state'] = autoattack.state.EvaluationState.__name__\n"
        "own = 'autoattack' in importlib.metadata.packages_distributions()\n"
        "seen['one copy'] = own or autoattack.state is pyautoattack.state\n"
        "names = ('torch', 'torchvision', 'torchattacks', 'pandas', 'jinja2', 'click', 'pytest')\n"
        "seen['others'] = [importlib.import_module(name).__name__ for name in names]\n"
        "print(json.dumps(seen))\n"
    )


def test_every_named_package_imports(imported):
    assert (imported["name"], imported["once"], imported["callable"]) == ("robustbench", True, [True, True])
    assert len(imported["others"]) == 7


def test_one_copy_of_autoattack_serves_both_names(imported):
    assert (imported["state"], imported["one copy"]) == ("EvaluationState", True)


def test_the_bridge_imports_nothing_before_it_is_asked(imported):
    assert imported["early"] == []


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, str]:
    """What the bridge says of an overwritten RobustBench, and of an intact one that lacks a package."""
    folders = {}
    for name, listed, code in (
        ("overwritten", "sha256=AAAA,1", "raise ImportError('a name\\n is gone')\n"),
        ("intact", ",", "import a_package_that_is_not_there\n"),
    ):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        info = folder / "robustbench-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 9.9\n")
        (info / "RECORD").write_text(
            f"robustbench/__init__.py,{listed}\nrobustbench-9.9.dist-info/RECORD,,\n"
        )
        (folder / "robustbench").mkdir()
        (folder / "robustbench" / "__init__.py").write_text(code)
    return run_python(
        "import importlib, json, sys\n"
        "from robustbench_cure.errors import UsageError\n"
        "from robustbench_cure.interop.robustbench import import_robustbench\n"
        "said = {}\n"
        f"for name, folder in { ({name: str(folder) for name, folder in folders.items()})!r}.items():\n"
        "    sys.path.insert(0, folder)\n"
        "    importlib.invalidate_caches()\n"
        "    try:\n        import_robustbench()\n"
        "    except UsageError as error:\n        said[name] = str(error)\n"
        "    sys.path.remove(folder)\n"
        "print(json.dumps(said))\n"
    )


def test_an_overwritten_robustbench_is_named_with_its_repair(refusals):
    message = refusals["overwritten"]
    assert "\n" not in message
    assert "a name is gone; 1 of its files" in message
    assert message.endswith("python -m pip install --force-reinstall --no-deps robustbench==9.9")


def test_an_intact_robustbench_is_not_blamed(refusals):
    assert "a_package_that_is_not_there" in refusals["intact"]
    assert "torchattacks" not in refusals["intact"]
