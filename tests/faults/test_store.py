"""Outputs in an object store: the bytes of local ones, whole or not at all, whatever fails."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.cli import run
from loratool.engine.executors import EXECUTORS, Desk, Row, Task
from loratool.engine.executors.whole_steps import (
    LostError,
    Order,
    ShardOrder,
    carry_out,
    run_whole_steps,
)
from loratool.engine.kernel import Env
from loratool.errors import HubError, LoratoolError
from loratool.store import object_store
from loratool.store.marker import MARKER, marker_of
from loratool.store.outputs import open_output, place_of
from loratool.store.places import INSIDE
from loratool.store.staging import Making, Output
from tests.buckets import ROOT, Buckets, objects
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {f"model.layers.{i}.q_proj": (24, 16) for i in range(3)}
COMMANDS = ("merge", "extract", "combine", "file", "kohya", "kept")
FORCED = ("merge", "extract", "combine", "file", "kohya")
"""Those whose single file says what it holds."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("inputs")
    weights = {f"{k}.weight": randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    save_checkpoint(top / "base", weights, shards=3)
    for seed in (1, 2):
        save_adapter(top / f"a{seed}", random_factors(SHAPES, rank=2, seed=seed))
    lt.merge([top / "a1"], base=top / "base", output=top / "tuned")
    save_checkpoint(top / "one", weights)
    for name in COMMANDS:
        (top / name).mkdir()
        call(name, top, f"{top / name}/out{ending(name)}")
    return top


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty bucket ``b``, without waits between attempts and with a spool of its own."""
    (tmp_path / "stores" / "b").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv(ROOT, str(tmp_path / "stores"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(object_store, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(Buckets, "before", [])
    monkeypatch.setattr(Buckets, "log", [])
    yield tmp_path / "stores" / "b"
    assert not list((tmp_path / "tmp").glob("loratool-spool-*"))


def ending(command: str) -> str:
    return ".safetensors" if command in ("file", "kohya", "kept") else ""


def call(command: str, top: Path, out: str, **how: Any) -> Any:
    how = {"output": out, "threads": 2, **how}
    if command == "merge":
        return lt.merge([top / "a1", f"{top / 'a2'}:0.5"], base=top / "base", **how)
    if command == "extract":
        return lt.extract(top / "tuned", base=top / "base", rank=2, **how)
    if command == "combine":
        return lt.combine([top / "a1", f"{top / 'a2'}:0.5"], **how)
    if command == "file":
        return lt.merge([top / "a1"], base=top / "one" / "model.safetensors", **how)
    if command == "kohya":
        return lt.convert([top / "a1"], to="kohya", base=top / "base", **how)
    return lt.extract(top / "tuned", base=top / "base", rank=2, to="kohya", **how)


def local(top: Path, command: str) -> dict[str, bytes]:
    place = top / command / f"out{ending(command)}"
    if place.is_file():
        return {".": place.read_bytes()}
    return {p.relative_to(place).as_posix(): p.read_bytes()
            for p in place.rglob("*") if p.is_file()}  # fmt: skip


def address(command: str) -> str:
    return f"buckets://b/out{ending(command)}"


def stored(command: str) -> dict[str, bytes]:
    return objects("b", f"out{ending(command)}")


def is_whole(found: dict[str, bytes]) -> bool:
    """What a reader who looks for the marker holds for an output."""
    marker = marker_of(found.get(MARKER, b""))
    return marker is not None and all(
        n in found and len(found[n]) == c["bytes"] for n, c in marker.files.items()
    )


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(LoratoolError) as caught:
        call()
    return caught.value.code


class Fail:
    """Fails the n-th of some calls, or each from then on.

    Args:
        number: counted from 0.
        kinds: of calls that count.
        always: the store is dead from then on, as for a run that was killed.
        part: of the names that count.
    """

    def __init__(
        self, number: int, *kinds: str, always: bool = False, part: str = "",
        error: type[BaseException] = OSError,
    ) -> None:  # fmt: skip
        self.number, self.kinds, self.always, self.part = number, kinds, always, part
        self.error, self.seen, self.lock = error, 0, threading.Lock()

    def __call__(self, what: str, name: str) -> None:
        if (self.kinds and what not in self.kinds) or self.part not in name:
            return
        with self.lock:
            self.seen += 1
            seen = self.seen
        if seen == self.number + 1 or (self.always and seen > self.number):
            raise self.error("the store says no")


# ------------------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("command", COMMANDS)
def test_the_bytes_of_a_local_output(command: str, inputs: Path) -> None:
    report = call(command, inputs, address(command))
    assert report.output == address(command)
    assert stored(command) == local(inputs, command)
    assert objects() == {f"b/{k}": v for k, v in objects("b").items()}
    assert not objects("b", f"out{ending(command)}{INSIDE}"), "nothing beside it"


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_processes_too(command: str, inputs: Path) -> None:
    call(command, inputs, address(command), executor="processes")
    assert stored(command) == local(inputs, command)


class FarCrew:
    """Workers that share nothing with the driver: orders and answers go through pickle.

    The first one is lost, with all that it had made.
    """

    attempts = 2

    def __init__(self, env: Env) -> None:
        self.env, self.orders, self.lost = env, list[bytes](), False

    def begin(self, order: Order | ShardOrder) -> int:
        self.orders.append(pickle.dumps(order))
        return len(self.orders) - 1

    def wait(self, jobs: Sequence[int]) -> Sequence[int]:
        return [max(jobs)]

    def end(self, job: int) -> bytes:
        answer = carry_out(pickle.loads(self.orders[job]), self.env)
        if not self.lost:
            self.lost = True
            raise LostError("gone")
        return answer

    def stop(self) -> None:
        assert self.lost


def far(env: Env, tasks: Iterator[Task], desk: Desk, workers: int) -> None:
    run_whole_steps(FarCrew(env), env, tasks, desk, workers, are_far=True)


@pytest.mark.parametrize("command", ["merge", "extract", "combine"])
def test_workers_of_other_machines_upload_their_shards(
    command: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Ray itself: `tests.unit.test_s3`."""
    monkeypatch.setitem(EXECUTORS, "ray", Row(f"{__name__}:far"))
    sent: list[Order | ShardOrder] = []
    monkeypatch.setattr(FarCrew, "begin", logged(FarCrew.begin, sent))
    call(command, inputs, address(command), executor="ray")
    assert stored(command) == local(inputs, command)
    assert not objects("b", f"out{INSIDE}")
    if command == "merge":
        assert len(sent) == 3 + 1 and all(isinstance(order, ShardOrder) for order in sent)
    Buckets.before[:] = [Fail(0, "put", always=True, part="-00003-")]
    if command == "merge":
        shutil.rmtree(Path(os.environ[ROOT]) / "b" / "out")
        with pytest.raises(HubError):
            call(command, inputs, address(command), executor="ray", threads=1)
        Buckets.before.clear()
        sent.clear()
        call(command, inputs, address(command), executor="ray")
        assert len(sent) == 1 + 1 and stored(command) == local(inputs, command)


def logged(begin: Callable[..., Any], log: list[Any]) -> Callable[..., Any]:
    def call(self: Any, order: Any) -> Any:
        log.append(order)
        return begin(self, order)

    return call


def test_one_file_is_no_work_for_other_machines(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXECUTORS, "ray", Row(f"{__name__}:far"))
    monkeypatch.setattr(FarCrew, "stop", lambda self: None)
    assert code_of(lambda: call("file", inputs, address("file"), executor="ray")) == "LT-278"
    assert not objects("b")


def test_shards_are_uploaded_when_they_are_done_and_the_marker_last(inputs: Path) -> None:
    call("merge", inputs, address("merge"), threads=1)
    names = [name.rpartition("/")[2] for what, name in Buckets.log if what == "put"]
    assert sorted(names[:3]) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names[-1] == MARKER and len(names) == 6


def test_few_files_wait_here(tmp_path: Path, inputs: Path) -> None:
    """However many shards there are, and however slow the store is."""
    shapes = {f"model.layers.{i}.q_proj": (8, 8) for i in range(24)}
    tensors = {f"{k}.weight": randn(*s, seed=1) for k, s in shapes.items()}
    save_checkpoint(tmp_path / "base", tensors, shards=24)
    save_adapter(tmp_path / "a", random_factors(shapes, rank=2, seed=1))
    most = [0]

    def look(what: str, name: str) -> None:
        if what == "put" and name.endswith(".safetensors"):
            time.sleep(0.01)
            here = (tmp_path / "tmp").glob("loratool-spool-*/*.safetensors*")
            most.append(len(list(here)))

    Buckets.before.append(look)
    lt.merge([tmp_path / "a"], base=tmp_path / "base", output=address("merge"), threads=2)
    assert 1 <= max(most) <= 2 + 2 + 1  # uploads, threads that wait for room, one begun


# -------------------------------------------------------------------------- whose place it is


def test_an_earlier_output_stays_without_force(inputs: Path) -> None:
    for command in FORCED:
        call(command, inputs, address(command))
        before = objects("b")
        assert code_of(lambda c=command: call(c, inputs, address(c))) == "LT-501"  # type: ignore[misc]
        assert objects("b") == before
        call(command, inputs, address(command), force=True)
        assert objects("b") == before
        shutil.rmtree(Path(os.environ[ROOT]) / "b")
        (Path(os.environ[ROOT]) / "b").mkdir()


@pytest.mark.parametrize("tags", [True, False])
def test_force_replaces_only_what_it_knows(
    inputs: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch, tags: bool
) -> None:
    monkeypatch.setattr(Buckets, "tags", tags)
    call("extract", inputs, address("merge"))
    call("merge", inputs, address("merge"), force=True)
    assert stored("merge") == local(inputs, "merge"), "and nothing of the old one stays"
    (bucket / "out" / "mine.txt").write_text("x")
    assert code_of(lambda: call("extract", inputs, address("merge"), force=True)) == "LT-505"
    (bucket / "out" / "mine.txt").unlink()
    raw = bytearray((bucket / "out" / "config.json").read_bytes())
    raw[-1] ^= 1
    (bucket / "out" / "config.json").write_bytes(raw)
    assert code_of(lambda: call("extract", inputs, address("merge"), force=True)) == "LT-505"
    assert {**stored("merge"), "config.json": b""} == {**local(inputs, "merge"), "config.json": b""}


def test_what_is_somebody_elses_stays(inputs: Path, bucket: Path) -> None:
    (bucket / "out").mkdir()
    (bucket / "out" / "mine.txt").write_text("x")
    for force, code in ((False, "LT-501"), (True, "LT-505")):
        assert code_of(lambda f=force: call("merge", inputs, address("merge"), force=f)) == code  # type: ignore[misc]
    assert objects("b") == {"out/mine.txt": b"x"}
    (bucket / "out" / "mine.txt").unlink()
    (bucket / f"out{INSIDE}").mkdir()
    (bucket / f"out{INSIDE}" / "mine.txt").write_text("x")
    assert code_of(lambda: call("merge", inputs, address("merge"))) == "LT-511"
    (bucket / "out.safetensors").write_bytes(b"x")
    for force, code in ((False, "LT-501"), (True, "LT-505")):
        assert code_of(lambda f=force: call("kohya", inputs, address("kohya"), force=f)) == code  # type: ignore[misc]
    assert objects("b") == {"out.safetensors": b"x", f"out{INSIDE}/mine.txt": b"x"}


def test_what_appears_during_the_run_stays(inputs: Path, bucket: Path) -> None:
    def appear(what: str, name: str) -> None:
        if what == "put":
            (bucket / "out").mkdir(exist_ok=True)
            (bucket / "out" / "mine.txt").write_text("x")

    Buckets.before.append(appear)
    assert code_of(lambda: call("merge", inputs, address("merge"))) == "LT-511"
    assert objects("b") == {"out/mine.txt": b"x"}


def test_a_later_run_takes_over(inputs: Path) -> None:
    """The earlier one stops; what it has uploaded serves the later one."""
    later: list[Any] = []

    def begin(what: str, name: str) -> None:
        if what == "pipe" and "/lines/" in name:
            Buckets.before.clear()
            later.append(call("merge", inputs, address("merge"), threads=1))

    Buckets.before.append(begin)
    assert code_of(lambda: call("merge", inputs, address("merge"), threads=1)) == "LT-503"
    until = time.monotonic() + 60
    while not later and time.monotonic() < until:
        time.sleep(0.01)
    assert later and stored("merge") == local(inputs, "merge")


def test_the_earlier_run_uploads_nothing_more(tmp_path: Path) -> None:
    """It stops at its next file, not at the end."""
    data = memoryview(b"weights")

    def make(output: Output, name: str) -> None:
        output.create(name).write_bytes(data)
        output.mark_finished(name, len(data))

    place = place_of(address("merge"))
    with pytest.raises(LoratoolError) as caught, open_output(
        place, Making(is_folder=True, plan_id="p", names=["a", "b", MARKER])
    ) as earlier:  # fmt: skip
        make(earlier, "a")
        earlier.finished_path("a")  # it is there
        with open_output(
            place, Making(is_folder=True, plan_id="p", names=["a", "b", MARKER])
        ) as later:
            assert list(later.finished) == ["a"]
            make(earlier, "b")
            with pytest.raises(LoratoolError):
                earlier.finished_path("b")
            assert stored("merge") == {"a": data}
            make(later, "b")
            later.commit({})
        earlier.commit({})
    assert caught.value.code == "LT-503" and is_whole(stored("merge"))


# ----------------------------------------------------------------------------- uploads that fail


@pytest.mark.parametrize("command", FORCED)
def test_an_upload_that_fails_once_is_tried_again(command: str, inputs: Path) -> None:
    for number in range(3):
        Buckets.before[:] = [Fail(number)]
        call(command, inputs, address(command), force=number > 0)
        assert stored(command) == local(inputs, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_upload_that_always_fails(command: str, inputs: Path, bucket: Path) -> None:
    Buckets.before[:] = [Fail(0, "put", always=True)]
    with pytest.raises(HubError) as caught:
        call(command, inputs, address(command))
    assert caught.value.code == "LT-740" and caught.value.exit_code == 7
    assert str(caught.value.file).startswith(address(command))
    assert "the store says no" in str(caught.value.got)
    assert not objects("b"), "what was begun is removed"


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_a_replacement_that_fails_half_way_can_be_ended(command: str, inputs: Path) -> None:
    """The old marker is gone by then: what says whose the rest is must stay."""
    call("extract", inputs, address(command))
    Buckets.before[:] = [Fail(2, "copy", always=True)]
    with pytest.raises(HubError):
        call(command, inputs, address(command), force=True)
    assert MARKER not in stored(command) and objects("b", f"out{INSIDE}")
    Buckets.before.clear()
    assert call(command, inputs, address(command)).output == address(command)
    assert objects("b") == {f"out/{k}": v for k, v in local(inputs, command).items()}


def test_an_output_that_is_whole_beside_its_notes(inputs: Path) -> None:
    """They could not be deleted; what comes next is not kept from the place by them."""
    Buckets.before[:] = [Fail(0, "rm", always=True)]
    report = call("merge", inputs, address("merge"))
    assert any("beside it something is left" in note for note in report.notes)
    assert stored("merge") == local(inputs, "merge") and objects("b", f"out{INSIDE}")
    Buckets.before.clear()
    call("extract", inputs, address("extract"), force=True)
    assert objects("b") == {f"out/{k}": v for k, v in local(inputs, "extract").items()}


def test_what_was_uploaded_serves_the_next_run(inputs: Path) -> None:
    Buckets.before[:] = [Fail(0, "put", always=True, part="-00003-")]
    with pytest.raises(HubError) as caught:
        call("merge", inputs, address("merge"), threads=1)
    assert "the same command goes on (2 files finished)" in str(caught.value.hint)
    assert not is_whole(stored("merge"))
    Buckets.before.clear()
    Buckets.log.clear()
    report = call("merge", inputs, address("merge"))
    assert "2 files taken over from an interrupted run" in report.notes
    names = [name for what, name in Buckets.log if what == "put"]
    assert [n for n in names if "model-" in n] == ["b/out/model-00003-of-00003.safetensors"]
    assert objects("b") == {f"out/{k}": v for k, v in local(inputs, "merge").items()}


@pytest.mark.parametrize("tags", [True, False])
def test_a_shard_that_was_damaged_since_is_made_again(
    inputs: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch, tags: bool
) -> None:
    monkeypatch.setattr(Buckets, "tags", tags)
    Buckets.before[:] = [Fail(0, "put", always=True, part="-00003-")]
    code_of(lambda: call("merge", inputs, address("merge"), threads=1))
    raw = bytearray((bucket / "out" / "model-00001-of-00003.safetensors").read_bytes())
    raw[-1] ^= 1
    (bucket / "out" / "model-00001-of-00003.safetensors").write_bytes(raw)
    Buckets.before.clear()
    report = call("merge", inputs, address("merge"))
    assert any("damaged since the interrupted run" in note for note in report.notes)
    assert stored("merge") == local(inputs, "merge")


def test_another_plan_needs_restart(inputs: Path) -> None:
    Buckets.before[:] = [Fail(0, "put", always=True, part="-00003-")]
    code_of(lambda: call("merge", inputs, address("merge"), threads=1))
    Buckets.before.clear()
    assert code_of(lambda: call("merge", inputs, address("merge"), dtype="bfloat16")) == "LT-504"
    call("merge", inputs, address("merge"), dtype="bfloat16", restart=True)
    assert is_whole(stored("merge")) and stored("merge") != local(inputs, "merge")
    assert not objects("b", f"out{INSIDE}")


def test_inputs_that_changed_since(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path / "copy")
    Buckets.before[:] = [Fail(0, "put", always=True, part="-00003-")]
    code_of(lambda: call("merge", tmp_path / "copy", address("merge"), threads=1))
    Buckets.before.clear()
    os.utime(tmp_path / "copy" / "base" / "model-00001-of-00003.safetensors", (1, 1))
    report = call("merge", tmp_path / "copy", address("merge"))
    assert any("inputs changed since" in note for note in report.notes)
    assert stored("merge") == local(inputs, "merge")


@pytest.mark.parametrize("times", [1, 9])
def test_what_arrives_damaged_is_sent_again(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Of the right size, but other bytes: the tag tells."""
    left, plain = [times], Buckets.put_file

    def put(self: Buckets, lpath: Any, rpath: Any, **how: Any) -> None:
        plain(self, lpath, rpath, **how)
        if left[0] and "00002" in str(rpath):
            left[0] -= 1
            place = Path(self._strip_protocol(rpath))
            raw = place.read_bytes()
            place.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    monkeypatch.setattr(Buckets, "put_file", put)
    if times == 1:
        call("merge", inputs, address("merge"))
        assert stored("merge") == local(inputs, "merge")
    else:
        assert code_of(lambda: call("merge", inputs, address("merge"))) == "LT-741"
        assert not is_whole(stored("merge"))


def test_tags_that_are_no_sums_of_the_content(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of encrypted objects look like an md5: then what was sent is read back."""
    plain = Buckets.info

    def info(self: Buckets, path: Any, **how: Any) -> dict[str, Any]:
        found = plain(self, path, **how)
        return {**found, "ETag": f'"{found["ETag"][1:-1][::-1]}"'} if "ETag" in found else found

    monkeypatch.setattr(Buckets, "info", info)
    call("merge", inputs, address("merge"))
    assert stored("merge") == local(inputs, "merge")


# ---------------------------------------------------------------------------- killed at any time


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_ends_at_any_moment(command: str, inputs: Path, bucket: Path) -> None:
    """From some change on nothing reaches the store any more; the next run makes it whole."""
    want, number, ended = local(inputs, command), 0, False
    while not ended:
        Buckets.before[:] = [Fail(number, always=True)]
        try:
            call(command, inputs, address(command), threads=1)
            ended = Buckets.before[0].seen <= number  # type: ignore[attr-defined]
        except LoratoolError:
            pass
        found = stored(command)
        assert found == want or MARKER not in found, f"{number}: half of it has a marker"
        Buckets.before.clear()
        if found != want:
            call(command, inputs, address(command), threads=1)
        else:
            assert code_of(lambda: call(command, inputs, address(command))) == "LT-501"
            if command in FORCED:
                call(command, inputs, address(command), force=True)
        assert objects("b") == {f"out{ending(command)}" + ("" if k == "." else f"/{k}"): v
                                for k, v in want.items()}, number  # fmt: skip
        shutil.rmtree(bucket)
        bucket.mkdir()
        number += 1
    assert number > 3


@pytest.mark.parametrize("command", ["merge", "extract", "kohya"])
def test_a_replacement_that_ends_at_any_moment(command: str, inputs: Path, bucket: Path) -> None:
    """The old one is whole until the new one is all there; then one of both, or neither."""
    want, number, ended, seen = local(inputs, command), 0, False, set()
    old = call("file" if ending(command) else "combine", inputs, address(command))
    assert old.output == address(command)
    before = stored(command)
    while not ended:
        shutil.rmtree(bucket)
        for name, data in before.items():
            place = bucket / f"out{ending(command)}" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        Buckets.before[:] = [Fail(number, always=True)]
        try:
            call(command, inputs, address(command), threads=1, force=True)
            ended = Buckets.before[0].seen <= number  # type: ignore[attr-defined]
        except LoratoolError:
            pass
        found = stored(command)
        state = "old" if found == before else "new" if found == want else "neither"
        assert state != "neither" or (MARKER not in found and not ending(command))
        seen.add(state)
        Buckets.before.clear()
        call(command, inputs, address(command), threads=1, force=True)
        assert objects("b") == {f"out{ending(command)}" + ("" if k == "." else f"/{k}"): v
                                for k, v in want.items()}, number  # fmt: skip
        number += 1
    assert seen >= {"old", "new"}


KILLED = """
import os, signal, sys
from tests.buckets import Buckets
from loratool.cli import run
def die(what, name):
    if what == "put" and "-00003-" in name:
        os.kill(os.getpid(), signal.SIGKILL)
Buckets.before.append(die)
sys.exit(run(sys.argv[1:]))
"""


def test_killed_between_shards(inputs: Path, tmp_path: Path) -> None:
    """By the system: what its spool held is swept away by the next run on that machine."""
    words = ["merge", str(inputs / "a1"), f"{inputs / 'a2'}:0.5", "--base", str(inputs / "base"),
             "-o", address("merge"), "--threads", "1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], check=False, capture_output=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "tmp").glob("loratool-spool-*"))
    assert not is_whole(stored("merge")) and "config.json" not in stored("merge")
    assert run(words) == 0
    assert objects("b") == {f"out/{k}": v for k, v in local(inputs, "merge").items()}


INTERRUPTED = """
import os, signal, sys, time
from tests.buckets import Buckets
from loratool.cli import main
def wait(what, name):
    if what == "put" and "-00003-" in name:
        os.kill(os.getpid(), int(os.environ["SENT"]))
        time.sleep(600)
Buckets.before.append(wait)
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_a_shard_is_under_way(
    number: int, code: int, inputs: Path, tmp_path: Path
) -> None:
    """Nobody waits for the upload to end."""
    words = ["merge", str(inputs / "a1"), f"{inputs / 'a2'}:0.5", "--base", str(inputs / "base"),
             "-o", address("merge"), "--threads", "1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words], check=False, capture_output=True, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "SENT": str(int(number))}, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert not is_whole(stored("merge")) and objects("b", f"out{INSIDE}")
    assert run(words) == 0
    assert objects("b") == {f"out/{k}": v for k, v in local(inputs, "merge").items()}


# ----------------------------------------------------------------------------------- refusals


def refusal(inputs: Path, out: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    exit_code = run(["merge", str(inputs / "a1"), "--base", str(inputs / "base"), "-o", out,
                     "--json"])  # fmt: skip
    said = capsys.readouterr()
    return exit_code, json.loads(said.out)["error"], said.out + said.err


def test_a_driver_that_is_missing(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    exit_code, error, _ = refusal(inputs, "gs://bucket/out", capsys)
    assert (exit_code, error["code"], error["hint"]) == (2, "LT-296", "pip install gcsfs")


def test_a_password_is_not_shown(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, error, text = refusal(inputs, "buckets://me:s3cret@b/out", capsys)
    assert (exit_code, error["code"]) == (2, "LT-264")
    assert "s3cret" not in text


def test_places_that_are_none(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for out, code in (("buckets://b", "LT-510"), ("buckets://b/../out", "LT-510"),
                      ("nowhere://b/out", "LT-602"),
                      ("hf://me/out", "LT-602"), ("buckets://none/out", "LT-602")):  # fmt: skip
        _, error, _ = refusal(inputs, out, capsys)
        assert error["code"] == code, out
    Buckets.before[:] = [Fail(0, always=True, error=PermissionError)]
    exit_code, error, _ = refusal(inputs, "buckets://b/out", capsys)
    assert (exit_code, error["code"]) == (6, "LT-603")
    assert Buckets.before[0].seen <= 2, "asking again is of no use"  # type: ignore[attr-defined]


def test_a_folder_here_of_such_a_name_wins(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "buckets:" / "b").mkdir(parents=True)
    call("combine", inputs, "buckets://b/out")
    assert (tmp_path / "buckets:" / "b" / "out" / MARKER).exists() and not objects("b")


def test_many_outputs_are_made_on_a_disk(inputs: Path, tmp_path: Path) -> None:
    both = [inputs / "a1", inputs / "a2"]
    assert code_of(lambda: lt.compress(both, rank=1, output="buckets://b/out/")) == "LT-602"
    steps = [{"merge": {"adapters": [str(inputs / "a1")], "base": str(inputs / "base"),
                        "output": "buckets://b/out"}}]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps}))
    assert code_of(lambda: lt.run(tmp_path / "recipe.yaml")) == "LT-292"
    assert not objects("b")


def test_an_undo_file_and_a_residual_beside_it(inputs: Path, tmp_path: Path) -> None:
    """Both read what was uploaded already."""
    for place, out in (("there", address("merge")), ("here", tmp_path / "out")):
        undo, rest = tmp_path / f"{place}-undo.safetensors", tmp_path / f"{place}-rest.safetensors"
        call("merge", inputs, str(out), save_undo=undo)
        call("extract", inputs, f"{out}-x", save_residual=rest)
    assert stored("merge") == local(inputs, "merge")
    for name in ("undo", "rest"):
        files = [tmp_path / f"{place}-{name}.safetensors" for place in ("there", "here")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_no_command_is_advised_that_would_read_it(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["merge", str(inputs / "a1"), "--base", str(inputs / "base")],
                  ["merge", str(inputs / "a1"), str(inputs / "a2")],
                  ["extract", str(inputs / "tuned"), "--base", str(inputs / "base")]):  # fmt: skip
        assert run([*words, "-o", "buckets://b/out", "--force"]) == 0
        said = capsys.readouterr()
        assert "loratool " not in said.out + said.err
