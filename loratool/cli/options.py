"""Options that several commands share, and help that is grouped by section."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from loratool.cli.render import safe
from loratool.errors import NEEDS_CONSENT, UsageError

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = ("Input", "Output", "Names", "Resources", "General", "Advanced")
"""Order of the sections in every help page."""

_WEIGHT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


class SectionOption(click.Option):
    """An option that knows its section of the help page.

    Args:
        section: one of `SECTIONS`.
    """

    def __init__(self, *args: Any, section: str = "General", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists options by section, then examples.

    Args:
        examples: command lines, each with an optional comment after ``#``.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", HELP_SETTINGS)
        super().__init__(*args, **kwargs)
        self.examples = examples

    def invoke(self, ctx: click.Context) -> Any:
        """Run; at a terminal a large download is asked for, elsewhere ``-y`` agrees."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if error.code != NEEDS_CONSENT or not _can_ask(ctx):
                raise
            if not click.confirm(f"{safe(error.what)}: {safe(error.got)}. Go on?", err=True):
                raise
        ctx.params["yes"] = True
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        for section in SECTIONS:
            rows = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
                and getattr(param, "section", "General") == section
                and (record := param.get_help_record(ctx)) is not None
            ]
            if rows:
                with formatter.section(click.style(section, bold=True)):
                    formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, self.examples)


def _can_ask(ctx: click.Context) -> bool:
    """True if somebody is there to answer."""
    is_watched = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return is_watched and not ctx.params.get("as_json") and not ctx.params.get("yes", True)


HELP_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as they are, comments dimmed."""
    if not examples:
        return
    with formatter.section(click.style("Examples", bold=True)):
        for example in examples:
            command, mark, comment = example.partition("  #")
            formatter.write(f"  {command}{click.style(mark + comment, dim=True)}\n")


def option(*names: str, section: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.option` with a section."""
    return click.option(*names, cls=SectionOption, section=section, **kwargs)


class WeightList(click.ParamType[tuple[float, ...]]):
    """``0.7,-0.3``: plain finite decimals, no exponent."""

    name = "W,W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse, or fail naming the part that is not a number."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        from loratool.store.source import is_weight

        for part in parts:
            if not is_weight(part):
                self.fail(f"{part[:80]!r} is not a plain decimal number", param, ctx)
        return tuple(float(part) for part in parts)


class WholeNumber(click.ParamType[int]):
    """A whole number above 0.

    Args:
        name: placeholder in the help page.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse, or say why not."""
        text = str(value)
        if not _is_whole(text):
            raise click.BadParameter(self.explain(text), ctx=ctx, param=param)
        return int(text)

    def explain(self, text: str) -> str:
        """Why ``text`` is refused."""
        return f"{text[:80]!r} is not a whole number above 0"


def _is_whole(text: str) -> bool:
    """True for a whole number above 0 that any option can take."""
    return text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0


class Number(click.ParamType[float]):
    """A plain finite decimal, as weights are.

    Args:
        name: placeholder in the help page.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or say why not."""
        from loratool.store.source import MAX_WEIGHT, is_weight

        if not is_weight(str(value)):
            raise click.BadParameter(
                f"{str(value)[:80]!r} is not a plain decimal number of at most {MAX_WEIGHT:g}",
                ctx=ctx, param=param,
            )  # fmt: skip
        return float(value)


class RankNumber(click.ParamType[int | str]):
    """A rank or ``auto``; a fraction is probably meant as a share of energy."""

    name = "R|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Parse, or say why not."""
        text = str(value)
        if text == "auto":
            return text
        if _is_whole(text):
            return int(text)
        why = f"{text[:80]!r} is neither a whole number above 0 nor auto"
        if _WEIGHT.fullmatch(text):
            why += "; a share of the energy is --energy"
        raise click.BadParameter(why, ctx=ctx, param=param)


class Share(click.ParamType[float]):
    """A number between 0 and 1, such as 0.99."""

    name = "SHARE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse, or say why not."""
        text = str(value)
        if not (_WEIGHT.fullmatch(text) and 0 <= float(text) <= 1):
            raise click.BadParameter(
                f"{text!r} is not a number from 0 to 1, such as 0.99", ctx=ctx, param=param
            )
        return float(text)


def general(command: F) -> F:
    """``--json``, ``-q``, ``-v``: every command has them."""
    for add in (
        option("-v", "--verbose", is_flag=True, section="General", help="Say more; trace errors."),
        option("-q", "--quiet", is_flag=True, section="General", help="Results and warnings only."),
        option("--json", "as_json", is_flag=True, section="General",
               help="One JSON object on stdout, also for errors."),
    ):  # fmt: skip
        command = add(command)
    return command


def network(command: F) -> F:
    """``--offline`` and ``-y``."""
    for add in (
        option("-y", "--yes", is_flag=True, section="General", help="Agree to large downloads."),
        option("--offline", is_flag=True, section="General", help="Never touch the network."),
    ):  # fmt: skip
        command = add(command)
    return command


def workers(command: F) -> F:
    """``--threads`` and ``--max-memory``."""
    for add in (
        option("--max-memory", metavar="SIZE", section="Resources",
               help="Limit for the planned peak, such as 2GB. Default: what is free."),
        option("--threads", type=WholeNumber("N"), section="Resources",
               help="Workers. Default: twice the cores, at most 8. Never changes a result."),
    ):  # fmt: skip
        command = add(command)
    return command


def resources(command: F) -> F:
    """``--device``, ``--threads``, ``--max-memory``."""
    add = option(
        "--device", default="auto", metavar="auto|cpu|cuda[:N]", section="Resources",
        help="Where to compute. Default: auto.",
    )  # fmt: skip
    return add(workers(command))


