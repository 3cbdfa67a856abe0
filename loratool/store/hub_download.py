"""One file into the Hub's cache: continued where it ended, and named once its hash is right.

The client begins an interrupted file anew, gives it its name unverified, and waits as long as a
busy server asks.  What lies in the cache afterwards is the same: a blob and a link to it.  Very
large files come through the client's Xet where the Hub has it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from loratool.errors import DiskError, HubError
from loratool.store.checksum import digest_of
from loratool.store.hub import plain_errors
from loratool.store.hub_client import guarded_client
from loratool.store.hub_http import check_status, get, own_headers, parts
from loratool.store.hub_names import ListedFile, Listing, astray, refuse_large
from loratool.store.hub_retry import is_broken, pause_after

_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds after the attempts that brought next to nothing
_PROGRESS_BYTES = 1 << 20  # an attempt that brought so much is not counted
_XET_BYTES = 1_000_000_000  # from here on Xet's many streams are worth more than going on


def missing_bytes(listing: Listing, file: ListedFile) -> int:
    """How much of a file is not in the cache.

    Raises:
        HubError: LT-721, the listing cannot be used.
    """
    pointer, blob, partial = _places(listing, file)
    if pointer.exists() or blob.exists():
        return 0
    try:
        return max(0, file.size - partial.stat().st_size)
    except (FileNotFoundError, NotADirectoryError):  # or another process has just named it
        return file.size


def download(listing: Listing, file: ListedFile) -> Path | None:
    """Fetch a file, or find it in the cache; either way its hash is compared.

    Returns:
        Its path in the cache; None if other bytes came than are listed (they are dropped).

    Raises:
        HubError: LT-720, the connection breaks again and again; LT-721, the listing cannot be
            used; or the Hub does not give the file.
        DiskError: the cache cannot be used, or the disk is too full.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    pointer, blob, partial = _places(listing, file)
    folder = repo_folder(listing.repo_id).name
    lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{file.digest}.lock")
    with plain_errors(listing.repo_id, listing.commit):
        if _is_intact(pointer, file):
            return pointer  # nothing is written: such a cache may be read-only
        for place in (blob.parent, pointer.parent, lock.parent):
            place.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not _is_intact(blob, file):
                blob.unlink(missing_ok=True)
                if not _complete(listing, file, partial):
                    return None
                partial.replace(blob)
            _link(blob, pointer)
    return pointer


def _places(listing: Listing, file: ListedFile) -> tuple[Path, Path, Path]:
    """In the cache: the name at this commit, the content, and what there is of it so far."""
    # What a mirror lists becomes file names here.
    if not file.digest:
        raise astray(listing.repo_id, file.name, "its hash")
    if any("\\" in part or part[1:2] == ":" for part in file.name.split("/")):
        raise astray(listing.repo_id, file.name, "a name inside the repository")
    refuse_large(listing.repo_id, file)
    folder = repo_folder(listing.repo_id)
    blob = folder / "blobs" / file.digest
    # The client's own name for such a file, so that its tools know what it is.
    partial = blob.with_name(f"{file.digest}.incomplete")
    return folder / "snapshots" / listing.commit / file.name, blob, partial


def _is_intact(path: Path, file: ListedFile) -> bool:
    return path.is_file() and digest_of(path, file.digest) == file.digest


def xet_error(repo_id: str) -> HubError:
    """A failure inside hf_xet, which says nothing that helps."""
    return HubError(
        "LT-722", "the transfer through Xet failed", file=repo_id,
        hint="try again, or set HF_HUB_DISABLE_XET=1 for plain HTTP",
    )  # fmt: skip


