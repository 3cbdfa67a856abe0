"""`pull` from a server that nobody here wrote: olah, in front of a git repository.

``make test-olah`` installs it; the test is skipped where ``olah-cli`` is not on the path.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.hub.client import finish, start, tree
from tests.hub_server.state import sha256

OLAH = shutil.which("olah-cli")
pytestmark = pytest.mark.skipif(
    not (OLAH and shutil.which("git")), reason="olah or git is not installed"
)

WEIGHTS = random.Random(5).randbytes(400_000)
FILES = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base", "r": 8}',
    "adapter_model.safetensors": WEIGHTS,
    "sub/adapter_config.json": b"{}",
    "sub/adapter_model.safetensors": random.Random(6).randbytes(5000),
    "notes.txt": b"x" * 300,
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A git repository whose first weight file is in LFS."""
    folder = tmp_path / "mirrors" / "models" / "org" / "style"
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    oid = sha256(WEIGHTS)
    git(folder, "init", "-q")
    (folder / "adapter_model.safetensors").write_text(POINTER.format(oid, len(WEIGHTS)))
    stored = folder / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4]
    stored.mkdir(parents=True)
    (stored / oid).write_bytes(WEIGHTS)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "tag", "v1")
    return folder


@pytest.fixture
def endpoint(tmp_path: Path, repo: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = f"127.0.0.1:{port}"
    (tmp_path / "olah.toml").write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/cached"\n'
        f'mirrors-path = ["{tmp_path}/mirrors"]\n'
        f'mirror-netloc = "{place}"\nmirror-lfs-netloc = "{place}"\n'
        "[accessibility]\noffline = true\n"
    )
    words = ("--config", "olah.toml", "--host", "127.0.0.1", "--port", str(port))
    with (tmp_path / "olah.log").open("wb") as log:
        server = subprocess.Popen(
            [str(Path(str(OLAH)).absolute()), *words], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            try:
                with urlopen(f"http://{place}/api/models/org/style/revision/main"):
                    break
            except URLError:
                assert server.poll() is None, (tmp_path / "olah.log").read_text()
                time.sleep(0.1)
        yield f"http://{place}"
    finally:
        server.terminate()
        server.wait(30)


def pull(endpoint: str, home: Path, *words: str) -> tuple[int, str]:
    return finish(start(endpoint, home, "pull", *words, token=None))


def test_pull(endpoint: str, repo: Path, tmp_path: Path) -> None:
    code, text = pull(endpoint, tmp_path, "org/style", "-o", "out")
    assert code == 0 and git(repo, "rev-parse", "HEAD") in text, text
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert tree(tmp_path / "out") == {n: FILES[n] for n in names}
    (repo / "notes.txt").write_text("newer")
    git(repo, "commit", "-q", "-a", "-m", "second")
    code, text = pull(endpoint, tmp_path, "org/style@v1", "--all", "-o", "v1")
    assert code == 0 and git(repo, "rev-parse", "v1") in text, text
    assert tree(tmp_path / "v1") == FILES
    code, text = pull(endpoint, tmp_path, "hf://org/style/sub", "-o", "sub")
    assert code == 0, text
    assert tree(tmp_path / "sub") == {n[4:]: d for n, d in FILES.items() if n[:4] == "sub/"}
