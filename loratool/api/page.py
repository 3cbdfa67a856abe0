"""The page of a report: ``--html``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from loratool.errors import OutputError
from loratool.report.base import Report

R = TypeVar("R", bound=Report)


def check_page(file: str | Path | None, *outputs: str | Path | None) -> None:
    """Refuse a page that cannot be written, before the work.

    Args:
        file: of the page, None if there is to be none.
        outputs: what else the command writes.

    Raises:
        OutputError: LT-508, a name that is taken, or within another output.
        DiskError: LT-602, no folder.
    """
    if file is None:
        return
    from loratool.store.new_file import check_new_files

    check_new_files([Path(file)])
    place = Path(os.path.realpath(file))
    for other in (Path(os.path.realpath(o)) for o in outputs if o is not None):
        if other in (place, *place.parents):
            raise OutputError("LT-508", "two outputs at one place", file=file, got=str(other),
                              hint="choose another name for the page")  # fmt: skip


def with_page(report: R, file: str | Path | None) -> R:
    """The report, its page written into a new file if there is to be one, whole or not at all.

    Raises:
        OutputError: LT-508, something took the name meanwhile.
        DiskError: the system refuses.
    """
    if file is not None:
        from loratool.pages.page import page_of
        from loratool.store.new_file import write_new_file

        write_new_file(Path(file), page_of(report))
    return report
