"""What the programs call a weight, by lists that no map of ours was made from."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from loratool.archs.families import families, family_of, places

LISTS = (Path(__file__).parents[1] / "data" / "keys" / "family_names.txt").read_text()
FAMILIES = {name: lines for name, *lines in map(str.splitlines, LISTS.split("\n\n"))}
GROUP = re.compile(r"\{([^}]*)\}")


def both_sides(line: str) -> list[tuple[str, tuple[str, ...]]]:
    """(the original's name, the names in diffusers) of a line, its braces written out."""
    left, _, right = line.partition(" = ")
    right = right or left
    words = [[g.split("|") for g in GROUP.findall(side)] for side in (left, right)]
    found = []
    for chosen in product(*(range(len(g)) for g in words[0])):
        sides = []
        for side, groups in zip((left, right), words, strict=True):
            some = iter([g[i] for g, i in zip(groups, chosen, strict=True)])
            sides.append(GROUP.sub(lambda _, some=some: next(some), side))
        start, _, parts = sides[1].rstrip(")").partition("(")
        found.append((sides[0], tuple(start + part for part in parts.split() or [""])))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_programs(family: str) -> None:
    component = families()[family].component
    for line in FAMILIES[family]:
        if line.startswith("~"):
            continue
        swap = {">": "always", "?": "2in"}.get(line[0], "")
        for original, diffusers in both_sides(line.lstrip(">? ")):
            for spelled in (original, original.replace(".", "_")):
                (place,) = places(component, spelled, family=family)
                assert place.diffusers == diffusers
                assert place.row.swap == swap, spelled
            if len(place.original) > 1:
                continue  # another program's name of what the original has apart
            assert place.original == (original,)
            for number, name in enumerate(diffusers):
                for spelled in (name, name.replace(".", "_")):
                    (part,) = places(component, spelled, family=family)
                    assert (part.row, part.original) == (place.row, (original,)), spelled
                    assert part.index == number or len(diffusers) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_other_trainers_stand_for_the_originals(family: str) -> None:
    """With ``:first-stop`` for those of some parts of a fused projection."""
    component = families()[family].component
    for line in FAMILIES[family]:
        for name, (meant,) in both_sides(line[2:]) if line.startswith("~") else ():
            original, _, span = meant.partition(":")
            for spelled in (name, name.replace(".", "_")):
                (place,) = places(component, spelled, family=family)
                assert place.original == (original,), spelled
                parts = f"{place.first}-{place.stop}"
                assert parts == (span or f"0-{place.row.parts}"), spelled


VERSIONS = {
    "hunyuan_video": "hunyuan_video hunyuan-video",
    "hunyuan_video_15": "hunyuan_video_1_5 hunyuan-video-1.5",
    "wan": "wan wan2.1 wan_2.1 wan_2.2_14b wan_2.2_5b",
    "framepack": "framepack",
    "flux1": "flux1 flux_kontext flux.1_kontext Flux.1-dev flux-1-dev flux-1-schnell",
    "flux2": "flux2 flux_2_dev flux_2_klein_4b flux2_klein_9b Flux.2-dev Flux.2-klein-4b",
    "qwen_image": "qwen_image qwen_image_edit qwen_image_layered Qwen-Image Qwen-Image-Edit "
    "Qwen-Image-Edit-Plus Qwen-Image-Edit-2511 Qwen-Image-Layered",
    "kandinsky5": "kandinsky5 Kandinsky-5",
    "z_image": "z_image Z-Image zimage",
    "hidream_o1": "hidream_o1_image HiDream-O1-Image",
    "hidream_i1": "hidream_i1",
    "ideogram4": "ideogram4 Ideogram-4",
    "krea2": "krea2 Krea-2",
    "anima": "anima anima-preview",
    "chroma": "chroma",
    "ltx2": "ltx2 ltx2.3",
    "minimax_h3": "minimax_h3",
    "lumina2": "lumina2 lumina-2",
    "hunyuan_image": "hunyuan-image-2.1",
    "sd1": "sd_v1 sd_1.5 stable-diffusion-v1",
    "sd2": "sd_v2 stable-diffusion-v2-512 stable-diffusion-v2-768-v",
    "sdxl": "sdxl_base_v1-0 sdxl_ sdxl_1.0 stable-diffusion-xl-v1-base",
    "sd3": "sd3_m stable-diffusion-3-m",
}


@pytest.mark.parametrize("family", VERSIONS)
def test_what_trainers_call_a_family(family: str) -> None:
    """In ``ss_base_model_version``, and with ``/lora`` in ``modelspec.architecture``."""
    for word in VERSIONS[family].split():
        for key, value in (
            ("ss_base_model_version", word),
            ("modelspec.architecture", f"{word}/lora"),
        ):
            found = family_of({}, {key: value})
            assert (found.family, found.told) == (family, "metadata"), (key, value)
