"""Slices: separate projections on fused tensors and fused ones on separate tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratool.archs.fused import fused_leaves, part_spans
from loratool.bind.bindings import bind
from loratool.plan import Region, Span
from tests.unit.test_bind import adapter, base, bias, error, lora

HEADS, KV, DIM, HIDDEN = 4, 2, 3, 12
Q, K = HEADS * DIM, KV * DIM
SIZES = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "hidden_size": HIDDEN,
    "head_dim": DIM,
}


def rows_of(region: Region) -> list[int]:
    return [row for span in region.rows for row in range(span.start, span.stop, span.step)]


def split_on(fused: str, total: int, part: str, size: int, **config: Any) -> Region:
    checkpoint = base({f"a.{fused}.weight": (total, HIDDEN)}, **config)
    (delta,) = bind(adapter(lora(f"a.{part}", size, HIDDEN)), checkpoint).deltas
    assert delta.target == f"a.{fused}.weight"
    return delta.region


@pytest.mark.parametrize("sized", [True, False])
def test_blocks_of_queries_keys_and_values(sized: bool) -> None:
    config = {"model_type": "phi3", **(SIZES if sized else {})}
    total = Q + 2 * K
    assert split_on("qkv_proj", total, "q_proj", Q, **config).rows == (Span(0, Q),)
    assert split_on("qkv_proj", total, "k_proj", K, **config).rows == (Span(Q, Q + K),)
    assert split_on("qkv_proj", total, "v_proj", K, **config).rows == (Span(Q + K, total),)


@pytest.mark.parametrize(("part", "size"), [("q_proj", 4), ("q_proj", 9), ("k_proj", 12)])
def test_blocks_that_cannot_be_attention_heads(part: str, size: int) -> None:
    error("LT-432", adapter(lora(f"a.{part}", size, 4)), base({"a.qkv_proj.weight": (24, 4)}))


def test_halves() -> None:
    assert split_on("gate_up_proj", 20, "up_proj", 10).rows == (Span(10, 20),)
    error("LT-432", adapter(lora("a.up_proj", 9, 4)), base({"a.gate_up_proj.weight": (20, 4)}))


def test_heads_interleaved_as_the_model_reshapes_them() -> None:
    config = {"model_type": "gpt_neox", "num_attention_heads": HEADS, "hidden_size": HIDDEN}
    order = torch.arange(3 * HEADS * DIM).view(HEADS, 3, DIM)
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        region = split_on("query_key_value", 3 * HIDDEN, part, HIDDEN, **config)
        assert rows_of(region) == order[:, index].flatten().tolist()


def test_key_value_groups() -> None:
    config = {"model_type": "falcon", "new_decoder_architecture": True, **SIZES}
    share = HEADS // KV
    order = torch.arange(KV * (share + 2) * DIM).view(KV, share + 2, DIM)
    total = order.numel()
    expected = {"q_proj": order[:, :-2], "k_proj": order[:, -2], "v_proj": order[:, -1]}
    for part, rows in expected.items():
        region = split_on("query_key_value", total, part, rows.numel(), **config)
        assert rows_of(region) == rows.flatten().tolist()


def test_falcon_with_one_key_head_is_blocked() -> None:
    config = {"model_type": "falcon", "multi_query": True, "num_attention_heads": HEADS}
    region = split_on("query_key_value", Q + 2 * DIM, "k_proj", DIM, hidden_size=Q, **config)
    assert region.rows == (Span(Q, Q + DIM),)


def test_unknown_layout_is_not_guessed() -> None:
    checkpoint = base({"a.query_key_value.weight": (36, 12)}, model_type="llama")
    error("LT-430", adapter(lora("a.q_proj", 12, 12)), checkpoint)


def test_columns_of_a_conv1d() -> None:
    checkpoint = base({"h.c_attn.weight": (4, 12), "h.c_attn.bias": (12,)}, model_type="gpt2")
    found = bind(adapter(lora("h.k_proj", 4, 4), bias("h.k_proj", 4)), checkpoint)
    weight, vector = found.deltas
    assert weight.transposed and weight.region == Region(cols=(Span(4, 8),))
    assert not vector.transposed and vector.region == Region(cols=(Span(4, 8),))
    error("LT-439", adapter(lora("h.k_proj", 4, 4, kind="dora")), checkpoint)


def test_dora_rows_carry_over() -> None:
    checkpoint = base({"a.qkv_proj.weight": (Q + 2 * K, HIDDEN)})
    spec = lora("a.k_proj", K, HIDDEN, kind="dora")
    assert bind(adapter(spec), checkpoint).deltas[0].region.rows == (Span(Q, Q + K),)


def test_multihead_attention_from_separate_projections() -> None:
    checkpoint = base({"m.in_proj_weight": (36, 12), "m.in_proj_bias": (36,)})
    found = bind(adapter(lora("m.v_proj", 12, 12), bias("m.v_proj", 12)), checkpoint)
    weight, vector = found.deltas
    assert (weight.target, weight.region.rows) == ("m.in_proj_weight", (Span(24, 36),))
    assert (vector.target, vector.region.cols) == ("m.in_proj_bias", (Span(24, 36),))


SPLIT = {
    "a.q_proj.weight": (Q, HIDDEN),
    "a.k_proj.weight": (K, HIDDEN),
    "a.v_proj.weight": (K, HIDDEN),
    "a.q_proj.bias": (Q,),
    "a.k_proj.bias": (K,),
    "a.v_proj.bias": (K,),
}


def test_fused_adapter_on_separate_tensors() -> None:
    total = Q + 2 * K
    found = bind(adapter(lora("a.qkv_proj", total, HIDDEN), bias("a.qkv_proj", total)), base(SPLIT))
    regions = {d.target: d.region for d in found.deltas}
    assert len(regions) == 6
    assert regions["a.q_proj.weight"] == Region(source_rows=(0, Q))
    assert regions["a.k_proj.weight"] == Region(source_rows=(Q, Q + K))
    assert regions["a.v_proj.bias"] == Region(source_cols=(Q + K, total))
    error("LT-432", adapter(lora("a.qkv_proj", total + 2, HIDDEN)), base(SPLIT))
    error("LT-432", adapter(lora("a.qkv_proj", total, HIDDEN + 1)), base(SPLIT))


def test_fused_adapter_needs_every_part() -> None:
    parts = {n: s for n, s in SPLIT.items() if "v_proj" not in n}
    error("LT-430", adapter(lora("a.qkv_proj", Q + 2 * K, HIDDEN)), base(parts))


def test_multihead_adapter_on_separate_projections() -> None:
    shapes = {f"m.{p}_proj.weight": (12, 12) for p in "qkv"}
    spec = lora("m", 36, 12, parameter="in_proj_weight")
    found = bind(adapter(spec), base(shapes))
    assert [d.region.source_rows for d in found.deltas] == [(0, 12), (12, 24), (24, 36)]


def test_interleaved_adapter_on_separate_tensors() -> None:
    shapes = {f"a.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkv"}
    config = {"model_type": "gpt_neox", "num_attention_heads": HEADS, "hidden_size": HIDDEN}
    spec = lora("a.query_key_value", 3 * HIDDEN, HIDDEN)
    found = bind(adapter(spec), base(shapes, **config))
    keys = [d.region for d in found.deltas if d.target == "a.k_proj.weight"]
    order = torch.arange(3 * HIDDEN).view(HEADS, 3, DIM)[:, 1]
    assert [r for region in keys for r in rows_of(region)] == list(range(HIDDEN))
    sources = [range(*region.source_rows) for region in keys if region.source_rows]
    assert [r for source in sources for r in source] == order.flatten().tolist()


def test_quantised_parts_are_refused() -> None:
    checkpoint = base({"a.qkv_proj.weight": (24, 12)}, dtypes={"a.qkv_proj.weight": "I8"})
    error("LT-435", adapter(lora("a.q_proj", 12, 12)), checkpoint)
    checkpoint = base(SPLIT, dtypes={"a.k_proj.weight": "I8"})
    error("LT-435", adapter(lora("a.qkv_proj", Q + 2 * K, HIDDEN)), checkpoint)


@pytest.mark.parametrize("fused", fused_leaves(), ids=lambda f: f"{f.leaf}-{f.layout}")
def test_parts_cover_the_fused_tensor_once(fused: Any) -> None:
    """Every layout is a permutation of the rows, ascending inside each part."""
    for flags in ({}, {"new_decoder_architecture": True}, {"multi_query": False}):
        for kv_heads in (1, 2, 4):
            config = {**SIZES, "num_key_value_heads": kv_heads, **flags}
            for total in (DIM * (HEADS + 2 * kv_heads), DIM * 3 * HEADS):
                spans = part_spans(fused, "a", config, total, {})
                if spans is None:
                    continue
                rows = [r for p in spans.values() for s in p for r in range(s.start, s.stop)]
                assert sorted(rows) == list(range(total))
                for pieces in spans.values():
                    starts = [s.start for s in pieces]
                    assert starts == sorted(starts)
