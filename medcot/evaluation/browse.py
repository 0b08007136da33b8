"""Answers to read: cards side by side in a notebook, text in a terminal."""

import difflib
import re
import textwrap

from ..settings import NOTICE
from .words import short_text

CARD = """
<div style="border:1px solid #8884;border-radius:6px;padding:0.6em 0.9em;margin:0.5em 0">
<p style="margin:0.2em 0"><b>{{ title }}</b></p>
<p style="margin:0.2em 0;white-space:pre-wrap">{{ question }}</p>
<p style="margin:0.2em 0"><b>Reference</b> {{ reference }}</p>
<div style="display:flex;flex-wrap:wrap;gap:0.8em">
{% for side in sides %}
<div style="flex:1 1 20em;min-width:0;border-top:3px solid {{ side.colour }};padding-top:0.3em">
<b>{{ side.name }}</b>{% if side.mark %} <b style="color:{{ side.ink }}">{{ side.mark }}</b>{% endif %}
{% if side.problems %}<em> {{ side.problems }}</em>{% endif %}
<div style="white-space:pre-wrap;opacity:0.75;margin:0.4em 0">{{ pieces(side.reasoning) }}</div>
<div style="white-space:pre-wrap;margin:0.4em 0">{{ pieces(side.response) }}</div>
</div>
{% endfor %}
</div>
{% if notice %}<p style="margin:0.2em 0"><small>{{ notice }}</small></p>{% endif %}
</div>
"""
PIECES = """{% macro pieces(parts) %}{% for text, differs in parts %}{% if differs
%}<mark style="background:#ffe9a8;color:#111">{{ text }}</mark>{% else %}{{ text }}{% endif %}{% endfor %}{% endmacro %}"""
FOLDED = """<details><summary>all {{ cards | length }} questions</summary>
{% for label, card in cards %}<details><summary>{{ label }}</summary>{{ card }}</details>{% endfor %}</details>"""


def show_examples(comparison):
    """Three answers in full, chosen by rule (first fixed, first broken, first unchanged), and the showcase question."""
    titled = [(f"The first one {pair.change}", pair) for pair in comparison.examples]
    if comparison.showcase:
        trained = "a training row: a good answer to it shows memory, not learning"
        what = trained if comparison.showcase.training_row else "not a training row; one answer is no evidence either"
        titled.append((f"The showcase question, {what}; counted in no measure", comparison.showcase))
    if in_notebook():
        from IPython.display import HTML, display

        cards = [card(pair, title, notice="") for title, pair in titled]
        display(HTML("".join(cards) + f"<p><small>{NOTICE}</small></p>"))
        return
    for title, pair in titled:
        print(f"=== {title} ===\n{as_text(pair)}\n")
    print(NOTICE)


def browse(comparison):
    """Question, reference, before and after side by side: menus sort by what changed and pick the question.

    Words that only one of the two answers has are marked. The first card is plain output and the others stand folded
    below it, so that all can be read in a saved notebook too, where menus need a kernel.
    """
    from IPython.display import HTML, display

    pairs = comparison.pairs
    labels = [f"{i + 1}. ({pair.change}) {short_text(pair.question)}" for i, pair in enumerate(pairs)]
    if not pairs:
        return
    shown = None

    def show(i):
        if shown is not None:
            shown.update(HTML(card(pairs[i], labels[i])))

    menus = _menus(comparison, labels, show)
    if menus is not None:
        display(menus)
    shown = display(HTML(card(pairs[0], labels[0])), display_id=True)
    cards = [(label, _safe(card(pair, "", notice=""))) for label, pair in zip(labels, pairs, strict=True)]
    display(HTML(_render(FOLDED, cards=cards)))


def _menus(comparison, labels, show):
    """Two menus, sort and question; None without ipywidgets. `show` is called with the index of what was picked."""
    try:
        import ipywidgets
    except ImportError:
        return None

    class Menus(ipywidgets.VBox):
        def __repr__(self):  # what a saved notebook shows in their place
            return "(two menus stand here while a kernel runs; all questions stand below)"

    def picks(first):
        order = sorted(range(len(labels)), key=lambda i: (comparison.pairs[i].change != first, i))
        return [(labels[i], i) for i in order]

    kinds = [pair.change for pair in comparison.pairs]
    options = [("row order", None), *((f"{k} first ({kinds.count(k)})", k) for k in ("fixed", "broken", "unchanged"))]
    order = ipywidgets.Dropdown(options=options, description="sort")
    picker = ipywidgets.Dropdown(options=picks(None), description="question", layout={"width": "95%"})
    order.observe(lambda change: setattr(picker, "options", picks(change["new"])), names="value")
    picker.observe(lambda change: show(change["new"]) if change["new"] is not None else None, names="value")
    return Menus([order, picker])


def card(pair, title: str, notice: str = NOTICE) -> str:
    """One question with both answers side by side, as HTML (jinja2, everything that a model wrote escaped)."""
    sides = []
    for name, other, colour in (("before", "after", "#999"), ("after", "before", "#2a6f97")):
        answer, against = _answer(pair, name), _answer(pair, other)
        outcome = getattr(getattr(pair, name), "outcome", None)
        right = None if outcome is None else outcome.correct
        sides.append({
            "name": name.capitalize(), "colour": colour, "problems": ", ".join(answer.problems),
            "mark": {True: "right", False: "wrong", None: ""}[right], "ink": "#1a7f4b" if right else "#c0392b",
            "reasoning": _differing(answer.reasoning.strip() or "(no reasoning)", against.reasoning.strip()),
            "response": _differing(answer.response.strip() or "(no response)", against.response.strip()),
        })  # fmt: skip
    return _render(
        PIECES + CARD, title=title, question=pair.question, reference=pair.reference, sides=sides, notice=notice
    )


def as_text(pair) -> str:
    """One question with both answers, one below the other."""
    lines = [f"QUESTION   {pair.question}", f"REFERENCE  {pair.reference.strip()}"]
    for side in ("before", "after"):
        answer = _answer(pair, side)
        lines.append(
            f"{side.upper():<11}{textwrap.indent(answer.reasoning.strip() or '(no reasoning)', ' ' * 11).strip()}"
        )
        lines.append(f"   ->      {answer.response.strip() or '(no response)'}")
        lines += [f"           ({', '.join(answer.problems)})"] if answer.problems else []
    return "\n".join(lines)


def in_notebook() -> bool:
    """Whether a notebook shows what is displayed."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def _answer(pair, side):
    found = getattr(pair, side)
    return getattr(found, "answer", found)


def _differing(text: str, other: str) -> list[tuple[str, bool]]:
    """`text` in pieces, each with whether `other` lacks it in that place."""
    here, there = (re.findall(r"\s+|\S+", value) for value in (text, other))
    pieces = []
    for kind, start, stop, *_ in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        words = "".join(here[start:stop])
        if words:
            pieces.append((words, kind != "equal" and bool(words.strip())))
    return pieces


def _render(template: str, **values) -> str:
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(template).render(**values)


def _safe(text: str):
    from markupsafe import Markup

    return Markup(text)
