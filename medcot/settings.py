"""Every number of a run: the settings with their limits, and the profiles."""

import difflib
import functools
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from .environment import (
    NOTICE,
    VARIABLES,
    MedcotError,
    check_output,
    default_output,
    kaggle_root,
    on_kaggle,
    prepare_environment,
)

__all__ = ["ADAPTER_FOLDER", "EMBEDDED_CASES", "EMBEDDED_MODEL", "HELD_OUT_SEED", "NOTICE", "PROFILES", "MedcotError", "Settings",
           "kaggle_root", "load_settings", "on_kaggle", "prepare_environment", "read_settings"]  # fmt: skip

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny" / "model")
EMBEDDED_CASES = "embedded cases"
HELD_OUT_SEED = 2026  # draws the embedded evaluation cases: the same ones whatever seed a run trains with
ADAPTER_FOLDER = "DeepSeek-R1-Medical-COT"
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]  # 0 switches off what is counted
Name = Annotated[str, Field(pattern=r"\S")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Place = Annotated[Path, Strict(False)]  # text names a path too


def _in_our_words(cls):
    """Has a class of settings raise one MedcotError that names every value that cannot be."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self, *arguments, **values):
        try:
            init(self, *arguments, **values)
        except ValidationError as error:
            raise MedcotError("these settings cannot run: " + "; ".join(map(_complaint, error.errors()))) from None

    cls.__init__ = checked
    return cls


def _complaint(error: dict) -> str:
    """One finding of pydantic; a conflict between fields, found by our own validator, is in our words already."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name, message = error["loc"][0], error["msg"].replace("Input should be", "must be")
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(name, [field.name for field in fields(Settings)])
    if error["type"] == "string_pattern_mismatch":
        message = "must not be empty: name one"
    return f"{name}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name} is unknown: " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}")


