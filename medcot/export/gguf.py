"""Merged weights of a Llama as one GGUF file, in f16 or q8_0, and the Modelfile that gives Ollama this project's prompt.

By the `gguf` package of llama.cpp (metadata, names, quantisers). Tensors are made, quantised and written one at a time.
"""

import json
import re
from pathlib import Path

from ..prompts import format_prompt
from ..settings import NOTICE, MedcotError
from ..tokenizer import load_tokenizer
from .merged import MergedWeights

KINDS = ("f16", "q8_0")
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer cuts text into words before it merges, and llama.cpp's name for it.
PRE_TOKENIZERS = {LLAMA_3: "llama-bpe"}
# For a tokenizer that llama.cpp has no name for: its file is right for token ids and wrong for text, and says so.
OTHER = "gpt-2"


def write_gguf(weights: MergedWeights, kind: str, path: Path):
    """Writes one file, `kind` being "f16" or "q8_0" (matrices in it; norms stay in float32).

    Raises MedcotError for another architecture than Llama's, whose query and key rows lie in another order.
    """
    import gguf

    if weights.config.get("model_type") != "llama":
        raise MedcotError(
            f"{weights.base} is of type {weights.config.get('model_type')!r}: GGUF is written for Llamas alone, export it "
            "merged and convert it with llama.cpp"
        )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _write_configuration(writer, weights, kind)
    _write_tokenizer(writer, weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, weights.config["num_hidden_layers"])
    extra = _rope_factors(weights)
    plan = {}
    for name, tensor in weights.tensors.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise MedcotError(f"{weights.base}: GGUF has no name for {name} in a Llama: export it merged instead")
        plan[name] = (new, _type(tensor.shape, kind))
    if extra is not None:
        writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
    for name, (new, stored) in plan.items():
        _announce(writer, new, weights.tensors[name].shape, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if extra is not None:
        writer.write_tensor_data(extra)
    for name, (_, stored) in plan.items():
        writer.write_tensor_data(gguf.quantize(_ordered(weights, name).float().numpy(), stored))
    writer.close()


def gguf_bytes(weights: MergedWeights, kind: str) -> int:
    """Size of the file to be written, within 16 MiB (q8_0: 34 bytes for 32 weights)."""
    return int(weights.bytes * (1 if kind == "f16" else 34 / 64)) + 16 * 2**20


def _type(shape, kind: str):
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    # A row that is no multiple of the 32 weights of a block cannot be cut into blocks.
    return gguf.GGMLQuantizationType.Q8_0 if kind == "q8_0" and shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F16


def _announce(writer, name: str, shape, stored):
    import gguf
    import numpy

    if stored is gguf.GGMLQuantizationType.Q8_0:
        rows = gguf.quant_shape_to_byte_shape(shape, stored)
        size = numpy.prod(rows, dtype=int)
        return writer.add_tensor_info(name, rows, numpy.dtype(numpy.uint8), int(size), raw_dtype=stored)
    dtype = numpy.dtype(numpy.float32 if stored is gguf.GGMLQuantizationType.F32 else numpy.float16)
    return writer.add_tensor_info(name, shape, dtype, int(numpy.prod(shape, dtype=int)) * dtype.itemsize)


def _ordered(weights: MergedWeights, name: str):
    """A tensor with its rows as ggml wants them.

    Rotary embedding turns pairs of a head's dimensions: i and i + half in transformers, 2i and 2i + 1 in ggml, so the rows
    of queries and keys change places (the inverse stands in transformers' `LlamaTensorProcessor`).
    """
    weight, config = weights[name], weights.config
    heads = {"q_proj.weight": config["num_attention_heads"],
             "k_proj.weight": config.get("num_key_value_heads") or config["num_attention_heads"]}  # fmt: skip
    count = next((count for ending, count in heads.items() if name.endswith(ending)), None)
    if count is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)


def _llama_config(weights: MergedWeights):
    from transformers import LlamaConfig

    return LlamaConfig(**{name: value for name, value in weights.config.items() if name != "quantization_config"})


def _rope_factors(weights: MergedWeights):
    """What Llama 3.1's long contexts divide each rotary frequency by (head size / 2, float32); None for plain ones."""
    import numpy
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _llama_config(weights)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise MedcotError(f"{weights.base}: rope_type {kind!r} is not written as GGUF here: export it merged instead")
    scaled = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    plain = config.rope_parameters["rope_theta"] ** (-numpy.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    return (plain / scaled).astype(numpy.float32)


def _write_configuration(writer, weights: MergedWeights, kind: str):
    import gguf

    config = _llama_config(weights)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(weights.adapter.name)
    writer.add_description(NOTICE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def pre_tokenizer(adapter: Path) -> str | None:
    """llama.cpp's name for how the tokenizer cuts text; None if it has none, and reads this model's text otherwise."""
    pre = json.loads((adapter / "tokenizer.json").read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    patterns = [
        part.get("pattern", {}).get("Regex") for part in pre.get("pretokenizers", [pre]) if part["type"] == "Split"
    ]
    return PRE_TOKENIZERS.get(patterns[0]) if len(patterns) == 1 else None


def _write_tokenizer(writer, weights: MergedWeights):
    import gguf

    tokenizer = load_tokenizer(str(weights.adapter))
    content = json.loads((weights.adapter / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE":
        raise MedcotError(
            f"{weights.adapter}: a {content['model']['type']} tokenizer is not written as GGUF here, BPE is"
        )
    size = weights.config["vocab_size"]
    names = {i: token for token, i in content["model"]["vocab"].items()}
    types = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for added in content["added_tokens"]:
        names[added["id"]] = added["content"]
        # Control tokens are never read out of a question and never shown; <think> has to be shown.
        control = added["special"] or re.fullmatch(r"<[|｜].*[|｜]>", added["content"])
        types[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    for i in set(range(size)) - set(names):  # rows of the embedding that no token uses
        names[i], types[i] = f"[PAD{i}]", gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")  # ggml's name for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(weights.adapter) or OTHER)
    writer.add_token_list([names[i] for i in range(size)])
    writer.add_token_types([types[i] for i in range(size)])
    special = gguf.SpecialVocab(weights.adapter, load_merges=True, n_vocab=size)
    special.special_token_ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    # The prompt holds no BOS, so exactly one comes in front; a chat template writes its own, and readers drop one of two.
    special.add_special_token = {"bos": True, "eos": False}
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def modelfile(file: str, settings, eos_token: str) -> str:
    """Ollama's recipe: this project's prompt around the question, one stop token, greedy as it was measured.

    Ollama puts the BOS in front by itself and takes what stands between the triple quotes as it is.
    """
    template = format_prompt("{{ .Prompt }}")
    return (
        f'# {NOTICE}\nFROM ./{file}\nTEMPLATE """{template}"""\n'
        f'PARAMETER stop "{eos_token}"\nPARAMETER temperature 0\n'
        f"PARAMETER num_predict {settings.max_new_tokens}\nPARAMETER num_ctx {settings.max_seq_length}\n"
        "PARAMETER repeat_penalty 1\n"
    )
