"""Flat names are found among the base's, whichever spelling either side has."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.archs.flat import flat_names, known_names

KEYS = Path(__file__).parents[1] / "data" / "keys"
KOHYA = {"unet": "unet", "te": "te", "te0": "te1", "te1": "te2"}
PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
HOME = re.compile(r"^(model\.diffusion_model|cond_stage_model\.(transformer|model)|"
                  r"conditioner\.embedders\.\d\.(transformer|model))\.")  # fmt: skip
# Bare parameters, and the head of the second text encoder: no adapter changes them.
UNTOUCHED = ("position_embedding.weight", "text_projection.weight", "logit_scale")


def load(name: str) -> Any:
    with gzip.open(KEYS / f"{name}.json.gz") as file:
        return json.load(file)


ARCHS: Mapping[str, Any] = load("ldm_diffusers")


def pairs(arch: str) -> list[tuple[str, str, str]]:
    """(name in the single file, kohya's component, name in diffusers behind its component)."""
    found = []
    for ldm, other in ARCHS[arch]["pairs"].items():
        part, _, name = other.partition("_")
        if not name.endswith(UNTOUCHED):
            found.append((ldm, KOHYA[part], name))
    return found


def flat(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module.replace(".", "_"), parameter


@pytest.mark.parametrize("arch", ARCHS)
def test_names_of_diffusers_find_the_tensors_of_a_single_file(arch: str) -> None:
    index = flat_names(ARCHS[arch]["pairs"])
    for ldm, component, name in pairs(arch):
        meanings = index.look_up(component, *flat(name))
        assert [m.names for m in meanings] == [(ldm,)], (component, name)


@pytest.mark.parametrize("arch", ARCHS)
def test_names_of_the_original_code_find_the_tensors_of_diffusers(arch: str) -> None:
    index = flat_names(f"{PARTS[c]}.{name}" for _, c, name in pairs(arch))
    for ldm, component, name in pairs(arch):
        for spelled in (HOME.sub("", ldm), name):
            meanings = index.look_up(component, *flat(spelled))
            assert [m.names for m in meanings] == [(f"{PARTS[component]}.{name}",)], spelled


@pytest.mark.parametrize("arch", ["sdxl_base", "sd21"])
def test_q_k_v_of_one_tensor_have_names_of_their_own(arch: str) -> None:
    fused = ARCHS[arch]["fused_cat"]
    index = flat_names(fused)
    for ldm, parts in fused.items():
        for other, part in zip(parts["cat"], range(3), strict=True):
            before, _, name = other.partition("_")
            (meaning,) = index.look_up(KOHYA[before], *flat(name))
            assert meaning.names == (ldm,) and meaning.holds == ((0, 3),)
            assert meaning.wanted == (part, part + 1)


@pytest.mark.parametrize("arch", ["sd15", "sdxl_base"])
def test_names_are_known_without_a_base(arch: str) -> None:
    index = known_names({"sd15": "sd1"}.get(arch, "sdxl"))
    for ldm, component, name in pairs(arch):
        module = name.rpartition(".")[0]
        if ("embedding" in module and component != "unet") or "final_layer_norm" in module:
            continue
        for spelled in (name, ldm.removeprefix("model.diffusion_model.")):
            if component == "unet" or spelled == name:
                meanings = index.look_up(component, *flat(spelled))
                assert [m.names for m in meanings] == [(name,)], spelled


def test_the_known_names_of_flux_are_those_of_a_real_file() -> None:
    index = known_names("flux1")
    modules = {key.partition(".")[0] for key in load("flux_kohya_te1")}
    assert len(modules) == 376
    for module in modules:
        _, part, name = module.split("_", 2)
        (meaning,) = index.look_up(part, name, "weight")
        assert meaning.names[0].replace(".", "_") == f"{name}_weight"


def test_a_name_that_could_be_two_is_both() -> None:
    index = flat_names(["a.b_c.weight", "a_b.c.weight"])
    assert len(index.look_up("unet", "a_b_c", "weight")) == 2
    assert index.look_up("unet", "a_b", "weight") == []


def test_a_part_of_a_pipeline_has_names_of_its_own() -> None:
    index = flat_names(["unet.q.weight", "text_encoder.q.weight", "text_encoder.k.weight"])
    for component, name in (
        ("unet", "unet.q"),
        ("te", "text_encoder.q"),
        ("te1", "text_encoder.q"),
    ):
        assert [m.names for m in index.look_up(component, "q", "weight")] == [(f"{name}.weight",)]
    assert index.look_up("unet", "k", "weight") == []
    # Where the part is not named, it is any: one if only one has the name, else unclear.
    assert len(index.look_up("", "k", "weight")) == 1 and len(index.look_up("", "q", "weight")) == 2


def test_an_underscore_too_many_is_forgiven() -> None:
    index = flat_names(["unet.blocks.0.q.weight"])
    for spelled in ("blocks_0_q", "_blocks_0_q", "blocks_0_q_"):
        assert [m.names for m in index.look_up("unet", spelled, "weight")] == [
            ("unet.blocks.0.q.weight",)
        ]


WORDS = st.sampled_from(["a", "b", "a_b", "b_c", "c", "0", "1", "x_0", "0_y"])
NAMES = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(NAMES)
def test_a_flat_name_means_all_that_is_flattened_to_it_and_nothing_else(names: list[str]) -> None:
    index = flat_names(f"{name}.weight" for name in names)
    for name in names:
        same = {n for n in names if n.replace(".", "_") == name.replace(".", "_")}
        found = index.look_up("unet", name.replace(".", "_"), "weight")
        assert {m.names for m in found} == {(f"{n}.weight",) for n in same}
