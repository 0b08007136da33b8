"""The default evaluation from 01's answers to the end of 03's measuring, timed part by part, and what a T4 would take.

python tests/benchmarks/evaluation.py --model FOLDER --out FOLDER [--t4] [--profile kaggle-t4]

FOLDER is any 8B-shaped model; with random weights no answer ends by itself, so every one has all its `max_new_tokens`:
the longest that the evaluation can take. Questions have the lengths of the real ones (README, Speed) in the tokens of
the model's own tokenizer. Prints a Markdown table and writes evaluation.json. The estimate for a T4 is arithmetic over
counted tokens and steps, not a measurement; its two assumptions are the constants below.
"""

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

from speed import T4_GIB, t4_conditions

# What a T4 sustains in fp16 products, lower and upper: 24 were measured for large products alone
# (forums.developer.nvidia.com/t/264462); a whole 2 x 4 training of this kind took 21:57, which is 13.5 with everything.
T4_TFLOPS = (15, 20)
T4_BANDWIDTH = 260e9  # bytes a second read in practice, of 320e9
T4_KERNEL_SHARE = (1 / 3, 2 / 3)  # of that bandwidth, reached by the kernel that multiplies by 4-bit weights: assumed


def text(tokenizer, words, length, chance):
    """About `length` tokens of words."""
    made, tokens = [], 0
    while tokens < length:
        word = chance.choice(words)
        made.append(word)
        tokens += len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
    return " ".join(made)


def write_data(tokenizer, folder, seed=3407):
    """Training and evaluation rows of 780 tokens on average with the template, and 1,273 questions of 331 with theirs."""
    from medcot.tiny.cases import training_cases

    chance = random.Random(seed)
    words = sorted({word for case in training_cases(300, seed=1) for word in case["Question"].split()})
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(600):
            length = min(1800, max(250, int(chance.lognormvariate(6.593, 0.19)))) - 96
            row = {
                "Question": f"{text(tokenizer, words, 70, chance)} {i}",
                "Complex_CoT": text(tokenizer, words, length - 170, chance),
                "Response": text(tokenizer, words, 100, chance),
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "choices.jsonl").open("w") as file:
        for i in range(1273):
            length = min(900, max(40, int(chance.gauss(190, 70))))
            choices = [f"{text(tokenizer, words, chance.randint(2, 14), chance)} {k}" for k in range(4)]
            row = {"question": f"{text(tokenizer, words, length, chance)} {i}", "choices": choices, "answer": 0}
            file.write(json.dumps(row) + "\n")


