"""Names of image and video models: what they stand for, and which family a file is of."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loratool.archs.families import Guess, families, family_of, module_shapes, places
from loratool.archs.family_files import templates_of
from loratool.archs.kernels import kernel_of

KEYS = Path(__file__).parents[1] / "data" / "keys"
LLM = Path(__file__).parents[1] / "data" / "llm"
SUFFIX = re.compile(r"\.(lora_(down|up)\.weight|lora_[AB]\.weight|alpha)$")


def load(name: str) -> Any:
    with gzip.open(KEYS / f"{name}.json.gz") as file:
        return json.load(file)


MAPS: Mapping[str, Any] = load("ldm_diffusers")
FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl_base": "sdxl"}
UNET = "model.diffusion_model."


def unet_pairs(arch: str) -> list[tuple[str, str]]:
    """(name in the single file, name in diffusers) of the modules of the UNet."""
    pairs = MAPS[arch]["pairs"].items()
    names = [(a, b.removeprefix("unet_")) for a, b in pairs if a.startswith(UNET)]
    return sorted({(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in names})


def guess(keys: Mapping[str, list[int]], metadata: Mapping[str, str] | None = None) -> Guess:
    """Of an adapter's file."""
    shapes: dict[str, list[int]] = {}
    for key, shape in keys.items():
        module = SUFFIX.sub("", key)
        module = re.sub(r"^lora_(unet|te\d?)_", r"\1.", module)
        sizes = shapes.setdefault(module, [0, 0])
        if len(shape) > 1:
            is_down = "lora_down" in key or "lora_A" in key
            sizes[is_down] = shape[1 if is_down else 0]
    return family_of({module: tuple(sizes) for module, sizes in shapes.items()}, metadata)


@pytest.mark.parametrize("arch", MAPS)
def test_the_maps_of_the_unets_have_no_difference_either_way(arch: str) -> None:
    family = FAMILY.get(arch, arch)
    pairs = unet_pairs(arch)
    assert len(pairs) > 250
    for ldm, other in pairs:
        bare = ldm.removeprefix(UNET)
        for spelled in (ldm, bare, other, bare.replace(".", "_"), other.replace(".", "_")):
            (place,) = places("unet", spelled, family=family)
            assert place.original == (bare,)
            assert place.diffusers == (other,)


@pytest.mark.parametrize("arch", MAPS)
def test_a_unet_is_told_by_its_shapes(arch: str) -> None:
    """Only the inputs of cross-attention are known: the width of the text."""
    family = FAMILY.get(arch, arch)
    width = {"sd1": 768, "sd2": 1024, "sdxl_refiner": 1280}.get(family, 2048)
    for side in (0, 1):
        shapes: dict[str, tuple[int, ...]] = {}
        for pair in unet_pairs(arch):
            crosses = re.search(r"attn2\.to_[kv]$", pair[side])
            shapes[pair[side]] = (640, width) if crosses else ()
        found = family_of(shapes)
        assert (found.family, found.told) == (family, "names and shapes")


@pytest.mark.parametrize("arch", ["sd15", "sdxl_base"])
def test_a_whole_checkpoint_is_told(arch: str) -> None:
    """With text encoders and a VAE, which has as many tensors."""
    width = 768 if arch == "sd15" else 2048
    decoder = [f"first_stage_model.decoder.{i}.conv.weight" for i in range(900)]
    shapes = module_shapes(
        (name, (320, width) if "attn2.to_k" in name else ())
        for name in (*MAPS[arch]["pairs"], *decoder)
    )
    assert family_of(shapes).family == FAMILY[arch]


def test_real_files_are_told() -> None:
    flux = guess(load("flux_kohya_te1"))
    assert (flux.family, flux.parts) == ("flux1", {"te1": "clip_l"})
    assert guess(load("flux_diffusers_full")).title == "FLUX.1"
    assert guess(load("wan22_lightning")).title == "Wan 14B"


@pytest.mark.parametrize("name", ["flux_kohya_te1", "flux_diffusers_full", "wan22_lightning"])
def test_every_module_of_a_real_file_has_a_place(name: str) -> None:
    modules = {SUFFIX.sub("", key) for key in load(name)}
    for module in modules:
        bare = re.sub(r"^lora_(unet|te1)_", "", module)
        assert places("te1" if "_te1_" in module else "unet", bare), module


def test_a_fused_module_and_its_parts() -> None:
    (fused,) = places("unet", "single_blocks_7_linear1", family="flux1")
    parts = fused.split(21504, 3072)
    assert parts == [(0, 3072), (3072, 6144), (6144, 9216), (9216, 21504)]
    for i, name in enumerate(fused.diffusers):
        for spelled in (name, f"single_blocks.7.linear1.{i}"):
            (part,) = places("transformer", spelled, "bias", "flux1")
            assert (part.index, part.is_part, part.original) == (i, True, fused.original)
    (some,) = places("unet", "single_blocks.7.processor.qkv_lora", family="flux1")
    assert (some.first, some.stop, len(some.diffusers)) == (0, 3, 3)
    with pytest.raises(ValueError, match="do not make"):
        fused.split(9215, 3072)


