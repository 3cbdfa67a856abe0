"""Command lines of the pages: found, checked, run in the scene, and shown with what they print.

In a page a command stands in a fence, or as a code span that begins with ``loratool``::

    ```console
    $ loratool inspect ./style
    $ loratool check ./style --for vllm   # exit code 10
    ```

Fences are run from top to bottom in one copy of the scene, spans each in a copy of its own; their
output is put in when the page is made.  Words behind ``console`` say why a fence cannot be run
here (``console needs the Hub``): its lines are only parsed, and the page says so.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import click

from docs.make.scene import MADE, build
from loratool.cli import run
from loratool.cli.group import COMMANDS, MODULES
from loratool.cli.options import WHOLE

FENCE = re.compile(r"^```(console|python)(?: (\S[^\n]*))?\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`(loratool [^`]+)`(?!`)")
COLUMNS = "100"
LONGEST = 240  # of a line that is shown
HOME = Path.home()
FAR = re.compile(r"(^|=)hf://")
TIME = re.compile(r"(?<=[ ·])\d+(\.\d+)? (ms|s|min)\b(?! of disk)")


@dataclass(frozen=True)
class Line:
    """A command line: its words without ``loratool``, and the exit code that it should have."""

    text: str
    words: tuple[str, ...]
    code: int = 0

    @property
    def is_far(self) -> bool:
        """It cannot be run without the Hub."""
        return self.words[0] in ("pull", "push") or any(map(FAR.search, self.words))

    @property
    def is_form(self) -> bool:
        """It shows a form (``merge ADAPTER…``), or just names a command."""
        return len(self.words) == 1 or any(
            "…" in w or (w.isupper() and len(w) > 1) for w in self.words
        )


def parse(text: str) -> Line:
    """``loratool words  # exit code 10``."""
    command, _, remark = text.partition("  #")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "loratool", text
    code = re.search(r"exit code (\d+)", remark)
    return Line(text, tuple(words[1:]), int(code[1]) if code else 0)


def typed(fence: str) -> Iterator[str]:
    """The lines of a console fence that begin with a prompt, those that go on joined to them."""
    yield from re.findall(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)$", fence, re.M)


def lines_of(page: str) -> Iterator[Line]:
    """Every command line of a page."""
    for fence in FENCE.finditer(page):
        if fence[1] == "console":
            yield from (parse(t) for t in typed(fence[3]) if t.startswith("loratool "))
    yield from (parse(span[1]) for span in SPAN.finditer(FENCE.sub("", page)))


def check(line: Line) -> None:
    """Raise if a line has a command or option that does not exist."""
    name = line.words[0]
    if name.startswith("-"):
        return
    assert name in COMMANDS, f"{line.text}: no command {name}"
    command = import_module(f"loratool.cli.{MODULES.get(name, name)}").command
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    for word in line.words[1:]:
        flag = word.split("=")[0]
        assert not re.fullmatch(r"--?[a-z][a-z-]*", flag) or flag in known, f"{line.text}: {flag}"


