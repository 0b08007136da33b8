"""On Kaggle and home again, without Kaggle: the unmodified client against a loopback server, and the staged notebooks run."""

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
import venv
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kaggle_server import Server

from medcot import kaggle
from medcot.modeling import ADAPTER_FILES
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
        assert sorted(path.name for path in kernel.folder.iterdir()) == ["kernel-metadata.json", metadata["code_file"]]
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
    with pytest.raises(MedcotError, match="medcot-02-finetune: .* bytes with medcot embedded, Kaggle takes 1,000"):
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
    "kernel no object": (put("kernels.0", "01"), "kernel 1 is '01': must be an object"),
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


quick = partial(kaggle.push, yes=True, poll_seconds=0.02)


def test_push_goes_in_order_waits_and_is_done_once(tree, server, capsys):
    quick(tree)
    assert server.pushes() == REFS
    assert server.most_active == 2, "01 and 02 side by side, and never more"
    request = server.kernels[REFS[2]].request
    assert request["kernelDataSources"] == REFS[:2]
    assert request["isPrivate"] is True and request["machineShape"] == "NvidiaTeslaT4" and request["newTitle"]
    assert request["sessionTimeoutSeconds"] == 2 * 3600
    verbs = [call for call in server.calls if call[0] == "GetKernelSessionStatus" or call[0] == "pushed"]
    assert verbs.index(("pushed", REFS[2])) > max(verbs.index(("GetKernelSessionStatus", ref)) for ref in REFS[:2])
    printed = capsys.readouterr().out
    assert f"https://www.kaggle.com/code/{REFS[0]} (private" in printed
    assert "expected use of the weekly GPU quota: about 1.75 hours; 2.5 of 30 hours are used" in printed
    assert "version 1 successfully pushed" in printed and "medcot-03-compare complete" in printed
    quick(tree)
    assert server.pushes() == REFS, "a second call pushes nothing"
    assert "nothing to push" in capsys.readouterr().out


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


@pytest.mark.parametrize("fault", ["lost", "cut", 502, 429])
def test_a_broken_connection_neither_loses_nor_doubles_a_push(tree, server, fault):
    change(tree, only_first)
    server.faults["SaveKernel"] = [fault]
    server.faults["GetKernelSessionStatus"] = ["cut"]
    quick(tree)
    assert server.pushes() == REFS[:1]


def test_a_slow_server_is_given_up_and_asked_what_it_did(tree, server, monkeypatch):
    change(tree, only_first)
    monkeypatch.setattr(kaggle, "PUSH_SECONDS", 1.2)
    server.faults["SaveKernel"] = [2.0]
    monkeypatch.setattr(kaggle, "PAUSES", (1.5, 1.5))
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
    keep = kaggle._State.keep
    monkeypatch.setattr(kaggle._State, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(MedcotError, match="interrupted: sessions go on"):
        quick(tree)
    monkeypatch.setattr(kaggle._State, "keep", keep)
    assert server.pushes() == REFS[:1]
    sleep = kaggle.time.sleep
    monkeypatch.setattr(kaggle.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(MedcotError, match="interrupted: sessions go on"):
        quick(tree)
    monkeypatch.setattr(kaggle.time, "sleep", sleep)
    assert server.pushes() == REFS[:2]
    quick(tree)
    assert server.pushes() == REFS


def test_a_full_house_is_waited_for(tree, server):
    """Two sessions of other notebooks run: Kaggle refuses ours, and takes it once one has ended."""
    change(tree, only_first)
    server.faults["SaveKernel"] = [{"error": "Maximum batch GPU session count of 2 reached."}] * 2
    quick(tree)
    assert server.pushes() == REFS[:1]


def test_a_failed_session_stops_with_its_log_and_is_pushed_again(tree, server):
    server.kernel(REFS[1]).fails = True
    with pytest.raises(MedcotError, match="medcot-02-finetune failed: the notebook raised\nline of a log"):
        quick(tree)
    assert server.pushes() == REFS[:2], "03 is not pushed without what it takes"
    server.kernels[REFS[1]].fails = False
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
    finished(server, REFS[1]).fails = True
    kaggle.status(tree)
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
    folder = kaggle.pull(tree)
    assert folder == tree / "outputs" / "kaggle"
    assert (folder / "answers" / "a").read_bytes() == b"new answers", "the last kernel's copy is the newest"
    assert (folder / "adapter").read_bytes() == b"y" * 3_000_000
    assert (folder / "only_here").read_bytes() == b"01" and (folder / "RUN.md").read_bytes() == b"card"
    assert (folder / "medcot-01-baseline.log").read_text() == "line of a log\n"
    assert [start for name, start in server.downloads if name == "adapter"] == [0, 1_000_000], "went on where it broke"
    assert not list(folder.rglob("*.part"))
    before = len(server.downloads)
    kaggle.pull(tree)
    assert len(server.downloads) == before, "what is complete is not fetched again"
    assert "0 files fetched, 4 were there already" in capsys.readouterr().out


def test_pull_takes_a_new_run_although_names_and_sizes_are_the_same(tree, server):
    kernel = finished(server, REFS[1], adapter=b"first")
    folder = kaggle.pull(tree)
    kernel.version, kernel.files = 2, {"adapter": b"newer"}
    kaggle.pull(tree)
    assert (folder / "adapter").read_bytes() == b"newer"


def test_a_broken_off_pull_leaves_no_half_file_and_is_resumed(tree, server, monkeypatch):
    finished(server, REFS[1], adapter=b"z" * 500_000)
    monkeypatch.setattr(kaggle, "PAUSES", ())
    server.cut_files["adapter"] = 200_000
    with pytest.raises(MedcotError, match="adapter could not be fetched .*call pull again"):
        kaggle.pull(tree)
    folder = tree / "outputs" / "kaggle"
    assert not (folder / "adapter").exists()
    kaggle.pull(tree)
    assert (folder / "adapter").read_bytes() == b"z" * 500_000
    assert server.downloads[-1] == ("adapter", 200_000)


@pytest.mark.parametrize("name", ["../outside", "/etc/cron.d/x", "a/../../x", "..\\x", "C:x", "link/x", ""])
def test_pull_refuses_names_that_lead_elsewhere(tree, server, tmp_path, name):
    folder = tree / "outputs" / "kaggle"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    kernel = finished(server, REFS[1], good=b"good")
    kernel.files[name] = b"evil"
    with pytest.raises(MedcotError, match="would not land in"):
        kaggle.pull(tree)
    assert not server.downloads


def test_pull_keeps_the_log_of_a_failed_session_and_takes_nothing_else(tree, server):
    finished(server, REFS[1], adapter=b"half").fails = True
    folder = kaggle.pull(tree)
    assert sorted(path.name for path in folder.iterdir()) == ["medcot-02-finetune.log"]


def test_the_command_line_knows_the_four_actions(monkeypatch):
    import argparse

    parser = argparse.ArgumentParser()
    kaggle.add_commands(parser.add_subparsers(dest="command"))
    options = parser.parse_args(["kaggle", "push", "--owner", "anna", "--yes"])
    assert (options.run, options.owner, options.yes) == (kaggle.push, "anna", True)
    for action in (kaggle.stage, kaggle.status, kaggle.pull):
        assert parser.parse_args(["kaggle", action.__name__]).run is action
