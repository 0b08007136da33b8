"""Talking to Kaggle through its own client, in a child process, and what its answers mean."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..settings import MedcotError
from .inputs import SESSION_FILE
from .session import NOTEBOOKS

ENDED = ("complete", "error", "cancel_acknowledged")  # Kaggle's words for a session that is over
UNKNOWN = "unknown"  # ours, where the kernel is shown and its session is denied
DENIALS = (401, 403, 404)

READ_SECONDS, PUSH_SECONDS = 60, 180  # how long one call may take before it counts as lost
PAUSES = (3, 15, 60)  # seconds before a question is asked again
_NO_PACKAGE = "the kaggle package cannot be imported ({}): pip install kaggle==2.2.4 six"


class Unanswered(MedcotError):
    """No answer came: whether the call took effect is not known. `wait`: seconds that the server asked for (429)."""

    wait = 0.0


class Refused(MedcotError):
    """Kaggle said no; `status` is that of the answer."""

    status = None

    @property
    def is_denial(self) -> bool:
        """Not there, not ours, or not logged in: Kaggle answers so for all three, and at times while a session runs."""
        return self.status in DENIALS


def call(verb: str, seconds: float = READ_SECONDS, **arguments) -> dict:
    """One call of the official client in a child process, and its answer. Raises Unanswered or Refused.

    Its Python API and not its command line, because the command line hides part of a push's answer (invalid model
    sources) and says success by exit code even where it failed. In a child, because the package logs in over the
    network while it is imported, may call exit, prints, and waits without limit for a server that does not answer.
    """
    # These two make the client print its requests, credentials included.
    environment = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
    # In a clone that is not installed too.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", "-c", "from medcot.kaggle.client import child; child()"]
    try:
        request = json.dumps({"verb": verb} | arguments)
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=seconds, env=environment)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise Unanswered(
            f"Kaggle did not answer ({verb}) within {seconds} s: check the network, then call again"
        ) from error
    except ValueError as error:
        raise MedcotError(f"the kaggle client broke off ({verb}): {done.stderr.strip().splitlines()[-1:]}") from error
    if answer.get("failure"):
        raise _failed(verb, arguments.get("ref", ""), answer)
    return answer


def _failed(verb, ref, answer) -> MedcotError:
    failure, message, status = (answer.get(key) for key in ("failure", "message", "status"))
    if failure == "package":
        return MedcotError(_NO_PACKAGE.format(message))
    if failure == "connection" or status == 429 or (status or 0) >= 500:
        error = Unanswered(f"no usable answer from Kaggle ({verb}): {message}. Check the network, then call again")
        error.wait = answer.get("wait") or 0.0
        return error
    if failure == "credentials" or status == 401:
        error = Refused(
            "Kaggle knows no credentials or refuses them: `kaggle auth login`, or a new token (which lasts longer) from "
            "https://www.kaggle.com/settings/api in ~/.kaggle/access_token or KAGGLE_API_TOKEN"
        )
    else:
        error = Refused(f"Kaggle refused {verb} of {ref} ({status or 'invalid'}): {message}")
    error.status = status or (401 if failure == "credentials" else None)
    return error


def ask(verb: str, **arguments) -> dict:
    """`call` for what may be asked again: after each of `PAUSES`, or later where the server says when."""
    for pause in PAUSES:
        try:
            return call(verb, **arguments)
        except Unanswered as error:
            pause = max(pause, error.wait)
            print(f"{error} (trying again in {pause:.0f} s)", flush=True)
            time.sleep(pause)
    return call(verb, **arguments)


def user_name() -> str | None:
    """The user name that the credentials belong to; None without credentials."""
    try:
        return ask("user")["user"]
    except Refused:
        return None


@dataclass(frozen=True)
class Seen:
    """A kernel as the server shows it."""

    version: int = 0
    """The newest version's number; 0 if there is no such kernel."""
    stamp: str = ""
    """In the newest version's source; empty if that is none of ours."""
    session: str = ""
    """Kaggle's word for the latest session, which just after a push may be the one before."""
    message: str = ""
    files: list = field(default_factory=list)
    """(name, address) of each file of its output."""
    log: str = ""
    record: dict = field(default_factory=dict)
    """The session.json of that output."""

    @property
    def has_ended(self) -> bool:
        """Whether the latest session is over."""
        return self.session in ENDED

    @property
    def notebooks(self) -> dict | None:
        """How each notebook ended, if the output is that of the newest version; None if not, or not there yet."""
        return self.record["notebooks"] if self.record and self.record.get("stamp") == self.stamp else None

    @property
    def is_finished(self) -> bool:
        """Whether all three notebooks ran, in the newest version or before it."""
        return bool(self.notebooks) and self.notebooks.get(NOTEBOOKS[-1]) == "done"

    def does_the_work_of(self, stamp: str) -> bool:
        """Whether the newest version has the same code, notebooks and settings."""
        return self.stamp.split()[:2] == stamp.split()[:2]


