"""What a dialect is: a row of the registry and two functions, looked up by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.store.header import Header


@dataclass(frozen=True)
class Dialect:
    """One spelling of adapters.

    Attributes:
        name: registry name, what ``--to`` takes.
        title: words for messages.
        implementation: module with ``read(found, options)`` and ``write(adapter)``; "" for a
            dialect that is recognised and refused.
        is_folder: the output is a folder (else one file).
    """

    name: str
    title: str
    implementation: str = ""
    is_folder: bool = True


@dataclass(frozen=True)
class Found:
    """An adapter on disk before it is understood.

    Attributes:
        path: folder or file as the user named it.
        folder: folder of the tensor file.
        header: header of the tensor file, None where it is no safetensors file.
        config: ``adapter_config.json`` beside it, empty if there is none.
        has_config: whether there was one.
    """

    path: Path
    folder: Path
    header: Header | None
    config: Mapping[str, Any] = field(default_factory=dict)
    has_config: bool = False
