"""An object store for tests: a driver of fsspec's, of folders of this machine, with faults.

Objects appear whole or not at all, have tags, and cannot be appended to; buckets must exist.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

ROOT = "LORATOOL_TEST_BUCKETS"
"""Variable that names the folder whose folders are the buckets."""


class Buckets(LocalFileSystem):
    """``buckets://bucket/name``.

    Attributes:
        tags: a tag per object, as S3 has it.
        before: called with (what is done, name of the object) before it is done.
        log: the same, of all that was done.
        on_read: called with (name of the object, bytes about to be sent); what it returns is.
        reads: (name, first byte, number of bytes) of all that was sent.
    """

    protocol = "buckets"
    cachable = False
    tags: ClassVar[bool] = True
    before: ClassVar[list[Callable[[str, str], None]]] = []
    log: ClassVar[list[tuple[str, str]]] = []
    on_read: ClassVar[list[Callable[[str, bytes], bytes]]] = []
    reads: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        root, text = os.environ[ROOT], str(path)
        return text if text.startswith(root) else f"{root}/{text.removeprefix('buckets://')}"

    def _at(self, what: str, path: Any) -> Path:
        place = Path(self._strip_protocol(path))
        name = place.relative_to(os.environ[ROOT]).as_posix()
        self.log.append((what, name))
        for call in self.before:
            call(what, name)
        if not (Path(os.environ[ROOT]) / name.partition("/")[0]).is_dir():
            raise FileNotFoundError("The specified bucket does not exist")
        return place

    def _make(self, what: str, path: Any, data: bytes) -> None:
        place = self._at(what, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(os.environ[ROOT]) / f".{uuid.uuid4().hex}"
        part.write_bytes(data)
        part.replace(place)

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().info(path, **kwargs)
        plain = {key: found[key] for key in ("name", "size", "type")}
        if self.tags and plain["type"] == "file":
            plain["ETag"] = f'"{hashlib.md5(Path(plain["name"]).read_bytes()).hexdigest()}"'
        return plain

    def pipe_file(self, path: Any, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._make("pipe", path, value)

    def put_file(self, lpath: Any, rpath: Any, callback: Any = None, **_: Any) -> None:
        self._make("put", rpath, Path(lpath).read_bytes())

    def cat_file(self, path: Any, start: Any = None, end: Any = None, **_: Any) -> bytes:
        place = Path(self._strip_protocol(path))
        data, name = place.read_bytes()[start:end], place.relative_to(os.environ[ROOT]).as_posix()
        for call in self.on_read:
            data = call(name, data)
        self.reads.append((name, start or 0, len(data)))
        return data

    def get_file(self, rpath: Any, lpath: Any, callback: Any = None, **_: Any) -> None:
        Path(lpath).write_bytes(self._at("get", rpath).read_bytes())

    def cp_file(self, path1: Any, path2: Any, **_: Any) -> None:
        self._make("copy", path2, Path(self._strip_protocol(path1)).read_bytes())

    def rm_file(self, path: Any) -> None:
        self._at("rm", path).unlink()


fsspec.register_implementation("buckets", Buckets, clobber=True)


def objects(*parts: str) -> dict[str, bytes]:
    """Everything under a name: rest of the name -> content."""
    top = Path(os.environ[ROOT]).joinpath(*parts)
    found = (top, *top.rglob("*")) if top.exists() else ()
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in found if p.is_file()}
