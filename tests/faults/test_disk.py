"""Full disks, limits, signals, second writers, damaged and changed files."""

from __future__ import annotations

import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratool.errors import LoratoolError
from loratool.store.journal import read_journal
from loratool.store.patch_file import PatchWriter
from loratool.store.staging import Making
from loratool.store.writer import StagedOutput
from tests.budget.test_memory import sparse_model
from tests.faults import copy_run, process
from tests.faults.scene import SHARD_BYTES, Scene, fingerprint, make_scene, write_model
from tests.faults.scenes import SCENES
from tests.faults.server import Fault, Server
from tests.faults.sweep import Stage, tree
from tests.make import random_factors, save_adapter


@contextmanager
def held(scene: Scene, shards: int) -> Iterator[subprocess.Popen[str]]:
    """A copy that has finished so many shards, begun the next one, and waits for a line."""
    pieces = shards * SHARD_BYTES // copy_run.PIECE + 1
    with process.start([*scene.words, "--hold", pieces], stdin=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child


def interrupt_copy(scene: Scene, after: int) -> Path:
    """Kill a copy once ``after`` shards are finished; returns its staging folder."""
    with held(scene, after) as child:
        child.kill()
        child.communicate()
    return scene.work / f"{scene.name}.loratool-partial"


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return make_scene("folder", tmp_path)


def test_a_finished_shard_is_not_made_again(scene: Scene) -> None:
    staging = interrupt_copy(scene, 1)
    inode = (staging / "model-00001-of-00003.safetensors").stat().st_ino
    done = process.run(scene.words)
    assert done.returncode == 0 and "taken over" in done.stdout
    assert (scene.output / "model-00001-of-00003.safetensors").stat().st_ino == inode
    assert fingerprint(scene.output) == scene.expected


@pytest.mark.parametrize("position", [0, 5000, 69_631])
def test_a_damaged_shard_is_made_again(scene: Scene, position: int) -> None:
    shard = interrupt_copy(scene, 1) / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    done = process.run(scene.words)
    assert done.returncode == 0 and "damaged" in done.stdout
    assert fingerprint(scene.output) == scene.expected


def test_a_shard_of_another_input_is_made_again(scene: Scene) -> None:
    interrupt_copy(scene, 1)
    base = scene.inputs / "base" / "model-00001-of-00003.safetensors"
    data = bytearray(base.read_bytes())
    data[-1] ^= 1  # the same header, other weights
    base.write_bytes(data)
    done = process.run(scene.words)
    assert done.returncode == 0 and "inputs changed" in done.stdout
    made = (scene.output / base.name).read_bytes()
    assert made[-1] == data[-1]


def test_another_plan_needs_restart(scene: Scene) -> None:
    staging = interrupt_copy(scene, 1)
    other = write_model(scene.inputs / "other" / "base", seed=3)
    entry = (other / "model-00001-of-00003.safetensors").read_bytes()
    renamed = entry.replace(b"layers.0.proj", b"layers.9.proj")
    (other / "model-00001-of-00003.safetensors").write_bytes(renamed)
    index = other / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.0.proj", "layers.9.proj"))
    before = fingerprint(staging)
    words = [*process.COPY, other, scene.output]
    done = process.run(words)
    assert done.returncode == 5 and "LT-504" in done.stderr and "--restart" in done.stderr
    assert fingerprint(staging) == before
    assert process.run([*words, "--restart"]).returncode == 0
    assert scene.output.is_dir() and not staging.exists()


def test_two_writers_of_one_output(scene: Scene) -> None:
    with held(scene, 0) as one:
        other = process.run(scene.words)
        assert other.returncode == 5 and "LT-503" in other.stderr
        one.communicate("go on\n", timeout=60)
        assert one.returncode == 0
    assert fingerprint(scene.output) == scene.expected


@pytest.mark.parametrize("force", [False, True])
def test_many_writers_at_once(tmp_path: Path, force: bool) -> None:
    """Starts that fall into another run's last moments: one whole output, no debris."""
    scene = make_scene("force" if force else "folder", tmp_path)
    for _ in range(2):
        scene.reset()
        children = []
        for _ in range(8):
            children.append(process.start(scene.words))
            time.sleep(0.02)
        errors = []
        for child in children:
            with child:
                _, err = child.communicate(timeout=60)
            errors.append((child.returncode, err))
        assert {code for code, _ in errors} <= {0, 5}, errors
        assert [code for code, _ in errors].count(0) >= 1
        assert fingerprint(scene.output) == scene.expected
        assert [p.name for p in scene.work.iterdir()] == ["out"]


# ------------------------------------------------------------------------------ disk and limits


def test_a_small_disk_is_refused_before_the_work(scene: Scene) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk = scene.work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no mounting in this container")
    try:
        done = process.run([*process.COPY, scene.inputs / "base", disk / "out"])
        assert done.returncode == 6 and "LT-610" in done.stderr
        need = 3 * (64 << 10) * 51 // 50
        free = (128 << 10) - 4096  # the journal has a page
        assert f"{need:,} bytes" in done.stderr and f"{free:,} bytes free" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("end", ["write", "leave"])
def test_a_full_disk_under_patches_is_named(end: str, tmp_path: Path) -> None:
    """Small patches wait in a buffer, which is emptied when the file is made or left."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "undo.safetensors"
    with (
        pytest.raises(LoratoolError) as caught,
        StagedOutput(path, Making(is_folder=False, plan_id=None)) as output,
        PatchWriter(output) as writer,
    ):
        writer._file.close()
        writer._file = Path("/dev/full").open("w+b")  # noqa: SIM115
        writer.add("a", [b"patch"])
        if end == "write":
            writer.write({"tensors": {"a": {}}}, {})
    assert caught.value.code == "LT-611" and str(caught.value.file) == str(path)


@pytest.fixture
def merge(tmp_path: Path, server: Server, home: Path) -> Stage:
    return Stage(next(s for s in SCENES if s.name == "merge"), tmp_path, server, home)


def test_the_disk_fills_up_after_a_shard(merge: Stage) -> None:
    """The second file cannot be reserved: the first stays, and the message says so."""
    last = max(n for n, moment in enumerate(merge.moments, 1) if moment.name == "fallocate")
    done = merge.run(Fault("ENOSPC", last))
    assert done.code == 6 and "LT-611" in done.err
    assert "goes on (1 file finished)" in done.err
    staging = merge.work / "out.loratool-partial"
    assert [p.name for p in staging.iterdir() if p.suffix] == ["model-00001-of-00002.safetensors"]
    assert "1 file taken over" in merge.run(None).out
    assert tree(merge.work) == merge.end


@pytest.mark.parametrize(("errno", "code"), [("EDQUOT", "LT-612"), ("EIO", "LT-614")])
def test_quota_and_broken_disk(merge: Stage, errno: str, code: str) -> None:
    second = [n for n, m in enumerate(merge.moments, 1) if m.name == "pwrite64"][1]
    before = tree(merge.work)
    done = merge.run(Fault(errno, second))
    assert done.code == 6 and code in done.err
    assert tree(merge.work) == before


def test_a_limit_on_the_size_of_files(scene: Scene) -> None:
    limit = (40_000, 40_000)
    done = process.run(
        scene.words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.returncode == 6 and "LT-613" in done.stderr and "--shard-size" in done.stderr
    assert list(scene.work.iterdir()) == []


# ----------------------------------------------------------------------- inputs that change


@pytest.mark.parametrize("how", ["rewritten", "replaced", "removed", "cut"])
def test_an_input_that_changes_under_a_run(scene: Scene, how: str) -> None:
    base = scene.inputs / "base" / "model-00001-of-00003.safetensors"
    with held(scene, 0) as child:
        if how == "rewritten":
            base.write_bytes(base.read_bytes())
        elif how == "replaced":
            shutil.copy(base, base.with_suffix(".new"))
            base.with_suffix(".new").replace(base)
        elif how == "removed":
            base.unlink()
        else:
            os.truncate(base, 9000)
        _, err = child.communicate("go on\n", timeout=60)
    assert child.returncode == 3 and ("LT-332" in err or "LT-331" in err), err
    assert list(scene.work.iterdir()) == []


# --------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def big_merge(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Two shards, the second with one tensor that takes seconds."""
    root = tmp_path_factory.mktemp("big")
    modules = sparse_model(root / "base", layers=2, size=16_384, shards=2)
    factors = random_factors(dict.fromkeys(modules[1:], (16_384, 16_384)), rank=64, seed=0)
    save_adapter(root / "adapter", factors)
    return [*process.MERGE, root / "adapter", "--base", root / "base", "--threads", 1]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_a_big_tensor(
    number: signal.Signals, code: int, big_merge: list[object], tmp_path: Path
) -> None:
    """On a terminal; half of the work is finished and stays."""
    controller, terminal = pty.openpty()
    words = [str(w) for w in (*big_merge, "-o", tmp_path / "out")]
    child = subprocess.Popen(
        words, env=process.environment(), stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    while not read_journal(tmp_path / "out.loratool-partial").finished:
        assert child.poll() is None
        drain(controller, 0.05)
    drain(controller, 0.3)
    started = time.monotonic()
    child.send_signal(number)
    text = drain(controller, 60.0)
    assert child.wait(timeout=60) == code
    print(f"\n{number.name}: exit {code} after {time.monotonic() - started:.2f} s")
    os.close(controller)
    assert "interrupted" in text and "goes on (1 file finished)" in text.replace("\r\n", "")
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    left = sorted(p.name for p in (tmp_path / "out.loratool-partial").iterdir())
    assert left == [".journal", "model-00001-of-00002.safetensors"]


HUNG = r"""
import os, sys, time
from loratool import cli
from loratool.engine.executors import threads

def hang(*_):
    os.write(1, b"hung\n")
    time.sleep(600)

threads.run_piece = hang
cli.main(sys.argv[1:])
"""


def test_a_signal_while_a_worker_cannot_stop(scene: Scene) -> None:
    """A long factorisation: the worker is left behind, and holds nothing up."""
    module = {"layers.2.proj": (64, 128)}
    adapter = save_adapter(scene.inputs / "a", random_factors(module, rank=2, seed=0))
    words = ["merge", adapter, "--base", scene.inputs / "base", "-o", scene.work / "new"]
    words += ["--threads", 1]
    with process.start([sys.executable, "-c", HUNG, *words]) as child:
        assert child.stdout is not None
        while (line := child.stdout.readline()) != "hung\n":
            assert line, "it ended"
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
        took = time.monotonic() - started
        _, err = child.communicate()
    print(f"\nSIGINT with a hung worker: exit {child.returncode} after {took:.2f} s")
    assert took > 0.9, "it is waited for, but not for long"
    assert "interrupted" in err and "Traceback" not in err
    assert list(scene.work.iterdir()) == []


def test_a_second_signal_kills(scene: Scene) -> None:
    """Between the first signal and the end of a run that hangs."""
    code = (
        "import threading, loratool.cli as c\n"
        "def run(*_):\n"
        "    try: print('ready', flush=True); threading.Event().wait(600)\n"
        "    except BaseException: print('first', flush=True); threading.Event().wait(600)\n"
        "c.run = run\n"
        "c.main([])\n"
    )
    for second in (signal.SIGINT, signal.SIGTERM):
        with process.start([sys.executable, "-c", code]) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "first\n"
            child.send_signal(second)
            assert child.wait(timeout=60) == -second
            child.communicate()


def drain(controller: int, longest_s: float) -> str:
    """What the terminal shows, until it is closed or the time is over."""
    parts, end = [], time.monotonic() + longest_s
    while (left := end - time.monotonic()) > 0:
        if not select.select([controller], [], [], left)[0]:
            break
        try:
            data = os.read(controller, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        parts.append(data)
    return b"".join(parts).decode()
