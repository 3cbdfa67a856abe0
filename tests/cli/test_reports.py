"""What people read: the text of each report, from made-up numbers and hostile names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.report.base import Loads, Report
from loratool.report.extract import ExtractedModule, ExtractReport
from loratool.report.merge import MergeReport, ModuleLoss, TensorDifference, VerifyReport

from .conftest import Result, Run

EVIL = "q\x1b[31m\u202e[/bold][link=http://x]\n\x9b2J"
SHOWN = "q\\x1b[31m\\u202e[/bold][link=http://x]\\n\\x9b2J"


def loss(name: str, dtype: str = "bfloat16", lost: float = 0.118) -> ModuleLoss:
    return ModuleLoss(name, dtype, 0.01, lost, lost * 1.01, 0.8, 0.81)


def merge_report(**changes: Any) -> MergeReport:
    fields: dict[str, Any] = {
        "output": "merged", "adapters": ({"label": "style", "weight": 0.8},), "base": "b",
        "base_label": "Qwen/Qwen3-8B@b968826", "changed": 253, "copied": 146, "cast": 0,
        "created": 0, "skipped": (), "rule": "exact", "device": "cpu",
        "device_reason": "no GPU", "dtype": "bfloat16", "shards": 5,
        "output_bytes": 16_400_000_000, "peak_memory_bytes": 410_000_000, "seconds": 12.3,
        "modules": (loss("a"), loss("layers.3.k_proj", lost=0.31)), "total": loss("all"),
    }  # fmt: skip
    return MergeReport(**(fields | changes))


def extract_report(**changes: Any) -> ExtractReport:
    fields: dict[str, Any] = {
        "output": "lora", "tuned": "sft", "base": "base", "rank": 8,
        "modules": (ExtractedModule("l.0.q_proj", "q_proj", (64, 64), 8, 2.0, 0.991, 0.095),),
        "kept": (("norm.weight", 600_000),),
        "left_out": (("embed.weight", (1000, 64), 2_500_000_000, 0.1),), "identical": 3,
        "buffers": ("position_ids",), "captured_energy": 0.991, "relative_error": 0.095,
        "total_relative_error": 0.2, "output_bytes": 214_000_000, "seconds": 1.0,
        "loads_in": (Loads("PEFT", "yes"), Loads("vLLM", "no", ("norms",))),
    }  # fmt: skip
    return ExtractReport(**(fields | changes))


def verify_report(verdict: str, **changes: Any) -> VerifyReport:
    fields: dict[str, Any] = {
        "merged": "merged", "base": "base", "verdict": verdict, "tensors": 399, "identical": 399,
        "within_rounding": 0, "differing": (), "missing": (), "unexpected": (), "seconds": 0.8,
    }  # fmt: skip
    return VerifyReport(**(fields | changes))


@pytest.fixture
def shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command of a report with the API replaced by that report."""
    words = {
        "merge": ("merge", "./style:0.8", "./sql", "--base", "b", "-o", "merged"),
        "extract": ("extract", "sft", "--base", "base", "--rank", "8", "-o", "lora"),
        "verify": ("verify", "merged", "--base", "base", "--adapter", "style"),
    }

    def call(report: Report, *options: str) -> Result:
        monkeypatch.setattr(lt, report.command, lambda *_, **__: report)
        return run(*words[report.command], *options)

    return call


Shown = Callable[..., Result]


def test_merge(shown: Shown) -> None:
    found = shown(merge_report())
    assert found.code == 0 and found.err == ""
    lines = found.out.splitlines()
    assert lines[0] == "Merging 2 adapters INTO base weights: 0.8·style + 1·sql, one rounding"
    text = " ".join(found.out.split())
    for part in (
        "base Qwen/Qwen3-8B@b968826",
        "plan 253 of 399 tensors change, 146 copied byte for byte",
        "memory ≤ 410 MB · disk 16.4 GB",
        "bfloat16 rounds away 11.8 % of the change; worst layers.3.k_proj 31 %",
        "wrote merged · 16.4 GB in 5 weight files",
        "check loratool verify merged --base b --adapter ./style:0.8 --adapter ./sql",
    ):
        assert part in text


def test_merge_counts_what_is_not_plain(shown: Shown) -> None:
    text = shown(merge_report(cast=3, created=1, skipped=("te.a", "te.b"))).out
    assert "3 only cast" in text and "1 new" in text and "2 modules: te.a, te.b" in text


@pytest.mark.parametrize(
    ("lost", "says"),
    [(0.0, "keeps every bit"), (3e-7, "rounds away 3e-07 of the change"), (0.5, "50 %")],
)
def test_merge_loss_words(shown: Shown, lost: float, says: str) -> None:
    one = loss("a", "float32", lost)
    assert says in shown(merge_report(modules=(one,), total=one, dtype="float32")).out


def test_quiet_merge_prints_the_output_and_warnings(shown: Shown) -> None:
    assert shown(merge_report(), "-q").out == "merged\n"
    assert "loses" in shown(merge_report(warnings=("it loses",)), "-q").out


