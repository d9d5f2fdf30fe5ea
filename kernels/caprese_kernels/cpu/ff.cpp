// The FF block of generated tokens (eq. 9-10) that reads only the rows a batch needs. `reference.py` is the definition.
//
// Each thread owns a fixed range of neurons, and of low-rank rows. It takes the needed ones in groups: gate and up rows
// are multiplied with every token, z = act(gate) * up is masked per token, and z times the down rows is added to the
// thread's own y. The threads' sums are added in thread order at the end: same inputs and threads, same bits. While
// the rows of one matrix are read, those that the group needs next are prefetched, so that short scattered rows stream.
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "block.h"
#include "rows.h"

namespace {

template <class T>
class Thread {
    using R = Rows<T>;

public:
    Thread(const Block& block, const typename R::Token* x, int tokens, float* y)
        : block(block), x(x), y(y), tokens(tokens), depth(block.depth) {}

    // All neurons in [begin, end), for all tokens.
    void all(int64_t begin, int64_t end) {
        std::vector<int32_t> list(end - begin);
        std::iota(list.begin(), list.end(), begin);
        chosen(list);
    }

    // GRIFFIN: the neurons in [begin, end) that some token t keeps, keep[t][j] != 0. begin is a multiple of 32.
    void selected(int64_t begin, int64_t end, const std::vector<const uint8_t*>& keep) {
        words.assign((end - begin + 31) / 32 * TOKENS, 0);
        base = begin;
        std::vector<int32_t> list;
        for (int64_t j = begin; j < end; j += 32) {
            uint32_t* const word = &words[(j - begin) / 32 * TOKENS];
            uint32_t needed = 0;
            for (int t = 0; t < tokens; ++t) needed |= word[t] = nonzero(keep[t] + j, std::min<int64_t>(32, end - j));
            for (; needed; needed &= needed - 1) list.push_back(j + __builtin_ctz(needed));
        }
        chosen(list);
    }

    // CATS: |g_j| scale_j >= tau[t] decides, so the gate of all neurons in [begin, end); then the rest of those that a token keeps.
    void above_one(int64_t begin, int64_t end, float threshold, int64_t& kept) {
        int pending = 0;
        for (int64_t j = begin; j < end; j += GROUP) {
            const int count = std::min<int64_t>(GROUP, end - j);
            const T *rows[GROUP], *after[GROUP];
            int64_t neurons[GROUP];
            for (int r = 0; r < GROUP; ++r) {
                neurons[r] = j + std::min(r, count - 1);
                rows[r] = first_row(neurons[r]);
                after[r] = first_row(std::min(j + GROUP + r, end - 1));
            }
            alignas(64) float values[GROUP], sizes[GROUP];
            const V activated = activate_one(project_one<T>(rows, after, x, depth), neurons);
            store(values, activated);
            store(sizes, max(activated, -activated) * (block.scale ? load_first(block.scale + j, count) : set1(1.0f)));
            for (int r = 0; r < count; ++r) {
                if (!(sizes[r] >= threshold)) continue;
                ++kept;
                g[0][pending] = values[r];
                neuron[pending++] = j + r;
                if (block.gate)  // read when its group is full, a gate block or two from now
                    for (int64_t d = 0; d < depth; d += R::STEP) prefetch(row(block.up_plus, j + r) + d);
            }
            if (pending < GROUP) continue;
            finish(GROUP, after);
            pending -= GROUP;
            std::copy(neuron + GROUP, neuron + GROUP + pending, neuron);
            std::copy(g[0] + GROUP, g[0] + GROUP + pending, g[0]);
        }
        if (pending) finish(pending, nullptr);
    }
    void above(int64_t begin, int64_t end, const float* thresholds, int64_t* kept) {
        tau = thresholds;
        int pending = 0;
        // With 4 tokens or more some token keeps nearly every neuron, so up rows are fetched while gates are computed.
        const bool likely = block.gate && tokens >= 4;
        for (int64_t j = begin; j < end; j += GROUP) {
            const int count = std::min<int64_t>(GROUP, end - j);
            const T *rows[GROUP], *up[GROUP], *after[GROUP];
            for (int r = 0; r < GROUP; ++r) {
                rows[r] = first_row(j + std::min(r, count - 1));
                up[r] = row(block.up_plus, j + std::min(r, count - 1));
                after[r] = first_row(std::min(j + GROUP + r, end - 1));
            }
            project<T>(rows, likely ? up : after, x, stride, depth, tokens, u[0]);
            for (int r = 0; r < count; ++r) {
                activate_row(u[r], j + r);
                bool any = false;
                const float scale = scale_of(block, j + r);
                for (int t = 0; t < tokens; ++t) {
                    const bool keeps = std::fabs(u[r][t]) * scale >= tau[t];
                    kept[t] += keeps;
                    any |= keeps;
                }
                if (!any) continue;
                std::copy(u[r], u[r] + tokens, g[pending]);
                neuron[pending++] = j + r;
                if (block.gate && !likely)  // read when its group is full, a gate block or two from now
                    for (int64_t d = 0; d < depth; d += R::STEP) prefetch(row(block.up_plus, j + r) + d);
            }
            if (pending < GROUP) continue;
            finish(GROUP, likely ? after : rows);
            pending -= GROUP;
            std::copy(neuron + GROUP, neuron + GROUP + pending, neuron);
            for (int r = 0; r < pending; ++r) std::copy(g[GROUP + r], g[GROUP + r] + tokens, g[r]);
        }
        if (pending) finish(pending, nullptr);
    }

