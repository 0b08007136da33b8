"""The trainer: a plain function that returns a stock TRL trainer; and what its first steps say of the whole run."""

import math
import os
from dataclasses import dataclass

from .model import for_training
from .settings import MedcotError

FORECAST_STEPS = 3  # steps after which a run says how long it will take
QUOTA_HOURS = 30  # of a GPU that Kaggle gives away in a week, by the clock


def make_trainer(model, tokenizer, examples, settings, held_out=None):
    """A stock `trl.SFTTrainer` for `examples` (`to_examples`).

    `held_out` examples have their loss measured every `eval_steps` steps. The mask in `completion_mask` decides what is
    supervised; `max_length` is always set, so that TRL's default of 1,024 never cuts an answer off. `run.resume.train`
    trains it with a chart, checkpoints that can be trusted and a record; `trainer.train()` without.
    """
    # The rows' true lengths, not max_seq_length, decide what the longest micro-batch can need.
    from .activations import arrange_activations

    activations = arrange_activations(model, list(map(len, examples["input_ids"])), settings)
    if activations.sent or settings.activation_memory_gib:
        print(activations)
    from transformers import PrinterCallback
    from trl import SFTTrainer

    adapters = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    trainer = SFTTrainer(
        model=for_training(model),
        processing_class=tokenizer,
        args=_arguments(settings, held_out, total_steps(len(examples), settings)),
        train_dataset=examples,
        eval_dataset=held_out,
    )
    for weight, values in adapters:  # TRL rounds them to bfloat16 on a CPU; a checkpoint comes back as float32
        weight.data = values.float()
    trainer.train_dataset.info.description = examples.info.description  # which rows these are, for `identity`
    trainer.remove_callback(PrinterCallback)  # the bar and the chart show what it would print line by line
    return trainer


def total_steps(examples: int, settings) -> int:
    """Optimizer steps of a run on so many examples: `max_steps`, or with 0 those of one pass, the last of which may be short.

    The one place that knows: what runs reads `trainer.args.max_steps`. Raises MedcotError if the warm-up leaves nothing of a pass.
    """
    steps = settings.max_steps or math.ceil(examples / settings.examples_per_step)
    if settings.warmup_steps >= steps:
        raise MedcotError(
            f"warmup_steps={settings.warmup_steps} leaves nothing of one pass over {examples:,} examples, {steps} steps: "
            "lower warmup_steps"
        )
    return steps


def _arguments(settings, held_out, steps: int):
    """`settings` as a `trl.SFTConfig`."""
    import torch
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    if settings.optim not in list(OptimizerNames):
        raise MedcotError(f"optim={settings.optim!r} is unknown: adamw_8bit is usual, adamw_torch takes more memory")
    arguments = SFTConfig(
        output_dir=str(settings.output_dir / "checkpoints"),
        max_length=settings.max_seq_length,
        completion_only_loss=True,  # the mask rules: to_examples set it to all ones where the whole text is supervised
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        max_steps=steps,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler_type,
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_nan_inf_filter=False,  # a loss that is not finite is shown, not replaced by a mean
        seed=settings.seed,
        data_seed=settings.seed,
        fp16=settings.device == "cuda" and settings.dtype == "float16",
        bf16=settings.device == "cuda" and settings.dtype == "bfloat16",
        use_cpu=settings.device == "cpu",
        ddp_backend="gloo" if settings.device == "cpu" and "LOCAL_RANK" in os.environ else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        padding_free=settings.padding_free,
        # Laid end to end, examples have any number of tokens; matrix units take them in eights.
        pad_to_multiple_of=8 if settings.padding_free and settings.device == "cuda" else None,
        report_to=settings.report_to,
        disable_tqdm=True,  # a bar as text instead, which also a batch log and a terminal show
    )
    if settings.device == "cpu":
        # accelerate numbers the CPUs of several processes ("cpu:0"), which torch.load does not know where it resumes.
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments


