"""`extract` of one layout of an image model against the other: single file and folder of diffusers.

The oracle needs no tolerance: the tensors are the same numbers, so that what is extracted from a
fine-tune in the other layout is, bit for bit, what is extracted from one in the base's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.adapter import JoinedRef, TensorRef
from loratool.archs.families import places
from loratool.bind.seen import in_layout_of, joined, turned
from loratool.dtypes import numel
from loratool.frozen import replace
from loratool.location import RemoteFile
from loratool.plan import Plan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.reader import FileReader, are_of_one_file, read_bytes
from loratool.wire import dump, load
from tests.oracle.kohya_files import Array
from tests.unit.test_families import MAPS

D = 16
Layout = dict[str, Array]
MIDDLE = "middle_block.1.transformer_blocks", "mid_block.attentions.0.transformer_blocks"
SDXL = {  # the original's name -> diffusers', shape
    **{f"{MIDDLE[0]}.{i}.attn2.to_k.weight": (f"unet.{MIDDLE[1]}.{i}.attn2.to_k.weight", (D, 2048))
       for i in (0, 9)},
    "input_blocks.4.0.in_layers.2.weight":
        ("unet.down_blocks.1.resnets.0.conv1.weight", (D, 8, 3, 3)),
    "input_blocks.4.0.in_layers.0.weight": ("unet.down_blocks.1.resnets.0.norm1.weight", (D,)),
    "out.2.bias": ("unet.conv_out.bias", (4,)),
}  # fmt: skip
LAYER = "transformer.resblocks.0.", "text_encoder_2.text_model.encoder.layers.0."
NAMES = {
    "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL",
    "text_encoder_2": "CLIPTextModelWithProjection", "transformer": "FluxTransformer2DModel",
}  # fmt: skip


def sdxl(seed: int) -> tuple[Layout, Layout]:
    """Both layouts of the same numbers."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape), np.float32)

    single: Layout = {}
    folder: Layout = {}
    for name, (other, shape) in SDXL.items():
        single[f"model.diffusion_model.{name}"] = folder[other] = numbers(*shape)
    te1 = "text_model.encoder.layers.0.mlp.fc1.weight"
    single[f"conditioner.embedders.0.transformer.{te1}"] = folder[f"text_encoder.{te1}"] = numbers(
        4 * D, D
    )
    te2 = "conditioner.embedders.1.model."
    for kind, shape in (("weight", (3 * D, D)), ("bias", (3 * D,))):
        fused = single[f"{te2}{LAYER[0]}attn.in_proj_{kind}"] = numbers(*shape)
        for i, part in enumerate("qkv"):
            own = fused[i * D : (i + 1) * D].copy()
            folder[f"{LAYER[1]}self_attn.{part}_proj.{kind}"] = own
    for name, other in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1")):
        own = single[f"{te2}{LAYER[0]}{name}.weight"] = numbers(D, D)
        folder[f"{LAYER[1]}{other}.weight"] = own
    single[f"{te2}text_projection"] = numbers(D, 24)
    folder["text_encoder_2.text_projection.weight"] = np.ascontiguousarray(
        single[f"{te2}text_projection"].T
    )
    fixed = np.ones((8, 8, 3, 3), np.float32)
    single["first_stage_model.encoder.down.0.block.0.conv1.weight"] = fixed
    folder["vae.encoder.down_blocks.0.resnets.0.conv1.weight"] = fixed
    return single, folder


