// One decoding step on the cores of a CPU: a few tokens through all layers, in one call.
//
// A step reads every weight once and computes next to nothing, so its floor is the time to read them. What keeps torch
// from there: products of few rows that read at half the memory's rate, and a thousand calls between them. Here the
// threads meet five times a layer, take rows of a matrix from a counter, and read weights as they are stored.
//
// Everything is computed in fp32. The sum of a product has the same order however many tokens a call has, and whoever
// computes it: the logits of a row do not depend on the other rows. cpu_kernels.py compiles this file and calls `step`.

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int SUMS = 16;  // vectors that stay in registers beside the weights
#else
constexpr int LANES = 8;
constexpr int SUMS = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr int CHUNK = 8;         // tokens whose sums are made in one go
constexpr int CHUNK_ROWS = 64;   // rows of a matrix that a thread takes at most
constexpr int NIBBLES = 8;       // in 32 bits
constexpr int GROUP = 32;        // int4 weights that share a scale and an offset
constexpr int BLOCK = LANES * NIBBLES;

// --- what Python hands over: the structures of cpu_kernels.py --------------------------------------------------------

enum Format : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

struct Linear {
    const void* weight;       // [outputs, inputs]; int4: [outputs, inputs / BLOCK, LANES] of 32 bits
    const float* scales;      // int8: [outputs]
    const uint32_t* grids;    // int4: [outputs, groups], two fp16 numbers; a weight is high * nibble + low
    const float* bias;        // or null
    int64_t outputs, inputs, format;
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two may be null
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_size, intermediate;
    float eps;
    const Layer* layer;
    const float* final_norm;
    Linear head;
};

struct Step {
    int64_t rows, tokens, wanted, threads, capacity, cache_format;
    int64_t width, own_size;         // floats of a token in the buffers; of a thread's own memory
    const int64_t* first;            // [rows + 1] the tokens of cache row b are first[b] to first[b + 1]
    const int64_t* slot;             // [tokens] slot in the cache, which is the position too
    const int64_t* wanted_tokens;    // [wanted] those whose logits are asked for
    const float *cos, *sin;          // [slots, head_size / 2]
    void *const *keys, *const *values;  // of a layer: [rows, kv_heads, capacity, head_size]
    float *x, *logits;               // [tokens, hidden], overwritten; [wanted, vocabulary]
    float *qkv, *mixed, *inner;      // [tokens, width], zeros behind what is written
    float* own;                      // [threads, own_size], zeros: normed tokens, values of `up`, scores
    int64_t* counters;               // [7 * layers + 1], zeros
};

// --- vectors ----------------------------------------------------------------------------------------------------------

template <class V, class T>
static inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline Floats broadcast(float value) { return value - Floats{}; }

