"""``--allow-pickle``: pickles become temporary safetensors files, which then pass every check.

The pickle is opened in a process of its own (`loratool.engine.unpickle`) that has no secrets in
its environment and cannot open, write or start anything.  What comes back is only bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from loratool.errors import BadFileError, DiskError, UnsafeContentError
from loratool.frozen import replace
from loratool.store.contained import list_folder, open_inside
from loratool.store.jsonfile import dump_json, load_json
from loratool.store.layout import (
    check_shard_name,
    is_beside_name,
    is_pickle_name,
    is_state_name,
)
from loratool.store.source import Resolved

_PROGRAM = "loratool.engine.unpickle"
_INDEX = ".bin.index.json"
_APART = ".lora"  # after the name of a pickle: the change of a model that lies beside it
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
_SECONDS, _BYTES_PER_S = 120, 5_000_000  # start of torch, then the slowest disk
_COPY_BYTES = 1 << 20


def convert_pickles(source: Resolved, beside: Sequence[str]) -> Resolved:
    """The same source with its pickles converted; unchanged if safetensors files are there.

    The converted copy lies in a temporary folder that goes away with the returned object.

    Args:
        source: what was found.
        beside: files that go along with a lone pickle, besides a model's ``config.json``.

    Raises:
        UnsafeContentError: LT-905 the pickle asks for more than tensors, LT-906 this torch is too
            old for it, LT-907 processes cannot be limited on this system.
        BadFileError: LT-347, no pickle of tensors.
    """
    path = source.path
    pickles = list(_pickles(path))
    if not pickles:
        return source
    if os.name != "posix":
        raise UnsafeContentError(
            "LT-907", "pickles can be opened safely on Linux and macOS only", file=path
        )
    top = Path(tempfile.mkdtemp(prefix="loratool-pickle-"))
    try:
        made = _mirror(path, pickles, top, (*beside, "config.json"))
    except BaseException:
        shutil.rmtree(top, ignore_errors=True)
        raise
    converted = replace(source, path=made, origin=source.named)
    weakref.finalize(converted, shutil.rmtree, top, ignore_errors=True)
    return converted


def _pickles(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        if is_pickle_name(path.name):
            yield path
        return
    names = [entry.name for entry in list_folder(path) if not entry.name.startswith(".")]
    apart = [name for name in names if name.endswith(_APART) and is_pickle_name(name)]
    if apart:
        yield from (path / name for name in apart)
        return
    has_own = any(name.endswith(".safetensors") for name in names)
    for name in names:
        is_twice = _new_name(name) in names or (has_own and not is_beside_name(name))
        if is_pickle_name(name) and not is_state_name(name) and not is_twice:
            yield path / name


def _mirror(path: Path, pickles: list[Path], top: Path, beside: Sequence[str]) -> Path:
    """A copy of a folder (or of a file and its configuration) without pickles and code."""
    is_folder = path.is_dir()
    folder = top / (path.name or "model") if is_folder else top
    folder.mkdir(exist_ok=True)
    root = path if is_folder else path.parent
    others = list_folder(root) if is_folder else [root / name for name in beside]
    for entry in others:
        if entry in pickles or entry.suffix == ".py" or not entry.is_file():
            continue
        if entry.name.endswith(_INDEX):
            _convert_index(entry, folder)
        elif not is_pickle_name(entry.name):
            with open_inside(entry, root) as file, (folder / entry.name).open("wb") as copy:
                shutil.copyfileobj(file, copy)
    for one in pickles:  # last: what is wrong with the rest is seen before any of them is opened
        _convert(one, root, folder / _new_name(one.name))
    return folder if is_folder else folder / _new_name(path.name)


def _new_name(name: str) -> str:
    stem = name.removesuffix(_APART).rpartition(".")[0]
    return stem.replace("pytorch_model", "model", 1) + ".safetensors"


def _convert_index(index: Path, folder: Path) -> None:
    content = load_json(index)
    files = content.get("weight_map")
    if isinstance(files, dict):
        content["weight_map"] = {k: _new_name(check_shard_name(v, index)) for k, v in files.items()}
    stem = index.name.removesuffix(_INDEX).replace("pytorch_model", "model", 1)
    (folder / f"{stem}.safetensors.index.json").write_bytes(dump_json(content))


def _convert(source: Path, root: Path, target: Path) -> None:
    with open_inside(source, root) as file:
        size = os.fstat(file.fileno()).st_size
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM], stdin=file, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=target.parent, env=_environment(),
        )  # fmt: skip
    limit = 8 * size + (256 << 20)
    watchdog = threading.Timer(_SECONDS + size / _BYTES_PER_S, child.kill)
    watchdog.start()
    try:
        assert child.stdout is not None and child.stderr is not None
        with child.stdout, child.stderr, target.open("wb") as out:
            _copy(child.stdout.fileno(), out.fileno(), limit, source)
            errors = child.stderr.read(_COPY_BYTES)
        code = child.wait()
    except OSError as error:
        raise DiskError("LT-601", "cannot convert", file=source, got=error.strerror) from error
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
    if code != 0:
        _explain(source, code, errors)


def _environment() -> dict[str, str]:
    """Nothing secret; no GPU, one thread."""
    package = str(Path(__file__).parents[2])
    paths = [package, *(str(Path(p).absolute()) for p in sys.path if p)]
    kept = {k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ}
    return {
        **kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def _copy(source: int, target: int, limit: int, shown: Path) -> None:
    while part := os.read(source, _COPY_BYTES):
        limit -= len(part)
        if limit < 0:
            raise BadFileError("LT-347", "the pickle grows without end", file=shown)
        while part:
            part = part[os.write(target, part) :]


def _explain(source: Path, code: int, errors: bytes) -> NoReturn:
    """Turn the child's last line into an error."""
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    try:
        found = json.loads(last)
        kind, got = found["kind"], found.get("got")
    except (ValueError, KeyError, TypeError):
        kind, got = "damaged", f"exit code {code}"
    if kind == "blocked":
        raise UnsafeContentError(
            "LT-905", "the pickle asks for more than tensors: it may want to run code",
            file=source, expected="tensors and plain containers", got=got,
            hint="get the safetensors file",
        )  # fmt: skip
    if kind == "torch":
        raise UnsafeContentError(
            "LT-906", "this torch has known holes in its reading of pickles", file=source,
            expected=f"torch {found.get('expected')} or newer", got=got,
            hint="pip install -U torch",
        )  # fmt: skip
    raise BadFileError(
        "LT-347", "not a pickle of tensors", file=source,
        expected="a dictionary of name -> tensor", got=got,
    )  # fmt: skip
