// Between lanes and memory: squares of values transposed, lanes dropped by a mask, vectors stored as a model's dtype.
#pragma once

#include "vector.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
// Rows r and r + 2^s exchange halves, in four stages: 64 shuffles for 256 values.
inline void transpose(V* v) {
    V t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    const auto pairs = [](V a, V b, bool high) {
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 4; ++k) v[i + k] = pairs(t[i + k / 2], t[i + 2 + k / 2], k % 2);
    for (int k = 0; k < 4; ++k) {  // quarter q of v[4 i + k] is column 4 q + k of rows 4 i to 4 i + 3
        const V a = _mm512_shuffle_f32x4(v[k], v[4 + k], 0x88), b = _mm512_shuffle_f32x4(v[8 + k], v[12 + k], 0x88);
        const V c = _mm512_shuffle_f32x4(v[k], v[4 + k], 0xdd), d = _mm512_shuffle_f32x4(v[8 + k], v[12 + k], 0xdd);
        t[k] = _mm512_shuffle_f32x4(a, b, 0x88), t[8 + k] = _mm512_shuffle_f32x4(a, b, 0xdd);
        t[4 + k] = _mm512_shuffle_f32x4(c, d, 0x88), t[12 + k] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}
// Bit i of the masks stands for lane i.
inline V zero_unless(uint32_t mask, V v) { return _mm512_maskz_mov_ps(mask, v); }
inline uint32_t at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline void store(Bf16* p, V v) {  // v is rounded already, as below
    const I high = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
inline void store(Half* p, V v) {
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
#else
inline void transpose(V* v) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    const auto pairs = [](V a, V b, bool high) {
        const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
        return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
    };
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 4; ++k) v[i + k] = pairs(t[i + k / 2], t[i + 2 + k / 2], k % 2);
    for (int k = 0; k < 4; ++k) t[k] = _mm256_permute2f128_ps(v[k], v[4 + k], 0x20);
    for (int k = 0; k < 4; ++k) t[4 + k] = _mm256_permute2f128_ps(v[k], v[4 + k], 0x31);
    for (int i = 0; i < 8; ++i) v[i] = t[i];
}
inline V zero_unless(uint32_t mask, V v) {
    const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const I off = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bit), _mm256_setzero_si256());
    return _mm256_andnot_ps(_mm256_castsi256_ps(off), v);
}
inline uint32_t at_least(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
inline void store(Bf16* p, V v) {
    const I high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Half* p, V v) {
    const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
#endif

// The first n <= W lanes.
template <class T>
inline void store_first(T* p, V v, int n) {
    if (n == W) return store(p, v);
    T buffer[W];
    store(buffer, v);
    std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}
template <class T>
inline V load_upto(const T* p, int n) {
    return n == W ? load(p) : load_first(p, n);
}
