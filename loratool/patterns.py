r"""Regular expressions of users and files, matched in bounded time.

Python's engine backtracks, so that a few characters can take years.  What the structure of an
expression proves to be quick runs here; anything else runs in a child process that a limit ends.
Python's whole syntax stays usable that way (an engine of guaranteed time, such as RE2, has no
look-arounds, and another idea of ``\w`` and ``\d``).
"""

from __future__ import annotations

import json
import math
import re

# The parser of `re` itself: reading repeats off the text would miss escapes and classes.
import re._parser as _parser  # type: ignore[import-not-found]
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from loratool.errors import UsageError
from loratool.frozen import Frozen

MAX_PATTERN = 512  # characters
MAX_STEPS = 20_000_000  # of the engine in this process; a step takes 1 to 30 ns
MAX_RESULT = 4096  # characters of a name that a substitution makes
CPU_SECONDS = 3  # of a child
_WALL_SECONDS = 20
_MEMORY = 512 << 20  # bytes

Refuse = Callable[[str], NoReturn]
"""Called with what is wrong with an expression; it must raise."""

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_WHOLE = ("POSSESSIVE_REPEAT", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT")  # never entered again

_PROGRAM = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
job = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
except (ImportError, ValueError, OSError):
    pass
names = job["names"]
for text in job["patterns"]:
    pattern = re.compile(text)
    if job["replacement"] is None:
        found = [number for number, name in enumerate(names) if pattern.search(name)]
    else:
        found = []
        for name in names:
            found.append(pattern.sub(job["replacement"], name, count=job["count"]))
            if len(found[-1]) > job["longest"]:
                break
    print(json.dumps(found), flush=True)
"""


class Pattern(Frozen):
    """A regular expression that was typed, or came from a file.

    Attributes:
        text: as written.
        compiled: what `re` makes of it; to be run by the functions of this module alone.
        refuse: what to call if it cannot be used.
    """

    text: str
    compiled: re.Pattern[str]
    refuse: Refuse


def compile_pattern(text: str, refuse: Refuse, *, within: str = "{}") -> Pattern:
    """Compile an expression; nothing is matched.

    Args:
        text: the expression.
        refuse: called with what is wrong.
        within: the expression that it becomes a part of, in the place of ``{}``.

    Example:
        >>> compile_pattern("layers.0.", print).text
        'layers.0.'
    """
    if len(text) > MAX_PATTERN:
        refuse(f"longer than {MAX_PATTERN} characters: {len(text)}")
    text = within.replace("{}", text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Pattern(text, re.compile(text), refuse)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        refuse(str(error) or type(error).__name__)


def typed_pattern(text: str, option: str) -> Pattern:
    """Compile what a user typed.

    Args:
        text: the expression.
        option: where it was typed, for the message.

    Raises:
        UsageError: LT-220, it is no regular expression; later, if matching it takes too long.
    """

    def refuse(why: str) -> NoReturn:
        raise UsageError("LT-220", f"unusable pattern of {option}", key=text[:200], got=why)

    return compile_pattern(text, refuse)


def find(patterns: Sequence[Pattern], names: Sequence[str]) -> list[frozenset[str]]:
    """The names in which each expression is found.

    Args:
        patterns: compiled.
        names: module paths.

    Example:
        >>> find([compile_pattern("mlp$", print)], ["0.mlp", "0.attn"])
        [frozenset({'0.mlp'})]
    """
    asked = list(dict.fromkeys(names))
    is_slow = [_steps(p, asked) * len(patterns) > MAX_STEPS for p in patterns]
    answers = iter(_ask([p for p, slow in zip(patterns, is_slow, strict=True) if slow], asked))
    return [
        frozenset(asked[number] for number in next(answers))
        if slow
        else frozenset(name for name in asked if pattern.compiled.search(name))
        for pattern, slow in zip(patterns, is_slow, strict=True)
    ]


def check_replacement(pattern: Pattern, replacement: str) -> None:
    """Refuse a replacement that names groups which the expression has not."""
    try:
        _parser.parse_template(replacement, pattern.compiled)
    except (re.error, IndexError) as error:
        pattern.refuse(str(error))


def substitute(
    pattern: Pattern, replacement: str, names: Sequence[str], *, count: int = 0
) -> list[str]:
    """The names with what the expression finds replaced.

    Args:
        pattern: compiled.
        replacement: as of `re.sub`; see `check_replacement`.
        names: module paths.
        count: of replacements in each name, 0 = all.

    Example:
        >>> substitute(compile_pattern("^model", print), "base", ["model.layers.0"])
        ['base.layers.0']
    """
    longest = max(map(len, names), default=0) + 1
    written = len(names) * (count or longest) * len(replacement) * longest
    if _steps(pattern, names) + written <= MAX_STEPS:
        made = [pattern.compiled.sub(replacement, name, count=count) for name in names]
    else:
        (made,) = _ask([pattern], names, replacement, count)
    if len(made) != len(names) or any(len(name) > MAX_RESULT for name in made):
        pattern.refuse(f"it makes names of more than {MAX_RESULT} characters")
    return made


def _steps(pattern: Pattern, names: Sequence[str]) -> float:
    """Most steps of a search in all names."""
    longest = max(map(len, names), default=0)
    return steps_of(pattern.text, longest) * (longest + 1) * len(names)


def _ask(
    patterns: Sequence[Pattern], names: Sequence[str],
    replacement: str | None = None, count: int = 0,
) -> list[list[Any]]:  # fmt: skip
    """Run expressions in a child; the one at which it dies is refused."""
    if not patterns:
        return []
    import subprocess

    job = {
        "patterns": [p.text for p in patterns], "names": list(names), "replacement": replacement,
        "count": count, "seconds": CPU_SECONDS, "memory": _MEMORY, "longest": MAX_RESULT,
    }  # fmt: skip
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    try:
        done = subprocess.run(
            words, input=json.dumps(job).encode(), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=_WALL_SECONDS, check=False,
        )  # fmt: skip
        text = done.stdout
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
    answers = [json.loads(line) for line in text.split(b"\n")[:-1]]
    if len(answers) < len(patterns):
        patterns[len(answers)].refuse("it takes too long on these names")
    return answers


# ------------------------------------------------------------------- what a pattern can cost


def steps_of(text: str, length: int) -> float:
    """Most steps that the engine takes to match an expression at one place of a text.

    Args:
        text: an expression that compiles.
        length: of the text.

    Example:
        >>> steps_of("(a+)+b", 60) > 1e18, steps_of("layers[.][0-9]+", 60) < 200
        (True, True)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _weigh(list(_parser.parse(text)), length)[1]
    except RecursionError:
        return math.inf


def _weigh(items: Any, length: int) -> tuple[float, float]:
    """(ways in which items can match from one place, steps to try them all), at most."""
    ways, steps = 1.0, 1.0
    for op, value in items:
        more = _weigh_item(str(op), value, length)
        ways, steps = ways * more[0], steps + ways * more[1]
    return ways, steps


def _weigh_item(name: str, value: Any, length: int) -> tuple[float, float]:
    if name in _REPEATS:
        low, high, body = value
        ways, steps = _repeated(int(low), int(high), _weigh(body, length), length)
    elif name == "BRANCH":
        ways, steps = _either([_weigh(branch, length) for branch in value[1]])
    elif name == "GROUPREF_EXISTS":
        ways, steps = _either([_weigh(branch or (), length) for branch in value[1:]])
    elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
        ways, steps = _weigh(value if name == "ATOMIC_GROUP" else value[-1], length)
    elif name == "IN":
        return 1.0, float(len(value))
    else:
        return 1.0, float(length if name.startswith("GROUPREF") else 1)
    return (1.0 if name in _WHOLE else ways), steps


def _repeated(low: int, high: int, body: tuple[float, float], length: int) -> tuple[float, float]:
    """A repeat takes as many turns as there are characters, or as many as it must."""
    ways, steps = body
    turns = min(high, low + length)
    if ways == 1:
        return float(turns - low + 1), (turns + 1) * steps
    try:
        paths = 2 * ways**turns  # no less than the sum of the powers up to this one
    except OverflowError:
        paths = math.inf
    return paths, paths * steps


def _either(branches: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(b[0] for b in branches), sum(b[1] for b in branches)
