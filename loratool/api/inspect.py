"""`inspect` and `open`: looking at sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.adapter import ReadOptions
from loratool.api.common import file_rules
from loratool.report import InspectReport

if TYPE_CHECKING:
    from loratool.engine.opened import OpenAdapter


def open(path: str | Path, *, alpha: float | None = None) -> OpenAdapter:
    """Open an adapter to look at its tensors.

    Args:
        path: adapter folder or file.
        alpha: lora_alpha for files without a configuration.

    Example:
        >>> for module in lt.open("style"):
        ...     print(module.name, module.rank, module.norm())
    """
    from loratool.dialects import open_adapter
    from loratool.engine.opened import OpenAdapter
    from loratool.store.source import find_adapter

    return OpenAdapter(open_adapter(find_adapter(Path(path)), ReadOptions(alpha=alpha)))


def inspect(
    source: str | Path,
    *,
    tensors: bool = False,
    alpha: float | None = None,
    offline: bool = False,
    max_header: str | int | None = None,
    allow_pickle: bool = False,
) -> InspectReport:
    """Say what an adapter, a checkpoint or a folder of adapters holds, from headers alone.

    Args:
        source: path or Hub reference.
        tensors: list every tensor.
        alpha: lora_alpha for files without a configuration.
        offline: never touch the network.
        max_header: largest safetensors header accepted, such as ``"64MB"``.
        allow_pickle: convert pickles first, in a locked process.
    """
    from loratool.ops.inputs import Access, locate
    from loratool.ops.summary import summarize

    access = Access(offline, rules=file_rules(max_header, allow_pickle))
    resolved = locate(str(source), kind="adapter", access=access)
    report = summarize(
        resolved.path, tensors=tensors, alpha=alpha, source=str(source), label=resolved.label,
        max_header=access.rules.max_header,
    )  # fmt: skip
    return (
        report if resolved.note is None else replace(report, notes=(resolved.note, *report.notes))
    )
