"""On Kaggle and home again, without Kaggle: the unmodified client against a loopback server, and the staged notebooks run."""

import argparse
import base64
import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
import venv
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from kaggle_server import Server
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medcot import kaggle
from medcot.model import ADAPTER_FILES
from medcot.settings import ADAPTER_FOLDER, EMBEDDED_MODEL, MedcotError

REPOSITORY = Path(__file__).parent.parent
REFS = [f"anna/medcot-{name}" for name in ("01-baseline", "02-finetune", "03-compare")]
KEY = "not-a-real-key-4711"
REAL_BUILD = kaggle._build_wheel


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A clone as far as staging needs one; the wheel in it is a stand-in, which saves two seconds a test."""
    root = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "notebooks", root / "notebooks")
    for name in (kaggle.METADATA_FILE, "requirements.lock"):
        shutil.copyfile(REPOSITORY / name, root / name)
    wheel = tmp_path / "medcot-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a stand-in")
    monkeypatch.setattr(kaggle, "_build_wheel", lambda root: wheel)
    return root


def change(root, edit):
    """Edits the metadata of a tree in place."""
    path = root / kaggle.METADATA_FILE
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))


def only_first(metadata):
    """Leaves one kernel: enough for what a single push can run into."""
    del metadata["kernels"][1:]


# --- stage -----------------------------------------------------------------------------------------------------------


def test_stage_writes_what_the_client_reads(tree):
    kernels = kaggle.stage(tree, "anna")
    assert [kernel.folder.name for kernel in kernels] == ["01_baseline", "02_finetune", "03_compare"]
    for kernel, ref in zip(kernels, REFS, strict=True):
        metadata = json.loads((kernel.folder / "kernel-metadata.json").read_text())
        assert metadata["id"] == ref and metadata["machine_shape"] == "NvidiaTeslaT4"
        assert metadata["is_private"] is True and metadata["enable_internet"] is True and metadata["enable_gpu"] is True
        assert sorted(path.name for path in kernel.folder.iterdir()) == [metadata["code_file"], "kernel-metadata.json"]
    assert metadata["kernel_sources"] == REFS[:2]


def test_staged_notebook_is_the_notebook_with_one_cell_in_front(tree):
    for kernel in kaggle.stage(tree, "anna"):
        staged = json.loads((kernel.folder / kernel.notebook.name).read_text())["cells"]
        original = json.loads(kernel.notebook.read_text())["cells"]
        assert [cell["source"] for cell in staged[1:]] == [cell["source"] for cell in original]
        compile(staged[0]["source"], "first cell", "exec")
        assert kernel.fingerprint in staged[0]["source"]


def test_the_pins_are_those_of_the_lock_and_never_torch(tree):
    cell = json.loads((kaggle.stage(tree, "anna")[0].folder / "01_baseline.ipynb").read_text())["cells"][0]["source"]
    lock = dict(line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().split() if "==" in line)
    for name in kaggle.EXACT + kaggle.IF_ABSENT:
        assert f"'{name}': '{lock[name]}'" in cell
    assert "'torch'" not in cell.partition("exact=")[2]


def test_the_session_has_all_that_medcot_needs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    # In every image of Kaggle's, which stands on Colab's; kaggle and six serve the command line only, not a session.
    there = {"torch", "matplotlib", "scipy", "tqdm", "filelock", "psutil", "packaging", "kaggle", "six"}
    assert needed - there <= set(kaggle.EXACT + kaggle.IF_ABSENT)


def test_staging_twice_gives_the_same_bytes_and_a_change_reaches_what_depends_on_it(tree):
    first, second = kaggle.stage(tree, "anna"), kaggle.stage(tree, "anna")
    assert [kernel.fingerprint for kernel in first] == [kernel.fingerprint for kernel in second]
    notebook = tree / "notebooks" / "02_finetune.ipynb"
    notebook.write_text(notebook.read_text().replace("2 of 3", "two of 3"))
    third = kaggle.stage(tree, "anna")
    assert [new.fingerprint == old.fingerprint for new, old in zip(third, second, strict=True)] == [True, False, False]


def test_the_embedded_wheel_has_every_room_and_no_weights(tmp_path):
    root = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "medcot", root / "medcot", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPOSITORY / "pyproject.toml", root / "pyproject.toml")
    wheel = REAL_BUILD(root)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(root)) for path in (root / "medcot").rglob("*.py")}
    assert names == sources
    assert 1.4 * wheel.stat().st_size < kaggle.SOURCE_LIMIT / 4
    assert sorted(path.name for path in root.iterdir()) == ["build", "medcot", "pyproject.toml"]
    before = wheel.read_bytes()
    assert REAL_BUILD(root).read_bytes() == before, "the same sources make the same bytes, or every push would be new"


def test_too_large_a_notebook_is_refused(tree, monkeypatch):
    monkeypatch.setattr(kaggle, "SOURCE_LIMIT", 1000)
    with pytest.raises(MedcotError, match=r"medcot-02-finetune: .* bytes with medcot embedded, Kaggle takes 1,000"):
        kaggle.stage(tree, "anna")
    assert not (tree / "build" / "kaggle" / "01_baseline").exists()


def put(path, value):
    """An edit that sets one value of the metadata, addressed as "kernels.0.slug"."""

    def edit(metadata):
        *steps, last = path.split(".")
        for step in steps:
            metadata = metadata[int(step) if step.isdigit() else step]
        metadata[last] = value

    return edit


REJECTED = {
    "title and slug differ": (put("kernels.0.title", "Another title"), "makes the slug 'another-title'"),
    "short slug": (put("kernels.0.slug", "base"), "the slug has fewer than 5 characters"),
    "short title": (put("kernels.0.title", "base"), "the title 'base' has fewer than 5 characters"),
    "upper-case slug": (put("kernels.0.slug", "Medcot-01-Baseline"), "lower-case letters"),
    "unknown accelerator": (put("defaults.machine_shape", "NvidiaTeslaT5"), "machine_shape 'NvidiaTeslaT5'"),
    "P100": (put("kernels.1.machine_shape", "NvidiaTeslaP100"), "machine_shape 'NvidiaTeslaP100'"),
    "model of four parts": (put("defaults.model_sources", ["a/b/transformers/8b"]), "all five parts"),
    "model version no number": (put("defaults.model_sources", ["a/b/transformers/8b/new"]), "all five parts"),
    "data set without owner": (put("defaults.dataset_sources", ["wheels"]), "'wheels' is not of the form owner/slug"),
    "kernel source with a short slug": (put("defaults.kernel_sources", ["anna/abc"]), "at least 5 characters"),
    "owner no name": (put("owner", "anna/x"), "owner 'anna/x' is no Kaggle user name"),
    "missing notebook": (put("kernels.0.notebook", "notebooks/04_none.ipynb"), "04_none.ipynb not found"),
    "path upwards": (put("kernels.0.notebook", "../outside.ipynb"), "name an .ipynb file inside the project"),
    "absolute path": (put("kernels.0.notebook", "/etc/passwd.ipynb"), "name an .ipynb file inside the project"),
    "no notebook": (put("kernels.0.notebook", "requirements.lock"), "name an .ipynb file inside the project"),
    "itself as input": (put("kernels.2.takes", {"medcot-03-compare": ["answers"]}), "wait for each other: a cycle"),
    "cycle": (put("kernels.0.takes", {"medcot-03-compare": ["answers"]}), "wait for each other: a cycle"),
    "wrong order": (put("kernels.0.takes", {"medcot-02-finetune": ["adapter"]}), "comes after it"),
    "missing link": (put("kernels.2.takes", {"medcot-04-other": ["answers"]}), "'medcot-04-other', which is no kernel"),
    "input no text": (put("kernels.2.takes", {"medcot-01-baseline": [{}]}), "list some of answers"),
    "unknown input": (put("kernels.2.takes", {"medcot-01-baseline": ["weights"]}), "list some of answers"),
    "same slug twice": (put("kernels.1.slug", "medcot-01-baseline"), "the slug 'medcot-01-baseline' is used twice"),
    "same notebook twice": (put("kernels.1.notebook", "notebooks/01_baseline.ipynb"), "'01_baseline' is used twice"),
    "unknown key": (put("kernels.0.gpu", True), "kernel 1: unknown key 'gpu'"),
    "unknown key on top": (put("accelerator", "T4"), "top level: unknown key 'accelerator'"),
    "text for a switch": (put("defaults.enable_internet", "true"), "enable_internet is 'true', must be a bool"),
    "truth for a number": (put("kernels.0.hours", True), "hours is True, must be a number"),
    "too many hours": (put("kernels.0.hours", 13), "a session lasts at most 12"),
    "kernels no list": (put("kernels", {}), "kernels is {}, must be a list"),
    "no kernels": (put("kernels", []), "kernels is empty"),
    "kernel no object": (put("kernels", ["01"]), "kernel 1 is '01': must be an object"),
    "secret in the file": (put("defaults.settings.WANDB_API_KEY", "x"), "secrets go into Kaggle's own secrets"),
    "unknown profile": (put("defaults.settings.MEDCOT_PROFILE", "t4"), "MEDCOT_PROFILE 't4' is unknown"),
    "setting no text": (put("defaults.settings.MEDCOT_DATASET", 5), "MEDCOT_DATASET is 5, must be text"),
    "embedded model": (put("defaults.settings.MEDCOT_PROFILE", "tiny"), "needs the embedded model, too large"),
    "offline with nothing": (put("kernels.1.enable_internet", False), "false and nothing is attached"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_stage_rejects(tree, case):
    edit, words = REJECTED[case]
    change(tree, edit)
    with pytest.raises(MedcotError, match=re.escape(words)):
        kaggle.stage(tree, None if "owner" in words else "anna")
    assert not (tree / "build").exists()


def test_all_complaints_come_at_once(tree):
    for case in ("short slug", "P100", "model of four parts", "missing link"):
        change(tree, REJECTED[case][0])
    with pytest.raises(MedcotError) as caught:
        kaggle.stage(tree, "anna")
    for case in ("short slug", "P100", "model of four parts", "missing link"):
        assert REJECTED[case][1] in str(caught.value)


def test_a_missing_owner_is_a_complaint(tree, monkeypatch):
    monkeypatch.setattr(kaggle, "_user_name", lambda: None)
    with pytest.raises(MedcotError, match="owner is missing: give --owner"):
        kaggle.stage(tree)


def test_a_notebook_that_links_out_of_the_project_is_refused(tree, tmp_path):
    (tmp_path / "outside.ipynb").write_text('{"cells": [{}]}')
    (tree / "notebooks" / "01_baseline.ipynb").unlink()
    (tree / "notebooks" / "01_baseline.ipynb").symlink_to(tmp_path / "outside.ipynb")
    with pytest.raises(MedcotError, match="link out of the project"):
        kaggle.stage(tree, "anna")


# --- push, against the loopback server -------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback Kaggle that the unmodified client of this test is pointed at."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    server = Server()
    for name, value in {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": server.address, "KAGGLE_USERNAME": "anna",
        "KAGGLE_KEY": KEY, "KAGGLE_CONFIG_DIR": str(tmp_path / "config"), "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kaggle, "PAUSES", (0.02, 0.05))
    yield server
    server.close()


quick = partial(kaggle.push, owner="anna", yes=True, poll_seconds=0.02)


def test_push_goes_in_order_waits_and_is_done_once(tree, server, capsys):
    server.kernel(REFS[1]).lasts = 3
    quick(tree)
    assert server.pushes() == REFS
    assert server.beside == {REFS[0]: [], REFS[1]: REFS[:1], REFS[2]: []}, "01 and 02 side by side, 03 after both"
    request = server.kernels[REFS[2]].request
    assert request["kernelDataSources"] == REFS[:2]
    assert request["isPrivate"] is True and request["machineShape"] == "NvidiaTeslaT4" and request["newTitle"]
    printed = capsys.readouterr().out
    assert f"https://www.kaggle.com/code/{REFS[0]} (private" in printed
    assert "expected use of the weekly GPU quota: about 2 hours; 2.5 of 30 hours are used" in printed
    assert "version 1 successfully pushed" in printed and "medcot-03-compare complete" in printed
    quick(tree)
    assert server.pushes() == REFS, "a second call pushes nothing"
    assert "nothing left to push" in capsys.readouterr().out


def test_the_key_is_nowhere(tree, server, capfd, monkeypatch, tmp_path):
    """Not even when the client is asked for its verbose mode, in which it prints its own headers."""
    change(tree, only_first)
    monkeypatch.setenv("VERBOSE", "1")
    server.faults["SaveKernel"] = [500]
    quick(tree)
    secrets = (KEY, base64.b64encode(f"anna:{KEY}".encode()).decode())
    shown = "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret in shown or any(secret.encode() in data for data in written) for secret in secrets)


def test_the_owner_comes_from_the_credentials(tree, server):
    assert kaggle.stage(tree)[0].ref == REFS[0]


def test_push_asks_once_and_no_means_nothing_is_sent(tree, server, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda words: asked.append(words) or "n")
    with pytest.raises(MedcotError, match="not pushed: answer y"):
        kaggle.push(tree, poll_seconds=0.02)
    assert len(asked) == 1 and not server.pushes()


def test_failure_with_status_0_is_a_failure(tree, server):
    change(tree, only_first)
    server.faults["SaveKernel"] = [{"error": "The requested title is already in use"}]
    with pytest.raises(MedcotError, match="did not take medcot-01-baseline: The requested title is already in use"):
        quick(tree)


def test_an_answer_without_a_version_is_a_failure(tree, server):
    change(tree, only_first)
    server.faults["SaveKernel"] = [{"versionNumber": None}]
    with pytest.raises(MedcotError, match="it named no version"):
        quick(tree)


def test_invalid_sources_are_reported_and_pushed_again(tree, server):
    change(tree, only_first)
    change(tree, put("defaults.dataset_sources", ["anna/wheels"]))
    gone = {"invalidDatasetSources": ["anna/wheels"], "invalidModelSources": ["b/m/transformers/8b/1"]}
    server.faults["SaveKernel"] = [gone]
    with pytest.raises(
        MedcotError, match=r"without these inputs \(dataset: anna/wheels; model: b/m/transformers/8b/1\)"
    ):
        quick(tree)
    quick(tree)
    assert server.pushes(REFS[0]) == 2


@pytest.mark.parametrize("fault", ["lost", "cut", 429])
def test_a_broken_connection_neither_loses_nor_doubles_a_push(tree, server, fault):
    change(tree, only_first)
    server.faults["SaveKernel"] = [fault]
    server.faults["GetKernelSessionStatus"] = ["cut"]
    quick(tree)
    assert server.pushes() == REFS[:1]


def test_a_slow_server_is_given_up_and_asked_what_it_did(tree, server, monkeypatch):
    change(tree, only_first)
    monkeypatch.setattr(kaggle, "PUSH_SECONDS", 2.5)
    server.faults["SaveKernel"] = [3.5]
    monkeypatch.setattr(kaggle, "PAUSES", (2.0, 2.0))
    quick(tree)
    assert server.pushes() == REFS[:1]


def test_a_server_that_never_answers_is_an_error_after_three_attempts(tree, server):
    change(tree, only_first)
    server.faults["SaveKernel"] = ["cut"] * 9
    with pytest.raises(MedcotError, match="medcot-01-baseline: no usable answer from Kaggle"):
        quick(tree)
    assert len([call for call in server.calls if call[0] == "SaveKernel"]) == 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "made up 403.*'anna' is your user name, and that your phone number is verified"),
        (409, "made up 409.*may have the title 'medcot 01 baseline': rename or delete it"),
        (401, "no credentials or refuses them: `kaggle auth login`"),
        (400, "made up 400"),
    ],
)
def test_refusals_say_what_to_do(tree, server, status, words):
    change(tree, only_first)
    server.faults["SaveKernel"] = [status]
    with pytest.raises(MedcotError, match=words):
        quick(tree)
    assert len([call for call in server.calls if call[0] == "SaveKernel"]) == 1, "a refusal is not tried again"


def test_an_interrupted_push_goes_on_where_it_stopped(tree, server, monkeypatch):
    """Interrupted after 01 was taken but before its answer was written down, then while waiting."""

    def interrupt(*_):
        raise KeyboardInterrupt

    keep = kaggle._State.keep
    monkeypatch.setattr(kaggle._State, "keep", interrupt)
    with pytest.raises(MedcotError, match="interrupted: sessions go on"):
        quick(tree)
    monkeypatch.setattr(kaggle._State, "keep", keep)
    assert server.pushes() == REFS[:1]
    clock = kaggle.time
    monkeypatch.setattr(kaggle, "time", SimpleNamespace(sleep=interrupt, monotonic=clock.monotonic))
    with pytest.raises(MedcotError, match="interrupted: sessions go on"):
        quick(tree)
    monkeypatch.setattr(kaggle, "time", clock)
    assert server.pushes() == REFS[:2]
    quick(tree)
    assert server.pushes() == REFS


def test_no_more_than_two_sessions_are_asked_for(tree, server):
    change(tree, put("kernels.2.takes", {}))
    quick(tree)
    assert server.pushes() == REFS
    assert [call[0] for call in server.calls].count("SaveKernel") == 3, "none that Kaggle had to refuse"


def test_a_full_house_is_waited_for(tree, server):
    """Two sessions of other notebooks run: Kaggle refuses ours, and takes it once one has ended."""
    change(tree, only_first)
    server.faults["SaveKernel"] = [{"error": "Maximum batch GPU session count of 2 reached."}] * 2
    quick(tree)
    assert server.pushes() == REFS[:1]


def test_a_failed_session_stops_with_its_log_and_is_pushed_again(tree, server):
    server.kernel(REFS[1]).next_outcome = "ERROR"
    with pytest.raises(MedcotError, match="medcot-02-finetune failed: the notebook raised\nline of a log"):
        quick(tree)
    assert server.pushes() == REFS[:2], "03 is not pushed without what it takes"
    server.faults["SaveKernel"] = ["cut"]  # the failed version, of the same content, must not pass for the new one
    quick(tree)
    assert server.pushes() == [*REFS[:2], REFS[1], REFS[2]]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(kaggle.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess(
        [], 0, stdout='{"failure": "package", "message": "No module named \'six\'"}', stderr=""))  # fmt: skip
    with pytest.raises(MedcotError, match=r"No module named 'six'\): pip install kaggle==2.2.4 six"):
        kaggle._call("user")


# --- status and pull -------------------------------------------------------------------------------------------------


def finished(server, ref, version=1, **files):
    """A kernel whose session is complete and has left these files."""
    kernel = server.kernel(ref)
    kernel.version, kernel.polls, kernel.request = version, 9, {"text": ""}
    kernel.files = {name.replace("__", "/"): data for name, data in files.items()}
    return kernel


def test_status_says_where_each_stands(tree, server, capsys):
    finished(server, REFS[0])
    finished(server, REFS[1]).outcome = "ERROR"
    kaggle.status(tree, "anna")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("https")[0].strip() for line in lines] == [
        "complete",
        "error (the notebook raised)",
        "not pushed",
    ]
    assert not server.pushes()


def test_pull_brings_everything_home_once(tree, server, capsys):
    finished(server, REFS[0], answers__a=b"old answers", only_here=b"01")
    finished(server, REFS[1], adapter=b"x" * 3_000_000)
    finished(server, REFS[2], answers__a=b"new answers", adapter=b"y" * 3_000_000, **{"RUN.md": b"card"})
    server.cut_files["adapter"] = 1_000_000
    folder = kaggle.pull(tree, "anna")
    assert folder == tree / "outputs" / "kaggle"
    assert (folder / "answers" / "a").read_bytes() == b"new answers", "the last kernel's copy"
    assert (folder / "adapter").read_bytes() == b"y" * 3_000_000
    assert (folder / "only_here").read_bytes() == b"01" and (folder / "RUN.md").read_bytes() == b"card"
    assert (folder / "medcot-01-baseline.log").read_text() == "line of a log\n"
    starts = [start for name, start in server.downloads if name == "adapter"]
    assert len(starts) == 2 and starts[0] == 0 and 900_000 < starts[1] <= 1_000_000, "went on where it broke"
    assert not list(folder.rglob("*.part"))
    before = len(server.downloads)
    kaggle.pull(tree, "anna")
    assert len(server.downloads) == before, "what is complete is not fetched again"
    assert "0 files fetched, 4 were there already" in capsys.readouterr().out


def test_pull_takes_a_new_run_although_names_and_sizes_are_the_same(tree, server):
    kernel = finished(server, REFS[1], adapter=b"first")
    folder = kaggle.pull(tree, "anna")
    kernel.version, kernel.files = 2, {"adapter": b"newer"}
    kaggle.pull(tree, "anna")
    assert (folder / "adapter").read_bytes() == b"newer"


def test_a_broken_off_pull_leaves_no_half_file_and_is_resumed(tree, server, monkeypatch):
    finished(server, REFS[1], adapter=b"z" * 500_000)
    monkeypatch.setattr(kaggle, "PAUSES", ())
    server.cut_files["adapter"] = 200_000
    with pytest.raises(MedcotError, match=r"adapter could not be fetched .*call pull again"):
        kaggle.pull(tree, "anna")
    folder = tree / "outputs" / "kaggle"
    assert not (folder / "adapter").exists()
    kaggle.pull(tree, "anna")
    assert (folder / "adapter").read_bytes() == b"z" * 500_000
    assert 100_000 < server.downloads[-1][1] <= 200_000


@pytest.mark.parametrize("name", ["../outside", "/etc/cron.d/x", "a/../../x", "..\\x", "C:x", "link/x", "x\0", ""])
def test_names_that_lead_elsewhere_are_known(tmp_path, name):
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    assert not kaggle._is_inside(folder, name)
    assert kaggle._is_inside(folder, "answers/baseline-1.jsonl")


def test_pull_refuses_names_that_lead_elsewhere(tree, server):
    change(tree, only_first)
    kernel = finished(server, REFS[0], good=b"good")
    kernel.files["../outside"] = b"evil"
    with pytest.raises(MedcotError, match="would not land in"):
        kaggle.pull(tree, "anna")
    assert not server.downloads


def test_pull_keeps_the_log_of_a_failed_session_and_takes_nothing_else(tree, server):
    finished(server, REFS[1], adapter=b"half").outcome = "ERROR"
    folder = kaggle.pull(tree, "anna")
    assert sorted(path.name for path in folder.iterdir()) == ["medcot-02-finetune.log"]


def test_the_command_line_knows_the_four_actions(monkeypatch):
    called, parser = [], argparse.ArgumentParser()
    for action in ("stage", "push", "status", "pull"):
        double = partial(lambda action, **options: called.append((action, options)), action)
        double.__name__ = action
        monkeypatch.setattr(kaggle, action, double)
    kaggle.add_commands(parser.add_subparsers(dest="command"))
    for arguments in ("stage", "push --owner anna --yes", "push", "status", "pull --owner anna"):
        options = parser.parse_args(["kaggle", *arguments.split()])
        options.run(options)
    assert called == [
        ("stage", {"owner": None}), ("push", {"owner": "anna", "yes": True}), ("push", {"owner": None, "yes": False}),
        ("status", {"owner": None}), ("pull", {"owner": "anna"}),
    ]  # fmt: skip


# --- inside Kaggle: what a session finds -----------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path, monkeypatch):
    """An empty Kaggle session of this process: its root folder."""
    root = tmp_path / "kaggle"
    (root / "working").mkdir(parents=True)
    (root / "input").mkdir()
    for name in ("MEDCOT_MODEL", "MEDCOT_DATASET", "MEDCOT_OUT", "HF_HOME", "HF_TOKEN", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what the session sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEDCOT_KAGGLE_ROOT", str(root))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(kaggle.tempfile, "gettempdir", lambda: str(tmp_path))
    return root


def put_results(folder, seed="1"):
    """What 01 and 02 leave, as far as telling it apart needs it."""
    (folder / "answers").mkdir(parents=True)
    (folder / "answers" / "baseline-1.jsonl").write_text('{"answers": "baseline"}\n{"row": ' + seed + "}\n")
    (folder / "answers" / "finetuned-1.jsonl").write_text('{"answers": "finetuned"}\n')
    (folder / ADAPTER_FOLDER).mkdir()
    for name in ADAPTER_FILES:
        (folder / ADAPTER_FOLDER / name).write_text(seed)
    (folder / "training.json").write_text(json.dumps({"settings": {}, "examples_per_step": 8, "log_history": [seed]}))
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"png")


TAKES = ("answers", "adapter", "training")


@pytest.mark.parametrize("mount", ["medcot-run", "notebooks/anna/medcot-run", "a/b/c/d"])
def test_earlier_results_are_found_by_content_wherever_they_are_mounted(session, mount):
    put_results(session / "input" / mount)
    kaggle.prepare_session(takes=TAKES)
    working = session / "working"
    copied = sorted(str(path.relative_to(working)) for path in working.rglob("*") if path.is_file())
    adapter = [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES]
    assert copied == sorted([*adapter, "answers/baseline-1.jsonl", "figures/loss.png", "training.json"])
    assert os.environ["MEDCOT_OUT"] == str(working)
    assert not os.environ["HF_HOME"].startswith(str(session)), "caches stay out of what is kept"


def test_the_same_results_twice_are_one_and_different_ones_are_refused(session):
    put_results(session / "input" / "one")
    put_results(session / "input" / "notebooks" / "anna" / "one")
    kaggle.prepare_session(takes=TAKES)
    shutil.rmtree(session / "working")
    put_results(session / "input" / "other", seed="2")
    with pytest.raises(MedcotError) as caught:
        kaggle.prepare_session(takes=TAKES)
    for words in ("different answers under one name", "2 different adapter inputs", "2 different training inputs"):
        assert words in str(caught.value)


def test_all_that_is_missing_is_named_before_any_gpu_time_is_spent(session):
    with pytest.raises(MedcotError) as caught:
        kaggle.prepare_session(takes=TAKES)
    assert str(caught.value).count("is not among the inputs: run that notebook first and attach its output") == 3


def test_attached_model_and_rows_are_used(session):
    data = session / "input" / "datasets" / "anna" / "offline"
    shutil.copytree(EMBEDDED_MODEL, data / "some" / "where")
    (data / "train.jsonl").write_text('{"Question": "q", "Complex_CoT": "c", "Response": "r"}\n')
    (data / "other.jsonl").write_text('{"question": "q"}\n')
    kaggle.prepare_session()
    link = Path(os.environ["MEDCOT_MODEL"])
    assert link.resolve() == (data / "some" / "where").resolve() and not link.is_relative_to(session)
    assert os.environ["MEDCOT_DATASET"] == str(data / "train.jsonl")


def test_rows_in_parquet_are_known_by_their_columns(session):
    import datasets

    rows = {"Question": ["q"] * 3, "Complex_CoT": ["c"] * 3, "Response": ["r"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(session / "input" / "rows.parquet")
    assert kaggle.find_inputs(session / "input")["rows"] == [session / "input" / "rows.parquet"]


def test_a_secret_is_read_when_attached_and_nothing_happens_without(session, monkeypatch, capsys):
    kaggle.prepare_session()  # there is no kaggle_secrets here at all
    assert "HF_TOKEN" not in os.environ

    class Client:
        def get_secret(self, name):
            return "hf-not-a-real-token" if name == "HF_TOKEN" else None

    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=Client))
    kaggle.prepare_session(internet=False)
    assert "HF_TOKEN" not in os.environ, "no use for it without internet"
    kaggle.prepare_session()
    assert os.environ["HF_TOKEN"] == "hf-not-a-real-token"
    assert "hf-not-a-real-token" not in capsys.readouterr().out


def test_a_wandb_key_is_taken_from_a_secret_and_nothing_happens_without(monkeypatch, tmp_path, capfd):
    from medcot import tracking

    monkeypatch.setattr(tracking, "on_kaggle", lambda: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "")  # so that monkeypatch takes back what the function sets
    monkeypatch.delenv("WANDB_API_KEY")
    assert not tracking._wandb_key()
    client = SimpleNamespace(get_secret=lambda name: KEY)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=lambda: client))
    assert tracking._wandb_key() and os.environ["WANDB_API_KEY"] == KEY
    assert KEY not in "".join(capfd.readouterr())


def test_the_stack_is_pinned_the_rest_kept_and_torch_never_touched(session, monkeypatch):
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 0)
    )
    kaggle.install_on_kaggle("x.whl", "", {"pytest": "0.1"}, {"ruff": "0.1", "no-such": "2"}, internet=True)
    packages, own = commands
    assert packages[-2:] == ["pytest==0.1", "no-such==2"] and own[-1].endswith("/x.whl")
    assert all("--no-deps" in command and "--no-input" in command for command in commands)
    assert "torch" not in kaggle.EXACT + kaggle.IF_ABSENT


def test_outside_kaggle_the_staged_notebook_refuses_to_install(session, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    with pytest.raises(RuntimeError, match="this copy of the notebook is for Kaggle"):
        kaggle.install_on_kaggle("x.whl", "", {}, {}, internet=False)


def test_without_internet_and_wheels_the_first_cell_says_what_to_attach(session):
    missing = {"medcot-no-such-package": "1.0"}
    with pytest.raises(
        RuntimeError, match=r"medcot-no-such-package==1.0 could not be installed: switch .*attach a data set"
    ):
        kaggle.install_on_kaggle("x.whl", "", missing, {}, internet=False)


# --- the staged notebooks, run in an environment without medcot: long, left out by -k "not kaggle_run" -------------------

# An image has none of these; here they come from an attached folder or from a loopback index.
LACKING = ("trl", "tyro", "rapidfuzz")


def wheel_of(name, folder):
    """Packs an installed package as a wheel again."""
    distribution = importlib.metadata.distribution(name)
    tag = email.message_from_string(distribution.read_text("WHEEL"))["Tag"]
    path = folder / f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in ("INSTALLER", "direct_url.json"):
                archive.write(file.locate(), str(file))
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A Python that has what this one has, linked, but for medcot and the packages an image lacks; a list of wheels of those."""
    folder = tmp_path_factory.mktemp("image")
    packages, wheels = folder / "packages", folder / "wheels"
    packages.mkdir(), wheels.mkdir()
    lacking = re.compile(rf"(__editable__.*)?_*({'|'.join(('medcot', *LACKING))})([-.].*)?", re.I)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not lacking.fullmatch(entry.name) and "__editable__" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "venv", symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    (site / "image.pth").write_text(f"{packages}\n")
    return SimpleNamespace(venv=folder / "venv", wheels=[wheel_of(name, wheels) for name in LACKING], folder=folder)


