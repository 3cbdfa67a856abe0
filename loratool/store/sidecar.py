"""The small files that go along with merged weights: configuration, tokenizer, licence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Stamp
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen
from loratool.lazy import regex
from loratool.shapes import fitting_json
from loratool.store.contained import find_inside, list_folder, open_inside
from loratool.store.jsonfile import dump_json, load_json
from loratool.store.stamps import check_stamp, stamp_of
from loratool.store.stubs import bring
from loratool.store.tokens import TEMPLATES, TOKENIZER_FILES

if TYPE_CHECKING:
    from loratool.store.checkpoint import Checkpoint
    from loratool.store.staging import Output


class _Remove:
    """The value of a configuration change that takes the key out."""

    def __repr__(self) -> str:
        return "REMOVE"


REMOVE = _Remove()


class _Module(Frozen):
    path: str = ""


_CARRIED = (
    "config.json",
    "*_config.json",
    "config_*.json",
    "configuration.json",
    "model_index.json",
    "modules.json",
    "normalizer.json",
    "id2label.json",
    *TOKENIZER_FILES,
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
# They describe an adapter, or quantised codes that the output does not hold.
_REFUSED = (
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "*.py",
)
_WEIGHTS = regex(r"\.safetensors$|\.safetensors\.index(\.\w+)?\.json$")


class Sidecar(Frozen):
    """One small file of the output.

    Attributes:
        name: path relative to the output folder, with forward slashes.
        source: the file to copy, no link; None if ``data`` is given.
        stamp: of the source when this was planned.
        data: bytes made here.
        origin: where it is from, ``base`` or ``adapter``.
    """

    name: str
    source: Path | None = None
    stamp: Stamp | None = None
    data: bytes = b""
    origin: str = "base"

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.data) if self.stamp is None else self.stamp[2]

    def write_to(self, output: Output) -> None:
        """Write it, or copy it in pieces.

        Raises:
            BadFileError: LT-332, the source is not what it was when this was planned.
            DiskError: the system refuses.
        """
        if self.source is None or self.stamp is None:
            output.write_file(self.name, self.data)
            return
        stamp = (bring(self.source, whole=True) and stamp_of(self.source)) or self.stamp
        check_stamp(self.source, stamp)
        output.copy_file(self.name, self.source)
        check_stamp(self.source, stamp)


def plan_sidecars(
    checkpoint: Checkpoint,
    *,
    settle: Callable[[dict[str, Sidecar]], list[str]] | None = None,
    config_changes: Mapping[str, Any] | None = None,
) -> tuple[list[Sidecar], list[str]]:
    """Decide which small files go along with a merged checkpoint.

    Args:
        checkpoint: the base.
        settle: may put other files in the place of the base's, by name; returns notes.
        config_changes: dotted key of ``config.json`` -> new value, or `REMOVE`; for a pipeline
            the first part of the key names the component.

    Returns:
        The files, sorted by name, and notes about what is left behind.

    Raises:
        UnsafeContentError: a file to carry over is a link out of its folder, or no file.
        MismatchError: a dotted key leads through something that is no object.
        BadFileError: ``config.json`` is damaged.
    """
    changes = dict(config_changes or {})
    if not checkpoint.is_folder:
        lost = [f"not recorded, because the output has no config.json: {list_some(changes)}"]
        return [], lost if changes else []
    found: dict[str, Sidecar] = {}
    left: list[str] = []
    weights = {shard.name for shard in checkpoint.shards}
    for name in _walk(checkpoint):
        if name in weights or (_WEIGHTS.search(name) and "/" not in name):
            continue
        if _WEIGHTS.search(name) and checkpoint.components:
            continue
        leaf = name.rpartition("/")[2]
        if is_carried(leaf) or _is_template(name) or (leaf and _WEIGHTS.search(name)):
            found[name] = Sidecar(name, *find_inside(checkpoint.path / name, checkpoint.path))
        else:
            left.append(name)
    notes = _left_behind(left)
    if settle is not None:
        notes += settle(found)
    notes += _apply_changes(found, changes, checkpoint)
    return [found[name] for name in sorted(found)], notes


def _walk(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the files that may matter; a trailing slash marks a folder not looked into."""
    wanted = {TEMPLATES}
    index = checkpoint.path / "model_index.json"
    if checkpoint.components and index.is_file():
        wanted |= set(load_json(index))
    wanted |= _sentence_modules(checkpoint.path)
    root = checkpoint.path
    for entry in list_folder(root):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield entry.name
        elif entry.name not in wanted:
            yield f"{entry.name}/"
        else:
            for inner in list_folder(entry, root):
                if inner.is_dir() and inner.name == TEMPLATES:
                    templates = list_folder(inner, root)
                    yield from (f"{entry.name}/{TEMPLATES}/{t.name}" for t in templates)
                elif not inner.name.startswith("."):
                    yield f"{entry.name}/{inner.name}" + ("/" if inner.is_dir() else "")


