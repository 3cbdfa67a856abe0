"""Broken connections and killed processes: `pull` goes on where it ended, `push` loses nothing."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratool.store import hub_download, hub_http
from tests.hub.client import call, finish, run, start, tree
from tests.hub_server import Fault, Repo, TestHub
from tests.hub_server.state import Tree, git_sha
from tests.make import random_factors, save_adapter

WEIGHTS = "adapter_model.safetensors"
FILES: Tree = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
    WEIGHTS: random.Random(7).randbytes(3_000_001),
}
SIZE = len(FILES[WEIGHTS])
PULL = ("pull", "me/x", "-o", "out")


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        hub.state.add_repo("me/x", FILES)
        yield hub


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is asked of `time.sleep`; nobody sleeps."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of silence is long enough."""
    monkeypatch.setattr(hub_http, "SILENCE_S", 0.5)


def sent(hub: TestHub, path: str = "/cdn/") -> int:
    """Bytes of the answers to such requests."""
    return sum(size for where, size in hub.state.bodies if where.startswith(path))


def unnamed(home: Path) -> list[Path]:
    """What the Hub's cache holds of downloads that are not complete."""
    return [p for p in (home / "hf").rglob("blobs/*") if p.suffix == ".incomplete"]


def check_names(home: Path, whole: Tree) -> None:
    """Nothing partial under a final name, in the output and in the Hub's cache."""
    for path in (home / "out").rglob("*"):
        assert path.is_dir() or path.read_bytes() == whole[path.name], path
    for path in (home / "hf").rglob("blobs/*"):
        if path.suffix != ".incomplete":
            data = path.read_bytes()
            assert path.name in (hashlib.sha256(data).hexdigest(), git_sha(data)), path
    for path in (home / "hf").rglob("snapshots/*/*"):
        assert path.read_bytes() == whole[path.name], path


@contextmanager
def watched(home: Path, whole: Tree = FILES) -> Iterator[None]:
    """`check_names` again and again while something runs."""
    done, rounds, troubles = threading.Event(), [0], []

    def watch() -> None:
        while not done.wait(0.001):
            try:
                check_names(home, whole)
                rounds[0] += 1
            except FileNotFoundError:
                pass  # what was listed has got its final name
            except AssertionError as trouble:
                troubles.append(trouble)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert rounds[0] > 0 and not troubles, troubles


# --- downloads ----------------------------------------------------------------------------------


def cut(times: int = 1, action: str = "cut") -> Fault:
    return Fault("GET /cdn/", action, times=times)


def busy(status: int, **headers: str) -> Fault:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Fault("GET /cdn/", "status", status, headers=named)


@pytest.mark.parametrize(
    ("faults", "waits"),
    [
        ([cut(2)], [0.5, 1.0]),  # the first brings more than a mebibyte, the second less
        ([busy(503), cut(), busy(502), cut()], [0.5, 0.5, 1.0, 2.0]),
        ([cut(), busy(429, Retry_After="3"), busy(429)], [0.5, 3.0, 2.0]),
        ([cut(1, "hang"), cut()], [0.5, 1.0]),
    ],
    ids=["cut", "5xx", "429", "silence"],
)
def test_a_download_goes_on_where_it_broke(
    served: TestHub, tmp_path: Path, naps: list[float], faults: list[Fault], waits: list[float]
) -> None:
    served.state.faults = faults
    with watched(tmp_path):
        code, text = call(served, tmp_path, *PULL, HF_HUB_DOWNLOAD_TIMEOUT=0.5)
    assert code == 0, text
    assert tree(tmp_path / "out") == FILES
    assert naps == waits
    busy_bytes = 2 * sum(f.action == "status" for f in faults)  # "{}"
    assert sent(served) == SIZE + busy_bytes  # no byte moved twice
    assert not unnamed(tmp_path)


