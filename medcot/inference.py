"""Answers and likelihoods: batched, each kept on disk as soon as it is there."""

import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from .data import SHOWCASE_QUESTION, normalise
from .modeling import for_inference, free_decoding_memory, report_memory, weights_id
from .prompts import THINK_OPEN, escape, format_completion, format_prompt, parse_completion
from .settings import EMBEDDED_CASES, NOTICE, MedcotError, check_disk, on_all_gpus, on_kaggle, only_process, run_shown

BASELINE, FINETUNED = "baseline", "finetuned"
# What the data set's Response to the showcase question says, for runs whose rows do not hold it.
SHOWCASE_REFERENCE = "Normal post-void residual volume and no involuntary detrusor contractions (stress incontinence)."


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
    (weights, settings, questions), so that answers made with anything else are never taken up. Where torchrun started
    several processes, they take the batches in turn.
    """
    return _answer_all(model, tokenizer, rows.select(range(min(settings.answer_rows, len(rows)))), settings, "answers")


def _answer_all(model, tokenizer, rows, settings, folder: str, chat: bool = False) -> Answers:
    header, path = _cache(weights_id(model), rows, settings, folder)
    encode, make = _prompting(tokenizer, chat)
    prompts = [encode(make(question)) for question in rows["Question"]]
    order = sorted(range(len(rows)), key=lambda i: (len(prompts[i]), i))
    batches = _batches_that_fit(order, prompts, model, settings)
    with _only_writer(path.parent):
        done = _read(path, header, len(rows), _ANSWER_KEYS)
        # A batch of which some answers are missing is made again whole: composition can tip a greedy choice.
        todo = [batch for batch in batches if not done.keys() >= set(batch)]
        _agree(path, todo)
        if todo:
            check_disk(path, 16 * 2**20)
            _generate(model, tokenizer, rows, prompts, todo, settings, path, header, done)
            report_memory("answers generated")
            free_decoding_memory(model)
    return _answers(path, rows, done)


def _batches_that_fit(order, prompts, model, settings) -> list[list[int]]:
    """Row indices in batches of like length, of at most `generation_batch_size` rows and `generation_memory_gib` GiB.

    As few as the limits allow, rounded up to a full turn of all processes, and then the largest as small as it can be.
    A row needs its keys and values twice for the prompt (once as the prefill makes them, once where decoding appends)
    and once for the new tokens, and about 2 x (3 x intermediate_size + 27 x hidden_size) bytes a prompt token while
    they are made: measured as 4.6 GiB for 32 rows of 200 + 192 tokens of the 8-billion-parameter shape. From settings
    alone and not from the memory that is free, so that before and after have the same batches.
    """
    config = model.config
    heads = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    token = 2 * 2 * config.num_hidden_layers * heads

    def need(i):
        row = token * (2 * len(prompts[i]) + settings.max_new_tokens + 256)
        return row + len(prompts[i]) * 2 * (3 * config.intermediate_size + 27 * config.hidden_size)

    def filled(most):
        batches = []
        for i in order:  # by length, so the newest row is the longest and sets what every row of its batch takes
            if batches and len(batches[-1]) < min(most, int(settings.generation_memory_gib * 2**30 / need(i))):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    sizes, processes = range(1, settings.generation_batch_size + 1), settings.nproc_per_node
    fewest = math.ceil(len(filled(sizes[-1])) / processes) * processes
    return next(batches for batches in map(filled, sizes) if len(batches) <= fewest)


def baseline_status(settings):
    """Prints whether 01_baseline has left answers in the output folder."""
    found = sorted((settings.output_dir / "answers").glob(f"{BASELINE}-*.jsonl"))
    if found:
        print(f"01_baseline.ipynb has run: {', '.join(str(path) for path in found)}")
    elif on_kaggle():  # each notebook has a session of its own there; the answers of 01 are an input of 03
        print(
            "01_baseline.ipynb runs in a session of its own: 03_compare.ipynb needs its answers, this notebook does not"
        )
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
    done = _read(path, header, len(rows), _ANSWER_KEYS, finished=True)
    if len(done) < len(rows):
        raise MedcotError(f"{path} holds {len(done)} of {len(rows)} answers: {cure}, to its end")
    return _answers(path, rows, done)


def _cache(weights: str, rows, settings, folder: str = "answers") -> tuple[dict, Path]:
    """What identifies a set of answers, and the file that keeps them."""
    names = "model model_revision load_in_4bit device max_new_tokens generation_batch_size generation_memory_gib"
    names += " nproc_per_node temperature"
    name = BASELINE if weights == "base" else FINETUNED
    # Only answers to the evaluation rows are headed "baseline": by that word a later session knows what 01 left.
    header = {"answers": name if folder == "answers" else f"{folder}, {name}", "weights": weights}
    header |= {field: getattr(settings, field) for field in names.split()}
    header |= {"seed": settings.seed} if settings.temperature else {}
    header["questions"] = hashlib.sha256("\0".join(rows["Question"]).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return header, settings.output_dir / folder / f"{name}-{digest[:8]}.jsonl"


def _difference(path: Path, header: dict) -> str:
    """In words, where the header of an answers file differs from `header`."""
    try:
        found = dict(json.loads(path.read_bytes().split(b"\n")[0] or "{}"))
    except (TypeError, ValueError):
        return "everything (it holds no answers)"
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


_ANSWER_KEYS = {"row": int, "completion": str, "new_tokens": int, "eos_token": str}
_SCORE_KEYS = {"row": int, "log_likelihood": list, "tokens": list}


def _read(path: Path, header: dict, rows: int, keys: dict, finished: bool = False) -> dict[int, dict]:
    """The kept entries by row index; empty without a file. A torn last line, left by a kill, does not count.

    Raises MedcotError naming file and line for anything else that is not one entry of `keys` about one of `rows` rows,
    and leaves the file as it is; in a file that should be `finished` a torn last line is such a thing too.
    """
    if not path.is_file():
        return {}
    lines, cure = path.read_bytes().split(b"\n"), "delete the file to start again"
    if lines[-1] and finished:
        raise MedcotError(f"{path}, line {len(lines)}: cut off in the middle: run the notebook that writes it again")
    kept = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            kept.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise MedcotError(f"{path}, line {number}: not a JSON object ({error}): {cure}") from error
        if number == 1 and kept[0] != header:
            raise MedcotError(f"{path}, line 1: differs in {_difference(path, header)}: {cure}")
        if number > 1:
            entry = kept[-1] if isinstance(kept[-1], dict) else {}
            wrong = [key for key, kind in keys.items() if not isinstance(entry.get(key), kind)]
            if wrong:
                raise MedcotError(f"{path}, line {number}: lacks {', '.join(wrong)}: {cure}")
            if entry["row"] not in range(rows):
                raise MedcotError(f"{path}, line {number}: is about row {entry['row']} of {rows}: {cure}")
    return {entry["row"]: entry for entry in kept[1:]}


def _cut_torn_line(path: Path):
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _generate(model, tokenizer, rows, prompts, todo, settings, path, header, done):
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

    rows_before = 0

    def answer(batch):
        nonlocal rows_before
        set_seed(settings.seed + batch[0])
        started = time.monotonic()
        if len(batch) != rows_before:  # buffers and graphs are kept for each number of rows
            free_decoding_memory(model)
            rows_before = len(batch)
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        output = _generate_batch(model, inputs.to(model.device), config)
        seconds = time.monotonic() - started
        for i, tokens in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
            yield {
                "row": i, "completion": tokenizer.decode(tokens), "eos_token": tokenizer.eos_token,
                "new_tokens": len(tokens), "batch_seconds": round(seconds, 3),
            }  # fmt: skip

    _work(answer, todo, path, header, done, len(rows), "answer", header["answers"])


def _work(make, todo, path, header, done, rows: int, unit: str, title: str):
    """Makes the entries of each batch of `todo`, adds them to `done` and to the file as soon as they are there.

    Where torchrun started several processes, each makes every so many-th batch and the first one writes them all, in the
    order in which a single process writes them.
    """
    from tqdm import tqdm  # as text, which also a batch log and a terminal show

    rank, processes = _process()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=rows, unit=unit, desc=title, disable=rank > 0))
        bar.update(rows - sum(map(len, todo)))
        if rank == 0:
            _cut_torn_line(path)
            file = stack.enter_context(path.open("a", encoding="utf-8"))
            if not path.stat().st_size:
                file.write(json.dumps(header) + "\n")
        for first in range(0, len(todo), processes):
            turn = todo[first : first + processes]
            entries = _gather(list(make(turn[rank])) if rank < len(turn) else [])
            done |= {entry["row"]: entry for entry in entries}
            if rank == 0:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
                file.flush()
            bar.update(len(entries))


def _process() -> tuple[int, int]:
    """(number of this process, number of processes) among those that share the evaluation.

    From torch and not from accelerate, which counts one process on a CPU wherever no trainer has told it otherwise.
    """
    import torch

    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


def _gather(entries: list) -> list:
    """The entries of all processes, in their order."""
    import torch

    _, processes = _process()
    if processes == 1:
        return entries
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, entries)
    return [entry for part in parts for entry in part]


def _agree(path: Path, todo: list):
    """Raises MedcotError if the processes do not have the same batches of the same file to do."""
    seen = _gather([(path.name, todo)])
    if any(other != seen[0] for other in seen):
        raise MedcotError(
            f"the processes see different files at {path.parent}: MEDCOT_OUT must be a folder they all share, with the "
            "same adapter"
        )


def _only_writer(folder: Path):
    """`only_process` for the one process that writes."""
    return only_process(folder) if _process()[0] == 0 else contextlib.nullcontext()


def _generate_batch(model, inputs, config):
    """One batch; if memory runs out, once more without CUDA graphs, which computes the same and keeps less."""
    import torch

    with torch.inference_mode():
        try:
            return model.generate(**inputs, generation_config=config)
        except torch.OutOfMemoryError:
            pass  # out of the except block, so that the failed call's tensors are gone
        graphs = os.environ.get("UNSLOTH_DECODE_CUDA_GRAPHS")
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "0"
        try:
            free_decoding_memory(model)
            return model.generate(**inputs, generation_config=config)
        except torch.OutOfMemoryError as error:
            rows, width = inputs["input_ids"].shape
            raise MedcotError(
                f"out of memory with {rows} questions of {width} tokens and {config.max_new_tokens} new ones each: lower "
                "generation_batch_size or generation_memory_gib, in 01_baseline and 03_compare alike"
            ) from error
        finally:
            os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = graphs or "1"


# --- likelihood --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of given texts under one model, and the file they stand in."""

    name: str
    path: Path
    items: dict
    """By row index, one pair a row: log-likelihood of each text in nats, and its length in tokens."""

    def __len__(self):
        return len(self.items)

    def __str__(self):
        return f"{self.name}: {len(self)} rows scored, in {self.path}"


