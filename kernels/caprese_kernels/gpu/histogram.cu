// Counts CATS's magnitudes |g| in shared memory (histogram.py launches it; NVRTC compiles it, without any header).
//
// A block counts its part of the values into its own bins, then adds the bins that are not zero to the histogram in
// memory: some thousands of atomics in L2 for a block, in place of one for each value. All of them add integers, so any
// order of blocks and threads gives the same counts.
//
// Where the bins of all magnitudes do not fit into a multiprocessor's shared memory, blocks of another blockIdx.y count
// other magnitudes, and all of them read all values.
//
// Macros: VALUE 0 float32, 1 bfloat16, 2 float16; ACTIVATION 0 silu, 1 gelu, 2 gelu_pytorch_tanh, 3 relu; WIDE 1 where
// rows are aligned for loads of 16 bytes; SCALED 1 where a neuron's |g| is multiplied by its scale; BINS, a power of
// two, counters of a block.

#define NUM_MAGNITUDES 32768
#if WIDE
#define VECTOR (VALUE ? 8 : 4)
#define WORDS 4
#else
#define VECTOR 1
#define WORDS 1
#endif
#define BYTES (VALUE ? 2 : 4)

#ifdef __CUDACC__
// One instruction each. Of 22 us for 2,048 tokens of 13,824 neurons on an H200 a value may take 26 instructions; 15 are
// left this way, against 26 with __expf and __fdividef, which also care for results below 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float from_half(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

__device__ __forceinline__ float rounded_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return from_half(bits);
}

