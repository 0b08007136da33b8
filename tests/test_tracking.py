"""wandb never asks and never waits; offline, the loss history is in the file."""

import socket
import struct
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medcot.run import tracking
from medcot.run.tracking import plot_loss, wandb_run


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def mode_of(settings):
    """How wandb really ran."""
    import wandb

    with wandb_run(settings):
        if wandb.run is None:
            return "none"
        return "offline" if wandb.run.offline else "disabled" if wandb.run.disabled else "online"


def test_without_a_key_it_is_offline(settings, capsys):
    assert mode_of(settings) == "offline"
    assert "wandb offline: no key found, files in" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_users_word_stands_whatever_key_is_there(settings, monkeypatch, capsys, mode):
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert mode_of(settings) == mode
    assert f"wandb {mode}: WANDB_MODE says so" in capsys.readouterr().out


def closed_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


def refusing_server():
    """A server that knows no key: 401 to everything, as wandb's own answers a wrong one; `asked` has what it was asked."""

    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.mark.parametrize("trouble", ["nobody there", "a wrong key", "a key of a wrong form"])
def test_where_going_online_fails_it_is_offline_with_a_line_and_training_goes_on(
    settings, monkeypatch, capsys, trouble
):
    import wandb

    wandb.teardown()  # or it would go on asking the address that the process asked first
    monkeypatch.setattr(tracking, "ONLINE_SECONDS", 2.0 if trouble == "nobody there" else tracking.ONLINE_SECONDS)
    server = refusing_server()
    port = closed_port() if trouble == "nobody there" else server.server_port
    key = "planted-key" if trouble == "a key of a wrong form" else "f" * 40
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    assert mode_of(settings) == "offline"
    assert time.monotonic() - started < 60
    server.shutdown()
    wandb.teardown()
    assert bool(server.asked) == (trouble == "a wrong key"), "only a key that may be one is sent"
    printed = "".join(capsys.readouterr())
    assert "wandb offline: wandb could not go online" in printed and key not in printed


def test_none_means_none(settings):
    assert mode_of(replace(settings, report_to="none")) == "none"


def read_offline_run(path):
    """The records of an offline `run-*.wandb` file: a 7-byte header, then LevelDB-log blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    magic, number, _ = struct.unpack("<4sHB", content[:7])
    assert (magic, number) == (b":W&B", 0xBEE1)
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := -position % 2**15) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_the_offline_file_holds_project_and_loss_history(trained):
    import json

    (path,) = trained.settings.output_dir.glob("wandb/offline-run-*/run-*.wandb")
    projects, losses = set(), []
    for record in read_offline_run(path):
        if record.WhichOneof("record_type") == "run":
            projects.add(record.run.project)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                losses.append(json.loads(values["train/loss"]))
    assert projects == {"medcot"}
    assert losses == [entry["loss"] for entry in trained.trainer.state.log_history if "loss" in entry]


def test_the_chart_draws_both_losses_at_their_steps():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "runtime": 9},
    ]
    training, held_out = plot_loss(history, max_steps=4).axes[0].lines
    assert training.get_xydata().tolist() == [[1, 2.0], [2, 1.0]]
    assert held_out.get_xydata().tolist() == [[2, 1.5]]
