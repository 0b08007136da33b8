"""A question of one's own: one answer as it is written, several at once, base and fine-tuned side by side, a chat."""

import contextlib
import html
import shutil
import sys
import textwrap
import time

from .model import for_inference, free_decoding_memory
from .prompts import THINK_CLOSE, format_completion, format_prompt, parse_completion, unescape
from .settings import EMBEDDED_MODEL, HELD_OUT_SEED, NOTICE, MedcotError

BASE, TUNED = "base", "fine-tuned"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
_REDRAW_SECONDS = 0.2  # between two states of an answer in a notebook


def ask(model, tokenizer, question, settings):
    """Answers one question (`str`) while it is written, or a list of them in left-padded batches, each shown when done.

    Returns the completion, or a list of them, as the model wrote it with its EOS: what `parse_completion` takes. In a
    notebook the reasoning is folded, in a terminal dimmed. Greedy. A question that the
    embedded model cannot know is not put to it: the interface answers, in the same form.
    """
    if isinstance(question, str):
        _check(question)
        with _screen(tokenizer, "") as screen:
            return _answer(model, tokenizer, question, settings, screen)
    for one in question:
        _check(one)
    completions = {
        i: _of_the_interface(one, settings, tokenizer) for i, one in enumerate(question) if outside(one, settings)
    }
    known = [i for i in range(len(question)) if i not in completions]
    for first in range(0, len(known), settings.generation_batch_size):
        batch = known[first : first + settings.generation_batch_size]
        prompts = [question[i] for i in batch]
        completions |= dict(zip(batch, _generate(model, tokenizer, prompts, settings), strict=True))
    for i, one in enumerate(question):
        with _screen(tokenizer, one) as screen:
            screen.show(completions[i])
    return [completions[i] for i in range(len(question))]


def ask_both(model, tokenizer, question: str, settings) -> dict[str, str]:
    """The completions of the base and of the fine-tuned model, by `BASE` and `TUNED`, shown side by side.

    `model` carries its adapter: the base is the same model with the adapter switched off. Raises MedcotError without one.
    """
    _check(question)
    if not hasattr(model, "disable_adapter"):
        raise MedcotError(
            "this model has no adapter to compare with: load_model(settings, adapter=settings.adapter_dir)"
        )
    answers = {}
    for name in (BASE, TUNED):
        with model.disable_adapter() if name == BASE else contextlib.nullcontext():
            answers[name] = _answer(model, tokenizer, question, settings)
    if _notebook():
        from IPython.display import HTML, display

        display(HTML(side_by_side(answers, tokenizer.eos_token)))
    else:
        print(columns(answers, tokenizer.eos_token, shutil.get_terminal_size().columns))
    return answers


def stream(model, tokenizer, question: str, settings, show) -> str:
    """One completion; `show` is called with the text so far whenever some more is written."""
    _check(question)
    written = []

    def put(text):
        written.append(text)
        show("".join(written))

    if outside(question, settings):
        return _of_the_interface(question, settings, tokenizer)
    return _generate(model, tokenizer, [question], settings, _streamer(tokenizer, put))[0]


def _check(question: str):
    if not isinstance(question, str) or not question.strip():
        raise MedcotError(
            f"{question!r} is no question: ask in words, for example ask(model, tokenizer, 'What is ...?', settings)"
        )


def _answer(model, tokenizer, question: str, settings, screen=None) -> str:
    """One completion, streamed to `screen`; the interface's own where the embedded model cannot know."""
    if outside(question, settings):
        completion = _of_the_interface(question, settings, tokenizer)
        if screen:
            screen.show(completion)
        return completion
    return _generate(model, tokenizer, [question], settings, screen.streamer if screen else None)[0]


