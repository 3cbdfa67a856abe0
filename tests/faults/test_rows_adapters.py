"""Rows 21-23, 31-57: adapters whose tensors, configuration or names are wrong or unusual."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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


CONFIG = "adapter_config.json"
ROWS = (
    *(Row(f"21-{dtype}", tensors({KEY_A: zeros(dtype, 2, 8)}), "LT-365", key=KEY_A,
          expected="F32", got=dtype) for dtype in ("C64", "BOOL", "I64", "U16")),
    Row("22-zero-size", tensors({KEY_A: zeros("F32", 0, 8), KEY_B: zeros("F32", 12, 0)}),
        "LT-364", key=KEY_A, expected="matrix", got="[0, 8]"),
    Row("23-scalar", tensors({KEY_A: values()}), "LT-364", key=KEY_A, expected="matrix",
        got="[]"),
    *(Row(f"31-{name.replace('.', '-')}", pickled(name), "LT-903", file="style", got=name,
          expected="safetensors", hint="--allow-pickle")
      for name in ("adapter_model.bin", "adapter_model.pt", "weights.ckpt")),
    Row("32-nan", tensors({KEY_A: holding(float("nan"), 3, 9)}), "LT-801", key=KEY_A,
        expected="finite", got="3 bad values, the first at [1, 1]", hint="--allow-nonfinite"),
    Row("33-inf", tensors({KEY_A: holding(float("inf"), 1, 0)}), "LT-801", key=KEY_A,
        expected="finite", got="1 bad value", hint="--allow-nonfinite"),
    Row("33-overflow", f16_base, "LT-802", file="", key=TARGET, expected="65504", got="360000",
        hint="--dtype"),
    Row("35-no-B", tensors({KEY_B: None}), "LT-362", key=KEY_A,
        expected=f"{Q.format(0)}.lora_B.weight"),
    Row("35-no-A", tensors({KEY_A: None}), "LT-362", key=KEY_B,
        expected=f"{Q.format(0)}.lora_A.weight"),
    Row("36-ranks-differ", tensors({KEY_B: values(12, 3)}), "LT-363", key=Q.format(0),
        expected="(r, in)", got="[2, 8] and [12, 3]"),
    Row("37-rank-of-config", config(r=4), "LT-405", key=KEY_A, expected="r = 4", got="r = 2",
        hint="--rank-from"),
    Row("37-rank-pattern", config(rank_pattern={"q_proj": 4}), "LT-405", key=KEY_A,
        expected="r = 4", got="r = 2", hint="--rank-from"),
    *(Row(f"38-{name}", config_text("r", text), "LT-361", CONFIG, key="r",
          expected="whole number from 1", got=got)
      for name, text, got in (
          ("zero", "0", "0"), ("negative", "-1", "-1"), ("text", '"8"', "'8'"),
          ("float", "8.0", "8.0"), ("true", "true", "True"), ("too-large", "9000", "9000"))),
    *(Row(f"38-{name}", config_text("r", text), "LT-342", CONFIG, got=text)
      for name, text in (("NaN", "NaN"), ("Infinity", "Infinity"), ("1e400", "1e400"))),
    Row("38-duplicate", config_text("r", '2, "r": 2'), "LT-343", CONFIG, key="r"),
    Row("38-alpha-text", config(lora_alpha="16"), "LT-361", CONFIG, key="lora_alpha",
        expected="number", got="'16'"),
    *(Row(f"44-regex-{name}", config(rank_pattern={pattern: 2}), "LT-368", CONFIG,
          key="rank_pattern", expected="at most 512 characters", got=got)
      for name, pattern, got in (
          ("nested", r"(.*a)*b", "repeat inside a repeat"),
          ("branches", r"(a|a)*b", "alternatives inside a repeat"),
          ("open", ".*" * 12 + "x", "too many open repeats"),
          ("back-reference", r"(a)\1", "back reference"),
          ("long", "a" * 513, "longer than 512"),
          ("broken", "(", "not a regular expression"))),
    Row("44-regex-alpha", config(alpha_pattern={r"(.*a)*b": 2}), "LT-368", CONFIG,
        key="alpha_pattern", got="repeat inside a repeat"),
    Row("45-shape", tensors({KEY_A: values(2, 9)}), "LT-432", "base", key=TARGET,
        expected="(12, 8)", got="(12, 9)"),
    Row("45-transposed", tensors({KEY_A: values(2, 12), KEY_B: values(8, 2)}), "LT-433", "base",
        key=TARGET, expected="(12, 8)", got="(8, 12)", hint="fan_in_fan_out"),
    Row("46-other-size", tensors({k: values(2, 16) if "lora_A" in k else values(24, 2)
                                  for k in adapter_tensors()}), "LT-432", "base", key=TARGET,
        expected="(12, 8)", got="(24, 16)", what="2 shapes"),
    Row("47-unknown-module", tensors(factors("model.layers.7.mlp.up_proj")), "LT-430", "base",
        key="model.layers.7.mlp.up_proj", what="1 of 3 modules"),
    Row("47-component", tensors(factors("text_encoder.layers.0.fc1")), "LT-430", "base",
        key="text_encoder.layers.0.fc1", what="text encoder", hint="--skip te"),
    Row("49-vocabulary-grew", tensors({PREFIX + "lm_head.weight": values(20, 8)},
                                      modules_to_save=["lm_head"]), "LT-442", "base",
        key="lm_head.weight", expected="(16, 8)", got="(20, 8)", hint="--resize-embeddings"),
    Row("50-replacement-type", tensors({PREFIX + "lm_head.weight": zeros("I64", 16, 8)},
                                       modules_to_save=["lm_head"]), "LT-493", "base",
        key="lm_head.weight", expected="BF16", got="I64"),
    Row("50-replacement-shape", tensors({PREFIX + "lm_head.weight": values(16, 9)},
                                        modules_to_save=["lm_head"]), "LT-445", "base",
        key="lm_head.weight", expected="(16, 8)", got="(16, 9)"),
    *(Row(f"52-{name}", method(name), "LT-402", CONFIG, key="peft_type", expected="LORA",
          got=name.partition("_")[0].upper())
      for name in ("loha", "lokr", "oft", "vera", "boft", "ia3", "adalora", "hra", "vblora")),
    Row("53-adalora", method("adalora"), "LT-402", CONFIG, key="peft_type", expected="LORA",
        got="ADALORA"),
    *(Row(f"54-{name}", config(init_lora_weights=name), "LT-406", CONFIG,
          key="init_lora_weights", got=name) for name in ("corda", "loftq", "lora_ga")),
    Row("54-unknown-init", config(init_lora_weights="nova"), "LT-414", CONFIG,
        key="init_lora_weights", expected="pissa", got="nova"),
    Row("55-tied-head", tied, "LT-440", "base", key="lm_head", hint="--untie"),
    Row("57-square-experts", square_experts, "LT-436", "base", key="experts.down_proj",
        hint="--moe-layout"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_refused(world: World, row: Row) -> None:
    row.spoil(world)
    world.refuses(
        world.merge_words(*row.options), row.code, file=row.file, key=row.key,
        expected=row.expected, got=row.got, what=row.what, hint=row.hint,
    )  # fmt: skip


# ------------------------------------------------------------------- what is right, and said so


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


@pytest.mark.parametrize("row", ["45-square-conv1d"])
def test_square_conv1d_turns_on_evidence_only(world: World, row: str) -> None:
    """A square GPT-2 weight is stored (in, out): the model type says so, the shape cannot."""
    name = "transformer.h.0.attn.c_proj"
    want = {}
    for kind in ("gpt2", "llama"):
        world.write_base({f"{name}.weight": values(8, 8, seed=3)}, model_type=kind)
        world.write_adapter(
            factors(name, out=8), target_modules=["c_proj"], fan_in_fan_out=kind == "gpt2"
        )
        out = world.out.with_name(kind)
        words = ["merge", world.adapter, "--base", world.base, "-o", out, "--json"]
        assert world.run(*words).code == 0
        A, B = (load(world.weights, f"{PREFIX}{name}.lora_{x}.weight").astype(np.float64)
                for x in "AB")  # fmt: skip
        delta = 2 * (B @ A)
        want[kind] = load(world.model, f"{name}.weight") + (delta.T if kind == "gpt2" else delta)
        got = load(out / "model.safetensors", f"{name}.weight")
        assert same(got, want[kind].astype(np.float32))


@pytest.mark.parametrize("row", ["46-other-name"])
def test_another_base_name_is_a_note(world: World, row: str) -> None:
    world.write_adapter(None, base_model_name_or_path="someone/else-7B")
    found = world.merge("--json")
    assert found.code == 0
    assert any("someone/else-7B" in note for note in found.json["notes"])


@pytest.mark.parametrize("row", ["47-list-of-misfits"])
def test_misfits_are_counted_and_grouped(world: World, row: str) -> None:
    extra: dict[str, Any] = {}
    for i in range(30):
        extra |= factors(f"vision_tower.blocks.{i}.proj")
    world.write_adapter(adapter_tensors() | extra)
    error = world.refuses(world.merge_words(), "LT-430", what="30 of 32 modules",
                          key="and 20 more")  # fmt: skip
    assert "vision_tower.blocks" in error["what"] and error["key"].count(",") == 9


@pytest.mark.parametrize("row", ["47-skip", "47-allow-unmatched"])
def test_misfits_left_out_are_reported(world: World, row: str) -> None:
    world.write_adapter(adapter_tensors() | factors("vision.blocks.0.proj"))
    option = ("--skip", "^vision") if row == "47-skip" else ("--allow-unmatched",)
    found = world.merge("--json", *option)
    assert found.code == 0 and found.json["skipped"] == ["vision.blocks.0.proj"]
    assert same(load(world.out / "model.safetensors", TARGET), expected(world, 2))


@pytest.mark.parametrize("row", ["48-prefix-drift"])
def test_prefix_drift_proposes_a_rename_that_works(world: World, row: str) -> None:
    """Names that drifted in a way no rule knows: an error with the fix, which then works."""
    made = {k.replace("model.layers.", "policy.core.layers."): v
            for k, v in adapter_tensors().items()}  # fmt: skip
    world.write_adapter(made)
    error = world.refuses(world.merge_words(), "LT-430", what="2 of 2 modules",
                          hint="--rename 's/")  # fmt: skip
    assert "match 2 of 2" in error["hint"]
    rename = error["hint"].split("'")[1]
    assert world.merge("--rename", rename, "--json").code == 0


@pytest.mark.parametrize("row", ["48-one-of-many"])
def test_a_single_match_is_no_match(world: World, row: str) -> None:
    made = factors("model.layers.0.self_attn.q_proj")
    for i in range(1, 32):
        made |= factors(f"tower.deep.layers.{i}.self_attn.q_proj")
    world.write_adapter(made)
    world.refuses(world.merge_words(), "LT-430", what="31 of 32 modules", key="and 21 more")


@pytest.mark.parametrize("row", ["49-resized"])
def test_grown_vocabulary(world: World, row: str) -> None:
    world.write_adapter(
        adapter_tensors()
        | {PREFIX + name: values(20, 8, seed=5) for name in
           ("lm_head.weight", "model.embed_tokens.weight")},
        modules_to_save=["lm_head", "embed_tokens"],
    )  # fmt: skip
    found = world.merge("--resize-embeddings", "--json")
    assert found.code == 0, found.out
    assert json.loads((world.out / "config.json").read_text())["vocab_size"] == 20
    assert load(world.out / "model.safetensors", "lm_head.weight").shape == (20, 8)


@pytest.mark.parametrize("row", ["50-whole-tensors"])
def test_replacements_are_named(world: World, row: str) -> None:
    new = values(8, seed=9)
    world.write_adapter(
        adapter_tensors() | {PREFIX + "model.layers.0.input_layernorm.weight": new},
        modules_to_save=["input_layernorm"],
    )
    found = world.run("inspect", world.adapter, "--json")
    assert "input_layernorm" in json.dumps(found.json["adapter"]["replaced"])
    got = merged(world)["model.layers.0.input_layernorm.weight"]
    assert got.tobytes() == new[2]


@pytest.mark.parametrize("row", ["51-dora"])
def test_dora_is_exact_or_refused(world: World, row: str) -> None:
    magnitude = values(12, seed=33)
    made = adapter_tensors() | {
        f"{PREFIX}{Q.format(i)}.lora_magnitude_vector": magnitude for i in (0, 1)
    }
    world.write_adapter(made, use_dora=True)
    got = merged(world)[TARGET]
    A, B = (load(world.weights, k).astype(np.float64) for k in (KEY_A, KEY_B))
    whole = load(world.model, TARGET).astype(np.float64) + 2 * (B @ A)
    m = np.frombuffer(magnitude[2], "<f4").astype(np.float64)
    want = (m / np.linalg.norm(whole, axis=1))[:, None] * whole
    assert np.allclose(got, want, rtol=3e-7, atol=0)  # float32: a few roundings of 6e-8
    shutil.rmtree(world.out)
    world.write_adapter(None, use_dora=False)
    world.refuses(world.merge_words(), "LT-407", file=CONFIG, expected="use_dora: true")
    world.write_adapter(adapter_tensors(), use_dora=True)
    world.refuses(world.merge_words(), "LT-370", key=Q.format(0), expected="magnitude")


@pytest.mark.parametrize("row", ["52-no-config"])
@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "ia3"])
def test_methods_are_known_by_their_keys(world: World, row: str, name: str) -> None:
    method(name)(world)
    (world.adapter / "adapter_config.json").unlink()
    # LoHa and LoKr are LyCORIS's, whoever wrote the file.
    code, title = ("LT-401", "lycoris") if name.startswith("lo") else ("LT-402", name.upper())
    world.refuses(world.merge_words("--alpha", "1"), code, file=str(world.adapter), got=title)


@pytest.mark.parametrize("row", ["54-pissa-is-repeated"])
def test_pissa_repeats_the_mutation(world: World, row: str) -> None:
    """W' = W - top-r part of W + s·B·A, with the SVD in float64 as oracle."""
    world.write_adapter(None, init_lora_weights="pissa")
    got = merged(world)[TARGET]
    weight = load(world.model, TARGET).astype(np.float64)
    U, S, Vh = np.linalg.svd(weight, full_matrices=False)
    A, B = (load(world.weights, k).astype(np.float64) for k in (KEY_A, KEY_B))
    want = weight - (U[:, :2] * S[:2]) @ Vh[:2] + 2 * (B @ A)
    assert np.allclose(got, want, rtol=0, atol=4e-7)  # a float32 SVD of numbers below 1


