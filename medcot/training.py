"""The trainer: a plain function that returns a stock TRL trainer."""

import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .modeling import for_training, keep_activations
from .tracking import LossChart, configure_wandb

RECORD_FILE = "training.json"


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
    from trl import SFTConfig, SFTTrainer

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
        save_strategy="no",
        seed=settings.seed,
        data_seed=settings.seed,
        fp16=settings.device == "cuda",
        bf16=False,
        use_cpu=settings.device == "cpu",
        gradient_checkpointing=settings.gradient_checkpointing,
        padding_free=settings.padding_free,
        report_to=settings.report_to,
        disable_tqdm=True,  # a bar as text instead, which also a batch log and a terminal show
    )
    trainer = SFTTrainer(
        model=for_training(model),
        processing_class=tokenizer,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        callbacks=[_callback(settings)],
    )
    trainer.remove_callback(PrinterCallback)  # the bar and the chart show what it would print line by line
    return trainer


def _callback(settings):
    """The callback of a run: the live chart, the end of the wandb run, and `training.json` for the run card."""
    # Defined in here because its base class comes from transformers, which unsloth must be imported before.
    import wandb
    from tqdm import tqdm
    from transformers import TrainerCallback

    class RunCallback(TrainerCallback):
        def __init__(self):
            self.chart, self.bar, self.started = LossChart(settings), None, None

        def on_train_begin(self, args, state, control, **_):
            self.started = time.monotonic()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")
            if wandb.run is not None and not wandb.run.offline:
                wandb.run.display(height=420)

        def on_step_end(self, args, state, control, **_):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero:
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
            seconds = time.monotonic() - self.started
            _write_record(settings, args, state, len(train_dataloader.dataset), seconds)

    return RunCallback()


def _write_record(settings, args, state, examples, seconds):
    import torch

    gpu = torch.cuda.is_available()
    record = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
        "examples": examples,
        "examples_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("unsloth", "torch", "transformers", "trl", "peft", "datasets")},
        "log_history": state.log_history,
    }
    path = settings.output_dir / RECORD_FILE
    fresh = path.with_suffix(".saving")
    fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
    fresh.replace(path)
