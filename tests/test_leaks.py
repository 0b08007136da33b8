"""Leaks: a question that stands in training is found changed, listed or rewritten, and a look-alike is not one."""

import json
import os
import random
from pathlib import Path

import pytest
from answer_styles import own_questions

from medcot.evaluation.leaks import check_leaks
from medcot.evaluation.questions import Questions
from medcot.settings import HELD_OUT_SEED
from medcot.tiny.cases import held_out_cases, training_cases

# Invented; each with how a writer who saw it might ask for the same thing without its options.
CASES = (
    ("A 34-year-old man comes to the clinic with a 3-week history of a dry cough and night sweats after a stay in a mountain "
     "cabin. His temperature is 38.4 C, pulse 96/min. A chest film shows hilar nodes on both sides and a skin test is "
     "negative. Biopsy of a node shows granulomas without necrosis. Which of the following is the most likely diagnosis?",
     ("Sarcoidosis", "Tuberculosis", "Histoplasmosis", "Hodgkin lymphoma"),
     "A man aged 34 has had a dry cough and night sweats for 3 weeks. With hilar nodes on both sides, a negative skin test and "
     "granulomas without necrosis on biopsy, what diagnosis explains his illness?"),
    ("A 61-year-old farmer has had trouble swallowing solid food for 5 months and has lost 9 kg. He smokes two packs a day. "
     "Endoscopy shows an ulcerated mass 27 cm from the incisors. Which type of tumour is most likely?",
     ("Squamous cell carcinoma", "Adenocarcinoma", "Leiomyoma", "Lymphoma"),
     "What tumour would you expect in a heavy smoker, a farmer of 61, who lost 9 kg over 5 months of trouble swallowing solid "
     "food and whose endoscopy shows an ulcerated mass at 27 cm?"),
    ("A newborn girl of 2 days has bilious vomiting and has passed no meconium. The abdomen is distended. A rectal suction "
     "biopsy shows no ganglion cells. Which segment of the bowel is always involved?",
     ("Rectum", "Sigmoid colon", "Caecum", "Ileum"),
     "Bilious vomiting, a distended abdomen and no meconium in a newborn girl lead to a rectal suction biopsy without ganglion "
     "cells. Which segment of bowel is involved in every such child?"),
    ("An 8-year-old boy wakes at night with pain in the left shin that aspirin relieves within 20 minutes. An X-ray shows a "
     "lucent nidus of 8 mm with a sclerotic rim in the tibial cortex. What is this lesion?",
     ("Osteoid osteoma", "Osteosarcoma", "Ewing sarcoma", "Brodie abscess"),
     "Name the lesion: a lucent nidus of 8 mm with a sclerotic rim in the tibial cortex of a boy of 8, whose night pain in the "
     "shin goes away with aspirin within 20 minutes."),
)  # fmt: skip


class Splits:
    def __init__(self, train, evaluation=()):
        self.train, self.eval = list(train), list(evaluation)


def asked(rows) -> Questions:
    rows = tuple({"question": q, "choices": list(choices), "answer_index": 0} for q, choices in rows)
    return Questions(rows, "x", None, "ab")


def training(questions):
    return [{"Question": q, "Complex_CoT": "Let me think.", "Response": "It is clear."} for q in questions]


def listed(question, choices):
    return "\n".join([question, *(f"{'ABCD'[i]}. {choice}" for i, choice in enumerate(choices))])


def changed(kind, question, choices):
    """(question, choices) changed as `kind` says."""
    rng, words = random.Random(question), question.split()
    words[rng.randrange(len(words))] = "another"
    return {
        "same": (question, choices),
        "upper case": (question.upper(), choices),
        "word": (" ".join(words), choices),
        "prefix": (f"Please read this case with care and answer. {question}", choices),
        "suffix": (f"{question} Choose one and say why.", choices),
        "listed": (listed(question, choices), choices),
        "reordered": (question, choices[::-1]),
    }[kind]


KINDS = ("same", "upper case", "word", "prefix", "suffix", "listed", "reordered")


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_question_is_found(kind):
    ours = [(question, choices) for question, choices, _ in CASES]
    for known in ([q for q, _ in ours], [listed(*each) for each in ours]):
        leaks = check_leaks(Splits(training(known)), asked(changed(kind, *each) for each in ours))
        assert (leaks.checked, len(leaks.found)) == (4, 4)
        rows = [{"Question": changed(kind, *each)[0]} for each in ours]
        assert len(check_leaks(Splits(training(known), rows)).found) == 4


def test_a_rewritten_question_is_found():
    rewritten = training(each for *_, each in CASES)
    leaks = check_leaks(Splits(rewritten), asked((question, choices) for question, choices, _ in CASES))
    assert [leak.training for leak in leaks.near] == [each for *_, each in CASES] and not leaks.exact
    assert all(0.35 <= leak.similarity < 1 for leak in leaks.near)
    assert "0 stand there exactly and 4 changed or rewritten" in str(leaks)
    rows = [{"Question": question} for question, *_ in CASES]
    assert len(check_leaks(Splits(rewritten, rows)).found) == 4


