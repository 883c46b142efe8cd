"""Attacks on the reader of old pickles, damage of every kind, and what numpy 1 and numpy 2 really write."""
import argparse
import base64
import codecs
import copyreg
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.pickles import DEEPEST, PickleError, each, read

LIMIT = 2**32  # bytes of address space that a hostile file may not make a process ask for


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "run.pk"


codecs.lookup("raw-unicode-escape")  # so that it is there: texts of protocol 0 are decoded by it
SEEN: list[tuple] | None = None  # what Python reports of itself while a list is here


def hook(event: str, arguments: tuple) -> None:
    if SEEN is not None and event.partition(".")[0] in ("open", "import", "exec", "compile", "os", "subprocess", "pickle", "shutil", "socket", "ctypes", "code", "marshal"):
        SEEN.append((event, arguments[0] if arguments else None))


sys.addaudithook(hook)


def watched(file: Path) -> list:
    "`read`, which may open the file and do nothing else that Python reports: no import, no code, no process, no other file."
    global SEEN
    SEEN = seen = []
    try:
        return read(file)
    finally:
        SEEN = None
        assert {event for event, _ in seen} <= {"open"} and {str(what) for _, what in seen} <= {str(file)}, seen


def refused(file: Path, content: bytes) -> str:
    "The one line with which a file is refused, without having done anything."
    file.write_bytes(content)
    with pytest.raises(PickleError) as caught:
        watched(file)
    assert isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(file) in message and "copy the file again" in message and len(message) < 500 + len(str(file))
    return message


def test_the_watch_sees_what_pickle_does(file):
    global SEEN
    file.write_bytes(pickle.dumps(Calls(os.getcwd)) + pickle.dumps(Calls(os.system, "true")))
    SEEN = seen = []
    try:
        with open(file, "rb") as opened:
            pickle.load(opened), pickle.load(opened)
    finally:
        SEEN = None
    assert {"open", "pickle.find_class", "os.system"} <= {event for event, _ in seen}


def text(word: str) -> bytes:
    raw = word.encode()
    return b"\x8c" + bytes([len(raw)]) + raw if len(raw) < 256 else b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def of(*items: bytes) -> bytes:
    "A tuple."
    return b"(" + b"".join(items) + b"t"


def data(raw: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(raw)) + raw


NDARRAY, RECONSTRUCT = name("numpy", "ndarray"), name("numpy.core.multiarray", "_reconstruct")
DTYPE, SCALAR, BUFFER = name("numpy", "dtype"), name("numpy._core.multiarray", "scalar"), name("numpy._core.numeric", "_frombuffer")
NAMESPACE, ORDERED = name("argparse", "Namespace"), name("collections", "OrderedDict")
START, NONE, CALL, BUILD, STOP = b"\x80\x04", b"N", b"R", b"b", b"."
EMPTY = RECONSTRUCT + of(NDARRAY, of(number(0)), data(b"b")) + CALL


def dtype(word: str) -> bytes:
    return DTYPE + of(text(word), b"\x89", b"\x88") + CALL


F8 = dtype("f8") + of(number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0)) + BUILD


def array(shape: bytes, kind: bytes = F8, raw: bytes = bytes(8)) -> bytes:
    return EMPTY + of(number(1), shape, kind, b"\x89", data(raw)) + BUILD


def test_the_parts_that_the_attacks_are_made_of_are_sound(file):
    file.write_bytes(START + array(of(number(1))) + STOP)
    assert read(file)[0].tolist() == [0.0] and pickle.loads(file.read_bytes()).tolist() == [0.0]


# ---- names that are not in the table


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function, arguments", [
    (subprocess.getoutput, ("touch here",)), (np.fromfile, ("/etc/passwd",)), (bytearray.fromhex, ("00",)), (getattr, (str, "upper")), (open, ("here", "w")),
    (__import__, ("antigravity",)), (bytes, (3,)), (copyreg._reconstructor, (Path, object, None)), (complex, (1.0, 2.0)), (range, (3,)),
])  # fmt: skip
def test_any_other_name_is_named_and_not_called(file, function, arguments, protocol):
    message = refused(file, pickle.dumps({"alpha": Calls(function, *arguments)}, protocol))
    assert function.__name__ in message or "getattr" in message or "newobj" in message.lower() or "no plain result needs" in message, message


