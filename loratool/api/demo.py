"""`demo`: a tiny built-in model to try the commands on, offline."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loratool.errors import AlreadyMadeError
from loratool.report.base import Report
from loratool.store.staging import Making

if TYPE_CHECKING:
    from loratool.store.series import Series


class DemoReport(Report):
    """Result of `demo`.

    Attributes:
        folder: holds ``base/``, ``style/``, ``sql/`` and ``tuned/``.
        commands: command lines to try there, in order, without the leading ``loratool``.
    """

    command: ClassVar[str] = "demo"
    folder: str
    commands: tuple[tuple[str, ...], ...]


def demo(folder: str | Path, *, series: Series | None = None) -> DemoReport:
    """Write a tiny model, two adapters and a fine-tune, and say what to try on them.

    Args:
        folder: created; must not exist or be empty.
        series: of `loratool.store.series`: outputs that it is one of, for a rerun.

    Raises:
        OutputError: the folder holds something.
    """
    from loratool.delta.toy import toy_files
    from loratool.store.writer import MARKER, StagedOutput, check_output

    path = Path(folder)
    check_output(path, is_folder=True, force=False, series=series)
    files = dict(toy_files())
    with (
        suppress(AlreadyMadeError),
        StagedOutput(
            path, Making(is_folder=True, plan_id="demo", names=[*files, MARKER], series=series)
        ) as output,
    ):
        for name, data in files.items():
            output.write_file(name, data)
        output.commit({})

    def at(name: str) -> str:
        return str(path / name)

    both = (f"{at('style')}:0.8", at("sql"))
    return DemoReport(
        str(path),
        (
            ("inspect", at("style")),
            ("merge", *both, "--base", at("base"), "-o", at("merged"), "--save-undo",
             at("undo.safetensors")),
            ("verify", at("merged")),
            ("subtract", *both, "--from", at("merged"), "--undo", at("undo.safetensors"), "-o",
             at("restored")),
            ("extract", at("tuned"), "--base", at("base"), "--rank", "8", "-o", at("lora")),
            ("inspect", at("lora")),
        ),
    )  # fmt: skip
