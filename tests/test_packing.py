"""What a notebook cell is the wrong place for: another decoder, every damaged byte, and files that were forged."""
import json
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.packing import (
    FixedPoint, PackingError, _checksum, entropy, fixed_point, load_packed, packed, packed_bits, rounded, save_packed, unpacked,
)  # fmt: skip


def numbers(*shape, seed=0, scale=0.1):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "packed.safetensors"


def small(file, deflate=False):
    "A file of each kind of tensor."
    tensors = {"w": numbers(9, 7), "zeros": torch.zeros(400), "mask": numbers(11) > 0, "bias": numbers(3), "half": numbers(2).bfloat16()}
    save_packed(file, tensors, {"w": 6, "zeros": 4}, deflate=deflate, about={"net": "small"})
    return tensors


# ---- another decoder ----

def decoded(content: bytes) -> dict[str, list[float]]:
    "The packed tensors of a file, by the description in the notebook, with struct, zlib and integers alone."
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    version, _, forms, _ = json.loads(header.pop("__metadata__")["packing"])
    assert version == 1
    tensors = {}
    for name, form in zip(sorted(header), forms, strict=True):
        if form == 0:
            continue
        (range_bits, fraction, deflated, *shape), (start, end) = form, header[name]["data_offsets"]
        bits, count, part = (1 + range_bits + fraction if range_bits else 1), 1, data[start:end]
        for side in shape:
            count *= side
        if deflated:
            planes = zlib.decompress(part, -15)
            width = len(planes) // count
            codes = [int.from_bytes(planes[k::count], "big") >> (8 * width - bits) for k in range(count)]
        else:
            assert len(part) == (count * bits + 7) // 8
            stream = int.from_bytes(part, "big") >> (-count * bits % 8)
            codes = [stream >> bits * (count - 1 - k) & (1 << bits) - 1 for k in range(count)]
        signed = [code - (1 << bits) if range_bits and code >> (bits - 1) else code for code in codes]
        tensors[name] = [n * 2.0**-fraction for n in signed]
    return tensors


@pytest.mark.parametrize("deflate", [False, True])
def test_another_decoder_reads_the_same(file, deflate):
    tensors, fractions = {"mask": numbers(130) > 0.1, "plain": numbers(5), "rows": (torch.arange(3000) % 1500 < 1400)}, {}
    for fraction in range(24):
        for number, shape in enumerate([(), (1,), (0,), (7, 9), (300,)]):
            name = f"{fraction}.{number}"
            scale = 2.0 ** min(number + 2, 27 - fraction)
            tensors[name], fractions[name] = numbers(*shape, seed=number).clamp(-1, 1) * scale, fraction
    save_packed(file, tensors, fractions, deflate=deflate)
    found, _ = load_packed(file)
    theirs = decoded(file.read_bytes())
    assert theirs.keys() == {*fractions, "mask", "rows"}
    assert {row.form for row in packed_bits(file).tensors} == {"packed", "as it is"} | ({"deflated"} if deflate else set())
    for name, x in tensors.items():
        expected = rounded(x, fractions[name]) if name in fractions else x
        assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype and found[name].shape == expected.shape
        if name in theirs:
            assert theirs[name] == expected.flatten().tolist()


def test_one_stream_of_bits():
    x, format = torch.tensor([1.0, -0.25, 3.75, -3.75, 0.0]), FixedPoint(2, 2)
    codes = "00100" + "11111" + "01111" + "10001" + "00000"
    assert packed(x, format).numpy().tobytes() == int(codes + "0" * 7, 2).to_bytes(4, "big")
    assert torch.equal(unpacked(packed(x, format), format, (5, 1)), x[:, None])


# ---- numbers ----

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_rounded_exactly(file, dtype):
    x = numbers(500, scale=3.0).to(dtype)
    for fraction in (0, 3, 9):
        exact = torch.floor(x.double() * 2**fraction + 0.5) / 2**fraction  # float64 holds the sum
        assert rounded(x, fraction).dtype == dtype and torch.equal(rounded(x, fraction).double(), exact)
        save_packed(file, {"w": x}, {"w": fraction})
        assert torch.equal(load_packed(file)[0]["w"].double(), exact)
        assert (exact - x.double()).abs().max() <= 2.0**-fraction / 2