@pytest.mark.parametrize("module, attribute", [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "getattr"), ("numpy", "load"), ("numpy", "memmap"),
    ("numpy", "ndarray.__class__"), ("numpy", "dtype.__init__"), ("numpy.core.multiarray", "_reconstruct.__globals__"), ("argparse", "Namespace.__init__"),
    ("argparse", "_sys.modules"), ("collections", "_sys.modules"), ("collections", "OrderedDict.fromkeys"), ("numpy.lib.npyio", "NpzFile"), ("antigravity", "x"),
    ("flatmin_nb.lab.pickles", "os.system"), ("numpy.ma.core", "_mareconstruct"), ("numpy", "matrix"), ("numpy.core", "multiarray._reconstruct"), ("", ""),
    ("pickle", "loads"), ("collections", "defaultdict"), ("jax._src.array", "_reconstruct_array"), ("torch._utils", "_rebuild_tensor_v2"), ("argparse\n", "Namespace"),
    ("os.system", "x" * 10_000),
])  # fmt: skip
def test_dotted_and_foreign_names_are_refused(file, module, attribute):
    message = refused(file, START + name(module, attribute) + of(text("touch here")) + CALL + STOP)
    assert "asks for" in message and (len(attribute) > 100 or f"{module}.{attribute}".replace("\n", "\\n") in message), message
    if not set("\n ") & set(module + attribute):  # the same as text of protocol 0, and as INST
        assert "asks for" in refused(file, f"c{module}\n{attribute}\n(S'x'\ntR.".encode()) or not module
        assert "INST" in refused(file, f"(S'x'\ni{module}\n{attribute}\n.".encode())


def test_a_name_that_is_made_at_run_time(file):
    "STACK_GLOBAL takes whatever is on the stack, not only text."
    for odd in (number(3), NONE, of(), b"]", EMPTY):
        refused(file, START + odd + text("system") + b"\x93" + STOP)
        refused(file, START + text("os") + odd + b"\x93" + STOP)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [
    Counter("ab"), defaultdict(int), np.ma.array([1]), np.random.default_rng(0), Path("here"), slice(1), len, int, np.float64, KeyError("x"),
    OrderedDict(a=Path("here")), argparse.Namespace(out=Path("here")), np.array([Path("here")]), np.rec.array([(1, 2.0)]), np.datetime64("2026-01-01"),
])  # fmt: skip
def test_other_objects_are_refused(file, value, protocol):
    refused(file, pickle.dumps([1, value], protocol))


@pytest.mark.parametrize("content", [NDARRAY, DTYPE, NAMESPACE, RECONSTRUCT, b"]" + DTYPE + b"a", b"}" + text("a") + NAMESPACE + b"s", DTYPE + b"\x85"])
def test_a_name_alone_is_no_value(file, content):
    assert "where a value should be" in refused(file, START + content + STOP)


# ---- names of the table, and hostile arguments


@pytest.mark.parametrize("arguments", [
    of(name("collections", "OrderedDict"), of(number(0)), data(b"b")), of(DTYPE, of(number(0)), data(b"b")), of(text("numpy.ndarray"), of(number(0)), data(b"b")),
    of(NDARRAY, of(number(2**40)), data(b"b")), of(NDARRAY, of(number(0)), data(b"O")), of(NDARRAY, number(0), data(b"b")), of(NDARRAY), of(),
    of(EMPTY, of(number(0)), data(b"b")), b"]", number(1),
])  # fmt: skip
def test_reconstruct_makes_only_empty_arrays(file, arguments):
    refused(file, START + RECONSTRUCT + arguments + CALL + STOP)


