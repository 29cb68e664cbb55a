"""Clips in an order that depends only on the seed and the number of clips seen."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import Clip, DataError, collate
from ..diffusion.noise import derive_seed

DATA_ORDER = 0


@lru_cache(maxsize=2)
def _permutation(epoch: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, DATA_ORDER, epoch))
    return torch.randperm(length, generator=generator)


def clip_index(position: int, length: int, seed: int) -> int:
    """Index of the clip at `position` in the order of training; each epoch is a new permutation of the data set."""
    epoch, place = divmod(position, length)
    return int(_permutation(epoch, length, seed)[place])


class MicroBatchSampler(Sampler[list[int]]):
    """Endless index lists of a rank's micro-batches: rank r of W takes micro-batches r, r + W, ... of each step."""

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        clips_seen: int,
        batch_size: int,
        micro_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.seed, self.clips_seen = length, seed, clips_seen
        self.batch_size, self.micro_size = batch_size, micro_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.clips_seen
        while True:
            for micro in range(self.rank, self.batch_size // self.micro_size, self.world_size):
                first = start + micro * self.micro_size
                yield [clip_index(first + i, self.length, self.seed) for i in range(self.micro_size)]
            start += self.batch_size


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group, but the trainer decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Reporting(Dataset):
    """Returns a DataError as an item: torch would turn what a worker raises into a RuntimeError with a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> list[Clip] | DataError:
        try:
            return [self.dataset[i] for i in indices]
        except DataError as error:
            return error


def _collate(clips: list[Clip] | DataError) -> Any:
    return clips if isinstance(clips, DataError) else collate(clips)


def make_loader(dataset: Any, sampler: MicroBatchSampler, *, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader for `read_batches`."""
    return DataLoader(
        _Reporting(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator().manual_seed(0),
    )


def read_batches(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(frames, actions) of the loader's micro-batches.

    Raises:
        DataError: raised by the data set, in any process.
    """
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
