"""Checkpoints that can be trusted: sealed when they are whole, of this run, or passed over by name."""

import json
import shutil
from pathlib import Path

from .. import identity
from ..files import sha256, write_beside
from ..identity import CHECKPOINT_FILE
from ..settings import MedcotError


def run_identity(trainer, settings) -> dict:
    """The parts that decide what a trainer arrives at: settings, base weights, prompt, rows and their tokens."""
    import hashlib

    tokens = hashlib.sha256()
    for example in trainer.train_dataset["input_ids"]:  # one at a time: all of a large data set are too much at once
        tokens.update(json.dumps(example).encode() + b"\n")
    return identity.of_settings(settings, identity.TRAINING) | {
        "base model": identity.base_id(settings, trainer.model),
        "training rows": trainer.train_dataset.info.description,
        "training examples": tokens.hexdigest(),
    }


def last_checkpoint(settings, now: dict) -> Path | None:
    """The newest whole checkpoint of the run `now` in `output_dir` or `earlier_output`; None if there is none.

    Unfinished and damaged ones are named in a printed line and passed over. Raises MedcotError if the newest whole one
    is of another run, naming every part that differs.
    """
    folders = [settings.output_dir / "checkpoints"]
    if settings.earlier_output is not None:
        folders += sorted(settings.earlier_output.rglob("checkpoints"))
    found = [path for folder in folders for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if damage := _damage(checkpoint):
            print(f"{checkpoint} {damage}: passed over for the one before")
            if checkpoint.parent == folders[0]:
                shutil.rmtree(checkpoint, ignore_errors=True)  # or it would count as one of the two that are kept
            continue
        there = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))["identity"]
        if odd := identity.differences(there, now):
            cure = "choose another output folder (MEDCOT_OUT) or delete the checkpoints to train anew"
            if checkpoint.parent != folders[0]:
                cure = "detach that input, or set MEDCOT_EARLIER to an empty folder, to train anew"
            raise MedcotError(f"{checkpoint} is of another run: {', '.join(odd)}. Set that back, or {cure}")
        return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name[11:])


def stopped(checkpoint: Path | None) -> str | None:
    """The note of a run that ended with this checkpoint before its last step; None if it did not end here."""
    if checkpoint is None:
        return None
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    stops = (entry["note"] for entry in history if entry.get("stopped") and entry["step"] == step_of(checkpoint))
    return next(stops, None)


def seal(checkpoint: Path, now: dict):
    """Marks a checkpoint as finished: the digests of its files and what run it is of, written last."""
    digests = {file.name: sha256(file) for file in sorted(checkpoint.iterdir()) if file.is_file()}
    write_beside(checkpoint / CHECKPOINT_FILE, json.dumps({"identity": now, "files": digests}, indent=1))


def checkpoint_bytes(model) -> int:
    """At most what a checkpoint takes: the adapters and two moments of them in 32 bits, and the tokenizer."""
    return 3 * 4 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad) + 32 * 2**20


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    try:
        sealed = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        files, _ = sealed["files"], sealed["identity"].items()
        wrong = [name for name, digest in files.items() if sha256(checkpoint / name) != digest]
    except FileNotFoundError as error:
        return "was not finished" if Path(error.filename).name == CHECKPOINT_FILE else f"lacks {error.filename}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return f"is damaged in {', '.join(wrong)}" if wrong else None
