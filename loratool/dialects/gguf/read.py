"""Read GGUF adapters: their headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, CodedRef, DeltaSpec, Replacement, TensorRef
from loratool.dialects.arranged import arranged
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.dialects.gguf import ADAPTER, ALPHA, ARCHITECTURE, BASE, HUB, LEAVES, NAME, PAIRED
from loratool.dialects.stated import WHOLE
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.options.groups import Read
from loratool.quant.base import coded
from loratool.quant.gguf_names import (
    ARCHITECTURES,
    EXPERT,
    HEADS,
    is_norm,
    leaf_of,
    living_module,
)
from loratool.store.gguf import GgufFile, GgufTensor, read_gguf

_KEY = regex(r"(?P<tensor>.+)\.weight\.(?P<leaf>lora_[ab])", re.DOTALL)
_NORM = regex(r"(?P<tensor>(?:.+_)?norm)\.weight", re.DOTALL)
_CODED = "Q8_0"  # the one such type that llama.cpp's converter of adapters writes


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
    alpha = header.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not abs(alpha) <= 1e30:
        raise BadFileError("LT-361", "wrong value in the configuration", file=path, key=ALPHA,
                           expected="a number", got=alpha)  # fmt: skip
    tensors = {one.name: _ref(header, one) for one in header.tensors}
    norms = _norms(tensors, architecture)
    whole = {one.source.name for one in norms}
    pairs = _pairs(ref for name, ref in tensors.items() if name not in whole)
    specs = [spec for tensor, pair in pairs.items()
             for spec in _specs(tensor, pair, alpha, architecture)]  # fmt: skip
    base = header.metadata.get(f"{BASE}0.repo_url")
    return Adapter(
        path, NAME, tuple(specs), norms, base_model=str(base).removeprefix(HUB) if base else None,
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


def _ref(header: GgufFile, one: GgufTensor) -> TensorRef:
    """Where a tensor lies; one of 8 bits seen as the numbers that it stands for."""
    ref = header.ref(one)
    if one.kind in DTYPES:
        return ref
    if one.kind != _CODED:
        raise MismatchError(
            "LT-401", "factors in codes are not read", file=ref.path, key=one.name,
            expected=f"F32, F16, BF16 or {_CODED}", got=one.kind,
            hint="convert the adapter anew, with factors of 16 bits",
        )  # fmt: skip
    return _numbers(ref, one.name, one.shape)


def _numbers(codes: TensorRef, name: str, shape: tuple[int, ...]) -> CodedRef:
    return coded(NAME, name, codes, shape, facts={"type": _CODED, "heads": 0})


def _norms(tensors: Mapping[str, TensorRef], architecture: str) -> tuple[Replacement, ...]:
    """Norms that take the place of the base's."""
    found = {match["tensor"]: ref for name, ref in tensors.items()
             if (match := _NORM.fullmatch(name))}  # fmt: skip
    return tuple(Replacement(f"{living_module(architecture, tensor)}.weight", ref, WHOLE)
                 for tensor, ref in found.items() if is_norm(architecture, tensor))  # fmt: skip


def _pairs(refs: Iterable[TensorRef]) -> dict[str, dict[str, TensorRef]]:
    found: dict[str, dict[str, TensorRef]] = {}
    for ref in refs:
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
    if isinstance(ref, CodedRef):
        assert ref.codes is not None
        rows = ref.codes.shape[0] // ref.shape[0]
        part = _rows(ref.codes, number, (rows, *ref.codes.shape[1:]), ref.shape[0])
        return _numbers(part, f"{ref.name}[{number}]", ref.shape[1:])
    return _rows(ref, number, ref.shape[1:], ref.shape[0])


def _rows(ref: TensorRef, number: int, shape: tuple[int, ...], count: int) -> TensorRef:
    nbytes = ref.nbytes // count
    return replace(ref, name=f"{ref.name}[{number}]", shape=shape,
                   start=ref.start + number * nbytes, nbytes=nbytes)  # fmt: skip
