"""One-line faults that the tests must notice: (file, tests, [(old, new), ...]).

`old` stands exactly once in the file. `tests` are arguments of pytest, quick ones that should fail: a file, or a file and
`-k`. When code changes so that an entry no longer applies, change the entry; test_mutants.py names it.
"""

from __future__ import annotations

ATTENTION = "tests/kernels/test_frame_attention.py"
CONVOLUTION = "tests/kernels/test_causal_conv3d.py"
ACTIVATIONS = "tests/kernels/test_activations.py"
WEIGHTS = "tests/kernels/test_activations.py tests/kernels/test_weight_norm.py"
NOISE = "tests/kernels/test_token_noise.py"
LOSS = "tests/kernels/test_edm_loss.py"
QK = "tests/kernels/test_qk_prepare.py"
STEPS = "tests/kernels/test_steps_cpp.py"
TRAINER = "tests/train/test_trainer.py -k 'uninterrupted_run or resume_is_bit_exact or order'"
MODEL = "tests/model/test_equations.py tests/model/test_denoiser.py"

Entry = tuple[str, str, list[tuple[str, str]]]

KERNELS: list[Entry] = [
    (
        "sae_kernels/layout.py",
        "tests/kernels/test_layout.py",
        [
            ("other >= block - self.window or", "other > block - self.window or"),
            ("(k_block >= q_block - window)", "(k_block > q_block - window)"),
            ("(k_block < q_block)", "(k_block <= q_block)"),
            ("(k_block < sink)", "(k_block <= sink)"),
            ("own * (seen + own)", "own * (seen + 1)"),
            ("return -(-self.frames // self.frames_per_block)", "return self.frames // self.frames_per_block"),
            ("return self.noisy_copies * self.frames if", "return self.frames if"),
        ],
    ),
    (
        "sae_kernels/frame_attention/composed.py",
        ATTENTION,
        [
            (
                "recent = min(max(last - layout.window, sink), first)",
                "recent = min(max(first - layout.window, sink), first)",
            ),
            ("past = index[None] < row", "past = index[None] <= row"),
            ("partial = old[None] >= row - layout.window", "partial = old[None] > row - layout.window"),
            ("| (index[None] < layout.sink)", "| (index[None] < 0)"),
            ("weights = (stacked - lse).exp_()", "weights = (stacked - lse).exp_().mul_(1.001)"),
            ("shared = shared.sum(dim=2)", "shared = shared[:, :, 0]"),
        ],
    ),
    (
        "sae_kernels/frame_attention/triton/forward_kernels.py",
        "tests/kernels/test_frame_attention_triton.py -k forward_and_gradients",
        [
            ("lse = (highest + tl.log2(total)) * LN2", "lse = (highest + tl.log2(total) * 1.01) * LN2"),
        ],
    ),
    (
        "sae_kernels/frame_attention/triton/primitives.py",
        "tests/kernels/test_frame_attention_triton.py -k forward_and_gradients",
        [
            ("upper = tl.minimum(row_block + reach, end)", "upper = row_block + reach"),
            ("lower = row_block - tl.where(is_own, 0, W)", "lower = row_block - tl.where(is_own, 0, W - U)"),
        ],
    ),
    (
        "sae_kernels/frame_attention/triton/backward_kernels.py",
        "tests/kernels/test_frame_attention_triton.py -k forward_and_gradients",
        [
            ("delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)", "delta = tl.sum(out.to(tl.float32), 1)"),
        ],
    ),
    (
        "sae_kernels/qk_prepare/composed.py",
        QK + " -k 'composed_is or positions or finite_differences or fp64'",
        [
            ("addcmul_(a, sin, value=sign)", "addcmul_(a, sin, value=-sign)"),
            ("+ (start if axis == 0 else 0)", "+ start"),
            (".add(eps).reciprocal_()", ".reciprocal_()"),
            ("(-y.shape[-1] * scale)", "(-y.shape[-1] * (scale + eps))"),
            ("/ max(channels, 1)", "/ max(channels - 2, 1)"),
            ("if angles is None or part == 2:", "if angles is None:"),
        ],
    ),
    (
        "sae_kernels/qk_prepare/triton.py",
        QK + " -k 'triton_is or start_and_copies or angles'",
        [
            ("tl.where(rms == 0.0, 1.0, rms))[:, None]", "tl.where(rms == 0.0, 1.0, rms + eps))[:, None]"),
            ("frame = start + (index", "frame = 0 * start + (index"),
            ("c = 1.0 - z * 0.5 + z * z * (1 / 24", "c = 1.0 - z * 0.5 + z * z * (1 / 25"),
        ],
    ),
    (
        "sae_kernels/token_noise/composed.py",
        NOISE + " -k 'composed_is or plain_integers or beyond_32_bits or piece or finite_differences'",
        [
            ("radius.log_().mul_(-2).sqrt_()", "radius.log_().mul_(-2.0001).sqrt_()"),
            ("torch.full_like(c0, (offset >> 32) & WORD)", "torch.full_like(c0, 0)"),
            ("c1 = c0 >> 32", "c1 = c0 * 0"),
            ("value.mul_(take(noise_scale, *box)", "value.mul_(take(signal_scale, *box)"),
            ("part.add_((grad * noise).sum_to_size(part.shape))", "part.copy_((grad * noise).sum_to_size(part.shape))"),
            ("(seed >> 32) & WORD)", "0)"),
        ],
    ),
    (
        "sae_kernels/token_noise/triton.py",
        NOISE + " -k 'triton_is or four_ulp'",
        [
            ("return tl.sqrt_rn(-2.0 * (total + tail))", "return tl.sqrt_rn(-2.0 * total)"),
            ("STEP: tl.constexpr = BLOCK if ALIGNED else BLOCK - 4", "STEP: tl.constexpr = BLOCK"),
        ],
    ),
    (
        "sae_kernels/edm_loss/composed.py",
        LOSS + " -k 'is_the_reference or finite_differences or sequence'",
        [
            ("result.addcmul_(eps, (sigma_data / total)", "result.addcmul_(eps, (1 / total)"),
            ("* (2 / n))", "* (1 / n))"),
            ("eps.narrow(1, 0 if noisy_first else frames", "eps.narrow(1, 0 if noisy_first else 0"),
        ],
    ),
    (
        "sae_kernels/activations/composed.py",
        ACTIVATIONS + " -k 'composed_is or finite_differences'",
        [
            ("SILU_GAIN = 1 / 0.596", "SILU_GAIN = 1 / 0.5961"),
            ("/ norm**3)", "/ norm**2)"),
            ("/ (-out.shape[dim] * rms))", "/ (-out.shape[dim] * (rms + eps)))"),
        ],
    ),
    (
        "sae_kernels/weight_norm/composed.py",
        WEIGHTS + " -k 'composed_is or forced or finite_differences'",
        [
            (
                "grad_gain.copy_(dot.sum() * (factor * fan_in**-0.5))",
                "grad_gain.copy_(dot.sum() * (factor * fan_in**-0.4))",
            ),
            ("_scale(gain, factor, fan_in, rms) / (rms + 1e-4)", "_scale(gain, factor, fan_in, rms) / (rms + 1e-5)"),
            (
                "normalize_weight(w, None, math.prod(w.shape[1:]) ** 0.5, w, _rms_of(w))",
                "normalize_weight(w, None, 1.0001 * math.prod(w.shape[1:]) ** 0.5, w, _rms_of(w))",
            ),
        ],
    ),
    (
        "sae_kernels/activations/triton.py",
        ACTIVATIONS + " -k test_triton",
        [
            ("rms = tl.sqrt_rn(total / N.to(tl.float32))", "rms = tl.sqrt_rn(total / (N.to(tl.float32) - 1.0))"),
            ("y = a * ((1.0 - t) / norm) + b * (t / norm)", "y = a * ((1.0 - t) / norm) + b * t"),
            (
                "total += tl.sum(tl.where(ok, grad * x, 0.0), axis=0)",
                "total = tl.sum(tl.where(ok, grad * x, 0.0), axis=0)",
            ),
        ],
    ),
    (
        "sae_kernels/weight_norm/triton.py",
        ACTIVATIONS + " -k test_triton",
        [
            ("dot = tl.sum(total, axis=0) / (rms + eps)", "dot = tl.sum(total, axis=0) / rms"),
        ],
    ),
    (
        "sae_kernels/causal_conv3d/composed.py",
        CONVOLUTION + " -k 'composed_is or own_copy or streaming or gradcheck'",
        [
            ("rows[:, :, :early] = pad_value", "rows[:, :, :early] = 0.0"),
            ("history[:, :, tap : tap + early].permute", "history[:, :, :early].permute"),
            ("clean[:, :, : T - early] += rows[:, :, early:]", "clean[:, :, early:] += rows[:, :, early:]"),
            ("rows = rows.sum(1, keepdim=True)", "rows = rows[:, :1]"),
            ("total.addcmul_(group, scale)", "total.add_(group)"),
        ],
    ),
    (
        "sae_kernels/causal_conv3d/triton/taps.py",
        "tests/kernels/test_causal_conv3d_triton.py -k 'triton_is or streaming'",
        [
            ("ok = ok & (frame < lag)", "ok = ok & (frame <= lag)"),
            ("offset = choose(frame >= lag, offset,", "offset = choose(frame > lag, offset,"),
        ],
    ),
    (
        "csrc/philox.h",
        NOISE + " -k four_ulp",
        [
            ("p = madd(p, f, 0x1.555554p-2f);", "p = madd(p, f, 0x1.555f54p-2f);"),
        ],
    ),
    (
        "csrc/cpu_kernels.cpp",
        f"{LOSS} {WEIGHTS} -k 'is_the_reference or forced or one_pass or finite_differences'",
        [
            ("factor *= static_cast<C>(2.0 /", "factor *= static_cast<C>(1.0 /"),
            ("static_cast<float>(1.0 / (rms + eps));", "static_cast<float>(1.0001 / (rms + eps));"),
            ("-dot * scale / ((rms + eps) * rms", "-dot * scale / (rms * rms"),
        ],
    ),
    (
        "csrc/cpu_attention.cpp",
        "tests/kernels/test_frame_attention_cpp.py -k 'forward_and_gradients or any_scale or infinity or not_see'",
        [
            ("const float shift = peak == -kInfinity ? 0.0f : peak;", "const float shift = peak;"),
            ("if (lead) store(s, keep(load(s), lead,", "if (lead) store(s, keep(load(s), 0,"),
            ("keep(load(s + n / kLanes * kLanes), 0, n % kLanes,", "keep(load(s + n / kLanes * kLanes), 0, kLanes,"),
            ("sum = sum * factor;", ""),
            ("(a.scale > 0) - (a.scale < 0)", "(a.scale > 0)"),
            ("- splat(delta)) * (weight * scale)", "- splat(delta)) * weight"),
            ("g < a.group; ++g", "g < 1; ++g"),
            ("turn == 0 && i < count", "turn == 0 && i < count - 1"),
            ("a.lse[head * a.rows + first + i];", "a.lse[head * a.rows + i];"),
            ("const int64_t key_head = head / a.group;", "const int64_t key_head = head % (a.heads / a.group);"),
        ],
    ),
    (
        "csrc/cpu_steps.cpp",
        STEPS + " -k 'reference or around'",
        [
            ("y[0] = x[0] * silu_slope(x[1]);", "y[0] = x[1] * silu_slope(x[0]);"),
            ("const Vec z = madd(x[1], g, x[0] * f);", "const Vec z = madd(x[0], g, x[1] * f);"),
            ("(x[1] >= limit) | (x[1] <= -limit)", "(x[1] >= limit)"),
            ("const Vec factor = splat(part.factor);", "const Vec factor = splat(a.part[0].factor);"),
            ("a.scale + row / a.pixels * n", "a.scale + row % a.groups * n"),
            ("madd(dz, some, get(sums + i, m))", "madd(dz, dz, get(sums + i, m))"),
            ("scale, some, m), some, part)", "scale, some, m), splat(1.0f), part)"),
            ("p % 64 == 63 || p == pixels - 1", "p % 64 == 63"),
        ],
    ),
    (
        "csrc/step_loops.h",
        STEPS + " -k 'reference or around'",
        [
            ("constexpr float kGain = 1 / 0.596;", "constexpr float kGain = 1 / 0.597;"),
            ("madd(x, s.rest, splat(1.0f))", "madd(x, s.value, splat(1.0f))"),
            ("add(sum, r, p + i, m)", "add(sum, r, i, m)"),
        ],
    ),
    (
        "csrc/cpu_norms.cpp",
        STEPS + " -k 'reference or around or ragged or zeros'",
        [
            ("-dot / (rms * splat(static_cast<float>(n)))", "-dot / rms"),
            ("rms == Vec{} ? Vec{} : ", ""),
            ("silu_slope(y), direct)", "splat(1.0f), direct)"),
            ("c % 64 == 63 || c == a.size - 1", "c % 64 == 63"),
            ("swap_pairs(v) * (kBack ? -sine : sine)", "swap_pairs(v) * sine"),
            ("madd(v, cosine, u * sine)", "madd(v, cosine, -u * sine)"),
            (
                "token / a.tokens_per_frame % a.frames, in_frame",
                "(token + 1) / a.tokens_per_frame % a.frames, in_frame",
            ),
            ("(batch * a.table_batch + token)", "(token)"),
        ],
    ),
    (
        "csrc/cpu_convolution.cpp",
        "tests/kernels/test_causal_conv3d_cpp.py -k 'shared_out or is_the_reference or not_read or alone'",
        [
            ("least(w_.row + w_.rows, c_.rows - dy);", "least(w_.row + w_.rows, c_.rows);"),
            ("left = most(0, -dx), right =", "left = most(0, dx), right ="),
            ("const int64_t turned = tap / space * space + space - 1 - tap % space;", "const int64_t turned = tap;"),
            (
                "before = least(w.frames, most(0, -source));\n      const float* const of_tap",
                "before = 0;\n      const float* const of_tap",
            ),
            ("end = most(begin, least(w.frames, c.frames - source));", "end = w.frames;"),
            ("scaled + load(past + n * width + i) : scaled;", "scaled + scale * load(past + n * width + i) : scaled;"),
            ("return stream == 0 ? scale * g :", "return stream == 0 ? g :"),
            ("c.dots[at * c.parts + part]", "c.dots[at * c.parts]"),
            ("before.grad + before.n * width_ == grad)", "true)"),
            ("(tap * k + depth) * vectors * kLanes;", "tap * k * vectors * kLanes;"),
            ("in_ + at, to, space_ * width_);\n          else", "at, to, space_ * width_);\n          else"),
            ("else if (c.pad != 0) gradient.meet(", "else if (c.pad != c.pad) gradient.meet("),
        ],
    ),
    (
        "sae_kernels/_extension.py",
        "tests/build/test_extension.py -k 'earlier_sources or told_once'",
        [
            ("    if missing:\n", "    if False:\n"),
            ('if device.type == "cpu" and reason is not None:', "if False:"),
        ],
    ),
]

