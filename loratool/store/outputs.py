"""Where an output goes: the one point at which a disk and an object store part."""

from __future__ import annotations

from pathlib import Path

from loratool.store import output_path
from loratool.store.address import Address, place_of
from loratool.store.series import Series
from loratool.store.staging import Making, Output

__all__ = ["check_output", "open_output", "place_of"]


def check_output(path: Path, *, is_folder: bool, force: bool, series: Series | None = None) -> None:
    """Refuse, before any work, an output that would destroy something or could not be written.

    Raises:
        LoratoolError: see `loratool.store.output_path.check_output`, or for an address
            `loratool.store.store_output.check_store`.
    """
    if isinstance(path, Address):
        from loratool.store.store_output import check_store

        check_store(path, is_folder=is_folder, force=force, series=series)
    else:
        output_path.check_output(path, is_folder=is_folder, force=force, series=series)


def open_output(path: Path, making: Making) -> Output:
    """An output under construction.

    Args:
        path: of `place_of`.
        making: what is made.

    Raises:
        LoratoolError: see `loratool.store.writer.StagedOutput`, and
            `loratool.store.store_output.StoreOutput`.
    """
    if isinstance(path, Address):
        from loratool.store.store_output import StoreOutput

        return StoreOutput(path, making)
    from loratool.store.writer import StagedOutput

    return StagedOutput(path, making)