    // Rows [begin, end) of L and R: z = x L, gate 1, always active.
    void low_rank(int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m += GROUP) {
            const int count = std::min<int64_t>(GROUP, end - m);
            const T *up[GROUP], *down[GROUP], *after[GROUP];
            for (int r = 0; r < GROUP; ++r) {
                const int64_t j = block.neurons + m + std::min(r, count - 1);
                up[r] = row(block.up_plus, j), down[r] = row(block.down_plus, j);
                after[r] = row(block.up_plus, block.neurons + std::min(m + GROUP + r, end - 1));
            }
            if (tokens == 1)
                spread(rounded(project_one<T>(up, down, x, depth), T{}));
            else {
                project<T>(up, down, x, stride, depth, tokens, u[0]);
                for (int r = 0; r < count; ++r)
                    for (int t = 0; t < tokens; t += W) store(u[r] + t, rounded(load(u[r] + t), T{}));
            }
            add(down, after, count);
        }
    }

private:
    const Block& block;
    const typename R::Token* x;
    float* y;
    int tokens;
    int64_t depth, stride = padded<typename R::Token>(depth), y_stride = padded<float>(depth);
    // Which token keeps which neuron: bit j % 32 of words[(j - base) / 32][t], or by tau[t], or all.
    std::vector<uint32_t> words;
    int64_t base = 0;
    const float* tau = nullptr;
    // The group that is being filled, and for CATS the neurons that wait for the next one.
    int64_t neuron[2 * GROUP];
    alignas(64) float g[2 * GROUP][TOKENS];  // of one token: g[0][group]
    alignas(64) float u[GROUP][TOKENS];  // up, then z

    const T* row(const void* matrix, int64_t j) const { return static_cast<const T*>(matrix) + j * depth; }
    const T* first_row(int64_t j) const { return row(block.gate ? block.gate : block.up_plus, j); }
    static V bias(const void* biases, int64_t j) {
        return set1(biases ? to_float(static_cast<const T*>(biases)[j]) : 0.0f);
    }
    static V bias_one(const void* biases, const int64_t* neurons) {
        alignas(64) float values[GROUP] = {};
        for (int r = 0; biases && r < GROUP; ++r) values[r] = to_float(static_cast<const T*>(biases)[neurons[r]]);
        return load(values);
    }

