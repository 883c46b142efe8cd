"""Files that are missing, damaged or unwritable; the real sets; and batches where a notebook cell is the wrong place for the test."""
import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage

from flatmin_nb.lab import data
from flatmin_nb.lab.data import (
    Batches, CropFlip, DataError, ShiftFlip, centred, contrast_normalised, held_out, load, permuted, standardised, whitened, zca,
)  # fmt: skip
from flatmin_nb.lab.errors import OneLineError


def one_line(action) -> str:
    "The message of the error that `action()` must raise: a DataError of one line."
    with pytest.raises(DataError) as caught:
        action()
    assert isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def tensors(count: int = 40) -> dict[str, torch.Tensor]:
    "A small set in the layout of the data files."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) % 10).to(torch.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images[:10].clone(), "test_labels": labels[:10].clone()}


@pytest.fixture
def mnist_file(tmp_path) -> Path:
    "A small, sound mnist.safetensors with its hash."
    path = tmp_path / "mnist.safetensors"
    data.write(path, tensors())
    return path


# ---- files


def test_a_sound_file_is_loaded(mnist_file):
    images = load("mnist", folder=mnist_file.parent)
    assert images.train_images.dtype == torch.uint8 and images.train_labels.dtype == torch.int64
    assert torch.equal(images.train_images, tensors()["train_images"]) and len(images.val_labels) == 0
    assert images.val_images.shape == (0, 1, 28, 28)


def test_the_hash_is_what_sha256sum_checks(mnist_file):
    digest, name = (mnist_file.parent / "mnist.safetensors.sha256").read_text().split()
    assert digest == hashlib.sha256(mnist_file.read_bytes()).hexdigest() and name == "mnist.safetensors"


@pytest.mark.parametrize("place", [0, 7, 100, 5000, -1])
@pytest.mark.parametrize("vouched", [True, False])
def test_one_flipped_bit_is_refused(mnist_file, place, vouched, monkeypatch):
    whole = bytearray(mnist_file.read_bytes())
    if not vouched:  # no hash beside it: then the known one counts
        os.remove(f"{mnist_file}.sha256")
        monkeypatch.setitem(data.FILES, "mnist", ("MNIST", 10, hashlib.sha256(whole).hexdigest()))
        assert len(load("mnist", folder=mnist_file.parent).train_labels) == 40
    whole[place] ^= 1
    mnist_file.write_bytes(whole)
    message = one_line(lambda: load("mnist", folder=mnist_file.parent))
    assert str(mnist_file) in message and "delete" in message


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(mnist_file, left):
    mnist_file.write_bytes(mnist_file.read_bytes()[:left])
    assert "mnist.safetensors" in one_line(lambda: load("mnist", folder=mnist_file.parent))


def test_an_unknown_file_is_refused_and_the_remedy_works(mnist_file):
    beside = Path(f"{mnist_file}.sha256")
    line = beside.read_text()
    beside.unlink()
    assert "sha256sum mnist.safetensors > mnist.safetensors.sha256" in one_line(lambda: load("mnist", folder=mnist_file.parent))
    beside.write_text(line)
    load("mnist", folder=mnist_file.parent)


@pytest.mark.parametrize("contents", [b"", b"\n", b"\xff\xfe", b"0" * 64])
def test_a_broken_hash_file_is_no_excuse(mnist_file, contents):
    Path(f"{mnist_file}.sha256").write_bytes(contents)
    one_line(lambda: load("mnist", folder=mnist_file.parent))


def test_bytes_that_are_vouched_for_but_are_no_safetensors(tmp_path):
    (tmp_path / "mnist.safetensors").write_bytes(b"not tensors")
    (tmp_path / "mnist.safetensors.sha256").write_text(hashlib.sha256(b"not tensors").hexdigest())
    assert "cannot read" in one_line(lambda: load("mnist", folder=tmp_path))


