"""What a sweep is asked for: parameters that are read, hostile text, axes, points, tables and slices."""
import builtins
import inspect
import itertools
import json
import math
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch

from flatmin_nb.lab import grids
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.grids import (
    SETS_ITSELF,
    UNKNOWN,
    Parameter,
    SweepError,
    axis,
    combinations,
    declared,
    declared_slices,
    evaluated,
    geomspace,
    handed_over,
    known,
    linspace,
    logspace,
    rows_of,
    single,
    sliced,
)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("0[2-6]*.ipynb"))


def one_line(error) -> str:
    assert isinstance(error.value, OneLineError) and isinstance(error.value, ValueError)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(SweepError) as error:
        call(*arguments, **keywords)
    return one_line(error)


def of(kind, name="p") -> Parameter:
    return Parameter(name, kind)


# ---- the parameters of a notebook ----

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_parameters_of_our_notebooks_are_what_python_makes_of_them(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    namespace: dict = {}
    exec(source, namespace)  # the independent way: let Python do it
    found = declared(source)
    assert list(found) == [name for name in namespace if not name.startswith("_")]
    assert {name: parameter.kind for name, parameter in found.items()} == namespace["__annotations__"]
    for name, parameter in found.items():
        assert (type(parameter.default), parameter.default) == (type(namespace[name]), namespace[name])
        line = next(line for line in source.splitlines() if line.startswith(f"{name}:"))
        assert line == f"{name}: {parameter.kind.__name__} = {parameter.default_source}  # {parameter.help}"
        assert axis(parameter, [parameter.default]) == [parameter.default]
        if parameter.kind is not str:
            assert axis(parameter, parameter.default_source) == [parameter.default]
        else:
            assert axis(parameter, parameter.default) == [parameter.default] == axis(parameter, parameter.default_source)
    assert set(SETS_ITSELF) <= set(found)


def test_a_parameters_cell_is_never_executed(tmp_path):
    trace = tmp_path / "trace"
    touch = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    source = f"import os\n{touch}\na: {touch} = {touch}\nb = [{touch}]\n@{touch}\ndef f(x={touch}): pass\n"
    source += f"class C:\n    {touch}\nd: 'x[0]' = 1"
    found = declared(source)
    assert not trace.exists()
    assert list(found) == ["a", "b", "d"]
    assert found["a"] == Parameter("a", Any, UNKNOWN, "", touch)


@pytest.mark.parametrize(
    "annotation, kind",
    {
        "int": int, "None": type(None), "Any": Any, "typing.Any": Any, "list": list, "list[int]": list[int],
        "typing.List[float]": list[float],
        "dict[str, list[int]]": dict[str, list[int]], "tuple[int, ...]": tuple[int, ...], "tuple[int, str]": tuple[int, str],
        "Optional[str]": Optional[str], "t.Optional[int]": Optional[int], "int | None": Optional[int], "Union[int, str]": int | str,
        "int | str | None": int | str | None, "Literal['a', 1, None]": Literal["a", 1, None], "Literal[-1]": Literal[-1], "'int'": int,
        "list['int']": list[int], "torch.dtype": Any, "int or str": Any, "list[Path]": Any, "int[str]": Any, "dict[int]": Any,
        "tuple[...]": Any,
        "list[...]": Any, "Literal[[1]]": Any, "1": Any, "'a b'": Any, "lambda: 0": Any, "f(1)": Any, "''": Any,
    }.items(),
)  # fmt: skip
def test_annotations(annotation, kind):
    found = declared(f"p: {annotation} = 5")["p"].kind
    assert found == (None if kind is type(None) else kind)


@pytest.mark.parametrize(
    "line, kind, default, source",
    [
        ("p = 5", int, 5, "5"),
        ("p = -5", int, -5, "-5"),
        ("p = True", bool, True, "True"),
        ("p = 1e-3", float, 1e-3, "1e-3"),
        ("p = None", Any, None, "None"),
        ("p = [1, 2]", list, [1, 2], "[1, 2]"),
        ("p = {'a': (1,)}", dict, {"a": (1,)}, "{'a': (1,)}"),
        ("p = 1 / 3", Any, UNKNOWN, "1 / 3"),
        ("p = 2**10", Any, UNKNOWN, "2**10"),
        ("p: float = 1 / 3", float, UNKNOWN, "1 / 3"),
        ("p: int", int, UNKNOWN, ""),
        ("p: float\np = 1", float, 1, "1"),
        ("p = 1\np = 'later'", str, "later", "'later'"),
        ("p: list[int] = [\n    1,\n    2,\n]", list[int], [1, 2], "[\n    1,\n    2,\n]"),
    ],
)
def test_defaults(line, kind, default, source):
    found = declared(line)["p"]
    assert (found.kind, found.default, found.default_source) == (float if line.endswith("\np = 1") else kind, default, source)
    assert type(found.default) is type(default)


def test_what_else_is_in_a_parameters_cell():
    source = "%matplotlib inline\n# a heading\nimport os\na = b = 1  # both\n_hidden = 2\nc, d = 3, 4\nx.y = 5\nz[0] = 6\n"
    source += "e = 'a # b'  # help # with a hash\n!ls\nfor f in (): g = 1\n"
    found = declared(source)
    assert [(name, parameter.help) for name, parameter in found.items()] == [("a", "both"), ("b", "both"), ("e", "help # with a hash")]
    assert declared("p = (  # first\n    1\n)")["p"].help == "first"
    assert declared("a = 1; b = 2  # two\r\nc = 3  # ü\r\n")["c"].help == "ü"
    assert declared("") == {}


BROKEN = ["L: int =", "L = 1\n  gamma = 2", "(" * 500, "\0", "p = 'a", "\udcff = 1", "-" * 10**5 + "1", "p = " + "[" * 150]


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_a_cell_that_cannot_be_read(source):
    assert "the parameters cell cannot be read" in refusal(declared, source)


def test_unknown_is_itself_after_a_journey():
    parameter = pickle.loads(pickle.dumps(declared("p: int = f()")["p"]))
    assert parameter.default is UNKNOWN and repr(UNKNOWN) == "UNKNOWN"


def test_names():
    parameters = declared("L: int = 20\ngamma: float = 0.1\nout: str = ''")
    known(["L", "gamma"], parameters)
    assert refusal(known, ["LL"], parameters) == "no parameter 'LL'; did you mean 'L'?"
    for name in SETS_ITSELF:
        assert "is the sweep's" in refusal(known, ["L", name], parameters)


# ---- values ----

HOSTILE = [
    # attributes, dunders and other ways to Python's insides
    "__import__('os').system('true')", "__builtins__", "().__class__", "[].__class__.__base__.__subclasses__()", "''.join(['a'])",
    "'{0.__class__}'.format(1)",
    "range.__self__", "(1).real", "[x.gi_frame for x in [1]]", "getattr(1, 'real')", "eval('1')", "open('x')", "type(1)", "dict()",
    "set()", "tuple([1])",
    "vars()", "print(1)", "repr(1)", "exec('1')", "globals()", "rand()", "randint(9)", "len", "[len]", "[range for k in [1]]",
    "min([1], key=len)",
    "sorted([1, 2], key=str)", "max(len, 1)", "list(map(len, ['a']))", "[int][0]", "{'f': len}", "len if True else 1", "True and len",
    "not_a_name",
    # syntax that is more than an expression
    "lambda: 1", "(lambda: 1)()", "f'{1}'", "f'{1:>1000000000}'", "f'{9**9**9}'", "x := 5", "(x := 5)", "x = 5", "import os", "1; 2",
    "1\n2", "del x", "await x",
    "(yield)", "[await x for x in [1]]", "[1, 2][0]", "'abc'[::2]", "{1, 2}", "{x for x in [1]}", "{x: x for x in [1]}",
    "range(**{'a': 1})", "range(*[1])",
    "[0 for x.y in [1]]", "[0 for x[0] in [1]]", "[0 for *a, b in [[1, 2]]]", "[0 async for x in [1]]", "1 is 1", "1 << 9", "1 | 2",
    "~1", "[1] @ [2]",
    # values that are none
    "1j", "(-8)**0.5", "b'a'", "...", "float('nan')", "1e999 - 1e999", "'\\ud800' + len", "1e999 * 0",
    # what would take all time
    "9**9**9", "9.0**9**9", "4000000**4000000", "2**1025", "(2**1000)**(2**1000)", "-9**9**9", "round(5, -10**9)", "round(5, -2**60)",
    "'9' * 5000 + 1",
    "int('9' * 5000)", "9" * 5000, "0x" + "f" * 5000, "int('f' * 90000, 16)", "10**-10**10 * len", "exp(10**9)", "2.0**10000",
    "[0 for a in range(9999) for b in range(9999)]", "[[0 for b in range(9999)] for a in range(9999)]",
    "[y for y in [range(99999)] for k in range(9999)]",
    "[len(y) for y in [list(range(99999))] for k in range(9999)]", "[sorted(range(99999)) for k in range(9999)]",
    "[str(2**1000) for k in range(9999)]",
    "[linspace(0, 1, 99999) for k in range(9999)]", "sum([[0] * 9999] * 9, [])", "[y in [range(99999)] for y in range(9999)]", "min(*[1])",
    # what would take all memory
    "'a' * 10**9", "10**9 * 'a'", "[0] * 10**9", "(0,) * 10**9", "[[0] * 99999] * 99999", "['a' * 99999] * 99999",
    "[[[[0] * 99] * 99] * 99] * 99",
    "range(10**12)", "range(-10**30, 10**30)", "list(range(10**12))", "[*range(99999), " + "*range(99999), " * 600 + "]",
    "linspace(0, 1, 10**9)", "logspace(0, 1, 10**9)",
    "geomspace(1, 2, 10**9)", "'%1000000000d' % 1", "'%s' % 1", "'%*d' % (10**9, 1)", "str([[0] * 9999] * 9)",
    "[('a' * 99999) + str(k) for k in range(9999)]",
    "[" + "[x, x] for x in [" * 25 + "0" + "]]" * 25, "zip(" + "range(99999), " * 600 + ")", "list(enumerate('a' * 10**9))",
    "[k * [k] for k in range(9999)]",
    # what would overflow a stack
    "(" * 4000 + "1" + ")" * 4000, "[" * 90 + "]" * 90, "[" * 4000, "-" * 9000 + "1", "not " * 2000 + "1", "1" + " + 1" * 2000,
    "1" + "**1" * 2000, "1" + " if 1 else 1" * 500,
    "[" * 60 + "1" + " for x in [1]]" * 60, "a" + ".a" * 4000, "f" + "()" * 3000, "{1:" * 1000, "lambda:" * 1000 + "1",
    "1" + " <= 1" * 2000 + " <= len", "0" + " or 0" * 1500 + " or len",
    # text that is no text
    "", "  ", "\0", "1\0", "'\0", "\udcff", "'\udcff' + len", "1" * 10_001, "'" + "a" * 10_000 + "'", "'\\N{SNOWMAN", "\\", "#", "\n",
    "\ufeff1 1", "1_", "007", "0b2",
    # slips
    "1 / 0", "1 +", "[1, 2", "1 + 'a'", "[1] + 1", "sqrt(-1)", "log(0)", "int('a')", "range(1.5)", "range(0, 9, 0)", "linspace(0, 1)",
    "linspace(0, 1, 2.0)", "linspace(0, 1, 0)",
    "linspace(0, 1, True)", "linspace(0, float('inf'), 3)", "linspace('a', 1, 3)", "logspace(0, 400, 3)", "logspace(0, 1, 3, base=-2)",
    "geomspace(0, 1, 3)", "geomspace(-1, 1, 3)",
    "logspace(0, 1, count=3, bas=2)", "sum(['a', 'b'])", "str([1])", "round('a')", "{[1]: 2}", "[1] < ['a']", "-'a'", "len(5)", "min()",
    "[k for k in 5]", "[a for a, b in [1]]", "nan", "true",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_refused_in_one_line(text):
    said = refusal(evaluated, text, "p")
    assert said.startswith("parameter 'p' = ") and len(said) < 350 and said.isprintable()
    assert "MemoryError" not in said and "recursion" not in said  # refused before it comes to that


def test_hostile_text_needs_little_memory_and_time():
    "All of them together, in a process that the system ends beyond 600 MB or a minute of computing."
    code = f"""if True:
        import resource, sys
        from flatmin_nb.lab.grids import SweepError, evaluated
        resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        refused = 0
        for text in {ascii(HOSTILE)}:
            try:
                evaluated(text, "p")
            except SweepError:
                refused += 1
        print(refused)
    """
    result = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.strip()) == (0, str(len(HOSTILE))), result.stderr[-2000:]


def test_no_limit_is_reached_by_what_is_wanted():
    assert evaluated("range(100000)", "p") == list(range(100_000))
    assert evaluated("[k**2 % 7 + 0.5 for k in range(10000)]", "p") == [k**2 % 7 + 0.5 for k in range(10000)]
    assert evaluated("2**1023", "p") == 2**1023
    assert evaluated("'" + "a" * 9998 + "'", "p") == "a" * 9998
    assert evaluated("1" + " + 1" * 40, "p") == 41
    assert len(evaluated("linspace(0, 1, 100000)", "p")) == 100_000


def test_an_evaluation_leaves_nothing_for_the_next():
    for _ in range(3):
        assert len(evaluated("[k for k in range(9999)]", "p")) == 9999
        refusal(evaluated, "[k for k in range(10001)]", "p")
        refusal(evaluated, "[list for list in [1]] + [list]", "p")
        assert evaluated("list(range(2))", "p") == [0, 1]
    assert refusal(evaluated, "[[k for k in [1]], k]", "p").endswith(": no name 'k'; choose one of pi, True, False, None")


def expression(chance: random.Random, depth: int, names: tuple = ()) -> str:
    "A random expression of what is allowed; most of them mean something."
    if depth == 0:
        return chance.choice([*names, *names, "0", "1", "2", "7", "0.5", "1e-3", "True", "None", "'ab'", "''", "pi"])

    def part(extra=()):
        return expression(chance, depth - 1, names + tuple(extra))

    variable = chance.choice("xyz")
    return chance.choice([
        lambda: f"({part()} {chance.choice(['+', '-', '*', '/', '//', '%', '**', '<', '<=', '==', '!=', 'in', 'and', 'or'])} {part()})",
        lambda: f"({chance.choice(['-', '+', 'not '])}{part()})",
        lambda: f"({part()} if {part()} else {part()})",
        lambda: f"[{part()}, {part()}]",
        lambda: f"({part()}, *[{part()}])",
        lambda: f"{{{part()}: {part()}}}",
        lambda: f"[{part(variable)} for {variable} in {chance.choice(['range(3)', part()])}]",
        lambda: f"[{part(variable)} for {variable} in range(4) if {part(variable)}]",
        lambda: f"{chance.choice(['min', 'max', 'sum', 'len', 'sorted', 'list', 'abs', 'sqrt', 'log', 'int', 'float', 'round'])}({part()})",
    ])()  # fmt: skip


def test_what_is_computed_is_what_python_computes():
    chance = random.Random(0)
    python = {name: getattr(builtins, name) for name in "range min max sum len sorted list abs int float round".split()}
    python |= {"sqrt": math.sqrt, "log": math.log, "pi": math.pi, "__builtins__": {}}
    equal = refused = 0
    for _ in range(3000):
        text = expression(chance, chance.randint(1, 4))
        try:
            theirs = eval(text, dict(python))  # of the test's own making
        except Exception:
            refusal(evaluated, text, "p")
            refused += 1
            continue
        try:
            ours = evaluated(text, "p")
        except SweepError as error:  # what Python can do and is not allowed
            assert re.search(r"is no value|unsupported operand|% is for|integer has|nan is|at most|no name", str(error)), (text, str(error))
            continue
        assert repr(ours) == repr(theirs), text
        equal += 1
    assert equal > 1000 and refused > 300


def test_rubbish_is_refused_too():
    chance = random.Random(1)
    words = "[ ] ( ) { } , : for in if else k range 1 2 'a' ** * + - . lambda f'{1}' = not len % \0 \\ é :=".split(" ") + ["\n"]
    for _ in range(5000):
        text = " ".join(chance.choices(words, k=chance.randint(1, 12)))
        try:
            evaluated(text, "p")
        except SweepError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("seed", range(20))
def test_evenly_spaced_numbers_are_numpys(seed):
    chance = random.Random(seed)
    first, last, count = chance.uniform(-5, 5), chance.uniform(-5, 5), chance.randint(1, 40)
    assert linspace(first, last, count) == pytest.approx(np.linspace(first, last, count), rel=1e-12, abs=1e-14)
    assert logspace(first, last, count) == pytest.approx(np.logspace(first, last, count), rel=1e-12)
    assert logspace(first, last, count, base=2) == pytest.approx(np.logspace(first, last, count, base=2), rel=1e-12)
    assert geomspace(10**first, 10**last, count) == pytest.approx(np.geomspace(10**first, 10**last, count), rel=1e-12)
    assert linspace(first, last, count)[0] == first and geomspace(10**first, 10**last, count)[0] == 10**first
    if count > 1:
        assert linspace(first, last, count)[-1] == last and geomspace(10**first, 10**last, count)[-1] == 10**last


def test_evenly_spaced_numbers_are_floats_and_round_where_they_can_be():
    assert repr(linspace(0, 10, 3)) == "[0.0, 5.0, 10.0]"
    assert logspace(-8, 3, 12) == [float(f"1e{k}") for k in range(-8, 4)]
    assert geomspace(1e-8, 1e3, 12) == [float(f"1e{k}") for k in range(-8, 4)]
    assert linspace(0, 1, 101) == [k / 100 for k in range(101)]


# ---- axes ----

AXES = [
    (int, "5", [5]), (int, " 5 ", [5]), (int, "[5]", [5]), (int, "1, 2", [1, 2]), (int, "(1, 2)", [1, 2]), (int, "range(3)", [0, 1, 2]),
    (int, "range(2, 5)", [2, 3, 4]), (int, "range(-2, 1)", [-2, -1, 0]),
    (int, "(2**k for k in range(3))", [1, 2, 4]), (int, 5, [5]), (int, [5, 6], [5, 6]), (int, (5, 6), [5, 6]), (int, range(2), [0, 1]),
    (int, iter([1, 2]), [1, 2]),
    (int, {1: 0, 2: 0}.keys(), [1, 2]), (int, np.arange(2), [0, 1]), (int, [np.int64(3), torch.tensor(4)], [3, 4]),
    (int, torch.arange(2), [0, 1]), (int, np.int32(7), [7]),
    (float, "0.5", [0.5]), (float, "1", [1.0]), (float, "[1e-3, 1]", [1e-3, 1.0]), (float, "range(2)", [0.0, 1.0]),
    (float, np.float32(0.5), [0.5]), (float, "float('inf')", [math.inf]), (float, "-1", [-1.0]),
    (bool, "True", [True]), (bool, "[True, False]", [True, False]), (bool, [np.bool_(True)], [True]),
    (str, "sgd", ["sgd"]), (str, "sgd adam", ["sgd adam"]), (str, "007", ["007"]), (str, "5", ["5"]), (str, "0:5", ["0:5"]),
    (str, "-8:8:2", ["-8:8:2"]), (str, "", [""]), (str, " a", [" a"]),
    (str, "None", ["None"]), (str, "1.5", ["1.5"]), (str, "conv*:0.5 h*:0.2", ["conv*:0.5 h*:0.2"]),
    (str, "large+momentum", ["large+momentum"]), (str, "don't", ["don't"]), (str, "f(x)", ["f(x)"]),
    (str, "min", ["min"]), (str, "(none)", ["(none)"]), (str, "a.b", ["a.b"]), (str, "~/data", ["~/data"]), (str, "NaN", ["NaN"]),
    (str, "a if b else c", ["a if b else c"]), (str, "[sgd", None),
    (str, "'007'", ["007"]), (str, '"a", "b"', ["a", "b"]), (str, "['a', 'b c']", ["a", "b c"]), (str, "['a'] + ['b']", ["a", "b"]),
    (str, "('a' + str(k) for k in range(2))", ["a0", "a1"]),
    (str, "range(2)", ["0", "1"]), (str, "[1, 2]", ["1", "2"]), (str, "['a', None]", None), (str, "[0.5]", ["0.5"]), (str, "[True]", None),
    (str, 5, ["5"]), (str, ["range(3)", "[1]"], ["range(3)", "[1]"]),
    (str, "a, b", None), (str, "[a, b]", None), (str, "('a'", None), (str, "'a", None), (str, "a\0b", ["a\0b"]), (str, "\udcff", None),
    (str, np.array(["a", "b"]), ["a", "b"]),
    (Optional[str], "None", [None]), (Optional[str], "a", ["a"]), (Optional[str], "[None, 'a']", [None, "a"]),
    (Optional[int], "None", [None]), (Optional[int], "[None, 3]", [None, 3]), (Optional[int], None, [None]),
    (Literal["a", "b"], "a", ["a"]), (Literal["a", "b"], "['a', 'b']", ["a", "b"]), (Literal["a", "b"], "c", None),
    (Literal[1, 2], "[1, 2]", [1, 2]), (Literal[1, 2], "3", None),
    (list[int], "[32, 16]", [[32, 16]]), (list[int], "[[32, 16], [64]]", [[32, 16], [64]]), (list[int], "[[32]]", [[32]]),
    (list[int], "[]", [[]]), (list[int], "[[]]", [[]]), (list[int], "32, 16", None),
    (list[int], "5", None), (list[int], "['a']", None), (list[int], "[[1], ['a']]", None), (list[int], "range(3)", [[0, 1, 2]]),
    (list[int], "[[k] * 2 for k in range(2)]", [[0, 0], [1, 1]]),
    (list, "[1, 'a']", [[1, "a"]]), (list, "[[1], [2]]", [[1], [2]]), (list, "[[1], 2]", [[[1], 2]]),
    (list[list[int]], "[[1], [2]]", [[[1], [2]]]), (list[list[int]], "[[[1]], [[2]]]", [[[1]], [[2]]]),
    (list[str], "['a', 'b']", [["a", "b"]]), (list[int] | None, "None", [None]), (list[int] | None, "[None, [1]]", [None, [1]]),
    (list[int] | None, "[1]", [[1]]), (list[int], [32, 16], [[32, 16]]),
    (list[int], np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]), (list[float], "[1, 0.5]", [[1.0, 0.5]]),
    (list[int] | str, "['a', [1]]", ["a", [1]]), (list[int] | str, "['a', 'b']", ["a", "b"]),
    (tuple[int, ...], "(1, 2)", [(1, 2)]), (tuple[int, ...], "((1, 2), (3,))", [(1, 2), (3,)]),
    (tuple[int, ...], "[(1, 2), (3,)]", [(1, 2), (3,)]), (tuple[int, int], "(1, 2, 3)", None), (tuple, "[1]", None),
    (dict[str, int], "{'a': 1}", [{"a": 1}]), (dict[str, int], "[{'a': 1}, {'b': 2}]", [{"a": 1}, {"b": 2}]),
    (dict[str, int], "{'a': 'b'}", None), (Any, "[1, 'a']", [1, "a"]), (Any, "sgd", None), (Any, "'sgd'", ["sgd"]),
    (Any, "5", [5]), (Any, object(), None), (Any, {1, 2}, None), (Any, b"a", None), (type(None), "None", [None]), (int, {1, 2}, None),
    (int, "20.0", None), (int, "True", None), (int, "'20'", None), (int, "None", None), (int, "1:2:3", None), (int, "a:b", None),
    (int, "", None), (int, "[]", None), (int, "range(5, 5)", None), (int, [], None), (int, "0:5", None), (int, "range(10**9)", None),
    (int, "[1, 1]", None), (int, "[1, [2]]", None), (int, itertools.count(), None), (int, "range(999999)", None), (float, "True", None),
    (float, "[1, 1.0]", None), (float, math.nan, None), (float, [0.1, np.nan], None), (float, "'a'", None),
    (bool, "1", None), (bool, "true", None), (bool, "'True'", None), (Any, [1, 1.0, True, "1"], [1, 1.0, True, "1"]),
    (Any, [[1], (1,)], None), (list[float], [[math.nan]], None), (int, 10**5000, None), (float, 10**400, None),
]  # fmt: skip


