"""Rows for tokens that training added, in a file of their own: ``new_embeddings.safetensors``.

vLLM up to 0.10 read it (tensors ``input_embeddings`` and ``output_embeddings``, row k for the k-th
token after the base's vocabulary); trainers that serve with vLLM write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratool.adapter import BesideFile, Replacement, TensorRef
from loratool.dtypes import DTYPES
from loratool.errors import list_some
from loratool.report.text import plural
from loratool.store.contained import find_inside
from loratool.store.tokens import TOKENIZER_STATE, added_ids, highest_id

_ADDED = "added_tokens.json"


def read_new_tokens(path: Path, tensors: Sequence[TensorRef]) -> BesideFile:
    """What a file of new rows means; without rows where that is not plain.

    Args:
        path: the file; the tokens are listed beside it.
        tensors: what it holds.
    """
    found = {ref.name: ref for ref in tensors}
    counts = {ref.shape[0] for ref in tensors if len(ref.shape) == 2}
    if not found or not found.keys() <= {"input_embeddings", "output_embeddings"}:
        return BesideFile(path.name, f"rows for new tokens under unknown names: {list_some(found)}")
    is_plain = all(len(r.shape) == 2 and DTYPES[r.dtype].is_mergeable for r in tensors)
    if not is_plain or len(counts) != 1 or 0 in counts:
        shapes = {f"{ref.name} {ref.dtype} {list(ref.shape)}" for ref in tensors}
        return BesideFile(path.name, f"rows for new tokens of unlike form: {list_some(shapes)}")
    count = counts.pop()
    try:
        origin, numbers = _numbers(path.parent, count)
    except ValueError as error:
        return BesideFile(path.name, f"rows for {plural(count, 'new token')}, but {error}")
    rows = tuple(Replacement(name, ref, origin, numbers) for name, ref in found.items())
    return BesideFile(path.name, "rows for new tokens, which only a merge puts in place", rows=rows)


def _numbers(folder: Path, count: int) -> tuple[str, tuple[int, ...] | None]:
    """(origin of the rows, numbers of their tokens): listed, as they must be, or not known."""
    files = _tokenizer(folder)
    if _ADDED in files:
        listed = added_ids(files[_ADDED])[-count:]
        if len(listed) < count or listed[-1] - listed[0] != count - 1:
            raise ValueError(f"{_ADDED} does not list as many, one after the other")
        return "added_tokens", tuple(listed)
    highest = highest_id(files)
    if highest is None:
        return "new_tokens", None
    return "new_tokens", tuple(range(highest[0] + 1 - count, highest[0] + 1))


def _tokenizer(folder: Path) -> Mapping[str, Path]:
    there = (folder / name for name in TOKENIZER_STATE)
    return {p.name: find_inside(p, folder)[0] for p in there if p.is_file()}
