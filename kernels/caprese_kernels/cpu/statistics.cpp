// Statistics of prompts and selection, and a read of memory to measure against. `reference.py` is the definition.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "block.h"
#include "vector.h"

namespace {

// Tokens are read twice, for their norms and for their columns: a tile of this many stays in the caches.
constexpr int64_t TILE = 64;

// What multiplies z_ij before it counts: nothing, or the neurons' scales of a weighted score.
struct Plain {
    V whole(V v, int64_t) const { return v; }
    V first(V v, int64_t, int) const { return v; }
};
struct Weighted {
    const float* scale;
    V whole(V v, int64_t j) const { return v * load(scale + j); }
    V first(V v, int64_t j, int n) const { return v * load_first(scale + j, n); }
};

// A token's length: the largest entry's size and the sum of the squares of z / top. Scaled by the largest entry, the
// squares of half-precision outliers stay finite.
struct Length {
    float top, inverse, square;
    bool exact;  // else a denormal's inverse is infinite: divide by top
};

template <class T, class S>
Length length(const T* row, const S& score, int64_t neurons) {
    V largest = zero(), square = zero();
    const auto each = [&](auto&& take) {
        int64_t j = 0;
        for (; j + W <= neurons; j += W) take(score.whole(load(row + j), j));
        if (j < neurons) take(score.first(load_first(row + j, neurons - j), j, neurons - j));
    };
    each([&](V v) { largest = max(largest, max(v, -v)); });
    float values[W];
    store(values, largest);
    const float top = *std::max_element(values, values + W), scale = top > 0 ? 1.0f / top : 0.0f;
    const V s = set1(top), inverse = set1(scale);
    const bool exact = scale < INFINITY;
    each([&](V v) {
        const V a = exact ? v * inverse : v / s;
        square = fma(a, a, square);
    });
    return {top, scale, sum(square), exact};
}

template <class T, class S>
void norms_of(const T* z, int64_t stride, int64_t tokens, int64_t neurons, const S& score, float* norms, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; ++t) {
        const Length found = length(z + t * stride, score, neurons);
        norms[t] = found.top * std::sqrt(found.square);
    }
}

template <class T, class S>
void griffin(const T* z, int64_t stride, int64_t tokens, int64_t neurons, const S& score, const float* norms,
             float* statistic, int threads) {
    std::vector<float> scale(TILE), weight(TILE);
    float *const scales = scale.data(), *const weights = weight.data();
#pragma omp parallel num_threads(threads)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const auto [begin, end] = share((neurons + W - 1) / W, part, parts);
        for (int64_t tile = 0; tile < tokens; tile += TILE) {
            const int64_t count = std::min(TILE, tokens - tile);
            const auto [first, last] = share(count, part, parts);
            for (int64_t t = first; t < last; ++t) {
                if (norms) {
                    const float norm = norms[tile + t], inverse = 1.0f / norm;
                    weights[t] = norm > 0 && norm < INFINITY ? 1.0f : 0.0f;
                    scales[t] = inverse < INFINITY ? inverse : -norm;
                    continue;
                }
                const Length own = length(z + (tile + t) * stride, score, neurons);
                // The square is NaN where an entry is infinite or NaN: such a token adds nothing.
                weights[t] = own.square > 0 ? 1.0f / own.square : 0.0f;
                scales[t] = own.exact ? own.inverse : -own.top;
            }
#pragma omp barrier
            for (int64_t j = begin * W; j < std::min(end * W, neurons); j += W) {
                const int n = std::min<int64_t>(W, neurons - j);
                V total = n == W ? load(statistic + j) : load_first(statistic + j, n);
                for (int64_t t = 0; t < count; ++t) {
                    if (weights[t] == 0.0f) continue;
                    const T* at = z + (tile + t) * stride + j;
                    const V v = n == W ? score.whole(load(at), j) : score.first(load_first(at, n), j, n);
                    const V a = scales[t] > 0 ? v * set1(scales[t]) : v / set1(-scales[t]);
                    total = fma(a * a, set1(weights[t]), total);
                }
                float values[W];
                store(values, total);
                std::copy(values, values + n, statistic + j);
            }
#pragma omp barrier
        }
    }
}

constexpr int BINS = 1 << 15;

uint32_t bin_of(float g) {  // of |g|
    Bf16 rounded;
    from_float(std::fabs(g), rounded);
    return rounded.bits;
}

float activated(float x, int activation) {
    float values[W];
    store(values, activate(set1(x), activation));
    return values[0];
}

// act(v), rounded to T, of every value v of a 16-bit type: there are only 65,536. And the bin of each.
template <class T>
struct Table {
    std::vector<float> values;
    std::vector<uint16_t> bins;
    explicit Table(int activation) : values(1 << 16), bins(1 << 16) {
        for (uint32_t bits = 0; bits < values.size(); ++bits) {
            T g;
            from_float(activated(to_float(T{static_cast<uint16_t>(bits)}), activation), g);
            values[bits] = to_float(g);
            bins[bits] = bin_of(values[bits]);
        }
    }
};

