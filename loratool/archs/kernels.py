"""Kernels of convolutions by their names: files of LoHa and LoKr hold them flattened."""

from __future__ import annotations

from loratool.archs.family_files import families
from loratool.archs.places import Place
from loratool.lazy import regex

_SQUARE, _POINT = ("conv1", "conv2", "conv", "conv_in", "conv_out"), ("conv_shortcut",)
_PROJECTION = ("proj_in", "proj_out")
_OPEN = regex(r"patch|conv|(x|img|pos|audio)_?(embed|in)")
"""What may be a convolution: what cuts an image into patches, and Sana's feed-forward."""


def kernel_of(place: Place) -> tuple[int, ...] | None:
    """Kernel of a module, () of a linear layer, None where its name does not tell.

    Example:
        >>> from loratool.archs.places import places
        >>> kernel_of(places("unet", "down_blocks.0.resnets.0.conv1", family="sd1")[0])
        (3, 3)
    """
    name = place.diffusers[0]
    leaf = name.rpartition(".")[2]
    if families()[place.family].part != "unet":
        return None if _OPEN.search(name) else ()
    if leaf in _SQUARE:
        return (3, 3)
    is_point = leaf in _POINT or (leaf in _PROJECTION and place.family == "sd1")
    return (1, 1) if is_point else ()
