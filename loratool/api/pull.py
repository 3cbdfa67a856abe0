"""`pull`: adapter files of one commit, verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from loratool.errors import HubError, OutputError, UsageError
from loratool.report.pull import PulledFile, PullReport


def pull(
    repo: str,
    *,
    output: str | Path | None = None,
    everything: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    yes: bool = False,
) -> PullReport:
    """Fetch an adapter from the Hub; every file is checked against the Hub's listed hash.

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
    from loratool.store.hub_fetch import ASK_BYTES
    from loratool.store.hub_files import adapter_files, candidates
    from loratool.store.hub_listing import bytes_to_fetch, fetch_verified, list_cached, list_commit
    from loratool.store.source import parse_reference

    reference = parse_reference(repo)
    if output is not None and not dry_run:
        _check_free(Path(output))
    find = list_cached if hub.is_offline(offline) else list_commit
    listing = find(reference.repo_id, reference.revision)
    prefix = f"{reference.sub}/" if reference.sub else ""
    names = [f.name for f in listing.files]
    if everything:
        chosen = [n for n in names if n.startswith(prefix)]
    else:
        chosen = adapter_files(names, reference.sub)
    if not chosen:
        raise HubError(
            "LT-704", "the repository holds no adapter", file=reference.repo_id,
            key=reference.sub or None, got=candidates(names),
            hint="name one: hf://owner/name/PATH; or --all for every file",
        )  # fmt: skip
    wanted = [f for f in listing.files if f.name in chosen]
    files = tuple(PulledFile(f.name, f.size, f.digest) for f in wanted)
    if dry_run:
        return PullReport(reference.repo_id, listing.commit, None, files, dry_run=True)
    need = 0 if listing.cached else bytes_to_fetch(listing, wanted)
    if need > ASK_BYTES and not yes:
        raise UsageError(
            "LT-265", "a large download needs consent", file=reference.repo_id,
            got=f"{need / 1e9:.1f} GB to download", hint="-y downloads it",
        )  # fmt: skip
    paths = fetch_verified(listing, wanted)
    base = next((_base_of(p) for p in paths if p.name == "adapter_config.json"), None)
    if output is None:
        folder = paths[0]
        for _ in Path(wanted[0].name).parts:
            folder = folder.parent
    else:
        folder = Path(output)
        local = [Path(n).name if n == reference.sub else n.removeprefix(prefix) for n in chosen]
        _copy(dict(zip(chosen, local, strict=True)), files, paths, folder, listing.commit)
    return PullReport(reference.repo_id, listing.commit, str(folder), files, base)


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


def _base_of(path: Path) -> str | None:
    from loratool.store.jsonfile import load_json

    value = load_json(path).get("base_model_name_or_path")
    return value if isinstance(value, str) and value else None
