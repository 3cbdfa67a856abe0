"""The registry of dialects; every sample is read right and written back, or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects import (
    BY_NAME,
    DIALECTS,
    Dialect,
    claims,
    detect,
    examine,
    open_adapter,
    unmergeable_reason,
    write_adapter_files,
)
from loratool.dialects.peft.methods import ROWS
from loratool.dialects.programs import judge_loads
from loratool.errors import BadFileError, LoratoolError, MismatchError, UnsafeContentError
from loratool.kinds import BY_NAME as KINDS
from loratool.options.groups import Read
from loratool.store.header import build_header

DIFFUSION = Path(__file__).parents[1] / "data" / "diffusion"
LLM = Path(__file__).parents[1] / "data" / "llm"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


FOLDERS = sorted(p.name for p in LLM.iterdir() if p.is_dir())
FAMILY = [
    name
    for name in FOLDERS
    if _config(LLM / name).get("peft_type") in ("LORA", "TRAINABLE_TOKENS")
    and (LLM / name / "adapter_model.safetensors").exists()
]
KINDS_OF_OTHERS = {*ROWS, *(k.method for k in KINDS.values() if k.method)}  # each in tests/oracle/
OTHERS = [
    n for n in FOLDERS
    if n not in FAMILY and _config(LLM / n).get("peft_type") not in KINDS_OF_OTHERS
    and not n.startswith(("mlx_", "gguf_"))
]  # fmt: skip


# --------------------------------------------------------------------------- registry


def test_every_row_resolves() -> None:
    assert len(BY_NAME) == len(DIALECTS)
    for row in DIALECTS:
        assert row.form in ("folder", "file") and row.title and callable(row.detect)
        assert all(suffix.startswith(".") for suffix in row.suffixes)
        for is_there, function in ((row.is_read, row.reader), (row.is_written, row.writer)):
            assert not is_there or callable(function())


# Tensor names that each program really writes (dialects_llm §0, dialects_diffusion §1).
MARKS = {
    "mlx": ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
    "torchtune": ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
    "litgpt": ["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.mlp.fc_1.lora_B"],
    "adapterhub": ["model.layers.0.self_attn.q_proj.loras.pol.lora_A"],
    "longcat-video": [
        "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn"
        "___lorahyphen___qkv.lora_up.blocks.0.weight"
    ],
    "megatron": ["model.layers.0.adapter_layer.lora_kqv_adapter.linear_in.weight"],
    "xlabs": ["double_blocks.0.processor.qkv_lora1.down.weight"],
    "kohya": ["lora_unet_down_blocks_0_proj.lora_down.weight", "lora_te_x.alpha"],
    "lycoris": ["lycoris_mid.hada_w1_a", "lycoris_mid.alpha"],
    "comfyui": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],
    "diffusers": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "bfl": ["double_blocks.0.img_attn.norm.query_norm.scale", "img_in.lora_A.weight"],
    "onetrainer": ["transformer.double_blocks.0.img_attn.qkv.1.lora_down.weight"],
    "control-lora": ["lora_controlnet", "input_blocks.0.0.weight"],
    "textual-inversion": ["emb_params"],
    "peft-file": ["base_model.model.model.layers.0.q_proj.lora_A.weight"],
}
MORE_MARKS = [
    ("lycoris", ["lycoris_blocks_0.lokr_w1", "lycoris_blocks_0.lokr_w2"]),
    ("kohya", ["lora_te1_text_model_q.lora_up.weight"]),
    ("kohya", ["lora_transformer_blocks_0.lora_up.weight"]),
    ("kohya", ["lora_unet_mid.hada_w1_a", "lora_unet_mid.alpha"]),
    ("comfyui", ["transformer_blocks.0.attn.to_q.lora_down.weight"]),
    ("comfyui", ["diffusion_model.blocks.0.q.lora_down.weight"]),
    ("diffusers", ["unet.down_blocks.0.to_q.lora_A.weight"]),
    ("diffusers", ["unet.down_blocks.0.attn.processor.to_q_lora.down.weight"]),
    ("diffusers", ["text_encoder.layers.0.q_proj.lora_linear_layer.up.weight"]),
    ("peft-file", ["transformer.h.0.attn.c_attn.lora_A.weight"]),  # GPT-2, no diffusion
    ("peft-file", ["model.layers.0.q_proj.lora_A.weight"]),
    ("peft-file", ["transformer.blocks.0.attn.Wqkv.lora_A.weight"]),  # MPT
    ("peft-file", ["layers.0.self_attn.q_proj.lora_A.weight"]),
    ("peft-file", ["base_model.model.text_encoder.layers.0.q_proj.lora_A.weight"]),  # MusicGen
    ("diffusers", ["base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"]),
    ("diffusers", ["transformer.base_model.model.transformer_blocks.0.attn.to_q.lora.down.weight"]),
    ("diffusers", ["blocks.0.attn.a_to_qkv.lora_A.default.weight"]),  # DiffSynth
    ("diffusers", ["blocks.3.self_attn.q.lora_A.weight", "blocks.3.ffn.0.lora_A.weight"]),  # Wan
    ("diffusers", ["sformer_blocks.0.attn.to_q.lora_A.weight"]),
    ("diffusers", ["conditional_transformer.layers.0.attention.qkv.lora_A.weight"]),
    ("diffusers", ["transformer_2.blocks.0.attn1.to_q.lora_A.weight"]),
    ("comfyui", ["diffusion_model.transformer_1.blocks.0.self_attn.q.lora_A.weight"]),
    ("comfyui", ["transformer.diffusion_model.blocks.0.self_attn.q.lora_A.weight"]),
    ("comfyui", ["model.diffusion_model.blocks.0.self_attn.q.lora_down.weight"]),
    (
        "comfyui",
        ["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"],
    ),
    ("comfyui", ["diffusion_model.blocks.0.modulation.diff"]),
    ("comfyui", ["diffusion_model.blocks.0.x.lokr_w1", "diffusion_model.blocks.0.x.lokr_w2"]),
    ("onetrainer", ["lora_transformer_single_blocks.0.linear1.3.lora_up.weight"]),
    ("onetrainer", ["transformer.transformer_blocks.0.attn.to_q.lora_down.weight"]),
    ("kohya", ["Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight"]),
    ("kohya", ["lora_unet__blocks_0_self_attn_q.lora_down.weight"]),
    ("xlabs", ["single_blocks.0.processor.qkv_lora.up.weight"]),
    ("peft-file", ["thinker.base_model.model.q.lora_A.weight"]),
    ("peft-file", ["model.embed_tokens.lora_embedding_A"]),
]


@pytest.mark.parametrize(("name", "keys"), [*MARKS.items(), *MORE_MARKS])
def test_a_lone_file_is_recognised_by_its_keys(tmp_path: Path, name: str, keys: list[str]) -> None:
    path = tmp_path / "some.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, str(path))
    candidate = examine(path)
    assert [row.name for row in claims(candidate)] == [name]
    assert detect(candidate).name == name
    if not BY_NAME[name].is_read:
        with pytest.raises(MismatchError) as caught:
            open_adapter(path)
        assert caught.value.code == "LT-401" and BY_NAME[name].title in str(caught.value)


def test_every_row_has_a_recognised_example() -> None:
    by_files = {"gguf", "peft"}  # tested below, by file names
    assert set(MARKS) | by_files == set(BY_NAME)


def test_the_pickle_of_litgpt_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "lit_model.pth.lora").write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / "lit_model.pth.lora"):
        with pytest.raises(UnsafeContentError, match="lit_model") as caught:
            open_adapter(path)
        assert "--allow-pickle" in str(caught.value.hint)


def test_a_gguf_model_is_not_called_an_adapter(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3" + bytes(63))
    with pytest.raises(MismatchError, match="base model"):
        open_adapter(path)
    assert open_adapter(LLM / "gguf_lora").dialect == "gguf"


def test_a_base_model_is_no_adapter() -> None:
    with pytest.raises(MismatchError) as caught:
        open_adapter(LLM / "lora_linear" / "base" / "model.safetensors")
    assert caught.value.code == "LT-400"


def test_a_missing_path_is_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadFileError):
        open_adapter(tmp_path / "nothing")


def test_a_sample_is_claimed_by_one_dialect() -> None:
    for folder in (LLM / name for name in FOLDERS if name != "lora_linear_bin"):
        candidate = examine(folder)
        assert len(claims(candidate)) == 1, folder.name


@pytest.mark.parametrize("row", [r for r in DIALECTS if r.is_written], ids=lambda r: r.name)
def test_a_written_row_says_what_it_can_hold(row: Dialect) -> None:
    plain, other = (open_adapter(LLM / n).specs[0] for n in ("lora_linear", "lora_pissa"))
    assert row.obstacle(plain) == "" and "pissa" in row.obstacle(other)


@pytest.mark.parametrize("path", sorted(DIFFUSION.glob("*/adapter.safetensors")),
                         ids=lambda p: p.parent.name)  # fmt: skip
def test_a_sample_of_an_image_model_is_claimed_once(path: Path) -> None:
    (row,) = claims(examine(path))
    start = path.parent.name.partition("_")[0]
    others = {"flux1_xlabs": "xlabs", "hunyuanvideo_original": "diffusers"} | dict.fromkeys(
        ("flux2_diffusion_model", "wan_diffusion_model_diff_b"), "comfyui"
    )
    own = start if start in ("lycoris", "diffusers") else "kohya"
    assert row.name == others.get(path.parent.name, own)


def test_tensors_of_two_dialects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    save_file({MARKS[n][0]: torch.zeros(2, 2) for n in ("xlabs", "lycoris")}, str(path))
    with pytest.raises(MismatchError, match="several dialects") as caught:
        open_adapter(path)
    assert caught.value.code == "LT-417"


def test_a_file_without_configuration_is_a_dialect_that_peft_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "lone.safetensors"
    path.write_bytes((LLM / "lora_linear" / "adapter_model.safetensors").read_bytes())
    adapter = open_adapter(path, Read(alpha=8))
    assert adapter.dialect == "peft-file"
    verdicts = {one.program: (one.verdict, one.reasons) for one in judge_loads(adapter)}
    assert set(verdicts.values()) == {("no", ("no adapter_config.json",))}
    assert {one.verdict for one in judge_loads(open_adapter(LLM / "lora_linear"))} == {"yes"}
    # Written, it becomes what PEFT loads.
    files = write_adapter_files(adapter)
    assert files.json_files["adapter_config.json"]["lora_alpha"] == 8


# ---------------------------------------------------------------------------- samples


@pytest.mark.parametrize("name", FAMILY)
def test_a_sample_is_written_back_byte_for_byte(name: str) -> None:
    folder = LLM / name
    files = write_adapter_files(open_adapter(folder), "peft")
    raw = (folder / "adapter_model.safetensors").read_bytes()
    header, _ = build_header([(n, s.dtype, s.shape) for n, s in files.tensors], files.metadata)
    body = b"".join(
        raw[s.start : s.start + s.nbytes] for _, s in files.tensors if isinstance(s, TensorRef)
    )
    assert header + body == raw
    assert files.json_files == {"adapter_config.json": _config(folder)}


def _expected_scaling(config: Mapping[str, Any], pattern_name: str) -> tuple[int, float]:
    """(r, scaling) by PEFT's own pattern function."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), pattern_name), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), pattern_name), config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