def flux(seed: int) -> tuple[Layout, Layout]:
    """Projections that are fused in a single file, one of unequal parts, and turned halves."""
    rng = np.random.default_rng(seed)
    single: Layout = {}
    folder: Layout = {}
    for kind, width in (("weight", (D,)), ("bias", ())):
        fused = np.asarray(rng.normal(size=(3 * D, *width)), np.float32)
        joined = np.asarray(rng.normal(size=(7 * D, *width)), np.float32)
        last = np.asarray(rng.normal(size=(2 * D, *width)), np.float32)
        single |= {f"double_blocks.0.img_attn.qkv.{kind}": fused,
                   f"single_blocks.0.linear1.{kind}": joined,
                   f"final_layer.adaLN_modulation.1.{kind}": last}  # fmt: skip
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            own = slice(i * D, (i + 1) * D)
            folder[f"transformer.transformer_blocks.0.attn.{part}.{kind}"] = fused[own].copy()
            folder[f"transformer.single_transformer_blocks.0.attn.{part}.{kind}"] = joined[
                own
            ].copy()
        folder[f"transformer.single_transformer_blocks.0.proj_mlp.{kind}"] = joined[3 * D :].copy()
        folder[f"transformer.norm_out.linear.{kind}"] = np.concatenate([last[D:], last[:D]])
    norm = np.asarray(rng.normal(size=8), np.float32)
    single["single_blocks.0.norm.query_norm.scale"] = norm
    folder["transformer.single_transformer_blocks.0.attn.norm_q.weight"] = norm
    return single, folder


