"""The staged notebooks run as on Kaggle, in an environment without medcot and what an image lacks. Long: a minute."""

import base64
import contextlib
import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
import venv
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from kaggle_tree import REF, REPOSITORY, change, put
from workshop import until

from medcot.kaggle.metadata import METADATA_FILE
from medcot.kaggle.pull import pull
from medcot.kaggle.stage import stage
from medcot.settings import ADAPTER_FOLDER, EMBEDDED_MODEL

pytest_plugins = ("kaggle_fixtures",)

# An image has none of these; here they come from an attached folder or from a loopback index.
LACKING = ("trl", "tyro", "rapidfuzz")
PLANTED = {
    "WANDB_API_KEY": "aaaa1111bbbb2222cccc3333dddd4444eeee5555",
    "HF_TOKEN": "hf_PlantedTokenForTheTestOfSecrets123",
    "KAGGLE_KEY": "0123planted4567planted89abplantedcd",
}


def wheel_of(name, folder):
    """Packs an installed package as a wheel again."""
    distribution = importlib.metadata.distribution(name)
    tag = email.message_from_string(distribution.read_text("WHEEL"))["Tag"]
    path = folder / f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in ("INSTALLER", "direct_url.json"):
                archive.write(file.locate(), str(file))
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A Python that has what this one has, linked, but for medcot and what an image lacks; a list of wheels of those."""
    folder = tmp_path_factory.mktemp("image")
    # Named so because unsloth reads, for four seconds, through libraries that are installed anywhere else.
    packages, wheels = folder / "site-packages", folder / "wheels"
    packages.mkdir(), wheels.mkdir()
    lacking = re.compile(rf"(__editable__.*)?_*({'|'.join(('medcot', *LACKING))})([-.].*)?", re.I)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not lacking.fullmatch(entry.name) and "__editable__" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "venv", symlinks=True)
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    (site / "image.pth").write_text(f"{packages}\n")
    return SimpleNamespace(venv=folder / "venv", wheels=[wheel_of(name, wheels) for name in LACKING], folder=folder)


@pytest.fixture(scope="module")
def index(image):
    """The address of a package index on the loopback address that has just those wheels."""
    simple = image.folder / "index" / "simple"
    for wheel in image.wheels:
        project = simple / wheel.name.split("-")[0]
        project.mkdir(parents=True)
        shutil.copyfile(wheel, project / wheel.name)
        (project / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(image.folder / "index")))
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/simple"
    http.shutdown()
    http.server_close()


def clone(folder, internet=True):
    """A clone whose 02 stops where the environment says so, staged for the smoke profile with model and wheels attached."""
    ignore = shutil.ignore_patterns("model", "__pycache__")
    shutil.copytree(REPOSITORY / "medcot", folder / "medcot", ignore=ignore)
    shutil.copytree(REPOSITORY / "notebooks", folder / "notebooks")
    for name in (METADATA_FILE, "requirements.lock"):
        shutil.copyfile(REPOSITORY / name, folder / name)
    change(folder, put("settings", {"MEDCOT_PROFILE": "smoke"}))
    change(folder, put("dataset_sources", ["OWNER/medcot-offline"]))
    change(folder, put("enable_internet", internet))
    path = folder / "notebooks" / "02_finetune.ipynb"
    notebook = json.loads(path.read_text())
    source = "import os\n\nif 'STOP_02' in os.environ:\n    raise RuntimeError('02 was told to stop')"
    cell = {"cell_type": "code", "execution_count": None, "id": "stop", "metadata": {}, "outputs": [], "source": source}
    notebook["cells"].insert(1, cell)
    path.write_text(json.dumps(notebook))
    return {one.name: one for one in stage(folder, "anna")}


def environment(root, index, **more):
    """That of a session: nothing of this one but the path; the network outside is a closed port."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    # Its path is the same for all sessions, as that of /tmp is, and it is empty when one begins.
    closed, home, scratch = "http://127.0.0.1:9", root.parent / "home", root.parent.parent / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    home.mkdir(parents=True), scratch.mkdir()
    return kept | more | {
        "HOME": str(home), "TMPDIR": str(scratch), "MEDCOT_KAGGLE_ROOT": str(root), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "http_proxy": closed, "https_proxy": closed, "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1",
        "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index,
    }  # fmt: skip


