"""LongCat-Video's own spelling (longcat_video/modules/lora_utils.py), which its two LoRA are in.

    lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj
        .lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha_scale ()    α/r itself
    …attn___lorahyphen___qkv
        .lora_down.weight (n · r, in)   .lora_up.blocks.0.weight … (out / n, r)

Of a fused projection every part has rows of lora_down of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.dialects.candidate import Candidate
from loratool.dialects.comfyui import LONGCAT
from loratool.dialects.factors import product_spec, refuse_shape
from loratool.dialects.table_read import read_scalars
from loratool.errors import BadFileError, MismatchError
from loratool.lazy import regex
from loratool.options.groups import Read

_START, _DOT = "lora___lorahyphen___", "___lorahyphen___"
_DOWN, _UP, _SCALE, _PART = "lora_down.weight", "lora_up.weight", "alpha_scale", "lora_up.blocks."
_KEY = regex(
    rf"{_START}(?P<module>.+?)\.(?P<leaf>lora_(down|up)\.weight|lora_up\.blocks\.\d+\.weight"
    rf"|{_SCALE})"
)


def read(candidate: Candidate, _: Read) -> Adapter:
    """Read an adapter of LongCat-Video.

    Raises:
        BadFileError: LT-361 … LT-376, damaged or incomplete.
        MismatchError: LT-415, tensors of another kind.
    """
    assert candidate.header is not None
    modules: dict[str, dict[str, TensorRef]] = {}
    for ref in candidate.header.tensors:
        found = _KEY.fullmatch(ref.name)
        if found is None:
            raise MismatchError(
                "LT-415", "LoRA tensors of an unknown kind", file=ref.path, key=ref.name,
                expected=f"{_DOWN}, {_UP}, {_PART}N.weight, {_SCALE}",
            )  # fmt: skip
        name = found["module"].replace(_DOT, ".")
        modules.setdefault(name, {})[found["leaf"]] = ref
    stated = {name: leaves[_SCALE] for name, leaves in modules.items() if _SCALE in leaves}
    scales = read_scalars(stated)
    specs = [s for name, leaves in modules.items()
             for s in _specs(name, leaves, scales.get(name, 1.0))]  # fmt: skip
    return Adapter(
        candidate.path, LONGCAT.name, tuple(specs), metadata=candidate.header.metadata,
        key_order=candidate.keys, carried=tuple(stated.values()),
    )  # fmt: skip


def _specs(name: str, leaves: Mapping[str, TensorRef], scale: float) -> Iterator[DeltaSpec]:
    """The change of a module, or one for every part of it."""
    down, parts = leaves.get(_DOWN), [key for key in leaves if key.startswith(_PART)]
    ups = [leaves.get(f"{_PART}{i}.weight") for i in range(len(parts))] or [leaves.get(_UP)]
    if down is None or None in ups or (parts and _UP in leaves):
        first = next(iter(leaves.values()))
        raise BadFileError(
            "LT-362", "the factors of a module are incomplete", file=first.path, key=first.name,
            expected=f"{_DOWN} with {_UP}, or with {_PART}0.weight and those that follow",
        )  # fmt: skip
    whole = [up for up in ups if up is not None]
    if not parts:
        yield _product(name, down, whole[0], scale)
        return
    from loratool.delta.stacking import rows_of

    ranks = {up.shape[-1] for up in whole if len(up.shape) == 2}
    rank = ranks.pop() if len(ranks) == 1 else 0
    if len(down.shape) != 2 or not rank or down.shape[0] != rank * len(whole):
        refuse_shape(down, f"{len(whole)} times the rank of {_PART}0.weight")
    for i, up in enumerate(whole):
        there = rows_of(down, i * rank, (i + 1) * rank)
        assert isinstance(there, TensorRef)
        yield _product(f"{name}.{i}", there, up, scale)


def _product(name: str, down: TensorRef, up: TensorRef, scale: float) -> DeltaSpec:
    rank = up.shape[-1] if up.shape else 0
    return product_spec(name, {"lora_A": down, "lora_B": up}, scale * rank)
