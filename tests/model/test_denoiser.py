"""Preconditioning, conditioning, magnitudes, weight normalisation and dtypes of the denoiser."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, clip, fresh, small
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.model import conv as conv_module
from sae_diffusion.model import layers as layers_module
from sae_diffusion.model.conv import CausalConv, FrameGate
from sae_diffusion.model.frame_pass import FramePass
from sae_diffusion.model.unet import Block


def test_preconditioning_per_frame():
    net = small(sigma_data=0.5)
    x, sigma, actions = clip(net, 2, 3, 2)
    seen = {}
    hook = net.unet.register_forward_hook(lambda module, args, out: seen.update(inputs=args[0], out=out))
    with torch.no_grad():
        got = net(x, sigma, actions)
    hook.remove()
    s, d = sigma[:, :, None, None, None], 0.5
    torch.testing.assert_close(seen["inputs"].transpose(1, 2), x / (s**2 + d**2).sqrt())
    want = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * seen["out"].transpose(1, 2)
    torch.testing.assert_close(got, want)


def test_new_network_returns_the_skip_path():
    net = Denoiser(ModelConfig(**SMALL))
    x, sigma, actions = clip(net, 1, 2, 2)
    want = x / (sigma**2 + 1)[:, :, None, None, None]
    torch.testing.assert_close(net(x, sigma, actions), want.float())


def test_zero_noise_level_is_finite():
    net = small(temporal_mixing="gated")
    x, sigma, actions = clip(net, 1, 2, 2)
    sigma[:, :2] = 0
    with torch.no_grad():
        out = net(x, sigma, actions)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:, :2], x[:, :2])  # c_skip = 1, c_out = 0


def test_patches_are_a_change_of_layout():
    patched = small(patch_size=2, height=16, width=16)
    plain = small(channels=8)
    assert patched.state_dict().keys() == plain.state_dict().keys()
    plain = copy.deepcopy(plain)
    plain.load_state_dict(patched.state_dict())
    x, sigma, actions = clip(patched, 2, 2, 2)
    with torch.no_grad():
        want = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), sigma, actions), 2)
        torch.testing.assert_close(patched(x, sigma, actions), want)


def test_width_may_differ_from_height():
    net = small(width=24)
    x, sigma, actions = clip(net, 1, 2, 2)
    with torch.no_grad():
        assert net(x, sigma, actions).shape == x.shape


@pytest.mark.parametrize("conditioning", [{}, {"num_actions": 0, "action_dim": 2}])
def test_actions_condition_their_own_and_later_frames(conditioning):
    net = small(**conditioning)
    x, sigma, actions = clip(net, 1, 4, 2)
    other = actions.clone()
    other[:, 2] = other[:, 2] + 1 if conditioning else (other[:, 2] + 2) % 3
    with torch.no_grad():
        changed = (net(x, sigma, actions) != net(x, sigma, other)).flatten(2).any(-1)[0].reshape(2, 4)
    assert changed.tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("conditioning", [{}, {"num_actions": 0, "action_dim": 2}])
def test_unknown_actions_are_no_actions(conditioning):
    net = small(**conditioning)
    x, sigma, actions = clip(net, 2, 3, 2)
    unknown = torch.full_like(actions, float("nan") if conditioning else -1)
    with torch.no_grad():
        assert torch.equal(net(x, sigma, unknown), net(x, sigma, None))
        assert not torch.equal(net(x, sigma, actions), net(x, sigma, None))


def test_emb_gain_lets_noise_level_and_action_in():
    net = fresh()
    _x, sigma, actions = clip(net, 1, 1, 1)
    with torch.no_grad():
        embedding = net.unet.embedding(sigma.log() / 4, actions, 1)
        for name, p in net.named_parameters():
            if name.endswith("emb_gain"):
                p.zero_()
        y = torch.randn(1, 8, 1, 8, 8, dtype=torch.float64)
        block = net.unet.encoder["8_0"]
        frame_pass = FramePass(net.config, "sequence", 1, sigma.log() / 4)
        assert torch.equal(block(y, embedding, frame_pass), block(y, -embedding, frame_pass))
        block.emb_gain.fill_(1)
        assert not torch.equal(block(y, embedding, frame_pass), block(y, -embedding, frame_pass))


@pytest.mark.parametrize("spatial_only", [False, True])
@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_magnitudes_are_preserved_through_the_depth(mixing, spatial_only):
    torch.manual_seed(1)
    config = ModelConfig(
        height=16, width=16, channels=4, model_channels=16, channel_mult=(1, 2, 2), blocks_per_level=2,
        video_attention=(4,), frame_attention=(8,), head_dim=16, temporal_mixing=mixing, num_actions=4,
    )  # fmt: skip
    net = Denoiser(config).eval()
    stds = {}

    def watch(name):
        return lambda module, args, out: stds.update({name: out.std().item()})

    for name, module in net.named_modules():
        if isinstance(module, (Block, CausalConv)):
            module.register_forward_hook(watch(name))
    frames = 8 if not spatial_only else 4
    sigma = torch.randn(2, frames).exp()
    data = torch.randn(2, frames, 4, 16, 16) * (1 + sigma[:, :, None, None, None] ** 2).sqrt()
    with torch.no_grad():
        net(data, sigma, torch.randint(0, 4, (2, 4)), spatial_only=spatial_only)
    assert len(stds) > 60
    # Zero padding at the borders of 4x4 maps takes some variance (9 taps see 6.25 pixels on average), and so does the
    # box filter before a block; nothing may grow or shrink with depth.
    worst = {name: value for name, value in stds.items() if not 0.5 < value < 1.5}
    assert not worst, worst
    assert 0.7 < stds["unet.conv_out"] < 1.3


def test_gate_starts_nearly_without_the_past_and_follows_its_equation():
    gate = FrameGate().double()
    sigma = torch.tensor([[0.002, 0.05, 1.0, 80.0]], dtype=torch.float64)
    positions = torch.tensor([0, 1, 10, 1000])
    last, past = gate(sigma.log() / 4, positions)
    for i in range(4):
        s = 1.5 * math.log(sigma[0, i]) / 4 - 0.5 * math.log1p(positions[i])
        low = high = 1 / (1 + math.exp(5))
        g = low + (1 - low) * high / (1 + math.exp(-s))
        assert 0.006 < g < 0.014
        norm = math.hypot(1 - g, g)
        assert math.isclose(last[0, i].item(), (1 - g) / norm, rel_tol=1e-9)
        assert math.isclose(past[0, i].item(), g / norm, rel_tol=1e-9)


def test_gated_and_joint_weights_have_their_fan_in():
    for mixing, names in (("joint", {"weight": 27}), ("gated", {"weight": 9, "past_weight": 18})):
        conv = CausalConv(4, 6, ModelConfig(**SMALL | {"temporal_mixing": mixing})).double()
        for name, taps in names.items():
            assert getattr(conv, name)[0].numel() == taps * 4
        all_taps = conv._all_taps().detach()
        assert all_taps.shape == (6, 4, 3, 3, 3)
        energy = all_taps.square().sum(dim=(1, 3, 4))  # per output channel and frame tap
        if mixing == "joint":
            torch.testing.assert_close(energy.sum(1), torch.ones_like(energy.sum(1)), rtol=1e-3, atol=0)
        else:
            torch.testing.assert_close(energy[:, 2], torch.ones_like(energy[:, 2]), rtol=1e-3, atol=0)
            torch.testing.assert_close(energy[:, :2].sum(1), torch.ones_like(energy[:, 2]), rtol=1e-3, atol=0)


def test_tied_weights_are_one_weight():
    """Two layers that share a weight: the network of two equal weights, their gradients added."""
    plain = fresh()
    first, second = (plain.unet.decoder[f"{plain.config.heights[-1]}_{name}"].conv1 for name in ("in0", "in1"))
    with torch.no_grad():
        second.weight.copy_(first.weight)
    tied = copy.deepcopy(plain)
    one, other = (tied.unet.decoder[f"{plain.config.heights[-1]}_{name}"].conv1 for name in ("in0", "in1"))
    other.weight = one.weight
    x, sigma, actions = clip(plain, 1, 2, 2)
    for net in (plain, tied):
        net.float().normalize_weights_()
        net(x.float(), sigma.float(), actions).square().sum().backward()
    assert other.weight is one.weight and torch.equal(one.weight, first.weight)
    for name, p in tied.named_parameters():
        if p is not one.weight:
            assert torch.equal(p.grad, plain.get_parameter(name).grad), name
    assert torch.equal(one.weight.grad, first.weight.grad + second.weight.grad)


def test_forced_weight_normalisation():
    net = fresh(temporal_mixing="gated")
    x, sigma, actions = clip(net, 1, 2, 2)
    with torch.no_grad():
        before = net(x, sigma, actions)
        for module in net.modules():
            if isinstance(module, layers_module.NormalizedModule):
                for weight in module.raw_weights():
                    weight.mul_(torch.rand(weight.shape[0], *[1] * (weight.ndim - 1)).double() * 5 + 0.5)
        storage = [p.data_ptr() for p in net.parameters()]
        net.normalize_weights_()
        assert storage == [p.data_ptr() for p in net.parameters()]
        for name, p in net.named_parameters():
            if p.ndim > 1:
                rms = p.flatten(1).square().mean(1).sqrt()
                torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0, msg=name)
        # The magnitude of a stored weight means nothing, but for the 1e-4 that guards a zero row.
        torch.testing.assert_close(net(x, sigma, actions), before, rtol=0, atol=2e-2)


def test_normalised_weights_are_kept_while_sampling_and_never_stale(monkeypatch):
    net = fresh()
    x, sigma, actions = clip(net, 1, 2)
    calls = []
    for module in (conv_module, layers_module):
        original = module.normalize_weight
        monkeypatch.setattr(module, "normalize_weight", lambda *a, f=original, **k: calls.append(1) or f(*a, **k))

    def run():
        with torch.no_grad():
            return net(x, sigma, actions, spatial_only=True)

    first = run()
    calls.clear()
    assert torch.equal(run(), first) and not calls
    with torch.enable_grad():
        torch.testing.assert_close(net(x, sigma, actions, spatial_only=True), first, rtol=0, atol=1e-14)

    def expect_fresh():
        want = copy.deepcopy(net).train()(x, sigma, actions, spatial_only=True).detach()
        got = run()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
        return got

    weight = net.unet.conv_in.weight
    with torch.no_grad():
        weight.normal_()
    second = expect_fresh()
    assert not torch.equal(second, first)
    net.load_state_dict(fresh(sigma_data=1.0).state_dict())
    assert torch.equal(expect_fresh(), first)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(x, sigma, actions, spatial_only=True).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())  # kept weights have no graph
    optimizer.step()
    assert not torch.equal(expect_fresh(), first)
    weight.data.normal_()
    net.eval()
    expect_fresh()


def test_activations_stay_channels_last():
    net = fresh(temporal_mixing="gated")
    x, sigma, actions = clip(net, 2, 3, 2)
    wrong = []

    def check(name):
        def hook(module, args):
            if not args[0].is_contiguous(memory_format=torch.channels_last_3d):
                wrong.append(name)
            if layers_module.as_images(args[0]).data_ptr() != args[0].data_ptr():
                wrong.append(name + " as images")

        return hook

    for name, module in net.named_modules():
        if isinstance(module, (Block, CausalConv)):
            module.register_forward_pre_hook(check(name))
    with torch.no_grad():
        net(x, sigma, actions)
        net(x, sigma, actions[:, [0, 1, 2, 0, 1, 2]], spatial_only=True)
        cache = net.new_cache(2)
        net.prefill(x[:, :3], sigma[:, :3], actions, cache)
        net.denoise(x[:, :1], sigma[:, :1], actions[:, :1], cache)
    assert not wrong


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_autocast_computes_in_bfloat16_and_returns_fp32(mixing):
    net = fresh(temporal_mixing=mixing).float().train()
    x, sigma, actions = clip(net, 1, 2, 2)
    dtypes = {}
    for name, module in net.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda m, args, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, sigma, actions)
    assert out.dtype == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())
    with torch.no_grad():
        full = net(x, sigma, actions)
    assert F.cosine_similarity(out.flatten(), full.flatten(), dim=0) > 0.999


def test_half_precision_parameters():
    net = fresh().to(torch.bfloat16)
    x, sigma, actions = clip(net, 1, 2, 2)
    with torch.no_grad():
        out = net(x.float(), sigma.float(), actions)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()


def test_fp64_everywhere():
    net = fresh(temporal_mixing="gated")
    x, sigma, actions = clip(net, 1, 2, 2)
    seen = set()
    for module in net.modules():
        if isinstance(module, (Block, CausalConv, layers_module.Linear)):
            module.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    with torch.no_grad():
        out = net(x, sigma, actions)
    assert out.dtype == torch.float64 and seen == {torch.float64}


def test_reference_implementations_agree():
    x, sigma, actions = clip(small(), 2, 3, 3)
    with torch.no_grad():
        for mixing in ("joint", "gated"):
            want = small(impl="reference", temporal_mixing=mixing)(x, sigma, actions, noisy_copies=2)
            got = small(temporal_mixing=mixing)(x, sigma, actions, noisy_copies=2)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_dropout_acts_in_training_only():
    net = fresh(dropout=0.5)
    x, sigma, actions = clip(net, 1, 2, 2)
    with torch.no_grad():
        assert torch.equal(net(x, sigma, actions), net(x, sigma, actions))
        net.train()
        assert not torch.equal(net(x, sigma, actions), net(x, sigma, actions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 2, 8, 7)}, r"x: must be \(B, F, 2, 8, 8\), got \(1, 4, 2, 8, 7\)"),
        ({"x": torch.zeros(1, 4, 2, 8)}, r"x: must be \(B, F, 2, 8, 8\)"),
        ({"x": torch.zeros(1, 3, 2, 8, 8), "sigma": torch.ones(1, 3)}, r"multiple of 1 \+ noisy_copies = 2, got 3"),
        ({"sigma": torch.ones(1, 3)}, r"sigma: must be \(B, F\) = \(1, 4\), got \(1, 3\)"),
        ({"actions": torch.zeros(1, 4, dtype=torch.long)}, r"actions: must have shape \(1, 2\), got \(1, 4\)"),
        ({"noisy_copies": -1}, r"noisy_copies: must be >= 0, got -1"),
    ],
)
def test_wrong_values(change, message):
    args = {"x": torch.zeros(1, 4, 2, 8, 8), "sigma": torch.ones(1, 4), "actions": None} | change
    with pytest.raises(ValueError, match=message):
        small()(**args)


def test_wrong_types():
    x, sigma = torch.zeros(1, 4, 2, 8, 8), torch.ones(1, 4)
    with pytest.raises(TypeError, match="x: must be floating-point"):
        small()(x.long(), sigma)
    with pytest.raises(TypeError, match="actions: must be integers, num_actions = 3"):
        small()(x, sigma, torch.zeros(1, 2))
    with pytest.raises(TypeError, match="actions: must be floating-point, action_dim = 2"):
        small(num_actions=0, action_dim=2)(x, sigma, torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="actions: must be None"):
        small(num_actions=0)(x, sigma, torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 9), ("width", 0), ("channels", 0), ("patch_size", 3), ("channel_mult", ()), ("channel_mult", (1, 0)),
        ("blocks_per_level", 0), ("video_attention", (5,)), ("frame_attention", (4,)), ("head_dim", 1),
        ("temporal_mixing", "both"), ("kernel_frames", 1), ("num_actions", -1), ("action_dim", 2), ("sigma_data", 0.0),
        ("window", -1), ("sink", -1), ("frames_per_block", 0), ("dropout", 1.0), ("model_channels", 7),
    ],
)  # fmt: skip
def test_config_errors_name_the_field(field, value):
    named = {"patch_size": "height", "model_channels": "head_dim"}.get(field, field)
    with pytest.raises(ValueError, match=f"^{named}: "):
        ModelConfig(**SMALL | {field: value})


@pytest.mark.parametrize("mixing", ["joint", "gated"])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_at_once_change_nothing(mixing, autocast):
    """One launch for all weights: the loss and every gradient are those of normalising layer by layer."""
    model = fresh(temporal_mixing=mixing).float()
    x, sigma, _ = (value.float() for value in clip(model, 2, 3, 2))

    def gradients(at_once):
        model.weights_at_once = at_once
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x, sigma)
        out.square().mean().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters()}

    (out, grads), (want, wanted) = gradients(True), gradients(False)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(out, want, **tolerance)
    assert any(grad is None for grad in wanted.values())  # the action embedding, without actions
    for name, grad in wanted.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, **tolerance, msg=name)
    assert all(not module.given for module in model.modules() if hasattr(module, "given"))
