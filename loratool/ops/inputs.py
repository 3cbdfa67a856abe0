"""Open what the user named: adapters with weights, the base, a place for the output."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from loratool.adapter import Adapter
from loratool.bind.user_names import part_regex
from loratool.dialects import open_adapter, unmergeable_reason
from loratool.errors import BadFileError, MismatchError, OutputError, UsageError, list_some
from loratool.frozen import Frozen, replace
from loratool.ops.access import Access, locate
from loratool.ops.averages import averaged, check_order
from loratool.ops.weights import Rule, Weight, weigh
from loratool.options.groups import Mix, Read
from loratool.patterns import find, typed_pattern
from loratool.store.address import Address, address_of
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.places import check_name, old_path, staging_path
from loratool.store.source import (
    AdapterArgument,
    Resolved,
    find_adapter,
    parse_adapter,
)

MAX_ADAPTERS = 1024


def open_one(text: str, *, read: Read, access: Access) -> tuple[Resolved, Adapter]:
    """Find an adapter and read what it says; it can be read while the first of the two lives.

    Raises:
        LoratoolError: there is none, or it cannot be read.
    """
    resolved = locate(text, kind="adapter", access=access)
    path = find_adapter(resolved.path)
    adapter = open_adapter(path, read, max_header=access.rules.max_header)
    return resolved, _included(adapter, read.include) if read.include else adapter


def _included(adapter: Adapter, include: Sequence[str]) -> Adapter:
    """The modules that match, and whole files of trained weights whose names do.

    Raises:
        UsageError: LT-220, no regular expression.
        MismatchError: LT-448, nothing matches.
    """
    replaced = {r.name: r.name.rpartition(".")[0] or r.name for r in adapter.replacements}
    modules = [*(s.module or s.parameter for s in adapter.specs), *replaced.values()]
    files = [*adapter.extras, *(one.name for one in adapter.beside)]
    patterns = [typed_pattern(part_regex(text), "--include") for text in include]
    found: frozenset[str] = frozenset().union(*find(patterns, [*modules, *files]))
    left_out = sorted(set(modules) - found)
    if not found.intersection(modules):
        raise MismatchError(
            "LT-448", "--include leaves nothing", file=adapter.path,
            expected=f"modules such as {list_some(left_out, 3)}", got=list_some(include),
        )  # fmt: skip
    if not left_out:
        return adapter
    is_taken = {n: n in found or not n.endswith(".safetensors") for n in adapter.extras}
    return replace(
        adapter,
        specs=tuple(s for s in adapter.specs if (s.module or s.parameter) in found),
        replacements=tuple(r for r in adapter.replacements if replaced[r.name] in found),
        extras={name: path for name, path in adapter.extras.items() if is_taken[name]},
        beside=tuple(one for one in adapter.beside if one.name in found),
        unclaimed=(),
        notes=(*adapter.notes, f"--include leaves out {len(left_out)} of {len(set(modules))} "
               f"modules: {list_some(left_out, 3)}"),
    )  # fmt: skip


class OpenedAdapter(Frozen):
    """An adapter, its coefficients, and where it came from."""

    adapter: Adapter
    weight: Weight
    resolved: Resolved


class OpenedBase(Frozen):
    """A checkpoint and where it came from."""

    checkpoint: Checkpoint
    resolved: Resolved


def open_adapters(
    texts: Sequence[str | Path | AdapterArgument],
    mix: Mix,
    *,
    read: Read,
    access: Access,
    rules: Sequence[Rule] = (),
) -> list[OpenedAdapter]:
    """Open adapters with their coefficients.

    Args:
        texts: as typed, ``style:0.7`` or ``style:unet=0.8,te=0.4``, or already taken apart.
        mix: coefficients in order instead of those in ``texts``, and what they are divided by.
        read: what the files do not say.
        access: network rules.
        rules: weights per module.

    Raises:
        UsageError: no adapter, or weights that do not fit.
        MismatchError: an adapter cannot be merged at all, or lacks a component that has a weight.
    """
    if not texts:
        raise UsageError("LT-221", "no adapter given")
    if len(texts) > MAX_ADAPTERS:
        raise UsageError(
            "LT-291", "too many adapters at once", expected=f"at most {MAX_ADAPTERS}",
            got=len(texts), hint="merge them in groups",
        )  # fmt: skip
    opened = []
    for number, argument in enumerate(_weighted(texts, mix)):
        resolved, adapter = open_one(argument.path_text, read=read, access=access)
        reason = unmergeable_reason(adapter)
        if reason is not None:
            raise MismatchError(
                "LT-473", "this adapter cannot be merged", file=adapter.path, got=reason
            )
        opened.append(OpenedAdapter(adapter, weigh(adapter, argument, rules, number), resolved))
    return opened


def _weighted(
    texts: Sequence[str | Path | AdapterArgument], mix: Mix
) -> list[AdapterArgument]:  # fmt: skip
    """Adapters as typed, each with its coefficient."""
    parsed = [t if isinstance(t, AdapterArgument) else parse_adapter(t) for t in texts]
    given = mix.weights
    if given is not None and len(given) != len(texts):
        raise UsageError("LT-222", "number of --weights", expected=len(texts), got=len(given))
    for one in parsed if given is not None else ():
        if one.weight != 1.0 or one.components:
            raise UsageError("LT-224", "a weight in the name and --weights too", key=one.path_text)
    if mix.ema is not None:
        check_order([p.path_text for p in parsed])
    weights = averaged([p.weight for p in parsed] if given is None else given, mix)
    return [replace(p, weight=float(w)) for p, w in zip(parsed, weights, strict=True)]


def open_base(text: str, adapters: Sequence[Adapter], access: Access) -> OpenedBase:
    """Open the base; ``auto`` takes the one that the adapters name.

    Raises:
        MismatchError: LT-474, ``auto``, and the adapters name none that is here, or different ones.
    """
    if text == "auto":
        named = {a.base_model for a in adapters if a.base_model}
        if len(named) != 1:
            raise MismatchError(
                "LT-474",
                "--base auto needs one base that the adapters name",
                got=", ".join(sorted(named)) or "none named",
                hint="--base PATH",
            )
        return _named_base(named.pop(), access)
    return _open_base(text, access)


def _named_base(text: str, access: Access) -> OpenedBase:
    """A base that nobody typed: an adapter may name a path of the machine where it was trained."""
    try:
        return _open_base(text, access)
    except BadFileError as error:
        if error.code != "LT-300":
            raise
        raise MismatchError(
            "LT-474", "the base that the adapters name is not here", got=text, hint="--base PATH"
        ) from error


def _open_base(text: str, access: Access) -> OpenedBase:
    resolved = locate(text, kind="base", access=access)
    checkpoint = open_checkpoint(resolved.path, max_header=access.rules.max_header)
    return OpenedBase(checkpoint, resolved)


def guard_output(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is, holds, or lies in an input: a `Guard` for one.

    Raises:
        OutputError: LT-506, or it can be no output at all.
    """
    Guard(inputs).check(output)


