// softmax(q k^T) v for few queries: a decode step over long contexts, on any processor that GCC supports.
//
// Processes the queries that share a key head four at a time, so that each key and value is read from memory once. Cuts
// the positions of a head into spans of fixed length, which threads take one by one. Joins their results in order, so a
// row has the same bits on any number of threads and beside any other rows. All sums are float32. `attention.py` calls
// this with addresses. Knows nothing of PyTorch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kQueries = 4;   // processed at a time
constexpr int64_t kSpan = 1024;   // positions of a head that one thread takes at a time
constexpr int64_t kChunk = 128;   // positions that all queries process before the next ones are read
constexpr int64_t kColumns = 64;  // columns of the values whose sums stay in registers

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

template <typename V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Each type loads sixteen numbers as float32.
struct Float32 {
  typedef float Item;
  static inline Vec load(const Item* p) { return load_as<Vec>(p); }
  static inline void store(Item* p, float x) { *p = x; }
};
struct BFloat16 {
  typedef uint16_t Item;
  static inline Vec load(const Item* p) {
    return (Vec)(__builtin_convertvector(load_as<Half>(p), Unsigned) << 16);
  }
  static inline void store(Item* p, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};
#ifdef __FLT16_MAX__
struct Float16 {
  typedef _Float16 Item;
  static inline Vec load(const Item* p) {
    Vec v;
    for (int i = 0; i < kLanes; i++) v[i] = p[i];
    return v;
  }
  static inline void store(Item* p, float x) { *p = static_cast<_Float16>(x); }
};
#endif

inline Vec splat(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Adds lanes i and i + N of both vectors. Four such steps turn sixteen vectors into one that has the sum of each.
template <int N>
inline Vec fold(Vec a, Vec b) {
  Int even, odd;
  for (int i = 0; i < kLanes; i++) {
    const int at = i / (2 * N) * (2 * N) + i % N;
    even[i] = i % (2 * N) < N ? at : at + kLanes;
    odd[i] = even[i] + N;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// The sums of the lanes of sixteen vectors; sum i is in lane i.
inline Vec sums(Vec* v) {
  for (int i = 0; i < 8; i++) v[i] = fold<8>(v[i], v[i + 8]);
  for (int i = 0; i < 4; i++) v[i] = fold<4>(v[i], v[i + 4]);
  for (int i = 0; i < 2; i++) v[i] = fold<2>(v[i], v[i + 2]);
  return fold<1>(v[0], v[1]);
}

// e^x for x <= 0 with a relative error of about 1e-7; 0 below -87. Cephes' polynomial for [-ln 2 / 2, ln 2 / 2].
inline Vec exponential(Vec x) {
  const Vec low = splat(-87.f);
  const auto tiny = x < low;
  x = tiny ? low : x;
  const Vec scaled = x * 1.44269504f;
  const Int n = __builtin_convertvector(scaled - 0.5f, Int);  // rounds towards 0, and x is negative
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Vec y = p * (Vec)((n + 127) << 23);
  return tiny ? Vec{} : y;
}

struct Strides {  // numbers, not bytes
  int64_t row, head, position;
};

struct Problem {
  const void *q, *k, *v;  // q: [B, n_kv_heads, n_queries, head_dim], contiguous
  void* out;              // as q
  const uint8_t* mask;    // which keys query i of row b sees: at mask + b * mask_row + i % n_new * mask_query
  int64_t mask_row, mask_query;
  int64_t n_rows, n_heads, n_queries, n_new, length, head_dim;
  Strides keys, values;
  float scale;
  int64_t n_blocks() const { return (n_queries + kQueries - 1) / kQueries; }
  int64_t state() const { return kQueries * (head_dim + 2); }  // numbers that a span returns for a block of queries
};

// The number of keys up to the last one that any query of a row sees.
int64_t seen(const Problem& p, int64_t row) {
  if (p.mask == nullptr) return p.length;
  int64_t longest = 0;
  for (int64_t t = 0; t < p.n_new; t++) {
    const uint8_t* mask = p.mask + row * p.mask_row + t * p.mask_query;
    int64_t n = p.length;
    while (n > longest && !mask[n - 1]) n--;
    longest = std::max(longest, n);
  }
  return longest;
}

// Runs one span of the keys of one head. Returns, for each query, the largest score, the sum of weights
// and the weighted sum of values.
template <typename T>
void run_span(const Problem& p, int64_t row, int64_t head, int64_t start, int64_t stop, float* states) {
  typedef typename T::Item Item;
  const int64_t d = p.head_dim;
  const Item* keys = static_cast<const Item*>(p.k) + row * p.keys.row + head * p.keys.head;
  const Item* values = static_cast<const Item*>(p.v) + row * p.values.row + head * p.values.head;
  const Item* q = static_cast<const Item*>(p.q) + (row * p.n_heads + head) * p.n_queries * d;
  for (int64_t block = 0; block < p.n_blocks(); block++) {
    float* state = states + block * p.state();
    for (int64_t i = 0; i < kQueries; i++) state[i] = -INFINITY;
    std::memset(state + kQueries, 0, sizeof(float) * (p.state() - kQueries));
  }
  alignas(64) float query[kQueries * 256];
  alignas(64) float weights[kChunk * kQueries];  // [position][query]
  for (int64_t at = start; at < stop; at += kChunk) {
    const int64_t n = std::min(kChunk, stop - at);
    for (int64_t block = 0; block < p.n_blocks(); block++) {
      float* state = states + block * p.state();
      const int64_t n_here = std::min(kQueries, p.n_queries - block * kQueries);
      for (int64_t i = 0; i < kQueries; i++)
        for (int64_t c = 0; c < d; c += kLanes) {
          Vec x = i < n_here ? T::load(q + (block * kQueries + i) * d + c) * p.scale : Vec{};
          std::memcpy(query + i * d + c, &x, sizeof x);
        }
      for (int64_t j = 0; j < n; j += 4) {
        const Item* key[4];
        for (int64_t i = 0; i < 4; i++) key[i] = keys + (at + std::min(j + i, n - 1)) * p.keys.position;
        Vec sum[16] = {};
        for (int64_t c = 0; c < d; c += kLanes) {
          Vec x[4], y[kQueries];
          for (int i = 0; i < 4; i++) x[i] = T::load(key[i] + c);
          for (int i = 0; i < kQueries; i++) y[i] = load_as<Vec>(query + i * d + c);
          for (int i = 0; i < 4; i++)
            for (int m = 0; m < kQueries; m++) sum[i * kQueries + m] += x[i] * y[m];
        }
        const Vec scores = sums(sum);
        std::memcpy(weights + j * kQueries, &scores, sizeof scores);
      }
      if (p.mask != nullptr)
        for (int64_t i = 0; i < n_here; i++) {
          const int64_t t = (block * kQueries + i) % p.n_new;
          const uint8_t* mask = p.mask + row * p.mask_row + t * p.mask_query + at;
          for (int64_t j = 0; j < n; j++)
            if (!mask[j]) weights[j * kQueries + i] = -INFINITY;
        }
      for (int64_t j = n * kQueries; j % kLanes; j++) weights[j] = -INFINITY;
      // Lane l of a vector of weights belongs to query l % 4.
      Vec most = splat(-INFINITY);
      for (int64_t j = 0; j < n * kQueries; j += kLanes) most = larger(most, load_as<Vec>(weights + j));
      float largest[kQueries], factor[kQueries];
      for (int64_t i = 0; i < kQueries; i++) {
        largest[i] = state[i];
        for (int64_t l = i; l < kLanes; l += kQueries) largest[i] = std::max(largest[i], most[l]);
        factor[i] = state[i] == -INFINITY ? 0.f : std::exp(state[i] - largest[i]);
        state[i] = largest[i];
      }
      Vec shift, total = {};
      for (int64_t l = 0; l < kLanes; l++) shift[l] = largest[l % kQueries] == -INFINITY ? 0.f : largest[l % kQueries];
      for (int64_t j = 0; j < n * kQueries; j += kLanes) {
        const Vec e = exponential(load_as<Vec>(weights + j) - shift);
        std::memcpy(weights + j, &e, sizeof e);
        total += e;
      }
      for (int64_t i = 0; i < kQueries; i++) {
        float x = 0;
        for (int64_t l = i; l < kLanes; l += kQueries) x += total[l];
        state[kQueries + i] = state[kQueries + i] * factor[i] + x;
      }
      float* out = state + 2 * kQueries;
      for (int64_t first = 0; first < d; first += kColumns) {
        const int64_t width = std::min(kColumns, d - first) / kLanes;
        Vec sum[kQueries][kColumns / kLanes] = {};
        const Item* value = values + at * p.values.position + first;
        if (width == kColumns / kLanes) {
          for (int64_t j = 0; j < n; j++, value += p.values.position)
            for (int c = 0; c < kColumns / kLanes; c++) {
              const Vec x = T::load(value + c * kLanes);
              for (int i = 0; i < kQueries; i++) sum[i][c] += x * weights[j * kQueries + i];
            }
        } else {
          for (int64_t j = 0; j < n; j++, value += p.values.position)
            for (int64_t c = 0; c < width; c++)
              for (int i = 0; i < kQueries; i++) sum[i][c] += T::load(value + c * kLanes) * weights[j * kQueries + i];
        }
        for (int64_t i = 0; i < kQueries; i++)
          for (int64_t c = 0; c < width; c++) {
            float* to = out + i * d + first + c * kLanes;
            const Vec x = load_as<Vec>(to) * factor[i] + sum[i][c];
            std::memcpy(to, &x, sizeof x);
          }
      }
    }
  }
}

// Joins the results of the spans of a head, in their order.
template <typename T>
void join(const Problem& p, int64_t row, int64_t head, int64_t n_spans, const float* states) {
  const int64_t d = p.head_dim, one_span = p.n_blocks() * p.state();
  typename T::Item* out = static_cast<typename T::Item*>(p.out) + (row * p.n_heads + head) * p.n_queries * d;
  std::vector<float> sum(d);
  for (int64_t query = 0; query < p.n_queries; query++) {
    const int64_t block = query / kQueries, i = query % kQueries;
    float most = -INFINITY, total = 0;
    for (int64_t s = 0; s < n_spans; s++) most = std::max(most, states[s * one_span + block * p.state() + i]);
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int64_t s = 0; s < n_spans; s++) {
      const float* state = states + s * one_span + block * p.state();
      if (state[kQueries + i] == 0) continue;  // it sees no key of this span; NaN propagates
      const float factor = std::exp(state[i] - most);
      total += state[kQueries + i] * factor;
      for (int64_t c = 0; c < d; c++) sum[c] += state[2 * kQueries + i * d + c] * factor;
    }
    for (int64_t c = 0; c < d; c++) T::store(out + query * d + c, total == 0 ? 0.f : sum[c] / total);
  }
}

template <typename T>
void run(const Problem& p, int n_threads) {
  const int64_t n_heads = p.n_rows * p.n_heads, one_span = p.n_blocks() * p.state();
  std::vector<int64_t> lengths(p.n_rows), firsts(n_heads + 1, 0);
  for (int64_t row = 0; row < p.n_rows; row++) lengths[row] = seen(p, row);
  for (int64_t h = 0; h < n_heads; h++) firsts[h + 1] = firsts[h] + (lengths[h / p.n_heads] + kSpan - 1) / kSpan;
  std::vector<float> states(firsts[n_heads] * one_span);
  std::vector<int64_t> head_of(firsts[n_heads]);
  for (int64_t h = 0; h < n_heads; h++) std::fill(head_of.begin() + firsts[h], head_of.begin() + firsts[h + 1], h);
#pragma omp parallel num_threads(n_threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < firsts[n_heads]; task++) {
      const int64_t h = head_of[task], row = h / p.n_heads, start = (task - firsts[h]) * kSpan;
      run_span<T>(p, row, h % p.n_heads, start, std::min(start + kSpan, lengths[row]), states.data() + task * one_span);
    }
#pragma omp for
    for (int64_t h = 0; h < n_heads; h++)
      join<T>(p, h / p.n_heads, h % p.n_heads, firsts[h + 1] - firsts[h], states.data() + firsts[h] * one_span);
  }
}

}  // namespace

// type: 0 is float32, 1 bfloat16, 2 float16. Returns 0 if it does not support the type or head_dim.
extern "C" int attend_to_rows(const void* q, const void* k, const void* v, void* out, const uint8_t* mask,
                              const int64_t* sizes, float scale, int type, int n_threads) {
  Problem p;
  p.q = q, p.k = k, p.v = v, p.out = out, p.mask = mask, p.scale = scale;
  p.n_rows = sizes[0], p.n_heads = sizes[1], p.n_queries = sizes[2], p.n_new = sizes[3], p.length = sizes[4];
  p.head_dim = sizes[5];
  p.keys = {sizes[6], sizes[7], sizes[8]};
  p.values = {sizes[9], sizes[10], sizes[11]};
  p.mask_row = sizes[12], p.mask_query = sizes[13];
  if (p.head_dim % kLanes || p.head_dim > 256) return 0;
  if (type == 0) return run<Float32>(p, n_threads), 1;
  if (type == 1) return run<BFloat16>(p, n_threads), 1;
#ifdef __FLT16_MAX__
  if (type == 2) return run<Float16>(p, n_threads), 1;
#endif
  return 0;
}
