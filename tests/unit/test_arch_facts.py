"""The engine behind the tables, and the facts that need no model."""

from __future__ import annotations

from typing import Any

import pytest

from loratool.archs.base import Rule, Table
from loratool.archs.experts import expert_names, fused_names, parse_expert
from loratool.archs.layers import (
    Heads,
    attention_sizes,
    experts_lie_turned,
    is_conv1d,
    model_types,
    stores_transposed,
)
from loratool.archs.names import tables_for, to_disk, to_memory


def test_rule_replaces_whole_parts_of_a_name() -> None:
    rule = Rule("fc1", "mlp.fc1")
    assert rule.to_memory("a.fc1.weight") == "a.mlp.fc1.weight"
    assert rule.to_memory("a.fc10.weight") == "a.fc10.weight"
    assert rule.to_memory("a.xfc1.weight") == "a.xfc1.weight"
    assert rule.to_disk("a.mlp.fc1") == "a.fc1"


def test_rule_keeps_numbers_and_anchors() -> None:
    rule = Rule("^encoder.{n}.x.{n}", "^enc.{n}.y.{n}.z")
    assert rule.to_memory("encoder.3.x.12.w") == "enc.3.y.12.z.w"
    assert rule.to_disk("enc.3.y.12.z.w") == "encoder.3.x.12.w"
    assert rule.to_memory("a.encoder.3.x.12.w") == "a.encoder.3.x.12.w"
    assert rule.to_memory("encoder.3a.x.12.w") == "encoder.3a.x.12.w"


def test_table_goes_back_in_reverse_order() -> None:
    table = Table("t", (Rule("a", "b"), Rule("b.c", "d")))
    assert table.to_memory("a.c") == "d"
    assert table.to_disk("d") == "a.c"


def test_names_both_ways() -> None:
    disk = "model.layers.0.block_sparse_moe.gate.weight"
    assert to_memory("mixtral", disk) == "model.layers.0.mlp.gate.weight"
    assert to_memory("mixtral", disk, "v4") == disk
    assert to_disk("mixtral", "model.layers.0.mlp.gate.weight")[0] == disk
    assert to_memory("llama", disk) == disk
    expert = "model.layers.0.block_sparse_moe.experts.3.w1"
    assert to_memory("mixtral", expert) == expert
    assert to_memory("mixtral", f"{expert}.weight") == f"{expert}.weight"
    assert to_disk("llama", "lm_head.weight") == ("lm_head.weight",)


def test_candidates_cover_every_naming() -> None:
    name = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert to_disk("llava", name) == (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "vision_tower.encoder.layers.0.mlp.fc1",
        name,
    )
    assert len(tables_for("llava")) == 2 and tables_for("llama") == ()


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"model_type": "gpt2"}, "transformer.h.0.attn.c_attn", True),
        ({"model_type": "gpt2"}, "lm_head", False),
        ({"model_type": "llama"}, "model.layers.0.mlp.c_proj", False),
        ({}, "h.0.attn.c_attn", None),
        ({"model_type": "x", "auto_map": {}}, "h.0.attn.c_attn", None),
        ({"model_type": "x"}, "h.0.attn.c_attn", None),
        ({"_class_name": "X"}, "blocks.0.c_proj", False),
        ({"model_type": "v", "decoder": {"model_type": "gpt2"}}, "decoder.h.0.mlp.c_fc", True),
    ],
)
def test_stores_transposed(config: dict[str, Any], module: str, expected: bool | None) -> None:
    assert stores_transposed(config, module) is expected


@pytest.mark.parametrize(
    ("kind", "leaf", "shape", "turned"),
    [
        ("qwen3_vl_moe", "gate_up_proj", (4, 16, 24), True),  # as published
        ("qwen3_vl_moe", "gate_up_proj", (4, 24, 16), False),  # as transformers 5 saves it
        ("qwen3_vl_moe", "down_proj", (4, 12, 16), True),
        ("qwen3_vl_moe", "down_proj", (4, 16, 12), False),
        ("qwen3_vl_moe", "down_proj", (4, 16, 16), True),
        ("gpt_oss", "down_proj", (4, 16, 12), True),
        ("qwen3_moe", "down_proj", (4, 12, 16), False),
    ],
)
def test_how_a_stack_of_experts_lies(
    kind: str, leaf: str, shape: tuple[int, int, int], turned: bool
) -> None:
    config = {"model_type": kind, "text_config": {"model_type": kind, "hidden_size": 16}}
    assert experts_lie_turned(config, f"layers.0.mlp.experts.{leaf}", shape) is turned


def test_facts_by_model_type() -> None:
    assert is_conv1d("gpt2", "h.0.mlp.c_fc") and not is_conv1d("gptj", "mlp.c_fc")
    assert model_types({"model_type": "a", "text_config": {"model_type": "b"}}) == ("a", "b")


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"num_attention_heads": 8, "hidden_size": 64}, "q", Heads(8, 8, 8)),
        ({"n_head": 8, "n_embd": 64, "num_kv_heads": 2}, "q", Heads(8, 2, 8)),
        ({"num_attention_heads": 8, "head_dim": 16, "hidden_size": 64}, "q", Heads(8, 8, 16)),
        ({"text_config": {"num_attention_heads": 2, "hidden_size": 8}}, "q", Heads(2, 2, 4)),
        ({"vision_config": {"num_heads": 2, "embed_dim": 8}}, "visual.q", Heads(2, 2, 4)),
        ({"n_heads": 4, "d_model": 8, "attn_config": {"kv_n_heads": 2}}, "q", Heads(4, 2, 2)),
        ({}, "q", Heads(0, 0, 0)),
    ],
)
def test_attention_sizes(config: dict[str, Any], module: str, expected: Heads) -> None:
    assert attention_sizes(config, module) == expected


def test_expert_names() -> None:
    single = parse_expert("a.block_sparse_moe.experts.12.w1.weight")
    assert single is not None and (single.expert, single.parts) == (12, ("gate",))
    fused = parse_expert("a.mlp.experts.gate_up_proj")
    assert fused is not None and (fused.expert, fused.parts) == (None, ("gate", "up"))
    for name in (
        "a.shared_experts.up_proj.weight",
        "a.experts.router.weight",
        "experts.0.w9.weight",
    ):
        assert parse_expert(name) is None
    assert "a.experts.1.up_proj.weight" in expert_names("a.experts", 1, "up")
    assert ("a.experts.gate_up_proj", ("gate", "up")) in fused_names("a.experts", "up")
