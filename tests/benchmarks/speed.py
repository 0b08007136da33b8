"""Training and generation speed of the recipes, in one run on one GPU.

python tests/benchmarks/speed.py --model FOLDER --out FOLDER [--t4] [--steps 12] [--only NAME ...]

The recipes of one stack share a process and one loaded model; TRL's have another, because unsloth's patches cannot be
taken back. All see the same examples in the same order. Speed is real (unpadded) tokens a second, the median over the
steps after the warm-up. `--t4` holds the card to T4 conditions: fp16, 14.5 GiB, no flash and no cuDNN attention. Prints
a Markdown table and writes speed.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

T4_GIB = 14.5
WARM_UP = 3
# name: (stack, micro-batch, accumulation, padding free, GiB of kept activations)
TRAINING = {
    "kaggle-t4: Unsloth, 2 x 4, padded": ("unsloth", 2, 4, False, 0.0),
    "Unsloth, 8 x 1, padding-free": ("unsloth", 8, 1, True, 0.0),
    "Unsloth, 8 x 1, padding-free, 8 GiB kept": ("unsloth", 8, 1, True, 8.0),
    "kaggle-t4-fast: Unsloth, 4 x 2, padding-free, 8 GiB kept": ("unsloth", 4, 2, True, 8.0),
    "Unsloth, 4 x 2, padding-free, 10 GiB kept": ("unsloth", 4, 2, True, 10.0),
    "Unsloth, 2 x 4, padding-free, 8 GiB kept": ("unsloth", 2, 4, True, 8.0),
    "TRL + PEFT + bitsandbytes, 2 x 4": ("trl", 2, 4, False, 0.0),
    "kaggle-t4x2: two GPUs, 4 x 1 x 2": ("torchrun", 4, 1, True, 8.0),
    "two GPUs, 4 x 2 x 2 (16 examples a step)": ("torchrun", 4, 2, True, 8.0),
}
# name: (stack, questions at once, CUDA graphs in decoding)
GENERATION = {
    "generation, one question at a time": ("generation", 1, False),
    "generation, 16 questions, CUDA graphs": ("generation", 16, True),
    "generation, 32 questions": ("generation", 32, False),
    "generation, 32 questions, CUDA graphs": ("generation", 32, True),
    "generation, 48 questions, CUDA graphs": ("generation", 48, True),
}
RECIPES = TRAINING | GENERATION
# What the others are set against in the table, where it was measured in the same call.
AGAINST = {
    "kaggle-t4": "kaggle-t4: Unsloth, 2 x 4, padded",
    "kaggle-t4-fast": "kaggle-t4-fast: Unsloth, 4 x 2, padding-free, 8 GiB kept",
    "TRL": "TRL + PEFT + bitsandbytes, 2 x 4",
    "one at a time": "generation, one question at a time",
}


def cap(gib):
    """Holds this process to so many GiB of its card."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def t4_conditions():
    """Holds this process to what a T4 has, as far as another card can be held to it; fp16 comes from the settings."""
    import torch

    from medcot.environment import prepare_environment

    prepare_environment()  # as load_settings does, before the GPU is first used
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    cap(T4_GIB)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Unsloth decodes up to 16 rows with bitsandbytes' fused 4-bit product on a T4 and nowhere else, unless told to.
    os.environ.setdefault("UNSLOTH_BNB_GEMM_4BIT", "1")


def examples(rows: int, vocabulary: int, seed: int = 3407):
    """Random token rows with the data set's length distribution: log-normal, median 730, 95th percentile about 1,000."""
    import datasets

    chance = random.Random(seed)
    made = []
    for _ in range(rows):
        length = min(2048, max(200, int(chance.lognormvariate(6.593, 0.19))))
        ids = [0, *(chance.randrange(10, vocabulary) for _ in range(length - 2)), 1]
        made.append({"input_ids": ids, "completion_mask": [1] * length})
    return datasets.Dataset.from_list(made)