def _generate(model, tokenizer, questions, settings, streamer=None) -> list[str]:
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    inputs = tokenizer([format_prompt(q) for q in questions], padding=True, padding_side="left", return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    if width + settings.max_new_tokens > settings.max_seq_length:
        raise MedcotError(
            f"the question takes {width} tokens with its prompt and the answer up to {settings.max_new_tokens}, together more than "
            f"max_seq_length={settings.max_seq_length}: ask in fewer words, or lower max_new_tokens"
        )
    model = for_inference(model)
    try:
        with torch.inference_mode():
            output = model.generate(**inputs.to(model.device), generation_config=config, streamer=streamer)
    finally:
        free_decoding_memory(model)
    return [_decoded(tokens, tokenizer) for tokens in output[:, width:].tolist()]


def _decoded(tokens: list[int], tokenizer) -> str:
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    return tokenizer.decode(tokens)


# --- what the embedded model can be asked -------------------------------------------------------------------------------


def examples(settings, most: int = 7) -> list[str]:
    """Questions in the embedded model's own words, one a score, of held-out patients; none for another model."""
    if settings.model != EMBEDDED_MODEL:
        return []
    from .tiny.cases import held_out_cases

    return [row["Question"] for row in held_out_cases(most, seed=HELD_OUT_SEED)]


def outside(question: str, settings) -> str | None:
    """Why the embedded model cannot know an answer, in words with an example; None if it can, and for any other model.

    The rule: a question is in the grammar of the embedded cases (opening of a score, findings in the words of
    `tiny.cases`, all that the score needs, then the score asked for, whole or one of its points).
    """
    if settings.model != EMBEDDED_MODEL:
        return None
    from .tiny.cases import FAMILIES
    from .tiny.known import missing

    asked = missing(question)
    if asked == []:
        return None
    scores = ", ".join(FAMILIES)
    why = f" The question lacks: {', '.join(asked)}." if asked else ""
    return (
        f"I only know seven scores ({scores}), and only in the words I was trained with.{why} (Said by the interface: the model "
        f"was not asked.) For example: {examples(settings, 1)[0]}"
    )


def _of_the_interface(question, settings, tokenizer) -> str:
    """What the interface says in the model's place, as a completion without reasoning."""
    return format_completion("", outside(question, settings), tokenizer.eos_token)


# --- how answers look ---------------------------------------------------------------------------------------------------


def _notebook() -> bool:
    """Whether a Jupyter kernel shows what is displayed."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


@contextlib.contextmanager
def _screen(tokenizer, question: str):
    """Where one answer appears while it is written: a cell's output, or a terminal."""
    screen = (_Page if _notebook() else _Terminal)(tokenizer, question)
    try:
        yield screen
    finally:  # stopped in the middle, a terminal would stay dim
        screen.end()


def _streamer(tokenizer, put):
    """A `transformers.TextStreamer` that hands each piece of text to `put`, the prompt left out."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            put(text)

    return Streamer(tokenizer, skip_prompt=True)


class _Terminal:
    """Plain text; reasoning dimmed where the output is a terminal."""

    def __init__(self, tokenizer, question):
        self.eos, self.dim, self.closed = tokenizer.eos_token, sys.stdout.isatty(), False
        self.streamer = _streamer(tokenizer, self.put)
        print(f"\nQUESTION  {question}\n" if question else "", end=DIM if self.dim else "", flush=True)

    def put(self, text):
        """Prints what was written next; what follows `</think>` is the response."""
        text = unescape(text.replace(self.eos, ""))
        if self.dim and THINK_CLOSE in text and not self.closed:
            self.closed = True
            text = text.replace(THINK_CLOSE, THINK_CLOSE + PLAIN, 1)
        print(text, end="", flush=True)

    show = put

    def end(self):
        print(f"{PLAIN if self.dim else ''}\n{NOTICE}", flush=True)


class _Page:
    """One cell output, redrawn while the answer grows; what stays in a saved notebook is plain HTML."""

    def __init__(self, tokenizer, question):
        from IPython.display import HTML, display

        self.eos, self.question, self.text, self.drawn, self.html = tokenizer.eos_token, question, "", 0.0, HTML
        self.streamer = _streamer(tokenizer, self.put)
        self.handle = display(HTML("<p>…</p>"), display_id=True)

    def put(self, text):
        """Adds what was written next."""
        self.text += text
        if time.monotonic() - self.drawn > _REDRAW_SECONDS:
            self.draw(open_reasoning=THINK_CLOSE not in self.text)

    show = put

    def draw(self, open_reasoning=False):
        self.drawn = time.monotonic()
        self.handle.update(self.html(page(self.text, self.eos, self.question, open_reasoning)))

    def end(self):
        self.draw()


def page(completion: str, eos: str, question: str = "", open_reasoning: bool = False) -> str:
    """One answer as HTML that needs no script: the reasoning folded, the response, the notice."""
    parsed = parse_completion(completion, eos)
    head = f"<p><b>{html.escape(question)}</b></p>" if question else ""
    problems = "" if open_reasoning else ", ".join(parsed.problems)
    return (
        f"{head}<details{' open' if open_reasoning else ''}><summary>reasoning, {len(parsed.reasoning.split())} words</summary>"
        f'<pre style="white-space:pre-wrap;color:#777">{html.escape(parsed.reasoning.strip())}</pre></details>'
        f'<pre style="white-space:pre-wrap">{html.escape(parsed.response.strip())}</pre>'
        + (f"<p><em>{html.escape(problems)}</em></p>" if problems else "")
        + f"<p><small>{NOTICE}</small></p>"
    )


def side_by_side(answers: dict[str, str], eos: str) -> str:
    """Base and fine-tuned as one HTML table."""
    cells = "".join(
        f'<td style="vertical-align:top;text-align:left;width:50%"><b>{name}</b>{page(text, eos)}</td>'
        for name, text in answers.items()
    )
    return f'<table style="width:100%"><tr>{cells}</tr></table>'


def columns(answers: dict[str, str], eos: str, width: int) -> str:
    """Base and fine-tuned as two columns of plain text in `width` characters."""
    half = max(20, (width - 3) // 2)

    def column(name, text):
        parsed = parse_completion(text, eos)
        lines = [name.upper(), "-" * half]
        for part in (
            parsed.reasoning or "(no reasoning)",
            "-> " + (parsed.response or "(no response)"),
            ", ".join(parsed.problems),
        ):
            lines += [piece for line in part.strip().splitlines() for piece in textwrap.wrap(line, half) or [""]] + [""]
        return lines

    sides = [column(name, text) for name, text in answers.items()]
    height = max(map(len, sides))
    rows = zip(*(side + [""] * (height - len(side)) for side in sides), strict=True)
    return "\n".join(" | ".join(f"{cell:<{half}}" for cell in row).rstrip() for row in rows).rstrip() + f"\n\n{NOTICE}"
