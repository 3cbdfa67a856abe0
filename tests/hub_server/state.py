"""What the test Hub holds: repositories as commits of whole trees, blobs by their sha256."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Tree = dict[str, "bytes | Large"]
LFS_BYTES = 1000  # files of this size or with these endings are LFS
LFS_NAMES = (".safetensors", ".bin", ".model")


def is_lfs(name: str, size: int) -> bool:
    return size >= LFS_BYTES or name.endswith(LFS_NAMES)


@dataclass(frozen=True)
class Large:
    """A large file that is never in memory: its first bytes, then zeros."""

    head: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, cut: slice) -> bytes:
        first, last, _ = cut.indices(self.size)
        part = self.head[first:last]
        return part + bytes(last - first - len(part))


def git_sha(data: bytes | Large) -> str:
    if isinstance(data, Large):
        return sha256(data)[:40]
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes | Large) -> str:
    """Of a large file a stand-in: a client that does not read it all cannot tell."""
    if isinstance(data, Large):
        data = data.head + b"%d" % data.size
    return hashlib.sha256(data).hexdigest()


@dataclass
class Fault:
    """Done to the next ``times`` requests whose "METHOD path" matches ``pattern``.

    Attributes:
        action: ``status`` (answer it, and ``body``, instead), ``cut`` (close after half the body),
            ``hang`` (say nothing more after half the body), ``cut-request``, ``hang-request`` (the
            same while half of the request's body is read), ``corrupt`` (same size, one byte wrong),
            ``lose`` (do it, then answer ``status``), ``whole`` (ignore the range asked for),
            ``shift`` (send another range), ``race`` (call ``run`` first, as if somebody else had
            been faster).
        reached: set when a ``hang`` has begun; it lasts until the client goes away.
    """

    pattern: str
    action: str
    status: int = 503
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    run: Callable[[], object] | None = None
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    """A repository; every commit is a whole tree."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Commit of a branch, tag, pull request or commit."""
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None

    def commit(self, tree: Tree, title: str, parent: str | None) -> str:
        body = repr((sorted((n, sha256(d)) for n, d in tree.items()), title, parent))
        sha = hashlib.sha1(body.encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[sha], self.parents[sha], self.titles[sha] = dict(tree), parent, title
        return sha


class HubState:
    """All repositories, users, uploaded objects, counters and faults."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {"hf_tokenofmetokenofmetokenofme": "me"}
        self.repos: dict[str, Repo] = {}
        self.datasets: set[str] = set()
        self.spaces: set[str] = set()
        self.objects: dict[str, bytes | Large] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.bytes_sent = 0
        self.bodies: list[tuple[str, int]] = []  # path and bytes of each answer
        self.uploads: list[tuple[str, int]] = []  # and of each request's body
        self.asked: set[tuple[str, str]] = set()  # (repository, file), whatever was sent of it
        self.tokens_on_cdn = 0
        self.connections = 0
        self.cdn_answers: int | None = None  # a signed address is good for so many, None = all
        self.signatures = 0
        self.signed: Counter[str] = Counter()
        self.part_bytes: int | None = None  # multipart uploads in parts of this size
        self.signature = ""  # of the addresses of uploads
        self.xet_place: str | None = None  # address of the content store
        self.xet_token = "xet-token-of-this-test-hub"
        self.xet_hashes: dict[str, str] = {}  # sha256 -> name in that store
        self.from_xet: Callable[[str], bytes] | None = None  # reads by that name

    def add_repo(self, name: str, files: Tree | None = None, **kind: bool) -> Repo:
        with self.lock:
            repo = self.repos[name] = Repo(name, **kind)
            sha = repo.commit({".gitattributes": b"", **(files or {})}, "initial commit", None)
            repo.branches["main"] = sha
            return repo

    def content(self, oid: str) -> bytes | Large:
        """An uploaded object, wherever it went."""
        if oid not in self.objects and self.from_xet and oid in self.xet_hashes:
            self.objects[oid] = self.from_xet(self.xet_hashes[oid])
        return self.objects[oid]

    def fault(self, request: str) -> Fault | None:
        """Take the first fault that fits."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def check_no_tokens(self) -> None:
        """What was uploaded or committed holds nobody's token."""
        trees = [tree for repo in self.repos.values() for tree in repo.commits.values()]
        for data in (*self.objects.values(), *(d for tree in trees for d in tree.values())):
            part = data.head if isinstance(data, Large) else data
            assert not any(token.encode() in part for token in self.users)
