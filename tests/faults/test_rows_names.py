"""Rows 45-57: names, shapes, replaced and tied tensors: merged right, or it says what lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratool.store.header import read_header
from tests.faults.spoil import (
    DATA,
    KEY_A,
    KEY_B,
    TARGET,
    expected,
    load,
    merged,
    method,
    same,
    square_experts,
    tied,
)
from tests.faults.world import (
    PREFIX,
    Q,
    World,
    adapter_tensors,
    factors,
    save,
    values,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("row", ["45-square-conv1d"])
def test_square_conv1d_turns_on_evidence_only(world: World, row: str) -> None:
    """A square weight is stored (in, out) where the model type says so; the shape cannot.

    Of a type that nobody knows the adapter's own word counts, and that is said.
    """
    name = "transformer.h.0.attn.c_proj"
    want = {}
    for kind, flag in (("gpt2", False), ("llama", True), ("mine", True)):
        world.write_base({f"{name}.weight": values(8, 8, seed=3)}, model_type=kind)
        world.write_adapter(factors(name, out=8), target_modules=["c_proj"], fan_in_fan_out=flag)
        out = world.out.with_name(kind)
        words = ["merge", world.adapter, "--base", world.base, "-o", out, "--json"]
        found = world.run(*words)
        assert found.code == 0
        assert any("fan_in_fan_out" in n for n in found.json["notes"]) is (kind == "mine")
        A, B = (load(world.weights, f"{PREFIX}{name}.lora_{x}.weight").astype(np.float64)
                for x in "AB")  # fmt: skip
        delta = 2 * (B @ A)
        want[kind] = load(world.model, f"{name}.weight") + (delta if kind == "llama" else delta.T)
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
    world.refuses(
        world.merge_words(), "LT-407", file="adapter_config.json", expected="use_dora: true"
    )
    world.write_adapter(adapter_tensors(), use_dora=True)
    world.refuses(world.merge_words(), "LT-370", key=Q.format(0), expected="magnitude")


@pytest.mark.parametrize("row", ["52-no-config"])
@pytest.mark.parametrize("name", ["vera", "ia3"])
def test_methods_are_known_by_their_keys(world: World, row: str, name: str) -> None:
    method(name)(world)
    (world.adapter / "adapter_config.json").unlink()
    words = world.merge_words("--alpha", "1")
    world.refuses(words, "LT-361", file=str(world.adapter), what="needs its configuration")


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


@pytest.mark.parametrize("version", ["0.21.2", ""])
@pytest.mark.parametrize("row", ["56-mha"])
def test_the_output_of_attention_counts_twice_and_that_is_said(
    world: World, row: str, version: str
) -> None:
    """W' = W + 2·s·B·A for out_proj, as the trained model computed; the option says otherwise."""
    world.write_base({"attn.in_proj_weight": values(24, 8, seed=1),
                      "attn.out_proj.weight": values(8, 8, seed=2)}, model_type="")  # fmt: skip
    stem = "attn.base_layer.out_proj"
    world.write_adapter(
        factors("attn", out=24) | factors(stem, out=8), target_modules=["attn"],
        peft_version=version,
    )  # fmt: skip
    A, B = (load(world.weights, f"{PREFIX}{stem}.lora_{x}.weight").astype(np.float64) for x in "AB")
    base = load(world.model, "attn.out_proj.weight")
    for options, count in (((), 2), (("--mha-out-proj", "once"), 1),
                           (("--mha-out-proj", "twice"), 2)):  # fmt: skip
        out = world.out.with_name(f"m{len(options)}{count}")
        found = world.run("merge", world.adapter, "--base", world.base, "-o", out, "--json",
                          *options)  # fmt: skip
        assert found.code == 0, found.out
        how = {1: "once", 2: "twice"}[count]
        assert any(f"out_proj counts {how}" in note for note in found.json["notes"])
        got = load(out / "model.safetensors", "attn.out_proj.weight")
        assert same(got, (base + count * 2 * (B @ A)).astype(np.float32))


@pytest.mark.parametrize("row", ["57-odd-version"])
def test_a_version_of_endless_digits_is_unknown(world: World, row: str) -> None:
    square_experts(world)
    content = json.loads((world.adapter / "adapter_config.json").read_text())
    (world.adapter / "adapter_config.json").write_text(
        json.dumps(content | {"peft_version": "9" * 5000 + ".1.1"})
    )
    world.refuses(world.merge_words(), "LT-436", hint="--moe-layout")


@pytest.mark.parametrize("row", ["57-unequal-experts"])
def test_experts_of_unequal_shapes(world: World, row: str) -> None:
    """Experts stored one by one must all have the shape of the first."""
    sample = DATA / "lora_target_params_mixtral"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(sample / file, world.adapter / file)
    shutil.copyfile(sample / "base" / "config.json", world.base / "config.json")
    refs = read_header(sample / "base" / "model.safetensors").tensors
    bad = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    shapes = {r.name: r.shape for r in refs}
    assert bad in shapes
    save(world.model, {n: values(*s) for n, s in shapes.items()})
    assert world.merge("--json").code == 0
    shutil.rmtree(world.out)
    save(world.model, {n: values(*((64, s[1]) if n == bad else s)) for n, s in shapes.items()})
    world.refuses(world.merge_words(), "LT-437", file=str(world.base), key="experts",
                  got="(64, 16)")  # fmt: skip


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
