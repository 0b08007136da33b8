"""The prompt: one text for training and for inference, and the tokens it becomes. Standard library only."""

import re
from dataclasses import dataclass

INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. \n"
    "Write a response that appropriately completes the request. \n"
    "Before answering, think carefully about the question and create a step-by-step chain of thoughts "
    "to ensure a logical and accurate response.\n"
    "\n"
    "### Instruction:\n"
    "You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning. \n"
    "Please answer the following medical question. \n"
)
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# Strings that a tokenizer may turn into one control token: the think tags, DeepSeek's <｜...｜>, Llama's <|...|>, <s>.
# A backslash after "<" takes that power away; a row that already has backslashes there gets one more, so that
# unescaping is exact.
_CONTROL = r"(/?think>|/?s>|\|[^<>|]*\|>|｜[^<>｜]*｜>)"
_ESCAPE, _UNESCAPE = re.compile(r"<(\\*)" + _CONTROL), re.compile(r"<\\(\\*)" + _CONTROL)


def escape(text: str) -> str:
    """Text in which nothing reads as a control token any more: `</think>` becomes `<\\/think>`."""
    return _ESCAPE.sub(r"<\1\\\2", text)


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return _UNESCAPE.sub(r"<\1\2", text)


def format_prompt(question: str) -> str:
    """The prompt for one question; it ends after `<think>` and its newline, where the model goes on."""
    return f"{INSTRUCTION}\n### Question:\n{escape(question)}\n\n### Response:\n{THINK_OPEN}\n"


def format_completion(reasoning: str, response: str, eos_token: str) -> str:
    """What follows the prompt in a training example: reasoning, closing tag, response and exactly one EOS."""
    return f"{escape(reasoning)}\n{THINK_CLOSE}\n{escape(response)}{eos_token}"


def format_example(question: str, reasoning: str, response: str, eos_token: str) -> str:
    """A whole training example: `format_prompt` and `format_completion`, one after the other."""
    return format_prompt(question) + format_completion(reasoning, response, eos_token)


def list_options(question: str, choices) -> str:
    """The question with one lettered option a line, as in an exam."""
    return "\n".join([question, *(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))])


def chat_prompt(question: str, tokenizer) -> str:
    """The question alone as the user's turn of the tokenizer's chat template, BOS included, with the thinking opened."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": escape(question)}], add_generation_prompt=True, tokenize=False
    )
    return text if text.endswith(f"{THINK_OPEN}\n") else f"{text}{THINK_OPEN}\n"


def encode_prompt(question: str, tokenizer, chat: bool = False, begun: str = "") -> list[int]:
    """The tokens that a model goes on from, exactly one BOS in front: our prompt, or with `chat` its own template.

    `begun` is what the answer already begins with. Prompt and completion are encoded apart, here and in
    `encode_completion`, so that a prompt's tokens are the same in training and inference whatever follows it.
    """
    text = chat_prompt(question, tokenizer) if chat else format_prompt(question)  # a chat template writes BOS itself
    return tokenizer(text + begun, add_special_tokens=not chat, verbose=False)["input_ids"]


def encode_completion(text: str, tokenizer) -> list[int]:
    """The tokens of what follows a prompt; nothing is put in front."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Completion:
    """A generated text taken apart; `problems` is empty when the text has the trained form."""

    reasoning: str
    response: str
    problems: tuple[str, ...]


def parse_completion(text: str, eos_token: str) -> Completion:
    """Takes apart what a model wrote after `format_prompt`, the inverse of `format_completion`.

    `text` is the decoded completion with its special tokens. What is wrong with it is named in `problems`:
    "think never closed", "empty response", "no EOS within the limit". The response starts after the last `</think>`.
    """
    problems = []
    if text.endswith(eos_token):
        text = text[: -len(eos_token)]
    else:
        problems.append("no EOS within the limit")
    reasoning, closed, response = text.rpartition(THINK_CLOSE)
    if not closed:
        reasoning, response = response, ""
        problems.insert(0, "think never closed")
    reasoning, response = unescape(reasoning.removesuffix("\n")), unescape(response.removeprefix("\n"))
    if closed and not response.strip():
        problems.append("empty response")
    return Completion(reasoning, response, tuple(problems))
