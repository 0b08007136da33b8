"""What is staged: the notebooks as they will run, the metadata as the client wants it, and what is refused before."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import files, requires

import nbformat
import pytest
from kaggle_tree import REF, REPOSITORY, change, put
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medcot.kaggle import stage as room
from medcot.kaggle.metadata import METADATA_FILE
from medcot.kaggle.stage import AT_LEAST, EXACT, IF_ABSENT, read_pins, release, stage
from medcot.settings import NOTICE, MedcotError

pytest_plugins = ("kaggle_fixtures",)

NAMES = ["session", "01_baseline", "02_finetune", "03_compare"]


def cells(tree, name):
    return nbformat.read(tree / "build" / "kaggle" / name / f"{name}.ipynb", as_version=4).cells


def test_stage_writes_what_the_client_reads(tree):
    staged = stage(tree, "anna")
    assert [one.name for one in staged] == NAMES and staged[0].ref == REF
    for one in staged:
        folder = tree / "build" / "kaggle" / one.name
        metadata = json.loads((folder / "kernel-metadata.json").read_text())
        assert metadata["id"] == one.ref and metadata["machine_shape"] == "NvidiaTeslaT4"
        assert metadata["is_private"] is True and metadata["enable_internet"] is True and metadata["enable_gpu"] is True
        assert sorted(path.name for path in folder.iterdir()) == sorted([metadata["code_file"], "kernel-metadata.json"])
        nbformat.validate(nbformat.read(folder / metadata["code_file"], as_version=4))
        sources = [] if one.name != "03_compare" else ["anna/medcot-01-baseline", "anna/medcot-02-finetune"]
        assert metadata["kernel_sources"] == sources


def test_staged_notebook_is_the_notebook_with_one_cell_in_front(tree):
    staged = stage(tree, "anna")
    for one, name in zip(staged[1:], NAMES[1:], strict=True):
        original = nbformat.read(tree / "notebooks" / f"{name}.ipynb", as_version=4).cells
        assert [cell.source for cell in cells(tree, name)[1:]] == [cell.source for cell in original]
        compile(cells(tree, name)[0].source, "first cell", "exec")
        assert one.stamp() in cells(tree, name)[0].source


def test_the_session_runs_the_three_notebooks_and_shows_what_came_of_them(tree):
    stage(tree, "anna")
    code = [cell.source for cell in cells(tree, "session") if cell.cell_type == "code"]
    assert re.findall(r"^(\w+)\((.*)\)$", "\n".join(code[1:]), re.M) == [
        *(("run_notebook", f'"{name}"') for name in NAMES[1:]), ("show_results", ""),
    ]  # fmt: skip
    packed = base64.b64decode(re.search(r'MEDCOT = "([^"]+)"', code[0])[1])
    names = zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert {f"notebooks/{name}.ipynb" for name in NAMES[1:]} <= set(names)


def test_the_payload_has_every_room_and_no_weights(tree):
    shutil.rmtree(tree / "medcot")
    shutil.copytree(REPOSITORY / "medcot", tree / "medcot", ignore=shutil.ignore_patterns("__pycache__", "model"))
    stage(tree, "anna")
    source = cells(tree, "02_finetune")[0].source
    names = zipfile.ZipFile(io.BytesIO(base64.b64decode(re.search(r'MEDCOT = "([^"]+)"', source)[1]))).namelist()
    assert set(names) == {str(path.relative_to(tree)) for path in (tree / "medcot").rglob("*.py")}
    assert len(source) < room.SOURCE_LIMIT / 3


def test_the_pins_are_those_of_the_lock_and_never_torch(tree):
    pins = read_pins(tree)
    lock = dict(line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().split() if "==" in line)
    assert pins["exact"] == {name: lock[name] for name in EXACT}
    assert pins["if_absent"] == {name: lock[name] for name in IF_ABSENT}
    assert pins["at_least"] == {"pyarrow": (AT_LEAST["pyarrow"], lock["pyarrow"])}
    assert "torch" not in EXACT + IF_ABSENT


def test_marks_are_read_as_the_image_of_october_2026_has_them(tree):
    lock = tree / "requirements.lock"
    text = "\n".join(line for line in lock.read_text().splitlines() if not line.startswith(("trl==", "einops==")))
    more = [
        "trl==1 ; python_full_version < '3.13'",
        "trl==2 ; python_full_version >= '3.13'",
        "einops==3 ; sys_platform == 'linux'",
    ]
    lock.write_text("\n".join([text, *more, "einops==4 ; sys_platform == 'darwin'"]))
    pins = read_pins(tree)
    assert pins["exact"]["trl"] == "2" and pins["if_absent"]["einops"] == "3"


def test_the_oldest_pyarrow_is_the_one_that_datasets_asks_for():
    [needed] = [Requirement(line) for line in requires("datasets") if line.startswith("pyarrow")][:1]
    assert str(needed.specifier) == f">={AT_LEAST['pyarrow']}"


def test_the_session_has_all_that_medcot_needs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    # In every image of Kaggle's, which stands on Colab's; kaggle and six serve the command line only, not a session.
    there = {"torch", "matplotlib", "scipy", "tqdm", "filelock", "psutil", "packaging", "pandas", "kaggle", "six"}
    assert needed - there <= set(EXACT + IF_ABSENT)


def test_staging_twice_gives_the_same_bytes_and_words_for_readers_change_nothing(tree):
    first = [one.stamp() for one in stage(tree, "anna")]
    (tree / "README.md").write_text("a typo mended")
    (tree / "medcot" / "kaggle" / "README.md").write_text("another")
    assert [one.stamp() for one in stage(tree, "anna")] == first, "a README never repeats two hours of GPU time"
    notebook = tree / "notebooks" / "02_finetune.ipynb"
    notebook.write_text(notebook.read_text().replace("2 of 3", "two of 3"))
    changed = [new.stamp() != old for new, old in zip(stage(tree, "anna"), first, strict=True)]
    assert changed == [True, False, True, False], "the session holds all three"


def test_too_large_a_notebook_is_refused(tree, monkeypatch):
    monkeypatch.setattr(room, "SOURCE_LIMIT", 1000)
    with pytest.raises(MedcotError, match=r"session: .* bytes with medcot embedded, Kaggle takes 1,000"):
        stage(tree, "anna")
    assert not (tree / "build").exists()


def test_release_says_first_what_to_click_and_needs_no_account(tree, monkeypatch, capsys):
    monkeypatch.setattr("medcot.kaggle.client.user_name", lambda: pytest.fail("no account is asked for"))
    written = release(tree)
    assert [path.name for path in written] == [
        f"medcot-{n}.ipynb" for n in ("session", "01-baseline", "02-finetune", "03-compare")
    ]
    for path in written:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        first = notebook.cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("## What to click") and NOTICE in first.source
        assert "GPU T4 x2" in first.source and "Save Version" in first.source
        assert notebook.metadata.kaggle.accelerator == "nvidiaTeslaT4" and notebook.metadata.kaggle.isInternetEnabled
        assert "anybody" not in path.read_text()
    assert "both of them" in notebook.cells[0].source, "03 says what to attach"
    change(tree, put("release_url", "https://example.org/medcot/v1"))
    capsys.readouterr()
    release(tree)
    link = "https://www.kaggle.com/kernels/welcome?src=https://example.org/medcot/v1/medcot-session.ipynb"
    assert capsys.readouterr().out.splitlines()[0] == link


def test_offline_switches_the_internet_off_and_names_the_data_set(tree):
    stage(tree, "anna", offline=True)
    folder = tree / "build" / "kaggle"
    metadata = json.loads((folder / "session" / "kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False and metadata["dataset_sources"] == ["anna/medcot-offline"]
    assert json.loads((folder / "offline" / "dataset-metadata.json").read_text())["id"] == "anna/medcot-offline"
    lines = (folder / "requirements.txt").read_text().split()
    assert {re.split("==", line)[0] for line in lines} == {*EXACT, *IF_ABSENT, *AT_LEAST}


def test_staging_needs_no_more_than_its_dependency_group(tree, tmp_path):
    """A terminal without torch: only the packages of the group `kaggle` and what they need are there."""
    group = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["dependency-groups"]["kaggle"]
    names, todo, packages = set(), [Requirement(line) for line in group], tmp_path / "packages"
    packages.mkdir()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(name)
            todo += [Requirement(line) for line in requires(name) or ()]
            for entry in {file.parts[0] for file in files(name)} - {"..", "__pycache__"}:
                if not (packages / entry).exists():
                    (packages / entry).symlink_to(
                        files(name)[0].locate().parents[len(files(name)[0].parts) - 1] / entry
                    )
    code = "from medcot.kaggle.stage import release, stage; release(sys.argv[1]); stage(sys.argv[1], 'anna'); import kaggle"
    command = (
        f"import sys; sys.path[:0] = [{str(packages)!r}, {str(REPOSITORY)!r}]; {code}; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", command, tree], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    assert not names & {"torch", "numpy", "pandas", "datasets"}


REJECTED = {
    "upper-case name": (put("name", "Medcot"), "name: String should match"),
    "no name": (lambda metadata: metadata.pop("name"), "name: Field required"),
    "unknown accelerator": (put("machine_shape", "NvidiaTeslaT5"), "(is 'NvidiaTeslaT5')"),
    "P100": (put("machine_shape", "NvidiaTeslaP100"), "machine_shape: Input should be 'NvidiaTeslaT4'"),
    "model of four parts": (put("model_sources", ["a/b/transformers/8b"]), "model_sources.0: String should"),
    "model version no number": (put("offline.model_sources", ["a/b/transformers/8b/new"]), "offline.model_sources.0: String"),
    "data set without owner": (put("dataset_sources", ["wheels"]), "dataset_sources.0: String should"),
    "kernel source with a short slug": (put("kernel_sources", ["anna/abc"]), "kernel_sources.0: String"),
    "owner no name in the file": (put("owner", "anna/x"), "owner: String should match pattern"),
    "missing notebook": (put("notebooks.0", "notebooks/04_none.ipynb"), "04_none.ipynb not found"),
    "path upwards": (put("notebooks.0", "../outside.ipynb"), "notebooks.0: String should match"),
    "absolute path": (put("notebooks.0", "/etc/passwd.ipynb"), "notebooks.0: String should match"),
    "no notebook": (put("notebooks.0", "requirements.lock"), "notebooks.0: String should match"),
    "same notebook twice": (put("notebooks.1", "notebooks/01_baseline.ipynb"), "'01_baseline' is used twice"),
    "unknown key": (put("accelerator", "T4"), "accelerator: Extra inputs are not permitted"),
    "unknown key for offline": (put("offline.hours", 3), "offline.hours: Extra inputs are not permitted"),
    "text for a switch": (put("enable_internet", "true"), "enable_internet: Input should be a valid boolean"),
    "truth for a number": (put("hours", True), "hours: Input should be a valid number"),
    "too many hours": (put("hours", 13), "hours: Input should be less than or equal to 12"),
    "limit below what it takes": (put("limit_hours", 1), "hours is 2 and limit_hours 1: it would be cut off"),
    "notebooks no list": (put("notebooks", {}), "notebooks: Input should be a valid"),
    "no notebooks": (put("notebooks", []), "notebooks: List should have at least 1 item"),
    "secret in the file": (put("settings.WANDB_API_KEY", "x"), "settings.WANDB_API_KEY"),
    "unknown profile": (put("settings.MEDCOT_PROFILE", "t4"), "MEDCOT_PROFILE 't4' is unknown"),
    "setting no text": (put("settings.MEDCOT_DATASET", 5), "Input should be a valid string (is '5')"),
    "embedded model": (put("settings.MEDCOT_PROFILE", "tiny"), "needs the embedded model, too large"),
    "offline with nothing": (put("enable_internet", False), "false and nothing is attached"),
    "an address that is none": (put("release_url", "ftp://x"), "release_url: String should match"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_stage_rejects(tree, case):
    edit, words = REJECTED[case]
    change(tree, edit)
    with pytest.raises(MedcotError, match=re.escape(words)):
        stage(tree, "anna")
    assert not (tree / "build").exists()


def test_all_complaints_come_at_once(tree):
    cases = ("upper-case name", "P100", "model version no number", "unknown key")
    for case in cases:
        change(tree, REJECTED[case][0])
    with pytest.raises(MedcotError) as caught:
        stage(tree, "anna")
    assert all(REJECTED[case][1] in str(caught.value) for case in cases)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "", '{"notebooks": 5}', "[" * 100_000])
def test_a_broken_metadata_file_ends_in_one_error(tree, text):
    (tree / METADATA_FILE).write_text(text)
    with pytest.raises(MedcotError, match=r"kaggle-metadata\.json"):
        stage(tree, "anna")


@pytest.mark.parametrize("text", ["{", "{}", '{"cells": [{}], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_a_broken_notebook_is_refused(tree, text):
    (tree / "notebooks" / "02_finetune.ipynb").write_text(text)
    with pytest.raises(MedcotError, match=r"02_finetune\.ipynb (is no notebook|has no cells)"):
        stage(tree, "anna")


def test_a_notebook_that_links_out_of_the_project_is_refused(tree, tmp_path):
    shutil.copyfile(tree / "notebooks" / "01_baseline.ipynb", tmp_path / "outside.ipynb")
    (tree / "notebooks" / "01_baseline.ipynb").unlink()
    (tree / "notebooks" / "01_baseline.ipynb").symlink_to(tmp_path / "outside.ipynb")
    with pytest.raises(MedcotError, match="not found in the project"):
        stage(tree, "anna")


def test_a_missing_or_odd_owner_is_an_error(tree, monkeypatch):
    monkeypatch.setattr("medcot.kaggle.client.user_name", lambda: None)
    with pytest.raises(MedcotError, match="owner is missing: give --owner"):
        stage(tree)
    with pytest.raises(MedcotError, match="owner 'anna/x' is no Kaggle user name"):
        stage(tree, "anna/x")
