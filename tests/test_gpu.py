"""What the CPU tests state, stated again on Unsloth's GPU data path. Run by hand: pytest -m gpu -s"""

import dataclasses
import itertools
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.speed import T4_GIB, cap, t4_conditions
from datasets import Dataset
from workshop import until

from medcot import (
    MedcotError,
    activations,
    add_lora,
    generate_answers,
    load_model,
    load_splits,
    make_trainer,
    save_adapter,
    to_examples,
    train,
)
from medcot.kernels import decoding_attention
from medcot.profiles import PROFILES
from medcot.prompts import format_example, format_prompt
from medcot.settings import ADAPTER_FOLDER

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
def t4():
    """A T4's memory, attention and decoding kernels."""
    t4_conditions()


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
        documents = batch["packed_seq_lengths"].sum().item()
        filling = batch["input_ids"][0, documents:]  # up to a multiple of 8, behind all documents
        assert batch["input_ids"].shape[0] == 1 and pad not in batch["input_ids"][0, :documents]
        assert batch["input_ids"].shape[1] % 8 == 0 and len(filling) < 8 and (filling == pad).all()
        assert (batch["labels"][0, documents:] == -100).all()
        starts = [*(batch["input_ids"][0] == bos).nonzero().flatten().tolist(), documents]
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


def test_an_over_long_row_is_left_out_and_none_is_cut(gpu):
    long = {"Question": "Why?", "Complex_CoT": "Because. " * 200, "Response": "So."}
    trainer, examples = trainer_for(
        gpu, Dataset.from_list([ROWS[0], long, *ROWS[1:]]), max_seq_length=192, per_device_train_batch_size=3
    )
    whole = [gpu.tokenizer(format_example(*row.values(), gpu.tokenizer.eos_token))["input_ids"] for row in ROWS]
    assert max(map(len, whole)) <= 192 and examples["input_ids"][:] == whole
    batch = next(iter(trainer.get_train_dataloader()))
    found = [[i for i in ids if i != gpu.tokenizer.pad_token_id] for ids in batch["input_ids"].tolist()]
    assert sorted(found) == sorted(whole)


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


def test_losses_are_equal_where_every_layer_sends_its_activations(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SMALLEST", 1)  # this model's tensors are far below what is worth sending
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True, "max_steps": 6}
    losses, chunks = {}, {}
    for name, gib in (("recomputed", 0.0), ("sent", 1.0)):
        trainer, _ = one_run(gpu, tmp_path / name, activation_host_gib=gib, **changes)
        sender = activations._SENDERS.get(trainer.model.get_decoder().layers)
        trainer.train()
        chunks[name] = len(sender.chunks) if sender else 0
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        activations.release_host_memory(trainer.model)
        assert sender is None or (not sender.chunks and not sender.away)
    print(f"\n{losses}, {chunks} chunks of host memory")
    assert chunks["recomputed"] == 0 and chunks["sent"] >= 1
    assert losses["sent"] == pytest.approx(losses["recomputed"], abs=1e-3)


def test_without_host_memory_the_run_goes_on_in_smaller_micro_batches(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "SMALLEST", 1)
    changes = {
        "padding_free": True,
        "activation_host_gib": 1.0,
        "max_steps": 4,
        "warmup_steps": 0,
        "learning_rate": 1e-4,
    }
    trainer, settings = one_run(
        gpu, tmp_path / "plain", per_device_train_batch_size=4, gradient_accumulation_steps=2, **changes
    )
    train(trainer, settings)
    plain, place, asked = losses_of(settings), activations.Sender._place, []

    def none_left(sender, size):
        asked.append(size)
        if len(asked) == 40:
            raise torch.OutOfMemoryError("CUDA out of memory. No host memory for activations")
        return place(sender, size)

    monkeypatch.setattr(activations.Sender, "_place", none_left)
    trainer, settings = one_run(
        gpu, tmp_path / "starved", per_device_train_batch_size=8, gradient_accumulation_steps=1, **changes
    )
    train(trainer, settings)
    print(f"\nnotes {record(settings)['notes']}\nplain   {plain}\nstarved {losses_of(settings)}")
    assert any("micro-batch 8 to 4, accumulation 1 to 2" in note for note in record(settings)["notes"])
    assert len(asked) > 40 and losses_of(settings) == pytest.approx(plain, abs=1e-3)


