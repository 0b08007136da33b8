"""Rows as they come: a file, a folder, a hub data set, in the forms that people have them in."""

import glob
from pathlib import Path
from tarfile import is_tarfile

from .hub import hub_revision, patiently
from .prompts import THINK_CLOSE, THINK_OPEN
from .settings import MedcotError

COLUMNS = ("Question", "Complex_CoT", "Response")
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_ARCHIVES = (b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zX", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


def read_rows(settings):
    """All rows of a file, a folder or a hub data set under the names of `COLUMNS`, and the commit of a hub data set.

    A row may have these columns, others that the settings name (`question_column` and so on), or be a chat: `messages`, a
    user's turn and an assistant's whose reasoning stands between think tags. Raises MedcotError for a source that cannot
    be read or has none of these forms.
    """
    import datasets

    path = Path(settings.dataset)
    try:
        local = path.exists()
    except OSError as error:
        raise MedcotError(f"dataset={settings.dataset[:200]!r}: {error.strerror}, name a file or a hub name") from error
    if local:
        (kind, files), revision = _data_files(path), None
        options = _csv(files[0]) if kind == "csv" else {}
        try:
            rows = datasets.load_dataset(kind, data_files=list(map(glob.escape, files)), split="train", **options)
        except Exception as error:  # the library raises a different class for each way a file can be wrong
            raise _unreadable(settings.dataset, error, "check that the file is what its name says") from error
    elif path.is_absolute() or path.suffix in FILE_TYPES or settings.dataset.startswith("."):
        raise MedcotError(f"{path.absolute()} not found: name a json, jsonl, csv or parquet file, or a folder of them")
    else:
        rows, revision = read_hub(settings, "dataset", settings.dataset_config, "train")
    rows = _named(rows, settings)
    if not len(rows):
        raise MedcotError(f"{settings.dataset} holds no rows: name a file with at least two")
    return rows, revision


def _csv(file: str) -> dict:
    """How to read a table of text: cut at what its first line has most of, commas, semicolons or tabs.

    A word such as "NA" is text like any other.
    """
    with open(file, encoding="utf-8", errors="replace") as content:
        header = content.readline()
    return {"sep": max(",;\t", key=header.count), "keep_default_na": False}


def _named(rows, settings):
    """The rows with their columns under the names of `COLUMNS`."""
    names = (settings.question_column, settings.reasoning_column, settings.response_column)
    there = rows.column_names
    if "messages" in there and names[0] not in there:
        return rows.map(_from_chat, with_indices=True, remove_columns=["messages"], load_from_cache_file=False)
    if missing := [name for name in names if name not in there]:
        raise MedcotError(
            f"{settings.dataset} has no column {', '.join(missing)}; it has {', '.join(there)}: rename its columns to "
            f"{', '.join(COLUMNS)}, or name them (question_column, reasoning_column, response_column)"
        )
    taken = [new for old, new in zip(names, COLUMNS, strict=True) if old != new and new in there]
    return rows.remove_columns(taken).rename_columns({o: n for o, n in zip(names, COLUMNS, strict=True) if o != n})


def _from_chat(row, i: int) -> dict:
    """A chat of one question and one answer as a row; without think tags its reasoning is empty."""
    turns = [(m.get("role"), m.get("content") or "") for m in row["messages"] or []]
    turns = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _ in turns] != ["user", "assistant"]:
        found = ", ".join(str(role) for role, _ in turns) or "nothing"
        raise MedcotError(f"row {i}: messages are of {found}: give one turn of the user and one of the assistant")
    reasoning, _, response = turns[1][1].removeprefix(THINK_OPEN).rpartition(THINK_CLOSE)
    return dict(zip(COLUMNS, (turns[0][1], reasoning.strip(), response.strip()), strict=True))


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