def score_references(model, tokenizer, rows, settings, chat: bool = False) -> Scores:
    """Log-likelihood of each row's reasoning and response, EOS included, given its prompt.

    The prompt is `format_prompt`, or with `chat` the tokenizer's own chat template; the text after it is the same. Rows
    longer than `max_seq_length` tokens are left out, counted in a printed line.
    """
    encode, make = _prompting(tokenizer, chat)
    items, over_long = {}, 0
    for i, row in enumerate(rows):
        completion = format_completion(row["Complex_CoT"], row["Response"], tokenizer.eos_token)
        item = (encode(make(row["Question"])), [encode(completion, within=True)])
        if len(item[0]) + len(item[1][0]) > settings.max_seq_length:
            over_long += 1
        else:
            items[i] = item
    if over_long:
        print(f"{over_long} of {len(rows)} rows are longer than {settings.max_seq_length} tokens and are not scored")
    return _score_all(
        model, tokenizer, items, settings, "references through the chat template" if chat else "references"
    )


def score_choices(model, tokenizer, questions, settings, chat: bool = False) -> Scores:
    """Log-likelihood of each option's text as the answer, zero-shot and without reasoning.

    The prompt is the question with its options listed (`list_options`) in `format_prompt`, or with `chat` in the
    tokenizer's own chat template, followed by an empty reasoning; the options follow it one by one, and the prompt is
    computed once for all of them. `questions`: rows with `question` and `choices`.
    """
    encode, make = _prompting(tokenizer, chat)
    items = {}
    for i, row in enumerate(questions):
        # The empty reasoning of format_completion, up to where the response starts.
        prompt = make(list_options(row["question"], row["choices"])) + format_completion("", "", "")
        items[i] = (encode(prompt), [encode(escape(choice), within=True) for choice in row["choices"]])
        length = len(items[i][0]) + sum(map(len, items[i][1]))
        if length > settings.max_seq_length or not all(items[i][1]):
            raise MedcotError(
                f"multiple-choice question {i} ({row['question'][:60]!r}) takes {length} tokens with its options, the "
                f"limit is max_seq_length={settings.max_seq_length}, and no option may be empty: leave it out"
            )
    return _score_all(model, tokenizer, items, settings, "choices through the chat template" if chat else "choices")