@pytest.mark.parametrize("kind, given, values", AXES, ids=range(len(AXES)))
def test_an_axis(kind, given, values):
    if values is None:
        assert "'p'" in refusal(axis, of(kind), given)
    else:
        found = axis(of(kind), given)
        assert repr(found) == repr(values)  # which tells 1 from 1.0 and True


@pytest.mark.parametrize(
    "kind, given, says",
    [
        (int, "[5, 5]", "parameter 'p' is given 5 twice; give each value once"),
        (int, "20.0", "parameter 'p' = 20.0: should be a valid integer; write 20"),
        (int, "'20'", "parameter 'p' = '20': should be a valid integer; p takes int"),
        (bool, "true", "parameter 'p' = 'true': no name 'true'; did you mean 'True'?"),
        (Literal["sgd", "adam"], "sdg", "parameter 'p' = 'sdg': should be 'sgd' or 'adam'; p takes Literal['sgd', 'adam']"),
        (list[int], "[1, 'a']", "parameter 'p' = [1, 'a']: should be a valid integer; p takes list[int]"),
        (
            str,
            "a, b",
            "parameter 'p' = 'a, b': no name 'a'; choose one of pi, True, False, None; "
            "a text that stands for itself has quotes of its own, \"'like this'\"",
        ),
    ],
)
def test_what_an_axis_is_refused_with(kind, given, says):
    assert refusal(axis, of(kind), given) == says


