"""What stands around the notebooks: settings, pins, make, the site's pages, the README, and what may import what."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
PAPERS = [path for path in NOTEBOOKS if re.match(r"0[2-7]_", path.name)]
MODULES = sorted((ROOT / "flatmin_nb").rglob("*.py"))
TOOLS = Path(sys.executable).parent

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command, folder=ROOT, **environment):
    return subprocess.run(command, cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def tagged(notebook: Path) -> int:
    return sum("parameters" in cell["metadata"].get("tags", []) for cell in json.loads(notebook.read_text())["cells"])


# ---- notebooks ----

@pytest.mark.parametrize("notebook", PAPERS, ids=name)
def test_papermill_finds_the_parameters_after_cleaning(notebook, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    copy = Path(shutil.copy(notebook, tmp_path))
    assert run(TOOLS / "nbdev_clean", "--fname", copy.name, folder=tmp_path).returncode == 0
    assert tagged(copy) == 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_import_cells_hold_imports_alone(notebook):
    "nbdev runs the cells that import, and no others, when it builds the site: anything else in them may fail there."
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "#| export" in source or source.startswith("%"):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(re.sub(r"^[%!].*", "", source, flags=re.M)).body}
        assert len(kinds) < 2, source


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_links_between_pages_resolve(notebook):
    text = "".join("".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\((?!https?:|mailto:|#|attachment:)([^)#\s]+)", text):
        assert (notebook.parent / target).exists(), target


# ---- the package ----

def test_importing_loads_no_notebook_tools():
    modules = [name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in MODULES if path.name != "_modidx.py"]
    heavy = {"wandb", "tensorboard", "matplotlib", "IPython", "ipykernel", "jupyterlab", "papermill", "nbdev", "fastcore", "ray"}
    code = f"import sys, {', '.join(modules)}; print(*({heavy!r} & sys.modules.keys()))"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def has_an_optimizer(module: Path) -> bool:
    return bool(re.search(r"\boptim\b", module.read_text()))  # Bayesian compression has none: what it is for, cutting and packing nets, is the lab's


@pytest.mark.parametrize("module", [path for path in MODULES if path.parent == ROOT / "flatmin_nb" and has_an_optimizer(path)], ids=name)
def test_an_optimizer_needs_torch_and_of_the_lab_at_most_its_errors(module):
    "What a paper's tools need of the lab is imported when they are called, so an optimizer costs no more than torch."
    code = f"import sys, flatmin_nb.{module.stem}; print(*[name for name in sys.modules if name.startswith('flatmin_nb.')])"
    result = run(sys.executable, "-c", code)
    loaded, errors = set(result.stdout.split()), {"flatmin_nb.lab", "flatmin_nb.lab.errors"}
    assert f"flatmin_nb.{module.stem}" in loaded and loaded - errors == {f"flatmin_nb.{module.stem}"}, result.stderr


def imported(tree: ast.Module) -> set[str]:
    "The packages that a module imports when it is itself imported, or later."
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"flatmin_nb"}


def test_what_is_imported_is_required():
    required = {Requirement(line).name.lower().replace("-", "_") for line in SETTINGS["requirements"].split()}
    packages = set().union(*(imported(ast.parse(path.read_text())) for path in MODULES))
    optional = {"wandb", "tensorboard"}  # imported inside a function, by those who ask for them
    sweeping = {Requirement(line).name.lower() for line in SETTINGS["sweep_requirements"].split()} | {"nbclient", "traitlets"}  # which papermill brings
    otherwise = {"sklearn": "scikit_learn", "PIL": "pillow"}  # what is installed under another name
    assert {otherwise.get(package, package) for package in packages} - optional - sweeping <= required


# ---- settings and pins ----

def test_the_settings_that_notebooks_depend_on():
    assert SETTINGS["allowed_cell_metadata_keys"].split() == ["tags"]
    assert SETTINGS["update_pyproject"] == "False" and not (ROOT / "pyproject.toml").exists()
    assert SETTINGS["tst_flags"].split() == ["notest", "slow", "gpu"]


def test_every_requirement_has_a_pin_that_satisfies_it():
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for line in " ".join(SETTINGS[name] for name in ("requirements", "sweep_requirements", "dev_requirements")).split():
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), line


def test_one_version_of_quarto():
    pinned = re.search(r"QUARTO_VERSION=(\S+)", (ROOT / "Dockerfile").read_text())[1]
    for file in ("README.md", "Makefile", ".github/workflows/docs.yml"):
        assert pinned in (ROOT / file).read_text(), file


def product() -> list[Path]:
    "The files that git tracks or would track."
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_somebodys_machine():
    forbidden = re.compile(r"(?<![\w.~$}])/(?:root|work|Users|tmp|home/(?!flatmin\b))\b|\.\./shared")
    allowed = {".ci/run", "Dockerfile", name(Path(__file__))}
    found = []
    for path in product():
        if name(path) not in allowed and path.suffix not in {".safetensors", ".png"}:
            found += [f"{name(path)}: {match[0]}" for match in forbidden.finditer(path.read_text(encoding="utf-8", errors="ignore"))]
    assert not found


# ---- the site ----

def pages(contents) -> list[str]:
    return [page for item in contents for page in (pages(item["contents"]) if isinstance(item, dict) else [item])]


def test_the_sidebar_names_every_page_and_no_other():
    assert (ROOT / "nbs/_quarto.yml").is_symlink() and (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = pages(settings["website"]["sidebar"]["contents"])
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "nbs")) for path in NOTEBOOKS)
    assert settings["metadata-files"] == ["nbdev.yml"] and settings["execute"]["enabled"] is False


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=name)
def test_workflows_call_make_or_ci(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands and all(command.startswith(("make ", ".ci/run")) for command in commands)


# ---- the README ----

@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S))
def test_readme_snippet(snippet, tmp_path):
    (tmp_path / "snippet.py").write_text(snippet)
    result = run(sys.executable, "-W", "error", "snippet.py", folder=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_readme_names_only_files_and_targets_that_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`| )", text)) - {"it"} <= targets | {"run", "test"}
    assert all((ROOT / path).exists() for path in re.findall(r"\bnbs/[\w/]+\.ipynb", text))


# ---- make ----

PAPERMILL = """#!/bin/bash
echo called >> calls.txt
printf '%s ' "$@" > arguments.txt
echo '{}' > "$2"
[ ! -e fail ] || exit 1
"""


@pytest.fixture
def project(tmp_path):
    "A project in which papermill and Python are stand-ins, so that make's own behaviour can be tried in milliseconds."
    shutil.copy(ROOT / "Makefile", tmp_path)
    for path in ("nbs/02_entropy_sgd.ipynb", "flatmin_nb/__init__.py", "settings.ini", "setup.py", "constraints.txt", "results/entropy_sgd.csv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    for tool, text in {"papermill": PAPERMILL, "python": "#!/bin/bash\necho the summary\n"}.items():
        (tools / tool).write_text(text)
        (tools / tool).chmod(0o755)
    for stamp in ("made.stamp", "installed.stamp"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def test_make_run_runs_once(project):
    result = run("make", "run", folder=project, OMP_NUM_THREADS="1")
    assert result.returncode == 0 and "the summary" in result.stdout, result.stderr
    arguments = (project / "arguments.txt").read_text().strip()
    assert "-p L 20 -p out runs/02_entropy_sgd -p overwrite True" in arguments
    assert f"OMP_NUM_THREADS=1 .venv/bin/papermill {arguments}" in result.stdout.splitlines()  # the very command
    assert [path.name for path in (project / "runs").glob("*.ipynb")] == ["02_entropy_sgd.ipynb"]
    again = run("make", "run", folder=project)
    assert again.returncode == 0 and "the summary" in again.stdout
    assert (project / "calls.txt").read_text().count("called") == 1
    (project / "results/entropy_sgd.csv").write_text("the notebook reads this\n")
    run("make", "run", folder=project)
    assert (project / "calls.txt").read_text().count("called") == 2


def test_a_failed_run_does_not_look_finished(project):
    run("make", "run", folder=project)
    os.utime(project / "runs/02_entropy_sgd.ipynb", (0, 0))  # so the notebook is newer
    (project / "fail").touch()
    result = run("make", "run", folder=project)
    assert result.returncode != 0 and "the run stopped" in result.stderr
    assert not (project / "runs/02_entropy_sgd.ipynb").exists()
    (project / "fail").unlink()
    assert run("make", "run", folder=project).returncode == 0
    assert (project / "runs/02_entropy_sgd.ipynb").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_a_python_without_pins_is_refused_in_one_line(project, version):
    shutil.rmtree(project / ".venv")
    for candidate in ("python3", "python3.11", "python3.12", "python3.13"):  # this Python, which says that it is another
        (project / candidate).write_text(f"""#!/bin/bash\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n""")
        (project / candidate).chmod(0o755)
    for arguments in ([], ["PYTHON=python3.12"]):
        result = run("make", "install", *arguments, folder=project, PATH=f"{project}:/usr/bin:/bin")
        lines = [line for line in result.stderr.splitlines() if not line.startswith("make:")]
        assert result.returncode != 0 and len(lines) == 1 and "needs Python 3.11, 3.12 or 3.13" in lines[0], result.stderr
    assert not (project / ".venv/made.stamp").exists()


