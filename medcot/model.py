"""Weights: load a model, give it LoRA adapters, save them. The only room that knows unsloth."""

import gc
import json
import logging
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

from . import identity
from .environment import prepare_environment
from .files import check_disk, finish_swap, swap_folder
from .hub import hub_revision, patiently
from .settings import NOTICE, MedcotError
from .tokenizer import load_tokenizer, reason

ADAPTER_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


@cache
def _unsloth():
    """Unsloth, imported before anything that it patches, with its telemetry and that of its libraries off."""
    prepare_environment()
    # Replays each decoding step as one CUDA graph: the same arithmetic without the launch of hundreds of kernels a token.
    os.environ.setdefault("UNSLOTH_DECODE_CUDA_GRAPHS", "1")
    # Notes of these libraries to their own developers (no triton on a CPU, a deprecated registration).
    for logger in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    gc.disable()  # a million objects that stay: the collector looks at them neither while they come nor ever after
    try:
        import unsloth
    finally:
        gc.freeze()
        gc.enable()
    return unsloth


def load_model(settings, adapter: Path | None = None):
    """The model in 4-bit through Unsloth, and its tokenizer; with `adapter`, the adapters of that folder on top.

    `dtype` on a GPU, float32 on a CPU. Only safetensors are read and no remote code runs.
    Raises MedcotError for a model that is not there, has no safetensors, does not fit the adapter, or is another one
    than the output folder's run was made with.
    """
    if adapter is not None:
        finish_swap(_saving(Path(adapter)), Path(adapter))
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise MedcotError(
            f"no adapter_model.safetensors in {adapter}: run 02_finetune.ipynb with the same profile first"
        )
    unsloth = _unsloth()
    name, revision, local = _locate(settings)
    tokenizer = load_tokenizer(name, revision, local)
    import torch
    from safetensors import SafetensorError

    from . import kernels

    try:
        model, _ = patiently(
            lambda: unsloth.FastLanguageModel.from_pretrained(
                name,
                revision=revision,
                use_exact_model_name=True,  # `_locate` has taken the 4-bit copy for the name already
                max_seq_length=settings.max_seq_length,
                dtype=getattr(torch, settings.dtype) if settings.device == "cuda" else torch.float32,
                load_in_4bit=settings.load_in_4bit,
                use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
                use_safetensors=True,
                local_files_only=local,
            ),
            name,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MedcotError(
            f"model {name} could not be loaded ({reason(error)}): check its name and the network"
        ) from error
    identity.check(settings, model=model)
    kernels.install(model)
    if adapter is not None:
        model = _load_adapter(model, settings, Path(adapter))
    report_memory("model loaded")
    return for_inference(model), tokenizer


def _locate(settings) -> tuple[str, str | None, bool]:
    """(folder or hub name, revision, whether only the cache is asked) of the weights that are really loaded.

    Unsloth takes its own 4-bit copy for a name that has one, in another repository: that one is pinned and asked about.
    """
    folder = Path(settings.model)
    if folder.is_dir():
        if not list(folder.glob("*.safetensors")):
            raise MedcotError(
                f"{folder} holds no .safetensors file: only safetensors are loaded, convert the weights first"
            )
        return settings.model, None, False
    if folder.is_absolute() or settings.model.startswith("."):
        raise MedcotError(f"no model at {settings.model}: name a model folder or hub name")
    name = settings.model
    if settings.device == "cuda":  # on a CPU unsloth takes every name as it is
        from unsloth.models.loader_utils import get_model_name

        name = get_model_name(name, load_in_4bit=settings.load_in_4bit)
    # Where the hub does not answer, only the cache is asked: each file would wait for it anew.
    return name, settings.model_revision, hub_revision("model", name, settings.model_revision) is None


def free_decoding_memory(model):
    """Gives back the key-value buffers and captured graphs that generation keeps for its next call; nothing without a GPU."""
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


def exempt_from_recomputation(model, indices):
    """The decoder layers of these indices keep their activations for the backward pass; the others recompute them."""
    _unsloth()
    from unsloth.models._utils import skip_checkpointing

    skip_checkpointing(model, "max")
    for i, layer in enumerate(model.get_decoder().layers):
        if i not in indices:
            layer.__dict__.pop("_unsloth_skip_checkpoint", None)


def fresh_adapters(model, seed: int):
    """Sets every adapter back to where training begins, by the seed alone: whatever was trained in this process before."""
    import torch

    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            for adapter in module.lora_A:
                module.reset_lora_parameters(adapter, True)


def save_adapter(model, tokenizer, settings) -> Path:
    """Writes the six files of the adapter folder, and what it was made of, and returns it: never half there.

    The tokenizer is saved as a plain fast one, which stock `AutoTokenizer` reads back without damage.
    """
    folder = settings.adapter_dir
    fresh = _saving(folder)
    finish_swap(fresh, folder)
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
    parts = identity.of_settings(settings, identity.TRAINING) | {"base model": identity.base_id(settings, model)}
    (fresh / identity.ADAPTER_FILE).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    missing = [name for name in ADAPTER_FILES if not (fresh / name).is_file()]
    if missing:
        raise RuntimeError(f"{fresh} lacks {', '.join(missing)} after saving")
    load_tokenizer(str(fresh))
    swap_folder(fresh, folder)
    print(f"adapter saved in {folder} ({', '.join(ADAPTER_FILES)}). {NOTICE}")
    return folder


def _saving(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.saving")


def _load_adapter(model, settings, folder: Path):
    """Adapters from a folder onto a freshly loaded base, through the same path as training gives them."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _check_base(model, settings, folder)
    weights_file = folder / "adapter_model.safetensors"
    weights = _read_weights(weights_file)
    config = _read_config(folder / "adapter_config.json", weights)
    model = add_lora(model, replace(settings, r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                                    target_modules=tuple(sorted(config.target_modules))))  # fmt: skip
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


def _check_base(model, settings, folder: Path):
    """Raises MedcotError if an adapter folder says that it was trained on another base, which may have the same shape."""
    try:
        there = json.loads((folder / identity.ADAPTER_FILE).read_text(encoding="utf-8"))["base model"]
    except FileNotFoundError:
        print(f"{folder} does not say on which weights it was trained: taken for an adapter of {settings.model}")
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MedcotError(f"{folder / identity.ADAPTER_FILE} cannot be read ({reason(error)}): run 02 again") from error
    if there != (now := identity.base_id(settings, model)):
        raise MedcotError(
            f"{folder} was made for another base: {there}, and {settings.model} is {now}: set MEDCOT_MODEL, or "
            "model_revision, to what it was trained on"
        )


def _read_weights(file: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise MedcotError(f"{file} is damaged ({error}): run 02_finetune.ipynb again") from error
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise MedcotError(f"{file} holds numbers that are not finite: run 02_finetune.ipynb again")
    return weights


def _read_config(file: Path, weights: dict):
    """The `peft.LoraConfig` of an adapter folder; refused where it asks for more than plain LoRA of one rank."""
    from dataclasses import fields

    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(file.parent)
        ranks = {len(weight) for name, weight in weights.items() if "lora_A" in name}
        if config.r not in ranks:
            raise ValueError(
                f"r is {config.r} and the weights have rank {', '.join(map(str, sorted(ranks))) or 'none'}"
            )
        plain = LoraConfig()
        odd = [f.name for f in fields(config) if f.name not in _PLAIN and getattr(config, f.name) and
               getattr(config, f.name) != getattr(plain, f.name)]  # fmt: skip
        if odd:
            raise ValueError(f"{', '.join(f'{name}={getattr(config, name)!r}' for name in odd)} is not plain LoRA")
        if not (isinstance(config.lora_alpha, int) and isinstance(config.lora_dropout, float)):
            raise ValueError(f"lora_alpha={config.lora_alpha!r}, lora_dropout={config.lora_dropout!r}: no numbers")
        return config
    except Exception as error:  # peft raises whatever the wrong value runs into
        raise MedcotError(f"{file} does not fit ({reason(error)}): run 02_finetune.ipynb again") from error


# What a plain LoRA configuration may say for itself.
_PLAIN = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "peft_type", "auto_mapping", "peft_version", "runtime_config",
)  # fmt: skip
