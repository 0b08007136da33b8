"""The trainer: a plain function that returns a stock TRL trainer."""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from .modeling import for_training, keep_activations
from .settings import MedcotError, check_disk, on_all_gpus, on_interrupt, on_kaggle, only_process
from .tracking import LossChart, configure_wandb

RECORD_FILE = "training.json"
LOG_MARK = "medcot-log "
CHECKPOINT_FILE = "checkpoint.json"  # written last into a checkpoint: without it the checkpoint is not finished
FORECAST_STEPS = 3  # steps after which a run says how long it will take
MAX_SKIPPED = 10  # updates skipped in a row before training stops; in fp16 the first one to three are usual
# A checkpoint may be continued whatever these say: they do not change what a step computes. The data's own fields are
# not compared because the examples made of them are.
_FREE = (
    "profile", "dataset", "dataset_config", "dataset_revision", "train_rows", "eval_rows", "answer_rows",
    "max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "nproc_per_node", "activation_memory_gib", "padding_free", "logging_steps", "eval_steps", "eval_loss_rows", "save_steps",
    "session_minutes", "max_new_tokens", "generation_batch_size", "generation_memory_gib", "temperature", "report_to",
    "wandb_project", "output_dir", "earlier_output", "choice_dataset", "choice_dataset_revision", "choice_rows",
    "choice_answer_rows", "chat_rows", "score_batch_tokens",
)  # fmt: skip


def make_trainer(model, tokenizer, examples, settings, held_out=None):
    """A stock `trl.SFTTrainer` for `examples` (`to_examples`), with the live chart and wandb attached.

    `held_out` examples have their loss measured every `eval_steps` steps. The mask in `completion_mask` decides what is
    supervised; `max_length` is always set, so that TRL's default of 1,024 never cuts an answer off.
    """
    configure_wandb(settings)
    if settings.activation_memory_gib and settings.device == "cuda":
        # The rows' true lengths, not max_seq_length, decide what the longest batch can need.
        lengths = sorted(map(len, examples["input_ids"]))[-settings.per_device_train_batch_size :]
        layers = keep_activations(model, sum(lengths), settings.activation_memory_gib)
        print(
            f"{layers} of {model.config.num_hidden_layers} layers keep their activations: the longest {len(lengths)} "
            f"examples have {sum(lengths):,} tokens"
        )
    from transformers import PrinterCallback
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig, SFTTrainer

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
        max_steps=settings.max_steps,
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
        fp16=settings.device == "cuda",
        bf16=False,
        use_cpu=settings.device == "cpu",
        ddp_backend="gloo" if settings.device == "cpu" and "LOCAL_RANK" in os.environ else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        padding_free=settings.padding_free,
        report_to=settings.report_to,
        disable_tqdm=True,  # a bar as text instead, which also a batch log and a terminal show
    )
    adapters = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    trainer = SFTTrainer(
        model=for_training(model),
        processing_class=tokenizer,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        callbacks=[_callback(settings)],
    )
    for weight, values in adapters:  # TRL rounds them to bfloat16 on a CPU; a checkpoint comes back as float32
        weight.data = values.float()
    if settings.padding_free:
        trainer.get_train_dataloader = partial(_even_loader, trainer, trainer.get_train_dataloader)
    _run_callback(trainer).trainer = trainer
    trainer.remove_callback(PrinterCallback)  # the bar and the chart show what it would print line by line
    return trainer


