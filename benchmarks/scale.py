"""What planning costs at the scale of the internet's largest models: time and memory of dry runs.

    python benchmarks/scale.py [405b 1t 1t-experts 1000] [--reps 3] [--layers N] [--dir DIR]

Models and adapters are headers and holes: real names, shapes and shards, no data (holes read as
zeros).  Each dry run is a fresh process, its start-up and imports included; what is
printed is the median of its wall time and its largest peak resident size, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
BYTES = {"BF16": 2, "F32": 4}


def write_hollow(path: Path, shapes: Shapes, dtype: str, one: str | None = None) -> None:
    """A safetensors file whose data are a hole, but for the first number of the tensor ``one``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        size = BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
        if one is not None:  # adapters of zeros alone are read to their end, and warned about
            file.seek(8 + len(text) + header[one]["data_offsets"][0])
            file.write(b"\0\0\x80\x3f")


def write_base(folder: Path, shapes: Shapes, shards: int, config: Mapping[str, Any]) -> None:
    """A sharded bfloat16 checkpoint, its shards of about the same size."""
    folder.mkdir(parents=True)
    total = sum(_numel(s) for s in shapes.values())
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        parts[min(shards - 1, done * shards // total)][name] = shape
        done += _numel(shape)
    parts = [part for part in parts if part]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):06d}.safetensors"
        write_hollow(folder / file, part, "BF16")
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shapes: Shapes, rank: int, targets: Iterable[str]) -> None:
    """A LoRA of PEFT's on modules of these (out, in) shapes."""
    folder.mkdir(parents=True)
    factors = {}
    for module, (out, inner) in shapes.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = (rank, inner)
        factors[f"base_model.model.{module}.lora_B.weight"] = (out, rank)
    write_hollow(folder / "adapter_model.safetensors", factors, "F32", list(factors)[1])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": sorted(targets), "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _numel(shape: tuple[int, ...]) -> int:
    found = 1
    for length in shape:
        found *= length
    return found


# ---------------------------------------------------------------------------------- models


def dense(layers: int, hidden: int, inner: int, keys: int) -> dict[str, tuple[int, int]]:
    """The linears of a Llama."""
    kinds = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{n}.{k}": s for n in range(layers) for k, s in kinds.items()}


