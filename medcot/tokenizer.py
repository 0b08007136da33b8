"""The tokenizer and its contract: what would spoil training or answers is refused when it is loaded."""

from .environment import MedcotError
from .hub import patiently
from .prompts import THINK_CLOSE, THINK_OPEN, escape, format_prompt

# Texts that a wrong tokenizer class damages: spaces, line ends, accents, signs, other scripts, emoji.
_ROUND_TRIP = (
    "chest pain and fever, 37.5 °C",
    " two  spaces\n\n\tand a tab\r\n",
    "β-blocker, naïve, ≥ 65",
    "ألم 胸痛 🫀",
)
# Reserved tokens of the Llama 3 and Qwen 2 vocabularies that can pad, for tokenizers that name EOS as their padding.
_PADS = ("<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<|reserved_special_token_0|>", "<|vision_pad|>")


def load_tokenizer(source: str, revision: str | None = None, local_files_only: bool = False):
    """The tokenizer of a hub name or local folder, checked against the contract (`check_tokenizer`).

    Read as a plain fast tokenizer, because transformers 5 rebuilds the class that the R1 models name in a way that
    loses spaces ("chest pain" becomes "chestpain").
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = patiently(
            lambda: PreTrainedTokenizerFast.from_pretrained(
                source, revision=revision, padding_side="left", local_files_only=local_files_only
            ),
            source,
        )
    except Exception as error:  # the tokenizers library raises nothing more special
        raise MedcotError(f"no tokenizer at {source} ({reason(error)}): name a model folder or hub name") from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = next((pad for pad in _PADS if pad in tokenizer.get_vocab()), None)
    check_tokenizer(tokenizer, source)
    return tokenizer


def reason(error) -> str:
    """The first line of what an error says, cut to what fits a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_tokenizer(tokenizer, source):
    """Raises MedcotError naming everything about a tokenizer that would spoil training or answers.

    Checked: text comes back as it went in, an encoded prompt has exactly one BOS and ends in `<think>` and a newline,
    both think tags are one token each, EOS is known and differs from the padding.
    """
    wrong = []
    for text in _ROUND_TRIP:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
        if back != text:
            wrong.append(f"{text!r} comes back as {back!r}")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        wrong.append(f"bos_token is {tokenizer.bos_token!r} and eos_token is {tokenizer.eos_token!r}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        wrong.append(f"pad_token {tokenizer.pad_token!r} is not a token of its own")
    ids = tokenizer(format_prompt("Where is the pain?"))["input_ids"]
    if ids.count(tokenizer.bos_token_id) != 1 or ids[0] != tokenizer.bos_token_id:
        wrong.append(f"an encoded prompt has {ids.count(tokenizer.bos_token_id)} BOS tokens, one is needed in front")
    for tag in (THINK_OPEN, THINK_CLOSE):
        if len(tokenizer.encode(tag, add_special_tokens=False)) != 1:
            wrong.append(f"{tag} is not one token")
    for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        if token and tokenizer.convert_tokens_to_ids(token) in tokenizer.encode(
            escape(token), add_special_tokens=False
        ):
            wrong.append(f"{token} inside a question could not be told from the token")
    if wrong:
        raise MedcotError(
            f"the tokenizer at {source} cannot be used: {'; '.join(wrong)}. Cure: take tokenizer.json and "
            'tokenizer_config.json from the base model, with "tokenizer_class": "PreTrainedTokenizerFast"'
        )
