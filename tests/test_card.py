"""What a run leaves to read: every number under its schema, the headline first, nothing of this machine."""

import json
import re
from dataclasses import fields, replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from synthetic import QUESTIONS, RIGHT, ROWS, WRONG, Split, answer, answers, references, results, scores

from medcot import check_leaks, compare, load_splits
from medcot.evaluation import words
from medcot.evaluation.card import SCHEMA_VERSION, _front_matter, write_comparison, write_run_card
from medcot.evaluation.compare import Comparison
from medcot.evaluation.pairs import Pair
from medcot.evaluation.statistics import Measure
from medcot.run.answers import Answers
from medcot.settings import NOTICE


@pytest.fixture
def comparison():
    shown = Answers("x", answers([RIGHT]).path, (answer(WRONG, "Showcase?"),))
    chat = {"chat_references": references([2.5, 2.6, 2.4, 2.2]), "chat_choices": scores([2] * 4)}
    before = results(
        [WRONG] * 3 + [RIGHT], [2.0, 2.1, 2.2, 2.3], [0, 2, 2, 1], showcase=shown, showcase_trained=True, **chat
    )
    after = results([RIGHT] * 3 + [WRONG], [1.0, 1.2, 1.1, 1.4], [2, 2, 0, 2], showcase=shown)
    questions = replace(QUESTIONS, rows=QUESTIONS.rows[:4])
    leaks = check_leaks(Split(["other"], [row["Question"] for row in ROWS]), questions)
    return compare(before, after, ROWS, questions, leaks)


@pytest.fixture
def record(comparison, trained, tmp_path):
    settings = replace(trained.settings, output_dir=tmp_path)
    return json.loads(write_comparison(comparison, settings, trained.splits, QUESTIONS).read_text(encoding="utf-8"))


def test_comparison_json_opens_with_the_headline(record, comparison):
    assert next(iter(record)) == "headline" and record["headline"] == comparison.headline
    assert record["headline"] == "Right answers 1 -> 3 of 4: too few to conclude anything"
    assert record["beside"] == words.beside(comparison) and record["notes"] == comparison.notes
    assert record["schema_version"] == SCHEMA_VERSION == 2 and record["notice"] == NOTICE


def test_the_dataclasses_are_the_schema(record, comparison):
    assert {field.name for field in fields(Comparison)} <= set(record)
    assert set(record["measures"][0]) == {field.name for field in fields(Measure)} | {"sentence"}
    assert set(record["pairs"][0]) == {field.name for field in fields(Pair)}
    assert [m["name"] for m in record["measures"]] == [m.name for m in comparison.measures]
    for stored, m in zip(record["measures"], comparison.measures, strict=True):
        assert (stored["difference"], stored["verdict"], stored["group"]) == (m.difference, m.verdict, m.group)
        assert stored["sentence"] == words.sentence(m)
    assert record["pairs"][0]["before"]["answer"]["reasoning"] == comparison.pairs[0].before.answer.reasoning
    assert record["pairs"][0]["after"]["outcome"]["correct"] is True
    assert [pair["change"] for pair in record["pairs"]] == ["fixed"] * 3 + ["broken"]


def test_what_was_compared_stands_in_it(record, trained):
    assert record["data"]["sha256"] == trained.splits.fingerprint and record["questions"]["sha256"] == "ab"
    assert len(record["forgotten"]) == 2 and record["showcase"]["training_row"] is True
    assert record["left_out"] == {"leaked": 0, "repeated": 0, "too_long": 0}
    assert record["sources"]["answers"] == ["x.jsonl", "x.jsonl"]


def test_what_json_cannot_hold_is_null(trained, tmp_path):
    one = compare(answers([RIGHT]), answers([WRONG]), ROWS)  # the length of one answer has no interval
    settings = replace(trained.settings, output_dir=tmp_path)
    text = write_comparison(one, settings, trained.splits).read_text(encoding="utf-8")
    length = next(m for m in json.loads(text)["measures"] if m["name"] == "length")
    assert (length["low"], length["high"]) == (None, None) and "Infinity" not in text


def test_where_files_lie_on_this_machine_is_in_no_card(trained, comparison, tmp_path):
    rows = tmp_path / "private" / "clinic.csv"
    rows.parent.mkdir()
    rows.touch()
    splits = replace(trained.splits, source=str(rows))
    settings = replace(trained.settings, model=str(rows.parent))
    card = write_run_card(comparison, settings, splits, replace(QUESTIONS, source=str(rows))).read_text()
    written = card + (trained.settings.output_dir / "comparison.json").read_text()
    assert "clinic.csv" in card and str(tmp_path) not in written


def test_the_run_card_opens_with_the_headline_and_says_what_the_run_recorded(trained, comparison):
    card = write_run_card(comparison, trained.settings, load_splits(trained.settings), QUESTIONS).read_text()
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert card.splitlines()[2].startswith(f"**{comparison.headline}.**") and card.count(comparison.headline) == 1
    assert NOTICE in card and words.as_lines(comparison) in card and trained.splits.fingerprint in card
    assert re.search(rf"\| steps, epochs \| {record['steps']}, 0\.75 over 64 examples \|", card)
    losses = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
    assert f"{losses[0]:.4f} at step 1" in card
    curve = next(line for line in card.splitlines() if line.startswith("| training loss |") and line.count("|") > 4)
    assert [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"] == [curve.split(" | ")[1], curve.split(" | ")[-1].rstrip(" |")]
    assert f"torch {record['versions']['torch']}" in card and str(QUESTIONS) in card
    assert "1 answers in words and 1 options picked by likelihood were right before and are wrong now" in card


def test_the_card_sets_the_forecast_beside_what_happened(trained, comparison):
    card = write_run_card(comparison, trained.settings, load_splits(trained.settings)).read_text()
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert f"| forecast from its first steps | {60 * record['forecast']['minutes']:.0f} s |" in card
    assert f"| training | {record['seconds']:.0f} s on" in card and "| updates skipped | 0, as" in card


def test_the_model_card_is_the_run_card_with_valid_front_matter(trained, comparison):
    card = write_run_card(comparison, trained.settings, trained.splits, QUESTIONS).read_text()
    path = trained.settings.adapter_dir / "README.md"
    read = ModelCard.load(path)  # raises where the metadata are not what the hub expects
    assert read.text.strip() == card.strip()
    assert (read.data.library_name, read.data.license, read.data.base_model) == ("peft", "apache-2.0", None)
    assert set(metadata_load(path)) == {"library_name", "license", "tags"}  # a folder of this machine is no hub name


def test_a_hub_model_and_its_data_are_named_in_the_front_matter(trained):
    settings = replace(trained.settings, model="unsloth/DeepSeek-R1-Distill-Llama-8B")
    splits = replace(trained.splits, source="FreedomIntelligence/medical-o1-reasoning-SFT")
    data = ModelCard(_front_matter(settings, splits) + "text").data
    assert (data.base_model, data.datasets, data.license) == (settings.model, [splits.source], "other")
    assert set(data.to_dict()) == {"base_model", "datasets", "library_name", "license", "tags"}


@pytest.mark.parametrize("kind", ["there", "gone", "relative", "home"])
def test_a_local_path_never_reaches_the_front_matter(trained, tmp_path, monkeypatch, kind):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = {"there": str(folder), "gone": str(tmp_path / "gone" / "x"), "relative": "models/mine", "home": "~/mine"}[
        kind
    ]
    front = _front_matter(replace(trained.settings, model=name), replace(trained.splits, source=name))
    assert name not in front and "base_model" not in front and "datasets" not in front
