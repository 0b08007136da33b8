"""The prompt is the agreed text, and taking a completion apart undoes putting it together."""

from hypothesis import example, given
from hypothesis import strategies as st

from medcot.prompts import escape, format_completion, format_example, format_prompt, parse_completion, unescape

EOS = "<｜end▁of▁sentence｜>"
# Pieces that could be mistaken for structure, mixed with any text at all.
PIECES = ["</think>", "<think>", "<\\/think>", "<", "\\", "/think>", EOS, "<｜User｜>", "<|eot_id|>", "</s>", "{Question}",
          "{}", "{0}", "### Response:", "\n", "\r\n", " ", "🫀", "ألم في الصدر", "胸痛", "\x00"]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=12), max_size=12).map("".join)


def test_prompt_is_the_agreed_text_to_the_byte():
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. \n"
        "Write a response that appropriately completes the request. \n"
        "Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a "
        "logical and accurate response.\n\n### Instruction:\nYou are a medical expert with advanced knowledge in "
        "clinical reasoning, diagnostics, and treatment planning. \nPlease answer the following medical question. \n\n"
        "### Question:\nWhy?\n\n### Response:\n<think>\n"
    )
    assert format_prompt("Why?") == expected


def test_example_goes_on_where_the_prompt_ends_and_has_one_eos():
    text = format_example("Why?", "Because.", "So.", EOS)
    assert text == format_prompt("Why?") + "Because.\n</think>\nSo." + EOS
    assert text.count(EOS) == 1


@given(question=TEXT, reasoning=TEXT, response=TEXT)
@example(question="</think>", reasoning="a\n</think>\nb", response="c</think>" + EOS)
@example(question="", reasoning="", response="")
@example(question="<", reasoning="<\\", response="<\\\\/think>")
def test_format_and_parse_are_inverses(question, reasoning, response):
    text = format_example(question, reasoning, response, EOS)
    parsed = parse_completion(text.removeprefix(format_prompt(question)), EOS)
    assert (parsed.reasoning, parsed.response) == (reasoning, response)
    assert parsed.problems == (() if response.strip() else ("empty response",))


@given(TEXT)
def test_escape_is_undone_and_leaves_no_control_token(text):
    assert unescape(escape(text)) == text
    assert not any(
        control in escape(text) for control in ("</think>", "<think>", EOS, "<｜User｜>", "<|eot_id|>", "</s>")
    )


@given(question=TEXT, reasoning=TEXT, response=TEXT)
def test_structure_of_an_example_cannot_be_forged(question, reasoning, response):
    text = format_example(question, reasoning, response, EOS)
    assert (text.count("<think>"), text.count("</think>"), text.count(EOS)) == (1, 1, 1)


def test_ordinary_text_is_left_alone():
    text = "a < b, 5 mg/dL <= 6; x\\y; <b>bold</b>; {braces} ### head"
    assert escape(text) == text


def test_problems_are_named():
    def problems(text):
        return parse_completion(text, EOS).problems

    assert problems("still thinking") == ("think never closed", "no EOS within the limit")
    assert problems("still thinking" + EOS) == ("think never closed",)
    assert problems("a\n</think>\n" + EOS) == ("empty response",)
    assert problems("a\n</think>\nb") == ("no EOS within the limit",)
    assert problems("a\n</think>\nb" + EOS) == ()


def test_response_starts_after_the_last_closing_tag():
    parsed = parse_completion("a\n</think>\nb\n</think>\nc" + EOS, EOS)
    assert parsed.response == "c"


def test_completion_is_the_second_half_of_the_example():
    assert format_completion("r", "s", EOS) == f"r\n</think>\ns{EOS}"
