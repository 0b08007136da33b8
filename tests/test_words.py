"""What a reader sees first: one sentence, at most two more, a short table, and how far to believe it."""

import re
from dataclasses import replace

import pytest
from synthetic import QUESTIONS, RIGHT, ROW, ROWS, WRONG, answers, named, nothing_changed, references, results, scores

from medcot.evaluation import words
from medcot.evaluation.compare import compare
from medcot.evaluation.statistics import UNCHANGED, judge, paired_means, paired_proportions
from medcot.settings import EMBEDDED_CASES, NOTICE


def rows(n):
    return [ROW | {"Question": f"Why {i}?", "family": f"family {i % 3}"} for i in range(n)]


@pytest.fixture
def comparison():
    """240 questions of which 94 were right before; 109 are fixed and 6 broken; the options chosen get worse."""
    before = [RIGHT] * 94 + [WRONG] * 146
    after = [WRONG] * 6 + [RIGHT] * 88 + [RIGHT] * 109 + [WRONG] * 37
    asked = replace(QUESTIONS, rows=tuple(QUESTIONS.rows[0] | {"question": f"Which {i}?"} for i in range(240)))
    sides = [
        results(texts, [1.0 + i / 240 + shift * (i % 2) for i in range(240)], [2] * right + [0] * (240 - right))
        for texts, right, shift in ((before, 200, 0), (after, 150, 0.01))
    ]
    return compare(*sides, rows(240), asked)


def test_the_headline_is_one_sentence_in_a_fixed_form(comparison):
    assert comparison.headline == (
        "Right answers 39 % -> 82 % (+43 points, 95 % interval 36 to 50; 109 fixed, 6 broken, n = 240)"
    )
    assert str(comparison).startswith(" ".join(comparison.headline.split()[:9]))


def test_at_most_two_sentences_follow_and_say_what_is_worse_and_what_was_not_told_apart(comparison):
    sentences = words.beside(comparison)
    assert len(sentences) == 2
    assert sentences[0] == "Worse: reference, nats per token (+0.005 nats); multiple choice (-20.8 points)."
    assert sentences[1].startswith("Not told apart: ") and "well formed" in sentences[1]


def test_by_likelihood_the_headline_says_so(comparison):
    m = named(comparison, "multiple choice")
    other = replace(comparison, primary=m.name, measures=judge([replace(m, group="secondary")], m.name))
    assert words.headline(other) == (
        "Right options by likelihood 83 % -> 62 % (-21 points, 95 % interval -26 to -15; 0 fixed, 50 broken, n = 240): worse"
    )


def test_no_difference_and_too_few_are_said_in_the_headline():
    same = compare(answers([RIGHT] * 24), answers([RIGHT] * 24), rows(24))
    assert (
        same.headline.endswith("0 fixed, 0 broken, n = 24): no detectable difference") and "(0 points," in same.headline
    )
    few = compare(answers([WRONG] * 8), answers([RIGHT] * 8), ROWS)
    assert few.headline == "Right answers 0 -> 8 of 8: too few to conclude anything"
    assert not any(m.verdict in ("better", "worse") for m in few.measures)
    assert words.sentence(few.measures[0]) == "right answer: 0 before and 8 after of 8, too few to tell."
    assert few.table["before"][0] == "0 of 8" and few.table["after"][0] == "8 of 8"
    assert few.table["difference"][0] == few.table["95 % interval"][0] == "" and "+100" not in str(few)


def test_few_questions_are_said_early():
    assert words.too_few(240) is None and words.too_few(1273) is None
    assert words.too_few(9).startswith("Too few questions: with n = 9 counts are shown")
    assert words.too_few(31) == (
        "Few questions: n = 31 would show only a change of 24 points or more in 4 of 5 runs (if a fifth of the answers change)."
    )
    thirty_one = compare(answers([WRONG] * 31), answers([RIGHT] * 31), rows(31))
    assert words.too_few(31) in thirty_one.notes
    assert not compare(answers([WRONG] * 50), answers([RIGHT] * 50), rows(50)).notes


