"""What is attached to a Kaggle session, told by our own file names, by the columns of tables and by what a model holds."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256
from ..settings import ADAPTER_FOLDER, MedcotError

# What the notebooks leave in the output folder.
SESSION_FILE, MEASURED, TRAINING, CHECKPOINTS = "session.json", "measured", "training.json", "checkpoints"
TRAINED = (ADAPTER_FOLDER, TRAINING, "figures", "wandb")
WALK_SECONDS = 300  # looking through the inputs may take so long
ROWS = (("Question",), ("Complex_CoT",), ("Response",))  # columns, each with the names that it may have
CHOICES = (("question", "Question"), ("choices", "options"), ("answer_index", "answer_idx", "answer"))


@dataclass(frozen=True)
class Inputs:
    """What is attached: all files below the input folder, but those that Kaggle adds to an output (`__output__.json`)."""

    files: tuple[Path, ...]

    @classmethod
    def below(cls, folder: Path) -> "Inputs":
        """Looks through a folder. Raises MedcotError for a mount that takes longer than five minutes to walk."""
        files, begun, said = [], time.monotonic(), False
        for path, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("__"))
            files += [Path(path, name) for name in sorted(names) if not name.startswith("__")]
            seconds = time.monotonic() - begun
            if seconds > WALK_SECONDS:
                raise MedcotError(
                    f"looking through {folder} took {seconds:.0f} s and reached {path} ({len(files):,} files): detach the "
                    "inputs that are not of this project"
                )
            if seconds > 20 and not said:
                said = True
                print(f"looking through {folder}: {len(files):,} files so far, in {path}", flush=True)
        return cls(tuple(files))

    def places(self, name: str) -> list[Path]:
        """Files and folders of this name."""
        found = {
            path if path.name == name else next((p for p in path.parents if p.name == name), None)
            for path in self.files
        }
        return sorted(found - {None})

    def models(self) -> list[Path]:
        """Folders that hold a base model."""
        kinds = {}
        for path in self.files:
            kinds.setdefault(path.parent, set()).add(path.suffix if path.suffix == ".safetensors" else path.name)
        return sorted(
            path for path, names in kinds.items() if {"config.json", "tokenizer.json", ".safetensors"} <= names
        )

    def rows(self) -> list[Path]:
        """Tables with the columns of the data set."""
        tables = (path for path in self.files if path.suffix in (".jsonl", ".json", ".csv", ".parquet"))
        return [path for path in tables if MEASURED not in path.parts and _names_all(path, ROWS)]

    def questions(self) -> list[Path]:
        """jsonl files of multiple-choice questions that are no training rows as well."""
        tables = (path for path in self.files if path.suffix == ".jsonl" and MEASURED not in path.parts)
        return [path for path in tables if _names_all(path, CHOICES) and not _names_all(path, ROWS)]


def _names_all(path: Path, columns) -> bool:
    """Whether each column stands, under one of its names, in the first or last 64 KiB: where tables name their columns."""
    with path.open("rb") as file:
        head = file.read(65536)
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read()
    marks = '"{}":' if path.suffix.startswith(".json") else "{}"  # a key, as our own records have the names as values
    head = head.partition(b"\n")[0] if path.suffix == ".jsonl" else head
    return any(
        all(any(marks.format(name).encode() in part for name in names) for names in columns) for part in (head, tail)
    )


def only(found: list[Path], telling: str, wrong: list[str], variable: str = "") -> Path | None:
    """The one input of a kind; copies of the same (by the file `telling`) count once, and a set variable wins."""
    if variable in os.environ or not found:
        return None
    copies = {sha256(path / telling if telling else path): path for path in reversed(found)}
    if len(copies) > 1:
        paths = ", ".join(str(path) for path in sorted(copies.values()))
        wrong.append(f"{len(copies)} different inputs of one kind ({paths}): detach all but one")
        return None
    return next(iter(copies.values()))


def link(model: Path, scratch: Path) -> Path:
    """The model under a name made of its configuration: where it is mounted must not look like another model."""
    link = scratch / f"model-{sha256(model / 'config.json')[:8]}"
    if link.resolve() != model.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(model, target_is_directory=True)
    return link


def model_forecast(model: Path) -> str:
    """What loading an attached model takes, from the sizes of its files: an estimate.

    Raises MedcotError if its largest file does not fit the memory that is free, since weights are read file by file.
    """
    sizes = [path.stat().st_size / 2**30 for path in model.glob("*.safetensors")]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if max(sizes) > free:
        raise MedcotError(
            f"{model}: its largest file has {max(sizes):.1f} GiB and {free:.1f} GiB of memory are free: attach weights in "
            "smaller files, or detach the model and switch the internet on (6.0 GB in 4 bits)"
        )
    quantized = "quantization_config" in (model / "config.json").read_text(encoding="utf-8")
    card = sum(sizes) if quantized else 0.36 * sum(sizes)  # 6.0 of 16.1 GB: 4-bit matrices, 16-bit embeddings
    return (
        f"model {model}: {sum(sizes):.1f} GiB, nothing to download; estimated {max(sizes):.1f} GiB of {free:.0f} GiB free "
        f"memory while loading, {card:.1f} GiB of the GPU once loaded in 4 bits"
    )


def copy(source: Path, target: Path):
    """Copies a file or folder without the read-only mode of the mount; what is there already stays."""
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        to = target / path.relative_to(source) if path != source else target
        if path.is_file() and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


def _missing(what: str, notebook: str) -> str:
    return (
        f"{what} of {notebook} is not among the inputs: run that notebook first and attach its output "
        "(Add Input, Your Work, Notebooks)"
    )


def take_measured(inputs: Inputs, working: Path, wrong: list[str]):
    files = [path for folder in inputs.places(MEASURED) for path in sorted(folder.glob("*.jsonl"))]
    if not files and not list((working / MEASURED).glob("*.jsonl")):
        wrong.append(_missing(f"{MEASURED}/", "01_baseline"))
    for name in sorted({path.name for path in files}):
        if path := only([path for path in files if path.name == name], "", wrong):
            copy(path, working / MEASURED / name)


def take_training(inputs: Inputs, working: Path, wrong: list[str]):
    """Adapter and record of one run: from one folder, so that they belong together."""
    if (working / TRAINING).is_file() and (working / ADAPTER_FOLDER).is_dir():
        return
    adapters = [
        path.parent for path in inputs.places("adapter_model.safetensors") if path.parent.name == ADAPTER_FOLDER
    ]
    whole = [path.parent for path in adapters if (path.parent / TRAINING).is_file()]
    if not whole:
        wrong.append(_missing(f"{ADAPTER_FOLDER}/ with {TRAINING}", "02_finetune"))
    elif folder := only(whole, f"{ADAPTER_FOLDER}/adapter_model.safetensors", wrong):
        for name in TRAINED:
            copy(folder / name, working / name)
        print(f"adapter and {TRAINING} taken from {folder}")
