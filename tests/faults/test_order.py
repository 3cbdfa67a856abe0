"""A kill keeps the page cache; only the order of the calls shows that a power cut loses nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults import strace
from tests.faults.scene import Scene
from tests.faults.strace import Call
from tests.faults.test_crash import make_merge, make_scene

NAMING = ("rename", "renameat2", "unlink", "unlinkat", "mkdir", "rmdir")
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", "/bin")


def first(calls: Sequence[Call], start: int, wanted: Callable[[Call], bool]) -> int:
    """Index of the first call from ``start`` on that succeeded and is wanted."""
    for index in range(start, len(calls)):
        if wanted(calls[index]) and not calls[index].failed:
            return index
    raise AssertionError("the call that makes it durable is missing")


def synced(path: str) -> Callable[[Call], bool]:
    return lambda call: call.name == "fsync" and call.fd_path == path


def renames(calls: Sequence[Call]) -> list[tuple[int, str, str]]:
    found = [(i, c) for i, c in enumerate(calls) if c.name in ("rename", "renameat2")]
    return [(i, *c.strings[:2]) for i, c in found if not c.failed]  # type: ignore[misc]


def check_order(calls: Sequence[Call], output: Path) -> None:
    staging = f"{output}.loratool-partial"
    journal, shards = f"{staging}/.journal", 0
    for index, source, target in renames(calls):
        folder = str(Path(target).parent)
        dir_sync = first(calls, index, synced(folder))
        if source == staging:
            continue  # a folder's own names are checked below
        writes = [i for i, c in enumerate(calls) if "write" in c.name and c.fd_path == source]
        if writes:
            assert max(writes) < first(calls, max(writes), synced(source)) < index, source
        if not Path(target).name.startswith("model-") and target != f"{staging}/{output.name}":
            continue
        shards += 1
        entries = [i for i in range(index, len(calls)) if calls[i].fd_path == journal]
        assert len(entries) >= 2, "no line in the journal, or no sync of it"
        line, sync = entries[:2]
        assert dir_sync < line, f"{target} is in the journal before its name is durable"
        assert (calls[line].name, calls[sync].name) == ("write", "fsync")
        assert Path(target).name in calls[line].text
    assert shards
    final, source, _ = next(r for r in renames(calls) if r[2] == str(output))
    inside = [i for i, _, target in renames(calls) if Path(target).parent == Path(staging)]
    assert max(inside) < first(calls, max(inside), synced(staging)) < final
    gone = [i for i, c in enumerate(calls) if c.strings[:1] == [f"{staging}/.journal"]
            and c.name == "unlink"]  # fmt: skip
    if source == staging:
        assert gone and gone[-1] < first(calls, gone[-1], synced(staging)) < final
    else:  # a file: until its name is durable the journal vouches for it
        assert gone and final < first(calls, final, synced(str(output.parent))) < gone[-1]


def check_contained(calls: Sequence[Call], scene: Scene) -> None:
    """Nothing is changed beside the output, nothing read but inputs and the interpreter."""
    work, inputs = str(scene.work), str(scene.inputs)
    homes = (*SYSTEM, inputs, work, str(strace.ROOT), sys.base_prefix)
    homes = (*homes, sys.prefix, *filter(None, sys.path))
    for call in calls:
        if call.name == "openat":
            (path,) = call.strings[:1]
            if any(flag in call.text for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")):
                assert path.startswith((work, "/dev/", "/proc/self")), call
            elif not call.failed and path.startswith("/"):
                assert path.startswith(homes) or os.path.realpath(path).startswith(homes), call
        elif call.name in NAMING and not call.failed and "AT_REMOVEDIR" not in call.text:
            paths = [p for p in call.strings if p.startswith("/")]
            assert all(path.startswith(work) for path in paths), call


@pytest.mark.parametrize("kind", ["folder", "file", "merge"])
def test_order_and_containment(kind: str, tmp_path: Path) -> None:
    scene = make_merge(tmp_path) if kind == "merge" else make_scene(kind, tmp_path)
    calls = strace.trace(scene.words, tmp_path / "log", (*strace.CHANGING, "openat"))
    check_order(calls, scene.output)
    check_contained(calls, scene)


def test_the_check_sees_a_missing_sync(tmp_path: Path) -> None:
    scene = make_scene("folder", tmp_path)
    calls = strace.trace(scene.words, tmp_path / "log")
    check_order(calls, scene.output)
    syncs = [i for i, call in enumerate(calls) if call.name == "fsync"]
    harmless = []
    for index in syncs:
        try:
            check_order([c for i, c in enumerate(calls) if i != index], scene.output)
            harmless.append(calls[index].fd_path)
        except AssertionError:
            pass
    # Durability of the journal's start and of the staging folder itself loses work, never bytes;
    # small files share the last sync of their folder.
    staging = f"{scene.output}.loratool-partial"
    assert set(harmless) <= {staging, str(scene.work)}
    assert len(harmless) < len(syncs) / 2
