"""Answers: batched, kept as they come, taken up again, never mixed up."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from medcot import generate_answers, load_model, load_splits
from medcot.inference import batches_that_fit
from medcot.prompts import format_prompt
from medcot.run.kept import BASELINE, FINETUNED
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
    assert [a.completion for a in before] != [a.completion for a in after]


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
    assert header["identity"]["adapter"] == "base" and header["identity"]["max_new_tokens"] == settings.max_new_tokens
    assert sorted(answer["row"] for answer in kept) == list(range(settings.answer_rows))
    assert torch.is_grad_enabled()


def test_a_prompt_that_does_not_fit_is_left_out_and_counted(base, rows, settings, capsys):
    long = [row | {"Question": row["Question"] * (6 if i in (1, 4) else 1)} for i, row in enumerate(rows)]
    lengths = [len(base[1](format_prompt(row["Question"]))["input_ids"]) for row in long[:6]]
    assert [i for i, length in enumerate(lengths) if length > 128] == [1, 4]
    answers = generate_answers(*base, Dataset.from_list(long), replace(settings, max_seq_length=128))
    assert answers.left_out == (1, 4) and [answer.row for answer in answers] == [0, 2, 3, 5]
    assert "2 of 6 prompts are longer than 128 tokens and are left out" in capsys.readouterr().out


def test_batches_hold_like_lengths_and_fit_the_memory(settings):
    # The 8B's shape: 131,072 bytes of keys and values a token.
    config = SimpleNamespace(
        num_hidden_layers=32, num_key_value_heads=8, num_attention_heads=32, hidden_size=4096, intermediate_size=14336
    )
    prompts = {i: [0] * length for i, length in enumerate((*[200] * 40, *[1000] * 10))}
    t4 = replace(settings, max_new_tokens=1024, generation_batch_size=32, generation_memory_gib=6.0)
    batches = batches_that_fit(prompts, SimpleNamespace(config=config), t4)
    assert [row for batch in batches for row in batch] == list(range(50))
    for batch in batches:
        longest = max(len(prompts[row]) for row in batch)
        reading, written = longest * (131_072 + 307_200), 131_072 * (2 * longest + 1280)
        assert len(batch) * max(reading, written) <= 6 * 2**30
    assert [len(batch) for batch in batches] == [18, 18, 14]  # 28 short ones would fit a batch
    tight = replace(t4, generation_memory_gib=0.001)
    assert [len(batch) for batch in batches_that_fit(prompts, SimpleNamespace(config=config), tight)] == [1] * 50


@pytest.mark.parametrize(
    ("rows", "processes", "sizes"),
    [(18, 1, [9, 9]), (32, 1, [16, 16]), (33, 1, [11, 11, 11]), (18, 2, [9, 9]), (31, 2, [16, 15]), (33, 2, [9, 9, 9, 6]), (1, 2, [1])],
)  # fmt: skip
def test_batches_are_even_and_divide_among_the_processes(settings, rows, processes, sizes):
    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1, hidden_size=8, intermediate_size=8
    )
    settings = replace(settings, generation_batch_size=16, nproc_per_node=processes)
    batches = batches_that_fit(dict.fromkeys(range(rows), [0] * 9), SimpleNamespace(config=config), settings)
    assert [len(batch) for batch in batches] == sizes


def test_a_batch_that_does_not_fit_is_tried_once_more_and_then_named(base, rows, settings, monkeypatch):
    model, tokenizer = base
    whole = generate_answers(model, tokenizer, rows, settings)
    generate, failures = model.generate, []

    def starved(**inputs):
        if len(failures) < limit:
            failures.append(len(inputs["input_ids"]))
            raise torch.OutOfMemoryError("injected: this machine has no GPU to fill")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", starved)
    whole.path.unlink()
    limit = 1
    assert generate_answers(model, tokenizer, rows, settings).items == whole.items and len(failures) == 1
    whole.path.unlink()
    limit = 3
    with pytest.raises(MedcotError, match=r"out of memory with 6 questions of .* lower generation_batch_size"):
        generate_answers(model, tokenizer, rows, settings)
