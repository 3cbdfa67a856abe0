"""Inputs that change, vanish or become something else while they are read, and too many of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import loratool as lt
from loratool.adapter import TensorRef
from loratool.errors import LoratoolError
from loratool.store.header import read_header
from loratool.store.reader import FileReader
from loratool.store.stamps import take_stamps
from loratool.store.tokens import highest_id
from tests.faults.world import World, base_tensors, save, values
from tests.make import random_factors, save_adapter

POSIX = pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
Change = Callable[[Path], None]


def edit(path: Path) -> None:
    """Change a byte in place and put the time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def twin(path: Path) -> None:
    """Another file of the same bytes and times."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def link(path: Path) -> None:
    """A link to a file of the same bytes elsewhere."""
    elsewhere = path.parent.parent.parent / "elsewhere"
    shutil.copy2(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


CHANGES = [edit, fifo, folder, twin, link, Path.unlink]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def one_tensor(path: Path, seed: int = 0) -> TensorRef:
    return read_header(save(path, {"w": values(4, seed=seed)})).tensors[0]


# ------------------------------------------------------------------------------- what changed


@POSIX
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_is_held_to_what_its_header_was(
    tmp_path: Path, change: Change, is_open: bool
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    ref = one_tensor(tmp_path / "a" / "b" / "x.safetensors")
    with FileReader() as reader:
        if is_open:
            reader.read_into(ref, 0, memoryview(bytearray(16)))
        change(ref.file)
        with pytest.raises(LoratoolError) as caught:
            if is_open:
                reader.check_unchanged()
            else:
                reader.read_into(ref, 0, memoryview(bytearray(16)))
        assert (caught.value.code, caught.value.exit_code) == ("LT-332", 3)
    with pytest.raises(LoratoolError) as caught:
        take_stamps([ref])
    assert (caught.value.code, caught.value.exit_code) == ("LT-334", 3)


@POSIX
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("shard", [1, 2])
def test_a_base_that_changes_during_a_merge(world: World, change: Change, shard: int) -> None:
    world.shard()
    path = world.base / f"model-{shard:05d}-of-00002.safetensors"
    done: list[int] = []

    def progress(*_: int) -> None:
        if not done:
            change(path)
        done.append(1)

    with pytest.raises(LoratoolError) as caught:
        lt.merge([str(world.adapter)], base=world.base, output=world.out, threads=1,
                 progress=progress)  # fmt: skip
    assert (caught.value.code, caught.value.exit_code) == ("LT-332", 3)
    assert caught.value.file == str(path)
    assert world.leftovers() == []


@POSIX
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_small_file_that_changes_during_a_merge(world: World, change: Change) -> None:
    path = world.base / "LICENSE"
    path.write_text("free")
    done: list[int] = []

    def progress(*_: int) -> None:
        if not done:
            change(path)
        done.append(1)

    with pytest.raises(LoratoolError) as caught:
        lt.merge([str(world.adapter)], base=world.base, output=world.out, threads=1,
                 progress=progress)  # fmt: skip
    assert (caught.value.code, caught.value.file) == ("LT-332", str(path))
    assert world.leftovers() == []


@POSIX
def test_a_rerun_notices_an_input_whose_time_was_put_back(world: World) -> None:
    world.shard()
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if (
            world.out.with_name("merged.loratool-partial") / "model-00001-of-00002.safetensors"
        ).exists():
            raise KeyboardInterrupt

    merge = {"base": world.base, "output": world.out, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        lt.merge([str(world.adapter)], progress=stop, **merge)
    edit(world.base / "model-00001-of-00002.safetensors")
    report = lt.merge([str(world.adapter)], **merge)
    assert any("inputs changed" in note for note in report.notes), report.notes
    fresh = world.out.with_name("fresh")
    lt.merge([str(world.adapter)], base=world.base, output=fresh, threads=1)
    name = "model-00001-of-00002.safetensors"
    assert (world.out / name).read_bytes() == (fresh / name).read_bytes()


# --------------------------------------------------------------------------------- many files


MANY = 300  # shards
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from loratool.cli import main
sys.argv = ["loratool", *sys.argv[2:]]
main()
"""


def many_shards(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "test"}')
    modules = [f"model.layers.{i}.proj" for i in range(MANY)]
    weight_map = {}
    for i, module in enumerate(modules, 1):
        name = f"model-{i:05d}-of-{MANY:05d}.safetensors"
        save(folder / name, {f"{module}.weight": values(8, 8, seed=i), f"n.{i}": values(8)})
        weight_map |= {f"{module}.weight": name, f"n.{i}": name}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return modules


@POSIX
@pytest.mark.parametrize(("limit", "more"), [(256, ()), (64, ("--threads", "64"))])
def test_more_shards_than_files_may_be_open(
    tmp_path: Path, limit: int, more: tuple[str, ...]
) -> None:
    modules = many_shards(tmp_path / "base")
    factors = random_factors(dict.fromkeys(modules[::2], (8, 8)), rank=2, seed=0)
    save_adapter(tmp_path / "a", factors)
    for words in (
        ["merge", "a", "--base", "base", "-o", "out", *more],
        ["verify", "out"],
        ["extract", "out", "--base", "base", "--rank", "2", "-o", "found", *more],
    ):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