def list_options(question: str, choices) -> str:
    """The question with one lettered option a line, as in an exam."""
    return "\n".join([question, *(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))])


def chat_prompt(question: str, tokenizer) -> str:
    """The question alone as the user's turn of the tokenizer's chat template, BOS included, with the thinking opened."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": escape(question)}], add_generation_prompt=True, tokenize=False
    )
    return text if text.endswith(f"{THINK_OPEN}\n") else f"{text}{THINK_OPEN}\n"


def _prompting(tokenizer, chat: bool):
    """(encode, make): `make` turns a question into a prompt, `encode` a text into tokens with exactly one BOS in front.

    With `within` nothing is put in front: for what follows a prompt. A chat template writes its BOS itself.
    """

    def encode(text, within=False):
        return tokenizer(text, add_special_tokens=not chat and not within)["input_ids"]

    return encode, (lambda question: chat_prompt(question, tokenizer)) if chat else format_prompt


def _score_all(model, tokenizer, items, settings, what: str) -> Scores:
    """Scores `items` (row index -> prompt tokens, list of continuations' tokens), from the cache where it has them."""
    weights = weights_id(model)
    name = BASELINE if weights == "base" else FINETUNED
    names = "model model_revision load_in_4bit device score_batch_tokens"
    header = {"scores": f"{what}, {name}", "weights": weights}
    header |= {field: getattr(settings, field) for field in names.split()}
    header["tokens"] = hashlib.sha256(json.dumps(list(items.items())).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    path = settings.output_dir / "scores" / f"{name}-{what.replace(' ', '-')}-{digest[:8]}.jsonl"
    with _only_writer(path.parent):
        done = _read(path, header, max(items, default=0) + 1, _SCORE_KEYS)
        todo = [b for b in _batches_by_length(items, settings.score_batch_tokens) if not done.keys() >= set(b)]
        _agree(path, todo)
        if todo:
            check_disk(path, 16 * 2**20)
            _score(model, tokenizer, items, todo, path, header, done)
            report_memory(f"{what} scored")
    odd = [i for i in items if [len(c) for c in items[i][1]] != done[i]["tokens"]]
    if odd:
        raise MedcotError(f"{path}: row {odd[0]} has other lengths than its texts: delete the file to start again")
    kept = {i: (tuple(done[i]["log_likelihood"]), tuple(done[i]["tokens"])) for i in items}
    return Scores(name, path, kept)


def _score(model, tokenizer, items, todo, path, header, done):
    model = for_inference(model)
    shared = _keys_and_values(model, _shared_tokens(items))

    def score(batch):
        for i, scored in zip(batch, _score_batch(model, tokenizer, [items[i] for i in batch], shared), strict=True):
            yield {"row": i, "log_likelihood": scored, "tokens": [len(tokens) for tokens in items[i][1]]}

    _work(score, todo, path, header, done, len(items), "row", path.stem[:-9])


def _batches_by_length(items, most_tokens: int) -> list[list[int]]:
    """Rows in batches of like length, each of at most `most_tokens` tokens, padding included (or a single row)."""
    length = {i: len(prompt) + sum(map(len, continuations)) for i, (prompt, continuations) in items.items()}
    batches = []
    for i in sorted(items, key=lambda i: (length[i], i)):
        # Sorted, so the newest row is the longest: it sets what every row of its batch is padded to.
        if batches and (len(batches[-1]) + 1) * length[i] <= most_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _shared_tokens(items) -> list[int]:
    """The tokens that all prompts begin with, at least one token short of the shortest; none for single continuations.

    For multiple choice this is the instruction before the question: a quarter of what would be computed anew for each.
    Single continuations do without a mask, which a shared beginning would need, and would save a tenth.
    """
    if all(len(continuations) == 1 for _, continuations in items.values()):
        return []
    prompts = [prompt for prompt, _ in items.values()]
    first, last = min(prompts), max(prompts)  # in dictionary order: what these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, *(len(prompt) - 1 for prompt in prompts))]


def _keys_and_values(model, tokens):
    """(number of tokens, keys and values of each layer, of shape 1 x heads x tokens x head size)."""
    import torch

    if not tokens:
        return 0, None
    device_type = torch.device(model.device).type
    with torch.inference_mode(), torch.autocast(device_type, dtype=torch.float16, enabled=device_type == "cuda"):
        ids = torch.tensor([tokens], device=model.device)
        return len(tokens), model.get_decoder()(input_ids=ids, use_cache=True).past_key_values


def _for_each_row(shared, rows: int):
    """Shared keys and values as the past of a batch, in the form they came in: unsloth's own, or the cache of transformers."""
    from transformers import DynamicCache

    layers = shared if isinstance(shared, tuple) else [(layer.keys, layer.values) for layer in shared.layers]
    layers = tuple(tuple(part.expand(rows, -1, -1, -1) for part in layer) for layer in layers)
    return layers if isinstance(shared, tuple) else DynamicCache(layers)


def _score_batch(model, tokenizer, items, shared=(0, None)) -> list[list[float]]:
    """Log-likelihood in nats of every continuation of every item, in one forward pass over each prompt.

    The continuations of an item stand behind its prompt one after the other; positions and mask make each of them see
    the prompt and itself only, so the prompt is computed once. `shared` (`_keys_and_values`) is what all the prompts
    begin with and is not computed again. Logits are taken only where a token is predicted, a few positions at a time: a
    whole batch of them would be 8,192 x 128,256 x 4 bytes = 4 GiB.
    """
    import torch

    skipped, past = shared
    items = [(prompt[skipped:], continuations) for prompt, continuations in items]
    longest = max(len(prompt) + sum(map(len, continuations)) for prompt, continuations in items)
    ids = torch.full((len(items), longest), tokenizer.pad_token_id)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)  # segment 0 is the prompt, -1 the padding
    where, targets, owners = [], [], []
    for b, (prompt, continuations) in enumerate(items):
        tokens = prompt + [token for continuation in continuations for token in continuation]
        ids[b, : len(tokens)] = torch.tensor(tokens)
        positions[b, : len(prompt)], segments[b, : len(prompt)] = torch.arange(len(prompt)), 0
        start = len(prompt)
        for k, continuation in enumerate(continuations):
            stop = start + len(continuation)
            positions[b, start:stop] = torch.arange(len(prompt), len(prompt) + len(continuation))
            segments[b, start:stop] = k + 1
            where += [(b, len(prompt) - 1), *((b, place) for place in range(start, stop - 1))]
            targets += continuation
            owners += [(b, k)] * len(continuation)
            start = stop
    arguments = {}
    if past is not None or any(len(continuations) > 1 for _, continuations in items):
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        rows, columns = segments[:, :, None], segments[:, None, :]
        seen = (causal & ((columns == 0) | (columns == rows)))[:, None].to(model.device)
        # Added to the attention scores, so in the type they are computed in (float16 under autocast).
        dtype = torch.float16 if seen.is_cuda else model.dtype
        mask = torch.zeros((*seen.shape[:3], skipped + longest), dtype=dtype, device=seen.device)
        mask[..., skipped:].masked_fill_(~seen, torch.finfo(dtype).min)
        arguments = {"attention_mask": mask, "position_ids": skipped + positions.to(model.device)}
        if past is not None:
            arguments["past_key_values"] = _for_each_row(past, len(items))
    # With one continuation, padding stands on the right where the causal order hides it: no mask is needed.
    device_type = torch.device(model.device).type
    totals, chunk = [[0.0] * len(continuations) for _, continuations in items], 256
    with torch.inference_mode(), torch.autocast(device_type, dtype=torch.float16, enabled=device_type == "cuda"):
        hidden = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False, **arguments).last_hidden_state
        hidden, head = hidden[tuple(torch.tensor(where).T.to(model.device))], model.get_output_embeddings()
        for first in range(0, len(targets), chunk):
            logits = head(hidden[first : first + chunk]).float()
            wanted = torch.tensor(targets[first : first + chunk], device=logits.device)
            found = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            for (b, k), value in zip(owners[first : first + chunk], found.tolist(), strict=True):
                totals[b][k] += value
    return totals


