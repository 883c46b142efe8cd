"""How a sweep is looked at: figures against pandas, what a terminal and a file are told, and the grid that fills."""
import base64
import io
import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from flatmin_nb.lab.grids import SweepError
from flatmin_nb.lab.sweep_views import (
    Lines, Live, cells_of, clean, drawn, figures, filling, grid_figure, in_words, key, labels, line_figure, live, pair_figure, result, said,
    states_of, summaries, values_in,
)  # fmt: skip
from flatmin_nb.lab.tasks import Sweep, load, write_json
from matplotlib.figure import Figure
from rich.console import Console

AXES = {"L": [20, 5, 10], "gamma": [3e-5, 0.3, 0.003], "seed": [0, 1, 2]}


def random_table(seed: int) -> pd.DataFrame:
    "Runs of AXES in any order, some left out, some without a finite number."
    random = np.random.default_rng(seed)
    every = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]
    rows = [point | {"error": float(random.normal())} for point in every if random.random() > 0.4]
    for row in rows:
        row["error"] = random.choice([row["error"], np.nan, np.inf], p=[0.8, 0.1, 0.1])
    return pd.DataFrame(rows).sample(frac=1, random_state=seed).reset_index(drop=True)


def texts(figure: Figure) -> dict[tuple[int, int], str]:
    "What is written in the cells, by column and row."
    return {tuple(map(int, text.get_position())): text.get_text() for text in figure.axes[0].texts}


def title(figure: Figure) -> str:
    return figure.axes[0].get_title(loc="left")


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# ---- names of values ----

@pytest.mark.parametrize("values", [
    [10.0**-k for k in range(12)], np.logspace(-5, 3, 33).tolist(), [1 / 3, 1 / 3 + 1e-12, 1e300], [0.1 + 0.2, 0.3], [-0.5, 5, 5e-5],
    [True, 1, None, "a"], [[1, 2], [1], (3,)], ["x" * 200 + end for end in "abc"],
    [side + "x" * 400 + side for side in ("a", "b")], ["x" * 300 + a + "x" * 300 for a in "ab"],
])  # fmt: skip
def test_names_differ_where_values_do(values):
    assert len(set(labels(values))) == len(values)


def test_names_are_short():
    assert labels([1e-05, 3e-05, 0.001]) == ["1e-05", "3e-05", "0.001"]
    assert labels([20.0, np.int64(5), math.inf]) == ["20", "5", "inf"]
    assert max(map(len, labels(np.logspace(-5, 3, 33).tolist()))) <= 8
    assert labels(["two\nlines"]) == ["two lines"]


def test_a_value_is_found_again_in_a_table():
    column = pd.Series([20, None, 0.5])
    assert [key(value) for value in column] == [key(value) for value in [20, None, 0.5]]
    assert len({key(value) for value in [True, 1, "1", [1], None]}) == 5


@pytest.mark.parametrize("argument, asked, expected", [
    (5, [5, 10], [5]), ([5, 10], [5, 10], [5, 10]), ([5, 10], [[5, 10]], [[5, 10]]), ([1, 2], [[3]], [[1, 2]]),
    ("0 2", ["0", "1", "2"], ["0", "2"]), ("0 2", [0, 2], [0, 2]), ("a b", ["a b", "a"], ["a b"]), ("a c", ["a"], ["a c"]),
    (None, [None, 1], [None]), ("", [""], [""]),
])  # fmt: skip
def test_what_a_slice_holds(argument, asked, expected):
    assert values_in(argument, asked) == expected


