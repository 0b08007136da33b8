"""A row's question, options and right answer, in whichever of the known forms they are written."""

from .settings import MedcotError

QUESTION = ("question", "Question")
CHOICES = ("choices", "options")
ANSWER = ("answer_index", "answer_idx", "answer")


def carries_choices(row) -> bool:
    """Whether a row carries options to choose from, so that its answers are graded by the option chosen."""
    return any(row.get(name) for name in CHOICES)


def read_choices(row, place: str) -> dict:
    """A multiple-choice row of any known form as `question`, `choices` (list of texts) and `answer_index` (from 0).

    Read are `question` or `Question`; `choices` or `options`: a list, or a letter for each text; and of `answer_index`,
    `answer_idx` and `answer` the first that is there: an index from 0, a letter, or the right option's text. Raises
    MedcotError, in which `place` names the row, for one that lacks a column, has fewer than two choices, an empty or a
    repeated one, or an answer that is not among them.
    """
    if not isinstance(row, dict):
        raise MedcotError(f"{place}: holds {type(row).__name__}, not an object with question, choices and answer")
    question = next((row[name] for name in QUESTION if row.get(name)), None)
    choices = next((row[name] for name in CHOICES if row.get(name)), None)
    answer = next((row[name] for name in ANSWER if row.get(name) is not None), None)
    lacking = [name for name, v in {"question": question, "choices": choices, "answer": answer}.items() if v is None]
    if lacking:
        raise MedcotError(f"{place}: has no {', '.join(lacking)}; it has {', '.join(row)}: name its columns so")
    letters, texts = _texts(choices, place)
    index = _index(answer, letters, texts)
    if not 0 <= index < len(texts):
        raise MedcotError(
            f"{place}: answer {answer!r} is out of range for its {len(texts)} choices: "
            "give an index from 0, a letter, or the text of one of them"
        )
    return {"question": question, "choices": texts, "answer_index": index}


def _texts(choices, place: str) -> tuple[list[str], list[str]]:
    """Letters and texts of a row's options."""
    if isinstance(choices, dict):  # a table has a column for every letter any row uses, empty where this one does not
        choices = {letter: text for letter, text in choices.items() if text is not None}
        letters = sorted(choices)
        texts = [choices[letter] for letter in letters]
    elif isinstance(choices, (list, tuple)):
        letters, texts = [chr(ord("A") + i) for i in range(len(choices))], list(choices)
    else:
        raise MedcotError(f"{place}: choices {choices!r}: give a list of texts, or a letter for each text")
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise MedcotError(f"{place}: choices {texts!r}: at least two texts are needed, none of them empty")
    return letters, texts


def _index(answer, letters, texts) -> int:
    """Place of the answer, -1 where it is none of them."""
    if isinstance(answer, str):
        for known, wanted in ((letters, answer), (texts, answer), (letters, answer.strip().upper())):
            if wanted in known:
                return known.index(wanted)
        return -1
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else -1


def accepted_answers(row, place: str) -> tuple[str, ...]:
    """The texts of which one has to stand in a response to a row without options; empty where nothing is to be graded.

    `answer` may be a text, a number, or a list of them, each a right answer. Raises MedcotError for anything else.
    """
    answer = row.get("answer")
    texts = answer if isinstance(answer, (list, tuple)) else [] if answer is None else [answer]
    if not all(isinstance(text, (str, int, float)) and not isinstance(text, bool) for text in texts):
        raise MedcotError(f"{place}: answer {answer!r}: give a text, a number, or a list of them")
    return tuple(str(text) for text in texts if str(text).strip())


def same_question(row) -> str:
    """What two rows share that ask the same: the normalised question and its options, in whatever order."""
    from .data import normalise

    return "\n".join([normalise(row["question"]), *sorted(map(normalise, row["choices"]))])