# --- everything one model is measured by --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """All that one model, before or after, was measured to do; `evaluation.compare` pairs two of them."""

    answers: Answers
    """Generated answers to the evaluation rows."""
    choice_answers: Answers | None = None
    """Generated answers to multiple-choice questions; None where the evaluation rows carry options themselves."""
    showcase: Answers | None = None
    """The generated answer to the showcase question."""
    showcase_trained: bool = False
    """Whether the showcase question is a training row."""
    references: Scores | None = None
    """Log-likelihood of the reference reasoning and response of the evaluation rows."""
    choices: Scores | None = None
    """Log-likelihood of the options of the multiple-choice questions."""
    chat_answers: Answers | None = None
    """As `choice_answers` (as `answers` without them), through the base model's own chat template; None after tuning."""
    chat_references: Scores | None = None
    """As `references`, through the base model's own chat template; None after tuning."""
    chat_choices: Scores | None = None
    """As `choices`, the first `chat_rows` of them, through the base model's own chat template."""

    def __str__(self):
        parts = (
            self.answers,
            self.choice_answers,
            self.references,
            self.choices,
            self.chat_references,
            self.chat_choices,
        )
        return "\n".join(str(part) for part in parts if part is not None)


def evaluate(model, tokenizer, splits, questions, settings) -> Results:
    """Measures a model on the evaluation rows and on multiple-choice `questions` (`load_choices`); cached, resumable.

    Call it twice with one load: inside `with model.disable_adapter():` for before, outside for after. Everything is
    asked in the same batches both times. The base model is also scored through its own chat template, because the
    project's prompt alone may handicap it.
    """
    import datasets

    rows, base = splits.eval, weights_id(model) == "base"
    answers = generate_answers(model, tokenizer, rows, settings)
    asked = [
        {"Question": list_options(row["question"], row["choices"]), "Response": row["choices"][row["answer_index"]]}
        for row in questions.rows[: settings.choice_answer_rows]
    ]
    # The showcase question goes along in their batch: alone it would take as long as all of them.
    shown = showcase_row(splits)
    along = datasets.Dataset.from_list([*asked, {name: shown[name] for name in ("Question", "Response")}])
    generated = _answer_all(model, tokenizer, along, settings, "choice_answers")
    results = Results(
        answers=answers,
        choice_answers=replace(generated, items=generated.items[:-1]) if asked else None,
        showcase=replace(generated, items=generated.items[-1:]),
        showcase_trained=shown["training_row"],
        references=score_references(model, tokenizer, rows, settings),
        choices=score_choices(model, tokenizer, questions.rows, settings),
    )
    if not base or not settings.chat_rows:
        return results
    if not tokenizer.chat_template:
        print(f"{settings.model} has no chat template: nothing is measured through one")
        return results
    again = datasets.Dataset.from_list(asked) if asked else rows.select(range(len(answers)))
    return replace(
        results,
        chat_answers=_answer_all(model, tokenizer, again, settings, "chat_answers", chat=True),
        chat_references=score_references(model, tokenizer, rows, settings, chat=True),
        chat_choices=score_choices(model, tokenizer, questions.rows[: settings.chat_rows], settings, chat=True),
    )


