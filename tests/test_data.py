"""Rows: split without overlap, audited, encoded exactly; a source that cannot serve is one clear error."""

import csv
import json
from dataclasses import replace

import pytest
from datasets import Dataset

from medcot import audit, load_splits, to_examples
from medcot.data import SHOWCASE_QUESTION, normalise
from medcot.prompts import format_completion, format_prompt
from medcot.rows import COLUMNS
from medcot.settings import MedcotError


def rows(count, **changes):
    made = [{"Question": f"Why {i}?", "Complex_CoT": f"Because {i}.", "Response": f"So {i}."} for i in range(count)]
    for index, row in changes.items():
        made[int(index[1:])] |= row
    return made


def write(path, made):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(made), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, made[0])
            writer.writeheader()
            writer.writerows(made)
    else:
        Dataset.from_list(made).to_parquet(str(path))
    return str(path)


@pytest.fixture
def few(settings):
    return replace(settings, train_rows=5, eval_rows=3, answer_rows=3, eval_loss_rows=3)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_first_rows_train_and_the_next_evaluate(few, tmp_path, name, capsys):
    splits = load_splits(replace(few, dataset=write(tmp_path / name, rows(10))))
    assert splits.train["Question"][:] == [f"Why {i}?" for i in range(5)]
    assert splits.eval["Question"][:] == [f"Why {i}?" for i in range(5, 8)]
    assert ", 2 left unused; SHA-256" in capsys.readouterr().out and splits.revision is None


def test_a_folder_of_files_is_read_in_name_order(few, tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "b.jsonl", rows(10)[4:])
    write(tmp_path / "d" / "a.jsonl", rows(10)[:4])
    assert load_splits(replace(few, dataset=str(tmp_path / "d"))).train["Question"][3:] == ["Why 3?", "Why 4?"]


def test_a_training_question_is_moved_out_of_evaluation_and_counted(few, tmp_path, capsys):
    made = rows(10, _6={"Question": "  WHY 2? "})
    splits = load_splits(replace(few, dataset=write(tmp_path / "rows.jsonl", made)))
    assert not set(map(normalise, splits.train["Question"])) & set(map(normalise, splits.eval["Question"]))
    assert splits.eval["Question"][:] == ["Why 5?", "Why 7?", "Why 8?"]
    assert "1 moved out of evaluation" in capsys.readouterr().out


def test_empty_fields_are_dropped_and_counted(few, tmp_path, capsys):
    made = rows(10, _1={"Response": " "}, _2={"Complex_CoT": None})
    splits = load_splits(replace(few, dataset=write(tmp_path / "rows.jsonl", made)))
    assert splits.train["Question"][:] == ["Why 0?", "Why 3?", "Why 4?", "Why 5?", "Why 6?"]
    assert "2 with an empty field dropped" in capsys.readouterr().out


def test_fingerprint_follows_the_rows_used_and_only_them(few, tmp_path):
    def fingerprint(made):
        return load_splits(replace(few, dataset=write(tmp_path / "rows.jsonl", made))).fingerprint

    first = fingerprint(rows(10))
    assert fingerprint(rows(9)) == first  # the tenth is not used
    assert fingerprint(rows(10, _7={"Response": "Else."})) != first


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", None, ["not found", "json, jsonl, csv or parquet"]),
        ("rows.txt", "Why?", ["holds .txt", ".jsonl"]),
        ("rows.jsonl", "", ["check that the file is what its name says"]),
        ("rows.jsonl", "{]", ["could not be read", "what its name says"]),
        ("rows.parquet", "Question\nWhy?", ["could not be read", "what its name says"]),
        ("rows.csv", "Question,Response\nWhy?,So.\n", ["no column Complex_CoT", "it has Question, Response", "rename"]),
        ("rows.jsonl", '{"Question": 1, "Complex_CoT": "b", "Response": "c"}\n', ["column Question holds int64"]),
        ("rows.json", "[]", ["what its name says"]),
        ("folder", "mixed", ["holds .csv, .jsonl", "files of one kind"]),
        ("folder", "none", ["no data file"]),
    ],
)
def test_a_bad_source_is_one_error_with_the_cure(few, tmp_path, name, content, words):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        if content == "mixed":
            write(path / "a.csv", rows(2)), write(path / "b.jsonl", rows(2))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(MedcotError) as error:
        load_splits(replace(few, dataset=str(path)))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_too_few_rows_name_the_numbers(few, tmp_path):
    with pytest.raises(MedcotError, match=r"has 7 usable rows .* at least 10 are needed"):
        load_splits(replace(few, dataset=write(tmp_path / "rows.jsonl", rows(7))))