def test_a_tensor_that_needs_a_gradient_and_one_that_is_no_row_of_memory(file):
    x = numbers(6, 8).T.requires_grad_()
    assert not rounded(x, 5).requires_grad
    save_packed(file, {"w": x, "also": x}, {"w": 5})
    assert torch.equal(load_packed(file)[0]["w"], rounded(x, 5)) and torch.equal(load_packed(file)[0]["also"], x)


@pytest.mark.parametrize("largest", [0.0, 0.3, 0.4999, 0.5, 1.0, 10.0, 100.0, 1e6, 2.0**30])
@pytest.mark.parametrize("fraction", [0, 1, 4, 11, 23])
def test_the_smallest_format_holds_it_and_a_smaller_one_does_not(largest, fraction):
    x = torch.tensor([largest, -largest], dtype=torch.float64)
    if int(largest * 2**fraction + 0.5) >= 2**31:
        with pytest.raises(PackingError, match="longer than 32 bits"):
            fixed_point(x, fraction)
        return
    format = fixed_point(x, fraction)
    assert format.range >= 1 and format.bits <= 32
    assert unpacked(packed(x, format), format, (2,)).tolist() == [round(value, 20) for value in rounded(x, fraction).float().tolist()]
    if format.range > 1:
        with pytest.raises(PackingError, match="range bits, and the format has"):
            packed(x, FixedPoint(fraction, format.range - 1))
    larger = FixedPoint(fraction, min(31 - fraction, format.range + 3))
    assert torch.equal(unpacked(packed(x, larger), larger, (2,)), unpacked(packed(x, format), format, (2,)))


def test_bits_that_numpy_counted(file):
    save_packed(file, {"w": numbers(5)}, {"w": np.int64(4)}, deflate=True)
    assert torch.equal(load_packed(file)[0]["w"], rounded(numbers(5), np.int64(4)))


def test_zero_has_one_form():
    assert packed(torch.tensor([-0.0, -1e-30, 0.0]), FixedPoint(5, 1)).tolist() == [0] * 3
    assert not torch.signbit(rounded(torch.tensor([-0.0, -1e-30]), 5)).any()


def test_entropy_is_below_the_bits():
    x = numbers(5000)
    for fraction in range(10):
        assert 0 <= entropy(x, fraction) <= fixed_point(x, fraction).bits
    assert entropy(x, 6) == pytest.approx(entropy(-x.double() - 0.0, 6), abs=0.01)


# ---- the file ----

@pytest.mark.parametrize("deflate", [False, True])
def test_every_byte_is_accounted_for(file, deflate):
    tensors = small(file, deflate)
    accounts = packed_bits(file)
    assert accounts.bytes == file.stat().st_size
    rows = {row.name: row for row in accounts.tensors}
    assert {name: row.count for name, row in rows.items()} == {name: x.numel() for name, x in tensors.items()}
    assert (rows["mask"].bits, rows["mask"].bytes) == (1, 2)
    assert (rows["bias"].bytes, rows["bias"].form, rows["half"].bits) == (12, "as it is", 16)
    assert (rows["w"].bits, rows["w"].bytes <= 63) == (8, True)
    assert rows["zeros"].bits == 6 and (rows["zeros"].bytes < 10 if deflate else rows["zeros"].bytes == 300)
    with safe_open(file, "pt") as opened:  # any reader of safetensors sees the same bytes
        assert {name: opened.get_tensor(name).nbytes for name in opened.keys()} == {name: row.bytes for name, row in rows.items()}


def test_deflating_never_makes_a_tensor_larger(file):
    for seed in range(5):
        for bits in (2, 6, 9, 14):
            sizes = []
            for deflate in (False, True):
                save_packed(file, {"w": numbers(40, 5, seed=seed)}, {"w": bits}, deflate=deflate)
                sizes.append(packed_bits(file).tensors[0].bytes)
            assert sizes[1] <= sizes[0]


def test_the_header_is_small(file):
    save_packed(file, {f"conv{n}.layer.weight": torch.ones(2, 3, 3, 3) for n in range(10)}, {f"conv{n}.layer.weight": 5 for n in range(10)})
    assert packed_bits(file).overhead < 10 * 110 + 60


def test_nothing_at_all(file):
    save_packed(file, {}, {})
    assert load_packed(file) == ({}, {}) and packed_bits(file).bytes == file.stat().st_size


def test_names_and_words_of_any_script(file):
    about = {"größe": 'a "quoted" \\ word\n', "packing": "an own word", "": "\ud800"}
    save_packed(file, {"gewicht.ß": torch.ones(3), "层": torch.ones(2), "": torch.ones(1)}, {"gewicht.ß": 2, "": 3}, about=about)
    tensors, found = load_packed(file)
    assert found == about and set(tensors) == {"gewicht.ß", "层", ""}


