"""All rows of a data set in one pass over several sessions: which rows, how many steps, the same run as in one session."""

import json
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
from datasets import Dataset
from test_reliability import checkpoints, losses, record, same_run
from workshop import USER_ERROR

from medcot import (
    MedcotError,
    add_lora,
    audit,
    data,
    load_model,
    load_splits,
    make_trainer,
    save_adapter,
    to_examples,
    train,
)
from medcot.profiles import PROFILES
from medcot.training import Forecast, total_steps


def row(i, **changes):
    return {"Question": f"Why {i}?", "Complex_CoT": f"Because {i}.", "Response": f"So {i}."} | changes


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(path)


def all_of(settings, file, **changes):
    """Settings that train on all of a file, in one pass."""
    return replace(settings, **{"dataset": file, "train_rows": 0, "max_steps": 0} | changes)


def numbers(rows):
    return [int(question.strip("?").split()[-1]) for question in rows["Question"]]


def test_all_other_rows_train_and_the_evaluation_rows_are_those_of_a_usual_run(settings, tmp_path, capsys):
    made = [row(i) for i in range(700)]
    made[503] = row(7)  # stands in a usual run's training rows
    made[505] = row(504)  # repeats an evaluation row
    made[650] = row(0, Question="WHY 506?", Response="Different.")  # asks what is evaluated, far behind
    file = write(tmp_path / "rows.jsonl", made)
    usual = load_splits(replace(settings, dataset=file, train_rows=500))
    capsys.readouterr()
    splits = load_splits(all_of(settings, file))
    assert splits.eval["Question"][:] == usual.eval["Question"][:]
    assert numbers(splits.eval) == [500, 501, 502, 504, *range(506, 514)]
    held_out = {500, 501, 502, 504, 505, *range(506, 514), 650}
    assert splits.train["Response"][:] == [made[i]["Response"] for i in range(700) if i not in held_out]
    assert not set(map(data.normalise, splits.train["Question"])) & set(map(data.normalise, splits.eval["Question"]))
    said = capsys.readouterr().out
    assert "1 moved out of evaluation because the question stands in training" in said
    assert "2 left out of training because the question is held out" in said and "unused" not in said


def test_of_a_small_file_the_last_rows_are_evaluated(settings, tmp_path):
    splits = load_splits(all_of(settings, write(tmp_path / "rows.jsonl", map(row, range(64)))))
    assert numbers(splits.train) == list(range(52)) and numbers(splits.eval) == list(range(52, 64))
    splits = load_splits(all_of(settings, write(tmp_path / "few.jsonl", map(row, range(20)))))
    assert numbers(splits.train) == list(range(16)) and numbers(splits.eval) == list(range(16, 20))


