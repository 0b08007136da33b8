"""Two processes take the same steps as one, leave the same files, and fail loudly when one of them dies."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from workshop import CHILD_SECONDS, leave_after

from medcot import (
    add_lora,
    evaluate_on_all_gpus,
    load_model,
    load_splits,
    make_trainer,
    to_examples,
    train,
    train_on_all_gpus,
)
from medcot.evaluation.measure import run_evaluation
from medcot.identity import adapter_id
from medcot.model import ADAPTER_FILES
from medcot.run.checkpoints import last_checkpoint
from medcot.run.processes import run_shown
from medcot.run.resume import run_training
from medcot.settings import ADAPTER_FOLDER, MedcotError


@pytest.fixture(scope="module", autouse=True)
def left_open(tmp_path_factory):
    """The folder in which each process that torchrun starts says, at its end, whether its process group was open."""
    folder = tmp_path_factory.mktemp("left_open")
    (folder / "sitecustomize.py").write_text(f"""
import atexit, os, sys

def say():
    torch = sys.modules.get("torch")
    still = torch is not None and torch.distributed.is_initialized()
    open(f"{folder}/{{os.getpid()}}-{{int(still)}}", "w").write(" ".join(sys.argv))

if "RANK" in os.environ:
    atexit.register(say)
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield folder


@pytest.fixture(scope="module")
def drawn():
    """How many log entries the chart of the notebook had, each time it was drawn while two processes trained."""
    return []


@pytest.fixture(scope="module")
def pair(trained, drawn, tmp_path_factory):
    """The same short run by one process (4 a micro-batch, padded) and by two (2 each, arranged and without padding)."""
    one = replace(
        trained.settings,
        per_device_train_batch_size=4,
        max_steps=5,
        warmup_steps=0,  # so that the first step already changes the adapter
        report_to="none",
        output_dir=tmp_path_factory.mktemp("one"),
    )
    two = replace(
        one,
        per_device_train_batch_size=2,
        padding_free=True,
        nproc_per_node=2,
        output_dir=tmp_path_factory.mktemp("two"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "medcot.run.tracking.LossChart.draw", lambda self, history, save=False: drawn.append(len(history))
        )
        train_on_all_gpus(two)
    run_training(one)
    return one, two


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def job_in_two(loaded, work, machines=1, **arguments):
    """A function of this module called by two processes that find what torchrun tells its own: on one machine, or on one each."""
    port, children = free_port(), []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            signal.alarm(CHILD_SECONDS)
            os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
                           "LOCAL_RANK": f"{rank // machines}", "LOCAL_WORLD_SIZE": f"{2 // machines}",
                           "GROUP_RANK": f"{rank * (machines - 1)}", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            leave_after(lambda: globals()[work](**arguments))
        children.append(pid)
    print("STATUSES", [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])


@pytest.fixture(scope="module")
def in_two(workshop, tmp_path_factory):
    """Has two processes that need not import everything anew call a function; (the exit status of each, what they printed)."""
    log = tmp_path_factory.mktemp("in_two") / "log"

    def in_two(work, **arguments):
        status, said = workshop.do(__name__, "job_in_two", log, work=work, **arguments)
        assert status == 0, said
        return json.loads(said.rsplit("STATUSES ", 1)[1]), said

    return in_two


def rank_train(file):
    """What `python -m medcot train --settings FILE` does."""
    from medcot.cli import main

    return main(["train", "--settings", file])


def written(settings):
    """The settings in a file of their output folder, as `train_on_all_gpus` leaves them."""
    settings.output_dir.mkdir(exist_ok=True)
    file = settings.output_dir / "settings.json"
    file.write_text(json.dumps(asdict(settings), default=str))
    return file


@pytest.fixture(scope="module")
def ended(pair, in_two, tmp_path_factory):
    """The run of `pair` by two processes, whose session ended, without an error, before the first step was over."""
    settings = replace(pair[1], output_dir=tmp_path_factory.mktemp("ended"), session_minutes=1e-4)
    statuses, said = in_two("rank_train", file=written(settings))
    assert statuses == [0, 0], said
    return settings


def losses(settings, key="loss"):
    record = json.loads((settings.output_dir / "training.json").read_text())
    return [entry[key] for entry in record["log_history"] if key in entry]


def test_two_processes_take_the_same_steps_as_one(pair):
    one, two = pair
    assert one.examples_per_step == two.examples_per_step == 4
    assert len(losses(one)) == 5
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)