static inline float widen(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// fp16: the exponent's bias is 15 there and 127 here; a product moves subnormal numbers, too.
[[maybe_unused]] static inline float half_to_float(uint16_t half) {
    const uint32_t bits = uint32_t(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return (half & 0x8000 ? -1.0f : 1.0f) * value * 0x1p112f;
}

static inline uint16_t narrow(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// By halves, in registers.
template <int SIZE, class V>
static inline float sum_of(V v) {
    if constexpr (SIZE == 1) {
        return v[0];
    } else {
        typedef float Half __attribute__((vector_size(2 * SIZE)));
        Half halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum_of<SIZE / 2>(halves[0] + halves[1]);
    }
}

static inline float sum(Floats v) { return sum_of<LANES>(v); }

// e^x within 2 units in the last place: 2^n by the exponent's bits, the rest by Taylor's polynomial on |r| <= ln 2 / 2.
static inline Floats exponential(Floats x) {
    const Floats low = broadcast(-87.3f), high = broadcast(88.3f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats scaled = x * 1.44269504f;
    const Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? broadcast(-0.5f) : broadcast(0.5f)), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = broadcast(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + factor;
    const Ints power = (n + 127) << 23;
    Floats factor;
    std::memcpy(&factor, &power, sizeof factor);
    return y * factor;
}

// --- weights as they are stored -> floats -----------------------------------------------------------------------------

struct Float32 {
    typedef float Stored;
    static Floats decode(const float* from) { return load<Floats>(from); }
};

struct BFloat16 {
    typedef uint16_t Stored;
    static Floats decode(const uint16_t* from) {
        const Bits bits = __builtin_convertvector(load<Halves>(from), Bits) << 16;
        return load<Floats>(&bits);
    }
};

struct Int8 {
    typedef int8_t Stored;
    static Floats decode(const int8_t* from) {
#if defined(__AVX512F__)  // GCC 12 would convert one by one
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
        return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
    }
};

// sums[r][m] of ROWS rows of a matrix and M tokens
template <class W, int ROWS, int M>
static inline void multiply(const Linear& w, int64_t first, const float* x, int64_t width, Floats (&sums)[ROWS][M]) {
    typedef typename W::Stored Stored;
    constexpr int LINE = std::max<int>(LANES, 64 / sizeof(Stored));  // weights of a line of the caches
    const auto* rows = static_cast<const Stored*>(w.weight) + first * w.inputs;
    int64_t k = 0;
    for (; k + LINE <= w.inputs; k += LINE)
        for (int r = 0; r < ROWS; r++) {
            const Stored* from = rows + r * w.inputs + k;
            __builtin_prefetch(from + ROWS * w.inputs);  // the rows that come next
            for (int i = 0; i < LINE; i += LANES) {
                const Floats weight = W::decode(from + i);
                for (int m = 0; m < M; m++) sums[r][m] += weight * load<Floats>(x + m * width + k + i);
            }
        }
    for (; k < w.inputs; k += LANES)
        for (int r = 0; r < ROWS; r++) {  // x has zeros behind its end
            Stored rest[LANES] = {};
            std::memcpy(rest, rows + r * w.inputs + k, std::min<int64_t>(LANES, w.inputs - k) * sizeof(Stored));
            for (int m = 0; m < M; m++) sums[r][m] += W::decode(rest) * load<Floats>(x + m * width + k);
        }
}

struct Int4 {
    // The 16 values of a group, or what makes them.
    struct Grid {
        Floats step, offset;
        explicit Grid(uint32_t pair) {
#if defined(__AVX512F__)  // halves to floats: offset, step, offset, step ...
            const __m512 both = _mm512_cvtph_ps(_mm256_set1_epi32(int(pair)));
            step = (Floats)_mm512_movehdup_ps(both);
            offset = (Floats)_mm512_moveldup_ps(both);
#elif defined(__F16C__)
            const __m256 both = _mm256_cvtph_ps(_mm_set1_epi32(int(pair)));
            step = (Floats)_mm256_movehdup_ps(both);
            offset = (Floats)_mm256_moveldup_ps(both);
#else
            step = broadcast(half_to_float(uint16_t(pair >> 16)));
            offset = broadcast(half_to_float(uint16_t(pair)));
#endif
#ifdef __AVX512F__
            const Floats codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            step = codes * step + offset;
#endif
        }
        Floats decode(Bits codes) const {  // in the low 4 bits
#ifdef __AVX512F__  // which looks 16 values up, and at those bits alone
            return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)step);
#else
            return __builtin_convertvector((Ints)(codes & 15), Floats) * step + offset;
#endif
        }
    };
};

template <int ROWS, int M>
static inline void multiply_int4(const Linear& w, int64_t first, const float* x, int64_t width, Floats (&sums)[ROWS][M]) {
    const int64_t blocks = (w.inputs + BLOCK - 1) / BLOCK, groups = blocks * (BLOCK / GROUP);
    const auto* rows = static_cast<const int32_t*>(w.weight) + first * blocks * LANES;
    constexpr int PER_GROUP = GROUP / LANES;  // vectors
    for (int64_t block = 0; block < blocks; block++)
        for (int r = 0; r < ROWS; r++) {
            const int32_t* from = rows + (r * blocks + block) * LANES;
            __builtin_prefetch(from + ROWS * blocks * LANES);
            const Bits nibbles = load<Bits>(from);
            const int64_t group = (first + r) * groups + block * (BLOCK / GROUP);
            for (int g = 0; g < BLOCK / GROUP; g++) {
                const Int4::Grid grid(w.grids[group + g]);
                for (int j = g * PER_GROUP; j < (g + 1) * PER_GROUP; j++) {
                    const Floats weight = grid.decode(nibbles >> (4 * j));
                    for (int m = 0; m < M; m++)
                        sums[r][m] += weight * load<Floats>(x + m * width + block * BLOCK + j * LANES);
                }
            }
        }
}

template <class W, int ROWS, int M, class Store>
static inline void some_rows(const Linear& w, int64_t row, const float* x, int64_t width, int64_t token, Store store) {
    Floats sums[ROWS][M] = {};
    if constexpr (std::is_same<W, Int4>::value)
        multiply_int4<ROWS, M>(w, row, x + token * width, width, sums);
    else
        multiply<W, ROWS, M>(w, row, x + token * width, width, sums);
    for (int r = 0; r < ROWS; r++)
        for (int m = 0; m < M; m++) {
            // Written as an fma, lest the compiler make one for some numbers of tokens and not for others.
            const float scale = w.scales ? w.scales[row + r] : 1.0f, bias = w.bias ? w.bias[row + r] : 0.0f;
            store(row + r, token + m, std::fma(sum(sums[r][m]), scale, bias));
        }
}

template <class W, int M, class Store>
static inline void all_rows(const Linear& w, int64_t begin, int64_t end, const float* x, int64_t width, int64_t token,
                            Store store) {
    constexpr int ROWS = std::max(1, std::min(4, SUMS / M));
    int64_t row = begin;
    for (; row + ROWS <= end; row += ROWS) some_rows<W, ROWS, M>(w, row, x, width, token, store);
    for (; row < end; row++) some_rows<W, 1, M>(w, row, x, width, token, store);
}

template <class W, class Store>
static void all_tokens(const Linear& w, int64_t begin, int64_t end, const float* x, int64_t width, int64_t tokens,
                       Store store) {
    int64_t token = 0;
    for (; token + CHUNK <= tokens; token += CHUNK) all_rows<W, CHUNK>(w, begin, end, x, width, token, store);
    for (; token + 4 <= tokens; token += 4) all_rows<W, 4>(w, begin, end, x, width, token, store);
    for (; token + 2 <= tokens; token += 2) all_rows<W, 2>(w, begin, end, x, width, token, store);
    for (; token < tokens; token++) all_rows<W, 1>(w, begin, end, x, width, token, store);
}

// store(output, token, value) for rows [begin, end) of a matrix
template <class Store>
static void linear(const Linear& w, int64_t begin, int64_t end, const float* x, int64_t width, int64_t tokens,
                   Store store) {
    switch (w.format) {
        case FLOAT32: return all_tokens<Float32>(w, begin, end, x, width, tokens, store);
        case BFLOAT16: return all_tokens<BFloat16>(w, begin, end, x, width, tokens, store);
        case INT8: return all_tokens<Int8>(w, begin, end, x, width, tokens, store);
        case INT4: return all_tokens<Int4>(w, begin, end, x, width, tokens, store);
    }
}

// --- what is between the products -------------------------------------------------------------------------------------

static inline float dot(const float* a, const float* b, int64_t size) {
    Floats sums = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += load<Floats>(a + i) * load<Floats>(b + i);
    float total = sum(sums);
    for (; i < size; i++) total += a[i] * b[i];
    return total;
}

static void normalize(const float* x, const float* weight, float eps, int64_t size, float* y) {
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / float(size) + eps);
    for (int64_t i = 0; i < size; i++) y[i] = weight[i] * (x[i] * scale);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

static void softmax(float* scores, int64_t size) {
    const float largest = *std::max_element(scores, scores + size);
    const int64_t padded = (size + LANES - 1) / LANES * LANES;
    std::fill(scores + size, scores + padded, -INFINITY);
    Floats sums = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats e = exponential(load<Floats>(scores + i) - largest);
        e = load<Floats>(scores + i) == -INFINITY ? Floats{} : e;
        std::memcpy(scores + i, &e, sizeof e);
        sums += e;
    }
    const float factor = 1.0f / sum(sums);
    for (int64_t i = 0; i < size; i++) scores[i] *= factor;
}

// A vector of the cache: as it is, or widened into a buffer.
static const float* read(const void* cache, int64_t format, int64_t at, int64_t size, float* buffer) {
    if (format == FLOAT32) return static_cast<const float*>(cache) + at;
    const auto* halves = static_cast<const uint16_t*>(cache) + at;
    for (int64_t i = 0; i < size; i++) buffer[i] = widen(halves[i]);
    return buffer;
}

static void write(void* cache, int64_t format, int64_t at, int64_t size, const float* from) {
    if (format == FLOAT32)
        std::memcpy(static_cast<float*>(cache) + at, from, size * sizeof(float));
    else
        for (int64_t i = 0; i < size; i++) static_cast<uint16_t*>(cache)[at + i] = narrow(from[i]);
}

// The new tokens of one cache row, for one key head and the query heads that share it, in order.
static void attend(const Model& model, const Layer& layer, const Step& s, int64_t index, int64_t row, int64_t head,
                   float* scores) {
    const int64_t size = model.head_size, group = model.heads / model.kv_heads;
    const int64_t stride = (s.capacity + LANES - 1) / LANES * LANES;
    const int64_t base = (row * model.kv_heads + head) * s.capacity * size;
    const float scale = 1.0f / std::sqrt(float(size));
    float* buffer = scores + group * stride;
    for (int64_t token = s.first[row]; token < s.first[row + 1]; token++) {
        const int64_t slot = s.slot[token];
        const float *cos = s.cos + slot * size / 2, *sin = s.sin + slot * size / 2;
        float* q = s.qkv + token * s.width + head * group * size;
        float* k = s.qkv + token * s.width + (model.heads + head) * size;
        const float* v = k + model.kv_heads * size;
        for (int64_t g = 0; g < group; g++) {
            if (layer.q_norm) normalize(q + g * size, layer.q_norm, model.eps, size, q + g * size);
            rotate(q + g * size, cos, sin, size / 2);
        }
        if (layer.k_norm) normalize(k, layer.k_norm, model.eps, size, k);
        rotate(k, cos, sin, size / 2);
        write(s.keys[index], s.cache_format, base + slot * size, size, k);
        write(s.values[index], s.cache_format, base + slot * size, size, v);

        for (int64_t i = 0; i <= slot; i++) {
            const float* key = read(s.keys[index], s.cache_format, base + i * size, size, buffer);
            for (int64_t g = 0; g < group; g++) scores[g * stride + i] = scale * dot(q + g * size, key, size);
        }
        float* y = s.mixed + token * s.width + head * group * size;
        std::fill(y, y + group * size, 0.0f);
        for (int64_t g = 0; g < group; g++) softmax(scores + g * stride, slot + 1);
        for (int64_t i = 0; i <= slot; i++) {
            const float* value = read(s.values[index], s.cache_format, base + i * size, size, buffer);
            for (int64_t g = 0; g < group; g++) {
                const float weight = scores[g * stride + i];
                for (int64_t d = 0; d < size; d++) y[g * size + d] += weight * value[d];
            }
        }
    }
}

// gate becomes silu(gate) * up
static void activate(float* gate, const float* up, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Floats x = load<Floats>(gate + i), y = x / (1.0f + exponential(-x)) * load<Floats>(up + i);
        std::memcpy(gate + i, &y, sizeof y);
    }
    for (; i < size; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// --- a step -----------------------------------------------------------------------------------------------------------

extern "C" int64_t lanes() { return LANES; }

extern "C" void step(const Model* model_pointer, const Step* step_pointer) {
    const Model& model = *model_pointer;
    const Step& s = *step_pointer;

#pragma omp parallel num_threads(int(s.threads))
    {
        int64_t* counter = s.counters;
        float* normed = s.own + omp_get_thread_num() * s.own_size;
        float* ups = normed + s.tokens * s.width;
        float* scores = ups + s.tokens * CHUNK_ROWS;

        // What a thread takes at a time does not change what it computes.
        const auto each = [&](int64_t total, int64_t chunk, auto work) {
            int64_t* next = counter++;
            for (;;) {
                const int64_t begin = __atomic_fetch_add(next, chunk, __ATOMIC_RELAXED);
                if (begin >= total) return;
                work(begin, std::min(begin + chunk, total));
            }
        };
        const auto rows_at_once = [&](int64_t outputs) {
            const int64_t share = outputs / (4 * s.threads) / LANES * LANES;  // lest `activate` ends elsewhere
            return std::max<int64_t>(LANES, std::min<int64_t>(CHUNK_ROWS, share));
        };
        const auto project = [&](const Linear& w, const float* x, auto store) {
            each(w.outputs, rows_at_once(w.outputs), [&](int64_t begin, int64_t end) {
                linear(w, begin, end, x, s.width, s.tokens, store);
            });
        };
        const auto into = [&](float* buffer, int64_t start) {
            return [=, width = s.width](int64_t n, int64_t m, float y) { buffer[m * width + start + n] = y; };
        };
        const auto onto_x = [&](int64_t n, int64_t m, float y) { s.x[m * model.hidden + n] += y; };
        const auto norm = [&](const float* weight) {
            for (int64_t m = 0; m < s.tokens; m++)
                normalize(s.x + m * model.hidden, weight, model.eps, model.hidden, normed + m * s.width);
        };

        for (int64_t index = 0; index < model.layers; index++) {
            const Layer& layer = model.layer[index];
            norm(layer.input_norm);
            project(layer.q, normed, into(s.qkv, 0));
            project(layer.k, normed, into(s.qkv, layer.q.outputs));
            project(layer.v, normed, into(s.qkv, layer.q.outputs + layer.k.outputs));
#pragma omp barrier
            each(s.rows * model.kv_heads, 1, [&](int64_t unit, int64_t) {
                attend(model, layer, s, index, unit / model.kv_heads, unit % model.kv_heads, scores);
            });
#pragma omp barrier
            project(layer.o, s.mixed, onto_x);
#pragma omp barrier
            norm(layer.post_norm);
            each(model.intermediate, rows_at_once(model.intermediate), [&](int64_t begin, int64_t end) {
                linear(layer.gate, begin, end, normed, s.width, s.tokens, into(s.inner, 0));
                linear(layer.up, begin, end, normed, s.width, s.tokens, [&](int64_t n, int64_t m, float y) {
                    ups[m * CHUNK_ROWS + n - begin] = y;
                });
                for (int64_t m = 0; m < s.tokens; m++)
                    activate(s.inner + m * s.width + begin, ups + m * CHUNK_ROWS, end - begin);
            });
#pragma omp barrier
            project(layer.down, s.inner, onto_x);
#pragma omp barrier
        }
        for (int64_t i = 0; i < s.wanted; i++)
            normalize(s.x + s.wanted_tokens[i] * model.hidden, model.final_norm, model.eps, model.hidden,
                      normed + i * s.width);
        each(model.head.outputs, rows_at_once(model.head.outputs), [&](int64_t begin, int64_t end) {
            linear(model.head, begin, end, normed, s.width, s.wanted, [&](int64_t n, int64_t m, float y) {
                s.logits[m * model.head.outputs + n] = y;
            });
        });
    }
    std::fill(s.counters, s.counters + 7 * model.layers + 1, 0);
}
