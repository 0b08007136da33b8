"""What a person reads carries every answer, escapes it, and carries the notice."""

import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from test_evaluation import QUESTIONS, RIGHT, ROWS, WRONG, Split, answer, answers, references, results, scores

from medcot import check_leaks, compare, load_splits
from medcot.inference import Answers
from medcot.report import (
    SCHEMA_VERSION,
    _front_matter,
    browse,
    plot_comparison,
    plot_families,
    show_examples,
    show_forgotten,
    show_showcase,
    write_comparison,
    write_run_card,
)
from medcot.settings import NOTICE

HOSTILE = RIGHT.replace("This is", "<script>alert(1)</script> This is")


@pytest.fixture
def comparison():
    shown = Answers("x", answers([RIGHT]).path, (answer(WRONG, "Showcase?"),))
    chat = {"chat_references": references([2.5, 2.6, 2.4, 2.2]), "chat_choices": scores([2] * 4)}
    before = results(
        [WRONG] * 3 + [RIGHT], [2.0, 2.1, 2.2, 2.3], [0, 2, 2, 1], showcase=shown, showcase_trained=True, **chat
    )
    after = results([RIGHT] * 2 + [HOSTILE, WRONG], [1.0, 1.2, 1.1, 1.4], [2, 2, 0, 2], showcase=shown)
    questions = replace(QUESTIONS, rows=QUESTIONS.rows[:4])
    leaks = check_leaks(Split(["other"], [row["Question"] for row in ROWS]), questions)
    return compare(before, after, ROWS, questions, leaks)


def shown(monkeypatch, comparison):
    pieces = []
    monkeypatch.setattr("IPython.display.display", lambda piece: pieces.append(piece))
    browse(comparison)
    return pieces


def test_the_browser_shows_both_answers_and_escapes_them(monkeypatch, comparison):
    widget, static = shown(monkeypatch, comparison)
    _, picker, page = widget.children
    assert len(picker.options) == 4 and "score of <mark" in page.value and NOTICE in page.value
    picker.value = 2
    assert "&lt;script&gt;" in page.value and "<script>" not in page.value
    assert static.data.count("<details>") == 5 and "<script>" not in static.data


def test_differing_words_are_marked_and_equal_ones_are_not(monkeypatch, comparison):
    widget, _ = shown(monkeypatch, comparison)
    page = widget.children[2].value
    marks = re.findall(r"<mark[^>]*>(.*?)</mark>", page, re.DOTALL)
    assert {"1.", "2."} <= set(marks) and not any("This" in mark or "score" in mark for mark in marks)
    assert re.sub(r"</?mark[^>]*>", "", page).count("This is a score of") == 3  # both answers and the reference, whole


def test_the_browser_sorts_by_what_changed(monkeypatch, comparison):
    widget, _ = shown(monkeypatch, comparison)
    order, picker, page = widget.children
    assert [label for label, _ in order.options] == [
        "row order", "fixed first (3)", "broken first (1)", "unchanged first (0)",
    ]  # fmt: skip
    assert [row for _, row in picker.options] == [0, 1, 2, 3]
    order.value = "broken"
    assert [row for _, row in picker.options] == [3, 0, 1, 2] and picker.options[0][0].startswith("4. (broken) Why 3?")
    assert "Why 3?" in page.value
    order.value = None
    assert [row for _, row in picker.options] == [0, 1, 2, 3]


def test_without_widgets_the_pages_are_plain_html(monkeypatch, comparison):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    (static,) = shown(monkeypatch, comparison)
    assert static.data.count("<details>") == 5 and "Why 3?" in static.data


def test_the_figures_show_every_measure_with_its_interval(comparison, settings):
    figure = plot_comparison(comparison, settings)
    labels = [label.get_text() for axes in figure.axes[::2] for label in axes.get_yticklabels()]
    expected = [m for m in comparison.measures if m.group != "family" and m.unit != "tokens"]
    assert sorted(labels) == sorted(f"{m.name} (n={m.n})" for m in expected)
    drawn = {tuple(line.get_xdata()) for axes in figure.axes[1::2] for line in axes.lines}
    for m in expected:
        scale = 100 if m.unit == "%" else 1
        assert any(ends == pytest.approx((scale * m.low, scale * m.high)) for ends in drawn)
    families = plot_families(comparison, settings)
    assert [label.get_text() for label in families.axes[0].get_yticklabels()] == ["right answer, sums (n=4)"]
    assert all(
        (settings.output_dir / "figures" / f"{name}.png").stat().st_size > 5000 for name in ("comparison", "families")
    )


def test_rows_without_families_have_no_such_figure(settings, capsys):
    plain = [row | {"family": None} for row in ROWS]
    assert plot_families(compare(answers([RIGHT] * 2), answers([RIGHT] * 2), plain), settings) is None
    assert "no families" in capsys.readouterr().out


