// Multiplies by matrices of 8 or 4 bits per weight, and rounds matrices to them, on x86 processors with AVX-512 VNNI;
// uses AMX if there is any. `kernels.py` compiles this file when it is first needed and calls it with addresses.
// `quantization.py` describes the format of the blocks. Knows nothing of PyTorch.
//
// A row of x becomes 16-bit integers with one scale, stored as two planes of signed bytes; float32 becomes 24 bits and
// three planes. The products of a plane and a group of codes have exact integer sums. Only these become floats, in the
// order of the groups. So a row has the same bits in any batch, on any number of threads, and with or without AMX.

#include "integers.h"
#include "tiles.h"

#include <omp.h>

#include <atomic>
#include <memory>

namespace {

// ---- few rows: vectors

// Multiplies R rows of x by B blocks. Several blocks are several streams from memory, which use more of its speed.
template <int BITS, int P, int R, int B>
void few_rows(const uint8_t* const* blocks, const Shape& s, const Rows& x, int64_t row, __m512 (*out)[kFewRows]) {
  for (int b = 0; b < B; b++)
    for (int r = 0; r < R; r++) out[b][r] = _mm512_setzero_ps();
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16), sign = _mm512_set1_epi8(-128);
  for (int64_t g = 0; g < s.n_groups; g++) {
    const int64_t start = g * s.group, size = std::min(s.group, s.k - start);
    const uint8_t* codes[B];
    __m512i even[B][R][P], odd[B][R][P];
    for (int b = 0; b < B; b++) {
      codes[b] = codes_of<BITS>(blocks[b], s, g);
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) even[b][r][p] = odd[b][r][p] = _mm512_setzero_si512();
    }
    for (int64_t from = 0; from < size; from += x.step) {
      const int8_t* x_at[R][P];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) x_at[r][p] = x.at(row + r, p, start + from);
      for (int64_t k = 0; k < x.step; k += 8) {
        __m512i a[B], c[B];  // four columns each, unsigned; 4-bit codes of c are in the upper halves of bytes
        for (int b = 0; b < B; b++) {
          const uint8_t* line = codes[b] + (from + k) * kRows / (BITS == 8 ? 1 : 2);
          _mm_prefetch(line + kAhead, _MM_HINT_T0);
          if (BITS == 8) _mm_prefetch(line + kAhead + kLine, _MM_HINT_T0);
          if (BITS == 8) {
            a[b] = _mm512_xor_si512(_mm512_loadu_si512(line), sign);
            c[b] = _mm512_xor_si512(_mm512_loadu_si512(line + kLine), sign);
          } else {
            __m512i both = _mm512_loadu_si512(line);
            a[b] = _mm512_and_si512(both, low);
            c[b] = _mm512_and_si512(both, high);
          }
        }
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) {
            int32_t x0, x1;
            std::memcpy(&x0, x_at[r][p] + k, 4);
            std::memcpy(&x1, x_at[r][p] + k + 4, 4);
            const __m512i first = _mm512_set1_epi32(x0), second = _mm512_set1_epi32(x1);
            for (int b = 0; b < B; b++) {
              even[b][r][p] = _mm512_dpbusd_epi32(even[b][r][p], a[b], first);
              odd[b][r][p] = _mm512_dpbusd_epi32(odd[b][r][p], c[b], second);
            }
          }
      }
    }
    for (int b = 0; b < B; b++) {
      const Scales scales = scales_of<BITS>(BITS == 8 ? blocks[b] : codes[b] - kLine);
      for (int r = 0; r < R; r++) {
        constexpr int offset = BITS == 8 ? 128 : 8;  // that makes the codes unsigned
        const int64_t at = (row + r) * s.n_groups + g;
        __m512i sum[P];
        for (int p = 0; p < P; p++) {
          const __m512i upper = BITS == 8 ? odd[b][r][p] : _mm512_srai_epi32(odd[b][r][p], 4);
          sum[p] = _mm512_sub_epi32(_mm512_add_epi32(even[b][r][p], upper), _mm512_set1_epi32(offset * x.sums[at * P + p]));
        }
        out[b][r] = add_group<BITS>(out[b][r], joined<BITS, P>(sum), scales, x.totals[at]);
      }
    }
  }
  for (int b = 0; b < B; b++)
    for (int r = 0; r < R; r++) out[b][r] = _mm512_mul_ps(out[b][r], _mm512_set1_ps(x.scales[row + r]));
}

// ---- one product

