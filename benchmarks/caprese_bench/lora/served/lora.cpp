// GRIFFIN with unmerged LoRA (eq. 11), its two sparse halves with LoRA's products between them: as `ff.cpp`, which reads
// the same rows, but z must be whole before anything of y can be summed, because LoRA multiplies all of it by A_2.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "block.h"
#include "rows.h"

namespace {

// The neurons of a range of 32s that some token keeps, and who keeps what: bit j % 32 of words[(j - begin) / 32][t].
struct Needed {
    Needed(const Batch& batch, const Block& block, int64_t begin, int64_t end) : begin(begin), tokens(batch.tokens) {
        words.assign((end - begin + 31) / 32 * tokens, 0);
        for (int64_t j = begin; j < end; j += 32) {
            uint32_t* const word = &words[(j - begin) / 32 * tokens];
            uint32_t any = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                if (batch.slots[t] < 0) continue;
                word[t] = nonzero(batch.keep + batch.slots[t] * block.neurons + j, std::min<int64_t>(32, end - j));
                any |= word[t];
            }
            for (; any; any &= any - 1) list.push_back(j + __builtin_ctz(any));
        }
    }
    bool keeps(int64_t t, int64_t j) const { return words[(j - begin) / 32 * tokens + t] >> (j - begin) % 32 & 1; }

    std::vector<uint32_t> words;
    std::vector<int64_t> list;
    int64_t begin, tokens;
};

// Rows i to i + GROUP of a list of neurons; a short group repeats its last one.
template <class T>
int group(const Needed& needed, size_t i, const void* matrix, int64_t depth, const T** rows) {
    for (int r = 0; r < GROUP; ++r) {
        const int64_t j = needed.list[std::min(i + r, needed.list.size() - 1)];
        rows[r] = static_cast<const T*>(matrix) + j * depth;
    }
    return std::min<size_t>(GROUP, needed.list.size() - i);
}

std::pair<int64_t, int64_t> range(const Block& block, int part, int parts) {
    const auto [first, last] = share((block.neurons + 31) / 32, part, parts);
    return {first * 32, std::min(last * 32, block.neurons)};
}

// z [tokens, F] = act(x W~_g + low[0]) * (x W~_1 + low[1]), low [2, tokens, F]; tokens <= TOKENS. Padding: zero.
template <class T>
void up(const Block& block, const Batch& batch, const T* low, T* z, int threads) {
    using R = Rows<T>;
    const int64_t depth = block.depth, stride = padded<typename R::Token>(depth), size = block.neurons;
    static thread_local std::vector<typename R::Token> buffer;
    auto* const x = zeros(buffer, batch.tokens * stride);
    for (int64_t t = 0; t < batch.tokens; ++t) {
        const T* const from = static_cast<const T*>(batch.x) + t * batch.x_stride;
        for (int64_t d = 0; d < depth; ++d) R::put(to_float(from[d]), x[t * stride + d]);
    }
    const T *const low_gate = low, *const low_up = low + batch.tokens * size;
    const auto product = [&](V gate, V up) {
        return rounded(rounded(activate(rounded(gate, T{}), block.activation), T{}) * rounded(up, T{}), T{});
    };
#pragma omp parallel num_threads(threads)
    {
        const auto [begin, end] = range(block, omp_get_thread_num(), omp_get_num_threads());
        const Needed needed(batch, block, begin, end);
        for (int64_t t = 0; t < batch.tokens; ++t) {
            if (batch.slots[t] < 0) {
                std::fill(z + t * size + begin, z + t * size + end, T{});
                continue;
            }
            for (int64_t j = begin; j < end; j += W) {  // as if none were kept
                const int n = std::min<int64_t>(W, end - j);
                const auto take = [&](const T* p) { return n == W ? load(p + t * size + j) : load_first(p + t * size + j, n); };
                float values[W];
                store(values, product(take(low_gate), take(low_up)));
                for (int i = 0; i < n; ++i) from_float(values[i], z[t * size + j + i]);
            }
        }
        alignas(64) float g[GROUP][TOKENS], u[GROUP][TOKENS];
        for (size_t i = 0; i < needed.list.size(); i += GROUP) {
            const T *gate[GROUP], *rows[GROUP], *after[GROUP];
            const int count = group(needed, i, block.gate, depth, gate);
            group(needed, i, block.up_plus, depth, rows);
            group(needed, std::min(i + GROUP, needed.list.size() - 1), block.gate, depth, after);
            project<T>(gate, rows, x, stride, depth, batch.tokens, g[0]);
            project<T>(rows, after, x, stride, depth, batch.tokens, u[0]);
            for (int64_t t = 0; t < batch.tokens; ++t) {
                float a[W], b[W];
                for (int first = 0; first < count; first += W) {
                    const int n = std::min(W, count - first);
                    for (int r = 0; r < n; ++r) {
                        const int64_t at = t * size + needed.list[i + first + r];
                        a[r] = to_float(low_gate[at]), b[r] = to_float(low_up[at]);
                    }
                    float own_g[W] = {}, own_u[W] = {}, values[W];
                    for (int r = 0; r < n; ++r) own_g[r] = g[first + r][t], own_u[r] = u[first + r][t];
                    for (int r = n; r < W; ++r) a[r] = b[r] = 0.0f;
                    store(values, product(rounded(load(own_g), T{}) + load(a), rounded(load(own_u), T{}) + load(b)));
                    for (int r = 0; r < n; ++r) {
                        const int64_t j = needed.list[i + first + r];
                        if (needed.keeps(t, j)) from_float(values[r], z[t * size + j]);
                    }
                }
            }
        }
    }
}

