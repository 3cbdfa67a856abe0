"""Options that several commands take: one class per thing that they are about."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from loratool.errors import UsageError
from loratool.options.words import Options, Words

Place = str | Path
Size = str | int
Progress = Callable[[int, int], None]
Executor = Literal["auto", "threads", "processes", "ray"]
FloatType = Literal["auto", "float32", "bfloat16", "float16"]

# ------------------------------------------------- options that go alone into several classes

Alpha = Annotated[float | None, Words(
    "lora_alpha of files that have no configuration.", "Advanced", metavar="A", form="number",
    record=True,
)]  # fmt: skip
Rename = Annotated[Sequence[str], Words(
    "Rewrite module names. Repeatable.", "Names", metavar="s/A/B/", record=True,
)]  # fmt: skip
Include = Annotated[Sequence[str], Words(
    "Take only a component (te), or modules that match. Repeatable.", "Input",
    metavar="PART|REGEX", record=True,
)]  # fmt: skip
ModuleWeights = Annotated[Place | None, Words(
    "YAML: component or regular expression of module names -> weight, or one per adapter.", "Input",
    metavar="FILE", record=True,
)]  # fmt: skip
Program = Annotated[str | None, Words(
    "As that program loads it: one rank, one alpha/r, nothing that it cannot hold.", "Output",
    flags="--for", metavar="PROGRAM", record="for",
)]  # fmt: skip
Into = Annotated[str | None, Words(
    "In that dialect, such as peft, kohya, comfyui or diffusers.", "Output",
    metavar="DIALECT", record=True,
)]  # fmt: skip
FactorType = Annotated[FloatType, Words(
    "Of the factors. Default: that of the inputs.", "Output", record="dtype",
)]  # fmt: skip
Against = Annotated[Place | None, Words(
    "What the adapters were trained on: for replaced tensors, DoRA, PiSSA.", "Input",
    metavar="BASE",
)]  # fmt: skip
ChunkBytes = Annotated[int | None, Words("bytes read in one piece; never changes a result.")]
Series = Annotated[
    Any, Words("of `loratool.store.series`: outputs that this one is one of, for a rerun.")
]
Energy = Annotated[float | None, Words(
    "Least rank that keeps this share of the energy, per module.", "Input", metavar="E",
    form="share", record=True,
)]  # fmt: skip
RelativeError = Annotated[float | None, Words(
    "Least rank with at most this relative error, per module.", "Input", metavar="E",
    form="share", record=True,
)]  # fmt: skip
SvRatio = Annotated[float | None, Words(
    "Keep singular values of at least the first one over X, per module.", "Input",
    metavar="X", form="ratio", record=True,
)]  # fmt: skip
SvMin = Annotated[float | None, Words(
    "Keep singular values of X or more.", "Input", metavar="X", form="number", record=True,
)]  # fmt: skip
SvBase = Annotated[float | None, Words(
    "Keep singular values of at least X times the Frobenius norm of the base's weight, such as "
    "0.0003.", "Input", metavar="X", form="number", record=True,
)]  # fmt: skip
RankOf = Annotated[Sequence[str], Words(
    "Another rank for a component (te), for kernels beyond 1x1 (conv) or for modules that match, "
    "in place of --rank and --max-rank; the last counts. Repeatable.", "Input",
    metavar="PART|REGEX=R", record=True,
)]  # fmt: skip


# --------------------------------------------------------------------------------- groups


class AlphaOnly(Options):
    """What commands that only look at an adapter ask of what its files do not say."""

    alpha: Alpha = None


class Read(Options):
    """What a user may say about an adapter that its files do not."""

    alpha: Alpha = None
    rank_from: Annotated[Literal["file", "config"] | None, Words(
        "Which rank counts where they contradict.", "Advanced", record=True,
    )] = None  # fmt: skip
    mha_out_proj: Annotated[Literal["once", "twice"] | None, Words(
        "nn.MultiheadAttention out_proj. Default: what was trained.", "Advanced", record=True,
    )] = None  # fmt: skip
    moe_layout: Annotated[Literal["eoi", "eio"] | None, Words(
        "How square experts are stored: (E, out, in) or (E, in, out).", "Advanced", record=True,
    )] = None  # fmt: skip
    experts_b_order: Annotated[Literal["rank-major", "expert-major"] | None, Words(
        "Packing of experts in lora_B. Default: by the file, else rank-major.", "Advanced",
        record=True,
    )] = None  # fmt: skip
    include: Include = ()

    def check(self) -> None:
        """Refuse an alpha that no file has."""
        super().check()
        from loratool.adapter import MAX_ALPHA

        if self.alpha is not None and not abs(self.alpha) <= MAX_ALPHA:
            raise UsageError("LT-271", "alpha out of range", got=self.alpha,
                             expected=f"a number of at most {MAX_ALPHA:g}")  # fmt: skip


class Names(Read):
    """How modules find their targets in a base, and which of them do."""

    rename: Rename = ()
    skip: Annotated[Sequence[str], Words(
        "Leave out a component (te), modules or biases. Repeatable.", "Names", metavar="PART|REGEX",
        flags="--exclude, --skip", record=True,
    )] = ()  # fmt: skip
    allow_unmatched: Annotated[bool, Words(
        "Leave out and report what has no target.", "Names", record=True,
    )] = False  # fmt: skip
    untie: Annotated[bool, Words(
        "Give the output head weights of its own.", "Names", record=True,
    )] = False  # fmt: skip
    keep_tied: Annotated[bool, Words(
        "Change the tensor that input embedding and output head share.", "Names", record=True,
    )] = False  # fmt: skip
    resize_embeddings: Annotated[bool, Words(
        "Let replaced embeddings change the vocabulary size.", "Names", record=True,
    )] = False  # fmt: skip


class Codes(Options):
    """What becomes of a base's quantised weights."""

    dequantize: Annotated[bool, Words(
        "Of a quantised base: write plain numbers, bfloat16 or --dtype.", "Output", record=True,
    )] = False  # fmt: skip
    requant: Annotated[bool, Words(
        "Of a quantised base: keep its format, code changed weights anew.", "Output", record=True,
    )] = False  # fmt: skip
    simulate_quant: Annotated[Literal["nf4", "int8", "fp8"] | None, Words(
        "Merge into what quantising leaves of the base, in 16 bits: the weights that a QLoRA "
        "adapter was trained on.", "Output", record=True,
    )] = None  # fmt: skip


