"""Whole or nothing: staging, journal, locks, overwriting, both I/O paths."""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path

import pytest

from loratool.adapter import TensorRef
from loratool.errors import BadFileError, DiskError, OutputError
from loratool.store.reader import FileReader
from loratool.store.shard_writer import PAGE, ShardWriter, clone_file
from loratool.store.writer import MARKER, StagedOutput


@pytest.fixture(params=["tuned", "plain"])
def io_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LORATOOL_PLAIN_IO", "1" if request.param == "plain" else "0")
    return str(request.param)


def staged(path: Path, plan: str = "p", **more: bool) -> StagedOutput:
    return StagedOutput(path, is_folder=True, plan_id=plan, **more)


def finish(path: Path, text: bytes = b"x", **more: bool) -> None:
    with staged(path, **more) as output:
        output.write_file("a", text)
        output.write_file(MARKER, b"{}")
        output.commit()


@pytest.mark.parametrize("offset", [0, 8, 4095, 4096, 5000])
@pytest.mark.parametrize("size", [0, 1, 4096, 70_000, 300_001])
@pytest.mark.parametrize("aligned", [False, True])
def test_blocks_land_at_their_offsets(
    tmp_path: Path, io_path: str, offset: int, size: int, aligned: bool
) -> None:
    import mmap

    pool = mmap.mmap(-1, size + 2 * PAGE)
    pad = offset % PAGE if aligned else 3
    content = os.urandom(size)
    pool[pad : pad + size] = content
    path = tmp_path / "f"
    total = offset + size + 100
    writer = ShardWriter(path, b"", total)
    writer.put(offset, memoryview(pool)[pad : pad + size], aligned=aligned)
    writer.finish()
    data = path.read_bytes()
    assert data == bytes(offset) + content + bytes(100)


def test_the_direct_path_stays_in_use(tmp_path: Path) -> None:
    """A misaligned direct write would fail, and fall back without a word."""
    import mmap

    pool = mmap.mmap(-1, 300_000 + PAGE)
    writer = ShardWriter(tmp_path / "f", b"", 400_000)
    if writer._direct < 0:
        pytest.skip("no O_DIRECT on this file system")
    writer.put(5000, memoryview(pool)[5000 % PAGE :][:300_000], aligned=True)
    assert writer._direct >= 0
    writer.finish()


def test_neighbouring_pieces_share_pages(tmp_path: Path, io_path: str) -> None:
    import mmap

    content = os.urandom(400_000)
    writer = ShardWriter(tmp_path / "f", b"HEAD", 4 + len(content))
    for start in range(0, len(content), 99_999):
        piece = content[start : start + 99_999]
        pool = mmap.mmap(-1, len(piece) + PAGE)
        pad = (4 + start) % PAGE
        pool[pad : pad + len(piece)] = piece
        writer.put(4 + start, memoryview(pool)[pad : pad + len(piece)], aligned=True)
    writer.finish()
    assert (tmp_path / "f").read_bytes() == b"HEAD" + content


def test_nothing_under_the_final_name_before_commit(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target) as output:
        output.write_file("a", b"1")
        assert not target.exists()
        output.commit()
    assert sorted(p.name for p in target.iterdir()) == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_failure_leaves_no_debris_unless_a_shard_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(target) as output:
        output.write_file("a", b"1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), staged(target) as output:
        output.create("s").write_bytes(b"12345")
        output.mark_finished("s", 5, [{"n": 1}])
        raise RuntimeError
    with staged(target) as output:
        assert output.finished["s"]["results"] == [{"n": 1}]
        output.commit()
    assert (target / "s").read_bytes() == b"12345"


def test_another_plan_does_not_resume(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(target, "one") as output:
        output.create("s").write_bytes(b"12345")
        output.mark_finished("s", 5)
        raise RuntimeError
    with pytest.raises(OutputError, match="interrupted") as caught:
        staged(target, "two")
    assert caught.value.code == "LT-504"
    with staged(target, "two", restart=True) as output:
        assert output.finished == {} and not (output.staging / "s").exists()


def test_torn_journal_line_and_wrong_size_are_redone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(target) as output:
        for name in ("s", "t", "u"):
            output.create(name).write_bytes(b"12345")
            output.mark_finished(name, 5)
        raise RuntimeError
    journal = target.with_name("out.loratool-partial") / ".journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    (journal.parent / "s").write_bytes(b"123")
    with staged(target) as output:
        assert set(output.finished) == {"t"}


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with staged(tmp_path / "out"), pytest.raises(OutputError) as caught:
        staged(tmp_path / "out")
    assert caught.value.code == "LT-503"


def test_existing_output_is_refused_and_force_wants_our_marker(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(OutputError) as caught:
        staged(target)
    assert caught.value.code == "LT-501"
    with pytest.raises(OutputError) as caught:
        staged(target, force=True)
    assert caught.value.code == "LT-505" and (target / "precious").exists()


def test_force_replaces_an_earlier_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    finish(target, b"new", force=True)
    assert (target / "a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_death_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    target.rename(tmp_path / "out.loratool-old")
    with pytest.raises(OutputError):
        staged(target)  # recovered first, then refused: it exists
    assert (target / "a").read_bytes() == b"old"


def test_symlink_and_missing_parent(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError) as caught:
        staged(tmp_path / "link")
    assert caught.value.code == "LT-502"
    with pytest.raises(DiskError) as disk:
        staged(tmp_path / "no" / "out")
    assert disk.value.code == "LT-602"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_honour_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        finish(tmp_path / "out")
        writer = ShardWriter(tmp_path / "f", b"", 10)
        writer.finish()
    finally:
        os.umask(old)
    for path in (tmp_path / "out" / "a", tmp_path / "f"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def bytes_of(path: Path) -> TensorRef:
    size = path.stat().st_size
    return TensorRef(path, "x", "U8", (size,), 0, size)


def test_clone_is_the_same_bytes_or_declined(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"abc" * 1000)
    with source.open("rb", buffering=0) as file:
        is_cloned = clone_file(file, tmp_path / "b")
    if is_cloned:
        assert (tmp_path / "b").read_bytes() == source.read_bytes()


def test_truncated_source_is_an_error(tmp_path: Path, io_path: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    buffer = bytearray(8)
    with FileReader() as reader:
        reader.read_into(bytes_of(path), 2, memoryview(buffer))
        assert buffer == b"23456789"
        os.truncate(path, 5)
        with pytest.raises(BadFileError) as caught:
            reader.read_into(bytes_of(path), 2, memoryview(buffer))
        assert caught.value.code == "LT-331"


def test_changed_source_is_noticed(tmp_path: Path, io_path: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    with FileReader() as reader:
        reader.read_into(bytes_of(path), 0, memoryview(bytearray(3)))
        reader.check_unchanged()
        path.write_bytes(b"0123456780")
        os.utime(path, ns=(1, 1))
        with pytest.raises(BadFileError) as caught:
            reader.check_unchanged()
        assert caught.value.code == "LT-332"


def test_journal_is_json_lines(tmp_path: Path) -> None:
    with staged(tmp_path / "out", "id") as output:
        output.create("s").write_bytes(b"123")
        output.mark_finished("s", 3, [])
        lines = (output.staging / ".journal").read_text().splitlines()
    assert json.loads(lines[0])["plan"] == "id"
    sums = [[0, 3, zlib.crc32(b"123")]]
    assert json.loads(lines[1]) == {"file": "s", "size": 3, "results": [], "crc32": sums}
