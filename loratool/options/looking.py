"""Options of commands that look at adapters: `inspect`, `compare`, `open`."""

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Annotated

from loratool.options.groups import (
    Access,
    AlphaOnly,
    Crew,
    Place,
)
from loratool.options.words import Words


class Inspect(Crew, Access, AlphaOnly, kw_only=False):
    """What a source holds."""

    source: Annotated[Place, Words("path or Hub reference.")]
    _: KW_ONLY
    risk: Annotated[bool, Words(
        "Statistics of every ΔW, to look at before trusting a file.", "Output",
    )] = False  # fmt: skip
    spectrum: Annotated[bool, Words(
        "Singular values of every delta; loads the factors.", "Output",
    )] = False  # fmt: skip
    base: Annotated[Place | None, Words(
        "How strong beside BASE, and what a merge would swallow; reads both. With --risk also "
        "intruder dimensions.", "Input", metavar="BASE",
    )] = None  # fmt: skip
    csv: Annotated[Place | None, Words(
        "Write them to a new FILE, a row per module; implies --spectrum.", "Output",
        metavar="FILE",
    )] = None  # fmt: skip
    plot: Annotated[Place | None, Words(
        "Draw them into a new file; implies --spectrum. Needs matplotlib.", "Output",
        metavar="FILE.png|.svg",
    )] = None  # fmt: skip
    tensors: Annotated[bool, Words("List every tensor.", "Output")] = False
    device: Annotated[str, Words("``auto``, ``cpu`` or ``cuda[:n]``, for ``base``.")] = "auto"


class Compare(Crew, AlphaOnly, Access, kw_only=False):
    """How alike adapters are."""

    adapters: Annotated[Sequence[Place], Words("two or more paths or Hub references.")]
    _: KW_ONLY
    plot: Annotated[Place | None, Words(
        "Draw heat maps (pip install 'loratool[plot]').", "Output", metavar="FILE.png|.svg",
    )] = None  # fmt: skip
    csv: Annotated[Place | None, Words(
        "A row per module; for more than two adapters the matrix.", "Output", metavar="FILE",
    )] = None  # fmt: skip


class Open(AlphaOnly, Access, kw_only=False):
    """An adapter to iterate."""

    path: Annotated[Place, Words("adapter folder or file.")]
    _: KW_ONLY