# ---- pairs ----

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("x, y", [("L", "gamma"), ("gamma", "L"), ("L", "seed")])
def test_means_are_those_of_pandas(seed, x, y):
    table = random_table(seed)
    cells = cells_of(table, x, y, "error", AXES)
    finite = table[np.isfinite(table["error"])]
    for values, function in ((cells.mean, "mean"), (cells.count, "count")):
        oracle = finite.pivot_table(index=y, columns=x, values="error", aggfunc=function).reindex(index=AXES[y], columns=AXES[x])
        np.testing.assert_allclose(values, oracle.fillna(0) if function == "count" else oracle, rtol=1e-12)
    assert cells.outside == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_figure_shows_the_means_in_the_order_asked_for(seed):
    table = random_table(seed)
    figure = pair_figure(table, "L", "gamma", "error", axes=AXES)
    ax, bar = figure.axes
    oracle = table[np.isfinite(table["error"])].groupby(["gamma", "L"])["error"].agg(["mean", "count"])
    shown, written, most = ax.images[0].get_array(), texts(figure), oracle["count"].max()
    assert ticks(ax.xaxis) == ["20", "5", "10"] and ticks(ax.yaxis) == ["3e-05", "0.3", "0.003"]
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("L", "gamma", "error")
    for (column, L), (row, gamma) in itertools.product(enumerate(AXES["L"]), enumerate(AXES["gamma"])):
        if (gamma, L) in oracle.index:
            mean, count = oracle.loc[gamma, L]
            assert shown[row, column] == pytest.approx(mean)
            assert written[column, row] == f"{mean:.3g}\n({count:.0f}{f' of {most}' if count < most else ''})"
        else:
            assert np.ma.is_masked(shown[row, column]) or np.isnan(shown[row, column])
            assert written[column, row] in ("", "not\nfinite")
    assert ax.patch.get_hatch() and ax.images[0].get_extent() == [-0.5, 2.5, -0.5, 2.5]


def test_without_values_asked_for_numbers_are_sorted():
    figure = pair_figure(random_table(0), "L", "gamma", "error")
    assert ticks(figure.axes[0].xaxis) == ["5", "10", "20"] and ticks(figure.axes[0].yaxis) == ["3e-05", "0.003", "0.3"]


def test_words_lists_and_none_are_values():
    points = itertools.product("ba", (None, 0.5), ([3, 1], [3]))
    table = pd.DataFrame([dict(name=name, clip=clip, widths=widths, error=1.0) for name, clip, widths in points])
    figure = pair_figure(table, "name", "clip", "error", axes={"name": ["b", "a"], "clip": [None, 0.5]})
    assert ticks(figure.axes[0].xaxis) == ["b", "a"] and ticks(figure.axes[0].yaxis) == ["None", "0.5"]
    assert set(texts(figure).values()) == {"1\n(2)"}
    figure = pair_figure(table, "widths", "name", "error", axes={"widths": [[3], [3, 1]]})
    assert ticks(figure.axes[0].xaxis) == ["[3]", "[3, 1]"] and set(texts(figure).values()) == {"1\n(2)"}
    figure.savefig(io.BytesIO())


def test_what_is_left_out_is_said():
    table = pd.DataFrame(dict(L=[5, 5, 10, 10, 20], k=[1, 2, 1, 2, 1], error=[1.0, np.inf, 2.0, 3.0, 4.0], status="finished"))
    table.loc[3, "status"] = "diverged"
    figure = pair_figure(table, "L", "k", "error", axes={"L": [5, 10], "k": [1, 2], "seed": [0, 1]})
    assert title(figure).split("\n") == [
        "error, mean over seed",
        "2 of 5 runs do not count: 1 not finite, 1 diverged",
        "1 of 5 runs have values that were not asked for",
    ]
    assert texts(figure) == {(0, 0): "1\n(1)", (1, 0): "2\n(1)", (0, 1): "not\nfinite", (1, 1): "diverged"}


def test_nothing_that_counts_is_a_figure_too():
    figure = pair_figure(pd.DataFrame(dict(L=[5, 10], k=[1, 1], error=[np.nan, np.inf])), "L", "k", "error")
    figure.savefig(io.BytesIO())
    assert "2 of 2 runs do not count" in title(figure)


def test_small_cells_show_only_what_they_lack():
    table = pd.DataFrame([dict(x=x, y=y, seed=seed, error=1e-6 * x) for x in range(30) for y in range(30) for seed in (0, 1)])[:-1]
    figure = pair_figure(table, "x", "y", "error")
    assert {text for text in texts(figure).values() if text} == {"1"} and texts(figure)[29, 29] == "1"
    assert "a number is that of the runs, where it is below 2" in title(figure)
    assert len(ticks(figure.axes[0].xaxis)) == 15