def test_two_processes_leave_the_same_files(pair):
    one, two = ({str(f.relative_to(s.output_dir)) for f in s.output_dir.rglob("*") if f.is_file()} for s in pair)
    # One random state a process in a checkpoint, and the settings that the processes were started with.
    assert {name for name in two - one if "rng_state" not in name} == {"settings.json"}
    assert {name for name in one - two if "rng_state" not in name} == set()
    assert {f"DeepSeek-R1-Medical-COT/{name}" for name in ADAPTER_FILES} <= two


def test_the_chart_was_drawn_in_the_notebook_after_every_entry(pair, drawn):
    history = json.loads((pair[1].output_dir / "training.json").read_text())["log_history"]
    logged = [entry for entry in history if "seconds" in entry]  # losses, held-out losses and the summary at the end
    assert drawn == list(range(1, 1 + len(logged))) and len(logged) >= 6


def test_the_notebook_finds_the_work_done(pair, capsys):
    _, two = pair
    model, tokenizer = load_model(two)
    examples = to_examples(load_splits(two).train, tokenizer, two, show=False)
    trainer = make_trainer(add_lora(model, two), tokenizer, examples, two)
    train(trainer, two)
    assert "already trained" in capsys.readouterr().out
    saved, _ = load_model(two, adapter=two.adapter_dir)
    assert adapter_id(trainer.model) == adapter_id(saved)


def test_a_rank_that_dies_stops_the_run_loudly(pair, tmp_path):
    settings = replace(pair[1], output_dir=tmp_path, max_steps=4000, save_steps=2)
    message = killed_in(train_on_all_gpus, settings, lambda _: any(tmp_path.glob("checkpoints/*/checkpoint.json")))
    assert "medcot train on 2 GPUs failed with status 1" in message


