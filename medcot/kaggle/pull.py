"""What a session left, brought home: one folder a version, so that two versions never mix."""

import re
import time
from pathlib import Path, PurePosixPath

from ..settings import ADAPTER_FOLDER, MedcotError
from . import client
from .inputs import CHECKPOINTS
from .metadata import read_metadata
from .stage import SESSION, owner_of, project, ref


def pull(root: Path | None = None, owner: str | None = None, checkpoints: bool = False) -> Path:
    """Fetches the output of the latest session, finished or not, into a folder of its version, which is returned.

    Called again after a break it fetches what is missing. Checkpoints, the largest files, only when asked for. Raises
    MedcotError while the session runs, for output of another version, and for file names that would land elsewhere.
    """
    root = project() if root is None else Path(root)
    metadata = read_metadata(root)
    address = ref(owner_of(metadata, owner), metadata, SESSION)
    seen = client.look(address)
    if not seen.has_ended:
        raise MedcotError(f"version {seen.version} of {address} is {seen.session}: nothing to fetch yet")
    if seen.record and seen.notebooks is None:
        raise MedcotError(
            f"Kaggle still lists the files of an earlier session, not those of version {seen.version}: nothing was "
            "fetched, call pull again in some minutes"
        )
    folder = root / "outputs" / "kaggle" / f"version-{seen.version}-{(seen.stamp or 'other unstamped').split()[1][:8]}"
    try:
        fetched, there = _fetch(seen, folder, checkpoints)
        (folder / "session.log").write_text(seen.log, encoding="utf-8")
    except OSError as error:
        raise MedcotError(
            f"{folder} cannot be written ({error}): make room or clear it, then call pull again"
        ) from error
    print(f"{fetched} files fetched, {there} were there already, in {folder}")
    if seen.is_finished:  # then the card was written in this version, and belongs to the adapter beside it
        print(f"run card  {folder / 'RUN.md'}\nadapter   {folder / ADAPTER_FOLDER}")
    else:
        said = (
            "; ".join(f"{name}: {how}" for name, how in (seen.notebooks or {}).items()) or "it left no record of itself"
        )
        print(f"not finished ({said}): `medcot kaggle push` goes on from it; its log is in {folder / 'session.log'}")
    return folder


def _fetch(seen: client.Seen, folder: Path, checkpoints: bool) -> tuple[int, int]:
    """Fetches the files that are not there; returns how many were fetched and how many were there."""
    bad = [
        name for name, url in seen.files if not is_inside(folder, name) or not url.startswith(("http://", "https://"))
    ]
    if bad:
        raise MedcotError(f"files would not land in {folder}: {bad}; nothing was fetched")
    fetched = there = 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, url in seen.files:
        # `__output__.json` and its like are Kaggle's own
        if name.startswith("__") or (name.startswith(f"{CHECKPOINTS}/") and not checkpoints):
            continue
        path = folder / name
        if path.is_file():  # whole, as it is renamed only then; and an output never changes under one version
            there += 1
            continue
        print(f"fetching {name}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        for pause in (*client.PAUSES, None):
            try:
                with part.open("wb") as file:
                    file.writelines(_chunks(url))
                break
            except client.Unanswered as error:
                if pause is None:
                    raise MedcotError(
                        f"{name} could not be fetched ({error}): call pull again, which goes on"
                    ) from error
                time.sleep(pause)
        part.replace(path)
        fetched += 1
    return fetched, there


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file name from the server lands below `folder`, links included, and is one on every system."""
    pure = PurePosixPath(name)
    if (
        not name
        or re.search(r"\\|[\0-\x1f]|^[A-Za-z]:", name)
        or pure.is_absolute()
        or str(pure) != name
        or name == "."
    ):
        return False
    return ".." not in pure.parts and (folder / name).resolve().is_relative_to(folder.resolve())


def _chunks(url: str):
    """The bytes of a file. Raises Unanswered if they are fewer than announced or do not come."""
    import requests  # comes with the kaggle package

    got = 0
    try:
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=(10, client.READ_SECONDS), headers=headers) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_content(2**18):
                got += len(chunk)
                yield chunk
            length = answer.headers.get("Content-Length")
    except requests.RequestException as error:
        status = f" {error.response.status_code}" if error.response is not None else ""
        raise client.Unanswered(f"{type(error).__name__}{status}") from error
    if length is not None and got != int(length):
        raise client.Unanswered(f"{got} of {length} bytes came")
