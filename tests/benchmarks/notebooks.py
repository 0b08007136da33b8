"""The three notebooks themselves from start to end on a GPU, with every part of the evaluation timed.

python tests/benchmarks/notebooks.py --model FOLDER --out FOLDER [--t4] [--profile kaggle-t4]

FOLDER is any 8B-shaped model; with random weights no answer ends by itself, so every one has all its `max_new_tokens`:
the longest that the evaluation can take. Rows and questions have about the lengths of the real ones in tokens of the
model's own tokenizer. The notebooks are run as they are by `medcot demo`; a start-up file of their kernels holds
the card to T4 conditions, watches the parts of the evaluation, and compares greedy tokens of the trained model in 02
with those of the reloaded one in 03. Of a profile on two GPUs, the processes that torchrun starts are held to the same
conditions and timed as a whole, by the cell that starts them, loading included. Prints a Markdown table and writes
notebooks.json. The estimate for a T4 is arithmetic over counted tokens and steps, not a measurement; its assumptions are
the constants below.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from speed import t4_conditions

# What a T4 sustains in fp16 products, least and most. Least: a whole 2 x 4 training of this kind on one T4 took 1,317 s
# (README, Speed) for 480 examples x 740 tokens x 1.12 for padding x 44.6 GFLOP. Most: of the 24 measured for large
# products alone, held back by the card's 70 W (forums.developer.nvidia.com/t/264462), what is left with all else: assumed.
T4_TFLOPS = (13.5, 20)
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
    """Rows of 743 tokens on average with the template, and 1,273 questions of 190 with options of 8 each."""
    from medcot import format_prompt
    from medcot.tiny.cases import training_cases

    chance, template = random.Random(seed), len(tokenizer(format_prompt(""))["input_ids"])
    words = sorted({word for case in training_cases(300, seed=1) for word in case["Question"].split()})
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(600):
            length = min(1800, max(300, int(chance.lognormvariate(6.593, 0.19)))) - template
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


def watch(parts, keep):
    """Has every part of the evaluation note its seconds, its peak memory and the work that was counted in it."""
    import torch

    from medcot import inference
    from medcot.evaluation import likelihood, measure
    from medcot.identity import adapter_id
    from medcot.run import answers

    gpu = torch.cuda.is_available()

    def sides(model):
        return "before" if adapter_id(model) == "base" else "after"

    def timed(name, function):
        def run(*arguments, **named):
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            what = {"answers": "evaluation rows", "choice answers": "multiple choice"}.get(arguments[-1])
            what = f"{name} to {what}" if name == "answers" and what else name
            title = f"{sides(arguments[0])}: {what}{', own template' if named.get('chat') else ''}"
            parts.append({"part": title, "tokens": 0, "steps": []})
            started = time.perf_counter()
            found = function(*arguments, **named)
            if gpu:
                torch.cuda.synchronize()
            parts[-1]["seconds"] = time.perf_counter() - started
            keep()
            return found

        return run

    def noted(function):  # every part says its peak, and resets it, when its last batch is done
        def report(what):
            if parts:
                parts[-1]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
                parts[-1]["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30 if gpu else 0.0
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

    measure.score_references = timed("likelihood of references", measure.score_references)
    measure.score_choices = timed("multiple choice by likelihood", measure.score_choices)
    measure.answer_all = answers.answer_all = timed("answers", answers.answer_all)
    answers.report_memory = likelihood.report_memory = noted(answers.report_memory)
    likelihood._score_batch = counted_scores(likelihood._score_batch)
    inference._generate_batch = counted_answers(inference._generate_batch)


def estimate(part, config, kernel_rows=32):
    """Minutes on a T4, least and most, by the constants above; 4-bit weights are multiplied as they are up to `kernel_rows`."""
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
        if (
            batch["rows"] <= kernel_rows
        ):  # multiplied as they are: half a byte a weight, and a byte of scale for 64 of them
            slow, fast = (0.516 * weights / share for share in T4_KERNEL_SHARE)
        else:  # unpacked into 16 bits for every step, then read again
            slow = fast = (0.516 + 2 + 2) * weights
        most += batch["steps"] * (slow + 2 * head + keys) / T4_BANDWIDTH
        least += batch["steps"] * (fast + 2 * head + keys) / T4_BANDWIDTH
    return least / 60, most / 60


def watch_reload(folder):
    """Has 02 keep greedy tokens of what it trained, and 03 say whether those of the reloaded adapter are the same."""
    import medcot
    from medcot.model import for_inference

    questions = ["Where is the pain?", "The patient has chest pain and fever. What is the next step?"]

    def greedy(model, tokenizer):
        prompts = [tokenizer(medcot.format_prompt(question))["input_ids"] for question in questions]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = for_inference(model).generate(
            **inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return output.tolist()

    def saving(model, tokenizer, settings, function=medcot.save_adapter):
        found = function(model, tokenizer, settings)
        (folder / "greedy.json").write_text(json.dumps(greedy(model, tokenizer)))
        return found

    def loading(settings, adapter=None, function=medcot.load_model):
        model, tokenizer = function(settings, adapter)
        if adapter is not None:
            same = greedy(model, tokenizer) == json.loads((folder / "greedy.json").read_text())
            (folder / "reloaded.json").write_text(json.dumps({"same_greedy_tokens_in_a_fresh_process": same}))
        return model, tokenizer

    medcot.save_adapter, medcot.load_model = saving, loading


def start(folder, t4):
    """What the start-up file of each kernel calls."""
    import torch

    if t4:
        t4_conditions()
    parts, started = [], time.time()

    def keep():  # after each part: a kernel is not given the time to do anything at its end
        made = {"torch": torch.__version__, "parts": parts, "seconds": time.time() - started}
        made |= {"flash_attention": torch.backends.cuda.flash_sdp_enabled()}
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            cap = torch.cuda.get_per_process_memory_fraction() * total / 2**30
            made |= {"device": torch.cuda.get_device_name(), "cap_gib": cap}
        (Path(folder) / f"kernel-{started:.0f}.json").write_text(json.dumps(made))

    watch(parts, keep)
    watch_reload(Path(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--t4", action="store_true", help="hold the card to T4 conditions")
    parser.add_argument("--profile", default="kaggle-t4")
    options = parser.parse_args()
    from transformers import AutoConfig

    from medcot.profiles import PROFILES
    from medcot.tokenizer import load_tokenizer

    out = Path(options.out).absolute()
    begin = out / "ipython" / "profile_default" / "startup" / "00-start.py"
    begin.parent.mkdir(parents=True, exist_ok=True)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import notebooks"
    begin.write_text(f"{code}; notebooks.start({str(out)!r}, {options.t4})\n")
    (out / "site").mkdir(exist_ok=True)  # read by every Python, so also by those that torchrun starts
    (out / "site" / "sitecustomize.py").write_text(
        f"import os, sys\nif {options.t4} and 'RANK' in os.environ and 'medcot' in sys.orig_argv:\n"
        f"    {code}; notebooks.t4_conditions()\n"
    )
    for left in (*out.glob("kernel-*.json"), *out.glob("reloaded.json")):
        left.unlink()
    shutil.rmtree(out / "run", ignore_errors=True)
    write_data(load_tokenizer(options.model), out)
    environment = {
        "IPYTHONDIR": out / "ipython", "MEDCOT_PROFILE": options.profile, "MEDCOT_MODEL": options.model,
        "MEDCOT_DATASET": out / "rows.jsonl", "MEDCOT_CHOICES": out / "choices.jsonl", "MEDCOT_OUT": out / "run",
        "PYTHONPATH": os.pathsep.join([str(out / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }  # fmt: skip
    started = time.perf_counter()
    with (out / "demo.log").open("w") as log:
        demo = subprocess.run(
            [sys.executable, "-m", "medcot", "demo"], stdout=log, stderr=subprocess.STDOUT, check=False,
            env=os.environ | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if demo.returncode:
        sys.exit(f"medcot demo stopped with status {demo.returncode}: see {out / 'demo.log'}")
    kernels = [json.loads(file.read_text()) for file in sorted(out.glob("kernel-*.json"))]
    parts = [part for kernel in kernels for part in kernel["parts"] if part["tokens"]]
    config = AutoConfig.from_pretrained(options.model)
    for part in parts:
        part["t4_minutes"], part["t4_minutes_unpacking"] = estimate(part, config), estimate(part, config, kernel_rows=0)
    shown = (out / "demo.log").read_text(errors="replace").replace("\r", "\n").replace(str(out), "OUT").splitlines()
    marks = ("trainable params", "peak", "forecast", "skipped", "adapter saved", "Error", "layers keep")
    made = {
        "date": time.strftime("%Y-%m-%d"), "profile": options.profile, "seconds": seconds,
        "t4_conditions": options.t4,
        "reserved_gib": max(part["reserved_gib"] for part in parts),
        "processes": PROFILES[options.profile].nproc_per_node, "seconds_on_all_gpus": cells_on_all_gpus(out),
        "t4_minutes": [sum(part["t4_minutes"][k] for part in parts) for k in (0, 1)], "parts": parts,
        "kernels": [{name: value for name, value in kernel.items() if name != "parts"} for kernel in kernels],
        "shown": [line for line in shown if any(mark in line for mark in marks) and "/s]" not in line],
    }  # fmt: skip
    made |= json.loads((out / "reloaded.json").read_text())
    record = json.loads((out / "run" / "training.json").read_text())
    made["training"] = {
        name: record[name]
        for name in ("steps", "seconds", "skipped_updates", "forecast", "peak_memory_gib", "versions")
    }
    (out / "notebooks.json").write_text(json.dumps(made, indent=1))
    print(table(made))


def cells_on_all_gpus(out):
    """{cell: seconds} of the cells that start a process on each GPU."""
    import nbformat

    found = {}
    for file in sorted((out / "run" / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.source.endswith("_on_all_gpus(settings)"):
                times = {name: datetime.fromisoformat(at) for name, at in cell.metadata.execution.items()}
                taken = times["iopub.status.idle"] - times["iopub.status.busy"]
                found[cell.source.splitlines()[-1]] = taken.total_seconds()
    return found


def table(made):
    lines = ["| part | tokens read | decoding steps x rows | seconds | peak GiB | T4 minutes, estimated |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for part in made["parts"]:
        steps = " + ".join(f"{batch['steps']:,} x {batch['rows']}" for batch in part["steps"]) or "-"
        low, high = part["t4_minutes"]
        lines.append(
            f"| {part['part']} | {part['tokens']:,} | {steps} | {part['seconds']:.1f} | {part['peak_gib']:.1f} | "
            f"{low:.1f} to {high:.1f} |"
        )
    whole = f"| the three notebooks, with loading and training | | | {made['seconds']:.0f} | | |"
    if made["processes"] > 1:  # the parts above are those of 01
        for cell, seconds in made["seconds_on_all_gpus"].items():
            lines.append(f"| {made['processes']} processes: `{cell}` | | | {seconds:.0f} | | |")
        return "\n".join([*lines, whole])
    low, high = made["t4_minutes"]
    seconds = sum(part["seconds"] for part in made["parts"])
    lines.append(f"| the evaluation | | | {seconds:.0f} | | {low:.0f} to {high:.0f} |")
    low, high = (sum(part["t4_minutes_unpacking"][k] for part in made["parts"]) for k in (0, 1))
    lines.append(f"| the evaluation, if every decoding step unpacked the weights | | | | | {low:.0f} to {high:.0f} |")
    return "\n".join([*lines, whole])


if __name__ == "__main__":
    main()
