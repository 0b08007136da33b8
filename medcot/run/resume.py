"""Training that loses nothing: from the newest whole checkpoint on, stopped in time, smaller where memory runs out."""

import contextlib
import gc
import json
import signal
from pathlib import Path

from ..files import check_disk, only_process
from ..identity import CHECKPOINT_FILE, RECORD_FILE
from ..model import fresh_adapters
from ..settings import MedcotError
from .checkpoints import checkpoint_bytes, last_checkpoint, run_identity, seal, step_of, stopped
from .processes import leave_group, on_all_gpus, on_interrupt
from .tracking import LossChart, wandb_run


def train(trainer, settings):
    """Trains to the last step, from the newest whole checkpoint of the same run on if there is one (`last_checkpoint`).

    Without one it begins with fresh adapters, whatever the model was trained for before. Stops early, with a checkpoint
    and a printed line that says how to continue, when the session's minutes are used or on an interrupt (Ctrl-C, the
    notebook's stop button). When memory runs out, the micro-batch is divided and the accumulation multiplied, so that a
    step sees the same examples. A run that stopped on several GPUs is taken over as it stands where this is one process:
    `train_on_all_gpus` goes on with it. Raises MedcotError for a checkpoint of another run, a nearly full disk, more than
    `MAX_SKIPPED` updates skipped in a row, one example that does not fit the memory, and a second process that trains
    into the same folder.
    """
    from .callbacks import Guard, Progress, Record

    now, folder = run_identity(trainer, settings), settings.output_dir / "checkpoints"
    guard, record = Guard(settings), Record(trainer, settings, now)
    going_along = (guard, Progress(trainer, settings), record)
    first = trainer.is_world_process_zero()
    with only_process(folder) if first else contextlib.nullcontext():
        checkpoint = last_checkpoint(settings, now)
        if _is_done(trainer, checkpoint, settings, record):
            return
        for callback in going_along:
            trainer.add_callback(callback)
        try:
            with wandb_run(settings) if first else contextlib.nullcontext(), _stopping_after_the_step(guard):
                _train(trainer, settings, checkpoint, guard, record)
        finally:
            for callback in going_along:
                trainer.remove_callback(callback)
    if trainer.state.global_step < trainer.args.max_steps:
        print(
            f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps} ({guard.stop}). Continue with this "
            f"notebook, run again: it goes on from {folder}; in a new session attach this one's output first"
        )


def _is_done(trainer, checkpoint: Path | None, settings, record) -> bool:
    """Whether a run ended already, or stopped where only more processes can go on; it is taken over, with a line."""
    few = trainer.args.world_size < settings.nproc_per_node
    if (note := stopped(checkpoint)) and few:
        line = (
            f"{note}: the adapter is that of this step. Run train_on_all_gpus(settings) to go on from {checkpoint}; in a "
            "new session attach this one's output first"
        )
    else:
        check_processes(trainer, settings, step_of(checkpoint) if checkpoint else 0)
        if checkpoint is None or step_of(checkpoint) < trainer.args.max_steps:
            return False
        line = f"already trained, {checkpoint} is its end: delete {checkpoint.parent} to train anew"
    _take_over(trainer, checkpoint, settings, record)
    print(line)
    return True


def _train(trainer, settings, checkpoint: Path | None, guard, record):
    """Trains from a checkpoint, or anew without one, with a smaller micro-batch each time that memory runs out."""
    from accelerate.utils.memory import should_reduce_batch_size

    from ..activations import release_host_memory

    while True:
        if checkpoint is None:
            fresh_adapters(trainer.model, settings.seed)
            trainer.optimizer = trainer.lr_scheduler = None  # an earlier run in this process has left its moments
        else:
            print(f"going on from {checkpoint}")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            release_host_memory(trainer.model)
            return
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or guard.updating or trainer.args.world_size > 1:
                raise
        # Out of the except block, so that the failed step's tensors are gone.
        _reduce_micro_batch(trainer, settings, record)
        checkpoint = last_checkpoint(settings, record.now)


