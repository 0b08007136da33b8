"""Tokenizers of the Qwen kind, as far as their form is publicly known: taken where they hold the contract, refused where not.

The files of DeepSeek-R1-Distill-Qwen themselves could not be had. Known of them: byte-level BPE with NFC in front; begin, end
and think tokens 151646, 151643, 151648 and 151649; padding that is the end token; a class named LlamaTokenizerFast that is wrong
for them (huggingface/transformers pull requests 45741 and 48211). Whether tokenizer.json itself puts the begin token in front
is not known here: Qwen's own does not.
"""

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from medcot.data import encode_example
from medcot.model import load_tokenizer
from medcot.prompts import format_completion, format_prompt, parse_completion
from medcot.settings import MedcotError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (EOS, "<｜User｜>", "<｜Assistant｜>", BOS)
PLAIN = ("<think>", "</think>", "<|vision_pad|>")
# In the manner of Qwen 2: contractions, words with one character in front, single digits, runs of signs and of line ends.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_like(folder, bos_in_front=True, added=PLAIN, config=None):
    """A folder with a tokenizer of that form over a small vocabulary, and the configuration that names the wrong class."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([format_prompt("")], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    if bos_in_front:
        ids = [(BOS, tokenizer.token_to_id(BOS))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names | (config or {})))
    return str(folder)


def test_the_contract_holds_for_a_tokenizer_of_the_qwen_kind(tmp_path):
    tokenizer = load_tokenizer(qwen_like(tmp_path / "qwen"))
    assert tokenizer.pad_token == "<|vision_pad|>" and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    row = {
        "Question": f"Why 37.5 °C? {EOS} </think> 胸痛",
        "Complex_CoT": "Because.\n\n1. β\n",
        "Response": "So, <think>.",
    }
    example = encode_example(row, tokenizer)
    ids = example["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for token in (BOS, EOS, "<think>", "</think>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    completion = format_completion(row["Complex_CoT"], row["Response"], EOS)
    assert tokenizer.decode(ids) == BOS + format_prompt(row["Question"]) + completion
    written = tokenizer.decode([i for i, mask in zip(ids, example["completion_mask"], strict=True) if mask])
    parsed = parse_completion(written, EOS)
    assert (parsed.reasoning, parsed.response, parsed.problems) == (row["Complex_CoT"], row["Response"], ())


def test_one_that_puts_no_bos_in_front_is_refused_although_its_configuration_says_so(tmp_path):
    with pytest.raises(MedcotError, match=r"has 0 BOS tokens, one is needed in front. Cure: take tokenizer.json"):
        load_tokenizer(qwen_like(tmp_path / "qwen", bos_in_front=False))


def test_one_without_think_tokens_is_refused(tmp_path):
    with pytest.raises(MedcotError, match="<think> is not one token; </think> is not one token"):
        load_tokenizer(qwen_like(tmp_path / "qwen", added=("<|vision_pad|>",)))


def test_one_without_bos_at_all_is_refused(tmp_path):
    """As Qwen's own: no begin token, `<|endoftext|>` for the rest."""
    with pytest.raises(
        MedcotError, match=r"bos_token is None and eos_token is '<｜end▁of▁sentence｜>'; .* has 0 BOS tokens"
    ):
        load_tokenizer(
            qwen_like(tmp_path / "qwen", bos_in_front=False, config={"bos_token": None, "add_bos_token": False})
        )


def test_one_that_can_only_pad_with_eos_is_refused(tmp_path):
    with pytest.raises(MedcotError, match="pad_token None is not a token of its own"):
        load_tokenizer(qwen_like(tmp_path / "qwen", added=PLAIN[:2]))


def test_a_model_of_the_qwen_kind_trains_saves_and_loads(settings, tmp_path):
    """The whole of 02_finetune on random weights, biases in attention and all."""
    import torch
    from conftest import job
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from medcot.gpus import shape_of
    from medcot.identity import adapter_id
    from medcot.model import load_model

    folder = qwen_like(tmp_path / "qwen")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False))
    model.save_pretrained(folder)
    assert shape_of(folder).parameters == sum(weight.numel() for weight in model.parameters())
    settings = replace(settings, model=folder, train_rows=40, max_steps=8, learning_rate=5e-3, report_to="none")
    trainer = job(settings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    saved, _ = load_model(settings, adapter=settings.adapter_dir)
    assert adapter_id(saved) == adapter_id(trainer.model) != "base"
