"""Before quota is spent: can this machine run these settings, and how long will it take."""

import json
import shutil
import tempfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ..files import first_existing
from ..gpus import LONGEST, RESERVE_GIB, SHAPES, Shape, shape_of
from ..settings import EMBEDDED_MODEL, MedcotError, on_kaggle
from ..training import FORECAST_STEPS, Forecast, total_steps
from .resume import run_training

SMALLEST_CAPABILITY = (7, 5)  # Turing, the T4: older cards have no Triton kernels
DOWNLOAD_GIB = {"unsloth/DeepSeek-R1-Distill-Llama-8B": 6.0}  # other models: estimated
# GiB of a GPU: what the leanest training took, and the most that a profile took (README, Speed), both rounded up.
GPU_GIB = {"unsloth/DeepSeek-R1-Distill-Llama-8B": (7.0, 12.5)}
OUTPUT_GIB = 2.0  # adapter 0.16, two checkpoints of 0.5 each, answers, figures


def check_machine(settings):
    """Prints what is good to know about this machine. Raises MedcotError naming everything that rules it out."""
    wrong, notes = [], []
    for check in (_gpus, _host, _versions, _disk, _model):
        check(settings, wrong, notes)
    print("\n".join(notes))
    if wrong:
        raise MedcotError("this machine cannot run these settings: " + "; ".join(wrong))


def _gpus(settings, wrong, notes):
    import torch

    if not torch.cuda.is_available():
        notes.append("no CUDA GPU: runs on the CPU, which suits the profiles tiny and smoke")
        if settings.device == "cuda":
            wrong.append("device=cuda and there is no CUDA GPU: choose MEDCOT_PROFILE=tiny or a GPU session")
        return
    cards = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())
    ]
    for name, capability in cards:
        if capability < SMALLEST_CAPABILITY:
            wrong.append(
                f"{name} has compute capability {capability[0]}.{capability[1]} and 7.5 is needed: "
                "choose the accelerator GPU T4 x2 in the session's settings"
            )
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    notes.append(f"{len(cards)} GPU: {', '.join(name for name, _ in cards)}, {gib:.1f} GiB each")
    notes.append(which_fit(gib))
    shape = shape_of(settings.model) if settings.load_in_4bit and settings.model != EMBEDDED_MODEL else None
    least, ample = GPU_GIB.get(settings.model, (0 if shape is None else least_gib(shape), 0))
    if gib < least:
        wrong.append(
            f"{cards[0][0]} has {gib:.1f} GiB of memory and {settings.model} needs at least {least:.0f}: "
            "choose MEDCOT_PROFILE=tiny, or a Kaggle session with the accelerator GPU T4 x2"
        )
    elif gib < ample and settings.profile != "gpu":  # which has arranged itself
        notes.append(
            f"{gib:.1f} GiB of GPU memory may be too little where up to {ample:.1f} were used: choose "
            "MEDCOT_PROFILE=kaggle-t4 and lower generation_memory_gib"
        )
    if len(cards) > settings.nproc_per_node:
        idle = len(cards) - settings.nproc_per_node
        notes.append(
            f"{idle} of {len(cards)} GPUs will stand idle: MEDCOT_PROFILE=kaggle-t4x2 trains and evaluates on two"
        )
    if len(cards) < settings.nproc_per_node:
        wrong.append(
            f"nproc_per_node={settings.nproc_per_node} and {len(cards)} GPU here: choose MEDCOT_PROFILE=kaggle-t4-fast"
        )


def _host(settings, wrong, notes):
    """Whether activations can be sent to host memory; without room for it they are recomputed, which is only slower."""
    if settings.device == "cpu" or not settings.activation_host_gib:
        return
    from ..activations import free_host_gib

    room = free_host_gib(settings.nproc_per_node)
    notes.append(
        f"{room:.1f} GiB of host memory for activations in each process, up to {settings.activation_host_gib:.1f} are used"
        + (": with less, more is computed twice" if room < settings.activation_host_gib else "")
    )


def least_gib(shape: Shape) -> float:
    """GiB of a card on which training one example at a time fits."""
    return shape.training_gib(LONGEST) + RESERVE_GIB


def which_fit(gib: float) -> str:
    """In words, how much each base of the R1 family needs in 4 bits, and which of them a card of `gib` GiB trains."""
    needs = {name.removeprefix("DeepSeek-R1-Distill-"): least_gib(shape) for name, shape in SHAPES.items()}
    fitting = [name for name, need in needs.items() if need <= gib]
    listed = ", ".join(f"{name} {need:.1f}" for name, need in needs.items())
    return (
        f"R1-Distill in 4 bits needs about (GiB, estimated): {listed}; fits {gib:.1f}: {', '.join(fitting) or 'none'}"
    )


def _versions(settings, wrong, notes):
    """Everything that unsloth declares and that is installed in a version which it excludes."""
    from packaging.requirements import Requirement

    there = {}
    for name in ("unsloth", "torch", "transformers", "trl", "peft"):
        try:
            there[name] = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed: pip install -r requirements.lock")
    notes.append(", ".join(f"{name} {number}" for name, number in there.items()))
    for line in requires("unsloth") or [] if "unsloth" in there else []:
        requirement = Requirement(line)
        if requirement.name == "certifi" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue  # certifi: declared newer than some registries carry, and nothing needs the newer one
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue  # torchvision, xformers and diffusers are declared and not needed here
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is excluded by unsloth: pip install '{requirement}'")


