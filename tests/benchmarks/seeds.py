"""The embedded default over several training seeds: how much it learns, and how much that varies.

python tests/benchmarks/seeds.py --out FOLDER [--seeds 3407 1 2]

Each seed draws its own training cases, adapters and row order; the held-out cases are the same. Prints a Markdown table
and writes seeds.json. About 2.5 minutes a seed on two CPU cores.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import medcot
from medcot.profiles import PROFILES


def run(seed: int, out: Path) -> dict:
    settings = replace(PROFILES["tiny"], seed=seed, output_dir=out / str(seed), report_to="none")
    splits, questions = medcot.load_splits(settings), medcot.load_choices(settings)
    model, tokenizer = medcot.load_model(settings)
    model = medcot.add_lora(model, settings)
    with model.disable_adapter():
        before = medcot.evaluate(model, tokenizer, splits, questions, settings)
    examples = medcot.to_examples(splits.train, tokenizer, settings, show=False)
    trainer = medcot.make_trainer(model, tokenizer, examples, settings)
    started = time.monotonic()
    medcot.train(trainer, settings)
    seconds = time.monotonic() - started
    after = medcot.evaluate(model, tokenizer, splits, questions, settings)
    comparison = medcot.compare(before, after, splits.eval, questions)
    measures = {measure.name: measure for measure in comparison.measures}
    right = [pair.after.outcome for pair in comparison.pairs if pair.after.outcome.correct]
    families = {m.name.partition(", ")[2]: m.difference for m in comparison.measures if m.group == "family"}
    answer = measures["right answer"]
    return {
        "seed": seed, "n": answer.n, "before": answer.before, "after": answer.after, "low": answer.low, "high": answer.high,
        "steps_right_of_right": sum(outcome.steps_correct for outcome in right) / len(right),
        "well_formed": measures["well formed"].after, "families": families, "seconds": seconds,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = [run(seed, options.out) for seed in options.seeds]
    (options.out / "seeds.json").write_text(json.dumps(found, indent=1))
    print(
        "| seed | n | right before | right after | difference, 95 % interval | steps right, of right answers | closed and stopped | worst family | training |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in found:
        family, change = min(r["families"].items(), key=lambda item: item[1])
        print(
            f"| {r['seed']} | {r['n']} | {100 * r['before']:.1f} % | {100 * r['after']:.1f} % | "
            f"{100 * (r['after'] - r['before']):+.1f} [{100 * r['low']:+.1f}, {100 * r['high']:+.1f}] | "
            f"{100 * r['steps_right_of_right']:.0f} % | {100 * r['well_formed']:.1f} % | {family} {100 * change:+.0f} | {r['seconds']:.0f} s |"
        )


if __name__ == "__main__":
    main()
