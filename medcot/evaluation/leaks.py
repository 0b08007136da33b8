"""Which evaluation questions stand in the training rows: word for word, nearly, or rewritten."""

import re
import textwrap
from dataclasses import dataclass

from ..choices import CHOICES
from ..data import normalise

REWRITTEN = 0.35  # cosine of tf-idf word vectors from which a training question may be the same one rewritten
STANDS_OUT = 0.65  # at most this much as similar is the third nearest training question: else they share a template
NEAR = 90  # rapidfuzz ratio, 0 to 100, from which the shorter of two questions stands nearly whole in the other
INFORMATIVE = 4  # words of a question that tell it from others; with fewer, its options have to agree too
SAME = 95  # rapidfuzz ratio from which two training questions are copies of each other
_NEAREST = 10  # training questions looked at for each evaluation question
_BLOCK = 256  # evaluation questions compared at a time: 256 x 20,000 similarities are 20 MB
_WORD = r"(?u)\b\w+(?:[.,/]\d+)*\b"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Said in every second exam question: "Which of the following is the most likely diagnosis in this patient?"
_EXAM = frozenset(
    re.findall(
        r"\w+",
        "following true false statement statements correct incorrect likely patient patients diagnosis best next step except "
        "regarding appropriate treatment choice choices option options answer management cause finding findings year years "
        "old man woman male female presents brought history",
    )
)


@dataclass(frozen=True)
class Leak:
    """An evaluation question and the training question that it is, or was written from."""

    question: str
    choices: tuple[str, ...]
    """Its options; empty where it has none."""
    training: str
    similarity: float
    """1 for the same text; else the cosine of the two as tf-idf word vectors (stem and options), 0 to 1."""
    exact: bool
    """Equal after normalisation."""


@dataclass(frozen=True, repr=False)
class Leaks:
    """Evaluation questions that stand in the training rows, as they are or rewritten; `compare` leaves them out."""

    checked: int
    found: tuple[Leak, ...]

    @property
    def exact(self) -> tuple[str, ...]:
        """Those equal to a training question after normalisation."""
        return tuple(leak.question for leak in self.found if leak.exact)

    @property
    def near(self) -> tuple[Leak, ...]:
        """Those that are one changed, listed or rewritten."""
        return tuple(leak for leak in self.found if not leak.exact)

    @property
    def questions(self) -> set[str]:
        """The evaluation questions that leaked, normalised."""
        return {normalise(leak.question) for leak in self.found}

    def holds(self, question: str, choices=()) -> bool:
        """Whether this question leaked; with the same words but other options it is another question."""
        return _key(question, choices) in {_key(leak.question, leak.choices) for leak in self.found}

    def __repr__(self):
        lines = [
            f"{self.checked} evaluation questions against the training rows: {len(self.exact)} stand there exactly and "
            f"{len(self.near)} changed or rewritten (tf-idf similarity of {REWRITTEN} or more)"
            + ("; they are left out of the comparison" if self.found else "")
        ]
        lines += [f"  exact: {textwrap.shorten(question, 150)}" for question in self.exact]
        for leak in self.near:
            lines += [f"  {leak.similarity:.2f}: {textwrap.shorten(leak.question, 150)}"]
            lines += [f"      in training: {textwrap.shorten(leak.training, 150)}"]
        return "\n".join(lines)


def check_leaks(splits, questions=None) -> Leaks:
    """Looks for every evaluation and multiple-choice question (`Questions`) among the training questions.

    Compared are stems with their options as tf-idf word vectors (scikit-learn). A training question counts as the same one
    if the shorter stands nearly whole in the longer, with the same numbers, or if it is rewritten: a cosine of at least
    0.35 that stands out from the other training questions, with the numbers of one in the other. Words alone do not tell
    templates apart, and a stem that only asks "Which of the following is true?" is compared by its options too.

    Tried on 98 questions of medical-o1-reasoning-SFT and the exam questions that they were written from:
    `tests/test_leaks.py` says how many are found.
    """
    training = list({_key(row["Question"], _options(row)): row for row in _rows(splits.train)}.values())
    asked = [(row["Question"], _options(row)) for row in _rows(splits.eval)]
    asked += [(row["question"], tuple(row["choices"])) for row in (questions.rows if questions else ())]
    asked = list({_key(*each): each for each in asked}.values())
    if not training or not asked:
        return Leaks(len(asked), ())
    same = {}
    for row in training:
        same.setdefault(normalise(row["Question"]), []).append(row)
    nearest = _nearest([_text(row["Question"], _options(row)) for row in training], [_text(*each) for each in asked])
    found = []
    for (question, choices), near in zip(asked, nearest, strict=True):
        third = _third([(training[i]["Question"], cosine) for i, cosine in near])
        rows = [(row, 1.0) for row in same.get(normalise(question), ())] + [(training[i], cosine) for i, cosine in near]
        leaks = (_leak(question, choices, row, similarity, third) for row, similarity in rows)
        found += filter(None, [next(filter(None, leaks), None)])
    return Leaks(len(asked), tuple(found))


