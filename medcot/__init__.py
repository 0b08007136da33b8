"""medcot: fine-tune a reasoning model on medical chains of thought, and measure what that did."""

from .asking import ask
from .chat import chat_widget
from .data import load_splits, show_example, to_examples
from .evaluation import (
    browse,
    check_leaks,
    compare,
    evaluate,
    evaluate_on_all_gpus,
    extract_choice,
    load_choices,
    plot_comparison,
    run_harness,
    write_run_card,
)
from .model import add_lora, load_model, save_adapter
from .profiles import PROFILES, load_settings
from .prompts import format_example, format_prompt, parse_completion
from .run.answers import generate_answers
from .run.audit import audit
from .run.preflight import check_machine
from .run.resume import train, train_on_all_gpus
from .settings import MedcotError, Settings
from .tokenizer import load_tokenizer
from .training import make_trainer

__all__ = [
    "PROFILES", "MedcotError", "Settings", "add_lora", "ask", "audit", "browse", "chat_widget", "check_leaks", "check_machine",
    "compare", "evaluate", "evaluate_on_all_gpus", "extract_choice", "format_example", "format_prompt", "generate_answers",
    "load_choices", "load_model", "load_settings", "load_splits", "load_tokenizer", "make_trainer", "parse_completion",
    "plot_comparison", "run_harness", "save_adapter", "show_example", "to_examples", "train", "train_on_all_gpus", "write_run_card",
]  # fmt: skip
__version__ = "0.1.0"
