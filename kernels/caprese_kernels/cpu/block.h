// The arguments that cpu/__init__.py passes, and how work is split among threads.
#pragma once

#include <cstdint>
#include <utility>

extern "C" {
struct Block {
    const void *gate, *up_plus, *down_plus, *gate_bias, *up_bias, *down_bias;  // packed.PackedFF
    int64_t depth, neurons, rank;
    int32_t dtype, activation;  // 0 float32, 1 bfloat16, 2 float16
    const float* scale;         // CATS [F]: |g_j| scale_j is compared; null: |g_j|
};
struct Batch {
    const void* x;  // [tokens, D], rows x_stride apart
    void* y;        // [tokens, D]
    int64_t tokens, x_stride;
    const int64_t* slots;  // [tokens], -1 for padding; null: all tokens keep all neurons, without low-rank rows
    const uint8_t* keep;   // GRIFFIN [slots, F], or null
    const float* tau;      // CATS [slots], or null
    int64_t* kept;         // CATS [tokens], or null
};
}

// CATS compares |g_j| times this with tau, in float32: times 1, exactly, where neurons have no scales.
inline float scale_of(const Block& block, int64_t j) { return block.scale ? block.scale[j] : 1.0f; }

// Part number `part` of `total` items split into `parts` equal parts: [first, second).
inline std::pair<int64_t, int64_t> share(int64_t total, int part, int parts) {
    return {total * part / parts, total * (part + 1) / parts};
}
