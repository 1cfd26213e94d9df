// Attend for one row each of many sequences, over keys and values in blocks.
//
// A row's sums have one order whatever else is in the batch: 16 tokens at a time in order of position. Scores,
// weights and sums are in float32 and are rounded once, with the answer. What a row may not look at is not read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "lora/ops/native/lanes.h"

namespace {

struct Cache {  // of one layer; within a block tokens lie one after another, each with all its heads
    const void *keys, *values;
    int64_t block_stride, block_size, heads, dim;
};

struct Sequence {  // the row that looks at positions first:stop; block i of `blocks` holds i * block_size onwards
    int64_t row, first, stop;
    const int64_t* blocks;
};

// The sum of each of 16 vectors, as one vector.
INLINE void sums_of(Lanes rows[LANES], Lanes& to) {
    constexpr Masks low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    constexpr Masks low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    constexpr Masks low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    constexpr Masks low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
#define HALVE(count, low, width)                                                                     \
    for (int at = 0; at < count; at++)                                                               \
        rows[at] = __builtin_shuffle(rows[2 * at], rows[2 * at + 1], low) +                          \
                   __builtin_shuffle(rows[2 * at], rows[2 * at + 1], low + width);
    HALVE(8, low1, 1)
    HALVE(4, low2, 2)
    HALVE(2, low4, 4)
    HALVE(1, low8, 8)
#undef HALVE
    to = rows[0];
}

// Thirty-two numbers in whichever order is cheapest to take apart and to put together.
INLINE void take_apart(const bfloat16* from, Pair& to) { load(from, to); }
INLINE void take_apart(const float* from, Pair& to) { load(from, to.even), load(from + LANES, to.odd); }
INLINE void put_together(bfloat16* to, const Pair& from) { store(to, from); }
INLINE void put_together(float* to, const Pair& from) { store(to, from.even), store(to + LANES, from.odd); }

// Widen `dim` numbers, in the order of take_apart, which is one and the same for queries and keys.
template <typename T>
INLINE void widen(const T* from, int64_t dim, float* to) {
    int64_t at = 0;
    for (; at + PAIR <= dim; at += PAIR) {
        Pair wide;
        take_apart(from + at, wide);
        store(to + at, wide.even), store(to + at + LANES, wide.odd);
    }
    for (; at < dim; at += LANES) {
        Lanes wide;
        load(from + at, wide);
        store(to + at, wide);
    }
}

// Where each token that a row looks at begins, in numbers from a layer's begin.
INLINE void find_places(const Cache& cache, const Sequence& of, int64_t head, int64_t* places) {
    int64_t position = of.first;
    while (position < of.stop) {
        const int64_t number = position / cache.block_size, next = std::min(of.stop, (number + 1) * cache.block_size);
        int64_t place = of.blocks[number] * cache.block_stride + head * cache.dim +
                        (position - number * cache.block_size) * cache.heads * cache.dim;
        for (; position < next; position++, place += cache.heads * cache.dim) *places++ = place;
    }
}

// scores[query, t] = dot(q[query], key t) * scale, -inf beyond the last token.
template <typename T>
INLINE void score(const T* layer, const int64_t* places, int64_t tokens, int64_t dim, const float* q, int queries,
                  float scale, float* scores, int64_t width, float* keys) {
    for (int64_t start = 0; start < tokens; start += LANES) {
        const int some = int(std::min<int64_t>(LANES, tokens - start));
        for (int t = 0; t < some; t++) widen(layer + places[start + t], dim, keys + t * dim);
        for (int query = 0; query < queries; query++) {
            Lanes sums[LANES] = {}, all;
            for (int64_t at = 0; at < dim; at += LANES) {
                Lanes row, key;
                load(q + query * dim + at, row);
                for (int t = 0; t < LANES; t++) {
                    load(keys + t * dim + at, key);
                    sums[t] += row * key;
                }
            }
            sums_of(sums, all);
            all *= scale;
            for (int t = some; t < LANES; t++) all[t] = -std::numeric_limits<float>::infinity();
            store(scores + query * width + start, all);
        }
    }
}

// Turn scores into weights of e to their distance from the largest; return one over their sum.
INLINE float weigh(float* scores, int64_t width) {
    Lanes largest, value, sums = {};
    load(scores, largest);
    for (int64_t at = LANES; at < width; at += LANES) {
        load(scores + at, value);
        largest = value > largest ? value : largest;
    }
    float most = largest[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, largest[lane]);
    for (int64_t at = 0; at < width; at += LANES) {
        load(scores + at, value);
        Masks none = value == -std::numeric_limits<float>::infinity();
        value -= most;
        exp_of(value);
        value = none ? Lanes{} : value;
        sums += value;
        store(scores + at, value);
    }
    return 1.0f / sum(sums);
}

// out[query, columns] = sum of weights[query, t] * value t, for QUERIES queries and PAIRS * 32 columns.
template <int QUERIES, int PAIRS, typename T>
INLINE void mix(const T* layer, const int64_t* places, int64_t tokens, int64_t dim, const float* weights, int64_t width,
                const float* over, T* out) {
    Pair sums[QUERIES][PAIRS] = {};
    for (int64_t t = 0; t < tokens; t++) {
        const T* value = layer + places[t];
        Pair values[PAIRS];
        for (int pair = 0; pair < PAIRS; pair++) take_apart(value + pair * PAIR, values[pair]);
        for (int query = 0; query < QUERIES; query++)
            for (int pair = 0; pair < PAIRS; pair++) {
                sums[query][pair].even += weights[query * width + t] * values[pair].even;
                sums[query][pair].odd += weights[query * width + t] * values[pair].odd;
            }
    }
    for (int query = 0; query < QUERIES; query++)
        for (int pair = 0; pair < PAIRS; pair++)
            put_together(out + query * dim + pair * PAIR,
                         Pair{sums[query][pair].even * over[query], sums[query][pair].odd * over[query]});
}

// The same for 16 columns.
template <int QUERIES, typename T>
INLINE void mix_last(const T* layer, const int64_t* places, int64_t tokens, int64_t dim, const float* weights,
                     int64_t width, const float* over, T* out) {
    Lanes sums[QUERIES] = {}, value;
    for (int64_t t = 0; t < tokens; t++) {
        load(layer + places[t], value);
        for (int query = 0; query < QUERIES; query++) sums[query] += weights[query * width + t] * value;
    }
    for (int query = 0; query < QUERIES; query++) store(out + query * dim, sums[query] * over[query]);
}

template <int QUERIES, typename T>
INLINE void mix_columns(const T* layer, const int64_t* places, int64_t tokens, int64_t dim, const float* weights,
                        int64_t width, const float* over, T* out) {
    int64_t at = 0;
    for (; at + 2 * PAIR <= dim; at += 2 * PAIR)
        mix<QUERIES, 2>(layer + at, places, tokens, dim, weights, width, over, out + at);
    for (; at + PAIR <= dim; at += PAIR)
        mix<QUERIES, 1>(layer + at, places, tokens, dim, weights, width, over, out + at);
    if (at < dim) mix_last<QUERIES>(layer + at, places, tokens, dim, weights, width, over, out + at);
}

struct Room {  // one thread's temporaries, for sequences of up to so many tokens
    std::vector<int64_t> places;
    std::vector<float> q, keys, scores, over;

