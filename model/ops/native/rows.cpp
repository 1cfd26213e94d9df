// What lies between a layer's matrices, row by row: norms, rotations with the cache's writes, gates and sums.
//
// All is computed in float32 and rounded where transformers rounds it. A row's answer depends on nothing but the row.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lora/ops/native/lanes.h"

namespace {

constexpr int64_t FEW_NUMBERS = 1 << 15;  // of all rows: less is not worth waking another thread

// Call `work` for every row, by several threads where that pays.
template <typename Work>
void for_each_row(int64_t rows, int64_t width, int threads, Work work) {
    if (threads == 1 || rows * width <= FEW_NUMBERS) {
        for (int64_t row = 0; row < rows; row++) work(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) work(row);
}

INLINE int some_of(int64_t left) { return int(std::min<int64_t>(LANES, left)); }

template <typename T>
INLINE void load_up_to(const T* from, int some, Lanes& to) {
    some == LANES ? load(from, to) : load_some(from, some, to);
}

template <typename T>
INLINE void store_up_to(T* to, int some, Lanes value) {
    some == LANES ? store(to, value) : store_some(to, some, value);
}

// to = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467), the quotient rounded first.
template <typename T>
FOR_EACH_PROCESSOR void norm_row(const T* x, const T* weight, int64_t width, float eps, T* to) {
    Lanes squares = {}, value, factor;
    for (int64_t at = 0; at < width; at += LANES) {
        load_up_to(x + at, some_of(width - at), value);
        squares += value * value;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    for (int64_t at = 0; at < width; at += LANES) {
        const int some = some_of(width - at);
        load_up_to(x + at, some, value);
        load_up_to(weight + at, some, factor);
        value *= scale;
        round_as(x, value);
        store_up_to(to + at, some, value * factor);
    }
}

// Turn each pair (head[i], head[i + dim / 2]) by its angle; the sines of the lower half are negative.
template <typename T>
FOR_EACH_PROCESSOR void rotate_head(T* head, const T* cos, const T* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t at = 0; at < half; at += LANES) {
        const int some = some_of(half - at);
        Lanes low, high, low_cos, high_cos, low_sin, high_sin;
        load_up_to(head + at, some, low), load_up_to(head + half + at, some, high);
        load_up_to(cos + at, some, low_cos), load_up_to(cos + half + at, some, high_cos);
        load_up_to(sin + at, some, low_sin), load_up_to(sin + half + at, some, high_sin);
        low_cos *= low, high_cos *= high;
        round_as(head, low_cos), round_as(head, high_cos);
        store_up_to(head + at, some, low_cos + high * low_sin);
        store_up_to(head + half + at, some, high_cos + low * high_sin);
    }
}

// to = silu(gate) * up, silu's value rounded first.
template <typename T>
FOR_EACH_PROCESSOR void gate_row(const T* gate, const T* up, int64_t width, T* to) {
    for (int64_t at = 0; at < width; at += LANES) {
        const int some = some_of(width - at);
        Lanes value, other;
        load_up_to(gate + at, some, value);
        load_up_to(up + at, some, other);
        Lanes small = value < 0.0f ? value : -value;
        exp_of(small);
        value *= (value < 0.0f ? small : Lanes{} + 1.0f) / (1.0f + small);
        round_as(gate, value);
        store_up_to(to + at, some, value * other);
    }
}

template <typename T>
FOR_EACH_PROCESSOR void add_row(const T* residual, T* y, int64_t width) {
    for (int64_t at = 0; at < width; at += LANES) {
        const int some = some_of(width - at);
        Lanes value, before;
        load_up_to(y + at, some, value);
        load_up_to(residual + at, some, before);
        store_up_to(y + at, some, before + value);
    }
}

}  // namespace

// What follows is laid out as model/ops/native/library.py says.
struct Heads {  // of a step's rows and of one layer's cache; qk_norm is null where heads are not normed
    void* rows;  // [rows, queries + 2 * heads, dim]: queries, then keys, then values
    const void *qk_norm, *cos, *sin;  // [queries + heads, dim]; [rows, dim]
    const int64_t* slots;  // of each row: block * block_size + offset
    void *keys, *values;
    int64_t block_stride, block_size, queries, heads, dim;
};

namespace {

template <typename T>
void store_row(const Heads& of, int64_t row, float eps) {
    const int64_t turned = of.queries + of.heads, size = of.heads * of.dim;
    T* begin = static_cast<T*>(of.rows) + row * (turned + of.heads) * of.dim;
    for (int64_t head = 0; head < turned; head++) {
        T* one = begin + head * of.dim;
        if (of.qk_norm) norm_row(one, static_cast<const T*>(of.qk_norm) + head * of.dim, of.dim, eps, one);
        rotate_head(one, static_cast<const T*>(of.cos) + row * of.dim, static_cast<const T*>(of.sin) + row * of.dim,
                    of.dim);
    }
    const int64_t block = of.slots[row] / of.block_size, offset = of.slots[row] % of.block_size;
    const int64_t place = block * of.block_stride + offset * size;
    memcpy(static_cast<T*>(of.keys) + place, begin + of.queries * of.dim, size * sizeof(T));
    memcpy(static_cast<T*>(of.values) + place, begin + turned * of.dim, size * sizeof(T));
}

// Call `work` with a number of the kind that rows hold.
template <typename Work>
void in_dtype(int is_narrow, Work work) {
    is_narrow ? work(bfloat16()) : work(float());
}

}  // namespace

extern "C" int loraserve_size_of(int) { return int(sizeof(Heads)); }

// In all of these rows are bfloat16 if narrow, else float32, and follow one another without gaps.
extern "C" void loraserve_norm(const void* x, const void* weight, int64_t rows, int64_t width, float eps, void* to,
                               int is_narrow, int threads) {
    in_dtype(is_narrow, [=](auto one) {
        using T = decltype(one);
        for_each_row(rows, width, threads, [=](int64_t row) {
            norm_row(static_cast<const T*>(x) + row * width, static_cast<const T*>(weight), width, eps,
                     static_cast<T*>(to) + row * width);
        });
    });
}

// x: [rows, 2 * width], gates and then what they let through; to: [rows, width].
extern "C" void loraserve_gate(const void* x, void* to, int64_t rows, int64_t width, int is_narrow, int threads) {
    in_dtype(is_narrow, [=](auto one) {
        using T = decltype(one);
        for_each_row(rows, width, threads, [=](int64_t row) {
            const T* gate = static_cast<const T*>(x) + 2 * row * width;
            gate_row(gate, gate + width, width, static_cast<T*>(to) + row * width);
        });
    });
}

// y: [rows, width] becomes residual + y.
extern "C" void loraserve_add(const void* residual, void* y, int64_t rows, int64_t width, int is_narrow, int threads) {
    in_dtype(is_narrow, [=](auto one) {
        using T = decltype(one);
        for_each_row(rows, width, threads, [=](int64_t row) {
            add_row(static_cast<const T*>(residual) + row * width, static_cast<T*>(y) + row * width, width);
        });
    });
}

extern "C" void loraserve_store_heads(const Heads* heads, int64_t rows, float eps, int is_narrow, int threads) {
    in_dtype(is_narrow, [=](auto one) {
        using T = decltype(one);
        const int64_t width = (heads->queries + 2 * heads->heads) * heads->dim;
        for_each_row(rows, width, threads, [=](int64_t row) { store_row<T>(*heads, row, eps); });
    });
}
