"""Which files make up a checkpoint, and every way in which they may not."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loratool.archs.stated import model_type
from loratool.dtypes import tensor_bytes
from loratool.errors import LoratoolError
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.header import build_header

Spec = tuple[str, str, tuple[int, ...]]


def weights(path: Path, *names: str | Spec, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [(n, "F32", (2, 2)) if isinstance(n, str) else n for n in names]
    header, _ = build_header(specs, metadata)
    path.write_bytes(header + b"\0" * sum(tensor_bytes(d, s) for _, d, s in specs))
    return path


def text(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def index(path: Path, weight_map: Any, total: Any = None) -> Path:
    metadata = {} if total is None else {"total_size": total}
    return text(path, {"metadata": metadata, "weight_map": weight_map})


def sharded(folder: Path, stem: str = "model") -> Path:
    one, two = f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"
    weights(folder / one, "b", "a")
    weights(folder / two, "c")
    index(folder / f"{stem}.safetensors.index.json", {"b": one, "a": one, "c": two}, 48)
    return folder


def refuse(path: Path, code: str, *words: str, exit_code: int = 3) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        open_checkpoint(path)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


def notes(checkpoint: Checkpoint) -> str:
    return "\n".join(checkpoint.notes)


def test_single_file(tmp_path: Path) -> None:
    path = weights(tmp_path / "any.name.safetensors", "w", format="pt")
    found = open_checkpoint(path)
    assert not found.is_folder
    assert found.path == path
    assert found.config == {}
    (shard,) = found.shards
    assert (shard.path, shard.name, shard.prefix) == (path, path.name, "")
    assert shard.metadata == {"format": "pt"}
    assert path.read_bytes().startswith(shard.header)
    assert found.tensors["w"].start == len(shard.header)
    assert (found.nbytes, found.notes, found.quantization) == (16, (), None)


def test_single_file_knows_the_config_beside_it(tmp_path: Path) -> None:
    path = weights(tmp_path / "model.safetensors", "w")
    text(tmp_path / "config.json", {"model_type": "llama"})
    assert model_type(open_checkpoint(path).config) == "llama"
    assert model_type(open_checkpoint(weights(tmp_path / "other.safetensors", "w")).config) == ""


def test_one_shard_of_several_says_so(tmp_path: Path) -> None:
    sharded(tmp_path)
    found = open_checkpoint(tmp_path / "model-00002-of-00002.safetensors")
    assert list(found.tensors) == ["c"]
    assert "one shard of several" in notes(found)


def test_folder_with_one_file(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    text(tmp_path / "config.json", {"model_type": "gpt2"})
    found = open_checkpoint(tmp_path)
    assert found.is_folder
    assert (found.index_name, model_type(found.config), found.notes) == (None, "gpt2", ())
    assert [s.name for s in found.shards] == ["model.safetensors"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "strange", "model.fp16"])
def test_shards(tmp_path: Path, stem: str) -> None:
    found = open_checkpoint(sharded(tmp_path, stem))
    assert found.index_name == f"{stem}.safetensors.index.json"
    assert [s.name[-22:-12] for s in found.shards] == ["1-of-00002", "2-of-00002"]
    assert list(found.tensors) == ["b", "a", "c"]
    assert found.shards[0].keys == ("b", "a")
    assert found.notes == ()


def test_index_given_by_name(tmp_path: Path) -> None:
    sharded(tmp_path, "one")
    sharded(tmp_path, "two")
    refuse(tmp_path, "LT-321", "one.safetensors.index.json", "two.safetensors.index.json")
    found = open_checkpoint(tmp_path / "two.safetensors.index.json")
    assert found.index_name == "two.safetensors.index.json"
    assert found.path == tmp_path


def test_shards_without_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    found = open_checkpoint(tmp_path)
    assert len(found.shards) == 2
    assert "no index file" in notes(found)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refuse(tmp_path, "LT-322", "model-00001-of-00002.safetensors")


def test_index_over_a_single_file(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    index(tmp_path / "model.safetensors.index.json", {"w": "model.safetensors"}, 16)
    found = open_checkpoint(tmp_path)
    assert len(found.shards) == 1
    assert found.index_name == "model.safetensors.index.json"


def test_unusual_name_counts_if_it_is_alone(tmp_path: Path) -> None:
    weights(tmp_path / "flux1-dev.safetensors", "w")
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]
    weights(tmp_path / "ae.safetensors", "w")
    refuse(tmp_path, "LT-321", "2 checkpoints", "ae.safetensors", "flux1-dev.safetensors")


def test_standard_name_wins_over_others_with_a_note(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    weights(tmp_path / "extra.safetensors", "v")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["w"]
    assert "ignored extra.safetensors" in notes(found)


def test_single_file_and_other_shards_are_never_guessed(tmp_path: Path) -> None:
    weights(sharded(tmp_path) / "model.safetensors", "a")
    refuse(tmp_path, "LT-321", "model.safetensors,", "model.safetensors.index.json")


def test_two_shardings_without_index(tmp_path: Path) -> None:
    for i in (1, 2):
        weights(tmp_path / f"model-0000{i}-of-00002.safetensors", f"w{i}")
    for i in (1, 2, 3):
        weights(tmp_path / f"model-0000{i}-of-00003.safetensors", f"w{i}")
    refuse(tmp_path, "LT-321", "(2 files)", "(3 files)")


def test_left_over_shards_are_noted(tmp_path: Path) -> None:
    weights(sharded(tmp_path) / "model-00001-of-00001.safetensors", "old")
    found = open_checkpoint(tmp_path)
    assert set(found.tensors) == {"a", "b", "c"}
    assert "model-00001-of-00001.safetensors" in notes(found)


def test_variants(tmp_path: Path) -> None:
    weights(tmp_path / "model.fp16.safetensors", ("w", "F16", (1,)))
    assert open_checkpoint(tmp_path).tensors["w"].dtype == "F16"
    weights(tmp_path / "model.safetensors", "w")
    found = open_checkpoint(tmp_path)
    assert found.tensors["w"].dtype == "F32"
    assert "ignored model.fp16.safetensors: a variant" in notes(found)
    (tmp_path / "model.safetensors").unlink()
    weights(tmp_path / "model.fp8.safetensors", "w")
    refuse(tmp_path, "LT-321", "model.fp16.safetensors", "model.fp8.safetensors")


def test_sharded_variants_beside_plain_shards(tmp_path: Path) -> None:
    sharded(sharded(tmp_path), "model.fp16")
    one = "model-00001-of-00002.bf16.safetensors"
    weights(tmp_path / one, "a")
    index(tmp_path / "model.safetensors.index.bf16.json", {"a": one})
    found = open_checkpoint(tmp_path)
    assert found.index_name == "model.safetensors.index.json"
    assert notes(found).count("a variant of the same weights") == 2


def test_consolidated_is_a_duplicate(tmp_path: Path) -> None:
    weights(tmp_path / "consolidated.safetensors", "w")
    assert open_checkpoint(tmp_path).shards[0].name == "consolidated.safetensors"
    weights(tmp_path / "model.safetensors", "w")
    found = open_checkpoint(tmp_path)
    assert found.shards[0].name == "model.safetensors"
    assert "ignored consolidated.safetensors" in notes(found)
    (tmp_path / "model.safetensors").rename(tmp_path / "strange.safetensors")
    assert open_checkpoint(tmp_path).shards[0].name == "strange.safetensors"


def test_variant_and_index_win_over_other_names(tmp_path: Path) -> None:
    weights(tmp_path / "extra.safetensors", "x")
    found = open_checkpoint(sharded(tmp_path, "strange"))
    assert found.index_name == "strange.safetensors.index.json"
    assert "ignored extra.safetensors" in notes(found)
    weights(tmp_path / "model.fp16.safetensors", "w")
    found = open_checkpoint(tmp_path)
    assert [s.name for s in found.shards] == ["model.fp16.safetensors"]
    assert "ignored extra.safetensors" in notes(found)


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    (tmp_path / "._model.safetensors").write_bytes(b"Mac OS X")
    assert notes(open_checkpoint(tmp_path)) == ""


def test_all_missing_shards_are_listed_first(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"broken")
    weight_map = {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    weight_map["x"] = "model-00009-of-00002.safetensors"
    index(tmp_path / "model.safetensors.index.json", weight_map)
    refuse(
        tmp_path, "LT-322", "2 weight files",
        "model-00001-of-00002.safetensors, model-00009-of-00002.safetensors",
    )  # fmt: skip


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index(path, {"b": one, "a": two, "c": two, "ghost": two})
    error = refuse(tmp_path, "LT-323", str(path))
    assert error.expected == f"listed but not there: a in {two}, ghost in {two}"
    assert error.got == f"there but not listed: a in {one}"
    index(path, {"b": one, "a": one, "c": two, "ghost": two})
    assert refuse(tmp_path, "LT-323").got == "there but not listed: none"
    index(path, {"a": one, "c": two})
    assert refuse(tmp_path, "LT-323").expected == "listed but not there: none"


def test_same_key_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    weights(tmp_path / "model-00002-of-00002.safetensors", "c", "a")
    refuse(tmp_path, "LT-324", "key a", "model-00001-of-00002.safetensors and model-00002")


@pytest.mark.parametrize("value", [None, [], {}, "x", {"w": 1}, {"w": None}, {"w": ["x"]}])
def test_malformed_index(tmp_path: Path, value: Any) -> None:
    weights(tmp_path / "model.safetensors", "w")
    index(tmp_path / "model.safetensors.index.json", value)
    refuse(tmp_path, "LT-325", "index.json")


def test_duplicate_key_in_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"a":"x","a":"y"}}')
    refuse(tmp_path, "LT-343", "key a")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "/etc/passwd",
        "C:\\secret.safetensors",
        "C:secret.safetensors",
        "..\\secret.safetensors",
        "\\\\host\\share\\x",
        "x\0.safetensors",
        "",
        ".",
        "./model.safetensors",
        "a//b",
    ],
)
def test_shard_outside_the_folder(tmp_path: Path, name: str) -> None:
    weights(tmp_path / "secret.safetensors", "w")
    folder = tmp_path / "m"
    folder.mkdir()
    index(folder / "model.safetensors.index.json", {"w": name})
    refuse(folder, "LT-902", exit_code=9)


def test_index_may_name_a_sub_folder(tmp_path: Path) -> None:
    weights(tmp_path / "parts" / "one.safetensors", "w")
    index(tmp_path / "model.safetensors.index.json", {"w": "parts/one.safetensors"})
    assert open_checkpoint(tmp_path).shards[0].name == "parts/one.safetensors"


@pytest.mark.parametrize("target", ["parts/abc", "../m/parts/abc"])
def test_shard_that_is_a_link_inside_the_folder(tmp_path: Path, target: str) -> None:
    weights(tmp_path / "m" / "parts" / "abc", "w")
    (tmp_path / "m" / "model.safetensors").symlink_to(target)
    found = open_checkpoint(tmp_path / "m")
    assert found.tensors["w"].file == tmp_path / "m" / "model.safetensors"


def test_shard_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    """Refused whatever it leads to; the hint's command makes a folder that is read."""
    weights(tmp_path / "disk" / "abc", "w")
    (tmp_path / "m").mkdir()
    link = tmp_path / "m" / "model.safetensors"
    link.symlink_to("../disk/abc")
    error = refuse(tmp_path / "m", "LT-904", exit_code=9)
    words = shlex.split(str(error.hint).rpartition(": ")[2])
    subprocess.run(words, check=True)
    assert list(open_checkpoint(Path(words[-1])).tensors) == ["w"]
    link.unlink()
    (tmp_path / "secret").write_text("password = 1")
    link.symlink_to("../secret")
    assert "password" not in str(refuse(tmp_path / "m", "LT-904", exit_code=9))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refuse(tmp_path, "LT-901", exit_code=9)
    refuse(tmp_path / "model.safetensors", "LT-901", exit_code=9)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    refuse(tmp_path, "LT-901", exit_code=9)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refuse(tmp_path, "LT-901", exit_code=9)


