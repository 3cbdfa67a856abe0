"""Peak memory does not grow with the model or the shard."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from loratool.ops.memory import TORCH_BYTES
from tests.make import randn, random_factors, save_adapter, save_checkpoint

LIMIT = 400_000_000  # plus the adapter in float32
SCRIPT = r"""
import json, re, sys
from pathlib import Path
import loratool as lt
base, adapter, out, options = sys.argv[1:]
report = lt.merge([adapter], base=base, output=out, **json.loads(options))
# VmHWM belongs to this program; ru_maxrss would start at the size of the process that forked it
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024, report.peak_memory_bytes)
"""


def sparse_model(folder: Path, *, layers: int, size: int, shards: int) -> list[str]:
    """A bfloat16 model of zeros whose files have holes: as large as wanted, no disk used."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "test"}')
    modules = [f"model.layers.{i}.mlp.proj" for i in range(layers)]
    weight_map = {}
    for shard in range(shards):
        header, position = {}, 0
        for module in modules[shard * layers // shards : (shard + 1) * layers // shards]:
            end = position + size * size * 2
            header[f"{module}.weight"] = {
                "dtype": "BF16", "shape": [size, size], "data_offsets": [position, end],
            }  # fmt: skip
            position = end
        text = json.dumps(header).encode()
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        name = name if shards > 1 else "model.safetensors"
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(header, name)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return modules


def random_model(folder: Path, *, layers: int, size: int) -> list[str]:
    """A bfloat16 model of random weights in one shard."""
    modules = [f"model.layers.{i}.mlp.proj" for i in range(layers)]
    save_checkpoint(
        folder,
        {f"{m}.weight": randn(size, size, seed=i, scale=0.02).bfloat16()
         for i, m in enumerate(modules)},
    )  # fmt: skip
    return modules


def measure(
    tmp_path: Path, *, layers: int, size: int, shards: int, **options: object
) -> tuple[int, int, int]:
    """(peak resident bytes, planned peak, adapter bytes in float32) of a merge."""
    if shards:
        modules = sparse_model(tmp_path / "base", layers=layers, size=size, shards=shards)
    else:
        modules = random_model(tmp_path / "base", layers=layers, size=size)
    factors = random_factors(dict.fromkeys(modules, (size, size)), rank=16, seed=0)
    save_adapter(tmp_path / "adapter", factors)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / n) for n in ("base", "adapter", "out")),
         json.dumps(options)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, planned = map(int, done.stdout.split())
    return peak, planned, sum(4 * (a.numel() + b.numel()) for a, b in factors.values())


def test_one_gib_in_one_shard(tmp_path: Path) -> None:
    peak, planned, adapter = measure(tmp_path, layers=8, size=8192, shards=1)
    print(
        f"peak {peak / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, adapter {adapter / 1e6:.0f} MB"
    )
    assert peak <= LIMIT + adapter
    assert peak <= planned * 1.1


@pytest.mark.parametrize("what", ["exact", "undo"])
def test_exact_sums_and_undo_files_keep_to_their_plan(what: str, tmp_path: Path) -> None:
    options = {"exact": True} if what == "exact" else {"save_undo": str(tmp_path / "u.safetensors")}
    peak, planned, _ = measure(tmp_path, layers=3, size=4096, shards=0, **options)
    print(f"peak {peak / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, {what}")
    assert peak <= planned * 1.1


@pytest.mark.slow
def test_ten_times_larger(tmp_path: Path) -> None:
    peak, planned, adapter = measure(tmp_path, layers=80, size=8192, shards=3)
    print(
        f"peak {peak / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, adapter {adapter / 1e6:.0f} MB"
    )
    assert peak <= LIMIT + adapter
    assert peak <= planned * 1.1


_INTERPRETERS = 10e6  # bytes by which they differ
PLANNED = r"""
import json, re, sys
from pathlib import Path
import loratool as lt
from loratool.api import common
plans = []
plan_memory = common.plan_memory
def note(*args, **options):
    plans.append(plan_memory(*args, **options))
    return plans[-1]
common.plan_memory = note
command, sources, options = sys.argv[1:]
getattr(lt, command)(*json.loads(sources), threads=1, **json.loads(options))
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print(int(peak[1]) * 1024, max(plan.peak_bytes for plan in plans))
"""


def plan_of(command: str, *sources: Path, **options: object) -> tuple[float, float]:
    """(measured, planned) bytes beyond an interpreter with torch, of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, command, json.dumps(list(map(str, sources))),
         json.dumps(options, default=str)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, planned = (int(n) - TORCH_BYTES["cpu"] for n in done.stdout.split())
    print(f"{command}: {peak / 1e6:.0f} MB of {planned / 1e6:.0f} planned")
    return peak, planned


@pytest.mark.parametrize(
    ("size", "options", "most"),
    [
        (2048, {"rank": 16}, 2.5),  # Lanczos takes three of the ten steps that it may
        (1536, {"rank": 16, "exact": True}, 1.5),
        (1024, {"rank": 1024}, 1.5),
        (1536, {"rank": "auto"}, 4),  # the data may ask for rank 256 and ten steps of Lanczos
    ],
)
def test_extract_keeps_to_its_plan(
    size: int, options: dict[str, object], most: float, tmp_path: Path
) -> None:
    names = [f"layers.{i}.proj.weight" for i in range(2)]
    base = {n: randn(size, size, seed=i, scale=0.02).bfloat16() for i, n in enumerate(names)}
    save_checkpoint(tmp_path / "base", base)
    save_checkpoint(tmp_path / "tuned", {
        n: (w + randn(size, 8, seed=5) @ randn(8, size, seed=6) * 1e-4).bfloat16()
        for n, w in base.items()
    })  # fmt: skip
    peak, planned = plan_of("extract", tmp_path / "tuned", base=tmp_path / "base",
                            output=tmp_path / "out", **options)  # fmt: skip
    assert peak <= planned <= most * peak + _INTERPRETERS


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("compress", {"rank": 32}),
        ("compress", {"rank": "auto", "base": True}),
        ("inspect", {"spectrum": True}),
        ("inspect", {"spectrum": True, "base": True}),
    ],
)
def test_compress_and_inspect_keep_to_their_plans(
    command: str, options: dict[str, object], tmp_path: Path
) -> None:
    modules = random_model(tmp_path / "base", layers=3, size=2048)
    factors = random_factors(dict.fromkeys(modules, (2048, 2048)), rank=128, seed=0)
    adapter = save_adapter(tmp_path / "adapter", factors)
    if "base" in options:
        options = options | {"base": tmp_path / "base"}
    if command == "compress":
        options = options | {"output": tmp_path / "out"}
    peak, planned = plan_of(command, adapter, **options)
    assert peak <= planned
    assert planned <= 1.5 * peak + _INTERPRETERS