def is_apart(model, batch):
    """Asserts that each document of a batch laid end to end has the logits it has alone, and that a leak would show."""
    batch = {name: value.to("cuda") for name, value in batch.items() if name != "labels"}
    lengths = batch["packed_seq_lengths"].tolist()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        together = model(**batch, return_dict=True).logits
        if not isinstance(together, torch.Tensor):  # unsloth returns no logits while it trains
            pytest.fail("no logits came back: set UNSLOTH_RETURN_LOGITS=1 for this test")
        place = 0
        for length in lengths:
            ids = batch["input_ids"][:, place : place + length]
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            difference = (together[:, place : place + length] - alone).abs().max().item()
            print(f"\ndocument of {length} tokens: largest logit difference {difference:.2e}")
            torch.testing.assert_close(together[:, place : place + length], alone, atol=2e-2, rtol=0)
            place += length
        # A leak would show: the second document alone differs from it with the first one visible.
        first, second = lengths[:2]
        ids = batch["input_ids"][:, : first + second]
        leaking = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, first:]
        assert (leaking - together[:, first : first + second]).abs().max() > 0.1


def test_a_padding_free_batch_keeps_its_documents_apart(gpu):
    trainer, _ = trainer_for(gpu, Dataset.from_list(ROWS), padding_free=True, per_device_train_batch_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == batch["input_ids"].shape and len(batch["packed_seq_lengths"]) == 3
    is_apart(gpu.model, batch)


def test_a_packed_batch_keeps_its_documents_apart(gpu, tmp_path):
    # No profile packs (steps would see other examples), but whoever sets packing on the stock trainer gets this.
    from trl import SFTConfig, SFTTrainer

    examples = to_examples(Dataset.from_list(ROWS), gpu.tokenizer, gpu.settings, show=False)
    arguments = SFTConfig(
        output_dir=str(tmp_path), packing=True, max_length=2048, per_device_train_batch_size=1, report_to="none",
        fp16=True, bf16=False, completion_only_loss=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model=gpu.model, processing_class=gpu.tokenizer, args=arguments, train_dataset=examples)
    assert len(trainer.train_dataset) == 1  # three documents in one row
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["packed_seq_lengths"].tolist()) == sorted(map(len, examples["input_ids"]))
    is_apart(gpu.model, batch)


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
    from medcot.model import for_inference

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
    from medcot.evaluation.likelihood import score_choices
    from medcot.prompts import format_completion, list_options

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
            assert found.items[i].log_likelihood[k] == pytest.approx(alone, abs=0.05)


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


def test_answers_of_a_left_padded_batch_are_those_one_at_a_time(gpu, tmp_path):
    settings = replace(
        gpu.settings, answer_rows=12, max_new_tokens=96, output_dir=tmp_path / "batch", generation_batch_size=12
    )
    one_by_one = replace(settings, output_dir=tmp_path / "single", generation_batch_size=1)
    model, tokenizer = load_model(gpu.settings)
    rows = gpu.splits.eval
    lengths = {len(tokenizer(format_prompt(question))["input_ids"]) for question in rows["Question"]}
    assert len(rows) == 12 and len(lengths) > 3  # so the shorter prompts are padded
    together, alone = (generate_answers(model, tokenizer, rows, which) for which in (settings, one_by_one))
    same = [a.completion == b.completion for a, b in zip(together, alone, strict=True)]
    print(f"\n{sum(same)} of {len(same)} answers equal, prompts of {min(lengths)} to {max(lengths)} tokens")
    for question, a, b in zip(rows["Question"], together, alone, strict=True):
        first, second = (tokenizer(one.completion, add_special_tokens=False)["input_ids"] for one in (a, b))
        apart = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
        if apart is None:
            assert first == second
            continue
        # In 16 bits a batch adds in another order: another token is right only where both are as likely.
        ids = torch.tensor([tokenizer(format_prompt(question))["input_ids"] + first[:apart]], device="cuda")
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
        assert abs(logits[first[apart]] - logits[second[apart]]) < 0.05
    assert sum(same) >= 10