@pytest.mark.parametrize(
    ("said", "is_noted"), [(48, False), (48.0, False), (47, True), ("x", False)]
)
def test_total_size_that_lies_is_noted(tmp_path: Path, said: Any, is_noted: bool) -> None:
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index(path, json.loads(path.read_text())["weight_map"], said)
    assert ("the tensors take 48 bytes" in notes(open_checkpoint(tmp_path))) is is_noted


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt", "consolidated.00.pth"])
def test_only_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    refuse(tmp_path, "LT-903", name, "hint", exit_code=9)
    refuse(tmp_path / name, "LT-900", name, exit_code=9)


def test_pickles_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert open_checkpoint(tmp_path).tensors


def test_training_state_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x02.")
    refuse(tmp_path, "LT-320", "optimizer.pt")


def test_nothing_here(tmp_path: Path) -> None:
    refuse(tmp_path, "LT-320", "an empty folder")
    refuse(tmp_path / "gone", "LT-300")
    refuse(tmp_path / "gone.bin", "LT-300")


def test_checkpoints_in_sub_folders_are_listed(tmp_path: Path) -> None:
    weights(tmp_path / "one" / "model.safetensors", "w")
    weights(tmp_path / "two" / "model.safetensors", "w")
    refuse(tmp_path, "LT-321", "one/, two/")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors"])