def interrupted(code, *arguments, log, times):
    """Interrupts Python code that starts a run on two, once steps are taken; (processes that outlive it, what it said)."""

    def said(words):
        deadline = time.monotonic() + 120
        while words not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert words in log.read_text()

    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=stream, stderr=stream)
    processes = [process]
    try:
        said(", loss ")
        processes += psutil.Process(process.pid).children(recursive=True)
        assert {p.environ().get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") for p in processes[1:]} == {"600"}
        process.send_signal(signal.SIGINT)
        if times > 1:
            said("death signal")  # what torchrun says of the first
            process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        _, alive = psutil.wait_procs(processes[1:], timeout=times - 1)
        return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], log.read_text()
    finally:
        for left in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def test_an_interrupt_ends_two_processes_at_one_step_with_a_checkpoint(pair, tmp_path):
    settings = replace(pair[1], output_dir=tmp_path, max_steps=4000, save_steps=4000)
    code = "import sys; from medcot.profiles import read_settings; from medcot import train_on_all_gpus; train_on_all_gpus(read_settings(sys.argv[1]))"
    alive, said = interrupted(code, written(settings), log=tmp_path / "start.log", times=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    assert not alive and said.count("stopping after this step, with a checkpoint") == 1
    assert f"stopped at step {step} of 4000 (interrupted)" in said
    record = json.loads((tmp_path / "training.json").read_text())
    assert last_checkpoint(settings, record["identity"]) == checkpoint  # whole, and of this run
    assert (tmp_path / ADAPTER_FOLDER / "adapter_model.safetensors").is_file()


def test_a_session_that_ends_leaves_the_notebook_an_adapter_and_no_error(ended, tmp_path, capsys):
    settings = replace(ended, output_dir=tmp_path / "out")
    shutil.copytree(ended.output_dir, settings.output_dir)
    record = settings.output_dir / "training.json"
    stale = json.loads(record.read_text()) | {"steps": 0, "notes": []}  # as if a kill had come before it was written
    record.write_text(json.dumps(stale))
    model, tokenizer = load_model(settings)
    examples = to_examples(load_splits(settings).train, tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
    capsys.readouterr()
    train(trainer, settings)
    assert (
        "stopped at step 1 of 5 (session_minutes=0.0001 are used): the adapter is that of this step. "
        "Run train_on_all_gpus(settings) to go on" in capsys.readouterr().out
    )
    saved, _ = load_model(settings, adapter=settings.adapter_dir)
    fresh = add_lora(load_model(settings)[0], settings)
    assert adapter_id(trainer.model) == adapter_id(saved) != adapter_id(fresh)
    assert json.loads(record.read_text())["steps"] == 1
    with pytest.raises(MedcotError, match=r"would take 2 examples a step and the settings say 4"):
        run_training(settings)  # on the command line there is work left, and no notebook to go on with


ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}/adapter_model.safetensors"


def test_two_processes_go_on_where_two_stopped(pair, ended, in_two, tmp_path):
    settings = replace(ended, output_dir=tmp_path / "out", session_minutes=0)
    shutil.copytree(ended.output_dir, settings.output_dir)
    assert json.loads((settings.output_dir / "training.json").read_text())["steps"] == 1
    statuses, said = in_two("rank_train", file=written(settings))
    assert statuses == [0, 0], said
    assert losses(settings) == losses(pair[1])
    assert (settings.output_dir / ADAPTER_WEIGHTS).read_bytes() == (pair[1].output_dir / ADAPTER_WEIGHTS).read_bytes()


def agents(settings):
    """`medcot train` by two agents of torchrun, each with one process, as on machines that share a folder; what they said."""
    file, port = written(settings), free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
              f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=medcot", "--local_addr=127.0.0.1", "-m", "medcot", "train",
              "--settings", str(file)]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    logs = [settings.output_dir / f"agent-{i}.log" for i in range(2)]
    with contextlib.ExitStack() as stack:
        started = [
            subprocess.Popen(
                launch, env=environment, stdout=stack.enter_context(log.open("w")), stderr=subprocess.STDOUT
            )
            for log in logs
        ]
        try:
            for agent in started:
                agent.wait(timeout=100)
        finally:
            for agent in started:
                agent.kill()
    said = [log.read_text() for log in logs]
    assert [agent.returncode for agent in started] == [0, 0], said
    return said


def test_two_machines_train_and_go_on_as_one_process_does(pair, in_two, tmp_path):
    one, two = pair
    settings = replace(two, output_dir=tmp_path, session_minutes=1e-4)
    statuses, said = in_two("rank_train", machines=2, file=written(settings))
    assert statuses == [0, 0] and json.loads((tmp_path / "training.json").read_text())["steps"] == 1
    assert said.count("stopped at step 1 of 5 (session_minutes=0.0001 are used). Continue with") == 1
    said = agents(replace(settings, session_minutes=0))
    assert sum(f"going on from {tmp_path}/checkpoints/checkpoint-1" in words for words in said) == 1
    assert losses(settings) == pytest.approx(losses(one), abs=1e-3) and len(losses(settings)) == 5
    assert (tmp_path / ADAPTER_WEIGHTS).read_bytes() == (two.output_dir / ADAPTER_WEIGHTS).read_bytes()


