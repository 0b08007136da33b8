"""How one answer did: whether it chooses the right option, and whether its form is right."""

import re
from dataclasses import dataclass

from ..choices import accepted_answers, carries_choices, read_choices
from ..data import normalise
from .extraction import extract_choice


@dataclass(frozen=True)
class Outcome:
    """How one answer did."""

    well_formed: bool
    """Think closed, response present, stopped by itself."""
    correct: bool | None
    """The right option was chosen, or the row's `answer` stands in the response as whole words; None without either."""
    steps_correct: bool | None
    """Every line of the reasoning equals the reference's; None for rows without a family, whose wording is free."""
    closed: bool = True
    """`</think>` was written."""
    stopped: bool = True
    """The model ended the answer by itself, within the limit."""
    answered: bool = True
    """Something stands after `</think>`."""
    extracted: bool | None = None
    """An option could be told from the response; None where rows carry no choices."""
    length: int = 0
    """Tokens written."""
    repetition: float = 0.0
    """Share of the text's 4-word sequences that had occurred before in it (seq-rep-4, Welleck et al. 2020), 0 to 1."""


def grade(row, answer) -> Outcome:
    """Grades one answer against its row. A response that was never reached or chooses nothing is wrong, not missing.

    Only what stands after the last `</think>` is read. Rows with options in any form that `read_choices` reads are graded
    by the option chosen (`extract_choice`), rows with an `answer` alone by that text, or by any one of a list.
    """
    parsed = answer.parsed
    correct = extracted = steps = None
    if carries_choices(row):
        asked = read_choices({"question": "-", **row}, "the row of an answer")
        chosen = extract_choice(parsed.response, asked["choices"])
        correct, extracted = chosen == asked["answer_index"], chosen is not None
    elif accepted := accepted_answers(row, "the row of an answer"):
        correct = any(_stands_in(text, parsed.response) for text in accepted)
    if row.get("answer") and row.get("family"):
        steps = _lines(parsed.reasoning) == _lines(row["Complex_CoT"])
    return Outcome(
        well_formed=not parsed.problems, correct=correct, steps_correct=steps,
        closed="think never closed" not in parsed.problems, stopped="no EOS within the limit" not in parsed.problems,
        answered=bool(parsed.response.strip()), extracted=extracted, length=answer.new_tokens,
        repetition=_repetition(f"{parsed.reasoning} {parsed.response}"),
    )  # fmt: skip


def _stands_in(answer: str, response: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(normalise(answer))}(?!\w)", normalise(response)) is not None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _repetition(text: str, n: int = 4) -> float:
    words = text.split()
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
