"""Mixture-of-experts: one rule of shapes, and the PEFT version only where shapes are silent."""

from __future__ import annotations

import pytest

from loratool.adapter import Adapter, DeltaSpec
from loratool.bind.bindings import bind
from loratool.options.groups import Names
from loratool.plan import Region, Span
from loratool.store.checkpoint import Checkpoint
from tests.unit.test_bind import adapter, base, error, lora, tensor

E, HIDDEN, INNER = 3, 4, 6
FUSED = {
    "mlp.experts.gate_up_proj": (E, 2 * INNER, HIDDEN),
    "mlp.experts.down_proj": (E, HIDDEN, INNER),
}


def flat(parameter: str, out: int, inner: int, *, count: int = E, rank: int = 2) -> DeltaSpec:
    """Factors of all experts at once, as PEFT flattens them."""
    fields = {"lora_A": tensor(count * rank, inner), "lora_B": tensor(out, count * rank)}
    return DeltaSpec(
        "lowrank", "mlp.experts", parameter, fields, "experts", rank, 4.0, 2.0, experts=count
    )


def separate(
    first: str = "gate_proj", second: str = "up_proj", down: str = "down_proj"
) -> Checkpoint:
    shapes = {}
    for e in range(E):
        shapes[f"mlp.experts.{e}.{first}.weight"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{e}.{second}.weight"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{e}.{down}.weight"] = (HIDDEN, INNER)
    return base(shapes, model_type="qwen3_moe")


def both(*, turned: bool = False) -> Adapter:
    sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    return adapter(*(flat(p, *(s[::-1] if turned else s)) for p, s in sizes.items()))


@pytest.mark.parametrize("turned", [False, True])
def test_fused_base_gets_one_delta_per_expert(turned: bool) -> None:
    found = bind(both(turned=turned), base(FUSED, model_type="qwen3_moe"))
    assert len(found.deltas) == 2 * E
    assert all(d.transposed is turned for d in found.deltas)
    rows = [(d.target.split(".")[-1], d.expert, d.region) for d in found.deltas]
    for e in range(E):
        gate_up = Region(rows=(Span(e * 2 * INNER, (e + 1) * 2 * INNER),))
        assert ("gate_up_proj", e, gate_up) in rows
        assert ("down_proj", e, Region(rows=(Span(e * HIDDEN, (e + 1) * HIDDEN),))) in rows


@pytest.mark.parametrize("turned", [False, True])
def test_separate_base_gets_slices(turned: bool) -> None:
    found = bind(both(turned=turned), separate())
    assert len(found.deltas) == 3 * E
    by_target = {d.target: d for d in found.deltas}
    for e in range(E):
        gate = by_target[f"mlp.experts.{e}.gate_proj.weight"]
        up = by_target[f"mlp.experts.{e}.up_proj.weight"]
        down = by_target[f"mlp.experts.{e}.down_proj.weight"]
        assert (gate.expert, gate.region.source_rows) == (e, (0, INNER))
        assert (up.expert, up.region.source_rows) == (e, (INNER, 2 * INNER))
        assert (down.expert, down.region) == (e, Region())
        assert gate.transposed is up.transposed is down.transposed is turned


def test_mixtral_names_on_disk() -> None:
    shapes = {}
    for e in range(E):
        stem = f"model.layers.0.block_sparse_moe.experts.{e}"
        shapes |= {f"{stem}.w{i}.weight": (INNER, HIDDEN) for i in (1, 3)}
        shapes[f"{stem}.w2.weight"] = (HIDDEN, INNER)
    spec = flat("gate_up_proj", 2 * INNER, HIDDEN)
    one = adapter(
        DeltaSpec(
            "lowrank",
            "model.layers.0.mlp.experts",
            "gate_up_proj",
            spec.fields,
            "experts",
            2,
            4.0,
            2.0,
            experts=E,
        )
    )
    found = bind(one, base(shapes, model_type="mixtral"))
    first, third = found.deltas[:2]
    assert first.target.endswith("experts.0.w1.weight")
    assert third.target.endswith("experts.0.w3.weight")
    assert third.region.source_rows == (INNER, 2 * INNER)


def test_alternatives_are_chosen_by_shape() -> None:
    spec = flat("down_proj", 2 * INNER, HIDDEN)
    one = adapter(
        DeltaSpec(
            "lowrank",
            "mlp.experts",
            "down_proj",
            spec.fields,
            "experts",
            2,
            4.0,
            2.0,
            experts=E,
            alternatives=("gate_up_proj", "down_proj"),
        )
    )
    found = bind(one, base(FUSED))
    assert {d.target for d in found.deltas} == {"mlp.experts.gate_up_proj"}


@pytest.mark.parametrize(
    ("version", "model_type", "expected"),
    [
        ("0.17.0", "qwen3_moe", True),
        ("0.18.1", "gpt_oss", True),
        ("0.18.1", "qwen3_moe", True),
        ("0.19.0", "qwen3_moe", True),
        ("0.19.0", "gpt_oss", False),
        ("0.19.1", "qwen3_moe", False),
        ("0.21.2", "qwen3_moe", False),
        ("0.21.2", "gpt_oss", True),
        ("0.19.1.dev0", "aria", True),
    ],
)
def test_square_experts_follow_the_peft_version(
    version: str, model_type: str, expected: bool
) -> None:
    one = adapter(flat("down_proj", 4, 4), peft_version=version)
    checkpoint = base({"mlp.experts.down_proj": (E, 4, 4)}, model_type=model_type)
    assert all(d.transposed is expected for d in bind(one, checkpoint).deltas)


