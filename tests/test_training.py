"""The trainer: stock TRL, exactly the masked tokens, the same step whatever the micro-batch."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from medcot import Settings, add_lora, load_model, make_trainer, to_examples
from medcot.prompts import format_prompt
from medcot.training import EvenSampler


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
    # 4 x 1, 2 x 2 and 1 x 4 examples a step, of different lengths: the same losses, or accumulation is wrong. The last
    # two also arrange the examples of a step; the third step is in the second epoch.
    losses = []
    for size, padding_free in ((4, False), (2, False), (1, False), (4, True), (2, True)):
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


@given(st.lists(st.integers(1, 2048), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_a_step_keeps_its_examples_however_they_are_arranged(lengths, size, batches):
    step = size * batches
    drawn, arranged = range(len(lengths)), list(EvenSampler(range(len(lengths)), lengths, step, size))
    assert len(EvenSampler(range(len(lengths)), lengths, step, size)) == len(arranged) == len(lengths)
    for first in range(0, len(lengths), step):
        assert sorted(arranged[first : first + step]) == sorted(drawn[first : first + step])
    # The heaviest and the lightest micro-batch of a step are not further apart than its longest example.
    for first in range(0, len(lengths) - step + 1, step):
        tokens = [sum(lengths[i] for i in arranged[at : at + size]) for at in range(first, first + step, size)]
        assert max(tokens) - min(tokens) <= max(lengths[first : first + step])


def test_two_gpus_get_as_many_tokens(trained):
    """With lengths as the data set's (log-normal, 0.19), the fuller of two micro-batches: 5 to 6 % over half, then 1."""
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    lengths = [int(length) for length in numpy.random.default_rng(0).lognormal(6.593, 0.19, 4000)]

    def excess(batches_of):
        shares = [[sum(lengths[i] for i in batch) for batch in batches_of(rank)] for rank in range(2)]
        return numpy.mean(numpy.max(shares, axis=0) / numpy.mean(shares, axis=0)) - 1

    def shared(sampler, rank):
        sampler.set_epoch(0)
        return BatchSamplerShard(BatchSampler(sampler, 4, False), 2, rank)

    drawn = SeedableRandomSampler(range(4000), data_seed=3407)
    assert 0.045 < excess(lambda rank: shared(drawn, rank)) < 0.06
    assert excess(lambda rank: shared(EvenSampler(drawn, lengths, 8, 4), rank)) < 0.015
    # Why it is not left to transformers.
    assert excess(lambda rank: BatchRebalanceSampler(lengths, 8, 2, 1, rank=rank)) > 0.1


def test_one_seed_gives_one_run(trained, tmp_path):
    def losses():
        settings = replace(trained.settings, max_steps=2, warmup_steps=0, output_dir=tmp_path, report_to="none")
        model, tokenizer = load_model(settings)
        examples = to_examples(trained.splits.train, tokenizer, settings, show=False)
        trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses() == losses()


def test_every_setting_either_decides_what_a_step_computes_or_is_free_to_change():
    """A new setting must be put on one side: a checkpoint is refused for the ones listed here and for no other."""
    from medcot.training import _FREE

    deciding = {
        "model", "model_revision", "load_in_4bit", "device", "r", "lora_alpha", "lora_dropout", "target_modules",
        "learning_rate", "max_steps", "warmup_steps", "lr_scheduler_type", "optim", "weight_decay",
        "completion_only_loss", "seed",
    }  # fmt: skip
    assert {field.name for field in fields(Settings)} == deciding | set(_FREE) and not deciding & set(_FREE)
