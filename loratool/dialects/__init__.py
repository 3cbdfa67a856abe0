"""Adapter dialects: detection, reading, writing.

Each dialect is one row of `DIALECTS` and one module.  Rows without a module are recognised by
their marks and refused by name.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from loratool.adapter import Adapter, AdapterFiles, ReadOptions
from loratool.dialects.base import Dialect, Found
from loratool.errors import BadFileError, MismatchError, UnsafeContentError
from loratool.store.header import read_header
from loratool.store.jsonfile import load_json

DIALECTS: tuple[Dialect, ...] = (
    Dialect("peft", "PEFT", "loratool.dialects.peft"),
    Dialect("mlx", "mlx-lm"),
    Dialect("gguf", "GGUF adapter", is_folder=False),
    Dialect("kohya", "kohya / LyCORIS", is_folder=False),
    Dialect("diffusers", "diffusers", is_folder=False),
    Dialect("torchtune", "torchtune"),
    Dialect("litgpt", "litgpt", is_folder=False),
)

BY_NAME = {d.name: d for d in DIALECTS}

_NAMED = ("adapter_model.safetensors", "adapters.safetensors")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")
_NATIVE = re.compile(r"^layers\.\d+\.(attn|mlp)\.\w+\.lora_[ab]\.weight$")


def open_adapter(path: Path, options: ReadOptions | None = None) -> Adapter:
    """Read an adapter's headers into the neutral form.

    Args:
        path: adapter folder, or a ``.safetensors`` file (with ``adapter_config.json`` beside it).
        options: what the files do not say.

    Raises:
        MismatchError: a dialect or method that is not supported.
        BadFileError: the files are damaged or contradict themselves.
        UnsafeContentError: the weights are a pickle.
    """
    found = find(path)
    dialect = detect(found)
    if not dialect.implementation:
        raise MismatchError(
            "LT-400",
            f"{dialect.title} adapters are not supported in this version",
            file=path,
            expected="PEFT",
        )
    adapter = import_module(dialect.implementation).read(found, options or ReadOptions())
    assert isinstance(adapter, Adapter)
    return adapter


def find(path: Path) -> Found:
    """Find the tensor file and the configuration of an adapter.

    Raises:
        BadFileError: there is nothing that looks like an adapter.
        UnsafeContentError: the weights are a pickle only.
    """
    folder = path if path.is_dir() else path.parent
    config_path = folder / "adapter_config.json"
    file = _weights_of(path) if path.is_dir() else path
    has_config = config_path.is_file() and (path.is_dir() or file.name in _NAMED)
    config = load_json(config_path) if has_config else {}
    with file.open("rb") as opened:
        is_gguf = opened.read(4) == b"GGUF"
    return Found(path, folder, None if is_gguf else read_header(file), config, has_config)


def _weights_of(folder: Path) -> Path:
    """The tensor file of an adapter folder; a file of any name only where no other is."""
    files = [folder / n for n in _NAMED if (folder / n).is_file()]
    if not files:
        _refuse_pickle(folder)
        files = sorted(folder.glob("*.gguf")) or sorted(folder.glob("*.safetensors"))
    if len(files) != 1 and not any((folder / n).is_file() for n in _NAMED):
        raise BadFileError(
            "LT-360", "no adapter weights in this folder", file=folder, expected=_NAMED[0],
            got=", ".join(f.name for f in files[:10]) or "none",
        )  # fmt: skip
    return files[0]


def _refuse_pickle(folder: Path) -> None:
    for name in _PICKLES:
        if (folder / name).is_file():
            raise UnsafeContentError(
                "LT-920",
                "the weights are a pickle, which can run code when it is opened",
                file=folder / name,
                expected="adapter_model.safetensors",
                hint="save it again with PEFT: save_pretrained(..., safe_serialization=True)",
            )


def detect(found: Found) -> Dialect:
    """Name the dialect of an adapter by its marks.

    Raises:
        MismatchError: no dialect that is known.
    """
    if found.header is None:
        return BY_NAME["gguf"]
    if "peft_type" in found.config:
        return BY_NAME["peft"]
    if "lora_parameters" in found.config or "fine_tune_type" in found.config:
        return BY_NAME["mlx"]
    names = [t.name for t in found.header.tensors]
    if any(n.endswith((".lora_a", ".lora_b")) for n in names):
        return BY_NAME["mlx"]
    if any(_NATIVE.match(n) for n in names):
        return BY_NAME["torchtune"]
    if any(n.startswith(("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")) for n in names):
        return BY_NAME["kohya"]
    if any(n.endswith((".lora_up.weight", ".lora_down.weight", ".hada_w1_a", ".lokr_w1"))
           for n in names):  # fmt: skip
        return BY_NAME["kohya"]
    if any(n.startswith(("unet.", "text_encoder", "transformer.")) and ".lora" in n for n in names):
        if not found.has_config and not any(n.startswith("transformer.h.") for n in names):
            return BY_NAME["diffusers"]
    if found.has_config or any(".lora_" in n or n.startswith("base_model.") for n in names):
        return BY_NAME["peft"]
    raise MismatchError(
        "LT-401",
        "not an adapter of any known dialect",
        file=found.path,
        expected=", ".join(d.title for d in DIALECTS),
        got=f"{len(names)} tensors, the first {names[0]}" if names else "no tensors",
    )


def unmergeable_reason(adapter: Adapter) -> str | None:
    """Why an adapter that can be read is no change of weights, None if it is one."""
    config = adapter.config
    if config.get("alora_invocation_tokens"):
        return "aLoRA acts from an invocation token on: not a change of weights"
    if config.get("use_qalora"):
        return "QALoRA pools the inputs of a quantised base: not a change of its weights"
    if config.get("arrow_config"):
        return "Arrow routes between adapters at run time"
    return None


def write_adapter_files(adapter: Adapter, dialect: str) -> AdapterFiles:
    """Spell an adapter in a dialect: names, configuration, order; bytes are not touched.

    Raises:
        MismatchError: the dialect cannot be written.
    """
    row = BY_NAME[dialect]
    if not row.implementation:
        raise MismatchError("LT-400", f"{row.title} adapters are not supported in this version")
    files = import_module(row.implementation).write(adapter)
    assert isinstance(files, AdapterFiles)
    return files
