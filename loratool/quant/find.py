"""The registry of codecs, and what of a checkpoint one of them claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool import plugins
from loratool.quant.base import Codec, Found, Tensors

_STATED = ("quantization_config", "compression_config")
_PARTS = ("text_config",)

CODECS: dict[str, Codec] = {
    c.name: c
    for c in (
        Codec("fp8", "8-bit floats", ("fp8",), "loratool.quant.fp8"),
    )
}  # fmt: skip


def others() -> dict[str, Codec]:
    """Codecs of other packages, by name (entry points ``loratool.codecs``)."""
    return plugins.load("loratool.codecs", Codec, CODECS)


def codec_of(name: str) -> Codec:
    """The row of a codec's name; other packages are asked where none here has it.

    Raises:
        KeyError: there is none.
    """
    return CODECS.get(name) or others()[name]


def reading(method: str) -> Codec | None:
    """The codec that reads a method of quantisation, None if there is none."""
    own = next((c for c in CODECS.values() if method in c.methods), None)
    return own or next((c for c in others().values() if method in c.methods), None)


def methods() -> list[str]:
    """All methods that are read."""
    return [m for codec in (*CODECS.values(), *others().values()) for m in codec.methods]


def find_codes(method: str, tensors: Tensors, config: Mapping[str, Any]) -> Found | None:
    """The coded weights of a checkpoint, None if no codec reads its method.

    Args:
        method: as `loratool.quant.recognize` names it.
        tensors: by name.
        config: ``config.json``.

    Raises:
        BadFileError: LT-335, codes and factors that do not fit each other.
    """
    codec = reading(method)
    return None if codec is None else codec.coder.find(tensors, config)


def stating_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys that say that weights are coded."""
    for prefix, part in (("", config), *((f"{p}.", config.get(p)) for p in _PARTS)):
        if isinstance(part, Mapping):
            yield from (prefix + key for key in _STATED if key in part)
