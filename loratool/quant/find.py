"""The registry of codecs, and what of a checkpoint they claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool import plugins
from loratool.adapter import CodedRef, TensorRef
from loratool.quant.base import Codec, Found, Reader, Tensors, coded

CODECS: dict[str, Codec] = {
    c.name: c
    for c in (
        Codec("fp8", "8-bit floats", ("fp8", "compressed-tensors", "modelopt"),
              "loratool.quant.fp8", writes="blocks"),
        Codec("int8", "8-bit integers", ("bitsandbytes", "compressed-tensors"),
              "loratool.quant.int8", writes="blocks"),
        Codec("bnb4", "nf4 or fp4", ("bitsandbytes",), "loratool.quant.bnb4"),
        Codec("mxfp4", "mxfp4", ("mxfp4",), "loratool.quant.mxfp4", writes="rows"),
        Codec("gptq", "GPTQ", ("gptq",), "loratool.quant.gptq"),
        Codec("awq", "AWQ", ("awq",), "loratool.quant.awq"),
        Codec("packed", "packed integers", ("compressed-tensors",), "loratool.quant.packed"),
        Codec("nvfp4", "nvfp4", ("compressed-tensors", "modelopt"), "loratool.quant.nvfp4"),
        Codec("gguf", "blocks of ggml", ("gguf",), "loratool.quant.gguf"),
        Codec("mlx", "integers of mlx", ("mlx",), "loratool.quant.mlx"),
    )
}  # fmt: skip


SIMULATED = Codec("simulated", "numbers left by a coding", (), "loratool.quant.simulate")
"""Plain weights, seen as a quantised base has them; no checkpoint is stored like this."""


def others() -> dict[str, Codec]:
    """Codecs of other packages, by name (entry points ``loratool.codecs``)."""
    return plugins.load("loratool.codecs", Codec, CODECS)


def codec_of(name: str) -> Codec:
    """The row of a codec's name; other packages are asked where none here has it.

    Raises:
        KeyError: there is none.
    """
    if name == SIMULATED.name:
        return SIMULATED
    return CODECS.get(name) or others()[name]


def simulated(ref: TensorRef, word: str) -> CodedRef:
    """A plain weight, seen as what is left of it in a quantised base.

    Args:
        ref: the weight, two axes.
        word: ``nf4``, ``int8`` or ``fp8``.
    """
    return coded(SIMULATED.name, ref.name, ref, ref.shape, facts={"word": word})


def reading(method: str) -> list[Codec]:
    """The codecs that read weights of a method of quantisation."""
    own = [c for c in CODECS.values() if method in c.methods]
    return own or [c for c in others().values() if method in c.methods]


def methods() -> list[str]:
    """All methods that are read."""
    found = [m for codec in (*CODECS.values(), *others().values()) for m in codec.methods]
    return list(dict.fromkeys(found))


def find_codes(
    method: str, tensors: Tensors, config: Mapping[str, Any], reader: Reader
) -> Found | None:
    """The coded weights of a checkpoint, None if no codec reads its method.

    Args:
        method: as `loratool.quant.recognize` names it.
        tensors: by name.
        config: ``config.json``.
        reader: of the files; small tensors are read (shapes of what is packed).

    Raises:
        BadFileError: LT-335, codes and what belongs to them do not fit each other.
    """
    codecs = reading(method)
    found = Found()
    for codec in codecs:
        found |= codec.coder.find(tensors, config, reader)
    return found if codecs else None