@pytest.fixture(scope="module")
def index(image):
    """The address of a package index on the loopback address that has just those wheels."""
    simple = image.folder / "index" / "simple"
    for wheel in image.wheels:
        project = simple / wheel.name.split("-")[0]
        project.mkdir(parents=True)
        shutil.copyfile(wheel, project / wheel.name)
        (project / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(image.folder / "index")))
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/simple"
    http.shutdown()
    http.server_close()


def mount(root, layout, kind, slug):
    """Where an input of this kind appears: on old images and on new ones."""
    return root / "input" / slug if layout == "old" else root / "input" / kind / "anna" / slug


def start(folder, kernel, image, root, environment):
    """Starts papermill on a staged notebook, with a cell behind it that says where things came from."""
    notebook = json.loads((kernel.folder / kernel.notebook.name).read_text())
    witness = "import os, medcot, trl, torch\nprint('WITNESS', medcot.__file__, trl.__file__, os.environ['HF_HOME'])"
    cell = {"cell_type": "code", "execution_count": None, "id": "w", "metadata": {}, "outputs": [], "source": witness}
    notebook["cells"].append(cell)
    source, result = folder / f"{kernel.slug}-in.ipynb", folder / f"{kernel.slug}-out.ipynb"
    source.write_text(json.dumps(notebook))
    (root / "working").mkdir(parents=True)
    command = [str(image.venv / "bin" / "python"), "-m", "papermill", str(source), str(result), "-k", "python3"]
    return subprocess.Popen(
        [*command, "--no-progress-bar", "--cwd", str(root / "working")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]


def witness(folder, kernel):
    cells = json.loads((folder / f"{kernel.slug}-out.ipynb").read_text())["cells"]
    # What one print writes may come in several outputs.
    printed = [output["text"] for output in cells[-1]["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(text) for text in printed).split()[1:]


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sessions(image, index, tmp_path_factory):
    """All three notebooks run as on Kaggle, in both mount layouts, with and without a network. About a minute.

    Old layout: no network, wheels and model attached. New layout: a network (the loopback index), only the model
    attached. The network outside is a closed port for all of them.
    """
    folder = tmp_path_factory.mktemp("sessions")
    staged = {}
    for layout, internet in (("old", False), ("new", True)):
        clone = folder / f"clone-{layout}"
        ignore = shutil.ignore_patterns("model", "__pycache__")
        shutil.copytree(REPOSITORY / "medcot", clone / "medcot", ignore=ignore)
        shutil.copytree(REPOSITORY / "notebooks", clone / "notebooks")
        for name in (kaggle.METADATA_FILE, "requirements.lock", "pyproject.toml"):
            shutil.copyfile(REPOSITORY / name, clone / name)
        change(clone, put("defaults.settings", {"MEDCOT_PROFILE": "smoke"}))
        change(clone, put("defaults.dataset_sources", ["anna/medcot-offline"]))
        change(clone, put("defaults.enable_internet", internet))
        staged[layout] = kaggle.stage(clone, "anna")

    def environment(layout, number, root):
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        closed = "http://127.0.0.1:9"
        home = root.parent / "home"
        # Its path is the same for 01 and 03, as that of /tmp is; 02 runs beside 01 and on Kaggle has a /tmp of its own.
        scratch = folder / f"tmp-{layout}{'-02' if number == 1 else ''}"
        for path in (home, scratch):
            path.mkdir(parents=True, exist_ok=True)
        return kept | {
            "HOME": str(home), "TMPDIR": str(scratch), "MEDCOT_KAGGLE_ROOT": str(root), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "http_proxy": closed, "https_proxy": closed, "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
            "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def begin(layout, number, results=()):
        """One session of its own: a fresh image, its inputs mounted, the notebook running."""
        kernel, root = staged[layout][number], folder / layout / staged[layout][number].slug / "kaggle"
        own = SimpleNamespace(venv=root.parent / "venv")
        shutil.copytree(image.venv, own.venv, symlinks=True)
        data = mount(root, layout, "datasets", "medcot-offline")
        shutil.copytree(EMBEDDED_MODEL, data / "model")
        if layout == "old":
            (data / "wheels").mkdir()
            for wheel in image.wheels:
                shutil.copyfile(wheel, data / "wheels" / wheel.name)
        for slug, working in results:
            shutil.copytree(working, mount(root, layout, "notebooks", slug))
        process = start(root.parent, kernel, own, root, environment(layout, number, root))
        return SimpleNamespace(kernel=kernel, root=root, working=root / "working", venv=own.venv, process=process)

    done = {("old", 0): begin("old", 0), ("new", 1): begin("new", 1)}
    finish(done["old", 0].process)
    done["new", 0] = begin("new", 0)
    finish(done["new", 1].process)
    finish(done["new", 0].process)
    trained = ("medcot-02-finetune", done["new", 1].working)
    for layout in ("old", "new"):
        results = [("medcot-01-baseline", done[layout, 0].working), trained]
        done[layout, 2] = begin(layout, 2, results)
    for layout in ("old", "new"):
        finish(done[layout, 2].process)
    return done


@pytest.mark.parametrize("layout", ["old", "new"])
def test_kaggle_run_ends_with_the_files_of_the_demo(sessions, layout):
    found = {name for name in files_of(sessions[layout, 2].working) if not name.endswith("/.lock")}
    answers = {name for name in found if name.startswith("answers/")}
    assert len(answers) == 2 and {name.split("/")[1].split("-")[0] for name in answers} == {"baseline", "finetuned"}
    adapter = {f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES}
    figures = {f"figures/{name}.png" for name in ("loss", "comparison", "families")}
    expected = adapter | figures | {"training.json", "RUN.md", "comparison.json", f"{ADAPTER_FOLDER}/README.md"}
    assert expected <= found
    rest = {name.split("/")[0] for name in found - answers - expected}
    assert rest <= {"scores", "chat_answers", "choice_answers"}, "no caches and no leftovers among the results"


def test_kaggle_run_takes_medcot_and_what_the_image_lacks_from_the_notebook(sessions):
    for run in sessions.values():
        medcot_file, trl_file, cache = witness(run.root.parent, run.kernel)
        for path in (medcot_file, trl_file):
            assert path.startswith(str(run.venv)) and "site-packages" in path
        assert not cache.startswith(str(run.root)), "caches are not among the results"


def test_kaggle_run_layout_and_network_make_no_difference_to_the_answers(sessions):
    old, new = (next((sessions[layout, 0].working / "answers").glob("*.jsonl")) for layout in ("old", "new"))
    answers = [
        {row["row"]: row["completion"] for row in map(json.loads, path.read_text().splitlines()[1:])}
        for path in (old, new)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 6


def test_kaggle_run_results_come_home(sessions, tree, server):
    """The outputs of the sessions, served as Kaggle would, land as one folder that holds the whole run."""
    for number, ref in enumerate(REFS):
        kernel, working = finished(server, ref), sessions["new", number].working
        kernel.files = {name: (working / name).read_bytes() for name in files_of(working)}
    folder = kaggle.pull(tree, "anna")
    expected = set.union(*(files_of(sessions["new", number].working) for number in range(3)))
    assert expected <= files_of(folder)
    for name in files_of(sessions["new", 2].working):
        assert (folder / name).read_bytes() == (sessions["new", 2].working / name).read_bytes()
    assert any(name.startswith("wandb/") for name in expected), "with the charts of the training"