    Room(int queries, int64_t dim, int64_t tokens)
        : places(tokens), q(queries * dim), keys(LANES * dim), scores(queries * (tokens + LANES)), over(queries) {}
};

// The queries of one head of keys: q and out are [queries, dim].
template <typename T>
FOR_EACH_PROCESSOR void attend_head(const Cache& cache, const Sequence& of, int64_t head, const T* q, int queries,
                                    T* out, Room& room) {
    const int64_t dim = cache.dim, tokens = of.stop - of.first, width = (tokens + LANES - 1) / LANES * LANES;
    const int64_t* places = room.places.data();
    const T* values = static_cast<const T*>(cache.values);
    float *scores = room.scores.data(), *over = room.over.data();
    find_places(cache, of, head, room.places.data());
    for (int query = 0; query < queries; query++) widen(q + query * dim, dim, room.q.data() + query * dim);
    score(static_cast<const T*>(cache.keys), places, tokens, dim, room.q.data(), queries, 1.0f / std::sqrt(float(dim)),
          scores, width, room.keys.data());
    for (int query = 0; query < queries; query++) over[query] = weigh(scores + query * width, width);
    int query = 0;
    for (; query + 4 <= queries; query += 4)
        mix_columns<4>(values, places, tokens, dim, scores + query * width, width, over + query, out + query * dim);
    for (; query + 2 <= queries; query += 2)
        mix_columns<2>(values, places, tokens, dim, scores + query * width, width, over + query, out + query * dim);
    for (; query < queries; query++)
        mix_columns<1>(values, places, tokens, dim, scores + query * width, width, over + query, out + query * dim);
}

template <typename T>
void attend(const T* q, int64_t q_stride, T* out, const Cache& cache, const Sequence* sequences, int64_t count,
            int queries, int threads) {
    int64_t widest = 0;
    for (int64_t at = 0; at < count; at++) widest = std::max(widest, sequences[at].stop - sequences[at].first);
    const int64_t row_size = cache.heads * queries * cache.dim;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room room(queries, cache.dim, widest);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < count * cache.heads; item++) {
            const Sequence& of = sequences[item / cache.heads];
            const int64_t head = item % cache.heads, at = head * queries * cache.dim;
            attend_head(cache, of, head, q + of.row * q_stride + at, queries, out + of.row * row_size + at, room);
        }
    }
}

}  // namespace

extern "C" int loraserve_size_of(int kind) { return int(kind == 0 ? sizeof(Cache) : sizeof(Sequence)); }

// q: [rows, q_stride], of whose rows the first heads * queries * dim numbers are read; out: [rows, heads * queries *
// dim]. `queries` heads of q share one of the cache. All are bfloat16 if narrow, else float32; dim is a multiple of 16.
extern "C" void loraserve_attend(const void* q, int64_t q_stride, void* out, const Cache* cache,
                                 const Sequence* sequences, int64_t count, int queries, int is_narrow, int threads) {
    if (is_narrow)
        attend(static_cast<const bfloat16*>(q), q_stride, static_cast<bfloat16*>(out), *cache, sequences, count,
               queries, threads);
    else
        attend(static_cast<const float*>(q), q_stride, static_cast<float*>(out), *cache, sequences, count, queries,
               threads);
}