class Stage:
    """Copies of one scene; a context."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="loratool-docs-")
        self._scene = Path(self._root.name) / "scene"
        self._home = Path(self._root.name) / "home"
        self._scene.mkdir()
        self._home.mkdir()
        build(self._scene)
        self._count = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self._root.cleanup()

    @contextlib.contextmanager
    def fresh(self, *without: str) -> Iterator[Path]:
        """A new copy, less some files: the working directory meanwhile."""
        self._count += 1
        place = Path(self._root.name) / str(self._count) / "work"
        shutil.copytree(self._scene, place, ignore=lambda top, _: without if Path(top) == (
            self._scene) else ())  # fmt: skip
        seen = _environment(self._home)
        with contextlib.chdir(place), mock.patch.dict(os.environ, seen, clear=True):
            yield place
        shutil.rmtree(place.parent)


def _environment(home: Path) -> dict[str, str]:
    """What the commands of a page see: a home of their own, which some of them write into."""
    kept = ("PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TMPDIR", "PYTHONPATH")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": str(home), "SHELL": "/bin/bash", "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1", "COLUMNS": COLUMNS, "NO_COLOR": "1",
    }  # fmt: skip


def output_of(line: Line) -> str:
    """Run a line here and return what a terminal would show; times are masked."""
    check(line)
    words = [w for word in line.words for w in _globbed(word)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(words)
    text = said.getvalue()
    assert code == line.code, f"$ {line.text}\nexit code {code}, not {line.code}:\n{text}"
    return TIME.sub("… s", _masked(text))


def _masked(text: str) -> str:
    """Without what is only so on this machine: its folders."""
    places = {str(Path.cwd()): ".", os.environ["HOME"]: "~", sys.prefix: ".venv",
              str(HOME): "~"}  # fmt: skip
    for place, shown in places.items():
        text = text.replace(place, shown)
    return text


def shortened(said: str, most: int = 32) -> str:
    """Fewer lines, the first and the last ones; none too long for a page."""
    lines = [one if len(one) <= LONGEST else one[: LONGEST - 1] + "…" for one in said.splitlines()]
    if len(lines) > most:
        left = len(lines) - most + 1
        lines = [*lines[: most - 8], f"… {left} more lines", *lines[-7:]]
    return "\n".join(lines) + "\n"


def clear_output(line: Line) -> None:
    """Delete what the scene has under the name that a line writes: of a page, not of the scene."""
    if "-o" in line.words:
        path = Path(line.words[line.words.index("-o") + 1])
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _globbed(word: str) -> list[str]:
    """What a shell makes of a word."""
    if "*" not in word or "=" in word or "\\" in word:
        return [word]
    return sorted(map(str, Path().glob(word))) or [word]


def played(page: str, stage: Stage) -> str:
    """A page with the output of its fences; every other command line of it is run too."""
    with stage.fresh(*MADE):
        page = FENCE.sub(_played, page)
    spans = (parse(m[1]) for m in SPAN.finditer(FENCE.sub("", page)))
    for line in dict.fromkeys(spans):
        check(line)
        if not (line.is_far or line.is_form):
            with stage.fresh():
                clear_output(line)
                output_of(line)
    return page


def _played(fence: re.Match[str]) -> str:
    language, reason, body = fence[1], fence[2], fence[3]
    if reason:
        for text in typed(body) if language == "console" else ():
            if text.startswith("loratool "):
                check(parse(text))
        return f"```{language}\n{body}```\n\n*Not run when this page is made: {reason}.*"
    if language == "python":
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(body, "page", "exec"), {})
        shown = f"\n```text\n{said.getvalue()}```" if said.getvalue() else ""
        return f"```python\n{body}```{shown}"
    shown = []
    for text in typed(body):
        said = output_of(parse(text)) if text.startswith("loratool ") else _shell(text)
        said = shortened(said)
        shown.append(f"$ {text}\n{said}")
    return "```console\n" + "\n".join(part.rstrip("\n") + "\n" for part in shown) + "```"


def _shell(text: str) -> str:
    """Of other programs only what is harmless and the same everywhere."""
    import subprocess

    assert re.match(r"(cat|head|cmp|ls) [\w./ *-]+$", text), f"not run in a page: {text}"
    done = subprocess.run(text, shell=True, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


def help_of(name: str) -> str:
    """What ``loratool NAME --help`` prints."""
    command = import_module(f"loratool.cli.{MODULES.get(name, name)}").command
    assert isinstance(command, click.Command)
    with mock.patch.dict(os.environ, {"COLUMNS": COLUMNS, "NO_COLOR": "1"}):
        context = click.Context(command, info_name=f"loratool {name}", max_content_width=100)
        context.meta[WHOLE] = True
        return command.get_help(context)
