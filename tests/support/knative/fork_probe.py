"""A fork server whose pods say what they are. A pod's environment says how it ends.

python -m tests.support.knative.fork_probe FD
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knative.local.kubelet.fork_server import run


def describe() -> dict[str, Any]:
    """What may not come from the parent, in a form that two processes can be compared by."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "folder": os.getcwd(),
        "environ": dict(os.environ),
        "descriptors": sorted(int(each) for each in os.listdir("/proc/self/fd"))[:-1],  # the last one lists the folder
        "stdin": os.readlink("/proc/self/fd/0"),
        "signals": {key: status[key] for key in ("SigBlk", "SigIgn", "SigCgt")},
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "threads": [len(os.listdir("/proc/self/task")), threading.active_count()],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cpu_seconds": time.process_time(),
        "age_seconds": _age_seconds(),
        "arguments": sys.argv[1:],
        "computed": _compute(int(os.environ["THREADS"])) if "THREADS" in os.environ else None,
        "random": [random.random(), *_numpy_and_torch()],
    }


def _age_seconds() -> float:
    from functions.hosting.startup import process_age_seconds

    return process_age_seconds()


def _numpy_and_torch() -> list[float]:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    return [float(numpy.random.random()) if numpy else 0.0, float(torch.rand(())) if torch else 0.0]


def _compute(threads: int) -> dict[str, int]:
    """In another thread than the one that says how many, as a stage does: what torch says, and how many it started."""
    import torch

    torch.set_num_threads(threads)
    found: dict[str, int] = {}

    def compute() -> None:
        before = len(os.listdir("/proc/self/task"))
        torch.ones(2000, 2000).add_(1).sum()
        found.update(torch=torch.get_num_threads(), started=len(os.listdir("/proc/self/task")) - before)

    engine = threading.Thread(target=compute)
    engine.start()
    engine.join()
    return found


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    print(json.dumps(describe()), flush=True)
    print("to stderr", file=sys.stderr)
    if environ.get("RAISE"):
        raise RuntimeError("as it was told")
    if environ.get("EXIT"):
        sys.exit(int(environ["EXIT"]))
    while environ.get("WAIT"):
        time.sleep(60)
    return int(environ.get("STATUS", "0"))


if __name__ == "__main__":
    modules = os.environ.get("PROBE_MODULES", "json").split(",")
    sys.exit(run(int(sys.argv[1]), modules, lambda: main))
