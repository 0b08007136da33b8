"""On Kaggle with one command and home again: stage, push, status, pull; and what a staged notebook does in its first cell."""

import base64
import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from .data import COLUMNS, FILE_TYPES
from .inference import BASELINE
from .modeling import ADAPTER_FILES
from .settings import ADAPTER_FOLDER, PROFILES, MedcotError, kaggle_root
from .training import RECORD_FILE

METADATA_FILE = "kaggle-metadata.json"
# The one accelerator that the notebooks run on: two T4s, billed as one session. Kaggle's list also has a P100, which
# Triton refuses, and TPUs.
ACCELERATORS = ("NvidiaTeslaT4",)
SESSIONS = 2  # batch GPU sessions that Kaggle runs at once for one account
SOURCE_LIMIT = 1_000_000  # bytes of a notebook's source: Kaggle's editor is known to stop at about 1 MB

# Installed at exactly the version of requirements.lock, because they were tested together: unsloth patches the others,
# and peft refuses the torchao that some images carry. torch stays the image's own, built for its CUDA.
EXACT = (
    "accelerate", "bitsandbytes", "datasets", "hf-xet", "huggingface-hub", "peft", "safetensors", "tokenizers",
    "torchao", "transformers", "trl", "unsloth", "unsloth-zoo",
)  # fmt: skip
# What those and medcot import beside them. An image has most of it; where it does, its version stays. All of it goes
# in with --no-deps: unsloth declares a certifi that some indexes lack, and torch would come along.
IF_ABSENT = (
    "cut-cross-entropy", "docstring-parser", "einops", "formulaic", "hf-transfer", "interface-meta", "ipywidgets",
    "json5", "msgspec", "narwhals", "nest-asyncio", "patsy", "rapidfuzz", "sentencepiece", "statsmodels", "structlog", "typeguard",
    "typer", "tyro", "wandb",
)  # fmt: skip
# The image's Python, for the markers in requirements.lock.
_IMAGE = {
    "python_version": "3.12", "python_full_version": "3.12.12", "implementation_name": "cpython", "os_name": "posix",
    "platform_machine": "x86_64", "platform_system": "Linux", "sys_platform": "linux", "extra": "",
}  # fmt: skip

# What a notebook can take from an earlier one, told by what files hold (`find_inputs`).
TAKEN = {
    "answers": "the answers of 01_baseline",
    "adapter": f"the {ADAPTER_FOLDER} folder of 02_finetune",
    "training": f"the {RECORD_FILE} of 02_finetune",
}

READ_SECONDS, PUSH_SECONDS = 60, 180  # how long one call may take before it counts as lost
PAUSES = (3, 15)  # seconds before the second and third attempt


# --- what runs on Kaggle: kaggle-metadata.json -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One notebook as kaggle-metadata.json describes it, and once staged its folder and fingerprint."""

    owner: str
    slug: str
    title: str
    notebook: Path
    machine_shape: str
    is_private: bool = True
    enable_internet: bool = True
    hours: float = 1.0
    """Session time it is expected to take, counted against the weekly quota whatever the number of cards."""
    settings: dict = field(default_factory=dict)
    """MEDCOT_ variables of its session."""
    takes: dict = field(default_factory=dict)
    """Slug of an earlier kernel -> what is taken from its output."""
    dataset_sources: tuple = ()
    kernel_sources: tuple = ()
    model_sources: tuple = ()
    folder: Path | None = None
    fingerprint: str = ""
    """SHA-256 over everything staged, and over what it takes, so that a change upstream makes it new as well."""

    @property
    def ref(self) -> str:
        """`owner/slug`."""
        return f"{self.owner}/{self.slug}"

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://www.kaggle.com/code/{self.ref}"


_DEFAULTS = {
    "machine_shape": str, "is_private": bool, "enable_internet": bool, "hours": (int, float), "settings": dict,
    "dataset_sources": list, "kernel_sources": list, "model_sources": list,
}  # fmt: skip
_KERNEL = {"slug": str, "title": str, "notebook": str, "takes": dict} | _DEFAULTS
_TOP = {"owner": str, "defaults": dict, "kernels": list}
_SETTINGS = ("MEDCOT_PROFILE", "MEDCOT_MODEL", "MEDCOT_DATASET", "MEDCOT_CHOICES")


def read_metadata(root: Path, owner: str | None = None) -> list[Kernel]:
    """The kernels of kaggle-metadata.json in order; the owner is `owner`, else the file's, else that of the credentials.

    Raises MedcotError with every complaint at once: whatever the kaggle client or Kaggle itself would refuse, silently
    drop or take for something else.
    """
    path = Path(root) / METADATA_FILE
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MedcotError(f"{path} not found: run this from a clone of the project") from error
    except (ValueError, RecursionError) as error:
        raise MedcotError(f"{path} is not JSON ({error}): mend it, or take it from the repository again") from error
    wrong = _misfits(metadata, _TOP, "top level")
    defaults = metadata.get("defaults", {}) if not wrong else {}
    wrong += _misfits(defaults, _DEFAULTS, "defaults")
    entries = metadata.get("kernels") if not wrong else []
    for i, entry in enumerate(entries):
        wrong += _misfits(entry, _KERNEL, f"kernel {i + 1}", required=("slug", "title", "notebook"))
    if not wrong and not entries:
        wrong.append("kernels is empty: list at least one")
    if wrong:  # the checks below would stumble over wrong types
        raise _complain(path, wrong)
    owner = owner or metadata.get("owner") or _user_name()
    if not owner:
        wrong.append("owner is missing: give --owner with your Kaggle user name, or log in with `kaggle auth login`")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", owner):
        wrong.append(f"owner {owner!r} is no Kaggle user name: take the one in the address of your profile")
    kernels = []
    for entry in entries:
        values = {"machine_shape": ACCELERATORS[0]} | defaults | entry
        values["settings"] = defaults.get("settings", {}) | entry.get("settings", {})
        for name in ("dataset_sources", "kernel_sources", "model_sources"):
            values[name] = tuple(values.get(name, ()))
        kernel = Kernel(owner=owner or "", **values | {"notebook": Path(root) / entry["notebook"]})
        wrong += [f"{kernel.slug}: {what}" for what in _kernel_complaints(kernel, entry["notebook"], Path(root))]
        kernels.append(kernel)
    wrong += _order_complaints(kernels)
    if wrong:
        raise _complain(path, wrong)
    return kernels


