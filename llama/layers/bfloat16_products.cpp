// Multiplies up to 32 rows of bfloat16 by a matrix that oneDNN has packed, for x86 processors with AMX.
//
// oneDNN itself reads these blocks at three quarters of the memory's speed if x has few rows. A block is 32 rows of the
// matrix, [in_features / 2][32][2], so each block is one stream from memory, and here it is loaded straight into tiles.
// Each row of x has its own sums, added in the order of the columns: a row's result is the same bits with any other rows
// and any number of threads. `kernels.py` compiles this file, checks the blocks, and passes addresses. Knows nothing of
// PyTorch.

#include "amx.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kHalf = 16;         // rows of a block in one tile
constexpr int64_t kTileRows = 16;     // of x
constexpr int64_t kTileColumns = 32;
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 4096;      // bytes to prefetch ahead

struct Product {
  const uint16_t *x, *blocks;
  uint16_t* y;
  int64_t n_rows, in_features, out_features;
};

// Tiles 0 to 3 have sums, 4 and 5 rows of x, 6 and 7 weights. Up to 16 rows of x are multiplied by two blocks at a time,
// more rows by one block: tile 2 * i + half has the sums of block i, or of the i-th sixteen rows of x.
void configure_tiles(int64_t n_rows) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    const bool is_second = n_rows > kTileRows && (t == 2 || t == 3 || t == 5);
    config.bytes[t] = kLine;
    config.rows[t] = t > 5 ? kTileRows : is_second ? n_rows - kTileRows : std::min(n_rows, kTileRows);
  }
  touch(&config);
  _tile_loadconfig(&config);
}

template <bool MANY>
void multiply(const Product& p, int64_t block) {
  alignas(64) float sums[4][kTileRows][kHalf];
  const int64_t n_blocks = p.out_features / kBlockRows, stride = 2 * p.in_features;
  const uint16_t* weights[2];
  for (int i = 0; i < 2; i++)  // the last block twice if there is no second
    weights[i] = p.blocks + std::min(block + (MANY ? 0 : i), n_blocks - 1) * kBlockRows * p.in_features;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < p.in_features; k += kTileColumns) {
    const uint16_t *first = weights[0] + k * kBlockRows, *second = weights[1] + k * kBlockRows;
    for (int64_t line = 0; line < 2 * kTileRows; line++) {
      _mm_prefetch(reinterpret_cast<const char*>(first) + kAhead + line * kLine, _MM_HINT_T0);
      if (!MANY) _mm_prefetch(reinterpret_cast<const char*>(second) + kAhead + line * kLine, _MM_HINT_T0);
    }
    _tile_loadd(4, p.x + k, stride);
    _tile_loadd(6, first, 2 * kLine);
    _tile_loadd(7, first + 2 * kHalf, 2 * kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (MANY) {
      _tile_loadd(5, p.x + kTileRows * p.in_features + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(6, second, 2 * kLine);
      _tile_loadd(7, second + 2 * kHalf, 2 * kLine);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  _tile_stored(2, sums[2], kLine);
  _tile_stored(3, sums[3], kLine);
  touch(sums);
  for (int64_t i = 0; i < 2 && (MANY || block + i < n_blocks); i++)
    for (int64_t row = 0; row < kTileRows && (MANY ? i * kTileRows : 0) + row < p.n_rows; row++)
      for (int64_t half = 0; half < 2; half++) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums[2 * i + half][row]));
        const int64_t column = (block + (MANY ? 0 : i)) * kBlockRows + half * kHalf;
        std::memcpy(p.y + ((MANY ? i * kTileRows : 0) + row) * p.out_features + column, &rounded, sizeof rounded);
      }
}

}  // namespace

extern "C" {

// Asks for AMX. Returns whether the processor and the system allow it.
int has_tiles() { return may_use_tiles(); }

// y [n_rows, out_features] = x [n_rows, in_features] times the transpose of a matrix in blocks; all are contiguous.
void product(const void* x, int64_t n_rows, int64_t in_features, const void* blocks, int64_t out_features, void* y,
             int n_threads) {
  const Product p{static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(blocks), static_cast<uint16_t*>(y),
                  n_rows, in_features, out_features};
  const bool many = n_rows > kTileRows;
  const int64_t n_blocks = out_features / kBlockRows, n_tasks = many ? n_blocks : (n_blocks + 1) / 2;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(n_threads)
  {
    configure_tiles(n_rows);
    for (int64_t task; (task = next++) < n_tasks;) many ? multiply<true>(p, task) : multiply<false>(p, 2 * task);
    _tile_release();
  }
}

}  // extern "C"