def check_processes(trainer, settings, step: int):
    """Raises MedcotError if the processes at work are not those that the settings count on, or see other checkpoints."""
    from accelerate.utils import gather_object

    args = trainer.args
    steps = gather_object([step])
    if len(set(steps)) > 1:
        raise MedcotError(f"the processes see checkpoints of steps {steps}: MEDCOT_OUT must be a folder they all share")
    now = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if now != settings.examples_per_step and step < trainer.args.max_steps:
        raise MedcotError(
            f"{args.world_size} process here would take {now} examples a step and the settings say "
            f"{settings.examples_per_step} (nproc_per_node={settings.nproc_per_node}), at step {step} of "
            f"{trainer.args.max_steps}: run train_on_all_gpus(settings), which goes on from there, or choose another profile"
        )


def _stopping_after_the_step(guard):
    """Turns the first interrupt into a wish to stop after the step at hand; a second one interrupts as usual."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number, frame):
        guard.stop = "interrupted"
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step, with a checkpoint; interrupt again to stop at once without one")

    return on_interrupt(stop)


def _take_over(trainer, checkpoint: Path, settings, record):
    """Gives the trainer the weights and the history of an ended run; writes its record if a kill prevented that."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    recorded = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        recorded = json.loads((settings.output_dir / RECORD_FILE).read_text(encoding="utf-8"))["steps"]
    if trainer.is_world_process_zero() and recorded != trainer.state.global_step:
        record.write(peak=None)


def _reduce_micro_batch(trainer, settings, record):
    """Keeps the finished steps in a checkpoint after memory ran out, and makes the micro-batch smaller."""
    import torch

    from ..activations import release_host_memory

    gc.collect()
    release_host_memory(trainer.model)  # smaller micro-batches send less
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
        record.notes.append(note)
        print(f"{note}, the same {settings.examples_per_step} examples a step")
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
    if step and not (checkpoint / CHECKPOINT_FILE).is_file():
        check_disk(checkpoint, checkpoint_bytes(trainer.model))
        trainer._save_checkpoint(trainer.model, trial=None)
        seal(checkpoint, record.now)
    if size == 1:
        lengths = list(map(len, trainer.train_dataset["input_ids"]))
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise MedcotError(
            f"out of memory with one example at a time: the longest is example {longest} with {lengths[longest]} tokens; "
            f"set max_seq_length below that to leave it out, or r below {settings.r}"
        )


def run_training(settings, stop_after: int | None = None):
    """The steps of 02_finetune in one call, for the command line and for each process that torchrun starts.

    With `stop_after`, only so many steps and no adapter is saved. Returns the trainer.
    """
    from ..data import load_splits, to_examples
    from ..model import add_lora, load_model, save_adapter
    from ..training import make_trainer
    from .audit import audit

    splits = load_splits(settings)
    model, tokenizer = load_model(settings)
    print(audit(splits, tokenizer, settings))
    examples = to_examples(splits.train, tokenizer, settings, show=False)
    held_out = to_examples(splits.loss_rows(settings), tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings, held_out)
    if stop_after is not None:
        from .callbacks import StopAfter

        trainer.add_callback(StopAfter(stop_after))
    train(trainer, settings)
    if stop_after is None:
        check_processes(trainer, settings, trainer.state.global_step)  # of a run only taken over, work is left
        if trainer.is_world_process_zero():
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, settings)
    leave_group()
    return trainer


def train_on_all_gpus(settings):
    """Trains with `nproc_per_node` processes, one a GPU, started by torchrun.

    Shows their progress and the live chart while they run and leaves the files of a run on one GPU, so that `train`
    finds it done. Raises MedcotError, with the last lines that were printed, if any of the processes fails.
    """
    from .processes import LOG_MARK

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
