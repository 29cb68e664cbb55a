// The CPU implementations that registration.cpp registers; each is described at its schema.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace sae {

using torch::stable::Tensor;

void token_noise_fwd_cpu(const Tensor& x, const Tensor& signal_scale, const Tensor& noise_scale, Tensor out,
                         std::optional<Tensor> noise, int64_t streams, int64_t seed, int64_t offset);
void token_noise_bwd_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& signal_scale,
                         std::optional<Tensor> grad_x, std::optional<Tensor> sum_signal,
                         std::optional<Tensor> sum_noise, int64_t streams, int64_t seed, int64_t offset);
void token_noise_eps_cpu(Tensor out, int64_t seed, int64_t offset);
void edm_loss_cpu(const Tensor& raw, const Tensor& x0, const Tensor& sigma, Tensor out, std::optional<Tensor> grad_loss,
                  int64_t streams, int64_t first_stream, double sigma_data, int64_t seed, int64_t offset);
void normalize_weights_cpu(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                           double eps, bool in_place);
void normalize_weights_bwd_cpu(std::vector<Tensor> grads, std::vector<Tensor> weights, std::vector<Tensor> grad_weights,
                               std::vector<double> gains, double eps);
void frame_attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse, int64_t tokens,
                             int64_t block, int64_t copies, bool noisy_first, int64_t window, int64_t sink,
                             double scale, bool noisy_queries_only);
void frame_attention_bwd_cpu(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, Tensor dq, Tensor dk, Tensor dv, int64_t tokens,
                             int64_t block, int64_t copies, bool noisy_first, int64_t window, int64_t sink,
                             double scale, bool noisy_queries_only);
void causal_conv3d_fwd_cpu(std::optional<Tensor> x, const Tensor& weight, std::optional<Tensor> past_scale,
                           std::optional<Tensor> last_scale, std::optional<Tensor> history, std::optional<Tensor> out,
                           std::optional<Tensor> past, double pad_value, int64_t frames, int64_t copies,
                           bool noisy_first);
void causal_conv3d_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> x, const Tensor& weight,
                           std::optional<Tensor> past_scale, std::optional<Tensor> last_scale,
                           std::optional<Tensor> history, std::optional<Tensor> past, std::optional<Tensor> grad_x,
                           std::optional<Tensor> grad_weight, std::optional<Tensor> grad_past_scale,
                           std::optional<Tensor> grad_last_scale, std::optional<Tensor> grad_history, double pad_value,
                           int64_t frames, int64_t copies, bool noisy_first);
void mp_silu_cpu(const Tensor& x, std::optional<Tensor> grad_out, Tensor out);
void mp_sum_cpu(const Tensor& a, const Tensor& b, Tensor out, double weight_a, double weight_b,
                std::optional<double> limit);
void mp_sum_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> out, std::optional<Tensor> grad_a,
                    std::optional<Tensor> grad_b, double weight_a, double weight_b, std::optional<double> limit);
void mp_cat_cpu(std::vector<Tensor> parts, Tensor whole, std::vector<double> weights, int64_t rows, bool backward);
void modulated_silu_cpu(const Tensor& x, const Tensor& scale, Tensor out, int64_t channels);
void modulated_silu_bwd_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& scale, std::optional<Tensor> grad_x,
                            std::optional<Tensor> grad_scale, int64_t channels);
void pixel_norm_cpu(const Tensor& x, Tensor out, Tensor rms, std::optional<Tensor> act, int64_t size, int64_t inner,
                    double eps);
void pixel_norm_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> grad_act, const Tensor& out,
                        const Tensor& rms, Tensor grad_x, int64_t size, int64_t inner, double eps);
void qk_prepare_fwd_cpu(std::vector<Tensor> parts, std::vector<Tensor> outs, std::vector<Tensor> rms,
                        int64_t normalized, std::optional<Tensor> table, std::vector<int64_t> place,
                        std::vector<int64_t> axes, std::vector<int64_t> sizes, bool interleaved, double eps);
void qk_prepare_bwd_cpu(std::vector<Tensor> grads, std::vector<Tensor> outs, std::vector<Tensor> rms,
                        std::vector<Tensor> grad_parts, int64_t normalized, std::optional<Tensor> table,
                        std::vector<int64_t> place, std::vector<int64_t> axes, std::vector<int64_t> sizes,
                        bool interleaved, double eps);

}  // namespace sae