@pytest.mark.parametrize("shape, raw", [
    (of(number(2**40)), bytes(8)), (of(number(2**62), number(2**62)), bytes(8)), (of(number(-1)), bytes(8)), (of(number(2)), bytes(8)), (of(number(1)), b""),
    (of(number(0), number(2**62), number(2**62)), b""), (of(*[number(1)] * 100), bytes(8)), (of(b"\x88"), bytes(8)), (number(1), bytes(8)), (of(text("1")), bytes(8)),
    (of(b"G" + struct.pack(">d", 1.0)), bytes(8)), (of(number(-1), number(-1)), bytes(8)),
])  # fmt: skip
def test_a_shape_must_fit_the_bytes(file, shape, raw):
    refused(file, START + array(shape, raw=raw) + STOP)
    refused(file, START + BUFFER + of(data(raw), F8, shape, text("C")) + CALL + STOP)


@pytest.mark.parametrize("word", ["O8", "O", "|O8", "V8", "f8,O", "f8,f8", "(1000000,)f8", "U0", "S0", "V0", "M8", "m8[s]", "f16", "x", "", "i3", "object", "np.void", "f8\n", "U9999999999"])
def test_types_that_are_not_plain(file, word):
    evil = pickle.dumps(Calls(os.getcwd))
    for raw in (evil, bytes(8), b""):
        assert "is read" in (message := refused(file, START + array(of(number(1)), dtype(word), raw) + STOP)) or "are read" in message
        refused(file, START + SCALAR + of(dtype(word), data(raw)) + CALL + STOP)
        refused(file, START + BUFFER + of(data(raw), dtype(word), of(number(1)), text("C")) + CALL + STOP)


@pytest.mark.parametrize("state", [
    of(number(3), text("|"), NONE, of(text("a")), b"}", number(8), number(1), number(0)), of(number(3), text("<"), of(dtype("f8"), of(number(2**40))), NONE, NONE, number(-1), number(-1), number(0)),
    of(number(4), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0), b"}"), of(number(3), text("<"), NONE, NONE, NONE, number(10**6), number(-1), number(0)),
    of(number(3), text("x"), NONE, NONE, NONE, number(-1), number(-1), number(0)), of(number(3)), of(), b"}", number(3), NONE,
    of(number(3), b"]", NONE, NONE, NONE, number(-1), number(-1), number(0)),
])  # fmt: skip
def test_states_of_a_dtype_that_change_what_it_is(file, state):
    refused(file, START + dtype("f8") + state + BUILD + STOP)
    refused(file, START + array(of(number(1)), dtype("f8") + state + BUILD) + STOP)


@pytest.mark.parametrize("arguments", [
    of(text("f8"), b"\x89"), of(DTYPE), of(number(8)), of(of(text("f8"), of(number(2**40)))), of(b"](" + text("f8") + b"e"), of(F8), of(NDARRAY), of(b"}"),
])  # fmt: skip
def test_dtypes_are_made_from_their_names(file, arguments):
    if arguments != of(text("f8"), b"\x89"):
        refused(file, START + DTYPE + arguments + CALL + STOP)


def test_the_dtypes_of_numpy_stay_as_they_are(file):
    "BUILD changes a dtype where it lies: it must be one of the reader's own."
    swapped = of(number(3), text(">"), NONE, NONE, NONE, number(-1), number(-1), number(0))
    file.write_bytes(START + array(of(number(1)), dtype("f8") + swapped + BUILD, struct.pack(">d", 2.5)) + STOP)
    assert read(file)[0].tolist() == [2.5] and np.dtype("f8") == np.float64 and np.dtype("f8").byteorder == "="


