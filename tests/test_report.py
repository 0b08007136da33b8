"""What a person reads carries every answer, escapes it, and carries the notice."""

import json
import re

import pytest
from test_evaluation import RIGHT, ROWS, WRONG, answers

from medcot import compare, load_splits
from medcot.report import browse, plot_comparison, write_run_card
from medcot.settings import NOTICE


@pytest.fixture
def comparison():
    hostile = RIGHT.replace("This is", "<script>alert(1)</script> This is")
    return compare(answers([WRONG] * 4), answers([RIGHT] * 3 + [hostile]), ROWS)


def shown(monkeypatch, comparison):
    pieces = []
    monkeypatch.setattr("IPython.display.display", lambda piece: pieces.append(piece))
    browse(comparison)
    return pieces


def test_the_browser_shows_both_answers_and_escapes_them(monkeypatch, comparison):
    widget, static = shown(monkeypatch, comparison)
    picker, page = widget.children
    assert len(picker.options) == 4 and "score of 1" in page.value and "score of 2" in page.value
    picker.value = 3
    assert "&lt;script&gt;" in page.value and "<script>" not in page.value and NOTICE in page.value
    assert static.data.count("<details>") == 5 and "<script>" not in static.data


def test_without_widgets_the_pages_are_plain_html(monkeypatch, comparison):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    (static,) = shown(monkeypatch, comparison)
    assert static.data.count("<details>") == 5 and "Why 3?" in static.data


def test_the_figure_shows_every_measure(comparison, settings):
    figure = plot_comparison(comparison, settings)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{m.name} (n={m.n})" for m in comparison.measures[::-1]]
    assert (settings.output_dir / "figures" / "comparison.png").stat().st_size > 5000


def test_the_run_card_says_what_the_run_recorded(trained, comparison):
    card = write_run_card(comparison, trained.settings, load_splits(trained.settings)).read_text()
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert NOTICE in card and str(comparison) in card and trained.splits.fingerprint[:12] in card
    assert re.search(rf"\| steps, epochs \| {record['steps']}, 0\.75 over 64 examples \|", card)
    assert f"{record['log_history'][0]['loss']:.4f} at step 1" in card
