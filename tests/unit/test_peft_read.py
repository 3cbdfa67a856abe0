"""The traps of dialects_llm §§1, 2 and 10 that concern reading PEFT files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.dialects import open_adapter
from loratool.errors import (
    BadFileError,
    LoratoolError,
    MismatchError,
    UnsafeContentError,
    UsageError,
)
from loratool.options.groups import Read
from tests.unit.peft_files import PREFIX, by_name, pair, read, write_folder, zeros

DATA = Path(__file__).parents[1] / "data" / "llm"

# ------------------------------------------------------------------------ containers


def test_a_file_takes_the_configuration_beside_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q"))
    adapter = open_adapter(folder / "adapter_model.safetensors")
    assert adapter.specs[0].scaling == 2.0 and adapter.config["r"] == 4


def test_a_file_of_another_name_does_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q"))
    other = shutil.copy(folder / "adapter_model.safetensors", folder / "other.safetensors")
    with pytest.raises(UsageError):
        open_adapter(Path(other))


def test_without_configuration_alpha_is_asked_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q", rank=2) | pair("k", rank=3))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UsageError) as caught:
        open_adapter(folder)
    assert caught.value.code == "LT-280" and "--alpha" in str(caught.value.hint)
    adapter = open_adapter(folder, Read(alpha=6))
    assert {s.module: (s.rank, s.scaling) for s in adapter.specs} == {"q": (2, 3), "k": (3, 2)}
    assert any("no configuration" in n for n in adapter.notes)


@pytest.mark.parametrize(
    ("tensors", "code", "method"),
    [
        ({"m.q.lora_E": zeros(4, 1), "m.q.lora_A": zeros(4, 16)}, "LT-361", "ADALORA"),
        ({"prompt_embeddings": zeros(4, 8)}, "LT-402", "prompt tuning"),
    ],
)
def test_without_configuration_other_methods_are_named(
    tmp_path: Path, tensors: dict[str, Any], code: str, method: str
) -> None:
    folder = write_folder(tmp_path, tensors, prefix="")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoratoolError) as caught:
        open_adapter(folder, Read(alpha=8))
    assert caught.value.code == code and method in str(caught.value)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.marker,))


def test_a_pickle_alone_is_refused_unopened(tmp_path: Path) -> None:
    marker = tmp_path / "opened"
    folder = write_folder(tmp_path, pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(_Bomb(marker), folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(UnsafeContentError) as caught:
            open_adapter(path)
        assert (caught.value.code, caught.value.exit_code) == ("LT-920", 9)
    assert not marker.exists()


def test_safetensors_is_taken_where_a_pickle_lies_beside_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q"))
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert len(open_adapter(folder).specs) == 1


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, pair("q"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-1.safetensors")
    with pytest.raises(BadFileError) as caught:
        open_adapter(folder)
    assert caught.value.code == "LT-360" and "adapter_model-1" in str(caught.value)


# ------------------------------------------------------------------------------ names


def test_a_missing_prefix_is_accepted_with_a_note(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("model.q"), prefix="")
    assert adapter.specs[0].module == "model.q"
    assert any("lack the prefix" in n for n in adapter.notes)


def test_a_prefix_outside_is_accepted(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("model.q"), prefix="thinker." + PREFIX)
    assert adapter.specs[0].module == "thinker.model.q"


def test_a_module_path_that_repeats_the_prefix_keeps_it(tmp_path: Path) -> None:
    assert read(tmp_path, pair(PREFIX + "q")).specs[0].module == PREFIX + "q"


def test_an_adapter_name_left_in_the_keys_is_accepted(tmp_path: Path) -> None:
    tensors = {
        "q.lora_A.default.weight": zeros(4, 16),
        "q.lora_B.default.weight": zeros(8, 4),
        "e.lora_embedding_A.default": zeros(4, 32),
        "e.lora_embedding_B.default": zeros(16, 4),
    }
    adapter = read(tmp_path, tensors)
    assert [s.name for s in adapter.specs] == ["e.weight", "q.weight"]
    assert any("'default'" in n for n in adapter.notes)


# ---------------------------------------------------------------------------- factors


def test_the_layouts_of_linear_conv_and_embedding(tmp_path: Path) -> None:
    tensors = pair("q") | {
        "c1.lora_A.weight": zeros(4, 3, 5),
        "c1.lora_B.weight": zeros(6, 4, 1),
        "c3.lora_A.weight": zeros(4, 3, 1, 2, 2),
        "c3.lora_B.weight": zeros(6, 4, 1, 1, 1),
        "e.lora_embedding_A": zeros(4, 32),
        "e.lora_embedding_B": zeros(16, 4),
    }
    specs = by_name(read(tmp_path, tensors))
    layouts = {name: spec.layout for name, spec in specs.items()}
    assert layouts == {
        "q.weight": "linear", "c1.weight": "conv", "c3.weight": "conv", "e.weight": "embedding",
    }  # fmt: skip
    assert all(spec.rank == 4 for spec in specs.values())
    assert specs["e.weight"].fields["lora_A"].shape == (4, 32)


def test_fan_in_fan_out_is_a_hint_for_linear_modules_only(tmp_path: Path) -> None:
    tensors = pair("q") | {"c.lora_A.weight": zeros(4, 3, 5), "c.lora_B.weight": zeros(6, 4, 1)}
    specs = by_name(read(tmp_path, tensors, fan_in_fan_out=True))
    assert specs["q.weight"].transposed and not specs["c.weight"].transposed


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_factor_alone_names_its_missing_partner(tmp_path: Path, side: str) -> None:
    tensors = {k: v for k, v in pair("m.q").items() if f"lora_{side}" in k}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors)
    partner = "B" if side == "A" else "A"
    assert caught.value.code == "LT-362" and f"m.q.lora_{partner}.weight" in str(caught.value)


@pytest.mark.parametrize("name", ["q.lora_magnitude_vector", "q.lora_B.bias", "q.lora_diag"])
def test_parts_without_factors_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, {name: zeros(8)})
    assert caught.value.code == "LT-373"


def test_factors_of_two_layouts_on_one_module_are_refused(tmp_path: Path) -> None:
    tensors = pair("q") | {"q.lora_embedding_A": zeros(4, 8), "q.lora_embedding_B": zeros(8, 4)}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors)
    assert caught.value.code == "LT-375"


def test_lora_factors_in_trainable_tokens_are_refused(tmp_path: Path) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "r": 4}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, pair("q"), config=config)
    assert caught.value.code == "LT-374"


def test_inner_ranks_must_agree(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": zeros(4, 16), "q.lora_B.weight": zeros(8, 5)}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors)
    error = caught.value
    assert error.code == "LT-363" and "[4, 16] and [8, 5]" in str(error)


def test_a_grouped_convolution_is_left_to_binding(tmp_path: Path) -> None:
    tensors = {"c.lora_A.weight": zeros(4, 4, 3, 3), "c.lora_B.weight": zeros(8, 2, 1, 1)}
    assert read(tmp_path / "a", tensors).specs[0].layout == "conv"
    with pytest.raises(BadFileError):
        read(tmp_path / "b", tensors | {"c.lora_B.weight": zeros(8, 3, 1, 1)})


@pytest.mark.parametrize("shape", [(0,), (64,), (0, 16), (4, 0), ()])
def test_ungathered_zero3_or_fsdp_shards_are_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = pair("q") | {"q.lora_A.weight": torch.zeros(shape)}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors)
    assert caught.value.code == "LT-364" and "ZeRO-3" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_factors_must_be_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = pair("q") | {"q.lora_B.weight": zeros(8, 4, dtype=dtype)}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors)
    assert caught.value.code == "LT-365" and "q.lora_B.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("q.lora_B.weight", (8, 4, 1)), ("c.lora_B.weight", (6, 4, 3)), ("q.lora_B.bias", (7,)),
     ("q.lora_magnitude_vector", (7,)), ("q.lora_magnitude_vector", (2, 4)),
     ("e.lora_embedding_B", (8, 4, 1))],
)  # fmt: skip
def test_shapes_must_fit_their_role(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    others = {
        "c.lora_A.weight": zeros(4, 3, 5),
        "c.lora_B.weight": zeros(6, 4, 1),
        "e.lora_embedding_A": zeros(4, 32),
        "e.lora_embedding_B": zeros(16, 4),
    }
    tensors = pair("q") | ({} if "magnitude" in name else others) | {name: zeros(*shape)}
    fields = {"lora_bias": True} if "bias" in name else {}
    magnitude = {"use_dora": True} if "magnitude" in name else {}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors, **fields, **magnitude)
    assert caught.value.code == "LT-366" and name in str(caught.value.key)


# --------------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_in_both_spellings(tmp_path: Path, name: str) -> None:
    adapter = read(tmp_path, pair("q") | {f"q.{name}": zeros(8)}, use_dora=True)
    spec = adapter.specs[0]
    assert spec.kind == "dora" and spec.fields["magnitude"].shape == (8,)
    assert not spec.is_additive


def test_dora_is_never_read_as_plain_lora(tmp_path: Path) -> None:
    with pytest.raises(BadFileError) as missing:
        read(tmp_path / "a", pair("q"), use_dora=True)
    with pytest.raises(MismatchError) as denied:
        read(tmp_path / "b", pair("q") | {"q.lora_magnitude_vector": zeros(8)})
    assert (missing.value.code, denied.value.code) == ("LT-370", "LT-407")


def test_lora_bias_is_a_delta_with_the_scaling_of_its_module(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("q") | {"q.lora_B.bias": zeros(8)}, lora_bias=True)
    weight, bias = adapter.specs
    assert (bias.kind, bias.parameter, bias.layout, bias.rank) == ("vector", "bias", "vector", 0)
    assert bias.scaling == weight.scaling == 2.0 and set(bias.fields) == {"delta"}


def test_lora_bias_that_the_configuration_denies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair("q") | {"q.lora_B.bias": zeros(8)})
    assert caught.value.code == "LT-407"


def test_kasa_has_a_diagonal_and_changes_the_base(tmp_path: Path) -> None:
    tensors = pair("q") | {"q.lora_diag": zeros(4)}
    spec = read(tmp_path / "a", tensors, kasa_config={"beta": 1e-4}).specs[0]
    assert spec.base_change == "kasa" and spec.fields["diag"].shape == (4,)
    with pytest.raises(BadFileError) as wrong:
        read(tmp_path / "d", tensors | {"q.lora_diag": zeros(5)}, kasa_config={})
    assert wrong.value.code == "LT-366"
    with pytest.raises(BadFileError) as missing:
        read(tmp_path / "b", pair("q"), kasa_config={})
    with pytest.raises(MismatchError) as denied:
        read(tmp_path / "c", tensors)
    assert (missing.value.code, denied.value.code) == ("LT-372", "LT-407")


def _block_config(**more: object) -> dict[str, object]:
    lists = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}
    return {"use_bdlora": {"nblocks": 2} | lists | more}


def test_bdlora_matches_parts_of_the_module_path(tmp_path: Path) -> None:
    tensors = {
        "m.o_proj.lora_A.weight": zeros(4, 8),
        "m.o_proj.lora_B.weight": zeros(16, 4),
        "m.my_q_proj_2.lora_A.weight": zeros(4, 16),
        "m.my_q_proj_2.lora_B.weight": zeros(16, 2),
    }
    specs = by_name(read(tmp_path, tensors, **_block_config()))
    assert specs["m.o_proj.weight"].blocks == (2, "A")
    assert specs["m.my_q_proj_2.weight"].blocks == (2, "B")


@pytest.mark.parametrize("name", ["m.k", "m.o_proj.q_proj"])
def test_bdlora_is_strict_unless_the_configuration_says_otherwise(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair(name), **_block_config())
    assert caught.value.code == "LT-408"


def test_bdlora_without_strict_match_and_with_one_block_is_plain(tmp_path: Path) -> None:
    loose = read(tmp_path / "a", pair("m.k"), **_block_config(match_strict=False))
    single = read(tmp_path / "b", pair("m.q_proj"), **_block_config(nblocks=1))
    assert loose.specs[0].blocks is None and single.specs[0].blocks is None


@pytest.mark.parametrize(
    "name",
    ["q.lora_velora_embed", "q.lora_monteclora_sampler.default.std", "q.lora_velora_embed.default"],
)
def test_state_of_training_is_kept_aside_and_said(tmp_path: Path, name: str) -> None:
    adapter = read(tmp_path, pair("q") | {name: zeros(3)})
    assert [ref.name for ref in adapter.unclaimed] == [PREFIX + name]
    assert any("state of training" in n and name in n for n in adapter.notes)


def test_megatron_names_are_plain(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("decoder.layers.0.linear_qkv"), megatron_config={"a": 1})
    assert adapter.specs[0].module == "decoder.layers.0.linear_qkv"


# ----------------------------------------------------------------- MultiheadAttention


def _mha(rank: int = 4) -> dict[str, torch.Tensor]:
    return pair("l.self_attn", rank, 16, 48) | pair("l.self_attn.base_layer.out_proj", rank, 16, 16)


@pytest.mark.parametrize(
    ("version", "asked", "scaling"),
    [("0.21.2", None, 4.0), (..., None, 4.0), ("0.22.0", None, 2.0), ("0.21.2", "once", 2.0),
     ("0.22.0", "twice", 4.0)],
)  # fmt: skip
def test_mha_output_counts_twice_as_in_training(
    tmp_path: Path, version: object, asked: str | None, scaling: float
) -> None:
    adapter = read(tmp_path, _mha(), Read(mha_out_proj=asked), peft_version=version)
    specs = by_name(adapter)
    assert specs["l.self_attn.in_proj_weight"].scaling == 2.0
    assert specs["l.self_attn.out_proj.weight"].scaling == scaling
    word = "twice" if scaling == 4.0 else "once"
    assert any(f"counts {word}" in n for n in adapter.notes)


def test_mha_takes_patterns_of_the_module_for_both_projections(tmp_path: Path) -> None:
    specs = by_name(
        read(tmp_path, _mha(2), rank_pattern={"self_attn": 2, "out_proj": 7},
             alpha_pattern={"self_attn": 6})
    )  # fmt: skip
    assert specs["l.self_attn.in_proj_weight"].scaling == 3.0
    assert specs["l.self_attn.out_proj.weight"].scaling == 6.0


def test_mha_biases_of_lora_b(tmp_path: Path) -> None:
    """PEFT merges the one of out_proj once, as a plain layer does, and never that of in_proj."""
    tensors = _mha() | {
        "l.self_attn.lora_B.bias": zeros(48),
        "l.self_attn.base_layer.out_proj.lora_B.bias": zeros(16),
    }
    adapter = read(tmp_path, tensors, lora_bias=True)
    assert by_name(adapter)["l.self_attn.out_proj.bias"].scaling == 2.0
    assert [ref.name for ref in adapter.unclaimed] == [PREFIX + "l.self_attn.lora_B.bias"]
    assert any("l.self_attn.lora_B.bias is not used" in n for n in adapter.notes)


def test_out_proj_alone_is_a_plain_module(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.self_attn.out_proj"))
    assert by_name(adapter)["l.self_attn.out_proj.weight"].scaling == 2.0 and not adapter.notes


def test_fan_in_fan_out_does_not_reach_in_proj(tmp_path: Path) -> None:
    specs = by_name(read(tmp_path, _mha(), fan_in_fan_out=True))
    assert not specs["l.self_attn.in_proj_weight"].transposed


# ------------------------------------------------------------------ target_parameters


def _experts(module: str, rows: int = 16) -> dict[str, torch.Tensor]:
    return pair(f"{module}.base_layer", rows, 16, 48) | pair(module, rows, 24, 16)


@pytest.mark.parametrize("start", ["pissa", "olora", True])
def test_what_is_cut_out_of_a_small_weight_has_less_ranks_than_stated(
    tmp_path: Path, start: str | bool
) -> None:
    """A head of two labels at r = 4: PEFT cuts two ranks out, and scales by alpha / 4."""
    tensors, how = pair("score", 2, 8, 2), {"r": 4, "init_lora_weights": start}
    if start is True:
        with pytest.raises(MismatchError) as caught:
            read(tmp_path, tensors, **how)
        assert caught.value.code == "LT-405"
    else:
        (spec,) = read(tmp_path, tensors, **how).specs
        assert (spec.rank, spec.scaling) == (2, spec.alpha / 4)


@pytest.mark.parametrize("order", [("down_proj", "gate_up_proj"), ("gate_up_proj", "down_proj")])
def test_parameters_nest_in_order_of_registration_not_of_the_list(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    adapter = read(
        tmp_path, _experts("l.0.mlp.experts"), target_parameters=[f"experts.{p}" for p in order]
    )
    found = {s.parameter: (s.module, s.fields["lora_A"].shape) for s in adapter.specs}
    assert found == {
        "gate_up_proj": ("l.0.mlp.experts", (16, 16)),
        "down_proj": ("l.0.mlp.experts", (16, 24)),
    }
    for spec in adapter.specs:
        assert (spec.layout, spec.rank, spec.experts, spec.scaling) == ("experts", 4, 4, 2.0)
        assert spec.alternatives in (("down_proj",), ("gate_up_proj",))
    assert not adapter.notes


def test_a_name_alone_is_no_parameter_of_a_module_that_another_entry_names(
    tmp_path: Path,
) -> None:
    """PEFT lists names alone beside those that were asked for, and the router's weight."""
    tensors = {**_experts("l.0.mlp.experts"), **pair("l.0.mlp.gate", 2, 16, 4)}
    adapter = read(
        tmp_path, tensors, r=2, rank_pattern={r".*\.gate_up_proj": 4, r".*\.down_proj": 4},
        target_parameters=["gate.weight", "gate_up_proj", "down_proj", "experts.gate_up_proj"],
    )  # fmt: skip
    assert {(s.module, s.parameter, s.rank) for s in adapter.specs} == {
        ("l.0.mlp.gate", "weight", 2), ("l.0.mlp.experts", "gate_up_proj", 4),
        ("l.0.mlp.experts", "down_proj", 4),
    }  # fmt: skip


