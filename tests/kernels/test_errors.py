"""Wrong arguments of every op: one line that names the argument, the rule and what came, of a bearable length."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sae_kernels import (
    FrameLayout,
    causal_conv3d,
    edm_loss,
    frame_attention,
    modulated_silu,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weight,
    normalize_weights,
    normalize_weights_,
    past_term,
    pixel_norm,
    pixel_norm_silu,
    qk_prepare,
    qkv_prepare,
    token_noise,
    token_noise_eps,
)

LAYOUT = FrameLayout(2, 3)
HUGE = 10**400
X, Q, QKV = torch.ones(1, 2, 5), torch.ones(1, 2, 12, 4), torch.ones(1, 12, 3, 4)
VIDEO, WEIGHT, SCALE = torch.ones(1, 2, 4, 3, 3), torch.ones(2, 2, 2, 3, 3), torch.ones(1, 4)

# Call, error, its message from the start.
WRONG = [
    (lambda: token_noise_eps(5, seed=0), TypeError, "shape: must be a tuple of integers, got int 5"),
    (lambda: token_noise_eps((2.5,), seed=0), TypeError, "shape: must be a tuple of integers, got tuple (2.5,)"),
    (lambda: token_noise_eps("ab", seed=0), TypeError, "shape: must be a tuple of integers, got str 'ab'"),
    (lambda: token_noise_eps(None, seed=0), TypeError, "shape: must be a tuple of integers, got NoneType"),
    (lambda: token_noise_eps((2**62, 8), seed=0), ValueError, "shape: must have fewer than 2^63 elements"),
    (lambda: token_noise_eps((HUGE,), seed=0), ValueError, "shape: must have fewer than 2^63 elements"),
    (lambda: token_noise_eps((3,), seed=HUGE), ValueError, "seed: must be in [-2^63, 2^63), got 1000"),
    (lambda: token_noise_eps((3,), seed=0, impl=np.ones(2)), ValueError, "impl: must be one of auto, reference"),
    (lambda: token_noise(X, HUGE, 1, LAYOUT, seed=0), ValueError, "signal_scale: must be finite as a float, got 1000"),
    (lambda: token_noise(X, np.ones(999), 1, LAYOUT, seed=0), TypeError, "signal_scale: must be a number or a tensor"),
    (
        lambda: edm_loss(X, X, torch.ones(1, 2), LAYOUT, seed=0, sigma_data=HUGE),
        ValueError,
        "sigma_data: must be finite, got 1000",
    ),
    (
        lambda: edm_loss(X, X, torch.ones(1, 2), LAYOUT, seed=0, sigma_data="x"),
        TypeError,
        "sigma_data: must be a number, got str 'x'",
    ),
    (
        lambda: frame_attention(np.ones((99, 99)), Q, Q, LAYOUT),
        TypeError,
        "q: must be a tensor of shape (B, Hq, S, D), got ndarray of shape (99, 99)",
    ),
    (lambda: frame_attention([[1.0] * 99] * 99, Q, Q, LAYOUT), TypeError, "q: must be a tensor of shape"),
    (lambda: frame_attention(Q, Q, Q, np.ones(999)), TypeError, "layout: must be a FrameLayout, got ndarray of shape"),
    (lambda: frame_attention(Q, Q, Q, LAYOUT, scale="x"), TypeError, "scale: must be a number, got str 'x'"),
    (lambda: frame_attention(Q, Q, Q, LAYOUT, scale=HUGE), ValueError, "scale: must be finite, got 1000"),
    (
        lambda: frame_attention(Q, Q, Q, LAYOUT, scale=torch.tensor(0.5, requires_grad=True)),
        TypeError,
        "scale: must be a number, got float32 tensor of shape () on cpu",
    ),
    (
        lambda: frame_attention(Q, Q, Q, LAYOUT, noisy_queries_only="no"),
        TypeError,
        "noisy_queries_only: must be True or False, got str 'no'",
    ),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, grid=2), TypeError, "grid: must be a tuple of integers, got int 2"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, grid=(1.0, 3.0)), TypeError, "grid: must be a tuple of integers"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, axes=4), TypeError, "axes: must be a tuple of integers, got int 4"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, axes=(4.0,)), TypeError, "axes: must be a tuple of integers, got tuple"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, base=HUGE), ValueError, "base: must be finite, got 1000"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, eps=HUGE), ValueError, "eps: must be finite, got 1000"),
    (lambda: qk_prepare(Q, Q, normalize="x"), TypeError, "normalize: must be True or False, got str 'x'"),
    (lambda: qkv_prepare(QKV, LAYOUT, kv_heads=1.5), TypeError, "kv_heads: must be an integer, got float 1.5"),
    (lambda: qkv_prepare(QKV, LAYOUT, kv_heads="a"), TypeError, "kv_heads: must be an integer, got str 'a'"),
    (lambda: causal_conv3d(VIDEO, WEIGHT, LAYOUT, pad_value=HUGE), ValueError, "pad_value: must be finite as a float"),
    (lambda: mp_sum(X, X, HUGE), ValueError, "t: must be finite, got 1000"),
    (lambda: mp_sum(X, X, 0.3, limit=HUGE), ValueError, "limit: must be finite, got 1000"),
    (lambda: mp_cat(X, X, 1, HUGE), ValueError, "t: must be finite, got 1000"),
    (lambda: pixel_norm(X, eps=HUGE), ValueError, "eps: must be finite, got 1000"),
    (lambda: normalize_weight(WEIGHT, HUGE), ValueError, "gain: must be finite, got 1000"),
    (lambda: normalize_weights([WEIGHT], [HUGE]), ValueError, "gains: must be finite, got 1000"),
    (lambda: normalize_weights([WEIGHT], 5), TypeError, "gains: must be a list of numbers, got int 5"),
    (lambda: normalize_weights(WEIGHT), TypeError, "weights: must be a list of tensors, got float32 tensor"),
    (lambda: normalize_weights_(5), TypeError, "weights: must be a list of tensors, got int 5"),
    (lambda: normalize_weights_([], copies=[X]), ValueError, "copies: must have the shapes of the weights, got [(1, 2"),
    (lambda: normalize_weights_([WEIGHT], copies=5), TypeError, "copies: must be a list of tensors, got int 5"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text and len(text) < 300


# With every tensor passed through `a`; the first argument is the one that is named.
CALLS = {
    "x": [
        lambda a: token_noise(a(X), 1, 1, LAYOUT, seed=0),
        lambda a: causal_conv3d(a(VIDEO), a(WEIGHT), LAYOUT, past_scale=a(SCALE)),
        lambda a: mp_silu(a(X)),
        lambda a: modulated_silu(a(X), a(torch.ones(1, 5, 2))),
        lambda a: pixel_norm(a(X)),
        lambda a: pixel_norm_silu(a(X)),
    ],
    "model_output": [lambda a: edm_loss(a(X), a(X), a(torch.ones(1, 2)), LAYOUT, seed=0)],
    "q": [lambda a: frame_attention(a(Q), a(Q), a(Q), LAYOUT), lambda a: qk_prepare(a(Q), a(Q), None, LAYOUT)],
    "qkv": [lambda a: qkv_prepare(a(QKV), LAYOUT)],
    "history": [lambda a: past_term(a(VIDEO[:, :, :1]), a(WEIGHT))],
    "a": [lambda a: mp_sum(a(X), a(X), 0.3), lambda a: mp_sum(a(X), a(X), a(X)), lambda a: mp_cat(a(X), a(X))],
    "w": [lambda a: normalize_weight(a(WEIGHT), a(torch.ones(1)))],
    "weights": [lambda a: normalize_weights([a(WEIGHT)]), lambda a: normalize_weights_([a(WEIGHT)])],
    "signal_scale": [lambda a: token_noise(X, a(SCALE), 1, LAYOUT, seed=0)],
    "positions": [lambda a: qk_prepare(Q, Q, None, a(torch.arange(12)))],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls])
def test_nested_and_sparse_tensors(name, call):
    """Refused by name; what is on no device gives its shape, as in PyTorch."""
    with pytest.raises(TypeError, match=f"^{name}: must be a dense tensor, got nested (float32|int64) tensor$"):
        call(lambda x: torch.nested.nested_tensor(list(x.unbind())))
    with pytest.raises(TypeError, match=f"^{name}: must be a dense tensor, got sparse_coo (float32|int64) tensor of"):
        call(torch.Tensor.to_sparse)
    if name in ("signal_scale", "positions"):
        with pytest.raises(ValueError, match=f"^{name}: must be on the device of"):
            call(lambda x: x.to("meta"))
    else:
        want, got = call(torch.clone), call(lambda x: x.to("meta"))
        pairs = zip(*([r] if isinstance(r, torch.Tensor) else r or [] for r in (got, want)), strict=True)
        assert all(g.is_meta and g.shape == w.shape and g.dtype == w.dtype for g, w in pairs)
