"""Ways to spoil the adapter of a `World`, and what a merge of it must be."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratool.store.header import read_header
from tests.faults.world import (
    ADAPTER_CONFIG,
    PREFIX,
    Q,
    Spoil,
    World,
    adapter_tensors,
    base_tensors,
    factors,
    values,
    zeros,
)

DATA = Path(__file__).parents[1] / "data" / "llm"
KEY_A = f"{PREFIX}{Q.format(0)}.lora_A.weight"
KEY_B = f"{PREFIX}{Q.format(0)}.lora_B.weight"
TARGET = Q.format(0) + ".weight"


@dataclass(frozen=True)
class Row:
    id: str
    spoil: Spoil
    code: str
    file: str = "adapter_model.safetensors"
    key: str | None = None
    expected: str | None = None
    got: str | None = None
    what: str | None = None
    hint: str | None = None
    options: tuple[str, ...] = ()


def tensors(changes: dict[str, Any], **config: object) -> Spoil:
    """The adapter with some tensors exchanged (None takes one away)."""

    def spoil(world: World) -> None:
        made = {k: v for k, v in (adapter_tensors() | changes).items() if v is not None}
        world.write_adapter(made, **config)

    return spoil


def config(**changes: object) -> Spoil:
    return lambda world: world.write_adapter(None, **changes)


def config_text(field: str, text: str) -> Spoil:
    """A configuration value that Python's own writer would refuse or change."""

    def spoil(world: World) -> None:
        whole = json.dumps({k: v for k, v in ADAPTER_CONFIG.items() if k != field})
        (world.adapter / "adapter_config.json").write_text(f'{whole[:-1]}, "{field}": {text}}}')

    return spoil


def holding(value: float, count: int, at: int) -> Any:
    made = np.full((2, 8), 0.5, "<f4")
    made.flat[at : at + count] = value
    return "F32", (2, 8), made.tobytes()


def bf16(*shape: int, value: float) -> Any:
    bits = int(np.float32(value).view("<u4")) >> 16
    return "BF16", shape, np.full(shape, bits, "<u2").tobytes()


def f16_base(world: World) -> None:
    """Finite factors whose product does not fit float16."""
    base = base_tensors() | {TARGET: zeros("F16", 12, 8)}
    world.write_base(base)
    world.write_adapter(
        adapter_tensors() | {KEY_A: values(2, 8, fill=300), KEY_B: values(12, 2, fill=300)}
    )


def pickled(name: str) -> Spoil:
    def spoil(world: World) -> None:
        world.weights.unlink()
        (world.adapter / name).write_bytes(pickle.dumps({"w": 1}))

    return spoil


def method(name: str) -> Spoil:
    def spoil(world: World) -> None:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(DATA / name / file, world.adapter / file)

    return spoil


def square_experts(world: World) -> None:
    base = base_tensors() | {"model.layers.0.mlp.experts.down_proj": values(3, 8, 8)}
    world.write_base(base)
    name = f"{PREFIX}model.layers.0.mlp.experts"
    world.write_adapter(
        {f"{name}.lora_A.weight": values(6, 8), f"{name}.lora_B.weight": values(8, 6)},
        target_modules=[], target_parameters=["mlp.experts.down_proj"], peft_version="",
    )  # fmt: skip


def tied(world: World) -> None:
    base = base_tensors()
    del base["lm_head.weight"]
    world.write_base(base, tie_word_embeddings=True)
    world.write_adapter(factors("lm_head", out=16), target_modules=["lm_head"])


def merged(world: World, *options: str) -> dict[str, np.ndarray[Any, Any]]:
    """The merged float32 tensors."""
    found = world.merge("--json", *options)
    assert found.code == 0, found.out
    return {name: load(world.out / "model.safetensors", name) for name in base_tensors()}


def load(path: Path, name: str) -> np.ndarray[Any, Any]:
    ref = next(r for r in read_header(path).tensors if r.name == name)
    assert ref.dtype == "F32"
    data = path.read_bytes()[ref.start : ref.start + ref.nbytes]
    return np.frombuffer(data, "<f4").reshape(ref.shape)


def expected(world: World, scaling: float) -> np.ndarray[Any, Any]:
    """W + scaling·B·A of the first module, rounded once: sums of 2 products, exact in float64."""
    A, B = (load(world.weights, k).astype(np.float64) for k in (KEY_A, KEY_B))
    return (load(world.model, TARGET) + scaling * (B @ A)).astype(np.float32)


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    # Two orders of one float64 sum differ by at most one unit of the final float32 rounding.
    return bool(np.all(np.abs(one - other) <= np.spacing(np.abs(other))))
