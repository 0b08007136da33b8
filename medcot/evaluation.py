"""Grading and paired statistics; no model in here."""

import re
from dataclasses import dataclass

from .data import normalise
from .settings import MedcotError

LEVEL = 0.95


@dataclass(frozen=True)
class Outcome:
    """How one answer did."""

    well_formed: bool
    """Think closed, response present, stopped by itself."""
    correct: bool | None
    """The row's `answer` stands in the response as whole words; None where rows carry no `answer`."""
    steps_correct: bool | None
    """Every line of the reasoning equals the reference's; None where rows carry no `answer`."""


def grade(row, answer) -> Outcome:
    """Grades one answer against its row. A response that was never reached counts as wrong, not as missing."""
    parsed = answer.parsed
    if not row.get("answer"):
        return Outcome(not parsed.problems, None, None)
    words = re.escape(normalise(row["answer"]))
    correct = re.search(rf"(?<!\w){words}(?!\w)", normalise(parsed.response)) is not None
    return Outcome(not parsed.problems, correct, _lines(parsed.reasoning) == _lines(row["Complex_CoT"]))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Measure:
    """One measure before and after, paired over the same questions."""

    name: str
    n: int
    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of the difference after - before."""
    high: float
    """Its upper end."""
    p_value: float
    test: str

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no detectable difference", at the 5 % level of the paired test."""
        if self.p_value >= 1 - LEVEL:
            return "no detectable difference"
        return "better" if self.difference > 0 else "worse"


def paired_proportions(name: str, before, after) -> Measure:
    """Two equally long sequences of True/False, one per question, compared by the exact McNemar test.

    The interval of the difference is Student's t over the paired differences (statsmodels `DescrStatsW`).
    """
    import numpy
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.weightstats import DescrStatsW

    before, after = numpy.asarray(before, dtype=bool), numpy.asarray(after, dtype=bool)
    table = [[(before & after).sum(), (before & ~after).sum()], [(~before & after).sum(), (~before & ~after).sum()]]
    p_value = mcnemar(table, exact=True).pvalue if table[0][1] + table[1][0] else 1.0
    difference = after.astype(float) - before
    low, high = DescrStatsW(difference).tconfint_mean(1 - LEVEL) if len(before) > 1 else (-1.0, 1.0)
    return Measure(name, len(before), before.mean(), after.mean(), low, high, float(p_value), "exact McNemar")


@dataclass(frozen=True)
class Comparison:
    """Before and after on the same questions: the measures, and every row to read."""

    measures: tuple[Measure, ...]
    rows: tuple[dict, ...]
    """One a question: question, reference, before and after (parsed), outcome before and after."""

    def __str__(self):
        lines = [f"{'measure':<34}{'n':>5}{'before':>9}{'after':>9}{'difference, 95 % interval':>30}   verdict"]
        for m in self.measures:
            interval = f"{100 * m.difference:+.1f} [{100 * m.low:+.1f}, {100 * m.high:+.1f}]"
            lines.append(
                f"{m.name:<34}{m.n:>5}{100 * m.before:>8.1f}%{100 * m.after:>8.1f}%{interval:>30}   {m.verdict} "
                f"({m.test}, p = {m.p_value:.2g})"
            )
        return "\n".join(lines)


def compare(before, after, rows) -> Comparison:
    """Pairs two `Answers` to the same rows, grades both and measures the difference.

    Raises MedcotError if the answers are not to these questions or are of different length.
    """
    if len(before) != len(after) or len(before) > len(rows):
        raise MedcotError(
            f"{before.path} has {len(before)} answers and {after.path} {len(after)}: answer the same rows"
        )
    paired = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        row = rows[i]
        if not old.question == new.question == row["Question"]:
            raise MedcotError(f"answer {i} in {before.path} or {after.path} is to another question than row {i}")
        paired.append(
            {
                "question": row["Question"], "reasoning_reference": row["Complex_CoT"], "reference": row["Response"],
                "family": row.get("family"), "before": old.parsed, "after": new.parsed,
                "outcome_before": grade(row, old), "outcome_after": grade(row, new),
            }
        )  # fmt: skip

    def measure(name, field, chosen=paired):
        return paired_proportions(
            name,
            [getattr(row["outcome_before"], field) for row in chosen],
            [getattr(row["outcome_after"], field) for row in chosen],
        )

    measures = [measure("well formed", "well_formed")]
    if paired[0]["outcome_before"].correct is not None:
        measures += [measure("right answer", "correct"), measure("every step right", "steps_correct")]
        for family in dict.fromkeys(row["family"] for row in paired if row["family"]):
            chosen = [row for row in paired if row["family"] == family]
            measures.append(measure(f"right answer, {family}", "correct", chosen))
    return Comparison(tuple(measures), tuple(paired))
