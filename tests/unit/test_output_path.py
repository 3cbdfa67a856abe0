"""Where an output may go, and how names change hands."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratool.errors import DiskError, LoratoolError, OutputError
from loratool.ops.inputs import guard_output
from loratool.store import disk
from loratool.store.lock import FolderLock
from loratool.store.output_path import check_output
from loratool.store.staging import Making
from loratool.store.writer import StagedOutput


def code_of(path: Path, *, is_folder: bool = True, force: bool = False) -> str:
    with pytest.raises(LoratoolError) as caught:
        check_output(path, is_folder=is_folder, force=force)
    return caught.value.code


def test_a_free_place_is_left_as_it_was(tmp_path: Path) -> None:
    check_output(tmp_path / "out", is_folder=True, force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".", "..", "/", "-"])
def test_an_output_without_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(Path(name)) == "LT-510"


def test_an_address_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/out", "hf://me/out", "nowhere/out"):
        with pytest.raises(DiskError) as caught:
            check_output(Path(place), is_folder=True, force=False)
        assert caught.value.code == "LT-602"
        assert ("made on a disk" in str(caught.value.hint)) is ("//" in place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_links_are_refused_wherever_they_lead(tmp_path: Path, force: bool) -> None:
    (tmp_path / "folder").mkdir()
    for target in ("folder", "nowhere"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(tmp_path / target)
        assert code_of(link, force=force) == "LT-502"
        assert link.is_symlink()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert code_of(tmp_path / ("x" * 245)) == code_of(tmp_path / ("x" * 250)) == "LT-615"
    with pytest.raises(DiskError) as caught:
        StagedOutput(tmp_path / ("x" * 250), Making(is_folder=True, plan_id="p"))
    assert caught.value.code == "LT-615"


def test_a_folder_without_permission() -> None:
    if os.geteuid() != 0:
        pytest.skip("changes the user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.seteuid(65_534)
        try:
            assert code_of(Path(folder) / "out") == "LT-603"
            with pytest.raises(DiskError) as caught:
                StagedOutput(Path(folder) / "out", Making(is_folder=True, plan_id="p"))
            assert caught.value.code == "LT-603"
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_under_the_staging_name(tmp_path: Path, kind: str) -> None:
    taken, elsewhere = tmp_path / "out.loratool-partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "file":
        taken.write_text("x")
    else:
        taken.symlink_to(elsewhere)
    with pytest.raises(OutputError) as caught:
        StagedOutput(tmp_path / "out", Making(is_folder=True, plan_id="p"))
    assert caught.value.code == "LT-511"
    assert list(elsewhere.iterdir()) == [] and os.path.lexists(taken)


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("base", "base"),
        ("base/out", "base"),
        (".", "base"),
        ("hard", "base/w"),
        ("soft", "base/w"),
        ("twin", "base"),
        ("twin", "linked"),
        ("out", "out.loratool-partial"),
        ("out", "out.loratool-old/w"),
    ],
)
def test_an_output_that_would_hit_an_input(tmp_path: Path, output: str, source: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "w").write_text("x")
    os.link(tmp_path / "base" / "w", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "base" / "w")
    (tmp_path / "twin").mkdir()
    os.link(tmp_path / "base" / "w", tmp_path / "twin" / "v")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "w").symlink_to(tmp_path / "twin" / "v")
    (tmp_path / source).parent.mkdir(exist_ok=True)
    if not (tmp_path / source).exists():
        (tmp_path / source).write_text("y")
    with pytest.raises(OutputError) as caught:
        guard_output(tmp_path / output, [tmp_path / source])
    assert caught.value.code == "LT-506"
    guard_output(tmp_path / "free", [tmp_path / source])


@pytest.fixture(params=["linux", "links", "plain"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The three ways to give a file a name that must be free."""
    if request.param != "linux":
        monkeypatch.setenv("LORATOOL_PLAIN_IO", "1")
    if request.param == "plain":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    yield str(request.param)


def test_rename_new_replaces_nothing(tmp_path: Path, renaming: str) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        disk.rename_new(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"
    disk.rename_new(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]


def test_a_file_that_appears_during_the_run_stays(tmp_path: Path, renaming: str) -> None:
    target = tmp_path / "out.safetensors"
    with (
        pytest.raises(OutputError) as caught,
        StagedOutput(target, Making(is_folder=False, plan_id="p")) as output,
    ):
        output.write_file("", b"new")
        target.write_text("theirs")
        output.commit()
    assert caught.value.code == "LT-501" and target.read_text() == "theirs"


@pytest.mark.parametrize("plain", ["0", "1"])
def test_replacing_with_and_without_exchange(
    tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATOOL_PLAIN_IO", plain)
    target = tmp_path / "out"
    for text in (b"one", b"two", b"three"):
        with StagedOutput(target, Making(is_folder=True, plan_id="p", force=True)) as output:
            output.write_file("a", text)
            output.commit({})
        assert (target / "a").read_bytes() == text
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_goes_with_its_folder(tmp_path: Path) -> None:
    """A run that starts while another one commits gets a folder of its own."""
    staging, out = tmp_path / "s", tmp_path / "out"
    with FolderLock.make(staging, out):
        with pytest.raises(OutputError, match="another run"):
            FolderLock.make(staging, out)
        staging.rename(out)
        with FolderLock.make(staging, out):
            assert list(staging.iterdir()) == [] and out.is_dir()
        with pytest.raises(OutputError):
            FolderLock.take(out, out)


def test_an_adapter_does_not_take_the_place_of_a_run_under_way(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StagedOutput(
        tmp_path / "out", Making(is_folder=True, plan_id="merge")
    ) as output:  # fmt: skip
        output.create("s").write_bytes(b"1")
        output.mark_finished("s", 1)
        raise RuntimeError
    with pytest.raises(OutputError) as caught:
        StagedOutput(tmp_path / "out", Making(is_folder=True, plan_id=None))
    assert caught.value.code == "LT-504"
    assert (output.staging / "s").read_bytes() == b"1"