def settings_for(options, recipe=(None, 2, 4, False, 0.0)):
    from medcot.profiles import PROFILES

    _, size, accumulation, padding_free, gib = recipe
    return replace(
        PROFILES["kaggle-t4"], model=options.model, output_dir=Path(options.out) / "run", report_to="none",
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, padding_free=padding_free,
        activation_memory_gib=gib, max_steps=options.steps, warmup_steps=1, eval_steps=10**6, save_steps=10**6,
    )  # fmt: skip


def timed(trainer, rows):
    """Trains and returns seconds a step and the losses; a step is timed to its end on the GPU."""
    import torch
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    trainer.add_callback(Clock())
    trainer.train()
    # The order the sampler drew the rows in, to count each step's real tokens, over all processes.
    micro, tokens = trainer.args.gradient_accumulation_steps, []
    batches = [sum(len(rows[i]["input_ids"]) for i in batch) for batch in trainer.get_train_dataloader().batch_sampler]
    for step in range(len(seconds)):
        tokens.append(sum(batches[micro * step : micro * step + micro]))
    if trainer.args.world_size > 1:
        counts = torch.tensor(tokens, device="cuda")
        torch.distributed.all_reduce(counts)
        tokens = counts.tolist()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, tokens, losses


def trl_trainer(options, recipe, rows):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    settings = settings_for(options, recipe)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four_bit, dtype=torch.float16, attn_implementation="sdpa", device_map={"": 0}
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(settings.output_dir), max_length=2048, per_device_train_batch_size=recipe[1],
            gradient_accumulation_steps=recipe[2], learning_rate=2e-4, max_steps=settings.max_steps, warmup_steps=1,
            optim="adamw_8bit", weight_decay=0.01, logging_steps=1, save_strategy="no", seed=3407, data_seed=3407,
            fp16=True, bf16=False, gradient_checkpointing=True, report_to="none", completion_only_loss=True,
        ),
    )  # fmt: skip
    for weight in trainer.model.parameters():  # TRL casts adapters to bf16, for which the fp16 scaler has no kernel
        if weight.requires_grad:
            weight.data = weight.data.float()
    return trainer


def unsloth_trainer(options, recipe, rows, loaded={}):  # noqa: B006, the one model that the recipes share
    import torch

    from medcot import add_lora, load_model, make_trainer

    settings = settings_for(options, recipe)
    if not loaded:
        model, loaded["tokenizer"] = load_model(settings)
        loaded["model"] = add_lora(model, settings)
        loaded["fresh"] = {n: w.detach().cpu().clone() for n, w in loaded["model"].named_parameters() if "lora_" in n}
        loaded["model"].print_trainable_parameters()
    with torch.no_grad():  # every recipe starts from the same adapters
        for name, weight in loaded["model"].named_parameters():
            if name in loaded["fresh"]:
                weight.copy_(loaded["fresh"][name])
    for module in loaded["model"].modules():  # takes back what keep_activations set for the recipe before
        module.__dict__.pop("_unsloth_skip_checkpoint", None)
    return make_trainer(loaded["model"], loaded["tokenizer"], rows, settings)


def training(options, recipe):
    import gc

    import torch

    rows = examples(500, 1000)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    try:
        trainer = (trl_trainer if recipe[0] == "trl" else unsloth_trainer)(options, recipe, rows)
        seconds, tokens, losses = timed(trainer, rows)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error)[:120]}"}
    rates = [count / took for count, took in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)]
    return {
        "tokens_per_second": statistics.median(rates),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),  # each one empties the cache and waits
        "losses": losses,
        "seconds": seconds,
    }