class EvenSampler:
    """The examples of another sampler, those of each step arranged so that its micro-batches have nearly as many tokens.

    Without padding a micro-batch takes as long as it has tokens, and two GPUs as long as the slower one: with the data
    set's lengths the fuller of two micro-batches of 4 has 5 to 6 % more than half as drawn and 1 % more arranged. No
    loss changes, since a step sees the same examples, but for those that fill up an epoch's last step on several GPUs.
    Each example, the longest first, goes to the micro-batch with the fewest tokens that has room (Graham's longest
    processing time rule). With the sampler that transformers has for this, `batch_rebalance`, the fuller one would have
    11 % more: it counts padding, which is not there.
    """

    def __init__(self, sampler, lengths: list[int], examples_per_step: int, micro_batch: int):
        self.sampler, self.lengths, self.step, self.size = sampler, lengths, examples_per_step, micro_batch

    def __len__(self):
        return len(self.sampler)

    def set_epoch(self, epoch: int):
        self.sampler.set_epoch(epoch)

    def __iter__(self):
        order = list(self.sampler)
        for first in range(0, len(order), self.step):
            drawn = order[first : first + self.step]
            yield from drawn if len(drawn) < self.step else self._arranged(drawn)

    def _arranged(self, drawn):
        batches = [[] for _ in range(self.step // self.size)]
        for i in sorted(drawn, key=self.lengths.__getitem__, reverse=True):
            with_room = (batch for batch in batches if len(batch) < self.size)
            min(with_room, key=lambda batch: sum(self.lengths[j] for j in batch)).append(i)
        return itertools.chain.from_iterable(batches)


def _even_loader(trainer, loader):
    made, args = loader(), trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    lengths = list(map(len, trainer.train_dataset["input_ids"]))
    made.set_sampler(EvenSampler(made.get_sampler(), lengths, step, args.per_device_train_batch_size))
    return made


def train(trainer, settings):
    """Trains to `max_steps`, from the newest whole checkpoint of the same run on if there is one (`last_checkpoint`).

    Stops early, with a checkpoint and a printed line that says how to continue, when the session's minutes are used or
    on an interrupt (Ctrl-C, the notebook's stop button). When memory runs out, the micro-batch is divided and the
    accumulation multiplied, so that a step sees the same examples. A run that stopped on several GPUs is taken over as
    it stands where this is one process: `train_on_all_gpus` goes on with it. Raises MedcotError for a checkpoint of
    another run, a nearly full disk, more than `MAX_SKIPPED` updates skipped in a row, one example that does not fit the
    memory, and a second process that trains into the same folder.
    """
    import wandb
    from accelerate.utils.memory import should_reduce_batch_size
    from transformers.integrations import WandbCallback

    folder = settings.output_dir / "checkpoints"
    callback = _run_callback(trainer)
    callback.stop = None
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, WandbCallback) and wandb.run is None:
            tracker._initialized = False  # a run that this trainer finished before cannot be logged to
    alone = only_process(folder) if trainer.is_world_process_zero() else contextlib.nullcontext()
    with alone, _stopping_after_the_step(callback):
        while True:
            checkpoint = last_checkpoint(settings, trainer.train_dataset)
            if (stopped := _stopped(checkpoint)) and trainer.args.world_size < settings.nproc_per_node:
                _take_over(trainer, checkpoint, settings)
                print(
                    f"{stopped}: the adapter is that of this step. Run train_on_all_gpus(settings) to go on from "
                    f"{checkpoint}; in a new session attach this one's output first"
                )
                return
            _check_processes(trainer, settings, _step(checkpoint) if checkpoint else 0)
            if checkpoint and _step(checkpoint) >= settings.max_steps:
                _take_over(trainer, checkpoint, settings)
                print(f"already trained, {checkpoint} is its end: delete {checkpoint.parent} to train anew")
                return
            if checkpoint:
                print(f"going on from {checkpoint}")
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or callback.updating or trainer.args.world_size > 1:
                    raise
            # Out of the except block, so that the failed step's tensors are gone.
            _reduce_micro_batch(trainer, settings, callback)
    if trainer.state.global_step < settings.max_steps:
        print(
            f"stopped at step {trainer.state.global_step} of {settings.max_steps} ({callback.stop}). Continue with this "
            f"notebook, run again: it goes on from {folder}; in a new session attach this one's output first"
        )


def _check_processes(trainer, settings, step: int):
    """Raises MedcotError if the processes at work are not those that the settings count on, or see other checkpoints."""
    from accelerate.utils import gather_object

    args = trainer.args
    steps = gather_object([step])
    if len(set(steps)) > 1:
        raise MedcotError(f"the processes see checkpoints of steps {steps}: MEDCOT_OUT must be a folder they all share")
    now = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if now != settings.examples_per_step and step < settings.max_steps:
        raise MedcotError(
            f"{args.world_size} process here would take {now} examples a step and the settings say "
            f"{settings.examples_per_step} (nproc_per_node={settings.nproc_per_node}), at step {step} of "
            f"{settings.max_steps}: run train_on_all_gpus(settings), which goes on from there, or choose another profile"
        )


def _run_callback(trainer):
    return next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "RunCallback")


