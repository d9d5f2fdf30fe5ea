// The FF block of many tokens: two matrix products over the packed rows, z masked between them. `reference.py` is the
// definition.
//
// Tokens come in blocks. First z of a block, neurons divided among the threads: rows of gate and up are A, as they are
// stored; the tokens, transposed once, are B. Then y, columns divided among the threads: z is A; down rows are B,
// copied a part at a time into the order that the product reads. Every sum runs over its terms in their order whatever
// the block and the thread, so a token's bits depend neither on its batch nor on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "block.h"
#include "multiply.h"
#include "rows.h"

namespace {

constexpr int64_t BLOCK = 288;  // tokens at once: whole panels of every kind, and they stay in the second-level cache
constexpr int64_t DEPTH = 512;  // terms of y at once: that part of the down rows stays there too

int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Room for `size` values, aligned to a cache line. Kept from call to call: the system clears memory that it gives.
template <class T>
T* scratch(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size + 64 / sizeof(T)) buffer.resize(size + 64 / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// `size` vectors of columns in as few panels as M can multiply at once, of about equal width.
struct Panel {
    int64_t first;
    int size;
};
template <class M>
std::vector<Panel> panels_of(int64_t size) {
    std::vector<Panel> panels((size + M::VECTORS - 1) / M::VECTORS);
    for (size_t p = 0; p < panels.size(); ++p) {
        const auto [first, last] = share(size, p, panels.size());
        panels[p] = {first, static_cast<int>(last - first)};
    }
    return panels;
}

struct Outputs {
    void* z;  // [tokens, F + r], rows z_stride apart; null: nobody needs it
    void* gate;  // what goes into the activation [tokens, F], rows gate_stride apart, or null
    int64_t z_stride, gate_stride;
};

template <class T, class M>
class Worker {
    using A = typename M::A;
    using B = typename M::B;

public:
    // `tokens` [up_to(BLOCK, W), up_to(D, M::PAD)] is shared by all threads.
    Worker(const Block& block, const Batch& batch, const Outputs& out, B* tokens, int part, int parts)
        : block(block), batch(batch), out(out), tokens(tokens), part(part), parts(parts),
          hidden(block.neurons + (batch.slots ? block.rank : 0)), kept(batch.kept ? BLOCK : 0) {
        const auto [from, to] = share((block.depth + 2 * W - 1) / (2 * W), part, parts);
        begin = from * 2 * W, end = std::min(to * 2 * W, block.depth);
        width = up_to(std::max<int64_t>(end - begin, 0), W);
        // An odd number of lines, so that rows do not share few sets of the cache.
        y_stride = ((width + 15) / 16 | 1) * 16;
        static thread_local std::vector<A> few_buffer;
        static thread_local std::vector<float> sums_buffer, y_buffer;
        static thread_local std::vector<B> down_buffer;
        few = scratch(few_buffer, 2 * W * up_to(std::max(block.depth, DEPTH), 32));
        sums = scratch(sums_buffer, 2 * W * LDC);
        y = scratch(y_buffer, up_to(std::min(BLOCK, batch.tokens), 2 * W) * y_stride);
        down = scratch(down_buffer, DEPTH / M::STEP * width);
    }

    // Transpose this thread's share of the block's tokens [first, first + count). Padding becomes zeros.
    void transpose_tokens(int64_t first, int64_t count) {
        const int64_t vectors = (count + W - 1) / W, steps = up_to(block.depth, M::PAD) / M::STEP;
        const auto [from, to] = share(vectors, part, parts);
        for (const auto [panel, size] : panels_of<M>(vectors))
            for (int64_t v = std::max(panel, from); v < std::min(panel + size, to); ++v) {
                B* const at = tokens + panel * W * steps + (v - panel) * W;
                for (int64_t s = 0; s < steps; s += W) {
                    V square[W];
                    for (int i = 0; i < W; ++i) {
                        const int64_t t = first + v * W + i, left = block.depth - s * M::STEP;
                        const bool some = v * W + i < count && !(batch.slots && batch.slots[t] < 0);
                        square[i] = some ? M::steps_of(x_row(t) + s * M::STEP, left) : zero();
                    }
                    transpose(square);
                    for (int64_t i = 0; i < std::min<int64_t>(W, steps - s); ++i)
                        store(reinterpret_cast<float*>(at + (s + i) * size * W), square[i]);
                }
            }
    }

    // z of the block's tokens for this thread's neurons and low-rank rows, into z [count][stride].
    void project(int64_t first, int64_t count, T* z, int64_t stride) {
        const int64_t step = block.gate ? W : 2 * W, neurons = (block.neurons + step - 1) / step;
        const int64_t all = neurons + (hidden - block.neurons + 2 * W - 1) / (2 * W);
        const auto [from, to] = share(all, part, parts);
        const auto group_of = [&](int64_t u) {
            const T* const up = row(block.up_plus, 0);
            return u < neurons ? Group::of(row(block.gate, 0), up, u * step, block.neurons, block.depth)
                               : Group::of(nullptr, up, block.neurons + (u - neurons) * 2 * W, hidden, block.depth);
        };
        std::fill(kept.begin(), kept.end(), 0);
        const std::vector<Panel> panels = panels_of<M>((count + W - 1) / W);
        const int64_t steps = up_to(block.depth, M::PAD) / M::STEP;
        for (int64_t u = from; u < to; ++u) {
            const Group group = group_of(u);
            Ahead ahead;
            if (u + 1 < to) {
                const Group next = group_of(u + 1);
                ahead.add(next.rows[0], 1, next.count[0] * block.depth * sizeof(T), 0);
                ahead.add(next.rows[1], 1, next.count[1] * block.depth * sizeof(T), 0);
            } else
                add_down(ahead, 0);
            ahead.spread(panels.size() * ((steps + 15) / 16) * M::CALLS);
            const Stored a = stored(group.rows, block.depth, block.depth, group.count);
            for (const auto [panel, size] : panels) {
                M::multiply(a.rows[0], a.rows[1], a.stride, tokens + panel * W * steps, size, steps, sums,
                            sums + W * LDC, LDC, false, ahead);
                for (int v = 0; v < size; ++v) {
                    const int64_t t = (panel + v) * W;
                    const int some = std::min<int64_t>(W, count - t);
                    const Place place{first + t, some, z + t * stride, stride, kept.data() + (batch.kept ? t : 0)};
                    const float *one = sums + v * W, *two = one + W * LDC;
                    if (u < neurons && block.gate) {
                        finish(true, one, two, group.first, group.count[0], place);
                        continue;
                    }
                    for (int i = 0; i < 2; ++i)
                        if (group.count[i] > 0)
                            finish(u < neurons, nullptr, i ? two : one, group.first + i * W, group.count[i], place);
                }
            }
        }
        for (int64_t t = 0; t < static_cast<int64_t>(kept.size()) && t < count; ++t) {
#pragma omp atomic
            batch.kept[first + t] += kept[t];
        }
    }

    // This thread's columns of y, from z [count][stride].
    void combine(int64_t first, int64_t count, const T* z, int64_t stride) {
        const std::vector<Panel> panels = panels_of<M>(width / W);
        if (panels.empty()) return;
        if (!hidden) std::fill(y, y + count * y_stride, 0.0f);
        for (int64_t k = 0; k < hidden; k += DEPTH) {
            const int64_t terms = std::min(DEPTH, hidden - k), steps = up_to(terms, M::PAD) / M::STEP;
            copy_down(panels, k, terms, steps);
            Ahead ahead;
            add_down(ahead, k + terms);
            ahead.spread((count + 2 * W - 1) / (2 * W) * panels.size() * ((steps + 15) / 16) * M::CALLS);
            for (int64_t t = 0; t < count; t += 2 * W) {
                const T* const rows[2] = {z + t * stride + k, z + (t + W) * stride + k};
                const int64_t left = count - t;
                const int counts[2] = {static_cast<int>(std::min<int64_t>(W, left)),
                                       static_cast<int>(std::clamp<int64_t>(left - W, 0, W))};
                const Stored a = stored(rows, stride, terms, counts);
                for (const auto [panel, size] : panels) {
                    float* const c = y + t * y_stride + panel * W;
                    M::multiply(a.rows[0], a.rows[1], a.stride, down + panel * W * steps, size, steps, c,
                                c + W * y_stride, y_stride, k > 0, ahead);
                }
            }
        }
        for (int64_t t = 0; t < count; ++t) {
            T* const to = static_cast<T*>(batch.y) + (first + t) * block.depth;
            const bool padding = batch.slots && batch.slots[first + t] < 0;
            for (int64_t d = begin; d < end; d += W) {
                const int n = std::min<int64_t>(W, end - d);
                const V value = load(y + t * y_stride + d - begin) + bias(block.down_bias, d, n);
                store_first(to + d, padding ? zero() : rounded(value, T{}), n);
            }
        }
    }

private:
    static constexpr int64_t LDC = M::VECTORS * W;

    // Rows that are multiplied together: gate and up of W neurons, or 2 W rows of one matrix.
    struct Group {
        const T* rows[2];
        int64_t first;
        int count[2];
        static Group of(const T* gate, const T* up, int64_t j, int64_t last, int64_t depth) {
            const int one = std::min<int64_t>(W, last - j), two = gate ? one : std::min<int64_t>(W, last - j - W);
            return {{(gate ? gate : up) + j * depth, up + (gate ? j : j + W) * depth}, j, {one, std::max(two, 0)}};
        }
    };
    struct Place {  // where W tokens' z go
        int64_t token;
        int count;
        T* z;
        int64_t stride;
        int64_t* kept;
    };
    struct Stored {
        const A* rows[2];  // the second may be null
        int64_t stride;
    };

    const Block& block;
    const Batch& batch;
    const Outputs& out;
    B* const tokens;
    const int part, parts;
    const int64_t hidden;  // F + r, or F where no token is sparse
    int64_t begin, end, width, y_stride;  // this thread's columns
    std::vector<int64_t> kept;
    A* few;
    float *sums, *y;
    B* down;

    const T* row(const void* matrix, int64_t j) const {
        return matrix ? static_cast<const T*>(matrix) + j * block.depth : nullptr;
    }
    const T* x_row(int64_t t) const { return static_cast<const T*>(batch.x) + t * batch.x_stride; }
    static V bias(const void* biases, int64_t d, int n) {
        return biases ? load_upto(static_cast<const T*>(biases) + d, n) : zero();
    }

    // Down rows from k on, as many as are multiplied at once, this thread's columns.
    void add_down(Ahead& ahead, int64_t k) const {
        const int64_t rows = std::min(DEPTH, hidden - k);
        const int64_t bytes = (end - begin) * sizeof(T), stride = block.depth * sizeof(T);
        if (rows > 0) ahead.add(row(block.down_plus, k) + begin, rows, bytes, stride);
    }

    // A of two groups of rows: themselves, or copies with zeros where rows or values are missing.
    Stored stored(const T* const* rows, int64_t stride, int64_t terms, const int* count) {
        const int64_t padded_terms = up_to(terms, M::PAD);
        const bool second = count[1] > 0;
        if constexpr (M::DIRECT)
            if (padded_terms == terms && count[0] == W && (count[1] == W || !second)) {
                const auto as_stored = [](const T* p) { return reinterpret_cast<const A*>(p); };
                return {{as_stored(rows[0]), second ? as_stored(rows[1]) : nullptr}, stride};
            }
        for (int i = 0; i < 1 + second; ++i)
            for (int r = 0; r < W; ++r) {
                A* const to = few + (i * W + r) * padded_terms;
                const bool some = r < count[i];
                if (some) M::copy(rows[i] + r * stride, terms, to);
                std::fill(to + (some ? terms : 0), to + padded_terms, A{});
            }
        return {{few, second ? few + W * padded_terms : nullptr}, padded_terms};
    }

    // Rows [k, k + terms) of W_2 and R, this thread's columns, as B.
    void copy_down(const std::vector<Panel>& panels, int64_t k, int64_t terms, int64_t steps) {
        for (int64_t s = 0; s < steps; ++s)
            for (const auto [panel, size] : panels)
                for (int v = 0; v < size; ++v) {
                    const int64_t d = begin + (panel + v) * W;
                    const T* const from = row(block.down_plus, k + s * M::STEP) + d;
                    B* const to = down + panel * W * steps + (s * size + v) * W;
                    M::interleave(from, block.depth, terms - s * M::STEP, std::min<int64_t>(W, end - d), to);
                }
    }

    // z of `count` neurons from `first`, for W tokens, from their sums [neuron][token], rows LDC apart: activated if
    // `active` (low-rank rows have gate 1), rounded where torch rounds, masked.
    void finish(bool active, const float* gate, const float* up, int64_t first, int count,
                const Place& place) {
        alignas(64) float gate_biases[W] = {}, up_biases[W] = {};
        if (active && block.gate_bias && gate) store(gate_biases, bias(block.gate_bias, first, count));
        if (active && block.up_bias) store(up_biases, bias(block.up_bias, first, count));
        V z[W], input[W], size[W];
        for (int r = 0; r < W; ++r) {
            z[r] = rounded(load(up + r * LDC) + set1(up_biases[r]), T{});
            if (!active) continue;
            input[r] = gate ? rounded(load(gate + r * LDC) + set1(gate_biases[r]), T{}) : z[r];
            const V g = rounded(activate(input[r], block.activation), T{});
            z[r] = gate ? rounded(g * z[r], T{}) : g;
            if (batch.tau) size[r] = max(g, -g) * set1(r < count ? scale_of(block, first + r) : 0.0f);
        }
        transpose(z);
        if (active && batch.tau) transpose(size);
        if (active && out.gate) transpose(input);
        for (int i = 0; i < place.count; ++i) {
            const int64_t token = place.token + i, slot = batch.slots ? batch.slots[token] : 0;
            uint32_t mask = slot < 0 ? 0 : (1u << count) - 1;
            if (active && slot >= 0 && batch.keep) mask = nonzero(batch.keep + slot * block.neurons + first, count);
            if (active && slot >= 0 && batch.tau) {
                mask &= at_least(size[i], set1(batch.tau[slot]));
                place.kept[i] += __builtin_popcount(mask);
            }
            store_first(place.z + i * place.stride + first, zero_unless(mask, z[i]), count);
            if (active && out.gate)
                store_first(static_cast<T*>(out.gate) + token * out.gate_stride + first, input[i], count);
        }
    }
};

template <class T, class M>
void run(const Block& block, const Batch& batch, const Outputs& out, int threads) {
    const int64_t blocks = (batch.tokens + BLOCK - 1) / BLOCK;
    if (!blocks) return;
    const int64_t hidden = block.neurons + (batch.slots ? block.rank : 0);
    static thread_local std::vector<typename M::B> tokens_buffer;
    static thread_local std::vector<T> z_buffer;
    const int64_t most = std::min(BLOCK, batch.tokens), steps = up_to(block.depth, M::PAD) / M::STEP;
    auto* const tokens = scratch(tokens_buffer, up_to(most, W) * steps);
    const int64_t stride = out.z ? out.z_stride : padded<T>(hidden);
    T* const own = out.z ? nullptr : scratch(z_buffer, most * stride);
#pragma omp parallel num_threads(threads)
    {
        M::begin();
        Worker<T, M> worker(block, batch, out, tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t b = 0; b < blocks; ++b) {
            const auto [first, last] = share(batch.tokens, b, blocks);
            T* const z = own ? own : static_cast<T*>(out.z) + first * stride;
            worker.transpose_tokens(first, last - first);
#pragma omp barrier
            worker.project(first, last - first, z, stride);
#pragma omp barrier
            worker.combine(first, last - first, z, stride);
        }
        M::end();
    }
}

}  // namespace

// Whether bfloat16 runs on AMX.
extern "C" int caprese_has_tiles() {
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
    return Tiles::available();
#else
    return 0;
#endif
}

// kept must be zero on entry.
extern "C" void caprese_products(const Block* block, const Batch* batch, void* z, int64_t z_stride, void* gate,
                                 int64_t gate_stride, int threads) {
    const Outputs out{z, gate, z_stride, gate_stride};
    switch (block->dtype) {
        case 0: return run<float, Floats<float>>(*block, *batch, out, threads);
        case 1:
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__)
            if (caprese_has_tiles()) return run<Bf16, Tiles>(*block, *batch, out, threads);
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
            return run<Bf16, Pairs>(*block, *batch, out, threads);
#else
            return run<Bf16, Floats<Bf16>>(*block, *batch, out, threads);
#endif
        default: return run<Half, Floats<Half>>(*block, *batch, out, threads);
    }
}