def test_the_same_bytes_in_another_process(tmp_path):
    code = (
        "import sys, torch; from flatmin_nb.lab.packing import save_packed; w = torch.linspace(-1, 1, 300)\n"
        "save_packed(sys.argv[1], {n: w for n in sys.argv[2]}, {n: 7 for n in 'ab'}, deflate=True, about={'x': '1', 'y': '2'})"
    )
    for name, order, seed in (("one", "abcd", "1"), ("two", "dcba", "2")):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / name, order], env=environment, check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failed_write_leaves_what_was_there(file):
    small(file)
    before = file.read_bytes()
    with pytest.raises(PackingError, match="'w' holds values that are not finite"):
        save_packed(file, {"v": torch.ones(3), "w": torch.tensor([torch.inf])}, {"v": 3, "w": 3})
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


# ---- files from outside ----

def refused(file):
    "The line in which a file is refused, by both readers."
    lines = set()
    for read in (load_packed, packed_bits):
        with pytest.raises(PackingError) as caught:
            read(file)
        lines.add(str(caught.value))
    (line,) = lines
    assert "\n" not in line and str(file) in line and isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError)
    return line


@pytest.mark.parametrize("deflate", [False, True])
def test_no_damage_goes_unseen(file, deflate):
    small(file, deflate)
    content, (expected, about) = file.read_bytes(), load_packed(file)
    for length in (*range(0, len(content), 11), len(content) - 1):
        file.write_bytes(content[:length])
        refused(file)
    file.write_bytes(content + b"\0")
    refused(file)
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found, words = load_packed(file)
        except PackingError as error:
            assert "\n" not in str(error)
            continue
        assert found.keys() == expected.keys() and words == about, place  # white space, say
        assert all(torch.equal(found[name], expected[name]) for name in found), place


def forged(file, entries, stored=None, about=None, version=1):
    "A file whose checksum is right, whatever else is not."
    stored, about = {"w": torch.zeros(4, dtype=torch.uint8)} if stored is None else stored, {} if about is None else about
    says = json.dumps([version, _checksum(stored, entries, about), entries, about])
    file.write_bytes(save(stored, metadata={"packing": says}))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([2, 5, 0, 5], "5 numbers of 8 bits are not (4,) uint8"),
        ([2, 5, 0, 3], "3 numbers of 8 bits are not (4,) uint8"),
        ([2, 5, 0, 2, 3, -1], "there is no shape [2, 3, -1]"),
        ([2, 5, 0, -2, -2], "there is no shape"),
        ([2, 5, 0, 2**40, 2**40], "there is no shape"),
        ([2, 5, 0, 0, 2**63], "there is no shape"),
        ([2, 5, 0, *[1] * 65], "there is no shape"),
        ([2, 5, 0, 2**46], "70368744177664 numbers of 8 bits are not (4,) uint8"),
        ([2, 5, 1, 2**46], "4 deflated bytes cannot be the 70368744177664 that are declared"),
        ([2, 5, 1, 4], "its deflated data are"),
        ([2, 5, 2, 4], "there is no form [2, 5, 2]"),
        ([0, 5, 0, 4], "there is no form [0, 5, 0]"),
        ([-1, 5, 0, 4], "range bits must be an integer from 1 to 26"),
        ([27, 5, 0, 4], "range bits must be an integer from 1 to 26"),
        ([2, -1, 0, 4], "fraction bits must be an integer from 0 to 23"),
        ([2, 24, 0, 4], "fraction bits must be an integer from 0 to 23"),
        ([2, 5, 0, 4.0], "its form must be"),
        ([2, 5, False, 4], "its form must be"),
        ([2, 5, None, 4], "its form must be"),
        ([2, 5], "its form must be"),
        ({"bits": 8}, "its form must be"),
        (1, "its form must be"),
        ("x" * 10_000, "its form must be"),
    ],
)
def test_forms_that_cannot_be(file, entry, said):
    forged(file, [entry])
    with pytest.raises(PackingError) as caught:
        load_packed(file)
    line = str(caught.value)
    assert said in line and "tensor 'w'" in line and "\n" not in line and len(line) < 400 + len(str(file))


