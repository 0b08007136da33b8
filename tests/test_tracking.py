"""wandb never asks and never waits; offline, the loss history is in the file."""

import socket
import struct
import time

import pytest

from medcot.run.tracking import configure_wandb, plot_loss


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_LOG_MODEL", "WANDB_DISABLE_CODE",
                 "WANDB_CONSOLE", "WANDB_SILENT", "WANDB_INIT_TIMEOUT", "WANDB_ERROR_REPORTING"):  # fmt: skip
        monkeypatch.setenv(name, "unset")  # so that whatever the function sets is taken back afterwards
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_a_key_it_is_offline(settings, capsys):
    assert configure_wandb(settings) == "offline"
    assert "no key found" in capsys.readouterr().out


def test_with_a_key_but_no_host_it_is_offline_within_seconds(settings, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    assert configure_wandb(settings) == "offline"
    assert time.monotonic() - started < 5
    printed = capsys.readouterr().out
    assert "does not answer" in printed and "planted-key" not in printed


def test_with_a_key_and_a_host_it_is_online(settings, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "planted-key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert configure_wandb(settings) == "online"
    assert "planted-key" not in capsys.readouterr().out


def test_a_key_in_netrc_counts(settings, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password planted-key\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert configure_wandb(settings) == "online"


def test_none_means_none(settings):
    from dataclasses import replace

    assert configure_wandb(replace(settings, report_to="none")) == "disabled"


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