def _stopping_after_the_step(callback):
    """Turns the first interrupt into a wish to stop after the step at hand; a second one interrupts as usual."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number, frame):
        callback.stop = "interrupted"
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step, with a checkpoint; interrupt again to stop at once without one")

    return on_interrupt(stop)


def last_checkpoint(settings, examples) -> Path | None:
    """The newest whole checkpoint of this run in `output_dir` or `earlier_output`; None if there is none.

    Unfinished and damaged ones are named in a printed line and passed over. Raises MedcotError if the newest whole one
    is of another run, naming every setting that differs.
    """
    folders = [settings.output_dir / "checkpoints"]
    if settings.earlier_output is not None:
        folders += sorted(settings.earlier_output.rglob("checkpoints"))
    found = [path for folder in folders for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for checkpoint in sorted(found, key=_step, reverse=True):
        if damage := _damage(checkpoint):
            print(f"{checkpoint} {damage}: passed over for the one before")
            if checkpoint.parent == folders[0]:
                shutil.rmtree(checkpoint, ignore_errors=True)  # or it would count as one of the two that are kept
            continue
        there = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        if odd := _differences(there, _identity(settings, examples)):
            cure = "choose another output folder (MEDCOT_OUT) or delete the checkpoints to train anew"
            if checkpoint.parent != folders[0]:
                cure = "detach that input, or set MEDCOT_EARLIER to an empty folder, to train anew"
            raise MedcotError(f"{checkpoint} is of another run: {', '.join(odd)}. Set that back, or {cure}")
        return checkpoint
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def _stopped(checkpoint: Path | None) -> str | None:
    """The note of a run that ended with this checkpoint before its last step; None if it did not end here."""
    if checkpoint is None:
        return None
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    stops = (entry["note"] for entry in history if entry.get("stopped") and entry["step"] == _step(checkpoint))
    return next(stops, None)


def _identity(settings, examples) -> dict:
    """What must agree for one run to go on from another's checkpoint: the settings and the training examples."""
    values = json.loads(json.dumps(asdict(settings), default=str))
    tokens = json.dumps(examples["input_ids"][:]).encode()
    return {
        "settings": values | {"examples_per_step": settings.examples_per_step},
        "examples": hashlib.sha256(tokens).hexdigest(),
    }


def _differences(there: dict, now: dict) -> list[str]:
    """In words, what a checkpoint was made with that is not so now."""
    other_rows = there["examples"] != now["examples"]
    names = [name for name in now["settings"] if name not in _FREE]
    names += ["dataset", "dataset_revision", "train_rows", "max_seq_length"] if other_rows else []
    odd = [
        f"{name} was {there['settings'].get(name)!r} and is {now['settings'][name]!r}"
        for name in names
        if there["settings"].get(name) != now["settings"][name]
    ]
    return odd or ["the training examples are others"] * other_rows


