"""What was trained, in the forms that other programs read, each compared with the adapter before it is kept."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..settings import NOTICE, MedcotError, on_kaggle
from ..tokenizer import load_tokenizer
from .publish import size

KINDS = ("adapter", "merged", "gguf", "ollama")
GIB = 2**30
# Left free where a Kaggle session still writes: checkpoints, answers, notebooks.
_KEPT_FREE = 4 * GIB


@dataclass(frozen=True)
class Export:
    """One export on its way: what, of which weights, with which tokenizer, to which folder."""

    kind: str
    type: str
    """Of a GGUF: "f16" or "q8_0"."""
    weights: object
    """`merged.MergedWeights`"""
    tokenizer: object
    settings: object

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"gguf-{self.type}" if self.kind == "gguf" else self.kind

    @property
    def file(self) -> str:
        """Of the GGUF."""
        return f"model-{self.type}.gguf"

    @property
    def bytes(self) -> int:
        """What it will take on disk."""
        from .gguf import gguf_bytes

        if self.kind == "adapter":
            return sum(file.stat().st_size for file in self.weights.adapter.iterdir()) + 2**20
        size = self.weights.bytes if self.kind == "merged" else gguf_bytes(self.weights, self.type)
        return size + 32 * 2**20  # the tokenizer


def export(settings, kind: str, type: str = "q8_0", to: Path | None = None) -> Path:
    """Writes one export, compares it with the adapter on ten prompts, keeps it if it agrees; returns its folder.

    `kind`: "adapter" (the six files and a card), "merged" (16-bit safetensors), "gguf" (`type` "f16" or "q8_0") or "ollama"
    (a GGUF and a Modelfile). `to` is the folder it is made in, by default `export/` in the output folder, or the session's
    scratch disk where that is too small. Raises MedcotError before anything is written if disk or memory do not suffice.
    """
    from . import parity
    from .merged import MergedWeights, base_folder

    if kind not in KINDS:
        raise MedcotError(f"export {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    adapter = settings.adapter_dir
    if not (adapter / "adapter_model.safetensors").is_file():
        raise MedcotError(
            f"no adapter_model.safetensors in {adapter}: run 02_finetune.ipynb with the same profile first"
        )
    parity.quiet()
    weights = MergedWeights(base_folder(settings, adapter), adapter)
    made = Export(kind, type, weights, load_tokenizer(str(adapter)), settings)
    folder = _place(made, to) / made.name
    _check_memory(parity.reading_bytes(weights))
    print(f"export {made.name}: {size(made.bytes)} to {folder}; {_origin(made)}")
    with _beside(folder) as fresh:
        _write(made, fresh)
        rows = _compare(made, fresh, folder)
        facts = {
            "export": made.name,
            "adapter_sha256": _digest(adapter),
            "base": _base_name(made),
            "origin": _origin(made),
        }
        text = parity.text_agrees(fresh / made.file, made.tokenizer, settings) if _is_gguf(made) else True
        parity.write_parity(rows, fresh, facts | {"text_agrees": text})
        (fresh / "README.md").write_text(_card(made, rows, text), encoding="utf-8")
    print(parity.table(rows))
    print(_said_of_text(made, text) + f"Kept in {folder}. {NOTICE}")
    return folder


def _is_gguf(made: Export) -> bool:
    return made.kind in ("gguf", "ollama")


def _place(made: Export, to: Path | None) -> Path:
    """The folder that exports are made in: `to`, or the output folder, or scratch where it is too small for both."""
    wished = Path(to) if to else made.settings.output_dir / "export"
    kept = _KEPT_FREE if on_kaggle() and not to else 0
    if _free(wished) >= made.bytes + kept:
        return wished
    scratch = Path(tempfile.gettempdir()) / "medcot-export"
    if to or _free(scratch) < made.bytes:
        places = [wished] if to else [wished, scratch]
        free = " and ".join(f"{_free(place) / GIB:.1f} GiB are free at {place}" for place in places)
        smaller = ", take --type q8_0 (about half of it)" if made.kind != "adapter" and made.type == "f16" else ""
        raise MedcotError(
            f"export {made.name} takes {made.bytes / GIB:.1f} GiB and {free}, so it was not begun: delete what is not needed "
            f"there{smaller} or name another disk with --to"
        )
    print(
        f"{wished} has {_free(wished) / GIB:.1f} GiB free, too little for {made.bytes / GIB:.1f}: the export goes to {scratch}, "
        "which is emptied when this session ends; medcot publish --folder takes it from there"
    )
    return scratch


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _check_memory(needed: int):
    import psutil
    import torch

    free = psutil.virtual_memory().available
    free += sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if free < needed:
        raise MedcotError(
            f"comparing the export takes about {needed / GIB:.1f} GiB of memory and {free / GIB:.1f} are free, so it was not "
            "begun: end other notebooks (restart the kernel that holds a model), or use a session with more memory"
        )


@contextlib.contextmanager
def _beside(folder: Path):
    """A fresh folder beside `folder` that takes its place when all went well, and is removed when not."""
    fresh, old = (folder.with_name(folder.name + ending) for ending in (".writing", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(made: Export, folder: Path):
    from .gguf import modelfile, write_gguf
    from .merged import copy_tokenizer, write_config, write_merged

    if made.kind == "merged":
        write_merged(made.weights, folder)
    elif made.kind == "adapter":
        for file in sorted(made.weights.adapter.iterdir()):
            if file.is_file():
                shutil.copy(file, folder)
    else:
        write_gguf(made.weights, made.type, folder / made.file)
        write_config(made.weights, folder)  # transformers reads rope_freqs from nowhere else
        copy_tokenizer(made.weights.adapter, folder)
    if made.kind == "ollama":
        text = modelfile(made.file, made.settings, made.tokenizer.eos_token)
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def _compare(made: Export, fresh: Path, folder: Path) -> list:
    from .parity import bound, load_gguf, load_merged, load_reference, read

    weights, settings = made.weights, made.settings
    name, allowed = made.name, bound(weights, made.type if _is_gguf(made) else "16 bit")
    reference = read(lambda: load_reference(weights, settings), settings, made.tokenizer)
    if made.kind == "adapter":
        copied = type(weights)(weights.base, fresh)
        rows = [
            read(lambda: load_reference(copied, settings), settings, made.tokenizer).against(
                reference, "adapter, copied", 0.0
            )
        ]
    elif made.kind == "merged":
        rows = [
            read(lambda: load_merged(fresh, weights, settings), settings, made.tokenizer).against(
                reference, name, allowed
            )
        ]
    else:
        read_back = read(lambda: load_gguf(fresh / made.file, fresh, weights, settings), settings, made.tokenizer)
        rows = [read_back.against(reference, f"{name} ({made.type}, by transformers)", allowed)]
        merged = folder.parent / "merged"
        if _same_adapter(merged, weights.adapter):
            found = read(lambda: load_merged(merged, weights, settings), settings, made.tokenizer)
            rows.insert(0, found.against(reference, "merged", bound(weights, "16 bit")))
    if settings.load_in_4bit and not weights.four_bit:
        trained = read(lambda: load_reference(weights, settings, four_bit=True), settings, made.tokenizer)
        rows.append(trained.against(reference, "adapter on the base in 4 bits, as trained", None))
    return rows


def _digest(adapter: Path) -> str:
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_adapter(merged: Path, adapter: Path) -> bool:
    try:
        return json.loads((merged / "parity.json").read_text(encoding="utf-8"))["adapter_sha256"] == _digest(adapter)
    except (OSError, ValueError, KeyError):
        return False


def _said_of_text(made: Export, text: bool) -> str:
    if not _is_gguf(made):
        return ""
    if text:
        return "Text read by the file's own vocabulary gives the adapter's tokens. "
    return (
        "Readers of GGUF have no name for how this tokenizer cuts text into words, so they read it otherwise and answer worse than "
        "measured: right for token ids only (the embedded model is such a one, the R1 Llamas are not). "
    )


def _card(made: Export, rows: list, text: bool) -> str:
    from .parity import table

    use = {
        "adapter": "`peft.PeftModel.from_pretrained(base, this_folder)`, on the base named above.",
        "merged": "`transformers.AutoModelForCausalLM.from_pretrained(this_folder)`; the tokenizer is here too.",
        "gguf": f"`llama-cli -m {made.file}`, or any other reader of GGUF; the prompt is the project's (`medcot.format_prompt`).",
        "ollama": "`ollama create medcot -f Modelfile`, then `ollama run medcot`.",
    }[made.kind]
    own = (
        f"# {made.weights.adapter.name}, {made.name}\n\n{NOTICE}\n\nBase: {_base_name(made)}; "
        f"{_origin(made)}.\n\nUse: {use}\n\n## Compared with the adapter\n\nTen fixed prompts, read by stock transformers; "
        f"the adapter beside the same base is the reference.\n\n{table(rows)}\n"
        + (f"\n{_said_of_text(made, text).rstrip()}\n" if _is_gguf(made) else "")
    )
    return _with_run_card(made, own)


def _origin(made: Export) -> str:
    """In words, what became of the base."""
    return "it stays apart" if made.kind == "adapter" else f"the update is added to {made.weights.origin}"


def _base_name(made: Export) -> str:
    """The base's name on the hub, without folders of this machine."""
    from ..settings import EMBEDDED_MODEL

    if made.settings.model == EMBEDDED_MODEL:
        return "the embedded model"
    return Path(made.settings.model).name if Path(made.settings.model).exists() else made.settings.model


