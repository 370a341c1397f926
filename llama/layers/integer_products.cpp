// Products with matrices of 8 or 4 bits a weight, and the rounding to them, for x86 processors with AVX-512 VNNI and
// AMX. `kernels.py` compiles this file when it is first needed and calls it with addresses; the format of the blocks
// is described in `quantization.py`. Knows nothing of PyTorch.
//
// A row of x becomes integers of 16 bits with one scale (of float32, 24 bits), as two (three) planes of signed bytes.
// Products of a plane and the codes of a group are exact sums of integers. Only then come floats, in the order of the
// groups. So a row's result is the same bits whatever other rows there are, on however many threads, with AMX or without.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t kRows = 16;          // of a block: one for each 32-bit lane
constexpr int64_t kLine = 64;          // bytes of a vector
constexpr int64_t kBlocksPerTask = 4;  // what a thread takes at a time
constexpr int64_t kMaxBytes = 1 << 20;  // of the planes of x at a time: they should stay in a core's cache
constexpr int64_t kTileRows = 16;
constexpr int64_t kChunkRows = 64;     // of x whose sums stay in the first cache
constexpr int64_t kChunkColumns = 512;  // of which the codes do
constexpr int64_t kAhead = 4096;       // bytes that are asked of the memory ahead
constexpr int64_t kFewRows = 4;        // up to so many rows of x, vectors are as fast as the memory

constexpr int kNotFinite = 0x99;       // of `fpclass`

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Shape {  // of a matrix in blocks
  int64_t k;           // columns, whole groups
  int64_t group;       // columns that share a scale: for 8 bits, all
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

struct Rows {  // of x: planes [row / tile_rows][k / step][plane][row % tile_rows][k % step], and what else it takes
  int n_planes;
  int64_t n, tile_rows, k, step, n_groups;
  int8_t* planes;
  float* scales;   // [row]
  int32_t* sums;   // [row][group][plane]
  float* totals;   // [row][group]: of the planes together
  int8_t* at(int64_t row, int p, int64_t column) const {
    const int64_t tile = (row / tile_rows * (k / step) + column / step) * n_planes + p;
    return planes + (tile * tile_rows + row % tile_rows) * step + column % step;
  }
};

void make_integers(const Rows& rows, int64_t row, const void* x, int64_t in_features, int type, int64_t group) {
  const int n_planes = rows.n_planes;
  const float limit = n_planes == 2 ? 32512.f : 8323072.f;  // every digit from -128 to 127
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

// What the planes' sums come to; for 4 bits and two planes, they fit an integer.
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

// Where a group's codes begin; what precedes them of a block is its scales.
template <int BITS>
inline const uint8_t* codes_of(const uint8_t* block, const Shape& s, int64_t g) {
  return BITS == 8 ? block + kLine + g * s.group * kRows : block + g * (kLine + s.group * kRows / 2) + kLine;
}

// ---- few rows: vectors

template <int BITS, int P, int R>
void few_rows(const uint8_t* block, const Shape& s, const Rows& x, int64_t row, __m512* out) {
  for (int r = 0; r < R; r++) out[r] = _mm512_setzero_ps();
  const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  for (int64_t g = 0; g < s.n_groups; g++) {
    const uint8_t* codes = codes_of<BITS>(block, s, g);
    const int64_t start = g * s.group, size = std::min(s.group, s.k - start);
    __m512i even[R][P], odd[R][P];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) even[r][p] = odd[r][p] = _mm512_setzero_si512();
    for (int64_t from = 0; from < size; from += x.step) {
      const int8_t* x_at[R][P];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) x_at[r][p] = x.at(row + r, p, start + from);
      for (int64_t k = 0; k < x.step; k += 8) {
        __m512i a, b;  // four columns each, without a sign
        if (BITS == 8) {
          const uint8_t* line = codes + (from + k) * kRows;
          a = _mm512_xor_si512(_mm512_loadu_si512(line), sign);
          b = _mm512_xor_si512(_mm512_loadu_si512(line + kLine), sign);
          _mm_prefetch(line + kAhead, _MM_HINT_T0);
          _mm_prefetch(line + kAhead + kLine, _MM_HINT_T0);
        } else {
          const uint8_t* line = codes + (from + k) * kRows / 2;
          __m512i both = _mm512_loadu_si512(line);
          a = _mm512_and_si512(both, nibble);
          b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          _mm_prefetch(line + kAhead, _MM_HINT_T0);
        }
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) {
            int32_t x0, x1;
            std::memcpy(&x0, x_at[r][p] + k, 4);
            std::memcpy(&x1, x_at[r][p] + k + 4, 4);
            even[r][p] = _mm512_dpbusd_epi32(even[r][p], a, _mm512_set1_epi32(x0));
            odd[r][p] = _mm512_dpbusd_epi32(odd[r][p], b, _mm512_set1_epi32(x1));
          }
      }
    }
    const Scales scales = scales_of<BITS>(BITS == 8 ? block : codes - kLine);
    for (int r = 0; r < R; r++) {
      constexpr int offset = BITS == 8 ? 128 : 8;  // that was added to the codes
      const int64_t at = (row + r) * s.n_groups + g;
      __m512i sum[P];
      for (int p = 0; p < P; p++)
        sum[p] = _mm512_sub_epi32(_mm512_add_epi32(even[r][p], odd[r][p]), _mm512_set1_epi32(offset * x.sums[at * P + p]));
      out[r] = add_group<BITS>(out[r], joined<BITS, P>(sum), scales, x.totals[at]);
    }
  }
  for (int r = 0; r < R; r++) out[r] = _mm512_mul_ps(out[r], _mm512_set1_ps(x.scales[row + r]));
}

