"""Open the residual that a merge is asked to put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from loratool.engine.grid import CPU_ELEMENTS
from loratool.errors import UsageError
from loratool.ops.access import Access, open_patches
from loratool.ops.inputs import OpenedAdapter
from loratool.ops.residual import Residual, bind_options, check_adapter, read_residual
from loratool.ops.weights import Weight
from loratool.options.groups import Names
from loratool.store.provenance import adapter_id
from loratool.store.source import AdapterArgument


def open_residual(
    path: str | Path,
    adapters: Sequence[str | Path | AdapterArgument],
    names: Names,
    access: Access,
    dtype: str = "auto",
    rounding: str = "nearest",
) -> tuple[Residual, Names]:
    """The residual, and the names' options with what it needs of them.

    Raises:
        UsageError: options that would give something else than the fine-tune.
        BadFileError: no residual.
    """
    if len(adapters) != 1:
        _refuse(", ".join(map(str, adapters)))
    if dtype != "auto" or rounding != "nearest":
        raise UsageError(
            "LT-237", "--residual gives the fine-tune in its own types, correctly rounded",
            hint="leave --dtype and --rounding out",
        )  # fmt: skip
    found = open_patches(path, access, read_residual)
    return found, bind_options(names, found.bind)


def block_elements(residual: Residual | None) -> int | None:
    """The grid that patches lie on, that of the CPU; None = the device's, where there are none."""
    return None if residual is None else CPU_ELEMENTS


def check_partner(residual: Residual, adapter: OpenedAdapter) -> None:
    """Refuse another adapter than the residual's, or another weight than 1.

    Raises:
        UsageError: the weight.
        MismatchError: the adapter.
    """
    if adapter.weight != Weight():
        _refuse(f"weight {adapter.weight}" + (" and others" if adapter.weight.by_name else ""))
    check_adapter(residual, adapter_id(adapter.adapter))


def _refuse(got: str) -> NoReturn:
    raise UsageError(
        "LT-236", "--residual goes with the one adapter it was made for, at weight 1", got=got
    )
