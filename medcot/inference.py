"""Answers: batched generation, each kept on disk as soon as it is there."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from .modeling import for_inference, weights_id
from .prompts import format_prompt, parse_completion
from .settings import NOTICE, MedcotError, check_disk, only_process

BASELINE, FINETUNED = "baseline", "finetuned"


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    question: str
    reference: str
    """The row's Response."""
    completion: str
    """What the model wrote, special tokens included."""
    new_tokens: int
    eos_token: str

    @property
    def parsed(self):
        """The completion taken apart (`parse_completion`)."""
        return parse_completion(self.completion, self.eos_token)


@dataclass(frozen=True)
class Answers:
    """The answers of one model to the evaluation rows, in row order, and the file they stand in."""

    name: str
    path: Path
    items: tuple[Answer, ...]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __str__(self):
        stopped = sum(not answer.parsed.problems for answer in self)
        return f"{self.name}: {len(self)} answers, {stopped} well formed, in {self.path}"

    def show(self, rows: int = 3):
        """Prints the first answers in full, each with its reference and whatever is wrong with its form."""
        print(f"{self}\n{NOTICE}")
        for answer in self.items[:rows]:
            parsed = answer.parsed
            print(f"\nQUESTION   {answer.question}\nREASONING  {parsed.reasoning.strip() or '(none)'}")
            print(f"RESPONSE   {parsed.response.strip() or '(none)'}\nREFERENCE  {answer.reference.strip()}")
            if parsed.problems:
                print(f"PROBLEMS   {', '.join(parsed.problems)}")


def generate_answers(model, tokenizer, rows, settings) -> Answers:
    """Answers the first `answer_rows` of `rows` and returns them; greedy unless `temperature` is above 0.

    Questions of similar length are batched, left-padded. Every finished batch is appended to a file under the output
    folder, so that a second call goes on where the first one stopped. The file's name holds a hash of what made it
    (weights, settings, questions), so that answers made with anything else are never taken up.
    """
    rows = rows.select(range(min(settings.answer_rows, len(rows))))
    header, path = _cache(weights_id(model), rows, settings)
    prompts = [tokenizer(format_prompt(question))["input_ids"] for question in rows["Question"]]
    order = sorted(range(len(rows)), key=lambda i: (len(prompts[i]), i))
    size = settings.generation_batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    with only_process(path.parent):
        done = _read(path, header)
        # A batch of which some answers are missing is made again whole: composition can tip a greedy choice.
        todo = [batch for batch in batches if not done.keys() >= set(batch)]
        if todo:
            check_disk(path, 16 * 2**20)
            _cut_torn_line(path)
            _generate(model, tokenizer, rows, prompts, todo, settings, path, header, done)
    return _answers(path, rows, done)


def baseline_status(settings):
    """Prints whether 01_baseline has left answers in the output folder."""
    found = sorted((settings.output_dir / "answers").glob(f"{BASELINE}-*.jsonl"))
    if found:
        print(f"01_baseline.ipynb has run: {', '.join(str(path) for path in found)}")
    else:
        print(
            f"no baseline answers in {settings.output_dir / 'answers'}: run 01_baseline.ipynb first, or at the latest "
            "before 03_compare.ipynb, which needs them; this notebook does not"
        )


def load_baseline(settings, rows) -> Answers:
    """The answers that 01_baseline kept. Raises MedcotError if they are missing, unfinished or of other settings."""
    rows = rows.select(range(min(settings.answer_rows, len(rows))))
    header, path = _cache("base", rows, settings)
    cure = "run 01_baseline.ipynb with the same profile first"
    if not path.is_file():
        others = sorted(path.parent.glob(f"{BASELINE}-*.jsonl"), key=lambda file: file.stat().st_mtime)
        found = f"; {others[-1].name} there differs in {_difference(others[-1], header)}" if others else ""
        raise MedcotError(f"{path} not found{found}: {cure}")
    done = _read(path, header)
    if len(done) < len(rows):
        raise MedcotError(f"{path} holds {len(done)} of {len(rows)} answers: {cure}, to its end")
    return _answers(path, rows, done)


def _cache(weights: str, rows, settings) -> tuple[dict, Path]:
    """What identifies a set of answers, and the file that keeps them."""
    names = "model model_revision load_in_4bit device max_new_tokens generation_batch_size temperature"
    header = {"answers": BASELINE if weights == "base" else FINETUNED, "weights": weights}
    header |= {name: getattr(settings, name) for name in names.split()}
    header |= {"seed": settings.seed} if settings.temperature else {}
    header["questions"] = hashlib.sha256("\0".join(rows["Question"]).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return header, settings.output_dir / "answers" / f"{header['answers']}-{digest[:8]}.jsonl"


def _difference(path: Path, header: dict) -> str:
    """In words, where the header of an answers file differs from `header`."""
    with path.open(encoding="utf-8") as file:
        found = json.loads(file.readline() or "{}")
    odd = [name for name in header if found.get(name) != header[name]]
    return ", ".join(f"{name} ({str(found.get(name))[:60]} there, {str(header[name])[:60]} now)" for name in odd)


def _answers(path, rows, done) -> Answers:
    items = tuple(
        Answer(
            row["Question"], row["Response"], **{key: done[i][key] for key in ("completion", "new_tokens", "eos_token")}
        )
        for i, row in enumerate(rows)
    )
    return Answers(path.stem.partition("-")[0], path, items)


def _read(path: Path, header: dict) -> dict[int, dict]:
    """The kept answers by row index; empty without a file. A torn last line, left by a kill, does not count."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            kept.append(json.loads(line))
        except ValueError as error:
            raise MedcotError(
                f"{path}, line {number}: not a JSON object ({error}): delete the file to start again"
            ) from error
    if not kept:
        return {}
    if kept[0] != header:
        raise MedcotError(f"{path}, line 1: differs in {_difference(path, header)}: delete the file to start again")
    return {answer["row"]: answer for answer in kept[1:]}


def _cut_torn_line(path: Path):
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _generate(model, tokenizer, rows, prompts, todo, settings, path, header, done):
    import torch
    from tqdm import tqdm  # as text, which also a batch log and a terminal show
    from transformers import GenerationConfig, set_seed

    model = for_inference(model)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(rows), unit="answer", desc=header["answers"]) as bar:
        bar.update(len(rows) - sum(len(batch) for batch in todo))
        if not path.stat().st_size:
            file.write(json.dumps(header) + "\n")
        for batch in todo:
            set_seed(settings.seed + batch[0])
            started = time.monotonic()
            inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs.to(model.device), generation_config=config)
            seconds = time.monotonic() - started
            for i, tokens in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                if tokenizer.eos_token_id in tokens:
                    tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
                done[i] = {
                    "row": i, "completion": tokenizer.decode(tokens), "eos_token": tokenizer.eos_token,
                    "new_tokens": len(tokens), "batch_seconds": round(seconds, 3),
                }  # fmt: skip
                file.write(json.dumps(done[i], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
