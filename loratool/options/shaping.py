"""Options of commands that make an adapter of one: `compress`, `rescale`, and `extract`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from loratool.options.groups import (
    Access,
    Crew,
    Energy,
    FactorType,
    FloatType,
    Include,
    Into,
    Many,
    Place,
    Planned,
    Program,
    RankOf,
    Read,
    RelativeError,
    Rename,
    Run,
    Shown,
    Size,
    SvBase,
    SvMin,
    SvRatio,
    Watch,
    Workers,
    Write,
)
from loratool.options.words import KW_ONLY, Options, Words


class Compress(Write, Many, Shown, Crew, Watch, Planned, Access, Read, kw_only=False):
    """Fewer ranks for adapters."""

    adapters: Annotated[Place | Sequence[Place], Words(
        "one, or several that keep their names inside of ``output``.",
    )]  # fmt: skip
    _: KW_ONLY
    rank: Annotated[int | str | None, Words(
        "Of every module; auto: what a merge into --base can resolve.", "Input", metavar="R|auto",
        form="rank", record=True,
    )] = None  # fmt: skip
    base: Annotated[Place | None, Words(
        "Checkpoint for --rank auto and --sv-base, and for DoRA, PiSSA and their kin.", "Input",
        metavar="BASE",
    )] = None  # fmt: skip
    energy: Energy = None
    error: RelativeError = None
    size: Annotated[Size | None, Words(
        "Whole weights file at most, such as 20MB, spent where it counts.", "Input",
        metavar="SIZE", record=True,
    )] = None  # fmt: skip
    sv_ratio: SvRatio = None
    sv_sum: Annotated[float | None, Words(
        "Least rank that keeps this share of the sum of singular values, per module.", "Input",
        metavar="S", form="share", record=True,
    )] = None  # fmt: skip
    sv_min: SvMin = None
    sv_base: SvBase = None
    max_rank: Annotated[int | None, Words(
        "Cap. The least of all criteria wins.", "Input", metavar="R", form="whole", record=True,
    )] = None  # fmt: skip
    only: RankOf = ()
    output: Annotated[Place, Words(
        "Folder to create; for many adapters the folder of theirs.", "Output",
        flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    dtype: FactorType = "auto"
    to: Into = None
    program: Program = None


class Details(Options):
    """What hardly anybody wants to change of an extraction."""

    names: Annotated[Literal["v5", "v4"], Words(
        "Module names of transformers 5 in memory, or of 4.", "Advanced", record=True,
    )] = "v5"  # fmt: skip
    exact: Annotated[bool, Words(
        "Float64 eigendecompositions instead of block Lanczos: much slower.", "Advanced",
        record=True,
    )] = False  # fmt: skip
    restart: Annotated[bool, Words(
        "Drop an interrupted run with other options.", "Advanced",
    )] = False  # fmt: skip


class Extract(Write, Shown, Run, Planned, Access, Details, kw_only=False):
    """A low-rank adapter of a full fine-tune."""

    tuned: Annotated[Place, Words("the fine-tuned checkpoint.")]
    _: KW_ONLY
    base: Annotated[Place, Words("What TUNED was trained from.", "Input", metavar="BASE")]
    rank: Annotated[int | str | None, Words(
        "Of every module. auto (default): what lies above rounding noise.", "Input",
        metavar="R|auto", form="rank", record=True,
    )] = None  # fmt: skip
    energy: Energy = None
    error: RelativeError = None
    size: Annotated[Size | None, Words(
        "Whole weights file at most, such as 50MB, spent where it counts.", "Input",
        metavar="SIZE", record=True,
    )] = None  # fmt: skip
    sv_ratio: SvRatio = None
    sv_min: SvMin = None
    sv_base: SvBase = None
    max_rank: Annotated[int | None, Words(
        "Cap; 256 for auto and --size by default. The least criterion wins.", "Input",
        metavar="R", form="whole", record=True,
    )] = None  # fmt: skip
    only: RankOf = ()
    keep: Annotated[Sequence[str], Words(
        "Store these whole; none = not even biases and norms. Repeatable.", "Input",
        metavar="embeddings|all|none|REGEX", record=True,
    )] = ()  # fmt: skip
    include: Include = ()
    exclude: Annotated[Sequence[str], Words(
        "Do not factor a component, or modules that match. Repeatable.", "Input",
        metavar="PART|REGEX", flags="--skip, --exclude", record=True,
    )] = ()  # fmt: skip
    output: Annotated[Place, Words(
        "Folder to create (PEFT), or the file of another dialect, here or as s3://bucket/folder.",
        "Output", flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    dtype: Annotated[FloatType, Words(
        "Of the factors. Default: float32.", "Output", record=True,
    )] = "auto"  # fmt: skip
    to: Into = None
    save_residual: Annotated[Place | None, Words(
        "What merge --residual needs to give TUNED back, bit for bit.", "Output", metavar="FILE",
    )] = None  # fmt: skip
    program: Program = None
    rename: Rename = ()


class Convert(Write, Many, Workers, Watch, Planned, Read, Access, kw_only=False):
    """Adapters as another program stores them."""

    adapters: Annotated[Sequence[Place], Words("paths, Hub references or store addresses.")]
    _: KW_ONLY
    base: Annotated[Place | None, Words(
        "What it was trained on: its tensors name flat modules.", "Input", metavar="BASE",
    )] = None  # fmt: skip
    rank: Annotated[int | None, Words(
        "With --base: at most, of what depends on it (DoRA, OFT, PiSSA) and becomes LoRA. Default: "
        "exact.", "Input", metavar="R", form="whole", record=True,
    )] = None  # fmt: skip
    skip: Annotated[Sequence[str], Words(
        "Leave out a component (te), modules or biases. Repeatable.", "Input", metavar="PART|REGEX",
        flags="--exclude, --skip", record=True,
    )] = ()  # fmt: skip
    to: Annotated[str | None, Words(
        "The dialect, such as peft, kohya or lycoris; that of the input where only metadata "
        "change.", "Output", metavar="DIALECT", record=True,
    )] = None  # fmt: skip
    program: Program = None
    dtype: FactorType = "auto"
    metadata: Annotated[Sequence[str], Words(
        "An entry of the file's metadata, as files have it (ss_…, modelspec.…) or title, author, "
        "description, tags, license; KEY= removes it. Repeatable.", "Output",
        flags="--set", metavar="KEY=VALUE", record="set",
    )] = ()  # fmt: skip
    trigger: Annotated[str | None, Words(
        "Words that call the effect up: modelspec.trigger_phrase.", "Output", metavar="TEXT",
        record=True,
    )] = None  # fmt: skip
    output: Annotated[Place, Words(
        "Folder or file to create; DIR/ puts results into it under their names.", "Output",
        flags="-o, --output", metavar="OUT",
    )]  # fmt: skip


class Rescale(Write, Many, Workers, Watch, Planned, Read, Access, kw_only=False):
    """Adapters times a factor."""

    adapters: Annotated[Sequence[Place], Words("paths, Hub references or store addresses.")]
    factor: Annotated[float, Words(
        "of every module that no ``only`` matches; may be negative.", record=True,
    )]  # fmt: skip
    _: KW_ONLY
    only: Annotated[Sequence[str], Words(
        "Another factor for a component (te) or modules that match; the last counts. Repeatable.",
        "Input", metavar="PART|REGEX=FACTOR", record=True,
    )] = ()  # fmt: skip
    blocks: Annotated[str | None, Words(
        "A factor per block, times FACTOR: ALL, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL for "
        "Stable Diffusion, DOUBLE, SINGLE for FLUX, or one number per block or layer.", "Input",
        metavar="PRESET|W,W,…", record=True,
    )] = None  # fmt: skip
    intruders: Annotated[float | None, Words(
        "With FACTOR 1: weaken intruder dimensions to this share, 0.75.", "Input",
        metavar="LAMBDA", form="number", record=True,
    )] = None  # fmt: skip
    base: Annotated[Place | None, Words(
        "What it was trained on: replaced tensors, DoRA, PiSSA scale too.", "Input",
        metavar="BASE",
    )] = None  # fmt: skip
    output: Annotated[Place, Words(
        "Folder to create; DIR/ puts results into it under their names.", "Output",
        flags="-o, --output", metavar="OUT",
    )]  # fmt: skip
    dtype: FactorType = "auto"
    to: Into = None
    program: Program = None