_FACTOR = re.compile(
    r"base_model\.model\.(.+)\.(?:lora_A\.weight|lora_embedding_A)$"
)  # the samples are clean: no wrappers, no adapter names
# Flattened experts and MultiheadAttention: key of lora_A -> parameter, experts, factor of scaling.
_SPECIAL = {
    "mlp.experts.base_layer": ("mlp.experts.gate_up_proj", 4, 1),
    "mlp.experts": ("mlp.experts.down_proj", 4, 1),
    "self_attn": ("self_attn.in_proj_weight", 0, 1),
    "self_attn.base_layer.out_proj": ("self_attn.out_proj.weight", 0, 2),
}


def _expected(folder: Path) -> dict[str, tuple[int, int, float]]:
    """Parameter name -> (rank, experts, scaling), from INFO.json and the configuration."""
    keys = json.loads((folder / "INFO.json").read_text())["adapter_keys"]
    config = _config(folder)
    out = {}
    for key in keys:
        match = _FACTOR.match(key)
        if match is None:
            continue
        name, experts, gain, pattern_name = f"{match[1]}.weight", 0, 1, match[1]
        for ending, (special, count, factor) in _SPECIAL.items():
            if match[1].endswith(ending):
                name = match[1].removesuffix(ending) + special
                experts, gain = count, factor
                pattern_name = name if count else "self_attn"
                break
        rank, scaling = _expected_scaling(config, pattern_name)
        out[name] = (rank, experts, scaling * gain)
    return out


