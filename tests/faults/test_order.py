"""A kill keeps the page cache; only the order of the calls shows that a power cut loses nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.scenes import SCENES
from tests.faults.server import Moment, Server
from tests.faults.sweep import Stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is for Linux")

NAMING = ("rename", "renameat", "renameat2", "link", "linkat")
NOTES = (".journal", ".loratool-run", ".loratool-series")


def first(moments: Sequence[Moment], start: int, name: str, path: str) -> int:
    """Index of the first call of this kind from ``start`` on; the number of calls if none is."""
    found = (i for i in range(start, len(moments)) if moments[i].name == name)
    return next((i for i in found if moments[i].paths[0] == path), len(moments))


def check_order(moments: Sequence[Moment], outputs: Sequence[str]) -> None:
    """What must be on the disk before what."""
    for i, moment in enumerate(moments):
        if moment.name in NAMING:
            check_name(moments, i, *moment.paths, outputs)
        if moment.name == "write" and moment.paths[0].endswith(NOTES):
            synced = first(moments, i, "fsync", moment.paths[0])
            between = {m.name for m in moments[i + 1 : synced]}
            assert synced < len(moments) and not between, f"{moment}: {between} before it is synced"


def check_name(
    moments: Sequence[Moment], at: int, source: str, target: str, outputs: Sequence[str]
) -> None:
    written = [i for i in range(at) if "write" in moments[i].name and moments[i].paths[0] == source]
    if written:
        assert first(moments, written[-1], "fsync", source) < at, f"{source} is not synced"
    folder = str(Path(target).parent)
    durable = first(moments, at, "fsync", folder)
    assert durable < len(moments), f"the name {target} is not synced"
    meanwhile = moments[at + 1 : durable]
    assert not any(m.name == "write" and m.paths[0].endswith(NOTES) for m in meanwhile), (
        f"{target} is in the journal before its name is durable"
    )
    if target in outputs:
        check_final(moments, at, durable, source)


def check_final(moments: Sequence[Moment], at: int, durable: int, source: str) -> None:
    """An output gets its name: all in it is durable, and what it replaces is not gone yet."""
    staging = source if source.endswith(".loratool-partial") else str(Path(source).parent)
    inside = [i for i in range(at) if moments[i].name in NAMING
              and Path(moments[i].paths[1]).is_relative_to(staging)]  # fmt: skip
    for i in inside:
        assert first(moments, i, "fsync", str(Path(moments[i].paths[1]).parent)) < at
    journal = ("unlink", (f"{staging}/.journal",))
    ends = [i for i, m in enumerate(moments) if (m.name, m.paths) == journal]
    if source == staging:
        assert first(moments, max(i for i in ends if i < at), "fsync", staging) < at
    else:  # a file: until its name is durable the journal vouches for it
        assert max(ends) > durable
    gone = [m for m in moments[at:durable] if m.name in ("unlink", "unlinkat", "rmdir")]
    assert all(m.paths[0] == source for m in gone), f"deleted before it is replaced: {gone}"


def test_order_and_containment(stage: Stage) -> None:
    work, paths = str(stage.work), [path for m in stage.moments for path in m.paths]
    assert all(f"{path}/".startswith(f"{work}/") for path in paths)
    if stage.scene.is_steady:  # else one thread may write before another's line is synced
        check_order(stage.moments, [str(stage.root / place) for place in stage.scene.outputs])


def test_the_check_sees_a_missing_sync(tmp_path: Path, server: Server, home: Path) -> None:
    merge = Stage(next(s for s in SCENES if s.name == "merge"), tmp_path, server, home)
    moments, outputs = merge.moments, [str(tmp_path / "work" / "out")]
    syncs = [i for i, moment in enumerate(moments) if moment.name == "fsync"]
    harmless = []
    for index in syncs:
        try:
            check_order([m for i, m in enumerate(moments) if i != index], outputs)
            harmless.append(moments[index].paths[0])
        except AssertionError:
            pass
    # Durability of the journal's start and of the staging folder itself loses work, never bytes;
    # small files share the last sync of their folder.
    staging = f"{outputs[0]}.loratool-partial"
    assert set(harmless) <= {staging, str(merge.work)}
    assert len(harmless) < len(syncs) / 2
