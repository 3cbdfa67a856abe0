"""What in names, shapes and metadata is rarely meant, or wants to be known (no torch)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from loratool.adapter import Adapter
from loratool.errors import list_some
from loratool.lazy import regex
from loratool.report.text import plural

_NOISE = regex(r"(high|low)(?=[_\- ]?noise)|(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_OTHER = {"high": "low", "low": "high"}
_BOTH = {f".transformer_{number}." for number in (1, 2)}
_FUSED = regex(r"(.*?[._])(?:to_)?qkv(?:_proj)?")
_SPLIT = regex(r"(.*?[._])(?:to_)?[qkv](?:_proj)?")
_LARGE = 8.0
"""Alpha over rank from which on a file is rarely right."""


def oddities(adapter: Adapter) -> tuple[list[str], list[str]]:
    """(warnings, notes) about an opened adapter, a sentence each."""
    warnings = [*_split_qkv(adapter), *_twice(adapter), *_large(adapter)]
    return warnings, [*_whole_alphas(adapter), *_partner(adapter)]


def _split_qkv(adapter: Adapter) -> Iterator[str]:
    """sd-scripts' ``split_qkv``: ranks of the parts add up, alpha stays that of one part."""
    try:
        args = json.loads(adapter.metadata.get("ss_network_args", ""))
        dim = int(adapter.metadata.get("ss_network_dim", ""))
    except (ValueError, RecursionError):
        return
    if not isinstance(args, dict) or str(args.get("split_qkv", "")).lower() != "true" or dim < 1:
        return
    for parts in (3, 4):
        found = [s.module for s in adapter.specs if s.rank == parts * dim]
        if found:
            fused = plural(len(found), "fused module has", "fused modules have")
            yield (
                f"split_qkv: {fused} {parts} ranks of {dim} and the alpha of one, so that "
                f"every program applies 1/{parts} of what was trained there: "
                f"{list_some(found, 2)} (rescale --only REGEX={parts})"
            )


def _twice(adapter: Adapter) -> Iterator[str]:
    """Fused and split keys of one weight in one file."""
    fused = [m for s in adapter.specs if "qkv" in s.module and (m := _FUSED.fullmatch(s.module))]
    split = (_SPLIT.fullmatch(s.module) for s in adapter.specs) if fused else ()
    parents = {m[1] for m in split if m}
    both = [m.string for m in fused if m[1] in parents]
    if both:
        yield (
            f"{plural(len(both), 'module is', 'modules are')} there fused and split: "
            f"{list_some(both, 2)}; programs add "
            "both, or stop at one of them"
        )


def _large(adapter: Adapter) -> Iterator[str]:
    found = [s for s in adapter.specs if s.rank and s.scaling > _LARGE]
    if found:
        one = found[0]
        alpha = "" if one.alpha is None else f" (alpha {one.alpha:g} at rank {one.rank})"
        yield f"an odd scaling: {one.scaling:g}{alpha} in {plural(len(found), 'module')}"


def _whole_alphas(adapter: Adapter) -> Iterator[str]:
    types = Counter(ref.dtype for ref in adapter.carried if ref.numel == 1)
    whole = {dtype: n for dtype, n in types.items() if dtype.startswith(("I", "U"))}
    for dtype, count in whole.items():
        alphas = plural(count, "alpha is stored as a whole number", "alphas are whole numbers")
        yield f"{alphas} ({dtype}), at which some programs stop"


def _partner(adapter: Adapter) -> Iterator[str]:
    """Wan 2.2 has two models: one file for each, or both in one."""
    if all(any(mark in f".{s.module}." for s in adapter.specs) for mark in _BOTH):
        yield "both halves are in this file: transformer_1 for high noise, transformer_2 for low"
        return
    found = _NOISE.search(adapter.path.name)
    if found is None:
        return
    here = found[0]
    other = _like(here, _OTHER[here.lower()])
    name = adapter.path.name[: found.start()] + other + adapter.path.name[found.end() :]
    if _exists(adapter.path.with_name(name)):
        yield f"the half for {here.lower()} noise; {name} beside it is the one for {other.lower()}"
    elif found[1]:
        yield f"the half for {here.lower()} noise; that for {other.lower()}, {name}, is not here"


def _like(one: str, word: str) -> str:
    return word.upper() if one.isupper() else word.capitalize() if one[0].isupper() else word


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
