"""A folder of stubs for remote files: small files whole, of weight files the header alone."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypedDict

from loratool.errors import UsageError
from loratool.frozen import replace
from loratool.location import RemoteFile
from loratool.shapes import fitting_json
from loratool.store.header import HARD_HEADER_BYTES
from loratool.store.pool import waiting_threads
from loratool.store.remote import append, check_content, fetch_whole, read_range
from loratool.store.stubs import list_stubs, make_stub_folder

THREADS = 8
FIRST_BYTES = 100_000
"""Read of a file whose header's length nothing tells; holds that of most adapters."""
LEAST_BYTES = 4096
"""`read_header` begins with so many: they tell what a file is that is no safetensors file."""
_MOST_BYTES = 1 << 20
_ENTRY_BYTES = 110
"""Of a tensor in a header, beside its name: dtype, shape, offsets and punctuation."""
_OWN_BYTES = 1024  # of the metadata
_GGUF_BYTES = 65_536


class RemoteFolder:
    """Stubs in a temporary folder, which goes away with this object.

    Attributes:
        path: the folder; paths in it are those in the repository or in the store.

    Args:
        name: ``hf://owner/name@commit``, or an address in a store, for messages.
        most_bytes: of configurations and headers, None = any number.
    """

    def __init__(self, name: str, most_bytes: int | None = None) -> None:
        self._left, self._most, self._lock = most_bytes, most_bytes, Lock()
        self._top = make_stub_folder()
        self.path = self._top.joinpath(*name.replace("://", "/").split("/"))
        self.path.mkdir(parents=True)
        self._stubs: dict[Path, RemoteFile] = {}
        self._late: dict[Path, RemoteFile] = {}
        weakref.finalize(self, shutil.rmtree, self._top, ignore_errors=True)

    def fill(
        self,
        weights: Sequence[RemoteFile],
        small: Sequence[RemoteFile],
        late: Iterable[RemoteFile] = (),
        named: Iterable[RemoteFile] = (),
    ) -> None:
        """Fetch what is needed, several files at a time.

        Args:
            weights: their headers are fetched.
            small: fetched whole.
            late: fetched whole if they are opened.
            named: only their names are of interest; nothing is fetched.

        Raises:
            LoratoolError: a file does not come, or not as it was listed.
            UsageError: LT-265, it would be more than may be read without consent.
        """
        self._spend(sum(f.size for f in small) + sum(min(f.size, FIRST_BYTES) for f in weights))
        for file in named:
            self._write(file, b"", is_stub=True)
        for file in late:
            self._late[self._write(file, b"")] = file
        self._late |= {self._place(file): file for file in small}
        with waiting_threads(THREADS) as pool:
            _each(pool, lambda f: fetch_whole(f, self._place(f)), small)
            first = _header_bytes(self.path)
            _each(pool, lambda f: self._fetch_header(f, first.get(f.name)), weights)
        list_stubs(self._top, self._stubs, self._late)

    def _spend(self, count: int) -> None:
        with self._lock:
            if self._left is None or self._most is None:
                return
            self._left -= count
            if self._left < 0:
                raise UsageError(
                    "LT-265", "fetching so much needs consent",
                    expected=f"at most {self._most / 1e6:.0f} MB without",
                    got=f"{(self._most - self._left) / 1e6:.0f} MB", hint="-y reads it",
                )  # fmt: skip

    def _place(self, file: RemoteFile) -> Path:
        path = self.path.joinpath(*file.name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, file: RemoteFile, data: bytes, *, is_stub: bool = False) -> Path:
        path = self._place(file)
        path.write_bytes(data)
        if is_stub:
            self._stubs[path] = file
        return path

    def _fetch_header(self, file: RemoteFile, expected: int | None) -> None:
        """In one request where the first guess holds the header, else in two."""
        file = replace(file, stub=self._place(file))
        if file.name.endswith(".gguf"):
            expected = _GGUF_BYTES
        guess = min(max(expected or FIRST_BYTES, LEAST_BYTES), _MOST_BYTES, file.size)
        data = read_range(file, 0, guess) if guess else b""
        if len(data) == file.size and file.digest:  # it is all here, and proven to be
            check_content(self._write(file, data), file)
            return
        length = 8 + int.from_bytes(data[:8], "little")
        is_header = data[8:9] == b"{" and length <= min(file.size, 8 + HARD_HEADER_BYTES)
        if is_header:
            data = data[: max(length, LEAST_BYTES)]
        # What is no safetensors file shows when it is read.
        path = self._write(file, data, is_stub=True)
        if is_header and length > len(data):
            self._spend(length - len(data))
            append(file, path, length)


def _each(
    pool: ThreadPoolExecutor, fetch: Callable[[RemoteFile], None], files: Sequence[RemoteFile]
) -> None:
    """All files, or the first error; what has not begun by then is dropped."""
    running = [pool.submit(fetch, file) for file in files]
    try:
        for one in running:
            one.result()
    finally:
        for one in running:
            one.cancel()


class _Index(TypedDict):
    weight_map: dict[str, str]


def _header_bytes(folder: Path) -> dict[str, int]:
    """Path of a shard -> bytes that its header takes, judged by the index's names."""
    found: Counter[str] = Counter()
    for index in folder.rglob("*.safetensors.index*.json"):
        content = fitting_json(index.read_bytes(), _Index)
        if content is None:
            continue  # a damaged index is refused, with its reason, when it is read
        where = index.parent.relative_to(folder)
        for tensor, shard in content["weight_map"].items():
            found[(where / shard).as_posix()] += len(json.dumps(tensor)) + _ENTRY_BYTES
    return {name: size + _OWN_BYTES for name, size in found.items()}
