"""The comparison: every row paired, counted, measured once, and judged."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
from synthetic import (
    QUESTIONS,
    RIGHT,
    ROW,
    ROWS,
    WRONG,
    Split,
    answers,
    named,
    nothing_changed,
    references,
    results,
    scores,
)
from test_statistics import FLIPPED

from medcot.evaluation.compare import compare
from medcot.evaluation.leaks import check_leaks
from medcot.evaluation.measure import Results
from medcot.evaluation.pairs import Pair
from medcot.evaluation.statistics import FAMILY, PRIMARY, PROMPT, TOO_FEW, UNCHANGED, paired_proportions
from medcot.settings import MedcotError

MANY = [ROW | {"Question": f"Why {i}?"} for i in range(24)]


def test_a_comparison_counts_and_judges():
    comparison = compare(answers([WRONG] * 20 + [RIGHT] * 4), answers([RIGHT] * 24), MANY)
    right = comparison.measures[0]
    assert (right.name, right.group, right.n, right.before, right.after) == ("right answer", PRIMARY, 24, 4 / 24, 1.0)
    assert (right.verdict, right.fixed, right.broken) == ("better", 20, 0)
    assert named(comparison, "right answer, sums").group == FAMILY
    worse = compare(answers([RIGHT] * 24), answers([WRONG] * 20 + [RIGHT] * 4), MANY)
    assert worse.measures[0].verdict == "worse"


def test_likelihoods_are_compared_and_what_was_forgotten_is_listed():
    before = results([RIGHT] * 7 + [WRONG], [2.0 + 0.1 * i for i in range(8)], [2] * 7 + [0])
    after = results([WRONG] + [RIGHT] * 7, [1.0 + 0.12 * i for i in range(8)], [2] * 4 + [1] * 3 + [2])
    comparison = compare(before, after, ROWS, QUESTIONS)
    nats, choice = named(comparison, "reference, nats per token"), named(comparison, "multiple choice")
    assert nats.n == 8 and nats.before == pytest.approx(2.35) and nats.high < 0
    assert (choice.fixed, choice.broken, choice.before, choice.after) == (1, 3, 7 / 8, 5 / 8)
    forgotten = comparison.forgotten
    assert list(zip(forgotten["asked"], forgotten["question"], strict=True)) == [
        ("evaluation row", "Why 0?"), ("by likelihood", "Which 4?"), ("by likelihood", "Which 5?"), ("by likelihood", "Which 6?"),
    ]  # fmt: skip
    assert list(forgotten.iloc[1]) == ["by likelihood", "Which 4?", "yes", "yes", "perhaps"]
    assert [pair.change for pair in comparison.examples] == ["fixed", "broken", "unchanged"]
    assert [pair.question for pair in comparison.examples] == ["Why 7?", "Why 0?", "Why 1?"]


def test_swapping_the_sides_of_a_comparison_flips_every_measure():
    before, after, rows, questions = nothing_changed(3, 40, 4)
    there, back = compare(before, after, rows, questions), compare(after, before, rows, questions)
    for one, other in zip(there.measures, back.measures, strict=True):
        assert one.name == other.name and other.difference == pytest.approx(-one.difference)
        assert other.verdict == FLIPPED[one.verdict]


def test_results_are_typed_and_frozen():
    comparison = compare(answers([WRONG] * 8), answers([RIGHT] * 8), ROWS)
    assert isinstance(comparison.pairs[0], Pair) and comparison.pairs[0].before.outcome.correct is False
    with pytest.raises(FrozenInstanceError):
        comparison.measures[0].n = 3


def test_the_parts_of_results_are_named_once():
    one = results([RIGHT], [1.0], [2])
    assert list(one.parts) == ["answers", "references", "choices"]
    assert set(one.parts) < {field.name for field in fields(Results)}


# --- the prompt is not the tuning --------------------------------------------------------------------------------------


def through_both_prompts(n=40):
    """A base model that is lost in this project's prompt and right through its own chat template."""
    rows = [ROW | {"Question": f"Why {i}?"} for i in range(n)]
    questions = replace(QUESTIONS, rows=tuple(QUESTIONS.rows[0] | {"question": f"Which {i}?"} for i in range(n)))
    base = results([WRONG] * n, [2.0 + i / n for i in range(n)], [0] * n,
                   chat_answers=answers([RIGHT] * n), chat_choices=scores([2] * n),
                   chat_references=references([1.0 + i / n / 2 for i in range(n)]))  # fmt: skip
    return base, replace(base, chat_answers=None, chat_choices=None, chat_references=None), rows, questions


