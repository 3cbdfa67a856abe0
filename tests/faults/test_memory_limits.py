"""Less memory than the work needs: refused before it begins, or out of memory, never a bug."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import loratool as lt
from loratool.cli.failures import report
from loratool.engine import machine
from tests.faults.process import environment

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

MODULE = "model.layers.0.self_attn.q_proj"
ROWS = 1 << 26
GIB = 1 << 30


def holes(path: Path, tensors: Mapping[str, tuple[str, tuple[int, int], int]]) -> None:
    """A safetensors file of zeros that takes no disk: name -> (type, shape, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of 512 MiB each and a base that they fit, all of them holes."""
    top = tmp_path_factory.mktemp("large")
    for name in ("a", "b"):
        holes(top / name / "adapter_model.safetensors", {
            f"base_model.model.{MODULE}.lora_A.weight": ("F32", (2, 32), 256),
            f"base_model.model.{MODULE}.lora_B.weight": ("F32", (ROWS, 2), ROWS * 8),
        })  # fmt: skip
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (top / name / "adapter_config.json").write_text(json.dumps(config))
    for name in ("base", "tuned"):
        weight = {f"{MODULE}.weight": ("BF16", (ROWS, 32), ROWS * 64)}
        holes(top / name / "model.safetensors", weight)
        (top / name / "config.json").write_text('{"model_type": "test"}')
    return top


COMMANDS = (
    "rescale a 0.3 -o out",
    "rescale a 1 --base base --intruders 0.5 -o out",
    "compare a b",
    "compare a b a",
    "inspect a --risk",
    "inspect a --risk --base base",
    "inspect a --spectrum",
    "inspect a --base base",
    "compress a --rank 1 -o out",
    "compress a --rank auto --base base -o out",
    "merge a b -o out",
    "merge a b --method ties -o out",
    "subtract a b -o out",
    "merge a --base base -o out",
    "merge a --base base -o out --dry-run",
    "subtract a --from base -o out",
    "swap a b --in base -o out",
    "verify tuned --base base --adapter a",
    "extract tuned --base base --rank 1 --include q_proj -o out",
)


def run(
    words: str, cwd: Path, *, limit: int, kind: int = resource.RLIMIT_AS
) -> subprocess.CompletedProcess[str]:
    def lower() -> None:
        resource.setrlimit(kind, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "loratool", *words.split()], cwd=cwd, env=environment(),
        capture_output=True, text=True, timeout=120, preexec_fn=lower,
    )  # fmt: skip


@linux
@pytest.mark.parametrize("words", [
    pytest.param(words, marks=pytest.mark.slow if "base" in words else ()) for words in COMMANDS
])  # fmt: skip
def test_what_is_too_large_is_refused_before_the_work(words: str, world: Path) -> None:
    found = run(words, world, limit=3 * GIB // 2)
    assert found.returncode == 6 and "LT-605" in found.stderr, found
    assert sorted(p.name for p in world.iterdir()) == ["a", "b", "base", "tuned"]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_takes_max_memory(words: str, world: Path) -> None:
    found = run(f"{words} --max-memory 500MB", world, limit=resource.RLIM_INFINITY)
    assert found.returncode == 6 and "LT-605" in found.stderr and "got 500 MB" in found.stderr
    assert sorted(p.name for p in world.iterdir()) == ["a", "b", "base", "tuned"]


@linux
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_any_limit_ends_in_order(kind: str, tmp_path: Path) -> None:
    """Refused, out of memory or done: no bug, no abort of a library."""
    lt.demo(tmp_path / "toy")
    codes = set()
    for size in (100, 400, 600, 800, 3000):
        number = getattr(resource, kind)
        found = run("compare style sql", tmp_path / "toy", limit=size << 20, kind=number)
        assert found.returncode in (0, 6), (size, found)
        assert "Traceback" not in found.stderr, (size, found)
        codes.add(found.returncode)
    assert codes == {0, 6}


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(12, "Cannot allocate memory"),
], ids=lambda e: str(e)[:30])  # fmt: skip
def test_every_way_to_say_it(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error, ["inspect", "x"]) == 6
    assert "LT-608" in capsys.readouterr().err
    assert report(RuntimeError("shape mismatch"), []) == 1


# ----------------------------------------------------------------------------- what is free


def group(folder: Path, limit: str, used: int, cache: int, *, name: str = "memory.max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(limit)
    (folder / "memory.current").write_text(str(used))
    halves = f"anon 1\ninactive_file {cache // 2}\nactive_file {cache // 2}\ninactive_anon 7\n"
    (folder / "memory.stat").write_text(halves)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of our own; the process is in /a/b."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/a/b\n")
    return tmp_path / "cgroup"


def test_groups_around_this_process(groups: Path) -> None:
    group(groups / "a" / "b", "max", 700, 0)
    assert list(machine._groups()) == []
    group(groups / "a", "5000", 3000, 0)
    group(groups, "9000", 3000, 0)
    assert sorted(machine._groups()) == [2000, 6000]
    group(groups / "a" / "b", "900", 700, 0, name="memory.high")
    assert min(machine._groups()) == 200


def test_pages_of_files_are_free(groups: Path) -> None:
    """A container that has read a large model is not out of memory."""
    group(groups, "5000", 4990, 4000)
    assert list(machine._groups()) == [4010]


def test_groups_of_version_1(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("4:cpu,cpuacct:/x\n9:memory:/docker/1\n")
    folder = groups / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("5000")
    (folder / "memory.usage_in_bytes").write_text("4000")
    (folder / "memory.stat").write_text("active_file 1\ntotal_active_file 300\n")
    assert list(machine._groups()) == [1300]


def test_a_system_that_tells_nothing(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "none")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.available_memory() == pages