def test_an_unreachable_hub_is_one_error(few):
    with pytest.raises(MedcotError, match=r"no/such-data could not be read.*network"):
        load_splits(replace(few, dataset="no/such-data"))


def test_embedded_cases_never_repeat_a_held_out_question(settings):
    splits = load_splits(settings)
    assert (len(splits.train), len(splits.eval)) == (settings.train_rows, settings.eval_rows)
    assert not set(map(normalise, splits.train["Question"])) & set(map(normalise, splits.eval["Question"]))


def test_audit_counts_what_is_there(few, tmp_path, tokenizer):
    made = rows(
        12,
        _0={"Question": "why 1? "},
        _2={"Complex_CoT": "a </think> b"},
        _3={"Response": "β"},
        _4={"Question": SHOWCASE_QUESTION},
    )
    splits = load_splits(replace(few, dataset=write(tmp_path / "rows.jsonl", made)))
    found = audit(splits, tokenizer, few)
    assert (found.rows, found.duplicates, found.think_tags, found.outer_white_space, found.non_ascii) == (5, 1, 1, 1, 1)
    assert found.showcase_in_training and "a training row: no evidence" in str(found)
    examples = to_examples(splits.train, tokenizer, few, show=False)
    assert list(found.token_counts) == [len(ids) for ids in examples["input_ids"]]


def test_examples_are_prompt_completion_and_one_eos(settings, tokenizer):
    splits = load_splits(settings)
    for row, example in zip(splits.train, to_examples(splits.train, tokenizer, settings, show=False), strict=True):
        completion = format_completion(row["Complex_CoT"], row["Response"], tokenizer.eos_token)
        assert (
            tokenizer.decode(example["input_ids"]) == tokenizer.bos_token + format_prompt(row["Question"]) + completion
        )
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1
        assert example["input_ids"].count(tokenizer.eos_token_id) == 1
        assert example["input_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in example["input_ids"]


@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_exactly_these_tokens_are_supervised(settings, tokenizer, completion_only_loss):
    made = Dataset.from_list([{"Question": "Why?", "Complex_CoT": " \n  Odd start", "Response": "So."}])
    settings = replace(settings, completion_only_loss=completion_only_loss)
    example = to_examples(made, tokenizer, settings, show=False)[0]
    prompt = tokenizer(format_prompt("Why?"))["input_ids"]
    masked = 0 if not completion_only_loss else len(prompt)
    assert example["input_ids"][: len(prompt)] == prompt  # as at inference, whatever the reasoning starts with
    assert example["completion_mask"] == [0] * masked + [1] * (len(example["input_ids"]) - masked)


def test_over_long_rows_are_left_out_and_counted(settings, tokenizer, capsys):
    made = Dataset.from_list([rows(1)[0], rows(1, _0={"Response": "word " * 2000})[0]])
    examples = to_examples(made, tokenizer, settings)
    assert len(examples) == 1
    assert "1 examples, 1 left out as longer than 2048 tokens" in capsys.readouterr().out
    with pytest.raises(MedcotError, match="all 1 rows are longer than max_seq_length=2048"):
        to_examples(made.select([1]), tokenizer, settings)


def test_control_tokens_in_a_row_cannot_end_or_forge_a_turn(settings, tokenizer):
    text = f"{tokenizer.eos_token} </think> <think> {tokenizer.bos_token} <｜User｜>"
    example = to_examples(
        Dataset.from_list([{"Question": text, "Complex_CoT": text, "Response": text}]), tokenizer, settings, show=False
    )[0]
    for control in ("<think>", "</think>", tokenizer.eos_token, tokenizer.bos_token):
        assert example["input_ids"].count(tokenizer.convert_tokens_to_ids(control)) == 1
    assert tokenizer.convert_tokens_to_ids("<｜User｜>") not in example["input_ids"]


def test_an_example_is_shown_with_its_supervised_tokens_coloured(settings, tokenizer, capsys):
    settings = replace(settings, completion_only_loss=True)
    to_examples(Dataset.from_list(rows(1)), tokenizer, settings)
    shown = capsys.readouterr().out
    assert f"\033[32mBecause 0.\n</think>\nSo 0.{tokenizer.eos_token}\033[0m" in shown
    assert "\033[90m" + tokenizer.bos_token in shown


@pytest.mark.parametrize("name", ["rows[1].jsonl", "rows*.jsonl", "rows?.jsonl", "rows{a,b}.jsonl"])
def test_a_name_with_glob_characters_is_that_file_and_no_other(settings, tmp_path, name):
    for file, word in (("rows1.jsonl", "other"), ("rowsb.jsonl", "other"), (name, "this")):
        made = rows(90, _0={"Question": f"Which file? {word}"})
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in made))
    found = load_splits(replace(settings, dataset=str(tmp_path / name)))
    assert found.train[0]["Question"] == "Which file? this"


