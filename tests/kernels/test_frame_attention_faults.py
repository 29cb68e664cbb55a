"""Seeded faults in the Triton kernel's mask arithmetic: each must make the comparison with the reference fail.

A fault is one substitution in the kernels' sources, loaded as a package of its own.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import compare, launch, make
from faults import load_with_fault, unload

from sae_kernels import FrameLayout
from sae_kernels.frame_attention.configs import AttentionConfig

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("faults are seeded in the interpreted kernels", allow_module_level=True)

from sae_kernels.frame_attention import triton as kernels  # noqa: E402

TILES = AttentionConfig(32, 16, 4, 1)

PLAIN = FrameLayout(4, 20)
FEW = FrameLayout(2, 40)
WINDOW = FrameLayout(9, 9, window=2, sink=1)
COPIES = FrameLayout(3, 18, noisy_copies=2, noisy_first=True)
BLOCKS = FrameLayout(7, 6, frames_per_block=3)

# name: (what the kernel says, what the fault says, a layout that shows it)
FAULTS = {
    "noisy rows see their own clean block": ("reach = tl.where(is_noisy, 0, U)", "reach = U", PLAIN),
    "clean rows miss their own block": ("reach = tl.where(is_noisy, 0, U)", "reach = 0", PLAIN),
    "one clean block too many at the edge": (
        "reach = tl.where(is_own | (is_noisy == 0), U, 0)",
        "reach = tl.where(is_own | (is_noisy == 0), U, U)",
        PLAIN,
    ),
    "blocks counted from the tile, not from the stream": ("first = first_row // U * U\n    last = last_row", "first = first_row\n    last = last_row", PLAIN),
    "the tile's last block forgotten": ("past_end = tl.minimum(last + reach, N)", "past_end = full_end", PLAIN),
    "full tiles reach into the edge": ("n_past = full_end // BN", "n_past = tl.cdiv(full_end, BN)", PLAIN),
    "own block of a crossing tile unmasked": ("n_own = tl.where(first == last, (own_end - own) // BN, 0)", "n_own = (own_end - own) // BN", PLAIN),
    "rest of the own block forgotten": ("m_own = tl.cdiv(own_end - own - n_own * BN, BN)", "m_own = (own_end - own - n_own * BN) // BN", FEW),
    "own keys not bounded below": ("lower = tl.where(is_own, row_block, 0)", "lower = 0 * row_block", PLAIN),
    "window one block too wide": ("lower = row_block - tl.where(is_own, 0, W)", "lower = row_block - tl.where(is_own, 0, W + U)", WINDOW),
    "window one block too narrow": ("front = tl.maximum(first - W, 0)", "front = tl.maximum(first - W + U, 0)", WINDOW),
    "sink dropped": ("sink_end = tl.minimum(sink, front)", "sink_end = 0", WINDOW),
    "sink one block too long": ("kept = tl.where(is_own, 0, sink)", "kept = tl.where(is_own, 0, sink + U)", FrameLayout(9, 9, window=1, sink=1)),
    "copies see each other": ("own_key = noisy_key + copy * N", "own_key = noisy_key + tl.maximum(copy - 1, 0) * N", COPIES),
    "streams in the wrong order": ("clean_key=layout.clean_start * layout.tokens_per_frame", "clean_key=0", COPIES),
    "keys past the stream's end": ("upper = tl.minimum(row_block + reach, end)", "upper = row_block + reach", FrameLayout(5, 6, frames_per_block=3)),
    "dk/dv: noisy rows read their own clean block": ("lower = key_block + tl.where(is_y, U, 0)", "lower = key_block", PLAIN),
    "dk/dv: noisy rows begin a block late": ("y_start = tl.minimum(first + U, N)", "y_start = tl.minimum(first + 2 * U, N)", PLAIN),
    "dk/dv: crossing tile of clean keys unmasked": ("x_full_start = tl.where(is_noisy & (first < last), own_end, last)", "x_full_start = tl.where(is_noisy & (first < last), own_end, first)", PLAIN),
    "dk/dv: window one block too wide": ("upper = tl.where(key_block < sink, N, key_block + W + U)", "upper = tl.where(key_block < sink, N, key_block + W + 2 * U)", FrameLayout(9, 9, window=1)),
    "dk/dv: readers of the sink end with the window": ("past_end = tl.where(first < sink, N, tl.minimum(last + W + U, N))", "past_end = tl.minimum(last + W + U, N)", WINDOW),
    "dk/dv: second copy's rows forgotten": ("y_count = tl.where(is_noisy, 0, copies)", "y_count = tl.where(is_noisy, 0, 1)", COPIES),
    "dk/dv: own rows of another block": ("upper = tl.where(is_noisy, key_block + U, upper)", "upper = tl.where(is_noisy, key_block + 2 * U, upper)", PLAIN),
    "dk/dv: clean rows forgotten": ("x_count = tl.where(is_noisy, 1, clean_rows)", "x_count = tl.where(is_noisy, 1, 0)", PLAIN),
    "dk/dv: rest of the readers forgotten": ("return n_full, n_front, tl.cdiv(end - back, BM), back", "return n_full, n_front, (end - back) // BM, back", PLAIN),
    "short last block taken for a whole one": ("U=block,", "U=layout.tokens_per_frame,", BLOCKS),
}  # fmt: skip

# Faults of what is read through descriptors: every head, batch entry, row and column, and nothing else.
DESCRIPTOR_FAULTS = {
    "another batch entry": ("x.load([place[0], head, row, 0])", "x.load([0 * place[0], head, row, 0])"),
    "another head": ("x.load([place[0], head, row, 0])", "x.load([place[0], 0 * head, row, 0])"),
    "another row": ("x.load([place[0], head, row, 0])", "x.load([place[0], head, row + 1, 0])"),
    "strides swapped": ("[*strides, 1]", "[strides[0], strides[2], strides[1], 1]"),
    "columns cut short": ("list(x.shape), [*strides", "[*x.shape[:3], x.shape[3] - 8], [*strides"),
    "columns not cut": ("list(x.shape), [*strides", "[*x.shape[:3], 32], [*strides"),
    "rows cut short": ("list(x.shape), [*strides", "[*x.shape[:2], x.shape[2] - 1, x.shape[3]], [*strides"),
    "tiles of keys as long as those of rows": ("_descriptor(x, config.block_n)", "_descriptor(x, config.block_m)"),
}


@pytest.fixture
def load(tmp_path):
    """Load the kernels' sources with a substitution, as a sibling of the real package."""
    loaded = []

    def load(before: str, after: str):
        loaded.append(load_with_fault(kernels, before, after, tmp_path, f"faulty_{len(loaded)}"))
        return loaded[-1]

    yield load
    for module in loaded:
        unload(module)


