"""Tables and pictures: new files only, whole or not at all, never through a link."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import loratool as lt
from loratool.errors import OutputError
from loratool.store import new_file
from tests.faults.scene import fingerprint

from .conftest import Run

COMMANDS = {
    "compare csv": "compare style sql --csv FILE.csv",
    "compare plot": "compare style sql --plot FILE.png",
    "spectrum csv": "inspect style --csv FILE.csv",
    "spectrum plot": "inspect style --plot FILE.svg",
    "page": "inspect style --html FILE.html",
    "look csv": "inspect style --base base --csv FILE.csv",
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lt.demo(tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


def words(command: str, name: str) -> tuple[list[str], Path]:
    found = COMMANDS[command].replace("FILE", name).split()
    return found, Path(next(w for w in found if w.startswith(f"{name}.")))


def beside(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_written_once(command: str, toy: Path, run: Run) -> None:
    line, path = words(command, "x")
    before = beside(toy)
    assert run(*line).code == 0 and path.stat().st_size > 100
    assert beside(toy) == before | {path.name}
    first = path.read_bytes()
    again = run(*line)
    assert again.code == 5 and "LT-508" in again.err and path.read_bytes() == first


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("target", ["there", "nowhere", "folder", "itself"])
def test_never_through_a_link(command: str, target: str, toy: Path, run: Run) -> None:
    line, path = words(command, "x")
    (toy / "there").write_text("mine")
    (toy / "folder").mkdir()
    path.symlink_to(path if target == "itself" else target)
    before = fingerprint(toy)
    found = run(*line)
    assert found.code == 5 and "LT-508" in found.err
    assert fingerprint(toy) == before and path.is_symlink() and not Path("nowhere").exists()


def test_inputs_are_taken_names(toy: Path, run: Run) -> None:
    before = fingerprint(toy)
    for path in ("style/adapter_config.json", "base", "."):
        assert run("compare", "style", "sql", "--csv", path).code == 5
    assert run("inspect", "style", "--csv", "x.png", "--plot", "x.png").code == 5
    assert run("compare", "style", "sql", "--csv", "x.svg", "--plot", "./x.svg").code == 5
    assert fingerprint(toy) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stream_is_no_file(command: str, toy: Path, run: Run) -> None:
    before = beside(toy)
    found = run(*words(command, "x")[0][:-1], "-")
    assert (found.code, beside(toy)) == (2 if "plot" in command else 5, before)
    assert ("LT-249" if "plot" in command else "LT-510") in found.err  # a picture needs a suffix


def test_a_long_name(toy: Path, run: Run) -> None:
    name = "n" * 251 + ".csv"
    assert run("inspect", "style", "--csv", name).code == 0 and Path(name).is_file()
    assert run("inspect", "style", "--csv", "n" + name).code == 6


def appear(path: Path) -> Callable[..., None]:
    """What takes a name in the moment before it is given."""
    rename = new_file.rename_new

    def first(source: Path, target: Path) -> None:
        path.write_text("theirs")
        rename(source, target)

    return first


def test_what_appears_meanwhile_stays(toy: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = beside(toy)
    monkeypatch.setattr(new_file, "rename_new", appear(toy / "x.csv"))
    found = run("inspect", "style", "--csv", "x.csv")
    assert found.code == 5 and "LT-508" in found.err
    assert (toy / "x.csv").read_text() == "theirs" and beside(toy) == before | {"x.csv"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_behind(
    error: BaseException, toy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = beside(toy)

    def fail(*_: object) -> None:
        raise error

    for call in ("fsync", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            found = run("inspect", "style", "--csv", "x.csv")
        assert found.code == (6 if isinstance(error, OSError) else 130)
        assert beside(toy) == before


def test_one_of_many_writers_wins(tmp_path: Path) -> None:
    """Each has a temporary file of its own: none ever sees another one's bytes."""
    path, refused = tmp_path / "x.csv", []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            new_file.write_new_file(path, bytes([number]) * 200_000)
        except OutputError:
            refused.append(number)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and beside(tmp_path) == {"x.csv"}
    data = path.read_bytes()
    assert data == data[:1] * 200_000
