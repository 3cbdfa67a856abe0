"""Every LoRA case of PEFT's own tests through every command, judged by PEFT itself."""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.oracle.in_peft import NotLoadedError, Tensors, changes, distance, make, save_base

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.oracle.peft_tables import Case, cases, fetch  # noqa: E402

pytestmark = pytest.mark.slow
_CLOSE = 2e-6
PROGRAMS = ("peft", "vllm", "llama.cpp")


class OwnFault(Exception):  # noqa: N818
    """PEFT itself cannot do it, with its own file."""


class Wrong(Exception):  # noqa: N818
    """What loratool wrote is not what PEFT computes."""


class Site:
    """One case on disk: the base, two adapters, and what PEFT makes of them."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.model, self.folder, self.count = case.model, folder, 0
        # PEFT decomposes the base in float32, whatever the type of the model.
        starts_elsewhere = case.config.kasa_config or isinstance(case.config.init_lora_weights, str)
        self.has_dora = case.config.use_dora
        self.units = 100 if starts_elsewhere else 4
        try:
            self.base = save_base(case.model, folder / "base")
            self.first = make(case.model, folder / "first", case.config, seed=1)
            self.second = make(case.model, folder / "second", case.config, seed=2)
            self.changes = changes(case.model, self.first)
            self.others = changes(case.model, self.second)
        except (LoratoolError, MemoryError):
            raise
        except Exception as error:  # whatever PEFT fails with
            raise OwnFault(f"{type(error).__name__}: {error}") from None

    def out(self) -> Path:
        self.count += 1
        return self.folder / f"out{self.count}"

    def check(self, adapter: Path, wanted: Tensors) -> None:
        """PEFT loads every tensor, and the weights change by what they should."""
        try:
            found = changes(self.model, adapter)
        except (NotLoadedError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise Wrong(f"PEFT: {error}") from None
        off = distance(found, wanted)
        if not off <= _CLOSE:
            raise Wrong(f"another ΔW, by {off:.1e}")

    def state(self, folder: Path) -> Tensors:
        """Merged weights, under the names of the base's file."""
        found: Tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(str(file))
        return found


def merge(site: Site) -> None:
    out = site.out()
    lt.merge([str(site.first)], base=site.base, output=out)
    base, merged = site.model.state_dict(), site.state(out)
    for name, value in merged.items():
        if name in site.changes:
            wanted = base[name].double() + site.changes[name]
            off = (value.double() - wanted).abs().max() if value.numel() else torch.zeros(1)
            if float(off) > site.units * 2**-24 * float(wanted.abs().max()) + 1e-30:
                raise Wrong(f"{name} is off by {float(off):.1e}")


def combine(site: Site, **base: Any) -> None:
    out = site.out()
    lt.merge([f"{site.first}:0.7", f"{site.second}:-0.3"], output=out, **base)
    site.check(out, {k: 0.7 * v - 0.3 * site.others[k] for k, v in site.changes.items()})


def average(site: Site) -> None:
    """Weights of 1 together: replaced tensors are averaged too."""
    out = site.out()
    lt.merge([str(site.first), str(site.second)], mean=True, output=out)
    site.check(out, {k: 0.5 * v + 0.5 * site.others[k] for k, v in site.changes.items()})


def subtract(site: Site, **base: Any) -> None:
    out = site.out()
    lt.subtract([str(site.first), f"{site.second}:0.5"], output=out, **base)
    site.check(out, {k: v - 0.5 * site.others[k] for k, v in site.changes.items()})


def rescale(site: Site, **base: Any) -> None:
    out = site.out()
    kept = lt.rescale([str(site.first)], 0.3, output=out, **base).adapters[0].kept
    whole = {n for n in kept if n in site.changes} | _tied(site.model, kept)
    site.check(out, {k: v if k in whole else 0.3 * v for k, v in site.changes.items()})


