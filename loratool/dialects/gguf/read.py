"""Read GGUF adapters: their headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects.arranged import arranged
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.dialects.gguf import ADAPTER, ALPHA, ARCHITECTURE, BASE, HUB, LEAVES, NAME, PAIRED
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import replace
from loratool.options.groups import Read
from loratool.quant.gguf_names import (
    ARCHITECTURES,
    EXPERT,
    HEADS,
    leaf_of,
    living_module,
)
from loratool.store.gguf import GgufFile, read_gguf

_KEY = re.compile(r"(?P<tensor>.+)\.weight\.(?P<leaf>lora_[ab])", re.DOTALL)


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read a GGUF adapter.

    Raises:
        BadFileError: LT-302 … LT-312 of the header; LT-361 … LT-366, damaged.
        MismatchError: LT-491, a model; LT-401, an architecture that is not known, codes; LT-415.
    """
    header = candidate.gguf or read_gguf(candidate.path)  # which says what is wrong with it
    path = header.path
    if header.metadata.get("general.type") != ADAPTER:
        raise MismatchError(
            "LT-491", "this is a base model, not an adapter", file=path, key="general.type",
            expected=ADAPTER, got=header.metadata.get("general.type"),
            hint="--base names the base model",
        )  # fmt: skip
    architecture = _architecture(header, path)
    coded = [t for t in header.tensors if t.kind not in DTYPES]
    if coded:
        raise MismatchError(
            "LT-401", "factors in codes are not read", file=path, key=coded[0].name,
            expected="F32, F16 or BF16", got=coded[0].kind,
            hint="convert the adapter anew, with factors of 16 bits",
        )  # fmt: skip
    alpha = header.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not abs(alpha) <= 1e30:
        raise BadFileError("LT-361", "wrong value in the configuration", file=path, key=ALPHA,
                           expected="a number", got=alpha)  # fmt: skip
    specs = [
        spec
        for tensor, pair in _pairs(header).items()
        for spec in _specs(tensor, pair, alpha, architecture)
    ]
    base = header.metadata.get(f"{BASE}0.repo_url")
    return Adapter(
        path, NAME, tuple(specs), base_model=str(base).removeprefix(HUB) if base else None,
        config={ARCHITECTURE: architecture}, metadata=header.texts,
        key_order=tuple(t.name for t in header.tensors),
    )  # fmt: skip


def _architecture(header: GgufFile, path: Path) -> str:
    """The kind of model that it is for."""
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
    architecture = str(values.get(ARCHITECTURE))
    if architecture not in ARCHITECTURES:
        raise MismatchError(
            "LT-401", "GGUF adapters of this architecture are not read", file=path,
            key=ARCHITECTURE, got=architecture, expected=", ".join(ARCHITECTURES),
            hint="use the PEFT adapter that it was converted from",
        )  # fmt: skip
    return architecture


def _pairs(header: GgufFile) -> dict[str, dict[str, TensorRef]]:
    found: dict[str, dict[str, TensorRef]] = {}
    for ref in map(header.ref, header.tensors):
        match = _KEY.fullmatch(ref.name)
        if match is None:
            raise MismatchError(
                "LT-415", "tensors of an unknown kind", file=ref.path, key=ref.name,
                expected="names that end in .weight.lora_a or .weight.lora_b",
            )  # fmt: skip
        found.setdefault(match["tensor"], {})[LEAVES[match["leaf"]]] = ref
    return found


def _specs(
    tensor: str, pair: Mapping[str, TensorRef], alpha: float, architecture: str
) -> list[DeltaSpec]:
    module = living_module(architecture, tensor)
    if not module:
        first = next(iter(pair.values()))
        raise MismatchError(
            "LT-415", "tensors of an unknown kind", file=first.path, key=first.name,
            expected=f"projections, embeddings or output of {architecture}",
        )  # fmt: skip
    if EXPERT in module:
        return _experts(module, pair, alpha)
    fields: dict[str, Any] = dict(pair)
    is_table = tensor == "token_embd"
    if is_table and "lora_A" in fields and len(fields["lora_A"].shape) == 2:
        fields["lora_A"] = arranged(fields["lora_A"], fields["lora_A"].shape, (1, 0))
    spec = _scaled(product_spec(module, fields, None), alpha)
    if is_table:
        return [replace(spec, layout="embedding")]
    if ARCHITECTURES[architecture].is_paired and leaf_of(tensor) in HEADS:
        turned = {"lora_A": spec.fields["lora_A"], PAIRED: spec.fields["lora_B"]}
        return [replace(spec, kind="paired", fields=turned)]
    return [spec]


def _scaled(spec: DeltaSpec, alpha: float) -> DeltaSpec:
    """llama.cpp takes no alpha for a factor of 1."""
    return replace(spec, alpha=alpha or spec.rank, scaling=alpha / spec.rank if alpha else 1.0)


def _experts(module: str, pair: Mapping[str, TensorRef], alpha: float) -> list[DeltaSpec]:
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
        name = module.replace(EXPERT, str(number))
        made.append(_scaled(product_spec(name, fields, None), alpha))
    return made


def _one(ref: TensorRef, number: int) -> TensorRef:
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, name=f"{ref.name}[{number}]", shape=ref.shape[1:],
                   start=ref.start + number * nbytes, nbytes=nbytes)  # fmt: skip
