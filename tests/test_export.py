"""Exports: the weights that are written, what is compared, and what is refused before anything is written."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from medcot import export as package
from medcot.export import export, parity
from medcot.export import gguf as writing
from medcot.export.merged import MergedWeights
from medcot.prompts import INSTRUCTION, format_prompt
from medcot.settings import EMBEDDED_MODEL, NOTICE, MedcotError
from medcot.tokenizer import load_tokenizer

GIB = 2**30
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>")
ADDED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


@pytest.fixture(scope="module", autouse=True)
def _no_notes():
    parity.quiet()


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """The 8B's structure in small: grouped heads, Llama 3.1's rotary scaling, untied embeddings, its way to cut text."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from medcot.profiles import PROFILES

    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(writing.LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=list(SPECIAL),
    )
    made.train_from_iterator([INSTRUCTION, *parity.QUESTIONS, "0 12 345 it's we've  \n\n x"], trainer)
    made.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    bos = SPECIAL[0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        chat_template="{{ bos_token }}",
    )
    config = LlamaConfig(
        vocab_size=made.get_vocab_size() + 9, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.08,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama3")
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = replace(PROFILES["smoke"], model=str(folder / "base"), load_in_4bit=False, output_dir=folder)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=list(settings.target_modules)))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(settings.adapter_dir)
    tokenizer.save_pretrained(settings.adapter_dir)
    (settings.adapter_dir / "special_tokens_map.json").write_text("{}")
    return SimpleNamespace(settings=settings, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def four_bit(trained, tmp_path_factory):
    """The embedded model as bitsandbytes 4-bit files, like the hub's copy of the 8B, with the trained adapter."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("four_bit")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"],  # the hub's copy leaves some matrices in 16 bits
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, quantization_config=quantised).save_pretrained(folder / "base")
    settings = replace(trained.settings, model=str(folder / "base"), output_dir=folder)
    shutil.copytree(trained.settings.adapter_dir, settings.adapter_dir)
    return settings


def rows(folder):
    return json.loads((folder / "parity.json").read_text(encoding="utf-8"))["rows"]


# --- the whole path -----------------------------------------------------------------------------------------------------


def test_every_kind_says_what_the_adapter_says(trained, tmp_path, capsys):
    names = {
        "adapter": {file.name for file in trained.settings.adapter_dir.iterdir() if file.is_file()},
        "merged": {"model.safetensors", "config.json", "generation_config.json"},
        "gguf": {"model-f16.gguf", "config.json"},
        "ollama": {"model-q8_0.gguf", "config.json", "Modelfile"},
    }
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    for kind, files in names.items():
        folder = export(trained.settings, kind, "f16" if kind == "gguf" else "q8_0", to=tmp_path)
        assert {file.name for file in folder.iterdir()} == files | tokenizer | {"README.md", "parity.json"}
        found, card = rows(folder), (folder / "README.md").read_text(encoding="utf-8")
        compared = [row for row in found if row["bound"] is not None]
        assert compared and all(row["passed"] and row["same_first_token"] == row["prompts"] == 10 for row in compared)
        assert NOTICE in card and "| same greedy tokens |" in card and found[-1]["name"].endswith("as trained")
        assert str(REPOSITORY) not in card and str(tmp_path) not in card
    # With a merged folder of the same adapter beside it, the GGUF's table holds all three.
    assert [row["name"] for row in found][:2] == ["merged", "ollama (q8_0, by transformers)"]
    assert "Kept in" in capsys.readouterr().out


def test_the_structure_of_the_8b(llama3, tmp_path):
    for kind, type in (("merged", "f16"), ("gguf", "f16"), ("gguf", "q8_0"), ("ollama", "q8_0")):
        folder = export(llama3.settings, kind, type, to=tmp_path)
        facts = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
        assert all(row["passed"] for row in facts["rows"]) and facts["text_agrees"] is True
        assert len([row for row in facts["rows"] if row["bound"] is None]) == 0  # nothing was held in 4 bits


def test_the_run_card_goes_along_under_its_front_matter(trained, tmp_path):
    from huggingface_hub import ModelCard

    settings = replace(trained.settings, output_dir=tmp_path)
    shutil.copytree(trained.settings.adapter_dir, settings.adapter_dir)
    front = "---\nlibrary_name: peft\nlicense: other\ntags:\n- medical\n---\n\n"
    (settings.adapter_dir / "README.md").write_text(f"{front}# Run card\n\n{NOTICE}\n\nsteps 12\n", encoding="utf-8")
    for kind, library in (("adapter", "peft"), ("merged", "transformers"), ("ollama", "gguf")):
        card = ModelCard.load(export(settings, kind) / "README.md")
        assert card.data.library_name == library and card.data.license == "other" and card.data.tags == ["medical"]
        assert (
            card.text.index("## Compared with the adapter")
            < card.text.index("# Run card")
            < card.text.index("steps 12")
        )


@pytest.mark.parametrize(
    "left", [("merged.writing",), ("merged.old",), ("merged.old", "merged.writing"), ("merged", "merged.old")]
)
def test_what_a_killed_export_left_is_put_right(tmp_path, left):
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    folder = tmp_path / "merged"
    with pytest.raises(KeyboardInterrupt), package._beside(folder):
        raise KeyboardInterrupt
    # The last finished one is back in its place, and nothing else is left.
    finished = [name for name in left if not name.endswith(".writing")]
    assert [path.name for path in tmp_path.iterdir()] == (["merged"] if finished else [])
    assert not finished or (folder / "file").read_text() == finished[0]
    with package._beside(folder) as fresh:
        (fresh / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and (folder / "file").read_text() == "new"


def test_merged_loads_anywhere_and_its_tokenizer_is_whole(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(trained.settings, "merged", to=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = format_prompt("Chest pain, ≥ 65?")
    assert tokenizer(prompt)["input_ids"] == trained.tokenizer(prompt)["input_ids"]
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16 and getattr(model.config, "quantization_config", None) is None


# --- weights ------------------------------------------------------------------------------------------------------------


def test_every_merged_tensor_is_what_peft_makes_of_it(llama3):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = llama3.settings
    weights = MergedWeights(Path(settings.model), settings.adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, settings.adapter_dir).merge_and_unload().state_dict()
    assert set(weights) == set(expected)
    moved = [name for name in weights if not torch.equal(expected[name], before[name])]
    assert len(moved) == 2 * 7
    for name in weights:
        assert weights[name].dtype is torch.bfloat16
        torch.testing.assert_close(weights[name].float(), expected[name], rtol=2**-8, atol=1e-7)


def test_shards_hold_together(llama3, tmp_path, monkeypatch):
    monkeypatch.setattr("medcot.export.merged.SHARD_BYTES", 200_000)
    folder = export(llama3.settings, "merged", to=tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and {name for shard in shards for name in load_file(shard)} == set(index["weight_map"])
    assert rows(folder)[0]["passed"]


def test_a_4_bit_base_is_dequantised_and_the_card_says_so(four_bit, tmp_path):
    import bitsandbytes.functional as functional

    weights = MergedWeights(Path(four_bit.model), four_bit.adapter_dir)
    kept = {name for name, tensor in weights.tensors.items() if len(tensor.shape) == 2 and not tensor.four_bit}
    assert kept == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")} | {
        "model.embed_tokens.weight"
    }
    lora, name = load_file(four_bit.adapter_dir / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    stored = load_file(Path(four_bit.model) / "model.safetensors")
    packed = {part: weight for part, weight in stored.items() if part.startswith(f"{name}.weight.")}
    state = functional.QuantState.from_dict(packed, device=torch.device("cpu"))
    plain = functional.dequantize_4bit(stored[f"{name}.weight"], state).float()
    a, b = (lora[f"base_model.model.{name}.lora_{kind}.weight"].float() for kind in "AB")
    torch.testing.assert_close(weights[f"{name}.weight"].float(), plain + b @ a, rtol=2**-10, atol=1e-6)
    assert not torch.equal(weights[f"{name}.weight"].float(), plain)
    folder = export(four_bit, "merged", to=tmp_path)
    found = rows(folder)
    assert len(found) == 1 and found[0]["passed"] and found[0]["same_first_token"] == 10
    assert "the base's 4-bit weights, dequantised" in (folder / "README.md").read_text(encoding="utf-8")


def test_16_bits_of_a_base_trained_in_4_are_said_and_measured(trained, tmp_path):
    folder = export(trained.settings, "merged", to=tmp_path)
    trained_row = rows(folder)[-1]
    assert (
        trained_row["bound"] is None and trained_row["largest_difference"] > 10 * rows(folder)[0]["largest_difference"]
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "not quite the weights that the adapter was trained and measured on" in card


@given(
    st.sampled_from([(8, 2), (4, 4), (6, 3), (1, 1)]),
    st.sampled_from([2, 4, 16]),
    st.sampled_from(["q_proj", "k_proj"]),
)
def test_rows_come_back_by_the_inverse_that_transformers_has(heads, size, which):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    count = heads[0] if which == "q_proj" else heads[1]
    weight = torch.arange(count * size * 3, dtype=torch.float32).reshape(count * size, 3)
    name = f"model.layers.0.self_attn.{which}.weight"
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}

    class Weights(dict):
        pass

    weights = Weights({name: weight})
    weights.config = config
    written = writing._ordered(weights, name).numpy()
    back = LlamaTensorProcessor(config).process(written, f"blk.0.attn_{which[0]}.weight").weights
    assert numpy.array_equal(back, weight.numpy())
    assert size == 2 or not numpy.array_equal(written, weight.numpy())


# --- what a comparison is worth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "type", "target", "wrong"),
    [
        ("gguf", "q8_0", "medcot.export.gguf._ordered", lambda weights, name: weights[name]),
        ("gguf", "f16", "medcot.export.gguf._ordered", lambda weights, name: weights[name]),
        ("merged", "f16", "medcot.export.merged.MergedWeights.__init__", "no update"),
        ("ollama", "q8_0", "medcot.export.merged.MergedWeights.__init__", "no update"),
        ("merged", "f16", "medcot.export.merged.MergedWeights.__init__", "scale without alpha"),
    ],
)
def test_a_wrong_export_is_seen_and_not_kept(llama3, tmp_path, monkeypatch, kind, type, target, wrong):
    kept = export(llama3.settings, kind, type, to=tmp_path)
    before = (kept / "parity.json").read_bytes()
    made = MergedWeights.__init__

    def spoiled(self, base, adapter):
        made(self, base, adapter)
        self.scale *= 0 if wrong == "no update" else 1 / 12

    monkeypatch.setattr(target, wrong if callable(wrong) else spoiled)
    with pytest.raises(MedcotError, match=r"does not say what the adapter says, so it was not kept: .* differs by"):
        export(llama3.settings, kind, type, to=tmp_path)
    assert (kept / "parity.json").read_bytes() == before  # the one that was there stays
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_not_a_number_is_no_agreement(tmp_path):
    reading = parity.Reading(torch.zeros(10, 4), [[1]] * 10)
    broken = parity.Reading(torch.full((10, 4), float("nan")), [[1]] * 10)
    assert reading.against(reading, "itself", 0.0).passed and not broken.against(reading, "broken", 0.5).passed
    with pytest.raises(MedcotError, match="was not kept: broken differs by nan"):
        parity.write_parity([broken.against(reading, "broken", 0.5)], tmp_path, {})


# --- the tokenizer in a GGUF --------------------------------------------------------------------------------------------


def fields(file):
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@given(
    text=st.text(max_size=60)
    | st.sampled_from(["12345 mg", "it's  two\n\n\nlines", "<think>x</think>", " a", "naïve ≥ 胸痛 🫀"])
)
def test_text_reads_as_by_the_adapters_tokenizer(llama3_file, text):
    ours, tokenizer = llama3_file
    assert ours.encode(text).ids == tokenizer(text)["input_ids"]
    assert ours.encode(text).ids.count(0) == 1 + text.count(SPECIAL[0])  # exactly one BOS


@pytest.fixture(scope="module")
def llama3_file(llama3, tmp_path_factory):
    folder = export(llama3.settings, "gguf", "q8_0", to=tmp_path_factory.mktemp("text"))
    return parity.gguf_tokenizer(folder / "model-q8_0.gguf"), load_tokenizer(str(llama3.settings.adapter_dir))


def test_what_a_reader_is_told_of_the_tokens(llama3, trained, tmp_path):
    told = fields(export(llama3.settings, "gguf", "f16", to=tmp_path / "a") / "model-f16.gguf")
    assert told["tokenizer.ggml.pre"] == "llama-bpe" and told["tokenizer.ggml.add_bos_token"] is True
    assert [told[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [0, 1, 2]
    types = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in (*SPECIAL, *ADDED)] == [3, 3, 3, 3, 3, 4, 4]  # 3 control, 4 user-defined
    assert len(types) == told["llama.vocab_size"] and types[f"[PAD{len(types) - 1}]"] == 5  # unused
    assert told["llama.attention.head_count_kv"] == 2 and told["general.description"] == NOTICE
    # The embedded model cuts text in a way of its own: said, on the card and in the record.
    folder = export(trained.settings, "gguf", "f16", to=tmp_path / "b")
    assert json.loads((folder / "parity.json").read_text())["text_agrees"] is False
    assert "right for token ids only" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_modelfile_is_the_projects_prompt(trained, llama3):
    text = writing.modelfile("model-q8_0.gguf", trained.settings, SPECIAL[1])
    template = text.split('TEMPLATE """', 1)[1].split('"""', 1)[0]
    question = "Aged 70, BP 85/50?"
    assert template.replace("{{ .Prompt }}", question) == format_prompt(question)
    assert text.count('"""') == 2 and not template.startswith(SPECIAL[0])  # the BOS comes from the file
    parameters = dict(re.findall(r'^PARAMETER (\w+) "?(.*?)"?$', text, re.M))
    assert parameters == {
        "stop": SPECIAL[1],
        "temperature": "0",
        "num_predict": "96",
        "num_ctx": "2048",
        "repeat_penalty": "1",
    }
    assert text.startswith(f"# {NOTICE}\nFROM ./model-q8_0.gguf\n")


# --- refused before anything is written ---------------------------------------------------------------------------------


def nothing_written(folder):
    return not any(folder.rglob("*"))


def test_too_little_disk_is_said_before_and_scratch_is_used(trained, tmp_path, monkeypatch, capsys):
    free = {}
    monkeypatch.setattr(
        package, "_free", lambda folder: next(size for part, size in free.items() if part in str(folder))
    )
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "scratch"))
    settings = replace(trained.settings, output_dir=tmp_path / "working")
    shutil.copytree(trained.settings.adapter_dir, settings.adapter_dir)
    free |= {"working": GIB // 100, "scratch": 100 * GIB}
    folder = export(settings, "gguf", "f16")
    assert folder == tmp_path / "scratch" / "medcot-export" / "gguf-f16" and (folder / "parity.json").is_file()
    assert "too little for 0.0: the export goes to" in capsys.readouterr().out
    free["scratch"] = 0
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "other").mkdir()
    free |= {"other": 0}
    for arguments, words in (
        ((), "are free at .*working.* and 0.0 GiB are free at"),
        ((tmp_path / "other",), "are free at"),
    ):
        with pytest.raises(MedcotError, match=r"so it was not begun: .*take --type q8_0.* --to") as raised:
            export(settings, "gguf", "f16", *arguments)
        assert re.search(words, str(raised.value))
    assert nothing_written(tmp_path / "other") and not (settings.output_dir / "export").exists()


