"""GGUF files as bases: read as gguf reads them, under the model's names, merged into 16 bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from loratool.quant.gguf_blocks import TYPES
from loratool.store.gguf import KINDS, read_gguf
from tests import coded
from tests.make import random_factors, save_adapter

HIDDEN, HEADS, WORDS = 256, 2, 32
NUMBERS = {name: number for number, (name, _, _) in KINDS.items()}
LAYER = {
    "attn_q": ("self_attn.q_proj", "Q4_K"), "attn_k": ("self_attn.k_proj", "Q6_K"),
    "attn_v": ("self_attn.v_proj", "Q8_0"), "attn_output": ("self_attn.o_proj", "Q5_1"),
    "ffn_gate": ("mlp.gate_proj", "Q4_0"), "ffn_up": ("mlp.up_proj", "Q4_K"),
    "ffn_down": ("mlp.down_proj", "Q8_0"),
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
Entries = dict[str, tuple[int, list[int], bytes]]


def blocks_of(kind: str, rows: int, seed: int) -> tuple[bytes, torch.Tensor]:
    """(bytes, numbers) of a matrix of ``HIDDEN`` columns."""
    rng = np.random.default_rng(seed)
    each = HIDDEN // KINDS[NUMBERS[kind]][1]
    raw, numbers = coded.gguf_blocks(kind, rows * each, rng)
    return raw.tobytes(), torch.from_numpy(np.float32(numbers)).view(rows, HIDDEN)


def model(arch: str = "llama") -> tuple[dict[str, Any], Entries, dict[str, torch.Tensor]]:
    """(metadata, tensors as stored, numbers by the names of transformers) of one layer."""
    stored: Entries = {}
    plain: dict[str, torch.Tensor] = {}
    for seed, (leaf, (name, kind)) in enumerate(LAYER.items()):
        raw, numbers = blocks_of(kind, HIDDEN, seed)
        stored[f"blk.0.{leaf}.weight"] = (NUMBERS[kind], [HIDDEN, HIDDEN], raw)
        if leaf in ("attn_q", "attn_k") and arch == "llama":  # rows of a head: halves in turns
            turned = numbers.view(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).transpose(1, 2)
            numbers = turned.reshape(HIDDEN, HIDDEN)
        plain[f"model.layers.0.{name}.weight"] = numbers
    for leaf, name in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        raw, plain[f"{name}.weight"] = blocks_of("Q8_0", WORDS, 50 + len(leaf))
        stored[f"{leaf}.weight"] = (NUMBERS["Q8_0"], [WORDS, HIDDEN], raw)
    norms = {"output_norm": "model.norm", "blk.0.attn_norm": "model.layers.0.input_layernorm",
             "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm"}  # fmt: skip
    for leaf, name in norms.items():
        numbers = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(len(leaf)))
        stored[f"{leaf}.weight"] = (0, [HIDDEN], numbers.numpy().tobytes())
        plain[f"{name}.weight"] = numbers
    stored["rope_freqs.weight"] = (0, [8], bytes(32))
    metadata = {
        "general.architecture": arch, "tokenizer.ggml.tokens": ["a"] * 5000,
        f"{arch}.block_count": 1, f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": HEADS, f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": HIDDEN,
    }  # fmt: skip
    return metadata, stored, plain


def base_and_style(folder: Path, arch: str = "llama") -> tuple[Path, dict[str, torch.Tensor]]:
    """A base and an adapter in ``style`` on its queries; what the merge is to be, float64."""
    metadata, stored, plain = model(arch)
    path = coded.save_gguf(folder / "base.gguf", metadata, stored)
    factors = random_factors({Q: (HIDDEN, HIDDEN)}, rank=4, seed=5)
    save_adapter(folder / "style", factors, alpha=4, target_modules=["q_proj"])
    lora_A, lora_B = factors[Q]
    want = {n: t.double() for n, t in plain.items()}
    want[f"{Q}.weight"] += lora_B.double() @ lora_A.double()
    return path, want


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_merge(tmp_path: Path, arch: str) -> None:
    path, want = base_and_style(tmp_path, arch)
    out = tmp_path / "out.safetensors"
    lt.merge([tmp_path / "style"], base=path, output=out, dequantize=True)
    got = load_file(out)
    assert set(got) == set(want)
    for name, tensor in want.items():
        is_norm = tensor.dim() == 1
        assert got[name].dtype == (torch.float32 if is_norm else torch.bfloat16)
        slack = tensor.abs() * (0 if is_norm else 2**-8) + 2**-18
        assert bool(((got[name].double() - tensor).abs() <= slack).all()), name
    assert lt.verify(out, base=path, adapters=[tmp_path / "style"]).verdict == "identical"


def test_what_no_change_touches_is_read_to_the_bit(tmp_path: Path) -> None:
    path, want = base_and_style(tmp_path)
    made = []
    for number, options in enumerate(({}, {"threads": 1, "chunk_bytes": 4096})):
        out = tmp_path / f"out{number}.safetensors"
        more: Any = {"dequantize": True, "dtype": "float32", "provenance": False, **options}
        lt.merge([tmp_path / "style"], base=path, output=out, **more)
        made.append(out.read_bytes())
        got = load_file(out)
        for name in set(want) - {f"{Q}.weight"}:
            assert torch.equal(got[name], want[name].float()), name
    assert made[0] == made[1]


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_inspect_alone(tmp_path: Path, arch: str) -> None:
    """Architecture, types and counts, also of what is not read."""
    metadata, stored, plain = model()
    metadata["general.architecture"] = arch
    path = coded.save_gguf(tmp_path / "base.gguf", metadata, stored)
    report = lt.inspect(path, tensors=True)
    one = report.checkpoint
    assert report.what == "checkpoint" and one is not None and one.model_type == arch
    assert one.tensors == len(stored) and one.quantization == "gguf"
    assert one.parameters == sum(t.numel() for t in plain.values()) + 8
    assert sum(one.dtypes.values()) == sum(len(raw) for *_, raw in stored.values())
    assert set(one.dtypes) == {"F32", "Q4_0", "Q4_K", "Q5_1", "Q6_K", "Q8_0"}
    rows = {row.name: (row.dtype, list(row.shape)) for row in report.tensors}
    assert rows["blk.0.attn_q.weight"] == ("Q4_K", [HIDDEN, HIDDEN])


MOE = {
    "qwen3moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen2moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "llama": ("block_sparse_moe", ("w1", "w3", "w2")),
}


@pytest.mark.parametrize("arch", MOE)
def test_stacked_experts(tmp_path: Path, arch: str) -> None:
    """Each becomes a weight of its own; a router of one row a matrix again."""
    metadata, stored, plain = model(arch)
    mlp, words = MOE[arch]
    metadata[f"{arch}.expert_count"] = 3
    for leaf, word in zip(("ffn_gate", "ffn_up", "ffn_down"), words, strict=True):
        del stored[f"blk.0.{leaf}.weight"], plain[f"model.layers.0.{LAYER[leaf][0]}.weight"]
        parts = [blocks_of("Q8_0", 8, 70 + number) for number in range(3)]
        raw = b"".join(part for part, _ in parts)
        stored[f"blk.0.{leaf}_exps.weight"] = (NUMBERS["Q8_0"], [3, 8, HIDDEN], raw)
        for number, (_, numbers) in enumerate(parts):
            plain[f"model.layers.0.{mlp}.experts.{number}.{word}.weight"] = numbers
    router = torch.rand(3, HIDDEN, generator=torch.Generator().manual_seed(9))
    stored["blk.0.ffn_gate_inp.weight"] = (0, [3, HIDDEN], router.numpy().tobytes())
    plain[f"model.layers.0.{mlp}.gate.weight"] = router
    if arch == "qwen2moe":
        stored["blk.0.ffn_gate_inp_shexp.weight"] = (0, [HIDDEN], router[0].numpy().tobytes())
        plain["model.layers.0.mlp.shared_expert_gate.weight"] = router[:1]
    path = coded.save_gguf(tmp_path / "base.gguf", metadata, stored)
    module = f"model.layers.0.{mlp}.experts.1.{words[0]}"
    factors = random_factors({module: (8, HIDDEN)}, rank=2, seed=5)
    save_adapter(tmp_path / "style", factors, alpha=2, target_modules=[words[0]])
    out = tmp_path / "out.safetensors"
    lt.merge([tmp_path / "style"], base=path, output=out, dequantize=True, dtype="float32")
    lora_A, lora_B = factors[module]
    plain[f"{module}.weight"] = (
        plain[f"{module}.weight"].double() + lora_B.double() @ lora_A.double()
    )
    got = load_file(out)
    assert got.keys() == plain.keys()
    assert all(
        torch.allclose(got[k].double(), plain[k].double(), rtol=2**-23, atol=1e-7) for k in got
    )


def test_a_type_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    path, _ = base_and_style(tmp_path)
    metadata, stored, _ = model()
    stored["blk.0.ffn_up.weight"] = (20, [HIDDEN, HIDDEN], bytes(HIDDEN * HIDDEN // 32 * 18))
    coded.save_gguf(path, metadata, stored)
    with pytest.raises(LoratoolError) as caught:
        lt.merge(
            [tmp_path / "style"], base=path, output=tmp_path / "o.safetensors", dequantize=True
        )
    assert caught.value.code == "LT-499" and "loratool[gguf]" in str(caught.value.hint)
    assert "IQ4_NL" in str(caught.value)


def test_names_of_image_models_stay(tmp_path: Path) -> None:
    """Files of ComfyUI's converter: the checkpoint's own names, shapes where rows do not fill."""
    raw, numbers = blocks_of("Q8_0", 4, 1)
    name = "double_blocks.0.img_attn.proj.weight"
    metadata = {"general.architecture": "flux"}
    path = coded.save_gguf(tmp_path / "base.gguf", metadata, {name: (8, [4, HIDDEN], raw)})
    module = name.removesuffix(".weight")
    save_adapter(tmp_path / "style", random_factors({module: (4, HIDDEN)}, rank=1, seed=1, scale=0),
                 target_modules=["proj"])  # fmt: skip
    lt.merge([tmp_path / "style"], base=path, output=tmp_path / "out.safetensors", dequantize=True,
             dtype="float32")  # fmt: skip
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], numbers)


@pytest.mark.parametrize(
    ("change", "code"),
    [("arch", "LT-499"), ("kind", "LT-499"), ("heads", "LT-499"), ("short", "LT-312"),
     ("header", "LT-303"), ("requant", "LT-499"), ("plain", "LT-435")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path: Path, change: str, code: str) -> None:
    path, _ = base_and_style(tmp_path)
    metadata, stored, _ = model()
    if change == "arch":
        metadata["general.architecture"] = "mamba"
    if change == "kind":
        stored["blk.0.ffn_up.weight"] = (9, [HIDDEN, HIDDEN], bytes(HIDDEN * HIDDEN // 32 * 40))
    if change == "heads":
        metadata["llama.attention.head_count"] = 0
    coded.save_gguf(path, metadata, stored)
    content = path.read_bytes()
    if change in ("short", "header"):
        path.write_bytes(content[: -HIDDEN if change == "short" else 200])
    options: Any = {} if change == "plain" else {
        "requant" if change == "requant" else "dequantize": True}  # fmt: skip
    with pytest.raises(LoratoolError) as caught:
        lt.merge([tmp_path / "style"], base=path, output=tmp_path / "o.safetensors", **options)
    assert caught.value.code == code and not (tmp_path / "o.safetensors").exists()


def test_the_output_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, _ = base_and_style(tmp_path)
    out = tmp_path / "model" / "model.safetensors"
    out.parent.mkdir()
    lt.merge([tmp_path / "style"], base=path, output=out, dequantize=True)
    said = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1, vocab_size=WORDS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=False,
    )  # fmt: skip
    (out.parent / "config.json").write_text(json.dumps(said.to_dict()))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        out.parent, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info


@pytest.mark.parametrize("kind", coded.GGUF_KINDS)
def test_blocks_are_those_made_by_hand(kind: str) -> None:
    """To the bit, of every type that is read without the package."""
    raw, numbers = coded.gguf_blocks(kind, 32, np.random.default_rng(1))
    got = TYPES[kind].numbers(torch.from_numpy(raw)).numpy()
    assert np.array_equal(got, np.float32(numbers).reshape(got.shape))
    assert {k for k in TYPES if k[0] == "Q"} == set(coded.GGUF_KINDS)


@pytest.mark.parametrize(
    "kind", [k for k in NUMBERS if k[0] in "QTM" or k[:2] == "IQ" if k not in ("Q8_1", "Q8_K")]
)
def test_blocks_are_those_of_gguf(kind: str) -> None:
    """To the bit, on random bytes; run where the package is."""
    gguf = pytest.importorskip("gguf")
    from loratool.quant import gguf_blocks

    blocks = gguf_blocks.blocks_of(kind)
    assert blocks is not None
    raw = np.random.default_rng(0).integers(0, 256, (64, blocks.nbytes)).astype(np.uint8)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = blocks.numbers(torch.from_numpy(raw)).numpy()
    finite = np.isfinite(want)
    assert np.array_equal(got.view(np.uint32)[finite], want.view(np.uint32)[finite])


def test_a_file_of_gguf_is_read(tmp_path: Path) -> None:
    sample = Path(__file__).parents[1] / "data" / "llm" / "gguf_lora" / "adapter.gguf"
    file = read_gguf(sample)
    assert file.metadata["general.type"] == "adapter" and file.tensors
    assert all(t.start % 32 == 0 and t.kind in ("F32", "F16") for t in file.tensors)
    end = max(t.start + t.nbytes for t in file.tensors)
    assert -(-end // 32) * 32 == sample.stat().st_size or end == sample.stat().st_size
