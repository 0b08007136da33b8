"""What a person reads: the run card, tables, figures and the browser of answers."""

import difflib
import html
import json
import math
import re
import textwrap
from dataclasses import asdict
from pathlib import Path

from .evaluation import CHANGES, LEVEL, POWER
from .settings import EMBEDDED_CASES, EMBEDDED_MODEL, NOTICE, MedcotError
from .tracking import HELD_OUT, INK

SCHEMA_VERSION = 1
GREY = "#888"


def plot_token_counts(audit):
    """Histogram of the training examples' lengths in tokens; the limit is marked, or named where it lies far beyond."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(audit.token_counts, bins=40, color=INK)
    axes.set(xlabel="tokens per training example", ylabel="examples")
    axes.spines[["top", "right"]].set_visible(False)
    if audit.max_seq_length > 2 * max(audit.token_counts):  # drawn, it would press the bars together
        axes.set_title(f"all far below max_seq_length {audit.max_seq_length:,}", loc="right", fontsize="medium")
    else:
        axes.axvline(audit.max_seq_length, color=HELD_OUT, label=f"max_seq_length {audit.max_seq_length:,}")
        axes.legend(frameon=False)
    return figure


def plot_comparison(comparison, settings):
    """Before and after for every measure, with the difference's 95 % interval beside; kept as `comparison.png`.

    Shares stand above, in per cent and points; the negative log-likelihoods below, in nats per token (lower is better).
    """
    from matplotlib.figure import Figure

    shown = [m for m in comparison.measures if m.group != "family" and m.unit in ("%", "nats")]
    panels = [[m for m in shown if m.unit == unit][::-1] for unit in ("%", "nats")]
    panels = [measures for measures in panels if measures]
    figure = Figure(figsize=(9, 1 + sum(0.9 + 0.3 * len(measures) for measures in panels)), layout="constrained")
    grid = figure.subplots(
        len(panels), 2, squeeze=False, sharey="row", height_ratios=[2 + len(measures) for measures in panels]
    )
    for measures, (levels, differences) in zip(panels, grid, strict=True):
        share = measures[0].unit == "%"
        _draw_levels(levels, measures, 100 if share else 1)
        _draw_differences(differences, measures, 100 if share else 1)
        levels.set(xlabel="% of answers" if share else "nats per token, lower is better")
        differences.set(xlabel="after - before, points" if share else "after - before, nats per token")
    grid[0][0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    grid[0][1].set_title("difference with its 95 % interval", fontsize=10)
    return _keep(figure, settings, "comparison.png")


def plot_families(comparison, settings):
    """Share of right answers by family of cases, before and after, each with its Wilson interval; `families.png`.

    None where the rows have no families, as real ones do.
    """
    from matplotlib.figure import Figure

    measures = [m for m in comparison.measures if m.group == "family"][::-1]
    if not measures:
        print("these rows have no families: there is no figure by family")
        return None
    figure = Figure(figsize=(9, 1 + 0.45 * len(measures)), layout="constrained")
    levels, differences = figure.subplots(1, 2, sharey=True)
    _draw_levels(levels, measures, 100)
    _draw_differences(differences, measures, 100)
    levels.set(xlabel="right answers, %", xlim=(-3, 103))
    differences.set(xlabel="after - before, points")
    levels.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    differences.set_title("difference with its 95 % interval", fontsize=10)
    return _keep(figure, settings, "families.png")


def _draw_levels(axes, measures, scale):
    for side, colour, shift in (("before", GREY, 0.14), ("after", INK, -0.14)):
        for y, m in enumerate(measures):
            interval = getattr(m, f"{side}_interval")
            if interval:
                axes.plot([scale * end for end in interval], [y + shift] * 2, color=colour, lw=1.5)
        values = [scale * getattr(m, side) for m in measures]
        axes.scatter(values, [y + shift for y in range(len(measures))], color=colour, label=side, s=24, zorder=2)
    axes.set(yticks=range(len(measures)), yticklabels=[f"{m.name} (n={m.n})" for m in measures])
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes, measures, scale):
    for y, m in enumerate(measures):
        axes.plot([scale * m.low, scale * m.high], [y, y], color=INK, lw=2)
    axes.scatter([scale * m.difference for m in measures], range(len(measures)), color=INK, s=24)
    axes.axvline(0, color=GREY, lw=1)
    axes.spines[["top", "right"]].set_visible(False)


def _keep(figure, settings, name):
    path = settings.output_dir / "figures" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


def show_examples(comparison):
    """Prints three answers in full, chosen by rule: the first fixed, the first broken and the first unchanged one."""
    for row in comparison.examples:
        print(f"=== the first one {row['change']} ===\n{_as_text(row)}\n")
    missing = [kind for kind in CHANGES if kind not in {row["change"] for row in comparison.examples}]
    if missing:
        print(f"no answer was {' or '.join(missing)}")
    print(NOTICE)


def show_showcase(comparison):
    """Prints the showcase question with both answers and its reference, labelled where it was trained on."""
    for row in comparison.showcase:
        if row["training_row"]:
            print("A TRAINING ROW: a good answer to it shows memory, not learning. Not counted in any measure.")
        else:
            print("Not a training row; a single answer is no evidence either. Not counted in any measure.")
        print(_as_text(row))
    print(NOTICE)


def _forgotten(items) -> str:
    generated = sum(item["asked"] == "generated" for item in items)
    return f"{generated} generated answers and {len(items) - generated} options picked by likelihood were right before and are wrong now"


def show_forgotten(comparison, rows: int = 10):
    """Prints what was right before and is wrong now: how many, and the first `rows`; all stand in `comparison.json`."""
    forgotten = comparison.forgotten
    print(_forgotten(forgotten) + (":" if forgotten else ""))
    for item in forgotten[:rows]:
        print(f"\n({item['asked']}) {textwrap.shorten(item['question'], 300)}")
        for name in ("expected", "before", "after"):
            print(f"  {name:<9}{textwrap.shorten(item[name] or '(nothing)', 200)}")
    if len(forgotten) > rows:
        print(f"\n... and {len(forgotten) - rows} more in comparison.json")


def _as_text(row) -> str:
    lines = [f"QUESTION   {row['question']}", f"REFERENCE  {row['reference'].strip()}"]
    for side in ("before", "after"):
        answer = row[side]
        lines += [f"{side.upper():<11}{answer.reasoning.strip() or '(no reasoning)'}"]
        lines += [f"   ->      {answer.response.strip() or '(no response)'}"]
        lines += [f"           ({', '.join(answer.problems)})"] if answer.problems else []
    return "\n".join(lines)


def browse(comparison):
    """Question, reference, before and after side by side: a widget to pick the question, or static HTML without one.

    The widget puts the fixed, the broken or the unchanged ones first; words that only one of the two answers has are
    marked in it.
    """
    from IPython.display import HTML, display

    pages = [_page(row) for row in comparison.rows]
    labels = [
        f"{i + 1}. ({row['change']}) {textwrap.shorten(row['question'], 90)}" for i, row in enumerate(comparison.rows)
    ]
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    # Shown below the widget where scripts do not run (GitHub, nbviewer, a printed page): the same pages, folded.
    static = "".join(
        f"<details><summary>{html.escape(label)}</summary>{page}</details>"
        for label, page in zip(labels, pages, strict=True)
    )
    if ipywidgets is not None and pages:
        counts = {kind: sum(row["change"] == kind for row in comparison.rows) for kind in CHANGES}
        order = ipywidgets.Dropdown(
            options=[("row order", None), *((f"{kind} first ({count})", kind) for kind, count in counts.items())],
            description="sort",
        )
        picker = ipywidgets.Dropdown(options=_picks(comparison, labels, None), layout={"width": "95%"})
        page = ipywidgets.HTML(pages[0])
        order.observe(lambda c: setattr(picker, "options", _picks(comparison, labels, c["new"])), names="value")
        picker.observe(
            lambda c: setattr(page, "value", pages[c["new"]]) if c["new"] is not None else None, names="value"
        )
        display(ipywidgets.VBox([order, picker, page]))
    display(HTML(f"<details><summary>all {len(pages)} questions as plain text</summary>{static}</details>"))


def _picks(comparison, labels, first) -> list[tuple[str, int]]:
    """(label, row) in row order, those that changed as `first` says before the others."""
    rows = sorted(range(len(labels)), key=lambda i: (comparison.rows[i]["change"] != first, i))
    return [(labels[i], i) for i in rows]


def _marked(text: str, other: str, colour: str) -> str:
    """`text` as HTML, with the words that `other` does not have in that place on a coloured ground."""
    here, there = (re.findall(r"\s+|\S+", value) for value in (text, other))
    pieces = []
    for kind, start, stop, *_ in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        words = html.escape("".join(here[start:stop]))
        pieces.append(
            words if kind == "equal" or not words.strip() else f'<mark style="background:{colour}">{words}</mark>'
        )
    return "".join(pieces)


def _page(row) -> str:
    def cell(title, side, other, colour):
        answer = row[side]
        problems = f"<p><em>{html.escape(', '.join(answer.problems))}</em></p>" if answer.problems else ""
        reasoning = _marked(answer.reasoning.strip() or "(no reasoning)", row[other].reasoning.strip(), colour)
        response = _marked(answer.response.strip() or "(no response)", row[other].response.strip(), colour)
        return (
            f'<td style="vertical-align:top;text-align:left;width:50%"><b>{title}</b>{problems}'
            f'<pre style="white-space:pre-wrap;color:#777">{reasoning}</pre>'
            f'<pre style="white-space:pre-wrap">{response}</pre></td>'
        )

    before, after = cell("Before", "before", "after", "#f6d5c9"), cell("After", "after", "before", "#d7f0dd")
    question = html.escape(row["question"]).replace("\n", "<br>")
    return (
        f"<p><b>Question</b> {question}</p><p><b>Reference</b> {html.escape(row['reference'])}</p>"
        f'<p><b>{row["change"]}</b></p><table style="width:100%"><tr>{before}{after}</tr></table>'
        f"<p><small>{NOTICE}</small></p>"
    )


def write_comparison(comparison, settings, splits, questions=None) -> Path:
    """Writes `comparison.json` in the output folder and returns its path.

    Schema, version 1 (`schema_version`; a field is only ever added under the same number):

    - `notice`: text about clinical use. `profile`, `model`, `adapter`: of this run.
    - `level` (0.95) of every interval and `power` (0.8) of every `detectable`.
    - `data`: `source`, `revision`, `sha256` of the rows, numbers of `training` and `evaluation` rows; `questions`: the
      same of the multiple-choice questions, or null.
    - `leaks`: `checked`, `exact` and `near` (evaluation question, training question, similarity from 95 to 100), and
      `left_out`, how many evaluation questions that removed; null if nothing was checked.
    - `measures`: a list; each has `name`, `group` ("all", "family", "chat"), `n` pairs, `unit` ("%": shares from 0 to 1;
      "nats", per token; "tokens"), `better` ("higher", "lower", "neither"), `before`, `after`, `difference` (after -
      before) with its interval `low` to `high` made by `interval`, `p_value` of `test`, `verdict`, `sentence`;
      `before_interval`, `after_interval` (Wilson), `fixed`, `broken` for shares, else null; `detectable`, the smallest
      difference that n would have shown, null if none.
    - `answers`: one a generated answer: `question`, `reference`, `family`, `change` ("fixed", "broken", "unchanged"),
      and `before` and `after`, each with `reasoning`, `response`, `problems`, `correct` (null: not gradable), `length`
      in tokens and `repetition` from 0 to 1.
    - `choices`: one a question answered by likelihood: `row`, `answer_index`, and the option chosen `before`, `after`.
    - `forgotten`: right before and wrong now: `asked` ("generated", "likelihood"), `question`, `expected`, `before`,
      `after`.
    - `showcase`: `question`, `reference`, `training_row`, `before`, `after`; null where it was not asked.
    - `sources`: for each part the two cache files, before and after, relative to the output folder.
    """
    leaks = comparison.leaks
    data = {
        "source": splits.source, "revision": splits.revision, "sha256": splits.fingerprint,
        "training": len(splits.train), "evaluation": len(splits.eval),
    }  # fmt: skip
    record = {
        "schema_version": SCHEMA_VERSION, "notice": NOTICE, "profile": settings.profile, "model": _model_name(settings),
        "adapter": settings.adapter_dir.name, "level": LEVEL, "power": POWER, "data": data,
        "questions": questions and {
            "source": questions.source, "revision": questions.revision, "sha256": questions.fingerprint, "n": len(questions)
        },
        "leaks": leaks and {
            "checked": leaks.checked, "exact": leaks.exact, "near": leaks.near, "left_out": comparison.left_out
        },
        "measures": [
            asdict(m) | {"difference": m.difference, "verdict": m.verdict, "sentence": m.sentence}
            for m in comparison.measures
        ],
        "answers": [
            {
                "question": row["question"], "reference": row["reference"], "family": row["family"], "change": row["change"],
                **{side: _side(row[side], row[f"outcome_{side}"]) for side in ("before", "after")},
            }
            for row in comparison.rows
        ],
        "choices": [
            {name: row[name] for name in ("row", "answer_index", "before", "after")} for row in comparison.choice_rows
        ],
        "forgotten": comparison.forgotten,
        "showcase": next(
            (row | {side: _side(row[side]) for side in ("before", "after")} for row in comparison.showcase), None
        ),
        "sources": {
            name: [str(_relative(path, settings.output_dir)) for path in pair] for name, pair in comparison.sources.items()
        },
    }  # fmt: skip
    path = settings.output_dir / "comparison.json"
    _write(path, json.dumps(_finite(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return path


def _side(answer, outcome=None) -> dict:
    side = {"reasoning": answer.reasoning, "response": answer.response, "problems": answer.problems}
    if outcome is not None:
        side |= {"correct": outcome.correct, "length": outcome.length, "repetition": outcome.repetition}
    return side


def _finite(value):
    """`value` with every number that JSON cannot hold (nan, infinity) replaced by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _relative(path, folder: Path) -> Path:
    path = Path(path)
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _model_name(settings) -> str:
    return "the embedded model" if settings.model == EMBEDDED_MODEL else settings.model


