"""lab.search: what is refused, what TPE and successive halving do, and that a kill at any moment changes nothing."""
import json
import math
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

from flatmin_nb.lab.commands import app
from flatmin_nb.lab.grids import Parameter, SweepError
from flatmin_nb.lab.search import (
    SearchError,
    check_measure,
    constraint,
    dimension,
    found,
    mended,
    reported,
    reports,
    row_of,
    search,
    search_figures,
    seed_of,
    surrogate_check,
    surrogate_said,
)
from flatmin_nb.lab.sweep import plan
from flatmin_nb.lab.tasks import load, write_json
from typer.testing import CliRunner

CELL = 'u: float = 0.5\nv: float = 0.5\nL: int = 20\nschedule: str = "linear"\nout: str = ""'


def notebook_in(folder: Path, *code: str, name: str = "toy.ipynb", parameters: str = CELL) -> Path:
    cell = lambda source, tags: dict(cell_type="code", id=f"c{len(source)}{len(tags)}", metadata={"tags": tags}, source=source, outputs=[], execution_count=None)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    cells = [cell(parameters, ["parameters"]), *(cell(source, []) for source in code or ("print(u, v)",))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return folder / name


# ---- a double of lab.sweep.Workers: tasks run in this process, a row of their history at each wait ----

class Killed(BaseException):
    "As if the process were gone."


class Fake:
    "Workers whose runs are functions: of the parameters, the rows of the history and the numbers at the end; status and rows may be anything."

    def __init__(self, run, *, slots=2, order=None, ticks=1):
        self.run, self.room, self.order, self.ticks = run, slots, order or random.Random(0), ticks
        self.ended, self.steps, self.submitted = Counter(), Counter(), Counter()  # by task

    def __call__(self, sweep, notebook, swept, *, at_once=0, **options):
        self.sweep, self.notebook, self.swept, self.in_flight, self.over = sweep, notebook, list(swept), {}, []
        self.slots = min(self.room, at_once or self.room)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in self.in_flight:
            if (record := self.sweep.record(name))["status"] == "running":
                self.sweep.write(record | {"status": "cancelled"})

    def record(self, task, status, error=""):
        return dict(task=task.name, status=status, notebook=self.notebook.name, code=self.notebook.code, args=task.args, swept=self.swept,
                    points=list(task.points), attempts=[], seconds=1.0, error=error)  # fmt: skip

    def submit(self, task):
        assert task.name not in self.in_flight, "the same task twice at once"
        assert self.sweep.record(task.name)["status"] != "finished", "a finished task again"
        self.submitted[task.name] += 1
        self.in_flight[task.name] = task

    def stop(self, task):
        self.over.append(self.record(task, "stopped"))
        self.sweep.write(self.over[-1])
        del self.in_flight[task.name]

    def wait(self, seconds=0.3):
        running = list(self.in_flight.values())[: self.slots]
        self.order.shuffle(running)
        for task in running[: self.ticks] if self.ticks else running:
            self.advance(task)
        over, self.over = self.over, []
        return over

    def advance(self, task):
        rows, summary, *status = self.run(**task.args)
        out = self.sweep.folder(task.name) / "out"
        out.mkdir(parents=True, exist_ok=True)
        done = len((out / "history.csv").read_text().splitlines()) - 1 if (out / "history.csv").exists() else 0
        if done < len(rows):
            self.steps[task.name] += 1
            pd.DataFrame(rows[: done + 1]).to_csv(out / "history.csv", index=False)
            self.sweep.write(self.record(task, "running"))
            return
        status = status[0] if status else "finished"
        several = summary if isinstance(summary, list) else [summary]
        for number, facts in enumerate(several):
            folder = out / str(number) if len(several) > 1 else out
            folder.mkdir(exist_ok=True)
            write_json(folder / "run.json", dict(status=status, parameters={}, summary=facts, versions={}))
        self.over.append(self.record(task, status, "boom" * (status == "failed")))
        self.sweep.write(self.over[-1])
        self.ended[task.name] += 1
        del self.in_flight[task.name]


SQUARE = dict(u="uniform(0, 1)", v="uniform(0, 1)")


def toy(u, v, **_):
    "Least v - u on a disc: at (1, -1) / sqrt 8 from the middle."
    return [], dict(density=v - u, distance=math.hypot(u - 0.5, v - 0.5))


def ask(folder, run=toy, space=SQUARE, *, fake=None, **options):
    options = dict(metric="density", sampler="random", trials=12) | options
    return search(notebook_in(folder.parent / "nb"), folder, space, workers=fake or Fake(run), **options)


def without_tasks(table):
    return table.drop(columns="task")


# ---- what is searched ----

L, LR, WORD, ANY = Parameter("L", int, 20), Parameter("lr", float, 0.1), Parameter("schedule", str, "linear"), Parameter("x")


@pytest.mark.parametrize(
    "parameter, text, kind, values",
    [
        (LR, "loguniform(1e-3, 1)", "loguniform", (0.001, 1.0)),
        (LR, " uniform( 0, 0.5 ) ", "uniform", (0.0, 0.5)),
        (LR, "uniform(-1, +1)", "uniform", (-1.0, 1.0)),
        (L, "integers(1, 40)", "integers", (1, 40)),
        (L, "logintegers(1, 1000)", "logintegers", (1, 1000)),
        (L, "[5, 10, 20]", "choice", (5, 10, 20)),
        (L, "range(3)", "choice", (0, 1, 2)),
        (L, "7", "choice", (7,)),
        (L, [5, 10], "choice", (5, 10)),
        (L, 7, "choice", (7,)),
        (LR, "[0.1, 0.2]", "choice", (0.1, 0.2)),
        (WORD, "choice('exponential', 'linear')", "choice", ("exponential", "linear")),
        (WORD, "linear", "choice", ("linear",)),
        (Parameter("b", bool, True), "choice(True, False)", "choice", (True, False)),
        (Parameter("widths", list[int], [1]), "choice([300, 100], [100])", "choice", ([300, 100], [100])),
        (ANY, "choice(None, 1, 'a')", "choice", (None, 1, "a")),
    ],
)
def test_texts_that_are_a_space(parameter, text, kind, values):
    one = dimension(parameter, text)
    assert (one.name, one.kind, one.values) == (parameter.name, kind, values)
    assert [type(value) for value in one.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    "parameter, text, said",
    [
        (LR, "loguniform(0, 1)", "above 0"),
        (LR, "loguniform(-1, 1)", "above 0"),
        (LR, "uniform(1, 1)", "from the lower end to the higher"),
        (LR, "uniform(1, 0)", "from the lower end to the higher"),
        (LR, "uniform(0, 1e999)", "two numbers"),
        (LR, "uniform(0, True)", "two numbers"),
        (LR, "uniform(0, 1, 2)", "two numbers"),
        (LR, "uniform('a', 'b')", "two numbers"),
        (LR, "uniform(low=0, high=1)", "values as they are"),
        (LR, "uniform(0, 2 * 3)", "values as they are"),
        (LR, "uniform(*[0, 1])", "values as they are"),
        (LR, "uniform(0, exit())", "values as they are"),
        (LR, "choice(open('x', 'w'))", "values as they are"),
        (LR, "choice()", "values as they are"),
        (LR, "loguni(1e-3, 1)", "loguni"),
        (LR, "().__class__.__bases__", "lr"),
        (L, "uniform(1, 40)", "does not take"),
        (L, "integers(1.0, 40)", "whole numbers"),
        (L, "integers(0.5, 40)", "whole numbers"),
        (L, "logintegers(0, 40)", "above 0"),
        (L, "choice(1, 2.5)", "L"),
        (L, "choice(1, 1)", "twice"),
        (L, "choice(1, True)", "L"),
        (WORD, "uniform(0, 1)", "takes text"),
        (WORD, "integers(0, 5)", "takes text"),
        (LR, "(" * 500, "lr"),
        (LR, "uniform(" + "0" * 20_000 + ", 1)", "lr"),
    ],
)
def test_texts_that_are_none(parameter, text, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SearchError, SweepError), match=".*".join(said.split("."))) as caught:
        dimension(parameter, text)
    assert "\n" not in str(caught.value) and parameter.name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("space, said", [
    ({"w": "uniform(0, 1)"}, "no parameter 'w'"),
    ({"out": "choice('a', 'b')"}, "'out' is the sweep's"),
    ({"u": "0.5"}, "nothing is searched"),
    ({}, "nothing is searched"),
    ({"u": "uniform(0, 1)", "M": "1"}, "no parameter 'M'"),
])  # fmt: skip
def test_spaces_that_do_not_fit_the_notebook(tmp_path, space, said):
    with pytest.raises((SearchError, SweepError), match=said):
        ask(tmp_path / "s", space=space)
    assert not (tmp_path / "s").exists()  # nothing was begun


