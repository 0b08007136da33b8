"""Rows: where they come from, and the token sequences they become."""

import glob
import hashlib
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import is_tarfile

from . import identity
from .choices import accepted_answers, carries_choices, read_choices
from .hub import hub_revision, patiently
from .prompts import encode_completion, encode_prompt, format_completion
from .settings import EMBEDDED_CASES, HELD_OUT_SEED, MedcotError

COLUMNS = ("Question", "Complex_CoT", "Response")
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_ARCHIVES = (b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zX", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

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

    def __str__(self):
        dropped = "".join(f", {count} {reason}" for reason, count in self.dropped.items() if count)
        revision = f" at {self.revision}" if self.revision else ""
        return (
            f"{len(self.train)} training and {len(self.eval)} evaluation rows from {self.source}{revision}"
            f"{dropped or ', none dropped'}; SHA-256 {self.fingerprint[:12]}"
        )


def load_splits(settings) -> Splits:
    """The training rows (the first `train_rows`) and the evaluation rows (the `eval_rows` after them).

    Rows with an empty field are dropped and a row whose question already stands in training is moved out of the
    evaluation rows; both are counted, and one line says what was loaded. Raises MedcotError for a source that cannot
    be read, lacks a column or has too few rows, and for training rows other than those the output folder was made with.
    """
    if settings.dataset == EMBEDDED_CASES:
        train, evaluation = _embedded_cases(settings)
        splits = Splits(train, evaluation, EMBEDDED_CASES, None, fingerprint(train, evaluation))
    else:
        rows, revision = _read_rows(settings)
        splits = _split(rows, revision, settings)
    identity.check(settings, rows=fingerprint(splits.train))
    for i, row in enumerate(splits.eval):  # what cannot be graded is said now, not after the evaluation
        place = f"{settings.dataset}, evaluation row {i}"
        read_choices(row, place) if carries_choices(row) else accepted_answers(row, place)
    print(splits)
    return splits


def _embedded_cases(settings):
    import datasets

    from .tiny.cases import held_out_cases, training_cases

    return (
        datasets.Dataset.from_list(training_cases(settings.train_rows, seed=settings.seed)),
        datasets.Dataset.from_list(held_out_cases(settings.eval_rows, seed=HELD_OUT_SEED)),
    )


def _read_rows(settings):
    """All rows of a file, a folder or a hub data set, with their three text columns checked, and the revision."""
    import datasets

    path = Path(settings.dataset)
    try:
        local = path.exists()
    except OSError as error:
        raise MedcotError(f"dataset={settings.dataset[:200]!r}: {error.strerror}, name a file or a hub name") from error
    if local:
        (kind, files), revision = _data_files(path), None
        # A word such as "NA" is text like any other.
        options = {"keep_default_na": False} if kind == "csv" else {}
        try:
            rows = datasets.load_dataset(kind, data_files=list(map(glob.escape, files)), split="train", **options)
        except Exception as error:  # the library raises a different class for each way a file can be wrong
            raise _unreadable(settings.dataset, error, "check that the file is what its name says") from error
    elif path.is_absolute() or path.suffix in FILE_TYPES or settings.dataset.startswith("."):
        raise MedcotError(f"{path.absolute()} not found: name a json, jsonl, csv or parquet file, or a folder of them")
    else:
        rows, revision = read_hub(settings, "dataset", settings.dataset_config, "train")
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise MedcotError(
            f"{settings.dataset} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}: "
            f"rename its columns to {', '.join(COLUMNS)}"
        )
    if not len(rows):
        raise MedcotError(f"{settings.dataset} holds no rows: name a file with at least two")
    return rows, revision


def read_hub(settings, field: str, config: str | None, split: str):
    """The rows of one split of the hub data set that the setting `field` names, and the commit they are of."""
    import datasets

    name, wanted = getattr(settings, field), getattr(settings, f"{field}_revision")
    revision = hub_revision("dataset", name, wanted) or wanted
    try:
        rows = patiently(lambda: datasets.load_dataset(name, config, revision=revision, split=split), name)
    except Exception as error:
        raise _unreadable(name, error, "check its name, configuration and network") from error
    # Without the hub `datasets` takes whatever commit it cached last, whatever `revision` says.
    commit = Path(rows.cache_files[0]["filename"]).parent.name
    if revision not in (None, commit):
        raise MedcotError(
            f"{name} in the local cache is commit {commit}, not {revision}: go online once, or set {field}_revision to "
            "the commit that is there"
        )
    return rows, commit


def _unreadable(source: str, error: Exception, cure: str) -> MedcotError:
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return MedcotError(f"{source} could not be read ({reason[0][:200]}): {cure}")


def _data_files(path: Path) -> tuple[str, list[str]]:
    """The `datasets` loader for a file or folder, and the files, in name order."""
    files = sorted(f for f in path.rglob("*") if f.suffix in FILE_TYPES) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise MedcotError(f"{file} is no regular file: give files of one kind out of {', '.join(FILE_TYPES)}")
        with file.open("rb") as content:
            magic = content.read(4)
        # `datasets` unpacks what looks like an archive, whatever its name is.
        if magic.startswith(_ARCHIVES) or (magic.strip(b"\0") and is_tarfile(file)):
            raise MedcotError(f"{file} is an archive: unpack it and name the files in it")
    kinds = {FILE_TYPES.get(file.suffix) for file in files}
    if None in kinds or len(kinds) != 1:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "no data file"
        raise MedcotError(f"{path} holds {found}: give files of one kind out of {', '.join(FILE_TYPES)}")
    return kinds.pop(), [str(file) for file in files]


def _split(rows, revision, settings) -> Splits:
    dropped = {}
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
    empty = {i for column in COLUMNS for i, text in enumerate(rows[column]) if not (text or "").strip()}
    dropped["with an empty field dropped"] = len(empty)
    usable = [i for i in range(len(rows)) if i not in empty]
    train = rows.select(usable[: settings.train_rows])
    seen, kept, moved = {normalise(question) for question in train["Question"]}, [], 0
    for i in usable[settings.train_rows :]:
        if len(kept) == settings.eval_rows:
            break
        if normalise(rows[i]["Question"]) in seen:
            moved += 1
        else:
            kept.append(i)
    dropped["moved out of evaluation because the question stands in training"] = moved
    if len(train) < settings.train_rows or len(kept) < settings.eval_rows:
        raise MedcotError(
            f"{settings.dataset} has {len(usable)} usable rows ({len(empty)} with an empty field, {moved} repeating a "
            f"training question), but train_rows={settings.train_rows} and eval_rows={settings.eval_rows} are asked "
            "for: lower them with dataclasses.replace, or use MEDCOT_PROFILE=smoke"
        )
    evaluation = rows.select(kept)
    return Splits(train, evaluation, settings.dataset, revision, fingerprint(train, evaluation), dropped)


def fingerprint(*splits) -> str:
    """SHA-256 over the three text columns of all rows, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(json.dumps([row[column] for column in COLUMNS], ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def encode_example(row, tokenizer) -> dict:
    """`input_ids` and `completion_mask` of one example."""
    question, reasoning, response = (row[column] for column in COLUMNS)
    prompt = encode_prompt(question, tokenizer)
    completion = encode_completion(format_completion(reasoning, response, tokenizer.eos_token), tokenizer)
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def to_examples(rows, tokenizer, settings, show: bool = True):
    """Rows as a `datasets.Dataset` of token sequences, ready for a TRL trainer.

    Columns: `input_ids` (tokens of the whole example: one BOS, the prompt, the completion, one EOS) and
    `completion_mask` (1 where a token is supervised: the completion under `completion_only_loss`, else everything).
    A row longer than `max_seq_length` would lose its answer; such rows are left out and counted in a printed line.
    Shows the first example with its supervised tokens coloured. Raises MedcotError if no row is left or if a row does
    not have exactly one BOS and one EOS.
    """
    import datasets

    examples, over_long = [], []
    for i, row in enumerate(rows):
        example = encode_example(row, tokenizer)
        if len(example["input_ids"]) > settings.max_seq_length:
            over_long.append(i)
            continue
        _check_example(example["input_ids"], i, tokenizer)
        if not settings.completion_only_loss:
            example["completion_mask"] = [1] * len(example["input_ids"])
        examples.append(example)
    if not examples:
        raise MedcotError(
            f"all {len(over_long)} rows are longer than max_seq_length={settings.max_seq_length} tokens: raise it"
        )
    if show:
        left_out = f", {len(over_long)} left out as longer than {settings.max_seq_length} tokens" if over_long else ""
        print(f"{len(examples)} examples{left_out}; the first, with its supervised tokens coloured:")
        show_example(examples[0], tokenizer)
    found = datasets.Dataset.from_list(examples)
    found.info.description = fingerprint(
        rows
    )  # travels with the examples, so that a run can say what it was trained on
    return found


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