@pytest.mark.parametrize("target", [
    b"}", b"]", b")", text("a"), number(1), NONE, F8, array(of(number(1))), NDARRAY, DTYPE, RECONSTRUCT, ORDERED + of() + CALL, b"\x8f",
    SCALAR + of(F8, data(bytes(8))) + CALL, NAMESPACE + of() + CALL + b"}" + BUILD,
])  # fmt: skip
@pytest.mark.parametrize("state", [
    b"}" + text("__setstate__") + text("x") + b"s", of(NONE, b"}" + text("__class__") + NONE + b"s"), of(number(1), of(number(1)), F8, b"\x89", data(bytes(8))), b"}", NONE,
    of(NONE, b"}" + text("make") + NDARRAY + b"s"), of(NONE, b"}" + text("__defaults__") + of() + b"s"),
])  # fmt: skip
def test_only_what_was_just_made_is_built(file, target, state):
    assert "sets the state of" in refused(file, START + target + state + BUILD + STOP)


@pytest.mark.parametrize("state", [of(NONE, b"}"), NONE, b"]", number(1), text("ab"), EMPTY])
def test_a_namespace_is_built_from_a_dictionary(file, state):
    refused(file, START + NAMESPACE + of() + b"\x81" + state + BUILD + STOP)


@pytest.mark.parametrize("function", [NAMESPACE, ORDERED])
@pytest.mark.parametrize("arguments", [of(b"}"), of(b"]"), of(number(1)), of(NDARRAY)])
def test_containers_are_made_empty(file, function, arguments):
    for call in (CALL, b"\x81"):
        refused(file, START + function + arguments + call + STOP)


@pytest.mark.parametrize("function", [text("eval"), number(3), b"]", b"}", EMPTY, F8, NDARRAY, array(of(number(1))), NAMESPACE + of() + CALL, NONE])
def test_only_names_are_called(file, function):
    for call in (CALL, b"\x81"):
        assert "calls" in refused(file, START + function + of() + call + STOP)
    for call in (b"(" + function + b"o", function + of() + b"}" + b"\x92"):  # OBJ and NEWOBJ_EX
        assert "which no plain result needs" in refused(file, START + call + STOP)


@pytest.mark.parametrize("order, axes", [("K", ()), ("K", (number(3), number(4))), ("K", (number(0), number(0))), ("K", (number(0), text("1"))), ("X", ()), ("C", (number(1), number(0)))])
def test_orders_of_memory(file, order, axes):
    last = [of(*axes)] if axes else []
    refused(file, START + BUFFER + of(data(bytes(16)), F8, of(number(1), number(2)), text(order), *last) + CALL + STOP)


# ---- instructions that reach out of the file


@pytest.mark.parametrize("content", [b"\x82\x07.", b"\x83\x07\x00.", b"\x84\x07\x00\x00\x00.", b"Psomething\n.", b"\x80\x02U\x01aQ.", b"\x80\x05\x97.", b"\x80\x05\x97\x98."])
def test_registry_persistent_ids_and_outside_buffers(file, content, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 7, ("os", "getcwd"))
    monkeypatch.setitem(copyreg._extension_cache, 7, os.getcwd)  # which Python's own reader gives away without asking
    assert pickle.loads(b"\x82\x07.") is os.getcwd
    assert "has the instruction" in refused(file, content)


# ---- damage


def sound() -> bytes:
    return pickle.dumps({"alpha": 1.0}) + pickle.dumps([np.arange(3.0), {"a": {1, 2}}, ("x", None)])


def test_all_ways_to_cut_a_file_short(file):
    whole = sound()
    first = len(pickle.dumps({"alpha": 1.0}))
    for length in range(len(whole)):
        if length == first:
            continue
        message = refused(file, whole[:length])
        assert "is empty" in message if not length else "truncated" in message, (length, message)
        assert ("object 2" in message) == (length > first)
    file.write_bytes(whole)
    assert len(read(file)) == 2


