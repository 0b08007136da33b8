import os
from dataclasses import replace
from pathlib import Path

import pytest

from medcot.environment import VARIABLES
from medcot.profiles import PROFILES
from medcot.settings import EMBEDDED_MODEL

# No test may reach a hub or wandb, whatever the machine has.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.pop("WANDB_API_KEY", None)
# Where it is set, each of the many processes that tests start would compile medcot anew, a third of a second each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for variable in VARIABLES.keys() - {"MEDCOT_REAL_ROWS"}:
    os.environ.pop(variable, None)

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def settings(tmp_path):
    """The smoke profile with its files under the test's own folder."""
    return replace(PROFILES["smoke"], output_dir=tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    from medcot.tokenizer import load_tokenizer

    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One real training run of 12 steps, shared: settings, model, tokenizer, trainer, the weights before, and the adapter."""
    from types import SimpleNamespace

    from medcot import add_lora, load_model, load_splits, make_trainer, save_adapter, to_examples, train

    settings = replace(
        PROFILES["smoke"], output_dir=tmp_path_factory.mktemp("trained"), max_steps=12, learning_rate=2e-3, eval_steps=6
    )
    splits = load_splits(settings)
    model, tokenizer = load_model(settings)
    model = add_lora(model, settings)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(
        model,
        tokenizer,
        to_examples(splits.train, tokenizer, settings, show=False),
        settings,
        to_examples(splits.eval.select(range(4)), tokenizer, settings, show=False),
    )
    train(trainer, settings)
    save_adapter(model, tokenizer, settings)
    return SimpleNamespace(
        settings=settings, splits=splits, model=model, tokenizer=tokenizer, trainer=trainer, before=before
    )


@pytest.fixture(scope="session")
def workshop():
    """A process that has loaded the small model and forks a child for each job: shared by the files that one worker runs."""
    from workshop import Workshop

    shop = Workshop()
    yield shop
    shop.close()


RUN = {"save_steps": 1, "learning_rate": 2e-3, "report_to": "none", "train_rows": 40}


def job(settings, stop_after=None):
    """02_finetune in short, in this process; with `stop_after` it is interrupted after so many steps. Returns the trainer."""
    from medcot.run.resume import run_training

    return run_training(settings, stop_after)


# In this order, then the rest: what takes longest begins first, so that all workers end at about the same time.
LONGEST = ("distributed", "kaggle_run", "reliability", "notebooks", "hub", "measure", "export", "whole_dataset")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
