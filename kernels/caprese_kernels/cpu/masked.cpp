// Between two dense matrix products: z of many tokens from their gate and up, zero where a neuron is not kept.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "block.h"
#include "vector.h"

namespace {

// gate_up [tokens, 2F] (or [tokens, F] without a gate), biases added; z [tokens, F], rows z_stride apart.
template <class T>
void mask(const Block& block, const Batch& batch, const T* gate_up, T* z, int64_t z_stride, int threads) {
    const int64_t neurons = block.neurons, width = block.gate ? 2 * neurons : neurons;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < batch.tokens; ++t) {
        const int64_t slot = batch.slots[t];
        const T* const gate = gate_up + t * width;
        T* const out = z + t * z_stride;
        if (slot < 0) {
            std::memset(static_cast<void*>(out), 0, neurons * sizeof(T));
            continue;
        }
        const uint8_t* const keep = batch.keep ? batch.keep + slot * neurons : nullptr;
        int64_t kept = 0;
        for (int64_t j = 0; j < neurons; j += W) {
            const int n = std::min<int64_t>(W, neurons - j);
            const auto take = [n](const T* p) { return n == W ? load(p) : load_first(p, n); };
            const V g = rounded(activate(take(gate + j), block.activation), T{});
            float values[W], product[W];
            store(values, g);
            store(product, block.gate ? rounded(g * take(gate + neurons + j), T{}) : g);
            for (int i = 0; i < n; ++i) {
                const bool keeps = keep ? keep[j + i] != 0 : std::fabs(values[i]) * scale_of(block, j + i) >= batch.tau[slot];
                kept += keeps;
                from_float(keeps ? product[i] : 0.0f, out[j + i]);
            }
        }
        if (batch.kept) batch.kept[t] = kept;
    }
}

}  // namespace

extern "C" void caprese_mask(const Block* block, const Batch* batch, const void* gate_up, void* z, int64_t z_stride,
                             int threads) {
    switch (block->dtype) {
        case 0:
            return mask(*block, *batch, static_cast<const float*>(gate_up), static_cast<float*>(z), z_stride, threads);
        case 1: return mask(*block, *batch, static_cast<const Bf16*>(gate_up), static_cast<Bf16*>(z), z_stride, threads);
        default: return mask(*block, *batch, static_cast<const Half*>(gate_up), static_cast<Half*>(z), z_stride, threads);
    }
}
