"""Peak memory does not grow with the model or the shard, and no command holds more than it planned.

How much more a plan says than is held differs from machine to machine: `benchmarks/memory.py`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratool.engine.buffers import TORCH_DTYPES
from tests.budget.held import Call, Held, measure
from tests.make import randn, random_factors, save_adapter, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

_LIBRARIES = 8_000_000  # pages of libraries that tiny inputs do not touch

LIMIT = 140_000_000
"""Of a merge, beyond an interpreter with torch (260 MB) and the adapter in float32."""


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


def merged(
    folder: Path, *, layers: int, size: int, shards: int, **options: object
) -> tuple[Held, int]:
    """A merge, and the bytes of its adapter in float32."""
    if shards:
        modules = sparse_model(folder / "base", layers=layers, size=size, shards=shards)
    else:
        modules = random_model(folder / "base", layers=layers, size=size)
    random_model(folder / "tiny-base", layers=1, size=8)
    factors = random_factors(dict.fromkeys(modules, (size, size)), rank=16, seed=0)
    save_adapter(folder / "adapter", factors)
    save_adapter(folder / "tiny-adapter", random_factors({modules[0]: (8, 8)}, rank=2, seed=0))

    def call(name: str) -> Call:
        places = {"base": folder / f"{name}base", "output": folder / f"{name}out"}
        undo = {"save_undo": folder / f"{name}u.safetensors"} if "undo" in options else {}
        rest = {k: v for k, v in options.items() if k != "undo"}
        return "merge", [[str(folder / f"{name}adapter")]], {**places, **undo, **rest}

    found = measure([call("tiny-")], [call("")])
    return found, sum(4 * (a.numel() + b.numel()) for a, b in factors.values())


def test_one_gib_in_one_shard(tmp_path: Path) -> None:
    found, adapter = merged(tmp_path, layers=8, size=8192, shards=1)
    assert found.taken <= LIMIT + adapter and found.taken <= found.planned + _LIBRARIES


@pytest.mark.parametrize("options", [{"exact": True}, {"undo": True}], ids=["exact", "undo"])
def test_exact_sums_and_undo_files_keep_to_their_plan(
    options: dict[str, object], tmp_path: Path
) -> None:
    found, _ = merged(tmp_path, layers=3, size=4096, shards=0, **options)
    assert found.taken <= found.planned + _LIBRARIES


@pytest.mark.slow
def test_ten_times_larger(tmp_path: Path) -> None:
    found, adapter = merged(tmp_path, layers=80, size=8192, shards=3)
    assert found.taken <= LIMIT + adapter and found.taken <= found.planned + _LIBRARIES


# ------------------------------------------------------------------------ commands on adapters


def save_pair(folder: Path, name: str, size: int) -> None:
    names = [f"layers.{i}.proj.weight" for i in range(2)]
    base = {n: randn(size, size, seed=i, scale=0.02).bfloat16() for i, n in enumerate(names)}
    save_checkpoint(folder / f"{name}base", base)
    save_checkpoint(folder / f"{name}tuned", {
        n: (w + randn(size, 8, seed=5) @ randn(8, size, seed=6) * 1e-4).bfloat16()
        for n, w in base.items()
    })  # fmt: skip


@pytest.mark.parametrize(
    ("size", "options"),
    [(2048, {"rank": 16}), (1536, {"rank": 16, "exact": True}), (1024, {"rank": 1024}),
     (1536, {"rank": "auto"})],
)  # fmt: skip
def test_extract_keeps_to_its_plan(size: int, options: dict[str, object], tmp_path: Path) -> None:
    def call(name: str) -> Call:
        places = {"base": tmp_path / f"{name}base", "output": tmp_path / f"{name}out"}
        return "extract", [tmp_path / f"{name}tuned"], {"threads": 1, **places, **options}

    save_pair(tmp_path, "", size)
    save_pair(tmp_path, "tiny-", 64)
    found = measure([call("tiny-")], [call("")])
    assert found.taken <= found.planned + _LIBRARIES


def adapters(
    folder: Path, shapes: dict[str, tuple[int, int]], *, rank: int, dtype: str = "F32"
) -> None:
    """in0, in1, in2 with a base, and tiny ones."""
    tiny = dict.fromkeys(list(shapes)[:1], (9, 8))
    for prefix, sizes, r in (("", shapes, rank), ("tiny-", tiny, 2)):
        for number in range(3):
            factors = random_factors(sizes, rank=r, seed=50 * number)
            stored = {k: tuple(f.to(TORCH_DTYPES[dtype]) for f in v) for k, v in factors.items()}
            save_adapter(folder / f"{prefix}in{number}", stored, alpha=7)  # type: ignore[arg-type]
        save_checkpoint(
            folder / f"{prefix}base",
            {f"{k}.weight": randn(*s, seed=3).bfloat16() for k, s in sizes.items()},
        )


Maker = Callable[[Path, str], Call]


def one(command: str, *more: object, **options: object) -> Maker:
    """A command on one adapter; ``base`` and ``output`` are put where they are True."""

    def make(folder: Path, prefix: str) -> Call:
        places = {k: folder / f"{prefix}{k}" for k in ("base", "output") if options.get(k)}
        source: object = folder / f"{prefix}in0"
        args = [[source] if command in ("rescale", "compress") else source, *more]
        return command, args, {"threads": 1, **options, **places}

    return make


def several(command: str, count: int, **options: object) -> Maker:
    def make(folder: Path, prefix: str) -> Call:
        places = {"output": folder / f"{prefix}out"} if command != "compare" else {}
        sources = [str(folder / f"{prefix}in{i}") for i in range(count)]
        return command, [sources], {"threads": 1, **options, **places}

    return make


COMMANDS: dict[str, Maker] = {
    "spectrum": one("inspect", spectrum=True),
    "risk": one("inspect", risk=True),
    "rescale": one("rescale", 0.3, output=True),
    "rescale to bfloat16": one("rescale", 1, output=True, dtype="bfloat16"),
    "compress": one("compress", output=True, rank=8),
    "compare two": several("compare", 2),
    "compare three": several("compare", 3),
    "merge": several("merge", 3, weights=[0.5, 0.3, 0.2]),
    "subtract": several("subtract", 2),
}
SHAPES: dict[str, tuple[dict[str, tuple[int, int]], int, str]] = {
    "tall": ({"m0": (200_000, 64)}, 16, "F32"),
    "wide": ({"m0": (64, 100_000)}, 32, "BF16"),
    "many": ({f"m{i}": (2048, 2048) for i in range(4)}, 64, "F16"),
    "square": ({"m0": (1448, 1448)}, 256, "F32"),
}


@pytest.mark.parametrize("shape", [
    pytest.param(name, marks=() if name == "tall" else pytest.mark.slow) for name in SHAPES
])  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_adapters_keep_to_their_plans(command: str, shape: str, tmp_path: Path) -> None:
    shapes, rank, dtype = SHAPES[shape]
    adapters(tmp_path, shapes, rank=rank, dtype=dtype)
    make = COMMANDS[command]
    found = measure([make(tmp_path, "tiny-")], [make(tmp_path, "")])
    assert found.taken <= found.planned + _LIBRARIES


@pytest.mark.parametrize("make", [
    one("inspect", spectrum=True, base=True),
    one("inspect", risk=True, base=True),
    one("rescale", 1, intruders=0.5, base=True, output=True),
    one("compress", rank="auto", base=True, output=True),
], ids=["look", "intruders", "weakened", "noise rank"])  # fmt: skip
@pytest.mark.parametrize("sides", [
    (1280, 1280), pytest.param((2048, 2048), marks=pytest.mark.slow),
    pytest.param((700, 4000), marks=pytest.mark.slow),
    pytest.param((4000, 700), marks=pytest.mark.slow),
])  # fmt: skip
def test_commands_beside_a_base_keep_to_their_plans(
    make: Maker, sides: tuple[int, int], tmp_path: Path
) -> None:
    adapters(tmp_path, {f"m{i}": sides for i in range(3)}, rank=128)
    found = measure([make(tmp_path, "tiny-")], [make(tmp_path, "")])
    assert found.taken <= found.planned + _LIBRARIES


def test_averaged_tensors_are_in_the_plan(tmp_path: Path) -> None:
    for prefix, rows in (("", 400_000), ("tiny-", 9)):
        for number in range(2):
            save_adapter(
                tmp_path / f"{prefix}in{number}",
                random_factors({"m": (9, 8)}, rank=2, seed=number),
                extra={"lm_head.weight": torch.full((rows, 64), float(number))},
                modules_to_save=["lm_head"],
            )
    make = several("merge", 2, weights=[0.5, 0.5])
    found = measure([make(tmp_path, "tiny-")], [make(tmp_path, "")])
    assert 8 * 400_000 * 64 < found.taken <= found.planned


@pytest.mark.parametrize("make", [
    several("merge", 2, weights=[0.3, 0.7]),
    pytest.param(several("merge", 3, method="core"), marks=pytest.mark.slow),
    pytest.param(several("compare", 2), marks=pytest.mark.slow),
    pytest.param(one("rescale", 0.3, output=True), marks=pytest.mark.slow),
    pytest.param(one("compress", rank=4, output=True), marks=pytest.mark.slow),
    pytest.param(one("inspect", risk=True), marks=pytest.mark.slow),
], ids=["merge", "core", "compare", "rescale", "compress", "risk"])  # fmt: skip
def test_experts_are_in_the_plan(make: Maker, tmp_path: Path) -> None:
    for prefix, count, rank, out in (("", 64, 16, 1024), ("tiny-", 4, 2, 16)):
        for number in range(3):
            experts = {"layers.0.mlp.experts": (out, 512)}
            ((name, (lora_A, _)),) = random_factors(experts, rank=count * rank, seed=number).items()
            lora_B = randn(out, count * rank, seed=number + 9)
            save_adapter(
                tmp_path / f"{prefix}in{number}", {name: (lora_A, lora_B)}, alpha=7, r=rank,
                target_modules=[], target_parameters=["mlp.experts.down_proj"],
            )  # fmt: skip
    found = measure([make(tmp_path, "tiny-")], [make(tmp_path, "")])
    assert found.taken <= found.planned + _LIBRARIES
