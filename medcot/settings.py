"""Every number of a run: the settings, the profiles, and where files go."""

import codecs
import collections
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny" / "model")
EMBEDDED_CASES = "embedded cases"
HELD_OUT_SEED = 2026  # draws the embedded evaluation cases: the same ones whatever seed a run trains with
ADAPTER_FOLDER = "DeepSeek-R1-Medical-COT"
PAUSES = (2, 8)  # seconds before the second and third attempt to reach the hub
NOTICE = "Research software, not for clinical use: answers may be wrong and must not guide the care of a patient."


class MedcotError(ValueError):
    """Something its user can mend; the message names the value and the cure."""


@dataclass(frozen=True)
class Settings:
    """One run. Frozen: a variant is `dataclasses.replace(settings, max_steps=20)`, which checks it again."""

    profile: str
    """Name of the profile these numbers started from."""

    # model
    model: str = "unsloth/DeepSeek-R1-Distill-Llama-8B"
    """Hub name or local folder of the base model; Unsloth maps this name to its 4-bit copy (6.0 GB)."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model; None takes the newest. Name the 4-bit copy itself to pin it."""
    load_in_4bit: bool = True
    """NF4 weights through bitsandbytes."""
    max_seq_length: int = 2048
    """Longest training example, prompt and completion, in tokens."""
    device: str = "cuda"
    """"cuda" (float16, as a T4 has no bfloat16) or "cpu" (float32)."""

    # data
    dataset: str = "FreedomIntelligence/medical-o1-reasoning-SFT"
    """Hub name, a local file or folder (json, jsonl, csv, parquet), or the embedded cases."""
    dataset_config: str | None = "en"
    """Configuration of a hub data set; not used for files."""
    dataset_revision: str | None = None
    """Commit, tag or branch of a hub data set; None takes the newest and records which it was."""
    train_rows: int = 500
    """Training rows: the first ones of the data set."""
    eval_rows: int = 100
    """Evaluation rows: the ones right after the training rows."""
    answer_rows: int = 18
    """How many of the evaluation rows are answered by generation, to be read."""

    # multiple choice
    choice_dataset: str = "GBaker/MedQA-USMLE-4-options"
    """Multiple-choice questions: a hub name (its test split), a local jsonl file, or the embedded cases."""
    choice_dataset_revision: str | None = None
    """Commit, tag or branch of that hub data set; None takes the newest and records which it was."""
    choice_rows: int = 1273
    """Questions answered by likelihood, the first ones: 1,273 is the whole MedQA test set."""
    choice_answer_rows: int = 31
    """How many of them are answered by generation too: 18 + 31 + the showcase question = 50 answers a side."""
    chat_rows: int = 200
    """How many of them the base model also answers by likelihood through its own chat template; 0: nothing through it."""
    score_batch_tokens: int = 8192
    """Tokens in one forward pass of scoring, padding included; 8,192 take under 3 GiB beside the 8B."""

    # LoRA
    r: int = 16
    """Rank of the update."""
    lora_alpha: int = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the update's inputs dropped in training, 0 to 1; Unsloth's fast path wants 0."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections that get an update."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, but 8 B parameters fit a T4 only so."""
    activation_memory_gib: float = 0.0
    """GiB of activations that may be kept instead; as many layers as fit it at the longest batch are not recomputed."""
    padding_free: bool = False
    """Lay the examples of a batch end to end instead of padding them to the longest (GPU only; attention stays apart)."""

    # training
    per_device_train_batch_size: int = 2
    """Examples per forward pass."""
    gradient_accumulation_steps: int = 4
    """Forward passes per step: 2 x 4 = 8 examples a step."""
    nproc_per_node: int = 1
    """Processes, one a GPU, that torchrun starts for training and evaluation; examples and batches are divided among them."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    max_steps: int = 60
    """Optimizer steps: 60 x 8 = 480 examples, just under one pass over 500 rows."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0."""
    lr_scheduler_type: str = "linear"
    """Decay after the warm-up."""
    optim: str = "adamw_8bit"
    """Optimizer; on a CPU Unsloth replaces the 8-bit one by fused AdamW."""
    weight_decay: float = 0.01
    """AdamW's decay per step, times the learning rate."""
    completion_only_loss: bool = False
    """False supervises the whole text, as the original run did; True only what follows the prompt."""
    logging_steps: int = 1
    """Steps between two points of the loss curve."""
    eval_steps: int = 20
    """Steps between two measurements of the held-out loss."""
    eval_loss_rows: int = 16
    """Evaluation rows whose loss is measured in training."""
    save_steps: int = 10
    """Steps between two checkpoints, of which the last two are kept; a step of the 8B takes 10 to 20 s on a T4."""
    session_minutes: float = 0.0
    """Minutes after the session's start at which training stops with a checkpoint; 0 sets no limit. Kaggle: 700 of 720."""
    seed: int = 3407
    """Seed of the adapters, of the row order and of sampling."""

    # generation
    max_new_tokens: int = 1024
    """Longest answer in tokens."""
    generation_batch_size: int = 16
    """Questions answered at once, at most. For up to 16 a T4 multiplies by the 4-bit weights as they are; for more, each
    token unpacks all of them into 14 GB first (unsloth's fast_linear_forward on sm_75)."""
    generation_memory_gib: float = 6.5
    """GiB on a GPU for what a batch of questions needs beside the weights; batches of long questions are made smaller."""
    temperature: float = 0.0
    """0 decodes greedily, so that only the weights differ between before and after."""

    # tracking and files
    report_to: str = "wandb"
    """"wandb" (online with a key and a network, else offline files) or "none"."""
    wandb_project: str = "medcot"
    """Project name in Weights & Biases."""
    output_dir: Path = Path("outputs")
    """Everything a run writes is below this folder."""
    earlier_output: Path | None = None
    """Folder that holds the output of an earlier session, whose checkpoints are continued; on Kaggle what is attached."""

    def __post_init__(self):
        wrong = [
            f"{field.name}={getattr(self, field.name)!r}: must be {_KINDS[field.type]}"
            for field in fields(self)
            if field.type in _KINDS and not _is(getattr(self, field.name), field.type)
        ]
        if wrong:  # the comparisons below take the kinds for granted
            raise MedcotError("these settings cannot run: " + "; ".join(wrong))
        wrong = [
            f"{name}={getattr(self, name)!r}: must be a whole number of at least {least}"
            for name, least in _LEAST.items()
            if getattr(self, name) < least
        ]
        wrong += [f"{name} is empty: name one" for name in ("model", "dataset") if not getattr(self, name).strip()]
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                wrong.append(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 < self.learning_rate < float("inf"):
            wrong.append(f"learning_rate={self.learning_rate}: must be above 0, 2e-4 is usual for LoRA")
        if not 0 <= self.lora_dropout < 1:
            wrong.append(f"lora_dropout={self.lora_dropout}: must be in [0, 1)")
        if not 0 <= self.weight_decay < float("inf"):
            wrong.append(f"weight_decay={self.weight_decay}: must be 0 or more, 0.01 is usual")
        if not 0 <= self.activation_memory_gib < float("inf"):
            wrong.append(f"activation_memory_gib={self.activation_memory_gib}: 0 recomputes every layer, 8 suits a T4")
        if not 0 <= self.session_minutes < float("inf"):
            wrong.append(f"session_minutes={self.session_minutes}: 0 sets no limit, 700 suits Kaggle's 12 hours")
        if not self.generation_memory_gib > 0:
            wrong.append(f"generation_memory_gib={self.generation_memory_gib}: must be above 0, 6.5 suits a T4")
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature}: 0 decodes greedily, above 0 samples")
        if not self.target_modules or isinstance(self.target_modules, str):
            wrong.append(f"target_modules={self.target_modules!r}: name at least one projection, as a tuple")
        if not wrong and self.warmup_steps >= self.max_steps:
            wrong.append(
                f"warmup_steps={self.warmup_steps} leaves nothing of max_steps={self.max_steps}: lower warmup_steps"
            )
        wrong += [
            f"{name}={getattr(self, name)} exceeds eval_rows={self.eval_rows}: lower {name} or raise eval_rows"
            for name in ("answer_rows", "eval_loss_rows")
            if not wrong and getattr(self, name) > self.eval_rows
        ]
        if not wrong and self.device == "cpu" and self.max_seq_length * self.per_device_train_batch_size > 2**18:
            wrong.append(
                f"max_seq_length={self.max_seq_length} x per_device_train_batch_size={self.per_device_train_batch_size} "
                "tokens do not fit a CPU run: lower one of them"
            )
        if wrong:
            raise MedcotError("these settings cannot run: " + "; ".join(wrong))
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        if self.earlier_output is not None:
            object.__setattr__(self, "earlier_output", Path(self.earlier_output))

    @property
    def examples_per_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.nproc_per_node

    @property
    def adapter_dir(self) -> Path:
        """The folder that 02_finetune writes and 03_compare reads."""
        return self.output_dir / ADAPTER_FOLDER


_KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", str | None: "text or nothing",
    Path: "a path", Path | None: "a path or nothing",
}  # fmt: skip
_LEAST = {
    "max_seq_length": 128, "train_rows": 1, "eval_rows": 1, "answer_rows": 1, "r": 1, "lora_alpha": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "nproc_per_node": 1, "max_steps": 1, "warmup_steps": 0,
    "logging_steps": 1, "eval_steps": 1, "eval_loss_rows": 1, "save_steps": 1, "seed": 0, "max_new_tokens": 1, "generation_batch_size": 1,
    "choice_rows": 1, "choice_answer_rows": 0, "chat_rows": 0, "score_batch_tokens": 1,
}  # fmt: skip
_CHOICES = {
    "device": ("cuda", "cpu"),
    "report_to": ("wandb", "none"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
}


def _is(value, kind) -> bool:
    """Whether a setting has the kind of its field; a whole number is a number, true is none, text names a path."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: int | float, Path: str | Path, Path | None: str | Path | None}.get(kind, kind))


_KAGGLE_T4 = Settings(profile="kaggle-t4")
# The same rows, the same eight examples a step and the same losses, arranged for speed (docs: README, Speed).
_KAGGLE_T4_FAST = replace(
    _KAGGLE_T4, profile="kaggle-t4-fast", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    padding_free=True, activation_memory_gib=8.0,
)  # fmt: skip
# The embedded model has 1 million parameters, not 8,072 million, and starts without the form of the reasoning: it needs
# more, larger steps (250 x 16 cases, each seen once, at 3e-3) where the 8B only changes its manner. Only completions are
# supervised, because the random findings in its questions have nothing to teach. The rest is the T4 recipe.
_TINY = Settings(
    profile="tiny", model=EMBEDDED_MODEL, dataset=EMBEDDED_CASES, device="cpu",
    train_rows=4000, eval_rows=240, answer_rows=240, per_device_train_batch_size=16, gradient_accumulation_steps=1,
    gradient_checkpointing=False, completion_only_loss=True, learning_rate=3e-3, max_steps=250, warmup_steps=20,
    logging_steps=5, eval_steps=50, eval_loss_rows=64, save_steps=50, max_new_tokens=160, generation_batch_size=80,
    # Its evaluation rows carry options themselves, so no other questions need be answered by generation.
    choice_dataset=EMBEDDED_CASES, choice_rows=240, choice_answer_rows=0, chat_rows=240,
)  # fmt: skip
PROFILES = {
    "kaggle-t4": _KAGGLE_T4,
    "kaggle-t4-fast": _KAGGLE_T4_FAST,
    # Kaggle's T4 session has two cards; 4 x 1 x 2 cards = the same eight examples a step.
    "kaggle-t4x2": replace(_KAGGLE_T4_FAST, profile="kaggle-t4x2", gradient_accumulation_steps=1, nproc_per_node=2),
    "tiny": _TINY,
    "smoke": replace(
        _TINY, profile="smoke", train_rows=64, eval_rows=12, answer_rows=6, per_device_train_batch_size=4,
        max_steps=6, warmup_steps=1, logging_steps=1, eval_steps=3, eval_loss_rows=4, save_steps=3, max_new_tokens=96,
        choice_rows=12, chat_rows=6,
    ),
}  # fmt: skip


def load_settings() -> Settings:
    """The settings of this session, from its environment, with one printed line that says what was chosen and why.

    `MEDCOT_PROFILE` names a profile; without it a CUDA GPU means `kaggle-t4` and no GPU means `tiny`. `MEDCOT_MODEL`,
    `MEDCOT_DATASET`, `MEDCOT_CHOICES`, `MEDCOT_OUT` and `MEDCOT_EARLIER` replace the model, the data, the multiple-choice
    questions, the output folder and the folder of an earlier session's output. Raises MedcotError for an
    unknown profile and for a profile that needs a GPU where there is none.
    """
    prepare_environment()
    import torch  # here, because the rooms that only read settings start without it

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    profile = os.environ.get("MEDCOT_PROFILE")
    why = "set by MEDCOT_PROFILE" if profile else f"found {gpu}" if gpu else "no CUDA GPU here"
    profile = profile or ("kaggle-t4" if gpu else "tiny")
    if profile not in PROFILES:
        raise MedcotError(f"MEDCOT_PROFILE={profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    if settings.device == "cuda" and not gpu:
        raise MedcotError(
            f"profile {profile!r} needs a CUDA GPU and this machine has none: "
            "choose MEDCOT_PROFILE=tiny, or a Kaggle session with the accelerator GPU T4 x2"
        )
    # Unsloth uses a GPU wherever it finds one, so a profile made for a CPU then runs there too.
    changes = {
        "device": "cuda" if gpu else "cpu",
        "output_dir": Path(os.environ.get("MEDCOT_OUT") or _default_output(profile)).absolute(),
    }
    if on_kaggle():  # a session ends after 12 hours; what is attached to it is below /kaggle/input
        changes |= {"session_minutes": 700.0, "earlier_output": kaggle_root() / "input"}
    overrides = {
        "MEDCOT_MODEL": "model", "MEDCOT_DATASET": "dataset", "MEDCOT_CHOICES": "choice_dataset",
        "MEDCOT_EARLIER": "earlier_output",
    }  # fmt: skip
    for variable, field in overrides.items():
        if os.environ.get(variable):
            changes[field] = os.environ[variable]
    settings = replace(settings, **changes)
    _check_output(settings.output_dir)
    print(
        f"profile {settings.profile} ({why}), model {settings.model}, data {settings.dataset}, "
        f"device {gpu if settings.device == 'cuda' else 'CPU'}, files in {settings.output_dir}"
    )
    return settings


def read_settings(file: Path) -> Settings:
    """The settings that were written to a file as JSON. Raises MedcotError for a file that is not such."""
    prepare_environment()
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        return Settings(**values | {"target_modules": tuple(values["target_modules"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, MedcotError):
            raise
        raise MedcotError(
            f"{file} holds no settings ({error}): leave --settings out to take them from the environment"
        ) from error


def kaggle_root() -> Path:
    """/kaggle, or what MEDCOT_KAGGLE_ROOT names in its place."""
    return Path(os.environ.get("MEDCOT_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    """True inside a Kaggle session, interactive or batch."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ and (kaggle_root() / "working").is_dir()


def _default_output(profile: str) -> Path:
    if on_kaggle():
        return kaggle_root() / "working"
    # A notebook runs in notebooks/, the command line anywhere: both should find one outputs folder.
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if (folder / "kaggle-metadata.json").is_file()), here)
    return root / "outputs" / profile


