"""A page as HTML: one file that asks for nothing, in which foreign text is text.

What comes from files has one way onto the page, an expression of the template: there `safe` shows
what is hidden or long, and the template engine escapes the rest.  Pictures are checked data URIs.
The policy in the head lets nothing run but the script below it, and nothing load at all.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from loratool import __version__
from loratool.lazy import regex
from loratool.pages import curves
from loratool.pages.blocks import Page
from loratool.report.text import safe

MOST_BYTES = 2_000_000
"""Size of a page at most."""
CAP = 600
"""Longest text shown, in characters."""
_ROWS = (5000, 2000, 1000, 500, 200, 100, 25)
"""Rows of each table: as many of these as fit on the page."""
_MARKS = regex(r"([_./-]+)(?=\w)")
_DATA = Path(__file__).parent / "data"


def render(page: Page, *, most: int = MOST_BYTES) -> bytes:
    """The page; of tables that are too long the first rows, and a word of the others."""
    template, style, script = _environment().get_template("page.html"), *_own()
    for rows in _ROWS:
        text = template.render(
            page=page, rows=rows, style=Markup(style), script=Markup(script),
            policy=_policy(style, script), version=__version__,
        )  # fmt: skip
        data = text.encode("utf-8", "backslashreplace")
        if len(data) <= most:
            break
    return data


@cache
def _own() -> tuple[str, str]:
    """Style sheet and script, both ours."""
    return (_DATA / "page.css").read_text("utf-8"), (_DATA / "page.js").read_text("utf-8")


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_DATA), autoescape=True, finalize=_shown, trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    made.filters["broken"] = _broken
    made.filters["checked"] = Markup  # of data URIs made by `pictures` alone
    made.globals.update(spark_path=curves.spark_path, draw=curves.draw, type_of=_type_of)
    return made


def _broken(name: str) -> Markup:
    """A name that may go on in another line after its marks."""
    return Markup(_MARKS.sub(r"\1<wbr>", str(escape(safe(name, cap=CAP)))))


def _type_of(cell: Any) -> str:
    return type(cell).__name__


def _shown(value: Any) -> Any:
    """Foreign text as it can be shown; our own markup and numbers as they are."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return safe(value, cap=CAP) if is_text else value