def run_evaluation(settings):
    """What 03_compare measures on both sides, in one process or as one of those that torchrun started."""
    import torch

    from .data import load_splits
    from .evaluation import load_choices
    from .modeling import load_model

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Only finished entries travel between the processes, so the transport of CPUs serves on GPUs too.
        torch.distributed.init_process_group("gloo")
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        splits, questions = load_splits(settings), load_choices(settings)
        model, tokenizer = load_model(settings, adapter=settings.adapter_dir)
        with model.disable_adapter():
            evaluate(model, tokenizer, splits, questions, settings)
        evaluate(model, tokenizer, splits, questions, settings)
    finally:
        # A process that ends with its group open may be aborted by gloo's own thread, although its work is done.
        if _process()[1] > 1:
            torch.distributed.destroy_process_group()


def evaluate_on_all_gpus(settings):
    """Evaluates with `nproc_per_node` processes, one a GPU, started by torchrun; does nothing where that is 1.

    They divide the batches among them and leave the files that one process leaves (on GPUs equal but for rounding), so
    that `evaluate` finds its work done. Raises MedcotError, with the last lines that were printed, if any of the processes fails.
    """
    if settings.nproc_per_node == 1:
        print("the evaluation runs in this notebook, below")
    else:
        on_all_gpus(settings, "evaluate")


