"""Options of `merge` and its kin: adapters into weights, with each other, and out again."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from loratool.methods import BY_NAME
from loratool.options.groups import (
    Access,
    Against,
    ChunkBytes,
    Codes,
    Crew,
    FactorType,
    FloatType,
    Into,
    Mix,
    ModuleWeights,
    Names,
    Nonfinite,
    Place,
    Planned,
    Program,
    Read,
    Rerun,
    Round,
    Run,
    Shown,
    Size,
    Watch,
    Write,
)
from loratool.options.words import KW_ONLY, Options, Words

Many = Annotated[
    Sequence[Place],
    Words("paths, Hub references or store addresses, each with an optional weight."),
]


class Method(Options):
    """How changes are combined."""

    method: Annotated[str | None, Words(
        "How changes are combined: " + ", ".join(BY_NAME) + ". Default: their sum.", "Input",
        metavar="METHOD", choices=tuple(BY_NAME), record=True,
    )] = None  # fmt: skip
    rank: Annotated[int | str | None, Words(
        "Of an adapter: the best of this rank. Default: exact, ranks add.", "Input",
        metavar="R|auto", form="rank", record=True,
    )] = None  # fmt: skip
    params: Annotated[Mapping[str, Any] | Sequence[str] | None, Words(
        "Of the method, such as density=0.2. Repeatable.", "Input", flags="--param",
        metavar="NAME=VALUE", form="params", record=True,
    )] = None  # fmt: skip


class Combine(Mix, Method, Write, Shown, Read, Crew, Watch, Planned, Access, kw_only=False):
    """Adapters with each other."""

    adapters: Many
    _: KW_ONLY
    base: Against = None
    output: Annotated[Place, Words("Folder to create.", "Output", flags="-o, --output",
                                   metavar="OUT")]  # fmt: skip
    dtype: FactorType = "auto"
    to: Into = None
    program: Program = None


class Carry(Options):
    """What goes along with merged weights, and in which files."""

    shard_size: Annotated[Size | None, Words(
        "Largest weight file, such as 5GB. Default: the base's shards.", "Output", metavar="SIZE",
        record="shard_bytes",
    )] = None  # fmt: skip
    tokenizer: Annotated[Literal["base", "adapter"] | None, Words(
        "Whose tokenizer, chat template and generation settings go along where they differ. "
        "Default: the adapter's.", "Output",
    )] = None  # fmt: skip
    save_undo: Annotated[Place | None, Words(
        "Also write what `subtract --undo` needs to restore every bit.", "Output", metavar="FILE",
    )] = None  # fmt: skip
    to: Into = None
    program: Program = None


class Completed(Options):
    """What a merge lacks of the fine-tune that its adapter was extracted from."""

    residual: Annotated[Place | None, Words(
        "Of extract --save-residual: gives the fine-tune back, bit for bit.", "Output",
        metavar="FILE",
    )] = None  # fmt: skip


class Merge(
    Completed,
    Mix,
    Method,
    Round,
    Codes,
    Carry,
    Write,
    Shown,
    Names,
    Run,
    Planned,
    Access,
    Nonfinite,
    Rerun,
    kw_only=False,
):
    """Adapters into base weights; without a base with each other."""

    adapters: Many
    _: KW_ONLY
    base: Annotated[Place | None, Words(
        "Checkpoint to merge into; auto = the one that the adapters name.", "Input",
        metavar="BASE|auto",
    )] = None  # fmt: skip
    into: Annotated[Literal["base", "adapter"] | None, Words(
        "adapter: with each other, --base only for what depends on it (replaced tensors, DoRA, "
        "PiSSA). Default: base if there is one.", "Input",
    )] = None  # fmt: skip
    output: Annotated[Place, Words(
        "Folder to create (a .safetensors file if BASE is one), here or as s3://bucket/folder.",
        "Output", flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    dtype: Annotated[FloatType, Words(
        "Cast every float tensor. Default: each keeps its type.", "Output", record=True,
    )] = "auto"  # fmt: skip
    chunk_bytes: ChunkBytes = None


class Subtract(Mix, Round, Write, Names, Run, Planned, Access, Nonfinite, Rerun, kw_only=False):
    """Adapters out of merged weights, or out of an adapter."""

    adapters: Many
    _: KW_ONLY
    merged: Annotated[Place | None, Words(
        "Weights that the adapters were merged into. Without it: the first adapter less the "
        "others.", "Input", flags="--from", metavar="MERGED",
    )] = None  # fmt: skip
    rank: Annotated[int | str | None, Words(
        "Adapters only: best of this rank. Default: exact, ranks add.", "Input", metavar="R|auto",
        form="rank",
    )] = None  # fmt: skip
    undo: Annotated[Place | None, Words(
        "Undo file of the merge: restores every bit, and checks it.", "Input", metavar="FILE",
    )] = None  # fmt: skip
    base: Against = None
    output: Annotated[Place, Words(
        "Folder to create (a .safetensors file if MERGED is one).", "Output",
        flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    dtype: FactorType = "auto"
    to: Into = None
    program: Program = None
    chunk_bytes: ChunkBytes = None


class Swap(Round, Write, Names, Run, Planned, Access, Nonfinite, Rerun, kw_only=False):
    """One adapter out of merged weights, another in."""

    old: Annotated[str, Words("adapter that is in the weights, with the weight it was merged at.")]
    new: Annotated[str, Words("adapter to put in its place.")]
    _: KW_ONLY
    merged: Annotated[Place, Words("Weights that OLD was merged into.", "Input", flags="--in",
                                   metavar="MERGED")]  # fmt: skip
    base: Against = None
    output: Annotated[Place, Words(
        "Folder to create (a .safetensors file if MERGED is one).", "Output",
        flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    module_weights: ModuleWeights = None
    chunk_bytes: ChunkBytes = None


class Split(Write, Names, Run, Planned, Access, Nonfinite, Rerun, kw_only=False):
    """An adapter as its low-rank part and a base that holds the rest."""

    adapter: Annotated[Place, Words("path, Hub reference or store address.")]
    _: KW_ONLY
    base: Annotated[Place, Words("What it was trained on; auto = what the adapter names.", "Input",
                                 metavar="BASE|auto")]  # fmt: skip
    program: Program = None
    output: Annotated[Place, Words(
        "Folder to create, with adapter and base in it.", "Output", flags="-o, --output",
        metavar="DIR",
    )]  # fmt: skip


class Verify(Completed, Mix, Names, Run, Access, Nonfinite, kw_only=False):
    """A merge, recomputed."""

    merged: Annotated[Place, Words("the checkpoint under test.")]
    _: KW_ONLY
    base: Annotated[Place | None, Words(
        "What it was merged from; auto = what the adapters name. Default: what MERGED says.",
        "Input", metavar="BASE|auto",
    )] = None  # fmt: skip
    adapters: Annotated[Sequence[Place], Words(
        "What was merged into it. Repeatable. Default: what MERGED says.", "Input",
        flags="--adapter", metavar="ADAPTER[:W]",
    )] = ()  # fmt: skip
