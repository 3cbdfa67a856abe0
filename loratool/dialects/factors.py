"""Do the tensors of one change fit together?  For every dialect alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from loratool import kinds
from loratool.adapter import DeltaSpec, Source, TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError, UsageError
from loratool.frozen import replace
from loratool.kind import Kind
from loratool.kind_shapes import COLUMN_LENGTHS, ROW_LENGTHS, lengths_role

OPEN_LENGTHS = "lengths"
"""Role of DoRA's lengths in a dialect that has them of rows and of columns: the shape tells."""
LENGTHS = (ROW_LENGTHS, COLUMN_LENGTHS)
MAX_RANK = 8192  # of one module or expert; no method that is known goes so far
# Stored factors are widened before use; narrower types than these have no agreed meaning alone.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def product_spec(
    module: str,
    fields: Mapping[str, TensorRef],
    alpha: float | None,
    flags: Mapping[str, float] | None = None,
) -> DeltaSpec:
    """The change that the factors of a module make.

    Scaling is alpha/r; 1 without an alpha, and where matrices stored whole leave no rank.  Lengths
    of DoRA are of rows or of columns by their shape (`OPEN_LENGTHS`).

    Args:
        module: its path.
        fields: role -> tensor.
        alpha: as the file says.
        flags: name of a tensor that is one number -> the number.

    Raises:
        BadFileError: LT-348, LT-362 … LT-366, the factors make none.
    """
    first = next(iter(fields.values()))
    fields = _with_axis(module, fields)
    kind = kinds.of_roles(fields)
    if kind is None:
        near = [k for k in kinds.every() if k.is_additive and set(fields) & set(k.known_roles)]
        ways = ["+".join(k.roles) for k in near] or ["factors beside them"]
        raise BadFileError(
            "LT-362", "the factors of a module are incomplete", file=first.file, key=module,
            expected=" or ".join(ways), got=", ".join(sorted(fields)),
        )  # fmt: skip
    for role, ref in fields.items():
        if role not in kind.flags:
            check_float(ref)
        if 0 in ref.shape:
            refuse_shard(ref)
    fields = _in_order(kind, module, fields)
    settings = {kind.flags[r]: _flag(ref, flags or {}) for r, ref in fields.items()
                if r in kind.flags}  # fmt: skip
    if {"lora_A", "lora_B"} <= fields.keys():
        check_product(fields)
    rank = _rank(kind, fields)
    is_conv = any(len(r.shape) > 2 for role, r in fields.items() if role not in LENGTHS)
    spec = DeltaSpec(
        kind.name, module, "weight", fields, "conv" if is_conv else "linear", rank, alpha,
        alpha / rank if alpha is not None and rank and kind.alpha_scales else 1.0,
        settings=settings,
    )  # fmt: skip
    if not kind.fits(spec):
        raise BadFileError(
            "LT-363", "the factors of a module do not fit each other", file=first.path, key=module,
            got=", ".join(f"{role} {list(ref.shape)}" for role, ref in fields.items()),
        )  # fmt: skip
    return spec


def beyond_pairs(spec: DeltaSpec) -> dict[str, bool]:
    """What a file of lora_A and lora_B of whole matrices has no place for -> a change has it."""
    return {
        f"{spec.base_change} changes the base": bool(spec.base_change),
        "a convolution": spec.layout == "conv",
        "experts in one tensor": spec.layout == "experts",
        "a parameter of its own": spec.parameter != "weight",
        "factors in blocks": spec.blocks is not None,
        "numbers between the factors": bool(spec.fields.keys() & {"diag", "lora_mid"}),
    }