def _rows(split) -> list[dict]:
    """Rows of a `datasets.Dataset` or a list, with the columns that are read here."""
    if isinstance(split, list):
        return split
    names = [name for name in ("Question", "Response", *CHOICES) if name in getattr(split, "column_names", split)]
    return [dict(zip(names, row, strict=True)) for row in zip(*(split[name] for name in names), strict=True)]


def _options(row) -> tuple[str, ...]:
    """The texts of a row's options, in any of the forms that `read_choices` knows."""
    options = next((row[name] for name in CHOICES if row.get(name)), ())
    return tuple(text for text in (options.values() if isinstance(options, dict) else options) if text)


def _text(question: str, choices) -> str:
    return "\n".join([question, *choices])


def _key(question: str, choices) -> str:
    return "\n".join([normalise(question), *sorted(map(normalise, choices))])


def _leak(question, choices, row, similarity, third) -> Leak | None:
    """The leak if the training row, so similar, the third nearest `third`, holds the question."""
    training, options = row["Question"], _options(row)
    text, other = _text(question, choices), _text(training, options)
    same = normalise(question) == normalise(training)
    if len(_informative(question)) < INFORMATIVE and not _options_agree(choices, row):
        return None
    if same:
        return Leak(question, choices, training, 1.0, exact=True)
    shorter, longer = sorted((normalise(question), normalise(training)), key=len)
    words = min(len(_informative(text)), len(_informative(other)))
    if words < (2 if longer.startswith(shorter) else INFORMATIVE) or not _numbers_agree(text, other):
        return None
    rewritten = similarity >= REWRITTEN and third <= STANDS_OUT * similarity
    return Leak(question, choices, training, similarity, exact=False) if rewritten or _stands_in(text, other) else None


def _third(near) -> float:
    """Similarity of the third nearest training question, copies of the nearest not counted."""
    from rapidfuzz import fuzz

    if not near or near[0][1] < REWRITTEN:
        return 0.0
    others = [cosine for question, cosine in near[1:] if fuzz.ratio(near[0][0], question) < SAME]
    return others[1] if len(others) > 1 else 0.0


def _informative(text: str) -> set[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return set(re.findall(_WORD, text.casefold())) - ENGLISH_STOP_WORDS - _EXAM


def _options_agree(choices, row) -> bool:
    """Whether an option of several words, or most words of all, stand in the training row; without any, whether the stem
    has a word of its own."""
    told = _informative("\n".join([row.get("Response") or "", *_options(row)]))
    if not choices or not told:
        return bool(_informative(row["Question"])) or not choices
    told |= _informative(row["Question"])
    each = [_informative(choice) for choice in choices]
    return any(len(words) > 1 and words <= told for words in each) or len(set().union(*each) & told) > 0.5 * len(
        set().union(*each)
    )


def _numbers_agree(one: str, other: str) -> bool:
    """Whether at least four in five of the numbers of the text with fewer of them stand in the other."""
    fewer, more = sorted((set(_NUMBER.findall(one)), set(_NUMBER.findall(other))), key=len)
    return len(fewer & more) >= 0.8 * len(fewer)


def _stands_in(one: str, other: str) -> bool:
    from rapidfuzz import fuzz

    shorter, longer = sorted((normalise(one), normalise(other)), key=len)
    return set(_NUMBER.findall(shorter)) <= set(_NUMBER.findall(longer)) and fuzz.partial_ratio(shorter, longer) >= NEAR


def _nearest(training, asked):
    """For each asked text the ten nearest training texts as (index, cosine of tf-idf word vectors), nearest first."""
    import numpy
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    words = TfidfVectorizer(
        token_pattern=_WORD, stop_words=sorted(ENGLISH_STOP_WORDS | _EXAM), sublinear_tf=True, dtype=numpy.float32
    )
    try:
        vectors = words.fit_transform([*training, *asked])
    except ValueError:  # nothing but stop words
        return [[] for _ in asked]
    columns, rows, nearest = vectors[: len(training)].T.tocsr(), vectors[len(training) :], []
    for start in range(0, len(asked), _BLOCK):
        for similarity in (rows[start : start + _BLOCK] @ columns).toarray():
            best = numpy.argpartition(-similarity, min(_NEAREST, len(training)) - 1)[:_NEAREST]
            nearest.append(sorted(((int(i), float(similarity[i])) for i in best), key=lambda near: -near[1]))
    return nearest
