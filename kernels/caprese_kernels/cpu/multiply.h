// C = A B in registers: A are rows of a matrix where it is stored, B a panel that was packed once for many of them.
//
// A holds neuron-major weights (times tokens) or z (times down rows), values of a row next to each other. B has 1 to
// VECTORS vectors of columns: [steps][vectors][W], a step being STEP values of a row of A. The sum of each value of C
// runs over the steps in their order, so its bits depend neither on its neighbours nor on how the work is split.
#pragma once

#include <algorithm>
#include <utility>

#include "lanes.h"

// Lines of memory that are needed next, fetched into the second-level cache a few at a time.
class Ahead {
public:
    // `count` rows of `bytes` bytes, `stride` bytes apart; then those of `more`.
    void add(const void* rows, int64_t count, int64_t bytes, int64_t stride) {
        if (count > 0 && bytes > 0) parts[used++] = {static_cast<const char*>(rows), count, bytes, stride};
    }
    // Over that many calls of `fetch`.
    void spread(int64_t calls) {
        int64_t lines = 0;
        for (int i = 0; i < used; ++i) lines += parts[i].rows * ((parts[i].bytes + 63) / 64 + 1);
        each = (lines + calls - 1) / std::max<int64_t>(calls, 1);
    }
    void fetch() {
        for (int64_t n = each; n > 0 && current < used; --n) {
            Part& part = parts[current];
            _mm_prefetch(part.at + column, _MM_HINT_T1);
            if ((column += 64) < part.bytes) continue;
            column = 0;
            part.at += part.stride;
            if (--part.rows == 0) ++current;
        }
    }

private:
    struct Part {
        const char* at;
        int64_t rows, bytes, stride;
    };
    Part parts[2];
    int used = 0, current = 0;
    int64_t column = 0, each = 0;
};

