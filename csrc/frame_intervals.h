// Which keys a row of frame_attention sees: at most four contiguous intervals, by integer arithmetic on the layout.
//
// Everything is static: the code of each instruction set keeps its own copy.
#pragma once

#include <cstdint>

namespace sae {

// One sequence: a clean stream and `copies` noisy ones of `tokens` tokens each, in blocks of `block` tokens.
struct Sequence {
  int64_t tokens, block, copies;
  int64_t clean, noisy;  // tokens before the clean stream, and before the first noisy one
  int64_t window, sink;  // blocks; window < 0: none
  bool noisy_rows_only;  // rows are those of the noisy streams
};

// Streams are numbered clean, noisy 1..K. The first key of a stream, and its first row:
static inline int64_t key_of(const Sequence& s, int64_t stream) {
  return stream == 0 ? s.clean : s.noisy + (stream - 1) * s.tokens;
}
static inline int64_t row_of(const Sequence& s, int64_t stream) {
  return s.noisy_rows_only ? (stream - 1) * s.tokens : key_of(s, stream);
}

struct Range {
  int64_t begin, end;
};

static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [rows.begin, rows.end) of a stream, all of which see exactly the keys of these ranges (tokens of the sequence).
struct Piece {
  Range rows;
  int count;
  Range keys[4];
};

static inline void add_keys(Piece& piece, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (piece.count > 0 && piece.keys[piece.count - 1].end == begin) piece.keys[piece.count - 1].end = end;
  else piece.keys[piece.count++] = {begin, end};
}

// The clean blocks that block i sees: [0, sink) and [recent, end).
struct Past {
  int64_t sink, recent, end;
};

static inline Past past_of(const Sequence& s, bool noisy, int64_t i) {
  const int64_t end = noisy ? i : i + 1;
  if (s.window < 0) return {0, 0, end};
  const int64_t sink = at_most(s.sink, i);
  return {sink, at_least(sink, i - s.window), end};
}

// Calls visit(piece) for pieces that together hold each visible (row, key) of rows [rows.begin, rows.end) of a stream
// once: first what all these rows see, then, block by block, the rest. The order is that of the sums.
template <class Visit>
static inline void for_pieces(const Sequence& s, int64_t stream, Range rows, Visit&& visit) {
  const bool noisy = stream > 0;
  const int64_t first = rows.begin / s.block, last = (rows.end - 1) / s.block;
  const auto clean = [&](Piece& piece, int64_t begin, int64_t end) {
    add_keys(piece, s.clean + at_most(begin * s.block, s.tokens), s.clean + at_most(end * s.block, s.tokens));
  };
  // Where the sink grows from row to row nothing recent is common: the two never overlap.
  Past common = {past_of(s, noisy, first).sink, past_of(s, noisy, last).recent, past_of(s, noisy, first).end};
  if (first == last) common = {0, 0, 0};
  Piece all = {rows, 0, {}};
  clean(all, 0, common.sink);
  clean(all, common.recent, common.end);
  if (all.count > 0) visit(all);
  for (int64_t i = first; i <= last; ++i) {
    const Past past = past_of(s, noisy, i);
    Piece piece = {{at_least(rows.begin, i * s.block), at_most(rows.end, (i + 1) * s.block)}, 0, {}};
    clean(piece, common.sink, past.sink);
    if (common.recent < common.end) {
      clean(piece, past.recent, common.recent);
      clean(piece, common.end, past.end);
    } else {
      clean(piece, past.recent, past.end);
    }
    const int64_t own = key_of(s, stream);
    if (noisy) add_keys(piece, own + i * s.block, own + at_most((i + 1) * s.block, s.tokens));
    if (piece.count > 0) visit(piece);
  }
}

// The tiles of `size` keys, numbered along a stream, that hold all that some rows see: [0, sink) and [recent, end) of
// the clean stream, [own.begin, own.end) of their own, where that is noisy.
struct Tiles {
  int64_t sink, recent, end;
  Range own;
};

static inline int64_t count_of(const Tiles& t) { return t.sink + (t.end - t.recent) + (t.own.end - t.own.begin); }

// How many of them come before this tile of the clean or the own stream; -1 if it is none of them.
static inline int64_t turn_of(const Tiles& t, bool clean, int64_t tile) {
  if (clean && tile < t.sink) return tile;
  if (clean) return tile >= t.recent && tile < t.end ? t.sink + tile - t.recent : -1;
  return tile >= t.own.begin && tile < t.own.end ? t.sink + (t.end - t.recent) + tile - t.own.begin : -1;
}

static inline Tiles tiles_of(const Sequence& s, int64_t stream, Range rows, int64_t size) {
  const bool noisy = stream > 0;
  const int64_t first = rows.begin / s.block, last = (rows.end - 1) / s.block;
  const Past from = past_of(s, noisy, first), to = past_of(s, noisy, last);
  Tiles tiles;
  tiles.sink = ceil_div(at_most(to.sink * s.block, s.tokens), size);
  tiles.end = at_least(tiles.sink, ceil_div(at_most(to.end * s.block, s.tokens), size));
  tiles.recent = at_most(tiles.end, at_least(tiles.sink, from.recent * s.block / size));
  tiles.own = {0, 0};
  if (noisy) tiles.own = {first * s.block / size, ceil_div(at_most((last + 1) * s.block, s.tokens), size)};
  return tiles;
}

}  // namespace sae