@dataclass(frozen=True)
class Forecast:
    """What the first steps of a run say of all of it."""

    steps: int
    """Steps that were to come when the run began."""
    minutes: float
    """Of training, for all of them."""
    minutes_left: float | None
    """Of the session when training began; None where it has no limit."""
    peak_gib: float | None = None
    """GPU memory at the widest micro-batch; None without a GPU."""
    gpu_gib: float | None = None
    """GPU memory that there is."""
    session_minutes: float | None = None
    """Of each session that follows; None where sessions have no limit."""

    @property
    def sessions(self) -> int:
        """Sessions that the training takes: what is left of this one and, beyond it, whole ones."""
        if not self.session_minutes or self.minutes_left is None or self.minutes <= self.minutes_left:
            return 1
        return 1 + math.ceil((self.minutes - self.minutes_left) / self.session_minutes)

    def __str__(self):
        words = (
            f"forecast from the first {FORECAST_STEPS} steps: {self.steps} steps take about {self.minutes:.1f} minutes"
        )
        if self.minutes_left is not None:
            words += f" of {self.minutes_left:.0f} that the session has left"
            if self.minutes > self.minutes_left:
                words += " (too few: training will stop before that, with a checkpoint to go on from)"
            if self.session_minutes:
                sessions = "1 session" if self.sessions == 1 else f"{self.sessions} sessions"
                words += f", {sessions} of {self.session_minutes:.0f} minutes, {self.minutes / 60:.1f} of a week's "
                words += f"{QUOTA_HOURS} GPU hours on Kaggle"
        if self.peak_gib is not None:
            words += f" and {self.peak_gib:.1f} of {self.gpu_gib:.1f} GiB of GPU memory at the widest batch"
            if self.peak_gib > self.gpu_gib:
                words += " (too little: when it runs out, the micro-batch is made smaller)"
        return words


def forecast(epoch: list[list[int]], seconds: list[float], first: int, steps: int, **there) -> Forecast:
    """How long `steps` steps in all will take, by the first ones.

    `epoch`: for each step of an epoch, the tokens of its micro-batches, padding included. `seconds` each of the
    first steps took, the run having begun at step `first`. Seconds a token are taken from the steps after the first, which
    compiles; the tokens of every step to come are known, since the order of the rows is. `there` may give `minutes_left`
    and `session_minutes`, and `memory_before`, `memory_peak` and `memory` in bytes: use grows in proportion to the widest micro-batch above what
    was in use before.
    """
    widths, done = [sum(step) for step in epoch], first + len(seconds)
    timed = [i % len(epoch) for i in range(first, done)]
    rate = sum(seconds[1:]) / sum(widths[i] for i in timed[1:])
    to_come = sum(widths[i % len(epoch)] for i in range(done, steps))
    minutes = (sum(seconds) + rate * to_come) / 60
    limits = {"minutes_left": there.get("minutes_left"), "session_minutes": there.get("session_minutes")}
    if "memory_peak" not in there:
        return Forecast(steps - first, minutes, **limits)
    before, seen = there["memory_before"], max(max(epoch[i]) for i in timed)
    peak = before + (there["memory_peak"] - before) * max(map(max, epoch)) / seen
    return Forecast(steps - first, minutes, peak_gib=peak / 2**30, gpu_gib=there["memory"] / 2**30, **limits)


def token_widths(trainer) -> list[list[int]]:
    """For each step of an epoch, the tokens of its micro-batches on this process, padding included."""
    args, lengths = trainer.args, list(map(len, trainer.train_dataset["input_ids"]))
    batches = [[lengths[i] for i in batch] for batch in trainer.get_train_dataloader().batch_sampler]
    widths = [sum(batch) if args.padding_free else len(batch) * max(batch) for batch in batches]
    size = args.gradient_accumulation_steps
    return [widths[i : i + size] for i in range(0, len(widths), size)]
