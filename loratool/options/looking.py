"""Options of commands that look at adapters: `inspect`, `compare`, `check`, `open`."""

from collections.abc import Sequence
from typing import Annotated

from loratool.errors import UsageError
from loratool.options.groups import (
    Access,
    AlphaOnly,
    Crew,
    Place,
    Read,
    Shown,
    Watch,
    Workers,
    Write,
)
from loratool.options.words import KW_ONLY, Words


class Inspect(Shown, Crew, Watch, Access, AlphaOnly, kw_only=False):
    """What a source holds."""

    source: Annotated[Place, Words("path, Hub reference or store address.")]
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
        "Singular values in a new FILE, a row per module. Of a folder: a row per file, from "
        "headers.", "Output", metavar="FILE",
    )] = None  # fmt: skip
    duplicates: Annotated[bool, Words(
        "Of a folder: mark files that make the same change under another name or in another "
        "dialect; reads what may be the same.", "Output",
    )] = False  # fmt: skip
    plot: Annotated[Place | None, Words(
        "Draw the singular values into a new file. Needs matplotlib.", "Output",
        metavar="FILE.png|.svg",
    )] = None  # fmt: skip
    checksum: Annotated[bool, Words(
        "The file's sha256, and whether the hashes in its metadata hold; reads every byte.",
        "Output",
    )] = False  # fmt: skip
    tensors: Annotated[bool, Words("List every tensor.", "Output")] = False
    device: Annotated[str, Words("``auto``, ``cpu`` or ``cuda[:n]``, for ``base``.")] = "auto"


class Compare(Shown, Crew, Watch, AlphaOnly, Access, kw_only=False):
    """How alike adapters are."""

    adapters: Annotated[
        Sequence[Place], Words("two or more paths, Hub references or store addresses.")
    ]
    _: KW_ONLY
    base: Annotated[Place | None, Words(
        "What they were trained on: for changes that depend on it, such as DoRA and OFT, and rows "
        "of heads that lie in two orders.", "Input", metavar="BASE",
    )] = None  # fmt: skip
    plot: Annotated[Place | None, Words(
        "Draw heat maps (pip install 'loratool[plot]').", "Output", metavar="FILE.png|.svg",
    )] = None  # fmt: skip
    csv: Annotated[Place | None, Words(
        "A row per module; for more than two adapters the matrix.", "Output", metavar="FILE",
    )] = None  # fmt: skip


class Check(Write, Workers, Read, Access, kw_only=False):
    """An adapter, and the program that shall load it."""

    adapter: Annotated[Place, Words("path, Hub reference or store address.")]
    _: KW_ONLY
    program: Annotated[str, Words(
        "The program: peft, vllm, sglang, llama.cpp, mlx, comfyui, diffusers, forge, webui, "
        "nunchaku, sd-scripts (or kohya).",
        "Output", flags="--for", metavar="PROGRAM", record="for",
    )]  # fmt: skip
    fix: Annotated[bool, Words(
        "Write the same change in a form that the program loads right.", "Output",
    )] = False  # fmt: skip
    output: Annotated[Place | None, Words(
        "With --fix: folder or file to create; a name that ends in .gguf for a file that llama.cpp "
        "loads.", "Output", flags="-o, --output", metavar="OUT",
    )] = None  # fmt: skip
    base: Annotated[Place | None, Words(
        "With --fix: what it was trained on. A GGUF file follows from its configuration; what "
        "depends on its numbers (DoRA, OFT, PiSSA) becomes LoRA.", "Input", metavar="BASE",
    )] = None  # fmt: skip

    def check(self) -> None:
        """Refuse a fix without a place for it, and a place without a fix."""
        super().check()
        if self.base is not None and not self.fix:
            raise UsageError("LT-276", "--base is what --fix needs", expected="--fix -o OUT")
        if self.fix != (self.output is not None):
            raise UsageError("LT-276", "--fix writes a file: it goes with -o OUT",
                             expected="both or neither")  # fmt: skip


class Open(AlphaOnly, Access, kw_only=False):
    """An adapter to iterate."""

    path: Annotated[Place, Words("adapter folder or file.")]
    _: KW_ONLY
