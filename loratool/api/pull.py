"""`pull`: adapter files of one commit, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loratool.errors import OutputError, UsageError
from loratool.report.pull import PulledAdapter, PulledFile, PullReport


def pull(
    repo: str,
    *,
    output: str | Path | None = None,
    everything: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
) -> PullReport:
    """Fetch adapters from the Hub; every file is checked against the Hub's listed hash.

    The adapter at the top of the repository; where there is none, all those in it, in the
    folders where they lie.

    Args:
        repo: ``owner/name[@revision]`` or ``hf://owner/name[@revision][/sub/path]``.
        output: folder to create; None = the shared cache.
        everything: all files, not only the adapter's.
        dry_run: list, fetch nothing.
        offline: make no connection; the cache's own hashes are checked.
        yes: consent to a download of more than 1 GB.

    Raises:
        UsageError: a large download without consent.
        HubError: the Hub does not give it, or gives other bytes than it lists (LT-710).
        OutputError: the output exists.
    """
    from loratool.store import hub
    from loratool.store.hub_fetch import ASK_BYTES, find_commit
    from loratool.store.hub_files import adapter_folders, all_adapters, nothing_there
    from loratool.store.hub_listing import bytes_to_fetch, fetch_verified, list_cached
    from loratool.store.source import parse_reference

    reference = parse_reference(repo)
    sub, prefix = reference.sub, f"{reference.sub}/" if reference.sub else ""
    if output is not None and not dry_run:
        _check_free(Path(output))
    find = list_cached if hub.is_offline(offline) else find_commit
    listing = find(reference.repo_id, reference.revision)
    names = [f.name for f in listing.files]
    found = all_adapters(names, sub)
    chosen = {n for files in found.values() for n in files}
    if everything:
        chosen = {n for n in names if n.startswith(prefix) or n == sub}
    if not chosen:
        raise nothing_there(listing.repo_id, names, "adapter", sub)
    wanted = [f for f in listing.files if f.name in chosen]
    files = tuple(PulledFile(f.name, f.size, f.digest) for f in wanted)
    others = tuple(sorted(f for f in adapter_folders(names) if not _is_in(f, found)))
    adapters = tuple(PulledAdapter(place) for place in found)
    report = PullReport(
        reference.repo_id, listing.commit, None, files, adapters, others, dry_run=dry_run
    )
    if dry_run:
        return report
    need = 0 if listing.cached else bytes_to_fetch(listing, wanted)
    if need > ASK_BYTES and not yes:
        raise UsageError(
            "LT-265", "a large download needs consent", file=reference.repo_id,
            got=f"{need / 1e9:.1f} GB to download", hint="-y downloads it",
        )  # fmt: skip
    paths = fetch_verified(listing, wanted)
    if output is None:
        folder = paths[0].parents[wanted[0].name.count("/")]
    else:
        folder = Path(output)
        local = {f.name: _local(f.name, sub) for f in wanted}
        _copy(local, files, paths, folder, listing.commit)
    by_name = {f.name: path for f, path in zip(wanted, paths, strict=True)}
    adapters = tuple(
        PulledAdapter(place, _base_of(by_name.get(_config(place, names)))) for place in found
    )
    return replace(report, output=str(folder), adapters=adapters)


def _local(name: str, sub: str) -> str:
    """Where a file of the repository comes to lie."""
    return name.rpartition("/")[2] if name == sub else name.removeprefix(f"{sub}/")


def _is_in(folder: str, found: Mapping[str, object]) -> bool:
    return folder in found or any(place.startswith(f"{folder}/") for place in found)


def _config(place: str, names: Sequence[str]) -> str:
    """The configuration of an adapter, a folder or a file."""
    folder = place.rpartition("/")[0] if place in names else place
    return f"{folder}/adapter_config.json".lstrip("/")


def _check_free(folder: Path) -> None:
    """Before anything is fetched; a pulled folder has no marker, so nothing is ever replaced."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            "LT-501", "the output exists", file=folder, hint="choose another -o, or remove it"
        )


def _copy(
    local: dict[str, str],
    files: tuple[PulledFile, ...],
    paths: list[Path],
    folder: Path,
    commit: str,
) -> None:
    from loratool.store.writer import StagedOutput

    content = json.dumps([commit, *((f.name, f.digest) for f in files)])
    plan_id = hashlib.sha256(content.encode()).hexdigest()
    with StagedOutput(folder, is_folder=True, plan_id=plan_id) as staged:
        for file, path in zip(files, paths, strict=True):
            staged.copy_file(local[file.name], path)
        staged.commit()


def _base_of(config: Path | None) -> str | None:
    from loratool.store.jsonfile import load_json

    value = None if config is None else load_json(config).get("base_model_name_or_path")
    return value if isinstance(value, str) and value else None
