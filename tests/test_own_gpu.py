"""Any CUDA card: what fits it, decided by arithmetic alone. None of this has run on such a card."""

import os
import shutil
import subprocess
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from medcot.gpus import SHAPES, arrange, shape_of
from medcot.model import load_model
from medcot.profiles import PROFILES, load_settings
from medcot.run.preflight import check_machine, least_gib, which_fit
from medcot.settings import EMBEDDED_MODEL, MedcotError

LLAMA_8B = SHAPES["DeepSeek-R1-Distill-Llama-8B"]
PUBLISHED = {  # parameters, as each model's page on the hub counts them
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000, "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248, "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameters_are_those_of_the_model_that_transformers_builds(name):
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    sizes = asdict(SHAPES[name])
    config = Qwen2Config if sizes.pop("attention_bias") else LlamaConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**sizes, tie_word_embeddings=False))
    assert SHAPES[name].parameters == sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


def test_the_estimates_meet_what_was_measured_of_the_8b():
    assert LLAMA_8B.loaded_gib == pytest.approx(5.5, abs=0.1)
    assert LLAMA_8B.training_gib(2 * 1180) == pytest.approx(6.5, abs=0.1)  # kaggle-t4, tests/benchmarks/README.md
    assert LLAMA_8B.training_gib(7000) == pytest.approx(7.4, abs=0.2)  # 8 x 1 without padding


def test_a_shape_is_known_by_name_or_folder():
    for name in ("unsloth/DeepSeek-R1-Distill-Llama-8B", "deepseek-ai/deepseek-r1-distill-llama-8b",
                 "unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit", "unsloth/deepseek-r1-distill-llama-8b-bnb-4bit"):  # fmt: skip
        assert shape_of(name) == LLAMA_8B
    assert shape_of("someone/else") is None
    model, _ = load_model(replace(PROFILES["smoke"], load_in_4bit=False))
    # The embedded model shares its embeddings, so it has one table less than the shape counts.
    shape = shape_of(EMBEDDED_MODEL)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tied = shared * shape.vocab_size * shape.hidden_size
    assert shape.parameters - tied == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", [f"deepseek-ai/{name}" for name in SHAPES])
@pytest.mark.parametrize("gib", [4.0, 7.6, 8.0, 10.0, 11.8, 14.6, 24.0, 47.5, 79.2])
def test_what_is_decided_fits_the_card_and_keeps_eight_examples(name, gib):
    found, shape = arrange(name, gib, (8, 6)), shape_of(name)
    settings = replace(PROFILES["gpu"], **found)
    assert settings.examples_per_step == 8
    longest = settings.per_device_train_batch_size * settings.max_seq_length
    if least_gib(shape) <= gib:
        assert shape.training_gib(longest) + settings.activation_memory_gib <= gib
        assert shape.loaded_gib + settings.generation_memory_gib <= gib
    else:
        assert (settings.per_device_train_batch_size, settings.activation_memory_gib) == (1, 0)


def test_larger_cards_get_larger_batches_and_newer_ones_bfloat16():
    cards = {gib: arrange("unsloth/DeepSeek-R1-Distill-Llama-8B", gib, (8, 9)) for gib in (7.1, 7.7, 10, 14.6, 24)}
    assert [found["per_device_train_batch_size"] for found in cards.values()] == [1, 2, 4, 4, 4]
    kept = [found["activation_memory_gib"] for found in cards.values()]
    assert kept[1] < 1 and 5 < kept[3] < 8 < kept[4]  # kaggle-t4-fast keeps 8 for the rows it knows
    for capability, dtype in (((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")):
        assert arrange("a/b", 24, capability)["dtype"] == dtype
    assert arrange("a/b", 24, (8, 0))["per_device_train_batch_size"] == 1  # of unknown shape


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine with one card, as far as torch's questions go."""

    def put(name, capability, gib):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda i=0: name)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda i=0: capability)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda i=0: SimpleNamespace(total_memory=gib * 2**30))

    monkeypatch.setenv("MEDCOT_OUT", str(tmp_path))
    monkeypatch.setenv("MEDCOT_PROFILE", "gpu")
    return put


def test_the_profile_is_arranged_by_the_card_and_the_environment_decides_above_it(card, monkeypatch):
    card("NVIDIA GeForce RTX 3070", (8, 6), 7.7)
    settings = load_settings()
    assert (settings.dtype, settings.per_device_train_batch_size, settings.examples_per_step) == ("bfloat16", 2, 8)
    assert settings.padding_free and settings.profile == "gpu" and settings.device == "cuda"
    assert load_settings(dtype="float16", activation_memory_gib=0.0).dtype == "float16"
    card("Quadro RTX 6000", (7, 5), 23.6)
    monkeypatch.setenv("MEDCOT_MODEL", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B")
    settings = load_settings()
    assert (settings.dtype, settings.per_device_train_batch_size) == (
        "float16",
        4,
    ) and settings.activation_memory_gib > 5


def test_preflight_says_which_base_fits_and_refuses_what_does_not(card, capsys):
    card("NVIDIA GeForce RTX 3070", (8, 6), 7.7)
    with pytest.raises(MedcotError, match=r"7.7 GiB of memory and .*Qwen-14B needs at least 11:"):
        check_machine(load_settings(model="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"))
    said = capsys.readouterr().out
    assert (
        "needs about (GiB, estimated): Qwen-1.5B 2.6, Qwen-7B 6.9, Llama-8B 7.0, Qwen-14B 11.4, Llama-70B 41.8" in said
    )
    assert "fits 7.7: Qwen-1.5B, Qwen-7B, Llama-8B\n" in said
    assert which_fit(2.0).endswith("fits 2.0: none")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_trainer_computes_in_what_the_settings_say(monkeypatch, settings, dtype, device):
    from medcot import training

    monkeypatch.setattr("trl.SFTConfig", lambda **values: SimpleNamespace(**values))
    arguments = training._arguments(replace(settings, device=device, dtype=dtype), None, 5)
    assert (arguments.fp16, arguments.bf16) == (
        (dtype == "float16", dtype == "bfloat16") if device == "cuda" else (False, False)
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_takes_the_profile_from_environment_and_command_line(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "medcot"
    program.write_text('#!/bin/sh\necho "$1 with $MEDCOT_PROFILE"\n')
    program.chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()

    def make(*words, **environment):
        run = subprocess.run(["make", "-s", "demo", *words], cwd=tmp_path, env=os.environ | environment, capture_output=True,
                             text=True, check=True)  # fmt: skip
        return run.stdout.strip()

    assert make() == "demo with tiny"
    assert make("MEDCOT_PROFILE=gpu") == make(MEDCOT_PROFILE="gpu") == "demo with gpu"