@_in_our_words
@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Settings:
    """One run. Frozen: a variant is `load_settings(max_steps=20)` or `dataclasses.replace`, which check it again."""

    profile: Name
    """Name of the profile these numbers started from."""

    # model
    model: Name = "unsloth/DeepSeek-R1-Distill-Llama-8B"
    """Hub name or local folder of the base model; Unsloth maps this name to its 4-bit copy (6.0 GB)."""
    model_revision: str | None = None
    """Commit, tag or branch of the repository that is loaded (the 4-bit copy, where there is one); None takes the newest."""
    load_in_4bit: bool = True
    """NF4 weights through bitsandbytes."""
    max_seq_length: Annotated[int, Field(ge=128)] = 2048
    """Longest training example, prompt and completion, in tokens."""
    device: Literal["cuda", "cpu"] = "cuda"
    """"cuda" (float16, as a T4 has no bfloat16) or "cpu" (float32)."""

    # data
    dataset: Name = "FreedomIntelligence/medical-o1-reasoning-SFT"
    """Hub name, a local file or folder (json, jsonl, csv, parquet), or the embedded cases."""
    dataset_config: str | None = "en"
    """Configuration of a hub data set; not used for files."""
    dataset_revision: str | None = None
    """Commit, tag or branch of a hub data set; None takes the newest and records which it was."""
    question_column: Name = "Question"
    """Column that holds the question."""
    reasoning_column: Name = "Complex_CoT"
    """Column that holds the chain of thought."""
    response_column: Name = "Response"
    """Column that holds the answer."""
    train_rows: Count = 500
    """Training rows: the first ones of the data set."""
    eval_rows: Count = 100
    """Evaluation rows: the ones right after the training rows."""
    answer_rows: Count = 18
    """How many of the evaluation rows are answered by generation, to be read."""

    # multiple choice
    choice_dataset: Name = "GBaker/MedQA-USMLE-4-options"
    """Multiple-choice questions: a hub name (its test split), a local jsonl file, or the embedded cases."""
    choice_dataset_revision: str | None = None
    """Commit, tag or branch of that hub data set; None takes the newest and records which it was."""
    choice_rows: Count = 1273
    """Questions answered by likelihood, the first ones: 1,273 is the whole MedQA test set."""
    choice_answer_rows: CountOrNone = 31
    """How many of them are answered by generation too: 18 + 31 + the showcase question = 50 answers a side."""
    chat_rows: CountOrNone = 200
    """How many of them the base model also answers by likelihood through its own chat template; 0: nothing through it."""
    score_batch_tokens: Count = 8192
    """Tokens in one forward pass of scoring, padding included; 8,192 take under 3 GiB beside the 8B."""
    primary_measure: Literal["multiple choice", "right answer"] = "multiple choice"
    """The measure that decides, declared before anything is measured: questions answered by likelihood, or in words."""

    # LoRA
    r: Count = 16
    """Rank of the update."""
    lora_alpha: Count = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs dropped in training; Unsloth's fast path wants 0."""
    target_modules: Annotated[tuple[Name, ...], Strict(False), Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Projections that get an update."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, but 8 B parameters fit a T4 only so."""
    activation_memory_gib: Amount = 0.0
    """GiB of activations that may be kept instead (8 suits a T4); as many layers as fit it at the longest batch."""
    padding_free: bool = False
    """Lay the examples of a batch end to end instead of padding them to the longest (GPU only; attention stays apart)."""

    # training
    per_device_train_batch_size: Count = 2
    """Examples per forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per step: 2 x 4 = 8 examples a step."""
    nproc_per_node: Count = 1
    """Processes, one a GPU, that torchrun starts for training and evaluation; examples and batches are divided among them."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Peak learning rate; 2e-4 is usual for LoRA."""
    max_steps: Count = 60
    """Optimizer steps: 60 x 8 = 480 examples, just under one pass over 500 rows."""
    warmup_steps: CountOrNone = 5
    """Steps over which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Decay after the warm-up."""
    optim: Name = "adamw_8bit"
    """Optimizer; on a CPU Unsloth replaces the 8-bit one by fused AdamW."""
    weight_decay: Amount = 0.01
    """AdamW's decay per step, times the learning rate."""
    completion_only_loss: bool = False
    """False supervises the whole text, as the original run did; True only what follows the prompt."""
    logging_steps: Count = 1
    """Steps between two points of the loss curve."""
    eval_steps: Count = 20
    """Steps between two measurements of the held-out loss."""
    eval_loss_rows: Count = 16
    """Evaluation rows whose loss is measured in training."""
    save_steps: Count = 10
    """Steps between two checkpoints, of which the last two are kept; a step of the 8B takes 10 to 20 s on a T4."""
    session_minutes: Amount = 0.0
    """Minutes after the session's start at which training stops with a checkpoint; 0 sets no limit. Kaggle: 700 of 720."""
    seed: CountOrNone = 3407
    """Seed of the adapters and of the row order."""

    # generation
    max_new_tokens: Count = 1024
    """Longest answer in tokens; decoding is greedy, so that only the weights differ between before and after."""
    generation_batch_size: Count = 16
    """Questions answered at once, at most. For up to 16 a T4 multiplies by the 4-bit weights as they are; for more, each
    token unpacks all of them into 14 GB first (unsloth's fast_linear_forward on sm_75)."""
    generation_memory_gib: Annotated[float, Field(gt=0)] = 6.5
    """GiB on a GPU for what a batch of questions needs beside the weights; batches of long questions are made smaller."""

    # tracking and files
    report_to: Literal["wandb", "none"] = "wandb"
    """"wandb" (online with a key and a network, else offline files) or "none"."""
    wandb_project: str = "medcot"
    """Project name in Weights & Biases."""
    output_dir: Place = Path("outputs")
    """Everything a run writes is below this folder."""
    earlier_output: Place | None = None
    """Folder that holds the output of an earlier session, whose checkpoints are continued; on Kaggle what is attached."""

    @model_validator(mode="after")
    def _fit_each_other(self):
        wrong = []
        if self.warmup_steps >= self.max_steps:
            wrong.append(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}: lower warmup_steps"
            )
        wrong += [
            f"{name}={getattr(self, name)} exceeds eval_rows={self.eval_rows}: lower {name} or raise eval_rows"
            for name in ("answer_rows", "eval_loss_rows")
            if getattr(self, name) > self.eval_rows
        ]
        if self.device == "cpu" and self.max_seq_length * self.per_device_train_batch_size > 2**18:
            wrong.append(
                f"max_seq_length={self.max_seq_length} x per_device_train_batch_size={self.per_device_train_batch_size} "
                "tokens do not fit a CPU run: lower one of them"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def examples_per_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.nproc_per_node

    @property
    def adapter_dir(self) -> Path:
        """The folder that 02_finetune writes and 03_compare reads."""
        return self.output_dir / ADAPTER_FOLDER

    def recipe(self):
        """What will be computed, as a `pandas.DataFrame` of ten lines: model, rows, steps, learning rate, LoRA, measure."""
        import pandas

        processes = f" x {self.nproc_per_node} processes" if self.nproc_per_node > 1 else ""
        lines = {
            "model": f"{_short(self.model)}, {'4-bit' if self.load_in_4bit else '16-bit'}, on {self.device}",
            "training rows": f"the first {self.train_rows:,} of {_short(self.dataset)}",
            "evaluation rows": f"the {self.eval_rows:,} after them, {self.answer_rows} answered in words",
            "steps": f"{self.max_steps} x {self.examples_per_step} examples = {self.max_steps * self.examples_per_step:,}",
            "examples a step": f"{self.per_device_train_batch_size} at once x {self.gradient_accumulation_steps}{processes}",
            "learning rate": f"{self.learning_rate:g}, {self.lr_scheduler_type}, {self.warmup_steps} steps of warm-up",
            "LoRA": f"r {self.r}, alpha {self.lora_alpha}, dropout {self.lora_dropout:g}, {len(self.target_modules)} projections",
            "supervised": "reasoning and response"
            if self.completion_only_loss
            else "the whole text, question included",
            "multiple choice": f"{self.choice_rows:,} questions of {_short(self.choice_dataset)}",
            "primary measure": self.primary_measure,
        }
        return pandas.DataFrame({"": lines})


def _short(name: str) -> str:
    return "the embedded model" if name == EMBEDDED_MODEL else Path(name).name


_KAGGLE_T4 = Settings(profile="kaggle-t4")
# The same rows, the same eight examples a step and the same losses, arranged for speed (tests/benchmarks/README.md).
_KAGGLE_T4_FAST = replace(
    _KAGGLE_T4, profile="kaggle-t4-fast", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    padding_free=True, activation_memory_gib=8.0,
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
    "tiny": _TINY,
    "smoke": replace(
        _TINY, profile="smoke", train_rows=64, eval_rows=12, answer_rows=6, per_device_train_batch_size=4,
        max_steps=6, warmup_steps=1, logging_steps=1, eval_steps=3, eval_loss_rows=4, save_steps=3, max_new_tokens=96,
        choice_rows=12, chat_rows=6,
    ),
}  # fmt: skip


def load_settings(**changes) -> Settings:
    """The settings of this session, with one printed line that says what was chosen and why.

    `MEDCOT_PROFILE` names a profile; without it a CUDA GPU means `kaggle-t4` and no GPU means `tiny`. The other
    variables (`VARIABLES`) replace model, data, questions and folders, and `changes` any field: `load_settings(max_steps=100)`.
    Raises MedcotError for an unknown name, whose nearest neighbour it names, for a profile that needs a GPU where there is
    none, for an output folder that cannot be written to, and for one that holds another run (`identity.check`).
    """
    prepare_environment()
    import torch  # here, because the rooms that only read settings start without it

    for variable in os.environ:
        if variable.startswith("MEDCOT_") and variable not in VARIABLES:
            raise MedcotError(f"the environment variable {_unknown(variable, VARIABLES)}")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    profile = os.environ.get("MEDCOT_PROFILE")
    why = "set by MEDCOT_PROFILE" if profile else f"found {gpu}" if gpu else "no CUDA GPU here"
    profile = profile or ("kaggle-t4" if gpu else "tiny")
    if profile not in PROFILES:
        raise MedcotError(f"MEDCOT_PROFILE={profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    if settings.device == "cuda" and not gpu:
        raise MedcotError(
            f"profile {profile!r} needs a CUDA GPU and this machine has none: "
            "choose MEDCOT_PROFILE=tiny, or a Kaggle session with the accelerator GPU T4 x2"
        )
    settings = replace(settings, **_session(profile, gpu) | changes)
    check_output(settings.output_dir)
    from . import identity  # which knows settings

    identity.check(settings)
    print(
        f"profile {settings.profile} ({why}), model {settings.model}, data {settings.dataset}, "
        f"device {gpu if settings.device == 'cuda' else 'CPU'}, files in {settings.output_dir}"
    )
    return settings


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
    return found | {field: os.environ[variable] for variable, field in named.items() if os.environ.get(variable)}


def read_settings(file: Path) -> Settings:
    """The settings that were written to a file as JSON. Raises MedcotError for a file that is not such."""
    prepare_environment()
    try:
        return Settings(**json.loads(Path(file).read_text(encoding="utf-8")))
    except MedcotError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise MedcotError(
            f"{file} holds no settings ({error}): leave --settings out to take them from the environment"
        ) from error
