"""Answers: batched, kept as they come, taken up again, never mixed up."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from medcot import evaluate, generate_answers, load_baseline, load_choices, load_model, load_splits, run_harness
from medcot.data import SHOWCASE_QUESTION
from medcot.inference import (
    BASELINE,
    FINETUNED,
    SHOWCASE_REFERENCE,
    _score_batch,
    baseline_status,
    chat_prompt,
    list_options,
    score_choices,
    score_references,
    showcase_row,
)
from medcot.prompts import format_completion, format_prompt
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


def test_on_kaggle_nobody_is_sent_back_to_another_session(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    baseline_status(settings)
    assert "runs in a session of its own: 03_compare.ipynb needs its answers" in capsys.readouterr().out


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


def test_a_torn_baseline_is_refused_and_left_as_it_is(base, rows, settings):
    answers = generate_answers(*base, rows, settings)
    answers.path.write_bytes(answers.path.read_bytes()[:-20])
    kept = answers.path.read_bytes()
    with pytest.raises(MedcotError, match=r"baseline-.*jsonl, line 7: cut off in the middle"):
        load_baseline(settings, rows)
    assert answers.path.read_bytes() == kept


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"row": 0}', "line 2: lacks completion, new_tokens, eos_token"), ("[]", "line 2: lacks row")],
)
def test_a_line_that_is_no_answer_is_named(base, rows, settings, line, message):
    answers = generate_answers(*base, rows, settings)
    lines = answers.path.read_text().splitlines(keepends=True)
    answers.path.write_text("".join([lines[0], line + "\n", *lines[2:]]))
    with pytest.raises(MedcotError, match=message):
        load_baseline(settings, rows)


# --- likelihood --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(trained):
    return load_model(trained.settings, adapter=trained.settings.adapter_dir)


@pytest.fixture
def questions(settings):
    return load_choices(settings).rows


def alone(model, tokenizer, prompt, text, bos=True):
    """Log-likelihood of `text` after `prompt`, from the logits of one unpadded row: the definition, spelled out."""
    before = tokenizer(prompt, add_special_tokens=bos)["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([before + tokens])).logits[0].double().log_softmax(-1)
    return sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(tokens))


@pytest.mark.parametrize("chat", [False, True])
def test_reference_likelihood_is_that_of_the_row_alone(tuned, rows, settings, chat):
    model, tokenizer = tuned
    scores = score_references(model, tokenizer, rows, settings, chat)
    for i, row in enumerate(rows):
        prompt = chat_prompt(row["Question"], tokenizer) if chat else format_prompt(row["Question"])
        text = format_completion(row["Complex_CoT"], row["Response"], tokenizer.eos_token)
        (found,), (tokens,) = scores.items[i]
        assert found == pytest.approx(alone(model, tokenizer, prompt, text, bos=not chat), rel=1e-4)
        assert tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_option_likelihoods_are_those_of_each_option_alone(tuned, questions, settings):
    # In one pass over a shared prompt, none of the options may see another one.
    model, tokenizer = tuned
    scores = score_choices(model, tokenizer, questions, settings)
    for i, row in enumerate(questions):
        prompt = format_prompt(list_options(row["question"], row["choices"])) + "\n</think>\n"
        expected = [alone(model, tokenizer, prompt, choice) for choice in row["choices"]]
        assert scores.items[i][0] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_adapter_switched_off_scores_as_the_base(base, tuned, questions, settings):
    model, tokenizer = tuned
    after = score_choices(model, tokenizer, questions, settings)
    with model.disable_adapter():
        before = score_choices(model, tokenizer, questions, settings)
    (settings.output_dir / "scores").rename(settings.output_dir / "kept")
    alone = score_choices(*base, questions, settings)
    assert (before.name, after.name) == (BASELINE, FINETUNED)
    assert alone.path.name == before.path.name  # the same weights and texts are the same file
    for i in range(len(questions)):
        assert before.items[i][0] == pytest.approx(alone.items[i][0], rel=1e-4)
    assert before.items != after.items


def test_logits_are_taken_a_few_positions_at_a_time(base, rows, settings, monkeypatch):
    model, tokenizer = base
    head, sizes = model.get_output_embeddings(), []
    monkeypatch.setattr(
        model, "get_output_embeddings", lambda: lambda hidden: sizes.append(len(hidden)) or head(hidden), raising=False
    )
    scores = score_references(model, tokenizer, rows, settings)
    assert sum(sizes) == sum(tokens[0] for _, tokens in scores.items.values()) and max(sizes) <= 256


def test_scores_are_kept_and_go_on_where_they_stopped(base, rows, settings, monkeypatch):
    settings = replace(settings, score_batch_tokens=400)  # two or three rows a batch
    whole = score_references(*base, rows, settings)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    whole.path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    forwards, decoder = [], base[0].get_decoder()
    monkeypatch.setattr(base[0], "get_decoder", lambda: lambda **inputs: forwards.append(1) or decoder(**inputs))
    assert score_references(*base, rows, settings).items == whole.items
    made = len(forwards)
    assert 0 < made < len(rows)
    assert score_references(*base, rows, settings).items == whole.items and len(forwards) == made


def test_a_damaged_score_is_named_and_nothing_is_overwritten(base, questions, settings):
    scores = score_choices(*base, questions, settings)
    lines = scores.path.read_text().splitlines(keepends=True)
    for line, message in (
        ("x\n", "line 3: not a JSON"),
        ('{"row": 99, "log_likelihood": [], "tokens": []}\n', "row 99 of 12"),
    ):
        scores.path.write_text("".join([*lines[:2], line, *lines[3:]]))
        kept = scores.path.read_bytes()
        with pytest.raises(MedcotError, match=message):
            score_choices(*base, questions, settings)
        assert scores.path.read_bytes() == kept


def test_a_row_over_the_limit_is_left_out_and_counted(base, rows, settings, capsys):
    lengths = [len(base[1](row["Question"] + row["Complex_CoT"])["input_ids"]) for row in rows]
    prompt = len(base[1](format_prompt(""))["input_ids"])
    settings = replace(settings, max_seq_length=max(128, prompt + sorted(lengths)[len(lengths) // 2]))
    scores = score_references(*base, rows, settings)
    assert 0 < len(scores) < len(rows)
    assert f"{len(rows) - len(scores)} of {len(rows)} rows are longer" in capsys.readouterr().out


def test_the_chat_prompt_has_one_bos_and_opens_the_thinking(tokenizer):
    text = chat_prompt("Where </think> is the pain?", tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and text.endswith("<think>\n") and text.count("</think>") == 0
    assert "expert" not in text  # the question alone: no instruction of this project


def test_both_sides_are_measured_from_one_load(tuned, trained, settings):
    model, tokenizer = tuned
    splits, questions = load_splits(settings), load_choices(settings)
    with model.disable_adapter():
        first = generate_answers(model, tokenizer, splits.eval, settings)  # as 01_baseline would have left it
        kept = first.path.stat().st_mtime_ns
        before = evaluate(model, tokenizer, splits, questions, settings)
    after = evaluate(model, tokenizer, splits, questions, replace(settings, choice_answer_rows=2))
    assert before.answers == first and first.path.stat().st_mtime_ns == kept
    assert len(before.chat_choices) == 6 and len(before.chat_references) == 12 and len(before.chat_answers) == 6
    assert [answer.question for answer in before.chat_answers] == [answer.question for answer in before.answers]
    assert [answer.completion for answer in before.chat_answers] != [answer.completion for answer in before.answers]
    assert (
        after.chat_choices is after.chat_answers is None
        and before.choice_answers is None
        and len(after.choice_answers) == 2
    )
    assert after.choice_answers[0].question == list_options(questions.rows[0]["question"], questions.rows[0]["choices"])
    assert before.references.path.parent.name == "scores" and before.showcase_trained and len(before.showcase) == 1
    assert after.showcase[0].question == before.showcase[0].question == splits.train[2]["Question"]
    assert load_baseline(settings, splits.eval) == first  # nothing else is mistaken for 01's answers


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ([SHOWCASE_QUESTION.upper()], [], ("R", True)),
        ([], [SHOWCASE_QUESTION], ("R", False)),
        ([], [], (SHOWCASE_REFERENCE, False)),
    ],
)
def test_the_showcase_question_is_labelled(train, evaluation, expected):
    def split(questions):
        return {"Question": questions, "Response": ["R"] * len(questions)}

    row = showcase_row(SimpleNamespace(source="x", train=split(train), eval=split(evaluation)))
    assert (row["Response"], row["training_row"]) == expected


# --- lm-evaluation-harness ---------------------------------------------------------------------------------------------

TASK = """task: local_cases
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: brier_score}}]
"""


def test_the_harness_measures_a_local_task_with_and_without_the_adapter(trained, questions, tmp_path):
    rows = questions[:8]
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(row | {"answer": row["answer_index"]}) + "\n" for row in rows))
    (tmp_path / "local_cases.yaml").write_text(TASK.format(file=file))
    settings = replace(trained.settings, output_dir=tmp_path)

    def brier(model):
        """The same score by our own likelihoods: the harness joins question and option by a space."""
        total = 0.0
        for row in rows:
            start = trained.tokenizer(row["question"])["input_ids"]
            ends = [trained.tokenizer(f"{row['question']} {c}")["input_ids"][len(start) :] for c in row["choices"]]
            shares = torch.tensor([_score_batch(model, trained.tokenizer, [(start, [end])])[0][0] for end in ends])
            wanted = torch.nn.functional.one_hot(torch.tensor(row["answer_index"]), len(ends))
            total += (shares.softmax(0) - wanted).square().sum().item()
        return total / len(rows)

    # The harness takes the base as its files are: those of the embedded model are not quantised.
    model, _ = load_model(replace(trained.settings, load_in_4bit=False), adapter=trained.settings.adapter_dir)
    with model.disable_adapter():
        expected = [brier(model)]
    expected.append(brier(model))
    found = [
        run_harness(settings, ["local_cases"], adapter, include_path=tmp_path)["local_cases"]["brier_score,none"]
        for adapter in (None, trained.settings.adapter_dir)
    ]
    assert abs(expected[0] - expected[1]) > 0.01
    assert found == pytest.approx(expected, abs=1e-3)
    assert {path.name for path in (tmp_path / "harness").iterdir()} == {BASELINE, FINETUNED}


def test_without_the_harness_the_extra_is_named(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MedcotError, match=r"pip install 'medcot\[harness\]'"):
        run_harness(settings, ["medqa_4options"])


def test_batches_hold_like_lengths_and_fit_the_memory(settings):
    from types import SimpleNamespace

    from medcot.inference import _batches_that_fit

    # The 8B's shape: 131,072 bytes of keys and values a token.
    config = SimpleNamespace(
        num_hidden_layers=32, num_key_value_heads=8, num_attention_heads=32, hidden_size=4096, intermediate_size=14336
    )
    prompts = [[0] * length for length in (*[200] * 40, *[1000] * 10)]
    t4 = replace(settings, max_new_tokens=1024, generation_batch_size=32, generation_memory_gib=6.0)
    batches = _batches_that_fit(range(50), prompts, SimpleNamespace(config=config), t4)
    assert [row for batch in batches for row in batch] == list(range(50))
    for batch in batches:
        longest = max(len(prompts[row]) for row in batch)
        assert len(batch) * (131_072 * (2 * longest + 1280) + longest * 307_200) <= 6 * 2**30
    assert [len(batch) for batch in batches] == [17, 17, 8, 8]  # 22 short ones would fit a batch
    tight = replace(t4, generation_memory_gib=0.001)
    assert [len(batch) for batch in _batches_that_fit(range(50), prompts, SimpleNamespace(config=config), tight)] == [
        1
    ] * 50


@pytest.mark.parametrize(
    ("rows", "processes", "sizes"),
    [(18, 1, [9, 9]), (32, 1, [16, 16]), (33, 1, [11, 11, 11]), (18, 2, [9, 9]), (31, 2, [16, 15]), (33, 2, [9, 9, 9, 6]), (1, 2, [1])],
)  # fmt: skip
def test_batches_are_even_and_divide_among_the_processes(settings, rows, processes, sizes):
    from types import SimpleNamespace

    from medcot.inference import _batches_that_fit

    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1, hidden_size=8, intermediate_size=8
    )
    settings = replace(settings, generation_batch_size=16, nproc_per_node=processes)
    batches = _batches_that_fit(range(rows), [[0] * 9] * rows, SimpleNamespace(config=config), settings)
    assert [len(batch) for batch in batches] == sizes


def test_what_prompts_begin_with_is_computed_once_and_changes_no_score(tuned, settings):
    from medcot.inference import _keys_and_values, _shared_tokens

    model, tokenizer = tuned
    items = {
        i: (tokenizer(f"The patient has {what}")["input_ids"], [[20, 21], [22], [23, 24, 25]])
        for i, what in enumerate(("fever and a cough.", "chest pain.", "a rash, fever and pain in the chest."))
    }
    shared = _shared_tokens(items)
    start = tokenizer("The patient has")["input_ids"]
    assert len(start) > 3 and shared[: len(start)] == start
    assert all(prompt[: len(shared)] == shared and len(prompt) > len(shared) for prompt, _ in items.values())
    whole = _score_batch(model, tokenizer, list(items.values()))
    halved = _score_batch(model, tokenizer, list(items.values()), _keys_and_values(model, shared))
    assert [len(scores) for scores in halved] == [3, 3, 3]
    for a, b in zip(whole, halved, strict=True):
        assert b == pytest.approx(a, abs=1e-3)
    assert _shared_tokens({0: (start, [[20], [21]])}) == start[:-1]  # a lone prompt keeps its last token to be computed
    assert _shared_tokens({0: (start, [[20]]), 1: (start, [[21]])}) == []


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
