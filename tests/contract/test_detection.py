"""Every sample, as it is, renamed, without its metadata, in any order: one dialect, every key."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from loratool.dialects import claims, examine, open_adapter
from loratool.dtypes import tensor_bytes
from loratool.errors import LoratoolError
from loratool.options.groups import Read
from loratool.store.header import build_header

DATA = Path(__file__).parents[1] / "data"
IMAGE = sorted((DATA / "diffusion").glob("*/adapter.safetensors"))
LANGUAGE = sorted(p for name in ("adapter_model", "adapters")
                  for p in (DATA / "llm").glob(f"*/{name}.safetensors"))  # fmt: skip
OF_IMAGES = {"kohya", "lycoris", "diffusers", "comfyui", "bfl", "xlabs", "onetrainer"}
OF_LANGUAGE = {"peft", "peft-file", "mlx"}
ALPHA = Read(alpha=8)  # what a language model's file does not say without its configuration
# What only a configuration says: the method, of blocks, token numbers, parameters, diagonals.
WITHOUT = {"LT-361", "LT-363", "LT-369", "LT-407", "LT-409"}


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, bytes of the tensors) of a file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path: Path, header: Mapping[str, Any], body: bytes) -> Path:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def others(path: Path, folder: Path) -> Iterator[Path]:
    """The file under a name that says nothing, also without metadata and in another order."""
    header, body = split(path)
    yield join(folder / "download" / "1.safetensors", header, body)
    metadata = header.pop("__metadata__", None)
    yield join(folder / "2.safetensors", header, body)
    names = sorted(header)
    random.Random(5).shuffle(names)
    shuffled = {"__metadata__": metadata} if metadata else {}
    yield join(folder / "3.safetensors", shuffled | {n: header[n] for n in names}, body)


def dialect_of(path: Path) -> str:
    (row,) = claims(examine(path))
    return row.name


def told(path: Path, header: Mapping[str, Any]) -> None:
    """Every key of a file is part of a change, kept, or listed as unclaimed."""
    adapter = open_adapter(path, ALPHA)
    sources = [*(f for s in adapter.specs for f in s.fields.values()), *adapter.unclaimed,
               *(r.source for r in adapter.replacements), *adapter.carried]  # fmt: skip
    found = {source.name for source in sources}  # type: ignore[union-attr]
    assert found == header.keys() - {"__metadata__"}


@pytest.mark.parametrize("path", IMAGE, ids=lambda p: p.parent.name)
def test_an_image_adapter_is_told_whatever_it_is_called(path: Path, tmp_path: Path) -> None:
    dialect = dialect_of(path)
    assert dialect in OF_IMAGES
    for other in (path, *others(path, tmp_path)):
        assert dialect_of(other) == dialect
        told(other, split(path)[0])


@pytest.mark.parametrize("path", LANGUAGE, ids=lambda p: p.parent.name)
def test_an_adapter_of_a_language_model_is_never_one_of_images(path: Path, tmp_path: Path) -> None:
    """Without its configuration it is PEFT's all the same; without any prefix perhaps unknown."""
    header, body = split(path)
    for other in others(path, tmp_path):
        assert dialect_of(other) in OF_LANGUAGE
        try:
            told(other, header)
        except LoratoolError as problem:
            assert problem.code in WITHOUT
    config = path.with_name("adapter_config.json")
    if dialect_of(path) == "peft":  # in another folder, in another order
        shutil.copy(config, tmp_path / "download")
        shutil.move(tmp_path / "3.safetensors", tmp_path / "download" / path.name)
        told(tmp_path / "download" / path.name, header)
    bare = {name.removeprefix("base_model.model."): ref for name, ref in header.items()}
    candidate = examine(join(tmp_path / "4.safetensors", bare, body))
    found = [row.name for row in claims(candidate)]
    assert len(found) < 2 and OF_LANGUAGE.issuperset(found)


# ------------------------------------------------------------------------------ real key lists


def load(name: str) -> Any:
    with gzip.open(DATA / "keys" / f"{name}.json.gz") as file:
        return json.load(file)


LISTS = {"flux_kohya_te1": "kohya", "flux_diffusers_full": "diffusers", "krea2_kohya": "kohya",
         "wan22_lightning": "comfyui"}  # fmt: skip


def of_size(path: Path, shapes: Mapping[str, Any]) -> Path:
    """A file of full size that is all hole."""
    refs = [(k, "I64" if k.endswith("alpha") else "BF16", tuple(v)) for k, v in shapes.items()]
    header, starts = build_header(refs, {})
    path.write_bytes(header)
    os.truncate(path, starts[-1] + tensor_bytes(*refs[-1][1:]))
    return path


@pytest.mark.parametrize("name", LISTS)
def test_any_part_of_a_real_file_is_told(name: str, tmp_path: Path) -> None:
    """In any order, and of a sixteenth of its modules: what somebody trained of that model."""
    keys = load(name)
    modules = sorted({key.partition(".lora_")[0].removesuffix(".alpha") for key in keys})
    for some in (modules, modules[::16], modules[7::16]):
        names = [k for k in keys if k.partition(".lora_")[0].removesuffix(".alpha") in some]
        random.Random(len(names)).shuffle(names)
        path = of_size(tmp_path / "some.safetensors", {n: keys[n] for n in names})
        assert dialect_of(path) == LISTS[name]
        told(path, dict.fromkeys(names))


SPELLINGS = {
    "lora_unet_{flat}.lora_down.weight": "kohya", "lora_unet_{flat}.hada_w1_a": "kohya",
    "lycoris_{flat}.lokr_w1": "lycoris", "diffusion_model.{dotted}.lora_A.weight": "comfyui",
    "unet.{dotted}.lora_A.weight": "diffusers", "unet.{dotted}.lora.down.weight": "diffusers",
    "{dotted}.lora_A.weight": "diffusers", "{dotted}.lora_down.weight": "comfyui",
}  # fmt: skip


@pytest.mark.parametrize("arch", load("ldm_diffusers"))
def test_names_of_every_unet_are_told_in_every_spelling(arch: str, tmp_path: Path) -> None:
    """Six models, in the names of either program."""
    pairs = load("ldm_diffusers")[arch]["pairs"]
    names = [(a.removeprefix("model.diffusion_model."), b.removeprefix("unet_"))
             for a, b in pairs.items() if b[:5] == "unet_" and b.endswith(".weight")]  # fmt: skip
    for side in (0, 1):
        modules = [pair[side].removesuffix(".weight") for pair in names[side::5]]
        for form, dialect in SPELLINGS.items():
            keys = [form.format(flat=m.replace(".", "_"), dotted=m) for m in modules]
            path = of_size(tmp_path / "some.safetensors", dict.fromkeys(keys, (2, 4)))
            assert dialect_of(path) == dialect, (form, side)
