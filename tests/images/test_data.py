"""Digits and CIFAR-10's binary files: what is read, and what is refused by name."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion.likelihood import dequantise
from sae_diffusion.images import data
from sae_diffusion.images.data import ImageSet, cifar10, digits, open_images, parse_cifar10, quantise

RECORDS = 20


def batch(seed: int) -> bytes:
    """A file in the published format with two images of every class."""
    generator = np.random.default_rng(seed)
    table = generator.integers(0, 256, (RECORDS, 3073), dtype=np.uint8)
    table[:, 0] = generator.permutation(np.arange(RECORDS) % 10)
    return table.tobytes()


FILES = {name: batch(i) for i, name in enumerate((*data.CIFAR10_TRAIN, data.CIFAR10_TEST))}


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / data.CIFAR10_FOLDER
    inner.mkdir()
    for name, content in FILES.items():
        (inner / name).write_bytes(content)
    return inner


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / data.CIFAR10_ARCHIVE
    with tarfile.open(path, "w:gz") as file:
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"{data.CIFAR10_FOLDER}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def test_digits_are_split_the_same_way_every_time_and_lose_nothing():
    from sklearn.datasets import load_digits

    images = digits()
    assert (images.shape, images.levels) == ((1, 8, 8), 17)
    assert len(images.train) == 1438 and len(images.heldout) == 359
    raw = load_digits().images.astype(np.uint8)[:, None]
    assert np.array_equal(images.heldout, raw[4::5])
    both = np.concatenate([images.train, images.heldout]).reshape(1797, -1)
    assert np.array_equal(
        np.sort(both.view("V64").ravel()), np.sort(np.ascontiguousarray(raw).reshape(1797, -1).view("V64").ravel())
    )
    assert images.train.max() == 16 and images.fingerprint() == digits().fingerprint()
    assert images.fingerprint() != digits(heldout_every=4).fingerprint()


def test_quantise_inverts_dequantise():
    values = torch.arange(17).repeat(50).view(1, 1, 25, 34)
    assert torch.equal(quantise(dequantise(values, 17, seed=1, dtype=torch.float64), 17), values.to(torch.uint8))
    assert torch.equal(quantise(data.middle(values, 17), 17), values.to(torch.uint8))
    assert quantise(torch.tensor([-2.0, 2.0]), 17).tolist() == [0, 16]


@pytest.mark.parametrize("where", ["folder", "parent", "archive", "archive's parent"])
def test_cifar10_planes_and_order(where, folder, archive):
    path, md5 = archive
    if where == "parent":
        path.unlink()
    if where.startswith("archive"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    place = {"folder": folder, "parent": folder.parent, "archive": path, "archive's parent": path.parent}[where]
    images = cifar10(place, records=RECORDS, md5=md5)
    assert images.train.shape == (5 * RECORDS, 3, 32, 32) and images.heldout.shape == (RECORDS, 3, 32, 32)
    record = np.frombuffer(FILES["data_batch_2.bin"], np.uint8)[3 * 3073 : 4 * 3073]
    # byte 1 + 1024 c + 32 y + x, as published
    assert images.train[RECORDS + 3, 2, 30, 5] == record[1 + 2 * 1024 + 30 * 32 + 5]
    assert np.array_equal(images.heldout[0].ravel(), np.frombuffer(FILES["test_batch.bin"], np.uint8)[1:3073])


def test_cifar10_absent_says_where_to_put_it(tmp_path, folder):
    (folder / "data_batch_3.bin").unlink()
    for place, missing in (
        (None, "data_path"),
        (tmp_path / "nowhere", "data_batch_1.bin"),
        (folder, "data_batch_3.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=missing) as error:
            cifar10(place, records=RECORDS)
        assert data.CIFAR10_ARCHIVE in str(error.value) and "--data-path" in str(error.value)


def test_cifar10_damaged_files_are_named(folder, archive):
    path, _ = archive
    with pytest.raises(ValueError, match=f"md5 must be {data.CIFAR10_MD5}"):
        cifar10(path, records=RECORDS)
    test = folder / "test_batch.bin"
    test.write_bytes(FILES["test_batch.bin"][:-1])
    with pytest.raises(
        ValueError, match=r"test_batch.bin: must have 20 records of 3073 bytes = 61460 bytes, got 61459"
    ):
        cifar10(folder, records=RECORDS)
    table = np.frombuffer(FILES["test_batch.bin"], np.uint8).copy()
    table[7 * 3073] = 11
    with pytest.raises(ValueError, match="labels must be 0 to 9, got 11 in record 7"):
        parse_cifar10(table.tobytes(), "x", RECORDS)
    table[7 * 3073] = (FILES["test_batch.bin"][7 * 3073] + 1) % 10
    test.write_bytes(table.tobytes())
    with pytest.raises(ValueError, match=r"test_batch.bin: must hold 2 images of each class"):
        cifar10(folder, records=RECORDS)


def test_real_files_are_asked_for_by_default(folder):
    with pytest.raises(ValueError, match="10000 records of 3073 bytes = 30730000 bytes"):
        open_images("cifar10", folder)


def test_bad_sets_are_refused():
    with pytest.raises(ValueError, match="data: must be one of digits, cifar10, got 'mnist'"):
        open_images("mnist")
    good = np.zeros((3, 1, 4, 4), np.uint8)
    with pytest.raises(TypeError, match="heldout: must be uint8"):
        ImageSet("x", 17, good, good.astype(np.float32))
    with pytest.raises(ValueError, match="heldout: must be"):
        ImageSet("x", 17, good, np.zeros((3, 1, 4, 5), np.uint8))
    with pytest.raises(ValueError, match="train: values must be below 17 levels, got 17"):
        ImageSet("x", 17, good + 17, good)
