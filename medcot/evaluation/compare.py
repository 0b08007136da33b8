"""Before and after on the same questions: paired, measured and judged. No model in here."""

from collections import Counter
from dataclasses import dataclass, field, replace

from ..settings import MedcotError
from . import words
from .leaks import Leaks
from .measure import MULTIPLE_CHOICE, RIGHT_ANSWER, Results
from .pairs import QUESTION, ROW, Asked, Choice, LeftOut, Pair, Showcase, pair_answers, pair_choices, pair_showcase
from .questions import Questions
from .statistics import DETAIL, FAMILY, PROMPT, SECONDARY, Measure, judge, paired_means, paired_proportions


@dataclass(frozen=True, repr=False)
class Comparison:
    """Before and after on the same questions: one answer first (`headline`), the measures, and every pair to read.

    It shows itself in a notebook as a table and in a terminal as text. The fields are the schema of `comparison.json`.
    """

    primary: str
    """The measure that was declared before anything was measured."""
    measures: tuple[Measure, ...]
    """The primary one first."""
    pairs: tuple[Pair, ...]
    choices: tuple[Choice, ...] = ()
    showcase: Showcase | None = None
    leaks: Leaks | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    rows_source: str = ""
    questions_source: str | None = None
    sources: dict = field(default_factory=dict)
    """For each part the two files that its numbers came from."""

    @property
    def headline(self) -> str:
        """The answer in one sentence: the primary measure before and after."""
        return words.headline(self)

    @property
    def notes(self) -> list[str]:
        """What a reader has to know before believing it."""
        return words.notes(self)

    @property
    def table(self):
        """Every measure, one a row, as a `pandas.DataFrame`; shares in per cent."""
        return words.table(self.measures)

    @property
    def forgotten(self):
        """What was right before and is wrong now, as a `pandas.DataFrame`: how asked, question, expected, before, after."""
        return words.forgotten(self)

    @property
    def examples(self) -> tuple[Pair, ...]:
        """Three answers to read in full, by a fixed rule: the first that was fixed, broken and unchanged."""
        first = (
            next((pair for pair in self.pairs if pair.change == kind), None)
            for kind in ("fixed", "broken", "unchanged")
        )
        return tuple(pair for pair in first if pair is not None)

    def show(self):
        """Shows the three `examples` and the showcase question in full, both answers side by side."""
        from .browse import show_examples

        show_examples(self)

    def __repr__(self):
        return words.as_text(self)

    def _repr_pretty_(self, printer, cycle):
        printer.text(str(self))

    def _repr_html_(self):
        return words.as_html(self)


def compare(before, after, rows, questions: Questions | None = None, leaks: Leaks | None = None) -> Comparison:
    """Pairs what two models did on the same rows, measures the difference and judges it.

    `before` and `after` are `Results` (`evaluate`) or answers alone (`generate_answers`), `rows` the evaluation rows,
    `questions` the multiple-choice questions that were asked; what `leaks` names is left out, what repeats is counted
    once. The primary measure is the one that `evaluate` declared. Raises MedcotError if the sides declared different ones,
    if an answer is to another question than its row, a row has no reference, or the two are not of the same questions.
    """
    before, after = (side if isinstance(side, Results) else Results(side) for side in (before, after))
    if before.primary_measure != after.primary_measure:
        raise MedcotError(
            f"before was measured for {before.primary_measure!r} and after for {after.primary_measure!r}: "
            "measure both with the same primary_measure"
        )
    asked = Asked.of(rows, questions, leaks)
    exams = [pair_answers(*sides, asked, kind) for kind, *sides in _exams(before, after)]
    choices = []
    if _both(before, after, "choices"):
        _check_choices(before.choices, asked)
        choices = pair_choices(before.choices, after.choices, asked)
    measures = _likelihoods(before, after, asked, choices) + _in_words(exams)
    if not measures:
        raise MedcotError("every evaluation question stands in the training rows: choose other evaluation rows")
    return Comparison(
        primary=before.primary_measure,
        measures=judge(measures + _prompt_alone(before, asked), before.primary_measure),
        pairs=tuple(pair for pairs in exams for pair in pairs),
        choices=tuple(choices),
        showcase=pair_showcase(before, after),
        leaks=leaks,
        left_out=replace(asked.left_out, too_long=before.too_long),
        rows_source=before.rows_source,
        questions_source=questions and questions.source,
        sources={name: [str(part.path), str(after.parts[name].path)] for name, part in before.parts.items() if name in after.parts},
    )  # fmt: skip


def _both(before, after, name) -> bool:
    """Whether both sides have a part; raises MedcotError where only one has it or they are of different rows."""
    old, new = getattr(before, name), getattr(after, name)
    if (old is None) != (new is None):
        raise MedcotError(f"{name} were measured on one side only: measure both with evaluate")
    if old is None:
        return False
    if old.items.keys() != new.items.keys():
        odd = min(old.items.keys() ^ new.items.keys())
        raise MedcotError(f"row {odd} was scored in only one of {old.path} and {new.path}: score the same rows")
    return True


def _check_choices(scores, asked: Asked):
    there = scores.items.keys() | set(scores.left_out)
    if odd := there ^ set(range(len(asked.questions))):
        raise MedcotError(f"{scores.path} does not hold the options of question {min(odd)}: score these questions")