struct Part {  // one of several stacked matrices
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

struct Buffer {  // memory of one thread, reused by later calls
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

struct Task {  // blocks that a thread multiplies together, and the columns of y that they give
  const uint8_t* blocks[kBlocksPerTask];
  int64_t columns[kBlocksPerTask];
  __mmask16 masks[kBlocksPerTask];
  int64_t n_blocks;
  Task(const Product& p, int64_t number) {
    n_blocks = std::min(kBlocksPerTask, p.n_blocks - number * kBlocksPerTask);
    for (int64_t i = 0; i < kBlocksPerTask; i++) {  // the last block again if some are missing
      const int64_t block = number * kBlocksPerTask + std::min(i, n_blocks - 1);
      const Part& part = part_of(p, block);
      const int64_t local = block - part.first_block;
      blocks[i] = part.blocks + local * p.shape.block_bytes;
      columns[i] = part.first_row + local * kRows;
      masks[i] = first(part.rows - local * kRows);
    }
  }
};

template <int BITS, int P>
void vector_task(const Product& p, const Task& task, const Rows& x, uint8_t* y) {
  for (int64_t row = 0; row < x.n; row += kFewRows) {
    const int64_t n = std::min(kFewRows, x.n - row);
    __m512 out[kBlocksPerTask][kFewRows];
    if (n == 1) few_rows<BITS, P, 1, kBlocksPerTask>(task.blocks, p.shape, x, row, out);
    for (int64_t b = 0; b < task.n_blocks; b++) {
      if (n == 2) few_rows<BITS, P, 2, 1>(task.blocks + b, p.shape, x, row, out + b);
      if (n == 3) few_rows<BITS, P, 3, 1>(task.blocks + b, p.shape, x, row, out + b);
      if (n == 4) few_rows<BITS, P, 4, 1>(task.blocks + b, p.shape, x, row, out + b);
      for (int64_t r = 0; r < n; r++)
        store(y, (row + r) * p.out_features + task.columns[b], p.type, task.masks[b], out[b][r]);
    }
  }
}

template <int BITS, int P>
void one_tile_task(const Product& p, const Task& task, const Rows& x, uint8_t* y) {
#ifdef __AMX_INT8__
  __m512 out[kBlocksPerTask][kTileRows];
  few_rows_by_tiles<BITS, P>(task.blocks, p.shape, x, out);
  for (int64_t b = 0; b < task.n_blocks; b++)
    for (int64_t row = 0; row < x.n; row++)
      store(y, row * p.out_features + task.columns[b], p.type, task.masks[b], out[b][row]);
#endif
}

template <int BITS, int P>
void tile_task(const Product& p, const Task& task, const Rows& x, float* sums, uint8_t* scratch, uint8_t* y) {
#ifdef __AMX_INT8__
  if (BITS == 4)
    many_rows_of_4_bits<P>(task.blocks, p.shape, x, sums, scratch);
  else
    many_rows_of_8_bits<P>(task.blocks, p.shape, x, sums, scratch);
  for (int64_t b = 0; b < task.n_blocks; b++)
    for (int64_t row = 0; row < x.n; row++) {
      __m512 acc = _mm512_load_ps(sums + (row * kBlocksPerTask + b) * kRows);
      acc = _mm512_mul_ps(acc, _mm512_set1_ps(x.scales[row]));
      store(y, row * p.out_features + task.columns[b], p.type, task.masks[b], acc);
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
    // Vectors are fastest for one row, and tiles for more. `one`: all planes of x fit one tile.
    const bool one = p.tiles && n > 1 && n * P <= kTileRows, tiles = p.tiles && !one && n > kFewRows, alone = n < 8;
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
      uint8_t* scratch = nullptr;
      if (tiles) {
        sums = static_cast<float*>(of_sums.at_least(padded * kBlocksPerTask * kRows * 4));
        const size_t scratch_bytes = BITS == 4 ? kBlocksPerTask * kRows * s.k : padded * P * 2 * kRows * 4;
        scratch = static_cast<uint8_t*>(of_codes.at_least(scratch_bytes));
#ifdef __AMX_INT8__
        configure_tiles<P>(rows.tile_rows, rows.step);
#endif
      }
#ifdef __AMX_INT8__
      if (one) configure_one_tile(n * P, rows.step);
#endif
      for (int64_t number; (number = next_task++) < n_tasks;) {
        const Task task(p, number);
        if (one)
          one_tile_task<BITS, P>(p, task, rows, y_from);
        else if (tiles)
          tile_task<BITS, P>(p, task, rows, sums, scratch, y_from);
        else
          vector_task<BITS, P>(p, task, rows, y_from);
      }
#ifdef __AMX_INT8__
      if (one || tiles) _tile_release();
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

// Writes the codes of one row into its lane of a block. `row` has whole groups, padded with zeros. Returns whether
// all numbers are finite.
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

// Asks the system for permission to use AMX. Returns whether this process may.
int has_tiles() {
#ifdef __AMX_INT8__
  static const bool answer = may_use_tiles();
  return answer;
#else
  return 0;
#endif
}

// y [n_rows, out_features] = x [n_rows, in_features] times the transpose of the stacked matrices; all contiguous.
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
