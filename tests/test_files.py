"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically


def test_a_file_is_made_beside_its_place_and_moved_there(tmp_path):
    place, seen = tmp_path / "new" / "run.json", []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        assert not place.exists()
        temporary.write_text("all of it")

    write_atomically(place, write)
    assert seen[0].parent == place.parent  # another disk could not be renamed from
    assert seen[0].name.startswith(".run.json.")
    assert place.read_text() == "all of it"
    assert place.stat().st_mode & 0o777 == 0o644
    assert list(place.parent.iterdir()) == [place]
    write_atomically(place, lambda temporary: temporary.write_text("other"))
    assert place.read_text() == "other"


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [
        (FULL, UsageError, r"run\.json: cannot be written: No space left on device$"),
        (ValueError("half"), ValueError, "half"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error, seen, words):
    place = tmp_path / "run.json"
    place.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(seen, match=words):
        write_atomically(place, write)
    assert list(tmp_path.iterdir()) == [place]
    assert place.read_text() == "old"
