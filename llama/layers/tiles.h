// Products with AMX. Its tiles multiply 16 rows of x by 16 rows of codes, 64 columns at a time.

#pragma once

#include "amx.h"
#include "integers.h"

#ifdef __AMX_INT8__

namespace {

// For many rows of x: tile 2 * plane + block has the sums of one of two blocks. With two planes, the next tiles have the
// integers of each plane and the codes of each block. With three planes, there is one tile for integers and one for codes.
template <int P>
void configure_tiles(int64_t n_rows, int64_t step) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    const bool integers = t >= 2 * P && t < (P == 2 ? 6 : 7), codes = t >= 2 * P && !integers;
    config.bytes[t] = integers ? step : kLine;
    config.rows[t] = codes ? step / 4 : n_rows;
  }
  touch(&config);
  _tile_loadconfig(&config);
}

template <int P>
inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (P == 3) {
    _tile_zero(4);
    _tile_zero(5);
  }
}

// Loads sums [plane][block][16 rows of x][16].
template <int P>
inline void load_tiles(const int32_t (*sums)[2][kTileRows][kRows]) {
  _tile_loadd(0, sums[0][0], kLine);
  _tile_loadd(1, sums[0][1], kLine);
  _tile_loadd(2, sums[1][0], kLine);
  _tile_loadd(3, sums[1][1], kLine);
  if (P == 3) {
    _tile_loadd(4, sums[P - 1][0], kLine);
    _tile_loadd(5, sums[P - 1][1], kLine);
  }
}

template <int P>
inline void store_tiles(int32_t (*sums)[2][kTileRows][kRows]) {
  _tile_stored(0, sums[0][0], kLine);
  _tile_stored(1, sums[0][1], kLine);
  _tile_stored(2, sums[1][0], kLine);
  _tile_stored(3, sums[1][1], kLine);
  if (P == 3) {
    _tile_stored(4, sums[P - 1][0], kLine);
    _tile_stored(5, sums[P - 1][1], kLine);
  }
  touch(sums);
}

// Adds the products of `size` columns of 16 rows of x and of two blocks.
template <int P>
inline void add_products(const Rows& x, int64_t row, int64_t column, int64_t size, const uint8_t* const* codes) {
  touch(codes[0]);
  const int8_t* integers = x.at(row, 0, column);  // [step][plane]
  const int64_t plane = x.tile_rows * x.step;
  for (int64_t k = 0; k < size; k += x.step, integers += P * plane) {
    if (P == 2) {
      _tile_loadd(4, integers, x.step);
      _tile_loadd(6, codes[0] + k * kRows, kLine);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, codes[1] + k * kRows, kLine);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(5, integers + plane, x.step);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_loadd(7, codes[0] + k * kRows, kLine);
      _tile_loadd(6, integers, x.step);
      _tile_dpbssd(0, 6, 7);
      _tile_loadd(6, integers + plane, x.step);
      _tile_dpbssd(2, 6, 7);
      _tile_loadd(6, integers + 2 * plane, x.step);
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, codes[1] + k * kRows, kLine);
      _tile_dpbssd(5, 6, 7);
      _tile_loadd(6, integers + plane, x.step);
      _tile_dpbssd(3, 6, 7);
      _tile_loadd(6, integers, x.step);
      _tile_dpbssd(1, 6, 7);
    }
  }
}

// Writes 4-bit codes of a group as bytes, [k / 4][16 rows][4], as tiles need them and 8-bit codes are stored.
template <bool SIGNED>
inline void spread(const uint8_t* codes, int64_t size, uint8_t* out) {
  const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(SIGNED ? 8 : 0);
  for (int64_t k = 0; k < size; k += 8) {
    __m512i both = _mm512_loadu_si512(codes + k * kRows / 2);
    _mm_prefetch(codes + k * kRows / 2 + kAhead, _MM_HINT_T0);
    __m512i a = _mm512_and_si512(both, nibble), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(out + k * kRows, SIGNED ? _mm512_sub_epi8(a, offset) : a);
    _mm512_store_si512(out + k * kRows + kLine, SIGNED ? _mm512_sub_epi8(b, offset) : b);
  }
  touch(out);
}

// For few rows of x, whose planes fit one tile: tiles 0 to 3 have the sums of four blocks, 4 the integers, 5 to 7 codes.
void configure_one_tile(int64_t n_integers, int64_t step) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    config.bytes[t] = t == 4 ? step : kLine;
    config.rows[t] = t < 5 ? n_integers : step / 4;
  }
  touch(&config);
  _tile_loadconfig(&config);
}

