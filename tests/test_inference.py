"""Answers: batched, kept as they come, taken up again, never mixed up."""

import json
from dataclasses import replace

import pytest
import torch

from medcot import generate_answers, load_baseline, load_model, load_splits
from medcot.inference import BASELINE, FINETUNED, baseline_status
from medcot.prompts import format_prompt
from medcot.settings import NOTICE, MedcotError


@pytest.fixture(scope="module")
def base(trained):
    return load_model(trained.settings)


@pytest.fixture
def rows(settings):
    return load_splits(settings).eval


def generations(model, monkeypatch):
    """Counts the questions that reach the model from here on."""
    asked, generate = [], model.generate

    def counting(**inputs):
        asked.extend(range(len(inputs["input_ids"])))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counting)
    return asked


def test_batching_does_not_change_an_answer(base, rows, settings):
    model, tokenizer = base
    answers = generate_answers(model, tokenizer, rows, replace(settings, generation_batch_size=4))
    for row, answer in zip(rows, answers, strict=False):
        inputs = tokenizer(format_prompt(row["Question"]), return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=settings.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        alone = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert answer.completion == alone and answer.question == row["Question"]
        assert len(tokenizer.encode(answer.completion, add_special_tokens=False)) > 0


def test_a_second_call_asks_nothing(base, rows, settings, monkeypatch):
    first = generate_answers(*base, rows, settings)
    asked = generations(base[0], monkeypatch)
    assert generate_answers(*base, rows, settings) == first and asked == []
    assert first.name == BASELINE and len(first) == settings.answer_rows


def test_an_interrupted_run_goes_on_and_a_torn_line_is_redone(base, rows, settings, monkeypatch):
    settings = replace(settings, generation_batch_size=2)
    whole = generate_answers(*base, rows, settings)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    whole.path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # header, one batch of two, one answer, half an answer
    asked = generations(base[0], monkeypatch)
    assert generate_answers(*base, rows, settings).items == whole.items
    assert len(asked) == 4  # the batch with the torn answer is made again whole, and the one after it


def test_other_settings_get_another_file(base, rows, settings):
    first = generate_answers(*base, rows, settings)
    other = generate_answers(*base, rows, replace(settings, max_new_tokens=5))
    assert first.path != other.path and first.path.exists()
    assert max(answer.new_tokens for answer in other) <= 5


def test_before_and_after_are_told_apart_by_the_weights(trained, rows, settings):
    model, tokenizer = load_model(settings, adapter=trained.settings.adapter_dir)
    after = generate_answers(model, tokenizer, rows, settings)
    with model.disable_adapter():
        before = generate_answers(model, tokenizer, rows, settings)
    assert (before.name, after.name) == (BASELINE, FINETUNED)
    assert load_baseline(settings, rows) == before
    assert [a.completion for a in before] != [a.completion for a in after]


def test_sampling_is_seeded(base, rows, settings, tmp_path):
    hot = replace(settings, temperature=1.5)
    answers = [generate_answers(*base, rows, replace(hot, output_dir=tmp_path / str(i))).items for i in range(2)]
    other = generate_answers(*base, rows, replace(hot, seed=1)).items
    assert answers[0] == answers[1] != other


def test_without_a_baseline_the_notebook_to_run_is_named(settings, rows, capsys):
    with pytest.raises(MedcotError, match=r"not found: run 01_baseline.ipynb with the same profile first"):
        load_baseline(settings, rows)
    baseline_status(settings)
    assert "run 01_baseline.ipynb first" in capsys.readouterr().out


def test_a_baseline_of_other_settings_names_the_difference(base, rows, settings):
    generate_answers(*base, rows, settings)
    with pytest.raises(MedcotError, match=r"differs in max_new_tokens \(96 there, 7 now\)"):
        load_baseline(replace(settings, max_new_tokens=7), rows)


def test_an_unfinished_baseline_is_refused(base, rows, settings):
    answers = generate_answers(*base, rows, settings)
    answers.path.write_bytes(b"".join(answers.path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(MedcotError, match="holds 2 of 6 answers"):
        load_baseline(settings, rows)


def test_a_damaged_line_is_named_and_nothing_is_overwritten(base, rows, settings):
    answers = generate_answers(*base, rows, settings)
    lines = answers.path.read_text().splitlines(keepends=True)
    answers.path.write_text("".join([lines[0], "nonsense\n", *lines[2:]]))
    kept = answers.path.read_bytes()
    with pytest.raises(MedcotError, match=r"baseline-.*jsonl, line 2: not a JSON object"):
        generate_answers(*base, rows, settings)
    assert answers.path.read_bytes() == kept


def test_shown_answers_carry_the_notice_and_their_problems(base, rows, settings, capsys):
    generate_answers(*base, rows, replace(settings, max_new_tokens=3)).show(rows=1)
    shown = capsys.readouterr().out
    assert NOTICE in shown and "no EOS within the limit" in shown and rows[0]["Response"] in shown


def test_the_file_is_one_json_object_a_line(base, rows, settings):
    answers = generate_answers(*base, rows, settings)
    header, *kept = [json.loads(line) for line in answers.path.read_text().splitlines()]
    assert header["weights"] == "base" and header["model"] == settings.model
    assert sorted(answer["row"] for answer in kept) == list(range(settings.answer_rows))
    assert torch.is_grad_enabled()
