"""What a hostile Hub answers while something is pushed, and what changes meanwhile."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from loratool.store import hub_http
from tests.hub.client import call, tree
from tests.hub_server import Fault, TestHub
from tests.hub_server import hostile as bad
from tests.hub_server.hostile import Answer, HostileHub
from tests.make import random_factors, save_adapter

MB = 1_000_000
WEIGHTS = "adapter_model.safetensors"
PUSH = ("push", "style", "me/style")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_http, "SILENCE_S", 1.0)
    monkeypatch.setattr(hub_http, "DRIP_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


@pytest.fixture
def style(tmp_path: Path) -> Path:
    factors = random_factors({"model.layers.0.q_proj": (512, 512)}, rank=16, seed=3)
    return save_adapter(tmp_path / "style", factors, base_model_name_or_path="org/base")


ROUTES = ["POST /api/repos/create", "POST /api/validate-yaml", "POST .*/preupload/",
          "POST .*/objects/batch", "POST .*/verify", "POST .*/commit/"]  # fmt: skip
BODIES = {
    "nothing": b"", "a page": b"<html>", "a list": b"[1,2]", "null": b"null", "a text": b'"x"',
    "a number": b"1", "deep": b"[" * 100_000, "other keys": b'{"a": 1}',
    "lists": b'{"files": [1], "objects": [1], "errors": 1, "url": 1, "commitOid": 1, "error": [1]}',
    "nulls": b'{"files": null, "objects": null, "url": null, "commitOid": null, "commitUrl": null}',
    "a commit that leads out":
        b'{"commitOid": "../../x", "commitUrl": "http://x/\\u001b[31m", "hookOutput": ""}',
}  # fmt: skip


@pytest.mark.thin(3)
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("route", ROUTES)
def test_answers_of_strange_forms(
    served: TestHub, tmp_path: Path, style: Path, route: str, body: bytes, status: int
) -> None:
    served.state.faults = [Fault(route, "status", status, 99, body=body)]
    code, text = call(served, tmp_path, *PUSH)
    assert code in (0, 7) and "LT-001" not in text and "\x1b" not in text, text
    assert code == 7 or route in ROUTES[:2] + ROUTES[4:5], text  # whose answers say nothing


def only(pattern: str, answer: Answer, hub: HostileHub) -> Answer:
    """Listings are honest, and so is an empty repository; one kind of request is not."""
    listing = json.dumps(hub.listing(siblings=[])).encode()

    def choose(handler: bad.Handler) -> None:
        name = handler.path_only.rpartition("/")[2]
        if handler.command == "GET":
            handler.say(listing)
        elif pattern in handler.path_only:
            answer(handler)
        elif "preupload" in handler.path_only:
            asked = json.loads(handler.body)["files"]
            rows = [{"path": f["path"], "uploadMode": "lfs", "shouldIgnore": False} for f in asked]
            handler.say(json.dumps({"files": rows, "commitOid": "b" * 40}).encode())
        elif "batch" in name:
            handler.say(json.dumps({"transfer": "basic", "objects": []}).encode())
        else:
            handler.say(b"{}")

    return choose


FLOODS: dict[str, Answer] = {
    "endless": bad.endless(), "chunks": bad.chunked, "an endless error": bad.endless(400),
    "a bomb": bad.text(bad.bomb(), Content_Encoding="gzip"),
    "drips": bad.dripping(b"x" * 999, 0.01),
    "headers": bad.dripping_headers(0.01), "just a moment": bad.informing,
    "to a file": bad.leading("file:///etc/passwd", 307), "in circles": bad.leading("/x", 307),
    "an hour": bad.text(b"", 429, Retry_After="3600"),
    "a limit": bad.text(b"", 429, RateLimit='"api";r=0;t=99999999'),
}  # fmt: skip


@pytest.mark.thin(3)
@pytest.mark.parametrize("answer", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("route", ["preupload", "validate-yaml", "batch"])
def test_floods(tmp_path: Path, style: Path, answer: Answer, route: str) -> None:
    start = time.monotonic()
    with HostileHub({}) as hub:
        hub.api = only(route, answer, hub)
        code, text = call(hub, tmp_path, "push", "style", "x/y")  # type: ignore[arg-type]
        assert code == 7 and "LT-001" not in text, text
        assert hub.server.sent < 60 * MB and time.monotonic() - start < 60


def test_the_token_stays_with_the_hub(tmp_path: Path, style: Path) -> None:
    """Where an upload goes, and where it is said to be complete, is for the Hub to say."""
    with HostileHub({}) as hub:
        elsewhere = hub.stranger.endpoint
        hub.stranger.answer = bad.text(b"{}")

        def batch(handler: bad.Handler) -> None:
            rows = [{**asked, "actions": {"upload": {"href": f"{elsewhere}/put"},
                                          "verify": {"href": f"{elsewhere}/verify"}}}
                    for asked in json.loads(handler.body)["objects"]]  # fmt: skip
            handler.say(json.dumps({"transfer": "basic", "objects": rows}).encode())

        hub.api = only("batch", batch, hub)
        code, text = call(hub, tmp_path, "push", "style", "x/y")  # type: ignore[arg-type]
        assert code == 7, text  # the commit is none
        assert {"PUT /put", "POST /verify"} <= set(hub.stranger.asked)
        assert hub.stranger.tokens == 0 < hub.server.tokens
        hub.api = bad.leading(f"{elsewhere}/x", 307)
        assert call(hub, tmp_path, "push", "style", "x/y")[0] == 7  # type: ignore[arg-type]
        assert hub.stranger.tokens == 0


# --- what is checked is what is sent ------------------------------------------------------------


def overwrite(path: Path) -> None:
    """Other bytes in the same file, at the same time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"otherone")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-8] + b"otherone")
    other.replace(path)


