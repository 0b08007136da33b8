"""Push, status and what they make of a server that lags, denies and loses: the unmodified client against a loopback Kaggle."""

import argparse
import base64
import json
import re
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import pytest
from kaggle_server import DONE
from kaggle_tree import KEY, REF, change, put

from medcot import kaggle
from medcot.kaggle import client
from medcot.kaggle import push as push_room
from medcot.kaggle import stage as stage_room
from medcot.kaggle.push import push, status
from medcot.settings import MedcotError

pytest_plugins = ("kaggle_fixtures",)

quick = partial(push, owner="anna", yes=True)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(push_room, "DENIED", (0.02, 0.04))


def finish(server, outcome="COMPLETE"):
    """Lets the session of the newest version end."""
    kernel = server.kernels[REF]
    kernel.polls, kernel.outcome, kernel.files = 99, outcome, kernel.ending or kernel.files


def verbs(server, verb):
    return [call for call in server.calls if call[0] == verb]


def test_one_push_runs_everything_and_is_made_once(tree, server, capsys):
    quick(tree)
    assert server.pushes() == [REF]
    request = server.kernels[REF].request
    assert request["isPrivate"] is True and request["machineShape"] == "NvidiaTeslaT4" and request["newTitle"]
    assert request["sessionTimeoutSeconds"] == 5 * 3600, "a limit goes with every push"
    assert not request.get("kernelDataSources")
    printed = capsys.readouterr().out
    assert f"https://www.kaggle.com/code/{REF} (private" in printed
    assert "about 2 hours, at most 5; 2.5 of 30 hours are used" in printed
    assert printed.count("a pushed notebook gets no Kaggle secrets") == 1
    assert printed.strip().splitlines()[-1].startswith("To stop it (it costs until it ends, 5 hours at most): https://")
    quick(tree)
    assert server.pushes() == [REF] and "already, nothing was pushed" in capsys.readouterr().out
    finish(server)
    quick(tree)
    assert server.pushes() == [REF] and "nothing left to push" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "denial"),
    [("GetKernelSessionStatus", 403), ("GetKernelSessionStatus", 404), ("GetKernel", 403), ("GetKernel", 401)],
)
def test_a_denied_poll_after_a_push_is_unknown_and_never_a_second_session(tree, server, verb, denial, monkeypatch):
    """A lag after the push, a rate limit, an expired login: the session runs all the while."""
    server.kernel(REF).lasts = 50
    quick(tree)
    slept = []
    monkeypatch.setattr(push_room, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    server.faults[verb] = [denial] * 3
    with pytest.raises(MedcotError, match="no credentials" if denial == 401 else "Kaggle does not say what became of"):
        quick(tree)
    assert slept == ([] if denial == 401 else [0.02, 0.04]), "with growing pauses"
    server.faults[verb] = [denial] * (denial != 401)
    quick(tree)
    assert server.pushes() == [REF]


def test_retry_after_is_honoured(tree, server, monkeypatch):
    slept = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=slept.append))
    server.faults["GetAcceleratorQuotaStatistics"] = [(429, 7), 500]
    quick(tree)
    assert slept == [7.0, 0.05], "once what the server asked for, then the second pause"


def test_right_after_a_push_an_old_end_is_doubted_and_yes_is_not_enough(tree, server, monkeypatch):
    kernel = server.kernel(REF)
    kernel.next_notebooks = {"01_baseline": "stopped"}
    quick(tree)
    finish(server)
    kernel.status_lag = 9
    quick(tree)
    with pytest.raises(MedcotError, match="not pushed: version 2, pushed 0 minutes ago, may not have begun"):
        monkeypatch.setattr("builtins.input", lambda _: "n")
        quick(tree)
    kernel.stale_status, kernel.stale_source = 0, 9
    kernel.polls = 0
    with pytest.raises(MedcotError, match=r"not pushed: a push of 0 minutes ago is not among what Kaggle shows"):
        kernel.polls = 99
        quick(tree)
    assert server.pushes() == [REF] * 2


def test_another_version_on_the_server_does_not_count_as_ours(tree, server):
    """Edited in the browser while it was waited for; and a session of another state that still runs."""
    kernel = server.kernel(REF)
    kernel.lasts = 3
    quick(tree)
    kernel.version, kernel.request = 2, {"text": "print('edited by hand')"}
    with pytest.raises(MedcotError, match=r"version 2 .*made from another state of this project, is running"):
        quick(tree)
    kernel.polls = 99
    kernel.files = {"session.json": json.dumps({"stamp": "other", "notebooks": DONE}).encode()}
    quick(tree)
    assert server.pushes() == [REF] * 2, "its end does not pass for ours"


