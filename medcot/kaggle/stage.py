"""kaggle-metadata.json expanded: one folder for each kernel as the kaggle client wants it, and notebooks for a browser."""

import base64
import hashlib
import inspect
import io
import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..files import write_beside
from ..settings import NOTICE, MedcotError
from . import session
from .metadata import METADATA_FILE, OWNER, Metadata, read_metadata

SESSION = "session"  # the kernel that runs all notebooks
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
    "annotated-types", "cut-cross-entropy", "docstring-parser", "einops", "entrypoints", "formulaic", "gguf",
    "hf-transfer", "interface-meta", "ipykernel", "ipywidgets", "jinja2", "json5", "jupyter-client", "msgspec",
    "narwhals", "nbclient", "nbformat", "nest-asyncio", "papermill", "patsy", "pydantic", "pydantic-core",
    "rapidfuzz", "scikit-learn", "sentencepiece", "statsmodels", "structlog", "tenacity", "typeguard", "typer",
    "typing-extensions", "typing-inspection", "tyro", "wandb",
)  # fmt: skip
# The oldest that the others take; an image that is behind gets the locked one.
AT_LEAST = {"pyarrow": "21.0.0"}
# The image's Python (October 2026), for the markers in requirements.lock.
_IMAGE = {
    "python_version": "3.13", "python_full_version": "3.13.5", "implementation_name": "cpython", "os_name": "posix",
    "platform_machine": "x86_64", "platform_system": "Linux", "sys_platform": "linux", "extra": "",
}  # fmt: skip

_CLICKS = {
    "session": "Settings: accelerator **GPU T4 x2**, internet **on**. Then **Save Version**, **Save & Run All**: about two "
    "hours of the weekly quota (estimated), and the browser may be closed. If it ends before it is finished, **Add Input**, "
    "**Your Work**, this notebook, and **Save Version** again: it goes on from there.",
    "01_baseline": "Settings: accelerator **GPU T4 x2**, internet **on**. Then **Save Version**, **Save & Run All**.",
    "02_finetune": "Settings: accelerator **GPU T4 x2**, internet **on**. Then **Save Version**, **Save & Run All**. After "
    "an interruption, **Add Input**, **Your Work**, this notebook, and **Save Version** again: training goes on from there.",
    "03_compare": "When 01 and 02 have ended: **Add Input**, **Your Work**, both of them. Settings: accelerator **GPU T4 "
    "x2**, internet **on**. Then **Save Version**, **Save & Run All**.",
}


@dataclass(frozen=True)
class Staged:
    """A kernel as it will be sent."""

    name: str
    """That of its notebook; "session" for the one that runs all of them."""
    owner: str
    metadata: Metadata
    takes: tuple[str, ...]
    """Names of the notebooks whose output is attached."""
    text: str
    """The notebook, with a digest of medcot's files in their place and the place of the stamp still open."""
    files: tuple[str, str]
    """That digest, and the files themselves as a zip archive in base64."""

    @property
    def ref(self) -> str:
        """`owner/slug`."""
        return ref(self.owner, self.metadata, self.name)

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://www.kaggle.com/code/{self.ref}"

    def stamp(self, after: int = 0) -> str:
        """The line by which source and output are known: a digest of all that is sent, and `after` which version it was.

        Equal work has an equal digest, whichever zlib has packed the files.
        """
        identity = self.text + json.dumps(self.client_metadata(), sort_keys=True)
        return f"medcot-staged {hashlib.sha256(identity.encode()).hexdigest()} after-version-{after}"

    def notebook(self, after: int = 0) -> str:
        """The notebook as it is sent."""
        return self.text.replace(_STAMP, self.stamp(after)).replace(*self.files)

    def client_metadata(self) -> dict:
        """What the kaggle client reads from kernel-metadata.json."""
        data, mine = self.metadata, f"{self.owner}/"
        datasets, kernels = (
            [mine + name.removeprefix(OWNER) if name.startswith(OWNER) else name for name in sources]
            for sources in (data.dataset_sources, data.kernel_sources)
        )
        earlier = [ref(self.owner, data, name) for name in self.takes]
        return {
            "id": self.ref, "title": self.ref.removeprefix(mine).replace("-", " "), "code_file": f"{self.name}.ipynb",
            "language": "python", "kernel_type": "notebook", "is_private": data.is_private, "enable_gpu": True,
            "enable_internet": data.enable_internet, "machine_shape": data.machine_shape,
            "dataset_sources": datasets, "kernel_sources": kernels + earlier, "model_sources": data.model_sources,
        }  # fmt: skip

    def write(self, folder: Path, after: int = 0, anew: bool = False) -> Path:
        """Writes the folder that the kaggle client reads; `after` a version its output is attached, unless `anew`."""
        metadata = self.client_metadata()
        metadata["kernel_sources"] += [self.ref] if after and not anew else []
        shutil.rmtree(folder, ignore_errors=True)
        write_beside(folder / metadata["code_file"], self.notebook(after))
        write_beside(folder / "kernel-metadata.json", json.dumps(metadata, indent=2) + "\n")
        return folder


