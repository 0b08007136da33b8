"""Rows: where they come from, and the token sequences they become."""

import hashlib
import html
import json
from dataclasses import dataclass, field

from . import identity
from .choices import accepted_answers, carries_choices, read_choices, same_question
from .prompts import THINK_CLOSE, THINK_OPEN, encode_completion, encode_prompt, format_completion
from .rows import COLUMNS, read_rows
from .settings import EMBEDDED_CASES, HELD_OUT_SEED, USUAL_TRAIN_ROWS, MedcotError

LEAST_ROWS = 10

# The question that the project this one rebuilds shows before and after; it stands in its training rows.
SHOWCASE_QUESTION = (
    "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but "
    "no leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry "
    "most likely reveal about her residual volume and detrusor contractions?"
)


def normalise(text: str) -> str:
    """Case-folded text with single spaces: two questions that differ only in these are the same question."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Splits:
    """Training and evaluation rows as `datasets.Dataset`, and where they came from."""

    train: object
    """Training rows: the first usable ones."""
    eval: object
    """Evaluation rows: the ones after them, none with a question that stands in training."""
    source: str
    """Hub name, path or "embedded cases"."""
    revision: str | None
    """Commit of a hub data set; None for files and for the embedded cases."""
    fingerprint: str
    """SHA-256 over the fields of all rows used, in order."""
    dropped: dict = field(default_factory=dict)
    """Rows not used, counted by reason."""

    def loss_rows(self, settings):
        """The evaluation rows whose loss is measured in training."""
        return self.eval.select(range(min(settings.eval_loss_rows, len(self.eval))))

    def __str__(self):
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items() if count)
        revision = f" at {self.revision}" if self.revision else ""
        return (
            f"{len(self.train)} training and {len(self.eval)} evaluation rows from {self.source}{revision}"
            f"{dropped or ', none dropped'}; SHA-256 {self.fingerprint[:12]}"
        )


def load_splits(settings) -> Splits:
    """The training rows (the first `train_rows`) and the evaluation rows (the `eval_rows` after them).

    With `train_rows=0` the evaluation rows are those of a usual run, after the first 500, so that what 01 and other runs
    measured on them can be set beside it, and all others train. Of a file with fewer rows a fifth, the last, is held out and
    the rest trains. Rows with an empty field are dropped, a row whose
    question already stands in training is moved out of the evaluation rows, and one that repeats another there is left
    out; all are counted, and one line says what is used and what is not. Raises MedcotError for a source that cannot be
    read, lacks a column or has too few rows, for options that cannot be graded, and for training rows other than those the
    output folder was made with.
    """
    if settings.dataset == EMBEDDED_CASES:
        train, evaluation = _embedded_cases(settings)
        splits = Splits(train, evaluation, EMBEDDED_CASES, None, fingerprint(train, evaluation))
    else:
        rows, revision = read_rows(settings)
        splits = _split(rows, revision, settings)
    identity.check(settings, rows=fingerprint(splits.train))
    print(splits)
    return splits


def _embedded_cases(settings):
    import datasets

    from .tiny.cases import held_out_cases, training_cases

    return (
        datasets.Dataset.from_list(training_cases(settings.train_rows, seed=settings.seed)),
        datasets.Dataset.from_list(held_out_cases(settings.eval_rows, seed=HELD_OUT_SEED)),
    )


def _split(rows, revision, settings) -> Splits:
    dropped = {}
    _check_text(rows, settings)
    empty = {i for column in COLUMNS for i, text in enumerate(rows[column]) if not (text or "").strip()}
    dropped["with an empty field dropped"] = len(empty)
    usable = [i for i in range(len(rows)) if i not in empty]
    questions = {i: normalise(question) for i, question in enumerate(rows["Question"]) if i not in empty}
    first, held_out = _sizes(len(usable), settings)
    kept, moved, repeated = _hold_out(rows, questions, first, held_out, settings)
    dropped["moved out of evaluation because the question stands in training"] = len(moved)
    if not kept:
        raise MedcotError(
            f"{settings.dataset} has {len(usable)} usable rows ({len(empty)} with an empty field, {len(moved)} repeating a "
            f"training question), and at least {LEAST_ROWS} are needed, some of them with a question of their own"
        )
    if settings.train_rows:
        training = usable[:first]
        dropped["left out of evaluation because the question stands there already"] = len(repeated)
        dropped["left unused"] = len(usable) - first - len(kept) - len(moved) - len(repeated)
    else:
        asked = {questions[i] for i in kept}
        training = [i for i in usable if questions[i] not in asked]
        dropped["left out of training because the question is held out"] = len(usable) - len(kept) - len(training)
    train, evaluation = rows.select(training), rows.select(kept)
    return Splits(train, evaluation, settings.dataset, revision, fingerprint(train, evaluation), dropped)


def _hold_out(rows, questions: dict, first: int, count: int, settings) -> tuple[list, list, list]:
    """Of the rows after the first ones, by index: those to evaluate on, those whose question is among the first, and repeats.

    `questions`: the usable rows' normalised ones, by index.
    """
    usable, asked, kept, moved, repeated = list(questions), set(), [], [], []
    seen = {questions[i] for i in usable[:first]}
    for i in usable[first:]:
        if len(kept) == count:
            break
        key = _asked(rows[i], f"{settings.dataset}, row {i}")
        (moved if questions[i] in seen else repeated if key in asked else kept).append(i)
        asked.add(key)
    return kept, moved, repeated


def _check_text(rows, settings):
    for column in COLUMNS:
        kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
        if kind not in ("string", "large_string", "null"):
            raise MedcotError(f"{settings.dataset}: column {column} holds {kind}, not text")
        try:
            rows[column][:]
        except UnicodeDecodeError as error:
            raise MedcotError(
                f"{settings.dataset}: column {column} is not UTF-8 ({error}): convert the file"
            ) from error


def _sizes(usable: int, settings) -> tuple[int, int]:
    """(training, evaluation) rows: as the settings say, or where a file has fewer, a fifth of them held out."""
    wanted = settings.train_rows or USUAL_TRAIN_ROWS
    if usable >= wanted + settings.eval_rows:
        return wanted, settings.eval_rows
    held_out = min(settings.eval_rows, usable // 5) if usable >= LEAST_ROWS else 0
    return min(settings.train_rows or usable, usable - held_out), held_out


def _asked(row, place: str) -> str:
    """What makes a row's question that question. Raises MedcotError for options or an answer that cannot be graded."""
    if carries_choices(row):
        return same_question(read_choices(row, place))
    accepted_answers(row, place)
    return normalise(row["Question"])


