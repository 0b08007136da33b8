"""What the CPU tests state, stated again on Unsloth's GPU data path. Run by hand: pytest -m gpu -s"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from medcot import add_lora, load_model, load_splits, make_trainer, save_adapter, to_examples
from medcot.prompts import format_prompt
from medcot.settings import PROFILES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: this machine has none"),
]
ROWS = [
    {"Question": "Why?", "Complex_CoT": "Because.", "Response": "So."},
    {
        "Question": "Why is it so much longer than the other?",
        "Complex_CoT": "It\nis\nlong.",
        "Response": "Yes, longer.",
    },
    {"Question": "And the third?", "Complex_CoT": "One more.", "Response": "Third."},
]


@pytest.fixture(scope="module", autouse=True)
def t4_conditions():
    """fp16 comes from the settings; memory and attention kernels are held to a T4's here."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 14.5 * 2**30 / total))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    settings = replace(
        PROFILES["smoke"], device="cuda", output_dir=tmp_path_factory.mktemp("gpu"), report_to="none", max_steps=8,
        gradient_checkpointing=True, learning_rate=1e-3,
    )  # fmt: skip
    model, tokenizer = load_model(settings)
    return SimpleNamespace(
        settings=settings, tokenizer=tokenizer, model=add_lora(model, settings), splits=load_splits(settings)
    )


def trainer_for(gpu, rows, **changes):
    settings = replace(gpu.settings, **changes)
    examples = to_examples(rows, gpu.tokenizer, settings, show=False)
    return make_trainer(gpu.model, gpu.tokenizer, examples, settings), examples


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("completion_only_loss", [False, True])
def test_exactly_these_tokens_are_supervised(gpu, padding_free, completion_only_loss):
    trainer, _ = trainer_for(
        gpu,
        Dataset.from_list(ROWS),
        padding_free=padding_free,
        completion_only_loss=completion_only_loss,
        per_device_train_batch_size=3,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    pad, eos, bos = gpu.tokenizer.pad_token_id, gpu.tokenizer.eos_token_id, gpu.tokenizer.bos_token_id
    prompts = [gpu.tokenizer(format_prompt(row["Question"]))["input_ids"] for row in ROWS]
    if padding_free:
        assert batch["input_ids"].shape[0] == 1 and pad not in batch["input_ids"]
        starts = [*(batch["input_ids"][0] == bos).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        pieces = [
            (batch["input_ids"][0, a:b].tolist(), batch["labels"][0, a:b].tolist())
            for a, b in itertools.pairwise(starts)
        ]
        assert batch["packed_seq_lengths"].tolist() == [len(ids) for ids, _ in pieces]
    else:
        assert pad in batch["input_ids"]
        pieces = list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))
    assert len(pieces) == 3
    for ids, labels in pieces:
        prompt = next(prompt for prompt in prompts if ids[: len(prompt)] == prompt)
        length = len(ids) - ids.count(pad)
        start = len(prompt) if completion_only_loss else 0
        expected = [-100] * start + ids[start:length] + [-100] * (len(ids) - length)
        if padding_free:
            # The first token of a document has no predecessor in it: nothing may be predicted across the boundary.
            expected[0] = labels[0] = -100
        assert labels == expected
        assert ids.count(bos) == 1 and labels.count(eos) == 1 and ids[length - 1] == eos and pad not in labels