def _with_run_card(made: Export, own: str) -> str:
    """The export's page before the run card, under the run card's front matter, which the hub reads."""
    from huggingface_hub import ModelCard

    card = made.weights.adapter / "README.md"
    run = card.read_text(encoding="utf-8") if card.is_file() else ""
    if NOTICE not in run:  # the form that peft leaves, which 03_compare replaces
        return own
    run = ModelCard(run, ignore_metadata_errors=True)
    run.data.library_name = {"adapter": "peft", "merged": "transformers"}.get(made.kind, "gguf")
    return f"---\n{run.data.to_yaml()}\n---\n\n{own}\n{run.text.lstrip()}"


def add_commands(commands):
    """Adds `export` and `publish` to the sub-parsers of the command line."""
    from .gguf import KINDS as TYPES

    words = "write the fine-tuned model for other programs, compared with the adapter before it is kept"
    command = commands.add_parser("export", help=words, description=words)
    command.add_argument(
        "kind", choices=KINDS, help="adapter, merged (16-bit safetensors), gguf, or ollama (GGUF and Modelfile)"
    )
    command.add_argument(
        "--type", choices=TYPES, default="q8_0", help="of a GGUF: f16, or q8_0 (about half of it, the default)"
    )
    command.add_argument("--to", type=Path, help="folder to make it in; by default export/ in the output folder")
    command.add_argument("--out", type=Path, help="output folder of the run, as MEDCOT_OUT")
    command.set_defaults(run=_run_export)
    words = "upload the adapter and its run card to the Hugging Face hub: private, and asked before"
    command = commands.add_parser("publish", help=words, description=words)
    command.add_argument("name", metavar="OWNER/NAME", help="the repository")
    command.add_argument("--public", action="store_true", help="everybody may see it")
    command.add_argument("--yes", action="store_true", help="upload without asking")
    command.add_argument("--folder", type=Path, help="an export's folder, in place of the adapter's")
    command.add_argument("--out", type=Path, help="output folder of the run, as MEDCOT_OUT")
    command.set_defaults(run=_run_publish)


def _run_export(options):
    from ..profiles import load_run

    export(load_run(output_dir=options.out), options.kind, options.type, options.to)


def _run_publish(options):
    from ..profiles import load_run
    from .publish import publish

    publish(
        options.folder or load_run(output_dir=options.out).adapter_dir,
        options.name,
        public=options.public,
        yes=options.yes,
    )
