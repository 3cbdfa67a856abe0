"""What users type for an adapter or a base: a path, or where it is on the Hub or in a store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from loratool.errors import TOKEN, BadFileError, HubError, UsageError
from loratool.frozen import Frozen, field
from loratool.lazy import regex
from loratool.location import HubReference, last_name
from loratool.store.adapter_folder import find_adapter, list_adapters
from loratool.store.contained import typed
from loratool.store.rules import Reach

if TYPE_CHECKING:
    from loratool.store.remote_folder import RemoteFolder

__all__ = [
    "AdapterArgument",
    "HubReference",
    "Resolved",
    "find_adapter",
    "list_adapters",
    "parse_adapter",
    "parse_hub",
    "parse_weight",
    "resolve",
]

MAX_WEIGHT = 1e30  # far from overflow when it is multiplied with float32 factors
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_DECIMAL = regex(_NUMBER)
_ADDRESS = regex(r"[a-z][a-z0-9+.-]+://")
_FETCH = "inputs are files here, on the Hub or in a store that fsspec knows: fetch it first"
_BLOCKS = regex(rf"[A-Z]{{2,}}|{_NUMBER}(,{_NUMBER}){{2,}}")  # 0,5 is a slip
_COMPONENT = regex(r"[A-Za-z][A-Za-z0-9_.]*")
_LOGIN = regex(r"https?://[^/\s@]+@")
_NAME = r"[A-Za-z0-9][\w.\-]*"
_HUB = regex(
    rf"hf://(?P<repo>{_NAME}/[\w.\-]+)(@(?P<rev>refs/pr/[0-9]+|[^/@]+))?(/(?P<sub>.*))?", re.DOTALL
)
_BARE = regex(rf"(?P<repo>(?P<owner>{_NAME})/[\w.\-]+)(@(?P<rev>[^/@]+))?")
_FILE_SUFFIX = regex(
    r"\.(safetensors|gguf|bin|pt|pth|ckpt|json|ya?ml|npz|zip|md|txt|py|onnx)$", re.IGNORECASE
)


class AdapterArgument(Frozen):
    """An adapter as typed, with its weight split off.

    Attributes:
        path_text: what names the adapter.
        weight: coefficient; 1.0 if none was typed.
        components: component -> coefficient, from ``:unet=0.8,te=0.4``.
        blocks: coefficients per block of the model, from ``:MIDD`` or ``:1,0,0.5``, "" = none.
    """

    path_text: str
    weight: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    blocks: str = ""


class Resolved(Frozen, weakref=True):
    """Where a source lies on this machine.

    Attributes:
        path: file or folder.
        label: short name for tables.
        commit: commit of a Hub repository, None for a path.
        note: what the first line of output says about a guess, or None.
        remote: what keeps the stubs at `path` alive, None if the files are here whole.
        origin: what `path` was converted from (``--allow-pickle``), the link that was typed, or
            the address in an object store; None if it is the source as typed.
    """

    path: Path
    label: str
    commit: str | None = None
    note: str | None = None
    origin: Path | None = None
    remote: RemoteFolder | None = None

    @property
    def named(self) -> Path:
        """The place that the user means, where `path` is a copy or what a link leads to."""
        return self.origin or self.path

    @property
    def repo_id(self) -> str | None:
        """``owner/name`` of a Hub repository, None for a path."""
        return self.label.partition("@")[0] if self.commit else None

    @property
    def pinned(self) -> str | None:
        """A reference that always means this commit, None for a path."""
        if self.commit is None:
            return None
        return "hf://" + self.label.replace(f"@{self.commit[:7]}", f"@{self.commit}", 1)


def parse_adapter(text: str | Path) -> AdapterArgument:
    """Split ``style:0.7``, ``style:unet=0.8,te=0.4`` or ``style:0.7:MIDD`` into name and weights.

    An existing path of exactly that name wins; a `Path` is one as it stands.

    Raises:
        UsageError: what follows the last colon is no weight.

    Example:
        >>> parse_adapter("hf://me/style@v2:-0.3").weight
        -0.3
    """
    if isinstance(text, Path):
        return AdapterArgument(str(text))
    head, colon, tail = text.rpartition(":")
    if not colon or exists(text):
        return AdapterArgument(text)
    if "/" in tail or "\\" in tail:  # hf://…, C:\…
        return AdapterArgument(text)
    if not head:
        raise UsageError("LT-260", "no adapter before the weight", got=text)
    if _BLOCKS.fullmatch(tail):
        found = parse_adapter(head)
        if found.blocks:
            parse_weight(found.blocks, of=text)
        return AdapterArgument(found.path_text, found.weight, found.components, tail)
    if "=" not in tail:
        return AdapterArgument(head, parse_weight(tail, of=text))
    components: dict[str, float] = {}
    for item in tail.split(","):
        name, _, value = item.partition("=")
        if not _COMPONENT.fullmatch(name) or name in components:
            raise UsageError(
                "LT-261", "bad weights per component", got=text,
                expected="each component once, such as style.safetensors:unet=0.8,te=0.4",
            )  # fmt: skip
        components[name] = parse_weight(value, of=text)
    return AdapterArgument(head, components=components)


def parse_weight(text: str, *, of: str | None = None) -> float:
    """A plain decimal; no exponent, underscore, inf or nan.

    Args:
        text: the number.
        of: the whole argument, for the message.

    Raises:
        UsageError: anything else.
    """
    if not is_weight(text):
        raise UsageError(
            "LT-262", "not a weight", key=None if of is None else of[:200], got=repr(text)[:80],
            expected=f"a plain decimal number of at most {MAX_WEIGHT:g}, such as 0.7 or -0.3",
        )  # fmt: skip
    return float(text)


def is_weight(text: object) -> bool:
    """True for a plain decimal number as text, within the limits."""
    is_decimal = isinstance(text, str) and _DECIMAL.fullmatch(text) is not None
    return is_decimal and abs(float(str(text))) <= MAX_WEIGHT


def parse_hub(text: str) -> HubReference | None:
    """Take a reference to the Hub apart; None if it is not written as ``hf://…``.

    Raises:
        UsageError: it begins with ``hf://`` and is malformed, or holds a token.
    """
    if not text.startswith("hf://"):
        return None
    refuse_token(text)
    match = _HUB.fullmatch(text)
    sub = (match["sub"] or "").rstrip("/") if match else ""
    if match is None or any(p in ("", ".", "..") for p in sub.split("/") if sub):
        raise UsageError(
            "LT-263", "not a Hub reference", got=text,
            expected="hf://owner/name[@revision][/sub/path]",
        )  # fmt: skip
    if (owner := match["repo"].partition("/")[0]) in ("datasets", "spaces"):
        raise UsageError(
            "LT-263", f"this is the name of a {owner[:-1]}, not of a model", got=text,
            expected="hf://owner/name[@revision][/sub/path] of a model",
        )  # fmt: skip
    revision = match["rev"]
    return HubReference(match["repo"], unquote(revision) if revision else None, sub)


def parse_reference(text: str) -> HubReference:
    """A repository where only the Hub can be meant: ``hf://…`` or ``owner/name[@revision]``.

    Raises:
        UsageError: LT-263 malformed, LT-264 a token.
    """
    refuse_token(text)
    reference = parse_hub(text if text.startswith("hf://") else f"hf://{text}")
    assert reference is not None
    return reference


def resolve(
    text: str, *, kind: str, offline: bool = False, yes: bool = False, in_place: bool = False,
    whole: bool = False,
) -> Resolved:  # fmt: skip
    """Bring a source within reach of this machine, fetching it if need be.

    Args:
        text: a path, ``hf://owner/name[@revision][/sub/path]``, ``owner/name[@revision]`` where
            no local path can be meant, or an address such as ``s3://bucket/folder``.
        kind: ``"adapter"`` or ``"base"``: which files are fetched; ``"any"`` = what lies there
            (fetched whole only if it is an adapter).
        offline: make no connection; cached copies serve.
        yes: consent to a large download.
        in_place: fetch headers alone; tensors are read where they are when they are needed.
        whole: leave nothing of it to be read where it is.

    Raises:
        BadFileError: no such file or folder.
        UsageError: a malformed reference, or a large download without consent.
        HubError: the Hub or the store does not give it.
        DiskError: the store refuses.
    """
    reference, reach = parse_hub(text), Reach(offline, yes, in_place, whole)
    if reference is not None:
        return _from_hub(reference, kind, reach, None)
    path = Path(text)
    if text.startswith("~") and not exists(text):
        try:
            path = path.expanduser()
        except RuntimeError:  # no such user
            pass
    if text and exists(str(path)):
        real = typed(path)
        origin = None if real == path else path
        return Resolved(real, last_name(path), origin=origin)
    refuse_token(text)
    if ":/" in text and (found := _from_store(text, kind, reach)):
        return found
    match = _BARE.fullmatch(text)
    may_be_hub = match is not None and not _FILE_SUFFIX.search(match["repo"])
    if match is None or not may_be_hub or Path(match["owner"]).is_dir():
        hint = _near_address(text) if _ADDRESS.match(text) else _near(path)
        if match is not None and may_be_hub:
            hint = f"the folder {match['owner']} exists, so a path is meant; else write hf://{text}"
        raise BadFileError("LT-300", "no such file or folder", file=text, hint=hint)
    revision = match["rev"]
    reference = HubReference(match["repo"], unquote(revision) if revision else None)
    return _from_hub(reference, kind, reach, "no such local path")


def exists(text: str) -> bool:
    """True for a path that is there; texts that can be no path are fine."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, a NUL
        return False


