// Every C++ op's schema on one screen. They write into tensors that the caller allocates; torch.ops.sae_kernels_native
// is called by the `cpp.py` of each op's room, which knows shapes, gradients and streams of the public op.
#include "ops.h"

#include <torch/csrc/stable/library.h>

// out = signal_scale x + noise_scale eps, and eps, for all streams of a sequence; both contiguous.
// Backward: grad_x, and sums over slabs (slabs, scale's shape) in fp64 for the scales, zero at first.
STABLE_TORCH_LIBRARY(sae_kernels_native, m) {
  m.def("token_noise_fwd(Tensor x, Tensor signal_scale, Tensor noise_scale, Tensor(a!) out, Tensor(b!)? noise, "
        "int streams, int seed, int offset) -> ()");
  m.def("token_noise_bwd(Tensor grad_out, Tensor x, Tensor signal_scale, Tensor(a!)? grad_x, Tensor(b!)? sum_signal, "
        "Tensor(c!)? sum_noise, int streams, int seed, int offset) -> ()");
  m.def("token_noise_eps(Tensor(a!) out, int seed, int offset) -> ()");
  // Loss of each noisy frame to out, or, given the loss's gradient, that of raw; sigma in fp64, the noisy streams count
  // from first_stream.
  m.def("edm_loss(Tensor raw, Tensor x0, Tensor sigma, Tensor(a!) out, Tensor? grad_loss, int streams, "
        "int first_stream, float sigma_data, int seed, int offset) -> ()");
  // Each w[i] /= eps + rms(w[i]), fp32, where in_place; copies (none, or one of each weight) get that, or w[i] as it is,
  // normalised (once more), times gain / sqrt(fan_in), in any dtype. Backward: from the gradients of copies that were
  // not made in place, of any dtype, to those of the weights.
  m.def("normalize_weights(Tensor(a!)[] weights, Tensor(b!)[] copies, float[] gains, float eps, bool in_place) -> ()");
  m.def("normalize_weights_bwd(Tensor[] grads, Tensor[] weights, Tensor(a!)[] grad_weights, float[] gains, float eps) "
        "-> ()");
  // out and lse, or dq, dk, dv, of attention over a clean and `copies` noisy streams of `tokens` tokens in blocks of
  // `block`; window < 0 for none. fp32, bf16, fp16; any strides with a contiguous last dimension.
  m.def("frame_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, int tokens, int block, "
        "int copies, bool noisy_first, int window, int sink, float scale, bool noisy_queries_only) -> ()");
  m.def("frame_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, "
        "Tensor(b!) dk, Tensor(c!) dv, int tokens, int block, int copies, bool noisy_first, int window, int sink, "
        "float scale, bool noisy_queries_only) -> ()");
  // out (B, Cout, F, Y, X), and past (B, Cout, T, Y, X), what its earlier taps sum to; without x and out, past alone, of
  // one frame. Backward: the gradients that are there; past where grad_past_scale is. fp32; videos of any strides with
  // contiguous channels, the rest contiguous.
  m.def("causal_conv3d_fwd(Tensor? x, Tensor weight, Tensor? past_scale, Tensor? last_scale, Tensor? history, "
        "Tensor(a!)? out, Tensor(b!)? past, float pad_value, int frames, int copies, bool noisy_first) -> ()");
  m.def("causal_conv3d_bwd(Tensor grad_out, Tensor? x, Tensor weight, Tensor? past_scale, Tensor? last_scale, "
        "Tensor? history, Tensor? past, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_past_scale, "
        "Tensor(d!)? grad_last_scale, Tensor(e!)? grad_history, float pad_value, int frames, int copies, "
        "bool noisy_first) -> ()");
  // The small steps (cpu_steps.h): tensors of fp32, bf16 or fp16, dense and in one order of memory.
  m.def("mp_silu(Tensor x, Tensor? grad_out, Tensor(a!) out) -> ()");
  m.def("mp_sum(Tensor a, Tensor b, Tensor(a!) out, float weight_a, float weight_b, float? limit) -> ()");
  m.def("mp_sum_bwd(Tensor grad_out, Tensor? out, Tensor(a!)? grad_a, Tensor(b!)? grad_b, float weight_a, "
        "float weight_b, float? limit) -> ()");
  // Two parts of each row to the whole, or back; schemas cannot say which of them is written.
  m.def("mp_cat(Tensor(a!)[] parts, Tensor(b!) whole, float[] weights, int rows, bool backward) -> ()");
  // scale fp32 (groups, channels), x (groups, pixels, channels).
  m.def("modulated_silu(Tensor x, Tensor scale, Tensor(a!) out, int channels) -> ()");
  m.def("modulated_silu_bwd(Tensor grad_out, Tensor x, Tensor scale, Tensor(a!)? grad_x, Tensor(b!)? grad_scale, "
        "int channels) -> ()");
  // x (outer, size, inner), rms fp32 (outer, inner); act is mp_silu of out.
  m.def("pixel_norm(Tensor x, Tensor(a!) out, Tensor(b!) rms, Tensor(c!)? act, int size, int inner, float eps) -> ()");
  m.def("pixel_norm_bwd(Tensor grad_out, Tensor? grad_act, Tensor out, Tensor rms, Tensor(a!) grad_x, int size, "
        "int inner, float eps) -> ()");
  // Parts (B, H, S, D) of any strides with a contiguous last dimension; rms (B, H, S) and, backward, outs of those in
  // the bit mask `normalized`. table: for each axis (size, 2, channels) cosines and sines; place: frames, tokens per
  // frame and per row, frames = 0 where the table has a row for each token.
  m.def("qk_prepare_fwd(Tensor[] parts, Tensor(a!)[] outs, Tensor(b!)[] rms, int normalized, Tensor? table, "
        "int[] place, int[] axes, int[] sizes, bool interleaved, float eps) -> ()");
  m.def("qk_prepare_bwd(Tensor[] grads, Tensor[] outs, Tensor[] rms, Tensor(a!)[] grad_parts, int normalized, "
        "Tensor? table, int[] place, int[] axes, int[] sizes, bool interleaved, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sae_kernels_native, CPU, m) {
  m.impl("token_noise_fwd", TORCH_BOX(&sae::token_noise_fwd_cpu));
  m.impl("token_noise_bwd", TORCH_BOX(&sae::token_noise_bwd_cpu));
  m.impl("token_noise_eps", TORCH_BOX(&sae::token_noise_eps_cpu));
  m.impl("edm_loss", TORCH_BOX(&sae::edm_loss_cpu));
  m.impl("normalize_weights", TORCH_BOX(&sae::normalize_weights_cpu));
  m.impl("normalize_weights_bwd", TORCH_BOX(&sae::normalize_weights_bwd_cpu));
  m.impl("frame_attention_fwd", TORCH_BOX(&sae::frame_attention_fwd_cpu));
  m.impl("frame_attention_bwd", TORCH_BOX(&sae::frame_attention_bwd_cpu));
  m.impl("causal_conv3d_fwd", TORCH_BOX(&sae::causal_conv3d_fwd_cpu));
  m.impl("causal_conv3d_bwd", TORCH_BOX(&sae::causal_conv3d_bwd_cpu));
  m.impl("mp_silu", TORCH_BOX(&sae::mp_silu_cpu));
  m.impl("mp_sum", TORCH_BOX(&sae::mp_sum_cpu));
  m.impl("mp_sum_bwd", TORCH_BOX(&sae::mp_sum_bwd_cpu));
  m.impl("mp_cat", TORCH_BOX(&sae::mp_cat_cpu));
  m.impl("modulated_silu", TORCH_BOX(&sae::modulated_silu_cpu));
  m.impl("modulated_silu_bwd", TORCH_BOX(&sae::modulated_silu_bwd_cpu));
  m.impl("pixel_norm", TORCH_BOX(&sae::pixel_norm_cpu));
  m.impl("pixel_norm_bwd", TORCH_BOX(&sae::pixel_norm_bwd_cpu));
  m.impl("qk_prepare_fwd", TORCH_BOX(&sae::qk_prepare_fwd_cpu));
  m.impl("qk_prepare_bwd", TORCH_BOX(&sae::qk_prepare_bwd_cpu));
}
