"""Inputs in an object store: what local ones give, byte for byte, or an error and no output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.cli import run
from loratool.engine import sink
from loratool.errors import LoratoolError
from loratool.ops import consent
from loratool.store import object_store, remote_folder, store_range, store_source
from loratool.store.object_store import Entry
from loratool.store.shard_writer import create_new
from tests.buckets import ROOT, Buckets
from tests.coded import save_gguf
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {f"model.layers.{i}.q_proj": (96, 64) for i in range(4)}
FAR = "buckets://b"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket's content: models and adapters with all that may lie beside them."""
    top = tmp_path_factory.mktemp("made")
    weights = {f"{k}.weight": randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    weights["model.norm.weight"] = randn(64, seed=9)
    save_checkpoint(top / "base", weights, shards=3)
    beside = {
        "tokenizer.json": "{}", "LICENSE": "free", "id2label.json": "{}", "modeling_x.py": "1",
        "notes.log": "odd", "additional_chat_templates/one.jinja": "{{ 1 }}", ".hidden": "x",
        "optimizer.pt": "\x80", "runs/a/b/c/events": "deep",
    }  # fmt: skip
    for name, text in beside.items():
        (top / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (top / "base" / name).write_text(text)
    for seed in (1, 2):
        folder = save_adapter(top / f"a{seed}", random_factors(SHAPES, rank=4, seed=seed))
        (folder / "special_tokens_map.json").write_text("{}")
        (folder / "NOTICE-odd.bak").write_text("it goes along")
        (folder / "optimizer.pt").write_bytes(b"\x80" * 100)
    save_file({"v_head.weight": torch.ones(40, 64)}, str(top / "a1" / "value_head.safetensors"))
    few = dict(list(SHAPES.items())[:1])
    save_adapter(top / "few", random_factors(few, rank=4, seed=3))
    save_checkpoint(top / "one", weights)
    lt.merge([top / "a1"], base=top / "base", output=top / "tuned")
    lt.convert([top / "a1"], to="kohya", base=top / "base", output=top / "k.safetensors")
    return top


@pytest.fixture(autouse=True)
def bucket(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That content in a bucket ``b``, without waits between attempts."""
    place = tmp_path / "stores" / "b"
    shutil.copytree(made, place)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv(ROOT, str(place.parent))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(object_store, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(remote_folder, "FIRST_BYTES", 1)  # so that small files are not read whole
    for name in ("before", "log", "on_read", "reads"):
        monkeypatch.setattr(Buckets, name, [])
    yield place


COMMANDS: dict[str, Callable[[Any, Path], Any]] = {
    "merge": lambda at, out: lt.merge([at("a1"), f"{at('a2')}:0.5"], base=at("base"), output=out),
    "untouched": lambda at, out: lt.merge([at("few")], base=at("base"), output=out, dtype="auto"),
    "checksum": lambda at, out: lt.merge([at("few")], base=at("base"), output=out, checksum=True),
    "file": lambda at, out: lt.merge(
        [at("a1")], base=at("one/model.safetensors"), output=out / "m.safetensors"
    ),
    "index": lambda at, out: lt.merge(
        [at("k.safetensors")], base=at("base/model.safetensors.index.json"), output=out
    ),
    "subtract": lambda at, out: lt.subtract([at("a1")], merged=at("tuned"), output=out),
    "extract": lambda at, out: lt.extract(at("tuned"), base=at("base"), rank=3, output=out),
    "combine": lambda at, out: lt.combine([at("a1"), f"{at('a2')}:2"], method="ties", output=out),
    "convert": lambda at, out: lt.convert([at("k.safetensors")], to="peft", base=at("base"),
                                          output=out),
    "many": lambda at, out: lt.convert([at("a1"), at("a2")], to="kohya", base=at("base"),
                                       output=f"{out}/"),
    "compress": lambda at, out: lt.compress(at("a1"), rank=2, output=out),
    "rescale": lambda at, out: lt.rescale([at("a1")], 0.5, output=out),
}  # fmt: skip
FOLDERS = ("file", "many")


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def do(command: str, top: Path | str, out: Path) -> None:
    if command in FOLDERS:
        out.mkdir()
    COMMANDS[command](lambda name: f"{top}/{name}", out)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(LoratoolError) as caught:
        call()
    return caught.value.code


# ------------------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("command", COMMANDS)
def test_the_bytes_of_local_inputs(command: str, made: Path, tmp_path: Path) -> None:
    do(command, made, tmp_path / "near")
    do(command, FAR, tmp_path / "far")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert not list((tmp_path / "tmp").iterdir())
    read = [name for name, *_ in Buckets.reads]
    assert not [n for n in read if n.endswith((".pt", ".py", ".hidden", "events"))]


def test_a_whole_file_is_never_cloned_from_its_header(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system shares blocks, shards in which nothing changes are cloned."""

    def clone(source: Any, target: Path) -> bool:
        source.seek(0)
        with os.fdopen(create_new(target), "wb") as out:
            out.write(source.read())
        return True

    monkeypatch.setattr(sink, "clone_file", clone)
    for top, out in ((made, "near"), (FAR, "far")):
        do("untouched", top, tmp_path / out)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


@pytest.mark.parametrize("source", ["a1", "base", "k.safetensors", "one/model.safetensors"])
def test_looking_reads_headers_alone(source: str, made: Path, bucket: Path) -> None:
    near, far = (lt.inspect(f"{top}/{source}", tensors=True).to_json() for top in (made, FAR))
    for report in (near, far):
        for key in ("source", "next", "seconds"):
            report.pop(key, None)
    assert json.dumps(far) == json.dumps(near).replace(str(made), FAR)
    for path in bucket.rglob("*.safetensors"):  # in kohya's files alphas are tensors
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        name = path.relative_to(bucket.parent).as_posix()
        sent = sum(count for read, _, count in Buckets.reads if read == name)
        assert sent <= max(4096, 2 * header) or path.name == "k.safetensors", name


def test_a_long_header_of_gguf(made: Path, bucket: Path) -> None:
    words = [f"word{i:05}" for i in range(30_000)]
    save_gguf(bucket / "m.gguf", {"general.architecture": "llama", "tokenizer.ggml.tokens": words},
              {"output.weight": (0, [64, 1000], bytes(range(250)) * 1024)})  # fmt: skip
    near, far = (lt.inspect(p).to_json() for p in (bucket / "m.gguf", f"{FAR}/m.gguf"))
    assert far["checkpoint"] == near["checkpoint"]
    last = max(start + count for _, start, count in Buckets.reads)
    assert 600_000 > last > 400_000


def test_an_undo_file_in_the_store(made: Path, bucket: Path, tmp_path: Path) -> None:
    lt.merge([made / "a1"], base=made / "base", output=tmp_path / "m",
             save_undo=bucket / "undo.safetensors")  # fmt: skip
    for place, out in ((bucket, "near"), (FAR, "far")):
        lt.subtract([made / "a1"], merged=tmp_path / "m", output=tmp_path / out,
                    undo=f"{place}/undo.safetensors")  # fmt: skip
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    lt.subtract([f"{FAR}/a1"], merged=f"{FAR}/tuned", output=tmp_path / "all", dry_run=True,
                undo=f"{FAR}/undo.safetensors")  # fmt: skip


def test_a_residual_in_the_store(made: Path, bucket: Path, tmp_path: Path) -> None:
    lt.extract(made / "tuned", base=made / "base", rank=2, output=bucket / "x",
               save_residual=bucket / "rest.safetensors")  # fmt: skip
    lt.merge([f"{FAR}/x"], base=f"{FAR}/base", residual=f"{FAR}/rest.safetensors",
             output=bucket / "back")  # fmt: skip
    tuned = {k: bytes(v.numpy()) for k, v in tensors_of(made / "tuned").items()}
    assert {k: bytes(v.numpy()) for k, v in tensors_of(bucket / "back").items()} == tuned
    assert lt.verify(f"{FAR}/back").verdict == "identical"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for p in folder.glob("model*.safetensors") for k, v in load_file(str(p)).items()}


@pytest.mark.parametrize("words", ["--undo", "--residual", "--module-weights", "run"])
def test_small_inputs_that_are_not_there(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = f"{FAR}/nothing.yaml", ["-o", str(tmp_path / "out")]
    line = {"--undo": ["subtract", f"{FAR}/a1", "--from", f"{FAR}/tuned", words, place, *out],
            "run": ["run", place]}.get(
        words, ["merge", f"{FAR}/a1", "--base", f"{FAR}/base", words, place, *out])  # fmt: skip
    exit_code, error, _ = refusal(line, capsys)
    assert (exit_code, error["code"], error["file"]) == (3, "LT-300", place)


def test_verify_finds_what_lies_beside(bucket: Path) -> None:
    assert lt.verify(f"{FAR}/tuned").verdict == "identical"
    (bucket / "a1").rename(bucket / "other")
    assert code_of(lambda: lt.verify(f"{FAR}/tuned")) == "LT-254"
    report = lt.verify(f"{FAR}/tuned", adapters=[f"{FAR}/other"], base=f"{FAR}/base")
    assert report.verdict == "identical"


def test_other_looks(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near, far = (lt.compare([f"{top}/a1", f"{top}/a2"]).to_json() for top in (made, FAR))
    assert (far["matrix"], far["modules"]) == (near["matrix"], near["modules"])
    assert run(["check", f"{FAR}/a1", "--for", "vllm"]) == run(["check", str(made / "a1"),
                                                               "--for", "vllm"])  # fmt: skip
    plan = lt.merge([f"{FAR}/a1"], base=f"{FAR}/base", output="out", dry_run=True)
    assert plan.changed == 4 and not Path("out").exists()


# ------------------------------------------------------------------------------- what can fail


@pytest.mark.parametrize("number", range(0, 24, 3))
def test_a_connection_that_breaks_once(number: int, made: Path, tmp_path: Path) -> None:
    seen = []

    def read(name: str, data: bytes) -> bytes:
        seen.append(name)
        if len(seen) == number + 1:
            raise ConnectionResetError("the peer has gone")
        return data[: len(data) // 2] if len(seen) == number + 2 else data

    Buckets.on_read.append(read)
    do("merge", FAR, tmp_path / "far")
    assert len(seen) > number + 2
    Buckets.on_read.clear()
    do("merge", made, tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def broken(how: str) -> Callable[[str, bytes], bytes]:
    """What happens from the first byte of a tensor of the base on."""

    def read(name: str, data: bytes) -> bytes:
        if "base/model-" not in name or data[8:9] == b"{":
            return data
        if how == "dropped":
            raise ConnectionResetError("the peer has gone")
        return data[:-1] if how == "short" else data + b"more"

    return read


@pytest.mark.parametrize(
    "how, code", [("dropped", "LT-740"), ("short", "LT-750"), ("long", "LT-751")]
)
def test_a_connection_that_stays_broken(how: str, code: str, tmp_path: Path) -> None:
    Buckets.on_read.append(broken(how))
    with pytest.raises(LoratoolError) as caught:
        do("merge", FAR, tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == (code, 7)
    assert f"{FAR}/base/model-0000" in str(caught.value.file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base/model-00001-of-00003.safetensors",
                                  "a1/adapter_model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("how", ["replaced", "shrunk", "gone"])
def test_a_file_that_changes_meanwhile(how: str, name: str, bucket: Path, tmp_path: Path) -> None:
    """After its header was read: other values of the same size, fewer bytes, or no object."""
    path, whole = bucket / name, (bucket / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def change(read: str, data: bytes) -> bytes:
        if not read.endswith(name) or data[8:9] == b"{":
            return data
        if how == "gone":
            path.unlink(missing_ok=True)
            raise FileNotFoundError(read)
        path.write_bytes(whole[:-1] + b"\1" if how == "replaced" else whole[:header])
        return data if how == "replaced" else b""

    Buckets.on_read.append(change)
    with pytest.raises(LoratoolError) as caught:
        do("merge", FAR, tmp_path / "out")
    assert caught.value.code in ("LT-332", "LT-334") and caught.value.exit_code == 3
    assert str(caught.value.file).startswith(FAR)
    assert not (tmp_path / "out").exists()


def test_a_change_under_a_look(bucket: Path) -> None:
    path = bucket / "a1" / "adapter_model.safetensors"
    whole = path.read_bytes()

    def change(read: str, data: bytes) -> bytes:
        if read.endswith("a1/adapter_model.safetensors") and data[8:9] != b"{":
            path.write_bytes(whole[:-1] + b"\1")
        return data

    Buckets.on_read.append(change)
    assert code_of(lambda: lt.compare([f"{FAR}/a1", f"{FAR}/a2"])) == "LT-332"


def test_a_store_without_tags(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the time of writing tells; this one is fsspec's own, in memory."""
    memory = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    memory.put(str(made), "/m", recursive=True)
    for top, out in ((made, "near"), ("memory://m", "far")):
        do("extract", top, tmp_path / out)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    name, read = "/m/tuned/model-00001-of-00003.safetensors", store_range.read_range

    def replace(file: Any, start: int, count: int) -> bytes:
        if str(file).endswith(name) and start:
            memory.pipe_file(name, memory.cat_file(name)[:-1] + b"\1")
        return read(file, start, count)

    monkeypatch.setattr(store_range, "read_range", replace)
    assert code_of(lambda: do("extract", "memory://m", tmp_path / "out")) == "LT-332"
    assert not (tmp_path / "out").exists()


def test_a_small_file_that_changes_while_it_comes(bucket: Path, tmp_path: Path) -> None:
    path = bucket / "base" / "tokenizer.json"

    def change(read: str, data: bytes) -> bytes:
        if read.endswith("base/tokenizer.json"):
            path.write_text('{"other": 1}')
        return data

    Buckets.on_read.append(change)
    assert code_of(lambda: do("merge", FAR, tmp_path / "out")) == "LT-332"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_changed", [False, True])
def test_what_a_killed_run_had_finished(
    is_changed: bool, made: Path, bucket: Path, tmp_path: Path
) -> None:
    """Shards of inputs that did not change are kept, whatever this machine calls their stubs."""
    second = "base/model-00002"

    def die(name: str, data: bytes) -> bytes:
        if second in name and data[8:9] != b"{":
            raise KeyboardInterrupt
        return data

    Buckets.on_read.append(die)
    with pytest.raises(KeyboardInterrupt):
        lt.merge([f"{FAR}/a1"], base=f"{FAR}/base", output=tmp_path / "out", threads=1)
    Buckets.on_read.clear()
    Buckets.reads.clear()
    if is_changed:
        path = bucket / "base" / "model-00001-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    lt.merge([f"{FAR}/a1"], base=f"{FAR}/base", output=tmp_path / "out")
    tensors = [n for n, start, _ in Buckets.reads if "base/model-00001" in n and start]
    assert bool(tensors) == is_changed
    lt.merge([bucket / "a1"], base=bucket / "base", output=tmp_path / "near")
    assert contents(tmp_path / "out") == contents(tmp_path / "near")


def test_a_killed_series_goes_on(tmp_path: Path) -> None:
    """An output that was complete is known by where its inputs lie, not by what they were here."""

    def die(name: str, data: bytes) -> bytes:
        if "a2/" in name and data[8:9] != b"{" and (tmp_path / "out" / "a1").exists():
            raise KeyboardInterrupt
        return data

    def rescale() -> None:
        lt.rescale([f"{FAR}/a1", f"{FAR}/a2"], 0.5, output=f"{tmp_path / 'out'}/")

    Buckets.on_read.append(die)
    with pytest.raises(KeyboardInterrupt):
        rescale()
    Buckets.on_read.clear()
    rescale()
    assert len(contents(tmp_path / "out" / "a2")) > 3


# ------------------------------------------------------------------------------- what is refused


def refusal(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, str], str]:
    exit_code = run([*words, "--json"])
    said = capsys.readouterr()
    return exit_code, json.loads(said.out)["error"], said.out + said.err


@pytest.mark.parametrize(
    "source, exit_code, code",
    [
        (f"{FAR}/nothing", 3, "LT-300"), ("buckets://none/a1", 3, "LT-300"),
        (f"{FAR}/a1/nothing.safetensors", 3, "LT-300"), ("nowhere://b/a1", 3, "LT-300"),
        ("https://example.org/a1", 3, "LT-300"), ("buckets://me:s3cret@b/a1", 2, "LT-264"),
        (FAR, 3, "LT-326"), (f"{FAR}/base", 4, "LT-491"), (f"{FAR}/base/LICENSE", 3, "LT-301"),
    ],
)  # fmt: skip
def test_places_that_hold_no_adapter(
    source: str, exit_code: int, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", source, "--base", f"{FAR}/base", "-o", str(tmp_path / "out")]
    got, error, text = refusal(words, capsys)
    assert (got, error["code"]) == (exit_code, code), error
    assert "s3cret" not in text and str(tmp_path / "tmp") not in text
    assert not source.startswith("https") or "fetch it first" in error["hint"]
    if code in ("LT-326", "LT-491"):
        assert error["file"].startswith(FAR)


def test_a_store_that_denies(capsys: pytest.CaptureFixture[str]) -> None:
    def deny(name: str, data: bytes) -> bytes:
        raise PermissionError("Access Denied")

    Buckets.on_read.append(deny)
    exit_code, error, _ = refusal(["inspect", f"{FAR}/a1"], capsys)
    assert (exit_code, error["code"], error["got"]) == (6, "LT-601", "Access Denied")
    assert "keys" in error["hint"] and error["file"].startswith(f"{FAR}/a1/")


def test_a_driver_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    exit_code, error, _ = refusal(["inspect", "gs://bucket/a"], capsys)
    assert (exit_code, error["code"], error["hint"]) == (2, "LT-296", "pip install gcsfs")


def test_no_base_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, error, _ = refusal(["merge", f"{FAR}/a1", "-o", str(tmp_path / "out")], capsys)
    assert (exit_code, error["code"]) == (2, "LT-205") and not Buckets.reads


def test_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, error, _ = refusal(["inspect", f"{FAR}/a1", "--offline"], capsys)
    assert (exit_code, error["code"]) == (7, "LT-740") and not Buckets.reads


def test_much_to_look_at_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "READ_BYTES", 1000)
    dry = {"base": f"{FAR}/base", "output": "out", "dry_run": True}
    assert code_of(lambda: lt.merge([f"{FAR}/a1"], **dry)) == "LT-265"
    lt.merge([f"{FAR}/a1"], **dry, yes=True)


@pytest.mark.parametrize("out", ["tuned", "tuned/below", "base", "a1"])
def test_an_output_over_an_input(out: str, bucket: Path) -> None:
    before = contents(bucket)

    def over() -> None:
        lt.extract(f"{FAR}/tuned", base=f"{FAR}/base", output=f"{FAR}/{out}", force=True)

    if out == "a1":

        def over() -> None:
            lt.rescale([f"{FAR}/a1"], 2, output=f"{FAR}/a1", force=True)

    assert code_of(over) == "LT-506"
    assert contents(bucket) == before


def test_names_that_no_file_can_have() -> None:
    """What a store can name and a disk cannot is left out, and what is far below."""
    names = ["a/b.json", "a", "x" * 300, "line\n.json", "back\\slash", "..", "a/../b", "a//b",
             "a/b/c.json", "a/b/c/d.json"]  # fmt: skip
    found = store_source.usable(dict.fromkeys(names, Entry(1)))
    assert list(found) == ["a/b.json", "a/b/c.json"]
