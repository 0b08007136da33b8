"""One identity: what on disk belongs to a run is taken up, anything else is refused by the name of the part."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import RUN, job
from safetensors.torch import load_file, save_file

from medcot import MedcotError, generate_answers, identity, load_model, load_settings, load_splits, prompts
from medcot.settings import EMBEDDED_MODEL


@pytest.fixture
def model_folder(tmp_path):
    """A copy of the embedded model, which a test may change."""
    return Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"))


def nudge(folder):
    """Other weights of the same shape, in place."""
    file = folder / "model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of a finished run's folder, and the environment that belongs to it."""
    out = Path(shutil.copytree(trained.settings.output_dir, tmp_path / "run"))
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("MEDCOT_OUT", str(out))
    return replace(trained.settings, output_dir=out)


CHANGES = {"max_steps": 12, "learning_rate": 2e-3}  # of the shared run


def test_the_same_settings_find_their_run(run):
    assert load_settings(**CHANGES).output_dir == run.output_dir


def test_another_setting_is_named_in_the_settings_cell_with_a_folder_to_use(run):
    with pytest.raises(MedcotError) as error:
        load_settings(**CHANGES | {"lora_alpha": 32})
    assert "training.json is of another run: lora_alpha was 16 and is 32. Set that back" in str(error.value)
    assert f"MEDCOT_OUT={run.output_dir}-2" in str(error.value)
    load_settings(**CHANGES, logging_steps=3, save_steps=5)  # these decide nothing


def test_rows_that_another_session_trained_on_are_refused_before_a_model_is_loaded(run):
    # 02 trained on 64 rows. With other rows in 03, an evaluation row might have been trained on.
    with pytest.raises(MedcotError, match=r"training.json is of another run: train_rows was 64 and is 80"):
        load_splits(replace(run, train_rows=80))
    record = json.loads((run.output_dir / "training.json").read_text())
    record["identity"]["training rows"] = "others"  # as many, but not the same
    (run.output_dir / "training.json").write_text(json.dumps(record))
    with pytest.raises(MedcotError, match=r"training rows was others and is [0-9a-f]+"):
        load_splits(run)


def test_another_instruction_is_another_run(run, monkeypatch):
    monkeypatch.setattr(prompts, "INSTRUCTION", prompts.INSTRUCTION.replace("medical expert", "nurse"))
    with pytest.raises(MedcotError, match=r"training.json is of another run: prompt was"):
        load_settings(**CHANGES)


def test_answers_to_another_prompt_are_not_taken_up(trained, settings, monkeypatch):
    rows = load_splits(settings).eval
    with trained.model.disable_adapter():
        before = generate_answers(trained.model, trained.tokenizer, rows, settings)
        monkeypatch.setattr(prompts, "INSTRUCTION", prompts.INSTRUCTION.replace("medical expert", "nurse"))
        after = generate_answers(trained.model, trained.tokenizer, rows, settings)
    assert before.path != after.path


def test_weights_replaced_in_place_are_another_run(settings, model_folder):
    settings = replace(settings, model=str(model_folder))
    model, tokenizer = load_model(settings)
    generate_answers(model, tokenizer, load_splits(settings).eval, settings)
    nudge(model_folder)
    with pytest.raises(MedcotError, match=r"baseline-answers.*jsonl is of another run: base model was contents"):
        load_splits(settings)


def test_a_checkpoint_does_not_go_on_over_replaced_weights(settings, model_folder):
    settings = replace(settings, model=str(model_folder), **RUN)
    job(replace(settings, max_steps=20), stop_after=2)
    nudge(model_folder)
    with pytest.raises(
        MedcotError, match=r"checkpoint.json|training.json.* is of another run: base model was contents"
    ):
        job(replace(settings, max_steps=20))


def test_a_model_is_known_by_what_it_is_and_not_by_its_path(settings, model_folder, tmp_path):
    moved = Path(shutil.copytree(model_folder, tmp_path / "elsewhere"))
    assert identity.base_id(replace(settings, model=str(model_folder))) == identity.base_id(
        replace(settings, model=str(moved))
    )
    job(replace(settings, model=str(model_folder), max_steps=4, **RUN), stop_after=2)
    trainer = job(replace(settings, model=str(moved), max_steps=4, **RUN))
    assert trainer.state.global_step == 4 and any(
        "continued from step" in e.get("note", "") for e in trainer.state.log_history
    )


def test_a_moved_hub_commit_is_another_run(settings):
    models = [
        SimpleNamespace(config=SimpleNamespace(_name_or_path="house/model-bnb-4bit", _commit_hash=c)) for c in "ab"
    ]
    names = [identity.base_id(replace(settings, model="house/model"), model) for model in models]
    assert names == ["house/model-bnb-4bit@a", "house/model-bnb-4bit@b"]
    assert identity.base_id(replace(settings, model="house/model")) is None  # not known before it is loaded


def test_large_weights_are_known_by_a_sample(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(identity, "_SAMPLE", 2**20)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(8 * 2**20))
    settings = replace(settings, model=str(tmp_path))
    before = identity.base_id(settings)
    file.write_bytes(bytes(4 * 2**20) + b"\1" * (4 * 2**20))
    assert identity.base_id(settings) != before


def test_a_scaling_edited_by_hand_is_another_adapter(run):
    config = run.adapter_dir / "adapter_config.json"
    as_trained = identity.adapter_id(load_model(run, adapter=run.adapter_dir)[0])
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert identity.adapter_id(load_model(run, adapter=run.adapter_dir)[0]) != as_trained


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(run, model_folder, tmp_path):
    nudge(model_folder)
    other = replace(run, model=str(model_folder), output_dir=tmp_path / "new")
    with pytest.raises(MedcotError, match=r"was made for another base: contents [0-9a-f]+, and .*model is contents"):
        load_model(other, adapter=run.adapter_dir)


def test_an_adapter_that_does_not_say_its_base_is_taken_with_a_word(run, capsys):
    (run.adapter_dir / identity.ADAPTER_FILE).unlink()
    load_model(run, adapter=run.adapter_dir)
    assert "does not say on which weights it was trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"bias": "all"}]
)
def test_more_than_plain_lora_is_refused(run, more):
    config = run.adapter_dir / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    with pytest.raises(MedcotError, match=rf"{next(iter(more))}=.* is not plain LoRA"):
        load_model(run, adapter=run.adapter_dir)


def test_every_file_of_a_run_carries_the_same_parts(run):
    record = json.loads((run.output_dir / "training.json").read_text())
    sealed = [json.loads(file.read_text())["identity"] for file in run.output_dir.glob("checkpoints/*/checkpoint.json")]
    adapter = json.loads((run.adapter_dir / identity.ADAPTER_FILE).read_text())
    assert sealed and all(parts == record["identity"] for parts in sealed)
    assert adapter.items() <= record["identity"].items() and adapter["base model"].startswith("contents")
    assert record["identity_hash"] == identity.hash_of(record["identity"])
