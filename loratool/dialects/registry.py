"""All dialects.  To add one: its module with a row, a line here, a test with a real file."""

from __future__ import annotations

from pathlib import Path

from loratool import plugins
from loratool.dialects import (
    adapterhub,
    by_sight,
    comfyui,
    diffusers,
    flux,
    gguf,
    kohya,
    litgpt,
    lycoris,
    mlx,
    onetrainer,
    peft,
    torchtune,
)
from loratool.dialects import candidate as candidates
from loratool.dialects.base import Dialect
from loratool.dialects.candidate import Candidate
from loratool.errors import MismatchError, UsageError
from loratool.store.header import MAX_HEADER_BYTES

DEFAULT = peft.FOLDER_NAME
"""What an adapter is written in that was read from no file."""
DIALECTS: tuple[Dialect, ...] = (
    *peft.ROWS, kohya.ROW, lycoris.ROW, diffusers.ROW, comfyui.ROW, flux.BFL, flux.XLABS,
    onetrainer.ROW, mlx.ROW, gguf.ROW, torchtune.ROW, litgpt.ROW, adapterhub.ROW,
    comfyui.LONGCAT, *by_sight.ROWS,
)  # fmt: skip
BY_NAME: dict[str, Dialect] = {row.name: row for row in DIALECTS}


def others() -> dict[str, Dialect]:
    """Rows of other packages, by name (entry points ``loratool.dialects``)."""
    return plugins.load("loratool.dialects", Dialect, BY_NAME)


def examine(path: Path, *, max_header: int = MAX_HEADER_BYTES) -> Candidate:
    """Look at a path: a folder with an adapter in it, or one file; see `candidate.examine`."""
    return candidates.examine(path, _said("weights"), max_header=max_header)


def beside() -> tuple[str, ...]:
    """Files beside a lone tensor file that say something of it, for any dialect."""
    return (candidates.CONFIG_NAME, *_said("beside"))


def _said(field: str) -> tuple[str, ...]:
    return tuple(name for row in DIALECTS for name in getattr(row, field))


def claims(candidate: Candidate) -> list[Dialect]:
    """The dialects that claim what lies at a path: one, if it is any.

    Other packages are asked where none here claims it, and rows that are last where nobody does.
    """
    found = [row for row in DIALECTS if not row.is_last and row.detect(candidate)]
    found = found or [row for row in others().values() if row.detect(candidate)]
    return found or [row for row in DIALECTS if row.is_last and row.detect(candidate)]


def detect(candidate: Candidate) -> Dialect:
    """The dialect of what lies at a path.

    Raises:
        MismatchError: LT-400, no dialect claims it; LT-417, several do.
    """
    found = claims(candidate)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(candidate.keys[:3])
    if found:
        raise MismatchError(
            "LT-417", "the tensors are of several dialects", file=candidate.path,
            got=" and ".join(row.title for row in found), expected="one",
        )  # fmt: skip
    raise MismatchError(
        "LT-400", "not an adapter that loratool knows", file=candidate.path,
        expected=", ".join(row.title for row in DIALECTS if row.is_read),
        got=f"tensors such as {shown}" if shown else "no tensors",
        hint="if it is a model, --base names it" if shown else None,
    )  # fmt: skip


def row_of(name: str) -> Dialect:
    """The row of a dialect's name.

    Raises:
        UsageError: LT-282, no such dialect.
    """
    row = BY_NAME.get(name) or others().get(name)
    if row is None:
        raise _not_written(name)
    return row


def writable(name: str) -> Dialect:
    """The row of a dialect that adapters are written in.

    Raises:
        UsageError: LT-282, it cannot be written, or there is none.
    """
    row = row_of(name)
    if not row.is_written:
        raise _not_written(name)
    return row


def home_of(dialect: str) -> Dialect:
    """The row by which an adapter of a dialect is written where nobody asks for another one.

    Raises:
        UsageError: LT-282, it cannot be written.
    """
    return writable(row_of(dialect).written_as or dialect)


def _not_written(name: str) -> UsageError:
    return UsageError(
        "LT-282", "cannot write this dialect", got=name, expected=", ".join(written())
    )


def written() -> list[str]:
    """Names of the dialects that can be written."""
    return [row.name for row in (*DIALECTS, *others().values()) if row.is_written]
