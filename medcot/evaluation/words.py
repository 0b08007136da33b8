"""A comparison in words: one sentence first, then a table, then what it takes to read it. Shown as text and as HTML."""

import textwrap
from pathlib import Path

from ..settings import EMBEDDED_CASES, NOTICE
from .statistics import (
    DETAIL,
    FAMILY,
    FEW,
    IMPLAUSIBLE,
    LEVEL,
    PRIMARY,
    PROMPT,
    SECONDARY,
    TOO_FEW,
    UNCHANGED,
    smallest_difference,
)  # fmt: skip

WIDTH = 100
PROMPT_ALONE = "the base through its own chat template (before) and through this project's prompt (after)"
COLOURS = {"better": "#1a7f4b", "worse": "#c0392b"}


# --- one answer first --------------------------------------------------------------------------------------------------


def headline(comparison) -> str:
    """The answer in one sentence: the primary measure before and after, its difference, what was fixed and broken, n."""
    m = next((m for m in comparison.measures if m.group == PRIMARY), None)
    if m is None:
        return f"No answer: {comparison.primary}, the primary measure, was not measured, as nothing that was asked can be graded"
    name = "Right answers" if m.name == "right answer" else "Right options by likelihood"
    if m.n < FEW:
        return f"{name} {_count(m, 'before')} -> {_count(m, 'after')} of {m.n}: too few to conclude anything"
    levels = f"{_percent(m.before)} % -> {_percent(m.after)} %"
    interval = f"95 % interval {_percent(m.low)} to {_percent(m.high)}"
    verdict = "" if m.verdict == "better" else f": {m.verdict}"
    change = f"{100 * m.difference:+.0f} points".replace("+0 ", "0 ").replace("-0 ", "0 ")
    return f"{name} {levels} ({change}, {interval}; {m.fixed} fixed, {m.broken} broken, n = {m.n}){verdict}"


def beside(comparison) -> list[str]:
    """At most two sentences: what else changed for the worse, and what could not be told apart."""
    others = [m for m in comparison.measures if m.group in (SECONDARY, FAMILY) and m.verdict]
    worse = [f"{m.name} ({size(m)})" for m in others if m.verdict == "worse"]
    same = [m.name for m in others if m.verdict == UNCHANGED]
    sentences = [f"Worse: {_some(worse)}." if worse else "Nothing else is detectably worse."] if others else []
    return sentences + ([f"Not told apart: {_some(same)}."] if same else [])


def notes(comparison) -> list[str]:
    """What a reader has to know before believing it: too few questions, questions of another kind than the rows, gaps."""
    primary = [m for m in comparison.measures if m.group == PRIMARY]
    found = [few for m in primary if (few := too_few(m.n))]
    if comparison.questions_source == EMBEDDED_CASES != comparison.rows_source and comparison.rows_source:
        found.append(
            f"The multiple-choice questions are the embedded cases, not rows of {comparison.rows_source}: what is measured on "
            "them says nothing about your rows (MEDCOT_CHOICES names other questions)."
        )
    asked_as = {pair.asked_as for pair in comparison.pairs}
    if len(asked_as) > 1:
        counts = " and ".join(
            f"{sum(p.asked_as == kind for p in comparison.pairs)} {kind}s" for kind in sorted(asked_as)
        )
        found.append(f"The form of answers (well formed, length, repetition) is that of {counts} together.")
    left = comparison.left_out
    gaps = {
        "stand in the training rows": left.leaked, "repeat an earlier one": left.repeated,
        "are longer than max_seq_length": left.too_long,
    }  # fmt: skip
    found += [f"{count} questions {why} and are left out on both sides." for why, count in gaps.items() if count]
    return found


def how_sure(comparison) -> str:
    """How many measures were judged, how, and how many false alarms to expect."""
    k = sum(m.group in (SECONDARY, FAMILY) and m.adjusted_p is not None for m in comparison.measures)
    return (
        f"The primary measure was declared beforehand and is wrong in at most 5 % of runs where nothing changed. The {k} others "
        f"are corrected for their number (Holm): any false alarm among all of them in at most 5 % of such runs, where "
        f"{k * (1 - LEVEL):.1f} a run would be expected uncorrected. Intervals are 95 %, each by itself."
    )


