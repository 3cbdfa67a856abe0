"""Model checkpoints as a set of named tensors: single files, shards, diffusers folders.

CONTRACT (the dataclasses below are fixed; `open_checkpoint` is to be written).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapter import TensorRef


@dataclass(frozen=True)
class Shard:
    """One weight file of a checkpoint.

    Attributes:
        path: the file.
        name: path relative to the checkpoint's folder (the file name for a single file).
        prefix: component prefix of its tensors' checkpoint-wide names (``"unet."``), or "".
        metadata: header metadata.
        keys: checkpoint-wide names of its tensors, in file (offset) order.
        header: length prefix and header JSON, as in the file.
    """

    path: Path
    name: str
    prefix: str
    metadata: Mapping[str, str]
    keys: tuple[str, ...]
    header: bytes = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weight files, opened (headers only).

    Attributes:
        path: folder, or the file itself.
        is_folder: False for a single ``.safetensors`` path.
        shards: weight files in the order of their names.
        tensors: checkpoint-wide name -> tensor, in shard and file order.  For a diffusers
            pipeline the name is ``<component>.<tensor name>``.
        config: ``config.json`` (empty if there is none); for a pipeline: component -> config.
        index_name: name of the index file, None if the checkpoint has none.
        components: sub-folders of a pipeline, else empty.
        quantization: name of the quantisation method, None for plain weights.
        notes: facts that the user should know (a lying total_size, ignored extra files).
    """

    path: Path
    is_folder: bool
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] = field(default_factory=dict)
    index_name: str | None = None
    components: tuple[str, ...] = ()
    quantization: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration, or ""."""
        value = self.config.get("model_type", "")
        return value if isinstance(value, str) else ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())
