"""Faults, put in through the operating system, and what is still there afterwards."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import filelock
import nbformat
import pytest
from conftest import REPOSITORY
from jupyter_client import KernelManager
from nbclient import NotebookClient
from workshop import USER_ERROR, until

from medcot import add_lora, generate_answers, load_splits, make_trainer, save_adapter, to_examples, train
from medcot.profiles import PROFILES

STEPS = 20
RUN = {"max_steps": STEPS, "save_steps": 1, "learning_rate": 2e-3, "report_to": "none", "train_rows": 40}


@pytest.fixture
def do(workshop, tmp_path):
    """Runs a job of this module in a child and returns its exit status and output."""
    numbers = count()

    def do(job, then=None, **arguments):
        workshop.start(__name__, job, tmp_path / f"{next(numbers)}.log", **arguments)
        if then:
            then(workshop.pid)
        return workshop.wait()

    return do


def job_train(loaded, out, fault=None, adapter=False, **changes):
    """02_finetune in short: train in folder `out`, with the given settings, and with a fault inside the model."""
    settings = replace(PROFILES["smoke"], output_dir=out, **(RUN | changes))
    model, tokenizer = loaded
    examples = to_examples(load_splits(settings).train, tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
    if fault:
        globals()[f"fault_{fault}"](trainer)
    train(trainer, settings)
    if adapter:
        save_adapter(trainer.model, tokenizer, settings)


def record(out):
    return json.loads((Path(out) / "training.json").read_text())


def losses(out):
    """Step and loss, one pair a step."""
    return [(entry["step"], entry["loss"]) for entry in record(out)["log_history"] if "loss" in entry]


def checkpoints(out):
    return sorted((Path(out) / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = workshop.do(__name__, "job_train", folder / "log", out=folder)
    assert status == 0, output
    return folder


def same_run(out, whole):
    """Losses step for step and the last adapter, bit for bit."""
    assert losses(out) == losses(whole)
    weights = [checkpoints(folder)[-1] / "adapter_model.safetensors" for folder in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_ten_kills_at_random_moments_change_no_loss(do, whole, tmp_path):
    chance, out, interrupted = random.Random(7), tmp_path / "out", 0
    for _ in range(10):
        before = {path.name for path in checkpoints(out)}

        def kill(pid, before=before):
            # From the moment that a new checkpoint is begun on: within it, while it is sealed, in the step after it.
            assert until(lambda: {path.name for path in checkpoints(out)} - before)
            time.sleep(chance.uniform(0, 0.8) * record(whole)["seconds"] / STEPS)
            os.kill(pid, signal.SIGKILL)

        status, output = do("job_train", kill, out=out)
        assert status == -signal.SIGKILL, output
        interrupted += any(not (path / "checkpoint.json").exists() for path in checkpoints(out))
    status, output = do("job_train", out=out)
    assert status == 0, output
    assert interrupted  # at least one kill fell into a save
    same_run(out, whole)
    assert len(checkpoints(out)) == 2 and "continued from step" in record(out)["notes"][0]


def stopped(do, out, **changes):
    """A run that its session's end stops after a step or more."""
    status, output = do("job_train", out=out, **({"session_minutes": 0.015} | changes))
    assert status == 0, output
    return output


def test_the_end_of_the_session_stops_cleanly_and_the_next_one_goes_on(do, whole, tmp_path):
    out = tmp_path / "out"
    output = stopped(do, out, adapter=True)
    steps = record(out)["steps"]
    assert 0 < steps < STEPS and checkpoints(out)[-1].name == f"checkpoint-{steps}"
    assert f"stopped at step {steps} of {STEPS} (session_minutes=0.015 are used). Continue with this notebook" in output
    assert record(out)["notes"] == [f"stopped at step {steps} of {STEPS} (session_minutes=0.015 are used)"]
    assert (out / "DeepSeek-R1-Medical-COT" / "adapter_model.safetensors").is_file()
    seconds = record(out)["seconds"]
    status, output = do("job_train", out=out)
    assert status == 0 and f"going on from {checkpoints(out)[0].parent}/checkpoint-{steps}" in output
    same_run(out, whole)
    assert record(out)["notes"][-1] == f"continued from step {steps}" and record(out)["seconds"] > seconds


