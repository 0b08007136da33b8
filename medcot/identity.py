"""What a run is made of, as one hash with readable parts: the one place that says whether something on disk belongs to it.

Kept answers and scores, checkpoints, `training.json`, the adapter folder and the run card carry the parts of what made them.
One output folder holds one run: where a part differs, the work is refused by name, as early as that part is known.
"""

import hashlib
import json
from pathlib import Path

from .files import sha256
from .prompts import format_prompt
from .settings import MedcotError

# What decides the weights that training arrives at, and the answers that a model gives. Any other setting may change within
# a run: it says where files go, what is shown, or how examples lie in memory. Rows and model are parts of their own.
TRAINING = (
    "load_in_4bit", "device", "dtype", "r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate", "max_steps", "warmup_steps",
    "lr_scheduler_type", "optim", "weight_decay", "completion_only_loss", "seed", "train_rows", "examples_per_step",
)  # fmt: skip
MEASURING = (
    "load_in_4bit", "device", "dtype", "max_seq_length", "max_new_tokens", "generation_batch_size", "generation_memory_gib",
    "nproc_per_node", "score_batch_tokens", "primary_measure",
)  # fmt: skip
RECORD_FILE, CHECKPOINT_FILE, ADAPTER_FILE = "training.json", "checkpoint.json", "identity.json"
MEASURED = "measured"
_SAMPLE = 2**26  # bytes read of a file of weights: all of a small one, 1,024 blocks spread over a large one


def of_settings(settings, names) -> dict:
    """The parts that settings decide; as JSON has them, so that they compare equal to what was read back."""
    return json.loads(json.dumps({"prompt": prompt_id()} | {name: getattr(settings, name) for name in names}))


def prompt_id() -> str:
    """Names the text around a question."""
    return hashlib.sha256(format_prompt("").encode()).hexdigest()[:12]


def base_id(settings, model=None) -> str | None:
    """Names the base model by what it is: a folder by its contents, a hub name by repository and commit.

    None for a hub name before its `model` is loaded: only then is it known which repository and commit it stood for.
    """
    folder = Path(settings.model)
    if not folder.is_dir():
        return model and f"{model.config._name_or_path}@{model.config._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(_sampled(file))
    return f"contents {digest.hexdigest()[:12]}"


def _sampled(file: Path) -> bytes:
    size, block = file.stat().st_size, 2**16
    if size <= _SAMPLE:
        return bytes.fromhex(sha256(file))
    digest, step = hashlib.sha256(str(size).encode()), size * block // _SAMPLE
    with file.open("rb") as content:
        for start in range(0, size, step):
            content.seek(start)
            digest.update(content.read(block))
    return digest.digest()


def adapter_id(model) -> str:
    """Names what a model adds to its base: "base" without active adapters, else a hash of their weights and scaling."""
    layers = [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]
    if not layers or all(layer.disable_adapters for _, layer in layers):
        return "base"
    digest = hashlib.sha256(json.dumps([[name, layer.scaling] for name, layer in sorted(layers)], default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def hash_of(parts: dict) -> str:
    """The parts as one short name, for the run card."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def differences(there: dict, now: dict) -> list[str]:
    """In words, every part that both name and that is not the same in them."""
    return [
        f"{name} was {str(there[name])[:80]} and is {str(now[name])[:80]}"
        for name in now
        if name in there and there[name] != now[name]
    ]


def check(settings, rows: str | None = None, model=None):
    """Raises MedcotError if the output folder holds work of another run, as far as it can be told yet.

    Called with the settings, with the fingerprint of the training `rows` as soon as they are loaded, and with the `model`.
    Names file, part, both values and a folder that is free.
    """
    known = {
        name: value for name, value in (("base model", base_id(settings, model)), ("training rows", rows)) if value
    }
    for path, names, parts in _recorded(settings.output_dir):
        if odd := differences(parts, of_settings(settings, names) | known):
            raise MedcotError(
                f"{path} is of another run: {', '.join(odd)}. Set that back, or give this run a folder of its own: "
                f"MEDCOT_OUT={_free(settings.output_dir)}"
            )


def _recorded(folder: Path):
    """(file, settings that decide it, parts) of everything in an output folder that says what made it.

    A file that cannot be read says nothing here: whoever takes it up finds it damaged.
    """
    places = [(folder / RECORD_FILE, TRAINING)]
    places += [(file, TRAINING) for file in sorted(folder.glob(f"checkpoints/checkpoint-*/{CHECKPOINT_FILE}"))]
    places += [(file, MEASURING) for file in sorted(folder.glob(f"{MEASURED}/*.jsonl"))]
    for file, names in places:
        try:
            with file.open(encoding="utf-8") as content:
                parts = json.loads(content.readline() if file.suffix == ".jsonl" else content.read())["identity"]
            yield file, names, dict(parts)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue


def _free(folder: Path) -> Path:
    """The first of folder-2, folder-3 and so on that is not there."""
    return next(place for n in range(2, 10**6) if not (place := folder.with_name(f"{folder.name}-{n}")).exists())