def _with_axis(module: str, fields: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """The tensors, with the role that the shape of DoRA's lengths gives them."""
    lengths = fields.get(OPEN_LENGTHS)
    if lengths is None:
        return fields
    rest = {role: ref for role, ref in fields.items() if role != OPEN_LENGTHS}
    kind = kinds.of_roles(rest)
    if kind is None:
        return fields
    is_conv = any(len(ref.shape) > 2 for ref in rest.values())
    inside = DeltaSpec(kind.name, module, "weight", rest, "conv" if is_conv else "linear", 1, None,
                       1.0)  # fmt: skip
    if any(len(ref.shape) < 2 for ref in rest.values()) or not kind.fits(inside):
        return {**rest, ROW_LENGTHS: lengths}  # said of the factors
    role = lengths_role(lengths.shape, kind.sizes(inside))
    if not role:
        out, inner = kind.sizes(inside)
        refuse_shape(lengths, f"{out} lengths of rows (out, 1…), or {inner[0]} of columns (1, in…)")
    return {**rest, role: lengths}


def _in_order(kind: Kind, module: str, fields: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """The tensors under the roles that they have today, where an older file exchanged some."""
    if not kind.exchanged:
        return fields
    other = dict(kind.exchanged) | {b: a for a, b in kind.exchanged}
    turned = {other.get(role, role): ref for role, ref in fields.items()}
    fits = [kind.fits(DeltaSpec(kind.name, module, "weight", one, "linear", 1, None, 1.0))
            for one in (fields, turned)]  # fmt: skip
    return turned if fits == [False, True] else fields


def _flag(ref: TensorRef, flags: Mapping[str, float]) -> float:
    value = flags.get(ref.name)
    if value not in (0, 1):
        raise BadFileError("LT-376", "not 0 or 1", file=ref.file, key=ref.name,
                           expected="0 or 1", got=value)  # fmt: skip
    return value


def _rank(kind: Kind, fields: Mapping[str, TensorRef]) -> int:
    """The rank that the tensors have, 0 for those without one."""
    place = kind.rank_in(fields)
    if place is None:
        return 0
    role, axis = place
    if len(fields[role].shape) <= axis:
        refuse_shard(fields[role])
    rank = fields[role].shape[axis]
    check_rank(rank, fields[role])
    return rank


def with_axes(spec: DeltaSpec, role: str, is_open: bool) -> Source:
    """A tensor of a change as dialects store it: lengths get their shape, the rest stays.

    Args:
        spec: the change.
        role: of the tensor.
        is_open: with `OPEN_LENGTHS`, rows (out, 1…) and columns (1, in, 1…); else as PEFT has them,
            (out,), and (1, out, 1…) of a convolution.
    """
    source = spec.fields[role]
    if role not in LENGTHS:
        return source
    dims = 1 + len(spec.row.sizes(spec)[1])
    axis = LENGTHS.index(role) if is_open else 1
    if not is_open and dims < 3:
        return replace(source, shape=(source.numel,))
    if is_open and len(source.shape) > 1 and source.shape[axis] == source.numel:
        return source
    shape = [1] * dims
    shape[axis] = source.numel
    return replace(source, shape=tuple(shape))


def check_float(ref: TensorRef) -> None:
    """Refuse what is no number format for factors.

    Raises:
        BadFileError: LT-365.
    """
    if ref.dtype not in _FLOATS:
        raise BadFileError(
            "LT-365", "a factor must be of a float type", file=ref.file, key=ref.name,
            expected=", ".join(_FLOATS), got=f"{ref.dtype} ({DTYPES[ref.dtype].word or 'packed'})",
        )  # fmt: skip


def check_rank(rank: int, ref: TensorRef) -> None:
    """Refuse a rank that no method goes to.

    Raises:
        BadFileError: LT-348.
    """
    if rank > MAX_RANK:
        raise BadFileError(
            "LT-348", "the rank is too large", file=ref.file, key=ref.name,
            expected=f"at most {MAX_RANK}", got=f"{rank} from the shape {list(ref.shape)}",
        )  # fmt: skip


def check_product(fields: Mapping[str, TensorRef]) -> None:
    """lora_A (r, in, k…) and lora_B (out, r, 1…), perhaps with a core (r, r, k…) between them.

    Raises:
        BadFileError: LT-363 different ranks, LT-364 empty, LT-366 wrong dimensions.
    """
    lora_A, lora_B, core = fields["lora_A"], fields["lora_B"], fields.get("lora_mid")
    for ref in (r for role, r in fields.items() if role not in LENGTHS):
        if len(ref.shape) < 2 or 0 in ref.shape:
            refuse_shard(ref)
        if len(ref.shape) > 5:
            refuse_shape(ref, "5 dimensions at most")
    for ref in (lora_B, lora_A) if core is not None else (lora_B,):
        if any(size != 1 for size in ref.shape[2:]):
            refuse_shape(ref, "(out, r, 1…) for a convolution")
    diag = fields.get("diag")
    if diag is not None and diag.numel != lora_A.shape[0]:
        refuse_shape(diag, f"{lora_A.shape[0]} numbers, one for each rank")
    inner = (lora_A.shape[0],) * 2 if core is None else (core.shape[1], core.shape[0])
    if inner != (lora_A.shape[0], lora_B.shape[1]):
        raise BadFileError(
            "LT-363", "lora_A and lora_B have different ranks", file=lora_A.file, key=lora_A.name,
            expected="(r, in) and (out, r)", got=f"{list(lora_A.shape)} and {list(lora_B.shape)}",
        )  # fmt: skip


def refuse_alpha(path: Path, title: str, beside: str, value: str = "VALUE") -> NoReturn:
    """Refuse a file of a program that keeps the alpha in another one, which is not there.

    Args:
        path: the file.
        title: of the program.
        beside: where it keeps its alpha.
        value: what ``--alpha`` takes.

    Raises:
        UsageError: LT-280.
    """
    raise UsageError(
        "LT-280", f"nothing says the alpha of this {title} file", file=path,
        expected=f"{beside} beside it", hint=f"--alpha {value}",
    )  # fmt: skip


def refuse_shard(ref: TensorRef) -> NoReturn:
    """Refuse a tensor that one process of many saved as its part, or as nothing.

    Raises:
        BadFileError: LT-364.
    """
    raise BadFileError(
        "LT-364", "an empty or flattened tensor: the adapter was saved from one shard of DeepSpeed "
        "ZeRO-3 or FSDP without gathering it", file=ref.file, key=ref.name,
        expected="a whole tensor", got=f"shape {list(ref.shape)}",
        hint="gather the parameters and save again (GatheredParameters, summon_full_params)",
    )  # fmt: skip


def refuse_shape(ref: TensorRef, expected: str) -> NoReturn:
    """Refuse a tensor of another shape than its role has.

    Raises:
        BadFileError: LT-366.
    """
    raise BadFileError(
        "LT-366", "tensor has the wrong shape for its role", file=ref.file, key=ref.name,
        expected=expected, got=list(ref.shape),
    )  # fmt: skip