def test_halves_change_places_on_the_way_to_the_other_naming_only() -> None:
    (last,) = places("unet", "final_layer_adaLN_modulation_1", family="flux1")
    assert last.is_swapped("diffusers") and not last.is_swapped("original")
    (back,) = places("unet", "norm_out.linear", family="flux1")
    assert back.is_swapped("original") and not back.is_swapped("diffusers")
    (context,) = places("unet", "joint_blocks_9_context_block_adaLN_modulation_1", family="sd3")
    assert context.is_swapped("diffusers", 2 * 1536, 1536)
    assert not context.is_swapped("diffusers", 6 * 1536, 1536)


def test_metadata_tell_what_names_do_not() -> None:
    keys = {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": [4, 320]}
    assert guess(keys).family is None
    for key, value, family in (
        ("ss_base_model_version", "sdxl_base_v1-0", "sdxl"),
        ("ss_base_model_version", "sd_v1", "sd1"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "sd1"),
    ):
        found = guess(keys, {key: value})
        assert (found.family, found.told) == (family, "metadata")
    # Names that cannot be of what the metadata say are believed.
    assert guess(load("wan22_lightning"), {"ss_base_model_version": "flux1"}).family == "wan"


def test_where_shapes_agree_the_dots_of_names_tell_and_then_the_rank() -> None:
    for name, family in (
        ("double_blocks.0.img_attn_qkv", "hunyuan_video"),
        ("double_blocks.0.img_attn.qkv", "flux1"),
        ("double_blocks_0_img_attn_qkv", "flux1"),
    ):
        found = family_of({f"unet.{name}": (9216, 3072)})
        assert (found.family, "hunyuan_video" in (family, *found.others)) == (family, True)
    tie = family_of({"unet.down_blocks.0.attentions.0.proj_in": (320, 320)})
    assert tie.family is None and {"sd1", "sdxl"} <= set(tie.others)


@pytest.mark.parametrize(
    ("doubles", "singles", "family"),
    [
        (range(19), range(38), "flux1"),
        (range(10), range(20), "longcat_image"),
        (range(6), range(27), "ovis_image"),
        ((), (7, 19), "flux1"),
        ((), range(27), "flux1"),
        ((), range(20), "flux1"),
    ],
)
def test_of_models_with_the_names_and_width_of_flux_all_depths_tell(
    doubles: Sequence[int], singles: Sequence[int], family: str
) -> None:
    """Some of the blocks are what people train of FLUX.1."""
    names = [f"transformer_blocks.{i}.attn.to_q" for i in doubles]
    names += [f"single_transformer_blocks.{i}.attn.to_q" for i in singles]
    assert family_of({f"transformer.{name}": (3072, 3072) for name in names}).family == family


def test_attention_of_double_blocks_alone_is_not_taken_for_krea2() -> None:
    """FLUX.2's has its width and names in diffusers; Krea-2's k and v are narrower."""
    names = [f"transformer.transformer_blocks.{i}.attn.{m}" for i in range(8)
             for m in ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    assert family_of(dict.fromkeys(names, (6144, 6144))).family == "flux2"
    narrow = {n: (1536 if n.endswith(("to_k", "to_v")) else 6144, 6144) for n in names}
    assert family_of(narrow).family == "krea2"


def test_feed_forward_layers_of_flux_are_not_taken_for_mochi() -> None:
    sizes = {"net.0.proj": (12288, 3072), "net.2": (3072, 12288)}
    names = {f"transformer.transformer_blocks.{i}.{ff}.{end}": shape for i in range(19)
             for ff in ("ff", "ff_context") for end, shape in sizes.items()}  # fmt: skip
    assert family_of(names).family in ("flux1", None)


def test_a_text_of_another_width_is_not_of_ltx_video() -> None:
    """Anima has its width, depth and names in diffusers; its keys come from 1024 numbers."""
    names = {f"transformer.transformer_blocks.{i}.attn{n}.{m}":
             (2048, 1024 if n == 2 and m in ("to_k", "to_v") else 2048)
             for i in range(28) for n in (1, 2) for m in ("to_q", "to_k", "to_v")}  # fmt: skip
    assert family_of(names).family == "anima"
    assert family_of(dict.fromkeys(names, (2048, 2048))).family == "ltx_video"


def test_a_language_model_is_of_no_family() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qkvo"]
    assert family_of(dict.fromkeys(names, (2048, 2048))).family is None
    assert family_of({}).family is None


def modules_of(name: str, size: Mapping[str, Any], naming: str) -> dict[str, tuple[int, ...]]:
    """The first and the last block of a model of a size, by the names of one program."""
    family, found = families()[name], {}
    tells, width = family.tells, size["width"]
    ratios = {t: r for w, r in tells.get("ratio", {}).items() for t in templates_of(family, w)}
    wide = {t for written in tells.get("width", ()) for t in templates_of(family, written)}
    depths = dict(zip(tells.get("depth", ()), size.get("depth", ()), strict=False))
    for row in (r for r in family.rows if not r.is_tensor):
        template = row.names["original"][0].template
        depth = next((d for prefix, d in depths.items() if template.startswith(f"{prefix}.")), 2)
        for number in (0, depth - 1):
            numbers = (str(number), *"000")[: template.count("{n}")]
            originals = {(n.first, n.stop): n.template for n in row.names["original"]}
            for one in row.names[naming]:
                whole = originals.get((one.first, one.stop), "")
                ratio = ratios.get(whole, 3 if len(row.names[naming]) == 1 else 1)
                shape = (int(ratio * width), width) if template in wide else ()
                found[row.fill(one, naming, numbers)] = shape
    return found


# Their original code calls layers as GPT-NeoX does, behind a word that any adapter may begin with.
UNTOLD = (("cogview", "original"), ("cogvideox", "original"))
SIZES = [(name, label, naming) for name, family in families().items()
         for label in family.tells.get("sizes", ()) for naming in ("original", "diffusers")
         if family.component == "unet" and not any(row.blocks for row in family.rows)
         and (name, naming) not in UNTOLD]  # fmt: skip


@pytest.mark.parametrize(("name", "label", "naming"), SIZES)
def test_every_size_of_a_family_is_told_from_all_others(name: str, label: str, naming: str) -> None:
    shapes = modules_of(name, families()[name].tells["sizes"][label], naming)
    for prefix in ("", "unet.", "model.diffusion_model."):
        found = family_of({prefix + module: shape for module, shape in shapes.items()})
        assert (found.family, found.size, found.told) == (name, label, "names and shapes")
    flat = {f"unet.{module.replace('.', '_')}": shape for module, shape in shapes.items()}
    assert family_of(flat).family == name


def test_names_of_qwen3_vl_are_of_hidream_only_with_what_it_has_besides() -> None:
    block = "model.language_model.layers.{}.self_attn.{}_proj"
    names = [block.format(i, p) for i in range(4) for p in "qkvo"]
    assert family_of(dict.fromkeys(names, (2048, 2048))).family is None
    assert family_of(dict.fromkeys([*names, "model.x_embedder.proj1"], ())).family == "hidream_o1"
    told = family_of(dict.fromkeys(names, ()), {"ss_base_model_version": "hidream_o1_image"})
    assert (told.family, told.told) == ("hidream_o1", "metadata")


@pytest.mark.parametrize("path", sorted(LLM.rglob("*.safetensors")), ids=lambda p: p.parent.name)
def test_no_sample_of_a_language_model_is_of_a_family(path: Path) -> None:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}
    for prefix in ("base_model.model.", ""):
        modules = {
            re.sub(r"\.(lora_\w+|weight|bias)(\..*)?$", "", key.removeprefix(prefix)): shape
            for key, shape in shapes.items()
        }
        found = family_of(modules)
        assert found.family is None and not found.others


def test_kernels_are_told_by_names_where_a_family_has_one_meaning_for_them() -> None:
    for family, module, kernel in (
        ("sdxl", "input_blocks.1.0.in_layers.2", (3, 3)),
        ("sd1", "input_blocks.1.1.proj_in", (1, 1)),
        ("sdxl", "input_blocks.4.1.proj_in", ()),
        ("flux1", "single_blocks.3.linear1", ()),
        ("wan", "patch_embedding", None),
        ("sana", "blocks.3.mlp.depth_conv.conv", None),
    ):
        assert kernel_of(places("unet", module, family=family)[0]) == kernel, module


@pytest.mark.parametrize(("stem", "width", "more", "said", "title"), [
    ("transformer.blocks.3.attn1.to_q", 5120, "", "", "Wan 14B or Helios"),
    ("transformer.blocks.3.attn1.to_q", 5120, "transformer.patch_short", "", "Helios"),
    ("transformer.blocks.3.attn1.to_q", 5120, "", "wan2.1", "Wan 14B"),
    ("transformer.blocks.3.attn1.to_q", 5120, "", "helios", "Helios"),
    ("transformer.blocks.3.attn1.to_q", 1536, "", "", "Wan 1.3B"),
    ("diffusion_model.blocks.3.self_attn.q", 5120, "", "", "Wan 14B"),
    ("blocks.3.self_attn.q_proj", 2048, "", "", "Anima or Cosmos-Predict2 2B"),
    ("blocks.3.self_attn.q_proj", 2048, "llm_adapter.in_proj", "", "Anima"),
    ("blocks.3.self_attn.q_proj", 2048, "crossattn_proj.0", "", "Cosmos-Predict2 2B"),
    ("blocks.3.self_attn.q_proj", 5120, "", "", "Cosmos-Predict2 14B"),
    ("transformer.transformer_blocks.3.attn1.to_q", 2048, "", "anima", "Anima"),
])  # fmt: skip
def test_all_names_of_models_that_nothing_tells_apart(
    stem: str, width: int, more: str, said: str, title: str
) -> None:
    modules = {stem: (width, width)} | ({more: ()} if more else {})
    assert family_of(modules, {"ss_base_model_version": said} if said else {}).title == title
