"""Which page a report has."""

from __future__ import annotations

from functools import partial
from pathlib import PurePath

from loratool.pages.blocks import Page
from loratool.pages.render import MOST_BYTES, render
from loratool.report.base import Report
from loratool.report.combine import CombineReport
from loratool.report.compare import CompareReport
from loratool.report.compress import CompressReport
from loratool.report.extract import ExtractReport
from loratool.report.inspect import InspectReport
from loratool.report.merge import MergeReport

_SPARE = 20_000
"""Bytes that pictures leave free."""


def page_of(report: Report) -> bytes:
    """The page of a report, as HTML; the same bytes for the same report."""
    if isinstance(report, InspectReport) and report.what == "folder":
        return _gallery(report)
    return render(_page(report))


def _gallery(report: InspectReport) -> bytes:
    """Text first, then as many pictures as there is room for."""
    from loratool.pages.of_folder import page_of_folder

    page = partial(page_of_folder, report, PurePath(report.source).name or report.source)
    room = MOST_BYTES - _SPARE - len(render(page(None)))
    return render(page(max(0, room)))


def _page(report: Report) -> Page:
    if isinstance(report, InspectReport):
        from loratool.pages.of_inspect import page_of_inspect

        return page_of_inspect(report)
    if isinstance(report, CompareReport):
        from loratool.pages.of_compare import page_of_compare

        return page_of_compare(report)
    if isinstance(report, MergeReport):
        from loratool.pages.of_merge import page_of_merge

        return page_of_merge(report)
    if isinstance(report, CombineReport):
        from loratool.pages.of_merge import page_of_combine

        return page_of_combine(report)
    if isinstance(report, ExtractReport):
        from loratool.pages.of_factors import page_of_extract

        return page_of_extract(report)
    from loratool.pages.of_factors import page_of_compress

    assert isinstance(report, CompressReport), type(report)
    return page_of_compress(report)