def ref(owner: str, metadata: Metadata, name: str) -> str:
    """`owner/slug` of a kernel; its title is the slug in words, as Kaggle makes the one from the other."""
    return f"{owner}/{metadata.name}-{name.replace('_', '-').lower()}"


_STAMP = "medcot-stamp-goes-here"


def project() -> Path:
    """The clone that this medcot belongs to."""
    root = Path(__file__).parents[2]
    if not (root / METADATA_FILE).is_file():
        raise MedcotError(f"{root / METADATA_FILE} not found: run this from a clone of the project")
    return root


def stage(root: Path | None = None, owner: str | None = None, offline: bool = False) -> list[Staged]:
    """Writes build/kaggle/, a folder for the session and one for each notebook, and returns them, the session first.

    Nothing is uploaded. `owner` is the Kaggle user; by default the file's, else that of the credentials. Raises
    MedcotError with every complaint before anything is written.
    """
    root = project() if root is None else Path(root)
    metadata = read_metadata(root, offline)
    staged = _staged(root, metadata, owner_of(metadata, owner))
    for one in staged:
        one.write(root / "build" / "kaggle" / one.name)
    if offline:  # what `kaggle datasets create` reads; wheels and rows go beside it (README)
        title = {"title": "medcot offline", "id": f"{staged[0].owner}/medcot-offline", "licenses": [{"name": "other"}]}
        write_beside(
            root / "build" / "kaggle" / "offline" / "dataset-metadata.json", json.dumps(title, indent=1) + "\n"
        )
    pins = read_pins(root)
    locked = pins["exact"] | pins["if_absent"] | {name: pin for name, (_, pin) in pins["at_least"].items()}
    lines = "".join(f"{name}=={pin}\n" for name, pin in locked.items())
    write_beside(root / "build" / "kaggle" / "requirements.txt", lines)
    print(f"{len(staged)} kernels staged for {staged[0].owner} in {root / 'build' / 'kaggle'}")
    return staged


def release(root: Path | None = None) -> list[Path]:
    """Writes build/release/: the notebooks as a browser imports them, each saying first what to click. Uploads nothing."""
    root = project() if root is None else Path(root)
    metadata = read_metadata(root)
    folder, written = root / "build" / "release", []
    shutil.rmtree(folder, ignore_errors=True)
    for one in _staged(root, metadata, "anybody", clicks=True):
        written.append(folder / f"{one.ref.partition('/')[2]}.ipynb")
        write_beside(written[-1], one.notebook())
        address = f"{metadata.release_url}/{written[-1].name}"
        print(f"https://www.kaggle.com/kernels/welcome?src={address}" if metadata.release_url else written[-1])
    return written


