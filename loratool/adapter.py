"""The neutral form of an adapter: what every dialect is read into and written from.

Plain data, no torch.  `TensorRef` says where bytes lie; `DeltaSpec` says what they mean; an
`Adapter` is a list of those plus whole replacement tensors.  Nothing here knows any dialect's
key names, and nothing above the dialects knows about alpha conventions: `DeltaSpec.scaling` is
the only factor the mathematics sees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool import kinds
from loratool.dtypes import numel, tensor_bytes
from loratool.frozen import Frozen, field, replace
from loratool.kind import Kind
from loratool.location import Location, path_of

MAX_ALPHA = 1e30  # far from overflow when it is multiplied with float32 factors

Bytes = tuple[Location, int, int]
"""(file, offset, length): bytes of a file."""

Stamp = tuple[int, int, int, int, int]
"""(device, inode, size, mtime, ctime in ns) of a file: differs if it changed or was replaced."""


class TensorRef(Frozen):
    """A tensor's bytes inside a file.

    Attributes:
        file: the file that holds it, here or on the Hub.
        name: its key in that file.
        dtype: safetensors spelling, a key of `loratool.dtypes.DTYPES`.
        shape: as stored.
        start: absolute offset of the first byte in the file.
        nbytes: length in bytes.
        stamp: of the file when its header was read; None for a file that loratool is writing.
        zeros: bytes at its end that are not in the file and read as zeros (a table that grows).
    """

    file: Location
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    stamp: Stamp | None = None
    zeros: int = 0

    @property
    def path(self) -> Path:
        """Its file on this machine; of one on the Hub the stub."""
        return path_of(self.file)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return numel(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Length in bytes of what is in the file."""
        return self.nbytes - self.zeros

    def ranges(self, start: int = 0, stop: int | None = None) -> tuple[Bytes, ...]:
        """(file, offset, length) of what is in files of the bytes from ``start`` to ``stop``."""
        stop = min(self.stored_bytes, self.stored_bytes if stop is None else stop)
        return ((self.file, self.start + start, stop - start),) if start < stop else ()

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors in files that it is read from."""
        return (self,)

    def grown(self, rows: int) -> TensorRef:
        """The same with rows of zeros after its own, ``rows`` in all."""
        shape = (rows, *self.shape[1:])
        nbytes = tensor_bytes(self.dtype, shape)
        return replace(self, shape=shape, nbytes=nbytes, zeros=nbytes - self.stored_bytes)


class CodedRef(TensorRef):
    """A weight that a file holds in codes, seen as the float32 numbers that they stand for.

    ``file`` and ``start`` are those of the codes; ``name``, ``shape`` and ``nbytes`` those of the
    plain weight.

    Attributes:
        codec: a row of `loratool.quant.CODECS`, or of another package.
        codes: the codes.
        scales: factors of the codes; None = they stand for themselves.
        block: (rows, columns) that one factor is for; rows of each matrix of a stack.
        others: what else decoding reads, by a word of the codec's.
        facts: what else the codec must know, by a word of its own.
        is_turned: the codes lie with the last two axes exchanged.
        is_kept: written in codes again, not as plain numbers.
    """

    codec: str = ""
    codes: TensorRef | None = None
    scales: TensorRef | None = None
    block: tuple[int, int] = (1, 1)
    others: tuple[tuple[str, TensorRef], ...] = ()
    facts: tuple[tuple[str, int | float | str], ...] = ()
    is_turned: bool = False
    is_kept: bool = False

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The codes, their factors and what else belongs to them."""
        beside = (ref for _, ref in self.others)
        return tuple(ref for ref in (self.codes, self.scales, *beside) if ref is not None)

    def other(self, word: str) -> TensorRef | None:
        """A tensor of `others`, None if there is none."""
        return dict(self.others).get(word)

    def fact(self, word: str) -> Any:
        """One of `facts`."""
        return dict(self.facts)[word]

    def ranges(self, start: int = 0, stop: int | None = None) -> tuple[Bytes, ...]:
        """As `TensorRef.ranges`; codes that are turned by whole matrices, what is beside whole."""
        assert self.codes is not None
        stop = self.nbytes if stop is None else stop
        if self.is_turned:
            each = 4 * numel(self.shape[-2:]) or 1
            start, stop = start // each * each, -(-stop // each) * each
        whole = 4 * numel(self.shape) or 1
        first, last = self.codes.nbytes * start // whole, -(-self.codes.nbytes * stop // whole)
        beside = (part for ref in self.stored[1:] for part in ref.ranges())
        return (*self.codes.ranges(first, last), *beside)


class ArrangedRef(TensorRef):
    """A tensor whose numbers a file holds in another order of their axes.

    ``shape`` is what is seen; `loratool.store.arranged` puts the numbers there.

    Attributes:
        laid: sizes of the axes as the file has them.
        axes: which of them comes first, second … here.
    """

    laid: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def ranges(self, start: int = 0, stop: int | None = None) -> tuple[Bytes, ...]:
        """As `TensorRef.ranges`; it is read whole whatever is asked for."""
        return ((self.file, self.start, self.nbytes),) if self.nbytes else ()


