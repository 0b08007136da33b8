"""What comes home: whole, of one version, and only where it belongs."""

import json

import pytest
from kaggle_server import DONE
from kaggle_tree import REF

from medcot.kaggle import client
from medcot.kaggle.pull import is_inside, pull
from medcot.kaggle.stage import stage
from medcot.settings import ADAPTER_FOLDER, MedcotError

pytest_plugins = ("kaggle_fixtures",)

ADAPTER = f"{ADAPTER_FOLDER}/adapter_model.safetensors"


def session(server, tree, version=1, notebooks=DONE, outcome="COMPLETE", **files):
    """A session of this tree that has ended and has left these files."""
    kernel, stamp = server.kernel(REF), stage(tree, "anna")[0].stamp(version - 1)
    kernel.version, kernel.polls, kernel.request, kernel.outcome, kernel.ending = (
        version,
        9,
        {"text": stamp},
        outcome,
        {},
    )
    kernel.files = {name.replace("__", "/"): data for name, data in files.items()} | {
        "__output__.json": b"{}", "session.json": json.dumps({"stamp": stamp, "notebooks": notebooks}).encode()
    }  # fmt: skip
    return kernel


def test_pull_brings_a_session_home_once(tree, server, fresh_process, capsys):
    kernel = session(server, tree, measured__a=b"answers", checkpoints__c=b"large", **{"RUN.md": b"card"})
    kernel.files[ADAPTER] = b"x" * 3_000_000
    server.cut_files[ADAPTER] = 1_000_000
    folder = pull(tree, "anna")
    assert folder.parent == tree / "outputs" / "kaggle" and folder.name.startswith("version-1-")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"measured/a", "RUN.md", ADAPTER, "session.json", "session.log"}, (
        "no checkpoints, nothing of Kaggle's"
    )
    assert (folder / ADAPTER).read_bytes() == b"x" * 3_000_000
    assert (folder / "session.log").read_text() == "line of a log\n"
    assert f"run card  {folder / 'RUN.md'}" in capsys.readouterr().out
    before = len(server.downloads)
    pull(tree, "anna")
    assert server.downloads[before:] == ["session.json"], "what is there is not fetched again"
    assert "0 files fetched, 4 were there already" in capsys.readouterr().out
    pull(tree, "anna", checkpoints=True)
    assert (folder / "checkpoints" / "c").read_bytes() == b"large", "when asked for"


def test_two_versions_never_mix(tree, server, capsys):
    """A finished version, then one that stopped in 02: no new adapter beside an old card, nor the other way round."""
    session(server, tree, **{"RUN.md": b"first"}).files[ADAPTER] = b"first"
    first = pull(tree, "anna")
    stopped = {"01_baseline": "done", "02_finetune": "stopped with status 1"}
    session(server, tree, 2, stopped, measured__a=b"a").files[ADAPTER] = b"half"
    capsys.readouterr()
    second = pull(tree, "anna")
    printed = capsys.readouterr().out
    assert first != second and (first / ADAPTER).read_bytes() == (first / "RUN.md").read_bytes() == b"first"
    assert not (second / "RUN.md").exists() and "run card" not in printed
    assert "not finished (01_baseline: done; 02_finetune: stopped with status 1)" in printed


def test_a_kernel_made_anew_under_the_same_number_is_another(tree, server):
    session(server, tree, **{"RUN.md": b"first"})
    first = pull(tree, "anna")
    notebook = tree / "notebooks" / "01_baseline.ipynb"
    notebook.write_text(notebook.read_text().replace("1 of 3", "one of 3"))
    session(server, tree, **{"RUN.md": b"other"})
    assert (pull(tree, "anna") / "RUN.md").read_bytes() == b"other" and (first / "RUN.md").read_bytes() == b"first"


def test_files_of_the_session_before_are_not_taken_for_this_ones(tree, server):
    kernel = session(server, tree, **{"RUN.md": b"old"})
    kernel.version, kernel.request = 2, {"text": stage(tree, "anna")[0].stamp(1)}
    with pytest.raises(MedcotError, match="still lists the files of an earlier session, not those of version 2"):
        pull(tree, "anna")
    assert not (tree / "outputs").exists()


def test_a_running_session_has_nothing_to_fetch(tree, server):
    session(server, tree).lasts = 99
    with pytest.raises(MedcotError, match="version 1 of anna/medcot-session is running: nothing to fetch yet"):
        pull(tree, "anna")


def test_a_broken_off_pull_leaves_no_half_file_and_is_resumed(tree, server, monkeypatch):
    session(server, tree, adapter=b"z" * 500_000, zeta=b"last")
    monkeypatch.setattr(client, "PAUSES", ())
    server.cut_files["adapter"] = 200_000
    with pytest.raises(MedcotError, match=r"adapter could not be fetched .*call pull again"):
        pull(tree, "anna")
    [folder] = (tree / "outputs" / "kaggle").iterdir()
    assert not (folder / "adapter").exists()
    pull(tree, "anna")
    assert (folder / "adapter").read_bytes() == b"z" * 500_000 and not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/cron.d/x",
        "a/../../x",
        "..\\x",
        "C:x",
        "link/x",
        "x\0",
        "",
        ".",
        "./x",
        "a/.",
        "a//b",
        "a/",
        "..",
    ],
)
def test_names_that_lead_elsewhere_are_known(tmp_path, name):
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    assert not is_inside(folder, name)
    assert is_inside(folder, "measured/baseline-1.jsonl")


@pytest.mark.parametrize("name", ["../outside", "."])
def test_pull_refuses_names_that_lead_elsewhere(tree, server, name):
    session(server, tree, good=b"good").files[name] = b"evil"
    with pytest.raises(MedcotError, match="files would not land in"):
        pull(tree, "anna")
    assert server.downloads == ["session.json"]


def test_a_write_error_ends_in_one_line(tree, server, monkeypatch):
    session(server, tree, a=b"1", a__b=b"2")  # a file where a folder has to be
    with pytest.raises(MedcotError, match=r"cannot be written .*: make room or clear it, then call pull again"):
        pull(tree, "anna")


@pytest.mark.parametrize("record", [b"{", b"[]", b"\xff", b'{"notebooks": 5}'])
def test_a_broken_record_of_the_session_is_none(tree, server, record, capsys):
    session(server, tree, measured__a=b"a").files["session.json"] = record
    pull(tree, "anna")
    assert "not finished (it left no record of itself)" in capsys.readouterr().out


def test_nothing_is_fetched_without_a_push(tree, server):
    with pytest.raises(MedcotError, match="Kaggle refused look of anna/medcot-session"):
        pull(tree, "anna")
