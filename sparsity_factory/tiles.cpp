// Products of sparse weights with tiles of activations, and attention. tiles.py compiles this file at
// first use.
//
// A tile has the activations of T tokens as (inputs, T). A kept weight, or a column of R kept weights
// of neighbouring outputs, is multiplied with T tokens of its input at once, and the sums of an
// output's tokens stay in registers. Inputs are taken in parts whose tile fits the first-level cache.
//
// With AVX512_BF16, bfloat16 layers multiply two inputs at once: any two kept columns of an output
// are a pair, and the activations of both are interleaved as they are loaded.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_max_threads() { return 1; }
#endif

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Floats in a register, and registers for sums
#if defined(__AVX512F__)
constexpr int L = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int L = 8, SUMS = 8;
#else
constexpr int L = 4, SUMS = 16;
#endif

constexpr int T = 32;     // tokens of a tile
constexpr int V = T / L;  // registers for the tokens of a tile
constexpr int STRIP = 32;  // outputs whose sums are made one after the other, a multiple of all R

typedef uint16_t bfloat;
typedef float Lanes __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef uint16_t Halves __attribute__((vector_size(2 * L)));

// A sparse weight (outputs, inputs). The entries of part p and block b, of R outputs, are
// start[p * blocks + b] up to the next start.
struct Layer {
    int32_t inputs, outputs, R, parts, in_bfloat;
    const int32_t* start;
    const uint32_t* entries;
    const float* bias;
};

// Memory that begins with a line of the cache, so that no register is loaded from two lines.
template <class Value>
struct Buffer {
    explicit Buffer(int64_t size) : memory(::operator new(size * sizeof(Value), line)) {}
    ~Buffer() { ::operator delete(memory, line); }
    Buffer(const Buffer&) = delete;
    Value* at(int64_t place) { return static_cast<Value*>(memory) + place; }

    static constexpr std::align_val_t line{64};
    void* memory;
};

// ---- registers ----

Lanes all(float x) { return x - Lanes{}; }

Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

Lanes load(const bfloat* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Lanes)(__builtin_convertvector(x, Ints) << 16);
}

void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

void store(bfloat* to, Lanes x) {
#ifdef __AVX512BF16__
    __m256bh y = _mm512_cvtneps_pbh(x);
#else  // rounds to nearest, ties to even
    Ints bits = (Ints)x;
    Halves y = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
    std::memcpy(to, &y, sizeof y);
}

// Two rows of a matrix with their blocks of `bit` x `bit` off the diagonal exchanged, one row of them.
template <int bit, bool upper, int... j>
Lanes exchanged(Lanes a, Lanes b, std::integer_sequence<int, j...>) {
    if (upper) return __builtin_shufflevector(a, b, ((j & bit) ? L + j : j + bit)...);
    return __builtin_shufflevector(a, b, ((j & bit) ? L + j - bit : j)...);
}

// x[i][j] becomes x[j][i], for L rows of L.
template <int bit = 1>
void transpose(Lanes* x) {
    using Places = std::make_integer_sequence<int, L>;
    for (int i = 0; i < L; i++) {
        if (i & bit) continue;
        Lanes a = x[i], b = x[i + bit];
        x[i] = exchanged<bit, false>(a, b, Places());
        x[i + bit] = exchanged<bit, true>(a, b, Places());
    }
    if constexpr (2 * bit < L) transpose<2 * bit>(x);
}

