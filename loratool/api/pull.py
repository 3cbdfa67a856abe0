"""`pull`: adapter files of one commit, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.dialects.stated import base_of
from loratool.errors import OutputError, list_some
from loratool.frozen import replace
from loratool.options.calls import takes
from loratool.options.hub import Pull
from loratool.report.pull import PulledAdapter, PulledFile, PullReport
from loratool.store.staging import Making

if TYPE_CHECKING:
    from loratool.store.hub_names import ListedFile, Listing


@takes(Pull)
def pull(asked: Pull) -> PullReport:
    """Fetch adapters from the Hub; every file is checked against the Hub's listed hash.

    The adapter at the top of the repository; where there is none, all those in it, in the
    folders where they lie.

    Raises:
        UsageError: a large download without consent.
        HubError: the Hub does not give it, or gives other bytes than it lists (LT-710).
        OutputError: LT-501, the output exists; LT-521, and must not be replaced.
    """
    from loratool.store import hub
    from loratool.store.hub_fetch import find_commit
    from loratool.store.hub_files import all_adapters, other_adapters
    from loratool.store.hub_listing import list_cached
    from loratool.store.output_path import check_free, check_place
    from loratool.store.series import may_be_made
    from loratool.store.source import parse_reference

    reference = parse_reference(asked.repo)
    if asked.output is not None and not asked.dry_run:
        check_place(Path(asked.output))
        if not asked.force and not may_be_made(Path(asked.output), asked.series):
            check_free(Path(asked.output), is_folder=True, force=False)
    find = list_cached if hub.is_offline(asked.offline) else find_commit
    listing = find(reference.repo_id, reference.revision)
    names = [f.name for f in listing.files]
    found = all_adapters(names, reference.sub)
    wanted = _wanted(listing, reference.sub, found, everything=asked.everything)
    files = tuple(PulledFile(f.name, f.size, f.digest) for f in wanted)
    others = other_adapters(names, {f.name for f in wanted})
    adapters = tuple(PulledAdapter(place) for place in found)
    report = PullReport(
        reference.repo_id, listing.commit, None, files, adapters, others, dry_run=asked.dry_run
    )
    if asked.dry_run:
        return report
    folder, paths, is_current = _get(asked, listing, reference.sub, wanted)
    known = set(names)
    adapters = tuple(
        PulledAdapter(place, _base_of(paths.get(_config(place, known)))) for place in found
    )
    return replace(report, output=str(folder), adapters=adapters, is_current=is_current)


def _wanted(
    listing: Listing, sub: str, found: Mapping[str, Iterable[str]], *, everything: bool
) -> list[ListedFile]:
    """The files of a commit that are fetched."""
    from loratool.store.hub_files import nothing_there

    names, prefix = [f.name for f in listing.files], f"{sub}/" if sub else ""
    chosen = {n for files in found.values() for n in files}
    if everything:
        chosen = {n for n in names if n.startswith(prefix) or n == sub}
    if listing.cached is not None:
        _refuse_incomplete(listing, names, chosen, prefix)
    if not chosen:
        raise nothing_there(listing.repo_id, names, "adapter", sub)
    return [f for f in listing.files if f.name in chosen]


def _get(
    asked: Pull, listing: Listing, sub: str, wanted: Sequence[ListedFile]
) -> tuple[Path, dict[str, Path], bool]:
    """The folder, where in it each file lies, and whether it held exactly these before."""
    if asked.output is None:
        paths = _fetch(listing, wanted, yes=asked.yes)
        folder, is_current = paths[0].parents[wanted[0].name.count("/")], False
    else:
        folder = Path(asked.output)
        local = [_local(f.name, sub) for f in wanted]
        top = sub.rpartition("/")[0] if sub in {f.name for f in listing.files} else sub
        is_current = _write(asked, listing, wanted, folder, local, top)
        paths = [folder / name for name in local]
    return folder, {f.name: path for f, path in zip(wanted, paths, strict=True)}, is_current


def _refuse_incomplete(
    listing: Listing, names: Sequence[str], chosen: Iterable[str], prefix: str
) -> None:
    """A cached copy without weights is what is left of an adapter, or of a look at it."""
    from loratool.store.hub import not_cached
    from loratool.store.hub_files import is_weight_name

    config = "adapter_config.json"
    whole = {n.rpartition("/")[0] for n in chosen if is_weight_name(n)}
    begun = {n.rpartition("/")[0] for n in names if n.startswith(prefix) and n.endswith(config)}
    # The checkpoints below an adapter at the top were not asked for.
    if not whole or (prefix.rstrip("/") not in whole and begun - whole):
        raise not_cached(f"{listing.repo_id}@{listing.commit}", "the weights")


def _local(name: str, sub: str) -> str:
    """Where a file of the repository comes to lie."""
    return name.rpartition("/")[2] if name == sub else name.removeprefix(f"{sub}/")


def _config(place: str, names: Container[str]) -> str:
    """The configuration of an adapter, a folder or a file."""
    folder = place.rpartition("/")[0] if place in names else place
    return f"{folder}/adapter_config.json".lstrip("/")


def _fetch(listing: Listing, wanted: Sequence[ListedFile], *, yes: bool) -> list[Path]:
    from loratool.store.hub_fetch import agree_to_download
    from loratool.store.hub_listing import fetch_verified

    agree_to_download(listing, wanted, yes=yes)
    return fetch_verified(listing, wanted)


def _write(
    asked: Pull,
    listing: Listing,
    wanted: Sequence[ListedFile],
    folder: Path,
    local: Sequence[str],
    top: str,
) -> bool:
    """Fetch files into a folder under their local names; True if it held exactly these."""
    from loratool.store.hub_copy import holds_exactly, prove_copy
    from loratool.store.leftovers import clear_away
    from loratool.store.marker import Proof, prove
    from loratool.store.series import may_be_made
    from loratool.store.writer import StagedOutput

    def prove_either(path: Path) -> Proof:
        by_marker = prove(path)
        return prove_copy(path, listing.repo_id, top) if by_marker.strangers else by_marker

    clear_away(folder, prove_either)
    if (asked.force or may_be_made(folder, asked.series)) and folder.exists():
        if holds_exactly(folder, {n: f.digest for n, f in zip(local, wanted, strict=True)}):
            return True
        strangers = prove_either(folder).strangers if asked.force else ()
        if strangers:
            raise OutputError(
                "LT-521", "--force replaces an earlier output or an unchanged copy of the "
                "repository, and this is neither", file=folder, got=list_some(strangers),
                hint="choose another -o, or remove it yourself",
            )  # fmt: skip
    paths = _fetch(listing, wanted, yes=asked.yes)
    with StagedOutput(
        folder,
        Making(is_folder=True, plan_id=_identity(listing, local), names=local,
               force=asked.force, series=asked.series),
        prove=prove_either,
    ) as staged:  # fmt: skip
        for name, path in zip(local, paths, strict=True):
            staged.copy_file(name, path)
        staged.commit()
    return False


def _identity(listing: Listing, names: Sequence[str]) -> str:
    """What tells this pull from others."""
    text = json.dumps([listing.repo_id, listing.commit, list(names)])
    return hashlib.sha256(text.encode()).hexdigest()


def _base_of(config: Path | None) -> str | None:
    from loratool.store.jsonfile import load_json

    return None if config is None else base_of(load_json(config))
