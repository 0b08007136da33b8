"""The prompt: one text for training and for inference. Standard library only."""

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
