"""Describe adapters and checkpoints from their headers and configuration (no torch)."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from loratool.adapter import Adapter, DeltaSpec, ReadOptions, Replacement, Source
from loratool.dialects import open_adapter, unmergeable_reason
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, LoratoolError, MismatchError
from loratool.ops.loads import judge_loads
from loratool.report import (
    AdapterSummary,
    CheckpointSummary,
    FolderRow,
    InspectReport,
    ReplacedTensor,
    TargetFamily,
    TensorRow,
)
from loratool.store.checkpoint import Checkpoint, open_checkpoint

_ADAPTER_FILE = re.compile(
    r"(adapter_config\.json|adapter_model\.\w+|adapters\.safetensors|\d+_adapters\.safetensors"
    r"|pytorch_lora_weights\.\w+)$"
)
_MODEL_FILE = re.compile(
    r"(config\.json|model_index\.json|.*\.index\.json"
    r"|(model|diffusion_pytorch_model)[.-].*safetensors|pytorch_model.*\.bin)$"
)
_QUANTISED_NAME = re.compile(r"bnb-\dbit|-(GPTQ|AWQ|FP8|int[48])\b|-4bit\b", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[\w.~/-]+")


def summarize(
    path: Path, *, tensors: bool = False, alpha: float | None = None, source: str | None = None
) -> InspectReport:
    """Describe what lies at a path, from headers alone.

    Args:
        path: adapter, checkpoint, or a folder of several.
        tensors: list every tensor.
        alpha: lora_alpha for files without a configuration.
        source: how the user named it; None = the path.

    Raises:
        BadFileError: nothing that can be described is there, or it is damaged.

    Example:
        >>> summarize(Path("style")).adapter.ranks  # doctest: +SKIP
        {16: 252}
    """
    named = source or str(path)
    what = _what(path)
    if what == "folder":
        return InspectReport(source=named, what=what, rows=tuple(_rows(path, alpha)))
    if what == "checkpoint":
        return _describe_checkpoint(path, named, tensors)
    try:
        return _describe_adapter(path, named, tensors, alpha)
    except MismatchError:
        if what == "adapter":
            raise
    return _describe_checkpoint(path, named, tensors)


def _what(path: Path) -> str:
    """``adapter``, ``checkpoint``, ``folder`` or, for a file, ``file`` (its keys decide)."""
    if not path.is_dir():
        return "file"
    names = [entry.name for entry in path.iterdir()]
    if any(_ADAPTER_FILE.match(name) for name in names):
        return "adapter"
    return "checkpoint" if any(_MODEL_FILE.match(name) for name in names) else "folder"


# --------------------------------------------------------------------------------- adapters


def _describe_adapter(path: Path, named: str, tensors: bool, alpha: float | None) -> InspectReport:
    adapter = open_adapter(path, ReadOptions(alpha=alpha))
    return InspectReport(
        source=named,
        what="adapter",
        adapter=summarize_adapter(adapter),
        tensors=tuple(_adapter_tensors(adapter)) if tensors else (),
        warnings=tuple(_warnings(adapter)),
        notes=adapter.notes,
        next=_next_step(adapter, named),
    )


def summarize_adapter(adapter: Adapter) -> AdapterSummary:
    """The facts of an opened adapter."""
    # Specs may share a tensor (slices of one fused pair): count it once.
    factors = list({(id(f), f.name): f for s in adapter.specs for f in s.fields.values()}.values())
    replaced = [_replaced(r) for r in adapter.replacements]
    everything = [*factors, *(r.source for r in adapter.replacements)]
    return AdapterSummary(
        label=adapter.label,
        dialect=adapter.dialect,
        method=_method(adapter),
        base_model=adapter.base_model,
        modules=len(adapter.specs),
        families=_families(adapter.specs),
        ranks=dict(sorted(Counter(s.rank for s in adapter.specs if s.rank).items())),
        alphas=_counted(
            "-" if s.alpha is None else f"{s.alpha:g}" for s in adapter.specs if s.rank
        ),
        scalings=_counted(f"{s.scaling:.6g}" for s in adapter.specs if s.rank),
        factor_parameters=sum(s.numel for s in factors),
        factor_bytes=sum(s.nbytes for s in factors),
        replaced_parameters=sum(r.source.numel for r in adapter.replacements),
        replaced_bytes=sum(r.nbytes for r in replaced),
        dtypes=_dtype_bytes(everything),
        replaced=tuple(sorted(replaced, key=lambda r: -r.nbytes)),
        unclaimed=tuple(ref.name for ref in adapter.unclaimed),
        extras=tuple(extra.name for extra in adapter.extras),
        loads=judge_loads(adapter),
        metadata=dict(adapter.metadata),
    )


def _method(adapter: Adapter) -> str:
    config = adapter.config
    name = str(config.get("peft_type", "LORA"))
    method = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "VERA": "VeRA"}.get(name, name)
    if any(spec.kind == "dora" for spec in adapter.specs):
        method = "DoRA"
    extra = [spec.base_change for spec in adapter.specs if spec.base_change][:1]
    extra += ["rsLoRA scaling"] if config.get("use_rslora") else []
    return f"{method} ({', '.join(extra)})" if extra else method


def _families(specs: Sequence[DeltaSpec]) -> tuple[TargetFamily, ...]:
    groups: dict[str, list[DeltaSpec]] = {}
    for spec in specs:
        groups.setdefault(_leaf(spec), []).append(spec)
    return tuple(
        TargetFamily(
            name=name,
            modules=len(members),
            layers=_layer_ranges(members),
            ranks=dict(sorted(Counter(s.rank for s in members).items())),
            parameters=sum(f.numel for s in members for f in s.fields.values()),
        )
        for name, members in groups.items()
    )


def _leaf(spec: DeltaSpec) -> str:
    last = spec.module.rpartition(".")[2]
    return (
        last
        if spec.parameter == "weight"
        else f"{last}.{spec.parameter}"
        if last
        else spec.parameter
    )


def _layer_ranges(specs: Iterable[DeltaSpec]) -> str:
    numbers = {int(m[1]) for s in specs if (m := re.search(r"\.(\d+)(?=\.|$)", s.module))}
    return format_ranges(numbers)


def format_ranges(numbers: Iterable[int]) -> str:
    """``0-3,5,7-9`` for a set of numbers.

    Example:
        >>> format_ranges({0, 1, 2, 3, 5})
        '0-3,5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _replaced(replacement: Replacement) -> ReplacedTensor:
    source = replacement.source
    rows = None if replacement.rows is None else len(replacement.rows)
    return ReplacedTensor(
        replacement.name, source.shape, _word(source.dtype), source.nbytes, replacement.origin, rows
    )


