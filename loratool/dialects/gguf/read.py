"""Read GGUF adapters: their headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects.arranged import arranged
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.dialects.gguf import ADAPTER, NAME
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, MismatchError
from loratool.options.groups import Read
from loratool.store.gguf import GgufFile, read_gguf

_KEY = re.compile(r"(?P<tensor>.+)\.weight\.(?P<leaf>lora_[ab])", re.DOTALL)
_BLOCK = re.compile(r"blk\.(?P<number>\d+)\.(?P<rest>\w+)")
_MODULES = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_IN_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# Architectures whose tensors have these names -> whether rows of q and k are paired.
_PAIRED = {
    "llama": True, "qwen2": False, "qwen3": False, "qwen2moe": False, "qwen3moe": False,
    "gemma": False, "gemma2": False, "gemma3": False,
}  # fmt: skip


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a GGUF adapter.

    Raises:
        BadFileError: LT-302 … LT-312 of the header; LT-361 … LT-366, damaged.
        MismatchError: LT-491, a model; LT-401, an architecture that is not known, codes; LT-415.
    """
    path = candidate.path
    if path.is_dir():
        path = path / next(name for name in candidate.names if name.endswith(".gguf"))
    header = read_gguf(path)
    if header.metadata.get("general.type") != ADAPTER:
        raise MismatchError(
            "LT-491", "this is a base model, not an adapter", file=path, key="general.type",
            expected=ADAPTER, got=header.metadata.get("general.type"),
            hint="--base names the base model",
        )  # fmt: skip
    is_paired = _architecture(header, path)
    coded = [t for t in header.tensors if t.kind not in DTYPES]
    if coded:
        raise MismatchError(
            "LT-401", "factors in codes are not read", file=path, key=coded[0].name,
            expected="F32, F16 or BF16", got=coded[0].kind,
            hint="convert the adapter anew, with factors of 16 bits",
        )  # fmt: skip
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not abs(alpha) <= 1e30:
        raise BadFileError("LT-361", "wrong value in the configuration", file=path,
                           key="adapter.lora.alpha", expected="a number", got=alpha)  # fmt: skip
    specs = [
        spec
        for tensor, pair in _pairs(header).items()
        for spec in _specs(tensor, pair, alpha, is_paired)
    ]
    base = header.metadata.get("general.base_model.0.repo_url")
    name = str(base).removeprefix("https://huggingface.co/") if base else None
    return Adapter(path, NAME, tuple(specs), base_model=name, metadata=_texts(header.metadata),
                   key_order=tuple(t.name for t in header.tensors))  # fmt: skip


def _architecture(header: GgufFile, path: Any) -> bool:
    """Whether rows of q and k are paired."""
    values = header.metadata
    if values.get("adapter.type") != "lora":
        raise MismatchError(
            "LT-401", "GGUF adapters of this kind are not read", file=path, key="adapter.type",
            got=values.get("adapter.type"), expected="lora",
        )  # fmt: skip
    if "adapter.alora.invocation_tokens" in values:
        raise MismatchError(
            "LT-401", "aLoRA acts only after its invocation tokens: no change of the weights "
            "equals it", file=path, key="adapter.alora.invocation_tokens",
        )  # fmt: skip
    architecture = str(values.get("general.architecture"))
    if architecture not in _PAIRED:
        raise MismatchError(
            "LT-401", "GGUF adapters of this architecture are not read", file=path,
            key="general.architecture", got=architecture, expected=", ".join(_PAIRED),
            hint="use the PEFT adapter that it was converted from",
        )  # fmt: skip
    return _PAIRED[architecture]


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _pairs(header: GgufFile) -> dict[str, dict[str, TensorRef]]:
    found: dict[str, dict[str, TensorRef]] = {}
    for ref in map(header.ref, header.tensors):
        match = _KEY.fullmatch(ref.name)
        if match is None:
            raise MismatchError(
                "LT-415", "tensors of an unknown kind", file=ref.path, key=ref.name,
                expected="names that end in .weight.lora_a or .weight.lora_b",
            )  # fmt: skip
        role = "lora_A" if match["leaf"] == "lora_a" else "lora_B"
        found.setdefault(match["tensor"], {})[role] = ref
    return found


def _specs(
    tensor: str, pair: Mapping[str, TensorRef], alpha: float, is_paired: bool
) -> list[DeltaSpec]:
    block = _BLOCK.fullmatch(tensor)
    leaf = block["rest"] if block else ""
    if leaf in _EXPERTS and block is not None:
        return _experts(f"model.layers.{block['number']}.mlp", leaf, pair, alpha)
    inner = _IN_LAYER.get(leaf)
    module = f"model.layers.{block['number']}.{inner}" if block and inner else _MODULES.get(tensor)
    if module is None:
        first = next(iter(pair.values()))
        raise MismatchError(
            "LT-415", "tensors of an unknown kind", file=first.path, key=first.name,
            expected="projections of attention and MLP, embeddings, output",
        )  # fmt: skip
    fields: dict[str, Any] = dict(pair)
    is_table = tensor == "token_embd"
    if is_table and "lora_A" in fields and len(fields["lora_A"].shape) == 2:
        fields["lora_A"] = arranged(fields["lora_A"], fields["lora_A"].shape, (1, 0))
    spec = _scaled(product_spec(module, fields, None), alpha)
    if is_table:
        return [replace(spec, layout="embedding")]
    if is_paired and leaf in ("attn_q", "attn_k"):
        turned = {"lora_A": spec.fields["lora_A"], "paired_B": spec.fields["lora_B"]}
        return [replace(spec, kind="paired", fields=turned)]
    return [spec]


def _scaled(spec: DeltaSpec, alpha: float) -> DeltaSpec:
    """llama.cpp takes no alpha for a factor of 1."""
    return replace(spec, alpha=alpha or spec.rank, scaling=alpha / spec.rank if alpha else 1.0)


def _experts(mlp: str, leaf: str, pair: Mapping[str, TensorRef], alpha: float) -> list[DeltaSpec]:
    """One change for each expert of a stack (E, r, in), (E, out, r)."""
    for ref in pair.values():
        if len(ref.shape) != 3:
            refuse_shape(ref, "(experts, …, …)")
    counts = {ref.shape[0] for ref in pair.values()}
    if len(counts) > 1 or len(pair) < 2:
        refuse_shape(next(iter(pair.values())), "lora_a and lora_b of as many experts")
    made = []
    for number in range(counts.pop()):
        fields = {role: _one(ref, number) for role, ref in pair.items()}
        name = f"{mlp}.experts.{number}.{_EXPERTS[leaf]}"
        made.append(_scaled(product_spec(name, fields, None), alpha))
    return made


def _one(ref: TensorRef, number: int) -> TensorRef:
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, name=f"{ref.name}[{number}]", shape=ref.shape[1:],
                   start=ref.start + number * nbytes, nbytes=nbytes)  # fmt: skip
