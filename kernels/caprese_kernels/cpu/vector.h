// One vector of floats, W wide, on AVX-512 or AVX2 with FMA, and how bfloat16, float16 and float32 get in and out.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
using V = __m512;
using I = __m512i;
constexpr int W = 16;
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float a) { return _mm512_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V round_even(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline V power_of_two(V n) {  // 2^n for whole n in [-126, 127]
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline V widened(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
inline __m256 fold(V v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline V load(const Bf16* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V rounded(V v, Bf16) {  // to nearest even; NaN stays NaN
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const I cut = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(cut), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
}
inline V rounded(V v, Half) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
using V = __m256;
using I = __m256i;
constexpr int W = 8;
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V set1(float a) { return _mm256_set1_ps(a); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V round_even(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power_of_two(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V widened(__m256 low, __m256) { return low; }
inline __m256 fold(V v) { return v; }
inline V load(const Bf16* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V rounded(V v, Bf16) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I cut = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm256_blendv_ps(_mm256_castsi256_ps(cut), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
inline V rounded(V v, Half) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
#error "AVX-512 (F, BW, DQ), or AVX2 with FMA and F16C, is needed"
#endif

inline V rounded(V v, float) { return v; }

// Sums of one vector, of four, or of W at once: the same order of additions, so the same bits.
inline __m128 fold4(V v) {
    const __m256 eight = fold(v);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
inline float sum(V v) {
    const __m128 four = fold4(v), two = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(two, two));
}
inline __m128 sum4(const V* v) {
    return _mm_hadd_ps(_mm_hadd_ps(fold4(v[0]), fold4(v[1])), _mm_hadd_ps(fold4(v[2]), fold4(v[3])));
}
inline V sums(const V* v) {  // of W vectors
    const __m256 low = _mm256_set_m128(sum4(v + 4), sum4(v));
    if constexpr (W == 8) return widened(low, low);
    return widened(low, _mm256_set_m128(sum4(v + 12), sum4(v + 8)));
}
inline V zero() { return set1(0.0f); }

template <class T>
inline V load_first(const T* p, int n) {  // n < W values, then zeros
    T buffer[W] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

// Bit i of the result: bytes[i] != 0, for n <= 32 bytes.
inline uint32_t nonzero(const uint8_t* bytes, int n) {
    uint8_t buffer[32] = {};
    if (n < 32) bytes = static_cast<const uint8_t*>(std::memcpy(buffer, bytes, n));
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    return ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(all, _mm256_setzero_si256()));
}

inline float to_float(float a) { return a; }
inline float to_float(Bf16 a) {
    const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float to_float(Half a) { return _cvtsh_ss(a.bits); }

inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
}
inline void from_float(float a, float& out) { out = a; }
inline void from_float(float a, Half& out) { out.bits = _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
inline void from_float(float a, Bf16& out) {
    const uint32_t bits = bits_of(a);
    out.bits = a != a ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Activations. e^x by Cody and Waite's reduction and a polynomial (Cephes' expf): within 2 ulp, of x from -87 to 88.
inline V exp(V x) {
    x = min(max(x, set1(-87.0f)), set1(88.0f));
    const V n = round_even(x * set1(1.44269504089f));
    const V r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return fma(p, r * r, r + set1(1.0f)) * power_of_two(n);
}

enum Activation : int { SILU, GELU, GELU_TANH, RELU };

inline V activate(V x, int activation) {
    switch (activation) {
        case SILU:  // below -88 the sigmoid has no float left; the operands' order lets NaN through
            return max(set1(-88.0f), x) / (set1(1.0f) + exp(-x));
        case GELU_TANH: {  // 0.5 x (1 + tanh u) = x / (1 + e^(-2u))
            const V u = set1(0.7978845608f) * fma(set1(0.044715f) * x, x * x, x);
            return max(set1(-88.0f), x) / (set1(1.0f) + exp(set1(-2.0f) * u));
        }
        case GELU: {
            float values[W];
            store(values, x);
            for (float& v : values) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678118f));
            return load(values);
        }
        default:
            return max(zero(), x);  // of two operands one of which is NaN, max gives the second
    }
}
