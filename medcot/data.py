"""Rows: where they come from, what is wrong with them, and the token sequences they become."""

import hashlib
import html
import json
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import is_tarfile

from .prompts import THINK_CLOSE, THINK_OPEN, format_completion, format_prompt
from .settings import EMBEDDED_CASES, HELD_OUT_SEED, MedcotError, hub_revision, patiently

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
    be read, lacks a column or has too few rows.
    """
    if settings.dataset == EMBEDDED_CASES:
        train, evaluation = _embedded_cases(settings)
        splits = Splits(train, evaluation, EMBEDDED_CASES, None, _fingerprint(train, evaluation))
    else:
        rows, revision = _read_rows(settings)
        splits = _split(rows, revision, settings)
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
        try:
            rows = datasets.load_dataset(kind, data_files=files, split="train")
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
    return Splits(train, evaluation, settings.dataset, revision, _fingerprint(train, evaluation), dropped)


def _fingerprint(*splits) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            digest.update(json.dumps([row[column] for column in COLUMNS], ensure_ascii=False).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Audit:
    """What a look at the training rows found before any GPU time is spent."""

    source: str
    rows: int
    duplicates: int
    """Training rows whose question already stood in an earlier one."""
    think_tags: int
    """Rows with a think tag inside a field; the prompt defuses them."""
    outer_white_space: int
    """Rows with a field that starts or ends in white space; kept as they are."""
    non_ascii: int
    token_counts: tuple[int, ...]
    """Length of each whole training example in tokens, in row order."""
    max_seq_length: int
    """The limit in tokens."""
    dropped: dict
    """Rows left out while loading, counted by reason."""
    showcase_in_training: bool
    """Whether the original's showcase question is a training row."""

    @property
    def over_long(self) -> tuple[int, ...]:
        """Indices of the rows that would lose their answer at `max_seq_length`."""
        return tuple(i for i, count in enumerate(self.token_counts) if count > self.max_seq_length)

    def _showcase(self):
        if self.source == EMBEDDED_CASES:
            return "the showcase question is not asked here: a training row stands in for it"
        found = "a training row: no evidence of learning" if self.showcase_in_training else "not a training row"
        return f"the showcase question is {found}"

    def __str__(self):
        counts = sorted(self.token_counts)
        p95 = counts[min(len(counts) - 1, int(0.95 * len(counts)))]
        lines = [f"{self.rows} training rows from {self.source}"]
        lines += [f"  {count} rows {reason}" for reason, count in self.dropped.items()]
        lines += [
            f"  {self.duplicates} repeat the question of an earlier row",
            f"  {self.think_tags} have a think tag inside a field (defused by the prompt)",
            f"  {self.outer_white_space} have outer white space, {self.non_ascii} have non-ASCII characters (both kept)",
            f"  tokens per example: mean {statistics.fmean(counts):.0f}, 95th percentile {p95}, longest {counts[-1]}",
            f"  {len(self.over_long)} would lose their answer at max_seq_length {self.max_seq_length}"
            + (
                f" (rows {', '.join(map(str, self.over_long[:8]))}): left out, or raise max_seq_length"
                if self.over_long
                else ""
            ),
            f"  {self._showcase()}",
        ]
        return "\n".join(lines)


def audit(splits: Splits, tokenizer, settings) -> Audit:
    """Looks at every training row once; `tokenizer` counts the tokens of the whole example, prompt and EOS included."""
    questions, fields = Counter(map(normalise, splits.train["Question"])), [splits.train[column] for column in COLUMNS]
    rows = list(zip(*fields, strict=True))
    return Audit(
        source=splits.source,
        rows=len(rows),
        duplicates=len(rows) - len(questions),
        think_tags=sum(any(tag in text for text in row for tag in (THINK_OPEN, THINK_CLOSE)) for row in rows),
        outer_white_space=sum(any(text != text.strip() for text in row) for row in rows),
        non_ascii=sum(not all(text.isascii() for text in row) for row in rows),
        token_counts=tuple(len(_encode(row, tokenizer)["input_ids"]) for row in rows),
        max_seq_length=settings.max_seq_length,
        dropped=dict(splits.dropped),
        showcase_in_training=normalise(SHOWCASE_QUESTION) in questions,
    )


def _encode(row, tokenizer) -> dict:
    """`input_ids` and `completion_mask` of one example.

    Prompt and completion are encoded apart, so that the prompt's tokens are those of inference whatever the reasoning
    starts with.
    """
    question, reasoning, response = row
    prompt = tokenizer(format_prompt(question), verbose=False)["input_ids"]
    completion = format_completion(reasoning, response, tokenizer.eos_token)
    completion = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
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
        example = _encode([row[column] for column in COLUMNS], tokenizer)
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
    return datasets.Dataset.from_list(examples)


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
