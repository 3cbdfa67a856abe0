"""verify says "identical", "rounding" or "differs", and why; each from a constructed case."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.report.merge import VerifyReport
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle import closed_form

SHAPES = {"a": (64, 48), "b": (48, 64)}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """base, adapter and a right merge in one folder."""
    tensors = {
        f"{n}.weight": randn(*s, seed=i).bfloat16() for i, (n, s) in enumerate(SHAPES.items())
    }
    tensors["norm.weight"] = randn(48, seed=9).bfloat16()
    save_checkpoint(tmp_path / "base", tensors)
    save_adapter(tmp_path / "adapter", random_factors(SHAPES, rank=4, seed=5, scale=0.3), alpha=4)
    lt.merge([str(tmp_path / "adapter")], base=tmp_path / "base", output=tmp_path / "merged")
    return tmp_path


def check(job: Path) -> VerifyReport:
    return lt.verify(job / "merged", base=job / "base", adapters=[str(job / "adapter")])


def edit(job: Path, change: dict[str, torch.Tensor | None]) -> None:
    file = str(job / "merged" / "model.safetensors")
    tensors = load_file(file)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


def delta_of(job: Path, name: str) -> torch.Tensor:
    factors = load_file(str(job / "adapter" / "adapter_model.safetensors"))
    head = f"base_model.model.{name}"
    return factors[f"{head}.lora_B.weight"] @ factors[f"{head}.lora_A.weight"]


def test_identical(job: Path) -> None:
    report = check(job)
    assert report.ok and report.verdict == "identical" and report.identical == 3


def test_another_order_of_rounding_is_accepted(job: Path) -> None:
    """PEFT on a bfloat16 adapter rounds ΔW first: elsewhere by a step, but a legal merge."""
    base = load_file(str(job / "base" / "model.safetensors"))
    edit(job, {f"{n}.weight": base[f"{n}.weight"] + delta_of(job, n).bfloat16() for n in SHAPES})
    report = check(job)
    assert report.ok and report.verdict == "rounding" and report.within_rounding == 2


def test_a_merge_that_never_happened(job: Path) -> None:
    base = load_file(str(job / "base" / "model.safetensors"))
    edit(job, {"a.weight": base["a.weight"]})
    report = check(job)
    assert not report.ok and report.verdict == "differs"
    (found,) = report.differing
    assert found.name == "a.weight" and "missing" in found.reason
    assert found.residual == pytest.approx(1, abs=0.01)


def test_a_wrong_strength(job: Path) -> None:
    base = load_file(str(job / "base" / "model.safetensors"))
    half = (base["a.weight"].float() + 0.5 * delta_of(job, "a")).bfloat16()
    edit(job, {"a.weight": half})
    (found,) = check(job).differing
    assert found.residual == pytest.approx(0.5, abs=0.02)
    times = re.fullmatch(r"the change is there (\S+) times", found.reason)
    assert times and float(times[1]) == pytest.approx(0.5, abs=0.01)
    turned = (base["a.weight"].float() + delta_of(job, "a").flip(0)).bfloat16()
    edit(job, {"a.weight": turned})
    (found,) = check(job).differing
    assert found.reason == "another change"


def test_one_element_two_steps_away(job: Path) -> None:
    merged = load_file(str(job / "merged" / "model.safetensors"))["a.weight"]
    large = torch.nonzero((merged.abs() > 1) & (delta_of(job, "a").abs() < 0.01))[0]
    bits = merged.view(torch.int16)
    bits[tuple(large)] += 3
    edit(job, {"a.weight": merged})
    (found,) = check(job).differing
    assert found.elements == 1 and found.max_ulp == pytest.approx(3)


def test_an_untouched_tensor_that_changed(job: Path) -> None:
    merged = load_file(str(job / "merged" / "model.safetensors"))["norm.weight"]
    merged.view(torch.int16)[5] += 1
    edit(job, {"norm.weight": merged})
    (found,) = check(job).differing
    assert found.name == "norm.weight" and "no adapter touches it" in found.reason


def test_missing_unexpected_and_unlike_tensors(job: Path) -> None:
    edit(
        job, {"b.weight": None, "extra": torch.zeros(2), "norm.weight": torch.zeros(47).bfloat16()}
    )
    report = check(job)
    assert not report.ok
    assert report.missing == ("b.weight",) and report.unexpected == ("extra",)
    assert [d.name for d in report.differing] == ["norm.weight"]


def test_a_cast_merge_is_recognised(job: Path) -> None:
    import shutil

    shutil.rmtree(job / "merged")
    lt.merge([str(job / "adapter")], base=job / "base", output=job / "merged", dtype="float32")
    assert check(job).verdict == "identical"


DATA = Path(__file__).parents[1] / "data" / "llm"
# What PEFT merges here is not what the adapted model computes (tests/oracle/test_lora_family.py).
PEFT_FAULTS = {"lora_embed_lmhead_tied", "lora_embed_tied_ensure", "lora_layer_replication"}
UNDECIDED = {"lora_modules_to_save_tied"}  # asks for --untie or --keep-tied


@pytest.mark.parametrize("name", sorted(closed_form.ORACLES.keys() - PEFT_FAULTS - UNDECIDED))
def test_merges_by_peft_are_equal_up_to_rounding(name: str) -> None:
    """In float32 and in bfloat16, element by element; sums of large terms nearly cancel in all."""
    folder = DATA / name
    report = lt.verify(folder / "merged.safetensors", base=folder / "base", adapters=[str(folder)])
    assert report.differing == ()
    assert report.within_rounding + report.identical > 0


@pytest.mark.parametrize("name", ["lora_linear", "lora_dora", "lora_linear_bf16"])
def test_a_strength_that_is_a_little_wrong_is_noticed(name: str) -> None:
    folder = DATA / name
    merged = folder / "merged.safetensors"
    report = lt.verify(merged, base=folder / "base", adapters=[f"{folder}:0.98"])
    assert report.verdict == "differs" and report.differing