def test_a_parameter_of_one_value_is_not_searched(tmp_path):
    given = []
    result = ask(tmp_path / "s", lambda **args: given.append(args["L"]) or toy(**args), SQUARE | {"L": 7, "schedule": "cosine"}, trials=3)
    assert result.question["fixed"] == {"L": 7, "schedule": "cosine"} and result.question["space"].keys() == {"u", "v"} and set(given) == {7}


def test_every_kind_of_dimension_reaches_the_notebook_with_its_type(tmp_path):
    given = []
    space = dict(u="loguniform(1e-3, 1)", v="choice(0, 1)", L="logintegers(1, 1000)", schedule="choice('exponential', 'linear')")

    def run(**args):
        given.append(args)
        return [], dict(density=args["u"])

    result = search(notebook_in(tmp_path), tmp_path / "s", space, metric="density_", sampler="random", trials=30, workers=Fake(lambda **args: ([], dict(density_=run(**args)[1]["density"] ** 2))))
    assert {type(args["u"]) for args in given} == {float} and {type(args["L"]) for args in given} == {int} and {type(args["v"]) for args in given} == {float}
    assert {args["schedule"] for args in given} == {"exponential", "linear"}
    assert all(1e-3 <= args["u"] <= 1 and 1 <= args["L"] <= 1000 for args in given)
    assert 5 < sum(args["L"] < 32 for args in {json.dumps(args): args for args in given}.values()) < 25  # half of the logarithmic scale, not 3 %
    assert list(result.table.columns) == ["number", "state", "u", "v", "L", "schedule", "density_", "feasible", "task"]
    assert result.table["L"].between(1, 1000).all()


# ---- constraints ----

@pytest.mark.parametrize("text, column, sign, bound", [("val_error <= 0.08", "val_error", "<=", 0.08), ("bits>=-1e1", "bits", ">=", -10.0), (" a  >=  .5 ", "a", ">=", 0.5)])
def test_constraints(text, column, sign, bound):
    one = constraint(text)
    assert (one.column, one.sign, one.bound) == (column, sign, bound)
    inside, outside = (bound - 1, bound + 1) if sign == "<=" else (bound + 1, bound - 1)
    assert one.violation(inside) == -1 and one.violation(bound) == 0 and one.violation(outside) == 1 and one.violation(math.nan) == math.inf
    assert constraint(str(one)) == one


@pytest.mark.parametrize("text", ["a < 1", "a == 1", "a <= b", "0 <= a <= 1", "a <= 1 <= 2", "a <=", "<= 1", "a <= nan", "a <= inf", "a <= 1e999", "a <= 1_0", "a <= 0x1", "", "a\n<= 1\nb <= 2", "a <= --1", "a b <= 1"])
def test_constraints_that_are_none(text):
    with pytest.raises(SearchError, match="^--constraint") as caught:
        constraint(text)
    assert len(str(caught.value).splitlines()) == 1


# ---- what may be selected by ----

@pytest.mark.parametrize("column, said", [
    ("lr", "is a parameter"), ("lr_", "is a parameter"),
    ("train_loss", "what training minimises"), ("loss", "what training minimises"), ("alpha_loss", "what training minimises"), ("objective", "what training minimises"),
    ("elbo", "what training minimises"), ("kl", "what training minimises"), ("final_kl", "what training minimises"), ("train_loss_penalised", "what training minimises"), ("penalized_loss", "what training minimises"),
    ("late_train_loss", "what training minimises"),
    ("test_error", "test images"), ("best_test_error", "test images"), ("test_loss", "test images"), ("test_err", "test images"), ("pruned_error", "test images"), ("error", "test images"), ("err", "test images"),
])  # fmt: skip
@pytest.mark.parametrize("role", ["metric", "constraint", "report"])
def test_columns_that_select_badly_are_refused_by_name(tmp_path, column, said, role):
    options = dict(metric="val_error")
    options |= dict(metric=column) if role == "metric" else dict(constraints=[f"{column} <= 1"]) if role == "constraint" else dict(report=column, stopping="asha")
    notebook = notebook_in(tmp_path, parameters="lr: float = 0.1")
    with pytest.raises(SearchError, match=said) as caught:
        search(notebook, tmp_path / "s", {"lr": "loguniform(1e-3, 1)"}, workers=Fake(toy), **options)
    assert str(caught.value).startswith(f"--{role} {column!r}") and "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("column", ["val_error", "val_loss", "structured_factor", "bits_factor", "latest", "attestation", "seconds", "clean_train_loss", "train_error", "backlog", "gradient_evaluations"])
def test_columns_that_mean_the_same_in_every_trial(column):
    check_measure(column, "--metric", ["lr", "L"])


