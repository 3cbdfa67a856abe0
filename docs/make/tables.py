"""Tables of the registries: dialects, kinds, methods, codecs, programs, families, exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loratool import errors
from loratool.archs.family_files import families
from loratool.dialects import programs as loaders
from loratool.dialects.registry import DIALECTS
from loratool.errors import LoratoolError
from loratool.kinds import KINDS
from loratool.methods import METHODS, Method
from loratool.quant.find import CODECS

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"(?<![\w#\[-])LT-(\d{3})(?![\w\]-])")

EXIT_CODES = {
    0: "done; what was skipped on request is in the report",
    **{kind.exit_code: " ".join((kind.__doc__ or "").split()).rstrip(".")
       for kind in vars(errors).values()
       if isinstance(kind, type) and issubclass(kind, LoratoolError) and kind is not LoratoolError
       and kind is not errors.AlreadyMadeError},
    130: "interrupted (Ctrl-C); 143 by SIGTERM, 129 by SIGHUP. The same command goes on",
    141: "the reader of the report left (`| head`); the output is complete",
}  # fmt: skip
"""Code -> what it means, the classes of errors in their own words."""


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [row(head), "|" + "---|" * len(head), *map(row, rows)]


def codes() -> list[str]:
    """The numbers of all errors, as their page has them."""
    page = (ROOT / "docs" / "errors.md").read_text()
    return re.findall(r"^\| (LT-\d{3}) \|", page, re.M)


def errors_of() -> int:
    """How many errors have a number."""
    return len(codes())


def link_errors(text: str, up: str = "../") -> str:
    """Numbers of errors as links to their row."""
    return CODE.sub(rf"[LT-\1]({up}errors.md#lt-\1)", text)


def anchored(page: str) -> str:
    """The page of errors with an anchor per row."""
    return re.sub(r"^\| LT-(\d{3}) \|", r'| <span id="lt-\1">LT-\1</span> |', page, flags=re.M)


def _words(text: str) -> str:
    """A paragraph in one line."""
    return " ".join(text.split())


def _yes(value: object) -> str:
    return "yes" if value else ""


def dialects() -> Iterator[str]:
    """The page of dialects."""
    yield from ("# Dialects", "")
    yield _words("""
        A dialect is how a program names and stores the tensors of an adapter. loratool tells it
        from the file; `--to NAME` writes it. What is recognised but not read is refused by name,
        with what to do instead.
    """)
    yield ""
    yield from table(("name", "what", "is a", "read", "written (`--to`)", "library"), [
        (f"`{d.name}`", d.title, d.form, _yes(d.is_read), _yes(d.is_written) or (
            f"as `{d.written_as}`" if d.written_as else ""), d.library or "")
        for d in DIALECTS
    ])  # fmt: skip
    yield ""
    yield _words("""
        A new one is a table in one module: [Adding a dialect](../adding_a_dialect.md). Other
        packages add theirs by the entry point `loratool.dialects`.
    """)


def kinds() -> Iterator[str]:
    """The page of kinds of change."""
    yield from ("# Kinds of change", "")
    yield _words("""
        A kind is how a change of a weight is stored. *Adds*: W' − W does not depend on W, so that
        it can be merged with others, subtracted and compressed without the base. *Needs of W*: what
        one block of the result depends on.
    """)
    yield ""
    yield from table(("name", "what", "tensors", "may have", "adds", "needs of W", "in PEFT"), [
        (f"`{k.name}`", k.title, " ".join(f"`{r}`" for r in k.roles),
         " ".join(f"`{r}`" for r in k.optional), _yes(k.is_additive),
         {"block": "that block" if not k.is_additive else "nothing", "norms": "its norms",
          "rows": "its rows", "all": "all of it"}[k.reach], k.method)
        for k in KINDS
    ])  # fmt: skip
    yield ""
    yield "[Adding a kind](../adding_a_kind.md)."


SPACES = {
    "cat": "Exact sums, factors side by side",
    "dense": "On the elements of ΔW",
    "core": "On coordinates in a basis common to all adapters",
    "joint": "On the right factors over a common left basis",
    "factor": "On lora_A and lora_B apart, as PEFT does: not the sum of the adapters",
}


def methods() -> Iterator[str]:
    """The page of methods."""
    yield from ("# Merge methods", "")
    yield _words("""
        `merge A B --method NAME`, with each other or, by the dense ones, straight into a base.
        `--param NAME=VALUE` sets a parameter. The laws are tested: *identity*: one adapter at
        weight 1 comes back; *scale*: all weights times c give c times the result; *sign*: also for
        c = −1; *order*: it does not matter.
    """)
    for space, title in SPACES.items():
        yield from ("", f"## {title}", "")
        yield from table(("method", "what", "parameters", "laws", "after"), [
            (f"`{m.name}`", m.title, _params(m), ", ".join(m.laws), _paper(m.paper))
            for m in METHODS if m.space == space
        ])  # fmt: skip
    yield from ("", "[Adding a method](../adding_a_method.md).")


def _params(method: Method) -> str:
    return "<br>".join(f"`{p.name}={p.default}` {p.help} ({p.allowed})" for p in method.params)


def _paper(text: str) -> str:
    name = re.fullmatch(r"arXiv:([\d.]+)", text)
    return f"[{text}](https://arxiv.org/abs/{name[1]})" if name else text


def codecs() -> Iterator[str]:
    """The page of codecs."""
    yield from ("# Quantised bases", "")
    yield _words("""
        Weights that are stored in codes. `merge --dequantize` writes plain numbers, `merge
        --requant` keeps the format where it can be written. What is not in the table is refused.
    """)
    yield ""
    yield from table(("codec", "what", "checkpoints of", "`--dequantize`", "`--requant`"), [
        (f"`{c.name}`", c.title, ", ".join(c.methods), "yes", _yes(c.writes))
        for c in CODECS.values()
    ])  # fmt: skip
    yield from ("", "[Adding a codec](../adding_a_codec.md).")


def model_families() -> Iterator[str]:
    """The page of families."""
    yield from ("# Families of image, video and language models", "")
    yield _words("""
        A family is a map between the names of one model's modules: those of the original code, of
        diffusers, and the flat ones of trainers. It tells what a file was made for, and finds the
        target of names that have lost their dots. Models that are not here need no map when their
        adapter has the base's own names.
    """)
    yield ""
    yield from table(("name", "model", "part", "rows", "trainers call it"), [
        (f"`{f.name}`", f.title, f.component, str(len(f.rows)),
         ", ".join(f"`{v}`" for v in f.versions))
        for f in families().values()
    ])  # fmt: skip
    yield from ("", "A family is one data file: [Adding a family](../adding_a_family.md).")


def programs() -> Iterator[str]:
    """The page of programs."""
    yield from ("# Programs", "")
    yield _words("""
        `loratool check ADAPTER --for NAME` simulates a program's loader; `--for NAME` on writing
        commands makes a form that it loads. Every rule with its source: [Programs and their
        rules](../programs.md).
    """)
    yield ""
    yield from table(("name", "program", "rules read from version", "models", "rules", "mended"), [
        (f"`{p.name}`", p.title, p.version, "images" if p.is_of_images else "language",
         str(len(p.opens) + len(p.rules)),
         str(sum(r.is_mended for r in (*p.opens, *p.rules))))
        for p in loaders.programs()
    ])  # fmt: skip


def exit_codes() -> Iterator[str]:
    """The page of exit codes."""
    yield from ("# Exit codes", "")
    yield from table(("code", "what"), [(f"`{c}`", text) for c, text in EXIT_CODES.items()])
    yield ""
    yield _words("""
        The first digit of an error's number is its exit code (`LT-0nn` is 1, a bug; `LT-1nn` is
        10): [Errors](../errors.md). With `--json` failures are one object on stdout too, with
        `error.code`, `error.exit_code` and the fields of the message.
    """)


PAGES = {
    "tables/dialects.md": dialects,
    "tables/kinds.md": kinds,
    "tables/methods.md": methods,
    "tables/codecs.md": codecs,
    "tables/programs.md": programs,
    "tables/families.md": model_families,
    "tables/exit-codes.md": exit_codes,
}
"""Path of a page -> what makes its lines."""
