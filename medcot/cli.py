"""The command line: what the notebooks do, without a notebook. What its user can mend is one line on standard error."""

import argparse
import atexit
import os
import sys
import tempfile
import time
from pathlib import Path

from . import __version__
from .environment import VARIABLES
from .profiles import PROFILES, load_settings, read_settings
from .settings import NOTICE, MedcotError

NOTEBOOKS = ("01_baseline", "02_finetune", "03_compare")
_SHORT = {
    "--data": "--dataset", "--out": "--output-dir", "--question": "--question-column", "--reasoning": "--reasoning-column",
    "--response": "--response-column",
}  # fmt: skip
_EXAMPLES = f"""examples:
  medcot demo                                            the three notebooks on this machine
  medcot train --max-steps 100 --data rows.csv --out runs/a
  medcot ask "A man of 61 has chest pain. What next?" --both

Every setting is a flag of audit, preflight, train and evaluate: medcot train --help lists them. Environment:
{chr(10).join(f"  {name:<19}{words}" for name, words in VARIABLES.items() if "in tests" not in words)}

{NOTICE}"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status; what its user can mend is one line on standard error."""
    options, rest = _parser().parse_known_args(arguments)
    if getattr(options, "profile", None):
        os.environ["MEDCOT_PROFILE"] = options.profile
    try:
        if getattr(options, "takes_settings", False):
            if rest and not rest[0].startswith("-"):  # medcot audit rows.csv
                rest = ["--data", *rest]
            options.changes = _changes(options.command, [_SHORT.get(word, word) for word in rest])
        elif rest:
            raise MedcotError(f"{' '.join(rest)} is unknown: see medcot {options.command} --help")
        options.run(options)
    except MedcotError as error:
        print(f"medcot {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser():
    from . import chat, export, kaggle

    parser = argparse.ArgumentParser(
        prog="medcot", description="Fine-tune a reasoning model on medical chains of thought, and measure what that did.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"medcot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for run, words in (
        (demo, "run the three notebooks in order and print the comparison"),
        (audit, "look at the training rows before any GPU time is spent: medcot audit [ROWS]"),
        (preflight, "check this machine, time three steps, predict the run"),
        (train, "what 02_finetune does; under torchrun on many GPUs"),
        (evaluate, "what 03_compare measures; under torchrun on many GPUs"),
    ):
        # The help of those that take settings is that of the settings, which `_changes` shows.
        command = commands.add_parser(run.__name__, help=words, description=words, add_help=run is demo)
        command.add_argument("--profile", help="profile to start from, as MEDCOT_PROFILE")
        command.set_defaults(run=run, takes_settings=run is not demo)
        if run in (train, evaluate):
            command.add_argument("--settings", type=Path, help="a settings.json, in place of environment and flags")
    for room in (chat, export, kaggle):
        room.add_commands(commands)
    return parser


def _changes(command: str, flags: list[str]) -> dict:
    """The settings that flags change, by field; a flag that is none is told its neighbour (tyro)."""
    if not flags:
        return {}
    import tyro

    from .settings import Settings

    default = PROFILES.get(os.environ.get("MEDCOT_PROFILE"), PROFILES["tiny"])
    found = tyro.cli(Settings, default=default, args=flags, prog=f"medcot {command}", description=NOTICE)
    return {name: value for name, value in vars(found).items() if value != getattr(default, name, value)}


def _settings(options):
    settings = load_settings(**options.changes) if options.settings is None else read_settings(options.settings)
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the first process speaks for all
    return settings


def audit(options):
    """Prints the audit of the training rows; writes nothing."""
    from .data import load_splits
    from .run import audit as room
    from .tokenizer import load_tokenizer

    settings = load_settings(**options.changes)
    splits = load_splits(settings)
    print(room.audit(splits, load_tokenizer(settings.model, settings.model_revision), settings))


def preflight(options):
    """Checks, audit, three timed steps and a forecast; keeps nothing."""
    from .run.preflight import preflight

    preflight(load_settings(**options.changes))


def train(options):
    """Trains and saves the adapter, in one process or as one of those that torchrun started."""
    from .run.resume import run_training

    trainer = run_training(_settings(options))
    _end(trainer)


def evaluate(options):
    """Measures base and fine-tuned model, in one process or as one of those that torchrun started."""
    from .evaluation.measure import run_evaluation

    run_evaluation(_settings(options))


def _end(kept):
    """Ends a process of torchrun without taking `kept` apart, whose process group would wait for a thread that waits for it."""
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def demo(options):
    """Executes the notebooks in order, showing their output as it comes, and keeps them with their outputs."""
    import papermill
    from jupyter_client import AsyncKernelManager
    from nbclient.exceptions import DeadKernelError

    settings = load_settings()
    source = Path(__file__).parent.parent / "notebooks"
    if not source.is_dir():
        raise MedcotError(f"{source} not found: run the demo from a clone of the project")
    folder = settings.output_dir / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for name in NOTEBOOKS:
        print(f"\n=== {name} ===", flush=True)
        os.environ["WANDB_NOTEBOOK_NAME"] = f"{name}.ipynb"
        try:
            with tempfile.TemporaryDirectory() as sockets:
                # Messages travel over files, not over TCP ports, in a folder whose name is short enough for a socket.
                kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
                papermill.execute_notebook(
                    source / f"{name}.ipynb", folder / f"{name}.ipynb", kernel_name="python3", cwd=os.getcwd(), km=kernel,
                    progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stdout, coalesce_streams=True,
                )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            raise MedcotError(f"{name}.ipynb stopped: {error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            raise MedcotError(
                f"{name}.ipynb stopped: its kernel died, perhaps for lack of memory: run the command again, it goes on"
            ) from error
    _conclude(settings, folder, (time.monotonic() - started) / 60)


def _conclude(settings, notebooks: Path, minutes: float):
    """The comparison in short, and where everything is."""
    import nbformat

    for cell in nbformat.read(notebooks / f"{NOTEBOOKS[-1]}.ipynb", as_version=4).cells:
        if cell.source.endswith("\ncomparison"):  # shown in the notebook as a table
            print("", *(output.data["text/plain"] for output in cell.outputs if "data" in output), sep="\n")
    print(f"\n=== done in {minutes:.1f} minutes ===")
    for what, path in (
        ("notebooks with their outputs", notebooks),
        ("figures", settings.output_dir / "figures"),
        ("adapter", settings.adapter_dir),
        ("run card", settings.output_dir / "RUN.md"),
    ):
        print(f"{what:<30}{path}")
    print(NOTICE)