def test_the_test_set_only_when_one_insists_and_it_is_written_down(tmp_path):
    run = lambda u, **_: ([], dict(test_error=abs(u - 0.3)))
    with pytest.raises(SearchError, match="-p validation 0.2 --metric val_error"):
        ask(tmp_path / "s", run, metric="test_error")
    assert len(ask(tmp_path / "s", run, metric="test_error", on_test=True).table) == 12
    assert json.loads((tmp_path / "s" / "search.json").read_text())["question"]["on_test"] is True
    assert found(tmp_path / "s").question["on_test"] is True
    with pytest.raises(SearchError, match="what training minimises"):
        ask(tmp_path / "t", run, metric="train_loss", on_test=True)


def test_a_copy_of_a_parameter_under_another_name_stops_the_search(tmp_path):
    with pytest.raises(SearchError, match="equals the parameter 'u' in all 3 trials"):
        ask(tmp_path / "s", lambda u, v, **_: ([], dict(step_size=u)), metric="step_size", at_once=1)
    assert len(ask(tmp_path / "t", lambda u, v, **_: ([], dict(step_size=u if u < 0.9 else 1.0)), metric="step_size", trials=2).table) == 2


# ---- which row ----

ROWS = [dict(run=name, method=name, seed=0, val_error=error, good=True) for name, error in (("sgd", 0.09), ("entropy_sgd", 0.07))]


@pytest.mark.parametrize("where, column, said", [
    ({}, "val_error", "2 rows with a column 'val_error'.*--where method="),
    ({"seed": "0"}, "val_error", "2 rows"),
    ({"method": "adam"}, "val_error", "there are sgd, entropy_sgd"),
    ({"methods": "sgd"}, "val_error", "did you mean 'method'"),
    ({"method": "sgd", "seed": "1"}, "val_error", "there are 0"),
    ({"method": "sgd"}, "error", "no column 'error'; it has seed, val_error"),
])  # fmt: skip
def test_rows_that_are_not_one(where, column, said):
    with pytest.raises(SearchError, match=said):
        row_of(ROWS, where, column)


@pytest.mark.parametrize("where", [{"method": "sgd"}, {"method": "sgd", "seed": "0"}, {"method": "sgd", "seed": "0.0"}, {"run": "sgd", "good": "True"}, {"val_error": "9e-2"}])
def test_the_row_that_is_meant(where):
    assert row_of(ROWS, where, "val_error") is ROWS[0]


def test_several_records_of_a_run(tmp_path):
    run = lambda u, v, **_: ([], [dict(method="sgd", val_error=u), dict(method="adam", val_error=u + v)])
    with pytest.raises(SearchError, match="2 rows with a column 'val_error'.*--where method=sgd"):
        ask(tmp_path / "s", run, metric="val_error")
    fake = Fake(run)
    result = ask(tmp_path / "s", run, metric="val_error", where=["method=adam"], fake=fake)  # no trial had ended, so the question is put right
    assert np.allclose(result.table["val_error"], result.table["u"] + result.table["v"])
    assert sum(fake.ended.values()) < 12  # what had finished under the first question was not run again
    with pytest.raises(SearchError, match=r"holds a search with where = \['method=adam'\], not \['method=sgd'\]"):
        ask(tmp_path / "s", run, metric="val_error", where=["method=sgd"])
    with pytest.raises(SearchError, match="--where 'method'"):
        ask(tmp_path / "t", run, metric="val_error", where=["method"])


@pytest.mark.parametrize("constraints", [[], ["distance <= 1"]])
def test_a_column_that_no_run_has(tmp_path, constraints):
    fake = Fake(toy)
    with pytest.raises(SearchError, match="no column 'nothing'; it has density, distance"):
        ask(tmp_path / "s", fake=fake, metric="density" if constraints else "nothing", constraints=[*constraints, "nothing <= 1"])
    assert sum(fake.ended.values()) == 1  # after the first, not the twelfth


def test_a_column_that_holds_no_number(tmp_path):
    with pytest.raises(SearchError, match="column 'density' holds 'thin', which is no number"):
        ask(tmp_path / "s", lambda **_: ([], dict(density="thin")))


# ---- satisficing ----

def test_the_best_is_feasible_or_there_is_none(tmp_path):
    bars = ["distance <= 0.25"]
    result = ask(tmp_path / "s", constraints=bars, trials=40)
    table, best = result.table, result.best
    inside = np.hypot(table["u"] - 0.5, table["v"] - 0.5) <= 0.25
    assert table["feasible"].tolist() == inside.tolist() and 0 < inside.sum() < 40
    assert best["density"] == table["density"][inside].min() > table["density"].min()  # the lowest of all is not feasible
    assert ask(tmp_path / "s", constraints=bars, trials=40).best == best
    none = ask(tmp_path / "t", constraints=["distance <= -1"])
    assert none.best is None and not none.table["feasible"].any() and "none feasible" in repr(none)


def test_the_best_of_what_is_to_be_large(tmp_path):
    result = ask(tmp_path / "s", constraints=["distance <= 0.25"], trials=40, direction="maximize")
    inside = result.table["distance"] <= 0.25
    assert result.best["density"] == result.table["density"][inside].max() < result.table["density"].max()


OPTIMUM = -0.25 * math.sqrt(2)  # of v - u on a disc of radius 0.25


def best_of(folder, sampler, seed):
    best = ask(folder, sampler=sampler, seed=seed, trials=50, constraints=["distance <= 0.25"], at_once=1).best
    return best["density"] - OPTIMUM if best else 1.0


@pytest.mark.slow
def test_tpe_finds_the_constrained_optimum_and_beats_chance(tmp_path):
    tpe, chance = ([best_of(tmp_path / f"{sampler}{seed}", sampler, seed) for seed in range(5)] for sampler in ("tpe", "random"))
    assert all(0 <= gap for gap in (*tpe, *chance))
    assert np.mean(tpe) < 0.05 and max(tpe) < 0.1, tpe
    assert np.mean(tpe) < 0.5 * np.mean(chance), (tpe, chance)


def test_tpe_is_told_of_constraints(tmp_path):
    "In Optuna's own words: what it counts as a violation is what our bound says."
    ask(tmp_path / "s", sampler="tpe", constraints=["distance <= 0.25", "density >= -0.1"], trials=14)
    log = [json.loads(line) for line in (tmp_path / "s" / "study.log").read_text().splitlines()]
    told = [line["system_attr"] for line in log if "system_attr" in line and any(key.startswith("constraints") for key in line["system_attr"])]
    assert len(told) == 28
    table = found(tmp_path / "s").table
    beyond = [value for one in told for key, value in one.items() if "distance" in key]
    assert sorted(beyond) == sorted((table["distance"] - 0.25).tolist())


# ---- the order of things, and kills ----

