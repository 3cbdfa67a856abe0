"""A file of an output in an object store that another machine makes and uploads by itself."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.frozen import Frozen
from loratool.store.checksum import Piece
from loratool.store.object_store import ObjectStore
from loratool.store.shard_writer import ShardWriter
from loratool.store.spool import Spool


class Made(Frozen):
    """What became of it.

    Attributes:
        size: in bytes.
        sums: checksums of its pieces.
        tag: of its object.
    """

    size: int
    sums: tuple[Piece, ...]
    tag: str


class FarFile:
    """A weight file under construction where its worker is; can be pickled until it is begun.

    Args:
        store: where it goes.
        name: of its object.
        header: its first bytes.
        size: of the whole, in bytes.
        starts: where each tensor begins.
    """

    def __init__(
        self, store: ObjectStore, name: str, header: bytes, size: int, starts: Sequence[int]
    ) -> None:
        self._args = (store, name, header, size, starts)
        self._spool: Spool | None = None
        self._writer: ShardWriter | None = None

    def __reduce__(
        self,
    ) -> tuple[type[FarFile], tuple[ObjectStore, str, bytes, int, Sequence[int]]]:
        return FarFile, self._args

    def begin(self) -> list[FarPart]:
        """Make the file here; the places of its tensors."""
        _, _, header, size, starts = self._args
        self._spool = Spool()
        self._writer = ShardWriter(self._spool.path / "file", header, size)
        return [FarPart(self._writer, start) for start in starts]

    def end(self) -> Made:
        """Upload it, complete.

        Raises:
            DiskError, HubError: see `ObjectStore.put`.
        """
        assert self._writer is not None
        store, name, *_ = self._args
        self._writer.finish()
        sums = self._writer.pieces()
        return Made(self._writer.size, tuple(sums), store.put(name, self._writer.path, sums).tag)

    def close(self) -> None:
        """Leave nothing here."""
        if self._writer is not None:
            self._writer.close()
        if self._spool is not None:
            self._spool.close()


class FarPart:
    """A tensor's place in a file, see `loratool.engine.step.Out`.

    Attributes:
        start: where it begins.
    """

    def __init__(self, writer: ShardWriter, start: int) -> None:
        self._writer, self.start = writer, start

    def put(self, offset: int, data: memoryview, aligned: bool) -> None:
        """Write at an absolute offset of the file."""
        self._writer.put(offset, data, aligned)

    def pieces(self) -> tuple[Piece, ...]:
        """None: the file's own writer takes them."""
        return ()
