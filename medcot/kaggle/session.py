"""What happens inside a Kaggle session: the first cell, what is attached, and the three notebooks one after the other."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from ..files import write_beside
from ..settings import NOTICE, MedcotError, kaggle_root
from .inputs import (
    CHECKPOINTS,
    MEASURED,
    SESSION_FILE,
    TRAINED,
    TRAINING,
    Inputs,
    copy,
    link,
    model_forecast,
    only,
    take_measured,
    take_training,
)  # fmt: skip

NOTEBOOKS = ("01_baseline", "02_finetune", "03_compare")
_MARKS = re.compile(r"(Executing|Ending) Cell \d+-+$|\[IPKernelApp\] WARNING")  # what papermill says of itself
SPARE_MINUTES = 20  # before a session's end training stops; 10 before it, whatever runs


def install(exact, if_absent, at_least, internet=True, payload=""):
    """Installs what the image lacks, at the locked versions and without touching its torch; unpacks medcot itself.

    Wheels found among the inputs are used; without internet they are the only source. `stage` copies this function
    into the notebook, where there is no medcot yet: it stands on the standard library alone. Without `payload`, a
    zip archive in base64, the medcot that runs this is used (Colab, one's own GPU).
    """
    import base64
    import importlib
    import io
    import os
    import re
    import subprocess
    import sys
    import tempfile
    import time
    import zipfile
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    root = Path(os.environ.get("MEDCOT_KAGGLE_ROOT", "/kaggle"))
    if payload and ("KAGGLE_KERNEL_RUN_TYPE" not in os.environ or not (root / "working").is_dir()):
        raise RuntimeError("this copy of the notebook is for Kaggle: anywhere else open the one in notebooks/")

    def installed(name):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return None

    def is_older(name, least):
        numbers = [[int(part) for part in re.findall(r"\d+", text)[:3]] for text in (installed(name) or "0", least)]
        return numbers[0] < numbers[1]

    if is_older("torch", "2.10"):
        raise RuntimeError(f"torch 2.10 or newer is needed, here is {installed('torch')}: take the newest image")
    wanted = [f"{name}=={pin}" for name, pin in exact.items() if installed(name) != pin]
    wanted += [f"{name}=={pin}" for name, pin in if_absent.items() if installed(name) is None]
    wanted += [f"{name}=={pin}" for name, (least, pin) in at_least.items() if is_older(name, least)]
    if wanted:
        places, begun = [], time.monotonic()
        for path, _, names in os.walk(root / "input"):
            places += [path] if any(name.endswith(".whl") for name in names) else []
            if time.monotonic() - begun > 120:
                print(f"looking for wheels reached {path} after two minutes and stopped: detach what is not needed")
                break
        links = [argument for folder in sorted(places) for argument in ("--find-links", folder)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--progress-bar=off"]
        command += ["--disable-pip-version-check", *links, *([] if internet else ["--no-index"]), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise RuntimeError(
                f"{', '.join(wanted)} could not be installed for Python {sys.version.split()[0]}: switch the session's "
                f"internet on, or attach a data set that holds their wheels ({', '.join(places) or 'none found'})\n"
                f"pip said: {(done.stderr or done.stdout)[-2000:]}"
            )
    if payload:
        library = Path(tempfile.mkdtemp(prefix="medcot-"))
        zipfile.ZipFile(io.BytesIO(base64.b64decode(payload))).extractall(library)
        sys.path.insert(0, str(library))
        # For the processes that are started from here.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(library), os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    print(
        f"installed {', '.join(wanted) or 'nothing'}; Python {sys.version.split()[0]}, torch {installed('torch')} stay"
    )


# --- the first cell, once medcot is there ------------------------------------------------------------------------------


def prepare_session(settings=None, internet=True, takes=(), stamp="", limit_hours=12.0):
    """Makes a Kaggle session ready for the notebooks: where files go, the model, the rows, the earlier results.

    Results go to /kaggle/working, caches to the temporary folder, which is large and not kept. `takes` names the
    notebooks whose results are needed; the session that runs all three (`stamp` without `takes`) goes on from its own
    earlier output. Raises MedcotError with everything that is missing or ambiguous, before any GPU time is spent.
    """
    working, scratch = kaggle_root() / "working", Path(tempfile.gettempdir(), "medcot")
    scratch.mkdir(exist_ok=True)
    os.environ.update(settings or {})
    os.environ["MEDCOT_OUT"] = str(working)
    os.environ["MEDCOT_SESSION_MINUTES"] = f"{60 * limit_hours - SPARE_MINUTES:g}"
    os.environ["HF_HOME"] = str(scratch / "huggingface")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "unsloth_compiled_cache")
    if internet:
        from ..hub import kaggle_secret

        kaggle_secret("HF_TOKEN")
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"  # fail at once instead of after many attempts to connect
    run_type = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "").lower() or "unknown"
    print(f"Kaggle session ({run_type}), results in {working}, caches in {scratch}", flush=True)
    inputs, wrong = Inputs.below(kaggle_root() / "input"), []
    if model := only(inputs.models(), "config.json", wrong, "MEDCOT_MODEL"):
        os.environ["MEDCOT_MODEL"] = str(link(model, scratch))
        print(model_forecast(model), flush=True)
    for variable, found in (("MEDCOT_DATASET", inputs.rows), ("MEDCOT_CHOICES", inputs.questions)):
        if variable not in os.environ and (table := only(found(), "", wrong, variable)):
            os.environ[variable] = str(table)
            print(f"{variable}: {table}")
    if "01_baseline" in takes:
        take_measured(inputs, working, wrong)
    if "02_finetune" in takes:
        take_training(inputs, working, wrong)
    if wrong:
        raise MedcotError("; ".join(wrong))
    if stamp and not takes:
        _begin(inputs, working, stamp, limit_hours)


# --- the session that runs all three -----------------------------------------------------------------------------------


def read_session(path: Path) -> dict:
    """What a session says of itself: `stamp`, `started`, `limit_hours`, `notebooks` (name -> how it ended); {} if nothing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) and isinstance(record.get("notebooks"), dict) else {}
    except (OSError, ValueError):
        return {}