def test_random_search_asks_the_same_in_any_order(tmp_path):
    tables = [without_tasks(ask(tmp_path / str(number), fake=Fake(toy, slots=slots, order=random.Random(number))).table) for number, slots in enumerate((1, 2, 5, 12))]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    other = ask(tmp_path / "other", seed=1).table
    assert not set(other["u"]) & set(tables[0]["u"])
    assert not set(tables[0]["u"]) & set(tables[0]["v"])  # each parameter has draws of its own
    longer = ask(tmp_path / "0", trials=20).table
    pd.testing.assert_frame_equal(without_tasks(longer)[:12], tables[0])
    assert len(longer) == 20 and len(set(longer["u"])) == 20


def curves(u, v, **_):
    return [dict(epoch=epoch, density=v - u + 1 / epoch) for epoch in (1, 2)], dict(density=v - u, distance=math.hypot(u - 0.5, v - 0.5))


class Kill:
    "Makes the k-th thing that the driver does the last: before it, after it, or, of a line of the journal, in its middle."

    def __init__(self, monkeypatch, fake, at, torn):
        self.count, self.at, self.torn = 0, at, torn
        backend = optuna.storages.journal.JournalFileBackend
        self.append = backend.append_logs
        monkeypatch.setattr(backend, "append_logs", lambda this, logs: self.event(lambda: self.append(this, logs), lambda: self.half(this, logs)))
        for name in ("submit", "wait", "stop"):
            method = getattr(Fake, name)
            monkeypatch.setattr(fake, name, lambda *arguments, method=method: self.event(lambda: method(fake, *arguments)), raising=False)

    def event(self, do, half=None):
        self.count += 1
        if self.count == self.at and self.torn == "before":
            raise Killed
        if self.count == self.at and self.torn == "within" and half:
            half()
            raise Killed
        value = do()
        if self.count == self.at:
            raise Killed
        return value

    def half(self, backend, logs):
        with open(backend._file_path, "ab") as file:
            file.write(json.dumps(logs[0]).encode()[:20])
        Path(backend._file_path + ".lock").touch()  # it died with Optuna's lock in its hand


def undisturbed(tmp_path, **options):
    fake = Fake(curves, order=random.Random(1))
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(patch, fake, -1, "")
        table = ask(tmp_path / "undisturbed", fake=fake, trials=5, constraints=["distance <= 0.4"], **options).table
    return table, kill.count


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["before", "within", "after"])
def test_a_kill_at_any_event_changes_nothing(tmp_path, torn):
    expected, events = undisturbed(tmp_path)
    assert events > 60
    for at in range(1, events + 1):
        folder = tmp_path / f"{torn}{at}"
        fake = Fake(curves, order=random.Random(1))
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, fake, at, torn)
            with pytest.raises(Killed):
                ask(folder, fake=fake, trials=5, constraints=["distance <= 0.4"])
        after = ask(folder, fake=fake, trials=5, constraints=["distance <= 0.4"])
        pd.testing.assert_frame_equal(after.table, expected)
        assert fake.ended == Counter(dict.fromkeys(expected["task"], 1))  # each ran to its end once
        assert max(fake.steps.values()) == 2  # and what had begun went on where it was
        assert len((folder / "study.log").read_text().splitlines()) == len([json.loads(line) for line in (folder / "study.log").read_text().splitlines()])


def test_many_kills_in_a_row(tmp_path):
    expected, _ = undisturbed(tmp_path)
    fake, kills = Fake(curves, order=random.Random(1)), 0
    for _ in range(60):
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, fake, 9, "after")
            try:
                table = ask(tmp_path / "s", fake=fake, trials=5, constraints=["distance <= 0.4"]).table
                break
            except Killed:
                kills += 1
    pd.testing.assert_frame_equal(table, expected)
    assert kills > 3 and fake.ended == Counter(dict.fromkeys(expected["task"], 1))


def test_tpe_one_at_a_time_is_the_same_after_a_kill(tmp_path):
    options = dict(sampler="tpe", trials=16, at_once=1, constraints=["distance <= 0.4"])
    expected = ask(tmp_path / "undisturbed", **options).table
    again = ask(tmp_path / "again", **options).table
    pd.testing.assert_frame_equal(again, expected)
    fake = Fake(toy)
    for at in (100, 20, 5):
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, fake, at, "after")
            with pytest.raises(Killed):
                ask(tmp_path / "killed", fake=fake, **options)
    pd.testing.assert_frame_equal(ask(tmp_path / "killed", fake=fake, **options).table, expected)
    assert len(set(expected["u"][10:]) & set(ask(tmp_path / "random", **options | dict(sampler="random")).table["u"])) == 0


def test_a_point_that_is_finished_is_not_run_again(tmp_path):
    fake = Fake(lambda L, **_: ([], dict(density=(L - 2) ** 2)))
    result = ask(tmp_path / "s", fake=fake, space={"L": "integers(1, 4)"}, trials=30)
    assert len(result.table) == 30 and (result.table["state"] == "finished").all()
    assert set(result.table["L"]) == {1, 2, 3, 4} and fake.ended == Counter(dict.fromkeys(result.table["task"].unique(), 1)) and len(fake.ended) == 4
    assert result.table.groupby("L")["density"].nunique().max() == 1
    other = ask(tmp_path / "s", fake=fake, space={"L": "integers(1, 4)"}, trials=31)
    assert len(other.table) == 31 and max(fake.submitted.values()) == 1


class Late(Fake):
    "News of a run come when its record has been on disk for a while."

    def wait(self, seconds=0.3):
        held, self.held = getattr(self, "held", []), super().wait(seconds)
        return held


def test_a_run_that_ended_before_the_news_of_it_is_told_once(tmp_path):
    fake = Late(lambda L, **_: ([], dict(density=(L - 2) ** 2)))
    result = ask(tmp_path / "s", fake=fake, space={"L": "integers(1, 4)"}, trials=30)
    assert len(result.table) == 30 and (result.table["state"] == "finished").all() and len(fake.ended) == 4
    assert repr(result) == "30 trials (30 finished); best density 0 at L = 2 (trial %d)" % result.table[result.table["L"] == 2]["number"].min()


def test_a_folder_is_of_sweeps_or_of_searches(tmp_path):
    ask(tmp_path / "s", trials=2)
    with pytest.raises(SweepError, match="holds a search; choose another folder for a sweep"):
        plan(tmp_path / "nb/toy.ipynb", tmp_path / "s", {"L": [1]})
    (tmp_path / "s/search.json").unlink()
    with pytest.raises(SweepError, match="holds a sweep; choose another folder for a search"):
        ask(tmp_path / "s", trials=2)