def link(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_bytes(path.read_bytes()[:-8] + b"otherone")
    path.unlink()
    path.symlink_to(secret)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.thin(2)
@pytest.mark.parametrize("moment", ["GET .*/revision/", "POST .*/preupload/", "POST .*/batch"])
@pytest.mark.parametrize("change", [overwrite, exchange, link, fifo, Path.unlink])
@pytest.mark.parametrize("parts", [None, 20_000], ids=["basic", "multipart"])
def test_weights_that_change_meanwhile(
    served: TestHub, tmp_path: Path, style: Path, monkeypatch: pytest.MonkeyPatch, moment: str,
    change: Callable[[Path], None], parts: int | None,
) -> None:  # fmt: skip
    """Nothing but the checked bytes leaves; what is in memory already may."""
    from loratool.store import hub_push

    served.state.part_bytes = parts
    for in_memory in (0, hub_push._IN_MEMORY):
        monkeypatch.setattr(hub_push, "_IN_MEMORY", in_memory)
        served.state.repos.clear()
        served.state.objects.clear()
        known = tree(style)
        fault = Fault(moment, "race", run=lambda: change(style / WEIGHTS))
        served.state.faults = [fault]
        code, text = call(served, tmp_path, *PUSH)
        assert fault.times == 0
        assert code in (0, 3, 9) and (code or in_memory), text
        sent = [bytes(d[:]) for d in served.state.objects.values()]
        assert not any(b"otherone" in data for data in sent)
        heads = [repo.commits[repo.branches["main"]] for repo in served.state.repos.values()]
        for head in heads:
            assert code == 0 or WEIGHTS not in head
            assert code or head[WEIGHTS] == known[WEIGHTS]
        (style / WEIGHTS).unlink(missing_ok=True)
        (style / WEIGHTS).write_bytes(known[WEIGHTS])


def test_small_files_are_sent_as_they_were(served: TestHub, tmp_path: Path, style: Path) -> None:
    (style / "LICENSE").write_text("free")
    known = tree(style)

    def change() -> None:
        for name in ("LICENSE", "adapter_config.json"):
            (style / name).write_text(json.dumps({"token": "hf_" + "A1b2" * 8}))

    served.state.faults = [Fault("GET .*/revision/", "race", run=change)]
    assert call(served, tmp_path, *PUSH)[0] == 0
    repo = served.state.repos["me/style"]
    head = repo.commits[repo.branches["main"]]
    assert {n: head[n] for n in known} == known
    served.state.check_no_tokens()