// y [tokens, D] = z W~_2, the rows of W_2 that a token keeps; tokens <= TOKENS.
template <class T>
void down(const Block& block, const Batch& batch, const T* z, int threads) {
    using R = Rows<T>;
    const int64_t depth = block.depth, stride = padded<float>(depth), tokens = batch.tokens;
    static thread_local std::vector<float> buffer;
    float* const all = zeros(buffer, threads * tokens * stride);  // [threads][tokens][stride]
#pragma omp parallel num_threads(threads)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const auto [begin, end] = range(block, part, parts);
        const Needed needed(batch, block, begin, end);
        float* const y = all + part * tokens * stride;
        alignas(64) float some_z[GROUP][TOKENS];
        alignas(64) typename R::Weight weights[R::WEIGHTS][TOKENS];
        for (size_t i = 0; i < needed.list.size(); i += GROUP) {
            const T *rows[GROUP], *after[GROUP];
            const int count = group(needed, i, block.down_plus, depth, rows);
            group(needed, std::min(i + GROUP, needed.list.size() - 1), block.down_plus, depth, after);
            for (int r = 0; r < GROUP; ++r)
                for (int64_t t = 0; t < tokens; ++t) {
                    const int64_t j = r < count ? needed.list[i + r] : 0;
                    some_z[r][t] = r < count && needed.keeps(t, j) ? to_float(z[t * block.neurons + j]) : 0.0f;
                }
            R::weigh(some_z, tokens, weights);
            typename R::Lane w[GROUP];
            int64_t d = 0;
            for (; d + R::STEP <= depth; d += R::STEP) {
                for (int r = 0; r < GROUP; ++r) w[r] = R::row(rows[r] + d), prefetch(after[r] + d);
                R::add(w, weights, y + d, tokens, stride);
            }
            if (d < depth) {
                for (int r = 0; r < GROUP; ++r) w[r] = R::row_first(rows[r] + d, depth - d);
                R::add(w, weights, y + d, tokens, stride);
            }
        }
#pragma omp barrier
        const auto [from, to] = share(depth, part, parts);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t d = from; d < to; ++d) {
                float total = 0.0f;
                for (int p = 0; p < parts; ++p) total += all[(p * tokens + t) * stride + d];
                from_float(total, static_cast<T*>(batch.y)[t * depth + d]);
            }
    }
}

}  // namespace

extern "C" void lora_up(const Block* block, const Batch* batch, const void* low, void* z, int threads) {
    switch (block->dtype) {
        case 0: return up(*block, *batch, static_cast<const float*>(low), static_cast<float*>(z), threads);
        case 1: return up(*block, *batch, static_cast<const Bf16*>(low), static_cast<Bf16*>(z), threads);
        default: return up(*block, *batch, static_cast<const Half*>(low), static_cast<Half*>(z), threads);
    }
}

extern "C" void lora_down(const Block* block, const Batch* batch, const void* z, int threads) {
    switch (block->dtype) {
        case 0: return down(*block, *batch, static_cast<const float*>(z), threads);
        case 1: return down(*block, *batch, static_cast<const Bf16*>(z), threads);
        default: return down(*block, *batch, static_cast<const Half*>(z), threads);
    }
}
