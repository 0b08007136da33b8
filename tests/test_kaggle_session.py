"""Inside Kaggle: the first cell, what is attached, and one session that runs all three notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medcot.kaggle import inputs as inputs_room
from medcot.kaggle import session as room
from medcot.kaggle.inputs import Inputs, model_forecast
from medcot.kaggle.session import install, prepare_session, run_notebook, show_results
from medcot.settings import ADAPTER_FOLDER, EMBEDDED_MODEL, MedcotError

STAMP = "medcot-staged " + "ab" * 32 + " after-version-0"
TAKES = ("01_baseline", "02_finetune")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """An empty Kaggle session of this process: its root folder."""
    root = tmp_path / "kaggle"
    (root / "working").mkdir(parents=True)
    (root / "input").mkdir()
    names = ("MODEL", "DATASET", "CHOICES", "OUT", "SESSION_MINUTES")
    for name in (*(f"MEDCOT_{n}" for n in names), "HF_HOME", "HF_TOKEN", "UNSLOTH_COMPILE_LOCATION", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what the session sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(root))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(tmp_path))
    return root


def write(folder, **files):
    """Writes files, "a__b.json" as a/b.json."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def put_results(folder, seed="1", **more):
    """What 01 and 02 leave, as far as telling it apart needs it."""
    names = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
    adapter = {f"{ADAPTER_FOLDER}__{name}": seed for name in names}
    files = {"measured__baseline-1.jsonl": seed, "training.json": json.dumps({"steps": 6, "seed": seed})}
    write(folder, **adapter, **files, figures__loss="png", wandb__run="r", **more)


def found(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the first cell ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch):
    """The commands that would have been run."""
    commands = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    return commands


def test_the_stack_is_pinned_the_rest_kept_and_torch_never_touched(session, pip, capsys):
    at_least = {"pyarrow": ("999.0.0", "999.1"), "pandas": ("0.1", "9"), "no-such": ("1", "2")}
    install({"pytest": "0.1"}, {"ruff": "0.1", "nothing-like": "2"}, at_least)
    [command] = pip
    assert command[-4:] == ["pytest==0.1", "nothing-like==2", "pyarrow==999.1", "no-such==2"]
    assert "--no-deps" in command and "--no-input" in command
    assert f"Python {sys.version.split()[0]}, torch" in capsys.readouterr().out


def test_with_everything_there_nothing_is_installed_and_no_input_is_walked(session, pip, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda _: pytest.fail("a mount can take minutes to walk"))
    install({}, {"ruff": "0"}, {})
    assert not pip