// x P(x^2) / Q(x^2) up to 4, from where on erf is 1 in float32. The coefficients are those of Eigen's
// generic_fast_erf_float; the largest error is that of a float32 near 1.
Lanes erf(Lanes x) {
    x = x > 4.0f ? all(4) : x;
    x = x < -4.0f ? all(-4) : x;
    Lanes s = x * x;

    Lanes p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;

    Lanes q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

// As a number of this kind needs it: in bfloat16, erf is a polynomial, with which GELU is right to 8e-5.
template <class Number>
Lanes gelu(Lanes x) {
    if (sizeof(Number) == 4) return 0.5f * x * (1.0f + erf(x * 0.70710678f));

    Lanes z = x > 4.2f ? all(4.2f) : x;
    z = z < -4.2f ? all(-4.2f) : z;
    Lanes s = z * z;
    Lanes p = s * -9.0181761e-10f + 7.94177628e-08f;
    p = p * s + -3.03805047e-06f;
    p = p * s + 6.68923519e-05f;
    p = p * s + -0.000950669966f;
    p = p * s + 0.00929827828f;
    p = p * s + -0.06552829f;
    p = p * s + 0.398465923f;
    return x * (z * p + 0.5f);
}

// ---- words ----

// Numbers that are multiplied at once lie in a word of 32 bits: a float, or two of bfloat16.
template <class Number>
constexpr int PER_WORD = 4 / sizeof(Number);

Lanes load_words(const void* from) { return load(static_cast<const float*>(from)); }

// A word of the first of these, or of both
template <class Number>
Lanes word(const Lanes* x) {
    if (PER_WORD<Number> == 1) return x[0];
#ifdef __AVX512BF16__
    typedef int16_t Places __attribute__((vector_size(64)));
    const Places places = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512bh both = _mm512_cvtne2ps_pbh(x[PER_WORD<Number> - 1], x[0]);
    return (Lanes)_mm512_permutexvar_epi16((__m512i)places, (__m512i)both);
#else
    Halves low, high;
    store((bfloat*)&low, x[0]);
    store((bfloat*)&high, x[PER_WORD<Number> - 1]);
    return (Lanes)(__builtin_convertvector(low, Ints) | __builtin_convertvector(high, Ints) << 16);
#endif
}

// ---- rows to tiles, and back ----

// Rows (tokens, inputs) to a tile (inputs, W). Where a register has too few tokens, it has the last one
// again; registers without tokens stay as they were.
template <int W = T, class In, class Tile>
void to_tile(const In* rows, int tokens, int inputs, Tile* tile) {
    // Of bfloat16, words are transposed, which takes half of the time
    constexpr bool words = std::is_same_v<In, Tile>;
    constexpr int P = words ? PER_WORD<In> : 1;
    constexpr int count = P * L;  // inputs of a register

    for (int first = 0; first < tokens; first += L) {
        const In* row[L];
        for (int i = 0; i < L; i++)
            row[i] = rows + int64_t(first + i < tokens ? first + i : tokens - 1) * inputs;

        for (int at = 0; at < inputs; at += count) {
            Lanes x[L];
            const int width = inputs - at < count ? inputs - at : count;
            auto read = [](const In* from) { return words ? load_words(from) : load(from); };
            if (width == count)
                for (int i = 0; i < L; i++) x[i] = read(row[i] + at);
            else
                for (int i = 0; i < L; i++) {
                    In part[count] = {};
                    std::memcpy(part, row[i] + at, width * sizeof(In));
                    x[i] = read(part);
                }

            transpose(x);
            auto put = [&](int i) {
                Tile* to = tile + (at + i * P) * W + first;
                if constexpr (P == 1) {
                    store(to, x[i]);
                } else {
                    Halves low = __builtin_convertvector((Ints)x[i], Halves);
                    Halves high = __builtin_convertvector((Ints)x[i] >> 16, Halves);
                    std::memcpy(to, &low, sizeof low);
                    if (i * P + 1 < width) std::memcpy(to + W, &high, sizeof high);
                }
            };
            if (width == count)
                for (int i = 0; i < L; i++) put(i);
            else
                for (int i = 0; i * P < width; i++) put(i);
        }
    }
}

// The sums (count, W) of the outputs from `at` on, to rows (tokens, outputs).
template <int W = T, class Out>
void to_rows(const float* sums, int count, int at, int tokens, int64_t outputs, Out* rows) {
    constexpr int P = PER_WORD<Out>;
    for (int o = 0; o < count; o += P * L)
        for (int first = 0; first < tokens; first += L) {
            const int width = count - o < P * L ? count - o : P * L;
            const float* from = sums + o * W + first;
            Out* row = rows + first * outputs + at + o;
            auto read = [&](int i) {
                Lanes parts[P] = {load(from + i * P * W)};
                if (P == 2 && i * P + 1 < width) parts[P - 1] = load(from + (i * P + 1) * W);
                return word<Out>(parts);
            };

            // Most often all lanes are used, so that x can stay in registers
            Lanes x[L] = {};
            if (width == P * L && tokens - first >= L) {
                for (int i = 0; i < L; i++) x[i] = read(i);
                transpose(x);
                for (int i = 0; i < L; i++) std::memcpy(row + i * outputs, &x[i], sizeof x[i]);
            } else {
                for (int i = 0; i * P < width; i++) x[i] = read(i);
                transpose(x);
                for (int i = 0; i < L && first + i < tokens; i++)
                    std::memcpy(row + i * outputs, &x[i], width * sizeof(Out));
            }
        }
}

// ---- products ----

// Makes the sums (R, T) of a block from its bias, or adds to them if that is null. An entry: where the
// tile has its input, and R weights. Some tokens at a time if the sums of all need too many registers;
// several sets of sums if they need few, since an addition waits for the one before.
template <int R>
void block_sums(const float* tile, const uint32_t* entry, int count, const float* bias, float* sums) {
    constexpr int W = R * V <= SUMS ? V : SUMS / R;
    constexpr int sets = R * W >= 8 ? 1 : 8 / (R * W) < 4 ? 8 / (R * W) : 4;
    constexpr int width = R + 1;

    for (int from = 0; from < T; from += W * L) {
        Lanes sum[sets][R][W] = {};
        for (int r = 0; r < R; r++)
            for (int v = 0; v < W; v++)
                sum[0][r][v] = bias ? all(bias[r]) : load(sums + r * T + from + v * L);

        auto add = [&](Lanes (&into)[R][W], const uint32_t* e) {
            Lanes x[W];
            for (int v = 0; v < W; v++) x[v] = load(tile + e[0] + from + v * L);
            for (int r = 0; r < R; r++) {
                float w;
                std::memcpy(&w, e + 1 + r, 4);
                for (int v = 0; v < W; v++) into[r][v] += w * x[v];
            }
        };
        int i = 0;
        for (; i + sets <= count; i += sets)
#pragma GCC unroll 4
            for (int s = 0; s < sets; s++) add(sum[s], entry + (i + s) * width);
        for (; i < count; i++) add(sum[0], entry + i * width);

        for (int r = 0; r < R; r++)
            for (int v = 0; v < W; v++) {
                for (int s = 1; s < sets; s++) sum[0][r][v] += sum[s][r][v];
                store(sums + r * T + from + v * L, sum[0][r][v]);
            }
    }
}

#ifdef __AVX512BF16__
// The same in bfloat16. An entry: where the tile has its two inputs, and R pairs of weights.
template <int R>
void block_sums(const bfloat* tile, const uint32_t* entry, int count, const float* bias, float* sums) {
    constexpr int sets = R >= 4 ? 1 : 4 / R;
    constexpr int width = R + 2;
    Lanes low[sets][R] = {}, high[sets][R] = {};

    auto add = [&](Lanes (&low)[R], Lanes (&high)[R], const uint32_t* e) {
        __m512i a = _mm512_loadu_si512(tile + e[0]);
        __m512i b = _mm512_loadu_si512(tile + e[1]);
        __m512bh first = (__m512bh)_mm512_unpacklo_epi16(a, b);
        __m512bh second = (__m512bh)_mm512_unpackhi_epi16(a, b);
        for (int r = 0; r < R; r++) {
            __m512bh w = (__m512bh)_mm512_set1_epi32(e[2 + r]);
            low[r] = _mm512_dpbf16_ps(low[r], first, w);
            high[r] = _mm512_dpbf16_ps(high[r], second, w);
        }
    };
    int i = 0;
    for (; i + sets <= count; i += sets)
#pragma GCC unroll 4
        for (int s = 0; s < sets; s++) add(low[s], high[s], entry + (i + s) * width);
    for (; i < count; i++) add(low[0], high[0], entry + i * width);

    // Of each eight tokens, four are in `low` and the next four in `high`
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int r = 0; r < R; r++) {
        for (int s = 1; s < sets; s++) {
            low[0][r] += low[s][r];
            high[0][r] += high[s][r];
        }
        __m512d a = (__m512d)low[0][r], b = (__m512d)high[0][r];
        float* to = sums + r * T;
        store(to, (bias ? all(bias[r]) : load(to)) + (Lanes)_mm512_permutex2var_pd(a, first, b));
        to += L;
        store(to, (bias ? all(bias[r]) : load(to)) + (Lanes)_mm512_permutex2var_pd(a, second, b));
    }
}
#endif

