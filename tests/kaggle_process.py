"""A process that has loaded what the kaggle client loads and forks one child for each call of it.

The child is what `subprocess.run` would have started, but for the half second of imports: its own process with its own
environment and streams, which imports the unmodified client anew and can be killed for taking too long. Run as a
script it serves calls; `Client` stands in the place of the module `subprocess`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from workshop import leave_after


class Client:
    """As much of `subprocess` as a call of the kaggle client takes."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self):
        self.scratch = tempfile.TemporaryDirectory()
        named = {"HOME": self.scratch.name, "KAGGLE_CONFIG_DIR": self.scratch.name}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE_")}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | named
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, command, *, input, env, timeout, capture_output, text):
        """`subprocess.run` of a `python -P -c CODE`."""
        assert command[:3] == [sys.executable, "-P", "-c"] and len(command) == 4 and capture_output and text
        stdin, stdout, stderr = (Path(self.scratch.name, name) for name in ("in", "out", "err"))
        stdin.write_text(input)
        order = {"code": command[3], "environment": env, "streams": [str(stdin), str(stdout), str(stderr)]}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid, late = int(self.process.stdout.readline()), threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), os.kill(pid, signal.SIGKILL)))
        timer.start()
        status = int(self.process.stdout.readline())
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, stdout.read_text(), stderr.read_text())

    def close(self):
        """Ends the serving process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.scratch.cleanup()


def serve():
    """Reads orders from standard input until it ends; prints each child's process id and then its exit status."""
    orders, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    sys.path[0] = str(Path(__file__).parent.parent)
    sys.stderr, shown = open(os.devnull, "w"), sys.stderr  # noqa: SIM115
    import kaggle  # noqa: F401, without credentials it explains at length how to get some, and asks nobody
    import requests  # noqa: F401

    import medcot.kaggle.client  # noqa: F401

    sys.stderr = shown
    for name in [name for name in sys.modules if name.partition(".")[0] == "kaggle"]:
        del sys.modules[name]  # it reads the environment, and logs in, while it is imported
    print("ready", file=replies, flush=True)
    for line in orders:
        if (pid := os.fork()) == 0:
            _child(json.loads(line))
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


def _child(order):
    for number, path in enumerate(order["streams"]):
        os.dup2(os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if number else 0)), number)
    sys.stdin = open(0)  # noqa: SIM115, the client has closed the old one
    os.environ.clear()
    os.environ.update(order["environment"])
    leave_after(lambda: exec(order["code"], {"__name__": "__main__"}))


if __name__ == "__main__":
    serve()