MODELS: list[Entry] = [
    (
        "python/sae_diffusion/model/layers.py",
        MODEL,
        [
            ("return angle.cos() * math.sqrt(2)", "return angle.cos()"),
            ("2 * math.pi * torch.rand(features)", "math.pi * torch.rand(features)"),
        ],
    ),
    (
        "python/sae_diffusion/model/conv.py",
        MODEL,
        [
            ("g = low + (1 - low) * high", "g = low + high"),
            ("torch.log1p(positions", "torch.log1p(2 * positions"),
            ("else math.sqrt(self.kernel_frames)", "else self.kernel_frames"),
        ],
    ),
    (
        "python/sae_diffusion/model/denoiser.py",
        MODEL,
        [
            ("c_skip = std**2 / total", "c_skip = std / total"),
            ("c_out = sigma * std * total.rsqrt()", "c_out = sigma * total.rsqrt()"),
            (".log() / 4", ".log() / 2"),
        ],
    ),
    (
        "python/sae_diffusion/model/unet.py",
        MODEL,
        [
            ("ACTION_BALANCE = 1 / 3", "ACTION_BALANCE = 1 / 2"),
            ("RESIDUAL_BALANCE = 0.3", "RESIDUAL_BALANCE = 0.35"),
            ("SKIP_BALANCE = 0.5", "SKIP_BALANCE = 0.4"),
            ("self.action(one_hot * self.num_actions**0.5)", "self.action(one_hot)"),
            ("known = actions >= 0", "known = actions > 0"),
            ("self.emb(emb) * self.emb_gain + 1)", "self.emb(emb) * self.emb_gain + 2)"),
        ],
    ),
    ("python/sae_diffusion/model/cache.py", "tests/model/test_equations.py", [("PAD_VALUE = 1.0", "PAD_VALUE = 0.5")]),
    (
        "python/sae_diffusion/model/cache.py",
        "tests/model/test_cache.py tests/model/test_flight.py tests/model/test_parity.py",
        [
            ("min(blocks, self.sink + self.window)", "min(blocks, max(self.sink, self.window))"),
            ("slot = self.sink + (block - self.sink) % self.window", "slot = self.sink + block % self.window"),
            ("oldest = max(blocks + own - self.window, 0)", "oldest = max(blocks + own - self.window + 1, 0)"),
            ("elif block >= blocks + count - self.window:", "elif block > blocks + count - self.window:"),
        ],
    ),
    (
        "python/sae_diffusion/model/frame_pass.py",
        "tests/model/test_parity.py tests/model/test_equations.py",
        [
            ("self.start = 0 if cache is None else cache.frames", "self.start = 0"),
            ("ROTARY_BASE = 10000.0", "ROTARY_BASE = 5000.0"),
        ],
    ),
]

