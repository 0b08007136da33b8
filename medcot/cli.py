"""The command line: `medcot demo` runs the three notebooks, `medcot audit` looks at the rows."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from .settings import NOTICE, MedcotError, load_settings, read_settings

NOTEBOOKS = ("01_baseline", "02_finetune", "03_compare")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; what its user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="medcot", description="Fine-tune a reasoning model on medical chains of thought."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="run the three notebooks in order and print the comparison").set_defaults(run=demo)
    commands.add_parser("audit", help="look at the training rows before any GPU time is spent").set_defaults(run=audit)
    commands.add_parser("preflight", help="check this machine, time three steps, predict the run").set_defaults(
        run=preflight
    )
    train = commands.add_parser("train", help="what 02_finetune does; under torchrun on many GPUs")
    train.add_argument("--settings", type=Path, help="a settings.json, instead of the environment")
    train.set_defaults(run=finetune)
    evaluation = commands.add_parser("evaluate", help="what 03_compare measures; under torchrun on many GPUs")
    evaluation.add_argument("--settings", type=Path, help="a settings.json, instead of the environment")
    evaluation.set_defaults(run=evaluate)
    # kaggle
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MedcotError as error:
        print(f"medcot {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def audit(_):
    """Prints the audit of the training rows; writes nothing."""
    from .data import load_splits
    from .run.audit import audit
    from .tokenizer import load_tokenizer

    settings = load_settings()
    splits = load_splits(settings)
    print(audit(splits, load_tokenizer(settings.model, settings.model_revision), settings))


def preflight(_):
    """Checks, audit, three timed steps and a forecast; keeps nothing."""
    from .run.preflight import preflight

    preflight(load_settings())


def finetune(options):
    """Trains and saves the adapter, in one process or as one of those that torchrun started."""
    from .run.resume import run_training

    run_training(_settings_of_a_process(options))


def evaluate(options):
    """Measures base and fine-tuned model, in one process or as one of those that torchrun started."""
    from .evaluation.measure import run_evaluation

    run_evaluation(_settings_of_a_process(options))


def _settings_of_a_process(options):
    settings = load_settings() if options.settings is None else read_settings(options.settings)
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the first process speaks for all
    return settings


def demo(_):
    """Executes the notebooks in order, showing their output as it comes, and keeps them with their outputs."""
    import nbformat
    from nbclient.exceptions import CellExecutionError

    settings = load_settings()
    source = Path(__file__).parent.parent / "notebooks"
    if not source.is_dir():
        raise MedcotError(f"{source} not found: run the demo from a clone of the project")
    folder = settings.output_dir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for name in NOTEBOOKS:
        print(f"\n=== {name} ===", flush=True)
        notebook = nbformat.read(source / f"{name}.ipynb", as_version=4)
        os.environ["WANDB_NOTEBOOK_NAME"] = f"{name}.ipynb"
        try:
            with tempfile.TemporaryDirectory() as sockets:
                _client(notebook, sockets).execute()
        except CellExecutionError as error:
            raise MedcotError(f"{name}.ipynb stopped: {error.ename}: {error.evalue}") from error
        finally:
            nbformat.write(notebook, folder / f"{name}.ipynb")
    print(f"\n=== done in {(time.monotonic() - started) / 60:.1f} minutes ===")
    for what, path in (
        ("notebooks with their outputs", folder),
        ("figures", settings.output_dir / "figures"),
        ("adapter", settings.adapter_dir),
        ("run card", settings.output_dir / "RUN.md"),
    ):
        print(f"{what:<30}{path}")
    print(NOTICE)


def _client(notebook, sockets):
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    class Client(NotebookClient):
        """Prints what cells print while they print it, so that progress bars move in the terminal too."""

        def output(self, outs, msg, display_id, cell_index):
            content = msg["content"]
            if msg["msg_type"] == "stream":
                print(content["text"], end="", flush=True)
            elif msg["msg_type"] == "execute_result":
                data = content["data"]
                print(data.get("text/markdown") or data.get("text/plain", ""), flush=True)
            return super().output(outs, msg, display_id, cell_index)

    # The kernel works where the command was called, so that relative paths in MEDCOT_DATASET mean the same in both.
    # Messages travel over files, not over TCP ports; in a folder of their own, with a name short enough for a socket.
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
    return Client(
        notebook, km=manager, timeout=None, coalesce_streams=True, resources={"metadata": {"path": os.getcwd()}}
    )


if __name__ == "__main__":
    sys.exit(main())
