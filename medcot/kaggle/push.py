"""One push of the session that runs all three notebooks: asked for once, sent once, and where it stands."""

import json
import tempfile
import time
from pathlib import Path

from ..files import write_beside
from ..settings import MedcotError
from . import client
from .client import Seen
from .metadata import read_metadata
from .stage import SESSION, Staged, owner_of, project, ref, stage

# Seconds before asking again whoever answers "denied" for a kernel that is known to be there.
DENIED = (10, 30, 60, 120)
LAG = 600  # seconds for which Kaggle may show an old state after a push


class Record:
    """build/kaggle/pushed.json: that a push was made, which a server that denies or lags does not tell."""

    def __init__(self, path: Path, ref: str):
        self.path, self.ref = path, ref
        try:
            self.all = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            entry = self.all.get(ref, {"stamp": "", "version": 0, "time": 0.0})
            self.stamp, self.version, self.time = str(entry["stamp"]), int(entry["version"]), float(entry["time"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise MedcotError(f"{path} is damaged ({error}): look at your kernels on Kaggle, then delete it") from error

    def keep(self, stamp: str, version: int):
        """Written before a push is sent (version 0) and again when it was answered."""
        self.stamp, self.version, self.time = stamp, version, time.time()
        self.all[self.ref] = {"stamp": stamp, "version": version, "time": self.time}
        write_beside(self.path, json.dumps(self.all, indent=1) + "\n")


def push(root: Path | None = None, owner: str | None = None, yes=False, offline=False, anew=False):
    """Stages, asks once, pushes the session once, and waits for nothing.

    Called again: finished or still running, nothing is pushed; ended before it was finished, it is pushed with its own
    earlier output attached and goes on from that, unless `anew`. Raises MedcotError for a refusal, and where Kaggle does not say
    whether an earlier push runs.
    """
    root = project() if root is None else Path(root)
    staged = stage(root, owner, offline)[0]
    record = Record(root / "build" / "kaggle" / "pushed.json", staged.ref)
    try:
        state = _look(staged, record)
        if state.does_the_work_of(staged.stamp()) and state.is_finished:
            return print(f"version {state.version} is complete, nothing left to push: `medcot kaggle pull` fetches it")
        if state.version and not state.has_ended:
            if not state.does_the_work_of(staged.stamp()):
                raise MedcotError(
                    f"version {state.version} of {staged.url}, made from another state of this project, is "
                    f"{state.session}: a second session would cost beside it. Nothing was pushed. {_stop(staged)}"
                )
            print(f"version {state.version} is {state.session} already, nothing was pushed")
        else:
            _announce(staged, state, anew)
            _confirm(_doubt(staged, state, record), yes)
            _send(staged, state, record, anew)
    except KeyboardInterrupt:
        raise MedcotError(f"interrupted. What was pushed goes on at Kaggle. {_stop(staged)}") from None
    print(
        "it goes on without this machine; `medcot kaggle status` says where it stands, `medcot kaggle pull` brings it home"
    )
    print(_stop(staged))


def _stop(staged: Staged) -> str:
    return (
        f"To stop it (it costs until it ends, {staged.metadata.limit_hours:g} hours at most): {staged.url}, then Cancel Run; "
        "or View Active Events at the lower left of any Kaggle page"
    )


def _look(staged: Staged, record: Record) -> Seen:
    """`look`, with patience: for a kernel that is known to be there, "denied" does not mean "deleted"."""
    for pause in (*DENIED, None):
        try:
            seen = client.look(staged.ref)
            if seen.session != client.UNKNOWN:
                return seen
            why = f"version {seen.version} is there, its session denied with {seen.message}"
        except client.Refused as error:
            if error.status == 401 or not error.is_denial:
                raise
            if not record.stamp:
                return Seen()
            why = f"it was pushed {_ago(record)}, and now: {error}"
        if pause is not None:
            print(f"{why}; asking again in {pause} s", flush=True)
            time.sleep(pause)
    raise MedcotError(
        f"Kaggle does not say what became of {staged.ref} ({why}): it may be running. Nothing was pushed. See {staged.url}; "
        f"if it is not there, delete {record.path} and push again"
    )


def _ago(record: Record) -> str:
    return f"{(time.time() - record.time) / 60:.0f} minutes ago"


def _doubt(staged: Staged, state: Seen, record: Record) -> str:
    """Why an earlier push may be running although the server does not show it; empty if there is no reason to think so."""
    recent = time.time() - record.time < LAG
    if (
        record.stamp
        and record.stamp != state.stamp
        and (state.version < record.version or (recent and not record.version))
    ):
        return f"a push of {_ago(record)} is not among what Kaggle shows (version {state.version})"
    if state.stamp and state.notebooks is None and recent:
        return (
            f"version {state.version}, pushed {_ago(record)}, may not have begun: Kaggle shows an earlier session's end"
        )
    return ""


def _confirm(doubt: str, yes: bool):
    if doubt:
        print(f"{doubt}. A second push starts a second session, and both cost", flush=True)
    try:
        answer = "y" if yes and not doubt else input("Push? [y/N] ")
    except EOFError:  # no terminal to ask on
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise MedcotError(f"not pushed: {doubt or 'answer y, or give --yes'}")


def _announce(staged: Staged, state: Seen, anew: bool):
    kernel, who = staged.metadata, "private" if staged.metadata.is_private else "PUBLIC"
    print(f"{staged.url} ({who}, {kernel.machine_shape}, internet {'on' if kernel.enable_internet else 'off'})")
    try:
        quota = client.ask("quota")
        used = "" if quota["allowed"] is None else f"; {quota['used']:.1f} of {quota['allowed']:.0f} hours are used"
    except MedcotError as error:
        used = f"; how much is used is not known ({error})"
    print(f"expected use of the weekly GPU quota: about {kernel.hours:g} hours, at most {kernel.limit_hours:g}{used}")
    if state.version:
        goes_on = "all begins anew" if anew else "its output is attached, and the session goes on from it"
        print(f"version {state.version} there ended ({_how(state)}): {goes_on}")
    print("a pushed notebook gets no Kaggle secrets: wandb stays offline and its files come home")


def _send(staged: Staged, state: Seen, record: Record, anew: bool):
    """Sends once. Raises MedcotError for all that is no version; an answer that is lost is asked for, not sent again."""
    stamp = staged.stamp(state.version)
    limit = round(3600 * staged.metadata.limit_hours)
    before = record.stamp, record.version
    record.keep(stamp, 0)
    with tempfile.TemporaryDirectory() as scratch:  # nobody writes there between the check and the push
        folder = staged.write(Path(scratch, "kernel"), after=state.version, anew=anew)
        try:
            answer = client.call("push", client.PUSH_SECONDS, folder=str(folder), ref=staged.ref, limit_seconds=limit)
        except client.Unanswered as error:
            print(f"{error}; asking whether the push arrived", flush=True)
            if not (version := _arrived(staged.ref, stamp, error.wait)):
                raise MedcotError(
                    f"{error}. Kaggle does not show this push: look at {staged.url} before you push again"
                ) from error
            answer = {"version": version, "error": None, "invalid": {}}
        except client.Refused as error:
            record.keep(*before)
            raise _with_cure(staged, error) from error
    if answer["error"] or not answer["version"]:
        record.keep(*before)
        full = "session count" in (answer["error"] or "").lower()  # "Maximum batch GPU session count of 2 reached."
        cure = "Wait until one of your sessions has ended, then push again" if full else "Mend that and push again"
        raise MedcotError(f"Kaggle did not take {staged.ref}: {answer['error'] or 'it named no version'}. {cure}")
    record.keep(stamp, answer["version"])
    print(f"version {answer['version']} successfully pushed, {staged.url}", flush=True)
    _check_sources(staged, answer["invalid"])


def _check_sources(staged: Staged, invalid: dict):
    if staged.ref in invalid.get("kernel", ()):
        print(f"but its own earlier output was not attached: it starts from the beginning. {_stop(staged)}")
        invalid = invalid | {"kernel": [ref for ref in invalid["kernel"] if ref != staged.ref]}
    if inputs := "; ".join(f"{kind}: {', '.join(sources)}" for kind, sources in invalid.items() if sources):
        raise MedcotError(
            f"Kaggle took it without these inputs ({inputs}): check their names and that {staged.owner} may see them. "
            f"{_stop(staged)}; then push again"
        )


def _arrived(ref: str, stamp: str, wait: float) -> int:
    """The version that carries this stamp, which no other push has; 0 if Kaggle does not show it."""
    for pause in client.PAUSES:
        time.sleep(max(pause, wait))
        try:
            source = client.ask("source", ref=ref)
        except (client.Refused, client.Unanswered):
            continue
        if source["stamp"] == stamp:
            return source["version"]
    return 0


def _with_cure(staged: Staged, error: client.Refused) -> MedcotError:
    cures = {
        403: f"check that {staged.owner!r} is your user name, and that your phone number is verified at "
        "https://www.kaggle.com/settings, without which there is neither GPU nor internet",
        409: f"another notebook of yours may have the title {staged.client_metadata()['title']!r}: rename or delete it, then push again",
    }
    cure = cures.get(error.status)
    return MedcotError(f"{staged.ref}: {error}: {cure}") if cure else MedcotError(f"{staged.ref}: {error}")


def _how(seen: Seen) -> str:
    """Where a kernel stands, in words."""
    notebooks = (f"{name} {how}" for name, how in (seen.notebooks or {}).items())
    return ", ".join(filter(None, [seen.session, seen.message, *notebooks]))


def status(root: Path | None = None, owner: str | None = None):
    """Prints where the session and each notebook's own kernel stand; changes nothing."""
    metadata = read_metadata(project() if root is None else Path(root))
    owner = owner_of(metadata, owner)
    for name in (SESSION, *(Path(notebook).stem for notebook in metadata.notebooks)):
        address = ref(owner, metadata, name)
        try:
            seen = client.look(address)
            words = f"version {seen.version}, {_how(seen)}"
            if name == SESSION and seen.has_ended and seen.notebooks is None:
                words += ", no output of this version yet"
        except client.Refused as error:
            if error.status == 401 or not error.is_denial:
                raise
            words = "not pushed, or not to be seen"
        print(f"{words:<40}https://www.kaggle.com/code/{address}")
