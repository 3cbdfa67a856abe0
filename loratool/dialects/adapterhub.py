"""AdapterHub's ``adapters``: ``adapter.safetensors`` or a pickle, with ``adapter_config.json``.

    model.layers.0.self_attn.q_proj.loras.NAME.lora_A     (r, in)    ΔW = alpha / r · lora_B lora_A
    model.layers.0.self_attn.q_proj.loras.NAME.lora_B     (out, r)

Modules have the names of transformers.  Of its methods only plain LoRA is a change of weights that
says all of itself: its DoRA and IA³ stretch biases too, Vera's bases and gates lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter, BesideFile, DeltaSpec, TensorRef
from loratool.dialects.base import Dialect, Spelling
from loratool.dialects.candidate import CONFIG_NAME, Candidate
from loratool.dialects.factors import product_spec, refuse_alpha
from loratool.dialects.peft.config import Fields
from loratool.errors import BadFileError, MismatchError
from loratool.lazy import regex
from loratool.options.groups import Read

NAME = "adapterhub"
_MERGE = "merge_adapter in the program that wrote it, save the model, then loratool extract"
_SPELLING = Spelling(
    regex(r"(?P<module>.+)\.loras\.[^.]+\.(?P<leaf>lora_A|lora_B)"),
    {"lora_A": "lora_A", "lora_B": "lora_B"}, "names that end in .loras.NAME.lora_A or .lora_B",
    _MERGE,
)  # fmt: skip
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")


def is_adapterhub(candidate: Candidate) -> bool:
    """Its configuration, or its keys."""
    config = candidate.config or {}
    stated = isinstance(config.get("config"), dict) and "model_class" in config
    return not candidate.is_peft and (
        stated or candidate.has_key(r"\.loras\.[^.]+\.(lora_[AB]|vera_[BD])$")
    )


ROW = Dialect(
    NAME, "AdapterHub (adapters)", is_adapterhub, short="AdapterHub", written_as="peft",
    weights=("adapter.safetensors", "pytorch_adapter.safetensors"),
    read="loratool.dialects.adapterhub:read",
)  # fmt: skip


def read(candidate: Candidate, options: Read) -> Adapter:
    """Read an adapter of AdapterHub's.

    Raises:
        BadFileError: LT-360 … LT-366, damaged.
        MismatchError: LT-401, another method than LoRA; LT-415.
        UsageError: LT-280, nothing says its alpha.
    """
    if candidate.header is None:
        raise BadFileError("LT-360", "no adapter weights in this folder", file=candidate.path)
    config = candidate.config or {}
    said = Fields(Fields(config, candidate.config_path).part("config") or {}, candidate.config_path)
    method = _method(said)
    if method:
        raise MismatchError(
            "LT-401", f"{method} of AdapterHub are not read", file=candidate.path,
            expected="LoRA that is added to weights", hint=_MERGE,
        )  # fmt: skip
    modules = _SPELLING.by_module(candidate.header.tensors)
    alpha = said.number("alpha", 0.0) if options.alpha is None else options.alpha
    if options.alpha is None and said.config.get("alpha") is None:
        refuse_alpha(candidate.path, "AdapterHub", CONFIG_NAME)
    base = config.get("model_name")
    return Adapter(
        candidate.path, NAME,
        tuple(_spec(name, fields, alpha) for name, fields in modules.items()),
        base_model=base if isinstance(base, str) and base else None,
        metadata=candidate.header.metadata, key_order=candidate.keys,
        beside=tuple(
            BesideFile(name, "it holds the head that was trained with the adapter")
            for name in _HEADS if name in candidate.names
        ),
    )  # fmt: skip


def _spec(module: str, fields: Mapping[str, TensorRef], alpha: float) -> DeltaSpec:
    """A change; those of GPT-2's queries and values lie side by side in one module."""
    rows, ranks = (fields[role].shape if role in fields else () for role in ("lora_A", "lora_B"))
    if len(rows) == len(ranks) == 2 and rows[0] in (2 * ranks[1], 3 * ranks[1]):
        raise MismatchError(
            "LT-401", "changes of queries and values side by side are not read",
            file=fields["lora_A"].path, key=module, hint=_MERGE,
        )  # fmt: skip
    return product_spec(module, fields, alpha)


def _method(said: Fields) -> str:
    """What it is instead of LoRA that is added to weights, "" if it is that."""
    kind = said.text("architecture", "lora")
    if kind != "lora":
        return f"adapters of the kind {kind}"
    if said.text("composition_mode", "add") != "add":
        return "scalings (IA³)"
    if said.flag("use_dora"):
        return "DoRA adapters"
    if said.flag("use_gating"):
        return "gated adapters"
    return "VeRA adapters" if said.config.get("vera_d") is not None else ""