// One way to multiply. `a1`, the second W rows, may be null. C has rows ldc floats apart; `more`: add to what is there.
template <class M, int N>
void multiply_rows(const typename M::A* a, int64_t lda, const typename M::B* b, int64_t steps, float* c, int64_t ldc,
                   bool more, Ahead& ahead) {
    constexpr int ROWS = W == 16 ? 8 : 4;  // N * ROWS sums, N vectors of B and one of A fill the registers
    for (int first = 0; first < W; first += ROWS, a += ROWS * lda, c += ROWS * ldc) {
        V sums[ROWS][N];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < N; ++v) sums[r][v] = more ? load(c + r * ldc + v * W) : zero();
        const typename M::B* at = b;
        for (int64_t s = 0; s < steps; s += 16) {
            ahead.fetch();
            const int64_t end = std::min<int64_t>(s + 16, steps);
            for (int64_t i = s; i < end; ++i, at += N * W) {
                V columns[N];
                for (int v = 0; v < N; ++v) columns[v] = M::columns(at + v * W);
                for (int r = 0; r < ROWS; ++r) {
                    const V value = M::value(a + r * lda + i * M::STEP);
                    for (int v = 0; v < N; ++v) sums[r][v] = M::mac(sums[r][v], value, columns[v]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < N; ++v) store(c + r * ldc + v * W, sums[r][v]);
    }
}

template <class M>
void multiply_in_registers(const typename M::A* a0, const typename M::A* a1, int64_t lda, const typename M::B* b,
                           int vectors, int64_t steps, float* c0, float* c1, int64_t ldc, bool more, Ahead& ahead) {
    const auto rows = [&](const typename M::A* a, float* c) {
        switch (vectors) {
            case 1: return multiply_rows<M, 1>(a, lda, b, steps, c, ldc, more, ahead);
            case 2: return multiply_rows<M, 2>(a, lda, b, steps, c, ldc, more, ahead);
            default: return multiply_rows<M, 3>(a, lda, b, steps, c, ldc, more, ahead);
        }
    };
    rows(a0, c0);
    if (a1) rows(a1, c1);
}

// float32; 16-bit types are widened on their way into A and B.
template <class T>
struct Floats {
    using A = float;
    using B = float;
    static constexpr int STEP = 1, PAD = 1, VECTORS = 3, CALLS = 4;  // of Ahead::fetch in 16 steps
    static constexpr bool DIRECT = sizeof(T) == sizeof(float);  // A may be the stored rows
    static V columns(const float* p) { return load(p); }
    static V value(const float* p) { return set1(*p); }
    static V mac(V sum, V a, V b) { return fma(a, b, sum); }
    static constexpr auto multiply = multiply_in_registers<Floats<T>>;
    static void begin() {}
    static void end() {}

    // `n` values of a row of A.
    static void copy(const T* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; i += W) {
            const int count = std::min<int64_t>(W, n - i);
            store_first(to + i, load_upto(from + i, count), count);
        }
    }
    // W steps of a token, as a vector to transpose.
    static V steps_of(const T* row, int64_t n) { return n >= W ? load(row) : load_first(row, n < 0 ? 0 : n); }
    // One step of rows, `n` columns of them, W wide; rows past `count` are zero.
    static void interleave(const T* rows, int64_t, int64_t count, int n, float* to) {
        store(to, count > 0 ? load_upto(rows, n) : zero());
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// bfloat16 in pairs: 32 bits of A meet 32 of each column.
struct Pairs {
    using A = Bf16;
    using B = uint32_t;
    static constexpr int STEP = 2, PAD = 2, VECTORS = 3, CALLS = 4;
    static constexpr bool DIRECT = true;
    static V columns(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
    static V value(const Bf16* p) {
        int32_t pair;
        std::memcpy(&pair, p, sizeof pair);
        return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    }
    static V mac(V sum, V a, V b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    static constexpr auto multiply = multiply_in_registers<Pairs>;
    static void begin() {}
    static void end() {}

    static void copy(const Bf16* from, int64_t n, Bf16* to) { std::memcpy(to, from, n * sizeof(Bf16)); }
    static V steps_of(const Bf16* row, int64_t n) {
        const __mmask32 valid = n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1;
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(valid, row));
    }
    static void interleave(const Bf16* rows, int64_t stride, int64_t count, int n, uint32_t* to) {
        const __mmask16 valid = n == W ? 0xffff : (1u << n) - 1;
        const auto widened = [&](int row) {
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(row < count ? valid : 0, rows + row * stride));
        };
        _mm512_storeu_si512(to, _mm512_or_si512(widened(0), _mm512_slli_epi32(widened(1), 16)));
    }
};
#endif

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>

// The same on AMX, 16 x 16 sums of 32 products an instruction. B is as for Pairs.
struct Tiles : Pairs {
    static constexpr int PAD = 32, VECTORS = 2, CALLS = 1;

    // Linux grants a process the tiles when it asks; whether it does is known once.
    static bool available() {
        constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
        return granted;
    }
    static void begin() {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }

    template <int ROWS, int N>
    static void tiles(const Bf16* a0, const Bf16* a1, int64_t lda, const uint32_t* b, int64_t steps, float* c0,
                      float* c1, int64_t ldc, bool more, Ahead& ahead) {
        const int64_t row = lda * sizeof(Bf16), sums = ldc * sizeof(float);
        if (more) {
            _tile_loadd(0, c0, sums);
            if (N == 2) _tile_loadd(1, c0 + 16, sums);
            if (ROWS == 2) _tile_loadd(2, c1, sums);
            if (ROWS == 2 && N == 2) _tile_loadd(3, c1 + 16, sums);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t s = 0; s < steps; s += 16, b += N * 256) {
            _tile_loadd(6, b, N * 64);
            _tile_loadd(4, a0 + 2 * s, row);
            ahead.fetch();
            _tile_dpbf16ps(0, 4, 6);
            if (N == 2) _tile_loadd(7, b + 16, N * 64);
            if (N == 2) _tile_dpbf16ps(1, 4, 7);
            if (ROWS == 2) {
                _tile_loadd(5, a1 + 2 * s, row);
                _tile_dpbf16ps(2, 5, 6);
                if (N == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c0, sums);
        if (N == 2) _tile_stored(1, c0 + 16, sums);
        if (ROWS == 2) _tile_stored(2, c1, sums);
        if (ROWS == 2 && N == 2) _tile_stored(3, c1 + 16, sums);
    }
    static void multiply(const Bf16* a0, const Bf16* a1, int64_t lda, const uint32_t* b, int vectors, int64_t steps,
                         float* c0, float* c1, int64_t ldc, bool more, Ahead& ahead) {
        const auto call = a1 ? (vectors == 2 ? tiles<2, 2> : tiles<2, 1>) : (vectors == 2 ? tiles<1, 2> : tiles<1, 1>);
        call(a0, a1, lda, b, steps, c0, c1, ldc, more, ahead);
    }
};
#endif
