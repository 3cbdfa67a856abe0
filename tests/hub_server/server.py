"""HTTP in front of `HubState`: the routes that huggingface_hub uses for models."""

from __future__ import annotations

import base64
import json
import re
import select
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .state import HubState, Large, Repo, git_sha, is_lfs, sha256

_ID = r"(?P<id>[^/]+/[^/]+)"
_REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (method, re.compile(path), name)
    for method, path, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/models/{_ID}/tree/{_REV}(/.*)?", "tree"),
        ("GET", rf"/api/models/{_ID}/refs", "refs"),
        ("GET", rf"/api/models/{_ID}(/revision/{_REV})?", "info"),
        ("GET", rf"/api/(?P<kind>datasets|spaces)/{_ID}", "other"),
        ("POST", rf"/api/models/{_ID}/preupload/{_REV}", "preupload"),
        ("POST", rf"/api/models/{_ID}/commit/{_REV}", "commit"),
        ("POST", rf"/api/models/{_ID}/branch/{_REV}", "branch"),
        ("POST", rf"/api/models/{_ID}/tag/{_REV}", "tag"),
        ("GET", rf"/api/models/{_ID}/xet-(read|write)-token/{_REV}", "xet_token"),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
        ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
        ("GET", rf"/{_ID}/resolve/{_REV}/(?P<file>.+)", "resolve"),
    )
]