// Calls put(sums, count, at) with the sums of `count` outputs from `at` on, until all from `begin` to
// `end` were there. `begin` is a multiple of STRIP. `sums` has room for STRIP outputs, or for
// end - begin + STRIP if there are several parts.
template <int R, class Tile, class Put>
void product(const Layer& layer, const Tile* tile, int begin, int end, float* sums, Put put) {
    constexpr int width = R + (sizeof(Tile) == 4 ? 1 : 2);
    const int blocks = (layer.outputs + R - 1) / R;
    // With several parts, the sums of all outputs wait for the next part
    const int strip = layer.parts == 1 ? STRIP : end - begin;

    for (int at = begin; at < end; at += strip) {
        int stop = at + strip < end ? at + strip : end;
        for (int part = 0; part < layer.parts; part++)
            for (int b = at / R; b < (stop + R - 1) / R; b++) {
                const int32_t* start = layer.start + int64_t(part) * blocks + b;
                block_sums<R>(tile, layer.entries + int64_t(start[0]) * width, start[1] - start[0],
                              part ? nullptr : layer.bias + b * R, sums + (b * R - at) * T);
            }

        put(sums, stop - at, at);
    }
}

template <class Tile, class Put>
void product(const Layer& layer, const Tile* tile, int begin, int end, float* sums, Put put) {
    switch (layer.R) {
        case 2: return product<2>(layer, tile, begin, end, sums, put);
        case 4: return product<4>(layer, tile, begin, end, sums, put);
        case 8: return product<8>(layer, tile, begin, end, sums, put);
        default: return product<1>(layer, tile, begin, end, sums, put);
    }
}