def _warnings(adapter: Adapter) -> list[str]:
    found = []
    if reason := unmergeable_reason(adapter):
        found.append(f"cannot be merged: {reason}")
    zero = [spec for spec in adapter.specs if spec.rank and spec.scaling == 0]
    if zero:
        found.append(f"alpha 0: {len(zero)} of {len(adapter.specs)} modules have no effect")
    negative = [spec for spec in adapter.specs if spec.rank and spec.scaling < 0]
    if negative:
        found.append(f"negative alpha in {len(negative)} modules: they subtract")
    if adapter.unclaimed:
        found.append(f"{len(adapter.unclaimed)} tensors mean nothing for merging and are not used")
    if adapter.base_model and _QUANTISED_NAME.search(adapter.base_model):
        found.append(
            "trained on a quantised base: merge into the 16-bit model that it was made from"
        )
    return found


def _next_step(adapter: Adapter, named: str) -> str | None:
    if unmergeable_reason(adapter):
        return None
    base = adapter.base_model
    if not base or _QUANTISED_NAME.search(base) or not _PLAIN_NAME.fullmatch(base):
        base = "BASE"
    return shlex.join(["loratool", "merge", named, "--base", base, "-o", "merged", "--dry-run"])


def _adapter_tensors(adapter: Adapter) -> list[TensorRow]:
    sources = [
        *(f for spec in adapter.specs for f in spec.fields.values()),
        *(r.source for r in adapter.replacements),
        *adapter.unclaimed,
    ]
    rows = {s.name: TensorRow(s.name, _word(s.dtype), s.shape, s.nbytes) for s in sources}
    ordered = [rows.pop(key) for key in adapter.key_order if key in rows]
    return ordered + list(rows.values())


# ------------------------------------------------------------------------------ checkpoints


def _describe_checkpoint(path: Path, named: str, tensors: bool) -> InspectReport:
    checkpoint = open_checkpoint(path)
    warnings = []
    if checkpoint.is_folder and (path / "adapter_config.json").exists():
        warnings.append("adapter_config.json inside: transformers would apply that adapter on top")
    return InspectReport(
        source=named,
        what="checkpoint",
        checkpoint=summarize_checkpoint(checkpoint),
        tensors=tuple(
            TensorRow(name, _word(ref.dtype), ref.shape, ref.nbytes)
            for name, ref in (checkpoint.tensors.items() if tensors else ())
        ),
        warnings=tuple(warnings),
        notes=checkpoint.notes,
        next=None if checkpoint.quantization
        else shlex.join(["loratool", "merge", "ADAPTER", "--base", named, "-o", "merged"]),
    )  # fmt: skip


def summarize_checkpoint(checkpoint: Checkpoint) -> CheckpointSummary:
    """The facts of an opened checkpoint."""
    refs = list(checkpoint.tensors.values())
    return CheckpointSummary(
        label=checkpoint.path.name or str(checkpoint.path),
        model_type=checkpoint.model_type,
        shards=len(checkpoint.shards),
        tensors=len(refs),
        parameters=sum(ref.numel for ref in refs if DTYPES[ref.dtype].is_float),
        nbytes=checkpoint.nbytes,
        dtypes=_dtype_bytes(refs),
        tied=checkpoint.config.get("tie_word_embeddings") is True,
        quantization=checkpoint.quantization,
        components=checkpoint.components,
    )


# ---------------------------------------------------------------------------------- folders


def _rows(folder: Path, alpha: float | None) -> Iterable[FolderRow]:
    """One row per weight file and per sub-folder that is an adapter or a checkpoint.

    Raises:
        BadFileError: there is none.
    """
    rows = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if _what(entry) != "folder":
                rows.append(summarize_row(entry, entry.name, alpha))
        elif entry.suffix in (".safetensors", ".gguf"):
            rows.append(summarize_row(entry, entry.name, alpha))
    if not rows:
        raise BadFileError(
            "LT-340", "no adapter and no checkpoint here", file=folder,
            expected="safetensors files, or folders that hold them",
            got=f"{sum(1 for _ in folder.iterdir())} other entries",
        )  # fmt: skip
    return rows


def summarize_row(path: Path, name: str, alpha: float | None = None) -> FolderRow:
    """One row; what cannot be read becomes a row with its error."""
    try:
        report = summarize(path, alpha=alpha)
    except LoratoolError as error:
        return FolderRow(name, error=error.to_json())
    return FolderRow(name, report.adapter, report.checkpoint)


def _word(dtype: str) -> str:
    return DTYPES[dtype].word or dtype


def _dtype_bytes(sources: Iterable[Source]) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    for source in sources:
        counts[_word(source.dtype)] += source.nbytes
    return dict(counts.most_common())


def _counted(values: Iterable[str]) -> Mapping[str, int]:
    return dict(Counter(values).most_common())
