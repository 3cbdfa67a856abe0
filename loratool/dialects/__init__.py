"""Adapter dialects: files of any program → neutral form, and back.

A dialect is one row of `DIALECTS` and one module that the row names.  Rows are tried in order;
the first whose ``detect`` says yes reads the file.  Rows without a reader are known by name, so
that their files are refused with a reason instead of being misread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.dialects import detect as looks
from loratool.dialects.base import Candidate, Dialect, examine
from loratool.dialects.peft import unmergeable_reason
from loratool.dialects.peft_new import task_type_of
from loratool.errors import MismatchError, UsageError
from loratool.options.groups import Read
from loratool.store.header import MAX_HEADER_BYTES

__all__ = [
    "BY_NAME",
    "DIALECTS",
    "Candidate",
    "Dialect",
    "detect",
    "examine",
    "open_adapter",
    "read_back",
    "task_type_of",
    "unmergeable_reason",
    "write_adapter_files",
]

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        "gguf", "GGUF (llama.cpp)", looks.is_gguf, suffixes=(".gguf",),
        hint="use the PEFT adapter that it was converted from",
    ),
    Dialect(
        "peft", "PEFT", looks.is_peft_folder, form="folder",
        read="loratool.dialects.peft:read", write="loratool.dialects.peft_write:write",
    ),
    Dialect("mlx", "mlx-lm", looks.is_mlx, form="folder"),
    Dialect("litgpt", "litgpt", looks.is_litgpt, form="folder", suffixes=(".lora",)),
    Dialect("megatron", "NeMo / Megatron", looks.is_megatron, hint="export it to PEFT in NeMo"),
    Dialect("torchtune", "torchtune (own names)", looks.is_torchtune,
            hint="torchtune's HF checkpointer exports PEFT folders"),
    Dialect("xlabs", "XLabs FLUX", looks.is_xlabs),
    Dialect("lycoris", "LyCORIS", looks.is_lycoris),
    Dialect("comfyui", "ComfyUI (diffusion_model.)", looks.is_comfyui),
    Dialect("kohya", "kohya", looks.is_kohya),
    Dialect("control-lora", "Control-LoRA", looks.is_control_lora),
    Dialect("textual-inversion", "textual inversion (no adapter)", looks.is_textual_inversion),
    Dialect("diffusers", "diffusers", looks.is_diffusers),
    Dialect("peft-file", "PEFT without its configuration", looks.is_peft_file,
            read="loratool.dialects.peft:read"),
)  # fmt: skip

BY_NAME: dict[str, Dialect] = {row.name: row for row in DIALECTS}


def open_adapter(
    path: Path, options: Read | None = None, *, max_header: int = MAX_HEADER_BYTES
) -> Adapter:
    """Read an adapter into the neutral form: headers and configuration, no tensor bytes.

    Args:
        path: adapter folder or tensor file.  A file named ``adapter_model.safetensors`` takes
            the ``adapter_config.json`` beside it.
        options: what the files do not say.
        max_header: largest safetensors header accepted, in bytes.

    Raises:
        BadFileError: LT-3nn, a damaged or contradictory file.
        MismatchError: LT-400 no adapter, LT-401 a dialect that is not read, LT-402 … LT-415.
        UsageError: LT-280, LT-281, ``alpha`` is needed or an option makes no sense.
        UnsafeContentError: LT-920, a pickle.

    Example:
        >>> open_adapter(Path("style")).specs[0].name
        'model.layers.0.mlp.down_proj.weight'
    """
    candidate = examine(path, max_header=max_header)
    row = detect(candidate)
    if not row.read:
        kind = f"{row.title} {looks.gguf_kind(candidate)}" if row.name == "gguf" else row.title
        raise MismatchError(
            "LT-401", f"{kind} files are not supported yet", file=path, got=row.name,
            expected=", ".join(d.title for d in DIALECTS if d.read and d.write), hint=row.hint,
        )  # fmt: skip
    return row.reader()(candidate, options or Read())


def detect(candidate: Candidate) -> Dialect:
    """The dialect of what lies at a path.

    Raises:
        MismatchError: LT-400, no dialect claims it.
    """
    for row in DIALECTS:
        if row.detect(candidate):
            return row
    shown = ", ".join(candidate.keys[:3])
    raise MismatchError(
        "LT-400", "not an adapter that loratool knows", file=candidate.path,
        expected=", ".join(row.title for row in DIALECTS if row.read),
        got=f"tensors such as {shown}" if shown else "no tensors",
    )  # fmt: skip


def write_adapter_files(
    adapter: Adapter,
    dialect: str = "peft",
    *,
    base_config: Mapping[str, Any] | None = None,
    base_tensors: Iterable[str] = (),
) -> AdapterFiles:
    """The files of an adapter in a dialect, in memory.

    Args:
        adapter: read from files, or made by a command.
        dialect: name of a row of `DIALECTS`.
        base_config: the base's ``config.json``; it decides ``task_type`` of a new PEFT adapter.
        base_tensors: in-memory names of the base's tensors; with them a new PEFT configuration
            names exactly the adapted modules even where their names end alike.

    Raises:
        UsageError: LT-282, no such dialect.
        MismatchError: LT-411, LT-412, the dialect cannot hold the adapter.
    """
    row = BY_NAME.get(dialect)
    if row is None or not row.write:
        raise UsageError(
            "LT-282", "cannot write this dialect", got=dialect,
            expected=", ".join(d.name for d in DIALECTS if d.write),
        )  # fmt: skip
    return row.writer()(adapter, base_config=base_config, base_tensors=base_tensors)


def read_back(files: AdapterFiles, path: Path) -> Adapter:
    """What `open_adapter` would read from files that are not written yet.

    Args:
        files: of `write_adapter_files`.
        path: where they are to lie, for messages.
    """
    from loratool.dialects.peft_write import read_back as read_peft

    return read_peft(files, path)