def test_embedded_questions_beside_own_rows_are_named():
    own = [results([RIGHT] * 8, [1.0] * 8, [2] * 8, rows_source="clinic.csv") for _ in range(2)]
    embedded = replace(QUESTIONS, source=EMBEDDED_CASES)
    assert any("not rows of clinic.csv" in note for note in compare(*own, ROWS, embedded).notes)
    assert not any("not rows of" in note for note in compare(*own, ROWS, QUESTIONS).notes)
    both = [replace(side, rows_source=EMBEDDED_CASES) for side in own]
    assert not any("not rows of" in note for note in compare(*both, ROWS, embedded).notes)


def test_in_a_terminal_it_is_short():
    comparison = compare(*nothing_changed(1, 240, 19))
    lines = str(comparison).splitlines()
    table = lines[lines.index("") + 1 :]
    table = table[: table.index("")]
    assert len(table) <= 14 and table[1].startswith("right answer ") and table[-2].startswith("19 families of cases: ")
    assert table[-1] == f"all {len(comparison.measures)} measures: comparison.json"
    assert not any(name in str(comparison) for name in ("per byte", "think closed", "family 3", "answer present"))
    assert max(len(line) for line in lines if line != NOTICE) <= 100 and len(lines) <= 26 and lines[-1] == NOTICE


def test_how_many_measures_and_how_many_false_alarms_to_expect_are_stated():
    comparison = compare(*nothing_changed(1, 240, 19))
    assert "The 25 others are corrected for their number (Holm)" in words.how_sure(comparison)
    assert "any false alarm among all of them in at most 5 %" in words.how_sure(comparison)
    assert "1.3 a run would be expected uncorrected" in words.how_sure(comparison)


def test_a_notebook_gets_a_coloured_table_with_the_primary_row_first(comparison):
    page = comparison._repr_html_()
    body = page[page.index("<tbody>") :]
    first = body[: body.index("</tr>")]
    assert "right answer" in first and "better" in first
    assert page.index(comparison.headline.replace("->", "-&gt;")) < page.index("<table")
    styles = re.findall(r"#(T_\w+_row\d+_col6)[^{]*{[^}]*color: #1a7f4b", page)
    assert styles and all(re.search(rf'id="{style}"[^>]*>better', page) for style in styles[:1])
    assert page.count("<details>") >= 3 and "3 families of cases: 3 better" in page and NOTICE in page


def test_what_a_source_is_called_cannot_break_the_page():
    hostile = [results([RIGHT] * 8, [1.0] * 8, [2] * 8, rows_source="<script>x</script>") for _ in range(2)]
    named_so = [row | {"family": "<script>y</script>"} for row in ROWS]
    page = compare(*hostile, named_so, replace(QUESTIONS, source=EMBEDDED_CASES))._repr_html_()
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 2


def test_sentences_say_how_much_how_sure_and_what_could_have_been_seen():
    def alone(m):
        return words.sentence(judge([m], m.name)[0])

    better = alone(paired_proportions("right answer", [0] * 9 + [1] * 11, [1] * 9 + [0] + [1] * 10))
    assert better.startswith("right answer: better, 55.0 % before, 95.0 % after, +40.0 points (")
    assert better.endswith("exact McNemar p = 0.021, 9 fixed, 1 broken.")
    none = alone(paired_proportions("right answer", [0, 1] * 10, [1, 1] + [0, 1] * 9))
    assert f"right answer: {UNCHANGED}" in none and "or more in 4 of 5 runs." in none
    tokens = [10, 11, 12, 13, 9, 10, 12, 11, 10, 12], [20, 22, 25, 23, 19, 21, 22, 20, 21, 23]
    longer = alone(paired_means("length", *tokens, unit="tokens", better="neither"))
    assert longer.startswith("length: higher, 11.0 before, 21.6 after, +10.6 tokens (")
    same = alone(paired_means("x", range(12), range(12), unit="tokens"))
    assert "no row differs" in same


def test_the_table_is_a_data_frame_with_every_measure():
    comparison = compare(
        results([WRONG] * 8, [1.0] * 8, [2] * 8, chat_references=references([1.0] * 8), chat_choices=scores([1] * 8)),
        results([RIGHT] * 8, [1.0] * 8, [2] * 8), ROWS, QUESTIONS,
    )  # fmt: skip
    table = comparison.table
    assert list(table["measure"]) == [m.name for m in comparison.measures] and table["group"][0] == "primary"
    assert set(table[table["group"] == "prompt"]["verdict"]) == {"-"}