def _complain(path, wrong) -> MedcotError:
    return MedcotError(f"{path} cannot be staged:\n  - " + "\n  - ".join(wrong))


def _misfits(values, types, where, required=()) -> list[str]:
    """Unknown keys, missing keys and values of a wrong type."""
    if not isinstance(values, dict):
        return [f"{where} is {values!r}: must be an object"]
    wrong = [f"{where}: unknown key {key!r}, known are {', '.join(types)}" for key in values if key not in types]
    wrong += [f"{where}: {key} is missing" for key in required if key not in values]
    for key, kind in types.items():
        value = values.get(key)
        # bool is a subclass of int, and true hours mean nothing
        if key in values and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
            name = "number" if isinstance(kind, tuple) else kind.__name__
            wrong.append(f"{where}: {key} is {value!r}, must be a {name}")
    return wrong


def _kernel_complaints(kernel: Kernel, notebook: str, root: Path) -> list[str]:
    try:
        from slugify import slugify  # the client's own rule for titles
    except ImportError as error:
        raise MedcotError(_NO_PACKAGE.format(error)) from error
    wrong = []
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", kernel.slug):
        wrong.append("a slug is lower-case letters, digits and single dashes")
    if len(kernel.slug) < 5:
        wrong.append("the slug has fewer than 5 characters")
    if len(kernel.title) < 5:
        wrong.append(f"the title {kernel.title!r} has fewer than 5 characters")
    if slugify(kernel.title) != kernel.slug:
        wrong.append(
            f"the title {kernel.title!r} makes the slug {slugify(kernel.title)!r}: Kaggle takes that one instead"
        )
    if kernel.machine_shape not in ACCELERATORS:
        wrong.append(f"machine_shape {kernel.machine_shape!r} is unknown or of no use: take {', '.join(ACCELERATORS)}")
    if not 0 < kernel.hours <= 12:
        wrong.append(f"hours is {kernel.hours}: a session lasts at most 12")
    path = PurePosixPath(notebook)
    if path.is_absolute() or ".." in path.parts or "\\" in notebook or path.suffix != ".ipynb":
        wrong.append(f"notebook {notebook!r}: name an .ipynb file inside the project, as notebooks/01_baseline.ipynb")
    elif not kernel.notebook.is_file():
        wrong.append(f"notebook {kernel.notebook} not found")
    elif not kernel.notebook.resolve().is_relative_to(root.resolve()):
        wrong.append(f"notebook {notebook!r} is a link out of the project")
    else:
        wrong += _notebook_complaints(kernel.notebook)
    for name, value in kernel.settings.items():
        if name not in _SETTINGS:
            wrong.append(f"settings: {name} is not one of {', '.join(_SETTINGS)}; secrets go into Kaggle's own secrets")
        elif not isinstance(value, str):
            wrong.append(f"settings: {name} is {value!r}, must be text")
    profile = kernel.settings.get("MEDCOT_PROFILE")
    if isinstance(profile, str) and profile not in PROFILES:
        wrong.append(f"settings: MEDCOT_PROFILE {profile!r} is unknown: choose one of {', '.join(PROFILES)}")
    return wrong + _source_complaints(kernel)


def _notebook_complaints(path: Path) -> list[str]:
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"notebook {path} is not JSON ({error})"]
    cells = notebook.get("cells") if isinstance(notebook, dict) and notebook.get("nbformat") == 4 else None
    if not isinstance(cells, list) or not cells or not all(isinstance(c, dict) and "cell_type" in c for c in cells):
        return [f"notebook {path} has no cells of notebook format 4"]
    return []


def _source_complaints(kernel: Kernel) -> list[str]:
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    forms = {
        "dataset_sources": (rf"{part}/{part}(/\d+)?", "owner/slug or owner/slug/version"),
        "kernel_sources": (rf"{part}/[A-Za-z0-9-]{{5,}}(/\d+)?", "owner/slug, the slug of at least 5 characters"),
        "model_sources": (
            rf"{part}/{part}/{part}/{part}/\d+",
            "owner/model/framework/variation/version: all five parts, the client refuses four",
        ),
    }
    wrong = []
    for name, (form, words) in forms.items():
        for source in getattr(kernel, name):
            if not isinstance(source, str) or not re.fullmatch(form, source):
                wrong.append(f"{name}: {source!r} is not of the form {words}")
    attached = kernel.dataset_sources + kernel.kernel_sources + kernel.model_sources
    if not kernel.enable_internet and not attached:
        wrong.append("enable_internet is false and nothing is attached: packages and model have to come from somewhere")
    profile = PROFILES.get(str(kernel.settings.get("MEDCOT_PROFILE")))
    if profile and Path(profile.model).is_absolute() and not attached and "MEDCOT_MODEL" not in kernel.settings:
        wrong.append(
            f"profile {profile.profile!r} needs the embedded model, too large for a notebook: attach its folder"
        )
    return wrong


def _order_complaints(kernels: list[Kernel]) -> list[str]:
    """Kernels that would be one and the same for Kaggle or on disk, and inputs that no earlier kernel makes."""
    wrong = []
    for what, values in (
        ("slug", [kernel.slug for kernel in kernels]),
        ("notebook name", [kernel.notebook.stem for kernel in kernels]),
    ):
        wrong += [f"the {what} {value!r} is used twice" for value in sorted({v for v in values if values.count(v) > 1})]
    slugs = [kernel.slug for kernel in kernels]
    for i, kernel in enumerate(kernels):
        for slug, inputs in kernel.takes.items():
            if slug not in slugs:
                wrong.append(f"{kernel.slug} takes from {slug!r}, which is no kernel here")
            elif kernel.slug in {slug, *_upstream(slug, kernels)}:
                wrong.append(f"{kernel.slug} and {slug} wait for each other: a cycle")
            elif slug not in slugs[:i]:
                wrong.append(f"{kernel.slug} takes from {slug!r}, which comes after it: change the order")
            if not isinstance(inputs, list) or not inputs or any(item not in list(TAKEN) for item in inputs):
                wrong.append(f"{kernel.slug} takes {inputs!r} from {slug}: list some of {', '.join(TAKEN)}")
    return wrong


