"""Names, prefixes, orientation: one rule for the whole adapter, or an error that says why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorData, TensorRef
from loratool.bind.bindings import Bindings, bind
from loratool.bind.names import PREFIXES
from loratool.bind.user_names import parse_rename, parse_skip
from loratool.dtypes import tensor_bytes
from loratool.errors import LoratoolError, MismatchError, UsageError
from loratool.options.groups import Names
from loratool.store.checkpoint import Checkpoint, Shard

Shape = tuple[int, ...]


def base(
    shapes: Mapping[str, Shape],
    *,
    dtypes: Mapping[str, str] | None = None,
    components: tuple[str, ...] = (),
    quantization: str | None = None,
    **config: Any,
) -> Checkpoint:
    """A checkpoint with these tensors; keyword arguments are its configuration."""
    file = Path("/base/model.safetensors")
    tensors = {}
    start = 100
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "F32")
        size = tensor_bytes(dtype, shape)
        tensors[name] = TensorRef(file, name, dtype, shape, start, size)
        start += size
    shard = Shard(file, file.name, "", {}, tuple(tensors), b"")
    return Checkpoint(
        Path("/base"),
        True,
        (shard,),
        tensors,
        config,
        components=components,
        quantization=quantization,
    )


def tensor(*shape: int, dtype: str = "F32", fill: int = 0) -> TensorData:
    return TensorData("t", dtype, shape, bytes([fill]) * tensor_bytes(dtype, shape))


def lora(
    module: str,
    out: int,
    *inner: int,
    rank: int = 2,
    kind: str = "lowrank",
    layout: str | None = None,
    parameter: str = "weight",
    **more: Any,
) -> DeltaSpec:
    """A low-rank delta (out, in…)."""
    layout = layout or ("conv" if len(inner) > 1 else "linear")
    fields = {
        "lora_A": tensor(rank, *inner),
        "lora_B": tensor(out, rank, *([1] * (len(inner) - 1))),
    }
    if kind == "dora":
        fields["magnitude"] = tensor(out)
    return DeltaSpec(kind, module, parameter, fields, layout, rank, 4.0, 2.0, **more)


def bias(module: str, size: int) -> DeltaSpec:
    return DeltaSpec("vector", module, "bias", {"delta": tensor(size)}, "vector", 0, None, 1.0)


def adapter(
    *specs: DeltaSpec,
    replacements: Sequence[Replacement] = (),
    layer_order: tuple[int, ...] | None = None,
    **config: Any,
) -> Adapter:
    return Adapter(
        Path("/adapter"),
        "peft",
        tuple(specs),
        tuple(replacements),
        config={"peft_version": "0.21.2", **config},
        layer_order=layer_order,
    )


def error(code: str, one: Adapter, checkpoint: Checkpoint, **options: Any) -> LoratoolError:
    """Bind, expect an error, and return it."""
    with pytest.raises(LoratoolError) as caught:
        bind(one, checkpoint, Names(**options))
    assert caught.value.code == code, caught.value.message()
    return caught.value


def pairs(bindings: Bindings) -> dict[str, str]:
    return {d.spec.name: d.target for d in bindings.deltas}


LLAMA = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (24, 16),
    "lm_head.weight": (32, 16),
}


def llama_adapter(prefix: str = "model.") -> Adapter:
    return adapter(
        *(lora(f"{prefix}layers.{i}.self_attn.q_proj", 16, 16) for i in range(2)),
        *(lora(f"{prefix}layers.{i}.mlp.up_proj", 24, 16) for i in range(2)),
    )


def test_exact_names() -> None:
    checkpoint = base(LLAMA, model_type="llama")
    found = bind(llama_adapter(), checkpoint)
    assert found.rule == "exact"
    assert pairs(found) == {s.name: s.name for s in llama_adapter().specs}
    assert found.checkpoint is checkpoint
    assert not found.new_tensors and not found.config_changes and not found.notes


@pytest.mark.parametrize("prefix", [p for p in PREFIXES if p != "model."])
def test_adds_and_removes_a_known_prefix(prefix: str) -> None:
    plain = {n: s for n, s in LLAMA.items() if n.startswith("model.layers")}
    longer = base({prefix + n: s for n, s in plain.items()})
    found = bind(llama_adapter(), longer)
    assert set(pairs(found).values()) == set(longer.tensors)
    assert prefix in found.rule or "thinker" in found.rule  # the thinker has a table of its own
    shorter = base(plain)
    found = bind(llama_adapter(prefix + "model."), shorter)
    assert set(pairs(found).values()) == set(plain)


def test_component_prefix_of_a_pipeline() -> None:
    shapes = {"prior.to_q.weight": (4, 6), "decoder.to_k.weight": (4, 6)}
    found = bind(adapter(lora("to_q", 4, 6)), base(shapes, components=("prior", "decoder")))
    assert pairs(found) == {"to_q.weight": "prior.to_q.weight"}


def test_two_equal_rules_are_an_error() -> None:
    shapes = {"text_encoder.q.weight": (4, 6), "text_encoder_2.q.weight": (4, 6)}
    caught = error("LT-431", adapter(lora("q", 4, 6)), base(shapes))
    assert "--rename" in (caught.hint or "")
    found = bind(adapter(lora("q", 4, 6)), base(shapes), Names(rename=("s/^/text_encoder_2./",)))
    assert pairs(found) == {"q.weight": "text_encoder_2.q.weight"}


def test_shapes_choose_between_rules() -> None:
    shapes = {"text_encoder.q.weight": (4, 6), "text_encoder_2.q.weight": (8, 6)}
    assert pairs(bind(adapter(lora("q", 8, 6)), base(shapes))) == {
        "q.weight": "text_encoder_2.q.weight"
    }


def test_exact_wins_over_a_prefix() -> None:
    shapes = {"layers.0.q.weight": (4, 6), "model.layers.0.q.weight": (4, 6)}
    found = bind(adapter(lora("layers.0.q", 4, 6)), base(shapes))
    assert pairs(found) == {"layers.0.q.weight": "layers.0.q.weight"}


def test_one_rule_for_all_modules() -> None:
    shapes = {"a.weight": (4, 6), "model.b.weight": (4, 6)}
    caught = error("LT-430", adapter(lora("a", 4, 6), lora("b", 4, 6)), base(shapes))
    assert "1 of 2 modules" in caught.what


def test_renames_of_a_model_type() -> None:
    shapes = {
        "model.decoder.layers.0.fc1.weight": (8, 4),
        "model.decoder.layers.0.self_attn.out_proj.weight": (4, 4),
    }
    memory = adapter(
        lora("model.decoder.layers.0.mlp.fc1", 8, 4),
        lora("model.decoder.layers.0.self_attn.o_proj", 4, 4),
    )
    for config in ({"model_type": "detr"}, {}):
        found = bind(memory, base(shapes, **config))
        assert set(pairs(found).values()) == set(shapes)
        assert "names" in found.rule


def test_renames_in_the_other_direction() -> None:
    shapes = {"model.decoder.layers.0.mlp.fc1.weight": (8, 4)}
    old = adapter(lora("model.decoder.layers.0.fc1", 8, 4))
    found = bind(old, base(shapes, model_type="detr"))
    assert set(pairs(found).values()) == set(shapes)


def test_rename_together_with_a_prefix() -> None:
    shapes = {
        "language_model.model.layers.0.q_proj.weight": (4, 4),
        "vision_tower.vision_model.encoder.layers.0.q_proj.weight": (6, 6),
    }
    one = adapter(
        lora("base_model.model.language_model.layers.0.q_proj", 4, 4),
        lora("base_model.model.vision_tower.encoder.layers.0.q_proj", 6, 6),
    )
    found = bind(one, base(shapes, model_type="llava"))
    assert set(pairs(found).values()) == set(shapes)


def test_text_encoder_of_a_pipeline_by_its_own_table() -> None:
    name = "text_encoder.text_model.encoder.layers.0.q_proj"
    checkpoint = base(
        {f"{name}.weight": (4, 4), "unet.to_q.weight": (4, 6)},
        components=("text_encoder", "unet"),
        text_encoder={"model_type": "clip_text_model"},
        unet={"_class_name": "UNet2DConditionModel"},
    )
    one = adapter(lora("text_encoder.encoder.layers.0.q_proj", 4, 4), lora("unet.to_q", 4, 6))
    assert set(pairs(bind(one, checkpoint)).values()) == set(checkpoint.tensors)


def test_unmatched_lists_and_groups_everything() -> None:
    specs = [lora(f"text_encoder.layers.{i}.q_proj", 4, 4) for i in range(12)]
    checkpoint = base({"unet.to_q.weight": (4, 6)})
    caught = error("LT-430", adapter(*specs, lora("unet.to_q", 4, 6)), checkpoint)
    assert "12 of 13 modules" in caught.what
    assert "all are text encoder (text_encoder.*)" in caught.what
    assert "and 2 more" in (caught.key or "")
    assert "--skip te" in (caught.hint or "")


def test_unmatched_groups_by_prefix_and_names_the_nearest() -> None:
    specs = [lora("encoder.layers.0.q_prj", 16, 16), lora("decoder.layers.0.q_prj", 16, 16)]
    caught = error("LT-430", adapter(*specs), base(LLAMA))
    assert "1 encoder.layers.*" in caught.what and "1 decoder.layers.*" in caught.what
    nearest = error("LT-430", adapter(lora("model.layers.0.mlp.upproj", 24, 16)), base(LLAMA))
    assert "model.layers.0.mlp.up_proj.weight" in (nearest.expected or "")


def test_unmatched_suggests_the_rename_that_would_match() -> None:
    one = llama_adapter("my.own.")
    caught = error("LT-430", one, base(LLAMA))
    match = re.search(r"--rename '(.*)' would match 4 of 4", caught.hint or "")
    assert match is not None
    found = bind(one, base(LLAMA), Names(rename=(match[1],)))
    assert set(pairs(found).values()) < set(LLAMA)


def test_no_rename_is_suggested_that_would_take_another_modules_place() -> None:
    shapes = {f"{place}.self_attn.q_proj.weight": (8, 8) for place in ("layers.0", "0", "1")}
    for name in ("layers.9.self_attn.q_proj", "9.self_attn.q_proj"):
        one = adapter(*(lora(n.removesuffix(".weight"), 8, 8) for n in shapes), lora(name, 8, 8))
        assert "--rename" not in (error("LT-430", one, base(shapes)).hint or "")
    half = adapter(lora("a.layers.0.q.proj", 8, 8), lora("layers.1.q.proj", 8, 8))
    there = base({f"a.layers.{i}.q.proj.weight": (8, 8) for i in range(2)})
    assert "--rename" not in (error("LT-430", half, there).hint or "")


def test_skip_by_component_and_by_regex() -> None:
    one = adapter(lora("text_encoder_2.q", 4, 4), lora("unet.to_q", 4, 6), lora("unet.to_k", 4, 6))
    checkpoint = base({"unet.to_q.weight": (4, 6)})
    found = bind(one, checkpoint, Names(skip=("te", r"to_k$")))
    assert set(pairs(found)) == {"unet.to_q.weight"}
    assert found.skipped == ("text_encoder_2.q", "unet.to_k")
    error("LT-448", one, checkpoint, skip=("te", "unet"))


def test_allow_unmatched_reports_what_it_leaves_out() -> None:
    one = adapter(lora("model.layers.0.mlp.up_proj", 24, 16), lora("gone.q", 4, 4))
    found = bind(one, base(LLAMA), Names(allow_unmatched=True))
    assert set(pairs(found)) == {"model.layers.0.mlp.up_proj.weight"}
    assert found.skipped == ("gone.q",)
    error("LT-430", adapter(lora("gone.q", 4, 4)), base(LLAMA), allow_unmatched=True)


def test_allow_unmatched_never_hides_a_wrong_shape() -> None:
    one = adapter(
        lora("model.layers.0.mlp.up_proj", 25, 16), lora("model.layers.1.mlp.up_proj", 24, 16)
    )
    error("LT-432", one, base(LLAMA), allow_unmatched=True)


def test_allow_unmatched_shows_one_wrong_shape_among_many_missing_names() -> None:
    gone = [lora(f"gone.{i}.q", 4, 4) for i in range(3)]
    fits = lora("model.layers.1.mlp.up_proj", 24, 16)
    one = adapter(lora("model.layers.0.mlp.up_proj", 25, 16), fits, *gone)
    error("LT-432", one, base(LLAMA), allow_unmatched=True)


def test_mixed_namings_meet_in_memory() -> None:
    shapes = {"layers.0.fc1.weight": (8, 4), "layers.0.self_attn.o_proj.weight": (4, 4)}
    one = adapter(lora("layers.0.mlp.fc1", 8, 4), lora("layers.0.self_attn.out_proj", 4, 4))
    found = bind(one, base(shapes, model_type="detr"))
    assert set(pairs(found).values()) == set(shapes)
    assert "both sides" in found.rule


def test_a_renaming_that_joins_base_tensors_is_not_used() -> None:
    shapes = {
        "layers.0.fc1.weight": (8, 4),
        "layers.0.mlp.fc1.weight": (8, 4),
        "layers.0.fc2.weight": (4, 8),
    }
    error("LT-430", adapter(lora("layers.0.mlp.fc2", 4, 8)), base(shapes, model_type="detr"))


def test_one_prefix_for_another() -> None:
    shapes = {"model.language_model.layers.0.q.weight": (4, 6), "lm_head.weight": (8, 6)}
    one = adapter(lora("model.layers.0.q", 4, 6), lora("lm_head", 8, 6))
    found = bind(one, base(shapes))
    assert set(pairs(found).values()) == set(shapes)
    assert "->" in found.rule


def test_rename_syntax() -> None:
    assert parse_rename("s/a/b/").apply(["a.a"]) == ["b.a"]
    assert parse_rename("s|a|b|g").apply(["a.a"]) == ["b.b"]
    assert parse_rename(r"s/x\/y/z/").apply(["x/y"]) == ["z"]
    assert parse_rename(r"s/(\d+)/n\1/").apply(["l.3"]) == ["l.n3"]
    assert parse_rename("s/^model//").apply(["model.layers"]) == [".layers"]


@pytest.mark.parametrize("text", ["", "s", "a/b/c/", "s/a/b", "s/a/b/i", "s//b/", "sxaxbx"])
def test_bad_rename_syntax(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rename(text)
    assert caught.value.code == "LT-240"


@pytest.mark.parametrize("text", ["s/(/b/", "s/a/\\7/", f"s/{'a' * 513}/b/"])
def test_bad_rename_pattern(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rename(text)
    assert caught.value.code == "LT-241"


def test_bad_skip_pattern() -> None:
    with pytest.raises(UsageError) as caught:
        parse_skip("(")
    assert caught.value.code == "LT-242"


def test_rename_without_effect_is_noted() -> None:
    found = bind(llama_adapter(), base(LLAMA), Names(rename=("s/zzz/y/",)))
    assert any("changed no module name" in note for note in found.notes)


def test_rename_may_not_join_two_modules() -> None:
    one = adapter(
        lora("model.layers.0.self_attn.q_proj", 16, 16),
        lora("model.layers.1.self_attn.q_proj", 16, 16),
    )
    error("LT-447", one, base(LLAMA), rename=(r"s/layers\.1/layers.0/",))


def test_contradicting_options() -> None:
    error("LT-243", llama_adapter(), base(LLAMA), untie=True, keep_tied=True)
    error("LT-244", llama_adapter(), base(LLAMA), moe_layout="oie")


def test_wrong_shape_is_never_a_name_problem() -> None:
    one = adapter(
        lora("model.layers.0.mlp.up_proj", 25, 16), lora("model.layers.1.mlp.up_proj", 24, 17)
    )
    caught = error("LT-432", one, base(LLAMA))
    assert "2 shapes" in caught.what
    assert caught.expected is not None and "(24, 16)" in caught.expected
    assert caught.got == "(25, 16)"


CONV1D = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4)}


def conv1d_adapter(*, flag: bool) -> Adapter:
    return adapter(
        lora("h.0.attn.c_attn", 12, 4, transposed=flag),
        lora("h.0.attn.c_proj", 4, 4, transposed=flag),
    )


@pytest.mark.parametrize("flag", [True, False])
def test_architecture_decides_about_conv1d(flag: bool) -> None:
    found = bind(conv1d_adapter(flag=flag), base(CONV1D, model_type="gpt2"))
    assert all(d.transposed for d in found.deltas)


def test_flag_decides_where_the_architecture_is_unknown() -> None:
    for config in ({}, {"model_type": "mine", "auto_map": {}}, {"model_type": "mine"}):
        found = bind(conv1d_adapter(flag=True), base(CONV1D, **config))
        assert all(d.transposed for d in found.deltas)


def test_transposed_fit_without_evidence_is_an_error() -> None:
    caught = error("LT-433", conv1d_adapter(flag=False), base(CONV1D))
    assert caught.key == "h.0.attn.c_attn.weight"
    assert caught.expected is not None and "(4, 12)" in caught.expected
    assert caught.got == "(12, 4)"
    error("LT-433", conv1d_adapter(flag=True), base(CONV1D, model_type="llama"))


def test_square_linear_ignores_the_flag_as_peft_does() -> None:
    square = adapter(lora("model.layers.0.self_attn.q_proj", 16, 16, transposed=True))
    assert not bind(square, base(LLAMA, model_type="llama")).deltas[0].transposed
    assert bind(square, base(LLAMA)).deltas[0].transposed


def test_other_modules_are_evidence_about_the_flag() -> None:
    one = adapter(
        lora("model.layers.0.self_attn.q_proj", 16, 16, transposed=True),
        lora("model.layers.0.mlp.up_proj", 24, 16, transposed=True),
    )
    assert not any(d.transposed for d in bind(one, base(LLAMA)).deltas)


def test_a_head_is_no_evidence_and_evidence_both_ways_is_an_error() -> None:
    head = lora("lm_head", 20, 4, transposed=True)
    specs = (*conv1d_adapter(flag=True).specs, head)
    shapes = {**CONV1D, "lm_head.weight": (20, 4)}
    found = bind(adapter(*specs), base(shapes, model_type="mine"))
    assert {d.target: d.transposed for d in found.deltas} == {
        "h.0.attn.c_attn.weight": True, "h.0.attn.c_proj.weight": True, "lm_head.weight": False,
    }  # fmt: skip
    assert not found.notes
    other = lora("h.0.fc", 20, 4, transposed=True)
    mixed = base({**CONV1D, "h.0.fc.weight": (20, 4)}, model_type="mine")
    caught = error("LT-433", adapter(*specs[:2], other), mixed)
    assert caught.key == "h.0.attn.c_proj.weight" and caught.got is not None
    assert "some (in, out)" in caught.got
    assert all(d.target != caught.key for d in bind(adapter(specs[0], other), mixed).deltas)


def test_untransposed_weight_of_a_conv1d_architecture_is_refused() -> None:
    shapes = {"h.0.attn.c_attn.weight": (12, 4)}
    one = adapter(lora("h.0.attn.c_attn", 12, 4))
    error("LT-432", one, base(shapes, model_type="gpt2"))


def test_embedding_is_always_transposed() -> None:
    one = adapter(lora("model.embed_tokens", 16, 32, layout="embedding"))
    assert bind(one, base(LLAMA)).deltas[0].transposed
    error("LT-432", adapter(lora("model.embed_tokens", 32, 16, layout="embedding")), base(LLAMA))


def test_dora_magnitudes_must_fit() -> None:
    good = lora("model.layers.0.mlp.up_proj", 24, 16, kind="dora")
    assert bind(adapter(good), base(LLAMA)).deltas[0].spec is good
    fields = {**good.fields, "magnitude": tensor(16)}
    bad = DeltaSpec("dora", good.module, "weight", fields, "linear", 2, 4.0, 2.0)
    error("LT-432", adapter(bad), base(LLAMA))


def test_block_diagonal_factors_count_as_their_expansion() -> None:
    one = lora("model.layers.0.mlp.up_proj", 24, 8, blocks=(2, "A"))
    assert bind(adapter(one), base(LLAMA)).deltas[0].spec is one


def test_convolutions() -> None:
    shapes = {"c.weight": (8, 4, 3, 3), "p.weight": (8, 4, 1, 1), "l.weight": (8, 4)}
    found = bind(
        adapter(lora("c", 8, 4, 3, 3), lora("p", 8, 4), lora("l", 8, 4, 1, 1)), base(shapes)
    )
    assert [d.spec.layout for d in found.deltas] == ["conv", "conv", "linear"]
    assert not any(d.transposed for d in found.deltas)
    error("LT-432", adapter(lora("c", 8, 4, 5, 5)), base(shapes))
    caught = error("LT-434", adapter(lora("c", 8, 8, 3, 3)), base(shapes))
    assert "grouped convolution cannot be merged" in caught.what


MHA = {
    "attn.in_proj_weight": (48, 16),
    "attn.in_proj_bias": (48,),
    "attn.out_proj.weight": (16, 16),
}


def test_multihead_attention() -> None:
    both = adapter(lora("attn", 48, 16, parameter="in_proj_weight"), lora("attn.out_proj", 16, 16))
    found = bind(both, base(MHA))
    assert set(pairs(found).values()) == {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert not found.notes
    alone = bind(adapter(lora("attn.out_proj", 16, 16)), base(MHA))
    assert "forward ignores it" in alone.notes[0]


def test_bias_deltas_need_a_bias() -> None:
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (4, 6)}
    found = bind(adapter(lora("a", 4, 6), bias("a", 4)), base(shapes))
    assert pairs(found)["a.bias"] == "a.bias"
    error("LT-438", adapter(lora("b", 4, 6), bias("b", 4)), base(shapes))
    error("LT-432", adapter(bias("a", 5)), base(shapes))


def test_quantised_targets_are_refused() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    quantised = base(LLAMA, dtypes={name: "F8_E4M3"}, quantization="fp8")
    caught = error("LT-435", adapter(lora("model.layers.0.mlp.up_proj", 24, 16)), quantised)
    assert "fp8" in (caught.got or "") and "16-bit" in (caught.hint or "")
    packed = base({"a.qweight": (2, 4), "a.scales": (1, 4)}, quantization="gptq")
    caught = error("LT-435", adapter(lora("a", 4, 16)), packed)
    assert caught.got == "gptq"


def test_two_parameters_with_alternatives() -> None:
    one = lora("m.experts", 6, 4, parameter="down_proj", alternatives=("gate_up_proj",))
    found = bind(
        adapter(one), base({"m.experts.gate_up_proj": (6, 4), "m.experts.down_proj": (4, 6)})
    )
    assert pairs(found) == {"m.experts.down_proj": "m.experts.gate_up_proj"}


WORDS = st.sampled_from(
    ["model", "language_model", "base_model", "unet", "x", "wrap", "text_model"]
)


@settings(max_examples=200, deadline=None)
@given(
    drift=st.lists(WORDS, max_size=3),
    from_base=st.booleans(),
    layers=st.integers(1, 3),
    broken=st.integers(0, 2),
)
def test_prefix_drift_is_undone_or_reported(
    drift: list[str], from_base: bool, layers: int, broken: int
) -> None:
    """Never half bound: every module has its own twin as target, or there is an error."""
    stems = [f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in ("q", "k")]
    prefix = "".join(f"{word}." for word in drift)
    there, here = ("", prefix) if from_base else (prefix, "")
    checkpoint = base({f"{there}{stem}.weight": (4, 6) for stem in stems})
    names = [f"{here}{stem}" for stem in stems]
    for i in range(min(broken, len(names))):
        names[i] = "odd." + names[i]
    one = adapter(*(lora(name, 4, 6) for name in names))
    try:
        found = bind(one, checkpoint)
    except MismatchError as caught:
        assert caught.code in ("LT-430", "LT-431")
        assert caught.hint
        return
    assert len(found.deltas) == len(names)
    targets = [d.target for d in found.deltas]
    assert len(set(targets)) == len(targets)
    for name, target in zip(names, targets, strict=True):
        assert name.split("model.layers")[-1] == target.split("model.layers")[-1].removesuffix(
            ".weight"
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True), st.data())
def test_binding_is_injective(leaves: list[str], data: st.DataObject) -> None:
    checkpoint = base({f"model.{leaf}.weight": (4, 6) for leaf in "abcdef"})
    target = data.draw(st.sampled_from("abcdef"))
    rename = f"s/^{data.draw(st.sampled_from('abcdef'))}$/{target}/"
    one = adapter(*(lora(leaf, 4, 6) for leaf in leaves))
    try:
        found = bind(one, checkpoint, Names(rename=(rename,)))
    except MismatchError as caught:
        assert caught.code == "LT-447"
        return
    assert len({d.target for d in found.deltas}) == len(leaves)
