"""Weights: load a model, give it LoRA adapters, save them. The only room that knows unsloth."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from .prompts import THINK_CLOSE, THINK_OPEN, escape, format_prompt
from .settings import NOTICE, MedcotError, check_disk, hub_revision, patiently, prepare_environment

ADAPTER_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
# Texts that a wrong tokenizer class damages: spaces, line ends, accents, signs, other scripts, emoji.
_ROUND_TRIP = (
    "chest pain and fever, 37.5 °C",
    " two  spaces\n\n\tand a tab\r\n",
    "β-blocker, naïve, ≥ 65",
    "ألم 胸痛 🫀",
)
# Reserved tokens of the Llama 3 vocabulary that can pad, for tokenizers that name EOS as their padding.
_PADS = ("<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<|reserved_special_token_0|>")


def _unsloth():
    """Unsloth, imported before anything that it patches, with its telemetry and that of its libraries off."""
    prepare_environment()
    # Replays each decoding step as one CUDA graph: the same arithmetic without the launch of hundreds of kernels a token.
    os.environ.setdefault("UNSLOTH_DECODE_CUDA_GRAPHS", "1")
    # Notes of these libraries to their own developers (no triton on a CPU, a deprecated registration).
    for logger in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    import unsloth

    return unsloth


def load_tokenizer(source: str, revision: str | None = None, local_files_only: bool = False):
    """The tokenizer of a hub name or local folder, checked against the contract (`check_tokenizer`).

    Read as a plain fast tokenizer, because transformers 5 rebuilds the class that the R1 models name in a way that
    loses spaces ("chest pain" becomes "chestpain").
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = patiently(
            lambda: PreTrainedTokenizerFast.from_pretrained(
                source, revision=revision, padding_side="left", local_files_only=local_files_only
            ),
            source,
        )
    except Exception as error:  # the tokenizers library raises nothing more special
        raise MedcotError(f"no tokenizer at {source} ({_reason(error)}): name a model folder or hub name") from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = next((pad for pad in _PADS if pad in tokenizer.get_vocab()), None)
    check_tokenizer(tokenizer, source)
    return tokenizer