def test_one_new_token_is_attended_to_without_copies_of_keys_and_values(gpu):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    query = torch.randn(3, 1, 32, 128, device="cuda", dtype=torch.float16).transpose(1, 2)
    key, value = torch.randn(2, 77, 3, 8, 128, device="cuda", dtype=torch.float16).permute(0, 2, 3, 1, 4)
    mask = torch.ones(3, 1, 1, 77, dtype=torch.bool, device="cuda")
    mask[1, ..., :30] = False  # a shorter question, padded on the left
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, enable_gqa=True
    )
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = decoding_attention(query, key, value, enable_gqa=True, attn_mask=mask, is_causal=False)
        with pytest.raises(RuntimeError):  # why it is there: a T4 has no other kernel than the one that copies
            torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)
    assert sys.modules["unsloth.models.llama"].scaled_dot_product_attention is decoding_attention


@pytest.mark.parametrize("lengths", [(5, 130, 64, 1, 200), (400,), (3, 3, 3, 7)])
def test_documents_in_one_call_are_what_they_are_one_by_one(gpu, lengths):
    from unsloth.utils import attention_dispatch

    torch.manual_seed(0)
    tokens = sum(lengths)
    query = torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.float16).transpose(1, 2)
    key, value = torch.randn(2, 1, tokens, 8, 128, device="cuda", dtype=torch.float16).transpose(2, 3)
    weight = torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.float16)
    used, found = [], {}
    for name in ("in one call", "one by one"):
        attention = attention_dispatch._sdpa_packed_segments
        attention = attention if name == "in one call" else attention.one_by_one
        ours = [part.detach().requires_grad_() for part in (query, key, value)]
        with torch.profiler.profile() as calls:
            out = attention(
                *ours, lengths, n_groups=4, is_causal=True, sliding_window=None, sdpa_kwargs={}, training=True
            )
        used.append(sum(e.count for e in calls.key_averages() if e.key == "aten::_efficient_attention_forward"))
        (out * weight).sum().backward()
        found[name] = [out, *(part.grad for part in ours)]
    assert used[0] == 1
    for one, other in zip(*found.values(), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=4e-3, rtol=4e-3)


def test_unsloth_cuts_what_does_not_fit_max_seq_length_on_the_right(gpu):
    # So no prompt longer than that may reach it: in a left-padded batch every row would lose its end.
    model, _ = load_model(replace(gpu.settings, max_seq_length=128))
    ids = torch.randint(10, 500, (2, 160), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16):
        cut = model.get_decoder()(input_ids=ids).last_hidden_state
        fits = model.get_decoder()(input_ids=ids[:, :128]).last_hidden_state
    assert cut.shape[1] == 128
    torch.testing.assert_close(cut, fits, atol=1e-2, rtol=0)


# --- faults, with the real allocator, the real fp16 scaler and a real kill ----------------------------------------------


def one_run(gpu, folder, **changes):
    """A trainer for a few long rows, and its settings, with a folder of its own."""
    settings = replace(gpu.settings, output_dir=folder, **changes)
    model, tokenizer = load_model(settings)
    rows = Dataset.from_list([dict(row) for row in gpu.splits.train.select(range(16))])
    rows = rows.map(lambda row: {"Complex_CoT": (row["Complex_CoT"] + "\n") * 20})
    trainer = make_trainer(
        add_lora(model, settings), tokenizer, to_examples(rows, tokenizer, settings, show=False), settings
    )
    return trainer, settings


def record(settings):
    return json.loads((settings.output_dir / "training.json").read_text())


def losses_of(settings):
    return [entry["loss"] for entry in record(settings)["log_history"] if "loss" in entry]


def test_out_of_memory_halves_the_micro_batch(gpu, tmp_path):
    changes = {"max_steps": 3, "warmup_steps": 0, "gradient_checkpointing": False, "learning_rate": 1e-4}
    peaks = {}
    for size in (4, 8):
        torch.cuda.empty_cache()
        trainer, settings = one_run(
            gpu,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **changes,
        )
        torch.cuda.reset_peak_memory_stats()
        train(trainer, settings)
        peaks[size] = torch.cuda.max_memory_allocated() / 2**30
        del trainer
    plain = losses_of(settings)
    assert peaks[8] > peaks[4] + 0.05, peaks
    torch.cuda.empty_cache()
    trainer, settings = one_run(
        gpu, tmp_path / "starved", per_device_train_batch_size=8, gradient_accumulation_steps=1, **changes
    )
    torch.cuda.empty_cache()
    try:
        cap(peaks[4] + 0.7 * (peaks[8] - peaks[4]))
        train(trainer, settings)
    finally:
        cap(T4_GIB)
    notes = record(settings)["notes"]
    print(f"\npeaks {peaks}\nnotes {notes}\nplain   {plain}\nstarved {losses_of(settings)}")
    assert any("out of memory after step 0: micro-batch 8 to 4, accumulation 1 to 2" in note for note in notes)
    assert losses_of(settings) == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("start", [2.0**24, 2.0**90])