class Guard:
    """Keeps outputs away from what is read, however many there are of both.

    Links and hard links are seen through: what is to be replaced must share no file with an input.

    Args:
        inputs: files and folders that are read, of any kind, and texts that may name some.
    """

    def __init__(self, inputs: Iterable[str | Path | None]) -> None:
        inputs = list(inputs)
        self._far = [far for p in inputs if ":/" in str(p) and (far := address_of(str(p)))]
        self._at: dict[Path, str | Path] = {}  # where an input really lies -> as it was given
        self._above: dict[Path, str | Path] = {}  # the folders around it
        for path in inputs:
            if path is None or isinstance(path, Address):
                continue
            if isinstance(path, str) and not os.path.lexists(path):
                continue  # such as a reference to the Hub
            real = Path(os.path.realpath(path))
            self._at.setdefault(real, path)
            for folder in real.parents:
                self._above.setdefault(folder, path)

    @cached_property
    def _files(self) -> dict[tuple[int, int], str | Path]:
        return {one: path for place, path in self._at.items() for one in _identities(place)}

    def check(self, output: Path) -> None:
        """Refuse an output that is, holds, or lies in an input, or whose staging folder does.

        Raises:
            OutputError: it would overwrite what is being read, or can be no output at all.
        """
        if isinstance(output, Address):  # of no file of this machine
            for far in self._far:
                if output.overlaps(far):
                    raise _over(output, far)
            return
        check_name(output)
        places = (output, staging_path(output), old_path(output))
        for place in places:
            real = Path(os.path.realpath(place))
            hits = [self._at[p] for p in (real, *real.parents) if p in self._at]
            hits += [self._above[real]] if real in self._above else []
            hits += [self._files[one] for one in _identities(place) if one in self._files]
            if hits:
                raise _over(output, hits[0])


def _over(output: Path, given: str | Path) -> OutputError:
    return OutputError(
        "LT-506", "the output would overwrite an input", file=output, got=f"input {given}",
        hint="choose another -o",
    )  # fmt: skip


def _identities(place: Path) -> Iterator[tuple[int, int]]:
    """(device, inode) of every file of a place, through links to files in it; none of a link."""
    try:
        if place.is_symlink():  # refused as an output; where it leads is nobody's business
            return
    except OSError:  # a name that the system refuses
        return
    files = [Path(folder, n) for folder, _, names in os.walk(place) for n in names] or [place]
    for path in files:
        try:
            found = path.stat()
        except OSError:  # a broken link
            continue
        if stat.S_ISREG(found.st_mode):
            yield found.st_dev, found.st_ino