def test_an_axis_of_100000_values():
    assert axis(of(float), "range(100000)") == list(map(float, range(100_000)))
    assert "more than 100000 values" in refusal(axis, of(int), range(100_001))
    assert axis(of(list[int]), "range(100000)") == [list(range(100_000))]


# ---- points ----

def test_points_are_nested_loops():
    axes = {"a": [1, 2], "b": ["x", "y", "z"], "c": [None, [1]]}
    assert combinations(axes) == [{"a": a, "b": b, "c": c} for a in axes["a"] for b in axes["b"] for c in axes["c"]]
    assert combinations({}) == [{}]


def test_zipped_axes_advance_together():
    axes = {"a": [1, 2], "b": [5, 6], "c": ["x", "y"], "d": [7]}
    expected = [{"a": a, "b": b, "c": c, "d": 7} for a, c in zip([1, 2], "xy") for b in [5, 6]]
    for zipped in ([("a", "c")], [("c", "a")]):
        points = combinations(axes, zipped)
        assert points == expected and all(list(point) == list(axes) for point in points)
    assert combinations(axes, [("a", "c", "b")]) == [{"a": 1, "b": 5, "c": "x", "d": 7}, {"a": 2, "b": 6, "c": "y", "d": 7}]
    assert len(combinations(axes, [("a", "b"), ("c", "d")][:1])) == 4