def refuse_token(text: str) -> None:
    """Refuse an argument with an access token, or a URL with a login: both end up in logs.

    Raises:
        UsageError: LT-264.
    """
    if TOKEN.search(text) or _LOGIN.search(text):
        raise UsageError(
            "LT-264", "this looks like an access token, which does not belong on a command line",
            hint="hf auth login, or HF_TOKEN in the environment; and revoke this token",
        )  # fmt: skip


def _from_hub(reference: HubReference, kind: str, reach: Reach, guess: str | None) -> Resolved:
    from loratool.store.hub_fetch import fetch

    looked, problem = fetch(reference, kind, reach)
    folder, commit = looked.path, looked.commit
    path = folder.joinpath(*reference.sub.split("/")) if reference.sub else folder
    name = f"{reference.repo_id}@{commit}"
    if not exists(str(path)):
        raise HubError(
            "LT-704", "the repository has no such file", file=name, key=reference.sub,
            hint="check the path after the repository's name",
        )  # fmt: skip
    parts = [part for part in (guess, problem) if part]
    note = f"hub {name} ({'; '.join(parts)})" if parts else None
    label = f"{reference.repo_id}@{commit[:7]}"
    label = f"{label}/{reference.sub}" if reference.sub else label
    return Resolved(path, label, commit, note, remote=looked.remote)


def _from_store(text: str, kind: str, reach: Reach) -> Resolved | None:
    from loratool.store.address import address_of

    address = address_of(text)
    if address is None:
        return None
    from loratool.store.store_source import fetch

    path, folder = fetch(address, kind, reach)
    return Resolved(path, path.name, origin=address, remote=folder)


def _near_address(text: str) -> str:
    from loratool.store.address import meant_by

    return meant_by(text) or _FETCH


def _near(path: Path) -> str | None:
    """A name beside what is not there that was probably meant."""
    import difflib
    import shlex

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = [path.parent / name for name in difflib.get_close_matches(path.name, names)]
    found = next((one for one in close if exists(str(one))), None)  # no link in a circle
    return f"did you mean {shlex.quote(str(found))}?" if found else None
