"""Grading reads what was written: which option is chosen, which are only spoken of, and what is no option at all."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from answer_styles import HELD_OUT, HELD_OUT_NONE, NONE, STYLES, own_questions, written
from blind_styles import BLIND, BLIND_NONE, SECOND_BLIND, SECOND_BLIND_NONE
from hypothesis import given, settings
from hypothesis import strategies as st
from mended_styles import MENDED, MENDED_NONE

from medcot.evaluation.grading import extract_choice, grade
from medcot.prompts import parse_completion
from medcot.settings import HELD_OUT_SEED, MedcotError
from medcot.tiny.cases import held_out_cases

EOS = "<eos>"
ROW = {"Question": "Why?", "Complex_CoT": "one: 1\ntwo: 2", "Response": "This is a score of 2.", "answer": "score of 2",
       "family": "sums"}  # fmt: skip
DRUGS = ["Aspirin", "Ceftriaxone", "Morphine", "Vitamin C"]


def answer(completion):
    return SimpleNamespace(parsed=parse_completion(completion, EOS), new_tokens=5)


# --- the bars ----------------------------------------------------------------------------------------------------------


NAMES = ["development", "held out", "blind", "second blind", "mended by"]
CHOOSING = [STYLES, HELD_OUT, BLIND, {each: each for each in SECOND_BLIND}, {each: each for each in MENDED}]
CHOOSING_NONE = [
    NONE,
    HELD_OUT_NONE,
    BLIND_NONE,
    {each: each for each in SECOND_BLIND_NONE},
    {each: each for each in MENDED_NONE},
]


def embedded():
    return own_questions() + held_out_cases(46, seed=HELD_OUT_SEED)


@pytest.fixture(params=["embedded", "real"])
def questions(request):
    if request.param == "embedded":
        return embedded()
    folder = os.environ.get("MEDCOT_REAL_ROWS")
    if not folder:
        pytest.skip("MEDCOT_REAL_ROWS names no folder with the real rows")
    return [json.loads(line) for line in (Path(folder) / "medqa_first200.jsonl").open()]


@pytest.mark.parametrize("styles", CHOOSING, ids=NAMES)
def test_the_chosen_option_is_found_in_every_style(questions, styles):
    answers = written(styles, questions, per_style=14)
    graded = [(style, extract_choice(text, choices), chosen) for style, text, choices, chosen in answers]
    found = [(style, got, chosen) for style, got, chosen in graded if got is not None]
    right = sum(got == chosen for _, got, chosen in found)
    print(
        f"{len(styles)} styles, {len(graded)} answers: precision {right / len(found):.3f}, recall {right / len(graded):.3f}"
    )
    assert right >= 0.97 * len(found), {style for style, got, chosen in found if got != chosen}
    assert right >= 0.93 * len(graded), {style for style, got, _ in graded if got is None}


@pytest.mark.parametrize("styles", CHOOSING_NONE, ids=NAMES)
def test_none_is_assigned_where_none_was_chosen(questions, styles):
    answers = written(styles, questions, per_style=14)
    assigned = [style for style, text, choices, _ in answers if extract_choice(text, choices) is not None]
    print(f"{len(styles)} styles, {len(answers)} answers without a choice: {len(assigned)} assigned one")
    assert len(assigned) <= 0.01 * len(answers), set(assigned)


def test_there_are_enough_styles():
    assert len(HELD_OUT) + len(STYLES) >= 30 and not HELD_OUT.keys() & STYLES.keys()
    assert len(written(STYLES | HELD_OUT, embedded(), 14)) >= 400


# --- what it used to take for another option, or for one ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The correct answer is **B**. It covers meningococci. Option D is incorrect.", 1),
        ("Ceftriaxone, not aspirin.", 1),
        ("Most likely ceftriaxone. Aspirin is less likely.", 1),
        ("Option A is incorrect.", None),
        ("B is correct.", 1),
        ("I would choose B.", 1),
        ("<answer>B</answer>", 1),
        ("Answer - B", 1),
        ("answer: b", 1),
        (r"\boxed{\textbf{B}}", 1),
        ("Answer: C-reactive protein", None),
        ("Give ceftriaxone now and morphine for the pain.", None),
        ("If he were allergic, the answer would be B. He is not, so it is C.", 2),
        ("A: no\nB: yes\nC: no\nD: no", 1),
        ("All but B are wrong.", 1),
        ("Without a culture I cannot be sure, but my best guess is B.", 1),
        ("B might seem right, yet C is the answer.", 2),
        ("The answer is B. The answer is C.", None),
        ("Answer: B, C", None),
        ("So, which is it: A, B, C or D?", None),
        ("A 45-year-old man. C-section. D-dimer.", None),
        ("The oral temperature was 39 °C, so fluids should be given.", None),
        ('{"explanation": "Option A is wrong", "answer": "b"}', 1),
    ],
)
def test_what_is_said_of_an_option_counts(text, expected):
    assert extract_choice(text, DRUGS) == expected


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
        ("vitamin C is missing", None),  # a bare fact that starts with an option chooses nothing
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
        ("A non-Hodgkin lymphoma.", ["Hodgkin lymphoma", "Sarcoma"], None),
        ("A grade of 21.", ["grade of 2", "grade of 1"], None),
        ("Give 2.5 mg.", ["5 mg", "50 mg"], None),
        ("Give 5 mg/kg.", ["5 mg", "50 mg"], None),
        ("A metastatic ovarian cancer.", ["Ovarian cancer", "Metastatic ovarian cancer"], 1),
        ("The hepatitis B vaccine.", ["Hepatitis B", "Hepatitis B vaccine"], 1),
        ("The long head of the biceps.", ["Long head of biceps", "Teres major"], 0),
        ("It is a picture of B.", ["A", "B"], None),
        ("LDL cholesterol of < 70", ["< 70", "> 70"], 0),
        ("The answer is J.", [f"sign {n}" for n in range(10)], 9),
        ("None of the above.", ["Aspirin", "Morphine", "None of the above"], 2),
    ],
)
def test_one_option_is_not_taken_for_another(text, choices, expected):
    assert extract_choice(text, choices) == expected


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*"ABCDabc .,:;()*\n'\"$\\{}[]<>/-", "answer", " is ", " not ", " but ", *DRUGS]), max_size=40
    )
)
def test_any_text_is_read(pieces):
    text = "".join(pieces)
    chosen = extract_choice(text, DRUGS)
    assert chosen in (None, 0, 1, 2, 3)
    assert chosen is None or "ABCD"[chosen] in text.upper() or DRUGS[chosen] in text


# Sentences written after the extraction and mended by: what they taught is kept.
SPOKEN_OF = (
    "Aspirin does nothing for this infection.",
    "I would steer clear of aspirin.",
    "Aspirin would be a mistake.",
    "There is no evidence for aspirin here.",
    "Aspirin is a poor choice.",
    "Aspirin isn't the answer.",
    "It can't be aspirin.",
    "It is not A.",
    "I'd not go with A.",
    "A seems unlikely.",
    "A is tempting.",
    "A is a common distractor.",
    "A makes no sense.",
    "A can be crossed out.",
    "Cross out A.",
    "Let us set aside A.",
    "We discard option A at once.",
    "A doesn't work.",
    "Aspirin was stopped last week.",
    "The patient is allergic to aspirin.",
    "His mother takes aspirin.",
    "Aspirin is an antiplatelet drug. It inhibits cyclooxygenase.",
    "More tests are needed. Aspirin can wait.",
    "Aspirin may help.",
    "Aspirin could be tried.",
    "Perhaps aspirin.",
    "The choice is between aspirin and morphine.",
    "Aspirin versus morphine: a close call.",
    "Both aspirin and morphine have their place.",
    "Aspirin and morphine are both acceptable.",
    "Start aspirin and ceftriaxone.",
    "It depends on whether aspirin was given.",
    "Consider aspirin; also consider morphine.",
    "Top candidates: A, B.",
    "A (50 %), B (50 %).",
    "A? B? Hard to know.",
    "I'm undecided: A or C.",
    "The correct answer is either A or C.",
    "My answer would be A or maybe C.",
    "The answer may be A.",
    "I can't rule out A.",
    "A cannot be ruled out.",
    "The question is about aspirin.",
    "You asked about aspirin.",
    "Which drug? Aspirin? Morphine?",
    "Read the options again: aspirin, ceftriaxone, morphine, vitamin C.",
    "If the platelet count is normal, aspirin is the answer; otherwise it is morphine.",
    "The answer depends: A if he is young, B if he is old.",
    "I refuse to choose.",
    "The answer is unknown.",
    "The correct option is not given here.",
    "There is no single best answer.",
    "A, B, C and D are all wrong.",
    "Neither A nor B nor C nor D.",
    "All of A, B and C are right.",
    "Everyone picks A, but I do not know why.",
    "Someone who answers A has overlooked the fever.",
    "Answering A would be wrong.",
    "To choose A is to ignore the fever.",
    "Choosing A would ignore the fever.",
    "Option A treats fever. Option B treats the cause. Option C treats pain.",
    "I can't decide between B and C.",
    "Any of these could be right; more data are needed.",
    "It would be unwise to give aspirin to this child.",
    "Avoid aspirin.",
    "Stop aspirin.",
    "Aspirin should be avoided.",
    "Could be aspirin, could be morphine.",
    "The patient has taken aspirin before. Please tell me the results of the lumbar puncture.",
    "Was ceftriaxone given? Does the patient take aspirin?",
    "Thank you for the question. Options include aspirin and ceftriaxone. I am unable to recommend one.",
    "Whether ceftriaxone is right depends on allergies.",
    "I need to know about allergies before recommending ceftriaxone.",
    "Ceftriaxone would be reasonable if bacterial meningitis were confirmed, otherwise morphine for the pain.",
    "Depending on the results, A, B or C.",
    "Not enough information. The answer could be B.",
    "Leaning B but A is equally plausible.",
    "The options: A) Aspirin B) Ceftriaxone C) Morphine D) Vitamin C",
    "Differential: meningitis, encephalitis. Drugs to think of: ceftriaxone, aspirin.",
    "None of these is right.",
    "A and B.",
    "Question: which drug?\nA) Aspirin\nB) Ceftriaxone\nC) Morphine\nD) Vitamin C\nI do not know.",
)
CHOSEN = (
    ("The best choice among these would be to administer ceftriaxone intravenously.", 1),
    (
        "**Answer: (B) Ceftriaxone**\n\n**Explanation**\n\n* **Option A (Aspirin)**: used for fever, not infection.\n* **Option C (Morphine)**: used for pain.\n* **Option D (Vitamin C)**: not indicated.",
        1,
    ),
    (
        "| Option | Comment |\n|---|---|\n| A | antiplatelet |\n| B | covers the pathogen – best |\n| C | opioid |\n| D | vitamin |\n\n**B** is therefore correct.",
        1,
    ),
    (
        "Let me rule out the wrong ones. Aspirin: no antibacterial effect. Morphine: no antibacterial effect. Vitamin C: no effect. So we're left with ceftriaxone.",
        1,
    ),
    ("I'm inclined to say B.", 1),
    ("B, definitely.", 1),
    ("Clearly B.", 1),
    ("That would be B.", 1),
    ("That's B.", 1),
    ("The answer you're looking for is B.", 1),
    ("B) Ceftriaxone is the correct answer. A) Aspirin is an NSAID. C) Morphine is an opioid.", 1),
    (
        "The correct answer is **B: Ceftriaxone**. Options A, C, and D are incorrect because they do not treat the infection.",
        1,
    ),
    (
        "Correct answer is option B. Option A is not correct since it is an NSAID. Option C is not correct since it is an opioid. Option D is not correct.",
        1,
    ),
    ("While A could be considered, B is more appropriate.", 1),
    ("The likeliest choice is ceftriaxone, although morphine cannot be fully excluded.", 1),
    ("Ceftriaxone is most appropriate here, although aspirin may be added later.", 1),
    ("My answer is option B; I considered A and C but rejected both.", 1),
    ("Hmm, A? No wait, B. Yes, B.", 1),
    ("First I thought of aspirin. But the fever and neck stiffness point to meningitis. So ceftriaxone is right.", 1),
    ("Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.", 1),
    ("Therefore, the final answer is (B).", 1),
    ("**Final answer**\n\nB – Ceftriaxone", 1),
    ("final_answer = 'B'", 1),
    ("#### B", 1),
    ("The answer is: \n\n(B) Ceftriaxone.", 1),
    ("Based on this, the patient has A fib. and needs aspirin.", 0),
    ("Options A and D can be eliminated. Between B and C, B is better.", 1),
    ("Only option B treats the cause. A, C and D only treat symptoms.", 1),
)


@pytest.mark.parametrize("text", SPOKEN_OF)
def test_an_option_that_is_only_spoken_of_is_not_chosen(text):
    assert extract_choice(text, DRUGS) is None


@pytest.mark.parametrize(("text", "expected"), CHOSEN)
def test_an_option_that_is_chosen_in_free_words_is_found(text, expected):
    assert extract_choice(text, DRUGS) == expected


# --- outcomes ----------------------------------------------------------------------------------------------------------


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


CROUP = ["Asthma", "Croup"]


@pytest.mark.parametrize(
    "row",
    [
        {"options": CROUP, "answer": "B"},
        {"options": CROUP, "answer_index": 1},
        {"options": CROUP, "answer": 1},
        {"options": dict(zip("AB", CROUP, strict=True)), "answer_idx": "B"},
        {"choices": CROUP, "answer": "Croup"},
    ],
)
def test_rows_with_options_in_any_form_are_graded_by_the_option(row):
    right, wrong = (answer(f"x\n</think>\nThis is a case of {name}.<eos>") for name in ("croup", "asthma"))
    assert [(grade(row, each).correct, grade(row, each).extracted) for each in (right, wrong)] == [
        (True, True),
        (False, True),
    ]
    abstained = grade(row, answer("x\n</think>\nA case for a specialist.<eos>"))
    assert (abstained.correct, abstained.extracted) == (False, False)


def test_a_number_or_a_list_as_the_answer_is_graded():
    graded = [grade(ROW | {"answer": value}, answer("x\n</think>\nThis is a score of 2.<eos>")).correct
              for value in (2, 3, ["score of 3", "score of 2"], ["three"])]  # fmt: skip
    assert graded == [True, False, True, False]


def test_a_row_that_cannot_be_graded_is_named():
    with pytest.raises(MedcotError, match="answer 'C' is out of range for its 2 choices"):
        grade({"options": CROUP, "answer": "C"}, answer("x\n</think>\nCroup.<eos>"))


def test_rows_without_an_answer_are_graded_for_form_only():
    outcome = grade({**ROW, "answer": None}, answer("a\n</think>\nb<eos>"))
    assert (outcome.well_formed, outcome.correct, outcome.steps_correct) == (True, None, None)


def test_health_names_what_is_missing():
    outcome = grade(ROW, answer("a b c d a b c d"))
    assert (outcome.closed, outcome.stopped, outcome.answered, outcome.length) == (False, False, False, 5)
    assert outcome.repetition == pytest.approx(1 / 5)  # "a b c d" stands twice among five sequences of four words


def test_only_what_follows_the_last_think_is_read():
    row = ROW | {"choices": ["score of 1", "score of 2"], "answer_index": 1}
    assert grade(row, answer("score of 1\n</think>\nscore of 1\n</think>\nscore of 2<eos>")).correct
    assert not grade(row, answer("The answer is B, score of 2.<eos>")).correct