def _write(path: Path, text: str):
    fresh = path.with_name(path.name + ".saving")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def write_run_card(comparison, settings, splits, questions=None):
    """Writes `RUN.md` and `comparison.json` from what the run recorded, nothing by hand, and returns the card's path.

    The same text with Hugging Face front matter becomes `README.md` of the adapter folder, its model card. Raises
    MedcotError if 02_finetune has left no `training.json` or one that cannot be read.
    """
    path = settings.output_dir / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedcotError(
            f"{path} cannot be read ({error}): run 02_finetune.ipynb with the same profile first"
        ) from error
    write_comparison(comparison, settings, splits, questions)
    card = _run_card(comparison, settings, splits, questions, record)
    path = settings.output_dir / "RUN.md"
    _write(path, card)
    if settings.adapter_dir.is_dir():
        _write(settings.adapter_dir / "README.md", _front_matter(comparison, settings, splits, questions) + card)
    print(f"run card in {path}, all numbers in comparison.json beside it, model card in {settings.adapter_dir}")
    return path


def _run_card(comparison, settings, splits, questions, record) -> str:
    losses = [(entry["step"], entry["loss"]) for entry in record["log_history"] if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in record["log_history"] if "eval_loss" in entry]
    memory = (
        f"not measured ({record['device']})"
        if record["peak_memory_gib"] is None
        else f"{record['peak_memory_gib']:.2f} GiB"
    )
    forecast = _forecast(record["forecast"])
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    leaks = "not checked" if comparison.leaks is None else str(comparison.leaks).splitlines()[0]
    return f"""# Run card: profile {settings.profile}

{NOTICE}

| | |
| --- | --- |
| model | {_model_name(settings)}, revision {settings.model_revision or "not pinned"} |
| data | {splits} |
| data SHA-256 | {splits.fingerprint} |
| multiple choice | {questions or "not asked"} |
| leaks | {leaks} |
| examples a step | {record["examples_per_step"]} |
| steps, epochs | {record["steps"]}, {record["epochs"]:.2f} over {record["examples"]} examples |
| training | {record["seconds"]:.0f} s on {record["device"]} |
| peak memory | {memory} |
| forecast from its first steps | {forecast} |
| updates skipped | {record["skipped_updates"]}, as gradients were not finite |
| incidents | {"; ".join(record["notes"]) or "none"} |
| training loss | {losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at step {losses[-1][0]} |
| versions | Python {record["python"]}, {versions} |

## Loss

| step | {" | ".join(str(step) for step, _ in _thinned(losses))} |
| --- |{" --- |" * len(_thinned(losses))}
| training loss | {" | ".join(f"{loss:.4f}" for _, loss in _thinned(losses))} |

{"Held-out loss: " + ", ".join(f"{loss:.4f} at step {step}" for step, loss in held_out) + "." if held_out else ""}

## Before and after

```text
{comparison}
```

{_forgotten(comparison.forgotten)}; they are listed in `comparison.json`.

{NOTICE}
"""