def _upstream(slug, kernels) -> set[str]:
    """Slugs of everything that `slug` takes from, directly or not."""
    takes, seen, todo = {kernel.slug: kernel.takes for kernel in kernels}, set(), [slug]
    while todo:
        for earlier in takes.get(todo.pop(), ()):
            if earlier not in seen:
                seen.add(earlier)
                todo.append(earlier)
    return seen


# --- stage -----------------------------------------------------------------------------------------------------------


def stage(root: Path | None = None, owner: str | None = None) -> list[Kernel]:
    """Expands kaggle-metadata.json into build/kaggle/<notebook>/, one folder a kernel, and returns the kernels.

    Each folder holds kernel-metadata.json and the notebook as it will run. Nothing is uploaded. Raises MedcotError with
    every complaint at once.
    """
    root = _project() if root is None else Path(root)
    kernels = read_metadata(root, owner)
    wheel, pins = _build_wheel(root), _pins(root / "requirements.lock")
    staged, texts, wrong = [], [], []
    for kernel in kernels:
        upstream = [done.fingerprint for done in staged if done.slug in kernel.takes]
        text, fingerprint = _staged_notebook(kernel, wheel, pins, upstream)
        if len(text.encode()) > SOURCE_LIMIT:
            wrong.append(
                f"{kernel.slug}: {len(text.encode()):,} bytes with medcot embedded, Kaggle takes {SOURCE_LIMIT:,}"
            )
        staged.append(replace(kernel, folder=root / "build" / "kaggle" / kernel.notebook.stem, fingerprint=fingerprint))
        texts.append(text)
    if wrong:
        raise _complain(root / METADATA_FILE, wrong)
    for kernel, text in zip(staged, texts, strict=True):
        _write_folder(kernel, text)
    for kernel in staged:
        print(f"staged {kernel.folder} for {kernel.url}")
    return staged


def _project() -> Path:
    root = Path(__file__).parent.parent
    if not (root / METADATA_FILE).is_file():
        raise MedcotError(f"{root / METADATA_FILE} not found: run this from a clone of the project")
    return root


