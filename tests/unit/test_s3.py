"""Outputs in a real object store: S3 as a server on this machine speaks it, with s3fs as driver.

Neither comes with the `test` extra: ``pip install s3fs 'moto[server]'`` (and ``ray``), then
``python -m pytest tests/unit/test_s3.py``.  What can fail is tested without them, by
`tests.faults.test_store`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.cli import run
from loratool.errors import LoratoolError, UsageError
from tests.make import randn, save_checkpoint
from tests.unit.on_ray import killed_in_a_step, two_workers
from tests.unit.test_executors import COMMANDS, call, contents, inputs, long_step

__all__ = ["inputs"]

pytest.importorskip("s3fs", reason="needs s3fs")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    at = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    at.start()
    host, port = at.get_host_and_port()
    yield f"http://{host}:{port}"
    at.stop()


@pytest.fixture(scope="module", autouse=True)
def keys(server: str) -> Iterator[None]:
    """As users have them: in the variables of the driver."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", server)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield


def stored(name: str) -> dict[str, str]:
    """As `contents`."""
    import boto3

    s3, prefix = boto3.client("s3"), f"{name}/"
    found = s3.list_objects_v2(Bucket="bucket", Prefix=name).get("Contents", [])
    keys = [str(item["Key"]) for item in found if not str(item["Key"]).startswith(f"{name}-")]
    bodies = {k: s3.get_object(Bucket="bucket", Key=k)["Body"].read() for k in keys}
    return {k.removeprefix(prefix): hashlib.sha256(v).hexdigest() for k, v in bodies.items()}


def put(command: str, top: Path, name: str, executor: str = "threads", **how: Any) -> Any:
    """`call` with an output in the bucket."""
    return call(command, top, f"s3://bucket/{name}", executor, **how)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_the_bytes_of_a_local_output(
    command: str, executor: str, inputs: Path, tmp_path: Path
) -> None:
    call(command, inputs, tmp_path / "out")
    name = f"{command}-by-{executor}"
    for force in (False, True):
        put(command, inputs, name, executor, force=force)
        assert stored(name) == contents(tmp_path / "out")
    with pytest.raises(LoratoolError) as caught:
        put(command, inputs, name, executor)
    assert caught.value.code == "LT-501"


def test_a_single_file(inputs: Path, tmp_path: Path) -> None:
    file = inputs / "base" / "model-00001-of-00002.safetensors"
    for force in (False, True):
        for out in (str(tmp_path / "one.safetensors"), "s3://bucket/one.safetensors"):
            lt.merge([inputs / "a0"], base=file, output=out, force=force)
    whole = hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    assert stored("one.safetensors") == {"one.safetensors": whole}


def test_what_lies_beside_it_stays(inputs: Path, tmp_path: Path) -> None:
    """Names that only begin as the output's do; and the empty object that a console makes."""
    import boto3

    s3 = boto3.client("s3")
    kept = ("beside2/x", "beside.txt", "beside.loratool-partial2/x")
    for key in (*kept, "beside/"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"" if key.endswith("/") else b"mine")
    call("merge", inputs, tmp_path / "out")
    for force in (False, True):
        put("merge", inputs, "beside", force=force)
        assert {k: v for k, v in stored("beside/").items() if k[-1] != "/"} == {
            f"beside/{name}": digest for name, digest in contents(tmp_path / "out").items()
        }
    listed = s3.list_objects_v2(Bucket="bucket", Prefix="beside")["Contents"]
    assert {o["Key"] for o in listed} - {f"beside/{n}" for n in contents(tmp_path / "out")} == {
        *kept, "beside/",
    }  # fmt: skip
    s3.put_object(Bucket="bucket", Key="taken", Body=b"")
    for force, code in ((False, "LT-501"), (True, "LT-505")):
        with pytest.raises(LoratoolError) as caught:
            put("merge", inputs, "taken", force=force)
        assert caught.value.code == code


def test_many_parts(tmp_path: Path) -> None:
    """A shard that the driver sends in parts; its tag is no md5 then."""
    import boto3

    from tests.make import random_factors, save_adapter

    shape = {"model.layers.0.up_proj": (7000, 4000)}
    save_checkpoint(tmp_path / "base", {f"{k}.weight": randn(*s, seed=1) for k, s in shape.items()})
    save_adapter(tmp_path / "a", random_factors(shape, rank=1, seed=1))
    for out in (str(tmp_path / "out"), "s3://bucket/parts"):
        lt.merge([tmp_path / "a"], base=tmp_path / "base", output=out)
    head = boto3.client("s3").head_object(Bucket="bucket", Key="parts/model.safetensors")
    assert "-" in head["ETag"]
    assert stored("parts") == contents(tmp_path / "out")


def test_a_store_that_refuses(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(inputs / "a1"), "--base", str(inputs / "base"), "-o"]
    assert run([*words, "s3://nobodys-bucket/out"]) == 6
    assert "LT-602" in (said := capsys.readouterr().err) and "s3://nobodys-bucket/out" in said
    assert run([*words, "s3://key:secret@bucket/out"]) == 2
    assert "secret" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------ with Ray


@pytest.fixture(scope="module")
def cluster(keys: None) -> Iterator[Any]:
    with two_workers() as ray:
        yield ray


@pytest.mark.parametrize("command", ["merge", "extract", "compress"])
def test_ray_writes_the_same(command: str, inputs: Path, tmp_path: Path, cluster: Any) -> None:
    call(command, inputs, tmp_path / "out")
    put(command, inputs, f"{command}-by-ray", "ray")
    assert stored(f"{command}-by-ray") == contents(tmp_path / "out")


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_killed_in_the_middle_of_a_shard(
    command: str, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_step(tmp_path, monkeypatch)
    call(command, tmp_path, tmp_path / "out")
    killed_in_a_step(
        lambda: put(command, tmp_path, f"{command}-killed", "ray"), tmp_path, monkeypatch
    )
    assert stored(f"{command}-killed") == contents(tmp_path / "out")


def test_a_single_file_is_no_work_for_ray(inputs: Path, cluster: Any) -> None:
    file = inputs / "base" / "model-00001-of-00002.safetensors"
    with pytest.raises(UsageError) as caught:
        lt.merge([inputs / "a0"], base=file, output="s3://bucket/ray.safetensors", executor="ray")
    assert caught.value.code == "LT-278"
    assert not stored("ray.safetensors")
