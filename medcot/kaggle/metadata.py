"""kaggle-metadata.json: what runs on Kaggle, on which machine, with what attached and for how long."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..profiles import PROFILES
from ..settings import MedcotError

METADATA_FILE = "kaggle-metadata.json"
OWNER = "OWNER/"  # in a source: the user who pushes

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def _text(pattern: str):
    return Annotated[str, StringConstraints(pattern=pattern)]


class Sources(BaseModel):
    """What is attached."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    dataset_sources: list[_text(rf"^{_PART}/{_PART}(/\d+)?$")] = []
    """owner/slug or owner/slug/version."""
    kernel_sources: list[_text(rf"^{_PART}/[A-Za-z0-9-]{{5,}}(/\d+)?$")] = []
    """owner/slug, the slug of at least 5 characters."""
    model_sources: list[_text(rf"^({_PART}/){{4}}\d+$")] = []
    """owner/model/framework/variation/version: all five parts, the client refuses four."""


class Metadata(Sources):
    """The file."""

    owner: _text(r"^([A-Za-z0-9][A-Za-z0-9_-]*)?$") = ""
    """Kaggle user; empty for that of the credentials."""
    release_url: _text(r"^(https://\S+[^/\s])?$") = ""
    """Where the notebooks of `make release` are published: the address of their folder, empty if they are not."""
    name: _text(r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """Begins the address and title of each kernel: medcot-session, medcot-01-baseline, ..."""
    notebooks: Annotated[list[_text(r"^[\w-]+(/[\w-]+)*\.ipynb$")], Field(min_length=1)]
    """In the order in which they run."""
    # Secrets are none of them: they go into Kaggle's own.
    settings: dict[Literal["MEDCOT_PROFILE", "MEDCOT_MODEL", "MEDCOT_DATASET", "MEDCOT_CHOICES"], str] = {}
    # Two T4s, billed as one session. Kaggle's list also has a P100, which Triton refuses, and TPUs.
    machine_shape: Literal["NvidiaTeslaT4"] = "NvidiaTeslaT4"
    is_private: bool = True
    enable_internet: bool = True
    hours: Annotated[float, Field(gt=0, le=12)] = 2.0
    """What all notebooks together are expected to take of the weekly quota (estimated), whatever the number of cards."""
    limit_hours: Annotated[float, Field(gt=0.5, le=12)] = 12.0
    """Kaggle ends a session then; medcot stops training 20 minutes before, with a checkpoint."""
    offline: Sources = Sources()
    """What is attached for a session without internet (`--offline`)."""

    @model_validator(mode="after")
    def _can_run(self):
        profile, wrong = self.settings.get("MEDCOT_PROFILE"), []
        attached = self.dataset_sources + self.kernel_sources + self.model_sources
        names = [Path(notebook).stem for notebook in self.notebooks]
        wrong += [f"{name!r} is used twice" for name in sorted({name for name in names if names.count(name) > 1})]
        if self.hours > self.limit_hours:
            wrong.append(f"hours is {self.hours:g} and limit_hours {self.limit_hours:g}: it would be cut off")
        if profile is not None and profile not in PROFILES:
            wrong.append(f"MEDCOT_PROFILE {profile!r} is unknown: choose one of {', '.join(PROFILES)}")
        elif profile and Path(PROFILES[profile].model).is_absolute() and not attached:
            wrong.append(f"profile {profile!r} needs the embedded model, too large for a notebook: attach its folder")
        if not self.enable_internet and not attached:
            wrong.append("enable_internet is false and nothing is attached: where should packages and model come from?")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def read_metadata(root: Path, offline: bool = False) -> Metadata:
    """The file, checked, its notebooks too; with `offline`, as a session without internet has it.

    Raises MedcotError that names everything wrong at once.
    """
    path = Path(root) / METADATA_FILE
    try:
        metadata = Metadata.model_validate_json(path.read_bytes())
        if offline:
            changes = metadata.offline.model_dump(exclude_unset=True) | {"enable_internet": False}
            metadata = Metadata.model_validate(metadata.model_dump() | changes)
    except FileNotFoundError as error:
        raise MedcotError(f"{path} not found: run this from a clone of the project") from error
    except ValidationError as error:
        raise _complain(path, [_complaint(entry) for entry in error.errors()]) from error
    if wrong := [line for notebook in metadata.notebooks for line in _notebook_complaints(Path(root), notebook)]:
        raise _complain(path, wrong)
    return metadata


def _complain(path, wrong) -> MedcotError:
    return MedcotError(f"{path} cannot be staged:\n  - " + "\n  - ".join(wrong))


def _complaint(entry) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or "file"
    said = entry["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" + ("" if entry["type"] == "value_error" else f" (is {str(entry['input'])[:60]!r})")


def _notebook_complaints(root: Path, notebook: str) -> list[str]:
    import nbformat

    path = root / notebook
    if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
        return [f"{path} not found in the project"]
    try:
        content = nbformat.read(path, as_version=4)
        nbformat.validate(content)
    except Exception as error:  # nbformat raises its own, json's and jsonschema's
        return [f"{path} is no notebook ({str(error).splitlines()[0][:200]})"]
    return [] if content.cells else [f"{path} has no cells"]