def _build_wheel(root: Path) -> Path:
    """medcot's wheel from the working tree, without the embedded model: the same bytes for the same sources.

    Embedded in each staged notebook rather than put into a private data set, so that one push carries code and notebook
    of one state, and nothing has to be uploaded, versioned and attached beside it. The model stays out because Kaggle
    takes about 1 MB of notebook source and it has four; the profile of a T4 does not use it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Built from a copy: setuptools would leave a build folder in the tree, whose stale files enter later wheels.
        source = Path(scratch, "source")
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (root / name).is_file():
                shutil.copyfile(root / name, source / name)
        shutil.copytree(root / "medcot", source / "medcot", ignore=shutil.ignore_patterns("model", "__pycache__"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--disable-pip-version-check", "--wheel-dir", scratch, str(source)]
        # 1980-01-01, the first day a zip archive knows: time of building must not change the fingerprint.
        environment = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        built = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or len(built) != 1:
            raise MedcotError(
                f"the wheel of medcot could not be built (is setuptools installed?): {done.stderr[-1500:]}"
            )
        kept = root / "build" / "kaggle" / built[0].name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built[0], kept)
    return kept


def _pins(lock: Path) -> dict[str, dict[str, str]]:
    """`exact` and `if_absent`: name -> version, as requirements.lock has them for the image's Python."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    if not lock.is_file():
        raise MedcotError(f"{lock} not found: run this from a clone of the project")
    lines = (line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    versions = {}
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker is None or requirement.marker.evaluate(_IMAGE):
            versions[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    missing = [name for name in EXACT + IF_ABSENT if name not in versions]
    if missing:
        raise MedcotError(f"{lock} does not pin {', '.join(missing)}: run `make lock`")
    return {
        "exact": {name: versions[name] for name in EXACT},
        "if_absent": {name: versions[name] for name in IF_ABSENT},
    }


def _staged_notebook(kernel: Kernel, wheel: Path, pins: dict, upstream: list[str]) -> tuple[str, str]:
    """The notebook as it will run, its set-up cell in front, and the fingerprint that stands in that cell."""
    notebook = json.loads(kernel.notebook.read_text(encoding="utf-8"))
    takes = [item for inputs in kernel.takes.values() for item in inputs]
    cell = (
        f"{inspect.getsource(install_on_kaggle)}\n\n"
        f"install_on_kaggle(\n    wheel_name={wheel.name!r},\n    exact={pins['exact']!r},\n"
        f"    if_absent={pins['if_absent']!r},\n    internet={kernel.enable_internet},\n"
        f'    wheel="{base64.b64encode(wheel.read_bytes()).decode()}",\n)\n'
        "from medcot.kaggle import prepare_session\n\n"
        f"prepare_session(takes={takes!r}, settings={kernel.settings!r}, internet={kernel.enable_internet})"
    )
    for other in notebook["cells"]:
        if other["cell_type"] == "code":
            other |= {"outputs": [], "execution_count": None}
    # As in a notebook that Kaggle exports: an upload by hand then starts with the same accelerator and internet switch.
    notebook.setdefault("metadata", {})["kaggle"] = {
        "accelerator": kernel.machine_shape[0].lower() + kernel.machine_shape[1:], "isGpuEnabled": True,
        "isInternetEnabled": kernel.enable_internet, "language": "python", "sourceType": "notebook",
    }  # fmt: skip
    identity = json.dumps([notebook, cell, _kernel_metadata(kernel), upstream], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    setup = {
        "cell_type": "code", "execution_count": None, "id": "medcot-kaggle-setup", "outputs": [],
        "metadata": {"_kg_hide-input": True},
        "source": f"# Put here by `medcot kaggle stage`: what the image lacks, medcot itself, and this run's inputs.\n"
        f"# {_stamp(fingerprint)}\n{cell}",
    }  # fmt: skip
    notebook["cells"].insert(0, setup)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", fingerprint


def _stamp(fingerprint: str) -> str:
    """By this line in a kernel's source the server's copy is known to be ours."""
    return f"medcot-staged {fingerprint}"


def _kernel_metadata(kernel: Kernel) -> dict:
    return {
        "id": kernel.ref,
        "title": kernel.title,
        "code_file": kernel.notebook.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": kernel.is_private,
        "enable_gpu": True,
        "enable_internet": kernel.enable_internet,
        "machine_shape": kernel.machine_shape,
        "dataset_sources": list(kernel.dataset_sources),
        "competition_sources": [],
        "kernel_sources": [f"{kernel.owner}/{slug}" for slug in kernel.takes] + list(kernel.kernel_sources),
        "model_sources": list(kernel.model_sources),
    }


def _write_folder(kernel: Kernel, text: str):
    """Written beside and renamed, so that a folder is never half there."""
    fresh = kernel.folder.with_name(kernel.folder.name + ".saving")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / kernel.notebook.name).write_text(text, encoding="utf-8")
    (fresh / "kernel-metadata.json").write_text(json.dumps(_kernel_metadata(kernel), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(kernel.folder, ignore_errors=True)
    fresh.rename(kernel.folder)


# --- inside Kaggle: the first cell -----------------------------------------------------------------------------------


def install_on_kaggle(wheel_name, wheel, exact, if_absent, internet):
    """Installs what the image lacks, at the locked versions and without touching its torch, and then medcot itself.

    Wheels found anywhere among the inputs are used; without internet they are the only source. `stage` copies this
    function into the notebook, where there is no medcot yet: it stands on the standard library alone.
    """
    import base64
    import importlib
    import os
    import subprocess
    import sys
    import tempfile
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    root = Path(os.environ.get("MEDCOT_KAGGLE_ROOT", "/kaggle"))
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or not (root / "working").is_dir():
        raise RuntimeError("this copy of the notebook is for Kaggle: anywhere else open the one in notebooks/")

    def installed(name):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return None

    def pip_install(*arguments, cure):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--progress-bar=off"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", *arguments], capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            raise RuntimeError(f"{cure}\npip said: {(done.stderr or done.stdout)[-2000:]}")

    wanted = [f"{name}=={pin}" for name, pin in exact.items() if installed(name) != pin]
    wanted += [f"{name}=={pin}" for name, pin in if_absent.items() if installed(name) is None]
    if wanted:
        folders = sorted({str(file.parent) for file in (root / "input").rglob("*.whl")})
        links = [argument for folder in folders for argument in ("--find-links", folder)]
        cure = (
            f"{', '.join(wanted)} could not be installed: switch the session's internet on"
            f", or attach a data set that holds their wheels ({', '.join(folders) or 'none found among the inputs'})"
        )
        pip_install(*links, *([] if internet else ["--no-index"]), *wanted, cure=cure)
    own = Path(tempfile.mkdtemp(), wheel_name)
    own.write_bytes(base64.b64decode(wheel))
    # Forced, because an older state of the same version may be there from an earlier run of this cell.
    pip_install("--no-index", "--force-reinstall", str(own), cure="medcot could not be installed")
    importlib.invalidate_caches()
    print(f"installed {', '.join([*wanted, wheel_name])}; torch {installed('torch')} is the image's")


def prepare_session(takes=(), settings=None, internet=True):
    """Makes a Kaggle session ready for the notebook below: where files go, the model, the rows, the earlier results.

    Results go to /kaggle/working, caches to the temporary folder, which is large and not kept. Inputs are told by what
    they hold (`find_inputs`), so that the old and the new mount layout serve alike. Raises MedcotError with everything
    that is missing or ambiguous, before any GPU time is spent.
    """
    working, scratch = kaggle_root() / "working", Path(tempfile.gettempdir(), "medcot")
    scratch.mkdir(exist_ok=True)
    os.environ.update(settings or {})
    os.environ["MEDCOT_OUT"] = str(working)
    os.environ["HF_HOME"] = str(scratch / "huggingface")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "unsloth_compiled_cache")
    if not internet:
        os.environ["HF_HUB_OFFLINE"] = "1"  # fail at once instead of after many attempts to connect
    elif "HF_TOKEN" not in os.environ:
        _read_secret("HF_TOKEN")
    found, wrong = find_inputs(kaggle_root() / "input"), []
    run_type = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "").lower() or "unknown"
    print(f"Kaggle session ({run_type}), results in {working}, caches in {scratch}")
    if model := _only("model", found, "config.json", wrong, "MEDCOT_MODEL"):
        os.environ["MEDCOT_MODEL"] = str(_link(model, scratch))
    if rows := _only("rows", found, None, wrong, "MEDCOT_DATASET"):
        os.environ["MEDCOT_DATASET"] = str(rows)
    for item in takes:
        _take(item, found, working, wrong)
    if wrong:
        raise MedcotError("; ".join(wrong))


def find_inputs(folder: Path) -> dict[str, list[Path]]:
    """What lies anywhere under `folder`, told by what files hold: answers, adapter, training, model, rows."""
    found = {kind: [] for kind in ("answers", "adapter", "training", "model", "rows")}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        siblings = {file.name for file in path.parent.iterdir()} if path.name.endswith("config.json") else ()
        if path.name == "adapter_config.json" and siblings >= set(ADAPTER_FILES):
            found["adapter"].append(path.parent)
        elif path.name == "config.json" and "tokenizer.json" in siblings:
            if any(name.endswith(".safetensors") for name in siblings):
                found["model"].append(path.parent)
        elif path.suffix == ".jsonl" and _first_line(path).get("answers") == BASELINE:
            found["answers"].append(path)
        elif path.name == RECORD_FILE and {"settings", "examples_per_step", "log_history"} <= _object(path).keys():
            found["training"].append(path)
        elif path.suffix in FILE_TYPES and _names_all(path, COLUMNS):
            found["rows"].append(path)
    return found


def _first_line(path: Path) -> dict:
    with path.open("rb") as file, contextlib.suppress(ValueError):
        value = json.loads(file.readline(65536))
        return value if isinstance(value, dict) else {}
    return {}


def _object(path: Path) -> dict:
    with contextlib.suppress(ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def _names_all(path: Path, words) -> bool:
    """Whether all words stand in the first or the last 64 KiB: where text files and parquet files name their columns."""
    with path.open("rb") as file:
        head = file.read(65536)
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read()
    return any(all(word.encode() in part for word in words) for part in (head, tail))


def _only(kind, found, telling, wrong, variable) -> Path | None:
    """The one input of a kind; copies of the same (by the file `telling`) count once, and a set variable wins."""
    if variable in os.environ or not found[kind]:
        return None
    copies = {_digest(path / telling if telling else path): path for path in reversed(found[kind])}
    if len(copies) > 1:
        paths = ", ".join(str(path) for path in sorted(copies.values()))
        wrong.append(f"{len(copies)} different {kind} inputs ({paths}): detach all but one")
        return None
    return next(iter(copies.values()))


def _link(model: Path, scratch: Path) -> Path:
    """The model under a name made of its configuration: where it is mounted must not look like another model."""
    link = scratch / f"model-{_digest(model / 'config.json')[:8]}"
    if link.resolve() != model.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(model, target_is_directory=True)
    return link


def _take(item, found, working: Path, wrong):
    """Copies what an earlier notebook left, so that the output of this one is whole; what is there already stays."""
    name, telling = {
        "answers": ("answers", f"{BASELINE}-*.jsonl"),
        "adapter": (ADAPTER_FOLDER, "adapter_model.safetensors"),
        "training": (RECORD_FILE, None),
    }[item]
    target = working / name
    if list(target.glob(telling)) if telling else target.is_file():
        print(f"{TAKEN[item]}: already in {target}")
        return
    if not found[item]:
        wrong.append(
            f"{TAKEN[item]} is not among the inputs: run that notebook first and attach its output "
            "(Add Input, Your Work, Notebooks)"
        )
        return
    if item == "answers":  # one file for each set of settings; 03 picks its own
        chosen = {(path.name, _digest(path)): path for path in found[item]}
        if len({name for name, _ in chosen}) < len(chosen):
            wrong.append(f"different answers under one name among the inputs ({', '.join(map(str, found[item]))})")
            return
        for path in chosen.values():
            _copy(path, target / path.name)
    else:
        path = _only(item, found, telling, wrong, variable="")
        if path is None:
            return
        for file in sorted(path.iterdir()) if item == "adapter" else ():
            _copy(file, target / file.name)
        if item == "training":
            _copy(path, target)
            for figure in sorted(path.parent.glob("figures/*.png")):
                _copy(figure, working / "figures" / figure.name)
    print(f"{TAKEN[item]}: found by content, copied to {target}")


def _copy(source: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)  # without the read-only mode of the mount


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_secret(name):
    """Puts an attached Kaggle secret where its library reads it; without one nothing happens."""
    try:
        from kaggle_secrets import UserSecretsClient

        os.environ[name] = UserSecretsClient().get_secret(name)
    except Exception:  # an unattached secret raises one of three classes of that package, all meaning "none"
        pass


# --- talking to Kaggle -----------------------------------------------------------------------------------------------

_NO_PACKAGE = "the kaggle package cannot be imported ({}): pip install kaggle==2.2.4 six"


class Unanswered(MedcotError):
    """No answer came: whether the call took effect is not known."""


class Refused(MedcotError):
    """Kaggle said no."""

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


def _call(verb, seconds=READ_SECONDS, **arguments) -> dict:
    """One call of the official client in a child process, and its answer.

    Its Python API and not its command line, because the command line hides part of a push's answer (invalid model
    sources) and says success by exit code even where it failed. In a child, because the package logs in over the
    network while it is imported, may call exit, prints, and waits without limit for a server that does not answer.
    Raises Unanswered or Refused.
    """
    # These two make the client print its requests, credentials included.
    environment = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "medcot.kaggle"],
            input=json.dumps({"verb": verb} | arguments),
            capture_output=True, text=True, timeout=seconds, env=environment,
        )  # fmt: skip
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise Unanswered(
            f"Kaggle did not answer ({verb}) within {seconds} s: check the network, then call again"
        ) from error
    except ValueError as error:
        raise MedcotError(f"the kaggle client broke off ({verb}): {done.stderr.strip().splitlines()[-1:]}") from error
    failure, message, status = (answer.get(key) for key in ("failure", "message", "status"))
    if not failure:
        return answer
    if failure == "package":
        raise MedcotError(_NO_PACKAGE.format(message))
    if failure == "credentials" or status == 401:
        raise Refused(
            "Kaggle knows no credentials or refuses them: `kaggle auth login`, or a new token from "
            "https://www.kaggle.com/settings/api in ~/.kaggle/access_token or KAGGLE_API_TOKEN",
            401,
        )
    if failure == "connection" or status == 429 or (status or 0) >= 500:
        raise Unanswered(f"no usable answer from Kaggle ({verb}): {message}. Check the network, then call again")
    raise Refused(f"Kaggle refused {verb} of {arguments.get('ref', '')} ({status or 'invalid'}): {message}", status)


