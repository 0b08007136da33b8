"""Whether an export says what the adapter says: ten fixed prompts, their first logits and the tokens after them."""

import gc
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from ..prompts import format_prompt
from ..settings import EMBEDDED_MODEL, HELD_OUT_SEED, NOTICE, MedcotError

NEW_TOKENS = 24  # greedy ones after each prompt
SMALL = 2**30  # bytes of weights in 16 bits, below which they are read in 32
# The largest difference of a first-token logit that may come of rounding alone; README.md has what was measured, of these
# and of the errors that a wrong order of rows, a missing update or a wrong scale makes.
READ_IN_32, READ_IN_16, Q8_0 = 0.05, 0.25, 0.5
QUESTIONS = (
    "A 70-year-old man has crushing chest pain and ST elevation in leads II, III and aVF. Which artery is occluded?",
    "Which electrolyte disturbance gives peaked T waves and a widened QRS complex?",
    "A newborn has projectile vomiting without bile and an olive-shaped mass. What is the diagnosis?",
    "Which vitamin does a strict vegan of many years most likely lack, and what does the blood film show?",
    "A woman at 34 weeks has a blood pressure of 170/110 mmHg, headache and proteinuria. What is given first?",
    "What is the antidote to a paracetamol overdose, and until when does it help most?",
    "A farmer has fever, jaundice and red eyes after a flood. Which organism is likely?",
    "Which nerve is at risk in a fracture of the humeral shaft, and what can the patient no longer do?",
    "A man has polyuria, a serum sodium of 150 mmol/L and dilute urine after head injury. What is the diagnosis?",
    "Which bedside test tells conductive from sensorineural hearing loss?",
)


@dataclass(frozen=True)
class Row:
    """One reader of one file against the adapter."""

    name: str
    largest_difference: float
    """Of any logit of the first token, over all prompts."""
    same_first_token: int
    """Prompts, of all, whose first greedy token is the adapter's."""
    same_tokens: int
    """Prompts whose `NEW_TOKENS` greedy tokens all are."""
    prompts: int
    bound: float | None
    """Largest difference that passes; None for a row that informs."""

    @property
    def passed(self) -> bool:
        """Every logit within the bound (not a number is not)."""
        return self.bound is None or self.largest_difference <= self.bound


def questions(settings) -> list[str]:
    """Ten questions: held-out cases for the embedded model, which knows no others."""
    if settings.model != EMBEDDED_MODEL:
        return list(QUESTIONS)
    from ..tiny.cases import held_out_cases

    return [row["Question"] for row in held_out_cases(len(QUESTIONS), seed=HELD_OUT_SEED)]


@dataclass(frozen=True)
class Reading:
    """What one model makes of the prompts: first logits (prompts x vocabulary, float32) and greedy tokens after each."""

    logits: object
    tokens: list

    def against(self, reference: "Reading", name: str, bound: float | None) -> Row:
        """The row that compares this reading with the adapter's."""
        pairs = list(zip(self.tokens, reference.tokens, strict=True))
        return Row(
            name, (self.logits - reference.logits).abs().max().item(), sum(a[:1] == b[:1] for a, b in pairs),
            sum(a == b for a, b in pairs), len(pairs), bound,
        )  # fmt: skip