@pytest.mark.parametrize("names", [("recurrent_gate_weight", "input_gate_weight"),
                                   ("time_mix_value", "time_mix_key")])  # fmt: skip
def test_parameters_alike_in_shape_nest_as_their_model_registers_them(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """RecurrentGemma and RWKV: the one registered first is innermost, whatever the list says."""
    tensors = {**pair("l.rg.base_layer", 4, 8, 8), **pair("l.rg", 4, 8, 8)}
    adapter = read(tmp_path, tensors, r=2, target_parameters=[f"rg.{n}" for n in names],
                   target_modules=[])  # fmt: skip
    found = {s.parameter: "base_layer" in s.fields["lora_A"].name for s in adapter.specs}
    assert found == {names[1]: True, names[0]: False} and not adapter.notes


def test_a_parameter_that_is_named_is_no_module_of_a_pattern(tmp_path: Path) -> None:
    """A probe of (1, 1, 16) has as many rows of lora_A as a linear layer would have."""
    tensors = {**pair("v.head", 2, 16, 1), **pair("v.head.base_layer.fc", 2)}
    adapter = read(tmp_path, tensors, r=2, target_parameters=["head.probe"],
                   target_modules=r".*\.(fc|lm_head)")  # fmt: skip
    assert {(s.module, s.parameter) for s in adapter.specs} == {
        ("v.head", "probe"), ("v.head.fc", "weight"),
    }  # fmt: skip


def test_three_parameters_of_a_module_and_a_module_inside(tmp_path: Path) -> None:
    """What wraps a parameter is around the module's own modules too."""
    tensors = {
        **pair("l.experts.base_layer.base_layer", 4, 16, 8),
        **pair("l.experts.base_layer", 4, 16, 8), **pair("l.experts", 4, 8, 16),
        **pair("l.experts.base_layer.base_layer.base_layer.up", 2),
    }  # fmt: skip
    names = ["experts.w1", "experts.v1", "experts.w2"]
    adapter = read(tmp_path, tensors, r=2, target_parameters=names, target_modules=["up"])
    assert {(s.module, s.parameter, s.experts) for s in adapter.specs} == {
        ("l.experts", "w1", 2), ("l.experts", "v1", 2), ("l.experts", "w2", 2),
        ("l.experts.up", "weight", 0),
    }  # fmt: skip


def test_a_head_tied_to_an_embedding_is_no_parameter(tmp_path: Path) -> None:
    """PEFT names the embedding alone, and parameters of experts by their last name alone."""
    tensors = {**pair("lm_head", 2, 16, 32), **pair("l.0.mlp.experts", 8, 8, 16)}
    adapter = read(tmp_path, tensors, r=2, target_modules=["embed_tokens"],
                   ensure_weight_tying=True, target_parameters=["down_proj"],
                   rank_pattern={r".*\.down_proj": 4})  # fmt: skip
    assert {(s.module, s.parameter, s.rank) for s in adapter.specs} == {
        ("lm_head", "weight", 2), ("l.0.mlp.experts", "down_proj", 4),
    }  # fmt: skip


def test_one_parameter_alone_has_no_base_layer_and_no_doubt(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.mlp.experts", 16, 24, 16),
                   target_parameters=["experts.down_proj"])  # fmt: skip
    spec = adapter.specs[0]
    assert (spec.parameter, spec.experts, spec.alternatives) == ("down_proj", 4, ())


def test_unknown_parameters_follow_the_list_and_name_the_others(tmp_path: Path) -> None:
    adapter = read(tmp_path, _experts("m.bank"), target_parameters=["bank.one", "bank.two"])
    found = {s.fields["lora_A"].shape[1]: (s.parameter, s.alternatives) for s in adapter.specs}
    assert found == {16: ("one", ("two",)), 24: ("two", ("one",))}
    assert any("by order and shape" in n for n in adapter.notes)


def test_patterns_of_parameters_match_their_full_name(tmp_path: Path) -> None:
    tensors = pair("m.experts.base_layer", 8, 16, 48) | pair("m.experts", 16, 24, 16)
    specs = by_name(
        read(tmp_path, tensors, target_parameters=["experts.gate_up_proj", "experts.down_proj"],
             rank_pattern={".*gate_up_proj": 2}, alpha_pattern={"m.experts.down_proj": 2})
    )  # fmt: skip
    gate, down = specs["m.experts.gate_up_proj"], specs["m.experts.down_proj"]
    assert (gate.rank, gate.experts, gate.scaling) == (2, 4, 4.0)
    assert (down.rank, down.experts, down.scaling) == (4, 4, 0.5)


def test_a_two_dimensional_parameter_is_linear(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.q_proj"), target_parameters=["q_proj.weight"])
    spec = adapter.specs[0]
    assert (spec.layout, spec.parameter, spec.experts) == ("linear", "weight", 0)


def test_a_single_expert_is_still_three_dimensional(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.experts", 4, 24, 16), target_parameters=["experts.down_proj"])
    assert (adapter.specs[0].layout, adapter.specs[0].experts) == ("experts", 1)


def test_plain_modules_beside_parameters_stay_plain(tmp_path: Path) -> None:
    tensors = pair("l.q_proj") | pair("l.experts", 16, 24, 16)
    for targets in (["q_proj"], ".*q_proj"):
        specs = by_name(
            read(tmp_path, tensors, target_modules=targets, target_parameters=["down_proj"])
        )
        assert set(specs) == {"l.q_proj.weight", "l.experts.down_proj"}


def test_old_per_expert_keys_are_plain_modules(tmp_path: Path) -> None:
    adapter = read(tmp_path, pair("l.block_sparse_moe.experts.3.w1"))
    assert adapter.specs[0].name == "l.block_sparse_moe.experts.3.w1.weight"
    assert adapter.specs[0].layout == "linear"


def test_more_wrappers_than_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, _experts("m.experts"), target_parameters=["experts.down_proj"])
    assert caught.value.code == "LT-409"


def test_rows_that_are_no_multiple_of_the_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tmp_path, pair("experts", 18, 24, 16), target_parameters=["experts.down_proj"])
    assert caught.value.code == "LT-405"


def test_packing_of_lora_b_is_the_users_word(tmp_path: Path) -> None:
    tensors = pair("m.experts", 16, 24, 16) | pair("q")
    options = Read(experts_b_order="expert-major")
    specs = by_name(
        read(tmp_path, tensors, options, target_modules=["q"],
             target_parameters=["experts.down_proj"])
    )  # fmt: skip
    assert specs["m.experts.down_proj"].b_order == "expert-major"
    assert specs["q.weight"].b_order == "rank-major"


# ----------------------------------------------------------------------- replacements


def test_modules_to_save_are_replacements(tmp_path: Path) -> None:
    tensors = pair("q") | {"lm_head.weight": zeros(9, 3), "m.norm.weight": zeros(3)}
    adapter = read(tmp_path, tensors, modules_to_save=["lm_head", "norm"])
    assert {r.name: r.origin for r in adapter.replacements} == {
        "lm_head.weight": "modules_to_save",
        "m.norm.weight": "modules_to_save",
    }


def test_wild_modules_to_save_keys(tmp_path: Path) -> None:
    tensors = pair("q") | {
        "head.modules_to_save.default.weight": zeros(9, 3),
        "head.original_module.weight": zeros(9, 3),
    }
    adapter = read(tmp_path, tensors, modules_to_save=["head"])
    assert [(r.name, r.source.name) for r in adapter.replacements] == [
        ("head.weight", PREFIX + "head.modules_to_save.default.weight")
    ]
    assert [r.name for r in adapter.unclaimed] == [PREFIX + "head.original_module.weight"]
    assert any("original_module" in n for n in adapter.notes)


def test_modules_to_save_win_over_the_plain_bias(tmp_path: Path) -> None:
    tensors = pair("q") | {
        "n.bias": zeros(3),
        "n.modules_to_save.bias": zeros(3),
        "n.original_module.bias": zeros(3),
    }
    adapter = read(tmp_path, tensors, bias="all", modules_to_save=["n"])
    assert [(r.name, r.source.name) for r in adapter.replacements] == [
        ("n.bias", PREFIX + "n.modules_to_save.bias")
    ]
    assert {r.name for r in adapter.unclaimed} == {
        PREFIX + "n.bias", PREFIX + "n.original_module.bias",
    }  # fmt: skip
    assert any("n.bias dropped" in n for n in adapter.notes)


def test_biases_lose_their_base_layer(tmp_path: Path) -> None:
    tensors = pair("q") | {"q.base_layer.bias": zeros(8), "other.bias": zeros(8)}
    adapter = read(tmp_path, tensors, bias="all")
    assert {r.name: r.origin for r in adapter.replacements} == {
        "q.bias": "bias", "other.bias": "bias",
    }  # fmt: skip


def test_saved_embeddings_beside_their_delta(tmp_path: Path) -> None:
    tensors = {
        "e.lora_embedding_A": zeros(4, 32),
        "e.lora_embedding_B": zeros(16, 4),
        "e.base_layer.weight": zeros(32, 16),
    }
    adapter = read(tmp_path, tensors)
    assert [(r.name, r.origin) for r in adapter.replacements] == [("e.weight", "base_layer")]
    assert adapter.specs[0].name == "e.weight"


def test_whole_tensors_that_no_list_names_are_kept_with_a_note(tmp_path: Path) -> None:
    """mergekit-extract-lora writes norms like this, PEFT resized embeddings."""
    adapter = read(tmp_path, pair("q") | {"m.norm.weight": zeros(16)})
    assert [r.name for r in adapter.replacements] == ["m.norm.weight"]
    assert any("m.norm.weight" in n for n in adapter.notes)


@pytest.mark.parametrize(
    ("key", "indices"),
    [("m.e.token_adapter.trainable_tokens_delta", [7, 3]),
     ("m.e.trainable_tokens_delta", {"e": [7, 3], "head": [1]}),
     ("m.e.trainable_tokens_delta.default", {"m.e": [7, 3], "e": [1]})],
)  # fmt: skip
def test_trainable_tokens_replace_rows_in_the_order_of_the_list(
    tmp_path: Path, key: str, indices: object
) -> None:
    adapter = read(tmp_path, pair("q") | {key: zeros(2, 16)}, trainable_token_indices=indices)
    rows = adapter.replacements[0]
    assert (rows.name, rows.rows, rows.origin) == ("m.e.weight", (7, 3), "trainable_tokens")


def test_a_tied_head_that_is_not_named_has_the_numbers_of_its_embedding(tmp_path: Path) -> None:
    tensors = {f"m.{n}.token_adapter.trainable_tokens_delta": zeros(2, 16) for n in ("e", "head")}
    adapter = read(tmp_path, tensors, trainable_token_indices={"e": [7, 3]})
    assert [(r.name, r.rows) for r in adapter.replacements] == [
        ("m.e.weight", (7, 3)), ("m.head.weight", (7, 3)),
    ]  # fmt: skip


def test_trainable_tokens_method(tmp_path: Path) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 5], "target_modules": ["e"]}
    adapter = read(tmp_path, {"e.trainable_tokens_delta": zeros(2, 16)}, config=config)
    assert not adapter.specs and adapter.replacements[0].rows == (1, 5)


