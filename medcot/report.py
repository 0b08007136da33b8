"""What a person reads: the run card, tables, figures and the browser of answers."""

import html
import json
import textwrap

from .settings import NOTICE
from .tracking import HELD_OUT, INK


def plot_token_counts(audit):
    """Histogram of the training examples' lengths in tokens, with the limit marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(audit.token_counts, bins=40, color=INK)
    axes.axvline(audit.max_seq_length, color=HELD_OUT, label=f"max_seq_length {audit.max_seq_length}")
    axes.set(xlabel="tokens per training example", ylabel="examples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def plot_comparison(comparison, settings):
    """Before and after for every measure, with the difference's 95 % interval beside; kept as `comparison.png`."""
    from matplotlib.figure import Figure

    measures = comparison.measures[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(measures)), layout="constrained")
    shares, differences = figure.subplots(1, 2, sharey=True)
    for y, m in enumerate(measures):
        shares.plot([100 * m.before, 100 * m.after], [y, y], color="#bbb", lw=2, zorder=1)
        differences.plot([100 * m.low, 100 * m.high], [y, y], color=INK, lw=2)
    y = range(len(measures))
    shares.scatter([100 * m.before for m in measures], y, color="#888", label="before", zorder=2)
    shares.scatter([100 * m.after for m in measures], y, color=INK, label="after", zorder=2)
    differences.scatter([100 * m.difference for m in measures], y, color=INK)
    differences.axvline(0, color="#888", lw=1)
    shares.set(
        yticks=list(y), yticklabels=[f"{m.name} (n={m.n})" for m in measures], xlabel="% of answers", xlim=(-3, 103)
    )
    differences.set(xlabel="difference in points, 95 % interval")
    shares.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in (shares, differences):
        axes.spines[["top", "right"]].set_visible(False)
    path = settings.output_dir / "figures" / "comparison.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


def browse(comparison):
    """Question, reference, before and after side by side: a widget to pick the question, or static HTML without one."""
    from IPython.display import HTML, display

    pages = [_page(row) for row in comparison.rows]
    labels = [f"{i + 1}. {textwrap.shorten(row['question'], 90)}" for i, row in enumerate(comparison.rows)]
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    # Shown below the widget where scripts do not run (GitHub, nbviewer, a printed page): the same pages, folded.
    static = "".join(
        f"<details><summary>{html.escape(label)}</summary>{page}</details>"
        for label, page in zip(labels, pages, strict=True)
    )
    if ipywidgets is not None:
        picker = ipywidgets.Dropdown(options=[(label, i) for i, label in enumerate(labels)], layout={"width": "95%"})
        page = ipywidgets.HTML(pages[0])
        picker.observe(lambda change: setattr(page, "value", pages[change["new"]]), names="value")
        display(ipywidgets.VBox([picker, page]))
    display(HTML(f"<details><summary>all {len(pages)} questions as plain text</summary>{static}</details>"))


def _page(row) -> str:
    def cell(title, completion):
        problems = f"<p><em>{html.escape(', '.join(completion.problems))}</em></p>" if completion.problems else ""
        return (
            f'<td style="vertical-align:top;text-align:left;width:50%"><b>{title}</b>{problems}'
            f'<pre style="white-space:pre-wrap;color:#777">{html.escape(completion.reasoning.strip() or "(no reasoning)")}</pre>'
            f'<pre style="white-space:pre-wrap">{html.escape(completion.response.strip() or "(no response)")}</pre></td>'
        )

    return (
        f"<p><b>Question</b> {html.escape(row['question'])}</p><p><b>Reference</b> {html.escape(row['reference'])}</p>"
        f'<table style="width:100%"><tr>{cell("Before", row["before"])}{cell("After", row["after"])}</tr></table>'
        f"<p><small>{NOTICE}</small></p>"
    )


def write_run_card(comparison, settings, splits):
    """Writes `RUN.md` from what the run recorded, nothing by hand, and returns its path."""
    record = json.loads((settings.output_dir / "training.json").read_text(encoding="utf-8"))
    losses = [(entry["step"], entry["loss"]) for entry in record["log_history"] if "loss" in entry]
    memory = "not measured on a CPU" if record["peak_memory_gib"] is None else f"{record['peak_memory_gib']:.2f} GiB"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = f"""# Run card: profile {settings.profile}

{NOTICE}

| | |
| --- | --- |
| model | {settings.model} |
| data | {splits} |
| examples a step | {record["examples_per_step"]} |
| steps, epochs | {record["steps"]}, {record["epochs"]:.2f} over {record["examples"]} examples |
| training | {record["seconds"]:.0f} s on {record["device"]} |
| peak memory | {memory} |
| training loss | {losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at step {losses[-1][0]} |
| versions | Python {record["python"]}, {versions} |

```text
{comparison}
```
"""
    path = settings.output_dir / "RUN.md"
    path.write_text(text, encoding="utf-8")
    print(f"run card in {path}")
    return path
