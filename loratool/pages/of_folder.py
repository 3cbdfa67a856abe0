"""The gallery of a folder: a card for each file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from loratool.dialects.told import cover
from loratool.frozen import replace
from loratool.pages.blocks import Block, Card, Cell, Gallery, Page, Section, Table, number, size
from loratool.pages.of_inspect import span
from loratool.pages.pictures import checked_picture
from loratool.report.base import Loads
from loratool.report.inspect import AdapterSummary, CheckpointSummary, FolderRow, InspectReport
from loratool.report.text import format_bytes, format_count, plural

_UNKNOWN = "unknown model"
_BARS = 7
_ORDER = {"yes": "loads in", "unsure": "unsure", "wrong": "wrong in", "no": "not in"}


def page_of_folder(report: InspectReport, title: str, room: int | None = None) -> Page:
    """The page of a folder.

    Args:
        report: of it.
        title: its name.
        room: bytes for pictures, the smallest first; None = no pictures.
    """
    cards = [card for row in report.rows if (card := _card(row)) is not None]
    if room is not None:
        cards = _with_pictures(report.rows, cards, room)
    families = Counter(str(card.data["family"]) for card in cards)
    programs = dict.fromkeys(p for c in cards for p in str(c.data["loads"]).split("|") if p)
    same = sum(bool(row.same_as) for row in report.rows)
    total = sum(int(card.data["size"]) for card in cards)
    tiles = [("Files", f"{len(report.rows):,}"), ("Size", format_bytes(total)),
             ("Models", f"{len(families):,}")]  # fmt: skip
    tiles += [("Duplicates", f"{same:,}")] if same else []
    blocks: list[Block] = [Gallery(plural(len(cards), "file"), cards, sorted(families),
                                   sorted(programs))]  # fmt: skip
    return Page(
        "inspect", title, ["a collection"], tiles, warnings=report.warnings, notes=report.notes,
        sections=[Section("Collection", blocks), *_by_family(cards), *_errors(report.rows)],
    )  # fmt: skip


def _card(row: FolderRow) -> Card | None:
    if row.adapter is not None:
        return _of_adapter(row, row.adapter)
    return None if row.checkpoint is None else _of_checkpoint(row, row.checkpoint)


def _of_adapter(row: FolderRow, one: AdapterSummary) -> Card:
    family = one.family or one.told.base or _UNKNOWN
    rank = span(one.ranks)
    told, whole = one.told, max(1, one.factor_parameters)
    parts = sorted(one.families, key=lambda f: -f.parameters)[:_BARS]
    work = " ".join(filter(None, (told.title, f"by {told.author}" if told.author else "")))
    lines = [("about", work), ("trained", one.trainer), ("base", one.base_model or "")]
    loads = list(_loads(one.loads))
    return Card(
        row.name, "", "", [(f.name, f.parameters / whole) for f in parts],
        [family, one.method, f"rank {rank}" if rank else "", format_bytes(one.nbytes),
         f"{format_count(one.parameters)} params"],
        told.trigger, [(label, text) for label, text in lines if text], loads, row.same_as,
        {"family": family, "rank": max(one.ranks, default=0), "size": one.nbytes,
         "loads": "|".join(p.program for p in one.loads if p.verdict == "yes")},
    )  # fmt: skip


def _of_checkpoint(row: FolderRow, one: CheckpointSummary) -> Card:
    family = one.model_type or _UNKNOWN
    return Card(
        row.name, "", "", (), [family, "checkpoint", format_bytes(one.nbytes),
                               f"{format_count(one.parameters)} params"],
        "", (), (), row.same_as, {"family": family, "rank": 0, "size": one.nbytes, "loads": ""},
    )  # fmt: skip


def _loads(loads: Sequence[Loads]) -> Iterator[tuple[str, str, str]]:
    """Programs by verdict, the good ones first."""
    for verdict, words in _ORDER.items():
        names = [one.program for one in loads if one.verdict == verdict]
        if names:
            yield verdict, words, ", ".join(names)


def _with_pictures(rows: Sequence[FolderRow], cards: Sequence[Card], room: int) -> list[Card]:
    """Checked thumbnails, the smallest first while there is room; of the others a word."""
    texts = {row.name: cover(row.adapter.metadata) for row in rows if row.adapter is not None}
    found = [checked_picture(text) if (text := texts.get(card.name, "")) else ("", "")
             for card in cards]  # fmt: skip
    shown = set()
    for i in sorted(range(len(cards)), key=lambda i: (len(found[i][0]), i)):
        if found[i][0] and len(found[i][0]) <= room:
            room -= len(found[i][0])
            shown.add(i)
    return [
        replace(card, picture=uri) if i in shown
        else replace(card, missing=why or ("no room for the picture on this page" if uri else ""))
        for i, (card, (uri, why)) in enumerate(zip(cards, found, strict=True))
    ]  # fmt: skip


def _by_family(cards: Sequence[Card]) -> Iterator[Section]:
    groups: dict[str, list[Card]] = {}
    for card in cards:
        groups.setdefault(str(card.data["family"]), []).append(card)
    rows: list[Sequence[Cell]] = [
        (family, number(len(members), ",d"), size(sum(int(c.data["size"]) for c in members)))
        for family, members in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    if len(rows) > 1:
        yield Section("Models", [Table("Files by the model that they are for",
                                       ("model", "files", "size"), rows)])  # fmt: skip


def _errors(rows: Sequence[FolderRow]) -> Iterator[Section]:
    broken: list[Sequence[Cell]] = [
        (row.name, str(row.error["code"]),
         " · ".join(str(row.error[key]) for key in ("what", "key", "got") if key in row.error))
        for row in rows if row.error is not None
    ]  # fmt: skip
    if broken:
        yield Section("What could not be read", [Table(plural(len(broken), "file"),
                      ("name", "code", "error"), broken)])  # fmt: skip
