"""``--dtype`` of a command that copies: the factors of an adapter in another storage type."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, Source, TensorData
from loratool.api.common import Limits
from loratool.dialects.base import Dialect
from loratool.dtypes import DTYPES
from loratool.frozen import Frozen, replace
from loratool.ops.adapter_summary import dtype_word
from loratool.report.base import root_share


class Cast(Frozen):
    """An adapter whose factors are in a type.

    Attributes:
        adapter: with them.
        dtype: safetensors name of it: float32 where float16 cannot hold a value.
        relative_error: of ΔW, of what rounding lost.
    """

    adapter: Adapter
    dtype: str
    relative_error: float = 0.0


def is_in(adapter: Adapter, dtype: str) -> bool:
    """True if all factors are stored in a type."""
    return all(f.dtype == dtype for f in _floats(adapter.specs))


def cast(adapter: Adapter, dtype: str, limits: Limits) -> Cast:
    """The factors in a type, each rounded once.

    Args:
        adapter: whose factors are in files or in memory.
        dtype: safetensors name.
        limits: of memory and threads.

    Raises:
        NumericError: NaN or infinity.
    """
    from loratool.engine.storing import store_in

    needs = [40 * sum(f.numel for f in spec.fields.values()) for spec in adapter.specs]
    threads = limits.plan(needs, kept=sum(needs) // 10).threads
    found = store_in(adapter.specs, dtype, threads)
    if any(one.overflow for one in found):
        dtype, found = "F32", store_in(adapter.specs, "F32", threads)
    error = root_share(sum(one.error_square for one in found), sum(one.square for one in found))
    return Cast(replace(adapter, specs=tuple(one.spec for one in found)), dtype, error)


def blank_cast(adapter: Adapter, dtype: str) -> Cast:
    """The same before any work, of factors without content."""

    def blank(source: Source) -> Source:
        is_other = DTYPES[source.dtype].is_float and source.dtype != dtype
        return TensorData(source.name, dtype, source.shape, b"") if is_other else source

    specs = (replace(s, fields={role: blank(f) for role, f in s.fields.items()})
             for s in adapter.specs)  # fmt: skip
    return Cast(replace(adapter, specs=tuple(specs)), dtype)


def files_in(
    adapter: Adapter, row: Dialect, write: Callable[[Adapter], AdapterFiles],
    turn: Callable[[Adapter], Cast],
) -> tuple[AdapterFiles, Cast]:  # fmt: skip
    """The files of an adapter with its factors in another type.

    Where the dialect writes the very factors, they are exchanged in its files, and all that these
    say stays; else scalings go into factors first, so that each is rounded once.

    Args:
        adapter: to be written.
        row: the dialect.
        write: makes its files.
        turn: `cast` or `blank_cast`.
    """
    files = write(adapter)
    made = turn(adapter)
    new = {id(old): now for old, now in zip(_all(adapter.specs), _all(made.adapter.specs),
                                            strict=True) if old is not now}  # fmt: skip
    if new.keys() <= {id(source) for _, source in files.tensors}:
        tensors = tuple((key, new.get(id(source), source)) for key, source in files.tensors)
        return replace(files, tensors=tensors), made
    made = turn(row.folded(adapter))
    return write(made.adapter), made


def said(found: Cast, asked: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(notes, warnings) of what the factors are stored in."""
    if found.dtype != asked:
        return (), (f"{dtype_word(asked)} cannot hold the factors: written as float32",)
    return (f"the factors are stored as {dtype_word(found.dtype)}",), ()


def _all(specs: Iterable[DeltaSpec]) -> list[Source]:
    return [source for spec in specs for source in spec.fields.values()]


def _floats(specs: Iterable[DeltaSpec]) -> list[Source]:
    return [source for source in _all(specs) if DTYPES[source.dtype].is_float]
