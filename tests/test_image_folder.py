"""Images in files: every kind of them, folders that are wrong, and training from a folder, where a notebook cell is the wrong place for the test."""
import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import datasets, transforms

from flatmin_nb.lab.data import (
    IMAGENET_DEVIATION, IMAGENET_MEAN, Batches, CropFlip, DataError, ImageFiles, ResizedCrop, ScaledCrop, contrast_normalised,
    image_folder, imagenet_normalised, load, scaled, standardised, whitened,
)  # fmt: skip
from flatmin_nb.lab.train import evaluate, fit

KINDS = [("RGB", "JPEG"), ("L", "jpg"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "png"), ("1", "bmp"), ("LA", "png"), ("YCbCr", "jpeg"), ("RGB", "webp")]
as_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)])


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    "Smooth noise in `mode`, of a size of its own."
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(6, 7, 4 if mode == "RGBA" else 3), dtype=np.uint8), "RGBA" if mode == "RGBA" else "RGB")
    image = coarse.resize(size or tuple(rng.integers(20, 90, size=2).tolist()), Image.Resampling.BICUBIC)
    if mode == "LA":
        image.putalpha(100)
    return image.convert(mode)


@pytest.fixture
def root(tmp_path) -> Path:
    "Three classes; nine images of each to train on, one of each kind, and three of each in val."
    for split, kinds in (("train", KINDS), ("val", KINDS[:3])):
        for label, name in enumerate(("n02", "n01", "n10")):
            (tmp_path / split / name).mkdir(parents=True)
            for number, (mode, ending) in enumerate(kinds):
                picture(10 * label + number, mode).save(tmp_path / split / name / f"image_{number}.{ending}")
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "n01" / ".hidden.JPEG").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "readme.JPEG").write_text("no class")
    return tmp_path


def small(root: Path, **options):
    return image_folder(root, **dict(size=24, resize=32, threads=2) | options)


def one_line(action) -> str:
    "The message of the error that `action()` must raise: a DataError of one line."
    with pytest.raises(DataError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- what is read


def test_every_kind_of_file_is_what_torchvision_reads(root):
    images = small(root)
    (root / "train" / "readme.JPEG").unlink()
    (root / "train" / ".cache").rmdir()
    (root / "train" / "n01" / ".hidden.JPEG").unlink()
    theirs = datasets.ImageFolder(root / "train", transforms.Compose([transforms.Resize(32), transforms.CenterCrop(24), as_tensor]))
    assert len(theirs) == len(images.train_images) == 27 and theirs.classes == ["n01", "n02", "n10"]
    for ours, label, (image, target) in zip(images.train_images, images.train_labels, theirs, strict=True):
        assert torch.equal(ours, image) and label == target


def test_a_palette_with_transparency_raises_no_warning(root):
    image = picture(0, "P", (40, 40))
    image.save(root / "train" / "n01" / "image_0.JPEG", format="PNG", transparency=bytes(range(256)))  # and its name is wrong, as one of ImageNet's is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = small(root).train_images[:1]
    assert torch.equal(images[0], as_tensor(transforms.CenterCrop(24)(transforms.Resize(32)(image.convert("RGB")))))


def test_an_image_set_like_any_other(root, monkeypatch):
    images = small(root)
    assert images.image_shape == (3, 24, 24) and images.num_classes == 3 and images.train_labels.dtype == torch.int64
    assert repr(images) == f"ImageSet({root.name}: 27 train, 0 val, 9 test; 3x24x24 float32, 3 classes)"
    assert images.val_images[:5].shape == (0, 3, 24, 24) and list(images.val_images.split(4)) == []
    assert images.to("cpu").train_images.device == images.train_labels.device
    monkeypatch.chdir(root)
    assert image_folder(".", size=24, resize=32).name == root.name


def test_what_of_a_tensor_is_there(root):
    files = small(root).train_images
    whole = files[:]
    assert isinstance(whole, torch.Tensor) and whole.dtype == files.dtype and whole.shape == files.shape and whole.is_contiguous()
    for rows in (slice(3, 9, 2), [4, 1, 1], torch.tensor([5, 0]), torch.arange(27) > 20, -1, 7):
        assert torch.equal(files[rows], whole[rows])
    for parts, expected in ((files.split(10), whole.split(10)), (files.tensor_split(4), whole.tensor_split(4))):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts, expected, strict=True))
    with pytest.raises(IndexError):
        files[27]
    assert not hasattr(files, "mean")
    for copied in (copy.deepcopy(files), pickle.loads(pickle.dumps(files))):
        assert torch.equal(copied[:2], whole[:2])