def write(place: Path, single: Layout, folder: Layout) -> dict[str, Path]:
    """A single file and a pipeline of diffusers."""
    place.mkdir()
    found = {"single": place / "single.safetensors", "pipe": place / "pipe"}
    save_file(single, str(found["single"]))
    parts = {name.partition(".")[0] for name in folder}
    found["pipe"].mkdir()
    index = {
        part: ["transformers" if "text" in part else "diffusers", NAMES[part]] for part in parts
    }
    (found["pipe"] / "model_index.json").write_text(json.dumps({"_class_name": "Pipe", **index}))
    for part in parts:
        home = found["pipe"] / part
        home.mkdir()
        own = {n.partition(".")[2]: t for n, t in folder.items() if n.startswith(f"{part}.")}
        is_text = "text" in part
        stem = "model" if is_text else "diffusion_pytorch_model"
        save_file(own, str(home / f"{stem}.safetensors"))
        config = {"model_type": "clip_text_model"} if is_text else {"_class_name": NAMES[part]}
        (home / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("make", [sdxl, flux])
@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft"])
def test_the_layout_of_the_fine_tune_changes_no_bit(make: Any, to: str, tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", *make(1)), write(tmp_path / "tuned", *make(2))
    for layout, other in (("single", "pipe"), ("pipe", "single")):
        got = {}
        for kind in (layout, other):
            out = tmp_path / f"{layout}-{kind}{'' if to == 'peft' else '.safetensors'}"
            lt.extract(tuned[kind], base=base[layout], output=out, to=to, rank=D)
            got[kind] = load_file(str(out / "adapter_model.safetensors" if to == "peft" else out))
        assert got[layout].keys() == got[other].keys()
        for name, tensor in got[layout].items():
            assert np.array_equal(tensor, got[other][name]), name


def test_it_is_the_fine_tune_in_the_layout_of_the_base(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", *sdxl(1)), write(tmp_path / "tuned", *sdxl(2))
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged"
    report = lt.extract(tuned["single"], base=base["pipe"], output=lora, to="kohya", rank=D)
    assert [name.partition(".")[0] for name, *_ in report.left_out] == ["first_stage_model"]
    lt.merge([lora], base=base["pipe"], output=merged)
    for name, want in sdxl(2)[1].items():
        part, _, rest = name.partition(".")
        (file,) = (merged / part).glob("*.safetensors")
        assert np.abs(load_file(str(file))[rest] - want).max() <= 2.0**-18 * np.abs(want).max(), (
            name
        )


def test_pieces_travel_between_processes(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", *flux(1)), write(tmp_path / "tuned", *flux(2))
    seen = in_layout_of(open_checkpoint(tuned["pipe"]), open_checkpoint(base["single"]))
    assert seen is not None
    refs = [ref for ref in seen.tensors.values() if isinstance(ref, JoinedRef)]
    assert len(refs) == 6
    steps = [Step("compare_bytes", TensorSpec(r.name, r.dtype, r.shape), (r, r), (1, r.numel))
             for r in refs]  # fmt: skip
    plan = Plan("verify", tuple(steps))
    assert load(dump(plan), Plan) == plan
    for ref in refs:
        whole, size = bytes(read_bytes(ref)), 4
        assert {file for file, *_ in ref.ranges()} == {r.file for r in ref.stored}
        with FileReader() as reader:  # any part of it, over the edges of pieces
            for start in range(0, ref.nbytes - 3 * size, 7 * size):
                part = bytearray(min(41 * size, ref.nbytes - start))
                reader.read_into(ref, start, memoryview(part))
                assert part == whole[start : start + len(part)]
                assert sum(n for *_, n in ref.ranges(start, start + len(part))) == len(part)


def test_other_bytes_of_one_remote_file_are_no_equal_ones() -> None:
    """Halves and axes that change places begin where the tensor begins."""
    file = RemoteFile("hf://me/model@0", "model.safetensors", 1 << 20, digest="a" * 64)
    plain = TensorRef(file, "w", "F32", (8, 8), 100, 256)
    swapped, across = joined("w", [(plain, (4, 8)), (plain, (0, 4))]), turned(plain)
    assert across is not None and are_of_one_file([plain, plain])
    assert are_of_one_file([across, across])
    for other in (swapped, across, joined("w", [(plain, (0, 4)), (plain, (0, 4))])):
        assert not are_of_one_file([plain, other])


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    """A VAE, whose names no map has, and text encoders that a fine-tune of the UNet lacks."""
    base, tuned = write(tmp_path / "base", *sdxl(1)), write(tmp_path / "tuned", *sdxl(2))
    found = lt.extract(tuned["pipe"] / "unet", base=base["single"], output=tmp_path / "lora",
                       dry_run=True)  # fmt: skip
    words = " ".join(found.notes)
    assert "1 tensor of the base not compared" in words and "first_stage_model" in words
    assert "nothing of te," in words and "nothing of te2," in words


def test_a_lost_tensor_is_still_an_error(tmp_path: Path) -> None:
    single, folder = sdxl(1)
    base = write(tmp_path / "base", single, folder)
    short = {n: t for n, t in sdxl(2)[0].items() if not n.endswith("attn.in_proj_weight")}
    tuned = write(tmp_path / "tuned", short, folder)
    with pytest.raises(lt.LoratoolError, match="3 tensors of the base missing") as caught:
        lt.extract(tuned["single"], base=base["pipe"], output=tmp_path / "lora", dry_run=True)
    assert caught.value.code == "LT-481"


def test_a_table_that_is_one_row_in_the_original(tmp_path: Path) -> None:
    """Krea-2's modulation: (6 · H) numbers there, (6, H) in diffusers."""
    rng = np.random.default_rng(1)
    found = {}
    for name in ("base", "tuned"):
        row, weight = (rng.normal(size=s).astype(np.float32) for s in ((6 * D,), (D, D)))
        single = {"blocks.0.mod.lin": row, "blocks.0.attn.wo.weight": weight}
        folder = {"transformer.transformer_blocks.0.scale_shift_table": row.reshape(6, D),
                  "transformer.transformer_blocks.0.attn.to_out.0.weight": weight}  # fmt: skip
        found[name] = write(tmp_path / name, single, folder)
    base, merged = found["base"]["single"], tmp_path / "merged.safetensors"
    made = []
    for kind in ("single", "pipe"):
        out = tmp_path / f"{kind}.safetensors"
        report = lt.extract(found["tuned"][kind], base=base, output=out, to="comfyui", rank=D,
                            provenance=False)  # fmt: skip
        assert [name for name, _ in report.kept] == ["blocks.0.mod.lin"]
        made.append(out.read_bytes())
    assert made[0] == made[1]
    lt.merge([out], base=base, output=merged)
    want = load_file(str(found["tuned"]["single"]))
    for name, tensor in load_file(str(merged)).items():
        assert np.abs(tensor - want[name]).max() <= 2.0**-18 * np.abs(want[name]).max(), name


def test_a_residual_needs_one_layout(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", *flux(1)), write(tmp_path / "tuned", *flux(2))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tuned["single"], base=base["pipe"], output=tmp_path / "lora",
                   save_residual=tmp_path / "rest.safetensors")  # fmt: skip
    assert caught.value.code == "LT-427"


PARTS = {"unet": "unet", "te": "text_encoder", "te0": "text_encoder", "te1": "text_encoder_2"}


@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl_base"])
def test_every_tensor_of_the_unets_by_a_map_that_nobody_here_wrote(arch: str) -> None:
    """Which bytes are whose: no file is needed to see that."""
    at, single, folder = 0, {}, {}

    def put(name: str, rows: int) -> TensorRef:
        nonlocal at
        is_weight = name.endswith("weight") and "norm" not in name
        shape = (rows, 8) if is_weight or name.endswith("text_projection") else (rows,)
        at += 1 << 12
        return TensorRef(Path("model"), name, "F16", shape, at, 2 * numel(shape))

    def called(name: str) -> str:
        part, _, rest = name.partition("_")
        return f"{PARTS[part]}.{rest}"

    for name, other in MAPS[arch]["pairs"].items():
        single[name] = put(name, 8)
        folder[called(other)] = single[name]
    for name, parts in MAPS[arch]["fused_cat"].items():
        single[name] = whole = put(name, 8 * len(parts["cat"]))
        each = whole.nbytes // len(parts["cat"])
        for number, other in enumerate(parts["cat"]):
            folder[called(other)] = replace(
                whole, start=whole.start + number * each, nbytes=each, shape=(8, *whole.shape[1:])
            )
    found = {
        "single": Checkpoint(Path("model"), False, (), single),
        "folder": Checkpoint(Path("pipe"), True, (), folder, components=tuple(PARTS.values())),
    }
    assert len(folder) > 800
    for one, other in (("single", "folder"), ("folder", "single")):
        seen = in_layout_of(found[one], found[other])
        assert seen is not None and not seen.unnamed and not seen.absent
        for name, ref in found[other].tensors.items():
            got = seen.tensors[name]
            parts = sorted(got.ranges(), key=lambda part: part[1])
            assert (parts[0][1], sum(n for *_, n in parts)) == (ref.start, ref.nbytes), name
            assert got.shape == ref.shape and got.dtype == ref.dtype
            if isinstance(got, JoinedRef) and len(got.pieces) > 1:
                assert list(got.ranges()) == parts, name


def original(family: str, model: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tensors that the original code has for those of a model of diffusers -> their shapes."""
    found: dict[str, list[int]] = {}
    for name, tensor in model.items():
        module, _, parameter = name.rpartition(".")
        some = places("unet", module, parameter, family=family)
        other = some[0].tensors("original")[0] if some else name
        if other in found:
            found[other][0] += tensor.shape[0]
        else:
            found[other] = list(tensor.shape)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "WanTransformer3DModel", "QwenImage21Transformer2DModel", "ZImageTransformer2DModel",
    "Flux2Transformer2DModel", "SD3Transformer2DModel", "Krea2Transformer2DModel",
    "CosmosTransformer3DModel", "LTXVideoTransformer3DModel", "AuraFlowTransformer2DModel",
])  # fmt: skip
def test_it_is_what_diffusers_makes_of_a_single_file(name: str, tmp_path: Path) -> None:
    loader = pytest.importorskip("diffusers.loaders.single_file_model")
    import torch
    from safetensors.torch import save_file as save

    from tests.oracle.test_written_families import TINY, made

    entry = loader.SINGLE_FILE_LOADABLE_CLASSES.get(name)
    if entry is None:
        pytest.skip("this version of diffusers has no such family")
    (tiny,) = (one for one in TINY if one.model == name)
    torch.manual_seed(1)
    shapes = original(tiny.family, made(tiny).state_dict())
    single = {other: torch.randn(*shape) for other, shape in shapes.items()}
    save(single, str(tmp_path / "single.safetensors"))
    folder = entry["checkpoint_mapping_fn"]({n: t.clone() for n, t in single.items()})
    save(
        {n: t.contiguous().clone() for n, t in folder.items()}, str(tmp_path / "folder.safetensors")
    )
    one, other = (open_checkpoint(tmp_path / f"{x}.safetensors") for x in ("single", "folder"))
    for here, there in ((one, other), (other, one)):
        seen = in_layout_of(here, there)
        assert seen is not None and not seen.unnamed and not seen.absent
        for key, ref in there.tensors.items():
            assert seen.tensors[key].shape == ref.shape
            assert bytes(read_bytes(seen.tensors[key])) == bytes(read_bytes(ref)), key