def test_another_set_under_this_name_is_refused(tmp_path):
    data.write(tmp_path / "mnist.safetensors", tensors() | {"train_labels": torch.full((40,), 99)})
    assert "0..9" in one_line(lambda: load("mnist", folder=tmp_path))
    (tmp_path / "cifar10.safetensors").mkdir()
    assert "cannot read" in one_line(lambda: load("cifar10", folder=tmp_path))


def test_where_the_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    assert data.data_folder() == tmp_path and data.data_folder("elsewhere") == Path("elsewhere")
    monkeypatch.setenv("FLATMIN_DATA", "")
    assert "flatmin_nb" in str(data.data_folder())


# ---- downloads


def test_no_network_and_no_data(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in data.FILES:
        folder = tmp_path / name
        message = one_line(lambda: load(name, folder=folder))
        assert str(folder / f"{name}.safetensors") in message and "FLATMIN_DATA" in message
        assert list(folder.iterdir()) == []  # nothing that looks like data


def test_no_data_and_no_wish_to_download(tmp_path):
    message = one_line(lambda: load("cifar10", folder=tmp_path / "new", download=False))
    assert "cifar10.safetensors" in message and "FLATMIN_DATA" in message and not (tmp_path / "new").exists()


def fake(shape: tuple[int, ...], shuffled: bool = False):
    "A stand-in for a class of torchvision.datasets: images in its layout, some files in its folder."

    def dataset(root, train, download):
        Path(root, f"archive-{train}").write_bytes(b"raw")
        count = 30 if train else 10
        pixels = np.arange(count * int(np.prod(shape)), dtype=np.uint8).reshape(count, *shape)
        print("Downloading")  # as the old classes do
        return SimpleNamespace(data=torch.from_numpy(pixels) if len(shape) == 2 else pixels, targets=[i % 10 for i in range(count)])

    return dataset


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_a_download_leaves_one_file_and_its_hash(monkeypatch, tmp_path, capsys, name, shape):
    monkeypatch.setattr(torchvision.datasets, data.FILES[name][0], fake(shape))
    images = load(name, folder=tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == [f"{name}.safetensors", f"{name}.safetensors.sha256"]
    assert images.train_labels.tolist()[:11] == [*range(10), 0] and len(images.test_labels) == 10
    channels = 1 if len(shape) == 2 else 3
    assert images.image_shape == (channels, *shape[:2])
    assert images.train_images[0, 0, 0, :3].tolist() == [0, channels, 2 * channels]  # channels moved to the front
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torchvision.datasets, data.FILES[name][0], None)
    assert torch.equal(load(name, folder=tmp_path / "new").train_images, images.train_images)  # now from the file


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", fake((28, 28)))
    (tmp_path / "file").write_text("in the way")
    assert "mnist.safetensors" in one_line(lambda: load("mnist", folder=tmp_path / "file"))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        data.write(tmp_path / "mnist.safetensors", tensors())
    assert list(tmp_path.iterdir()) == []


# ---- splits


def test_validation_is_a_stratified_part_of_train():
    whole, split = load("digits"), load("digits", validation=0.2, seed=7)
    assert len(split.val_labels) == round(0.2 * 1297) and len(split.val_labels) + len(split.train_labels) == 1297
    share = split.val_labels.bincount() / whole.train_labels.bincount()
    assert (share - 0.2).abs().max() < 0.01
    together = torch.cat([split.train_images, split.val_images]).flatten(1)
    assert torch.equal(together.sum(0), whole.train_images.flatten(1).sum(0))
    assert torch.equal(split.test_images, whole.test_images)
    assert torch.equal(split.val_images, load("digits", validation=0.2, seed=7).val_images)


def test_splits_do_not_overlap():
    kept, held = held_out(torch.arange(1000) % 7, count=133, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1000))


def test_a_permuted_split_has_every_image_once():
    whole, split = load("digits"), load("digits", validation=0.2, seed=7, split="permuted")
    assert (len(split.train_labels), len(split.val_labels)) == (1297 - 259, 259)
    together = torch.cat([split.train_images, split.val_images])
    assert torch.equal(together, whole.train_images[np.random.RandomState(7).permutation(1297)])
    assert torch.equal(split.test_images, whole.test_images)
    assert len(load("digits", split="permuted").val_labels) == 0


