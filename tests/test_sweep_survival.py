"""Sweeps as a user runs them, while runs, workers, machines and drivers are killed, disks are full and files are damaged."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path
from types import ModuleType, SimpleNamespace

import flatmin_nb
import flatmin_nb.lab.sweep as module
import psutil
import pytest
import torch
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.files import FolderError
from flatmin_nb.lab.grids import SweepError
from flatmin_nb.lab.notebooks import PATIENCE, identity, package_code, read_notebook
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.sweep import Cluster, Workers, run_task
from flatmin_nb.lab.sweep import sweep as sweep_of
from flatmin_nb.lab.tasks import Sweep, driven, is_driven, load, standing, task_of, write_json

FLATMIN = Path(sys.executable).parent / "flatmin"
AT_LAST = 60.0  # seconds to wait for what takes as long as it takes; not reached where all is well

PARAMETERS = """
what: str = "ends"  # what becomes of the run
seed: int = 0
wandb_mode: str = "disabled"
place: str = {place!r}  # a folder beside the sweep
out: str = ""
"""
CODE = r"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

place, out, name = Path(place), Path(out), f"{what.replace('/', '-')}-{seed}"

def note(word):
    with open(place / "log.txt", "a") as log:
        log.write(f"{word} {name}\n")

def write(path, content):
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").rename(path)

def wait_for(condition, seconds=1000):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)

def first_time():
    marker = place / f"{name}.marker"
    return not marker.exists() and not marker.touch()

def family():
    "Write down who this process and its worker are, and children that are ever harder to find."
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    away = "import os, subprocess, sys; os.fork() and os._exit(0); os.setsid(); print(subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL).pid)"
    plain, session = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
    daemon = subprocess.run([sys.executable, "-c", away, *sleep], stdout=subprocess.PIPE, text=True).stdout
    bare = subprocess.Popen(sleep, start_new_session=True, env={})
    there = dict(worker=os.getppid(), kernel=os.getpid(), plain=plain.pid, session=session.pid, daemon=int(daemon), bare=bare.pid)
    write(place / f"{name}-{os.getpid()}.family", there)

note("begun")
out.mkdir(parents=True, exist_ok=True)
write(place / f"{name}.environment", {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "WANDB_RUN_GROUP", "RAY_AUTH_TOKEN")})
print("last words of", name, flush=True)

if what == "holds_memory":
    import torch
    memory = torch.ones(2**28, device="cuda")
if what.startswith("holds"):
    family()
    wait_for((place / "release").exists)
if what == "meets":  # all of a party are there at once
    (place / f"{name}.there").touch()
    wait_for(lambda: len(list(place.glob("meets-*.there"))) >= int((place / "party").read_text()))
if what == "dies" or what == "dies_once" and first_time():
    wait_for(lambda: "last words of" in (out.parent / "log.txt").read_text(), 20)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "loses_its_worker" and first_time():
    family()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
if what == "raises" and not (place / "mended").exists():
    raise ValueError("no such luck")
if what == "edits":
    with open(place / "package" / "flatmin_nb" / "lab" / "scaling.py", "a") as module:
        module.write("\nEDITED = True\n")
if what == "fills":
    (out / "large").write_bytes(bytes(4_000_000))

if what == "resumes":
    from flatmin_nb.lab.results import Run
    run = Run(out, {"seed": seed})
    steps = (run.checkpoint() or {"steps": 0})["steps"]
    for step in range(steps, 4):
        note(f"step-{step}")
        run.save_checkpoint({"steps": step + 1})
        if step == 1 and first_time():
            os.kill(os.getpid(), signal.SIGKILL)
    run.finish(None, None, square=steps**2)
else:
    write(out / "run.json", dict(status="finished", parameters=dict(seed=seed), summary=dict(square=seed**2)))
if what == "spoils":
    (out / "run.json").write_text('{"status": "finish')
note("ended")
"""


def notebook_of(path: Path, *cells: str | tuple[str, str]) -> Path:
    "A notebook: the parameters, code, and Markdown as a pair of 'markdown' and its text."
    content = []
    for number, cell in enumerate(cells):
        kind, source = cell if isinstance(cell, tuple) else ("code", cell)
        more = dict(outputs=[], execution_count=None) if kind == "code" else {}
        content.append(dict(cell_type=kind, id=f"cell{number}", metadata={} if number else {"tags": ["parameters"]}, source=source) | more)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=content, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return path


def until(condition: Callable, what: str, seconds: float = AT_LAST):
    "What the condition gives as soon as that is true."
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:g} s there is not: {what}"
        time.sleep(0.05)
    return found


def living(processes) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def gone(processes, seconds: float = 10.0) -> None:
    "Wait until all are; so many seconds are what a user is promised."
    processes = list(processes)
    try:
        until(lambda: not living(processes), "an end of all processes", seconds)
    except AssertionError:
        told = [(process.pid, process.ppid(), " ".join(process.cmdline())[:200]) for process in living(processes)]
        raise AssertionError("still there:\n" + "\n".join(map(str, told))) from None