def run(gpu, rows=None, **changes):
    settings = replace(gpu.settings, **changes)
    model, tokenizer = load_model(settings)
    examples = to_examples(gpu.splits.train if rows is None else rows, tokenizer, settings, show=False)
    trainer = make_trainer(add_lora(model, settings), tokenizer, examples, settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_fast_losses_equal_the_plain_ones_step_for_step(gpu):
    plain = run(gpu, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    fast = run(
        gpu, per_device_train_batch_size=4, gradient_accumulation_steps=2, padding_free=True, activation_memory_gib=0.01
    )
    eight = run(gpu, per_device_train_batch_size=8, gradient_accumulation_steps=1, padding_free=True)
    print(f"\nplain {plain}\nfast  {fast}\n8 x 1 {eight}")
    assert fast == pytest.approx(plain, abs=1e-3) and eight == pytest.approx(plain, abs=1e-3)


def test_a_padding_free_batch_keeps_its_documents_apart(gpu):
    trainer, _examples = trainer_for(gpu, Dataset.from_list(ROWS), padding_free=True, per_device_train_batch_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    model = gpu.model
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        together = model(**batch, return_dict=True).logits
        if not isinstance(together, torch.Tensor):  # unsloth returns no logits while it trains
            pytest.fail("no logits came back: set UNSLOTH_RETURN_LOGITS=1 for this test")
        place = 0
        for length in batch["packed_seq_lengths"].tolist():
            ids = batch["input_ids"][:, place : place + length]
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            difference = (together[:, place : place + length] - alone).abs().max().item()
            print(f"\ndocument of {length} tokens: largest logit difference {difference:.2e}")
            torch.testing.assert_close(together[:, place : place + length], alone, atol=2e-2, rtol=0)
            place += length
        # A leak would show: the second document alone differs from it with the first one visible.
        first, second = batch["packed_seq_lengths"].tolist()[:2]
        ids = batch["input_ids"][:, : first + second]
        leaking = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, first:]
        assert (leaking - together[:, first : first + second]).abs().max() > 0.1
    assert labels.shape == batch["input_ids"].shape


def test_the_adapter_reloads_with_the_same_greedy_tokens(gpu):
    model, tokenizer = load_model(gpu.settings)
    model = add_lora(model, gpu.settings)
    examples = to_examples(gpu.splits.train, tokenizer, gpu.settings, show=False)
    trainer = make_trainer(model, tokenizer, examples, gpu.settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    save_adapter(model, tokenizer, gpu.settings)
    prompts = tokenizer(
        [format_prompt(q) for q in gpu.splits.eval["Question"][:4]], padding=True, return_tensors="pt"
    ).to("cuda")
    from medcot.modeling import for_inference

    def greedy(model):
        output = for_inference(model).generate(
            **prompts, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return output[:, prompts["input_ids"].shape[1] :].tolist()

    reloaded, _ = load_model(gpu.settings, adapter=gpu.settings.adapter_dir)
    assert greedy(reloaded) == greedy(model)


def test_nothing_here_is_bfloat16(gpu):
    assert not any(weight.dtype == torch.bfloat16 for weight in gpu.model.parameters())


def test_options_scored_together_have_the_likelihood_they_have_alone(gpu):
    from medcot.inference import list_options, score_choices
    from medcot.prompts import format_completion

    model, tokenizer = load_model(gpu.settings)
    questions = [{"question": row["Question"], "choices": row["choices"]} for row in gpu.splits.eval]
    found = score_choices(model, tokenizer, questions, gpu.settings)
    for i in (0, 5, 11):
        prompt = format_prompt(list_options(**questions[i])) + format_completion("", "", "")
        start = tokenizer(prompt)["input_ids"]
        for k, choice in enumerate(questions[i]["choices"]):
            end = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                ids = torch.tensor([start + end], device="cuda")
                logits = (
                    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(start) - 1 : -1].float()
                )
            alone = logits.log_softmax(-1)[torch.arange(len(end)), torch.tensor(end)].sum().item()
            assert found.items[i][0][k] == pytest.approx(alone, abs=0.05)


def test_graph_decoding_writes_what_eager_decoding_writes(gpu, monkeypatch):
    model, tokenizer = load_model(gpu.settings)
    prompts = tokenizer(
        [format_prompt(q) for q in gpu.splits.eval["Question"][:8]], padding=True, return_tensors="pt"
    ).to("cuda")

    def tokens(graphs):
        monkeypatch.setenv("UNSLOTH_DECODE_CUDA_GRAPHS", graphs)
        return model.generate(
            **prompts, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id
        ).tolist()

    assert tokens("1") == tokens("0")