def showcase_row(splits) -> dict:
    """The question every project of this kind shows: Question, Response and `training_row`, whether it was trained on.

    The embedded model does not know its words; there the third training row stands in for it, as it is the third
    training row of the original.
    """
    if splits.source == EMBEDDED_CASES:
        row = splits.train[min(2, len(splits.train) - 1)]
        return {"Question": row["Question"], "Response": row["Response"], "training_row": True}
    for split, trained in ((splits.train, True), (splits.eval, False)):
        for question, response in zip(split["Question"], split["Response"], strict=True):
            if normalise(question) == normalise(SHOWCASE_QUESTION):
                return {"Question": question, "Response": response, "training_row": trained}
    return {"Question": SHOWCASE_QUESTION, "Response": SHOWCASE_REFERENCE, "training_row": False}


def run_harness(settings, tasks: list[str], adapter: Path | None = None, include_path: Path | None = None, limit=None):
    """Standard benchmarks through lm-evaluation-harness, in a process of its own; returns its results by task.

    `tasks` are its names, for example medqa_4options, medmcqa, pubmedqa, mmlu_anatomy, mmlu_clinical_knowledge,
    mmlu_college_medicine, mmlu_medical_genetics, mmlu_professional_medicine; `include_path` adds a folder of task
    files. With `adapter` (`settings.adapter_dir`) the fine-tuned model is measured, without it the base, both as the
    base's files are: of the 8B that is the 4-bit copy which the adapter was trained on; files that `load_model` would
    quantise are not quantised here. A process of its own, because the harness wants stock transformers and this one has
    been patched by unsloth; what it prints is shown. Raises MedcotError if the optional extra is missing
    (`pip install medcot[harness]`) or the harness fails.
    """
    import importlib.util
    import sys

    if importlib.util.find_spec("lm_eval") is None:
        raise MedcotError("lm_eval is not installed: pip install 'medcot[harness]'")
    # The adapter's config names the base that it was trained on, on a GPU the copy in 4 bits that unsloth took for it; the
    # adapter folder's tokenizer is written to be read without damage, which the base's own may not be (load_tokenizer).
    folder = Path(adapter or settings.adapter_dir)
    config = folder / "adapter_config.json"
    trained = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    arguments = {"pretrained": trained.get("base_model_name_or_path") or settings.model}
    arguments["dtype"] = "float16" if settings.device == "cuda" else "float32"
    arguments |= {"revision": settings.model_revision} if settings.model_revision else {}
    arguments |= {"tokenizer": folder} if trained else {}
    arguments |= {"peft": adapter} if adapter else {}
    output = settings.output_dir / "harness" / (FINETUNED if adapter else BASELINE)
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", settings.device, "--batch_size", "8"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", ",".join(tasks), "--output_path", str(output / "results.json")]
    command += ["--include_path", str(include_path)] if include_path else []
    command += ["--limit", str(limit)] if limit else []
    status, last = run_shown(command)
    if status:
        reason = (last.strip().splitlines() or ["no message"])[-1]
        raise MedcotError(f"lm_eval stopped ({reason[:300]}); the command was: {' '.join(command)}")
    newest = max(output.glob("**/results*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))["results"]
