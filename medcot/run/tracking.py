"""Weights & Biases online or offline, and the live loss chart."""

import contextlib
import os
import sys
from pathlib import Path

from ..hub import kaggle_secret

INK, HELD_OUT = "#1f5a96", "#c4561b"
ONLINE_SECONDS = 20.0  # how long going online may take before the run is kept offline


@contextlib.contextmanager
def wandb_run(settings):
    """A wandb run around training, which TRL's own callback logs to; nothing with report_to="none".

    What WANDB_MODE says stands. Without it: online with a key (WANDB_API_KEY, a Kaggle secret of that name, or an earlier
    `wandb login`), else offline; and offline too, with a line, where going online fails (a wrong key, no network, an
    outage). Nothing is asked and no model is uploaded.
    """
    if settings.report_to == "none":
        yield
        return
    import wandb

    os.environ["WANDB_SILENT"] = "true"
    mode, why = _wandb_mode()
    start = {
        "project": settings.wandb_project, "name": settings.profile, "dir": str(settings.output_dir),
        "settings": wandb.Settings(init_timeout=ONLINE_SECONDS, console="off", silent=True, disable_code=True),
    }  # fmt: skip
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        wandb.init(mode=mode, **start)
    except Exception as error:  # wandb, its service and the network raise a class each
        if mode != "online":
            raise
        mode, why = "offline", f"wandb could not go online ({type(error).__name__})"
        wandb.init(mode=mode, **start)
    print(f"wandb {mode}: {why}" + (f", files in {settings.output_dir / 'wandb'}" if mode == "offline" else ""))
    try:
        if mode == "online":
            wandb.run.display(height=420)
        yield
    finally:
        wandb.finish()


def _wandb_mode() -> tuple[str, str]:
    if mode := os.environ.get("WANDB_MODE"):
        return mode, "WANDB_MODE says so"
    netrc = Path.home() / ("_netrc" if sys.platform == "win32" else ".netrc")
    if kaggle_secret("WANDB_API_KEY") or (netrc.is_file() and "api.wandb.ai" in netrc.read_text()):
        return "online", "a key was found"
    return "offline", "no key found"


class LossChart:
    """Training and held-out loss in one figure that is updated in place in a notebook and kept as `loss.png`."""

    def __init__(self, settings):
        self.path, self.max_steps = Path(settings.output_dir) / "figures" / "loss.png", settings.max_steps or None
        self.handle = None

    def draw(self, history, save: bool = False):
        """Draws a trainer's `log_history`; with `save` also writes the file."""
        from IPython import get_ipython
        from IPython.display import display

        in_notebook = getattr(get_ipython(), "kernel", None) is not None
        if not in_notebook and not save:
            return  # nobody would see it
        figure = plot_loss(history, self.max_steps)
        if self.handle is not None:
            self.handle.update(figure)
        elif in_notebook:
            self.handle = display(figure, display_id=True)
        if save:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.path, dpi=150)


def plot_loss(history, max_steps):
    """The figure of a trainer's `log_history`: training loss, and held-out loss where it was measured, by step."""
    from matplotlib.figure import Figure  # not pyplot, which would keep and show every one of these figures

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label, colour, marker in (("loss", "training", INK, "."), ("eval_loss", "held out", HELD_OUT, "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=f"{label} {points[-1][1]:.3f}", color=colour, marker=marker, lw=1.5
            )
    axes.set(xlabel="step", ylabel="loss per token (nats)", xlim=(0, max_steps))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    return figure
