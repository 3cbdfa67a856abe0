"""The Hugging Face Hub: listing and fetching snapshots, and its errors in plain words.

huggingface_hub is imported inside functions, so that local work never pays for it.  Nothing of
an error's own text is repeated: it may hold addresses with tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loratool.errors import DiskError, HubError, LoratoolError, UsageError
from loratool.store.hub_http import SlowError, strange

_STUMBLES = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)

ADAPTER_FILES = (
    "adapter_config.json",
    "loratool.json",
    "adapter_model*.safetensors",
    "adapters.safetensors",
    "pytorch_lora_weights*.safetensors",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "*_preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE*",
)
BASE_FILES = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "tokenizer*",
    "vocab*",
    "merges*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


def is_offline(offline: bool = False) -> bool:
    """True if the network must not be used: asked for, or ``HF_HUB_OFFLINE``."""
    if offline:
        return True
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def snapshot(
    repo_id: str,
    revision: str | None,
    *,
    allow_patterns: Sequence[str] | None,
    offline: bool = False,
) -> tuple[Path, str]:
    """Fetch files of one commit into the Hub's cache, or find them there.

    A branch or tag is resolved to a commit once; every file is of that commit.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag, ``refs/pr/N`` or commit; None = the default branch.
        allow_patterns: which files; None = all.
        offline: use the cache only and make no connection.

    Returns:
        The snapshot's folder and its commit.

    Raises:
        HubError: missing, gated, no access, not reachable, or not in the cache.
        UsageError: ``repo_id`` cannot be a repository.
        DiskError: the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with plain_errors(repo_id, revision):
        path = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=None if allow_patterns is None else list(allow_patterns),
                local_files_only=is_offline(offline),
            )
        )
    return path, path.name


@contextmanager
def plain_errors(repo_id: str, revision: str | None, *, client: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours, without their text.

    Args:
        repo_id: ``owner/name``.
        revision: for messages.
        client: all that is done is the client's: then it stumbles over answers of strange forms.
    """
    try:
        yield
    except LoratoolError:
        raise
    except Exception as error:
        mine = _translate(error, repo_id, revision)
        if mine is None and client and isinstance(error, _STUMBLES):
            mine = strange(type(error).__name__)
        if mine is None:
            raise
        # "from None": the original's text can hold request headers and signed addresses.
        raise mine from None


def _translate(
    error: Exception, repo_id: str, revision: str | None
) -> HubError | UsageError | DiskError | None:
    """The same failure in words that users understand; None for anything unknown."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0 on

    name = repo_id if revision is None else f"{repo_id}@{revision}"
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, errors.HFValidationError):
        return UsageError("LT-267", "not the name of a repository", got=repo_id)
    if isinstance(error, errors.GatedRepoError):  # before its parent class, "not found"
        return HubError(
            "LT-701", "the repository is gated", file=name,
            hint=f"accept its terms at {page}, then: hf auth login",
        )  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            "LT-703", "the repository has no such revision", file=repo_id,
            got=revision, hint=f"see {page}/tree/main",
        )  # fmt: skip
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            "LT-702", "no such repository, or no access to it", file=name,
            hint="check the name; if it is private: hf auth login",
        )  # fmt: skip
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__  # the client hides an HTTP error behind "not in the cache"
        if isinstance(cause, errors.HfHubHTTPError | httpx.HTTPError):
            return _translate(cause, repo_id, revision)
        return not_cached(name)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return not_cached(name)
    if isinstance(error, errors.EntryNotFoundError):
        return HubError("LT-704", "the repository has no such file", file=name, hint=f"see {page}")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error, name)
    if isinstance(error, ConnectionError) and "xet" in str(error):
        return HubError(
            "LT-705", "the Hub has no Xet storage", file=name, hint="set HF_HUB_DISABLE_XET=1"
        )
    if isinstance(error, SlowError):
        return HubError(
            "LT-726", "the server is too slow", file=name, got=str(error),
            hint="check the network and HF_ENDPOINT; --offline uses the cache",
        )  # fmt: skip
    if isinstance(error, httpx.HTTPError | httpx.InvalidURL | ConnectionError | TimeoutError):
        return HubError(
            "LT-705", "the Hub cannot be reached", file=name, got=type(error).__name__,
            hint=f"check the network and {constants.ENDPOINT}; --offline uses the cache",
        )  # fmt: skip
    if type(error).__name__ == "XetDownloadError":
        return HubError("LT-705", "the download failed", file=name, hint="set HF_HUB_DISABLE_XET=1")
    if isinstance(error, OSError) and error.errno is not None:
        return DiskError(
            "LT-607", "the Hub's cache cannot be used", file=constants.HF_HUB_CACHE,
            got=error.strerror, hint="HF_HOME names another place",
        )  # fmt: skip
    return None


def not_cached(name: str, what: str = "a complete copy") -> HubError:
    """The error for what is only on the Hub, while no connection may be made.

    Args:
        name: of the repository.
        what: is missing.
    """
    from huggingface_hub import constants

    return HubError(
        "LT-706", "not in the cache of this machine, and the Hub is out of reach or not allowed",
        file=name, expected=f"{what} in {constants.HF_HUB_CACHE}",
        hint="run it once without --offline and HF_HUB_OFFLINE",
    )  # fmt: skip


def _by_status(error: Exception, name: str) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return HubError(
            "LT-707", "the Hub rejected the token", file=name, hint="hf auth login (or HF_TOKEN)"
        )
    if status == 403:
        return HubError(
            "LT-708", "no permission", file=name, hint="use a token with access: hf auth login"
        )
    what = "the Hub asks to slow down" if status == 429 else "the Hub answered with an error"
    return HubError("LT-709", what, file=name, got=f"HTTP status {status}", hint="try again later")