def test_fewer_examples_leave_the_other_splits_alone():
    for split in ("stratified", "permuted"):
        options = dict(validation=0.1, seed=3, split=split)
        whole, few = load("digits", **options), load("digits", **options, examples=50)
        assert torch.equal(few.train_images, whole.train_images[:50]) and torch.equal(few.train_labels, whole.train_labels[:50])
        assert torch.equal(few.val_images, whole.val_images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(split="stratifed"), "did you mean 'stratified'"),
        (dict(split=None), "no split None"),
        (dict(examples=0), "examples"),
        (dict(examples=1298), "1297"),
        (dict(examples=2.5), "examples"),
        (dict(split="permuted", validation=1e-6), "not one image"),
        (dict(split="permuted", validation=0.9999), "at least one"),
        (dict(split="permuted", seed=-1), "seed"),
    ],
)
def test_a_split_that_cannot_be(options, said):
    assert said in one_line(lambda: load("digits", **options))


def test_the_order_of_the_published_split_stays():
    "NumPy promises it of RandomState; the numbers are those that `choice` without replacement gives too."
    kept, held = permuted(10, held=3, seed=777)
    assert torch.cat([kept, held]).tolist() == np.random.RandomState(777).choice(10, 10, replace=False).tolist() == [2, 0, 8, 3, 4, 5, 1, 9, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((10, 2.5, 0), "held"), ((10, -1, 0), "held"), ((10.0, 1, 0), "count"), ((10, 1, -1), "seed"), ((10, 1, "0"), "seed"), ((0, 0, 0), "at least one")],
)
def test_a_permutation_that_cannot_be(arguments, said):
    assert said in one_line(lambda: permuted(*arguments))


# ---- preprocessing


def test_an_empty_validation_split_passes_through(recwarn):
    for images in (standardised(load("digits")), centred(load("digits")), whitened(contrast_normalised(load("digits")), cache=False)):
        assert images.val_images.shape == (0, 1, 8, 8) and images.val_images.dtype == torch.float32
    assert len(recwarn) == 0


def test_whitening_goes_on_without_a_cache_and_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    images = contrast_normalised(load("digits"))
    with pytest.warns(UserWarning, match="cannot be written"):
        got = whitened(images, cache=tmp_path / "file")
    assert torch.equal(got.test_images, whitened(images, cache=False).test_images)


# ---- batches


@pytest.mark.parametrize(("count", "size"), [(1, 1), (10, 10), (10, 3), (64, 7), (129, 128)])
def test_a_pass_has_no_image_twice(count, size):
    numbers = torch.arange(count)
    batches = Batches(torch.zeros(count, 1, 2, 2), numbers, size, seed=11)
    seen = torch.zeros(count)
    for _ in range(40):
        drawn = torch.cat([batches.draw()[1] for _ in range(len(batches))])
        assert len(drawn) == count // size * size == len(drawn.unique())
        seen[drawn] += 1
    assert (seen > 0).all()  # what one pass drops another has


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("augment", [None, CropFlip(padding=1), ShiftFlip(shift=1.5)])
def test_resumed_anywhere_it_goes_on_the_same(replacement, augment):
    x, y = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50)

    def fresh() -> Batches:
        return Batches(x, y, 16, seed=2, replacement=replacement, augment=augment)

    whole = fresh()
    expected = [whole.draw() for _ in range(10)]
    for stop in range(10):
        first, second = fresh(), fresh()
        for _ in range(stop):
            first.draw()
        state = first.state_dict()
        assert all(type(value) is int for value in state.values())
        second.load_state_dict(state)
        for images, labels in expected[stop:]:
            again, numbers = second.draw()
            assert torch.equal(again, images) and torch.equal(numbers, labels)


