"""The real hub route against a loopback server: revisions, time-outs, half downloads, and no network at all."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import COMMIT, OLDER, Hub
from safetensors.torch import load_file, save_file
from test_data import rows

from medcot.settings import EMBEDDED_MODEL

ROWS, MODEL = "house/rows", "house/small-model"

CODE = """
import json, os, shutil, sys
from dataclasses import replace
from medcot import MedcotError, PROFILES, load_splits
changes = json.loads(sys.argv[1])
lose_cache = changes.pop("lose_cache", False)
settings = replace(PROFILES["smoke"], train_rows=5, eval_rows=3, answer_rows=3, eval_loss_rows=3, dataset_config=None, **changes)
try:
    if changes.get("dataset"):
        splits = load_splits(settings)
        print("RESULT", json.dumps([splits.revision, splits.train["Question"][0], splits.fingerprint]))
    if changes.get("model"):
        from medcot import generate_answers, load_model
        from medcot.tokenizer import check_tokenizer
        model, tokenizer = load_model(settings)
        print("LOADED", sum(weight.numel() for weight in model.parameters()))
        if lose_cache:
            shutil.rmtree(os.environ["HF_HOME"] + "/hub")
            load_model(settings)
except MedcotError as error:
    sys.exit(f"MedcotError: {error}")
"""


@pytest.fixture
def hub(tmp_path):
    """A server with two commits of the rows and one of the model."""
    served = tmp_path / "served"
    for commit, made in ((OLDER, rows(9, _0={"Question": "An older question?"})), (COMMIT, rows(10))):
        (served / commit).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in made)
        (served / commit / "rows.jsonl").write_text(text, encoding="utf-8")
    shutil.copytree(EMBEDDED_MODEL, served / "model")
    weights = load_file(served / "model" / "model.safetensors")
    # A tensor that no layer takes: the hub's client resumes in blocks of 10 MiB, and the model alone is smaller.
    save_file(weights | {"ballast": torch.zeros(6 * 2**20)}, served / "model" / "model.safetensors", {"format": "pt"})
    hub = Hub(
        {("dataset", ROWS, commit): served / commit for commit in (OLDER, COMMIT)}
        | {("model", MODEL, COMMIT): served / "model"}
    )
    yield hub
    hub.close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Loads in a fresh process from the server; returns exit status, output and errors."""

    def fetch(seconds=2, offline="0", **changes):
        environment = os.environ | dict.fromkeys(
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), offline
        )
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": str(seconds), "HF_HUB_ETAG_TIMEOUT": str(seconds)}
        environment["no_proxy"] = environment["NO_PROXY"] = "127.0.0.1"
        run = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps(changes)], env=environment, capture_output=True, text=True,
            check=False, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        return run.returncode, run.stdout, run.stderr

    return fetch


def result(output):
    return json.loads(output.split("RESULT ")[1].splitlines()[0])


def test_rows_come_with_the_commit_that_the_name_stands_for(fetch, hub):
    status, output, errors = fetch(dataset=ROWS)
    assert status == 0, errors
    assert result(output)[:2] == [COMMIT, "Why 0?"]
    assert f"dataset {ROWS}: the hub answers, newest is commit {COMMIT}" in output
    status, output, errors = fetch(dataset=ROWS, dataset_revision="v1")
    assert status == 0, errors
    assert result(output)[:2] == [OLDER, "An older question?"]
    # Offline the cache serves: the commit that it holds is recorded, and another one is refused.
    status, output, errors = fetch(offline="1", dataset=ROWS)
    assert status == 0, errors
    assert result(output)[:2] == [OLDER, "An older question?"]
    assert f"the hub did not answer (OfflineModeIsEnabled): {ROWS} comes from the local cache" in output
    status, output, errors = fetch(offline="1", dataset=ROWS, dataset_revision=COMMIT)
    assert status == 1 and f"{ROWS} in the local cache is commit {OLDER}, not {COMMIT}: go online once" in errors


def test_a_time_out_and_a_server_error_are_tried_again(fetch, hub):
    hub.errors["/api/datasets/"] = [503]
    hub.cut["rows.jsonl"] = [100, 50]
    status, output, errors = fetch(dataset=ROWS)
    assert status == 0, errors
    assert f"{ROWS}: status 503 from the hub, attempt 2 of 3 in 2 s" in output
    assert result(output)[:2] == [COMMIT, "Why 0?"]
    assert sum(line.startswith("GET") and line.endswith("/rows.jsonl") for line in hub.asked) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "house/no-rows"}, "the hub has no dataset 'house/no-rows' at revision None (status 404)"),
        ({"dataset": ROWS, "dataset_revision": "v9"}, "at revision 'v9' (status 404): check the name"),
    ],
)
def test_what_the_hub_does_not_have_is_one_error(fetch, changes, words):
    status, _, errors = fetch(**changes)
    assert status == 1 and words in errors and "Traceback" not in errors


def test_a_half_downloaded_model_is_resumed_and_then_the_cache_serves(fetch, hub, tmp_path):
    hub.cut["model.safetensors"] = [12 * 2**20, 11 * 2**20]
    hub.stall["tokenizer.json"] = [4]  # longer than the client waits
    status, output, errors = fetch(model=MODEL)
    assert status == 0, errors
    assert f"model {MODEL}: the hub answers, newest is commit {COMMIT}" in output and "LOADED" in output
    ranges = [line.split("bytes=")[1] for line in hub.asked if "model.safetensors bytes=" in line]
    assert ranges[:2] == [f"{10 * 2**20}-", f"{20 * 2**20}-"]
    hub.close()
    status, output, errors = fetch(model=MODEL, lose_cache=True)
    assert f"the hub did not answer (ConnectError): {MODEL} comes from the local cache" in output
    assert "LOADED" in output
    # neither network nor cache
    assert status == 1 and f"MedcotError: no tokenizer at {MODEL}" in errors and "Traceback" not in errors