def test_lists_to_choose_from(tmp_path):
    notebook = notebook_in(tmp_path, parameters="widths: list[int] = [10]\nu: float = 0.0")
    result = search(notebook, tmp_path / "s", {"widths": "[[30, 10], [10], [20, 20]]", "u": [0.0, math.inf]}, metric="size", trials=12, workers=Fake(lambda widths, u, **_: ([], dict(size=sum(widths) ** 2 * 1.5))))
    assert result.best["widths"] == [10] and {tuple(one) for one in result.table["widths"]} == {(30, 10), (10,), (20, 20)}
    assert set(result.table["u"]) == {0.0, math.inf} and load(tmp_path / "s").axes["widths"][0] in ([30, 10], [10], [20, 20])
    assert len(result.surrogate) == result.table["task"].nunique() - 4 > 0  # what a trial shares with an earlier one has been seen


def test_the_folder_is_one_of_a_sweep_too(tmp_path):
    table = ask(tmp_path / "s").table
    runs = load(tmp_path / "s")
    assert len(runs) == 12 and runs.swept == ["u", "v"] and runs.axes["u"] == table["u"].tolist()
    assert runs.table.set_index("task")["density"].to_dict() == table.set_index("task")["density"].to_dict()
    (tmp_path / "s" / "tasks" / table["task"][0] / "task.json").unlink()  # as of a trial that waits
    (waiting,) = [record for record in load(tmp_path / "s").tasks if record["status"] == "waiting"]
    assert waiting["args"] == {"u": table["u"][0], "v": table["v"][0]}


@pytest.mark.parametrize("change", [
    dict(metric="distance"), dict(space=dict(u="uniform(0, 2)", v="uniform(0, 1)")), dict(constraints=["distance <= 1"]), dict(sampler="tpe"), dict(seed=1),
    dict(direction="maximize"), dict(stopping="asha"), dict(on_test=True),
])  # fmt: skip
def test_another_question_is_refused(tmp_path, change):
    before = ask(tmp_path / "s", trials=3)
    log = (tmp_path / "s" / "study.log").read_bytes()
    name = next(iter(change))
    with pytest.raises(SearchError, match=f"holds a search with {name} = .*; ask the same question, or choose another folder") as caught:
        ask(tmp_path / "s", **{"trials": 3, **change})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "s" / "study.log").read_bytes() == log
    pd.testing.assert_frame_equal(ask(tmp_path / "s", trials=3).table, before.table)
    with pytest.raises(SearchError, match="holds a search with fixed = {}, not {'L': 5}; ask the same question"):
        ask(tmp_path / "s", space=SQUARE | {"L": "5"}, trials=3)


def test_other_code_and_another_notebook_are_refused(tmp_path):
    ask(tmp_path / "s", trials=3)
    with pytest.raises(SearchError, match=r"holds a search of other code: toy.ipynb or flatmin_nb was edited since, .*; take the edit back, or choose another folder$"):
        search(notebook_in(tmp_path / "nb", "print(v, u)"), tmp_path / "s", SQUARE, metric="density", sampler="random", trials=3, workers=Fake(toy))
    with pytest.raises(SweepError, match="holds a sweep of toy.ipynb; choose another folder for other.ipynb"):
        search(notebook_in(tmp_path / "nb", name="other.ipynb"), tmp_path / "s", SQUARE, metric="density", workers=Fake(toy))


@pytest.mark.parametrize("options, said", [
    (dict(direction="down"), "--direction"), (dict(sampler="tpee"), "did you mean 'tpe'"), (dict(stopping="median"), "--stopping"),
    (dict(trials=0), "--trials"), (dict(seed=-1), "--seed"), (dict(stopping="asha", least=0), "--least"), (dict(stopping="asha", reduction=1), "--reduction"),
    (dict(stopping="hyperband"), "--most"), (dict(stopping="asha", most=9), "--most"), (dict(stopping="hyperband", most=2, least=3), "--most"),
    (dict(report="density"), "--report is about"), (dict(report_direction="minimize"), "--report-direction is about"), (dict(stopping="asha", report_direction="up"), "--report-direction: no choice"), (dict(constraints=["a < 1"]), "--constraint"),
])  # fmt: skip
def test_options_that_mean_nothing(tmp_path, options, said):
    with pytest.raises(SearchError, match=said):
        ask(tmp_path / "s", **options)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(SearchError, match="holds no search"):
        found(tmp_path)
    ask(tmp_path / "s", trials=2)
    (tmp_path / "s" / "search.json").write_text("{")
    with pytest.raises(SearchError, match="no readable search.json"):
        ask(tmp_path / "s", trials=2)
    write_json(tmp_path / "s" / "search.json", dict(question=dict(space={})))
    with pytest.raises(SearchError, match="no readable search.json"):
        found(tmp_path / "s")


# ---- no pickles ----

def test_the_study_is_text_and_nothing_pickles(tmp_path, monkeypatch):
    "More trials than Optuna's interval of snapshots, which are pickles where a backend takes them."
    for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("pickled"))
    ask(tmp_path / "s", trials=105)
    assert len(ask(tmp_path / "s", trials=110).table) == 110 and len(found(tmp_path / "s").table) == 110
    for line in (tmp_path / "s" / "study.log").read_text(encoding="utf-8").splitlines():
        assert isinstance(json.loads(line), dict)
    assert not [path for path in (tmp_path / "s").iterdir() if path.suffix in (".pkl", ".pickle", ".db")]


def test_half_a_line_and_a_lock_that_a_killed_process_left(tmp_path):
    path = tmp_path / "study.log"
    for content, left in [(b'{"a": 1}\n{"b": 2}\n{"c', b'{"a": 1}\n{"b": 2}\n'), (b'{"a', b""), (b'{"a": 1}\n', b'{"a": 1}\n')]:
        path.write_bytes(content)
        Path(f"{path}.lock").touch()
        Path(f"{path}.lock0123.rename").touch()
        mended(path)
        assert path.read_bytes() == left and [one.name for one in tmp_path.iterdir()] == ["study.log"]


# ---- ends that are no results ----

def test_failed_and_diverged_trials_are_counted_and_never_best(tmp_path):
    def run(u, v, **_):
        status = "failed" if u < 0.3 else "diverged" if u < 0.5 else "finished"
        return [], dict(density=u) if status == "finished" else dict(density=math.nan) if u < 0.4 else {}, status

    result = ask(tmp_path / "s", lambda u, v, **_: (lambda rows, summary, status: (rows, {name: -value for name, value in summary.items()}, status))(*run(u, v)), trials=40)
    table = result.table
    assert (table["state"] == np.select([table["u"] < 0.3, table["u"] < 0.5], ["failed", "diverged"], "finished")).all()
    assert set(table["state"]) == {"failed", "diverged", "finished"} and len(table) == 40
    assert table["density"].notna().tolist() == (table["u"] >= 0.5).tolist() == table["feasible"].tolist()
    assert result.best["density"] == -table["u"].max()
    assert len(ask(tmp_path / "s", lambda **_: pytest.fail("again"), trials=40).table) == 40


