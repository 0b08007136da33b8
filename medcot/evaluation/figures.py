"""The figure of a comparison."""

from ..run.tracking import INK
from .statistics import FAMILY, FEW, PRIMARY, SECONDARY

GREY = "#888"


def plot_comparison(comparison, settings):
    """Before and after of every measure with a verdict, the primary one on top; kept as `figures/comparison.png`.

    Left the levels (of shares with Wilson intervals), right the difference with its 95 % interval, of ten pairs
    or more. Shares stand above, in
    per cent and points; negative log-likelihoods below, in nats per token (lower is better); where rows have families,
    right answers by family last.
    """
    from matplotlib.figure import Figure

    judged = [m for m in comparison.measures if m.group in (PRIMARY, SECONDARY)]
    panels = {
        "% of answers": ([m for m in judged if m.unit == "%"], "points"),
        "nats per token, lower is better": ([m for m in judged if m.unit == "nats"], "nats per token"),
        "right answers by family, %": ([m for m in comparison.measures if m.group == FAMILY], "points"),
    }
    panels = {label: panel for label, panel in panels.items() if panel[0]}
    heights = [2 + len(measures) for measures, _ in panels.values()]
    figure = Figure(figsize=(9, 1 + sum(0.35 * height for height in heights)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row", height_ratios=heights)
    for (label, (measures, unit)), (levels, differences) in zip(panels.items(), grid, strict=True):
        scale = 100 if unit == "points" else 1
        _draw_levels(levels, measures[::-1], scale)
        _draw_differences(differences, measures[::-1], scale)
        levels.set(xlabel=label)
        differences.set(xlabel=f"after - before, {unit}")
    grid[0][0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    grid[0][1].set_title("difference with its 95 % interval", fontsize=10)
    path = settings.output_dir / "figures" / "comparison.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return figure


def _draw_levels(axes, measures, scale):
    for side, colour, shift in (("before", GREY, 0.14), ("after", INK, -0.14)):
        for y, m in enumerate(measures):
            interval = getattr(m, f"{side}_interval")
            if interval:
                axes.plot([scale * end for end in interval], [y + shift] * 2, color=colour, lw=1.5)
        values = [scale * getattr(m, side) for m in measures]
        axes.scatter(values, [y + shift for y in range(len(measures))], color=colour, label=side, s=24, zorder=2)
    axes.set(
        ylim=(-0.5, len(measures) - 0.5),
        yticks=range(len(measures)),
        yticklabels=[f"{m.name} (n={m.n})" for m in measures],
    )
    for tick, m in zip(axes.get_yticklabels(), measures, strict=True):
        tick.set_fontweight("bold" if m.group == PRIMARY else "normal")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes, measures, scale):
    for y, m in enumerate(measures):
        if m.n >= FEW:  # of fewer nothing is concluded
            axes.plot([scale * m.low, scale * m.high], [y, y], color=INK, lw=2)
            axes.scatter([scale * m.difference], [y], color=INK, s=24)
    axes.axvline(0, color=GREY, lw=1)
    axes.spines[["top", "right"]].set_visible(False)