def generation(options, recipe, loaded={}):  # noqa: B006, the one model that the recipes share
    import gc

    import torch
    from transformers import GenerationConfig

    from medcot import load_model

    if not loaded:
        loaded["model"], loaded["tokenizer"] = load_model(settings_for(options))
    model, tokenizer, (_, size, graphs) = loaded["model"], loaded["tokenizer"], recipe
    os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = str(int(graphs))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = GenerationConfig(
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompts = [ids[:200] for ids in examples(size, 1000)["input_ids"]]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to("cuda")
    rates = []
    try:
        for repeat in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(**inputs, generation_config=config)
            torch.cuda.synchronize()
            made = (output.shape[1] - inputs["input_ids"].shape[1]) * size
            if repeat:  # the first call compiles and captures
                rates.append(made / (time.perf_counter() - started))
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error)[:120]}"}
    return {"tokens_per_second": statistics.median(rates), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def matrix_rate():
    """Sustained fp16 matrix products of this card in TFLOP/s, 8192 cubed, median of 20."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    took = []
    for _ in range(25):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return 2 * 8192**3 / statistics.median(took[5:]) / 1e12


def run_stack(options):
    """In a process of its own: the recipes of one stack, each result written as soon as it is there."""
    import torch

    if options.t4:
        t4_conditions()
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    card["versions"] = {name: version(name) for name in ("unsloth", "transformers", "trl", "peft", "bitsandbytes")}
    results = {"card": card | {"matrix_tflops": matrix_rate()}}
    for name in options.only:
        if RECIPES[name][0] == options.stack:
            print(f"=== {name}", flush=True)
            results[name] = (generation if options.stack == "generation" else training)(options, RECIPES[name])
            if os.environ.get("RANK", "0") == "0":
                (Path(options.out) / f"{options.stack}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an 8B-shaped model, in 4 bits to save time")
    parser.add_argument("--out", required=True)
    parser.add_argument("--t4", action="store_true", help="hold the card to T4 conditions")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--stack", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stack:
        return run_stack(options)
    out, results = Path(options.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for stack in dict.fromkeys(RECIPES[name][0] for name in options.only):
        started = time.monotonic()
        with (out / f"{stack}.log").open("w") as log:
            launch = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if stack == "torchrun" else []
            )
            # Where it sees several GPUs, TRL refuses to train in one process.
            cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[: 2 if launch else 1]
            subprocess.run(
                [sys.executable, *launch, *sys.argv, "--stack", stack],
                stdout=log, stderr=log, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards)},
            )  # fmt: skip
        found = out / f"{stack}.json"
        results |= json.loads(found.read_text()) if found.exists() else {}
        print(f"{stack}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    for name in options.only:
        results.setdefault(name, {"error": f"failed, see {RECIPES[name][0]}.log"})
    made = {"date": time.strftime("%Y-%m-%d"), "t4_conditions": options.t4, "results": results}
    (out / "speed.json").write_text(json.dumps(made, indent=1))
    print(table(results))


def table(results):
    card = results.get("card", {})
    lines = [
        f"{card.get('device')}, torch {card.get('torch')}, fp16 products {card.get('matrix_tflops', 0):.0f} TFLOP/s",
        "",
    ]
    lines += ["| recipe | real tokens/s | seconds a step | peak GiB | reserved | times | losses, steps 1, 2, 3, last |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name in (name for name in results if name != "card"):
        found = results[name]
        if "error" in found:
            lines.append(f"| {name} | {found['error']} | | | | | |")
            continue
        losses = found.get("losses", [])
        shown = " ".join(f"{loss:.4f}" for loss in (*losses[:3], *losses[-1:]))
        reserved = f"{found['reserved_gib']:.1f}" if "reserved_gib" in found else ""
        reserved += f", {found['alloc_retries']} retries" if "alloc_retries" in found else ""
        took = sorted(found.get("seconds", [])[WARM_UP:])
        took = f"{statistics.median(took):.2f} ({took[0]:.2f} to {took[-1]:.2f})" if took else ""
        times = ", ".join(
            f"{found['tokens_per_second'] / results[other]['tokens_per_second']:.2f} x {short}"
            for short, other in AGAINST.items()
            if (name in TRAINING) == (other in TRAINING)
            and "tokens_per_second" in results.get(other, {})
            and other != name
        )
        rate = f"{found['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {rate} | {took} | {found['peak_gib']:.1f} | {reserved} | {times} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
