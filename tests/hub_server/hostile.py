"""A Hub that means harm, and a stranger beside it who writes down whatever token comes along.

An answer is a function of the request's handler; it writes what it likes.  Who hangs up ends it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

from .state import git_sha, sha256

COMMIT = "a" * 40
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        self.path_only = unquote(urlsplit(self.path).path)
        hub = self.server
        hub.asked.append(f"{self.command} {self.path_only}")
        hub.tokens += "Authorization" in self.headers
        try:
            hub.answer(self)
        except OSError:  # the client has had enough
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        """A whole answer; underscores of header names are hyphens, and None leaves one out."""
        known = {"Content_Length": str(len(body)), "X_Repo_Commit": COMMIT, **headers}
        self.begin(status, **known)
        if self.command != "HEAD":
            self.write(body)

    def begin(self, status: int = 200, **headers: str | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.tokens, self.sent = answer, 0, 0
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HostileHub:
    """A repository ``x/y``, and what is said about it.

    Args:
        files: name -> content; the files are given honestly unless ``file`` says something else.

    Attributes:
        api: answers what is asked of ``/api/``.
        file: answers what is asked of files.
        stranger: another server, on another port.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.api: Answer = lambda h: h.say(json.dumps(self.listing()).encode())
        self.file: Answer = self.give
        self.state = SimpleNamespace(tokens_on_cdn=0)

    def __enter__(self) -> HostileHub:
        self.stranger = Server(self.give)
        self.server = Server(self._answer)
        self.endpoint = self.server.endpoint
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.server, self.stranger):
            server.shutdown()
            server.server_close()

    def _answer(self, handler: Handler) -> None:
        is_api = handler.path_only.startswith("/api/") or ".git/" in handler.path_only
        (self.api if is_api else self.file)(handler)

    def give(self, handler: Handler) -> None:
        """A file, honestly, or a part of it."""
        name = handler.path_only.partition("/resolve/")[2].partition("/")[2]
        data, wanted = self.files.get(name, b"evil"), handler.headers.get("Range")
        if wanted is None:
            return handler.say(data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        said = f"bytes {start}-{stop - 1}/{len(data)}"
        return handler.say(data[start:stop], 206, Content_Range=said)

    def row(self, name: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha(data)}
        if name.endswith(".safetensors"):
            found["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        return found

    def listing(self, *more: Any, **changes: Any) -> dict[str, Any]:
        """What an honest Hub says, with more files and other facts."""
        rows = [self.row(name, data) for name, data in self.files.items()]
        return {"_id": "1", "id": "x/y", "modelId": "x/y", "sha": COMMIT, "private": False,
                "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [*rows, *more], **changes}  # fmt: skip


# --- answers ------------------------------------------------------------------------------------


def text(body: bytes, status: int = 200, **headers: str) -> Answer:
    return lambda handler: handler.say(body, status, **headers)


def value(found: Any) -> Answer:
    return text(json.dumps(found).encode())


def endless(status: int = 200, piece: bytes = b" " * 65536, **headers: str | None) -> Answer:
    """Never the end of a body, as fast as it is read."""

    def answer(handler: Handler) -> None:
        handler.close_connection = True
        handler.begin(status, **headers)
        while True:
            handler.write(piece)

    return answer


def chunked(handler: Handler) -> None:
    """The same without a length."""
    handler.begin(Transfer_Encoding="chunked")
    while True:
        handler.write(b"10000\r\n" + b" " * 65536 + b"\r\n")


def dripping(body: bytes, pause: float, **headers: str | None) -> Answer:
    """A body byte by byte."""

    def answer(handler: Handler) -> None:
        handler.begin(Content_Length=str(len(body)), **headers)
        for at in range(len(body)):
            handler.write(body[at : at + 1])
            sleep(pause)

    return answer


def dripping_headers(pause: float) -> Answer:
    def answer(handler: Handler) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 60_000:
            handler.write(bytes([byte]))
            sleep(pause)

    return answer


def informing(handler: Handler) -> None:
    """ "Just a moment", for ever."""
    while True:
        handler.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        sleep(0.01)


def silent(handler: Handler) -> None:
    sleep(30)


def raw(data: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        handler.close_connection = True
        handler.write(data)

    return answer


def bomb(megabytes: int = 500) -> bytes:
    """Spaces, packed."""
    return gzip.compress(b" " * (1 << 20), 9) * megabytes


def leading(location: str, status: int = 302, body: bytes = b"") -> Answer:
    return lambda handler: handler.say(body, status, Location=location)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
