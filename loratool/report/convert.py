"""What `loratool.convert` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from loratool.frozen import Frozen, field
from loratool.report.base import Failed, Loads, Report


class ConvertedAdapter(Frozen):
    """One adapter in another dialect.

    Attributes:
        source: as named.
        output: what was (or would be) written.
        dialect: that it was read in.
        modules: changes that it has in the other dialect.
        copied: tensors whose bytes are copied.
        computed: names of the modules whose factors are computed; nothing else needs torch.
        relative_error: ‖stored − exact‖ / ‖exact‖ over all modules; 0 where bytes are copied.
        left_out: what the user left out.
        output_bytes: size of the tensor file.
        metadata: entries of the file's metadata that were asked for -> new value, "" = removed.
        hashes: entries that are hashes of the tensors and are other ones now.
        loads_in: which programs load it.
        warnings: what the user should not overlook.
        notes: what is good to know.
    """

    source: str
    output: str
    dialect: str
    modules: int
    copied: int
    computed: tuple[str, ...]
    relative_error: float
    left_out: tuple[str, ...]
    output_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    hashes: tuple[str, ...] = ()
    loads_in: tuple[Loads, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ConvertReport(Report):
    """Result of `loratool.convert`.

    Attributes:
        output: what was (or would be) written, or the folder of several.
        dialect: that the results are in.
        adapters: one row per input.
        seconds: wall time.
        dry_run: nothing was written.
        failed: adapters that were left out, with ``keep_going``.
    """

    command: ClassVar[str] = "convert"
    output: str
    dialect: str
    adapters: tuple[ConvertedAdapter, ...]
    seconds: float
    dry_run: bool = False
    failed: tuple[Failed, ...] = ()

    @property
    def ok(self) -> bool:
        """False if an adapter was left out."""
        return not self.failed