def fingerprint(*splits) -> str:
    """SHA-256 over the three text columns of all rows, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split.select_columns(list(COLUMNS)):
            digest.update(json.dumps([row[column] for column in COLUMNS], ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def encode_example(row, tokenizer) -> dict:
    """`input_ids` and `completion_mask` of one example."""
    question, reasoning, response = (row[column] for column in COLUMNS)
    prompt = encode_prompt(question, tokenizer)
    completion = encode_completion(format_completion(reasoning, response, tokenizer.eos_token), tokenizer)
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def encode_rows(rows, tokenizer, settings):
    """`encode_example` of every row, as a `datasets.Dataset`; all tokens supervised unless `completion_only_loss`.

    Encoded one by one and, for rows that come from files, kept in the cache of `datasets`: a later start with the same rows,
    tokenizer and prompt reads them from there.
    """
    import datasets

    def encode(row):
        example = encode_example(row, tokenizer)
        whole = {} if settings.completion_only_loss else {"completion_mask": [1] * len(example["input_ids"])}
        return example | whole

    # Our own name for the result: the one `datasets` computes changes with whatever the function can reach.
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    probe = encode(dict.fromkeys(COLUMNS, f" {THINK_OPEN}a {THINK_CLOSE}"))  # changes with the prompt and its form
    parts = {"rows": fingerprint(rows), "tokenizer": vocabulary, "probe": probe, "version": 1}
    columns = {"input_ids": datasets.Value("int32"), "completion_mask": datasets.Value("int8")}
    return rows.map(
        encode,
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.List(value) for name, value in columns.items()}),
        new_fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32],
        desc="tokens",
    )


def to_examples(rows, tokenizer, settings, show: bool = True):
    """Rows as a `datasets.Dataset` of token sequences, ready for a TRL trainer.

    Columns: `input_ids` (tokens of the whole example: one BOS, the prompt, the completion, one EOS) and
    `completion_mask` (1 where a token is supervised: the completion under `completion_only_loss`, else everything).
    A row longer than `max_seq_length` would lose its answer; such rows are left out and counted in a printed line.
    Shows the first example with its supervised tokens coloured. Raises MedcotError if no row is left or if a row does
    not have exactly one BOS and one EOS.
    """
    encoded, fitting = encode_rows(rows, tokenizer, settings), []
    for i, tokens in enumerate(encoded["input_ids"]):
        if len(tokens) <= settings.max_seq_length:
            _check_example(tokens, i, tokenizer)
            fitting.append(i)
    over_long = len(encoded) - len(fitting)
    if not fitting:
        raise MedcotError(f"all {over_long} rows are longer than max_seq_length={settings.max_seq_length}: raise it")
    examples = encoded.select(fitting)
    if show:
        left_out = f", {over_long} left out as longer than {settings.max_seq_length} tokens" if over_long else ""
        print(f"{len(examples)} examples{left_out}; the first, with its supervised tokens coloured:")
        show_example(examples[0], tokenizer)
    examples.info.description = fingerprint(rows)  # travels along, so that a run can say what it was trained on
    return examples


def _check_example(input_ids, row, tokenizer):
    bos, eos = input_ids.count(tokenizer.bos_token_id), input_ids.count(tokenizer.eos_token_id)
    if (bos, eos) != (1, 1) or input_ids[0] != tokenizer.bos_token_id or input_ids[-1] != tokenizer.eos_token_id:
        raise MedcotError(
            f"row {row} encodes to {bos} BOS and {eos} EOS tokens, one of each is needed, at its ends: "
            f"look for {tokenizer.bos_token} or {tokenizer.eos_token} in its text"
        )


def show_example(example, tokenizer):
    """Shows one example token by token: supervised tokens coloured, the others grey."""
    from IPython import get_ipython
    from IPython.display import HTML, display

    pieces, in_notebook = [], getattr(get_ipython(), "kernel", None) is not None
    runs = []  # neighbours with the same mask are decoded together, so that multi-byte characters stay whole
    for token, supervised in zip(example["input_ids"], example["completion_mask"], strict=True):
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        runs[-1][1].append(token)
    for supervised, tokens in runs:
        text = tokenizer.decode(tokens)
        if in_notebook:
            colour = "background:#d7f0dd;color:#111" if supervised else "color:#888"
            pieces.append(f'<span style="{colour}">{html.escape(text)}</span>')
        else:
            pieces.append(f"\033[{32 if supervised else 90}m{text}\033[0m")
    if in_notebook:
        display(HTML(f'<pre style="white-space:pre-wrap">{"".join(pieces)}</pre>'))
    else:
        print("".join(pieces))
