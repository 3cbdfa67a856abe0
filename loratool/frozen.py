"""Records: plain data with named fields, made once and never changed.

No dataclasses: those write and compile code for every class, half a millisecond each, which every
command that only looks at headers would wait for.
"""

from __future__ import annotations

from typing import Any, dataclass_transform

from msgspec import Struct, field
from msgspec.structs import asdict, replace

__all__ = ["Frozen", "Struct", "asdict", "field", "names_of", "replace"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Frozen(Struct, frozen=True):
    """Base of all records; what is to be changed is a `Struct`."""


def names_of(value: Any) -> tuple[str, ...]:
    """Names of the fields of a record, or of a class of them; none of anything else."""
    found: tuple[str, ...] = getattr(value, "__struct_fields__", ())
    return found
