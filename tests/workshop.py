"""A process that has loaded the small model and forks one child for each job, so that faults can be tried by the dozen.

A child is a real process: it can be killed, interrupted, starved of memory or put on a full disk. Run as a script it
serves jobs; `Workshop` is its client. A job is a function of a test module, called with keyword arguments.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

CHILD_SECONDS = 180  # after which a job that hangs is ended, so that its test fails instead of waiting
USER_ERROR = 3  # exit status of a job that raised MedcotError


class Workshop:
    """Starts the serving process and gives it jobs, one after the other."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, module, job, log, **arguments):
        """Forks a child for a job; its output goes to the file `log`."""
        order = {"module": module, "job": job, "log": str(log), "arguments": arguments}
        self.process.stdin.write(json.dumps(order, default=str) + "\n")
        self.process.stdin.flush()
        self.log, self.pid = Path(log), int(self.process.stdout.readline())
        return self.pid

    def wait(self) -> tuple[int, str]:
        """The child's exit status (negative: the signal that ended it) and all it printed."""
        status = int(self.process.stdout.readline())
        return status, self.log.read_text(encoding="utf-8", errors="replace")

    def do(self, module, job, log, **arguments) -> tuple[int, str]:
        """A whole job."""
        self.start(module, job, log, **arguments)
        return self.wait()

    def close(self):
        """Ends the serving process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def until(condition, seconds=60):
    """Waits for a condition, looking every 2 milliseconds; True if it came about in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def leave_after(work):
    """Ends a forked process with what `work` returns, or with 1 and the traceback of what it raised; runs nothing of its parent."""
    status = 1
    try:
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve():
    """Reads orders from standard input until it ends; prints each child's process id and then its exit status."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the replies
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import PROFILES
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread of it could hold a lock at the moment of a fork
    from medcot.model import load_model
    from medcot.run.tracking import plot_loss

    loaded = load_model(PROFILES["smoke"])
    plot_loss([], 1).savefig(io.BytesIO())  # loads what drawing needs now, while there is memory for it
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            _child(order, loaded)
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


def _child(order, loaded):
    from tqdm import tqdm

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(CHILD_SECONDS)
    # The default lock is a semaphore that all children share: one that is killed with it would stop all that follow.
    tqdm.set_lock(threading.RLock())

    def work():
        from medcot import MedcotError

        try:
            getattr(importlib.import_module(order["module"]), order["job"])(loaded, **order["arguments"])
        except MedcotError as error:
            print(f"MedcotError: {error}")
            return USER_ERROR

    leave_after(work)


if __name__ == "__main__":
    serve()