def test_words_stay_in_their_cells():
    table = pd.DataFrame([dict(x=x, y=y, seed=0, error=-1.23e-5 * (x + 1)) for x in range(12) for y in range(9)])
    figure = pair_figure(table, "x", "y", "error")
    figure.savefig(io.BytesIO())
    ax = figure.axes[0]
    for text in filter(lambda text: text.get_text(), ax.texts):
        (left, bottom), (right, top) = ax.transData.inverted().transform(text.get_window_extent())
        x, y = text.get_position()
        assert x - 0.5 < left < right < x + 0.5 and y - 0.5 < bottom < top < y + 0.5


def test_a_figure_needs_no_pyplot_and_the_module_nothing_heavy(tmp_path):
    code = """
import sys
from flatmin_nb.lab import sweep_views
assert not {"torch", "pandas", "numpy", "matplotlib", "rich", "ipywidgets", "IPython", "ray"} & sys.modules.keys()
import pandas as pd
sweep_views.pair_figure(pd.DataFrame(dict(x=[1, 2], y=[1, 2], z=[1.0, 2.0])), "x", "y", "z").savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True).stderr == ""
    assert (tmp_path / "a.png").exists()


# ---- one parameter ----

@pytest.mark.parametrize("seed", range(3))
def test_a_line_is_the_means_and_the_points_are_the_runs(seed):
    table = random_table(seed)
    finite = table[np.isfinite(table["error"])]
    ax = line_figure(table, "gamma", "error", axes=AXES).axes[0]
    points, mean = ax.lines
    oracle = finite.groupby("gamma")["error"].mean()
    np.testing.assert_allclose(mean.get_xydata(), oracle.reset_index().values)
    assert sorted(map(tuple, points.get_xydata())) == sorted(zip(finite["gamma"], finite["error"]))
    assert ax.get_xscale() == "log" and title(ax.figure).startswith("error, mean over L, seed")


def test_a_line_breaks_where_nothing_has_ended():
    figure = line_figure(pd.DataFrame(dict(L=[1, 3, 3], error=[1.0, 2.0, 4.0])), "L", "error", axes={"L": [1, 2, 3, 9]})
    mean = figure.axes[0].lines[1]
    np.testing.assert_array_equal(mean.get_xydata(), [[1, 1], [2, np.nan], [3, 3], [9, np.nan]])
    assert figure.axes[0].get_xscale() == "linear" and figure.axes[0].get_xlim()[1] > 9
    assert title(figure).endswith("no run that counts at L = 2, 9")


@pytest.mark.parametrize("values", [[0, 1, 1000], [1e-5, 1e-2], [1, 100], [-1, 1e4], [3]])
def test_an_axis_that_is_wide_is_logarithmic(values):
    scale = "log" if values == [1e-5, 1e-2] else "linear"
    assert line_figure(pd.DataFrame(dict(x=values, error=1.0)), "x", "error").axes[0].get_xscale() == scale


@pytest.mark.parametrize("values", [["sgd", "adam"], [True, False], [None, 1.0]])
def test_words_have_ticks_and_no_line_between_them(values):
    table = pd.DataFrame(dict(x=pd.Series(values, dtype=object), error=[1.0, 2.0]))
    ax = line_figure(table, "x", "error", axes={"x": values}).axes[0]
    assert ticks(ax.xaxis) == labels(values) and ax.lines[1].get_linestyle() == "None"
    assert ax.lines[1].get_ydata().tolist() == [1, 2]


# ---- all figures ----

def runs_of(table, axes):
    return SimpleNamespace(table=table, axes=axes)


@pytest.mark.parametrize("axes, expected", [
    (AXES, ["L-gamma"]), (AXES | {"width": [1, 2], "one": [1]}, ["L-gamma", "L-width", "gamma-width"]),
    ({"L": [5, 10], "seed": [0, 1], "gamma": [0.3]}, ["L"]),
    ({"seed": [0, 1]}, ["seed"]), ({"seed": [0, 1], "L": [5]}, ["seed"]), ({"seeds": [0, 1], "seed": [0, 1]}, ["seeds-seed"]),
])  # fmt: skip
def test_a_figure_for_each_pair(axes, expected):
    table = random_table(0).assign(width=1, one=1, seeds=0)
    assert [*figures(runs_of(table, axes), "error")] == expected


def test_methods_are_not_mixed():
    table = pd.concat([random_table(0).assign(method="sgd", error=1.0), random_table(0).assign(method="adam", error=3.0)])
    made = figures(runs_of(table, AXES), "error")
    assert [*made] == ["L-gamma-sgd", "L-gamma-adam"]
    shown = [figure.axes[0].images[0].get_array().compressed() for figure in made.values()]
    assert [set(numbers[np.isfinite(numbers)]) for numbers in shown] == [{1.0}, {3.0}]
    assert [figure.get_suptitle() for figure in made.values()] == ["sgd", "adam"]
    assert [*figures(runs_of(table, AXES | {"method": ["sgd", "adam"]}), "error")] == ["L-gamma", "L-method", "gamma-method"]


@pytest.mark.parametrize("call, words", [
    (lambda table: figures(runs_of(table, AXES), "eror"), "no metric 'eror'; did you mean 'error'?"),
    (lambda table: figures(runs_of(table.assign(model="mlp"), AXES), "model"), "no metric 'model'; choose one of L, gamma, seed, error"),
    (lambda table: figures(runs_of(table[:0], AXES), "error"), "no run of this sweep has ended yet"),
    (lambda table: figures(runs_of(table, {"L": [5]}), "error"), "no parameter of this sweep has more than one value"),
    (lambda table: pair_figure(table, "L", "gama", "error"), "no column 'gama'; did you mean 'gamma'?"),
    (lambda table: pair_figure(table, "L", "L", "error"), "x and y are both 'L'"),
    (lambda table: line_figure(table, "l", "error"), "no column 'l'"),
    (lambda table: line_figure(table.assign(L="5 10"), "L", "error", axes={"L": ["5", "10"]}), "many values of 'L', which was swept"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said_in_one_line(call, words):
    with pytest.raises(SweepError) as error:
        call(random_table(0))
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- in a terminal ----

def task(number: int, status: str = "finished", **changes) -> dict:
    args = {"L": 5, "gamma": 0.03, "seed": number, "epochs": 2}
    facts = dict(task=f"{number:020x}", status=status, code="c", args=args, swept=["L", "gamma", "seed"], points=[str(number)])
    return facts | dict(seconds=12.3, error="", attempts=[]) | changes


def test_plain_lines(capsys):
    with live(15, done=2) as view:
        view.running([task(0, "running")])
        view.ended(task(0))
        view.ended(task(1, "failed", error="Traceback (most recent call last)\n\x1b[31mValueError\x1b[0m: no such set\n\n", seconds=200.0))
        view.ended(task(2))
        view.ended(task(3, "diverged", seconds=0.25))
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "finished 3 of 15: L = 5, gamma = 0.03, seed = 0 (12 s)",
        "failed 1 of 15: L = 5, gamma = 0.03, seed = 1 (3 min 20 s): ValueError: no such set",
        "finished 4 of 15: L = 5, gamma = 0.03, seed = 2 (12 s)",
        "diverged 1 of 15: L = 5, gamma = 0.03, seed = 3 (0.2 s)",
    ]


SCRIPT = """
import sys
from flatmin_nb.lab.sweep_views import live
record = dict(task="0" * 20, status="finished", args={"L": [5, 10], "name": "[red]a[/red]"}, swept=["L", "name"], seconds=1.0, error="")
print("on stdout")
with live(4, 1) as view:
    view.running([record | {"status": "running"}, record | {"status": "waiting"}])
    view.ended(record)
    view.ended(record | {"status": "failed", "error": "x\\n\x1b]0;title\x07bad \x1b[2Jnews"})
