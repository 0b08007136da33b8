"""Processes that a run starts: shown line by line while they work, interrupted in their own way."""

import codecs
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

from ..files import write_beside
from ..settings import MedcotError

LOG_MARK = "medcot-log "  # in front of a log entry that a process of torchrun prints for the notebook's chart


def leave_group():
    """Leaves the process group whose work is done; nothing where this process is in none. Not after an error: NCCL might wait.

    Left open, gloo's own thread may abort a process at its end. Closed while that thread still waits for Python's lock, to
    drop a tensor that it gathered, both wait for ever: so it gets a second in which nobody holds the lock.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(1)
        torch.distributed.destroy_process_group()


def on_all_gpus(settings, command: str, read=lambda line: line):
    """Runs `medcot COMMAND` in `nproc_per_node` processes, one a GPU, started by torchrun, and shows what they print.

    `read` gets each line and returns what of it is shown. Raises MedcotError, with the last lines, if a process fails.
    """
    file = settings.output_dir / "settings.json"
    write_beside(file, json.dumps(asdict(settings), default=str, indent=1))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings.nproc_per_node}",
              "-m", "medcot", command, "--settings", str(file)]  # fmt: skip
    status, last = run_shown(launch, read)
    if status:
        # What a process itself says of its end stands far above torchrun's report of it.
        cause = re.search(f"medcot {command}: .*", last)
        raise MedcotError(
            f"medcot {command} on {settings.nproc_per_node} GPUs failed with status {status}"
            + (f": {cause[0].strip()}" if cause else f"; the last lines:\n{last}")
        )


def run_shown(command: list[str], read=lambda line: line) -> tuple[int, str]:
    """Runs a command, showing what `read` leaves of each line while it is printed: (exit status, the last lines).

    An interrupt goes to the command, which ends in its own way (training with a checkpoint), a second one kills it and
    all that it started; KeyboardInterrupt is raised when it has ended.
    """
    last = collections.deque(maxlen=100)
    # torchrun kills 30 s after an interrupt; the step at hand and a checkpoint may take longer. torch 2.13 reads this.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ
    # In a session of its own, so that an interrupt reaches its processes once: from here.
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        ) as process,
        _passing_interrupts_on(process),
    ):
        for line in _lines(process.stdout):
            last.append(read(line))
            print(last[-1], end="", flush=True)
        process.wait()
    return process.returncode, "".join(last)


@contextlib.contextmanager
def on_interrupt(handler):
    """Has an interrupt (Ctrl-C, a notebook's stop button) call `handler(number, frame)` instead of raising.

    Outside the main thread, to which Python restricts signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _passing_interrupts_on(process):
    # By a handler: an exception that is raised in the midst of drawing a chart can be lost in a library's callback.
    import psutil

    started = None

    def interrupt(number, frame):
        nonlocal started
        if started is None:
            started = _children(process)
            process.send_signal(signal.SIGINT)
            return
        for child in {*started, *_children(process)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()

    with on_interrupt(interrupt):
        yield
    if started is not None:
        raise KeyboardInterrupt


def _children(process) -> list:
    """The processes that a process has started, and they in turn; those of one that has ended are not known."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _lines(stream):
    """The lines of a byte stream as soon as they are there, each with its line end or carriage return.

    A progress bar comes before its carriage return: that is written with the next state of the bar, a minute later.
    """
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := stream.read1(65536):
        *lines, rest = re.split(r"(?<=[\r\n])", rest + decoder.decode(chunk))
        yield from lines
        if rest.endswith("]"):
            yield rest
            rest = ""
    if rest:
        yield rest