template <class T>
struct Activation {
    const Table<T>& table;
    explicit Activation(int activation) : table(of(activation)) {}
    float value(T v) const { return table.values[v.bits]; }
    uint32_t bin(T v) const { return table.bins[v.bits]; }

private:
    static const Table<T>& of(int activation) {
        static const Table<T> tables[] = {Table<T>(SILU), Table<T>(GELU), Table<T>(GELU_TANH), Table<T>(RELU)};
        return tables[activation];
    }
};
template <>
struct Activation<float> {
    int activation;
    explicit Activation(int activation) : activation(activation) {}
    float value(float v) const { return activated(v, activation); }
    uint32_t bin(float v) const { return bin_of(value(v)); }
};

template <class T>
void cats(const T* gate, int64_t stride, int64_t tokens, int64_t neurons, int activation, const float* scale,
          int64_t* histogram, int threads) {
    const Activation<T> act(activation);
    std::vector<uint32_t> counts(static_cast<size_t>(threads) * BINS);
    uint32_t* const all = counts.data();
#pragma omp parallel num_threads(threads)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        uint32_t* const own = all + static_cast<size_t>(part) * BINS;
        const auto [first, last] = share(tokens, part, parts);
        for (int64_t t = first; t < last; ++t) {
            const T* const row = gate + t * stride;
            if (scale)
                for (int64_t j = 0; j < neurons; ++j)
                    ++own[bin_of(std::fabs(act.value(row[j])) * scale[j]) & (BINS - 1)];
            else
                for (int64_t j = 0; j < neurons; ++j) ++own[act.bin(row[j]) & (BINS - 1)];
        }
#pragma omp barrier
        const auto [begin, end] = share(BINS, part, parts);
        for (int p = 0; p < parts; ++p)
            for (int64_t b = begin; b < end; ++b) histogram[b] += all[static_cast<size_t>(p) * BINS + b];
    }
}

// `call` with z as what it is.
template <class F>
void typed(const void* z, int dtype, F&& call) {
    switch (dtype) {
        case 0: return call(static_cast<const float*>(z));
        case 1: return call(static_cast<const Bf16*>(z));
        default: return call(static_cast<const Half*>(z));
    }
}

}  // namespace

extern "C" {

// norms[tokens] = ||z_i||, z [tokens, F]; `scale` [F], or null: of z_ij scale_j.
void caprese_griffin_norms(const void* z, int64_t stride, int64_t tokens, int64_t neurons, int dtype,
                           const float* scale, float* norms, int threads) {
    typed(z, dtype, [&](auto* rows) {
        if (scale) return norms_of(rows, stride, tokens, neurons, Weighted{scale}, norms, threads);
        norms_of(rows, stride, tokens, neurons, Plain{}, norms, threads);
    });
}

// statistic[F] += s^2 of z [tokens, F], token after token: the bits do not depend on how a prompt is cut. `norms`
// [tokens], or null: those of z itself. `scale` [F], or null: s^2 of z_ij scale_j.
void caprese_griffin_observe(const void* z, int64_t stride, int64_t tokens, int64_t neurons, int dtype,
                             const float* scale, const float* norms, float* statistic, int threads) {
    typed(z, dtype, [&](auto* rows) {
        if (scale) return griffin(rows, stride, tokens, neurons, Weighted{scale}, norms, statistic, threads);
        griffin(rows, stride, tokens, neurons, Plain{}, norms, statistic, threads);
    });
}

// histogram[BINS] += the magnitudes of act(gate), gate [tokens, F]; `scale` [F], or null: of |act(gate)| scale_j.
void caprese_cats_observe(const void* gate, int64_t stride, int64_t tokens, int64_t neurons, int dtype, int activation,
                          const float* scale, int64_t* histogram, int threads) {
    typed(gate, dtype, [&](auto* rows) {
        cats(rows, stride, tokens, neurons, activation, scale, histogram, threads);
    });
}

// keep[F] = 1 for the k largest of statistic[F], of equals the lower index. Never negative, NaN counts as largest.
void caprese_griffin_select(const float* statistic, int64_t neurons, int64_t k, uint8_t* keep) {
    std::fill(keep, keep + neurons, 0);
    k = std::min(k, neurons);
    if (k <= 0) return;
    std::vector<uint32_t> order(neurons);
    for (int64_t j = 0; j < neurons; ++j) order[j] = bits_of(statistic[j]) & 0x7fffffffu;  // ordered as the floats are
    std::vector<uint32_t> sorted = order;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<uint32_t>());
    const uint32_t least = sorted[k - 1];
    int64_t equals = k - std::count_if(order.begin(), order.end(), [&](uint32_t v) { return v > least; });
    for (int64_t j = 0; j < neurons; ++j) keep[j] = order[j] > least || (order[j] == least && equals-- > 0);
}

// Read memory with all threads and return the sum of its words: the bandwidth that reading weights is compared with.
uint64_t caprese_read(const uint64_t* words, int64_t count, int threads) {
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const auto [begin, end] = share(count, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t i = begin; i < end; ++i) total += words[i];
    }
    return total;
}
}
