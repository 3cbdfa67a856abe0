"""Outputs and inputs in a real object store: S3 as a server here speaks it, with s3fs as driver.

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
from loratool.store import object_store, store_range
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


# -------------------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def far(inputs: Path, keys: None) -> str:
    """The same inputs in the bucket."""
    import boto3

    s3 = boto3.client("s3")
    for path in inputs.rglob("*"):
        if path.is_file():
            name = path.relative_to(inputs).as_posix()
            s3.put_object(Bucket="bucket", Key=f"in/{name}", Body=path.read_bytes())
    return "s3://bucket/in"


class Place(str):
    """An address that goes on as paths do."""

    def __truediv__(self, name: object) -> Place:
        return Place(f"{self}/{name}")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_the_bytes_of_local_inputs(
    command: str, executor: str, inputs: Path, far: str, tmp_path: Path
) -> None:
    call(command, inputs, tmp_path / "near")
    call(command, Place(far), tmp_path / "far", executor)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_looks(inputs: Path, far: str) -> None:
    for name in ("a1", "base"):
        found = [lt.inspect(f"{top}/{name}").to_json() for top in (inputs, far)]
        for key in ("adapter", "checkpoint"):
            assert found[0][key] == found[1][key]
    assert lt.verify(f"{far}/tuned").verdict == "identical"


def test_an_object_that_is_replaced_meanwhile(
    far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of the same size, while the base is read: by its tag it is another one."""
    import boto3

    s3, name = boto3.client("s3"), "in/base/model-00001-of-00002.safetensors"
    whole = s3.get_object(Bucket="bucket", Key=name)["Body"].read()
    read = store_range.read_range

    def replace(file: Any, start: int, count: int) -> bytes:
        data = read(file, start, count)
        if str(file).endswith(name) and start:
            s3.put_object(Bucket="bucket", Key=name, Body=whole[:-1] + b"\1")
        return data

    monkeypatch.setattr(store_range, "read_range", replace)
    with pytest.raises(LoratoolError) as caught:
        call("merge", Place(far), tmp_path / "out")
    s3.put_object(Bucket="bucket", Key=name, Body=whole)
    assert caught.value.code == "LT-332" and str(caught.value.file) == f"s3://bucket/{name}"
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_refused(
    far: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, exit_code, code in (("s3://nobodys-bucket/a", 3, "LT-300"),
                                    ("s3://bucket/nothing", 3, "LT-300")):  # fmt: skip
        assert run(["inspect", source]) == exit_code
        assert code in (said := capsys.readouterr().err) and source in said
    monkeypatch.setattr(object_store, "WAITS", (0.0,))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    assert run(["inspect", f"{far}/a1"]) == 6
    said = capsys.readouterr().err
    assert "LT-601" in said and "takes keys from its own variables" in said
    s3fs.S3FileSystem.clear_instance_cache()


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
def test_ray_reads_the_same(
    command: str, inputs: Path, far: str, tmp_path: Path, cluster: Any
) -> None:
    call(command, inputs, tmp_path / "out")
    call(command, Place(far), f"s3://bucket/{command}-from-far", "ray")
    assert stored(f"{command}-from-far") == contents(tmp_path / "out")


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
