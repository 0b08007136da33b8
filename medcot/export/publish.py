"""An adapter or an export on the Hugging Face hub: the one room that uploads, when asked to and after saying what."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..hub import kaggle_secret
from ..settings import NOTICE, MedcotError

# Nothing else leaves the folder, whatever else somebody has put there.
PATTERNS = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "README.md", "Modelfile")
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Plan:
    """What an upload would do; printing it shows it."""

    folder: Path
    name: str
    public: bool
    exists: bool
    """Whether the repository is there already; its files of the same names are replaced in one commit."""
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    def __str__(self):
        width = max(len(file.name) for file in self.files)
        total = size(sum(file.stat().st_size for file in self.files))
        who = "PUBLIC: everybody may see and download it" if self.public else "private: only its owner sees it"
        lines = [f"{'update' if self.exists else 'new repository'} {self.name}, {who}"]
        lines += [f"  {file.name:<{width}}  {size(file.stat().st_size):>10}" for file in self.files]
        lines += [f"  {len(self.files)} files, {total}, from {self.folder}"]
        lines += [f"  not uploaded: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, NOTICE])


def publish(folder: Path, name: str, public: bool = False, yes: bool = False) -> str | None:
    """Uploads a folder with its model card as the repository `name` (OWNER/NAME), in one commit; returns the commit's URL.

    Private unless `public`. Shows files, sizes and visibility and asks, unless `yes`; None if the answer was no. Raises
    MedcotError for a folder without the run card as README.md, without a login, and where the repository on the hub is
    public and `public` was not said.
    """
    from huggingface_hub import HfApi, get_token

    _check(folder, name)
    if not (kaggle_secret("HF_TOKEN") or get_token()):
        raise MedcotError("no login for the hub: set HF_TOKEN to a token that may write, or run `hf auth login` once")
    api = HfApi()
    there = _asking(lambda: _found(api, name), name)
    if there is not None and public is there.private:
        is_, said = ("private", "public") if there.private else ("public", "private")
        raise MedcotError(
            f"{name} is {is_} on the hub and the upload was to be {said}: "
            + (
                "leave --public out, or make it public in its settings there"
                if public
                else "say --public, or choose another name"
            )
        )
    files = [file for file in sorted(Path(folder).iterdir()) if file.is_file() and any(map(file.match, PATTERNS))]
    left_out = tuple(file.name for file in sorted(Path(folder).iterdir()) if file not in files)
    print(Plan(Path(folder), name, public, there is not None, tuple(files), left_out))
    if not yes and not _agreed():
        print("nothing was uploaded")
        return None
    if there is None:
        _asking(lambda: api.create_repo(name, private=not public), name)
    commit = _asking(
        lambda: api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[file.name for file in files],
            commit_message="medcot publish",
        ),
        name,
    )
    print(f"uploaded: {commit.commit_url}")
    return str(commit.commit_url)


def _check(folder: Path, name: str):
    """Raises MedcotError for what can be seen before the hub is asked."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise MedcotError(f"{name!r} is no repository: write OWNER/NAME, for example your-name/DeepSeek-R1-Medical-COT")
    card = Path(folder) / "README.md"
    if not Path(folder).is_dir() or not any(Path(folder).glob(pattern) for pattern in PATTERNS[:2]):
        raise MedcotError(f"{folder} holds no weights: run 02_finetune.ipynb first, or name an export's folder")
    # peft leaves a form without answers there; the run card carries the notice.
    if not card.is_file() or NOTICE not in card.read_text(encoding="utf-8"):
        raise MedcotError(
            f"{card} is not the run card: run 03_compare.ipynb first, which measures the model and writes it"
        )


def _found(api, name: str):
    """What the hub says of a repository; None if it has none of that name."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(name, timeout=20)
    except RepositoryNotFoundError:
        return None


def _asking(call, name: str):
    """`call()`, with what the hub refuses or the network breaks as one line."""
    try:
        return call()
    except MedcotError:
        raise
    except Exception as error:  # httpx, huggingface_hub and its checks of a card all raise their own
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        cure = (
            "the token may not write there: take one with write access, and your own name as OWNER"
            if status in (401, 403)
            else "check the network and run the same command again, nothing is half there"
        )
        raise MedcotError(f"the hub did not take {name} ({reason}): {cure}") from error


def _agreed() -> bool:
    try:
        return input("upload this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody there to ask
        return False


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
