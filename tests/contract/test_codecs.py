"""What every codec promises, on random checkpoints in files."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.adapter import CodedRef
from loratool.quant import CODECS, Codec, codec_of, find_codes
from loratool.quant.base import Coder, Recoder, RowCoder, factors_at
from loratool.quant.find import reading
from loratool.store.checkpoint import open_checkpoint
from loratool.store.reader import FileReader
from tests.make import randn, save_checkpoint
from tests.strategies import CODED, CodedFile

ROWS = [pytest.param(c, id=c.name) for c in CODECS.values()]
WRITING = [pytest.param(c, id=c.name) for c in CODECS.values() if c.writes == "blocks"]
BY_ROWS = [pytest.param(c, id=c.name) for c in CODECS.values() if c.writes == "rows"]
PROTOCOLS = {"": (Coder,), "blocks": (Coder, Recoder), "rows": (Coder, RowCoder)}
Opened = tuple[CodedRef, FileReader]


def test_every_codec_has_random_checkpoints() -> None:
    assert set(CODED) == set(CODECS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_resolves(row: Codec) -> None:
    assert codec_of(row.name) is row and row.methods
    assert all(row in reading(method) for method in row.methods)
    for protocol in PROTOCOLS[row.writes]:
        for name in (n for n, f in vars(protocol).items() if inspect.isfunction(f) and n[0] != "_"):
            wanted = list(inspect.signature(getattr(protocol, name)).parameters)[1:]
            assert list(inspect.signature(getattr(row.coder, name)).parameters) == wanted, name


@contextmanager
def opened(file: CodedFile) -> Iterator[Opened]:
    """The one coded weight of a checkpoint, and a reader."""
    with tempfile.TemporaryDirectory() as folder, FileReader() as reader:
        base = open_checkpoint(save_checkpoint(Path(folder) / "base", file.tensors,
                                               config=file.config))  # fmt: skip
        assert base.quantization is not None
        found = find_codes(base.quantization, base.tensors, base.config, reader)
        assert found is not None and set(found.weights) == {file.name}
        claims = [n for c in reading(base.quantization)
                  for n in c.coder.find(base.tensors, base.config, reader).weights]  # fmt: skip
        assert len(claims) == 1  # of several codecs of a method one takes it
        (ref,) = found.weights.values()
        assert found.companions == set(base.tensors) - {file.codes or file.name, "norm.weight"}
        yield ref, reader


def decoded(ref: CodedRef, reader: FileReader) -> torch.Tensor:
    return torch.frombuffer(read(ref, reader, 0, ref.nbytes), dtype=torch.float32)


def read(ref: CodedRef, reader: FileReader, start: int, stop: int) -> bytearray:
    held = bytearray(stop - start)
    reader.read_into(ref, start, memoryview(held))
    return held


def parts(ref: CodedRef, reader: FileReader, row: Codec) -> tuple[torch.Tensor, ...]:
    """(numbers, factor of each, factors) with the last axis along the columns."""
    values = decoded(ref, reader).view(-1, ref.shape[-1])
    if ref.scales is None:
        return values, torch.ones(1, 1), torch.ones(1, 1)
    scales = row.recoder.load_scales(ref, reader)
    assert scales.dtype == torch.float32 and scales.numel() == ref.scales.numel
    rows, cols = (torch.arange(n) for n in values.shape)
    return values, factors_at(scales, ref, rows, cols), scales


def each(row: Codec, holds: Any, examples: int = 20) -> None:
    """Try a law on random checkpoints."""

    @settings(max_examples=examples, deadline=None)
    @given(CODED[row.name], st.data())
    def run(file: CodedFile, data: st.DataObject) -> None:
        with opened(file) as (ref, reader):
            holds(file, ref, reader, data)

    run()


@pytest.mark.parametrize("row", ROWS)
def test_a_weight_looks_like_its_numbers(row: Codec) -> None:
    def holds(file: CodedFile, ref: CodedRef, reader: FileReader, _: Any) -> None:
        assert (ref.codec, ref.dtype) == (row.name, "F32") and ref.nbytes == 4 * ref.numel
        want = file.tensors[ref.name] if file.numbers is None else file.numbers
        assert (ref.name, ref.shape) == (file.name, tuple(want.shape))
        assert {r.name for r in ref.stored} <= set(file.tensors)

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_numbers_are_those_of_the_format(row: Codec) -> None:
    def holds(file: CodedFile, ref: CodedRef, reader: FileReader, _: Any) -> None:
        if file.numbers is not None:
            assert torch.equal(decoded(ref, reader).view(ref.shape), file.numbers)

    each(row, holds)


@pytest.mark.parametrize("row", ROWS)
def test_pieces_are_parts_of_the_whole(row: Codec) -> None:
    def holds(_: CodedFile, ref: CodedRef, reader: FileReader, data: st.DataObject) -> None:
        cuts = data.draw(st.lists(st.integers(0, ref.numel), max_size=5))
        ends = sorted({0, *cuts, ref.numel})
        pieces = [read(ref, reader, 4 * a, 4 * b) for a, b in pairwise(ends)]
        assert b"".join(pieces) == bytes(read(ref, reader, 0, ref.nbytes))

    each(row, holds)


@pytest.mark.parametrize("row", WRITING)
def test_numbers_go_back_to_their_codes(row: Codec) -> None:
    def holds(file: CodedFile, ref: CodedRef, reader: FileReader, _: Any) -> None:
        values, factors, _scales = parts(ref, reader, row)
        codes = row.recoder.encode(values.double(), factors, ref)
        stored = file.tensors[ref.name]
        assert codes.dtype == stored.dtype
        assert torch.equal(codes.view(torch.uint8), stored.view(values.shape).view(torch.uint8))
        assert torch.equal(row.recoder.numbers(codes, factors.expand_as(values), ref), values)

    each(row, holds)


@pytest.mark.parametrize("row", WRITING)
def test_factors_are_those_of_their_blocks(row: Codec) -> None:
    """Each number has the factor of the block it lies in; counted by hand, stacks apart."""

    def holds(file: CodedFile, ref: CodedRef, reader: FileReader, _: Any) -> None:
        _values, factors, scales = parts(ref, reader, row)
        if ref.scales is None:
            return
        height, width = ref.block
        rows = ref.shape[-2]
        matrices = ref.numel // (rows * ref.shape[-1])
        each_one = scales.view(matrices, -1, scales.shape[1]) if len(scales) > 1 else scales[None]
        got = factors.reshape(matrices, rows, -1)
        for m in range(matrices):
            for i in range(rows):
                for j in range(ref.shape[-1]):
                    of = each_one[m if len(each_one) > 1 else 0]
                    assert got[m, i, j] == of[min(i // height, len(of) - 1), j // width]

    each(row, holds, 40)


def most(row: Codec, ref: CodedRef, factors: torch.Tensor) -> torch.Tensor:
    """The largest number that can be coded under each factor."""
    codes = row.recoder.encode(torch.full(factors.shape, 1e30).double(), factors, ref)
    return row.recoder.numbers(codes, factors, ref).double()


@pytest.mark.parametrize("row", WRITING)
def test_the_nearest_code_is_taken(row: Codec) -> None:
    """Where one code gives way to the next is the middle, to float64: it is rounded once."""

    def holds(_: CodedFile, ref: CodedRef, reader: FileReader, data: st.DataObject) -> None:
        one = torch.ones(1, 1)

        def coded(values: torch.Tensor) -> torch.Tensor:
            return row.recoder.numbers(row.recoder.encode(values, one, ref), one, ref).double()

        seed = data.draw(st.integers(0, 2**20))
        low = randn(8, 1, seed=seed).double() * float(most(row, ref, one)) / 8
        high = low + low.abs() + 1
        assert bool((coded(low) < coded(high)).all())
        for _step in range(80):
            middle = (low + high) / 2
            is_below = coded(middle) <= coded(low)
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        want = (coded(low) + coded(high)) / 2
        assert bool(((low - want).abs() <= 2.0**-45 * want.abs()).all())

    each(row, holds, 20)


@pytest.mark.parametrize("row", WRITING)
def test_factors_that_hold_stay_and_others_grow(row: Codec) -> None:
    def holds(_: CodedFile, ref: CodedRef, reader: FileReader, data: st.DataObject) -> None:
        values, factors, scales = parts(ref, reader, row)
        if ref.scales is None:
            return
        rows, cols = values.shape
        largest = most(row, ref, factors)
        peaks = torch.zeros(scales.shape, dtype=torch.float64)
        at = torch.arange(scales.numel(), dtype=torch.float32).view(scales.shape)
        place = factors_at(at, ref, torch.arange(rows), torch.arange(cols)).long()
        peaks.view(-1).scatter_reduce_(0, place.flatten(), largest.flatten(), "amax")
        assert torch.equal(row.recoder.fit(peaks, ref, scales), scales)
        more = peaks * data.draw(st.floats(1.5, 1e3))
        made = row.recoder.fit(more, ref, scales)
        assert bool((made > scales).all())
        back = row.recoder.store_scales(made, ref.scales.dtype)
        assert torch.equal(back.float(), made)
        wide = factors_at(made, ref, torch.arange(rows), torch.arange(cols))
        tops = factors_at(more, ref, torch.arange(rows), torch.arange(cols))
        assert bool((most(row, ref, wide) >= tops * (1 - 2**-23)).all())  # nothing is cut off

    each(row, holds)


def as_rows(ref: CodedRef, values: torch.Tensor) -> torch.Tensor:
    """A weight's numbers as rows of its codes."""
    turned = values.view(ref.shape).transpose(-1, -2) if ref.is_turned else values.view(ref.shape)
    return turned.reshape(-1, turned.shape[-1])