def test_a_finished_run_without_a_number_is_not_feasible(tmp_path):
    result = ask(tmp_path / "s", lambda u, v, **_: ([], dict(density=math.nan if u < 0.5 else v - u, distance=math.nan if v < 0.5 else 0.0)), constraints=["distance <= 1"], trials=20, sampler="tpe")
    assert (result.table["state"] == "finished").all()
    assert result.table["feasible"].tolist() == ((result.table["u"] >= 0.5) & (result.table["v"] >= 0.5)).tolist()


def test_what_is_said(tmp_path):
    said = []
    ask(tmp_path / "s", trials=2, constraints=["distance <= 0.4"], at_once=1, say=said.append)
    assert len(said) == 2 and said[0].startswith("trial 0 finished: density ") and "distance" in said[0]


# ---- early stopping ----

def steps_of(level, length=9):
    return [dict(epoch=epoch, density=level + 1 / epoch) for epoch in range(1, length + 1)]


def halved(levels: list[float], least: int, reduction: int, length: int) -> dict[int, int]:
    "By hand: trials one after the other; at each rung one goes on if it is among the best 1/reduction of those that have come there. The last step of each."
    rungs, last = {}, {}
    for number, level in enumerate(levels):
        rung = least
        for step in range(1, length + 1):
            last[number] = step
            if step == rung:
                there = rungs.setdefault(rung, [])
                there.append(level + 1 / step)
                if sorted(there).index(level + 1 / step) >= max(1, len(there) // reduction):
                    break
                rung *= reduction
    return last


@pytest.mark.parametrize("least, reduction", [(1, 3), (2, 2), (1, 2)])
def test_asha_decides_as_successive_halving_by_hand(tmp_path, least, reduction):
    result = ask(tmp_path / "s", lambda u, v, **_: (steps_of(u), dict(density=u, other=1)), metric="other", report="density", stopping="asha", least=least, reduction=reduction, trials=20, at_once=1)
    table, last = result.table, halved(result.table["u"].tolist(), least, reduction, 9)
    assert table["last_step"].tolist() == [last[number] for number in range(20)]
    whole = [number for number in last if last[number] == 9 and table["state"][number] == "finished"]
    assert 1 < len(whole) < 12 and set(table["state"]) == {"finished", "stopped"}
    stopped = table[table["state"] == "stopped"]
    assert np.allclose(stopped["last_report"], stopped["u"] + 1 / stopped["last_step"])
    assert not stopped["feasible"].any() and stopped["other"].isna().all()


@pytest.mark.parametrize("way", ["maximize", "minimize"])
def test_what_is_reported_may_be_better_the_other_way_round(tmp_path, way):
    "The largest size, and runs are stopped for the error that they report: the lowest error goes on, whatever is wanted of the size."
    run = lambda u, v, **_: (steps_of(u), dict(size=v**2, density=u))
    result = ask(tmp_path / "s", run, metric="size", direction=way, report="density", stopping="asha", trials=20, at_once=1)
    last = halved(result.table["u"].tolist(), 1, 3, 9)
    assert result.table["last_step"].tolist() == [last[number] for number in range(20)]
    assert np.allclose(result.table["last_report"], result.table["u"] + 1 / result.table["last_step"])
    accuracy = lambda u, v, **_: ([dict(epoch=row["epoch"], accuracy=-row["density"]) for row in steps_of(u)], dict(size=v**2, accuracy=-u))
    turned = ask(tmp_path / "turned", accuracy, metric="size", direction=way, report="accuracy", report_direction="maximize", stopping="asha", trials=20, at_once=1)
    assert turned.table["last_step"].tolist() == result.table["last_step"].tolist()
    same = ask(tmp_path / "same", accuracy, metric="accuracy", direction="maximize", stopping="asha", trials=20, at_once=1)
    assert same.table["last_step"].tolist() == result.table["last_step"].tolist()


def test_hyperband_with_tpe_and_constraints(tmp_path):
    run = lambda u, v, **_: (steps_of(u), dict(density=u * 1.0001, distance=v))
    result = ask(tmp_path / "s", run, metric="density", stopping="hyperband", most=9, trials=40, sampler="tpe", constraints=["distance <= 0.5"])
    assert len(result.table) == 40 and result.best["distance"] <= 0.5 and "stopped" in set(result.table["state"])


def test_asha_does_not_mind_how_seldom_one_looks(tmp_path):
    "A rung sees the value of its own step, though nine steps come between two looks."
    class Leaps(Fake):
        def advance(self, task):
            for _ in range(9):
                if task.name in self.in_flight:
                    super().advance(task)

    options = dict(metric="other", report="density", stopping="asha", trials=20, at_once=1)
    run = lambda u, v, **_: (steps_of(u), dict(other=1))
    one = ask(tmp_path / "one", run, **options)
    leaps = ask(tmp_path / "leaps", fake=Leaps(run), **options)
    pd.testing.assert_frame_equal(leaps.table, one.table)


def test_a_trial_that_ends_between_two_looks_counts_in_every_rung(tmp_path):
    class AtOnce(Fake):
        def advance(self, task):
            while task.name in self.in_flight:
                super().advance(task)

    run = lambda u, v, **_: (steps_of(u), dict(other=1))
    result = ask(tmp_path / "s", fake=AtOnce(run), metric="other", report="density", stopping="asha", trials=3)
    assert (result.table["state"] == "finished").all() and (result.table["last_step"] == 9).all()
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "s" / "study.log"))))
    assert all({f"completed_rung_{rung}" for rung in range(3)} <= trial.system_attrs.keys() for trial in study.trials)


def test_hyperband_spares_and_is_the_same_after_a_kill(tmp_path):
    options = dict(metric="density", stopping="hyperband", most=9, trials=30, at_once=1, sampler="random")
    run = lambda u, v, **_: (steps_of(u), dict(density=u * 1.0001))
    fake = Fake(run)
    expected = ask(tmp_path / "s", fake=fake, **options).table
    assert {1, 3, 9} <= set(expected["last_step"]) and sum(fake.steps.values()) < 0.8 * 9 * 30
    fake = Fake(run)
    for at in (300, 200, 100):
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, fake, at, "before")
            with pytest.raises(Killed):
                ask(tmp_path / "killed", fake=fake, **options)
    after = ask(tmp_path / "killed", fake=fake, **options).table
    assert after["u"].tolist() == expected["u"].tolist() and len(after) == 30
    assert (after["last_step"] != expected["last_step"]).sum() <= 3  # a decision that was lost with the process may cost a trial more steps, no more