def test_an_image_with_an_older_torch_is_named(session, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.9.1+cu128")
    with pytest.raises(RuntimeError, match=r"torch 2\.10 or newer is needed, here is 2\.9\.1"):
        install({}, {}, {})


def test_outside_kaggle_the_staged_notebook_refuses_to_install(session, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    with pytest.raises(RuntimeError, match="this copy of the notebook is for Kaggle"):
        install({}, {}, {}, payload="eA==")


def test_without_internet_and_wheels_the_first_cell_says_what_to_attach(session):
    words = r"medcot-no-such==1\.0 could not be installed for Python 3.*: switch .*attach a data set.*none found"
    with pytest.raises(RuntimeError, match=words):
        install({"medcot-no-such": "1.0"}, {}, {}, internet=False)


# --- what is attached ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["medcot-run", "notebooks/anna/medcot-run", "a/b/c/d"])
def test_earlier_results_are_found_by_name_wherever_they_are_mounted(session, mount):
    put_results(session / "input" / mount, checkpoints__x="large")
    prepare_session(takes=TAKES)
    adapter = [
        f"{ADAPTER_FOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    ]
    rest = ["figures/loss", "measured/baseline-1.jsonl", "training.json", "wandb/run"]
    assert found(session / "working") == sorted([*adapter, *rest])
    assert os.environ["MEDCOT_OUT"] == str(session / "working")
    assert not os.environ["HF_HOME"].startswith(str(session)), "caches stay out of what is kept"


def test_an_adapter_and_its_record_come_from_one_folder(session):
    put_results(session / "input" / "one")
    (session / "input" / "one" / "training.json").unlink()
    write(session / "input" / "two", **{"training.json": "{}"})
    with pytest.raises(MedcotError, match=r"with training\.json of 02_finetune is not among the inputs"):
        prepare_session(takes=TAKES)


def test_the_same_results_twice_are_one_and_different_ones_are_refused(session):
    put_results(session / "input" / "one")
    put_results(session / "input" / "notebooks" / "anna" / "one")
    prepare_session(takes=TAKES)
    shutil.rmtree(session / "working")
    put_results(session / "input" / "other", seed="2")
    with pytest.raises(MedcotError) as caught:
        prepare_session(takes=TAKES)
    assert str(caught.value).count("2 different inputs of one kind") == 2


def test_all_that_is_missing_is_named_before_any_gpu_time_is_spent(session):
    with pytest.raises(MedcotError) as caught:
        prepare_session(takes=TAKES)
    assert str(caught.value).count("is not among the inputs: run that notebook first and attach its output") == 2


def test_model_rows_and_questions_are_found_as_they_are_attached(session, capsys):
    data = session / "input" / "datasets" / "anna" / "offline"
    mount = session / "input" / "models/deepseek-ai/deepseek-r1/transformers/deepseek-r1-distill-llama-8b/2"
    shutil.copytree(EMBEDDED_MODEL, mount)
    write(data, **{
        "train.jsonl": '{"Question": "q", "Complex_CoT": "c", "Response": "r"}\n',
        "medqa.jsonl": '{"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}\n',
        "other.jsonl": '{"question": "q"}\n',
    })  # fmt: skip
    (data / "__output__.json").write_text('{"Question": 1, "Complex_CoT": 2, "Response": 3}')
    prepare_session(internet=False)
    link = Path(os.environ["MEDCOT_MODEL"])
    assert link.resolve() == mount.resolve() and not link.is_relative_to(session)
    assert os.environ["MEDCOT_DATASET"] == str(data / "train.jsonl")
    assert os.environ["MEDCOT_CHOICES"] == str(data / "medqa.jsonl")
    printed = capsys.readouterr().out
    assert "nothing to download" in printed and "GiB of the GPU once loaded in 4 bits" in printed


def test_rows_of_both_kinds_in_real_files(session):
    """Rows of two tables that share columns: a medical-o1 file with its question, and questions with `choices`."""
    import datasets

    rows = {"Question": ["q"] * 3, "Complex_CoT": ["c"] * 3, "Response": ["r"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(session / "input" / "rows.parquet")
    write(
        session / "input",
        **{"q.jsonl": '{"question": "Question Complex_CoT Response", "choices": ["a", "b"], "answer": 0}\n'},
    )
    both = '{"Question": "q", "Complex_CoT": "c", "Response": "r", "question": "q", "options": {"A": "a"}, "answer_idx": "A"}\n'
    write(session / "input", **{"both.jsonl": both, "training.json": '{"Question": 1, "Response": 2}'})
    inputs = Inputs.below(session / "input")
    assert inputs.rows() == [session / "input" / "both.jsonl", session / "input" / "rows.parquet"]
    assert inputs.questions() == [session / "input" / "q.jsonl"], "rows that carry a question train"


def test_a_mount_that_takes_minutes_is_named(session, monkeypatch, capsys):
    put_results(session / "input" / "one")
    clock = iter(range(0, 10_000, 90))
    monkeypatch.setattr(inputs_room, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(
        MedcotError, match=r"looking through .* took 360 s and reached .*: detach the inputs that are not"
    ):
        Inputs.below(session / "input")
    assert "looking through" in capsys.readouterr().out


def test_the_forecast_of_an_attached_model(tmp_path, monkeypatch):
    """The 8B as Kaggle Models has it: two files of 16-bit weights, 8.7 and 7.4 GB (sparse here)."""
    (tmp_path / "config.json").write_text("{}")
    for name, size in (("model-1.safetensors", 8_667_000_000), ("model-2.safetensors", 7_394_000_000)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    memory = {"SC_AVPHYS_PAGES": 29 * 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", memory.get)
    said = model_forecast(tmp_path)
    assert "15.0 GiB, nothing to download" in said and "8.1 GiB of 29 GiB" in said and "5.4 GiB of the GPU" in said
    memory["SC_AVPHYS_PAGES"] = 7 * 2**18
    with pytest.raises(MedcotError, match=r"largest file has 8\.1 GiB and 7\.0 GiB of memory are free"):
        model_forecast(tmp_path)


def test_a_secret_is_read_when_attached_and_nothing_happens_without(session, monkeypatch, capsys):
    prepare_session()  # there is no kaggle_secrets here at all
    assert "HF_TOKEN" not in os.environ
    client = SimpleNamespace(get_secret=lambda name: "hf-not-a-real-token" if name == "HF_TOKEN" else None)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=lambda: client))
    prepare_session(internet=False)
    assert "HF_TOKEN" not in os.environ, "no use for it without internet"
    prepare_session()
    assert os.environ["HF_TOKEN"] == "hf-not-a-real-token"
    assert "hf-not-a-real-token" not in capsys.readouterr().out


# --- the session that runs all three -------------------------------------------------------------------------------------


def state(session):
    return json.loads((session / "working" / "session.json").read_text())["notebooks"]


@pytest.fixture
def notebooks(monkeypatch):
    """Notebooks that end as told without being run: name -> (status, last line)."""
    ends, ran = {}, []
    monkeypatch.setattr(room, "_papermill", lambda name, *_: ran.append(name) or ends.get(name, (0, "")))
    return SimpleNamespace(ends=ends, ran=ran)


def run_all(session, steps=6, stamp=STAMP):
    prepare_session(stamp=stamp, limit_hours=5.0)
    write(session / "working", **{"training.json": json.dumps({"steps": steps, "settings": {"max_steps": 6}})})
    for name in room.NOTEBOOKS:
        run_notebook(name)


def attach(session):
    """The output so far as an earlier one, and an empty folder for the next session."""
    shutil.move(session / "working", session / "input" / "notebooks" / "anna" / "medcot-session")
    (session / "working").mkdir()


def test_a_failure_in_02_leaves_what_01_made_and_the_next_session_goes_on(session, notebooks, capsys):
    notebooks.ends["02_finetune"] = (1, "RuntimeError: CUDA out of memory")
    prepare_session(stamp=STAMP, limit_hours=5.0)
    put_results(session / "working", **{"checkpoints__checkpoint-3__x": "c", "notebooks__01_baseline.ipynb": "{}"})
    for name in room.NOTEBOOKS:
        run_notebook(name)
    assert notebooks.ran == ["01_baseline", "02_finetune"]
    assert state(session) == {
        "01_baseline": "done",
        "02_finetune": "stopped with status 1: RuntimeError: CUDA out of memory",
    }
    assert "03_compare: not run, as 02_finetune did not end" in capsys.readouterr().out
    attach(session)
    notebooks.ends.clear(), notebooks.ran.clear()
    run_all(session, stamp=STAMP.replace("version-0", "version-1"))
    assert notebooks.ran == ["02_finetune", "03_compare"], "the same work: 01 is not run again"
    assert state(session) == dict.fromkeys(room.NOTEBOOKS, "done")
    kept = found(session / "working")
    assert {"measured/baseline-1.jsonl", "checkpoints/checkpoint-3/x", "notebooks/01_baseline.ipynb"} <= set(kept)
    assert f"{ADAPTER_FOLDER}/tokenizer.json" not in kept, "an adapter of a notebook that failed is not taken over"


def test_other_work_takes_over_only_what_is_checked_where_it_is_read(session, notebooks):
    run_all(session)
    put_results(session / "working", checkpoints__x="c")
    attach(session)
    notebooks.ran.clear()
    run_all(session, stamp=STAMP.replace("ab", "cd"))
    assert notebooks.ran == list(room.NOTEBOOKS)
    assert found(session / "working") == ["checkpoints/x", "measured/baseline-1.jsonl", "session.json", "training.json"]


def test_a_session_with_another_recipe_begins_anew_and_says_why(session, notebooks, monkeypatch, capsys):
    """What was measured and trained by another recipe would be refused by the first cell of 01 and again by 02."""
    monkeypatch.setenv("MEDCOT_EARLIER", "")
    run_all(session)
    put_results(session / "working", checkpoints__x="c")
    attach(session)
    refused = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nMedcotError: x.jsonl is of another run: max_steps was 60\n"
    )
    monkeypatch.setattr(room.subprocess, "run", lambda *_, **__: refused)
    run_all(session, stamp=STAMP.replace("ab", "cd"))
    assert found(session / "working") == ["session.json", "training.json"]
    assert not list(Path(os.environ["MEDCOT_EARLIER"]).iterdir())
    assert "begins anew: MedcotError: x.jsonl is of another run: max_steps was 60" in capsys.readouterr().out


def test_what_02_finished_is_not_trained_again(session, notebooks):
    notebooks.ends["03_compare"] = (1, "no")
    run_all(session)
    (session / "working" / "training.json").unlink()
    put_results(session / "working")
    attach(session)
    notebooks.ends.clear(), notebooks.ran.clear()
    run_all(session, stamp=STAMP.replace("version-0", "version-1"))
    assert notebooks.ran == ["03_compare"] and (session / "working" / ADAPTER_FOLDER / "tokenizer.json").is_file()


def test_training_that_stopped_in_time_goes_on_in_the_next_session(session, notebooks):
    run_all(session, steps=4)
    assert state(session)["02_finetune"] == "training stopped in time at step 4 of 6, push again to go on"
    assert notebooks.ran == ["01_baseline", "02_finetune"]
    assert os.environ["MEDCOT_SESSION_MINUTES"] == "280", "twenty minutes before the five hours that push asked for"


def test_no_notebook_begins_when_the_time_is_up(session, notebooks):
    prepare_session(stamp=STAMP, limit_hours=0.2)
    run_notebook("01_baseline")
    assert notebooks.ran == [] and state(session) == {"01_baseline": "no time left in this session"}


def test_a_notebook_that_never_ends_is_stopped_in_time(session, monkeypatch):
    import nbformat

    tree = session.parent / "library"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print('begun', flush=True)\nwhile True: pass")]
    )
    (tree / "notebooks").mkdir(parents=True)
    nbformat.write(notebook, tree / "notebooks" / "01_baseline.ipynb")
    monkeypatch.setattr(room, "__file__", str(tree / "medcot" / "kaggle" / "session.py"))
    status, _ = room._papermill("01_baseline", session / "working", seconds=5)
    assert status == -9 and (session / "working" / "notebooks" / "01_baseline.ipynb").is_file()


def test_the_page_ends_with_headline_figures_and_links(session, notebooks, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    notebooks.ends["03_compare"] = (1, "KeyError")
    run_all(session)
    show_results()
    assert (
        shown[0].data.startswith("# Not finished")
        and "03_compare.ipynb): stopped with status 1: KeyError" in shown[0].data
    )
    notebooks.ends.clear(), shown.clear()
    run_all(session, stamp=STAMP.replace("ab", "cd"))
    measures = [{"sentence": "Multiple choice: 55.4 % before, 53.0 % after."}]
    write(session / "working", **{"comparison.json": json.dumps({"measures": measures})})
    (session / "working" / "figures").mkdir()
    (session / "working" / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    show_results()
    assert shown[0].data.startswith("# Multiple choice: 55.4 % before, 53.0 % after.")
    assert all(f"- [{name}](notebooks/{name}.ipynb): done" in shown[0].data for name in room.NOTEBOOKS)
    assert "not for clinical use" in shown[0].data and shown[1].data == "**loss**"
    assert re.match(rb"\x89PNG", shown[2].data)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"notebooks": 5}'])
def test_a_broken_record_of_an_earlier_session_is_none(session, notebooks, text):
    write(session / "input" / "x", **{"session.json": text, "measured__b.jsonl": "1"})
    run_all(session)
    assert notebooks.ran == list(room.NOTEBOOKS)