class Mix(Options):
    """Coefficients of several adapters."""

    weights: Annotated[Sequence[float] | None, Words(
        "Coefficients in order, instead of ADAPTER:W.", "Input", form="weights",
    )] = None  # fmt: skip
    mean: Annotated[bool, Words("Divide by the number of adapters.", "Input")] = False
    ema: Annotated[float | str | None, Words(
        "Average checkpoints of one run, the oldest first: decay 0.95, or sigma=0.1 for EDM2's "
        "power function.", "Input", metavar="BETA|sigma=S",
    )] = None  # fmt: skip
    module_weights: ModuleWeights = None


class Round(Options):
    """How sums are rounded to the type that they are stored in."""

    exact: Annotated[bool, Words(
        "Every element correctly rounded: the same bytes on any machine and device.", "Output",
    )] = False  # fmt: skip
    rounding: Annotated[Literal["nearest", "stochastic"], Words(
        "stochastic: small changes survive on average, at up to twice the error.", "Output",
        record=True,
    )] = "nearest"  # fmt: skip
    seed: Annotated[int | None, Words(
        "Of stochastic rounding. Default: 0.", "Output", metavar="N", record=True,
    )] = None  # fmt: skip


class Shown(Options):
    """What is to be looked at, not read."""

    html: Annotated[Place | None, Words(
        "Also as a page for a browser, one new file that asks nothing of the network.", "Output",
        metavar="FILE.html",
    )] = None  # fmt: skip