def test_a_stopped_trial_stays_stopped(tmp_path):
    run = lambda u, v, **_: (steps_of(u), dict(density=u * 1.0001))
    fake = Fake(run)
    before = ask(tmp_path / "s", fake=fake, stopping="asha", trials=10, at_once=1).table
    assert "stopped" in set(before["state"])
    submitted = dict(fake.submitted)
    after = ask(tmp_path / "s", fake=fake, stopping="asha", trials=10, at_once=1).table
    pd.testing.assert_frame_equal(after, before)
    assert fake.submitted == submitted


def test_a_kill_between_the_decision_and_the_end_of_the_run(tmp_path):
    run = lambda u, v, **_: (steps_of(u), dict(density=u * 1.0001))
    fake = Fake(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "stop", lambda *_: (_ for _ in ()).throw(Killed), raising=False)
        with pytest.raises(Killed):
            ask(tmp_path / "s", fake=fake, stopping="asha", trials=10, at_once=1)
    steps = dict(fake.steps)
    unfinished = found(tmp_path / "s").table.query("state == 'running'")
    assert len(unfinished) == 1
    after = ask(tmp_path / "s", fake=fake, stopping="asha", trials=10, at_once=1).table
    expected = ask(tmp_path / "undisturbed", run, stopping="asha", trials=10, at_once=1).table
    pd.testing.assert_frame_equal(after, expected)
    name = unfinished["task"].iloc[0]
    assert fake.steps[name] == steps[name]  # not a step more


def test_a_report_that_comes_twice(tmp_path):
    "A run that is killed and resumed may write steps again, and others than before; the first report counts."
    written = Path(tmp_path / "history.csv")
    for text, expected in [
        ("epoch,step,a\n1,10,0.5\n2,20,0.25\n1,10,0.75\n2,20,9\n3,30,0.125\n", {1: 0.5, 2: 0.25, 3: 0.125}),
        ("epoch,a\n0.5,1\n1,2\n1.5,3\n2,4\n", {1: 2.0, 2: 4.0}),
        ("step,a\n100,1\n200,2\n", {100: 1.0, 200: 2.0}),
        ("a\n1\n2\n", {1: 1.0, 2: 2.0}),
        ("epoch,a\n0,\n1,nan\n2,inf\n3,word\n4,1\n", {2: math.inf, 4: 1.0}),
        ("epoch,b\n1,1\n", {}),
        ("epoch,a\n-1,1\nnan,2\ninf,3\n2,4,5,6\n", {2: 4.0}),
        ("", {}),
        ("\x00\xff", {}),
    ]:
        written.write_text(text, encoding="latin1")
        assert reported(written, "a") == expected
    assert reported(tmp_path / "none.csv", "a") == {}


def test_which_of_several_histories(tmp_path):
    for method, level in (("sgd", 1), ("adam", 2)):
        folder = tmp_path / "out" / method
        folder.mkdir(parents=True)
        write_json(folder / "run.json", dict(status="running", parameters={"method": method}))
        pd.DataFrame({"epoch": [1], "val_error": [level]}).to_csv(folder / "history.csv", index=False)
    assert reports(tmp_path / "out", "val_error", {"method": "adam"}) == {1: 2.0}
    with pytest.raises(SearchError, match=r"2 records of one run report 'val_error' \(adam, sgd\)"):
        reports(tmp_path / "out", "val_error", {})
    assert reports(tmp_path / "out", "nothing", {}) == {}


def test_two_trials_that_wait_for_one_run(tmp_path):
    run = lambda L, **_: (steps_of(L), dict(density=L * 1.0))
    result = ask(tmp_path / "s", space={"L": "integers(1, 3)"}, stopping="asha", trials=20, fake=Fake(run, slots=3))
    assert len(result.table) == 20 and result.table["last_step"].notna().all()
    assert result.table.groupby("L")["last_step"].nunique().max() == 1  # they share its fate


# ---- the surrogate ----

def points(count, seed=0):
    random = np.random.default_rng(seed)
    table = pd.DataFrame({"number": range(count), "state": "finished", "u": random.uniform(size=count), "L": 10 ** random.uniform(0, 3, size=count), "schedule": random.choice(["a", "b"], size=count)})
    return table.assign(metric=table["u"] + np.log10(table["L"]) + (table["schedule"] == "a"), task=[f"t{number}" for number in range(count)])


SPACE = dict(u="uniform(0, 1)", L="loguniform(1, 1000)", schedule="choice('a', 'b')")


def test_a_surrogate_is_asked_about_what_it_has_not_seen():
    table = points(30)
    check = surrogate_check(table, SPACE, "metric")
    assert check["number"].tolist() == list(range(4, 30)) and list(check.columns) == ["number", "predicted", "spread", "actual", "mean_before"]
    assert check["actual"].tolist() == table["metric"][4:].tolist()
    assert np.allclose(check["mean_before"], [table["metric"][:place].mean() for place in range(4, 30)])
    late = check[10:]
    assert (late["predicted"] - late["actual"]).abs().mean() < 0.7 * (late["mean_before"] - late["actual"]).abs().mean()
    assert (check["predicted"] - check["actual"]).abs().max() > 0.1  # and it is no oracle
    changed = table.assign(metric=[*table["metric"][:20], *(table["metric"][20:] + 100)])  # what comes later changes no earlier prediction
    assert surrogate_check(changed, SPACE, "metric")["predicted"][:17].tolist() == check["predicted"][:17].tolist()
    assert surrogate_said(check).startswith("surrogate: off by ")


def test_a_surrogate_is_not_asked_twice_about_a_run():
    table = points(20)
    again = pd.concat([table, table.iloc[8:].assign(number=range(20, 32))], ignore_index=True)
    pd.testing.assert_frame_equal(surrogate_check(again, SPACE, "metric"), surrogate_check(table, SPACE, "metric"))


def test_a_surrogate_of_noise_is_no_better_than_the_mean():
    table = points(40).assign(metric=np.random.default_rng(1).normal(size=40))
    check = surrogate_check(table, SPACE, "metric")
    assert (check["predicted"] - check["actual"]).abs().mean() > 0.9 * (check["mean_before"] - check["actual"]).abs().mean()


def test_a_surrogate_learns_of_finished_trials_only():
    table = points(12)
    table.loc[[1, 5], "state"] = ["stopped", "failed"]
    table.loc[[2], "metric"] = math.nan
    assert surrogate_check(table, SPACE, "metric")["number"].tolist() == [7, 8, 9, 10, 11]
    few = surrogate_check(table[:6], SPACE, "metric")
    assert few.empty and surrogate_said(few).startswith("fewer than five")


def test_the_surrogate_of_a_search(tmp_path):
    result = ask(tmp_path / "s", trials=10)
    assert result.surrogate["number"].tolist() == [4, 5, 6, 7, 8, 9]
    last = surrogate_check(result.table, result.question["space"], "density", last=2)  # each still learns of all before it
    assert last.to_dict("list") == result.surrogate[-2:].to_dict("list")


# ---- the command ----