def compress(site: Site, **base: Any) -> None:
    """PEFT measures the error that the report names, and it is the least there is."""
    out = site.out()
    report = lt.compress(str(site.first), rank=2, output=out, **base).adapters[0]
    found = changes(site.model, out)
    norm = math.sqrt(sum(m.norm**2 for m in report.modules))
    names = {m.name for m in report.modules}
    lost = {k: float((found[k] - v).norm()) for k, v in site.changes.items()}
    inside = math.sqrt(sum(e**2 for k, e in lost.items() if k in names or _is_alias(k, names)))
    if inside > report.relative_error * norm * 2 + 1e-5 * norm:  # tied tensors count twice
        raise Wrong(f"PEFT measures {inside:.3g}, told are {report.relative_error * norm:.3g}")
    for name, value in site.changes.items():
        if site.has_dora:  # what is cut is the product inside of the norm
            continue
        tail = torch.linalg.svdvals(value.flatten(1))[2:] if value.dim() == 2 else None
        if tail is not None and lost[name] > float(tail.norm()) * (1 + 1e-4) + 1e-5 * norm:
            raise Wrong(f"{name} loses {lost[name]:.3g}, the least is {float(tail.norm()):.3g}")


def extract(site: Site) -> None:
    """At full rank with everything kept the fine-tune comes back."""
    merged, out = site.out(), site.out()
    lt.merge([str(site.first)], base=site.base, output=merged)
    lt.extract(merged, base=site.base, output=out, rank=4096, keep=["all"])
    base, tuned = site.state(site.base), site.state(merged)
    found = changes(site.model, out)
    for name, value in tuned.items():
        if name not in base or name not in found:
            continue
        delta = value.double() - base[name].double()
        # nothing goes through the table that encoder and decoder share but by their names of it
        places = _tied(site.model, [name]) - {n for n in found if n.endswith("shared.weight")}
        for place in (places & found.keys()) or {name}:
            off = float((found[place] - delta).norm())
            if off > 1e-5 * float(delta.norm()) + 1e-7 * float(base[name].double().norm()):
                raise Wrong(f"{place} is off by {off:.1e}")


def serve(site: Site) -> None:
    """The form of each program, where it has one, is the same change."""
    refused = []
    for program in PROGRAMS:
        out = site.out()
        try:
            report = lt.rescale([str(site.first)], 1, output=out, program=program)
        except LoratoolError as error:
            refused.append(error)
            continue
        if not report.adapters[0].warnings:
            site.check(out, site.changes)
    if len(refused) == len(PROGRAMS):
        raise refused[0]


COMMANDS: dict[str, Callable[[Site], None]] = {
    "merge": merge, "combine": combine, "average": average, "compress": compress,
    "subtract": subtract, "rescale": rescale, "extract": extract, "--for": serve,
    "combine --base": lambda site: combine(site, base=site.base, into="adapter"),
    "subtract --base": lambda site: subtract(site, base=site.base),
    "rescale --base": lambda site: rescale(site, base=site.base),
    "compress --base": lambda site: compress(site, base=site.base),
}  # fmt: skip


def _tied(model: Any, names: Any) -> set[str]:
    state = model.state_dict()
    places = {state[n].data_ptr() for n in names if n in state}
    return {n for n, v in state.items() if v.data_ptr() in places}


def _is_alias(name: str, names: set[str]) -> bool:
    return any(name.endswith(f".{n}") or n.endswith(f".{name}") for n in names)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Case]]:
    yield list(cases(fetch(tmp_path_factory.mktemp("peft"))))


def test_every_case_is_right_or_refused_with_a_code(tables: list[Case], tmp_path: Path) -> None:
    count: dict[str, Counter[str]] = {name: Counter() for name in COMMANDS}
    ours = []
    for number, case in enumerate(tables):
        try:
            site = Site(copy.copy(case), tmp_path / str(number))
        except OwnFault as error:
            print(f"PEFT's own: {case.label}: {error}"[:200])
            for found in count.values():
                found["PEFT's own"] += 1
            continue
        for name, command in COMMANDS.items():
            try:
                command(site)
                outcome = "right"
            except LoratoolError as error:
                outcome = f"refused {error.code}"
            except Wrong as error:
                outcome = "ours"
                ours.append(f"{name}: {case.label}: {error}")
            count[name][outcome] += 1
        gc.collect()
    print(f"\n{len(tables)} cases")
    for name, found in count.items():
        print(f"{name:9} ", dict(sorted(found.items())))
    assert len(tables) > 60
    assert not ours, "\n".join(ours)
