"""Log-likelihoods of given texts, each kept on disk as soon as it is there."""

from dataclasses import dataclass
from pathlib import Path

from ..model import for_inference, report_memory
from ..prompts import encode_completion, encode_prompt, escape, format_completion, list_options
from ..run.kept import kept
from ..settings import MedcotError


@dataclass(frozen=True)
class Scored:
    """One row scored: a prompt, and one text after it or several."""

    log_likelihood: tuple[float, ...]
    """Of each text, given the prompt, in nats."""
    tokens: tuple[int, ...]
    """Length of each text."""


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of given texts under one model, and the file they stand in."""

    name: str
    """ "baseline" or "finetuned"."""
    path: Path
    items: dict[int, Scored]
    """By row index."""
    left_out: tuple[int, ...] = ()
    """Rows longer than `max_seq_length` tokens: scored under no model."""

    def __len__(self):
        return len(self.items)

    def __str__(self):
        return f"{self.name}: {len(self)} rows scored, in {self.path}"


def score_references(model, tokenizer, rows, settings, chat: bool = False) -> Scores:
    """Log-likelihood of each row's reasoning and response, EOS included, given its prompt.

    The prompt is `format_prompt`, or with `chat` the tokenizer's own chat template; the text after it is the same. Rows
    longer than `max_seq_length` tokens are left out, counted in a printed line.
    """
    items = {}
    for i, row in enumerate(rows):
        completion = format_completion(row["Complex_CoT"], row["Response"], tokenizer.eos_token)
        items[i] = (encode_prompt(row["Question"], tokenizer, chat), [encode_completion(completion, tokenizer)])
    return _score_all(model, tokenizer, items, settings, "references" + chat * ", own template")


def score_choices(model, tokenizer, questions, settings, chat: bool = False) -> Scores:
    """Log-likelihood of each option's text as the answer, zero-shot and without reasoning.

    The prompt is the question with its options listed (`list_options`) in `format_prompt`, or with `chat` in the
    tokenizer's own chat template, followed by an empty reasoning; the options follow it one by one, and the prompt is
    computed once for all of them. `questions`: rows with `question` and `choices`. Questions longer than `max_seq_length`
    tokens with all their options are left out, counted in a printed line.
    """
    items, begun = {}, format_completion("", "", "")  # an empty reasoning, up to where the response starts
    for i, row in enumerate(questions):
        prompt = encode_prompt(list_options(row["question"], row["choices"]), tokenizer, chat, begun)
        items[i] = (prompt, [encode_completion(escape(choice), tokenizer) for choice in row["choices"]])
        if not all(items[i][1]):
            raise MedcotError(f"multiple-choice question {i} ({row['question'][:60]!r}): no option may be empty")
    return _score_all(model, tokenizer, items, settings, "choices" + chat * ", own template")


def _score_all(model, tokenizer, items, settings, what: str) -> Scores:
    """Scores `items` (row index -> prompt tokens, list of texts' tokens), those that are kept from their file."""
    length = {i: len(prompt) + sum(map(len, texts)) for i, (prompt, texts) in items.items()}
    left_out = tuple(i for i in items if length[i] > settings.max_seq_length)
    if left_out:
        print(
            f"{what}: {len(left_out)} of {len(items)} rows are longer than {settings.max_seq_length} tokens and left out"
        )
    items = {i: item for i, item in items.items() if i not in left_out}
    file = kept(settings, model, what.replace(",", ""), items, {"log_likelihood": list, "tokens": list})
    done = file.fill(_batches_by_length(items, settings.score_batch_tokens), scorer(model, tokenizer, items), "row")
    report_memory(f"{what} scored")
    odd = [i for i in items if [len(text) for text in items[i][1]] != done[i]["tokens"]]
    if odd:
        raise MedcotError(f"{file.path}: row {odd[0]} has other lengths than its texts: delete the file to start again")
    scored = {i: Scored(tuple(done[i]["log_likelihood"]), tuple(done[i]["tokens"])) for i in items}
    return Scores(file.name, file.path, scored, left_out)


def scorer(model, tokenizer, items):
    """A function that scores one batch of `items`, given as their row indices, and yields an entry a row."""
    shared = None

    def score(batch):
        nonlocal shared
        if shared is None:  # with the first batch: where all is kept the model is not touched
            shared = _keys_and_values(for_inference(model), _shared_tokens(items))
        for i, scored in zip(batch, _score_batch(model, tokenizer, [items[i] for i in batch], shared), strict=True):
            yield {"row": i, "log_likelihood": scored, "tokens": [len(tokens) for tokens in items[i][1]]}

    return score


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


def _half(model):
    """The 16-bit type that a model on a GPU was loaded in."""
    import torch

    return torch.bfloat16 if model.get_input_embeddings().weight.dtype is torch.bfloat16 else torch.float16


def _keys_and_values(model, tokens):
    """(number of tokens, keys and values of each layer, of shape 1 x heads x tokens x head size)."""
    import torch

    if not tokens:
        return 0, None
    device_type = torch.device(model.device).type
    with torch.inference_mode(), torch.autocast(device_type, dtype=_half(model), enabled=device_type == "cuda"):
        ids = torch.tensor([tokens], device=model.device)
        return len(tokens), model.get_decoder()(input_ids=ids, use_cache=True).past_key_values


def _for_each_row(shared, rows: int):
    """Shared keys and values as the past of a batch, in the form they came in: unsloth's own, or the cache of transformers."""
    from transformers import DynamicCache

    layers = shared if isinstance(shared, tuple) else [(layer.keys, layer.values) for layer in shared.layers]
    layers = tuple(tuple(part.expand(rows, -1, -1, -1) for part in layer) for layer in layers)
    return layers if isinstance(shared, tuple) else DynamicCache(layers)


@dataclass(frozen=True)
class _Layout:
    """A batch of prompts, each with its continuations behind it one after the other, as tensors of rows x longest."""

    ids: object
    positions: object
    """Of each continuation those right after the prompt, whatever stands before it."""
    segments: object
    """0 in the prompt, k + 1 in continuation k, -1 in the padding."""
    where: list[tuple[int, int]]
    """(row, place) whose logits predict a token of a continuation."""
    targets: list[int]
    """That token."""
    owners: list[tuple[int, int]]
    """(row, continuation) it belongs to."""


def _lay_out(items, pad_token_id: int) -> _Layout:
    import torch

    longest = max(len(prompt) + sum(map(len, continuations)) for prompt, continuations in items)
    ids = torch.full((len(items), longest), pad_token_id)
    batch = _Layout(ids, torch.zeros_like(ids), torch.full_like(ids, -1), [], [], [])
    for b, (prompt, continuations) in enumerate(items):
        tokens = prompt + [token for continuation in continuations for token in continuation]
        ids[b, : len(tokens)] = torch.tensor(tokens)
        batch.positions[b, : len(prompt)], batch.segments[b, : len(prompt)] = torch.arange(len(prompt)), 0
        start = len(prompt)
        for k, continuation in enumerate(continuations):
            stop = start + len(continuation)
            batch.positions[b, start:stop] = torch.arange(len(prompt), len(prompt) + len(continuation))
            batch.segments[b, start:stop] = k + 1
            batch.where.extend([(b, len(prompt) - 1), *((b, place) for place in range(start, stop - 1))])
            batch.targets.extend(continuation)
            batch.owners.extend([(b, k)] * len(continuation))
            start = stop
    return batch


def _each_by_itself(batch: _Layout, model, skipped: int) -> dict:
    """Mask and positions with which each continuation sees the prompt and itself only, after `skipped` shared tokens."""
    import torch

    longest = batch.ids.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    rows, columns = batch.segments[:, :, None], batch.segments[:, None, :]
    seen = (causal & ((columns == 0) | (columns == rows)))[:, None].to(model.device)
    # Added to the attention scores, so in the type they are computed in (16 bits under autocast).
    dtype = _half(model) if seen.is_cuda else model.dtype
    mask = torch.zeros((*seen.shape[:3], skipped + longest), dtype=dtype, device=seen.device)
    mask[..., skipped:].masked_fill_(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": skipped + batch.positions.to(model.device)}


def _score_batch(model, tokenizer, items, shared=(0, None)) -> list[list[float]]:
    """Log-likelihood in nats of every continuation of every item, in one forward pass over each prompt.

    The continuations of an item stand behind its prompt; positions and mask make each of them see the prompt and itself
    only, so the prompt is computed once. `shared` (`_keys_and_values`) is what all the prompts begin with and is not
    computed again. Logits are taken only where a token is predicted, a few positions at a time: a whole batch of them
    would be 8,192 x 128,256 x 4 bytes = 4 GiB.
    """
    import torch

    skipped, past = shared
    items = [(prompt[skipped:], continuations) for prompt, continuations in items]
    batch, arguments = _lay_out(items, tokenizer.pad_token_id), {}
    # With one continuation, padding stands on the right where the causal order hides it: no mask is needed.
    if past is not None or any(len(continuations) > 1 for _, continuations in items):
        arguments = _each_by_itself(batch, model, skipped)
    if past is not None:
        arguments["past_key_values"] = _for_each_row(past, len(items))
    device_type = torch.device(model.device).type
    totals, chunk = [[0.0] * len(continuations) for _, continuations in items], 256
    with torch.inference_mode(), torch.autocast(device_type, dtype=_half(model), enabled=device_type == "cuda"):
        ids = batch.ids.to(model.device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False, **arguments).last_hidden_state
        hidden, head = hidden[tuple(torch.tensor(batch.where).T.to(model.device))], model.get_output_embeddings()
        for first in range(0, len(batch.targets), chunk):
            logits = head(hidden[first : first + chunk]).float()
            wanted = torch.tensor(batch.targets[first : first + chunk], device=logits.device)
            found = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            for (b, k), value in zip(batch.owners[first : first + chunk], found.tolist(), strict=True):
                totals[b][k] += value
    return totals
