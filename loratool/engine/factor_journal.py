"""Factors of finished modules, kept beside the output so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from loratool.adapter import TensorData
from loratool.engine.difference import DifferenceResult
from loratool.frozen import asdict, replace
from loratool.plan import Step
from loratool.store.checksum import PieceSums
from loratool.store.disk import refusals_as, write_synced
from loratool.store.staging import Output

_FOLDER = "factors"


class FactorJournal:
    """Writes each step's factors into the staging folder, and gives them back.

    Args:
        output: the staging area.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()

    def put(self, results: Any) -> Any:
        """Keep a finished step's results, if it made factors; gives them back."""
        if not isinstance(results, list) or not any(r.factors for r in results):
            return results
        data = [memoryview(f.data) for r in results for f in r.factors or ()]
        name, sums, size = factor_file(results[0].name), PieceSums(), 0
        path = self._output.create(name)
        with refusals_as("cannot write", path):
            write_synced(path, *data)
        for part in data:
            sums.add(size, part)
            size += len(part)
        lines = [_to_json(r) for r in results]
        with self._lock:
            self._output.mark_finished(name, size, lines, sums.pieces())
        return results

    def take(self, step: Step) -> list[DifferenceResult] | None:
        """Results of a step that an earlier run finished, None if it is still to do."""
        name = factor_file(step.output.name)
        line = self._output.finished.get(name)
        if line is None:
            return None
        data = memoryview(self._output.finished_path(name).read_bytes())
        results, start = [], 0
        for values in line["results"]:
            result, size = _from_json(values, data[start:])
            results.append(result)
            start += size
        return results


def factor_file(tensor: str) -> str:
    """Name of the file that keeps the factors of a step's output."""
    return f"{_FOLDER}/{hashlib.sha256(tensor.encode()).hexdigest()[:32]}"


def drop_factors(output: Output) -> None:
    """Remove the kept factors: the adapter is complete."""
    output.drop(n for n in list(output.finished) if n.startswith(f"{_FOLDER}/"))


def _to_json(result: DifferenceResult) -> dict[str, Any]:
    values = asdict(result)
    values["factors"] = [[f.name, list(f.shape)] for f in result.factors or ()]
    return values


def _from_json(values: dict[str, Any], data: memoryview) -> tuple[DifferenceResult, int]:
    factors, start = [], 0
    for name, shape in values["factors"]:
        one = TensorData(name, "F32", tuple(shape), b"")
        factors.append(replace(one, data=data[start : start + one.nbytes]))
        start += one.nbytes
    lists: Sequence[str] = ("residual_squares", "spectrum")
    plain: dict[str, Any] = {
        k: tuple(v) if k in lists else v for k, v in values.items() if k != "factors"
    }
    pair = (factors[0], factors[1]) if factors else None
    return DifferenceResult(**plain, factors=pair), start
