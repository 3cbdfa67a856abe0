"""`pull`: adapter files of one commit, verified."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import HubError, OutputError, UsageError
from loratool.report.pull import PulledFile, PullReport

if TYPE_CHECKING:
    from loratool.store.hub_listing import ListedFile, Listing


def pull(
    repo: str,
    *,
    output: str | Path | None = None,
    everything: bool = False,
    force: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
) -> PullReport:
    """Fetch an adapter from the Hub; every file is checked against the Hub's listed hash.

    Args:
        repo: ``owner/name[@revision]`` or ``hf://owner/name[@revision][/sub/path]``.
        output: folder to create; None = the shared cache.
        everything: all files, not only the adapter's.
        force: replace an earlier output or an unchanged copy of the repository's files; a copy
            that is up to date stays.
        dry_run: list, fetch nothing.
        offline: make no connection; the cache's own hashes are checked.
        yes: consent to a download of more than 1 GB.

    Raises:
        UsageError: a large download without consent.
        HubError: the Hub does not give it, or gives other bytes than it lists (LT-710).
        OutputError: LT-501, the output exists; LT-521, and must not be replaced.
    """
    from loratool.store import hub
    from loratool.store.hub_copy import holds_exactly, is_copy
    from loratool.store.hub_listing import list_cached, list_commit
    from loratool.store.output_path import check_free, check_place, is_own_output
    from loratool.store.source import parse_reference

    reference = parse_reference(repo)
    repo_id, sub = reference.repo_id, reference.sub
    if output is not None and not dry_run:
        check_place(Path(output))
        if not force:
            check_free(Path(output), is_folder=True, force=False)
    find = list_cached if hub.is_offline(offline) else list_commit
    listing = find(repo_id, reference.revision)
    wanted = _choose(listing, sub, everything=everything)
    files = tuple(PulledFile(f.name, f.size, f.digest) for f in wanted)
    if dry_run:
        return PullReport(repo_id, listing.commit, None, files, dry_run=True)
    if output is None:
        paths = _fetch(listing, wanted, yes=yes)
        snapshot = paths[0].parents[wanted[0].name.count("/")]
        return PullReport(repo_id, listing.commit, str(snapshot), files, _base_of(paths))
    folder = Path(output)
    top = sub.rpartition("/")[0] if any(f.name == sub for f in listing.files) else sub
    local = [f.name.removeprefix(f"{top}/" if top else "") for f in wanted]
    if force and holds_exactly(folder, dict(zip(local, (f.digest for f in wanted), strict=True))):
        base = _base_of(folder / name for name in local)
        return PullReport(repo_id, listing.commit, str(folder), files, base, is_current=True)

    def is_own(path: Path) -> bool:
        return is_own_output(path) or is_copy(path, repo_id, top)

    if force and folder.exists() and not is_own(folder):
        raise OutputError(
            "LT-521", "--force replaces an earlier output or an unchanged copy of the repository, "
            "and this is neither", file=folder, hint="choose another -o, or remove it yourself",
        )  # fmt: skip
    paths = _fetch(listing, wanted, yes=yes)
    from loratool.store.writer import StagedOutput

    with StagedOutput(folder, is_folder=True, plan_id=None, force=force, is_own=is_own) as staged:
        for name, path in zip(local, paths, strict=True):
            staged.copy_file(name, path)
        staged.commit()
    return PullReport(repo_id, listing.commit, str(folder), files, _base_of(paths))


def _choose(listing: Listing, sub: str, *, everything: bool) -> list[ListedFile]:
    from loratool.store.hub_files import adapter_files, candidates

    names = [f.name for f in listing.files]
    if everything:
        chosen = [n for n in names if n.startswith(f"{sub}/" if sub else "")]
    else:
        chosen = adapter_files(names, sub)
    if not chosen:
        raise HubError(
            "LT-704", "the repository holds no adapter", file=listing.repo_id,
            key=sub or None, got=candidates(names),
            hint="name one: hf://owner/name/PATH; or --all for every file",
        )  # fmt: skip
    return [f for f in listing.files if f.name in chosen]


def _fetch(listing: Listing, wanted: list[ListedFile], *, yes: bool) -> list[Path]:
    from loratool.store.hub_fetch import ASK_BYTES
    from loratool.store.hub_listing import bytes_to_fetch, fetch_verified

    need = 0 if listing.cached else bytes_to_fetch(listing, wanted)
    if need > ASK_BYTES and not yes:
        raise UsageError(
            "LT-265", "a large download needs consent", file=listing.repo_id,
            got=f"{need / 1e9:.1f} GB to download", hint="-y downloads it",
        )  # fmt: skip
    return fetch_verified(listing, wanted)


def _base_of(paths: Iterable[Path]) -> str | None:
    """The base that an adapter names."""
    from loratool.store.jsonfile import load_json

    config = next((p for p in paths if p.name == "adapter_config.json"), None)
    value = None if config is None else load_json(config).get("base_model_name_or_path")
    return value if isinstance(value, str) and value else None
