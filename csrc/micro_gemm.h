// C += A B for operands that lie in the caches: register tiles of M rows by N vectors, sums in the order of k.
#pragma once

#include "simd.h"

namespace sae {
namespace simd {

// Vectors of a register tile, at most; B is packed in panels of as many.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// How A (m, k) lies: `rows` with its rows apart by lda, `columns` with its columns apart by lda.
enum class Order { rows, columns };

template <int M, int N, Order order>
static inline void register_tile(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                                 int64_t k, float* __restrict c, int64_t ldc, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = Vec{};
  for (int64_t kk = 0; kk < k; ++kk) {
    Vec right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec left = splat(order == Order::rows ? a[i * lda] : a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = madd(left, right[j], sum[i][j]);
    }
    a += order == Order::rows ? 1 : lda;
    b += ldb;
  }
  // What was there is added last: a long sum is one of short sums, which rounds less.
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* const to = c + i * ldc + j * kLanes;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// One column of register tiles: m rows, N vectors. As many rows at a time as leave N + 1 registers free.
template <int N, Order order>
static inline void column_of_tiles(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, bool add) {
  constexpr int kMost = kTileVectors == 4 ? (N == 4 ? 6 : N == 3 ? 8 : 12) : (N == 2 ? 6 : 12);
  const int64_t step = order == Order::rows ? lda : 1;
  const auto tiles = [&]<int M>() __attribute__((always_inline)) {
    for (; m >= M; m -= M, a += M * step, c += M * ldc) register_tile<M, N, order>(a, lda, b, ldb, k, c, ldc, add);
  };
  tiles.template operator()<kMost>();
  if constexpr (kMost > 8) tiles.template operator()<8>();
  if constexpr (kMost > 4) tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// C (m, n vectors) = A (m, k) B (k, n vectors), or += where `add`.
template <Order order>
static void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  // Columns of even width: one vector alone would wait for its sums.
  for (int64_t left = (n + kTileVectors - 1) / kTileVectors; left > 0; --left) {
    const int64_t width = (n + left - 1) / left;
    if (width == 1) column_of_tiles<1, order>(m, k, a, lda, b, ldb, c, ldc, add);
    if (width == 2) column_of_tiles<2, order>(m, k, a, lda, b, ldb, c, ldc, add);
#if defined(__AVX512F__)
    if (width == 3) column_of_tiles<3, order>(m, k, a, lda, b, ldb, c, ldc, add);
    if (width == 4) column_of_tiles<4, order>(m, k, a, lda, b, ldb, c, ldc, add);
#endif
    n -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

}  // namespace simd
}  // namespace sae