def test_validation_is_a_stratified_part_of_train(root):
    images, again = small(root, validation=1 / 3, seed=1), small(root, validation=1 / 3, seed=1)
    assert images.train_labels.bincount().tolist() == [6, 6, 6] and images.val_labels.bincount().tolist() == [3, 3, 3]
    assert sorted([*images.train_images.names, *images.val_images.names]) == sorted(small(root).train_images.names)
    assert images.val_images.names == again.val_images.names != small(root, validation=1 / 3, seed=2).val_images.names
    assert len(images.test_labels) == 9 and images.test_images.folder == root / "val"


# ---- batches


@pytest.mark.parametrize("augment", [None, ResizedCrop(24), ScaledCrop(32, 24), ResizedCrop(16)])
@pytest.mark.parametrize("options", [{}, {"replacement": True}, {"last": "keep"}])
def test_resumed_anywhere_with_any_number_of_threads(root, augment, options):
    def fresh(threads: int) -> Batches:
        images = small(root, threads=threads)
        return Batches(images.train_images, images.train_labels, 8, seed=2, augment=augment, **options)

    whole = fresh(1)
    expected = [whole.draw() for _ in range(6)]
    for stop in range(6):
        first, second = fresh(2), fresh(5)
        for _ in range(stop):
            first.draw()
        second.load_state_dict(first.state_dict())
        for x, y in expected[stop:]:
            again, labels = second.draw()
            assert torch.equal(again, x) and torch.equal(labels, y)


def test_the_order_is_that_of_tensors(root):
    images = small(root)
    files = Batches(images.train_images, images.train_labels, 8, seed=3)
    tensors = Batches(images.train_images[:], images.train_labels, 8, seed=3)
    for _ in range(7):
        for ours, theirs in zip(files.draw(), tensors.draw()):
            assert torch.equal(ours, theirs)


def test_a_pass_cuts_every_image_anew(root):
    images = small(root)
    batches = Batches(images.train_images, images.train_labels, 27, augment=ResizedCrop(24))
    first, second = (x[y.argsort(stable=True)] for x, y in (batches.draw() for _ in range(2)))
    assert not torch.equal(first, second)


def test_global_random_states_are_left_alone(root):
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = small(root, validation=1 / 3)
    Batches(images.train_images, images.train_labels, 8, augment=ScaledCrop(32, 24)).draw()
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], legacy)


@pytest.mark.parametrize("size", [(24, 900), (900, 24), (1, 1), (33, 32), (2000, 3)])
def test_sizes_at_the_edge(tmp_path, size):
    image = picture(0, size=size)
    for crop in (ScaledCrop(32, 24), ResizedCrop(24), ScaledCrop(24, 24)):
        assert all(crop.cut(image, seed).size == (24, 24) for seed in range(20))
    theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(24)])(image)
    assert np.array_equal(np.asarray(ScaledCrop(32, 24).cut(image)), np.asarray(theirs))


def test_no_flip_is_no_flip():
    telling = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1)))
    for crop in (ScaledCrop(50, 40, flip=False), ResizedCrop(40, flip=False)):
        assert all((np.diff(np.asarray(crop.cut(telling, seed)).astype(int), axis=1) >= 0).all() for seed in range(50))


def test_training_from_a_folder(root):
    images = small(root, validation=1 / 3)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in (net[0], net[4]):
            module.reset_parameters()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    fitted = fit(
        net, optimizer, images, epochs=4, batch_size=5, eval_batch_size=7, augment=ResizedCrop(24), last="keep",
        splits=("train", "val", "test"), reestimate_batchnorm=True, progress=False,
    )  # fmt: skip
    assert fitted.steps == 4 * 4 and fitted.history.test_loss.notna().all()
    decoded = evaluate(net, images.test_images[:], images.test_labels)
    assert evaluate(net, images.test_images, images.test_labels, batch_size=4) == pytest.approx(decoded)
    assert decoded[0] == pytest.approx(fitted.history.test_loss.iloc[-1])


# ---- folders that are wrong


def test_a_missing_split_or_folder(root, tmp_path):
    assert str(root / "nowhere" / "train") in one_line(lambda: image_folder(root / "nowhere"))
    (root / "val").rename(root / "validation")
    message = one_line(lambda: image_folder(root))
    assert str(root / "val") in message and "ROOT/val/CLASS/*" in message
    (root / "val").write_text("a file")
    assert str(root / "val") in one_line(lambda: image_folder(root))


def test_a_flat_val_folder(root):
    for path in sorted((root / "val").rglob("*.*")):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for path in sorted((root / "val").iterdir()):
        if path.is_dir():
            path.rmdir()
    message = one_line(lambda: image_folder(root))
    assert f"{root / 'val'} has no class folders" in message and "val/CLASS/*" in message


