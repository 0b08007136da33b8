"""What both models did with the same question: answers in words and options chosen by likelihood, checked and graded."""

from dataclasses import dataclass

from ..choices import carries_choices, read_choices
from ..data import normalise
from ..prompts import Completion, list_options
from ..settings import MedcotError
from .grading import Outcome, grade

ROW, QUESTION = "evaluation row", "multiple-choice question"


@dataclass(frozen=True)
class Side:
    """One answer, taken apart, and how it did."""

    answer: Completion
    outcome: Outcome


@dataclass(frozen=True)
class Pair:
    """One question answered in words by both."""

    asked_as: str
    """ "evaluation row" or "multiple-choice question"."""
    row: int
    """Its index there."""
    question: str
    """As it was asked, options and all."""
    reference: str
    expected: str
    """The right option or answer; the reference where neither is given."""
    family: str | None
    before: Side
    after: Side
    change: str
    """ "fixed", "broken" or "unchanged": by the answer, or by the form where there is no answer to grade."""


@dataclass(frozen=True)
class Choice:
    """One question answered by likelihood: the option that each side finds most likely."""

    row: int
    question: str
    choices: list[str]
    answer_index: int
    before: int
    after: int


@dataclass(frozen=True)
class Showcase:
    """The question that projects of this kind show, answered by both; counted in no measure."""

    question: str
    reference: str
    training_row: bool
    before: Completion
    after: Completion


@dataclass(frozen=True)
class LeftOut:
    """What was not compared, counted."""

    leaked: int = 0
    """Questions that stand in the training rows."""
    repeated: int = 0
    """Questions that stood in an earlier row with the same options."""
    too_long: int = 0
    """Rows and questions whose prompt is longer than `max_seq_length`, asked of neither side."""


@dataclass(frozen=True)
class Asked:
    """Rows and questions, and the indices of those that count: none that leaked, none twice."""

    rows: object
    questions: tuple
    counted_rows: frozenset
    counted_questions: frozenset
    left_out: LeftOut

    @classmethod
    def of(cls, rows, questions, leaks):
        repeated, counted, by_choice = 0, [], () if questions is None else questions.rows
        for several, kind in ((rows, ROW), (by_choice, QUESTION)):
            seen, kept = set(), []
            for i, row in enumerate(several):
                question, choices = _question_and_choices(row, f"{kind} {i}")
                key = (normalise(question), *sorted(map(normalise, choices)))
                repeated += key in seen
                if key not in seen and not (leaks and leaks.holds(question, choices)):
                    kept.append(i)
                seen.add(key)
            counted.append(frozenset(kept))
        leaked = 0 if leaks is None else len(leaks.found)
        return cls(rows, by_choice, *counted, LeftOut(leaked=leaked, repeated=repeated))


def _question_and_choices(row, place: str) -> tuple[str, list[str]]:
    question = row["Question"] if "Question" in row else row["question"]
    return question, read_choices(row, place)["choices"] if carries_choices(row) else []


def pair_answers(before, after, asked: Asked, kind: str) -> list[Pair]:
    """Every question of two sets of answers, with both answers, both outcomes and what changed."""
    if [answer.row for answer in before] != [answer.row for answer in after]:
        raise MedcotError(
            f"{before.path} has {len(before)} answers and {after.path} {len(after)}, not to the same rows: "
            "answer the same rows"
        )
    rows, counted = asked.rows, asked.counted_rows
    if kind == QUESTION:
        rows, counted = asked.questions, asked.counted_questions
    pairs = []
    for old, new in zip(before, after, strict=True):
        if old.row >= len(rows):
            raise MedcotError(
                f"answer {old.row} in {before.path}: there is no such row among {len(rows)}: answer these rows"
            )
        row = _as_row(rows[old.row], old.row, kind)
        for answer, path in ((old, before.path), (new, after.path)):
            if answer.question != row["Question"]:
                raise MedcotError(
                    f"answer {old.row} in {path} is to another question than {kind} {old.row} "
                    f"({answer.question[:60]!r}, not {row['Question'][:60]!r}): answer the same rows"
                )
        if old.row in counted:
            sides = [Side(answer.parsed, grade(row, answer)) for answer in (old, new)]
            expected = (
                row["choices"][row["answer_index"]] if row.get("choices") else row.get("answer") or row["Response"]
            )
            pairs.append(
                Pair(kind, old.row, row["Question"], row["Response"], str(expected), row.get("family"), *sides, _change(*sides))
            )  # fmt: skip
    return pairs


def _as_row(row, i: int, kind: str) -> dict:
    """A row as it was asked: with `choices` and `answer_index` where it carries options; checked."""
    if kind == QUESTION:
        asked = {
            "Question": list_options(row["question"], row["choices"]),
            "Response": row["choices"][row["answer_index"]],
        }
        return asked | {name: row[name] for name in ("choices", "answer_index")}
    if not (row.get("Response") or "").strip():
        raise MedcotError(
            f"row {i} ({row['Question'][:60]!r}) has no reference (Response): answers cannot be compared with it"
        )
    if carries_choices(row):
        found = read_choices(dict(row), f"evaluation row {i}")
        return row | {name: found[name] for name in ("choices", "answer_index")}
    return row


def _change(before: Side, after: Side) -> str:
    old, new = (o.well_formed if o.correct is None else o.correct for o in (before.outcome, after.outcome))
    return "unchanged" if old == new else "fixed" if new else "broken"


def pair_choices(before, after, asked: Asked, per_byte: bool = False) -> list[Choice]:
    """The option of the highest log-likelihood before and after; `per_byte` divides it by the option's UTF-8 bytes."""
    found = []
    for i in sorted(asked.counted_questions & before.items.keys() & after.items.keys()):
        row = asked.questions[i]
        lengths = [len(choice.encode()) if per_byte else 1 for choice in row["choices"]]
        scores = [side.items[i].log_likelihood for side in (before, after)]
        if any(len(score) != len(lengths) for score in scores):
            raise MedcotError(f"{before.path} and {after.path} do not hold the options of question {i}: score it again")
        best = [max(range(len(lengths)), key=lambda k, s=score: s[k] / lengths[k]) for score in scores]
        found.append(Choice(i, row["question"], row["choices"], row["answer_index"], *best))
    return found


def pair_showcase(before, after) -> Showcase | None:
    """The showcase question with both answers; None where one of the sides was not asked it."""
    if not before.showcase or not after.showcase:
        return None
    old, new = before.showcase[0], after.showcase[0]
    return Showcase(old.question, old.reference, before.showcase_trained, old.parsed, new.parsed)
