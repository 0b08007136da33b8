"""What a model has answered or scored, kept line by line: a killed session loses one batch and no more."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from .. import identity
from ..files import check_disk, only_process
from ..settings import MedcotError

BASELINE, FINETUNED = "baseline", "finetuned"


def kept(settings, model, part: str, texts, fields: dict) -> "Kept":
    """The file of one part of what a model is measured by; its name holds a hash of all that made it.

    `part` names what is asked ("answers", "choices"), `texts` are the tokens that the model gets, by row, and `fields` the
    names and types of an entry beside its `row`.
    """
    adapter = identity.adapter_id(model)
    name = BASELINE if adapter == "base" else FINETUNED
    parts = identity.of_settings(settings, identity.MEASURING) | {
        "base model": identity.base_id(settings, model),
        "adapter": adapter,
        "texts": hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest(),
    }
    title = f"{name}-{part.replace(' ', '-')}"
    path = settings.output_dir / identity.MEASURED / f"{title}-{identity.hash_of(parts)[:8]}.jsonl"
    return Kept(path, {"measured": f"{name}, {part}", "identity": parts}, {"row": int} | fields, frozenset(texts))


class Kept:
    """A JSON-lines file: a header that says what made the entries, then one entry a row in the order they were made."""

    def __init__(self, path: Path, header: dict, fields: dict, rows: frozenset):
        self.path, self.header, self.fields, self.rows = path, header, fields, rows

    @property
    def name(self) -> str:
        """ "baseline" or "finetuned"."""
        return self.header["measured"].partition(",")[0]

    def read(self) -> dict[int, dict]:
        """The entries by row; empty without a file. A last line that a kill has torn does not count.

        Raises MedcotError naming file and line for any other line that is no entry, and leaves the file as it is.
        """
        if not self.path.is_file():
            return {}
        *lines, _ = self.path.read_bytes().split(b"\n")
        entries = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                self._refuse(number, f"not a JSON object ({error})")
            if number == 1:
                if entry != self.header:
                    self._refuse(number, f"differs in {self._odd(entry)}")
                continue
            there = entry if isinstance(entry, dict) else {}
            if lacking := [name for name, kind in self.fields.items() if not isinstance(there.get(name), kind)]:
                self._refuse(number, f"lacks {', '.join(lacking)}")
            if entry["row"] not in self.rows:
                self._refuse(number, f"is about row {entry['row']}, which was not asked")
            entries[entry["row"]] = entry
        return entries

    def _refuse(self, number: int, why: str):
        raise MedcotError(f"{self.path}, line {number}: {why}: delete the file to start again")

    def _odd(self, header) -> str:
        there = header.get("identity") if isinstance(header, dict) else None
        return (
            ", ".join(identity.differences(there if isinstance(there, dict) else {}, self.header["identity"]))
            or "its header"
        )

    def fill(self, batches: list[list[int]], make, unit: str) -> dict[int, dict]:
        """All entries; those of batches that are not whole are made by `make(batch)` and written at once.

        Where torchrun started several processes, each makes every so many-th batch and the first one writes them all, in
        the order in which a single process writes them.
        """
        rank, processes = process()
        with only_process(self.path.parent) if rank == 0 else contextlib.nullcontext():
            entries = self.read()
            # A batch of which some entries are missing is made again whole: composition can tip a greedy choice.
            todo = [batch for batch in batches if not entries.keys() >= set(batch)]
            self._agree(todo)
            if todo:
                check_disk(self.path, 16 * 2**20)
                with self._bar(batches, todo, unit) as bar:
                    for first in range(0, len(todo), processes):
                        turn = todo[first : first + processes]
                        made = gather(list(make(turn[rank])) if rank < len(turn) else [])
                        if rank == 0:
                            self._append(made)
                        entries |= {entry["row"]: entry for entry in made}
                        bar.update(len(made))
        return entries

    def _agree(self, todo):
        """Raises MedcotError if the processes do not have the same batches of the same file to do."""
        seen = gather([(self.path.name, todo)])
        if any(other != seen[0] for other in seen):
            raise MedcotError(
                f"the processes see different files at {self.path.parent}: MEDCOT_OUT must be a folder they all share, "
                "with the same adapter"
            )

    def _bar(self, batches, todo, unit: str):
        from tqdm import tqdm  # as text, which also a batch log and a terminal show; on stdout, as stderr is red

        rows = sum(map(len, batches))
        return tqdm(total=rows, initial=rows - sum(map(len, todo)), unit=unit, desc=self.header["measured"],
                    file=sys.stdout, disable=process()[0] > 0)  # fmt: skip

    def _append(self, entries: list[dict]):
        if self.path.is_file():  # a torn last line is made anew
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        with self.path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(self.header) + "\n")
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def process() -> tuple[int, int]:
    """(number of this process, number of processes) among those that share the evaluation.

    From torch and not from accelerate, which counts one process on a CPU wherever no trainer has told it otherwise.
    """
    import torch

    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)


def gather(entries: list) -> list:
    """The entries of all processes, in their order."""
    import torch

    _, processes = process()
    if processes == 1:
        return entries
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, entries)
    return [entry for part in parts for entry in part]
