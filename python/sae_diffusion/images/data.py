"""Images to train on: scikit-learn's digits out of the box, CIFAR-10 from its published binary files. No downloads.

Pixels are integers 0 ... levels - 1. Uniform dequantisation puts level v anywhere in [v, v + 1); the continuous image
is x = 2 (v + u) / levels - 1 in [-1, 1] (`diffusion.likelihood.dequantise`), so a level is 2 / levels wide.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checks import check_choice
from ..disk import file_digest

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive, https://www.cs.toronto.edu/~kriz/cifar.html
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = "test_batch.bin"
CIFAR10_RECORDS = 10_000
CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, red plane, green plane, blue plane


@dataclass(frozen=True)
class ImageSet:
    """Two disjoint sets of images, uint8 (N, C, Y, X) with values 0 ... levels - 1.

    Raises:
        ValueError, TypeError: shapes that differ, values beyond the levels, another dtype.
    """

    name: str
    levels: int
    train: np.ndarray
    heldout: np.ndarray

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            images = getattr(self, name)
            if images.dtype != np.uint8:
                raise TypeError(f"{name}: must be uint8, got {images.dtype}")
            if images.ndim != 4 or 0 in images.shape or images.shape[1:] != self.train.shape[1:]:
                raise ValueError(f"{name}: must be (N, C, Y, X), none 0, alike in both sets, got {images.shape}")
            if images.max() >= self.levels:
                raise ValueError(f"{name}: values must be below {self.levels} levels, got {images.max()}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, Y, X)."""
        return self.train.shape[1:]  # type: ignore[return-value]

    @property
    def step(self) -> float:
        """Width of one level in x."""
        return 2.0 / self.levels

    def fingerprint(self) -> str:
        """Hash of both sets, kept in checkpoints."""
        digest = hashlib.sha256(f"{self.name} {self.levels} {self.train.shape} {self.heldout.shape}".encode())
        digest.update(self.train.tobytes())
        digest.update(self.heldout.tobytes())
        return digest.hexdigest()[:16]


def middle(images: torch.Tensor, levels: int) -> torch.Tensor:
    """fp64 x at the middle of each pixel's level, the mean over dequantisation."""
    return (images.double() + 0.5) * (2.0 / levels) - 1.0


def quantise(x: torch.Tensor, levels: int) -> torch.Tensor:
    """The level in which x lies, uint8; x outside [-1, 1] goes to the nearest level."""
    return ((x + 1.0) * (levels / 2.0)).floor().clamp(0, levels - 1).to(torch.uint8)


def open_images(name: str, path: str | os.PathLike[str] | None = None) -> ImageSet:
    """The data set "digits", or "cifar10" with the path of its files.

    Raises:
        ValueError: an unknown name, or files that differ from those published.
        FileNotFoundError: the files are missing; the message says where to put them.
    """
    check_choice("data", name, ("digits", "cifar10"))
    return digits() if name == "digits" else cifar10(path)


def digits(heldout_every: int = 5) -> ImageSet:
    """1797 digits of 8x8 pixels and 17 levels that come with scikit-learn; every fifth is held out (1438 + 359).

    Both sets hold digits of the same 13 writers.
    """
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[:, None]
    held = np.arange(len(images)) % heldout_every == heldout_every - 1
    return ImageSet("digits", 17, images[~held], images[held])


def cifar10(path: str | os.PathLike[str] | None, *, records: int = CIFAR10_RECORDS, md5: str = CIFAR10_MD5) -> ImageSet:
    """CIFAR-10 (Krizhevsky 2009) from its binary version; the published test batch is held out.

    Args:
        path: cifar-10-binary.tar.gz (read without unpacking), the folder cifar-10-batches-bin, or a folder with either.
        records: images in each file.
        md5: of the archive.

    Raises:
        FileNotFoundError: a file is missing; the message names it and says where to put it.
        ValueError: a file of another length, a label beyond 9, classes of unequal number, or an archive of another md5.
    """
    where = (
        f"put {CIFAR10_ARCHIVE} (md5 {CIFAR10_MD5}) from https://www.cs.toronto.edu/~kriz/cifar.html, "
        f"or the folder {CIFAR10_FOLDER} unpacked from it, anywhere, and name its path with --data-path"
    )
    if path is None:
        raise FileNotFoundError(f"data_path: CIFAR-10 is not part of this package; {where}")
    path = Path(path)
    if path.is_dir() and not (path / CIFAR10_TEST).exists():
        for candidate in (path / CIFAR10_FOLDER, path / CIFAR10_ARCHIVE):
            if candidate.exists():
                path = candidate
                break
    names = (*CIFAR10_TRAIN, CIFAR10_TEST)
    if path.is_file():
        files = _read_archive(path, names, md5)
    else:
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: {', '.join(missing)} missing; {where}")
        files = {name: (path / name).read_bytes() for name in names}
    parsed = {name: parse_cifar10(files[name], name, records) for name in names}
    images = np.concatenate([parsed[name][0] for name in CIFAR10_TRAIN])
    _check_classes("the training batches", np.concatenate([parsed[name][1] for name in CIFAR10_TRAIN]))
    _check_classes(CIFAR10_TEST, parsed[CIFAR10_TEST][1])
    return ImageSet("cifar10", 256, images, parsed[CIFAR10_TEST][0])


def parse_cifar10(content: bytes, name: str, records: int = CIFAR10_RECORDS) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, 3, 32, 32), labels (N,)), both uint8, of one binary file.

    Raises:
        ValueError: a length other than records x 3073 bytes, or a label beyond 9.
    """
    if len(content) != records * CIFAR10_RECORD:
        raise ValueError(
            f"{name}: must have {records} records of {CIFAR10_RECORD} bytes = {records * CIFAR10_RECORD} bytes, "
            f"got {len(content)}"
        )
    table = np.frombuffer(content, np.uint8).reshape(records, CIFAR10_RECORD)
    labels = table[:, 0]
    if labels.max() > 9:
        first = int(np.argmax(labels > 9))
        raise ValueError(f"{name}: labels must be 0 to 9, got {labels[first]} in record {first}")
    return table[:, 1:].reshape(records, 3, 32, 32), labels


def _check_classes(name: str, labels: np.ndarray) -> None:
    """Check that all classes have the same number of images."""
    counts = np.bincount(labels, minlength=10)
    if (counts != len(labels) // 10).any():
        raise ValueError(f"{name}: must hold {len(labels) // 10} images of each class, got {counts.tolist()}")


def _read_archive(path: Path, names: tuple[str, ...], md5: str) -> dict[str, bytes]:
    if (found := file_digest(path, "md5")) != md5:
        raise ValueError(f"{path}: md5 must be {md5}, got {found}")
    files = {}
    with tarfile.open(path) as archive:
        for name in names:
            try:
                member = archive.extractfile(f"{CIFAR10_FOLDER}/{name}")
            except KeyError:
                member = None
            if member is None:
                raise ValueError(f"{path}: holds no {CIFAR10_FOLDER}/{name}")
            files[name] = member.read()
    return files
