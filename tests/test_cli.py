"""The command line: what its user can mend is one line and a non-zero status."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from medcot.cli import main
from medcot.settings import NOTICE


def medcot(*arguments, **environment):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from medcot.cli import main; import sys; sys.exit(main())", *arguments],
        env=os.environ | {"MEDCOT_PROFILE": "smoke"} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch, capfd):
    """The command in this process: the same entry, the same streams, without the seconds of its imports."""

    def here(*arguments, **environment):
        for name, value in ({"MEDCOT_PROFILE": "smoke"} | environment).items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as end:  # as argparse and tyro end a process
            status = end.code
        return SimpleNamespace(returncode=status, **dict(zip(("stdout", "stderr"), capfd.readouterr(), strict=True)))

    return here


def test_audit_prints_what_it_found_and_writes_nothing(tmp_path):
    run = medcot("audit", MEDCOT_OUT=str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert "64 training rows from embedded cases" in run.stdout and "would lose their answer" in run.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MEDCOT_PROFILE": "huge"}, "'huge' is unknown: choose one of"),
        ({"MEDCOT_DATASET": "/nowhere.jsonl"}, "/nowhere.jsonl not found"),
        ({"MEDCOT_DATASET": "no/such-data"}, "network"),
        ({"MEDCOT_MODEL": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"MEDCOT_DATASET": "COLUMNS"}, "has no column Complex_CoT"),
        ({"MEDCOT_DATASET": "EMPTY"}, "what its name says"),
    ],
)
def test_a_user_error_is_one_line_without_a_traceback(tmp_path, here, environment, words):
    (tmp_path / "columns.jsonl").write_text(json.dumps({"Question": "a", "Response": "b"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    environment = {
        name: {"COLUMNS": str(tmp_path / "columns.jsonl"), "EMPTY": str(tmp_path / "empty.jsonl")}.get(value, value)
        for name, value in environment.items()
    }
    in_a_process = "MEDCOT_PROFILE" in environment  # one of them shows the status that a shell sees
    run = (medcot if in_a_process else here)("audit", MEDCOT_OUT=str(tmp_path / "out"), **environment)
    assert run.returncode == 1
    message = [line for line in run.stderr.splitlines() if line.startswith("medcot audit: ")]
    assert len(message) == 1 and words in message[0]
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Runs `medcot demo` in this process, on notebooks made of the given sources of cells; returns its status."""
    from nbformat import v4, write

    from medcot import cli

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "medcot" / "cli.py"))
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("MEDCOT_OUT", str(tmp_path / "out"))
    (tmp_path / "notebooks").mkdir()

    def run(**sources):
        monkeypatch.setattr(cli, "NOTEBOOKS", tuple(sources))
        for name, source in sources.items():
            write(v4.new_notebook(cells=[v4.new_code_cell(source)]), tmp_path / "notebooks" / f"{name}.ipynb")
        return cli.main(["demo"])

    return run


def test_the_demo_runs_the_notebooks_in_order_without_an_open_port_and_ends_with_the_comparison(demo, tmp_path, capfd):
    listens = "{c.laddr.ip for c in psutil.Process().net_connections('inet') if c.status == 'LISTEN'} - {'127.0.0.1'}"
    left = tmp_path / "left.txt"
    assert not demo(
        first=f"import psutil\nprint('ports', {listens})\nopen({str(left)!r}, 'w').write('by the first')",
        second=f"comparison = open({str(left)!r}).read() + ' and read by the second'\ncomparison",
    )
    shown = capfd.readouterr().out
    assert shown.index("=== first ===") < shown.index("ports set()") < shown.index("=== second ===")
    assert shown.index("by the first and read by the second") < shown.index("=== done in") < shown.index(NOTICE)
    kept = json.loads((tmp_path / "out" / "notebooks" / "first.ipynb").read_text())
    assert kept["cells"][0]["outputs"][0]["text"] == ["ports set()\n"]


def test_a_kernel_that_dies_is_one_line(demo, capsys):
    assert demo(dies="import os; os._exit(9)") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medcot demo: ")]
    assert "dies.ipynb stopped: its kernel died" in line and "run the command again" in line


def test_flags_are_the_settings_and_a_slip_is_told_its_neighbour(tmp_path, here):
    run = here("audit", "--train-rows", "32", "--out", str(tmp_path / "out"))
    assert run.returncode == 0 and "32 training rows from embedded cases" in run.stdout, run.stderr
    rows = tmp_path / "rows.jsonl"
    made = [{"Question": f"Why {i}?", "Complex_CoT": "Because.", "Response": "So."} for i in range(30)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    run = here("audit", str(rows), "--out", str(tmp_path / "out"))
    assert run.returncode == 0 and "24 training and 6 evaluation rows from" in run.stdout, run.stderr
    run = here("train", "--max-step", "3")
    assert run.returncode != 0 and "--max-steps" in run.stdout + run.stderr and "Traceback" not in run.stderr
    run = here("--help")
    assert "medcot train --max-steps 100" in run.stdout and "MEDCOT_PROFILE" in run.stdout
    assert medcot("--version").stdout.startswith("medcot 0.1")