/* Two bfloat16 in a word, rounded to nearest. */
__device__ __forceinline__ unsigned to_bfloat16(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif  // the tests compile this file as C++ too, and define these five, and CUDA's words, themselves

/* u / (1 + e^-v) */
__device__ __forceinline__ float gated(float u, float v) {
    return u * reciprocal(1.0f + power_of_2(-1.4426950408889634f * v));
}

__device__ __forceinline__ float activate(float u) {
#if ACTIVATION == 0
    return gated(u, u);
#elif ACTIVATION == 1
    return 0.5f * u * (1.0f + erff(u * 0.7071067811865476f));
#elif ACTIVATION == 2
    // (1 + tanh w) / 2 = 1 / (1 + e^-2w), with w = sqrt(2 / pi) (u + 0.044715 u^3).
    return gated(u, 1.5957691216057308f * u * (1.0f + 0.044715f * u * u));
#else
    return u < 0.0f ? 0.0f : u;
#endif
}

struct Values {
    unsigned words[WORDS];
};

/* Values [VECTOR * i, VECTOR * (i + 1)) of a row. */
__device__ __forceinline__ Values load(const char* row, int i) {
    Values values;
#if WIDE
    const uint4 four = __ldg((const uint4*)row + i);
    values.words[0] = four.x, values.words[1] = four.y, values.words[2] = four.z, values.words[3] = four.w;
#elif VALUE
    values.words[0] = __ldg((const unsigned short*)row + i);
#else
    values.words[0] = __ldg((const unsigned*)row + i);
#endif
    return values;
}

/* The value at place i of a vector, as float32. */
__device__ __forceinline__ float value_at(const Values& values, int i) {
#if VALUE == 0
    return __uint_as_float(values.words[i]);
#elif VALUE == 1
    const unsigned word = values.words[i / 2];
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
#else
    return from_half(values.words[i / 2] >> (16 * (i % 2)) & 0xffffu);
#endif
}

/* g of the values at places i and i + 1, in bfloat16; scale: those of the vector's neurons. */
__device__ __forceinline__ unsigned magnitudes(const Values& values, int i, const float* scale) {
    float low = activate(value_at(values, i)), high = VECTOR > 1 ? activate(value_at(values, i + 1)) : 0.0f;
#if VALUE == 2
    low = rounded_to_half(low), high = rounded_to_half(high);
#endif
#if SCALED
#if VALUE == 1
    const unsigned rounded = to_bfloat16(low, high);  // g has the model's precision before it is scaled
    low = __uint_as_float(rounded << 16), high = __uint_as_float(rounded & 0xffff0000u);
#endif
    low *= __ldg(scale + i);
    if (VECTOR > 1) high *= __ldg(scale + i + 1);
#endif
    return to_bfloat16(low, high);
}

/* Count a magnitude, whose place times four (a counter's size) is `address`, if it is one of this block's. */
__device__ __forceinline__ void count(unsigned* counts, unsigned address) {
    address &= 4 * (NUM_MAGNITUDES - 1);
    if (BINS < NUM_MAGNITUDES) {
        address -= 4 * BINS * blockIdx.y;
        if (address >= 4 * BINS) return;  // also what is below: unsigned numbers wrap
    }
    atomicAdd((unsigned*)((char*)counts + address), 1u);
}

/* histogram[slots[s]] += counts of |activation(gate)| in the rows offsets[s] to offsets[s + 1], for every segment s.

   gate [tokens, neurons], a row every `stride` values; histogram rows every `histogram_stride`. Each block takes an
   equal part of all vectors of values, and shared memory for BINS counters of 32 bits. */
extern "C" __global__ void __launch_bounds__(1024, 1) count_magnitudes(
    const char* gate, const long long* offsets, const long long* slots, unsigned long long* histogram,
    const float* scale, long long stride, long long histogram_stride, int segments, int tokens, int neurons) {
    extern __shared__ unsigned counts[];
    const int threads = blockDim.x, vectors = neurons / VECTOR;
    const long long all = (long long)tokens * vectors;
    const long long begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;

    int segment = 0;  // the first that ends behind `begin`
    for (int above = segments; segment < above;) {
        const int middle = (segment + above) / 2;
        if (offsets[middle + 1] * vectors > begin) above = middle;
        else segment = middle + 1;
    }
    for (int i = threadIdx.x; i < BINS; i += threads) counts[i] = 0;
    __syncthreads();

    for (; segment < segments && offsets[segment] * vectors < end; ++segment) {
        const long long slot = slots[segment];
        const long long from = max(offsets[segment] * vectors, begin), to = min(offsets[segment + 1] * vectors, end);
        if (slot < 0 || from >= to) continue;

        // A thread takes every `threads`-th vector, and has two more of them on the way.
        const long long mine = from + threadIdx.x;
        long long row = mine / vectors, left = (to - mine + threads - 1) / threads;
        int column = (int)(mine - row * vectors), ahead_column = column;
        long long ahead_row = row;
        Values next[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (k < left) next[k] = load(gate + ahead_row * stride * BYTES, ahead_column);
            ahead_row += threads / vectors, ahead_column += threads % vectors;
            if (ahead_column >= vectors) ahead_column -= vectors, ++ahead_row;
        }
        for (; left > 0; --left) {
            const Values values = next[0];
            next[0] = next[1];
            if (left > 2) next[1] = load(gate + ahead_row * stride * BYTES, ahead_column);
            ahead_row += threads / vectors, ahead_column += threads % vectors;
            if (ahead_column >= vectors) ahead_column -= vectors, ++ahead_row;
#pragma unroll
            for (int k = 0; k < VECTOR; k += 2) {
                const unsigned both = magnitudes(values, k, scale + column * VECTOR);
                count(counts, both << 2);
                if (VECTOR > 1) count(counts, both >> 14);
            }
            column += threads % vectors;
            if (column >= vectors) column -= vectors;
        }
        __syncthreads();

        unsigned long long* bins = histogram + slot * histogram_stride + BINS * blockIdx.y;
        for (int i = threadIdx.x; i < BINS; i += threads) {
            if (counts[i]) atomicAdd(bins + i, (unsigned long long)counts[i]);
            counts[i] = 0;
        }
        __syncthreads();
    }
}
