"""loratool against the test Hub: in this process, or in one of its own."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from huggingface_hub.utils import logging as hub_logging

from loratool import cli
from tests.hub_server import TestHub

TOKEN = "hf_tokenofmetokenofmetokenofme"
ROOT = Path(__file__).parents[2]


def call(
    hub: TestHub, home: Path, *words: str, token: str = TOKEN, **settings: object
) -> tuple[int, str]:
    """Run a command in this process: exit code, and all that it prints or logs.

    What the client reads from the environment when it is imported is set in its place.

    Args:
        home: working folder; the client's cache is ``hf`` in it.
        settings: other constants of the client.
    """
    code, out, trouble = call_apart(hub, home, *words, token=token, **settings)
    return code, out + trouble


def call_apart(
    hub: TestHub, home: Path, *words: str, token: str = TOKEN, **settings: object
) -> tuple[int, str, str]:
    """`call` with stdout and stderr apart."""
    out, trouble = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(trouble)
    client = hub_logging.get_logger()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(trouble):
        _clean_environment(patch)
        patch.setenv("HF_TOKEN", token)
        patch.chdir(home)
        for name, value in _constants(hub, home / "hf", settings).items():
            patch.setattr(constants, name, value)
        client.addHandler(handler)
        try:
            code = cli.run(list(words))
        finally:
            client.removeHandler(handler)
            close_session()  # its time limits are this run's
    assert token not in out.getvalue() + trouble.getvalue()
    assert hub.state.tokens_on_cdn == 0
    return code, out.getvalue(), trouble.getvalue()


def _clean_environment(patch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("HF_")]:
        patch.delenv(name)


def _constants(hub: TestHub, hf: Path, settings: dict[str, object]) -> dict[str, object]:
    return {
        "ENDPOINT": hub.endpoint, "HF_HOME": str(hf), "HF_HUB_CACHE": str(hf / "hub"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(hf / "token"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    } | settings  # fmt: skip


def start(
    endpoint: str, home: Path, *words: str, token: str | None = TOKEN,
    before: tuple[str, ...] = (), **variables: str,
) -> subprocess.Popen[str]:  # fmt: skip
    """Start a command in a process of its own.

    Args:
        before: a command that runs it, such as strace.
        variables: of its environment.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1",
           "PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {})}  # fmt: skip
    return subprocess.Popen(
        [*before, sys.executable, "-m", "loratool", *words], cwd=home,
        env=clean | env | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it printed."""
    text, _ = process.communicate(timeout=120)
    assert TOKEN not in text
    return process.returncode, text


def run(hub: TestHub, home: Path, *words: str, token: str = TOKEN) -> tuple[int, str]:
    """`call` in a process of its own."""
    code, text = finish(start(hub.endpoint, home, *words, token=token))
    assert token not in text and hub.state.tokens_on_cdn == 0
    return code, text


def tree(folder: Path) -> dict[str, bytes]:
    """Path in the folder -> content, of all files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip
