"""What metadata of a file state about scaling: PEFT's configurations, as diffusers keeps them.

``lora_adapter_metadata`` is JSON, ``{"unet.r": 4, "unet.lora_alpha": 8, …}``; files of one model
alone have no ``unet.`` before the fields.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from loratool.adapter import DeltaSpec
from loratool.dialects.dotted import HEADER, PIPELINE
from loratool.dialects.fields import Scaling, Stated
from loratool.dialects.peft.config import PeftConfig, parse_config
from loratool.errors import BadFileError
from loratool.lazy import regex

_PARTS = tuple(c.name for c in PIPELINE if c.name)
# The one model whose alpha stands in a plain field of the metadata.
_MINIMAX = regex(r"(^|\.)(blocks\.\d+\.attn\.qkv_proj|(video|audio)_patch_proj)$")


def read(metadata: Mapping[str, str], modules: Collection[str]) -> Stated:
    """What is stated of modules, by PEFT's rules.

    Raises:
        BadFileError: LT-361 … LT-368, no usable configuration.
    """
    if HEADER not in metadata:
        return read_alpha(metadata, modules)
    parts = {part: parse_config({"peft_type": "LORA", **fields}, None)
             for part, fields in _by_part(metadata[HEADER]).items()}  # fmt: skip

    def stated(module: str, rank: int) -> Scaling | None:
        part, rest = _split(module)
        if part not in parts:
            part, rest = "", module
        config = parts.get(part)
        if config is None:
            return None
        return _scaling(config, rest, rank)

    return stated


def _scaling(config: PeftConfig, module: str, rank: int) -> Scaling:
    alpha = config.alphas.get(module, config.alpha)
    return Scaling(alpha, config.scaling(alpha, rank))


def read_alpha(metadata: Mapping[str, str], modules: Collection[str]) -> Stated:
    """``alpha`` of the whole file: only MiniMax-H3 has it."""
    try:
        alpha = float(metadata.get("alpha", ""))
    except ValueError:
        return lambda module, rank: None
    if not any(map(_MINIMAX.search, modules)):
        return lambda module, rank: None
    return lambda module, rank: Scaling(alpha, alpha / rank)


def without(metadata: Mapping[str, str], specs: Sequence[DeltaSpec]) -> dict[str, str]:
    """The metadata of a file whose tensors say everything about scaling."""
    return {key: value for key, value in metadata.items() if key != HEADER}


def write(metadata: Mapping[str, str], specs: Sequence[DeltaSpec]) -> dict[str, str]:
    """Metadata that state the scaling of changes; those that do so already stay as they are."""
    ranked = [s for s in specs if s.rank]
    kept = without(metadata, specs)
    stated = read(metadata, [s.module for s in ranked])
    said = [(s, stated(s.module, s.rank)) for s in ranked]
    is_true = all(one is not None and one.factor == s.scaling for s, one in said)
    if HEADER in metadata and is_true and _ranks_hold(metadata[HEADER], ranked):
        return dict(metadata)
    # Names without a part of a pipeline are told from those of language models by the metadata.
    is_plain = all(s.scaling == 1 and _split(s.module)[0] for s in ranked)
    if HEADER not in metadata and is_plain:
        return kept
    old = _by_part(metadata[HEADER]) if HEADER in metadata else {}
    by_part: dict[str, list[tuple[str, DeltaSpec]]] = {}
    for spec in ranked:
        part, rest = _split(spec.module)
        by_part.setdefault(part, []).append((rest, spec))
    biased = {_split(s.module)[0] for s in specs if not s.is_matrix}
    fields = {
        f"{part}.{key}" if part else key: value
        for part, some in by_part.items()
        for key, value in _config(old.get(part, {}), some, has_bias=part in biased).items()
    }
    return {**kept, HEADER: json.dumps(fields, indent=2, sort_keys=True)}


def _config(
    old: Mapping[str, Any], specs: Sequence[tuple[str, DeltaSpec]], *, has_bias: bool
) -> dict[str, Any]:
    """The configuration of one part: rank and alpha of most modules, and those of the others."""
    alphas = {name: _whole(s.scaling * s.rank) for name, s in specs}
    rank = Counter(s.rank for _, s in specs).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA", **old,
        "r": rank, "lora_alpha": alpha, "use_rslora": False, "lora_bias": has_bias,
        "use_dora": any(s.scales_rows for _, s in specs),
        "rank_pattern": {_pattern(n): s.rank for n, s in specs if s.rank != rank},
        "alpha_pattern": {_pattern(n): a for n, a in alphas.items() if a != alpha},
        "target_modules": sorted(alphas),
    }  # fmt: skip


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _pattern(module: str) -> str:
    """A key of a pattern table that matches this module alone."""
    return "^" + re.escape(module)


def _ranks_hold(text: str, specs: Sequence[DeltaSpec]) -> bool:
    """PEFT makes modules of the ranks that are stated, before it loads tensors into them."""
    parts = {p: parse_config({"peft_type": "LORA", **f}, None) for p, f in _by_part(text).items()}
    for spec in specs:
        part, rest = _split(spec.module)
        config = parts.get(part if part in parts else "")
        if config is None or config.ranks.get(rest, config.rank or 0) != spec.rank:
            return False
    return True


def _split(module: str) -> tuple[str, str]:
    part, _, rest = module.partition(".")
    return (part, rest) if part in _PARTS and rest else ("", module)


def _by_part(text: str) -> dict[str, dict[str, Any]]:
    """Part of the pipeline -> its configuration."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise BadFileError("LT-361", "no usable configuration", key=HEADER, got=text[:100],
                           expected="a JSON object")  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        part, rest = _split(key)
        found.setdefault(part, {})[rest] = value
    return found
