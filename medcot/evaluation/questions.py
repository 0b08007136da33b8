"""Multiple-choice questions: where they come from, checked, each asked once."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..choices import read_choices, same_question
from ..rows import read_hub
from ..settings import EMBEDDED_CASES, HELD_OUT_SEED, MedcotError


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions and where they came from."""

    rows: tuple[dict, ...]
    """One a question: `question` (text), `choices` (list of texts), `answer_index` (0 is the first choice)."""
    source: str
    revision: str | None
    fingerprint: str
    """SHA-256 over questions, choices and answers, in order."""
    repeated: int = 0
    """Rows left out because their question, with the same options, stands in an earlier row."""

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        revision = f" at {self.revision}" if self.revision else ""
        repeated = f", {self.repeated} repeated ones left out" if self.repeated else ""
        return (
            f"{len(self)} multiple-choice questions from {self.source}{revision}{repeated}; "
            f"SHA-256 {self.fingerprint[:12]}"
        )


def load_choices(settings) -> Questions:
    """The first `choice_rows` different multiple-choice questions of `choice_dataset`, checked; one line says what was loaded.

    Read are the rows of the test split of a hub data set, or the lines of a jsonl file, in any form that `read_choices`
    knows. A question that stands in an earlier row with the same options, in whatever order, is left out and counted.
    Raises MedcotError naming file and line for a row that is no such question.
    """
    rows, revision = _rows(settings)
    kept, repeated = {}, 0
    for place, row in rows:
        if len(kept) == settings.choice_rows:
            break
        read = read_choices(row, f"{settings.choice_dataset}, {place}")
        if kept.setdefault(same_question(read), read) is not read:
            repeated += 1
    if not kept:
        raise MedcotError(f"{settings.choice_dataset} holds no question: name a file with at least one line")
    read = tuple(kept.values())
    digest = hashlib.sha256(json.dumps(read, ensure_ascii=False).encode()).hexdigest()
    questions = Questions(read, settings.choice_dataset, revision, digest, repeated)
    print(questions)
    return questions


def _rows(settings):
    """(place, row) of every row of the source, in order, and the commit of a hub data set."""
    path = Path(settings.choice_dataset)
    if settings.choice_dataset == EMBEDDED_CASES:
        from ..tiny.cases import held_out_cases

        cases = held_out_cases(settings.choice_rows, seed=HELD_OUT_SEED)
        return ((f"case {i}", row) for i, row in enumerate(cases)), None
    if path.suffix == ".jsonl" or path.exists():
        return _read_lines(path), None
    table, revision = read_hub(settings, "choice_dataset", None, "test")
    return ((f"row {i} of its test split", row) for i, row in enumerate(table)), revision


def _read_lines(path: Path):
    if not path.is_file():
        raise MedcotError(f"{path.absolute()} not found: name a jsonl file of multiple-choice questions, or a hub name")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise MedcotError(f"{path}, line {number}: not a JSON object ({error}): mend or remove it") from error
