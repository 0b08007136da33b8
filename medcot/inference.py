"""Answers: batches that fit the memory, greedy decoding."""

import math
import os
import time
from dataclasses import dataclass

from .model import for_inference, free_decoding_memory
from .settings import MedcotError


@dataclass(frozen=True)
class Generated:
    """What a model wrote after one prompt."""

    row: int
    text: str
    """Special tokens included."""
    tokens: int
    batch_seconds: float
    """Of the batch it was written in."""


def batches_that_fit(prompts: dict[int, list[int]], model, settings) -> list[list[int]]:
    """Row indices in batches of like length, of at most `generation_batch_size` rows and `generation_memory_gib` GiB.

    As few as the limits allow, rounded up to a full turn of all processes, and then the largest as small as it can be.
    From settings alone and not from the memory that is free, so that before and after have the same batches. A row takes
    its prompt's keys and values twice (once as they were read, once where decoding appends) and those of new tokens, in a
    buffer of whole 256 tokens: 4.4 GiB for 16 rows of 480 + 1,024 tokens of the 8B, as was measured. Reading a prompt takes
    about 2 x (3 x intermediate_size + 27 x hidden_size) bytes a token beside, before there is anything new.
    """
    config, order = model.config, sorted(prompts, key=lambda i: (len(prompts[i]), i))
    heads = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    token = 2 * 2 * config.num_hidden_layers * heads
    reading = token + 2 * (3 * config.intermediate_size + 27 * config.hidden_size)

    def need(i):
        return max(len(prompts[i]) * reading, token * (2 * len(prompts[i]) + settings.max_new_tokens + 256))

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


def generator(model, tokenizer, prompts: dict[int, list[int]], settings):
    """A function that answers one batch (row indices) at a time, left-padded, and yields a `Generated` for each.

    `prompts` are tokens by row. Greedy, so that only the weights differ between two models.
    """
    from transformers import GenerationConfig

    model = for_inference(model)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

    def answer(batch):
        started = time.monotonic()
        free_decoding_memory(model)  # the last batch's keys and values, which this one's prompts need the place of
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        output = _generate_batch(model, inputs.to(model.device), config)
        seconds = round(time.monotonic() - started, 3)
        for i, tokens in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
            yield Generated(i, tokenizer.decode(tokens), len(tokens), seconds)

    return answer


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
