"""Extracts of models whose weights PEFT holds in other ways than as plain layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loratool as lt
from loratool.dialects import open_adapter
from loratool.dialects.programs import judge_loads
from tests.oracle.in_peft import (
    NotLoadedError,
    Tensors,
    changes,
    distance,
    load_strict,
    merged,
    save_base,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {**SMALL, "num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeForCausalLM", {
        **MOE, "num_experts": 4, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": 4, "head_dim": 8}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {
        "text_config": {**MOE, "num_experts": 4, "head_dim": 4, "moe_intermediate_size": 12,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [1, 1, 0]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                          "patch_size": 4, "out_hidden_size": 16, "deepstack_visual_indexes": [0],
                          "num_position_embeddings": 16}}),
    "longcat": ("LongcatFlashForCausalLM", {
        **{k: v for k, v in MOE.items() if k != "num_hidden_layers"}, "num_layers": 1,
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 12,
        "ffn_hidden_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}),
    "olmoe": ("OlmoeForCausalLM", {**MOE, "num_experts": 4}),
    "mixtral": ("MixtralForCausalLM", {**MOE, "num_local_experts": 8, "head_dim": 8}),
    "phimoe": ("PhimoeForCausalLM", {**MOE, "num_local_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", {**MOE, "num_local_experts": 4, "head_dim": 8}),
    "llama4": ("Llama4ForCausalLM", {
        **MOE, "num_local_experts": 4, "interleave_moe_layer_step": 1, "head_dim": 8,
        "intermediate_size_mlp": 24, "attention_chunk_size": 32}),
    "glm4_moe": ("Glm4MoeForCausalLM", {
        **MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {
        **MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", {**MOE, "num_local_experts": 4}),
    "jetmoe": ("JetMoeForCausalLM", {
        **SMALL, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4,
        "num_experts_per_tok": 1}),
    "t5": ("T5ForConditionalGeneration", {
        **SMALL, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0}),
    "umt5": ("UMT5ForConditionalGeneration", {
        **SMALL, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0}),
    "convnext": ("ConvNextForImageClassification", {
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}),
    "convnextv2": ("ConvNextV2ForImageClassification", {
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {
        "depth_multiplier": 0.25, "image_size": 32}),
    "regnet": ("RegNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}),
    "wav2vec2": ("Wav2Vec2ForCTC", {
        **SMALL, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2}),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**SMALL, "embedding_size": 16}),
    "mamba": ("MambaForCausalLM", {**SMALL, "state_size": 4}),
    "mamba2": ("Mamba2ForCausalLM", {
        **SMALL, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}),
    "gpt2": ("GPT2LMHeadModel", {**SMALL, "n_positions": 64}),
    "deberta": ("DebertaForSequenceClassification", {
        **SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}  # fmt: skip


class Table(nn.Module):
    """An embedding under a name that says nothing, a square weight stored (in, out), a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(12, 8)
        self.turned = transformers.pytorch_utils.Conv1D(8, 8)
        self.norm_like = nn.LayerNorm(8)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.single = nn.Conv1d(1, 1, 2)
        self.recurrent = nn.GRU(8, 4)
        self.both = nn.Bilinear(4, 4, 3)
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.turned(self.lookup(x)))  # type: ignore[no-any-return]


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name == "own":
        return Table().eval()
    kind: Any = getattr(transformers, HF[name][0])
    return kind(kind.config_class(**HF[name][1])).eval()


def change(model: Any) -> Any:
    """Low-rank changes of very different sizes, so that ranks differ."""
    tuned = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            for part in [p] if p.dim() < 3 else list(p):
                flat = part.view(part.shape[0], -1) if part.dim() > 1 else part
                if part.dim() < 2:
                    part += 0.02 * torch.randn(part.shape, generator=random)
                    continue
                rank = int(torch.randint(1, 5, (1,), generator=random))
                left = torch.randn(flat.shape[0], rank, generator=random)
                flat += 0.05 / rank * left @ torch.randn(rank, flat.shape[1], generator=random)
    return tuned


def merged_change(model: Any, base: Path, adapter: Path, out: Path) -> Tensors:
    """W' − W of our own merge, in the names of the model in memory."""
    lt.merge([str(adapter)], base=base, output=out)
    before = model.double().state_dict()
    if hasattr(model, "save_pretrained"):
        after = type(model).from_pretrained(out).double().state_dict()
    else:
        after = load_file(str(out / "model.safetensors"))
    return {
        k: after[k].double() - v.double()
        for k, v in before.items() if k in after and v.is_floating_point()
    }  # fmt: skip


RULES: tuple[dict[str, Any], ...] = ({"rank": 2}, {"energy": 0.9}, {}, {"size": 30_000})
MAKERS: dict[str, Callable[[], Any]] = {name: lambda n=name: make_model(n) for name in [*HF, "own"]}


@pytest.mark.thin(2)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_peft_makes_of_it_what_our_merge_makes(
    name: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    """Every tensor arrives, none is missed, and ΔW is the same; never a yes that is none."""
    model = MAKERS[name]()
    base = save_base(model, tmp_path / "base")
    if hasattr(model, "save_pretrained"):
        model = type(model).from_pretrained(base).eval()
    save_base(change(model), tmp_path / "tuned")
    out = tmp_path / "out"
    try:
        report = lt.extract(tmp_path / "tuned", base=base, output=out, **rule)
    except lt.LoratoolError as error:
        assert "size" in rule and error.code == "LT-234", error  # less than what is kept
        return
    said = next(one for one in judge_loads(open_adapter(out)) if one.program == "PEFT")
    assert said.verdict in ("yes", "unsure")
    try:
        found = changes(model, out)
    except NotLoadedError:
        assert said.verdict != "yes"
        raise
    assert distance(found, merged_change(model, base, out, tmp_path / "merged")) < 1e-4
    assert report.modules or report.kept


def test_a_convolution_in_groups_is_not_called_a_yes(tmp_path: Path) -> None:
    """Its weights do not tell how many groups there are, unless it has one channel in each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 8))
    base = save_base(model, tmp_path / "base")
    save_base(change(model), tmp_path / "tuned")
    report = lt.extract(tmp_path / "tuned", base=base, output=tmp_path / "out", rank=2)
    assert next(one for one in report.loads_in if one.program == "PEFT").verdict == "unsure"


@pytest.mark.parametrize("name", ["Mamba", "ViT"])
def test_parameters_that_are_no_modules_weight_are_kept(name: str, tmp_path: Path) -> None:
    """A_log of a state-space model, the class token of an image model: PEFT loads them plain."""
    torch.manual_seed(0)
    model = {
        "Mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
            vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)),
        "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8)),
    }[name]()  # fmt: skip
    base, tuned = save_base(model, tmp_path / "base"), copy.deepcopy(model)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.05 * torch.randn_like(p)
    save_base(tuned, tmp_path / "tuned")
    report = lt.extract(
        tmp_path / "tuned", base=base, output=tmp_path / "out", rank=32, keep=["all"]
    )
    assert not report.left_out
    loaded = merged(load_strict(model, tmp_path / "out", dtype=torch.float32))
    for key, value in tuned.state_dict().items():
        assert torch.allclose(loaded[key], value, atol=1e-5), key