def too_few(n: int) -> str | None:
    """A warning where n questions can only show an implausible change; None where they can show a plausible one."""
    if n < FEW:
        return f"Too few questions: with n = {n} counts are shown and nothing is concluded."
    least = smallest_difference(n, 0.2)
    if least is not None and least <= IMPLAUSIBLE:
        return None
    seen = "no change at all" if least is None else f"only a change of {100 * least:.0f} points or more"
    return f"Few questions: n = {n} would show {seen} in 4 of 5 runs (if a fifth of the answers change)."


# --- one measure -------------------------------------------------------------------------------------------------------


def sentence(m) -> str:
    """A measure in one plain sentence: how much, how sure, by which test, and if nothing was seen what could have been."""
    if m.verdict == TOO_FEW and m.fixed is not None:
        return f"{m.name}: {_count(m, 'before')} before and {_count(m, 'after')} after of {m.n}, too few to tell."
    verdict = f"{m.verdict}, " if m.verdict else ""
    changed = f", {m.fixed} fixed, {m.broken} broken" if m.fixed is not None else ""
    p = m.p_value if m.adjusted_p is None else m.adjusted_p
    could = _could(m) if m.verdict == UNCHANGED else ""
    return (
        f"{m.name}: {verdict}{level(m, 'before')} before, {level(m, 'after')} after, {size(m)} ({interval(m)}); "
        f"{m.test} p {'= ' + format(p, '.2g') if p >= 0.001 else '< 0.001'}{changed}{could}."
    )


def size(m) -> str:
    """The difference with its unit."""
    return f"{_show(m, m.difference, '+')} {_unit(m)}"


def interval(m) -> str:
    """The ends of the difference's 95 % interval."""
    return f"{_show(m, m.low, '+')} to {_show(m, m.high, '+')}"


def level(m, side: str) -> str:
    """One side of a measure; of a share as a count where there are few, else in per cent."""
    if m.n < FEW and m.fixed is not None:
        return f"{_count(m, side)} of {m.n}"
    return f"{_show(m, getattr(m, side))}{' %' if m.unit == '%' else ''}"


def _count(m, side) -> int:
    return round(getattr(m, side) * m.n)


def _could(m) -> str:
    if m.detectable is None:
        return f"; n = {m.n} could not have shown any difference"
    if not m.spread and m.spread is not None:
        return "; no row differs"
    return f"; n = {m.n} would have shown {_show(m, m.detectable)} {_unit(m)} or more in 4 of 5 runs"


def _unit(m) -> str:
    return "points" if m.unit == "%" else m.unit


def _show(m, value, sign="") -> str:
    scale, digits = (100, 1) if m.unit == "%" else (1, 3) if m.unit == "nats" else (1, 1)
    return f"{scale * value:{sign}.{digits}f}"


def _percent(value) -> str:
    return f"{100 * value:.0f}".replace("-0", "0") if abs(value) < 0.005 else f"{100 * value:.0f}"


def _some(names, most: int = 3) -> str:
    """The first few of many names; between semicolons, as names have commas of their own."""
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return "; ".join(names[:most] + rest)


# --- tables and text ---------------------------------------------------------------------------------------------------


def table(measures):
    """Measures as a `pandas.DataFrame`, one a row, as they are read: the numbers themselves stand in `comparison.json`."""
    import pandas

    rows = [
        {
            "measure": m.name, "n": m.n, "before": level(m, "before"), "after": level(m, "after"),
            "difference": "" if m.n < FEW else f"{_show(m, m.difference, '+')}{'' if m.unit == '%' else ' ' + m.unit}",
            "95 % interval": "" if m.n < FEW else interval(m), "verdict": m.verdict or "-", "group": m.group,
        }
        for m in measures
    ]  # fmt: skip
    columns = ["measure", "n", "before", "after", "difference", "95 % interval", "verdict", "group"]
    return pandas.DataFrame(rows, columns=columns)


def forgotten(comparison):
    """What was right before and is wrong now, one a row: how it was asked, question, expected, before, after."""
    import pandas

    words = [
        (p.asked_as, p.question, p.expected, p.before.answer.response.strip(), p.after.answer.response.strip())
        for p in comparison.pairs if p.before.outcome.correct and not p.after.outcome.correct
    ]  # fmt: skip
    options = [
        ("by likelihood", c.question, c.choices[c.answer_index], c.choices[c.before], c.choices[c.after])
        for c in comparison.choices if c.before == c.answer_index != c.after
    ]  # fmt: skip
    return pandas.DataFrame(words + options, columns=["asked", "question", "expected", "before", "after"])


