"""Reading pages: what an HTML parser finds in them."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input", "br", "wbr", "path", "rect"}
ALONE = {"script", "style"}


@dataclass
class Cell:
    text: str = ""
    value: float | None = None


@dataclass
class Table:
    kind: str = ""
    caption: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def column(self, head: str) -> list[Cell]:
        """Cells below a head."""
        at = [c.text for c in self.rows[0]].index(head)
        return [row[at] for row in self.rows[1:]]


class Page(HTMLParser):
    """A page: its tags with their attributes, its text, tables, and what stands alone."""

    def __init__(self, source: bytes | Path) -> None:
        super().__init__(convert_charrefs=True)
        data = source.read_bytes() if isinstance(source, Path) else source
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tables: list[Table] = []
        self.own: dict[str, list[str]] = {"script": [], "style": []}
        self._in, self._is_in_table = "", False
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        self._in = tag if tag in (*ALONE, "caption") else self._in
        if tag in ALONE:
            self.own[tag].append("")
        if tag == "table":
            self.tables.append(Table(found["class"].split()[0]))
            self._is_in_table = True
        if tag == "tr":
            self.tables[-1].rows.append([])
        if tag in ("td", "th"):
            value = found.get("data-v")
            self.tables[-1].rows[-1].append(Cell("", None if value is None else float(value)))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""
        self._is_in_table = self._is_in_table and tag != "table"

    def handle_data(self, data: str) -> None:
        if self._in in ALONE:
            self.own[self._in][-1] += data
            return
        self.text += data
        if self._in == "caption":
            self.tables[-1].caption += data
        elif self._is_in_table and self.tables[-1].rows and self.tables[-1].rows[-1]:
            self.tables[-1].rows[-1][-1].text += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, caption: str) -> Table:
        """The table with this caption."""
        (found,) = [t for t in self.tables if t.caption == caption]
        return found


def check_harmless(page: Page) -> None:
    """Nothing runs but the one script, nothing loads, nothing is styled by anything else."""
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for kind in ("script", "style"):
        (text,) = page.own[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on") or a == "style"], (tag, attributes)
        for key in ("src", "href", "action", "srcset", "xlink:href", "data"):
            assert attributes.get(key, "data:image/").startswith("data:image/"), (tag, attributes)
    assert not {"iframe", "object", "embed", "base", "a", "foreignobject"} & {
        t for t, _ in page.tags
    }
