// Converts rows of numbers to integers, and reads blocks of codes. Used by `integer_products.cpp` and `tiles.h`.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t kRows = 16;          // rows of a block: one for each 32-bit lane
constexpr int64_t kLine = 64;          // bytes of a vector
constexpr int64_t kBlocksPerTask = 4;  // blocks that a thread takes at a time
constexpr int64_t kMaxBytes = 1 << 20; // the most bytes of planes of x at a time, so that they stay in a core's cache
constexpr int64_t kTileRows = 16;
constexpr int64_t kMaxGroup = 128;     // the most columns of 4 bits that share a scale
constexpr int64_t kChunkRows = 64;     // rows of x whose sums stay in the L1 cache
constexpr int64_t kChunkColumns = 512; // columns whose codes stay in the L1 cache
constexpr int64_t kAhead = 4096;       // bytes to prefetch ahead
constexpr int64_t kFewRows = 4;        // rows of x that vectors multiply at a time

constexpr int kNotFinite = 0x99;       // argument of `fpclass`: NaN and infinities

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Shape {  // of a matrix in blocks
  int64_t k;           // columns, padded to whole groups
  int64_t group;       // columns that share a scale; with 8 bits, all
  int64_t n_groups;
  int64_t block_bytes;
};

Shape shape_of(int bits, int64_t in_features, int64_t group) {
  Shape s;
  if (bits == 8) {
    s.k = (in_features + 63) / 64 * 64;
    s.group = s.k;
    s.n_groups = 1;
    s.block_bytes = kLine + s.k * kRows;
  } else {
    s.group = group;
    s.n_groups = (in_features + group - 1) / group;
    s.k = s.n_groups * group;
    s.block_bytes = s.n_groups * (kLine + group * kRows / 2);
  }
  return s;
}

inline __m512 bf16_to_float(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __m256i float_to_bf16(__m512 v) {  // to the nearest, ties to even; NaN does not occur
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
}

inline __m512 load(const void* p, int64_t i, int type, __mmask16 mask) {
  if (type == kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return type == kBFloat16 ? bf16_to_float(v) : _mm512_cvtph_ps(v);
}

inline void store(void* p, int64_t i, int type, __mmask16 mask, __m512 v) {
  if (type == kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
  } else {
    __m256i half = type == kBFloat16 ? float_to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, half);
  }
}

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1 << n) - 1); }

// ---- rows of x as integers

struct Rows {  // rows of x as integers
  int n_planes;
  int64_t n, tile_rows, k, step, n_groups;
  int8_t* planes;  // [row / tile_rows][k / step][plane][row % tile_rows][k % step]
  float* scales;   // [row]
  int32_t* sums;   // [row][group][plane]: sum of the bytes
  float* totals;   // [row][group]: sum of the integers
  int8_t* at(int64_t row, int p, int64_t column) const {
    const int64_t tile = (row / tile_rows * (k / step) + column / step) * n_planes + p;
    return planes + (tile * tile_rows + row % tile_rows) * step + column % step;
  }
};

void make_integers(const Rows& rows, int64_t row, const void* x, int64_t in_features, int type, int64_t group) {
  const int n_planes = rows.n_planes;
  const float limit = n_planes == 2 ? 32512.f : 8323072.f;  // keeps each byte from -128 to 127
  const int64_t from = row * in_features;
  __m512 largest = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int64_t k = 0; k < in_features; k += 16) {
    const __m512 v = load(x, from + k, type, first(in_features - k));
    bad |= _mm512_fpclass_ps_mask(v, kNotFinite);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
  }
  const float scale = bad ? NAN : std::max(_mm512_reduce_max_ps(largest) / limit, 1e-30f);  // NaN makes the row NaN
  rows.scales[row] = scale;
  for (int64_t g = 0; g < rows.n_groups; g++) {
    __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    int8_t* at_step = nullptr;
    for (int64_t k = g * group; k < std::min((g + 1) * group, rows.k); k += 16) {
      if ((k & (rows.step - 1)) == 0) at_step = rows.at(row, 0, k);
      __m512 v = _mm512_div_ps(load(x, from + k, type, first(in_features - k)), _mm512_set1_ps(scale));
      __m512i rest = _mm512_cvtps_epi32(v);
      for (int p = n_planes - 1; p >= 0; p--) {
        __m512i digit = p == 0 ? rest : _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
        int8_t* to = at_step + p * rows.tile_rows * rows.step + (k & (rows.step - 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(digit));
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
        sums[p] = _mm512_add_epi32(sums[p], digit);
      }
    }
    const int64_t at = row * rows.n_groups + g;
    float total = 0;
    for (int p = 0; p < n_planes; p++) {
      rows.sums[at * n_planes + p] = _mm512_reduce_add_epi32(sums[p]);
      total = total * 256 + rows.sums[at * n_planes + p];
    }
    rows.totals[at] = total;
  }
}

// ---- from sums of integers to floats: the same for vectors and tiles

struct Scales {  // of a group
  __m512 scale, zero;
};

template <int BITS>
inline Scales scales_of(const uint8_t* header) {
  if (BITS == 8) return {_mm512_loadu_ps(header), _mm512_setzero_ps()};
  __m512i both = _mm512_loadu_si512(header);
  __m512i upper = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {_mm512_castsi512_ps(upper), _mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
}

// Combines the sums of the planes. With 4 bits and two planes, the result fits into an integer.
template <int BITS, int P>
inline __m512 joined(const __m512i* planes) {
  __m512 y;
  if (BITS == 4)
    y = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(planes[0], 8), planes[1]));
  else
    y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(planes[0]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(planes[1]));
  return P == 2 ? y : _mm512_fmadd_ps(y, _mm512_set1_ps(256), _mm512_cvtepi32_ps(planes[2]));
}

template <int BITS>
inline __m512 add_group(__m512 acc, __m512 product, const Scales& s, float total) {
  if (BITS == 8) return _mm512_mul_ps(product, s.scale);
  acc = _mm512_fmadd_ps(product, s.scale, acc);
  return _mm512_fmadd_ps(_mm512_set1_ps(total), s.zero, acc);
}

// Returns where the codes of a group begin. Its scales come before them.
template <int BITS>
inline const uint8_t* codes_of(const uint8_t* block, const Shape& s, int64_t g) {
  return BITS == 8 ? block + kLine + g * s.group * kRows : block + g * (kLine + s.group * kRows / 2) + kLine;
}

}  // namespace
