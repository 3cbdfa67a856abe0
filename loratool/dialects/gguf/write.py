"""Write GGUF adapters."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, Replacement, Source, TensorData
from loratool.archs.stated import is_tied, model_type, text_config
from loratool.dialects.arranged import arranged
from loratool.dialects.factors import beyond_pairs
from loratool.dialects.gguf import (
    ADAPTER,
    ALPHA,
    ARCHITECTURE,
    BASE,
    HUB,
    HUB_NAME,
    LEAVES,
    NAME,
    PAIRED,
)
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen
from loratool.kind import STORED
from loratool.quant.gguf_names import (
    ARCHITECTURES,
    HEADS,
    architecture_of,
    ggml_module,
    is_norm,
    leaf_of,
)
from loratool.store.reader import read_bytes

_ROLES = {role: leaf for leaf, role in LEAVES.items()} | {PAIRED: "lora_b"}
_TYPES = ("F32", "F16", "BF16")
_FIRST = ("general.architecture", "general.type", "adapter.type")
_NO_HEADS = "rows of heads, whose number the base says"
_SLACK = 1e-6  # alpha is written as float32


def obstacle(spec: DeltaSpec) -> str:
    """What of a change a GGUF adapter has no place for, "" if there is nothing."""
    reasons = {
        f"a {spec.title}": spec.kind not in ("lowrank", "paired"),
        **beyond_pairs(spec),
        "a transposed weight": spec.transposed,
        "factors that are not F32, F16 or BF16": any(
            f.dtype not in _TYPES for f in spec.fields.values()
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class _Model(Frozen):
    """The base, as far as it is known.

    Attributes:
        name: llama.cpp's word for its architecture.
        config: of its model of text; empty if there is no base.
        is_tied: its head is its embedding.
    """

    name: str
    config: Mapping[str, Any]
    is_tied: bool

    def turns(self, tensor: str) -> bool:
        """True if rows of a tensor lie in pairs."""
        return ARCHITECTURES[self.name].is_paired and leaf_of(tensor) in HEADS

    def height(self, tensor: str, out: int) -> int:
        """Rows of one head, of ``out``; 0 where it is not known."""
        heads = self.config.get("num_attention_heads")
        if leaf_of(tensor) == "attn_k":
            heads = self.config.get(HEADS["attn_k"]) or heads
        if not isinstance(heads, int) or heads < 1 or out % (2 * heads):
            return 0
        return out // heads

    def norm_of(self, one: Replacement) -> str:
        """What a norm is called, which llama.cpp's loader passes by; "" for any other tensor."""
        tensor, _ = ggml_module(self.name, one.name.removesuffix(".weight"))
        is_whole = one.rows is None and one.source.dtype in _TYPES
        return tensor if tensor and is_whole and is_norm(self.name, tensor) else ""

    def why_not(self, spec: DeltaSpec) -> str:
        """Why it has no place for a change, "" if it has one."""
        if why := obstacle(spec):
            return why
        tensor, _ = ggml_module(self.name, spec.module)
        if not tensor:
            return f"a module that {self.name} has not in llama.cpp"
        if tensor == "output" and self.is_tied:
            return "a head that is tied to the embedding"
        is_turned = spec.kind == "paired" or STORED in spec.settings
        if is_turned or not self.turns(tensor):
            return "rows in pairs" if is_turned and not self.turns(tensor) else ""
        return "" if self.height(tensor, spec.fields["lora_B"].shape[0]) else _NO_HEADS


def write(
    adapter: Adapter, *, base_config: Mapping[str, Any] | None = None, base_tensors: object = ()
) -> AdapterFiles:
    """The file of an adapter in llama.cpp's form.

    Raises:
        MismatchError: LT-460, nothing says for which model it is; LT-411, LT-412, llama.cpp cannot
            hold it.
    """
    model = _model(adapter, base_config or {})
    alpha = _alpha(adapter)
    _check(adapter, model, alpha is not None)
    tensors: dict[str, Source] = {}
    experts: dict[str, dict[int, DeltaSpec]] = {}
    for spec in adapter.specs:
        tensor, number = ggml_module(model.name, spec.module)
        if number is not None:
            experts.setdefault(tensor, {})[number] = spec
            continue
        for role, source in spec.fields.items():
            tensors[f"{tensor}.weight.{_ROLES[role]}"] = _laid(
                tensor, role, source, model, STORED in spec.settings
            )  # fmt: skip
    tensors |= {f"{model.norm_of(r)}.weight": r.source for r in adapter.replacements}
    for tensor, found in experts.items():
        tensors |= _stacked(tensor, found, adapter)
    metadata = _metadata(adapter, model.name)
    numbers: dict[str, float] = {ALPHA: alpha or 0.0}
    if f"{BASE}0.repo_url" in metadata:
        numbers[f"{BASE}count"] = 1
    return AdapterFiles(tuple(tensors.items()), metadata, "", numbers=numbers)


