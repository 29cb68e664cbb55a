// frame_attention's inner loops, compiled once for each instruction set; SAE_ISA names the namespace they land in.
//
// What a row does not see is never multiplied: pieces of rows that see the same keys run by themselves. Of whole
// vectors of scores, lanes outside an interval are computed and dropped. Every sum is taken in an order that follows
// from the layout alone.
#include "cpu_attention.h"

#include <math.h>
#include <sched.h>

#include "micro_gemm.h"

#ifndef SAE_ISA
#define SAE_ISA baseline
#endif

namespace sae {
namespace SAE_ISA {
namespace {

using namespace simd;

constexpr int64_t kPanel = kTileVectors * kLanes;
// Keys whose scores a task holds at a time, and those that one call multiplies with values: 64 rows of 64 floats and
// as many of the other operand fill 32 KiB.
constexpr int64_t kScores = 256, kDepth = 64;
constexpr double kLog2e = 1.44269504088896340736;
constexpr float kInfinity = __builtin_inff();

static_assert(kPackKeys % kPanel == 0 && kKeyTile % kPanel == 0 && kScores % kPanel == 0);

// ---- rows in and out

int64_t offset_of(const Rows& x, int64_t head, int64_t row) {
  return head / x.heads * x.batch_stride + head % x.heads * x.head_stride + row * x.row_stride;
}

// One row times `scale`, padded with zeros.
void read_row(const Rows& x, int64_t at, int64_t n, int64_t width, float scale, float* __restrict to) {
  if (x.type == Type::f32) {
    const float* from = static_cast<const float*>(x.data) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
    if (x.type == Type::bf16) for (int64_t i = 0; i < n; ++i) to[i] = widen_bf16(from[i]) * scale;
    else for (int64_t i = 0; i < n; ++i) to[i] = widen_f16(from[i]) * scale;
  }
  for (int64_t i = n; i < width; ++i) to[i] = 0;
}

void write_row(const Rows& x, int64_t at, int64_t n, const float* __restrict from) {
  if (x.type == Type::f32) {
    float* to = static_cast<float*>(x.data) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  } else {
    uint16_t* to = static_cast<uint16_t*>(x.data) + at;
    if (x.type == Type::bf16) for (int64_t i = 0; i < n; ++i) to[i] = narrow_bf16(from[i]);
    else for (int64_t i = 0; i < n; ++i) to[i] = narrow_f16(from[i]);
  }
}

// Rows [first, first + count) of a key head as a panel: to[d * kPanel + j] is element d of row first + j, else zero.
void pack_panel(const Attention& a, const Rows& x, int64_t head, int64_t first, int64_t count, float* __restrict to) {
  constexpr int64_t kStrip = 64;
  float rows[kLanes][kStrip];
  for (int64_t j = 0; j < kPanel; j += kLanes)
    for (int64_t d = 0; d < a.dim; d += kStrip) {
      const int64_t n = at_most(kStrip, a.dim - d);
      for (int64_t i = 0; i < kLanes; ++i) {
        if (j + i < count) read_row(x, offset_of(x, head, first + j + i) + d, n, n, 1.0f, rows[i]);
        else for (int64_t e = 0; e < n; ++e) rows[i][e] = 0;
      }
      for (int64_t e = 0; e < n; ++e)
        for (int64_t i = 0; i < kLanes; ++i) to[(d + e) * kPanel + j + i] = rows[i][e];
    }
}

Range tile_rows(const Attention& a, int64_t tile) {
  return {tile * kRowTile, at_most((tile + 1) * kRowTile, a.sequence.tokens)};
}

// ---- products with panels

// to[:, j] = <from, key j> for the vectors that hold keys [begin, end), counted from the first panel.
void scores(const Attention& a, int64_t m, const float* from, int64_t from_row, const float* panels, int64_t begin,
            int64_t end, float* to, int64_t to_row) {
  const int64_t last = ceil_div(end, kLanes);
  for (int64_t v = begin / kLanes; v < last;) {
    const int64_t in = v % kTileVectors, n = at_most(kTileVectors - in, last - v);
    gemm<Order::rows>(m, n, a.dim, from, from_row, panels + v / kTileVectors * kPanel * a.dim + in * kLanes, kPanel, to,
                      to_row, false);
    to += n * kLanes;
    v += n;
  }
}

// ---- forward

void pack_keys(const Attention& a, int64_t key_head, int64_t part) {
  const int64_t first = part * kPackKeys, last = at_most(first + kPackKeys, a.keys);
  float* panels = a.panels + (key_head * ceil_div(a.keys, kPanel) * kPanel + first) * a.dim;
  for (int64_t j = first; j < last; j += kPanel, panels += kPanel * a.dim)
    pack_panel(a, a.k, key_head, j, at_most(kPanel, last - j), panels);
  for (int64_t j = first; j < last; ++j)
    read_row(a.v, offset_of(a.v, key_head, j), a.dim, a.width, 1.0f, a.values + (key_head * a.keys + j) * a.width);
}

// Keys [begin, end) whose scores begin at a column; those of whole vectors, so lane begin % kLanes holds the first.
struct Run {
  int64_t begin, end, column;
};

// What a task keeps of its rows: the softmax so far, with weights 2^(factor (score - peak)).
struct Online {
  float *q, *out, *scores, *sums;  // (rows, dim), (rows, width), (rows, kScores), (rows, kLanes)
  float peaks[kRowTile];
  float factor;
};

// One row's scores of some runs to weights; what the row has so far is scaled to the new peak.
void soften(const Attention& a, Online& online, int64_t row, const Run* runs, int count) {
  float* const of = online.scores + row * kScores;
  Vec top = splat(online.peaks[row]);
  for (int r = 0; r < count; ++r) {
    const int64_t lead = runs[r].begin % kLanes, n = lead + runs[r].end - runs[r].begin;
    float* const s = of + runs[r].column;
    if (lead) store(s, keep(load(s), lead, kLanes, -kInfinity));
    if (n % kLanes) store(s + n / kLanes * kLanes, keep(load(s + n / kLanes * kLanes), 0, n % kLanes, -kInfinity));
    for (int64_t j = 0; j < n; j += kLanes) top = larger(top, load(s + j));
  }
  const float before = online.peaks[row], peak = largest(top);
  // Scores of minus infinity alone weigh nothing.
  const float shift = peak == -kInfinity ? 0.0f : peak;
  const Vec scale = splat(online.factor);
  online.peaks[row] = peak;
  float* const sums = online.sums + row * kLanes;
  Vec sum = load(sums);
  if (before != peak) {
    const Vec factor = exp2(splat(before - shift) * scale);
    sum = sum * factor;
    for (int64_t d = 0; d < a.width; d += kLanes) {
      float* const out = online.out + row * a.width + d;
      store(out, load(out) * factor);
    }
  }
  for (int r = 0; r < count; ++r) {
    const int64_t n = runs[r].begin % kLanes + runs[r].end - runs[r].begin;
    float* const s = of + runs[r].column;
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec weight = exp2((load(s + j) - splat(shift)) * scale);
      store(s + j, weight);
      sum = sum + weight;
    }
  }
  store(sums, sum);
}

// Rows [begin, end) of the tile meet the keys of some runs.
void meet(const Attention& a, Online& online, int64_t key_head, Range rows, const Run* runs, int count) {
  const int64_t m = rows.end - rows.begin;
  const float* panels = a.panels + key_head * ceil_div(a.keys, kPanel) * kPanel * a.dim;
  const float* values = a.values + key_head * a.keys * a.width;
  float* const scores_of = online.scores + rows.begin * kScores;
  for (int r = 0; r < count; ++r)
    scores(a, m, online.q + rows.begin * a.dim, a.dim, panels, runs[r].begin, runs[r].end, scores_of + runs[r].column,
           kScores);
  for (int64_t row = rows.begin; row < rows.end; ++row) soften(a, online, row, runs, count);
  for (int r = 0; r < count; ++r) {
    const float* weights = scores_of + runs[r].column + runs[r].begin % kLanes;
    for (int64_t j = runs[r].begin; j < runs[r].end; j += kDepth, weights += kDepth)
      gemm<Order::rows>(m, a.width / kLanes, at_most(kDepth, runs[r].end - j), weights, kScores, values + j * a.width,
                        a.width, online.out + rows.begin * a.width, a.width, true);
  }
}

void attend(const Attention& a, int64_t head, int64_t stream, int64_t row_tile, float* scratch) {
  const Range tile = tile_rows(a, row_tile);
  const int64_t count = tile.end - tile.begin, first = row_of(a.sequence, stream) + tile.begin;
  Online online;
  online.scores = scratch;
  online.sums = online.scores + kRowTile * kScores;
  online.out = online.sums + kRowTile * kLanes;
  online.q = online.out + kRowTile * a.width;
  // q carries the sign of the scale, so that the largest score has the largest weight; it is zero where that is.
  const float sign = static_cast<float>((a.scale > 0) - (a.scale < 0)), scale = a.scale == 0 ? 1.0f : a.scale * sign;
  online.factor = static_cast<float>(scale * kLog2e);
  for (int64_t i = 0; i < count; ++i) {
    read_row(a.q, offset_of(a.q, head, first + i), a.dim, a.dim, sign, online.q + i * a.dim);
    online.peaks[i] = -kInfinity;
  }
  for (int64_t i = 0; i < count * kLanes; ++i) online.sums[i] = 0;
  for (int64_t i = 0; i < count * a.width; ++i) online.out[i] = 0;

  const int64_t key_head = head / a.group;  // heads of a batch entry are a multiple of the group
  for_pieces(a.sequence, stream, tile, [&](const Piece& piece) {
    const Range rows = {piece.rows.begin - tile.begin, piece.rows.end - tile.begin};
    Run runs[4];
    int held = 0;
    int64_t used = 0;
    const auto flush = [&] {
      if (held > 0) meet(a, online, key_head, rows, runs, held);
      held = 0;
      used = 0;
    };
    for (int r = 0; r < piece.count; ++r)
      for (int64_t begin = piece.keys[r].begin, end = piece.keys[r].end; begin < end;) {
        const int64_t lead = begin % kLanes;
        int64_t stop = at_most(end, begin - lead + kScores - used);
        // A cut falls between panels where it can.
        if (stop < end && stop / kPanel * kPanel > begin) stop = stop / kPanel * kPanel;
        if (stop > begin) {
          runs[held++] = {begin, stop, used};
          used += ceil_div(lead + stop - begin, kLanes) * kLanes;
          begin = stop;
        }
        if (begin < end) flush();
      }
    flush();
  });

  for (int64_t i = 0; i < count; ++i) {
    const float sum = total(load(online.sums + i * kLanes));
    float* const out = online.out + i * a.width;
    for (int64_t d = 0; d < a.width; d += kLanes) store(out + d, load(out + d) / splat(sum));
    write_row(a.out, offset_of(a.out, head, first + i), a.dim, out);
    a.lse[head * a.rows + first + i] = static_cast<float>(static_cast<double>(online.peaks[i]) * scale + log(static_cast<double>(sum)));
  }
}

// ---- backward

void pack_rows(const Attention& a, int64_t head, int64_t stream, int64_t row_tile) {
  const Range tile = tile_rows(a, row_tile);
  const int64_t start = row_of(a.sequence, stream);
  float* const out = a.dq_rows;
  for (int64_t row = start + tile.begin; row < start + tile.end; ++row) {
    const int64_t index = head * a.rows + row, at = index * a.width;
    read_row(a.q, offset_of(a.q, head, row), a.dim, a.width, 1.0f, a.q_rows + at);
    read_row(a.grad_out, offset_of(a.grad_out, head, row), a.dim, a.width, 1.0f, a.grad_rows + at);
    read_row(a.out, offset_of(a.out, head, row), a.dim, a.width, 1.0f, out + at);
    Vec sum = {};
    for (int64_t d = 0; d < a.width; d += kLanes) {
      sum = madd(load(out + at + d), load(a.grad_rows + at + d), sum);
      store(out + at + d, Vec{});
    }
    a.delta[index] = total(sum);
  }
}

// What a task backward holds of its keys, counted from the tile's first.
struct KeyTile {
  float *k_panels, *v_panels, *k_rows, *dk, *dv, *weights, *slopes;
};

// Scores and the products <grad_out, v> of one row to the weights and the gradients of the scores.
void slope(const Attention& a, int64_t index, int64_t n, float* weights, float* slopes) {
  const Vec scale = splat(a.scale), shift = splat(-a.lse[index]), delta = splat(a.delta[index]);
  const Vec log2e = splat(static_cast<float>(kLog2e));
  for (int64_t j = 0; j < n; j += kLanes) {
    // The difference first: it is small where the weight is large.
    const Vec weight = exp2(madd(load(weights + j), scale, shift) * log2e);
    store(weights + j, weight);
    store(slopes + j, (load(slopes + j) - delta) * (weight * scale));
  }
}

// Rows of one tile meet the keys of another, where they see them. Tiles of keys add to dq in turn.
void meet_backward(const Attention& a, const KeyTile& held, int64_t head, int64_t stream, int64_t row_tile, Range keys,
                   int64_t turn, int64_t turns) {
  const Range tile = tile_rows(a, row_tile);
  const int64_t first = head * a.rows + row_of(a.sequence, stream);  // of the stream, in all rows
  int32_t* const done = a.turns + (head * (a.sequence.copies + 1) + stream) * ceil_div(a.sequence.tokens, kRowTile) +
                        row_tile;
  bool mine = false;
  const auto wait = [&] {
    for (int spins = 0; !mine && __atomic_load_n(done, __ATOMIC_ACQUIRE) != turn; ++spins)
      if (spins >= 1000) sched_yield();
    mine = true;
  };
  for_pieces(a.sequence, stream, tile, [&](const Piece& piece) {
    const int64_t m = piece.rows.end - piece.rows.begin, in_tile = piece.rows.begin - tile.begin;
    const int64_t row = first + piece.rows.begin;
    const float *q = a.q_rows + row * a.width, *grad = a.grad_rows + row * a.width;
    for (int r = 0; r < piece.count; ++r) {
      const int64_t begin = at_least(piece.keys[r].begin, keys.begin) - keys.begin;
      const int64_t end = at_most(piece.keys[r].end, keys.end) - keys.begin;
      if (begin >= end) continue;
      const int64_t lead = begin % kLanes, n = end - begin, vectors = a.width / kLanes;
      float* const weights = held.weights + in_tile * kKeyTile + begin - lead;
      float* const slopes = held.slopes + in_tile * kKeyTile + begin - lead;
      scores(a, m, q, a.width, held.k_panels, begin, end, weights, kKeyTile);
      scores(a, m, grad, a.width, held.v_panels, begin, end, slopes, kKeyTile);
      for (int64_t i = 0; i < m; ++i) slope(a, row + i, lead + n, weights + i * kKeyTile, slopes + i * kKeyTile);
      gemm<Order::columns>(n, vectors, m, weights + lead, kKeyTile, grad, a.width, held.dv + begin * a.width, a.width,
                           true);
      gemm<Order::columns>(n, vectors, m, slopes + lead, kKeyTile, q, a.width, held.dk + begin * a.width, a.width,
                           true);
      wait();
      for (int64_t j = 0; j < n; j += kDepth)
        gemm<Order::rows>(m, vectors, at_most(kDepth, n - j), slopes + lead + j, kKeyTile,
                          held.k_rows + (begin + j) * a.width, a.width, a.dq_rows + row * a.width, a.width, true);
    }
  });
  wait();
  if (turn == turns - 1)
    for (int64_t row = first + tile.begin; row < first + tile.end; ++row)
      write_row(a.dq, offset_of(a.dq, head, row - head * a.rows), a.dim, a.dq_rows + row * a.width);
  __atomic_store_n(done, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
}

void attend_backward(const Attention& a, int64_t key_head, int64_t stream, int64_t key_tile, float* scratch) {
  const Sequence& s = a.sequence;
  const int64_t start = key_of(s, stream);
  const Range keys = {start + key_tile * kKeyTile, start + at_most((key_tile + 1) * kKeyTile, s.tokens)};
  const int64_t count = keys.end - keys.begin;
  KeyTile held;
  held.weights = scratch;
  held.slopes = held.weights + kRowTile * kKeyTile;
  held.k_panels = held.slopes + kRowTile * kKeyTile;
  held.v_panels = held.k_panels + kKeyTile * a.dim;
  held.k_rows = held.v_panels + kKeyTile * a.dim;
  held.dk = held.k_rows + kKeyTile * a.width;
  held.dv = held.dk + kKeyTile * a.width;
  for (int64_t j = 0; j < count; j += kPanel) {
    pack_panel(a, a.k, key_head, keys.begin + j, at_most(kPanel, count - j), held.k_panels + j * a.dim);
    pack_panel(a, a.v, key_head, keys.begin + j, at_most(kPanel, count - j), held.v_panels + j * a.dim);
  }
  for (int64_t j = 0; j < count; ++j)
    read_row(a.k, offset_of(a.k, key_head, keys.begin + j), a.dim, a.width, 1.0f, held.k_rows + j * a.width);
  for (int64_t i = 0; i < 2 * kKeyTile * a.width; ++i) held.dk[i] = 0;

  const int64_t from = stream == 0 ? (s.noisy_rows_only ? 1 : 0) : stream, to = stream == 0 ? s.copies : stream;
  for (int64_t g = 0; g < a.group; ++g)
    for (int64_t rows = from; rows <= to; ++rows)
      for (int64_t tile = ceil_div(s.tokens, kRowTile) - 1; tile >= 0; --tile) {
        const Tiles tiles = tiles_of(s, rows, tile_rows(a, tile), kKeyTile);
        const int64_t turn = turn_of(tiles, stream == 0, key_tile);
        if (turn >= 0) meet_backward(a, held, key_head * a.group + g, rows, tile, keys, turn, count_of(tiles));
      }
  for (int64_t j = 0; j < count; ++j) {
    write_row(a.dk, offset_of(a.dk, key_head, keys.begin + j), a.dim, held.dk + j * a.width);
    write_row(a.dv, offset_of(a.dv, key_head, keys.begin + j), a.dim, held.dv + j * a.width);
  }
}

int64_t forward_scratch(const Attention& a) { return kRowTile * (kScores + kLanes + a.width + a.dim); }
int64_t backward_scratch(const Attention& a) { return kKeyTile * (2 * kRowTile + 2 * a.dim + 3 * a.width); }

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {kLanes, kPanel, forward_scratch, backward_scratch,
                                            pack_keys, attend, pack_rows, attend_backward};

}  // namespace SAE_ISA
}  // namespace sae
