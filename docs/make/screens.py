"""Pictures of a terminal: ``python -m docs.make.screens`` (`make screens`) draws ``docs/img/``.

Each is some commands on the model of ``loratool demo``, with what they print there; times are
masked, and cores and GPUs are those of a small machine, so that the pictures are the same anywhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from unittest import mock

import click
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from docs.make.runs import TIME
from loratool.cli import run
from loratool.delta.toy import toy_files

FOLDER = Path(__file__).parents[1] / "img"
CALLED = {"base": "model", "tuned": "my-sft"}
COLUMNS = 128
SCREENS = {
    "inspect": ("loratool inspect ./style", "loratool merge ./style -o ./merged"),
    "merge": (
        "loratool merge ./style:0.8 ./sql --base ./model -o ./merged --save-undo undo.safetensors",
        "loratool verify ./merged",
        "loratool subtract ./style:0.8 ./sql --from ./merged --undo undo.safetensors -o ./back",
    ),
    "extract": ("loratool extract ./my-sft --base ./model -o ./lora",),
}
"""Picture -> the commands that it shows."""

# rich's own names a font of another host; a picture asks nobody for anything.
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace(
    "Fira Code, monospace", "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def stage() -> Iterator[None]:
    """A folder with ``model``, ``style``, ``sql`` and ``my-sft``, entered; a small machine."""
    with (
        tempfile.TemporaryDirectory(prefix="loratool-screens-") as folder,
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}),
        mock.patch("loratool.engine.machine.usable_cores", lambda: 2),
        mock.patch("torch.cuda.is_available", lambda: False),
    ):
        os.environ.pop("NO_COLOR", None)
        for name, data in toy_files():
            top, _, rest = name.partition("/")
            path = Path(CALLED.get(top, top)) / rest
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.replace(b'"base"', b'"model"'))
        yield


def screen(name: str) -> str:
    """What the terminal shows, colours included; `stage` is entered."""
    said = _Terminal()
    for line in SCREENS[name]:
        said.write(click.style("$ ", fg="green") + click.style(line, bold=True) + "\n")
        aside = _Terminal()  # on a busy machine a bar, which goes away again
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(aside):
            failed = run(shlex.split(line)[1:])
        said.write((aside.getvalue() if failed else "") + "\n")
    return TIME.sub("… s", said.getvalue().rstrip("\n"))


def drawn(shown: str, title: str) -> str:
    """A terminal as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown), soft_wrap=False)
    return console.export_svg(title=title, code_format=_FORMAT, unique_id=title.split()[-1])


def words(svg: str) -> list[str]:
    """The lines of a picture, without colours and spaces at their ends."""
    rows: dict[float, str] = {}
    # The title has no clip path; pieces of a line come from left to right.
    for y, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*clip-path[^>]*>([^<]*)</text>', svg):
        rows[float(y)] = rows.get(float(y), "") + unescape(text).replace("\xa0", " ")
    return [rows[y].rstrip() for y in sorted(rows)]


def main() -> None:
    """Draw all of them."""
    with stage():
        for name in SCREENS:
            path = FOLDER / f"{name}.svg"
            path.write_text(drawn(screen(name), f"loratool {name}") + "\n")
            print(path)


if __name__ == "__main__":
    main()