def read(load, settings, tokenizer) -> Reading:
    """Loads a stock transformers model by `load()`, reads the ten prompts in one left-padded batch, lets it go again."""
    import torch

    model = load().eval()
    try:
        encoded = tokenizer(
            [format_prompt(question) for question in questions(settings)],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **encoded, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        tokens = output.sequences[:, encoded["input_ids"].shape[1] :].tolist()
        return Reading(output.logits[0].float().cpu(), [_until(tokens_, tokenizer.eos_token_id) for tokens_ in tokens])
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


def _until(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def quiet():
    """Keeps the notes of these libraries to their own developers off the screen."""
    for logger in (
        "gguf",
        "torchao",
        "torch.utils._pytree",
        "bitsandbytes",
        "transformers.modeling_gguf_pytorch_utils",
    ):
        logging.getLogger(logger).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _arguments(weights, settings) -> dict:
    """float32 where it is small, the export's own 16 bits where 8 billion parameters would not fit."""
    import torch

    dtype = torch.float32 if weights.bytes < SMALL else torch.float16
    return {"dtype": dtype, "device_map": "auto" if settings.device == "cuda" else None}


def load_reference(weights, settings, four_bit: bool = False):
    """The base from its own files with the adapter beside it, by peft; with `four_bit` quantised as in training."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments = _arguments(weights, settings)
    if four_bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=arguments["dtype"]
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(weights.base, use_safetensors=True, **arguments)
    return PeftModel.from_pretrained(base, weights.adapter)


def load_merged(folder: Path, weights, settings):
    """The merged folder, as anyone would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **_arguments(weights, settings))


def load_gguf(file: Path, config: Path, weights, settings):
    """A GGUF file read back by transformers, which overlooks `rope_freqs` and takes them from `config`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=AutoConfig.from_pretrained(config), **_arguments(weights, settings)
    )


def bound(weights, type: str) -> float:
    """What a logit may differ by: more where 8-bit blocks are stored, or where either side multiplies in 16 bits.

    bitsandbytes multiplies by 4-bit weights in 16 bits whatever it is given, so a 4-bit base is such a side.
    """
    if type == "q8_0":
        return Q8_0
    return READ_IN_16 if weights.four_bit or weights.bytes >= SMALL else READ_IN_32


def reading_bytes(weights) -> int:
    """Memory that reading one model back takes, in bytes: [est] its parameters, once more a tenth, and 1 GiB."""
    return int(weights.bytes * (2 if weights.bytes < SMALL else 1) * 1.1) + 2**30


def text_agrees(file: Path, tokenizer, settings) -> bool:
    """Whether text read by the file's own vocabulary, merges and named word pattern gives the adapter's tokens."""
    ours = gguf_tokenizer(file)
    texts = [format_prompt(question) for question in questions(settings)]
    return all(ours.encode(text).ids == tokenizer(text)["input_ids"] for text in texts)


def gguf_tokenizer(file: Path):
    """A `tokenizers.Tokenizer` made of nothing but a GGUF file's metadata, as llama.cpp reads it."""
    import gguf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    from .gguf import PRE_TOKENIZERS

    fields = gguf.GGUFReader(file).fields
    kept = {
        name: fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges", "pre", "bos_token_id")
    }
    tokens = kept["tokens"]
    pattern = next((regex for regex, name in PRE_TOKENIZERS.items() if name == kept["pre"]), None)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in kept["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kept["pre"] == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *([pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    for kind, special in ((gguf.TokenType.CONTROL, True), (gguf.TokenType.USER_DEFINED, False)):
        added = [AddedToken(t, normalized=False) for t, n in zip(tokens, kept["token_type"], strict=True) if n == kind]
        (made.add_special_tokens if special else made.add_tokens)(added)
    if fields["tokenizer.ggml.add_bos_token"].contents():
        bos = tokens[kept["bos_token_id"]]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, kept["bos_token_id"])]
        )
    return made


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| read from | largest logit difference | may be | same first token | same greedy tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        bound = "(for information)" if row.bound is None else f"{row.bound:g}"
        lines.append(
            f"| {row.name} | {row.largest_difference:.3g} | {bound} | {row.same_first_token} of {row.prompts} | "
            f"{row.same_tokens} of {row.prompts} |"
        )
    return "\n".join(lines)


def write_parity(rows: list[Row], folder: Path, facts: dict):
    """Keeps the comparison beside the export as `parity.json`. Raises MedcotError for a row outside its bound."""
    content = {
        "notice": NOTICE,
        **facts,
        "new_tokens": NEW_TOKENS,
        "rows": [asdict(row) | {"passed": row.passed} for row in rows],
    }
    (folder / "parity.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    if failed := [row for row in rows if not row.passed]:
        raise MedcotError(
            "the export does not say what the adapter says, so it was not kept: "
            + "; ".join(f"{row.name} differs by {row.largest_difference:.3g}, {row.bound:g} may be" for row in failed)
            + ". Report this with the versions of transformers and gguf; nothing is wrong with the adapter"
        )
