"""csrc/frame_intervals.h, compiled by itself: its pieces are the dense mask, its turns are an order, its faults show."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sae_kernels import FrameLayout

ROOT = Path(__file__).parents[2]
HEADER = (ROOT / "csrc" / "frame_intervals.h").read_text()
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

# name: (what the header says, what the fault says)
FAULTS = {
    "noisy rows see their own clean block": ("noisy ? i : i + 1", "noisy ? i + 1 : i + 1"),
    "clean rows miss their own block": ("noisy ? i : i + 1", "noisy ? i : i"),
    "no window": ("if (s.window < 0) return", "if (s.window < 1000) return"),
    "window one block too wide": ("at_least(sink, i - s.window)", "at_least(sink, i - s.window - 1)"),
    "window one block too narrow": ("at_least(sink, i - s.window)", "at_least(sink, i - s.window + 1)"),
    "sink dropped": ("const int64_t sink = at_most(s.sink, i)", "const int64_t sink = 0 * at_most(s.sink, i)"),
    "sink of later blocks": ("const int64_t sink = at_most(s.sink, i)", "const int64_t sink = s.sink"),
    "one block too many in common": ("past_of(s, noisy, first).end};", "past_of(s, noisy, last).end};"),
    "what is left of the window": ("past_of(s, noisy, last).recent,", "past_of(s, noisy, first).recent,"),
    "common sink twice": ("clean(piece, common.sink, past.sink)", "clean(piece, 0, past.sink)"),
    "edge of the window forgotten": ("clean(piece, past.recent, common.recent);", ""),
    "last blocks forgotten": ("clean(piece, common.end, past.end);", ""),
    "own block of another copy": ("s.noisy + (stream - 1) * s.tokens", "s.noisy"),
    "streams in the wrong order": ("add_keys(piece, s.clean + at_most(begin", "add_keys(piece, at_most(begin"),
    "own block begins at the rows": ("own + i * s.block, own +", "own + piece.rows.begin, own +"),
    "own block past the stream": ("own + at_most((i + 1) * s.block, s.tokens)", "own + (i + 1) * s.block"),
    "clean blocks past the stream": ("s.clean + at_most(end * s.block, s.tokens)", "s.clean + end * s.block"),
    "rows of the next block": ("at_most(rows.end, (i + 1) * s.block)}", "at_most(rows.end, (i + 1) * s.block + 1)}"),
    "neighbours joined across a gap": ("keys[piece.count - 1].end == begin)", "keys[piece.count - 1].end >= begin - 1)"),
    "turns: a tile short": ("ceil_div(at_most(to.end * s.block, s.tokens), size)", "at_most(to.end * s.block, s.tokens) / size"),
    "turns: begins a tile late": ("from.recent * s.block / size", "ceil_div(from.recent * s.block, size)"),
    "turns: tiles of the sink twice": ("at_most(tiles.end, at_least(tiles.sink, from", "at_most(tiles.end, at_least(0, from"),
    "turns: own tiles begin late": ("tiles.own = {first * s.block / size,", "tiles.own = {ceil_div(first * s.block, size),"),
    "turns: own tiles out of turn": ("tile >= t.own.begin && tile < t.own.end ? t.sink + (t.end - t.recent)", "tile >= t.own.begin && tile < t.own.end ? t.sink + t.end"),
}  # fmt: skip

# For all rows of a stream, in tiles: seen[row][key] is how often a piece holds the pair; turns[row tile][clean or own]
# [key tile] is turn_of, and count[row tile] count_of.
HARNESS = """
extern "C" void NAME(const int64_t* n, int64_t stream, int64_t row_tile, int64_t key_tile, uint8_t* seen,
                     int64_t* turns, int64_t* count) {
  using namespace NAME_space;
  const Sequence s = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], false};
  const int64_t length = (1 + s.copies) * s.tokens, tiles = ceil_div(s.tokens, key_tile);
  for (int64_t t = 0; t < ceil_div(s.tokens, row_tile); ++t) {
    const Range rows = {t * row_tile, at_most((t + 1) * row_tile, s.tokens)};
    for_pieces(s, stream, rows, [&](const Piece& piece) {
      for (int64_t row = piece.rows.begin; row < piece.rows.end; ++row)
        for (int r = 0; r < piece.count; ++r)
          for (int64_t key = piece.keys[r].begin; key < piece.keys[r].end; ++key)
            if (row < s.tokens && key >= 0 && key < length) ++seen[row * length + key];
            else ++seen[0];
    });
    const Tiles held = tiles_of(s, stream, rows, key_tile);
    count[t] = count_of(held);
    for (int own = 0; own < 2; ++own)
      for (int64_t k = 0; k < tiles; ++k) turns[(t * 2 + own) * tiles + k] = turn_of(held, !own, k);
  }
}
"""

LAYOUTS = [
    FrameLayout(1, 3),
    FrameLayout(9, 5),
    FrameLayout(9, 5, noisy_copies=0),
    FrameLayout(7, 3, frames_per_block=3, noisy_copies=2, noisy_first=True),
    FrameLayout(12, 2, noisy_copies=2, window=3),
    FrameLayout(12, 2, window=0),
    FrameLayout(12, 2, window=0, sink=2, noisy_first=True),
    FrameLayout(13, 3, window=2, sink=1),
    FrameLayout(13, 1, noisy_copies=3, window=1, sink=4),
    FrameLayout(11, 2, frames_per_block=2, window=100, sink=3),
    FrameLayout(3, 20, noisy_first=True, window=1),
    FrameLayout(5, 9, frames_per_block=4, noisy_copies=2, window=1, sink=1),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The header as it is and with each fault, each in a namespace of its own, in one shared library."""
    texts = {"sound": HEADER}
    for index, (before, after) in enumerate(FAULTS.values()):
        assert HEADER.count(before) == 1, f"the header no longer says once {before!r}"
        texts[f"fault_{index}"] = HEADER.replace(before, after)
    folder = tmp_path_factory.mktemp("intervals")
    source = "\n".join(
        text.replace("#pragma once", "").replace("namespace sae {", f"namespace {name}_space {{")
        + HARNESS.replace("NAME", name)
        for name, text in texts.items()
    )
    (folder / "intervals.cpp").write_text(source)
    command = [COMPILER, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "intervals.cpp", "-o", "intervals.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "intervals.so"))


def check(function, layout: FrameLayout, row_tile: int, key_tile: int) -> None:
    P, N, S = layout.tokens_per_frame, layout.frames * layout.tokens_per_frame, layout.sequence_length
    window = -1 if layout.window is None else layout.window
    fields = (
        N, layout.frames_per_block * P, layout.noisy_copies, layout.clean_start * P, layout.noisy_start * P, window,
        layout.sink,
    )  # fmt: skip
    row_tiles, key_tiles = -(-N // row_tile), -(-N // key_tile)
    for stream in range(layout.streams):
        seen = torch.zeros(N, S, dtype=torch.uint8)
        turns, count = (
            torch.zeros(row_tiles, 2, key_tiles, dtype=torch.int64),
            torch.zeros(row_tiles, dtype=torch.int64),
        )
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (seen, turns, count))
        sizes = (ctypes.c_int64(n) for n in (stream, row_tile, key_tile))
        function((ctypes.c_int64 * len(fields))(*fields), *sizes, *pointers)
        start = layout.clean_start * P if stream == 0 else layout.noisy_start * P + (stream - 1) * N
        mask = layout.dense_mask()[start : start + N]
        assert torch.equal(seen, mask.to(torch.uint8)), "pieces"
        clean, own = mask[:, layout.clean_start * P :][:, :N], mask[:, start : start + N]
        for t in range(row_tiles):
            # The tiles that take part have the turns 0, 1, ... in the order of the keys, the clean ones first.
            taken = turns[t, : 1 + (stream > 0)].flatten()
            assert taken[taken >= 0].tolist() == list(range(count[t])), "turns"
            for keys, turn in ((clean, turns[t, 0]), (own, turns[t, 1]))[: 1 + (stream > 0)]:
                for k in range(key_tiles):
                    met = keys[t * row_tile : (t + 1) * row_tile, k * key_tile : (k + 1) * key_tile]
                    assert turn[k] >= 0 or not met.any(), "a tile that is met has no turn"


def check_all(function) -> None:
    for layout in LAYOUTS:
        for row_tile, key_tile in ((4, 8), (8, 4), (7, 5), (64, 128)):
            check(function, layout, row_tile, key_tile)


def test_pieces_are_the_mask_and_turns_an_order(library):
    check_all(library.sound)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(library, fault):
    with pytest.raises(AssertionError, match=r"pieces|turn"):
        check_all(library[f"fault_{list(FAULTS).index(fault)}"])
