"""One epoch of cropped and flipped CIFAR-10-shaped batches: torchvision + DataLoader against lab.data.Batches.

    python benchmarks/augmentation.py [--repeats 5] [--images 50000] [--out FILE.csv]

Both sides start from the same uint8 images in memory, shuffle, and give normalised float32 batches of 128. torchvision's side is the usual
recipe (RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize, DataLoader without workers). Ours normalises the whole set once,
before the first epoch; that time is printed apart and added to one epoch in the last line. Runs are paired, on one thread, in CPU seconds,
and what is reported is the median of the ratios. An epoch of ours is short, so a pair times PASSES of them in a row, as in training, and takes
the mean. The exit status is 1 if the median is below --least.
"""
import argparse
import csv
import platform
import statistics
import sys
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from flatmin_nb.lab.data import Batches, CropFlip, ImageSet, standardised

BATCH_SIZE = 128
PASSES = 5


class AsPictures(Dataset):
    "What torchvision's CIFAR10 does for each image: bytes to a PIL picture to the transforms."

    def __init__(self, images: np.ndarray, labels: list[int]):  # images: uint8 [N, H, W, C]
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.29, 0.29, 0.29)),
        ])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def seconds(action) -> float:
    "CPU seconds of the process that `action()` takes."
    start = time.process_time()
    action()
    return time.process_time() - start


def epoch_of_torchvision(loader: DataLoader) -> None:
    for x, _ in loader:
        assert x.shape == (BATCH_SIZE, 3, 32, 32) and x.dtype == torch.float32


def epochs_of_ours(batches: Batches) -> None:
    for _ in range(PASSES * len(batches)):
        x, _ = batches.draw()
        assert x.shape == (BATCH_SIZE, 3, 32, 32) and x.dtype == torch.float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="paired epochs")
    parser.add_argument("--images", type=int, default=50_000, help="images in the set")
    parser.add_argument("--least", type=float, default=15.0, help="ratio below which the exit status is 1")
    parser.add_argument("--out", help="CSV file to write, one row a pair; nothing is written without it")
    options = parser.parse_args()

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (options.images,), generator=generator)
    raw = ImageSet("noise", pixels, labels, pixels[:0], labels[:0], pixels[:0], labels[:0], num_classes=10)
    ready = []
    preparation = seconds(lambda: ready.append(standardised(raw)))
    batches = Batches(ready[0].train_images, labels, BATCH_SIZE, augment=CropFlip(fill=-1.7))
    pictures = AsPictures(pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist())
    loader = DataLoader(pictures, BATCH_SIZE, shuffle=True, num_workers=0, drop_last=True)

    torch.ones(7_000_000)  # 28 MB come and go, as in any training step: from then on glibc keeps freed memory, and batches fault in no new pages
    for _ in range(20):  # warm both up
        batches.draw()
    batches.load_state_dict({"pass": 0, "position": 0})
    next(iter(loader))

    rows = []
    for repeat in range(options.repeats):
        theirs, ours = seconds(lambda: epoch_of_torchvision(loader)), seconds(lambda: epochs_of_ours(batches)) / PASSES
        rows.append({"repeat": repeat, "torchvision_s": theirs, "ours_s": ours, "ratio": theirs / ours})
        print(f"pair {repeat}: torchvision {theirs:6.2f} s   ours {ours:6.3f} s   ratio {theirs / ours:5.1f}", flush=True)

    ratio, theirs, ours = (statistics.median(row[key] for row in rows) for key in ("ratio", "torchvision_s", "ours_s"))
    print(f"\n{options.images:,} x 3x32x32, batch {BATCH_SIZE}, one thread of {platform.machine()}, CPU seconds")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}")
    print(f"median of {len(rows)} pairs: torchvision {theirs:.2f} s, ours {ours:.3f} s: {ratio:.1f} times faster (goal: {options.least:g})")
    print(f"normalising the set, once: {preparation:.2f} s; a first epoch that includes it: {theirs / (ours + preparation):.1f} times faster")
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0 if ratio >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
