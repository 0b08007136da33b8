"""What goes along with a stock trainer: the bar and the chart, a guard that stops in time, the record that is left.

Imported after unsloth, which patches the base class that these have.
"""

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback

from .. import identity
from ..environment import kaggle_root, on_kaggle
from ..files import check_disk, write_beside
from ..settings import MedcotError
from ..training import FORECAST_STEPS, forecast, token_widths
from .checkpoints import checkpoint_bytes, seal
from .processes import LOG_MARK
from .tracking import LossChart

MAX_SKIPPED = 10  # updates skipped in a row before training stops; in fp16 the first one to three are usual


class Progress(TrainerCallback):
    """A bar as text, the live chart, the seconds of each log entry, and the forecast after the first steps."""

    def __init__(self, trainer, settings):
        self.trainer, self.settings = trainer, settings
        self.chart, self.bar = LossChart(settings), None

    def on_train_begin(self, args, state, control, **_):
        self.started = time.monotonic() - trained_seconds(state.log_history)
        self.step_seconds = []
        self.memory_before = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        self.minutes_left = minutes_left(self.settings)
        self.chart.max_steps = state.max_steps
        if self.bar is not None:
            self.bar.close()
        first = state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training",
                        file=sys.stdout, disable=not first)  # fmt: skip

    def on_step_begin(self, args, state, control, **_):
        self.step_started = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        self.bar.update(state.global_step - self.bar.n)
        self.step_seconds.append(time.monotonic() - self.step_started)
        if len(self.step_seconds) == FORECAST_STEPS and state.is_world_process_zero:
            found = self.forecast(state)
            state.log_history.append({"step": state.global_step, "forecast": asdict(found)})
            self.bar.write(str(found), file=sys.stdout)

    def forecast(self, state):
        """`training.forecast` of this run."""
        there = {"minutes_left": self.minutes_left, "session_minutes": self.settings.session_minutes or None}
        if self.memory_before is not None:
            there |= {"memory_before": self.memory_before, "memory_peak": torch.cuda.max_memory_allocated(),
                      "memory": torch.cuda.get_device_properties(0).total_memory}  # fmt: skip
        first = state.global_step - FORECAST_STEPS
        return forecast(token_widths(self.trainer), self.step_seconds, first, state.max_steps, **there)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero:
            return
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)
        if args.world_size > 1:  # read by train_on_all_gpus, which draws the chart in the notebook
            self.bar.write(LOG_MARK + json.dumps(state.log_history[-1]), file=sys.stdout)
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        self.chart.draw(state.log_history)

    def on_train_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.bar.close()
            self.chart.draw(state.log_history, save=True)


class StopAfter(TrainerCallback):
    """Ends a run after its first steps, for a forecast."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps


class Guard(TrainerCallback):
    """Skips updates that are not finite, stops in time and on an interrupt, and looks at the disk before a save."""

    def __init__(self, settings):
        self.settings, self.stop = settings, None
        self.skipped = self.updating = False

    def on_train_begin(self, args, state, control, **_):
        state.compute_steps(args, state.max_steps)  # a checkpoint brings its own; the settings of today decide

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        self.skipped = not torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if self.skipped:
            model.zero_grad()  # without gradients the optimizer changes nothing; the scaler of fp16 skips by itself
        self.updating = True

    def on_optimizer_step(self, args, state, control, **_):
        self.updating = False

    def on_step_end(self, args, state, control, model=None, **_):
        if self.skipped:
            self._count_skipped(args, state)
        left = minutes_left(self.settings)
        if left is not None and left <= 0:
            self.stop = self.stop or f"session_minutes={self.settings.session_minutes:g} are used"
        # Clocks and signals differ between processes, and all must stop at one step: at what all have heard, while an
        # interrupt that comes in the midst of it waits for the next.
        heard = next((stop for stop in gather_object([self.stop]) if stop), None)
        if heard and not control.should_training_stop:
            self.stop = heard
            note = f"stopped at step {state.global_step} of {state.max_steps} ({heard})"
            state.log_history.append({"step": state.global_step, "note": note, "stopped": True})
            control.should_save = control.should_training_stop = True
        if control.should_save:
            check_disk(args.output_dir, checkpoint_bytes(model))

    def _count_skipped(self, args, state):
        state.log_history.append({"step": state.global_step, "skipped_update": True})
        in_all, in_a_row = _skipped(state.log_history)
        if state.is_world_process_zero:
            print(f"step {state.global_step}: gradients not finite, update skipped ({in_all} so far)")
        if in_a_row > MAX_SKIPPED:
            raise MedcotError(
                f"{in_a_row} updates in a row were skipped because gradients were not finite, the last at step "
                f"{state.global_step}: lower learning_rate={self.settings.learning_rate:g} or look at the rows; the "
                f"checkpoints in {args.output_dir} hold the last applied update"
            )


class Record(TrainerCallback):
    """Seals every checkpoint as one of the run `now`, and leaves `training.json` for the comparison and the run card."""

    def __init__(self, trainer, settings, now: dict):
        self.trainer, self.settings, self.now = trainer, settings, now
        self.notes = []  # for the history, which the next start of training may begin anew

    def on_train_begin(self, args, state, control, **_):
        notes = self.notes + [f"continued from step {state.global_step}"] * bool(state.global_step)
        state.log_history += [{"step": state.global_step, "note": note} for note in notes]
        self.notes = []

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.now)

    def on_train_end(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        self.write(peak)
        if peak is not None:
            print(f"trained: peak {peak:.1f} GiB of GPU memory")

    def write(self, peak: float | None):
        """Writes `training.json`, with the trainer's state as it is."""
        state, settings = self.trainer.state, self.settings
        record = {
            "identity": self.now,
            "identity_hash": identity.hash_of(self.now),
            "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
            "examples": len(self.trainer.train_dataset),
            "examples_per_step": settings.examples_per_step,
            "steps": state.global_step,
            "max_steps": state.max_steps,
            "epochs": state.epoch,
            "seconds": trained_seconds(state.log_history),
            "skipped_updates": _skipped(state.log_history)[0],
            "forecast": next((entry["forecast"] for entry in state.log_history if "forecast" in entry), None),
            "notes": [entry["note"] for entry in state.log_history if "note" in entry],
            "peak_memory_gib": peak,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "versions": {
                name: version(name) for name in ("unsloth", "torch", "transformers", "trl", "peft", "datasets")
            },
            "log_history": state.log_history,
        }
        write_beside(settings.output_dir / identity.RECORD_FILE, json.dumps(record, indent=1))


def minutes_left(settings) -> float | None:
    """Of the session; None where `session_minutes` sets no limit."""
    if not settings.session_minutes:
        return None
    # The first process of Kaggle's container is as old as the session; elsewhere, also in an imitation, this one is.
    in_container = on_kaggle() and kaggle_root() == Path("/kaggle")
    begun = psutil.Process(1 if in_container else None).create_time()
    return max(0.0, settings.session_minutes - (time.time() - begun) / 60)


def trained_seconds(history) -> float:
    """Time trained, over all sessions, up to the last logged step."""
    return max((entry["seconds"] for entry in history if "seconds" in entry), default=0.0)


def _skipped(history) -> tuple[int, int]:
    """Updates skipped in all, and without an applied one since."""
    steps = [entry["step"] for entry in history if "skipped_update" in entry]
    in_a_row = sum(steps[-1] - step == len(steps) - 1 - i for i, step in enumerate(steps))
    return len(steps), in_a_row