def install_here():
    """The first cell on Colab or one's own GPU, in a clone: installs what is lacking, as on Kaggle; torch stays."""
    root = project()
    session.install(**read_pins(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def owner_of(metadata: Metadata, owner: str | None = None) -> str:
    """The Kaggle user: `owner`, else the file's, else that of the credentials. Raises MedcotError without one."""
    from .client import user_name

    if not (owner := owner or metadata.owner or user_name()):
        raise MedcotError(
            "owner is missing: give --owner with your Kaggle user name, or log in with `kaggle auth login`"
        )
    if not owner.replace("-", "").replace("_", "").isalnum() or not owner.isascii():
        raise MedcotError(f"owner {owner!r} is no Kaggle user name: take the one in the address of your profile")
    return owner


def _staged(root: Path, metadata: Metadata, owner: str, clicks: bool = False) -> list[Staged]:
    import nbformat

    pins, staged = read_pins(root), []
    paths = {Path(notebook).stem: root / notebook for notebook in metadata.notebooks}
    for name in (SESSION, *paths):
        takes = tuple(paths)[:-1] if name == list(paths)[-1] else ()  # the last notebook compares what the others left
        if name == SESSION:
            notebook = _session_notebook(paths)
            files = _pack(root, {f"notebooks/{stem}.ipynb": path.read_bytes() for stem, path in paths.items()})
        else:
            notebook, files = nbformat.read(paths[name], as_version=4), _pack(root, {})
        cell = _first_cell(metadata, takes, pins, files[0], name == SESSION)
        notebook.cells[:0] = [*([_clicks(name)] if clicks else []), cell]
        for other in notebook.cells:
            if other.cell_type == "code":
                other |= {"outputs": [], "execution_count": None}
        # As in a notebook that Kaggle exports: an upload by hand then starts with the same accelerator and internet switch.
        notebook.metadata["kaggle"] = {
            "accelerator": metadata.machine_shape[0].lower() + metadata.machine_shape[1:], "isGpuEnabled": True,
            "isInternetEnabled": metadata.enable_internet, "language": "python", "sourceType": "notebook",
        }  # fmt: skip
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        staged.append(Staged(name, owner, metadata, takes, text, files))
        if (size := len(staged[-1].notebook().encode())) > SOURCE_LIMIT:
            raise MedcotError(
                f"{name}: {size:,} bytes with medcot embedded, Kaggle takes {SOURCE_LIMIT:,}: strip the notebook's "
                "attachments, or shorten it"
            )
    return staged


def _first_cell(metadata: Metadata, takes, pins: dict, digest: str, is_session: bool):
    from nbformat.v4 import new_code_cell

    stamp = f'    stamp="{_STAMP}",\n' if is_session else ""
    source = (
        "# Put here by `medcot kaggle stage`: what the image lacks, medcot itself, and this run's inputs.\n"
        f"# {_STAMP}\n"
        f'MEDCOT = "{digest}"\n\n\n'  # far from the calls, as a traceback shows the lines around one
        f"{inspect.getsource(session.install)}\n\n"
        f"install(\n    exact={pins['exact']!r},\n    if_absent={pins['if_absent']!r},\n    at_least={pins['at_least']!r},\n"
        f"    internet={metadata.enable_internet},\n    payload=MEDCOT,\n)\n"
        "from medcot.kaggle.session import prepare_session\n\n"
        f"prepare_session(\n    settings={metadata.settings!r},\n    internet={metadata.enable_internet},\n"
        f"    takes={takes!r},\n{stamp}    limit_hours={metadata.limit_hours!r},\n)"
    )
    return new_code_cell(source, id="medcot-kaggle-setup", metadata={"_kg_hide-input": True})


def _clicks(name: str):
    from nbformat.v4 import new_markdown_cell

    words = "This copy runs on Kaggle and brings all it needs along; GPU and internet need a verified phone number."
    clicks = _CLICKS.get(name, _CLICKS["01_baseline"])
    return new_markdown_cell(f"## What to click\n\n{words} {clicks}\n\n{NOTICE}", id="medcot-clicks")


def _session_notebook(names):
    """The notebook of the session that runs all three: no notebook file, as it holds nothing to read."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    about = (
        "# medcot: base model, fine-tuning, comparison\n\nThe three notebooks run one after the other below, each in a "
        f"process of its own; the result stands at the end, what was made lies in the output.\n\n{NOTICE}"
    )
    cells = [new_markdown_cell(about, id="medcot-about")]
    for name in names:
        line = f'run_notebook("{name}")'
        cells.append(new_code_cell(line, id=f"medcot-{name.replace('_', '-')}"))
    cells[1].source = "from medcot.kaggle.session import run_notebook, show_results\n\n" + cells[1].source
    cells.append(new_code_cell("show_results()", id="medcot-results"))
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernelspec, "language_info": {"name": "python"}})


def _pack(root: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """medcot's Python files, and `files`: a digest of them, and a zip archive in base64.

    Embedded in each notebook rather than put into a private data set, so that one push carries code and notebook of one
    state. The embedded model stays out: it has four times what Kaggle takes, and the profile of a T4 does not use it.
    """
    files = files | {str(path.relative_to(root)): path.read_bytes() for path in (root / "medcot").rglob("*.py")}
    packed, digest = io.BytesIO(), hashlib.sha256()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(name, files[name])
            digest.update(f"{name} {len(files[name])} ".encode() + files[name])
    return f"medcot-files {digest.hexdigest()}", base64.b64encode(packed.getvalue()).decode()


def read_pins(root: Path) -> dict[str, dict]:
    """What `session.install` gets: `exact` and `if_absent` (name -> version), `at_least` (name -> oldest, locked version).

    As requirements.lock has them for the image's Python.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lock = root / "requirements.lock"
    if not lock.is_file():
        raise MedcotError(f"{lock} not found: run this from a clone of the project")
    lines = (line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    versions = {}
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker is None or requirement.marker.evaluate(_IMAGE):
            versions[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    if missing := [name for name in (*EXACT, *IF_ABSENT, *AT_LEAST) if name not in versions]:
        raise MedcotError(f"{lock} does not pin {', '.join(missing)}: run `make lock`")
    return {
        "exact": {name: versions[name] for name in EXACT},
        "if_absent": {name: versions[name] for name in IF_ABSENT},
        "at_least": {name: (least, versions[name]) for name, least in AT_LEAST.items()},
    }
