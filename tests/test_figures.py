"""The committed outputs: fresh, presentable, and what the pictures and the README show; and how house/figures.py makes them, on a project of a few pages."""
import base64
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("figures", ROOT / "house/figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

PAGES, read = figures.pages(), figures.read
SOMEBODY, SCRATCH = "/ho" "me/somebody", "/tm" "p/x3f"  # in two parts, as no file of the project may name such a path


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


# ---- what is committed ----

def test_every_page_is_as_its_code_and_tables_make_it():
    reasons = {figures.named(page): figures.stale(page) for page in PAGES}
    lines = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    assert not lines, "\n".join(["outputs older than what they come from, make figures makes them anew:", *lines])


@pytest.mark.parametrize("page", PAGES, ids=figures.named)
def test_outputs_can_be_shown(page):
    assert figures.unpresentable(read(page)) == []


def test_the_pictures_are_those_of_the_pages():
    wanted = figures.images()
    there = {path.name: path.read_bytes() for path in (ROOT / "nbs/images").glob("*.png")}
    assert wanted and there.keys() == wanted.keys(), "make figures"
    assert not [name for name in wanted if opened(there[name]) != opened(wanted[name])], "make figures"
    assert all(opened(png).width <= figures.WIDTH for name, png in there.items() if name != "front.png")


def test_the_readme_has_the_claims_of_the_tables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.CLAIMS.search(readme) and figures.claimed(readme) == readme, "make figures"


@pytest.mark.parametrize("page, tables", [
    ("01_flatness", ["flatness.csv"]),
    ("02_entropy_sgd", ["entropy_sgd.csv", "entropy_sgd_curves.csv", "entropy_sgd_deviations.csv"]),
    ("06_sgd_regimes", ["sgd_regimes.csv", "sgd_regimes_curves.csv", "sgd_regimes_digits_map.csv", "sgd_regimes_mnist.csv", "sgd_regimes_perceptron.csv"]),
    ("lab/sweep", ["sweep_gamma.csv"]),
    ("lab/curvature", []),
])  # fmt: skip
def test_a_page_depends_on_the_tables_that_it_reads(page, tables):
    found = figures.parts(ROOT / f"nbs/{page}.ipynb")
    assert [name.removeprefix("results/") for name in found if name.startswith("results/") and name.endswith(".csv")] == tables


def test_a_page_depends_on_what_a_notebook_that_it_runs_depends_on():
    runs, run = (figures.parts(ROOT / f"nbs/{page}.ipynb").keys() for page in ("lab/commands", "02_entropy_sgd"))
    assert run <= runs and "flatmin_nb/lab/train.py" in run


# ---- when a page is stale ----

def cell(source: str, kind: str = "code") -> dict:
    lines = source.splitlines(keepends=True)
    return {"cell_type": kind, "id": f"{abs(hash(source)) % 16**8:08x}", "metadata": {}, "source": lines} | (
        {"execution_count": None, "outputs": []} if kind == "code" else {})


def page(path: Path, *sources: str, outputs: list | None = None) -> Path:
    "A notebook: a title, and a cell for each source; the outputs are the last cell's."
    cells = [cell("# A page", "markdown"), *map(cell, sources)]
    cells[-1]["outputs"] = outputs or []
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(figures.nb2str({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def stream(text: str, name: str = "stdout") -> list[dict]:
    return [{"output_type": "stream", "name": name, "text": [text]}]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    "A page that imports a module that imports another, and reads a table; others of each kind that it does not touch."
    for path in ("settings.ini", "house/figures.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for path, text in {
        "flatmin_nb/__init__.py": '__version__ = "0.1.0"\n',
        "flatmin_nb/one.py": "def value(x):\n    'The value.'\n    from .lab.two import number\n    return number + x\n",
        "flatmin_nb/lab/__init__.py": "",
        "flatmin_nb/lab/two.py": "# %% ../nbs/lab/two.ipynb #0a1b\nfrom . import (  # one (of two)\n    three)\nnumber = three.NUMBER\n",
        "flatmin_nb/lab/three.py": "NUMBER = 3  # and no other\n",
        "flatmin_nb/lab/four.py": "NUMBER = 4\n",
        "flatmin_nb/reads.py": "def table(name):\n    return (Path('..') / 'results' / f'{name}.csv').read_text()\n",
        "results/some.csv": "a,b\n1,2\n", "results/some_curves.csv": "a\n1\n", "results/other.npz": "1", "results/README.md": "1",
        "README.md": "# A project\n",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    page(tmp_path / "nbs/page.ipynb", "from pathlib import Path\n\nfrom flatmin_nb.one import value", "results = Path('..') / 'results'",
         "#| eval: false\nraise SystemExit('in a live notebook alone')", "def shown(part):\n    'A table.'\n    return (results / f'some{part}.csv').read_text()",
         "print(value(1), len(shown('')))  # the sum", outputs=stream("an old output\n"))
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    return tmp_path


def stamped(path: Path) -> None:
    "As if its outputs had been made now."
    notebook = read(path)
    notebook["metadata"][figures.STAMP] = {"sources": figures.sources_of(path), "outputs": figures.outputs_of(notebook)}
    path.write_text(figures.nb2str(notebook))


FRESH, CHANGED, BY_HAND = "", "its code, or a module, a notebook or a table that it reads, changed", "its outputs were changed by other means"


@pytest.mark.parametrize("file, old, new, reason", [
    ("nbs/page.ipynb", "# A page", "# Another title", FRESH),
    ("nbs/page.ipynb", "'in a live notebook alone'", "'elsewhere'", FRESH),
    ("nbs/page.ipynb", "value(1)", "value(2)", CHANGED),
    ("nbs/page.ipynb", "# the sum", "# another comment", CHANGED),
    ("nbs/page.ipynb", "#| eval: false", "#| echo: false", CHANGED),
    ("nbs/page.ipynb", "an old output", "of a run by hand", BY_HAND),
    ("flatmin_nb/one.py", "'The value.'", "'Another.'", CHANGED),
    ("flatmin_nb/__init__.py", "0.1.0", "0.2.0", FRESH),
    ("flatmin_nb/lab/two.py", "../nbs/lab/two.ipynb #0a1b", "../nbs/lab/two.ipynb #2c3d", FRESH),
    ("flatmin_nb/lab/three.py", "NUMBER = 3", "NUMBER = 5", CHANGED),
    ("flatmin_nb/lab/four.py", "4", "5", FRESH),
    ("results/some.csv", "1,2", "1,3", CHANGED),
    ("results/some_curves.csv", "1", "2", CHANGED),
    ("results/other.npz", "1", "2", FRESH),
])  # fmt: skip
def test_a_page_is_stale_when_what_its_outputs_come_from_changed(project, file, old, new, reason):
    there = project / "nbs/page.ipynb"
    assert figures.stale(there) == "its outputs were not made by make figures"
    stamped(there)
    assert figures.stale(there) == FRESH
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, json.dumps(new)[1:-1] if file.endswith("ipynb") else new))
    assert figures.stale(there) == reason


def parts(path: Path, *sources: str) -> set[str]:
    return figures.parts(page(path, *sources)).keys() - {"flatmin_nb/lab/__init__.py"}


def test_what_a_page_depends_on(project):
    of_page = {"nbs/page.ipynb", "flatmin_nb/one.py", "flatmin_nb/lab/two.py", "flatmin_nb/lab/three.py", "results/some.csv", "results/some_curves.csv"}
    assert figures.parts(project / "nbs/page.ipynb").keys() - {"flatmin_nb/lab/__init__.py"} == of_page
    tables = {"results/other.npz", "results/some.csv", "results/some_curves.csv"}  # it names none, so all
    assert parts(project / "nbs/lab/tables.ipynb", "tables = {path.stem for path in Path('../../results').iterdir()}") == {"nbs/lab/tables.ipynb"} | tables
    assert parts(project / "nbs/lab/string.ipynb", "%matplotlib inline", "%%bash\npython -m flatmin_nb.lab.four 'it is") == {"nbs/lab/string.ipynb", "flatmin_nb/lab/four.py"}
    assert parts(project / "nbs/runs.ipynb", "!papermill page.ipynb x", "sweep('../nbs/pa*.ipynb')") == {"nbs/runs.ipynb"} | of_page
    assert parts(project / "nbs/prose.ipynb", "'other'  # of the results") == {"nbs/prose.ipynb"}
    assert parts(project / "nbs/reads.ipynb", "from flatmin_nb.reads import table", "table('other')") == {"nbs/reads.ipynb", "flatmin_nb/reads.py", "results/other.npz"}


def test_a_page_that_shows_the_comments_of_a_module_is_stale_when_one_changes(project):
    there = page(project / "nbs/shows.ipynb", "import inspect\nimport flatmin_nb.lab.three as three", "print(inspect.getsource(three))")
    stamped(there)
    assert figures.stale(there) == FRESH
    (project / "flatmin_nb/lab/three.py").write_text("NUMBER = 3  # or another\n")
    assert figures.stale(there) == CHANGED


def test_the_digest_is_the_same_on_every_machine(project):
    there = project / "nbs/page.ipynb"
    page(there, "from flatmin_nb.one import value", "value(3), 'results/some.csv'  # α, and what Python 3.11 has not heard of: \U0001fae8")
    assert figures.sources_of(there) == "117751b4fa64"


# ---- what outputs may hold ----

@pytest.mark.parametrize("output, complaint", [
    (stream("Loss is 3", "stderr"), "stderr, 'Loss is 3'"),
    ([{"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}], "an error, ValueError"),
    (stream(f"written to file://{SOMEBODY}/runs/1, in 3 s"), f"the path of a machine, '{SOMEBODY}/runs/1,'"),
    (stream(f"'{SCRATCH}/a.csv'"), f"the path of a machine, '{SCRATCH}/a.csv'"),
    (stream(r"in C:\Users\somebody\a.csv"), r"the path of a machine, 'C:\\Users\\somebody\\a.csv'"),
    (stream("drawn in /opt/flat-7/nbs"), "the name of this machine, '/opt/flat-7'"),
    (stream("in /var/folders/xy/T"), "the path of a machine, '/var/folders/xy/T'"),
    (stream("\x1b[31mred"), r"an escape sequence, '\x1b[31m'"),
    (stream("<function f at 0x7f3a5c1b2d30>"), "the address of an object, 'at 0x7f3a5c1b2d30'"),
    (stream("Traceback (most recent call last)"), "a traceback, 'Traceback (most recent call last)'"),
    (stream("a.py:3: UserWarning: too few"), "a warning, 'UserWarning: too few'"),
    ([{"output_type": "display_data", "data": {"text/html": ["<p>at machine-7</p>"]}}], "the name of this machine, 'machine-7'"),
    ([{"output_type": "display_data", "data": {"text/html": ['<script src="https://cdn.net/a.js"></script>']}}], 'something of another host, \'<script src="https://cdn.net/a.js"\''),
    ([{"output_type": "display_data", "data": {figures.WIDGET: {"model_id": "1"}}}], "a widget, which the site would ask another host to draw"),
    (stream("x" * figures.HEAVIEST), None),
])  # fmt: skip
def test_what_nobody_should_see_is_found(tmp_path, output, complaint):
    found = figures.unpresentable(read(page(tmp_path / "a.ipynb", "1", outputs=output)), ("machine-7", "/opt/flat-7"))
    assert found == [complaint] if complaint else len(found) == 1 and found[0].endswith(f"bytes, where {figures.HEAVIEST:,} are the most")


@pytest.mark.parametrize("output", [
    stream("runs/tmp/a.csv, ~/home/b, 3/tmp/4, https://pytorch.org/home/x, $HOME/tmp, </mnt>, 1/work: a warning: none; at 0x1F"),
    [{"output_type": "display_data", "data": {"image/png": f"L3RtcC9hL2hvbWUv+{SCRATCH}/a", "text/html": [f'<img src="data:image/png;base64,AA+{SCRATCH}/AA=="> <a href="https://arxiv.org">a</a>']}}],
])  # fmt: skip
def test_what_can_be_shown_is_not_refused(tmp_path, output):
    assert figures.unpresentable(read(page(tmp_path / "a.ipynb", "1", outputs=output)), ("machine-7",)) == []


def test_of_widgets_what_can_be_seen_without_a_kernel_stays(tmp_path):
    widget = {figures.WIDGET: {"model_id": "1"}, "text/plain": ["VBox(children=())"]}
    shown = [{"output_type": "display_data", "metadata": {}, "data": data} for data in (widget, widget | {"text/html": ["<b>a</b>"]}, {"text/plain": ["3"]})]
    notebook = read(page(tmp_path / "a.ipynb", "1", outputs=shown))
    notebook["metadata"]["widgets"] = {"state": {}}
    assert len(figures.unpresentable(notebook)) == 2
    figures.cleaned(notebook)
    kept = [output["data"] for output in notebook["cells"][-1]["outputs"]]
    assert kept == [{"text/html": ["<b>a</b>"], "text/plain": ["VBox(children=())"]}, {"text/plain": ["3"]}]
    assert figures.unpresentable(notebook) == []


# ---- making them ----

def made(project: Path, *wanted: str, begin: str = "pass", **environment: str) -> subprocess.CompletedProcess:
    "house/figures.py, in the project."
    begin = f"import sys; sys.path.insert(0, 'house'); import figures; {begin}; sys.exit(figures.main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", begin, *wanted], cwd=project, env=os.environ | environment, capture_output=True, text=True)


def last_output(path: Path) -> str:
    return "".join(read(path)["cells"][-1]["outputs"][-1]["text"])


@pytest.mark.slow
def test_stale_pages_are_executed_and_fresh_ones_are_not(project):
    there, calls = project / "nbs/lab/counted.ipynb", project / "calls.txt"
    page(there, "import os\nfrom pathlib import Path", "open('../../calls.txt', 'a').write('.');  # once more",
         "print(*os.listdir(os.environ['FLATMIN_DATA']), os.environ['OMP_NUM_THREADS'], os.environ['WANDB_MODE'], Path.cwd().name)")
    result = made(project, FLATMIN_DATA="/", OMP_NUM_THREADS="7")
    assert result.returncode == 0 and result.stderr == "" and "2 of 2 pages made, 0 refused, 0 left as they were" in result.stdout, result.stderr
    assert last_output(project / "nbs/page.ipynb") == "4 8\n" and last_output(there) == "1 disabled lab\n" and calls.read_text() == "."
    notebook = read(project / "nbs/page.ipynb")
    assert notebook["metadata"].keys() == {"kernelspec", figures.STAMP} and all(cell["metadata"] == {} for cell in notebook["cells"])
    before = {path: path.read_bytes() for path in project.rglob("nbs/**/*.*")}

    result = made(project)
    assert result.returncode == 0 and "0 of 2 pages made, 0 refused, 2 left as they were" in result.stdout
    assert {path: path.read_bytes() for path in project.rglob("nbs/**/*.*")} == before and calls.read_text() == "."
    clean = subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=project, capture_output=True, text=True)
    assert clean.returncode == 0 and {path: path.read_bytes() for path in before} == before, clean.stderr

    (project / "flatmin_nb/lab/three.py").write_text("NUMBER = 5\n")
    result = made(project)
    assert "page: " in result.stdout and CHANGED in result.stdout and "1 of 2 pages made" in result.stdout
    assert last_output(project / "nbs/page.ipynb") == "6 8\n" and calls.read_text() == "."
    assert "1 of 2 pages made" in made(project, "nbs/lab/counted.ipynb").stdout and calls.read_text() == ".."
    result = made(project, "lab/nowhere")
    assert result.returncode == 2 and result.stderr == "no page 'lab/nowhere'; the pages are lab/counted, page\n"


@pytest.mark.slow
def test_a_page_that_fails_or_shows_too_much_keeps_its_outputs(project):
    old = stream("an old output\n")
    wrong = {
        "failing": ("1 / 0", "ZeroDivisionError: division by zero"),
        "killed": ("import os\nos._exit(1)", "Kernel died"),
        "warning": ("import warnings\nwarnings.warn('too few')", "its outputs hold stderr, '"),
        "path": (f"print('{SOMEBODY}/a.csv')", f"its outputs hold the path of a machine, '{SOMEBODY}/a.csv'"),
        "slow": ("import time\ntime.sleep(600)", "not done after 8 s"),
    }
    for name, (source, _) in wrong.items():
        page(project / f"nbs/{name}.ipynb", source, outputs=old)
    before = {name: (project / f"nbs/{name}.ipynb").read_bytes() for name in wrong}
    result = made(project, begin="figures.LIMIT = 8")
    assert result.returncode == 1 and "1 of 6 pages made, 5 refused" in result.stdout
    lines = sorted(result.stderr.splitlines())
    assert len(lines) == 5, result.stderr
    for line, (name, (_, reason)) in zip(lines, sorted(wrong.items()), strict=True):
        assert line.startswith(f"{name} keeps its old outputs: ") and reason in line
    assert {name: (project / f"nbs/{name}.ipynb").read_bytes() for name in wrong} == before
    assert not list(project.rglob("*.part"))


def test_stopped_by_the_keyboard_nothing_is_half_written(project):
    there = page(project / "nbs/page.ipynb", "import os, pathlib, time\npathlib.Path('../pid').write_text(str(os.getpid()))\ntime.sleep(600)", outputs=stream("old"))
    before = there.read_bytes()
    process = subprocess.Popen([sys.executable, "house/figures.py"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # which is ignored below a shell's background job
    while not (project / "pid").exists() or not (project / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "stopped: pages that were not done keep their old outputs\n"
    assert there.read_bytes() == before and not list(project.rglob("*.part"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((project / "pid").read_text()), 0)


# ---- pictures and the README ----

def png(color: str, size: tuple[int, int]) -> str:
    kept = io.BytesIO()
    Image.new("RGBA", size, color).save(kept, "PNG")
    return base64.b64encode(kept.getvalue()).decode()


def test_pictures_are_made_of_outputs(project):
    shown = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": png(color, (960, 300))}} for color in ("red", "blue", "#ff000000")]
    page(project / "nbs/02_a_paper.ipynb", "1", outputs=shown[1:])
    page(project / "nbs/03_a_paper.ipynb", "1", outputs=shown[2:])
    tour = page(project / "nbs/00_tour.ipynb", "1", "#| label: front\n2", outputs=shown[:1])
    notebook = read(tour)
    notebook["cells"][1]["outputs"] = shown[1:]
    tour.write_text(figures.nb2str(notebook))
    found = {name: opened(picture) for name, picture in figures.images().items()}
    assert {name: picture.size for name, picture in found.items()} == {"00_tour.png": (480, 150), "02_a_paper.png": (480, 150), "03_a_paper.png": (480, 150), "front.png": (960, 300)}
    colors = {name: picture.convert("RGB").getcolors() for name, picture in found.items()}  # what was clear is white, on a dark page too
    assert {name: color for name, [(_, color)] in colors.items()} == {
        "00_tour.png": (255, 0, 0), "02_a_paper.png": (0, 0, 255), "03_a_paper.png": (255, 255, 255), "front.png": (255, 0, 0)}  # fmt: skip


def test_the_block_of_claims_is_written_and_nothing_around_it(project):
    (project / "nbs/page.ipynb").unlink()
    (project / "flatmin_nb/claims.py").write_text("def markdown(pages):\n    return f'| [a]({pages}a.ipynb) | \\\\1 |'\n")
    (project / "README.md").write_text("# A\n\n<!-- claims: begin -->\nold\n\nlines\n<!-- claims: end -->\n\nend\n")
    result = made(project)
    assert result.returncode == 0 and "written: README.md" in result.stdout, result.stderr
    assert (project / "README.md").read_text() == "# A\n\n<!-- claims: begin -->\n\n| [a](nbs/a.ipynb) | \\1 |\n\n<!-- claims: end -->\n\nend\n"
    assert "written" not in made(project).stdout
    (project / "flatmin_nb/claims.py").write_text("def markdown(pages):\n    raise ValueError('results/a.csv is not there')\n")
    result = made(project)
    assert result.returncode == 1 and result.stderr == "README.md keeps its table of claims: results/a.csv is not there\n"


def test_a_page_that_is_no_notebook_is_named_in_one_line(project):
    (project / "nbs/page.ipynb").write_text("<<<<<<< HEAD\n{}")
    with pytest.raises(SystemExit, match=r"^page.ipynb is no notebook: .*$"):
        figures.main([])
