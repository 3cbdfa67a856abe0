"""Files of a folder that make the same change, found with as little reading as will do.

What cannot be the same differs in the shapes of its changes; of the rest a few tensors tell most
apart; only what is alike there is read whole.  Without torch, and without numpy where tensors are
the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from loratool.adapter import Adapter, DeltaSpec, Source, TensorData
from loratool.delta.forms import shape_of
from loratool.dialects import open_adapter
from loratool.errors import LoratoolError
from loratool.frozen import Frozen, replace
from loratool.options.groups import Read
from loratool.report.inspect import FolderRow
from loratool.store.reader import FileReader
from loratool.store.source import find_adapter

_PIECE = 1 << 20
_START = 4096  # bytes of a tensor that tell it from most others


class _One(Frozen):
    """A file that may be like another one."""

    number: int
    adapter: Adapter

    @property
    def specs(self) -> Sequence[DeltaSpec]:
        return self.adapter.specs


Groups = Callable[[Sequence[Adapter]], Sequence[Sequence[int]]]
Key = Callable[[_One], Hashable]


def mark_duplicates(
    folder: Path, rows: Sequence[FolderRow], alpha: float | None, by_numbers: Groups
) -> tuple[FolderRow, ...]:
    """The rows with `same_as` where a row makes the change of one with a shorter name.

    Copies have longer names: ``style (1)``, ``style-copy``.

    ``bytes``: all tensors are the same under the same names.  ``tensors``: the same tensors and
    scalings under other names.  ``numbers``: other tensors with the same products.

    Args:
        folder: that they are of.
        rows: in order.
        alpha: of files without a configuration.
        by_numbers: of adapters whose changes have the same shapes, those that are alike.
    """
    ones = sorted(_opened(folder, rows, alpha), key=lambda one: _named(rows[one.number]))
    found = dict(_pairs(ones, by_numbers))
    return tuple(
        replace(row, same_as=rows[found[n][0]].name, same_how=found[n][1]) if n in found else row
        for n, row in enumerate(rows)
    )


def _opened(folder: Path, rows: Sequence[FolderRow], alpha: float | None) -> Iterator[_One]:
    """Adapters whose shapes another one has too; nothing else is opened again."""
    sizes = Counter(_size(row) for row in rows)
    for number, row in enumerate(rows):
        if row.adapter is not None and sizes[_size(row)] > 1:
            try:
                path = find_adapter(folder / row.name)
                yield _One(number, open_adapter(path, Read(alpha=alpha)))
            except LoratoolError:  # it went away, or needs more than headers
                continue


def _named(row: FolderRow) -> tuple[int, str]:
    return len(row.name), row.name


def _size(row: FolderRow) -> Hashable:
    one = row.adapter
    return None if one is None else (one.modules, one.replaced_bytes)


def _pairs(ones: Sequence[_One], by_numbers: Groups) -> Iterator[tuple[int, tuple[int, str]]]:
    """(row, (its twin's, how)); the first of those that are alike stands for them."""
    for alike in _grouped(ones, [_shapes]):
        left = list(alike)
        for how, keys in (("bytes", [_starts, _named_tensors]), ("tensors", [_starts, _tensors])):
            taken = set()
            for first, *alike_too in _grouped(left, keys):
                # Under the same names the tensors would have been the same above.
                others = [o for o in alike_too if how == "bytes" or _names(o) != _names(first)]
                taken |= {one.number for one in others}
                yield from ((one.number, (first.number, how)) for one in others)
            left = [one for one in left if one.number not in taken]
        if len(left) > 1:
            for group in by_numbers([one.adapter for one in left]):
                same = left[group[0]].number
                yield from ((left[n].number, (same, "numbers")) for n in group[1:])


def _grouped(ones: Iterable[_One], keys: Sequence[Key]) -> Iterator[list[_One]]:
    """Those that are alike by every key; the next one is asked of what was alike by the last."""
    groups: dict[Hashable, list[_One]] = defaultdict(list)
    for one in ones:
        groups[keys[0](one)].append(one)
    for group in groups.values():
        if len(group) > 1 and len(keys) > 1:
            yield from _grouped(group, keys[1:])
        elif len(group) > 1:
            yield group


def _shapes(one: _One) -> Hashable:
    return frozenset(Counter((s.kind, s.parameter, shape_of(s)) for s in one.specs).items())


def _factors(one: _One) -> list[Source]:
    found = {(id(f), f.name): f for s in one.specs for f in s.fields.values()}
    return [*found.values(), *(r.source for r in one.adapter.replacements)]


def _starts(one: _One) -> Hashable:
    """The first bytes of the tensors of the rarest shape, in any order."""
    factors = _factors(one)
    shapes = Counter(f.shape for f in factors)
    least = min(shapes, key=lambda shape: (shapes[shape], shape)) if shapes else ()
    with FileReader() as reader:
        starts = Counter(_hash(f, reader, _START) for f in factors if f.shape == least)
    return least, frozenset(starts.items())


def _tensors(one: _One) -> Hashable:
    """What every change is made of, whatever it is called."""
    return frozenset(Counter((key, scale) for _, key, scale in _contents(one)).items())


def _named_tensors(one: _One) -> Hashable:
    return one.adapter.dialect, frozenset(_contents(one))


def _names(one: _One) -> frozenset[str]:
    return frozenset(spec.name for spec in one.specs)


def _contents(one: _One) -> Iterator[tuple[str, Hashable, float]]:
    with FileReader() as reader:
        known = {(id(f), f.name): _hash(f, reader) for f in _factors(one)}
    for spec in one.specs:
        made = frozenset((role, known[id(f), f.name]) for role, f in spec.fields.items())
        yield spec.name, (spec.kind, made), spec.scaling
    for new in one.adapter.replacements:
        yield new.name, known[id(new.source), new.source.name], 1.0


def _hash(source: Source, reader: FileReader, most: int | None = None) -> bytes:
    """Of the type, the size and the bytes of a tensor, or of the first of them."""
    found = hashlib.blake2b(f"{source.dtype} {source.nbytes}".encode(), digest_size=16)
    end = source.nbytes if most is None else min(source.nbytes, most)
    if isinstance(source, TensorData):
        found.update(memoryview(source.data).cast("B")[:end])
        return found.digest()
    buffer = memoryview(bytearray(min(_PIECE, end)))
    for start in range(0, end, _PIECE):
        piece = buffer[: min(_PIECE, end - start)]
        reader.read_into(source, start, piece)
        found.update(piece)
    return found.digest()
