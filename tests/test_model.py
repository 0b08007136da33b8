"""Weights and tokenizer: the contract, adapters that moved on a base that did not, and what reloads elsewhere."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medcot import load_model, load_tokenizer
from medcot.identity import adapter_id
from medcot.model import ADAPTER_FILES
from medcot.prompts import format_prompt
from medcot.settings import EMBEDDED_MODEL, MedcotError
from medcot.tokenizer import check_tokenizer


def test_only_the_adapters_moved(trained):
    moved, stayed = [], []
    for name, weight in trained.model.named_parameters():
        (stayed if torch.equal(weight, trained.before[name]) else moved).append(name)
    assert all("lora_" in name for name in moved)
    assert not any("lora_" in name for name in stayed)
    layers = trained.model.config.num_hidden_layers
    assert len(moved) == layers * 2 * len(trained.settings.target_modules)


def test_base_weights_are_in_four_bits(trained):
    assert (
        trained.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state.quant_type
        == "nf4"
    )


def test_the_adapter_folder_has_its_six_files(trained):
    found = {file.name for file in trained.settings.adapter_dir.iterdir()}
    assert found >= set(ADAPTER_FILES)
    assert not list(trained.settings.adapter_dir.parent.glob("*.saving"))
    config = json.loads((trained.settings.adapter_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(adapter)
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
short = []
for prompt, end in texts:
    start = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
    short += (logits.max(dim=1).values - logits[torch.arange(len(end)), torch.tensor(end)]).tolist()
print("RESULT" + json.dumps([tokenizer.decode(tokenizer.encode("chest pain", add_special_tokens=False)), short]))
"""


def test_stock_peft_in_a_fresh_process_gives_the_same_greedy_answers(trained):
    model, tokenizer = load_model(trained.settings, adapter=trained.settings.adapter_dir)
    prompts = [format_prompt(question) for question in trained.splits.eval["Question"][:6]]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    generated = output[:, inputs["input_ids"].shape[1] :].tolist()
    answers = [[token for token in row if token != tokenizer.pad_token_id] for row in generated]
    texts = json.dumps(list(zip(prompts, answers, strict=True)))
    command = [sys.executable, "-c", STOCK, EMBEDDED_MODEL, str(trained.settings.adapter_dir), texts]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    text, short = json.loads(run.stdout.split("RESULT")[1])
    assert text == "chest pain" and len(short) > 50
    # Every token we chose is stock's greedy choice too, but for ties closer than the 4-bit products of the two are.
    assert max(short) < 0.05 and sum(gap == 0 for gap in short) > 0.97 * len(short)


def test_a_reloaded_model_is_the_trained_one(trained):
    from medcot.model import for_inference

    inputs = trained.tokenizer(format_prompt(trained.splits.eval[0]["Question"]), return_tensors="pt")
    reloaded, _ = load_model(trained.settings, adapter=trained.settings.adapter_dir)
    with torch.no_grad():
        expected = trained.trainer.accelerator.unwrap_model(for_inference(trained.model), keep_fp32_wrapper=False)(
            **inputs
        )
        found = reloaded(**inputs)
    # The adapters are bit-identical (below); bitsandbytes' 4-bit products differ a little between two loads.
    torch.testing.assert_close(found.logits, expected.logits, atol=8e-3, rtol=0)
    assert adapter_id(reloaded) == adapter_id(trained.model) != "base"
    with reloaded.disable_adapter():
        assert adapter_id(reloaded) == "base"


@pytest.fixture
def adapter(trained, tmp_path):
    return Path(shutil.copytree(trained.settings.adapter_dir, tmp_path / "adapter"))


def test_a_missing_adapter_names_the_notebook(settings):
    with pytest.raises(MedcotError, match=r"run 02_finetune.ipynb with the same profile first"):
        load_model(settings, adapter=settings.adapter_dir)


def test_a_truncated_adapter_is_refused(settings, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(MedcotError, match=r"adapter_model.safetensors is damaged"):
        load_model(settings, adapter=adapter)


def test_an_adapter_of_another_base_is_refused(settings, adapter):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.zeros(3, 3)}, weights)
    with pytest.raises(MedcotError, match=r"made for another base.*1 of \d+ tensors differ.*\(3, 3\) in the file"):
        load_model(settings, adapter=adapter)


def test_pickled_weights_are_refused(settings, tmp_path):
    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "pickled"))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(MedcotError, match="only safetensors are loaded"):
        load_model(replace(settings, model=str(folder)))


def test_a_model_that_is_not_there_is_one_error(settings):
    with pytest.raises(MedcotError, match="no model at /nowhere"):
        load_model(replace(settings, model="/nowhere"))


def broken(tmp_path, change_config=None, change_tokenizer=None):
    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "broken"))
    for name, change in (("tokenizer_config.json", change_config), ("tokenizer.json", change_tokenizer)):
        if change:
            content = json.loads((folder / name).read_text())
            change(content)
            (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_a_metaspace_tokenizer_is_refused_because_it_loses_spaces(tmp_path):
    def metaspace(tokenizer):
        tokenizer["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "never",
            "split": False,
        }

    with pytest.raises(MedcotError, match=r"broken cannot be used: 'chest pain.*Cure: take tokenizer.json"):
        load_tokenizer(broken(tmp_path, change_tokenizer=metaspace))


def test_a_tokenizer_without_bos_in_front_is_refused(tmp_path):
    with pytest.raises(MedcotError, match="has 0 BOS tokens, one is needed in front"):
        load_tokenizer(broken(tmp_path, change_tokenizer=lambda tokenizer: tokenizer.update(post_processor=None)))


def test_a_tokenizer_that_splits_the_think_tag_is_refused(tmp_path):
    def split(tokenizer):
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "think" not in token["content"]]

    def unlist(config):
        decoder = config.get("added_tokens_decoder", {})
        config["added_tokens_decoder"] = {k: v for k, v in decoder.items() if "think" not in v["content"]}

    with pytest.raises(MedcotError, match="<think> is not one token; </think> is not one token"):
        load_tokenizer(broken(tmp_path, unlist, split))


def test_padding_with_eos_is_mended_or_refused(tmp_path):
    def pad_is_eos(config):
        config["pad_token"] = config["eos_token"]

    folder = broken(tmp_path, pad_is_eos)
    mended = load_tokenizer(folder)
    assert mended.pad_token_id not in (None, mended.eos_token_id)
    mended.pad_token = mended.eos_token
    with pytest.raises(MedcotError, match="is not a token of its own"):
        check_tokenizer(mended, folder)