@pytest.mark.parametrize(("shape", "dtype"), [((4,), torch.float32), ((4,), torch.int8), ((2, 2), torch.uint8), ((), torch.uint8)])
def test_data_of_another_kind(file, shape, dtype):
    forged(file, [[2, 5, 0, 4]], {"w": torch.zeros(shape, dtype=dtype)})
    assert "4 numbers of 8 bits are not" in refused(file)


@pytest.mark.parametrize(
    "says",
    [
        "", "[]", "{}", "null", "1", "[1, 2]", '[1, 2, 3, 4]', "[1, 0, [0], {}]", "[1, 0, [0], []]", '[1, 0, [0], {"a": 1}]',
        "[1, 0, {}, {}]", "[" * 100_000, "9" * 5000, "not json", "[1, NaN, [0], {}]",
        "[true, 0, [0], {}]", "[0, 0, [0], {}]", '["1", 0, [0], {}]',
    ],
)  # fmt: skip
def test_metadata_that_say_nothing(file, says):
    file.write_bytes(save({"w": torch.zeros(4, dtype=torch.uint8)}, metadata={"packing": says}))
    refused(file)


def test_a_later_version_says_so(file):
    forged(file, [0], version=2)
    assert "it is of version 2, and this is version 1" in refused(file)


def test_forms_of_more_or_fewer_tensors(file):
    for entries in ([], [0, 0]):
        forged(file, entries)
        refused(file)


def test_files_of_others(file):
    save_file({"w": torch.ones(2)}, file)
    assert "read it with load_weights" in refused(file)
    save_file({"w": torch.ones(2)}, file, metadata={"format": "pt"})
    assert "read it with load_weights" in refused(file)
    file.write_bytes(b"\x80\x04K\x01.")  # a pickle
    assert "no packed file" in refused(file)
    file.unlink()
    assert "there is no" in refused(file)
    file.mkdir()
    assert "no packed file" in refused(file)


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "U16", "XX"])
def test_other_dtypes_of_a_header(file, dtype):
    tensor = {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": {"packing": "[1, 0, [0], {}]"}, "w": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(file)


def test_a_bomb_does_not_go_off(file):
    "100 MB of zeros in 100 kB: no more than declared is unfolded."
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = torch.frombuffer(bytearray(coder.compress(bytes(100_000_000)) + coder.flush()), dtype=torch.uint8)
    forged(file, [[2, 5, 1, 1000]], {"w": bomb})
    tracemalloc.start()
    try:
        with pytest.raises(PackingError, match="its deflated data are not the 1000 bytes that are declared"):
            load_packed(file)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tensors", "fractions", "options", "said"),
    [
        ({"conv": torch.ones(2)}, {"cnov": 3}, {}, "no tensor 'cnov'; did you mean 'conv'"),
        ({"w": torch.ones(2)}, {"w": None}, {}, "fraction bits must be an integer from 0 to 23"),
        ({"w": torch.ones(2)}, {"w": True}, {}, "fraction bits"),
        ({"w": torch.ones(2)}, {"w": -1}, {}, "fraction bits"),
        ({"w": torch.ones(2)}, {"w": 2.0}, {}, "fraction bits"),
        ({"w": torch.ones(2, dtype=torch.int64)}, {"w": 3}, {}, "'w' holds int64, not floating point"),
        ({"w": torch.ones(2, dtype=torch.bool)}, {"w": 3}, {}, "'w' holds bool"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, {"w": 23}, {}, r"'w' reaches 1e\+300"),
        ({"w": torch.tensor([1e308], dtype=torch.float64)}, {"w": 23}, {}, r"'w' reaches 1e\+308"),
        ({"w": torch.tensor([-torch.inf])}, {"w": 3}, {}, "'w' holds values that are not finite, 1 of 1"),
        ({"__metadata__": torch.ones(1)}, {}, {}, "by name; got '__metadata__'"),
        ({3: torch.ones(1)}, {}, {}, "by name; got 3"),
        ({"w": 1.0}, {}, {}, "got 'w', a float"),
        ({"w": torch.ones(1)}, {}, dict(deflate="yes"), "deflate must be True or False; got 'yes'"),
        ({"w": torch.ones(1)}, {}, dict(about={"epoch": 3}), "is text by name"),
    ],
)
def test_one_line_for_each_mistake(file, tensors, fractions, options, said):
    with pytest.raises(PackingError, match=said) as caught:
        save_packed(file, tensors, fractions, **options)
    assert "\n" not in str(caught.value) and not list(file.parent.iterdir())
