"""Whole or nothing: staging, journal, locks, overwriting, both I/O paths."""

from __future__ import annotations

import os
import shutil
import stat
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loratool.adapter import TensorRef
from loratool.errors import BadFileError, DiskError, OutputError
from loratool.store.journal import encode, read_lines
from loratool.store.leftovers import clear_away
from loratool.store.marker import REPLACED, prove
from loratool.store.reader import FileReader
from loratool.store.series import series
from loratool.store.shard_writer import PAGE, ShardWriter, clone_file
from loratool.store.staging import Making
from loratool.store.writer import MARKER, StagedOutput, check_output


@pytest.fixture(params=["tuned", "plain"])
def io_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LORATOOL_PLAIN_IO", "1" if request.param == "plain" else "0")
    return str(request.param)


def staged(path: Path, plan: str = "p", **more: bool) -> StagedOutput:
    return StagedOutput(path, Making(is_folder=True, plan_id=plan, **more))


def finish(path: Path, text: bytes = b"x", **more: bool) -> None:
    with staged(path, **more) as output:
        output.write_file("a", text)
        output.commit({})


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


def test_threads_do_not_move_each_others_place(
    tmp_path: Path, io_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where positioned writes are missing (Windows), a place is sought first: one at a time."""
    if io_path == "plain":
        seek = os.lseek
        monkeypatch.setattr("os.lseek", lambda *args: (seek(*args), time.sleep(1e-3)))
    pieces = [os.urandom(5000) for _ in range(32)]
    writer = ShardWriter(tmp_path / "f", b"", 5000 * len(pieces))
    with ThreadPoolExecutor(8) as pool:
        for number, piece in enumerate(pieces):
            pool.submit(writer.put, 5000 * number, memoryview(piece))
    writer.finish()
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)


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


def interrupted(target: Path, *names: str) -> Path:
    """A run that stopped after these files; returns its journal."""
    with pytest.raises(RuntimeError), staged(target) as output:
        for name in names:
            output.create(name).write_bytes(b"12345")
            output.mark_finished(name, 5)
        raise RuntimeError
    return target.with_name("out.loratool-partial") / ".journal"


def test_torn_journal_line_and_wrong_size_are_redone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    journal = interrupted(target, "s", "t", "u")
    journal.write_bytes(journal.read_bytes()[:-9])
    (journal.parent / "s").write_bytes(b"123")
    with staged(target) as output:
        assert set(output.finished) == {"t"}


def test_any_damaged_byte_of_a_journal_takes_one_line(tmp_path: Path) -> None:
    """The rest counts: the rerun makes one file anew, or all if the plan cannot be read."""
    target = tmp_path / "out"
    journal = interrupted(target, "s", "t", "u")
    whole = journal.read_bytes()
    folder = tmp_path / "kept"
    journal.parent.rename(folder)
    for position in range(0, len(whole), 7):
        shutil.rmtree(journal.parent, ignore_errors=True)
        shutil.copytree(folder, journal.parent)
        damaged = bytearray(whole)
        damaged[position] ^= 0x11
        journal.write_bytes(damaged)
        with StagedOutput(
            target, Making(is_folder=True, plan_id="p", names=["s", "t", "u"])
        ) as output:
            lost = {"s", "t", "u"} - set(output.finished)
        is_head = b"\n" not in whole[:position]
        assert is_head or len(lost) <= 1 + (whole[position] == ord("\n"))


def test_a_journal_that_names_nothing_any_more_is_still_ours(tmp_path: Path) -> None:
    """Only its head can be read: it goes, and the folder that held it alone."""
    target = tmp_path / "out"
    journal = interrupted(target, "s")
    head, *_ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + b"damaged\n")
    (journal.parent / "s").unlink()
    clear_away(target, prove)
    assert not journal.parent.exists()


def test_what_others_put_beside_the_work_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    journal = interrupted(target, "s")
    (journal.parent / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in journal.parent.iterdir()}
    for plan, restart in (("p", False), ("p", True), ("q", False), ("q", True)):
        with pytest.raises(OutputError, match=r"notes\.txt") as caught:
            staged(target, plan, restart=restart)
        assert caught.value.code == "LT-511"
        assert {p.name: p.read_bytes() for p in journal.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["precious", ".journal", ".journal.tmp", "loratool.json", "a/b"])
def test_a_folder_of_somebody_under_the_staging_name_stays(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "out.loratool-partial" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"plan": "p"}\n')
    with pytest.raises(OutputError) as caught:
        StagedOutput(tmp_path / "out", Making(is_folder=True, plan_id="p", names=[name]))
    assert caught.value.code == "LT-511" and theirs.read_text() == '{"plan": "p"}\n'


def test_a_forged_journal_cannot_reach_out(tmp_path: Path) -> None:
    victim = tmp_path / "thesis"
    victim.write_text("x")
    journal = interrupted(tmp_path / "out", "s")
    forged = [{"names": ["../thesis", str(victim), "s"]}, {"file": "../thesis", "size": 1,
              "crc32": [], "results": None}]  # fmt: skip
    journal.write_bytes(journal.read_bytes() + b"".join(map(encode, forged)))
    with staged(tmp_path / "out") as output:
        output.commit({})
    assert victim.read_text() == "x"


@pytest.mark.parametrize("kind", ["names", "file"])
@pytest.mark.parametrize(
    "name",
    ["x" * 300, "x" * 253, "é" * 200, "d/" + "x" * 300, "/".join("e" * 3000), "a\0b", "\ud800",
     "..", "../z", "/etc/z", "s/x", "sub/t/x", "sub", ".journal", ".journal.tmp", ".journal/x", ""],
)  # fmt: skip
def test_a_line_with_a_name_that_no_file_can_have_does_not_count(
    tmp_path: Path, kind: str, name: str
) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(target) as output:
        for one in ("s", "sub/t"):
            output.create(one).write_bytes(b"12345")
            output.mark_finished(one, 5)
        raise RuntimeError
    line = {"names": [name], "file": name, "size": 0, "crc32": [], "results": None}
    keys = ("names",) if kind == "names" else ("file", "size", "crc32", "results")
    with (tmp_path / "out.loratool-partial" / ".journal").open("ab") as file:
        file.write(encode({key: line[key] for key in keys}))
    with staged(target) as output:
        assert output.finished.keys() == {"s", "sub/t"}
        output.commit({})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in target.rglob("*")) == [MARKER, "s", "sub", "t"]


def test_a_link_or_folder_in_the_place_of_a_file_is_somebody_elses(tmp_path: Path) -> None:
    target, left = tmp_path / "out", tmp_path / "out.loratool-partial"
    interrupted(target, "s")
    for make in (lambda p: p.symlink_to(left), lambda p: p.mkdir()):
        (left / "s").rename(tmp_path / "s")
        make(left / "s")
        with pytest.raises(OutputError, match="something else"):
            staged(target)
        assert os.path.lexists(left / "s")
        (left / "s").unlink() if (left / "s").is_symlink() else (left / "s").rmdir()
        (tmp_path / "s").rename(left / "s")


def test_a_stranger_that_appears_during_the_run_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, staged(tmp_path / "out") as output:
        (output.staging / "notes.txt").write_text("mine")
        output.commit({})
    assert caught.value.code == "LT-511" and not (tmp_path / "out").exists()
    assert (output.staging / "notes.txt").read_text() == "mine"


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


SPOILT = {
    "another file": lambda out: (out / "thesis").write_text("x"),
    "another folder": lambda out: (out / "new").mkdir(),
    "a link": lambda out: (out / "link").symlink_to("a"),
    "a changed file": lambda out: (out / "a").write_bytes(b"OLD"),
    "a file that is a folder": lambda out: ((out / "a").unlink(), (out / "a").mkdir()),
    "no marker": lambda out: (out / MARKER).unlink(),
    "an empty marker": lambda out: (out / MARKER).write_bytes(b""),
    "a foreign marker": lambda out: (out / MARKER).write_text("{}"),
    "an edited marker": lambda out: (out / MARKER).write_text(
        (out / MARKER).read_text().replace('"loratool": true', '"loratool": false')
    ),
    "a linked marker": lambda out: (
        (out / MARKER).rename(out.parent / "m"), (out / MARKER).symlink_to(out.parent / "m"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_force_replaces_what_loratool_wrote_and_nothing_more(tmp_path: Path, how: str) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    SPOILT[how](target)
    before = {p: p.lstat()[:7] for p in tmp_path.rglob("*")}  # all but times: reading sets one
    with pytest.raises(OutputError) as caught:
        staged(target, force=True)
    assert caught.value.code == "LT-505"
    assert {p: p.lstat()[:7] for p in tmp_path.rglob("*")} == before


def test_what_appears_in_the_old_output_during_the_run_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    with pytest.raises(OutputError) as caught, staged(target, force=True) as output:
        output.write_file("a", b"new")
        (target / "thesis").write_text("x")
        output.commit({})
    assert caught.value.code == "LT-505"
    assert (target / "a").read_bytes() == b"old" and (target / "thesis").read_text() == "x"


def test_death_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    (target / REPLACED).write_bytes(b"")
    target.rename(tmp_path / "out.loratool-old")
    with pytest.raises(OutputError):
        staged(target)  # recovered first, then refused: it exists
    assert (target / "a").read_bytes() == b"old"
    assert sorted(p.name for p in target.iterdir()) == ["a", MARKER]


@pytest.mark.parametrize("is_output", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_copy_that_somebody_named_like_an_old_output_stays(
    tmp_path: Path, is_output: bool, exists: bool
) -> None:
    target, old = tmp_path / "out", tmp_path / "out.loratool-old"
    finish(target, b"mine")
    target.rename(old)
    if not is_output:
        (old / MARKER).unlink()
    if exists:
        finish(target)
    finish(target, b"new", force=exists)
    assert (old / "a").read_bytes() == b"mine" and (target / "a").read_bytes() == b"new"


def test_a_replaced_output_half_deleted_is_cleared_away(tmp_path: Path) -> None:
    target, left = tmp_path / "out", tmp_path / "out.loratool-partial"
    finish(target, b"old")
    target.rename(left)
    (left / "a").unlink()
    finish(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kept", ["", "thesis"])
def test_an_empty_folder_is_all_that_is_left_of_a_replaced_output(
    tmp_path: Path, kept: str
) -> None:
    target, old = tmp_path / "out", tmp_path / "out.loratool-old"
    finish(target)
    old.mkdir()
    if kept:
        (old / kept).write_text("mine")
    clear_away(target, prove)
    assert old.exists() == bool(kept) and (target / "a").exists()


def test_dropped_files_are_no_longer_finished(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(target) as output:
        for name in ("s", "t"):
            output.create(name).write_bytes(b"12345")
            output.mark_finished(name, 5)
        output.drop(["s"])
        raise RuntimeError
    with staged(target) as output:
        assert set(output.finished) == {"t"} and output.notes == [
            "1 file taken over from an interrupted run"
        ]


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
        head, _names, more, line = read_lines(output.staging / ".journal")
    assert head["plan"] == "id" and more == {"names": ["s"]}
    sums = [[0, 3, zlib.crc32(b"123")]]
    assert line == {"file": "s", "size": 3, "results": [], "crc32": sums}


def test_a_journal_line_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little the system takes at a time."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    interrupted(tmp_path / "out", "s", "t")
    monkeypatch.undo()
    with staged(tmp_path / "out") as output:
        assert set(output.finished) == {"s", "t"}


def test_a_file_that_still_has_its_old_name_too(tmp_path: Path) -> None:
    """A kill between the two steps of a rename by link: the output is complete."""
    target = tmp_path / "out.safetensors"
    with (
        pytest.raises(RuntimeError),
        StagedOutput(target, Making(is_folder=False, plan_id="p", names=[""])) as output,
    ):
        output.create("").write_bytes(b"12345")
        output.mark_finished("", 5)
        raise RuntimeError
    os.link(output.staging / target.name, target)
    with pytest.raises(OutputError) as caught:
        check_output(target, is_folder=False, force=False)
    assert caught.value.code == "LT-501"
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"12345"


def test_notes_that_are_somebody_elses_file_too(tmp_path: Path) -> None:
    theirs, notes = tmp_path / "empty.txt", tmp_path / "out.loratool-run"
    theirs.touch()
    os.link(theirs, notes)
    with pytest.raises(OutputError, match="something else"), series(notes):
        pass
    assert notes.samefile(theirs) and not theirs.read_bytes()


def test_an_old_output_that_is_gone_by_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    with staged(target, force=True) as output:
        shutil.rmtree(target)
        output.write_file("a", b"new")
        output.commit({})
    assert (target / "a").read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_what_changed_since_it_was_proven_is_not_deleted(tmp_path: Path) -> None:
    target = tmp_path / "out"
    finish(target, b"old")
    found = prove(target)
    (target / "a").write_bytes(b"mine")
    found.remove(target)
    assert [p.name for p in target.iterdir()] == ["a"]
