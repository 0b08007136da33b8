"""The hub: which commit a name stands for, and the one place that waits and asks again."""

import os
import time

from .settings import MedcotError, on_kaggle

PAUSES = (2, 8)  # seconds before the second and third attempt


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
        why = _transient(error) or type(error).__name__
        print(f"the hub did not answer ({why}): {name} comes from the local cache")
        return None
    print(f"{kind} {name}: the hub answers, {revision or 'newest'} is commit {commit}")
    return commit


def kaggle_secret(name: str) -> str | None:
    """A secret that is attached to this Kaggle notebook, also put where libraries read it; None without one.

    Never printed. What the environment says already stands.
    """
    if name not in os.environ and on_kaggle():
        try:
            from kaggle_secrets import UserSecretsClient

            os.environ[name] = UserSecretsClient().get_secret(name)
        except Exception:  # an unattached secret raises one of three classes of that package, all meaning "none"
            return None
    return os.environ.get(name)
