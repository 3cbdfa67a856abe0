"""Seeded changes of whole files of one kind: their bytes, or the values inside them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import zlib
from collections.abc import Callable
from typing import Any

import yaml

from tests.faults.fuzz import mutate
from tests.faults.fuzz.mutate import NUMBERS, ODD, RAW, STRINGS, mutate_bytes, mutate_tree

TABLE = "loratool.patches"


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file, most often with a header of another form."""
    return mutate.mutate_safetensors(data, data, rng)


def any_file(data: bytes, rng: random.Random) -> bytes:
    """A configuration, or the header or the tensors of a file."""
    if data.startswith(b"{"):
        return mutate.mutate_json(data, rng)
    return rng.choice((safetensors, mutate.mutate_tensors))(data, rng)


def weights(data: bytes, rng: random.Random) -> bytes:
    """A file of weights: bits of tensors turned, or anything else of it changed."""
    if rng.random() < 0.3:
        return safetensors(data, rng)
    out, start = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 3))):
        out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def gguf(data: bytes, rng: random.Random) -> bytes:
    """A GGUF file with other bytes, or other numbers in its header."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(4, min(len(out) - 8, 1200)), rng.choice((4, 8))
        number = rng.choice((0, 1, 8, 9, 1 << rng.randrange(64), (1 << 64) - 1))
        out[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _file(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# ------------------------------------------------------------------------------- tables, records


def patch_file(data: bytes, rng: random.Random) -> bytes:
    """Another table, now and then badly packed; or another file around it."""
    kind = rng.randrange(12)
    if kind == 0:
        return safetensors(data, rng)
    header, body = _header(data)
    start, end = header[TABLE]["data_offsets"]
    packed = body[start:end]
    if kind == 1:
        packed = mutate_bytes(packed, rng)
    elif kind == 2:  # what lies behind the table: a patch
        body = body[:end] + mutate_bytes(body[end:], rng)
        body += bytes(max(0, len(data) - len(body)))
    else:
        table = mutate_tree(json.loads(zlib.decompress(packed)), rng)
        text = mutate.dump(table, rng)
        packed = zlib.compress(mutate_bytes(text, rng) if kind == 3 else text)
    shift = len(packed) - (end - start)
    body = body[:start] + packed + body[end:]
    header[TABLE] |= {"shape": [len(packed)], "data_offsets": [start, start + len(packed)]}
    for name, entry in header.items():
        if name not in (TABLE, "__metadata__") and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at + shift for at in entry["data_offsets"]]
    return _file(header, body)


def _sealed(record: Any) -> Any:
    """The seal set right again, so that what is behind it is read."""
    if not isinstance(record, dict):
        return record
    plain = {k: v for k, v in record.items() if k != "seal"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return plain | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def record(data: bytes, rng: random.Random) -> bytes:
    """A ``loratool.json``, mostly with a seal that fits."""
    if rng.random() < 0.3:
        return mutate.mutate_json(data, rng)
    return mutate.dump(_sealed(mutate_tree(json.loads(data), rng)), rng)


def record_in_file(data: bytes, rng: random.Random) -> bytes:
    """The same in the metadata of a single file."""
    header, body = _header(data)
    said = header["__metadata__"]
    said["loratool"] = record(said["loratool"].encode(), rng).decode("utf-8", "replace")
    return safetensors(data, rng) if rng.random() < 0.1 else _file(header, body)


def lines(data: bytes, rng: random.Random) -> bytes:
    """A journal: lines changed, mostly with a checksum that fits, dropped, doubled, reordered."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    rows = [line for line in data.split(b"\n") if line]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(rows)), rng.randrange(8)
        if kind == 0 and len(rows) > 1:
            del rows[at]
        elif kind == 1:
            rows.insert(rng.randrange(len(rows) + 1), rows[at])
        elif kind == 2:
            rng.shuffle(rows)
        elif rows[at][9:].startswith(b"{"):
            try:
                tree = mutate_tree(json.loads(rows[at][9:]), rng)
            except (ValueError, RecursionError):
                continue
            body = mutate.dump(tree, rng).replace(b"\n", b" ")
            rows[at] = b"%08x " % zlib.crc32(body) + body
    return b"\n".join(rows) + b"\n"