def test_rows_meet_all_of_the_axes():
    rows = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert combinations({"c": [5, 6]}, rows=rows) == [{**row, "c": c} for row in rows for c in [5, 6]]
    assert combinations({}, rows=rows) == rows


@pytest.mark.parametrize(
    "axes, options, says",
    [
        ({"a": [1, 2], "b": [1]}, {"zipped": [("a", "b")]}, "'a' has 2 values and 'b' has 1, so they cannot advance together"),
        ({"a": [1], "b": [1]}, {"zipped": [("a", "bb")]}, "no swept parameter 'bb'; did you mean 'b'?"),
        ({}, {"zipped": [("a", "b")]}, "no parameter is swept"),
        ({"a": [1], "b": [1]}, {"zipped": [("a",)]}, "two different parameters"),
        ({"a": [1], "b": [1]}, {"zipped": [("a", "a")]}, "two different parameters"),
        ({"a": [1], "b": [1], "c": [1]}, {"zipped": [("a", "b"), ("b", "c")]}, "'b' is zipped twice"),
        ({"a": [1, 1]}, {}, "a = 1 is asked for twice"),
        ({"a": [1, 2, 1], "b": [5, 6, 5]}, {"zipped": [("a", "b")]}, "is asked for twice"),
        ({"a": [1]}, {"rows": [{"b": 1}, {"b": 1}]}, "b = 1 is asked for twice"),
        ({"a": [1]}, {"rows": [{"a": 1}]}, "'a' is in the table and has values of its own"),
        ({"a": [1]}, {"rows": []}, "no points"),
        ({"a": [1]}, {"rows": [{"b": 1}, {"c": 1}]}, "different parameters"),
        ({name: list(range(101)) for name in "abc"}, {}, "1030301 points"),
    ],
)
def test_points_that_cannot_be(axes, options, says):
    assert says in refusal(combinations, axes, **options)