    void chosen(const std::vector<int32_t>& list) {
        for (size_t i = 0; i < list.size(); i += GROUP) {
            const int count = std::min<size_t>(GROUP, list.size() - i);
            const T *rows[GROUP], *next[GROUP], *after[GROUP];
            for (int r = 0; r < GROUP; ++r) {
                neuron[r] = list[i + std::min(r, count - 1)];  // a short group repeats its last row
                rows[r] = first_row(neuron[r]);
                next[r] = row(block.gate ? block.up_plus : block.down_plus, neuron[r]);
                after[r] = first_row(list[std::min(i + GROUP + r, list.size() - 1)]);
            }
            if (tokens == 1)
                store(g[0], activate_one(project_one<T>(rows, next, x, depth), neuron));
            else {
                project<T>(rows, next, x, stride, depth, tokens, g[0]);
                for (int r = 0; r < count; ++r) activate_row(g[r], neuron[r]);
            }
            finish(count, after);
        }
    }

    // g = act(x W_g + b), or without a gate act(x W_1 + b); rounded to T where torch rounds.
    void activate_row(float* values, int64_t j) const {
        const V b = bias(block.gate ? block.gate_bias : block.up_bias, j);
        for (int t = 0; t < tokens; t += W) store(values + t, activated(load(values + t) + b));
    }
    V activate_one(V projected, const int64_t* neurons) const {
        return activated(projected + bias_one(block.gate ? block.gate_bias : block.up_bias, neurons));
    }
    V activated(V projected) const { return rounded(activate(rounded(projected, T{}), block.activation), T{}); }

    // z = g * (x W_1 + b) where active, else 0; then y += z W_2.
    void finish(int count, const T* const* after) {
        const T *up[GROUP], *down[GROUP];
        for (int r = 0; r < GROUP; ++r) {
            const int64_t j = neuron[std::min(r, count - 1)];
            up[r] = row(block.up_plus, j), down[r] = row(block.down_plus, j);
        }
        if (tokens == 1) {  // it keeps every neuron of the group
            std::fill(neuron + count, neuron + std::max(count, GROUP), neuron[count - 1]);
            V z = load(g[0]);
            if (block.gate) {
                const V projected = project_one<T>(up, down, x, depth) + bias_one(block.up_bias, neuron);
                z = rounded(z * rounded(projected, T{}), T{});
            }
            spread(z);
            return add(down, after ? after : down, count);
        }
        if (block.gate) project<T>(up, down, x, stride, depth, tokens, u[0]);
        for (int r = 0; r < count; ++r) {
            const V b = bias(block.up_bias, neuron[r]);
            for (int t = 0; t < tokens; t += W) {
                const V gate = load(g[r] + t);
                store(u[r] + t, block.gate ? rounded(gate * rounded(load(u[r] + t) + b, T{}), T{}) : gate);
            }
            drop(r);
        }
        add(down, after ? after : down, count);
    }

    // Store the only token's z of the group where `add` reads it.
    void spread(V z) {
        alignas(64) float values[GROUP];
        store(values, z);
        for (int r = 0; r < GROUP; ++r) u[r][0] = values[r];
    }

    // z = 0 for the tokens that do not keep the neuron.
    void drop(int r) {
        if (tau) {
            const float scale = scale_of(block, neuron[r]);
            for (int t = 0; t < tokens; ++t) u[r][t] = std::fabs(g[r][t]) * scale >= tau[t] ? u[r][t] : 0.0f;
        } else if (!words.empty()) {
            const uint32_t *word = &words[(neuron[r] - base) / 32 * TOKENS], bit = 1u << (neuron[r] - base) % 32;
            for (int t = 0; t < tokens; ++t) u[r][t] = word[t] & bit ? u[r][t] : 0.0f;
        }
    }

    // y[t] += z[t] * down rows, for the `count` rows whose z is in u.
    void add(const T* const* down, const T* const* after, int count) {
        for (int r = count; r < GROUP; ++r) std::fill(u[r], u[r] + tokens, 0.0f);
        alignas(64) typename R::Weight weights[R::WEIGHTS][TOKENS];
        R::weigh(u, tokens, weights);
        typename R::Lane w[GROUP];
        int64_t d = 0;
        for (; d + R::STEP <= depth; d += R::STEP) {
            for (int r = 0; r < GROUP; ++r) {
                w[r] = R::row(down[r] + d);
                prefetch(after[r] + d);
            }
            R::add(w, weights, y + d, tokens, y_stride);
        }
        if (d < depth) {
            for (int r = 0; r < GROUP; ++r) w[r] = R::row_first(down[r] + d, depth - d);
            R::add(w, weights, y + d, tokens, y_stride);
        }
    }
};