@pytest.mark.parametrize("content", [
    b"", b"\n", b"alpha,loss\n1,2\n", b"PK\x03\x04" + bytes(100), b"\x93NUMPY\x01\x00v\x00{'descr'", bytes(1000), b"hello", b"\x80\x04", b"\x80\x04.", b".", b"0.", b"1.", b"(.", b"e.", b"a.", b"s.",
    b"2.", b"\x80\x04)\x94\x940.", b"h\x05.", b"g7\n.", b"N(.", b"NN.", b"(NN.", b"N1.", b"\x85.", b"N\x86.", b"R.", b"b.", b"\x81.", b"u.", b"\x80\x04Na.", b"\x80\x04NN\x86NNs.",
    b"\x80\x04}(Nu.", b"\x80\x04](Nu.", b"\x80\x04}(NNe.", b"\x80\x04](N\x90.", b"I1.5\n.", b"Fx\n.", b"L5x\n.", b"S'a\n.", b"\x8a\xff.", b"\x8b\xff\xff\xff\xff.", b"\x93.", b"q\x00.",
    b"\x96" + b"\xff" * 8 + b".", b"\x8e" + b"\xff" * 8 + b".", b"\x8d" + b"\x7f" * 8 + b".", b"B\xff\xff\xff\xffa.", b"X\xff\xff\xff\xffa.", b"\x8c\x01\xff.", b"V\\ud800\\u\n.",
])  # fmt: skip
def test_what_is_no_pickle(file, content):
    refused(file, content)


def test_garbage_after_a_sound_object(file):
    assert "object 3" in refused(file, sound() + b"and so on")
    found = each(file)
    assert next(found) == {"alpha": 1.0} and len(next(found)) == 3
    with pytest.raises(PickleError):
        next(found)


