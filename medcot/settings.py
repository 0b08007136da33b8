"""Every number of a run, with its limits."""

import difflib
import functools
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from .environment import NOTICE, MedcotError, kaggle_root, on_kaggle

__all__ = ["ADAPTER_FOLDER", "EMBEDDED_CASES", "EMBEDDED_MODEL", "HELD_OUT_SEED", "NOTICE", "MedcotError", "Settings",
           "kaggle_root", "neighbour", "on_kaggle"]  # fmt: skip

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny" / "model")
EMBEDDED_CASES = "embedded cases"
USUAL_TRAIN_ROWS = 500  # the first rows of a data set, after which the evaluation rows of a usual run stand
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
        return neighbour(name, [field.name for field in fields(Settings)])
    if error["type"] == "string_pattern_mismatch":
        message = "must not be empty: name one"
    return f"{name}={error['input']!r}: {message[0].lower()}{message[1:]}"


def neighbour(name: str, known) -> str:
    """In words, that a name is unknown, and the known one that it is nearest to."""
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
    """"cuda" (in `dtype`) or "cpu" (float32)."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """What a GPU computes in: float16 everywhere (a T4 has no bfloat16); the profile "gpu" asks the card."""

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
    train_rows: CountOrNone = USUAL_TRAIN_ROWS
    """Training rows: the first ones of the data set; 0 trains on all but the evaluation rows."""
    eval_rows: Count = 100
    """Evaluation rows: the ones right after the training rows, with train_rows=0 after the first 500, as of a usual run."""
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
    activation_host_gib: Amount = 0.0
    """GiB of host memory that the other layers' activations may be sent to (12 suits Kaggle); what fits neither is recomputed."""
    padding_free: bool = False
    """Lay the examples of a batch end to end instead of padding them to the longest (GPU only; attention stays apart)."""

    # training
    per_device_train_batch_size: Count = 2
    """Examples per forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per step: 2 x 4 = 8 examples a step."""
    nproc_per_node: Count = 1
    """Processes in all, one a GPU, that torchrun starts for training and evaluation; examples and batches are divided among
    them. Named as torchrun's own flag because one machine is usual; of several it counts the GPUs of all."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Peak learning rate; 2e-4 is usual for LoRA."""
    max_steps: CountOrNone = 60
    """Optimizer steps: 60 x 8 = 480 examples, just under one pass over 500 rows; 0 is exactly one pass over the rows."""
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
    generation_batch_size: Count = 32
    """Questions answered at once, at most. For up to 32 a T4 multiplies by the 4-bit weights as they are; for more, each
    token unpacks all of them into 14 GB first (`kernels.install`)."""
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
        if 0 < self.max_steps <= self.warmup_steps:  # of one pass it is known with the rows: `training.total_steps`
            wrong.append(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}: lower warmup_steps"
            )
        if not self.train_rows and self.dataset == EMBEDDED_CASES:
            wrong.append("train_rows=0 means all rows of a data set, and the embedded cases have no end: give a number")
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
        rows, examples = short(self.dataset), self.examples_per_step
        lines = {
            "model": f"{short(self.model)}, {'4-bit' if self.load_in_4bit else '16-bit'}, on {self.device}",
            "training rows": f"{f'the first {self.train_rows:,}' if self.train_rows else 'all the other rows'} of {rows}",
            "evaluation rows": f"{self.eval_rows:,} after the first {self.train_rows or USUAL_TRAIN_ROWS:,}, "
            f"{self.answer_rows} answered in words",
            "steps": f"{self.max_steps or 'one pass'}, {examples} examples each"
            + f", {self.max_steps * examples:,} in all" * bool(self.max_steps),
            "examples a step": f"{self.per_device_train_batch_size} at once x {self.gradient_accumulation_steps}{processes}",
            "learning rate": f"{self.learning_rate:g}, {self.lr_scheduler_type}, {self.warmup_steps} steps of warm-up",
            "LoRA": f"r {self.r}, alpha {self.lora_alpha}, dropout {self.lora_dropout:g}, {len(self.target_modules)} projections",
            "supervised": f"{'' if self.completion_only_loss else 'question, '}reasoning and response",
            "multiple choice": f"{self.choice_rows:,} questions of {short(self.choice_dataset)}",
            "primary measure": self.primary_measure,
        }
        return pandas.DataFrame({"": lines})


def short(name: str) -> str:
    """A model or data set by the last part of its name."""
    return "the embedded model" if name == EMBEDDED_MODEL else Path(name).name
