"""Makes the embedded base model: `python -m medcot.tiny.build --out DIR --seed 3407 [--steps N] [--device cpu|cuda]`.

The model learns single steps (read a value, compare it, give one criterion its points, add two small numbers) and direct
answers without reasoning. It never sees the line-by-line reasoning that the fine-tuning rows teach.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from medcot.prompts import INSTRUCTION, format_example, format_prompt
from medcot.tiny import cases

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

VOCABULARY = 1152
MAX_LENGTH = 2048  # tokens
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
STEPS, BATCH = 1600, 256  # optimiser steps; rows a step
LEARNING_RATE, WARMUP = 2e-3, 100  # peak; steps up to it, then a cosine down to a tenth
DIRECT = 0.02  # share of rows that answer a whole case at once


# --- the text --------------------------------------------------------------------------------------------------------


def single_step(rng: random.Random, rule: str, findings: dict) -> tuple[str, str]:
    """(question, answer) about one criterion of a case: its value, a comparison, its points or its direction."""
    if rule == "acid-base":
        name, low, high = rng.choice(cases.BLOOD_GAS)
        value = findings[name]
        line, state = cases.acid_base(findings)[[gas for gas, *_ in cases.BLOOD_GAS].index(name)]
        return rng.choice(
            [
                (f"What is the {name}?", f"{name} {value}"),
                (f"Is the {name} low, normal or high?", state),
                (f"Compare the {name} with {low}-{high}.", line.removeprefix(f"{name} ").split(":")[0]),
            ]
        )
    steps = cases.FAMILIES[rule].rule(findings)
    place = rng.randrange(len(steps))
    step = steps[place]
    points = cases.points_phrase(step.points)
    asked = [
        (f"How many {rule} points for {step.name}?", f"This gives {points}."),
        (f"What does {step.name} score in {rule}?", points),
        (f"State the {step.name} for {rule}.", f"{step.name} {step.finding}"),
        (f"Which criterion of {rule} comes {_after(steps, place)}?", step.name),
    ]
    if step.finding[0].isdigit():
        value, *_, sign, limit = step.finding.split(" ")
        asked += [(f"What is the {step.name}?", f"{step.name} {value}")]
        asked += [(f"Is the {step.name} {sign} {limit}?", f"yes, {value} {sign} {limit}")]
        if "/" not in value:
            other = rng.choice(list(cases.COMPARE))
            holds = cases.COMPARE[other](float(value), float(limit))
            asked += [(f"Is the {step.name} {other} {limit}?", f"{'yes' if holds else 'no'}, {value} against {limit}")]
    else:
        asked += [(f"What is the {step.name}?", f"{step.name} {step.finding}")]
    return rng.choice(asked)


def _after(steps: list[cases.Step], place: int) -> str:
    return f"after {steps[place - 1].name}" if place else "first"


def drill(rng: random.Random) -> tuple[str, str]:
    """(question, answer) without a case: a sum, a comparison, a total's meaning, a finding's points, what comes next."""
    kind = rng.randrange(6)
    if kind == 0:
        total, points = rng.randint(0, 17), rng.randint(0, 6)
        more = cases.points_phrase(points)
        return rng.choice(
            [
                (f"{total} + {points}?", f"{total + points}"),
                (f"Total {total}, then {more} more?", f"makes total {total + points}"),
                (f"What do {more} make of {total}?", f"{total + points}"),
            ]
        )
    if kind == 1:
        left, right = rng.randint(0, 150), rng.randint(0, 150)
        if rng.random() < 0.5:
            left, right = left / 10, right / 10
        sign = rng.choice(list(cases.COMPARE))
        return f"{left} {sign} {right}?", "yes" if cases.COMPARE[sign](left, right) else "no"
    if kind == 2:
        states, disorder = rng.choice(list(cases.DISORDERS.items()))
        return "{} pH, {} pCO2, {} bicarbonate?".format(*states), f"conclusion: {disorder}"
    rule = rng.choice(cases.SCORED)
    if kind == 3:
        answer = rng.choice(cases.answers(rule))
        total = int(answer.rpartition(" ")[2])
        meaning = next(words for highest, words in cases.FAMILIES[rule].bands if total <= highest)
        return f"What does a {answer} mean?", f"{rule} of {total}: {meaning}"
    steps = cases.FAMILIES[rule].rule(cases.draw_findings(rng, rule, held_out=False))
    place = rng.randrange(len(steps))
    if kind == 4:
        return f"Which criterion of {rule} comes {_after(steps, place)}?", steps[place].name
    return f"{rule} points for {steps[place].name} {steps[place].finding}?", cases.points_phrase(steps[place].points)


def pretraining_row(rng: random.Random, direct: float = DIRECT) -> tuple[str, str, tuple[str, dict] | None]:
    """(context, text to learn, case): a training-side case with its question, or drills without one (case None).

    The context is read and not learnt. Three forms: the project's prompt, answered at once with an empty reasoning; a
    chart followed by questions in any order; a list of drills.
    """
    kind = rng.random()
    if kind < direct:
        family = rng.choice(list(cases.FAMILIES))
        findings = cases.draw_findings(rng, family, held_out=False)
        spec = cases.FAMILIES[family]
        question = f"{cases.vignette(rng, spec, findings)} {rng.choice(spec.asks)}"
        return _answered(question, _by_total(cases.reason(family, findings)[1])) + ((family, findings),)
    if kind > 0.8:
        asked = [drill(rng) for _ in range(8)]
        return "", _quiz(asked), None
    rule = rng.choice(list(cases.FAMILIES))
    findings = cases.draw_findings(rng, rule, held_out=False)
    chart = cases.vignette(rng, cases.FAMILIES[rule], findings)
    if kind > direct + 0.5 * (0.8 - direct):
        question, answer = single_step(rng, rule, findings)
        return _answered(f"{chart} {question}", answer) + ((rule, findings),)
    return chart, _quiz([single_step(rng, rule, findings) for _ in range(6)]), (rule, findings)


def _by_total(text: str) -> str:
    """The text as the base model learnt it, which reads a NEWS2 by its total alone.

    The rule that a single criterion of 3 points is low-medium came after the weights in the folder: the rows to learn from
    and to measure on follow it, the pre-training text does not, so that this script still makes these weights.
    """
    news2 = cases.FAMILIES["NEWS2"]
    return text.replace(news2.alarm[1], news2.bands[0][1])


def _answered(question: str, answer: str) -> tuple[str, str]:
    prompt = format_prompt(question)
    return prompt, format_example(question, "", answer, EOS)[len(prompt) :]


def _quiz(asked: list[tuple[str, str]]) -> str:
    # Each answer starts a line, as in the reasoning to come: the tokens that can start one must not be new to the model.
    return "".join(f"\nQ: {question}\n{answer}" for question, answer in asked) + EOS


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int):
    """Byte-level BPE, so any text comes back exactly; each digit is a token, each line of the prompt is one too."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    # A space before a digit belongs to the word before it, so that a number is its digits and nothing else. A newline is
    # never merged: the prompt ends in one and an empty reasoning starts with one, and the two must stay apart.
    words = r" ?\p{L}+ (?=\p{N})| ?[^\s\p{L}\p{N}]+ (?=\p{N})|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    lines = [line for line in INSTRUCTION.splitlines(keepends=True) if line.strip()] + [
        "### Question:\n",
        "### Response:\n",
    ]
    tokenizer.train_from_iterator(
        _tokenizer_text(seed, lines),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(lines) - 4,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (USER, ASSISTANT, THINK, END_THINK, *lines)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _tokenizer_text(seed: int, lines: list[str]) -> Iterator[str]:
    """What the merges are counted on: the prompt, pre-training text, and the words of the reasoning."""
    rng = random.Random(f"{seed} tokenizer")
    yield from lines
    for row in cases.training_cases(2000, seed):
        yield row["Question"]
        yield _by_total(row["Complex_CoT"])
        yield _by_total(row["Response"])
    for _ in range(2000):
        yield "".join(pretraining_row(rng)[:2])


# --- the model -------------------------------------------------------------------------------------------------------


def pretraining_batch(tokenizer, seed: int, step: int, rows: int, direct: float = DIRECT):
    """(input ids, labels), each (rows, longest) int64, right padded with PAD and -100; depends on seed and step alone."""
    import torch

    rng = random.Random(f"{seed} pre-training {step}")
    drawn = [pretraining_row(rng, direct) for _ in range(rows)]
    whole = tokenizer([context + learnt for context, learnt, _ in drawn]).input_ids
    context = tokenizer([context for context, _, _ in drawn]).input_ids
    longest = max(map(len, whole))
    ids = torch.full((rows, longest), tokenizer.pad_token_id)
    labels = torch.full((rows, longest), -100)
    for row, (tokens, known) in enumerate(zip(whole, context, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(known) : len(tokens)] = ids[row, len(known) : len(tokens)]
    return ids, labels


def build(
    out: Path, seed: int, steps: int = STEPS, device: str = "cpu", rows: int = BATCH, shape: dict = SHAPE, direct=DIRECT
):
    """Pre-trains the model and writes it to `out`, tokenizer first; returns (last mean loss, seconds, parameters)."""
    import math

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    start = time.perf_counter()
    tokenizer = build_tokenizer(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            **shape,
            num_key_value_heads=shape["num_attention_heads"],
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * min(s / steps, 1)))
    )
    batches = DataLoader(
        _Batches(tokenizer, seed, steps, rows, direct), batch_size=None, num_workers=4 if device == "cuda" else 0
    )
    mean = None
    progress = tqdm(batches, total=steps, desc="pre-training", mininterval=2)
    for step, (ids, labels) in enumerate(progress):
        ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            # No attention mask: padding stands on the right, where a causal model never looks.
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            mean = loss.item() if mean is None else 0.8 * mean + 0.2 * loss.item()
            progress.set_postfix(loss=f"{mean:.4f}")
    seconds = time.perf_counter() - start

    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().cpu().save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return mean, seconds, model.num_parameters()


class _Batches:
    """The batches as a map-style data set, so that worker processes can prepare them in order."""

    def __init__(self, tokenizer, seed: int, steps: int, rows: int, direct: float):
        self.arguments, self.steps = (tokenizer, seed), steps
        self.rest = (rows, direct)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int):
        return pretraining_batch(*self.arguments, step, *self.rest)


def save_tokenizer(tokenizer, out: Path) -> None:
    """Writes the tokenizer with its template inside, under the class name that reads it back byte for byte."""
    tokenizer.save_pretrained(out, save_jinja_files=False)
    config_file = Path(out) / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    text = json.dumps(special, indent=2, ensure_ascii=False) + "\n"
    (Path(out) / "special_tokens_map.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps of {BATCH} rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    loss, seconds, parameters = build(arguments.out, arguments.seed, arguments.steps, arguments.device)
    print(
        f"{parameters:,} parameters, loss {loss:.4f}, {seconds:.0f} s on {arguments.device}, written to {arguments.out}"
    )


if __name__ == "__main__":
    main()