# ---- tables ----

PARAMETERS = declared('L: int = 20\ngamma: float = 0.1\nmethod: str = "sgd"\nhidden: list[int] = [20]\nflag: bool = False\nout: str = ""')


def test_a_table():
    text = "\ufeffL, method ,hidden,gamma\r\n5,sgd adam,\"[32, 16]\",1e-3\r\n\r\n6, 007 ,[64],2**-3\r\n7,,[],1\r\n"
    assert repr(rows_of(text, PARAMETERS)) == repr([
        {"L": 5, "method": "sgd adam", "hidden": [32, 16], "gamma": 1e-3},
        {"L": 6, "method": "007", "hidden": [64], "gamma": 0.125},
        {"L": 7, "method": "", "hidden": [], "gamma": 1.0},
    ])  # fmt: skip


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "the table has no points"),
        ("L,gamma\n", "the table has no points"),
        ("L,gama\n1,2\n", "no parameter 'gama'; did you mean 'gamma'?"),
        ("L,\n1,2\n", "no parameter ''"),
        ("L,out\n1,2\n", "is the sweep's"),
        ("L,L\n1,2\n", "two columns 'L'"),
        ("L,gamma\n1\n", "line 2 of the table has 1 cells for 2 parameters"),
        ("L,gamma\n1,2,3\n", "line 2 of the table has 3 cells for 2 parameters"),
        ("L,gamma\n1,0.5\n\n0.5,0.5\n", "line 4 of the table: parameter 'L' = 0.5: should be a valid integer"),
        ("L,gamma\nrange(3),0.5\n", "a cell holds one value, this has 3"),
        ("L,gamma\n,0.5\n", "it is empty"),
        ("L,flag\n1,TRUE\n", "did you mean 'True'?"),
        ('L,method\n1,"a\n', "cannot be read"),
        ("L,gamma\n1," + "9" * 200_000 + "\n", "cannot be read"),
        ("L,gamma\n1,__import__('os')\n", "no function '__import__'"),
    ],
)
def test_a_table_that_cannot_be(text, says):
    assert says in refusal(rows_of, text, PARAMETERS)


