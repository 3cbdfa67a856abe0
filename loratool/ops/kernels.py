"""Kernels of convolutions that files hold flattened, as names of known models tell them."""

from __future__ import annotations

import math

from loratool.adapter import Adapter, DeltaSpec
from loratool.archs.families import places
from loratool.archs.kernels import kernel_of
from loratool.delta.forms import may_be_flattened, reshaped, side_sizes, with_kernel
from loratool.ops.locating import Located, locate

_SURE = ((3, 3),)
_POINT = "conv_shortcut"


def known_kernels(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """(in, kernel…) of products that hold it flattened, () of linear layers, as their family says.

    What is not known is left out.
    """
    if not any(map(may_be_flattened, adapter.specs)):
        return {}
    found = {}
    for one in locate(adapter):
        kernel = _kernel(one)
        if kernel is None or not may_be_flattened(one.spec):
            continue
        columns, rest = divmod(side_sizes(one.spec)[1][0], math.prod(kernel))
        if not rest:
            found[one.spec.name] = (columns, *kernel) if kernel else ()
    return found


def shaped(one: Located) -> DeltaSpec:
    """Plain factors of a convolution in the dimensions of its kernel; no byte moves.

    Some programs ask for them.  Only where a name means a convolution in every model.
    """
    spec = one.spec
    is_plain = spec.is_pair and spec.blocks is None and spec.layout in ("linear", "conv")
    kernel = _kernel(one) if is_plain and spec.parameter == "weight" else None
    if kernel not in _SURE and not (kernel and one.module.endswith(_POINT)):
        return spec
    out, inner = side_sizes(spec)
    if len(inner) > 1:
        return reshaped(spec, 2 + len(kernel))
    columns, rest = divmod(inner[0], math.prod(kernel))
    return spec if rest else with_kernel(spec, (out, columns, *kernel))


def _kernel(one: Located) -> tuple[int, ...] | None:
    """What all families say that have such a name; None if they differ."""
    known = [one.place] if one.place else places(one.component, one.module)
    kernels = {kernel_of(place) for place in known}
    return kernels.pop() if len(kernels) == 1 else None