def test_a_failed_session_is_pushed_again_with_its_own_output(tree, server, capsys):
    kernel = server.kernel(REF)
    kernel.next_notebooks = {"01_baseline": "done", "02_finetune": "stopped with status 1"}
    quick(tree)
    finish(server, "ERROR")
    first = kernel.request
    quick(tree)
    assert server.pushes() == [REF] * 2 and kernel.request["kernelDataSources"] == [REF]
    stamps = [
        re.search(r"medcot-staged \w+ after-version-\d", text)[0].split()
        for text in (first["text"], kernel.request["text"])
    ]
    assert stamps[0][1] == stamps[1][1] and [stamp[2] for stamp in stamps] == ["after-version-0", "after-version-1"]
    words = "version 1 there ended (error, the notebook raised, 01_baseline done, 02_finetune stopped with status 1): "
    assert words + "its output is attached, and the session goes on from it" in capsys.readouterr().out


def test_anew_does_not_go_on_from_what_an_earlier_session_left(tree, server, capsys):
    server.kernel(REF).next_notebooks = {"01_baseline": "stopped"}
    quick(tree)
    finish(server)
    quick(tree, anew=True)
    assert len(server.pushes()) == 2 and not server.kernels[REF].request.get("kernelDataSources")
    assert "version 1 there ended (complete, 01_baseline stopped): all begins anew" in capsys.readouterr().out


def test_a_kernel_whose_session_is_denied_is_not_taken_for_a_free_place(tree, server):
    """Pushed from another machine: here is no record of it."""
    quick(tree)
    (tree / "build" / "kaggle" / "pushed.json").unlink()
    server.faults["GetKernelSessionStatus"] = [403] * 3
    with pytest.raises(
        MedcotError, match=r"version 1 is there, its session denied with status 403\): it may be running"
    ):
        quick(tree)
    assert server.pushes() == [REF]


def test_a_session_that_was_killed_without_output_is_pushed_again(tree, server, monkeypatch):
    kernel = server.kernel(REF)
    kernel.next_outcome, kernel.next_notebooks = "CANCEL_ACKNOWLEDGED", None
    quick(tree)
    finish(server)
    monkeypatch.setattr(push_room, "LAG", 0)
    quick(tree)
    assert server.pushes() == [REF] * 2


def test_earlier_output_that_kaggle_does_not_attach_is_said(tree, server, capsys):
    server.kernel(REF).next_notebooks = {"01_baseline": "stopped"}
    quick(tree)
    finish(server)
    server.faults["SaveKernel"] = [{"invalidKernelSources": [REF]}]
    quick(tree)
    assert (
        "its own earlier output was not attached: it starts from the beginning. To stop it" in capsys.readouterr().out
    )


def test_the_pushed_folder_is_not_the_one_that_others_may_change(tree, server, monkeypatch):
    def answer(_):
        for file in (tree / "build" / "kaggle" / "session").iterdir():
            file.write_text("{}")
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    push(tree, owner="anna")
    assert "medcot-staged" in server.kernels[REF].request["text"]


def test_the_key_is_nowhere(tree, server, fresh_process, capfd, monkeypatch, tmp_path):
    """Not even when the client is asked for its verbose mode, in which it prints its own headers."""
    monkeypatch.setenv("VERBOSE", "1")
    server.faults["GetKernel"] = [500]
    quick(tree)
    secrets = (KEY, base64.b64encode(f"anna:{KEY}".encode()).decode())
    shown = "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret in shown or any(secret.encode() in data for data in written) for secret in secrets)


def test_the_owner_comes_from_the_credentials(tree, server):
    assert stage_room.stage(tree)[0].ref == REF


def test_push_asks_once_and_no_means_nothing_is_sent(tree, server, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda words: asked.append(words) or "n")
    with pytest.raises(MedcotError, match="not pushed: answer y"):
        push(tree)
    assert len(asked) == 1 and not server.pushes()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": "The requested title is already in use"}, "did not take .*: The requested title is already in use"),
        ({"versionNumber": None}, "it named no version"),
        ({"error": "Maximum batch GPU session count of 2 reached."}, "Wait until one of your sessions has ended"),
        (
            {"invalidDatasetSources": ["anna/wheels"], "invalidModelSources": ["b/m/transformers/8b/1"]},
            r"without these inputs \(dataset: anna/wheels; model: b/m/transformers/8b/1\).*To stop it",
        ),
    ],
)
def test_failure_with_status_0_is_a_failure(tree, server, answer, words):
    server.faults["SaveKernel"] = [answer]
    with pytest.raises(MedcotError, match=words):
        quick(tree)


@pytest.mark.parametrize("fault", ["lost", 2.5])
def test_a_push_whose_answer_is_lost_is_found_and_not_repeated(tree, server, fault, monkeypatch):
    monkeypatch.setattr(client, "PUSH_SECONDS", 2.0)
    monkeypatch.setattr(client, "PAUSES", (0.2, 0.7, 2.0))  # the slow one takes effect while it is asked for
    server.faults["SaveKernel"] = [fault]
    quick(tree)
    assert server.pushes() == [REF] and len(verbs(server, "SaveKernel")) == 1
    quick(tree)
    assert server.pushes() == [REF]


