"""What every command does around its own work: reach, run, record and write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.access import access_of
from loratool.api.casting import cast, files_in
from loratool.api.common import Limits, Resources, content_label
from loratool.api.fitting import Fitted, check_files, fit_for
from loratool.api.loading import Goal, home_for, plan_translation, translate
from loratool.api.translating import files_of, of_dialect
from loratool.bind.same_change import settle_tying
from loratool.dialects import DEFAULT, open_adapter, write_adapter_files
from loratool.dialects.programs import Program, find_program
from loratool.dialects.registry import home_of, writable
from loratool.dialects.rules import is_folder, is_of_home
from loratool.errors import UsageError
from loratool.frozen import Frozen, field, replace
from loratool.ops.access import Access
from loratool.ops.additive import in_one_order
from loratool.ops.batch import is_batch, many_outputs, name_of, place_outputs
from loratool.ops.fitting import check_fit
from loratool.ops.inputs import Guard, OpenedBase, open_one
from loratool.ops.turns import Turns
from loratool.options import groups
from loratool.report.planned import PlannedFiles
from loratool.store.outputs import check_output, place_of
from loratool.store.provenance import adapter_id, checkpoint_id, provenance_of
from loratool.store.source import Resolved

if TYPE_CHECKING:
    from loratool.engine.sink import CheckpointSink
    from loratool.location import Location
    from loratool.options.merging import Combine
    from loratool.options.shaping import Compress, Convert, Rescale
    from loratool.plan import Plan
    from loratool.store.reader import Stamp


def run_plan(
    plan: Plan,
    resources: Resources,
    sink: CheckpointSink | None = None,
    take: Callable[[Any], Any] | None = None,
    stamps: Mapping[Location, Stamp] | None = None,
) -> list[Any]:
    """One result per step of a plan, of inputs that did not change meanwhile.

    Args:
        plan: what is done.
        resources: of `loratool.api.common.plan_resources`.
        sink: where outputs go; None = results alone.
        take: called with each result as soon as it is there; what it returns is kept.
        stamps: of the inputs, if they were taken before.
    """
    from loratool.engine.run import execute
    from loratool.store.reader import FileReader

    with FileReader(stamps) as reader:
        results = execute(plan, reader, sink, resources.run, take)
        reader.check_unchanged()
    return results


# ----------------------------------------------------------------------------- provenance


def base_row(base: OpenedBase, inputs: Mapping[str, Any], role: str = "base") -> dict[str, Any]:
    """A checkpoint among the inputs of a provenance, under a name that is free in it."""
    label = content_label(base.resolved, inputs)
    return {label: {"role": role, "files": checkpoint_id(base.checkpoint)}}


# ------------------------------------------------------------------- adapters, one or many


class Opened(Frozen):
    """An adapter of a batch, and where its result goes.

    Attributes:
        text: as typed.
        resolved: where it is.
        adapter: what it says.
        target: folder or file to create.
        form: its dialect.
    """

    text: str
    resolved: Resolved
    adapter: Adapter
    target: Path
    form: str

    @property
    def nbytes(self) -> int:
        """Of the tensors that its result is made of."""
        adapter = self.adapter
        factors = (s for spec in adapter.specs for s in spec.fields.values())
        return sum(s.nbytes for s in (*factors, *(r.source for r in adapter.replacements)))

    def inputs(self, name: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The input by its name and content, as provenance has it; not under a name in use."""
        return {content_label(self.resolved, name or {}): adapter_id(self.adapter)}