def test_the_base_compared_with_itself_gets_no_verdict():
    base, itself, rows, questions = through_both_prompts()
    comparison = compare(base, itself, rows, questions)
    assert {m.verdict for m in comparison.measures} <= {UNCHANGED, TOO_FEW, None}
    assert not len(comparison.forgotten) and "no detectable difference" in comparison.headline


def test_what_the_prompt_alone_does_is_a_row_of_its_own():
    comparison = compare(*through_both_prompts())
    alone = {m.name: m for m in comparison.measures if m.group == PROMPT}
    assert set(alone) == {f"{name}, prompt alone" for name in ("right answer", "multiple choice", "reference")}
    for name in (
        "right answer, prompt alone",
        "multiple choice, prompt alone",
    ):  # own template, then ours; both the base
        assert (alone[name].n, alone[name].before, alone[name].after, alone[name].verdict) == (40, 1.0, 0.0, None)
    assert alone["reference, prompt alone"].difference == pytest.approx(1.24, abs=0.01)
    assert all(m.adjusted_p is None for m in alone.values())


# --- what is asked in words --------------------------------------------------------------------------------------------


def in_words(letters, completions=(WRONG,) * 8):
    asked = [f"Which {i}?\nA. no\nB. perhaps\nC. yes" for i in range(len(letters))]
    said = [f"x\n</think>\nThe answer is {letter}.<eos>" for letter in letters]
    return Results(answers(completions), choice_answers=answers(said, asked))


def test_generated_multiple_choice_answers_are_graded_by_the_chosen_option():
    rows = [row | {"answer": None, "family": None} for row in ROWS]
    comparison = compare(in_words("AA"), in_words("CC"), rows, QUESTIONS)
    right = named(comparison, "right answer")
    assert (right.n, right.before, right.after) == (2, 0.0, 1.0) and named(comparison, "option extracted").after == 1
    assert named(comparison, "well formed").n == 10
    assert {pair.asked_as for pair in comparison.pairs} == {"evaluation row", "multiple-choice question"}


def test_own_rows_and_other_questions_are_never_one_measure():
    comparison = compare(in_words("AA"), in_words("CC", [RIGHT] * 8), ROWS, QUESTIONS)
    assert (named(comparison, "right answer").n, named(comparison, "right answer, multiple choice").n) == (8, 2)
    assert any("8 evaluation rows and 2 multiple-choice questions together" in note for note in comparison.notes)


def test_a_primary_measure_that_cannot_be_graded_is_no_answer():
    comparison = compare(answers([WRONG] * 8), answers([RIGHT] * 8), [row | {"answer": None} for row in ROWS])
    assert comparison.headline.startswith("No answer: right answer, the primary measure, was not measured")
    assert all(m.group != PRIMARY for m in comparison.measures)


def test_a_repeated_question_counts_once():
    rows = [ROW | {"Question": f"Why {i // 2}?"} for i in range(24)]
    asked = [row["Question"] for row in rows]
    comparison = compare(answers([WRONG] * 24, asked), answers([RIGHT] * 24, asked), rows)
    assert comparison.measures[0].n == 12 and comparison.left_out.repeated == 12
    assert any("12 questions repeat an earlier one" in note for note in comparison.notes)
    options = replace(QUESTIONS, rows=(QUESTIONS.rows[0], QUESTIONS.rows[0] | {"choices": ["a", "b", "c"]}))
    both = [results([RIGHT] * 2, [1.0, 1.1], [2, 2]) for _ in range(2)]
    comparison = compare(*both, ROWS, options)  # the same stem with other options is another question
    assert named(comparison, "multiple choice").n == 2


def test_rows_that_are_too_long_are_counted_on_both_sides():
    def side(text):
        made = answers([text] * 8)
        return Results(
            replace(made, items=made.items[1:], left_out=(0,)), references=replace(references([1.0] * 8), left_out=(8,))
        )

    comparison = compare(side(WRONG), side(RIGHT), ROWS)
    assert comparison.measures[0].n == 7 and comparison.left_out.too_long == 2
    assert any("2 questions are longer than max_seq_length" in note for note in comparison.notes)


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_answers_to_other_questions_are_refused():
    with pytest.raises(MedcotError, match=r"answer 1 in x.jsonl is to another question than evaluation row 1"):
        compare(answers([RIGHT] * 2, ["Why 0?", "Who?"]), answers([RIGHT] * 2), ROWS)
    with pytest.raises(MedcotError, match=r"has 2 answers and .* 3"):
        compare(answers([RIGHT] * 2), answers([RIGHT] * 3), ROWS)
    with pytest.raises(MedcotError, match=r"answer 8 .*no such row"):
        compare(answers([RIGHT] * 9), answers([RIGHT] * 9), ROWS)


