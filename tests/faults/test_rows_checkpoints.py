"""Rows 20 and 58-64: number formats, shards, indices, links."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loratool.store.header import read_header
from tests.faults.world import (
    PREFIX,
    Q,
    World,
    adapter_tensors,
    base_tensors,
    factors,
    save,
    values,
)

TARGET = Q.format(0) + ".weight"
POSIX = pytest.mark.skipif(os.name != "posix", reason="files of POSIX")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def index_of(world: World, change: Any) -> Path:
    """A sharded base whose index went through ``change``."""
    index = world.shard()
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    return index


PACKED = {"F8_E8M0": 12, "F4": 6, "F6_E2M3": 9, "F6_E3M2": 9, "F8_E4M3": 12, "C64": 96}


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("row", ["20-copied"])
def test_formats_that_are_not_touched_are_copied(world: World, row: str, dtype: str) -> None:
    raw = bytes(range(PACKED[dtype]))
    world.write_base(base_tensors() | {"model.extra.scale": (dtype, (12,), raw)})
    assert world.merge("--json").code == 0
    out = world.out / "model.safetensors"
    ref = next(r for r in read_header(out).tensors if r.name == "model.extra.scale")
    assert ref.dtype == dtype
    assert out.read_bytes()[ref.start : ref.start + ref.nbytes] == raw


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3"])
@pytest.mark.parametrize("row", ["20-targeted"])
def test_formats_that_nothing_can_be_added_to(world: World, row: str, dtype: str) -> None:
    size = 96 * {"F4": 4, "F6_E2M3": 6}.get(dtype, 8) // 8
    world.write_base(base_tensors() | {TARGET: (dtype, (12, 8), bytes(size))})
    world.refuses(world.merge_words(), "LT-435", file=str(world.base), key=TARGET,
                  expected="BF16", got=dtype, what="quantised")  # fmt: skip


@pytest.mark.parametrize("row", ["58-missing-shard"])
def test_missing_shard(world: World, row: str) -> None:
    world.shard()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (world.base / name).rename(world.root / name)
        world.refuses(world.merge_words(), "LT-322", file=str(world.base), got=name,
                      expected="model.safetensors.index.json", what="1 weight file")  # fmt: skip
        (world.root / name).rename(world.base / name)


@pytest.mark.parametrize("row", ["58-missing-shard-no-index"])
def test_missing_shard_without_an_index(world: World, row: str) -> None:
    world.shard().unlink()
    (world.base / "model-00002-of-00002.safetensors").unlink()
    world.refuses(world.merge_words(), "LT-322", file=str(world.base),
                  got="model-00002-of-00002.safetensors")  # fmt: skip


@pytest.mark.parametrize("row", ["59-listed-not-there"])
def test_index_lists_what_is_not_there(world: World, row: str) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.ghost.weight"] = "model-00002-of-00002.safetensors"

    index = index_of(world, change)
    world.refuses(world.merge_words(), "LT-323", file=str(index), expected="model.ghost.weight",
                  got="not listed: none")  # fmt: skip


@pytest.mark.parametrize("row", ["59-there-not-listed"])
def test_index_misses_what_is_there(world: World, row: str) -> None:
    index = index_of(world, lambda index: index["weight_map"].pop(TARGET))
    world.refuses(world.merge_words(), "LT-323", file=str(index), got=TARGET,
                  expected="not there: none")  # fmt: skip


@pytest.mark.parametrize("row", ["60-two-shards"])
def test_one_key_in_two_shards(world: World, row: str) -> None:
    world.shard()
    path = world.base / "model-00002-of-00002.safetensors"
    save(path, base_tensors())
    world.refuses(
        world.merge_words(),
        "LT-324",
        file=str(world.base),
        got="model-00001-of-00002.safetensors and model-00002-of",
        key="model.",
    )


OUTSIDE = ("../../etc/passwd", "/etc/passwd", "C:\\x.safetensors", "a/../../b.safetensors",
           "..", "", ".", "a\\b.safetensors", "x\0.safetensors", "//x", "a//b")  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
@pytest.mark.parametrize("row", ["61"])
def test_index_leads_out(world: World, row: str, name: str) -> None:
    index = index_of(world, lambda index: index["weight_map"].update({TARGET: name}))
    world.refuses(world.merge_words(), "LT-902", file=str(index), expected="plain file name",
                  got=ascii(name)[1:-1])  # fmt: skip


@pytest.mark.parametrize("row", ["61-long-name"])
def test_index_names_an_impossible_file(world: World, row: str) -> None:
    name = "é" * 128 + ".safetensors"
    index = index_of(world, lambda index: index["weight_map"].update({TARGET: name}))
    world.refuses(
        world.merge_words(), "LT-325", file=str(index), expected="255 bytes", got="\\xe9\\xe9"
    )


@pytest.mark.parametrize("value", [None, 3, ["x"], {"a": "b"}], ids=str)
@pytest.mark.parametrize("row", ["61-no-name"])
def test_index_maps_to_no_name(world: World, row: str, value: object) -> None:
    index = index_of(world, lambda index: index["weight_map"].update({TARGET: value}))
    world.refuses(world.merge_words(), "LT-325", file=str(index), got=repr(value)[:20])


@pytest.mark.parametrize("value", [None, [], {}, "x"], ids=str)
@pytest.mark.parametrize("row", ["61-no-map"])
def test_index_without_a_map(world: World, row: str, value: object) -> None:
    index = index_of(world, lambda index: index.update(weight_map=value))
    world.refuses(world.merge_words(), "LT-325", file=str(index), expected="object",
                  got=type(value).__name__)  # fmt: skip


@POSIX
@pytest.mark.parametrize("row", ["62-link-to-a-file"])
def test_a_link_to_weights_out_of_the_folder(world: World, row: str) -> None:
    elsewhere = world.root / "elsewhere.safetensors"
    shutil.move(world.model, elsewhere)
    world.model.symlink_to(elsewhere)
    world.refuses(world.merge_words(), "LT-904", file=str(world.model), got=str(elsewhere))


@POSIX
@pytest.mark.parametrize("row", ["62-link-typed"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_the_user_typed(world: World, row: str, what: str) -> None:
    """It is the user's own: what it leads to is read, and named as it was typed."""
    link = world.root / ("linked.safetensors" if what == "file" else "linked")
    link.symlink_to(world.model if what == "file" else world.base)
    out = world.out.with_suffix(".safetensors") if what == "file" else world.out
    found = world.run("merge", world.adapter, "--base", link, "-o", out, "--json")
    assert found.code == 0 and found.json["base"] == str(link)
    assert not out.is_symlink()


