"""Writes a model of the exact shape of DeepSeek-R1-Distill-Llama-8B with random weights, in 4 bits as Unsloth stores them.

python tests/benchmarks/model_8b.py FOLDER        (a CUDA GPU; 6 GB, some 20 s)

Speed, memory and plumbing of a real run can be measured on it; its answers mean nothing. The tokenizer is a small
byte-level one with the special tokens of the real one.
"""

import json
import sys
import time
from pathlib import Path

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>",
)  # fmt: skip


def write_weights(folder, config):
    """Standard deviation 0.02, seeded, drawn in fp16 in the order of the state dictionary; projections in NF4."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    generator, files, shard, place = torch.Generator("cuda").manual_seed(0), {}, {}, {}

    def flush():
        name = f"model-{len(files) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files[name] = sum(weight.numel() * weight.element_size() for weight in shard.values())
        place.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        if "norm" in name:
            shard[name] = torch.ones(shape, dtype=torch.float16)
            continue
        weight = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16) * 0.02
        if "proj" in name:
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
            shard[name] = packed.cpu()
            shard |= {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
        else:
            shard[name] = weight.cpu()
        if sum(weight.numel() * weight.element_size() for weight in shard.values()) > 2e9:
            flush()
    flush()
    index = {"metadata": {"total_size": sum(files.values())}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the patient has chest pain and fever"] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        model_max_length=131072,
    ).save_pretrained(folder)


def main(folder, **changes):
    import torch
    from transformers import LlamaConfig

    started, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = dict(  # noqa: C408
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=500000.0,
        rope_scaling=dict(  # noqa: C408
            factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                          rope_type="llama3"),
        bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype=torch.float16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config = LlamaConfig(**shape | changes)
    write_weights(folder, config)
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    config.save_pretrained(folder)
    write_tokenizer(folder)
    print(f"wrote {folder} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
