"""Grading and paired statistics: right is right, swapping flips every sign, and itself is no different."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot.evaluation import compare, grade, paired_proportions
from medcot.inference import Answer, Answers
from medcot.settings import MedcotError

EOS = "<eos>"
ROW = {"Question": "Why?", "Complex_CoT": "one: 1\ntwo: 2", "Response": "This is a score of 2.", "answer": "score of 2",
       "family": "sums"}  # fmt: skip


def answer(completion, question="Why?"):
    return Answer(question, ROW["Response"], completion, 5, EOS)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("one: 1\ntwo: 2\n</think>\nThis is a score of 2.<eos>", (True, True, True)),
        (" one: 1 \n\ntwo: 2\n</think>\n\nThis is a SCORE  of 2<eos>", (True, True, True)),
        ("one: 1\n</think>\nThis is a score of 2.<eos>", (True, True, False)),
        ("one: 1\ntwo: 2\n</think>\nThis is a score of 3.<eos>", (True, False, True)),
        ("one: 1\ntwo: 2\n</think>\nThis is a score of 21.<eos>", (True, False, True)),
        ("one: 1\ntwo: 2\n</think>\nThis is a score of 2.", (False, True, True)),
        ("This is a score of 2.<eos>", (False, False, False)),
        ("one: 1\ntwo: 2\n</think>\n<eos>", (False, False, True)),
    ],
)
def test_grading(completion, expected):
    outcome = grade(ROW, answer(completion))
    assert (outcome.well_formed, outcome.correct, outcome.steps_correct) == expected


def test_rows_without_an_answer_are_graded_for_form_only():
    outcome = grade({**ROW, "answer": None}, answer("a\n</think>\nb<eos>"))
    assert (outcome.well_formed, outcome.correct, outcome.steps_correct) == (True, None, None)


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(PAIRS)
@settings(deadline=None)
def test_swapping_before_and_after_flips_every_sign(pairs):
    before, after = zip(*pairs, strict=True)
    there, back = paired_proportions("x", before, after), paired_proportions("x", after, before)
    assert back.difference == pytest.approx(-there.difference)
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))
    assert back.p_value == pytest.approx(there.p_value)
    flipped = {"better": "worse", "worse": "better", "no detectable difference": "no detectable difference"}
    assert back.verdict == flipped[there.verdict]


@given(st.lists(st.booleans(), min_size=2, max_size=60))
@settings(deadline=None)
def test_a_model_compared_with_itself_is_no_different(outcomes):
    measure = paired_proportions("x", outcomes, outcomes)
    assert measure.verdict == "no detectable difference" and measure.difference == 0


def test_exact_mcnemar_against_a_textbook_sum():
    # 9 fixed, 1 broken: two-sided binomial, 2 * (C(10,0) + C(10,1)) / 2^10
    before = [False] * 9 + [True] + [True] * 10
    after = [True] * 9 + [False] + [True] * 10
    measure = paired_proportions("x", before, after)
    assert measure.p_value == pytest.approx(2 * (1 + 10) / 2**10) and measure.verdict == "better"


def answers(completions, questions=None):
    questions = questions or [f"Why {i}?" for i in range(len(completions))]
    return Answers("x", Path("x.jsonl"), tuple(map(answer, completions, questions)))


ROWS = [ROW | {"Question": f"Why {i}?"} for i in range(8)]
RIGHT, WRONG = "one: 1\ntwo: 2\n</think>\nThis is a score of 2.<eos>", "one: 1\n</think>\nThis is a score of 1.<eos>"


def test_a_comparison_counts_and_speaks():
    comparison = compare(answers([WRONG] * 7 + [RIGHT]), answers([RIGHT] * 8), ROWS)
    right = next(measure for measure in comparison.measures if measure.name == "right answer")
    assert (right.n, right.before, right.after, right.verdict) == (8, 1 / 8, 1.0, "better")
    assert "right answer, sums" in str(comparison) and "exact McNemar" in str(comparison)
    worse = compare(answers([RIGHT] * 8), answers([WRONG] * 7 + [RIGHT]), ROWS)
    assert next(m for m in worse.measures if m.name == "right answer").verdict == "worse"


def test_answers_to_other_questions_are_refused():
    with pytest.raises(MedcotError, match=r"answer 1 .* is to another question than row 1"):
        compare(answers([RIGHT] * 2, ["Why 0?", "Who?"]), answers([RIGHT] * 2), ROWS)
    with pytest.raises(MedcotError, match=r"has 2 answers and .* 3"):
        compare(answers([RIGHT] * 2), answers([RIGHT] * 3), ROWS)


def test_measures_are_frozen_values():
    measure = paired_proportions("x", [True, False], [True, True])
    assert replace(measure, after=measure.before).difference == 0
