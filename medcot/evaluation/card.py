"""The run card `RUN.md`, the model card, and `comparison.json`: what a run recorded, nothing by hand."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

from ..files import write_beside
from ..identity import RECORD_FILE
from ..settings import EMBEDDED_CASES, EMBEDDED_MODEL, NOTICE, MedcotError
from . import words
from .statistics import FAMILY, LEVEL, POWER, SECONDARY

SCHEMA_VERSION = 2


def write_run_card(comparison, settings, splits, questions=None) -> Path:
    """Writes `RUN.md` and `comparison.json` from what the run recorded, nothing by hand, and returns the card's path.

    The same text with Hugging Face front matter becomes `README.md` of the adapter folder, its model card. Raises
    MedcotError if 02_finetune has left no `training.json` or one that cannot be read.
    """
    path = settings.output_dir / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedcotError(
            f"{path} cannot be read ({error}): run 02_finetune.ipynb with the same profile first"
        ) from error
    write_comparison(comparison, settings, splits, questions)
    card = _run_card(comparison, settings, splits, questions, record)
    path = settings.output_dir / "RUN.md"
    write_beside(path, card)
    if settings.adapter_dir.is_dir():
        write_beside(settings.adapter_dir / "README.md", _front_matter(settings, splits) + card)
    print(f"in {words.short(settings.output_dir)}: RUN.md, comparison.json (all numbers); model card with the adapter")
    return path


def write_comparison(comparison, settings, splits, questions=None) -> Path:
    """Writes `comparison.json` in the output folder and returns its path.

    Its first key is `headline`, the answer in one sentence; `beside` and `notes` are the sentences after it. Then come
    what was compared, and the fields of `Comparison` under their own names: the dataclasses (`Measure`, `Pair`, `Side`,
    `Choice`, `Showcase`, `LeftOut`, `Outcome`, `Leaks`) are the schema, whose number is `schema_version`; a field is only
    ever added under the same number. Each measure has its `sentence` beside its fields. Numbers that JSON cannot hold
    are null.
    """
    judged = [m for m in comparison.measures if m.group in (SECONDARY, FAMILY) and m.adjusted_p is not None]
    record = {
        "headline": words.headline(comparison), "beside": words.beside(comparison), "notes": words.notes(comparison),
        "schema_version": SCHEMA_VERSION, "notice": NOTICE, "profile": settings.profile, "model": _model_name(settings),
        "adapter": settings.adapter_dir.name, "level": LEVEL, "power": POWER, "secondary_measures": len(judged),
        "data": {
            "source": _source(splits.source), "revision": splits.revision, "sha256": splits.fingerprint,
            "training": len(splits.train), "evaluation": len(splits.eval),
        },
        "questions": questions and {
            "source": _source(questions.source), "revision": questions.revision, "sha256": questions.fingerprint,
            "n": len(questions),
        },
        **asdict(comparison),
        "forgotten": comparison.forgotten.to_dict("records"),
    }  # fmt: skip
    record["measures"] = [asdict(m) | {"sentence": words.sentence(m)} for m in comparison.measures]
    record["sources"] = {name: [Path(path).name for path in pair] for name, pair in comparison.sources.items()}
    path = settings.output_dir / "comparison.json"
    write_beside(path, json.dumps(_finite(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return path


def _finite(value):
    """`value` with every number that JSON cannot hold (nan, infinity) replaced by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _model_name(settings) -> str:
    return "the embedded model" if settings.model == EMBEDDED_MODEL else _source(settings.model)


def _source(name: str) -> str:
    """A name of the hub as it is, a path by its last part: where files lie on this machine is nobody's business."""
    return Path(name).name if Path(name).exists() else name


def _run_card(comparison, settings, splits, questions, record) -> str:
    splits = replace(splits, source=_source(splits.source))
    questions = questions and replace(questions, source=_source(questions.source))
    losses = [(entry["step"], entry["loss"]) for entry in record["log_history"] if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in record["log_history"] if "eval_loss" in entry]
    memory = (
        f"not measured ({record['device']})"
        if record["peak_memory_gib"] is None
        else f"{record['peak_memory_gib']:.2f} GiB"
    )
    forecast = _forecast(record["forecast"])
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    leaks = "not checked" if comparison.leaks is None else str(comparison.leaks).splitlines()[0]
    return f"""# Run card: profile {settings.profile}

**{words.headline(comparison)}.** {" ".join(words.beside(comparison))}

{" ".join(words.notes(comparison))}

{NOTICE}

| | |
| --- | --- |
| model | {_model_name(settings)}, revision {settings.model_revision or "not pinned"} |
| data | {splits} |
| data SHA-256 | {splits.fingerprint} |
| multiple choice | {questions or "not asked"} |
| leaks | {leaks} |
| examples a step | {record["examples_per_step"]} |
| steps, epochs | {record["steps"]}, {record["epochs"]:.2f} over {record["examples"]} examples |
| training | {record["seconds"]:.0f} s on {record["device"]} |
| peak memory | {memory} |
| forecast from its first steps | {forecast} |
| updates skipped | {record["skipped_updates"]}, as gradients were not finite |
| incidents | {"; ".join(record["notes"]) or "none"} |
| training loss | {losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at step {losses[-1][0]} |
| versions | Python {record["python"]}, {versions} |

## Loss

| step | {" | ".join(str(step) for step, _ in _thinned(losses))} |
| --- |{" --- |" * len(_thinned(losses))}
| training loss | {" | ".join(f"{loss:.4f}" for _, loss in _thinned(losses))} |

{"Held-out loss: " + ", ".join(f"{loss:.4f} at step {step}" for step, loss in held_out) + "." if held_out else ""}

## Before and after

```text
{words.as_lines(comparison)}
```

{_forgotten(comparison)}; they are listed in `comparison.json`, with every measure and every answer.
"""


def _forgotten(comparison) -> str:
    asked = list(comparison.forgotten["asked"])
    by_likelihood = asked.count("by likelihood")
    return f"{len(asked) - by_likelihood} answers in words and {by_likelihood} options picked by likelihood were right before and are wrong now"


def _forecast(found: dict | None) -> str:
    if found is None:
        return "none, the run was too short"
    memory = "" if found["peak_gib"] is None else f", {found['peak_gib']:.2f} GiB"
    return f"{60 * found['minutes']:.0f} s{memory}"


def _thinned(points, most: int = 10):
    """At most `most` points of a curve, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _front_matter(settings, splits) -> str:
    """The YAML that Hugging Face reads from a model card; local paths are left out, as they are no names of the hub."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=settings.model if _hub_name(settings.model) else None,
        datasets=[splits.source] if _hub_name(splits.source) else None,
        library_name="peft",
        # The adapter inherits the terms of its base and of its data; only the embedded ones are this project's own.
        license="apache-2.0" if settings.model == EMBEDDED_MODEL and splits.source == EMBEDDED_CASES else "other",
        tags=["lora", "medical", "chain-of-thought", "not-for-clinical-use"],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n"


def _hub_name(source: str) -> bool:
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    return named and not Path(source).exists() and not source.startswith((".", "~"))