def check(module, layout):
    tensors = make(layout)
    compare(*launch(module, tensors, layout, 0.25, False, TILES), tensors, layout, 0.25, False)


def check_descriptors(module):
    layout = FrameLayout(2, 9)
    # Head dim 24 of rows of 32 elements: what a descriptor does not cut off is NaN.
    tensors = [
        torch.nn.functional.pad(x, (0, 8), value=float("nan"))[..., :24] for x in make(layout, heads=(2, 2), B=2, D=24)
    ]
    tiles = AttentionConfig(32, 16, 4, 1, descriptors=True)
    compare(*launch(module, tensors, layout, 0.25, False, tiles), tensors, layout, 0.25, False)


@pytest.mark.parametrize("layout", sorted({fault[2] for fault in FAULTS.values()}, key=str), ids=str)
def test_sound_kernel_passes(load, layout):
    check(load("BN", "BN"), layout)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(load, fault):
    before, after, layout = FAULTS[fault]
    module = load(before, after)
    with pytest.raises(AssertionError, match=r"error .* exceeds the budget|not finite|not close"):
        check(module, layout)


def test_sound_descriptors_pass(load):
    check_descriptors(load("BN", "BN"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", DESCRIPTOR_FAULTS)
def test_fault_of_descriptors_is_seen(load, fault):
    module = load(*DESCRIPTOR_FAULTS[fault])
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)):
        check_descriptors(module)


CARELESS = {
    "no second pass": ("for CAREFUL in tl.static_range(1 + TMA):", "for CAREFUL in tl.static_range(1):"),
    "what is unseen spoils": ("visible & bad[None, :]", "bad[None, :]"),
    "values left as they are": ("x = tl.where(finite, x, tl.zeros_like(x))", "x = x"),
    "infinities taken for numbers": ("< float(\"inf\")", "<= float(\"inf\")"),
    "forward without care": ("p, v = set_apart(p, visible, v, CAREFUL)", "p, v = set_apart(p, visible, v, False)"),
    "dq without care": ("visible, k, CAREFUL)", "visible, k, False)"),
    "dk without care": ("visible, q, CAREFUL)", "visible, q, False)"),
    "dv without care": ("visible, grad, CAREFUL)", "visible, grad, False)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", [None, *CARELESS])
def test_carelessness_is_seen(load, fault):
    """A noisy block holds infinities; what does not see it must keep its bits in every product."""
    layout = FrameLayout(5, 6)
    tensors = make(layout)
    tiles = AttentionConfig(32, 16, 4, 1, descriptors=True)
    module = load(*CARELESS[fault]) if fault else kernels
    want, _ = launch(kernels, tensors, layout, 0.25, False, tiles)
    poisoned = slice((5 + 2) * 6, (5 + 3) * 6)  # noisy block 2, whose tile holds all the noisy blocks
    for tensor in tensors:
        tensor[:, :, poisoned] = float("inf")
    got, _ = launch(module, tensors, layout, 0.25, False, tiles)
    mask = layout.dense_mask()
    rows = ~mask[:, poisoned].any(1)
    keys = ~mask[~rows].any(0)
    same = [torch.equal(a[:, :, kept], b[:, :, kept]) for a, b, kept in zip(got, want, (rows, rows, keys, keys))]
    assert all(same) == (fault is None)