class Toy:
    "A notebook, a folder to sweep it into, and a place beside it where its runs leave word."

    def __init__(self, root: Path, name: str = "toy"):
        self.folder, self.place = root / "sweep", root / "place"
        self.place.mkdir(parents=True)
        self.notebook = notebook_of(root / f"{name}.ipynb", PARAMETERS.format(place=str(self.place)), ("markdown", "What is to be seen."), CODE)
        self.scratch = Path(tempfile.mkdtemp(prefix="toy", dir=None if len(tempfile.gettempdir()) < 24 else Path(os.sep, "tmp")))  # names of sockets must be short
        self.drivers, self.seen = [], []

    @property
    def environment(self) -> dict[str, str]:
        without = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_", "CUDA_"))}
        return without | dict(TMPDIR=str(self.scratch), OMP_NUM_THREADS="1", FLATMIN_TOY=self.scratch.name)

    def flatmin(self, *words, **environment) -> subprocess.CompletedProcess:
        "A command, to its end."
        return subprocess.run([FLATMIN, *map(str, words)], env=self.environment | environment, capture_output=True, text=True, timeout=2 * AT_LAST)

    def start(self, *words, ignored: tuple[signal.Signals, ...] = ()) -> SimpleNamespace:
        "flatmin sweep, as a job of its own as a shell starts it; a job in the background, or below nohup, ignores signals."
        number = len(self.drivers)
        out, err = self.place / f"driver-{number}.out", self.place / f"driver-{number}.err"
        with open(out, "w") as first, open(err, "w") as second:
            command = [FLATMIN, "sweep", self.notebook, self.folder, *map(str, words)]
            process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=first, stderr=second, start_new_session=True,
                                       preexec_fn=lambda: [signal.signal(name, signal.SIG_IGN if name in ignored else signal.SIG_DFL) for name in (signal.SIGINT, signal.SIGHUP)])  # fmt: skip
        self.drivers.append(SimpleNamespace(process=process, out=out.read_text, err=err.read_text))
        return self.drivers[-1]

    def to_the_end(self, driver: SimpleNamespace) -> int:
        "The exit status of a driver."
        return driver.process.wait(timeout=2 * AT_LAST)

    def processes(self, driver: SimpleNamespace) -> list[psutil.Process]:
        "The driver's children and theirs."
        return psutil.Process(driver.process.pid).children(recursive=True)

    def families(self, name: str = "*") -> list[dict[str, psutil.Process]]:
        "The processes of those runs that hold or have lost their worker, as they were when this was asked first."
        for path in sorted(self.place.glob(f"{name}.family")):
            if path.stem not in dict(self.seen):
                there = {}
                for role, pid in json.loads(path.read_text()).items():
                    try:
                        there[role] = psutil.Process(pid)
                    except psutil.NoSuchProcess:
                        pass
                self.seen.append((path.stem, there))
        return [there for stem, there in self.seen if Path(stem).match(name)]

    def holding(self, count: int, name: str = "holds-*") -> list[psutil.Process]:
        "All processes of so many runs that hold."
        ended = lambda: [driver.err() for driver in self.drivers[-1:] if driver.process.poll() is not None]
        families = until(lambda: len(found := self.families(name)) >= count and found or ended(), f"{count} runs that hold")
        assert not ended(), ended()
        assert all(len(living(family.values())) == 6 for family in families)
        return [process for family in families for process in family.values()]

    def log(self) -> Counter:
        "How often a run left which word."
        path = self.place / "log.txt"
        return Counter(path.read_text().splitlines()) if path.exists() else Counter()

    def environment_of(self, name: str) -> dict:
        return json.loads((self.place / f"{name}.environment").read_text())

    def records(self) -> dict[str, dict]:
        "What the folder says of each run."
        found = [json.loads(path.read_text()) for path in self.folder.glob("tasks/*/task.json")]
        return {f"{record['args']['what']}-{record['args']['seed']}": record for record in found}

    def status(self) -> dict[str, str]:
        return {name: record["status"] for name, record in self.records().items()}

    def close(self) -> None:
        "End what is left."
        left = [process for family in self.families() for process in family.values()]
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLATMIN_TOY") == self.scratch.name:
                    left.append(process)
            except psutil.Error:
                pass
        for process in living(left):
            try:
                process.kill()
            except psutil.Error:
                pass
        for driver in self.drivers:
            driver.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def toy_in():
    "To make toys, all of which are gone at the end."
    toys = []

    def make(root: Path, **options) -> Toy:
        toys.append(Toy(root, **options))
        return toys[-1]

    yield make
    for toy in toys:
        toy.close()


@pytest.fixture
def toy(tmp_path, toy_in) -> Toy:
    made = toy_in(tmp_path)
    yield made
    made.close()


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=10**8))
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.startswith("add"):
        node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    else:
        cluster.remove_node(node, allow_graceful=False)
    print(node.all_processes["raylet"][0].process.pid if line.startswith("add") else "", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    "A cluster that outlives its drivers: `address`, and `do('add')` and `do('remove')` for a second machine."
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "CUDA_"))} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], env=environment | {"RAY_USAGE_STATS_ENABLED": "0"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, start_new_session=True
        )

        def said() -> str:
            line = process.stdout.readline()
            noise.seek(0)
            assert line, noise.read().decode()
            return line.strip()

        def do(word: str) -> str:
            process.stdin.write(word + "\n")
            process.stdin.flush()
            return said()

        yield SimpleNamespace(address=said(), do=do)
        there = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
        process.wait(timeout=AT_LAST)
        process.stdout.close()
        for left in living(there):
            left.kill()


# ---- one sweep in which nearly everything happens ----