def _seal(checkpoint: Path, identity: dict):
    """Marks a checkpoint as finished: the digests of its files and what run it is of, written beside and renamed."""
    digests = {file.name: _digest(file) for file in sorted(checkpoint.iterdir()) if file.is_file()}
    fresh = checkpoint / f"{CHECKPOINT_FILE}.saving"
    fresh.write_text(json.dumps(identity | {"files": digests}, indent=1), encoding="utf-8")
    fresh.replace(checkpoint / CHECKPOINT_FILE)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    try:
        sealed = json.loads((checkpoint / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        files, _, _ = sealed["files"], sealed["settings"].items(), sealed["examples"]
        wrong = [name for name, digest in files.items() if _digest(checkpoint / name) != digest]
    except FileNotFoundError as error:
        return "was not finished" if Path(error.filename).name == CHECKPOINT_FILE else f"lacks {error.filename}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    return f"is damaged in {', '.join(wrong)}" if wrong else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_over(trainer, checkpoint: Path, settings):
    """Gives the trainer the weights and the history of an ended run; writes its record if a kill prevented that."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    recorded = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recorded = json.loads((settings.output_dir / RECORD_FILE).read_text(encoding="utf-8"))["steps"]
    if trainer.is_world_process_zero() and recorded != trainer.state.global_step:
        _write_record(settings, trainer.args, trainer.state, len(trainer.train_dataset), peak=None)


def _reduce_micro_batch(trainer, settings, callback):
    """Keeps the finished steps in a checkpoint after memory ran out, and makes the micro-batch smaller."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the attempt that failed says nothing of the next one's forecast
    trainer.model.zero_grad()
    args, step, size = trainer.args, trainer.state.global_step, trainer.args.per_device_train_batch_size
    if size > 1:
        factor = next(n for n in range(2, size + 1) if size % n == 0)
        args.per_device_train_batch_size = args.per_device_eval_batch_size = trainer._train_batch_size = size // factor
        args.gradient_accumulation_steps *= factor
        note = (
            f"out of memory after step {step}: micro-batch {size} to {size // factor}, accumulation "
            f"{args.gradient_accumulation_steps // factor} to {args.gradient_accumulation_steps}"
        )
        callback.notes.append(note)
        print(f"{note}, the same {settings.examples_per_step} examples a step")
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
    if step and not (checkpoint / CHECKPOINT_FILE).is_file():
        check_disk(checkpoint, _checkpoint_bytes(trainer.model))
        trainer._save_checkpoint(trainer.model, trial=None)
        _seal(checkpoint, _identity(settings, trainer.train_dataset))
    if size == 1:
        lengths = list(map(len, trainer.train_dataset["input_ids"]))
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise MedcotError(
            f"out of memory with one example at a time: the longest is example {longest} with {lengths[longest]} tokens; "
            f"set max_seq_length below that to leave it out, or r below {settings.r}"
        )


def _checkpoint_bytes(model) -> int:
    """At most what a checkpoint takes: the adapters and two moments of them in 32 bits, and the tokenizer."""
    return 3 * 4 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad) + 32 * 2**20


def _skipped(history) -> tuple[int, int]:
    """Updates skipped in all, and without an applied one since."""
    steps = [entry["step"] for entry in history if "skipped_update" in entry]
    in_a_row = sum(steps[-1] - step == len(steps) - 1 - i for i, step in enumerate(steps))
    return len(steps), in_a_row


def _callback(settings):
    """The callback of a run: the live chart, checkpoints, when to stop, and `training.json` for the run card."""
    # Defined in here because its base class comes from transformers, which unsloth must be imported before.
    import psutil
    import torch
    import wandb
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import TrainerCallback

    class RunCallback(TrainerCallback):
        def __init__(self):
            self.chart, self.bar, self.started, self.stop = LossChart(settings), None, None, None
            self.skipped = self.updating = False
            self.notes = []  # for the history, which the next start of training may begin anew
            self.trainer, self.step_seconds, self.memory_before, self.minutes_left = None, [], 0, None
            # The first process of a container is as old as the session; elsewhere this process stands for it.
            self.session = psutil.Process(1 if on_kaggle() else None).create_time()

        def on_train_begin(self, args, state, control, train_dataloader=None, **_):
            self.identity = _identity(settings, train_dataloader.dataset)
            self.started = time.monotonic() - _seconds(state.log_history)
            notes = self.notes + [f"continued from step {state.global_step}"] * bool(state.global_step)
            state.log_history += [{"step": state.global_step, "note": note} for note in notes]
            self.notes = []
            self.step_seconds = []
            self.memory_before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            if settings.session_minutes:
                self.minutes_left = max(0.0, settings.session_minutes - (time.time() - self.session) / 60)
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="training",
                disable=not state.is_world_process_zero,
            )
            if wandb.run is not None and not wandb.run.offline:
                wandb.run.display(height=420)

        def on_step_begin(self, args, state, control, **_):
            self.step_started = time.monotonic()

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            self.skipped = not torch.isfinite(torch.nn.utils.get_total_norm(gradients))
            if self.skipped:
                model.zero_grad()  # without gradients the optimizer changes nothing; the scaler of fp16 skips by itself
            self.updating = True

        def on_optimizer_step(self, args, state, control, **_):
            self.updating = False

        def on_step_end(self, args, state, control, model=None, **_):
            self.bar.update(state.global_step - self.bar.n)
            self.step_seconds.append(time.monotonic() - self.step_started)
            if len(self.step_seconds) == FORECAST_STEPS and state.is_world_process_zero:
                state.log_history.append({"step": state.global_step, "forecast": forecast(self, args, state)})
                self.bar.write(_in_words(state.log_history[-1]["forecast"]))
            if self.skipped:
                state.log_history.append({"step": state.global_step, "skipped_update": True})
                in_all, in_a_row = _skipped(state.log_history)
                self.bar.write(f"step {state.global_step}: gradients not finite, update skipped ({in_all} so far)")
                if in_a_row > MAX_SKIPPED:
                    raise MedcotError(
                        f"{in_a_row} updates in a row were skipped because gradients were not finite, the last at step "
                        f"{state.global_step}: lower learning_rate={settings.learning_rate:g} or look at the rows; the "
                        f"checkpoints in {args.output_dir} hold the last applied update"
                    )
            if settings.session_minutes and time.time() - self.session >= 60 * settings.session_minutes:
                self.stop = self.stop or f"session_minutes={settings.session_minutes:g} are used"
            # Clocks and signals differ between processes, and all must stop at one step.
            self.stop = next((stop for stop in gather_object([self.stop]) if stop), None)
            if self.stop and not control.should_training_stop:
                note = f"stopped at step {state.global_step} of {state.max_steps} ({self.stop})"
                state.log_history.append({"step": state.global_step, "note": note, "stopped": True})
                control.should_save = control.should_training_stop = True
            if control.should_save:
                check_disk(args.output_dir, _checkpoint_bytes(model))

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero:
                _seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero:
                state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)
                if args.world_size > 1:  # read by train_on_all_gpus, which draws the chart in the notebook
                    self.bar.write(LOG_MARK + json.dumps(state.log_history[-1]), file=sys.stdout)
                if "loss" in logs:
                    self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")
                self.chart.draw(state.log_history)

        def on_train_end(self, args, state, control, train_dataloader=None, **_):
            if not state.is_world_process_zero:
                return
            self.bar.close()
            self.chart.draw(state.log_history, save=True)
            if wandb.run is not None:
                wandb.finish()
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            _write_record(settings, args, state, len(train_dataloader.dataset), peak)
            if peak is not None:
                print(f"trained: peak {peak:.1f} GiB of GPU memory")

    return RunCallback()