def test_dry_run_shows_the_plan_folded(shown: Shown) -> None:
    def step(name: str, op: str = "copy", parts: int = 0) -> dict[str, Any]:
        output = {"name": name, "dtype": "BF16", "shape": [4, 4]}
        return {"op": op, "output": output, "parts": [{}] * parts}

    steps = [step(f"model.layers.{i}.q.weight", "add_deltas", 2) for i in range(3)]
    report = merge_report(dry_run=True, plan={"steps": [*steps, step("norm.weight")]})
    text = shown(report, "--dry-run").out
    assert (
        "model.layers.*.q.weight" in text
        and "+ 2 deltas" in text
        and "bfloat16" in text
        and "norm.weight" in text
    )
    assert "nothing was written" in text and "wrote" not in text
    assert "model.layers.2.q.weight" in shown(report, "--dry-run", "-v").out


def test_extract(shown: Shown) -> None:
    found = shown(extract_report())
    text = " ".join(found.out.split())
    for part in (
        "Extracting sft − base at rank 8",
        "q_proj 1 8 99.1 % 0.095",
        "kept 1 tensor whole (600 kB)",
        "embed.weight (2.50 GB; --keep all stores them)",
        "buffers that differ: position_ids",
        "wrote lora · 214 MB",
        "PEFT yes · vLLM NO (norms)",
    ):
        assert part in text
    assert shown(extract_report(), "-q").out == "lora\n"
    assert "l.0.q_proj" in shown(extract_report(), "-v").out


@pytest.mark.parametrize("verdict", ["identical", "rounding"])
def test_verify_same(shown: Shown, verdict: str) -> None:
    found = shown(verify_report(verdict))
    assert found.code == 0 and "399 tensors" in found.out


def test_verify_differs(shown: Shown) -> None:
    bad = tuple(TensorDifference(f"t{i}", 5, 3.0, 1.0, "the change is missing") for i in range(12))
    report = verify_report("differs", differing=bad, missing=("m",), unexpected=("u",))
    found = shown(report)
    assert found.code == 10
    assert (
        "14 wrong" in found.out and "and 2 more" in found.out and "change is missing" in found.out
    )
    as_json = shown(report, "--json")
    assert as_json.code == 10 and as_json.json["ok"] is False
    assert len(as_json.json["differing"]) == 12
    assert shown(report, "-q").out == "differs\n"


def hostile() -> list[Report]:
    return [
        merge_report(
            base_label=EVIL, skipped=(EVIL,), rule=EVIL, output=EVIL, notes=(EVIL,),
            warnings=(EVIL,), tokenizer=EVIL, modules=(loss(EVIL),), device_reason=EVIL,
        ),
        merge_report(
            dry_run=True, modules=(),
            plan={"steps": [{"op": "copy", "parts": [],
                             "output": {"name": EVIL, "dtype": "F32", "shape": [1]}}]},
        ),
        extract_report(
            output=EVIL, modules=(ExtractedModule(EVIL, EVIL, (1, 1), 1, 1.0, 1.0, 0.0),),
            left_out=((EVIL, (1,), 4, 1.0),), buffers=(EVIL,), notes=(EVIL,), warnings=(EVIL,),
        ),
        verify_report(
            "differs", differing=(TensorDifference(EVIL, 1, 1.0, 1.0, EVIL),), missing=(EVIL,),
            unexpected=(EVIL,), notes=(EVIL,),
        ),
    ]  # fmt: skip


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("options", [(), ("-v",), ("-q",), ("--json",)])
def test_nothing_from_a_file_reaches_the_terminal(
    shown: Shown, number: int, options: tuple[str, ...]
) -> None:
    found = shown(hostile()[number], *options)
    for text in (found.out, found.err):
        assert all(c == "\n" or c.isprintable() for c in text)
    if options == ("--json",):
        assert EVIL in set(_strings(found.json))
    elif options != ("-q",):
        assert SHOWN in found.out


@pytest.mark.parametrize("line", [
    "inspect A --spectrum", "inspect A --risk", "compare A B", "compress A --rank 2 -o OUT",
])  # fmt: skip
def test_flat_names_are_grouped_as_dotted_ones(
    run: Run, data: Path, tmp_path: Path, line: str
) -> None:
    """By what follows the last number of a block: 85 modules of 23 families, as ``targets``."""
    source = data / "diffusion" / "kohya_sd15_locon" / "adapter.safetensors"
    other = tmp_path / "b.safetensors"
    lt.rescale([source], 0.5, output=other)
    at = {"A": source, "B": other, "OUT": tmp_path / "out.safetensors"}
    found = run(*(str(at.get(w, w)) for w in line.split()), "--json").json
    named = {f["name"] for f in run("inspect", str(source), "--json").json["adapter"]["families"]}
    rest = found.get("spectrum") or found.get("risk") or found
    modules = rest["modules"] if "modules" in rest else found["adapters"][0]["modules"]
    families = {m["family"] for m in modules}
    assert families == named and (len(modules), len(families)) == (85, 23)
