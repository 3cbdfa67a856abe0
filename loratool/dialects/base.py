"""What a dialect is: one row (no torch)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn, Protocol, cast

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, TensorRef
from loratool.dialects.candidate import Candidate
from loratool.dialects.table import Table
from loratool.errors import MismatchError
from loratool.frozen import Frozen
from loratool.options.groups import Read
from loratool.plugins import function_of

Detector = Callable[[Candidate], bool]
"""Is this a file of the dialect?  No two dialects say yes to the same one."""


class Reader(Protocol):
    """Reads an adapter in one dialect."""

    def __call__(self, candidate: Candidate, options: Read) -> Adapter:
        """The adapter in neutral form."""


class Writer(Protocol):
    """Makes the files of an adapter in one dialect."""

    def __call__(
        self,
        adapter: Adapter,
        *,
        base_config: Mapping[str, Any] | None = None,
        base_tensors: Iterable[str] = (),
    ) -> AdapterFiles:
        """Files in memory; nothing is written."""


class Dialect(Frozen):
    """One row of the registry; it lies in the dialect's own module.

    Attributes:
        name: what ``--to`` takes and `Adapter.dialect` holds.
        title: for messages.
        short: for tables, where the title is too long.
        detect: is a candidate of this dialect, and of no other?
        table: what reads and writes it, for a dialect whose tensors say everything.
        read: ``module:function``, a `Reader`; "" = recognised, not supported.
        write: ``module:function``, a `Writer`; "" = not supported.
        holds: ``module:function`` of a `loratool.adapter.DeltaSpec`: why it cannot be written, ""
            if it can.
        written_as: the dialect that its adapters are written in, where that is another one.
        form: what ``-o`` names, ``folder`` or ``file``.
        suffixes: of the tensor file.
        weights: what its tensor file is called in a folder, beside its configuration.
        beside: other files beside a lone tensor file that say something of it.
        is_last: it claims only what no other dialect does.
        holds_whole: it has a place for tensors that take the base's place.
        even: what is one number for all changes, ``scaling`` or ``alpha``; `convert` puts other
            ones into the factors.
        asks_config: what is written follows from the base's configuration.
        names_base: regular expression of the bases whose names it has a place for.
        lacks: why programs do not load it that load the dialect it is written in.
        library: what loads the files as they are, as the Hub calls it.
        hint: what to do with a file that cannot be read.
    """

    name: str
    title: str
    detect: Detector
    table: Table | None = None
    read: str = ""
    write: str = ""
    holds: str = ""
    form: str = "file"
    suffixes: tuple[str, ...] = (".safetensors",)
    weights: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    is_last: bool = False
    hint: str | None = None
    short: str = ""
    library: str | None = None
    written_as: str = ""
    names_base: str = ""
    lacks: str = ""
    even: str = ""
    asks_config: bool = False
    holds_whole: bool = False

    @property
    def is_read(self) -> bool:
        """True if adapters in it are read."""
        return bool(self.read) or self.table is not None

    @property
    def is_written(self) -> bool:
        """True if it is one that adapters are written in."""
        return bool(self.write) or self.table is not None

    @property
    def is_flat(self) -> bool:
        """True if the dots of its module names are lost: they are looked up when bound."""
        return self.table is not None and self.table.is_flat

    @property
    def is_even(self) -> bool:
        """True if one number states the scaling of all changes."""
        return bool(self.even)

    @property
    def is_folder(self) -> bool:
        """True if an adapter in it is a folder."""
        return self.form == "folder"

    def reader(self) -> Reader:
        """What reads a file of it."""
        if self.table is None:
            return cast(Reader, function_of(self.read))
        from loratool.dialects.table_read import read_table

        return partial(read_table, self.table, self.name)

    def writer(self) -> Writer:
        """What makes its files."""
        if self.table is None:
            return cast(Writer, function_of(self.write))
        from loratool.dialects.table_write import write_table

        return partial(write_table, self.table, self.name, self.title)

    def folded(self, adapter: Adapter) -> Adapter:
        """The adapter with scalings in its factors, where files have no other place for them."""
        if self.table is None:
            return adapter
        from loratool.dialects.table_write import folded

        return folded(self.table, adapter, own=self.name == adapter.dialect)

    def obstacle(self, spec: DeltaSpec) -> str:
        """Why a change cannot be written in it, "" if it can."""
        if self.table is not None:
            return self.table.obstacle(spec)
        return str(cast(Callable[[DeltaSpec], str], function_of(self.holds))(spec))


def by_keys(*patterns: str, unless: tuple[str, ...] = ()) -> Detector:
    """A detector that goes by tensor names.

    Args:
        patterns: regular expressions; one of them is found in some name.
        unless: regular expressions that are found in none.
    """

    def detect(candidate: Candidate) -> bool:
        return (
            not candidate.is_peft
            and any(map(candidate.has_key, patterns))
            and not any(map(candidate.has_key, unless))
        )

    return detect


# ------------------------------------ programs of language models that name modules as they like


class Spelling(Frozen):
    """How a program names the tensors of its changes.

    Attributes:
        key: of a whole name; its groups are ``module`` and, but for one role, ``leaf``.
        roles: leaf -> role.
        expected: what modules there are, for messages.
        hint: what to do with a file of others.
        layer: of a module in a layer; its groups are ``number`` and ``leaf``.
        modules: leaf of a layer -> where it lies in a layer of transformers.
        outside: other modules -> what transformers calls them.
    """

    key: re.Pattern[str]
    roles: Mapping[Any, str]
    expected: str
    hint: str | None = None
    layer: re.Pattern[str] | None = None
    modules: Mapping[str, str] = {}
    outside: Mapping[str, str] = {}

    def by_module(self, refs: Iterable[TensorRef]) -> dict[str, dict[str, TensorRef]]:
        """Module, as the program calls it -> role -> tensor.

        Raises:
            MismatchError: LT-415, a tensor of another kind.
        """
        modules: dict[str, dict[str, TensorRef]] = {}
        for ref in refs:
            match = self.key.fullmatch(ref.name)
            if match is None:
                self.refuse(ref)
            role = self.roles[match.groupdict().get("leaf")]
            modules.setdefault(match["module"], {})[role] = ref
        return modules

    def place(self, module: str, fields: Mapping[str, TensorRef]) -> tuple[str, str]:
        """(what transformers calls a module, its leaf in a layer or "").

        Raises:
            MismatchError: LT-415, there is no such module.
        """
        match = self.layer.fullmatch(module) if self.layer else None
        inner = self.modules.get(match["leaf"]) if match else self.outside.get(module)
        if not inner:
            self.refuse(next(iter(fields.values())))
        return (f"model.layers.{match['number']}.{inner}", match["leaf"]) if match else (inner, "")

    def refuse(self, ref: TensorRef) -> NoReturn:
        """LT-415 for a tensor that is no part of a change."""
        raise MismatchError(
            "LT-415", "tensors of an unknown kind", file=ref.path, key=ref.name,
            expected=self.expected, hint=self.hint,
        )  # fmt: skip


def alpha_of(
    candidate: Candidate, options: Read, name: str, *, title: str, key: str = "lora_alpha",
    value: str = "VALUE",
) -> float:  # fmt: skip
    """The alpha that was asked for, or that a file beside the tensors states.

    Args:
        candidate: the file.
        options: with ``alpha``.
        name: of the file beside it.
        title: of the program, for messages.
        key: of alpha in that file.
        value: what ``--alpha`` takes, for messages.

    Raises:
        BadFileError: LT-361, no number.
        UsageError: LT-280, nothing says it.
    """
    if options.alpha is not None:
        return options.alpha
    assert candidate.weights is not None
    from loratool.dialects.factors import refuse_alpha
    from loratool.dialects.peft.config import Fields

    fields = Fields(candidate.beside(name), candidate.weights.with_name(name))
    if fields.config.get(key) is None:
        refuse_alpha(candidate.path, title, name, value)
    return fields.number(key, 0.0)