# --- answers in words --------------------------------------------------------------------------------------------------


def _exams(before, after):
    """The two sides of what was asked in words, and what it was asked of."""
    yield ROW, before.answers, after.answers
    if before.choice_answers is not None and after.choice_answers is not None:
        yield QUESTION, before.choice_answers, after.choice_answers


def _in_words(exams) -> list[Measure]:
    """Everything measured on generated answers: right, in which form, by which steps, and right by family.

    Right answers are those of the evaluation rows; of multiple-choice questions asked in words they are a measure of their
    own, or this one where no evaluation row can be graded. The form is that of all answers.
    """
    pairs = [pair for exam in exams for pair in exam]
    gradable = [found for exam in exams if (found := _known(exam, "correct"))]
    measures = []
    for graded, name in zip(gradable, (RIGHT_ANSWER, f"{RIGHT_ANSWER}, multiple choice"), strict=False):
        measures.append(_share(name, graded, "correct"))
    measures += [
        _share(name, known, attribute, group=group)
        for name, attribute, group in (
            ("option extracted", "extracted", SECONDARY), ("every step right", "steps_correct", SECONDARY),
            ("well formed", "well_formed", SECONDARY), ("think closed", "closed", DETAIL),
            ("stopped by itself", "stopped", DETAIL), ("answer present", "answered", DETAIL),
        )
        if (known := _known(pairs, attribute))
    ]  # fmt: skip
    if pairs:
        measures.append(paired_means("length", *_values(pairs, "length"), unit="tokens", better="neither"))
        repetition = _values(pairs, "repetition")
        measures.append(paired_means("repeated 4-word sequences", *repetition, better="lower"))
    graded = [pair for pair in _known(pairs, "correct") if pair.family]
    for family in Counter(pair.family for pair in graded):
        those = [pair for pair in graded if pair.family == family]
        measures.append(_share(f"{RIGHT_ANSWER}, {family}", those, "correct", group=FAMILY))
    return measures


def _known(pairs, attribute) -> list[Pair]:
    return [pair for pair in pairs if getattr(pair.before.outcome, attribute) is not None]


def _values(pairs, attribute) -> list[list]:
    return [[getattr(getattr(pair, side).outcome, attribute) for pair in pairs] for side in ("before", "after")]


def _share(name, pairs, attribute, **fields) -> Measure:
    return paired_proportions(name, *_values(pairs, attribute), **fields)


# --- likelihoods -------------------------------------------------------------------------------------------------------


def _likelihoods(before, after, asked: Asked, choices) -> list[Measure]:
    measures = []
    if _both(before, after, "references") and (rows := sorted(asked.counted_rows & before.references.items.keys())):
        measures.append(_nats("reference, nats per token", before.references, after.references, rows))
    if choices:
        measures.append(_share_chosen(MULTIPLE_CHOICE, choices))
        per_byte = pair_choices(before.choices, after.choices, asked, per_byte=True)
        measures.append(_share_chosen(f"{MULTIPLE_CHOICE}, per byte", per_byte, group=DETAIL))
    return measures


def _nats(name, before, after, rows, **fields) -> Measure:
    """Nats per token of the references: the rows' sums over the tokens of all rows, so long rows weigh more."""
    tokens = [before.items[i].tokens[0] for i in rows]
    sides = [[-side.items[i].log_likelihood[0] / side.items[i].tokens[0] for i in rows] for side in (before, after)]
    return paired_means(name, *sides, tokens, unit="nats", better="lower", **fields)


def _share_chosen(name, choices, **fields) -> Measure:
    sides = [[getattr(c, side) == c.answer_index for c in choices] for side in ("before", "after")]
    return paired_proportions(name, *sides, **fields)


def _prompt_alone(base, asked: Asked) -> list[Measure]:
    """What this project's prompt does to the base by itself: through the base's own chat template against through ours.

    Getting used to a prompt is not learning medicine, so these say nothing about tuning and get no verdict.
    """
    measures, fields = [], {"group": PROMPT}
    if base.chat_choices is not None and base.choices is not None:
        chosen = pair_choices(base.chat_choices, base.choices, asked)
        measures += [_share_chosen(f"{MULTIPLE_CHOICE}, prompt alone", chosen, **fields)] if chosen else []
    if base.chat_answers is not None:
        exams = [(QUESTION, base.choice_answers)] if base.choice_answers else [(ROW, base.answers)]
        for kind, ours in exams:
            both = {answer.row for answer in base.chat_answers} & {answer.row for answer in ours}
            sides = [replace(a, items=tuple(x for x in a if x.row in both)) for a in (base.chat_answers, ours)]
            graded = _known(pair_answers(*sides, asked, kind), "correct")
            measures += [_share(f"{RIGHT_ANSWER}, prompt alone", graded, "correct", **fields)] if graded else []
    if base.chat_references is not None and base.references is not None:
        rows = sorted(asked.counted_rows & base.chat_references.items.keys() & base.references.items.keys())
        sides = base.chat_references, base.references
        measures += [_nats("reference, prompt alone", *sides, rows, **fields)] if rows else []
    return measures
