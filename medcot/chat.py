"""A chat: in a notebook with the adapter as a switch, in a terminal what `medcot ask` and `medcot chat` do."""

import contextlib
import html
from pathlib import Path

from .asking import BASE, TUNED, ask, ask_both, examples, page, stream
from .model import load_model
from .profiles import load_run
from .settings import NOTICE, MedcotError

BOTH = "both"
ALONE = "Each question stands alone: the model was trained on single questions and remembers none."


def chat_widget(model, tokenizer, settings):
    """A text field, a switch between base, fine-tuned and both (`disable_adapter`), and the conversation above them.

    In a saved notebook, where no script runs, what was said stays as plain HTML. Returns the widget, already shown; without
    ipywidgets, None and a line that says how to ask instead.
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print("ipywidgets is not installed: ask(model, tokenizer, '...', settings) answers one question")
        return None
    return _Chat(model, tokenizer, settings).show()


class _Chat:
    """The widgets of one conversation, and what was said."""

    def __init__(self, model, tokenizer, settings):
        import ipywidgets

        self.model, self.tokenizer, self.settings, self.turns, self.static = model, tokenizer, settings, [], None
        known = examples(settings)
        self.said = ipywidgets.HTML(f"<p>{ALONE}</p>")
        sides = [TUNED, BASE, BOTH] if hasattr(model, "disable_adapter") else [BASE]
        self.switch = ipywidgets.ToggleButtons(options=sides, description="answered by")
        self.field = ipywidgets.Textarea(value=next(iter(known), ""), placeholder="a question", layout={"width": "95%"})
        self.button = ipywidgets.Button(description="Ask", button_style="primary")
        self.button.on_click(self.answer)
        self.parts = [self.said, self.switch, self.field, self.button]
        if known:
            pick = ipywidgets.Dropdown(options=known, description="examples", layout={"width": "95%"})
            pick.observe(lambda change: setattr(self.field, "value", change["new"]), names="value")
            self.parts.insert(2, pick)

    def show(self):
        """Displays the widgets, and the output that keeps the conversation without them."""
        import ipywidgets
        from IPython.display import HTML, display

        self.static = display(HTML(f"<p><small>{ALONE}</small></p>"), display_id=True)
        widget = ipywidgets.VBox(self.parts)
        display(widget)
        return widget

    def answer(self, _):
        """What the button does."""
        from IPython.display import HTML

        self.button.disabled = True
        try:
            self.turns.append(self.turn(self.field.value, self.switch.value))
        except MedcotError as error:
            self.turns.append(f"<p><em>{html.escape(str(error))}</em></p>")
        finally:
            self.button.disabled = False
        self.said.value = "".join(self.turns)
        if self.static is not None:  # outside a kernel nothing is displayed
            words = f"<summary>{len(self.turns)} questions as plain text</summary>"
            self.static.update(HTML(f"<details>{words}{self.said.value}</details>"))

    def turn(self, question: str, side: str) -> str:
        """One question and its answers as HTML, shown while they are written."""
        cells = []

        def cell(name, text, written=True):
            answer = page(text, self.tokenizer.eos_token, open_reasoning=not written)
            return f'<td style="vertical-align:top;text-align:left"><b>{name}</b>{answer}</td>'

        for name in (BASE, TUNED) if side == BOTH else (side,):

            def show(text, name=name):
                row = _table(question, "".join([*cells, cell(name, text, written=False)]))
                self.said.value = "".join([*self.turns, row])

            with _adapter(self.model, name):
                cells.append(cell(name, stream(self.model, self.tokenizer, question, self.settings, show)))
        return _table(question, "".join(cells))


def _table(question: str, cells: str) -> str:
    return f'<p><b>{html.escape(question)}</b></p><table style="width:100%"><tr>{cells}</tr></table>'


def _adapter(model, side: str):
    """The adapter switched off for the base's turn."""
    return model.disable_adapter() if side == BASE and hasattr(model, "disable_adapter") else contextlib.nullcontext()


# --- the command line ---------------------------------------------------------------------------------------------------


def _load(settings, both: bool):
    """Model and tokenizer, with the adapter if there is one yet."""
    adapter = settings.adapter_dir
    if not (adapter / "adapter_model.safetensors").is_file():
        if both:
            raise MedcotError(
                f"no adapter_model.safetensors in {adapter}: run 02_finetune.ipynb with the same profile first"
            )
        print(f"no adapter in {adapter} yet (02_finetune.ipynb makes it): the base model answers")
        adapter = None
    return load_model(settings, adapter=adapter)


def run_ask(options):
    """`medcot ask`: the questions of the command line, or examples without one."""
    settings = load_run(output_dir=options.out)
    if not options.question:
        known = examples(settings) or ["Which drug is given first for anaphylaxis, by which route?"]
        print("ask a question in quotation marks, for example:")
        print("\n".join(f'  medcot ask "{question}"' for question in known))
        return
    model, tokenizer = _load(settings, options.both)
    if options.both:
        for question in options.question:
            ask_both(model, tokenizer, question, settings)
    else:
        ask(model, tokenizer, options.question[0] if len(options.question) == 1 else options.question, settings)


def run_chat(options):
    """`medcot chat`: one question after the other, until /quit or the end of the input."""
    settings = load_run(output_dir=options.out)
    model, tokenizer = _load(settings, options.both)
    sides = "/base, /tuned or /both say who answers, " if hasattr(model, "disable_adapter") else ""
    print(f"{ALONE} {sides}/examples shows questions, /quit or Ctrl-D ends. {NOTICE}")
    side = BOTH if options.both else TUNED
    while (line := _line()) is not None:
        if line in ("/base", "/tuned", "/both") and sides:
            side = {"/base": BASE, "/tuned": TUNED, "/both": BOTH}[line]
            print(f"from here on: {side}")
        elif line == "/examples":
            print("\n".join(examples(settings)) or "any medical question in words")
        elif line.startswith("/"):
            print(f"{line} is no command: /base /tuned /both /examples /quit")
        elif line:
            _say(model, tokenizer, line, settings, side)


def _line() -> str | None:
    """What was typed; None at the end."""
    try:
        line = input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == "/quit" else line


def _say(model, tokenizer, question, settings, side):
    try:
        if side == BOTH:
            ask_both(model, tokenizer, question, settings)
        else:
            with _adapter(model, side):
                ask(model, tokenizer, question, settings)
    except MedcotError as error:  # a question that is too long ends nothing
        print(error)
    except KeyboardInterrupt:
        print("\n(stopped)")


def add_commands(commands):
    """Adds `ask` and `chat` to the sub-parsers of the command line."""
    words = "put a question to the fine-tuned model; without one, see examples"
    command = commands.add_parser("ask", help=words, description=words)
    command.add_argument("question", nargs="*", help="one or more questions, each in quotation marks")
    command.add_argument("--both", action="store_true", help="base and fine-tuned side by side")
    command.add_argument("--out", type=Path, help="output folder of the run, as MEDCOT_OUT")
    command.set_defaults(run=run_ask)
    words = "ask one question after the other"
    command = commands.add_parser("chat", help=words, description=words)
    command.add_argument("--both", action="store_true", help="base and fine-tuned side by side")
    command.add_argument("--out", type=Path, help="output folder of the run, as MEDCOT_OUT")
    command.set_defaults(run=run_chat)