def llama(folder: Path, layers: int, hidden: int, inner: int, keys: int, shards: int) -> Shapes:
    """A Llama with sparse shards; its linears."""
    vocabulary = 128256
    linears = dense(layers, hidden, inner, keys)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        own = f"model.layers.{n}."
        shapes |= {f"{k}.weight": s for k, s in linears.items() if k.startswith(own)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{own}{norm}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": hidden // 128, "num_key_value_heads": keys // 128,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    write_base(folder, shapes, shards, config)
    return linears


def moe_linears(layer: int, experts: int, hidden: int = 7168) -> Iterator[tuple[str, Any]]:
    """(module, shape) of a layer of DeepSeek-V3's kind; the first one is dense."""
    own, narrow, heads = f"model.layers.{layer}.", 2048, 64
    yield f"{own}self_attn.q_a_proj", (1536, hidden)
    yield f"{own}self_attn.q_b_proj", (heads * 192, 1536)
    yield f"{own}self_attn.kv_a_proj_with_mqa", (576, hidden)
    yield f"{own}self_attn.kv_b_proj", (heads * 256, 512)
    yield f"{own}self_attn.o_proj", (hidden, heads * 128)
    places = ["mlp"] if layer == 0 else ["mlp.shared_experts"]
    places += [f"mlp.experts.{e}" for e in range(experts)] if layer else []
    for place in places:
        wide = 18432 if place == "mlp" else narrow
        yield f"{own}{place}.gate_proj", (wide, hidden)
        yield f"{own}{place}.up_proj", (wide, hidden)
        yield f"{own}{place}.down_proj", (hidden, wide)


def moe(folder: Path, layers: int, experts: int, shards: int) -> Shapes:
    """A mixture of experts with sparse shards; its linears."""
    hidden, vocabulary = 7168, 163840
    linears: dict[str, tuple[int, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        found, own = dict(moe_linears(n, experts, hidden)), f"model.layers.{n}."
        linears |= found
        shapes |= {f"{k}.weight": s for k, s in found.items()}
        shapes[f"{own}self_attn.q_a_layernorm.weight"] = (1536,)
        shapes[f"{own}self_attn.kv_a_layernorm.weight"] = (512,)
        shapes[f"{own}input_layernorm.weight"] = (hidden,)
        shapes[f"{own}post_attention_layernorm.weight"] = (hidden,)
        if n:
            shapes[f"{own}mlp.gate.weight"] = (experts, hidden)
            shapes[f"{own}mlp.gate.e_score_correction_bias"] = (experts,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": hidden, "num_hidden_layers": layers, "n_routed_experts": experts,
        "first_k_dense_replace": 1, "vocab_size": vocabulary, "num_attention_heads": 64,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    write_base(folder, shapes, shards, config)
    return linears


def _targets(linears: Shapes) -> set[str]:
    return {name.rpartition(".")[2] for name in linears}


def make_405b(top: Path, layers: int | None = None) -> list[str]:
    """Llama-3.1-405B, rank 16 on all linears."""
    linears = llama(top / "base", layers or 126, 16384, 53248, 1024, 191)
    write_adapter(top / "adapter", linears, 16, _targets(linears))
    return ["adapter"]


def make_1t(top: Path, layers: int | None = None) -> list[str]:
    """61 layers, 384 experts, rank 16 on attention and what every token passes."""
    linears = moe(top / "base", layers or 61, 384, 64)
    shared = {k: s for k, s in linears.items() if ".experts." not in k}
    write_adapter(top / "adapter", shared, 16, _targets(shared))
    return ["adapter"]


def make_1t_experts(top: Path, layers: int | None = None) -> list[str]:
    """The same, rank 8 on every linear of every expert."""
    linears = moe(top / "base", layers or 61, 384, 64)
    write_adapter(top / "adapter", linears, 8, _targets(linears))
    return ["adapter"]


def make_1000(top: Path, layers: int | None = None) -> list[str]:
    """1,000 adapters of rank 4 on all linears of an 8B model."""
    linears = llama(top / "base", layers or 32, 4096, 14336, 1024, 4)
    names = [f"a{n:04d}" for n in range(1000)]
    for name in names:
        write_adapter(top / name, linears, 4, _targets(linears))
    return names


CLAIMS = {
    "405b": make_405b, "1t": make_1t, "1t-experts": make_1t_experts, "1000": make_1000,
}  # fmt: skip


# ---------------------------------------------------------------------------- measurements


def dry_run(top: Path, adapters: list[str]) -> tuple[float, float, dict[str, Any]]:
    """Seconds, MiB at the peak, report."""
    words = [sys.executable, "-m", "loratool", "merge", *adapters, "--base", "base", "-o", "out",
             "--dry-run", "--json", "--offline"]  # fmt: skip
    report = top / "report.json"
    started = time.monotonic()
    with report.open("wb") as file, subprocess.Popen(words, cwd=top, stdout=file) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(report.read_text())
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return seconds, used.ru_maxrss / scale, json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("claims", nargs="*", default=[*CLAIMS], help=" ".join(CLAIMS))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dir", type=Path)
    asked = parser.parse_args()
    for claim in asked.claims:
        with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
            adapters = CLAIMS[claim](Path(folder), asked.layers)
            runs = [dry_run(Path(folder), adapters) for _ in range(asked.reps)]
        report = runs[0][2]
        print(
            f"{claim}: plan of {report['output_bytes'] / 1e9:.0f} GB, {report['changed']} tensors "
            f"changed: {statistics.median(r[0] for r in runs):.1f} s "
            f"({min(r[0] for r in runs):.1f}-{max(r[0] for r in runs):.1f}), "
            f"peak {max(r[1] for r in runs):.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
