"""Everything one model is measured by."""

import contextlib
import os
from dataclasses import dataclass, fields, replace

from ..choices import accepted_answers, carries_choices
from ..data import SHOWCASE_QUESTION, normalise
from ..identity import MEASURED, adapter_id
from ..prompts import list_options
from ..run.answers import Answers, answer_all, generate_answers
from ..run.kept import process
from ..run.processes import leave_group, on_all_gpus
from ..settings import EMBEDDED_CASES, MedcotError
from . import words
from .likelihood import Scores, score_choices, score_references

# What the data set's Response to the showcase question says, for runs whose rows do not hold it.
SHOWCASE_REFERENCE = "Normal post-void residual volume and no involuntary detrusor contractions (stress incontinence)."


RIGHT_ANSWER, MULTIPLE_CHOICE = "right answer", "multiple choice"


@dataclass(frozen=True, repr=False)
class Results:
    """All that one model, before or after, was measured to do; `compare` pairs two of them."""

    answers: Answers
    """Generated answers to the evaluation rows."""
    choice_answers: Answers | None = None
    """Generated answers to multiple-choice questions; None where none were asked in words."""
    showcase: Answers | None = None
    """The generated answer to the showcase question."""
    showcase_trained: bool = False
    """Whether the showcase question is a training row."""
    references: Scores | None = None
    """Log-likelihood of the reference reasoning and response of the evaluation rows."""
    choices: Scores | None = None
    """Log-likelihood of the options of the multiple-choice questions."""
    chat_answers: Answers | None = None
    """As `choice_answers` (as `answers` without them), through the base model's own chat template; None after tuning."""
    chat_references: Scores | None = None
    """As `references`, through the base model's own chat template; None after tuning."""
    chat_choices: Scores | None = None
    """As `choices`, the first `chat_rows` of them, through the base model's own chat template."""
    primary_measure: str = RIGHT_ANSWER
    """The measure that was declared before anything was measured."""
    rows_source: str = ""
    """Where the evaluation rows came from."""

    @property
    def parts(self) -> dict:
        """What was measured, by name: the answers and scores that are there."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in there.items() if isinstance(part, Answers | Scores)}

    @property
    def too_long(self) -> int:
        """How many rows and questions are longer than `max_seq_length` and were left out of what they are too long for."""
        rows = {i for name in ("answers", "references") if name in self.parts for i in self.parts[name].left_out}
        asked = {i for name in ("choice_answers", "choices") if name in self.parts for i in self.parts[name].left_out}
        return len(rows) + len(asked)

    def __repr__(self):
        lines = [f"{name.replace('_', ' ')}: {len(part)}, in {part.path.name}" for name, part in self.parts.items()]
        too_long = f"; {self.too_long} too long, left out" if self.too_long else ""
        return "\n".join(
            [f"{self.answers.name}, measured{too_long}, kept in {words.short(self.answers.path.parent)}", *lines]
        )

    def show(self, rows: int = 3):
        """Prints the first answers in full, each with its reference and whatever is wrong with its form."""
        print(self)
        self.answers.show(rows)


def evaluate(model, tokenizer, splits, questions, settings) -> Results:
    """Measures a model on the evaluation rows and on multiple-choice `questions` (`load_choices`); kept, resumable.

    Call it twice: on the base (inside `with model.disable_adapter():`) and on the fine-tuned model. Everything is asked
    in the same batches both times. The primary measure of the settings is declared first. The base model is also asked
    through its own chat template, because the project's prompt alone may handicap it.
    """
    import datasets

    declare(splits, questions, settings)
    rows, base = splits.eval, adapter_id(model) == "base"
    answers = generate_answers(model, tokenizer, rows, settings)
    asked = [
        {"Question": list_options(row["question"], row["choices"]), "Response": row["choices"][row["answer_index"]]}
        for row in questions.rows[: settings.choice_answer_rows]
    ]
    # The showcase question goes along in their batch, as the row after them: alone it would take as long as all of them.
    shown = showcase_row(splits)
    along = datasets.Dataset.from_list([*asked, {name: shown[name] for name in ("Question", "Response")}])
    generated = answer_all(model, tokenizer, along, settings, "choice answers")
    in_exam = tuple(answer for answer in generated if answer.row < len(asked))
    results = Results(
        answers=answers,
        choice_answers=replace(generated, items=in_exam) if asked else None,
        showcase=replace(generated, items=generated.items[len(in_exam) :], left_out=()),
        showcase_trained=shown["training_row"],
        references=score_references(model, tokenizer, rows, settings),
        choices=score_choices(model, tokenizer, questions.rows, settings),
        primary_measure=settings.primary_measure,
        rows_source=splits.source,
    )
    if not base or not settings.chat_rows:
        return results
    if not tokenizer.chat_template:
        print(f"{settings.model} has no chat template: nothing is measured through one")
        return results
    again = datasets.Dataset.from_list(asked) if asked else rows.select(range(min(settings.answer_rows, len(rows))))
    return replace(
        results,
        chat_answers=answer_all(model, tokenizer, again, settings, "answers own template", chat=True),
        chat_references=score_references(model, tokenizer, rows, settings, chat=True),
        chat_choices=score_choices(model, tokenizer, questions.rows[: settings.chat_rows], settings, chat=True),
    )


def declare(splits, questions, settings):
    """Prints the primary measure before anything is measured, and where its questions are too few.

    It is one of the parts of what is kept (`identity`): chosen after the results, it would prove nothing.
    """
    if process()[0] or any((settings.output_dir / MEASURED).glob("*.jsonl")):
        return  # the first process speaks for all, once
    n, which = primary_questions(splits, questions, settings)
    print(f"primary measure, declared before anything is measured: {settings.primary_measure}, over {n} {which}")
    if not n:
        print(
            "nothing that is answered in words can be graded: give the rows options, or set primary_measure='multiple choice'"
        )
    elif few := words.too_few(n):
        print(few)


def primary_questions(splits, questions, settings) -> tuple[int, str]:
    """How many questions the primary measure is taken over, and of which kind."""
    asked = questions.rows[: settings.choice_answer_rows]
    if settings.primary_measure == MULTIPLE_CHOICE:
        return len(questions), f"multiple-choice questions of {questions.source}, by likelihood"
    answered = list(splits.eval.select(range(min(settings.answer_rows, len(splits.eval)))))
    gradable = sum(carries_choices(row) or bool(accepted_answers(row, "an evaluation row")) for row in answered)
    if gradable or not asked:
        return gradable, f"evaluation rows of {splits.source}, answered in words"
    return len(asked), f"multiple-choice questions of {questions.source}, answered in words"


def run_evaluation(settings):
    """Measures the base, and the fine-tuned model where there is one, in one process or as one of torchrun's."""
    import torch

    from ..data import load_splits
    from ..model import load_model
    from .questions import load_choices

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Only finished entries travel between the processes, so the transport of CPUs serves on GPUs too.
        torch.distributed.init_process_group("gloo")
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        splits, questions = load_splits(settings), load_choices(settings)
        tuned = settings.adapter_dir.is_dir()
        model, tokenizer = load_model(settings, adapter=settings.adapter_dir if tuned else None)
        with model.disable_adapter() if tuned else contextlib.nullcontext():
            evaluate(model, tokenizer, splits, questions, settings)
        if tuned:
            evaluate(model, tokenizer, splits, questions, settings)
        leave_group()
    except MedcotError:
        if process()[1] > 1:  # all of them have stopped for the same reason
            torch.distributed.destroy_process_group()
        raise


def evaluate_on_all_gpus(settings):
    """`run_evaluation` by `nproc_per_node` processes, one a GPU, started by torchrun.

    They divide the batches among them and leave the files that one process leaves (on GPUs equal but for rounding), so
    that `evaluate` finds its work done. Raises MedcotError, with the last lines that were printed, if any of the processes fails.
    """
    on_all_gpus(settings, "evaluate")


def showcase_row(splits) -> dict:
    """The question every project of this kind shows: Question, Response and `training_row`, whether it was trained on.

    The embedded model does not know its words; there the third training row stands in for it, as it is the third
    training row of the original.
    """
    if splits.source == EMBEDDED_CASES:
        row = splits.train[min(2, len(splits.train) - 1)]
        return {"Question": row["Question"], "Response": row["Response"], "training_row": True}
    for split, trained in ((splits.train, True), (splits.eval, False)):
        for question, response in zip(split["Question"], split["Response"], strict=True):
            if normalise(question) == normalise(SHOWCASE_QUESTION):
                return {"Question": question, "Response": response, "training_row": trained}
    return {"Question": SHOWCASE_QUESTION, "Response": SHOWCASE_REFERENCE, "training_row": False}