@pytest.mark.parametrize("row", ["55-untie", "55-keep-tied"])
def test_tied_head(world: World, row: str) -> None:
    tied(world)
    found = world.merge("--" + row[3:], "--json")
    assert found.code == 0
    names = {r.name for r in read_header(world.out / "model.safetensors").tensors}
    config = json.loads((world.out / "config.json").read_text())
    if row == "55-untie":
        assert "lm_head.weight" in names and config["tie_word_embeddings"] is False
    else:
        assert "lm_head.weight" not in names and config["tie_word_embeddings"] is True


@pytest.mark.parametrize("row", ["57-moe-layout"])
@pytest.mark.parametrize("layout", ["eoi", "eio"])
def test_square_experts_take_the_layout_that_is_said(world: World, row: str, layout: str) -> None:
    square_experts(world)
    assert world.merge("--moe-layout", layout, "--json").code == 0
    name = "model.layers.0.mlp.experts.down_proj"
    stem = f"{PREFIX}model.layers.0.mlp.experts"
    A, B = (load(world.weights, f"{stem}.lora_{x}.weight").astype(np.float64) for x in "AB")
    base = load(world.model, name)
    got = load(world.out / "model.safetensors", name)
    per_expert = [2 * (B.reshape(8, 2, 3)[:, :, e] @ A.reshape(3, 2, 8)[e]) for e in range(3)]
    for e in range(3):
        delta = per_expert[e] if layout == "eoi" else per_expert[e].T
        assert same(got[e], (base[e] + delta).astype(np.float32))


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("row", ["limit-257-adapters"])
def test_too_many_adapters(world: World, row: str) -> None:
    words = ["merge", *[str(world.adapter)] * 257, "--base", str(world.base), "-o", str(world.out)]
    world.refuses(words, "LT-291", expected="256", got="257")


@pytest.mark.parametrize("row", ["limit-rank"])
def test_rank_over_8192(world: World, row: str) -> None:
    made = {KEY_A: zeros("F32", 8193, 8), KEY_B: zeros("F32", 12, 8193)}
    world.write_adapter(made, r=8192)
    world.refuses(world.merge_words(), "LT-348", key=KEY_A, expected="8192", got="8193")


@pytest.mark.parametrize("row", ["limit-regex-of-user"])
def test_runaway_patterns_of_the_command_line(world: World, row: str) -> None:
    world.refuses(world.merge_words("--skip", "a" * 513), "LT-242", expected="512")
