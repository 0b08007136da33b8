"""Answers to the evaluation rows, kept batch by batch."""

from dataclasses import dataclass
from pathlib import Path

from ..inference import batches_that_fit, generator
from ..model import free_decoding_memory, report_memory
from ..prompts import encode_prompt, parse_completion
from ..settings import NOTICE
from .kept import kept


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    row: int
    """Index of the row it answers."""
    question: str
    reference: str
    """The row's Response."""
    completion: str
    """What the model wrote, special tokens included."""
    new_tokens: int
    eos_token: str

    @property
    def parsed(self):
        """The completion taken apart (`parse_completion`)."""
        return parse_completion(self.completion, self.eos_token)


@dataclass(frozen=True)
class Answers:
    """The answers of one model, in row order, and the file they stand in."""

    name: str
    """ "baseline" or "finetuned"."""
    path: Path
    items: tuple[Answer, ...]
    left_out: tuple[int, ...] = ()
    """Rows whose prompt alone is longer than `max_seq_length`: asked of no model."""

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __str__(self):
        stopped = sum(not answer.parsed.problems for answer in self)
        return f"{self.name}: {len(self)} answers, {stopped} well formed, in {self.path.name}"

    def show(self, rows: int = 3):
        """Prints the first answers in full, each with its reference and whatever is wrong with its form."""
        print(f"{self}\n{NOTICE}")
        for answer in self.items[:rows]:
            parsed = answer.parsed
            print(f"\nQUESTION   {answer.question}\nREASONING  {parsed.reasoning.strip() or '(none)'}")
            print(f"RESPONSE   {parsed.response.strip() or '(none)'}\nREFERENCE  {answer.reference.strip()}")
            if parsed.problems:
                print(f"PROBLEMS   {', '.join(parsed.problems)}")


def generate_answers(model, tokenizer, rows, settings) -> Answers:
    """Answers the first `answer_rows` of `rows`, greedily, and returns them.

    Questions of similar length are batched, left-padded. Every finished batch is written at once, so that a second call
    goes on where the first one stopped; the file's name holds a hash of what made it, so that answers made with anything
    else are never taken up. Where torchrun started several processes, they take the batches in turn.
    """
    return answer_all(model, tokenizer, rows.select(range(min(settings.answer_rows, len(rows)))), settings, "answers")


def answer_all(model, tokenizer, rows, settings, part: str, chat: bool = False) -> Answers:
    """Answers to all of `rows` (`Question`, `Response`), kept as `part`; with `chat` through the model's own template.

    A prompt longer than `max_seq_length` is left out and counted in a printed line: on a GPU it would be cut from the right.
    """
    prompts = {i: encode_prompt(question, tokenizer, chat) for i, question in enumerate(rows["Question"])}
    too_long = tuple(i for i, tokens in prompts.items() if len(tokens) > settings.max_seq_length)
    if too_long:
        print(
            f"{len(too_long)} of {len(rows)} prompts are longer than {settings.max_seq_length} tokens and are left out"
        )
    prompts = {i: tokens for i, tokens in prompts.items() if i not in too_long}
    file = kept(settings, model, part, prompts, {"completion": str, "new_tokens": int, "eos_token": str})
    answer = generator(model, tokenizer, prompts, settings)

    def entries(batch):
        for made in answer(batch):
            yield {"row": made.row, "completion": made.text, "new_tokens": made.tokens, "eos_token": tokenizer.eos_token,
                   "batch_seconds": made.batch_seconds}  # fmt: skip

    done = file.fill(batches_that_fit(prompts, model, settings), entries, "answer")
    report_memory("answers generated")
    free_decoding_memory(model)
    items = tuple(
        Answer(i, rows[i]["Question"], rows[i]["Response"], *(done[i][name] for name in ("completion", "new_tokens", "eos_token")))
        for i in sorted(prompts)
    )  # fmt: skip
    return Answers(file.name, file.path, items, too_long)