class Run:
    """One session in a fresh image: its inputs mounted in the old or the new layout, its notebook run by papermill."""

    def __init__(self, folder, image, index, staged, outputs=(), old=False, **more):
        self.root, self.venv = folder / "kaggle", folder / "venv"
        self.working = self.root / "working"
        shutil.copytree(image.venv, self.venv, symlinks=True)
        self.working.mkdir(parents=True)
        data = self._mount(old, "datasets", "medcot-offline")
        shutil.copytree(EMBEDDED_MODEL, data / "model")
        if old:
            (data / "wheels").mkdir()
            for wheel in image.wheels:
                shutil.copyfile(wheel, data / "wheels" / wheel.name)
        for slug, output in outputs:
            shutil.copytree(output, self._mount(old, "notebooks", slug))
            (self._mount(old, "notebooks", slug) / "__output__.json").write_text("{}")
        source = staged.write(folder / "source", after=1 if outputs else 0) / f"{staged.name}.ipynb"
        self.page = folder / "page.ipynb"
        command = [str(self.venv / "bin" / "python"), "-m", "papermill", str(source), str(self.page), "-k", "python3"]
        self.printed, self.listening = folder / "printed.txt", set()
        with self.printed.open("w") as printed:
            process = subprocess.Popen(
                [*command, "--no-progress-bar", "--cwd", str(self.working)], env=environment(self.root, index, **more),
                stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert until(lambda: self._ended(process), 500)
        assert process.returncode == 0, self.printed.read_text()[-4000:]

    def _ended(self, process):
        with contextlib.suppress(psutil.Error):
            watched = psutil.Process(process.pid)
            for one in (watched, *watched.children(recursive=True)):
                found = (c for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN)
                self.listening.update(f"{one.name()} {c.laddr}" for c in found if not c.laddr.ip.startswith("127."))
        time.sleep(0.2)
        return process.poll() is not None

    def _mount(self, old, kind, slug):
        return self.root / "input" / slug if old else self.root / "input" / kind / "anna" / slug

    def shown(self):
        """All that stands on the page, as text."""
        outputs = [o for cell in json.loads(self.page.read_text())["cells"] for o in cell.get("outputs", ())]
        texts = [o.get("text") or o.get("data", {}).get("text/markdown") or "" for o in outputs]
        return "".join("".join(text) for text in texts)

    def images(self):
        cells = json.loads(self.page.read_text())["cells"]
        return sum("image/png" in o.get("data", {}) for cell in cells for o in cell.get("outputs", ()))

    def files(self):
        return {str(path.relative_to(self.working)) for path in self.working.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def refusal():
    """The address of a server that refuses every wandb key at once, and the keys that it was given."""
    given = set()

    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self):
            kind, _, key = self.headers.get("Authorization", "").partition(" ")
            given.add(base64.b64decode(key).decode() if kind == "Basic" else key)
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", given
    server.shutdown()


@pytest.fixture(scope="module")
def runs(image, index, refusal, tmp_path_factory):
    """Twice the session that runs all three, the first stopped in 02 and the second going on from its output."""
    folder, keys = tmp_path_factory.mktemp("runs"), PLANTED | {"WANDB_BASE_URL": refusal[0]}
    staged = clone(folder / "clone")
    first = Run(folder / "first", image, index, staged["session"], STOP_02="1", **keys)
    second = Run(folder / "second", image, index, staged["session"], [("medcot-session", first.working)], **keys)
    return SimpleNamespace(first=first, second=second, staged=staged, folder=folder, keys_sent=refusal[1])


def test_kaggle_run_that_stops_in_02_leaves_what_01_made(runs):
    record = json.loads((runs.first.working / "session.json").read_text())["notebooks"]
    assert list(record) == ["01_baseline", "02_finetune"] and record["01_baseline"] == "done"
    assert "RuntimeError: 02 was told to stop" in record["02_finetune"]
    page = runs.first.shown()
    assert "02 was told to stop" in page and "# Not finished" in page and "03_compare: not run" in page
    executed = json.loads((runs.first.working / "notebooks" / "01_baseline.ipynb").read_text())
    assert any(cell.get("outputs") for cell in executed["cells"])


def test_kaggle_run_goes_on_from_its_own_earlier_output_to_the_end(runs):
    page = runs.second.shown()
    assert "01_baseline: done by an earlier session" in page and "=== 03_compare: done ===" in page
    comparison = json.loads((runs.second.working / "comparison.json").read_text())
    headline = comparison.get("headline") or comparison["measures"][0]["sentence"]
    assert f"# {headline}" in page and runs.second.images() >= 2
    names = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    adapter = {f"{ADAPTER_FOLDER}/{name}" for name in names}
    executed = {f"notebooks/{name}.ipynb" for name in ("01_baseline", "02_finetune", "03_compare")}
    expected = adapter | executed | {"training.json", "RUN.md", "comparison.json", "figures/loss.png", "session.json"}
    assert expected <= runs.second.files()
    assert not any("huggingface" in name for name in runs.second.files()), "no caches among the results"


def test_kaggle_run_shows_progress_on_its_page(runs):
    page = runs.second.shown()
    assert "=== 02_finetune ===" in page and "profile smoke" in page and re.search(r"\bloss\b", page)


def test_kaggle_run_takes_medcot_and_what_the_image_lacks_from_the_notebook(runs):
    for name in LACKING:
        assert any((runs.first.venv / "lib").rglob(f"site-packages/{name}/__init__.py"))
    assert not any((runs.first.venv / "lib").rglob("site-packages/medcot"))
    assert "installed trl==" in runs.first.shown()


def test_no_file_of_a_run_holds_a_key_and_no_port_is_opened(runs):
    # The key was found and used, and went nowhere else.
    assert any(PLANTED["WANDB_API_KEY"] in key for key in runs.keys_sent)
    looked_at = set()
    for run in (runs.first, runs.second):
        assert not run.listening
        places = (run.working, run.root.parent / "home")
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        for path in (*files, run.printed, run.page):
            assert not [name for name, key in PLANTED.items() if key.encode() in path.read_bytes()]
            looked_at.add(path.name)
    assert looked_at >= {
        "02_finetune.ipynb",
        "training.json",
        "RUN.md",
        "adapter_config.json",
        "printed.txt",
        "page.ipynb",
    }


def test_kaggle_run_results_come_home(runs, tree, server):
    kernel = server.kernel(REF)
    kernel.version, kernel.polls = 2, 9
    kernel.request = {"text": (runs.folder / "second" / "source" / "session.ipynb").read_text()}
    kernel.files = {name: (runs.second.working / name).read_bytes() for name in runs.second.files()}
    folder = pull(tree, "anna")
    for name in runs.second.files() - {name for name in kernel.files if name.startswith("checkpoints/")}:
        assert (folder / name).read_bytes() == (runs.second.working / name).read_bytes()
    assert any(path.name.startswith("run-") for path in (folder / "wandb").rglob("*")), (
        "with the charts of the training"
    )


def test_kaggle_run_one_by_one_in_the_old_layout_without_a_network(runs, image, tmp_path):
    """01 by itself, then 03 from the outputs of 01 and 02, told by our own file names; the wheels are attached."""
    staged, closed = clone(tmp_path / "clone", internet=False), "http://127.0.0.1:9"
    one = Run(tmp_path / "one", image, closed, staged["01_baseline"], old=True)
    trained = tmp_path / "trained"
    for name in (ADAPTER_FOLDER, "training.json", "figures", "wandb"):
        source = runs.second.working / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        trained.mkdir(exist_ok=True)
        copy(source, trained / name)
    outputs = [("medcot-01-baseline", one.working), ("medcot-02-finetune", trained)]
    three = Run(tmp_path / "three", image, closed, staged["03_compare"], outputs, old=True)
    assert {"RUN.md", "comparison.json", "figures/loss.png", "training.json"} <= three.files()


def test_colab_and_ones_own_gpu_first_cells(image, index, tmp_path):
    """The first cells of README.md, run as they stand there in a fresh image, with a clone in place of the address."""
    text = (REPOSITORY / "medcot" / "kaggle" / "README.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "install_here" in block]
    assert len(blocks) == 2
    shutil.copytree(REPOSITORY / "medcot", tmp_path / "medcot" / "medcot", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (METADATA_FILE, "requirements.lock"):
        shutil.copyfile(REPOSITORY / name, tmp_path / "medcot" / name)
    (tmp_path / "medcot" / "notebooks").mkdir()
    for i, block in enumerate(blocks):
        folder = tmp_path / f"session-{i}"
        shutil.copytree(image.venv, folder / "venv", symlinks=True)
        where = tmp_path if "git clone" in block else tmp_path / "medcot" / "notebooks"
        code = re.sub(r"^!git clone .*$", "", block, flags=re.M)
        code = re.sub(r"^%cd (.*)$", r"import os; os.chdir('\1')", code, flags=re.M)
        code += "\nimport trl, medcot; print('WITNESS', trl.__file__, medcot.__file__)"
        done = subprocess.run(
            [str(folder / "venv" / "bin" / "python"), "-c", code], cwd=where, capture_output=True, text=True,
            env=environment(folder / "kaggle", index), timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert str(folder / "venv") in done.stdout and str(tmp_path / "medcot" / "medcot") in done.stdout