def test_the_8b_does_not_fit_kaggles_folder_beside_a_session(monkeypatch):
    """16.1 GB merged into 19.5: to scratch; 8.5 GB as q8_0: kept."""
    monkeypatch.setattr(package, "on_kaggle", lambda: True)
    monkeypatch.setattr(package, "_free", lambda folder: int(17.5 * GIB) if "working" in str(folder) else 60 * GIB)
    weights = SimpleNamespace(bytes=2 * 8_030_261_248, adapter=REPOSITORY)
    settings = SimpleNamespace(output_dir=Path("/kaggle/working"))
    place = {
        name: package._place(package.Export(name[0], name[1], weights, None, settings), None)
        for name in (("merged", ""), ("gguf", "f16"), ("gguf", "q8_0"))
    }
    assert place["gguf", "q8_0"] == Path("/kaggle/working/export")
    assert place["merged", ""] == place["gguf", "f16"] != place["gguf", "q8_0"]
    # And comparing it takes what a session has, not what it has beside a loaded model.
    assert 16 * GIB < parity.reading_bytes(weights) < 19 * GIB


def test_too_little_memory_is_said_before(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=GIB // 2))
    with pytest.raises(
        MedcotError, match=r"takes about 1.0 GiB of memory and 0.5 are free, so it was not begun: end other"
    ):
        export(trained.settings, "merged", to=tmp_path)
    assert nothing_written(tmp_path)


def test_what_cannot_be_merged_is_named(trained, llama3, four_bit, tmp_path):
    def changed(**changes):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained.settings.adapter_dir, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    with pytest.raises(MedcotError, match="use_dora cannot be merged here, plain LoRA can: merge with peft"):
        MergedWeights(Path(EMBEDDED_MODEL), changed(use_dora=True))
    with pytest.raises(MedcotError, match=r"belongs to no weight of|name the base that the adapter was trained on"):
        MergedWeights(Path(llama3.settings.model), trained.settings.adapter_dir)
    with pytest.raises(MedcotError, match=r"no adapter_model.safetensors in .*: run 02_finetune"):
        export(replace(trained.settings, output_dir=tmp_path / "none"), "merged")
    with pytest.raises(MedcotError, match="export 'onnx' is unknown: choose one of adapter, merged, gguf, ollama"):
        export(trained.settings, "onnx")
    qwen = SimpleNamespace(config={"model_type": "qwen2"}, base="Qwen")
    with pytest.raises(MedcotError, match="GGUF is written for Llamas alone"):
        writing.write_gguf(qwen, "f16", tmp_path / "x.gguf")


def test_a_value_that_16_bits_cannot_hold_is_named(trained, tmp_path):
    weights = MergedWeights(Path(EMBEDDED_MODEL), trained.settings.adapter_dir)
    weights.scale = 1e9
    with pytest.raises(MedcotError, match=r"q_proj.weight does not fit torch.float16"):
        weights["model.layers.0.self_attn.q_proj.weight"]


def test_a_base_that_only_the_hub_has_is_the_one_of_the_adapters_configuration(trained, tmp_path):
    from medcot.export.merged import base_folder

    settings = replace(trained.settings, model="house/not-here")
    assert base_folder(settings, settings.adapter_dir) == Path(EMBEDDED_MODEL)  # what its configuration names
    folder = tmp_path / "adapter"
    shutil.copytree(settings.adapter_dir, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "house/not-here"}))
    with pytest.raises(MedcotError, match=r"the base house/not-here could not be fetched .* name a folder of it"):
        base_folder(settings, folder)


