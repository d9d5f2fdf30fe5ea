// CUDA's words in C++, so that a kernel runs on a CPU: a thread for each thread of a block, and one block at a time.

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __ldg(address) (*(address))
#define __syncthreads() barrier->arrive_and_wait()

struct Index {
    int x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
static thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim;
static std::barrier<>* barrier;
unsigned counts[32768];  // a block's shared memory

template <typename T> T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

static long long max(long long a, long long b) { return a > b ? a : b; }
static long long min(long long a, long long b) { return a < b ? a : b; }

static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float power_of_2(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1.0f / x; }

static float from_half(unsigned bits) {
    const auto narrow = (unsigned short)bits;
    _Float16 value;
    std::memcpy(&value, &narrow, 2);
    return value;
}
static float rounded_to_half(float value) { return (_Float16)value; }

static unsigned to_bfloat16(float value) {
    if (std::isnan(value)) return 0x7fff;
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned to_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

#include KERNEL

extern "C" void run(int blocks_x, int blocks_y, int threads, const char* gate, const long long* offsets,
                    const long long* slots, unsigned long long* histogram, const float* scale, long long stride,
                    long long histogram_stride, int segments, int tokens, int neurons) {
    blockDim = {threads, 1}, gridDim = {blocks_x, blocks_y};
    for (int block = 0; block < blocks_x * blocks_y; ++block) {
        blockIdx = {block % blocks_x, block / blocks_x};
        std::memset(counts, 0xff, sizeof counts);  // what the block before, or nobody, left there
        std::barrier<> together(threads);
        barrier = &together;
        std::vector<std::thread> all;
        for (int i = 0; i < threads; ++i)
            all.emplace_back([=] {
                threadIdx = {i, 0};
                count_magnitudes(gate, offsets, slots, histogram, scale, stride, histogram_stride, segments, tokens,
                                 neurons);
            });
        for (auto& each : all) each.join();
    }
}