def families(comparison) -> str | None:
    """All families in one line; None where rows have none."""
    verdicts = [m.verdict for m in comparison.measures if m.group == FAMILY]
    counts = [f"{verdicts.count(v)} {v}" for v in ("better", "worse", UNCHANGED, TOO_FEW) if v in verdicts]
    return f"{len(verdicts)} families of cases: {', '.join(counts)}" if verdicts else None


def as_text(comparison) -> str:
    """The headline, at most two sentences, what to know, and the table."""
    lines = [f"{headline(comparison)}.", *beside(comparison), *notes(comparison)]
    return "\n".join(
        [*(part for line in lines for part in textwrap.wrap(line, WIDTH)), "", as_lines(comparison), NOTICE]
    )


def as_lines(comparison) -> str:
    """The table as text, about ten lines of it, and how sure it is."""
    lines = [f"{'measure':<30}{'n':>5}{'before':>9}{'after':>9}{'difference (95 % interval)':>28}  verdict"]
    for m in comparison.measures:
        if m.group in (PRIMARY, SECONDARY, PROMPT):
            change = "" if m.n < FEW else f"{_show(m, m.difference, '+')} ({interval(m)})"
            verdict = "not told apart" if m.verdict == UNCHANGED else m.verdict or "-"
            sides = f"{level(m, 'before'):>9}{level(m, 'after'):>9}"
            lines.append(f"{m.name:<30}{m.n:>5}{sides}{change:>28}  {verdict}")
    lines += [line for line in [families(comparison)] if line]
    if any(m.group == PROMPT for m in comparison.measures):
        lines += textwrap.wrap(f"prompt alone: {PROMPT_ALONE}; no verdict on tuning", WIDTH)
    lines += [f"all {len(comparison.measures)} measures: comparison.json", ""]
    return "\n".join([*lines, *textwrap.wrap(how_sure(comparison), WIDTH)])


def as_html(comparison) -> str:
    """As `as_text` for a notebook: the table styled by pandas, families, details and how to read them folded."""
    from html import escape

    shown = [m for m in comparison.measures if m.group in (PRIMARY, SECONDARY)]
    folded = {
        families(comparison): [m for m in comparison.measures if m.group == FAMILY],
        f"what the prompt alone does: {PROMPT_ALONE}":
            [m for m in comparison.measures if m.group == PROMPT],
        "parts of other measures": [m for m in comparison.measures if m.group == DETAIL],
    }  # fmt: skip
    pieces = [f"<p style='font-size:1.25em;font-weight:600;margin:0.3em 0'>{escape(headline(comparison))}.</p>"]
    pieces += [f"<p style='margin:0.2em 0'>{escape(line)}</p>" for line in beside(comparison)]
    pieces += [f"<p style='margin:0.2em 0;color:#9a6700'>{escape(line)}</p>" for line in notes(comparison)]
    pieces.append(_styled(shown))
    for title, measures in folded.items():
        if measures:
            pieces.append(f"<details><summary>{escape(title)}</summary>{_styled(measures)}</details>")
    sentences = "".join(f"<li>{escape(sentence(m))}</li>" for m in comparison.measures)
    pieces.append(
        f"<details><summary>how to read this, and every measure as a sentence</summary><p>{escape(how_sure(comparison))}</p>"
        f"<ul>{sentences}</ul></details><p><small>{NOTICE}</small></p>"
    )
    return "".join(pieces)


def _styled(measures) -> str:
    """The measures as an HTML table by pandas' Styler: verdicts coloured, the primary row bold."""
    rows = table(measures)
    left = {"text-align": "left", "white-space": "nowrap"}
    style = rows.style.hide(axis="index").hide("group", axis="columns")
    style = style.map(lambda verdict: f"color:{COLOURS.get(verdict, 'inherit')}", subset=["verdict"])
    style = style.apply(lambda row: ["font-weight:600" if row["group"] == PRIMARY else ""] * len(row), axis=1)
    style = style.set_properties(**{"text-align": "right", "white-space": "nowrap"})
    style = style.set_properties(subset=["measure", "verdict"], **left)
    heads = [{"selector": "th", "props": "text-align:right"}]
    heads += [{"selector": f"th.col{i}", "props": "text-align:left"} for i in (0, 6)]
    return style.set_table_styles(heads).format(escape="html").to_html()


def short(path) -> str:
    """A path as a reader needs it: from the working folder where it is below that, else its last two parts."""
    path = Path(path).absolute()
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(Path(*path.parts[-2:]))


def short_text(text: str, width: int = 90) -> str:
    """The beginning of a text, on one line."""
    return textwrap.shorten(text, width)