def test_other_questions_are_no_leaks():
    rewritten = training(each for *_, each in CASES)
    for i, (question, choices, _) in enumerate(CASES):
        assert not check_leaks(Splits(rewritten[:i] + rewritten[i + 1 :]), asked([(question, choices)])).found


GENERIC = (
    "Which of the following is true?", "Which of the following is the most likely diagnosis?", "All are true except:",
    "What is the best next step in management?", "Which of the following statements about this patient is correct?",
)  # fmt: skip


def test_a_generic_stem_is_no_leak_unless_its_options_are_the_same():
    options = [tuple(row["choices"]) for row in own_questions()[:10]]
    known = [
        {"Question": stem, "Complex_CoT": "", "Response": f"Of these, {choices[0]} and {choices[1]} come close."}
        for stem, choices in zip(GENERIC, options[:5], strict=True)
    ]
    other = asked(zip(GENERIC, options[5:], strict=True))
    assert not check_leaks(Splits(known), other).found
    assert len(check_leaks(Splits(known), asked(zip(GENERIC, options[:5], strict=True))).exact) == 5
    with_options = [
        {"Question": stem, "options": list(choices)} for stem, choices in zip(GENERIC, options[:5], strict=True)
    ]
    assert not check_leaks(Splits(with_options), other).found


def test_the_same_stem_with_other_options_is_another_question():
    stem, *options = GENERIC[0], ("Sarcoidosis", "Tuberculosis"), ("Gout", "Pseudogout")
    known = [{"Question": stem, "Response": "Sarcoidosis, not tuberculosis."}]
    leaks = check_leaks(Splits(known), asked((stem, choices) for choices in options))
    assert leaks.checked == 2 and [leak.choices for leak in leaks.found] == [options[0]]
    assert (
        leaks.holds(stem, options[0])
        and leaks.holds(stem.upper(), options[0][::-1])
        and not leaks.holds(stem, options[1])
    )


def test_short_questions_are_found_with_their_options_listed_and_not_taken_for_each_other():
    stem, choices = "Drug of choice in absence seizures?", ("Ethosuximide", "Phenytoin", "Carbamazepine", "Diazepam")
    known = [
        {"Question": stem, "Response": "Ethosuximide is preferred."},
        {"Question": "Why 1?", "Response": "Because."},
    ]
    assert len(check_leaks(Splits(known, [{"Question": listed(stem, choices)}])).found) == 1
    assert len(check_leaks(Splits([{"Question": listed(stem, choices)}]), asked([(stem, choices)])).found) == 1
    others = [
        {"Question": question} for question in ("Why 2?", "Which 1?", "Drug of choice in focal seizures?", "Is it 1?")
    ]
    assert not check_leaks(Splits(known, others)).found


def test_a_question_among_copies_of_itself_is_found():
    copies = training(f"{each} (copy {chr(97 + i)})" for *_, each in CASES for i in range(26))
    assert len(check_leaks(Splits(copies), asked((question, choices) for question, choices, _ in CASES)).found) == 4


@pytest.mark.parametrize(("learnt", "measured"), [(64, 12), (4000, 240)])
def test_the_embedded_cases_look_alike_and_are_no_leaks(learnt, measured):
    rows = held_out_cases(measured, seed=HELD_OUT_SEED)
    questions = Questions(tuple({"question": r["Question"], **r} for r in rows), "x", None, "ab")
    leaks = check_leaks(Splits(training_cases(learnt, seed=3407), rows), questions)
    assert leaks.checked == measured and not leaks.found
    trained = training_cases(learnt, seed=3407)
    assert len(check_leaks(Splits(trained, trained[:5])).exact) == 5


def test_nothing_to_compare_is_no_error():
    assert check_leaks(Splits([], [{"Question": "Why?"}])).checked == 1
    assert check_leaks(Splits(training(["What is it?"]), [{"Question": "Is it?"}])).found == ()


@pytest.mark.skipif(
    not os.environ.get("MEDCOT_REAL_ROWS"), reason="MEDCOT_REAL_ROWS names no folder with the real rows"
)
def test_of_the_real_rewritten_questions_most_are_found():
    folder = Path(os.environ["MEDCOT_REAL_ROWS"])
    read = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        for name in ("medical_o1_rows", "medqa_first200")
    }
    other = [(row["question"], row["choices"]) for row in read["medqa_first200"]]
    sources = [(row["question"], list(row["options"].values())) for row in read["medical_o1_rows"]]
    rewritten = [
        {name: row[name] for name in ("Question", "Complex_CoT", "Response")} for row in read["medical_o1_rows"]
    ]
    leaks = check_leaks(Splits(rewritten), asked(sources))
    print(f"{len(leaks.found)} of {leaks.checked} rewritten questions found")
    assert len(leaks.found) >= 0.7 * leaks.checked
    assert all(
        leak.training == row["Question"]
        for leak in leaks.found
        for row in read["medical_o1_rows"]
        if row["question"] == leak.question
    )
    false = (
        check_leaks(Splits(rewritten), asked(other)).found
        + check_leaks(Splits(training(q for q, _ in other)), asked(sources)).found
    )
    for i, source in enumerate(sources):
        false += check_leaks(Splits(rewritten[:i] + rewritten[i + 1 :]), asked([source])).found
    assert not false
