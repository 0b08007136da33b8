"""Fixtures of the Kaggle tests: a clone to stage, and a server to push to."""

import os
import shutil
import subprocess

import pytest
from kaggle_process import Client
from kaggle_server import Server
from kaggle_tree import KEY, METADATA_FILE, REPOSITORY

from medcot.kaggle import client


@pytest.fixture
def tree(tmp_path):
    """A clone as far as staging needs one, with few files of the library."""
    root = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "notebooks", root / "notebooks")
    (root / "medcot" / "kaggle").mkdir(parents=True)
    for name in (METADATA_FILE, "requirements.lock", "medcot/__init__.py", "medcot/kaggle/session.py"):
        shutil.copyfile(REPOSITORY / name, root / name)
    return root


@pytest.fixture(scope="module")
def client_process():
    """Where the client runs: forked from a process that has its imports behind it."""
    process = Client()
    yield process
    process.close()


@pytest.fixture
def fresh_process(server, monkeypatch):
    """The client runs as for a user, in a new Python for each call."""
    monkeypatch.setattr(client, "subprocess", subprocess)


@pytest.fixture
def server(tmp_path, monkeypatch, client_process):
    """A loopback Kaggle that the unmodified client of this test is pointed at."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    server = Server()
    for name, value in {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": server.address, "KAGGLE_USERNAME": "anna",
        "KAGGLE_KEY": KEY, "KAGGLE_CONFIG_DIR": str(tmp_path / "config"), "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "PAUSES", (0.02, 0.05))
    monkeypatch.setattr(client, "subprocess", client_process)
    yield server
    server.close()
