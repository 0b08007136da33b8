"""What the tests of the Kaggle part share: names, and edits of a clone's metadata."""

import json
from pathlib import Path

from medcot.kaggle.metadata import METADATA_FILE

REPOSITORY = Path(__file__).parent.parent
REF = "anna/medcot-session"
KEY = "not-a-real-key-4711"


def change(root, edit):
    """Edits the metadata of a tree in place."""
    path = root / METADATA_FILE
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))


def put(path, value):
    """An edit that sets one value of the metadata, addressed as "notebooks.0"."""

    def edit(metadata):
        *steps, last = path.split(".")
        for step in steps:
            metadata = metadata[int(step) if step.isdigit() else step]
        metadata[int(last) if last.isdigit() else last] = value

    return edit
