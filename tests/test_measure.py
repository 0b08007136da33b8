"""Everything one model is measured by, and the judge from outside."""

import importlib.util
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from medcot import evaluate, generate_answers, identity, load_choices, load_model, load_splits, run_harness
from medcot.data import SHOWCASE_QUESTION
from medcot.evaluation.compare import compare
from medcot.evaluation.likelihood import _score_batch
from medcot.evaluation.measure import SHOWCASE_REFERENCE, declare, primary_questions, showcase_row
from medcot.prompts import list_options
from medcot.run.kept import BASELINE, FINETUNED
from medcot.settings import MedcotError


@pytest.fixture(scope="module")
def tuned(trained):
    return load_model(trained.settings, adapter=trained.settings.adapter_dir)


@pytest.fixture
def questions(settings):
    return load_choices(settings).rows


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
    assert before.references.path.parent.name == "measured" and before.showcase_trained and len(before.showcase) == 1
    assert after.showcase[0].question == before.showcase[0].question == splits.train[2]["Question"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "right answer, over 6 evaluation rows of embedded cases, answered in words"),
        ({"primary_measure": "multiple choice"}, "multiple choice, over 12 multiple-choice questions of embedded cases, by likelihood"),
    ],
)  # fmt: skip
def test_the_primary_measure_is_declared_once_before_anything_is_measured(settings, capsys, changes, said):
    settings = replace(settings, **changes)
    splits, questions = load_splits(settings), load_choices(settings)
    capsys.readouterr()
    declare(splits, questions, settings)
    shown = capsys.readouterr().out
    assert (
        shown.startswith(f"primary measure, declared before anything is measured: {said}\n")
        and "ew questions: " in shown
    )
    (settings.output_dir / "measured").mkdir()
    (settings.output_dir / "measured" / "baseline-answers-1.jsonl").touch()
    declare(splits, questions, settings)
    assert not capsys.readouterr().out


def test_a_measure_chosen_after_the_results_is_refused(tuned, settings):
    splits, questions = load_splits(settings), load_choices(settings)
    evaluate(*tuned, splits, questions, settings)
    with pytest.raises(MedcotError, match="primary_measure was right answer and is multiple choice"):
        identity.check(replace(settings, primary_measure="multiple choice"))


def test_rows_without_an_answer_leave_right_answers_to_the_questions_asked_in_words(settings):
    splits, questions = load_splits(settings), load_choices(settings)
    plain = replace(splits, eval=splits.eval.remove_columns(["choices", "answer_index", "answer"]))
    assert primary_questions(plain, questions, replace(settings, choice_answer_rows=5))[0] == 5
    assert primary_questions(plain, questions, settings)[0] == 0
    assert primary_questions(splits, questions, replace(settings, choice_answer_rows=5))[0] == settings.answer_rows


def test_a_primary_measure_that_nothing_can_be_graded_by_is_named_before_anything_is_measured(settings, capsys):
    splits, questions = load_splits(settings), load_choices(settings)
    plain = replace(splits, eval=splits.eval.remove_columns(["choices", "answer_index", "answer"]))
    declare(plain, questions, settings)
    assert "nothing that is answered in words can be graded: give the rows options" in capsys.readouterr().out


def test_a_row_whose_prompt_does_not_fit_is_left_out_on_both_sides_and_counted(tuned, trained, settings):
    model, tokenizer = tuned
    splits, questions = load_splits(settings), load_choices(settings)
    splits = replace(
        splits,
        eval=splits.eval.map(
            lambda row, i: {"Question": "pain " * 3000 if i == 1 else row["Question"]}, with_indices=True
        ),
    )
    settings = replace(settings, chat_rows=0)
    with model.disable_adapter():
        before = evaluate(model, tokenizer, splits, questions, settings)
    after = evaluate(model, tokenizer, splits, questions, settings)
    assert before.answers.left_out == after.answers.left_out == before.references.left_out == (1,)
    assert before.too_long == 1 and "1 too long, left out" in str(before)
    comparison = compare(before, after, splits.eval, questions)
    assert comparison.left_out.too_long == 1 and 1 not in {pair.row for pair in comparison.pairs}
    assert comparison.primary == settings.primary_measure and comparison.rows_source == "embedded cases"


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


# The harness reads the files of all its own tasks, 14,000 of them, before it looks for the one that it was asked for.
ONLY_LOCAL_TASKS = """
import functools, sys
if "lm_eval" in sys.orig_argv:
    from lm_eval.tasks import TaskManager
    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
"""


def test_the_harness_measures_a_local_task_with_and_without_the_adapter(trained, questions, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ONLY_LOCAL_TASKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
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
    model, _ = load_model(replace(settings, load_in_4bit=False), adapter=trained.settings.adapter_dir)
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