def _begin(inputs: Inputs, working: Path, stamp: str, limit_hours: float):
    """Takes over what an earlier session left, unless it is of another run; what the same code has done is not done again."""
    earlier = [(record, path.parent) for path in inputs.places(SESSION_FILE) if (record := read_session(path))]
    done = {}
    if earlier:
        record, folder = max(earlier, key=lambda pair: pair[0].get("started", 0))
        new = [name for name in (MEASURED, CHECKPOINTS) if not (working / name).exists()]
        for name in new:
            copy(folder / name, working / name)
        if record.get("stamp", "").split()[:2] == stamp.split()[:2]:
            done = {name: how for name, how in record["notebooks"].items() if how == "done" and name in NOTEBOOKS[:2]}
            if "02_finetune" in done:
                for name in TRAINED:
                    copy(folder / name, working / name)
            for name in done:
                copy(folder / "notebooks" / f"{name}.ipynb", working / "notebooks" / f"{name}.ipynb")
        elif reason := _other_run():
            for name in new:
                shutil.rmtree(working / name, ignore_errors=True)
            os.environ["MEDCOT_EARLIER"] = tempfile.mkdtemp(prefix="medcot-nothing-")
            print(f"begins anew: {reason}")
        print(f"found {folder}" + "".join(f"; {name} is done" for name in done))
    record = {"stamp": stamp, "started": time.time(), "limit_hours": limit_hours, "notebooks": done}
    write_beside(working / SESSION_FILE, json.dumps(record, indent=1) + "\n")


def _other_run() -> str:
    """Why the settings refuse what was taken over (a changed recipe, another model); empty if they do not.

    Asked in a process of its own, which gives back the memory that torch takes.
    """
    command = [sys.executable, "-c", "from medcot.settings import load_settings; load_settings()"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [""])[-1].partition(". Set that back")[0]
    return last if done.returncode and "is of another run" in last else ""