def _ask(verb, **arguments) -> dict:
    """`_call` for what may be asked again: three attempts before Unanswered is let through."""
    for pause in PAUSES:
        try:
            return _call(verb, **arguments)
        except Unanswered as error:
            print(f"{error} (trying again in {pause} s)", flush=True)
            time.sleep(pause)
    return _call(verb, **arguments)


def _client():
    """The child process: one request as JSON on standard input, one answer as JSON on standard output."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # the package prints; only the answer may stand on standard output
        answer = _answer(request)
    print(json.dumps(answer))


def _answer(request) -> dict:
    try:
        import kaggle
        import requests
    except ImportError as error:
        return {"failure": "package", "message": str(error)}
    api = kaggle.api
    try:
        if "auth_method" not in api.config_values:  # swallowed while importing: say whether key or network is missing
            api.authenticate()
        return _VERBS[request.pop("verb")](api, **request)
    except SystemExit:
        return {"failure": "credentials", "message": ""}
    except Exception as error:
        # The client wraps some refusals in a ValueError of its own; the answer is behind it.
        behind = next((e for e in (error, error.__context__) if isinstance(e, requests.HTTPError)), None)
        if behind is not None and behind.response is not None:
            return {"failure": "http", "status": behind.response.status_code, "message": str(behind)}
        if isinstance(error, ValueError) and not isinstance(error, requests.RequestException):
            return {"failure": "invalid", "message": str(error)}
        return {"failure": "connection", "message": f"{type(error).__name__}: {error}"}


def _api_user(api):
    return {"user": api.get_config_value(api.CONFIG_NAME_USER)}


def _api_quota(api):
    gpu = api.quota_view().gpu_quota
    hours = [None, None] if gpu is None else [t.total_seconds() / 3600 for t in (gpu.time_used, gpu.total_time_allowed)]
    return {"used": hours[0], "allowed": hours[1]}


def _api_push(api, folder, ref):
    response = api.kernels_push(folder)
    kinds = ("dataset", "competition", "kernel", "model")
    invalid = {kind: list(getattr(response, f"invalid_{kind}_sources")) for kind in kinds}
    return {
        "version": response.version_number,
        "error": response.error,
        "invalid": {kind: sources for kind, sources in invalid.items() if sources},
    }


def _api_source(api, ref):
    from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

    request = ApiGetKernelRequest()
    request.user_name, request.kernel_slug = ref.split("/")
    with api.build_kaggle_client() as client:
        response = client.kernels.kernels_api_client.get_kernel(request)
    return {"version": response.metadata.current_version_number, "source": response.blob.source}


def _api_status(api, ref):
    response = api.kernels_status(ref)
    return {"status": response.status.name.lower(), "message": response.failure_message or ""}


def _api_files(api, ref):
    from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

    files, token, log, version = [], "", "", _api_source(api, ref)["version"]
    with api.build_kaggle_client() as client:
        for _ in range(1000):
            request = ApiListKernelSessionOutputRequest()
            request.user_name, request.kernel_slug = ref.split("/")
            request.page_size, request.page_token = 100, token
            response = client.kernels.kernels_api_client.list_kernel_session_output(request)
            files += [[file.file_name, file.url] for file in response.files or []]
            token, log = response.next_page_token, log or response.log or ""
            if not token:
                break
    return {"files": files, "log": log, "version": version}


_VERBS = {
    "user": _api_user, "quota": _api_quota, "push": _api_push, "source": _api_source, "status": _api_status,
    "files": _api_files,
}  # fmt: skip


def _user_name() -> str | None:
    """The user name that the credentials belong to; None without credentials."""
    try:
        return _ask("user")["user"]
    except Refused:
        return None


# --- push ------------------------------------------------------------------------------------------------------------


def push(
    root: Path | None = None,
    owner: str | None = None,
    yes: bool = False,
    poll_seconds: float = 60,
    wait_hours: float = 30,
):
    """Stages, asks once, pushes each kernel as soon as what it takes is there, and waits until all are complete.

    Interrupted or cut off, it is called again and goes on: what arrived is not pushed twice, what failed or changed is
    pushed anew. Raises MedcotError for a refusal, for invalid inputs and for a session that failed.
    """
    root = _project() if root is None else Path(root)
    kernels = stage(root, owner)
    state = _State(root / "build" / "kaggle" / "state.json")
    try:
        phases = {kernel.slug: _phase(kernel, state) for kernel in kernels}
        if not all(phase == "complete" for phase in phases.values()):
            _announce(kernels, phases)
            if not yes and any(phase in ("absent", "failed") for phase in phases.values()):
                _confirm()
            _push_and_wait(kernels, phases, state, poll_seconds, wait_hours)
    except KeyboardInterrupt:
        raise MedcotError("interrupted: sessions go on at Kaggle, and calling push again goes on from here") from None
    print("all complete, nothing left to push: `medcot kaggle pull` fetches the results")


def _confirm():
    try:
        answer = input("Push? [y/N] ")
    except EOFError:  # no terminal to ask on
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise MedcotError("not pushed: answer y, or give --yes")


def _announce(kernels, phases):
    hours = sum(kernel.hours for kernel in kernels if phases[kernel.slug] in ("absent", "failed"))
    for kernel in kernels:
        who = "private" if kernel.is_private else "PUBLIC"
        print(f"{phases[kernel.slug]:<9} {kernel.url} ({who}, {kernel.machine_shape}, about {kernel.hours} h)")
    try:
        quota = _ask("quota")
        used = "" if quota["allowed"] is None else f"; {quota['used']:.1f} of {quota['allowed']:.0f} hours are used"
    except MedcotError as error:
        used = f"; how much is used is not known ({error})"
    print(f"expected use of the weekly GPU quota: about {hours:g} hours{used}")


def _push_and_wait(kernels, phases, state, poll_seconds, wait_hours):
    begun, shown, seen_alive = time.monotonic(), None, set()
    while True:
        for kernel in kernels:
            ready = all(phases[slug] == "complete" for slug in kernel.takes)
            free = list(phases.values()).count("active") < SESSIONS
            if phases[kernel.slug] in ("absent", "failed") and ready and free and _send(kernel, state):
                phases[kernel.slug] = "active"
        seen_alive |= {slug for slug, phase in phases.items() if phase == "active"}
        minutes = (time.monotonic() - begun) / 60
        line = ", ".join(
            f"{slug} {'waiting' if phase in ('absent', 'failed') else phase}" for slug, phase in phases.items()
        )
        if (line, minutes // 10) != shown:  # on every change, and every ten minutes as a sign of life
            print(f"{minutes:5.0f} min  {line}", flush=True)
            shown = (line, minutes // 10)
        if all(phase == "complete" for phase in phases.values()):
            return
        if minutes > 60 * wait_hours:
            raise MedcotError(f"not complete after {wait_hours} hours ({line}): call push again to go on waiting")
        # Also right after a push: the status is the latest session's, and the new session needs a moment to be that.
        time.sleep(poll_seconds)
        for kernel in kernels:
            if phases[kernel.slug] == "active":
                phases[kernel.slug] = _phase(kernel, state)
            if phases[kernel.slug] == "failed" and kernel.slug in seen_alive:
                raise MedcotError(_failure(kernel))


def _phase(kernel: Kernel, state) -> str:
    """`absent` (not there in this form), `active`, `complete` or `failed`, as the server has it."""
    if not state.holds(kernel):
        version = _arrived(kernel, after=0)
        if not version or state.was_invalid(kernel):
            return "absent"
        state.keep(kernel, version)  # an earlier call was cut off between the push and its answer
    try:
        session = _ask("status", ref=kernel.ref)["status"]
    except Refused as error:
        if error.status in (403, 404):  # deleted there since
            return "absent"
        raise
    ended = {"complete": "complete", "error": "failed", "cancel_acknowledged": "failed", "cancel_requested": "failed"}
    return ended.get(session, "active")


def _failure(kernel: Kernel) -> str:
    message, log = _ask("status", ref=kernel.ref)["message"], ""
    with contextlib.suppress(MedcotError):
        log = "\n".join(_log_text(_ask("files", ref=kernel.ref)["log"]).splitlines()[-15:])
    return (
        f"{kernel.slug} failed: {message or 'Kaggle gave no reason'}\n{log}\n"
        f"see {kernel.url}; mend it and call push again, which pushes only what failed or changed"
    )


def _log_text(log: str) -> str:
    """A session log as text: Kaggle sends a JSON list of pieces, each with its stream and time."""
    try:
        return "".join(piece["data"] for piece in json.loads(log))
    except (ValueError, TypeError, KeyError):
        return log


def _remote(kernel: Kernel) -> dict | None:
    """The server's copy of a kernel, None if there is none; a private one that is not there answers 403 as well."""
    try:
        return _ask("source", ref=kernel.ref)
    except Refused as error:
        if error.status in (403, 404):
            return None
        raise


