"""What two models did on the same questions, and what may be concluded from it. README.md here says how to read it."""

from .browse import browse
from .card import write_run_card
from .compare import compare
from .figures import plot_comparison
from .grading import extract_choice
from .harness import run_harness
from .leaks import check_leaks
from .measure import evaluate, evaluate_on_all_gpus
from .questions import load_choices

__all__ = [
    "browse", "check_leaks", "compare", "evaluate", "evaluate_on_all_gpus", "extract_choice", "load_choices",
    "plot_comparison", "run_harness", "write_run_card",
]  # fmt: skip