@POSIX
@pytest.mark.parametrize("row", ["62-link-to-something-else"])
def test_a_link_to_something_else(world: World, row: str) -> None:
    secret = world.root / "secret"
    secret.write_text("root:x:0:0:a secret that must not be shown:/root:/bin/sh\n" * 9)
    world.model.unlink()
    world.model.symlink_to(secret)
    found = world.merge("--json")
    assert found.code == 9 and "secret that must" not in found.out + found.err


@POSIX
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
@pytest.mark.parametrize("place", ["model", "weights", "config.json", "adapter_config.json",
                                   "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("row", ["62-special"])
def test_special_files(world: World, row: str, kind: str, place: str) -> None:
    path = {
        "model": world.model, "weights": world.weights, "config.json": world.base / place,
        "adapter_config.json": world.adapter / place, "tokenizer.json": world.base / place,
    }[place]  # fmt: skip
    path.unlink(missing_ok=True)
    words = world.merge_words()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            here = Path.cwd()
            os.chdir(path.parent)  # socket names are short
            try:
                one.bind(path.name)
            finally:
                os.chdir(here)
    found = world.run(*words, "--json")
    if (kind, place) == ("folder", "tokenizer.json"):  # pipelines have folders of such names
        assert found.code == 0 and "not carried over: tokenizer.json/" in found.json["notes"]
        return
    assert found.code == 9, found.out
    assert path.name in found.json["error"]["file"]
    assert world.leftovers() == []


@POSIX
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
@pytest.mark.parametrize("row", ["62-sidecar-link"])
def test_sidecars_do_not_lead_out(world: World, row: str, name: str) -> None:
    secret = world.root / "secret.json"
    secret.write_text('{"a": "a secret"}')
    path = world.base / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    world.refuses(world.merge_words(), "LT-904", file=str(path), got=str(secret))


@POSIX
@pytest.mark.parametrize("row", ["62-broken-link"])
@pytest.mark.parametrize("place", ["model", "weights"])
def test_broken_links(world: World, row: str, place: str) -> None:
    path = world.model if place == "model" else world.weights
    path.unlink()
    path.symlink_to("gone")
    found = world.run(*world.merge_words(), "--json")
    assert found.code == 3 and world.leftovers() == []


@POSIX
@pytest.mark.parametrize("row", ["62-link-loop"])
@pytest.mark.parametrize("place", ["model", "weights", "config", "adapter"])
def test_links_in_a_circle(world: World, row: str, place: str) -> None:
    path = {"model": world.model, "weights": world.weights, "config": world.base / "config.json",
            "adapter": world.adapter}[place]  # fmt: skip
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)
    found = world.run(*world.merge_words(), "--json")
    assert found.code in (3, 6, 9), found.out
    assert world.leftovers() == []


@pytest.mark.parametrize("said", [1, 10**30, -5, "many", 3.5, None, [1]], ids=str)
@pytest.mark.parametrize("row", ["64-total-size"])
def test_total_size_lies(world: World, row: str, said: object) -> None:
    index_of(world, lambda index: index["metadata"].update(total_size=said))
    found = world.merge("--json")
    assert found.code == 0
    if isinstance(said, (int, float)):
        assert any(f"total_size {said}" in note for note in found.json["notes"])
    written = json.loads((world.out / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == sum(len(t[2]) for t in base_tensors().values())


@pytest.mark.parametrize("row", ["62-hub-cache"])
def test_links_of_the_hub_cache_are_followed(world: World, row: str) -> None:
    """models--x--y/snapshots/<commit>/file -> ../../blobs/<hash>, sidecars too."""
    repo = world.root / "in" / "models--x--y"
    snapshot = repo / "snapshots" / "0123456"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(world.base.iterdir())):
        blob = repo / "blobs" / f"{number:064d}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    words = ["merge", world.adapter, "--base", snapshot, "-o", world.out, "--json"]
    assert world.run(*words).code == 0
    assert not any(p.is_symlink() for p in world.out.iterdir())


@pytest.mark.parametrize("row", ["59-adapter-two-names"])
def test_two_tensors_of_one_meaning(world: World, row: str) -> None:
    name = f"{PREFIX}{Q.format(0)}.lora_A.default.weight"
    world.write_adapter(adapter_tensors() | {name: values(2, 8)})
    world.refuses(world.merge_words(), "LT-367", file=str(world.weights), key=Q.format(0),
                  got="lora_A.default.weight")  # fmt: skip


@pytest.mark.parametrize("row", ["60-pipeline"])
def test_pipeline_components_are_kept_apart(world: World, row: str) -> None:
    """model_index.json may name anything; only real sub-folders count."""
    pipeline = world.root / "in" / "pipe"
    (pipeline / "unet").mkdir(parents=True)
    save(pipeline / "unet" / "diffusion_pytorch_model.safetensors", {"w": values(4, 4)})
    (pipeline / "model_index.json").write_text(
        json.dumps({"unet": ["diffusers", "X"], "../base": ["x", "y"], "/etc": ["x", "y"]})
    )
    world.write_adapter(factors("unet.w", out=4, inner=4))
    found = world.run("inspect", pipeline, "--json")
    assert found.code == 0 and found.json["checkpoint"]["components"] == ["unet"]