def writing(command: F) -> F:
    """Options of every command that writes."""
    for add in (
        option("--no-provenance", "provenance", flag_value=False, default=True, type=bool,
               section="Output", help="Do not record inputs and options in the output."),
        option("--dry-run", is_flag=True, section="Output",
               help="Print the plan and what it would cost; write nothing."),
        option("--force", is_flag=True, section="Output",
               help="Replace an earlier output of loratool, never anything else."),
    ):  # fmt: skip
        command = add(command)
    return command


def factor_dtype(command: F) -> F:
    """``--dtype`` of commands that write an adapter."""
    return option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
        section="Output", help="Of the factors. Default: that of the inputs.",
    )(command)  # fmt: skip


def program(command: F) -> F:
    """``--for``: commands that write an adapter."""
    return option(
        "--for", "program", metavar="peft|vllm|llama.cpp", section="Output",
        help="As that program loads it: one rank, one alpha/r, nothing that it cannot hold.",
    )(command)  # fmt: skip


def checkpoint_writing(command: F) -> F:
    """``--restart`` and ``--checksum``: commands that write a checkpoint."""
    for add in (
        option("--checksum", is_flag=True, section="Advanced",
               help="Record the sha256 of every input file; reads the base once more."),
        option("--restart", is_flag=True, section="Advanced",
               help="Drop an interrupted run instead of going on with it."),
    ):  # fmt: skip
        command = add(command)
    return command


def rounding(command: F) -> F:
    """``--exact``, ``--rounding``, ``--seed``."""
    for add in (
        option("--seed", type=int, metavar="N", section="Output",
               help="Of stochastic rounding. Default: 0."),
        option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest",
               section="Output",
               help="stochastic: small changes survive on average, at up to twice the error."),
        option("--exact", is_flag=True, section="Output",
               help="Every element correctly rounded: the same bytes on any machine and device."),
    ):  # fmt: skip
        command = add(command)
    return command


def module_weights(command: F) -> F:
    """``--module-weights``."""
    return option(
        "--module-weights", metavar="FILE", section="Input",
        help="YAML: regular expression of module names -> weight, or one per adapter.",
    )(command)  # fmt: skip


def mixing(command: F) -> F:
    """Coefficients of several adapters: `merge`, `subtract` and `verify`."""
    for add in (
        module_weights,
        option("--mean", is_flag=True, section="Input",
               help="Divide by the number of adapters."),
        option("--weights", type=WeightList(), section="Input",
               help="Coefficients in order, instead of ADAPTER:W."),
    ):  # fmt: skip
        command = add(command)
    return command


def against(command: F) -> F:
    """``--base`` of `subtract` and `swap`."""
    return option(
        "--base", metavar="BASE", section="Input",
        help="What the adapters were trained on: for replaced tensors, DoRA, PiSSA.",
    )(command)  # fmt: skip


def rename(command: F) -> F:
    """``--rename``."""
    return option(
        "--rename", multiple=True, metavar="s/A/B/", section="Names",
        help="Rewrite module names. Repeatable.",
    )(command)  # fmt: skip


def names(command: F) -> F:
    """How modules find their targets."""
    for add in (
        option("--resize-embeddings", is_flag=True, section="Names",
               help="Let replaced embeddings change the vocabulary size."),
        option("--keep-tied", is_flag=True, section="Names",
               help="Change the tensor that input embedding and output head share."),
        option("--untie", is_flag=True, section="Names",
               help="Give the output head weights of its own."),
        option("--allow-unmatched", is_flag=True, section="Names",
               help="Leave out and report what has no target."),
        option("--skip", multiple=True, metavar="PART|REGEX", section="Names",
               help="Leave out a component (te) or modules. Repeatable."),
        rename,
    ):  # fmt: skip
        command = add(command)
    return command


def trust(command: F) -> F:
    """How far input files are trusted."""
    for add in (
        option("--allow-pickle", is_flag=True, section="Advanced",
               help="Convert .bin and .pt files first, in a process that can do nothing else."),
        option("--max-header", metavar="SIZE", section="Advanced",
               help="Largest safetensors header accepted. Default: 32MiB."),
    ):  # fmt: skip
        command = add(command)
    return command


def nonfinite(command: F) -> F:
    """``--allow-nonfinite``: `merge` and `verify`."""
    add = option(
        "--allow-nonfinite", is_flag=True, section="Advanced",
        help="Let NaN and infinity of the inputs pass; they are counted.",
    )  # fmt: skip
    return add(command)


def alpha(command: F) -> F:
    """``--alpha``."""
    return option(
        "--alpha", type=Number("A"), metavar="A", section="Advanced",
        help="lora_alpha of files that have no configuration.",
    )(command)  # fmt: skip


def reading(command: F) -> F:
    """What adapter files do not say."""
    for add in (
        option("--experts-b-order", type=click.Choice(["rank-major", "expert-major"]),
               section="Advanced",
               help="Packing of experts in lora_B. Default: by the file, else rank-major."),
        option("--moe-layout", type=click.Choice(["eoi", "eio"]), section="Advanced",
               help="How square experts are stored: (E, out, in) or (E, in, out)."),
        option("--mha-out-proj", type=click.Choice(["once", "twice"]), section="Advanced",
               help="nn.MultiheadAttention out_proj. Default: what was trained."),
        option("--rank-from", type=click.Choice(["file", "config"]), section="Advanced",
               help="Which rank counts where they contradict."),
        alpha,
    ):  # fmt: skip
        command = add(command)
    return command


def onto_base(command: F) -> F:
    """What `merge`, `subtract`, `swap` and `verify` share: adapters beside a checkpoint."""
    for add in (nonfinite, trust, reading, general, network, resources, names):
        command = add(command)
    return command