def test_square_experts_of_unknown_version_ask() -> None:
    checkpoint = base({"mlp.experts.down_proj": (E, 4, 4)}, model_type="qwen3_moe")
    for version in (None, "", "unknown"):
        one = adapter(flat("down_proj", 4, 4), peft_version=version)
        caught = error("LT-436", one, checkpoint)
        assert "--moe-layout" in (caught.hint or "")
        for layout in ("eoi", "eio"):
            found = bind(one, checkpoint, Names(moe_layout=layout))
            assert all(d.transposed is (layout == "eio") for d in found.deltas)


def test_square_experts_stored_flipped_ask() -> None:
    checkpoint = base({"mlp.experts.down_proj": (E, 4, 4)}, model_type="qwen3_vl_moe")
    error("LT-436", adapter(flat("down_proj", 4, 4)), checkpoint)


def test_layout_asked_for_must_fit() -> None:
    error("LT-437", both(), base(FUSED), moe_layout="eio")


def test_wrong_number_of_experts() -> None:
    wrong = adapter(flat("down_proj", HIDDEN, INNER, count=E + 1))
    error("LT-437", wrong, base(FUSED))
    error("LT-437", wrong, separate())
    error("LT-437", adapter(flat("down_proj", HIDDEN, INNER, count=E - 1)), separate())


def test_wrong_size_of_experts() -> None:
    error("LT-437", adapter(flat("down_proj", HIDDEN + 1, INNER)), base(FUSED))
    error("LT-437", adapter(flat("down_proj", HIDDEN, INNER + 1)), separate())


def test_experts_that_the_base_has_not() -> None:
    error("LT-430", both(), base({"mlp.up_proj.weight": (4, 4)}))


def test_single_expert_modules_on_a_fused_base() -> None:
    one = adapter(
        lora("mlp.experts.1.gate_proj", INNER, HIDDEN),
        lora("mlp.experts.1.up_proj", INNER, HIDDEN),
        lora("mlp.experts.2.down_proj", HIDDEN, INNER),
    )
    found = bind(one, base(FUSED, model_type="qwen3_moe"))
    gate, up, down = found.deltas
    assert gate.region.rows == (Span(2 * INNER, 3 * INNER),)
    assert up.region.rows == (Span(3 * INNER, 4 * INNER),)
    assert down.region.rows == (Span(2 * HIDDEN, 3 * HIDDEN),)
    assert gate.expert is None and not gate.transposed


def test_single_expert_modules_by_the_other_leaf_names() -> None:
    one = adapter(
        lora("mlp.experts.0.w1", INNER, HIDDEN),
        lora("mlp.experts.0.w3", INNER, HIDDEN),
        lora("mlp.experts.0.w2", HIDDEN, INNER),
    )
    targets = [d.target.split(".")[-2] for d in bind(one, separate()).deltas]
    assert targets == ["gate_proj", "up_proj", "down_proj"]


def test_single_expert_modules_on_interleaved_experts() -> None:
    shapes = {
        "mlp.experts.gate_up_proj": (E, HIDDEN, 2 * INNER),
        "mlp.experts.down_proj": (E, INNER, HIDDEN),
    }
    one = adapter(
        lora("mlp.experts.1.up_proj", INNER, HIDDEN), lora("mlp.experts.1.down_proj", HIDDEN, INNER)
    )
    up, down = bind(one, base(shapes, model_type="gpt_oss")).deltas
    assert up.region == Region(rows=(Span(HIDDEN, 2 * HIDDEN),), cols=(Span(1, 2 * INNER, 2),))
    assert up.transposed and down.transposed
    assert down.region.rows == (Span(INNER, 2 * INNER),)
    blocks = bind(one, base(shapes, model_type="aria_text")).deltas[0]
    assert blocks.region.cols == (Span(INNER, 2 * INNER),)
    refused = adapter(lora("mlp.experts.1.up_proj", INNER, HIDDEN, kind="dora"))
    error("LT-439", refused, base(shapes, model_type="gpt_oss"))


def test_single_expert_beyond_the_last() -> None:
    error("LT-430", adapter(lora("mlp.experts.3.up_proj", INNER, HIDDEN)), base(FUSED))


def test_shared_experts_are_no_experts() -> None:
    one = adapter(lora("mlp.shared_experts.0.up_proj", INNER, HIDDEN))
    error("LT-430", one, base(FUSED))


def test_quantised_experts_are_refused() -> None:
    quantised = base(FUSED, dtypes={"mlp.experts.down_proj": "U8"}, quantization="mxfp4")
    error("LT-435", both(), quantised)
    packed = base({"mlp.experts.gate_up_proj_blocks": (E, 2, 2, 16)}, quantization="mxfp4")
    error("LT-435", adapter(flat("gate_up_proj", 2 * INNER, HIDDEN)), packed)