class RefusedError(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        self.status, self.code, self.body = status, code, {"error": message, **more}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        verb = "GET" if self.command == "HEAD" else self.command
        self.fault = self.state.fault(f"{self.command} {url.path}")
        size = int(self.headers.get("Content-Length") or 0)
        is_broken = self.fault is not None and self.fault.action.endswith("-request")
        self.body = self.rfile.read(size // 2 if is_broken else size)
        with self.state.lock:
            self.state.uploads.append((url.path, len(self.body)))
        if is_broken:
            self.break_off()
            return
        if len(self.body) < size:  # the client went away
            self.close_connection = True
            return
        try:
            for method, pattern, name in ROUTES:
                match = pattern.fullmatch(url.path)
                if method == verb and match:
                    with self.state.lock:
                        self.state.requests[name] += 1
                    if self.fault and self.fault.run:
                        self.fault.run()
                    if self.fault and self.fault.action == "status":
                        self.send(self.fault.status, self.fault.body, self.fault.headers)
                        return
                    args = {k: v if v is None else unquote(v) for k, v in match.groupdict().items()}
                    with self.state.lock:
                        answer = getattr(self, f"do_{name}")(**args)
                    if self.fault and self.fault.action == "lose":
                        answer = (self.fault.status, b"{}", self.fault.headers)
                    self.send(*answer)
                    return
            raise RefusedError(404, "no such route")
        except RefusedError as error:
            headers = {"X-Error-Message": str(error.body["error"])}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.send(error.status, json.dumps(error.body).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fault = self.fault.action if self.fault else None
        if fault == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        sent = {"Content-Length": str(len(data)), "X-Request-Id": "test", **(headers or {})}
        for key, value in sent.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "hang"):
            data = data[: len(data) // 2]
        self.wfile.write(data)
        with self.state.lock:
            self.state.bytes_sent += len(data)
            self.state.bodies.append((self.path, len(data)))
        if fault in ("cut", "hang"):
            self.wfile.flush()
            self.break_off()

    def break_off(self) -> None:
        """Close the connection, at once or when the client has had enough of silence."""
        assert self.fault is not None
        self.close_connection = True
        if self.fault.action.startswith("hang"):
            self.fault.reached.set()
            wait = select.poll()
            wait.register(self.connection, select.POLLRDHUP)
            wait.poll(60_000)
        with suppress(OSError):  # the client may have closed it
            self.connection.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------------------- access

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def user(self) -> str | None:
        auth = self.headers.get("Authorization")
        if auth is None:
            return None
        name = self.state.users.get(auth.removeprefix("Bearer "))
        if name is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return name

    def repo(self, name: str, *, write: bool = False, files: bool = False) -> Repo:
        user, repo = self.user(), self.state.repos.get(name)
        own = user == name.split("/")[0]
        if repo is None or (repo.private and not own):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if files and repo.gated and not own:
            raise RefusedError(403 if user else 401, "Access is restricted", "GatedRepo")
        if write and not own:
            raise RefusedError(403 if user else 401, "You don't have the rights")
        return repo

    def sha(self, repo: Repo, revision: str | None) -> str:
        sha = repo.resolve(revision or "main")
        if sha is None:
            raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return sha

    # --------------------------------------------------------------------------- reads

    def do_whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        return 200, {"type": "user", "id": "1", "name": user, "fullname": user, "isPro": False,
                     "orgs": [], "auth": auth}  # fmt: skip

    def entry(self, name: str, data: bytes | Large) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": len(data), "oid": git_sha(data)}
        if is_lfs(name, len(data)):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def do_info(self, id: str, rev: str | None) -> Any:
        repo = self.repo(id)
        sha = self.sha(repo, rev)
        siblings = []
        for name, data in sorted(repo.commits[sha].items()):
            row: dict[str, Any] = {"rfilename": name}
            if "blobs" in self.query:
                found = self.entry(name, data)
                row |= {"size": found["size"], "blobId": found["oid"]}
                if "lfs" in found:
                    row["lfs"] = {"sha256": found["lfs"]["oid"], **found["lfs"]}
            siblings.append(row)
        return 200, {"_id": "1", "id": id, "modelId": id, "sha": sha, "private": repo.private,
                     "gated": "auto" if repo.gated else False, "disabled": False, "tags": [],
                     "downloads": 0, "likes": 0, "siblings": siblings,
                     "lastModified": "2026-01-01T00:00:00.000Z"}  # fmt: skip

    def do_other(self, kind: str, id: str) -> Any:
        user, known = self.user(), {"datasets": self.state.datasets, "spaces": self.state.spaces}
        if id not in known[kind]:
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return 200, {"_id": "1", "id": id, "sha": "0" * 40, "private": False, "tags": [],
                     "disabled": False, "gated": False, "downloads": 0, "likes": 0,
                     "siblings": []}  # fmt: skip

    def do_tree(self, id: str, rev: str) -> Any:
        repo = self.repo(id, files=True)
        tree = repo.commits[self.sha(repo, rev)]
        rows = [{"type": "file", "path": n, **self.entry(n, d)} for n, d in sorted(tree.items())]
        return 200, rows

    def do_refs(self, id: str) -> Any:
        repo = self.repo(id)
        kinds = (("branches", repo.branches, "refs/heads/"), ("tags", repo.tags, "refs/tags/"),
                 ("pullRequests", repo.pulls, ""))  # fmt: skip
        return 200, {"converts": []} | {
            kind: [{"name": n, "ref": prefix + n, "targetCommit": s} for n, s in refs.items()]
            for kind, refs, prefix in kinds
        }

    def do_resolve(self, id: str, rev: str, file: str) -> Any:
        repo = self.repo(id, files=True)
        sha = self.sha(repo, rev)
        data = repo.commits[sha].get(file)
        self.state.asked.add((id, file))
        head = {"X-Repo-Commit": sha}
        if data is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        if not is_lfs(file, len(data)):
            return self.ranged(data, {**head, "ETag": f'"{git_sha(data)}"'})
        self.state.objects[sha256(data)] = data
        # Another origin, as the Hub's CDN is: the client must not send its token there.
        place = f"{self.origin.replace('127.0.0.1', 'localhost')}/cdn/{sha256(data)}"
        self.state.signatures += 1
        place += f"?signature={self.state.signatures}"
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        if sha256(data) in self.state.xet_hashes:
            token = f"{self.origin}/api/models/{id}/xet-read-token/{sha}"
            linked |= {"X-Xet-Hash": self.state.xet_hashes[sha256(data)],
                       "X-Xet-Refresh-Route": token}  # fmt: skip
        return 302, b"", {**head, **linked, "Location": place}

    def do_cdn(self, oid: str) -> Any:
        self.state.tokens_on_cdn += "Authorization" in self.headers
        self.state.signed[self.path] += 1
        if self.state.cdn_answers is not None and self.state.signed[self.path] > (
            self.state.cdn_answers
        ):
            raise RefusedError(403, "Request has expired")
        return self.ranged(self.state.objects[oid], {"ETag": f'"{oid}"'})

    def ranged(self, data: bytes | Large, headers: dict[str, str]) -> Any:
        headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None or (self.fault and self.fault.action == "whole"):
            return 200, data[:], headers
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if self.fault and self.fault.action == "shift":
            first, last = first + 1, last + 1
        if first >= len(data):
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"}
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    # -------------------------------------------------------------------------- writes

    def do_create(self) -> Any:
        ask, user = json.loads(self.body), self.user()
        owner = ask.get("organization") or user
        name = f"{owner}/{ask['name']}"
        url = f"{self.origin}/{name}"
        if user is None or owner != user:
            raise RefusedError(403 if user else 401, "You don't have the rights")
        if name in self.state.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        is_private = ask.get("visibility") == "private" or ask.get("private") is True
        self.state.add_repo(name, private=is_private)
        return 200, {"url": url, "name": name, "id": "1"}

    def do_validate(self) -> Any:
        return 200, {"errors": [], "warnings": []}

    def do_xet_token(self, id: str, rev: str) -> Any:
        self.repo(id)
        if self.state.xet_place is None:
            raise RefusedError(404, "no such route")
        place, token, end = self.state.xet_place, self.state.xet_token, 4_102_444_800
        return 200, {"casUrl": place, "accessToken": token, "exp": end}, {
            "X-Xet-Cas-Url": place, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end),
        }  # fmt: skip

    def do_preupload(self, id: str, rev: str) -> Any:
        repo = self.repo(id, write="create_pr" not in self.query)
        sha = self.sha(repo, rev)
        rows = []
        for ask in json.loads(self.body)["files"]:
            data = repo.commits[sha].get(ask["path"])
            large = is_lfs(ask["path"], ask["size"])
            oid = None if data is None else sha256(data) if large else git_sha(data)
            rows.append({"path": ask["path"], "uploadMode": "lfs" if large else "regular",
                         "shouldIgnore": False, "oid": oid})  # fmt: skip
        return 200, {"files": rows, "commitOid": sha}

    def do_batch(self, id: str) -> Any:
        self.repo(id)
        rows, parts = [], self.state.part_bytes
        for ask in json.loads(self.body)["objects"]:
            oid, size = ask["oid"], ask["size"]
            row: dict[str, Any] = {"oid": oid, "size": size}
            url = f"{self.origin}/lfs/{oid}"
            if oid not in self.state.objects:
                upload: dict[str, Any] = {"href": url + self.state.signature}
                if parts:
                    count = -(-size // parts)
                    header = {
                        f"{i + 1:05d}": f"{url}/{i + 1}{self.state.signature}" for i in range(count)
                    }
                    header["chunk_size"] = str(parts)
                    upload = {"href": f"{url}/complete", "header": header}
                row["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            rows.append(row)
        return 200, {"transfer": "multipart" if parts else "basic", "objects": rows}

    def do_put(self, oid: str, part: str | None) -> Any:
        self.state.objects[f"{oid}/{part}" if part else oid] = self.body
        return 200, b"", {"ETag": f'"{sha256(self.body)}"'}

    def do_complete(self, oid: str) -> Any:
        numbers = [p["partNumber"] for p in json.loads(self.body)["parts"]]
        self.state.objects[oid] = b"".join(self.state.objects[f"{oid}/{n}"] for n in numbers)
        return 200, {}

    def do_verify(self, oid: str) -> Any:
        if sha256(self.state.objects.get(oid, b"")) != oid:
            raise RefusedError(400, "the object's sha256 is another")
        return 200, {}

    def do_commit(self, id: str, rev: str) -> Any:
        is_pull = "create_pr" in self.query
        repo = self.repo(id, write=not is_pull)
        parent = self.sha(repo, rev)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.state.content(value["oid"])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = repo.commit(tree, header["summary"], parent)
        answer = {"success": True, "commitOid": sha, "hookOutput": "",
                  "commitUrl": f"{self.origin}/{id}/commit/{sha}"}  # fmt: skip
        if is_pull:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.origin}/{id}/discussions/{number}"
        else:
            (repo.pulls if rev in repo.pulls else repo.branches)[rev] = sha
        return 200, answer

    def do_branch(self, id: str, rev: str) -> Any:
        repo = self.repo(id, write=True)
        if rev in repo.branches:
            raise RefusedError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint")
        repo.branches[rev] = self.sha(repo, start)
        return 200, {}

    def do_tag(self, id: str, rev: str) -> Any:
        repo = self.repo(id, write=True)
        repo.tags[json.loads(self.body)["tag"]] = self.sha(repo, rev)
        return 200, {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: HubState

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.state.lock:
            self.state.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


class TestHub:
    """A running test Hub; use it as a context manager."""

    __test__ = False

    def __init__(self) -> None:
        self.state = HubState()
        handler = type("Bound", (Handler,), {"state": self.state})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.state = self.state
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    def __enter__(self) -> TestHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.state.check_no_tokens()