def test_a_second_interrupt_leaves_no_process_behind(tmp_path):
    # What torchrun starts is in the midst of a step that never ends.
    (tmp_path / "step.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('step 1, loss 2', flush=True)\ntime.sleep(300)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "step.py"]
    code = "import sys; from medcot.run.processes import run_shown; run_shown(sys.argv[1:])"
    alive, _ = interrupted(code, *launch, log=tmp_path / "start.log", times=2)
    assert not alive


def killed_in(run, settings, ready):
    """Kills the second process of a run on two as soon as it is `ready`; returns what the run raised."""
    raised = []

    def call():
        try:
            run(settings)
        except MedcotError as error:
            raised.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    deadline, victim = time.monotonic() + 120, None
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(psutil.Error):  # one that was listed may have ended
            ranks = [
                p for p in psutil.Process(os.getpid()).children(recursive=True) if "-m medcot" in " ".join(p.cmdline())
            ]
            victim = next((p for p in ranks if p.environ().get("RANK") == "1" and ready(p)), None)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    thread.join(timeout=120)
    assert not thread.is_alive() and len(raised) == 1
    assert not psutil.pid_exists(victim.pid)
    return raised[0]


def measured(settings, expected=False):
    """What stands in the files of answers and scores, by file and line, without times."""

    def line(text):
        values = {key: value for key, value in json.loads(text).items() if key != "batch_seconds"}
        if expected and "log_likelihood" in values:  # the number of threads may change how a sum is rounded
            values["log_likelihood"] = pytest.approx(values["log_likelihood"], abs=1e-3)
        return values

    return {
        str(path.relative_to(settings.output_dir)): [line(text) for text in path.open()]
        for path in sorted(settings.output_dir.glob("*/*.jsonl"))
    }


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The evaluation of the adapter of `pair`, for two processes, done by one."""
    settings = replace(pair[1], output_dir=tmp_path_factory.mktemp("alone"), generation_batch_size=2)
    shutil.copytree(pair[1].adapter_dir, settings.output_dir / ADAPTER_FOLDER)
    run_evaluation(settings)
    return settings


@pytest.fixture(scope="module")
def shown(alone, pair):
    """The same evaluation by two processes: its settings, and what the notebook was shown."""
    settings, output = replace(alone, output_dir=pair[1].output_dir), io.StringIO()
    with contextlib.redirect_stdout(output):
        evaluate_on_all_gpus(settings)
    return settings, output.getvalue()


def test_two_processes_measure_what_one_measures(alone, shown):
    two, said = shown
    found, expected = measured(two), measured(alone, expected=True)
    assert len(expected) == 11 and found == expected
    assert "baseline, references: 100%" in said and "finetuned, choices: 100%" in said
    # The notebook's own process then finds nothing left to do.
    times = {path: path.stat().st_mtime_ns for path in two.output_dir.glob("*/*.jsonl")}
    run_evaluation(two)
    assert {path: path.stat().st_mtime_ns for path in two.output_dir.glob("*/*.jsonl")} == times


def test_processes_whose_work_is_done_close_their_group(left_open, shown, pair):
    """One left open aborts some processes at their end, although their work is done."""
    ends = [(path.read_text(), path.name[-1]) for path in left_open.glob("*-?")]
    for command in ("train", "evaluate"):
        of_pair = f"{command} --settings {pair[1].output_dir / 'settings.json'}"
        assert [still for said, still in ends if said.endswith(of_pair)] == ["0", "0"]


def rank_fill(file):
    import torch

    from medcot.run.kept import Kept, process

    torch.distributed.init_process_group("gloo")
    rank, _ = process()
    file = Kept(Path(file), {"measured": "baseline, rows"}, {"row": int}, frozenset(range(7)))
    done = file.fill([[0, 1], [2], [3], [4, 5], [6]], lambda batch: [{"row": i, "rank": rank} for i in batch], "row")
    Path(f"{file.path}.{rank}").write_text(json.dumps([done[i]["rank"] for i in range(7)]))
    torch.distributed.destroy_process_group()


def test_each_process_takes_half_of_the_batches(in_two, tmp_path):
    file = tmp_path / "rows.jsonl"
    statuses, said = in_two("rank_fill", file=file)
    assert statuses == [0, 0], said
    assert [json.loads(line) for line in file.open()][1:] == [
        {"row": i, "rank": rank} for i, rank in enumerate([0, 0, 1, 0, 1, 1, 0])
    ]
    for rank in range(2):  # both know all of it
        assert json.loads(Path(f"{file}.{rank}").read_text()) == [0, 0, 1, 0, 1, 1, 0]


def test_a_process_that_dies_while_answering_leaves_what_was_finished(alone, tmp_path):
    settings = replace(alone, output_dir=tmp_path)
    shutil.copytree(alone.adapter_dir, tmp_path / ADAPTER_FOLDER)

    def answering(_):
        return any(path.read_bytes().count(b"\n") > 2 for path in tmp_path.glob("measured/baseline-answers-*.jsonl"))

    assert "medcot evaluate on 2 GPUs failed with status 1" in killed_in(evaluate_on_all_gpus, settings, answering)
    (path,) = tmp_path.glob("measured/baseline-answers-*.jsonl")
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    run_evaluation(settings)
    assert path.read_bytes().startswith(kept)
    assert measured(settings) == measured(alone, expected=True)


def test_what_stopped_a_process_is_what_the_error_says(pair, tmp_path):
    (tmp_path / ADAPTER_FOLDER).mkdir()  # as if its weights were lost
    with pytest.raises(
        MedcotError, match=r"failed with status 1: medcot evaluate: no adapter_model.safetensors in .*02"
    ):
        evaluate_on_all_gpus(replace(pair[1], output_dir=tmp_path))


def rank_other_file(folder):
    import torch

    from medcot.run.kept import Kept, process

    torch.distributed.init_process_group("gloo")
    rank, _ = process()
    file = Kept(Path(f"{folder}-{rank}") / "a.jsonl", {"measured": "baseline, rows"}, {"row": int}, frozenset(range(2)))
    if rank:
        file.path.parent.mkdir()
        file._append([{"row": 0}, {"row": 1}])
    file.fill([[0, 1]], lambda batch: [{"row": i} for i in batch], "row")


def test_processes_that_see_different_files_stop(in_two, tmp_path):
    statuses, said = in_two("rank_other_file", folder=tmp_path / "out")
    assert statuses == [1, 1] and said.count("MedcotError: the processes see different files at") == 2
    assert said.count("MEDCOT_OUT must be") == 2


def test_what_a_process_prints_is_shown_when_it_is_printed(capfd):
    code = "import sys, time; w = sys.stdout.write; w('\\r 0%| [00:00<?]'); sys.stdout.flush(); time.sleep(2); w('\\r50%| [00:02]\\nend')"
    command, shown = [sys.executable, "-c", code], []

    def read(line):
        shown.append((line, time.monotonic()))
        return line.upper()

    assert run_shown(command, read) == (0, "\r 0%| [00:00<?]\r50%| [00:02]\nEND")
    assert [line for line, _ in shown] == ["\r", " 0%| [00:00<?]", "\r", "50%| [00:02]\n", "end"]
    assert shown[2][1] - shown[1][1] > 1  # the bar was shown before its next state was written


def test_one_process_does_not_go_on_with_half_the_examples_of_two(trained, tmp_path):
    two = replace(
        trained.settings, per_device_train_batch_size=2, nproc_per_node=2, output_dir=tmp_path, report_to="none"
    )
    examples = to_examples(trained.splits.train, trained.tokenizer, two, show=False)
    model, tokenizer = load_model(two)
    trainer = make_trainer(add_lora(model, two), tokenizer, examples, two)
    with pytest.raises(MedcotError, match=r"would take 2 examples a step and the settings say 4 .* train_on_all_gpus"):
        train(trainer, two)
