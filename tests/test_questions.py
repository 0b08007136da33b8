"""Multiple-choice rows: every known form reads as one, a bad row is named, a repeated question is asked once."""

import json
from dataclasses import replace

import pytest

from medcot.choices import accepted_answers, read_choices
from medcot.evaluation.questions import load_choices
from medcot.profiles import PROFILES
from medcot.settings import MedcotError

READ = {"question": "Which?", "choices": ["no", "yes"], "answer_index": 1}
GOOD = {"question": "Which?", "choices": ["no", "yes"], "answer": 1}


@pytest.fixture
def choices_file(tmp_path):
    def write(*rows, most=12):
        path = tmp_path / "choices.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return replace(PROFILES["smoke"], choice_dataset=str(path), choice_rows=most, chat_rows=0)

    return write


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        READ,
        {"question": "Which?", "options": {"A": "no", "B": "yes"}, "answer_idx": "B", "answer": "yes"},
        {"question": "Which?", "options": {"A": "no", "B": "yes", "C": None}, "answer": "B"},
        {"question": "Which?", "options": ["no", "yes"], "answer": "yes"},
        {"question": "Which?", "options": ["no", "yes"], "answer": "b"},
        {"Question": "Which?", "options": ["no", "yes"], "answer_index": 1, "Response": "yes"},
    ],
)
def test_every_known_form_reads_as_one(row):
    assert read_choices(row, "here") == READ


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"answer": 2}, "here: answer 2 is out of range for its 2 choices"),
        (GOOD | {"answer": -1}, "answer -1 is out of range"),
        (GOOD | {"answer": "C"}, "answer 'C' is out of range"),
        (GOOD | {"answer": True}, "answer True is out of range"),
        (GOOD | {"answer": ["yes"]}, r"answer \['yes'\] is out of range"),
        (GOOD | {"answer": 0.5}, "answer 0.5 is out of range"),
        ({"question": "Which?", "choices": ["no", "yes"]}, "has no answer; it has question, choices"),
        (GOOD | {"choices": ["no", ""]}, r"choices \['no', ''\]: at least two texts"),
        (GOOD | {"choices": ["no"]}, r"choices \['no'\]"),
        (GOOD | {"choices": "no or yes"}, "give a list of texts"),
        ([1], "holds list"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(MedcotError, match=message):
        read_choices(row, "here")


@pytest.mark.parametrize(
    ("answer", "texts"),
    [("croup", ("croup",)), (5, ("5",)), (2.5, ("2.5",)), (["croup", "laryngitis"], ("croup", "laryngitis")), (None, ()), ("", ())],
)  # fmt: skip
def test_what_counts_as_right_without_options(answer, texts):
    assert accepted_answers({"answer": answer}, "here") == texts


@pytest.mark.parametrize("answer", [True, {"text": "croup"}, [["croup"]], [None]])
def test_an_answer_that_is_no_text_is_named(answer):
    with pytest.raises(MedcotError, match=r"evaluation row 3: answer .*: give a text, a number, or a list of them"):
        accepted_answers({"answer": answer}, "evaluation row 3")


def test_the_line_of_a_bad_question_is_named(choices_file):
    with pytest.raises(MedcotError, match=r"choices.jsonl, line 2: answer 2 is out of range"):
        load_choices(choices_file(GOOD, GOOD | {"answer": 2}))
    with pytest.raises(MedcotError, match="line 2: not a JSON object"):
        load_choices(choices_file(GOOD, '{"question": "Whi'))


def test_a_repeated_question_is_asked_once_and_counted(choices_file, capsys):
    again = {"question": " WHICH? ", "options": ["Yes", "no"], "answer": "A"}
    other = GOOD | {"choices": ["no", "perhaps"]}
    questions = load_choices(choices_file(GOOD, again, other, GOOD, GOOD | {"question": "Who?"}))
    assert [row["choices"][row["answer_index"]] for row in questions.rows] == ["yes", "perhaps", "yes"]
    assert questions.repeated == 2 and len(questions) == 3
    assert (
        "3 multiple-choice questions from" in (line := capsys.readouterr().out) and "2 repeated ones left out" in line
    )


def test_as_many_different_questions_as_were_asked_for(choices_file):
    assert len(load_choices(choices_file(GOOD, GOOD, GOOD | {"question": "Who?"}, most=2))) == 2


def test_the_embedded_questions_are_different(capsys):
    questions = load_choices(replace(PROFILES["tiny"], chat_rows=0))
    assert (len(questions), questions.repeated) == (240, 0) and "repeated" not in capsys.readouterr().out
    assert all(len(set(row["choices"])) == 4 for row in questions.rows)
