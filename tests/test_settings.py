"""Every number of a run is stated, checked and chosen with a reason."""

import ast
import inspect
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from pathlib import Path

import pandas
import pytest

from medcot import settings as room
from medcot.profiles import PROFILES, load_settings
from medcot.settings import EMBEDDED_MODEL, MedcotError, Settings

T4 = PROFILES["kaggle-t4"]


def test_kaggle_t4_is_the_recipe_of_the_original_run():
    assert (T4.r, T4.lora_alpha, T4.lora_dropout) == (16, 16, 0.0)
    assert set(T4.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (T4.per_device_train_batch_size, T4.gradient_accumulation_steps, T4.examples_per_step) == (2, 4, 8)
    assert (T4.learning_rate, T4.max_steps, T4.warmup_steps, T4.lr_scheduler_type) == (2e-4, 60, 5, "linear")
    assert (T4.optim, T4.weight_decay, T4.seed, T4.max_seq_length) == ("adamw_8bit", 0.01, 3407, 2048)
    assert (T4.train_rows, T4.completion_only_loss, T4.load_in_4bit, T4.device) == (500, False, True, "cuda")
    assert T4.dataset == "FreedomIntelligence/medical-o1-reasoning-SFT" and T4.dataset_config == "en"


def test_every_field_has_a_docline():
    tree = ast.parse(inspect.getsource(room))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings").body
    documented = {
        field.target.id
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(Settings)}


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        T4.max_steps = 1


def test_a_name_that_is_none_is_told_its_neighbour(monkeypatch):
    with pytest.raises(MedcotError, match=r"max_step is unknown: did you mean max_steps\?"):
        load_settings(max_step=5)
    monkeypatch.setenv("MEDCOT_PROFIL", "smoke")
    with pytest.raises(MedcotError, match=r"variable MEDCOT_PROFIL is unknown: did you mean MEDCOT_PROFILE\?"):
        load_settings()


def test_any_field_can_be_given_to_load_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    settings = load_settings(max_steps=7, output_dir=tmp_path)
    assert settings == replace(PROFILES["smoke"], max_steps=7, output_dir=tmp_path)


def test_the_recipe_shows_every_number_that_decides():
    recipe = T4.recipe()[""]
    assert recipe["steps"] == "60, 8 examples each, 480 in all" and recipe["examples a step"] == "2 at once x 4"
    assert recipe["learning rate"] == "0.0002, linear, 5 steps of warm-up" and recipe["LoRA"].startswith(
        "r 16, alpha 16"
    )
    assert recipe["primary measure"] == "multiple choice" and len(recipe) == 10


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_no_line_of_the_recipe_is_cut_off_in_a_notebook(profile):
    assert not [line for line in profile.recipe()[""] if len(line) >= pandas.get_option("display.max_colwidth")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": -1}, ["max_steps=-1", "greater than or equal to 0"]),
        ({"dataset": "embedded cases", "train_rows": 0}, ["train_rows=0", "no end: give a number"]),
        ({"r": 2.5}, ["r=2.5", "valid integer"]),
        ({"warmup_steps": 60}, ["warmup_steps=60", "max_steps=60", "lower warmup_steps"]),
        ({"answer_rows": 101}, ["answer_rows=101", "eval_rows=100", "raise eval_rows"]),
        ({"eval_loss_rows": 101}, ["eval_loss_rows=101", "eval_rows=100", "raise eval_rows"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0", "greater than 0"]),
        ({"lora_dropout": 1.0}, ["lora_dropout=1.0", "less than 1"]),
        ({"weight_decay": -1.0}, ["weight_decay=-1.0", "greater than or equal to 0"]),
        ({"device": "tpu"}, ["device='tpu'", "'cuda' or 'cpu'"]),
        ({"report_to": "tensorboard"}, ["report_to='tensorboard'", "'wandb' or 'none'"]),
        ({"lr_scheduler_type": "lineal"}, ["lr_scheduler_type='lineal'", "cosine"]),
        ({"target_modules": "q_proj"}, ["target_modules='q_proj'", "tuple"]),
        ({"max_seq_length": 64}, ["max_seq_length=64", "greater than or equal to 128"]),
        ({"device": "cpu", "max_seq_length": 2**18}, ["max_seq_length=262144", "lower one"]),
    ],
)
def test_conflicts_name_the_values_and_the_cure(changes, named):
    with pytest.raises(MedcotError) as error:
        replace(T4, **changes)
    assert all(words in str(error.value) for words in named), error.value


def test_all_conflicts_are_reported_at_once():
    with pytest.raises(MedcotError, match=r"r=0.*learning_rate=-1"):
        replace(T4, r=0, learning_rate=-1)


def test_without_a_gpu_the_default_is_tiny_and_one_line_says_why(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_settings().profile == "tiny"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "profile tiny (no CUDA GPU here)" in printed and EMBEDDED_MODEL in printed


def test_with_a_gpu_the_default_is_the_t4_profile(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla T4")
    assert load_settings().profile == "kaggle-t4-fast"
    assert "found Tesla T4" in capsys.readouterr().out


def test_environment_overrides(monkeypatch, tmp_path):
    for name, value in {"PROFILE": "smoke", "MODEL": "m", "DATASET": "d.jsonl", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(f"MEDCOT_{name}", value)
    settings = load_settings()
    assert (settings.profile, settings.model, settings.dataset, settings.output_dir) == (
        "smoke",
        "m",
        "d.jsonl",
        tmp_path,
    )
    assert settings == replace(PROFILES["smoke"], model="m", dataset="d.jsonl", output_dir=tmp_path)


def test_unknown_profile_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("MEDCOT_PROFILE", "kagle-t4")
    with pytest.raises(MedcotError, match="'kagle-t4' is unknown") as error:
        load_settings()
    assert all(profile in str(error.value) for profile in PROFILES)


def test_gpu_profile_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MEDCOT_PROFILE", "kaggle-t4")
    with pytest.raises(MedcotError, match=r"needs a CUDA GPU.*MEDCOT_PROFILE=tiny"):
        load_settings()


def test_one_outputs_folder_for_notebooks_and_command_line(monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "kaggle-metadata.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
        assert load_settings().output_dir == tmp_path / "outputs" / "smoke"


def test_output_dir_is_a_path():
    assert replace(T4, output_dir="there").adapter_dir == Path("there/DeepSeek-R1-Medical-COT")
