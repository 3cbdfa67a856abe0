"""What a finished output says it was made from, found again on this machine."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

import msgspec

from loratool.errors import (
    BadFileError,
    LoratoolError,
    MismatchError,
    UnsafeContentError,
    UsageError,
)
from loratool.frozen import Frozen, field
from loratool.options.groups import Names
from loratool.options.words import Option, options_of
from loratool.shapes import Refuse, checked
from loratool.store.address import Address
from loratool.store.checkpoint import Checkpoint
from loratool.store.contained import check_name, is_inside
from loratool.store.header import read_header
from loratool.store.provenance import file_id, read_record
from loratool.store.source import MAX_WEIGHT, AdapterArgument, Resolved

_OPERATIONS = ("merge", "split", "subtract", "swap")
ORIGINAL = "original"
"""Role of what adapters in merged weights were trained on."""
_Weight = Annotated[float, msgspec.Meta(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
_Rule = Annotated[list[str | _Weight], msgspec.Meta(min_length=2)]


class RecordedFile(Frozen):
    """A shard of a checkpoint, by its header and size, or by its content too."""

    header_sha256: str
    bytes: int
    sha256: str | None = None


class RecordedInput(Frozen):
    """An input; the base has a role, an adapter its weight.

    Attributes:
        files: name -> sha256 of a whole file, or what tells a shard apart.
        role: ``base``, ``residual``, ``original``, or "".
        weight: of the whole adapter.
        components: component -> factor.
        blocks: factors per block.
    """

    files: dict[str, str | RecordedFile]
    role: str = ""
    weight: _Weight | None = None
    components: dict[str, _Weight] = field(default_factory=dict)
    blocks: str = ""


class RecordedSums(TypedDict, total=False):
    """How a merge formed and rounded its sums, by the names in provenance."""

    rounding: Literal["nearest", "exact", "stochastic"]
    seed: int
    method: str
    params: dict[str, float | int | str]
    module_weights: list[_Rule]
    scaled: tuple[str, ...]
    dequantize: bool
    requant: bool
    simulate_quant: Literal["nf4", "int8", "fp8"]
    undo: str


class Record(Frozen):
    """The provenance of merged weights, as far as it can be replayed.

    Attributes:
        operation: command.
        inputs: by name.
        options: of the sums.
        names: how names and missing facts were understood.
    """

    operation: str
    inputs: dict[str, RecordedInput]
    options: RecordedSums
    names: Names = field(default_factory=Names)


class _Shape(Frozen):
    operation: str
    inputs: dict[str, RecordedInput]
    options: RecordedSums


class Replay(Frozen):
    """Inputs of an operation, found.

    Attributes:
        base: where the base is.
        adapters: where the adapters are, in order, with their coefficients, signs included.
    """

    base: str
    adapters: tuple[AdapterArgument, ...]


def merge_record(output: Checkpoint) -> Record | None:
    """What an output that was merged, or taken out of, says about itself, None if it says nothing.

    Raises:
        MismatchError: LT-458, it is damaged.
    """
    record = read_record(output)
    if record is None or record.get("operation") not in _OPERATIONS:
        return None

    def refuse(key: str | None, expected: str, got: str | None) -> NoReturn:
        refuse_record(output, "a value of another type", key=key, expected=expected, found=got)

    found = checked(record, _Shape, refuse)
    names = _recorded_names(record["options"], refuse)
    return Record(found.operation, found.inputs, found.options, names)


def _recorded_names(said: Mapping[str, Any], refuse: Refuse) -> Names:
    """The options of names and reading, as `loratool.options.words.recorded` wrote them."""

    def take(option: Option) -> Any:
        def refuse_one(key: str | None, expected: str, got: str | None) -> NoReturn:
            refuse(f"options.{option.recorded}{key or ''}", expected, got)

        return checked(said[option.recorded], option.type, refuse_one)

    found = {o.name: take(o) for o in options_of(Names) if o.recorded and o.recorded in said}
    try:
        return Names(**found)
    except UsageError as error:
        refuse("options", str(error.expected), str(error.got))


def refuse_record(
    output: Checkpoint, got: str, *, key: str | None = None,
    expected: str | None = None, found: str | None = None,
) -> NoReturn:  # fmt: skip
    """Refuse a record that cannot be meant.

    Raises:
        MismatchError: LT-458.
    """
    raise MismatchError(
        "LT-458", "the provenance of this checkpoint is damaged", file=output.path, key=key,
        expected=expected, got=found or got,
    )  # fmt: skip


def find_role(
    record: Record | None,
    output: Checkpoint,
    role: str,
    option: str = "",
    *,
    roots: Sequence[Path],
    look: Callable[[Path, str], Resolved],
) -> str | None:
    """The input with a role of its own, None if there was none: as `find_replay` finds inputs.

    Args:
        record: of `merge_record`.
        output: the output.
        role: ``residual`` of ``merge --residual``, or `ORIGINAL`.
        option: that names another one; "" = none does.
        roots: as in `find_replay`.
        look: as there.

    Raises:
        LoratoolError: as there.
    """
    rows = {} if record is None else record.inputs
    for name, row in rows.items():
        if row.role == role:
            return _find(name, row, output=output, roots=roots, look=look, option=option)
    return None


def find_replay(
    record: Record | None,
    output: Checkpoint,
    *,
    base: str | None,
    roots: Sequence[Path],
    look: Callable[[Path, str], Resolved],
) -> Replay:
    """Find the inputs that an output's provenance names, checked by content.

    Args:
        record: of `merge_record`.
        output: the output.
        base: where the base is, None to look for it.
        roots: folders to look in for inputs by their name.
        look: (place, ``adapter`` or ``base``) -> where its files can be read (pickles, converted).

    Raises:
        UsageError: there is no provenance to replay, or an input is not found.
        MismatchError: what lies there is not what was used, or an undo file was.
        UnsafeContentError: the record leads out of these folders.
    """
    if record is None:
        raise UsageError(
            "LT-253", "this checkpoint does not say what it was made from", file=output.path,
            expected="loratool.json of a merge", hint="name its inputs: --base and --adapter",
        )  # fmt: skip
    if "undo" in record.options:
        raise MismatchError(
            "LT-457", "this was made with an undo file, which checked every tensor itself",
            file=output.path, hint="subtract --undo again gives the same bytes",
        )  # fmt: skip
    find = partial(_find, output=output, roots=roots, look=look)
    adapters, bases = [], []
    for name, row in record.inputs.items():
        if row.role == "base":
            bases.append((name, row))
        elif row.role in ("residual", ORIGINAL):
            continue
        elif row.weight is None:
            refuse_record(output, "no weight", key=f"inputs.{name}", expected="a weight")
        else:
            place = find(name, row, option="--adapter")
            adapters.append(AdapterArgument(place, row.weight, row.components, row.blocks))
    if not bases:
        refuse_record(output, "no base", key="inputs", expected="one with the role base")
    return Replay(base or find(*bases[0], option="--base"), tuple(adapters))


def _find(
    name: str,
    row: RecordedInput,
    *,
    output: Checkpoint,
    roots: Sequence[Path],
    look: Callable[[Path, str], Resolved],
    option: str,
) -> str:
    if name.startswith("hf://"):
        return name
    plain = name.partition("#")[0]
    if "/" in plain:
        refuse_record(output, "a path", key=f"inputs.{name}", expected="plain names")
    for one in (plain, *row.files):
        check_name(one, output.path, "record")
    others = []
    for place in (root / plain for root in roots):
        if not isinstance(place, Address) and not place.exists():
            continue
        _check_place(place, option)
        try:
            resolved = look(place, "base" if row.role in ("base", ORIGINAL) else "adapter")
        except BadFileError as error:
            if not isinstance(place, Address) or error.code != "LT-300":
                raise
            continue  # of a store only looking tells
        wrong = _differing(resolved.path, row.files)
        if wrong is None:
            return str(place)
        others.append(f"{place} ({wrong})")
    if others:
        raise MismatchError(
            "LT-459", f"{plain} is not what was used", file=others[0].partition(" (")[0],
            got=others[0].partition(" (")[2].rstrip(")"),
            hint=f"{option} PATH names another" if option else None,
        )  # fmt: skip
    raise UsageError(
        "LT-254", f"cannot find {plain}, which this checkpoint was made from",
        expected=f"{plain} in " + " or ".join(str(r) for r in roots),
        hint=f"{option} PATH" if option else None,
    )  # fmt: skip


def _check_place(place: Path, option: str) -> None:
    """A record must not lead through a link out of the folder that is searched."""
    if not is_inside(place, place.parent):
        real = os.path.realpath(place)
        raise UnsafeContentError(
            "LT-904", "the record names a link that leads elsewhere, so it is not followed",
            file=place, got=real,
            hint=f"{option} {shlex.quote(real)}, if that was used" if option else None,
        )  # fmt: skip


def _as_pickle(place: Path, name: str) -> str:
    stem = name.rpartition(".")[0]
    twins = [f"{stem}.{ending}" for ending in ("bin", "pt", "pth") if place.is_dir()]
    there = next((t for t in twins if (place / t).is_file()), None)
    return f", but {there}: --allow-pickle to use it" if there else ""


def _differing(place: Path, files: Mapping[str, str | RecordedFile]) -> str | None:
    """The first file whose content is not the recorded one, None if all agree."""
    folder = place if place.is_dir() else place.parent
    for name, want in files.items():
        path = place / name if place.is_dir() else place
        if not path.is_file():
            return f"no {name}{_as_pickle(place, name)}"
        try:
            if isinstance(want, str):
                same = file_id(path, folder) == want
            else:
                header = read_header(path, folder=folder)
                head = hashlib.sha256(header.raw).hexdigest()
                same = (head, header.file_size) == (want.header_sha256, want.bytes)
                if same and want.sha256 is not None:
                    same = file_id(path, folder) == want.sha256
        except UnsafeContentError:
            raise
        except LoratoolError as error:
            return error.what
        if not same:
            return f"{name} has another content"
    return None
