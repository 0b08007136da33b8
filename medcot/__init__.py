"""medcot: fine-tune a reasoning model on medical chains of thought, and measure what that did."""

from .data import audit, load_splits, show_example, to_examples
from .evaluation import check_leaks, compare, load_choices
from .inference import baseline_status, evaluate, evaluate_on_all_gpus, generate_answers, load_baseline, run_harness
from .modeling import add_lora, load_model, load_tokenizer, save_adapter
from .preflight import check_machine
from .prompts import format_example, format_prompt, parse_completion
from .report import (
    browse,
    plot_comparison,
    plot_families,
    plot_token_counts,
    show_examples,
    show_forgotten,
    show_showcase,
    write_run_card,
)
from .settings import PROFILES, MedcotError, Settings, load_settings
from .training import make_trainer, train, train_on_all_gpus

__all__ = [
    "PROFILES", "MedcotError", "Settings", "add_lora", "audit", "baseline_status", "browse", "check_leaks", "check_machine", "compare",
    "evaluate", "evaluate_on_all_gpus", "format_example", "format_prompt", "generate_answers", "load_baseline", "load_choices", "load_model",
    "load_settings", "load_splits", "load_tokenizer", "make_trainer", "parse_completion", "plot_comparison",
    "plot_families", "plot_token_counts", "run_harness", "save_adapter", "show_example", "show_examples",
    "show_forgotten", "show_showcase", "to_examples", "train", "train_on_all_gpus", "write_run_card",
]  # fmt: skip
__version__ = "0.1.0"
