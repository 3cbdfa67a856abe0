"""`split`: an adapter as servers load it, and a base that holds what they leave out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratool.adapter import Adapter
from loratool.api.access import access_of
from loratool.api.common import Limits, recorded_name
from loratool.api.merge import run_merge
from loratool.api.merge_job import SPLIT
from loratool.api.session import Opened, Session
from loratool.dialects import stated
from loratool.dialects.programs import find_program, judge_loads
from loratool.dialects.registry import home_of, writable
from loratool.errors import AlreadyMadeError
from loratool.frozen import Frozen, replace
from loratool.ops.inputs import guard_output, open_one
from loratool.ops.leaving import without
from loratool.ops.split import for_servers, for_the_base
from loratool.options import groups
from loratool.options.calls import takes
from loratool.options.merging import Merge, Split
from loratool.options.words import recorded
from loratool.report.merge import MergeReport
from loratool.report.split import SplitReport
from loratool.store.series import Series

ADAPTER, BASE = "adapter", "base"
"""Names of the two in the folder."""


@takes(Split)
def split(asked: Split) -> SplitReport:
    """Write the low-rank part of an adapter, and its base with all else merged into it.

    Servers load factors alone, or refuse whole tensors: trained heads, embeddings, new tokens,
    biases.  In ``base`` these are in their places, in ``adapter`` they are no more; together they
    are what adapter and base were, bit for bit where both are merged.

    Raises:
        LoratoolError: see ``docs/errors.md``.

    Example:
        >>> lt.split("style", base="base", output="served")  # has no head, and needs none
        Traceback (most recent call last):
        loratool.errors.MismatchError: nothing is left for the base...
    """
    folder = Path(asked.output)
    guard_output(folder, [asked.adapter, asked.base])
    job = _Job.open(asked, folder)
    if asked.dry_run:
        return _report(job, _merge(job, None), 0, job.slim)
    merged: MergeReport | None = None
    size, written = 0, job.slim
    with job.session.outputs(2) as session, _made(folder):
        session.check_place(job.one)  # before the base is made
        with suppress(AlreadyMadeError):
            merged = _merge(job, session.write.series)
        with suppress(AlreadyMadeError):
            size, written = _put(job, session)
    return _report(job, merged, size, written)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there; after an error not, if nothing is in it."""
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


class _Job(Frozen):
    """What is known before anything is written.

    Attributes:
        asked: the options.
        session: that writes the adapter.
        one: the input, and the place and dialect of what is left of it.
        moved: names of what goes into the base.
        slim: the rest.
    """

    asked: Split
    session: Session
    one: Opened
    moved: tuple[str, ...]
    slim: Adapter

    @classmethod
    def open(cls, asked: Split, folder: Path) -> _Job:
        """Read the adapter, and refuse what cannot be split."""
        program = None if asked.program is None else find_program(asked.program)
        session = Session(
            "split", f"{folder}/", asked.take(groups.Write), asked.take(groups.Read),
            access_of(asked, in_place=asked.dry_run), Limits.of(asked), program,
        )  # fmt: skip
        text = str(asked.adapter)
        resolved, source = open_one(text, read=session.read, access=session.access)
        kept = without(source, asked.skip)[0] if asked.skip else source
        moved = for_the_base(kept)
        name = recorded_name(folder / BASE)
        slim = replace(for_servers(kept), base_model=name)
        slim = replace(slim, config=stated.on_base(slim.config, name))
        form = session.form(slim)
        if program is None:
            session = replace(session, to=writable(form).name)
        row = home_of(form)
        target = folder / (ADAPTER + ("" if row.is_folder else row.suffixes[0]))
        session.check_form(slim, form)
        return cls(asked, session, Opened(text, resolved, source, target, form), moved, slim)

    @property
    def base(self) -> Path:
        """The place of the base."""
        return Path(self.asked.output) / BASE


def _merge(job: _Job, series: Series | None) -> MergeReport:
    tell = job.asked.on_plan

    def on_plan(planned: MergeReport) -> None:
        if tell is not None:
            tell(_report(job, planned, 0, job.slim))

    asked = job.asked.take(
        Merge, adapters=[job.asked.adapter], output=job.base, series=series, program=None,
        on_plan=on_plan,
    )  # fmt: skip
    return run_merge(asked, SPLIT)


def _put(job: _Job, session: Session) -> tuple[int, Adapter]:
    _, files = session.fit(job.slim, job.one.form)
    record = session.record(recorded(job.asked), job.one.inputs())
    return session.put(files, job.one.target, record, job.slim.extras)


def _report(job: _Job, merged: MergeReport | None, size: int, written: Adapter) -> SplitReport:
    places = str(job.asked.output), str(job.one.target), str(job.base)
    return SplitReport(
        *places,
        job.moved,
        len(job.slim.specs),
        size,
        merged,
        judge_loads(written),
        job.session.seconds,
        job.asked.dry_run,
    )
