"""Standard benchmarks by lm-evaluation-harness, as a judge from outside."""

import json
from pathlib import Path

from ..run.kept import BASELINE, FINETUNED
from ..run.processes import run_shown
from ..settings import MedcotError


def run_harness(settings, tasks: list[str], adapter: Path | None = None, include_path: Path | None = None, limit=None):
    """Standard benchmarks through lm-evaluation-harness, in a process of its own; returns its results by task.

    `tasks` are its names, for example medqa_4options, medmcqa, pubmedqa, mmlu_anatomy, mmlu_clinical_knowledge,
    mmlu_college_medicine, mmlu_medical_genetics, mmlu_professional_medicine; `include_path` adds a folder of task
    files. With `adapter` (`settings.adapter_dir`) the fine-tuned model is measured, without it the base, both as the
    base's files are: of the 8B that is the 4-bit copy which the adapter was trained on; files that `load_model` would
    quantise are not quantised here. A process of its own, because the harness wants stock transformers and this one has
    been patched by unsloth; what it prints is shown. Raises MedcotError if the optional extra is missing
    (`pip install medcot[harness]`) or the harness fails.
    """
    import importlib.util
    import sys

    if importlib.util.find_spec("lm_eval") is None:
        raise MedcotError("lm_eval is not installed: pip install 'medcot[harness]'")
    # The adapter's config names the base that it was trained on, on a GPU the copy in 4 bits that unsloth took for it; the
    # adapter folder's tokenizer is written to be read without damage, which the base's own may not be (load_tokenizer).
    folder = Path(adapter or settings.adapter_dir)
    config = folder / "adapter_config.json"
    trained = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    arguments = {"pretrained": trained.get("base_model_name_or_path") or settings.model}
    arguments["dtype"] = settings.dtype if settings.device == "cuda" else "float32"
    arguments |= {"revision": settings.model_revision} if settings.model_revision else {}
    arguments |= {"tokenizer": folder} if trained else {}
    arguments |= {"peft": adapter} if adapter else {}
    output = settings.output_dir / "harness" / (FINETUNED if adapter else BASELINE)
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", settings.device, "--batch_size", "8"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", ",".join(tasks), "--output_path", str(output / "results.json")]
    command += ["--include_path", str(include_path)] if include_path else []
    command += ["--limit", str(limit)] if limit else []
    status, last = run_shown(command)
    if status:
        reason = (last.strip().splitlines() or ["no message"])[-1]
        raise MedcotError(f"lm_eval stopped ({reason[:300]}); the command was: {' '.join(command)}")
    newest = max(output.glob("**/results*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))["results"]
