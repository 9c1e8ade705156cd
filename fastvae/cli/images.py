"""Images of the demo: scikit-learn's digits, or a folder of MNIST's IDX files."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kinds import kind_of

# Fixed, so that runs with other seeds are evaluated on the same test images.
DATA_SEED = 20


class Images(NamedTuple):
    """Training images, from which each epoch draws new data, and test data, each [N, pixels]."""

    name: str
    train: Tensor
    test: Tensor
    shape: tuple[int, int]
    epochs: int
    says: str = "binarised"
    draw: Callable[[Tensor, torch.Generator], Tensor] = lambda x, g: torch.bernoulli(x, generator=g)
    labels: Tensor | None = None  # of the test images


def digits(likelihood: str = "bernoulli") -> Images:
    """Load scikit-learn's handwritten digits, 1797 images of 8x8 pixels, 0 to 16, as data of a likelihood."""
    from sklearn.datasets import load_digits

    kind = kind_of(likelihood)
    bunch = load_digits()
    generator = torch.Generator().manual_seed(DATA_SEED)
    order = torch.randperm(len(bunch.data), generator=generator)
    data = torch.tensor(bunch.data, dtype=torch.float32)[order]
    if likelihood == "bernoulli":
        data, labels = data / 16, torch.tensor(bunch.target)[order[1400:]]
        test = torch.bernoulli(data[1400:], generator=generator)
        return Images("digits", data[:1400], test, (8, 8), 100, labels=labels)
    test = kind.data(data[1400:], generator)
    # Decoders of classes or components have many outputs, and are slower.
    epochs = 20 if likelihood in ("categorical", "discretized_logistic_mixture") else 40
    return Images("digits", data[:1400], test, (8, 8), epochs, f"as {kind.says}", kind.data)


def idx_folder(folder: Path) -> Images:
    """Load MNIST, Fashion-MNIST or another data set with their file names from a folder."""
    train, test = (read_idx(find_idx(folder, part)) for part in ("train", "t10k"))
    if train.shape[1:] != test.shape[1:]:
        sizes = ["x".join(map(str, part.shape[1:])) for part in (train, test)]
        raise ValueError(f"{folder}: training images have {sizes[0]} pixels but test images {sizes[1]}")
    train_images, test_images = (
        torch.from_numpy(part.reshape(len(part), -1)).float() / 255 for part in (train, test)
    )
    generator = torch.Generator().manual_seed(DATA_SEED)
    binary = torch.bernoulli(test_images, generator=generator)
    return Images(folder.resolve().name, train_images, binary, train.shape[1:], 10)


def find_idx(folder: Path, part: str) -> Path:
    """Find the images file of a part, "train" or "t10k", under any of its usual names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: there is no such folder (looked at {folder.resolve()})")
    names = [f"{part}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {part} images in {folder.resolve()}: looked for {', '.join(names)}")


def read_idx(path: Path) -> np.ndarray:
    """Read the images of an IDX file, uint8 [N, height, width]; decompress if the name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _read_idx(path, file)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _read_idx(path: Path, file: BinaryIO) -> np.ndarray:
    """Read only the number of bytes in the header, even if a compressed file would expand to more."""
    header = file.read(16)
    if len(header) < 16:
        raise ValueError(f"{path} has {len(header)} bytes; an IDX file of images has a header of 16")
    magic, count, height, width = struct.unpack(">4I", header)
    if magic != 0x803:
        raise ValueError(
            f"{path} starts with {magic:#010x}; an IDX file of images starts with 0x00000803 "
            "(unsigned bytes, 3 axes)"
        )
    if count == 0 or height == 0 or width == 0:
        raise ValueError(f"{path} holds no pixels: its header says {count} images of {height}x{width}")
    says = f"its header says {count} images of {height}x{width}, which make {16 + count * height * width}"
    data, left = bytearray(), count * height * width
    # In pieces, so that a wrong header does not cause a large allocation.
    while piece := file.read(min(left, 2**20)) if left else b"":
        data += piece
        left -= len(piece)
    if left:
        raise ValueError(f"{path} has {16 + len(data)} bytes; {says}: is it cut off?")
    if file.read(1):
        raise ValueError(f"{path} goes on after {16 + len(data)} bytes, but {says}: is it another file?")
    return np.frombuffer(data, np.uint8).reshape(count, height, width)
