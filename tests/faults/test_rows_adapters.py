"""Rows 21-23, 31-38, 44-57 and the limits: adapters that are refused, each in its own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.spoil import (
    KEY_A,
    KEY_B,
    TARGET,
    Row,
    config,
    config_text,
    f16_base,
    holding,
    pickled,
    square_experts,
    tensors,
    tied,
)
from tests.faults.world import (
    PREFIX,
    Q,
    World,
    adapter_tensors,
    factors,
    values,
    zeros,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


CONFIG = "adapter_config.json"
ROWS = (
    *(Row(f"21-{dtype}", tensors({KEY_A: zeros(dtype, 2, 8)}), "LT-365", key=KEY_A,
          expected="F32", got=dtype) for dtype in ("C64", "BOOL", "I64", "U16")),
    Row("22-zero-size", tensors({KEY_A: zeros("F32", 0, 8), KEY_B: zeros("F32", 12, 0)}),
        "LT-364", key=KEY_A, expected="whole tensor", got="[0, 8]"),
    Row("23-scalar", tensors({KEY_A: values()}), "LT-364", key=KEY_A, expected="whole tensor",
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
    Row("36-grouped-convolution", tensors({KEY_A: values(2, 8, 1, 1), KEY_B: values(12, 1, 1, 1)}),
        "LT-434", "base", key=TARGET, expected="rank 2", got="1 columns of lora_B"),
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
          ("nested", r"(.*a)*b", "too many open repeats"),
          ("branches", r"(a|a)*b", "too many open repeats"),
          ("open", ".*" * 12 + "x", "too many open repeats"),
          ("long", "a" * 513, "longer than 512 characters: 513"),
          ("broken", "(", "not a regular expression"))),
    Row("44-regex-alpha", config(alpha_pattern={r"(.*a)*b": 2}), "LT-368", CONFIG,
        key="alpha_pattern", got="too many open repeats"),
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
    *(Row(f"52-{name.lower()}", config(peft_type=name), "LT-402", CONFIG, key="peft_type",
          got=name)
      for name in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")),
    Row("53-poly", config(peft_type="POLY"), "LT-402", CONFIG, key="peft_type", got="POLY"),
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


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("row", ["limit-1025-adapters"])
def test_too_many_adapters(world: World, row: str) -> None:
    words = ["merge", *[str(world.adapter)] * 1025, "--base", str(world.base), "-o", str(world.out)]
    world.refuses(words, "LT-291", expected="1024", got="1025")


@pytest.mark.parametrize("row", ["limit-rank"])
def test_rank_over_8192(world: World, row: str) -> None:
    made = {KEY_A: zeros("F32", 8193, 8), KEY_B: zeros("F32", 12, 8193)}
    world.write_adapter(made, r=8192)
    world.refuses(world.merge_words(), "LT-348", key=KEY_A, expected="8192", got="8193")


@pytest.mark.parametrize("row", ["limit-regex-of-user"])
def test_runaway_patterns_of_the_command_line(world: World, row: str) -> None:
    world.refuses(world.merge_words("--skip", "a" * 513), "LT-242", got="512")


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], 3])
def test_a_task_that_is_no_word_is_none(world: World, value: object) -> None:
    world.write_adapter(None, task_type=value)
    assert world.merge().code == 0