def repo_folder(repo_id: str) -> Path:
    """Where the Hub's cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))


def _complete(listing: Listing, file: ListedFile, partial: Path) -> bool:
    """Fetch what is missing; False (and nothing is kept) if the whole is not what is listed."""
    with partial.open("ab") as out:
        if out.tell() > file.size:
            _empty(out)
        _check_space(partial.parent, file.size - out.tell())
        xet_hash = _xet_hash(listing, file)
        if xet_hash is None:
            _fill(listing, file, out)
    if xet_hash is not None:
        _through_xet(listing, file, xet_hash, partial)
    if _is_intact(partial, file):
        return True
    partial.unlink()
    return False


def _xet_hash(listing: Listing, file: ListedFile) -> str | None:
    """What a very large file is called in Xet, None if it comes by plain HTTP."""
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available

    if file.size < _XET_BYTES or not is_xet_available():
        return None
    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get(_url(listing, file), method="HEAD", wait=wait, hops=0) as answer:
        if answer.is_error:
            check_status(answer)
        found = answer.headers.get(constants.HUGGINGFACE_HEADER_X_XET_HASH, "")
    return found if re.fullmatch("[0-9a-f]{64}", found) else None


def _through_xet(listing: Listing, file: ListedFile, xet_hash: str, partial: Path) -> None:
    """The client would ask for access, with the token, wherever the answer tells it to."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import xet_get
    from huggingface_hub.utils._xet import XetFileData

    api = f"{constants.ENDPOINT}/api/models/{listing.repo_id}"
    place = XetFileData(xet_hash, f"{api}/xet-read-token/{listing.commit}")
    try:
        with guarded_client():
            xet_get(
                incomplete_path=partial, xet_file_data=place, headers=own_headers(),
                expected_size=file.size, displayed_filename=ascii(file.name)[1:-1],
            )  # fmt: skip
    except (RuntimeError, ValueError):  # hf_xet's own, whose text can hold addresses
        raise xet_error(listing.repo_id) from None


def _url(listing: Listing, file: ListedFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(listing.repo_id, file.name, revision=listing.commit)


def _check_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskError(
            "LT-620", "the Hub's cache has too little space", file=folder,
            expected=f"{need:,} bytes", got=f"{free:,} bytes free",
            hint="hf cache prune, or HF_HOME names another place",
        )  # fmt: skip


def _empty(out: BinaryIO) -> None:
    out.seek(0)
    out.truncate()


def _fill(listing: Listing, file: ListedFile, out: BinaryIO) -> None:
    """Append what is missing, in as many requests as it takes, while they bring something."""
    from huggingface_hub.utils.tqdm import tqdm

    waits = iter(_WAITS)
    with tqdm(  # type: ignore[no-untyped-call]
        total=file.size, initial=out.tell(), desc=ascii(file.name)[1:-1], unit="B", disable=None,
        unit_scale=True, leave=False,
    ) as bar:  # fmt: skip
        while (have := out.tell()) < file.size:
            error: Exception | None = None
            try:
                _receive(listing, file, out, bar)
            except Exception as caught:
                error = caught
            if out.tell() >= file.size:
                return
            if out.tell() - have >= _PROGRESS_BYTES:
                waits = iter(_WAITS)
            wait = next(waits, None)
            pause = wait if error is None or wait is None else pause_after(error, wait)
            if pause is None:
                if error is not None and not is_broken(error):
                    raise error
                raise HubError(
                    "LT-720", "the connection breaks again and again", key=file.name,
                    file=f"{listing.repo_id}@{listing.commit}",
                    got=f"{out.tell():,} of {file.size:,} bytes",
                    hint="what came is kept: the same command goes on from there",
                ) from None  # fmt: skip
            time.sleep(pause)


def _receive(listing: Listing, file: ListedFile, out: BinaryIO, bar: Any) -> None:
    """One request; what came before the connection broke is kept."""
    from huggingface_hub import constants

    have = out.tell()
    headers = {"Range": f"bytes={have}-"} if have else {}
    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get(_url(listing, file), headers, wait=wait) as response:
        check_status(response)
        if have and response.status_code != 206:  # the server knows no ranges
            _empty(out)
            bar.update(-have)
        for part in parts(response, most=None):
            out.write(part)
            bar.update(len(part))
            if out.tell() > file.size:
                break  # its hash tells


def _link(blob: Path, pointer: Path) -> None:
    """Give a blob its name in the snapshot."""
    if pointer.exists() and pointer.samefile(blob):
        return  # another process was first, and may be reading by that name
    pointer.unlink(missing_ok=True)  # a link to a blob that was gone, or a damaged copy
    try:
        with suppress(FileExistsError):  # another process made the same one
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a system without links
        shutil.copyfile(blob, pointer)