def test_updates_that_overflow_in_fp16_are_counted_and_stop_a_run_that_never_settles(gpu, tmp_path, start):
    trainer, settings = one_run(gpu, tmp_path, per_device_train_batch_size=4, max_steps=16)
    # A loss scale far too large, as at the start of fp16 training, only more so: it is halved after each overflow.
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=start)
    if start > 2.0**60:
        with pytest.raises(MedcotError, match=r"11 updates in a row were skipped .* lower learning_rate="):
            train(trainer, settings)
        return
    train(trainer, settings)
    halved = math.log2(start / trainer.accelerator.scaler.get_scale())
    print(f"\nskipped updates {record(settings)['skipped_updates']}, scale halved {halved:.0f} times")
    assert record(settings)["skipped_updates"] == halved and 1 <= halved <= 10


def test_a_killed_run_goes_on_with_the_same_losses(gpu, tmp_path):
    def command(folder):
        settings = replace(
            gpu.settings,
            output_dir=tmp_path / folder,
            max_steps=60,
            save_steps=10,
            learning_rate=2e-4,
            padding_free=True,
        )
        settings.output_dir.mkdir()
        file = settings.output_dir / "settings.json"
        file.write_text(json.dumps(dataclasses.asdict(settings), default=str))
        return settings, [sys.executable, "-m", "medcot", "train", "--settings", str(file)]

    whole, run = command("whole")
    subprocess.run(run, check=True, capture_output=True)
    broken, run = command("broken")
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished = broken.output_dir / "checkpoints" / "checkpoint-20" / "checkpoint.json"
    assert until(finished.is_file, 180)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken.output_dir / "training.json").exists()
    again = subprocess.run(run, check=True, capture_output=True, text=True)
    assert "going on from" in again.stdout
    assert len(losses_of(broken)) == len(losses_of(whole)) == 60
    apart = max(abs(a - b) for a, b in zip(losses_of(broken), losses_of(whole), strict=True))
    print(
        f"\n{record(broken)['notes']}, skipped {record(broken)['skipped_updates']} and {record(whole)['skipped_updates']}"
    )
    print(f"largest difference of the losses {apart:.1e}")
    assert apart < 1e-3 and record(broken)["skipped_updates"] == record(whole)["skipped_updates"]


def test_two_processes_measure_on_a_gpu_what_one_measures(gpu, tmp_path):
    # Two machines of one process each, so that both may sit on the one card that is here.
    settings = replace(
        gpu.settings, nproc_per_node=2, output_dir=tmp_path / "one", generation_batch_size=2, answer_rows=4,
        choice_answer_rows=2, chat_rows=4, max_new_tokens=24,
    )  # fmt: skip
    save_adapter(gpu.model, gpu.tokenizer, settings)
    two = replace(settings, output_dir=tmp_path / "two")
    shutil.copytree(settings.adapter_dir, two.output_dir / ADAPTER_FOLDER)
    for one_or_two in (settings, two):
        file = one_or_two.output_dir / "settings.json"
        file.write_text(json.dumps(dataclasses.asdict(one_or_two), default=str))
    alone = [sys.executable, "-m", "medcot", "evaluate", "--settings", str(settings.output_dir / "settings.json")]
    subprocess.run(alone, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
             "--master_addr=127.0.0.1", f"--master_port={port}", "-m", "medcot", "evaluate", "--settings", str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], shown
    files = sorted(path.relative_to(settings.output_dir) for path in settings.output_dir.glob("*/*.jsonl"))
    assert files == sorted(path.relative_to(two.output_dir) for path in two.output_dir.glob("*/*.jsonl")) and files
    for path in files:
        one, other = ([json.loads(line) for line in (s.output_dir / path).open()] for s in (settings, two))
        assert len(one) == len(other)
        for a, b in zip(one[1:], other[1:], strict=True):
            assert a.get("completion") == b.get("completion") and a["row"] == b["row"]
            assert a.get("log_likelihood", [0]) == pytest.approx(b.get("log_likelihood", [0]), abs=0.02)