// Up to TOKENS tokens: rows[i] of the batch, none of them padding.
template <class T>
void run(const Block& block, const Batch& batch, const std::vector<int64_t>& rows, int threads) {
    using R = Rows<T>;
    const int tokens = rows.size();
    const int64_t stride = padded<float>(block.depth), x_stride = padded<typename R::Token>(block.depth);
    static thread_local std::vector<float> sums_buffer;
    static thread_local std::vector<typename R::Token> x_buffer;
    float* const all = zeros(sums_buffer, threads * tokens * stride);  // [threads][tokens][stride]
    auto* const x = zeros(x_buffer, tokens * x_stride);
    std::vector<int64_t> kept(threads * tokens);
    std::vector<const uint8_t*> keep;
    std::vector<float> tau;
    for (int t = 0; t < tokens; ++t) {
        const T* from = static_cast<const T*>(batch.x) + rows[t] * batch.x_stride;
        for (int64_t d = 0; d < block.depth; ++d) R::put(to_float(from[d]), x[t * x_stride + d]);
        if (batch.keep) keep.push_back(batch.keep + batch.slots[rows[t]] * block.neurons);
        if (batch.tau) tau.push_back(batch.tau[batch.slots[rows[t]]]);
    }

#pragma omp parallel num_threads(threads)
    {
        // OpenMP may start fewer threads than asked for.
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        float* const own = all + part * tokens * stride;
        Thread<T> thread(block, x, tokens, own);
        const auto [first, last] = share((block.neurons + 31) / 32, part, parts);
        const int64_t begin = first * 32, end = std::min(last * 32, block.neurons);
        if (batch.tau && tokens == 1)
            thread.above_one(begin, end, tau[0], kept[part]);
        else if (batch.tau)
            thread.above(begin, end, tau.data(), kept.data() + part * tokens);
        else if (batch.keep)
            thread.selected(begin, end, keep);
        else
            thread.all(begin, end);
        if (batch.slots) {
            const auto [from, to] = share(block.rank, part, parts);
            thread.low_rank(from, to);
        }
#pragma omp barrier
        const auto [from, to] = share((block.depth + W - 1) / W, part, parts);
        for (int t = 0; t < tokens; ++t) {
            T* const y = static_cast<T*>(batch.y) + rows[t] * block.depth;
            for (int64_t d = from * W; d < std::min(to * W, block.depth); d += W) {
                V total = load(all + t * stride + d);
                for (int p = 1; p < parts; ++p) total = total + load(all + (p * tokens + t) * stride + d);
                float values[W];
                store(values, total);
                for (int i = 0; i < std::min<int64_t>(W, block.depth - d); ++i) {
                    const float b = block.down_bias ? to_float(static_cast<const T*>(block.down_bias)[d + i]) : 0.0f;
                    from_float(values[i] + b, y[d + i]);
                }
            }
        }
    }
    if (batch.kept)
        for (int t = 0; t < tokens; ++t)
            for (int p = 0; p < threads; ++p) batch.kept[rows[t]] += kept[p * tokens + t];
}

template <class T>
void run_all(const Block& block, const Batch& batch, int threads) {
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < batch.tokens; ++t) {
        if (!batch.slots || batch.slots[t] >= 0) rows.push_back(t);  // others are padding
        if (rows.size() == TOKENS || (t + 1 == batch.tokens && !rows.empty())) {
            run<T>(block, batch, rows, threads);
            rows.clear();
        }
    }
}

}  // namespace

// y and kept must be zero on entry.
extern "C" void caprese_ff(const Block* block, const Batch* batch, int threads) {
    switch (block->dtype) {
        case 0: return run_all<float>(*block, *batch, threads);
        case 1: return run_all<Bf16>(*block, *batch, threads);
        default: return run_all<Half>(*block, *batch, threads);
    }
}