@pytest.mark.parametrize("name", FAMILY)
def test_modules_ranks_and_scalings_of_a_sample(name: str) -> None:
    adapter = open_adapter(LLM / name)
    found = {s.name: (s.rank, s.experts, s.scaling) for s in adapter.specs if s.kind != "vector"}
    assert found == _expected(LLM / name)
    assert unmergeable_reason(adapter) is None or name == "lora_alora"
    _check_shapes(adapter, LLM / name)


def _check_shapes(adapter: Adapter, folder: Path) -> None:
    """Roles are those of the kind; factors have the shapes that INFO.json lists."""
    listed = json.loads((folder / "INFO.json").read_text())["adapter_keys"]
    # [shape, dtype], or the shape alone for the samples made by hand
    shapes = {k: tuple(v[0] if isinstance(v[0], list) else v) for k, v in listed.items()}
    used = set()
    for spec in adapter.specs:
        kind = KINDS[spec.kind]
        assert set(kind.roles) <= set(spec.fields) <= {*kind.roles, *kind.optional}
        for source in spec.fields.values():
            assert isinstance(source, TensorRef) and source.shape == shapes[source.name]
            used.add(source.name)
        assert _inner_rank(spec) == spec.rank * max(1, spec.experts)
    used |= {r.source.name for r in adapter.replacements}
    assert used == set(shapes)  # no sample holds state of training


