"""Where this runs: the environment's word, Kaggle or not, where files go, and what the libraries may do behind one's back."""

import os
import platform
import sys
from pathlib import Path

NOTICE = "Research software, not for clinical use: answers may be wrong and must not guide the care of a patient."
# What the environment may say of a run; any other MEDCOT_ variable is taken for a slip of the pen.
VARIABLES = {
    "MEDCOT_PROFILE": "the profile to start from",
    "MEDCOT_MODEL": "base model: hub name or folder",
    "MEDCOT_DATASET": "training and evaluation rows: hub name, file or folder",
    "MEDCOT_CHOICES": "multiple-choice questions: hub name or jsonl file",
    "MEDCOT_OUT": "folder that everything is written to",
    "MEDCOT_EARLIER": "output folder of an earlier session, to go on from",
    "MEDCOT_SESSION_MINUTES": "minutes after the session's start at which training stops",
    "MEDCOT_KAGGLE_ROOT": "stands for /kaggle, in tests",
    "MEDCOT_REAL_ROWS": "folder of rows that are not in the repository, in tests",
}


class MedcotError(ValueError):
    """Something its user can mend; the message names the value and the cure."""


def kaggle_root() -> Path:
    """/kaggle, or what MEDCOT_KAGGLE_ROOT names in its place."""
    return Path(os.environ.get("MEDCOT_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    """True inside a Kaggle session, interactive or batch."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ and (kaggle_root() / "working").is_dir()


def default_output(profile: str) -> Path:
    if on_kaggle():
        return kaggle_root() / "working"
    # A notebook runs in notebooks/, the command line anywhere: both should find one outputs folder.
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "kaggle-metadata.json").is_file()), here)
    return root / "outputs" / profile


def prepare_environment():
    """Switches the libraries' telemetry off, and growing memory segments on, where the environment says nothing of them.

    Read when torch and the others are imported or first used, so it is done with the settings, before any of them is.
    """
    # Not where the older variable says something, nor on Windows' own Linux, where torch fails with them.
    usual = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if usual and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Unsloth asks for this too, but too late once a GPU was looked at. 14.4 GiB reserved without it, 11.8 with it, for
        # 11.7 in use (kaggle-t4-fast, tests/benchmarks).
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for variable in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ["WANDB_LOG_MODEL"] = "false"  # nothing is uploaded but by a command whose name says so


def check_output(folder: Path):
    """Raises MedcotError if files cannot be written below a folder; makes nothing."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise MedcotError(f"MEDCOT_OUT={str(folder)[:200]!r}: {error.strerror}, name another folder") from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise MedcotError(f"{there} is no folder that can be written to: set MEDCOT_OUT to one")