# ---- slices ----

VECTORISED = declared(
    'sizes: str = "256"\nseeds: list[int] = [0]\npairs: tuple[int, ...] = (0,)\nplain = [1]\nlr: float = 0.1\nout: str = ""\n'
    'choice: Literal["a"] = "a"'
)


@pytest.mark.parametrize(
    "sources, names",
    [
        ([], ()),
        (["x = 1", "def f():\n    SLICES = ('lr',)"], ()),
        (["# SLICES = ('lr',)", "print('SLICES')", "SLICES_OF = 1", "%%bash\nSLICES", "x = SLICES"], ()),
        (['SLICES = ("sizes", "seeds")'], ("sizes", "seeds")),
        (["%time 1\nx = 2\nSLICES = ['seeds']  # list"], ("seeds",)),
        (["SLICES: tuple = ('sizes', 'pairs', 'plain')"], ("sizes", "pairs", "plain")),
        (["SLICES = ()"], ()),
    ],
)
def test_declared_slices(sources, names):
    assert declared_slices(sources, VECTORISED) == names


@pytest.mark.parametrize(
    "sources, says",
    [
        (['SLICES = ("sizes")'], "literal tuple of names"),
        (["SLICES = ('a' + 'b',)"], "literal tuple of names"),
        (["SLICES = tuple(open('x'))"], "literal tuple of names"),
        (["SLICES = (1,)"], "literal tuple of names"),
        (["SLICES: tuple"], "literal tuple of names"),
        (["SLICES, x = ('sizes',), 1"], "literal tuple of names"),
        (["SLICES += ('sizes',)"], "literal tuple of names"),
        (["SLICES = ('sizes',)", "SLICES = ('sizes',)"], "more than once"),
        (["SLICES = ('sizes', 'sizes')"], "twice"),
        (["SLICES = ('size',)"], "SLICES: no parameter 'size'; did you mean 'sizes'?"),
        (["SLICES = ('out',)"], "SLICES: parameter 'out' is the sweep's"),
        (["SLICES = ('lr',)"], "'lr' is float"),
        (["SLICES = ('choice',)"], "'choice' is Literal"),
        (["SLICES = ('sizes',)\nx = ="], "cannot be read"),
    ],
)
def test_slices_that_cannot_be_declared(sources, says):
    assert says in refusal(declared_slices, sources, VECTORISED)


