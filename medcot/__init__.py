"""medcot: fine-tune a reasoning model on medical chains of thought, and measure what that did."""

from .data import audit, load_splits, show_example, to_examples
from .evaluation import compare
from .inference import baseline_status, generate_answers, load_baseline
from .modeling import add_lora, load_model, load_tokenizer, save_adapter
from .preflight import check_machine
from .prompts import format_example, format_prompt, parse_completion
from .report import browse, plot_comparison, plot_token_counts, write_run_card
from .settings import PROFILES, MedcotError, Settings, load_settings
from .training import make_trainer, train, train_on_all_gpus

__all__ = [
    "PROFILES", "MedcotError", "Settings", "add_lora", "audit", "baseline_status", "browse", "check_machine", "compare", "format_example", "format_prompt",
    "generate_answers", "load_baseline", "load_model", "load_settings", "load_splits", "load_tokenizer", "make_trainer",
    "parse_completion", "plot_comparison", "plot_token_counts", "save_adapter", "show_example", "to_examples", "train", "train_on_all_gpus",
    "write_run_card",
]  # fmt: skip
__version__ = "0.1.0"
