"""medcot: fine-tune a reasoning model on medical chains of thought, and measure what that did."""

from .data import load_splits, show_example, to_examples
from .model import add_lora, load_model, save_adapter
from .prompts import format_example, format_prompt, parse_completion
from .run.answers import generate_answers
from .run.audit import audit
from .run.preflight import check_machine
from .run.resume import train, train_on_all_gpus
from .settings import PROFILES, MedcotError, Settings, load_settings
from .tokenizer import load_tokenizer
from .training import make_trainer

__version__ = "0.1.0"
