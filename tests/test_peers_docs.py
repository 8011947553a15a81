"""The page for those who come from other packages: its blocks run, one after the other, and agree."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "peers.md"


def test_every_block_runs_and_both_sides_agree():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Foolbox imports
        for number, block in enumerate(blocks):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    assert sum(block.count("assert ") for block in blocks) == 3


def test_the_version_in_the_advice_is_one_that_can_be_installed():
    page = PAGE.read_text(encoding="utf-8")
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "peers" in project["optional-dependencies"]
    assert "robustbench-cure[peers]" in page