def run_notebook(name: str):
    """Runs one notebook in a process of its own (papermill), so that memory is given back, showing what it prints.

    Never raises for a notebook that fails: the session ends by itself, and so what was made is kept. Not run: what an
    earlier session did already, what comes after a failure, and what would begin in the session's last quarter hour.
    """
    working, record = kaggle_root() / "working", read_session(kaggle_root() / "working" / SESSION_FILE)
    ended = record["notebooks"]
    seconds = record["started"] + 3600 * record["limit_hours"] - 30 * SPARE_MINUTES - time.time()
    if ended.get(name) == "done":
        return print(f"{name}: done by an earlier session")
    if stopped := next((other for other in NOTEBOOKS if ended.get(other, "done") != "done"), None):
        return print(f"{name}: not run, as {stopped} did not end: {ended[stopped]}")
    if seconds < 300:
        how = "no time left in this session"
    else:
        status, last = _papermill(name, working, seconds)
        how = f"stopped with status {status}: {last}" if status else _how_02_ended(name, working)
    record["notebooks"][name] = how
    write_beside(working / SESSION_FILE, json.dumps(record, indent=1) + "\n")
    print(f"=== {name}: {how} ===", flush=True)


def _how_02_ended(name: str, working: Path) -> str:
    """ "done", unless training stopped in time before the end of the session."""
    if name == "02_finetune":
        training = json.loads((working / TRAINING).read_text(encoding="utf-8"))
        steps, wanted = training["steps"], training.get("max_steps") or training["settings"]["max_steps"]
        if steps < wanted:
            return f"training stopped in time at step {steps} of {wanted}, push again to go on"
    return "done"


def _papermill(name: str, working: Path, seconds: float) -> tuple[int, str]:
    """Runs a notebook for at most `seconds`: (exit status, last line); what papermill logs is shown without its prefix."""
    target = working / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(exist_ok=True)
    source = Path(__file__).parents[2] / "notebooks" / f"{name}.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(target),
        "--kernel",
        "python3",
        "--cwd",
        str(working),
    ]
    command += ["--log-output", "--no-progress-bar", "--autosave-cell-every", "30"]
    print(f"=== {name} ===", flush=True)
    environment = os.environ | {"WANDB_NOTEBOOK_NAME": f"{name}.ipynb", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
        bufsize=1,
    )
    timer = threading.Timer(seconds, _kill, (process,))
    timer.start()
    last, shown = "", 0.0
    with process:
        for line in process.stdout:
            line = line.rstrip("\n").rpartition("\r")[2]  # the last state of a progress bar
            if not line.strip() or _MARKS.match(line):
                continue
            last = line.strip()
            if "%|" not in line or time.monotonic() - shown > 10:  # a progress bar, every ten seconds
                shown = time.monotonic()
                print(line, flush=True)
    timer.cancel()
    return process.returncode, last[:300]


def _kill(process):
    import psutil

    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()


def show_results():
    """Ends the session's page: the headline, the figures, links to the executed notebooks; or what stopped and the cure."""
    from IPython.display import Image, Markdown, display

    working = kaggle_root() / "working"
    ended = read_session(working / SESSION_FILE)["notebooks"]
    links = [f"- [{name}](notebooks/{name}.ipynb): {ended.get(name, 'not run')}" for name in NOTEBOOKS]
    if ended.get("03_compare") == "done":
        title = f"# {headline(working)}"
    else:
        title = "# Not finished\n\nWhat was made is kept. Push again (`medcot kaggle push`), or attach this notebook's output"
        title += " to itself and Save Version once more: it goes on from here."
    display(Markdown("\n".join([title, "", *links, "", NOTICE])))
    for path in sorted((working / "figures").glob("*.png")):
        display(Markdown(f"**{path.stem}**"), Image(filename=str(path)))


def headline(folder: Path) -> str:
    """The sentence that sums a run up, from comparison.json: its own, else that of its first measure."""
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return str(
        comparison.get("headline") or next((m["sentence"] for m in comparison.get("measures", [])), "no measure")
    )