def forecast(callback, args, state) -> dict:
    """What the first steps say of the whole run: {"minutes": of training, "peak_gib": of GPU memory or None,
    "minutes_left": of the session when training began, None without `session_minutes`, "steps": that were to come}.

    Seconds a token are taken from the steps after the first, which compiles; the tokens of every step to come are known,
    since the order of the rows is. Memory grows in proportion to the widest micro-batch above what the model itself takes.
    """
    import torch

    lengths = list(map(len, callback.trainer.train_dataset["input_ids"]))
    batches = [[lengths[i] for i in batch] for batch in callback.trainer.get_train_dataloader().batch_sampler]
    widths = [sum(batch) if args.padding_free else len(batch) * max(batch) for batch in batches]
    steps = [
        sum(widths[i : i + args.gradient_accumulation_steps])
        for i in range(0, len(widths), args.gradient_accumulation_steps)
    ]
    seconds, start = callback.step_seconds, state.global_step - FORECAST_STEPS
    place = [(start + i) % len(steps) for i in range(FORECAST_STEPS)]
    rate = sum(seconds[1:]) / sum(steps[i] for i in place[1:])
    to_come = sum(steps[i % len(steps)] for i in range(state.global_step, state.max_steps))
    peak = None
    if torch.cuda.is_available():
        seen = max(
            max(widths[i * args.gradient_accumulation_steps :][: args.gradient_accumulation_steps]) for i in place
        )
        before, most = callback.memory_before, torch.cuda.max_memory_allocated()
        peak = (before + (most - before) * max(widths) / seen) / 2**30
    minutes, left = (sum(seconds) + rate * to_come) / 60, callback.minutes_left
    return {"minutes": minutes, "peak_gib": peak, "minutes_left": left, "steps": state.max_steps - start}