def test_a_primary_measure_chosen_between_the_sides_is_refused():
    before, after = results([RIGHT], [1.0], [2]), results([RIGHT], [1.0], [2], primary_measure="multiple choice")
    with pytest.raises(MedcotError, match="before was measured for 'right answer' and after for 'multiple choice'"):
        compare(before, after, ROWS, QUESTIONS)


def test_a_missing_reference_is_named():
    with pytest.raises(MedcotError, match=r"row 1 .* has no reference"):
        compare(answers([RIGHT] * 2), answers([RIGHT] * 2), [ROWS[0], ROWS[1] | {"Response": " "}])


def test_a_choice_out_of_range_is_named():
    row = ROWS[0] | {"choices": ["score of 1", "score of 2"], "answer_index": 2}
    with pytest.raises(MedcotError, match="evaluation row 0: answer 2 is out of range for its 2 choices"):
        compare(answers([RIGHT]), answers([RIGHT]), [row])


def test_rows_with_lettered_options_are_graded_by_them():
    options = {"A": "score of 1", "B": "score of 2", "C": None}  # as `datasets` fills a column that other rows need
    row = ROWS[0] | {"options": options, "answer_idx": "B", "family": None}
    comparison = compare(answers([WRONG]), answers([RIGHT]), [row])
    assert (named(comparison, "right answer").before, named(comparison, "right answer").after) == (0, 1)
    assert comparison.pairs[0].expected == "score of 2"
    assert "every step right" not in [m.name for m in comparison.measures]


def test_scores_of_other_rows_are_refused():
    before, after = results([RIGHT], [1.0], [2]), results([RIGHT], [1.0], [2])
    one = replace(QUESTIONS, rows=QUESTIONS.rows[:1])
    with pytest.raises(MedcotError, match="row 1 was scored in only one of"):
        compare(before, replace(after, references=references([1.0, 1.0])), ROWS, one)
    with pytest.raises(MedcotError, match="measured on one side only"):
        compare(before, replace(after, choices=None), ROWS, one)
    with pytest.raises(MedcotError, match="does not hold the options of question 1"):
        compare(before, after, ROWS, QUESTIONS)


# --- leaks -------------------------------------------------------------------------------------------------------------


def test_what_leaked_is_left_out_and_said():
    leaks = check_leaks(Split(["WHY 3?", "which 1?"], [row["Question"] for row in ROWS]), QUESTIONS)
    sides = results([RIGHT] * 8, [2.0] * 8, [0] * 8), results([RIGHT] * 8, [1.0] * 8, [2] * 8)
    comparison = compare(*sides, ROWS, QUESTIONS, leaks)
    assert comparison.measures[0].n == 7
    assert named(comparison, "multiple choice").n == named(comparison, "reference, nats per token").n == 7
    assert comparison.left_out.leaked == 2 and "2 questions stand in the training rows" in str(comparison)


def test_what_leaked_whole_is_refused():
    rows, questions = ROWS[:2], replace(QUESTIONS, rows=QUESTIONS.rows[:2])
    sides = results([RIGHT] * 2, [2.0] * 2, [0] * 2), results([RIGHT] * 2, [1.0] * 2, [2] * 2)
    asked = {"Question": ["Why 0?", "Why 1?"]}
    half = Split(["Why 0?", "Why 1?"], [])
    half.eval = asked
    comparison = compare(*sides, rows, questions, check_leaks(half, questions))
    assert [m.name for m in comparison.measures] == ["multiple choice", "multiple choice, per byte"]
    whole = Split(["Why 0?", "Why 1?", "Which 0?", "Which 1?"], asked["Question"])
    with pytest.raises(MedcotError, match="every evaluation question stands in the training rows"):
        compare(*sides, rows, questions, check_leaks(whole, questions))


def test_families_are_corrected_together_with_the_other_measures():
    rows = [row | {"family": "one" if i < 12 else "two"} for i, row in enumerate(MANY)]
    comparison = compare(answers([WRONG] * 12 + [RIGHT] * 12), answers([RIGHT] * 24), rows)
    alone = paired_proportions("x", [False] * 12, [True] * 12).p_value
    one = named(comparison, "right answer, one")
    together = [m for m in comparison.measures if m.adjusted_p is not None and m.group != PRIMARY]
    smaller = sum(m.p_value < alone for m in together)
    assert one.adjusted_p == pytest.approx((len(together) - smaller) * alone) and one.verdict == "better"