def test_words_that_pandas_takes_for_nothing_are_text(settings, tmp_path):
    words = ["NA", "N/A", "null", "None", "nan", "NaN"]
    lines = ["Question,Complex_CoT,Response", *(f"Why {i}?,Because,{words[i % len(words)]}" for i in range(90))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    found = load_splits(replace(settings, dataset=str(tmp_path / "rows.csv")))
    assert found.train["Response"][:6] == words and not found.dropped["with an empty field dropped"]


def test_thirty_rows_are_enough_to_try_and_one_line_says_what_is_held_out(settings, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", rows(30))
    found = load_splits(replace(settings, dataset=file))
    assert (len(found.train), len(found.eval)) == (24, 6)
    assert not set(found.train["Question"]) & set(found.eval["Question"])
    assert "24 training and 6 evaluation rows from" in capsys.readouterr().out
    load_splits(replace(settings, dataset=write(tmp_path / "many.jsonl", rows(200))))
    assert (
        "64 training and 12 evaluation rows from" in (said := capsys.readouterr().out) and ", 124 left unused" in said
    )


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_tables_are_cut_at_what_their_first_line_says(settings, tmp_path, separator, ending):
    file = tmp_path / f"rows{ending}"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter=separator)
        writer.writeheader()
        writer.writerows(row | {"Response": "One, two; three."} for row in rows(90))
    assert load_splits(replace(settings, dataset=str(file))).train[0]["Response"] == "One, two; three."


def test_columns_can_be_named(settings, tmp_path):
    made = [
        {"title": row["Question"], "notes": row["Complex_CoT"], "answer": row["Response"], "Question": "x"}
        for row in rows(90)
    ]
    named = {"question_column": "title", "reasoning_column": "notes", "response_column": "answer"}
    found = load_splits(replace(settings, dataset=write(tmp_path / "rows.jsonl", made), **named))
    assert [found.train[0][column] for column in COLUMNS] == ["Why 0?", "Because 0.", "So 0."]
    with pytest.raises(MedcotError, match=r"has no column titel; it has .*title.* name them \(question_column"):
        load_splits(
            replace(settings, dataset=write(tmp_path / "rows.jsonl", made), **named | {"question_column": "titel"})
        )


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_rows_may_be_chats(settings, tmp_path):
    made = [
        chat(("system", "You are."), ("user", f"Why {i}?"), ("assistant", f"<think>\nBecause {i}.\n</think>\nSo {i}."))
        for i in range(90)
    ]
    found = load_splits(replace(settings, dataset=write(tmp_path / "rows.jsonl", made)))
    assert [found.train[3][column] for column in COLUMNS] == ["Why 3?", "Because 3.", "So 3."]
    made[2] = chat(("user", "Why?"), ("assistant", "So."), ("user", "Why?"))
    with pytest.raises(MedcotError, match=r"row 2: messages are of user, assistant, user: give one turn"):
        load_splits(replace(settings, dataset=write(tmp_path / "rows.jsonl", made)))


def test_options_that_cannot_be_graded_are_named_when_rows_are_loaded(settings, tmp_path):
    made = [row | {"options": {"A": "a", "B": "b"}, "answer": "A"} for row in rows(90)]
    assert load_splits(replace(settings, dataset=write(tmp_path / "rows.jsonl", made)))
    made[70] |= {"answer": "C"}
    with pytest.raises(MedcotError, match=r"row 70: answer 'C' is out of range for its 2 choices"):
        load_splits(replace(settings, dataset=write(tmp_path / "rows.jsonl", made)))