// Rows (tokens, inputs) through a layer, or through two with GELU between them, to rows (tokens, outputs).
template <class Tile, class In, class Out>
void through(const Layer* layers, int count, const In* x, Out* y, int64_t tokens) {
    const Layer& first = layers[0];
    const Layer& last = layers[count - 1];
    const int64_t tiles = (tokens + T - 1) / T;
    const int threads = omp_get_max_threads();

    // Each thread takes whole tiles, or of few tiles a share of the outputs
    const int shares = threads == 1 || tiles >= 8 * threads ? 1 : 4;
    const int64_t places = shares == 1 ? threads : tiles;
    int64_t most = STRIP;  // outputs whose sums a thread has at once
    for (int l = 0; l < count; l++)
        if (layers[l].parts > 1 && layers[l].outputs + STRIP > most) most = layers[l].outputs + STRIP;
    Buffer<Tile> inputs(places * first.inputs * T);
    Buffer<Tile> between(count == 2 ? places * last.inputs * T : 0);
    Buffer<float> all_sums(threads * most * T);

    auto rows_of = [&](int64_t tile) { return int(tokens - tile * T < T ? tokens - tile * T : T); };
    auto fill = [&](int64_t tile, int64_t place) {
        to_tile(x + tile * T * first.inputs, rows_of(tile), first.inputs,
                inputs.at(place * first.inputs * T));
    };
    auto multiply = [&](int l, int64_t tile, int64_t place, int share) {
        const Layer& layer = layers[l];
        int step = ((layer.outputs + shares - 1) / shares + STRIP - 1) / STRIP * STRIP;
        int begin = share * step;
        int end = begin + step < layer.outputs ? begin + step : layer.outputs;
        float* sums = all_sums.at(omp_get_thread_num() * most * T);
        const Tile* from = (l ? between : inputs).at(place * layer.inputs * T);

        if (l == count - 1) {
            product(layer, from, begin, end, sums, [&](const float* sums, int n, int at) {
                to_rows(sums, n, at, rows_of(tile), last.outputs, y + tile * T * last.outputs);
            });
        } else {
            product(layer, from, begin, end, sums, [&](const float* sums, int n, int at) {
                Tile* to = between.at((place * last.inputs + at) * T);
                for (int i = 0; i < n * T; i += L) store(to + i, gelu<Tile>(load(sums + i)));
            });
        }
    };

#pragma omp parallel
    if (shares == 1) {
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < tiles; tile++) {
            int place = omp_get_thread_num();
            fill(tile, place);
            for (int l = 0; l < count; l++) multiply(l, tile, place, 0);
        }
    } else {
#pragma omp for
        for (int64_t tile = 0; tile < tiles; tile++) fill(tile, tile);
        for (int l = 0; l < count; l++) {
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < tiles * shares; unit++)
                multiply(l, unit / shares, unit / shares, int(unit % shares));
        }
    }
}

