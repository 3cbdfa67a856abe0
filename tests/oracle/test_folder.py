"""`inspect FOLDER`: a row for every file, the same as if each were looked at alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool as lt
from loratool.frozen import replace
from loratool.report.inspect import AdapterSummary, FolderRow
from tests.oracle.kohya_files import SAMPLES

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"


def lora(
    path: Path, metadata: Mapping[str, str] = {}, *, alpha: float = 4, rank: int = 4,
    wide: str = "F",
) -> Path:  # fmt: skip
    """Four modules; their alphas lie between the factors, or with ``wide`` together."""
    dtype = np.float32 if wide == "F" else np.float64
    tensors = {}
    for letter in ("q", "k", "v", "out_0"):
        tensors[f"{STEM}{letter}.lora_down.weight"] = np.ones((rank, 700), np.float32)
        tensors[f"{STEM}{letter}.lora_up.weight"] = np.ones((320, rank), np.float32)
        tensors[f"{STEM}{letter}.alpha"] = np.array(alpha, dtype)
    save_file(tensors, path, dict(metadata))
    return path


def rows(folder: Path) -> dict[str, FolderRow]:
    return {row.name: row for row in lt.inspect(folder).rows}


def alone(path: Path) -> AdapterSummary | None:
    return lt.inspect(path).adapter


@pytest.mark.parametrize("wide", ["F", "D"])
def test_files_that_share_a_table_keep_what_is_their_own(tmp_path: Path, wide: str) -> None:
    lora(tmp_path / "a.safetensors", {"ss_output_name": "one"}, wide=wide)
    lora(tmp_path / "b.safetensors", {"modelspec.title": "Zwei", "x": "y"}, wide=wide)
    lora(tmp_path / "c.safetensors", {"ss_output_name": "longer than the others " * 9}, wide=wide)
    lora(tmp_path / "d.safetensors", {"ss_output_name": "four"}, alpha=1, wide=wide)
    lora(tmp_path / "e.safetensors", {"ss_output_name": "five"}, rank=8, wide=wide)
    lora(tmp_path / "f.safetensors", wide=wide)
    found = rows(tmp_path)
    assert len(found) == 6
    for name, row in found.items():
        assert row.adapter == alone(tmp_path / name), name
    shown = {name: dict(row.adapter.scalings) for name, row in found.items() if row.adapter}
    assert shown["c.safetensors"] == {"1": 4} and shown["d.safetensors"] == {"0.25": 4}


def test_every_sample_is_the_same_in_a_folder(tmp_path: Path) -> None:
    """Twice each: the second one is the same table again."""
    for sample in sorted(SAMPLES.glob("*/adapter.safetensors")):
        for number in range(2):
            (tmp_path / f"{sample.parent.name}-{number}.safetensors").write_bytes(
                sample.read_bytes()
            )
    found = rows(tmp_path)
    for name, row in found.items():
        if row.adapter is not None:
            assert row.adapter == alone(tmp_path / name)
        else:
            assert row.error is not None and row.error["code"].startswith("LT-4")
        twin = found[name.replace("-1.", "-0.")]
        assert row.adapter is None or row.adapter == replace(twin.adapter, label=name)  # type: ignore[type-var]


def changed(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


def test_a_damaged_file_is_a_row_with_a_reason(tmp_path: Path) -> None:
    metadata = {"ss_output_name": "one", "n": "1"}
    for name in "abcdefg":
        lora(tmp_path / f"{name}.safetensors", metadata)
    whole = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-1])
    (tmp_path / "c.safetensors").write_bytes(whole + b"\0")
    changed(tmp_path / "d.safetensors", b'"n":"1"', b'"n": 12')
    text = (tmp_path / "e.safetensors").read_bytes()
    order = b'"ss_output_name":"one"' in text
    assert order
    changed(tmp_path / "e.safetensors", b'"ss_output_name":"one"', b'"n"             :"one"')
    (tmp_path / "f.safetensors").write_bytes(b"not a file")
    (tmp_path / "sub").mkdir()
    lora(tmp_path / "sub" / "x.safetensors")
    lora(tmp_path / "sub" / "y.safetensors")
    report = lt.inspect(tmp_path)
    codes = {r.name[0]: r.error["code"] if r.error else None for r in report.rows}
    assert codes == {"a": None, "b": "LT-312", "c": "LT-313", "d": "LT-316", "e": "LT-306",
                     "f": codes["f"], "g": None}  # fmt: skip
    assert codes["f"] is not None and codes["f"].startswith("LT-3")
    assert any("sub/" in note for note in report.notes)


def test_words_of_the_metadata(tmp_path: Path) -> None:
    tags = {"10_x": {"mystyle": 40, "1girl": 12}, "5_y": {"1girl": 30}}
    path = lora(tmp_path / "a.safetensors", {
        "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "loha"}),
        "ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": json.dumps(tags),
        "modelspec.trigger_phrase": "my style", "trained_words": '["a", "b"]',
        "ss_training_comment": "a note", "modelspec.title": "Mine", "ss_num_train_images": "50",
        "modelspec.thumbnail": "data:image/png;base64,", "ss_num_epochs": "None",
    })  # fmt: skip
    (tmp_path / "README.md").write_text("---\ninstance_prompt: 'photo of sks'\n---\n")
    one = alone(path)
    assert one is not None
    told = one.told
    assert one.trainer == "SimpleTuner"  # it says more than the entries that it took over
    assert told.base == "sdxl_base_v1-0" and told.title == "Mine" and told.comment == "a note"
    assert [words for words, _ in told.triggers] == ["my style", "a, b", "photo of sks"]
    assert told.frequent == (("1girl", 42), ("mystyle", 40))
    assert told.training == ("50 images",) and told.has_thumbnail


@pytest.mark.parametrize("metadata, trainer", [
    ({"ss_network_module": "networks.lora"}, "sd-scripts"),
    ({"ss_network_module": "networks.lora_wan", "ss_base_model_version": "wan"}, "musubi-tuner"),
    ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'},
     "LyCORIS lokr in sd-scripts"),
    ({"software": '{"name": "ai-toolkit", "version": "0.2.3"}', "ss_base_model_version": "flux1"},
     "ai-toolkit 0.2.3"),
    ({"ot_branch": "master", "ot_revision": "23df383200"}, "OneTrainer 23df3832"),
    ({"ss_tag_frequency": "{" * 5000, "ss_network_args": "[1]"}, ""),
    ({"software": "[[", "trained_words": ""}, "SimpleTuner"),
])  # fmt: skip
def test_trainers(tmp_path: Path, metadata: dict[str, str], trainer: str) -> None:
    one = alone(lora(tmp_path / "a.safetensors", metadata))
    assert one is not None and one.trainer == trainer
