"""Folders written by `collect`."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .actions import check_actions
from .episodes import Episode
from .format import DataError, Shard, read_description


class RecordedReader:
    """Folders written by `collect`."""

    def __init__(self, root: Path) -> None:
        self.root, self.description = root, read_description(root)
        self._open: OrderedDict[Path, Shard] = OrderedDict()

    def files(self) -> list[Path]:
        found = sorted(self.root.glob("shard-*.npz"))
        if not found:
            staged = len(list(self.root.glob("staging/episode-*.npz")))
            raise DataError(self.root, f"must hold a complete shard, got {staged} staged episodes; finish `collect`")
        return found

    def _shard(self, file: Path) -> Shard:
        shard = self._open.pop(file, None) or Shard(file)
        self._open[file] = shard
        if len(self._open) > 32:  # file handles, in every loader process
            self._open.popitem(last=False)[1].close()
        return shard

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        shard, space = self._shard(file), self.description["action_space"]
        made = {k: v for k, v in self.description.items() if k not in ("episodes_per_shard", "frames_per_chunk")}
        name = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
        for number, entry in shard.episodes.items():
            source = f"{file}, episode {number}"
            try:
                shape = (*self.description["size"], 3)
                if verify:
                    shard.verify(number, shape)
                actions = check_actions(shard.actions(number), entry["frames"], source)
                wanted = ("i", 1) if space["kind"] == "discrete" else ("f", 2)
                if (actions.dtype.kind, actions.ndim) != wanted or (
                    actions.ndim == 2 and actions.shape[1] != space["dim"]
                ):
                    raise DataError(
                        source, f"actions must fit dataset.json, {space}, got {actions.dtype} {actions.shape}"
                    )
                if actions.ndim == 1 and actions.size and actions.max() >= space["n"]:
                    raise DataError(source, f"actions must be below {space['n']} (dataset.json), got {actions.max()}")
                stamp = shard.stamp(number)
                yield Episode(source, f"{name}/{number}", stamp, file, number, entry["frames"], shape, "uint8", actions)
            except DataError as error:
                yield error

    def frames(self, episode: Episode, indices: range) -> np.ndarray:
        return self._shard(episode.file).frames(episode.key, indices)

    def stamp(self, episode: Episode) -> str:
        old = self._open.pop(episode.file, None)
        if old is not None:
            old.close()
        return self._shard(episode.file).stamp(episode.key)