template <class Tile, class In>
void through(const Layer* layers, int count, const In* x, void* y, int out_bfloat, int64_t tokens) {
    if (out_bfloat)
        through<Tile>(layers, count, x, static_cast<bfloat*>(y), tokens);
    else
        through<Tile>(layers, count, x, static_cast<float*>(y), tokens);
}

template <class Tile>
void through(const Layer* layers, int count, const void* x, int x_bfloat, void* y, int y_bfloat,
             int64_t tokens) {
    if (x_bfloat)
        through<Tile>(layers, count, static_cast<const bfloat*>(x), y, y_bfloat, tokens);
    else
        through<Tile>(layers, count, static_cast<const float*>(x), y, y_bfloat, tokens);
}

// ---- attention ----

// Registers for the tokens of queries, and for sums
constexpr int QUERIES = L == 8 ? 3 : 4, DENSE_SUMS = L == 8 ? 12 : 24;

template <class Number>
Lanes add_product(Lanes sum, Ints x, Ints w) {
#ifdef __AVX512BF16__
    if constexpr (PER_WORD<Number> == 2)
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
    return sum + (Lanes)x * (Lanes)w;
}

// Calls put(r, v, sum) with the products of `count` rows of w and the columns of words x, (steps, V).
// In w, the next row is at a distance of `row` numbers, and the next word at one of `step`.
template <class Number, int V, int R = DENSE_SUMS / V, class Put>
void dense(const Ints* x, const Number* w, int64_t row, int64_t step, int steps, int count, Put put) {
    int r = 0;
    for (; r + R <= count; r += R) {
        Lanes sum[R][V] = {};
        for (int s = 0; s < steps; s++)
#pragma GCC unroll 24
            for (int i = 0; i < R; i++) {
                int32_t word;
                std::memcpy(&word, w + (r + i) * row + s * step, 4);
                for (int v = 0; v < V; v++)
                    sum[i][v] = add_product<Number>(sum[i][v], x[s * V + v], word - Ints{});
            }

        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++) put(r + i, v, sum[i][v]);
    }

    if constexpr (R > 1)
        if (r < count)
            dense<Number, V, R / 2>(x, w + r * row, row, step, steps, count - r,
                                    [&](int i, int v, Lanes sum) { put(r + i, v, sum); });
}

