"""Run as a program: command lines in forks of one process, each with streams of its own.

python fork_run.py CASES.json RESULTS.json; a case is {"words", "stdout", "stderr"}, a result
{"code", "out", "err"} with the text of streams that are in order.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from loratool import cli
from tests.faults.server import import_everything


def take(descriptor: int, state: str, text: Path) -> None:
    """Give a descriptor of this process its state."""
    if state == "closed":
        os.close(descriptor)
        return
    if state == "broken":
        reader, writer = os.pipe()
        os.close(reader)
    elif state == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        writer = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(writer, descriptor)
    os.close(writer)


def run(case: dict[str, object], texts: tuple[Path, Path]) -> dict[str, object]:
    for text in texts:
        text.write_text("")
    child = os.fork()
    if not child:
        code = 99
        try:
            states = (str(case["stdout"]), str(case["stderr"]))
            if states[0] == "closed":
                os.close(0)
            for descriptor, state, text in zip((1, 2), states, texts, strict=True):
                take(descriptor, state, text)
            cli.main(case["words"])  # type: ignore[arg-type]
        except SystemExit as done:
            code = int(done.code or 0)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err = (text.read_text() for text in texts)
    return {"code": os.waitstatus_to_exitcode(status), "out": out, "err": err}


if __name__ == "__main__":
    cases, results = map(Path, sys.argv[1:])
    import_everything()  # once, not in each of hundreds of processes
    beside = (results.with_suffix(".out"), results.with_suffix(".err"))
    found = [run(case, beside) for case in json.loads(cases.read_text())]
    results.write_text(json.dumps(found))
