"""What several test files share: papermill on the notebook as a user calls it, a data file of the real form, and all that a measurement could change."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flatmin_nb.lab.data import write

NOTEBOOKS = Path(__file__).parent.parent / "nbs"

# `make test` starts these tests, and a make that a test starts must not take itself for that one's child: it would take its options and say which folder it enters
for name in [name for name in os.environ if name.startswith(("MAKE", "MFLAGS"))]:
    del os.environ[name]


@pytest.fixture
def papermill(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    "papermill on a notebook, records in tmp_path/out; parameters as on the command line: 'L=20'; keywords for the environment."

    def call(*parameters: str, notebook: str = "02_entropy_sgd", **environment: str) -> subprocess.CompletedProcess:
        options = [word for parameter in parameters for word in ("-p", *parameter.split("=", 1))]
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOKS / f"{notebook}.ipynb"), str(tmp_path / "executed.ipynb")]
        command += ["-p", "out", str(tmp_path / "out"), *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | environment)

    return call


def noise_in_place_of(name: str, image: tuple[int, int, int], folder: Path) -> Path:
    "NAME.safetensors of the right form and with its checksum beside it, with a few images of noise."
    random = torch.Generator().manual_seed(0)
    shapes = {"images": (64, *image), "labels": (64,)}
    tensors = {
        f"{split}_{part}": torch.randint(10, shape, dtype=torch.uint8, generator=random)
        for split in ("train", "test") for part, shape in shapes.items()
    }  # fmt: skip
    write(folder / f"{name}.safetensors", tensors)
    return folder / f"{name}.safetensors"


@pytest.fixture
def small_mnist(tmp_path) -> Path:
    return noise_in_place_of("mnist", (1, 28, 28), tmp_path)


@pytest.fixture
def small_cifar10(tmp_path) -> Path:
    return noise_in_place_of("cifar10", (3, 32, 32), tmp_path)


def state(model: nn.Module) -> list:
    "Everything of the model and of the generators that a measurement could change."
    return [
        *(value.clone() for value in model.state_dict().values()),
        *(None if value.grad is None else value.grad.clone() for value in model.parameters()),
        *(value.requires_grad for value in model.parameters()),
        *(module.training for module in model.modules()),
        torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:],
    ]  # fmt: skip


def same(first: list, second: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True))