def test_an_attached_earlier_output_is_continued_and_left_as_it_is(do, whole, tmp_path):
    attached, out = tmp_path / "input" / "notebooks" / "anna" / "finetune", tmp_path / "out"
    stopped(do, attached)
    before = {path: path.stat().st_mtime_ns for path in attached.rglob("*")}
    status, output = do("job_train", out=out, earlier_output=tmp_path / "input")
    assert status == 0 and f"going on from {attached}" in output, output
    assert {path: path.stat().st_mtime_ns for path in attached.rglob("*")} == before
    same_run(out, whole)


def test_a_finished_run_is_taken_over_and_its_adapter_is_the_same(do, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "training.json").unlink()  # as after a kill between the last checkpoint and the record
    status, output = do("job_train", out=out, adapter=True)
    assert status == 0 and "already trained" in output and "to train anew" in output
    assert record(out)["steps"] == STEPS and losses(out) == losses(whole)
    weights = "adapter_model.safetensors"
    assert (out / "DeepSeek-R1-Medical-COT" / weights).read_bytes() == (checkpoints(whole)[-1] / weights).read_bytes()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("fault", ["cut off", "one bit", "gone", "no seal", "half a seal"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, tmp_path, capsys, name, fault):
    from medcot.run.checkpoints import last_checkpoint

    out = Path(shutil.copytree(whole, tmp_path / "out"))
    older, newest = checkpoints(out)
    file = newest / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "no seal":
        (newest / "checkpoint.json").unlink()
    elif fault == "half a seal":
        os.truncate(newest / "checkpoint.json", 500)
    elif fault == "gone":
        file.unlink()
    else:
        file.write_bytes(content if fault == "one bit" else content[:-20])
    settings = replace(PROFILES["smoke"], output_dir=out, **RUN)
    assert last_checkpoint(settings, record(whole)["identity"]) == older
    assert f"{newest} " in capsys.readouterr().out and not newest.exists()


def test_a_checkpoint_of_other_settings_is_refused_by_name(do, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = sorted(out.rglob("*"))
    status, output = do("job_train", out=out, learning_rate=1e-3, r=8)
    assert status == USER_ERROR and sorted(out.rglob("*")) == before
    assert "of another run: r was 16 and is 8, learning_rate was 0.002 and is 0.001. Set that back" in output
    status, output = do("job_train", out=out, train_rows=39)
    assert status == USER_ERROR and "of another run: train_rows was 40 and is 39" in output
    status, output = do("job_train", out=out, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert status == 0 and "already trained" in output  # the same examples a step


def test_two_processes_in_one_folder_are_refused(do, whole, tmp_path, workshop):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    with filelock.FileLock(out / "checkpoints" / ".lock"):
        status, output = do("job_train", out=out)
    assert status == USER_ERROR and "another process is writing to" in output and "MEDCOT_OUT" in output


def test_an_interrupt_stops_after_the_step_with_a_checkpoint(do, whole, tmp_path):
    out = tmp_path / "out"

    def interrupt(pid):
        assert until(lambda: checkpoints(out))
        os.kill(pid, signal.SIGINT)

    status, output = do("job_train", interrupt, out=out)
    steps = record(out)["steps"]
    assert status == 0 and steps < STEPS and f"stopped at step {steps} of {STEPS} (interrupted)" in output, output
    assert "stopping after this step, with a checkpoint" in output
    status, output = do("job_train", out=out)
    assert status == 0, output
    same_run(out, whole)


def test_an_interrupt_while_the_processes_ask_each_other_is_not_lost(settings, monkeypatch):
    from medcot.run import callbacks

    guard, history = callbacks.Guard(settings), []
    state = SimpleNamespace(global_step=3, max_steps=9, log_history=history)
    control = SimpleNamespace(should_training_stop=False, should_save=False)

    def interrupted(wishes):
        guard.stop = "interrupted"  # what the signal's handler does
        return wishes

    monkeypatch.setattr(callbacks, "gather_object", interrupted)
    guard.on_step_end(None, state, control)
    assert not control.should_training_stop  # the other process does not know of it yet
    monkeypatch.setattr(callbacks, "gather_object", lambda wishes: wishes)
    monkeypatch.setattr(callbacks, "check_disk", lambda *_: None)
    monkeypatch.setattr(callbacks, "checkpoint_bytes", lambda _: 0)
    guard.on_step_end(SimpleNamespace(output_dir="."), state, control)
    assert control.should_training_stop and history[-1]["note"] == "stopped at step 3 of 9 (interrupted)"


def long_rows(folder):
    """A data file of which every row is some 1,000 tokens long, the longest being row 10."""
    path = Path(folder) / "long.jsonl"
    texts = [" ".join(f"step {i} {j} adds {i * j % 10}" for j in range(80)) for i in range(60)]
    rows = [{"Question": f"Which {i}?", "Complex_CoT": text, "Response": "So."} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fault_memory(trainer):
    """The first step has only so much more address space; after it there is room again to write files and draw."""
    from transformers import TrainerCallback  # after unsloth, which the workshop has imported

    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(os.environ["ROOM_MIB"]) * 2**20, limits[1]))

    class Room(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            resource.setrlimit(resource.RLIMIT_AS, limits)

    trainer.add_callback(Room)


def job_train_in(loaded, mib, **arguments):
    os.environ["ROOM_MIB"] = str(mib)
    job_train(loaded, fault="memory", **arguments)


LONG = {"eval_rows": 8, "answer_rows": 4, "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-4}


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(do, tmp_path):
    rows = {"dataset": long_rows(tmp_path)} | LONG
    status, output = do("job_train", out=tmp_path / "ample", **rows)
    assert status == 0, output
    for mib in (500, 350, 250, 180, 125, 90):  # what four rows take differs between machines; one takes a quarter
        out = tmp_path / str(mib)
        status, output = do("job_train_in", out=out, mib=mib, **rows)
        assert status == 0, output
        if record(out)["notes"]:
            break
    note = "out of memory after step 0: micro-batch 4 to 2, accumulation 1 to 2"
    assert f"{note}, the same 4 examples a step" in output and record(out)["notes"][0] == note
    assert record(out)["examples_per_step"] == 4
    for (step, loss), (same, expected) in zip(losses(out), losses(tmp_path / "ample"), strict=True):
        assert step == same and loss == pytest.approx(expected, abs=2e-3)


def test_out_of_memory_at_one_example_names_the_longest(do, tmp_path):
    status, output = do("job_train_in", out=tmp_path / "out", mib=30, dataset=long_rows(tmp_path), **LONG)
    assert status == USER_ERROR and "micro-batch 2 to 1, accumulation 2 to 4" in output
    assert "out of memory with one example at a time: the longest is example 10 with" in output
    assert "set max_seq_length below that" in output


def poison(trainer, steps):
    """Makes the hidden states, and with them loss and gradients, NaN in these steps."""

    def after(module, inputs, output):
        return output * float("nan") if trainer.state.global_step + 1 in steps and module.training else output

    next(m for n, m in trainer.model.named_modules() if n.endswith("model.norm")).register_forward_hook(after)


def fault_nan_twice(trainer):
    poison(trainer, (3, 4))


def fault_nan_from_3(trainer):
    poison(trainer, range(3, 99))


def test_an_update_that_is_not_finite_is_skipped_and_counted(do, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    status, output = do("job_train", out=out, fault="nan_twice", max_steps=5, save_steps=1)
    assert status == 0 and "step 4: gradients not finite, update skipped (2 so far)" in output, output
    assert record(out)["skipped_updates"] == 2
    fourth, fifth = (load_file(path / "adapter_model.safetensors") for path in checkpoints(out))
    assert all(weight.isfinite().all() for weight in fifth.values())
    assert any((fourth[name] != weight).any() for name, weight in fifth.items())


def test_too_many_skipped_updates_stop_the_run_with_a_good_checkpoint(do, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    status, output = do("job_train", out=out, fault="nan_from_3")
    assert status == USER_ERROR and "11 updates in a row were skipped" in output and "lower learning_rate=" in output
    weights = [load_file(path / "adapter_model.safetensors") for path in checkpoints(out)]
    assert len(weights) == 2 and all(weight.isfinite().all() for weight in weights[-1].values())
    status, output = do("job_train", out=out)  # without the fault it goes on
    assert status == 0 and "going on from" in output, output


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_nearly_full_disk_is_refused_before_the_save(do, whole, small_disk):
    out = small_disk / "out"
    stopped(do, out, adapter=True)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20 * 2**20))
    status, output = do("job_train", out=out)
    assert status == USER_ERROR, output
    assert "has 20 MiB free and the next save needs 3" in output and "so it was not begun: delete what" in output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    filler.unlink()
    status, output = do("job_train", out=out)
    assert status == 0, output
    same_run(out, whole)


def job_save_twice(loaded, out, die_at):
    """Saves an adapter, changes it, saves it again and is killed before its `die_at`-th change of a name."""
    settings = replace(PROFILES["smoke"], output_dir=out)
    model, tokenizer = loaded
    model = add_lora(model, settings)
    save_adapter(model, tokenizer, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 1
    changes = count(1)

    def hook(event, arguments):
        if event in ("os.rename", "os.remove", "os.rmdir") and next(changes) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_adapter(model, tokenizer, settings)


def job_load(loaded, outs):
    from medcot.identity import adapter_id
    from medcot.model import load_model

    for out in outs:
        settings = replace(PROFILES["smoke"], output_dir=out)
        print("LOADED", adapter_id(load_model(settings, adapter=settings.adapter_dir)[0]))


def test_a_save_killed_at_any_change_of_a_name_leaves_an_adapter_that_loads(do, tmp_path):
    outs = []
    for die_at in range(1, 40):
        outs.append(tmp_path / str(die_at))
        status, output = do("job_save_twice", out=outs[-1], die_at=die_at)
        if status == 0:
            break
        assert status == -signal.SIGKILL, output
    assert status == 0 and len(outs) > 4
    status, output = do("job_load", outs=outs)
    loaded = [line.split()[1] for line in output.splitlines() if line.startswith("LOADED")]
    assert status == 0 and len(loaded) == len(outs), output
    assert len(set(loaded)) == 2  # the adapter before or the one after, never anything between


def job_answer(loaded, out):
    settings = replace(PROFILES["smoke"], output_dir=out, answer_rows=12, generation_batch_size=1)
    generate_answers(*loaded, load_splits(settings).eval, settings)


def answers(out):
    """The lines of the one answers file, without times."""
    (path,) = (Path(out) / "measured").glob("baseline-*.jsonl")
    return [{k: v for k, v in json.loads(line).items() if k != "batch_seconds"} for line in path.open()]


def test_killed_generation_keeps_its_answers_and_goes_on(do, tmp_path):
    status, output = do("job_answer", out=tmp_path / "whole")
    assert status == 0, output
    out = tmp_path / "out"

    def kill(pid):
        assert until(lambda: any(path.read_bytes().count(b"\n") > 4 for path in out.glob("measured/*.jsonl")))
        os.kill(pid, signal.SIGKILL)

    status, output = do("job_answer", kill, out=out)
    assert status == -signal.SIGKILL, output
    (path,) = (out / "measured").glob("*.jsonl")
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    with path.open("ab") as file:
        file.write(b'{"row": 3, "compl')  # as a kill within a write leaves it
    status, output = do("job_answer", out=out)
    assert status == 0, output
    assert path.read_bytes().startswith(kept) and answers(out) == answers(tmp_path / "whole")


def test_two_processes_that_answer_in_one_folder_are_refused(do, tmp_path):
    (tmp_path / "out" / "measured").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "out" / "measured" / ".lock"):
        status, output = do("job_answer", out=tmp_path / "out")
    assert status == USER_ERROR and "another process is writing to" in output
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.fixture
def sockets():
    """A folder with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_the_stop_button_of_a_notebook_leaves_a_checkpoint_and_runs_on(tmp_path, sockets, monkeypatch):
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("MEDCOT_OUT", str(tmp_path))
    notebook = nbformat.read(REPOSITORY / "notebooks" / "02_finetune.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("settings = load_settings()"))
    cell.source += "\nfrom dataclasses import replace\nsettings = replace(settings, save_steps=1, max_steps=90)"
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
    client = NotebookClient(notebook, km=manager, timeout=120)

    def press():
        if until(lambda: checkpoints(tmp_path)):
            os.kill(manager.provisioner.pid, signal.SIGINT)  # what the button sends

    presser = threading.Thread(target=press)
    presser.start()
    client.execute()
    presser.join()
    assert record(tmp_path)["steps"] < 90 and "(interrupted)" in record(tmp_path)["notes"][0]
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{record(tmp_path)['steps']}"
    assert (tmp_path / "DeepSeek-R1-Medical-COT" / "adapter_model.safetensors").is_file()


TELEMETRY = """
from medcot import load_settings, load_splits
load_splits(load_settings())
import os, huggingface_hub.constants as hub
names = "UNSLOTH_DISABLE_STATISTICS DO_NOT_TRACK WANDB_ERROR_REPORTING WANDB_LOG_MODEL"
print(hub.HF_HUB_DISABLE_TELEMETRY, *(os.environ[name] for name in names.split()))
"""


def test_telemetry_is_off_without_being_asked(tmp_path):
    environment = os.environ | {"MEDCOT_PROFILE": "smoke", "MEDCOT_OUT": str(tmp_path)}
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", TELEMETRY], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.splitlines()[-1] == "True 1 1 false false"