// Multiplies four blocks by few rows of x into `out` [block][row]. 8-bit codes are loaded from memory straight into
// tiles, 4-bit codes are spread in the L1 cache first. Four blocks are four streams, which use more of the memory's speed
// than one.
template <int BITS, int P>
void few_rows_by_tiles(const uint8_t* const* blocks, const Shape& s, const Rows& x, __m512 (*out)[kTileRows]) {
  alignas(64) int32_t products[kBlocksPerTask][kTileRows][kRows];
  alignas(64) uint8_t bytes[kBlocksPerTask][BITS == 4 ? kMaxGroup * kRows : 1];
  for (int64_t g = 0; g < s.n_groups; g++) {
    const int64_t start = g * s.group;
    const uint8_t *codes[kBlocksPerTask], *at[kBlocksPerTask];
    for (int b = 0; b < kBlocksPerTask; b++) {
      codes[b] = codes_of<BITS>(blocks[b], s, g);
      if (BITS == 4) spread<false>(codes[b], s.group, bytes[b]);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < s.group; k += x.step) {
      for (int b = 0; b < kBlocksPerTask; b++) {
        at[b] = (BITS == 4 ? bytes[b] : codes[b]) + k * kRows;
        for (int64_t byte = 0; BITS == 8 && byte < x.step * kRows; byte += kLine)
          _mm_prefetch(at[b] + kAhead + byte, _MM_HINT_T0);
      }
      _tile_loadd(4, x.at(0, 0, start + k), x.step);
      _tile_loadd(5, at[0], kLine);
      _tile_loadd(6, at[1], kLine);
      _tile_loadd(7, at[2], kLine);
      if (BITS == 8) {
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(5, at[3], kLine);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 4, 5);
      } else {
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(5, at[3], kLine);
        _tile_dpbsud(1, 4, 6);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 4, 5);
      }
    }
    _tile_stored(0, products[0], kLine);
    _tile_stored(1, products[1], kLine);
    _tile_stored(2, products[2], kLine);
    _tile_stored(3, products[3], kLine);
    touch(products);
    for (int b = 0; b < kBlocksPerTask; b++) {
      const Scales scales = scales_of<BITS>(BITS == 8 ? blocks[b] : codes[b] - kLine);
      for (int64_t row = 0; row < x.n; row++) {
        const int64_t at_group = row * s.n_groups + g;
        __m512i sum[P];
        for (int p = 0; p < P; p++) {
          sum[p] = _mm512_load_si512(products[b][p * x.n + row]);
          if (BITS == 4) sum[p] = _mm512_sub_epi32(sum[p], _mm512_set1_epi32(8 * x.sums[at_group * P + p]));
        }
        const __m512 before = g == 0 ? _mm512_setzero_ps() : out[b][row];
        out[b][row] = add_group<BITS>(before, joined<BITS, P>(sum), scales, x.totals[at_group]);
      }
    }
  }
  for (int b = 0; b < kBlocksPerTask; b++)
    for (int64_t row = 0; row < x.n; row++)
      out[b][row] = _mm512_mul_ps(out[b][row], _mm512_set1_ps(x.scales[row]));
}

// Multiplies four blocks by all rows of x into sums [row][block][16]. `scratch` is memory for the codes as bytes.
template <int P>
void many_rows_of_4_bits(const uint8_t* const* blocks, const Shape& s, const Rows& x, float* sums, uint8_t* scratch) {
  alignas(64) int32_t products[P][2][kTileRows][kRows];
  for (int64_t from = 0; from < x.n; from += kChunkRows)
    for (int64_t g = 0; g < s.n_groups; g++) {
      const uint8_t* codes[kBlocksPerTask];
      Scales scales[kBlocksPerTask];
      for (int64_t b = 0; b < kBlocksPerTask; b++) {
        uint8_t* bytes = scratch + (kBlocksPerTask * g + b) * s.group * kRows;
        const uint8_t* stored = codes_of<4>(blocks[b], s, g);
        if (from == 0) spread<true>(stored, s.group, bytes);
        scales[b] = scales_of<4>(stored - kLine);
        codes[b] = bytes;
      }
      for (int64_t row = from; row < std::min(from + kChunkRows, x.n); row += kTileRows)
        for (int64_t pair = 0; pair < kBlocksPerTask; pair += 2) {
          zero_tiles<P>();
          add_products<P>(x, row, g * s.group, s.group, codes + pair);
          store_tiles<P>(products);
          for (int64_t r = 0; r < std::min(kTileRows, x.n - row); r++) {
            const float total = x.totals[(row + r) * s.n_groups + g];
            float* sum = sums + ((row + r) * kBlocksPerTask + pair) * kRows;
            for (int64_t b = 0; b < 2; b++, sum += kRows) {
              __m512i planes[P];
              for (int p = 0; p < P; p++) planes[p] = _mm512_load_si512(products[p][b][r]);
              __m512 acc = g == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sum);
              _mm512_store_ps(sum, add_group<4>(acc, joined<4, P>(planes), scales[pair + b], total));
            }
          }
        }
    }
}

// As above. `scratch` is memory for the sums of integers.
template <int P>
void many_rows_of_8_bits(const uint8_t* const* blocks, const Shape& s, const Rows& x, float* sums, uint8_t* scratch) {
  using Products = int32_t[P][2][kTileRows][kRows];
  Products* products = reinterpret_cast<Products*>(scratch);
  for (int64_t pair = 0; pair < kBlocksPerTask; pair += 2) {
    const uint8_t* all[2] = {codes_of<8>(blocks[pair], s, 0), codes_of<8>(blocks[pair + 1], s, 0)};
    for (int64_t k = 0; k < s.k; k += kChunkColumns) {
      const uint8_t* codes[2] = {all[0] + k * kRows, all[1] + k * kRows};
      for (int64_t row = 0; row < x.n; row += kTileRows) {
        if (k == 0)
          zero_tiles<P>();
        else
          load_tiles<P>(products[row / kTileRows]);
        add_products<P>(x, row, k, std::min(kChunkColumns, s.k - k), codes);
        store_tiles<P>(products[row / kTileRows]);
      }
    }
    for (int64_t row = 0; row < x.n; row++)
      for (int64_t b = 0; b < 2; b++) {
        __m512i planes[P];
        for (int p = 0; p < P; p++)
          planes[p] = _mm512_load_si512(products[row / kTileRows][p][b][row % kTileRows]);
        __m512 y = add_group<8>(_mm512_setzero_ps(), joined<8, P>(planes), scales_of<8>(blocks[pair + b]), 0);
        _mm512_store_ps(sums + (row * kBlocksPerTask + pair + b) * kRows, y);
      }
  }
}

}  // namespace

#endif
