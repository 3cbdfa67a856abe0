"""The small files that go along with merged weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loratool.errors import LoratoolError
from loratool.store.checkpoint import open_checkpoint
from loratool.store.header import build_header
from loratool.store.sidecar import REMOVE, Sidecar, plan_sidecars

CONFIG = b'{"z": 1,\n "dtype" : "bfloat16", "text_config": {"vocab_size": 10}, "a": 1.50}'


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, _ = build_header([(n, "U8", (1,)) for n in names], {})
    path.write_bytes(header + b"\0" * len(names))
    return path


def put(folder: Path, **files: Any) -> Path:
    """Files by name; ``__`` stands for a dot, other values than bytes are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    weights(folder / "model.safetensors", "w")
    return put(folder, config__json=CONFIG)


def content(sidecar: Sidecar) -> bytes:
    return sidecar.data if sidecar.source is None else sidecar.source.read_bytes()


def plan(folder: Path, **options: Any) -> tuple[dict[str, Sidecar], str]:
    files, notes = plan_sidecars(open_checkpoint(folder), **options)
    names = [f.name for f in files]
    assert names == sorted(set(names))
    return {f.name: f for f in files}, "\n".join(notes)


CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "source.spm",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "normalizer.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENCE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "COPYING",
]
LEFT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.bin",
    "pytorch_model.bin",
    "model.gguf",
    "model.onnx",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "modeling_x.py",
    "config.py",
    "quantize_config.json",
    "hf_quant_config.json",
    "loratool.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "events.out.tfevents",
    "secrets.json",
    "token.txt",
    "adapter_model.safetensors",
]


def test_what_goes_along(base: Path) -> None:
    for name in (*CARRIED, *LEFT):
        if name != "config.json":
            (base / name).write_bytes(b"{}")
    (base / ".gitattributes").write_text("x")
    (base / "runs").mkdir()
    found, notes = plan(base)
    assert set(found) == set(CARRIED)
    for name, sidecar in found.items():
        assert sidecar.source == base / name
        assert sidecar.origin == "base"
        assert content(sidecar) == (base / name).read_bytes()
    unsaid = {"adapter_model.safetensors", "modeling_x.py", "config.py", "loratool.json"}
    for name in {*LEFT, "runs/"} - unsaid:
        assert name in notes
    assert "loratool.json" not in notes  # the output has its own
    assert "custom code is not copied: config.py, modeling_x.py" in notes
    assert ".gitattributes" not in notes