// ---- many rows: tiles

#ifdef __AMX_INT8__

constexpr int64_t kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;  // docs.kernel.org/arch/x86/xstate

bool may_use_tiles() { return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0; }

// The intrinsics of tiles do not tell the compiler which memory they read and write.
inline void touch(void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The first tiles are the sums of two blocks, 2 * plane + block. Then, for two planes, come the integers of each and
// the codes of each block; for three, one tile of either.
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

// Sums [plane][block][16 rows of x][16].
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

// Adds the products of `size` columns of 16 rows of x with those of two blocks.
template <int P>
inline void add_products(const Rows& x, int64_t row, int64_t column, int64_t size, const uint8_t* const* codes) {
  touch(const_cast<uint8_t*>(codes[0]));
  const int8_t* integers = x.at(row, 0, column);  // of the planes one after the other, step by step
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

// The codes of a group as signed bytes, [k / 4][16 rows][4]: as tiles take them. Those of 8 bits lie so.
inline void spread(const uint8_t* codes, int64_t size, uint8_t* out) {
  const __m512i nibble = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
  for (int64_t k = 0; k < size; k += 8) {
    __m512i both = _mm512_loadu_si512(codes + k * kRows / 2);
    _mm_prefetch(codes + k * kRows / 2 + kAhead, _MM_HINT_T0);
    __m512i a = _mm512_and_si512(both, nibble), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(out + k * kRows, _mm512_sub_epi8(a, offset));
    _mm512_store_si512(out + k * kRows + kLine, _mm512_sub_epi8(b, offset));
  }
}

// Four blocks times all rows of x, into sums [row][block][16]. `room` takes the codes of the blocks as bytes.
template <int P>
void many_rows_of_4_bits(const uint8_t* const* blocks, const Shape& s, const Rows& x, float* sums, uint8_t* room) {
  alignas(64) int32_t products[P][2][kTileRows][kRows];
  for (int64_t from = 0; from < x.n; from += kChunkRows)
    for (int64_t g = 0; g < s.n_groups; g++) {
      const uint8_t* codes[kBlocksPerTask];
      Scales scales[kBlocksPerTask];
      for (int64_t b = 0; b < kBlocksPerTask; b++) {
        uint8_t* bytes = room + (kBlocksPerTask * g + b) * s.group * kRows;
        const uint8_t* stored = codes_of<4>(blocks[b], s, g);
        if (from == 0) spread(stored, s.group, bytes);
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

// As above; `room` takes the sums of integers of each 16 rows of x.
template <int P>
void many_rows_of_8_bits(const uint8_t* const* blocks, const Shape& s, const Rows& x, float* sums, uint8_t* room) {
  using Products = int32_t[P][2][kTileRows][kRows];
  Products* products = reinterpret_cast<Products*>(room);
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

#endif

// ---- one product

struct Part {  // a matrix of several below one another
  const uint8_t* blocks;
  int64_t rows, first_row, first_block;
};

struct Product {
  int type, n_threads;
  bool tiles;
  Shape shape;
  const Part* parts;
  int64_t n_parts, n_blocks, out_features;
};

inline const Part& part_of(const Product& p, int64_t block) {
  int64_t i = p.n_parts - 1;
  while (p.parts[i].first_block > block) i--;
  return p.parts[i];
}

struct Buffer {  // memory of one thread, kept from call to call
  void* data = nullptr;
  size_t size = 0;
  void* at_least(size_t n) {
    if (n > size) {
      std::free(data);
      size = (n + n / 4 + 4095) / 4096 * 4096;
      data = std::aligned_alloc(kLine, size);
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

template <int BITS, int P>
void vector_task(const Product& p, int64_t first_block, int64_t last_block, const Rows& x, uint8_t* y) {
  for (int64_t b = first_block; b < last_block; b++) {
    const Part& part = part_of(p, b);
    const int64_t local = b - part.first_block, at = part.first_row + local * kRows;
    const uint8_t* block = part.blocks + local * p.shape.block_bytes;
    const __mmask16 mask = first(part.rows - local * kRows);
    __m512 out[kFewRows];
    for (int64_t row = 0; row < x.n; row += kFewRows) {
      const int64_t n = std::min(kFewRows, x.n - row);
      if (n == 1) few_rows<BITS, P, 1>(block, p.shape, x, row, out);
      if (n == 2) few_rows<BITS, P, 2>(block, p.shape, x, row, out);
      if (n == 3) few_rows<BITS, P, 3>(block, p.shape, x, row, out);
      if (n == 4) few_rows<BITS, P, 4>(block, p.shape, x, row, out);
      for (int64_t r = 0; r < n; r++) store(y, (row + r) * p.out_features + at, p.type, mask, out[r]);
    }
  }
}

template <int BITS, int P>
void tile_task(const Product& p, int64_t first_block, int64_t last_block, const Rows& x, float* sums, uint8_t* room,
               uint8_t* y) {
#ifdef __AMX_INT8__
  const uint8_t* blocks[kBlocksPerTask];
  for (int64_t i = 0; i < kBlocksPerTask; i++) {
    const int64_t b = std::min(first_block + i, last_block - 1);
    const Part& part = part_of(p, b);
    blocks[i] = part.blocks + (b - part.first_block) * p.shape.block_bytes;
  }
  if (BITS == 4)
    many_rows_of_4_bits<P>(blocks, p.shape, x, sums, room);
  else
    many_rows_of_8_bits<P>(blocks, p.shape, x, sums, room);
  for (int64_t b = first_block; b < last_block; b++) {
    const Part& part = part_of(p, b);
    const int64_t local = b - part.first_block, at = part.first_row + local * kRows;
    const __mmask16 mask = first(part.rows - local * kRows);
    for (int64_t row = 0; row < x.n; row++) {
      __m512 acc = _mm512_load_ps(sums + (row * kBlocksPerTask + b - first_block) * kRows);
      store(y, row * p.out_features + at, p.type, mask, _mm512_mul_ps(acc, _mm512_set1_ps(x.scales[row])));
    }
  }
#endif
}

template <int BITS, int P>
void multiply(const Product& p, const uint8_t* x, int64_t n_rows, int64_t in_features, uint8_t* y) {
  static thread_local Buffer of_rows;
  const Shape& s = p.shape;
  const int64_t element = p.type == kFloat32 ? 4 : 2;
  const int64_t most = std::max(kChunkRows, kMaxBytes / (P * s.k) / kTileRows * kTileRows);
  for (int64_t from = 0; from < n_rows; from += most) {
    const int64_t n = std::min(most, n_rows - from), padded = (n + kTileRows - 1) / kTileRows * kTileRows;
    Rows rows{P, n, std::min(n, kTileRows), s.k, std::min<int64_t>(64, s.group), s.n_groups};
    const size_t plane_bytes = (padded * P * s.k + kLine - 1) / kLine * kLine;
    rows.planes = static_cast<int8_t*>(of_rows.at_least(plane_bytes + padded * 4 * (1 + (1 + P) * s.n_groups)));
    rows.scales = reinterpret_cast<float*>(rows.planes + plane_bytes);
    rows.totals = rows.scales + padded;
    rows.sums = reinterpret_cast<int32_t*>(rows.totals + padded * s.n_groups);
    const uint8_t* x_from = x + from * in_features * element;
    uint8_t* y_from = y + from * p.out_features * element;
    const bool tiles = p.tiles && n > kFewRows, alone = n < 8;
    if (alone)
      for (int64_t row = 0; row < n; row++) make_integers(rows, row, x_from, in_features, p.type, s.group);
    std::atomic<int64_t> next_row{0}, next_task{0};
    const int64_t n_tasks = (p.n_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
#pragma omp parallel num_threads(p.n_threads)
    {
      if (!alone) {
        for (int64_t row; (row = next_row++) < n;) make_integers(rows, row, x_from, in_features, p.type, s.group);
#pragma omp barrier
      }
      static thread_local Buffer of_sums, of_codes;
      float* sums = nullptr;
      uint8_t* room = nullptr;
      if (tiles) {
        sums = static_cast<float*>(of_sums.at_least(padded * kBlocksPerTask * kRows * 4));
        room = static_cast<uint8_t*>(of_codes.at_least(BITS == 4 ? kBlocksPerTask * kRows * s.k : padded * P * 2 * kRows * 4));
#ifdef __AMX_INT8__
        configure_tiles<P>(rows.tile_rows, rows.step);
#endif
      }
      for (int64_t task; (task = next_task++) < n_tasks;) {
        const int64_t first_block = task * kBlocksPerTask;
        const int64_t last_block = std::min(first_block + kBlocksPerTask, p.n_blocks);
        if (tiles)
          tile_task<BITS, P>(p, first_block, last_block, rows, sums, room, y_from);
        else
          vector_task<BITS, P>(p, first_block, last_block, rows, y_from);
      }
#ifdef __AMX_INT8__
      if (tiles) _tile_release();
#endif
    }
  }
}

// ---- rounding

inline float to_bf16(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&v, &u, 4);
  return v;
}

inline float checked(float scale) { return to_bf16(std::max(scale, 1e-12f)); }

// Codes of one row into its lane of a block. `row` holds whole groups, padded with zeros. False if not finite.
bool round_row(const float* row, const Shape& s, int bits, uint8_t* block, int64_t lane) {
  const int64_t group = bits == 8 ? s.k : s.group;
  for (int64_t g = 0; g * group < s.k; g++) {
    const float* values = row + g * group;
    __m512 low = _mm512_set1_ps(INFINITY), high = _mm512_set1_ps(-INFINITY);
    __mmask16 bad = 0;
    for (int64_t k = 0; k < group; k += 16) {
      __m512 v = _mm512_loadu_ps(values + k);
      bad |= _mm512_fpclass_ps_mask(v, kNotFinite);
      low = _mm512_min_ps(low, v);
      high = _mm512_max_ps(high, v);
    }
    const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    float scale = bits == 8 ? std::max(-least, most) / 127 : (most - least) / 15;
    if (bad || !std::isfinite(scale)) return false;
    scale = checked(scale);
    uint8_t* codes;
    float zero = 0;
    if (bits == 8) {
      std::memcpy(block + 4 * lane, &scale, 4);
      codes = block + kLine;
    } else {
      zero = to_bf16(least + 8 * scale);
      uint32_t scale_bits, zero_bits;
      std::memcpy(&scale_bits, &scale, 4);
      std::memcpy(&zero_bits, &zero, 4);
      scale_bits |= zero_bits >> 16;
      codes = block + g * (kLine + group * kRows / 2);
      std::memcpy(codes + 4 * lane, &scale_bits, 4);
      codes += kLine;
    }
    const __m512 least_code = _mm512_set1_ps(bits == 8 ? -127.f : -8.f);
    const __m512 most_code = _mm512_set1_ps(bits == 8 ? 127.f : 7.f);
    for (int64_t k = 0; k < group; k += 16) {
      __m512 v = _mm512_div_ps(_mm512_sub_ps(_mm512_loadu_ps(values + k), _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
      v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      v = _mm512_min_ps(_mm512_max_ps(v, least_code), most_code);
      __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(bits == 8 ? 0 : 8));
      alignas(16) uint32_t four[4];  // four codes each
      _mm_store_si128(reinterpret_cast<__m128i*>(four), _mm512_cvtepi32_epi8(code));
      if (bits == 8) {
        for (int64_t i = 0; i < 4; i++) std::memcpy(codes + (k / 4 + i) * kLine + 4 * lane, four + i, 4);
      } else {
        for (int64_t i = 0; i < 2; i++) {
          const uint32_t eight = four[2 * i] | four[2 * i + 1] << 4;
          std::memcpy(codes + (k / 8 + i) * kLine + 4 * lane, &eight, 4);
        }
      }
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Whether this processor and system let a process use AMX; asks for it.
int has_tiles() {
#ifdef __AMX_INT8__
  static const bool answer = may_use_tiles();
  return answer;
#else
  return 0;
#endif
}

// y [n_rows, out_features] = x [n_rows, in_features] times each matrix in turn; all contiguous, of one type.
void product(const void* x, int64_t n_rows, int64_t in_features, int type, int bits, int64_t group, int64_t n_parts,
             const void* const* blocks, const int64_t* part_rows, void* y, int n_threads, int use_tiles) {
  Part parts[8];
  Product p{type, n_threads, use_tiles && has_tiles(), shape_of(bits, in_features, group), parts, n_parts, 0, 0};
  for (int64_t i = 0; i < n_parts; i++) {
    parts[i] = {static_cast<const uint8_t*>(blocks[i]), part_rows[i], p.out_features, p.n_blocks};
    p.out_features += part_rows[i];
    p.n_blocks += (part_rows[i] + kRows - 1) / kRows;
  }
  const uint8_t* x_bytes = static_cast<const uint8_t*>(x);
  uint8_t* y_bytes = static_cast<uint8_t*>(y);
  if (bits == 8 && type != kFloat32) multiply<8, 2>(p, x_bytes, n_rows, in_features, y_bytes);
  if (bits == 8 && type == kFloat32) multiply<8, 3>(p, x_bytes, n_rows, in_features, y_bytes);
  if (bits == 4 && type != kFloat32) multiply<4, 2>(p, x_bytes, n_rows, in_features, y_bytes);
  if (bits == 4 && type == kFloat32) multiply<4, 3>(p, x_bytes, n_rows, in_features, y_bytes);
}

// Rounds a contiguous matrix [rows, in_features] into blocks. Returns 0 if a number is not finite.
int round_matrix(const void* weight, int64_t rows, int64_t in_features, int type, int bits, int64_t group,
                 void* blocks, int n_threads) {
  const Shape s = shape_of(bits, in_features, group);
  const int64_t n_blocks = (rows + kRows - 1) / kRows;
  std::atomic<int64_t> next{0};
  std::atomic<int> finite{1};
#pragma omp parallel num_threads(n_threads)
  {
    std::unique_ptr<float[]> row(new float[s.k]());
    for (int64_t b; (b = next++) < n_blocks;) {
      uint8_t* block = static_cast<uint8_t*>(blocks) + b * s.block_bytes;
      if ((b + 1) * kRows > rows) std::memset(block, 0, s.block_bytes);
      for (int64_t lane = 0; lane < kRows && b * kRows + lane < rows; lane++) {
        const int64_t from = (b * kRows + lane) * in_features;
        for (int64_t k = 0; k < in_features; k += 16) {
          const __mmask16 mask = first(in_features - k);
          _mm512_mask_storeu_ps(row.get() + k, mask, load(weight, from + k, type, mask));
        }
        if (!round_row(row.get(), s, bits, block, lane)) finite = 0;
      }
    }
  }
  return finite;
}

}  // extern "C"