def _inner_rank(spec: DeltaSpec) -> int:
    return 0 if spec.kind == "vector" else spec.fields["lora_A"].shape[0]


FACTS: dict[str, dict[str, Any]] = {
    "lora_alora": {"unmergeable": "aLoRA"},
    "lora_bdlora": {"blocks": {(2, "A"), (2, "B")}},
    "lora_bias_all": {"origins": {"bias"}, "replaced": 14},
    "lora_bias_lora_only": {"origins": {"bias"}, "replaced": 4},
    "lora_conv": {"layouts": {"conv", "linear"}},
    "lora_conv_dora": {"layouts": {"conv"}, "kinds": {"dora"}},
    "lora_conv_grouped": {"layouts": {"conv"}},
    "lora_dora": {"kinds": {"dora"}},
    "lora_embed_dora": {"kinds": {"dora"}, "layouts": {"embedding"}, "origins": {"base_layer"}},
    "lora_embed_lmhead_tied": {"layouts": {"embedding", "linear"}, "origins": {"base_layer"}},
    "lora_embed_tied_ensure": {"layouts": {"embedding", "linear"}, "origins": {"base_layer"}},
    "lora_embed_untied": {"layouts": {"embedding", "linear"}, "origins": {"base_layer"}},
    "lora_gpt2_conv1d": {"transposed": {True}},
    "lora_gpt2_dora": {"transposed": {True}, "kinds": {"dora"}},
    "lora_kasa": {"changes": {"kasa"}},
    "lora_layer_replication": {"order": (0, 1, 1)},
    "lora_lora_bias": {"kinds": {"lowrank", "vector"}, "layouts": {"linear", "vector"}},
    "lora_modules_to_save": {"origins": {"modules_to_save"}, "replaced": 2},
    "lora_modules_to_save_tied": {"origins": {"modules_to_save"}, "replaced": 1},
    "lora_modules_to_save_tied_ensure": {"origins": {"modules_to_save"}, "replaced": 2},
    "detr_lora": {"origins": {"modules_to_save"}, "replaced": 6, "layouts": {"conv", "linear"}},
    "lora_olora": {"changes": {"olora"}},
    "lora_pissa": {"changes": {"pissa"}},
    "lora_target_params_down_only": {"layouts": {"experts"}},
    "lora_target_params_gptoss": {"layouts": {"experts"}},
    "lora_target_params_mixtral": {"layouts": {"experts", "linear"}},
    "lora_target_params_mixtral_peft018": {"layouts": {"experts", "linear"}},
    "lora_target_params_qwen3moe": {"layouts": {"experts"}},
    "lora_target_params_qwen3moe_peft018": {"layouts": {"experts"}},
    "lora_trainable_tokens": {"origins": {"trainable_tokens"}, "rows": {(3, 7)}},
    "lora_trainable_tokens_tied": {"origins": {"trainable_tokens"}, "rows": {(3, 7)}},
    "trainable_tokens": {"origins": {"trainable_tokens"}, "rows": {(1, 5)}, "layouts": set()},
}