def _model(adapter: Adapter, config: Mapping[str, Any]) -> _Model:
    """What the base's configuration says, or the file that the adapter was read from."""
    text = text_config(config)
    kind = model_type(text) or model_type(config)
    name = architecture_of(kind) if kind else str(adapter.config.get(ARCHITECTURE, ""))
    if name:
        return _Model(name, text, is_tied(config) or is_tied(text))
    if kind:
        known = sorted({m for one in ARCHITECTURES.values() for m in one.models})
        raise MismatchError(
            "LT-411", "the base is of another kind than those whose names in llama.cpp are known",
            file=adapter.path, key="model_type", got=kind, expected=", ".join(known),
            hint="convert_lora_to_gguf.py of llama.cpp may know it",
        )  # fmt: skip
    raise MismatchError(
        "LT-460", "a GGUF adapter says for which kind of model it is, and nothing here says it",
        file=adapter.path, expected="the base model",
        hint=_command(adapter),
    )  # fmt: skip


def _command(adapter: Adapter) -> str:
    base = adapter.base_model or "BASE"
    words = ["loratool", "convert", str(adapter.path), "--to", NAME, "--base", base]
    words += ["-o", "OUT.gguf"]
    return shlex.join(words)


def _alpha(adapter: Adapter) -> float | None:
    """The one alpha that gives every change its scaling, 0 for scalings of 1; None if none does."""
    found = [s.scaling * s.rank for s in adapter.specs]
    first = found[0] if found else 0.0
    if first and all(abs(alpha - first) <= _SLACK * abs(first) for alpha in found):
        return first
    return 0.0 if found and all(s.scaling == 1 for s in adapter.specs) else None


def _check(adapter: Adapter, model: _Model, is_even: bool) -> None:
    problems = [(s.name, why) for s in adapter.specs if (why := model.why_not(s))]
    problems += [(r.name, "a replaced tensor") for r in adapter.replacements
                 if not model.norm_of(r)]  # fmt: skip
    if adapter.layer_order is not None:
        problems.append(("layer_replication", "a deeper stack of layers"))
    if not (problems or is_even):
        problems = [(s.name, "one alpha for all modules") for s in adapter.specs] or [
            ("", "no change at all")
        ]
    if not problems:
        return
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name, _ in problems)
    ways = " ".join(f"--skip '^{re.escape(module)}$'" for module in list(modules)[:3])
    raise MismatchError(
        "LT-411", "llama.cpp cannot hold this adapter", file=adapter.path,
        key=list_some((name for name, _ in problems), 3),
        got=list_some(dict.fromkeys(why for _, why in problems), 3),
        hint=f"leave them out: {ways}{' …' if len(modules) > 3 else ''}",
    )  # fmt: skip


def _laid(tensor: str, role: str, source: Source, model: _Model, is_stored: bool) -> Source:
    """A factor as llama.cpp has it, where its rows may be so already."""
    if tensor == "token_embd" and role == "lora_A":
        return arranged(source, source.shape, (1, 0))
    if role == "lora_B" and not is_stored and model.turns(tensor):
        out, rank = source.shape
        each = model.height(tensor, out)
        return arranged(source, (out // each, 2, each // 2, rank), (0, 2, 1, 3), source.shape)
    return source


def _stacked(tensor: str, found: Mapping[int, DeltaSpec], adapter: Adapter) -> dict[str, Source]:
    """The factors of all experts, one after another."""
    made: dict[str, Source] = {}
    for role, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
        sources = [found[number].fields[role] for number in sorted(found)]
        if (
            sorted(found) != list(range(len(found)))
            or len({(s.shape, s.dtype) for s in sources}) > 1
        ):
            raise MismatchError(
                "LT-412", "llama.cpp adapts all experts of a layer alike, or none",
                file=adapter.path, key=tensor,
                got=f"experts {list_some(map(str, sorted(found)), 5)}; "
                f"{list_some(dict.fromkeys(str(list(s.shape)) for s in sources), 3)}",
            )  # fmt: skip
        data = b"".join(bytes(read_bytes(s)) for s in sources)
        name = f"{tensor}.weight.{leaf}"
        made[name] = TensorData(name, sources[0].dtype, (len(sources), *sources[0].shape), data)
    return made


def _metadata(adapter: Adapter, architecture: str) -> dict[str, str]:
    """What llama.cpp asks for, then what an older file said."""
    made = dict(zip(_FIRST, (architecture, ADAPTER, "lora"), strict=True))
    if adapter.dialect == NAME:
        made |= {k: v for k, v in adapter.metadata.items() if k not in made and k != "loratool"}
    base = adapter.base_model
    if base and re.fullmatch(HUB_NAME, base):
        made[f"{BASE}0.repo_url"] = HUB + base
    return made
