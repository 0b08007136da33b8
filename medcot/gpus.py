"""What a base model needs of a GPU, by arithmetic from its shape, and how a run is arranged on a card of any size."""

import json
from dataclasses import dataclass
from pathlib import Path

LORA_RANK = 16
LONGEST = 2048  # tokens of the longest example, the usual max_seq_length: what a micro-batch may have to hold each time
RESERVE_GIB = 0.6  # for the CUDA context and what the allocator cannot use
EXAMPLES_PER_STEP = 8
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; unsloth asks the same of a card before it takes flash attention


def layer_bytes(shape) -> int:
    """Bytes a token that a Llama layer keeps for its backward pass.

    About 3 x intermediate_size + 5 x hidden_size 16-bit numbers (inputs of the norms and projections, the gate and up
    products): measured as 0.83 GiB a layer at 7,000 tokens of the 8-billion-parameter shape.
    """
    return 2 * (3 * shape.intermediate_size + 5 * shape.hidden_size)


@dataclass(frozen=True)
class Shape:
    """A Llama or Qwen 2 model by its sizes; output and input embeddings are apart, as in all of the R1 family."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    attention_bias: bool = False

    @property
    def _keys(self) -> int:
        return self.num_key_value_heads * self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """All parameters of the base model."""
        hidden, keys = self.hidden_size, self._keys
        layer = 2 * hidden * (hidden + keys) + 3 * hidden * self.intermediate_size + 2 * hidden
        layer += (hidden + 2 * keys) * self.attention_bias
        return self.num_hidden_layers * layer + 2 * self.vocab_size * hidden + hidden

    @property
    def loaded_gib(self) -> float:
        """GiB in 4 bits: both embeddings in 16 bits, the rest as NF4 with doubly quantised constants (4.127 bits; Dettmers 2023).

        Estimated as 5.3 for the 8B, of which 5.5 was measured: 4 % is added, for layers that unsloth leaves in 16 bits.
        """
        embeddings = 2 * self.vocab_size * self.hidden_size
        return 1.04 * (2 * embeddings + 4.127 / 8 * (self.parameters - embeddings)) / 2**30

    def training_gib(self, tokens: int) -> float:
        """GiB at the peak of training with `tokens` tokens in a micro-batch and everything recomputed.

        Beside the weights: LoRA on seven projections at 10 bytes a parameter (weight, gradient, two 8-bit moments), and the
        activations of two layers (`layer_bytes`). 6.5 for the 8B at 2 x 1,180 tokens, as was measured, and
        7.6 at 7,000, where 7.4 was.
        """
        hidden, wide = self.hidden_size, self.intermediate_size
        lora = LORA_RANK * self.num_hidden_layers * (2 * 2 * hidden + 2 * (hidden + self._keys) + 3 * (hidden + wide))
        return self.loaded_gib + (10 * lora + 2 * tokens * layer_bytes(self)) / 2**30


# The R1 family by name (sizes from each model's config.json as published); what they need is estimated but for the 8B.
SHAPES = {
    "DeepSeek-R1-Distill-Qwen-1.5B": Shape(1536, 8960, 28, 12, 2, 151_936, attention_bias=True),
    "DeepSeek-R1-Distill-Qwen-7B": Shape(3584, 18_944, 28, 28, 4, 152_064, attention_bias=True),
    "DeepSeek-R1-Distill-Llama-8B": Shape(4096, 14_336, 32, 32, 8, 128_256),
    "DeepSeek-R1-Distill-Qwen-14B": Shape(5120, 13_824, 48, 40, 8, 152_064, attention_bias=True),
    "DeepSeek-R1-Distill-Llama-70B": Shape(8192, 28_672, 80, 64, 8, 128_256),
}


def shape_of(model: str) -> Shape | None:
    """The shape of a base model: of the R1 family by its name (a 4-bit copy's too), of a folder by its config.json."""
    name = Path(model).name.lower().removesuffix("-bnb-4bit").removesuffix("-unsloth")
    for known, shape in SHAPES.items():
        if name == known.lower():
            return shape
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        sizes = [config[field] for field in list(Shape.__dataclass_fields__)[:-1]]
    except (OSError, ValueError, KeyError):
        return None
    return Shape(*sizes, attention_bias=config.get("model_type") == "qwen2")


def arrange(model: str, gib: float, capability: tuple[int, int]) -> dict:
    """The settings, by name, with which a run on a model fits a card of `gib` GiB and wastes little of it.

    bfloat16 where the card has it. The micro-batch is the largest of 4, 2 and 1 whose longest possible examples fit with
    everything recomputed (more than 4 were not faster: tests/benchmarks), always eight examples a step; what is left then keeps
    activations. A model of unknown shape is trained one example at a time. All an estimate: training that runs out of memory
    makes the micro-batch smaller.
    """
    shape, usable = shape_of(model), gib - RESERVE_GIB
    size, kept, beside = 1, 0.0, 1.0
    if shape is not None:
        size = next((n for n in (4, 2) if shape.training_gib(n * LONGEST) <= usable), 1)
        kept = max(0.0, usable - shape.training_gib(size * LONGEST))
        beside = max(0.5, usable - shape.loaded_gib)
    return {
        "dtype": "bfloat16" if capability >= BFLOAT16_CAPABILITY else "float16",
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": EXAMPLES_PER_STEP // size,
        "activation_memory_gib": kept // 0.5 * 0.5,
        "generation_memory_gib": min(6.5, beside // 0.5 * 0.5),
    }
