"""The house: what stands at the top, which way imports run, and what importing costs."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "medcot"
CORE = {"environment", "settings", "profiles", "prompts", "files", "hub", "identity", "tokenizer", "rows", "data", "choices", "model", "kernels", "activations", "gpus",
        "training", "inference"}  # fmt: skip
# Which floor may import which; `tiny` (the embedded cases) is data that any of them may read.
MAY_IMPORT = {
    "core": {"core"},
    "run": {"core", "run"},
    "evaluation": {"core", "run", "evaluation"},
    "export": {"core", "run", "export"},
    "kaggle": {"core", "run", "kaggle"},
    "asking": {"core", "asking"},
    "chat": {"core", "asking", "chat"},
    "tiny": {"core", "tiny"},
    "cli": {"core", "run", "evaluation", "export", "kaggle", "asking", "chat", "cli"},
}


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


def floor_of(path):
    """The folder of a file, or its name where it stands in medcot/ itself; "core" for those of the core."""
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "core" if first in CORE else first


def imported(path):
    """The files of medcot that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = (
            path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if node.module
            else path.parents[node.level - 1]
        )
        for place in [folder / alias.name for alias in node.names] + [folder]:
            if place.with_suffix(".py").is_file():
                yield place.with_suffix(".py")
            elif place.is_dir() and place != PACKAGE:
                yield place / "__init__.py"


ROOMS = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",) and path != PACKAGE / "__init__.py"
)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    floor = floor_of(path)
    assert floor in MAY_IMPORT, f"{path} is a new room: say on which floor it stands"
    for other in imported(path):
        assert floor_of(other) in MAY_IMPORT[floor] | {"tiny"}, f"{path} imports {other}"


def code_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_house_stays_thin():
    """Budgets of design: a core that is read in an hour, no file that is not read at a sitting."""
    assert sum(code_lines(path) for path in ROOMS if floor_of(path) == "core") <= 2450
    assert not [str(path) for path in ROOMS if code_lines(path) > 355 and "tiny" not in path.parts]


def test_no_function_is_long_and_none_takes_more_than_six():
    for path in ROOMS:
        if "tiny" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            asked = [
                a for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")
            ]
            assert len(asked) <= 6, f"{path.name}: {node.name} takes {len(asked)}"
            assert node.end_lineno - node.lineno < 66, (
                f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            )


def test_only_model_knows_unsloth():
    knowing = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.startswith("unsloth") for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unsloth"))
    }
    assert knowing <= {"model", "activations"}


def test_importing_does_nothing_heavy(tmp_path):
    code = "import sys, medcot, medcot.cli; print([m for m in ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]" and not list(tmp_path.iterdir())


def test_no_remote_code_and_no_upload():
    text = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert not any("trust_remote_code=True" in code or "push_to_hub" in code for code in text.values())
    uploads = {path.relative_to(PACKAGE).as_posix() for path, code in text.items() if "upload_folder" in code}
    assert uploads == {"export/publish.py"}  # a function whose name says so


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