def flatmin(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_says_what_the_surrogate_came_to_and_plot_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr("flatmin_nb.lab.sweep.Workers", Fake(toy))
    words = ["search", notebook_in(tmp_path / "nb"), tmp_path / "s", "-p", "u", SQUARE["u"], "-p", "v", SQUARE["v"], "--metric", "density", "--sampler", "random"]
    few = flatmin(*words, "--trials", 4)
    assert few.exit_code == 0 and few.stdout.splitlines()[-1].startswith("fewer than five trials are finished")
    assert flatmin("plot", tmp_path / "s").stdout.splitlines() == [str(tmp_path / "s" / "figures" / "search.png")]
    many = flatmin(*words, "--trials", 9)
    assert many.stdout.splitlines()[-1] == surrogate_said(found(tmp_path / "s").surrogate) and "on 5 trials" in many.stdout
    for options in ([], ["--metric", "density"]):
        drawn = flatmin("plot", tmp_path / "s", "--out", tmp_path / "f", *options)
        assert drawn.stdout.splitlines() == [str(tmp_path / "f" / name) for name in ("search.png", "surrogate.png")]
        assert all((tmp_path / "f" / name).read_bytes().startswith(b"\x89PNG") for name in ("search.png", "surrogate.png"))
    assert flatmin("plot", tmp_path / "s", "--metric", "distance", "--x", "u", "--y", "v").stdout.splitlines() == [str(tmp_path / "s" / "figures" / "u-v.png")]
    other = flatmin("plot", tmp_path / "s", "--metric", "distance")
    assert other.exit_code == 1 and "this search is by density; leave --metric out" in other.stderr and other.stderr.count("\n") == 1


def test_the_figures_show_the_trials_and_what_was_predicted(tmp_path):
    result = ask(tmp_path / "s", trials=10, constraints=["distance <= 0.3"])
    made = search_figures(result)
    trials, surrogate = (made[name].axes[0] for name in ("search", "surrogate"))
    crosses, dots = (line.get_xdata().tolist() for line in trials.lines[:2])
    assert sorted(crosses + dots) == list(range(10)) and dots == result.table["number"][result.table["feasible"]].tolist()
    assert surrogate.lines[1].get_xdata().tolist() == result.surrogate["predicted"].tolist() and surrogate.lines[1].get_ydata().tolist() == result.surrogate["actual"].tolist()


def test_a_search_without_a_finished_trial_is_not_drawn(tmp_path):
    result = ask(tmp_path / "s", lambda **_: ([], {}, "failed"), trials=2)
    with pytest.raises(SearchError, match="no trial of this search has finished yet"):
        search_figures(result)
    status = flatmin("status", tmp_path / "s").stdout
    assert status == "2 failed\n"  # the same command would try none of them again


def test_a_sweep_is_drawn_by_a_metric_that_is_named(tmp_path):
    ask(tmp_path / "s", trials=2)
    (tmp_path / "s" / "search.json").unlink()
    result = flatmin("plot", tmp_path / "s")
    assert result.exit_code == 1 and "name the column to draw" in result.stderr and result.stderr.count("\n") == 1


# ---- with Ray and papermill ----

RUN = """
import json, pathlib, time
folder = pathlib.Path(out)
folder.mkdir(parents=True, exist_ok=True)
def whole(name, text):
    (folder / "part").write_text(text)
    (folder / "part").replace(folder / name)
whole("run.json", json.dumps(dict(status="running", parameters=dict(u=u))))
lines = ["epoch,val_error"]
for epoch in range(1, 10 if u < 0.6 else 2000):
    lines.append(f"{epoch},{u + 1 / epoch}")
    whole("history.csv", "\\n".join(lines) + "\\n")
    time.sleep(PAUSE)
whole("run.json", json.dumps(dict(status="finished", parameters=dict(u=u), summary=dict(val_error=u, size=1 - u))))
"""


def real(folder, pause=0.01):
    return notebook_in(folder, RUN.replace("PAUSE", str(pause)), parameters='u: float = 0.5\nout: str = ""')


def first_draws(seed, count=4):
    return [np.random.RandomState(seed_of(seed, number, "u")).uniform(0, 1) for number in range(count)]


@pytest.mark.slow
def test_a_search_with_ray_that_is_killed_and_goes_on(tmp_path):
    seed = next(seed for seed in range(1000) if max(first_draws(seed)) < 0.6)
    code = f"""
from flatmin_nb.lab.search import search
print(search({str(real(tmp_path, 0.1))!r}, {str(tmp_path / "s")!r}, {{"u": "uniform(0, 1)"}}, metric="size", constraints=["val_error <= 0.4"], sampler="random", seed={seed}, trials=4, at_once=2))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    record = lambda: [json.loads(path.read_text()) for path in (tmp_path / "s" / "tasks").glob("*/task.json")]
    while process.poll() is None and not any(one["status"] == "finished" for one in record()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    ended = {one["task"] for one in record() if one["status"] == "finished"}
    assert 0 < len(ended) < 4, process.stdout.read()
    again = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "4 trials (4 finished); best feasible size" in again.stdout, again.stderr
    result = found(tmp_path / "s")
    assert np.allclose(result.table["u"], first_draws(seed), rtol=0, atol=1e-12) and result.table["u"].tolist() == result.table["val_error"].tolist()
    good = result.table[result.table["val_error"] <= 0.4]
    assert result.best["size"] == good["size"].min() and result.table["feasible"].tolist() == (result.table["val_error"] <= 0.4).tolist()
    assert len(record()) == 4 and all(len(one["attempts"]) == 1 for one in record() if one["task"] in ended)


@pytest.mark.slow
def test_asha_with_ray_stops_runs_that_would_go_on(tmp_path):
    "Three runs that are behind would take ten minutes each; at their first report they are stopped."
    draws = lambda seed: first_draws(seed, 4)
    seed = next(seed for seed in range(1000) if draws(seed)[0] < 0.6 < min(draws(seed)[1:]))
    said = []
    result = search(real(tmp_path, 0.3), tmp_path / "s", {"u": "uniform(0, 1)"}, metric="val_error", sampler="random", seed=seed, trials=4, at_once=1, stopping="asha", say=said.append)
    assert result.table["state"].tolist() == ["finished", "stopped", "stopped", "stopped"]
    assert result.table["last_step"].tolist() == [9, 1, 1, 1]
    assert result.best["number"] == 0 and len(said) == 4
    assert [record["status"] for record in load(tmp_path / "s").tasks] == ["finished", "stopped", "stopped", "stopped"]


# ---- imports ----

def test_importing_loads_nothing_heavy():
    heavy = {"torch", "pandas", "ray", "optuna", "matplotlib", "sklearn", "papermill", "IPython", "wandb"}
    code = f"import sys, flatmin_nb.lab.search; print(*({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
