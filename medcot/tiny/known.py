"""What the embedded model can be asked: a question in the grammar of its cases. Standard library only."""

import functools
import random
import re

from .cases import DISTRACTORS, FAMILIES, WORDS

_NUMBER = r"\d+(?:\.\d+)?"


def missing(question: str) -> list[str] | None:
    """The findings that a question about one of the seven scores lacks; None for a question in other words.

    In the words of the cases are: an opening of the score's, a colon, findings and irrelevant findings in their wordings
    with commas or semicolons between them, a full stop, and then the score asked for, whole or one of its points.
    """
    for name, family in FAMILIES.items():
        asks = f"{_any(family.asks)}|How many {re.escape(name)} points for .+\\?"
        found = re.fullmatch(rf"(?:{_any(family.openings)}): (.+)\. (?:{asks})", " ".join(question.split()))
        if found:
            told = [_findings(phrase) for phrase in re.split(", |; ", found[1])]
            if None in told:
                return None
            return [finding for finding in _needed(name) if not any(finding in names for names in told)]
    return None


@functools.cache
def _needed(family: str) -> tuple[str, ...]:
    return tuple(FAMILIES[family].draw(random.Random(0)))


@functools.cache
def _findings(phrase: str) -> frozenset[str] | None:
    """The findings that a phrase may tell; none for an irrelevant one, None for a phrase in other words."""
    found = frozenset(name for name, words in WORDS.items() if _told(phrase, _wordings(words)))
    return found or (frozenset() if _told(phrase, [words for words, _, _ in DISTRACTORS]) else None)


def _wordings(words) -> list[str]:
    return [wording for group in words.values() for wording in group] if isinstance(words, dict) else list(words)


def _told(phrase: str, wordings) -> bool:
    return any(re.fullmatch(re.escape(wording).replace(r"\{\}", _NUMBER), phrase) for wording in wordings)


def _any(words) -> str:
    return "|".join(map(re.escape, words))
