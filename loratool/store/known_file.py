"""A file that gives the bytes that are known of it, or fails: for content that was checked."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

from loratool.location import changed
from loratool.store.checksum import hash_like
from loratool.store.contained import open_inside
from loratool.store.stamps import stamp_of

_BLOCK = 4 << 20
SHA256 = "0" * 64
"""Something that looks like one."""


class KnownFile(io.BufferedIOBase):
    """Content of any size, named by hashes of its blocks; readable as often as it stays the same.

    Nothing of it is held: not the content, and no open file.

    Args:
        path: the file.
        folder: what a link must stay in, see `open_inside`.

    Attributes:
        path: the file.
        size: bytes.
        moved: told how far the position moved, for progress bars.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self._folder = path, folder
        with open_inside(path, folder) as file:
            self.size = os.fstat(file.fileno()).st_size
        self._stamp = stamp_of(path)
        self._digests: dict[int, str] = {}  # digits -> hash of the whole
        self._hashes: list[bytes] = []  # of the blocks
        self._block: tuple[int, bytes] | None = None  # the one that was read last
        self._at = 0
        self.moved: Callable[[int], object] | None = None

    def digest(self, like: str) -> str:
        """Hash of the whole in the form of ``like``, see `digest_of`.

        Raises:
            BadFileError: LT-332, it is not what it was at first.
        """
        digits = len(like)
        if digits not in self._digests:
            whole = hash_like(like, self.size)
            for number in range(-(-self.size // _BLOCK)):
                whole.update(self._read_block(number))
            self.check_unchanged()
            self._digests[digits] = whole.hexdigest()
        return self._digests[digits]

    def check_unchanged(self) -> None:
        """Compare what the system says about the file with what it said at first.

        Raises:
            BadFileError: LT-332.
        """
        if self._stamp is None or stamp_of(self.path) != self._stamp:
            raise changed(self.path)

    def _read_block(self, number: int) -> bytes:
        """A block, which must be the same each time."""
        with open_inside(self.path, self._folder) as file:
            file.seek(number * _BLOCK)
            left, parts = min(_BLOCK, self.size - number * _BLOCK), []
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        data = b"".join(parts)
        made = hashlib.blake2b(data, digest_size=16).digest()
        if number == len(self._hashes):
            self._hashes.append(made)
        elif number > len(self._hashes) or self._hashes[number] != made:
            raise changed(self.path)
        return data

    # ---------------------------------------------------------------- as the client reads it

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._block = None
        self._go(max(0, start + offset))
        return self._at

    def _go(self, position: int) -> None:
        if self.moved is not None:
            self.moved(position - self._at)
        self._at = position

    def read(self, count: int | None = -1, /) -> bytes:
        """The next bytes, each compared with what is known.

        Raises:
            BadFileError: LT-332, they are others.
        """
        self.digest(SHA256)
        stop = self.size if count is None or count < 0 else min(self._at + count, self.size)
        found = bytearray()
        while self._at < stop:
            number, start = divmod(self._at, _BLOCK)
            if self._block is None or self._block[0] != number:
                self._block = (number, self._read_block(number))
            part = self._block[1][start : start + stop - self._at]
            if not part:
                raise changed(self.path)
            found += part
            self._go(self._at + len(part))
        return bytes(found)
