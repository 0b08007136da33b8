"""Likelihoods: those of each text alone, kept as they come, taken up again."""

from dataclasses import replace

import pytest
import torch

from medcot import load_choices, load_model, load_splits
from medcot.evaluation.likelihood import _keys_and_values, _score_batch, _shared_tokens, score_choices, score_references
from medcot.prompts import chat_prompt, format_completion, format_prompt, list_options
from medcot.run.kept import BASELINE, FINETUNED
from medcot.settings import MedcotError


@pytest.fixture(scope="module")
def base(trained):
    return load_model(trained.settings)


@pytest.fixture
def rows(settings):
    return load_splits(settings).eval


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
        (found,), (tokens,) = scores.items[i].log_likelihood, scores.items[i].tokens
        assert found == pytest.approx(alone(model, tokenizer, prompt, text, bos=not chat), rel=1e-4)
        assert tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_option_likelihoods_are_those_of_each_option_alone(tuned, questions, settings):
    # In one pass over a shared prompt, none of the options may see another one.
    model, tokenizer = tuned
    scores = score_choices(model, tokenizer, questions, settings)
    for i, row in enumerate(questions):
        prompt = format_prompt(list_options(row["question"], row["choices"])) + "\n</think>\n"
        expected = [alone(model, tokenizer, prompt, choice) for choice in row["choices"]]
        assert scores.items[i].log_likelihood == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_adapter_switched_off_scores_as_the_base(base, tuned, questions, settings):
    model, tokenizer = tuned
    after = score_choices(model, tokenizer, questions, settings)
    with model.disable_adapter():
        before = score_choices(model, tokenizer, questions, settings)
    (settings.output_dir / "measured").rename(settings.output_dir / "kept")
    alone = score_choices(*base, questions, settings)
    assert (before.name, after.name) == (BASELINE, FINETUNED)
    assert alone.path.name == before.path.name  # the same weights and texts are the same file
    for i in range(len(questions)):
        assert before.items[i].log_likelihood == pytest.approx(alone.items[i].log_likelihood, rel=1e-4)
    assert before.items != after.items


def test_logits_are_taken_a_few_positions_at_a_time(base, rows, settings, monkeypatch):
    model, tokenizer = base
    head, sizes = model.get_output_embeddings(), []
    monkeypatch.setattr(
        model, "get_output_embeddings", lambda: lambda hidden: sizes.append(len(hidden)) or head(hidden), raising=False
    )
    scores = score_references(model, tokenizer, rows, settings)
    assert sum(sizes) == sum(scored.tokens[0] for scored in scores.items.values()) and max(sizes) <= 256


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
        ('{"row": 99, "log_likelihood": [], "tokens": []}\n', "is about row 99, which was not asked"),
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
    assert 0 < len(scores) < len(rows) and len(scores.left_out) == len(rows) - len(scores)
    assert f"{len(scores.left_out)} of {len(rows)} rows are longer" in capsys.readouterr().out


def test_a_question_over_the_limit_is_left_out_and_counted(base, questions, settings, capsys):
    long = questions[0] | {"question": "pain " * 3000}
    scores = score_choices(*base, [questions[1], long, questions[2]], settings)
    assert scores.left_out == (1,) and set(scores.items) == {0, 2}
    assert "1 of 3 rows are longer than 2048 tokens and left out" in capsys.readouterr().out


def test_the_chat_prompt_has_one_bos_and_opens_the_thinking(tokenizer):
    text = chat_prompt("Where </think> is the pain?", tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and text.endswith("<think>\n") and text.count("</think>") == 0
    assert "expert" not in text  # the question alone: no instruction of this project


def test_what_prompts_begin_with_is_computed_once_and_changes_no_score(tuned, settings):
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
