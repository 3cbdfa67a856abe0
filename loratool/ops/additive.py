"""What adapters must be so that their ΔW may be added, scaled and compared without a base."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.dtypes import widest
from loratool.errors import MismatchError, list_some

_MHA_PARAMETER = "in_proj_weight"


_EXTRACT = (
    "merge it into its base and extract it again: loratool merge ADAPTER --base BASE -o TUNED, "
    "then loratool extract TUNED --base BASE --rank R -o PLAIN"
)


def require_additive(adapter: Adapter, verb: str, *, hint: str = _EXTRACT) -> None:
    """Refuse changes that depend on the base.

    Args:
        adapter: opened.
        verb: past participle for the message, such as ``subtracted``.
        hint: the way out.

    Raises:
        MismatchError: LT-460, DoRA, PiSSA and their kin.
    """
    other = [f"{s.name} ({_kind(s)})" for s in adapter.specs if not s.is_additive]
    if other:
        raise MismatchError(
            "LT-460", f"a change that depends on the base weights cannot be {verb} without them",
            file=adapter.path, key=list_some(other, 3), hint=hint,
        )  # fmt: skip


def require_factors(adapter: Adapter, verb: str) -> None:
    """Refuse factors that are no matrices: convolutions in groups.

    Raises:
        MismatchError: LT-461.
    """
    grouped = [s.name for s in adapter.specs if is_grouped(s)]
    if grouped:
        raise MismatchError(
            "LT-461", f"factors of a grouped convolution cannot be {verb}", file=adapter.path,
            key=list_some(grouped),
        )  # fmt: skip


def is_grouped(spec: DeltaSpec) -> bool:
    """True for a convolution whose lora_B has fewer input channels than lora_A has outputs."""
    return spec.layout == "conv" and spec.fields["lora_B"].shape[1] != spec.rank


def matrix_shape(spec: DeltaSpec) -> tuple[int, int]:
    """(out, in) of lora_B @ lora_A, of one expert; kernels are flattened into ``in``."""
    lora_A, lora_B = spec.fields["lora_A"].shape, spec.fields["lora_B"].shape
    inner, out = 1, lora_B[0]
    for size in lora_A[1:]:
        inner *= size
    if spec.blocks is not None:  # stored as blocks, one above the other
        count, side = spec.blocks
        if side == "A":
            inner *= count
    return out, inner


def mha_outputs(specs: Sequence[DeltaSpec]) -> frozenset[str]:
    """Names of the out_proj weights of nn.MultiheadAttention modules.

    PEFT up to 0.21.2 adds their delta twice, which the spec's scaling holds.
    """
    mhas = {s.module for s in specs if s.parameter == _MHA_PARAMETER}
    return frozenset(
        s.name
        for s in specs
        if s.module.endswith(".out_proj") and s.module.removesuffix(".out_proj") in mhas
    )


def factor_dtype(adapters: Sequence[Adapter]) -> str:
    """The storage type of all factors together: theirs, the widest if they are mixed."""
    return widest([f.dtype for a in adapters for s in a.specs for f in s.fields.values()])


def _kind(spec: DeltaSpec) -> str:
    return spec.base_change or {"dora": "DoRA"}.get(spec.kind, spec.kind)