class Write(Options):
    """What every command that writes takes."""

    force: Annotated[bool, Words(
        "Replace an earlier output of loratool, never anything else.", "Output",
    )] = False  # fmt: skip
    dry_run: Annotated[bool, Words(
        "Print the plan and what it would cost; write nothing.", "Output",
    )] = False  # fmt: skip
    provenance: Annotated[bool, Words(
        "Do not record inputs and options in the output.", "Output", flags="--no-provenance",
    )] = True  # fmt: skip
    series: Series = None


class Many(Options):
    """What commands that take one adapter after the other ask."""

    keep_going: Annotated[bool, Words(
        "Of many: leave out and name what cannot be done, do the others.", "Output",
    )] = False  # fmt: skip


class Rerun(Options):
    """What commands that write a checkpoint take on top."""

    restart: Annotated[bool, Words(
        "Drop an interrupted run instead of going on with it.", "Advanced",
    )] = False  # fmt: skip
    checksum: Annotated[bool, Words(
        "Record the sha256 of every input file; reads the base once more.", "Advanced",
    )] = False  # fmt: skip


class Workers(Options):
    """How much of the machine may be used."""

    threads: Annotated[int | None, Words(
        "Workers. Default: what pays here (`loratool doctor`). Never changes a result.",
        "Resources", metavar="N", form="whole",
    )] = None  # fmt: skip
    max_memory: Annotated[Size | None, Words(
        "Limit for the planned peak, such as 2GB. Default: what is free.", "Resources",
        metavar="SIZE",
    )] = None  # fmt: skip


class Crew(Workers):
    """Who does the work; never a byte of difference."""

    executor: Annotated[Executor, Words(
        "Who does the work: threads, processes, or tasks of a Ray cluster. Never changes a result. "
        "Default: auto.", "Resources",
    )] = "auto"  # fmt: skip
    ray_address: Annotated[str | None, Words(
        "Of the cluster. Default: the one that Ray finds, else one on this machine.", "Resources",
        metavar="HOST:PORT",
    )] = None  # fmt: skip

    def check(self) -> None:
        """Refuse a cluster for nobody."""
        super().check()
        if self.ray_address is not None and self.executor != "ray":
            raise UsageError("LT-279", "--ray-address is for --executor ray", got=self.executor)


class Watch(Options):
    """How a run is watched: functions, of Python alone."""

    progress: Annotated[Progress | None, Words("called with (done, in all).")] = None
    on_work: Annotated[Callable[[str], None] | None, Words(
        "called with the name of what is at work, from any thread.",
    )] = None  # fmt: skip


class Planned(Options):
    """What is known before the work."""

    on_plan: Annotated[Callable[[Any], None] | None, Words(
        "called with the report of the plan, before tensors are read; not with ``dry_run``.",
    )] = None  # fmt: skip


class Run(Crew, Watch):
    """Where a plan runs, and with how much."""

    device: Annotated[str, Words(
        "Where to compute; cuda:0,1 shares the steps between GPUs. Default: auto.", "Resources",
        metavar="auto|cpu|cuda[:N]",
    )] = "auto"  # fmt: skip


class Network(Options):
    """How sources may be reached."""

    offline: Annotated[bool, Words("Never touch the network.", "General")] = False
    yes: Annotated[bool, Words(
        "Agree to large downloads.", "General", flags="-y, --yes",
    )] = False  # fmt: skip


class Access(Network):
    """How sources may be reached, and how far files are trusted."""

    max_header: Annotated[Size | None, Words(
        "Largest safetensors header accepted. Default: 32MiB.", "Advanced", metavar="SIZE",
    )] = None  # fmt: skip
    allow_pickle: Annotated[bool, Words(
        "Convert .bin and .pt files first, in a process that can do nothing else.", "Advanced",
    )] = False  # fmt: skip


class Nonfinite(Options):
    """What numbers may be."""

    allow_nonfinite: Annotated[bool, Words(
        "Let NaN and infinity of the inputs pass; they are counted.", "Advanced",
    )] = False  # fmt: skip