def _forecast(found: dict | None) -> str:
    if found is None:
        return "none, the run was too short"
    memory = "" if found["peak_gib"] is None else f", {found['peak_gib']:.2f} GiB"
    return f"{60 * found['minutes']:.0f} s{memory}"


def _thinned(points, most: int = 10):
    """At most `most` points of a curve, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _front_matter(comparison, settings, splits, questions) -> str:
    """The YAML that Hugging Face reads from a model card; local paths are left out, as they are no names of the hub."""
    from huggingface_hub import EvalResult, ModelCardData

    on_hub = not Path(settings.model).exists()
    results = [
        EvalResult(
            task_type="multiple-choice", dataset_type=source if _hub_name(source) else "embedded-cases", dataset_name=source,
            metric_type="accuracy", metric_name=f"accuracy, {m.name} (before: {m.before:.4f}, n = {m.n}, {m.verdict})",
            metric_value=round(m.after, 4),
        )
        for m, source in _accuracies(comparison, splits, questions)
    ]  # fmt: skip
    data = ModelCardData(
        base_model=settings.model if on_hub else None,
        datasets=[splits.source] if _hub_name(splits.source) else None,
        library_name="peft", pipeline_tag="text-generation", language="en",
        # The adapter inherits the terms of its base and of its data; only the embedded ones are this project's own.
        license="apache-2.0" if settings.model == EMBEDDED_MODEL and splits.source == EMBEDDED_CASES else "other",
        tags=["lora", "medical", "chain-of-thought", "not-for-clinical-use"],
        model_name=(settings.adapter_dir.name if on_hub else "adapter of a local model") if results else None, eval_results=results or None,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n"


def _accuracies(comparison, splits, questions):
    for m in comparison.measures:
        if m.name == "multiple choice" and questions is not None:
            yield m, questions.source
        if m.name == "right answer":
            yield (
                m,
                splits.source
                if any(row["family"] for row in comparison.rows) or questions is None
                else questions.source,
            )


def _hub_name(source: str) -> bool:
    return (
        source != EMBEDDED_CASES and not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    )