@pytest.mark.parametrize("path", ["nowhere.pk", ""])
def test_a_file_that_cannot_be_read(tmp_path, path):
    with pytest.raises(PickleError, match="cannot be read") as caught:
        read(tmp_path / path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_path_with_a_line_break(tmp_path):
    (tmp_path / "a\nb.pk").write_bytes(b"x")
    with pytest.raises(PickleError) as caught:
        read(tmp_path / "a\nb.pk")
    assert len(str(caught.value).splitlines()) == 1


# ---- loops, depths, and bombs


@pytest.mark.parametrize("content", [
    b"]\x94h\x00a.", b"}\x94" + text("a") + b"h\x00s.", b"]\x94(h\x00\x85h\x00e.", b"]\x94}" + text("a") + b"h\x00sa.",
    NAMESPACE + of() + b"\x81\x94}" + text("a") + b"h\x00sb.",
])  # fmt: skip
def test_containers_that_hold_themselves(file, content):
    assert "holds itself" in refused(file, START + content)


@pytest.mark.parametrize("kind", ["list", "tuple", "shared"])
def test_depth(file, kind):
    def nested(depth: int) -> bytes:
        if kind == "list":
            return b"]" * depth + b"a" * (depth - 1)
        if kind == "tuple":
            return b")" + b"\x85" * (depth - 1)
        return b"](]\x94" + b"".join(b"]h" + bytes([place]) + b"a\x94" for place in range(depth - 2)) + b"e"  # [a, [a], [[a]], ...]: each is shallow where it is first met

    file.write_bytes(START + nested(DEEPEST) + STOP)
    read(file)
    assert f"nested more than {DEEPEST} deep" in refused(file, START + nested(DEEPEST + 1) + STOP)


def test_a_deep_key_does_not_end_the_process(file):
    refused(file, START + b"}" + b")" + b"\x85" * 300_000 + b"Ns" + STOP)
    refused(file, START + b"\x8f(" + b")" + b"\x85" * 300_000 + b"\x90" + STOP)
    refused(file, START + b"(" + b")" + b"\x85" * 300_000 + b"\x91" + STOP)
    refused(file, START + b")" + b"\x85" * 1_000_000 + STOP)


def test_references_to_one_list_are_followed_once(file):
    "2**90 lists on paper."
    bomb = b"".join(b"](h" + bytes([place]) + b"h" + bytes([place]) + b"e\x94" for place in range(90))
    file.write_bytes(START + b"(]\x94" + bomb + b"l" + STOP)
    value = read(file)[0][-1]
    assert value[0] is value[1] and value[0][0] is value[1][1]


@pytest.mark.parametrize("content", [
    b"Nr\xff\xff\xff\x7f.", b"Np99999999999999\n.", b"\x96\xff\xff\xff\xff\x00\x00\x00\x00.", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", b"\x8b\xff\xff\xff\x7f1.",
])  # fmt: skip
def test_numbers_that_ask_for_memory(file, content):
    "Places in the memory of the machine, lengths and frames: read in a process that may not grow."
    file.write_bytes(content)
    code = f"""
import resource
from flatmin_nb.lab.pickles import PickleError, read
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
try:
    print(read({str(file)!r}))
except PickleError as error:
    print("refused", error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout, result.stderr


def test_nothing_of_a_hostile_file_stays_behind(file):
    "Attributes of the reader's own functions and names cannot be set."
    before = {key: dict(vars(value)) for key, value in vars(sys.modules["flatmin_nb.lab.pickles"]).items() if isinstance(value, type)}
    for target in (RECONSTRUCT, NDARRAY, NAMESPACE):
        refused(file, START + target + of(NONE, b"}" + text("text") + text("numpy.ndarray") + b"s") + BUILD + STOP)
    assert before == {key: dict(vars(value)) for key, value in vars(sys.modules["flatmin_nb.lab.pickles"]).items() if isinstance(value, type)}


def test_random_damage_is_always_one_line(file):
    "Thousands of files with some bytes changed, cut out or doubled: read as something plain, or refused."
    generator = random.Random(0)
    seeds = [sound(), *(pickle.dumps({"a": np.arange(4, dtype=">i2").reshape(2, 2).T, "b": [np.float32(1), 2**70, "x" * 300, (1, {2.5})], "c": argparse.Namespace(x=1)}, p) for p in (3, 4, 5))]
    read_well = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6000):
            content = bytearray(generator.choice(seeds))
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(content))
                kind = generator.randrange(4)
                if kind == 0:
                    content[place] = generator.randrange(256)
                elif kind == 1:
                    del content[place : place + generator.randint(1, 8)]
                elif kind == 2:
                    content[place:place] = content[place : place + generator.randint(1, 30)]
                else:
                    content[place] = generator.choice(b".0(12RbNts)]}\x81\x85\x86\x87\x93\x94ae")
                if not content:
                    content = bytearray(b".")
            file.write_bytes(content)
            try:
                read(file)
                read_well += 1
            except PickleError as error:
                assert len(str(error).splitlines()) == 1
    assert read_well > 50


# ---- what is read


NUMPY_1 = {  # written by numpy 1.24 and Python 3.10: vars(Namespace(...)) and a dictionary of arrays
    4: "c-nQ5OG^VW5P<jDt|B6WAovH`OF{AALE6I}1cQ4}Jc?v@(`KRFE=l%KP^gF27UtIJ|MaFe%|5_a8<-H1$v595Q)hi=R0BLJ1{oESA?yTn#AHSzhAV8p;4`+M8B;|iQwWYs1}TD_DS<bJ2`(LGoZ?mQttMHa#2^nlQ)m5dR(l1(>nCX<Ig4=tCPg?(^HDbGL}S4^qkO0mDg>P%>^%w=jZ>*a9w{vVZkdSCOyeqLg~XVlZ-)4ax7Z?Pn>WCX)g&u~!Rnvma#0=GU|wPn1lON>loK%&hD+ZujA<A35;TU}(2x-wQlanjeNDLdCh)`m_kFMG>!XKrodsru+~r=O#dm8dViRj#(vn|3-3>kq|G55#;=wE(whrxRxRqm!57_!&!kU!@?$7?{5|22<D;qtaniA@W>IwyLD=9qvsrt0>=`3>#!yvY9_+;sq=Pd7h0kKiqG5",
    5: "c-n1`OH0E*5P<V&G(|)ag#Lu|5>PyNkoHhea4`qPqsS)NG=ZiKo6Vu1P!Glmb936C=-Hz;-A!X{wF9&7`R3b+HM`Lk0XF6RjPjfzG(DQKJfi`_H*7!QBRa4hQbBVj5E^;XA0n8U;CQ9!V9`MqQ@rSY)Fi{t(JOp+V$I(5#hD`5Q8G;On1wh6ogy3zi!>X%!H6?gE*Vb(gq{0{k5a#gBF1HNXWr0$V$wmdsv0?mVw@>EFrpKDoxb2TI>ZG13_Z`g{E|@(L=)(@LGPiEFF^MZ4p-Wy#XuyKb1IQrc|ZqLHI18+diqO^cmFec_Co5ji)BR)Ft(g|OIr)|dqbuvQ+>p$*vXo4XM-^@iBU@Ed95Ad9Xg7?UxTSkUuID6EAH*_A7^5d2C)^-c*b~7u@uBu+Er!#(W=hFCY`l%ZP~L$G-8(Z6)W6tOgYLv",
}  # fmt: skip


@pytest.mark.parametrize("protocol", NUMPY_1)
def test_files_of_numpy_1(file, protocol):
    file.write_bytes(zlib.decompress(base64.b85decode(NUMPY_1[protocol])))
    assert b"numpy.core." in file.read_bytes()
    arguments, results = read(file)
    assert arguments == {"dataset": "sign", "ptr": 256, "alpha": 1.0, "bs": None}
    assert results["a"].shape == () and results["a"].dtype == "f4" and results["a"] == 0.25 and results["b"] == 1.5
    assert results["c"].dtype.kind == "i" and results["c"].dtype.itemsize == 4 and results["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [part.tolist() for part in results["d"]] == [["ab", "c"], [True, False], []] and results["d"][2].shape == (0, 3)


VALUES = [
    None, True, False, 0, -1, 2**31, -(2**40), 2**2000, 1.5, float("inf"), "", "é\n", "x" * 70_000, b"", b"\xff" * 300, [], [1, [2]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": {1: None}},
    np.float32(1.5), np.int64(-3), np.bool_(True), np.complex64(1j), np.str_("ab"), np.bytes_(b"ab"), np.array(2.5), np.zeros((2, 0, 3)), np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    np.arange(6, dtype=">u2")[::-2], np.asfortranarray(np.ones((3, 4), "f2")), np.array(["a", "bcd"]), np.array([b"a", b"bcd"]), np.array([True, False]), np.dtype("f4"), np.dtype(">i8"), np.dtype("U5"),
    OrderedDict(b=1, a=2),
]  # fmt: skip


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.dtype.str == b.dtype.str and a.shape == b.shape and np.array_equal(a, b) and a.flags.f_contiguous == b.flags.f_contiguous
    return a == b and (type(a) is type(b) or isinstance(b, OrderedDict))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("place", range(len(VALUES)))
def test_what_python_writes_is_what_is_read(file, place, protocol):
    file.write_bytes(pickle.dumps(VALUES[place], protocol))
    assert same(watched(file)[0], pickle.loads(file.read_bytes()))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_old_protocols_of_what_is_not_numpy(file, protocol):
    plain = {"a": [1, 2.5, None, True, "text"], "b": (1, ()), "c": -(2**70)}
    file.write_bytes(pickle.dumps(plain, protocol))
    assert read(file) == [plain]


def test_sets(file):
    file.write_bytes(pickle.dumps([{1, "a"}, frozenset([2, None]), set()], 4))
    assert read(file) == [[{1, "a"}, frozenset([2, None]), set()]]


def test_many_objects_in_a_row_and_shared_parts(file):
    part = [1, 2]
    file.write_bytes(b"".join(pickle.dumps({"n": n, "a": part, "b": part}) for n in range(50)))
    found = read(file)
    assert [one["n"] for one in found] == list(range(50)) and found[3]["a"] is found[3]["b"]


def test_arrays_are_ones_own_and_writable(file):
    for protocol in (3, 4, 5):
        file.write_bytes(pickle.dumps(np.arange(5000.0), protocol))
        (found,) = read(file)
        found[0] = 7
        assert read(file)[0][0] == 0
