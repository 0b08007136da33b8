"""Faults, put in through the operating system, and what is still there afterwards."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from workshop import Workshop, until

from medcot import add_lora, load_splits, make_trainer, save_adapter, to_examples, train
from medcot.settings import PROFILES

STEPS = 16
RUN = {"max_steps": STEPS, "save_steps": 1, "learning_rate": 2e-3, "report_to": "none", "train_rows": 40}


@pytest.fixture(scope="module")
def workshop():
    shop = Workshop()
    yield shop
    shop.close()


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
            # From the moment that a new checkpoint is begun on: within it, while it is sealed, in the steps after it.
            assert until(lambda: {path.name for path in checkpoints(out)} - before)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)

        status, output = do("job_train", kill, out=out)
        assert status == -signal.SIGKILL, output
        interrupted += any(not (path / "checkpoint.json").exists() for path in checkpoints(out))
    status, output = do("job_train", out=out)
    assert status == 0, output
    assert interrupted  # at least one kill fell into a save
    same_run(out, whole)
    assert len(checkpoints(out)) == 2 and "continued from step" in record(out)["notes"][0]