class Session(Frozen):
    """A command that makes an adapter of each of some adapters.

    Attributes:
        command: its name, as provenance has it.
        output: as typed.
        write: whether and how to write.
        read: what the files do not say.
        access: how sources may be reached.
        limits: workers and memory.
        program: that the results are for; None = any.
        to: dialect of the results; None = that of the inputs.
        base: what a dialect asks of the base it asks this one; None = not given, or not asked.
        started: when.
    """

    command: str
    output: str | Path
    write: groups.Write
    read: groups.Read
    access: Access
    limits: Limits
    program: Program | None = None
    to: str | None = None
    base: OpenedBase | None = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls,
        command: str,
        asked: Combine | Compress | Convert | Rescale,
        *,
        in_place: bool = False,
    ) -> Session:
        """From the options of a command.

        Raises:
            UsageError: LT-271, no such program; LT-282, no such dialect.
        """
        program, to = asked.program, asked.to
        return cls(
            command, asked.output, asked.take(groups.Write), asked.take(groups.Read),
            access_of(asked, in_place=in_place), Limits.of(asked),
            None if program is None else find_program(program),
            None if to is None else writable(to).name,
        )  # fmt: skip

    @property
    def of_peft(self) -> Program | None:
        """The program, if it takes one rank and one α/r of all modules."""
        return self.program if self.program is not None and self.program.is_of_peft else None

    @property
    def of_images(self) -> Program | None:
        """The program, if it takes files as its loader reads them."""
        return None if self.of_peft is not None else self.program

    def _loader(self, form: str) -> Program | None:
        """The program, if it takes files of a dialect as its loader reads them."""
        return self.of_images if form == DEFAULT else self.program

    def _goal(self, form: str) -> Goal:
        return Goal(form, self.limits, self._loader(form), self._asked_of_base)

    def with_base(self, base: OpenedBase | None, *forms: str) -> Session:
        """The session, with the base if one of these dialects asks what its configuration says."""
        return replace(self, base=base) if any(home_of(f).asks_config for f in forms) else self

    @property
    def _asked_of_base(self) -> dict[str, Any]:
        return {} if self.base is None else {"base_config": self.base.checkpoint.config}

    def translates(self, adapter: Adapter, form: str) -> bool:
        """True if the result of an adapter is brought into a dialect, not left in its own."""
        return self.to is not None or self.of_images is not None or form != adapter.dialect

    def form(self, adapter: Adapter) -> str:
        """The dialect of a result: as asked for, as the program loads it best, or the input's."""
        if self.to is not None or self.program is None:
            home = home_of(adapter.dialect)
            is_renamed = home.table is not None and bool(home.table.naming)
            return self.to or (home.name if is_renamed else adapter.dialect)
        if self.of_images is not None:
            return home_for(self.of_images, adapter, self.limits) or DEFAULT
        is_loaded = adapter.dialect == self.program.native or is_of_home(adapter, DEFAULT)
        return adapter.dialect if is_loaded else DEFAULT

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def open(
        self,
        texts: Sequence[str],
        *others: str | Path | None,
        form: Callable[[Adapter], str] | None = None,
    ) -> list[Opened]:
        """Open every input and find every output its place, before any work is done.

        Args:
            texts: adapters as typed.
            others: what else is read.
            form: dialect of the result of an input; `form` if not given.

        Raises:
            UsageError: LT-221, no adapter.
            OutputError: a place that is an input, or one for two.
        """
        if not texts:
            raise UsageError("LT-221", "no adapter given")
        found = [open_one(text, read=self.read, access=self.access) for text in texts]
        names, forms = (
            [name_of(one) for one, _ in found],
            [(form or self.form)(a) for _, a in found],
        )
        targets = place_outputs(names, self.output, forms)
        guard = Guard([*others, *(one.named for one, _ in found)])
        for target in targets:
            guard.check(target)
        return [
            Opened(text, resolved, settle_tying(adapter), target, form)
            for text, (resolved, adapter), target, form in zip(
                texts, found, targets, forms, strict=True
            )
        ]

    def in_its_order(self, found: Sequence[Opened]) -> list[Opened]:
        """Inputs whose results keep their dialect, with rows of heads as their files have them."""
        return [replace(one, adapter=in_one_order([one.adapter])[0])
                if one.form == one.adapter.dialect else one for one in found]  # fmt: skip

    def check(self, one: Opened) -> None:
        """Refuse, before any work, an adapter that the program or the dialect could never hold."""
        self.check_form(one.adapter, one.form)

    def check_form(self, adapter: Adapter, form: str) -> None:
        """The same of an adapter and the dialect of its result.

        Raises:
            MismatchError: LT-488, and of `loratool.ops.convert.plan_convert`.
        """
        if self.translates(adapter, form):
            plan_translation(adapter, self._goal(form))
        elif self.program is not None:
            check_fit(adapter, self.program)

    def check_place(self, one: Opened) -> None:
        """Refuse a place that is taken; one in a folder that is still to be made is free."""
        target, as_folder = one.target, is_folder(one.form)
        if target == place_of(self.output) or target.parent.exists():
            check_output(target, is_folder=as_folder, force=self.write.force,
                         series=self.write.series)  # fmt: skip

    @contextmanager
    def outputs(self, count: int) -> Iterator[Session]:
        """Hold the place of all results while this session makes them; a killed one goes on."""
        if self.write.dry_run:
            yield self
            return
        with many_outputs(self.output, count, self.write.series) as series:
            yield replace(self, write=self.write.replace(series=series))

    @contextmanager
    def making(
        self, found: Sequence[Opened], asked: Convert | Rescale, modules: int,
        computed: int | None, peaks: Iterable[int],
    ) -> Iterator[tuple[Session, Turns]]:  # fmt: skip
        """`outputs`, each at a place that is free, once it was told what is about to be done.

        Args:
            found: the inputs, whose results are made one after the other.
            asked: who watches.
            modules: of all of them.
            computed: modules whose tensors are computed; None where the work tells.
            peaks: bytes that each input takes at work, where that is known.
        """
        sizes = [one.nbytes for one in found]

        def plan() -> PlannedFiles:
            peak = max(peaks, default=None) if computed else None
            return PlannedFiles(len(found), modules, computed, sum(sizes), peak)

        with self.outputs(len(found)) as session:
            for one in found:
                session.check_place(one)
            yield session, session.turns(asked, plan, sizes)

    def turns(
        self, asked: Compress | Convert | Rescale, plan: Callable[[], Any], sizes: Sequence[int]
    ) -> Turns:
        """Make the folder that several results are put into, and tell what is about to be done.

        Args:
            asked: who watches.
            plan: makes what ``on_plan`` gets.
            sizes: of the inputs, as progress counts them.
        """
        if not self.write.dry_run:
            if len(sizes) > 1 or is_batch(self.output):
                Path(self.output).mkdir(exist_ok=True)
            if asked.on_plan is not None:
                asked.on_plan(plan())
        return Turns(asked.progress, asked.on_work, sizes)

    def fit(
        self, adapter: Adapter, form: str, *, dtype: str | None = None, **how: Any
    ) -> tuple[Fitted, AdapterFiles]:
        """An adapter in the form of the program, and its files, which that program loads.

        Args:
            adapter: as made.
            form: dialect of the result.
            dtype: safetensors name of the type that its factors are rounded to, once, whatever is
                put into them on the way; None = as they come.
            how: of `loratool.dialects.write_adapter_files`.
        """
        write: Callable[[Adapter], AdapterFiles]
        program = self.program
        if self.translates(adapter, form):
            fitted, program = self._translated(adapter, form)
            write = partial(files_of, dialect=form, metadata=adapter.metadata,
                            **self._asked_of_base)  # fmt: skip
        else:
            fitted = fit_for(adapter, program, self.limits)
            write = partial(write_adapter_files, **how, **self._asked_of_base)
        if dtype is None:
            files = write(fitted.adapter)
        else:
            turn = partial(cast, dtype=dtype, limits=self.limits)
            files, made = files_in(fitted.adapter, home_of(form), write, turn)
            lost = math.hypot(fitted.relative_error, made.relative_error)
            fitted = replace(fitted, relative_error=lost)
        check_files(files, adapter, program)
        return fitted, files

    def _translated(self, adapter: Adapter, form: str) -> tuple[Fitted, Program | None]:
        """An adapter in another dialect than it was made in, and the program whose form it has."""
        made = translate(adapter, self._goal(form))
        program, fitted = self.of_peft if form == DEFAULT else None, Fitted(made.adapter)
        if program is not None:
            fitted = fit_for(of_dialect(made.adapter, form), program, self.limits)
        said = [note for note in made.plan.notes if note not in adapter.notes]
        return replace(
            fitted, notes=(*said, *fitted.notes), warnings=(*made.plan.warnings, *fitted.warnings),
            relative_error=math.hypot(made.relative_error, fitted.relative_error),
        ), program  # fmt: skip

    def record(self, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The provenance of a result; empty if none is wanted."""
        if not self.write.provenance:
            return {}
        return provenance_of(self.command, options=options, inputs=inputs)

    def put(
        self, files: AdapterFiles, target: Path, record: Mapping[str, Any],
        extras: Mapping[str, Path], progress: Callable[[int, int], None] | None = None,
    ) -> tuple[int, Adapter]:  # fmt: skip
        """Write an adapter with what lies beside it; its size, and the adapter as written."""
        from loratool.store.adapter_writer import write_adapter

        return write_adapter(
            files, target, record=dict(record), read=open_adapter, force=self.write.force,
            extras=extras, series=self.write.series, progress=progress,
        )  # fmt: skip