def test_the_command(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("medcot.profiles.load_run", lambda output_dir: trained.settings)
    parser = argparse.ArgumentParser()
    package.add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(["export", "ollama", "--to", str(tmp_path)])
    options.run(options)
    assert (
        tmp_path / "ollama" / "Modelfile"
    ).is_file() and "| ollama (q8_0, by transformers) |" in capsys.readouterr().out


# --- a second reader ----------------------------------------------------------------------------------------------------


def llama_cpp() -> str:
    """A Python that has llama-cpp-python: this one, or the one that LLAMA_CPP_PYTHON names."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip(
            "llama-cpp-python is not here: pip install it (it builds for minutes), or name its Python in LLAMA_CPP_PYTHON"
        )
    return python


@pytest.mark.parametrize("which", ["trained", "llama3"])
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_llama_cpp_says_what_the_adapter_says(which, type, tmp_path, request):
    python = llama_cpp()
    settings = request.getfixturevalue(which).settings
    folder = export(settings, "gguf", type, to=tmp_path)
    tokenizer = load_tokenizer(str(settings.adapter_dir))
    texts = [format_prompt(question) for question in parity.questions(settings)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    job = {
        "file": str(folder / f"model-{type}.gguf"),
        "prompts": prompts,
        "texts": texts,
        "eos": 1,
        "new_tokens": parity.NEW_TOKENS,
    }
    reader = Path(__file__).with_name("llama_cpp_reader.py")
    run = subprocess.run([python, str(reader)], input=json.dumps(job), capture_output=True, text=True, check=True)
    read = json.loads(run.stdout.splitlines()[-1])
    found = parity.Reading(
        torch.tensor([one["logits"] for one in read["found"]]), [one["tokens"] for one in read["found"]]
    )
    weights = MergedWeights(Path(settings.model), settings.adapter_dir)
    reference = parity.read(lambda: parity.load_reference(weights, settings), settings, tokenizer)
    row = found.against(reference, f"{which}, {type}, by llama.cpp", parity.bound(weights, type))
    print(parity.table([row]))
    assert row.passed and (row.same_first_token == 10 or which == "llama3")  # random weights have near ties
    assert (read["text"] == prompts) is (which == "llama3")
    assert [parity.gguf_tokenizer(folder / f"model-{type}.gguf").encode(text).ids for text in texts] == read["text"]
