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

// Rows [first, first + count) of a head, times `scale`, each padded with zeros to `width` numbers.
void read_rows(const Rows& x, int64_t head, int64_t first, int64_t count, int64_t n, int64_t width, float scale,
               float* __restrict to) {
  const int64_t at = offset_of(x, head, first), whole = x.type == Type::f32 ? n / kLanes * kLanes : 0;
  for (int64_t i = 0; i < count; ++i, to += width) {
    if (x.type == Type::f32) {
      const float* from = static_cast<const float*>(x.data) + at + i * x.row_stride;
      for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(from + d) * splat(scale));
      for (int64_t d = whole; d < n; ++d) to[d] = from[d] * scale;
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + at + i * x.row_stride;
      if (x.type == Type::bf16) for (int64_t d = 0; d < n; ++d) to[d] = widen_bf16(from[d]) * scale;
      else for (int64_t d = 0; d < n; ++d) to[d] = widen_f16(from[d]) * scale;
    }
    for (int64_t d = n; d < width; ++d) to[d] = 0;
  }
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
// `rows` is room for kLanes rows.
void pack_panel(const Attention& a, const Rows& x, int64_t head, int64_t first, int64_t count, float* __restrict rows,
                float* __restrict to) {
  for (int64_t j = 0; j < kPanel; j += kLanes, to += kLanes) {
    const int64_t held = at_least(0, at_most(kLanes, count - j));
    read_rows(x, head, first + j, held, a.dim, a.width, 1.0f, rows);
    for (int64_t i = held * a.width; i < kLanes * a.width; ++i) rows[i] = 0;
    int64_t d = 0;
    for (; d + 4 <= a.dim; d += 4) store_columns(rows + d, a.width, to + d * kPanel, kPanel);
    for (; d < a.dim; ++d)
      for (int64_t i = 0; i < kLanes; ++i) to[d * kPanel + i] = rows[i * a.width + d];
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

void pack_keys(const Attention& a, int64_t key_head, int64_t part, float* scratch) {
  const int64_t first = part * kPackKeys, last = at_most(first + kPackKeys, a.keys);
  float* panels = a.panels + (key_head * ceil_div(a.keys, kPanel) * kPanel + first) * a.dim;
  for (int64_t j = first; j < last; j += kPanel, panels += kPanel * a.dim)
    pack_panel(a, a.k, key_head, j, last - j, scratch, panels);
  read_rows(a.v, key_head, first, last - first, a.dim, a.width, 1.0f, a.values + (key_head * a.keys + first) * a.width);
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
  read_rows(a.q, head, first, count, a.dim, a.dim, sign, online.q);
  for (int64_t i = 0; i < count; ++i) online.peaks[i] = -kInfinity;
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
    for (int64_t d = 0; d < a.width; d += kLanes) store(out + d, load(out + d) * splat(1.0f / sum));
    write_row(a.out, offset_of(a.out, head, first + i), a.dim, out);
    a.lse[head * a.rows + first + i] = static_cast<float>(static_cast<double>(online.peaks[i]) * scale + log(static_cast<double>(sum)));
  }
}

// ---- backward

// What a task backward holds: its keys, counted from the tile's first, and the rows that meet them.
struct Held {
  float *k_panels, *v_panels, *k, *dk, *dv;          // (keys, width)
  float *weights, *slopes, *q, *grad, *lse, *delta;  // (rows, kKeyTile) twice, (rows, width) twice, (rows) twice
};

// Scores and the products <grad_out, v> of one row to the weights and the gradients of the scores.
void slope(const Attention& a, float lse, float delta, int64_t n, float* weights, float* slopes) {
  const Vec scale = splat(a.scale), log2e = splat(static_cast<float>(kLog2e));
  for (int64_t j = 0; j < n; j += kLanes) {
    // The difference first: it is small where the weight is large.
    const Vec weight = exp2(madd(load(weights + j), scale, splat(-lse)) * log2e);
    store(weights + j, weight);
    store(slopes + j, (load(slopes + j) - splat(delta)) * (weight * scale));
  }
}

void hold_rows(const Attention& a, const Held& held, int64_t head, int64_t first, int64_t count) {
  read_rows(a.out, head, first, count, a.dim, a.width, 1.0f, held.q);
  read_rows(a.grad_out, head, first, count, a.dim, a.width, 1.0f, held.grad);
  for (int64_t i = 0; i < count; ++i) {
    const float *out = held.q + i * a.width, *grad = held.grad + i * a.width;
    Vec sum = {};
    for (int64_t d = 0; d < a.width; d += kLanes) sum = madd(load(out + d), load(grad + d), sum);
    held.delta[i] = total(sum);
    held.lse[i] = a.lse[head * a.rows + first + i];
  }
  read_rows(a.q, head, first, count, a.dim, a.width, 1.0f, held.q);
}

// Rows of one tile meet the keys of another, where they see them. Tiles of keys add to dq in turn.
void meet_backward(const Attention& a, const Held& held, int64_t head, int64_t stream, int64_t row_tile, Range keys,
                   int64_t turn, int64_t turns) {
  const Range tile = tile_rows(a, row_tile);
  const int64_t first = row_of(a.sequence, stream) + tile.begin, count = tile.end - tile.begin;
  const int64_t vectors = a.width / kLanes;
  hold_rows(a, held, head, first, count);
  float* const dq = a.dq_rows ? a.dq_rows + (head * a.rows + first) * a.width
                              : static_cast<float*>(a.dq.data) + offset_of(a.dq, head, first);
  const int64_t dq_row = a.dq_rows ? a.width : a.dq.row_stride;

  const int64_t row_tiles = ceil_div(a.sequence.tokens, kRowTile);
  int32_t* const done = a.turns + (head * (a.sequence.copies + 1) + stream) * row_tiles + row_tile;
  bool mine = false;
  const auto wait = [&] {
    if (mine) return;
    for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != turn; ++spins)
      if (spins >= 1000) sched_yield();
    mine = true;
    for (int64_t i = 0; turn == 0 && i < count; ++i)
      for (int64_t d = 0; d < a.width; d += kLanes) store(dq + i * dq_row + d, Vec{});
  };
  for_pieces(a.sequence, stream, tile, [&](const Piece& piece) {
    const int64_t m = piece.rows.end - piece.rows.begin, row = piece.rows.begin - tile.begin;
    const float *q = held.q + row * a.width, *grad = held.grad + row * a.width;
    for (int r = 0; r < piece.count; ++r) {
      const int64_t begin = at_least(piece.keys[r].begin, keys.begin) - keys.begin;
      const int64_t end = at_most(piece.keys[r].end, keys.end) - keys.begin;
      if (begin >= end) continue;
      const int64_t lead = begin % kLanes, n = end - begin;
      float* const weights = held.weights + row * kKeyTile + begin - lead;
      float* const slopes = held.slopes + row * kKeyTile + begin - lead;
      scores(a, m, q, a.width, held.k_panels, begin, end, weights, kKeyTile);
      scores(a, m, grad, a.width, held.v_panels, begin, end, slopes, kKeyTile);
      for (int64_t i = 0; i < m; ++i)
        slope(a, held.lse[row + i], held.delta[row + i], lead + n, weights + i * kKeyTile, slopes + i * kKeyTile);
      gemm<Order::columns>(n, vectors, m, weights + lead, kKeyTile, grad, a.width, held.dv + begin * a.width, a.width,
                           true);
      gemm<Order::columns>(n, vectors, m, slopes + lead, kKeyTile, q, a.width, held.dk + begin * a.width, a.width,
                           true);
      wait();
      for (int64_t j = 0; j < n; j += kDepth)
        gemm<Order::rows>(m, vectors, at_most(kDepth, n - j), slopes + lead + j, kKeyTile,
                          held.k + (begin + j) * a.width, a.width, dq + row * dq_row, dq_row, true);
    }
  });
  wait();
  if (a.dq_rows && turn == turns - 1)
    for (int64_t i = 0; i < count; ++i) write_row(a.dq, offset_of(a.dq, head, first + i), a.dim, dq + i * dq_row);
  __atomic_store_n(done, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
}

void attend_backward(const Attention& a, int64_t key_head, int64_t stream, int64_t key_tile, float* scratch) {
  const Sequence& s = a.sequence;
  const int64_t start = key_of(s, stream);
  const Range keys = {start + key_tile * kKeyTile, start + at_most((key_tile + 1) * kKeyTile, s.tokens)};
  const int64_t count = keys.end - keys.begin;
  Held held;
  const auto take = [&](int64_t size) {
    float* const part = scratch;
    scratch += size;
    return part;
  };
  held.k_panels = take(kKeyTile * a.width);
  held.v_panels = take(kKeyTile * a.width);
  held.k = take(kKeyTile * a.width);
  held.dk = take(kKeyTile * a.width);
  held.dv = take(kKeyTile * a.width);
  held.weights = take(kRowTile * kKeyTile);
  held.slopes = take(kRowTile * kKeyTile);
  held.q = take(kRowTile * a.width);
  held.grad = take(kRowTile * a.width);
  held.lse = take(kRowTile);
  held.delta = take(kRowTile);
  for (int64_t j = 0; j < count; j += kPanel) {
    pack_panel(a, a.k, key_head, keys.begin + j, count - j, held.dk, held.k_panels + j * a.dim);
    pack_panel(a, a.v, key_head, keys.begin + j, count - j, held.dk, held.v_panels + j * a.dim);
  }
  read_rows(a.k, key_head, keys.begin, count, a.dim, a.width, 1.0f, held.k);
  for (int64_t i = 0; i < count * a.width; ++i) held.dk[i] = held.dv[i] = 0;

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
int64_t backward_scratch(const Attention& a) {
  return kKeyTile * (5 * a.width + 2 * kRowTile) + kRowTile * (2 * a.width + 2);
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {kLanes, kPanel, forward_scratch, backward_scratch,
                                            pack_keys, attend, attend_backward};

}  // namespace SAE_ISA
}  // namespace sae