def _in_words(found: dict) -> str:
    """The forecast beside what there is: the GPU's memory, and the minutes that the session has left."""
    import torch

    words = f"forecast from the first {FORECAST_STEPS} steps: {found['steps']} steps take about {found['minutes']:.1f} minutes"
    if found["minutes_left"] is not None:
        words += f" of {found['minutes_left']:.0f} that the session has left"
        if found["minutes"] > found["minutes_left"]:
            words += " (too few: training will stop before that, with a checkpoint to go on from)"
    if found["peak_gib"] is not None:
        there = torch.cuda.get_device_properties(0).total_memory / 2**30
        words += f" and {found['peak_gib']:.1f} of {there:.1f} GiB of GPU memory at the widest batch"
        if found["peak_gib"] > there:
            words += " (too little: when it runs out, the micro-batch is made smaller)"
    return words


def run_training(settings):
    """The steps of 02_finetune in one call, for the command line and for each process that torchrun starts."""
    from . import data
    from .modeling import add_lora, load_model, save_adapter

    splits = data.load_splits(settings)
    model, tokenizer = load_model(settings)
    print(data.audit(splits, tokenizer, settings))
    examples = data.to_examples(splits.train, tokenizer, settings, show=False)
    held_out = data.to_examples(splits.eval.select(range(settings.eval_loss_rows)), tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings, held_out)
    train(trainer, settings)
    _check_processes(trainer, settings, trainer.state.global_step)  # of a run that was only taken over, work is left
    if trainer.is_world_process_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, settings)
    # Left open, gloo's own thread may abort a process whose work is done. Not after an error: NCCL might wait for ever.
    trainer.accelerator.state.destroy_process_group()


def train_on_all_gpus(settings):
    """Trains with `nproc_per_node` processes, one a GPU, started by torchrun; does nothing where that is 1.

    Shows their progress and the live chart while they run and leaves the files of a run on one GPU, so that `train`
    finds it done. Raises MedcotError, with the last lines that were printed, if any of the processes fails.
    """
    if settings.nproc_per_node == 1:
        print("training runs in this notebook, below")
        return
    chart, history = LossChart(settings), []

    def read(line):
        before, mark, entry = line.partition(LOG_MARK)
        try:
            # The processes share the pipe, so something of another one may stand behind an entry.
            history.append(json.JSONDecoder().raw_decode(entry)[0])
            chart.draw(history)
        except ValueError:
            before += mark + entry
        return before

    on_all_gpus(settings, "train", read)


def _seconds(history) -> float:
    """Time trained, over all sessions, up to the last logged step."""
    return max((entry["seconds"] for entry in history if "seconds" in entry), default=0.0)


def _write_record(settings, args, state, examples, peak):
    import torch

    gpu = torch.cuda.is_available()
    record = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "examples": examples,
        "examples_per_step": settings.examples_per_step,
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": _seconds(state.log_history),
        "skipped_updates": _skipped(state.log_history)[0],
        "forecast": next((entry["forecast"] for entry in state.log_history if "forecast" in entry), None),
        "notes": [entry["note"] for entry in state.log_history if "note" in entry],
        "peak_memory_gib": peak,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("unsloth", "torch", "transformers", "trl", "peft", "datasets")},
        "log_history": state.log_history,
    }
    path = settings.output_dir / RECORD_FILE
    fresh = path.with_suffix(".saving")
    fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
    fresh.replace(path)