def test_few_open_files_serve_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.store.reader.most_open_files", lambda: 3)
    refs = [one_tensor(tmp_path / f"{i}.safetensors", seed=i) for i in range(20)]
    wanted = [ref.file.read_bytes()[ref.start :] for ref in refs]
    wrong: list[int] = []

    def read(first: int) -> None:
        for i in range(300):
            number = (first + i * 7) % len(refs)
            data = bytearray(16)
            reader.read_into(refs[number], 0, memoryview(data))
            if data != wanted[number] or len(reader._files) > 3 + 4:
                wrong.append(number)

    with FileReader() as reader:
        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and len(reader._files) <= 3 + 4
        reader.check_unchanged()
        edit(refs[0].file)  # closed long ago, and still held to what it was
        with pytest.raises(LoratoolError, match="input changed"):
            reader.check_unchanged()


# -------------------------------------------------------------------------------- large files

PEAK = """
import re, sys
from pathlib import Path
from loratool.cli import run
code = run(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def peak_of(words: list[str], cwd: Path) -> tuple[int, str, int]:
    """(exit code, messages, peak resident bytes) of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], cwd=cwd, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command", ["merge", "rescale"])
def test_a_small_file_of_any_size_is_copied_in_pieces(tmp_path: Path, command: str) -> None:
    world = World(tmp_path)
    size = 500_000_000
    place = world.base if command == "merge" else world.adapter
    with (place / "tokenizer.model").open("wb") as file:
        file.truncate(size)
    rescale = ["rescale", str(world.adapter), "2", "-o", str(world.out)]
    words = world.merge_words() if command == "merge" else rescale
    code, errors, peak = peak_of(words, tmp_path)
    assert code == 0, errors
    assert (world.out / "tokenizer.model").stat().st_size == size
    assert peak < 400_000_000, f"{peak / 1e6:.0f} MB"


def test_the_space_that_small_files_need_is_counted(world: World) -> None:
    for folder in (world.base, world.adapter):
        with (folder / "tokenizer.model").open("wb") as file:
            file.truncate(1 << 42)
    for work in (
        lambda: lt.merge([str(world.adapter)], base=world.base, output=world.out),
        lambda: lt.rescale([str(world.adapter)], 2, output=world.out),
    ):
        with pytest.raises(LoratoolError) as caught:
            work()
        assert caught.value.code == "LT-610" and world.leftovers() == []


FORMS = {
    "lists": ("tokenizer.json", '{"added_tokens": [%s]}', "[]"),
    "objects": ("tokenizer.json", '{"added_tokens": [%s]}', "{}"),
    "texts": ("tokenizer.json", '{"model": {"vocab": [%s]}}', '""'),
    "halves": ("tokenizer.json", '{"model": {"vocab": ["%s"]}}', "\\ud800"),
    "escapes": ("tokenizer.json", '{"model": {"vocab": ["\\ud800%s"]}}', "\\n"),
    "keys": ("vocab.json", "{%s}", '"a":1'),
    "pieces": ("vocab.json", "[%s]", '"a"'),
    "one": ("vocab.json", '["%s"]', "a"),
    "half": ("tokenizer.json", '{"a": "\\ud800%s"}', "a"),
    "quotes": ("vocab.json", '["%s"]', '\\"'),
    "lines": ("vocab.txt", "%s", "\n"),
    "tokens": ("added_tokens.json", "{%s}", '"a":1'),
    "decoder": ("tokenizer_config.json", '{"added_tokens_decoder": {%s}}', '"1":{"content":"a"}'),
}
HIGHEST = """
import re, sys
from pathlib import Path
from loratool.store.tokens import highest_id
highest_id({sys.argv[1]: Path(sys.argv[1])})
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.thin(2)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_takes_bounded_memory(tmp_path: Path, form: str) -> None:
    name, frame, unit = FORMS[form]
    joint = "" if form in ("halves", "escapes", "lines", "one", "half", "quotes") else ","
    limit = 99_000_000
    count = limit // len(unit + joint)
    (tmp_path / name).write_text(frame % joint.join([unit] * count))
    done = subprocess.run(
        [sys.executable, "-c", HIGHEST, name], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * 1024
    assert peak < 300_000_000, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("piece", ["\\ud800", "\\\\ud800", "\\ud83d\\ude00", "\\udc00\\ud800", "é"])
def test_surrogates_in_a_tokenizer(tmp_path: Path, piece: str) -> None:
    vocab = f'{{"model": {{"vocab": {{"{piece}": 1, "<new>": 2}}, "merges": ["{piece}"]}}}}'
    path = tmp_path / "tokenizer.json"
    path.write_text(vocab)
    assert highest_id({path.name: path}) == (2, "<new>")


def test_base_is_read_as_it_is(world: World) -> None:
    """The world of these tests is sound: without a change nothing is refused."""
    assert base_tensors() and world.merge().code == 0
