"""The lab diary: dates, statuses and links of its entries, `make diary`, and the checks that its entries define, tried on more than they show."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DIARY = ROOT / "nbs/diary"
ENTRIES = sorted(DIARY.glob("20*.ipynb"))
STATUS = re.compile(r"^\*\*Status:\*\* (holds\b.*|corrected by \[.+\]\((?P<by>[^)]+)\).*|corrects \[.+\]\((?P<what>[^)]+)\).*|not tested here\b.*)$", re.M)


def cells(notebook: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def status(entry: Path) -> re.Match:
    return STATUS.search("\n".join(cells(entry, "markdown")))


def front_matter(notebook: Path) -> dict:
    "As nbdev makes it for Quarto."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    processor = NBProcessor(notebook, procs=[FrontmatterProc])
    processor.process()
    return processor.nb.frontmatter_


# ---- the pages ----

@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_is_dated_and_has_its_sections(entry):
    facts = front_matter(entry)
    assert str(facts["date"]) == entry.stem[:10] and re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+", entry.stem)
    assert facts["title"] and facts["description"]
    text = "\n".join(cells(entry, "markdown"))
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert [section.partition(" (")[0] for section in sections] == ["The claim", "What we measured", "What it means", "Reproduce this entry"]
    assert re.search(r"^## The claim \(.*\d{4}.*\)\n\n> ", text, re.M)  # dated, and in a quotation
    assert f"papermill nbs/diary/{entry.name} out.ipynb" in text
    assert any("test_eq" in code or "test_close" in code for code in cells(entry, "code"))
    assert entry.stat().st_size < 300_000


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.stem)
def test_a_status_is_one_of_four_and_a_correction_is_linked_both_ways(entry):
    found = status(entry)
    assert found, "no status"
    assert found[1].partition(" [")[0].partition(",")[0].removesuffix(" by") in front_matter(entry)["categories"]
    if found["by"]:
        assert status(DIARY / found["by"])["what"] == entry.name
    if found["what"]:
        assert status(DIARY / found["what"])["by"] == entry.name


def test_the_listing_and_the_table_have_every_entry():
    facts = front_matter(DIARY / "index.ipynb")
    assert facts["listing"]["contents"] == "20*.ipynb" and facts["listing"]["sort"] == "date desc" and facts["title"]
    outputs = [output for cell in json.loads((DIARY / "index.ipynb").read_text())["cells"] for output in cell.get("outputs", [])]
    table = "\n".join("".join(output["data"]["text/markdown"]) for output in outputs if "text/markdown" in output.get("data", {}))
    listed = re.findall(r"^\| (\S+) \| \[(.+?)\]\((.+?)\) \| (.+) \|$", table, re.M)
    assert sorted(name for _, _, name, _ in listed) == [entry.name for entry in ENTRIES], "run nbs/diary/index.ipynb again"
    for day, title, name, told in listed:
        assert (day, title, told) == (name[:10], front_matter(DIARY / name)["title"], status(DIARY / name)[1])
    assert [day for day, *_ in listed] == sorted((day for day, *_ in listed), reverse=True)


# ---- make diary ----

@pytest.fixture
def project(tmp_path) -> Path:
    "What `make diary` needs of the project, with this Python."
    for file in ("Makefile", "settings.ini", "setup.py", "constraints.txt", "house/diary.py", "house/diary_entry.ipynb", "nbs/02_entropy_sgd.ipynb"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    for stamp in ("made.stamp", "installed.stamp"):
        (tmp_path / ".venv" / stamp).touch()
    for folder in ("nbs/diary", "flatmin_nb"):
        (tmp_path / folder).mkdir()
    return tmp_path


def make_diary(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "diary", *arguments], cwd=project, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def test_make_diary_writes_an_entry_of_today(project):
    title = 'Größe: "$HOME" costs $5 & `more`?'
    result = make_diary(project, f"TITLE={title}")
    assert result.returncode == 0, result.stderr
    path = project / f"nbs/diary/{date.today().isoformat()}-groe-home-costs-5-more.ipynb"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert str(path.relative_to(project)) in result.stdout and "_quarto.yml" in result.stdout
    assert front_matter(path)["title"] == title and str(front_matter(path)["date"]) == date.today().isoformat()
    test_an_entry_is_dated_and_has_its_sections(path)
    assert status(path)[1] == "not tested here"
    before = path.read_text(encoding="utf-8")
    cleaned = subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=project, capture_output=True, text=True)
    assert cleaned.returncode == 0 and path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("arguments, reason", [([], "needs a title"), (["TITLE=  "], "needs a title"), (["TITLE=???"], "no file name can be made"), (["TITLE=数"], "no file name can be made")])
def test_make_diary_refuses_a_title_that_is_no_name(project, arguments, reason):
    result = make_diary(project, *arguments)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make:")]
    assert result.returncode != 0 and len(lines) == 1 and reason in lines[0], result.stderr
    assert not list((project / "nbs/diary").iterdir())


def test_make_diary_replaces_nothing(project):
    assert make_diary(project, "TITLE=the same").returncode == 0
    path = next((project / "nbs/diary").iterdir())
    path.write_text("work in progress")
    result = make_diary(project, "TITLE=The, same!")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make:")]
    assert result.returncode != 0 and len(lines) == 1 and "is there already" in lines[0]
    assert path.read_text() == "work in progress" and list(path.parent.iterdir()) == [path]


# ---- what the entries define ----

def defined(entry: str) -> SimpleNamespace:
    "The functions, classes and constants of an entry, without what it computes."
    nodes = [node for code in cells(DIARY / f"{entry}.ipynb", "code") for node in ast.parse(code).body]
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    constant = lambda node: isinstance(node, ast.Assign) and all(name.id.isupper() for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
    space = {"__name__": entry}
    exec(compile(ast.Module([node for node in nodes if isinstance(node, kinds) or constant(node)], []), entry, "exec"), space)
    return SimpleNamespace(**space)


@pytest.fixture(scope="module")
def surrogate() -> SimpleNamespace:
    return defined("2017-12-12-surrogate-equals-data")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_surrogate_that_has_seen_the_row_returns_it(surrogate, seed):
    history = surrogate.simulated(4, 12, seed=seed)
    for number in range(4):
        row = history[(history.configuration == number) & (history.epoch == 12)].iloc[0]
        for epoch in (12, 13, 500):  # the row itself, and whatever comes after it
            np.testing.assert_allclose(surrogate.predicted(history, row, epoch, seed), row[surrogate.TARGETS].astype(float), atol=1e-12)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_honest_check_leaves_the_horizon_out(surrogate, seed):
    history = surrogate.simulated(4, 40, seed=seed)
    for horizon in (9, 10):
        with pytest.raises(ValueError, match=f"horizon = {horizon} is among the 10 epochs"):
            surrogate.honest_error(history, 0, last=10, horizon=horizon, others=10)
    blind, unchanged = np.transpose([surrogate.honest_error(history, number, last=10, horizon=40, others=10) for number in range(4)])
    np.testing.assert_allclose(blind, unchanged, atol=1e-12)
    poisoned = history.copy()  # nothing of the horizon, and nothing that was left out, may reach the prediction
    poisoned.loc[(history.epoch > 10) & (history.epoch < 40), surrogate.TARGETS] = 1e6
    assert surrogate.honest_error(poisoned, 0, last=10, horizon=40, others=10)[0] == pytest.approx(blind[0])


@pytest.fixture(scope="module")
def killed() -> SimpleNamespace:
    return defined("2017-11-28-killed-but-still-there")


@pytest.fixture
def family(killed):
    "Start a child with a worker; nothing of it outlives the test."
    started = []

    def start(**options):
        started.append(killed.child_with_worker(**options))
        return started[-1]

    yield start
    for child, worker in started:
        for pid in (child.pid, worker):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait(timeout=10)
        child.stdout.close()


def test_ending_a_child_leaves_its_worker_and_the_pipe(killed, family):
    child, worker = family()
    child.terminate()
    child.wait(timeout=10)
    assert not killed.alive(child.pid) and killed.alive(worker) and killed.pipe_is_open(child, timeout=0.5)


@pytest.mark.parametrize("deaf", [False, True])
def test_cancelling_ends_the_whole_group_and_closes_the_pipe(killed, family, deaf):
    child, worker = family(deaf=deaf, start_new_session=True)
    before = time.monotonic()
    killed.cancel(child, patience=1.0 if deaf else 30.0)
    assert time.monotonic() - before < 20
    assert child.returncode is not None and not killed.alive(child.pid) and not killed.alive(worker)
    assert not killed.pipe_is_open(child, timeout=10)


def test_cancelling_what_has_ended_reaches_the_worker_it_left(killed, family):
    child, worker = family(start_new_session=True)
    child.kill()
    child.wait(timeout=10)
    assert killed.alive(worker)
    killed.cancel(child)
    assert not killed.alive(worker)
    killed.cancel(child)  # and once more, with nobody there


# ---- names and numbers of other entries ----

def test_a_fingerprint_tells_all_parameters_apart():
    names = defined("2017-12-13-four-runs-one-folder")
    assert names.name_of_2017(0.1, 0.1, 64) == names.name_of_2017(0.1001, 0.1, 64)
    assert names.fingerprint(dict(lr=0.1, decay=0.1)) != names.fingerprint(dict(lr=0.1001, decay=0.1))
    assert names.fingerprint(dict(lr=0.1, decay=0.1)) == names.fingerprint(dict(decay=0.1, lr=0.1))
    assert names.fingerprint(dict(lr=0.1)) != names.fingerprint(dict(lr=0.1, goal=None))