"""


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "CLICOLOR_FORCE": "1"}])
def test_a_file_gets_lines_without_control_characters(environment):
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=os.environ | environment, timeout=60)
    assert result.stdout == b"on stdout\n"
    assert result.stderr.decode().splitlines() == [
        "finished 2 of 4: L = [5, 10], name = [red]a[/red] (1.0 s)",
        "failed 1 of 4: L = [5, 10], name = [red]a[/red] (1.0 s): bad news",
    ]
    assert not re.search(rb"[^\n\x20-\x7e]", result.stderr)


def on_a_terminal(**environment: str) -> tuple[str, bytes]:
    "What SCRIPT writes to stderr, which is a terminal, and to stdout, which is none."
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"} | environment
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    return seen.decode(), out


def test_a_terminal_gets_a_bar_and_a_table():
    seen, out = on_a_terminal()
    words = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert out == b"on stdout\n"
    assert "━" in words and "2 finished, 1 failed, 1 waiting of 4" in words
    assert re.search(r"finished\s+L = \[5, 10\], name = \[red\]a\[/red\]\s+1.0 s", words) and "bad news" in words
    assert "\x1b[2J" not in seen and "title" not in seen
    assert seen.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_dumb_terminal_gets_lines():
    seen, _ = on_a_terminal(TERM="dumb")
    assert seen.replace("\r\n", "\n").startswith("finished 2 of 4: ") and "\x1b" not in seen


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_jupyter=False, color_system=None, _environ={"TERM": "xterm"})


def look(view: Live, width: int = 80) -> list[str]:
    picture = Console(file=io.StringIO(), width=width, force_terminal=False, force_jupyter=False, color_system=None)
    picture.print(view.look())
    return picture.file.getvalue().splitlines()


def test_the_last_eight_and_all_counts():
    view = live(30, 5, terminal())
    assert isinstance(view, Live)
    for number in range(12):
        view.ended(task(number, ["finished", "failed", "diverged"][number % 3], error="" if number % 3 == 0 else "why"))
    view.running([task(20, "running"), task(21, "running"), task(22, "waiting"), {"task": "x", "status": "waiting"}])
    bar, counts, *rows = look(view, 120)
    assert len(bar) == 80 and set(bar) == {"━"}
    assert counts.startswith("9 finished, 4 diverged, 4 failed, 2 running, 11 waiting of 30; ")
    assert counts.endswith("about 1 min 14 s left")  # 12.3 (11 + 2 / 2) / 2
    assert [int(re.search(r"seed = (\d+)", row)[1]) for row in rows] == [*range(4, 12)]
    assert len(look(view)) == 11 and all(len(row) <= 80 for row in look(view))


def test_a_terminal_that_is_narrow_cuts_what_is_long():
    view = live(3, 0, terminal(40))
    view.ended(task(0, "failed", error="word " * 50))
    assert all(len(line) <= 40 for line in look(view, 40)) and len(look(view, 40)) == 4  # the counts take two lines


def test_a_sweep_of_nothing():
    view = live(0, 0, terminal())
    assert look(view)[1] == "no tasks"


def test_a_console_that_is_no_terminal_gets_lines():
    console = Console(file=io.StringIO(), force_terminal=False, force_jupyter=False)
    view = live(2, 0, console)
    view.ended(task(0))
    assert type(view) is Lines and console.file.getvalue() == "finished 1 of 2: L = 5, gamma = 0.03, seed = 0 (12 s)\n"


def test_the_number_that_came_out(tmp_path):
    out = tmp_path / "tasks" / f"{0:020x}" / "out"
    contents = ['{"summary": {"test_error": 2.5}}', '{"summary": {"test_error": 1.25}}', '{"summ', "[]", "{}"]
    for name, content in zip("abcde", contents):
        (out / name).mkdir(parents=True)
        (out / name / "run.json").write_text(content)
    assert summaries(out) == [{"test_error": 2.5}, {"test_error": 1.25}, {}]
    view = live(2, 0, terminal(100), folder=tmp_path)
    view.ended(task(0))
    assert look(view, 100)[-1].rstrip().endswith("12 s  test_error = 1.25 to 2.5")
    assert result([{"test_error": "nan", "test_loss": 0.5}]) == "test_loss = 0.5" and result([{"a": 1}]) == ""


@pytest.mark.parametrize("text, expected", [
    ("\x1b[0;31mred\x1b[0m", "red"), ("a\tb\r\nc", "a b c"), ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"), ("bell\x07", "bell"),
    ("Grüße …", "Grüße …"), ("\x9b31mx", "31mx"), ("\u202eabc", "abc"),
])  # fmt: skip
def test_control_characters_are_taken_out(text, expected):
    assert clean(text) == expected


def test_long_slices_are_short_in_words():
    long = task(0, args={"L": [*range(100)], "gamma": [0.1, 0.2], "seed": "x"})
    assert in_words(long) == "L = [0, 1, ..., 99], gamma = [0.1, 0.2], seed = x"
    assert in_words({"task": "abc", "status": "waiting"}) == "abc"
    assert said(task(0, error=None), 1, 2) == "finished 1 of 2: L = 5, gamma = 0.03, seed = 0 (12 s)"


# ---- in a notebook ----

GRID = {"L": [10, 5], "gamma": [0.3, 0.03, 0.003], "seed": [0, 1]}


def sweep_folder(path, states, axes=GRID, points=None, asked=None) -> Sweep:
    "A folder as lab.sweep writes it: a task for each state, the others have not begun."
    sweep = Sweep(path)
    path.mkdir()
    every = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    names = [f"{number:020x}" for number in range(len(every))]
    write_json(path / "sweep.json", dict(notebook="n.ipynb", code="c", axes=axes, points=points or len(every), tasks=asked or names))
    for name, point, state in zip(names, every, states):
        sweep.write(task(0, state, task=name, args=point, swept=[*axes], points=[name]))
        if state in ("finished", "diverged"):
            (sweep.folder(name) / "out").mkdir()
            record = dict(status=state, parameters=point, summary={"test_error": point.get("L", 0) + point["seed"]})
            (sweep.folder(name) / "out" / "run.json").write_text(json.dumps(record))
    return sweep


def test_the_state_of_every_point(tmp_path):
    states = ["finished", "diverged", "failed", "running"]
    sweep_folder(tmp_path / "a", states)
    found = states_of(load(tmp_path / "a"))
    assert [*map(found.get, itertools.product(*GRID.values()))] == ["finished", "diverged", "failed", "interrupted"] + ["waiting"] * 8


def test_of_parameters_that_advance_together_only_what_has_begun_has_a_place(tmp_path):
    sweep_folder(tmp_path / "a", ["finished"], points=6)
    assert states_of(load(tmp_path / "a")) == {(10, 0.3, 0): "finished"}


def test_a_slice_fills_its_points(tmp_path):
    axes = {"L": [5, 10], "seeds": ["0", "1", "2"]}
    sweep = sweep_folder(tmp_path / "a", [], axes, asked=["1" * 20, "2" * 20])
    sweep.write(task(0, task="1" * 20, args={"L": 5, "seeds": "0 1 2"}, swept=["L", "seeds"], points=["a", "b", "c"]))
    sweep.write(task(0, "failed", task="0" * 20, args={"L": 5, "seeds": "2"}, swept=["L", "seeds"], points=["c"]))  # of an earlier sweep
    sweep.write(task(0, "failed", task="3" * 20, args={"L": 7, "seeds": "2"}, swept=["L", "seeds"], points=["d"]))
    states = states_of(load(tmp_path / "a"))
    assert states == {(L, seed): "finished" if L == 5 else "waiting" for L in (5, 10) for seed in "012"}


def test_a_parameter_of_one_value_takes_no_place(tmp_path):
    axes = {"epochs": [2], "L": [5, 10], "seed": [0, 1]}
    sweep_folder(tmp_path / "a", ["finished"] * 3, axes)
    runs = load(tmp_path / "a")
    assert states_of(runs) == {(5, 0): "finished", (5, 1): "finished", (10, 0): "finished", (10, 1): "waiting"}
    assert grid_figure(runs, "test_error").axes[0].get_xlabel() == "L" and [*figures(runs, "test_error")] == ["L"]


def pixels(figure: Figure, x: int, y: int) -> np.ndarray:
    "The colours in a cell, by rows and columns of fields, the bottom row first."
    image = figure.axes[0].images[0]
    fields = image.get_array()
    left, right, bottom, top = image.get_extent()
    wide, high = fields.shape[1] // round(right - left), fields.shape[0] // round(top - bottom)
    return fields[y * high : (y + 1) * high, x * wide : (x + 1) * wide]


def test_fields_have_the_colour_of_their_state(tmp_path):
    from matplotlib.colors import to_rgba

    sweep_folder(tmp_path / "a", ["finished", "diverged", "failed"])
    runs = load(tmp_path / "a")
    figure = grid_figure(runs)
    colours = {text.get_text(): handle[0].get_markerfacecolor() for text, handle in zip(figure.legends[0].get_texts(), handles_of(figure))}
    assert set(colours) == {"waiting", "finished", "diverged", "failed"}
    cell = pixels(figure, 0, 0)  # L = 10, gamma = 0.3
    assert cell.shape == (1, 2, 4)
    assert cell[0, 0].tolist() == pytest.approx(to_rgba(colours["finished"]))
    assert cell[0, 1].tolist() == pytest.approx(to_rgba(colours["diverged"]))
    assert pixels(figure, 0, 1)[0, 0].tolist() == pytest.approx(to_rgba(colours["failed"]))
    assert pixels(figure, 1, 2)[0, 1].tolist() == pytest.approx(to_rgba(colours["waiting"]))
    assert ticks(figure.axes[0].xaxis) == ["10", "5"] and ticks(figure.axes[0].yaxis) == ["0.3", "0.03", "0.003"]
    swapped = grid_figure(runs, x="seed", y="L")
    assert pixels(swapped, 0, 0).shape == (1, 3, 4) and pixels(swapped, 0, 0)[0, 0].tolist() == pytest.approx(to_rgba(colours["finished"]))


def handles_of(figure: Figure) -> list:
    "Square and mark of each entry of the legend, as they are drawn."
    from matplotlib.lines import Line2D

    lines = [line for line in figure.legends[0].findobj(Line2D)]
    return [(lines[place], lines[place + 1]) for place in range(0, len(lines), 2)]


def test_a_metric_colours_what_is_finished(tmp_path):
    sweep_folder(tmp_path / "a", ["finished", "finished", "diverged"] + ["finished"] * 5)
    figure = grid_figure(load(tmp_path / "a"), "test_error")
    ax, bar = figure.axes
    assert bar.get_ylabel() == "test_error" and bar.get_ylim() == (5, 11)
    from matplotlib import colormaps

    shade = lambda value: pytest.approx(colormaps["viridis"]((value - 5) / 6))
    assert pixels(figure, 0, 0)[0, 0].tolist() == shade(10) and pixels(figure, 0, 0)[0, 1].tolist() == shade(11)
    assert pixels(figure, 1, 0)[0, 0].tolist() == shade(5)
    assert pixels(figure, 0, 1)[0, 0].tolist() == [1, 1, 1, 1]  # diverged: a mark on white
    assert len(grid_figure(load(tmp_path / "a"), "not_there_yet").axes) == 1


def test_one_parameter_has_one_row(tmp_path):
    sweep_folder(tmp_path / "a", ["finished"] * 3, {"seed": [0, 1, 2, 3]})
    figure = grid_figure(load(tmp_path / "a"))
    assert figure.axes[0].get_ylabel() == "" and figure.axes[0].images[0].get_array().shape == (1, 4, 4)
    assert drawn({"seed": [0, 1]}) == ["seed"]


@pytest.mark.parametrize("options, words", [(dict(x="gama"), "no swept parameter 'gama'; did you mean"), (dict(x="L", y="L"), "both 'L'")])
def test_a_wrong_grid_is_refused_in_one_line(tmp_path, options, words):
    sweep_folder(tmp_path / "a", [])
    with pytest.raises(SweepError, match=re.escape(words)):
        filling(tmp_path / "a", seconds=0, **options)
    with pytest.raises(SweepError, match="holds no sweep"):
        filling(tmp_path, seconds=0)


def text_of(widget) -> str:
    return re.sub("<.*?>", "", widget.children[1].value)


def picture_of(widget) -> tuple[str, bytes]:
    "What it says to who cannot see it, and the PNG."
    about, data = re.fullmatch('<img alt="(.*)" src="data:image/png;base64,(.*)">', widget.children[0].value).groups()
    return about, base64.b64decode(data)


def thread_of(folder) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == f"filling {folder}"), None)


def test_the_widget_follows_until_all_have_ended(tmp_path):
    folder = tmp_path / "a"
    sweep = sweep_folder(folder, ["finished"] * 3 + ["running"])
    widget = filling(folder, "test_error", seconds=0.05)
    before, thread = picture_of(widget), thread_of(folder)
    assert text_of(widget) == "3 finished, 1 interrupted, 8 waiting of 12" and thread.daemon
    assert before[0] == f"grid of L by gamma, a field for each point: {text_of(widget)}" and before[1].startswith(b"\x89PNG")
    assert [type(child).__name__ for child in widget.children] == ["HTML", "HTML"]  # an Output can hang nbconvert
    for number, values in enumerate(itertools.product(*GRID.values())):
        sweep.write(task(0, "failed", task=f"{number:020x}", args=dict(zip(GRID, values)), points=[]))
    thread.join(timeout=30)
    assert not thread.is_alive() and text_of(widget) == "12 failed of 12" and picture_of(widget)[1] != before[1]


def test_the_widget_can_be_stopped_and_says_what_is_wrong(tmp_path):
    folder = tmp_path / "a"
    sweep_folder(folder, ["finished"])
    widget = filling(folder, "test_eror", seconds=0.05)
    assert text_of(widget) == "1 finished, 11 waiting of 12; no metric &#x27;test_eror&#x27;; did you mean &#x27;test_error&#x27;?"
    thread = thread_of(folder)
    folder.rename(tmp_path / "b")
    said = threading.Event()
    widget.children[1].observe(lambda change: "holds no sweep" in change["new"] and said.set(), "value")
    assert said.wait(30)
    (tmp_path / "b").rename(folder)
    said.clear()
    widget.children[1].observe(lambda change: "1 finished" in change["new"] and said.set(), "value")
    assert said.wait(30)  # it goes on when the folder is back
    widget.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert widget.update() is False


def test_nothing_follows_a_sweep_that_has_ended(tmp_path):
    sweep_folder(tmp_path / "a", ["finished"] * 6 + ["failed"] * 6)
    assert text_of(filling(tmp_path / "a")) == "6 finished, 6 failed of 12" and thread_of(tmp_path / "a") is None


@pytest.mark.slow
def test_a_notebook_with_the_widget_ends(tmp_path):
    "A page is run by nbconvert while the sweep still fills."
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    sweep_folder(tmp_path / "a", ["finished"])
    page = nbformat.v4.new_notebook()
    page.cells = [nbformat.v4.new_code_cell(source) for source in (
        "from flatmin_nb.lab.sweep_views import filling", "view = filling('a', seconds=0.1)\nview",
        "import time; time.sleep(1); print(view.children[1].value)",
    )]  # fmt: skip
    ExecutePreprocessor(timeout=60).preprocess(page, {"metadata": {"path": str(tmp_path)}})
    assert "application/vnd.jupyter.widget-view+json" in page.cells[1].outputs[0].data
    assert page.cells[2].outputs[0].text == "<span role='status'>1 finished, 11 waiting of 12</span>\n"