def test_weights_and_index_do_not_go_along(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    weights(base / "model.fp16.safetensors", "w")
    (base / "model.safetensors.index.fp16.json").write_text(
        '{"weight_map": {"w": "model.fp16.safetensors"}}'
    )
    found, notes = plan(base)
    assert set(found) == {"config.json"}
    assert notes == ""


def test_templates_folder(base: Path) -> None:
    put(base / "additional_chat_templates", tool__jinja=b"x", evil__py=b"x")
    found, notes = plan(base)
    assert content(found["additional_chat_templates/tool.jinja"]) == b"x"
    assert "additional_chat_templates/evil.py" in notes


def test_unchanged_config_is_copied_byte_for_byte(base: Path) -> None:
    same = {"dtype": "bfloat16", "text_config.vocab_size": 10, "gone": REMOVE, "b.c": REMOVE}
    for changes in (None, {}, same):
        found, notes = plan(base, config_changes=changes)
        assert found["config.json"].data == b""
        assert content(found["config.json"]) == CONFIG
        assert notes == ""


def test_changed_config_keeps_its_order(base: Path) -> None:
    changes = {
        "dtype": "float32",
        "text_config.vocab_size": 12,
        "new.inner.key": True,
        "z": REMOVE,
    }
    found, _ = plan(base, config_changes=changes)
    assert found["config.json"].source is None
    value = json.loads(content(found["config.json"]))
    assert value == {
        "dtype": "float32",
        "text_config": {"vocab_size": 12},
        "a": 1.5,
        "new": {"inner": {"key": True}},
    }
    assert list(value) == ["dtype", "text_config", "a", "new"]
    assert (base / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize(
    ("key", "value"), [("z", True), ("z", 1.0), ("text_config", {}), ("q", None)]
)
def test_any_difference_counts(base: Path, key: str, value: Any) -> None:
    found, _ = plan(base, config_changes={key: value})
    changed = json.loads(content(found["config.json"]))
    assert changed[key] == value
    assert type(changed[key]) is type(value)


def test_change_through_a_value(base: Path) -> None:
    with pytest.raises(LoratoolError) as caught:
        plan(base, config_changes={"dtype.x": 1})
    assert (caught.value.code, caught.value.key) == ("LT-492", "dtype.x")


def test_changes_without_a_config_are_noted(tmp_path: Path) -> None:
    weights(tmp_path / "m" / "model.safetensors", "w")
    found, notes = plan(tmp_path / "m", config_changes={"dtype": "float32"})
    assert found == {}
    assert "there is no config.json: dtype" in notes
    found, notes = plan(tmp_path / "m" / "model.safetensors", config_changes={"dtype": "float32"})
    assert found == {}
    assert "dtype" in notes
    assert plan(tmp_path / "m" / "model.safetensors") == ({}, "")


# --- links ----------------------------------------------------------------------------------------


def refuse(folder: Path, code: str, **options: Any) -> None:
    with pytest.raises(LoratoolError) as caught:
        plan(folder, **options)
    assert (caught.value.code, caught.value.exit_code) == (code, 9)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
def test_link_out_of_the_folder(base: Path, name: str) -> None:
    (base.parent / "secret").write_text("{}")
    (base / name).symlink_to("../secret")
    refuse(base, "LT-904")


def test_linked_config_is_refused_even_when_it_changes(base: Path) -> None:
    (base / "config.json").unlink()
    put(base.parent, secret=CONFIG)
    (base / "config.json").symlink_to("../secret")
    refuse(base, "LT-904", config_changes={"dtype": "float32"})


def test_link_inside_the_folder(base: Path) -> None:
    put(base, real=b"text")
    (base / "LICENSE").symlink_to("real")
    assert content(plan(base)[0]["LICENSE"]) == b"text"


def test_linked_template_folder(base: Path) -> None:
    put(base.parent / "elsewhere", x__jinja=b"x")
    (base / "additional_chat_templates").symlink_to("../elsewhere")
    refuse(base, "LT-904")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_and_broken_link(base: Path) -> None:
    os.mkfifo(base / "LICENSE")
    refuse(base, "LT-901")
    (base / "LICENSE").unlink()
    (base / "LICENSE").symlink_to("gone")
    refuse(base, "LT-901")


def test_hub_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--me--base"
    folder = root / "snapshots" / ("a" * 40)
    (root / "blobs").mkdir(parents=True)
    (folder / "sub").mkdir(parents=True)
    weights(root / "blobs" / "1", "w")
    (root / "blobs" / "2").write_bytes(b"{}")
    for place, up in ((folder, "../.."), (folder / "sub", "../../..")):
        (place / "model.safetensors").symlink_to(f"{up}/blobs/1")
        (place / "config.json").symlink_to(f"{up}/blobs/2")
        found, _ = plan(place)
        assert content(found["config.json"]) == b"{}"
    (root / "refs").write_bytes(b"x")
    (folder / "LICENSE").symlink_to("../../refs")
    refuse(folder, "LT-904")


# --- pipelines --------------------------------------------------------------------------------


def test_pipeline(tmp_path: Path) -> None:
    pipe = put(
        tmp_path / "pipe",
        model_index__json={"unet": ["d", "U"], "scheduler": ["d", "S"], "tokenizer": ["t", "T"]},
        LICENSE=b"x",
    )
    weights(pipe / "unet" / "diffusion_pytorch_model.safetensors", "w")
    put(pipe / "unet", config__json={"dtype": "float16"}, modeling__py=b"x")
    put(pipe / "scheduler", scheduler_config__json={"a": 1})
    put(pipe / "tokenizer", merges__txt=b"", vocab__json={}, tokenizer_config__json={})
    put(pipe / "assets", picture__png=b"x", config__json={})
    found, notes = plan(pipe, config_changes={"unet.dtype": "float32"})
    assert set(found) == {
        "LICENSE", "model_index.json", "scheduler/scheduler_config.json",
        "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
        "unet/config.json",
    }  # fmt: skip
    assert json.loads(content(found["unet/config.json"])) == {"dtype": "float32"}
    assert "custom code is not copied: unet/modeling.py" in notes
    assert "not carried over: assets/" in notes