# ------------------------------------------------------------------------------- text


_YAML = ("!!int ''", "!!bool maybe", "!!timestamp x", "2024-13-45", "!!python/object:os.system x",
         "&a [*a]", "*x", "{a: 1, a: 2}", "? [a, b]\n: 1", "<<: {a: 1}", "!!binary ====", "1e999",
         "0o77", ".nan", ".inf", "-.inf", "~", "'", '"', "|", ">", "|+", "%YAML 9.9", "---", "...",
         "- " * 3000, "[" * 3000, "{" * 300, "9" * 5000, "1:" * 50, "&a " * 9, "!<x> y", "\t", "@",
         "`", "[*a, &a 1]", "!!set {a}", "!!omap [a: 1]", "!!null x", "yes", "0b2", "1_0", "\x07",
         "\\x", '"\\ud800"', '"\\U0011ffff"', "a{99999999999}", "(a+)+b", "s/(/x/")  # fmt: skip


def _yaml_text(tree: Any, rng: random.Random) -> str:
    try:
        text = str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5,
                                  default_flow_style=rng.choice((None, True, False))))  # fmt: skip
    except (yaml.YAMLError, ValueError):
        text = json.dumps(tree, default=str)
    except RecursionError:
        text = "- " * rng.choice((60, 70, 3000))
    if rng.random() < 0.4 and ": " in text:
        at = rng.choice([i for i, c in enumerate(text) if text[i : i + 2] == ": "])
        end = text.find("\n", at)
        cut = end if rng.random() < 0.5 else at + 2
        text = text[: at + 2] + rng.choice((*_YAML, *RAW)) + " " + text[cut:]
    return text


