"""The profiles, and the settings of this session."""

import json
import os
from dataclasses import replace
from pathlib import Path

from . import identity
from .environment import (
    VARIABLES,
    MedcotError,
    check_output,
    default_output,
    kaggle_root,
    on_kaggle,
    prepare_environment,
)
from .gpus import arrange
from .settings import EMBEDDED_CASES, EMBEDDED_MODEL, Settings, neighbour, short

_KAGGLE_T4 = Settings(profile="kaggle-t4")
# The same rows, the same eight examples a step and the same losses, arranged for speed (tests/benchmarks/README.md).
_KAGGLE_T4_FAST = replace(
    _KAGGLE_T4, profile="kaggle-t4-fast", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    padding_free=True, activation_memory_gib=8.0, activation_host_gib=12.0,
)  # fmt: skip
# The embedded model has 1 million parameters, not 8,072 million, and starts without the form of the reasoning: it needs
# more, larger steps (250 x 16 cases, each seen once, at 3e-3) where the 8B only changes its manner. Only completions are
# supervised, because the random findings in its questions have nothing to teach. The rest is the T4 recipe.
_TINY = Settings(
    profile="tiny", model=EMBEDDED_MODEL, dataset=EMBEDDED_CASES, device="cpu",
    train_rows=4000, eval_rows=240, answer_rows=240, per_device_train_batch_size=16, gradient_accumulation_steps=1,
    gradient_checkpointing=False, completion_only_loss=True, learning_rate=3e-3, max_steps=250, warmup_steps=20,
    logging_steps=5, eval_steps=50, eval_loss_rows=64, save_steps=50, max_new_tokens=160, generation_batch_size=80,
    # Its evaluation rows carry options themselves, so no other questions need be answered by generation.
    choice_dataset=EMBEDDED_CASES, choice_rows=240, choice_answer_rows=0, chat_rows=240, primary_measure="right answer",
)  # fmt: skip
PROFILES = {
    "kaggle-t4": _KAGGLE_T4,
    "kaggle-t4-fast": _KAGGLE_T4_FAST,
    # Kaggle's T4 session has two cards; 4 x 1 x 2 cards = the same eight examples a step.
    "kaggle-t4x2": replace(_KAGGLE_T4_FAST, profile="kaggle-t4x2", gradient_accumulation_steps=1, nproc_per_node=2),
    # Any other CUDA card from 8 GB; `load_settings` arranges it by the card's memory and capability.
    "gpu": replace(
        _KAGGLE_T4, profile="gpu", per_device_train_batch_size=1, gradient_accumulation_steps=8, padding_free=True,
    ),
    "tiny": _TINY,
    "smoke": replace(
        _TINY, profile="smoke", train_rows=64, eval_rows=12, answer_rows=6, per_device_train_batch_size=4,
        max_steps=6, warmup_steps=1, logging_steps=1, eval_steps=3, eval_loss_rows=4, save_steps=3, max_new_tokens=96,
        choice_rows=12, chat_rows=6,
    ),
}  # fmt: skip


