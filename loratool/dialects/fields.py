"""The rows that a dialect's table is made of: prefixes, endings, and what metadata state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from loratool.adapter import DeltaSpec
from loratool.frozen import Frozen


class Component(Frozen):
    """A part of a pipeline.

    Attributes:
        prefix: what its keys begin with.
        name: what it is called here: of flat names a key of ``archs/data/diffusion.json``, of
            dotted ones what modules begin with in neutral form; "" = any part.
        also: what else modules of it may begin with that come from other dialects.
    """

    prefix: str
    name: str
    also: tuple[str, ...] = ()


class Field(Frozen):
    """What a key ends in.

    Attributes:
        suffix: behind the module and a dot.
        role: of the kind.
        kind: where the tensor is a change of its own, its kind; "" = a factor among others.  One
            of a weight without columns (a norm) is a vector's, whatever stands here.
        parameter: that it changes.
        is_norm: of a module whose weight is such a vector too; the bias of a norm and of any other
            module may be spelled differently.
        start: what loading such a factor does to the base first, `DeltaSpec.base_change`.
        is_scaled: the scaling of the module's factors holds for it too (PEFT's bias of lora_B).
        is_set: the tensor takes the place of the parameter; it has no role.
    """

    suffix: str
    role: str
    kind: str = ""
    parameter: str = "weight"
    is_norm: bool = False
    start: str = ""
    is_scaled: bool = False
    is_set: bool = False


class Scaling(Frozen):
    """What a file's metadata state about a module.

    Attributes:
        alpha: as stated.
        factor: of the product of the factors.
    """

    alpha: float
    factor: float


Stated = Callable[[str, int], Scaling | None]
"""(module, rank) -> what is stated of it, None where nothing is."""


class Header(Frozen):
    """Scaling in the metadata of a file.

    Attributes:
        read: metadata and modules -> what they state.
        write: metadata and changes -> the metadata that state the scaling of these.
    """

    read: Callable[[Mapping[str, str], Collection[str]], Stated]
    write: Callable[[Mapping[str, str], Sequence[DeltaSpec]], dict[str, str]]


class Key(Frozen):
    """A tensor's name, taken apart.

    Attributes:
        module: component and module, in neutral form.
        stem: the same as the file has it.
        suffix: what the name ends in.
    """

    module: str
    stem: str
    suffix: str
