"""The house: what stands at the top, which way imports run, and what importing costs."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

GROUND = {"settings", "prompts"}
MIDDLE = {"data", "modeling", "training", "inference", "evaluation", "tracking"}
TOP = {"report", "preflight", "kaggle", "cli"}


def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    run = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout, so there is no list of what belongs to the project")
    found = {line.split("/")[0] for line in run.stdout.splitlines()}
    agreed = {
        "notebooks",
        "medcot",
        "kaggle-metadata.json",
        "pyproject.toml",
        "tests",
        "README.md",
        "LICENSE",
        "Makefile",
        "requirements.lock",
    }
    assert {name for name in found if not name.startswith(".")} == agreed


def imported_rooms(name):
    tree = ast.parse((REPOSITORY / "medcot" / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("name", sorted(GROUND | MIDDLE | TOP))
def test_imports_run_one_way(name):
    found = set(imported_rooms(name)) - {"tiny"}
    if name in GROUND:
        assert not found
    elif name in MIDDLE:
        assert found <= GROUND | MIDDLE
    else:
        assert not found & {"kaggle", "cli"} or name == "cli"


def test_only_modeling_knows_unsloth():
    knowing = {
        path.stem
        for path in (REPOSITORY / "medcot").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.startswith("unsloth") for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unsloth"))
    }
    assert knowing == {"modeling"}


def test_importing_does_nothing_heavy(tmp_path):
    code = "import sys, medcot, medcot.cli; print([m for m in ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]" and not list(tmp_path.iterdir())


def test_no_remote_code_and_no_upload():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "medcot").rglob("*.py"))
    assert "trust_remote_code=True" not in text and "push_to_hub" not in text and "upload_folder" not in text


def test_versions_agree():
    import tomllib

    import medcot

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == medcot.__version__
    locked = dict(
        line.split(" ;")[0].strip().split("==")
        for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
        if "==" in line
    )
    assert "torch" not in locked and not any(name.startswith("nvidia-") for name in locked)
    assert {name: locked[name] for name in ("unsloth", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "wandb")} == {
        "unsloth": "2026.10.9", "transformers": "5.17.0", "trl": "1.15.0", "peft": "0.21.2", "datasets": "4.8.5",
        "bitsandbytes": "0.50.2", "accelerate": "1.15.0", "wandb": "0.31.0",
    }  # fmt: skip
