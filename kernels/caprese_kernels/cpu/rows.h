// Dot products of weight rows with tokens, and sums of weighted rows. The inner loops stay in registers.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

constexpr int GROUP = W;                 // rows at once: their values for one token are a vector
constexpr int TOKENS = 64;               // tokens at once: their x and y stay in the second-level cache
constexpr int TILE = W == 16 ? 4 : 2;    // tokens whose dot products are in registers at once

// Into the second-level cache, because a group's rows do not fit into the first. With 1 token of 1536 values at density
// .5 on two cores of an EPYC 9004, this takes .68 of the time of prefetching into the first level.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// How rows of type T are multiplied with tokens: x is stored as `Token`, STEP values are multiplied at once.
template <class T>
struct Rows {
    using Token = float;
    using Lane = V;
    static constexpr int STEP = W;
    static Lane row(const T* p) { return load(p); }
    static Lane row_first(const T* p, int n) { return load_first(p, n); }
    static Lane token(const float* p) { return load(p); }
    static V mac(V sum, Lane a, Lane b) { return fma(a, b, sum); }
    static void put(float value, float& out) { out = value; }

    // y[t] += sum over the group of z[r][t] * row r, for STEP values of y.
    using Weight = float;
    static constexpr int WEIGHTS = GROUP;
    static void weigh(const float z[][TOKENS], int tokens, float weights[][TOKENS]) {
        for (int r = 0; r < GROUP; ++r) std::copy(z[r], z[r] + tokens, weights[r]);
    }
    static void add(const Lane* rows, const float weights[][TOKENS], float* y, int tokens, int64_t stride) {
        for (int t = 0; t < tokens; ++t, y += stride) {
            V sum = load(y);
            for (int r = 0; r < GROUP; ++r) sum = fma(rows[r], set1(weights[r][t]), sum);
            store(y, sum);
        }
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// vdpbf16ps multiplies 32 pairs of bfloat16 and adds them to 16 floats: no conversion, twice the rate.
template <>
struct Rows<Bf16> {
    using Token = uint16_t;
    using Lane = __m512i;
    static constexpr int STEP = 32;
    static Lane row(const Bf16* p) { return _mm512_loadu_si512(p); }
    static Lane row_first(const Bf16* p, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
    static Lane token(const uint16_t* p) { return _mm512_loadu_si512(p); }
    static V mac(V sum, Lane a, Lane b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static void put(float value, uint16_t& out) { out = bits_of(value) >> 16; }  // value is a bfloat16 already

    // Two neurons make a pair: their rows are interleaved, their z share 32 bits.
    using Weight = uint32_t;
    static constexpr int WEIGHTS = GROUP / 2;
    static void weigh(const float z[][TOKENS], int tokens, uint32_t weights[][TOKENS]) {
        for (int p = 0; p < WEIGHTS; ++p)
            for (int t = 0; t < tokens; ++t)
                weights[p][t] = (bits_of(z[2 * p][t]) >> 16) | (bits_of(z[2 * p + 1][t]) & 0xffff0000u);
    }
    static void add(const Lane* rows, const uint32_t weights[][TOKENS], float* y, int tokens, int64_t stride) {
        alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        __m512i first[WEIGHTS], second[WEIGHTS];
        for (int p = 0; p < WEIGHTS; ++p) {
            first[p] = _mm512_permutex2var_epi16(rows[2 * p], low, rows[2 * p + 1]);
            second[p] = _mm512_permutex2var_epi16(rows[2 * p], high, rows[2 * p + 1]);
        }
        for (int t = 0; t < tokens; ++t, y += stride) {
            V a = load(y), b = load(y + 16);
            // y of the next step: the hardware does not predict this access among so many tokens.
            prefetch_near(y + 32), prefetch_near(y + 48);
            for (int p = 0; p < WEIGHTS; ++p) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(weights[p][t]);
                a = _mm512_dpbf16_ps(a, (__m512bh)first[p], pair);
                b = _mm512_dpbf16_ps(b, (__m512bh)second[p], pair);
            }
            store(y, a);
            store(y + 16, b);
        }
    }
};
#endif

// out[r][t] = row r . token t for NR rows and NT tokens; meanwhile the NP rows of `next` are prefetched.
template <class T, int NR, int NT, int NP>
void dots(const T* const* rows, const T* const* next, const typename Rows<T>::Token* x, int64_t stride, int64_t depth,
          float* out) {
    using R = Rows<T>;
    V sums[NR][NT];
    for (auto& row : sums)
        for (V& s : row) s = zero();
    typename R::Lane w[NR];
    const auto step = [&](int64_t d) {
        for (int t = 0; t < NT; ++t) {
            const auto token = R::token(x + t * stride + d);
            for (int r = 0; r < NR; ++r) sums[r][t] = R::mac(sums[r][t], w[r], token);
        }
    };
    int64_t d = 0;
    for (; d + R::STEP <= depth; d += R::STEP) {
        for (int r = 0; r < NR; ++r) w[r] = R::row(rows[r] + d);
        for (int p = 0; p < NP; ++p) prefetch(next[p] + d);
        step(d);
    }
    if (d < depth) {
        for (int r = 0; r < NR; ++r) w[r] = R::row_first(rows[r] + d, depth - d);
        step(d);
    }
    for (int r = 0; r < NR; ++r) {
        if constexpr (NT == 4)
            _mm_storeu_ps(out + r * TOKENS, sum4(sums[r]));
        else
            for (int t = 0; t < NT; ++t) out[r * TOKENS + t] = sum(sums[r][t]);
    }
}

template <class T, int NT>
void dots(int prefetches, const T* const* rows, const T* const* next, const typename Rows<T>::Token* x, int64_t stride,
          int64_t depth, float* out) {
    switch (prefetches) {
        case 0: return dots<T, 4, NT, 0>(rows, next, x, stride, depth, out);
        case 1: return dots<T, 4, NT, 1>(rows, next, x, stride, depth, out);
        case 2: return dots<T, 4, NT, 2>(rows, next, x, stride, depth, out);
        default: return dots<T, 4, NT, 4>(rows, next, x, stride, depth, out);
    }
}

// The group's rows . the only token, as a vector: the next steps take the whole group at once, in registers.
template <class T>
V project_one(const T* const* rows, const T* const* next, const typename Rows<T>::Token* x, int64_t depth) {
    using R = Rows<T>;
    V total[GROUP];
    for (V& s : total) s = zero();
    int64_t d = 0;
    for (; d + R::STEP <= depth; d += R::STEP) {
        const auto token = R::token(x + d);
        for (int r = 0; r < GROUP; ++r) {
            total[r] = R::mac(total[r], R::row(rows[r] + d), token);
            prefetch(next[r] + d);
        }
    }
    if (d < depth) {
        const auto token = R::token(x + d);
        for (int r = 0; r < GROUP; ++r) total[r] = R::mac(total[r], R::row_first(rows[r] + d, depth - d), token);
    }
    return sums(total);
}

// The same for several tokens. Prefetches are spread over the tiles of tokens, so that they overlap with computing.
template <class T>
void project(const T* const* rows, const T* const* next, const typename Rows<T>::Token* x, int64_t stride,
             int64_t depth, int tokens, float* out) {
    const int tiles = tokens / TILE + tokens % TILE;
    for (int r = 0; r < GROUP; r += 4) {
        for (int t = 0, tile = 0, p = 0; tile < tiles; ++tile) {
            const int upto = std::min(4, 4 * (tile + 1) / std::min(tiles, 4)), prefetches = upto - p;
            const auto call = t + TILE <= tokens ? dots<T, TILE> : dots<T, 1>;
            call(prefetches, rows + r, next + r + p, x + t * stride, stride, depth, out + r * TOKENS + t);
            t += t + TILE <= tokens ? TILE : 1;
            p = upto;
        }
    }
}

// Stride between tokens: whole steps of every kind of row, and an odd number of cache lines, so that the same position
// of many tokens does not map to the same few sets of the cache.
template <class T>
int64_t padded(int64_t depth) {
    constexpr int64_t LINE = 64 / sizeof(T);
    return ((depth + 31) / 32 * 32 / LINE | 1) * LINE;
}

// `count` zeros, aligned to a cache line: unaligned, each load and store of a vector touches two lines.
template <class T>
T* zeros(std::vector<T>& buffer, size_t count) {
    buffer.assign(count + 64 / sizeof(T), T{});
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}
