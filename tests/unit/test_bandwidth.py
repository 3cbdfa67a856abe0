"""The look at a disk leaves nothing behind, and holes are no data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratool.api.least_time import fastest
from loratool.store.bandwidth import read_speed, write_speed


def test_nothing_is_left(tmp_path: Path) -> None:
    before = tmp_path.stat()
    found = write_speed(tmp_path)
    after = tmp_path.stat()
    assert found is None or found > 0
    assert not any(tmp_path.iterdir()) and after.st_mtime_ns == before.st_mtime_ns
    assert write_speed(tmp_path / "none") is None


def test_holes_and_crumbs_tell_nothing(tmp_path: Path) -> None:
    """A file of holes reads at the speed of memory."""
    hollow, small = tmp_path / "hollow", tmp_path / "small"
    hollow.touch()
    os.truncate(hollow, 1 << 30)
    small.write_bytes(bytes(1 << 16))
    assert read_speed([hollow, small, tmp_path / "none"]) is None


def test_data_tell(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(32 << 20))
    found = read_speed([path])
    assert found is None or found > 0


@pytest.mark.parametrize(
    ("read", "write", "one_disk", "seconds"),
    [(10.0, 5.0, True, 50.0), (10.0, 5.0, False, 40.0), (None, 5.0, True, 40.0),
     (10.0, None, True, 10.0)],
)  # fmt: skip
def test_one_disk_does_one_thing_at_a_time(
    read: float | None, write: float | None, one_disk: bool, seconds: float
) -> None:
    found = fastest(100, read, 200, write, one_disk=one_disk)
    assert found is not None and found.seconds == seconds
    assert fastest(100, None, 200, None, one_disk=True) is None
