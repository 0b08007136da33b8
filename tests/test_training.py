"""The trainer: stock TRL, exactly the masked tokens, the same step whatever the micro-batch."""

import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from medcot import Settings, add_lora, identity, load_model, load_splits, make_trainer, to_examples, train
from medcot.identity import adapter_id
from medcot.prompts import format_prompt


def test_the_trainer_is_stock(trained):
    import trl

    assert isinstance(trained.trainer, trl.SFTTrainer)
    arguments = trained.trainer.args
    assert arguments.max_length == trained.settings.max_seq_length
    assert not arguments.push_to_hub and not arguments.bf16


def test_loss_fell(trained):
    losses = [entry["loss"] for entry in trained.trainer.state.log_history if "loss" in entry]
    assert len(losses) == trained.settings.max_steps
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_held_out_loss_was_measured_and_fell(trained):
    held_out = [entry["eval_loss"] for entry in trained.trainer.state.log_history if "eval_loss" in entry]
    assert len(held_out) == 2 and held_out[1] < held_out[0]


def test_the_run_is_recorded(trained):
    record = json.loads((trained.settings.output_dir / "training.json").read_text())
    assert record["steps"] == 12 and record["examples_per_step"] == 4 and record["examples"] == 64
    assert record["log_history"] == trained.trainer.state.log_history
    assert record["versions"]["unsloth"] and record["seconds"] > 0
    assert (trained.settings.output_dir / "figures" / "loss.png").stat().st_size > 5000


ROWS = [
    {"Question": "Why?", "Complex_CoT": "Because.", "Response": "So."},
    {
        "Question": "Why is it so much longer than the other?",
        "Complex_CoT": "It\nis\nlong.",
        "Response": "Yes, it is longer.",
    },
]


@pytest.fixture(scope="module", params=[False, True], ids=["whole text", "completion only"])
def batch(request, trained, tmp_path_factory):
    """The batch that the model really gets for ROWS, its examples, and whether only completions are supervised."""
    settings = replace(
        trained.settings,
        completion_only_loss=request.param,
        output_dir=tmp_path_factory.mktemp("batch"),
        report_to="none",
    )
    examples = to_examples(Dataset.from_list(ROWS), trained.tokenizer, settings, show=False)
    trainer = make_trainer(trained.model, trained.tokenizer, examples, settings)
    return SimpleNamespace(
        **next(iter(trainer.get_train_dataloader())), tokenizer=trained.tokenizer, completion_only=request.param
    )


def test_exactly_these_tokens_are_supervised_in_a_batch(batch):
    pad, eos, bos = batch.tokenizer.pad_token_id, batch.tokenizer.eos_token_id, batch.tokenizer.bos_token_id
    prompts = [batch.tokenizer(format_prompt(row["Question"]))["input_ids"] for row in ROWS]
    for ids, labels, mask in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), batch.attention_mask.tolist(), strict=True
    ):
        prompt = next(prompt for prompt in prompts if ids[: len(prompt)] == prompt)
        length = sum(mask)
        start = len(prompt) if batch.completion_only else 0
        assert labels == [-100] * start + ids[start:length] + [-100] * (len(ids) - length)
        assert ids[:length].count(bos) == 1 and ids[length - 1] == eos and labels.count(eos) == 1
        assert set(ids[length:]) <= {pad} and pad not in labels
    assert pad in batch.input_ids  # the two rows differ in length, so there was padding to get wrong


def test_unsloths_gpu_data_path_supervises_the_same_tokens(trained):
    # On a CPU unsloth leaves TRL's preparation in place; this is the function that replaces it on a GPU.
    from unsloth_zoo.dataset_utils import sft_prepare_dataset

    settings = replace(trained.settings, completion_only_loss=True)
    examples = to_examples(Dataset.from_list(ROWS), trained.tokenizer, settings, show=False)
    stub = SimpleNamespace(model=trained.model, completion_only_loss=True, data_collator="the collator of TRL")
    arguments = SimpleNamespace(
        max_length=2048, dataset_text_field="text", completion_only_loss=True, dataset_num_proc=None
    )
    prepared = sft_prepare_dataset(stub, examples, trained.tokenizer, arguments, False, None, "train")
    for example, ready in zip(examples, prepared, strict=True):
        ids = ready["input_ids"]
        assert ids == example["input_ids"]
        assert ready["labels"] == [t if m else -100 for t, m in zip(ids, example["completion_mask"], strict=True)]
    assert stub.data_collator == "the collator of TRL"  # another one would supervise by padding, not by the mask


