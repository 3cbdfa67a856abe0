"""What a method of PEFT besides LoRA is: one row, and what its `make` gets of each module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from loratool import kinds
from loratool.adapter import DeltaSpec, Replacement, TensorRef
from loratool.dialects.factors import check_float, check_rank, refuse_shard
from loratool.dialects.peft.config import Fields, PeftConfig
from loratool.dtypes import DTYPES
from loratool.errors import BadFileError
from loratool.frozen import Frozen

SEEDED = ("save_projection", "projection_prng_key")
"""Fields of the configuration: the file holds the matrices that modules share; else their seed."""


class Module(Frozen):
    """The tensors of one module.

    Attributes:
        name: its path.
        fields: role -> tensor; those that the file holds once for all modules are here too.
        config: what all methods of PEFT state.
        own: typed access to what this method states.
    """

    name: str
    fields: Mapping[str, TensorRef]
    config: PeftConfig
    own: Fields

    def spec(
        self, kind: str, rank: int, *, alpha: float | None = None, scaling: float = 1.0,
        parameter: str = "weight", layout: str = "linear",
        settings: Mapping[str, float | str] | None = None,
    ) -> DeltaSpec:  # fmt: skip
        """The change that the tensors make, checked.

        Args:
            kind: of `loratool.kinds`.
            rank: r; 0 for a change that has none.
            alpha: as the file says.
            scaling: factor of the change.
            parameter: that changes.
            layout: of `DeltaSpec`.
            settings: of the kind.

        Raises:
            BadFileError: LT-348, LT-362 … LT-365, the tensors make none.
        """
        row = kinds.row_of(kind)
        if not set(row.roles) <= set(self.fields) <= {*row.roles, *row.optional}:
            self.refuse("LT-362", "the tensors of a module are incomplete", "+".join(row.roles))
        for ref in self.fields.values():
            if 0 in ref.shape:
                refuse_shard(ref)
            if DTYPES[ref.dtype].is_float:
                check_float(ref)
            check_rank(rank, ref)
        spec = DeltaSpec(
            kind, self.name, parameter, self.fields, layout, rank, alpha, scaling,
            transposed=self.config.fan_in_fan_out and layout == "linear",
            settings=settings or {},
        )  # fmt: skip
        if not row.fits(spec):
            self.refuse("LT-363", "the tensors of a module do not fit each other", None)
        return spec

    def axis(self, role: str, axis: int) -> int:
        """Length of an axis of a tensor that must be there.

        Raises:
            BadFileError: LT-362, LT-363.
        """
        ref = self.tensor(role)
        if len(ref.shape) <= axis:
            self.refuse("LT-363", "the tensors of a module do not fit each other", None)
        if 0 in ref.shape:
            refuse_shard(ref)
        return ref.shape[axis]

    def tensor(self, role: str) -> TensorRef:
        """A tensor that must be there.

        Raises:
            BadFileError: LT-362.
        """
        if role not in self.fields:
            self.refuse("LT-362", "the tensors of a module are incomplete", role)
        return self.fields[role]

    def shared_seed(self, names: str) -> int:
        """What the matrices are drawn from that modules share, where the file does not hold them.

        Args:
            names: what they are called.

        Raises:
            BadFileError: LT-362, the file should hold them; LT-361, no seed.
        """
        stated, key = SEEDED
        if self.own.flag(stated, default=True):
            self.refuse("LT-362", "the tensors of a module are incomplete",
                        f"{names} beside the modules, or {stated} false")  # fmt: skip
        if key not in self.own.config:
            self.own.refuse(key, "the seed of the shared matrices", None)
        seed = self.own.config[key]
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            self.own.refuse(key, "a whole number of 64 bits", seed)
        return int(seed)

    def refuse(self, code: str, what: str, expected: str | None) -> NoReturn:
        """The error of tensors that make no change."""
        raise BadFileError(
            code, what, file=next(iter(self.fields.values())).path, key=self.name,
            expected=expected,
            got=", ".join(f"{role} {list(ref.shape)}" for role, ref in self.fields.items()),
        )  # fmt: skip


Change = DeltaSpec | Replacement


class Method(Frozen):
    """A ``peft_type``.

    Attributes:
        name: as the configuration has it.
        make: the changes that the tensors of one module make; none where they change nothing.
        roles: what keys end in -> role.
        shared: what the keys of tensors are called that the file holds once -> role.
        own: fields of the configuration that `make` reads.
        silent: fields that say nothing about the numbers of a finished adapter.
        alpha: the field that every change is proportional to, "" if there is none.
    """

    name: str
    make: Callable[[Module], Sequence[Change]]
    roles: Mapping[str, str]
    shared: Mapping[str, str] | None = None
    own: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    alpha: str = ""

    def read(
        self, modules: Mapping[str, Mapping[str, TensorRef]], shared: Mapping[str, TensorRef],
        config: PeftConfig,
    ) -> tuple[list[Change], list[TensorRef], list[TensorRef]]:  # fmt: skip
        """Every change in file order; tensors of modules that change nothing; shared ones not used.

        Args:
            modules: path -> role -> tensor.
            shared: role -> tensor.
            config: of the adapter.
        """
        found: list[Change] = []
        idle: list[TensorRef] = []
        for name, fields in modules.items():
            if fields.keys() <= {"tokens"}:
                continue  # rows that take the base's place
            made = self.make(Module(name, {**shared, **fields}, config, config.own))
            found += made
            if not made:
                idle += fields.values()
        used = {id(s) for one in found if isinstance(one, DeltaSpec) for s in one.fields.values()}
        return found, idle, [ref for ref in shared.values() if id(ref) not in used]


def spelled(*roles: str) -> dict[str, str]:
    """Keys that end in the names of the roles."""
    return {role: role for role in roles}


def pruned(module: Module) -> bool:
    """True for a module whose rank went down to nothing."""
    return any(0 in ref.shape for ref in module.fields.values())
