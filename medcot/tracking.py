"""Weights & Biases online or offline, and the live loss chart."""

import os
import socket
import sys
from pathlib import Path

from .settings import on_kaggle

INK, HELD_OUT = "#1f5a96", "#c4561b"


def configure_wandb(settings) -> str:
    """Decides how wandb will run and sets its environment: "online", "offline" or "disabled", with a printed reason.

    Online needs a key (WANDB_API_KEY, a Kaggle secret of that name, or an earlier `wandb login`) and a host that
    answers within 3 seconds. Nothing is asked and no model is uploaded.
    """
    mode, why = "disabled", "report_to is none"
    if settings.report_to == "wandb":
        mode, why = _wandb_mode()
    folder = Path(settings.output_dir) / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "WANDB_MODE": mode,
        "WANDB_PROJECT": settings.wandb_project,
        "WANDB_DIR": str(settings.output_dir),
        "WANDB_NAME": settings.profile,
        "WANDB_LOG_MODEL": "false",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_SILENT": "true",
        "WANDB_INIT_TIMEOUT": "20",
        "WANDB_ERROR_REPORTING": "false",
    }
    print(f"wandb {mode}: {why}" + (f", files in {folder}" if mode == "offline" else ""))
    return mode


def _wandb_mode() -> tuple[str, str]:
    if not _wandb_key():
        return "offline", "no key found"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError as error:
        return "offline", f"{name} does not answer ({type(error).__name__})"
    return "online", f"key found and {name} answers"


def _wandb_key() -> bool:
    """True when a key is at hand; one from a Kaggle secret is put where wandb reads it and never printed."""
    if on_kaggle() and "WANDB_API_KEY" not in os.environ:
        try:
            from kaggle_secrets import UserSecretsClient

            os.environ["WANDB_API_KEY"] = UserSecretsClient().get_secret("WANDB_API_KEY")
        except Exception:  # an unattached secret raises one of three classes of that package, all meaning "no key"
            pass
    netrc = Path.home() / ("_netrc" if sys.platform == "win32" else ".netrc")
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())


class LossChart:
    """Training and held-out loss in one figure that is updated in place in a notebook and kept as `loss.png`."""

    def __init__(self, settings):
        self.path, self.max_steps = Path(settings.output_dir) / "figures" / "loss.png", settings.max_steps
        self.handle = None

    def draw(self, history, save: bool = False):
        """Draws a trainer's `log_history`; with `save` also writes the file."""
        from IPython import get_ipython
        from IPython.display import display

        figure = plot_loss(history, self.max_steps)
        if self.handle is not None:
            self.handle.update(figure)
        elif getattr(get_ipython(), "kernel", None) is not None:
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
