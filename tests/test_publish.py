"""Publishing against a loopback hub: what is shown, what is asked, what arrives there."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

from medcot.settings import NOTICE

NAME = "house/medical"
COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


class Receiving(Hub):
    """A hub that takes what the client uploads: repositories with their visibility, large objects, commits."""

    def __init__(self):
        self.made, self.objects, self.commits, self.refuse = {}, {}, [], {}
        super().__init__({})

    def _handler(hub):
        class Handler(super()._handler()):
            def do_POST(self):
                self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self.chunks()
                self.take()

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                hub.objects[hashlib.sha256(content).hexdigest()] = content
                self.reply(200, b"")

            def do_GET(self):
                self.take()

            def chunks(self):
                content = b""
                while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                return content

            def take(self):
                path = self.path.partition("?")[0]
                hub.asked.append(f"{self.command} {path}")
                if self.headers.get("Authorization") != "Bearer hf_loopback":
                    return self.reply(401, b"{}")
                if status := next((status for word, status in hub.refuse.items() if word in path), None):
                    return self.reply(status, b"{}")
                answer = self.answered(path)
                if answer is None:
                    return self.missing("RepoNotFound")
                return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def answered(self, path):
                if path == "/api/repos/create":
                    form = json.loads(self.body)
                    hub.made[f"{form['organization']}/{form['name']}"] = form.get("visibility")
                    return {"url": f"{hub.url}/{NAME}"}
                if path == "/api/validate-yaml":
                    return {"errors": [], "warnings": []}
                if NAME not in hub.made:
                    return None
                if path == f"/api/models/{NAME}":
                    return {
                        "id": NAME,
                        "sha": COMMIT,
                        "private": hub.made[NAME] == "private",
                        "siblings": [],
                        "tags": [],
                    }
                if path.endswith("/preupload/main"):
                    files = [file["path"] for file in json.loads(self.body)["files"]]
                    large = (".safetensors", ".gguf")
                    modes = {name: "lfs" if name.endswith(large) else "regular" for name in files}
                    return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
                if path.endswith("/objects/batch"):
                    return {"objects": [
                        one | {"actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}}
                        for one in json.loads(self.body)["objects"]
                    ]}  # fmt: skip
                if path.endswith("/commit/main"):
                    hub.commits.append([json.loads(line) for line in self.body.splitlines()])
                    return {
                        "commitUrl": f"{hub.url}/{NAME}/commit/{COMMIT}",
                        "commitOid": COMMIT,
                        "pullRequestUrl": None,
                    }
                raise AssertionError(f"{self.command} {path}")

        return Handler

    @property
    def uploaded(self) -> dict:
        """The files of the last commit by name."""
        files = {}
        for line in self.commits[-1][1:]:
            value = line["value"]
            files[value["path"]] = (
                base64.b64decode(value["content"]) if line["key"] == "file" else self.objects[value["oid"]]
            )
        return files


@pytest.fixture
def hub():
    hub = Receiving()
    yield hub
    hub.close()


@pytest.fixture
def folder(trained, tmp_path):
    """An adapter folder as 03_compare leaves it, and what should never leave the machine beside it."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained.settings.adapter_dir, folder)
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\n---\n\n# Run card\n\n{NOTICE}\n", encoding="utf-8")
    (folder / "notes.txt").write_text("a password", encoding="utf-8")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"not this one")
    return folder


CODE = """
import argparse, sys
from medcot import export
from medcot.settings import MedcotError
parser = argparse.ArgumentParser()
export.add_commands(parser.add_subparsers(required=True))
options = parser.parse_args()
try:
    options.run(options)
except MedcotError as error:
    sys.exit(f"MedcotError: {error}")
"""


@pytest.fixture
def publish(hub, folder, tmp_path):
    """`medcot publish` in a process of its own, with what is typed; (status, output, errors)."""

    def publish(*arguments, typed=None, token="hf_loopback", where=folder):
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_TOKEN", None)
        environment |= {"HF_TOKEN": token} if token else {}
        command = [sys.executable, "-c", CODE, "publish", *arguments, "--folder", str(where)]
        run = subprocess.run(
            command, env=environment, input=typed, stdin=None if typed else subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        assert "hf_loopback" not in run.stdout + run.stderr
        return run.returncode, run.stdout, run.stderr

    return publish


def test_it_shows_asks_and_uploads_privately_what_it_showed(publish, hub, folder):
    status, output, errors = publish(NAME, typed="y\n")
    assert status == 0, errors
    assert hub.made == {NAME: "private"}
    expected = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != "notes.txt"}
    assert len(expected) >= 7 and hub.uploaded == expected
    assert f"new repository {NAME}, private: only its owner sees it" in output and NOTICE in output
    assert all(name in output for name in expected) and "not uploaded: checkpoint-10, notes.txt" in output
    assert f"uploaded: {hub.url}/{NAME}/commit/{COMMIT}" in output
    # Shown and asked before anything went there.
    assert output.index("upload this? [y/N]") < output.rindex("uploaded:")


@pytest.mark.parametrize("typed", ["n\n", "\n", "never\n", None])
def test_anything_but_yes_uploads_nothing(publish, hub, typed):
    status, output, _ = publish(NAME, typed=typed)
    assert status == 0 and "nothing was uploaded" in output
    assert hub.made == {} and not [line for line in hub.asked if not line.startswith("GET")]


def test_public_has_to_be_said(publish, hub):
    status, output, errors = publish(NAME, "--public", "--yes")
    assert status == 0, errors
    assert hub.made == {NAME: "public"} and "PUBLIC: everybody may see" in output and "[y/N]" not in output
    # A second upload that was to be private would be seen by everybody.
    status, output, errors = publish(NAME, "--yes")
    assert status == 1 and f"{NAME} is public on the hub and the upload was to be private: say --public" in errors
    assert len(hub.commits) == 1
    status, output, errors = publish(NAME, "--public", "--yes")
    assert status == 0 and f"update {NAME}" in output and len(hub.commits) == 2
    hub.made[NAME] = "private"
    status, output, errors = publish(NAME, "--public", "--yes")
    assert status == 1 and "is private on the hub and the upload was to be public: leave --public out" in errors


def test_without_a_login_a_card_or_a_name_nothing_is_asked_of_the_hub(publish, hub, folder, tmp_path):
    without_card = Path(shutil.copytree(folder, tmp_path / "without_card"))
    (without_card / "README.md").write_text("# What peft writes by itself\n")
    for arguments, more, words in (
        ((NAME,), {"token": None}, "no login for the hub: set HF_TOKEN"),
        (("medical",), {}, "'medical' is no repository: write OWNER/NAME"),
        (("a/b/c",), {}, "'a/b/c' is no repository"),
        ((NAME,), {"where": folder / "checkpoint-11"}, "holds no weights: run 02_finetune.ipynb first"),
        ((NAME,), {"where": without_card}, "README.md is not the run card: run 03_compare.ipynb first"),
    ):
        status, _, errors = publish(*arguments, "--yes", **more)
        assert status == 1 and words in errors and "Traceback" not in errors
    assert hub.asked == []


def test_a_token_that_may_not_write_and_a_hub_that_is_not_there(publish, hub):
    hub.refuse["/api/repos/create"] = 403
    status, _, errors = publish(NAME, "--yes")
    assert status == 1 and "the token may not write there" in errors and "Traceback" not in errors
    hub.close()
    status, _, errors = publish(NAME, "--yes")
    assert status == 1 and f"the hub did not take {NAME}" in errors and "check the network" in errors
