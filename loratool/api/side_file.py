"""Files of patches that are written beside an output: undo files and residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratool.api.common import Resources
from loratool.api.session import run_plan
from loratool.frozen import replace
from loratool.plan import Plan
from loratool.store.output_path import check_output
from loratool.store.staging import Making


def may_replace(path: Path, identity: str, *, force: bool) -> bool:
    """Refuse a place that is taken, before the work; True if a file there may be replaced.

    A side file of this very run is what an interrupted one left: it is made again.

    Args:
        path: file to write.
        identity: of the run.
        force: replace an earlier loratool output.

    Raises:
        OutputError: the place is taken.
    """
    from loratool.store.marker import read_marker

    made = read_marker(path)
    replaces = force or (made is not None and made.plan == identity)
    check_output(path, is_folder=False, force=replaces)
    return replaces


def write_patches(
    path: Path,
    plan: Plan,
    resources: Resources,
    *,
    replaces: bool,
    table: Callable[[dict[str, Any]], Mapping[str, Any]],
    record: Mapping[str, Any],
) -> tuple[int, list[Any]]:
    """Run a plan of patches into a file; its size, and the results without their bytes.

    Args:
        path: file to write.
        plan: one step per patch.
        resources: for the plan.
        replaces: a file there may go.
        table: what the patches are for, from the results by name.
        record: into the file's metadata.
    """
    from loratool.store.patch_file import PatchWriter
    from loratool.store.writer import StagedOutput

    output = StagedOutput(path, Making(is_folder=False, plan_id=None, force=replaces))
    with output, PatchWriter(output) as writer:

        def take(result: Any) -> Any:
            writer.add(result.name, result.pieces)
            return replace(result, pieces=())

        results = run_plan(plan, resources, take=take)
        size = writer.write(table({r.name: r for r in results}), record)
        output.commit()
    return size, results