def _arrived(kernel: Kernel, after: int) -> int | None:
    """The version on the server if it carries this fingerprint and is newer than `after`."""
    remote = _remote(kernel)
    if remote and _stamp(kernel.fingerprint) in (remote["source"] or "") and (remote["version"] or 1) > after:
        return remote["version"] or 1
    return None


def _send(kernel: Kernel, state) -> bool:
    """Pushes one kernel; False if Kaggle has no free session. Raises MedcotError for everything else that is no version.

    An answer that is lost says nothing about the push: the server is asked whether it arrived before it is sent again.
    """
    before = (_remote(kernel) or {}).get("version") or 0
    for pause in (*PAUSES, None):
        try:
            answer = _call("push", PUSH_SECONDS, folder=str(kernel.folder), ref=kernel.ref)
            break
        except MedcotError as error:
            conflict = isinstance(error, Refused) and error.status == 409
            if not isinstance(error, Unanswered) and not conflict:
                raise _with_cure(kernel, error) from error
            print(f"{error}; asking whether the push arrived", flush=True)
            time.sleep(pause or 0)
            if version := _arrived(kernel, before):
                answer = {"version": version, "error": None, "invalid": {}}
                break
            if conflict or pause is None:
                raise _with_cure(kernel, error) from error
    if "session count" in (answer["error"] or "").lower():  # "Maximum batch GPU session count of 2 reached."
        print(f"{kernel.slug}: {answer['error']} Waiting for a session to end", flush=True)
        return False
    if answer["error"] or not answer["version"]:
        raise MedcotError(
            f"Kaggle did not take {kernel.slug}: {answer['error'] or 'it named no version'}. "
            "Mend that and call push again; what was taken stays"
        )
    state.keep(kernel, answer["version"], answer["invalid"])
    if answer["invalid"]:
        inputs = "; ".join(f"{kind}: {', '.join(sources)}" for kind, sources in answer["invalid"].items())
        raise MedcotError(
            f"Kaggle took version {answer['version']} of {kernel.slug} without these inputs ({inputs}): check their names and "
            f"that {kernel.owner} may see them, cancel the session at {kernel.url}, and call push again"
        )
    print(f"{kernel.slug}: version {answer['version']} successfully pushed, {kernel.url}", flush=True)
    return True


