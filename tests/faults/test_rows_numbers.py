"""Rows 32-34 and 37-44: what is no number, what is allowed, and the scalings."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.faults.spoil import (
    KEY_A,
    KEY_B,
    TARGET,
    bf16,
    expected,
    f16_base,
    load,
    merged,
    same,
)
from tests.faults.world import (
    ADAPTER_CONFIG,
    World,
    adapter_tensors,
    base_tensors,
    values,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("row", ["37-rank-from-file", "37-rank-from-config"])
def test_rank_from(world: World, row: str) -> None:
    world.write_adapter(None, r=4)
    choice = row.rpartition("-")[2]
    scaling = {"file": 4 / 2, "config": 4 / 4}[choice]
    assert same(merged(world, "--rank-from", choice)[TARGET], expected(world, scaling))


@pytest.mark.parametrize("row", ["39-alpha-0"])
def test_alpha_zero(world: World, row: str) -> None:
    world.write_adapter(None, lora_alpha=0)
    found = world.merge("--json")
    assert found.code == 0
    assert any("no effect" in w for w in found.json["warnings"])
    assert any("no effect" in w for w in world.run("inspect", world.adapter, "--json").json[
        "warnings"])  # fmt: skip
    assert (world.out / "model.safetensors").read_bytes() == world.model.read_bytes()


@pytest.mark.parametrize("row", ["40-alpha-missing-peft"])
def test_alpha_missing(world: World, row: str) -> None:
    (world.adapter / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in ADAPTER_CONFIG.items() if k != "lora_alpha"})
    )
    found = world.merge("--json")
    assert any("lora_alpha is missing: 8" in note for note in found.json["notes"])
    got = load(world.out / "model.safetensors", TARGET)
    assert same(got, expected(world, 8 / 2))


@pytest.mark.parametrize("row", ["40-alpha-missing-no-config"])
def test_alpha_missing_without_configuration(world: World, row: str) -> None:
    (world.adapter / "adapter_config.json").unlink()
    world.refuses(world.merge_words(), "LT-280", file=str(world.adapter), hint="--alpha")
    assert same(merged(world, "--alpha", "6")[TARGET], expected(world, 6 / 2))


@pytest.mark.parametrize("row", ["41-alpha-negative"])
def test_alpha_negative(world: World, row: str) -> None:
    world.write_adapter(None, lora_alpha=-4)
    found = world.merge("--json")
    assert found.code == 0
    assert any("negative alpha" in w for w in found.json["warnings"])
    assert same(load(world.out / "model.safetensors", TARGET), expected(world, -2))


@pytest.mark.parametrize("row", ["43-rslora"])
def test_rslora(world: World, row: str) -> None:
    world.write_adapter(None, use_rslora=True)
    assert same(merged(world)[TARGET], expected(world, 4 / 2**0.5))


@pytest.mark.parametrize("row", ["44-first-match-wins"])
def test_patterns_as_in_peft(world: World, row: str) -> None:
    world.write_adapter(None, alpha_pattern={r"layers\.\d+\.self_attn\.q_proj": 6, "q_proj": 10})
    assert same(merged(world)[TARGET], expected(world, 6 / 2))


@pytest.mark.parametrize("row", ["34-nan-elsewhere"])
def test_nan_in_an_untouched_tensor_is_copied(world: World, row: str) -> None:
    payload = struct.pack("<8I", *[0x7FC12345] * 8)  # a NaN with a payload
    name = "model.layers.0.input_layernorm.weight"
    world.write_base(base_tensors() | {name: ("F32", (8,), payload)})
    assert world.merge("--json").code == 0
    assert payload in (world.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("row", ["34-extract"])
def test_equal_infinities_are_no_difference(world: World, row: str) -> None:
    """Attention masks hold -inf, in the base and in the fine-tune alike."""
    name = "model.layers.0.mask"
    mask = ("F32", (4, 4), struct.pack("<16f", *[0.0, -np.inf, -np.inf, 0.0] * 4))
    tuned = World(world.root / "in" / "tuned")
    world.write_base(base_tensors() | {name: mask})
    changed = values(12, 8, seed=99)
    tuned.write_base(base_tensors() | {name: mask, TARGET: changed})
    words = ["extract", tuned.base, "--base", world.base, "--rank", "8", "-o", world.out, "--json"]
    found = world.run(*words)
    assert found.code == 0, found.out
    (module,) = found.json["modules"]
    assert TARGET.startswith(module["name"])
    other = ("F32", (4, 4), struct.pack("<16f", *[0.0, -np.inf, np.inf, 0.0] * 4))
    tuned.write_base(base_tensors() | {name: other, TARGET: changed})
    shutil.rmtree(world.out)
    world.refuses([str(w) for w in words[:-1]], "LT-803", key=name, expected="finite")


@pytest.mark.parametrize("row", ["34-nan-in-target"])
def test_nan_in_a_target(world: World, row: str) -> None:
    bad = np.frombuffer(base_tensors()[TARGET][2], "<f4").copy()
    bad[13] = np.nan
    world.write_base(base_tensors() | {TARGET: ("F32", (12, 8), bad.tobytes())})
    world.refuses(world.merge_words(), "LT-804", key=TARGET, expected="finite",
                  got="1 value", hint="--allow-nonfinite")  # fmt: skip


@pytest.mark.parametrize("row", ["32-allowed", "34-allowed"])
def test_allow_nonfinite(world: World, row: str) -> None:
    """What is not finite passes, is counted, and nothing else changes."""
    plain = merged(world)[TARGET]
    shutil.rmtree(world.out)
    if row.startswith("32"):  # one NaN in lora_A spoils one column of ΔW
        made = np.frombuffer(adapter_tensors()[KEY_A][2], "<f4").copy()
        made[8 + 3] = np.nan
        world.write_adapter(adapter_tensors() | {KEY_A: ("F32", (2, 8), made.tobytes())})
        bad = np.zeros((12, 8), bool)
        bad[:, 3] = True
    else:
        made = np.frombuffer(base_tensors()[TARGET][2], "<f4").copy()
        made[13] = np.inf
        world.write_base(base_tensors() | {TARGET: ("F32", (12, 8), made.tobytes())})
        bad = np.zeros(96, bool)
        bad[13] = True
        bad = bad.reshape(12, 8)
    found = world.merge("--json", "--allow-nonfinite")
    assert found.code == 0
    warning = next(w for w in found.json["warnings"] if "NaN or infinity" in w)
    assert TARGET in warning and f"{bad.sum()} value" in warning
    got = load(world.out / "model.safetensors", TARGET)
    assert np.array_equal(~np.isfinite(got), bad)
    assert np.array_equal(got[~bad], plain[~bad])
    json.loads(found.out, parse_constant=pytest.fail)  # no NaN in the report
    words = ["verify", world.out, "--base", world.base, "--adapter", world.adapter]
    again = world.run(*words, "--json", "--allow-nonfinite")
    assert again.code == 0 and again.json["verdict"] == "identical"
    assert world.run(*words).code == 8


@pytest.mark.parametrize("row", ["34-pissa-needs-finite-weights"])
def test_no_svd_of_nan(world: World, row: str) -> None:
    world.write_adapter(None, init_lora_weights="pissa")
    world.write_base(base_tensors() | {TARGET: values(12, 8, fill=float("nan"))})
    world.refuses(world.merge_words("--allow-nonfinite"), "LT-801", key=TARGET, got="96 bad")


@pytest.mark.parametrize("row", ["33-allow-nonfinite-is-no-overflow"])
def test_overflow_is_refused_even_then(world: World, row: str) -> None:
    f16_base(world)
    world.refuses(world.merge_words("--allow-nonfinite"), "LT-802", key=TARGET)
    assert world.merge("--dtype", "float32", "--json").code == 0


@pytest.mark.parametrize("row", ["42-alpha-in-bf16"])
def test_stored_values_are_used_exactly(world: World, row: str) -> None:
    """Factors in bfloat16 count with the very values that the file holds."""
    world.write_adapter(
        adapter_tensors() | {KEY_A: bf16(2, 8, value=0.1), KEY_B: bf16(12, 2, value=0.3)}
    )
    a, b = (np.float64((np.uint32(int(np.float32(v).view("<u4")) >> 16) << 16).view("<f4"))
            for v in (0.1, 0.3))  # fmt: skip
    want = (load(world.model, TARGET) + 2.0 * (2 * a * b)).astype(np.float32)
    assert same(merged(world)[TARGET], want)


@pytest.mark.parametrize("row", ["42-factors-in-fp8"])
def test_factors_in_eight_bits(world: World, row: str) -> None:
    """0x38 is 1.0 and 0x3A is 1.25 in E4M3: exact values of a narrow type."""
    world.write_adapter(
        adapter_tensors()
        | {KEY_A: ("F8_E4M3", (2, 8), b"\x38" * 16), KEY_B: ("F8_E4M3", (12, 2), b"\x3a" * 24)}
    )
    want = (load(world.model, TARGET).astype(np.float64) + 2 * (2 * 1.25)).astype(np.float32)
    assert same(merged(world)[TARGET], want)