def test_the_summary_is_read_from_the_records(tmp_path):
    from flatmin_nb.lab.results import Run

    for method, error in (("sgd", 4.25), ("entropy_sgd", 3.5)):
        Run(tmp_path / method, {"method": method}).finish(None, None, test_error=error, gradient_evaluations=420, train_seconds=1.5)
    result = run(sys.executable, ROOT / "house/summary.py", tmp_path, "executed.ipynb")
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in ("4.25", "3.50", "420", "executed.ipynb"))


# ---- make test ----

@pytest.fixture
def small_project(tmp_path):
    "One notebook and its module, with which the checks can be tried."
    for path in ("settings.ini", "house/check.py", "nbs/lab/errors.ipynb", "flatmin_nb/lab/errors.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for path in ("flatmin_nb/__init__.py", "flatmin_nb/lab/__init__.py"):
        shutil.copy(ROOT / path, tmp_path / path)
    assert run(TOOLS / "nbdev_export", folder=tmp_path).returncode == 0
    return tmp_path


def checks(project: Path, *names: str):
    return run(sys.executable, project / "house/check.py", *names, folder=project)


def test_the_checks_find_what_is_unclean_unexported_or_failing(small_project):
    result = checks(small_project, "nbdev_clean", "nbdev_export", "nbdev_test")
    assert result.returncode == 0, result.stdout + result.stderr
    notebook = small_project / "nbs/lab/errors.ipynb"
    content = json.loads(notebook.read_text())
    code = next(cell for cell in content["cells"] if cell["source"] and cell["source"][0].startswith("#| export"))
    code["metadata"] = {"collapsed": True}
    code["source"].append("\nassert False, 'as it should not be'")
    notebook.write_text(json.dumps(content))
    before = notebook.read_text()
    result = checks(small_project, "nbdev_clean", "nbdev_export", "nbdev_test")
    assert result.returncode == 1 and "failed: nbdev_clean, nbdev_export, nbdev_test" in result.stderr
    assert "nbs/lab/errors.ipynb" in result.stdout and "flatmin_nb/lab/errors.py" in result.stdout
    assert notebook.read_text() == before  # nothing is mended behind anyone's back
