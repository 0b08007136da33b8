"""Grading and paired statistics: right is right, swapping flips every sign, and itself is no different."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from hub_server import COMMIT, Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from medcot import evaluation as room
from medcot.evaluation import (
    UNCHANGED,
    Questions,
    check_leaks,
    compare,
    extract_choice,
    grade,
    load_choices,
    mcnemar_power,
    paired_means,
    paired_proportions,
    smallest_difference,
)
from medcot.inference import Answer, Answers, Results, Scores
from medcot.settings import PROFILES, MedcotError, load_settings

EOS = "<eos>"
ROW = {"Question": "Why?", "Complex_CoT": "one: 1\ntwo: 2", "Response": "This is a score of 2.", "answer": "score of 2",
       "family": "sums"}  # fmt: skip
FLIPPED = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher", UNCHANGED: UNCHANGED}


def answer(completion, question="Why?"):
    return Answer(question, ROW["Response"], completion, 5, EOS)


# --- grading -----------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("choices", [None, ["score of 1", "score of 3", "score of 2", "score of 4"]])
def test_grading(completion, expected, choices):
    row = ROW | ({"choices": choices, "answer_index": 2} if choices else {})
    outcome = grade(row, answer(completion))
    assert (outcome.well_formed, outcome.correct, outcome.steps_correct) == expected


def test_rows_without_an_answer_are_graded_for_form_only():
    outcome = grade({**ROW, "answer": None}, answer("a\n</think>\nb<eos>"))
    assert (outcome.well_formed, outcome.correct, outcome.steps_correct) == (True, None, None)


def test_health_names_what_is_missing():
    outcome = grade(ROW, answer("a b c d a b c d"))
    assert (outcome.closed, outcome.stopped, outcome.answered, outcome.length) == (False, False, False, 5)
    assert outcome.repetition == pytest.approx(1 / 5)  # "a b c d" stands twice among five sequences of four words


def test_abstention_is_wrong_and_not_missing():
    outcome = grade(
        ROW | {"choices": ["score of 1", "score of 2"], "answer_index": 1}, answer("x\n</think>\nNo idea.<eos>")
    )
    assert (outcome.correct, outcome.extracted) == (False, False)


def test_only_what_follows_the_last_think_is_read():
    row = ROW | {"choices": ["score of 1", "score of 2"], "answer_index": 1}
    assert grade(row, answer("score of 1\n</think>\nscore of 1\n</think>\nscore of 2<eos>")).correct
    assert not grade(row, answer("The answer is B, score of 2.<eos>")).correct


DRUGS = ["Aspirin", "Ceftriaxone", "Morphine", "Vitamin C"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is (B).", 1),
        ("The correct answer is C because of the pain.", 2),
        ("**Answer:** D. Vitamin C", 3),
        (r"Therefore \boxed{A}", 0),
        ("**The correct answer is:**\n\n**B. Ceftriaxone**", 1),
        ("Option B would harm. Option C is right.", 2),
        ("Answer: B\n\nThe patient has meningitis; aspirin would not help.", 1),
        ("THE CORRECT ANSWER IS D", 3),
        ("**Final Answer:** $\\boxed{\\text{C}}$", 2),
        ("The most appropriate choice is therefore **B**.", 1),
        ("B", 1),
        ("**C.** Morphine", 2),
        ("Use ceftriaxone rather than aspirin, so ceftriaxone.", 1),
        ("Not aspirin. MORPHINE!", 2),
        ("vitamin C is missing", 3),
        ("I would give Ceftriaxon.", 1),
        ("The answer is a fracture.", None),
        ("The answer is C. difficile.", None),
        ("C. difficile\nis the cause", None),
        ("Answer: A 45-year-old man needs ceftriaxone.", 1),
        ("D. Vitamin C", 3),
        ("The answer is A patient with pain.", None),
        ("The answer is E.", None),
        ("A. wrong\nB. wrong\nC. wrong", None),
        ("Ibuprofen.", None),
        ("", None),
    ],
)
def test_extraction(text, expected):
    assert extract_choice(text, DRUGS) == expected


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("This is hyperkalemia.", ["Hypokalemia", "Sepsis"], None),
        ("An irreversible pulpitis.", ["Reversible pulpitis", "Fracture"], None),
        ("A grade of 21.", ["grade of 2", "grade of 1"], None),
        ("A metastatic ovarian cancer.", ["Ovarian cancer", "Metastatic ovarian cancer"], 1),
        ("It is a picture of B.", ["A", "B"], None),
        ("LDL cholesterol of < 70", ["< 70", "> 70"], 0),
    ],
)
def test_extraction_does_not_take_one_option_for_another(text, choices, expected):
    assert extract_choice(text, choices) == expected


def real_rows(name):
    folder = os.environ.get("MEDCOT_REAL_ROWS")
    if not folder:
        pytest.skip("MEDCOT_REAL_ROWS names no folder of real rows")
    return Path(folder) / name


def test_extraction_on_reference_responses_of_real_rows():
    # Written by another model, without the options in sight: harder than the answers graded here, which saw them.
    right = wrong = 0
    rows = [json.loads(line) for line in real_rows("medical_o1_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        letters = sorted(row["options"])
        chosen = extract_choice(row["Response"], [row["options"][letter] for letter in letters])
        right += chosen == letters.index(row["answer_idx"])
        wrong += chosen is not None and chosen != letters.index(row["answer_idx"])
    print(f"{len(rows)} Responses: {right} right, {wrong} other than gold, {len(rows) - right - wrong} abstained")
    assert right > 2 * wrong and wrong / len(rows) < 0.15


def test_real_multiple_choice_questions_load():
    path = str(real_rows("medqa_first200.jsonl"))
    questions = load_choices(replace(PROFILES["smoke"], choice_dataset=path, choice_rows=1273))
    assert len(questions) == 200 and {len(row["choices"]) for row in questions.rows} == {4}


# --- statistics --------------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(PAIRS)
@settings(deadline=None)
def test_swapping_before_and_after_flips_every_sign(pairs):
    before, after = zip(*pairs, strict=True)
    there, back = paired_proportions("x", before, after), paired_proportions("x", after, before)
    assert back.difference == pytest.approx(-there.difference)
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))
    assert back.p_value == pytest.approx(there.p_value) and back.detectable == there.detectable
    assert (back.fixed, back.broken) == (there.broken, there.fixed)
    assert back.verdict == FLIPPED[there.verdict]


@given(st.lists(st.booleans(), min_size=2, max_size=60))
@settings(deadline=None)
def test_a_model_compared_with_itself_is_no_different(outcomes):
    measure = paired_proportions("x", outcomes, outcomes)
    assert measure.verdict == UNCHANGED and measure.difference == 0
    assert measure.low < 0 < measure.high  # no change seen is not certainty that there is none


NUMBERS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=2, max_size=25)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(room, "RESAMPLES", 199)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.filterwarnings("ignore")
def test_swapping_flips_every_sign_of_means_too():
    @given(NUMBERS)
    @settings(deadline=None, max_examples=40)
    def flips(pairs):
        before, after = zip(*pairs, strict=True)
        weights = [1 + i % 5 for i in range(len(pairs))]
        there, back = paired_means("x", before, after, weights), paired_means("x", after, before, weights)
        assert back.difference == pytest.approx(-there.difference)
        # The percentiles of 199 resamples are steps: mirrored up to one of them.
        step = 0.1 * (there.high - there.low) + 1e-9
        assert (back.low, back.high) == (pytest.approx(-there.high, abs=step), pytest.approx(-there.low, abs=step))
        assert back.p_value == pytest.approx(there.p_value) and back.verdict == FLIPPED[there.verdict]
        same = paired_means("x", before, before, weights)
        assert (same.verdict, same.difference, same.p_value) == (UNCHANGED, 0, 1.0)

    flips()


def test_exact_mcnemar_against_a_textbook_sum():
    # 9 fixed, 1 broken: two-sided binomial, 2 * (C(10,0) + C(10,1)) / 2^10
    before = [False] * 9 + [True] + [True] * 10
    after = [True] * 9 + [False] + [True] * 10
    measure = paired_proportions("x", before, after)
    assert measure.p_value == pytest.approx(2 * (1 + 10) / 2**10) and measure.verdict == "better"
    assert (measure.fixed, measure.broken, measure.test) == (9, 1, "exact McNemar")


def test_the_interval_is_bonett_and_price_s():
    # Their formula, with 9 and 1 of 20 pairs discordant; the library's variance divides by n + 1 instead of n + 2.
    measure = paired_proportions("x", [0] * 9 + [1] * 11, [1] * 9 + [0] + [1] * 10)
    fixed, broken = 10 / 22, 2 / 22
    half = 1.959964 * ((fixed + broken - (fixed - broken) ** 2) / 22) ** 0.5 * (22 / 21) ** 0.5
    assert measure.low == pytest.approx(fixed - broken - half) and measure.high == pytest.approx(fixed - broken + half)


def test_wilson_intervals_stand_beside_the_shares():
    measure = paired_proportions("x", [True] * 8 + [False] * 2, [True] * 10)
    assert measure.before_interval == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert measure.after_interval[1] == pytest.approx(1.0)


def outcomes(rng, n, fixed, broken):
    """n pairs of which each is fixed or broken with the given chances."""
    kind = rng.choice(4, n, p=[fixed, broken, (1 - fixed - broken) / 2, (1 - fixed - broken) / 2])
    return numpy.isin(kind, (1, 2)), numpy.isin(kind, (0, 2))


@pytest.mark.parametrize(("n", "fixed", "broken"), [(50, 0.1, 0.1), (50, 0.3, 0.1), (200, 0.05, 0.15)])
def test_simulated_shares_are_covered_and_false_alarms_are_rare(n, fixed, broken):
    rng = numpy.random.default_rng(5)
    found = [paired_proportions("x", *outcomes(rng, n, fixed, broken)) for _ in range(400)]
    covered = numpy.mean([m.low <= fixed - broken <= m.high for m in found])
    assert covered >= 0.93  # 0.95 less two standard errors of 400 runs
    seen = numpy.mean([m.verdict != UNCHANGED for m in found])
    if fixed == broken:
        assert seen < 0.05
    else:
        assert seen == pytest.approx(mcnemar_power(n, fixed + broken, fixed - broken), abs=0.07)
        assert not any(m.verdict == ("worse" if fixed > broken else "better") for m in found)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("effect", [0.0, -0.05])
def test_simulated_likelihoods_are_covered_and_false_alarms_are_rare(effect):
    rng, found = numpy.random.default_rng(6), []
    for _ in range(250):
        tokens, before = rng.integers(300, 1100, 100), rng.gamma(20, 0.08, 100)
        after = before + effect + rng.normal(0, 0.1, 100)
        found.append(paired_means("x", before, after, tokens, better="lower"))
    assert numpy.mean([m.low <= effect <= m.high for m in found]) >= 0.91  # 0.95 less three standard errors
    seen = numpy.mean([m.verdict != UNCHANGED for m in found])
    assert seen <= 0.08 if not effect else seen > 0.98  # 0.05 plus two standard errors
    assert not any(m.verdict == "worse" for m in found) or not effect


def test_the_smallest_difference_is_seen_in_four_of_five_runs():
    rng, n, discordant = numpy.random.default_rng(7), 100, 0.2
    least = smallest_difference(n, discordant)
    assert 0.12 < least < 0.14
    fixed = (discordant + least) / 2
    seen = [paired_proportions("x", *outcomes(rng, n, fixed, discordant - fixed)).verdict for _ in range(400)]
    assert seen.count("better") / 400 == pytest.approx(0.8, abs=0.06)


def test_five_questions_cannot_show_anything():
    assert smallest_difference(5, 0.2) is None
    measure = paired_proportions("x", [False] * 5, [True] * 5)
    assert measure.verdict == UNCHANGED and "n = 5 could not have shown any difference" in measure.sentence


def test_what_could_have_been_seen_is_said_of_means_too():
    rng = numpy.random.default_rng(8)
    before = rng.normal(0, 1, 100)
    measure = paired_means("x", before, before + rng.normal(0, 0.1, 100), unit="nats", better="lower")
    assert measure.detectable == pytest.approx(2.83 * 0.1 / 10, rel=0.2)  # (1.96 + 0.84) standard errors, t for normal
    assert f"n = 100 would have shown {measure.detectable:.3f} nats or more in 4 of 5 runs" in measure.sentence
    assert "no row differs" in paired_means("x", before, before).sentence
    assert "n = 4 could not have shown any difference" in paired_means("x", [1, 2, 3, 4], [2, 3, 5, 6]).sentence


def test_verdicts_are_plain_sentences():
    better = paired_proportions("right answer", [0] * 9 + [1] * 11, [1] * 9 + [0] + [1] * 10)
    assert better.sentence.startswith(
        "right answer: better, 55.0 % (34.2 to 74.2) before, 95.0 % (76.4 to 99.1) after, +40.0 points"
    )
    assert better.sentence.endswith("exact McNemar p = 0.021, 9 fixed, 1 broken.")
    none = paired_proportions("right answer", [0, 1] * 10, [1, 1] + [0, 1] * 9)
    assert f"right answer: {UNCHANGED}" in none.sentence and "or more in 4 of 5 runs." in none.sentence
    longer = paired_means(
        "length", [10, 11, 12, 13, 9, 10, 12, 11], [20, 22, 25, 23, 19, 21, 22, 20], unit="tokens", better="neither"
    )
    assert longer.sentence.startswith("length: more tokens, 11.0 before, 21.5 after, +10.5 tokens (")


def test_measures_are_frozen_values():
    measure = paired_proportions("x", [True, False], [True, True])
    assert replace(measure, after=measure.before).difference == 0


# --- the comparison ----------------------------------------------------------------------------------------------------


def answers(completions, questions=None):
    questions = questions or [f"Why {i}?" for i in range(len(completions))]
    return Answers("x", Path("x.jsonl"), tuple(map(answer, completions, questions)))


ROWS = [ROW | {"Question": f"Why {i}?"} for i in range(8)]
RIGHT, WRONG = "one: 1\ntwo: 2\n</think>\nThis is a score of 2.<eos>", "one: 1\n</think>\nThis is a score of 1.<eos>"
QUESTIONS = Questions(
    tuple({"question": f"Which {i}?", "choices": ["no", "perhaps", "yes"], "answer_index": 2} for i in range(8)), "q", None, "ab"
)  # fmt: skip


def scores(best, name="x"):
    """Scores of three options a question: the `best` one of each is the likeliest."""
    rows = {i: (tuple(-1.0 if k == b else -5.0 for k in range(3)), (1, 2, 1)) for i, b in enumerate(best)}
    return Scores(name, Path(f"{name}.jsonl"), rows)


def references(per_token):
    return Scores("x", Path("r.jsonl"), {i: ((-10.0 * nats,), (10,)) for i, nats in enumerate(per_token)})


def results(completions, per_token, best, **parts):
    return Results(answers(completions), references=references(per_token), choices=scores(best), **parts)


def named(comparison, name):
    return next(measure for measure in comparison.measures if measure.name == name)


def test_a_comparison_counts_and_speaks():
    comparison = compare(answers([WRONG] * 7 + [RIGHT]), answers([RIGHT] * 8), ROWS)
    right = named(comparison, "right answer")
    assert (right.n, right.before, right.after, right.verdict) == (8, 1 / 8, 1.0, "better")
    assert "right answer, sums" in str(comparison) and "exact McNemar" in str(comparison)
    assert max(map(len, str(comparison).splitlines())) <= 100
    worse = compare(answers([RIGHT] * 8), answers([WRONG] * 7 + [RIGHT]), ROWS)
    assert named(worse, "right answer").verdict == "worse"


def test_likelihoods_are_compared_and_what_was_forgotten_is_listed():
    before = results([RIGHT] * 7 + [WRONG], [2.0 + 0.1 * i for i in range(8)], [2] * 7 + [0])
    after = results([WRONG] + [RIGHT] * 7, [1.0 + 0.12 * i for i in range(8)], [2] * 4 + [1] * 3 + [2])
    comparison = compare(before, after, ROWS, QUESTIONS)
    nats, choice = named(comparison, "reference, nats per token"), named(comparison, "multiple choice")
    assert (nats.n, nats.verdict) == (8, "better") and nats.before == pytest.approx(2.35)
    assert (choice.fixed, choice.broken, choice.before, choice.after) == (1, 3, 7 / 8, 5 / 8)
    assert [(item["asked"], item["question"]) for item in comparison.forgotten] == [
        ("generated", "Why 0?"), ("likelihood", "Which 4?"), ("likelihood", "Which 5?"), ("likelihood", "Which 6?"),
    ]  # fmt: skip
    assert comparison.forgotten[1] == {
        "asked": "likelihood", "question": "Which 4?", "expected": "yes", "before": "yes", "after": "perhaps",
    }  # fmt: skip
    assert [row["change"] for row in comparison.examples] == ["fixed", "broken", "unchanged"]
    assert [row["question"] for row in comparison.examples] == ["Why 7?", "Why 0?", "Why 1?"]


def test_swapping_the_sides_of_a_comparison_flips_every_measure():
    before = results([RIGHT] * 2 + [WRONG] * 6, [2.0 + 0.1 * i for i in range(8)], [2] * 3 + [0] * 5)
    after = results([WRONG] + [RIGHT] * 7, [1.0 + 0.12 * i for i in range(8)], [2] * 8)
    there, back = compare(before, after, ROWS, QUESTIONS), compare(after, before, ROWS, QUESTIONS)
    for one, other in zip(there.measures, back.measures, strict=True):
        assert one.name == other.name and other.difference == pytest.approx(-one.difference)
        assert other.verdict == FLIPPED[one.verdict]
    same = compare(before, before, ROWS, QUESTIONS)
    assert {measure.verdict for measure in same.measures} == {UNCHANGED} and not same.forgotten


def test_the_chat_template_stands_beside_the_prompt():
    chat = {"chat_references": references([1.5] * 4 + [1.6] * 4), "chat_choices": scores([2] * 4)}
    before = results([RIGHT] * 8, [2.0] * 8, [0] * 8, chat_answers=answers([RIGHT] * 7 + [WRONG]), **chat)
    comparison = compare(before, results([RIGHT] * 8, [1.0] * 8, [2] * 8), ROWS, QUESTIONS)
    own = named(comparison, "multiple choice, own template")
    assert (own.n, own.before, own.after, own.group) == (4, 1.0, 1.0, "chat")
    assert named(comparison, "reference, own template").before == pytest.approx(1.55)
    answered = named(comparison, "right answer, own template")
    assert (answered.n, answered.before, answered.after) == (8, 7 / 8, 1.0)
    assert [m.name for m in comparison.measures if m.group == "chat"][-1] == "length, own template"


def test_generated_multiple_choice_answers_are_graded_by_the_chosen_option():
    asked = [f"Which {i}?\nA. no\nB. perhaps\nC. yes" for i in range(2)]
    sides = [
        Results(answers([WRONG] * 8), choice_answers=answers([f"x\n</think>\nThe answer is {letter}.<eos>"] * 2, asked))
        for letter in "AC"
    ]
    comparison = compare(*sides, [row | {"answer": None, "family": None} for row in ROWS], QUESTIONS)
    right = named(comparison, "right answer")
    assert (right.n, right.before, right.after) == (2, 0.0, 1.0) and named(comparison, "option extracted").after == 1
    assert named(comparison, "well formed").n == 10


def test_families_are_held_to_five_per_cent_together():
    rows = [ROW | {"Question": f"Why {i}?", "family": "one" if i < 7 else "two"} for i in range(14)]
    comparison = compare(answers([WRONG] * 7 + [RIGHT] * 7), answers([RIGHT] * 14), rows)
    alone = paired_proportions("x", [False] * 7, [True] * 7).p_value
    one = named(comparison, "right answer, one")
    assert one.p_value == pytest.approx(2 * alone) and one.test == "exact McNemar, Holm over 2,"


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_answers_to_other_questions_are_refused():
    with pytest.raises(MedcotError, match=r"answer 1 in x.jsonl is to another question than row 1"):
        compare(answers([RIGHT] * 2, ["Why 0?", "Who?"]), answers([RIGHT] * 2), ROWS)
    with pytest.raises(MedcotError, match=r"has 2 answers and .* 3"):
        compare(answers([RIGHT] * 2), answers([RIGHT] * 3), ROWS)


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
    assert comparison.rows[0]["expected"] == "score of 2"
    assert "every step right" not in [m.name for m in comparison.measures]


def test_scores_of_other_rows_are_refused():
    before, after = results([RIGHT], [1.0], [2]), results([RIGHT], [1.0], [2])
    with pytest.raises(MedcotError, match="row 1 was scored in only one of"):
        compare(before, replace(after, references=references([1.0, 1.0])), ROWS, QUESTIONS)
    with pytest.raises(MedcotError, match="measured on one side only"):
        compare(before, replace(after, choices=None), ROWS, QUESTIONS)
    with pytest.raises(MedcotError, match="do not hold the options of question 1"):
        compare(before, after, ROWS, QUESTIONS)


@pytest.fixture
def choices_file(tmp_path):
    def write(*rows):
        path = tmp_path / "choices.jsonl"
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
        )
        return replace(PROFILES["smoke"], choice_dataset=str(path))

    return write


GOOD = {"question": "Which?", "choices": ["no", "yes"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"question": "Which?", "choices": ["no", "yes"], "answer_index": 1},
        {
            "question": "Which?",
            "options": {"A": "no", "B": "yes"},
            "answer_idx": "B",
            "answer": "yes",
            "meta_info": "step1",
        },
        {"question": "Which?", "options": ["no", "yes"], "answer": "yes"},
    ],
)
def test_multiple_choice_questions_of_every_known_form_load(choices_file, row):
    questions = load_choices(choices_file(row))
    assert questions.rows == ({"question": "Which?", "choices": ["no", "yes"], "answer_index": 1},)
    assert len(questions.fingerprint) == 64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"answer": 2}, r"choices.jsonl, line 2: answer 2 is out of range for its 2 choices"),
        (GOOD | {"answer": -1}, r"line 2: answer -1 is out of range"),
        (GOOD | {"answer": "C"}, r"line 2: answer 'C' is out of range"),
        (GOOD | {"answer": True}, r"line 2: answer True is out of range"),
        ({"question": "Which?", "choices": ["no", "yes"]}, r"line 2: has no answer; it has question, choices"),
        (GOOD | {"choices": ["no", ""]}, r"line 2: choices \['no', ''\]: at least two texts"),
        (GOOD | {"choices": ["no"]}, r"line 2: choices \['no'\]"),
        ('{"question": "Whi', r"line 2: not a JSON object"),
        ("[1]", r"line 2: holds list"),
    ],
)
def test_a_bad_multiple_choice_row_is_named_by_file_and_line(choices_file, row, message):
    with pytest.raises(MedcotError, match=message):
        load_choices(choices_file(GOOD, row))


def test_a_missing_multiple_choice_file_is_named(tmp_path):
    with pytest.raises(MedcotError, match=r"none.jsonl not found"):
        load_choices(replace(PROFILES["smoke"], choice_dataset=str(tmp_path / "none.jsonl")))


HUB_CODE = """
from dataclasses import replace
from medcot import PROFILES, load_choices
questions = load_choices(replace(PROFILES["kaggle-t4"], choice_rows=2, device="cpu"))
print("LOADED", questions.revision, questions.rows)
"""


def test_the_default_questions_come_from_the_test_split_of_the_hub(tmp_path):
    # Files, columns and row form of the MedQA copy that Settings names, with invented questions.
    form = {
        "answer": "yes",
        "options": {"A": "no", "B": "yes"},
        "meta_info": "step1",
        "answer_idx": "B",
        "metamap_phrases": [],
    }
    served = tmp_path / "served"
    served.mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"Which {split} {i}?"} | form for i in range(3)]
        (served / f"phrases_no_exclude_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = Hub({("dataset", PROFILES["kaggle-t4"].choice_dataset, COMMIT): served})
    online = dict.fromkeys(
        ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0"
    )  # libraries set one another's
    environment = os.environ | online | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", HUB_CODE], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    hub.close()
    loaded = [{"question": f"Which test {i}?", "choices": ["no", "yes"], "answer_index": 1} for i in range(2)]
    assert f"LOADED {COMMIT} {tuple(loaded)}" in run.stdout, run.stderr[-2000:]


def test_the_environment_names_other_questions(choices_file, monkeypatch):
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("MEDCOT_CHOICES", choices_file(GOOD).choice_dataset)
    assert len(load_choices(load_settings())) == 1


def test_the_embedded_questions_are_held_out_cases():
    questions = load_choices(PROFILES["smoke"])
    assert len(questions) == 12 and all(len(set(row["choices"])) == 4 for row in questions.rows)


# --- leaks -------------------------------------------------------------------------------------------------------------


class Split:
    source = "x"

    def __init__(self, train, evaluation):
        self.train, self.eval = {"Question": train}, {"Question": evaluation}


LONG = (
    "A 61-year-old woman with involuntary urine loss on coughing, and no leakage at night, has a Q-tip test. What next?"
)


def test_leaks_are_found_exactly_and_nearly():
    splits = Split([LONG, "Why 0?"], ["why  0?", "Something else"])
    near = QUESTIONS.rows[0] | {"question": LONG.replace("coughing", "a cough")}
    leaks = check_leaks(splits, replace(QUESTIONS, rows=(near,)))
    assert (leaks.checked, leaks.exact, len(leaks.near)) == (3, ("why  0?",), 1) and leaks.near[0][2] >= 95
    assert "1 stand there exactly and 1 nearly" in str(leaks) and LONG[:60] in str(leaks)


def test_what_leaked_is_left_out_and_said(capsys):
    leaks = check_leaks(Split(["WHY 3?", "which 1?"], [row["Question"] for row in ROWS]), QUESTIONS)
    sides = results([RIGHT] * 8, [2.0] * 8, [0] * 8), results([RIGHT] * 8, [1.0] * 8, [2] * 8)
    comparison = compare(*sides, ROWS, QUESTIONS, leaks)
    assert {m.name: m.n for m in comparison.measures if m.group == "all"}["right answer"] == 7
    assert named(comparison, "multiple choice").n == named(comparison, "reference, nats per token").n == 7
    assert comparison.left_out == 2 and "2 questions are left out" in str(comparison)


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