def test_the_steps_of_one_pass_are_counted_in_one_place(settings):
    settings = replace(settings, max_steps=0, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert [total_steps(n, settings) for n in (16, 17, 24, 19_604)] == [2, 3, 3, 2451]
    assert total_steps(19_604, replace(settings, nproc_per_node=2)) == 1226
    assert total_steps(17, replace(settings, max_steps=60)) == 60
    with pytest.raises(
        MedcotError, match=r"warmup_steps=5 leaves nothing of one pass over 40 examples, 5 steps: lower"
    ):
        total_steps(40, replace(settings, warmup_steps=5))


def test_the_recipe_says_all_rows_and_one_pass(settings):
    lines = all_of(PROFILES["kaggle-t4"], "a/b").recipe()[""]
    assert lines["training rows"] == "all the other rows of b" and lines["steps"] == "one pass, 8 examples each"
    assert lines["evaluation rows"] == "100 after the first 500, 18 answered in words"


@pytest.mark.parametrize("size", [4, 3])
def test_one_pass_takes_every_example_once(trained, tmp_path, size):
    """Whether or not the examples fill the last step."""
    settings = all_of(trained.settings, "-", per_device_train_batch_size=size, gradient_accumulation_steps=2)
    settings = replace(settings, output_dir=tmp_path, report_to="none", warmup_steps=0)
    examples = to_examples(trained.splits.train.select(range(20)), trained.tokenizer, settings, show=False)
    model, _ = load_model(settings)  # of its own: the shared one must stay as it was trained
    trainer = make_trainer(add_lora(model, settings), trained.tokenizer, examples, settings)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps == -(-20 // (2 * size))
    assert trainer.state.epoch == 1 and trainer.state.log_history[-1]["epoch"] == 1
    seen = [tuple(ids[mask == 1].tolist()) for batch in trainer.get_train_dataloader()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert sorted(seen) == sorted(map(tuple, examples["input_ids"]))


def test_rows_are_encoded_once_and_then_read_from_the_disk(settings, tokenizer, tmp_path, monkeypatch, capsys):
    settings = all_of(settings, write(tmp_path / "rows.jsonl", [row(i, Response="So. " * (i + 1)) for i in range(64)]))
    rows = load_splits(settings).train
    first = to_examples(rows, tokenizer, settings, show=False)
    encoded, once = [], data.encode_example

    def encode_example(row, tokenizer):
        encoded.append(row)
        return once(row, tokenizer)

    monkeypatch.setattr("medcot.data.encode_example", encode_example)

    def again(settings=settings, rows=None):
        encoded.clear()
        return to_examples(load_splits(settings).train if rows is None else rows, tokenizer, settings, show=False)

    assert again()[:] == first[:] and len(encoded) == 1  # the one by which the form of an example is told
    assert again().info.description == first.info.description
    assert audit(load_splits(settings), tokenizer, settings).token_counts == tuple(map(len, first["input_ids"]))
    shorter = again(replace(settings, max_seq_length=128 + len(first[0]["input_ids"]) // 2))
    assert len(encoded) == 1 and 0 < len(shorter) < len(first)  # what is too long is left out of the same file
    masked = again(replace(settings, completion_only_loss=not settings.completion_only_loss))
    assert len(encoded) == 1 + len(rows) and masked["completion_mask"][:] != first["completion_mask"][:]
    again(rows=rows.select(range(10)))
    assert len(encoded) == 1 + 10  # other rows
    tokenizer_before, prompt = tokenizer.backend_tokenizer.to_str(), data.format_completion
    monkeypatch.setattr("medcot.data.format_completion", lambda *texts: prompt(*texts).replace("So.", "Thus."))
    monkeypatch.setattr("medcot.data.encode_prompt", lambda *a: data.encode_completion("Other form: ", tokenizer))
    with pytest.raises(MedcotError, match="encodes to 0 BOS"):
        again()
    assert len(encoded) == 1 + len(rows)  # another prompt
    assert tokenizer.backend_tokenizer.to_str() == tokenizer_before


def test_the_forecast_counts_sessions_and_quota():
    kaggle = {"minutes_left": 690.0, "session_minutes": 700.0}
    assert [Forecast(9, minutes, **kaggle).sessions for minutes in (15, 690, 691, 1390, 1391)] == [1, 1, 2, 2, 3]
    assert Forecast(9, 5000.0, None).sessions == 1
    words = str(Forecast(2451, 1800.0, **kaggle))
    assert "2451 steps take about 1800.0 minutes of 690" in words
    assert words.endswith(", 3 sessions of 700 minutes, 30.0 of a week's 30 GPU hours on Kaggle")
    assert str(Forecast(60, 15.0, **kaggle)).endswith(
        ", 1 session of 700 minutes, 0.2 of a week's 30 GPU hours on Kaggle"
    )
    assert "session" not in str(Forecast(60, 15.0, None))


def test_preflight_foretells_the_sessions_of_one_pass_and_refuses_none(settings, tmp_path, monkeypatch, capsys):
    from medcot.run.preflight import preflight

    rows = Dataset.from_list([{k: each[k] for k in ("Question", "Complex_CoT", "Response")} for each in
                              load_splits(settings).train])  # fmt: skip
    settings = all_of(settings, write(tmp_path / "rows.jsonl", rows), session_minutes=0.001)
    with pytest.raises(MedcotError, match=r"minutes ended before 3 steps: raise session_minutes=0.001"):
        preflight(settings)
    monkeypatch.setattr("medcot.run.callbacks.minutes_left", lambda settings: 1e-4)  # a session that is nearly over
    capsys.readouterr()
    found = preflight(settings)
    assert found.steps == 13 and found.sessions > 1 and found.minutes > found.minutes_left
    assert f"13 steps take about {found.minutes:.1f} minutes" in (said := capsys.readouterr().out)
    assert f"{found.sessions} sessions of 0 minutes" in said
    two = preflight(replace(settings, nproc_per_node=2))
    assert two.steps == 7 and "7 steps take about" in capsys.readouterr().out
    with pytest.raises(MedcotError, match=r"do not fit the 0 that the session has left: lower max_steps=60"):
        preflight(replace(settings, max_steps=60))
    short = replace(settings, dataset=write(tmp_path / "short.jsonl", map(row, range(12))))
    with pytest.raises(MedcotError, match=r"one pass takes 2 steps and a forecast 3: give more"):
        preflight(replace(short, per_device_train_batch_size=5))


def job_session(loaded, out, file, steps=None):
    """02_finetune on all of a file, in a session whose minutes are used after `steps` steps, or that has no end."""
    from medcot.run.callbacks import minutes_left

    settings = all_of(PROFILES["smoke"], file, output_dir=out, report_to="none", learning_rate=2e-3, save_steps=5,
                      session_minutes=60.0 if steps else 0.0)  # fmt: skip
    model, tokenizer = loaded
    splits = load_splits(settings)
    examples = to_examples(splits.train, tokenizer, settings, show=False)
    held_out = to_examples(splits.loss_rows(settings), tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings, held_out)
    if steps:
        from transformers import TrainerCallback

        class LastStep(TrainerCallback):
            """Within the session's last step its minutes are used: it had fewer than so far seemed."""

            def on_step_begin(self, args, state, control, **_):
                self.begun = getattr(self, "begun", state.global_step)
                if state.global_step + 1 == self.begun + steps:
                    assert minutes_left(settings) > 0
                    object.__setattr__(settings, "session_minutes", 1e-4)

        trainer.add_callback(LastStep)
    train(trainer, settings)
    save_adapter(trainer.model, tokenizer, settings)


@pytest.fixture
def do(workshop, tmp_path):
    """Runs a session in a child process and returns what it printed."""
    number = count()

    def do(**arguments):
        status, output = workshop.do(__name__, "job_session", tmp_path / f"{next(number)}.log", **arguments)
        assert status in (0, USER_ERROR), output
        return SimpleNamespace(status=status, output=output)

    return do


def test_three_short_sessions_equal_one_long_one(do, settings, tmp_path):
    rows = load_splits(settings).train
    file = write(
        tmp_path / "rows.jsonl", ({k: each[k] for k in ("Question", "Complex_CoT", "Response")} for each in rows)
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert do(out=whole, file=file).status == 0
    steps = 13  # 52 of 64 rows, 4 a step
    assert record(whole)["steps"] == record(whole)["max_steps"] == steps and record(whole)["epochs"] == 1
    assert [
        do(out=out, file=file, steps=4).output.count(f"stopped at step {at} of {steps} (session") for at in (4, 8)
    ] == [1, 1]
    last = do(out=out, file=file)
    assert f"going on from {out}/checkpoints/checkpoint-8" in last.output
    same_run(out, whole)
    assert len(losses(out)) == steps and checkpoints(out)[-1].name == f"checkpoint-{steps}"
    notes = record(out)["notes"]
    assert [note.split(" (")[0] for note in notes] == ["stopped at step 4 of 13", "continued from step 4",
                                                       "stopped at step 8 of 13", "continued from step 8"]  # fmt: skip
    adapters = [
        (folder / "DeepSeek-R1-Medical-COT" / "adapter_model.safetensors").read_bytes() for folder in (out, whole)
    ]
    assert adapters[0] == adapters[1]
    assert "already trained" in do(out=out, file=file).output


def test_a_session_is_as_old_as_kaggles_container_but_not_as_a_machine_that_stands_for_it(
    settings, monkeypatch, tmp_path
):
    from medcot.run import callbacks

    now, limited = time.time(), replace(settings, session_minutes=100.0)
    born = {1: now - 3600, None: now}
    monkeypatch.setattr(callbacks.psutil, "Process", lambda pid=None: SimpleNamespace(create_time=lambda: born[pid]))
    monkeypatch.setattr(callbacks, "on_kaggle", lambda: True)
    assert callbacks.minutes_left(limited) == pytest.approx(40, abs=0.1)
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path))
    assert callbacks.minutes_left(limited) == pytest.approx(100, abs=0.1)