@pytest.mark.parametrize("name", FAMILY)
def test_facts_of_a_sample(name: str) -> None:
    """What makes a sample special is read, and nothing else is."""
    adapter, facts = open_adapter(LLM / name), FACTS.get(name, {})
    specs, replacements = adapter.specs, adapter.replacements
    layouts = facts.get("layouts", {"linear"})
    assert {s.layout for s in specs} == layouts
    assert {s.kind for s in specs} == facts.get("kinds", {"lowrank"} if layouts else set())
    assert {s.blocks for s in specs} - {None} == facts.get("blocks", set())
    assert {s.base_change for s in specs} - {""} == facts.get("changes", set())
    assert {s.transposed for s in specs} - {False} == facts.get("transposed", set())
    assert {r.origin for r in replacements} == facts.get("origins", set())
    assert {r.rows for r in replacements} - {None} == facts.get("rows", set())
    assert adapter.layer_order == facts.get("order")
    assert len(replacements) == facts.get("replaced", len(replacements))
    assert facts.get("unmergeable", "") in (unmergeable_reason(adapter) or "")
    # Beside a sample lies what it was merged into, which is no part of it.
    notes = [n for n in adapter.notes if not n.endswith("no file that trainers are known for")]
    mha_note = [n for n in notes if "MultiheadAttention" in n]
    assert len(mha_note) == (name == "lora_mha") and len(notes) == len(mha_note)


REFUSED = {
    "lora_linear_bin": ("LT-920", "pickle"),
}
TITLES = {
    "ADALORA": "AdaLoRA", "BOFT": "BOFT", "C3A": "C3A", "DELORA": "DeLoRA", "HIRA": "HiRA",
    "FOURIERFT": "FourierFT", "HRA": "HRA", "IA3": "IA³", "LN_TUNING": "LN tuning",
    "MISS": "MiSS", "OFT": "OFT", "RANDLORA": "RandLoRA",
    "SHIRA": "SHiRA", "VBLORA": "VB-LoRA", "VERA": "VeRA",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_sample_is_refused_by_name(name: str) -> None:
    method = _config(LLM / name).get("peft_type")
    code, word = REFUSED.get(name) or ("LT-402", TITLES[method])
    with pytest.raises(LoratoolError) as caught:
        open_adapter(LLM / name)
    assert caught.value.code == code and word in str(caught.value)
    assert isinstance(caught.value, UnsafeContentError if code == "LT-920" else MismatchError)


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from loratool.dialects import *; "
        f"write_adapter_files(open_adapter(Path({str(LLM / 'lora_linear')!r}))); "
        "assert not {'torch', 'numpy', 'peft', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