@pytest.mark.parametrize("fault", ["cut", 500, (429, 0)])
def test_a_push_that_did_not_arrive_is_not_sent_again_by_itself(tree, server, fault):
    server.faults["SaveKernel"] = [fault]
    with pytest.raises(MedcotError, match="Kaggle does not show this push: look at"):
        quick(tree)
    assert len(verbs(server, "SaveKernel")) == 1 and not server.pushes()


def test_an_interrupt_between_push_and_answer_is_made_up_for(tree, server, monkeypatch):
    call = client.call

    def interrupted(verb, *rest, **arguments):
        answer = call(verb, *rest, **arguments)
        if verb == "push":
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(client, "call", interrupted)
    with pytest.raises(MedcotError, match=r"interrupted\. What was pushed goes on at Kaggle\. To stop it"):
        quick(tree)
    monkeypatch.setattr(client, "call", call)
    quick(tree)
    assert server.pushes() == [REF]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "made up 403.*'anna' is your user name, and that your phone number is verified"),
        (409, "made up 409.*may have the title 'medcot session': rename or delete it"),
        (401, "no credentials or refuses them: `kaggle auth login`"),
        (400, "made up 400"),
    ],
)
def test_refusals_say_what_to_do(tree, server, status, words):
    server.faults["SaveKernel"] = [status]
    with pytest.raises(MedcotError, match=words):
        quick(tree)
    assert len(verbs(server, "SaveKernel")) == 1, "a refusal is not tried again"
    quick(tree)
    assert server.pushes() == [REF], "and leaves no trace of a push"


@pytest.mark.parametrize("text", ["{", "[]", '{"anna/medcot-session": 5}', '{"anna/medcot-session": {"stamp": "x"}}'])
def test_a_broken_record_of_pushes_ends_in_one_line(tree, server, text):
    (tree / "build" / "kaggle").mkdir(parents=True)
    (tree / "build" / "kaggle" / "pushed.json").write_text(text)
    with pytest.raises(MedcotError, match=r"pushed\.json is damaged"):
        quick(tree)
    assert not server.pushes()


def test_status_says_where_each_stands(tree, server, capsys):
    server.kernel(REF).next_notebooks = {"01_baseline": "done", "02_finetune": "stopped"}
    quick(tree)
    for ref, outcome in (("anna/medcot-01-baseline", "COMPLETE"), ("anna/medcot-02-finetune", "ERROR")):
        kernel = server.kernel(ref)
        kernel.version, kernel.polls, kernel.request, kernel.outcome = 1, 9, {"text": ""}, outcome
    capsys.readouterr()
    status(tree, "anna")
    status(tree, "anna")
    lines = [line.split("https")[0].strip() for line in capsys.readouterr().out.splitlines() if "https" in line]
    assert lines == [
        "version 1, running", "version 1, complete", "version 1, error, the notebook raised", "not pushed, or not to be seen",
        "version 1, complete, 01_baseline done, 02_finetune stopped", "version 1, complete", "version 1, error, the notebook raised",
        "not pushed, or not to be seen",
    ]  # fmt: skip
    assert server.pushes() == [REF]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    answer = '{"failure": "package", "message": "No module named \'six\'"}'
    done = subprocess.CompletedProcess([], 0, stdout=answer, stderr="")
    monkeypatch.setattr(client, "subprocess", SimpleNamespace(run=lambda *_, **__: done, TimeoutExpired=TimeoutError))
    with pytest.raises(MedcotError, match=r"No module named 'six'\): pip install kaggle==2.2.4 six"):
        client.call("user")


def test_the_command_line_knows_the_actions(monkeypatch):
    from medcot.kaggle import pull as pull_room

    called, parser = [], argparse.ArgumentParser()
    rooms = {"stage": stage_room, "release": stage_room, "push": push_room, "status": push_room, "pull": pull_room}
    for action, room in rooms.items():
        monkeypatch.setattr(room, action, partial(lambda action, **options: called.append((action, options)), action))
    kaggle.add_commands(parser.add_subparsers(dest="command"))
    for arguments in ("stage --offline", "release", "push --owner anna --yes", "status", "pull --checkpoints"):
        options = parser.parse_args(["kaggle", *arguments.split()])
        options.run(options)
    assert called == [
        ("stage", {"owner": None, "offline": True}), ("release", {}),
        ("push", {"owner": "anna", "offline": False, "yes": True, "anew": False}),
        ("status", {"owner": None}), ("pull", {"owner": None, "checkpoints": True}),
    ]  # fmt: skip


def test_offline_attaches_all_and_switches_the_internet_off(tree, server):
    change(tree, put("settings", {"MEDCOT_PROFILE": "kaggle-t4"}))
    quick(tree, offline=True)
    request = server.kernels[REF].request
    assert request["enableInternet"] is False and request["datasetDataSources"] == ["anna/medcot-offline"]
    assert request["modelDataSources"] == ["deepseek-ai/deepseek-r1/transformers/deepseek-r1-distill-llama-8b/2"]
    assert "internet=False" in request["text"]
