"""A run that copies a checkpoint through the real writing path, without torch: starts in 0.1 s.

python copy_run.py BASE OUT [--force] [--restart] [--pause SECONDS] [--hold PIECES]

With ``--hold`` it says "held" after so many pieces, and goes on when it gets a line.  Everything
but the loop over the tensors is the product's own code.  Exits as the command line does: 0, or the
exit code of the error.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from loratool.engine.sink import CheckpointSink
from loratool.errors import LoratoolError
from loratool.plan import Plan, ShardPlan, Step, TensorSpec
from loratool.store.checkpoint import Checkpoint, open_checkpoint
from loratool.store.reader import FileReader
from loratool.store.staging import Making
from loratool.store.stamps import take_stamps
from loratool.store.writer import MARKER, StagedOutput

PIECE = 16 << 10


def plan_copy(base: Checkpoint, output: Path) -> Plan:
    steps, shards = [], []
    for number, shard in enumerate(base.shards):
        refs = [base.tensors[key] for key in shard.keys]
        specs = tuple(TensorSpec(r.name, r.dtype, r.shape) for r in refs)
        name = shard.name if base.is_folder else output.name
        shards.append(ShardPlan(name, specs, {"made": "anew"}, twin=shard.path))
        steps += [
            Step("copy", spec, (ref,), (1, ref.nbytes), shard=number)
            for ref, spec in zip(refs, specs, strict=True)
        ]
    content = {"base": [hashlib.sha256(s.header).hexdigest() for s in base.shards]}
    return Plan("copy", tuple(steps), tuple(shards), inputs=content)


def run(base_path: Path, output: Path, options: argparse.Namespace) -> None:
    base = open_checkpoint(base_path)
    plan = plan_copy(base, output)
    stamps = take_stamps(plan.refs())
    names = [*(s.name for s in plan.shards), "config.json", MARKER, "model.safetensors.index.json"]
    staged = StagedOutput(
        output,
        Making(
            is_folder=base.is_folder, plan_id=plan.plan_id(), force=options.force,
            names=names if base.is_folder else [output.name],
            restart=options.restart, inputs=stamps, need_bytes=plan.output_bytes,
        ),
    )  # fmt: skip
    with staged, FileReader(stamps) as reader:
        sink = CheckpointSink(plan, staged)
        try:
            for step in plan.steps:
                if sink.finished_results(step.shard) is None:
                    copy(step, sink, reader, options)
        finally:
            sink.close()
        reader.check_unchanged()
        if base.is_folder:
            staged.write_file("config.json", (base_path / "config.json").read_bytes())
            index = base_path / "model.safetensors.index.json"
            staged.write_file(index.name, index.read_bytes())
        staged.commit({"loratool": "test"})
    for note in staged.notes:
        print(note)


def copy(step: Step, sink: CheckpointSink, reader: FileReader, options: argparse.Namespace) -> None:
    ref, out = step.inputs[0], sink.out(step)
    for start in range(0, ref.nbytes, PIECE):
        data = memoryview(bytearray(min(PIECE, ref.nbytes - start)))
        reader.read_into(ref, start, data)
        out.put(out.start + start, data, aligned=False)
        time.sleep(options.pause)
        options.hold -= 1
        if options.hold == 0:
            print("held", flush=True)
            sys.stdin.readline()
    sink.step_done(step, None)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--hold", type=int, default=0)
    options = parser.parse_args()
    try:
        run(options.base, options.output, options)
    except LoratoolError as error:
        print(f"error[{error.code}]: {error.message()}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