@pytest.mark.parametrize(("here", "there"), [("train", "val"), ("val", "train")])
def test_class_folders_that_differ(root, here, there):
    (root / here / "n05").mkdir()
    picture(0).save(root / here / "n05" / "0.png")
    message = one_line(lambda: image_folder(root))
    assert str(root / here / "n05") in message and str(root / there) in message


def test_an_empty_class(root):
    for path in (root / "train" / "n02").iterdir():
        path.unlink()
    assert f"{root / 'train' / 'n02'} has no images" in one_line(lambda: image_folder(root))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "half a header", "missing", "folder"])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_broken_file_is_named(root, damage, number):
    images = small(root)
    path = root / "train" / images.train_images.names[number]
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "text": b"no image", "truncated": whole[: len(whole) * 2 // 3], "half a header": whole[:30]}[damage])
    message = one_line(lambda: Batches(images.train_images, images.train_labels, 27, augment=ResizedCrop(24)).draw())
    assert str(path) in message and "replace" in message and message.count(str(path)) == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_not_cut_off(root, dtype):
    ending = {np.uint16: "png", np.int32: "tif", np.float32: "tif"}[dtype]
    path = root / "train" / "n01" / f"a.{ending}"
    Image.fromarray((np.arange(1600).reshape(40, 40) * 30).astype(dtype)).save(path)
    message = one_line(lambda: small(root).train_images[:1])
    assert str(path) in message and "8" in message


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"resize": 20}, {"size": 1.5}, {"threads": 0}, {"validation": 1.0}, {"validation": 0.01}, {"seed": -1}, {"size": "24"}],
)
def test_bad_options(root, options):
    one_line(lambda: small(root, **options))


@pytest.mark.parametrize("options", [{"size": 0}, {"scale": (0, 1)}, {"scale": (0.5, 2)}, {"scale": (0.5, 0.1)}, {"ratio": (0.0, 1)}, {"ratio": (2, 1)}])
def test_bad_crops(options):
    one_line(lambda: ResizedCrop(**options))


def test_augmentations_of_the_other_kind(root):
    images = small(root)
    assert "ResizedCrop" in one_line(lambda: Batches(images.train_images, images.train_labels, 4, augment=CropFlip()))
    assert "CropFlip" in one_line(lambda: Batches(images.train_images[:], images.train_labels, 4, augment=ResizedCrop(24)))


def test_preprocessing_of_files_is_done_batch_by_batch_or_refused(root):
    images = small(root, validation=1 / 3)
    whole = images.test_images[:]
    for step in (lambda x: x.double(), lambda x: x.flatten(1), lambda x: 2 * x.half()):
        once = images.with_images(step)
        assert once.test_images.dtype == step(whole).dtype and once.test_images.shape == step(whole).shape
        assert torch.equal(torch.cat(list(once.test_images.split(4))), step(whole))
    twice = contrast_normalised(scaled(images, 1.0, 3.0))
    splits = ("train_images", "val_images", "test_images")
    decoded = contrast_normalised(scaled(replace(images, **{name: getattr(images, name)[:] for name in splits}), 1.0, 3.0))
    assert all(torch.equal(getattr(twice, name)[:], getattr(decoded, name)) for name in splits)
    drawn, _ = Batches(twice.train_images, twice.train_labels, 6, augment=ResizedCrop(24)).draw()
    assert torch.allclose(drawn.mean(dim=(1, 2, 3)), torch.zeros(6), atol=1e-6)
    for step in (standardised, whitened, lambda images: images.with_images(imagenet_normalised)):
        assert "normalis" in one_line(lambda: step(images))


def test_imagenet_normalisation_is_of_colour_bytes():
    digits = load("digits")
    one_line(lambda: digits.with_images(imagenet_normalised))
    one_line(lambda: imagenet_normalised(torch.zeros(2, 3, 4, 4)))
    one_line(lambda: imagenet_normalised(torch.zeros(3, 4, 4, dtype=torch.uint8)))


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_drawing_from_files_never_waits_for_the_gpu(root):
    here = small(root)
    there = here.to("cuda")
    assert isinstance(there.train_images, ImageFiles) and there.train_images.device == there.train_labels.device
    batches, reference = (Batches(images.train_images, images.train_labels, 8, augment=ResizedCrop(24)) for images in (there, here))
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [batches.draw() for _ in range(3 * len(batches))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in drawn:
        expected, labels = reference.draw()
        assert torch.equal(y.cpu(), labels) and torch.allclose(x.cpu(), expected, atol=1e-5)
