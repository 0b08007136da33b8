"""A question of one's own: what is asked, what is shown, what comes back."""

import io
import random
import shutil
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcot.asking import (
    BASE,
    DIM,
    PLAIN,
    TUNED,
    ask,
    ask_both,
    columns,
    examples,
    outside,
    page,
    side_by_side,
)
from medcot.chat import add_commands
from medcot.profiles import PROFILES
from medcot.prompts import format_completion, format_prompt, parse_completion
from medcot.settings import EMBEDDED_MODEL, NOTICE, MedcotError
from medcot.tiny.cases import FAMILIES, SINGLE_STEP, make_row
from medcot.tiny.known import missing

EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def asking(trained):
    """A trained model, its tokenizer, and settings with short answers."""
    return trained.model, trained.tokenizer, replace(trained.settings, max_new_tokens=24, generation_batch_size=2)


def greedy(model, tokenizer, question, new_tokens):
    """One token after the other, without generate(): what an answer has to be."""
    import torch

    ids = tokenizer(format_prompt(question), return_tensors="pt")["input_ids"]
    written = []
    with torch.inference_mode():
        for _ in range(new_tokens):
            written.append(model(input_ids=ids).logits[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([[written[-1]]])], 1)
            if written[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(written)


def test_one_answer_is_streamed_and_returned_as_it_was_written(asking, capsys):
    model, tokenizer, settings = asking
    question = examples(settings)[0]
    completion = ask(model, tokenizer, question, settings)
    assert completion == greedy(model, tokenizer, question, 24)
    shown = capsys.readouterr().out
    assert completion.replace(EOS, "") in shown and NOTICE in shown and EOS not in shown and "\x1b" not in shown
    assert parse_completion(completion, EOS).problems == () or not completion.endswith(EOS)


def test_it_is_shown_while_it_is_written(asking, monkeypatch):
    """Pieces reach the screen before the model has finished, one by one."""
    model, tokenizer, settings = asking
    written = []

    class Screen(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Screen())
    completion = ask(model, tokenizer, examples(settings)[1], settings)
    pieces = [text for text in written if text and text in completion]
    assert len(pieces) > 5 and all(len(piece) < 40 for piece in pieces)


def test_a_terminal_dims_the_reasoning_alone(asking, monkeypatch, capsys):
    model, tokenizer, settings = asking
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    completion = ask(model, tokenizer, examples(settings)[0], settings)
    shown = capsys.readouterr().out
    reasoning, _, response = completion.replace(EOS, "").partition("</think>")
    assert f"{DIM}{reasoning}</think>{PLAIN}{response}" in shown


def test_an_answer_that_is_stopped_leaves_the_terminal_as_it_was(asking, monkeypatch, capsys):
    model, tokenizer, settings = asking

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("medcot.asking._generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(model, tokenizer, examples(settings)[0], settings)
    assert capsys.readouterr().out.endswith(f"{DIM}{PLAIN}\n{NOTICE}\n")


def test_a_list_is_answered_in_batches_as_one_by_one(asking, capsys):
    model, tokenizer, settings = asking
    questions = sorted(examples(settings)[:5], key=len)
    assert (
        len({len(tokenizer(format_prompt(question))["input_ids"]) for question in questions}) > 1
    )  # padding is needed
    together = ask(model, tokenizer, questions, settings)
    shown = capsys.readouterr().out
    assert together == [ask(model, tokenizer, question, settings) for question in questions]
    assert all(question in shown for question in questions)
    assert ask(model, tokenizer, [], settings) == []


def test_base_and_fine_tuned_side_by_side(asking, capsys):
    model, tokenizer, settings = asking
    question = examples(settings)[4]
    answers = ask_both(model, tokenizer, question, settings)
    assert answers[TUNED] == greedy(model, tokenizer, question, 24)
    with model.disable_adapter():
        assert answers[BASE] == greedy(model, tokenizer, question, 24)
    assert answers[BASE] != answers[TUNED]  # else the switch is not seen here
    assert "FINE-TUNED" in capsys.readouterr().out
    with pytest.raises(MedcotError, match="has no adapter to compare with"):
        ask_both(model.get_base_model(), tokenizer, question, settings)


@pytest.mark.parametrize("question", ["", "  ", 7, None])
def test_no_question_is_named(asking, question):
    model, tokenizer, settings = asking
    with pytest.raises(MedcotError, match="is no question: ask in words"):
        ask(model, tokenizer, [question], settings)


def test_too_long_a_question_is_refused_before_the_model_runs(asking):
    model, tokenizer, settings = asking
    question = examples(settings)[0].replace(": ", ": " + "wears glasses, " * 900, 1)
    with pytest.raises(MedcotError, match=r"more than max_seq_length=2048: ask in fewer words"):
        ask(model, tokenizer, question, settings)


# --- what the embedded model can be asked -------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.sampled_from([*FAMILIES, SINGLE_STEP]), st.booleans())
def test_every_case_of_any_seed_can_be_asked(seed, family, held_out):
    assert missing(make_row(random.Random(seed), family, held_out)["Question"]) == []


@given(st.integers(0, 10**9), st.sampled_from([*FAMILIES, SINGLE_STEP]), st.text(min_size=1, max_size=12), st.data())
def test_one_phrase_in_other_words_is_enough_to_be_outside(seed, family, word, data):
    question = make_row(random.Random(seed), family, True)["Question"]
    at = data.draw(st.sampled_from([i for i, sign in enumerate(question) if question[i : i + 2] in (", ", "; ")]))
    foreign = f"my {word} hurts".replace(", ", " ").replace("; ", " ")
    assert missing(f"{question[:at]}, {foreign}{question[at:]}") is None
    assert missing(word) is None


@pytest.mark.parametrize(
    ("question", "lacks"),
    [
        ("What is the CURB-65 score?", None),
        ("Pneumonia: my cat is ill. What is the CURB-65 score?", None),
        ("Pneumonia: age 70. What is the qSOFA score?", None),
        ("Possible sepsis: GCS 15, RR 20/min. What is the qSOFA score?", ["systolic pressure"]),
        ("Possible sepsis: GCS 15, RR 20/min,  SBP 99.\nWhat is the qSOFA score?", []),
        ("Possible sepsis: GCS 15, RR 20/min, SBP 99, has 3 cats. How many qSOFA points for coma score?", []),
    ],
)
def test_the_rule(question, lacks):
    assert missing(question) == lacks


def test_outside_its_words_the_interface_answers_and_the_model_is_not_asked(settings, tokenizer, capsys):
    question = "Which drug is given first for anaphylaxis?"
    completion = ask(None, tokenizer, question, settings)  # no model: any use of it fails
    parsed = parse_completion(completion, EOS)
    assert parsed.problems == () and parsed.reasoning == ""
    assert (
        parsed.response.startswith("I only know seven scores (CURB-65, ")
        and "the model was not asked" in parsed.response
    )
    example = parsed.response.partition("For example: ")[2]
    assert missing(example) == [] and parsed.response in capsys.readouterr().out
    assert "lacks: systolic pressure" in outside(
        "Possible sepsis: GCS 15, RR 20/min. What is the qSOFA score?", settings
    )
    assert ask(None, tokenizer, [question, question], settings) == [completion] * 2


def test_other_models_may_be_asked_anything(settings):
    other = replace(settings, model="house/other")
    assert outside("Which drug is given first for anaphylaxis?", other) is None and examples(other) == []
    assert all(missing(question) == [] for question in examples(PROFILES["tiny"])) and len(examples(settings)) == 7


# --- how it looks -------------------------------------------------------------------------------------------------------


def test_a_page_folds_the_reasoning_and_escapes_what_was_written():
    completion = format_completion("first <b>this</b>\nthen </think> that", "The <i>answer</i>.", EOS)
    shown = page(completion, EOS, "Is 1 < 2?")
    assert "<details><summary>reasoning, 5 words</summary>" in shown and "Is 1 &lt; 2?" in shown
    assert "&lt;b&gt;this" in shown and "then &lt;/think&gt; that" in shown and "The &lt;i&gt;answer" in shown
    assert NOTICE in shown and "<script" not in shown
    assert "<details open>" in page("still thinking", EOS, open_reasoning=True)
    assert "no EOS within the limit" in page("cut </think> off", EOS)


def test_two_columns_hold_all_words_within_the_width():
    answers = {BASE: format_completion("a b " * 40, "one two", EOS), TUNED: format_completion("c", "three", EOS)}
    shown = columns(answers, EOS, 60)
    assert max(map(len, shown.removesuffix(NOTICE).splitlines())) <= 60
    assert shown.count("a b") + shown.count("a\n") >= 30 and "-> one two" in shown and "-> three" in shown
    table = side_by_side(answers, EOS)
    assert table.count("<td") == 2 and BASE in table and TUNED in table


@pytest.fixture
def out(trained, tmp_path, monkeypatch):
    """An output folder that holds the trained adapter alone, named by the environment."""
    kept = ("adapter_*", "tokenizer*", "special_tokens_map.json", "chat_template.jinja")
    folder = tmp_path / trained.settings.adapter_dir.name
    folder.mkdir()
    for pattern in kept:
        for file in trained.settings.adapter_dir.glob(pattern):
            shutil.copy(file, folder)
    monkeypatch.setenv("MEDCOT_PROFILE", "smoke")
    monkeypatch.setenv("MEDCOT_OUT", str(tmp_path))
    return tmp_path


CELLS = """
from dataclasses import replace
from medcot import load_model, load_settings
from medcot.asking import ask, examples
from medcot.chat import chat_widget
settings = replace(load_settings(), max_new_tokens=12)
model, tokenizer = load_model(settings, adapter=settings.adapter_dir)
text = ask(model, tokenizer, examples(settings)[0], settings)
---
widget = chat_widget(model, tokenizer, settings)
---
field, button = widget.children[3], widget.children[4]
switch = widget.children[1]
for switch.value, field.value in ((switch.options[2], examples(settings)[1]), (switch.options[0], "Who are you? <b>")):
    button.click()
print(widget.children[0].value)
"""


def test_in_a_notebook_it_stays_readable_where_no_script_runs(out):
    """A real kernel: the folded answer, the chat with its switch, and the static HTML that is left of it."""
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.split("---\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    answered, shown, clicked = (cell.outputs for cell in notebook.cells)
    pages = ["".join(output["data"]["text/html"]) for output in answered if "text/html" in output.get("data", {})]
    assert len(pages) == 1 and "<details><summary>reasoning" in pages[0] and NOTICE in pages[0]
    static = ["".join(output["data"]["text/html"]) for output in shown if "text/html" in output.get("data", {})]
    assert len(static) == 1 and "2 questions as plain text" in static[0] and "<script" not in static[0]
    assert f"<b>{BASE}</b>" in static[0] and f"<b>{TUNED}</b>" in static[0] and NOTICE in static[0]
    assert "I only know seven scores" in static[0] and "Who are you? &lt;b&gt;" in static[0]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in shown)
    assert "I only know seven scores" in clicked[-1]["text"]


def test_the_chat_shows_an_answer_while_it_is_written_and_says_what_is_wrong(asking):
    from medcot.chat import BOTH, _Chat

    model, tokenizer, settings = asking
    chat, seen = _Chat(model, tokenizer, settings), []
    chat.said.observe(lambda change: seen.append(change["new"]), names="value")
    chat.switch.value, question = BOTH, examples(settings)[3]
    assert chat.field.value == examples(settings)[0]
    chat.field.value = question
    chat.button.click()
    assert len(seen) > 10 and "<details open>" in seen[0] and "<details open>" not in seen[-1]
    answers = ask_both(model, tokenizer, question, settings)
    assert all(page(text, tokenizer.eos_token) in seen[-1] for text in answers.values())
    chat.field.value = " "
    chat.button.click()
    assert (
        "is no question: ask in words" in seen[-1] and question.split(":")[0] in seen[-1] and not chat.button.disabled
    )
    with_base_alone = _Chat(model.get_base_model(), tokenizer, replace(settings, model="house/other"))
    assert with_base_alone.switch.options == (BASE,) and with_base_alone.field.value == ""


# --- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(out, monkeypatch):
    """`medcot ask ...` or `medcot chat ...` in this process, with typed lines."""
    import argparse

    def run(*arguments, typed=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers(required=True))
        options = parser.parse_args(arguments)
        options.run(options)

    return run


def test_the_commands_ask_and_chat(run, settings, capsys, monkeypatch, tmp_path):
    run("ask")
    assert f'medcot ask "{examples(settings)[0]}"' in capsys.readouterr().out
    run("ask", examples(settings)[0])
    assert "</think>" in capsys.readouterr().out
    typed = [
        "/examples",
        "/both",
        examples(settings)[2],
        "/base",
        examples(settings)[2],
        "/what",
        "Who are you?",
        "",
        "/quit",
        "/afterwards",
    ]
    run("chat", typed=typed)
    shown = capsys.readouterr().out
    for words in (
        examples(settings)[6],
        "from here on: both",
        "FINE-TUNED",
        "/what is no command",
        "I only know seven scores",
        NOTICE,
    ):
        assert words in shown
    assert "afterwards" not in shown
    monkeypatch.setattr("medcot.chat.load_run", lambda output_dir: replace(settings, output_dir=tmp_path / "none"))
    with pytest.raises(MedcotError, match=r"no adapter_model.safetensors in .*: run 02_finetune"):
        run("ask", "--both", "Who are you?")
    run("ask", "Who are you?")
    assert "the base model answers" in capsys.readouterr().out and settings.model == EMBEDDED_MODEL