DIFFUSION: list[Entry] = [
    (
        "python/sae_diffusion/diffusion/loss.py",
        "tests/train/test_noise_and_loss.py",
        [
            (".clamp(-math.pi, math.pi)", ".clamp(-3.0, 3.0)"),
            ("/ (sigma * sigma_data) ** 2", "/ sigma**2"),
            ("+ self.ridge * torch.eye", "+ 0 * torch.eye"),
            ("self.sigmas[slots] = sigma[count - kept :]", "self.sigmas[slots] = sigma[:kept]"),
            ("MAX_LOG10_FIT = 4.0", "MAX_LOG10_FIT = 3.0"),
            (".clamp(min=10.0**-8)", ".clamp(min=10.0**-4)"),
            ("if self.records % self.fit_every == 0:", "if self.records % self.fit_every == 1:"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/noise.py",
        "tests/train/test_noise_and_loss.py",
        [
            ("device=device) * config.context_sigma_max", "device=device) * 0.5"),
            ("(config.mean + config.std * normal)", "(config.mean + config.std * normal.abs())"),
            ("context.clamp(min=config.context_sigma_min)", "context.clamp(min=0)"),
            (".repeat_interleave(frames_per_block, dim=2)", ".repeat(1, 1, frames_per_block)"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/forcing.py",
        "tests/train/test_forcing.py",
        [
            ("torch.where(clean < clean_frames,", "torch.where(clean > clean_frames,"),
            ("(level * config.context_sigma_max)", "(level * 0.5)"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/posterior.py",
        "tests/diffusion/test_equations_of_unified_diffusion.py",
        [
            ("of_x_t * x_t + of_x_0 * x_0, variance", "of_x_t * x_t - of_x_0 * x_0, variance"),
            ("return -(-0.5 * log_snr).exp() * eps_difference", "return (-0.5 * log_snr).exp() * eps_difference"),
            (
                "signal_p / signal_t * (1 - fresh), signal_p * fresh",
                "signal_p / signal_t * (1 + fresh), signal_p * fresh",
            ),
            ("noise_t.square() * fresh_fraction", "noise_t * fresh_fraction"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/sampler.py",
        "tests/model/test_sampler.py",
        [
            (
                "return weak + self.config.guidance * (strong - weak)",
                "return strong + self.config.guidance * (strong - weak)",
            ),
            ("self.noise([_CONTEXT_DRAW] * frames)", "self.noise([0] * frames)"),
            ("(sample << _DRAW_BITS)", "0"),
            ("(1, frames), config.context_sigma", "(1, frames), config.sigma_min"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/sampler.py",
        "tests/model/test_window_sampler.py",
        [
            ("return block * steps // in_flight", "return -(-block * steps // in_flight)"),
            ("ahead=len(self.steps)", "ahead=0"),
            ("self.first += frames", "self.first += 0"),
            ("x[:, f:], steps[f:]", "x[:, f:], steps[:-f]"),
            ("self.x, self.steps, self.last_x0 = x, steps, begin.x0", "self.x, self.steps, self.last_x0 = x, steps, x"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/steps.py",
        "tests/model/test_sampler.py",
        [
            ("0.5 * (now.eps + then.eps)", "then.eps"),
            ("(level.noise.square() - self.noise.square()).sqrt()", "level.noise"),
            ("self.amount / torch.as_tensor(steps).double().clamp(min=1)", "self.amount * torch.ones(1).double()"),
            ("math.sqrt(2) - 1)", "1)"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/steps.py",
        "tests/diffusion/test_solvers.py",
        [
            (
                "fresh_fraction(then.log_snr, now.level.log_snr).sqrt()",
                "fresh_fraction(then.log_snr, now.level.log_snr)",
            ),
            ("((then.signal.square() + then.noise.square()) * beta).sqrt()", "(then.noise.square() * beta).sqrt()"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/steps.py",
        "tests/diffusion/test_steps.py",
        [
            (".clamp(max=2.0)", ".clamp(max=4.0)"),
            ("(h_last > 0) & h.isfinite()", "h.isfinite()"),
            ('-2 * sigma.log(), "ve"', '-sigma.log(), "ve"'),
            ("churned if moves is None else churned & moves", "churned"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/schedules.py",
        "tests/diffusion/test_schedules.py",
        [
            ("return self.tokens - 1 + self.window", "return self.tokens + self.window"),
            ("(self.steps_per_token - (macro - start))", "(self.steps_per_token - macro - start)"),
            ("(1 - (global_time - token) / self.window)", "((global_time - token) / self.window)"),
            ("(uniform[0].argsort(dim=0) + uniform[1]) / batch", "(uniform[0].argsort(dim=0) + 1) / batch"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/solvers.py",
        "tests/diffusion/test_solvers.py",
        [
            ("return (x - noise * prediction) / signal\n", "return (x + noise * prediction) / signal\n"),
            ("return low + weight * (strong(x, log_snr) - low)", "return weight * (strong(x, log_snr) - low)"),
            ("noisier, now = ", "noisier, _ = "),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/snr.py",
        "tests/diffusion/test_snr.py",
        [
            ("return -0.5 * slope * log_snr.exp()", "return -slope * log_snr.exp()"),
            ("1 / (torch.maximum(snr,", "1 / (torch.minimum(snr,"),
        ],
    ),
    (
        "python/sae_diffusion/diffusion/bases.py",
        "tests/diffusion/test_bases.py",
        [
            ("matrix[0] /= math.sqrt(2)", "matrix[0] /= 2"),
        ],
    ),
]

TRAINING: list[Entry] = [
    (
        "python/sae_diffusion/train/ema.py",
        "tests/train/test_ema_and_lr.py",
        [
            ("** (gamma_from_std(std) + 1)", "** gamma_from_std(std)"),
            ("[1.0, 7.0, 16.0 - s, 12.0 - s]", "[1.0, 7.0, 16.0 - s, 16.0 - s]"),
            ("ratio ** (later_gamma + 0.5)", "ratio ** (later_gamma + 1)"),
            ("0 < s.clips_seen <= target", "0 < s.clips_seen < target"),
        ],
    ),
    (
        "python/sae_diffusion/train/lr.py",
        "tests/train/test_ema_and_lr.py",
        [
            ("lr /= math.sqrt(max(step / ref_steps, 1.0))", "lr /= max(step / ref_steps, 1.0)"),
            ("lr *= min(step / ramp_steps, 1.0)", "lr *= min((step - 1) / ramp_steps, 1.0)"),
        ],
    ),
    (
        "python/sae_diffusion/train/loader.py",
        TRAINER,
        [
            ("derive_seed(seed, DATA_ORDER, epoch)", "derive_seed(seed, DATA_ORDER, 0)"),
            ("first = start + micro * self.micro_size", "first = start + micro"),
        ],
    ),
    (
        "python/sae_diffusion/train/loop.py",
        TRAINER,
        [
            ("self.clips_seen += settings.batch_size", "self.clips_seen += 1"),
            ("self.micro_batches_seen += settings.micro_batches", "self.micro_batches_seen += 1"),
            ("self.ema.clips_seen = self.task.age(self)", "self.ema.clips_seen = 0"),
        ],
    ),
    (
        "python/sae_diffusion/train/loop.py",
        "tests/train/test_trainer.py -k spoilt",
        [
            ("checked = -1 if self.scaler.is_enabled() else None", "checked = -1"),
        ],
    ),
    (
        "python/sae_diffusion/train/checkpoint.py",
        "tests/train/test_checkpoint.py",
        [
            ("    check_finite(files, step)", "    pass"),
            ("if (reason := _not_finite(path / name)) is not None:", "if (reason := None) is not None:"),
            ("if not _FILE.fullmatch(name):", "if not _FILE.match(Path(name).name):"),
        ],
    ),
    (
        "python/sae_diffusion/lock.py",
        "tests/series/test_series_train.py -k at_a_time",
        [
            ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        ],
    ),
    (
        "python/sae_diffusion/checks.py",
        "tests/train/test_config.py",
        [
            ("lambda value: 0 <= value < 1", "lambda value: 0 <= value <= 1"),
            ("-FP32_MAX <= value <= FP32_MAX", "value <= FP32_MAX"),
        ],
    ),
    (
        "python/sae_diffusion/train/metrics.py",
        "tests/train/test_metrics.py",
        [
            ('if record["step"] <= step:', "if True:"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/losses.py",
        "tests/evaluation/test_denoising_errors.py",
        [
            ("slice(s - past, s + block)", "slice(s, s + block)"),
            ("// block * block - 1", "// block * block"),
            ("table[..., block:].mean(-1)", "table.mean(-1)"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/objects.py",
        "tests/evaluation/test_objects.py",
        [
            ("x[..., bright].min(-1) - x[..., dark].max(-1)", "x[..., bright].max(-1) - x[..., dark].max(-1)"),
            ("nan=np.inf) <= within", "nan=np.inf) <= 2 * within"),
            ("hit = there & (", "hit = ("),
            ("(self.mass <= MASS[1] * typical)", "(self.mass <= 3 * typical)"),
            ("(self.peak >= PEAK) &", "(self.peak >= 0) &"),
            ("(p * p).sum((1, 2)) / mass", "p.sum((1, 2)) / mass"),
            ("np.where(shown, table, np.nan)[:, context:]", "table[:, context:]"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/films.py",
        "tests/evaluation/test_films.py",
        [
            ("frames[:, films.context - 1 : films.context]", "frames[:, films.context : films.context + 1]"),
            ("table[~seen] = np.nan", "pass"),
            ("detected(typical)[:, given - 1]", "detected(typical)[:, given]"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/intervals.py",
        "tests/evaluation/test_films.py",
        [
            ("self.counts = counts[:, which]", "self.counts = counts[:, np.arange(films) % len(names)]"),
            ("tail = (1 - LEVEL) / 2", "tail = 1 - LEVEL"),
            ("default_rng(seed)", "default_rng(0)"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/pictures.py",
        "tests/evaluation/test_films.py",
        [
            ("xy - mx * my", "xy"),
            ("255.0**2 / np", "255.0 / np"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/features.py",
        "tests/evaluation/test_films.py",
        [
            ("root @ second @ root", "second @ root"),
        ],
    ),
    (
        "python/sae_diffusion/evaluation/drift.py",
        "tests/evaluation/test_drift.py",
        [
            ("_grown(presence(", "(presence("),
            ("start.max(-1) <= DARK", "start.min(-1) <= DARK"),
            ("context - 1 + m for m in marks]]", "context + m for m in marks]]"),
            ("objects[begins] = count(later[begins]", "objects[:] = count(later"),
        ],
    ),
    (
        "python/sae_diffusion/runs.py",
        "tests/train/test_sample.py",
        [
            ('episodes["heldout" if is_heldout', 'episodes["train" if is_heldout'),
            ('or not episodes["heldout"] else "heldout"', 'or not episodes["heldout"] else "train"'),
            ("frames = max((longest - context) // block, 1) * block", "frames = frames"),
            ("if num_actions > model.num_actions or", "if num_actions < model.num_actions or"),
        ],
    ),
    (
        "python/sae_diffusion/rollout.py",
        "tests/train/test_sample.py",
        [
            ("np.savez(file, generated=self.frames,", "np.savez(file, generated=self.frames[:, ::-1],"),
        ],
    ),
    (
        "python/sae_diffusion/cli.py",
        "tests/train/test_sample.py",
        [
            ("if actions is not None and len(actions) < frames:", "if False:"),
            ("(28 if actions is None else len(actions))", "28"),
            ('recorded=self.actions == "recorded",', "recorded=True,"),
        ],
    ),
    (
        "python/sae_diffusion/progress.py",
        "tests/train/test_progress.py -k few_seconds",
        [
            ("time.monotonic() - self._written >= EVERY", "time.monotonic() - self._began >= EVERY"),
            ("elapsed / (self.done - self.start) *", "elapsed / self.done *"),
        ],
    ),
    (
        "python/sae_diffusion/train/metrics.py",
        "tests/train/test_cli.py -k time_left",
        [
            ("self._progress.update(step, left=seconds_left)", "self._progress.update(step)"),
        ],
    ),
    (
        "python/sae_diffusion/settings.py",
        "tests/train/test_settings.py",
        [
            ("if names.count(name) > 1:", "if False:"),
        ],
    ),
]

DATA: list[Entry] = [
    (
        "python/sae_diffusion/data/dataset.py",
        "tests/data/test_readers.py",
        [
            ("< fraction * 2**64", "< fraction * 2**63"),
            ("self._span = (clip_length - 1) * frame_stride + 1", "self._span = clip_length * frame_stride"),
            ("actions[i - indices.step] if i >= indices.step", "actions[i - 1] if i >= indices.step"),
            ("- self._span) // self.clip_stride + 1", "- self._span) // self.clip_stride or 1"),
        ],
    ),
    (
        "python/sae_diffusion/data/dataset.py",
        "tests/data/test_readers.py -k changes_under",
        [
            ("same = self._reader.stamp(episode) == episode.stamp", "same = True"),
        ],
    ),
    (
        "python/sae_diffusion/data/stats.py",
        "tests/data/test_frame_stats.py",
        [
            ("+ delta**2 * count * len(x) / total", "+ delta**2 * count / total"),
            ("((y + 1) * 127.5).round()", "((y + 1) * 127.5).floor()"),
        ],
    ),
    (
        "python/sae_diffusion/data/record.py",
        "tests/data/test_record.py",
        [
            ("if steps % hold == 0:", "if steps % hold == 1:"),
            ("while steps < skip_first and not end:", "while steps < 0 and not end:"),
        ],
    ),
    (
        "python/sae_diffusion/data/format.py",
        "tests/data/test_record.py tests/data/test_readers.py",
        [
            ("chunk = (self.count - 1) // FRAMES_PER_CHUNK", "chunk = self.count // FRAMES_PER_CHUNK"),
        ],
    ),
    (
        "python/sae_diffusion/data/arrays.py",
        "tests/data/test_readers.py",
        [
            ("if low >= 0 and 16 < high <= 255:", "if False:"),
        ],
    ),
]

ENTRIES = KERNELS + MODELS + DIFFUSION + TRAINING + DATA
