"""The base's weights with the adapter's update added, one tensor at a time, and the folder that they are written to."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..hub import patiently
from ..settings import MedcotError
from ..tokenizer import load_tokenizer

SHARD_BYTES = 2 * 2**30
_PREFIX = "base_model.model."
# What else an adapter may hold changes more than W + scale * B A, so it is refused and not passed over.
_PLAIN = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
          "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands and what it will be: file, shape (rows, columns) and 16-bit dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: object
    four_bit: bool

    @property
    def bytes(self) -> int:
        """Its size in 16 bits."""
        size = 2
        for side in self.shape:
            size *= side
        return size


class MergedWeights:
    """W + lora_alpha / r * B A of every tensor of a base (Hu et al. 2021, section 4.1), computed when it is asked for.

    `base` holds 16- or 32-bit safetensors, or bitsandbytes 4-bit ones, which are dequantised. Memory is that of one
    tensor in float32, three times. Raises MedcotError for a base that is not there and an adapter that does not fit.
    """

    def __init__(self, base: Path, adapter: Path):
        from safetensors.torch import load_file

        self.base, self.adapter = Path(base), Path(adapter)
        settings = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        odd = [name for name, plain in _PLAIN.items() if (settings.get(name) or plain) != plain]
        if odd:
            raise MedcotError(
                f"{self.adapter}: {', '.join(odd)} cannot be merged here, plain LoRA can: merge with peft"
            )
        self.scale = settings["lora_alpha"] / settings["r"]
        self.lora = {
            name.removeprefix(_PREFIX): weight
            for name, weight in load_file(self.adapter / "adapter_model.safetensors").items()
        }
        self.config = json.loads((self.base / "config.json").read_text(encoding="utf-8"))
        self.four_bit = "quantization_config" in self.config
        self.tensors = self._look()
        self._check_adapter()

    def _look(self) -> dict[str, Tensor]:
        """The tensors of the base by name, read from the headers of its files alone."""
        import torch
        from safetensors import safe_open

        found = {}
        for file in sorted(self.base.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                for name in (name for name in names if name.endswith(".weight")):
                    state = next((n for n in names if n.startswith(f"{name}.quant_state.bitsandbytes__")), None)
                    if state:
                        words = json.loads(bytes(opened.get_tensor(state).tolist()))
                        shape, dtype = tuple(words["shape"]), getattr(torch, words["dtype"])
                    else:
                        part = opened.get_slice(name)
                        shape = tuple(part.get_shape())
                        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float16}.get(
                            part.get_dtype()
                        )
                        if dtype is None:
                            raise MedcotError(
                                f"{file}: {name} is {part.get_dtype()}: only 16-bit, 32-bit and bitsandbytes 4-bit "
                                "weights can be merged, name such a base in MEDCOT_MODEL"
                            )
                    dtype = torch.float16 if dtype is torch.float32 else dtype
                    found[name] = Tensor(file, shape, dtype, state is not None)
        if not found:
            raise MedcotError(f"{self.base} holds no weights as .safetensors: name the base in MEDCOT_MODEL")
        return found

    def _check_adapter(self):
        """Every part of the adapter has its tensor, and the shapes agree."""
        for name, a in self.lora.items():
            module, _, kind = name.rpartition(".lora_")
            tensor, b = self.tensors.get(f"{module}.weight"), self.lora.get(f"{module}.lora_B.weight")
            if tensor is None or b is None:
                raise MedcotError(f"{self.adapter}: {name} belongs to no weight of {self.base}: is it another base's?")
            if kind == "A.weight" and (len(b), a.shape[1]) != tensor.shape:
                raise MedcotError(
                    f"{self.adapter}: {module} is {len(b)} x {a.shape[1]}, in {self.base} it is {tensor.shape}: name the "
                    "base that the adapter was trained on"
                )

    def __iter__(self):
        return iter(self.tensors)

    @property
    def bytes(self) -> int:
        """Size of all tensors in 16 bits."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def __getitem__(self, name: str):
        """One merged tensor as a 16-bit `torch.Tensor` on the CPU. Raises MedcotError for one that 16 bits cannot hold."""
        import torch
        from safetensors import safe_open

        place = self.tensors[name]
        with safe_open(place.file, "pt") as opened:
            weight = _dequantised(opened, name) if place.four_bit else opened.get_tensor(name)
        a, b = (self.lora.get(f"{name.removesuffix('.weight')}.lora_{kind}.weight") for kind in "AB")
        if a is not None:
            # In float32: the update is small beside the weight, and 16 bits would round it twice.
            weight = weight.float() + self.scale * (b.float() @ a.float())
        weight = weight.to(place.dtype)
        if not torch.isfinite(weight).all():
            raise MedcotError(f"{name} does not fit {place.dtype}: a value is infinite or not a number, train again")
        return weight.contiguous()

    @property
    def origin(self) -> str:
        """In words, what the update was added to."""
        if self.four_bit:
            return (
                "the base's 4-bit weights, dequantised: the weights that the adapter was trained on, rounded to 16 bits"
            )
        return (
            "the base in 16 bits. Where training held it in 4 bits (load_in_4bit), these are not quite the weights that "
            "the adapter was trained and measured on"
        )


def _dequantised(opened, name: str):
    import bitsandbytes.functional as functional
    import torch

    parts = {part: opened.get_tensor(part) for part in opened.keys() if part.startswith(f"{name}.")}  # noqa: SIM118
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    return functional.dequantize_4bit(opened.get_tensor(name), state)


def base_folder(settings, adapter: Path) -> Path:
    """The folder of the base that an adapter was trained on, fetched where only the hub has it.

    A folder that `settings.model` names; else what the adapter's own configuration names, which on a GPU is the 4-bit
    copy that Unsloth took for the name in the settings, and lies in the cache since training.
    """
    if Path(settings.model).is_dir():
        return Path(settings.model)
    name = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    revision = settings.model_revision if name == settings.model else None
    try:
        return Path(
            patiently(
                lambda: snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]), name
            )
        )
    except Exception as error:  # httpx, huggingface_hub and offline mode all raise their own
        raise MedcotError(
            f"the base {name} could not be fetched ({error}): name a folder of it in MEDCOT_MODEL"
        ) from error


def write_merged(weights: MergedWeights, folder: Path):
    """Writes shards of at most 2 GiB, their index, the configuration and the adapter's whole tokenizer to a new folder."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in weights.tensors.items()},
        max_shard_size=SHARD_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    write_config(weights, folder)
    copy_tokenizer(weights.adapter, folder)
    if (weights.base / "generation_config.json").is_file():
        shutil.copy(weights.base / "generation_config.json", folder)


def write_config(weights: MergedWeights, folder: Path):
    """The base's configuration, without what it says of 4 bits."""
    dtype = str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
    config = {
        name: value for name, value in weights.config.items() if name not in ("quantization_config", "torch_dtype")
    }
    for name in [name for name in config if name.startswith("unsloth")]:
        del config[name]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=1), encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path):
    """The tokenizer files and the chat template of an adapter folder, checked by loading them."""
    for name in _TOKENIZER_FILES:
        shutil.copy(source / name, folder)
    load_tokenizer(str(folder))