POINTS = """what,wandb_mode
holds,offline
dies,disabled
loses_its_worker,disabled
ends,disabled
dies_once,disabled
raises,disabled
resumes,disabled
spoils,disabled
../../x,disabled
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory, toy_in) -> SimpleNamespace:
    "The toy, and what was seen of it while it was swept, afterwards, and when the same command was given again."
    toy = toy_in(tmp_path_factory.mktemp("story") / "a{b} c", name="{toy} 1")
    (toy.place / "points.csv").write_text(POINTS)
    words = ("--table", toy.place / "points.csv", "--retries", 1)
    story = SimpleNamespace(toy=toy, words=words)
    driver = toy.start(*words)
    toy.holding(1)
    story.pid = driver.process.pid
    story.status = toy.flatmin("status", toy.folder)
    story.second = toy.flatmin("sweep", toy.notebook, toy.folder, *words)
    story.lost = until(lambda: toy.families("loses_its_worker-*"), "a run that lost its worker")[0]
    gone(process for role, process in story.lost.items())
    (toy.place / "release").touch()
    story.exit, story.out, story.err, story.log = toy.to_the_end(driver), driver.out(), driver.err(), toy.log()
    story.records, story.table = toy.records(), toy.flatmin("load", toy.folder)
    story.names = {path.name for path in toy.folder.glob("tasks/*")}
    gone(process for family in toy.families() for process in family.values())
    (toy.place / "mended").touch()
    story.dry = toy.flatmin("sweep", toy.notebook, toy.folder, *words, "--dry-run")
    again = toy.start(*words)
    story.exit_again, story.log_again, story.records_again = toy.to_the_end(again), toy.log() - story.log, toy.records()
    return story


def outcomes(record: dict) -> list[str]:
    return [attempt["outcome"] for attempt in record["attempts"]]


@pytest.mark.slow
def test_a_run_that_always_dies_has_failed(story):
    record = story.records["dies-0"]
    assert record["status"] == "failed" and outcomes(record) == ["died", "died"]
    assert "died 2 times" in record["error"] and "last words of dies-0" in record["error"] and "\n" not in record["error"]
    assert story.exit == 1
    assert [line for line in story.err.splitlines() if line.startswith("failed") and "what = dies," in line and "last words of dies-0" in line]


@pytest.mark.slow
def test_a_run_that_dies_once_is_tried_again(story):
    record = story.records["dies_once-0"]
    assert record["status"] == "finished" and outcomes(record) == ["died", "finished"] and record["error"] == ""
    assert story.log["begun dies_once-0"] == 2 and story.log["ended dies_once-0"] == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_its_run_along_and_the_run_is_tried_again(story):
    record = story.records["loses_its_worker-0"]  # that its kernel and its children are gone, the story itself has seen
    assert record["status"] == "finished" and outcomes(record) == ["died", "finished"] and record["error"] == ""
    assert record["attempts"][0]["pid"] != record["attempts"][1]["pid"]
    assert story.log["begun loses_its_worker-0"] == 2 and story.log["ended loses_its_worker-0"] == 1


@pytest.mark.slow
def test_the_others_go_on(story):
    assert {name for name, record in story.records.items() if record["status"] != "finished"} == {"dies-0", "raises-0"}
    assert {name: record["status"] for name, record in story.records.items() if record["status"] != "finished"} == {"dies-0": "failed", "raises-0": "failed"}
    assert story.out.splitlines()[-1] == "7 finished, 2 failed"


@pytest.mark.slow
def test_an_exception_is_not_tried_again_by_itself(story):
    record = story.records["raises-0"]
    assert record["status"] == "failed" and outcomes(record) == ["failed"] and record["error"] == "ValueError: no such luck"
    assert story.log["begun raises-0"] == 1


@pytest.mark.slow
def test_the_same_command_tries_what_failed_and_nothing_else(story):
    assert "9 points in 9 runs: 7 ended, 2 to be run" in story.dry.stdout
    assert {line.split()[1] for line in story.log_again} == {"dies-0", "raises-0"}
    assert story.records_again["raises-0"]["status"] == "finished" and story.records_again["raises-0"]["error"] == ""
    assert story.records_again["dies-0"]["status"] == "failed" and story.exit_again == 1


@pytest.mark.slow
def test_a_run_goes_on_where_its_checkpoint_is(story):
    steps = {line.split()[0]: count for line, count in story.log.items() if line.endswith("resumes-0") and line.startswith("step")}
    assert steps == {"step-0": 1, "step-1": 1, "step-2": 1, "step-3": 1}
    assert outcomes(story.records["resumes-0"]) == ["died", "finished"]
    record = json.loads(next(story.toy.folder.glob(f"tasks/{story.records['resumes-0']['task']}/out/run.json")).read_text())
    assert record["status"] == "finished" and len(record["resumed"]) == 1 and record["summary"] == {"square": 4}  # two steps were done


@pytest.mark.slow
def test_status_tells_who_runs(story):
    assert story.status.returncode == 0 and story.status.stderr == ""
    assert re.search(rf"^swept by process {story.pid} on \S+ since \S+$", story.status.stdout, re.M)
    assert re.search(r"^running: what = holds, wandb_mode = offline, process \d+ on \S+ since \S+$", story.status.stdout, re.M)
    assert "1 running" in story.status.stdout or "2 running" in story.status.stdout


@pytest.mark.slow
def test_a_second_driver_is_refused(story):
    assert story.second.returncode == 1 and story.second.stdout == ""
    line = story.second.stderr.splitlines()[-1]
    assert re.fullmatch(rf"Error: '.*' is being swept by process {story.pid} on \S+ since \S+; wait for it, .*", line)
    assert "Traceback" not in story.second.stderr
    assert story.log["begun holds-0"] == 1 and story.records["holds-0"]["status"] == "finished"  # the first was not disturbed


@pytest.mark.slow
def test_hostile_values_and_paths_stay_inside(story):
    assert all(re.fullmatch("[0-9a-f]{20}", name) for name in story.names) and len(story.names) == 9
    assert story.records["../../x-0"]["status"] == "finished"
    root = story.toy.folder.parent
    assert {path.name for path in root.iterdir()} == {"sweep", "place", "{toy} 1.ipynb"}
    assert {path.name for path in root.parent.iterdir()} == {"a{b} c"}


@pytest.mark.slow
def test_a_record_that_cannot_be_read_hides_no_run(story):
    assert story.records["spoils-0"]["status"] == "finished"
    runs = load(story.toy.folder)
    row = runs.table.set_index("what").loc["spoils"]
    assert row["status"] == "finished" and math.isnan(row["square"])
    assert dict(runs.table.set_index("what")["square"].dropna()) == {
        "holds": 0, "loses_its_worker": 0, "ends": 0, "dies_once": 0, "raises": 0, "resumes": 4, "../../x": 0,
    }  # fmt: skip
    assert story.table.returncode == 0 and story.table.stdout.count("finished") == 7 and "raises" not in story.table.stdout


@pytest.mark.slow
def test_a_run_knows_its_group_and_no_gpu_and_no_secret(story):
    for name in ("holds-0", "ends-0"):
        group = "sweep" if name == "holds-0" else None
        assert story.toy.environment_of(name) == {"CUDA_VISIBLE_DEVICES": "", "WANDB_RUN_GROUP": group, "RAY_AUTH_TOKEN": None}


@pytest.mark.slow
def test_what_is_other_code_and_what_is_not(story, tmp_path):
    "A dry run tells how many runs of the folder are taken for those that are asked for."
    toy = story.toy

    def ended(*cells, **environment) -> int:
        notebook = notebook_of(tmp_path / toy.notebook.name, *cells)
        result = toy.flatmin("sweep", notebook, toy.folder, *story.words, "--dry-run", **environment)
        assert result.returncode == 0, result.stderr
        return int(re.search(r"runs: (\d+) ended", result.stdout)[1])

    parameters, words = PARAMETERS.format(place=str(toy.place)), ("markdown", "What is to be seen.")
    assert ended(parameters, words, CODE) == 8
    assert ended(parameters, ("markdown", "Other words."), CODE, ("markdown", "And more.")) == 8
    assert ended(parameters, words, CODE.replace("seed**2", "seed**3")) == 0
    assert ended(parameters.replace("seed: int = 0", "seed: int = 1"), words, CODE) == 0
    package = copied_package(tmp_path)
    assert ended(parameters, words, CODE, PYTHONPATH=str(package.parent)) == 8
    with open(package / "lab" / "scaling.py", "a") as module:
        module.write("\nEDITED = True\n")
    assert ended(parameters, words, CODE, PYTHONPATH=str(package.parent)) == 0


# ---- drivers that end early ----

def interrupted(toy: Toy, driver: SimpleNamespace, way: str) -> subprocess.CompletedProcess | None:
    if way == "cancel":
        return toy.flatmin("cancel", toy.folder)
    if way == "SIGINT":  # a terminal sends Ctrl-C to all processes of the job
        os.killpg(driver.process.pid, signal.SIGINT)
    else:
        driver.process.send_signal(getattr(signal, way))


SOME = ("-p", "what", "['ends', 'holds']", "-p", "seed", "range(3)")  # three runs that end at once, and three that hold


def begun(toy: Toy, *words, **options) -> tuple[SimpleNamespace, list[psutil.Process]]:
    "A driver that has finished three runs and has two that hold, and all processes that are there because of it."
    driver = toy.start(*SOME, *words, **options)
    families = toy.holding(2)
    assert toy.status() == {"ends-0": "finished", "ends-1": "finished", "ends-2": "finished", "holds-0": "running", "holds-1": "running"}
    return driver, [*families, *toy.processes(driver)]


def goes_on(toy: Toy, *words) -> None:
    "The same command does what is left, and nothing twice."
    assert "6 points in 6 runs: 3 ended, 3 to be run" in toy.flatmin("sweep", toy.notebook, toy.folder, *SOME, "--dry-run").stdout
    (toy.place / "release").touch()
    assert toy.to_the_end(toy.start(*SOME, *words)) == 0
    names = [f"{what}-{seed}" for what in ("ends", "holds") for seed in range(3)]
    assert toy.status() == dict.fromkeys(names, "finished")
    log = toy.log()
    assert {name: log[f"ended {name}"] for name in names} == dict.fromkeys(names, 1)
    assert {name: log[f"begun {name}"] for name in names} == {"ends-0": 1, "ends-1": 1, "ends-2": 1, "holds-0": 2, "holds-1": 2, "holds-2": 1}


@pytest.mark.slow
def test_a_driver_that_is_killed(toy, cluster):
    driver, processes = begun(toy)
    driver.process.kill()
    loaded = toy.flatmin("load", toy.folder)
    assert loaded.stdout.count("finished") == 3 and "holds" not in loaded.stdout
    status = toy.flatmin("status", toy.folder).stdout
    assert "3 finished, 2 interrupted, 1 waiting" in status and "nobody sweeps into it now" in status
    gone(processes)
    goes_on(toy, "--address", cluster.address)


@pytest.mark.slow
def test_ctrl_c(toy):
    driver, processes = begun(toy)
    interrupted(toy, driver, "SIGINT")
    gone(processes)  # Ray's own too
    assert toy.to_the_end(driver) == 130
    assert driver.err().splitlines()[-1] == "Error: stopped" and "Traceback" not in driver.err()
    assert list(toy.scratch.iterdir()) == []
    assert toy.status() == {"ends-0": "finished", "ends-1": "finished", "ends-2": "finished", "holds-0": "cancelled", "holds-1": "cancelled"}
    assert len(load(toy.folder)) == 3 and load(toy.folder).table["status"].eq("finished").all()
    assert not is_driven(Sweep(toy.folder))
    assert "3 ended, 3 to be run" in toy.flatmin("sweep", toy.notebook, toy.folder, *SOME, "--dry-run").stdout


@pytest.mark.slow
def test_a_sweep_in_the_background(toy):
    "It lives on when its terminal is gone, as nohup has it, and SIGTERM ends it and its runs though Ctrl-C is ignored."
    driver, processes = begun(toy, ignored=(signal.SIGINT, signal.SIGHUP))
    driver.process.send_signal(signal.SIGHUP)
    driver.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driver.process.wait(timeout=2)
    driver.process.send_signal(signal.SIGTERM)
    gone(processes)
    assert toy.to_the_end(driver) == 130
    assert driver.err().splitlines()[-1] == "Error: stopped" and "Traceback" not in driver.err()
    assert toy.status() == {"ends-0": "finished", "ends-1": "finished", "ends-2": "finished", "holds-0": "cancelled", "holds-1": "cancelled"}


@pytest.mark.slow
def test_ctrl_c_while_ray_starts(toy):
    driver = toy.start(*SOME)
    processes = until(lambda: [*toy.processes(driver), *([driver.process] if driver.process.poll() is not None else [])], "a first process of Ray")
    interrupted(toy, driver, "SIGINT")
    assert toy.to_the_end(driver) == 130
    gone(processes)
    assert driver.err().splitlines()[-1] == "Error: stopped" and "Traceback" not in driver.err()
    assert list(toy.scratch.iterdir()) == []
    assert toy.status() == {}


def copied_package(folder: Path) -> Path:
    "A copy of this package, which may be edited."
    return Path(shutil.copytree(Path(flatmin_nb.__file__).parent, folder / "package" / "flatmin_nb", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.slow
def test_a_package_that_is_edited_while_a_run_uses_it(toy, monkeypatch):
    package = copied_package(toy.place)
    monkeypatch.chdir(toy.place)  # Ray and kernels look for modules in the current folder first
    result = toy.flatmin("sweep", toy.notebook, toy.folder, "-p", "what", "edits", PYTHONPATH=str(package.parent))
    assert result.returncode == 1 and "was edited during a run" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert toy.status() == {"edits-0": "failed"} and toy.log()["ended edits-0"] == 1
    assert [path.parent.name for path in toy.folder.glob("tasks/*/*/run.json")] == ["out.old-1"]


# ---- on a cluster, which is there before its drivers and after them ----

@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGTERM", "cancel"])
def test_a_sweep_that_is_ended(way, toy, cluster):
    driver, processes = begun(toy, "--address", cluster.address)
    told = interrupted(toy, driver, way)
    gone(processes)
    assert toy.to_the_end(driver) == 130
    if told:
        assert told.returncode == 0 and re.fullmatch(rf"ended the sweep by process {driver.process.pid} on \S+ since \S+\n", told.stdout)
    assert driver.err().splitlines()[-1] == "Error: stopped" and "Traceback" not in driver.err()
    assert toy.status() == {"ends-0": "finished", "ends-1": "finished", "ends-2": "finished", "holds-0": "cancelled", "holds-1": "cancelled"}
    assert not is_driven(Sweep(toy.folder))
    assert toy.flatmin("cancel", toy.folder).stdout == "nobody sweeps into it now\n"


@pytest.mark.slow
def test_a_driver_that_is_killed_on_a_cluster(toy, cluster):
    driver, processes = begun(toy, "--address", cluster.address)
    driver.process.kill()
    gone(processes)
    assert {"ends-0": "finished", "ends-1": "finished", "ends-2": "finished"}.items() <= toy.status().items()
    assert len(load(toy.folder)) == 3
    assert "3 ended, 3 to be run" in toy.flatmin("sweep", toy.notebook, toy.folder, *SOME, "--dry-run").stdout


@pytest.mark.slow
def test_a_machine_that_is_lost(toy, cluster):
    driver = toy.start("-p", "what", "['holds', 'ends']", "-p", "seed", "range(5)", "--address", cluster.address)
    toy.holding(2)
    raylet = int(cluster.do("add"))  # a machine that comes later gets work too
    toy.holding(3)
    [lost] = [family for family in toy.families() if family["worker"].ppid() == raylet]
    others = [process for family in toy.families() if family is not lost for process in family.values()]
    cluster.do("remove")
    gone(lost.values())
    assert len(living(others)) == len(others)
    (toy.place / "release").touch()
    assert toy.to_the_end(driver) == 0
    names = {f"{what}-{seed}" for what in ("holds", "ends") for seed in range(5)}
    assert toy.status() == dict.fromkeys(names, "finished")
    assert sorted(map(outcomes, toy.records().values())) == [["died", "finished"], *[["finished"]] * 9]
    log = toy.log()
    assert {name: log[f"ended {name}"] for name in names} == dict.fromkeys(names, 1)
    assert len(load(toy.folder)) == 10
    gone(process for family in toy.families() for process in family.values())


SESSION = """
import json, sys
import ray
from flatmin_nb.lab.sweep import sweep
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
for line in sys.stdin:
    notebook, folder, axes, options = json.loads(line)
    print("runs:", len(sweep(notebook, folder, axes, **options)), flush=True)