def test_adapter_folder_is_no_base(tmp_path: Path, file: str) -> None:
    weights(tmp_path / file, "base_model.model.q.lora_A.weight")
    text(tmp_path / "adapter_config.json", {})
    refuse(tmp_path, "LT-490", "adapter", "--base", exit_code=4)
    (tmp_path / file).unlink()
    refuse(tmp_path, "LT-490", exit_code=4)


@pytest.mark.parametrize(
    "keys",
    [
        ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"],
        ["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.alpha"],
        ["x.hada_w1_a", "x.hada_w1_b", "x.hada_w2_a", "x.hada_w2_b"],
    ],
)
def test_adapter_file_is_no_base(tmp_path: Path, keys: list[str]) -> None:
    path = weights(tmp_path / "style.safetensors", *keys)
    refuse(path, "LT-490", keys[0], exit_code=4)
    refuse(tmp_path, "LT-490", exit_code=4)
    weights(path, *keys, "lm_head.weight")
    assert len(open_checkpoint(path).tensors) == len(keys) + 1


def test_model_with_an_adapter_config_is_a_model(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    text(tmp_path / "adapter_config.json", {})
    assert "adapter_config.json" in notes(open_checkpoint(tmp_path))


def test_damaged_config(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "w")
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    refuse(tmp_path, "LT-343", "config.json")


def pipeline(folder: Path) -> Path:
    listed = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
    }
    text(folder / "model_index.json", listed)
    sharded(folder / "unet", "diffusion_pytorch_model")
    text(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
    weights(folder / "text_encoder" / "model.safetensors", "a")
    text(folder / "text_encoder" / "config.json", {"model_type": "clip_text_model"})
    text(folder / "scheduler" / "scheduler_config.json", {})
    return folder


def test_pipeline(tmp_path: Path) -> None:
    found = open_checkpoint(pipeline(tmp_path))
    assert found.components == ("text_encoder", "unet")
    assert list(found.tensors) == ["text_encoder.a", "unet.b", "unet.a", "unet.c"]
    assert found.tensors["unet.a"].name == "a"
    assert [s.name for s in found.shards] == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    assert found.shards[1].prefix == "unet."
    assert found.shards[1].keys == ("unet.b", "unet.a")
    assert found.config["unet"] == {"_class_name": "UNet2DConditionModel"}
    assert (found.index_name, model_type(found.config), found.notes) == (None, "", ())


def test_component_alone(tmp_path: Path) -> None:
    found = open_checkpoint(pipeline(tmp_path) / "unet")
    assert list(found.tensors) == ["b", "a", "c"]
    assert found.components == ()


def test_pipeline_notes(tmp_path: Path) -> None:
    pipeline(tmp_path)
    weights(tmp_path / "flux1-dev.safetensors", "w")
    weights(tmp_path / "checkpoint-500" / "model.safetensors", "w")
    weights(tmp_path / "safety_checker" / "model.safetensors", "w")
    weights(tmp_path / "text_encoder" / "model.fp16.safetensors", "a")
    found = open_checkpoint(tmp_path)
    assert found.components == ("text_encoder", "unet")
    said = notes(found)
    assert "ignored flux1-dev.safetensors" in said
    assert "ignored checkpoint-500/" in said
    assert "ignored safety_checker/" in said
    assert "text_encoder: ignored model.fp16.safetensors" in said


def test_pipeline_component_missing(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    (tmp_path / "scheduler").rmdir()
    assert "lists scheduler" in notes(open_checkpoint(tmp_path))


def test_pipeline_component_with_pickles_only(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").rename(
        tmp_path / "text_encoder" / "pytorch_model.bin"
    )
    refuse(tmp_path, "LT-903", "text_encoder", exit_code=9)


def test_pipeline_without_weights(tmp_path: Path) -> None:
    text(tmp_path / "model_index.json", {"unet": ["diffusers", "X"]})
    text(tmp_path / "unet" / "config.json", {})
    refuse(tmp_path, "LT-320", "unet")


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        ([("w.weight", "F8_E4M3", (2, 2)), ("w.weight_scale_inv", "F32", (1, 1))], "fp8"),
        ([("w.weight", "F8_E4M3", (2, 2))], "fp8"),
        ([("w.weight", "F8_E4M3", (2, 2)), ("w.weight_scale", "F32", (1,))], "compressed-tensors"),
        ([("w.weight_packed", "I32", (2, 2))], "compressed-tensors"),
        ([("w.qweight", "I32", (1, 8)), ("w.scales", "F16", (1, 8)), ("w.qzeros", "I32", (1, 1)),
          ("w.g_idx", "I32", (8,))], "gptq"),
        ([("w.qweight", "I32", (8, 1)), ("w.scales", "F16", (1, 8)), ("w.qzeros", "I32", (1, 1))],
         "awq"),
        ([("w.weight", "U8", (4, 1)), ("w.weight.absmax", "F32", (1,))], "bitsandbytes"),
        ([("w.weight", "U8", (4, 1)),
          ("w.weight.quant_state.bitsandbytes__nf4", "U8", (9,))], "bitsandbytes"),
        ([("w.weight", "I8", (4, 1)), ("w.SCB", "F32", (4,))], "bitsandbytes"),
        ([("e.down_proj_blocks", "U8", (2, 2)), ("e.down_proj_scales", "U8", (2,))], "mxfp4"),
        ([("w.weight", "U32", (4, 1)), ("w.scales", "F16", (4, 1))], "mlx"),
        ([("w.weight", "F4", (4, 2))], "fp4"),
        ([("w.weight", "I8", (4, 2))], "int8"),
        ([("transformer_blocks.0.weight", "F32", (4, 2)), ("h.attn.bias", "U8", (1, 1, 4, 4)),
          ("position_ids", "I64", (1, 4)), ("x_blocks", "F32", (1,)), ("s.scale", "F8_E4M3", (4,))],
         None),
    ],
)  # fmt: skip
def test_quantization_by_tensors(tmp_path: Path, tensors: list[Spec], method: str | None) -> None:
    weights(tmp_path / "model.safetensors", ("norm.weight", "BF16", (4,)), *tensors)
    found = open_checkpoint(tmp_path)
    assert found.quantization == method
    assert found.notes == ()


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"format": "x"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": {"x": 1}}, "unknown"),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
    ],
)
def test_quantization_by_config(tmp_path: Path, config: Any, method: str | None) -> None:
    weights(tmp_path / "model.safetensors", "w.weight")
    text(tmp_path / "config.json", config)
    found = open_checkpoint(tmp_path)
    assert found.quantization == method
    assert ("no tensor looks quantised" in notes(found)) is (method is not None)
