"""Where the results of one or many adapters go: ``-o OUT`` or ``-o DIR/``."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loratool.dialects.registry import home_of
from loratool.dialects.rules import is_folder
from loratool.errors import UsageError, list_some
from loratool.store.output_path import check_place
from loratool.store.outputs import place_of
from loratool.store.series import Series, series
from loratool.store.source import Resolved

FILES = (".safetensors", ".gguf", ".bin", ".pt", ".json")
"""Suffixes that no folder has."""


def output_place(output: str | Path, dialect: str) -> Path:
    """What ``-o`` names for an adapter of a dialect: a folder, or a file with its suffix.

    Raises:
        UsageError: LT-227, it looks like something else; LT-282, a dialect that is not written.
    """
    target, row = place_of(output), home_of(dialect)
    suffix = target.suffix.lower()
    if row.is_folder and suffix in FILES:  # style-v1.5 is a fine name for a folder
        raise UsageError(
            "LT-227", f"a {row.title} adapter is a folder", expected="a folder for -o",
            got=str(output), hint=f"-o {shlex.quote(str(target.with_suffix('')))}",
        )  # fmt: skip
    if not row.is_folder and suffix not in row.suffixes:
        raise UsageError(
            "LT-227", f"a {row.title} adapter is a file",
            expected=f"a name that ends in {' or '.join(row.suffixes)} for -o", got=str(output),
            hint=f"-o {shlex.quote(str(output).rstrip('/') + row.suffixes[0])}",
        )  # fmt: skip
    return target


def place_outputs(names: Sequence[str], output: str | Path, dialects: Sequence[str]) -> list[Path]:
    """One place per input: OUT itself for one, DIR/NAME for many or where OUT ends in a slash.

    Args:
        names: last part of each input's path.
        output: as typed.
        dialects: of the results.

    Raises:
        UsageError: LT-227; LT-247, two inputs have one name; LT-282, a dialect that is not written.

    Example:
        >>> [p.as_posix() for p in place_outputs(["a", "b"], "small/", ["peft", "kohya"])]
        ['small/a', 'small/b.safetensors']
    """
    if len(names) == 1 and not is_batch(output):
        return [output_place(output, dialects[0])]
    target = Path(output)
    if target.suffix.lower() in FILES:
        raise UsageError("LT-227", "several adapters go into a folder",
                         expected="a folder for -o", got=str(output))  # fmt: skip
    ends = ["" if is_folder(d) else home_of(d).suffixes[0] for d in dialects]
    found = Counter(name.casefold() for name in names)  # many disks tell no a from A
    twice = [name for name in dict.fromkeys(names) if found[name.casefold()] > 1]
    if twice:
        raise UsageError(
            "LT-247", "two adapters have the same name", key=list_some(twice),
            hint="take them one by one",
        )  # fmt: skip
    return [target / (name + end) for name, end in zip(names, ends, strict=True)]


@contextmanager
def many_outputs(output: str | Path, count: int, within: Series | None) -> Iterator[Series | None]:
    """The block that makes the outputs of ``count`` inputs; a killed one goes on.

    Args:
        output: as typed.
        count: of inputs.
        within: that they are part of.

    Yields:
        What they are part of; None for a single output of its own.
    """
    if count == 1 and not is_batch(output):
        yield within
        return
    folder = Path(output)
    check_place(folder)
    with series(folder / ".loratool-series", within) as found:
        yield found


def is_batch(output: str | Path) -> bool:
    """True if what was typed ends in a slash: a folder to put results into."""
    return str(output).endswith(("/", os.sep))


def name_of(found: Resolved) -> str:
    """The name that a result keeps: the last part of the path, a file's without its suffix.

    A Hub snapshot lies in a folder named by its commit: its label tells the repository.
    """
    if found.commit:
        repo, _, place = found.label.partition("@")
        inside = place.partition("/")[2]
        return (inside or repo).rpartition("/")[2].removesuffix(".safetensors")
    return found.path.resolve().name.removesuffix(".safetensors")
