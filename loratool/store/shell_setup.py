"""Completion set up for a shell: a script of our own, and a marked block that loads it.

What else a start-up file holds stays as it is, byte for byte; so do its mode, and a link to it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from loratool.errors import OutputError
from loratool.frozen import Frozen
from loratool.store.disk import refusals_as, sync_folder, write_synced

_BEGIN, _END = b"# >>> loratool completion >>>\n", b"# <<< loratool completion <<<\n"
_LOADS = {
    "bash": "[ -f {script} ] && . {script}\n",
    "zsh": "(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}\n"
    "[ -f {script} ] && . {script}\n",
}
"""Shell -> lines that load a script; a shell without looks into a folder of its own."""


class Change(Frozen):
    """A file that set-up makes, changes or takes away.

    Attributes:
        path: the file.
        before: its bytes, None if there is none.
        after: its bytes, None if it goes.
    """

    path: Path
    before: bytes | None
    after: bytes | None

    @property
    def verb(self) -> str:
        """What happens to it, in a word or two."""
        if self.before == self.after:
            return "up to date" if self.after is not None else "not there"
        if self.after is None:
            return "removes"
        return "writes" if self.before is None else "changes"


def plan_setup(shell: str, script: str, environment: Mapping[str, str]) -> list[Change]:
    """What sets completion up.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
        script: that completes.
        environment: says where the shell's files are.

    Raises:
        OutputError: LT-507, a block in the start-up file has no end.
        DiskError: it cannot be read.
    """
    place, start = _places(shell, environment)
    changes = [Change(place, _read(place), script.encode())]
    if start is not None:
        import shlex

        text = _LOADS[shell].format(script=shlex.quote(str(place))).encode()
        before = _read(start)
        changes.append(Change(start, before, _with_block(start, before or b"", text)))
    return changes


def plan_removal(shell: str, environment: Mapping[str, str]) -> list[Change]:
    """What takes completion away again; raises as `plan_setup`."""
    place, start = _places(shell, environment)
    changes = [Change(place, _read(place), None)]
    if start is not None and (before := _read(start)) is not None:
        changes.append(Change(start, before, _with_block(start, before, b"")))
    return changes


def carry_out(changes: list[Change]) -> None:
    """Make the changes, each file whole or not at all.

    Raises:
        DiskError: the system refuses.
    """
    for change in changes:
        if change.before == change.after:
            continue
        with refusals_as("cannot set up completion", change.path):
            if change.after is None:
                change.path.unlink(missing_ok=True)
            else:
                _replace(Path(os.path.realpath(change.path)), change.after)


def _places(shell: str, environment: Mapping[str, str]) -> tuple[Path, Path | None]:
    """The script's place, and the start-up file that has to load it."""
    home = Path(environment.get("HOME") or Path.home())

    def folder(name: str, default: str) -> Path:
        return Path(environment.get(name) or home / default)

    if shell == "fish":
        return folder("XDG_CONFIG_HOME", ".config") / "fish/completions/loratool.fish", None
    script = folder("XDG_DATA_HOME", ".local/share") / "loratool" / f"completion.{shell}"
    if shell == "zsh":
        return script, folder("ZDOTDIR", "") / ".zshrc"
    # A terminal of macOS starts login shells, which do not read .bashrc.
    return script, home / (".bash_profile" if sys.platform == "darwin" else ".bashrc")


def _read(path: Path) -> bytes | None:
    with refusals_as("cannot read", path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _with_block(path: Path, text: bytes, block: bytes) -> bytes:
    """A start-up file with the block at its place, or at the end; "" takes it out."""
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if begin and not end:
        raise OutputError(
            "LT-507", "the block of loratool's completion has no end", file=path,
            expected=_END.decode().strip(), hint="take the block out of the file, then again",
        )  # fmt: skip
    if not block:
        return head + tail
    if not begin and head and not head.endswith(b"\n"):
        head += b"\n"
    return head + _BEGIN + block + _END + tail


def _replace(path: Path, data: bytes) -> None:
    import secrets

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".loratool-{secrets.token_hex(8)}.tmp")
    try:
        write_synced(temporary, data)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
