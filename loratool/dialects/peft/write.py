"""Write PEFT folders: an adapter that is unchanged byte for byte, any other one anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, Source, TensorRef
from loratool.dialects.peft import own_config
from loratool.dialects.peft.keys import living_names, sort_tensors
from loratool.dialects.peft.methods import read_config
from loratool.dialects.peft.new import new_config
from loratool.dialects.peft.new_keys import NewLayout, new_tensors
from loratool.dialects.peft.read import read_tensors
from loratool.dialects.peft.tasks import heads_of
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError
from loratool.frozen import replace
from loratool.options.groups import Read

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


def write(
    adapter: Adapter,
    *,
    base_config: Mapping[str, Any] | None = None,
    base_tensors: Iterable[str] = (),
) -> AdapterFiles:
    """The files of an adapter in PEFT's form.

    An adapter that was read from PEFT and is unchanged gives its own tensors, metadata and
    configuration back, under names that PEFT finds.  Any other one gets a configuration that
    PEFT 0.21.2 loads without missing or unexpected keys.

    Args:
        adapter: read or made.
        base_config: the base's ``config.json``, for ``task_type``.
        base_tensors: in-memory names of the base's tensors: PEFT matches the ends of names, and
            only who knows them all can keep it from catching too much.

    Raises:
        MismatchError: LT-411, LT-412, PEFT cannot hold it.
    """
    unchanged = _unchanged_tensors(adapter)
    if unchanged is not None:
        return AdapterFiles(
            unchanged, dict(adapter.metadata), WEIGHTS_NAME, {CONFIG_NAME: adapter.config}
        )
    layout = NewLayout(adapter, base_tensors, heads_of(adapter, base_config))
    tensors = new_tensors(layout)
    # The order in which the safetensors library lays tensors out: wide types first, then by name.
    tensors.sort(key=lambda item: (-DTYPES[item[1].dtype].bits, item[0]))
    config = new_config(adapter, layout, base_config=base_config)
    _check_readable(adapter, tensors, config)
    return AdapterFiles(tuple(tensors), {"format": "pt"}, WEIGHTS_NAME, {CONFIG_NAME: config})


def _check_readable(
    adapter: Adapter, tensors: Iterable[tuple[str, Source]], config: Mapping[str, Any]
) -> None:
    """Nothing is written that the reader of this very dialect would refuse by name or value."""
    read_config(config, adapter.path)
    sort_tensors(TensorRef(adapter.path, key, s.dtype, s.shape, 0, s.nbytes) for key, s in tensors)


def read_back(files: AdapterFiles, path: Path) -> Adapter:
    """The adapter that these files hold, read from their names and configuration."""
    refs = [
        TensorRef(path / files.tensor_file, name, source.dtype, source.shape, 0, source.nbytes)
        for name, source in files.tensors
    ]
    json = files.json_files[CONFIG_NAME]
    config = read_config(json, None)
    return replace(
        read_tensors(refs, config, Read()), path=path, config=json,
        key_order=tuple(ref.name for ref in refs), layer_order=config.layer_order,
    )  # fmt: skip


def _unchanged_tensors(adapter: Adapter) -> tuple[tuple[str, Source], ...] | None:
    """The file's tensors in its order if reading them again gives the same adapter."""
    if not own_config(adapter):
        return None
    refs: dict[str, TensorRef] = {}
    for source in _sources(adapter):
        if not isinstance(source, TensorRef):
            return None
        refs[source.name] = source
    if set(refs) != set(adapter.key_order):
        return None
    ordered = [refs[name] for name in adapter.key_order]
    config = read_config(adapter.config, None)
    # Only the default reading: the file cannot say what the user said when it was opened.
    try:
        again = read_tensors(ordered, config, Read())
    except MismatchError:  # another rank than it states
        return None
    same = (
        again.specs == adapter.specs
        and again.replacements == adapter.replacements
        and config.layer_order == adapter.layer_order
    )
    if not same:
        return None
    return tuple(zip(living_names(adapter.key_order), ordered, strict=True))


def _sources(adapter: Adapter) -> Iterator[Source]:
    for spec in adapter.specs:
        yield from spec.fields.values()
    for replacement in adapter.replacements:
        yield replacement.source
    yield from (*adapter.unclaimed, *adapter.carried)
