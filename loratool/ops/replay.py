"""What a finished output says it was made from, found again on this machine."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratool.errors import LoratoolError, MismatchError, UnsafeContentError, UsageError
from loratool.store.checkpoint import Checkpoint
from loratool.store.contained import check_name, is_inside
from loratool.store.header import read_header
from loratool.store.provenance import file_id, read_record
from loratool.store.source import AdapterArgument

_OPERATIONS = ("merge", "subtract", "swap")


@dataclass(frozen=True)
class Replay:
    """An operation to repeat.

    Attributes:
        base: where the base is.
        adapters: where the adapters are, in order, with their coefficients, signs included.
        options: resolved options that changed bytes, by their names in provenance.
    """

    base: str
    adapters: tuple[AdapterArgument, ...]
    options: Mapping[str, Any]


def recorded_options(output: Checkpoint) -> dict[str, Any]:
    """Options that an output was made with; empty if it does not say."""
    record = read_record(output)
    if record is None or record.get("operation") not in _OPERATIONS:
        return {}
    options = record.get("options")
    return dict(options) if isinstance(options, dict) else {}


def find_replay(output: Checkpoint, *, base: str | None, roots: Sequence[Path]) -> Replay:
    """Read an output's provenance and find its inputs, checked by content.

    Args:
        output: the output.
        base: where the base is, None to look for it.
        roots: folders to look in for inputs by their name.

    Raises:
        UsageError: there is no provenance to replay, or an input is not found.
        MismatchError: what lies there is not what was used, or an undo file was.
        UnsafeContentError: the record leads out of these folders.
    """
    record = read_record(output)
    if record is None or record.get("operation") not in _OPERATIONS:
        raise UsageError(
            "LT-253", "this checkpoint does not say what it was made from", file=output.path,
            expected="loratool.json of a merge", hint="name its inputs: --base and --adapter",
        )  # fmt: skip
    try:
        rows = dict(record["inputs"])
        options = dict(record["options"])
        bases = {k: v for k, v in rows.items() if v.get("role") == "base"}
        adapters = {k: v for k, v in rows.items() if k not in bases}
        (base_name, base_row), *_ = bases.items()
        if "undo" in options:
            raise MismatchError(
                "LT-457", "this was made with an undo file, which checked every tensor itself",
                file=output.path, hint="subtract --undo again gives the same bytes",
            )  # fmt: skip
        find = partial(_find, output=output.path, roots=roots)
        found = tuple(
            AdapterArgument(find(k, v["files"], option="--adapter"), *recorded_weight(v))
            for k, v in adapters.items()
        )
        if base is None:
            base = find(base_name, base_row["files"], option="--base")
        return Replay(base, found, options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MismatchError(
            "LT-458", "the provenance of this checkpoint is damaged", file=output.path,
            got=f"{type(error).__name__}: {error}", hint="name its inputs: --base and --adapter",
        ) from error  # fmt: skip


def recorded_weight(row: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """Coefficient and factors per component of an adapter in provenance.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is damaged.
    """
    parts = row.get("components", {})
    return float(row["weight"]), {str(k): float(v) for k, v in parts.items()}


def _find(
    name: str, files: Mapping[str, Any], *, output: Path, roots: Sequence[Path], option: str
) -> str:
    if name.startswith("hf://"):
        return name
    plain = name.partition("#")[0]
    if "/" in plain:
        raise ValueError("an input's name is a path")
    for one in (plain, *files):
        check_name(one, output, "record")
    others = []
    for place in (root / plain for root in roots if (root / plain).exists()):
        _check_place(place, option)
        wrong = _differing(place, files)
        if wrong is None:
            return str(place)
        others.append(f"{place} ({wrong})")
    if others:
        raise MismatchError(
            "LT-459", f"{plain} is not what was used", file=others[0].partition(" (")[0],
            got=others[0].partition(" (")[2].rstrip(")"), hint=f"{option} PATH names another",
        )  # fmt: skip
    raise UsageError(
        "LT-254", f"cannot find {plain}, which this checkpoint was made from",
        expected=f"{plain} in " + " or ".join(str(r) for r in roots), hint=f"{option} PATH",
    )  # fmt: skip


def _check_place(place: Path, option: str) -> None:
    """A record must not lead through a link out of the folder that is searched."""
    if not is_inside(place, place.parent):
        real = os.path.realpath(place)
        raise UnsafeContentError(
            "LT-904", "the record names a link that leads elsewhere, so it is not followed",
            file=place, got=real, hint=f"{option} {shlex.quote(real)}, if that was used",
        )  # fmt: skip


def _differing(place: Path, files: Mapping[str, Any]) -> str | None:
    """The first file whose content is not the recorded one, None if all agree."""
    folder = place if place.is_dir() else place.parent
    for name, want in files.items():
        path = place / name if place.is_dir() else place
        if not path.is_file():
            return f"no {name}"
        try:
            if isinstance(want, str):
                same = file_id(path, folder) == want
            else:
                header = read_header(path, folder=folder)
                head = hashlib.sha256(header.raw).hexdigest()
                same = (head, header.file_size) == (want["header_sha256"], want["bytes"])
                if same and "sha256" in want:
                    same = file_id(path, folder) == want["sha256"]
        except UnsafeContentError:
            raise
        except LoratoolError as error:
            return error.what
        if not same:
            return f"{name} has another content"
    return None