def _with_cure(kernel: Kernel, error: MedcotError) -> MedcotError:
    cures = {
        403: f"check that {kernel.owner!r} is your user name, and that your phone number is verified at "
        "https://www.kaggle.com/settings, without which there is neither GPU nor internet",
        409: f"another notebook of yours may have the title {kernel.title!r}: rename or delete it, then call push again",
    }
    cure = cures.get(getattr(error, "status", None))
    return MedcotError(f"{kernel.slug}: {error}: {cure}") if cure else MedcotError(f"{kernel.slug}: {error}")


class _State:
    """build/kaggle/state.json: which fingerprint of each kernel is known to have arrived, and as which version."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        if path.is_file():
            try:
                self.entries = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise MedcotError(f"{path} is damaged ({error}): delete it, the server is asked instead") from error

    def _entry(self, kernel):
        entry = self.entries.get(kernel.ref, {})
        return entry if entry.get("fingerprint") == kernel.fingerprint else {}

    def holds(self, kernel) -> bool:
        return bool(self._entry(kernel)) and not self.was_invalid(kernel)

    def was_invalid(self, kernel) -> bool:
        """True if this form was taken without some of its inputs, and so has to be pushed again."""
        return bool(self._entry(kernel).get("invalid"))

    def keep(self, kernel, version, invalid=()):
        self.entries[kernel.ref] = {"fingerprint": kernel.fingerprint, "version": version, "invalid": invalid or {}}
        _write_json(self.path, self.entries)


def _write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".saving")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


# --- status and pull -------------------------------------------------------------------------------------------------


def status(root: Path | None = None, owner: str | None = None):
    """Prints where each kernel stands; changes nothing."""
    for kernel in read_metadata(_project() if root is None else Path(root), owner):
        print(f"{_session(kernel):<24}{kernel.url}")


def _session(kernel: Kernel) -> str:
    """The state of a kernel's latest session in Kaggle's word, or "not pushed"."""
    try:
        answer = _ask("status", ref=kernel.ref)
    except Refused as error:
        if error.status in (403, 404):
            return "not pushed"
        raise
    return answer["status"] + (f" ({answer['message']})" if answer["message"] else "")


def pull(root: Path | None = None, owner: str | None = None) -> Path:
    """Fetches the output of every complete kernel, and the logs of failed ones, into outputs/kaggle/, which is returned.

    The last kernel's copy of a file is taken, because its run card was written from that one. Called again after a
    break, it fetches only what is not there in the same version. Raises MedcotError for file names that would land
    elsewhere and for downloads that stay incomplete.
    """
    root = _project() if root is None else Path(root)
    folder, taken, fetched, kept = root / "outputs" / "kaggle", set(), 0, 0
    for kernel in reversed(read_metadata(root, owner)):
        session = _session(kernel)
        if not session.startswith(("complete", "error", "cancel_acknowledged")):
            print(f"{kernel.slug}: {session}, nothing fetched")
            continue
        listing = _ask("files", ref=kernel.ref)
        if log := _log_text(listing["log"]):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{kernel.slug}.log").write_text(log, encoding="utf-8")
        if not session.startswith("complete"):
            print(f"{kernel.slug}: {session}, its log is in {folder / f'{kernel.slug}.log'}")
            continue
        new, old = _fetch(kernel, listing["files"], folder, listing["version"], taken)
        fetched, kept = fetched + new, kept + old
    print(f"{fetched} files fetched, {kept} were there already, in {folder}")
    for what in (ADAPTER_FOLDER, "RUN.md"):
        if (folder / what).exists():
            print(folder / what)
    return folder


def _fetch(kernel, files, folder: Path, version, taken: set) -> tuple[int, int]:
    """Fetches the files that no later kernel has; returns how many were fetched and how many were there."""
    bad = [name for name, url in files if not _is_inside(folder, name) or not url.startswith(("http://", "https://"))]
    if bad:
        raise MedcotError(
            f"{kernel.slug} lists files that would not land in {folder}: {bad}; nothing of it was fetched"
        )
    record = folder / ".pulled.json"
    records = _object(record) if record.is_file() else {}  # without a readable one everything is fetched again
    mine = records.get(kernel.ref, {})
    if mine.get("version") != version or version is None:
        mine = {"version": version, "sizes": {}}  # another run: equal names and sizes may hold other weights
    records[kernel.ref] = mine
    new = old = 0
    for name, url in files:
        if name in taken:
            continue
        taken.add(name)
        path = folder / name
        if path.is_file() and path.stat().st_size == mine["sizes"].get(name):
            old += 1
            continue
        print(f"fetching {name}", flush=True)
        mine["sizes"][name] = _download(url, path, version)
        for other, entry in records.items():  # this copy replaced that of another kernel
            if other != kernel.ref:
                entry["sizes"].pop(name, None)
        _write_json(record, records)
        new += 1
    return new, old


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file name from the server lands below `folder`, links included, and is one on every system."""
    if not name or re.search(r"\\|\0|^[A-Za-z]:", name) or PurePosixPath(name).is_absolute():
        return False
    return ".." not in PurePosixPath(name).parts and (folder / name).resolve().is_relative_to(folder.resolve())


