"""The PEFT dialect: ``adapter_model.safetensors`` with ``adapter_config.json``.

A file whose configuration was lost is a dialect of its own, `FILE`: PEFT does not load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter
from loratool.dialects.base import Dialect
from loratool.dialects.candidate import Candidate

FOLDER_NAME, FILE_NAME = "peft", "peft-file"
_PREFIX = r"(^|\.)base_model\.model\."
_BARE_KEY = r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.[^.]+)*$|^prompt_embeddings$"


def is_folder(candidate: Candidate) -> bool:
    """``adapter_config.json`` with ``peft_type``, which PEFT itself requires."""
    return candidate.is_peft


def is_file(candidate: Candidate) -> bool:
    """PEFT's tensor names without its configuration, with or without the prefix."""
    if candidate.is_peft or candidate.header is None:
        return False
    is_bare = candidate.config is None and candidate.has_key(_BARE_KEY)
    return is_bare or candidate.has_key(_PREFIX)


FOLDER = Dialect(
    FOLDER_NAME, "PEFT", is_folder, form="folder",
    read="loratool.dialects.peft.read:read", write="loratool.dialects.peft.write:write",
    holds="loratool.dialects.peft.new_keys:obstacle", holds_whole=True,
    library="peft", weights=("adapter_model.safetensors",),
)  # fmt: skip
FILE = Dialect(
    FILE_NAME, "PEFT without its configuration", is_file,
    read="loratool.dialects.peft.read:read", written_as=FOLDER_NAME,
    lacks="no adapter_config.json", short="PEFT (no config)", is_last=True,
)  # fmt: skip
ROWS = (FOLDER, FILE)


def own_config(adapter: Adapter) -> Mapping[str, Any]:
    """The configuration of an adapter that was read from PEFT, empty for others."""
    return adapter.config if adapter.dialect == FOLDER_NAME else {}
