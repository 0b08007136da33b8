"""Two processes take the same steps as one, leave the same files, and fail loudly when one of them dies."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from medcot import add_lora, load_model, make_trainer, to_examples, train
from medcot.modeling import ADAPTER_FILES, weights_id
from medcot.settings import MedcotError
from medcot.training import run_training, train_on_all_gpus


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """The same short run by one process (4 a micro-batch) and by two (2 each)."""
    one = replace(
        trained.settings,
        per_device_train_batch_size=4,
        max_steps=5,
        report_to="none",
        output_dir=tmp_path_factory.mktemp("one"),
    )
    two = replace(one, per_device_train_batch_size=2, nproc_per_node=2, output_dir=tmp_path_factory.mktemp("two"))
    train_on_all_gpus(two)
    run_training(one)
    return one, two


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


def test_the_notebook_finds_the_work_done(pair, capsys):
    _, two = pair
    model, tokenizer = load_model(two)
    from medcot import load_splits

    examples = to_examples(load_splits(two).train, tokenizer, two, show=False)
    trainer = make_trainer(add_lora(model, two), tokenizer, examples, two)
    train(trainer, two)
    assert "already trained" in capsys.readouterr().out
    saved, _ = load_model(two, adapter=two.adapter_dir)
    assert weights_id(trainer.model) == weights_id(saved)


def test_a_rank_that_dies_stops_the_run_loudly(pair, tmp_path):
    settings = replace(pair[1], output_dir=tmp_path, max_steps=4000, save_steps=4000)
    raised = []

    def run():
        try:
            train_on_all_gpus(settings)
        except MedcotError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline, victim = time.monotonic() + 120, None
    while victim is None and time.monotonic() < deadline:
        time.sleep(1)
        ranks = [
            p for p in psutil.Process(os.getpid()).children(recursive=True) if "medcot.cli" in " ".join(p.cmdline())
        ]
        victim = next((p for p in ranks if p.environ().get("RANK") == "1" and p.cpu_times().user > 8), None)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert raised and "training on 2 GPUs failed with status 1" in raised[0]
    assert not psutil.pid_exists(victim.pid)


def test_one_process_starts_nothing(trained, capsys):
    train_on_all_gpus(trained.settings)
    assert capsys.readouterr().out == "training runs in this notebook, below\n"
    assert not Path(trained.settings.output_dir / "settings.json").exists()


def test_one_process_does_not_go_on_with_half_the_examples_of_two(trained, tmp_path):
    two = replace(
        trained.settings, per_device_train_batch_size=2, nproc_per_node=2, output_dir=tmp_path, report_to="none"
    )
    examples = to_examples(trained.splits.train, trained.tokenizer, two, show=False)
    model, tokenizer = load_model(two)
    trainer = make_trainer(add_lora(model, two), tokenizer, examples, two)
    with pytest.raises(MedcotError, match=r"would take 2 examples a step and the settings say 4 .* train_on_all_gpus"):
        train(trainer, two)