@pytest.mark.parametrize("row", BY_ROWS)
def test_rows_go_back_to_their_codes(row: Codec) -> None:
    def holds(file: CodedFile, ref: CodedRef, reader: FileReader, _: Any) -> None:
        assert ref.codes is not None and ref.scales is not None
        values = as_rows(ref, decoded(ref, reader))
        loaded = row.row_coder.load_rows(ref, reader, 0, len(values))
        assert torch.equal(loaded, values)
        factors = row.row_coder.load_factors(ref, reader, 0, len(values))
        codes, kept, numbers = row.row_coder.encode_rows(values.double(), factors, ref)
        assert torch.equal(kept, factors) and torch.equal(numbers, values)
        again = file.tensors[ref.codes.name].view(codes.shape)
        zero = values == 0  # 0 and -0 are one number
        assert torch.equal(codes[~zero[:, ::2] & ~zero[:, 1::2]],
                           again[~zero[:, ::2] & ~zero[:, 1::2]])  # fmt: skip

    each(row, holds)


@pytest.mark.parametrize("row", BY_ROWS)
def test_rows_take_the_nearest_numbers_and_factors_that_hold(row: Codec) -> None:
    """Against every number that a code can stand for under the factor taken."""

    def holds(_: CodedFile, ref: CodedRef, reader: FileReader, data: st.DataObject) -> None:
        coder, cols = row.row_coder, ref.block[1]
        loaded = as_rows(ref, decoded(ref, reader))
        factors = coder.load_factors(ref, reader, 0, len(loaded))
        grown = data.draw(st.sampled_from([0.3, 1.0, 5.0]))
        values = loaded.double() * grown + randn(*loaded.shape, seed=3).double() * loaded.std()
        _codes, made, numbers = coder.encode_rows(values, factors, ref)
        top = loaded.double().unflatten(1, (-1, cols)).abs().amax(-1)
        peaks = values.unflatten(1, (-1, cols)).abs().amax(-1)
        assert bool((made >= factors)[peaks > top].all())
        assert torch.equal(made[peaks <= top], factors[peaks <= top])
        error = (numbers.double() - values).abs()
        for other in torch.linspace(-6, 6, 25, dtype=torch.float64):  # halves, whole numbers
            if float(other.abs()) in (0, 0.5, 1, 1.5, 2, 3, 4, 6):
                each_one = torch.ldexp(other.expand(made.shape), made.int() - 127)
                away = (each_one.repeat_interleave(cols, 1) - values).abs()
                assert bool((error <= away).all())

    each(row, holds)
