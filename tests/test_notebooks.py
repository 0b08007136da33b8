"""The three notebooks, run in order by nbval on the smoke profile, and what they wrote."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
from conftest import REPOSITORY
from test_tracking import read_offline_run

from medcot import parse_completion
from medcot.cli import main
from medcot.model import ADAPTER_FILES
from medcot.settings import NOTICE

NAMES = ("01_baseline", "02_finetune", "03_compare")


def nbval(output, *names, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-current-env",
        "-x",
    ]
    paths = [str(REPOSITORY / "notebooks" / f"{name}.ipynb") for name in names]
    environment = os.environ | {"MEDCOT_PROFILE": "smoke", "MEDCOT_OUT": str(output)} | environment
    return subprocess.run(
        [*command, *paths], env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder that the three notebooks, run in order, leave behind."""
    folder = tmp_path_factory.mktemp("notebooks")
    run = nbval(folder, *NAMES)
    assert run.returncode == 0, run.stdout[-5000:]
    return folder


def test_loss_fell(output):
    history = json.loads((output / "training.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 6 and min(losses[-2:]) < losses[0]


def test_the_adapter_has_its_six_files(output):
    assert {file.name for file in (output / "DeepSeek-R1-Medical-COT").iterdir()} >= set(ADAPTER_FILES)


@pytest.mark.parametrize("name", ["baseline", "finetuned"])
def test_answers_are_kept(output, name):
    (path,) = (output / "measured").glob(f"{name}-answers-????????.jsonl")
    header, *kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["identity"]["adapter"] == "base") == (name == "baseline")
    assert len(kept) == 6 and all(parse_completion(a["completion"], a["eos_token"]) for a in kept)


def test_03_asks_the_base_nothing_that_01_has_asked(output):
    first, last = ((output / name).stat().st_mtime for name in ("training.json", "comparison.json"))
    times = {path.name: path.stat().st_mtime for path in (output / "measured").glob("*.jsonl")}
    assert all((name.startswith("baseline") and at < first) or first < at < last for name, at in times.items())
    assert len([name for name in times if name.startswith("baseline")]) == 7


def test_the_offline_wandb_file_holds_the_loss_history(output):
    (path,) = output.glob("wandb/offline-run-*/run-*.wandb")
    keys = [
        item.key or ".".join(item.nested_key)
        for record in read_offline_run(path) if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    ]  # fmt: skip
    assert keys.count("train/loss") == 6 and "eval/loss" in keys


def test_the_readmes_own_question_is_answered(output, monkeypatch, capsys):
    (line,) = re.findall(r"^medcot (ask .*)$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.chdir(REPOSITORY)
    status = main([*shlex.split(line), "--out", str(output)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert "qSOFA score" in shown.out and NOTICE in shown.out


def test_card_and_figures_are_there(output):
    assert "right answer" in (output / "RUN.md").read_text()
    assert {file.name for file in (output / "figures").iterdir()} >= {"loss.png", "comparison.png"}


def test_03_alone_says_which_one_to_run_first_before_anything_long(tmp_path):
    notebook = nbformat.read(REPOSITORY / "notebooks" / "03_compare.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    until = next(i for i, source in enumerate(cells) if "= load_model(" in source)
    source = "\n".join(cells[: until + 1]).replace("%matplotlib inline", "")
    run = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | {"MEDCOT_PROFILE": "smoke", "MEDCOT_OUT": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "run 02_finetune.ipynb with the same profile first" in run.stderr and "Unsloth" not in run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_stripped_short_and_without_definitions(name):
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs and cell.execution_count is None
        tree = ast.parse(cell.source.replace("%matplotlib inline", ""))
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda) for node in ast.walk(tree))
        assert len(cell.source.splitlines()) <= 6
    assert any("not for clinical use" in cell.source for cell in notebook.cells)
