"""Every rule of the programs of image models: a file with it, and one without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratool.archs.families import families
from loratool.dialects.programs import Look, find_program, look_at, models, programs
from loratool.dialects.programs.grammar import Tensor
from loratool.frozen import replace
from loratool.options.groups import Read
from loratool.report.check import Simulation
from tests.unit.programs_samples import SAMPLES, Sample, Shapes

IDS = [f"{s.program}-{s.rule}" for s in SAMPLES]


def look(folder: Path, tensors: Shapes, metadata: Mapping[str, str] | None = None) -> Look:
    """Write a file and look at it."""
    told = dict(metadata or {})
    whole, odd = told.pop("alpha is", "") == "I64", told.pop("odd alpha", "none")
    types = {k: np.int64 if whole and k.endswith("alpha") else np.float32 for k in tensors}
    path = folder / "style.safetensors"
    made = {k: np.ones(v, types[k]) for k, v in tensors.items()}
    save_file(
        {k: np.asarray(2 * t) if odd in k else t for k, t in made.items()}, path, told or None
    )
    return look_at(path, Read(), max_header=1 << 20)


def simulate(sample: Sample, folder: Path, *, bad: bool) -> Simulation:
    found = look(folder, sample.bad if bad else sample.good, sample.metadata if bad else None)
    return find_program(sample.program).simulate(found)


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_a_rule_applies_where_it_should_and_nowhere_else(sample: Sample, tmp_path: Path) -> None:
    found = simulate(sample, tmp_path, bad=True)
    rules = {f.rule: f for f in found.findings}
    if sample.verdict == "past":
        assert sample.rule in {f.rule for f in found.past} and sample.rule not in rules
    else:
        assert rules[sample.rule].verdict == sample.verdict
        whole = rules[sample.rule].is_whole
        hit = [m for m in found.modules if m.rule == sample.rule]
        parts = "wrong" if sample.verdict == "dropped" else sample.verdict  # of which some loads
        assert hit and all(m.verdict in (sample.verdict, parts) for m in hit)
        assert not whole or all(m.verdict == sample.verdict for m in found.modules)
    better = simulate(sample, tmp_path, bad=False)
    assert sample.rule not in {f.rule for f in (*better.findings, *better.past)}


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_what_is_asked_of_one_of_names_alike_holds_for_each(sample: Sample, tmp_path: Path) -> None:
    other = {re.sub(r"(?<=[._])0(?=[._])", "3", key): s for key, s in sample.good.items()}
    together = look(tmp_path, {**other, **sample.bad}, sample.metadata)
    apart = replace(together)
    vars(apart)["alike"] = tuple((one,) for one in enumerate(apart.groups))
    for program in programs():
        if program.is_of_images:
            assert program.simulate(together) == program.simulate(apart)


def test_kohya_is_a_name_of_its_scripts() -> None:
    assert find_program("kohya") is find_program("sd-scripts")


@pytest.mark.parametrize("program", [p.name for p in programs() if p.is_of_images])
def test_every_rule_has_its_files_its_sentence_and_its_source(program: str) -> None:
    rules = find_program(program).rules
    assert [r.name for r in rules] == list(dict.fromkeys(r.name for r in rules))
    assert {r.name for r in rules} == {s.rule for s in SAMPLES if s.program == program}
    assert all(r.says and r.source.startswith("https://") for r in rules)


FLUX = "lora_unet_single_blocks_0_linear1"
KLEIN = (9 * 3072, 3072)  # FLUX.1 has seven times as many rows as columns
PRODUCTS: Mapping[str, Shapes] = {
    "loha": {"hada_w1_a": (KLEIN[0], 2), "hada_w1_b": (2, 3072), "hada_w2_a": (KLEIN[0], 2),
             "hada_w2_b": (2, 3072)},
    "lokr": {"lokr_w1": (9, 3), "lokr_w2_a": (3072, 2), "lokr_w2_b": (2, 1024)},
    "full": {"diff": KLEIN},
}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_model_is_told_by_shapes_of_products_too(kind: str) -> None:
    tensors = {f"{FLUX}.{end}": Tensor("F16", shape) for end, shape in PRODUCTS[kind].items()}
    family = Look(tensors).family
    assert (family.name, family.title, family.naming) == ("flux2", "FLUX.2 klein-4B", "original")


def test_models_are_families_and_loaded_as_their_kin() -> None:
    known = families()
    named = {value for name, value in vars(models).items() if name.isupper() and name[0] != "_"}
    assert named - {"original", "diffusers", "both"} <= set(known)
    chroma = {
        f"distilled_guidance_layer.in_proj.{end}": Tensor("F16", shape)
        for end, shape in (("lora_A.weight", (2, 64)), ("lora_B.weight", (64, 2)))
    }
    assert Look(chroma).family == models.Family("flux1", "chroma", "Chroma", "both")
