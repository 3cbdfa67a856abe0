"""PEFT adapters of the LoRA family: read into the neutral form (writing: `peft_write`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, ReadOptions, Replacement, TensorRef
from loratool.dialects.base import Found
from loratool.dialects.peft_config import PeftConfig, parse_config
from loratool.dialects.peft_keys import Key, parse_key
from loratool.dialects.peft_specs import make_specs
from loratool.dialects.peft_write import write
from loratool.errors import BadFileError, MismatchError, list_some

__all__ = ["read", "write"]

_EXTRAS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "*preprocessor_config.json", "processor_config.json", "README.md",
)  # fmt: skip


@dataclass
class Sorted:
    """The tensors of a file by what they are.

    Attributes:
        factors: module -> role -> tensor.
        embeddings: modules whose factors are spelled for embeddings.
        bias_deltas: module -> ``lora_B.bias``.
        replacements: tensor name -> (key, tensor).
        tokens: tensor name -> rows.
        unclaimed: training-only state, and wrappers' copies of original weights.
        notes: one sentence each.
    """

    factors: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    bias_deltas: dict[str, TensorRef] = field(default_factory=dict)
    replacements: dict[str, tuple[Key, TensorRef]] = field(default_factory=dict)
    tokens: dict[str, TensorRef] = field(default_factory=dict)
    unclaimed: list[TensorRef] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(found: Found, options: ReadOptions) -> Adapter:
    """Read a PEFT adapter.

    Raises:
        MismatchError: another PEFT method, or facts that the files do not hold.
        BadFileError: tensors and configuration contradict each other.
    """
    assert found.header is not None
    config = parse_config(found.config, found.path, options.alpha)
    if config.alpha is None:
        raise MismatchError(
            "LT-404",
            "no adapter_config.json: lora_alpha cannot be told from the tensors",
            file=found.path,
            hint="--alpha VALUE (the value used in training)",
        )
    tensors = found.header.tensors
    if not tensors:
        raise BadFileError("LT-365", "the file holds no tensors", file=found.header.path)
    sorted_ = _sort(tensors, found.path)
    specs, notes = make_specs(sorted_, config, options, found.path)
    replacements = _replacements(sorted_, config, found.path)
    base = found.config.get("base_model_name_or_path")
    return Adapter(
        found.path,
        "peft",
        tuple(specs),
        tuple(replacements),
        base if isinstance(base, str) and base else None,
        found.config,
        found.header.metadata,
        tuple(t.name for t in tensors),
        tuple(sorted_.unclaimed),
        _layer_order(found.config, found.path),
        tuple(dict.fromkeys([*sorted_.notes, *notes])),
        tuple(_extras(found.folder)),
    )


def _sort(tensors: tuple[TensorRef, ...], path: Path) -> Sorted:
    out = Sorted()
    keys = {t.name: parse_key(t.name) for t in tensors}
    if not any(k.has_prefix for k in keys.values()):
        out.notes.append("keys lack the prefix base_model.model.: PEFT itself would load nothing")
    for ref in tensors:
        key = keys[ref.name]
        if key.what == "factor":
            roles = out.factors.setdefault(key.module, {})
            if key.role in roles:
                raise BadFileError(
                    "LT-366", "two tensors for one role", file=path, key=ref.name,
                    got=roles[key.role].name,
                )  # fmt: skip
            roles[key.role] = ref
            if key.is_embedding:
                out.embeddings.add(key.module)
        elif key.what == "bias_delta":
            out.bias_deltas[key.module] = ref
        elif key.what == "tokens":
            out.tokens[key.module] = ref
        elif key.what == "replacement":
            _add_replacement(out, key, ref)
        else:
            out.unclaimed.append(ref)
    dropped = [r.name for r in out.unclaimed if keys[r.name].what == "dropped"]
    if dropped:
        out.notes.append(f"copies of original weights not used: {list_some(dropped, 3)}")
    return out


def _add_replacement(out: Sorted, key: Key, ref: TensorRef) -> None:
    """modules_to_save wins over a plain copy of the same tensor (``bias="all"`` writes both)."""
    held = out.replacements.get(key.module)
    if held is None or (key.role == "saved" and held[0].role != "saved"):
        if held is not None:
            out.unclaimed.append(held[1])
        out.replacements[key.module] = (key, ref)
    else:
        out.unclaimed.append(ref)


def _replacements(found: Sorted, config: PeftConfig, path: Path) -> list[Replacement]:
    saved = config.raw.get("modules_to_save") or ()
    out = []
    for name, (key, ref) in found.replacements.items():
        module = name.rpartition(".")[0]
        is_saved = any(module == m or module.endswith(f".{m}") for m in saved)
        out.append(Replacement(name, ref, "modules_to_save" if is_saved else key.origin))
    for name, ref in found.tokens.items():
        rows = _token_rows(config, name, path)
        if len(ref.shape) != 2 or len(rows) != ref.shape[0]:
            raise BadFileError(
                "LT-367", "trainable tokens and their indices differ in number", file=path,
                key=ref.name, expected=f"{len(rows)} rows", got=list(ref.shape),
            )  # fmt: skip
        out.append(Replacement(name, ref, "trainable_tokens", rows))
    return out


def _token_rows(config: PeftConfig, name: str, path: Path) -> tuple[int, ...]:
    given = config.raw.get("trainable_token_indices") or config.raw.get("token_indices")
    module = name.removesuffix(".weight")
    if isinstance(given, dict):
        given = next((v for k, v in given.items() if module == k or module.endswith(f".{k}")), None)
    is_list = isinstance(given, list) and all(type(i) is int and i >= 0 for i in given)
    if not is_list or len(set(given or ())) != len(given or ()):
        raise BadFileError(
            "LT-368", "no usable token indices", file=path, key=name,
            expected="trainable_token_indices: different whole numbers", got=str(given)[:80],
        )  # fmt: skip
    return tuple(given or ())


def _layer_order(config: Mapping[str, Any], path: Path) -> tuple[int, ...] | None:
    spans = config.get("layer_replication")
    if not spans:
        return None
    try:
        order = tuple(i for start, stop in spans for i in range(start, stop))
    except (TypeError, ValueError) as error:
        raise BadFileError(
            "LT-369", "bad layer_replication", file=path, key="layer_replication",
            expected="a list of [start, stop]", got=str(spans)[:80],
        ) from error  # fmt: skip
    if len(order) > 10_000 or any(i < 0 for i in order):
        raise BadFileError("LT-369", "bad layer_replication", file=path, got=str(spans)[:80])
    return order


def _extras(folder: Path) -> list[Path]:
    return sorted({p for pattern in _EXTRAS for p in folder.glob(pattern) if p.is_file()})
