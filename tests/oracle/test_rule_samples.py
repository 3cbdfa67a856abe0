"""Every rule of the programs that load PEFT's folders: a failing adapter, a passing one, a fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool import cli
from loratool.dialects.programs import find_program, programs
from loratool.errors import LoratoolError
from loratool.report.check import CheckReport, Finding
from tests.oracle import test_gguf, test_mlx
from tests.oracle.in_peft import Tensors, changes, distance
from tests.oracle.rule_samples import DATA, SAMPLES, llama, made_in
from tests.oracle.test_loads import model_of

OF_PEFT = [program for program in programs() if program.is_of_peft]
ROWS = [(program, rule, name) for name, sample in SAMPLES.items()
        for program, rules in sample.rules.items() for rule in rules]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sample by name, made once; "" = the adapter that passes every rule."""
    return made_in(tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("program", [p.name for p in OF_PEFT])
def test_a_plain_adapter_passes_every_rule(program: str, folder: Any) -> None:
    found = lt.check(folder(""), program=program)
    assert found.verdict == "yes" and not found.findings and set(found.counts) == {"loads"}


@pytest.mark.parametrize(("program", "rule", "name"), ROWS)
def test_a_rule_finds_its_fault(program: str, rule: str, name: str, folder: Any) -> None:
    found = lt.check(folder(name), program=program, **SAMPLES[name].read)
    one = next(f for f in found.findings if f.rule == rule)
    stated = find_program(program)
    assert one.verdict == next(r.verdict for r in (*stated.opens, *stated.rules) if r.name == rule)
    assert found.ok is all(f.verdict == "unsure" for f in found.findings)
    if found.findings[0].verdict == "raises":
        assert set(found.counts) == {"raises"}
    parts = {"dropped": "wrong"}.get(one.verdict, one.verdict)  # of which some loads
    hit = [m.verdict for m in found.modules if m.rule == rule]
    assert set(hit) <= {one.verdict, parts}
    assert hit or one is not found.findings[0] or not _modules_of(one, found)


def _modules_of(one: Finding, found: CheckReport) -> list[str]:
    return [m.module for m in found.modules if {m.module, *m.keys} & set(one.names)]


def test_every_rule_has_its_sample() -> None:
    for program in OF_PEFT:
        stated = {rule.name for rule in (*program.opens, *program.rules)}
        assert stated == {rule for p, rule, _ in ROWS if p == program.name}, program.name
    assert {r.name for r in find_program("llama.cpp").own} == set(test_gguf.FAULTS)
    assert {r.name for r in find_program("mlx").own} == set(test_mlx.FAULTS)


def stated_changes(adapter: Path) -> Tensors:
    """ΔW of every matrix, by its name in the base, in float64."""
    with lt.open(adapter) as opened:
        return {m.spec.name: m.delta().double() for m in opened if m.spec.is_matrix}


@pytest.mark.parametrize(("program", "rule", "name"), [
    row for row in ROWS
    if any(r.is_mended for r in find_program(row[0]).rules if r.name == row[1])
])  # fmt: skip
def test_the_fixed_file_is_the_same_change(
    program: str, rule: str, name: str, folder: Any, tmp_path: Path
) -> None:
    """By the real PEFT; what the program has no place for is told."""
    sample, out = SAMPLES[name], tmp_path / "out"
    try:
        report = lt.check(folder(name), program=program, fix=True, output=out, **sample.read)
    except LoratoolError as error:  # by another rule, which nothing mends, or by another command
        findings = lt.check(folder(name), program=program).findings
        is_other = any(not f.is_mended and f.verdict != "unsure" for f in findings)
        assert error.code == ("LT-488" if is_other else "LT-489") and not out.exists()
        words = lt.check(folder(name), program=program).next
        assert not words if is_other else cli.run(words.replace("OUT", str(out)).split()[1:]) == 0
        return
    assert report.output == str(out)
    after = lt.check(out, program=program)
    assert after.ok and rule not in {f.rule for f in after.findings}
    whole = isinstance(sample.source, dict)
    model = llama() if whole else model_of(DATA / sample.source)  # type: ignore[operator]
    # With the rank of its file that one is the plain adapter.
    origin = folder("" if sample.read else name)
    got, want = changes(model, out, strict=whole), stated_changes(origin)
    assert distance(got, want) < 1e-6
    moved = {key for key, value in got.items() if key not in want and value.norm() > 0}
    assert not moved


def test_a_folder_of_peft_is_fixed_for_mlx(folder: Any, tmp_path: Path) -> None:
    """Its own form, one rank and one scale; mlx-lm itself fuses it to our merge, where it is."""
    source, out, base = folder("alphas"), tmp_path / "out", tmp_path / "base"
    found = lt.check(source, program="mlx")
    assert found.verdict == "no" and [f.rule for f in found.findings] == ["own-folder"]
    assert lt.check(source, program="mlx", fix=True, output=out).output == str(out)
    assert lt.check(out, program="mlx").verdict == "yes"
    assert distance(stated_changes(out), stated_changes(source)) < 1e-6
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    llama().save_pretrained(base)
    lt.merge([source], base=base, output=tmp_path / "merged")
    model = load_adapters(load_model(base)[0], str(out))
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    got = {k: torch.from_numpy(np.array(v)) for k, v in tree_flatten(model.parameters())}
    for key, tensor in load_file(str(tmp_path / "merged" / "model.safetensors")).items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=1e-6), key