def _encoded(text: str, rng: random.Random) -> bytes:
    raw = text.encode(rng.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig")), "replace")
    return mutate_bytes(raw, rng) if rng.random() < 0.15 else raw


def yaml_file(data: bytes, rng: random.Random) -> bytes:
    """Another document."""
    tree = yaml.safe_load(data)
    for _ in range(rng.choice((0, 1, 2))):
        tree = mutate_tree(tree, rng)
    return _encoded(_yaml_text(tree, rng), rng)


def card(data: bytes, rng: random.Random) -> bytes:
    """Another front matter, or another text around it."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    _, front, text = data.decode().split("---\n", 2)
    end = rng.choice(("---\n",) * 9 + ("", "--- \n", "---", "----\n", "---\r\n"))
    return _encoded(f"---\n{_yaml_text(mutate_tree(yaml.safe_load(front), rng), rng)}{end}{text}",
                    rng)  # fmt: skip


def tokenizer(data: bytes, rng: random.Random) -> bytes:
    """A file of a tokenizer or beside it: JSON, or bytes."""
    if data[:1] not in (b"{", b"["):
        return mutate_bytes(data, rng)
    return mutate.mutate_json(data, rng)


def pushed(data: bytes, rng: random.Random) -> bytes:
    """A file of an adapter that is published."""
    return mutate.mutate_json(data, rng) if data[:1] == b"{" else safetensors(data, rng)


# ------------------------------------------------------------------------------- pickles


def pickle_file(data: bytes, rng: random.Random) -> bytes:
    """Other bytes, or another object pickled."""
    import torch

    if rng.random() < 0.6:
        return mutate_bytes(data, rng)
    found = dict(torch.load(io.BytesIO(data), weights_only=True))
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(found)) if found else "a"
        odd: Callable[[], Any] = rng.choice((
            lambda: rng.choice((*NUMBERS, *STRINGS, *ODD)),
            lambda: {"a": {"b": torch.ones(2)}},
            lambda: torch.zeros(rng.choice(((), (0,), (3, 0), (1,) * 9, (2, 3)))),
            lambda: torch.ones(1).expand(rng.choice((5, 1 << 20, 1 << 40))),
            lambda: torch.zeros(2, 3, dtype=rng.choice((torch.int8, torch.bool, torch.complex64,
                                                        torch.float64, torch.bfloat16))),
            lambda: torch.eye(3).to_sparse(),
            lambda: torch.zeros(4)[1:],
        ))  # fmt: skip
        if rng.random() < 0.5:
            found[name] = odd()
        else:
            found[rng.choice((*STRINGS, 5, None, (1, 2), "x.lora_A.weight"))] = odd()
    whole: Any = rng.choice((found, found, found, {"state_dict": found}, [found], odd()))
    out = io.BytesIO()
    torch.save(whole, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue()


class _Forked:
    """As much of `subprocess.Popen` as the conversion of pickles uses, without a new Python."""

    def __init__(self, _words: object, *, stdin: Any, **_: object) -> None:
        from loratool.engine import unpickle

        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code: object = 70
            try:
                for fd, name in ((stdin.fileno(), 0), (to_out, 1), (to_err, 2)):
                    os.dup2(fd, name)
                import sys

                sys.stdin = os.fdopen(0, "r", closefd=False)
                sys.stdout = os.fdopen(1, "w", closefd=False)
                sys.stderr = os.fdopen(2, "w", closefd=False)
                unpickle.main()
                code = 0
            except SystemExit as done:
                code = done.code
            finally:
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0)
        os.close(to_out)
        os.close(to_err)
        self.stdout, self.stderr = os.fdopen(out, "rb"), os.fdopen(err, "rb")
        self._code: int | None = None

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, 9)


def open_pickles_in_forks() -> None:
    """From now on in this process: 0.05 s each instead of the start of a Python with torch."""
    from loratool.store import unpickled

    unpickled.subprocess.Popen = _Forked  # type: ignore[assignment,misc]


# ------------------------------------------------------------------------------- the Hub


def use_hub(endpoint: str) -> None:
    """What the Hub's client reads from the environment when it is imported, set in its place."""
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True


# ------------------------------------------------------------------------------- command lines


_NUMBERS = ("nan", "NaN", "inf", "-inf", "infinity", "1e309", "-1e309", "9" * 400, "9" * 5000, "-1",
            "0", "-0", "0.0", "-0.0", "", " ", "1e-400", "5e-324", "1e308", "1e30", "1e31", "-1e31",
            "0x10", "1_000", "１２", "½", "²", "1,5", "1.5", "true", "null", "None", "auto", "+1",
            "--", "-", "1e5", "4294967296", "18446744073709551616", "1" + "0" * 30, "8192", "8193",
            "1;2", "1:2", "=", "=1", "a=", "x" * 5000, "\udcff", "\n", "0.5", "2", "٣")  # fmt: skip
_UNITS = ("", "B", "KB", "MB", "GB", "TB", "MiB", "GiB", "%", "XB", " GB", "gb", "EB")
_PLACES = (".", "..", "/", "", "./", "../", "//", "/.", "/..", "x" * 245, "x" * 256, "x" * 5000,
           "é" * 130, "a/b/c/d", "in/style", "in/base", "in", "work", "work/", "work/.", "work/..",
           "~", "-", "/dev/null", "/dev/stdout", "/proc/self/fd",
           "in/style/adapter_model.safetensors",
           "in/style/new", "work/o\n", "work/\udcff", "work/\x1b[31m", "...", " ", "work/ ", "con",
           "work/out.safetensors", "work/out.bin", "work/x.safetensors/", "in/../work/out", "NUL",
           "work/out:2", "work/out/", "in/one.safetensors")  # fmt: skip
_NUMBER = (
    "rescale in/style {n}", "rescale in/style 0.5 --only layers.0={n}",
    "rescale in/style 1 --only {n}",
    "rescale in/style 1 --blocks {n},1", "rescale in/style 1 --intruders {n} --base in/base",
    "rescale in/style {n} --dtype float16", "rescale in/style 2 --alpha {n}",
    "merge in/style:{n} --base in/base", "merge in/style:unet={n} --base in/base",
    "merge in/style --weights {n} --base in/base", "merge in/style in/sql --weights 1,{n}",
    "merge in/style in/sql:{n}", "merge in/style in/sql:{n} --rank 1",
    "merge in/style --base in/base --alpha {n}", "merge in/style --base in/base --threads {n}",
    "merge in/style --base in/base --rounding stochastic --seed {n}",
    "merge in/style in/sql --method ties --param density={n}",
    "merge in/style in/sql --method dare --param density={n} --seed {n}",
    "merge in/style in/sql --method {n}", "merge in/style in/sql --param {n}",
    "merge in/style in/sql --rank {n}", "merge in/style in/sql --method slerp --param t={n}",
    "merge in/style --base in/base --device {n}", "merge in/style --base in/base --dtype {n}",
    "merge in/style --base in/base --rename {n}", "merge in/style --base in/base --skip {n}",
    "compress in/style --rank {n}", "compress in/style --energy {n}",
    "compress in/style --error {n}",
    "compress in/style --sv-ratio {n}", "compress in/style --rank 1 --max-rank {n}",
    "compress in/style --rank 1 --threads {n}", "compress in/style --rank auto --base {n}",
    "extract in/tuned --base in/base --rank {n}", "extract in/tuned --base in/base --energy {n}",
    "extract in/tuned --base in/base --error {n}", "extract in/tuned --base in/base --max-rank {n}",
    "extract in/tuned --base in/base --keep {n}", "extract in/tuned --base in/base --include {n}",
    "subtract in/style in/sql:{n}", "subtract in/style --from in/merged --weights {n}",
    "swap in/style:{n} in/sql --in in/merged", "swap in/style in/sql:{n} --in in/merged",
    "merge in/style in/sql --rank 1 --mean --weights {n},{n}",
)  # fmt: skip
_SIZE = (
    "merge in/style --base in/base --max-memory {s}",
    "merge in/style --base in/base --shard-size {s}",
    "merge in/style --base in/base --max-header {s}", "compress in/style --size {s}",
    "extract in/tuned --base in/base --size {s}", "compress in/style --rank 1 --max-memory {s}",
    "rescale in/style 2 --max-memory {s}", "rescale in/style 2 --max-header {s}",
    "merge in/style in/sql --max-memory {s}",
)  # fmt: skip
_READ = (
    "inspect in/style --alpha {n}", "inspect in/style --threads {n} --spectrum",
    "inspect in/style --max-header {s}", "inspect in/style --max-memory {s} --spectrum",
    "compare in/style in/sql --alpha {n}", "compare in/style in/sql --max-memory {s}",
    "verify in/merged --weights {n}", "verify in/merged --base in/base --adapter in/style:{n}",
    "inspect {p}", "compare in/style {p}", "verify {p}", "inspect in/style --base {p}",
    "run {p}", "merge {p} --base in/base -o work/out", "merge in/style --base {p} -o work/out",
    "rescale {p} 2 -o work/out", "inspect in/style --csv {p}", "inspect in/style --plot {p}",
    "merge in/style --base in/base --module-weights {p} -o work/out", "{n}", "{n} in/style",
)  # fmt: skip
_WRITE = (
    "rescale in/style 2", "merge in/style --base in/base", "merge in/style in/sql",
    "compress in/style --rank 1", "extract in/tuned --base in/base --rank 1",
    "merge in/style --base in/one.safetensors", "subtract in/style in/sql",
    "rescale in/style in/sql 2",
    "extract in/tuned --base in/base --save-residual work/r.safetensors",
)  # fmt: skip


def arguments(rng: random.Random) -> list[str]:
    """A command line with a number, size or place that cannot be, or just about."""
    kind = rng.randrange(4)
    if kind == 0:
        line = f"{rng.choice(_WRITE)} -o {{p}}"
        if rng.random() < 0.2:
            line = f"{_WRITE[1]} --save-undo {{p}} -o work/out"
    else:
        line = rng.choice((_NUMBER, _SIZE, _READ)[kind - 1])
        line += "" if line in _READ else " -o work/out"
    values = {"n": rng.choice(_NUMBERS), "s": rng.choice(_NUMBERS) + rng.choice(_UNITS),
              "p": rng.choice(_PLACES)}  # fmt: skip
    words = [word.format(**values) for word in line.split()]
    words += rng.choice(([], [], ["--json"], ["--dry-run"])) if "-o" in words else []
    return words