class JoinedRef(TensorRef):
    """A tensor whose rows lie in other tensors, one piece after another.

    ``file`` and ``start`` are where the first piece lies.

    Attributes:
        pieces: (tensor, first byte, bytes) in the order of the rows; all of one type.
    """

    pieces: tuple[tuple[TensorRef, int, int], ...] = ()

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors in files that its pieces are of."""
        return tuple(dict.fromkeys(ref for piece, _, _ in self.pieces for ref in piece.stored))

    def cut(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """(tensor, first byte, bytes) of what bytes ``start`` to ``stop`` are read from."""
        at = 0
        for ref, first, count in self.pieces:
            begin, end = max(start, at), min(stop, at + count)
            if begin < end:
                yield ref, first + begin - at, end - begin
            at += count

    def ranges(self, start: int = 0, stop: int | None = None) -> tuple[Bytes, ...]:
        """As `TensorRef.ranges`."""
        cut = self.cut(start, self.nbytes if stop is None else stop)
        return tuple(r for ref, first, count in cut for r in ref.ranges(first, first + count))


class TensorData(Frozen):
    """A tensor made in memory (a new factor), ready to be written.

    Attributes:
        name: a label for messages.
        dtype: safetensors spelling.
        shape: as it will be stored.
        data: little-endian, row-major bytes, ``nbytes`` long.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __reduce__(self) -> tuple[type[TensorData], tuple[str, str, tuple[int, ...], bytes]]:
        return TensorData, (self.name, self.dtype, self.shape, bytes(self.data))

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return numel(self.shape)


Source = TensorRef | TensorData


class DeltaSpec(Frozen):
    """One change of one parameter, described without its tensors.

    Attributes:
        kind: a row of `loratool.kinds.KINDS`: ``lowrank``, ``dora``, ``vector``.
        module: in-memory module path, without prefix and without the parameter name.
        parameter: the parameter that changes, ``weight``, ``bias``, ``in_proj_weight``,
            or the name of a bare parameter such as ``gate_up_proj``.
        fields: role -> tensor.  Roles are those of the kind's row; factors keep the PEFT
            orientation, lora_A (r, in…) and lora_B (out, r…).
        layout: how the factors lie on the target: ``linear`` (out, in), ``conv``
            (out, in, k…), ``embedding`` (always transposed), ``experts`` (flattened 3-D),
            ``vector``.
        rank: r (per expert for ``experts``); 0 for ``vector``.
        alpha: as the file says, None where it says nothing.
        scaling: resolved factor of lora_B @ lora_A.
        transposed: the configuration says that the target is stored (in, out)
            (``fan_in_fan_out``).  A hint: binding decides from the base.
        experts: number of experts E for ``experts``, else 0.
        alternatives: for a bare parameter whose name the key does not tell, the other
            parameter names that the configuration allows; binding checks them by shape.  ""
            stands for the module itself, which may be a parameter.
        base_change: what loading does to the base first: ``pissa``, ``olora``, ``kasa``, or "".
        blocks: (n, side) for block-diagonal factors, side ``A`` or ``B``; None otherwise.
        b_order: packing of the experts axis of lora_B, ``rank-major`` (PEFT) or ``expert-major``.
        is_bare: the parameter itself is adapted, whatever class its module has (PEFT's
            ``target_parameters``): lora_B @ lora_A lies on it as it is stored.
        settings: numbers and words of the kind that are no tensors.
    """

    kind: str
    module: str
    parameter: str
    fields: Mapping[str, Source]
    layout: str
    rank: int
    alpha: float | None
    scaling: float
    transposed: bool = False
    experts: int = 0
    alternatives: tuple[str, ...] = ()
    base_change: str = ""
    blocks: tuple[int, str] | None = None
    b_order: str = "rank-major"
    is_bare: bool = False
    settings: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Full in-memory parameter name."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def row(self) -> Kind:
        """What is known of its kind."""
        return kinds.row_of(self.kind)

    @property
    def is_matrix(self) -> bool:
        """True for a change of a weight, False for one of a bias."""
        return self.row.is_matrix

    @property
    def is_additive(self) -> bool:
        """True if W' - W does not depend on W, so that deltas may be added and scaled."""
        return self.is_fixed and not self.is_open

    @property
    def is_fixed(self) -> bool:
        """True if W' - W does not depend on the numbers in W, though it may on its size."""
        return self.row.is_additive and not self.base_change

    @property
    def has_factors(self) -> bool:
        """True if the change, as it is, is a product of two thin matrices."""
        return self.row.has_factors and not self.base_change and not self.is_open

    @property
    def is_pair(self) -> bool:
        """True if the fields are the two thin factors of the change."""
        return self.row.is_pair(self)

    @property
    def product_rank(self) -> int:
        """Rank of the product of the thin factors behind the change."""
        return self.row.product_rank(self)

    @property
    def scales_rows(self) -> bool:
        """True if rows of W are multiplied."""
        return self.row.scales_rows

    @property
    def reach(self) -> str:
        """What of W a block of the change depends on: ``block``, ``norms`` or ``all``."""
        return "all" if self.base_change else self.row.reach

    @property
    def is_apart(self) -> bool:
        """True if a product, or lengths of rows, are all that the change is with the base at hand.

        Then it can be taken apart there, added to others and put together again.
        """
        return self.is_fixed or self.row.scales_rows or bool(self.base_change)

    @property
    def is_open(self) -> bool:
        """True if its tensors do not say the size of the weight: it must be bound first."""
        return self.row.is_open(self)

    @property
    def is_sum(self) -> bool:
        """True if its elements are sums of products of stored numbers."""
        return not self.base_change and self.row.is_sum(self)

    @property
    def title(self) -> str:
        """The kind in words."""
        return self.base_change or self.row.title