def _reason(error) -> str:
    """The first line of what an error says, cut to what fits a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_tokenizer(tokenizer, source):
    """Raises MedcotError naming everything about a tokenizer that would spoil training or answers.

    Checked: text comes back as it went in, an encoded prompt has exactly one BOS and ends in `<think>` and a newline,
    both think tags are one token each, EOS is known and differs from the padding.
    """
    wrong = []
    for text in _ROUND_TRIP:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
        if back != text:
            wrong.append(f"{text!r} comes back as {back!r}")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        wrong.append(f"bos_token is {tokenizer.bos_token!r} and eos_token is {tokenizer.eos_token!r}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        wrong.append(f"pad_token {tokenizer.pad_token!r} is not a token of its own")
    ids = tokenizer(format_prompt("Where is the pain?"))["input_ids"]
    if ids.count(tokenizer.bos_token_id) != 1 or ids[0] != tokenizer.bos_token_id:
        wrong.append(f"an encoded prompt has {ids.count(tokenizer.bos_token_id)} BOS tokens, one is needed in front")
    for tag in (THINK_OPEN, THINK_CLOSE):
        if len(tokenizer.encode(tag, add_special_tokens=False)) != 1:
            wrong.append(f"{tag} is not one token")
    for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        if token and tokenizer.convert_tokens_to_ids(token) in tokenizer.encode(
            escape(token), add_special_tokens=False
        ):
            wrong.append(f"{token} inside a question could not be told from the token")
    if wrong:
        raise MedcotError(
            f"the tokenizer at {source} cannot be used: {'; '.join(wrong)}. Cure: take tokenizer.json and "
            'tokenizer_config.json from the base model, with "tokenizer_class": "PreTrainedTokenizerFast"'
        )


def load_model(settings, adapter: Path | None = None):
    """The model in 4-bit through Unsloth, and its tokenizer; with `adapter`, the adapters of that folder on top.

    float16 on a GPU (a T4 has no bfloat16), float32 on a CPU. Only safetensors are read and no remote code runs.
    Raises MedcotError for a model that is not there, has no safetensors, or does not fit the adapter.
    """
    if adapter is not None:
        _finish_swap(Path(adapter))
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise MedcotError(
            f"no adapter_model.safetensors in {adapter}: run 02_finetune.ipynb with the same profile first"
        )
    folder = Path(settings.model)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise MedcotError(
            f"{folder} holds no .safetensors file: only safetensors are loaded, convert the weights first"
        )
    unsloth = _unsloth()
    # Where the hub does not answer, only the cache is asked: each file would wait for it anew.
    local = not folder.is_dir() and hub_revision("model", settings.model, settings.model_revision) is None
    tokenizer = load_tokenizer(settings.model, settings.model_revision, local)
    import torch
    from safetensors import SafetensorError

    try:
        model, _ = patiently(
            lambda: unsloth.FastLanguageModel.from_pretrained(
                settings.model,
                revision=settings.model_revision,
                max_seq_length=settings.max_seq_length,
                dtype=torch.float16 if settings.device == "cuda" else torch.float32,
                load_in_4bit=settings.load_in_4bit,
                use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
                use_safetensors=True,
                local_files_only=local,
            ),
            settings.model,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MedcotError(
            f"model {settings.model} could not be loaded ({_reason(error)}): check its name and the network"
        ) from error
    if adapter is not None:
        model = _load_adapter(model, settings, Path(adapter))
    report_memory("model loaded")
    return for_inference(model), tokenizer


def free_decoding_memory(model):
    """Gives back the key-value buffers and captured graphs that generation keeps for its next call; nothing without a GPU."""
    import gc

    import torch

    if torch.cuda.is_available():
        _unsloth()
        from unsloth.models._decode_graphs import release_for_training

        release_for_training(model)
        gc.collect()
        torch.cuda.empty_cache()


def report_memory(after: str):
    """Prints the peak of GPU memory since the last such line; nothing without a GPU."""
    import torch

    if torch.cuda.is_available():
        most, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        print(f"{after}: peak {most / 2**30:.1f} of {total / 2**30:.1f} GiB of GPU memory")
        torch.cuda.reset_peak_memory_stats()


def add_lora(model, settings):
    """The model with fresh LoRA adapters on `target_modules`, ready to train; returns a `peft.PeftModel`.

    Raises MedcotError for a module that the model does not have.
    """
    there = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if missing := [name for name in settings.target_modules if name not in there]:
        raise MedcotError(
            f"target_modules names {', '.join(missing)}, which {settings.model} does not have: choose from "
            f"{', '.join(sorted(name for name in there if name.endswith('_proj')))}"
        )
    return _unsloth().FastLanguageModel.get_peft_model(
        model,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
        random_state=settings.seed,
        max_seq_length=settings.max_seq_length,
    )


def for_inference(model):
    """The model switched to generation: no dropout, key-value cache on."""
    return _unsloth().FastLanguageModel.for_inference(model) or model


def for_training(model):
    """The model switched to training."""
    return _unsloth().FastLanguageModel.for_training(model) or model


def keep_activations(model, tokens: int, gib: float) -> int:
    """Exempts as many decoder layers from recomputation as `gib` GiB hold at `tokens` tokens a batch; returns how many.

    A Llama layer keeps about 3 x intermediate_size + 5 x hidden_size 16-bit numbers a token for its backward pass
    (inputs of the norms and projections, the gate and up products): measured as 0.83 GiB a layer at 7,000 tokens of
    the 8-billion-parameter shape.
    """
    config = model.config
    layer = tokens * 2 * (3 * config.intermediate_size + 5 * config.hidden_size)
    layers = min(config.num_hidden_layers, int(gib * 2**30 / layer))
    if layers:
        _unsloth()
        from unsloth.models._utils import skip_checkpointing

        skip_checkpointing(model, layers)
    return layers


def save_adapter(model, tokenizer, settings) -> Path:
    """Writes the six files of the adapter folder and returns it; written beside and renamed, so never half there.

    The tokenizer is saved as a plain fast one, which stock `AutoTokenizer` reads back without damage.
    """
    folder = settings.adapter_dir
    _finish_swap(folder)
    fresh = folder.with_name(folder.name + ".saving")
    shutil.rmtree(fresh, ignore_errors=True)
    check_disk(folder, 4 * sum(w.numel() for n, w in model.named_parameters() if "lora_" in n) + 32 * 2**20)
    model.save_pretrained(fresh, safe_serialization=True)
    tokenizer.save_pretrained(fresh)
    config_file = fresh / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    # transformers 5 writes neither of these two by itself where it thinks them implied.
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    (fresh / "special_tokens_map.json").write_text(json.dumps(special, ensure_ascii=False, indent=2), encoding="utf-8")
    if not (fresh / "chat_template.jinja").exists():
        (fresh / "chat_template.jinja").write_text(tokenizer.chat_template or "", encoding="utf-8")
    missing = [name for name in ADAPTER_FILES if not (fresh / name).is_file()]
    if missing:
        raise RuntimeError(f"{fresh} lacks {', '.join(missing)} after saving")
    load_tokenizer(str(fresh))
    if folder.exists():
        folder.rename(folder.with_name(folder.name + ".old"))
    fresh.rename(folder)
    _finish_swap(folder)
    print(f"adapter saved in {folder} ({', '.join(ADAPTER_FILES)}). {NOTICE}")
    return folder


def _finish_swap(folder: Path):
    """Ends what `save_adapter` may have been killed in: with `.old` there, `.saving` was complete and checked."""
    old, fresh = (folder.with_name(folder.name + ending) for ending in (".old", ".saving"))
    if old.exists():
        if not folder.exists():
            fresh.rename(folder)
        shutil.rmtree(old)


def _load_adapter(model, settings, folder: Path):
    """Adapters from a folder onto a freshly loaded base, through the same path as training gives them."""
    from dataclasses import replace

    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights_file = folder / "adapter_model.safetensors"
    try:
        weights = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise MedcotError(f"{weights_file} is damaged ({error}): run 02_finetune.ipynb again") from error
    try:
        config = LoraConfig.from_pretrained(folder)
        ranks = {len(weight) for name, weight in weights.items() if "lora_A" in name}
        if config.r not in ranks:
            raise ValueError(
                f"r is {config.r} and the weights have rank {', '.join(map(str, sorted(ranks))) or 'none'}"
            )
        settings = replace(settings, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                           target_modules=tuple(sorted(config.target_modules)))  # fmt: skip
    except Exception as error:  # peft raises whatever the wrong value runs into
        raise MedcotError(
            f"{folder / 'adapter_config.json'} does not fit ({_reason(error)}): run 02_finetune.ipynb again"
        ) from error
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise MedcotError(f"{weights_file} holds numbers that are not finite: run 02_finetune.ipynb again")
    model = add_lora(model, settings)
    expected = {name: tuple(w.shape) for name, w in get_peft_model_state_dict(model).items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise MedcotError(
            f"{weights_file} was made for another base than {settings.model}: {len(odd)} of {len(expected)} tensors differ, "
            f"first {odd[0]} ({found.get(odd[0])} in the file, {expected.get(odd[0])} in the model)"
        )
    set_peft_model_state_dict(model, weights)
    return model


def weights_id(model) -> str:
    """Which weights a model answers with: "base" for a model without active adapters, else a SHA-256 over the adapters' names and values."""
    adapters = [(name, weight) for name, weight in sorted(model.named_parameters()) if "lora_" in name]
    layers = [module for module in model.modules() if hasattr(module, "disable_adapters")]
    if not adapters or all(layer.disable_adapters for layer in layers):
        return "base"
    digest = hashlib.sha256()
    for name, weight in adapters:
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