// 2^x for x up to 0, to 1e-7 of it; at least 2^-126
Lanes exp2(Lanes x) {
    x = x < -126.0f ? all(-126) : x;
    const float shift = 12582912;  // rounds to an integer, which the sum has in its lowest bits
    Lanes sum = x + shift;
    Lanes rest = x - (sum - shift);

    Lanes y = rest * 0.00132647272f + 0.00967151264f;
    y = y * rest + 0.0555073374f;
    y = y * rest + 0.240222421f;
    y = y * rest + 0.693146978f;
    y = y * rest + 1.0f;
    return y * (Lanes)(((Ints)sum + 127) << 23);
}

template <class Number>
Number as(Number x) {
    return x;
}

template <class Number>
std::enable_if_t<std::is_same_v<Number, float>, float> as(bfloat x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// A head of an image: its queries, keys and values, and room for what is made of them.
template <class Number>
struct Head {
    static constexpr int P = PER_WORD<Number>;

    Head(int tokens, int width)
        : tokens(tokens),
          width(width),
          words((width + P - 1) / P),
          steps((tokens + P - 1) / P),
          queries(int64_t(tokens) * words * P),
          keys(int64_t(tokens) * words * P),
          values(int64_t(steps) * width * P),
          columns(int64_t(words) * QUERIES),
          scores(int64_t(tokens) * QUERIES),
          sums(int64_t(width) * QUERIES * L) {}

    // Rows of queries, of which the next is at a distance of `row`; keys and values are `part` and
    // twice that behind them.
    template <class In>
    void read(const In* x, int64_t row, int64_t part) {
        for (int t = 0; t < tokens; t++) {
            Number* query = queries.at(int64_t(t) * words * P);
            Number* key = keys.at(int64_t(t) * words * P);
            for (int d = 0; d < width; d++) {
                query[d] = as<Number>(x[t * row + d]);
                key[d] = as<Number>(x[t * row + part + d]);
            }
            for (int d = width; d < words * P; d++) query[d] = key[d] = 0;
        }

        // A word has the values of P tokens
        for (int t = 0; t < tokens; t += P) {
            const In* value = x + t * row + 2 * part;
            Number* to = values.at(int64_t(t) * width);
            if (t + P <= tokens)
                for (int d = 0; d < width; d++)
                    for (int p = 0; p < P; p++) to[d * P + p] = as<Number>(value[p * row + d]);
            else
                for (int d = 0; d < width; d++) {
                    to[d * P] = as<Number>(value[d]);
                    to[d * P + P - 1] = 0;
                }
        }
    }

    // Writes what V * L queries from `first` on attend to, to rows y.
    template <int V, class Out>
    void attend(int first, float scale, Out* y, int64_t row) {
        int count = tokens - first < V * L ? tokens - first : V * L;
        to_tile<V * L>((const float*)queries.at(int64_t(first) * words * P), count, words,
                       (float*)columns.at(0));

        Ints* score = scores.at(0);
        Lanes most[V];
        for (int v = 0; v < V; v++) most[v] = all(-INFINITY);
        dense<Number, V>(columns.at(0), keys.at(0), words * P, P, words, tokens,
                         [&](int key, int v, Lanes sum) {
                             sum *= scale;
                             most[v] = sum > most[v] ? sum : most[v];
                             score[key * V + v] = (Ints)sum;
                         });

        // Scores become powers, in words as those of the values
        Lanes total[V] = {};
        for (int s = 0; s < steps; s++)
            for (int v = 0; v < V; v++) {
                Lanes power[P] = {};
                for (int p = 0; p < P && s * P + p < tokens; p++) {
                    power[p] = exp2((Lanes)score[(s * P + p) * V + v] - most[v]);
                    total[v] += power[p];
                }
                score[s * V + v] = (Ints)word<Number>(power);
            }

        for (int v = 0; v < V; v++) total[v] = 1.0f / total[v];
        float* sum = sums.at(0);
        dense<Number, V>(score, values.at(0), P, int64_t(width) * P, steps, width,
                         [&](int d, int v, Lanes x) { store(sum + (d * V + v) * L, x * total[v]); });
        to_rows<V * L>(sum, width, 0, count, row, y + first * row);
    }

    // The same for a number of registers from 1 to QUERIES.
    template <int V = QUERIES, class Out>
    void attend(int registers, int first, float scale, Out* y, int64_t row) {
        if (registers == V) return attend<V>(first, scale, y, row);
        if constexpr (V > 1) attend<V - 1>(registers, first, scale, y, row);
    }

    int tokens, width, words, steps;
    Buffer<Number> queries, keys, values;
    Buffer<Ints> columns, scores;
    Buffer<float> sums;
};

// Queries, keys and values (images, tokens, 3, heads, width) to what the queries attend to (images,
// tokens, heads, width).
template <class Number, class In>
void attention(const In* qkv, In* y, int64_t images, int tokens, int heads, int width, float scale) {
    const int part = heads * width;
    const int64_t row = 3 * int64_t(part);
    const int registers = (tokens + L - 1) / L;
    const int tiles = (registers + QUERIES - 1) / QUERIES;

    // Each thread takes whole heads, or tiles of them if some threads would have nothing to do
    const int threads = omp_get_max_threads();
    const int64_t all_heads = images * heads;
    const int shares = all_heads % threads && all_heads < 8 * threads ? tiles : 1;

#pragma omp parallel
    {
        Head<Number> head(tokens, width);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < all_heads * shares; unit++) {
            int64_t image = unit / shares / heads, place = unit / shares % heads * width;
            int share = int(unit % shares);
            head.read(qkv + image * tokens * row + place, row, part);

            int begin = shares == 1 ? 0 : share;
            int end = shares == 1 ? tiles : share + 1;
            for (int tile = begin; tile < end; tile++) {
                int from = registers * tile / tiles;
                int to = registers * (tile + 1) / tiles;
                head.attend(to - from, from * L, scale * 1.44269504f,  // e^x is 2^(x log2 e)
                            y + image * tokens * part + place, part);
            }
        }
    }
}

}  // namespace