def _sentence_modules(folder: Path) -> set[str]:
    """Sub-folders of a sentence-transformers model (``1_Pooling``), by its ``modules.json``."""
    path = folder / "modules.json"
    if not path.is_file() or path.stat().st_size > 1_000_000:
        return set()
    with open_inside(path, folder) as file:
        modules = fitting_json(file.read(1_000_000), list[_Module]) or []
    return {m.path for m in modules if "/" not in m.path and m.path not in ("", ".", "..")}


def is_carried(name: str) -> bool:
    """True for the names of small files that programs need beside a model's weights."""
    return is_like(name, _CARRIED) and not is_like(name, _REFUSED)


def is_like(name: str, patterns: Sequence[str]) -> bool:
    """True for a name that is one of the patterns or fits one, as shells match them."""
    return name in patterns or any("*" in p and fnmatchcase(name, p) for p in patterns)


def _is_template(name: str) -> bool:
    return f"/{name}".find(f"/{TEMPLATES}/") >= 0 and name.endswith(".jinja")


def _left_behind(names: list[str]) -> list[str]:
    code = [n for n in names if n.endswith(".py")]
    rest = [n for n in names if n not in code and n != "loratool.json"]  # each output has its own
    notes = []
    if code:
        notes.append(f"custom code is not copied: {list_some(code, 50)}")
    if rest:
        notes.append(f"not carried over: {list_some(rest, 50)}")
    return notes


def _apply_changes(
    found: dict[str, Sidecar], changes: Mapping[str, Any], checkpoint: Checkpoint
) -> list[str]:
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        component, _, rest = key.partition(".")
        if checkpoint.components:
            grouped.setdefault(f"{component}/config.json", {})[rest] = value
        else:
            grouped.setdefault("config.json", {})[key] = value
    notes = []
    for name, part in sorted(grouped.items()):
        if name not in found:
            notes.append(f"not recorded, because there is no {name}: {list_some(part)}")
            continue
        path = checkpoint.path / name
        config = load_json(path, folder=checkpoint.path)
        if _change(config, part, path):
            found[name] = Sidecar(name, data=dump_json(config))
    return notes


def _change(config: dict[str, Any], changes: Mapping[str, Any], path: Path) -> bool:
    """Apply dotted changes in place; True if anything is different afterwards."""
    changed = False
    for key, value in changes.items():
        *parents, last = key.split(".")
        holder = config
        for parent in parents:
            inner = holder.setdefault(parent, {}) if value is not REMOVE else holder.get(parent)
            if inner is None:
                break
            if not isinstance(inner, dict):
                raise MismatchError(
                    "LT-492", "cannot change the configuration", file=path, key=key,
                    expected=f"an object at {parent}", got=type(inner).__name__,
                )  # fmt: skip
            holder = inner
        else:
            changed |= _set(holder, last, value)
    return changed


def _set(holder: dict[str, Any], key: str, value: Any) -> bool:
    if value is REMOVE:
        return holder.pop(key, REMOVE) is not REMOVE
    same = key in holder and holder[key] == value and type(holder[key]) is type(value)
    holder[key] = value
    return not same