def look(ref: str) -> Seen:
    """Asks about a kernel. Raises Refused for a denial, which says nothing about what is there."""
    seen = Seen(**ask("look", ref=ref))
    return replace(seen, log=_log_text(seen.log))


def _log_text(log: str) -> str:
    """A session log as text: Kaggle sends a JSON list of pieces, each with its stream and time."""
    try:
        return "".join(piece["data"] for piece in json.loads(log))
    except (ValueError, TypeError, KeyError):
        return log


# --- the child process -------------------------------------------------------------------------------------------------


def child():
    """One request as JSON on standard input, one answer as JSON on standard output."""
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
        if (behind := _behind(error)) is not None:
            wait = api._get_retry_after_delay(behind)
            return {"failure": "http", "status": behind.status_code, "message": str(error), "wait": wait}
        if isinstance(error, ValueError) and not isinstance(error, requests.RequestException):
            return {"failure": "invalid", "message": str(error)}
        return {"failure": "connection", "message": f"{type(error).__name__}: {error}"}


def _behind(error):
    """The HTTP answer behind an error, which the client wraps at times in a ValueError of its own; None without one."""
    return next(
        (answer for e in (error, error.__context__) if (answer := getattr(e, "response", None)) is not None), None
    )


def _user(api):
    return {"user": api.get_config_value(api.CONFIG_NAME_USER)}


def _quota(api):
    gpu = api.quota_view().gpu_quota
    hours = [None, None] if gpu is None else [t.total_seconds() / 3600 for t in (gpu.time_used, gpu.total_time_allowed)]
    return {"used": hours[0], "allowed": hours[1]}


def _push(api, folder, ref, limit_seconds):
    response = api.kernels_push(folder, str(limit_seconds))
    kinds = ("dataset", "competition", "kernel", "model")
    invalid = {kind: list(getattr(response, f"invalid_{kind}_sources")) for kind in kinds}
    return {
        "version": response.version_number,
        "error": response.error,
        "invalid": {kind: sources for kind, sources in invalid.items() if sources},
    }


def _source(api, ref):
    """The newest version's number, and the stamp in its source ("" if it is none of ours)."""
    from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

    request = ApiGetKernelRequest()
    request.user_name, request.kernel_slug = ref.split("/")
    with api.build_kaggle_client() as client:
        response = client.kernels.kernels_api_client.get_kernel(request)
    stamp = re.search(r"medcot-staged [0-9a-f]{64} after-version-\d+", response.blob.source or "")
    return {"version": response.metadata.current_version_number or 1, "stamp": stamp[0] if stamp else ""}


def _look(api, ref):
    """The fields of `Seen`."""
    seen = _source(api, ref)
    try:
        response = api.kernels_status(ref)
    except Exception as error:
        if (behind := _behind(error)) is None or behind.status_code not in DENIALS:
            raise
        return seen | {"session": UNKNOWN, "message": f"status {behind.status_code}"}
    seen |= {"session": response.status.name.lower(), "message": response.failure_message or ""}
    if seen["session"] in ENDED:
        seen["files"], seen["log"] = _output(api, ref)
        seen["record"] = _record(dict(seen["files"]).get(SESSION_FILE))
    return seen


def _output(api, ref):
    from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

    files, token, log = [], "", ""
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
    return files, log


def _record(url) -> dict:
    """What the session said of itself; {} if it said nothing that can be read."""
    import requests

    if not url:
        return {}
    answer = requests.get(url, timeout=READ_SECONDS / 3)
    answer.raise_for_status()
    try:
        record = answer.json()
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("notebooks"), dict) else {}


_VERBS = {"user": _user, "quota": _quota, "push": _push, "source": _source, "look": _look}
