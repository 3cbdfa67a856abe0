"""What a hostile Hub or mirror says: exit 7, soon, in little memory, and the token stays."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub import constants

from loratool.store import hub_download, hub_fetch, hub_http, hub_listing, remote_http
from tests.faults.fuzz.mutate import mutate_json
from tests.hub.client import call
from tests.hub_server import hostile as bad
from tests.hub_server.hostile import COMMIT, Answer, HostileHub
from tests.hub_server.state import git_sha
from tests.make import random_factors, save_adapter

MB = 1_000_000
WEIGHTS = "adapter_model.safetensors"
COMMANDS = [("inspect", "hf://x/y"), ("pull", "x/y", "-o", "out")]
Make = Callable[[HostileHub], Answer]


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    factors = random_factors({"model.layers.0.q_proj": (64, 64)}, rank=4, seed=1)
    folder = save_adapter(
        tmp_path_factory.mktemp("style") / "style", factors, base_model_name_or_path="org/base"
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(style: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileHub]:
    """With less patience, so that the tests take seconds."""
    monkeypatch.setattr(hub_http, "SILENCE_S", 1.5)
    monkeypatch.setattr(hub_http, "DRIP_S", 0.2)
    monkeypatch.setattr(remote_http, "_WAIT_S", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(time, "sleep", lambda _, nap=time.sleep: nap(0.01))
    with HostileHub(style) as found:
        yield found


def refused(hub: HostileHub, home: Path, *words: str) -> str:
    """What a command says that must fail because of the Hub, and leave nothing."""
    start = time.monotonic()
    code, text = call(hub, home, *words)  # type: ignore[arg-type]
    assert code == 7 and "LT-7" in text and "LT-001" not in text, text
    assert time.monotonic() - start < 60
    assert not (home / "out").exists()
    assert hub.server.sent < 60 * MB
    assert hub.stranger.tokens == 0
    assert "\x1b" not in text and "\x00" not in text
    return text


def test_an_honest_one(hub: HostileHub, tmp_path: Path) -> None:
    for words in COMMANDS:
        assert call(hub, tmp_path, *words)[0] == 0  # type: ignore[arg-type]


# --- listings -----------------------------------------------------------------------------------


def name(text: Any) -> Make:
    return lambda hub: bad.value(hub.listing({"rfilename": text, "size": 4, "blobId": "b" * 40}))


def change(**facts: Any) -> Make:
    return lambda hub: bad.value(hub.listing(**facts))


def change_row(**facts: Any) -> Make:
    def make(hub: HostileHub) -> Answer:
        found = hub.listing()
        found["siblings"][0] |= facts
        return bad.value(found)

    return make


def fixed(answer: Answer) -> Make:
    return lambda _: answer


def whole(hub: HostileHub) -> bytes:
    return json.dumps(hub.listing()).encode()


FORMS: dict[str, Make] = {
    "nothing": fixed(bad.text(b"")),
    "a web page": fixed(bad.text(b"<html>login</html>", Content_Type="text/html")),
    "a list": fixed(bad.value([1, 2])),
    "null": fixed(bad.value(None)),
    "a text": fixed(bad.value("x")),
    "no commit": change(sha=None),
    "half a commit": change(sha="abc"),
    "a commit that leads out": change(sha="../../../x"),
    "a commit of two lines": change(sha=COMMIT + "\n"),
    "files in a text": change(siblings="abc"),
    "files in an object": change(siblings={"a": 1}),
    "a file that is a number": change(siblings=[1]),
    "a name that is null": name(None),
    "a name that is a list": name(["a"]),
    "an empty name": name(""),
    "a name with NUL": name("a\0b.safetensors"),
    "a name with ESC": name("\x1b]0;evil\x07.json"),
    "a name of two lines": name("a\nb"),
    "a name with half a pair": fixed(bad.text(b'{"sha": "\\ud800"}')),
    "a name above": name("../../evil.json"),
    "a name above inside": name("a/../../evil.json"),
    "a name of the system": name("/etc/passwd"),
    "a dot": name("./x"),
    "a long name": name("x" * 2000),
    "a long part": name("ü" * 200 + ".json"),
    "a name twice": name(WEIGHTS),
    "a file that is a folder": name(f"{WEIGHTS}/x"),
    "a size in words": change_row(size="9"),
    "half a byte": change_row(size=1.5),
    "true bytes": change_row(size=True),
    "less than nothing": change_row(size=-1),
    "more than there is": change_row(size=10**30),
    "a hash that leads out": change_row(blobId="../../../x"),
    "a short hash": change_row(blobId="abc"),
    "a hash that is a number": change_row(blobId=7),
    "an LFS that is a text": change_row(lfs="x"),
    "an LFS hash that leads out": change_row(lfs={"sha256": "../" * 20}),
    "no hash anywhere": change_row(blobId=None, lfs=None),
    "deep data": fixed(bad.text(b'{"x":' + b"[" * 100_000)),
    "Latin-1": fixed(bad.text(b'{"sha": "\xff"}')),
    "two values": fixed(lambda h: h.say(b"{}{}")),
}  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=["inspect", "pull"])
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_listings_of_strange_forms(
    hub: HostileHub, tmp_path: Path, make: Make, words: tuple[str, ...]
) -> None:
    hub.api = make(hub)
    text = refused(hub, tmp_path, *words)
    assert "HF_ENDPOINT" in text


FLOODS: dict[str, Make] = {
    "endless": fixed(bad.endless()),
    "chunks without end": fixed(bad.chunked),
    "a length of a terabyte": fixed(bad.endless(Content_Length=str(10**12))),
    "a length that is too long": lambda hub: bad.text(whole(hub), Content_Length="99999"),
    "a length that is too short": lambda hub: bad.text(whole(hub), Content_Length="20"),
    "a length below zero": lambda hub: bad.text(whole(hub), Content_Length="-1"),
    "a length in words": lambda hub: bad.text(whole(hub), Content_Length="many"),
    "a length of digits": lambda hub: bad.text(whole(hub), Content_Length="9" * 5000),
    "a byte now and then": lambda hub: bad.dripping(whole(hub), 0.01),
    "headers byte by byte": fixed(bad.dripping_headers(0.01)),
    "headers without end": fixed(bad.raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000)),
    "just a moment": fixed(bad.informing),
    "silence": fixed(bad.silent),
    "no HTTP": fixed(bad.raw(b"SSH-2.0-OpenSSH\r\n")),
    "a bomb": fixed(bad.text(bad.bomb(), Content_Encoding="gzip")),
    "a bomb that nobody knows": fixed(bad.text(b"x", Content_Encoding="br")),
    "a million names": lambda hub: bad.value(
        hub.listing(*({"rfilename": f"{i}", "blobId": "b" * 40} for i in range(300_000)))
    ),
    "an endless error": fixed(bad.endless(500)),
    "an endless refusal": fixed(bad.endless(401)),
    "an endless redirect": fixed(bad.endless(302, Location="/api/x")),
}  # fmt: skip


@pytest.mark.parametrize("make", FLOODS.values(), ids=FLOODS)
def test_floods_of_listings(hub: HostileHub, tmp_path: Path, make: Make) -> None:
    hub.api = make(hub)
    refused(hub, tmp_path, "inspect", "hf://x/y")


STATUS: dict[str, Answer] = {
    "no content": bad.text(b"", 204), "not modified": bad.text(b"", 304),
    "a redirect to nowhere": bad.text(b"", 302), "bad request": bad.text(b"[1]", 400),
    "not found": bad.text(b"<html>", 404), "gone": bad.text(b"\xff", 410),
    "gated": bad.text(b"[]", 403, X_Error_Code="GatedRepo", X_Error_Message="\x1b[31m"),
    "an hour": bad.text(b"", 429, Retry_After="3600"),
    "a limit": bad.text(b"", 429, RateLimit='"api";r=0;t=99999999'),
    "a wish in words": bad.text(b"", 503, Retry_After="soon"),
    "a large wish": bad.text(b"", 503, Retry_After="9" * 400),
}  # fmt: skip


@pytest.mark.parametrize("answer", STATUS.values(), ids=STATUS)
def test_statuses(hub: HostileHub, tmp_path: Path, answer: Answer) -> None:
    hub.api = answer
    refused(hub, tmp_path, "inspect", "hf://x/y")


PLACES = ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "javascript:x", "//", "http://[",
          "http://127.0.0.1:1/x", "http://\x7f/", "http:///x"]  # fmt: skip


@pytest.mark.parametrize("place", [*PLACES, "/again"])
@pytest.mark.parametrize("what", ["api", "file"])
def test_redirects_to_bad_places(hub: HostileHub, tmp_path: Path, place: str, what: str) -> None:
    setattr(hub, what, bad.leading(place))
    for words in COMMANDS:
        refused(hub, tmp_path, *words)


def test_the_token_is_for_the_hub_alone(hub: HostileHub, tmp_path: Path) -> None:
    """A listing, a page of it, and files, each from somebody else."""
    stranger = hub.stranger.endpoint

    def to_the_stranger(handler: bad.Handler) -> None:
        handler.say(b"", 302, Location=stranger + handler.path)

    hub.file = to_the_stranger
    for words in COMMANDS:
        assert call(hub, tmp_path, *words)[0] == 0  # type: ignore[arg-type]
    assert hub.stranger.asked and hub.server.tokens
    shutil.rmtree(tmp_path / "out")
    hub.api, hub.stranger.answer = to_the_stranger, hub.api
    assert call(hub, tmp_path, "inspect", "hf://x/y")[0] == 0  # type: ignore[arg-type]
    hub.api = lambda h: h.say(
        b"[]" if "/tree/" in h.path else json.dumps(bare(hub)).encode(),
        Link=f'<{stranger}/api/models/x/y/tree/{COMMIT}?cursor=1>; rel="next"',
    )
    refused(hub, tmp_path, "inspect", "hf://x/y")
    assert hub.stranger.tokens == 0


def bare(hub: HostileHub) -> dict[str, Any]:
    """As a mirror lists that gives hashes in the tree alone."""
    return hub.listing(siblings=[{"rfilename": name} for name in hub.files])


@pytest.mark.parametrize("page", ["1", "{}"])
def test_pages_without_end(
    hub: HostileHub, tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_listing, "_MOST_PAGES", 20)
    tree = json.dumps([{"type": "directory", "path": "a"}]).encode()
    place = f"{hub.endpoint}/api/models/x/y/tree/{COMMIT}?cursor="
    hub.api = lambda h: h.say(
        tree if "/tree/" in h.path else json.dumps(bare(hub)).encode(),
        Link=f'<{place}{page.format(len(h.server.asked))}>; rel="next"',
    )
    refused(hub, tmp_path, "inspect", "hf://x/y")


# --- files --------------------------------------------------------------------------------------


def ranged(said: str) -> Answer:
    return bad.text(b"x" * 100, 206, Content_Range=said)


ANSWERS: dict[str, Answer] = {
    "endless": bad.endless(), "endless part": bad.endless(206, Content_Range="bytes 0-9/10"),
    "chunks without end": bad.chunked, "a bomb": bad.text(bad.bomb(), Content_Encoding="gzip"),
    "a byte now and then": bad.dripping(b"x" * 5000, 0.01),
    "headers byte by byte": bad.dripping_headers(0.01), "just a moment": bad.informing,
    "silence": bad.silent, "a web page": bad.text(b"<html>"), "nothing": bad.text(b""),
    "another part": ranged("bytes 5-9/10"), "a part in words": ranged("\x1b[31m"),
    "a part of much": ranged(f"bytes 0-{10**18}/{10**19}"), "no part": bad.text(b"", 416),
    "a length that is too long": bad.text(b"x", Content_Length="9999"),
    "an endless error": bad.endless(500), "an endless redirect": bad.endless(302, Location="/x"),
    "no HTTP": bad.raw(b"\x00" * 5000),
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("words", COMMANDS, ids=["inspect", "pull"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_answers_for_files(
    hub: HostileHub, tmp_path: Path, answer: Answer, words: tuple[str, ...]
) -> None:
    hub.file = answer
    refused(hub, tmp_path, *words)
    assert not [p for p in (tmp_path / "hf").rglob("blobs/*") if p.suffix != ".incomplete"]


@pytest.mark.parametrize("words", COMMANDS, ids=["inspect", "pull"])
@pytest.mark.parametrize("file", ["adapter_config.json", "config.json", "README.md"])
def test_small_files_that_are_not_small(
    hub: HostileHub, tmp_path: Path, file: str, words: tuple[str, ...]
) -> None:
    hub.files.pop(file, None)
    large = {"rfilename": file, "size": 1_500 * MB, "blobId": "b" * 40}
    hub.api = bad.value(hub.listing(large))
    if words[0] == "inspect" and file == "README.md":
        assert call(hub, tmp_path, *words)[0] == 0  # type: ignore[arg-type]
    else:
        assert "LT-727" in refused(hub, tmp_path, *words)
    assert not [line for line in hub.server.asked if line.endswith(f"/{file}")]


def test_very_many_files_need_consent(hub: HostileHub, tmp_path: Path) -> None:
    rows = [{**hub.row(f"{i}.safetensors", b"x"), "size": MB, "lfs": {"sha256": "c" * 64}}
            for i in range(2000)]  # fmt: skip
    hub.api = bad.value(hub.listing(siblings=rows))
    code, text = call(hub, tmp_path, "inspect", "hf://x/y")  # type: ignore[arg-type]
    assert code == 2 and "LT-265" in text
    assert len(hub.server.asked) < 10


# --- any listing at all -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_500_listings_with_something_wrong(
    hub: HostileHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Good enough, or an error of the Hub or for want of consent; never a bug."""
    random, said, is_tree = Random(seed), [b""], False
    tree = [{"type": "file", "path": n, "size": len(d), "oid": git_sha(d)}
            for n, d in hub.files.items()]  # fmt: skip

    @contextmanager
    def get(url: str, headers: Any = None, **_: Any) -> Iterator[Any]:
        rows = said[0] if "/tree/" in url or not is_tree else json.dumps(bare(hub)).encode()
        yield Response(url, rows, hub.files, headers or {})

    for module in (hub_http, hub_fetch, remote_http, hub_download):
        monkeypatch.setattr(module, "get", get)
    codes = Counter[int]()
    for turn in range(500):
        is_tree = turn % 5 == 0
        said[0] = mutate_json(json.dumps(tree if is_tree else hub.listing()).encode(), random)
        words = COMMANDS[0] if turn % 2 else ("pull", "x/y", "--dry-run")
        code, text = call(hub, tmp_path, *words)  # type: ignore[arg-type]
        assert code in (0, 2, 3, 7) and "LT-001" not in text, (said[0], text)
        assert "\x1b" not in text and "\u202e" not in text
        codes[code] += 1
    assert codes[7] > 100 and codes[0] > 20, codes


class Response:
    """A response as the client gives it: a listing, or a file of the repository."""

    def __init__(self, url: str, said: bytes, files: dict[str, bytes], wanted: Any) -> None:
        self.url, self.links = url, {}  # type: ignore[var-annotated]
        self.headers: dict[str, str] = {}
        self.status_code, self.is_error, self.data = 200, False, said
        if "/api/" not in url:
            self.data = files.get(url.rpartition("/")[2], b"evil")
            first, _, last = wanted.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = self.data[int(first) : int(last or len(self.data)) + 1]
            self.status_code, stop = 206, int(first) + len(part) - 1
            self.headers = {"Content-Range": f"bytes {first}-{stop}/{len(self.data)}"}
            self.data = part

    def iter_raw(self) -> Iterator[bytes]:
        yield self.data

    @property
    def request(self) -> Any:
        from huggingface_hub.utils import httpx

        return httpx.Request("GET", self.url)