def test_a_download_that_breaks_again_and_again(
    served: TestHub, tmp_path: Path, naps: list[float]
) -> None:
    served.state.faults = [cut(99)]
    with watched(tmp_path):
        code, text = call(served, tmp_path, *PULL)
    assert code == 7 and "LT-720" in text and "goes on from there" in text
    assert naps == [0.5, 1.0, 2.0, 4.0]
    assert not (tmp_path / "out").exists()
    assert [p.stat().st_size for p in unnamed(tmp_path)] == [sent(served)]
    served.state.faults = []
    with watched(tmp_path):
        assert call(served, tmp_path, *PULL)[0] == 0
    assert tree(tmp_path / "out") == FILES
    assert sent(served) == SIZE and not unnamed(tmp_path)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy(
    served: TestHub, tmp_path: Path, naps: list[float], status: int
) -> None:
    served.state.faults = [cut(), *(busy(status) for _ in range(9))]
    code, text = call(served, tmp_path, *PULL)
    assert code == 7 and "LT-709" in text and str(status) in text
    assert naps == [0.5, 1.0, 2.0, 4.0] and not (tmp_path / "out").exists()
    before = sent(served)
    served.state.faults = []
    assert call(served, tmp_path, *PULL)[0] == 0
    # The server counts an answer once it is sent: the last "busy" may come to the count late.
    assert 0 <= sent(served) - before - (SIZE - SIZE // 2) < 100


def test_a_wait_beyond_all_patience_is_not_made(
    served: TestHub, tmp_path: Path, naps: list[float]
) -> None:
    served.state.faults = [busy(429, Retry_After="3600")]
    code, text = call(served, tmp_path, *PULL)
    assert code == 7 and "LT-709" in text and naps == []


@pytest.mark.parametrize("action", ["cut", "hang"])
def test_a_listing_that_breaks(
    served: TestHub, tmp_path: Path, naps: list[float], hasty: None, action: str
) -> None:
    served.state.faults = [Fault("GET /api/models/", action, times=2)]
    assert call(served, tmp_path, *PULL)[0] == 0
    assert naps == [0.5, 2.0]


@pytest.mark.parametrize("what", ["damaged", "longer", "whole", "shift"])
def test_what_an_interrupted_run_left_may_be_of_no_use(
    served: TestHub, tmp_path: Path, naps: list[float], what: str
) -> None:
    served.state.faults = [cut(99)]
    assert call(served, tmp_path, *PULL)[0] == 7
    (partial,) = unnamed(tmp_path)
    if what == "damaged":
        partial.write_bytes(b"x" + partial.read_bytes()[1:])
    elif what == "longer":
        partial.write_bytes(bytes(SIZE + 1))
    # The server may ignore the range, or send another one.
    served.state.faults = [Fault("GET /cdn/", what)]
    code, text = call(served, tmp_path, *PULL)
    assert code == 0, text
    assert tree(tmp_path / "out") == FILES and not unnamed(tmp_path)


def test_a_cached_file_that_is_damaged(served: TestHub, tmp_path: Path) -> None:
    """Of the same size or cut short: what is under a final name there is not trusted either."""
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    for data in (b"x" * SIZE, b"x" * 10):
        blob = next((tmp_path / "hf").rglob(f"snapshots/*/{WEIGHTS}")).resolve()
        blob.write_bytes(data)
        assert call(served, tmp_path, *PULL)[0] == 0
        assert tree(tmp_path / "out") == FILES
        assert blob.read_bytes() == FILES[WEIGHTS]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_killed_pull_goes_on(served: TestHub, tmp_path: Path, number: int, status: int) -> None:
    fault = cut(1, "hang")
    served.state.faults = [fault]
    with watched(tmp_path):
        process = start(served.endpoint, tmp_path, *PULL)
        assert fault.reached.wait(60)
        deadline = time.monotonic() + 30
        while not (unnamed(tmp_path) and unnamed(tmp_path)[0].stat().st_size == SIZE // 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        code, text = finish(process)
        assert code == status and "Traceback" not in text
    assert not (tmp_path / "out").exists()
    code, text = finish(start(served.endpoint, tmp_path, *PULL))
    assert code == 0, text
    assert tree(tmp_path / "out") == FILES
    assert sent(served) == SIZE and not unnamed(tmp_path)


def test_two_pulls_at_once_fetch_once(served: TestHub, tmp_path: Path) -> None:
    others = []

    def join() -> None:
        others.append(start(served.endpoint, tmp_path, "pull", "me/x", "-o", "other"))
        deadline = time.monotonic() + 60
        while served.state.requests["info"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1)  # to fetch, if it does not wait for the first

    served.state.faults = [Fault("GET /cdn/", "race", run=join)]
    code, text = call(served, tmp_path, *PULL)
    assert code == 0, text
    code, text = finish(others[0])
    assert code == 0, text
    assert tree(tmp_path / "out") == tree(tmp_path / "other") == FILES
    assert sent(served) == SIZE


def test_a_name_that_another_process_gave_stays(tmp_path: Path) -> None:
    """It is being read by that name: not for a moment may it be gone."""
    blob, name = tmp_path / "blob", tmp_path / "name"
    blob.write_bytes(b"x")
    name.symlink_to(blob)
    before = name.lstat()
    hub_download._link(blob, name)
    assert (name.lstat().st_ino, name.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    name.unlink()
    name.write_bytes(b"damaged")
    hub_download._link(blob, name)
    assert name.samefile(blob)


@pytest.mark.parametrize("name", ["../../../../evil.json", "a/../../b.json", "C:\\evil.json"])
def test_names_that_lead_out(served: TestHub, tmp_path: Path, name: str) -> None:
    served.state.add_repo("me/evil", {name: b"x"})
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    code, text = call(served, home, "pull", "me/evil", "--all", "-o", "out")
    assert code == 7 and "LT-721" in text
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name and p.is_file()]


# --- uploads ------------------------------------------------------------------------------------


@pytest.fixture
def style(tmp_path: Path) -> dict[str, bytes]:
    """A PEFT adapter of 2 MB in the folder ``style``."""
    shapes = {f"model.layers.{i}.q_proj": (1024, 1024) for i in range(8)}
    factors = random_factors(shapes, rank=32, seed=3)
    return tree(save_adapter(tmp_path / "style", factors, base_model_name_or_path="org/base"))


def head_of(repo: Repo) -> Tree:
    return {n: d for n, d in repo.commits[repo.branches["main"]].items() if n != ".gitattributes"}


def check_pushed(hub: TestHub, home: Path, name: str, files: dict[str, bytes]) -> None:
    """All files are on the Hub, in one commit, and come back byte for byte."""
    repo = hub.state.repos[name]
    assert len(repo.commits) == 2
    assert {n: d for n, d in head_of(repo).items() if n != "README.md"} == files
    code, text = call(hub, home, "pull", name, "--all", "-o", "back")
    assert code == 0, text
    back = tree(home / "back")
    assert {n: back[n] for n in files} == files


PUSH = ("push", "style", "me/style")


@pytest.mark.parametrize("parts", [None, 500_000], ids=["basic", "multipart"])
@pytest.mark.parametrize("action", ["cut-request", "hang-request", "status", "lose"])
def test_an_upload_that_breaks(
    served: TestHub, tmp_path: Path, style: dict[str, bytes], naps: list[float], hasty: None,
    action: str, parts: int | None,
) -> None:  # fmt: skip
    served.state.part_bytes = parts
    number = "/2$" if parts else "$"  # the second part, or the whole
    served.state.faults = [Fault(f"PUT /lfs/[0-9a-f]+{number}", action)]
    code, text = call(served, tmp_path, *PUSH)
    assert code == 0, text
    check_pushed(served, tmp_path, "me/style", style)
    size, oid = len(style[WEIGHTS]), hashlib.sha256(style[WEIGHTS]).hexdigest()
    half = 2 if action.endswith("-request") else 1
    if parts is None:
        assert uploaded(served, oid) == [size // half, size]
    else:  # one of the five parts went twice
        assert [uploaded(served, f"{oid}/{n}") for n in range(1, 6)] == [
            [parts], [parts // half, parts], [parts], [parts], [size - 4 * parts],
        ]  # fmt: skip
        assert served.state.requests["complete"] == 1


@pytest.mark.parametrize("parts", [None, 500_000], ids=["basic", "multipart"])
def test_an_upload_that_breaks_again_and_again(
    served: TestHub, tmp_path: Path, style: dict[str, bytes], naps: list[float], parts: int | None
) -> None:
    served.state.part_bytes = parts
    served.state.faults = [Fault("PUT /lfs/", "cut-request", times=99)]
    code, text = call(served, tmp_path, *PUSH, "-v")
    assert code == 7 and "LT-705" in text, text
    assert not head_of(served.state.repos["me/style"])
    served.state.faults = []
    assert call(served, tmp_path, *PUSH)[0] == 0
    check_pushed(served, tmp_path, "me/style", style)


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    """A checkpoint of two shards in the folder ``model``."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {}
    for i in (1, 2):
        data = struct.pack("<f", i) * 5000
        entry = {"dtype": "F32", "shape": [5000], "data_offsets": [0, len(data)]}
        head = json.dumps({f"w{i}": entry}).encode()
        name = shards[f"w{i}"] = f"model-0000{i}-of-00002.safetensors"
        (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + data)
    index = {"metadata": {"total_size": 40_000}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return tree(folder)


def uploaded(hub: TestHub, oid: str) -> list[int]:
    """Bytes of each attempt to upload an object."""
    return [size for path, size in hub.state.uploads if path == f"/lfs/{oid}"]


def test_a_killed_push_completes(served: TestHub, tmp_path: Path, model: dict[str, bytes]) -> None:
    done, broken = (
        hashlib.sha256(model[f"model-0000{i}-of-00002.safetensors"]).hexdigest() for i in (1, 2)
    )
    fault = Fault(f"PUT /lfs/{broken}", "hang-request")
    served.state.faults = [fault]
    process = start(served.endpoint, tmp_path, "push", "model", "me/m")
    assert fault.reached.wait(60)
    deadline = time.monotonic() + 30
    while done not in served.state.objects:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not head_of(served.state.repos["me/m"]) and broken not in served.state.objects
    code, text = finish(start(served.endpoint, tmp_path, "push", "model", "me/m"))
    assert code == 0, text
    check_pushed(served, tmp_path, "me/m", model)
    size = len(model["model-00001-of-00002.safetensors"])
    assert uploaded(served, done) == [size]  # what had arrived was not sent again
    assert uploaded(served, broken) == [size // 2, size]


def test_a_push_killed_before_it_hears_of_its_commit(
    served: TestHub, tmp_path: Path, style: dict[str, bytes]
) -> None:
    fault = Fault("POST .*/commit/", "hang")
    served.state.faults = [fault]
    process = start(served.endpoint, tmp_path, *PUSH)
    assert fault.reached.wait(60)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, text = call(served, tmp_path, *PUSH)
    assert code == 0 and "0 files sent" in text
    check_pushed(served, tmp_path, "me/style", style)


@pytest.mark.parametrize(("after", "code", "waits"), [("2", 0, [2.0]), ("3600", 7, [])])
def test_a_hub_that_is_too_busy_for_a_commit(
    served: TestHub, tmp_path: Path, style: dict[str, bytes], naps: list[float], after: str,
    code: int, waits: list[float],
) -> None:  # fmt: skip
    headers = {"Retry-After": after}
    served.state.faults = [Fault("POST .*/commit/", "status", 429, 1, headers)]
    found, text = call(served, tmp_path, *PUSH)
    assert found == code and naps == waits and (code == 0 or "LT-709" in text), text
    assert len(served.state.repos["me/style"].commits) == (2 if code == 0 else 1)


@pytest.mark.parametrize(("after", "code", "waits"), [("10", 0, [11.0]), ("3600", 7, [])])
@pytest.mark.parametrize("route", ["PUT /lfs/", "POST .*/preupload/", "POST .*/verify"])
def test_a_hub_that_is_too_busy_for_an_upload(
    served: TestHub, tmp_path: Path, style: dict[str, bytes], naps: list[float], route: str,
    after: str, code: int, waits: list[float],
) -> None:  # fmt: skip
    """The client waits as long as it is asked to (and a second), but not for ever."""
    served.state.faults = [Fault(route, "status", 429, 1, {"Retry-After": after})]
    found, text = call(served, tmp_path, *PUSH)
    assert found == code and naps == waits, text
    if code:
        assert "LT-709" in text and "3,600 s" in text
        assert not head_of(served.state.repos["me/style"])


def test_a_commit_that_landed_before_the_hub_got_busy(
    served: TestHub, tmp_path: Path, style: dict[str, bytes], naps: list[float]
) -> None:
    headers = {"Retry-After": "3600"}
    served.state.faults = [Fault("POST .*/commit/", "lose", 503, 1, headers)]
    code, text = call(served, tmp_path, *PUSH)
    assert code == 0 and naps == [], text
    check_pushed(served, tmp_path, "me/style", style)


def test_signed_addresses_are_not_shown(
    served: TestHub, tmp_path: Path, style: dict[str, bytes]
) -> None:
    """The client's warnings name the address of an upload; its signature lets anybody write."""
    served.state.signature = "?X-Amz-Signature=planted"
    served.state.faults = [Fault("PUT /lfs/", "status")]
    code, text = run(served, tmp_path, *PUSH, "-v")
    assert code == 0 and "503" in text and "PUT" in text, text
    assert "planted" not in text


@pytest.mark.parametrize("fault", ["GET /cdn/", "GET /me/x/resolve"])
def test_a_signal_while_the_hub_is_silent(served: TestHub, tmp_path: Path, fault: str) -> None:
    """Headers come in threads: none of them holds the end of the run up."""
    silence = Fault(fault, "hang", times=9)
    served.state.faults = [silence]
    process = start(served.endpoint, tmp_path, "inspect", "hf://me/x")
    assert silence.reached.wait(60)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, text = finish(process)
    assert code == 130 and "Traceback" not in text, text
    assert time.monotonic() - started < hub_http.SILENCE_S / 2