def _download(url: str, path: Path, version) -> int:
    """Fetches one file and returns its size in bytes; a part left by an earlier attempt at the same version is continued."""
    import requests  # comes with the kaggle package

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.v{version}.part")
    reason = "its size is not what the server announced"
    for pause in (*PAUSES, None):
        start = part.stat().st_size if part.is_file() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with requests.get(url, stream=True, timeout=(10, READ_SECONDS), headers=headers) as answer:
                if answer.status_code == 416:  # the part is as long as the file or longer: begin again
                    part.unlink()
                    continue
                answer.raise_for_status()
                resumed = answer.status_code == 206
                length = answer.headers.get("Content-Length")
                with part.open("ab" if resumed else "wb") as file:
                    for chunk in answer.iter_content(2**16):  # a chunk that breaks off is lost
                        file.write(chunk)
            size = part.stat().st_size
            if length is None or size == int(length) + (start if resumed else 0):
                part.replace(path)
                for stale in path.parent.glob(f"{path.name}.v*.part"):
                    stale.unlink()
                return size
        except requests.RequestException as error:
            reason = type(error).__name__ + (f" {error.response.status_code}" if error.response is not None else "")
        if pause is not None:
            time.sleep(pause)
    raise MedcotError(f"{path.name} could not be fetched ({reason}): call pull again, which goes on where it stopped")


# --- the command line ------------------------------------------------------------------------------------------------


def add_commands(commands):
    """Adds `kaggle stage | push | status | pull` to the sub-parsers of the command line."""
    parser = commands.add_parser("kaggle", help="run the notebooks on Kaggle and bring the results home")
    actions = parser.add_subparsers(dest="action", required=True)
    for action, words in (
        (stage, "write build/kaggle/, one folder a notebook; uploads nothing"),
        (push, "stage, ask once, push in order and wait until all are complete"),
        (status, "where each notebook stands"),
        (pull, "fetch the results into outputs/kaggle/"),
    ):
        command = actions.add_parser(action.__name__, help=words, description=words)
        command.add_argument("--owner", help="Kaggle user name; by default that of the credentials")
        command.set_defaults(run=_run, function=action)
        if action is push:
            command.add_argument("--yes", action="store_true", help="push without asking")


def _run(options):
    options.function(owner=options.owner, **({"yes": options.yes} if options.function is push else {}))


if __name__ == "__main__":
    _client()
