"""Extracted adapters: loaded by real PEFT, merged back by us, compared with the optimum."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.make import randn, save_checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def llama() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))  # type: ignore[no-any-return]


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    return transformers.BertModel(config)  # type: ignore[no-any-return]


def qwen_moe() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)  # type: ignore[no-any-return]


def gpt_oss() -> torch.nn.Module:
    config = transformers.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "qwen3_moe": qwen_moe, "gpt_oss": gpt_oss,
}  # fmt: skip


def pair(
    make: Callable[[], torch.nn.Module], tmp_path: Path, *, only_matrices: bool, scale: float = 0.01
) -> None:
    """Save ``base`` and ``tuned`` (low-rank changes plus noise on everything float)."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.dim() >= 2:
                whole = ("embed", "wte", "wpe", "lm_head", "_bias", "router")
                if only_matrices and any(w in name for w in whole):
                    continue
                flat = p.view(-1, p.shape[-1])
                change = randn(flat.shape[0], 3, seed=i) @ randn(3, flat.shape[1], seed=i + 500)
                p.add_(change.view_as(p) * scale + randn(*p.shape, seed=i + 900) * scale / 100)
            elif not only_matrices:
                p.add_(randn(*p.shape, seed=i) * 0.01)
    model.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]


def load_in_peft(base: torch.nn.Module, adapter: Path) -> Any:
    """Load with real PEFT; missing or unexpected keys are errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, str(adapter))
    complaints = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not complaints, complaints
    config = peft.PeftConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = None  # PEFT warns where the model has another name
    fresh = peft.get_peft_model(
        type(base)(base.config) if hasattr(base, "config") else base, config
    )
    weights = load_file(str(adapter / "adapter_model.safetensors"))
    result = peft.set_peft_model_state_dict(fresh, weights)
    assert list(result.unexpected_keys) == []
    return model


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(12).view(2, 6) % 64}


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_loads_in_peft_and_equals_our_merge(name: str, tmp_path: Path) -> None:
    """No missing, no unexpected key; PEFT's adapted model computes what our merge computes."""
    pair(MODELS[name], tmp_path, only_matrices=True)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=4
    )
    assert report.modules and not report.left_out
    assert report.relative_error < 0.05  # rank-3 signal, rank 4 kept
    lt.merge([str(tmp_path / "lora")], base=tmp_path / "base", output=tmp_path / "merged")
    kind = type(MODELS[name]())
    adapted = load_in_peft(kind.from_pretrained(tmp_path / "base").eval(), tmp_path / "lora")  # type: ignore[attr-defined]
    merged = kind.from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    base = kind.from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    moved = float((output(merged) - output(base)).abs().max())
    assert moved > 1e-3
    assert float((output(adapted) - output(merged)).abs().max()) < 1e-4 * max(1.0, moved)


@pytest.mark.parametrize("name", MODELS)
def test_error_is_the_optimum_per_module(name: str, tmp_path: Path) -> None:
    pair(MODELS[name], tmp_path, only_matrices=True)
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=2
    )
    base = load_file(str(tmp_path / "base" / "model.safetensors"))
    tuned = load_file(str(tmp_path / "tuned" / "model.safetensors"))
    lt.merge([str(tmp_path / "lora")], base=tmp_path / "base", output=tmp_path / "merged")
    merged = load_file(str(tmp_path / "merged" / "model.safetensors"))
    total = best = 0.0
    deltas = {}
    for key, weight in base.items():
        delta = (tuned[key] - weight).double()
        if weight.dim() < 2 or not bool(delta.any()):
            assert torch.equal(merged[key], tuned[key])
            continue
        deltas[key] = delta
        total += float((merged[key].double() - tuned[key].double()).square().sum())
    for key, delta in deltas.items():
        if ".experts." in key and key.endswith("up_proj.weight"):
            continue  # in memory it lies below its gate
        if ".experts." in key and key.endswith("gate_proj.weight"):
            delta = torch.cat([delta, deltas[key.replace("gate", "up")]])
        slabs = delta if delta.dim() == 3 else delta[None]
        best += sum(float(torch.linalg.svdvals(s)[2:].square().sum()) for s in slabs)
    assert total**0.5 <= best**0.5 * 1.0001 + 1e-6
    assert report.relative_error == pytest.approx(
        (best / sum(m.norm**2 for m in report.modules)) ** 0.5, rel=1e-3
    )


