"""A source on the Hub: cached, downloaded, or read where it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loratool.errors import HubError, UsageError
from loratool.store import hub
from loratool.store.hub_files import adapter_files, base_files
from loratool.store.hub_listing import list_commit
from loratool.store.look import Looked, look

ASK_BYTES = 1_000_000_000  # a larger download of a base needs consent


@dataclass(frozen=True)
class HubReference:
    """``hf://owner/name[@revision][/sub/path]``, taken apart.

    Attributes:
        repo_id: ``owner/name``.
        revision: decoded; None = the default branch.
        sub: path inside the repository, "" for its root.
    """

    repo_id: str
    revision: str | None
    sub: str = ""


@dataclass(frozen=True)
class Reach:
    """How the Hub may be used.

    Attributes:
        offline: make no connection; cached copies serve.
        yes: consent to a large download.
        in_place: fetch headers alone; tensors are read from the Hub when they are needed.
    """

    offline: bool = False
    yes: bool = False
    in_place: bool = False


def fetch(reference: HubReference, kind: str, reach: Reach) -> tuple[Looked, str | None]:
    """Bring a source within reach.

    Args:
        reference: what was asked for.
        kind: ``adapter``, ``base`` or ``any``.
        reach: how the Hub may be used.

    Returns:
        Where the files are, and why a cached copy was taken instead of asking the Hub.

    Raises:
        HubError: the Hub does not give it, and there is no cached copy.
        UsageError: LT-265, a large download without consent.
    """
    repo, revision = reference.repo_id, reference.revision
    if hub.is_offline(reach.offline):
        return _cached(reference), None
    try:
        if reach.in_place:
            listing = list_commit(repo, revision)
        else:
            files = hub.list_files(repo, revision, allow_patterns=_patterns(kind, reference.sub))
    except HubError as error:
        if error.code not in ("LT-705", "LT-709"):  # the Hub answered: a cached copy is no answer
            raise
        try:
            return _cached(reference), f"a cached copy, because {error.what}"
        except HubError:
            raise error from None
    if reach.in_place:
        return look(listing, kind=kind, sub=reference.sub), None
    return _download(reference, files, kind, reach.yes), None


def _cached(reference: HubReference) -> Looked:
    """What the Hub's cache holds; whether it is complete shows when it is opened."""
    marks = ("adapter_config.json", "config.json", "model_index.json")  # only these must be there
    repo, revision = reference.repo_id, reference.revision
    return Looked(*hub.snapshot(repo, revision, allow_patterns=marks, offline=True))


def _download(
    reference: HubReference, files: Sequence[hub.RemoteFile], kind: str, yes: bool
) -> Looked:
    repo = reference.repo_id
    choose = base_files if kind == "base" else adapter_files
    wanted = choose([f.name for f in files], reference.sub)
    if not wanted:
        raise HubError(
            "LT-704", f"the repository holds no {kind}" + (" there" if reference.sub else ""),
            file=repo, key=reference.sub or None, hint=f"look at hf://{repo} with a browser",
        )  # fmt: skip
    need = sum(f.size or 0 for f in files if f.name in wanted and not f.is_cached)
    if kind == "base" and need > ASK_BYTES and not yes:
        raise UsageError(
            "LT-265", "a large download needs consent", file=repo,
            got=f"{need / 1e9:.1f} GB to download", hint="-y downloads it",
        )  # fmt: skip
    literal = [_literal(name) for name in wanted]
    return Looked(*hub.snapshot(repo, reference.revision, allow_patterns=literal))


def _patterns(kind: str, sub: str) -> list[str]:
    """What may be wanted; the Hub is asked for the size of each such file."""
    names = (*(hub.BASE_FILES if kind == "base" else hub.ADAPTER_FILES), "*.safetensors")
    return [*names, *(f"*/{n}" for n in names), *([_literal(sub)] if sub else [])]


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
