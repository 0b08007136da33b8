"""Training and answering speed of the recipes in `recipes.py`, on one GPU.

python tests/benchmarks/speed.py --model FOLDER --out FOLDER [--t4] [--steps 8] [--seconds 500] [--only NAME ...]

The recipes of one stack share a process and one loaded model; TRL's have another, because unsloth's patches cannot be
taken back. All see the same examples in the same order. Speed is real (unpadded) tokens a second, the median over the
steps after the warm-up. `--t4` measures in the shape of a T4 (`t4_shape.py`), with 14.5 GiB and what libraries choose on a
T4, and the recipes of training on the whole card too, for the losses of more steps. Prints a Markdown table and writes
speed.json. `FOLDER` is a model of the 8B's shape (`model_8b.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import t4_shape
from benchmarks.recipes import ANSWERING, RECIPES, T4_GIB, TRAINING, cap, t4_conditions
from benchmarks.running import WARM_UP, measure

__all__ = ["T4_GIB", "cap", "t4_conditions"]
# What the others are set against in the table, where it was measured in the same call.
AGAINST = {"kaggle-t4": "kaggle-t4: Unsloth, 2 x 4, padded", "TRL": "TRL + PEFT + bitsandbytes, 2 x 4"}
T4_STEPS = 60  # of kaggle-t4, for the estimate


def run_stack(options):
    """In a process of its own: the recipes of one stack in one form, each result written as soon as it is there."""
    import torch

    from medcot.environment import prepare_environment

    prepare_environment()
    deadline = time.monotonic() + options.seconds
    before = t4_shape.rates() if options.form == "shape" else None
    if options.t4:
        t4_conditions(shape=options.form == "shape")
    card = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "multiprocessors": t4_shape.MULTIPROCESSORS if before else torch.cuda.get_device_properties(0).multi_processor_count,
        "rates": t4_shape.rates(), "whole_card_rates": before,
        "versions": {name: version(name) for name in ("unsloth", "transformers", "trl", "peft", "bitsandbytes")},
    }  # fmt: skip
    results = {"card": card}
    file = Path(options.out) / f"{options.stack}-{options.form}.json"
    for name in options.only:
        if time.monotonic() > deadline:
            results[name] = {"error": "no time left"}
        else:
            print(f"=== {name}", file=sys.stderr, flush=True)
            try:
                results[name] = measure(options, name, deadline)
            except Exception as error:  # the other recipes are measured all the same
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if os.environ.get("RANK", "0") == "0":
            file.write_text(json.dumps(results))
            print(f"{options.form}: {name}: {_brief(results[name])}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # a green context cannot be taken down by the interpreter


def _brief(found):
    rounded = {name: round(value, 3) for name, value in found.items() if isinstance(value, float)}
    return found.get("error") or rounded | {"losses": found.get("losses", [])[:3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an 8B-shaped model, in 4 bits")
    parser.add_argument("--out", required=True)
    parser.add_argument("--t4", action="store_true", help="measure in the shape of a T4")
    parser.add_argument("--steps", type=int, default=8, help="steps of training in the shape; on the whole card 15")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no further step or recipe begins")
    parser.add_argument("--whole", nargs="*", default=list(TRAINING)[:2], help="recipes also run on the whole card")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--stack", help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stack:
        return run_stack(options)
    out, end = Path(options.out), time.monotonic() + options.seconds
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for stack, form, names in _processes(options):
        started = time.monotonic()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if stack == "torchrun" else []
        # Where it sees several GPUs, TRL refuses to train in one process.
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[: 2 if launch else 1]
        steps = 15 if form == "whole" and options.t4 else options.steps
        command = [sys.executable, *launch, __file__, "--model", options.model, "--out", options.out, "--stack", stack,
                   "--form", form, "--steps", str(steps), "--seconds", str(end - started), "--only", *names]  # fmt: skip
        with (out / f"{stack}-{form}.log").open("w") as log:
            subprocess.run(
                command + ["--t4"] * options.t4, stderr=log, check=False,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(cards)},
            )  # fmt: skip
        found = out / f"{stack}-{form}.json"
        there = json.loads(found.read_text()) if found.exists() else {}
        failed = {name: {"error": f"failed, see {stack}-{form}.log"} for name in names if name not in there}
        results[form] = results.get(form, {}) | there | failed
        print(f"{stack}, {form}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    made = {"date": time.strftime("%Y-%m-%d"), "t4_shape": options.t4, "results": results}
    (out / "speed.json").write_text(json.dumps(made, indent=1))
    print(table(results))


def _processes(options):
    """(stack, form, names) of each process to start; the one with most recipes last, which the end of the time may cut."""
    form = "shape" if options.t4 else "whole"
    if options.t4 and options.whole:
        yield "unsloth", "whole", options.whole
    for stack in sorted({RECIPES[name].stack for name in options.only}, key=("trl", "torchrun", "unsloth").index):
        yield stack, form, [name for name in options.only if RECIPES[name].stack == stack]


def table(results):
    """In Markdown; the whole card's speeds stand in the last column."""
    form = "shape" if "shape" in results else "whole"
    found, whole = results[form], results.get("whole", {})
    card = found.get("card", {})
    rates = card.get("rates", {})
    lines = [
        f"{card.get('device')}, {card.get('multiprocessors')} multiprocessors, torch {card.get('torch')}, fp16 products "
        f"{rates.get('fp16_tflops', 0):.0f} TFLOP/s, {rates.get('copy_gb_s', 0):.0f} GB/s copied", "",
        "| recipe | real tokens/s | times | s a step | peak GiB | host GiB | losses, steps 1, 2, 3, last | T4 minutes, estimated | whole card |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in (name for name in TRAINING if name in found):
        lines.append(_training_line(name, found, whole, rates))
    lines += [
        "",
        "| answers and likelihood | tokens/s | ms a step | prompts, s | peak GiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in ANSWERING if name in found):
        one = found[name]
        rate = one.get("error") or f"{one['tokens_per_second']:,.0f}"
        step, prompts = (f"{one[key]:.1f}" if key in one else "" for key in ("step_ms", "prompts_seconds"))
        lines.append(f"| {name} | {rate} | {step} | {prompts} | {one.get('peak_gib', 0):.1f} |")
    return "\n".join(lines)


def _training_line(name, found, whole, rates):
    one, also = found[name], whole.get(name, {})
    if not one.get("tokens_per_second"):
        return f"| {name} | {one.get('error', 'too few steps').splitlines()[0]} | | | | | | | |"
    times = ", ".join(
        f"{one['tokens_per_second'] / found[other]['tokens_per_second']:.2f} x {short}"
        for short, other in AGAINST.items()
        if found.get(other, {}).get("tokens_per_second") and other != name
    )
    step = statistics.median(one["seconds"][WARM_UP:])
    # Where matrix products decide, a T4 takes longer by as much as its products are slower.
    mean = statistics.mean(one["tokens"])
    minutes = T4_STEPS * mean / one["tokens_per_second"] * rates["fp16_tflops"] / t4_shape.T4_TFLOPS / 60
    losses = " ".join(f"{loss:.4f}" for loss in (*one["losses"][:3], one["losses"][-1]))
    host = f"{one['host_gib']:.1f}" if "host_gib" in one else ""
    other = f"{also['tokens_per_second']:,.0f}" if also.get("tokens_per_second") and also is not one else ""
    return (
        f"| {name} | {one['tokens_per_second']:,.0f} | {times} | {step:.2f} | {one['peak_gib']:.1f} | {host} | {losses} "
        f"| {minutes:.0f} | {other} |"
    )


if __name__ == "__main__":
    main()
