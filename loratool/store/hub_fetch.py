"""A source on the Hub: cached, downloaded, or read where it is."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.errors import HubError, UsageError, list_some
from loratool.location import HubReference
from loratool.report.text import plural
from loratool.store import hub
from loratool.store.hub_download import repo_folder
from loratool.store.hub_files import all_adapters, is_weight_name, source_files
from loratool.store.hub_http import get
from loratool.store.hub_listing import bytes_to_fetch, fetch_verified, list_commit
from loratool.store.hub_names import ListedFile, Listing
from loratool.store.look import Looked, look
from loratool.store.rules import Reach

_OUT_OF_REACH = ("LT-705", "LT-709", "LT-726")
ASK_BYTES = 1_000_000_000  # a larger download needs consent
ASK_FILES = 1_000


def fetch(reference: HubReference, kind: str, reach: Reach) -> tuple[Looked, str | None]:
    """Bring a source within reach.

    Args:
        reference: what was asked for.
        kind: ``adapter``, ``base`` or ``any``.
        reach: how the Hub may be used.

    Returns:
        Where the files are, and what there is to say: why a cached copy was taken instead of
        asking the Hub, or which adapters lie deeper than a folder is looked into.

    Raises:
        HubError: the Hub does not give it, and there is no cached copy.
        UsageError: LT-265, a large download without consent.
    """
    repo, revision = reference.repo_id, reference.revision
    if hub.is_offline(reach.offline):
        return _cached(reference), None
    try:
        listing = find_commit(repo, revision)
    except HubError as error:
        if error.code not in _OUT_OF_REACH:  # the Hub answered: a cached copy is no answer
            raise
        try:
            return _cached(reference), f"a cached copy, because {error.what}"
        except HubError:
            raise error from None
    if reach.in_place:
        looked = look(listing, kind=kind, sub=reference.sub, yes=reach.yes)
        return looked, _deeper(listing, reference.sub) if kind == "any" else None
    return _download(listing, kind, reference.sub, reach.yes), None


def _deeper(listing: Listing, sub: str) -> str | None:
    prefix = f"{sub}/" if sub else ""
    names = [f.name for f in listing.files]
    inside = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    places = [place for place in all_adapters(inside) if "/" in place]
    return f"adapters deeper in it: {list_some(places)}" if places else None


def find_commit(repo_id: str, revision: str | None) -> Listing:
    """`list_commit`, and a word about names that are those of something else.

    Raises:
        HubError: as `list_commit`; LT-730, it is a dataset or a space.
    """
    try:
        return list_commit(repo_id, revision)
    except HubError as error:
        kind = _other_kind(repo_id) if error.code == "LT-702" else None
        if kind is None:
            raise
        raise HubError(
            "LT-730", f"this is a {kind}, not a model", file=repo_id,
            hint="adapters and checkpoints are in model repositories",
        ) from None  # fmt: skip


def _other_kind(repo_id: str) -> str | None:
    from huggingface_hub import constants

    for kind in ("dataset", "space"):
        try:
            with (
                hub.plain_errors(repo_id, None),
                get(f"{constants.ENDPOINT}/api/{kind}s/{repo_id}") as answer,
            ):
                is_gated = answer.headers.get("X-Error-Code") == "GatedRepo"
                if answer.status_code == 200 or is_gated:
                    return kind
        except (HubError, UsageError):
            return None
    return None


def _cached(reference: HubReference) -> Looked:
    """What the Hub's cache holds, weights at least; what else lacks shows when it is opened."""
    marks = ("adapter_config.json", "config.json", "model_index.json")  # only these must be there
    repo, revision = reference.repo_id, reference.revision
    folder, commit = hub.snapshot(repo, revision, allow_patterns=marks, offline=True)
    place = folder / reference.sub
    files = (path for path in (place, *place.rglob("*")) if path.is_file())
    if not any(is_weight_name(path.name) for path in files):
        raise hub.not_cached(f"{repo}@{commit}", "the weights")
    return Looked(folder, commit)


def _download(listing: Listing, kind: str, sub: str, yes: bool) -> Looked:
    """The files of a source, of the commit that was listed, each verified when it comes.

    Those of an adapter are verified in the cache, too.
    """
    names = [f.name for f in listing.files]
    chosen = set(source_files(listing.repo_id, names, kind, sub))
    wanted = [f for f in listing.files if f.name in chosen]
    agree_to_download(listing, wanted, yes=yes)
    # Hashing a base of 100 GB again for each command would take longer than many a merge.
    known = [f for f in wanted if kind == "base" and _is_there(listing, f)]
    fetch_verified(listing, [f for f in wanted if f not in known])
    return Looked(repo_folder(listing.repo_id) / "snapshots" / listing.commit, listing.commit)


def agree_to_download(listing: Listing, wanted: Sequence[ListedFile], *, yes: bool) -> None:
    """Refuse a large download, or one of very many files, without consent.

    Raises:
        UsageError: LT-265.
    """
    need = 0 if listing.cached else bytes_to_fetch(listing, wanted)
    if not yes and (need > ASK_BYTES or (need and len(wanted) > ASK_FILES)):
        raise UsageError(
            "LT-265", "a large download needs consent", file=listing.repo_id,
            got=f"{need / 1e9:.1f} GB in {plural(len(wanted), 'file')} to download",
            hint="-y downloads it",
        )  # fmt: skip


def _is_there(listing: Listing, file: ListedFile) -> bool:
    """True if the cache names a file of that size; it was verified when it came."""
    path = repo_folder(listing.repo_id) / "snapshots" / listing.commit / file.name
    return path.is_file() and path.stat().st_size == file.size