def _disk(settings, wrong, notes):
    from huggingface_hub import constants

    needs = {settings.output_dir: OUTPUT_GIB if settings.model != EMBEDDED_MODEL else 0.1}
    if not _is_here(settings):
        shape = shape_of(settings.model) if settings.load_in_4bit else None  # of those known there is a 4-bit copy
        estimate = 16.0 if shape is None else 1.1 * shape.loaded_gib
        needs[Path(constants.HF_HUB_CACHE)] = DOWNLOAD_GIB.get(settings.model, estimate)
    disks = {}  # the cache and the outputs may share one
    for folder, gib in needs.items():
        there = first_existing(folder)
        place, sofar = disks.get(there.stat().st_dev, (there, 0.0))
        disks[there.stat().st_dev] = place, sofar + gib
    for there, gib in disks.values():
        free = shutil.disk_usage(there).free / 2**30
        notes.append(f"{free:.1f} GiB free in {there}, about {gib:.1f} needed")
        if free < gib:
            wrong.append(
                f"{there} has {free:.1f} GiB free and about {gib:.1f} are needed: free some or set MEDCOT_OUT or HF_HOME"
            )


def _is_here(settings) -> bool:
    """The model's weights stand in a folder or in the hub's cache, under its name or that of the 4-bit copy."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    def cached(name, file):
        path = try_to_load_from_cache(name, file, revision=settings.model_revision if name == settings.model else None)
        return path if isinstance(path, str) else None

    def whole(name):
        if index := cached(name, "model.safetensors.index.json"):
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            return all(cached(name, shard) for shard in shards)
        return cached(name, "model.safetensors") is not None

    names = (settings.model, f"{settings.model.lower()}-unsloth-bnb-4bit", f"{settings.model}-unsloth-bnb-4bit")
    try:
        return Path(settings.model).is_dir() or any(map(whole, names))
    except HFValidationError:  # no name that a hub could have
        return False


def _model(settings, wrong, notes):
    """The model stands in a folder or cache here, or the hub answers."""
    if Path(settings.model).is_dir():
        notes.append(f"model in {settings.model}: no network needed")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError

    if _is_here(settings):
        notes.append(f"model {settings.model} is in the local cache")
        return
    try:
        HfApi().model_info(settings.model, revision=settings.model_revision, timeout=10)
        notes.append(f"model {settings.model} will be downloaded")
    except HFValidationError:
        wrong.append(f"model {settings.model} is no folder here and no name on the hub: set MEDCOT_MODEL to either")
    except Exception as error:  # httpx, requests, the hub and offline mode all raise their own
        cure = "switch the internet on in the session's settings" if on_kaggle() else "check the network"
        wrong.append(
            f"model {settings.model} is not here and the hub cannot be asked ({type(error).__name__}): {cure}, or set MEDCOT_MODEL to a folder"
        )


def preflight(settings):
    """Checks the machine, audits the rows, times the first real steps and predicts the whole run; keeps nothing.

    Prints as it goes and returns the `training.Forecast`. The training run makes the same forecast from its own first
    steps, and the run card sets it beside what happened. Raises MedcotError if the machine cannot run the settings or the
    run does not fit what is left of `session_minutes`. Where several processes will train, one is timed: the others, and
    what it costs to keep them in step, are not tried.
    """
    check_machine(settings)
    if 0 < settings.max_steps < FORECAST_STEPS:
        raise MedcotError(
            f"max_steps={settings.max_steps}: a forecast takes {FORECAST_STEPS} steps, raise it or just train"
        )
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(settings, output_dir=Path(folder), earlier_output=None, report_to="none", nproc_per_node=1)
        trainer = run_training(trial, stop_after=FORECAST_STEPS)
    found = [Forecast(**entry["forecast"]) for entry in trainer.state.log_history if "forecast" in entry]
    if not found:
        raise MedcotError(
            f"one pass takes {trainer.args.max_steps} steps and a forecast {FORECAST_STEPS}: give more rows, or just train"
            if trainer.args.max_steps < FORECAST_STEPS
            else f"the session's minutes ended before {FORECAST_STEPS} steps: raise session_minutes={settings.session_minutes:g}"
        )
    found = found[0]
    if settings.nproc_per_node > 1:
        print(f"timed with one process; the run will use {settings.nproc_per_node}, which was not tried here")
        if not settings.max_steps:  # a pass of one process has as many more steps, of its own share each
            steps = total_steps(len(trainer.train_dataset), settings)
            found = replace(found, steps=steps, minutes=found.minutes * steps / found.steps)
            print(found)
    # One pass over all rows may be meant for several sessions, and the forecast has said how many; so many steps are not.
    if settings.max_steps and found.minutes_left is not None and found.minutes > found.minutes_left:
        raise MedcotError(
            f"{found.minutes:.0f} minutes do not fit the {found.minutes_left:.0f} that the session has left: "
            f"lower max_steps={settings.max_steps}, or train in several sessions"
        )
    return found
