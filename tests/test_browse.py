"""Answers to read: both sides, escaped, marked where they differ, also without a kernel."""

import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic import QUESTIONS, RIGHT, ROWS, WRONG, answer, answers, nothing_changed, results

from medcot.evaluation.browse import browse, card
from medcot.evaluation.compare import compare
from medcot.evaluation.figures import plot_comparison
from medcot.evaluation.statistics import FAMILY, PRIMARY, SECONDARY
from medcot.run.answers import Answers
from medcot.settings import NOTICE

HOSTILE = RIGHT.replace("This is", "<script>alert(1)</script> This is")


@pytest.fixture
def comparison():
    shown = Answers("x", answers([RIGHT]).path, (answer(WRONG, "Showcase?"),))
    before = results([WRONG] * 3 + [RIGHT], [2.0, 2.1, 2.2, 2.3], [0, 2, 2, 1], showcase=shown, showcase_trained=True)
    after = results([RIGHT] * 2 + [HOSTILE, WRONG], [1.0, 1.2, 1.1, 1.4], [2, 2, 0, 2], showcase=shown)
    return compare(before, after, ROWS, replace(QUESTIONS, rows=QUESTIONS.rows[:4]))


class Handle:
    """What `display(..., display_id=True)` returns: the place on the page that a menu changes."""

    def __init__(self, piece):
        self.page = piece.data

    def update(self, piece):
        self.page = piece.data


@pytest.fixture
def browsed(comparison, monkeypatch):
    """(what was displayed in order, the handle of the page)."""
    pieces, handles = [], []

    def display(piece, display_id=False):
        pieces.append(piece)
        if display_id:
            handles.append(Handle(piece))
            return handles[-1]
        return None

    monkeypatch.setattr("IPython.display.display", display)
    browse(comparison)
    return pieces, handles[0]


def test_the_browser_shows_both_answers_and_escapes_them(browsed):
    (menus, first, folded), handle = browsed
    _, picker = menus.children
    assert len(picker.options) == 4 and "Why 0?" in first.data and NOTICE in first.data
    assert "<b>Before</b>" in first.data and "<b>After</b>" in first.data and "<details" not in first.data
    picker.value = 2
    assert "Why 2?" in handle.page and "&lt;script&gt;" in handle.page and "<script>" not in handle.page
    assert folded.data.count("<details>") == 5 and "<script>" not in folded.data


def test_differing_words_are_marked_and_equal_ones_are_not(browsed):
    page = browsed[1].page
    marks = re.findall(r"<mark[^>]*>(.*?)</mark>", page, re.DOTALL)
    assert {"1.", "2."} <= set(marks) and not any("This" in mark or "score" in mark for mark in marks)
    assert re.sub(r"</?mark[^>]*>", "", page).count("This is a score of") == 3  # both answers and the reference, whole


def test_the_browser_sorts_by_what_changed(browsed):
    (menus, *_), handle = browsed
    order, picker = menus.children
    assert [label for label, _ in order.options] == [
        "row order", "fixed first (3)", "broken first (1)", "unchanged first (0)",
    ]  # fmt: skip
    assert [row for _, row in picker.options] == [0, 1, 2, 3]
    order.value = "broken"
    assert [row for _, row in picker.options] == [3, 0, 1, 2] and picker.options[0][0].startswith("4. (broken) Why 3?")
    assert "Why 3?" in handle.page
    order.value = None
    assert [row for _, row in picker.options] == [0, 1, 2, 3]


def test_without_widgets_everything_is_still_there(comparison, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    pieces = []
    monkeypatch.setattr("IPython.display.display", lambda piece, display_id=False: pieces.append(piece.data))
    browse(comparison)
    assert len(pieces) == 2 and "Why 0?" in pieces[0] and "Why 3?" in pieces[1]


SAVED = """
import sys; sys.path.insert(0, {tests!r})
from synthetic import *
from medcot.evaluation import browse, compare
comparison = compare(answers([WRONG] * 8), answers([RIGHT] * 8), ROWS)
"""


def test_a_saved_notebook_without_a_kernel_shows_the_table_the_cards_and_the_first_page():
    cells = [SAVED.format(tests=str(Path(__file__).parent)), "comparison", "comparison.show()", "browse(comparison)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3", timeout=120, store_widget_state=False).execute()
    _, table, cards, browsed = (cell.outputs for cell in notebook.cells)
    assert not any(output.get("name") == "stderr" for outputs in (table, cards, browsed) for output in outputs)
    assert "<table" in table[0].data["text/html"] and table[0].data["text/plain"].startswith(
        "Right answers 0 -> 8 of 8"
    )
    assert "The first one fixed" in cards[0].data["text/html"]
    menus, page, folded = (output.data for output in browsed)
    assert "text/html" not in menus and menus["text/plain"].startswith("(two menus stand here while a kernel runs")
    assert "Why 0?" in page["text/html"] and "<details" not in page["text/html"]
    assert folded["text/html"].count("Why 7?") >= 1


def test_a_card_says_what_was_right_and_what_was_wrong(comparison):
    page = card(comparison.pairs[0], "Title")
    assert re.findall(r">(right|wrong)</b>", page) == ["wrong", "right"] and "Title" in page


def test_three_answers_are_chosen_by_rule_and_shown_in_full(comparison, capsys):
    comparison.show()
    printed = capsys.readouterr().out
    places = [printed.index(text) for text in ("first one fixed", "Why 0?", "first one broken", "Why 3?")]
    assert places == sorted(places) and "unchanged" not in printed
    assert NOTICE in printed and "one: 1\n           two: 2" in printed


def test_the_showcase_question_is_labelled_as_a_training_row(comparison, capsys):
    comparison.show()
    printed = capsys.readouterr().out
    label = (
        "The showcase question, a training row: a good answer to it shows memory, not learning; counted in no measure"
    )
    assert label in printed and "Showcase?" in printed
    assert all(pair.question != "Showcase?" for pair in comparison.pairs)


def test_the_figure_shows_every_judged_measure_with_its_interval_and_the_families(settings):
    comparison = compare(*nothing_changed(0, 40, 5))  # families of eight: too few for a difference
    figure = plot_comparison(comparison, settings)
    labels = [label.get_text() for axes in figure.axes[::2] for label in axes.get_yticklabels()]
    expected = [m for m in comparison.measures if m.group in (PRIMARY, SECONDARY, FAMILY) and m.unit != "tokens"]
    assert sorted(labels) == sorted(f"{m.name} (n={m.n})" for m in expected)
    assert "right answer, family 0 (n=8)" in labels
    drawn = [tuple(line.get_xdata()) for axes in figure.axes[1::2] for line in axes.lines if line.get_linewidth() == 2]
    for m in expected:
        ends = [scale * end for end in (m.low, m.high) for scale in [100 if m.unit == "%" else 1]]
        assert any(found == pytest.approx(ends) for found in drawn) == (m.n >= 10)
    bold = [label.get_text() for label in figure.axes[0].get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["right answer (n=40)"]
    assert (settings.output_dir / "figures" / "comparison.png").stat().st_size > 5000


def test_rows_without_families_have_no_such_panel(settings):
    plain = [row | {"family": None} for row in ROWS]
    figure = plot_comparison(compare(answers([RIGHT] * 2), answers([RIGHT] * 2), plain), settings)
    assert len(figure.axes) == 2