def test_what_a_sliced_parameter_is_given():
    assert handed_over(VECTORISED["sizes"], ["64", "256"]) == "64 256"
    assert handed_over(VECTORISED["sizes"], [64, 0.5]) == "64 0.5"
    assert handed_over(VECTORISED["seeds"], [0, 1]) == [0, 1]
    assert handed_over(VECTORISED["pairs"], [0, 1]) == (0, 1)
    assert handed_over(VECTORISED["plain"], ["a", None]) == ["a", None]
    for value in ("64 256", "", " a", "a\n", "a\tb", None, True, [1]):
        assert "is not one word" in refusal(handed_over, VECTORISED["sizes"], ["7", value])
    refusal(handed_over, VECTORISED["seeds"], [0, "a"])


def test_one_value_of_a_sliced_parameter():
    assert axis(single(VECTORISED["seeds"]), "range(3)") == [0, 1, 2]
    assert axis(single(VECTORISED["pairs"]), "range(3)") == [0, 1, 2]
    assert axis(single(VECTORISED["plain"]), "['a', 1]") == ["a", 1]
    assert axis(single(VECTORISED["sizes"]), "0:3") == ["0:3"]
    assert axis(single(VECTORISED["sizes"]), "range(3)") == ["0", "1", "2"]
    assert axis(single(of(list[list[int]])), "[[1], [2, 3]]") == [[1], [2, 3]]
    refusal(axis, single(VECTORISED["seeds"]), "['a']")