def test_a_step_is_the_same_whatever_the_micro_batch(trained, tmp_path):
    # 4 x 1, 2 x 2 and 1 x 4 examples a step, of different lengths: the same losses, or accumulation is wrong. The third
    # step is in the second epoch.
    losses = []
    for size, padding_free in ((4, False), (2, False), (1, False), (2, True)):
        settings = replace(
            trained.settings, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=3,
            completion_only_loss=True, output_dir=tmp_path, report_to="none", warmup_steps=0, padding_free=padding_free,
        )  # fmt: skip
        model, tokenizer = load_model(settings)
        examples = to_examples(trained.splits.train.select(range(8)), tokenizer, settings, show=False)
        trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert all(other == pytest.approx(losses[0], abs=2e-3) for other in losses[1:])
    assert torch.tensor(losses).std(dim=1).min() > 1e-3  # the steps themselves do differ


def test_one_seed_gives_one_run(trained, tmp_path):
    def losses():
        settings = replace(trained.settings, max_steps=2, warmup_steps=0, output_dir=tmp_path, report_to="none")
        model, tokenizer = load_model(settings)
        examples = to_examples(trained.splits.train, tokenizer, settings, show=False)
        trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses() == losses()


def fresh_run(settings, **changes):
    """A trainer for a short run, in this process."""
    settings = replace(settings, **{"max_steps": 4, "warmup_steps": 0, "report_to": "none", "save_steps": 2} | changes)
    model, tokenizer = load_model(settings)
    rows = load_splits(settings)
    held_out = to_examples(rows.eval.select(range(2)), tokenizer, settings, show=False)
    examples = to_examples(rows.train, tokenizer, settings, show=False)
    return make_trainer(add_lora(model, settings), tokenizer, examples, settings, held_out), settings


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("how", ["checkpoints deleted", "interrupted twice before the first checkpoint"])
def test_training_anew_in_the_same_kernel_starts_from_fresh_adapters(settings, how):
    from transformers import TrainerCallback  # after unsloth

    trainer, settings = fresh_run(settings)
    if how == "checkpoints deleted":
        train(trainer, settings)
        shutil.rmtree(settings.output_dir / "checkpoints")
    else:

        class Impatience(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 1:
                    raise KeyboardInterrupt

        trainer.add_callback(Impatience())
        with pytest.raises(KeyboardInterrupt):
            train(trainer, settings)
        trainer.remove_callback(Impatience)
        assert not list(settings.output_dir.glob("checkpoints/checkpoint-*"))
    train(trainer, settings)
    other, settings = fresh_run(replace(settings, output_dir=settings.output_dir / "other"))
    train(other, settings)
    assert losses_of(trainer) == losses_of(other) and len(losses_of(other)) == 4
    assert adapter_id(trainer.model) == adapter_id(other.model)


def test_after_a_resumption_the_settings_of_today_say_when_to_save_and_to_log(settings):
    from medcot.run.callbacks import StopAfter

    trainer, first = fresh_run(settings, save_steps=1, logging_steps=1, eval_steps=1)
    trainer.add_callback(StopAfter(2))
    train(trainer, first)
    trainer, now = fresh_run(settings, max_steps=4, save_steps=4, logging_steps=4, eval_steps=4)
    train(trainer, now)
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 4]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 4]
    assert {path.name for path in settings.output_dir.glob("checkpoints/checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }


def test_every_setting_either_decides_or_is_free_to_change():
    """A new setting must be put on one side: a run is refused for the ones that decide and for no other."""
    deciding = set(identity.TRAINING) | set(identity.MEASURING)
    parts_of_their_own = {"model", "model_revision"}  # compared by what they are, not by name
    by_their_rows = {"dataset", "dataset_config", "dataset_revision", "eval_rows", "answer_rows", "choice_dataset", "choice_dataset_revision",
                     "choice_rows", "choice_answer_rows", "chat_rows", "question_column", "reasoning_column", "response_column"}  # fmt: skip
    free = {"profile", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
            "activation_memory_gib", "activation_host_gib", "padding_free", "logging_steps", "eval_steps", "eval_loss_rows", "save_steps", "session_minutes",
            "report_to", "wandb_project", "output_dir", "earlier_output"}  # fmt: skip
    assert {field.name for field in fields(Settings)} == (
        deciding - {"examples_per_step"}
    ) | parts_of_their_own | by_their_rows | free