class Replacement(Frozen):
    """A tensor, or rows of one, that takes the place of the base's.

    Attributes:
        name: in-memory tensor name, such as ``lm_head.weight``.
        source: the new values.
        origin: ``modules_to_save``, ``bias``, ``base_layer`` (read before a delta on the same
            weight is added), ``trainable_tokens``; rows of tokens that the base may lack:
            ``added_tokens`` by a list of them, ``new_tokens`` after all others.
        rows: for ``trainable_tokens`` the row indices replaced, in the order of the source's
            rows; None = the whole tensor.
    """

    name: str
    source: Source
    origin: str
    rows: tuple[int, ...] | None = None


class BesideFile(Frozen):
    """A file of trained weights in the adapter's folder that is not used.

    Attributes:
        name: in the folder.
        reason: why not.
        hint: what would make it used, "" if nothing does.
        rows: for new tokens, which merging into a base uses; named by the table that they are of,
            ``input_embeddings`` or ``output_embeddings``.
    """

    name: str
    reason: str
    hint: str = ""
    rows: tuple[Replacement, ...] = ()


class Adapter(Frozen):
    """An adapter in neutral form.

    Attributes:
        path: folder or file as the user named it.
        dialect: registry name of the dialect it was read in.
        specs: the deltas, in file order.
        replacements: whole tensors or rows that replace the base's.
        base_model: the base that the adapter names, None if it names none.
        config: the dialect's own configuration, verbatim (empty if it has none).
        metadata: the tensor file's string metadata.
        key_order: tensor names in file order, so that writing can reproduce the file.
        carried: tensors of the file that are read into numbers (alpha) or passed on untouched;
            written back with it.
        unclaimed: tensors with no meaning for merging that the dialect may legally hold
            (training-only state); reported, never dropped in silence.
        is_flat: its module names are flat: they are looked up when bound, never un-flattened.
        layer_order: layer_replication: base layer index for each layer of the adapter's model.
        notes: facts about the reading that a user should know, one sentence each.
        warnings: what may make the numbers other than the trained model's, one sentence each.
        extras: other files that belong to it (tokenizer, chat template): name in its folder ->
            where the file really lies.
        beside: files of trained weights in its folder that are not used.
    """

    path: Path
    dialect: str
    specs: tuple[DeltaSpec, ...]
    replacements: tuple[Replacement, ...] = ()
    base_model: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    key_order: tuple[str, ...] = ()
    unclaimed: tuple[TensorRef, ...] = ()
    carried: tuple[TensorRef, ...] = ()
    is_flat: bool = False
    layer_order: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    extras: Mapping[str, Path] = field(default_factory=dict)
    beside: tuple[BesideFile, ...] = ()

    @property
    def files_beside(self) -> tuple[str, ...]:
        """Other files of trained weights in its folder, by name."""
        carried = (name for name in self.extras if name.endswith(".safetensors"))
        return tuple(dict.fromkeys((*carried, *(b.name for b in self.beside))))

    def without_files(self, names: Collection[str]) -> Adapter:
        """The adapter less some of `files_beside`."""
        return replace(
            self, extras={name: path for name, path in self.extras.items() if name not in names},
            beside=tuple(b for b in self.beside if b.name not in names),
            notes=tuple(n for n in self.notes if n.partition(" ")[0] not in names),
        )  # fmt: skip

    @property
    def label(self) -> str:
        """Short name for tables: the last part of the path."""
        return self.path.name or str(self.path)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All of its tensors that lie in files, those of the changes first."""
        sources = (f for spec in self.specs for f in spec.fields.values())
        whole = (r.source for r in self.replacements)
        found = (ref for ref in (*sources, *whole) if isinstance(ref, TensorRef))
        return (*found, *self.carried, *self.unclaimed)


class AdapterFiles(Frozen):
    """An adapter as the files that a dialect writes.

    Attributes:
        tensors: (key, bytes) in file order.
        metadata: string metadata of the tensor file.
        tensor_file: name of the tensor file inside the output folder, "" where the output is that
            one file.
        json_files: file name -> object, written beside it (``adapter_config.json``).
        numbers: metadata of a GGUF file that are no texts; None = a safetensors file.
    """

    tensors: tuple[tuple[str, Source], ...]
    metadata: Mapping[str, str]
    tensor_file: str
    json_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: Mapping[str, float] | None = None