"""


@pytest.fixture(scope="module")
def session(cluster, tmp_path_factory) -> Callable[..., int]:
    "The function sweep in a program that has started Ray itself; how many runs have ended then."
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_", "CUDA_"))} | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", SESSION, cluster.address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(toy: Toy, axes: dict, **options) -> int:
            process.stdin.write(json.dumps([str(toy.notebook), str(toy.folder), axes, options]) + "\n")
            process.stdin.flush()
            for line in process.stdout:  # Ray has words of its own
                if line.startswith("runs:"):
                    return int(line.split()[1])
            raise AssertionError("the program has ended")

        yield call


@pytest.mark.slow
def test_each_run_sees_its_own_gpu(toy, session):
    "The runs of a party wait for each other, so that all of them are there at once."
    def gpus(*seeds: int, **options) -> list[str]:
        for there in toy.place.glob("meets-*.there"):
            there.unlink()
        (toy.place / "party").write_text(str(len(seeds)))
        session(toy, dict(what=["meets"], seed=seeds), **options)
        return sorted(toy.environment_of(f"meets-{seed}")["CUDA_VISIBLE_DEVICES"] for seed in seeds)

    assert gpus(0, 1, gpus_per_run=1) == ["0", "1"]
    assert gpus(2, 3, 4, 5, gpus_per_run=0.5, cpus_per_run=0.5) == ["0", "0", "1", "1"]
    assert gpus(6, gpus_per_run=0) == [""]


@pytest.mark.slow
def test_edited_code_runs_again_and_hides_what_was(toy, session):
    axes = {"seed": [0, 1]}
    assert session(toy, axes) == 2
    notebook_of(toy.notebook, PARAMETERS.format(place=str(toy.place)), CODE.replace("seed**2", "seed + 100"))
    assert sorted(load(toy.folder).table["square"]) == [0, 1]  # of what was swept last
    assert session(toy, axes) == 2
    assert toy.log()["ended ends-0"] == toy.log()["ended ends-1"] == 2
    loaded, everything = toy.flatmin("load", toy.folder), toy.flatmin("load", toy.folder, "--all")
    assert sorted(load(toy.folder).table["square"]) == [100, 101]
    assert loaded.stdout.count("finished") == 2 and "2 runs of other code are left out; --all shows them" in loaded.stderr
    assert everything.stdout.count("finished") == 4 and everything.stderr == ""
    assert len(list(toy.folder.glob("tasks/*"))) == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk(toy, cluster):
    toy.folder.mkdir()
    disk = lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "flatmin-test", toy.folder], capture_output=True, text=True)
    if disk("size=2m").returncode != 0:
        pytest.skip("a small disk cannot be made here")
    try:
        words = ("-p", "what", "['ends', 'fills']", "-p", "seed", "range(2)", "--runs-at-once", 1, "--address", cluster.address)
        driver = toy.start(*words)
        assert toy.to_the_end(driver) == 1
        status = toy.status()
        assert (status["ends-0"], status["ends-1"]) == ("finished", "finished") and {status.get("fills-0"), status.get("fills-1")} <= {"running", "failed", None}
        assert len(load(toy.folder)) == 2
        told = [line for line in driver.err().splitlines() if "fills" in line and "failed" in line and "No space left" in line]
        assert told and "Traceback" not in driver.err()
        full = toy.start(*words)  # nothing has changed
        assert toy.to_the_end(full) == 1
        assert "No space left" in full.err().splitlines()[-1] and "Traceback" not in full.err()
        assert len(load(toy.folder)) == 2
        assert disk("remount,size=64m").returncode == 0
        assert toy.to_the_end(toy.start(*words)) == 0
        assert toy.status() == {"ends-0": "finished", "ends-1": "finished", "fills-0": "finished", "fills-1": "finished"}
        assert toy.log()["begun ends-0"] == toy.log()["begun ends-1"] == 1
    finally:
        subprocess.run(["umount", "-l", toy.folder], check=True)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_ctrl_c_gives_the_memory_of_the_gpu_back(toy):
    torch.cuda.init()
    before = torch.cuda.mem_get_info()[0]
    driver = toy.start("-p", "what", "holds_memory", "--gpus-per-run", 1)
    processes = [*toy.holding(1, "holds_memory-*"), *toy.processes(driver)]
    assert torch.cuda.mem_get_info()[0] < before - 2**29
    interrupted(toy, driver, "SIGINT")
    gone(processes)
    assert toy.to_the_end(driver) == 130
    until(lambda: torch.cuda.mem_get_info()[0] > before - 2**28, "memory as before", 10)


# ---- without Ray ----

def recorded(toy: Toy, seeds: int = 3) -> Sweep:
    "A folder in which runs with these seeds are finished."
    sweep, notebook = Sweep(toy.folder), read_notebook(toy.notebook)
    tasks = [task_of(notebook, {"seed": seed}) for seed in range(seeds)]
    attempt = dict(host="host", pid=1, began="", ended="", seconds=1.0, outcome="finished")
    for task in tasks:
        facts = dict(task=task.name, status="finished", notebook=notebook.name, code=notebook.code, args=task.args, swept=["seed"])
        sweep.write(facts | dict(points=list(task.points), attempts=[attempt], seconds=1.0, error=""))
    assert len(sweep_of(toy.notebook, toy.folder, {"seed": range(seeds)})) == seeds  # nothing is to be done but to write down what is asked for
    return sweep


def to_be_run(toy: Toy, **environment) -> int:
    result = toy.flatmin("sweep", toy.notebook, toy.folder, "-p", "seed", "range(3)", "--dry-run", **environment)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"(\d+) to be run", result.stdout)[1])


def test_a_dry_run_starts_nothing_and_writes_nothing(toy, tmp_path):
    (tmp_path / "ray.py").write_text("raise SystemExit('Ray was imported')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    assert to_be_run(toy, PYTHONPATH=path) == 3
    assert not toy.folder.exists() and not list(toy.scratch.iterdir())
    recorded(toy)
    before = {path: path.read_bytes() for path in toy.folder.rglob("*") if path.is_file()}
    assert to_be_run(toy, PYTHONPATH=path) == 0
    assert {path: path.read_bytes() for path in toy.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"status": "finished"}', b'{"task": "TASK", "status": "finished"}', b'{"task": "TASK", "status": ["finished"]}',
                                     b'{"task": "TASK", "status": "perfect"}'])  # fmt: skip
def test_a_record_that_is_damaged_counts_as_no_run(content, toy):
    sweep = recorded(toy)
    path = sorted(toy.folder.glob("tasks/*/task.json"))[1]
    path.write_bytes(content.replace(b"TASK", path.parent.name.encode()))
    assert to_be_run(toy) == 1
    assert len(load(toy.folder)) == 2 and len(load(toy.folder).table) == 2
    assert standing(load(toy.folder)) == {"finished": 2, "waiting": 1}
    assert len(load(toy.folder, all=True)) == 2
    assert sweep.record(path.parent.name)["status"] == "waiting"


def test_half_of_a_record_counts_as_no_run(toy):
    recorded(toy)
    path = sorted(toy.folder.glob("tasks/*/task.json"))[1]
    path.write_bytes(path.read_bytes()[:-20])
    assert to_be_run(toy) == 1 and len(load(toy.folder)) == 2


def test_names_of_tasks_lead_nowhere_else(toy):
    "A record is looked for in the folder alone, whatever sweep.json and the names of folders say."
    sweep = recorded(toy)
    inside = next(toy.folder.glob("tasks/*"))
    for name in ("../../evil", "evil", "../" + "0" * 20):
        record = json.loads((inside / "task.json").read_text()) | {"task": name, "points": ["a" * 20]}
        (toy.folder / "tasks" / name).mkdir(parents=True)
        write_json(toy.folder / "tasks" / name / "task.json", record)
    asked = json.loads((toy.folder / "sweep.json").read_text())
    write_json(toy.folder / "sweep.json", asked | {"tasks": ["../../evil", "../" + "0" * 20, "evil", *asked["tasks"]]})
    runs = load(toy.folder, all=True)
    assert len(runs) == 3 and {run["folder"].parent for run in runs} == {toy.folder / "tasks"}
    assert {record["task"] for record in sweep.records()} == set(asked["tasks"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"notebook": "toy.ipynb"}'])
def test_a_damaged_plan_is_one_line(content, toy):
    recorded(toy)
    (toy.folder / "sweep.json").write_text(content)
    result = toy.flatmin("load", toy.folder)
    assert result.returncode == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ") and "holds no sweep" in result.stderr


def test_two_configurations_never_share_a_folder(tmp_path):
    notebook = read_notebook(notebook_of(tmp_path / "any.ipynb", "x: object = 0\ny: object = 0\nout: str = ''", "print(x)"))
    values = [0, 0.0, -0.0, 1, 1.0, True, False, None, "", "0", "1", "1.0", "True", "true", "None", "null", "inf", math.inf, "-inf", -math.inf, "nan", math.nan,
              [], [1], ["1"], "[1]", [[1]], [1, 2], [12], {}, {"a": 1}, {"a": "1"}, "a", "A", " a", "a ", "\u00e9", "e\u0301", "../a", "a\n"]  # fmt: skip
    asked = [{name: value} for name in "xy" for value in values] + [{"x": 1, "y": 2}, {"x": 2, "y": 1}, {}]
    names = [identity(notebook, what) for what in asked]
    twins = [(asked[i], asked[j]) for i, j in combinations(range(len(asked)), 2) if names[i] == names[j]]
    assert twins == []
    assert all(re.fullmatch("[0-9a-f]{20}", name) for name in names)


def test_the_order_of_parameters_does_not_matter(tmp_path):
    notebook = read_notebook(notebook_of(tmp_path / "any.ipynb", "x: int = 0\ny: int = 0", "print(x)"))
    assert identity(notebook, {"x": 1, "y": 2}) == identity(notebook, {"y": 2, "x": 1})


def test_a_default_that_is_edited_is_another_run(tmp_path):
    cells = "x: int = 0\ny: int = {}", "print(x)"
    first, second = (read_notebook(notebook_of(tmp_path / "any.ipynb", cells[0].format(y), cells[1])) for y in (0, 1))
    assert identity(first, {"x": 1}) != identity(second, {"x": 1})


class LostWorkers:
    "In place of a cluster: workers that are lost before they can say how their run ended."

    slots, session, wanted = 2, "session", {"CPU": 1, "GPU": 0}

    def __init__(self, status: str):
        self.status, self.started = status, 0

    def start(self, path: str, record: dict, asked: dict, **keywords) -> int:
        attempts = Sweep(Path(path)).record(record["task"]).get("attempts", [])
        attempt = dict(host="host", pid=1, began="", ended="", seconds=0.0, outcome=self.status)
        Sweep(Path(path)).write(record | dict(status=self.status, attempts=[*attempts, attempt]))
        self.started += 1
        return self.started

    def ended(self, references: list, seconds: float, count: int = 1) -> list:
        return list(references)

    def result(self, reference: int) -> str:
        return "WorkerCrashedError: it is gone"


@pytest.mark.parametrize("status, starts, at_last", [("finished", 1, "finished"), ("diverged", 1, "diverged"), ("running", 3, "failed")])
def test_a_worker_that_is_lost_just_after_its_run_ended(status, starts, at_last, toy):
    notebook, sweep = read_notebook(toy.notebook), Sweep(toy.folder)
    workers = Workers(sweep, notebook, ["seed"], retries=2)
    workers.cluster = LostWorkers(status)
    workers.submit(task := task_of(notebook, {"seed": 1}))
    records = [record for _ in range(starts) for record in workers.wait()]
    assert workers.cluster.started == starts and not workers.in_flight
    assert [record["status"] for record in records] == [at_last] == [sweep.record(task.name)["status"]]


def test_what_ended_in_the_meantime_does_not_run_again(toy):
    "The worker of a driver that was killed may finish its run while the next driver has it on its list."
    sweep, notebook = recorded(toy), read_notebook(toy.notebook)
    task = task_of(notebook, {"seed": 1})
    record = dict(sweep.record(task.name), status="waiting", attempts=[], seconds=0.0)
    for _ in range(2):  # and the folder is free again
        result = run_task(str(toy.folder), record, task.asked, session="session", takes_out=True, cwd=str(toy.place), environment={}, package=package_code())
        assert result == sweep.record(task.name) and result["status"] == "finished" and len(result["attempts"]) == 1
    assert toy.log() == {}
    module._put_down(sweep, record | {"status": "cancelled"})  # by a driver that had not heard of it
    assert result == sweep.record(task.name)


def held(folder: Path) -> subprocess.Popen:
    "Another process that holds a folder's lock."
    holds = "import sys, time; from pathlib import Path; from flatmin_nb.lab.files import claimed; lock = claimed(Path(sys.argv[1])); print(flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", holds, folder], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


class Here:
    "In place of a cluster: run_task in this process, with a function of the task's folder in place of a kernel."

    slots, session, wanted = 1, "session", {"CPU": 1, "GPU": 0}

    def __init__(self, monkeypatch, run: Callable[[Path], None]):
        self.starts, self.records = 0, []

        def execute(notebook, asked, folder, **_) -> tuple[str, str]:
            self.starts += 1
            try:
                run(folder)
            except (OneLineError, OSError) as error:
                return "failed", f"{type(error).__name__}: {error}"
            return "finished", ""

        monkeypatch.setattr(module, "_marked_worker", lambda session: (f"{session}/", None))
        monkeypatch.setattr(module, "execute", execute)

    def start(self, *arguments, **keywords) -> int:
        self.records.append(run_task(*arguments, **keywords))
        return len(self.records) - 1

    def ended(self, references: list, seconds: float, count: int = 1) -> list:
        return list(references)

    def result(self, reference: int) -> dict:
        return self.records[reference]


def worked(toy: Toy, monkeypatch, run: Callable[[Path], None], before: Callable[[Path], None] = lambda folder: None, retries: int = 0) -> SimpleNamespace:
    "What becomes of a task in whose folder there is something."
    notebook, sweep = read_notebook(toy.notebook), Sweep(toy.folder)
    task = task_of(notebook, {"seed": 1})
    folder = sweep.folder(task.name)
    folder.mkdir(parents=True)
    write_json(sweep.path / "sweep.json", {})
    before(folder)
    cluster, workers = Here(monkeypatch, run), Workers(sweep, notebook, ["seed"], retries=retries)
    workers.cluster = cluster
    workers.submit(task)
    records = []
    while workers.in_flight:
        records += workers.wait()
    return SimpleNamespace(record=records[0], disk=sweep.record(task.name), folder=folder, starts=cluster.starts)


def checkpoint_in(folder: Path) -> None:
    "What an attempt leaves that was killed: a run that is finished, and one that could be gone on with."
    Run(folder / "out" / "sgd", {"seed": 1}).finish(None, None)
    run = Run(folder / "out" / "adam", {"seed": 1})
    run.save_checkpoint({"steps": 2})
    run._lock.release(force=True)


def test_what_a_run_cannot_go_on_from_is_set_aside(toy, monkeypatch):
    came = worked(toy, monkeypatch, lambda folder: Run(folder / "out" / "sgd", {"seed": 1}).finish(None, None), checkpoint_in)
    assert came.record["status"] == "finished" and came.starts == 2
    assert (came.folder / "out.old-1" / "adam" / "checkpoint.pt").exists() and not (came.folder / "out" / "adam").exists()


def no_folder(folder: Path) -> None:
    (folder / "file").touch()
    Run(folder / "file" / "data", {})


def in_use(folder: Path) -> None:
    process = held(folder / "out" / "adam")
    try:
        Run(folder / "out" / "adam", {"seed": 1})
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("run, starts, outcome, said", [(no_folder, 1, "failed", "cannot be written"), (in_use, 2, "died", "another process is writing")])
def test_any_other_trouble_with_a_folder_leaves_checkpoints_where_they_are(run, starts, outcome, said, toy, monkeypatch):
    came = worked(toy, monkeypatch, run, checkpoint_in, retries=1)
    assert came.record["status"] == came.disk["status"] == "failed" and said in came.record["error"]
    assert came.starts == starts and outcomes(came.disk) == [outcome] * starts
    assert (came.folder / "out" / "adam" / "checkpoint.pt").exists() and not (came.folder / "out.old-1").exists()


@pytest.mark.parametrize("says", ["running", "finished"])
def test_the_record_of_a_task_that_another_process_holds_is_left_alone(says, toy, monkeypatch):
    holder = []

    def owned(folder: Path) -> None:
        record = module._begun(task_of(read_notebook(toy.notebook), {"seed": 1}), read_notebook(toy.notebook), ["seed"])
        attempt = dict(host="other", pid=1, began="", ended="", seconds=0.0, outcome=says)
        holder.append(held(folder))
        write_json(folder / "task.json", record | dict(status=says, attempts=[attempt]))

    assert module._claimed_in_time.__defaults__[0] > PATIENCE  # what held it may be waiting for its guardian
    monkeypatch.setattr(module, "_claimed_in_time", partial(module._claimed_in_time, seconds=0.3))
    try:
        came = worked(toy, monkeypatch, lambda folder: None, owned, retries=1)
    finally:
        holder[0].kill()
        holder[0].wait()
    assert came.starts == 0 and came.disk["status"] == says and outcomes(came.disk) == [says]
    if says == "running":
        assert came.record["status"] == "failed" and "died 2 times, at last of another process is writing to the run folder" in came.record["error"]
    else:
        assert came.record == came.disk


def test_a_package_that_is_edited_during_a_run_is_no_result(toy, monkeypatch, tmp_path):
    package = copied_package(tmp_path)
    monkeypatch.setattr(flatmin_nb, "__file__", str(package / "__init__.py"))

    def edits(folder: Path) -> None:
        Run(folder / "out", {"seed": 1}).finish(None, None)
        edit(folder)

    def edit(folder: Path) -> None:
        with open(package / "lab" / "scaling.py", "a") as file:
            file.write("\nEDITED = True\n")

    with pytest.raises(SweepError, match=r"was edited during a run, so its result, which is kept in '.*out\.old-1', may be of either code"):
        worked(toy, monkeypatch, edits)
    [folder] = toy.folder.glob("tasks/*")
    assert Sweep(toy.folder).record(folder.name)["status"] == "failed" and not (folder / "out").exists() and (folder / "out.old-1" / "run.json").exists()
    shutil.rmtree(toy.folder)
    with pytest.raises(SweepError, match="is not the code that this sweep began with"):
        worked(toy, monkeypatch, edits, before=edit)
    [folder] = toy.folder.glob("tasks/*")
    assert not (folder / "out").exists()  # it was not run
    shutil.rmtree(toy.folder)
    assert worked(toy, monkeypatch, lambda folder: None).disk["status"] == "finished"  # of the new code


def test_no_sweep_without_a_guardian(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named flatmin_nb' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setattr(module, "_ray", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(SweepError, match=r"no guardian can be started \(ModuleNotFoundError: No module named flatmin_nb\)"), Cluster():
        pass


def ray_of(monkeypatch, machines: list[dict], knows: bool = True) -> list[str | None]:
    "In place of Ray, which was imported before: the tokens that it has read."
    read, alive = [], [dict(Alive=True, Resources=machine) for machine in machines]
    ray, raylet = ModuleType("ray"), ModuleType("ray._raylet")
    ray.is_initialized, ray.nodes, ray.remote = lambda: False, lambda: alive, lambda **_: lambda function: function
    raylet.Config = SimpleNamespace(initialize=lambda text: None)
    raylet.AuthenticationTokenLoader = SimpleNamespace(instance=lambda: SimpleNamespace(reset_cache=lambda: read.append(os.environ.get("RAY_AUTH_TOKEN"))))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray._raylet", raylet if knows else None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the cluster")
    monkeypatch.setattr(module, "guarded", lambda mark: nullcontext())
    monkeypatch.setattr(module, "_ray", lambda address, mark: nullcontext((ray, not address)))
    return read


def test_a_token_ends_with_its_cluster(monkeypatch, capsys):
    read = ray_of(monkeypatch, [])
    with module._variables(""):
        mine = os.environ["RAY_AUTH_TOKEN"]
        assert len(mine) == 64 and read[-1] == mine
    assert os.environ["RAY_AUTH_TOKEN"] == read[-1] == "of the cluster"
    with module._variables("10.0.0.1:6379"):
        assert os.environ["RAY_AUTH_TOKEN"] == read[-1] == "of the cluster" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert capsys.readouterr().err == ""


def test_a_token_that_cannot_be_set_is_told(monkeypatch, capsys):
    ray_of(monkeypatch, [], knows=False)
    with module._variables(""):
        assert os.environ["RAY_AUTH_TOKEN"] == "of the cluster"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("Ray was imported before the sweep and takes no token any more")


@pytest.mark.parametrize("machines, waits", [([{"CPU": 8}], True), ([{"CPU": 8}, {"GPU": 1}], True), ([{"CPU": 8}, {"CPU": 1, "GPU": 1}], False)])
def test_what_a_cluster_has_not_got_yet_is_told(machines, waits, monkeypatch, capsys):
    ray_of(monkeypatch, machines)
    with Cluster(address="10.0.0.1:6379", gpus_per_run=1):
        pass
    assert capsys.readouterr().err == "no machine of the cluster has CPU: 1, GPU: 1 yet; waiting for one\n" * waits


def test_who_drives_is_told_and_the_next_may_when_it_is_gone(toy):
    sweep = Sweep(toy.folder)
    with driven(sweep):
        assert is_driven(sweep)
        with pytest.raises(FolderError, match=f"is being swept by process {os.getpid()} on .* since .*; wait for it") as error, driven(Sweep(toy.folder)):
            pass
        assert "\n" not in str(error.value) and is_driven(sweep)
    assert not is_driven(sweep)
    with driven(sweep):
        pass
