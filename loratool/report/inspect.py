"""What `loratool.inspect` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loratool.frozen import Frozen, field
from loratool.report.base import Loads, Report, plain_json
from loratool.report.told import Told

if TYPE_CHECKING:
    from loratool.report.look import AdapterLook
    from loratool.report.risk import RiskStatistics
    from loratool.report.spectrum import AdapterSpectrum


class TensorRow(Frozen):
    """One tensor of a file (``inspect --tensors``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TargetFamily(Frozen):
    """Deltas on modules of the same last name.

    Attributes:
        name: last part of the module path (``q_proj``).
        modules: how many.
        layers: layer numbers as ranges (``0-35``), "" if the paths have none.
        ranks: rank -> modules.
        parameters: elements of their factors.
    """

    name: str
    modules: int
    layers: str
    ranks: Mapping[int, int]
    parameters: int


class ReplacedTensor(Frozen):
    """A tensor that takes the place of the base's, and what it costs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    origin: str
    rows: int | None = None


class AdapterSummary(Frozen):
    """What an adapter's headers and configuration say.

    Attributes:
        label: short name.
        dialect: registry name of its dialect.
        dialect_title: how people call it.
        method: ``LoRA``, ``DoRA``, ``rsLoRA`` …
        base_model: the base that it names.
        modules: deltas.
        families: deltas by the last part of the module path.
        ranks: rank -> deltas.
        alphas: alpha as written (None = not written) -> deltas.
        scalings: resolved factor of lora_B @ lora_A -> deltas.
        factor_parameters: elements of the deltas' tensors.
        factor_bytes: their bytes.
        replaced_parameters: elements of replacement tensors.
        replaced_bytes: their bytes.
        dtypes: element type -> bytes.
        replaced: every replacement tensor.
        unclaimed: tensors that mean nothing for merging.
        extras: other files that belong to it.
        loads: which programs load it.
        metadata: string metadata of the tensor file.
        told: what the metadata say in words.
        spelled_by: the trainer that alone spells tensors in this way, "" if several do.
        kinds: changes by their kind in words.
        embeddings: words of embeddings that are bundled with it.
        family: of the model that it is for, with its size; "" where that is not known.
    """

    label: str
    dialect: str
    dialect_title: str
    method: str
    base_model: str | None
    modules: int
    families: tuple[TargetFamily, ...]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    scalings: Mapping[str, int]
    factor_parameters: int
    factor_bytes: int
    replaced_parameters: int
    replaced_bytes: int
    dtypes: Mapping[str, int]
    replaced: tuple[ReplacedTensor, ...] = ()
    unclaimed: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    loads: tuple[Loads, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    spelled_by: str = ""
    kinds: Mapping[str, int] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    family: str = ""

    @property
    def trainer(self) -> str:
        """The program that wrote it, "" if nothing tells."""
        return self.told.trainer or self.spelled_by

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.factor_parameters + self.replaced_parameters

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.factor_bytes + self.replaced_bytes


class CheckpointSummary(Frozen):
    """What a base checkpoint's headers and configuration say.

    Attributes:
        label: short name.
        model_type: of the configuration, or the architecture of a GGUF file, or "".
        shards: weight files.
        tensors: tensors.
        parameters: elements of float tensors; of a GGUF file, of all.
        nbytes: bytes of all tensors.
        dtypes: element type -> bytes.
        tied: the configuration ties the output head to the input embedding.
        quantization: method, None for plain weights.
        components: sub-folders of a pipeline.
    """

    label: str
    model_type: str
    shards: int
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    tied: bool
    quantization: str | None
    components: tuple[str, ...] = ()


class FolderRow(Frozen):
    """One file or sub-folder of a folder; one of ``adapter``, ``checkpoint``, ``error`` is set.

    Attributes:
        name: in the folder.
        same_as: name of the row that makes the same change under the shortest name
            (``--duplicates``), "" if none.
        same_how: how that was found: ``bytes``, ``tensors`` or ``numbers``.
    """

    name: str
    adapter: AdapterSummary | None = None
    checkpoint: CheckpointSummary | None = None
    error: Mapping[str, Any] | None = None
    same_as: str = ""
    same_how: str = ""


class InspectReport(Report):
    """Result of `loratool.inspect`.

    Attributes:
        source: as named.
        what: ``adapter``, ``checkpoint`` or ``folder``: which of the next three is filled.
        tensors: every tensor, if asked for.
        warnings: what will go wrong.
        notes: what is good to know.
        next: a command line to go on with.
        risk: statistics of an adapter's deltas, if asked for.
        spectrum: of ``--spectrum``.
        look: of ``--base``.
        sha256: of the tensor file, if asked for.
        hashes: entry of its metadata that is a hash -> whether it holds; likewise.
    """

    command: ClassVar[str] = "inspect"
    source: str
    what: str
    adapter: AdapterSummary | None = None
    checkpoint: CheckpointSummary | None = None
    rows: tuple[FolderRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next: str | None = None
    risk: RiskStatistics | None = None
    spectrum: AdapterSpectrum | None = None
    look: AdapterLook | None = None
    sha256: str = ""
    hashes: Mapping[str, bool] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types; statistics and spectrum with what sums them up."""
        found = super().to_json()
        for key in ("risk", "spectrum", "look"):
            if getattr(self, key) is None:
                del found[key]
        if self.risk is not None:
            found["risk"]["families"] = plain_json(self.risk.families)
        if self.spectrum is not None:
            found["spectrum"]["families"] = plain_json(self.spectrum.families)
            found["spectrum"]["total"] = plain_json(self.spectrum.total)
        return found
