"""Runs the command line in forked children, so that a test that kills many of them pays for the imports once.

    python forks.py [text]      # text: import what transformers models and ONNX files need, too

Reads one JSON object a line: {argv, cwd, signal, after, log}; answers each with {code, seconds}. A child is sent `signal`
after so many seconds. No child shares anything with another one but what is imported.
"""

import json
import os
import sys
import time

import tiny

import lrc.api
import lrc.cli
import lrc.run.job
from lrc.report import progress, tables  # noqa: F401 - imported before the forks
from lrc.spec.registry import EXPORTERS, METRICS, PASSES, RANKS, SOLVERS


def child(argv: list[str], cwd: str, log: str, started: int) -> None:
    """Be the command; say on the pipe `started` when it begins."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(cwd)
    sys.argv = ["lrc", *argv]
    lrc.run.job.check = tiny.check_here
    code = 1
    try:
        os.write(started, b".")
        lrc.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(order: dict[str, object]) -> dict[str, object]:
    """Fork, wait, send the signal when it is time. Returns the exit code, negative for a signal."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(order["argv"], order["cwd"], order["log"], writing)  # type: ignore[arg-type]
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    start, sent = time.perf_counter(), False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}
        if order["after"] is not None and not sent and seconds >= order["after"]:  # type: ignore[operator]
            os.kill(pid, order["signal"])  # type: ignore[arg-type]
            sent = True
        time.sleep(0.002)


if __name__ == "__main__":
    for registry in (EXPORTERS, METRICS, PASSES, RANKS, SOLVERS):
        registry.load()
    if "text" in sys.argv:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import torch.onnx  # noqa: F401
        import transformers

        transformers.BertModel, transformers.BertConfig, transformers.PreTrainedTokenizerFast  # noqa: B018 - lazily imported
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