// Whether layers can be multiplied in bfloat16.
extern "C" int multiplies_bfloat() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// x: (tokens, inputs) of the first layer; y: (tokens, outputs) of the last; each float32, or bfloat16.
// Two layers have the same `in_bfloat`.
extern "C" void multiply(const Layer* layers, int count, const void* x, int x_bfloat, void* y,
                         int y_bfloat, int64_t tokens) {
#ifdef __AVX512BF16__
    if (layers->in_bfloat) return through<bfloat>(layers, count, x, x_bfloat, y, y_bfloat, tokens);
#endif
    through<float>(layers, count, x, x_bfloat, y, y_bfloat, tokens);
}

// qkv: (images, tokens, 3, heads, width); y: (images, tokens, heads, width); float32, or both bfloat16.
extern "C" void attend(const void* qkv, void* y, int in_bfloat, int64_t images, int tokens, int heads,
                       int width, float scale) {
    auto of = [&](auto number, auto in) {
        typedef decltype(in) In;
        attention<decltype(number)>(static_cast<const In*>(qkv), static_cast<In*>(y), images, tokens,
                                    heads, width, scale);
    };
#ifdef __AVX512BF16__
    if (in_bfloat) return of(bfloat(), bfloat());
#endif
    if (in_bfloat) return of(float(), bfloat());
    of(float(), float());
}