@pytest.mark.parametrize("indices", [None, [1], {"x": [1, 2]}])
def test_trainable_tokens_without_their_numbers_are_refused(
    tmp_path: Path, indices: object
) -> None:
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, {"e.token_adapter.trainable_tokens_delta": zeros(2, 16)},
             trainable_token_indices=indices)  # fmt: skip
    assert caught.value.code == "LT-369"


def test_whole_embedding_comes_before_its_trained_rows(tmp_path: Path) -> None:
    tensors = {
        "e.token_adapter.trainable_tokens_delta": zeros(2, 16),
        "e.token_adapter.base_layer.weight": zeros(32, 16),
        "e.original_module.weight": zeros(32, 16),
    }
    adapter = read(tmp_path, tensors, trainable_token_indices=[1, 2])
    assert [(r.name, r.rows) for r in adapter.replacements] == [
        ("e.weight", None), ("e.weight", (1, 2)),
    ]  # fmt: skip


def test_two_whole_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    tensors = {"q.base_layer.bias": zeros(3), "q.bias": zeros(3)}
    with pytest.raises(BadFileError) as caught:
        read(tmp_path, tensors, bias="all")
    assert caught.value.code == "LT-367"


@pytest.mark.parametrize(
    ("sample", "end", "shape"),
    [("c3a", "c3a_kernel", (2, 2, 2, 2)), ("c3a", "c3a_kernel", (2, 0, 2)),
     ("fourierft", "new.lora_magnitude_vector", (4,)), ("ia3", "hada_w1_a", (4, 4)),
     ("vblora", "vblora_logits_B", (16, 1, 8)), ("lora_bdlora", "lora_B.weight", (1, 2))],
)  # fmt: skip
def test_tensors_of_another_form_are_refused(
    tmp_path: Path, sample: str, end: str, shape: tuple[int, ...]
) -> None:
    """One that is there has another shape, or one of another method is there too."""
    shutil.copytree(DATA / sample, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next((k for k in sorted(tensors, reverse=True) if k.endswith(end)), end)
    save_file({**tensors, key: torch.zeros(shape)}, path)
    with pytest.raises(LoratoolError) as caught:
        open_adapter(tmp_path / "a")
    assert caught.value.exit_code in (3, 4)
