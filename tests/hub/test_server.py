"""The test Hub answers the real client as the Hub does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

from tests.hub_server import Fault, TestHub

TOKEN = "hf_tokenofmetokenofmetokenofme"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with TestHub() as hub:
        yield hub


def api_of(hub: TestHub, token: str | bool = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def fetch(hub: TestHub, tmp: Path, name: str, revision: str = "main") -> bytes:
    path = api_of(hub).hf_hub_download("me/x", name, revision=revision, cache_dir=tmp / "cache")
    return Path(path).read_bytes()


@pytest.mark.parametrize("part_bytes", [None, 1_000_000])
def test_push_then_pull_is_byte_identical(
    served: TestHub, tmp_path: Path, part_bytes: int | None
) -> None:
    served.state.part_bytes = part_bytes
    api, large, small = api_of(served), os.urandom(2_500_001), b'{"r": 8}\n'
    api.create_repo("me/x", private=True)
    added = [CommitOperationAdd("adapter_model.safetensors", large),
             CommitOperationAdd("adapter_config.json", small)]  # fmt: skip
    api.create_commit("me/x", added, commit_message="m")
    assert served.state.repos["me/x"].private
    assert fetch(served, tmp_path, "adapter_model.safetensors") == large
    assert fetch(served, tmp_path, "adapter_config.json") == small
    assert served.state.tokens_on_cdn == 0
    assert served.state.requests["complete"] == (part_bytes is not None)


def test_one_of_concurrent_commits_lands(served: TestHub) -> None:
    api, repo = api_of(served), served.state.add_repo("me/x")
    parent = repo.branches["main"]

    def push(i: int) -> str | int:
        one = [CommitOperationAdd(f"{i}.json", b"{}")]
        try:
            return api.create_commit("me/x", one, commit_message="m", parent_commit=parent).oid
        except errors.HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(push, range(4)))
    assert found.count(412) == 3 and len(repo.commits) == 2


def test_branches_tags_and_pull_requests(served: TestHub, tmp_path: Path) -> None:
    api = api_of(served)
    served.state.add_repo("me/x", {"a.json": b"1"})
    api.create_branch("me/x", branch="exp/a")
    api.create_tag("me/x", tag="v1")
    one = [CommitOperationAdd("a.json", b"2")]
    info = api.create_commit("me/x", one, commit_message="m", create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    found = [fetch(served, tmp_path, "a.json", r) for r in ("exp/a", "v1", "refs/pr/1", "main")]
    assert found == [b"1", b"1", b"2", b"1"]
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info("me/x", revision="v2")


def test_access(served: TestHub) -> None:
    served.state.add_repo("you/private", private=True)
    served.state.add_repo("you/gated", {"a.json": b"1"}, gated=True)
    for token in (TOKEN, False):
        with pytest.raises(errors.RepositoryNotFoundError):
            api_of(served, token).model_info("you/private")
        with pytest.raises(errors.GatedRepoError):
            api_of(served, token).hf_hub_download("you/gated", "a.json")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api_of(served, "hf_nobodynobodynobodynobody").model_info("you/gated")
    assert caught.value.response.status_code == 401


def test_listing_has_sizes_and_hashes(served: TestHub) -> None:
    served.state.add_repo("me/x", {"a.safetensors": b"x" * 10, "b.json": b"{}"})
    info = api_of(served).model_info("me/x", files_metadata=True)
    rows = {s.rfilename: s for s in info.siblings or ()}
    assert rows["a.safetensors"].size == 10 and rows["a.safetensors"].lfs is not None
    assert rows["b.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's sha of "{}"


def test_faults(served: TestHub, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    served.state.add_repo("me/x", {"a.safetensors": data, "b.safetensors": data[:5000]})
    served.state.faults = [Fault("GET /cdn/", "cut"), Fault("GET /cdn/", "corrupt")]
    # The cut body is resumed; the second answer is corrupt in its last byte, at the same size.
    found = fetch(served, tmp_path, "a.safetensors")
    assert len(found) == len(data) and found[:-1] == data[:-1] and found[-1] == data[-1] ^ 1
    served.state.faults = [Fault("POST .*/commit/", "lose", 500)]
    with pytest.raises(errors.HfHubHTTPError):
        one = [CommitOperationAdd("c.json", b"{}")]
        api_of(served).create_commit("me/x", one, commit_message="m")
    repo = served.state.repos["me/x"]
    assert "c.json" in repo.commits[repo.branches["main"]]
