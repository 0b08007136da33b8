"""Before quota is spent: what rules a machine out is said at once, with the cure, and a run is timed before it is begun."""

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest

from medcot.profiles import PROFILES
from medcot.run.preflight import check_machine, preflight
from medcot.settings import MedcotError


def cards(monkeypatch, *found, gib=15):
    """A machine with these (name, compute capability) cards, as far as torch's questions go."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(found))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(found))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i=0: found[i][0])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i=0: found[i][1])
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i=0: SimpleNamespace(total_memory=gib * 2**30))


@pytest.fixture
def gpu_settings(settings):
    return replace(settings, device="cuda")  # the embedded model, so that no hub is asked


def test_a_p100_is_refused_with_the_cure(monkeypatch, gpu_settings):
    cards(monkeypatch, ("Tesla P100-PCIE-16GB", (6, 0)))
    with pytest.raises(MedcotError, match=r"Tesla P100-PCIE-16GB has compute capability 6.0 .* GPU T4 x2"):
        check_machine(gpu_settings)


def test_a_second_gpu_that_would_stand_idle_is_pointed_out(monkeypatch, gpu_settings, capsys):
    cards(monkeypatch, ("Tesla T4", (7, 5)), ("Tesla T4", (7, 5)))
    check_machine(gpu_settings)
    assert "1 of 2 GPUs will stand idle: MEDCOT_PROFILE=kaggle-t4x2" in capsys.readouterr().out
    check_machine(replace(gpu_settings, nproc_per_node=2))
    assert "idle" not in capsys.readouterr().out


def test_two_processes_need_two_gpus(monkeypatch, gpu_settings):
    cards(monkeypatch, ("Tesla T4", (7, 5)))
    with pytest.raises(MedcotError, match=r"nproc_per_node=2 and 1 GPU here: choose MEDCOT_PROFILE=kaggle-t4-fast"):
        check_machine(replace(gpu_settings, nproc_per_node=2))


def test_a_card_too_small_for_the_8b_is_refused_with_the_cure(monkeypatch, gpu_settings, capsys):
    cards(monkeypatch, ("NVIDIA GeForce RTX 4050", (8, 9)), gib=6)
    check_machine(gpu_settings)  # large enough for the embedded model
    large = replace(gpu_settings, model=PROFILES["kaggle-t4"].model)
    with pytest.raises(MedcotError, match=r"RTX 4050 has 6.0 GiB of memory and .*8B needs at least 7: .*PROFILE=tiny"):
        check_machine(large)
    cards(monkeypatch, ("NVIDIA GeForce RTX 3080", (8, 6)), gib=10)
    with pytest.raises(MedcotError, match="cannot be asked") as error:
        check_machine(large)
    assert "GiB of memory" not in str(error.value)
    assert "10.0 GiB of GPU memory may be too little where up to 12.5 were used" in capsys.readouterr().out


def test_a_cpu_is_told_its_profile(settings, capsys):
    check_machine(settings)
    assert "no CUDA GPU: runs on the CPU" in capsys.readouterr().out


def test_an_excluded_version_names_the_pin(monkeypatch, settings):
    from importlib.metadata import version

    monkeypatch.setattr(
        "medcot.run.preflight.version", lambda name: "5.0.0" if name == "transformers" else version(name)
    )
    with pytest.raises(MedcotError, match=r"transformers 5\.0\.0 is excluded by unsloth: pip install 'transformers"):
        check_machine(settings)


@pytest.mark.parametrize("missing", ["trl", "unsloth"])
def test_a_package_that_is_missing_is_named_beside_all_else(monkeypatch, settings, missing):
    from importlib import metadata

    def unless_missing(function):
        def found(name):
            if name == missing:
                raise metadata.PackageNotFoundError(name)
            return function(name)

        return found

    for name in ("version", "requires"):
        monkeypatch.setattr(f"medcot.run.preflight.{name}", unless_missing(getattr(metadata, name)))
    with pytest.raises(MedcotError, match=rf"{missing} is not installed: pip install -r .*; model no-one/nothing"):
        check_machine(replace(settings, model="no-one/nothing"))


@pytest.mark.parametrize("model", ["/no/such/folder", "models/llama/8b"])
def test_a_mistyped_folder_is_named(settings, model):
    with pytest.raises(MedcotError, match=f"model {model} is no folder here and no name on the hub: set MEDCOT_MODEL"):
        check_machine(replace(settings, model=model))


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_in_the_cache_counts_when_every_shard_is_there(monkeypatch, settings, tmp_path, capsys, whole):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some-one--model"
    (snapshot := folder / "snapshots" / "0").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for shard in list(shards.values())[: 2 if whole else 1]:
        (snapshot / shard).write_bytes(b"")
    if whole:
        check_machine(replace(settings, model="some-one/model"))
        assert "model some-one/model is in the local cache" in capsys.readouterr().out
    else:
        with pytest.raises(MedcotError, match="model some-one/model is not here"):
            check_machine(replace(settings, model="some-one/model"))


def test_too_little_disk_is_named(monkeypatch, settings):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    with pytest.raises(MedcotError, match=r"has 0\.0 GiB free and about 0\.1 are needed"):
        check_machine(settings)


def test_a_model_that_is_neither_here_nor_reachable_is_named(settings):
    with pytest.raises(
        MedcotError, match=r"no-one/nothing is not here and the hub cannot be asked .* check the network"
    ):
        check_machine(replace(settings, model="no-one/nothing"))


def test_everything_wrong_is_said_at_once(monkeypatch, gpu_settings):
    cards(monkeypatch, ("Tesla P100-PCIE-16GB", (6, 0)))
    with pytest.raises(MedcotError, match=r"compute capability 6.0.*; nproc_per_node=3.*; model no-one/nothing"):
        check_machine(replace(gpu_settings, nproc_per_node=3, model="no-one/nothing"))


def test_three_real_steps_foretell_the_run_and_leave_nothing(settings, capsys):
    found = preflight(replace(settings, max_steps=40, session_minutes=700))
    printed = capsys.readouterr().out
    assert re.search(r"40 steps take about \d+\.\d minutes of (700|6\d\d) that the session has left", printed)
    assert 0 < found.minutes < 5 and found.peak_gib is None
    assert "64 training rows" in printed and "would lose their answer" in printed
    assert not list(settings.output_dir.iterdir())


def test_the_forecast_counts_the_tokens_to_come_and_leaves_the_compiling_step_out():
    from medcot.training import forecast

    epoch = [[200]] * 3 + [[400]] * 2  # five steps of one micro-batch: 200 tokens in the first three, then 400
    found = forecast(epoch, [30.0, 2.0, 2.0], first=0, steps=5)
    assert found.minutes * 60 == pytest.approx(34 + 2 * 4.0) and found.steps == 5 and found.peak_gib is None
    memory = {"memory_before": 6 * 2**30, "memory_peak": 8 * 2**30, "memory": 15 * 2**30}
    found = forecast(epoch, [30.0, 2.0, 2.0], first=0, steps=5, **memory)
    assert found.peak_gib == 6 + 2 * 400 / 200  # above what was there before, in proportion to the widest micro-batch


def test_a_run_longer_than_a_session_is_refused(settings):
    with pytest.raises(
        MedcotError, match=r"do not fit the (700|6\d\d) that the session has left: lower max_steps=10000000"
    ):
        preflight(replace(settings, max_steps=10_000_000, session_minutes=700))


def test_a_run_shorter_than_the_forecast_takes_is_refused(settings):
    with pytest.raises(MedcotError, match=r"max_steps=2: a forecast takes 3 steps"):
        preflight(replace(settings, max_steps=2))


def test_a_forecast_beyond_what_there_is_says_so():
    from medcot.training import Forecast

    words = str(Forecast(steps=60, minutes=30.0, minutes_left=20.0, peak_gib=16.0, gpu_gib=15.0))
    assert "take about 30.0 minutes of 20 that the session has left (too few: training will stop" in words
    assert "16.0 of 15.0 GiB of GPU memory at the widest batch (too little:" in words
    assert "too" not in str(Forecast(steps=60, minutes=3.0, minutes_left=20.0, peak_gib=6.0, gpu_gib=15.0))


def test_the_t4x2_profile_keeps_eight_examples_a_step():
    assert {PROFILES[name].examples_per_step for name in ("kaggle-t4", "kaggle-t4-fast", "kaggle-t4x2")} == {8}