def watch(parts):
    """Has every part of the evaluation note its seconds, its peak memory and the work that was counted in it."""
    import torch

    from medcot import inference

    def timed(name, function):
        def run(*arguments, **named):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            parts.append({"part": f"{name}{', own template' if named.get('chat') else ''}", "tokens": 0, "steps": []})
            started = time.perf_counter()
            found = function(*arguments, **named)
            torch.cuda.synchronize()
            parts[-1]["seconds"] = time.perf_counter() - started
            return found

        return run

    def noted(function):  # every part says its peak, and resets it, when its last batch is done
        def report(what):
            if parts:
                parts[-1]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                parts[-1]["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
            function(what)

        return report

    def counted_scores(function):
        def score(model, tokenizer, items, shared=(0, None)):
            longest = max(len(prompt) + sum(map(len, ends)) for prompt, ends in items) - shared[0]
            parts[-1]["tokens"] += longest * len(items)
            return function(model, tokenizer, items, shared)

        return score

    def counted_answers(function):
        def generate(model, inputs, config):
            output = function(model, inputs, config)
            rows, width = inputs["input_ids"].shape
            parts[-1]["tokens"] += rows * width
            parts[-1]["steps"].append({"rows": rows, "prompt": width, "steps": output.shape[1] - width})
            return output

        return generate

    inference.score_references = timed("likelihood of references", inference.score_references)
    inference.score_choices = timed("multiple choice by likelihood", inference.score_choices)
    inference._answer_all = timed("answers", inference._answer_all)
    inference.report_memory = noted(inference.report_memory)
    inference._score_batch = counted_scores(inference._score_batch)
    inference._generate_batch = counted_answers(inference._generate_batch)


def estimate(part, config):
    """Minutes on a T4, the least and the most, by the constants above."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    key_value = hidden * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    head = config.vocab_size * hidden
    least = most = 0.0
    for rate, sign in zip(T4_TFLOPS, (1, 0), strict=True):
        seconds = 2 * weights * part["tokens"] / (rate * 1e12)
        most, least = (seconds, least) if sign else (most, seconds)
    for batch in part["steps"]:
        seen = batch["prompt"] + batch["steps"] / 2
        keys = batch["rows"] * seen * layers * 2 * key_value * 2
        if batch["rows"] <= 16:  # multiplied as they are: half a byte a weight, and a byte of scale for 64 of them
            slow, fast = (0.516 * weights / share for share in T4_KERNEL_SHARE)
        else:  # unpacked into 16 bits for every step, then read again
            slow = fast = (0.516 + 2 + 2) * weights
        most += batch["steps"] * (slow + 2 * head + keys) / T4_BANDWIDTH
        least += batch["steps"] * (fast + 2 * head + keys) / T4_BANDWIDTH
    return least / 60, most / 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--t4", action="store_true", help="hold the card to T4 conditions")
    parser.add_argument("--profile", default="kaggle-t4")
    parser.add_argument("--new-tokens", type=int, help="instead of the profile's, for a quick look")
    options = parser.parse_args()
    import torch

    if options.t4:
        t4_conditions()
    from medcot import add_lora, evaluate, generate_answers, load_choices, load_model, load_splits, save_adapter
    from medcot.modeling import load_tokenizer
    from medcot.settings import PROFILES

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_data(load_tokenizer(options.model), out)
    settings = replace(
        PROFILES[options.profile], model=options.model, dataset=str(out / "rows.jsonl"), report_to="none",
        choice_dataset=str(out / "choices.jsonl"), output_dir=out / "run",
    )  # fmt: skip
    settings = replace(settings, max_new_tokens=options.new_tokens or settings.max_new_tokens)
    splits, questions, parts = load_splits(settings), load_choices(settings), []
    model, tokenizer = load_model(settings)
    model = add_lora(model, settings)
    for name, weight in model.named_parameters():  # an adapter that does something, as a trained one would
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    save_adapter(model, tokenizer, settings)
    watch(parts)
    started = time.perf_counter()
    with model.disable_adapter():
        generate_answers(model, tokenizer, splits.eval, settings)  # what 01_baseline leaves
        evaluate(model, tokenizer, splits, questions, settings)
    before = len(parts)
    evaluate(model, tokenizer, splits, questions, settings)
    whole = time.perf_counter() - started
    for i, part in enumerate(parts):
        part["side"] = "before" if i < before else "after"
        part["t4_minutes"] = estimate(part, model.config)
    made = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "t4_conditions": options.t4, "cap_gib": T4_GIB if options.t4 else None, "profile": options.profile,
        "fused_4bit_kernel": os.environ.get("UNSLOTH_BNB_GEMM_4BIT", "as unsloth decides"),
        "seconds": whole, "reserved_gib": max(part.get("reserved_gib", 0) for part in parts),
        "t4_minutes": [sum(part["t4_minutes"][k] for part in parts) for k in (0, 1)], "parts": parts,
    }  # fmt: skip
    (out / "evaluation.json").write_text(json.dumps(made, indent=1))
    print(table(made))


def table(made):
    lines = [
        "| side | part | tokens in prompts and texts | decoding steps | seconds | peak GiB | T4 minutes, estimated |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for part in made["parts"]:
        if not part["tokens"]:  # taken from what 01 left
            continue
        steps = " + ".join(f"{batch['steps']} x {batch['rows']}" for batch in part["steps"]) or "-"
        low, high = part["t4_minutes"]
        peak = f"{part['peak_gib']:.1f}"
        lines.append(
            f"| {part['side']} | {part['part']} | {part['tokens']:,} | {steps} | {part['seconds']:.1f} | {peak} | "
            f"{low:.1f} to {high:.1f} |"
        )
    low, high = made["t4_minutes"]
    lines.append(f"| both | everything | | | {made['seconds']:.0f} | | {low:.0f} to {high:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