def points_of(block: dict, names) -> list[dict]:
    names = [name for name in names if name in block]
    return [block | dict(zip(names, values)) for values in itertools.product(*(block[name] for name in names))]


@pytest.mark.parametrize("seed", range(60))
def test_every_point_is_in_one_slice(seed):
    chance = random.Random(seed)
    pool = {"a": [0.1, 0.2, 0.3], "b": [[1], [1, 2], None, "x"], "c": list(range(5)), "d": [True, 1, "1"]}
    names = chance.sample(list(pool), chance.randint(1, 4))
    axes = {name: chance.sample(pool[name], chance.randint(1, len(pool[name]))) for name in pool}
    grid = combinations(axes)
    points = [point for point in grid if chance.random() < chance.choice([0.2, 0.6, 0.95, 1])] or grid[:1]
    if chance.random() < 0.5:
        chance.shuffle(points)
    longest = {name: chance.randint(1, 3) for name in names if chance.random() < 0.4}
    before = json.dumps(points)
    blocks = sliced(points, names, longest)
    assert json.dumps(points) == before
    covered = [point for block in blocks for point in points_of(block, names)]
    assert sorted(map(repr, covered)) == sorted(map(repr, points))  # each once, and nothing else
    for block in blocks:
        assert list(block) == list(points[0]) and all(isinstance(block[name], list) for name in names)
        assert all(len(block[name]) <= most for name, most in longest.items())
    assert len(blocks) <= len(points)
    order = list(map(repr, points))  # which tells 1 from True
    begins = [min(order.index(repr(point)) for point in points_of(block, names)) for block in blocks]
    assert begins == sorted(begins)


def fewest(points: frozenset, products: list[frozenset]) -> int:
    "The least number of disjoint products that make up `points`, by trying them all."
    if not points:
        return 0
    first = min(points)
    return 1 + min(fewest(points - product, products) for product in products if first in product and product <= points)


def test_slices_of_three_by_three_are_the_fewest_that_there_can_be():
    cells = [(x, y) for x in range(3) for y in range(3)]
    subsets = [part for size in (1, 2, 3) for part in itertools.combinations(range(3), size)]
    products = [frozenset(itertools.product(xs, ys)) for xs in subsets for ys in subsets]
    for which in itertools.product([False, True], repeat=9):
        points = [cell for cell, there in zip(cells, which) if there]
        assert len(sliced([{"x": x, "y": y} for x, y in points], ["x", "y"])) == fewest(frozenset(points), products)


def test_full_products_are_one_slice():
    grid = combinations({"lr": [0.1, 0.2], "x": list(range(4)), "y": list(range(5)), "z": ["a", "b"]})
    assert sliced(grid, ["x", "y", "z"]) == [{"lr": lr, "x": [0, 1, 2, 3], "y": [0, 1, 2, 3, 4], "z": ["a", "b"]} for lr in (0.1, 0.2)]
    assert sliced(grid, []) == grid
    assert sliced([], ["x"]) == []
    assert sliced(grid[:2], ["z", "z", "not_swept"]) == [{"lr": 0.1, "x": 0, "y": 0, "z": ["a", "b"]}]
    one_missing = [point for point in grid if point != {"lr": 0.1, "x": 2, "y": 3, "z": "a"}]
    assert len(sliced(one_missing, ["x", "y", "z"])) == 3 + 1
    in_two = [block["x"] for block in sliced(grid, ["x"], {"x": 3}) if (block["lr"], block["y"], block["z"]) == (0.1, 0, "a")]
    assert in_two == [[0, 1, 2], [3]]


def test_values_stand_in_the_order_of_their_first_appearance():
    points = [{"x": x, "y": y} for x, y in [(2, 9), (1, 9), (2, 8), (1, 8), (3, 8), (3, 9)]]
    assert sliced(points, ["x", "y"]) == [{"x": [2, 1, 3], "y": [9, 8]}]
    points = [{"x": x, "y": y} for x, y in [(1, "a"), (2, "b"), (2, "a")]]
    assert sliced(points, ["x", "y"]) == [{"x": [1], "y": ["a"]}, {"x": [2], "y": ["a", "b"]}]


def test_longest_slices_that_cannot_be():
    points = combinations({"x": [1, 2], "y": [1]})
    assert refusal(sliced, points, ["x"], {"z": 3}) == "no sliced parameter 'z'; choose one of x"
    assert "no parameter is sliced" in refusal(sliced, points, [], {"x": 3})
    for most in (0, -1, True, 1.5, "2"):
        assert "must be an integer from 1" in refusal(sliced, points, ["x"], {"x": most})
    assert sliced(points, ["x", "not_swept"], {"not_swept": 3}) == [{"x": [1, 2], "y": 1}]


# ---- the module ----

def test_importing_is_light():
    heavy = {"torch", "pandas", "numpy", "ray", "papermill", "matplotlib", "IPython"}
    code = f"import sys, flatmin_nb.lab.grids; print(*({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_no_text_is_run_as_python():
    assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\(", inspect.getsource(grids))