def test_singular_values_are_told_as_far_as_they_are_kept(tmp_path: Path) -> None:
    """Of whole numbers, so that the difference is exact; the first 64 of them at most."""
    shape, ranks = (96, 80), {"a": 3, "b": 70}
    base = {f"layers.{n}.weight": torch.zeros(shape) for n in ranks}
    tuned = {k: torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(i)).float()
             for i, k in enumerate(base)}  # fmt: skip
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_checkpoint(tmp_path / name, tensors)
    for rank in ranks.values():
        report = lt.extract(tmp_path / "tuned", base=tmp_path / "base", rank=rank, exact=True,
                            output=tmp_path / f"r{rank}")  # fmt: skip
        for module, delta in zip(report.modules, tuned.values(), strict=True):
            squares = torch.linalg.svdvals(delta.double()).square()
            got = torch.tensor(module.sigma, dtype=torch.float64).square()
            assert len(got) == min(rank, 64)
            most = 8 * max(shape) * 2.0**-53 * squares[0]  # of a Gram matrix's eigenvalues
            assert ((got - squares[: len(got)]).abs() <= most).all()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_keep_all_at_full_rank_returns_a_bfloat16_tune_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    pair(MODELS[name], tmp_path, only_matrices=False, scale=0.01)
    for folder in ("base", "tuned"):
        file = tmp_path / folder / "model.safetensors"
        halved = {
            k: v.bfloat16() if v.is_floating_point() else v for k, v in load_file(str(file)).items()
        }
        save_file(halved, str(file), {"format": "pt"})
    report = lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=64, keep=["all"]
    )
    assert not report.left_out
    lt.merge([str(tmp_path / "lora")], base=tmp_path / "base", output=tmp_path / "merged")
    tuned = load_file(str(tmp_path / "tuned" / "model.safetensors"))
    merged = load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert set(tuned) == set(merged)
    for key, value in tuned.items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_kept_tensors_load_in_peft(name: str, tmp_path: Path) -> None:
    pair(MODELS[name], tmp_path, only_matrices=False)
    lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=64, keep=["all"]
    )
    kind = type(MODELS[name]())
    adapted = load_in_peft(kind.from_pretrained(tmp_path / "base").eval(), tmp_path / "lora")  # type: ignore[attr-defined]
    tuned = kind.from_pretrained(tmp_path / "tuned").eval()  # type: ignore[attr-defined]
    assert float((output(adapted) - output(tuned)).abs().max()) < 1e-4


class Attention(torch.nn.Module):
    """Fused in_proj, a convolution, a norm: what torch-style detectors are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.self_attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.linear1 = torch.nn.Linear(16, 24)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.stem(image)).flatten(2).transpose(1, 2)
        return self.linear1(self.self_attn(tokens, tokens, tokens)[0])  # type: ignore[no-any-return]

    @staticmethod
    def save_both(base: dict[str, torch.Tensor], tuned: Attention, top: Path) -> None:
        for folder, state in (("base", base), ("tuned", tuned.state_dict())):
            (top / folder).mkdir()
            tensors = {k: v.contiguous() for k, v in state.items()}
            save_file(tensors, str(top / folder / "model.safetensors"))

    @staticmethod
    def check_in_peft(base: dict[str, torch.Tensor], adapter: Path, tuned: Attention) -> None:
        """PEFT makes of the base and the adapter what the fine-tune is."""
        fresh = Attention().eval()
        fresh.load_state_dict(base)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapted = peft.PeftModel.from_pretrained(fresh, str(adapter))
        image = randn(2, 3, 4, 4, seed=9)
        with torch.no_grad():
            assert torch.allclose(adapted(image), tuned(image), atol=1e-5)


def test_fused_attention_and_convolution(tmp_path: Path) -> None:
    """PEFT applies the out_proj delta twice; the extracted one is halved, and comes back whole."""
    torch.manual_seed(0)
    model = Attention().eval()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() >= 2:
                flat = p.view(p.shape[0], -1)
                change = randn(flat.shape[0], 2, seed=i) @ randn(2, flat.shape[1], seed=i + 50)
                p.add_(change.view_as(p) * 0.02)
    Attention.save_both(base, model, tmp_path)
    lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=2)
    lt.merge([str(tmp_path / "lora")], base=tmp_path / "base", output=tmp_path / "merged")
    merged = load_file(str(tmp_path / "merged" / "model.safetensors"))
    for key, value in model.state_dict().items():
        assert torch.allclose(merged[key].double(), value.double(), atol=1e-6), key
    Attention.check_in_peft(base, tmp_path / "lora", model)


def test_identical_checkpoints_are_refused(tmp_path: Path) -> None:
    pair(llama, tmp_path, only_matrices=True)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tmp_path / "base", base=tmp_path / "base", output=tmp_path / "lora", rank=2)
    assert caught.value.exit_code in (4, 5)


def test_config_says_scaling_one_and_literal_paths(tmp_path: Path) -> None:
    pair(llama, tmp_path, only_matrices=True)
    lt.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=20)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]  # k and v have 16 rows only
    assert set(config["rank_pattern"].values()) == {16}
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert config["task_type"] == "CAUSAL_LM"


def test_rows_that_did_not_change(tmp_path: Path) -> None:
    """Memory goes from module to module: rows equal to the base's hold nothing of the last one.

    Four products of 1200 terms in float32 are each off by √1200 · 2^-24 of their size.
    """
    shape = (1200, 1000)  # three blocks
    base = {f"m{i}.weight": randn(*shape, seed=i) for i in range(2)}
    change = randn(shape[0], 2, seed=7) @ randn(2, shape[1], seed=8)
    tuned = {name: weight + change for name, weight in base.items()}
    tuned["m1.weight"][300:] = base["m1.weight"][300:]
    for folder, tensors in (("base", base), ("tuned", tuned)):
        save_checkpoint(tmp_path / folder, tensors)
    lt.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "lora", rank=2, threads=1
    )
    found = load_file(str(tmp_path / "lora" / "adapter_model.safetensors"))
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact = tuned[name].double() - weight.double()
        product = found[f"{key}.lora_B.weight"].double() @ found[f"{key}.lora_A.weight"].double()
        off = torch.linalg.matrix_norm(product - exact)
        assert off <= 4 * 1200**0.5 * 2**-24 * torch.linalg.matrix_norm(exact), name