def test_passes_and_seeds_differ():
    def orders(seed: int) -> list[list[int]]:
        batches = Batches(torch.zeros(100, 1, 1, 1), torch.arange(100), 100, seed=seed)
        return [batches.draw()[1].tolist() for _ in range(3)]

    every = [tuple(order) for seed in range(5) for order in orders(seed)]
    assert len(set(every)) == 15


def test_global_random_states_are_left_alone():
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = load("digits", validation=0.1)
    Batches(images.train_images, images.train_labels, 32, augment=CropFlip(padding=1)).draw()
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], legacy)


def test_state_of_other_batches_is_refused():
    batches = Batches(torch.zeros(10, 1, 1, 1), torch.arange(10), 5)
    for state in ({"pass": 0, "position": 3}, {"pass": -1, "position": 0}, {"pass": 0, "position": 1.5}):
        one_line(lambda: batches.load_state_dict(state))


def test_crops_of_bytes_and_of_oblong_images():
    images = torch.randint(256, (6, 2, 5, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = CropFlip(padding=2, fill=(7, 9))
    still = torch.tensor([[2, 2, 0]]).repeat(6, 1)
    assert torch.equal(crop(images, still), images)
    mirrored = torch.tensor([[2, 2, 1]]).repeat(6, 1)
    assert torch.equal(crop(images, mirrored), images.flip(3))
    corner = crop(images, torch.tensor([[0, 0, 0]]).repeat(6, 1))
    assert corner.dtype == torch.uint8 and torch.equal(corner[:, :, 2:, 2:], images[:, :, :3, :7])
    assert (corner[:, 0, :2] == 7).all() and (corner[:, 1, :2] == 9).all()


@pytest.mark.parametrize("fill", ["black", float("nan"), (0.0, "x"), None])
def test_a_bad_fill(fill):
    one_line(lambda: CropFlip(fill=fill))


def test_a_fill_for_other_channels():
    one_line(lambda: CropFlip(fill=(0.0, 1.0))(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, dtype=torch.int64)))


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 1, 7), (3, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shifts_of_oblong_images(shape, dtype):
    images = torch.randn(6, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    choices = torch.from_numpy(ShiftFlip(shift=12.0).choices(6, np.random.default_rng(0)))
    got = ShiftFlip()(images, choices)
    assert got.dtype == dtype and got.shape == images.shape
    for image, moved, (down, right, mirrored) in zip(images, got, choices.double().tolist()):
        expected = ndimage.shift(image.double().numpy(), (0, down, right), order=1, mode="nearest")
        np.testing.assert_allclose(moved.double().numpy(), expected[..., ::-1] if mirrored else expected, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_no_shift_at_all():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    crop = ShiftFlip(shift=0.0, flip=False)
    assert torch.equal(crop(images, torch.from_numpy(crop.choices(4, np.random.default_rng(0)))), images)


@pytest.mark.parametrize("shift", [-1, float("nan"), float("inf"), "4", None, True])
def test_a_bad_shift(shift):
    one_line(lambda: ShiftFlip(shift=shift))


@pytest.mark.parametrize("flip", ["no", 1, None])
def test_a_flip_that_is_no_answer(flip):
    assert "flip must be True or False" in one_line(lambda: ShiftFlip(flip=flip))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shifts_in_half_precision_are_rounded_once(dtype):
    "An image of 224 pixels: in half precision neighbouring pixels would have the same place in the grid."
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(dtype)
    choices = torch.from_numpy(ShiftFlip(shift=28.0).choices(2, np.random.default_rng(0)))
    got, exact = ShiftFlip()(images, choices), ShiftFlip()(images.double(), choices)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_a_shift_of_bytes():
    pixels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    assert "preprocessed" in one_line(lambda: Batches(pixels, torch.zeros(20), 5, augment=ShiftFlip()).draw())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("crop", [CropFlip(padding=1), ShiftFlip(shift=1.0)])
def test_drawing_never_waits_for_the_gpu(crop):
    images = standardised(load("digits")).to("cuda")
    here = standardised(load("digits"))
    batches = Batches(images.train_images, images.train_labels, 64, augment=crop)
    reference = Batches(here.train_images, here.train_labels, 64, augment=crop)
    drawn = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3 * len(batches)):
            drawn.append(batches.draw())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in drawn:  # and the batches are those of the CPU
        expected, labels = reference.draw()
        assert torch.equal(y.cpu(), labels) and torch.allclose(x.cpu(), expected, atol=1e-5)


# ---- the real sets


def real(name: str):
    "A mark for tests that need the file of `name` under $FLATMIN_DATA."
    there = "FLATMIN_DATA" in os.environ and (data.data_folder() / f"{name}.safetensors").exists()
    skip = pytest.mark.skipif(not there, reason=f"no {name}.safetensors under $FLATMIN_DATA")
    return pytest.param(name, marks=[pytest.mark.real_data, skip])


# images of each class in train; mean and deviation of each channel of train, bytes / 255, as everyone quotes them
FACTS = {
    "mnist": ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], (1, 28, 28), [0.1307], [0.3081]),
    "fashion_mnist": ([6000] * 10, (1, 28, 28), [0.2860], [0.3530]),
    "cifar10": ([5000] * 10, (3, 32, 32), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([500] * 100, (3, 32, 32), [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}


@pytest.mark.parametrize("name", [real(name) for name in FACTS])
def test_real_sets_are_what_they_are_known_to_be(name):
    images = load(name, validation=0.1, seed=0)
    counts, shape, mean, deviation = FACTS[name]
    assert (images.train_labels.bincount() + images.val_labels.bincount()).tolist() == counts
    assert images.val_labels.bincount().tolist() == [round(count / 10) for count in counts] or name == "mnist"
    assert images.image_shape == shape and len(images.test_labels) == 10_000 and images.num_classes == len(counts)
    whole = torch.cat([images.train_images, images.val_images])
    for channel, (m, s) in enumerate(zip(mean, deviation)):
        histogram = torch.bincount(whole[:, channel].flatten(), minlength=256).double()
        values = torch.arange(256) / 255
        average = (histogram * values).sum() / histogram.sum()
        spread = ((histogram * (values - average) ** 2).sum() / histogram.sum()).sqrt()
        assert average.item() == pytest.approx(m, abs=6e-5) and spread.item() == pytest.approx(s, abs=6e-5)


@pytest.mark.parametrize("name", [real("cifar10")])
def test_the_cifar_pipeline_against_the_printed_formulas(name):
    "Contrast normalisation and ZCA of the middles of 2,000 CIFAR-10 images against numpy in float64."
    images = load(name)
    images = images.with_images(lambda x: x[:2000, :, 10:22, 10:22])
    bytes_ = images.train_images.numpy().reshape(2000, -1).astype(np.float64)
    expected = bytes_ - bytes_.mean(1, keepdims=True)
    expected /= expected.std(1, ddof=1, keepdims=True)
    contrast = contrast_normalised(images)
    assert np.abs(contrast.train_images.flatten(1).numpy() - expected).max() < 1e-6

    rows = contrast.train_images.flatten(1).double().numpy()
    centre = rows.mean(0)
    U, S, _ = np.linalg.svd((rows - centre).T / np.sqrt(len(rows) - 1), full_matrices=False)
    matrix = U @ np.diag(1 / (S + 1e-5)) @ U.T
    mean, ours = zca(contrast.train_images, 1e-5)
    assert np.abs(mean.numpy() - centre).max() < 1e-12
    # the direction (1, ..., 1) holds nothing but rounding, which each way of computing amplifies in its own way: compare the rest
    rest = np.eye(len(centre)) - 1 / len(centre)
    assert np.abs(rest @ (ours.numpy() - matrix) @ rest).max() < 1e-6 * np.abs(rest @ matrix @ rest).max()
    white = whitened(contrast, cache=False)
    direct = (contrast.test_images.flatten(1).double().numpy() - centre) @ matrix
    assert np.abs(white.test_images.flatten(1).numpy() - direct).max() < 1e-3