def load_settings(**changes) -> Settings:
    """The settings of this session, with one printed line that says what was chosen and why.

    `MEDCOT_PROFILE` names a profile; without it a CUDA GPU means `kaggle-t4-fast` and no GPU means `tiny`. The other
    variables (`VARIABLES`) replace model, data, questions and folders, and `changes` any field: `load_settings(max_steps=100)`.
    Raises MedcotError for an unknown name, whose nearest neighbour it names, for a profile that needs a GPU where there is
    none, for an output folder that cannot be written to, and for one that holds another run (`identity.check`).
    """
    prepare_environment()
    import torch  # here, because the rooms that only read settings start without it

    for variable in os.environ:
        if variable.startswith("MEDCOT_") and variable not in VARIABLES:
            raise MedcotError(f"the environment variable {neighbour(variable, VARIABLES)}")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    profile, why = _profile()
    if profile not in PROFILES:
        raise MedcotError(f"MEDCOT_PROFILE={profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    if settings.device == "cuda" and not gpu:
        raise MedcotError(
            f"profile {profile!r} needs a CUDA GPU and this machine has none: "
            "choose MEDCOT_PROFILE=tiny, or a Kaggle session with the accelerator GPU T4 x2"
        )
    changes = _session(profile, gpu) | changes
    if profile == "gpu":
        card = torch.cuda.get_device_properties(0).total_memory / 2**30, torch.cuda.get_device_capability(0)
        changes = arrange(changes.get("model", settings.model), *card) | changes
    settings = replace(settings, **changes)
    check_output(settings.output_dir)
    identity.check(settings)
    print(
        f"profile {settings.profile} ({why}), model {settings.model}, data {settings.dataset}, "
        f"device {gpu if settings.device == 'cuda' else 'CPU'}, files in {settings.output_dir}"
    )
    return settings


def _profile() -> tuple[str, str]:
    """The profile to start from, and why."""
    import torch

    if named := os.environ.get("MEDCOT_PROFILE"):
        return named, "set by MEDCOT_PROFILE"
    if torch.cuda.is_available():
        return "kaggle-t4-fast", f"found {torch.cuda.get_device_name(0)}"
    return "tiny", "no CUDA GPU here"


def _session(profile: str, gpu: str | None) -> dict:
    """What machine and environment say of a run, by field."""
    # Unsloth uses a GPU wherever it finds one, so a profile made for a CPU then runs there too.
    found = {
        "device": "cuda" if gpu else "cpu",
        "output_dir": Path(os.environ.get("MEDCOT_OUT") or default_output(profile)).absolute(),
    }
    if on_kaggle():  # a session ends after 12 hours; what is attached to it is below /kaggle/input
        found |= {"session_minutes": 700.0, "earlier_output": kaggle_root() / "input"}
    named = {
        "MEDCOT_MODEL": "model", "MEDCOT_DATASET": "dataset", "MEDCOT_CHOICES": "choice_dataset",
        "MEDCOT_EARLIER": "earlier_output",
    }  # fmt: skip
    if minutes := os.environ.get("MEDCOT_SESSION_MINUTES"):
        try:
            found["session_minutes"] = float(minutes)
        except ValueError as error:
            raise MedcotError(f"MEDCOT_SESSION_MINUTES={minutes!r} is no number: give minutes, or 0") from error
    return found | {field: os.environ[variable] for variable, field in named.items() if os.environ.get(variable)}


def load_run(output_dir: Path | None = None) -> Settings:
    """The settings that the run in an output folder was made with; those of `load_settings` where there is none yet.

    For what only uses a run (asking, exporting): its numbers are its own, whatever the environment says. Machine and folder
    are those of today. Raises MedcotError as `load_settings` does, and for a record that cannot be read.
    """
    out = Path(output_dir or os.environ.get("MEDCOT_OUT") or default_output(_profile()[0])).absolute()
    if not (out / identity.RECORD_FILE).is_file():
        return load_settings(output_dir=out)
    prepare_environment()
    import torch

    try:
        recorded = json.loads((out / identity.RECORD_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedcotError(
            f"{out / identity.RECORD_FILE} cannot be read ({error}): run 02_finetune.ipynb again"
        ) from error
    here = {"output_dir": out, "device": "cuda" if torch.cuda.is_available() else "cpu", "earlier_output": None}
    if not Path(recorded["model"]).exists() and Path(recorded["model"]).name == Path(EMBEDDED_MODEL).name:
        here["model"] = EMBEDDED_MODEL  # a clone that has moved
    settings = Settings(**recorded | here)
    print(f"run in {out}: profile {settings.profile}, model {short(settings.model)}")
    return settings


def read_settings(file: Path) -> Settings:
    """The settings that were written to a file as JSON. Raises MedcotError for a file that is not such."""
    prepare_environment()
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        return Settings(**values | {"profile": values["profile"]})
    except MedcotError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedcotError(
            f"{file} holds no settings ({error}): leave --settings out to take them from the environment"
        ) from error
