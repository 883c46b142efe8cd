"""The doors: the container's recipe, `make install`, `make lab`, and what a newcomer is told when something is missing."""
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def steps() -> list[tuple[str, str]]:
    "The Dockerfile's instructions, each on one line."
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(step.strip().split(None, 1)) for step in "\n".join(lines).replace("\\\n", " ").splitlines()]


def arguments(instruction: str) -> list[str]:
    return [text for name, text in steps() if name == instruction]


def ignored(path: str) -> bool:
    "Whether .dockerignore keeps a path, or a folder that it is in, from the build."
    parts = Path(path).parts
    folders = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    patterns = (ROOT / ".dockerignore").read_text().split()
    return any(fnmatch.fnmatch(folder, pattern) or fnmatch.fnmatch(folder, pattern.removeprefix("**/")) for folder in folders for pattern in patterns)


def run(*command, folder=ROOT, **environment):
    return subprocess.run([str(part) for part in command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100)


# ---- the container ----

def test_the_container_opens_on_a_page_that_exists():
    command = json.loads(arguments("CMD")[0])
    root = next(option.partition("=")[2] for option in command if option.startswith("--ServerApp.root_dir="))
    page = next(option.partition("=")[2] for option in command if option.startswith("--LabApp.default_url="))
    assert command[:2] == ["jupyter", "lab"] and root == arguments("WORKDIR")[0]
    assert (ROOT / page.removeprefix("/lab/tree/")).is_file()
    assert not ignored(page.removeprefix("/lab/tree/"))
    assert f"--port={arguments('EXPOSE')[0]}" in command and "--ServerApp.port_retries=0" in command  # no other port leads out


def test_make_lab_opens_on_the_same_page():
    [page] = set(re.findall(r"/lab/tree/\S+?\.ipynb", (ROOT / "Dockerfile").read_text()))
    printed = run("make", "--dry-run", "--always-make", "lab", "OPTIONS=--port=8899")
    [command] = [line for line in printed.stdout.splitlines() if line.startswith(".venv/bin/jupyter lab")]
    assert f"--LabApp.default_url={page}" in command and command.endswith("--port=8899")


def test_the_options_of_jupyter_are_options():
    pytest.importorskip("jupyterlab")
    known = run(sys.executable, "-m", "jupyterlab", "--help-all").stdout
    for option in json.loads(arguments("CMD")[0])[2:]:
        assert re.search(rf"^{re.escape(option.partition('=')[0])}\b", known, flags=re.M), option


def test_what_is_copied_is_there():
    for text in arguments("COPY"):
        *sources, _ = [word for word in text.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists() and not ignored(source), source
    entry = json.loads(arguments("ENTRYPOINT")[0])[-1]
    assert (ROOT / Path(entry).relative_to(arguments("WORKDIR")[0])).is_file()


def test_the_install_sees_all_that_make_install_reads():
    before = next(index for index, (name, text) in enumerate(steps()) if name == "RUN" and "make install" in text)
    copied = {word for name, text in steps()[:before] if name == "COPY" for word in text.split()}
    assert {"Makefile", "settings.ini", "setup.py", "constraints.txt", "house/install.py", "flatmin_nb/__init__.py"} <= copied
    assert "README.md" not in copied  # a word changed there does not install 7 GB again


def test_nobody_is_root_and_nothing_is_secret():
    names = [name for name, _ in steps()]
    assert arguments("USER") == ["1000"] and names.index("USER") < names.index("CMD")
    text = "\n".join(text for _, text in steps())
    assert not re.search(r"(?i)(token|password|api_key|secret)\s*=", text)
    assert not re.search(r"(?i)https?://[^/\s]*@|--allow-root", text)


def test_usage_is_reported_to_nobody():
    environment = dict(pair.split("=", 1) for text in arguments("ENV") for pair in text.split() if "=" in pair)
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["WANDB_MODE"] == "disabled" and environment["DO_NOT_TRACK"] == "1"


def test_dockerignore_leaves_out_what_git_ignores_and_keys():
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line and not line.startswith("#"):
            path = line.strip("/").replace("**/", "nbs/").replace("*", "some")
            assert ignored(path) and ignored(f"{path}/inside"), line
    for path in (".env", "nbs/.env", ".env.local", ".netrc", "house/server.pem", "server.key", "id_rsa", "id_ed25519.pub", ".ssh/id_ecdsa"):
        assert ignored(path), path
    for path in ("nbs/lab/errors.ipynb", "flatmin_nb/lab/sweep.py", "results/entropy_sgd.csv", "nbs/_quarto.yml", ".ci/run", "house/check.py"):
        assert not ignored(path), path


def test_the_volume_gets_its_folders(tmp_path):
    script = (ROOT / "house/enter.sh").read_text()
    assert "/flatmin/" in script
    (tmp_path / "enter.sh").write_text(script.replace("/flatmin", str(tmp_path / "volume")))
    (tmp_path / "volume").mkdir()
    result = run("bash", tmp_path / "enter.sh", "echo", "two words", folder=tmp_path)
    assert result.stdout == "two words\n" and result.returncode == 0
    linked = re.search(r"^RUN ln -s (.*) \.$", (ROOT / "Dockerfile").read_text(), flags=re.M)[1].split()
    assert {Path(path).name for path in linked} | {"data"} == {path.name for path in (tmp_path / "volume").iterdir()}
    for folder in (tmp_path / "volume").iterdir():
        folder.rmdir()
        folder.mkdir(0o555) if os.geteuid() else folder.touch()  # root may write in every folder
        result = run("bash", tmp_path / "enter.sh", "echo", "two words", folder=tmp_path)
        assert result.returncode == 1 and not result.stdout
        assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"{folder}, in what") and "cannot be written by user id" in result.stderr
        folder.rmdir() if os.geteuid() else folder.unlink()


# ---- make install ----

PIP = """import os, sys
open("calls.txt", "a").write(" ".join(sys.argv[1:]) + "\\n")
print("Requirement already satisfied: x"); print("Collecting x")
sys.stderr.write(os.environ.get("SAYS", ""))
sys.exit(bool(os.environ.get("SAYS")))
"""


@pytest.fixture
def install():
    "The module house/install.py."
    spec = importlib.util.spec_from_file_location("install", ROOT / "house/install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path):
    "A project in which pip is a stand-in that says what it is told to say; -S leaves this environment's torch out of sight."
    for path in ("Makefile", "house/install.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for path in ("settings.ini", "setup.py", "constraints.txt", ".venv/made.stamp", ".venv/bin/python"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/bash\nPYTHONPATH=$PWD/stand_in exec {sys.executable} -S "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "flatmin_nb").mkdir()
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in/pip.py").write_text(PIP)
    return tmp_path


def make_install(project: Path, **environment):
    return run("make", "install", folder=project, **{"INSTALL_GB": "0", "TMPDIR": str(project), **environment})


def line_of(result) -> str:
    "The one line on stderr that is not make's own."
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert result.returncode == 2
    return line


def test_pip_is_called_twice_and_then_no_more(project):
    result = make_install(project)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.splitlines()[1:] == ["Collecting x"] * 2
    first, second = (project / "calls.txt").read_text().splitlines()
    assert first.endswith("--constraint constraints.txt --quiet pip setuptools") and second.endswith("--no-build-isolation --editable .[dev]")
    assert make_install(project).returncode == 0
    assert len((project / "calls.txt").read_text().splitlines()) == 2


def test_too_little_space_is_said_before_anything_is_downloaded(project):
    line = line_of(make_install(project, INSTALL_GB="1000000000"))
    assert line.startswith("make install: needs 1e+09 GB in ") and "GB are free" in line and "TMPDIR" in line
    assert not (project / "calls.txt").exists() and not (project / ".venv/installed.stamp").exists()
    assert "is a number of gigabytes, not 'much'" in line_of(make_install(project, INSTALL_GB="much"))


def test_folders_of_one_file_system_share_its_space(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "gigabytes", lambda folder: 10.0)
    (tmp_path / "a").mkdir()
    assert install.shortage([(tmp_path, 7), (tmp_path / "a/not/yet/there", 3)]) == ""
    assert install.shortage([(tmp_path, 7), (tmp_path / "a/not/yet/there", 3.5)]).startswith(f"needs 10.5 GB in {tmp_path} and 10.0 GB are free")


def test_without_room_for_copies_pip_keeps_none(install, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(install, "piped", lambda arguments: (calls.append(arguments), (0, ""))[1])
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install, "shortage", lambda folders: "" if len(folders) == 2 else "too little")
    monkeypatch.delenv("INSTALL_GB", raising=False)
    assert install.main() is None and all(call[0] == "--no-cache-dir" for call in calls)
    monkeypatch.setattr(install, "shortage", lambda folders: "")
    calls.clear()
    assert install.main() is None and calls == install.STEPS


# what pip 26 wrote when it was tried: no network, a dead proxy, a full disk, another's folder
SAID = {
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NameResolutionError(\"Failed to resolve 'pypi.org'\")': /simple/pip/\n"
    "ERROR: Could not find a version that satisfies the requirement pip\nERROR: No matching distribution found for pip\n": "index could not be reached",
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProxyError('Cannot connect to proxy.')'\nERROR: No matching\n": "HTTPS_PROXY",
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n": "the disk is full",
    "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x/y'\nCheck the permissions.\n": "[Errno 13] Permission denied: '/x/y'",
    "ERROR: No matching distribution found for torch==2.14.0\n": "pip stopped: ERROR: No matching distribution found for torch==2.14.0",
}


@pytest.mark.parametrize("said", SAID)
def test_what_pip_says_becomes_one_line(project, said):
    line = line_of(make_install(project, SAYS=said))
    assert SAID[said] in line and line.endswith("(all that pip said: .venv/pip.log)")
    assert (project / ".venv/pip.log").read_text() == said
    assert not (project / ".venv/installed.stamp").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(project):
    shutil.rmtree(project / ".venv")
    project.chmod(0o555)
    try:
        assert f"{project} cannot be written" in line_of(make_install(project))
    finally:
        project.chmod(0o755)


def test_a_python_too_old_is_refused_before_pip_looks_for_packages(tmp_path):
    for path in ("setup.py", "settings.ini", "README.md"):
        shutil.copy(ROOT / path, tmp_path / path)
    result = run(sys.executable, "-c", "import sys; sys.version_info = (3, 10, 13); sys.argv = ['setup.py', '--version']; exec(open('setup.py').read(), "
                 "{'__file__': 'setup.py', '__name__': '__main__'})", folder=tmp_path)
    assert result.returncode == 1 and result.stderr == "flatmin_nb needs Python 3.11 or later, and this is 3.10\n"


# ---- make lab ----

def test_make_lab_as_root_says_what_to_do(project):
    (project / ".venv/installed.stamp").touch()
    (project / "id").write_text("#!/bin/bash\necho 0\n")
    (project / ".venv/bin/jupyter").write_text("#!/bin/bash\necho started\n")
    for path in ("id", ".venv/bin/jupyter"):
        (project / path).chmod(0o755)
    path = f"{project}:{os.environ['PATH']}"
    assert "OPTIONS=--allow-root" in line_of(run("make", "lab", folder=project, PATH=path))
    assert run("make", "lab", "OPTIONS=--allow-root", folder=project, PATH=path).stdout == "started\n"