def test_three_answers_are_chosen_by_rule_and_shown_in_full(comparison, capsys):
    show_examples(comparison)
    printed = capsys.readouterr().out
    assert (
        printed.index("first one fixed")
        < printed.index("Why 0?")
        < printed.index("first one broken")
        < printed.index("Why 3?")
    )
    assert "no answer was unchanged" in printed and NOTICE in printed and "one: 1\ntwo: 2" in printed


def test_what_was_forgotten_is_counted_and_listed(comparison, capsys):
    show_forgotten(comparison, rows=1)
    printed = capsys.readouterr().out
    assert (
        "1 generated answers and 1 options picked by likelihood were right before and are wrong now:" in printed
        and "(generated) Why 3?" in printed
    )
    assert "1 more in comparison.json" in printed


def test_the_showcase_question_is_labelled_as_a_training_row(comparison, capsys):
    show_showcase(comparison)
    printed = capsys.readouterr().out
    assert printed.startswith("A TRAINING ROW") and "Showcase?" in printed and ROWS[0]["Response"] in printed
    assert all(row["question"] != "Showcase?" for row in comparison.rows)


def test_comparison_json_holds_every_number_under_its_schema(comparison, trained, tmp_path):
    settings = replace(trained.settings, output_dir=tmp_path)
    record = json.loads(write_comparison(comparison, settings, trained.splits, QUESTIONS).read_text(encoding="utf-8"))
    assert record["schema_version"] == SCHEMA_VERSION and record["notice"] == NOTICE
    documented = set(re.findall(r"`(\w+)`", write_comparison.__doc__))
    assert set(record) <= documented and set(record["measures"][0]) <= documented
    assert set(record["answers"][0]) | set(record["answers"][0]["before"]) | set(record["choices"][0]) <= documented
    assert [m["name"] for m in record["measures"]] == [m.name for m in comparison.measures]
    for stored, m in zip(record["measures"], comparison.measures, strict=True):
        assert (
            stored["difference"] == m.difference and stored["verdict"] == m.verdict and stored["sentence"] == m.sentence
        )
    assert record["data"]["sha256"] == trained.splits.fingerprint and record["questions"]["sha256"] == "ab"
    assert len(record["forgotten"]) == 2 and record["leaks"]["exact"] == [] and record["showcase"]["training_row"]
    assert [row["change"] for row in record["answers"]] == ["fixed"] * 3 + ["broken"]


def test_the_run_card_says_what_the_run_recorded(trained, comparison):
    card = write_run_card(comparison, trained.settings, load_splits(trained.settings), QUESTIONS).read_text()
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert NOTICE in card and str(comparison) in card and trained.splits.fingerprint in card
    assert re.search(rf"\| steps, epochs \| {record['steps']}, 0\.75 over 64 examples \|", card)
    losses = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
    assert f"{losses[0]:.4f} at step 1" in card
    curve = next(line for line in card.splitlines() if line.startswith("| training loss |") and line.count("|") > 4)
    assert [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"] == [curve.split(" | ")[1], curve.split(" | ")[-1].rstrip(" |")]
    assert f"torch {record['versions']['torch']}" in card and str(QUESTIONS) in card


def test_the_model_card_is_the_run_card_with_valid_front_matter(trained, comparison):
    card = write_run_card(comparison, trained.settings, trained.splits, QUESTIONS).read_text()
    path = trained.settings.adapter_dir / "README.md"
    read = ModelCard.load(path)  # raises where the metadata are not what the hub expects
    assert read.text.strip() == card.strip()
    assert (read.data.library_name, read.data.license, read.data.pipeline_tag) == (
        "peft",
        "apache-2.0",
        "text-generation",
    )
    assert "base_model" not in metadata_load(path)  # a folder of this machine is no name of the hub
    right = next(result for result in read.data.eval_results if "right answer" in result.metric_name)
    assert right.metric_value == 0.75 and right.metric_type == "accuracy"


def test_a_hub_model_and_its_data_are_named_in_the_front_matter(trained, comparison):
    settings = replace(trained.settings, model="unsloth/DeepSeek-R1-Distill-Llama-8B")
    splits = replace(trained.splits, source="FreedomIntelligence/medical-o1-reasoning-SFT")
    questions = replace(QUESTIONS, source="GBaker/MedQA-USMLE-4-options")
    data = ModelCard(_front_matter(comparison, settings, splits, questions) + "text").data
    assert (data.base_model, data.datasets, data.license) == (settings.model, [splits.source], "other")
    assert {result.dataset_type for result in data.eval_results} >= {"GBaker/MedQA-USMLE-4-options"}


def test_the_card_sets_the_forecast_beside_what_happened(trained, comparison):
    card = write_run_card(comparison, trained.settings, load_splits(trained.settings)).read_text()
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert f"| forecast from its first steps | {60 * record['forecast']['minutes']:.0f} s |" in card
    assert f"| training | {record['seconds']:.0f} s on" in card and "| updates skipped | 0, as" in card
