"""What `speed.py` measures: recipes of training and of answering, and what they share."""

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

T4_GIB = 14.5


@dataclass(frozen=True)
class Training:
    """One recipe of training."""

    stack: str
    """"unsloth" through medcot, "trl" with TRL, PEFT and bitsandbytes alone, or "torchrun": medcot on two GPUs."""
    size: int
    """Examples a micro-batch."""
    accumulation: int
    """Micro-batches a step."""
    padding_free: bool = False
    card_gib: float = 0.0
    """`activation_memory_gib`."""
    host_gib: float = 0.0
    """`activation_host_gib`."""
    multiple: int | None = None
    """Micro-batches are padded to a multiple of so many tokens; the matrix units want 8."""
    xformers: bool = False
    """xformers is installed, as Unsloth finds it on a T4; else PyTorch's attention."""
    one_call: bool = True
    """PyTorch's attention takes all documents in one call (`kernels.in_one_call`), or one by one, as Unsloth comes."""
    sent_by_trl: bool = False
    """Activations are sent by TRL's `activation_offloading`, all layers' of it, instead of by medcot."""


@dataclass(frozen=True)
class Answering:
    """One way of answering several questions at once."""

    rows: int
    tokens: int
    """Tokens of each question."""
    grouped: bool = True
    """Attention as medcot arranges it (`kernels.decoding_attention`), or as Unsloth comes."""
    fused_rows: int = 16
    """Up to so many rows the fused 4-bit product is used, beyond them weights are unpacked first; Unsloth's own limit is 16."""
    triton: bool = True
    """One row's 4-bit products by Unsloth's Triton kernel, or by bitsandbytes'."""
    stack: str = "unsloth"


@dataclass(frozen=True)
class Scoring:
    """Likelihood of the options of multiple-choice questions, or of references."""

    options: bool
    stack: str = "unsloth"


FAST = Training("unsloth", 4, 2, True, 8.0, 12.0, multiple=8)
TRAINING = {
    "kaggle-t4: Unsloth, 2 x 4, padded": Training("unsloth", 2, 4),
    "kaggle-t4-fast: Unsloth, 4 x 2, 8 GiB kept, the rest sent": FAST,
    "kaggle-t4 with xformers": Training("unsloth", 2, 4, xformers=True),
    "kaggle-t4-fast with xformers": replace(FAST, xformers=True),
    "kaggle-t4-fast, documents one by one": replace(FAST, one_call=False),
    "kaggle-t4-fast, not filled to multiples of 8": replace(FAST, multiple=None),
    "kaggle-t4-fast, the rest recomputed": replace(FAST, host_gib=0.0),
    "kaggle-t4-fast, all sent by TRL": replace(FAST, card_gib=0.0, host_gib=0.0, sent_by_trl=True),
    "kaggle-t4-fast, 2 x 4": replace(FAST, size=2, accumulation=4),
    "kaggle-t4-fast, 8 x 1, 3 GiB kept": replace(FAST, size=8, accumulation=1, card_gib=3.0, host_gib=40.0),
    "TRL + PEFT + bitsandbytes, 2 x 4": Training("trl", 2, 4),
    "kaggle-t4x2: two GPUs, 4 x 1 x 2": replace(FAST, stack="torchrun", accumulation=1),
}
ANSWERING = {
    "16 questions of 300 tokens, as Unsloth comes": Answering(16, 300, grouped=False),
    "16 questions of 300 tokens": Answering(16, 300),
    "16 questions of 700 tokens, as Unsloth comes": Answering(16, 700, grouped=False),
    "16 questions of 700 tokens": Answering(16, 700),
    "16 questions of 300 tokens, unpacked first": Answering(16, 300, fused_rows=1),
    "24 questions of 300 tokens, unpacked first": Answering(24, 300),
    "24 questions of 300 tokens, fused": Answering(24, 300, fused_rows=64),
    "32 questions of 300 tokens, as Unsloth comes": Answering(32, 300, grouped=False),
    "32 questions of 300 tokens, unpacked first": Answering(32, 300),
    "32 questions of 300 tokens, fused": Answering(32, 300, fused_rows=64),
    "48 questions of 150 tokens, unpacked first": Answering(48, 150),
    "48 questions of 150 tokens, fused": Answering(48, 150, fused_rows=64),
    "1 question of 300 tokens": Answering(1, 300),
    "1 question of 300 tokens, by bitsandbytes": Answering(1, 300, triton=False),
    "likelihood of options": Scoring(True),
    "likelihood of references": Scoring(False),
}
RECIPES = TRAINING | ANSWERING


def cap(gib):
    """Holds this process to so many GiB of its card."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def t4_conditions(shape: bool = False):
    """Holds this process to what a T4 has, as far as another card can be held to it; fp16 comes from the settings."""
    import torch

    from medcot.environment import prepare_environment

    from . import t4_shape

    prepare_environment()  # as load_settings does, before the GPU is first used
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if shape:
        t4_shape.enter()
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "0"  # they are captured on a stream of the whole card
    t4_shape.as_on_a_t4()
    cap(T4_GIB)


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


def settings_for(options, recipe: Training):
    from medcot.profiles import PROFILES

    return replace(
        PROFILES["kaggle-t4"], model=options.model, output_dir=Path(options.out) / "run", report_to="none",
        per_device_train_batch_size=recipe.size, gradient_accumulation_steps=recipe.accumulation,
        padding_free=recipe.padding_free, activation_memory_gib=recipe.card_gib, activation_host_gib=recipe.host_gib,
        max_steps=options.steps, warmup_steps=1, eval_steps=10**6, save_steps=10**6,
    )  # fmt: skip


def loaded_model(options, loaded={}):  # noqa: B006, the one model that the recipes of a process share
    """(model with adapters, tokenizer), the adapters as they were when they were fresh."""
    import torch

    from medcot import add_lora, load_model

    from . import t4_shape

    settings = settings_for(options, TRAINING["kaggle-t4: Unsloth, 2 x 4, padded"])
    if not loaded:
        with t4_shape.whole_card():  # weights are loaded by threads on the default stream
            model, loaded["tokenizer"] = load_model(settings)
            loaded["model"] = add_lora(model, settings)
        loaded["fresh"] = {n: w.detach().cpu().clone() for n, w in loaded["model"].named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, weight in loaded["model"].named_parameters():
            if name in loaded["fresh"]:
                weight.copy_(loaded["fresh"][name])
    return loaded["model"], loaded["tokenizer"]
