"""The masks of published models, each written from its own definition, against FrameLayout and every implementation.

Sizes are scaled down; what is kept is the shape: order of the streams, frames per block, tokens that fill no tile,
query heads per key head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_cases import compare, make

from sae_kernels import FrameLayout, frame_attention, qk_prepare
from sae_kernels.frame_attention import ops


def teacher_forcing(frames: int, frame_tokens: int, frames_per_block: int) -> torch.Tensor:
    """Self-Forcing, Causal-Forcing: [clean | noisy], from per-token ends of what each query may read."""
    half, block = frames * frame_tokens, frames_per_block * frame_tokens
    mask = torch.zeros(2 * half, 2 * half, dtype=torch.bool)
    for start in range(0, half, block):
        end = min(start + block, half)
        mask[start:end, :end] = True  # clean: everything up to the end of the own chunk
        mask[half + start : half + end, :start] = True  # noisy: the clean context before the chunk
        mask[half + start : half + end, half + start : half + end] = True  # and the noisy chunk itself
    return mask


def block_diffusion(length: int, block: int) -> torch.Tensor:
    """BD3-LM, Fast-dLLM v2, SDAR (one document): [x_t | x_0], M_BD | M_OBC | M_BC of Arriola et al. 2025."""
    index = torch.arange(2 * length)
    is_x0, number = index >= length, index % length // block
    q, k = number[:, None], number[None]
    q_x0, k_x0 = is_x0[:, None], is_x0[None]
    diagonal = (q == k) & (q_x0 == k_x0)
    offset_causal = (q > k) & k_x0 & ~q_x0
    causal = (q >= k) & k_x0 & q_x0
    return diagonal | offset_causal | causal


def skip_causal(blocks: int, tokens: int) -> torch.Tensor:
    """ACDiT: [clean | noise]; the clean half is block-causal, a noise block sees the clean blocks before it and itself."""
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    before = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    eye, none = torch.eye(blocks, dtype=torch.bool), torch.zeros(blocks, blocks, dtype=torch.bool)
    by_block = torch.cat([torch.cat([causal, none], 1), torch.cat([before, eye], 1)], 0)
    return by_block.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def unet(frames: int, tokens: int) -> torch.Tensor:
    """The reference U-Net, tokens '(b s t)' with b in (clean, noisy): the rule it means at every frame size."""
    mask = torch.zeros(2, frames, tokens, 2, frames, tokens, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            mask[0, i, :, 0, j] = j <= i
            mask[1, i, :, 0, j] = j < i
            mask[1, i, :, 1, j] = j == i
    return mask.reshape(2 * frames * tokens, 2 * frames * tokens)


@dataclass(frozen=True)
class Adopter:
    name: str
    mask: torch.Tensor
    layout: FrameLayout
    heads: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return self.name


ADOPTERS = [
    Adopter("Self-Forcing-21x1560-frame-wise", teacher_forcing(7, 13, 1), FrameLayout(7, 13)),
    Adopter("Self-Forcing-7-blocks-of-3-frames", teacher_forcing(9, 5, 3), FrameLayout(9, 5, frames_per_block=3)),
    Adopter("Self-Forcing-short-last-block", teacher_forcing(8, 5, 3), FrameLayout(8, 5, frames_per_block=3)),
    Adopter("BD3-LM-block-4", block_diffusion(48, 4), FrameLayout(12, 4, noisy_first=True)),
    Adopter("BD3-LM-block-16", block_diffusion(64, 16), FrameLayout(4, 16, noisy_first=True)),
    Adopter("Fast-dLLM-v2-28-4-heads", block_diffusion(64, 32), FrameLayout(2, 32, noisy_first=True), heads=(7, 1)),
    Adopter("SDAR-32-8-heads", block_diffusion(24, 4), FrameLayout(6, 4, noisy_first=True), heads=(8, 2)),
    Adopter("ACDiT-image", skip_causal(4, 16), FrameLayout(4, 16)),
    Adopter("U-Net-16x16", unet(8, 16), FrameLayout(8, 16)),
    Adopter("U-Net-16x64", unet(3, 64), FrameLayout(3, 64)),
]
IMPLEMENTATIONS = [i for i in ("composed", "triton") if i in ops.implementations(torch.device("cpu"))[0]]


@pytest.mark.parametrize("adopter", ADOPTERS, ids=str)
def test_layout_is_the_adopters_mask(adopter):
    assert torch.equal(adopter.layout.dense_mask(), adopter.mask)
    assert adopter.layout.attended_pairs == int(adopter.mask.sum())


@pytest.mark.parametrize("adopter", ADOPTERS, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_result_is_sdpa_under_the_adopters_mask(adopter, impl):
    tensors = make(adopter.layout, heads=adopter.heads)
    *inputs, grad = tensors
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = frame_attention(*inputs, adopter.layout, return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, inputs, grad)
    compare([out.detach(), *grads], lse, [x.detach() for x in tensors], adopter.layout, 0.25, False)
    want = F.scaled_dot_product_attention(*inputs, attn_mask=adopter.mask, enable_gqa=True)
    wanted = torch.autograd.grad(want, inputs, grad)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def local_attention(frames: int, frame_tokens: int, frames_per_block: int, local: int) -> torch.Tensor:
    """Self-Forcing's `_prepare_blockwise_causal_attn_mask` with local_attn_size: keys before the own block's end, the
    last local * frame_tokens of them."""
    index = torch.arange(frames * frame_tokens)
    ends = (index // (frames_per_block * frame_tokens) + 1) * frames_per_block * frame_tokens
    keys = index[None]
    return (keys < ends[:, None]) & (keys >= ends[:, None] - local * frame_tokens)


@pytest.mark.parametrize(("frames", "block", "local"), [(9, 1, 4), (9, 3, 6), (12, 3, 3), (8, 2, 6)])
def test_local_attn_size_counts_frames_and_the_own_block(frames, block, local):
    """The documents' window = local_attn_size // frames_per_block - 1; the size itself, in blocks, is one too many."""
    mask = local_attention(frames, 5, block, local)
    window = local // block - 1
    assert torch.equal(FrameLayout(frames, 5, frames_per_block=block, noisy_copies=0, window=window).dense_mask(), mask)
    wider = FrameLayout(frames, 5, frames_per_block=block, noisy_copies=0, window=local // block)
    assert not torch.equal(wider.dense_mask(), mask)


@pytest.mark.parametrize(("length", "block"), [(48, 4), (64, 32), (50, 8), (7, 4)])
def test_text_of_any_length_is_blocks_of_frames_of_one_token(length, block):
    layout = FrameLayout(length, 1, frames_per_block=block, noisy_first=True)
    assert torch.equal(layout.dense_mask(), block_diffusion(length, block))
    # Positions count tokens: the same rotation as of integer positions, in both streams.
    q, k = torch.randn(2, 1, 2, 2 * length, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(length).repeat(2)
    for got, want in zip(qk_prepare(q, k, None, layout), qk_prepare(q, k, None, places), strict=True):
        assert torch.equal(got, want)


def test_packed_documents_are_split_not_sliced():
    """Each document's result is that of the document alone, and the gradients of all pieces come back in one node."""
    lengths, block = [13, 24, 8], 8
    generator = torch.Generator().manual_seed(1)
    packed = [torch.randn(1, 2, 2 * sum(lengths), 16, generator=generator).requires_grad_() for _ in range(3)]
    pieces = [x.split([2 * n for n in lengths], dim=2) for x in packed]
    layouts = [FrameLayout(n, 1, frames_per_block=block, noisy_first=True) for n in lengths]
    outs = [frame_attention(*qkv, layout) for layout, *qkv in zip(layouts, *pieces, strict=True)]
    grads = torch.autograd.grad([out.square().sum() for out in outs], packed)
    start = 0
    for layout, out in zip(layouts, outs, strict=True):
        alone = [x.detach()[:, :, start : start + layout.sequence_length].clone().requires_grad_() for x in packed]
        want = frame_attention(*alone, layout)
        assert torch.equal(out, want)
        for got, expected in zip(grads, torch.autograd.grad(want.square().sum(), alone), strict=True):
            assert torch.equal(got[:, :, start : start + layout.sequence_length], expected)
        start += layout.sequence_length
    for x, parts in zip(packed, pieces, strict=True):
        assert all(part.data_ptr() == x[:, :, 2 * sum(lengths[:i]) :].data_ptr() for i, part in enumerate(parts))
        assert len({part.grad_fn for part in parts}) == 1


def test_the_page_of_adopters_says_so():
    text = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert "window=local_attn_size // frames_per_block - 1" in text and "counted in blocks" not in text
    assert "frames_per_block=block, noisy_first=True)" in text and "x.split([2 * n for n in lengths], dim=2)" in text


def test_full_sizes_count_the_published_work():
    """Fractions of S^2 that the masks cover, from their definitions: (F + 1) / (4 F) for F blocks."""
    for layout, blocks in (
        (FrameLayout(21, 1560), 21),
        (FrameLayout(21, 1560, frames_per_block=3), 7),
        (FrameLayout(256, 4, noisy_first=True), 256),
        (FrameLayout(64, 32, noisy_first=True), 64),
        (FrameLayout(4, 256), 4),
    ):
        assert layout.attended_pairs * 4 * blocks == (blocks + 1) * layout.sequence_length**2