def prepare_environment():
    """Switches the libraries' telemetry off, and growing memory segments on, where the environment says nothing of them.

    Read when torch and the others are imported or first used, so it is done with the settings, before any of them is.
    """
    # Not where the older variable says something, nor on Windows' own Linux, where torch fails with them.
    usual = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if usual and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Unsloth asks for this too, but too late once a GPU was looked at. 14.4 GiB reserved without it, 11.8 with it, for
        # 11.7 in use (kaggle-t4-fast, tests/benchmarks).
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for variable in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")


def _check_output(folder: Path):
    """Raises MedcotError if files cannot be written below a folder; makes nothing."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise MedcotError(f"MEDCOT_OUT={str(folder)[:200]!r}: {error.strerror}, name another folder") from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise MedcotError(f"{there} is no folder that can be written to: set MEDCOT_OUT to one")


def check_disk(folder: Path, needed: int):
    """Raises MedcotError if fewer than `needed` bytes are free where `folder` is or will be."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise MedcotError(
            f"{there} has {free / 2**20:.0f} MiB free and the next save needs {needed / 2**20:.0f}, so it was not begun: "
            "delete what is not needed there or set MEDCOT_OUT to another disk, then run this cell again"
        )


@contextlib.contextmanager
def only_process(folder: Path):
    """Holds a lock on a folder that is written to; it ends with the process, however that ends.

    Raises MedcotError at once if another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise MedcotError(
            f"another process is writing to {folder}: wait until it is done, or set MEDCOT_OUT to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def on_all_gpus(settings, command: str, read=lambda line: line):
    """Runs `medcot COMMAND` in `nproc_per_node` processes, one a GPU, started by torchrun, and shows what they print.

    `read` gets each line and returns what of it is shown. Raises MedcotError, with the last lines, if a process fails.
    """
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    file = settings.output_dir / "settings.json"
    file.write_text(json.dumps(asdict(settings), default=str, indent=1), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings.nproc_per_node}",
              "-m", "medcot.cli", command, "--settings", str(file)]  # fmt: skip
    status, last = run_shown(launch, read)
    if status:
        # What a process itself says of its end stands far above torchrun's report of it.
        cause = re.search(f"medcot {command}: .*", last)
        raise MedcotError(
            f"medcot {command} on {settings.nproc_per_node} GPUs failed with status {status}"
            + (f": {cause[0].strip()}" if cause else f"; the last lines:\n{last}")
        )


def run_shown(command: list[str], read=lambda line: line) -> tuple[int, str]:
    """Runs a command, showing what `read` leaves of each line while it is printed: (exit status, the last lines).

    An interrupt goes to the command, which ends in its own way (training with a checkpoint), a second one kills it and
    all that it started; KeyboardInterrupt is raised when it has ended.
    """
    last = collections.deque(maxlen=100)
    # torchrun kills 30 s after an interrupt; the step at hand and a checkpoint may take longer. torch 2.13 reads this.
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ
    # In a session of its own, so that an interrupt reaches its processes once: from here.
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        ) as process,
        _passing_interrupts_on(process),
    ):
        for line in _lines(process.stdout):
            last.append(read(line))
            print(last[-1], end="", flush=True)
        process.wait()
    return process.returncode, "".join(last)


@contextlib.contextmanager
def on_interrupt(handler):
    """Has an interrupt (Ctrl-C, a notebook's stop button) call `handler(number, frame)` instead of raising.

    Outside the main thread, to which Python restricts signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _passing_interrupts_on(process):
    # By a handler: an exception that is raised in the midst of drawing a chart can be lost in a library's callback.
    import psutil

    started = None

    def interrupt(number, frame):
        nonlocal started
        if started is None:
            started = _children(process)
            process.send_signal(signal.SIGINT)
            return
        for child in {*started, *_children(process)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()

    with on_interrupt(interrupt):
        yield
    if started is not None:
        raise KeyboardInterrupt


def _children(process) -> list:
    """The processes that a process has started, and they in turn; those of one that has ended are not known."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _lines(stream):
    """The lines of a byte stream as soon as they are there, each with its line end or carriage return.

    A progress bar comes before its carriage return: that is written with the next state of the bar, a minute later.
    """
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := stream.read1(65536):
        *lines, rest = re.split(r"(?<=[\r\n])", rest + decoder.decode(chunk))
        yield from lines
        if rest.endswith("]"):
            yield rest
            rest = ""
    if rest:
        yield rest


def patiently(call, what: str):
    """`call()`, tried again after each of `PAUSES` when the hub times out, drops the connection or answers 5xx.

    One printed line each time. Half downloads stay in the hub's cache, so that the next attempt fetches what is missing.
    """
    for attempt, pause in enumerate(PAUSES, 2):
        try:
            return call()
        except Exception as error:  # libraries wrap what the network raised, each in its own way
            if (reason := _transient(error)) is None:
                raise
            print(f"{what}: {reason} from the hub, attempt {attempt} of {len(PAUSES) + 1} in {pause} s")
        time.sleep(pause)
    return call()


def _transient(error) -> str | None:
    """The name of the time-out, broken connection or server error behind an error; None if there is none."""
    import httpx

    for _ in range(10):  # as deep as the libraries wrap
        if error is None or isinstance(error, httpx.ConnectError):  # nobody there: waiting does not help
            return None
        if isinstance(error, httpx.TransportError | TimeoutError):
            return type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status >= 500:
            return f"status {status}"
        error = error.__cause__ or error.__context__
    return None


def hub_revision(kind: str, name: str, revision: str | None) -> str | None:
    """The commit that a hub name stands for now ("dataset" or "model"), said in a printed line.

    None, and another line, if the hub does not answer, so that a cache may serve. Raises MedcotError for
    a name or a revision that the hub does not have.
    """
    from huggingface_hub import HfApi

    def ask():
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=20).sha

    try:
        commit = patiently(ask, name)
    except Exception as error:  # httpx, huggingface_hub and offline mode all raise their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise MedcotError(
                f"the hub has no {kind} {name!r} at revision {revision!r} (status {status}): check the name, or log in "
                "if it is gated"
            ) from error
        print(
            f"the hub did not answer ({_transient(error) or type(error).__name__}): {name} comes from the local cache"
        )
        return None
    print(f"{kind} {name}: the hub answers, {revision or 'newest'} is commit {commit}")
    return commit
